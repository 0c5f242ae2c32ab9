//! Holds what must not leave before the log is durable.

use std::collections::BTreeMap;

use cairn_proto::ids::TxId;

/// Items that wait for their transaction. It never lets one go before that is durable, and keeps none that may go.
pub struct Hold<T> {
    durable: TxId,
    /// Keyed by transaction, then by arrival, so that items of one transaction leave in the order in which they came.
    waiting: BTreeMap<(TxId, u64), T>,
    arrivals: u64,
}

impl<T> Hold<T> {
    /// Everything up to `durable` is durable.
    pub fn new(durable: TxId) -> Self {
        Self { durable, waiting: BTreeMap::new(), arrivals: 0 }
    }

    /// Takes an item that depends on a transaction (0: on nothing); gives it back if it may leave at once.
    #[must_use]
    pub fn offer(&mut self, depends_on: TxId, item: T) -> Option<T> {
        if depends_on <= self.durable {
            return Some(item);
        }
        self.waiting.insert((depends_on, self.arrivals), item);
        self.arrivals += 1;
        None
    }

    /// The log is durable up to `durable`: returns what may leave now, in order. An older number changes nothing.
    #[must_use]
    pub fn advance(&mut self, durable: TxId) -> Vec<T> {
        if durable <= self.durable {
            return Vec::new();
        }
        self.durable = durable;
        let later = self.waiting.split_off(&(durable.next(), 0));
        std::mem::replace(&mut self.waiting, later).into_values().collect()
    }

    /// The last durable transaction.
    pub fn durable(&self) -> TxId {
        self.durable
    }

    /// Items that wait.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.waiting.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Clone, Debug)]
    enum Step {
        Offer(u64),
        Advance(u64),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![(0..50u64).prop_map(Step::Offer), (0..50u64).prop_map(Step::Advance)];
        proptest::collection::vec(step, 0..200)
    }

    proptest! {
        /// Whatever the order of replies and syncs: nothing leaves before its transaction is durable, nothing stays that
        /// could leave, nothing is lost or doubled, and items of one transaction keep their order.
        #[test]
        fn nothing_precedes_its_sync(steps in steps()) {
            let mut hold = Hold::new(TxId(0));
            let mut durable = 0;
            let mut left: Vec<(u64, usize)> = Vec::new();
            let mut offered = 0;
            for (number, step) in steps.iter().enumerate() {
                let released: Vec<(u64, usize)> = match *step {
                    Step::Offer(on) => {
                        offered += 1;
                        hold.offer(TxId(on), (on, number)).into_iter().collect()
                    }
                    Step::Advance(to) => {
                        durable = durable.max(to);
                        hold.advance(TxId(to))
                    }
                };
                for &(on, _) in &released {
                    prop_assert!(on <= durable, "left at {durable}, depends on {on}");
                }
                left.extend(released);
                prop_assert!(hold.waiting.keys().all(|&(on, _)| on.0 > durable));
                prop_assert_eq!(left.len() + hold.len(), offered);
            }
            left.extend(hold.advance(TxId(u64::MAX - 1)));
            prop_assert_eq!(left.len(), offered);
            for on in 0..50 {
                let order: Vec<usize> = left.iter().filter(|item| item.0 == on).map(|item| item.1).collect();
                prop_assert!(order.is_sorted(), "items of transaction {on} changed their order: {order:?}");
            }
        }
    }
}

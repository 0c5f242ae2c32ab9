//! What the scheduler knows of a node: its slots, whether it waits there, and whether it trusts it.

use std::collections::BTreeSet;

use super::{AttemptKey, NodeInfo};

/// Failed attempts in a row that make a node be left alone.
const NODE_FAILURES: u32 = 3;
/// How long it is left alone the first time; doubled each time that its probe fails.
const OPEN_MS: u64 = 10_000;
/// And at most.
const MAX_OPEN_MS: u64 = 300_000;
/// A node that told us to wait is asked again after this, should its offer have been lost.
const ASK_AGAIN_MS: u64 = 3_000;

/// Circuit breaker of a node.
///
/// ```text
/// Closed ──3 failures in a row, or the node is lost──▶ Open ──its time is over──▶ HalfOpen ──probe succeeds──▶ Closed
///                                                       ▲                            │
///                                                       └──────probe fails (time doubled)
/// ```
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Breaker {
    /// Trusted.
    Closed {
        /// Failures since the last success.
        failures: u32,
        /// Successes on other nodes when the first of them happened.
        elsewhere: u64,
    },
    /// Left alone.
    Open { until_ms: u64, for_ms: u64 },
    /// Gets one attempt, the probe.
    HalfOpen { for_ms: u64 },
}

/// Whether the job waits for slots there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Asking {
    /// It has not been turned away.
    No,
    /// All slots were taken: the node says when it is our turn.
    Waiting { since_ms: u64 },
    /// So many are kept for us.
    Offered { slots: u32 },
}

pub struct Node {
    pub info: NodeInfo,
    /// Attempts that hold a slot there, given up or not.
    pub attempts: BTreeSet<AttemptKey>,
    /// Due maps that have their block there.
    pub local: BTreeSet<u32>,
    pub breaker: Breaker,
    pub asking: Asking,
    /// Attempts that ended well there.
    pub successes: u64,
}

impl Node {
    pub fn new(info: NodeInfo) -> Self {
        Self {
            info,
            attempts: BTreeSet::new(),
            local: BTreeSet::new(),
            breaker: Breaker::Closed { failures: 0, elsewhere: 0 },
            asking: Asking::No,
            successes: 0,
        }
    }

    pub fn used(&self) -> u32 {
        self.attempts.len() as u32
    }

    /// Can an attempt be started there?
    pub fn is_free(&self, now_ms: u64) -> bool {
        let room = match self.breaker {
            Breaker::Closed { .. } => self.used() < self.info.slots,
            Breaker::Open { until_ms, .. } => until_ms <= now_ms && self.attempts.is_empty() && self.info.slots > 0,
            Breaker::HalfOpen { .. } => self.attempts.is_empty() && self.info.slots > 0,
        };
        room && match self.asking {
            Asking::No | Asking::Offered { slots: 1.. } => true,
            Asking::Offered { slots: 0 } => false,
            Asking::Waiting { since_ms } => since_ms + ASK_AGAIN_MS <= now_ms,
        }
    }

    /// Is nothing held against it?
    pub fn is_trusted(&self) -> bool {
        matches!(self.breaker, Breaker::Closed { .. })
    }

    /// Will it be trusted within `ms`?
    pub fn is_trusted_soon(&self, now_ms: u64, ms: u64) -> bool {
        self.info.slots > 0
            && match self.breaker {
                Breaker::Open { until_ms, .. } => until_ms <= now_ms + ms,
                _ => true,
            }
    }

    /// When [`Self::is_free`] may change by itself.
    pub fn next_look_ms(&self) -> Option<u64> {
        let opens = match self.breaker {
            Breaker::Open { until_ms, .. } => Some(until_ms),
            _ => None,
        };
        let asks = match self.asking {
            Asking::Waiting { since_ms } => Some(since_ms + ASK_AGAIN_MS),
            _ => None,
        };
        opens.into_iter().chain(asks).max()
    }

    pub fn launched(&mut self, key: AttemptKey) {
        self.attempts.insert(key);
        if let Breaker::Open { for_ms, .. } = self.breaker {
            self.breaker = Breaker::HalfOpen { for_ms };
        }
        self.asking = match self.asking {
            Asking::Offered { slots } if slots > 1 => Asking::Offered { slots: slots - 1 },
            _ => Asking::No,
        };
    }

    pub fn succeeded(&mut self) {
        self.successes += 1;
        self.breaker = Breaker::Closed { failures: 0, elsewhere: 0 };
    }

    /// An attempt failed there; `elsewhere`: attempts that ended well on other nodes so far. Where nothing ends well the nodes are not to blame.
    pub fn failed(&mut self, elsewhere: u64, now_ms: u64) {
        match &mut self.breaker {
            Breaker::Closed { failures, elsewhere: before } => {
                if *failures == 0 {
                    *before = elsewhere;
                }
                *failures += 1;
                if *failures >= NODE_FAILURES && elsewhere > *before {
                    self.open(OPEN_MS, now_ms);
                }
            }
            Breaker::HalfOpen { for_ms } => {
                let for_ms = (*for_ms * 2).min(MAX_OPEN_MS);
                self.open(for_ms, now_ms);
            }
            Breaker::Open { .. } => {}
        }
    }

    /// The node is gone, with all that it held.
    pub fn lost(&mut self, now_ms: u64) {
        self.attempts.clear();
        self.asking = Asking::No;
        let for_ms = match self.breaker {
            Breaker::HalfOpen { for_ms } => (for_ms * 2).min(MAX_OPEN_MS),
            _ => OPEN_MS,
        };
        self.open(for_ms, now_ms);
    }

    fn open(&mut self, for_ms: u64, now_ms: u64) {
        self.breaker = Breaker::Open { until_ms: now_ms + for_ms, for_ms };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node() -> Node {
        let (id, host, address, rack) = ("n".into(), "h".into(), String::new(), "/r".into());
        Node::new(NodeInfo { id, host, address, rack, slots: 2 })
    }

    fn key(index: u32) -> AttemptKey {
        (0, index, 0)
    }

    #[test]
    fn a_node_is_probed_once_before_it_is_trusted_again() {
        let mut node = node();
        (1..=3).for_each(|elsewhere| node.failed(elsewhere, 0));
        assert!(!node.is_free(OPEN_MS - 1) && node.is_free(OPEN_MS));
        node.launched(key(1));
        assert!(!node.is_free(OPEN_MS), "one probe alone, though there are two slots");
        node.attempts.clear();
        node.failed(3, OPEN_MS);
        assert!(!node.is_free(OPEN_MS + 2 * OPEN_MS - 1), "twice as long");
        node.launched(key(2));
        node.succeeded();
        assert!(node.is_free(OPEN_MS) && node.breaker == Breaker::Closed { failures: 0, elsewhere: 0 });
    }

    #[test]
    fn where_nothing_ends_well_no_node_is_blamed() {
        let mut node = node();
        (0..10).for_each(|_| node.failed(5, 0));
        assert!(node.is_free(0));
        node.failed(6, 0);
        assert!(!node.is_free(0), "others do well");
    }

    #[test]
    fn it_waits_until_it_is_its_turn() {
        let mut node = node();
        node.asking = Asking::Waiting { since_ms: 5 };
        assert!(!node.is_free(6) && node.next_look_ms() == Some(5 + ASK_AGAIN_MS) && node.is_free(5 + ASK_AGAIN_MS));
        node.asking = Asking::Offered { slots: 1 };
        assert!(node.is_free(6));
        node.launched(key(1));
        assert_eq!(node.asking, Asking::No);
    }
}

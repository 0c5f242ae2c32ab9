//! Sets of block ids, one per storage: two bytes an id where ids are dense, for a map of tens of millions of replicas.

use std::collections::BTreeMap;

const SPARSE_MAX: usize = 4_096;

enum Container {
    Sparse(Vec<u16>),
    Dense(Box<[u64; 1_024]>, u32),
}

/// A sorted set of block ids.
#[derive(Default)]
pub struct BlockSet {
    containers: BTreeMap<u64, Container>,
    len: u64,
}

impl Container {
    fn insert(&mut self, low: u16) -> bool {
        match self {
            Self::Sparse(lows) => match lows.binary_search(&low) {
                Ok(_) => false,
                Err(at) => {
                    if lows.len() == SPARSE_MAX {
                        let mut words = Box::new([0u64; 1_024]);
                        for low in lows.iter() {
                            words[usize::from(*low) / 64] |= 1 << (low % 64);
                        }
                        words[usize::from(low) / 64] |= 1 << (low % 64);
                        *self = Self::Dense(words, SPARSE_MAX as u32 + 1);
                    } else {
                        lows.insert(at, low);
                    }
                    true
                }
            },
            Self::Dense(words, count) => {
                let word = &mut words[usize::from(low) / 64];
                let fresh = *word & (1 << (low % 64)) == 0;
                *word |= 1 << (low % 64);
                *count += u32::from(fresh);
                fresh
            }
        }
    }

    fn remove(&mut self, low: u16) -> bool {
        match self {
            Self::Sparse(lows) => lows.binary_search(&low).map(|at| lows.remove(at)).is_ok(),
            Self::Dense(words, count) => {
                let word = &mut words[usize::from(low) / 64];
                let there = *word & (1 << (low % 64)) != 0;
                *word &= !(1 << (low % 64));
                *count -= u32::from(there);
                there
            }
        }
    }

    fn is_empty(&self) -> bool {
        match self {
            Self::Sparse(lows) => lows.is_empty(),
            Self::Dense(_, count) => *count == 0,
        }
    }

    /// Appends the ids within `first..=last` to `out`, at most `limit` in `out`.
    fn collect(&self, high: u64, first: u64, last: u64, limit: usize, out: &mut Vec<u64>) {
        let base = high << 16;
        let inside = |id: &u64| (first..=last).contains(id);
        match self {
            Self::Sparse(lows) => {
                let room = limit - out.len();
                let from = lows.partition_point(|low| base | u64::from(*low) < first);
                out.extend(
                    lows[from..].iter().map(|low| base | u64::from(*low)).take_while(|id| *id <= last).take(room),
                );
            }
            Self::Dense(words, _) => {
                let from = (first.saturating_sub(base) / 64).min(1_024) as usize;
                for (at, word) in words.iter().enumerate().skip(from) {
                    let mut rest = *word;
                    while rest != 0 {
                        if out.len() >= limit {
                            return;
                        }
                        let id = base | (at as u64 * 64 + u64::from(rest.trailing_zeros()));
                        rest &= rest - 1;
                        if inside(&id) {
                            out.push(id);
                        } else if id > last {
                            return;
                        }
                    }
                }
            }
        }
    }
}

impl BlockSet {
    /// Number of ids.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Adds an id; `false` if it is there.
    pub fn insert(&mut self, id: u64) -> bool {
        let container = self.containers.entry(id >> 16).or_insert_with(|| Container::Sparse(Vec::new()));
        let fresh = container.insert(id as u16);
        self.len += u64::from(fresh);
        fresh
    }

    /// Takes an id out.
    pub fn remove(&mut self, id: u64) -> bool {
        let Some(container) = self.containers.get_mut(&(id >> 16)) else { return false };
        let there = container.remove(id as u16);
        if container.is_empty() {
            self.containers.remove(&(id >> 16));
        }
        self.len -= u64::from(there);
        there
    }

    /// At most `limit` ids within `first..=last`, in order.
    pub fn range(&self, first: u64, last: u64, limit: usize) -> Vec<u64> {
        let mut out = Vec::new();
        if first > last {
            return out;
        }
        for (high, container) in self.containers.range(first >> 16..=last >> 16) {
            if out.len() >= limit {
                break;
            }
            container.collect(*high, first, last, limit, &mut out);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::codec::Random;
    use std::collections::BTreeSet;

    #[test]
    fn agrees_with_a_sorted_set() {
        let (mut set, mut model, mut random) = (BlockSet::default(), BTreeSet::new(), Random::new(3));
        for step in 0..60_000 {
            let id = (1 << 30) + random.below(if step % 2 == 0 { 9_000 } else { 200_000 });
            if random.below(4) == 0 {
                assert_eq!(set.remove(id), model.remove(&id));
            } else {
                assert_eq!(set.insert(id), model.insert(id));
            }
        }
        assert_eq!(set.len(), model.len() as u64);
        for _ in 0..200 {
            let first = (1 << 30) + random.below(200_000);
            let last = first + random.below(70_000);
            let limit = random.below(9_000) as usize;
            let expected: Vec<u64> = model.range(first..=last).take(limit).copied().collect();
            assert_eq!(set.range(first, last, limit), expected);
        }
        assert!(set.range(5, 4, 10).is_empty());
        for id in set.range(0, u64::MAX, usize::MAX) {
            assert!(set.remove(id));
        }
        assert_eq!(set.len(), 0);
    }
}

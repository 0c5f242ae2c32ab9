//! Which inodes and blocks have edits that are not durable yet.
//!
//! A reply must not tell what a crash could take back. Everything that a call reads is noted here while it runs; the
//! newest unsynced edit among it is what its reply depends on.

use std::cell::Cell;
use std::collections::VecDeque;

use cairn_proto::ids::TxId;

use super::codec::FixedMap;

/// See the module.
#[derive(Default)]
pub struct Unsynced {
    newest: FixedMap<u64, TxId>,
    order: VecDeque<(TxId, u64)>,
    seen: Cell<TxId>,
    durable: TxId,
}

impl Unsynced {
    /// Begins a call.
    pub fn reset(&self) {
        self.seen.set(TxId(0));
    }

    /// The running call depends on this transaction.
    pub fn depend(&self, txid: TxId) {
        self.seen.set(self.seen.get().max(txid));
    }

    /// The running call reads this inode or block (their ids do not overlap in practice; if they did, a reply would only
    /// wait a little longer).
    #[inline]
    pub fn touch(&self, id: u64) {
        if !self.newest.is_empty()
            && let Some(txid) = self.newest.get(&id)
        {
            self.depend(*txid);
        }
    }

    /// What the running call depends on.
    pub fn depends_on(&self) -> TxId {
        self.seen.get()
    }

    /// An edit changed this inode or block.
    pub fn mark(&mut self, id: u64, txid: TxId) {
        self.newest.insert(id, txid);
        self.order.push_back((txid, id));
    }

    /// The newest unsynced edit of an inode or block; 0: none.
    #[cfg(test)]
    pub fn of(&self, id: u64) -> TxId {
        self.newest.get(&id).copied().unwrap_or_default()
    }

    /// The log is durable up to here, as far as is known.
    pub fn durable(&self) -> TxId {
        self.durable
    }

    /// The log is durable up to here.
    pub fn synced(&mut self, txid: TxId) {
        self.durable = self.durable.max(txid);
        while let Some((edit, id)) = self.order.front().copied() {
            if edit > txid {
                break;
            }
            self.order.pop_front();
            if self.newest.get(&id) == Some(&edit) {
                self.newest.remove(&id);
            }
        }
        // What a burst took is given back.
        if self.newest.is_empty() && self.newest.capacity() > 100_000 {
            self.newest.shrink_to_fit();
            self.order.shrink_to_fit();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remembers_the_newest_until_it_is_synced() {
        let mut unsynced = Unsynced::default();
        unsynced.mark(7, TxId(1));
        unsynced.mark(8, TxId(2));
        unsynced.mark(7, TxId(3));
        unsynced.synced(TxId(2));
        assert_eq!((unsynced.of(7), unsynced.of(8)), (TxId(3), TxId(0)));
        unsynced.reset();
        unsynced.touch(8);
        assert_eq!(unsynced.depends_on(), TxId(0));
        unsynced.touch(7);
        assert_eq!(unsynced.depends_on(), TxId(3));
        unsynced.synced(TxId(3));
        assert!(unsynced.newest.is_empty() && unsynced.order.is_empty());
    }
}

//! Which replicas are deleted: those that are too many, and bad ones once a good one is there.
//!
//! # Consistency
//! A replica lets another one go only if it is there for sure: its node was heard lately, has reported it since it
//! registered, and was not told to delete it. This is asked when a replica is marked and again when the order leaves.
//! One that shall be the only one is also read whole before: what rots unseen must not be what stays.

use super::Core;
use super::blocks::{BadReplica, Proven, StorageIndex};
use super::membership::MAX_VERIFY;
use super::nodes::QueuedDeletion;

/// What is to become of a queued deletion.
#[derive(PartialEq, Eq)]
pub enum Verdict {
    /// It may go to its node.
    Delete,
    /// Not before the other replicas are sure again.
    Later,
    /// It is wrong by now.
    Never,
}

impl Core {
    /// Whether a replica that counts as live is there for sure: only such ones let another one go.
    fn is_sure(&self, id: u64, storage: StorageIndex) -> bool {
        let node = self.nodes.node_of(storage);
        self.nodes.storage(storage).reported && !self.is_stale(node.heard_ms) && !node.deleting.contains(id, storage)
    }

    fn sure_replicas(&self, id: u64) -> Vec<StorageIndex> {
        self.live_replicas(id).into_iter().filter(|storage| self.is_sure(id, *storage)).collect()
    }

    /// Whether these replicas of a block are enough to let a good one go. One alone must have been read not long ago; else its node is asked to.
    fn can_stay_alone(&mut self, id: u64, sure: &[StorageIndex]) -> bool {
        let &[last] = sure else { return true };
        let proven = self.blocks.proven(id, last, self.now_ms);
        let node = self.nodes.storage(last).node;
        if proven == Proven::No && self.nodes.node(node).verify.len() < MAX_VERIFY {
            let generation = self.blocks.get(id).map_or(0, |block| block.generation);
            self.blocks.proof_asked(id, last, self.now_ms);
            self.nodes.node_mut(node).verify.insert((id, generation, last));
        }
        proven == Proven::Yes
    }

    /// Bad replicas go once a good one is there.
    pub(super) fn delete_bad(&mut self, id: u64) {
        let current = self.blocks.get(id).map_or(0, |block| block.generation);
        for bad in self.blocks.bad.get(&id).cloned().unwrap_or_default() {
            let node = self.nodes.storage(bad.storage).node;
            // An order for an older generation does not take this one.
            let queued =
                |d: &QueuedDeletion| (d.block, d.storage) == (id, bad.storage) && d.generation >= bad.generation;
            // The same pass may come here again: the last entries of the queue are the ones it could repeat.
            let repeated = self.nodes.node(node).delete.iter().rev().take(64).any(queued)
                || self.nodes.node(node).deleting.covers(id, bad.storage, bad.generation);
            if bad.generation <= current && self.nodes.is_live(bad.storage) && !repeated {
                self.queue_deletion(id, bad.generation, bad.storage);
            }
        }
    }

    /// Whether a queued deletion is still right when its node asks.
    pub(super) fn deletion_holds(&mut self, deletion: &QueuedDeletion) -> Verdict {
        let (id, storage) = (deletion.block, deletion.storage);
        let Some(block) = self.blocks.get(id) else { return Verdict::Delete };
        let live = self.count_live(id, &block.replicas);
        let sure = self.sure_replicas(id);
        let is_allowed = if self.blocks.is_excess(id, storage) {
            let target = self.target_of(id).unwrap_or(1).max(1);
            if live < target {
                // Another replica was lost since: this one is needed again.
                self.blocks.unmark_excess(id, storage);
                self.reassess(id);
                return Verdict::Never;
            }
            sure.len() >= target && self.can_stay_alone(id, &sure)
        } else {
            // A newer generation than the block's too, while it has others (`generations.rs`).
            let is_meant = |bad: &BadReplica| bad.storage == storage && bad.generation <= deletion.generation;
            if live == 0 || !self.blocks.bad.get(&id).is_some_and(|list| list.iter().any(is_meant)) {
                return Verdict::Never;
            }
            !sure.is_empty()
        };
        if is_allowed { Verdict::Delete } else { Verdict::Later }
    }

    /// Marks what is too much of a block and queues its deletion. `false`: it cannot be decided yet.
    pub(super) fn trim(&mut self, id: u64) -> bool {
        let Some(target) = self.target_of(id) else { return true };
        let mut live = self.live_replicas(id);
        // One that its node was told to delete before, and which was needed again, is the first to go.
        let doubtful = |storage: &StorageIndex| self.nodes.node_of(*storage).deleting.contains(id, *storage);
        let decided = |storage: &StorageIndex| self.is_sure(id, *storage) || doubtful(storage);
        if live.len() > target && !live.iter().all(decided) {
            return false;
        }
        let mut victims = Vec::new();
        while live.len() > target.max(1) {
            let victim = live.iter().position(doubtful).unwrap_or_else(|| self.superfluous(&live));
            victims.push(live.swap_remove(victim));
        }
        for storage in victims {
            self.blocks.excess.entry(id).or_default().push(storage);
            self.queue_excess_deletion(id, storage);
        }
        true
    }

    /// Which of these replicas is missed least: racks stay spread, then the fullest storage.
    fn superfluous(&self, live: &[StorageIndex]) -> usize {
        let rack = |storage: StorageIndex| &*self.nodes.node_of(storage).rack;
        let mates = |storage: StorageIndex| live.iter().filter(|other| rack(**other) == rack(storage)).count();
        let racks = self.racks_of(live);
        let allowed = |storage: &StorageIndex| racks > 2 || mates(*storage) > 1 || racks == live.len();
        let score = |storage: StorageIndex| {
            let entry = self.nodes.storage(storage);
            let free = (u128::from(entry.remaining) << 20) / u128::from(entry.capacity.max(1));
            // On one rack with another replica first, then the fullest, then the youngest storage.
            (std::cmp::Reverse(mates(storage)), free, std::cmp::Reverse(storage))
        };
        let candidates = live.iter().enumerate().filter(|(_, storage)| allowed(storage));
        candidates.min_by_key(|(_, storage)| score(**storage)).map_or(0, |(at, _)| at)
    }

    /// The node shall delete this superfluous replica.
    pub(super) fn queue_excess_deletion(&mut self, id: u64, storage: StorageIndex) {
        let generation = self.blocks.get(id).map_or(0, |block| block.generation);
        self.queue_deletion(id, generation, storage);
    }
}

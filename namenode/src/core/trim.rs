//! Which replicas are deleted: those that are too many, and bad ones once a good one is there.
//!
//! # Consistency
//! A replica lets another one go only if it is there for sure: its node was heard lately, has reported it since it
//! registered, and was not told to delete it. This is asked when a replica is marked and again when the order leaves.
//! One that shall be the only one is also read whole before: what rots unseen must not be what stays.

use cairn_proto::pb;

use super::Core;
use super::blocks::{BadReplica, StorageIndex};
use super::nodes::{NodeIndex, QueuedDeletion};

/// What is to become of a queued deletion.
#[derive(PartialEq, Eq)]
pub enum Verdict {
    /// It may go to its node.
    Delete,
    /// Not before the other replicas are sure again.
    Later,
    /// It is queued again when the replica that shall stay has been read.
    Unproven,
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

    /// Whether these replicas of a block are enough to let a good one go. One alone must have been read since; else its node is to be asked, and what
    /// waits for it is queued again when it has answered.
    fn can_stay_alone(&mut self, id: u64, sure: &[StorageIndex]) -> bool {
        let &[last] = sure else { return true };
        if self.blocks.is_proven(id, last) {
            return true;
        }
        let node = self.nodes.storage(last).node;
        let proofs = &mut self.nodes.node_mut(node).proofs;
        if !proofs.asked.contains_key(&id) {
            proofs.wanted.insert(id);
        }
        false
    }

    /// Which replicas the node shall read because they are to stay alone: few at a time, so that readers' reports have their turn.
    pub(super) fn ask_for_proofs(&mut self, index: NodeIndex) -> Vec<pb::ReplicaRef> {
        let now_ms = self.now_ms;
        self.nodes.node_mut(index).proofs.give_up(now_ms);
        let mut replicas = Vec::new();
        while let Some(id) = self.nodes.node_mut(index).proofs.next() {
            let Some(block) = self.blocks.get(id).filter(|_| self.blocks.excess.contains_key(&id)) else { continue };
            let on_node = |storage: &StorageIndex| self.nodes.storage(*storage).node == index;
            let Some(storage) = self.live_replicas(id).into_iter().find(on_node) else { continue };
            let bytes = block.length().unwrap_or(0);
            replicas.push(pb::ReplicaRef {
                block: Some(self.pb_block(id, block.generation)),
                storage_id: self.nodes.storage(storage).id.clone(),
            });
            self.nodes.node_mut(index).proofs.ask(id, now_ms, bytes);
        }
        replicas
    }

    /// A node has read a replica, and it is right.
    pub(super) fn take_proof(&mut self, id: u64, storage: StorageIndex) {
        for excess in self.blocks.proof_given(id, storage) {
            self.queue_excess_deletion(id, excess);
        }
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
            if sure.len() >= target && !self.can_stay_alone(id, &sure) {
                return Verdict::Unproven;
            }
            sure.len() >= target
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
        if !victims.is_empty() {
            self.blocks.forget_proof(id);
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

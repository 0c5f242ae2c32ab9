//! What datanodes report of their replicas.
//!
//! A node's stream is ordered, so each message holds at its moment. A full report comes in ranges; only ids inside a
//! received range can be forgotten, so a report that breaks off takes nothing away.

use std::collections::BTreeSet;

use cairn_proto::pb::{self, ReplicaState, report_up::Report};
use cairn_proto::{Error, ErrorCode};

use super::blocks::{BadReplica, SeenReplica, StorageIndex};
use super::event::{Command, StreamId};
use super::nodes::{NodeIndex, QueuedDeletion};
use super::{Core, Turn};

/// Replicas in one range, at most.
const MAX_RANGE: usize = 4_096;
/// Deletions that a node may have queued: beyond them the next full report finds the rest.
const MAX_DELETIONS: usize = 4_000_000;

/// A range of a full report that was taken, but for the replicas that it does not name: those are forgotten in turns.
pub struct Forget {
    node: NodeIndex,
    storage: StorageIndex,
    stream: StreamId,
    /// From here ...
    next: u64,
    /// ... to here, both included.
    last: u64,
    /// But for these: in the range, or reported since.
    spared: BTreeSet<u64>,
    is_done: bool,
    last_of_storage: bool,
    last_of_report: bool,
}

fn bad(message: impl Into<String>) -> Error {
    Error::new(ErrorCode::InvalidArgument, message)
}

impl Core {
    pub(super) fn on_report(&mut self, turn: &mut Turn<'_>, stream: StreamId, message: pb::ReportUp) {
        let Some(node) = self.streams.get(&stream).copied() else {
            let error = Error::new(ErrorCode::NotRegistered, "the report stream belongs to an old registration");
            turn.commands.push(Command::CloseStream { stream, error });
            return;
        };
        let now_ms = self.now_ms;
        self.nodes.node_mut(node).heard_ms = now_ms;
        let result = match message.report {
            None | Some(Report::Open(_)) => Err(bad("a report stream is opened once")),
            Some(Report::Changed(changed)) => self.replica_changed(node, &changed),
            Some(Report::Removed(removed)) => self.replica_removed(node, &removed),
            Some(Report::Range(range)) => self.full_range(turn, node, stream, &range),
            Some(Report::Recovered(recovered)) => self.block_recovered(turn, &recovered),
        };
        if let Err(error) = result {
            self.report_closed(stream);
            turn.commands.push(Command::CloseStream { stream, error });
        }
    }

    fn own_storage(&self, node: NodeIndex, storage_id: &str, pool: &str) -> Result<StorageIndex, Error> {
        if pool != self.facts.pool_id {
            let message = format!("a report names block pool {pool:?}, this is {}", self.facts.pool_id);
            return Err(Error::new(ErrorCode::WrongCluster, message).with_subject(pool));
        }
        match self.nodes.find_storage(storage_id) {
            Some(storage) if self.nodes.storage(storage).node == node => Ok(storage),
            _ => Err(bad(format!("storage {storage_id} was not registered by this datanode")).with_subject(storage_id)),
        }
    }

    fn replica_changed(&mut self, node: NodeIndex, changed: &pb::ReplicaChanged) -> Result<(), Error> {
        let storage = self.own_storage(node, &changed.storage_id, &changed.pool)?;
        let replica = changed.replica.as_ref().ok_or_else(|| bad("a report names no replica"))?;
        self.take_replica(storage, replica);
        let id = replica.id as u64;
        let current = self.blocks.get(id).map(|block| (block.generation, block.length()));
        self.nodes.node_mut(node).proofs.answered(id);
        if changed.verified && current == Some((replica.generation, Some(replica.length))) {
            self.take_proof(id, storage);
        }
        Ok(())
    }

    fn replica_removed(&mut self, node: NodeIndex, removed: &pb::ReplicaRemoved) -> Result<(), Error> {
        let storage = self.own_storage(node, &removed.storage_id, &removed.pool)?;
        let id = removed.id as u64;
        self.nodes.node_mut(node).deleting.forget(id, storage);
        self.nodes.node_mut(node).proofs.answered(id);
        let is_bad = self.blocks.bad.get(&id).and_then(|list| list.iter().find(|bad| bad.storage == storage));
        if is_bad.is_some_and(|bad| removed.generation == 0 || bad.generation <= removed.generation) {
            self.blocks.forget_bad(id, storage);
        }
        let current = self.blocks.get(id).map_or(0, |block| block.generation);
        if removed.generation == 0 || removed.generation >= current {
            self.drop_replica(id, storage);
        }
        if let Some(open) = self.blocks.open.get_mut(&id) {
            let gone = |seen: &SeenReplica| {
                seen.storage == storage && (removed.generation == 0 || seen.generation <= removed.generation)
            };
            open.seen.retain(|seen| !gone(seen));
        }
        self.settle_membership(id, storage);
        self.reassess(id);
        Ok(())
    }

    fn full_range(
        &mut self,
        turn: &mut Turn<'_>,
        node: NodeIndex,
        stream: StreamId,
        range: &pb::FullReportRange,
    ) -> Result<(), Error> {
        let storage = self.own_storage(node, &range.storage_id, &range.pool)?;
        if range.replicas.len() > MAX_RANGE {
            return Err(bad(format!("a range holds {} replicas, more than {MAX_RANGE}", range.replicas.len())));
        }
        let (first, last) = (range.first_id, range.last_id);
        let sorted = range.replicas.windows(2).all(|pair| pair[0].id < pair[1].id);
        if !sorted || range.replicas.iter().any(|replica| !(first..=last).contains(&replica.id)) {
            return Err(bad("the replicas of a range are not sorted or lie outside it"));
        }
        let now_ms = self.now_ms;
        self.nodes.node_mut(node).asked_full_ms = Some(now_ms);
        self.nodes.node_mut(node).progress_ms = now_ms;
        // Ids of ours are positive: what a range says of the others cannot be forgotten either.
        let mut forget = Forget {
            node,
            storage,
            stream,
            next: first.max(0) as u64,
            last: last.max(0) as u64,
            spared: range.replicas.iter().map(|replica| replica.id as u64).collect(),
            is_done: last <= 0,
            last_of_storage: range.last_of_storage,
            last_of_report: range.last_of_report,
        };
        let mut budget = MAX_RANGE.min(self.settings.cursor_budget);
        self.forget_some(&mut forget, &mut budget);
        for replica in &range.replicas {
            self.take_replica(storage, replica);
            let id = replica.id as u64;
            if self.blocks.is_excess(id, storage) && !self.nodes.node(node).deleting.contains(id, storage) {
                // It was to be deleted and is still there: say it again.
                self.queue_excess_deletion(id, storage);
            }
        }
        if forget.is_done && !self.cursors.forgets.iter().any(|other| other.node == node) {
            self.range_taken(turn, &forget);
        } else {
            self.cursors.forgets.push_back(forget);
        }
        Ok(())
    }

    /// Forgets some of the replicas that a range does not name.
    fn forget_some(&mut self, forget: &mut Forget, budget: &mut usize) {
        while !forget.is_done && *budget > 0 {
            let most = (*budget).min(1_024);
            let known = self.nodes.storage(forget.storage).blocks.range(forget.next, forget.last, most);
            forget.is_done = known.len() < most;
            forget.next = known.last().map_or(forget.next, |id| id.saturating_add(1));
            *budget -= most;
            for id in known {
                if !forget.spared.contains(&id) {
                    self.forget_replica(id, forget.storage);
                }
            }
        }
    }

    /// One turn of the ranges under way, the oldest first.
    pub(super) fn forget_ranges(&mut self, turn: &mut Turn<'_>, mut budget: usize) {
        while budget > 0 {
            let Some(mut forget) = self.cursors.forgets.pop_front() else { return };
            let is_idle = forget.is_done;
            self.forget_some(&mut forget, &mut budget);
            budget = budget.saturating_sub(usize::from(is_idle));
            if !forget.is_done {
                self.cursors.forgets.push_front(forget);
                return;
            }
            self.range_taken(turn, &forget);
        }
    }

    /// Everything that a range says is known: the node may send the next one.
    fn range_taken(&mut self, turn: &mut Turn<'_>, forget: &Forget) {
        if forget.last_of_storage {
            self.nodes.storage_mut(forget.storage).reported = true;
        }
        if forget.last_of_report {
            let reported_before = std::mem::replace(&mut self.nodes.node_mut(forget.node).reported, true);
            self.wake_deferred();
            if !reported_before {
                self.hasten_recoveries();
            }
        }
        if self.streams.get(&forget.stream) == Some(&forget.node) {
            let down = pb::ReportDown { range_credits: 1 };
            let depends_on = self.nodes.node(forget.node).registered_by;
            turn.commands.push(Command::Report { stream: forget.stream, depends_on, down });
        }
    }

    /// What a node says of a replica after it sent a range counts more than that range.
    pub(super) fn spare(&mut self, id: u64, storage: StorageIndex) {
        for forget in self.cursors.forgets.iter_mut().filter(|forget| forget.storage == storage) {
            forget.spared.insert(id);
        }
    }

    /// The ranges of a node that are under way say nothing any more: it registers again, or is dead.
    pub(super) fn drop_ranges_of(&mut self, node: NodeIndex) {
        self.cursors.forgets.retain(|forget| forget.node != node);
    }

    /// Everything known of a block on a storage is void.
    pub(super) fn forget_replica(&mut self, id: u64, storage: StorageIndex) {
        let node = self.nodes.storage(storage).node;
        self.nodes.node_mut(node).deleting.forget(id, storage);
        self.blocks.forget_bad(id, storage);
        if let Some(open) = self.blocks.open.get_mut(&id) {
            open.seen.retain(|seen| seen.storage != storage);
        }
        self.drop_replica(id, storage);
        self.nodes.storage_mut(storage).blocks.remove(id);
        self.reassess(id);
    }

    /// The set of a storage holds a block exactly if anything of it is known there.
    pub(super) fn settle_membership(&mut self, id: u64, storage: StorageIndex) {
        if !self.blocks.known_on(id, storage) {
            self.nodes.storage_mut(storage).blocks.remove(id);
        }
    }

    /// One reported replica.
    fn take_replica(&mut self, storage: StorageIndex, replica: &pb::ReplicaReport) {
        let id = replica.id as u64;
        if !self.cursors.forgets.is_empty() {
            self.spare(id, storage);
        }
        let Some(block) = self.blocks.get(id).filter(|_| replica.id > 0) else {
            if self.see_merged(id, storage, replica) {
                return;
            }
            if id > self.counters.block || replica.generation > self.counters.generation {
                // This namenode was started with old metadata: it cannot tell what is superfluous.
                self.repair.future_replicas += 1;
            } else {
                let known = self.freed.contains(id, replica.generation);
                self.queue_removal(id, replica.generation, storage, known);
            }
            return;
        };
        let state = replica.state();
        let current = block.generation;
        match block.length() {
            None => self.see_replica(id, storage, replica, current),
            Some(length) => match state {
                ReplicaState::Finalized if (replica.generation, replica.length) == (current, length) => {
                    self.blocks.forget_bad(id, storage);
                    self.add_replica(id, storage);
                    // The common case: it is known there for sure.
                    self.nodes.storage_mut(storage).blocks.insert(id);
                    return self.reassess(id);
                }
                // Its last packet is on the way; the report of the finalized replica follows.
                ReplicaState::BeingWritten if replica.generation == current => return,
                _ => {
                    let (generation, length) = (replica.generation, replica.length);
                    self.mark_bad(id, SeenReplica { storage, generation, length, state }.as_bad());
                }
            },
        }
        self.nodes.storage_mut(storage).blocks.insert(id);
        self.settle_membership(id, storage);
        self.reassess(id);
    }

    /// A replica of a block whose length the writer has not said yet.
    fn see_replica(&mut self, id: u64, storage: StorageIndex, replica: &pb::ReplicaReport, current: u64) {
        let state = replica.state();
        let Some(open) = self.blocks.open.get_mut(&id) else { return };
        open.seen.retain(|seen| seen.storage != storage || seen.generation > replica.generation);
        if state == ReplicaState::ReplicaCorrupt || replica.generation < current {
            let seen = SeenReplica { storage, generation: replica.generation, length: replica.length, state };
            self.blocks.note_bad(id, seen.as_bad());
            return;
        }
        if !open.seen.iter().any(|seen| seen.storage == storage) {
            let seen = SeenReplica { storage, generation: replica.generation, length: replica.length, state };
            open.seen.push(seen);
        }
        self.blocks.forget_bad(id, storage);
        let file = self.blocks.get(id).map_or(0, |block| block.inode);
        self.parked.wake(file);
    }

    /// A replica that does not count.
    pub(super) fn mark_bad(&mut self, id: u64, bad: BadReplica) {
        self.drop_replica(id, bad.storage);
        self.blocks.note_bad(id, bad);
    }

    /// A replica that this namenode knows to be superfluous or bad shall go, after safe mode, and only in this generation.
    pub(super) fn queue_deletion(&mut self, block: u64, generation: u64, storage: StorageIndex) {
        self.queue_removal(block, generation, storage, true);
    }

    /// As [`Self::queue_deletion`]; what is not `known` is put into quarantine, not deleted.
    pub(super) fn queue_removal(&mut self, block: u64, generation: u64, storage: StorageIndex, known: bool) {
        let depends_on = self.last_txid;
        let node = self.nodes.storage(storage).node;
        self.push_deletion(node, QueuedDeletion { block, generation, storage, depends_on, known });
    }

    /// Beyond the limit a deletion is dropped: the replica is found again by the next full report, and put away then.
    pub(super) fn push_deletion(&mut self, node: NodeIndex, deletion: QueuedDeletion) {
        let queue = &mut self.nodes.node_mut(node).delete;
        if queue.len() < MAX_DELETIONS {
            queue.push_back(deletion);
        }
    }
}

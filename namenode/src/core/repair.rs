//! Bringing blocks to their wanted replicas: too few are copied by risk, too many are deleted, bad ones go.
//!
//! # Overview
//! [`Core::reassess`] looks at one block after anything about it changed and puts it into the queue of copies (ordered by
//! risk: one replica left first, then most missing, then on too few racks) or into the set to trim. Each tick hands out
//! copies as the nodes' caps allow; a copy is pending until its replica is reported or its time is over.
//!
//! # Consistency
//! Until the cluster has settled after a start (every known node reported, or one dead interval passed) nothing is
//! assessed, copied, deleted or called excess; then a cursor assesses every block once. Replicas on a node that has not
//! reported since it registered, or is stale, count as live but never make another replica superfluous. A deletion is
//! checked again when it is handed to its node, and handed out again if the replica is not reported as removed in time; a
//! replica that its node was told to delete once never makes another one superfluous either.

use std::collections::{BTreeMap, BTreeSet};

use cairn_proto::pb;

use super::blocks::{Replicas, StorageIndex};
use super::nodes::{Node, NodeIndex, Nodes, QueuedDeletion};
use super::placement;
use super::{Core, Turn};

/// A pipeline's replicas that are not reported yet count as pending for this long after the block was finished.
const PIPELINE_GRACE_MS: u64 = 10_000;
/// Blocks that could not be copied or trimmed are tried again after this, or when a node comes or reports.
const DEFER_MS: u64 = 3_000;
/// After a start, a node whose full report makes progress is waited for as long as one range takes at most, ...
pub(super) const REPORTING_MS: u64 = 30_000;
/// ... and beyond the dead interval no longer than this in all.
const SETTLE_LIMIT_MS: u64 = 600_000;

/// How badly a block needs a copy; lower is worse.
type Risk = u16;
const LAST_REPLICA: Risk = 0;
const UNDER_REPLICATED: Risk = 1_000;
const MIS_REPLICATED: Risk = 2_000;
/// Too few replicas, but as many as there are nodes for them.
const OUT_OF_REACH: Risk = 3_000;
const MISSING: Risk = Risk::MAX;

struct PendingCopy {
    target: StorageIndex,
    /// `None`: part of the writer's own pipeline.
    source: Option<NodeIndex>,
    deadline_ms: u64,
}

/// What became of the copies that a block needs.
#[derive(PartialEq, Eq)]
enum Copying {
    /// They are ordered, or not needed.
    Done,
    /// The nodes that could send or take one are at their caps.
    NoCapacity,
    /// There is no node for one.
    NoTarget,
}

/// What is short of what it should be.
#[derive(Default, Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    /// Too few live replicas, but at least one.
    pub under_replicated: u64,
    /// No live replica.
    pub missing: u64,
    /// Enough replicas on too few racks.
    pub mis_replicated: u64,
}

/// See the module.
#[derive(Default)]
pub struct Repair {
    /// Blocks whose length is known.
    pub complete: u64,
    /// Those of them with a minimum of reported replicas.
    pub safe: u64,
    settled: bool,
    risks: BTreeMap<u64, Risk>,
    counts: Counts,
    /// Blocks whose risk is [`OUT_OF_REACH`].
    out_of_reach: u64,
    /// Reported replicas with a block id or generation that this namenode has not handed out yet.
    pub future_replicas: u64,
    queue: BTreeSet<(Risk, u64)>,
    deferred: Vec<u64>,
    deferred_since_ms: u64,
    to_trim: BTreeSet<u64>,
    pending: BTreeMap<u64, Vec<PendingCopy>>,
}

impl Repair {
    /// Whether the cluster has settled after the start.
    pub fn settled(&self) -> bool {
        self.settled
    }

    /// What is short of what it should be.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Copies ordered and not yet reported.
    pub fn pending_copies(&self) -> u64 {
        self.pending.values().flatten().filter(|copy| copy.source.is_some()).count() as u64
    }

    /// Blocks with more replicas than wanted that wait for a choice.
    pub fn to_trim_len(&self) -> u64 {
        self.to_trim.len() as u64
    }

    /// Blocks that wait for a copy to be ordered.
    #[cfg(test)]
    pub fn queue_len(&self) -> usize {
        self.queue.len() + self.deferred.len()
    }

    fn counter(&mut self, risk: Risk) -> &mut u64 {
        match risk {
            MISSING => &mut self.counts.missing,
            MIS_REPLICATED => &mut self.counts.mis_replicated,
            _ => &mut self.counts.under_replicated,
        }
    }

    fn set_risk(&mut self, id: u64, risk: Option<Risk>, schedule: bool) {
        let before = match risk {
            Some(risk) => self.risks.insert(id, risk),
            None => self.risks.remove(&id),
        };
        if let Some(before) = before {
            self.queue.remove(&(before, id));
            *self.counter(before) -= 1;
            self.out_of_reach -= u64::from(before == OUT_OF_REACH);
        }
        if let Some(risk) = risk {
            *self.counter(risk) += 1;
            self.out_of_reach += u64::from(risk == OUT_OF_REACH);
            if schedule && risk != MISSING {
                self.queue.insert((risk, id));
            }
        }
    }
}

/// Where a block is in the queues, for tests.
#[cfg(test)]
#[derive(Debug)]
pub struct BlockPlace {
    /// It has no live replica.
    pub missing: bool,
    /// It has too few.
    pub too_few: bool,
    /// It lies on too few racks.
    pub mis_replicated: bool,
    /// It waits for a copy.
    pub queued: bool,
    /// It waits for its next try.
    pub deferred: bool,
    /// It waits for a choice.
    pub to_trim: bool,
    /// Copies under way.
    pub pending: usize,
}

#[cfg(test)]
impl Repair {
    /// Where this block is.
    pub fn place_of(&self, id: u64) -> BlockPlace {
        let risk = self.risks.get(&id).copied();
        BlockPlace {
            missing: risk == Some(MISSING),
            too_few: risk.is_some_and(|risk| risk < MIS_REPLICATED || risk == OUT_OF_REACH),
            mis_replicated: risk == Some(MIS_REPLICATED),
            queued: risk.is_some_and(|risk| self.queue.contains(&(risk, id))),
            deferred: self.deferred.contains(&id),
            to_trim: self.to_trim.contains(&id),
            pending: self.pending.get(&id).map_or(0, Vec::len),
        }
    }

    /// The counters are those of the maps.
    pub fn check_sums(&self) {
        let mut counts = Counts::default();
        for risk in self.risks.values() {
            match *risk {
                MISSING => counts.missing += 1,
                MIS_REPLICATED => counts.mis_replicated += 1,
                _ => counts.under_replicated += 1,
            }
        }
        assert_eq!(counts, self.counts);
        assert_eq!(self.risks.values().filter(|risk| **risk == OUT_OF_REACH).count() as u64, self.out_of_reach);
        assert!(self.queue.iter().all(|(risk, id)| self.risks.get(id) == Some(risk)), "the queue has stale entries");
        assert!(self.pending.values().all(|copies| !copies.is_empty()));
    }
}

impl Core {
    /// Opens the gate once everybody known has reported or had the time to.
    pub(super) fn check_settled(&mut self) {
        if self.repair.settled || self.safemode.is_on() {
            return;
        }
        if self.everybody_has_come() {
            self.repair.settled = true;
            self.cursors.rescan();
        }
    }

    /// Whether all known datanodes have reported since the start, or had the time to.
    pub(super) fn everybody_has_come(&self) -> bool {
        let all_reported = self.nodes.nodes.iter().all(|node| node.alive && node.reported);
        let patience_ms = self.started_ms + self.settings.dead_interval_ms;
        let reports =
            |node: &Node| node.alive && !node.reported && self.now_ms < node.progress_ms.saturating_add(REPORTING_MS);
        let waits = self.now_ms < patience_ms + SETTLE_LIMIT_MS && self.nodes.nodes.iter().any(reports);
        all_reported || self.now_ms >= patience_ms && !waits
    }

    /// A good replica was reported.
    pub(super) fn add_replica(&mut self, id: u64, storage: StorageIndex) {
        let wanted = self.settings.min_replication as usize;
        let Some(block) = self.blocks.table.derived_mut(id) else { return };
        if block.replicas.insert(storage) {
            let file = block.inode;
            if block.replicas.as_slice().len() == wanted {
                self.repair.safe += 1;
            }
            self.finish_copy(id, storage);
            self.parked.wake(file);
        }
    }

    /// A good replica is gone.
    pub(super) fn drop_replica(&mut self, id: u64, storage: StorageIndex) {
        let wanted = self.settings.min_replication as usize;
        let Some(block) = self.blocks.table.derived_mut(id) else { return };
        if block.replicas.remove(storage) && block.replicas.as_slice().len() + 1 == wanted {
            self.repair.safe -= 1;
        }
        self.blocks.unmark_excess(id, storage);
    }

    /// The writer has said a block's length: what was reported of it counts from now on.
    pub(super) fn commit_block(&mut self, id: u64, length: u64) {
        if self.blocks.get(id).is_none_or(|block| block.length().is_some()) {
            return;
        }
        self.blocks.table.modify(id, |block| block.commit(length));
        self.repair.complete += 1;
        let Some(open) = self.blocks.open.remove(&id) else { return };
        self.take_back(&open.promises, length);
        let generation = self.blocks.get(id).map_or(0, |block| block.generation);
        for seen in &open.seen {
            let whole = seen.state == pb::ReplicaState::Finalized;
            if whole && (seen.generation, seen.length) == (generation, length) {
                self.add_replica(id, seen.storage);
            } else if whole || seen.generation != generation || seen.state == pb::ReplicaState::Recovering {
                // As in a later report: nobody writes it any more, so no report of a finalized one follows.
                self.blocks.note_bad(id, seen.as_bad());
            } else {
                self.nodes.storage_mut(seen.storage).blocks.remove(id);
            }
        }
        let deadline_ms = self.now_ms + PIPELINE_GRACE_MS;
        for target in open.expected {
            if !self.blocks.get(id).is_some_and(|block| block.replicas.contains(target)) {
                self.repair.pending.entry(id).or_default().push(PendingCopy { target, source: None, deadline_ms });
            }
        }
        self.reassess(id);
    }

    /// A file was closed: its blocks count from now on.
    pub(super) fn file_closed(&mut self, file: u64) {
        // Earlier blocks were assessed when they were committed; the last ones just now.
        self.note_short_blocks(file);
        self.parked.wake(file);
    }

    /// A block is not (or no longer) one that must have its replicas.
    pub(super) fn uncount_block(&mut self, id: u64) {
        self.blocks.forget_excess(id);
        if let Some(block) = self.blocks.get(id).filter(|block| block.length().is_some()) {
            self.repair.complete -= 1;
            if block.replicas.as_slice().len() >= self.settings.min_replication as usize {
                self.repair.safe -= 1;
            }
        }
        self.repair.set_risk(id, None, false);
        self.repair.to_trim.remove(&id);
        self.forget_pending(id);
    }

    /// A block belongs to no file any more.
    pub(super) fn free_block(&mut self, id: u64, depends_on: cairn_proto::ids::TxId) {
        let storages = self.blocks.storages_of(id);
        let open = self.blocks.open.remove(&id).unwrap_or_default();
        self.take_back(&open.promises, open.seen.iter().map(|seen| seen.length).max().unwrap_or(0));
        let bad = self.blocks.bad.remove(&id).unwrap_or_default();
        self.uncount_block(id);
        let Some(block) = self.blocks.table.remove(id) else { return };
        // A recovery may have replicas of a generation that is not in force yet; what is newer still is not of this log.
        let newest = block.generation.max(self.handed_out.free(id));
        self.freed.note(id, newest);
        for storage in &storages {
            self.nodes.storage_mut(*storage).blocks.remove(id);
        }
        let told = bad.iter().map(|bad| (bad.storage, bad.generation));
        let told = told.chain(open.seen.iter().map(|seen| (seen.storage, seen.generation)));
        // Generations that were never handed out are left where they are, as in any report.
        let told: Vec<_> = told.filter(|(_, generation)| *generation <= self.counters.generation).collect();
        for storage in storages.iter().chain(open.expected.iter().filter(|storage| !storages.contains(storage))) {
            let node = self.nodes.storage(*storage).node;
            if self.nodes.node(node).alive {
                let here = told.iter().filter(|(at, _)| at == storage).map(|(_, generation)| *generation);
                let generation = here.fold(newest, u64::max);
                let known = generation == newest;
                let deletion = QueuedDeletion { block: id, generation, storage: *storage, depends_on, known };
                self.push_deletion(node, deletion);
            }
        }
    }

    /// Good replicas on live storages that are not about to be deleted.
    pub(super) fn live_replicas(&self, id: u64) -> Vec<StorageIndex> {
        let all = self.blocks.get(id).map_or(&[][..], |block| block.replicas.as_slice());
        all.iter().copied().filter(|at| self.nodes.is_live(*at) && !self.blocks.is_excess(id, *at)).collect()
    }

    pub(super) fn count_live(&self, id: u64, replicas: &Replicas) -> usize {
        let live = |at: &&StorageIndex| self.nodes.is_live(**at) && !self.blocks.is_excess(id, **at);
        replicas.as_slice().iter().filter(live).count()
    }

    pub(super) fn racks_of(&self, storages: &[StorageIndex]) -> usize {
        let mut racks: Vec<&str> = storages.iter().map(|storage| &*self.nodes.node_of(*storage).rack).collect();
        racks.sort_unstable();
        racks.dedup();
        racks.len()
    }

    /// Wanted replicas of a block; `None`: it belongs to no file of the namespace.
    pub(super) fn target_of(&self, id: u64) -> Option<usize> {
        let file = self.blocks.get(id)?.inode;
        Some(usize::from(self.tree.get(file)?.replication))
    }

    /// Looks at one block after anything about it changed.
    pub(super) fn reassess(&mut self, id: u64) {
        if !self.repair.settled {
            return;
        }
        let (Some(block), Some(target)) = (self.blocks.get(id), self.target_of(id)) else {
            self.repair.set_risk(id, None, false);
            return;
        };
        if block.length().is_none() {
            return;
        }
        let mut live = self.count_live(id, &block.replicas);
        if live < target {
            live += self.keep_excess(id);
        }
        let pending = self.repair.pending.get(&id).map_or(0, Vec::len);
        let reachable = if live < target { target.min(self.nodes.usable()) } else { target };
        let risk = if live == 0 {
            Some(MISSING)
        } else if live >= target {
            let one_rack = target > 1 && self.racks_of(&self.live_replicas(id)) < 2 && self.nodes.live_racks() > 1;
            one_rack.then_some(MIS_REPLICATED)
        } else if live >= reachable {
            Some(OUT_OF_REACH)
        } else if live == 1 {
            Some(LAST_REPLICA)
        } else {
            Some(UNDER_REPLICATED - (target - live).min(998) as Risk)
        };
        if risk.is_none() && !self.repair.risks.contains_key(&id) && live == target && self.blocks.bad.is_empty() {
            self.repair.to_trim.remove(&id);
            return;
        }
        let schedule = if risk == Some(MIS_REPLICATED) { pending == 0 } else { live + pending < reachable };
        self.repair.set_risk(id, risk, schedule);
        if live > target && risk != Some(MIS_REPLICATED) {
            self.repair.to_trim.insert(id);
        } else {
            self.repair.to_trim.remove(&id);
        }
        if self.blocks.bad.contains_key(&id) {
            if live > 0 {
                self.delete_bad(id);
            }
            self.watch_newer(id, live);
        }
    }

    /// A block has too few replicas: those that were too many are needed again, unless their deletion is under way.
    /// Returns how many live ones were won.
    fn keep_excess(&mut self, id: u64) -> usize {
        let mut won = 0;
        for storage in self.blocks.excess.get(&id).cloned().unwrap_or_default() {
            if !self.nodes.node_of(storage).deleting.contains(id, storage) {
                self.blocks.unmark_excess(id, storage);
                won += usize::from(self.nodes.is_live(storage));
            }
        }
        won
    }

    /// Looks again at the blocks that need more nodes than there were: there is one more.
    pub(super) fn more_nodes(&mut self) {
        if self.repair.out_of_reach > 0 {
            self.cursors.rescan();
        } else {
            // The copies under way may have been all that could be made.
            self.cursors.waking.extend(self.repair.pending.keys());
        }
    }

    /// Orders copies by risk and trims, as far as one turn and the nodes' caps go.
    pub(super) fn schedule_repairs(&mut self, turn: &mut Turn<'_>) {
        if !self.repair.settled || self.safemode.is_on() {
            return;
        }
        if self.now_ms >= self.repair.deferred_since_ms + DEFER_MS {
            self.wake_deferred();
        }
        let (mut tried, mut crowded) = (0, Vec::new());
        while tried < self.settings.repairs_per_turn && crowded.len() < self.settings.repairs_per_turn {
            let Some((risk, id)) = self.repair.queue.pop_first() else { break };
            tried += 1;
            match self.copy_block(turn, id) {
                Copying::NoCapacity => {
                    // It keeps its place: the next free node is for it, not for one that is less at risk.
                    crowded.push((risk, id));
                    tried -= 1;
                }
                Copying::NoTarget => self.repair.deferred.push(id),
                Copying::Done => {}
            }
        }
        self.repair.queue.extend(crowded);
        for _ in 0..self.settings.cursor_budget {
            let Some(id) = self.repair.to_trim.pop_first() else { break };
            if !self.trim(id) {
                self.repair.deferred.push(id);
            }
        }
    }

    /// Looks again at the blocks that could not be helped.
    pub(super) fn wake_deferred(&mut self) {
        self.repair.deferred_since_ms = self.now_ms;
        self.cursors.waking.append(&mut self.repair.deferred);
    }

    /// Orders the missing copies of one block.
    fn copy_block(&mut self, turn: &mut Turn<'_>, id: u64) -> Copying {
        let (Some(block), Some(target)) = (self.blocks.get(id), self.target_of(id)) else { return Copying::Done };
        let (generation, Some(length)) = (block.generation, block.length()) else { return Copying::Done };
        let live = self.live_replicas(id);
        let pending: Vec<StorageIndex> =
            self.repair.pending.get(&id).into_iter().flatten().map(|copy| copy.target).collect();
        // A block on too few racks gets one copy more; then one is trimmed.
        let count = target.saturating_sub(live.len() + pending.len()).max(usize::from(live.len() >= target));
        if count == 0 || live.is_empty() {
            return Copying::Done;
        }
        let cap = self.settings.max_repairs_per_node;
        let source = live
            .iter()
            .map(|storage| self.nodes.storage(*storage).node)
            .filter(|node| self.nodes.node(*node).repairs < cap)
            .min_by_key(|node| (self.is_stale(self.nodes.node(*node).heard_ms), self.nodes.node(*node).load(), *node));
        let Some(source) = source else { return Copying::NoCapacity };
        let helps = |targets: &[StorageIndex]| {
            let all: Vec<StorageIndex> = live.iter().chain(targets).copied().collect();
            !targets.is_empty() && (live.len() < target || self.racks_of(&all) > 1)
        };
        let targets = self.repair_targets(turn, id, (count, Some(cap)), &live, &pending);
        if !helps(&targets) {
            let without_caps = self.repair_targets(turn, id, (count, None), &live, &pending);
            return if helps(&without_caps) { Copying::NoCapacity } else { Copying::NoTarget };
        }
        let missing = targets.len() < count;
        self.order_copy(id, generation, length, source, targets);
        if missing { Copying::NoTarget } else { Copying::Done }
    }

    fn repair_targets(
        &self,
        turn: &mut Turn<'_>,
        id: u64,
        (count, repair_cap): (usize, Option<u32>),
        live: &[StorageIndex],
        pending: &[StorageIndex],
    ) -> Vec<StorageIndex> {
        let node_of = |storage: &StorageIndex| self.nodes.storage(*storage).node;
        let present: Vec<NodeIndex> = live.iter().chain(pending).map(node_of).collect();
        let excluded: Vec<NodeIndex> = self.blocks.storages_of(id).iter().map(node_of).collect();
        let file = self.blocks.get(id).and_then(|block| self.tree.get(block.inode));
        let wanted = placement::Request {
            count,
            size: self
                .blocks
                .get(id)
                .and_then(super::blocks::Block::length)
                .unwrap_or(0)
                .max(1)
                .min(file.map_or(u64::MAX, super::inode::Inode::block_size)),
            present: &present,
            excluded: &excluded,
            favored: &[],
            local: None,
            fresh_since_ms: self.now_ms.saturating_sub(self.settings.stale_interval_ms),
            repair_cap,
        };
        placement::choose(&self.nodes, &wanted, &mut turn.random)
    }

    fn order_copy(&mut self, id: u64, generation: u64, length: u64, source: NodeIndex, targets: Vec<StorageIndex>) {
        // A slow disk's 2 MB/s, so that a copy is not ordered twice without need.
        let patience_ms = (20_000 + length / 2_000).min(self.settings.repair_timeout_ms);
        let deadline_ms = self.now_ms + patience_ms;
        let copy = pb::ReplicateBlock {
            block: Some(self.pb_block(id, generation)),
            length,
            targets: targets.iter().map(|at| self.nodes.replica(*at, pb::ReplicaState::BeingWritten)).collect(),
        };
        let depends_on = self.last_txid;
        self.nodes.node_mut(source).replicate.push_back((copy, depends_on));
        for target in targets {
            self.nodes.node_mut(source).repairs += 1;
            let storage = self.nodes.storage_mut(target);
            storage.promised = storage.promised.saturating_add(length);
            let node = storage.node;
            self.nodes.node_mut(node).repairs += 1;
            let pending = PendingCopy { target, source: Some(source), deadline_ms };
            self.repair.pending.entry(id).or_default().push(pending);
        }
    }

    fn release_copy(&mut self, copy: &PendingCopy) {
        let Some(source) = copy.source else { return };
        for node in [source, self.nodes.storage(copy.target).node] {
            let node = self.nodes.node_mut(node);
            node.repairs = node.repairs.saturating_sub(1);
        }
    }

    /// Ends the pending copies of a block that `ends` picks; `true` if there were any.
    fn end_copies(&mut self, id: u64, ends: impl Fn(&Nodes, &PendingCopy) -> bool) -> bool {
        let Some(list) = self.repair.pending.get_mut(&id) else { return false };
        let nodes = &self.nodes;
        let (ended, rest): (Vec<_>, Vec<_>) = std::mem::take(list).into_iter().partition(|copy| ends(nodes, copy));
        if rest.is_empty() {
            self.repair.pending.remove(&id);
        } else {
            *list = rest;
        }
        ended.iter().for_each(|copy| self.release_copy(copy));
        !ended.is_empty()
    }

    /// A replica arrived; its node may have taken another of its storages than the one it was given.
    fn finish_copy(&mut self, id: u64, storage: StorageIndex) {
        let node = self.nodes.storage(storage).node;
        self.end_copies(id, |nodes, copy| nodes.storage(copy.target).node == node);
    }

    fn forget_pending(&mut self, id: u64) {
        self.end_copies(id, |_, _| true);
    }

    /// Copies that were not reported in time are ordered anew.
    pub(super) fn expire_pending(&mut self) {
        let now_ms = self.now_ms;
        let late = |copies: &[PendingCopy]| copies.iter().any(|copy| copy.deadline_ms <= now_ms);
        let ids: Vec<u64> = self.repair.pending.iter().filter(|(_, copies)| late(copies)).map(|(id, _)| *id).collect();
        for id in ids {
            self.end_copies(id, |_, copy| copy.deadline_ms <= now_ms);
            self.reassess(id);
        }
    }

    /// A node died: what it was to send or receive will not come.
    pub(super) fn drop_copies_of(&mut self, node: NodeIndex) {
        let ids: Vec<u64> = self.repair.pending.keys().copied().collect();
        for id in ids {
            if self.end_copies(id, |nodes, copy| copy.source == Some(node) || nodes.storage(copy.target).node == node) {
                self.reassess(id);
            }
        }
    }
}

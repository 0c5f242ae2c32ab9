//! Taking a file over from a writer that is gone.
//!
//! # Overview
//! Blocks that were reported whole are committed as they are. Of a block that is only partly there the datanodes agree on
//! a length: one of them is told to bring all replicas to it under a new generation (`RecoverBlock`). Meanwhile the lease
//! belongs to the namenode, which fences the old writer. Attempts are repeated, ever more rarely, until one succeeds.
//!
//! # Consistency
//! What a writer was told to be on disk must not be lost, so a block is dropped (with all after it) only if nothing of it
//! was reported and every node that could hold it is there and has reported. A node that is away may hold it: the file
//! stays open until it is back, or was away for `abandoned_block_wait_ms` (a day). Bytes that were acknowledged lie on
//! every node of the pipeline, so one that is there is enough: nobody waits for the others. Which length is right is the
//! datanodes' business.
//!
//! # Crash
//! The lease of the namenode is in the log, so a restart finds the file and begins again; a generation that was handed out
//! is never used twice.

use std::collections::{BTreeMap, BTreeSet};

use cairn_proto::ids::TxId;
use cairn_proto::pb::{self, ReplicaState, edit::Kind};
use cairn_proto::{Error, ErrorCode};

use super::blocks::{BadReplica, Block, SeenReplica, StorageIndex};
use super::edits::Applied;
use super::inode::Inode;
use super::nodes::NodeIndex;
use super::{Carries, Core, Turn};

/// Holder of the leases that the namenode has taken over; no client may use this name.
pub const RECOVERY_HOLDER: &str = "cairn-namenode-recovery";
/// Patience with the first attempt; it doubles with each, ...
const ATTEMPT_MS: u64 = 10_000;
/// ... up to this.
const MAX_ATTEMPT_MS: u64 = 300_000;
/// Datanodes that are there and know nothing of a block are asked this often before it is dropped.
const MAX_ATTEMPTS: u32 = 3;
/// Files taken up in one turn.
const FILES_PER_TURN: usize = 100;
/// Leases of the namenode looked through in one turn for files that nobody recovers.
const LEASES_PER_TURN: usize = 1_000;

fn patience_ms(count: u32) -> u64 {
    (ATTEMPT_MS << count.saturating_sub(1).min(10)).min(MAX_ATTEMPT_MS)
}

/// Attempts to recover one block.
#[derive(Default)]
struct Attempt {
    count: u32,
    deadline_ms: u64,
    /// Generation of the newest order, and what was known of the replicas that it names.
    generation: u64,
    asked: Vec<SeenReplica>,
}

/// A file that waits for its blocks.
#[derive(Default)]
struct Patient {
    due_ms: u64,
    /// Faults in a row.
    failures: u32,
    blocks: BTreeMap<u64, Attempt>,
}

impl Patient {
    /// Attempts that are not fresh are over; whether there were any.
    fn hasten(&mut self, now_ms: u64) -> bool {
        let mut any = false;
        for attempt in self.blocks.values_mut().filter(|attempt| attempt.deadline_ms > now_ms + ATTEMPT_MS) {
            attempt.deadline_ms = now_ms;
            attempt.count = 0;
            any = true;
        }
        any
    }
}

/// Files that are being recovered, and when each is looked at next.
#[derive(Default)]
pub struct Recoveries {
    files: BTreeMap<u64, Patient>,
    due: BTreeSet<(u64, u64)>,
    /// Where the search for files that nobody recovers goes on.
    looked_to: u64,
}

impl Recoveries {
    fn schedule(&mut self, file: u64, due_ms: u64) {
        let patient = self.files.entry(file).or_default();
        self.due.remove(&(patient.due_ms, file));
        patient.due_ms = due_ms;
        self.due.insert((due_ms, file));
    }

    fn fail(&mut self, file: u64, now_ms: u64) {
        let patient = self.files.entry(file).or_default();
        patient.failures = patient.failures.saturating_add(1);
        let wait_ms = patience_ms(patient.failures);
        self.schedule(file, now_ms + wait_ms);
    }

    fn forget(&mut self, file: u64) {
        if let Some(patient) = self.files.remove(&file) {
            self.due.remove(&(patient.due_ms, file));
        }
    }
}

impl Core {
    /// Looks after files whose writers are gone.
    pub(super) fn expire_leases(&mut self, turn: &mut Turn<'_>) {
        if self.safemode.is_on() {
            return;
        }
        let now_ms = self.now_ms;
        let due = self.recoveries.due.range(..=(now_ms, u64::MAX)).take(FILES_PER_TURN);
        let mut files: Vec<u64> = due.map(|(_, file)| *file).collect();
        let idle = |file: &u64| !self.recoveries.files.contains_key(file);
        // A recovery renews generations. While a person may still restore another moment, only what is asked for is recovered.
        if self.restored_to == 0 {
            files.extend(self.leases.older_than(self.settings.lease_hard_limit_ms, now_ms, FILES_PER_TURN, idle));
        }
        if self.repair.settled() {
            // Left by an earlier life of the namenode.
            let some = self.leases.files_of(RECOVERY_HOLDER, self.recoveries.looked_to);
            let some: Vec<u64> = some.take(LEASES_PER_TURN).collect();
            let left: Vec<u64> = some.iter().copied().filter(idle).take(FILES_PER_TURN).collect();
            let last = if left.len() == FILES_PER_TURN { left.last() } else { some.last() };
            let at_end = some.len() < LEASES_PER_TURN && left.len() < FILES_PER_TURN;
            self.recoveries.looked_to = last.filter(|_| !at_end).map_or(0, |file| file + 1);
            files.extend(left);
        }
        files.sort_unstable();
        files.dedup();
        for file in files {
            self.unsynced.reset();
            let open = self.tree.get(file).is_some_and(Inode::is_open);
            if !open || !self.tree.is_reachable(file) {
                // A deleted file goes with its tree.
                self.leases.release(file);
                self.recoveries.forget(file);
            } else {
                // After a fault the lease stays as it is in the log, and the file gets its next turn later.
                let _ = self.take_over(turn, file);
            }
        }
    }

    /// Somebody waits for the file: attempts whose patience has grown are begun anew.
    pub(super) fn hasten_recovery(&mut self, file: u64) {
        if let Some(patient) = self.recoveries.files.get_mut(&file) {
            patient.hasten(self.now_ms);
        }
    }

    /// A node that was away has told all that it has: some may have waited for just that one.
    pub(super) fn hasten_recoveries(&mut self) {
        let now_ms = self.now_ms;
        let waiting = self.recoveries.files.iter_mut().filter(|(_, patient)| patient.due_ms > now_ms);
        let files: Vec<u64> = waiting.filter_map(|(file, patient)| patient.hasten(now_ms).then_some(*file)).collect();
        for file in files {
            self.recoveries.schedule(file, now_ms);
        }
    }

    /// What keeps a file from being closed, in words.
    pub(super) fn recovery_waits_for(&self, file: u64) -> String {
        let blocks = self.tree.get(file).map_or(&[][..], Inode::blocks);
        for id in blocks.iter().filter(|id| self.blocks.open.contains_key(*id)) {
            if self.reported_length(*id).is_some() {
                continue;
            }
            if !self.candidates(*id).is_empty() {
                return format!("the datanodes agree on the length of block {id}");
            }
            let names: Vec<&str> = self.absent_nodes(*id).iter().map(|node| &*self.nodes.node(*node).host).collect();
            if !names.is_empty() {
                return format!("block {id} may lie on datanodes that are away: {}", names.join(", "));
            }
        }
        "recovery is under way".into()
    }

    /// Closes the file if all its blocks can be settled now (`true`), or gets their recovery under way.
    pub(super) fn take_over(&mut self, turn: &mut Turn<'_>, file: u64) -> Result<bool, Error> {
        let result = self.try_take_over(turn, file);
        if result.is_err() {
            self.recoveries.fail(file, self.now_ms);
        }
        result
    }

    fn try_take_over(&mut self, turn: &mut Turn<'_>, file: u64) -> Result<bool, Error> {
        let blocks = self.tree.get(file).map(|inode| inode.blocks().to_vec()).unwrap_or_default();
        let open: Vec<u64> = blocks.into_iter().filter(|id| self.blocks.open.contains_key(id)).collect();
        let mut due_ms = None;
        for id in open {
            if self.reported_length(id).is_none() {
                let block_ms = self.recover_block(turn, file, id)?;
                due_ms = [due_ms, block_ms].into_iter().flatten().min();
            }
        }
        let Some(due_ms) = due_ms else {
            self.close_abandoned(turn, file)?;
            self.recoveries.forget(file);
            return Ok(true);
        };
        if self.leases.holder_of(file) != Some(RECOVERY_HOLDER) {
            let edit = pb::EditLease { inode: file, holder: RECOVERY_HOLDER.into() };
            self.commit(turn, Carries::Nothing, Kind::Lease(edit))?;
        }
        self.recoveries.schedule(file, due_ms);
        Ok(false)
    }

    /// Tells a datanode to recover a block, unless one is at it. Returns when to look again; `None`: nobody has it.
    fn recover_block(&mut self, turn: &mut Turn<'_>, file: u64, id: u64) -> Result<Option<u64>, Error> {
        let attempt = self.recoveries.files.get(&file).and_then(|patient| patient.blocks.get(&id));
        let (count, deadline_ms) = attempt.map_or((0, 0), |attempt| (attempt.count, attempt.deadline_ms));
        if deadline_ms > self.now_ms {
            return Ok(Some(deadline_ms));
        }
        let candidates = self.candidates(id);
        if self.is_nowhere(id) && (candidates.is_empty() || count >= MAX_ATTEMPTS) {
            return Ok(None);
        }
        if candidates.is_empty() {
            // A node may be back at any moment: patience is for those that are asked.
            return Ok(Some(self.now_ms + ATTEMPT_MS));
        }
        let deadline_ms = self.now_ms + patience_ms(count + 1);
        self.order_recovery(turn, file, id, &candidates)?;
        let asked = self.blocks.open.get(&id).map_or(Vec::new(), |open| open.seen.clone());
        let attempt = self.recoveries.files.entry(file).or_default().blocks.entry(id).or_default();
        attempt.count = attempt.count.saturating_add(1);
        attempt.deadline_ms = deadline_ms;
        (attempt.generation, attempt.asked) = (self.counters.generation, asked);
        Ok(Some(deadline_ms))
    }

    /// Queues the order for one of the candidates, if there are any.
    fn order_recovery(
        &mut self,
        turn: &mut Turn<'_>,
        file: u64,
        id: u64,
        candidates: &[StorageIndex],
    ) -> Result<(), Error> {
        let nodes = candidates.iter().map(|storage| self.nodes.storage(*storage).node);
        let primary = nodes.max_by_key(|node| (self.nodes.node(*node).heard_ms, std::cmp::Reverse(*node)));
        let Some(primary) = primary else { return Ok(()) };
        let generation = self.counters.generation + 1;
        let edit = pb::EditAllocateGeneration { inode: file, block_id: id as i64, generation, finished: false };
        let txid = self.commit(turn, Carries::Nothing, Kind::AllocateGeneration(edit))?;
        let current = self.blocks.get(id).map_or(0, |block| block.generation);
        let state = ReplicaState::BeingWritten;
        let order = pb::RecoverBlock {
            block: Some(self.pb_block(id, current)),
            new_generation: generation,
            replicas: candidates.iter().map(|storage| self.nodes.replica(*storage, state)).collect(),
            truncate_to: self.blocks.get(id).and_then(Block::target),
            silent: self.silent_members(id, candidates),
        };
        self.nodes.node_mut(primary).recover.push_back((order, txid));
        Ok(())
    }

    /// Nodes of a known pipeline that are away and may have more than the candidates. After a start pipelines are not known: then nobody is
    /// waited for once somebody has something, or one node that never comes back would keep all files open. Nor is a node that lives and
    /// has told: a volume that it lost may never come back.
    fn silent_members(&self, id: u64, candidates: &[StorageIndex]) -> u32 {
        if self.blocks.open.get(&id).is_none_or(|open| open.expected.is_empty()) {
            return 0;
        }
        let asked: BTreeSet<NodeIndex> = candidates.iter().map(|storage| self.nodes.storage(*storage).node).collect();
        let away = |index: &&NodeIndex| {
            let node = self.nodes.node(**index);
            let told = node.alive && node.reported;
            !told && !asked.contains(*index)
        };
        self.absent_nodes(id).iter().filter(away).count() as u32
    }

    /// Whether nothing of an open block was reported by any node that could hold it, and none of those is away.
    fn is_nowhere(&self, id: u64) -> bool {
        if self.blocks.get(id).is_some_and(|block| block.target().is_some()) {
            // It was whole once: it is missing, not given up.
            return false;
        }
        self.blocks.open.get(&id).is_none_or(|open| open.seen.is_empty()) && self.absent_nodes(id).is_empty()
    }

    /// Nodes that could hold something of an open block and have not told, in order. One that was away for very long is
    /// not waited for.
    pub(super) fn absent_nodes(&self, id: u64) -> Vec<NodeIndex> {
        let mut nodes: Vec<NodeIndex> = match self.blocks.open.get(&id) {
            None => Vec::new(),
            // The pipeline was forgotten in a restart: it may lie on any node.
            Some(open) if open.expected.is_empty() => (0..self.nodes.nodes.len() as NodeIndex).collect(),
            Some(open) => open.expected.iter().map(|storage| self.nodes.storage(*storage).node).collect(),
        };
        let expected = self.blocks.open.get(&id).map_or(&[][..], |open| &open.expected);
        nodes.retain(|index| {
            let node = self.nodes.node(*index);
            let out = expected.iter().any(|at| self.nodes.storage(*at).node == *index && !self.nodes.is_live(*at));
            let told = node.alive && node.reported && !out;
            let silent_ms = self.now_ms.saturating_sub(node.heard_ms.max(self.started_ms));
            !told && (node.alive || silent_ms < self.settings.abandoned_block_wait_ms)
        });
        nodes.sort_unstable();
        nodes.dedup();
        nodes
    }

    /// Live storages that may have something of an open block.
    fn candidates(&self, id: u64) -> Vec<StorageIndex> {
        let Some(open) = self.blocks.open.get(&id) else { return Vec::new() };
        let mut all: Vec<StorageIndex> = open.expected.clone();
        all.extend(open.seen.iter().map(|seen| seen.storage).filter(|storage| !open.expected.contains(storage)));
        all.retain(|storage| self.nodes.is_live(*storage));
        all
    }

    /// A datanode has recovered a block.
    pub(super) fn block_recovered(&mut self, turn: &mut Turn<'_>, recovered: &pb::BlockRecovered) -> Result<(), Error> {
        let id = recovered.block.as_ref().map_or(0, |block| block.id as u64);
        let (generation, length) = (recovered.new_generation, recovered.length);
        let Some(block) = self.blocks.get(id) else { return Ok(()) };
        let (file, is_newer) = (block.inode, generation > block.generation);
        if !is_newer || generation > self.counters.generation || !self.tree.is_reachable(file) {
            return Ok(());
        }
        if let Some(committed) = block.length() {
            // Two attempts were under way, and the file was closed with what the other one found.
            return if committed == length { self.renew_block(turn, id, recovered) } else { Ok(()) };
        }
        // An answer to any attempt is good, to one that was ordered before a restart too: its replicas are whole. Once the
        // namenode has the lease no writer can go on with the block.
        if self.leases.holder_of(file) != Some(RECOVERY_HOLDER) {
            return Ok(());
        }
        let target = self.blocks.get(id).and_then(Block::target);
        if target.is_some_and(|target| target != length) {
            return Ok(());
        }
        if target.is_none() && length > self.tree.get(file).map_or(0, Inode::block_size) {
            let message = format!("block {id} cannot have been recovered to {length} bytes");
            return Err(Error::new(ErrorCode::InvalidArgument, message).with_subject(id.to_string()));
        }
        let held = recovered.storage_ids.iter().any(|name| self.nodes.find_storage(name).is_some());
        self.unsynced.reset();
        if !held {
            if length == 0 {
                self.nothing_found(turn, file, id, generation);
            }
            return Ok(());
        }
        let edit = pb::EditUpdateBlock { inode: file, block_id: id as i64, generation, length };
        self.commit(turn, Carries::Nothing, Kind::UpdateBlock(edit))?;
        if let Some(open) = self.blocks.open.get_mut(&id) {
            // Whoever was left out has less.
            open.expected = recovered.storage_ids.iter().filter_map(|name| self.nodes.find_storage(name)).collect();
        }
        for name in &recovered.storage_ids {
            let Some(storage) = self.nodes.find_storage(name) else { continue };
            let seen = SeenReplica { storage, generation, length: recovered.length, state: ReplicaState::Finalized };
            if let Some(open) = self.blocks.open.get_mut(&id) {
                open.seen.retain(|other| other.storage != storage);
                open.seen.push(seen);
                self.nodes.storage_mut(storage).blocks.insert(id);
                self.spare(id, storage);
            }
        }
        let is_last = self.tree.get(file).and_then(|inode| inode.blocks().last().copied()) == Some(id);
        if recovered.length == 0 && is_last && target.is_none() {
            // Nothing was written into it.
            let edit = pb::EditAbandonBlock { inode: file, block_id: id as i64 };
            self.commit(turn, Carries::Nothing, Kind::AbandonBlock(edit))?;
        }
        if let Some(patient) = self.recoveries.files.get_mut(&file) {
            patient.blocks.remove(&id);
        }
        // A fault in what follows is none of the datanode; the file gets its next turn later.
        let _ = self.take_over(turn, file);
        Ok(())
    }

    /// All that were asked for a block have nothing of it: they need not be asked again.
    fn nothing_found(&mut self, turn: &mut Turn<'_>, file: u64, id: u64, generation: u64) {
        let attempt = self.recoveries.files.get_mut(&file).and_then(|it| it.blocks.get_mut(&id));
        let Some(attempt) = attempt else { return };
        let asked = if attempt.generation == generation { std::mem::take(&mut attempt.asked) } else { Vec::new() };
        // A replica that went without a word would be asked for again and again. What was said since stays.
        for seen in asked {
            if let Some(open) = self.blocks.open.get_mut(&id) {
                open.seen.retain(|other| *other != seen);
            }
            self.settle_membership(id, seen.storage);
        }
        if !self.is_nowhere(id) {
            // Somebody who is away may have it: the next attempt waits for its time.
            return;
        }
        if let Some(attempt) = self.recoveries.files.get_mut(&file).and_then(|it| it.blocks.get_mut(&id)) {
            (attempt.count, attempt.deadline_ms) = (MAX_ATTEMPTS, self.now_ms);
        }
        let _ = self.take_over(turn, file);
    }

    /// Replicas of a finished block have a newer generation: it is the block's from now on, or none of them would count.
    fn renew_block(&mut self, turn: &mut Turn<'_>, id: u64, recovered: &pb::BlockRecovered) -> Result<(), Error> {
        self.unsynced.reset();
        let generation = recovered.new_generation;
        let live = self.live_replicas(id).len();
        let mut named: Vec<StorageIndex> =
            recovered.storage_ids.iter().filter_map(|name| self.nodes.find_storage(name)).collect();
        // One that is gone since, or that its node was told to delete, is none that it brings.
        named.retain(|at| {
            self.blocks.known_on(id, *at) && !self.nodes.node_of(*at).deleting.covers(id, *at, generation)
        });
        if named.len() < live.max(1) {
            // It would condemn more good replicas than it brings; those that it has brought to the new generation are made anew.
            return Ok(());
        }
        let inode = self.blocks.get(id).map_or(0, |block| block.inode);
        let edit = pb::EditRenewBlock { inode, block_id: id as i64, generation };
        self.commit(turn, Carries::Nothing, Kind::RenewBlock(edit))?;
        for storage in named {
            self.count_again(id, storage);
        }
        self.reassess(id);
        Ok(())
    }

    pub(super) fn apply_renew_block(&mut self, txid: TxId, edit: &pb::EditRenewBlock) -> Applied {
        let id = edit.block_id as u64;
        let old = match self.blocks.get(id) {
            Some(block) if block.inode == edit.inode && block.length().is_some() => block.generation,
            _ => return Err(format!("block {id} is no finished block of file {}", edit.inode)),
        };
        if edit.generation <= old || edit.generation > self.counters.generation {
            let newest = self.counters.generation;
            return Err(format!("generation {} does not fit between {old} and {newest}", edit.generation));
        }
        self.blocks.table.modify(id, |block| block.generation = edit.generation);
        self.handed_out.in_force(id, edit.generation);
        self.unsynced.mark(id, txid);
        let Some(block) = self.blocks.get(id) else { return Ok(()) };
        let (whole, generation) = (block.length(), old);
        for storage in block.replicas.as_slice().to_vec() {
            self.mark_bad(id, BadReplica { storage, generation, whole });
        }
        Ok(())
    }

    /// Closes a file for a writer that is gone: keeps every block up to the first one of which no whole replica was
    /// reported, or up to and with the first that the writer left unfinished.
    fn close_abandoned(&mut self, turn: &mut Turn<'_>, file: u64) -> Result<(), Error> {
        let blocks = self.tree.get(file).map_or(&[][..], Inode::blocks).to_vec();
        let full = self.tree.get(file).map_or(0, Inode::block_size);
        let mut lengths = Vec::new();
        let mut keep = blocks.len();
        for (at, id) in blocks.iter().enumerate() {
            let Some(block) = self.blocks.get(*id) else { continue };
            if block.length().is_some() {
                continue;
            }
            let Some(length) = self.reported_length(*id) else {
                keep = at;
                break;
            };
            lengths.push(pb::EditBlockLength { block_id: *id as i64, generation: block.generation, length });
            if length < full {
                // A writer begins the next block when this one is full: what lies there does not follow what is left here. None of
                // it was acknowledged as durable, for that waits for this block.
                keep = at + 1;
                break;
            }
        }
        // Nothing was written into a last block of no bytes.
        while lengths
            .pop_if(|last| last.length == 0 && keep.checked_sub(1).is_some_and(|at| blocks[at] == last.block_id as u64))
            .is_some()
        {
            keep -= 1;
        }
        // Only open blocks can be dropped, and they lie at the end: at most two are open.
        for id in blocks[keep..].iter().rev() {
            let edit = pb::EditAbandonBlock { inode: file, block_id: *id as i64 };
            self.commit(turn, Carries::Nothing, Kind::AbandonBlock(edit))?;
        }
        self.commit(turn, Carries::Nothing, Kind::Close(pb::EditClose { inode: file, blocks: lengths }))?;
        Ok(())
    }

    /// The length that most whole replicas of an open block have; the longer one on a tie.
    fn reported_length(&self, id: u64) -> Option<u64> {
        let block = self.blocks.get(id)?;
        let generation = block.generation;
        let range = match block.target() {
            Some(target) => target..=target,
            None => 0..=self.tree.get(block.inode)?.block_size(),
        };
        let mut votes: BTreeMap<u64, usize> = BTreeMap::new();
        for seen in &self.blocks.open.get(&id)?.seen {
            if seen.generation == generation && seen.state == ReplicaState::Finalized && range.contains(&seen.length) {
                *votes.entry(seen.length).or_default() += 1;
            }
        }
        votes.into_iter().max_by_key(|(length, votes)| (*votes, *length)).map(|(length, _)| length)
    }
}

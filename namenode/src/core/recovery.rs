//! Taking a file over from a writer that is gone.
//!
//! Blocks that were reported whole are committed as they are. Of a block that is only partly there the datanodes agree on
//! a length: one of them is told to bring all replicas to it under a new generation (`RecoverBlock`). Meanwhile the lease
//! belongs to the namenode, which fences the old writer. A block that nobody has, or that could not be recovered in a few
//! attempts, is dropped with all after it.
//!
//! Crash: the lease of the namenode is in the log, so a restart finds the file and begins again; a generation that was
//! handed out is never used twice.

use std::collections::BTreeMap;

use cairn_proto::Error;
use cairn_proto::pb::{self, ReplicaState, edit::Kind};

use super::blocks::{SeenReplica, StorageIndex};
use super::inode::Inode;
use super::{Carries, Core, Turn};

/// Holder of the leases that the namenode has taken over; no client may use this name.
pub const RECOVERY_HOLDER: &str = "cairn-namenode-recovery";
/// Patience with one attempt.
const ATTEMPT_MS: u64 = 10_000;
const MAX_ATTEMPTS: u32 = 3;
/// Files looked at in one turn.
const FILES_PER_TURN: usize = 100;

struct Attempt {
    file: u64,
    generation: u64,
    count: u32,
    deadline_ms: u64,
}

/// Blocks that datanodes are recovering.
#[derive(Default)]
pub struct Recoveries {
    blocks: BTreeMap<u64, Attempt>,
}

impl Core {
    /// Looks after files whose writers are gone.
    pub(super) fn expire_leases(&mut self, turn: &mut Turn<'_>) {
        if self.safemode.is_on() {
            return;
        }
        let now_ms = self.now_ms;
        let late = self.recoveries.blocks.values().filter(|attempt| attempt.deadline_ms <= now_ms);
        let mut files: Vec<u64> = late.map(|attempt| attempt.file).collect();
        files.extend(self.leases.older_than(self.settings.lease_hard_limit_ms, now_ms, FILES_PER_TURN));
        if self.repair.settled() {
            // Left by an earlier life of the namenode.
            let busy = |file: &u64| self.recoveries.blocks.values().any(|attempt| attempt.file == *file);
            files.extend(self.leases.files_of(RECOVERY_HOLDER).filter(|file| !busy(file)).take(FILES_PER_TURN));
        }
        files.sort_unstable();
        files.dedup();
        for file in files {
            self.unsynced.reset();
            if !self.tree.is_reachable(file) || self.take_over(turn, file).is_err() {
                // A deleted file goes with its tree; anything else would fail again at every turn.
                self.leases.release(file);
                self.recoveries.blocks.retain(|_, attempt| attempt.file != file);
            }
        }
    }

    /// Closes the file if all its blocks can be settled now (`true`), or gets their recovery under way.
    pub(super) fn take_over(&mut self, turn: &mut Turn<'_>, file: u64) -> Result<bool, Error> {
        let blocks = self.tree.get(file).map(|inode| inode.blocks().to_vec()).unwrap_or_default();
        let open: Vec<u64> = blocks.into_iter().filter(|id| self.blocks.open.contains_key(id)).collect();
        let mut waiting = false;
        for id in open {
            if self.reported_length(id).is_none() {
                waiting |= self.recover_block(turn, file, id)?;
            }
        }
        if !waiting {
            self.close_abandoned(turn, file)?;
            self.recoveries.blocks.retain(|_, attempt| attempt.file != file);
            return Ok(true);
        }
        if self.leases.holder_of(file) != Some(RECOVERY_HOLDER) {
            let edit = pb::EditLease { inode: file, holder: RECOVERY_HOLDER.into() };
            self.commit(turn, Carries::Nothing, Kind::Lease(edit))?;
        }
        Ok(false)
    }

    /// Tells a datanode to recover a block; `false`: nobody has it, or it was tried often enough.
    fn recover_block(&mut self, turn: &mut Turn<'_>, file: u64, id: u64) -> Result<bool, Error> {
        let count = match self.recoveries.blocks.get(&id) {
            Some(attempt) if attempt.deadline_ms > self.now_ms => return Ok(true),
            Some(attempt) => attempt.count + 1,
            None => 1,
        };
        let candidates = self.candidates(id);
        let primary = candidates
            .iter()
            .map(|storage| self.nodes.storage(*storage).node)
            .max_by_key(|node| (self.nodes.node(*node).heard_ms, std::cmp::Reverse(*node)));
        let (Some(primary), true) = (primary, count <= MAX_ATTEMPTS) else { return Ok(false) };
        let generation = self.counters.generation + 1;
        let edit = pb::EditAllocateGeneration { inode: file, block_id: id as i64, generation };
        let txid = self.commit(turn, Carries::Nothing, Kind::AllocateGeneration(edit))?;
        let current = self.blocks.get(id).map_or(0, |block| block.generation);
        let state = ReplicaState::BeingWritten;
        let order = pb::RecoverBlock {
            block: Some(self.pb_block(id, current)),
            new_generation: generation,
            replicas: candidates.iter().map(|storage| self.nodes.replica(*storage, state)).collect(),
        };
        self.nodes.node_mut(primary).recover.push_back((order, txid));
        let deadline_ms = self.now_ms + ATTEMPT_MS;
        self.recoveries.blocks.insert(id, Attempt { file, generation, count, deadline_ms });
        Ok(true)
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
        let Some(attempt) = self.recoveries.blocks.get(&id) else { return Ok(()) };
        let (file, generation) = (attempt.file, attempt.generation);
        let current = self.tree.is_reachable(file) && self.blocks.open.contains_key(&id);
        if !current || generation != recovered.new_generation {
            return Ok(());
        }
        self.unsynced.reset();
        let edit = pb::EditUpdateBlock { inode: file, block_id: id as i64, generation, length: recovered.length };
        self.commit(turn, Carries::Nothing, Kind::UpdateBlock(edit))?;
        for name in &recovered.storage_ids {
            let Some(storage) = self.nodes.find_storage(name) else { continue };
            let seen = SeenReplica { storage, generation, length: recovered.length, state: ReplicaState::Finalized };
            if let Some(open) = self.blocks.open.get_mut(&id) {
                open.seen.retain(|other| other.storage != storage);
                open.seen.push(seen);
                self.nodes.storage_mut(storage).blocks.insert(id);
            }
        }
        let is_last = self.tree.get(file).and_then(|inode| inode.blocks().last().copied()) == Some(id);
        if recovered.length == 0 && is_last {
            // Nothing was written into it.
            let edit = pb::EditAbandonBlock { inode: file, block_id: id as i64 };
            self.commit(turn, Carries::Nothing, Kind::AbandonBlock(edit))?;
        }
        self.recoveries.blocks.remove(&id);
        self.take_over(turn, file).map(|_| ())
    }

    /// Closes a file for a writer that is gone: keeps every block up to the first one of which no whole replica was
    /// reported.
    fn close_abandoned(&mut self, turn: &mut Turn<'_>, file: u64) -> Result<(), Error> {
        let blocks = self.tree.get(file).map_or(&[][..], Inode::blocks).to_vec();
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
        let generation = self.blocks.get(id)?.generation;
        let mut votes: BTreeMap<u64, usize> = BTreeMap::new();
        for seen in &self.blocks.open.get(&id)?.seen {
            if seen.generation == generation && seen.state == ReplicaState::Finalized {
                *votes.entry(seen.length).or_default() += 1;
            }
        }
        votes.into_iter().max_by_key(|(length, votes)| (*votes, *length)).map(|(length, _)| length)
    }
}

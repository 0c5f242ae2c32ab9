//! Generations beyond the one in force, and what becomes of replicas that have them.
//!
//! # Overview
//! A recovery brings replicas to a new generation and says so afterwards. If that report is lost, or another recovery was
//! quicker, a finished block has replicas of a generation newer than its own. They do not count. While others do, they go,
//! so that their nodes can take good ones. If nothing else is left they are taken back: the newest generation of which there
//! is a replica of the right length is the block's from then on, by an edit; of longer ones a datanode is told to cut them,
//! which ends the same way.
//!
//! # Consistency
//! Only a generation that this namenode handed out for that very block is taken back ([`HandedOut`]). A block has one
//! writer, ever, and recovery only cuts: so what lies in a replica up to the block's length are its bytes, whichever attempt
//! it comes from. A replica that its node was told to delete lately is not taken back.
//!
//! A newer replica goes only while another one is there for sure, as any that does not count; if the recovery that made it is
//! reported after all, it is not among those that this report brings.
//!
//! # Crash
//! What was handed out is in the log and in images. After a start blocks are taken back in safe mode already, once all known
//! nodes have reported, since safe mode may wait for just these blocks.

use std::collections::{BTreeMap, BTreeSet};

use cairn_proto::Error;
use cairn_proto::pb::{self, ReplicaState, edit::Kind};

use super::blocks::{BadReplica, Block, StorageIndex};
use super::codec::{Reader, mix, put};
use super::nodes::QueuedDeletion;
use super::{Carries, Core, Turn};

/// Blocks of which generations beyond the one in force are remembered; those of the oldest blocks are forgotten.
const MAX_HANDED_OUT: usize = 65_536;
/// A newer replica of a block that has others goes after this: the report of what made it is not on its way any more.
const GRACE_MS: u64 = 20_000;
/// A block is looked at again after this, twice as long each time, ...
const AGAIN_MS: u64 = 30_000;
/// ... up to this.
const LONGEST_MS: u64 = 600_000;
/// Blocks looked at in one turn.
const BLOCKS_PER_TURN: usize = 100;

/// The newest generation that was handed out for a block, where that is newer than its own. Part of the persistent state.
#[derive(Default)]
pub struct HandedOut {
    newest: BTreeMap<u64, u64>,
    digest: u64,
}

fn hash_of(id: u64, generation: u64) -> u64 {
    mix(mix(id, 5), generation)
}

impl HandedOut {
    /// Does not depend on order; 0 if there is none.
    pub fn digest(&self) -> u64 {
        self.digest
    }

    /// A generation was handed out for this block.
    pub fn note(&mut self, id: u64, generation: u64) {
        self.free(id);
        self.newest.insert(id, generation);
        self.digest = self.digest.wrapping_add(hash_of(id, generation));
        if self.newest.len() > MAX_HANDED_OUT
            && let Some(oldest) = self.newest.first_key_value().map(|(id, _)| *id)
        {
            self.free(oldest);
        }
    }

    /// This generation is the block's now.
    pub fn in_force(&mut self, id: u64, generation: u64) {
        if self.of(id) <= generation {
            self.free(id);
        }
    }

    /// The block is gone. Returns what [`Self::of`] gave.
    pub fn free(&mut self, id: u64) -> u64 {
        let Some(generation) = self.newest.remove(&id) else { return 0 };
        self.digest = self.digest.wrapping_sub(hash_of(id, generation));
        generation
    }

    /// The newest generation that was handed out for this block; 0: none beyond its own, or it is not known.
    pub fn of(&self, id: u64) -> u64 {
        self.newest.get(&id).copied().unwrap_or(0)
    }

    /// For an image.
    pub fn encode(&self, out: &mut Vec<u8>) {
        put(out, self.newest.len() as u64);
        for (id, generation) in &self.newest {
            put(out, *id);
            put(out, *generation);
        }
    }

    /// Reads what [`Self::encode`] wrote.
    pub fn decode(reader: &mut Reader<'_>) -> Result<Self, String> {
        let mut handed = Self::default();
        for _ in 0..reader.number()? {
            handed.note(reader.number()?, reader.number()?);
        }
        Ok(handed)
    }
}

/// When a block with newer replicas is looked at.
#[derive(Clone, Copy)]
struct Waiting {
    due_ms: u64,
    tries: u32,
}

/// Finished blocks with replicas of a newer generation.
#[derive(Default)]
pub struct TakingBack {
    waiting: BTreeMap<u64, Waiting>,
    due: BTreeSet<(u64, u64)>,
    /// Where the search in safe mode goes on.
    looked_to: u64,
}

impl TakingBack {
    fn forget(&mut self, id: u64) {
        if let Some(waiting) = self.waiting.remove(&id) {
            self.due.remove(&(waiting.due_ms, id));
        }
    }

    fn schedule(&mut self, id: u64, due_ms: u64, tries: u32) {
        self.forget(id);
        self.waiting.insert(id, Waiting { due_ms, tries });
        self.due.insert((due_ms, id));
    }
}

impl Core {
    /// Whether a replica that does not count has a generation newer than its block's.
    fn newer_replicas(&self, id: u64, block: &Block) -> Vec<BadReplica> {
        let bad = self.blocks.bad.get(&id).map_or(&[][..], Vec::as_slice);
        let newer = |bad: &&BadReplica| bad.generation > block.generation && self.nodes.is_live(bad.storage);
        bad.iter().filter(newer).copied().collect()
    }

    /// A finished block was assessed that has replicas which do not count, and `live` ones that do.
    pub(super) fn watch_newer(&mut self, id: u64, live: usize) {
        let Some(block) = self.blocks.get(id) else { return };
        if self.newer_replicas(id, block).is_empty() {
            return self.taking_back.forget(id);
        }
        let due_ms = if live == 0 { self.now_ms } else { self.now_ms + GRACE_MS };
        // One for which something was tried waits for what comes of it.
        match self.taking_back.waiting.get(&id) {
            Some(waiting) if waiting.tries > 0 || waiting.due_ms <= due_ms => {}
            _ => self.taking_back.schedule(id, due_ms, 0),
        }
    }

    /// One turn: blocks of which only newer replicas are left get them back, and of others these go.
    pub(super) fn take_back_replicas(&mut self, turn: &mut Turn<'_>) {
        if self.restored_to != 0 {
            // Another moment may still be restored.
            return;
        }
        if self.safemode.is_on() {
            return self.take_back_at_start(turn);
        }
        if !self.repair.settled() {
            return;
        }
        let due = self.taking_back.due.range(..=(self.now_ms, u64::MAX)).take(BLOCKS_PER_TURN);
        for id in due.map(|(_, id)| *id).collect::<Vec<_>>() {
            self.unsynced.reset();
            let tries = self.taking_back.waiting.get(&id).map_or(0, |waiting| waiting.tries);
            let again_ms = (AGAIN_MS << tries.min(10)).min(LONGEST_MS);
            self.taking_back.schedule(id, self.now_ms + again_ms, tries.saturating_add(1));
            // After a fault it is looked at again.
            let _ = self.settle_newer(turn, id);
        }
    }

    /// Safe mode waits for blocks: those of which only newer replicas are left need not be waited for.
    fn take_back_at_start(&mut self, turn: &mut Turn<'_>) {
        let all_reported = self.nodes.nodes.iter().all(|node| node.alive && node.reported);
        if !self.safemode.is_startup() || !all_reported || self.blocks.bad.is_empty() {
            return;
        }
        let next = self.blocks.bad.range(self.taking_back.looked_to..).take(BLOCKS_PER_TURN);
        let ids: Vec<u64> = next.map(|(id, _)| *id).collect();
        self.taking_back.looked_to = if ids.len() < BLOCKS_PER_TURN { 0 } else { ids.last().map_or(0, |id| id + 1) };
        for id in ids {
            if self.live_replicas(id).is_empty() {
                self.unsynced.reset();
                // After a fault it is looked at again when safe mode is over.
                let _ = self.adopt_generation(turn, id);
            }
        }
    }

    /// Decides on the newer replicas of a finished block.
    fn settle_newer(&mut self, turn: &mut Turn<'_>, id: u64) -> Result<(), Error> {
        let Some(block) = self.blocks.get(id).filter(|block| block.length().is_some()) else {
            self.taking_back.forget(id);
            return Ok(());
        };
        let newer = self.newer_replicas(id, block);
        if newer.is_empty() {
            self.taking_back.forget(id);
            return Ok(());
        }
        if !self.live_replicas(id).is_empty() {
            for bad in newer {
                self.put_newer_away(id, bad);
            }
            return Ok(());
        }
        if self.adopt_generation(turn, id)? { Ok(()) } else { self.order_cut(turn, id) }
    }

    /// The block has good replicas: this one only keeps its node from taking another. One that this namenode does not know
    /// is not deleted, but quarantined.
    fn put_newer_away(&mut self, id: u64, bad: BadReplica) {
        let (generation, storage) = (bad.generation, bad.storage);
        let node = self.nodes.node_of(storage);
        let queued =
            |order: &QueuedDeletion| (order.block, order.storage) == (id, storage) && order.generation >= generation;
        if generation > self.counters.generation
            || node.deleting.covers(id, storage, generation)
            || node.delete.iter().rev().take(64).any(queued)
        {
            return;
        }
        self.queue_removal(id, generation, storage, generation <= self.handed_out.of(id));
    }

    /// Replicas of newer generations that this namenode handed out for the block, and that stay.
    fn returnable(&self, id: u64, block: &Block) -> Vec<(BadReplica, u64)> {
        let newest = self.handed_out.of(id);
        let mut newer = self.newer_replicas(id, block);
        newer.retain(|bad| {
            let leaves = self.nodes.node_of(bad.storage).deleting.covers(id, bad.storage, bad.generation);
            bad.generation <= newest && !leaves
        });
        newer.into_iter().filter_map(|bad| bad.whole.map(|length| (bad, length))).collect()
    }

    /// Nothing else is left of a finished block: the newest generation with replicas of the right length is its own from now
    /// on. `false`: there is none.
    fn adopt_generation(&mut self, turn: &mut Turn<'_>, id: u64) -> Result<bool, Error> {
        let Some(block) = self.blocks.get(id) else { return Ok(false) };
        let (inode, Some(length)) = (block.inode, block.length()) else { return Ok(false) };
        let mut whole = self.returnable(id, block);
        whole.retain(|(_, found)| *found == length);
        let Some(generation) = whole.iter().map(|(bad, _)| bad.generation).max() else { return Ok(false) };
        let edit = pb::EditRenewBlock { inode, block_id: id as i64, generation };
        self.commit(turn, Carries::Nothing, Kind::RenewBlock(edit))?;
        for (bad, _) in whole.iter().filter(|(bad, _)| bad.generation == generation) {
            self.count_again(id, bad.storage);
        }
        self.reassess(id);
        Ok(true)
    }

    /// A replica that did not count does so under the block's new generation.
    pub(super) fn count_again(&mut self, id: u64, storage: StorageIndex) {
        self.blocks.forget_bad(id, storage);
        self.add_replica(id, storage);
        self.nodes.storage_mut(storage).blocks.insert(id);
    }

    /// Only replicas with more than the block's bytes are left: a datanode has them cut, and its report makes them the
    /// block's.
    fn order_cut(&mut self, turn: &mut Turn<'_>, id: u64) -> Result<(), Error> {
        let Some(block) = self.blocks.get(id) else { return Ok(()) };
        let (inode, current, Some(length)) = (block.inode, block.generation, block.length()) else { return Ok(()) };
        let mut longer = self.returnable(id, block);
        longer.retain(|(_, found)| *found > length);
        let nodes = longer.iter().map(|(bad, _)| self.nodes.storage(bad.storage).node);
        let Some(primary) = nodes.max_by_key(|node| (self.nodes.node(*node).heard_ms, std::cmp::Reverse(*node))) else {
            return Ok(());
        };
        let generation = self.counters.generation + 1;
        let edit = pb::EditAllocateGeneration { inode, block_id: id as i64, generation, finished: true };
        let txid = self.commit(turn, Carries::Nothing, Kind::AllocateGeneration(edit))?;
        let replica = |(bad, _): &(BadReplica, u64)| self.nodes.replica(bad.storage, ReplicaState::Finalized);
        let order = pb::RecoverBlock {
            block: Some(self.pb_block(id, current)),
            new_generation: generation,
            replicas: longer.iter().map(replica).collect(),
            truncate_to: Some(length),
            silent: 0,
        };
        self.nodes.node_mut(primary).recover.push_back((order, txid));
        Ok(())
    }
}

//! Runs of short blocks are rewritten as one block, in the background.
//!
//! # Overview
//! Appends and concats leave blocks of any length. A file with a run of short ones is noted when it is closed (and found by
//! a slow walk over all inodes); after a while a datanode is told to read the run and to write it as a new block, with the
//! frames as they are. When its replicas are reported, one edit puts it in the place of the old blocks.
//!
//! A run is rewritten only if its largest block is at most half of it. So each byte is rewritten a logarithmic number of
//! times, however small the appends are.
//!
//! # Consistency
//! The new block's id is allocated by an edit before anybody is told of it. Until the second edit the new replicas belong
//! to no block and the old ones are what is read; that edit is made only if the file is closed and still has the very run.
//! The old blocks go by the usual rules, after it is durable.
//!
//! # Crash
//! A merge under way is forgotten; what it wrote is reported as an unknown block and deleted.

use std::collections::{BTreeMap, BTreeSet};

use cairn_proto::Error;
use cairn_proto::ids::TxId;
use cairn_proto::pb::{self, ReplicaState, edit::Kind};

use super::blocks::{Block, StorageIndex};
use super::edits::Applied;
use super::inode::Inode;
use super::nodes::NodeIndex;
use super::placement;
use super::{Carries, Core, Turn};

/// Files that wait at most; the walk finds the others again.
const MAX_CANDIDATES: usize = 100_000;
/// Files looked at in one turn.
const CANDIDATES_PER_TURN: usize = 16;
/// Inodes that the walk passes in one turn.
const WALK_PER_TURN: usize = 200;
/// Blocks of a file among which runs are looked for, and in a run.
const MAX_LOOKED_AT: usize = 4_096;
const MAX_RUN: usize = 256;

/// A merge under way.
struct Merge {
    file: u64,
    /// Index of the first old block.
    at: usize,
    /// Ids and lengths.
    old: Vec<(u64, u64)>,
    generation: u64,
    length: u64,
    targets: usize,
    seen: Vec<StorageIndex>,
    deadline_ms: u64,
}

/// See the module.
#[derive(Default)]
pub struct Merges {
    candidates: BTreeSet<(u64, u64)>,
    looked_to: u64,
    /// By the id of the new block.
    active: BTreeMap<u64, Merge>,
    next_ms: u64,
    /// Old blocks that were replaced since the start.
    pub replaced: u64,
    /// Merges that came to nothing since the start.
    pub given_up: u64,
}

impl Merges {
    /// Merges under way.
    pub fn under_way(&self) -> u64 {
        self.active.len() as u64
    }

    /// Files that are to be looked at.
    #[cfg(test)]
    pub fn waiting(&self) -> usize {
        self.candidates.len()
    }
}

impl Core {
    /// The blocks of a file changed: it may be worth a merge when it has been left alone for a while.
    pub(super) fn note_short_blocks(&mut self, file: u64) {
        let blocks = self.tree.get(file).map_or(0, |inode| inode.blocks().len());
        if blocks >= self.settings.merge_min_blocks && self.merges.candidates.len() < MAX_CANDIDATES {
            self.merges.candidates.insert((self.now_ms + self.settings.merge_delay_ms, file));
        }
    }

    /// A report names a block that the map does not hold; `true` if it is the result of a merge.
    pub(super) fn see_merged(&mut self, id: u64, storage: StorageIndex, replica: &pb::ReplicaReport) -> bool {
        let Some(merge) = self.merges.active.get_mut(&id) else { return false };
        let whole = replica.state() == ReplicaState::Finalized;
        if whole && (replica.generation, replica.length) == (merge.generation, merge.length) {
            merge.seen.retain(|other| *other != storage);
            merge.seen.push(storage);
        }
        true
    }

    /// One turn: what is done is committed, what is due is begun.
    pub(super) fn run_merges(&mut self, turn: &mut Turn<'_>) {
        for id in self.merges.active.keys().copied().collect::<Vec<_>>() {
            self.settle_merge(turn, id);
        }
        let unconfirmed = self.restored_to != 0;
        if !self.settings.merge_short_blocks || !self.repair.settled() || self.safemode.is_on() || unconfirmed {
            return;
        }
        self.walk_for_runs(turn.wall_ms);
        for _ in 0..CANDIDATES_PER_TURN {
            let busy = self.merges.active.len() >= self.settings.max_merges || self.now_ms < self.merges.next_ms;
            let Some((due_ms, file)) = self.merges.candidates.first().copied().filter(|_| !busy) else { return };
            if due_ms > self.now_ms {
                return;
            }
            self.merges.candidates.pop_first();
            let Some(inode) = self.tree.get(file) else { continue };
            // A time in the future (set so, or the clock was set back) says nothing: the delay since the close is over.
            let quiet_ms = turn.wall_ms.checked_sub(inode.modified_ms).unwrap_or(u64::MAX);
            if quiet_ms < self.settings.merge_delay_ms {
                // It has been written to since.
                self.merges.candidates.insert((self.now_ms + self.settings.merge_delay_ms - quiet_ms, file));
                continue;
            }
            // A fault in it is nobody's but the log's: the walk finds the file again.
            let _ = self.begin_merge(turn, file);
        }
    }

    fn walk_for_runs(&mut self, wall_ms: u64) {
        let first = self.merges.looked_to;
        let least = self.settings.merge_min_blocks;
        let (mut last, mut count, mut found) = (first, 0, Vec::new());
        for (id, inode) in self.tree.inodes.iter_from(first).take(WALK_PER_TURN) {
            (last, count) = (id, count + 1);
            if inode.blocks().len() >= least && !inode.is_open() {
                found.push(id);
            }
        }
        self.merges.looked_to = if count < WALK_PER_TURN { 0 } else { last + 1 };
        let quiet_ms = wall_ms.saturating_sub(self.settings.merge_delay_ms);
        for file in found {
            let quiet = self.tree.get(file).is_some_and(|inode| inode.modified_ms <= quiet_ms);
            if quiet && self.merges.candidates.len() < MAX_CANDIDATES && self.find_run(file).is_some() {
                self.merges.candidates.insert((self.now_ms, file));
            }
        }
    }

    /// The first run worth a merge: where it begins, and its blocks with their lengths.
    fn find_run(&self, file: u64) -> Option<(usize, Vec<(u64, u64)>)> {
        let inode = self.tree.get(file).filter(|inode| !inode.is_open())?;
        let most = inode.block_size();
        let blocks = &inode.blocks()[..inode.blocks().len().min(MAX_LOOKED_AT)];
        let lengths: Vec<(u64, u64)> = blocks
            .iter()
            .map_while(|id| self.blocks.get(*id).and_then(Block::length).map(|length| (*id, length)))
            .collect();
        for at in 0..lengths.len() {
            let (mut sum, mut largest, mut count) = (0_u64, 0, 0);
            for (_, length) in lengths[at..].iter().take(MAX_RUN) {
                if sum + length > most {
                    break;
                }
                sum += length;
                largest = largest.max(*length);
                count += 1;
            }
            if count >= self.settings.merge_min_blocks && largest <= sum / 2 {
                return Some((at, lengths[at..at + count].to_vec()));
            }
        }
        None
    }

    fn begin_merge(&mut self, turn: &mut Turn<'_>, file: u64) -> Result<(), Error> {
        let being_merged = |merge: &Merge| merge.file == file;
        if !self.tree.is_reachable(file) || self.merges.active.values().any(being_merged) {
            return Ok(());
        }
        let Some((at, old)) = self.find_run(file) else { return Ok(()) };
        let length: u64 = old.iter().map(|(_, length)| length).sum();
        let replication = self.tree.get(file).map_or(1, |inode| usize::from(inode.replication));
        // Blocks that lack replicas are copied first; then the walk finds the file again.
        let wanted = replication.min(self.nodes.usable());
        let mut holders: BTreeMap<NodeIndex, usize> = BTreeMap::new();
        for (id, _) in &old {
            let live = self.live_replicas(*id);
            if live.len() < wanted || wanted == 0 {
                return Ok(());
            }
            for storage in live {
                *holders.entry(self.nodes.storage(storage).node).or_default() += 1;
            }
        }
        let local =
            holders.into_iter().max_by_key(|(node, count)| (*count, std::cmp::Reverse(*node))).map(|(node, _)| node);
        let Some(local) = local else { return Ok(()) };
        let request = placement::Request {
            count: replication,
            size: length,
            present: &[],
            excluded: &[],
            favored: &[],
            local: Some(local),
            fresh_since_ms: self.now_ms.saturating_sub(self.settings.stale_interval_ms),
            repair_cap: None,
        };
        let mut storages = placement::choose(&self.nodes, &request, &mut turn.random);
        if storages.len() < wanted {
            return Ok(());
        }
        placement::order_pipeline(&self.nodes, &mut storages);
        self.order_merge(turn, file, (at, old), length, local, &storages)
    }

    fn order_merge(
        &mut self,
        turn: &mut Turn<'_>,
        file: u64,
        (at, old): (usize, Vec<(u64, u64)>),
        length: u64,
        local: NodeIndex,
        storages: &[StorageIndex],
    ) -> Result<(), Error> {
        let (id, generation) = (self.counters.block + 1, self.counters.generation + 1);
        let edit = pb::EditAllocateBlock { block_id: id as i64, generation };
        let txid = self.commit(turn, Carries::Nothing, Kind::AllocateBlock(edit))?;
        let source = |(id, length): &(u64, u64)| pb::MergeSource {
            block: Some(self.pb_block(*id, self.blocks.get(*id).map_or(0, |block| block.generation))),
            length: *length,
            replicas: {
                let mut live = self.live_replicas(*id);
                // Its own replica first.
                live.sort_by_key(|storage| self.nodes.storage(*storage).node != local);
                live.iter().map(|storage| self.nodes.replica(*storage, ReplicaState::Finalized)).collect()
            },
        };
        let order = pb::MergeBlocks {
            block: Some(self.pb_block(id, generation)),
            length,
            sources: old.iter().map(source).collect(),
            targets: storages.iter().map(|at| self.nodes.replica(*at, ReplicaState::BeingWritten)).collect(),
        };
        self.nodes.node_mut(local).merge.push_back((order, txid));
        // As a copy: a slow disk's 2 MB/s.
        let deadline_ms = self.now_ms + (20_000 + length / 2_000).min(self.settings.repair_timeout_ms);
        let merge = Merge { file, at, old, generation, length, targets: storages.len(), seen: Vec::new(), deadline_ms };
        self.merges.active.insert(id, merge);
        self.merges.next_ms = self.now_ms + length.saturating_mul(1_000) / self.settings.merge_bytes_per_second.max(1);
        Ok(())
    }

    /// Commits a merge whose replicas are there, or gives it up.
    fn settle_merge(&mut self, turn: &mut Turn<'_>, id: u64) {
        let Some(merge) = self.merges.active.get(&id) else { return };
        let (file, late) = (merge.file, self.now_ms >= merge.deadline_ms);
        let live: Vec<StorageIndex> = merge.seen.iter().copied().filter(|at| self.nodes.is_live(*at)).collect();
        let open = self.tree.get(file).is_some_and(Inode::is_open);
        let holds = self.tree.is_reachable(file) && self.still_has(merge);
        let enough = if late { merge.targets.min(2) } else { merge.targets };
        if holds && !open && live.len() >= enough {
            if self.commit_merge(turn, id, &live).is_ok() {
                return;
            }
        } else if holds && !late {
            return;
        }
        let Some(merge) = self.merges.active.remove(&id) else { return };
        self.merges.given_up += 1;
        for storage in merge.seen {
            self.queue_deletion(id, merge.generation, storage);
        }
    }

    fn still_has(&self, merge: &Merge) -> bool {
        let blocks = self.tree.get(merge.file).map_or(&[][..], Inode::blocks);
        let run = blocks.get(merge.at..merge.at + merge.old.len()).unwrap_or_default();
        let same = |(now, (id, length)): (&u64, &(u64, u64))| {
            now == id && self.blocks.get(*id).and_then(Block::length) == Some(*length)
        };
        run.len() == merge.old.len() && run.iter().zip(&merge.old).all(same)
    }

    fn commit_merge(&mut self, turn: &mut Turn<'_>, id: u64, live: &[StorageIndex]) -> Result<(), Error> {
        self.unsynced.reset();
        let Some(merge) = self.merges.active.get(&id) else { return Ok(()) };
        let (file, count) = (merge.file, merge.old.len() as u64);
        let edit = pb::EditMergeBlocks {
            inode: file,
            index: merge.at as u32,
            old: merge.old.iter().map(|(id, _)| *id as i64).collect(),
            block_id: id as i64,
            generation: merge.generation,
            length: merge.length,
        };
        self.commit(turn, Carries::Nothing, Kind::MergeBlocks(edit))?;
        self.merges.active.remove(&id);
        self.merges.replaced += count;
        for storage in live {
            self.add_replica(id, *storage);
            self.nodes.storage_mut(*storage).blocks.insert(id);
        }
        self.reassess(id);
        // There may be another run.
        self.note_short_blocks(file);
        Ok(())
    }

    pub(super) fn apply_allocate_block(&mut self, edit: &pb::EditAllocateBlock) -> Applied {
        let id = u64::try_from(edit.block_id).map_err(|_| format!("block id {} is negative", edit.block_id))?;
        if id <= self.counters.block || edit.generation <= self.counters.generation {
            return Err(format!("block {id} or generation {} was used before", edit.generation));
        }
        self.counters.block = id;
        self.counters.generation = edit.generation;
        Ok(())
    }

    pub(super) fn apply_merge_blocks(&mut self, txid: TxId, edit: &pb::EditMergeBlocks) -> Applied {
        self.check_closed_file(edit.inode)?;
        let id = u64::try_from(edit.block_id).map_err(|_| format!("block id {} is negative", edit.block_id))?;
        if id > self.counters.block || edit.generation > self.counters.generation || self.blocks.get(id).is_some() {
            return Err(format!("block {id} was not allocated, or is a file's already"));
        }
        let mut ids = self.tree.get(edit.inode).map_or(Vec::new(), |inode| inode.blocks().to_vec());
        let first = edit.index as usize;
        let old: Vec<u64> = edit.old.iter().map(|id| *id as u64).collect();
        let end = first.saturating_add(old.len());
        if old.is_empty() || ids.get(first..end) != Some(&old[..]) {
            return Err(format!("file {} does not have these {} blocks from number {first} on", edit.inode, old.len()));
        }
        let lengths: u64 = old.iter().filter_map(|id| self.blocks.get(*id)?.length()).sum();
        if lengths != edit.length {
            return Err(format!("block {id} of {} bytes cannot stand for {lengths}", edit.length));
        }
        ids.splice(first..end, [id]);
        let mut block = Block::open(edit.inode, edit.generation);
        block.commit(edit.length);
        self.blocks.table.insert(id, block);
        self.repair.complete += 1;
        self.tree.modify(edit.inode, |inode| inode.set_blocks(ids));
        self.unsynced.mark(edit.inode, txid);
        self.unsynced.mark(id, txid);
        for id in old {
            self.free_block(id, txid);
        }
        Ok(())
    }
}

//! The replica map: what this node holds, and what of it changed.
//!
//! # Overview
//! One mutex guards small maps in memory; it is never held over I/O or a suspension. Whoever wants to change a replica's files first *claims*
//! its entry (so nobody else does), does the I/O, then *settles* it.
//!
//! # Consistency
//! A change of an entry and the report of that change are queued under the same lock, so reports leave in the order in which things became
//! true. While no report stream is open changes are not queued: the next registration sends a full report of the live map.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use cairn_common::clock::Clock;
use cairn_proto::blockfile::BlockIndex;
use cairn_proto::ids::{BlockId, Generation};
use cairn_proto::pb::{self, report_up::Report};
use cairn_proto::{Error, ErrorCode, Result};
use tokio::sync::{Notify, watch};

use super::lock;
use super::writer::OpenReplica;

/// Changes that may wait for the stream; beyond that a full report replaces them.
const MAX_WAITING_CHANGES: usize = 65_536;
/// Most replicas in one range of a full report.
pub const RANGE_LIMIT: usize = 4_096;

/// One replica.
#[derive(Clone)]
pub struct Entry {
    /// Its generation.
    pub generation: Generation,
    /// Its state.
    pub kind: Kind,
}

/// State of a replica.
///
/// ```text
/// (none) -> Claimed -> Writing -> Finalized -> Claimed -> Finalized (new generation) | Corrupt | (none)
///                         |  ^
///                         v  | pipeline recovery
///                      Recovering
/// ```
#[derive(Clone)]
pub enum Kind {
    /// Whole, durable, immutable.
    Finalized {
        /// Bytes of data.
        length: u64,
        /// Bytes on disk.
        stored: u64,
    },
    /// A writer is attached.
    Writing(Arc<OpenReplica>),
    /// Its writer is gone; waits for recovery.
    Recovering {
        /// What it holds.
        index: Arc<BlockIndex>,
        /// Offset of its first frame.
        header_bytes: u64,
        /// It was found by the scan at a start: a power cut may have taken what was flushed and not synced, so its length says less than that
        /// of one that was open all along (HDFS: a replica waiting to be recovered).
        found_at_start: bool,
    },
    /// Set aside; never served.
    Corrupt {
        /// By its name.
        length: u64,
        /// Bytes on disk.
        stored: u64,
        /// Where it lies.
        path: PathBuf,
    },
    /// Somebody works on its files; reports show it as it was.
    Claimed(Option<(pb::ReplicaState, u64)>),
}

impl Kind {
    /// State and length as reports show them; `None`: not reported.
    pub fn shown(&self) -> Option<(pb::ReplicaState, u64)> {
        match self {
            Self::Finalized { length, .. } => Some((pb::ReplicaState::Finalized, *length)),
            Self::Writing(open) if open.temporary() => None,
            Self::Writing(open) => Some((pb::ReplicaState::BeingWritten, open.visible())),
            Self::Recovering { index, .. } => Some((pb::ReplicaState::Recovering, index.data_length())),
            Self::Corrupt { length, .. } => Some((pb::ReplicaState::ReplicaCorrupt, *length)),
            Self::Claimed(shown) => *shown,
        }
    }
}

/// How far the report stream is.
#[derive(Clone, Copy, Default)]
struct Sent {
    streaming: bool,
    up_to: u64,
}

#[derive(Default)]
struct State {
    volumes: Vec<BTreeMap<i64, Entry>>,
    /// Replicas that nobody may go on with under an older generation than this.
    fences: BTreeMap<i64, Generation>,
    changes: VecDeque<Report>,
    /// Changes ever made; the number of the newest one in `changes`.
    made: u64,
    streaming: bool,
    overflowed: bool,
    /// Volumes out of service, with the blocks that they had, sorted: nothing is noted of them any more.
    gone: BTreeMap<usize, Vec<i64>>,
}

/// See the module.
pub struct ReplicaMap {
    state: Mutex<State>,
    storage_ids: Vec<String>,
    range_blocks: usize,
    pool: OnceLock<String>,
    changed: Notify,
    sent: watch::Sender<Sent>,
}

/// One range of a full report.
pub struct Range {
    /// The replicas, sorted by id.
    pub replicas: Vec<pb::ReplicaReport>,
    /// The last id looked at; `None`: this is the end of the storage.
    pub more_after: Option<i64>,
}

/// What the report stream takes at once.
pub struct Changes {
    /// In order.
    pub reports: Vec<Report>,
    /// Number of the last of them, for [`ReplicaMap::mark_sent`].
    pub up_to: u64,
    /// Too many waited: a full report must follow.
    pub overflowed: bool,
}

impl ReplicaMap {
    /// An empty map over the volumes with these ids, read in ranges of so many replicas.
    pub fn new(storage_ids: Vec<String>, range_blocks: usize) -> Self {
        let volumes = storage_ids.iter().map(|_| BTreeMap::new()).collect();
        Self {
            state: Mutex::new(State { volumes, ..State::default() }),
            storage_ids,
            range_blocks: range_blocks.clamp(1, RANGE_LIMIT),
            pool: OnceLock::new(),
            changed: Notify::new(),
            sent: watch::channel(Sent::default()).0,
        }
    }

    /// Names the block pool, once.
    pub fn set_pool(&self, pool: &str) {
        self.pool.get_or_init(|| pool.to_owned());
    }

    /// The block pool; empty before the first registration.
    pub fn pool(&self) -> &str {
        self.pool.get().map_or("", String::as_str)
    }

    /// Takes what a scan found on a volume.
    pub fn load(&self, volume: usize, replicas: BTreeMap<i64, Entry>) {
        lock(&self.state).volumes[volume] = replicas;
    }

    /// A volume is out of service: its replicas are forgotten, without a report (the heartbeat says it of the whole volume), and its writers
    /// stopped. Returns how many there were.
    pub fn take_out(&self, volume: usize) -> usize {
        let mut state = lock(&self.state);
        if state.gone.contains_key(&volume) {
            return 0;
        }
        let replicas = std::mem::take(&mut state.volumes[volume]);
        state.gone.insert(volume, replicas.keys().copied().collect());
        for id in replicas.keys() {
            state.fences.remove(id);
        }
        drop(state);
        for entry in replicas.values() {
            if let Kind::Writing(open) = &entry.kind {
                open.fence();
            }
        }
        replicas.len()
    }

    /// The volume that had the block when it was taken out of service.
    pub fn given_up(&self, block: BlockId) -> Option<usize> {
        let state = lock(&self.state);
        state.gone.iter().find(|(_, blocks)| blocks.binary_search(&block.0).is_ok()).map(|(volume, _)| *volume)
    }

    /// Finalized replicas of a volume after id `after`, at most `limit`.
    pub fn finalized(&self, volume: usize, after: Option<i64>, limit: usize) -> Vec<(BlockId, Entry)> {
        let state = lock(&self.state);
        let start = after.map_or(Bound::Unbounded, Bound::Excluded);
        let replicas = state.volumes[volume].range((start, Bound::Unbounded));
        let finalized =
            replicas.filter(|(_, entry)| matches!(entry.kind, Kind::Finalized { .. } | Kind::Corrupt { .. }));
        finalized.take(limit).map(|(id, entry)| (BlockId(*id), entry.clone())).collect()
    }

    /// The replica of `block` and its volume.
    pub fn get(&self, block: BlockId) -> Option<(usize, Entry)> {
        let state = lock(&self.state);
        state.find(block).map(|volume| (volume, state.volumes[volume][&block.0].clone()))
    }

    /// Replicas of a volume that were set aside.
    pub fn count_corrupt(&self, volume: usize) -> u64 {
        let state = lock(&self.state);
        state.volumes[volume].values().filter(|entry| matches!(entry.kind, Kind::Corrupt { .. })).count() as u64
    }

    /// Replicas per volume.
    pub fn count(&self, volume: usize) -> u64 {
        lock(&self.state).volumes[volume].len() as u64
    }

    /// Claims a block that this node does not hold. `replaces` may allow an old replica to make room; it is returned.
    pub fn claim_new(
        &self,
        block: BlockId,
        generation: Generation,
        volume: usize,
        replaces: impl FnOnce(&Entry) -> bool,
    ) -> Result<Option<(usize, Entry)>> {
        let mut state = lock(&self.state);
        if state.gone.contains_key(&volume) {
            return Err(Error::new(ErrorCode::Io, "the volume is out of service"));
        }
        let older = match state.find(block) {
            None => None,
            Some(at) => {
                let entry = &state.volumes[at][&block.0];
                if !replaces(entry) {
                    return Err(exists(block, generation, entry));
                }
                state.volumes[at].remove(&block.0).map(|entry| (at, entry))
            }
        };
        state.volumes[volume].insert(block.0, Entry { generation, kind: Kind::Claimed(None) });
        Ok(older)
    }

    /// Claims a block that this node holds, if `check` agrees; returns it as it was.
    pub fn claim(&self, block: BlockId, check: impl FnOnce(&Entry) -> Result<()>) -> Result<(usize, Entry)> {
        lock(&self.state).claim(block, check)
    }

    /// Claims a block to bring it to `generation`, if no newer one has fenced it and `check` agrees; returns it as it was.
    pub fn claim_for(
        &self,
        block: BlockId,
        generation: Generation,
        check: impl FnOnce(&Entry) -> Result<()>,
    ) -> Result<(usize, Entry)> {
        let mut state = lock(&self.state);
        if let Some(fence) = state.fences.get(&block.0).filter(|fence| **fence > generation) {
            return Err(fenced(block, *fence, generation));
        }
        state.claim(block, check)
    }

    /// From now on nobody may go on with the replica under an older generation than this. Returns the replica as it is.
    pub fn fence(&self, block: BlockId, generation: Generation) -> Result<Entry> {
        let mut state = lock(&self.state);
        let volume = state.find(block).ok_or_else(|| not_found(block))?;
        let entry = state.volumes[volume][&block.0].clone();
        let newest = state.fences.get(&block.0).map_or(entry.generation, |fence| entry.generation.max(*fence));
        if newest > generation {
            return Err(fenced(block, newest, generation));
        }
        state.fences.insert(block.0, generation);
        Ok(entry)
    }

    /// Puts a claimed (or written) entry in its new state. With `report` the change goes to the namenode. Returns its number.
    pub fn settle(&self, volume: usize, block: BlockId, entry: Entry, report: bool) -> u64 {
        let mut state = lock(&self.state);
        if state.gone.contains_key(&volume) {
            return state.made;
        }
        if let (true, Some(replica)) = (report, replica_report(block.0, &entry)) {
            let changed = pb::ReplicaChanged {
                storage_id: self.storage_ids[volume].clone(),
                pool: self.pool().to_owned(),
                replica: Some(replica),
                verified: false,
            };
            state.push(Report::Changed(changed));
        }
        if state.fences.get(&block.0).is_some_and(|fence| *fence <= entry.generation) {
            // The generation itself refuses older ones now.
            state.fences.remove(&block.0);
        }
        state.volumes[volume].insert(block.0, entry);
        let made = state.made;
        drop(state);
        self.changed.notify_one();
        made
    }

    /// Forgets a claimed entry. With `report` the namenode is told.
    pub fn forget(&self, volume: usize, block: BlockId, generation: Generation, report: bool) {
        let mut state = lock(&self.state);
        if state.gone.contains_key(&volume) {
            return;
        }
        state.volumes[volume].remove(&block.0);
        state.fences.remove(&block.0);
        if report {
            state.push(Report::Removed(pb::ReplicaRemoved {
                storage_id: self.storage_ids[volume].clone(),
                pool: self.pool().to_owned(),
                id: block.0,
                generation: generation.0,
            }));
        }
        drop(state);
        self.changed.notify_one();
    }

    /// Puts back, in one step, the replica whose place an attempt had taken.
    pub fn restore(&self, volume: usize, block: BlockId, (at, older): (usize, Entry)) {
        let mut state = lock(&self.state);
        state.volumes[volume].remove(&block.0);
        if let Some(replica) = replica_report(block.0, &older) {
            let (storage_id, pool) = (self.storage_ids[at].clone(), self.pool().to_owned());
            // A full report in between did not show it.
            state.push(Report::Changed(pb::ReplicaChanged {
                storage_id,
                pool,
                replica: Some(replica),
                verified: false,
            }));
        }
        state.volumes[at].insert(block.0, older);
        drop(state);
        self.changed.notify_one();
    }

    /// Queues a report that changes no entry.
    pub fn announce(&self, report: Report) {
        lock(&self.state).push(report);
        self.changed.notify_one();
    }

    /// Reports a replica as it is now, if reports show it. `verified`: all of it was just read and is right.
    pub fn announce_replica(&self, block: BlockId, verified: bool) {
        let mut state = lock(&self.state);
        let Some(volume) = state.find(block) else { return };
        // A report without a replica would end the stream.
        let Some(replica) = replica_report(block.0, &state.volumes[volume][&block.0]) else { return };
        let (storage_id, pool) = (self.storage_ids[volume].clone(), self.pool().to_owned());
        state.push(Report::Changed(pb::ReplicaChanged { storage_id, pool, replica: Some(replica), verified }));
        drop(state);
        self.changed.notify_one();
    }

    /// A new report stream starts: what waited is superseded by the full report that follows.
    pub fn begin_stream(&self) {
        let mut state = lock(&self.state);
        state.changes.clear();
        state.overflowed = false;
        state.streaming = true;
        self.sent.send_replace(Sent { streaming: true, up_to: state.made });
    }

    /// The report stream ended.
    pub fn end_stream(&self) {
        let mut state = lock(&self.state);
        state.changes.clear();
        state.streaming = false;
        self.sent.send_replace(Sent { streaming: false, up_to: state.made });
    }

    /// Takes waiting changes, at most `limit`.
    pub fn take_changes(&self, limit: usize) -> Changes {
        let mut state = lock(&self.state);
        let take = state.changes.len().min(limit);
        let reports = state.changes.drain(..take).collect();
        let overflowed = std::mem::take(&mut state.overflowed);
        Changes { reports, up_to: state.made - state.changes.len() as u64, overflowed }
    }

    /// Waits until something may be waiting.
    pub async fn wait_change(&self) {
        self.changed.notified().await;
    }

    /// Changes up to this number were handed to the stream.
    pub fn mark_sent(&self, up_to: u64) {
        self.sent.send_modify(|sent| sent.up_to = sent.up_to.max(up_to));
    }

    /// Waits until change `number` was handed to the stream, there is no stream, or `limit` passed (a slow namenode must not stop writers).
    pub async fn wait_sent(&self, clock: &Clock, number: u64, limit: Duration) {
        let mut sent = self.sent.subscribe();
        let done = sent.wait_for(|sent| !sent.streaming || sent.up_to >= number);
        let _ = clock.timeout(limit, done).await;
    }

    /// Replicas of a volume after id `after`, as many as a range may have, from the live map.
    pub fn range(&self, volume: usize, after: Option<i64>) -> Range {
        let state = lock(&self.state);
        let start = after.map_or(Bound::Unbounded, Bound::Excluded);
        let mut replicas = Vec::new();
        for (id, entry) in state.volumes[volume].range((start, Bound::Unbounded)) {
            if replicas.len() == self.range_blocks {
                let more_after = replicas.last().map(|last: &pb::ReplicaReport| last.id);
                return Range { replicas, more_after };
            }
            replicas.extend(replica_report(*id, entry));
        }
        Range { replicas, more_after: None }
    }

    /// All open replicas, to be told of a shutdown.
    pub fn open_replicas(&self) -> Vec<Arc<OpenReplica>> {
        let state = lock(&self.state);
        let all = state.volumes.iter().flat_map(BTreeMap::values);
        all.filter_map(|entry| if let Kind::Writing(open) = &entry.kind { Some(Arc::clone(open)) } else { None })
            .collect()
    }
}

impl State {
    fn find(&self, block: BlockId) -> Option<usize> {
        self.volumes.iter().position(|replicas| replicas.contains_key(&block.0))
    }

    fn claim(&mut self, block: BlockId, check: impl FnOnce(&Entry) -> Result<()>) -> Result<(usize, Entry)> {
        let volume = self.find(block).ok_or_else(|| not_found(block))?;
        let Some(entry) = self.volumes[volume].get_mut(&block.0) else { return Err(not_found(block)) };
        if matches!(entry.kind, Kind::Claimed(_)) {
            return Err(Error::new(ErrorCode::Busy, format!("block {block} is being changed: ask again")));
        }
        check(entry)?;
        let claimed = Entry { generation: entry.generation, kind: Kind::Claimed(entry.kind.shown()) };
        Ok((volume, std::mem::replace(entry, claimed)))
    }

    fn push(&mut self, report: Report) {
        self.made += 1;
        if !self.streaming {
            return;
        }
        if self.changes.len() >= MAX_WAITING_CHANGES {
            self.changes.clear();
            self.overflowed = true;
            return;
        }
        self.changes.push_back(report);
    }
}

fn replica_report(id: i64, entry: &Entry) -> Option<pb::ReplicaReport> {
    let (state, length) = entry.kind.shown()?;
    Some(pb::ReplicaReport { id, generation: entry.generation.0, length, state: state as i32 })
}

/// This node has no replica of the block.
pub fn not_found(block: BlockId) -> Error {
    Error::new(ErrorCode::BlockNotFound, format!("this datanode holds no replica of block {block}"))
        .with_subject(block.to_string())
}

fn fenced(block: BlockId, newest: Generation, asked: Generation) -> Error {
    let text = format!("block {block} was fenced with generation {newest} here, newer than {asked}");
    Error::new(ErrorCode::StaleGeneration, text).with_subject(block.to_string())
}

fn exists(block: BlockId, generation: Generation, entry: &Entry) -> Error {
    if entry.generation > generation {
        let text = format!("block {block} has generation {} here, newer than {generation}", entry.generation);
        return Error::new(ErrorCode::StaleGeneration, text).with_subject(block.to_string());
    }
    if matches!(entry.kind, Kind::Claimed(_)) {
        return Error::new(ErrorCode::Busy, format!("block {block} is being changed: ask again"));
    }
    let text = format!("this datanode has a replica of block {block} already (generation {})", entry.generation);
    Error::new(ErrorCode::FileAlreadyExists, text).with_subject(block.to_string())
}

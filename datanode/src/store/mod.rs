//! Block files on volumes, the replica map, the recovery scan.
//!
//! # Overview
//! [`BlockStore`] owns the volumes and the [`map::ReplicaMap`]. Every change of a replica is: claim its entry in the map, do the I/O off the async
//! threads, settle the entry. No lock is held over I/O.
//!
//! # Consistency
//! A finalized file never changes; a new generation is a new name. A file that does not verify is set aside, reported, and never served.
//!
//! # Crash
//! At start a listing tells all finalized replicas; open ones are cut to their last whole, valid frame; copies under way are removed.
//!
//! # Cancellation
//! The async methods that change replicas must be driven to their end (run them in a task of their own), or a claim stays.

pub mod cache;
#[cfg(test)]
mod crash_tests;
pub mod health;
#[cfg(test)]
mod health_tests;
pub mod map;
mod open;
pub mod ops;
pub mod quarantine;
pub mod rewrite;
pub mod scan;
#[cfg(test)]
mod scan_tests;
#[cfg(test)]
mod tests;
pub mod verify;
pub mod version;
pub mod volume;
pub mod writer;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cairn_common::Env;
use cairn_common::durable::File;
use cairn_proto::blockfile::BlockIndex;
use cairn_proto::ids::{BlockId, Generation};
use cairn_proto::pb;
use cairn_proto::{Error, ErrorCode, Result};
use tokio::sync::{Notify, watch};

use self::cache::{Cached, IndexCache};
use self::health::Suspects;
use self::map::{Entry, Kind, ReplicaMap, not_found};
use self::scan::OpenError;
use self::version::Version;
use self::volume::Volume;
use crate::settings::DatanodeSettings;

/// Index entries (16 bytes) kept in memory: 4 MiB, enough for 500 blocks of 128 MiB.
const INDEX_CACHE_ENTRIES: u64 = 256 << 10;

/// Locks a mutex; a panic of another holder does not spread.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Who this node is, as its volumes say.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Identity {
    /// The datanode.
    pub node_id: String,
    /// Empty until the first registration.
    pub cluster_id: String,
    /// Empty until the first registration.
    pub pool_id: String,
    /// Highest epoch seen.
    pub epoch: u64,
}

/// See the module.
pub struct BlockStore {
    env: Env,
    volumes: Vec<Volume>,
    versions: Mutex<Vec<Version>>,
    map: ReplicaMap,
    cache: IndexCache,
    next_volume: AtomicUsize,
    /// Told when a volume fails.
    failures: Arc<Notify>,
    /// Folders that could not be opened at start, and why.
    left_out: Vec<(PathBuf, String)>,
    suspects: Suspects,
    /// The highest epoch that was heard of, durable or not yet.
    heard_epoch: watch::Sender<u64>,
}

/// A replica opened for reading.
pub struct Readable {
    /// The file.
    pub file: Arc<dyn File>,
    /// What is in it.
    pub index: Arc<BlockIndex>,
    /// Bytes that may be read.
    pub length: u64,
    /// Bytes on disk.
    pub stored: u64,
    /// Its generation.
    pub generation: Generation,
    /// Its state.
    pub state: pb::ReplicaState,
    /// Not finalized, and found so at a start; see [`Kind::Recovering`].
    pub found_at_start: bool,
    /// The volume's id.
    pub storage_id: String,
}

impl BlockStore {
    /// Locks and reads the volumes; makes new ones. If they belong to a cluster already, scans them.
    pub async fn open(env: &Env, settings: &DatanodeSettings) -> Result<Arc<Self>> {
        let (scan_env, settings) = (env.clone(), settings.clone());
        let range_blocks = settings.report_range_blocks;
        let failures = Arc::new(Notify::new());
        let told = Arc::clone(&failures);
        let open::OpenVolumes { volumes, versions, left_out } =
            env.work.io(move || open::open_volumes(&scan_env, &settings, &told)).await?;
        let storage_ids = volumes.iter().map(|volume| volume.storage_id().to_owned()).collect();
        let store = Arc::new(Self {
            env: env.clone(),
            volumes,
            versions: Mutex::new(versions),
            map: ReplicaMap::new(storage_ids, range_blocks),
            cache: IndexCache::new(INDEX_CACHE_ENTRIES),
            next_volume: AtomicUsize::new(0),
            failures,
            left_out,
            suspects: Suspects::default(),
            heard_epoch: watch::channel(0).0,
        });
        let Identity { pool_id: pool, epoch, .. } = store.identity();
        store.heard_epoch.send_replace(epoch);
        if !pool.is_empty() {
            store.load_pool(&pool).await?;
        }
        Ok(store)
    }

    /// The machine.
    pub fn env(&self) -> &Env {
        &self.env
    }

    /// The replica map.
    pub fn map(&self) -> &ReplicaMap {
        &self.map
    }

    /// A volume by its index.
    pub fn volume(&self, index: usize) -> &Volume {
        &self.volumes[index]
    }

    /// All volumes.
    pub fn volumes(&self) -> &[Volume] {
        &self.volumes
    }

    /// Who this node is.
    pub fn identity(&self) -> Identity {
        let versions = lock(&self.versions);
        let highest = versions.iter().map(|version| version.epoch).max().unwrap_or(0);
        let first = &versions[0];
        Identity {
            node_id: first.node_id.clone(),
            cluster_id: first.cluster_id.clone(),
            pool_id: first.pool_id.clone(),
            epoch: highest,
        }
    }

    /// Notes the cluster that this node joined, or a higher epoch: durable on every volume when this returns.
    pub async fn join_cluster(self: &Arc<Self>, cluster_id: &str, pool_id: &str, epoch: u64) -> Result<()> {
        let mine = self.identity();
        for (what, mine, theirs) in [("cluster", &mine.cluster_id, cluster_id), ("block pool", &mine.pool_id, pool_id)]
        {
            if !mine.is_empty() && mine != theirs {
                let text = format!(
                    "{} belongs to {what} {mine}, but the namenode serves {what} {theirs}: \
                     give the right namenode or another --dir",
                    self.volumes[0].root().display()
                );
                return Err(Error::new(ErrorCode::WrongCluster, text).with_subject(theirs));
            }
        }
        if epoch < mine.epoch {
            let text =
                format!("the namenode has epoch {epoch}, but this datanode has seen {}: it is an old one", mine.epoch);
            return Err(Error::new(ErrorCode::StaleEpoch, text));
        }
        // From here on no order of an older epoch is begun.
        self.heard_epoch.send_if_modified(|heard| std::mem::replace(heard, epoch.max(*heard)) < epoch);
        // A crash may have come between the writing of one volume and the next.
        if lock(&self.versions).iter().all(|version| version.is_joined() && version.epoch == epoch) {
            return Ok(());
        }
        let store = Arc::clone(self);
        let (cluster_id, pool) = (cluster_id.to_owned(), pool_id.to_owned());
        self.env
            .work
            .io(move || {
                let mut versions = lock(&store.versions).clone();
                let mut last = None;
                for (volume, version) in store.volumes.iter().zip(&mut versions) {
                    version.cluster_id.clone_from(&cluster_id);
                    version.pool_id.clone_from(&pool);
                    version.epoch = epoch;
                    if volume.is_failed() {
                        continue;
                    }
                    let written = volume.open_pool(&pool).and_then(|()| version.write(&*store.env.fs, volume.root()));
                    if let Err(error) = written {
                        if error.code() != ErrorCode::Io {
                            return Err(error);
                        }
                        // The others carry the node.
                        volume.fail(error.message().to_owned());
                        last = Some(error);
                    }
                }
                *lock(&store.versions) = versions;
                match last {
                    Some(error) if store.volumes.iter().all(Volume::is_failed) => Err(error),
                    _ => Ok(()),
                }
            })
            .await?;
        self.map.set_pool(pool_id);
        Ok(())
    }

    /// An error if a newer epoch than that of an order was heard of: what a namenode ordered before a restore is void after it.
    pub(crate) fn check_epoch(&self, epoch: u64) -> Result<()> {
        let heard = *self.heard_epoch.borrow();
        if epoch >= heard {
            return Ok(());
        }
        Err(Error::new(ErrorCode::StaleEpoch, format!("the order is of epoch {epoch}; epoch {heard} is in force")))
    }

    /// Resolves when a newer epoch than this is heard of.
    pub(crate) async fn outdated(&self, epoch: u64) {
        let mut heard = self.heard_epoch.subscribe();
        let _ = heard.wait_for(|heard| *heard > epoch).await;
    }

    async fn load_pool(self: &Arc<Self>, pool: &str) -> Result<()> {
        self.map.set_pool(pool);
        let scan = |index: usize| {
            let (store, pool) = (Arc::clone(self), pool.to_owned());
            self.env.work.io(move || {
                let volume = &store.volumes[index];
                let scanned = volume
                    .open_pool(&pool)
                    .and_then(|()| scan::scan_volume(&*store.env.fs, volume, index).map(|found| found.replicas));
                match scanned {
                    Err(error) if error.code() == ErrorCode::Io => {
                        // The node goes on with its other volumes.
                        volume.fail(error.message().to_owned());
                        Ok(std::collections::BTreeMap::new())
                    }
                    scanned => scanned,
                }
            })
        };
        let scans = futures_util::future::join_all((0..self.volumes.len()).map(scan)).await;
        let mut found = scans.into_iter().collect::<Result<Vec<_>>>()?;
        let obsolete = self.drop_duplicates(&mut found);
        for (index, replicas) in found.into_iter().enumerate() {
            self.map.load(index, replicas);
        }
        let store = Arc::clone(self);
        let unlink = move || obsolete.iter().for_each(|(volume, block, entry)| store.unlink(*volume, *block, entry));
        self.env.work.io(unlink).await;
        Ok(())
    }

    /// A block on two volumes: the better replica is served. The other one is left alone (a volume was added from another machine, say), unless
    /// its generation is over: those are returned, to be removed. (The copy that takes a replica's place may lie on another volume than that,
    /// and a crash comes between.)
    fn drop_duplicates(&self, found: &mut [std::collections::BTreeMap<i64, Entry>]) -> Vec<(usize, BlockId, Entry)> {
        let mut obsolete = Vec::new();
        for second in 1..found.len() {
            let (before, rest) = found.split_at_mut(second);
            let Some(later) = rest.first_mut() else { break };
            for (first, earlier) in before.iter_mut().enumerate() {
                let common: Vec<i64> = later.keys().filter(|id| earlier.contains_key(id)).copied().collect();
                for id in common {
                    let rank = |entry: &Entry| scan::rank(entry.generation, &entry.kind);
                    let later_wins = rank(&later[&id]) > rank(&earlier[&id]);
                    tracing::warn!("block {id} lies on two volumes; the older replica is not served");
                    let (volume, loser, winner) = if later_wins {
                        (first, earlier.remove(&id), later.get(&id))
                    } else {
                        (second, later.remove(&id), earlier.get(&id))
                    };
                    let (Some(loser), Some(winner)) = (loser, winner) else { continue };
                    if !matches!(winner.kind, Kind::Corrupt { .. }) && loser.generation < winner.generation {
                        obsolete.push((volume, BlockId(id), loser));
                    }
                }
            }
        }
        obsolete
    }

    /// Opens a replica for reading. `generation` is the least that the reader accepts.
    pub async fn read(self: &Arc<Self>, block: BlockId, generation: Generation) -> Result<Readable> {
        // A replica may get a new name between the look at the map and the opening.
        let mut last = None;
        for _ in 0..3 {
            let (volume, entry) = self.map.get(block).ok_or_else(|| not_found(block))?;
            if entry.generation < generation {
                return Err(stale(block, entry.generation, generation));
            }
            match &entry.kind {
                Kind::Finalized { length, .. } => {
                    match self.read_finalized(block, volume, entry.generation, *length).await {
                        Err(error) if error.code() == ErrorCode::BlockNotFound => last = Some(error),
                        other => return other,
                    }
                }
                Kind::Writing(open) if !open.temporary() => {
                    let length = open.visible();
                    let (file, index) = open.snapshot();
                    let state = pb::ReplicaState::BeingWritten;
                    let readable = self.readable(volume, entry.generation, file, Arc::new(index), length, state);
                    return Ok(Readable { found_at_start: open.found_at_start(), ..readable });
                }
                Kind::Recovering { index, found_at_start, .. } => {
                    let readable = self.read_recovering(block, volume, entry.generation, Arc::clone(index)).await;
                    return readable.map(|readable| Readable { found_at_start: *found_at_start, ..readable });
                }
                Kind::Corrupt { path, .. } => return Err(scan::corrupt(path, &"set aside, it did not verify")),
                Kind::Writing(_) => return Err(not_found(block)),
                Kind::Claimed(_) => {
                    return Err(Error::new(ErrorCode::Busy, format!("block {block} is being changed: ask again")));
                }
            }
        }
        Err(last.unwrap_or_else(|| not_found(block)))
    }

    fn readable(
        &self,
        volume: usize,
        generation: Generation,
        file: Arc<dyn File>,
        index: Arc<BlockIndex>,
        length: u64,
        state: pb::ReplicaState,
    ) -> Readable {
        let stored = index.frames_end();
        let storage_id = self.volumes[volume].storage_id().to_owned();
        Readable { file, index, length, stored, generation, state, found_at_start: false, storage_id }
    }

    async fn read_recovering(
        self: &Arc<Self>,
        block: BlockId,
        volume: usize,
        generation: Generation,
        index: Arc<BlockIndex>,
    ) -> Result<Readable> {
        let path = self.volumes[volume].open_path(block, generation, false)?;
        let fs = Arc::clone(&self.env.fs);
        let shown = path.display().to_string();
        let file = self.env.work.io(move || fs.open(&path, cairn_common::durable::OpenMode::Read)).await;
        let file = file.map_err(|error| Error::io(format!("opening {shown}"), &error))?;
        let length = index.data_length();
        Ok(self.readable(volume, generation, file, index, length, pb::ReplicaState::Recovering))
    }

    async fn read_finalized(
        self: &Arc<Self>,
        block: BlockId,
        volume: usize,
        generation: Generation,
        length: u64,
    ) -> Result<Readable> {
        let path = self.volumes[volume].finalized_path(block, generation, length)?;
        let (fs, cached, at) = (Arc::clone(&self.env.fs), self.cache.get(block, generation), path.clone());
        let opened = self.env.work.io(move || open_with_cache(&*fs, &at, block, length, cached)).await;
        match opened {
            Ok((file, cached)) => {
                self.cache.put(block, generation, cached.clone());
                let state = pb::ReplicaState::Finalized;
                let mut readable = self.readable(volume, generation, file, cached.index, length, state);
                readable.stored = cached.stored;
                Ok(readable)
            }
            Err(OpenError::Io(error)) if error.kind() == io::ErrorKind::NotFound => {
                self.file_is_gone(block, generation, &path);
                Err(not_found(block))
            }
            Err(OpenError::Io(error)) if error.kind() != io::ErrorKind::UnexpectedEof => {
                let told = self.volumes[volume].read_failed(format!("reading {}", path.display()), &error);
                // Whether the replica or the whole disk cannot be read is for a check to find out.
                self.suspect(block);
                Err(told.with_subject(block.to_string()))
            }
            Err(flaw) => {
                let error = scan::corrupt(&path, &flaw);
                self.set_aside(block, generation, flaw.to_string()).await;
                Err(error)
            }
        }
    }

    /// Somebody removed a finalized file behind our back (unless it was renamed just now).
    fn file_is_gone(&self, block: BlockId, generation: Generation, path: &Path) {
        self.give_up_if_gone(block, generation, path);
    }

    /// Gives a replica up whose file is not there any more; blocking. `true`: so it was.
    pub(crate) fn give_up_if_gone(&self, block: BlockId, generation: Generation, path: &Path) -> bool {
        let still_there = |entry: &Entry| match entry.kind {
            Kind::Finalized { .. } if entry.generation == generation => Ok(()),
            _ => Err(not_found(block)),
        };
        if let Ok((volume, entry)) = self.map.claim(block, still_there) {
            // The look at the map and the rename are not one step: only a claim excludes the rename.
            if !matches!(self.env.fs.metadata(path), Ok(None)) {
                self.map.settle(volume, block, entry, false);
                return false;
            }
            if self.volumes[volume].is_gone() {
                self.volumes[volume].fail(format!("{} is gone", self.volumes[volume].root().display()));
                self.map.settle(volume, block, entry, false);
                return false;
            }
            tracing::warn!("{} is gone; the replica is given up", path.display());
            if let Kind::Finalized { stored, .. } = entry.kind {
                self.volumes[volume].removed(stored);
            }
            self.map.forget(volume, block, generation, true);
            return true;
        }
        false
    }
}

/// The replica here is older than what was asked for.
pub(crate) fn stale(block: BlockId, here: Generation, asked: Generation) -> Error {
    let text = format!("the replica of block {block} here has generation {here}, older than {asked}");
    Error::new(ErrorCode::StaleGeneration, text).with_subject(block.to_string())
}

fn open_with_cache(
    fs: &dyn cairn_common::durable::Fs,
    path: &Path,
    block: BlockId,
    length: u64,
    cached: Option<Cached>,
) -> Result<(Arc<dyn File>, Cached), OpenError> {
    if let Some(cached) = cached {
        let file = fs.open(path, cairn_common::durable::OpenMode::Read)?;
        // A file cut since it was verified must not be served short.
        if file.len()? == cached.stored {
            return Ok((file, cached));
        }
    }
    let opened = scan::open_finalized(fs, path, block, length)?;
    Ok((opened.file, Cached { index: Arc::new(opened.index), stored: opened.stored }))
}

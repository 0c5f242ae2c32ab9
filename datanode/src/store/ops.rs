//! What changes replicas: creation, recovery, deletion, verification.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use cairn_common::durable::OpenMode;
use cairn_proto::blockfile::{self, BlockIndex, HEADER_BYTES};
use cairn_proto::ids::{BlockId, Generation};
use cairn_proto::{Error, ErrorCode, Result};

use super::map::{Entry, Kind, not_found};
use super::scan::{self, Depth};
use super::volume::RESERVE_STEP;
use super::writer::{Matcher, ReplicaWriter, Start};
use super::{BlockStore, stale};

/// How long a recovery or deletion waits for an older writer to stop.
const FENCE_LIMIT: Duration = Duration::from_secs(10);
/// How long a claim of somebody else is left alone before it is looked at again.
const CLAIM_PAUSE: Duration = Duration::from_millis(20);

/// What to create.
#[derive(Clone, Debug)]
pub struct NewReplica {
    /// The block.
    pub block: BlockId,
    /// Its generation.
    pub generation: Generation,
    /// The volume, if the writer has a wish.
    pub storage_id: String,
    /// Upper bound of its length.
    pub block_size: u64,
    /// A copy of a finalized replica: not seen until it is whole.
    pub temporary: bool,
}

/// What to recover.
#[derive(Clone, Copy, Debug)]
pub struct Recovery {
    /// The block.
    pub block: BlockId,
    /// The generation that the writer knew.
    pub old_generation: Generation,
    /// The one that replaces it.
    pub new_generation: Generation,
    /// Bytes of data that every survivor keeps.
    pub keep_length: u64,
    /// Upper bound of its length.
    pub block_size: u64,
}

/// A replica after recovery.
pub enum Recovered {
    /// It goes on where it was kept.
    Open(ReplicaWriter),
    /// It was finalized already: what is resent must match.
    Finalized(Matcher),
}

impl BlockStore {
    /// Makes a new replica. Nothing is left if it fails.
    pub async fn create(self: &Arc<Self>, new: NewReplica) -> Result<ReplicaWriter> {
        let (temporary, newest) = (new.temporary, new.generation);
        let replaceable = move |entry: &Entry| match entry.kind {
            // A bad or abandoned replica makes room for a good copy, once that is whole.
            Kind::Corrupt { .. } | Kind::Recovering { .. } => temporary && entry.generation <= newest,
            _ => false,
        };
        self.create_replacing(new, replaceable).await
    }

    /// Makes the copy with which this node joins a pipeline. What is left here of the block from an older generation, of which this node was
    /// left out, makes room once the copy is whole.
    pub async fn create_partial(self: &Arc<Self>, new: NewReplica) -> Result<ReplicaWriter> {
        let newest = new.generation;
        let replaceable = move |entry: &Entry| {
            !matches!(entry.kind, Kind::Writing(_) | Kind::Claimed(_)) && entry.generation < newest
        };
        self.create_replacing(new, replaceable).await
    }

    async fn create_replacing(
        self: &Arc<Self>,
        new: NewReplica,
        replaceable: impl Fn(&Entry) -> bool,
    ) -> Result<ReplicaWriter> {
        let reserved = RESERVE_STEP.min(new.block_size.max(1) + (64 << 10));
        let mut last = None;
        for volume in self.volumes_for(&new.storage_id)? {
            let created = match self.volumes[volume].reserve(reserved) {
                Ok(()) => self.create_on(volume, &new, reserved, &replaceable).await,
                Err(full) => Err(full),
            };
            match created {
                // Another volume may have room, or a disk that works.
                Err(error) if error.code() == ErrorCode::DiskFull || self.volumes[volume].is_failed() => {
                    last.get_or_insert(error);
                }
                created => return created,
            }
        }
        Err(last.unwrap_or_else(|| Error::new(ErrorCode::DiskFull, "no volume of this datanode is in service")))
    }

    /// Makes a new replica on one volume, on which `reserved` bytes were promised; on failure they are given back.
    async fn create_on(
        self: &Arc<Self>,
        volume: usize,
        new: &NewReplica,
        reserved: u64,
        replaceable: &impl Fn(&Entry) -> bool,
    ) -> Result<ReplicaWriter> {
        let older = match self.map.claim_new(new.block, new.generation, volume, replaceable) {
            Ok(older) => older,
            Err(error) => {
                self.volumes[volume].release(reserved);
                return Err(error);
            }
        };
        let (store, block, generation, temporary) = (Arc::clone(self), new.block, new.generation, new.temporary);
        let expected = new.block_size;
        self.env
            .work
            .io(move || match store.make_open_file(volume, block, generation, temporary) {
                Ok((path, file)) => {
                    let header_bytes = HEADER_BYTES as u64;
                    let index = BlockIndex::new(header_bytes);
                    store.volumes[volume].wrote(header_bytes, 0);
                    Ok(ReplicaWriter::attach(
                        &store,
                        Start {
                            block,
                            generation,
                            volume,
                            temporary,
                            path,
                            file,
                            header_bytes,
                            found_at_start: false,
                            index,
                            reserved,
                            expected,
                            name_durable: false,
                            replaces: older,
                        },
                    ))
                }
                Err(error) => {
                    store.volumes[volume].release(reserved);
                    match older {
                        Some(older) => store.map.restore(volume, block, older),
                        None => store.map.forget(volume, block, generation, false),
                    }
                    Err(error)
                }
            })
            .await
    }

    fn make_open_file(
        &self,
        volume: usize,
        block: BlockId,
        generation: Generation,
        temporary: bool,
    ) -> Result<(PathBuf, Arc<dyn cairn_common::durable::File>)> {
        let path = self.volumes[volume].open_path(block, generation, temporary)?;
        let failed = |error: io::Error| self.volumes[volume].failed(format!("creating {}", path.display()), &error);
        // A leftover of this very name is not in the map, so nobody needs it.
        if self.env.fs.metadata(&path).map_err(failed)?.is_some() {
            self.env.fs.remove_file(&path).map_err(failed)?;
        }
        let file = self.env.fs.open(&path, OpenMode::Create).map_err(failed)?;
        if let Err(error) = file.write_all_at(&blockfile::encode_header(block), 0) {
            let _ = self.env.fs.remove_file(&path);
            return Err(failed(error));
        }
        Ok((path, file))
    }

    /// Brings a replica to `keep_length` under the new generation, after any older writer has stopped.
    pub async fn recover(self: &Arc<Self>, recovery: Recovery) -> Result<Recovered> {
        let Recovery { block, old_generation, new_generation, keep_length, .. } = recovery;
        if new_generation < old_generation {
            let text = format!("block {block}: the new generation {new_generation} is older than {old_generation}");
            return Err(Error::new(ErrorCode::InvalidArgument, text));
        }
        let check = |entry: &Entry| {
            if entry.generation > new_generation {
                let text =
                    format!("block {block} has generation {} here, newer than {new_generation}", entry.generation);
                return Err(Error::new(ErrorCode::StaleGeneration, text).with_subject(block.to_string()));
            }
            if entry.generation < old_generation {
                return Err(stale(block, entry.generation, old_generation));
            }
            Ok(())
        };
        let left_out = |(_, entry): (usize, Entry)| (entry.generation < old_generation).then_some(entry.generation);
        if keep_length == 0
            && let Some(stale) = self.map.get(block).and_then(left_out)
        {
            // This node was left out of the pipeline before and joins it again, and nothing of the block was ever acked.
            match self.delete(block, stale, "").await {
                Err(error) if error.code() != ErrorCode::BlockNotFound => return Err(error),
                _ => {}
            }
        }
        if keep_length == 0 && self.map.get(block).is_none() {
            // It held nothing when its writer left, so nothing was kept of it.
            let new = NewReplica {
                block,
                generation: new_generation,
                storage_id: String::new(),
                block_size: recovery.block_size,
                temporary: false,
            };
            return self.create(new).await.map(Recovered::Open);
        }
        self.stop_writer(block, check).await?;
        let (volume, entry) = self.map.claim_for(block, new_generation, |entry| {
            check(entry)?;
            match &entry.kind {
                Kind::Writing(_) => Err(Error::new(ErrorCode::Busy, format!("block {block} got another writer"))),
                Kind::Corrupt { path, .. } => Err(scan::corrupt(path, &"set aside, it did not verify")),
                _ => Ok(()),
            }
        })?;
        let store = Arc::clone(self);
        self.env
            .work
            .io(move || match entry.kind.clone() {
                Kind::Finalized { length, stored } => {
                    store.renew_finalized(volume, &entry, recovery, length, stored).map(Recovered::Finalized)
                }
                Kind::Recovering { .. } => store.reopen(volume, &entry, recovery).map(Recovered::Open),
                _ => {
                    store.map.settle(volume, block, entry, false);
                    Err(not_found(block))
                }
            })
            .await
    }

    /// Stops the replica's writer; from then on nobody may go on with it under an older generation than this. Its length stays.
    pub async fn fence(&self, block: BlockId, generation: Generation) -> Result<()> {
        let limit_ms = self.env.clock.mono_ms() + FENCE_LIMIT.as_millis() as u64;
        loop {
            match self.map.fence(block, generation)?.kind {
                Kind::Writing(open) => {
                    open.fence();
                    return open.wait_ended(&self.env.clock, FENCE_LIMIT).await;
                }
                // Somebody who came before the fence may be about to attach a writer.
                Kind::Claimed(_) if self.env.clock.mono_ms() < limit_ms => self.env.clock.sleep(CLAIM_PAUSE).await,
                Kind::Claimed(_) => {
                    return Err(Error::new(ErrorCode::Busy, format!("block {block} is being changed: ask again")));
                }
                _ => return Ok(()),
            }
        }
    }

    /// Stops the writer of a block, if there is one, and waits until it is gone.
    async fn stop_writer(&self, block: BlockId, check: impl Fn(&Entry) -> Result<()>) -> Result<()> {
        let (_, entry) = self.map.get(block).ok_or_else(|| not_found(block))?;
        check(&entry)?;
        if let Kind::Writing(open) = entry.kind {
            open.fence();
            open.wait_ended(&self.env.clock, FENCE_LIMIT).await?;
        }
        Ok(())
    }

    fn renew_finalized(
        &self,
        volume: usize,
        entry: &Entry,
        recovery: Recovery,
        length: u64,
        stored: u64,
    ) -> Result<Matcher> {
        let Recovery { block, new_generation, keep_length, .. } = recovery;
        let back = |error: Error| {
            self.map.settle(volume, block, entry.clone(), false);
            error
        };
        if keep_length > length {
            return Err(back(too_short(block, length, keep_length)));
        }
        let storage = &self.volumes[volume];
        let path = storage.finalized_path(block, entry.generation, length).map_err(back)?;
        let opened = scan::open_finalized(&*self.env.fs, &path, block, length).map_err(|flaw| {
            let error = back(scan::corrupt(&path, &flaw));
            self.suspect(block);
            error
        })?;
        let end = opened.index.frames_end();
        let walk = scan::walk(&*opened.file, block, opened.header_bytes, end, keep_length, Depth::Headers);
        let walk = walk.map_err(|error| back(Error::io(path.display(), &error)))?;
        if walk.index.data_length() != keep_length {
            return Err(back(not_a_boundary(block, keep_length)));
        }
        let (mut path, mut durable) = (path, Ok(()));
        if entry.generation != new_generation {
            path = storage.rename_to_final(&path, block, new_generation, length).map_err(back)?;
            durable = storage.sync_final(block);
        }
        self.cache.remove(block, entry.generation);
        let renewed = Entry { generation: new_generation, kind: Kind::Finalized { length, stored } };
        // The map follows the name that the file has, even if a power cut may still take it back.
        let reported = self.map.settle(volume, block, renewed, durable.is_ok());
        durable?;
        Ok(Matcher::new(block, &path, opened.file, length, &walk.index, reported, storage.storage_id()))
    }

    fn reopen(self: &Arc<Self>, volume: usize, entry: &Entry, recovery: Recovery) -> Result<ReplicaWriter> {
        let Recovery { block, new_generation, keep_length, block_size, .. } = recovery;
        let Kind::Recovering { index, header_bytes, found_at_start } = entry.kind.clone() else {
            return Err(not_found(block));
        };
        let back = |error: Error| {
            self.map.settle(volume, block, entry.clone(), false);
            error
        };
        if keep_length > index.data_length() {
            return Err(back(too_short(block, index.data_length(), keep_length)));
        }
        let storage = &self.volumes[volume];
        let path = storage.open_path(block, entry.generation, false).map_err(back)?;
        let failed = |error: io::Error| storage.failed(format!("recovering {}", path.display()), &error);
        let file = self.env.fs.open(&path, OpenMode::Write).map_err(|error| back(failed(error)))?;
        let walk = scan::walk(&*file, block, header_bytes, index.frames_end(), keep_length, Depth::Headers);
        let kept = walk.map_err(|error| back(failed(error)))?.index;
        if kept.data_length() != keep_length {
            return Err(back(not_a_boundary(block, keep_length)));
        }
        file.set_len(kept.frames_end()).map_err(|error| back(failed(error)))?;
        storage.removed(index.frames_end().saturating_sub(kept.frames_end()));
        let left = |generation: Generation, error: Error| {
            let kind = Kind::Recovering { index: Arc::new(kept.clone()), header_bytes, found_at_start };
            self.map.settle(volume, block, Entry { generation, kind }, false);
            error
        };
        let renamed = self.rename_open(&path, volume, block, new_generation);
        let path = renamed.map_err(|error| left(entry.generation, error))?;
        // The new generation must outlive a crash, or an old writer could come back.
        if let Some(folder) = path.parent() {
            storage.sync_folder(folder).map_err(|error| left(new_generation, error))?;
        }
        let start = Start {
            block,
            generation: new_generation,
            volume,
            temporary: false,
            path,
            file,
            header_bytes,
            found_at_start,
            index: kept,
            reserved: 0,
            expected: block_size,
            name_durable: true,
            replaces: None,
        };
        Ok(ReplicaWriter::attach(self, start))
    }

    /// Gives an open replica's file the name of its new generation. An error: it has its old one.
    fn rename_open(&self, from: &Path, volume: usize, block: BlockId, generation: Generation) -> Result<PathBuf> {
        let to = self.volumes[volume].open_path(block, generation, false)?;
        if to != from {
            let renamed = self.env.fs.rename(from, &to);
            let doing = format!("renaming {}", from.display());
            renamed.map_err(|error| self.volumes[volume].failed(doing, &error))?;
        }
        Ok(to)
    }

    /// Deletes a replica unless it has a newer generation. A writer is stopped first.
    pub async fn delete(self: &Arc<Self>, block: BlockId, generation: Generation, storage_id: &str) -> Result<()> {
        self.delete_by_order(block, generation, storage_id, u64::MAX).await
    }

    /// As [`Self::delete`], by an order of this epoch: refused once a newer one was heard of.
    pub async fn delete_by_order(
        self: &Arc<Self>,
        block: BlockId,
        generation: Generation,
        storage_id: &str,
        epoch: u64,
    ) -> Result<()> {
        let (volume, entry) = self.claim_for_removal(block, generation, storage_id, epoch).await?;
        let store = Arc::clone(self);
        self.env
            .work
            .io(move || {
                store.unlink(volume, block, &entry);
                // Only now: a copy that comes back must not meet the old file of the same name.
                store.map.forget(volume, block, entry.generation, true);
            })
            .await;
        Ok(())
    }

    /// Claims a replica that shall go, unless it has a newer generation than the order names, or the order is of an older epoch than was heard of.
    /// A writer is stopped first.
    pub(super) async fn claim_for_removal(
        &self,
        block: BlockId,
        generation: Generation,
        storage_id: &str,
        epoch: u64,
    ) -> Result<(usize, Entry)> {
        let check = |entry: &Entry| {
            if entry.generation > generation {
                let text =
                    format!("block {block} has generation {} here, newer than {generation}: kept", entry.generation);
                return Err(Error::new(ErrorCode::StaleGeneration, text).with_subject(block.to_string()));
            }
            Ok(())
        };
        let (volume, _) = self.map.get(block).ok_or_else(|| not_found(block))?;
        if !storage_id.is_empty() && self.volumes[volume].storage_id() != storage_id {
            return Err(not_found(block));
        }
        self.check_epoch(epoch)?;
        self.stop_writer(block, check).await?;
        self.map.claim(block, |entry| {
            // Again: the writer may have taken long to stop.
            self.check_epoch(epoch)?;
            check(entry)?;
            match entry.kind {
                Kind::Writing(_) => Err(Error::new(ErrorCode::Busy, format!("block {block} got another writer"))),
                _ => Ok(()),
            }
        })
    }

    /// Where the file of an entry lies that is claimed or out of the map, and its size.
    pub(super) fn file_of(&self, volume: usize, block: BlockId, entry: &Entry) -> Option<(PathBuf, u64)> {
        let storage = &self.volumes[volume];
        let (path, bytes) = match &entry.kind {
            Kind::Finalized { length, stored } => (storage.finalized_path(block, entry.generation, *length), *stored),
            Kind::Recovering { index, .. } => (storage.open_path(block, entry.generation, false), index.frames_end()),
            Kind::Corrupt { path, stored, .. } => (Ok(path.clone()), *stored),
            Kind::Writing(_) | Kind::Claimed(_) => return None,
        };
        path.ok().map(|path| (path, bytes))
    }

    /// Removes the file of an entry that is claimed or out of the map.
    pub(super) fn unlink(&self, volume: usize, block: BlockId, entry: &Entry) {
        let storage = &self.volumes[volume];
        let Some((path, bytes)) = self.file_of(volume, block, entry) else { return };
        self.cache.remove(block, entry.generation);
        match self.env.fs.remove_file(&path) {
            Ok(()) => storage.removed(bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => storage.removed(bytes),
            Err(error) => tracing::warn!("{} could not be removed: {error}", path.display()),
        }
    }

    /// Takes a replica that does not verify out of service: moved aside, reported, never served again.
    pub async fn set_aside(self: &Arc<Self>, block: BlockId, generation: Generation, why: String) {
        let same = |entry: &Entry| match entry.kind {
            Kind::Finalized { .. } if entry.generation == generation => Ok(()),
            _ => Err(not_found(block)),
        };
        let Ok((volume, entry)) = self.map.claim(block, same) else { return };
        let Kind::Finalized { length, stored } = entry.kind else { return };
        let store = Arc::clone(self);
        self.env
            .work
            .io(move || {
                let storage = &store.volumes[volume];
                let name = blockfile::finalized_name(block, generation, length);
                let moved = storage.finalized_path(block, generation, length).and_then(|from| {
                    let to = storage.corrupt_path(&name)?;
                    tracing::warn!("{} is corrupt ({why}); it is set aside as {}", from.display(), to.display());
                    let renamed = store.env.fs.rename(&from, &to);
                    if let Err(error) = &renamed {
                        tracing::warn!("{} could not be moved: {error}", from.display());
                    } else if let Err(error) = storage.sync_moved(&from, &to) {
                        // It is out of service all the same; should a power cut bring it back, it is found again.
                        tracing::warn!("{}: its move is not durable: {error}", to.display());
                    }
                    Ok(if renamed.is_ok() { to } else { from })
                });
                store.cache.remove(block, generation);
                match moved {
                    Ok(path) => {
                        let kind = Kind::Corrupt { length, stored, path };
                        store.map.settle(volume, block, Entry { generation, kind }, true);
                    }
                    Err(_) => store.map.forget(volume, block, generation, true),
                }
            })
            .await;
    }
}

fn too_short(block: BlockId, have: u64, need: u64) -> Error {
    let text = format!("the replica of block {block} here has {have} bytes, fewer than the {need} to keep");
    Error::new(ErrorCode::Unsupported, text).with_subject(block.to_string())
}

fn not_a_boundary(block: BlockId, keep: u64) -> Error {
    let text = format!("{keep} is not the end of a frame of block {block}");
    Error::new(ErrorCode::InvalidArgument, text).with_subject(block.to_string())
}

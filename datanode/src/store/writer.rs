//! Replicas that are being written, and the check of bytes resent to a finalized one.
//!
//! # Overview
//! [`OpenReplica`] is the shared face of an open replica (readers, reports, whoever fences its writer); [`ReplicaWriter`] is its one
//! writer. Its methods block and run off the async threads, one at a time.
//!
//! # Crash
//! Frames are appended as they come; a crash cuts the file to its last whole, valid frame. [`ReplicaWriter::finalize`] writes index and footer,
//! syncs the data, renames, syncs the folder: only then is the replica called finalized.
//!
//! # What leaks
//! Nothing: a writer that is dropped must be ended by `finalize` or `abandon`; both settle the entry in the replica map and give back reserved room.

use std::io::IoSlice;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use cairn_common::clock::Clock;
use cairn_common::durable::File;
use cairn_proto::blockfile::BlockIndex;
use cairn_proto::frame::{FRAME_HEADER_BYTES, FrameHeader};
use cairn_proto::ids::{BlockId, Generation};
use cairn_proto::{Error, ErrorCode, Result};
use tokio::sync::watch;

use super::map::{Entry, Kind};
use super::volume::{RESERVE_STEP, Volume};
use super::{BlockStore, lock};

/// Write-back of what was written starts every so many bytes: pieces that a disk that seeks writes well.
const WRITE_BACK_STEP: u64 = 8 << 20;
/// Towards the end of the block the pieces become smaller, down to this, so that the sync has little left to wait for.
const LAST_WRITE_BACK: u64 = 1 << 20;

/// Whole, verified frames, back to back.
#[derive(Clone, Debug)]
pub struct Chunk {
    /// The frames as they are on the wire and on disk; wherever they lie in memory.
    pub parts: Vec<Bytes>,
    /// Their headers, in order.
    pub headers: Vec<FrameHeader>,
}

impl Chunk {
    /// Bytes of the frames.
    pub fn bytes(&self) -> usize {
        self.parts.iter().map(Bytes::len).sum()
    }

    /// The parts, to be written by one call.
    pub fn slices(&self) -> impl Iterator<Item = IoSlice<'_>> {
        self.parts.iter().map(|part| IoSlice::new(part))
    }
}

/// An open replica as others see it.
pub struct OpenReplica {
    block: BlockId,
    generation: Generation,
    volume: usize,
    temporary: bool,
    path: PathBuf,
    file: Arc<dyn File>,
    header_bytes: u64,
    found_at_start: bool,
    index: Mutex<BlockIndex>,
    visible: AtomicU64,
    fenced: watch::Sender<bool>,
    ended: watch::Sender<bool>,
}

impl OpenReplica {
    /// A copy that no reader and no report may see.
    pub fn temporary(&self) -> bool {
        self.temporary
    }

    /// It goes on with what a start had found; see [`Kind::Recovering`].
    pub fn found_at_start(&self) -> bool {
        self.found_at_start
    }

    /// Without its writer, with what `index` says.
    fn recovering(&self, index: BlockIndex) -> Kind {
        let (header_bytes, found_at_start) = (self.header_bytes, self.found_at_start);
        Kind::Recovering { index: Arc::new(index), header_bytes, found_at_start }
    }

    /// Bytes that readers may see.
    pub fn visible(&self) -> u64 {
        self.visible.load(Ordering::Acquire)
    }

    /// Readers may see this much now.
    pub fn set_visible(&self, length: u64) {
        self.visible.fetch_max(length, Ordering::AcqRel);
    }

    /// The file, and the index of what is in it now.
    pub fn snapshot(&self) -> (Arc<dyn File>, BlockIndex) {
        (Arc::clone(&self.file), lock(&self.index).clone())
    }

    /// Tells the writer to stop.
    pub fn fence(&self) {
        self.fenced.send_replace(true);
    }

    /// Resolves when the writer was told to stop.
    pub async fn fenced(&self) {
        let mut fenced = self.fenced.subscribe();
        let _ = fenced.wait_for(|fenced| *fenced).await;
    }

    /// The writer is gone and the replica map says what became of the replica.
    pub fn end(&self) {
        self.ended.send_replace(true);
    }

    /// Waits for [`Self::end`].
    pub async fn wait_ended(&self, clock: &Clock, limit: Duration) -> Result<()> {
        let mut ended = self.ended.subscribe();
        let done = ended.wait_for(|ended| *ended);
        match clock.timeout(limit, done).await {
            Ok(_) => Ok(()),
            Err(_) => {
                let text = format!("the writer of block {} did not stop within {limit:?}", self.block);
                Err(Error::new(ErrorCode::Busy, text).with_subject(self.block.to_string()))
            }
        }
    }
}

/// What a new open replica starts from.
pub(super) struct Start {
    pub block: BlockId,
    pub generation: Generation,
    pub volume: usize,
    pub temporary: bool,
    pub path: PathBuf,
    pub file: Arc<dyn File>,
    pub header_bytes: u64,
    /// As in [`Kind::Recovering`].
    pub found_at_start: bool,
    pub index: BlockIndex,
    pub reserved: u64,
    /// How long the block is likely to become.
    pub expected: u64,
    /// Its folder was synced since it got its name.
    pub name_durable: bool,
    /// The replica whose place it takes once it is whole; comes back if it never is.
    pub replaces: Option<(usize, Entry)>,
}

/// The one writer of an open replica.
pub struct ReplicaWriter {
    store: Arc<BlockStore>,
    open: Arc<OpenReplica>,
    reserved: u64,
    expected: u64,
    written_back: u64,
    name_durable: bool,
    /// The file has its final name: it is not this writer's any more.
    finalized: bool,
    replaces: Option<(usize, Entry)>,
}

impl ReplicaWriter {
    /// Attaches a writer and shows the replica in the map.
    pub(super) fn attach(store: &Arc<BlockStore>, start: Start) -> Self {
        let visible = AtomicU64::new(start.index.data_length());
        let written_back = start.index.frames_end();
        let open = Arc::new(OpenReplica {
            block: start.block,
            generation: start.generation,
            volume: start.volume,
            temporary: start.temporary,
            path: start.path,
            file: start.file,
            header_bytes: start.header_bytes,
            found_at_start: start.found_at_start,
            index: Mutex::new(start.index),
            visible,
            fenced: watch::channel(false).0,
            ended: watch::channel(false).0,
        });
        let entry = Entry { generation: start.generation, kind: Kind::Writing(Arc::clone(&open)) };
        store.map().settle(start.volume, start.block, entry, false);
        Self {
            store: Arc::clone(store),
            open,
            reserved: start.reserved,
            expected: start.expected,
            written_back,
            name_durable: start.name_durable,
            finalized: false,
            replaces: start.replaces,
        }
    }

    /// The shared face.
    pub fn open(&self) -> &Arc<OpenReplica> {
        &self.open
    }

    /// The volume's id.
    pub fn storage_id(&self) -> &str {
        self.volume().storage_id()
    }

    /// Bytes of data written.
    pub fn length(&self) -> u64 {
        lock(&self.open.index).data_length()
    }

    fn volume(&self) -> &Volume {
        self.store.volume(self.open.volume)
    }

    /// What lies on a volume that is out of service is worth nothing to anybody: no more acks.
    fn check_volume(&self) -> Result<()> {
        match self.volume().failure() {
            None => Ok(()),
            Some(why) => Err(Error::new(ErrorCode::Io, why).with_subject(self.open.block.to_string())),
        }
    }

    fn failed(&self, doing: &str, error: &std::io::Error) -> Error {
        let error = self.volume().failed(format!("{doing} {}", self.open.path.display()), error);
        error.with_subject(self.open.block.to_string())
    }

    /// Appends frames that were verified and follow on what is there.
    pub fn append(&mut self, chunks: &[Chunk]) -> Result<()> {
        self.check_volume()?;
        let total: u64 = chunks.iter().map(|chunk| chunk.bytes() as u64).sum();
        if self.reserved < total {
            let step = RESERVE_STEP.max(total);
            // On a disk that is nearly full what is needed now may still go.
            let (taken, reserved) = match self.volume().reserve(step) {
                Ok(()) => (step, Ok(())),
                Err(_) => (total - self.reserved, self.volume().reserve(total - self.reserved)),
            };
            reserved?;
            self.reserved += taken;
        }
        let at = lock(&self.open.index).frames_end();
        let mut parts: Vec<IoSlice<'_>> = chunks.iter().flat_map(Chunk::slices).collect();
        let written = self.open.file.write_parts_at(&mut parts, at);
        written.map_err(|error| self.failed("writing", &error))?;
        let at = at + total;
        let mut index = lock(&self.open.index);
        chunks.iter().flat_map(|chunk| &chunk.headers).for_each(|header| index.push(header));
        let left = self.expected.checked_sub(index.data_length());
        drop(index);
        self.reserved -= total;
        self.volume().wrote(total, total);
        // Longer than was thought: the end is not in sight.
        let step = left.map_or(WRITE_BACK_STEP, |left| (left / 2).clamp(LAST_WRITE_BACK, WRITE_BACK_STEP));
        if at - self.written_back >= step {
            self.open.file.start_write_back(self.written_back, at - self.written_back);
            self.written_back = at;
        }
        Ok(())
    }

    /// Makes what was written durable.
    pub fn sync(&mut self) -> Result<()> {
        self.check_volume()?;
        self.open.file.sync_data().map_err(|error| self.failed("syncing", &error))?;
        if let (false, Some(folder)) = (self.name_durable, self.open.path.parent()) {
            let synced = self.store.env().fs.sync_dir(folder);
            synced.map_err(|error| self.failed("syncing the folder of", &error))?;
            self.name_durable = true;
        }
        Ok(())
    }

    /// Makes the replica whole, durable and immutable; the map and the reports show it. Returns the number of that report.
    /// On failure the caller abandons the writer.
    pub fn finalize(&mut self) -> Result<u64> {
        self.check_volume()?;
        let open = Arc::clone(&self.open);
        let index = lock(&open.index).clone();
        let tail = index.encode_tail(open.block);
        let length = index.data_length();
        open.file.write_all_at(&tail, index.frames_end()).map_err(|error| self.failed("writing", &error))?;
        open.file.sync_data().map_err(|error| self.failed("syncing", &error))?;
        self.volume().rename_to_final(&open.path, open.block, open.generation, length)?;
        // Whole and under its final name: whatever fails now, nobody may cut this file again.
        self.finalized = true;
        let durable = self.volume().sync_final(open.block);
        self.volume().wrote(tail.len() as u64, 0);
        self.release();
        let stored = index.frames_end() + tail.len() as u64;
        let entry = Entry { generation: open.generation, kind: Kind::Finalized { length, stored } };
        // A name that a power cut may take back is not announced as done.
        let number = self.store.map().settle(open.volume, open.block, entry, durable.is_ok());
        if durable.is_ok() {
            self.unlink_replaced(false);
        }
        open.end();
        durable.map(|()| number)
    }

    /// Ends a copy of the first bytes of a block that is being written elsewhere: durable, shown to the namenode, and waiting for the
    /// writer of its generation. Never final. Returns the number of the report. On failure the caller abandons the writer.
    pub fn hand_over(&mut self) -> Result<u64> {
        let open = Arc::clone(&self.open);
        let index = lock(&open.index).clone();
        // What the pipeline had synced before stays as durable on the node that joins it.
        open.file.sync_data().map_err(|error| self.failed("syncing", &error))?;
        let to = self.volume().open_path(open.block, open.generation, false)?;
        let renamed = self.store.env().fs.rename(&open.path, &to);
        renamed.map_err(|error| self.failed("renaming", &error))?;
        self.finalized = true;
        let durable = to.parent().map_or(Ok(()), |folder| self.volume().sync_folder(folder));
        self.release();
        let kind = open.recovering(index);
        let entry = Entry { generation: open.generation, kind };
        let number = self.store.map().settle(open.volume, open.block, entry, durable.is_ok());
        if durable.is_ok() {
            self.unlink_replaced(true);
        }
        open.end();
        durable.map(|()| number)
    }

    /// Only when the new file is durable under its name: until then the old one may be the only one. `renamed_over`: an open replica of this
    /// generation and volume had the name that the new one has now.
    fn unlink_replaced(&mut self, renamed_over: bool) {
        let Some((at, older)) = self.replaces.take() else { return };
        let same_name = at == self.open.volume && older.generation == self.open.generation;
        if !(renamed_over && same_name && matches!(older.kind, Kind::Recovering { .. })) {
            self.store.unlink(at, self.open.block, &older);
        }
    }

    /// Lets go of the replica. What it holds is kept for recovery (it may have been acked), unless it is a copy or holds nothing.
    pub fn abandon(&mut self) {
        if self.finalized {
            return;
        }
        let open = Arc::clone(&self.open);
        let index = lock(&open.index).clone();
        self.release();
        let end = index.frames_end();
        if open.temporary || index.data_length() == 0 {
            if let Err(error) = self.store.env().fs.remove_file(&open.path) {
                tracing::warn!("{} could not be removed: {error}", open.path.display());
            }
            self.volume().removed(end);
            match self.replaces.take() {
                Some(older) => self.store.map().restore(open.volume, open.block, older),
                None => self.store.map().forget(open.volume, open.block, open.generation, false),
            }
        } else {
            // Bytes after the last whole frame would only be cut at the next start.
            if let Err(error) = open.file.set_len(end) {
                tracing::warn!("{} could not be cut to its last frame: {error}", open.path.display());
            }
            // Reported, so that a leftover of an old generation is not kept until the next full report.
            let kind = open.recovering(index);
            self.store.map().settle(open.volume, open.block, Entry { generation: open.generation, kind }, true);
        }
        open.end();
    }

    fn release(&mut self) {
        let reserved = std::mem::take(&mut self.reserved);
        self.volume().release(reserved);
    }
}

/// Compares frames that a recovering writer resends with those of a replica that is finalized already.
pub struct Matcher {
    block: BlockId,
    path: PathBuf,
    file: Arc<dyn File>,
    final_length: u64,
    /// Where the next frame must lie in the file, and start in the block.
    at: u64,
    matched: u64,
    /// Number of the report that shows the new generation.
    reported: u64,
    storage_id: String,
}

impl Matcher {
    pub(super) fn new(
        block: BlockId,
        path: &Path,
        file: Arc<dyn File>,
        final_length: u64,
        kept: &BlockIndex,
        reported: u64,
        storage_id: &str,
    ) -> Self {
        let (at, matched) = (kept.frames_end(), kept.data_length());
        Self {
            block,
            path: path.to_owned(),
            file,
            final_length,
            at,
            matched,
            reported,
            storage_id: storage_id.to_owned(),
        }
    }

    /// The volume's id.
    pub fn storage_id(&self) -> &str {
        &self.storage_id
    }

    /// Bytes of data that the writer has sent again, or that were kept.
    pub fn length(&self) -> u64 {
        self.matched
    }

    /// Checks frames; their headers carry length, place and checksums of data, so equal headers are equal data.
    pub fn append(&mut self, chunks: &[Chunk]) -> Result<()> {
        for header in chunks.iter().flat_map(|chunk| &chunk.headers) {
            if header.end() > self.final_length {
                let text = format!(
                    "block {} is finalized here with {} bytes; the writer sends it up to {}",
                    self.block,
                    self.final_length,
                    header.end()
                );
                return Err(Error::new(ErrorCode::InvalidArgument, text).with_subject(self.block.to_string()));
            }
            let mut bytes = [0; FRAME_HEADER_BYTES];
            self.file
                .read_exact_at(&mut bytes, self.at)
                .map_err(|error| Error::io(format!("reading {}", self.path.display()), &error))?;
            if bytes != header.encode(self.block) {
                let text = format!(
                    "the data that the writer resent at {} of block {} differs from what is finalized here",
                    header.offset, self.block
                );
                return Err(Error::new(ErrorCode::Corrupt, text).with_subject(self.block.to_string()));
            }
            self.at += header.frame_bytes() as u64;
            self.matched = header.end();
        }
        Ok(())
    }

    /// The writer says that this is all.
    pub fn finish(&self) -> Result<u64> {
        if self.matched == self.final_length {
            return Ok(self.reported);
        }
        let text = format!(
            "block {} is finalized here with {} bytes; the writer ends it at {}",
            self.block, self.final_length, self.matched
        );
        Err(Error::new(ErrorCode::InvalidArgument, text).with_subject(self.block.to_string()))
    }
}

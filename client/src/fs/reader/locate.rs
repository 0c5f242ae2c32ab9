//! Where the blocks of an opened file lie, fetched in batches and remembered.

use std::sync::Mutex;
use std::time::Duration;

use cairn_proto::{Error, ErrorCode, Result};

use super::super::datanode::{block_name, node_name};
use super::super::namenode::lock;
use super::super::{FileKind, FileStatus, FileSystem, LocatedBlock, ReplicaState};

/// Blocks whose locations are asked for at once.
const BLOCKS_PER_BATCH: u64 = 64;
/// The first batch is asked for before the block size is known.
const FIRST_BATCH_BYTES: u64 = BLOCKS_PER_BATCH * cairn_proto::DEFAULT_BLOCK_SIZE;

/// A file as it was when it was opened.
pub(super) struct OpenedFile {
    pub(super) fs: FileSystem,
    pub(super) path: String,
    known: Mutex<Known>,
}

struct Known {
    status: FileStatus,
    /// Bytes that can be read.
    length: u64,
    /// Sorted by offset; a part of the file's.
    blocks: Vec<LocatedBlock>,
}

/// Pause before the length of an open file is asked for again, times the number of the attempt.
const LENGTH_PAUSE: Duration = Duration::from_millis(300);

impl OpenedFile {
    pub(super) async fn open(fs: FileSystem, path: &str) -> Result<Self> {
        let path = cairn_proto::path::normalize(path)?;
        let known = look(&fs, &path).await?;
        Ok(Self { fs, path, known: Mutex::new(known) })
    }

    pub(super) fn status(&self) -> FileStatus {
        lock(&self.known).status.clone()
    }

    pub(super) fn length(&self) -> u64 {
        lock(&self.known).length
    }

    /// Looks again how long the file is.
    pub(super) async fn refresh(&self) -> Result<u64> {
        let mut fresh = look(&self.fs, &self.path).await?;
        self.check_same(&fresh.status)?;
        let mut known = lock(&self.known);
        fresh.keep_seen(&known);
        *known = fresh;
        Ok(known.length)
    }

    fn check_same(&self, status: &FileStatus) -> Result<()> {
        if status.inode == lock(&self.known).status.inode {
            return Ok(());
        }
        let text = format!("{} was replaced by another file while it was read", self.path);
        Err(Error::new(ErrorCode::FileNotFound, text).with_subject(&self.path))
    }

    /// The block that holds `offset`, which lies inside the file.
    pub(super) async fn block_at(&self, offset: u64) -> Result<LocatedBlock> {
        if let Some(block) = self.cached(offset) {
            return Ok(block);
        }
        let batch = BLOCKS_PER_BATCH * lock(&self.known).status.block_size.max(1);
        let (status, blocks) = self.fs.locate(&self.path, offset, batch).await?;
        self.check_same(&status)?;
        lock(&self.known).merge(blocks);
        self.cached(offset).ok_or_else(|| {
            let text = format!("{}: the namenode names no block at {offset}", self.path);
            Error::new(ErrorCode::BlockNotFound, text).with_subject(&self.path)
        })
    }

    fn cached(&self, offset: u64) -> Option<LocatedBlock> {
        let known = lock(&self.known);
        let after = known.blocks.partition_point(|block| block.offset <= offset);
        let block = &known.blocks[after.checked_sub(1)?];
        (offset < block.offset + block.length).then(|| block.clone())
    }

    /// The same block with its replicas as they are now; `None`: the file has others in its place.
    pub(super) async fn locate_again(&self, old: &LocatedBlock) -> Result<Option<LocatedBlock>> {
        // The offset of a block of an open file may have been counted by us: all of its blocks are looked through.
        let (offset, length) = if self.status().open { (0, 0) } else { (old.offset, 1) };
        let (status, blocks) = self.fs.locate(&self.path, offset, length).await?;
        self.check_same(&status)?;
        let id = |block: &LocatedBlock| block.block.as_ref().map(|block| block.id);
        let Some(found) = blocks.into_iter().find(|block| id(block) == id(old)) else { return Ok(None) };
        let fresh = LocatedBlock { offset: old.offset, length: old.length, ..found };
        lock(&self.known).merge(vec![fresh.clone()]);
        Ok(Some(fresh))
    }

    /// Forgets where blocks lie: they are others by now.
    pub(super) async fn forget_blocks(&self) -> Result<()> {
        if self.status().open {
            return self.refresh().await.map(drop);
        }
        lock(&self.known).blocks.clear();
        Ok(())
    }
}

impl Known {
    /// A block that grows does not shrink: while its pipeline changes, a node that was left behind may have been asked how long it is.
    fn keep_seen(&mut self, before: &Known) {
        if !self.status.open {
            return;
        }
        let Some(seen) = before.blocks.last().filter(|block| !block.complete) else { return };
        let id = |block: &LocatedBlock| block.block.as_ref().map(|block| block.id);
        let end = seen.offset + seen.length;
        let same = self.blocks.last_mut().filter(|block| id(block) == id(seen) && block.offset == seen.offset);
        if let Some(block) = same.filter(|block| !block.complete && block.length < seen.length) {
            block.length = seen.length;
            self.length = end;
        }
    }

    fn merge(&mut self, blocks: Vec<LocatedBlock>) {
        for block in blocks {
            match self.blocks.binary_search_by_key(&block.offset, |known| known.offset) {
                Ok(at) => self.blocks[at] = block,
                Err(at) => self.blocks.insert(at, block),
            }
        }
    }
}

async fn look(fs: &FileSystem, path: &str) -> Result<Known> {
    let (status, blocks) = fs.locate(path, 0, FIRST_BATCH_BYTES).await?;
    if status.kind() == FileKind::Directory {
        return Err(Error::new(ErrorCode::NotAFile, format!("{path} is a directory")).with_subject(path));
    }
    if !status.open {
        let length = status.length;
        return Ok(Known { status, length, blocks });
    }
    let mut rounds = 0;
    loop {
        let (status, blocks) = fs.locate(path, 0, 0).await?;
        match measure(fs, path, blocks).await {
            Ok((length, blocks)) => return Ok(Known { status, length, blocks }),
            // After a restart of the namenode the datanodes tell within moments what they hold.
            Err(error) if error.is_retryable() && rounds < fs.settings().read_rounds => rounds += 1,
            Err(error) => return Err(error),
        }
        fs.env().clock.sleep(LENGTH_PAUSE * rounds).await;
    }
}

/// The length of a file that is being written: the namenode knows that of finished blocks, the datanodes that of the others.
async fn measure(fs: &FileSystem, path: &str, blocks: Vec<LocatedBlock>) -> Result<(u64, Vec<LocatedBlock>)> {
    let mut length = 0;
    let mut measured = Vec::with_capacity(blocks.len());
    let mut last = false;
    for mut block in blocks {
        if last {
            break;
        }
        // A block that is being cut is open too, but its length is decided.
        if !block.complete && block.length == 0 {
            let (visible, finalized) = visible_length(fs, path, &block).await?;
            block.length = visible;
            // What lies behind a block that still grows cannot be visible.
            last = !finalized;
        }
        block.offset = length;
        length += block.length;
        // An empty one, too: it is known that it is there.
        measured.push(block);
    }
    Ok((length, measured))
}

/// How much of an open block can be read, and whether it is finished. What a process has had open all along holds all that was flushed, and
/// so does a finalized replica. One that was found at the start of its datanode may have lost some: it counts only if nobody else can have more.
async fn visible_length(fs: &FileSystem, path: &str, located: &LocatedBlock) -> Result<(u64, bool)> {
    let block = located.block.clone().unwrap_or_default();
    let unknown = |why: String| {
        let text = format!("cannot tell how long {path} is: {} is being written, and {why}", block_name(&block));
        Err(Error::new(ErrorCode::Unreachable, text).with_subject(path))
    };
    if located.replicas.is_empty() {
        // Its bytes may lie on nodes that have not reported yet: an error can be repeated, a file that is too short is believed.
        return unknown("no datanode has told yet what it holds of it".into());
    }
    let (mut failure, mut found) = (None, 0);
    for replica in fs.inner.datanodes.in_order(&located.replicas) {
        match fs.inner.datanodes.info(&replica, &block, false).await {
            Ok(info) if !info.found_at_start => return Ok((info.length, info.state() == ReplicaState::Finalized)),
            Ok(info) => found = found.max(info.length),
            // Its pipeline is not open yet, or it was left out of it: what it has was not acknowledged under this generation.
            Err(error) if matches!(error.code(), ErrorCode::BlockNotFound | ErrorCode::StaleGeneration) => {}
            Err(error) => failure = Some(format!("{}: {error}", node_name(&replica))),
        }
    }
    match failure {
        None if located.others_may_hold => unknown(
            "datanodes that are away may have more of it; 'cairn admin recover-lease' closes the file when they are back".into(),
        ),
        None => Ok((found, false)),
        Some(why) => unknown(why),
    }
}

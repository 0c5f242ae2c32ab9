//! Reading one file.
//!
//! # Overview
//! [`FileReader`] reads in order, with a task that fetches ahead, or at any offset. Both get ranges of blocks from [`block`], which fails over
//! between replicas (and with [`hedge`] has two of them race), and verifies every frame on the work pool; [`frames`] takes them off a connection, [`locate`] knows where blocks lie.

mod block;
mod buffers;
mod frames;
mod hedge;
mod locate;

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use cairn_proto::{Error, ErrorCode, Result};
use tokio::io::{AsyncRead, ReadBuf};
use tokio::sync::mpsc;

use super::task::Task;
use super::{FileStatus, FileSystem};
use block::BlockSource;
pub(super) use buffers::Buffers;
use locate::OpenedFile;

/// Beyond the limit for read-ahead a sequential reader fetches so much at a time.
const STEP_BYTES: u64 = 256 << 10;
/// A seek forward by at most this is cheaper by passing over what is on its way.
const SKIP_BYTES: u64 = 1 << 20;

/// Reads one file, as long as it was when it was opened; made by [`FileSystem::open`].
///
/// Sequential reads ([`next_chunk`](Self::next_chunk), [`read`](Self::read), and `AsyncRead`) start at [`position`](Self::position) and
/// move it; positioned ones ([`read_range`](Self::read_range), [`read_at`](Self::read_at)) leave it alone and may run at the same time.
pub struct FileReader {
    file: Arc<OpenedFile>,
    status: FileStatus,
    length: u64,
    /// Next byte for the caller; `current` starts there unless it is empty.
    position: u64,
    current: Bytes,
    ahead_limit: u64,
    ahead: Option<Ahead>,
}

/// What is fetched ahead of the caller.
struct Ahead {
    chunks: mpsc::Receiver<Result<Bytes>>,
    /// Where the next chunk starts.
    at: u64,
    end: u64,
    _task: Task<()>,
}

impl FileReader {
    pub(super) async fn open(fs: FileSystem, path: &str) -> Result<Self> {
        let file = Arc::new(OpenedFile::open(fs, path).await?);
        let (status, length) = (file.status(), file.length());
        Ok(Self { file, status, length, position: 0, current: Bytes::new(), ahead_limit: u64::MAX, ahead: None })
    }

    /// Path of the file.
    pub fn path(&self) -> &str {
        &self.file.path
    }

    /// The file as it was when it was opened.
    pub fn status(&self) -> &FileStatus {
        &self.status
    }

    /// Bytes that can be read.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Where the next sequential read starts.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Moves the position; it may lie behind the end, where there is nothing to read.
    pub fn seek(&mut self, position: u64) {
        let inside = position.checked_sub(self.position).filter(|skip| *skip <= self.current.len() as u64);
        if let Some(skip) = inside {
            self.current.advance(skip as usize);
        } else {
            self.current = Bytes::new();
            let near = |ahead: &Ahead| position >= ahead.at && position - ahead.at <= SKIP_BYTES;
            if !self.ahead.as_ref().is_some_and(near) {
                self.ahead = None;
            }
        }
        self.position = position;
    }

    /// Tells that sequential reads will hardly go beyond `end`: nothing behind it is fetched ahead. A task that reads a split of a file and
    /// the rest of its last line sets this to the end of the split.
    pub fn limit_read_ahead(&mut self, end: u64) {
        self.ahead_limit = end;
        if self.ahead.as_ref().is_some_and(|ahead| ahead.end > end) {
            self.ahead = None;
        }
    }

    /// Looks again how long the file is, for files that are being written; returns the new length.
    pub async fn refresh(&mut self) -> Result<u64> {
        self.length = self.file.refresh().await?;
        self.status = self.file.status();
        Ok(self.length)
    }

    /// The next bytes (at most a frame) without copying them; `None` at the end.
    pub async fn next_chunk(&mut self) -> Result<Option<Bytes>> {
        std::future::poll_fn(|cx| self.poll_chunk(cx)).await
    }

    /// Reads into `out`; returns how much, 0 at the end (or if `out` is empty).
    pub async fn read(&mut self, out: &mut [u8]) -> Result<usize> {
        if out.is_empty() {
            return Ok(0);
        }
        if self.current.is_empty() {
            match self.next_chunk().await? {
                Some(chunk) => self.put_back(chunk),
                None => return Ok(0),
            }
        }
        Ok(self.take_current(out))
    }

    /// Reads at `offset` until `out` is full or the file ends; returns how much.
    pub async fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<usize> {
        let mut range = self.range(offset, out.len() as u64);
        let mut done = 0;
        while let Some(chunk) = range.next().await? {
            out[done..done + chunk.len()].copy_from_slice(&chunk);
            done += chunk.len();
        }
        Ok(done)
    }

    /// Reads `length` bytes at `offset`, less where the file ends before.
    pub async fn read_range(&self, offset: u64, length: u64) -> Result<Bytes> {
        let mut range = self.range(offset, length);
        let Some(first) = range.next().await? else { return Ok(Bytes::new()) };
        let Some(second) = range.next().await? else { return Ok(first) };
        let mut all = BytesMut::with_capacity((range.end - offset) as usize);
        all.extend_from_slice(&first);
        all.extend_from_slice(&second);
        while let Some(chunk) = range.next().await? {
            all.extend_from_slice(&chunk);
        }
        Ok(all.freeze())
    }

    fn range(&self, offset: u64, length: u64) -> RangeSource {
        let end = offset.saturating_add(length).min(self.length);
        RangeSource { file: Arc::clone(&self.file), at: offset, end, block: None, relocated: false }
    }

    fn put_back(&mut self, chunk: Bytes) {
        self.position -= chunk.len() as u64;
        self.current = chunk;
    }

    fn take_current(&mut self, out: &mut [u8]) -> usize {
        let count = out.len().min(self.current.len());
        self.current.copy_to_slice(&mut out[..count]);
        self.position += count as u64;
        count
    }

    fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>>> {
        if !self.current.is_empty() {
            self.position += self.current.len() as u64;
            return Poll::Ready(Ok(Some(std::mem::take(&mut self.current))));
        }
        loop {
            if self.position >= self.length {
                return Poll::Ready(Ok(None));
            }
            let ahead = match &mut self.ahead {
                Some(ahead) => ahead,
                None => {
                    let ahead = self.fetch_ahead();
                    self.ahead.insert(ahead)
                }
            };
            let Some(next) = ready!(ahead.chunks.poll_recv(cx)) else {
                let at = ahead.at;
                let complete = at >= ahead.end;
                self.ahead = None;
                if !complete {
                    let text = format!("reading {}: the fetching task ended at {at}", self.file.path);
                    return Poll::Ready(Err(Error::new(ErrorCode::Internal, text)));
                }
                continue;
            };
            let mut chunk = match next {
                Ok(chunk) => chunk,
                Err(error) => {
                    self.ahead = None;
                    return Poll::Ready(Err(error));
                }
            };
            let skip = self.position.saturating_sub(ahead.at);
            ahead.at += chunk.len() as u64;
            if skip < chunk.len() as u64 {
                chunk.advance(skip as usize);
                self.position += chunk.len() as u64;
                return Poll::Ready(Ok(Some(chunk)));
            }
        }
    }

    fn fetch_ahead(&self) -> Ahead {
        let settings = self.file.fs.settings();
        let end = if self.position < self.ahead_limit {
            self.length.min(self.ahead_limit)
        } else {
            self.length.min(self.position + STEP_BYTES)
        };
        let queued = (settings.read_ahead_bytes / settings.frame_bytes).clamp(1, 4_096) as usize;
        let (give, chunks) = mpsc::channel(queued);
        let mut source = self.range(self.position, end - self.position);
        let task = Task::spawn(async move {
            loop {
                let next = source.next().await.transpose();
                let Some(next) = next else { return Ok(()) };
                let failed = next.is_err();
                if give.send(next).await.is_err() || failed {
                    return Ok(());
                }
            }
        });
        Ahead { chunks, at: self.position, end, _task: task }
    }
}

impl AsyncRead for FileReader {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if out.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        if this.current.is_empty() {
            match ready!(this.poll_chunk(cx)) {
                Ok(Some(chunk)) => this.put_back(chunk),
                Ok(None) => return Poll::Ready(Ok(())),
                Err(error) => return Poll::Ready(Err(io::Error::other(error))),
            }
        }
        let unfilled = out.initialize_unfilled();
        let count = this.take_current(unfilled);
        out.advance(count);
        Poll::Ready(Ok(()))
    }
}

/// The bytes of a range of the file, block after block.
struct RangeSource {
    file: Arc<OpenedFile>,
    at: u64,
    end: u64,
    block: Option<BlockSource>,
    /// Nothing came since the blocks were asked for anew.
    relocated: bool,
}

impl RangeSource {
    async fn next(&mut self) -> Result<Option<Bytes>> {
        loop {
            if let Some(block) = &mut self.block {
                match block.next().await {
                    Ok(Some(data)) => {
                        self.at += data.len() as u64;
                        self.relocated = false;
                        return Ok(Some(data));
                    }
                    Ok(None) => self.block = None,
                    // Short blocks were merged: the same bytes lie in another one.
                    Err(_) if block.is_gone() && !self.relocated => {
                        self.relocated = true;
                        self.block = None;
                        self.file.forget_blocks().await?;
                    }
                    Err(error) => return Err(error),
                }
            }
            if self.at >= self.end {
                return Ok(None);
            }
            let located = self.file.block_at(self.at).await?;
            let from = self.at - located.offset;
            let to = located.length.min(self.end - located.offset);
            self.block = Some(BlockSource::new(Arc::clone(&self.file), located, from..to));
        }
    }
}

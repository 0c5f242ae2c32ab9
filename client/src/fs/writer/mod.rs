//! Writing a file: a new one, or behind the end of one that is there.
//!
//! # Overview
//! [`FileWriter`] cuts data into frames and blocks. Each block has a task ([`block`]) that seals frames on the work pool ([`seal`]) and
//! moves them through a pipeline of datanodes ([`link`]). A frame keeps its share of the writer's window from the moment it is taken until
//! it is acked, so memory is bounded however many blocks are open; and since the next block starts while the last one is made durable, that is
//! at most two. What breaks a pipeline is mended by its block's task ([`mend`]).

mod block;
mod calls;
mod flow;
mod link;
mod mend;
mod seal;
mod setup;

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use cairn_proto::dataplane::MarkerKind;
use cairn_proto::{Error, ErrorCode, Result, pb};
use pb::CommittedBlock;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use super::lease::{self, LeaseGuard};
use super::namenode::Patience;
use super::task::Task;
use super::{AppendOptions, CreateOptions, FileStatus, FileSystem};
use block::{BlockWriter, Succession};
use calls::OpenFile;
use flow::Input;
use seal::Raw;
pub(super) use seal::SealerPool;

/// Pieces that wait for a block's task; their bytes are bounded by the window.
const QUEUED_PIECES: usize = 32;

/// Writes one file; made by [`FileSystem::create`] and [`FileSystem::append`].
///
/// Data is on its way to the datanodes while more is written. [`close`](Self::close) makes it durable and visible as a whole. A writer that is
/// dropped without `close` or [`abort`](Self::abort) leaves the file open until its lease expires (a minute if another client wants to
/// write it); what was acked until then stays in it. After an error every further call returns that error.
pub struct FileWriter {
    file: Arc<OpenFile>,
    frame_bytes: usize,
    window: Arc<Semaphore>,
    /// Data that does not fill a frame yet.
    buffer: BytesMut,
    current: Option<OpenBlock>,
    finishing: Option<Task<CommittedBlock>>,
    /// Resolves when the next block may be asked for.
    succession: Option<oneshot::Receiver<()>>,
    /// Finished blocks that the namenode was not told of.
    committed: Vec<CommittedBlock>,
    blocks: u32,
    length: u64,
    /// The file was there before.
    appends: bool,
    failed: Option<Error>,
    _lease: LeaseGuard,
}

/// What a writer begins with.
struct Start {
    /// Blocks that the file has.
    blocks: u32,
    compress: bool,
    appends: bool,
}

struct OpenBlock {
    input: mpsc::Sender<Input>,
    task: Task<CommittedBlock>,
    taken: u64,
    finish_sent: bool,
}

/// Room for a piece of data: in the queue of the current block, and in the window.
struct Place {
    slot: mpsc::OwnedPermit<Input>,
    permit: OwnedSemaphorePermit,
}

impl FileWriter {
    pub(super) async fn create(fs: FileSystem, path: &str, options: CreateOptions) -> Result<Self> {
        let path = cairn_proto::path::normalize(path)?;
        let lease = lease::hold(&fs.inner);
        let call = fs.inner.namenode.open_call();
        let request = pb::CreateRequest {
            call: call.context(),
            path: path.clone(),
            permission: options.permission,
            replication: options.replication,
            block_size: options.block_size,
            overwrite: options.overwrite,
            create_parents: options.create_parents,
            client_name: fs.inner.client_name.clone(),
        };
        let send =
            |mut stub: pb::namenode_client::NamenodeClient<_>, request| async move { stub.create(request).await };
        let answer = fs.inner.namenode.call(Patience::Caller, request, send).await?;
        drop(call);
        let missing = || Error::new(ErrorCode::Internal, "the namenode's answer holds no status").with_subject(&path);
        let status = answer.status.ok_or_else(missing)?;
        Self::on(fs, path, &status, Start { blocks: 0, compress: options.compress, appends: false }, lease)
    }

    pub(super) async fn append(fs: FileSystem, path: &str, options: AppendOptions) -> Result<Self> {
        let path = cairn_proto::path::normalize(path)?;
        let lease = lease::hold(&fs.inner);
        let call = fs.inner.namenode.open_call();
        let client_name = fs.inner.client_name.clone();
        let request = pb::AppendRequest { call: call.context(), path: path.clone(), client_name };
        let send =
            |mut stub: pb::namenode_client::NamenodeClient<_>, request| async move { stub.append(request).await };
        let answer = fs.inner.namenode.call(Patience::Caller, request, send).await?;
        drop(call);
        let missing = || Error::new(ErrorCode::Internal, "the namenode's answer holds no status").with_subject(&path);
        let status = answer.status.ok_or_else(missing)?;
        Self::on(fs, path, &status, Start { blocks: answer.blocks, compress: options.compress, appends: true }, lease)
    }

    /// A writer of a file that is open now.
    fn on(fs: FileSystem, path: String, status: &FileStatus, start: Start, lease: LeaseGuard) -> Result<Self> {
        if status.block_size == 0 {
            return Err(Error::new(ErrorCode::Internal, format!("{path} has a block size of 0")).with_subject(path));
        }
        let settings = fs.settings();
        let frame_bytes = settings.frame_bytes as usize;
        let window = Arc::new(Semaphore::new(settings.write_window_bytes as usize));
        let (inode, block_size, compress) = (status.inode, status.block_size, start.compress);
        let replication = status.replication as usize;
        let file = Arc::new(OpenFile { fs, path, inode, block_size, replication, compress });
        Ok(Self {
            file,
            frame_bytes,
            window,
            buffer: BytesMut::new(),
            current: None,
            finishing: None,
            succession: None,
            committed: Vec::new(),
            blocks: start.blocks,
            length: status.length,
            appends: start.appends,
            failed: None,
            _lease: lease,
        })
    }

    /// Path of the file.
    pub fn path(&self) -> &str {
        &self.file.path
    }

    /// The file's inode, which it keeps when it is renamed.
    pub fn inode(&self) -> u64 {
        self.file.inode
    }

    /// Length of the file when all bytes taken so far are in it.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Takes bytes, copying them. Waits while the window is full.
    pub async fn write(&mut self, mut bytes: &[u8]) -> Result<()> {
        self.check()?;
        self.finish_full().await?;
        // A call that was given up may have left a whole frame behind.
        self.push_full().await?;
        while !bytes.is_empty() {
            let room = self.frame_room() - self.buffer.len();
            if self.buffer.capacity() == 0 {
                self.buffer.reserve(self.frame_bytes);
            }
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            self.buffer.extend_from_slice(now);
            self.length += now.len() as u64;
            bytes = later;
            self.push_full().await?;
        }
        Ok(())
    }

    /// Takes bytes without copying them, but for what does not fill a frame.
    pub async fn write_bytes(&mut self, mut bytes: Bytes) -> Result<()> {
        self.check()?;
        self.finish_full().await?;
        // A call that was given up may have left a whole frame behind.
        self.push_full().await?;
        while !bytes.is_empty() {
            let room = self.frame_room();
            if self.buffer.is_empty() && bytes.len() >= room {
                let place = self.place(room).await?;
                self.length += room as u64;
                self.put(bytes.split_to(room), place);
                self.finish_full().await?;
            } else {
                let part = bytes.split_to((room - self.buffer.len()).min(bytes.len()));
                self.write(&part).await?;
            }
        }
        Ok(())
    }

    /// Makes all bytes taken so far visible to readers that open the file from now on (HDFS's `hflush`). They survive the death of
    /// processes, not the loss of power of all nodes of the pipeline.
    pub async fn flush(&mut self) -> Result<()> {
        self.mark(MarkerKind::Flush).await
    }

    /// Makes all bytes taken so far durable on every node of the pipeline (HDFS's `hsync`): at least two, if the file's replication and the
    /// cluster allow it.
    pub async fn sync(&mut self) -> Result<()> {
        self.mark(MarkerKind::Sync).await
    }

    /// Makes the file durable and closes it.
    pub async fn close(mut self) -> Result<FileStatus> {
        self.check()?;
        self.push_rest().await?;
        if self.current.is_some() {
            self.finish_block().await?;
        }
        self.await_finishing().await?;
        let completed = self.file.complete(&self.committed).await;
        let status = completed.map_err(|error| self.file.failed(&error))?;
        if status.length != self.length {
            let text = format!("{} bytes were written, but the file has {}", self.length, status.length);
            return Err(self.file.failed(&Error::new(ErrorCode::Internal, text)));
        }
        Ok(status)
    }

    /// Gives up: stops writing and deletes the file, if this writer made it; a file that was appended to is closed by the namenode, with what
    /// had been acked, whatever its name is by then. Nothing happens to another file that the path names meanwhile.
    pub async fn abort(mut self) -> Result<()> {
        self.current = None;
        self.finishing = None;
        if self.appends {
            // By number: the file may have another name by now.
            return self.file.fs.release_lease(self.file.inode).await;
        }
        // The namenode compares and deletes in one step: somebody else's file of that name is safe.
        self.file.fs.take_back(&self.file.path, self.file.inode).await
    }

    fn check(&self) -> Result<()> {
        self.failed.clone().map_or(Ok(()), Err)
    }

    /// Notes an error as final.
    fn fail<T>(&mut self, error: &Error) -> Result<T> {
        let error = self.file.failed(error);
        self.failed = Some(error.clone());
        Err(error)
    }

    /// File data that the frame which is being filled may hold: no frame crosses the end of its block.
    fn frame_room(&self) -> usize {
        let left = self.file.block_size - self.current.as_ref().map_or(0, |block| block.taken);
        usize::try_from(left).map_or(self.frame_bytes, |left| left.min(self.frame_bytes))
    }

    async fn push_full(&mut self) -> Result<()> {
        if self.buffer.len() >= self.frame_room() { self.push_rest().await } else { Ok(()) }
    }

    async fn push_rest(&mut self) -> Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let place = self.place(self.buffer.len()).await?;
        let frame = std::mem::take(&mut self.buffer).freeze();
        self.put(frame, place);
        self.finish_full().await
    }

    /// Waits until `length` bytes may be given to the current block. The data is taken only then: a caller that stops waiting loses none.
    async fn place(&mut self, length: usize) -> Result<Place> {
        let wanted = length.min(self.file.fs.settings().write_window_bytes as usize) as u32;
        let Ok(permit) = Arc::clone(&self.window).acquire_many_owned(wanted).await else {
            return self.fail(&Error::new(ErrorCode::Internal, "the window is closed"));
        };
        match self.open_block().input.clone().reserve_owned().await {
            Ok(slot) => Ok(Place { slot, permit }),
            Err(_) => self.ended_early().await,
        }
    }

    fn put(&mut self, data: Bytes, place: Place) {
        self.open_block().taken += data.len() as u64;
        place.slot.send(Input::Data(Raw { data, permit: place.permit }));
    }

    /// Ends the current block if it is full.
    async fn finish_full(&mut self) -> Result<()> {
        let full = self.current.as_ref().is_some_and(|block| block.taken >= self.file.block_size);
        if full { self.finish_block().await } else { Ok(()) }
    }

    fn open_block(&mut self) -> &mut OpenBlock {
        let (file, succession) = (&self.file, &mut self.succession);
        let (blocks, committed) = (&mut self.blocks, &mut self.committed);
        self.current.get_or_insert_with(|| {
            let (input, queue) = mpsc::channel(QUEUED_PIECES);
            let (next, told) = oneshot::channel();
            let turn = Succession { before: succession.replace(told), next: Some(next) };
            let writer = BlockWriter::new(Arc::clone(file), *blocks, std::mem::take(committed), queue, turn);
            *blocks += 1;
            OpenBlock { input, task: Task::spawn(writer.run()), taken: 0, finish_sent: false }
        })
    }

    /// The block's task ended although more was to come: only for an error.
    async fn ended_early<T>(&mut self) -> Result<T> {
        // If the block before failed, that is the reason.
        self.await_finishing().await?;
        let ended = match &mut self.current {
            Some(block) => (&mut block.task).await.err(),
            None => None,
        };
        self.current = None;
        let unknown = || Error::new(ErrorCode::Internal, "a block ended early");
        let error = ended.unwrap_or_else(unknown);
        self.fail(&error)
    }

    /// Ends the current block; it is made durable while the next one is written, but of those that are made durable only one may be left.
    async fn finish_block(&mut self) -> Result<()> {
        let Some(block) = &mut self.current else { return Ok(()) };
        if !block.finish_sent {
            if block.input.send(Input::Finish).await.is_err() {
                return self.ended_early().await;
            }
            block.finish_sent = true;
        }
        self.await_finishing().await?;
        self.finishing = self.current.take().map(|block| block.task);
        Ok(())
    }

    async fn await_finishing(&mut self) -> Result<()> {
        let Some(task) = &mut self.finishing else { return Ok(()) };
        let ended = task.await;
        self.finishing = None;
        match ended {
            Ok(committed) => {
                self.committed.push(committed);
                Ok(())
            }
            Err(error) => self.fail(&error),
        }
    }

    async fn mark(&mut self, kind: MarkerKind) -> Result<()> {
        self.check()?;
        self.finish_full().await?;
        self.push_rest().await?;
        self.await_finishing().await?;
        let Some(block) = &mut self.current else { return Ok(()) };
        let (done, answered) = oneshot::channel();
        if block.input.send(Input::Mark(kind, done)).await.is_err() || answered.await.is_err() {
            return self.ended_early().await;
        }
        Ok(())
    }
}

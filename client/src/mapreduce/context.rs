//! What a program can learn of the task that it runs in, and reach from there.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use cairn_proto::{Error, ErrorCode, Result};
use tokio::runtime::Handle;

use super::counters::{UserCounter, UserCounters};
use crate::fs::{CreateOptions, FileReader, FileStatus, FileSystem, FileWriter};

/// Map or reduce.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum TaskKind {
    /// Map.
    #[default]
    Map,
    /// Reduce.
    Reduce,
}

/// A map's part of the input.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct TaskInput {
    /// Its file; empty where there is none ([`super::InputFormat::Generated`]).
    pub path: String,
    /// First byte, or number of the first record to generate.
    pub offset: u64,
    /// Bytes, or records to generate.
    pub length: u64,
    /// Position of the file among the job's inputs.
    pub file_index: u32,
}

/// The task that a mapper or reducer was made for. Clones share counters and status.
#[derive(Clone, Debug, Default)]
pub struct TaskContext {
    /// The job.
    pub job_id: String,
    /// Whom it acts for.
    pub user: String,
    /// What it is.
    pub kind: TaskKind,
    /// Its number among its kind.
    pub index: u32,
    /// Number of this attempt.
    pub attempt: u32,
    /// Map tasks of the job.
    pub maps: u32,
    /// Reduce tasks of the job.
    pub reducers: u32,
    /// Id of the node that it runs on.
    pub node: String,
    /// The job's parameters.
    pub properties: Arc<BTreeMap<String, String>>,
    /// What a map reads.
    pub input: Option<TaskInput>,
    /// A folder for this attempt alone, on the local disk; it goes when the attempt has ended.
    pub work_dir: PathBuf,
    /// Local copies of the job's cache files, by name. They must not be changed.
    pub cache_files: Arc<BTreeMap<String, PathBuf>>,
    /// Bytes that all processes of the task may use.
    pub memory_limit: u64,
    /// Bytes of them that the program may use for itself.
    pub program_memory: u64,
    /// Its own counters and status.
    pub user_counters: UserCounters,
    pub(crate) files: Option<TaskFiles>,
}

impl TaskContext {
    /// A parameter of the job.
    pub fn property(&self, name: &str) -> Option<&str> {
        self.properties.get(name).map(String::as_str)
    }

    /// A parameter of the job that must be there.
    pub fn required(&self, name: &str) -> Result<&str> {
        self.property(name).ok_or_else(|| {
            Error::new(ErrorCode::InvalidArgument, format!("the job lacks the property {name}")).with_subject(name)
        })
    }

    /// A parameter of the job as a number or the like; `default` if it is not set.
    pub fn parsed<T: std::str::FromStr>(&self, name: &str, default: T) -> Result<T> {
        let Some(text) = self.property(name) else { return Ok(default) };
        text.parse().map_err(|_| {
            let kind = std::any::type_name::<T>();
            let text = format!("property {name}: {text:?} is not a value of type {kind}");
            Error::new(ErrorCode::InvalidArgument, text).with_subject(name)
        })
    }

    /// The local copy of a cache file.
    pub fn cache_file(&self, name: &str) -> Result<&Path> {
        self.cache_files.get(name).map(PathBuf::as_path).ok_or_else(|| {
            let have: Vec<&str> = self.cache_files.keys().map(String::as_str).collect();
            let text = format!("the job has no cache file {name:?}; it has {have:?}");
            Error::new(ErrorCode::FileNotFound, text).with_subject(name)
        })
    }

    /// Adds to a counter of the program's own.
    pub fn count(&self, name: &str, by: u64) {
        self.user_counters.count(name, by);
    }

    /// A counter of the program's own, to be kept where many are counted.
    pub fn counter(&self, name: &str) -> UserCounter {
        self.user_counters.counter(name)
    }

    /// Tells that the task lives. Reading input and writing output do so by themselves; a program that computes for minutes between them must, or it
    /// is stopped when its job's time-out is over.
    pub fn progressed(&self) {
        self.user_counters.progressed();
    }

    /// Says in words what the task is about; shown beside its progress.
    pub fn set_status(&self, status: &str) {
        self.user_counters.set_status(status);
    }

    /// The file system, for what the task reads or writes beside its input and output. Such writes are not part of the job's commit.
    pub fn files(&self) -> Result<&TaskFiles> {
        self.files.as_ref().ok_or_else(|| Error::new(ErrorCode::Unsupported, "this task has no file system"))
    }
}

/// The file system for code that blocks. Only for the thread that runs a mapper or reducer.
#[derive(Clone)]
pub struct TaskFiles {
    fs: FileSystem,
    handle: Handle,
}

impl std::fmt::Debug for TaskFiles {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TaskFiles({})", self.fs.namenode_address())
    }
}

impl TaskFiles {
    /// Of a client, on the runtime of the caller.
    pub fn new(fs: FileSystem) -> Self {
        Self { fs, handle: Handle::current() }
    }

    /// The client; its calls are to be handed to [`Self::wait`].
    pub fn fs(&self) -> &FileSystem {
        &self.fs
    }

    /// Blocks until `call` has its result.
    pub fn wait<T>(&self, call: impl Future<Output = T>) -> T {
        self.handle.block_on(call)
    }

    /// All of a file of at most `limit` bytes.
    pub fn read(&self, path: &str, limit: u64) -> Result<Bytes> {
        self.wait(async {
            let reader = self.fs.open(path).await?;
            if reader.length() > limit {
                let text =
                    format!("{path} has {} bytes, more than the {limit} that there is memory for", reader.length());
                return Err(Error::new(ErrorCode::InvalidArgument, text).with_subject(path));
            }
            reader.read_range(0, reader.length()).await
        })
    }

    /// Opens a file for reading.
    pub fn open(&self, path: &str) -> Result<BlockingReader> {
        let reader = self.wait(self.fs.open(path))?;
        Ok(BlockingReader { reader, handle: self.handle.clone(), piece: Bytes::new() })
    }

    /// Creates a file.
    pub fn create(&self, path: &str, options: CreateOptions) -> Result<BlockingWriter> {
        let writer = self.wait(self.fs.create(path, options))?;
        Ok(BlockingWriter { writer: Some(writer), handle: self.handle.clone() })
    }
}

/// A file of the cluster as [`io::Read`].
pub struct BlockingReader {
    reader: FileReader,
    handle: Handle,
    piece: Bytes,
}

impl BlockingReader {
    /// Bytes of the file.
    pub fn length(&self) -> u64 {
        self.reader.length()
    }

    /// Goes on at `position`.
    pub fn seek(&mut self, position: u64) {
        self.piece = Bytes::new();
        self.reader.seek(position);
    }

    /// The next bytes without copying them; `None` at the end.
    pub fn next_chunk(&mut self) -> Result<Option<Bytes>> {
        if !self.piece.is_empty() {
            return Ok(Some(std::mem::take(&mut self.piece)));
        }
        self.handle.block_on(self.reader.next_chunk())
    }
}

impl io::Read for BlockingReader {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.piece.is_empty() {
            match self.handle.block_on(self.reader.next_chunk()).map_err(io::Error::other)? {
                Some(piece) => self.piece = piece,
                None => return Ok(0),
            }
        }
        let count = out.len().min(self.piece.len());
        out[..count].copy_from_slice(&self.piece.split_to(count));
        Ok(count)
    }
}

/// A file of the cluster as [`io::Write`]. Without [`Self::close`] it stays open until its lease expires.
pub struct BlockingWriter {
    writer: Option<FileWriter>,
    handle: Handle,
}

impl BlockingWriter {
    /// Takes bytes without copying them.
    pub fn write_bytes(&mut self, bytes: Bytes) -> Result<()> {
        let Some(writer) = &mut self.writer else { return Ok(()) };
        self.handle.block_on(writer.write_bytes(bytes))
    }

    /// Completes the file; it is durable then.
    pub fn close(mut self) -> Result<FileStatus> {
        match self.writer.take() {
            Some(writer) => self.handle.block_on(writer.close()),
            None => Err(Error::new(ErrorCode::Internal, "the file was closed before")),
        }
    }

    /// Gives the file up and removes it.
    pub fn abort(mut self) -> Result<()> {
        self.writer.take().map_or(Ok(()), |writer| self.handle.block_on(writer.abort()))
    }
}

impl io::Write for BlockingWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(writer) = &mut self.writer {
            self.handle.block_on(writer.write(bytes)).map_err(io::Error::other)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

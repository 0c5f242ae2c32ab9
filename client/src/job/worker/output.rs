//! The files that a task writes: pieces come from the computing thread, files go to the cluster.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use cairn_proto::path::{join, split_last};
use cairn_proto::{Error, ErrorCode, Result, pb};
use tokio::sync::mpsc;

use super::kept::{Keeper, Kept};
use super::{Context, PIECES};
use crate::fs::{CreateOptions, FileStatus, FileSystem, FileWriter};
use crate::mapreduce::output::{OutputNames, OutputSink};
use crate::mapreduce::{Output, Program, TaskKind, UserCounters};

enum Piece {
    Open(String),
    Bytes(usize, Bytes),
}

struct Sink {
    pieces: mpsc::Sender<Piece>,
    copies: Option<Copies>,
}

/// What is kept of the files for the next stage, in the order in which they are opened.
#[derive(Clone)]
struct Copies {
    kept: Kept,
    keepers: Arc<Mutex<Vec<Keeper>>>,
}

impl Copies {
    fn keepers(&self) -> MutexGuard<'_, Vec<Keeper>> {
        self.keepers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The files are complete.
    fn finish(&self, files: &[FileStatus]) {
        for (keeper, file) in self.keepers().drain(..).zip(files) {
            keeper.finish(file, 0, false, true);
        }
    }
}

impl Sink {
    fn send(&self, piece: Piece) -> Result<()> {
        let gone = |_| Error::new(ErrorCode::Io, "the output file cannot be written");
        self.pieces.blocking_send(piece).map_err(gone)
    }
}

impl OutputSink for Sink {
    fn open(&mut self, attempt_name: &str) -> Result<()> {
        if let Some(copies) = &self.copies {
            let keeper = copies.kept.keeper();
            copies.keepers().push(keeper);
        }
        self.send(Piece::Open(attempt_name.to_owned()))
    }

    fn write(&mut self, file: usize, piece: Bytes) -> Result<()> {
        if let Some(keeper) = self.copies.as_ref().map(Copies::keepers).as_mut().and_then(|all| all.get_mut(file)) {
            keeper.push(&piece);
        }
        self.send(Piece::Bytes(file, piece))
    }
}

impl Context {
    /// Runs `compute` on a thread with an [`Output`] whose files lie beside `path`; they are complete when this returns, or gone if it fails.
    pub(super) async fn with_output<R: Send + 'static>(
        &self,
        program: &dyn Program,
        id: &pb::TaskId,
        path: &str,
        user: &UserCounters,
        compute: impl FnOnce(Output) -> Result<R> + Send + 'static,
    ) -> Result<R> {
        let folder = split_last(path).map_or("/", |(folder, _)| folder).to_owned();
        let options = CreateOptions {
            overwrite: true,
            replication: self.job.output_replication,
            block_size: self.job.output_block_size,
            ..CreateOptions::default()
        };
        let fs = self.files().await?.clone();
        let mut files = Files { fs, folder, options, writers: Vec::new() };
        let (sender, mut pieces) = mpsc::channel(PIECES);
        let kind = if id.kind() == pb::TaskKind::Reduce { TaskKind::Reduce } else { TaskKind::Map };
        let mut seed = [0; 16];
        self.env.entropy.fill(&mut seed);
        let names = OutputNames::new(kind, id.index, id.attempt, u128::from_le_bytes(seed));
        let (format, watcher, user) = (program.output(), user.clone(), user.clone());
        let kept = self.kept.clone().filter(|_| self.job.keep_output);
        let copies = kept.map(|kept| Copies { kept, keepers: Arc::default() });
        let filled = copies.clone();
        let computed = self.env.work.io(move || {
            let sink = Box::new(Sink { pieces: sender, copies: filled });
            compute(Output::new(sink, format, names, user)?)
        });
        let written = async {
            while let Some(piece) = pieces.recv().await {
                watcher.progressed();
                if let Err(error) = files.take(piece).await {
                    // The computation must not wait for a reader that has gone.
                    pieces.close();
                    while pieces.recv().await.is_some() {}
                    return Err(error);
                }
            }
            Ok(())
        };
        // Both come to their ends; the writer's error is the cause of the computation's.
        let (written, computed) = tokio::join!(written, computed);
        match written.and(computed) {
            Ok(result) => {
                let closed = files.close().await?;
                if let Some(copies) = copies {
                    self.env.work.io(move || copies.finish(&closed)).await;
                }
                Ok(result)
            }
            Err(error) => {
                files.abort().await;
                Err(error)
            }
        }
    }
}

struct Files {
    fs: FileSystem,
    folder: String,
    options: CreateOptions,
    writers: Vec<FileWriter>,
}

impl Files {
    async fn take(&mut self, piece: Piece) -> Result<()> {
        match piece {
            Piece::Open(name) => {
                let writer = self.fs.create(&join(&self.folder, &name), self.options.clone()).await?;
                self.writers.push(writer);
                Ok(())
            }
            Piece::Bytes(file, bytes) => match self.writers.get_mut(file) {
                Some(writer) => writer.write_bytes(bytes).await,
                None => Err(Error::new(ErrorCode::Internal, format!("output file {file} was never opened"))),
            },
        }
    }

    async fn close(mut self) -> Result<Vec<FileStatus>> {
        let closing = self.writers.drain(..).map(FileWriter::close);
        futures_util::future::join_all(closing).await.into_iter().collect()
    }

    /// What cannot be removed now goes with the staging folder.
    async fn abort(mut self) {
        for writer in self.writers.drain(..) {
            let _ = writer.abort().await;
        }
    }
}

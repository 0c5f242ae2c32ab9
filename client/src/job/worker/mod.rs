//! The worker process: runs tasks of one job, one at a time, for the datanode that started it.
//!
//! # Overview
//! The datanode speaks on standard input and listens on what was standard output: length-delimited [`pb::WorkerOrder`]s and
//! [`pb::WorkerReport`]s. Standard output itself is turned to standard error first thing, so that nothing that user code prints gets in between.
//! The process ends when its standard input does. It keeps its connection to the namenode over all its tasks.
//!
//! # Memory
//! A task's buffers are shares of the job's limit ([`Shares`]); readers and writers of files have fixed windows.

mod map;
mod reduce;
mod shuffle;

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use cairn_common::net::read_message;
use cairn_common::{Env, telemetry};
use cairn_proto::pb::task_spec::Work;
use cairn_proto::pb::worker_order::Order;
use cairn_proto::pb::worker_report::Report;
use cairn_proto::{Error, ErrorCode, Result, dataplane, pb};
use tokio::net::unix::pipe::Receiver;
use tokio::sync::{OnceCell, mpsc};

use crate::fs::{ClientSettings, CreateOptions, FileSystem};
use crate::mapreduce::{Counters, Output, Program, Shares, builtin};

/// How often progress is told.
const PROGRESS: Duration = Duration::from_millis(200);
/// Pieces of a file between the task that reads or writes it and the thread that computes.
const PIECES: usize = 4;
/// File data that a task's reader fetches ahead, and that its writer holds until it is acknowledged.
const READ_AHEAD_BYTES: u64 = 4 << 20;
const WRITE_WINDOW_BYTES: u64 = 8 << 20;

/// Serves as a task worker until standard input ends; what `cairn task-worker` does.
pub async fn worker_main() -> ExitCode {
    telemetry::init("warn");
    match serve().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("task worker: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn serve() -> Result<()> {
    let reports = Reports::take_stdout()?;
    let mut orders = orders_pipe()?;
    let mut context: Option<Arc<Context>> = None;
    loop {
        let order = match read_message::<pb::WorkerOrder>(&mut orders, "the datanode").await {
            Ok(order) => order,
            // The datanode has let go of this worker.
            Err(error) if error.code() == ErrorCode::Unreachable => return Ok(()),
            Err(error) => return Err(error),
        };
        match (order.order, &context) {
            (Some(Order::Job(job)), None) => context = Some(Arc::new(Context::new(job)?)),
            (Some(Order::Task(task)), Some(context)) => {
                let report = run_reporting(Arc::clone(context), task, &reports).await;
                reports.send(report)?;
            }
            _ => return Err(Error::new(ErrorCode::InvalidArgument, "an order out of turn")),
        }
    }
}

/// Standard input, which must be the pipe of a datanode.
fn orders_pipe() -> Result<Receiver> {
    let failed = |error: std::io::Error| {
        Error::io("task-worker is started by a datanode, with pipes as standard input and output", &error)
    };
    let stdin = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3).map_err(|error| failed(error.into()))?;
    Receiver::from_owned_fd(stdin).map_err(failed)
}

/// Where reports go.
#[derive(Clone)]
struct Reports {
    pipe: Arc<Mutex<std::fs::File>>,
}

impl Reports {
    /// Takes standard output for reports; what prints there from now on goes to standard error.
    fn take_stdout() -> Result<Self> {
        let failed = |error: rustix::io::Errno| Error::io("cannot set up the worker's pipes", &error.into());
        let pipe = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdout(), 3).map_err(failed)?;
        rustix::stdio::dup2_stdout(rustix::stdio::stderr()).map_err(failed)?;
        Ok(Self { pipe: Arc::new(Mutex::new(std::fs::File::from(pipe))) })
    }

    fn send(&self, report: Report) -> Result<()> {
        let bytes = dataplane::encode_delimited(&pb::WorkerReport { report: Some(report) });
        // Messages are small and the datanode always reads: this does not block for long.
        let mut pipe = self.pipe.lock().unwrap_or_else(PoisonError::into_inner);
        pipe.write_all(&bytes).map_err(|error| Error::io("the datanode does not listen any more", &error))
    }
}

/// What all tasks of this process share.
struct Context {
    env: Env,
    job: pb::JobDescription,
    place: pb::WorkerJob,
    program: Arc<dyn Program>,
    shares: Shares,
    files: OnceCell<FileSystem>,
}

impl Context {
    fn new(mut place: pb::WorkerJob) -> Result<Self> {
        let job = place.job.take().unwrap_or_default();
        let properties: BTreeMap<String, String> = job.properties.clone().into_iter().collect();
        let program = builtin::program(&job.kind, &properties, job.reducers)?;
        let shares = Shares::of(job.memory_limit);
        Ok(Self { env: Env::system(), program: program.into(), shares, place, job, files: OnceCell::new() })
    }

    async fn files(&self) -> Result<&FileSystem> {
        let connect = || {
            let settings = ClientSettings {
                user: Some(self.job.user.clone()),
                local_node: Some(self.place.node_id.clone()),
                local_rack: Some(self.place.rack.clone()),
                read_ahead_bytes: READ_AHEAD_BYTES,
                write_window_bytes: WRITE_WINDOW_BYTES,
                ..ClientSettings::at(self.job.namenode.clone())
            };
            FileSystem::connect(self.env.clone(), settings)
        };
        self.files.get_or_try_init(connect).await
    }

    fn hello(&self) -> pb::Hello {
        pb::Hello {
            user: self.job.user.clone(),
            cluster_id: self.job.cluster_id.clone(),
            role: "worker".into(),
            peer_id: self.place.node_id.clone(),
            software: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        }
    }

    /// Runs `compute` on a thread with an [`Output`] whose text becomes the file at `path`; the file is complete when this returns.
    async fn with_output<R: Send + 'static>(
        &self,
        path: &str,
        compute: impl FnOnce(Output) -> Result<R> + Send + 'static,
    ) -> Result<R> {
        let options = CreateOptions {
            overwrite: true,
            replication: self.job.output_replication,
            block_size: self.job.output_block_size,
            ..CreateOptions::default()
        };
        let mut writer = self.files().await?.create(path, options).await?;
        let (pieces, mut text) = mpsc::channel::<Bytes>(PIECES);
        let gone = || Error::new(ErrorCode::Io, "the output file cannot be written");
        let output = Output::new(Box::new(move |piece| pieces.blocking_send(piece).map_err(|_| gone())));
        let computed = self.env.work.io(move || compute(output));
        let written = async {
            while let Some(piece) = text.recv().await {
                if let Err(error) = writer.write_bytes(piece).await {
                    // The computation must not wait for a reader that has gone.
                    text.close();
                    while text.recv().await.is_some() {}
                    return Err((writer, error));
                }
            }
            Ok(writer)
        };
        // Both come to their ends; the writer's error is the cause of the computation's.
        let (written, computed) = tokio::join!(written, computed);
        match (written, computed) {
            (Ok(writer), Ok(result)) => writer.close().await.map(|_| result),
            (Err((writer, error)), _) | (Ok(writer), Err(error)) => {
                // What cannot be removed now goes with the staging folder.
                let _ = writer.abort().await;
                Err(error)
            }
        }
    }
}

/// How far the running task is; written by the computing thread, told by another.
#[derive(Default)]
struct Progress {
    bytes: AtomicU64,
    records: AtomicU64,
}

/// One task on its way.
struct Task {
    id: pb::TaskId,
    output_path: String,
    work_dir: PathBuf,
    map_output: PathBuf,
    progress: Arc<Progress>,
}

/// What a task that ended badly reports.
struct Failed {
    error: Error,
    lost: Vec<pb::MapOutputLocation>,
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self { error, lost: Vec::new() }
    }
}

async fn run_reporting(context: Arc<Context>, order: pb::WorkerTask, reports: &Reports) -> Report {
    let progress = Arc::new(Progress::default());
    let clock = context.env.clock.clone();
    let mut running = tokio::spawn(run(context, order, Arc::clone(&progress)));
    let mut told = 0;
    let ended = loop {
        tokio::select! {
            biased;
            ended = &mut running => break ended,
            () = clock.sleep(PROGRESS) => {
                let now = progress.bytes.load(Ordering::Relaxed);
                if now != told {
                    told = now;
                    let records = progress.records.load(Ordering::Relaxed);
                    // If nobody listens, this process is about to be ended.
                    let _ = reports.send(Report::Progress(pb::TaskProgress { bytes: now, records }));
                }
            }
        }
    };
    let failed = match ended {
        Ok(Ok(success)) => return Report::Success(success),
        Ok(Err(failed)) => failed,
        // The panic's own message is in the log.
        Err(panic) => Failed::from(Error::new(ErrorCode::TaskFailed, format!("the task panicked: {panic}"))),
    };
    Report::Failure(pb::TaskFailure { error: Some(failed.error.to_wire()), lost: failed.lost, ..Default::default() })
}

async fn run(context: Arc<Context>, order: pb::WorkerTask, progress: Arc<Progress>) -> Result<pb::TaskSuccess, Failed> {
    let spec = order.task.unwrap_or_default();
    let task = Task {
        id: spec.id.unwrap_or_default(),
        output_path: spec.output_path,
        work_dir: PathBuf::from(order.work_dir),
        map_output: PathBuf::from(order.map_output),
        progress,
    };
    match spec.work {
        Some(Work::Map(map)) => Ok(map::run(&context, task, map.split.unwrap_or_default()).await?),
        Some(Work::Reduce(reduce)) => reduce::run(&context, task, reduce.inputs).await,
        None => Err(Error::new(ErrorCode::InvalidArgument, "a task without work").into()),
    }
}

/// The part of a success that all tasks have.
fn success(counters: &Counters, partition_bytes: Vec<u64>, output_bytes: u64) -> pb::TaskSuccess {
    pb::TaskSuccess {
        counters: counters.iter().map(|(name, value)| (name.to_owned(), value)).collect(),
        partition_bytes,
        output_bytes,
        ..Default::default()
    }
}

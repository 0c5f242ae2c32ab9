//! The worker process: runs tasks of one job, one at a time, for the datanode that started it.
//!
//! # Overview
//! The datanode speaks on standard input and listens on what was standard output: length-delimited [`pb::WorkerOrder`]s and
//! [`pb::WorkerReport`]s. Standard output itself is turned to standard error first thing, so that nothing that user code prints gets in between.
//! The process ends when its standard input does. It keeps its connection to the namenode over all its tasks.
//!
//! A job with an executable of its own makes the node's worker fetch, check and become that ([`program`]); what is served then is the same, with
//! the programs of that executable. What cannot be served is told with every task, so that the driver hears why.
//!
//! # Memory
//! A task's buffers are shares of the job's limit ([`Shares`]); readers and writers of files have fixed windows.

mod cache;
mod content;
mod kept;
mod map;
mod orders;
mod output;
mod portions;
mod program;
mod records;
mod reduce;
mod shuffle;
mod wanted;

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cairn_common::{Env, telemetry};
use cairn_proto::pb::task_spec::Work;
use cairn_proto::pb::worker_order::Order;
use cairn_proto::pb::worker_report::Report;
use cairn_proto::{Error, ErrorCode, Result, dataplane, pb};
use tokio::net::unix::pipe::Receiver;
use tokio::sync::OnceCell;

use cache::NodeCache;
use kept::Kept;
use orders::{Inbox, Orders, next_order, out_of_turn};

use crate::fs::{ClientSettings, FileSystem};
use crate::mapreduce::output::WrittenFile;
use crate::mapreduce::{Counters, Program, Shares, TaskContext, TaskFiles, TaskKind, UserCounters, builtin};

/// How often progress is told.
const PROGRESS: Duration = Duration::from_millis(200);
/// Pieces of a file between the task that reads or writes it and the thread that computes.
const PIECES: usize = 4;
/// File data that a task's reader fetches ahead, and that its writer holds until it is acknowledged.
const READ_AHEAD_BYTES: u64 = 4 << 20;
const WRITE_WINDOW_BYTES: u64 = 8 << 20;

pub use program::WORKER_ARGUMENT;

/// Makes the program of a job by its kind and properties.
pub type MakeProgram = dyn Fn(&str, &BTreeMap<String, String>, u32) -> Result<Box<dyn Program>> + Send + Sync;

/// Serves as a task worker until standard input ends; what `cairn task-worker` does.
pub async fn worker_main() -> ExitCode {
    telemetry::init("warn");
    ended(serve_or_become().await)
}

/// The same in a job's own executable, which a node's worker has become. `descriptor`: the argument after [`WORKER_ARGUMENT`].
pub async fn program_worker_main(descriptor: &str, make: &MakeProgram) -> ExitCode {
    telemetry::init("warn");
    let served = async {
        let place = program::handed_on(descriptor)?;
        serve(orders_pipe()?, Reports::take_stdout()?, Context::new(place, make)).await
    };
    ended(served.await)
}

fn ended(served: Result<()>) -> ExitCode {
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("task worker: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn serve_or_become() -> Result<()> {
    let mut orders = orders_pipe()?;
    let place = match next_order(&mut orders).await? {
        Some(Order::Job(place)) => place,
        Some(_) => return Err(out_of_turn()),
        None => return Ok(()),
    };
    let context = match place.job.as_ref().and_then(|job| job.executable.as_ref()) {
        Some(executable) => Err(become_executable(&place, executable).await),
        None => Context::new(place, &builtin::program),
    };
    serve(orders, Reports::take_stdout()?, context).await
}

/// Fetches the job's executable and goes on as that. Returns only if it cannot.
async fn become_executable(place: &pb::WorkerJob, executable: &pb::Executable) -> Error {
    let fetched = async {
        program::check_target(executable, &place.host)?;
        let env = Env::system();
        let fs = connect(&env, place).await?;
        NodeCache::new(env, place.cache_dir.clone().into()).get(&fs, &executable.path, &executable.sha256).await
    };
    match fetched.await {
        Ok((file, _)) => program::become_program(&file, &executable.path, place),
        Err(error) => error,
    }
}

/// Runs what is ordered. A job that cannot be served fails each of its tasks.
async fn serve(orders: Receiver, reports: Reports, context: Result<Context>) -> Result<()> {
    let context = context.map(Arc::new);
    let mut orders = Orders::read(orders);
    while let Some(order) = orders.next().await? {
        let task = match order {
            Order::Task(task) => task,
            // For a task that has ended meanwhile.
            Order::Inputs(_) => continue,
            Order::Job(_) => return Err(out_of_turn()),
        };
        let report = match &context {
            Ok(context) => run_reporting(Arc::clone(context), task, &mut orders, &reports).await?,
            Err(error) => failure(Failed::from(error.clone())),
        };
        reports.send(report)?;
    }
    Ok(())
}

async fn connect(env: &Env, place: &pb::WorkerJob) -> Result<FileSystem> {
    let job = place.job.clone().unwrap_or_default();
    let settings = ClientSettings {
        user: Some(job.user),
        local_node: Some(place.node_id.clone()),
        local_rack: Some(place.rack.clone()),
        read_ahead_bytes: READ_AHEAD_BYTES,
        write_window_bytes: WRITE_WINDOW_BYTES,
        ..ClientSettings::at(job.namenode)
    };
    FileSystem::connect(env.clone(), settings).await
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
    properties: Arc<BTreeMap<String, String>>,
    place: pb::WorkerJob,
    program: Arc<dyn Program>,
    shares: Shares,
    files: OnceCell<FileSystem>,
    /// Local paths of the job's cache files, once they are there.
    cached: OnceCell<Arc<BTreeMap<String, PathBuf>>>,
    /// Where content is kept for later jobs, if this one has such.
    kept: Option<Kept>,
}

impl Context {
    fn new(place: pb::WorkerJob, make: &MakeProgram) -> Result<Self> {
        let job = place.job.clone().unwrap_or_default();
        let properties: BTreeMap<String, String> = job.properties.clone().into_iter().collect();
        let program = make(&job.kind, &properties, job.reducers)?;
        let shares = Shares::of(job.memory_limit);
        let env = Env::system();
        Ok(Self {
            kept: Kept::of(&env, &place),
            env,
            program: program.into(),
            properties: Arc::new(properties),
            shares,
            place,
            job,
            files: OnceCell::new(),
            cached: OnceCell::new(),
        })
    }

    /// What the program gets to know of a task.
    async fn task_context(&self, task: &Task, shares: &Shares) -> Result<TaskContext> {
        let reduce = task.id.kind() == pb::TaskKind::Reduce;
        Ok(TaskContext {
            job_id: self.job.job_id.clone(),
            user: self.job.user.clone(),
            kind: if reduce { TaskKind::Reduce } else { TaskKind::Map },
            index: task.id.index,
            attempt: task.id.attempt,
            maps: self.job.maps,
            reducers: self.job.reducers,
            node: self.place.node_id.clone(),
            properties: Arc::clone(&self.properties),
            input: None,
            work_dir: task.work_dir.clone(),
            cache_files: Arc::clone(self.cached.get_or_try_init(|| self.fetch_cache_files()).await?),
            memory_limit: self.job.memory_limit,
            program_memory: shares.program,
            user_counters: task.user.clone(),
            files: Some(TaskFiles::new(self.files().await?.clone())),
        })
    }

    async fn files(&self) -> Result<&FileSystem> {
        self.files.get_or_try_init(|| connect(&self.env, &self.place)).await
    }

    /// Puts the job's cache files into its folder on this node, where another worker may have put them already.
    async fn fetch_cache_files(&self) -> Result<Arc<BTreeMap<String, PathBuf>>> {
        let mut paths = BTreeMap::new();
        if self.job.cache_files.is_empty() {
            return Ok(Arc::new(paths));
        }
        let failed = |error: std::io::Error| Error::io("cannot keep the job's cache files", &error);
        // A worker starts in its job's folder.
        let folder = std::env::current_dir().map_err(failed)?.join("cache");
        let (disk, made) = (Arc::clone(&self.env.fs), folder.clone());
        self.env.work.io(move || disk.create_dir_all(&made)).await.map_err(failed)?;
        let fs = self.files().await?;
        let node = NodeCache::new(self.env.clone(), self.place.cache_dir.clone().into());
        for file in &self.job.cache_files {
            let target = folder.join(&file.name);
            if !target.exists() && file.sha256.is_empty() {
                let mode = if file.executable { 0o755 } else { 0o644 };
                cache::fetch(&self.env, fs, &file.path, &target, mode).await?;
            } else if !target.exists() {
                let (_, entry) = node.get(fs, &file.path, &file.sha256).await?;
                match std::fs::hard_link(entry, &target) {
                    Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => return Err(failed(error)),
                    _ => {}
                }
            }
            paths.insert(file.name.clone(), target);
        }
        Ok(Arc::new(paths))
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
}

/// How far the running task is; written by the computing thread, told by another.
#[derive(Default)]
struct Progress {
    bytes: AtomicU64,
    /// Of those, the bytes that were kept on this node by an earlier job.
    kept: AtomicU64,
    records: AtomicU64,
}

/// One task on its way.
struct Task {
    id: pb::TaskId,
    output_path: String,
    work_dir: PathBuf,
    map_output: PathBuf,
    progress: Arc<Progress>,
    user: UserCounters,
    /// Records that killed earlier attempts.
    skip_records: Vec<u64>,
    /// What a reduce is told while it runs.
    inbox: Inbox,
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

async fn run_reporting(
    context: Arc<Context>,
    order: pb::WorkerTask,
    orders: &mut Orders,
    reports: &Reports,
) -> Result<Report> {
    let progress = Arc::new(Progress::default());
    let clock = context.env.clock.clone();
    let (user, inbox) = (UserCounters::default(), Inbox::default());
    let task = order.task.as_ref().and_then(|spec| spec.id);
    let mut running = tokio::spawn(run(context, order, Arc::clone(&progress), user.clone(), inbox.clone()));
    let mut told = pb::TaskProgress::default();
    let mut more = true;
    let ended = loop {
        tokio::select! {
            biased;
            ended = &mut running => break ended,
            order = orders.next(), if more => match order? {
                Some(Order::Inputs(news)) if news.task == task => inbox.put(news.inputs),
                Some(Order::Inputs(_)) => {}
                Some(_) => return Err(out_of_turn()),
                // The datanode lets go of this worker once the task is done.
                None => more = false,
            },
            () = clock.sleep(PROGRESS) => {
                let now = pb::TaskProgress {
                    bytes: progress.bytes.load(Ordering::Relaxed),
                    records: progress.records.load(Ordering::Relaxed),
                    status: user.status(),
                    beats: user.beats(),
                };
                if now != told {
                    told = now.clone();
                    // If nobody listens, this process is about to be ended.
                    let _ = reports.send(Report::Progress(now));
                }
            }
        }
    };
    let failed = match ended {
        Ok(Ok(success)) => return Ok(Report::Success(success)),
        Ok(Err(failed)) => failed,
        // The panic's own message is in the log.
        Err(panic) => Failed::from(Error::new(ErrorCode::TaskFailed, format!("the task panicked: {panic}"))),
    };
    Ok(failure(failed))
}

fn failure(failed: Failed) -> Report {
    Report::Failure(pb::TaskFailure { error: Some(failed.error.to_wire()), lost: failed.lost, ..Default::default() })
}

async fn run(
    context: Arc<Context>,
    order: pb::WorkerTask,
    progress: Arc<Progress>,
    user: UserCounters,
    inbox: Inbox,
) -> Result<pb::TaskSuccess, Failed> {
    let spec = order.task.unwrap_or_default();
    let task = Task {
        id: spec.id.unwrap_or_default(),
        output_path: spec.output_path,
        work_dir: PathBuf::from(order.work_dir),
        map_output: PathBuf::from(order.map_output),
        progress,
        user,
        skip_records: spec.skip_records,
        inbox,
    };
    match spec.work {
        Some(Work::Map(map)) => Ok(map::run(&context, task, map.split.unwrap_or_default()).await?),
        Some(Work::Reduce(reduce)) => reduce::run(&context, task, reduce.inputs).await,
        None => Err(Error::new(ErrorCode::InvalidArgument, "a task without work").into()),
    }
}

/// What a task that ended well reports.
fn success(counters: &Counters, partition_bytes: Vec<u64>, files: Vec<WrittenFile>) -> pb::TaskSuccess {
    let output_bytes = partition_bytes.iter().chain(files.iter().map(|file| &file.bytes)).sum();
    let file = |file: WrittenFile| pb::OutputFile {
        attempt_name: file.attempt_name,
        final_name: file.final_name,
        records: file.records,
        bytes: file.bytes,
    };
    pb::TaskSuccess {
        counters: counters.iter().map(|(name, value)| (name.to_owned(), value)).collect(),
        partition_bytes,
        output_bytes,
        files: files.into_iter().map(file).collect(),
        peak_memory: cairn_common::process::peak_resident_bytes_of_children(),
        ..Default::default()
    }
}

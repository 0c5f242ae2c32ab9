//! What a caller asks for, and how it follows and stops what it asked for.

use std::collections::{BTreeMap, HashMap};

use cairn_proto::mapoutput::MAX_PARTITIONS;
use cairn_proto::{Error, ErrorCode, Result, pb};
use serde::Serialize;
use tokio::sync::watch;

use super::ship::{CacheFile, Executable};
use crate::mapreduce::InputFormat;
use crate::mapreduce::builtin::{self, property};

/// Default memory limit of a task.
pub const DEFAULT_TASK_MEMORY: u64 = 256 << 20;
/// Attempts of a task before its job fails.
pub const MAX_ATTEMPTS: u32 = 4;
/// Thousandths of the maps that are done before the first reduces start.
///
/// Ours only ever take slots that the job's maps have no use for, so it costs the job nothing to have them wait there; what it can cost are slots that
/// other jobs would use. Half of the outputs keep a reduce busy for a while at its start, and what it then waits for is the last wave of maps. Lower
/// (Hadoop's default is 50): more is fetched beside the maps, more slots are held by who waits; higher: less of both.
pub const SLOW_START: u32 = 500;
/// An attempt without progress for so long is given up, unless the job says otherwise.
pub const DEFAULT_TASK_TIMEOUT_MS: u64 = 600_000;
/// Priority of a job that names none.
pub const USUAL_PRIORITY: u32 = 100;
const MAX_PRIORITY: u32 = 1_000;
const MAX_LEASE_MS: u64 = 7 * 24 * 3_600_000;
const MIN_TASK_MEMORY: u64 = 64 << 20;

/// A job to run.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct JobSpec {
    /// Unique, 1 to 64 of `[A-Za-z0-9_-]`; `None`: one is made.
    pub id: Option<String>,
    /// For people.
    pub name: String,
    /// Which program: a built-in one, or one of the executable's.
    pub kind: String,
    /// The program's parameters ([`builtin::property`]).
    pub properties: BTreeMap<String, String>,
    /// Files, folders (all files in them, but names that start with '.' or '_'), or globs.
    pub inputs: Vec<String>,
    /// Folder that must not exist.
    pub output: String,
    /// Number of reducers; `None`: as fits input and cluster. 0: the maps write the output.
    pub reducers: Option<u32>,
    /// Bytes that a task's processes may use.
    pub memory_limit: u64,
    /// Replicas of the output; 0: the cluster's default.
    pub output_replication: u32,
    /// Block size of the output; 0: the cluster's default.
    pub output_block_size: u64,
    /// Largest split, bytes; 0: whole blocks.
    pub split_bytes: u64,
    /// The program's own executable; `None`: the tasks run a built-in program. Set by [`super::Launcher`].
    pub executable: Option<Executable>,
    /// What the records of the input of such a program are. Set by [`super::Launcher`].
    pub input_format: InputFormat,
    /// Files that every task finds on its local disk ([`crate::mapreduce::TaskContext::cache_file`]).
    pub cache_files: Vec<CacheFile>,
    /// Share of slots against other jobs of the same user, 1 to 1000.
    pub priority: u32,
    /// The job fails if it is not done so long after it was submitted, milliseconds; 0: never.
    pub time_limit_ms: u64,
    /// An attempt without progress for so long is killed and has failed, milliseconds; 0: never.
    pub task_timeout_ms: u64,
    /// Nodes keep what they have of the job for so long without a driver, milliseconds; 0: as they are set.
    pub lease_ms: u64,
    /// Attempts of a task before the job fails.
    pub max_attempts: u32,
    /// Second attempts of tasks that lag.
    pub speculative: bool,
    /// Thousandths of the maps that are done before reduces start into slots that no map wants; 1000: all.
    pub slow_start: u32,
    /// Bytes that map outputs and work files may take on one node; 0: as far as the disk goes.
    pub disk_limit: u64,
    /// Thousandths of a core that a task may use, where nodes can hold it to that; 0: no limit.
    pub cpu_limit: u32,
    /// What it shares with jobs before and after it through its nodes. Set by [`super::JobGraph`].
    pub keep: Option<Keep>,
}

/// What tasks keep on their nodes for later jobs, so that these need not read it from the cluster: as much of it as each node has room for. It is found by jobs of
/// the same user that name the same, and forgotten two minutes after the last of them.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Keep {
    /// 1 to 64 of `[A-Za-z0-9_-]`.
    pub name: String,
    /// Of the job's inputs those that later jobs read again.
    pub inputs: Vec<String>,
    /// The output, which later jobs read.
    pub output: bool,
}

impl JobSpec {
    /// A job with the usual settings.
    pub fn new(kind: &str, inputs: Vec<String>, output: &str) -> Self {
        Self {
            id: None,
            name: kind.to_owned(),
            kind: kind.to_owned(),
            properties: BTreeMap::new(),
            inputs,
            output: output.to_owned(),
            reducers: None,
            memory_limit: DEFAULT_TASK_MEMORY,
            output_replication: 0,
            output_block_size: 0,
            split_bytes: 0,
            executable: None,
            input_format: InputFormat::Lines,
            cache_files: Vec::new(),
            priority: USUAL_PRIORITY,
            time_limit_ms: 0,
            task_timeout_ms: DEFAULT_TASK_TIMEOUT_MS,
            lease_ms: 0,
            max_attempts: MAX_ATTEMPTS,
            speculative: true,
            slow_start: SLOW_START,
            disk_limit: 0,
            cpu_limit: 0,
            keep: None,
        }
    }

    /// A word count; `combine`: add up in the map tasks.
    pub fn wordcount(inputs: Vec<String>, output: &str, combine: bool) -> Self {
        Self::new("wordcount", inputs, output).with(property::COMBINE, &combine.to_string())
    }

    /// The lines that match `pattern`; `count`: each different line with how often it occurs.
    pub fn grep(inputs: Vec<String>, output: &str, pattern: &str, count: bool) -> Self {
        Self::new("grep", inputs, output).with(property::PATTERN, pattern).with(property::COUNT, &count.to_string())
    }

    /// Sets a property.
    #[must_use]
    pub fn with(mut self, name: &str, value: &str) -> Self {
        self.properties.insert(name.to_owned(), value.to_owned());
        self
    }

    /// What nodes are told; without what only the driver knows.
    pub(super) fn description(&self) -> pb::JobDescription {
        pb::JobDescription {
            name: self.name.clone(),
            kind: self.kind.clone(),
            properties: self.properties.clone().into_iter().collect(),
            memory_limit: self.memory_limit,
            output_replication: self.output_replication,
            output_block_size: self.output_block_size,
            lease_ms: self.lease_ms,
            task_timeout_ms: self.task_timeout_ms,
            priority: self.priority,
            disk_limit: self.disk_limit,
            cpu_limit: self.cpu_limit,
            executable: self.executable.as_ref().map(Executable::to_wire),
            cache_files: self.cache_files.iter().map(CacheFile::to_wire).collect(),
            keep: self.keep.as_ref().map(|keep| keep.name.clone()).unwrap_or_default(),
            keep_output: self.keep.as_ref().is_some_and(|keep| keep.output),
            ..Default::default()
        }
    }

    /// Checks what can be checked without a cluster.
    pub fn validate(&self) -> Result<()> {
        let refuse = |text: String| Err(Error::new(ErrorCode::InvalidArgument, text));
        let format = self.format()?;
        let generated = matches!(format, InputFormat::Generated { .. });
        if self.inputs.is_empty() != generated {
            let text = if generated {
                "a job that generates its records takes no input"
            } else {
                "a job needs at least one input"
            };
            return refuse(text.into());
        }
        if let Some(reducers) = self.reducers.filter(|reducers| *reducers > MAX_PARTITIONS) {
            return refuse(format!("{reducers} reducers are more than {MAX_PARTITIONS}"));
        }
        if self.memory_limit < MIN_TASK_MEMORY {
            let least = MIN_TASK_MEMORY >> 20;
            return refuse(format!(
                "a task's memory limit must be at least {least} MiB, not {} bytes",
                self.memory_limit
            ));
        }
        self.cache_files.iter().try_for_each(CacheFile::check)?;
        may_skip(&self.properties.clone().into_iter().collect())?;
        if self.split_bytes != 0 && self.split_bytes < 4096 {
            return refuse(format!("splits of {} bytes are too small: at least 4096", self.split_bytes));
        }
        let keep = self.keep.as_ref().map(|keep| &keep.name);
        for (what, name) in [("job id", self.id.as_ref()), ("the name of what is kept,", keep)] {
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
            if let Some(name) = name.filter(|name| !(1..=64).contains(&name.len()) || !name.bytes().all(plain)) {
                return refuse(format!("{what} {name:?} is not 1 to 64 letters, digits, '-' and '_'"));
            }
        }
        if !(1..=MAX_PRIORITY).contains(&self.priority) {
            return refuse(format!("a priority of {} is not 1 to {MAX_PRIORITY}", self.priority));
        }
        if !(1..=100).contains(&self.max_attempts) {
            return refuse(format!("{} attempts of a task are not 1 to 100", self.max_attempts));
        }
        if self.slow_start > 1_000 {
            return refuse(format!("reduces cannot start after {} thousandths of the maps", self.slow_start));
        }
        if self.lease_ms > MAX_LEASE_MS {
            return refuse("a job cannot be kept without a driver for more than a week".into());
        }
        Ok(())
    }

    /// What the records of its input are.
    pub(super) fn format(&self) -> Result<InputFormat> {
        if self.executable.is_some() {
            return Ok(self.input_format);
        }
        Ok(builtin::program(&self.kind, &self.properties, self.reducers.unwrap_or(1))?.input())
    }
}

/// Records that each map of a job with these properties may leave out because its mapper fails on them.
pub(super) fn may_skip(properties: &HashMap<String, String>) -> Result<u64> {
    let Some(text) = properties.get(property::SKIP_RECORDS) else { return Ok(0) };
    text.parse().map_err(|_| {
        let text = format!("property {}: {text:?} is not a number of records", property::SKIP_RECORDS);
        Error::new(ErrorCode::InvalidArgument, text).with_subject(property::SKIP_RECORDS)
    })
}

/// Where a job stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Looks at the input and the cluster.
    #[default]
    Planning,
    /// Maps run.
    Map,
    /// All maps are done, reduces run.
    Reduce,
    /// The output gets its name.
    Commit,
    /// Over, whatever the end.
    Ended,
}

/// What a running job tells of itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct JobProgress {
    /// Where it stands.
    pub phase: Phase,
    /// Maps in all.
    pub maps: u32,
    /// Maps done.
    pub maps_done: u32,
    /// Reduces in all.
    pub reduces: u32,
    /// Reduces done.
    pub reduces_done: u32,
    /// Attempts that run now.
    pub running: u32,
    /// Attempts that failed so far.
    pub attempts_failed: u32,
    /// Bytes of input in all.
    pub bytes: u64,
    /// Bytes of input that maps have taken.
    pub bytes_done: u64,
    /// Maps started on a node that holds their block.
    pub node_local: u32,
    /// Maps started in a rack that holds their block.
    pub rack_local: u32,
    /// Maps started elsewhere.
    pub remote: u32,
}

impl Phase {
    /// "planning", "map", "reduce", "commit", "ended".
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Planning => "planning",
            Self::Map => "map",
            Self::Reduce => "reduce",
            Self::Commit => "commit",
            Self::Ended => "ended",
        }
    }
}

impl JobProgress {
    /// As it is told to nodes and written to the journal.
    pub(super) fn to_wire(self, elapsed_ms: u64) -> pb::JobStatus {
        pb::JobStatus {
            phase: self.phase.as_str().to_owned(),
            maps: self.maps,
            maps_done: self.maps_done,
            reduces: self.reduces,
            reduces_done: self.reduces_done,
            running: self.running,
            attempts_failed: self.attempts_failed,
            bytes: self.bytes,
            bytes_done: self.bytes_done,
            node_local: self.node_local,
            rack_local: self.rack_local,
            remote: self.remote,
            elapsed_ms,
        }
    }
}

/// The job's end of its line to the caller.
pub struct JobObserver {
    pub(super) progress: watch::Sender<JobProgress>,
    pub(super) cancel: watch::Receiver<bool>,
    /// Without a caller the line must stay open.
    _control: Option<JobControl>,
}

/// The caller's end: follow and cancel.
#[derive(Clone)]
pub struct JobControl {
    progress: watch::Receiver<JobProgress>,
    cancel: watch::Sender<bool>,
}

impl JobObserver {
    /// Both ends.
    pub fn new() -> (Self, JobControl) {
        let (progress, progress_seen) = watch::channel(JobProgress::default());
        let (cancel, cancel_seen) = watch::channel(false);
        let control = JobControl { progress: progress_seen, cancel };
        (Self { progress, cancel: cancel_seen, _control: None }, control)
    }

    /// For a caller who only wants the result.
    pub fn none() -> Self {
        let (mut observer, control) = Self::new();
        observer._control = Some(control);
        observer
    }
}

impl JobControl {
    /// The newest progress, and a way to wait for the next.
    pub fn progress(&self) -> watch::Receiver<JobProgress> {
        self.progress.clone()
    }

    /// Asks the job to stop: its tasks are killed and its staging folder is removed; then [`super::run`] returns.
    pub fn cancel(&self) {
        self.cancel.send_replace(true);
    }
}

//! The driver: plans, has the scheduler decide, carries it out, commits.
//!
//! # Consistency
//! All output is written into a staging folder beside the output, named after the job. Each accepted attempt's file gets its final name there by a
//! rename; when all are done, `_SUCCESS` is added and the folder is renamed to the output, never replacing anything. Readers see all or nothing.
//!
//! # Cancellation
//! Through [`super::JobControl::cancel`]: tasks are killed, the staging folder goes. Dropping the future of [`run`] leaves the staging folder, and the
//! nodes end the job when its lease is over.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use bytes::Bytes;
use cairn_proto::path::{join, normalize, split_last};
use cairn_proto::pb::task_event::Event as What;
use cairn_proto::pb::task_spec::Work;
use cairn_proto::{Error, ErrorCode, Result, pb};
use tokio::sync::{mpsc, oneshot};

use super::node::{Command, LinkTarget, News, NodeLink, NodeNews};
use super::plan::{self, Prepared};
use super::report::{JobReport, JobState, Locality, MapSummary, PhaseTimes, ReduceSummary, TaskReport};
use super::scheduler::{AfterSuccess, Assignment, Scheduler, Standing};
use super::ship::{CacheFile, Executable};
use super::spec::{JobObserver, JobProgress, JobSpec, Phase};
use crate::fs::{CreateOptions, FileSystem, RenameMode};
use crate::mapreduce::{Counters, counter};

/// How often progress is told at most.
const PROGRESS_MS: u64 = 100;
/// How long the end of a job waits for the nodes to clean up.
const END_LIMIT: Duration = Duration::from_secs(5);

/// Runs a job to its end. An error means that it was refused before any task ran; how a job that ran has ended is in the report.
pub async fn run(fs: &FileSystem, spec: JobSpec, observer: JobObserver) -> Result<JobReport> {
    spec.validate()?;
    let started_ms = fs.env().clock.mono_ms();
    let output = check_output(fs, &spec.output).await?;
    let prepared = plan::prepare(fs, &spec).await?;
    let created = missing_ancestors(fs, &output).await?;
    let mut driver = Driver::new(fs, spec, &output, prepared, observer, started_ms);
    fs.mkdirs(&driver.staging, 0o755).await?;
    let ended = driver.work().await;
    let report = driver.end(ended).await;
    if report.state != JobState::Succeeded {
        for folder in created {
            // Only what is still empty goes; the first that is not ends it.
            if fs.delete(&folder, false).await.is_err() {
                break;
            }
        }
    }
    Ok(report)
}

/// The output must not exist.
pub async fn check_output(fs: &FileSystem, output: &str) -> Result<String> {
    let output = normalize(output)?;
    if output == "/" || fs.exists(&output).await? {
        let text = format!("output {output} exists already: remove it or choose another name");
        return Err(Error::new(ErrorCode::FileAlreadyExists, text).with_subject(output));
    }
    Ok(output)
}

/// The folders above `path` that do not exist, the lowest first.
async fn missing_ancestors(fs: &FileSystem, path: &str) -> Result<Vec<String>> {
    let mut missing = Vec::new();
    let mut at = path;
    while let Some((parent, _)) = split_last(at) {
        if fs.exists(parent).await? {
            break;
        }
        missing.push(parent.to_owned());
        at = parent;
    }
    Ok(missing)
}

/// How the work ended, if not well.
enum Ended {
    Committed,
    Killed,
    Failed(Error),
}

struct Driver<'a> {
    fs: &'a FileSystem,
    spec: JobSpec,
    output: String,
    staging: String,
    request: pb::RegisterJobRequest,
    scheduler: Scheduler,
    links: HashMap<String, NodeLink>,
    news_sender: mpsc::Sender<NodeNews>,
    news: mpsc::Receiver<NodeNews>,
    observer: JobObserver,
    totals: JobProgress,
    told_ms: u64,
    started_ms: u64,
    /// When each phase began.
    phase_starts: BTreeMap<u8, u64>,
}

impl<'a> Driver<'a> {
    fn new(
        fs: &'a FileSystem,
        spec: JobSpec,
        output: &str,
        prepared: Prepared,
        observer: JobObserver,
        started_ms: u64,
    ) -> Self {
        let env = fs.env();
        let job_id = format!("job-{}-{:04x}", env.clock.wall_ms(), env.entropy.next_u64() & 0xffff);
        let parent = split_last(output).map_or("/", |(parent, _)| parent);
        let staging = join(parent, &format!(".{job_id}.staging"));
        let mut token = vec![0; 16];
        env.entropy.fill(&mut token);
        let job = pb::JobDescription {
            job_id: job_id.clone(),
            name: spec.name.clone(),
            kind: spec.kind.clone(),
            properties: spec.properties.clone().into_iter().collect(),
            user: fs.user().to_owned(),
            namenode: fs.namenode_address().to_owned(),
            cluster_id: prepared.cluster_id,
            memory_limit: spec.memory_limit,
            reducers: prepared.reducers,
            staging: staging.clone(),
            token: Bytes::from(token),
            output_replication: spec.output_replication,
            output_block_size: spec.output_block_size,
            maps: prepared.splits.len() as u32,
            executable: spec.executable.as_ref().map(Executable::to_wire),
            cache_files: spec.cache_files.iter().map(CacheFile::to_wire).collect(),
        };
        let totals = JobProgress {
            maps: prepared.splits.len() as u32,
            reduces: prepared.reducers,
            bytes: prepared.splits.iter().map(|planned| planned.split.length).sum(),
            ..JobProgress::default()
        };
        let (news_sender, news) = mpsc::channel(1_024);
        Self {
            fs,
            spec,
            output: output.to_owned(),
            staging,
            // Each job id has one driver in its life so far; a driver that takes over will have a higher epoch.
            request: pb::RegisterJobRequest { epoch: 1, job: Some(job) },
            scheduler: Scheduler::new(&job_id, prepared.splits, prepared.reducers, prepared.nodes),
            links: HashMap::new(),
            news_sender,
            news,
            observer,
            totals,
            told_ms: 0,
            started_ms,
            phase_starts: BTreeMap::new(),
        }
    }

    fn now_ms(&self) -> u64 {
        self.fs.env().clock.mono_ms()
    }

    fn job(&self) -> &pb::JobDescription {
        static NONE: std::sync::OnceLock<pb::JobDescription> = std::sync::OnceLock::new();
        self.request.job.as_ref().unwrap_or_else(|| NONE.get_or_init(Default::default))
    }

    async fn work(&mut self) -> Ended {
        loop {
            let now_ms = self.now_ms();
            for assignment in self.scheduler.assign(now_ms) {
                self.start(assignment);
            }
            self.tell(false);
            match self.scheduler.standing() {
                Standing::Running => {}
                Standing::Failed(error) => return Ended::Failed(error),
                Standing::AllDone => break,
            }
            let wait_ms = self.scheduler.next_look_ms(now_ms).map_or(1_000, |at| (at - now_ms).clamp(1, 1_000));
            let event = tokio::select! {
                biased;
                () = cancelled(&mut self.observer) => return Ended::Killed,
                event = self.news.recv() => event,
                () = self.fs.env().clock.sleep(Duration::from_millis(wait_ms)) => None,
            };
            if let Some((node, news)) = event {
                self.take(&node, news).await;
                while let Ok((node, news)) = self.news.try_recv() {
                    self.take(&node, news).await;
                }
            }
        }
        self.tell_phase(Phase::Commit);
        tokio::select! {
            biased;
            // Once the rename is under way it is too late.
            committed = commit(self.fs, &self.staging, &self.output, self.expected_files()) => match committed {
                Ok(()) => Ended::Committed,
                Err(error) => Ended::Failed(error),
            },
        }
    }

    /// Names of all files that accepted attempts wrote.
    fn expected_files(&self) -> Vec<String> {
        let accepted = self.scheduler.attempts().filter_map(|(_, _, _, success)| success);
        accepted.flat_map(|success| success.files.iter().map(|file| file.final_name.clone())).collect()
    }

    fn start(&mut self, assignment: Assignment) {
        let task = assignment.task;
        let work = match task.kind() {
            pb::TaskKind::Map => Work::Map(pb::MapTask { split: self.scheduler.split(task.index).cloned() }),
            pb::TaskKind::Reduce => Work::Reduce(pb::ReduceTask { inputs: self.scheduler.map_outputs() }),
        };
        let spec = pb::TaskSpec { id: Some(task), work: Some(work), output_path: self.attempt_path(&task) };
        let node = assignment.node;
        let sent = self.link(&node).is_some_and(|link| link.send(Command::Start(Box::new(spec))));
        if !sent {
            let now_ms = self.now_ms();
            self.scheduler.refused(&node, &task, now_ms);
        }
    }

    fn link(&mut self, node: &str) -> Option<&NodeLink> {
        if !self.links.contains_key(node) {
            let info = self.scheduler.node(node)?;
            let target = LinkTarget {
                env: self.fs.env().clone(),
                node_id: info.id.clone(),
                address: info.address.clone(),
                hello: pb::Hello {
                    user: self.fs.user().to_owned(),
                    role: "client".into(),
                    cluster_id: self.job().cluster_id.clone(),
                    software: env!("CARGO_PKG_VERSION").into(),
                    ..Default::default()
                },
                request: self.request.clone(),
            };
            self.links.insert(node.to_owned(), NodeLink::open(target, self.news_sender.clone()));
        }
        self.links.get(node)
    }

    /// Where one attempt writes; it names its files itself, beside that.
    fn attempt_path(&self, task: &pb::TaskId) -> String {
        let kind = if task.kind() == pb::TaskKind::Reduce { "r" } else { "m" };
        join(&self.staging, &format!(".part-{kind}-{:05}.attempt-{}", task.index, task.attempt))
    }

    async fn take(&mut self, node: &str, news: News) {
        let now_ms = self.now_ms();
        match news {
            News::Refused(task) => self.scheduler.refused(node, &task, now_ms),
            News::NotStarted(task, error) => {
                let failure = pb::TaskFailure { error: Some(error.to_wire()), ..Default::default() };
                self.scheduler.attempt_failed(node, &task, &failure, now_ms);
            }
            News::Lost(error) => {
                self.links.remove(node);
                tracing::info!(node, %error, "a node is lost to the job");
                self.scheduler.node_lost(node, &error, now_ms);
            }
            News::Event(event) => {
                let task = event.task.unwrap_or_default();
                match event.event {
                    Some(What::Progress(progress)) => {
                        if !self.scheduler.progress(node, &task, progress.bytes)
                            && let Some(link) = self.links.get(node)
                        {
                            link.send(Command::Kill(task));
                        }
                    }
                    Some(What::Success(success)) => self.succeeded(node, &task, success).await,
                    Some(What::Failure(failure)) => {
                        let why = failure.error.as_ref().map_or("", |error| &error.message);
                        tracing::info!(
                            node,
                            kind = task.kind().as_str_name(),
                            task.index,
                            task.attempt,
                            why,
                            "attempt failed"
                        );
                        self.scheduler.attempt_failed(node, &task, &failure, now_ms);
                    }
                    None => {}
                }
            }
        }
    }

    async fn succeeded(&mut self, node: &str, task: &pb::TaskId, success: pb::TaskSuccess) {
        let files = success.files.clone();
        if self.scheduler.succeeded(node, task, success) != AfterSuccess::Commit {
            return;
        }
        match self.accept_files(&files).await {
            Ok(()) => self.scheduler.committed(task),
            Err(error) => {
                let failure = pb::TaskFailure { error: Some(error.to_wire()), ..Default::default() };
                let now_ms = self.now_ms();
                self.scheduler.attempt_failed(node, task, &failure, now_ms);
            }
        }
    }

    /// Gives an attempt's files their final names, the main one last: an attempt that is cut off in between is not accepted, and the next one replaces
    /// what it left.
    async fn accept_files(&self, files: &[pb::OutputFile]) -> Result<()> {
        for file in files.iter().rev() {
            let plain = |name: &str| !name.is_empty() && !name.contains('/');
            if !plain(&file.attempt_name) || !plain(&file.final_name) {
                let text = format!("an attempt wants to name {:?} {:?}", file.attempt_name, file.final_name);
                return Err(Error::new(ErrorCode::InvalidArgument, text));
            }
            let (from, to) = (join(&self.staging, &file.attempt_name), join(&self.staging, &file.final_name));
            self.fs.rename(&from, &to, RenameMode::Overwrite).await?;
        }
        Ok(())
    }

    fn phase(&self) -> Phase {
        if self.scheduler.maps_are_done() && self.totals.reduces > 0 { Phase::Reduce } else { Phase::Map }
    }

    fn tell_phase(&mut self, phase: Phase) {
        let now_ms = self.now_ms();
        self.phase_starts.entry(phase as u8).or_insert(now_ms);
        self.totals.phase = phase;
        self.observer.progress.send_replace(self.totals);
    }

    fn tell(&mut self, always: bool) {
        let now_ms = self.now_ms();
        let phase = self.phase();
        if !always && phase == self.totals.phase && now_ms < self.told_ms + PROGRESS_MS {
            return;
        }
        self.told_ms = now_ms;
        (self.totals.maps_done, self.totals.reduces_done) = self.scheduler.done();
        let (maps_failed, reduces_failed) = self.scheduler.attempts_failed();
        let mut now = JobProgress {
            attempts_failed: maps_failed + reduces_failed,
            bytes_done: 0,
            running: 0,
            node_local: 0,
            rack_local: 0,
            remote: 0,
            ..self.totals
        };
        for (_, attempt, split, success) in self.scheduler.attempts() {
            match attempt.locality {
                Some(Locality::Node) => now.node_local += 1,
                Some(Locality::Rack) => now.rack_local += 1,
                Some(Locality::Remote) => now.remote += 1,
                None => {}
            }
            now.running += u32::from(success.is_none());
            let whole = split.map_or(0, |planned| planned.split.length);
            now.bytes_done += if success.is_some() { whole } else { attempt.bytes.min(whole) };
        }
        self.totals = now;
        self.tell_phase(phase);
    }

    /// Ends the job on all nodes, removes what must not stay, and sums up.
    async fn end(mut self, ended: Ended) -> JobReport {
        self.end_on_nodes().await;
        let (state, failure) = match ended {
            Ended::Committed => (JobState::Succeeded, None),
            Ended::Killed => (JobState::Killed, Some(Error::new(ErrorCode::JobFailed, "the job was killed"))),
            Ended::Failed(error) => (JobState::Failed, Some(error)),
        };
        if state != JobState::Succeeded
            && let Err(error) = self.fs.delete(&self.staging, true).await
        {
            tracing::warn!(path = %self.staging, %error, "the staging folder could not be removed");
        }
        self.tell(true);
        let report = self.report(state, failure);
        self.tell_phase(Phase::Ended);
        report
    }

    async fn end_on_nodes(&mut self) {
        let mut waits = Vec::new();
        for link in self.links.values() {
            let (done, wait) = oneshot::channel();
            if link.send(Command::End(done)) {
                waits.push(wait);
            }
        }
        let clock = &self.fs.env().clock;
        let all = async {
            for wait in waits {
                // An error: that link has ended, its node with it.
                let _ = wait.await;
            }
        };
        // The links tell of what they still hear; somebody must listen, or they would block.
        let listen = async { while self.news.recv().await.is_some() {} };
        tokio::select! {
            _ = clock.timeout(END_LIMIT, all) => {}
            () = listen => {}
        }
        self.links.clear();
    }

    fn report(&self, state: JobState, failure: Option<Error>) -> JobReport {
        let now_ms = self.now_ms();
        let (maps_failed, reduces_failed) = self.scheduler.attempts_failed();
        let mut report = JobReport {
            id: self.job().job_id.clone(),
            name: self.spec.name.clone(),
            state,
            wall_ms: now_ms - self.started_ms,
            map: MapSummary { tasks: self.totals.maps, attempts_failed: maps_failed, ..MapSummary::default() },
            reduce: ReduceSummary { tasks: self.totals.reduces, attempts_failed: reduces_failed },
            bytes: Default::default(),
            records: Default::default(),
            output: self.output.clone(),
            phases: self.phases(now_ms),
            counters: Counters::default(),
            tasks: Vec::new(),
            failure,
            stderr_tail: self.scheduler.stderr_tail().to_owned(),
        };
        for ((kind, index), attempt, planned, success) in self.scheduler.attempts() {
            let Some(success) = success else { continue };
            let counters: Counters = success.counters.iter().map(|(name, value)| (name.clone(), *value)).collect();
            let node = self.scheduler.node(&attempt.node);
            let fetched = counters.get(counter::SHUFFLED_BYTES);
            report.tasks.push(TaskReport {
                kind: if kind == pb::TaskKind::Map { "map" } else { "reduce" },
                index,
                attempt: attempt.number,
                node: attempt.node.clone(),
                host: node.map(|node| node.host.clone()).unwrap_or_default(),
                rack: node.map(|node| node.rack.clone()).unwrap_or_default(),
                locality: attempt.locality,
                path: planned.map(|planned| planned.split.path.clone()),
                offset: planned.map_or(0, |planned| planned.split.offset),
                bytes: planned.map_or(fetched, |planned| planned.split.length),
                output_bytes: success.output_bytes,
                elapsed_ms: success.elapsed_ms,
                peak_memory: success.peak_memory,
            });
            report.counters.merge(&counters);
        }
        report.sum_up();
        report
    }

    fn phases(&self, now_ms: u64) -> PhaseTimes {
        let start = |phase: Phase| self.phase_starts.get(&(phase as u8)).copied();
        let commit = start(Phase::Commit).unwrap_or(now_ms);
        let reduce = start(Phase::Reduce).unwrap_or(commit);
        let map = start(Phase::Map).unwrap_or(reduce);
        PhaseTimes {
            plan_ms: map.saturating_sub(self.started_ms),
            map_ms: reduce.saturating_sub(map),
            reduce_ms: commit.saturating_sub(reduce),
            commit_ms: now_ms.saturating_sub(commit),
        }
    }
}

async fn cancelled(observer: &mut JobObserver) {
    if observer.cancel.wait_for(|cancel| *cancel).await.is_err() {
        // Nobody is left who could.
        std::future::pending::<()>().await;
    }
}

/// Makes the staging folder the output.
async fn commit(fs: &FileSystem, staging: &str, output: &str, mut expected: Vec<String>) -> Result<()> {
    expected.sort_unstable();
    for entry in fs.list_all(staging).await? {
        let name = split_last(&entry.path).map_or("", |(_, name)| name);
        // Files of attempts that were given up.
        if expected.binary_search_by(|have| have.as_str().cmp(name)).is_err() {
            fs.delete(&entry.path, true).await?;
        }
    }
    let success = fs.create(&join(staging, "_SUCCESS"), CreateOptions::default()).await?;
    success.close().await?;
    fs.rename(staging, output, RenameMode::NoReplace).await.map_err(|error| match error.code() {
        ErrorCode::FileAlreadyExists | ErrorCode::DirectoryNotEmpty => {
            let text = format!("output {output} appeared while the job ran; it was left alone");
            Error::new(ErrorCode::FileAlreadyExists, text).with_subject(output)
        }
        _ => error,
    })
}

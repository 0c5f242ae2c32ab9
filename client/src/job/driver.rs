//! The driver: has the scheduler decide, carries it out, writes down what was decided, commits.
//!
//! # Consistency
//! All output is written into a staging folder beside the output, named after the job. Each accepted attempt's file gets its final name there by a
//! rename; when all are done, `_SUCCESS` is added and the folder is renamed to the output, never replacing anything. Readers see all or nothing.
//!
//! # Crash
//! What counts is in the job's journal before it is acted on ([`super::journal`]); another driver goes on from there ([`super::resume`]). One that was
//! only paused finds its journal closed, its epoch refused by the nodes and its staging folder gone, and ends without changing anything.
//!
//! # Cancellation
//! Through [`super::JobControl::cancel`]: tasks are killed, the staging folder goes. Dropping the future of [`run`] is like a crash.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use cairn_proto::pb::job_record::Record;
use cairn_proto::pb::task_spec::Work;
use cairn_proto::{Error, ErrorCode, Result, pb};
use tokio::sync::{mpsc, oneshot, watch};

use super::commit;
use super::history;
use super::journal::{Journal, Written, staging_path};
use super::node::{Command, LinkTarget, NodeLink, NodeNews};
use super::report::{JobReport, JobState, Locality, PhaseTimes};
use super::scheduler::{ATTEMPTS_PER_EPOCH, Assignment, Feed, NodeInfo, Rules, Scheduler, Standing};
use super::spec::{self, JobObserver, JobProgress, JobSpec, Phase};
use super::submit::{self, Submission};
use crate::fs::FileSystem;

/// How often progress is told at most.
const PROGRESS_MS: u64 = 100;
/// How often progress is written to the journal, so that its age tells whether the driver lives.
pub(super) const BEAT_MS: u64 = 20_000;
/// How often it is looked whether the output has appeared meanwhile: then the job cannot end well, and the sooner it ends the better.
const OUTPUT_LOOK_MS: u64 = 5_000;
/// How long the end of a job waits for the nodes to clean up.
const END_LIMIT: Duration = Duration::from_secs(5);
/// How long a driver that takes over waits for the nodes to say what they hold.
const MEET_LIMIT: Duration = Duration::from_secs(5);
/// And one that only wants to know what earlier jobs have kept there for its own.
const KEPT_LIMIT: Duration = Duration::from_millis(500);
/// A driver looks for what dead ones left when it has run for so long; short jobs have better to do.
const SWEEP_AFTER: Duration = Duration::from_secs(3);

/// Runs a job to its end. An error means that it was refused before any task ran, or that another driver has taken it over; how a job that ran has ended
/// is in the report.
pub async fn run(fs: &FileSystem, spec: JobSpec, observer: JobObserver) -> Result<JobReport> {
    let started_ms = fs.env().clock.mono_ms();
    let Submission { written, journal, nodes } =
        submit::submit(fs, &spec, |written| vec![driver_record(written, 1)]).await?;
    let mut driver = Driver::new(fs, written, 1, journal, nodes, observer);
    (driver.began_ms, driver.started_ms) = (started_ms, started_ms.cast_signed());
    driver.drive().await
}

/// The first record of a driver.
pub(super) fn driver_record(written: &Written, epoch: u64) -> Record {
    let place = format!("{} (process {})", cairn_common::process::host_name(), std::process::id());
    let staging = staging_path(&written.submitted.output, &written.job().job_id, epoch);
    Record::Driver(pb::JobDriver { epoch, place, staging })
}

/// How the work ended.
pub(super) enum Ended {
    Committed,
    Killed,
    Failed(Error),
    /// Another driver has the job.
    Superseded(Error),
}

/// Does the error mean that somebody else has the job?
fn is_superseded(error: &Error) -> bool {
    matches!(error.code(), ErrorCode::StaleEpoch | ErrorCode::LeaseExpired | ErrorCode::FileNotFound)
}

/// What follows from an error of the journal.
pub(super) fn journal_ended(error: Error) -> Ended {
    if is_superseded(&error) { Ended::Superseded(error) } else { Ended::Failed(error) }
}

pub(super) struct Driver<'a> {
    pub(super) fs: &'a FileSystem,
    pub(super) written: Written,
    pub(super) epoch: u64,
    pub(super) staging: String,
    request: pb::RegisterJobRequest,
    pub(super) scheduler: Scheduler,
    pub(super) journal: Journal,
    pub(super) links: HashMap<String, NodeLink>,
    news_sender: mpsc::Sender<NodeNews>,
    pub(super) news: mpsc::Receiver<NodeNews>,
    observer: JobObserver,
    status: watch::Sender<pb::JobStatus>,
    pub(super) totals: JobProgress,
    told_ms: u64,
    beat_ms: u64,
    /// When it was last looked for the output.
    looked_ms: u64,
    /// When the job was submitted, by this driver's clock; less than 0 if that was before the clock began.
    started_ms: i64,
    /// When this driver began.
    began_ms: u64,
    /// When each phase began.
    phase_starts: BTreeMap<u8, u64>,
    /// Nodes that have not said yet what they hold of the job.
    pub(super) silent: BTreeSet<String>,
}

impl<'a> Driver<'a> {
    /// A driver of a job as it is written down.
    pub(super) fn new(
        fs: &'a FileSystem,
        written: Written,
        epoch: u64,
        journal: Journal,
        nodes: Vec<NodeInfo>,
        observer: JobObserver,
    ) -> Self {
        let submitted = &written.submitted;
        let mut job = written.job();
        let staging = staging_path(&submitted.output, &job.job_id, epoch);
        job.staging.clone_from(&staging);
        let rules = Rules {
            job_id: job.job_id.clone(),
            reduces: job.reducers,
            max_attempts: submitted.max_attempts.max(1),
            speculative: submitted.speculative,
            may_skip: spec::may_skip(&job.properties).unwrap_or(0),
            // One that was written down without had none.
            slow_start: submitted.slow_start.unwrap_or(1_000),
            first_attempt: (epoch.saturating_sub(1) as u32).saturating_mul(ATTEMPTS_PER_EPOCH),
        };
        let totals = JobProgress {
            maps: written.splits.len() as u32,
            reduces: job.reducers,
            bytes: written.splits.iter().map(|planned| planned.split.length).sum(),
            ..JobProgress::default()
        };
        let (news_sender, news) = mpsc::channel(1_024);
        let clock = &fs.env().clock;
        let since_ms = clock.wall_ms().saturating_sub(written.submitted_ms);
        Self {
            fs,
            epoch,
            staging,
            scheduler: Scheduler::new(rules, written.splits.clone(), nodes),
            request: pb::RegisterJobRequest { epoch, job: Some(job) },
            written,
            journal,
            links: HashMap::new(),
            news_sender,
            news,
            observer,
            status: watch::channel(pb::JobStatus::default()).0,
            totals,
            told_ms: 0,
            beat_ms: clock.mono_ms(),
            looked_ms: clock.mono_ms(),
            started_ms: clock.mono_ms().cast_signed().saturating_sub_unsigned(since_ms),
            began_ms: clock.mono_ms(),
            phase_starts: BTreeMap::new(),
            silent: BTreeSet::new(),
        }
    }

    /// Works to the end, and leaves the job behind as it ended.
    pub(super) async fn drive(mut self) -> Result<JobReport> {
        let (fs, clock) = (self.fs.clone(), self.fs.env().clock.clone());
        let sweep = async move {
            clock.sleep(SWEEP_AFTER).await;
            history::sweep(&fs).await;
            std::future::pending::<()>().await;
        };
        let ended = tokio::select! {
            biased;
            ended = self.work() => ended,
            () = sweep => Ended::Killed,
        };
        self.end(ended).await
    }

    pub(super) fn now_ms(&self) -> u64 {
        self.fs.env().clock.mono_ms()
    }

    /// Since the job was submitted.
    pub(super) fn elapsed_ms(&self, now_ms: u64) -> u64 {
        u64::try_from(now_ms.cast_signed().saturating_sub(self.started_ms)).unwrap_or(0)
    }

    pub(super) fn job(&self) -> &pb::JobDescription {
        static NONE: std::sync::OnceLock<pb::JobDescription> = std::sync::OnceLock::new();
        self.request.job.as_ref().unwrap_or_else(|| NONE.get_or_init(Default::default))
    }

    async fn work(&mut self) -> Ended {
        let takes_over = self.epoch > 1;
        let limit = if takes_over { MEET_LIMIT } else { KEPT_LIMIT };
        if (takes_over || !self.job().keep.is_empty())
            && let Some(ended) = self.meet_nodes(limit).await
        {
            return ended;
        }
        let limit_ms = self.written.submitted.time_limit_ms;
        loop {
            let now_ms = self.now_ms();
            for assignment in self.scheduler.assign(now_ms) {
                self.start(assignment);
            }
            self.command_nodes();
            self.feed_reduces(now_ms);
            self.tell(false);
            match self.scheduler.standing() {
                Standing::Running => {}
                Standing::Failed(error) => return Ended::Failed(error),
                Standing::AllDone => break,
            }
            if limit_ms > 0 && self.elapsed_ms(now_ms) > limit_ms {
                let id = &self.job().job_id;
                let text = format!("job {id} was stopped: its time limit is {} s", limit_ms.div_ceil(1_000));
                return Ended::Failed(Error::new(ErrorCode::JobFailed, text).with_subject(id));
            }
            if let Some(ended) = self.beat(now_ms).await {
                return ended;
            }
            if let Some(ended) = self.look_for_output(now_ms).await {
                return ended;
            }
            let wait_ms = self.scheduler.next_look_ms(now_ms).map_or(1_000, |at| (at - now_ms).clamp(1, 1_000));
            let event = tokio::select! {
                biased;
                () = cancelled(&mut self.observer) => return Ended::Killed,
                error = self.journal.failed() => return journal_ended(error),
                event = self.news.recv() => event,
                () = self.fs.env().clock.sleep(Duration::from_millis(wait_ms)) => None,
            };
            if let Some(ended) = self.take_all(event).await {
                return ended;
            }
        }
        self.tell_phase(Phase::Commit);
        self.commit().await
    }

    /// The decision is written down; from there on the only way is forward.
    async fn commit(&mut self) -> Ended {
        let inode = match self.fs.status(&self.staging).await {
            Ok(status) => status.inode,
            Err(error) if error.code() == ErrorCode::FileNotFound => return self.superseded_or_failed(error).await,
            Err(error) => return Ended::Failed(error),
        };
        let record = Record::Committing(pb::JobCommitting { staging_inode: inode });
        if let Err(error) = self.journal.settle(vec![record], true).await {
            return journal_ended(error);
        }
        match commit::commit(self.fs, &self.staging, &self.written.submitted.output, self.expected_files()).await {
            Ok(()) => Ended::Committed,
            Err(error) if error.code() == ErrorCode::FileNotFound => self.superseded_or_failed(error).await,
            Err(error) => Ended::Failed(error),
        }
    }

    /// The staging folder is not where it was: somebody else has the job if the journal cannot be written any more.
    async fn superseded_or_failed(&self, error: Error) -> Ended {
        match self.journal.settle(vec![Record::Beat(self.status.borrow().clone())], true).await {
            Err(fenced) if is_superseded(&fenced) => Ended::Superseded(fenced),
            _ => Ended::Failed(error),
        }
    }

    /// Hears what the nodes hold and run of the job, and what they keep for it, before anything is started.
    async fn meet_nodes(&mut self, limit: Duration) -> Option<Ended> {
        self.link_all();
        self.silent = self.scheduler.node_ids().into_iter().collect();
        let deadline_ms = self.now_ms() + limit.as_millis() as u64;
        while !self.silent.is_empty() {
            let left_ms = deadline_ms.saturating_sub(self.now_ms());
            let event = tokio::select! {
                biased;
                () = cancelled(&mut self.observer) => return Some(Ended::Killed),
                event = self.news.recv() => event,
                () = self.fs.env().clock.sleep(Duration::from_millis(left_ms)) => break,
            };
            if let Some(ended) = self.take_all(event).await {
                return Some(ended);
            }
        }
        // Outputs on nodes that the cluster no longer has are lost.
        let gone: BTreeSet<String> = self.written.accepted.values().map(|one| one.node_id.clone()).collect();
        let now_ms = self.now_ms();
        for node in gone {
            self.scheduler.node_gone(&node, now_ms);
        }
        None
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
        let output_path = commit::attempt_path(&self.staging, &task);
        let skip_records = match task.kind() {
            pb::TaskKind::Map => self.scheduler.condemned(task.index).to_vec(),
            pb::TaskKind::Reduce => Vec::new(),
        };
        let spec = pb::TaskSpec { id: Some(task), work: Some(work), output_path, skip_records };
        let (node, backlog) = (assignment.node, assignment.backlog);
        let sent = self.link(&node).is_some_and(|link| link.send(Command::Start(Box::new(spec), backlog)));
        if !sent {
            let now_ms = self.now_ms();
            self.scheduler.refused(&node, &task, now_ms);
        }
    }

    /// Kills what runs for nothing, and gives up places in queues that are no longer needed.
    fn command_nodes(&mut self) {
        for (node, task) in self.scheduler.take_kills() {
            if let Some(link) = self.links.get(&node) {
                link.send(Command::Kill(task));
            }
        }
        for node in self.scheduler.withdrawals() {
            if let Some(link) = self.links.get(&node) {
                link.send(Command::Ask(0));
            }
        }
    }

    /// Tells reduces that were started early what has come about since.
    fn feed_reduces(&mut self, now_ms: u64) {
        for Feed { node, task, inputs } in self.scheduler.feeds(now_ms) {
            let sent = self.links.get(&node).is_some_and(|link| link.send(Command::Feed(task, inputs)));
            if !sent {
                self.scheduler.not_fed(&node, &task);
            }
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
                status: self.status.subscribe(),
            };
            self.links.insert(node.to_owned(), NodeLink::open(target, self.news_sender.clone()));
        }
        self.links.get(node)
    }

    /// Writes progress down now and then.
    async fn beat(&mut self, now_ms: u64) -> Option<Ended> {
        if now_ms.saturating_sub(self.beat_ms) < BEAT_MS {
            return None;
        }
        self.beat_ms = now_ms;
        let status = self.status.borrow().clone();
        self.journal.note(Record::Beat(status)).await.err().map(journal_ended)
    }

    /// Somebody else's output under the name of this job's ends it.
    async fn look_for_output(&mut self, now_ms: u64) -> Option<Ended> {
        if now_ms.saturating_sub(self.looked_ms) < OUTPUT_LOOK_MS {
            return None;
        }
        self.looked_ms = now_ms;
        let output = &self.written.submitted.output;
        // Who cannot look now looks again, at the latest when the output is to get its name.
        match self.fs.exists(output).await {
            // It may be this very job's, by another driver.
            Ok(true) => Some(self.superseded_or_failed(commit::appeared(output)).await),
            _ => None,
        }
    }

    fn phase(&self) -> Phase {
        if self.scheduler.maps_are_done() && self.totals.reduces > 0 { Phase::Reduce } else { Phase::Map }
    }

    fn tell_phase(&mut self, phase: Phase) {
        let now_ms = self.now_ms();
        self.phase_starts.entry(phase as u8).or_insert(now_ms);
        self.totals.phase = phase;
        self.observer.progress.send_replace(self.totals);
        self.status.send_replace(self.totals.to_wire(self.elapsed_ms(now_ms)));
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

    /// Failures that the drivers before wrote down.
    pub(super) fn restore_failures(&mut self) {
        let [maps, reduces] = self.written.failures;
        self.scheduler.restore_failures(maps, reduces);
    }

    /// Connects to all nodes, so that the job can be ended there whoever started it.
    pub(super) fn link_all(&mut self) {
        for node in self.scheduler.node_ids() {
            self.link(&node);
        }
    }

    /// Ends the job on all nodes, removes what must not stay, sums up, and puts the job into the history.
    pub(super) async fn end(mut self, ended: Ended) -> Result<JobReport> {
        let (state, failure) = match ended {
            Ended::Committed => (JobState::Succeeded, None),
            Ended::Killed => (JobState::Killed, Some(Error::new(ErrorCode::JobFailed, "the job was killed"))),
            Ended::Failed(error) => (JobState::Failed, Some(error)),
            Ended::Superseded(error) => {
                self.links.clear();
                return history::after_supersession(self.fs, &self.job().job_id, error).await;
            }
        };
        self.end_on_nodes().await;
        if state != JobState::Succeeded
            && let Err(error) = commit::remove_traces(self.fs, &self.written.submitted, self.epoch).await
        {
            tracing::warn!(path = %self.staging, %error, "the staging folder could not be removed");
        }
        self.tell(true);
        let now_ms = self.now_ms();
        let report = JobReport::of(&self, state, failure, self.phases(now_ms), now_ms);
        self.tell_phase(Phase::Ended);
        let Self { fs, epoch, journal, .. } = self;
        if let Err(error) = history::bury(fs, epoch, journal, &report).await {
            if is_superseded(&error) && state != JobState::Succeeded {
                // Somebody took the job meanwhile: what becomes of it is not for this driver to say.
                return history::after_supersession(fs, &report.id, error).await;
            }
            // The job is over all the same; whoever looks next puts it away.
            tracing::warn!(job = report.id, %error, "the end of the job could not be written down");
        }
        Ok(report)
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

    fn phases(&self, now_ms: u64) -> PhaseTimes {
        let start = |phase: Phase| self.phase_starts.get(&(phase as u8)).copied();
        let commit = start(Phase::Commit).unwrap_or(now_ms);
        let reduce = start(Phase::Reduce).unwrap_or(commit);
        let map = start(Phase::Map).unwrap_or(reduce);
        PhaseTimes {
            plan_ms: map.saturating_sub(self.began_ms),
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

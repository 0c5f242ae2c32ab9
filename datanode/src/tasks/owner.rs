//! The one owner of the executor's state: takes an event, changes the state, tells those who wait.
//!
//! Beside this file: [`super::starting`] (slots, offers, workers), [`super::ending`] (reports, exits, limits), [`super::drivers`], [`super::listing`].

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use cairn_common::{Env, process};
use cairn_proto::mapoutput::MAX_PARTITIONS;
use cairn_proto::{Error, ErrorCode, Result, pb};
use tokio::sync::{mpsc, oneshot};

use super::account::Account;
use super::cgroup::Groups;
use super::job::{Doom, Job, Watcher, Worker, check_job_id, key_of, text_of, unknown_job};
use super::kept::{self, Kept};
use super::logs;
use super::outputs::JobOutputs;
use super::share::{FairShare, MAX_PRIORITY};
use super::{NodeName, TaskSettings};

/// How often memory is sampled while tasks run.
const SAMPLE_INTERVAL: Duration = Duration::from_millis(50);
/// And while one of them is near its limit: the shorter, the less it can take before it is stopped.
const CLOSE_INTERVAL: Duration = Duration::from_millis(10);
const MAX_WAIT_MS: u32 = 10_000;
const MIN_MEMORY: u64 = 32 << 20;
/// A look that comes so much later than it was due shows that this process itself stood still, or was kept by its disk.
const LATE_MS: u64 = 500;
/// Longest time that a job may ask to be kept without a driver.
const MAX_LEASE_MS: u64 = 7 * 24 * 3_600_000;
/// Ended jobs whose epochs are remembered, so that a late driver cannot bring one back.
pub(super) const REMEMBERED: usize = 1_024;
/// How often old logs are looked for.
const EXPIRE_INTERVAL_MS: u64 = 600_000;

type Reply<A> = oneshot::Sender<Result<A>>;

/// What can happen to the executor.
pub enum Event {
    Register {
        user: String,
        request: pb::RegisterJobRequest,
        reply: Reply<pb::RegisterJobResponse>,
    },
    Start {
        user: String,
        request: pb::StartTaskRequest,
        reply: Reply<pb::StartTaskResponse>,
    },
    Watch {
        user: String,
        request: pb::WatchTasksRequest,
        reply: Reply<pb::WatchTasksResponse>,
    },
    Kill {
        user: String,
        request: pb::KillTaskRequest,
        reply: Reply<pb::KillTaskResponse>,
    },
    End {
        user: String,
        request: pb::EndJobRequest,
        reply: Reply<pb::EndJobResponse>,
    },
    Feed {
        user: String,
        request: pb::FeedTaskRequest,
        reply: Reply<pb::FeedTaskResponse>,
    },
    Ask {
        user: String,
        request: pb::AskSlotsRequest,
        reply: Reply<pb::AskSlotsResponse>,
    },
    List {
        request: pb::ListJobsRequest,
        reply: Reply<pb::ListJobsResponse>,
    },
    StartDriver {
        user: String,
        request: pb::StartDriverRequest,
        reply: Reply<pb::StartDriverResponse>,
    },
    Release {
        user: String,
        request: pb::ReleaseKeptRequest,
        reply: Reply<pb::ReleaseKeptResponse>,
    },
    DriverExited {
        job_id: String,
        how: String,
    },
    /// Bytes of the work folders of busy workers, and what is free on their volume.
    Disk {
        work: Vec<(u64, u64)>,
        free: u64,
    },
    Report {
        worker: u64,
        report: pb::WorkerReport,
    },
    Exited {
        worker: u64,
        how: String,
    },
    Stop {
        reply: oneshot::Sender<()>,
    },
}

/// All state of the executor; see the module.
pub struct Owner {
    pub(super) env: Env,
    pub(super) settings: TaskSettings,
    pub(super) name: NodeName,
    pub(super) root: PathBuf,
    pub(super) events: mpsc::Sender<Event>,
    pub(super) slots_used: Arc<AtomicU32>,
    pub(super) outputs: Arc<JobOutputs>,
    /// Where the kernel holds workers to their limits; else they are sampled.
    pub(super) groups: Option<Groups>,
    /// As whom tasks run; `None`: as the daemon.
    pub(super) account: Option<Account>,
    pub(super) share: FairShare,
    pub(super) jobs: BTreeMap<String, Job>,
    pub(super) workers: HashMap<u64, Worker>,
    pub(super) next_worker: u64,
    /// Detached drivers: leaders of their process groups, by job.
    pub(super) drivers: BTreeMap<String, u32>,
    pub(super) ended: VecDeque<(String, u64)>,
    /// Jobs that their drivers have just ended, since when, as they were.
    pub(super) lately: VecDeque<(u64, pb::JobOnNode)>,
    pub(super) kept: Kept,
    pub(super) stopping: Option<oneshot::Sender<()>>,
    /// When work folders were last measured; a measurement is under way.
    pub(super) measured_ms: u64,
    pub(super) measuring: bool,
    /// A task that runs is near its memory limit.
    pub(super) near_limit: bool,
    expired_ms: u64,
}

/// What an owner is made of.
pub struct Parts {
    pub env: Env,
    pub settings: TaskSettings,
    pub name: NodeName,
    pub root: PathBuf,
    pub events: mpsc::Sender<Event>,
    pub slots_used: Arc<AtomicU32>,
    pub outputs: Arc<JobOutputs>,
    pub groups: Option<Groups>,
    pub account: Option<Account>,
}

impl Owner {
    pub fn new(parts: Parts) -> Self {
        let Parts { env, settings, name, root, events, slots_used, outputs, groups, account } = parts;
        Self {
            share: FairShare::new(settings.slots, settings.user_weights.clone()),
            expired_ms: env.clock.mono_ms(),
            env,
            settings,
            name,
            root,
            events,
            slots_used,
            outputs,
            groups,
            account,
            jobs: BTreeMap::new(),
            workers: HashMap::new(),
            next_worker: 0,
            drivers: BTreeMap::new(),
            ended: VecDeque::new(),
            lately: VecDeque::new(),
            kept: Kept::default(),
            stopping: None,
            measured_ms: 0,
            measuring: false,
            near_limit: false,
        }
    }

    /// Runs until it is stopped.
    pub async fn run(mut self, mut events: mpsc::Receiver<Event>) {
        let (mut sampled_ms, mut looked_ms) = (0, self.env.clock.mono_ms());
        loop {
            // With nothing running there is nothing to watch closely; leases and idle workers can wait a second.
            let busy = self.workers.values().any(|worker| worker.running.is_some());
            let interval = if self.near_limit { CLOSE_INTERVAL } else { SAMPLE_INTERVAL };
            let wait = if busy { interval } else { Duration::from_secs(1) };
            let idle = self.jobs.is_empty() && self.kept.is_empty();
            tokio::select! {
                biased;
                event = events.recv() => match event {
                    Some(event) => self.apply(event).await,
                    None => break,
                },
                () = self.env.clock.sleep(self.until_next_look(wait)), if !idle => {}
            }
            let now_ms = self.env.clock.mono_ms();
            let late_ms = now_ms.saturating_sub(looked_ms + wait.as_millis() as u64);
            if late_ms >= LATE_MS && !idle {
                self.forgive(late_ms, now_ms);
            }
            looked_ms = now_ms;
            if now_ms.saturating_sub(sampled_ms) >= interval.as_millis() as u64 {
                sampled_ms = now_ms;
                self.sample();
                self.upkeep(now_ms).await;
            }
            self.offer(now_ms);
            if self.workers.is_empty() && self.jobs.is_empty() && self.stopping.is_some() {
                break;
            }
        }
        for pid in self.workers.values().map(|worker| worker.handle.pid).chain(self.drivers.values().copied()) {
            process::kill_group(pid);
        }
        if let Some(reply) = self.stopping.take() {
            let _ = reply.send(());
        }
    }

    /// Who could not be heard was not silent.
    pub(super) fn forgive(&mut self, late_ms: u64, now_ms: u64) {
        let later = |at: &mut u64| *at = (*at + late_ms).min(now_ms);
        self.jobs.values_mut().for_each(|job| later(&mut job.heard_ms));
        self.workers
            .values_mut()
            .filter_map(|worker| worker.running.as_mut())
            .for_each(|running| later(&mut running.progress_ms));
    }

    async fn apply(&mut self, event: Event) {
        // An answer that nobody waits for any more is no loss: drivers repeat.
        match event {
            Event::Register { user, request, reply } => {
                let _ = reply.send(self.register(user, request).await);
            }
            Event::Start { user, request, reply } => {
                let _ = reply.send(self.start(&user, request).await);
            }
            Event::Watch { user, request, reply } => self.watch(&user, request, reply),
            Event::Kill { user, request, reply } => {
                let _ = reply.send(self.kill(&user, &request));
            }
            Event::End { user, request, reply } => self.end(&user, &request, reply).await,
            Event::Report { worker, report } => self.report(worker, report).await,
            Event::Exited { worker, how } => self.exited(worker, &how).await,
            Event::Feed { user, request, reply } => {
                let _ = reply.send(self.feed(&user, request));
            }
            Event::Ask { user, request, reply } => {
                let _ = reply.send(self.ask(&user, &request));
            }
            Event::List { request, reply } => {
                let _ = reply.send(Ok(self.list(&request)));
            }
            Event::StartDriver { user, request, reply } => {
                let _ = reply.send(self.start_driver(&user, &request).await);
            }
            Event::Release { user, request, reply } => {
                let _ = reply.send(self.release_kept(&user, &request.keep).await);
            }
            Event::DriverExited { job_id, how } => self.driver_exited(&job_id, &how),
            Event::Disk { work, free } => self.measured(&work, free),
            Event::Stop { reply } => {
                self.stopping = Some(reply);
                for job_id in self.jobs.keys().cloned().collect::<Vec<_>>() {
                    self.end_job(&job_id).await;
                }
            }
        }
        self.slots_used.store(self.used(), Ordering::Relaxed);
    }

    /// Not longer than until a slot that is kept for a job is kept no more.
    fn until_next_look(&self, wait: Duration) -> Duration {
        let now_ms = self.env.clock.mono_ms();
        let left = self.share.next_look_ms().map(|at| Duration::from_millis(at.saturating_sub(now_ms).max(1)));
        left.map_or(wait, |left| left.min(wait))
    }

    pub(super) fn used(&self) -> u32 {
        self.workers.values().filter(|worker| worker.running.is_some()).count() as u32
    }

    /// The job, if `user` with `epoch` may speak for it.
    pub(super) fn job(&mut self, job_id: &str, epoch: u64, user: &str) -> Result<&mut Job> {
        let now_ms = self.env.clock.mono_ms();
        let job = self.jobs.get_mut(job_id).filter(|job| job.ending.is_none()).ok_or_else(|| unknown_job(job_id))?;
        if job.user != user {
            let text = format!("job {job_id} belongs to {}, not to {user}", job.user);
            return Err(Error::new(ErrorCode::PermissionDenied, text).with_subject(job_id));
        }
        if epoch != job.epoch {
            return Err(stale(job_id, epoch, job.epoch));
        }
        job.heard_ms = now_ms;
        Ok(job)
    }

    async fn register(&mut self, user: String, request: pb::RegisterJobRequest) -> Result<pb::RegisterJobResponse> {
        self.check_takes_jobs()?;
        let description = request.job.unwrap_or_default();
        let job_id = description.job_id.clone();
        check_description(&description)?;
        if let Some((_, newest)) = self.ended.iter().find(|(id, newest)| *id == job_id && *newest >= request.epoch) {
            return Err(stale(&job_id, request.epoch, *newest));
        }
        let now_ms = self.env.clock.mono_ms();
        if let Some(job) = self.jobs.get_mut(&job_id) {
            if job.user != user {
                let text = format!("job {job_id} belongs to {}, not to {user}", job.user);
                return Err(Error::new(ErrorCode::PermissionDenied, text).with_subject(job_id));
            }
            let ended = job.ending.is_some();
            if request.epoch < job.epoch || ended && !job.unheard && request.epoch == job.epoch {
                return Err(stale(&job_id, request.epoch, job.epoch));
            }
            if ended {
                let text = format!("what ran of job {job_id} here is still being ended");
                return Err(Error::new(ErrorCode::Busy, text).with_subject(job_id));
            }
            job.epoch = request.epoch;
            job.heard_ms = now_ms;
        } else {
            let dir = self.root.join(&job_id);
            self.make_folders(&dir, &user).await?;
            self.outputs.add_job(&job_id, dir.join("out"), description.token.clone());
            self.share.add(&job_id, &user, description.priority, now_ms);
            self.jobs.insert(job_id.clone(), Job::new(description, user, request.epoch, dir, now_ms));
        }
        let kept = self.kept_for(&job_id).await;
        let (held, running) = self.holdings(&job_id);
        Ok(pb::RegisterJobResponse {
            node_id: self.name.node_id.clone(),
            slots: self.settings.slots,
            slots_used: self.used(),
            lease_ms: self.jobs.get(&job_id).map_or(0, |job| job.lease_ms(self.settings.lease_ms)),
            held,
            running,
            kept,
        })
    }

    /// What earlier jobs have kept for this one, in the folder that is made for it if it is the first.
    async fn kept_for(&mut self, job_id: &str) -> Vec<pb::KeptContent> {
        let Some(job) = self.jobs.get(job_id).filter(|job| !job.description.keep.is_empty()) else {
            return Vec::new();
        };
        let dir = self.kept.folder(&self.root, &job.user, &job.description.keep, self.env.clock.mono_ms());
        let (fs, account, shown) = (Arc::clone(&self.env.fs), self.account, text_of(&dir));
        let listed = self.env.work.io(move || {
            kept::make(&*fs, &dir, account)?;
            Ok::<_, std::io::Error>(kept::list(&*fs, &dir))
        });
        listed.await.unwrap_or_else(|error| {
            // Workers that do not find it keep nothing.
            tracing::warn!(dir = shown, %error, "jobs cannot keep content here");
            Vec::new()
        })
    }

    /// What a worker was keeping when it ended.
    pub(super) async fn remove_aside(&self, job_id: &str, pid: u32) {
        let job = self.jobs.get(job_id);
        let Some(dir) = job.and_then(|job| self.kept.find(&job.user, &job.description.keep)) else { return };
        let (fs, dir) = (Arc::clone(&self.env.fs), dir.to_owned());
        self.env.work.io(move || kept::remove_aside(&*fs, &dir, pid)).await;
    }

    fn keeps(&self, user: &str, keep: &str) -> bool {
        self.jobs.values().any(|job| job.user == user && job.description.keep == keep)
    }

    async fn release_kept(&mut self, user: &str, keep: &str) -> Result<pb::ReleaseKeptResponse> {
        if self.keeps(user, keep) {
            let text = format!("a job that uses what is kept as {keep} runs on {}", self.name.host);
            return Err(Error::new(ErrorCode::Busy, text).with_subject(keep));
        }
        let released = self.kept.release(user, keep);
        self.remove_kept(released.into_iter().collect()).await;
        Ok(pb::ReleaseKeptResponse {})
    }

    /// Removes what no job has used for a while.
    pub(super) async fn expire_kept(&mut self, now_ms: u64) {
        let mut kept = std::mem::take(&mut self.kept);
        let over = kept.expire(now_ms, |user, keep| self.keeps(user, keep));
        self.kept = kept;
        self.remove_kept(over).await;
    }

    async fn remove_kept(&self, dirs: Vec<PathBuf>) {
        for dir in dirs {
            let (fs, shown) = (Arc::clone(&self.env.fs), text_of(&dir));
            if let Err(error) = self.env.work.io(move || fs.remove_dir_all(&dir)).await {
                tracing::warn!(dir = shown, %error, "cannot remove what jobs have kept");
            }
        }
    }

    /// What a driver that takes over finds here: maps whose outputs are kept, attempts that run.
    fn holdings(&self, job_id: &str) -> (Vec<pb::TaskId>, Vec<pb::TaskId>) {
        let map = |(index, attempt): &(u32, u32)| pb::TaskId {
            kind: pb::TaskKind::Map as i32,
            index: *index,
            attempt: *attempt,
        };
        let held = self.jobs.get(job_id).map(|job| job.held.iter().map(map).collect()).unwrap_or_default();
        let workers = self.workers.values().filter(|worker| worker.job_id == job_id);
        let running = workers.filter_map(|worker| worker.running.as_ref().filter(|running| running.doomed.is_none()));
        (held, running.map(|running| running.task).collect())
    }

    async fn make_folders(&self, dir: &std::path::Path, user: &str) -> Result<()> {
        let (fs, dir, user) = (Arc::clone(&self.env.fs), dir.to_owned(), user.to_owned());
        let (shown, wall_ms, account) = (text_of(&dir), self.env.clock.wall_ms(), self.account);
        let made = self.env.work.io(move || logs::make_folders(&*fs, &dir, &user, account, wall_ms));
        made.await.map_err(|error| Error::io(format!("cannot make the folders of the job in {shown}"), &error))
    }

    fn watch(&mut self, user: &str, request: pb::WatchTasksRequest, reply: Reply<pb::WatchTasksResponse>) {
        let used = self.used();
        let now_ms = self.env.clock.mono_ms();
        match self.job(&request.job_id, request.epoch, user) {
            Ok(job) => {
                if let Some(status) = request.status {
                    job.status = Some((status, now_ms));
                }
                let deadline_ms = now_ms + u64::from(request.wait_ms.min(MAX_WAIT_MS));
                job.watch(Watcher { after: request.after_sequence, deadline_ms, reply }, now_ms, used);
            }
            Err(error) => {
                let _ = reply.send(Err(error));
            }
        }
    }

    fn kill(&mut self, user: &str, request: &pb::KillTaskRequest) -> Result<pb::KillTaskResponse> {
        self.job(&request.job_id, request.epoch, user)?;
        let key = key_of(request.task.as_ref().unwrap_or(&pb::TaskId::default()));
        for worker in self.workers.values_mut().filter(|worker| worker.job_id == request.job_id) {
            if let Some(running) = worker.running.as_mut().filter(|running| key_of(&running.task) == key) {
                running.doomed.get_or_insert(Doom::Asked);
                worker.kill();
            }
        }
        Ok(pb::KillTaskResponse {})
    }

    async fn end(&mut self, user: &str, request: &pb::EndJobRequest, reply: Reply<pb::EndJobResponse>) {
        // Who ends a job for good need not have registered it here before.
        if let Some(job) = self.jobs.get_mut(&request.job_id).filter(|job| job.user == user) {
            job.epoch = job.epoch.max(request.epoch);
        }
        match self.job(&request.job_id, request.epoch, user) {
            Ok(job) => {
                job.ending = Some(vec![reply]);
                self.list_a_little_longer(&request.job_id);
                self.end_job(&request.job_id).await;
            }
            // A repetition: the job ends or has ended. Or it was never here: then it shall not come.
            Err(error) if error.code() == ErrorCode::FileNotFound => match self.jobs.get_mut(&request.job_id) {
                Some(job) => {
                    // Only who has the job says that it is over for good.
                    job.unheard &= job.user != user || request.epoch < job.epoch;
                    job.ending.get_or_insert_default().push(reply);
                }
                None => {
                    self.remember(&request.job_id, request.epoch);
                    let _ = reply.send(Ok(pb::EndJobResponse {}));
                }
            },
            Err(error) => {
                let _ = reply.send(Err(error));
            }
        }
    }

    fn remember(&mut self, job_id: &str, epoch: u64) {
        if check_job_id(job_id).is_err() || self.ended.iter().any(|(id, newest)| id == job_id && *newest >= epoch) {
            return;
        }
        self.ended.push_back((job_id.to_owned(), epoch));
        if self.ended.len() > REMEMBERED {
            self.ended.pop_front();
        }
    }

    /// Kills what runs of the job; its folders go when the last process has.
    pub(super) async fn end_job(&mut self, job_id: &str) {
        if let Some(job) = self.jobs.get_mut(job_id) {
            job.ending.get_or_insert_default();
        }
        for worker in self.workers.values_mut().filter(|worker| worker.job_id == job_id) {
            if let Some(running) = &mut worker.running {
                running.doomed.get_or_insert(Doom::Asked);
            }
            worker.kill();
        }
        self.remove_if_over(job_id).await;
    }

    pub(super) async fn remove_if_over(&mut self, job_id: &str) {
        let over = self.jobs.get(job_id).is_some_and(|job| job.ending.is_some());
        if !over || self.workers.values().any(|worker| worker.job_id == job_id) {
            return;
        }
        let Some(mut job) = self.jobs.remove(job_id) else { return };
        self.outputs.remove_job(job_id);
        self.share.remove(job_id, self.env.clock.mono_ms());
        // A driver that was away only may begin here anew.
        self.remember(job_id, if job.unheard { job.epoch.saturating_sub(1) } else { job.epoch });
        let (fs, dir) = (Arc::clone(&self.env.fs), job.dir.clone());
        if let Err(error) = self.env.work.io(move || logs::remove_all_but_logs(&*fs, &dir)).await {
            tracing::warn!(job = job_id, dir = %job.dir.display(), %error, "cannot remove the folders of a job");
        }
        job.dismiss();
    }

    /// Removes logs that were kept long enough.
    pub(super) async fn expire_logs(&mut self, now_ms: u64) {
        if now_ms.saturating_sub(self.expired_ms) < EXPIRE_INTERVAL_MS {
            return;
        }
        self.expired_ms = now_ms;
        let active: Vec<String> = self.jobs.keys().chain(self.drivers.keys()).cloned().collect();
        let (fs, root, keep_ms) = (Arc::clone(&self.env.fs), self.root.clone(), self.settings.log_keep_ms);
        let wall_ms = self.env.clock.wall_ms();
        let expired = self.env.work.io(move || logs::expire(&*fs, &root, &active, wall_ms, keep_ms)).await;
        if let Err(error) = expired {
            tracing::warn!(%error, "cannot remove old logs of tasks");
        }
    }
}

fn stale(job_id: &str, epoch: u64, newest: u64) -> Error {
    let text =
        format!("driver epoch {epoch} of job {job_id} is not the newest, {newest}: another driver has taken over");
    Error::new(ErrorCode::StaleEpoch, text).with_subject(job_id)
}

fn check_description(description: &pb::JobDescription) -> Result<()> {
    check_job_id(&description.job_id)?;
    if description.reducers > MAX_PARTITIONS {
        let text = format!("{} reducers are more than {MAX_PARTITIONS}", description.reducers);
        return Err(Error::new(ErrorCode::InvalidArgument, text));
    }
    if description.memory_limit < MIN_MEMORY {
        let text = format!("a memory limit of {} bytes is less than {MIN_MEMORY}", description.memory_limit);
        return Err(Error::new(ErrorCode::InvalidArgument, text));
    }
    kept::check_name(&description.keep)?;
    if description.lease_ms > MAX_LEASE_MS {
        let text = format!("a lease of {} ms is longer than a week", description.lease_ms);
        return Err(Error::new(ErrorCode::InvalidArgument, text));
    }
    if description.priority > MAX_PRIORITY {
        let text = format!("a priority of {} is more than {MAX_PRIORITY}", description.priority);
        return Err(Error::new(ErrorCode::InvalidArgument, text));
    }
    Ok(())
}

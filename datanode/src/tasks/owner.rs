//! The one owner of the executor's state: takes an event, changes the state, tells those who wait.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use cairn_common::{Env, process};
use cairn_proto::mapoutput::MAX_PARTITIONS;
use cairn_proto::pb::task_event::Event as What;
use cairn_proto::pb::worker_order::Order;
use cairn_proto::pb::worker_report::Report;
use cairn_proto::{Error, ErrorCode, Result, pb};
use tokio::sync::{mpsc, oneshot};

use super::job::{
    Doom, Job, Running, Watcher, Worker, check_job_id, describe, file_name, key_of, text_of, unknown_job,
};
use super::log::AttemptLog;
use super::outputs::{JobOutputs, output_name};
use super::{NodeName, TaskSettings, worker};

/// How often memory is sampled while tasks run.
const SAMPLE_INTERVAL: Duration = Duration::from_millis(50);
/// An idle worker's memory is given back after this.
const IDLE_WORKER_MS: u64 = 10_000;
const MAX_WAIT_MS: u32 = 10_000;
const MIN_MEMORY: u64 = 32 << 20;
/// Ended jobs whose epochs are remembered, so that a late driver cannot bring one back.
const REMEMBERED: usize = 1_024;

type Reply<A> = oneshot::Sender<Result<A>>;

/// What can happen to the executor.
pub enum Event {
    Register { user: String, request: pb::RegisterJobRequest, reply: Reply<pb::RegisterJobResponse> },
    Start { user: String, request: pb::StartTaskRequest, reply: Reply<pb::StartTaskResponse> },
    Watch { user: String, request: pb::WatchTasksRequest, reply: Reply<pb::WatchTasksResponse> },
    Kill { user: String, request: pb::KillTaskRequest, reply: Reply<pb::KillTaskResponse> },
    End { user: String, request: pb::EndJobRequest, reply: Reply<pb::EndJobResponse> },
    Report { worker: u64, report: pb::WorkerReport },
    Exited { worker: u64, how: String },
    Stop { reply: oneshot::Sender<()> },
}

/// All state of the executor; see the module.
pub struct Owner {
    env: Env,
    settings: TaskSettings,
    name: NodeName,
    root: PathBuf,
    events: mpsc::Sender<Event>,
    slots_used: Arc<AtomicU32>,
    outputs: Arc<JobOutputs>,
    jobs: BTreeMap<String, Job>,
    workers: HashMap<u64, Worker>,
    next_worker: u64,
    ended: VecDeque<(String, u64)>,
    stopping: Option<oneshot::Sender<()>>,
}

impl Owner {
    pub fn new(
        env: Env,
        settings: TaskSettings,
        name: NodeName,
        root: PathBuf,
        events: mpsc::Sender<Event>,
        slots_used: Arc<AtomicU32>,
        outputs: Arc<JobOutputs>,
    ) -> Self {
        Self {
            env,
            settings,
            name,
            root,
            events,
            slots_used,
            outputs,
            jobs: BTreeMap::new(),
            workers: HashMap::new(),
            next_worker: 0,
            ended: VecDeque::new(),
            stopping: None,
        }
    }

    /// Runs until it is stopped.
    pub async fn run(mut self, mut events: mpsc::Receiver<Event>) {
        let mut sampled_ms = 0;
        loop {
            // With nothing running there is nothing to watch closely; leases and idle workers can wait a second.
            let busy = self.workers.values().any(|worker| worker.running.is_some());
            let wait = if busy { SAMPLE_INTERVAL } else { Duration::from_secs(1) };
            tokio::select! {
                biased;
                event = events.recv() => match event {
                    Some(event) => self.apply(event).await,
                    None => break,
                },
                () = self.env.clock.sleep(wait), if !self.jobs.is_empty() => {}
            }
            let now_ms = self.env.clock.mono_ms();
            if now_ms.saturating_sub(sampled_ms) >= SAMPLE_INTERVAL.as_millis() as u64 {
                sampled_ms = now_ms;
                self.sample();
                self.upkeep(now_ms).await;
            }
            if self.workers.is_empty() && self.jobs.is_empty() && self.stopping.is_some() {
                break;
            }
        }
        for worker in self.workers.values() {
            process::kill_group(worker.handle.pid);
        }
        if let Some(reply) = self.stopping.take() {
            let _ = reply.send(());
        }
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
            Event::Stop { reply } => {
                self.stopping = Some(reply);
                for job_id in self.jobs.keys().cloned().collect::<Vec<_>>() {
                    self.end_job(&job_id).await;
                }
            }
        }
        self.slots_used.store(self.used(), Ordering::Relaxed);
    }

    fn used(&self) -> u32 {
        self.workers.values().filter(|worker| worker.running.is_some()).count() as u32
    }

    /// The job, if `user` with `epoch` may speak for it.
    fn job(&mut self, job_id: &str, epoch: u64, user: &str) -> Result<&mut Job> {
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
        if !self.settings.loopback && !self.settings.allow_jobs {
            let text = format!(
                "datanode {} takes no jobs: it can be reached from beyond its machine and callers are not \
                 authenticated; start it with --allow-jobs if every host that can reach it is trusted",
                self.name.host
            );
            return Err(Error::new(ErrorCode::PermissionDenied, text));
        }
        if self.stopping.is_some() {
            return Err(Error::new(ErrorCode::Unreachable, "this node is stopping"));
        }
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
            if request.epoch < job.epoch || job.ending.is_some() {
                return Err(stale(&job_id, request.epoch, job.epoch));
            }
            job.epoch = request.epoch;
            job.heard_ms = now_ms;
        } else {
            let dir = self.root.join(&job_id);
            self.make_folders(&dir).await?;
            self.outputs.add_job(&job_id, dir.join("out"), description.token.clone());
            self.jobs.insert(job_id, Job::new(description, user, request.epoch, dir, now_ms));
        }
        Ok(pb::RegisterJobResponse {
            node_id: self.name.node_id.clone(),
            slots: self.settings.slots,
            slots_used: self.used(),
            lease_ms: self.settings.lease_ms,
        })
    }

    async fn make_folders(&self, dir: &std::path::Path) -> Result<()> {
        let (fs, dir) = (Arc::clone(&self.env.fs), dir.to_owned());
        let shown = text_of(&dir);
        let made = self.env.work.io(move || {
            for name in ["out", "work", "log"] {
                fs.create_dir_all(&dir.join(name))?;
            }
            fs.restrict(&dir)
        });
        made.await.map_err(|error| Error::io(format!("cannot make the folders of the job in {shown}"), &error))
    }

    async fn start(&mut self, user: &str, request: pb::StartTaskRequest) -> Result<pb::StartTaskResponse> {
        let spec = request.task.unwrap_or_default();
        let task = spec.id.unwrap_or_default();
        let job = self.job(&request.job_id, request.epoch, user)?;
        if job.started.contains_key(&key_of(&task)) {
            return Ok(pb::StartTaskResponse {});
        }
        let name = file_name(&task);
        let (work_dir, log) = (job.folder("work").join(&name), job.folder("log").join(&name));
        let map_output = job.folder("work").join(format!("{name}.out"));
        if self.used() >= self.settings.slots {
            let text = format!("all {} task slots of {} are taken", self.settings.slots, self.name.host);
            return Err(Error::new(ErrorCode::Busy, text));
        }
        let (fs, dir) = (Arc::clone(&self.env.fs), work_dir.clone());
        let made = self.env.work.io(move || fs.create_dir_all(&dir)).await;
        made.map_err(|error| Error::io(format!("cannot make {}", work_dir.display()), &error))?;
        let log = AttemptLog::open(&self.env, &log).await;
        // From here to the order nothing waits, so that no word of a new worker is missed.
        let number = self.worker_for(&request.job_id)?;
        let order = pb::WorkerTask { task: Some(spec), work_dir: text_of(&work_dir), map_output: text_of(&map_output) };
        let started_ms = self.env.clock.mono_ms();
        if let Some(worker) = self.workers.get_mut(&number) {
            worker.handle.log.begin(log, self.settings.log_bytes);
            worker.running = Some(Running {
                task,
                started_ms,
                peak: 0,
                work_dir,
                map_output,
                sampler: Default::default(),
                doomed: None,
            });
            // The channel has room: the worker is idle. If its process is gone, its exit fails the attempt.
            let _ = worker.handle.orders.try_send(pb::WorkerOrder { order: Some(Order::Task(order)) });
        }
        if let Some(job) = self.jobs.get_mut(&request.job_id) {
            job.started.insert(key_of(&task), ());
        }
        Ok(pb::StartTaskResponse {})
    }

    /// An idle worker of the job, or a new one.
    fn worker_for(&mut self, job_id: &str) -> Result<u64> {
        let idle =
            |worker: &Worker| worker.job_id == job_id && worker.running.is_none() && !worker.handle.orders.is_closed();
        if let Some((number, _)) = self.workers.iter().find(|(_, worker)| idle(worker)) {
            return Ok(*number);
        }
        let job = self.jobs.get(job_id).ok_or_else(|| unknown_job(job_id))?;
        let description = pb::JobDescription { user: job.user.clone(), ..job.description.clone() };
        let hello = pb::WorkerJob {
            job: Some(description),
            node_id: self.name.node_id.clone(),
            host: self.name.host.clone(),
            rack: self.name.rack.clone(),
            // No job has a name that starts with a dot.
            cache_dir: text_of(&self.root.join(".cache")),
        };
        self.next_worker += 1;
        let number = self.next_worker;
        let command = &self.settings.worker_command;
        let handle = worker::start(&self.env, command, &job.dir, hello, number, self.events.clone())?;
        let idle_since_ms = self.env.clock.mono_ms();
        self.workers.insert(number, Worker { job_id: job_id.to_owned(), handle, running: None, idle_since_ms });
        Ok(number)
    }

    fn watch(&mut self, user: &str, request: pb::WatchTasksRequest, reply: Reply<pb::WatchTasksResponse>) {
        let used = self.used();
        let now_ms = self.env.clock.mono_ms();
        match self.job(&request.job_id, request.epoch, user) {
            Ok(job) => {
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
                process::kill_group(worker.handle.pid);
            }
        }
        Ok(pb::KillTaskResponse {})
    }

    async fn end(&mut self, user: &str, request: &pb::EndJobRequest, reply: Reply<pb::EndJobResponse>) {
        match self.job(&request.job_id, request.epoch, user) {
            Ok(job) => {
                job.ending = Some(vec![reply]);
                self.end_job(&request.job_id).await;
            }
            // A repetition: the job ends or has ended.
            Err(error) if error.code() == ErrorCode::FileNotFound => {
                match self.jobs.get_mut(&request.job_id).and_then(|job| job.ending.as_mut()) {
                    Some(waiting) => waiting.push(reply),
                    None => {
                        let _ = reply.send(Ok(pb::EndJobResponse {}));
                    }
                }
            }
            Err(error) => {
                let _ = reply.send(Err(error));
            }
        }
    }

    /// Kills what runs of the job; its folders go when the last process has.
    async fn end_job(&mut self, job_id: &str) {
        if let Some(job) = self.jobs.get_mut(job_id) {
            job.ending.get_or_insert_default();
        }
        for worker in self.workers.values_mut().filter(|worker| worker.job_id == job_id) {
            if let Some(running) = &mut worker.running {
                running.doomed.get_or_insert(Doom::Asked);
            }
            process::kill_group(worker.handle.pid);
        }
        self.remove_if_over(job_id).await;
    }

    async fn remove_if_over(&mut self, job_id: &str) {
        let over = self.jobs.get(job_id).is_some_and(|job| job.ending.is_some());
        if !over || self.workers.values().any(|worker| worker.job_id == job_id) {
            return;
        }
        let Some(mut job) = self.jobs.remove(job_id) else { return };
        self.outputs.remove_job(job_id);
        self.ended.push_back((job_id.to_owned(), job.epoch));
        if self.ended.len() > REMEMBERED {
            self.ended.pop_front();
        }
        let (fs, dir) = (Arc::clone(&self.env.fs), job.dir.clone());
        if let Err(error) = self.env.work.io(move || fs.remove_dir_all(&dir)).await {
            tracing::warn!(job = job_id, dir = %job.dir.display(), %error, "cannot remove the folders of a job");
        }
        job.dismiss();
    }

    async fn report(&mut self, number: u64, report: pb::WorkerReport) {
        let Some(worker) = self.workers.get_mut(&number) else { return };
        let Some(report) = report.report else { return };
        if let Report::Progress(progress) = report {
            let Some(running) = &worker.running else { return };
            let (task, job_id) = (running.task, worker.job_id.clone());
            let used = self.used();
            if let Some(job) = self.jobs.get_mut(&job_id) {
                job.record(task, What::Progress(progress), used);
            }
            return;
        }
        // Of an attempt that is being killed the exit of its worker is the end, whatever it still said.
        let Some(running) = worker.running.take_if(|running| running.doomed.is_none()) else { return };
        worker.idle_since_ms = self.env.clock.mono_ms();
        let (tail, job_id) = (worker.handle.log.tail(), worker.job_id.clone());
        let elapsed_ms = running.elapsed_ms(&self.env.clock);
        let what = match report {
            Report::Success(success) => match self.keep_output(&job_id, &running).await {
                Ok(()) => What::Success(pb::TaskSuccess { elapsed_ms, peak_memory: running.peak, ..success }),
                Err(error) => {
                    What::Failure(pb::TaskFailure { error: Some(error.to_wire()), elapsed_ms, ..Default::default() })
                }
            },
            Report::Failure(failure) => {
                What::Failure(pb::TaskFailure { stderr_tail: tail, elapsed_ms, peak_memory: running.peak, ..failure })
            }
            Report::Progress(_) => return,
        };
        self.finish(&job_id, running, what).await;
    }

    /// Gives a finished map output its name.
    async fn keep_output(&self, job_id: &str, running: &Running) -> Result<()> {
        let Some(job) = self.jobs.get(job_id) else { return Ok(()) };
        if running.task.kind() != pb::TaskKind::Map || job.description.reducers == 0 {
            return Ok(());
        }
        let to = job.folder("out").join(output_name(running.task.index, running.task.attempt));
        let (fs, from) = (Arc::clone(&self.env.fs), running.map_output.clone());
        let renamed = self.env.work.io(move || fs.rename(&from, &to)).await;
        renamed.map_err(|error| Error::io(format!("cannot keep the output of {}", describe(&running.task)), &error))
    }

    async fn finish(&mut self, job_id: &str, running: Running, what: What) {
        let used = self.used();
        self.slots_used.store(used, Ordering::Relaxed);
        if let Some(job) = self.jobs.get_mut(job_id) {
            job.record(running.task, what, used);
        }
        let fs = Arc::clone(&self.env.fs);
        let Running { work_dir, map_output, .. } = running;
        self.env
            .work
            .io(move || {
                // What cannot be removed now goes with the job's folder.
                let _ = fs.remove_dir_all(&work_dir);
                let _ = fs.remove_file(&map_output);
            })
            .await;
    }

    async fn exited(&mut self, number: u64, how: &str) {
        let Some(worker) = self.workers.remove(&number) else { return };
        // Whatever the worker left in its group goes with it.
        process::kill_group(worker.handle.pid);
        let tail = worker.handle.log.tail();
        if let Some(running) = worker.running {
            let elapsed_ms = running.elapsed_ms(&self.env.clock);
            let killed = matches!(running.doomed, Some(Doom::Asked));
            let error = match &running.doomed {
                Some(Doom::OverLimit(error)) => error.clone(),
                Some(Doom::Asked) => {
                    Error::new(ErrorCode::TaskFailed, format!("{} was killed", describe(&running.task)))
                }
                None => {
                    let text = format!("the worker of {} on {} {how}", describe(&running.task), self.name.host);
                    Error::new(ErrorCode::TaskFailed, text)
                }
            };
            let failure = pb::TaskFailure {
                error: Some(error.to_wire()),
                stderr_tail: tail,
                lost: Vec::new(),
                killed,
                elapsed_ms,
                peak_memory: running.peak,
            };
            self.finish(&worker.job_id, running, What::Failure(failure)).await;
        }
        self.remove_if_over(&worker.job_id).await;
    }

    /// Measures every busy worker and kills those over their limit.
    fn sample(&mut self) {
        for worker in self.workers.values_mut() {
            let Some(running) = &mut worker.running else { continue };
            let Some(job) = self.jobs.get(&worker.job_id) else { continue };
            let used = running.sampler.sample(worker.handle.pid);
            running.peak = running.peak.max(used);
            let limit = job.description.memory_limit;
            if used > limit && running.doomed.is_none() {
                let text = format!(
                    "{} on {} was stopped: it used {} MiB of memory, its limit is {} MiB",
                    describe(&running.task),
                    self.name.host,
                    used >> 20,
                    limit >> 20
                );
                running.doomed = Some(Doom::OverLimit(Error::new(ErrorCode::TaskFailed, text)));
                process::kill_group(worker.handle.pid);
            }
        }
    }

    /// Ends jobs whose drivers are gone, lets idle workers go, answers drivers that have waited long enough.
    async fn upkeep(&mut self, now_ms: u64) {
        let used = self.used();
        let mut lost = Vec::new();
        for (job_id, job) in &mut self.jobs {
            job.release_watchers(now_ms, used);
            if job.ending.is_none() && now_ms.saturating_sub(job.heard_ms) > self.settings.lease_ms {
                lost.push(job_id.clone());
            }
        }
        for job_id in lost {
            tracing::warn!(job = job_id, "the job's driver is silent: its tasks are ended");
            self.end_job(&job_id).await;
        }
        for worker in self.workers.values() {
            if worker.running.is_none() && now_ms.saturating_sub(worker.idle_since_ms) > IDLE_WORKER_MS {
                process::kill_group(worker.handle.pid);
            }
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
    Ok(())
}

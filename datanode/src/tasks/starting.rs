//! Slots, and what starts in them.

use std::path::PathBuf;
use std::sync::Arc;

use cairn_common::process;
use cairn_proto::pb::worker_order::Order;
use cairn_proto::{Error, ErrorCode, Result, pb};

use super::job::{Doom, Running, Worker, describe, file_name, key_of, text_of, unknown_job};
use super::log::AttemptLog;
use super::logs::CACHE;
use super::owner::Owner;
use super::worker;

/// Room for orders that is kept for tasks.
const ORDERS_KEPT: usize = 2;

/// Where an attempt works, writes its words and leaves its output.
struct Places {
    work_dir: PathBuf,
    log: PathBuf,
    map_output: PathBuf,
}

impl Owner {
    pub(super) async fn start(&mut self, user: &str, request: pb::StartTaskRequest) -> Result<pb::StartTaskResponse> {
        let spec = request.task.unwrap_or_default();
        let task = spec.id.unwrap_or_default();
        let job = self.job(&request.job_id, request.epoch, user)?;
        if job.started.contains_key(&key_of(&task)) {
            return Ok(pb::StartTaskResponse {});
        }
        let name = file_name(&task);
        let (work_dir, log) = (job.folder("work").join(&name), job.folder("log").join(&name));
        let map_output = job.folder("work").join(format!("{name}.out"));
        let now_ms = self.env.clock.mono_ms();
        if !self.share.take(&request.job_id, request.backlog, now_ms) {
            let text = format!("all {} task slots of {} are taken", self.settings.slots, self.name.host);
            return Err(Error::new(ErrorCode::Busy, text));
        }
        let started = self.start_in_slot(&request.job_id, spec, Places { work_dir, log, map_output }).await;
        if started.is_err() {
            self.share.give_back(&request.job_id, now_ms);
        }
        started
    }

    async fn start_in_slot(
        &mut self,
        job_id: &str,
        spec: pb::TaskSpec,
        places: Places,
    ) -> Result<pb::StartTaskResponse> {
        let Places { work_dir, log, map_output } = places;
        let task = spec.id.unwrap_or_default();
        let (fs, dir) = (Arc::clone(&self.env.fs), work_dir.clone());
        let account = self.account;
        let made = self.env.work.io(move || {
            fs.create_dir_all(&dir)?;
            account.map_or(Ok(()), |account| account.give(&dir))
        });
        let made = made.await;
        made.map_err(|error| Error::io(format!("cannot make {}", work_dir.display()), &error))?;
        let log = AttemptLog::open(&self.env, &log).await;
        // From here to the order nothing waits, so that no word of a new worker is missed.
        let number = self.worker_for(job_id)?;
        let order = pb::WorkerTask { task: Some(spec), work_dir: text_of(&work_dir), map_output: text_of(&map_output) };
        let started_ms = self.env.clock.mono_ms();
        if let Some(worker) = self.workers.get_mut(&number) {
            worker.handle.log.begin(log, self.settings.log_bytes);
            // What an earlier task of this worker needed is not this one's.
            process::forget_peak(worker.handle.pid);
            worker.running = Some(Running {
                task,
                started_ms,
                progress_ms: started_ms,
                bytes: 0,
                memory: 0,
                peak: 0,
                disk_bytes: 0,
                work_dir,
                map_output,
                sampler: Default::default(),
                doomed: None,
            });
            // There is room: it is kept beside what tasks are told while they run. If its process is gone, its exit fails the attempt.
            let _ = worker.handle.orders.try_send(pb::WorkerOrder { order: Some(Order::Task(order)) });
        }
        if let Some(job) = self.jobs.get_mut(job_id) {
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
            cache_dir: text_of(&self.root.join(CACHE)),
            kept_dir: self.kept.find(&job.user, &job.description.keep).map(text_of).unwrap_or_default(),
            kept_bytes: self.settings.kept_bytes,
            disk_reserve: self.settings.disk_reserve,
        };
        self.next_worker += 1;
        let number = self.next_worker;
        let limits = (job.description.memory_limit, job.description.cpu_limit);
        let group = self.groups.as_ref().map(|groups| groups.make(number, limits.0, limits.1)).transpose()?;
        let start = worker::Start {
            command: &self.settings.worker_command,
            dir: &job.dir,
            group: group.as_ref(),
            account: self.account,
        };
        let handle = worker::start(&self.env, &start, hello, number, self.events.clone())?;
        let idle_since_ms = self.env.clock.mono_ms();
        self.workers.insert(number, Worker { job_id: job_id.to_owned(), handle, group, running: None, idle_since_ms });
        Ok(number)
    }

    /// Hands more map outputs on to the reduce that is to fetch them.
    pub(super) fn feed(&mut self, user: &str, request: pb::FeedTaskRequest) -> Result<pb::FeedTaskResponse> {
        self.job(&request.job_id, request.epoch, user)?;
        let task = request.task.unwrap_or_default();
        let serves = |worker: &&Worker| {
            let running = worker.running.as_ref().filter(|running| running.doomed.is_none());
            worker.job_id == request.job_id && running.is_some_and(|running| key_of(&running.task) == key_of(&task))
        };
        let Some(worker) = self.workers.values().find(serves) else { return Ok(pb::FeedTaskResponse {}) };
        let inputs = pb::WorkerInputs { task: Some(task), inputs: request.inputs };
        // The next task must find room, whatever this one has not read yet.
        if worker.handle.orders.capacity() <= ORDERS_KEPT {
            let text = format!("{} has not taken what it was told before", describe(&task));
            return Err(Error::new(ErrorCode::Busy, text));
        }
        // If its process is gone, its exit fails the attempt.
        let _ = worker.handle.orders.try_send(pb::WorkerOrder { order: Some(Order::Inputs(inputs)) });
        Ok(pb::FeedTaskResponse {})
    }

    /// The job waits for so many slots.
    pub(super) fn ask(&mut self, user: &str, request: &pb::AskSlotsRequest) -> Result<pb::AskSlotsResponse> {
        self.job(&request.job_id, request.epoch, user)?;
        let now_ms = self.env.clock.mono_ms();
        self.share.ask(&request.job_id, request.wanted, now_ms);
        Ok(pb::AskSlotsResponse {})
    }

    /// Keeps slots that are free for jobs that wait, and tells their drivers; a job that starves gets one from a job with too many.
    pub(super) fn offer(&mut self, now_ms: u64) {
        let used = self.used();
        for (job_id, slots) in self.share.offers(now_ms) {
            if let Some(job) = self.jobs.get_mut(&job_id) {
                job.offer(slots, used);
            }
        }
        let Some(victim) = self.share.starving(self.settings.starvation_ms, now_ms) else { return };
        let of_victim = self.workers.values_mut().filter(|worker| worker.job_id == victim);
        let running = of_victim.filter_map(|worker| {
            let started_ms = worker.running.as_ref().filter(|running| running.doomed.is_none())?.started_ms;
            Some((started_ms, worker))
        });
        // The youngest has the least to lose.
        let Some((_, worker)) = running.max_by_key(|(started_ms, _)| *started_ms) else { return };
        if let Some(running) = &mut worker.running {
            tracing::info!(job = victim, "an attempt gives way to a job that has waited for too long");
            running.doomed = Some(Doom::Preempted);
            worker.kill();
        }
    }
}

//! How attempts end: by their own report, by their worker's exit, or because they used more than they may.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use cairn_common::durable::{Fs, read_all};
use cairn_common::process;
use cairn_proto::pb::task_event::Event as What;
use cairn_proto::pb::worker_report::Report;
use cairn_proto::{Error, ErrorCode, Result, pb, position};

use super::cgroup::Group;
use super::job::{Doom, Running, describe};
use super::memory::proportional;
use super::outputs::output_name;
use super::owner::{Event, Owner};

/// An idle worker's memory is given back after this.
const IDLE_WORKER_MS: u64 = 10_000;
/// A driver that was not heard for so long waits for no slot. Longer than its pause between two questions can be.
const SILENT_MS: u64 = 5_000;
/// How often work folders are measured.
const MEASURE_INTERVAL_MS: u64 = 1_000;

/// Bytes of all files below a folder; what vanishes meanwhile does not count.
fn tree_bytes(fs: &dyn Fs, dir: &Path) -> u64 {
    let mut bytes = 0;
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs.read_dir(&folder).unwrap_or_default() {
            let path = folder.join(&entry.name);
            match fs.metadata(&path) {
                Ok(Some(found)) if found.is_dir => folders.push(path),
                Ok(Some(found)) => bytes += found.len,
                _ => {}
            }
        }
    }
    bytes
}

impl Owner {
    pub(super) async fn report(&mut self, number: u64, report: pb::WorkerReport) {
        let Some(report) = report.report else { return };
        if let Report::Success(success) = &report
            && self.was_over(number, success)
        {
            return;
        }
        let Some(worker) = self.workers.get_mut(&number) else { return };
        if let Report::Progress(progress) = report {
            let Some(running) = &mut worker.running else { return };
            (running.bytes, running.progress_ms) = (progress.bytes, self.env.clock.mono_ms());
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
            Report::Success(success) => match self.keep_output(&job_id, &running, &success).await {
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
    async fn keep_output(&mut self, job_id: &str, running: &Running, success: &pb::TaskSuccess) -> Result<()> {
        let Some(job) = self.jobs.get_mut(job_id) else { return Ok(()) };
        if running.task.kind() != pb::TaskKind::Map || job.description.reducers == 0 {
            return Ok(());
        }
        let to = job.folder("out").join(output_name(running.task.index, running.task.attempt));
        let (fs, from) = (Arc::clone(&self.env.fs), running.map_output.clone());
        let renamed = self.env.work.io(move || fs.rename(&from, &to)).await;
        renamed.map_err(|error| Error::io(format!("cannot keep the output of {}", describe(&running.task)), &error))?;
        job.held.insert((running.task.index, running.task.attempt));
        job.held_bytes += success.partition_bytes.iter().sum::<u64>();
        Ok(())
    }

    async fn finish(&mut self, job_id: &str, running: Running, what: What) {
        self.share.give_back(job_id, self.env.clock.mono_ms());
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

    pub(super) async fn exited(&mut self, number: u64, how: &str) {
        let Some(worker) = self.workers.remove(&number) else { return };
        // Whatever the worker left in its group goes with it.
        worker.bury();
        self.remove_aside(&worker.job_id, worker.handle.pid).await;
        let tail = worker.handle.log.tail();
        let ran_out = worker.group.as_ref().is_some_and(Group::ran_out);
        if let Some(running) = worker.running {
            let elapsed_ms = running.elapsed_ms(&self.env.clock);
            let (killed, preempted) = match running.doomed {
                Some(Doom::Asked) => (true, false),
                Some(Doom::Preempted) => (true, true),
                _ => (false, false),
            };
            let named = describe(&running.task);
            let fault = |text: String| Error::new(ErrorCode::TaskFailed, text);
            let error = match &running.doomed {
                Some(Doom::Fault(error) | Doom::Late(error)) => error.clone(),
                Some(Doom::Asked) => fault(format!("{named} was killed")),
                Some(Doom::Preempted) => fault(format!("{named} gave way to a job that had waited for too long")),
                None if ran_out => self.over_limit(&worker.job_id, &named, "was stopped: it used", running.peak),
                None => fault(format!("the worker of {named} on {} {how}", self.name.host)),
            };
            // One that had come to its end was at no record in particular.
            let was_on_its_way = !killed && !matches!(running.doomed, Some(Doom::Late(_)));
            let position = if was_on_its_way { self.position(&running.work_dir).await } else { None };
            let error = match &position {
                Some(at) => {
                    Error::new(error.code(), format!("{}; it was at {}", error.message(), position::describe(at)))
                }
                None => error,
            };
            let failure = pb::TaskFailure {
                position,
                error: Some(error.to_wire()),
                stderr_tail: tail,
                lost: Vec::new(),
                killed,
                elapsed_ms,
                peak_memory: running.peak,
                preempted,
            };
            self.finish(&worker.job_id, running, What::Failure(failure)).await;
        }
        self.remove_if_over(&worker.job_id).await;
    }

    /// Where in its input a map was when its worker died; a reduce leaves no such note.
    async fn position(&self, work_dir: &Path) -> Option<pb::RecordPosition> {
        let (fs, path) = (Arc::clone(&self.env.fs), work_dir.join(position::FILE_NAME));
        let read = self.env.work.io(move || read_all(&*fs, &path, position::FILE_BYTES as u64)).await;
        position::decode(&read.ok()?)
    }

    fn over_limit(&self, job_id: &str, task: &str, how: &str, used: u64) -> Error {
        let limit = self.jobs.get(job_id).map_or(0, |job| job.description.memory_limit);
        let host = &self.name.host;
        // Rounded up: never does it seem to have kept to its limit.
        let (used, limit) = (used.max(limit).div_ceil(1 << 20), limit >> 20);
        let text = format!("{task} on {host} {how} {used} MiB of memory, its limit is {limit} MiB");
        Error::new(ErrorCode::TaskFailed, text)
    }

    /// Did an attempt that ended well have more memory at some time than it may? Then it has failed, and its worker is ended.
    fn was_over(&mut self, number: u64, success: &pb::TaskSuccess) -> bool {
        let Some(worker) = self.workers.get_mut(&number).filter(|worker| worker.group.is_none()) else { return false };
        let Some(running) = worker.running.as_mut().filter(|running| running.doomed.is_none()) else { return false };
        let peak = process::peak_resident_bytes_of(worker.handle.pid).max(success.peak_memory);
        running.peak = running.peak.max(peak);
        let Some(job) = self.jobs.get(&worker.job_id) else { return false };
        if peak <= job.description.memory_limit {
            return false;
        }
        let (job_id, named) = (worker.job_id.clone(), describe(&running.task));
        let error = self.over_limit(&job_id, &named, "has ended, but at some time it used", peak);
        self.doom(number, Doom::Late(error));
        true
    }

    /// Measures every busy worker and kills those over their limit.
    pub(super) fn sample(&mut self) {
        let mut over = Vec::new();
        self.near_limit = false;
        for (number, worker) in &mut self.workers {
            let Some(running) = &mut worker.running else { continue };
            let Some(job) = self.jobs.get(&worker.job_id) else { continue };
            let limit = job.description.memory_limit;
            if let Some(group) = &worker.group {
                // The kernel holds it to the limit; this is for people.
                running.memory = group.memory();
            } else {
                running.memory = running.sampler.sample(worker.handle.pid);
                let peak = process::peak_resident_bytes_of(worker.handle.pid);
                running.peak = running.peak.max(peak);
                self.near_limit |= running.memory > limit - limit / 4;
                // Pages that processes share were counted once for each of them.
                let too_much = || peak > limit || running.memory > limit && proportional(worker.handle.pid) > limit;
                if running.doomed.is_none() && too_much() {
                    over.push((*number, running.memory.max(peak)));
                }
            }
            running.peak = running.peak.max(running.memory);
        }
        for (number, used) in over {
            let Some(worker) = self.workers.get(&number) else { continue };
            let Some(running) = &worker.running else { continue };
            let error = self.over_limit(&worker.job_id, &describe(&running.task), "was stopped: it used", used);
            self.doom(number, Doom::Fault(error));
        }
    }

    fn doom(&mut self, number: u64, why: Doom) {
        let Some(worker) = self.workers.get_mut(&number) else { return };
        if let Some(running) = worker.running.as_mut().filter(|running| running.doomed.is_none()) {
            running.doomed = Some(why);
            worker.kill();
        }
    }

    /// Attempts that stand still for longer than their job allows.
    fn stop_hung(&mut self, now_ms: u64) {
        let mut hung = Vec::new();
        for (number, worker) in &self.workers {
            let (Some(running), Some(job)) = (&worker.running, self.jobs.get(&worker.job_id)) else { continue };
            let limit = job.description.task_timeout_ms;
            let still = now_ms.saturating_sub(running.progress_ms);
            if limit > 0 && still > limit && running.doomed.is_none() {
                let text = format!(
                    "{} on {} was stopped: it made no progress for {} s, its limit is {} s",
                    describe(&running.task),
                    self.name.host,
                    still / 1_000,
                    limit / 1_000
                );
                hung.push((*number, Error::new(ErrorCode::TaskFailed, text)));
            }
        }
        hung.into_iter().for_each(|(number, error)| self.doom(number, Doom::Fault(error)));
    }

    /// Has the work folders of what runs measured, off this thread.
    fn measure(&mut self, now_ms: u64) {
        if self.measuring || now_ms.saturating_sub(self.measured_ms) < MEASURE_INTERVAL_MS {
            return;
        }
        let running = self.workers.iter().filter_map(|(number, worker)| Some((*number, worker.running.as_ref()?)));
        let work: Vec<_> =
            running.map(|(number, running)| (number, running.work_dir.clone(), running.map_output.clone())).collect();
        if work.is_empty() {
            return;
        }
        (self.measuring, self.measured_ms) = (true, now_ms);
        let (env, root, events) = (self.env.clone(), self.root.clone(), self.events.clone());
        tokio::spawn(async move {
            let fs = Arc::clone(&env.fs);
            let look = move || {
                let measured = work.iter().map(|(number, dir, output)| {
                    (*number, tree_bytes(&*fs, dir) + fs.metadata(output).ok().flatten().map_or(0, |found| found.len))
                });
                (measured.collect(), fs.space(&root).map_or(u64::MAX, |space| space.available))
            };
            let (work, free) = env.work.io(look).await;
            // Nobody listens only when the executor has ended.
            let _ = events.send(Event::Disk { work, free }).await;
        });
    }

    /// Stops the attempt with the most on disk of a job over its limit, or when the disk itself is nearly full.
    pub(super) fn measured(&mut self, work: &[(u64, u64)], free: u64) {
        self.measuring = false;
        for (number, bytes) in work {
            if let Some(running) = self.workers.get_mut(number).and_then(|worker| worker.running.as_mut()) {
                running.disk_bytes = *bytes;
            }
        }
        let mut over = Vec::new();
        for (job_id, job) in &self.jobs {
            let (limit, used) = (job.description.disk_limit, job.held_bytes + self.work_bytes(job_id));
            let host = &self.name.host;
            let text = if limit > 0 && used > limit {
                format!(
                    "on {host} was stopped: the job's map outputs and work files take {} MiB of disk there, its limit is {} MiB",
                    used >> 20,
                    limit >> 20
                )
            } else if free < self.settings.disk_reserve && used > 0 {
                format!(
                    "on {host} was stopped: its disk is nearly full ({} MiB are left), {} MiB of it the job's",
                    free >> 20,
                    used >> 20
                )
            } else {
                continue;
            };
            let running = self.workers.iter().filter(|(_, worker)| worker.job_id == *job_id);
            let running = running.filter_map(|(number, worker)| Some((number, worker.running.as_ref()?)));
            if let Some((number, running)) = running.max_by_key(|(_, running)| running.disk_bytes) {
                let text = format!("{} {text}", describe(&running.task));
                over.push((*number, Error::new(ErrorCode::DiskFull, text)));
            }
        }
        over.into_iter().for_each(|(number, error)| self.doom(number, Doom::Fault(error)));
    }

    /// Ends jobs whose drivers are gone, lets idle workers go, answers drivers that have waited long enough.
    pub(super) async fn upkeep(&mut self, now_ms: u64) {
        let used = self.used();
        let mut lost = Vec::new();
        for (job_id, job) in &mut self.jobs {
            job.release_watchers(now_ms, used);
            // A slot that is kept for a driver that has gone is a slot that nobody has.
            if job.silent_ms(now_ms) > SILENT_MS {
                self.share.ask(job_id, 0, now_ms);
            }
            if job.ending.is_none() && job.silent_ms(now_ms) > job.lease_ms(self.settings.lease_ms) {
                job.unheard = true;
                lost.push(job_id.clone());
            }
        }
        for job_id in lost {
            tracing::warn!(job = job_id, "the job's driver is silent: its tasks are ended");
            self.end_job(&job_id).await;
        }
        for worker in self.workers.values() {
            if worker.running.is_none() && now_ms.saturating_sub(worker.idle_since_ms) > IDLE_WORKER_MS {
                worker.kill();
            }
        }
        self.stop_hung(now_ms);
        self.measure(now_ms);
        self.expire_kept(now_ms).await;
        self.expire_logs(now_ms).await;
    }
}

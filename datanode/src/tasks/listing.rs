//! What this node holds of jobs, for people.

use cairn_proto::{Error, ErrorCode, Result, pb};

use super::job::Job;
use super::owner::{Owner, REMEMBERED};

/// A job is listed for so long after its driver has ended it.
const LISTED_MS: u64 = 5_000;

impl Owner {
    /// Jobs of all users; one alone if it is named.
    pub(super) fn list(&self, request: &pb::ListJobsRequest) -> pb::ListJobsResponse {
        let now_ms = self.env.clock.mono_ms();
        let wanted = |id: &str| request.job_id.is_empty() || request.job_id == id;
        let mut jobs: Vec<pb::JobOnNode> = Vec::new();
        for (id, job) in self.jobs.iter().filter(|(id, job)| wanted(id) && job.ending.is_none()) {
            jobs.push(self.on_node(id, job, now_ms));
        }
        for (ended_ms, job) in self.lately.iter().filter(|(_, job)| wanted(&job.job_id)) {
            let age_ms = now_ms.saturating_sub(*ended_ms);
            if age_ms < LISTED_MS && !jobs.iter().any(|other| other.job_id == job.job_id) {
                let drives = self.drivers.contains_key(&job.job_id);
                let status_age_ms = job.status_age_ms + age_ms;
                jobs.push(pb::JobOnNode { driver_silent_ms: age_ms, status_age_ms, drives, ..job.clone() });
            }
        }
        for id in self.drivers.keys().filter(|id| wanted(id) && !self.jobs.contains_key(*id)) {
            if !jobs.iter().any(|job| job.job_id == *id) {
                jobs.push(pb::JobOnNode { job_id: id.clone(), drives: true, ..Default::default() });
            }
        }
        pb::ListJobsResponse { jobs }
    }

    fn on_node(&self, id: &str, job: &Job, now_ms: u64) -> pb::JobOnNode {
        let workers = self.workers.values().filter(|worker| worker.job_id == *id);
        let running = workers.filter_map(|worker| worker.running.as_ref()).map(|running| pb::AttemptOnNode {
            task: Some(running.task),
            elapsed_ms: running.elapsed_ms(&self.env.clock),
            bytes: running.bytes,
            memory: running.memory,
            peak_memory: running.peak,
        });
        pb::JobOnNode {
            job_id: id.to_owned(),
            name: job.description.name.clone(),
            kind: job.description.kind.clone(),
            user: job.user.clone(),
            epoch: job.epoch,
            driver_silent_ms: job.silent_ms(now_ms),
            running: running.collect(),
            outputs: job.held.len() as u32,
            waiting: self.share.waiting(id),
            status: job.status.as_ref().map(|(status, _)| status.clone()),
            status_age_ms: job.status.as_ref().map_or(0, |(_, at)| now_ms.saturating_sub(*at)),
            disk_bytes: job.held_bytes + self.work_bytes(id),
            drives: self.drivers.contains_key(id),
        }
    }

    /// A driver ends its job on all nodes and then writes the end down: until that is done, or another driver may come, people see that it works.
    pub(super) fn list_a_little_longer(&mut self, job_id: &str) {
        let now_ms = self.env.clock.mono_ms();
        let Some(job) = self.jobs.get(job_id) else { return };
        let job = self.on_node(job_id, job, now_ms);
        let left = pb::JobOnNode { running: Vec::new(), outputs: 0, waiting: 0, disk_bytes: 0, ..job };
        self.lately.retain(|(ended_ms, other)| now_ms.saturating_sub(*ended_ms) < LISTED_MS && other.job_id != job_id);
        self.lately.push_back((now_ms, left));
        if self.lately.len() > REMEMBERED {
            self.lately.pop_front();
        }
    }

    /// Bytes of the work folders of a job, as they were last looked at.
    pub(super) fn work_bytes(&self, job_id: &str) -> u64 {
        let workers = self.workers.values().filter(|worker| worker.job_id == job_id);
        workers.filter_map(|worker| worker.running.as_ref()).map(|running| running.disk_bytes).sum()
    }

    /// A node beyond loopback takes jobs only if it was told to.
    pub(super) fn check_takes_jobs(&self) -> Result<()> {
        if self.stopping.is_some() {
            return Err(Error::new(ErrorCode::Unreachable, "this node is stopping"));
        }
        if self.settings.loopback || self.settings.allow_jobs {
            return Ok(());
        }
        let text = format!(
            "datanode {} takes no jobs: it can be reached from beyond its machine and callers are not \
             authenticated; start it with --allow-jobs if every host that can reach it is trusted",
            self.name.host
        );
        Err(Error::new(ErrorCode::PermissionDenied, text))
    }
}

//! Jobs from elsewhere: taken over, ended, followed, their logs read.

use std::time::Duration;

use cairn_common::net::rpc;
use cairn_proto::path::join;
use cairn_proto::{Error, ErrorCode, Result, pb};
use serde::Serialize;

use super::commit;
use super::contact;
use super::driver::{Driver, Ended, driver_record};
use super::history::{self, JobEntry};
use super::journal::{self, HISTORY};
use super::plan::{live_nodes, nodes_in};
use super::report::JobReport;
use super::scheduler::NodeInfo;
use super::spec::{JobObserver, JobSpec};
use super::submit::{self, Submission};
use crate::fs::{FileSystem, NodeState};

/// How long a takeover waits for a driver that seems to live to turn out to be dead.
const PATIENCE_MS: u64 = 12_000;
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// Writes a job down and has a node of the cluster drive it; returns its id and that node's name.
pub async fn submit_detached(fs: &FileSystem, spec: &JobSpec) -> Result<(String, String)> {
    let Submission { written, journal, .. } = submit::submit(fs, spec, |_| Vec::new()).await?;
    let job_id = written.job().job_id;
    journal.close().await?;
    match contact::start_driver(fs, &job_id).await {
        Ok(node) => Ok((job_id, node)),
        Err(error) => {
            // Nobody would ever drive it.
            submit::withdraw(fs, &written.submitted).await;
            Err(error)
        }
    }
}

/// Fails unless the job is there and not over.
async fn check_active(fs: &FileSystem, job_id: &str) -> Result<()> {
    if !job_id.is_empty() && fs.exists(&journal::folder(job_id)).await? {
        return Ok(());
    }
    if let Ok(report) = history::report(fs, job_id).await {
        let text = format!("job {job_id} is over: it {}", report.state.in_words());
        return Err(Error::new(ErrorCode::InvalidArgument, text).with_subject(job_id));
    }
    Err(unknown(job_id))
}

fn unknown(job_id: &str) -> Error {
    Error::new(ErrorCode::FileNotFound, format!("there is no job {job_id:?}; `cairn job ls` lists them"))
        .with_subject(job_id)
}

/// Goes on with a job whose driver has gone: what was accepted and is still there is not run again. Unless `force`, a driver that lives is left
/// its job; with it, it is fenced and ends.
pub async fn resume(fs: &FileSystem, job_id: &str, force: bool, observer: JobObserver) -> Result<JobReport> {
    check_active(fs, job_id).await?;
    if !force {
        wait_until_silent(fs, job_id).await?;
    }
    match take(fs, job_id, observer).await? {
        Taken::Open(driver) => {
            let mut driver = *driver;
            restore(&mut driver).await?;
            driver.drive().await
        }
        Taken::Over(report) => Ok(*report),
    }
}

/// Has a node of the cluster go on with a job whose driver has gone; returns the node's name.
pub async fn resume_detached(fs: &FileSystem, job_id: &str) -> Result<String> {
    check_active(fs, job_id).await?;
    wait_until_silent(fs, job_id).await?;
    contact::start_driver(fs, job_id).await
}

/// Ends a job, whoever drives it and wherever: nothing of it runs any more and its staging folder is gone when this returns.
pub async fn kill(fs: &FileSystem, job_id: &str) -> Result<JobReport> {
    check_active(fs, job_id).await?;
    end_without_driver(fs, job_id, Ended::Killed).await
}

pub(super) async fn end_without_driver(fs: &FileSystem, job_id: &str, ended: Ended) -> Result<JobReport> {
    match take(fs, job_id, JobObserver::none()).await? {
        Taken::Open(mut driver) => {
            driver.link_all();
            driver.end(ended).await
        }
        Taken::Over(report) => Ok(*report),
    }
}

async fn wait_until_silent(fs: &FileSystem, job_id: &str) -> Result<()> {
    let clock = &fs.env().clock;
    let started_ms = clock.mono_ms();
    loop {
        let on_nodes = contact::jobs(fs, job_id).await?;
        // The node that asks for this driver to be run says so as well.
        let heard = on_nodes.iter().find(|(_, job)| job.epoch > 0 && job.driver_silent_ms < history::SILENT_MS);
        let Some((node, job)) = heard else { return Ok(()) };
        if clock.mono_ms().saturating_sub(started_ms) > PATIENCE_MS {
            let text = format!(
                "job {job_id} has a driver: {} heard it {} ms ago; --force takes the job from it",
                node.host, job.driver_silent_ms
            );
            return Err(Error::new(ErrorCode::Busy, text).with_subject(job_id));
        }
        clock.sleep(LOOK_AGAIN).await;
    }
}

enum Taken<'a> {
    /// It is ours, and something is left to do.
    Open(Box<Driver<'a>>),
    /// Its end was all but written down.
    Over(Box<JobReport>),
}

/// Fences the driver of a job and becomes the next one.
async fn take<'a>(fs: &'a FileSystem, job_id: &str, observer: JobObserver) -> Result<Taken<'a>> {
    let (written, epoch, journal) = match journal::take_over(fs, job_id).await {
        Ok(taken) => taken,
        Err(error) => {
            // It may have ended meanwhile, and its folder be in the history.
            check_active(fs, job_id).await?;
            return Err(error);
        }
    };
    journal.settle(vec![driver_record(&written, epoch)], true).await?;
    if let Some(ended) = &written.ended {
        let report: JobReport = serde_json::from_slice(&ended.report)
            .map_err(|error| Error::new(ErrorCode::Corrupt, format!("the report of job {job_id}: {error}")))?;
        if let Err(error) = history::bury(fs, epoch, journal, &report).await {
            // Its own driver puts it away at this moment, or whoever looks next does. How it ended is known.
            tracing::debug!(job = job_id, %error, "a job that is over could not be put away");
        }
        return Ok(Taken::Over(Box::new(report)));
    }
    let nodes = live_nodes(fs).await?;
    let mut driver = Driver::new(fs, written, epoch, journal, nodes, observer);
    if let Some(inode) = driver.written.committing
        && commit::is_committed(fs, &driver.written.submitted.output, inode).await?
    {
        let accepted: Vec<_> = driver.written.accepted.values().cloned().collect();
        accepted.iter().for_each(|one| driver.scheduler.restore(one));
        driver.restore_failures();
        driver.link_all();
        return driver.end(Ended::Committed).await.map(|report| Taken::Over(Box::new(report)));
    }
    Ok(Taken::Open(Box::new(driver)))
}

/// Puts the scheduler where the drivers before had got.
async fn restore(driver: &mut Driver<'_>) -> Result<()> {
    let fs = driver.fs;
    let job_id = driver.job().job_id.clone();
    commit::take_staging(fs, &driver.written.submitted.output, &job_id, driver.epoch).await?;
    let accepted: Vec<pb::TaskAccepted> = driver.written.accepted.values().cloned().collect();
    for one in &accepted {
        let Some(task) = &one.task else { continue };
        if driver.scheduler.writes_output(task.kind()) {
            // It was written down before its file got its name.
            let files = one.success.as_ref().map_or(&[][..], |success| &success.files);
            match commit::name_files(fs, &driver.staging, files, true).await {
                Ok(()) => {}
                Err(error) if error.code() == ErrorCode::FileNotFound => continue,
                Err(error) => return Err(error),
            }
        }
        driver.scheduler.restore(one);
    }
    driver.restore_failures();
    Ok(())
}

/// A job as it stands.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct JobView {
    /// As in the list.
    #[serde(flatten)]
    pub entry: JobEntry,
    /// The driver's epoch; 0: none has begun, or it is over.
    pub epoch: u64,
    /// Where its drivers said that they run, the newest.
    pub driver: String,
    /// "planning", "map", "reduce", "commit", "ended".
    pub phase: String,
    /// Bytes of input, and how many of them are done.
    pub bytes: u64,
    /// See `bytes`.
    pub bytes_done: u64,
    /// Attempts that failed so far.
    pub attempts_failed: u32,
    /// What runs where.
    pub attempts: Vec<AttemptView>,
    /// Slots that it waits for, on all nodes.
    pub waiting: u32,
    /// When it is over.
    pub report: Option<JobReport>,
}

/// An attempt that runs.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct AttemptView {
    /// "m3.0": map 3, attempt 0; "r0.1": reduce 0, attempt 1.
    pub task: String,
    /// Name of the node.
    pub node: String,
    /// Since it was started there.
    pub elapsed_ms: u64,
    /// Bytes of input taken.
    pub bytes: u64,
    /// Resident bytes, and the most that were seen.
    pub memory: u64,
    /// See `memory`.
    pub peak_memory: u64,
}

/// "m3.0" of map 3, attempt 0.
pub fn short_name(task: &pb::TaskId) -> String {
    let letter = if task.kind() == pb::TaskKind::Reduce { 'r' } else { 'm' };
    format!("{letter}{}.{}", task.index, task.attempt)
}

/// How a job stands, running or over.
pub async fn status(fs: &FileSystem, job_id: &str) -> Result<JobView> {
    if let Ok(report) = history::report(fs, job_id).await {
        return Ok(ended_view(report));
    }
    let about = match history::about(fs, job_id).await {
        Err(error) if error.code() == ErrorCode::FileNotFound => return Err(unknown(job_id)),
        found => found?,
    };
    if about.ended.is_some() {
        // While it was looked for, or its driver died before it had put the job away.
        return history::last_report(fs, job_id).await.map(ended_view);
    }
    let on_nodes = contact::jobs(fs, job_id).await?;
    // Only the job's own user may read its journal; the others see what the nodes tell.
    let written = journal::read(fs, &journal::folder(job_id))
        .await
        .ok()
        .flatten()
        .map(|(written, _)| written)
        .unwrap_or_default();
    let told = on_nodes.iter().filter(|(_, job)| job.status.is_some()).min_by_key(|(_, job)| job.status_age_ms);
    let progress = told.and_then(|(_, job)| job.status.clone()).or(written.beat).unwrap_or_default();
    let attempts = on_nodes.iter().flat_map(|(node, job)| {
        job.running.iter().map(|one| AttemptView {
            task: short_name(&one.task.unwrap_or_default()),
            node: node.host.clone(),
            elapsed_ms: one.elapsed_ms,
            bytes: one.bytes,
            memory: one.memory,
            peak_memory: one.peak_memory,
        })
    });
    let mut attempts: Vec<AttemptView> = attempts.collect();
    attempts.sort_by(|a, b| (a.task.len(), &a.task).cmp(&(b.task.len(), &b.task)));
    let now_ms = fs.env().clock.wall_ms();
    let references: Vec<_> = on_nodes.iter().collect();
    Ok(JobView {
        entry: history::active_entry(about, &references, now_ms),
        epoch: on_nodes.iter().map(|(_, job)| job.epoch).max().unwrap_or(0).max(written.epoch),
        driver: written.place,
        phase: progress.phase,
        bytes: progress.bytes,
        bytes_done: progress.bytes_done,
        attempts_failed: progress.attempts_failed,
        attempts,
        waiting: on_nodes.iter().map(|(_, job)| job.waiting).sum(),
        report: None,
    })
}

fn ended_view(report: JobReport) -> JobView {
    JobView {
        entry: history::ended_entry(&report),
        epoch: 0,
        driver: String::new(),
        phase: "ended".into(),
        bytes: report.bytes.read,
        bytes_done: report.bytes.read,
        attempts_failed: report.map.attempts_failed + report.reduce.attempts_failed,
        attempts: Vec::new(),
        waiting: 0,
        report: Some(report),
    }
}

/// What an attempt, or a detached driver, has written to its standard error.
#[derive(Clone, PartialEq, Debug)]
pub struct JobLog {
    /// The node that has it.
    pub host: String,
    /// `None`: the driver.
    pub task: Option<pb::TaskId>,
    /// Length.
    pub bytes: u64,
    node: NodeInfo,
}

impl JobLog {
    /// "m3.0", "driver".
    pub fn name(&self) -> String {
        self.task.as_ref().map_or_else(|| "driver".into(), short_name)
    }
}

/// What the nodes have of a job's logs.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct JobLogs {
    /// Those that are not empty, in the order of tasks.
    pub logs: Vec<JobLog>,
    /// Nodes that did not answer though they are not dead, and why: they may have more.
    pub silent: Vec<(String, String)>,
}

/// The logs of a job. Nodes keep them for a day after the job; for the job's own user.
pub async fn logs(fs: &FileSystem, job_id: &str) -> Result<JobLogs> {
    if !fs.exists(&journal::folder(job_id)).await? && !fs.exists(&join(HISTORY, job_id)).await? {
        return Err(unknown(job_id));
    }
    // Those that hang as well: they may have some.
    let nodes = nodes_in(fs, &[NodeState::Live, NodeState::Stale]).await?;
    let answers = contact::ask(fs, nodes, |mut client| {
        let request = pb::ListLogsRequest { job_id: job_id.to_owned() };
        async move { client.list_logs(request).await }
    });
    let (mut logs, mut silent) = (Vec::new(), Vec::new());
    for (node, answer) in answers.await {
        match answer {
            Ok(answer) => logs.extend(answer.logs.into_iter().map(|log| JobLog {
                host: node.host.clone(),
                task: log.task,
                bytes: log.bytes,
                node: node.clone(),
            })),
            // Of a job that never ran there.
            Err(error) if error.code() == ErrorCode::FileNotFound => {}
            Err(error) if error.code() == ErrorCode::PermissionDenied => return Err(error),
            Err(error) => silent.push((node.host.clone(), error.message().to_owned())),
        }
    }
    logs.sort_by_key(|log| log.task.map_or((-1, 0, 0), |task| (task.kind, task.index, task.attempt)));
    silent.sort();
    Ok(JobLogs { logs, silent })
}

/// Reads one log, piece by piece.
pub async fn read_log(fs: &FileSystem, job_id: &str, log: &JobLog, mut each: impl FnMut(&[u8])) -> Result<()> {
    let mut client = contact::client(fs, &log.node).await?;
    let mut offset = 0;
    loop {
        let request = pb::ReadLogRequest { job_id: job_id.to_owned(), task: log.task, offset };
        let piece = client.read_log(request).await.map_err(rpc::error)?.into_inner().data;
        if piece.is_empty() {
            return Ok(());
        }
        each(&piece);
        offset += piece.len() as u64;
    }
}

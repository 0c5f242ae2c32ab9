//! Jobs that are not over, and those that were: what `cairn job ls` shows, and what is tidied up when somebody looks.
//!
//! A driver that was killed cannot remove its staging folder. Its job can be resumed; when it has been without a driver for longer than the nodes
//! keep what they have of it, whoever looks next (a later driver of the same user, `job ls`, `job kill`) ends it as failed, and with it the staging folder.

use cairn_proto::path::{join, split_last};
use cairn_proto::pb::job_record::Record;
use cairn_proto::{Error, ErrorCode, Result, pb};
use futures_util::StreamExt as _;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::time::Duration;

use super::contact;
use super::control;
use super::driver::{BEAT_MS, Ended};
use super::journal::{self, HISTORY, JOBS, Journal};
use super::report::{JobReport, JobState};
use super::ship;
use super::submit::{About, Aside};
use crate::fs::{FileStatus, FileSystem, RenameMode};

/// Jobs of a user that the history keeps.
const MAX_KEPT: usize = 1_000;
/// And for how long.
const KEEP_MS: u64 = 7 * 24 * 3_600_000;
/// Files read at once.
const AT_ONCE: usize = 16;
const MAX_REPORT: u64 = 1 << 30;
/// Nodes keep a job that asks for no other time so long without a driver (their `job_lease_ms`).
const USUAL_LEASE_MS: u64 = 600_000;
/// A folder that never became a job is removed after this.
const UNFINISHED_MS: u64 = 3_600_000;
/// A driver that ends its job has written that down by then, if it can.
const MAX_END_MS: u64 = 10_000;
/// A driver that the nodes have not heard for so long is not there any more.
pub(super) const SILENT_MS: u64 = 3_000;

/// Where a job stands, to whoever asks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// Written down; no driver has it yet.
    Submitted,
    /// A driver works on it.
    Running,
    /// Its driver has gone; it can be resumed.
    Orphaned,
    /// Its output is there.
    Succeeded,
    /// It could not be done.
    Failed,
    /// It was asked to stop.
    Killed,
}

impl From<JobState> for Stage {
    fn from(state: JobState) -> Self {
        match state {
            JobState::Succeeded => Self::Succeeded,
            JobState::Failed => Self::Failed,
            JobState::Killed => Self::Killed,
        }
    }
}

/// One line of the list of jobs.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[allow(missing_docs)] // the names of the JSON shape
pub struct JobEntry {
    pub id: String,
    pub name: String,
    pub kind: String,
    pub user: String,
    pub state: Stage,
    pub output: String,
    /// Milliseconds since 1970.
    pub submitted_ms: u64,
    /// From submission to the end, or until now.
    pub wall_ms: u64,
    pub maps: u32,
    pub maps_done: u32,
    pub reduces: u32,
    pub reduces_done: u32,
    /// Attempts that run now.
    pub running: u32,
    /// Node that runs its detached driver.
    pub driver_node: Option<String>,
}

pub(super) async fn read_json<T: DeserializeOwned>(fs: &FileSystem, path: &str) -> Result<T> {
    let mut reader = fs.open(path).await?;
    if reader.length() > MAX_REPORT {
        return Err(Error::new(ErrorCode::Corrupt, format!("{path} is too large")).with_subject(path));
    }
    let mut bytes = Vec::new();
    while let Some(chunk) = reader.next_chunk().await? {
        bytes.extend_from_slice(&chunk);
    }
    serde_json::from_slice(&bytes)
        .map_err(|error| Error::new(ErrorCode::Corrupt, format!("{path}: {error}")).with_subject(path))
}

fn name_of(status: &FileStatus) -> &str {
    split_last(&status.path).map_or("", |(_, name)| name)
}

async fn entries_of(fs: &FileSystem, folder: &str) -> Result<Vec<FileStatus>> {
    match fs.list_all(folder).await {
        Err(error) if error.code() == ErrorCode::FileNotFound => Ok(Vec::new()),
        listed => listed,
    }
}

/// Writes the end of a job down, and moves its folder to the history.
pub(super) async fn bury(fs: &FileSystem, epoch: u64, journal: Journal, report: &JobReport) -> Result<()> {
    let text = serde_json::to_vec(report).map_err(|error| Error::new(ErrorCode::Internal, error.to_string()))?;
    let state = report.state.as_str().to_owned();
    let ended = Record::Ended(pb::JobEnded { state, report: text.into() });
    let folder = journal::folder(&report.id);
    let (path, about_path) = (join(&folder, "report"), join(&folder, "about"));
    let about = About {
        id: report.id.clone(),
        name: report.name.clone(),
        kind: report.kind.clone(),
        user: report.user.clone(),
        output: report.output.clone(),
        submitted_ms: report.submitted_ms,
        priority: 0,
        ended: Some(ended_entry(report)),
    };
    let written = async {
        journal.settle(vec![ended], false).await?;
        journal.close().await
    };
    let aside = async {
        tokio::try_join!(Aside::write(fs, &path, epoch, report), Aside::write(fs, &about_path, epoch, &about))
    };
    let (written, aside) = tokio::join!(written, aside);
    let (report_aside, about_aside) = match (written, aside) {
        (Ok(()), Ok(files)) => files,
        (Err(error), Ok((report_aside, about_aside))) => {
            // Who has lost the job says nothing about it.
            tokio::join!(report_aside.discard(fs), about_aside.discard(fs));
            return Err(error);
        }
        (Err(error), Err(_)) | (Ok(()), Err(error)) => return Err(error),
    };
    // In this order: who reads in `about` that the job is over finds its report.
    report_aside.put_in_place(fs).await?;
    about_aside.put_in_place(fs).await?;
    move_to_history(fs, &report.id).await
}

async fn move_to_history(fs: &FileSystem, job_id: &str) -> Result<()> {
    let to = join(HISTORY, job_id);
    let moved = fs.rename(&journal::folder(job_id), &to, RenameMode::NoReplace).await;
    match moved {
        Err(error) if matches!(error.code(), ErrorCode::FileNotFound | ErrorCode::ParentNotDirectory) => {
            // The first job that ends makes the history.
            let keeper = join(HISTORY, &format!("{job_id}.new"));
            fs.mkdirs(&keeper, 0o755).await?;
            fs.delete(&keeper, true).await?;
            fs.rename(&journal::folder(job_id), &to, RenameMode::NoReplace).await
        }
        moved => moved,
    }
}

/// The report of a job that is over and put away.
pub async fn report(fs: &FileSystem, job_id: &str) -> Result<JobReport> {
    read_json(fs, &format!("{HISTORY}/{job_id}/report")).await
}

/// What everybody may know of a job, running or over.
pub(super) async fn about(fs: &FileSystem, job_id: &str) -> Result<About> {
    read_wherever(fs, job_id, "about").await
}

/// The report of a job that is over, be it that nobody has put the job away yet.
pub(super) async fn last_report(fs: &FileSystem, job_id: &str) -> Result<JobReport> {
    read_wherever(fs, job_id, "report").await
}

/// A job may end, and its folder move, while somebody looks.
async fn read_wherever<T: DeserializeOwned>(fs: &FileSystem, job_id: &str, name: &str) -> Result<T> {
    match read_json(fs, &format!("{JOBS}/{job_id}/{name}")).await {
        Err(error) if error.code() == ErrorCode::FileNotFound => {
            read_json(fs, &format!("{HISTORY}/{job_id}/{name}")).await
        }
        found => found,
    }
}

/// A driver that has lost its job to another one: if that one has ended it, its report says how.
pub(super) async fn after_supersession(fs: &FileSystem, job_id: &str, error: Error) -> Result<JobReport> {
    let clock = &fs.env().clock;
    let until_ms = clock.mono_ms() + MAX_END_MS;
    loop {
        if let Ok(report) = last_report(fs, job_id).await {
            return Ok(report);
        }
        // Killed from elsewhere it is over in a moment; resumed there it is not.
        if clock.mono_ms() >= until_ms {
            break;
        }
        clock.sleep(Duration::from_millis(50)).await;
    }
    let text = format!("another driver has taken over job {job_id}: {}", error.message());
    Err(Error::new(ErrorCode::StaleEpoch, text).with_subject(job_id))
}

/// Jobs that are not over, and the newest `limit` of those that are; of all users, the newest first.
pub async fn list(fs: &FileSystem, limit: usize) -> Result<Vec<JobEntry>> {
    let on_nodes = contact::jobs(fs, "").await?;
    let now_ms = fs.env().clock.wall_ms();
    let mut active = entries_of(fs, JOBS).await?;
    let mut over = entries_of(fs, HISTORY).await?;
    // A job that ends meanwhile is listed once.
    active.retain(|entry| !over.iter().any(|other| name_of(other) == name_of(entry)));
    // Names begin with the time of submission.
    over.sort_by(|a, b| b.path.cmp(&a.path));
    over.truncate(limit);
    let unfinished = active.iter().map(|entry| async {
        let about = about(fs, name_of(entry)).await.ok()?;
        if about.ended.is_some() {
            return about.ended;
        }
        let of_job: Vec<_> = on_nodes.iter().filter(|(_, job)| job.job_id == about.id).collect();
        Some(active_entry(about, &of_job, now_ms))
    });
    let finished = over.iter().map(|entry| async {
        let about: About = read_json(fs, &format!("{}/about", entry.path)).await.ok()?;
        about.ended
    });
    let unfinished = futures_util::stream::iter(unfinished.collect::<Vec<_>>()).buffer_unordered(AT_ONCE);
    let mut all: Vec<JobEntry> = unfinished.filter_map(std::future::ready).collect().await;
    let finished = futures_util::stream::iter(finished.collect::<Vec<_>>()).buffer_unordered(AT_ONCE);
    all.extend(finished.filter_map(std::future::ready).collect::<Vec<_>>().await);
    all.sort_by(|a, b| (b.submitted_ms, &b.id).cmp(&(a.submitted_ms, &a.id)));
    Ok(all)
}

/// Does a driver of the job work, as far as the nodes know?
pub(super) fn is_driven(on_nodes: &[&(super::scheduler::NodeInfo, pb::JobOnNode)]) -> bool {
    let heard = |job: &pb::JobOnNode| job.epoch > 0 && job.driver_silent_ms < SILENT_MS;
    on_nodes.iter().any(|(_, job)| job.drives || heard(job))
}

pub(super) fn active_entry(
    about: About,
    on_nodes: &[&(super::scheduler::NodeInfo, pb::JobOnNode)],
    now_ms: u64,
) -> JobEntry {
    let told = on_nodes.iter().filter(|(_, job)| job.status.is_some());
    let status = told.min_by_key(|(_, job)| job.status_age_ms).and_then(|(_, job)| job.status.clone());
    let status = status.unwrap_or_default();
    let known = on_nodes.iter().any(|(_, job)| job.epoch > 0);
    let age_ms = now_ms.saturating_sub(about.submitted_ms);
    let state = match (is_driven(on_nodes), known) {
        (true, true) => Stage::Running,
        (true, false) => Stage::Submitted,
        // It may not have needed a node yet.
        (false, false) if age_ms < 10_000 => Stage::Submitted,
        (false, _) => Stage::Orphaned,
    };
    JobEntry {
        id: about.id,
        name: about.name,
        kind: about.kind,
        user: about.user,
        state,
        output: about.output,
        submitted_ms: about.submitted_ms,
        wall_ms: age_ms,
        maps: status.maps,
        maps_done: status.maps_done,
        reduces: status.reduces,
        reduces_done: status.reduces_done,
        running: on_nodes.iter().map(|(_, job)| job.running.len() as u32).sum(),
        driver_node: on_nodes.iter().find(|(_, job)| job.drives).map(|(node, _)| node.host.clone()),
    }
}

pub(super) fn ended_entry(report: &JobReport) -> JobEntry {
    JobEntry {
        id: report.id.clone(),
        name: report.name.clone(),
        kind: report.kind.clone(),
        user: report.user.clone(),
        state: report.state.into(),
        output: report.output.clone(),
        submitted_ms: report.submitted_ms,
        wall_ms: report.wall_ms,
        maps: report.map.tasks,
        maps_done: report.tasks.iter().filter(|task| task.kind == "map").count() as u32,
        reduces: report.reduce.tasks,
        reduces_done: report.tasks.iter().filter(|task| task.kind == "reduce").count() as u32,
        running: 0,
        driver_node: None,
    }
}

/// Ends jobs of this user that nobody drives any more, and thins out their history. What cannot be done now is left for the next time.
pub async fn sweep(fs: &FileSystem) {
    if let Err(error) = end_abandoned(fs).await {
        tracing::debug!(%error, "jobs without a driver could not be looked for");
    }
    if let Err(error) = thin_out(fs).await {
        tracing::debug!(%error, "the history of jobs could not be thinned out");
    }
    if let Err(error) = ship::sweep(fs, async || shipped_in_use(fs).await).await {
        tracing::debug!(%error, "programs that are not used any more could not be removed");
    }
}

/// Files that jobs of this user have that are not over.
async fn shipped_in_use(fs: &FileSystem) -> Result<BTreeSet<String>> {
    let mut paths = BTreeSet::new();
    for entry in entries_of(fs, JOBS).await?.iter().filter(|entry| entry.owner == fs.user()) {
        if let Some((written, _)) = journal::read(fs, &entry.path).await? {
            let job = written.job();
            paths.extend(job.executable.into_iter().map(|executable| executable.path));
            paths.extend(job.cache_files.into_iter().map(|file| file.path));
        }
    }
    Ok(paths)
}

async fn end_abandoned(fs: &FileSystem) -> Result<()> {
    let mut mine = entries_of(fs, JOBS).await?;
    mine.retain(|entry| entry.owner == fs.user());
    if mine.is_empty() {
        return Ok(());
    }
    let on_nodes = contact::jobs(fs, "").await?;
    let now_ms = fs.env().clock.wall_ms();
    for entry in mine {
        let job_id = name_of(&entry).to_owned();
        let of_job: Vec<_> = on_nodes.iter().filter(|(_, job)| job.job_id == job_id).collect();
        if is_driven(&of_job) {
            continue;
        }
        let written = match journal::read(fs, &entry.path).await {
            Ok(Some((written, _))) if written.submitted.job.is_some() => written,
            _ if entry.modified_ms + UNFINISHED_MS < now_ms => {
                fs.delete(&entry.path, true).await?;
                continue;
            }
            _ => continue,
        };
        let lease_ms = match written.job().lease_ms {
            0 => USUAL_LEASE_MS,
            own => own,
        };
        let silent_ms = now_ms.saturating_sub(written.last_ms);
        if written.ended.is_none() && silent_ms <= lease_ms + BEAT_MS + BEAT_MS / 2 {
            continue;
        }
        let text =
            format!("job {job_id} was given up: its driver died, and nobody resumed it within {} s", lease_ms / 1_000);
        let error = Error::new(ErrorCode::JobFailed, text).with_subject(job_id.clone());
        if let Err(error) = control::end_without_driver(fs, &job_id, Ended::Failed(error)).await {
            tracing::debug!(job = job_id, %error, "a job without a driver could not be ended");
        }
    }
    Ok(())
}

async fn thin_out(fs: &FileSystem) -> Result<()> {
    let mut mine = entries_of(fs, HISTORY).await?;
    mine.retain(|entry| entry.owner == fs.user());
    mine.sort_by(|a, b| b.path.cmp(&a.path));
    let now_ms = fs.env().clock.wall_ms();
    for (at, entry) in mine.iter().enumerate() {
        if at >= MAX_KEPT || entry.modified_ms + KEEP_MS < now_ms {
            fs.delete(&entry.path, true).await?;
        }
    }
    Ok(())
}

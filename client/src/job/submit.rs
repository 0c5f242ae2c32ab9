//! From a [`JobSpec`] to a job that is written down: planned, checked, and in the file system before its first task runs.

use bytes::Bytes;
use cairn_proto::path::{normalize, split_last};
use cairn_proto::pb::job_record::Record;
use cairn_proto::{Error, ErrorCode, Result, pb};
use serde::{Deserialize, Serialize};

use super::commit;
use super::history::JobEntry;
use super::journal::{self, HISTORY, Journal, Written};
use super::plan;
use super::scheduler::NodeInfo;
use super::spec::JobSpec;
use crate::fs::{CreateOptions, FileSystem, RenameMode};

/// What everybody may know of a job: the file `about` in its folder.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct About {
    /// Unique.
    pub id: String,
    /// For people.
    pub name: String,
    /// Which program.
    pub kind: String,
    /// Whose it is.
    pub user: String,
    /// Output folder.
    pub output: String,
    /// Milliseconds since 1970.
    pub submitted_ms: u64,
    /// Share of slots against other jobs of its user.
    pub priority: u32,
    /// How it ended, when it has: a report may be large, and lists name many jobs.
    pub ended: Option<JobEntry>,
}

/// A job that is written down, and the journal that is still open for its driver.
pub(super) struct Submission {
    pub written: Written,
    pub journal: Journal,
    /// The nodes that it was planned on.
    pub nodes: Vec<NodeInfo>,
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

/// An id that the caller has chosen must be new.
async fn check_unused(fs: &FileSystem, job_id: &str) -> Result<String> {
    for folder in [journal::folder(job_id), format!("{HISTORY}/{job_id}")] {
        if fs.exists(&folder).await? {
            let text = format!("there has been a job {job_id} already");
            return Err(Error::new(ErrorCode::FileAlreadyExists, text).with_subject(job_id));
        }
    }
    Ok(job_id.to_owned())
}

fn new_job_id(fs: &FileSystem) -> String {
    let env = fs.env();
    format!("job-{}-{:04x}", env.clock.wall_ms(), env.entropy.next_u64() & 0xffff)
}

/// Plans the job and writes it down; `records` go with it, in the same sync.
pub(super) async fn submit(
    fs: &FileSystem,
    spec: &JobSpec,
    driver: impl FnOnce(&Written) -> Vec<Record>,
) -> Result<Submission> {
    spec.validate()?;
    let output = check_output(fs, &spec.output).await?;
    let prepared = plan::prepare(fs, spec).await?;
    let made_folders = missing_ancestors(fs, &output).await?;
    let job_id = match &spec.id {
        Some(id) => check_unused(fs, id).await?,
        None => new_job_id(fs),
    };
    let mut token = vec![0; 16];
    fs.env().entropy.fill(&mut token);
    let job = pb::JobDescription {
        job_id: job_id.clone(),
        user: fs.user().to_owned(),
        namenode: fs.namenode_address().to_owned(),
        cluster_id: prepared.cluster_id,
        reducers: prepared.reducers,
        maps: prepared.splits.len() as u32,
        staging: journal::staging_path(&output, &job_id, 1),
        token: Bytes::from(token),
        ..spec.description()
    };
    let submitted = pb::JobSubmitted {
        maps: prepared.splits.len() as u32,
        output: output.clone(),
        made_folders,
        time_limit_ms: spec.time_limit_ms,
        max_attempts: spec.max_attempts,
        speculative: spec.speculative,
        slow_start: Some(spec.slow_start),
        job: Some(job),
    };
    let submitted_ms = fs.env().clock.wall_ms();
    let written = Written { submitted, splits: prepared.splits, submitted_ms, ..Written::default() };
    let about = About {
        id: job_id.clone(),
        name: spec.name.clone(),
        kind: spec.kind.clone(),
        user: fs.user().to_owned(),
        output,
        submitted_ms,
        priority: spec.priority,
        ended: None,
    };
    // First, so that who may not write there learns it before anything is written down.
    fs.mkdirs(&journal::staging_path(&written.submitted.output, &job_id, 1), 0o755).await?;
    let journal = async {
        fs.mkdirs(&journal::folder(&job_id), 0o755).await?;
        let journal = Journal::create(fs, &job_id, 1).await?;
        let mut records = vec![Record::Submitted(written.submitted.clone())];
        records.extend(journal::split_records(&written.splits));
        records.extend(driver(&written));
        journal.settle(records, true).await?;
        Ok(journal)
    };
    let about_path = format!("{}/about", journal::folder(&job_id));
    let told = async {
        fs.mkdirs(&journal::folder(&job_id), 0o755).await?;
        Aside::write(fs, &about_path, 1, &about).await
    };
    let written_down = async {
        let (journal, about) = tokio::try_join!(journal, told)?;
        // Last, so that whoever finds the job finds all of it.
        about.put_in_place(fs).await?;
        Ok(journal)
    };
    match written_down.await {
        Ok(journal) => Ok(Submission { written, journal, nodes: prepared.nodes }),
        Err(error) => {
            withdraw(fs, &written.submitted).await;
            Err(error)
        }
    }
}

/// Takes away what was written of a job that will not be run. If that cannot be done now, whoever looks later does it.
pub(super) async fn withdraw(fs: &FileSystem, submitted: &pb::JobSubmitted) {
    let job_id = submitted.job.as_ref().map_or("", |job| &job.job_id);
    let _ = commit::remove_traces(fs, submitted, 1).await;
    let _ = fs.delete(&journal::folder(job_id), true).await;
}

/// A small file for everybody to read, written beside its place. Drivers of one job may end it at the same time, so each epoch has a name of its own.
pub(super) struct Aside {
    from: String,
    to: String,
}

impl Aside {
    pub(super) async fn write(fs: &FileSystem, path: &str, epoch: u64, value: &impl Serialize) -> Result<Self> {
        let text =
            serde_json::to_vec(value).map_err(|error| Error::new(ErrorCode::Internal, format!("{path}: {error}")))?;
        let aside = Self { from: format!("{path}.{epoch}.new"), to: path.to_owned() };
        let options = CreateOptions { overwrite: true, ..CreateOptions::default() };
        let mut file = fs.create(&aside.from, options).await?;
        file.write(&text).await?;
        file.close().await?;
        Ok(aside)
    }

    /// Who reads the file meanwhile finds the old text or the new one, whole.
    pub(super) async fn put_in_place(&self, fs: &FileSystem) -> Result<()> {
        fs.rename(&self.from, &self.to, RenameMode::Overwrite).await
    }

    /// What was written is not to be read by anybody.
    pub(super) async fn discard(self, fs: &FileSystem) {
        if let Err(error) = fs.delete(&self.from, false).await {
            tracing::debug!(path = self.from, %error, "it stays until its job's folder goes");
        }
    }
}

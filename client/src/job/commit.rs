//! How output gets its names. Everything is written into a staging folder beside the output, which becomes it by one rename.

use cairn_proto::path::{join, split_last};
use cairn_proto::{Error, ErrorCode, Result, pb};

use super::journal::staging_path;
use crate::fs::{CreateOptions, FileSystem, RenameMode};

/// Where one attempt writes; it names its files itself, beside that.
pub fn attempt_path(staging: &str, task: &pb::TaskId) -> String {
    let letter = if task.kind() == pb::TaskKind::Reduce { "r" } else { "m" };
    join(staging, &format!(".part-{letter}-{:05}.attempt-{}", task.index, task.attempt))
}

/// Gives an accepted attempt's files their final names, the main one last: an attempt that is cut off in between is not accepted, and the next one
/// replaces what it left. `again`: some may have their names already, from an earlier try.
pub async fn name_files(fs: &FileSystem, staging: &str, files: &[pb::OutputFile], again: bool) -> Result<()> {
    for file in files.iter().rev() {
        let plain = |name: &str| !name.is_empty() && !name.contains('/');
        if !plain(&file.attempt_name) || !plain(&file.final_name) {
            let text = format!("an attempt wants to name {:?} {:?}", file.attempt_name, file.final_name);
            return Err(Error::new(ErrorCode::InvalidArgument, text));
        }
        let (from, to) = (join(staging, &file.attempt_name), join(staging, &file.final_name));
        match fs.rename(&from, &to, RenameMode::Overwrite).await {
            Err(error) if again && error.code() == ErrorCode::FileNotFound && fs.exists(&to).await? => {}
            named => named?,
        }
    }
    Ok(())
}

/// The staging folder under the name of this epoch: taken from the newest driver before, or made. Who still uses the old name finds nothing.
pub async fn take_staging(fs: &FileSystem, output: &str, job_id: &str, epoch: u64) -> Result<()> {
    let own = staging_path(output, job_id, epoch);
    for before in (1..epoch).rev() {
        match fs.rename(&staging_path(output, job_id, before), &own, RenameMode::NoReplace).await {
            Ok(()) => return Ok(()),
            Err(error) if matches!(error.code(), ErrorCode::FileNotFound | ErrorCode::ParentNotDirectory) => {}
            Err(error) => return Err(error),
        }
    }
    fs.mkdirs(&own, 0o755).await.map(drop)
}

/// Makes the staging folder, which has this inode, the output.
pub async fn commit(fs: &FileSystem, staging: &str, output: &str, mut expected: Vec<String>) -> Result<()> {
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
        ErrorCode::FileAlreadyExists | ErrorCode::DirectoryNotEmpty => appeared(output),
        _ => error,
    })
}

/// There is something under the name of the output that there was not when the job was submitted.
pub fn appeared(output: &str) -> Error {
    let text = format!("output {output} appeared while the job ran; it was left alone");
    Error::new(ErrorCode::FileAlreadyExists, text).with_subject(output)
}

/// Is the output the folder that a driver had decided to commit?
pub async fn is_committed(fs: &FileSystem, output: &str, staging_inode: u64) -> Result<bool> {
    Ok(fs.find(output).await?.is_some_and(|found| found.inode == staging_inode))
}

/// Removes what must not stay of a job that did not succeed: its staging folder, under whatever name, and folders that were made for it and are
/// still empty.
pub async fn remove_traces(fs: &FileSystem, submitted: &pb::JobSubmitted, epoch: u64) -> Result<()> {
    let job_id = submitted.job.as_ref().map_or("", |job| &job.job_id);
    for at in 1..=epoch {
        fs.delete(&staging_path(&submitted.output, job_id, at), true).await?;
    }
    for folder in &submitted.made_folders {
        // Only what is still empty goes; the first that is not ends it.
        if fs.delete(folder, false).await.is_err() {
            break;
        }
    }
    Ok(())
}

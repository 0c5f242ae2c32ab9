//! What attempts wrote to their standard error, kept for a while after their job.
//!
//! `<root>/<job>/log/` holds one file per attempt ([`super::job::file_name`]) and `driver` of a driver that ran here; `<root>/<job>/user` says whose
//! they are and since when: `MILLISECONDS NAME`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use cairn_common::Env;
use cairn_common::durable::{Fs, OpenMode, read_all};
use cairn_proto::{Error, ErrorCode, Result, pb};

use super::account::Account;
use super::job::{check_job_id, file_name, unknown_job};
use super::kept::KEPT;

/// Folder of what jobs brought along, beside those of jobs: no job has a name that starts with a dot.
pub const CACHE: &str = ".cache";
/// Name of a driver's log.
pub const DRIVER_LOG: &str = "driver";
/// Names whose job a folder holds.
const USER_FILE: &str = "user";
/// Bytes of one answer.
const PIECE: usize = 1 << 20;
/// Jobs whose logs are kept, at most.
const MAX_JOBS: usize = 1_000;

/// Reads logs; clones share nothing but the folder.
#[derive(Clone)]
pub struct Logs {
    pub env: Env,
    pub root: PathBuf,
}

/// Makes the folders of a job, and notes whose it is.
pub fn make_folders(
    fs: &dyn Fs,
    dir: &Path,
    user: &str,
    account: Option<Account>,
    wall_ms: u64,
) -> std::io::Result<()> {
    for name in ["out", "work", "log"] {
        fs.create_dir_all(&dir.join(name))?;
    }
    fs.restrict(dir)?;
    if let Some(account) = account {
        account.give(dir)?;
        account.give(&dir.join("work"))?;
    }
    let file = fs.open(&dir.join(USER_FILE), OpenMode::WriteOrCreate)?;
    let text = format!("{wall_ms} {user}");
    file.set_len(text.len() as u64)?;
    file.write_all_at(text.as_bytes(), 0)
}

fn owner_of(fs: &dyn Fs, dir: &Path) -> Option<(u64, String)> {
    let text = String::from_utf8(read_all(fs, &dir.join(USER_FILE), 4_096).ok()?).ok()?;
    let (since, user) = text.split_once(' ')?;
    Some((since.parse().ok()?, user.to_owned()))
}

/// Removes all of a job but its logs; those too if there are none.
pub fn remove_all_but_logs(fs: &dyn Fs, dir: &Path) -> std::io::Result<()> {
    let log = dir.join("log");
    let entries = if fs.metadata(&log)?.is_some() { fs.read_dir(&log)? } else { Vec::new() };
    let mut kept = 0;
    for entry in entries {
        let path = log.join(&entry.name);
        match fs.metadata(&path)? {
            // Most attempts say nothing.
            Some(metadata) if metadata.len == 0 && entry.name != DRIVER_LOG => fs.remove_file(&path)?,
            Some(_) => kept += 1,
            None => {}
        }
    }
    if kept == 0 {
        return fs.remove_dir_all(dir);
    }
    for entry in fs.read_dir(dir)? {
        if entry.name == "log" || entry.name == USER_FILE {
            continue;
        }
        let path = dir.join(&entry.name);
        if fs.metadata(&path)?.is_some_and(|metadata| metadata.is_dir) {
            fs.remove_dir_all(&path)?;
        } else {
            fs.remove_file(&path)?;
        }
    }
    Ok(())
}

/// Removes logs of jobs that are not `active`: those older than `keep_ms`, and the oldest beyond a number.
pub fn expire(fs: &dyn Fs, root: &Path, active: &[String], now_wall_ms: u64, keep_ms: u64) -> std::io::Result<()> {
    let mut kept = Vec::new();
    let over = |name: &String| name != CACHE && name != KEPT && !active.contains(name);
    for entry in fs.read_dir(root)?.into_iter().filter(|entry| over(&entry.name)) {
        let dir = root.join(&entry.name);
        match owner_of(fs, &dir) {
            Some((since, _)) if since.saturating_add(keep_ms) > now_wall_ms => kept.push((since, dir)),
            _ => fs.remove_dir_all(&dir)?,
        }
    }
    kept.sort();
    let over = kept.len().saturating_sub(MAX_JOBS);
    kept[..over].iter().try_for_each(|(_, dir)| fs.remove_dir_all(dir))
}

impl Logs {
    fn dir(&self, job_id: &str, user: &str) -> Result<PathBuf> {
        check_job_id(job_id)?;
        let dir = self.root.join(job_id);
        match owner_of(&*self.env.fs, &dir) {
            None => Err(unknown_job(job_id)),
            Some((_, owner)) if owner != user => {
                let text = format!("job {job_id} belongs to {owner}, not to {user}");
                Err(Error::new(ErrorCode::PermissionDenied, text).with_subject(job_id))
            }
            Some(_) => Ok(dir.join("log")),
        }
    }

    /// The logs of a job, the empty ones left out.
    pub async fn list(&self, user: String, request: pb::ListLogsRequest) -> Result<pb::ListLogsResponse> {
        let logs = self.clone();
        let list = move || {
            let (dir, fs) = (logs.dir(&request.job_id, &user)?, &*logs.env.fs);
            let failed = |error: std::io::Error| Error::io(format!("cannot list {}", dir.display()), &error);
            let mut found = Vec::new();
            for entry in fs.read_dir(&dir).map_err(failed)? {
                let bytes = fs.metadata(&dir.join(&entry.name)).map_err(failed)?.map_or(0, |metadata| metadata.len);
                let task = task_of(&entry.name);
                if bytes > 0 && (task.is_some() || entry.name == DRIVER_LOG) {
                    found.push(pb::LogOnNode { task, bytes });
                }
            }
            Ok(pb::ListLogsResponse { logs: found })
        };
        self.env.work.io(list).await
    }

    /// A piece of one log.
    pub async fn read(&self, user: String, request: pb::ReadLogRequest) -> Result<pb::ReadLogResponse> {
        let logs = self.clone();
        let read = move || {
            let name = request.task.as_ref().map_or_else(|| DRIVER_LOG.to_owned(), file_name);
            let path = logs.dir(&request.job_id, &user)?.join(&name);
            let failed = |error: std::io::Error| match error.kind() {
                std::io::ErrorKind::NotFound => {
                    let text = format!("this node has no log {name} of job {}", request.job_id);
                    Error::new(ErrorCode::FileNotFound, text).with_subject(name.clone())
                }
                _ => Error::io(format!("cannot read {}", path.display()), &error),
            };
            let file = logs.env.fs.open(&path, OpenMode::Read).map_err(failed)?;
            let left = file.len().map_err(failed)?.saturating_sub(request.offset);
            let mut data = vec![0; left.min(PIECE as u64) as usize];
            let read = file.read_at(&mut data, request.offset).map_err(failed)?;
            data.truncate(read);
            Ok(pb::ReadLogResponse { data: data.into() })
        };
        self.env.work.io(read).await
    }
}

/// The attempt whose log has this name.
fn task_of(name: &str) -> Option<pb::TaskId> {
    let mut parts = name.split('-');
    let kind = match parts.next()? {
        "map" => pb::TaskKind::Map,
        "reduce" => pb::TaskKind::Reduce,
        _ => return None,
    };
    let (index, attempt) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    parts.next().is_none().then_some(pb::TaskId { kind: kind as i32, index, attempt })
}

/// Prepares the folder of the executor: of earlier jobs only logs stay.
pub fn prepare(fs: &Arc<dyn Fs>, root: &Path, now_wall_ms: u64, keep_ms: u64) -> std::io::Result<()> {
    fs.create_dir_all(root)?;
    fs.restrict(root)?;
    expire(&**fs, root, &[], now_wall_ms, keep_ms)?;
    fs.read_dir(root)?.into_iter().try_for_each(|entry| remove_all_but_logs(&**fs, &root.join(&entry.name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_logs_come_back() {
        for kind in [pb::TaskKind::Map, pb::TaskKind::Reduce] {
            let task = pb::TaskId { kind: kind as i32, index: 7, attempt: 1_002 };
            assert_eq!(task_of(&file_name(&task)), Some(task));
        }
        for other in ["driver", "map", "map-1", "map-1-2-3", "map-x-1"] {
            assert_eq!(task_of(other), None, "{other}");
        }
    }
}

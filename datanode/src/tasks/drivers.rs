//! Detached drivers: children of this node that drive jobs for users who have left.
//!
//! The job was written down in the file system by whoever submitted it; a driver here takes it up as `cairn job resume` does, under the user's name.
//! It ends with this node, as every child does; the job then waits for `cairn job resume` by anybody with a right to it.

use std::path::PathBuf;
use std::process::Stdio;

use cairn_common::durable::OpenMode;
use cairn_common::process;
use cairn_proto::{Error, ErrorCode, Result, pb};

use super::job::check_job_id;
use super::logs::{DRIVER_LOG, make_folders};
use super::owner::{Event, Owner};
use super::worker::child;

/// Drivers at once on one node.
const MAX_DRIVERS: usize = 64;

impl Owner {
    /// Starts a driver; one that runs already is left alone.
    pub(super) async fn start_driver(
        &mut self,
        user: &str,
        request: &pb::StartDriverRequest,
    ) -> Result<pb::StartDriverResponse> {
        self.check_takes_jobs()?;
        let job_id = request.job_id.clone();
        check_job_id(&job_id)?;
        if self.drivers.contains_key(&job_id) {
            return Ok(pb::StartDriverResponse {});
        }
        if self.drivers.len() >= MAX_DRIVERS {
            let text = format!("{} runs {MAX_DRIVERS} drivers already", self.name.host);
            return Err(Error::new(ErrorCode::Busy, text));
        }
        let dir = self.root.join(&job_id);
        let log = dir.join("log").join(DRIVER_LOG);
        let (fs, owner, wall_ms) = (self.env.fs.clone(), user.to_owned(), self.env.clock.wall_ms());
        let account = self.account;
        let (folder, file) = (dir.clone(), log.clone());
        let made = self.env.work.io(move || {
            make_folders(&*fs, &folder, &owner, account, wall_ms)?;
            // Made here, so that it is ours to keep; the child writes at its end.
            fs.open(&file, OpenMode::WriteOrCreate).map(drop)
        });
        made.await.map_err(|error| Error::io(format!("cannot make {}", log.display()), &error))?;
        let pid =
            self.spawn_driver(user, request, dir, &log).map_err(|error| Error::io("cannot start a driver", &error))?;
        tracing::info!(job = job_id, user, pid, "a detached driver starts");
        self.drivers.insert(job_id, pid);
        Ok(pb::StartDriverResponse {})
    }

    fn spawn_driver(
        &self,
        user: &str,
        request: &pb::StartDriverRequest,
        dir: PathBuf,
        log: &std::path::Path,
    ) -> std::io::Result<u32> {
        let mut command = child(&self.settings.driver_command, &["job", "resume"], &dir, self.account)?;
        command.arg("--namenode").arg(&request.namenode).arg("--user").arg(user).arg("--").arg(&request.job_id);
        let output = std::fs::OpenOptions::new().append(true).open(log)?;
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let mut child = command.spawn()?;
        let (pid, events, job_id) = (child.id().unwrap_or_default(), self.events.clone(), request.job_id.clone());
        tokio::spawn(async move {
            let how = child.wait().await.map_or_else(|error| error.to_string(), |status| status.to_string());
            // Nobody listens only when the executor has ended.
            let _ = events.send(Event::DriverExited { job_id, how }).await;
        });
        Ok(pid)
    }

    /// A driver has ended; its job is over, or waits for another.
    pub(super) fn driver_exited(&mut self, job_id: &str, how: &str) {
        if let Some(pid) = self.drivers.remove(job_id) {
            process::kill_group(pid);
            tracing::info!(job = job_id, how, "a detached driver has ended");
        }
    }
}

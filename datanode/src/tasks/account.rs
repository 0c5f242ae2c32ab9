//! The user as whom tasks run, if the daemon is root and was told one.
//!
//! Tasks must not reach the volumes: those are 0700 and root's. So the folders of jobs lie beside the first volume then (`<dir>.jobs`), where the
//! user can pass; a job's own folder and its work folders belong to that user, what is finished and the logs stay root's.

use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};

use cairn_common::process;
use cairn_proto::{Error, ErrorCode, Result};

/// A user of this machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Account {
    /// Its number.
    pub uid: u32,
    /// Its primary group's.
    pub gid: u32,
}

impl Account {
    /// The user of this name; only root can run tasks as somebody else.
    pub fn find(name: &str) -> Result<Self> {
        let refuse = |text: String| Error::new(ErrorCode::InvalidArgument, text).with_subject("task_user");
        if !process::is_root() {
            return Err(refuse(format!("task_user: only a datanode that runs as root can run tasks as {name:?}")));
        }
        match process::ids_of(name) {
            None => Err(refuse(format!("task_user: this machine has no user {name:?}"))),
            Some((0, _)) => Err(refuse("task_user: tasks that run as root could do everything".into())),
            Some((uid, gid)) => Ok(Self { uid, gid }),
        }
    }

    /// Where the folders of jobs are, beside the volume `dir`.
    pub fn root_beside(dir: &Path) -> PathBuf {
        let mut name = dir.as_os_str().to_owned();
        name.push(".jobs");
        PathBuf::from(name)
    }

    /// Others may pass through a folder, and see nothing of it.
    pub fn let_pass(dir: &Path) -> std::io::Result<()> {
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o711))
    }

    /// Others may see what is in a folder.
    pub fn let_list(dir: &Path) -> std::io::Result<()> {
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o755))
    }

    /// The folder becomes the user's.
    pub fn give(self, dir: &Path) -> std::io::Result<()> {
        chown(dir, Some(self.uid), Some(self.gid))
    }
}

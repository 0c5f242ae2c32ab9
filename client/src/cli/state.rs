//! What a running `cairn local` tells about itself in its folder, and what others may ask of it there.
//!
//! `D/cluster.json` is there while the cluster runs: who its members are and which process each is now. A file `D/restart/<member>` asks for a
//! member that has ended to be started again with its own command; it goes when that is done. So the member stays a child of
//! `cairn local`, which ends it in the end. After `kill -9` of `cairn local` the file is left behind: its process tells.

use std::path::{Path, PathBuf};

use cairn_common::Env;
use cairn_common::durable;
use cairn_common::process::ProcessRef;
use serde::{Deserialize, Serialize};

const STATE_FILE: &str = "cluster.json";
const REQUESTS: &str = "restart";
/// No cluster of 200 members needs as much.
const LIMIT: u64 = 1 << 20;

/// A local cluster, as `D/cluster.json` has it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LocalState {
    /// The process of `cairn local`.
    pub local: ProcessRef,
    /// The namenode first.
    pub members: Vec<MemberState>,
}

/// One member.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MemberState {
    /// "namenode", "dn1", ...
    pub name: String,
    /// As `admin report` shows a datanode's id.
    pub id: String,
    /// `HOST:PORT`.
    pub addr: String,
    /// Its folder.
    pub dir: PathBuf,
    /// Its log.
    pub log: PathBuf,
    /// Its process now, or the one that ended last.
    pub process: ProcessRef,
}

impl LocalState {
    /// Writes it down.
    pub fn store(&self, env: &Env, dir: &Path) -> std::io::Result<()> {
        let text = serde_json::to_vec_pretty(self).map_err(std::io::Error::other)?;
        durable::write_atomic(&*env.fs, &dir.join(STATE_FILE), &text)
    }

    /// What the cluster of `dir` tells; `None`: none has ever run there, or it ended in order.
    pub fn load(env: &Env, dir: &Path) -> std::io::Result<Option<Self>> {
        let path = dir.join(STATE_FILE);
        if env.fs.metadata(&path)?.is_none() {
            return Ok(None);
        }
        let bytes = durable::read_all(&*env.fs, &path, LIMIT)?;
        serde_json::from_slice(&bytes).map(Some).map_err(std::io::Error::other)
    }

    /// The cluster ends in order.
    pub fn remove(env: &Env, dir: &Path) {
        // One that stays names processes that are gone.
        let _ = env.fs.remove_file(&dir.join(STATE_FILE));
    }
}

/// Asks the cluster of `dir` to start a member again.
pub fn request_restart(env: &Env, dir: &Path, member: &str) -> std::io::Result<()> {
    let folder = dir.join(REQUESTS);
    env.fs.create_dir_all(&folder)?;
    durable::write_atomic(&*env.fs, &folder.join(member), b"")
}

/// Members that somebody wants started again.
pub fn requested_restarts(env: &Env, dir: &Path) -> Vec<String> {
    let folder = dir.join(REQUESTS);
    match env.fs.metadata(&folder) {
        Ok(Some(_)) => {
            let names = env.fs.read_dir(&folder).unwrap_or_default().into_iter().map(|entry| entry.name);
            // One with a suffix is being written.
            names.filter(|name| !name.contains('.')).collect()
        }
        _ => Vec::new(),
    }
}

/// A request was met, or cannot be.
pub fn settle_restart(env: &Env, dir: &Path, member: &str) {
    // What cannot be removed is met again: a running member is left alone then.
    let _ = env.fs.remove_file(&dir.join(REQUESTS).join(member));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_and_requests_come_back() {
        let (env, dir) = (Env::system(), tempfile::tempdir().unwrap());
        assert_eq!(LocalState::load(&env, dir.path()).unwrap(), None);
        let process = ProcessRef::of(std::process::id()).unwrap();
        let path = dir.path().join("dn1");
        let member = MemberState {
            name: "dn1".into(),
            id: "u".into(),
            addr: "a:1".into(),
            dir: path.clone(),
            log: path,
            process,
        };
        let state = LocalState { local: process, members: vec![member] };
        state.store(&env, dir.path()).unwrap();
        assert_eq!(LocalState::load(&env, dir.path()).unwrap(), Some(state));
        LocalState::remove(&env, dir.path());
        assert_eq!(LocalState::load(&env, dir.path()).unwrap(), None);
        assert!(requested_restarts(&env, dir.path()).is_empty());
        request_restart(&env, dir.path(), "dn1").unwrap();
        assert_eq!(requested_restarts(&env, dir.path()), ["dn1"]);
        settle_restart(&env, dir.path(), "dn1");
        assert!(requested_restarts(&env, dir.path()).is_empty());
        std::fs::File::options()
            .write(true)
            .create_new(true)
            .open(dir.path().join(STATE_FILE))
            .and_then(|mut file| std::io::Write::write_all(&mut file, b"{"))
            .unwrap();
        assert!(LocalState::load(&env, dir.path()).is_err());
    }
}

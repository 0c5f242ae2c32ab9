//! The cluster that is broken: a `cairn local` of this user on this machine.

use std::path::{Path, PathBuf};

use cairn_client::fs::ErrorCode;
use cairn_common::Env;
use cairn_common::process::{ProcessRef, Signal};

use crate::output::{Outcome, failure};
use crate::state::{self, LocalState, MemberState};
use crate::stream::local_error;

/// A running local cluster.
pub struct Target {
    env: Env,
    dir: PathBuf,
    /// As of the last look.
    state: LocalState,
}

impl Target {
    /// Finds the cluster that runs in `dir`. Every member must run, and belong to this user.
    pub fn open(env: &Env, dir: &Path) -> Outcome<Self> {
        let dir = std::path::absolute(dir).map_err(|error| local_error("cannot use", dir, &error))?;
        let none = |code| failure(code, format!("no `cairn local` runs in {}", dir.display()));
        let found = LocalState::load(env, &dir);
        let found = found.map_err(|error| local_error("cannot read the state of the cluster in", &dir, &error))?;
        let state = found.ok_or_else(|| none(ErrorCode::FileNotFound))?;
        if !state.local.runs() {
            return Err(none(ErrorCode::Unreachable));
        }
        for member in &state.members {
            if !member.process.runs() {
                let text = format!("{} does not run: start the cluster in {} again first", member.name, dir.display());
                return Err(failure(ErrorCode::Unreachable, text));
            }
            if !member.process.is_ours() {
                let text = format!("the cluster in {} belongs to another user", dir.display());
                return Err(failure(ErrorCode::PermissionDenied, text));
            }
        }
        if state.members.len() < 3 {
            let text = "one datanode has nobody to take over from it: start `cairn local` with two or more";
            return Err(failure(ErrorCode::InvalidArgument, text));
        }
        Ok(Self { env: env.clone(), dir, state })
    }

    /// The namenode first.
    pub fn members(&self) -> &[MemberState] {
        &self.state.members
    }

    /// Whether `cairn local` is still there; without it nobody is started again.
    pub fn local_runs(&self) -> bool {
        self.state.local.runs()
    }

    /// The process of a member now.
    pub fn process(&self, at: usize) -> ProcessRef {
        self.state.members[at].process
    }

    /// Looks again who the members are; keeps what it knows if nothing can be read.
    pub fn refresh(&mut self) {
        if let Ok(Some(state)) = LocalState::load(&self.env, &self.dir)
            && state.members.len() == self.state.members.len()
        {
            self.state = state;
        }
    }

    /// Sends a signal to a member.
    pub fn signal(&self, at: usize, signal: Signal) -> std::io::Result<()> {
        self.process(at).signal(signal)
    }

    /// Asks for a member to be started again.
    pub fn ask_for(&self, at: usize) -> std::io::Result<()> {
        state::request_restart(&self.env, &self.dir, &self.state.members[at].name)
    }
}

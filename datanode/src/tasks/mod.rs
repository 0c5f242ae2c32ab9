//! The executor: runs tasks of jobs in child processes on this node, and keeps map outputs until their job ends.
//!
//! # Overview
//! One owner thread (`owner`) holds all state: jobs, their worker processes, and what happened to each task. Drivers reach it through the gRPC
//! service (`service`); it never dials a driver. A worker process (`worker`) serves one task at a time and many tasks of one job; it
//! is a process group of its own with a clean environment, talks length-delimited messages on its pipes, and what it writes to standard error goes to
//! a bounded log per attempt. Its resident size is sampled every 50 ms; over the job's limit it is killed.
//!
//! Folders, all under `<dir>/jobs/<job>/` (0700): `out/` finished map outputs ([`cairn_proto::mapoutput`]), `work/` one folder per running attempt,
//! `log/` standard error per attempt.
//!
//! # Consistency
//! A map output appears in `out/` by a rename, after its task succeeded; attempts never share a name. A call with an epoch older than the newest
//! that the node has seen for the job is refused.
//!
//! # Crash
//! The children die with the owner thread's process (`PR_SET_PDEATHSIG`); what is left of jobs is removed at the next start. The driver takes the node's
//! map outputs for lost when it cannot fetch them.
//!
//! # What leaks
//! A process that leaves its group on purpose and outlives the worker.

mod job;
mod log;
mod memory;
mod outputs;
mod owner;
mod service;
#[cfg(test)]
mod tests;
mod worker;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use cairn_common::Env;
use cairn_common::work::OwnerHandle;
use cairn_proto::pb::tasks_server::TasksServer;
use cairn_proto::{Error, Result};
use tokio::sync::{mpsc, oneshot};

use crate::TaskLoad;

pub use outputs::JobOutputs;
pub use service::TasksService;

/// What an operator may set on an executor.
#[derive(Clone, Debug)]
pub struct TaskSettings {
    /// Volume folders of the node; jobs live under the first.
    pub dirs: Vec<PathBuf>,
    /// Tasks that may run at once.
    pub slots: u32,
    /// Take jobs although the node is reachable from beyond this machine and callers are not authenticated.
    pub allow_jobs: bool,
    /// The data port is on a loopback address.
    pub loopback: bool,
    /// Command of a worker process; empty: this program with `task-worker`.
    pub worker_command: Vec<String>,
    /// A job whose driver is silent for this long is ended. Longer: a dead driver's tasks run on; shorter: a driver that stalls loses its job.
    pub lease_ms: u64,
    /// Bytes of standard error kept per attempt.
    pub log_bytes: u64,
}

impl TaskSettings {
    /// Defaults for a node on loopback.
    pub fn new(dirs: Vec<PathBuf>, slots: u32) -> Self {
        Self {
            dirs,
            slots,
            allow_jobs: false,
            loopback: true,
            worker_command: Vec::new(),
            lease_ms: 30_000,
            log_bytes: 1 << 20,
        }
    }
}

/// Who this node is to the cluster; told to workers, so that they find the replicas beside them.
#[derive(Clone, Debug, Default)]
pub struct NodeName {
    /// Stable id.
    pub node_id: String,
    /// Name shown to people.
    pub host: String,
    /// Place in the network.
    pub rack: String,
}

/// A running executor.
pub struct Executor {
    events: mpsc::Sender<owner::Event>,
    running: Arc<AtomicU32>,
    outputs: Arc<JobOutputs>,
    slots: u32,
    handle: OwnerHandle,
}

impl Executor {
    /// Removes what an earlier process left of jobs, and starts the owner.
    pub async fn start(env: &Env, settings: TaskSettings, name: NodeName) -> Result<Self> {
        let root = settings.dirs.first().cloned().unwrap_or_default().join("jobs");
        let (fs, dir) = (Arc::clone(&env.fs), root.clone());
        let prepared = env.work.io(move || {
            if fs.metadata(&dir)?.is_some() {
                fs.remove_dir_all(&dir)?;
            }
            fs.create_dir_all(&dir)?;
            fs.restrict(&dir)
        });
        prepared.await.map_err(|error| Error::io(format!("cannot prepare {}", root.display()), &error))?;
        let (events, receiver) = mpsc::channel(256);
        let running = Arc::new(AtomicU32::new(0));
        let outputs = Arc::new(JobOutputs::new(env.clone()));
        let slots = settings.slots;
        let owner = owner::Owner::new(
            env.clone(),
            settings,
            name,
            root,
            events.clone(),
            Arc::clone(&running),
            Arc::clone(&outputs),
        );
        // Children are tied to the thread that makes them, so it must be one that lives as long as the executor.
        let handle = env
            .work
            .owner("task-executor", move || owner.run(receiver))
            .map_err(|error| Error::io("cannot start the task executor", &error))?;
        Ok(Self { events, running, outputs, slots, handle })
    }

    /// The gRPC service for the data port.
    pub fn service(&self) -> TasksServer<TasksService> {
        TasksServer::new(TasksService::new(self.events.clone())).max_decoding_message_size(64 << 20)
    }

    /// Finished map outputs, for `ReadMapOutput`.
    pub fn outputs(&self) -> Arc<JobOutputs> {
        Arc::clone(&self.outputs)
    }

    /// How busy it is, for heartbeats.
    pub fn load(&self) -> Arc<dyn TaskLoad> {
        Arc::new(Load { slots: self.slots, running: Arc::clone(&self.running) })
    }

    /// Kills all workers, removes all job folders, and ends.
    pub async fn stop(self) {
        let (reply, stopped) = oneshot::channel();
        if self.events.send(owner::Event::Stop { reply }).await.is_ok() {
            // An error means that the owner is gone already.
            let _ = stopped.await;
        }
        self.handle.join().await;
    }
}

struct Load {
    slots: u32,
    running: Arc<AtomicU32>,
}

impl TaskLoad for Load {
    fn slots(&self) -> u32 {
        self.slots
    }

    fn running(&self) -> u32 {
        self.running.load(Ordering::Relaxed)
    }
}

//! The executor: runs tasks of jobs in child processes on this node, and keeps map outputs until their job ends.
//!
//! # Overview
//! One owner thread (`owner`) holds all state: jobs, their worker processes, and what happened to each task. Drivers reach it through the gRPC
//! service (`service`); it never dials a driver. A worker process (`worker`) serves one task at a time and many tasks of one job; it
//! is a process group of its own with a clean environment, talks length-delimited messages on its pipes, and what it writes to standard error goes to
//! a bounded log per attempt. The kernel holds it to its limits of memory and CPU where this process may manage cgroups (`cgroup`); else its
//! resident size is sampled every 50 ms, and over the job's limit it is killed (`memory`).
//!
//! Between jobs that want more slots than there are, each node arbitrates by itself (`share`). A detached driver is a child of the node as well
//! (`drivers`).
//!
//! Folders, all under `<dir>/jobs/<job>/` (0700; `<dir>.jobs/<job>/` where tasks run as another user, `account`): `out/` finished map outputs ([`cairn_proto::mapoutput`]), `work/` one folder per running attempt,
//! `log/` standard error per attempt, kept for a day after the job (`logs`). What several jobs share is beside those folders (`kept`).
//!
//! # Consistency
//! A map output appears in `out/` by a rename, after its task succeeded; attempts never share a name. A call with an epoch older than the newest
//! that the node has seen for the job is refused. What a job has here stays as long as its lease, so that another driver can take it over.
//!
//! # Crash
//! The children die with the owner thread's process (`PR_SET_PDEATHSIG`); what is left of jobs is removed at the next start, but for logs. The driver
//! takes the node's map outputs for lost when it cannot fetch them.
//!
//! # What leaks
//! A process that leaves its group, and whose parent ends before the worker is killed; not where cgroups are in force.

mod account;
mod cgroup;
mod drivers;
mod ending;
mod job;
mod kept;
mod listing;
mod log;
mod logs;
mod memory;
mod outputs;
mod owner;
mod service;
mod share;
mod starting;
#[cfg(test)]
mod tests;
mod worker;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use cairn_common::Env;
use cairn_common::work::OwnerHandle;
use cairn_proto::pb::tasks_server::TasksServer;
use cairn_proto::{Error, Result};
use tokio::sync::{mpsc, oneshot};

use crate::TaskLoad;

use account::Account;
use cgroup::Groups;
use logs::Logs;
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
    /// Command of a detached driver, to which its arguments are added; empty: this program with `job resume`.
    pub driver_command: Vec<String>,
    /// A job whose driver is silent for this long, and that does not ask for another time, is ended. Longer: map outputs of dead drivers take room;
    /// shorter: less time to resume a job.
    pub lease_ms: u64,
    /// Bytes of standard error kept per attempt.
    pub log_bytes: u64,
    /// How long logs are kept.
    pub log_keep_ms: u64,
    /// A job that has waited for so long without a slot gets one of a job that has more than its share. Shorter: more work is thrown away;
    /// longer: a job of long tasks keeps others out.
    pub starvation_ms: u64,
    /// Shares of users against each other; 1 for who is not named.
    pub user_weights: BTreeMap<String, u64>,
    /// Bytes of the volume that jobs leave free.
    pub disk_reserve: u64,
    /// Use cgroups where they can be used.
    pub cgroups: bool,
    /// As whom tasks run, if this process is root; `None`: as this process.
    pub task_user: Option<String>,
    /// Bytes that jobs may keep for the jobs after them.
    pub kept_bytes: u64,
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
            driver_command: Vec::new(),
            lease_ms: 600_000,
            log_bytes: 1 << 20,
            log_keep_ms: 24 * 3_600_000,
            starvation_ms: 60_000,
            user_weights: BTreeMap::new(),
            disk_reserve: 64 << 20,
            cgroups: false,
            task_user: None,
            kept_bytes: 1 << 30,
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
    logs: Logs,
    has_groups: bool,
    handle: OwnerHandle,
}

impl Executor {
    /// Removes what an earlier process left of jobs, and starts the owner.
    pub async fn start(env: &Env, settings: TaskSettings, name: NodeName) -> Result<Self> {
        let first = settings.dirs.first().cloned().unwrap_or_default();
        let account = settings.task_user.as_deref().map(Account::find).transpose()?;
        let root = if account.is_some() { Account::root_beside(&first) } else { first.join("jobs") };
        let (fs, dir, wall_ms, keep_ms) =
            (Arc::clone(&env.fs), root.clone(), env.clock.wall_ms(), settings.log_keep_ms);
        let prepared = env.work.io(move || {
            logs::prepare(&fs, &dir, wall_ms, keep_ms)?;
            let Some(account) = account else { return Ok(()) };
            Account::let_pass(&dir)?;
            // Workers fill them.
            let (cache, kept) = (dir.join(logs::CACHE), dir.join(kept::KEPT));
            fs.create_dir_all(&cache)?;
            account.give(&cache)?;
            // Only what is in its folders is theirs.
            fs.create_dir_all(&kept)?;
            Account::let_list(&kept)
        });
        prepared.await.map_err(|error| Error::io(format!("cannot prepare {}", root.display()), &error))?;
        let (events, receiver) = mpsc::channel(256);
        let running = Arc::new(AtomicU32::new(0));
        let outputs = Arc::new(JobOutputs::new(env.clone()));
        let slots = settings.slots;
        let groups = groups(&settings);
        let has_groups = groups.is_some();
        let logs = Logs { env: env.clone(), root: root.clone() };
        let owner = owner::Owner::new(owner::Parts {
            env: env.clone(),
            settings,
            name,
            root,
            events: events.clone(),
            slots_used: Arc::clone(&running),
            outputs: Arc::clone(&outputs),
            groups,
            account,
        });
        // Children are tied to the thread that makes them, so it must be one that lives as long as the executor.
        let handle = env
            .work
            .owner("task-executor", move || owner.run(receiver))
            .map_err(|error| Error::io("cannot start the task executor", &error))?;
        Ok(Self { events, running, outputs, slots, logs, has_groups, handle })
    }

    /// The gRPC service for the data port.
    pub fn service(&self) -> TasksServer<TasksService> {
        TasksServer::new(TasksService::new(self.events.clone(), self.logs.clone())).max_decoding_message_size(64 << 20)
    }

    /// Finished map outputs, for `ReadMapOutput`.
    pub fn outputs(&self) -> Arc<JobOutputs> {
        Arc::clone(&self.outputs)
    }

    /// How busy it is, for heartbeats.
    pub fn load(&self) -> Arc<dyn TaskLoad> {
        Arc::new(Load { slots: self.slots, running: Arc::clone(&self.running), has_groups: self.has_groups })
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

fn groups(settings: &TaskSettings) -> Option<Groups> {
    if !settings.cgroups {
        return None;
    }
    match Groups::take_over() {
        Ok(groups) => {
            tracing::info!("the kernel holds tasks to their limits of memory and CPU (cgroup v2)");
            Some(groups)
        }
        Err(why) => {
            tracing::info!(why, "no cgroups: the memory of tasks is sampled, their CPU is not limited");
            None
        }
    }
}

struct Load {
    slots: u32,
    running: Arc<AtomicU32>,
    has_groups: bool,
}

impl TaskLoad for Load {
    fn slots(&self) -> u32 {
        self.slots
    }

    fn running(&self) -> u32 {
        self.running.load(Ordering::Relaxed)
    }

    fn has_groups(&self) -> bool {
        self.has_groups
    }
}

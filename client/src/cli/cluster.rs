//! A whole cluster on this machine: one child process per role, each with a log of its own.
//!
//! # Crash
//! Children are told this process's id and die with it, so `kill -9` of the parent leaves none behind. A child that dies is reported and
//! left dead: the first line of its log says how to start it again, and a child started by hand follows nobody. Whoever kills children on
//! purpose asks for them to be started again as children ([`crate::state`]).
//!
//! # Cancellation
//! Dropping a [`Cluster`] kills its children at once; [`Cluster::stop`] ends them in order.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use cairn_client::fs::{ClientSettings, ErrorCode, FileSystem, NodeReport, NodeState};
use cairn_common::process::ProcessRef;
use cairn_common::{Env, process};
use tokio::process::{Child, Command};

use crate::output::{Failure, Outcome, failure};
use crate::show::{LocalDatanodeJson, LocalJson, LocalNamenodeJson};
use crate::state::{self, LocalState, MemberState};
use crate::stream::local_error;

/// Tells a child whose end is its own.
const PARENT: &str = "CAIRN_PARENT";
/// What a daemon locks in its folder.
const IN_USE: &str = "in_use.lock";
/// The namenode's port if nobody says.
const BASE_PORT: u16 = 8020;
/// The namenode serves WebHDFS and metrics on this many ports above.
const HTTP_PORT: u16 = 1;
/// Datanodes listen on this many ports above, and serve HTTP on so many.
const DATANODE_PORT: u16 = 10;
const DATANODE_HTTP_PORT: u16 = 11;
/// A cluster that is not ready by then never will be.
const START_LIMIT_MS: u64 = 60_000;
/// A child that has not ended by then is killed.
const STOP_LIMIT: Duration = Duration::from_secs(15);
const LOOK_AGAIN: Duration = Duration::from_millis(5);
/// Processes of a cluster that was killed a moment ago still end: for so long a taken port or folder may be theirs.
const PREDECESSOR_LIMIT_MS: u64 = 2_000;
/// And for so long a killed member may look as if it ran.
const RESTART_PATIENCE_MS: u64 = 10_000;
const PREDECESSOR_LOOK: Duration = Duration::from_millis(50);
const REPORT_LIMIT: Duration = Duration::from_secs(2);

/// In a child of [`Cluster::start`]: die when the parent does. Call it first of all, on the main thread.
pub fn follow_parent() {
    let Some(parent) = std::env::var(PARENT).ok().and_then(|text| text.parse::<i32>().ok()) else { return };
    process::die_with_parent();
    // It may have died before that call: then we belong to somebody else already.
    let now = rustix::process::getppid().map_or(0, |pid| pid.as_raw_nonzero().get());
    if now != parent {
        std::process::exit(1);
    }
}

/// What a cluster shall be like.
pub struct Plan {
    pub dir: PathBuf,
    pub datanodes: u16,
    pub racks: u16,
    /// `None`: 8020; 0: whatever is free.
    pub base_port: Option<u16>,
    /// Flags for every child: `--config`, `--set`.
    pub flags: Vec<String>,
}

struct Member {
    name: String,
    /// As the namenode knows a datanode; empty until the cluster is ready.
    node_id: String,
    address: SocketAddr,
    rack: String,
    dir: PathBuf,
    log: PathBuf,
    /// What it was started with.
    args: Vec<String>,
    child: Child,
    pid: u32,
    /// Its end was reported.
    ended: bool,
}

/// A running cluster.
pub struct Cluster {
    env: Env,
    dir: PathBuf,
    /// The namenode first.
    members: Vec<Member>,
    /// Where the namenode serves metrics; empty until it is started.
    http: String,
    /// Since when members that still run are to be started again, monotonic milliseconds.
    asked_ms: BTreeMap<String, u64>,
    /// Held as long as the folder is in use.
    _lock: Box<dyn cairn_common::durable::Lock>,
}

impl Cluster {
    /// Makes the folders and takes the lock; nothing runs yet.
    pub async fn prepare(env: &Env, plan: &Plan) -> Outcome<Self> {
        let lock = patiently(env, || prepare(env, &plan.dir)).await?;
        let dir = plan.dir.clone();
        let asked_ms = BTreeMap::new();
        Ok(Self { env: env.clone(), dir, members: Vec::new(), http: String::new(), asked_ms, _lock: lock })
    }

    /// Starts all children and returns when the namenode is out of safe mode and every datanode is registered. Whether this ends well,
    /// badly or not at all: [`Cluster::stop`] ends what runs.
    pub async fn start(&mut self, plan: &Plan) -> Outcome {
        let Addresses { namenode, http, datanodes } = patiently(&self.env, || addresses(plan)).await?;
        self.http = http.to_string();
        let args = ["namenode", "--listen", &namenode.to_string(), "--http", &self.http].map(str::to_owned);
        self.spawn(plan, "namenode", namenode, "", args.into()).await?;
        for (at, (address, http)) in datanodes.iter().enumerate() {
            let name = format!("dn{}", at + 1);
            let rack = format!("/rack{}", at % usize::from(plan.racks) + 1);
            let args = ["datanode", "--namenode", &namenode.to_string(), "--listen", &address.to_string()];
            let named = ["--http", &http.to_string(), "--name", &name, "--rack", &rack];
            let args = args.iter().chain(&named).map(|arg| (*arg).to_owned()).collect();
            self.spawn(plan, &name, *address, &rack, args).await?;
        }
        self.wait_until_ready().await?;
        self.tell()
    }

    /// Writes down who the members are now.
    fn tell(&self) -> Outcome {
        let process = |pid| ProcessRef::of(pid).unwrap_or(ProcessRef { pid, started: 0 });
        let member = |member: &Member| MemberState {
            name: member.name.clone(),
            id: member.node_id.clone(),
            addr: member.address.to_string(),
            dir: member.dir.clone(),
            log: member.log.clone(),
            process: process(member.pid),
        };
        let members = self.members.iter().map(member).collect();
        let state = LocalState { local: process(std::process::id()), members };
        state.store(&self.env, &self.dir).map_err(|error| local_error("cannot write to", &self.dir, &error))
    }

    /// Starts ended members again that somebody asked for; returns their names. What runs is left alone, but one that was killed a moment ago may
    /// seem to run: it is looked at for a while.
    pub fn serve_requests(&mut self) -> Outcome<Vec<String>> {
        let mut started = Vec::new();
        let now_ms = self.env.clock.mono_ms();
        let requested = state::requested_restarts(&self.env, &self.dir);
        self.asked_ms.retain(|name, _| requested.contains(name));
        for name in requested {
            let Some(at) = self.members.iter().position(|member| member.name == name) else {
                state::settle_restart(&self.env, &self.dir, &name);
                continue;
            };
            let member = &mut self.members[at];
            let runs = !member.ended && matches!(member.child.try_wait(), Ok(None));
            if runs && now_ms < *self.asked_ms.entry(name.clone()).or_insert(now_ms) + RESTART_PATIENCE_MS {
                continue;
            }
            // Before the start, so that one that fails is not tried without end.
            state::settle_restart(&self.env, &self.dir, &name);
            self.asked_ms.remove(&name);
            if runs {
                continue;
            }
            let member = &self.members[at];
            let child = self.launch(&member.args, &member.log, false)?;
            let member = &mut self.members[at];
            member.pid = child.id().unwrap_or(0);
            member.child = child;
            member.ended = false;
            self.tell()?;
            started.push(name);
        }
        Ok(started)
    }

    /// Waits a little while a member of the cluster before this one still holds the folder; the child itself says so if that is not enough.
    async fn until_unused(&self, dir: &Path) {
        let lock = dir.join(IN_USE);
        let held = || match self.env.fs.lock(&lock) {
            Ok(None) => Err(failure(ErrorCode::Busy, "in use")),
            _ => Ok(()),
        };
        if matches!(self.env.fs.metadata(&lock), Ok(Some(_))) {
            let _ = patiently(&self.env, held).await;
        }
    }

    async fn spawn(
        &mut self,
        plan: &Plan,
        name: &str,
        address: SocketAddr,
        rack: &str,
        mut args: Vec<String>,
    ) -> Outcome {
        let dir = plan.dir.join(name);
        self.until_unused(&dir).await;
        args.extend(["--dir".into(), dir.display().to_string()]);
        args.extend(plan.flags.iter().cloned());
        let log = plan.dir.join("logs").join(format!("{name}.log"));
        let child = self.launch(&args, &log, true)?;
        let pid = child.id().unwrap_or(0);
        let (name, rack) = (name.to_owned(), rack.to_owned());
        let node_id = String::new();
        self.members.push(Member { name, node_id, address, rack, dir, log, args, child, pid, ended: false });
        Ok(())
    }

    /// Starts a child; a new start of the cluster begins a new log, a new start of a member goes on in the old one.
    fn launch(&self, args: &[String], log: &Path, fresh: bool) -> Outcome<Child> {
        let program = std::env::current_exe()
            .map_err(|error| failure(ErrorCode::Io, format!("cannot find this program itself: {error}")))?;
        let by_hand = command_line(&program, args);
        let output =
            open_log(&self.env, log, &by_hand, fresh).map_err(|error| local_error("cannot write", log, &error))?;
        let errors = output.try_clone().map_err(|error| local_error("cannot write", log, &error))?;
        let mut command = Command::new(&program);
        // A group of its own: Ctrl-C in the terminal is for the parent, which ends its children in order.
        command.args(args).env(PARENT, std::process::id().to_string()).process_group(0).kill_on_drop(true);
        command.stdin(Stdio::null()).stdout(output).stderr(errors);
        command.spawn().map_err(|error| failure(ErrorCode::Io, format!("cannot start {}: {error}", program.display())))
    }

    async fn wait_until_ready(&mut self) -> Outcome {
        let deadline_ms = self.env.clock.mono_ms() + START_LIMIT_MS;
        let mut fs = None;
        let mut waits_for = "the namenode".to_owned();
        loop {
            if let Some((name, how)) = self.newly_ended().into_iter().next() {
                let log = self.members.iter().find(|member| member.name == name).map(|member| member.log.clone());
                let said = log.and_then(|log| last_complaint(&log)).unwrap_or(how);
                return Err(failure(ErrorCode::Internal, format!("{name} did not start: {said}")));
            }
            if self.env.clock.mono_ms() > deadline_ms {
                let text = format!("the cluster is not ready after a minute: it waits for {waits_for}");
                return Err(failure(ErrorCode::TimedOut, text));
            }
            if fs.is_none() {
                fs = self.connect_once().await;
            }
            if let Some(fs) = &fs {
                // Not for long: the child may be gone, and the client would wait for it to come back.
                match self.env.clock.timeout(REPORT_LIMIT, fs.cluster_report()).await {
                    Ok(Ok(report)) => {
                        let live = report.nodes.iter().filter(|node| node.state() == NodeState::Live).count();
                        let wanted = self.members.len() - 1;
                        if live >= wanted && !report.safemode {
                            self.note_ids(&report.nodes);
                            return Ok(());
                        }
                        let datanodes = format!("{} of {wanted} datanodes", wanted.saturating_sub(live));
                        waits_for = if live < wanted { datanodes } else { report.safemode_reason };
                    }
                    Ok(Err(error)) => waits_for = error.to_string(),
                    Err(elapsed) => waits_for = format!("the namenode's report: {elapsed}"),
                }
            }
            self.env.clock.sleep(LOOK_AGAIN).await;
        }
    }

    fn note_ids(&mut self, nodes: &[NodeReport]) {
        for member in &mut self.members {
            let address = member.address.to_string();
            let known = nodes.iter().find(|node| node.address == address && node.state() == NodeState::Live);
            member.node_id = known.map_or_else(String::new, |node| node.id.clone());
        }
    }

    /// Dials only once something listens: the client's own repetition is too patient for a start in half a second.
    async fn connect_once(&self) -> Option<FileSystem> {
        let address = self.namenode_address();
        let dialled = self.env.net.connect(&address, Duration::from_millis(500)).await;
        drop(dialled.ok()?);
        FileSystem::connect(self.env.clone(), ClientSettings::at(address)).await.ok()
    }

    /// `HOST:PORT`.
    pub fn namenode_address(&self) -> String {
        self.members[0].address.to_string()
    }

    /// Names of children that have ended since the last call, and how.
    pub fn newly_ended(&mut self) -> Vec<(String, String)> {
        let mut ended = Vec::new();
        for member in self.members.iter_mut().filter(|member| !member.ended) {
            if let Ok(Some(status)) = member.child.try_wait() {
                member.ended = true;
                ended.push((member.name.clone(), status.to_string()));
            }
        }
        ended
    }

    /// Where a child's log is.
    pub fn log_of(&self, name: &str) -> String {
        let found = self.members.iter().find(|member| member.name == name);
        found.map_or(String::new(), |member| member.log.display().to_string())
    }

    /// Ends the datanodes, then the namenode, and waits for them; kills what does not end.
    pub async fn stop(mut self) {
        LocalState::remove(&self.env, &self.dir);
        let count = self.members.len();
        // The namenode last: datanodes say goodbye to it.
        for range in [count.min(1)..count, 0..count.min(1)] {
            for member in &self.members[range.clone()] {
                if let Some(pid) = running(member) {
                    // One that is stopped takes no notice of anything else. One that is gone meanwhile needs no signal.
                    let _ = rustix::process::kill_process(pid, rustix::process::Signal::CONT);
                    let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
                }
            }
            let clock = self.env.clock.clone();
            let wait = async {
                for member in &mut self.members[range.clone()] {
                    let _ = member.child.wait().await;
                }
            };
            if clock.timeout(STOP_LIMIT, wait).await.is_err() {
                for member in &mut self.members[range] {
                    // Waits for the end, too.
                    let _ = member.child.kill().await;
                }
            }
        }
    }

    /// The line that `local --json` prints.
    pub fn describe(&self) -> LocalJson {
        let mut datanodes = Vec::new();
        for member in &self.members[1..] {
            datanodes.push(LocalDatanodeJson {
                id: member.node_id.clone(),
                name: member.name.clone(),
                addr: member.address.to_string(),
                rack: member.rack.clone(),
                dir: member.dir.display().to_string(),
                pid: member.pid,
            });
        }
        let namenode = &self.members[0];
        LocalJson {
            namenode: LocalNamenodeJson {
                rpc: namenode.address.to_string(),
                http: self.http.clone(),
                pid: namenode.pid,
                dir: namenode.dir.display().to_string(),
            },
            datanodes,
        }
    }
}

fn running(member: &Member) -> Option<rustix::process::Pid> {
    member.child.id().and_then(|id| i32::try_from(id).ok()).and_then(rustix::process::Pid::from_raw)
}

/// Makes the folders and takes the lock.
fn prepare(env: &Env, dir: &Path) -> Outcome<Box<dyn cairn_common::durable::Lock>> {
    let wrong = |error: std::io::Error| local_error("cannot use", dir, &error);
    env.fs.create_dir_all(&dir.join("logs")).map_err(wrong)?;
    match env.fs.lock(&dir.join("local.lock")).map_err(wrong)? {
        Some(lock) => Ok(lock),
        None => Err(failure(ErrorCode::Busy, format!("another `cairn local` runs in {}", dir.display()))),
    }
}

/// Repeats what finds something in use, for as long as the processes of a cluster that was just killed may need to end.
async fn patiently<T>(env: &Env, mut attempt: impl FnMut() -> Outcome<T>) -> Outcome<T> {
    let deadline_ms = env.clock.mono_ms() + PREDECESSOR_LIMIT_MS;
    loop {
        match attempt() {
            Err(Failure::Error(error)) if error.code() == ErrorCode::Busy && env.clock.mono_ms() < deadline_ms => {
                env.clock.sleep(PREDECESSOR_LOOK).await;
            }
            other => return other,
        }
    }
}

/// Where everybody listens; each datanode has an address of its own, for data and for HTTP.
struct Addresses {
    namenode: SocketAddr,
    /// The namenode's, too.
    http: SocketAddr,
    datanodes: Vec<(SocketAddr, SocketAddr)>,
}

fn addresses(plan: &Plan) -> Outcome<Addresses> {
    let base = plan.base_port.unwrap_or(BASE_PORT);
    let wanted = |host: u16, above: u16| {
        let host = Ipv4Addr::from(u32::from(Ipv4Addr::LOCALHOST) + u32::from(host));
        SocketAddr::from((host, if base == 0 { 0 } else { base + above }))
    };
    // All are held until all are found, so that no port is found twice.
    let mut held = Vec::new();
    let mut find = |wanted: SocketAddr| {
        let listener = TcpListener::bind(wanted).map_err(|error| match error.kind() {
            std::io::ErrorKind::AddrInUse => {
                let text = format!("{wanted} is in use: choose other ports with --base-port (0: any that are free)");
                failure(ErrorCode::Busy, text)
            }
            _ => failure(ErrorCode::Io, format!("cannot listen on {wanted}: {error}")),
        })?;
        let found = listener.local_addr();
        held.push(listener);
        found.map_err(|error| failure(ErrorCode::Io, format!("cannot listen on {wanted}: {error}")))
    };
    let namenode = find(wanted(0, 0))?;
    let http = find(wanted(0, HTTP_PORT))?;
    let datanodes = (1..=plan.datanodes)
        .map(|at| Ok((find(wanted(at, DATANODE_PORT))?, find(wanted(at, DATANODE_HTTP_PORT))?)))
        .collect::<Outcome<_>>()?;
    Ok(Addresses { namenode, http, datanodes })
}

/// A fresh log (the one of the last run is kept beside it), or more of the same one. The command is the first line of each start.
fn open_log(env: &Env, log: &Path, by_hand: &str, fresh: bool) -> std::io::Result<std::fs::File> {
    let fs = Arc::clone(&env.fs);
    if fresh && fs.metadata(log)?.is_some() {
        fs.rename(log, &log.with_extension("log.1"))?;
    }
    let mut file = std::fs::OpenOptions::new().append(true).create(true).open(log)?;
    std::io::Write::write_all(&mut file, format!("{by_hand}\n").as_bytes())?;
    Ok(file)
}

/// The command as a shell takes it.
fn command_line(program: &Path, args: &[String]) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,+@%".contains(c);
    let quote = |text: &str| {
        if !text.is_empty() && text.chars().all(plain) {
            text.to_owned()
        } else {
            format!("'{}'", text.replace('\'', r"'\''"))
        }
    };
    let mut words = vec![quote(&program.display().to_string())];
    words.extend(args.iter().map(|arg| quote(arg)));
    words.join(" ")
}

/// What a child said last on its way out.
fn last_complaint(log: &Path) -> Option<String> {
    let text = std::fs::read_to_string(log).ok()?;
    let lines: Vec<&str> = text.lines().skip(1).filter(|line| !line.trim().is_empty()).collect();
    let complaint = lines.iter().rev().find_map(|line| line.strip_prefix("cairn: "));
    complaint.or(lines.last().copied()).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_can_be_pasted_into_a_shell() {
        let args = ["datanode".to_owned(), "--dir".into(), "/tmp/a b/it's".into(), String::new()];
        let line = command_line(Path::new("/usr/bin/cairn"), &args);
        assert_eq!(line, r"/usr/bin/cairn datanode --dir '/tmp/a b/it'\''s' ''");
    }

    #[test]
    fn free_ports_differ_and_a_taken_one_is_named() {
        let plan =
            |base| Plan { dir: PathBuf::new(), datanodes: 3, racks: 2, base_port: Some(base), flags: Vec::new() };
        let found = addresses(&plan(0)).unwrap();
        assert_eq!(found.namenode.ip(), Ipv4Addr::LOCALHOST);
        assert_ne!(found.namenode, found.http);
        assert_eq!(found.datanodes[2].0.ip(), Ipv4Addr::new(127, 0, 0, 4));
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let Err(crate::output::Failure::Error(error)) = addresses(&plan(port)) else { panic!() };
        assert!(error.message().contains("--base-port"), "{error}");
    }

    #[tokio::test]
    async fn a_cluster_that_did_not_start_can_be_stopped() {
        let (dir, taken) = (tempfile::tempdir().unwrap(), TcpListener::bind("127.0.0.1:0").unwrap());
        let base_port = Some(taken.local_addr().unwrap().port());
        let plan = Plan { dir: dir.path().into(), datanodes: 1, racks: 1, base_port, flags: Vec::new() };
        let mut cluster = Cluster::prepare(&Env::system(), &plan).await.unwrap();
        assert!(cluster.start(&plan).await.is_err());
        cluster.stop().await;
    }

    #[test]
    fn a_folder_has_one_cluster() {
        let env = Env::system();
        let dir = tempfile::tempdir().unwrap();
        let held = prepare(&env, dir.path()).unwrap();
        assert!(prepare(&env, dir.path()).is_err());
        drop(held);
        assert!(prepare(&env, dir.path()).is_ok());
    }

    #[test]
    fn the_log_begins_with_the_command_and_ends_with_the_reason() {
        let env = Env::system();
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("dn1.log");
        for _ in 0..2 {
            let mut file = open_log(&env, &log, "cairn datanode", true).unwrap();
            std::io::Write::write_all(&mut file, b"INFO x\ncairn: the disk is full\n").unwrap();
        }
        let text = std::fs::read_to_string(&log).unwrap();
        assert!(text.starts_with("cairn datanode\n") && text.matches("INFO").count() == 1);
        assert_eq!(last_complaint(&log).as_deref(), Some("the disk is full"));
    }
}

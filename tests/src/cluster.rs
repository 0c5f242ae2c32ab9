//! A cluster of real processes, started by `cairn local`.
//!
//! Its members are killed, stopped and started again one by one (with the very command that `cairn local` started them with). When it is
//! dropped, its processes are ended, by id, and its folder is removed; if the test failed, the ends of all logs are printed first.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

use crate::binary;
use crate::ports::PortRange;
use crate::process::{self, Process};
use crate::run::Run;
use crate::wait::{stretched, wait_for, wait_until};

/// How long a cluster may take to be ready, on a machine that is busy with other tests.
const READY: Duration = Duration::from_secs(60);

/// What a cluster is like.
#[derive(Clone, Debug)]
pub struct ClusterOptions {
    /// Datanodes.
    pub datanodes: usize,
    /// Racks.
    pub racks: usize,
    /// Keys of `[namenode.core]` beside (or instead of) the harness's own.
    pub core: Vec<(String, String)>,
    /// More lines of the settings file.
    pub more: String,
}

impl ClusterOptions {
    /// So many datanodes in so many racks, with short intervals and blocks of 1 MiB.
    pub fn new(datanodes: usize, racks: usize) -> Self {
        Self { datanodes, racks, core: Vec::new(), more: String::new() }
    }

    /// Sets a key of `[namenode.core]`.
    #[must_use]
    pub fn core(mut self, key: &str, value: impl ToString) -> Self {
        self.core.retain(|(known, _)| known != key);
        self.core.push((key.into(), value.to_string()));
        self
    }

    /// Adds lines to the settings file.
    #[must_use]
    pub fn more(mut self, lines: &str) -> Self {
        self.more.push_str(lines);
        self.more.push('\n');
        self
    }

    fn settings(&self) -> String {
        // A dead interval long enough that a busy test machine does not lose nodes by accident, and short enough to wait for.
        let mut core: Vec<(String, String)> = [
            ("heartbeat_interval_ms", "200"),
            ("stale_interval_ms", "1500"),
            ("dead_interval_ms", "4000"),
            ("min_block_size", "512"),
            ("default_block_size", "1048576"),
        ]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into();
        for (key, value) in &self.core {
            core.retain(|(known, _)| known != key);
            core.push((key.clone(), value.clone()));
        }
        let lines: Vec<String> = core.iter().map(|(key, value)| format!("{key} = {value}")).collect();
        format!("[namenode.core]\n{}\n{}", lines.join("\n"), self.more)
    }
}

/// A process of the cluster.
#[derive(Clone, Debug)]
pub struct Member {
    /// Node id; "namenode" for that one.
    pub id: String,
    /// Where it listens.
    pub addr: String,
    /// Its rack; empty for the namenode.
    pub rack: String,
    /// Its folder.
    pub dir: PathBuf,
    /// Its process.
    pub process: Process,
    command: Vec<String>,
    environment: Vec<(String, String)>,
}

impl Member {
    /// The command that starts it, for a test that starts it in another way the next time.
    pub fn command_mut(&mut self) -> &mut Vec<String> {
        &mut self.command
    }

    /// Where it serves HTTP.
    pub fn http(&self) -> &str {
        let at = self.command.iter().position(|arg| arg == "--http").expect("a member is told where to serve HTTP");
        &self.command[at + 1]
    }

    /// One that runs when it is started with `command`; until then its process is ours.
    pub(crate) fn by_hand(id: &str, addr: &str, rack: &str, dir: PathBuf, command: Vec<String>) -> Self {
        let environment = std::env::vars().filter(|(key, _)| !key.starts_with("CAIRN_")).collect();
        let process = Process::of(std::process::id()).unwrap();
        Self { id: id.into(), addr: addr.into(), rack: rack.into(), dir, process, command, environment }
    }
}

/// A running cluster; see the module.
pub struct Cluster {
    folder: TempDir,
    ports: PortRange,
    options: ClusterOptions,
    supervisor: Option<Child>,
    /// The namenode.
    pub namenode: Member,
    /// The datanodes.
    pub datanodes: Vec<Member>,
    /// Members that this harness started again.
    children: Vec<Child>,
    starts: usize,
    /// Logs of the datanodes that were started again, the last one of each.
    restarts: BTreeMap<usize, PathBuf>,
}

impl Cluster {
    /// Starts a cluster and waits until it is ready.
    pub fn start(options: ClusterOptions) -> Self {
        let mut cluster = Self::bare(options);
        cluster.start_supervisor();
        cluster
    }

    /// Folder, ports and settings; nothing runs.
    pub(crate) fn bare(options: ClusterOptions) -> Self {
        let folder = tempfile::Builder::new().prefix("cairn-test-").tempdir().unwrap();
        let ports = PortRange::take();
        std::fs::write(folder.path().join("cairn.toml"), options.settings()).unwrap();
        let addr = format!("127.0.0.1:{}", ports.base());
        let nobody = Member::by_hand("namenode", &addr, "", PathBuf::new(), Vec::new());
        Self {
            folder,
            ports,
            options,
            supervisor: None,
            namenode: nobody,
            datanodes: Vec::new(),
            children: Vec::new(),
            starts: 0,
            restarts: BTreeMap::new(),
        }
    }

    /// Its range of ports.
    pub(crate) fn ports(&self) -> &PortRange {
        &self.ports
    }

    /// Three datanodes in two racks.
    pub fn small() -> Self {
        Self::start(ClusterOptions::new(3, 2))
    }

    fn start_supervisor(&mut self) {
        self.starts += 1;
        let log = std::fs::File::create(self.path(&format!("local.{}.log", self.starts))).unwrap();
        let mut child = Command::new(binary::cairn())
            .args(["local", "--json", "--dir"])
            .arg(self.dir())
            .args(["--datanodes", &self.options.datanodes.to_string(), "--racks", &self.options.racks.to_string()])
            .args(["--base-port", &self.ports.base().to_string(), "--config"])
            .arg(self.config())
            .env_remove("CAIRN_NAMENODE")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .unwrap();
        let stdout = child.stdout.take().unwrap();
        self.supervisor = Some(child);
        let (send, receive) = std::sync::mpsc::sync_channel(1);
        std::thread::spawn(move || {
            let mut line = String::new();
            let mut stdout = BufReader::new(stdout);
            // The pipe stays open behind it, so that nothing that is printed later ends the cluster.
            let read = stdout.read_line(&mut line).map(|_| line);
            let _ = send.send(read);
            let _ = std::io::copy(&mut stdout, &mut std::io::sink());
        });
        let line = match receive.recv_timeout(stretched(READY)) {
            Ok(line) => line.unwrap(),
            Err(_) => panic!("cairn local was not ready within {READY:?}"),
        };
        assert!(!line.is_empty(), "cairn local ended before it was ready");
        let ready: Value = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}"));
        let member = |value: &Value, id: &str, addr: &str| {
            let process = Process::of(value["pid"].as_u64().unwrap() as u32).expect("the member runs");
            Member {
                id: id.to_owned(),
                addr: addr.to_owned(),
                rack: value["rack"].as_str().unwrap_or_default().to_owned(),
                dir: PathBuf::from(value["dir"].as_str().unwrap()),
                process,
                command: process.command_line(),
                environment: process.environment(),
            }
        };
        let namenode = &ready["namenode"];
        self.namenode = member(namenode, "namenode", namenode["rpc"].as_str().unwrap());
        let nodes = ready["datanodes"].as_array().unwrap();
        self.datanodes =
            nodes.iter().map(|n| member(n, n["id"].as_str().unwrap(), n["addr"].as_str().unwrap())).collect();
        assert_eq!(self.datanodes.len(), self.options.datanodes);
    }

    /// Folder of the cluster.
    pub fn dir(&self) -> PathBuf {
        self.path("cluster")
    }

    /// A path beside the cluster's folder, for files of the test.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// All that members of the cluster have logged.
    pub fn logs(&self) -> String {
        let files = files_below(&self.path(""), &|name| name.ends_with(".log"));
        // A segment of the edit log may go meanwhile.
        let texts = files.iter().filter_map(|log| std::fs::read(log).ok());
        texts.map(|text| String::from_utf8_lossy(&text).into_owned()).collect()
    }

    /// The settings file.
    pub fn config(&self) -> PathBuf {
        self.path("cairn.toml")
    }

    /// A free port that the cluster does not use.
    pub fn spare_port(&self, k: u16) -> u16 {
        self.ports.spare(k)
    }

    /// The `cairn` command, talking to this cluster.
    pub fn command<S: AsRef<std::ffi::OsStr>>(&self, args: &[S]) -> Command {
        let mut command = Command::new(binary::cairn());
        command
            .args(args)
            .env("CAIRN_NAMENODE", &self.namenode.addr)
            .env_remove("CAIRN_USER")
            .current_dir(self.folder.path());
        command
    }

    /// Runs `cairn` with `args`.
    pub fn cairn(&self, args: &[&str]) -> Run {
        Run::of(self.command(args), b"")
    }

    /// Runs `cairn` with `input` on its standard input.
    pub fn cairn_with(&self, args: &[&str], input: &[u8]) -> Run {
        Run::of(self.command(args), input)
    }

    /// Runs `cairn --json` with `args`; returns what it printed. It must succeed.
    #[track_caller]
    pub fn json(&self, args: &[&str]) -> Value {
        let mut all = vec!["--json"];
        all.extend(args);
        self.cairn(&all).json()
    }

    /// Writes a local file and returns its path.
    pub fn local_file(&self, name: &str, bytes: &[u8]) -> String {
        let path = self.path(name);
        std::fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// Stores `bytes` at `path` through standard input, with more `flags`.
    #[track_caller]
    pub fn put(&self, path: &str, bytes: &[u8], flags: &[&str]) {
        let mut args = vec!["put"];
        args.extend(flags);
        args.extend(["-", path]);
        self.cairn_with(&args, bytes).ok();
    }

    /// [`Cluster::put`], with the folders above that are missing.
    #[track_caller]
    pub fn put_in_folders(&self, path: &str, bytes: &[u8], flags: &[&str]) {
        let (folder, _) = path.rsplit_once('/').unwrap();
        self.cairn(&["mkdir", "-p", folder]).ok();
        self.put(path, bytes, flags);
    }

    /// Reads a file through `cairn cat`.
    #[track_caller]
    pub fn cat(&self, path: &str) -> Vec<u8> {
        self.cairn(&["cat", path]).ok_bytes()
    }

    /// What `cairn fsck` says; its exit code must fit it.
    #[track_caller]
    pub fn fsck(&self, args: &[&str]) -> Value {
        let mut all = vec!["--json", "fsck"];
        all.extend(args);
        let run = self.cairn(&all);
        let report: Value = serde_json::from_slice(&run.stdout)
            .unwrap_or_else(|error| panic!("fsck: {error}: {:?} {}", String::from_utf8_lossy(&run.stdout), run.stderr));
        let well = report["status"] == "healthy" && report["unverified"] == 0;
        assert_eq!(run.code, i32::from(!well), "{report}");
        report
    }

    /// Every block's replicas as `(block id, replicas)`.
    #[track_caller]
    pub fn blocks(&self, path: &str) -> Vec<Value> {
        self.json(&["blocks", path])["blocks"].as_array().unwrap().clone()
    }

    /// Index of the datanode that holds a replica, as `blocks` describes it.
    #[track_caller]
    pub fn datanode(&self, replica: &Value) -> usize {
        let found = self.datanodes.iter().position(|node| replica["node"] == *node.id);
        found.unwrap_or_else(|| panic!("no datanode holds {replica}"))
    }

    /// Kills a datanode (SIGKILL) and waits until it is gone.
    pub fn kill_datanode(&mut self, index: usize) {
        let process = self.datanodes[index].process;
        self.kill(process);
    }

    /// Kills the namenode and waits until it is gone.
    pub fn kill_namenode(&mut self) {
        let process = self.namenode.process;
        self.kill(process);
    }

    fn kill(&mut self, process: Process) {
        assert!(process.runs(), "process {} runs before it is killed", process.pid);
        process.signal(libc::SIGKILL);
        wait_until("a killed process is gone", Duration::from_secs(10), || !process.runs());
        self.reap();
    }

    fn reap(&mut self) {
        self.children.retain_mut(|child| matches!(child.try_wait(), Ok(None)));
    }

    /// Starts a killed datanode again, with the command that it had.
    pub fn restart_datanode(&mut self, index: usize) {
        let member = self.datanodes[index].clone();
        let name = format!("datanode-{index}");
        self.datanodes[index].process = self.respawn(&member, &name);
        self.restarts.insert(index, self.log_of_start(&name));
    }

    /// The same with another `--dir`.
    pub fn restart_datanode_on(&mut self, index: usize, dirs: &str) {
        let command = &mut self.datanodes[index].command;
        let at = command.iter().position(|arg| arg == "--dir").expect("a datanode is told its folder");
        command[at + 1] = dirs.into();
        self.restart_datanode(index);
    }

    /// Starts the killed namenode again, with the command that it had.
    pub fn restart_namenode(&mut self) {
        let member = self.namenode.clone();
        self.namenode.process = self.respawn(&member, "namenode");
    }

    fn respawn(&mut self, member: &Member, name: &str) -> Process {
        self.starts += 1;
        let child = self.spawn_member(member, &self.log_of_start(name));
        let process = Process::of(child.id()).expect("it was just started");
        self.children.push(child);
        process
    }

    fn log_of_start(&self, name: &str) -> PathBuf {
        self.path(&format!("{name}.again.{}.log", self.starts))
    }

    fn spawn_member(&self, member: &Member, log: &Path) -> Child {
        let log = std::fs::File::create(log).unwrap();
        // What tells a member to die with `cairn local` must not tie it to us: tests end their members themselves.
        let environment = member.environment.iter().filter(|(key, _)| key != "CAIRN_PARENT");
        Command::new(&member.command[0])
            .args(&member.command[1..])
            .env_clear()
            .envs(environment.map(|(key, value)| (key, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap()
    }

    /// Runs a member's own command once more, on a spare port, to its end: for starts that must fail.
    pub fn run_member(&self, member: &Member) -> Run {
        let mut command = Command::new(&member.command[0]);
        let mut args = member.command[1..].to_vec();
        let listen = args.iter().position(|arg| arg == "--listen").expect("a member is told where to listen");
        args[listen + 1] = format!("127.0.0.1:{}", self.spare_port(0));
        if let Some(http) = args.iter().position(|arg| arg == "--http") {
            args[http + 1] = "127.0.0.1:0".into();
        }
        command.args(args).env_clear();
        command.envs(member.environment.iter().filter(|(key, _)| key != "CAIRN_PARENT").map(|(k, v)| (k, v)));
        Run::of(command, b"")
    }

    /// Kills every process of the cluster at once.
    pub fn kill_everything(&mut self) {
        let mut all: Vec<Process> = vec![self.namenode.process];
        all.extend(self.datanodes.iter().map(|node| node.process));
        all.extend(self.supervisor.as_ref().and_then(|child| Process::of(child.id())));
        for process in &all {
            process.signal(libc::SIGKILL);
        }
        if let Some(mut supervisor) = self.supervisor.take() {
            let _ = supervisor.wait();
        }
        wait_until("all killed processes are gone", Duration::from_secs(10), || all.iter().all(|p| !p.runs()));
        self.reap();
    }

    /// Ends the cluster in order (SIGTERM) and waits for it.
    pub fn stop(&mut self) {
        self.signal_supervisor(libc::SIGTERM);
    }

    /// Sends `cairn local` a signal and demands that it ends with success within the time that its members get, twice 15 s, and a little.
    pub fn signal_supervisor(&mut self, signal: i32) {
        let mut supervisor = self.supervisor.take().expect("cairn local runs");
        Process::of(supervisor.id()).expect("cairn local runs").signal(signal);
        let status = wait_for("cairn local ends", Duration::from_secs(40), || match supervisor.try_wait().unwrap() {
            Some(status) => Ok(status),
            None => Err("it still runs".into()),
        });
        assert!(status.success(), "cairn local ended with {status}");
    }

    /// The process of `cairn local`.
    pub fn supervisor(&self) -> Process {
        let child = self.supervisor.as_ref().expect("cairn local runs");
        Process::of(child.id()).expect("cairn local runs")
    }

    /// Starts the whole cluster again on the same folder, after [`Self::kill_everything`] or [`Self::stop`].
    pub fn start_again(&mut self) {
        self.start_supervisor();
    }

    /// Waits until `fsck` finds all well: nothing missing, corrupt, under- or over-replicated.
    #[track_caller]
    pub fn wait_healthy(&self, deadline: Duration) {
        self.wait_whole("/", deadline);
    }

    /// The same for what is at `path`. A `put` ends with fewer replicas if a datanode of its pipeline was slow, and before all are reported.
    #[track_caller]
    pub fn wait_whole(&self, path: &str, deadline: Duration) {
        wait_for(&format!("all blocks of {path} healthy at their replication"), deadline, || {
            let run = self.cairn(&["--json", "fsck", path]);
            let Ok(report) = serde_json::from_slice::<Value>(&run.stdout) else { return Err(run.stderr) };
            let zero = |key: &str| report[key].as_u64() == Some(0);
            let well = report["status"] == "healthy"
                && ["missing", "corrupt", "under_replicated", "over_replicated"].into_iter().all(zero);
            if well { Ok(()) } else { Err(report.to_string()) }
        });
    }

    /// Waits until the namenode calls a datanode's state by this name.
    #[track_caller]
    pub fn wait_state(&self, index: usize, state: &str, deadline: Duration) {
        let Member { id, addr, .. } = &self.datanodes[index];
        wait_for(&format!("datanode {id} is {state}"), deadline, || {
            let run = self.cairn(&["--json", "admin", "report"]);
            let Ok(report) = serde_json::from_slice::<Value>(&run.stdout) else { return Err(run.stderr) };
            let nodes = report["nodes"].as_array().cloned().unwrap_or_default();
            match nodes.iter().find(|node| node["addr"] == *addr) {
                Some(node) if node["state"] == state => Ok(()),
                other => Err(format!("{other:?}")),
            }
        });
    }

    /// Waits until a datanode that was started again by this harness has registered. Until then it may be called live for what it was before.
    #[track_caller]
    pub fn wait_registered(&self, index: usize, deadline: Duration) {
        let log = self.restarts.get(&index).expect("a datanode that was started again");
        wait_for(&format!("{} has registered again", self.datanodes[index].id), deadline, || {
            let text = std::fs::read_to_string(log).unwrap_or_default();
            if text.contains("registered with") { Ok(()) } else { Err(text) }
        });
    }

    /// Waits until the namenode answers and is out of safe mode.
    #[track_caller]
    pub fn wait_serving(&self, deadline: Duration) {
        wait_for("the namenode serves, out of safe mode", deadline, || {
            let run = self.cairn(&["--json", "admin", "report"]);
            match serde_json::from_slice::<Value>(&run.stdout) {
                Ok(report) if report["safemode"] == false => Ok(()),
                Ok(report) => Err(report.to_string()),
                Err(_) => Err(run.stderr),
            }
        });
    }

    /// Block files of a datanode, finalized and not.
    pub fn block_files(&self, index: usize) -> Vec<PathBuf> {
        files_below(&self.datanodes[index].dir, &|name| name.ends_with(".blk") || name.ends_with(".rbw"))
    }

    /// The file that holds a block on a datanode.
    pub fn block_file(&self, index: usize, block: &Value) -> PathBuf {
        let id = block["id"].to_string();
        let prefix = format!("{}_", id.trim_matches('"'));
        let found =
            files_below(&self.datanodes[index].dir, &|name| name.starts_with(&prefix) && name.ends_with(".blk"));
        assert_eq!(found.len(), 1, "block {id} on datanode {index}: {found:?}");
        found.into_iter().next().unwrap()
    }

    fn print_logs(&self) {
        for log in files_below(self.folder.path(), &|name| name.ends_with(".log")) {
            let text = String::from_utf8_lossy(&std::fs::read(&log).unwrap_or_default()).into_owned();
            let lines: Vec<&str> = text.lines().collect();
            eprintln!("---- {} ({} lines)", log.display(), lines.len());
            for line in &lines[lines.len().saturating_sub(60)..] {
                eprintln!("{line}");
            }
        }
    }
}

/// All files below `dir` whose name is wanted, sorted; folders that vanish while it looks are skipped.
pub fn files_below(dir: &Path, wanted: &dyn Fn(&str) -> bool) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        let Ok(entries) = std::fs::read_dir(&folder) else { continue };
        for entry in entries.flatten() {
            let path = entry.path();
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => folders.push(path),
                Ok(_) if wanted(&entry.file_name().to_string_lossy()) => found.push(path),
                _ => {}
            }
        }
    }
    found.sort();
    found
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.print_logs();
        }
        let mut members: Vec<Process> = vec![self.namenode.process];
        members.extend(self.datanodes.iter().map(|node| node.process));
        members.retain(|member| member.pid != std::process::id());
        // A stopped process takes no notice of SIGTERM.
        members.iter().for_each(|member| member.signal(libc::SIGCONT));
        if let Some(mut supervisor) = self.supervisor.take() {
            let process = Process::of(supervisor.id());
            process.inspect(|process| process.signal(libc::SIGTERM));
            let started = std::time::Instant::now();
            while matches!(supervisor.try_wait(), Ok(None)) && started.elapsed() < Duration::from_secs(10) {
                std::thread::sleep(Duration::from_millis(20));
            }
            process.inspect(|process| process.signal(libc::SIGKILL));
            let _ = supervisor.wait();
        }
        // Members that were started again by hand, workers, and whatever else still works on the folder.
        for process in members.into_iter().chain(process::using(self.folder.path())) {
            process.signal(libc::SIGKILL);
        }
        for child in &mut self.children {
            let _ = child.wait();
        }
    }
}

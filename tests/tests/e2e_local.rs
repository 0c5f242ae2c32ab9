//! Clusters come up and go down: `cairn local`, `cairn demo`, and daemons started by hand.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "tests fail by panicking")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use cairn_tests::process::{self, Process};
use cairn_tests::{Cluster, ClusterOptions, Run, binary, wait_for, wait_until};

/// `cairn local` gives its datanodes 15 s to end, then the namenode as much.
const SOON: Duration = Duration::from_secs(40);

#[test]
fn a_cluster_ends_with_its_last_process() {
    let mut cluster = Cluster::small();
    let mut members: Vec<Process> = cluster.datanodes.iter().map(|node| node.process).collect();
    members.push(cluster.namenode.process);
    let addresses: std::collections::BTreeSet<_> =
        cluster.datanodes.iter().map(|node| node.addr.split(':').next().unwrap().to_owned()).collect();
    assert_eq!(addresses.len(), 3, "each datanode has an address of its own");
    cluster.signal_supervisor(libc::SIGINT);
    wait_until("no member is left", SOON, || members.iter().all(|member| !member.runs()));
}

#[test]
fn a_killed_supervisor_takes_its_members_with_it() {
    let mut cluster = Cluster::small();
    let members: Vec<Process> = cluster.datanodes.iter().map(|node| node.process).collect();
    let supervisor = process::using(&cluster.dir())
        .into_iter()
        .find(|process| process.command_line().get(1).is_some_and(|arg| arg == "local"))
        .unwrap();
    supervisor.signal(libc::SIGKILL);
    wait_until("no member is left", SOON, || members.iter().all(|member| !member.runs()));
    cluster.kill_everything();
    cluster.start_again();
    cluster.wait_serving(SOON);
}

#[test]
fn without_a_folder_nothing_is_left() {
    let temp = tempfile::tempdir().unwrap();
    let ports = cairn_tests::ports::PortRange::take();
    let mut command = Command::new(binary::cairn());
    command
        .args(["local", "--json", "--base-port", &ports.base().to_string(), "--datanodes", "1", "--racks", "1"])
        .env("TMPDIR", temp.path());
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(child.stdout.take().unwrap()), &mut line).unwrap();
    let ready: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert!(ready["namenode"]["http"].is_string() || ready["namenode"]["http"].is_null());
    Process::of(child.id()).unwrap().signal(libc::SIGTERM);
    assert!(child.wait().unwrap().success());
    assert_eq!(left_in(temp.path()), Vec::<PathBuf>::new());
}

fn left_in(folder: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect()
}

fn demo(temp: &Path) -> Command {
    let mut command = Command::new(binary::cairn());
    command.args(["demo", "--size", "8m"]).env("TMPDIR", temp).env_remove("CAIRN_NAMENODE");
    command
}

#[test]
fn the_demo_shows_a_job_and_cleans_up() {
    let temp = tempfile::tempdir().unwrap();
    let text = Run::of(demo(temp.path()), b"").ok();
    for word in ["node-local", "the"] {
        assert!(text.contains(word), "{word:?} in {text}");
    }
    assert_eq!(left_in(temp.path()), Vec::<PathBuf>::new());
    assert!(process::using(temp.path()).is_empty());
}

#[test]
fn ctrl_c_in_the_demo_leaves_no_process_and_no_folder() {
    for delay in [0, 300, 1_200] {
        let temp = tempfile::tempdir().unwrap();
        let mut child = demo(temp.path()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        wait_until("the demo has begun", SOON, || {
            !left_in(temp.path()).is_empty() || child.try_wait().unwrap().is_some()
        });
        // Different moments of its work.
        std::thread::sleep(Duration::from_millis(delay));
        Process::of(child.id()).inspect(|demo| demo.signal(libc::SIGINT));
        wait_for("the demo ends", SOON, || child.try_wait().unwrap().ok_or_else(|| "it runs".into()));
        wait_until("no process is left", SOON, || process::using(temp.path()).is_empty());
        assert_eq!(left_in(temp.path()), Vec::<PathBuf>::new(), "after {delay} ms");
    }
}

/// Daemons started by hand, killed when dropped.
struct Daemons(Vec<Child>);

impl Drop for Daemons {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn daemon(args: &[&str], log: &Path) -> Child {
    let log = std::fs::File::create(log).unwrap();
    let mut command = Command::new(binary::cairn());
    command
        .args(args)
        .env_remove("CAIRN_NAMENODE")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap()
}

#[test]
fn daemons_started_by_hand_make_a_cluster_and_stop_in_order() {
    let ports = cairn_tests::ports::PortRange::take();
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let rpc = format!("127.0.0.1:{}", ports.base());
    let metadata = format!("{},{}", path("nn1"), path("nn2"));
    let mut daemons =
        Daemons(vec![daemon(&["namenode", "--dir", &metadata, "--listen", &rpc], &dir.path().join("nn.log"))]);
    for k in 1..=2_u16 {
        let listen = format!("127.0.0.{k}:{}", ports.base() + 10);
        let volumes = format!("{},{}", path(&format!("d{k}a")), path(&format!("d{k}b")));
        let rack = format!("/dc/r{k}");
        let args = ["datanode", "--namenode", &rpc, "--dir", &volumes, "--listen", &listen, "--rack", &rack];
        daemons.0.push(daemon(&args, &dir.path().join(format!("dn{k}.log"))));
    }
    let cairn = |args: &[&str], input: &[u8]| {
        let mut command = Command::new(binary::cairn());
        command.args(args).env("CAIRN_NAMENODE", &rpc);
        Run::of(command, input)
    };
    wait_for("both datanodes are live", SOON, || {
        let run = cairn(&["--json", "admin", "report"], b"");
        let live = String::from_utf8_lossy(&run.stdout).matches("\"live\"").count();
        if live == 2 { Ok(()) } else { Err(format!("{live} live, {}", run.stderr)) }
    });
    cairn(&["put", "--replication", "2", "-", "/f"], &[5; 3_000_000]).ok();
    // The file is there once one of its replicas is reported.
    wait_for("a replica in each rack", SOON, || {
        let report = cairn(&["--json", "blocks", "/f"], b"").json();
        let racks: std::collections::BTreeSet<_> =
            report["blocks"][0]["replicas"].as_array().unwrap().iter().map(|r| r["rack"].to_string()).collect();
        let both = racks.into_iter().collect::<Vec<_>>() == ["\"/dc/r1\"", "\"/dc/r2\""];
        if both { Ok(()) } else { Err(report.to_string()) }
    });
    for child in daemons.0.iter_mut().rev() {
        Process::of(child.id()).unwrap().signal(libc::SIGTERM);
        let status = wait_for("a daemon stops", SOON, || child.try_wait().unwrap().ok_or_else(|| "it runs".into()));
        assert!(status.success(), "{status}");
    }
    // The second metadata folder holds all that the first holds: with the first one gone, and said so, nothing is lost.
    std::fs::remove_dir_all(dir.path().join("nn1")).unwrap();
    let refused = cairn(&["namenode", "--dir", &metadata, "--listen", &rpc], b"");
    assert_eq!(refused.code, 1, "{}", refused.stderr);
    assert!(refused.stderr.lines().last().unwrap().contains("nn1"), "{}", refused.stderr);
    let args = ["namenode", "--accept-missing-dir", "--dir", &metadata, "--listen", &rpc];
    daemons.0.push(daemon(&args, &dir.path().join("nn.again.log")));
    wait_until("the file is known", SOON, || cairn(&["stat", "/f"], b"").code == 0);
}

#[test]
fn two_daemons_on_one_folder_are_refused() {
    let cluster = Cluster::small();
    let run = cluster.run_member(&cluster.namenode);
    assert_eq!(run.code, 1, "{}", run.stderr);
    let line = run.stderr.lines().last().unwrap();
    assert!(line.contains(cluster.namenode.dir.to_str().unwrap()), "{line}");
    let run = cluster.run_member(&cluster.datanodes[0]);
    assert_eq!(run.code, 1, "{}", run.stderr);
    let line = run.stderr.lines().last().unwrap();
    assert!(line.contains(cluster.datanodes[0].dir.to_str().unwrap()), "{line}");
    let dir = cluster.dir();
    let mut command = Command::new(binary::cairn());
    command.args(["local", "--base-port", &cluster.spare_port(15).to_string(), "--dir"]).arg(&dir);
    let second = Run::of(command, b"");
    assert_eq!(second.code, 1, "{}", second.stderr);
    assert!(second.stderr.contains(dir.to_str().unwrap()), "{}", second.stderr);
    cluster.put("/f", b"the first is well", &[]);
    assert_eq!(cluster.cat("/f"), b"the first is well");
}

#[test]
fn a_folder_of_another_cluster_is_refused() {
    // The only node must not be taken for silent when the machine is busy: it would get no block.
    let patient = ClusterOptions::new(1, 1).core("stale_interval_ms", 60_000).core("dead_interval_ms", 60_000);
    let mut mine = Cluster::start(patient);
    let other = Cluster::start(ClusterOptions::new(1, 1));
    mine.put("/f", b"mine", &[]);
    mine.kill_datanode(0);
    let dir = mine.datanodes[0].dir.to_str().unwrap().to_owned();
    let listen = format!("127.0.0.1:{}", other.spare_port(0));
    let run = other.cairn(&["datanode", "--namenode", &other.namenode.addr, "--dir", &dir, "--listen", &listen]);
    assert_eq!(run.code, 1, "{}", run.stderr);
    let line = run.stderr.lines().last().unwrap();
    assert!(line.contains("cluster"), "{line}");
    assert_eq!(other.json(&["admin", "report"])["nodes"].as_array().unwrap().len(), 1);
    // Its own cluster takes it back, with all that it had.
    mine.restart_datanode(0);
    wait_for("the file is back", SOON, || match mine.cairn(&["cat", "/f"]) {
        run if run.code == 0 => {
            assert_eq!(run.stdout, b"mine");
            Ok(())
        }
        run => Err(run.stderr),
    });
}

#[test]
fn a_folder_with_other_things_in_it_is_not_formatted() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("thesis.tex"), b"precious").unwrap();
    let run = |args: &[&str]| {
        let mut command = Command::new(binary::cairn());
        command.args(args).arg("--dir").arg(dir.path()).env_remove("CAIRN_NAMENODE");
        Run::of(command, b"")
    };
    let refused = run(&["namenode", "--listen", "127.0.0.1:0"]);
    assert_eq!(refused.code, 1, "{}", refused.stderr);
    assert!(refused.stderr.lines().last().unwrap().contains(dir.path().to_str().unwrap()), "{}", refused.stderr);
    assert_eq!(left_in(dir.path()).len(), 1, "{:?}", left_in(dir.path()));
}

#[test]
fn an_address_off_loopback_needs_insecure() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("d");
    for role in ["namenode", "datanode"] {
        let mut command = Command::new(binary::cairn());
        command.args([role, "--listen", "0.0.0.0:0", "--dir"]).arg(&folder);
        Run::of(command, b"").fails_naming(1, &["0.0.0.0", "--insecure"]);
        assert!(!folder.exists(), "nothing was made");
    }
}

#[test]
fn a_port_in_use_is_named() {
    let cluster = Cluster::start(ClusterOptions::new(1, 1));
    let dir = cluster.path("another");
    let run = cluster.cairn(&["namenode", "--listen", &cluster.namenode.addr, "--dir", dir.to_str().unwrap()]);
    assert_eq!(run.code, 1);
    assert!(run.stderr.lines().last().unwrap().contains(&cluster.namenode.addr), "{}", run.stderr);
}

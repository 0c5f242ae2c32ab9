//! `cairn chaos`: what it does to a local cluster, how it ends, and what it refuses.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "tests fail by panicking")]

use std::process::Stdio;
use std::time::Duration;

use cairn_tests::process::Process;
use cairn_tests::{Cluster, ClusterOptions, Run, wait_for, wait_until};
use serde_json::Value;

/// The faults' own time, every operation's, the minute of healing, on a busy machine.
const LIMIT: Duration = Duration::from_secs(200);

fn four() -> Cluster {
    Cluster::start(ClusterOptions::new(4, 2))
}

/// Processes of the members as the cluster's own state file has them.
fn processes(cluster: &Cluster) -> Vec<(String, u32)> {
    let text = std::fs::read(cluster.dir().join("cluster.json")).unwrap();
    let state: Value = serde_json::from_slice(&text).unwrap();
    let pid = |member: &Value| member["process"]["pid"].as_u64().unwrap() as u32;
    let members = state["members"].as_array().unwrap();
    members.iter().map(|member| (member["name"].as_str().unwrap().to_owned(), pid(member))).collect()
}

#[test]
fn kills_pauses_and_damage_lose_nothing() {
    let mut cluster = four();
    let before = processes(&cluster);
    let dir = cluster.dir().display().to_string();
    let args = ["--json", "chaos", "--dir", &dir, "--for", "20s", "--every", "1500ms", "--away", "6s"];
    let more = ["--kill", "--pause", "--corrupt", "--with-namenode", "--seed", "11", "--writers", "3"];
    let child = cluster.command(&[&args[..], &more].concat()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let verdict = Run::of_child("chaos", child.unwrap(), LIMIT).json();
    assert_eq!(verdict["verdict"], "clean", "{verdict}");
    let number = |value: &Value| value.as_u64().unwrap();
    let faults = &verdict["faults"];
    assert!(number(&faults["kill"]) > 0 && number(&faults["pause"]) > 0 && number(&faults["corrupt"]) > 0, "{verdict}");
    assert!(number(&verdict["files_written"]) > 10 && number(&verdict["reads"]) > 10, "{verdict}");
    assert!(number(&verdict["replicas_verified"]) > 10 && number(&verdict["time_to_healthy_ms"]) < 60_000, "{verdict}");
    // The kills were real: members have other processes now, children of the same `cairn local`, none of them stopped.
    let after = processes(&cluster);
    let killed = number(&faults["kill"]) + number(&faults["namenode_kill"]);
    let changed = before.iter().zip(&after).filter(|(old, new)| old != new).count();
    assert!((1..=killed as usize).contains(&changed), "{before:?} {after:?} {verdict}");
    let running: Vec<Process> = after.iter().map(|(_, pid)| Process::of(*pid).unwrap()).collect();
    assert!(running.iter().all(|process| process.runs() && process.state() != Some('T')));
    // A clean run leaves no files behind, and the cluster ends with all its members.
    let left = cluster.json(&["ls", "/"]);
    assert!(left.as_array().unwrap().iter().all(|entry| !entry["path"].as_str().unwrap().contains("chaos")), "{left}");
    cluster.stop();
    wait_until("the members have ended, too", Duration::from_secs(10), || {
        running.iter().all(|process| !process.runs())
    });
    assert!(!cluster.dir().join("cluster.json").exists());
}

#[test]
fn an_interrupt_heals_and_tells() {
    let cluster = four();
    let dir = cluster.dir().display().to_string();
    let args = ["--json", "chaos", "--dir", &dir, "--for", "10m", "--every", "500ms", "--away", "10m", "--pause"];
    let child = cluster.command(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let chaos = Process::of(child.id()).unwrap();
    let members: Vec<Process> = processes(&cluster).iter().map(|(_, pid)| Process::of(*pid).unwrap()).collect();
    wait_until("a member is stopped", Duration::from_secs(30), || members.iter().any(|m| m.state() == Some('T')));
    chaos.signal(libc::SIGINT);
    let verdict = Run::of_child("chaos", child, LIMIT).json();
    assert!(verdict["interrupted"] == true && verdict["verdict"] == "clean", "{verdict}");
    assert!(verdict["faults"]["pause"].as_u64() > Some(0), "{verdict}");
    assert!(members.iter().all(|member| member.runs() && member.state() != Some('T')), "everybody goes on");
}

#[test]
fn an_interrupt_while_it_heals_ends_it_with_what_is_known() {
    let mut cluster = four();
    let dir = cluster.dir().display().to_string();
    let args = ["--json", "chaos", "--dir", &dir, "--for", "10m", "--every", "500ms", "--away", "10m", "--kill"];
    // Before one of them can be gone.
    let members: Vec<Process> = processes(&cluster).iter().map(|(_, pid)| Process::of(*pid).unwrap()).collect();
    let child = cluster.command(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let chaos = Process::of(child.id()).unwrap();
    wait_until("a member is killed", Duration::from_secs(30), || members.iter().any(|member| !member.runs()));
    // Whoever could start it again stands still: healing would take its whole time.
    let supervisor = cluster.supervisor();
    supervisor.signal(libc::SIGSTOP);
    wait_until("cairn local is stopped", Duration::from_secs(10), || supervisor.state() == Some('T'));
    chaos.signal(libc::SIGINT);
    let asked = cluster.dir().join("restart");
    wait_until("it waits for the member", Duration::from_secs(20), || {
        std::fs::read_dir(&asked).is_ok_and(|entries| entries.count() > 0)
    });
    chaos.signal(libc::SIGINT);
    let run = Run::of_child("chaos", child, Duration::from_secs(20));
    let verdict: Value = serde_json::from_slice(&run.stdout).unwrap();
    assert_eq!((run.code, verdict["verdict"].as_str()), (130, Some("unfinished")), "{verdict}");
    assert!(verdict["interrupted"] == true && verdict["faults"]["kill"].as_u64() > Some(0), "{verdict}");
    assert!(verdict["replicas_verified"] == 0 && verdict["time_to_healthy_ms"].is_null(), "{verdict}");
    // The cluster is left running, and the member that was asked for comes back.
    supervisor.signal(libc::SIGCONT);
    for node in 0..4 {
        cluster.wait_state(node, "live", LIMIT);
    }
    cluster.wait_healthy(LIMIT);
    cluster.stop();
}

#[test]
fn a_member_is_started_again_on_request() {
    let mut cluster = four();
    let before = processes(&cluster);
    cluster.kill_datanode(1);
    std::fs::create_dir_all(cluster.dir().join("restart")).unwrap();
    // What runs is left alone, what is unknown is ignored.
    for name in ["dn1", "dn2", "nobody"] {
        std::fs::write(cluster.dir().join("restart").join(name), "").unwrap();
    }
    let after = wait_for("dn2 has a new process", Duration::from_secs(20), || {
        let now = processes(&cluster);
        if now[2] == before[2] { Err(format!("{now:?}")) } else { Ok(now) }
    });
    assert_eq!((&after[0], &after[1], &after[3]), (&before[0], &before[1], &before[3]));
    cluster.wait_state(1, "live", Duration::from_secs(20));
}

#[test]
fn what_cannot_be_broken_is_refused() {
    let mut cluster = Cluster::start(ClusterOptions::new(2, 1));
    let dir = cluster.dir().display().to_string();
    let chaos = |more: &[&str]| cluster.cairn(&[&["chaos", "--dir", &dir], more].concat());
    chaos(&["--every", "never"]).fails_naming(2, &["never", "time"]);
    chaos(&["--every", "0"]).fails_naming(2, &["outside"]);
    chaos(&["--for", "2s", "--every", "3s"]).fails_naming(2, &["--every", "--for"]);
    chaos(&["--down", "2"]).fails_naming(1, &["--down 2", "2 datanodes"]);
    chaos(&["--writers", "0"]).fails_naming(2, &["writers"]);
    cluster.cairn(&["chaos"]).fails_naming(2, &["--dir"]);
    let nowhere = cluster.path("nowhere").display().to_string();
    cluster.cairn(&["chaos", "--dir", &nowhere]).fails_naming(1, &["no `cairn local`", "nowhere"]);
    cluster.kill_datanode(0);
    cluster.cairn(&["chaos", "--dir", &dir]).fails_naming(1, &["dn1", "does not run"]);
    // The state file of a cluster that was killed as a whole is still there, and deceives nobody.
    cluster.kill_everything();
    assert!(cluster.dir().join("cluster.json").exists());
    cluster.cairn(&["chaos", "--dir", &dir]).fails_naming(1, &["no `cairn local`"]);
    std::fs::write(cluster.dir().join("cluster.json"), "{").unwrap();
    cluster.cairn(&["chaos", "--dir", &dir]).fails_naming(1, &["cannot read the state"]);
}

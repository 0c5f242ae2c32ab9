//! Tasks stay within their limits, and what they said can be read afterwards.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "tests fail by panicking")]

use std::process::Stdio;
use std::time::Duration;

use cairn_tests::data::{self, sorted_lines};
use cairn_tests::process::{Process, descendants};
use cairn_tests::{Cluster, ClusterOptions, Run, wait_until};
use serde_json::Value;

/// Allocates without end in a child that has left the worker's process group; for the machine's sake it is refused more than a gibibyte.
const HUNGRY: &str = "import os,resource,time
if os.fork() == 0:
    os.setsid()
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
    held = []
    while True:
        try:
            held.append(b'x' * (8 << 20))
        except MemoryError:
            time.sleep(0.1)
os.wait()
";

fn stream(cluster: &Cluster, flags: &[&str], output: &str) -> Run {
    let line = ["--json", "job", "streaming", "--input", "/small", "--output", output, "--reducers", "0"];
    cluster.cairn(&[&line[..], flags].concat())
}

/// The report of a job that failed.
fn failed(run: Run) -> Value {
    assert_eq!(run.code, 1, "{run:?}");
    serde_json::from_slice(&run.stdout).unwrap_or_else(|error| panic!("{error}: {run:?}"))
}

#[test]
fn a_job_that_allocates_without_end_is_stopped_at_its_limit_and_harms_nobody() {
    let cluster = Cluster::small();
    cluster.put("/small", b"one line\n", &[]);
    let local = cluster.local_file("text", &data::text(13, 12 << 20, 100_000));
    cluster.cairn(&["put", &local, "/text"]).ok();
    let hungry = cluster.local_file("hungry.py", HUNGRY.as_bytes());
    let other = cluster.command(&["--json", "job", "wordcount", "/text", "/counts"]);
    let other = { other }.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let flags = ["--mapper", "python3 hungry.py", "--file", &hungry, "--task-memory", "128m", "--max-attempts", "2"];
    let report = failed(stream(&cluster, &flags, "/out"));
    let why = report["failure"].as_str().unwrap();
    for part in ["map 0", "was stopped: it used", "MiB of memory, its limit is 128 MiB", "on dn"] {
        assert!(why.contains(part), "{why:?} does not name {part:?}");
    }
    assert_eq!(report["map"]["attempts_failed"], 2, "{report}");
    let report = Run::of_child("the other job", other, Duration::from_secs(120)).json();
    assert_eq!((&report["state"], &report["map"]["attempts_failed"]), (&"succeeded".into(), &0.into()), "{report}");
    assert!(sorted_lines(&cluster.cat("/counts/part-r-*")) == data::word_count_by_pipeline(local.as_ref()));
    wait_until("what had left its group is gone, too", Duration::from_secs(20), || {
        let below = cluster.datanodes.iter().flat_map(|node| descendants(node.process.pid));
        let mut lines = below.filter_map(Process::of).map(|process| process.command_line().join(" "));
        !lines.any(|line| line.contains("hungry.py"))
    });
    assert!(cluster.datanodes.iter().all(|node| node.process.runs()));
}

#[test]
fn a_job_of_long_tasks_gives_way_to_one_that_has_waited_for_too_long() {
    let options = ClusterOptions::new(1, 1).more("[datanode]\ntask_slots = 4\ntask_starvation_ms = 2000");
    let cluster = Cluster::start(options);
    cluster.cairn(&["mkdir", "/many", "/ann"]).ok();
    cluster.cairn(&["chown", "ann", "/ann"]).ok();
    (0..6).for_each(|at| cluster.put(&format!("/many/{at}"), b"one line\n", &[]));
    let line =
        ["job", "run", "--detach", "--", "streaming", "--input", "/many", "--output", "/long", "--reducers", "0"];
    let long = cluster.json(&[&line[..], &["--mapper", "sleep 1000"]].concat());
    let status = || cluster.json(&["job", "status", long["id"].as_str().unwrap()]);
    wait_until("the long job has all slots", Duration::from_secs(60), || status()["running"] == 4);
    let report = cluster.json(&["--user", "ann", "job", "wordcount", "/many", "/ann/counts"]);
    assert_eq!(report["state"], "succeeded", "{report}");
    wait_until("the long job has its slot back", Duration::from_secs(60), || status()["running"] == 4);
    let status = status();
    assert_eq!((&status["maps_done"], &status["attempts_failed"]), (&0.into(), &0.into()), "{status}");
    cluster.json(&["job", "kill", long["id"].as_str().unwrap()]);
}

#[test]
fn a_task_that_stands_still_is_stopped_and_says_so() {
    let cluster = Cluster::small();
    cluster.put("/small", b"one line\n", &[]);
    let flags = ["--mapper", "sleep 1000", "--task-timeout", "2s", "--max-attempts", "1"];
    let report = failed(stream(&cluster, &flags, "/out"));
    let why = report["failure"].as_str().unwrap();
    assert!(why.contains("map 0") && why.contains("made no progress") && why.contains("its limit is 2 s"), "{why}");
}

#[test]
fn what_attempts_said_is_read_after_the_end_of_their_job() {
    let cluster = Cluster::start(ClusterOptions::new(3, 2));
    cluster.put("/small", b"one line\n", &[]);
    let mapper = "sh -c 'echo I am attempt $mapreduce_task_attempt_id >&2; exit 3'";
    let report = failed(stream(&cluster, &["--mapper", mapper, "--max-attempts", "3"], "/out"));
    let id = report["id"].as_str().unwrap();
    let logs = cluster.json(&["job", "logs", id]);
    let names: Vec<&str> = logs.as_array().unwrap().iter().map(|log| log["task"].as_str().unwrap()).collect();
    assert_eq!(names, ["m0.0", "m0.1", "m0.2"]);
    assert!(logs.as_array().unwrap().iter().all(|log| log["text"].as_str().unwrap().contains("I am attempt")));
    let text = cluster.cairn(&["job", "logs", id, "m0.1"]).ok();
    assert!(text.starts_with("==> m0.1 on dn") && text.contains("I am attempt"), "{text}");
    cluster.cairn(&["job", "logs", id, "r7"]).fails_naming(1, &["r7", id]);
    cluster.cairn(&["--user", "bob", "job", "logs", id]).fails_naming(1, &["belongs to"]);
    cluster.cairn(&["job", "logs", "job-0-none"]).fails_naming(1, &["no job"]);
    let listed = cluster.json(&["job", "ls"]);
    assert_eq!((&listed[0]["id"], &listed[0]["state"]), (&report["id"], &"failed".into()));
}

#[test]
fn two_users_get_half_of_the_slots_each() {
    let cluster = Cluster::start(ClusterOptions::new(2, 1).more("[datanode]\ntask_slots = 2"));
    (0..60).for_each(|at| cluster.put_in_folders(&format!("/in/{at:02}"), b"one line\n", &[]));
    cluster.cairn(&["mkdir", "/ann"]).ok();
    cluster.cairn(&["chown", "ann", "/ann"]).ok();
    // A task ends when its ticket is there, or the gate is open.
    let gate = cluster.path("gate");
    std::fs::create_dir(&gate).unwrap();
    let waits = format!(
        "sh -c 'cat; cd {}; until [ -e open ] || [ -e $mapreduce_job_id-$mapreduce_task_partition ]; do sleep 0.1; done'",
        gate.display()
    );
    let start = |user: &str, output: &str| {
        let line = ["--user", user, "job", "run", "--detach", "--", "streaming", "--input", "/in", "--output", output];
        let flags = ["--reducers", "0", "--mapper", &waits];
        cluster.json(&[&line[..], &flags].concat())["id"].as_str().unwrap().to_owned()
    };
    let status = |user: &str, id: &str| cluster.json(&["--user", user, "job", "status", id]);
    let root = start("root", "/out");
    wait_until("the first job has all slots", Duration::from_secs(60), || status("root", &root)["running"] == 4);
    let ann = start("ann", "/ann/out");
    wait_until("each has two of four", Duration::from_secs(60), || {
        let (first, second) = (status("root", &root), status("ann", &ann));
        // Slots change hands when tasks end, and not at once.
        for (id, status) in [(&root, &first), (&ann, &second)].iter().filter(|(_, status)| status["running"] != 2) {
            let attempts = status["attempts"].as_array().unwrap().iter();
            for old in attempts.filter(|one| one["elapsed_ms"].as_u64() > Some(2_000)) {
                let map = old["task"].as_str().unwrap().trim_start_matches('m').split('.').next().unwrap();
                std::fs::write(gate.join(format!("{id}-{map}")), b"").unwrap();
            }
        }
        first["running"] == 2 && second["running"] == 2
    });
    std::fs::write(gate.join("open"), b"").unwrap();
    for (user, id) in [("root", &root), ("ann", &ann)] {
        wait_until("both are done", Duration::from_secs(120), || status(user, id)["state"] == "succeeded");
        assert_eq!(status(user, id)["report"]["map"]["attempts_failed"], 0);
    }
}

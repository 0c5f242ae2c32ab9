//! Jobs outlive their drivers, have one output whatever dies or sleeps, and end when they are told to.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "tests fail by panicking")]

mod gate;

use std::process::{Child, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use cairn_tests::data::{self, sorted_lines};
use cairn_tests::process::{Process, descendants};
use cairn_tests::{Cluster, ClusterOptions, Run, wait_for, wait_until};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(120);

/// A cluster with a text of 24 blocks at `/text`, and the text's local file.
fn cluster_with_text(slots: u32) -> (Cluster, String) {
    let cluster = Cluster::start(gate::with_gate(ClusterOptions::new(3, 2), slots));
    let local = cluster.local_file("text", &data::text(11, 24 << 20, 200_000));
    cluster.cairn(&["put", &local, "/text"]).ok();
    (cluster, local)
}

fn assert_counts(cluster: &Cluster, local: &str, output: &str) {
    cluster.cairn(&["stat", &format!("{output}/_SUCCESS")]).ok();
    let got = sorted_lines(&cluster.cat(&format!("{output}/part-r-*")));
    let expected = data::word_count_by_pipeline(local.as_ref());
    assert!(got == expected, "{} bytes of counts, expected {}", got.len(), expected.len());
}

fn spawn(cluster: &Cluster, args: &[&str]) -> Child {
    cluster.command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Starts a word count that the gate holds up.
fn spawn_held(cluster: &Cluster, flags: &[&str], output: &str) -> Child {
    gate::close(cluster);
    let line = ["--json", "job", "wordcount", "--no-speculation"];
    spawn(cluster, &[&line[..], flags, &["/text", output]].concat())
}

fn wait_worker(cluster: &Cluster) -> Process {
    wait_for("a worker runs", PATIENCE, || {
        gate::workers(cluster).next().map(|(_, worker)| worker).ok_or_else(|| "none does".into())
    })
}

/// The newest job.
fn newest(cluster: &Cluster) -> Option<Value> {
    cluster.json(&["job", "ls"]).as_array().unwrap().first().cloned()
}

/// Waits until the newest job, which the gate holds up, has so many maps done; returns its id.
fn wait_maps_done(cluster: &Cluster, maps: u64) -> String {
    wait_for(&format!("{maps} maps are done"), PATIENCE, || match newest(cluster) {
        Some(job) if job["maps_done"].as_u64() >= Some(maps) && job["state"] == "running" => {
            Ok(job["id"].as_str().unwrap().to_owned())
        }
        other => Err(format!("{other:?}")),
    })
}

fn wait_state(cluster: &Cluster, id: &str, state: &str) -> Value {
    wait_for(&format!("{id} is {state}"), PATIENCE, || {
        let status = cluster.json(&["job", "status", id]);
        if status["state"] == state { Ok(status) } else { Err(status.to_string()) }
    })
}

/// Nothing but these names lies in the root: no staging folder is left.
fn assert_root(cluster: &Cluster, expected: &[&str]) {
    let listed = cluster.json(&["ls", "/"]);
    let names: Vec<&str> = listed.as_array().unwrap().iter().map(|entry| entry["path"].as_str().unwrap()).collect();
    assert_eq!(names, expected);
}

fn wait_no_worker(cluster: &Cluster) {
    wait_until("no task runs any more", Duration::from_secs(30), || {
        cluster.datanodes.iter().all(|node| descendants(node.process.pid).is_empty())
    });
}

/// What must be the same in every run of the same job on the same input, whatever happened meanwhile.
fn sums(report: &Value) -> Vec<Value> {
    let names =
        ["input.bytes", "map.records_in", "map.records_out", "combine.records_out", "output.records", "output.bytes"];
    let counters = names.iter().map(|name| report["counters"][name].clone());
    counters.chain([report["map"]["tasks"].clone(), report["reduce"]["tasks"].clone()]).collect()
}

#[test]
fn a_job_whose_driver_is_killed_goes_on_where_it_was() {
    let (cluster, local) = cluster_with_text(1);
    let clean = cluster.json(&["job", "wordcount", "--reducers", "2", "/text", "/clean"]);
    let mut driver = spawn_held(&cluster, &["--reducers", "2"], "/counts");
    let id = wait_maps_done(&cluster, 6);
    driver.kill().unwrap();
    driver.wait().unwrap();
    let killed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    cluster.cairn(&["stat", "/counts"]).fails(1);
    wait_state(&cluster, &id, "orphaned");
    gate::open(&cluster);
    let report = cluster.json(&["job", "resume", &id]);
    assert_eq!((&report["state"], &report["drivers"]), (&"succeeded".into(), &2.into()), "{report}");
    assert_eq!(sums(&report), sums(&clean));
    // Its time is that of both drivers, and between them.
    let ended_ms = report["submitted_ms"].as_u64().unwrap() + report["wall_ms"].as_u64().unwrap();
    assert!(u128::from(ended_ms) > killed.as_millis(), "{report}");
    let tasks = report["tasks"].as_array().unwrap();
    // Attempts of the second driver have numbers from a thousand on.
    let kept = tasks.iter().filter(|task| task["kind"] == "map" && task["attempt"].as_u64().unwrap() < 1_000).count();
    assert!(kept >= 6, "at least what was done when the driver died is kept: {report}");
    assert_counts(&cluster, &local, "/counts");
    assert_root(&cluster, &["/clean", "/counts", "/text"]);
    // It is over, and stays in the list.
    assert_eq!(newest(&cluster).unwrap()["state"], "succeeded");
    cluster.cairn(&["job", "resume", &id]).fails_naming(1, &[&id, "is over", "succeeded"]);
    assert_eq!(cluster.json(&["job", "status", &id])["report"]["output"], "/counts");
}

#[test]
fn a_driver_that_was_only_paused_changes_nothing_when_it_wakes() {
    let (cluster, local) = cluster_with_text(1);
    let driver = spawn_held(&cluster, &["--reducers", "2"], "/counts");
    let paused = Process::of(driver.id()).unwrap();
    let id = wait_maps_done(&cluster, 4);
    paused.signal(libc::SIGSTOP);
    gate::open(&cluster);
    let report = cluster.json(&["job", "resume", "--force", &id]);
    assert_eq!(report["state"], "succeeded", "{report}");
    let output = cluster.json(&["ls", "/counts"]);
    paused.signal(libc::SIGCONT);
    // It finds that the job is over, and says how it ended.
    let woken = Run::of_child("the paused driver", driver, PATIENCE).json();
    assert_eq!((&woken["id"], &woken["state"]), (&report["id"], &report["state"]));
    assert_eq!(cluster.json(&["ls", "/counts"]), output, "the output is as it was");
    assert_counts(&cluster, &local, "/counts");
    assert_root(&cluster, &["/counts", "/text"]);
}

#[test]
fn a_driver_that_works_keeps_its_job_unless_it_is_taken_by_force() {
    let (cluster, _) = cluster_with_text(1);
    let driver = spawn_held(&cluster, &[], "/counts");
    let id = wait_maps_done(&cluster, 1);
    gate::open(&cluster);
    let refused = cluster.cairn(&["job", "resume", &id]);
    // On a fast machine it was done before the other had lost patience.
    assert!(refused.stderr.contains("has a driver") || refused.stderr.contains("is over"), "{refused:?}");
    let ended = Run::of_child("job wordcount", driver, PATIENCE);
    assert_eq!(ended.code, 0, "{ended:?}");
}

#[test]
fn a_job_is_killed_from_elsewhere_and_leaves_nothing() {
    let (cluster, _) = cluster_with_text(1);
    let driver = spawn_held(&cluster, &[], "/deep/er/counts");
    let id = wait_maps_done(&cluster, 2);
    assert_eq!(cluster.json(&["job", "kill", &id])["state"], "killed");
    wait_no_worker(&cluster);
    assert_root(&cluster, &["/text"]);
    let ended = Run::of_child("the killed job's driver", driver, PATIENCE);
    assert_eq!(ended.code, 1, "{ended:?}");
    assert!(ended.stderr.contains("killed"), "{ended:?}");
    assert_eq!(newest(&cluster).unwrap()["state"], "killed");
    cluster.cairn(&["job", "kill", &id]).fails_naming(1, &["is over", "was killed"]);
    cluster.cairn(&["job", "kill", "job-1-none"]).fails_naming(1, &["no job", "job-1-none"]);
    cluster.cairn(&["--user", "ann", "job", "logs", &id]).fails(1);
    // The next job has the slots at once.
    cluster.put("/small", b"a b a", &[]);
    cluster.json(&["job", "wordcount", "/small", "/next"]);
}

/// As a driver leaves it that dies when all of the end is written down, and as it looks for a moment at the end of every job.
#[test]
fn a_job_that_is_over_but_was_not_put_away_says_how_it_ended() {
    let (cluster, _) = cluster_with_text(2);
    let id = cluster.json(&["job", "wordcount", "/text", "/counts"])["id"].as_str().unwrap().to_owned();
    let status = cluster.json(&["job", "status", &id]);
    assert_eq!(status["state"], "succeeded", "{status}");
    let (away, back) = (format!("/.cairn/history/{id}"), format!("/.cairn/jobs/{id}"));
    cluster.cairn(&["mv", &away, &back]).ok();
    assert_eq!(cluster.json(&["job", "status", &id]), status);
    // Ending it again puts it away, and changes nothing.
    assert_eq!(cluster.json(&["job", "kill", &id])["state"], "succeeded");
    cluster.cairn(&["stat", &away]).ok();
    cluster.cairn(&["stat", &back]).fails(1);
    assert_eq!(cluster.json(&["job", "status", &id]), status);
}

#[test]
fn the_staging_folder_of_a_job_that_nobody_resumes_goes_with_the_next_look() {
    let (cluster, _) = cluster_with_text(1);
    let mut driver = spawn_held(&cluster, &["--keep", "8s"], "/counts");
    let id = wait_maps_done(&cluster, 2);
    driver.kill().unwrap();
    driver.wait().unwrap();
    wait_state(&cluster, &id, "orphaned");
    // The nodes have let go of it as well; the list waits for a missed beat besides, which a minute is for.
    wait_for("whoever looks ends it", PATIENCE, || match newest(&cluster) {
        Some(job) if job["state"] == "failed" => Ok(()),
        other => Err(format!("{other:?}")),
    });
    let report = cluster.json(&["job", "status", &id]);
    assert!(report["report"]["failure"].as_str().unwrap().contains("nobody resumed it"), "{report}");
    assert_root(&cluster, &["/text"]);
    wait_no_worker(&cluster);
}

#[test]
fn a_detached_job_is_driven_by_a_node_and_resumed_when_that_node_dies() {
    let (mut cluster, local) = cluster_with_text(1);
    let started = cluster.json(&["job", "run", "--detach", "--", "wordcount", "--reducers", "2", "/text", "/first"]);
    let id = started["id"].as_str().unwrap().to_owned();
    let ended = wait_state(&cluster, &id, "succeeded");
    assert_eq!(ended["report"]["reduce"]["tasks"], 2, "{ended}");
    assert_counts(&cluster, &local, "/first");

    gate::close(&cluster);
    let started = cluster.json(&["job", "run", "--detach", "--", "wordcount", "--no-speculation", "/text", "/second"]);
    let id = started["id"].as_str().unwrap().to_owned();
    wait_maps_done(&cluster, 3);
    let host = wait_for("the driver's node says that it drives", PATIENCE, || {
        let status = cluster.json(&["job", "status", &id]);
        status["driver_node"].as_str().map(str::to_owned).ok_or_else(|| status.to_string())
    });
    // Its own log is among those of the job's tasks.
    let index = (0..3).find(|at| host == format!("dn{}", at + 1)).unwrap();
    cluster.kill_datanode(index);
    wait_state(&cluster, &id, "orphaned");
    gate::open(&cluster);
    let report = cluster.json(&["job", "resume", &id]);
    assert_eq!(report["state"], "succeeded", "{report}");
    assert_counts(&cluster, &local, "/second");
    cluster.cairn(&["job", "run", "--detach", "--", "wordcount", "/nothing", "/third"]).fails_naming(1, &["/nothing"]);
    cluster.cairn(&["job", "run", "--", "ls"]).fails_naming(2, &["runs no job"]);
}

#[test]
fn a_namenode_that_dies_and_comes_back_costs_a_job_nothing() {
    let (mut cluster, local) = cluster_with_text(1);
    let job = spawn_held(&cluster, &["--reducers", "2"], "/counts");
    wait_maps_done(&cluster, 3);
    cluster.kill_namenode();
    cluster.restart_namenode();
    gate::open(&cluster);
    let report = Run::of_child("job wordcount", job, PATIENCE).json();
    assert_eq!((&report["state"], &report["drivers"]), (&"succeeded".into(), &1.into()), "{report}");
    assert_counts(&cluster, &local, "/counts");
    assert_root(&cluster, &["/counts", "/text"]);
    assert_eq!(newest(&cluster).unwrap()["state"], "succeeded");
}

#[test]
fn workers_that_die_cost_attempts_and_no_count() {
    let (cluster, local) = cluster_with_text(2);
    let clean = cluster.json(&["job", "wordcount", "--reducers", "2", "/text", "/clean"]);
    let job = spawn_held(&cluster, &["--reducers", "2"], "/counts");
    wait_maps_done(&cluster, 1);
    wait_worker(&cluster).signal(libc::SIGKILL);
    gate::open(&cluster);
    let report = Run::of_child("job wordcount", job, PATIENCE).json();
    assert_eq!(report["state"], "succeeded", "{report}");
    assert_eq!(sums(&report), sums(&clean));
    assert_counts(&cluster, &local, "/counts");
}

#[test]
fn counters_add_up_although_worker_driver_and_node_die_in_one_job() {
    let mut cluster = Cluster::start(gate::with_gate(ClusterOptions::new(4, 2), 1));
    let local = cluster.local_file("text", &data::text(12, 24 << 20, 200_000));
    cluster.cairn(&["put", &local, "/text"]).ok();
    let clean = cluster.json(&["job", "wordcount", "--reducers", "3", "/text", "/clean"]);
    let mut driver = spawn_held(&cluster, &["--reducers", "3"], "/counts");
    wait_maps_done(&cluster, 3);
    wait_worker(&cluster).signal(libc::SIGKILL);
    let id = wait_maps_done(&cluster, 7);
    driver.kill().unwrap();
    driver.wait().unwrap();
    wait_state(&cluster, &id, "orphaned");
    let resumed = spawn(&cluster, &["--json", "job", "resume", &id]);
    wait_maps_done(&cluster, 12);
    // A node with outputs of both drivers.
    cluster.kill_datanode(0);
    gate::open(&cluster);
    let report = Run::of_child("job resume", resumed, PATIENCE).json();
    assert_eq!(report["state"], "succeeded", "{report}");
    assert_eq!(sums(&report), sums(&clean));
    assert_counts(&cluster, &local, "/counts");
    assert_root(&cluster, &["/clean", "/counts", "/text"]);
}

#[test]
fn a_driver_that_is_killed_at_random_times_changes_no_count() {
    let (cluster, local) = cluster_with_text(2);
    let line = |output| ["--json", "job", "wordcount", "--reducers", "3", "/text", output];
    let clean = cluster.cairn(&line("/clean")).json();
    let wall_ms = clean["wall_ms"].as_u64().unwrap();
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64;
    let mut random = data::Random::new(seed);
    let mut driver = spawn(&cluster, &line("/counts"));
    let clean_id = clean["id"].clone();
    let id = wait_for("the job is submitted", PATIENCE, || match newest(&cluster) {
        Some(job) if job["id"] != clean_id => Ok(job["id"].as_str().unwrap().to_owned()),
        other => Err(format!("{other:?}")),
    });
    for kill in 1..=4 {
        // The moment is what is random: anything up to the end of the job.
        std::thread::sleep(Duration::from_millis(random.below(wall_ms.max(200))));
        driver.kill().unwrap();
        driver.wait().unwrap();
        println!("seed {seed}: kill {kill}");
        if cluster.json(&["job", "status", &id])["state"] == "succeeded" {
            break;
        }
        driver = spawn(&cluster, &["--json", "job", "resume", "--force", &id]);
    }
    driver.wait().unwrap();
    let report = wait_state(&cluster, &id, "succeeded")["report"].clone();
    assert_eq!(sums(&report), sums(&clean), "seed {seed}: {report}");
    assert_counts(&cluster, &local, "/counts");
    assert_root(&cluster, &["/clean", "/counts", "/text"]);
}

/// Counts lines. Where a folder is given, the first one to come there stops its worker in the middle of its input.
const STOPS_ITS_WORKER: &str = r#"
import os, signal, sys
for at, line in enumerate(sys.stdin):
    sys.stdout.write("lines\t1\n")
    sys.stderr.write("reporter:counter:test,lines,1\n")
    if at == 1000:
        try:
            with open(os.path.join(sys.argv[1], "worker"), "x") as told:
                told.write("%d\n" % os.getpgrp())
        except OSError:
            continue
        sys.stdout.flush()
        os.kill(os.getpgrp(), signal.SIGSTOP)
"#;

#[test]
fn a_worker_that_stands_still_is_overtaken_and_counts_once() {
    let cluster = Cluster::small();
    let bytes = data::text(12, 5 << 20, 200_000);
    cluster.put("/text", &bytes, &["--block-size", "1m"]);
    let script = cluster.local_file("stops.py", STOPS_ITS_WORKER.as_bytes());
    let gate = cluster.path("gate");
    let mapper = format!("python3 stops.py {}", gate.display());
    let reducer = "awk '{n += $2} END {print n}'";
    let line = ["--json", "job", "streaming", "--mapper", &mapper, "--reducer", reducer, "--file", &script];
    let line = |output| [&line[..], &["--reducers", "1", "--input", "/text", "--output", output]].concat();
    let clean = cluster.cairn(&line("/clean")).json();
    std::fs::create_dir(&gate).unwrap();
    let report = cluster.cairn(&line("/counts")).json();
    assert_eq!((&report["state"], &report["map"]["attempts_failed"]), (&"succeeded".into(), &0.into()), "{report}");
    let worker = std::fs::read_to_string(gate.join("worker")).expect("one was stopped");
    let mut maps = report["tasks"].as_array().unwrap().iter().filter(|task| task["kind"] == "map");
    assert!(maps.any(|task| task["attempt"].as_u64() >= Some(1)), "the second attempt won: {report}");
    let lines = bytes.iter().filter(|byte| **byte == b'\n').count() + usize::from(!bytes.ends_with(b"\n"));
    for (report, output) in [(&clean, "/clean"), (&report, "/counts")] {
        assert_eq!(report["counters"]["user.test.lines"], lines, "{report}");
        assert_eq!(cluster.cat(&format!("{output}/part-r-00000")), format!("{lines}\n").into_bytes());
    }
    let first = Process::of(worker.trim().parse().unwrap());
    wait_until("the first one was killed", PATIENCE, || first.is_none_or(|worker| !worker.runs()));
}

#[test]
fn a_job_over_its_time_limit_fails_and_says_so() {
    let (cluster, _) = cluster_with_text(1);
    gate::close(&cluster);
    let line = ["job", "wordcount", "--no-speculation", "--time-limit", "1s", "/text", "/counts"];
    let run = cluster.cairn(&line);
    run.fails_naming(1, &["time limit", "1 s"]);
    assert_root(&cluster, &["/text"]);
    wait_no_worker(&cluster);
}

#[test]
fn two_users_share_the_slots() {
    let (cluster, local) = cluster_with_text(1);
    cluster.cairn(&["mkdir", "/ann"]).ok();
    cluster.cairn(&["chown", "ann", "/ann"]).ok();
    let first = spawn_held(&cluster, &[], "/counts");
    wait_maps_done(&cluster, 1);
    let second = spawn(&cluster, &["--json", "--user", "ann", "job", "wordcount", "/text", "/ann/counts"]);
    // Three slots, all taken by the first job: the second one gets some although the first wants them all.
    wait_for("both run at once", PATIENCE, || {
        let jobs = cluster.json(&["job", "ls"]);
        // The first one is not over before the gate is open; the second one may be.
        let ran = |job: &Value| job["state"] != "failed" && job["maps_done"].as_u64() > Some(0);
        let both = jobs.as_array().unwrap().iter().filter(|job| ran(job)).count();
        if both == 2 { Ok(()) } else { Err(jobs.to_string()) }
    });
    gate::open(&cluster);
    for (name, job) in [("first", first), ("second", second)] {
        let report = Run::of_child(name, job, PATIENCE).json();
        assert_eq!(report["state"], "succeeded", "{report}");
        assert_eq!(report["map"]["attempts_failed"], 0, "{report}");
    }
    assert_counts(&cluster, &local, "/counts");
    assert_counts(&cluster, &local, "/ann/counts");
}

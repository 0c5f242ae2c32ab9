//! Chaos: processes are killed and stopped while a load checks every answer.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "tests fail by panicking")]

use std::time::Duration;

use cairn_tests::data::Random;
use cairn_tests::stage::{self, Stage, four};
use cairn_tests::{Cluster, ClusterOptions, wait_until};

/// For the namenode to notice that a node is dead (4 s of silence) or back, on a busy machine.
const NOTICED: Duration = Duration::from_secs(30);

#[test]
fn datanodes_killed_and_back_after_a_while() {
    let mut stage = Stage::start();
    for (node, away) in [(0, 1), (1, 7), (2, 3)] {
        stage.kill(node);
        stage.endure(Duration::from_secs(away));
        stage.restart(node);
        stage.cluster.wait_state(node, "live", NOTICED);
        stage.wait_progress(3);
    }
    stage.finish(10, 10);
}

#[test]
fn a_datanode_paused_until_it_is_stale_and_one_until_it_is_dead() {
    // Stale for long enough to be seen so.
    let options = four().core("dead_interval_ms", 10_000);
    let mut stage = Stage::with(Cluster::wired(options), |load| load);
    for (node, state) in [(1, "stale"), (2, "dead")] {
        stage.pause(node);
        stage.cluster.wait_state(node, state, NOTICED);
        // The load goes on without it.
        stage.wait_progress(3);
        assert_eq!(stage.cluster.datanodes[node].process.state(), Some('T'), "it stood still all the time");
        stage.resume(node);
        stage.cluster.wait_state(node, "live", NOTICED);
    }
    stage.wait_progress(3);
    stage.finish(10, 10);
}

#[test]
fn the_namenode_killed_and_paused_under_load() {
    let mut stage = Stage::start();
    for _ in 0..3 {
        let before = stage.cluster.namenode.process;
        stage.cluster.kill_namenode();
        stage.fault();
        stage.endure(Duration::from_millis(700));
        stage.cluster.restart_namenode();
        assert!(!before.runs() && stage.cluster.namenode.process.runs());
        stage.fault();
        stage.wait_progress(3);
    }
    // The load gets on with two nodes; one that has not registered since the restart counts as dead.
    for node in 0..4 {
        stage.cluster.wait_state(node, "live", NOTICED);
    }
    // Longer than the dead interval: when it wakes it must not take its nodes for dead.
    let process = stage.cluster.namenode.process;
    process.signal(libc::SIGSTOP);
    wait_until("the namenode is stopped", NOTICED, || process.state() == Some('T'));
    stage.endure(Duration::from_secs(6));
    assert_eq!(process.state(), Some('T'));
    process.signal(libc::SIGCONT);
    stage.fault();
    stage.wait_progress(3);
    let report = stage.cluster.json(&["admin", "report"]);
    let dead = report["nodes"].as_array().unwrap().iter().filter(|node| node["state"] == "dead").count();
    assert_eq!(dead, 0, "a pause of the namenode is nobody's death: {report}");
    stage.finish(10, 10);
}

#[test]
fn everything_killed_at_once_and_started_again() {
    let mut stage = Stage::start();
    for _ in 0..2 {
        let before: Vec<_> = stage.cluster.datanodes.iter().map(|node| node.process).collect();
        stage.cluster.kill_everything();
        assert!(before.iter().all(|process| !process.runs()) && !stage.cluster.namenode.process.runs());
        stage.fault();
        stage.cluster.restart_namenode();
        for node in 0..4 {
            stage.restart(node);
        }
        stage.cluster.wait_serving(NOTICED);
        stage.wait_progress(5);
    }
    stage.finish(10, 10);
}

#[test]
fn three_datanodes_lost_one_after_the_other_with_time_to_repair() {
    let options = ClusterOptions { datanodes: 6, racks: 3, ..four() };
    let mut stage = Stage::with(Cluster::wired(options), |load| load);
    for node in [0, 3, 5] {
        stage.kill(node);
        // Its disk does not come back either.
        std::fs::remove_dir_all(&stage.cluster.datanodes[node].dir).unwrap();
        stage.cluster.wait_state(node, "dead", NOTICED);
        stage.wait_repaired();
        stage.wait_progress(2);
    }
    stage.finish(10, 10);
}

/// The mixture; `CAIRN_CHAOS_SECONDS` makes it long.
#[test]
fn kills_and_pauses_at_random() {
    let seed = std::env::var("CAIRN_CHAOS_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(7);
    println!("CAIRN_CHAOS_SEED={seed}");
    let mut random = Random::new(seed);
    let mut stage = Stage::start();
    let end = std::time::Instant::now() + stage::seconds(20);
    let (mut kills, mut pauses) = (0, 0);
    while kills == 0 || pauses == 0 || std::time::Instant::now() < end {
        let node = random.below(4) as usize;
        // Short absences are more frequent, some are longer than the dead interval.
        let away = Duration::from_millis(300 << random.below(5));
        if random.below(2) == 0 {
            stage.kill(node);
            stage.endure(away);
            stage.restart(node);
            kills += 1;
        } else {
            stage.pause(node);
            stage.endure(away);
            stage.resume(node);
            pauses += 1;
        }
        stage.endure(Duration::from_millis(300 + random.below(1_500)));
    }
    println!("{kills} kills, {pauses} pauses");
    stage.finish(10, 10);
}

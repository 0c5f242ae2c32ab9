//! Nodes die: what was promised holds, and the cluster mends itself.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "tests fail by panicking")]

use std::io::{Read, Write};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use cairn_client::fs::{ClientSettings, CreateOptions, FileSystem};
use cairn_common::Env;
use cairn_tests::data::{self, sha256};
use cairn_tests::{Cluster, ClusterOptions, Run, wait_for, wait_until};
use serde_json::Value;

const BLOCK: usize = 1 << 20;
/// Dead interval of the harness (4 s), detection, and copying a few megabytes on a busy machine, some of them again after 20 s.
const REPAIR: Duration = Duration::from_secs(60);

fn four() -> Cluster {
    Cluster::start(ClusterOptions::new(4, 2))
}

/// A `put` from standard input under way.
fn start_put(cluster: &Cluster, path: &str, flags: &[&str]) -> Child {
    let args = [&["put"], flags, &["-", path]].concat();
    cluster.command(&args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn finish(child: Child, what: &str) -> Run {
    Run::of_child(what, child, Duration::from_secs(90))
}

/// Index of a datanode on which a block of an open or finished file lies.
fn holder(cluster: &Cluster) -> usize {
    wait_for("some datanode holds a block", Duration::from_secs(20), || {
        (0..cluster.datanodes.len())
            .max_by_key(|node| cluster.block_files(*node).len())
            .filter(|node| !cluster.block_files(*node).is_empty())
            .ok_or_else(|| "none does".into())
    })
}

fn replica_counts(cluster: &Cluster, path: &str) -> Vec<usize> {
    cluster.blocks(path).iter().map(|block| block["replicas"].as_array().unwrap().len()).collect()
}

#[test]
fn a_datanode_killed_during_a_put_costs_nothing() {
    let mut cluster = four();
    let bytes = data::random(1, 24 * BLOCK);
    let mut put = start_put(&cluster, "/f", &["--block-size", "8m"]);
    let mut stdin = put.stdin.take().unwrap();
    // In the middle of the second block: one block is finished, one is open in a pipeline.
    stdin.write_all(&bytes[..12 * BLOCK]).unwrap();
    let being_written = |node: usize| {
        cluster.block_files(node).iter().any(|file| file.extension().is_some_and(|extension| extension == "rbw"))
    };
    let victim = wait_for("a block is being written", Duration::from_secs(20), || {
        (0..4).find(|node| being_written(*node)).ok_or_else(|| "none is".into())
    });
    cluster.kill_datanode(victim);
    stdin.write_all(&bytes[12 * BLOCK..]).unwrap();
    drop(stdin);
    finish(put, "put while a datanode dies").ok();
    assert_eq!(sha256(&cluster.cat("/f")), sha256(&bytes));
    cluster.wait_state(victim, "dead", REPAIR);
    cluster.wait_healthy(REPAIR);
    assert_eq!(replica_counts(&cluster, "/f"), [3, 3, 3]);
}

#[test]
fn two_datanodes_killed_during_a_put_leave_it_whole() {
    let mut cluster = four();
    let bytes = data::random(2, 12 * BLOCK);
    let mut put = start_put(&cluster, "/f", &["--block-size", "16m"]);
    let mut stdin = put.stdin.take().unwrap();
    stdin.write_all(&bytes[..6 * BLOCK]).unwrap();
    let first = holder(&cluster);
    cluster.kill_datanode(first);
    stdin.write_all(&bytes[6 * BLOCK..9 * BLOCK]).unwrap();
    let second = wait_for("another datanode holds the block", Duration::from_secs(20), || {
        let holds = |node: &usize| *node != first && !cluster.block_files(*node).is_empty();
        (0..4).find(holds).ok_or_else(|| "none does".into())
    });
    cluster.kill_datanode(second);
    stdin.write_all(&bytes[9 * BLOCK..]).unwrap();
    drop(stdin);
    finish(put, "put while two datanodes die").ok();
    assert_eq!(sha256(&cluster.cat("/f")), sha256(&bytes));
    cluster.restart_datanode(first);
    cluster.restart_datanode(second);
    cluster.wait_healthy(REPAIR);
}

#[test]
fn a_datanode_killed_during_a_get_is_not_noticed_by_the_reader() {
    let mut cluster = four();
    let bytes = data::random(3, 32 * BLOCK);
    cluster.put("/f", &bytes, &["--block-size", "8m"]);
    for flags in [&[][..], &["--no-short-circuit"]] {
        let args = [&["cat"], flags, &["/f"]].concat();
        let mut get = cluster.command(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut stdout = get.stdout.take().unwrap();
        let mut back = vec![0; 4 * BLOCK];
        // The pipe is full while nobody reads: the command is in the middle of the file.
        stdout.read_exact(&mut back).unwrap();
        let victim = holder(&cluster);
        cluster.kill_datanode(victim);
        stdout.read_to_end(&mut back).unwrap();
        finish(get, "cat while a datanode dies").ok();
        assert_eq!(sha256(&back), sha256(&bytes), "{flags:?}");
        cluster.restart_datanode(victim);
        cluster.wait_registered(victim, REPAIR);
    }
}

#[test]
fn a_stopped_datanode_does_not_stop_a_reader() {
    let cluster = Cluster::start(ClusterOptions::new(4, 2).more("[client]\nread_stall_ms = 2000"));
    let bytes = data::random(4, 4 * BLOCK);
    cluster.put("/f", &bytes, &["--replication", "2"]);
    let victim = holder(&cluster);
    cluster.datanodes[victim].process.signal(libc::SIGSTOP);
    let config = cluster.config();
    let mut get = cluster.command(&["--config", config.to_str().unwrap(), "cat", "--no-short-circuit", "/f"]);
    let get = get.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let got = Run::of_child("cat beside a stopped datanode", get, Duration::from_secs(40)).ok_bytes();
    assert_eq!(sha256(&got), sha256(&bytes));
    assert_eq!(cluster.datanodes[victim].process.state(), Some('T'), "it stood still all the time");
    cluster.datanodes[victim].process.signal(libc::SIGCONT);
}

#[test]
fn a_dead_nodes_blocks_are_copied_and_the_excess_goes_when_it_returns() {
    let mut cluster = four();
    for k in 0..6 {
        cluster.put(&format!("/f{k}"), &data::random(10 + k, 2 * BLOCK + 77), &[]);
    }
    let victim = holder(&cluster);
    let held = cluster.block_files(victim).len();
    assert!(held > 0);
    let killed = Instant::now();
    cluster.kill_datanode(victim);
    cluster.wait_state(victim, "dead", REPAIR);
    assert!(killed.elapsed() > Duration::from_millis(1_500), "a node is not given up at the first silence");
    cluster.wait_healthy(REPAIR);
    for k in 0..6 {
        let path = format!("/f{k}");
        assert_eq!(replica_counts(&cluster, &path), [3, 3, 3]);
        assert_eq!(sha256(&cluster.cat(&path)), sha256(&data::random(10 + k, 2 * BLOCK + 77)));
    }
    cluster.restart_datanode(victim);
    cluster.wait_state(victim, "live", REPAIR);
    cluster.wait_healthy(REPAIR);
    let files = || (0..4).map(|node| cluster.block_files(node).len()).sum::<usize>();
    wait_until("each block has three files on disk, no more", REPAIR, || files() == 6 * 3 * 3);
}

#[test]
fn the_last_replica_survives_and_serves_when_its_node_returns() {
    let mut cluster = Cluster::small();
    cluster.put("/one", b"only copy", &["--replication", "1"]);
    let victim = cluster.datanode(&cluster.blocks("/one")[0]["replicas"][0]);
    cluster.kill_datanode(victim);
    cluster.wait_state(victim, "dead", REPAIR);
    assert_eq!(cluster.fsck(&[])["missing"], 1);
    cluster.restart_datanode(victim);
    cluster.wait_healthy(REPAIR);
    assert_eq!(cluster.cat("/one"), b"only copy");
}

/// Files of several shapes, their contents known.
fn store_some(cluster: &Cluster) -> Vec<(String, String)> {
    let mut stored = Vec::new();
    for (k, size) in [0, 1, 70_000, BLOCK, 3 * BLOCK + 5].into_iter().enumerate() {
        let (path, bytes) = (format!("/dir/f{k}"), data::random(50 + k as u64, size));
        if k == 0 {
            cluster.cairn(&["mkdir", "/dir"]).ok();
        }
        cluster.put(&path, &bytes, &[]);
        stored.push((path, sha256(&bytes)));
    }
    stored
}

fn check(cluster: &Cluster, stored: &[(String, String)]) {
    for (path, sum) in stored {
        assert_eq!(&sha256(&cluster.cat(path)), sum, "{path}");
    }
}

#[test]
fn a_killed_namenode_comes_back_with_every_closed_file() {
    let mut cluster = Cluster::small();
    let mut stored = store_some(&cluster);
    cluster.kill_namenode();
    cluster.restart_namenode();
    cluster.wait_serving(REPAIR);
    check(&cluster, &stored);
    // From an image and the log after it.
    cluster.cairn(&["admin", "checkpoint"]).ok();
    cluster.cairn(&["mv", "/dir/f1", "/dir/moved"]).ok();
    stored[1].0 = "/dir/moved".into();
    cluster.cairn(&["chmod", "600", "/dir/moved"]).ok();
    cluster.kill_namenode();
    cluster.restart_namenode();
    cluster.wait_serving(REPAIR);
    check(&cluster, &stored);
    assert_eq!(cluster.json(&["stat", "/dir/moved"])["permission"], "rw-------");
    cluster.put("/after", b"still takes files", &[]);
    cluster.wait_healthy(REPAIR);
}

#[test]
fn a_namenode_killed_during_a_put_is_waited_for() {
    let mut cluster = Cluster::small();
    let bytes = data::random(60, 6 * BLOCK);
    let mut put = start_put(&cluster, "/f", &[]);
    let mut stdin = put.stdin.take().unwrap();
    stdin.write_all(&bytes[..3 * BLOCK]).unwrap();
    holder(&cluster);
    cluster.kill_namenode();
    // A pipe takes little: the rest is written beside the restart.
    let rest = bytes[3 * BLOCK..].to_vec();
    let writer = std::thread::spawn(move || stdin.write_all(&rest));
    cluster.restart_namenode();
    // Its broken pipe would only say that the command failed, which the command itself says better.
    let _ = writer.join().unwrap();
    finish(put, "put while the namenode restarts").ok();
    assert_eq!(sha256(&cluster.cat("/f")), sha256(&bytes));
    cluster.wait_healthy(REPAIR);
}

#[test]
fn everything_killed_at_once_comes_back_with_every_closed_file() {
    let mut cluster = Cluster::small();
    let stored = store_some(&cluster);
    // One file is open at that moment: it may be lost or cut, the others may not notice.
    let mut put = start_put(&cluster, "/open", &["--block-size", "8m"]);
    put.stdin.as_mut().unwrap().write_all(&data::random(70, 5 * BLOCK)).unwrap();
    cluster.kill_everything();
    put.kill().unwrap();
    put.wait().unwrap();
    for round in 0..2 {
        cluster.start_again();
        cluster.wait_serving(REPAIR);
        check(&cluster, &stored);
        cluster.put(&format!("/round{round}"), b"new", &[]);
        wait_for("closed files are healthy", REPAIR, || {
            let report = cluster.fsck(&["/dir"]);
            let bad = ["missing", "corrupt", "under_replicated"].iter().any(|key| report[*key] != 0);
            if bad { Err(report.to_string()) } else { Ok(()) }
        });
        cluster.kill_everything();
    }
}

#[test]
fn an_orderly_stop_and_start_keeps_all() {
    let mut cluster = Cluster::small();
    let stored = store_some(&cluster);
    cluster.stop();
    cluster.start_again();
    cluster.wait_serving(REPAIR);
    check(&cluster, &stored);
    cluster.wait_healthy(REPAIR);
}

#[test]
fn a_writer_that_died_loses_its_file_to_the_next_after_the_soft_limit() {
    let options = ClusterOptions::new(3, 2).core("lease_soft_limit_ms", 2_000).core("lease_hard_limit_ms", 10_000);
    let cluster = Cluster::start(options);
    abandon(&cluster, "/log", 80);
    let replace = || cluster.cairn_with(&["put", "-f", "-", "/log"], b"mine now");
    wait_for("another writer gets the name", REPAIR, || {
        let run = replace();
        if run.code == 0 { Ok(()) } else { Err(run.stderr) }
    });
    assert_eq!(cluster.cat("/log"), b"mine now");
    cluster.wait_healthy(REPAIR);
}

#[test]
fn a_file_whose_writer_died_is_closed_at_the_hard_limit_with_what_was_flushed() {
    let cluster =
        Cluster::start(ClusterOptions::new(3, 2).core("lease_soft_limit_ms", 1_000).core("lease_hard_limit_ms", 8_000));
    let flushed = abandon(&cluster, "/log", 81);
    wait_for("the namenode closes the file", REPAIR, || {
        let report = cluster.fsck(&["/log"]);
        if report["open_files"] == 0 { Ok(()) } else { Err(report.to_string()) }
    });
    let kept = cluster.cat("/log");
    assert!(kept.len() >= flushed, "{} of {flushed} bytes that were flushed", kept.len());
    assert!(data::random(81, BLOCK / 2).starts_with(&kept));
    cluster.wait_healthy(REPAIR);
}

/// Writes and flushes a file as a process that is gone a moment later; returns how much was flushed.
fn abandon(cluster: &Cluster, path: &str, seed: u64) -> usize {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let bytes = data::random(seed, BLOCK / 2);
    runtime.block_on(async {
        // While it lives it keeps its lease, however slow this machine is.
        let settings = ClientSettings { lease_renew_ms: 300, ..ClientSettings::at(&*cluster.namenode.addr) };
        let fs = FileSystem::connect(Env::system(), settings).await.unwrap();
        let mut out = fs.create(path, CreateOptions::default()).await.unwrap();
        out.write(&bytes).await.unwrap();
        out.flush().await.unwrap();
        std::mem::forget(out);
    });
    // With the runtime all tasks of that client end: nobody renews the lease.
    runtime.shutdown_background();
    bytes.len()
}

#[test]
fn a_restarted_namenode_orders_no_copies_before_its_nodes_have_reported() {
    // Nothing dies here, and who comes back late must not be taken for dead.
    let mut cluster = Cluster::start(ClusterOptions::new(4, 2).core("dead_interval_ms", 30_000));
    cluster.put("/f", &data::random(90, 8 * BLOCK), &[]);
    cluster.wait_healthy(REPAIR);
    let before: Vec<Value> = cluster.blocks("/f").iter().map(|block| block["replicas"].clone()).collect();
    cluster.kill_namenode();
    cluster.restart_namenode();
    cluster.wait_serving(REPAIR);
    cluster.wait_healthy(REPAIR);
    let places = |replicas: &Value| {
        let mut nodes: Vec<String> = replicas.as_array().unwrap().iter().map(|r| r["node"].to_string()).collect();
        nodes.sort();
        nodes
    };
    for (block, earlier) in cluster.blocks("/f").iter().zip(&before) {
        assert_eq!(places(&block["replicas"]), places(earlier), "no replica moved");
    }
}

//! Write pipelines with a datanode that stands still, at each of their places: the write goes on without it, and nothing is lost or doubled.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "tests fail by panicking")]

use std::io::Write;
use std::process::{Child, Stdio};
use std::time::Duration;

use cairn_tests::data::{self, sha256};
use cairn_tests::process::Process;
use cairn_tests::{Cluster, ClusterOptions, Run, wait_for, wait_until};

const MIB: usize = 1 << 20;
/// A few timeouts of pipelines, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// Short patience with nodes that stand still.
const SETTINGS: &str = "[client]\nconnect_timeout_ms = 1500\nwrite_stall_ms = 3000\nfinish_stall_ms = 8000\nread_stall_ms = 2000\n\
                        [datanode]\nconnect_timeout_ms = 1500\npipeline_timeout_ms = 3000";

fn start_put(cluster: &Cluster, path: &str) -> Child {
    let config = cluster.config().display().to_string();
    let mut command = cluster.command(&["--config", &config, "put", "--block-size", "16m", "-", path]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// The datanode that a process has a connection to, apart from those in `before`.
fn next_of(cluster: &Cluster, process: Process, before: &[usize]) -> Option<usize> {
    let peers = process.peers();
    (0..cluster.datanodes.len()).find(|node| {
        !before.contains(node) && peers.iter().any(|peer| peer.to_string() == cluster.datanodes[*node].addr)
    })
}

/// The pipeline of the only write that is under way, in its order: each end of it dials the next one.
fn pipeline(cluster: &Cluster, writer: Process) -> Vec<usize> {
    wait_for("a pipeline of three datanodes", PATIENCE, || {
        let mut order = Vec::new();
        let mut at = writer;
        while let Some(next) = next_of(cluster, at, &order) {
            order.push(next);
            at = cluster.datanodes[next].process;
        }
        if order.len() == 3 { Ok(order) } else { Err(format!("{order:?}")) }
    })
}

#[test]
fn a_stopped_node_at_each_place_of_a_pipeline_holds_no_write_up() {
    let mut cluster = Cluster::start(ClusterOptions::new(5, 2).more(SETTINGS));
    for (place, name) in ["first", "middle", "last"].into_iter().enumerate() {
        let path = format!("/{name}");
        let bytes = data::random(100 + place as u64, 6 * MIB);
        let mut put = start_put(&cluster, &path);
        let mut stdin = put.stdin.take().unwrap();
        stdin.write_all(&bytes[..2 * MIB]).unwrap();
        let order = pipeline(&cluster, Process::of(put.id()).unwrap());
        let stopped = cluster.datanodes[order[place]].process;
        stopped.signal(libc::SIGSTOP);
        wait_until("the node is stopped", PATIENCE, || stopped.state() == Some('T'));
        let rest = bytes[2 * MIB..].to_vec();
        // Its broken pipe would only say that the command failed, which the command itself says better.
        let writer = std::thread::spawn(move || stdin.write_all(&rest));
        Run::of_child(&format!("put with the {name} node stopped"), put, PATIENCE).ok();
        let _ = writer.join().unwrap();
        // It was closed without that node, which has stood still all the time, and it reads right without it.
        assert_eq!(stopped.state(), Some('T'));
        let config = cluster.config().display().to_string();
        let read = cluster.cairn(&["--config", &config, "cat", "--no-short-circuit", &path]).ok_bytes();
        assert_eq!(sha256(&read), sha256(&bytes), "{name}");
        stopped.signal(libc::SIGCONT);
        cluster.wait_state(order[place], "live", PATIENCE);
        cluster.wait_healthy(PATIENCE);
        // What it had of the block before it was left out is no replica any more, and goes.
        let files = |cluster: &Cluster| (0..5).map(|node| cluster.block_files(node).len()).sum::<usize>();
        wait_until("each block has three files on disk, no more", PATIENCE, || files(&cluster) == 3 * (place + 1));
        assert_eq!(sha256(&cluster.cat(&path)), sha256(&bytes), "{name}");
    }
    let report = cluster.fsck(&["--verify"]);
    assert_eq!(
        (report["status"].as_str(), report["verified_replicas"].as_u64()),
        (Some("healthy"), Some(9)),
        "{report}"
    );
    cluster.stop();
}

//! Damaged files are named with their path and never served.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "tests fail by panicking")]

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cairn_tests::cluster::files_below;
use cairn_tests::damage::{flip, length};
use cairn_tests::data::{self, sha256};
use cairn_tests::{Cluster, ClusterOptions, Run, wait_for, wait_until};

const BLOCK: usize = 1 << 20;
const REPAIR: Duration = Duration::from_secs(60);

fn cut(path: &Path, length: u64) {
    std::fs::OpenOptions::new().write(true).open(path).unwrap().set_len(length).unwrap();
}

/// Nodes that hold the first block of a file.
fn holders(cluster: &Cluster, path: &str) -> Vec<usize> {
    let block = &cluster.blocks(path)[0];
    let replicas = block["replicas"].as_array().unwrap();
    replicas.iter().map(|replica| cluster.datanode(replica)).collect()
}

#[test]
fn a_flipped_bit_is_read_elsewhere_and_mended() {
    let cluster = Cluster::start(ClusterOptions::new(4, 2));
    let bytes = data::random(1, BLOCK);
    cluster.put("/f", &bytes, &[]);
    cluster.wait_healthy(REPAIR);
    let block = cluster.blocks("/f")[0].clone();
    let nodes = holders(&cluster, "/f");
    for node in &nodes[..2] {
        let file = cluster.block_file(*node, &block);
        flip(&file, length(&file) / 2);
    }
    for flags in [&[][..], &["--no-short-circuit"]] {
        for _ in 0..4 {
            let args = [&["cat"], flags, &["/f"]].concat();
            assert_eq!(sha256(&cluster.cairn(&args).ok_bytes()), sha256(&bytes));
        }
    }
    // A reader's word is enough to have a replica checked by its own node, and the check to have it replaced.
    wait_for("the damaged replicas are replaced", REPAIR, || {
        let report = cluster.fsck(&["--verify"]);
        let well = report["status"] == "healthy" && report["under_replicated"] == 0 && report["over_replicated"] == 0;
        let damaged =
            |node: &usize| files_below(&cluster.datanodes[*node].dir, &|name| name.ends_with(".blk")).is_empty();
        if well { Ok(()) } else { Err(format!("{report} {}", nodes.iter().filter(|n| damaged(n)).count())) }
    });
    assert_eq!(cluster.blocks("/f")[0]["replicas"].as_array().unwrap().len(), 3);
    assert_eq!(sha256(&cluster.cat("/f")), sha256(&bytes));
}

#[test]
fn a_block_damaged_everywhere_is_an_error_not_wrong_bytes() {
    let cluster = Cluster::small();
    cluster.put("/f", &data::random(2, 2 * BLOCK), &[]);
    cluster.put("/well", b"untouched", &[]);
    cluster.wait_healthy(REPAIR);
    let block = cluster.blocks("/f")[1].clone();
    for node in 0..3 {
        let file = cluster.block_file(node, &block);
        flip(&file, 40_000);
    }
    let run = cluster.cairn(&["cat", "/f"]);
    assert!(data::random(2, 2 * BLOCK).starts_with(&run.stdout), "what came is a true prefix");
    let (code, stderr) = (run.code, run.stderr);
    assert_eq!(code, 1, "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(stderr.contains("/f") && stderr.contains(&block["id"].to_string()), "{stderr}");
    let target = cluster.path("out");
    cluster.cairn(&["get", "/f", target.to_str().unwrap()]).fails(1);
    assert!(!target.exists(), "nothing half-made is left");
    assert_eq!(cluster.fsck(&["--verify"])["status"], "corrupt");
    assert_eq!(cluster.fsck(&["--verify", "/well"])["status"], "healthy");
}

#[test]
fn damaged_block_files_are_named_and_replaced_when_their_node_starts() {
    // A node that counted as dead for a moment could lose its replicas, which have been made elsewhere, before anybody looked at them.
    let mut cluster = Cluster::start(ClusterOptions::new(4, 2).core("dead_interval_ms", 30_000));
    let bytes = data::random(3, 4 * BLOCK);
    cluster.put("/f", &bytes, &[]);
    cluster.wait_healthy(REPAIR);
    let node = holders(&cluster, "/f")[0];
    let files = cluster.block_files(node);
    assert!(!files.is_empty());
    cluster.kill_datanode(node);
    let damages: [&dyn Fn(&Path); 3] =
        [&|path| cut(path, length(path) - 10), &|path| cut(path, 0), &|path| flip(path, length(path) - 30)];
    for (file, damage) in files.iter().zip(damages.iter().cycle()) {
        damage(file);
    }
    cluster.restart_datanode(node);
    cluster.wait_registered(node, REPAIR);
    assert_eq!(sha256(&cluster.cat("/f")), sha256(&bytes));
    wait_for("fsck --verify is content", REPAIR, || {
        let report = cluster.fsck(&["--verify"]);
        let well = report["status"] == "healthy" && report["under_replicated"] == 0;
        if well { Ok(()) } else { Err(report.to_string()) }
    });
    let logged = cluster.logs();
    for file in &files {
        let name = file.file_name().unwrap().to_str().unwrap();
        assert!(logged.contains(name), "{name} is named in a log");
    }
}

#[test]
fn one_blocks_file_in_anothers_place_is_not_served() {
    let mut cluster = Cluster::small();
    let (a, b) = (data::random(4, BLOCK), data::random(5, BLOCK));
    cluster.put("/a", &a, &[]);
    cluster.put("/b", &b, &[]);
    cluster.wait_healthy(REPAIR);
    let (block_a, block_b) = (cluster.blocks("/a")[0].clone(), cluster.blocks("/b")[0].clone());
    for node in 0..2 {
        let (file_a, file_b) = (cluster.block_file(node, &block_a), cluster.block_file(node, &block_b));
        cluster.kill_datanode(node);
        let copy = std::fs::read(&file_a).unwrap();
        std::fs::write(&file_b, copy).unwrap();
        cluster.restart_datanode(node);
    }
    for node in 0..2 {
        cluster.wait_registered(node, REPAIR);
    }
    for _ in 0..4 {
        assert_eq!(sha256(&cluster.cat("/b")), sha256(&b));
        assert_eq!(sha256(&cluster.cat("/a")), sha256(&a));
    }
}

/// Files of the edit log, oldest first.
fn log_files(cluster: &Cluster) -> Vec<PathBuf> {
    let files = files_below(&cluster.namenode.dir.join("log"), &|_| true);
    assert!(!files.is_empty(), "the namenode has a log");
    files
}

fn with_files(count: usize) -> Cluster {
    let cluster = Cluster::small();
    for k in 0..count {
        cluster.cairn(&["mkdir", &format!("/d{k}")]).ok();
    }
    cluster
}

/// The namenode's own command must fail, naming `path` on one line.
fn refuses_to_start(cluster: &Cluster, path: &Path) -> String {
    let run: Run = cluster.run_member(&cluster.namenode);
    assert_eq!(run.code, 1, "{}", run.stderr);
    assert!(!run.stderr.contains("panicked"), "{}", run.stderr);
    let name = path.to_str().unwrap();
    let line = run.stderr.lines().last().unwrap_or_default().to_owned();
    assert!(line.contains(name), "{name} is named: {}", run.stderr);
    line
}

#[test]
fn a_torn_end_of_the_edit_log_is_cut() {
    let mut cluster = with_files(5);
    cluster.kill_namenode();
    let file = log_files(&cluster).pop().unwrap();
    // A crash in the middle of a write leaves a part of a record, or garbage that was never acknowledged.
    let end = length(&file);
    let open = std::fs::OpenOptions::new().write(true).open(&file).unwrap();
    open.write_all_at(&[0x5a; 23], end).unwrap();
    cluster.restart_namenode();
    cluster.wait_serving(REPAIR);
    assert_eq!(cluster.json(&["ls", "/"]).as_array().unwrap().len(), 5);
    cluster.cairn(&["mkdir", "/after"]).ok();
    cluster.kill_namenode();
    cluster.restart_namenode();
    cluster.wait_serving(REPAIR);
    assert_eq!(cluster.json(&["ls", "/"]).as_array().unwrap().len(), 6);
}

#[test]
fn a_damaged_record_in_the_middle_of_the_edit_log_stops_the_start() {
    let mut cluster = with_files(20);
    cluster.kill_namenode();
    let file = log_files(&cluster).into_iter().max_by_key(|file| length(file)).unwrap();
    let before = std::fs::read(&file).unwrap();
    let used = before.iter().rposition(|byte| *byte != 0).unwrap() as u64;
    flip(&file, used / 2);
    let line = refuses_to_start(&cluster, &file);
    assert!(line.to_lowercase().contains("offset"), "{line}");
    assert_eq!(std::fs::read(&file).unwrap().len(), before.len(), "nothing was cut away");
    // With the record as it was, all is there.
    std::fs::write(&file, before).unwrap();
    cluster.restart_namenode();
    cluster.wait_serving(REPAIR);
    assert_eq!(cluster.json(&["ls", "/"]).as_array().unwrap().len(), 20);
}

#[test]
fn a_missing_segment_of_the_edit_log_stops_the_start() {
    let mut cluster = with_files(3);
    cluster.kill_namenode();
    // A second start opens a second segment.
    cluster.restart_namenode();
    cluster.wait_serving(REPAIR);
    cluster.cairn(&["mkdir", "/later"]).ok();
    cluster.kill_namenode();
    let files = log_files(&cluster);
    if files.len() < 2 {
        return;
    }
    std::fs::remove_file(&files[0]).unwrap();
    let run = cluster.run_member(&cluster.namenode);
    assert_eq!(run.code, 1, "{}", run.stderr);
    assert!(run.stderr.contains(cluster.namenode.dir.to_str().unwrap()), "{}", run.stderr);
}

#[test]
fn a_damaged_image_is_named_and_never_believed() {
    for damage in [0, 1] {
        let mut cluster = with_files(8);
        cluster.cairn(&["admin", "checkpoint"]).ok();
        cluster.kill_namenode();
        let images = files_below(&cluster.namenode.dir.join("image"), &|_| true);
        let image = images.last().expect("a checkpoint leaves an image").clone();
        match damage {
            0 => flip(&image, length(&image) / 2),
            _ => cut(&image, length(&image) - 5),
        }
        let name = image.to_str().unwrap().to_owned();
        cluster.restart_namenode();
        // It may refuse, or fall back to an older image and the log; in both cases it says which file is bad.
        let stopped = || !cluster.namenode.process.runs();
        wait_until("the namenode has decided", REPAIR, || stopped() || cluster.cairn(&["admin", "report"]).code == 0);
        assert!(cluster.logs().contains(&name), "{name} is named: {}", cluster.logs());
        if !stopped() {
            assert_eq!(cluster.json(&["ls", "/"]).as_array().unwrap().len(), 8);
        }
    }
}

#[test]
fn a_damaged_version_file_is_named() {
    let mut cluster = with_files(1);
    cluster.kill_namenode();
    let version = cluster.namenode.dir.join("VERSION");
    let before = std::fs::read(&version).unwrap();
    std::fs::write(&version, b"layout = \"what?\"\n").unwrap();
    refuses_to_start(&cluster, &version);
    std::fs::write(&version, &before).unwrap();
    cluster.restart_namenode();
    cluster.wait_serving(REPAIR);
    let node = 0;
    cluster.kill_datanode(node);
    let version = cluster.datanodes[node].dir.join("VERSION");
    std::fs::write(&version, b"\xff\xfe").unwrap();
    let run = cluster.run_member(&cluster.datanodes[node]);
    assert_eq!(run.code, 1, "{}", run.stderr);
    assert!(run.stderr.lines().last().unwrap().contains(version.to_str().unwrap()), "{}", run.stderr);
}

#[test]
fn a_damaged_state_folder_of_a_datanode_is_named_and_set_aside() {
    let mut cluster = Cluster::small();
    cluster.put("/f", b"kept", &[]);
    cluster.kill_datanode(0);
    let state = cluster.datanodes[0].dir.join("state");
    let files = files_below(&state, &|_| true);
    for file in &files {
        std::fs::write(file, b"garbage garbage garbage garbage").unwrap();
    }
    cluster.restart_datanode(0);
    assert!(!files.is_empty());
    // The namenode may not have missed the node at all: only its own log says that it has started.
    wait_until("the damaged folder is named", REPAIR, || {
        cluster.logs().contains(&format!("{} cannot be read", state.display()))
    });
    cluster.wait_state(0, "live", REPAIR);
    assert_eq!(cluster.cat("/f"), b"kept");
    cluster.wait_healthy(REPAIR);
}

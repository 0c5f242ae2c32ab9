//! Chaos: disks are full, and replicas are damaged on them, while a load checks every answer.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "tests fail by panicking")]

use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use cairn_tests::data::{self, sha256};
use cairn_tests::stage::{Stage, four};
use cairn_tests::{Cluster, wait_for};

const BLOCK: usize = 1 << 20;
const REPAIRED: Duration = Duration::from_secs(60);
/// Size of the small disk: some files fit.
const DISK: u64 = 48 << 20;

/// Flips a bit in the middle of a file.
fn flip(path: &Path) {
    let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
    let at = file.metadata().unwrap().len() / 2;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
    let mut after = [0];
    file.read_exact_at(&mut after, at).unwrap();
    assert_ne!(after, byte, "the bit is flipped");
}

#[test]
fn all_replicas_but_one_of_every_block_damaged() {
    let mut stage = Stage::start();
    let bytes = data::random(9, 3 * BLOCK + 777);
    stage.cluster.put("/precious", &bytes, &["--block-size", "1m"]);
    stage.cluster.wait_whole("/precious", REPAIRED);
    let mut damaged = Vec::new();
    for (at, block) in stage.cluster.blocks("/precious").iter().enumerate() {
        let replicas = block["replicas"].as_array().unwrap();
        assert_eq!(replicas.len(), 3);
        // Another replica is the good one each time.
        for (k, replica) in replicas.iter().enumerate() {
            if k != at % 3 {
                let file = stage.cluster.block_file(stage.cluster.datanode(replica), block);
                flip(&file);
                damaged.push(file);
            }
        }
    }
    assert_eq!(damaged.len(), 8);
    stage.fault();
    for _ in 0..3 {
        assert_eq!(sha256(&stage.cluster.cat("/precious")), sha256(&bytes), "it reads right at once");
    }
    let verified = wait_for("every replica is good, and there are three of each block", REPAIRED, || {
        let run = stage.cluster.cairn(&["--json", "fsck", "/precious", "--verify"]);
        let report: serde_json::Value = serde_json::from_slice(&run.stdout).map_err(|_| run.stderr)?;
        let well = report["corrupt"] == 0 && report["under_replicated"] == 0 && report["verified_replicas"] == 12;
        if well { Ok(report) } else { Err(report.to_string()) }
    });
    assert_eq!(verified["status"], "healthy");
    assert_eq!(sha256(&stage.cluster.cat("/precious")), sha256(&bytes));
    stage.finish(10, 10);
}

/// Whether this user may mount a file system of his own; else why not.
fn may_mount(probe: &Path) -> Result<(), String> {
    std::fs::create_dir_all(probe).unwrap();
    let script = format!("mount -t tmpfs -o size=1m none '{}'", probe.display());
    let run = Command::new("unshare").args(["--user", "--map-root-user", "--mount", "sh", "-c", &script]).output();
    match run {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
        Err(error) => Err(format!("unshare: {error}")),
    }
}

/// The command in a mount namespace where `dir` is a small disk. `exec` throughout: the process stays the one that was started.
fn on_small_disk(dir: &Path, command: Vec<String>) -> Vec<String> {
    let script =
        format!("mkdir -p '{0}' && mount -t tmpfs -o size={DISK} none '{0}' && exec \"$0\" \"$@\"", dir.display());
    let mut wrapped: Vec<String> =
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"].map(str::to_owned).into();
    wrapped.push(script);
    wrapped.extend(command);
    wrapped
}

/// Fills the disk of a process to its last byte; returns the file that does it.
fn fill(disk: &Path) -> PathBuf {
    let path = disk.join("somebody-elses-file");
    let mut file = std::fs::File::create(&path).unwrap();
    let error = loop {
        if let Err(error) = file.write_all(&[7; 64 << 10]) {
            break error;
        }
    };
    assert_eq!(error.kind(), std::io::ErrorKind::StorageFull, "the disk is full: {error}");
    path
}

#[test]
fn a_disk_that_is_full_from_one_moment_to_the_next() {
    let probe = tempfile::tempdir().unwrap();
    if let Err(why) = may_mount(probe.path()) {
        println!("SKIPPED a_disk_that_is_full_from_one_moment_to_the_next: no right to mount a small disk ({why})");
        return;
    }
    let wrap = |node: usize, command: Vec<String>| {
        let dir = command.iter().position(|arg| arg == "--dir").map(|at| PathBuf::from(&command[at + 1]));
        match dir {
            Some(dir) if node == 0 => on_small_disk(&dir, command),
            _ => command,
        }
    };
    let mut stage = Stage::with(Cluster::wired_with(four(), &wrap), |load| load);
    let node = &stage.cluster.datanodes[0];
    // Its disk is to be seen through the process only.
    let disk = PathBuf::from(format!("/proc/{}/root{}", node.process.pid, node.dir.display()));
    assert!(disk.join("VERSION").exists(), "the node lives on that disk");
    for _ in 0..2 {
        let filler = fill(&disk);
        stage.fault();
        stage.wait_progress(6);
        std::fs::remove_file(filler).unwrap();
        stage.fault();
        stage.wait_progress(4);
    }
    stage.finish(10, 10);
}

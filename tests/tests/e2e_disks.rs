//! Disks that rot, fail and vanish under datanodes; and what `fsck` makes of it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "tests fail by panicking")]

use std::path::Path;
use std::time::Duration;

use cairn_tests::cluster::files_below;
use cairn_tests::damage::{flip, length};
use cairn_tests::data::{self, sha256};
use cairn_tests::{Cluster, ClusterOptions, wait_for, wait_until};
use serde_json::Value;

const BLOCK: usize = 1 << 20;
const REPAIR: Duration = Duration::from_secs(60);

fn holders(cluster: &Cluster, block: &Value) -> Vec<usize> {
    block["replicas"].as_array().unwrap().iter().map(|replica| cluster.datanode(replica)).collect()
}

/// Files that were set aside, on all datanodes.
fn set_aside(cluster: &Cluster) -> usize {
    let corrupt = |path: &std::path::PathBuf| path.parent().is_some_and(|folder| folder.ends_with("corrupt"));
    cluster
        .datanodes
        .iter()
        .flat_map(|node| files_below(&node.dir, &|name| name.ends_with(".blk")))
        .filter(corrupt)
        .count()
}

/// Kind of damage, and what does it to a file.
type Damage = (&'static str, fn(&Path));

const DAMAGES: [Damage; 7] = [
    ("payload", |path| flip(path, 300_000)),
    ("frame header", |path| flip(path, 32 + 4)),
    ("block header", |path| flip(path, 10)),
    ("index", |path| flip(path, length(path) - 64 - 8)),
    ("footer", |path| flip(path, length(path) - 30)),
    ("missing file", |path| std::fs::remove_file(path).unwrap()),
    ("truncated file", |path| {
        let half = length(path) / 2;
        std::fs::OpenOptions::new().write(true).open(path).unwrap().set_len(half).unwrap();
    }),
];

#[test]
fn each_kind_of_damage_is_read_elsewhere_and_mended() {
    let cluster = Cluster::start(ClusterOptions::new(4, 2));
    let bytes = data::random(11, BLOCK);
    for (number, (kind, damage)) in DAMAGES.iter().enumerate() {
        let path = format!("/f{number}");
        cluster.put(&path, &bytes, &[]);
        cluster.wait_whole(&path, REPAIR);
        let block = cluster.blocks(&path)[0].clone();
        // All but one: whoever reads meets at least one of them in the end.
        for node in &holders(&cluster, &block)[..2] {
            damage(&cluster.block_file(*node, &block));
        }
        assert_eq!(sha256(&cluster.cat(&path)), sha256(&bytes), "{kind}");
    }
    // What no reader met, fsck meets; both only have the datanodes look, and their verdict starts the repair.
    wait_for("all is mended", REPAIR, || {
        let report = cluster.fsck(&["--verify"]);
        let well = report["status"] == "healthy" && report["under_replicated"] == 0;
        if well { Ok(()) } else { Err(report.to_string()) }
    });
    wait_until("the bad replicas are gone, now that good ones are there", REPAIR, || set_aside(&cluster) == 0);
    for number in 0..DAMAGES.len() {
        assert_eq!(sha256(&cluster.cat(&format!("/f{number}"))), sha256(&bytes));
    }
}

#[test]
fn the_scanner_finds_what_nobody_reads() {
    let settings = "[datanode]\nscan_pause_ms = 300\nscan_period_ms = 1\ndirectory_scan_interval_ms = 500";
    let cluster = Cluster::start(ClusterOptions::new(4, 2).more(settings));
    let bytes = data::random(12, BLOCK);
    for (number, (_, damage)) in DAMAGES.iter().enumerate() {
        let path = format!("/f{number}");
        cluster.put(&path, &bytes, &[]);
        let block = cluster.blocks(&path)[0].clone();
        damage(&cluster.block_file(holders(&cluster, &block)[0], &block));
    }
    wait_until("each damage is found", REPAIR, || {
        let logged = cluster.logs();
        logged.matches("is corrupt (").count() + logged.matches("the replica is given up").count() >= DAMAGES.len()
    });
    cluster.wait_healthy(REPAIR);
    assert_eq!(cluster.fsck(&["--verify"])["status"], "healthy");
}

#[test]
fn the_last_replica_stays_however_bad_it_is() {
    let cluster = Cluster::small();
    cluster.put("/f", &data::random(13, BLOCK), &["--replication", "1"]);
    let block = cluster.blocks("/f")[0].clone();
    flip(&cluster.block_file(holders(&cluster, &block)[0], &block), 5_000);
    assert_eq!(cluster.fsck(&["--verify"])["status"], "corrupt");
    wait_until("the namenode knows", REPAIR, || cluster.fsck(&[])["corrupt"] == 1);
    assert_eq!(set_aside(&cluster), 1);
    // Mended by hand, it serves again.
    let file = cluster.datanodes.iter().flat_map(|node| files_below(&node.dir, &|name| name.ends_with(".blk"))).next();
    flip(&file.unwrap(), 5_000);
    assert_eq!(cluster.fsck(&["--verify"])["verified_replicas"], 1);
    cluster.wait_healthy(REPAIR);
    assert_eq!(sha256(&cluster.cat("/f")), sha256(&data::random(13, BLOCK)));
}

/// Takes a folder away in one moment, as a disk that is pulled: to remove file by file would be a race with the node that writes in it.
fn vanish(dir: &Path) {
    std::fs::rename(dir, dir.with_extension("gone")).unwrap();
}

#[test]
fn a_volume_that_vanishes_is_replaced_while_its_node_lives_until_the_last() {
    let settings = "[datanode]\nvolume_check_interval_ms = 300";
    let mut cluster = Cluster::start(ClusterOptions::new(3, 1).more(settings));
    let (first, second) = (cluster.datanodes[0].dir.clone(), cluster.path("second"));
    cluster.kill_datanode(0);
    cluster.restart_datanode_on(0, &format!("{},{}", first.display(), second.display()));
    cluster.wait_registered(0, REPAIR);
    let bytes = data::random(14, 8 * BLOCK);
    cluster.put("/f", &bytes, &[]);
    cluster.wait_healthy(REPAIR);
    let on = |dir: &Path| files_below(dir, &|name| name.ends_with(".blk")).len();
    assert!(on(&first) > 0 && on(&second) > 0, "both volumes hold blocks");
    vanish(&second);
    wait_until("all blocks are on the first volume", REPAIR, || on(&first) == 8);
    cluster.wait_healthy(REPAIR);
    assert!(cluster.datanodes[0].process.runs());
    cluster.put("/g", &bytes, &[]);
    assert_eq!(sha256(&cluster.cat("/f")), sha256(&bytes));
    let logged = cluster.logs();
    assert!(logged.contains("is out of service") && logged.contains(second.to_str().unwrap()));
    // With no volume left the node says so and ends.
    vanish(&first);
    wait_until("the node has ended", REPAIR, || !cluster.datanodes[0].process.runs());
    assert!(cluster.logs().contains("2 of 2 volumes are out of service"), "{}", cluster.logs());
    assert_eq!(sha256(&cluster.cat("/g")), sha256(&bytes));
}

#[test]
fn fsck_fix_saves_what_is_left_and_loses_nothing() {
    let cluster = Cluster::small();
    let bytes = data::random(15, 5 * BLOCK);
    cluster.cairn(&["mkdir", "-p", "/d"]).ok();
    cluster.put("/d/f", &bytes, &[]);
    cluster.put("/d/well", b"untouched", &[]);
    cluster.wait_healthy(REPAIR);
    let blocks = cluster.blocks("/d/f");
    let third = blocks[2].clone();
    for node in 0..3 {
        flip(&cluster.block_file(node, &third), 5_000);
    }
    // A look changes nothing, and says which bytes are lost, and where what is bad.
    let report = cluster.fsck(&["--verify"]);
    assert_eq!((&report["status"], &report["corrupt"]), (&Value::from("corrupt"), &Value::from(1)));
    let lost = &report["lost"][0];
    assert_eq!((&lost["path"], &lost["block"]), (&Value::from("/d/f"), &third["id"]));
    assert_eq!((lost["offset"].as_u64(), lost["length"].as_u64()), (Some(2 << 20), Some(1 << 20)));
    assert_eq!(report["lost_bytes"], 1 << 20);
    let bad: Vec<&Value> = report["problems"].as_array().unwrap().iter().filter(|p| p["replica"].is_string()).collect();
    assert_eq!(bad.len(), 3, "{report}");
    assert!(
        bad.iter()
            .all(|problem| problem["offset"] == 2 << 20 && problem["problem"].as_str().unwrap().contains("frame"))
    );
    let text = cluster.cairn(&["fsck", "--verify", "/d"]);
    assert_eq!(text.code, 1);
    let text = String::from_utf8(text.stdout).unwrap();
    assert!(text.contains("/d/f: bytes 2097152 to 3145728 are LOST"), "{text}");
    cluster.cairn(&["stat", "/d/f"]).ok();
    // Not for everybody, and not while blocks only seem lost.
    let denied = cluster.cairn(&["--user", "bob", "fsck", "--fix"]);
    assert_eq!(denied.code, 1);
    assert!(denied.stderr.contains("superuser"), "{}", denied.stderr);
    cluster.cairn(&["admin", "safemode", "enter"]).ok();
    let refused = cluster.cairn(&["fsck", "--fix"]);
    assert_eq!(refused.code, 1);
    assert!(refused.stderr.contains("safe mode"), "{}", refused.stderr);
    cluster.cairn(&["admin", "safemode", "leave"]).ok();
    let run = cluster.cairn(&["--json", "fsck", "--verify", "--fix"]);
    assert_eq!(run.code, 1, "something is lost: {}", run.stderr);
    let report: Value = serde_json::from_slice(&run.stdout).unwrap();
    let fixed = &report["fixed"][0];
    assert_eq!((&fixed["target"], fixed["salvaged_files"].as_u64()), (&Value::from("/lost+found/d/f"), Some(2)));
    assert_eq!(sha256(&cluster.cat("/lost+found/d/f/0")), sha256(&bytes[..2 * BLOCK]));
    assert_eq!(sha256(&cluster.cat("/lost+found/d/f/1")), sha256(&bytes[3 * BLOCK..]));
    cluster.cairn(&["stat", "/d/f"]).fails(1);
    assert_eq!(cluster.cat("/d/well"), b"untouched");
    // Once is enough.
    let again: Value = serde_json::from_slice(&cluster.cairn(&["--json", "fsck", "--fix"]).ok_bytes()).unwrap();
    assert_eq!((&again["status"], &again["set_aside"]), (&Value::from("healthy"), &Value::from(1)));
    assert_eq!(again["fixed"].as_array().unwrap().len(), 0);
    // The damaged file itself is there still: mended replicas bring it back whole.
    for node in &cluster.datanodes {
        for file in files_below(&node.dir, &|name| name.starts_with(&format!("{}_", third["id"]))) {
            flip(&file, 5_000);
        }
    }
    cluster.fsck(&["--verify", "/lost+found"]);
    wait_until("the namenode knows", REPAIR, || cluster.fsck(&["/lost+found"])["status"] == "healthy");
    cluster.cairn(&["mv", "/lost+found/d/f/damaged", "/d/f"]).ok();
    assert_eq!(sha256(&cluster.cat("/d/f")), sha256(&bytes));
    cluster.wait_healthy(REPAIR);
}

#[test]
fn a_restart_within_the_dead_interval_starts_no_repair() {
    let mut cluster = Cluster::start(ClusterOptions::new(4, 2).core("dead_interval_ms", 30_000));
    let bytes = data::random(16, 6 * BLOCK);
    cluster.put("/f", &bytes, &[]);
    cluster.wait_healthy(REPAIR);
    let copies = |cluster: &Cluster| cluster.logs().matches("copied to").count();
    let copied = copies(&cluster);
    for orderly in [true, false] {
        let process = cluster.datanodes[0].process;
        if orderly {
            process.signal(libc::SIGTERM);
            wait_until("the node has ended", REPAIR, || !process.runs());
        } else {
            cluster.kill_datanode(0);
            // What a crash in the middle of a copy leaves, and what was set aside before.
            for pool in std::fs::read_dir(&cluster.datanodes[0].dir).unwrap().flatten() {
                if pool.file_name().to_string_lossy().starts_with("BP-") {
                    std::fs::write(pool.path().join("tmp/77_1001.rbw"), b"half").unwrap();
                    std::fs::write(pool.path().join("corrupt/notes"), b"kept").unwrap();
                }
            }
        }
        let before = cluster.datanodes[0].process;
        cluster.restart_datanode(0);
        assert!(before != cluster.datanodes[0].process);
        cluster.wait_registered(0, REPAIR);
        cluster.wait_healthy(REPAIR);
        assert_eq!(sha256(&cluster.cat("/f")), sha256(&bytes));
    }
    let left = |name: &str| files_below(&cluster.datanodes[0].dir, &|other| other == name).len();
    assert_eq!((left("77_1001.rbw"), left("notes")), (0, 1));
    assert_eq!(copies(&cluster), copied, "nothing had to be copied");
}

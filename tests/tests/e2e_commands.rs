//! The file commands do what their namesakes of HDFS do.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "tests fail by panicking")]

use cairn_tests::{Cluster, ClusterOptions, wait_for, wait_until};
use std::time::Duration;

/// Paths that `ls` gives, in its order.
fn names(cluster: &Cluster, args: &[&str]) -> Vec<String> {
    let mut all = vec!["ls"];
    all.extend(args);
    let listed = cluster.json(&all);
    listed.as_array().unwrap().iter().map(|entry| entry["path"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn directories_are_made_listed_and_removed() {
    let cluster = Cluster::small();
    cluster.cairn(&["mkdir", "/a"]).ok();
    cluster.cairn(&["mkdir", "-p", "/a/b/c", "/a/b/c"]).ok();
    cluster.cairn(&["mkdir", "/a"]).fails_naming(1, &["/a", "exists"]);
    cluster.cairn(&["mkdir", "/x/y"]).fails_naming(1, &["/x"]);
    cluster.put("/a/f", b"hello", &[]);
    assert_eq!(names(&cluster, &["/a"]), ["/a/b", "/a/f"]);
    assert_eq!(names(&cluster, &["-R", "/a"]), ["/a/b", "/a/b/c", "/a/f"]);
    assert_eq!(names(&cluster, &["/a/f"]), ["/a/f"]);
    let entry = &cluster.json(&["ls", "/a"])[1];
    assert_eq!(entry["type"], "file");
    assert_eq!((&entry["length"], &entry["replication"]), (&5.into(), &3.into()));
    assert_eq!(entry["permission"], "rw-r--r--");
    assert!(entry["modified_ms"].as_u64().unwrap() > 1_500_000_000_000);
    assert_eq!(entry["owner"], cairn_common::process::user_name());
    cluster.cairn(&["rm", "/a"]).fails_naming(1, &["/a", "director"]);
    cluster.cairn(&["rm", "-r", "--skip-trash", "/a"]).ok();
    cluster.cairn(&["stat", "/a"]).fails_naming(1, &["/a"]);
}

#[test]
fn files_move_and_are_copied() {
    let cluster = Cluster::small();
    cluster.put("/f", b"content", &[]);
    cluster.cairn(&["mv", "/f", "/g"]).ok();
    cluster.cairn(&["stat", "/f"]).fails(1);
    cluster.cairn(&["mkdir", "/dir"]).ok();
    cluster.cairn(&["mv", "/g", "/dir"]).ok();
    assert_eq!(cluster.cat("/dir/g"), b"content");
    cluster.cairn(&["cp", "/dir/g", "/copy"]).ok();
    assert_eq!(cluster.cat("/copy"), b"content");
    cluster.cairn(&["cp", "/dir/g", "/copy"]).fails_naming(1, &["/copy", "exists"]);
    cluster.put("/other", b"2", &[]);
    cluster.cairn(&["mv", "/other", "/copy"]).fails_naming(1, &["/copy", "exists"]);
    cluster.cairn(&["mv", "-f", "/other", "/copy"]).ok();
    assert_eq!(cluster.cat("/copy"), b"2");
    cluster.cairn(&["mv", "/dir", "/dir/inside"]).fails_naming(1, &["/dir"]);
    cluster.cairn(&["mv", "/nothing", "/x"]).fails_naming(1, &["/nothing"]);
    cluster.cairn(&["cp", "-r", "/dir", "/dir2"]).ok();
    assert_eq!(cluster.cat("/dir2/g"), b"content");
}

#[test]
fn ends_sizes_times_and_sums() {
    let cluster = Cluster::small();
    let text: Vec<u8> = (0..5_000u32).flat_map(|k| format!("{k:07}\n").into_bytes()).collect();
    cluster.put("/t", &text, &["--block-size", "4096"]);
    assert_eq!(cluster.cairn(&["head", "/t"]).ok_bytes(), &text[..1024]);
    assert_eq!(cluster.cairn(&["tail", "/t"]).ok_bytes(), &text[text.len() - 1024..]);
    cluster.cairn(&["mkdir", "/d"]).ok();
    cluster.cairn(&["touch", "/d/new"]).ok();
    assert_eq!(cluster.json(&["stat", "/d/new"])["length"], 0);
    let before = cluster.json(&["stat", "/t"])["modified_ms"].as_u64().unwrap();
    wait_until("the clock moved on", Duration::from_secs(5), || {
        cluster.cairn(&["touch", "/t"]).ok();
        cluster.json(&["stat", "/t"])["modified_ms"].as_u64().unwrap() > before
    });
    assert_eq!(cluster.json(&["stat", "/t"])["length"], text.len(), "touch leaves the bytes alone");
    let line = cluster.cairn(&["du", "-s", "/"]).ok();
    assert!(line.contains(&text.len().to_string()), "{line}");
    let sum = cluster.cairn(&["checksum", "/t"]).ok();
    assert!(sum.contains(&format!("{:08x}", crc32c(&text))), "{sum}");
    assert!(cluster.cairn(&["df"]).ok().lines().count() >= 1);
}

/// CRC-32C bit by bit: slow, and independent of the code under test.
fn crc32c(bytes: &[u8]) -> u32 {
    let step = |crc: u32| (0..8).fold(crc, |crc, _| (crc >> 1) ^ (0x82F6_3B78 & (crc & 1).wrapping_neg()));
    !bytes.iter().fold(!0, |crc, byte| step(crc ^ u32::from(*byte)))
}

#[test]
fn globs_match_as_in_hdfs() {
    let cluster = Cluster::small();
    for day in ["2026-01", "2026-02", "2025-12"] {
        cluster.cairn(&["mkdir", "-p", &format!("/logs/{day}")]).ok();
        for name in ["a.gz", "b.gz", "c.txt"] {
            cluster.cairn(&["touch", &format!("/logs/{day}/{name}")]).ok();
        }
    }
    let two = ["/logs/2026-01/a.gz", "/logs/2026-01/b.gz", "/logs/2026-02/a.gz", "/logs/2026-02/b.gz"];
    assert_eq!(names(&cluster, &["/logs/2026-*/*.gz"]), two);
    assert_eq!(names(&cluster, &["/logs/2026-0[12]/{a,b}.gz"]), two);
    assert_eq!(names(&cluster, &["/logs/2026-??/[^bc].gz"]), [two[0], two[2]]);
    assert_eq!(cluster.cairn(&["cat", "/logs/*/c.txt"]).ok(), "");
    cluster.cairn(&["ls", "/logs/2027-*"]).fails_naming(1, &["/logs/2027-*"]);
    cluster.cairn(&["rm", "--skip-trash", "/logs/*/?.gz"]).ok();
    assert_eq!(names(&cluster, &["/logs/*/*"]).len(), 3);
    let found = cluster.json(&["find", "/logs", "--name", "*.txt"]);
    assert!(found.to_string().contains("/logs/2025-12/c.txt"), "{found}");
}

#[test]
fn deleted_files_wait_in_the_trash() {
    let cluster = Cluster::small();
    let user = cairn_common::process::user_name();
    cluster.cairn(&["mkdir", "/d"]).ok();
    cluster.put("/d/f", b"keep me", &[]);
    cluster.cairn(&["rm", "/d/f"]).ok();
    cluster.cairn(&["stat", "/d/f"]).fails(1);
    let trash = format!("/user/{user}/.Trash/Current/d/f");
    assert_eq!(cluster.cat(&trash), b"keep me");
    // Once more under the same name: both wait.
    cluster.put("/d/f", b"second", &[]);
    cluster.cairn(&["rm", "/d/f"]).ok();
    let kept = names(&cluster, &[&format!("/user/{user}/.Trash/Current/d")]);
    assert_eq!(kept.len(), 2, "{kept:?}");
    cluster.cairn(&["rm", "-r", "--skip-trash", "/d"]).ok();
    assert_eq!(cluster.cat(&trash), b"keep me");
    // What is in the trash is deleted for good.
    cluster.cairn(&["rm", &trash]).ok();
    cluster.cairn(&["stat", &trash]).fails(1);
}

#[test]
fn the_namenode_empties_the_trash() {
    let cluster = Cluster::start(ClusterOptions::new(3, 2).core("trash_interval_ms", 2_000));
    let user = cairn_common::process::user_name();
    cluster.put("/f", b"soon gone", &[]);
    cluster.cairn(&["rm", "/f"]).ok();
    let folder = format!("/user/{user}/.Trash");
    wait_until("the trash is empty", Duration::from_secs(30), || {
        let run = cluster.cairn(&["--json", "find", &folder, "--type", "file"]);
        run.code == 0 && !run.ok().contains("\"/")
    });
}

#[test]
fn rights_are_enforced_between_users() {
    let cluster = Cluster::small();
    let ann = |args: &[&str]| cluster.cairn(&[&["--user", "ann"], args].concat());
    let bob = |args: &[&str]| cluster.cairn(&[&["--user", "bob"], args].concat());
    ann(&["mkdir", "/mine"]).fails_naming(1, &["ann", "/"]);
    cluster.cairn(&["mkdir", "-p", "/home/ann", "/home/bob"]).ok();
    cluster.cairn(&["chown", "ann:staff", "/home/ann"]).ok();
    cluster.cairn(&["chown", "bob", "/home/bob"]).ok();
    let file = cluster.local_file("secret", b"for ann");
    ann(&["put", &file, "/home/ann/f"]).ok();
    assert_eq!(cluster.json(&["stat", "/home/ann/f"])["owner"], "ann");
    assert_eq!(cluster.json(&["stat", "/home/ann/f"])["group"], "staff", "the group comes from the directory");
    assert_eq!(bob(&["cat", "/home/ann/f"]).ok_bytes(), b"for ann");
    for denied in [
        &["put", &file, "/home/ann/g"][..],
        &["rm", "--skip-trash", "/home/ann/f"],
        &["mv", "/home/ann/f", "/home/bob/f"],
        &["chmod", "777", "/home/ann/f"],
        &["chown", "bob", "/home/ann/f"],
        &["mkdir", "/home/ann/d"],
        &["setrep", "2", "/home/ann/f"],
    ] {
        bob(denied).fails_naming(1, &["bob", "permission denied"]);
    }
    ann(&["chown", "bob", "/home/ann/f"]).fails_naming(1, &["ann"]);
    ann(&["chmod", "600", "/home/ann/f"]).ok();
    assert_eq!(cluster.json(&["stat", "/home/ann/f"])["permission"], "rw-------");
    bob(&["cat", "/home/ann/f"]).fails_naming(1, &["permission denied", "/home/ann/f"]);
    ann(&["chmod", "go+r", "/home/ann/f"]).ok();
    ann(&["chmod", "700", "/home/ann"]).ok();
    bob(&["cat", "/home/ann/f"]).fails_naming(1, &["permission denied"]);
    bob(&["ls", "/home/ann"]).fails_naming(1, &["permission denied"]);
    assert_eq!(cluster.cat("/home/ann/f"), b"for ann", "the superuser may all");
    bob(&["admin", "safemode", "enter"]).fails_naming(1, &["bob"]);
    // A sticky directory: everybody writes, only owners delete.
    cluster.cairn(&["mkdir", "/tmp"]).ok();
    cluster.cairn(&["chmod", "1777", "/tmp"]).ok();
    ann(&["put", &file, "/tmp/a"]).ok();
    bob(&["rm", "--skip-trash", "/tmp/a"]).fails_naming(1, &["bob"]);
    ann(&["rm", "--skip-trash", "/tmp/a"]).ok();
}

#[test]
fn names_are_bytes_of_utf8_in_order() {
    let cluster = Cluster::small();
    for name in ["b", "a b", "Z", "é", "日本", "a", "%41", "--flag"] {
        cluster.cairn(&["touch", "--", &format!("/{name}")]).ok();
    }
    assert_eq!(names(&cluster, &["/"]), ["/%41", "/--flag", "/Z", "/a", "/a b", "/b", "/é", "/日本"]);
    let long = "x".repeat(255);
    cluster.cairn(&["touch", &format!("/{long}")]).ok();
    cluster.cairn(&["stat", &format!("/{long}")]).ok();
}

#[test]
fn safe_mode_refuses_changes_and_serves_reads() {
    let cluster = Cluster::small();
    cluster.put("/f", b"readable", &[]);
    cluster.cairn(&["admin", "safemode", "enter"]).ok();
    assert_eq!(cluster.json(&["admin", "report"])["safemode"], true);
    assert_eq!(cluster.cat("/f"), b"readable");
    cluster.cairn(&["mkdir", "/no"]).fails_naming(1, &["safe mode"]);
    cluster.cairn(&["admin", "safemode", "leave"]).ok();
    cluster.cairn(&["mkdir", "/yes"]).ok();
}

#[test]
fn the_report_names_every_node() {
    let cluster = Cluster::start(ClusterOptions::new(4, 2));
    cluster.put("/f", &[7; 100_000], &[]);
    // One that was silent for a moment is stale.
    let report = wait_for("all nodes are live", Duration::from_secs(30), || {
        let report = cluster.json(&["admin", "report"]);
        let nodes = report["nodes"].as_array().unwrap();
        if nodes.iter().all(|node| node["state"] == "live") { Ok(report) } else { Err(report.to_string()) }
    });
    let nodes = report["nodes"].as_array().unwrap();
    assert_eq!(nodes.len(), 4);
    for node in nodes {
        assert!(node["capacity"].as_u64().unwrap() > 0 && node["remaining"].as_u64().unwrap() > 0, "{node}");
        assert!(node["rack"].as_str().unwrap().starts_with('/'), "{node}");
    }
    let racks: std::collections::BTreeSet<_> = nodes.iter().map(|node| node["rack"].to_string()).collect();
    assert_eq!(racks.len(), 2);
    for key in ["capacity", "used", "under_replicated", "missing"] {
        assert!(report[key].is_u64(), "{key} in {report}");
    }
    // The same for people: a line per node.
    let text = cluster.cairn(&["admin", "report"]).ok();
    assert!(cluster.datanodes.iter().all(|node| text.contains(&node.id) || text.contains(&node.addr)), "{text}");
}

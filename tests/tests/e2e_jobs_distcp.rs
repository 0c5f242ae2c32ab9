//! Copies between clusters, within one and from this machine.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "tests fail by panicking")]

mod gate;

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;
use std::time::Duration;

use cairn_tests::{Cluster, ClusterOptions, Run, data, wait_until};
use serde_json::Value;

/// Every file below a path with its bytes, named from there.
fn tree(cluster: &Cluster, root: &str) -> BTreeMap<String, Vec<u8>> {
    let listed = cluster.json(&["ls", "-R", root]);
    let files = listed.as_array().unwrap().iter().filter(|entry| entry["type"] == "file");
    files
        .map(|entry| {
            let path = entry["path"].as_str().unwrap();
            (path[root.len()..].to_owned(), cluster.cat(path))
        })
        .collect()
}

fn counts(report: &Value) -> [u64; 4] {
    ["copied", "skipped", "failed", "deleted"].map(|key| report["distcp"][key].as_u64().unwrap())
}

/// Nothing but these names lies in the root: no staging folder.
fn assert_only(cluster: &Cluster, names: &[&str]) {
    let listed = cluster.json(&["ls", "/"]);
    let found: Vec<&str> = listed.as_array().unwrap().iter().map(|entry| entry["path"].as_str().unwrap()).collect();
    assert_eq!(found, names);
}

fn fill(cluster: &Cluster) -> BTreeMap<String, Vec<u8>> {
    let mut files: BTreeMap<String, Vec<u8>> =
        (0..12u64).map(|n| (format!("/sub{}/file {n}", n % 3), data::random(n, (n * n * 30_000) as usize))).collect();
    files.insert("/empty".into(), Vec::new());
    for (name, bytes) in &files {
        cluster.put_in_folders(&format!("/src{name}"), bytes, &["--replication", "2", "--block-size", "512k"]);
    }
    cluster.cairn(&["mkdir", "/src/no files"]).ok();
    files
}

#[test]
fn a_tree_is_copied_to_another_cluster_updated_and_made_equal() {
    let (here, there) = (Cluster::small(), Cluster::start(ClusterOptions::new(2, 1)));
    let mut files = fill(&here);
    let target = format!("cairn://{}/copy", there.namenode.addr);
    let copy = |flags: &[&str]| here.json(&[&["job", "distcp"], flags, &["/src", &target]].concat());
    let report = copy(&[]);
    assert_eq!((counts(&report), report["state"].as_str()), ([13, 0, 0, 0], Some("succeeded")), "{report}");
    assert!(tree(&there, "/copy") == files);
    there.cairn(&["stat", "/copy/no files"]).ok();
    // Nothing changed: nothing is copied, by checksum.
    assert_eq!(counts(&copy(&["--update"])), [0, 13, 0, 0]);
    // One file of the same length and other bytes, one longer, one new, one gone, and one that only the target has.
    let changed = data::random(99, files["/sub1/file 1"].len());
    here.put_in_folders("/src/sub1/file 1", &changed, &["-f"]);
    here.put_in_folders("/src/sub2/file 2", b"short", &["-f"]);
    here.put_in_folders("/src/new/deep/file", b"new", &[]);
    here.cairn(&["rm", "--skip-trash", "/src/empty"]).ok();
    files.insert("/sub1/file 1".into(), changed);
    files.insert("/sub2/file 2".into(), b"short".to_vec());
    files.insert("/new/deep/file".into(), b"new".to_vec());
    there.put_in_folders("/copy/surplus/file", b"x", &[]);
    let report = copy(&["--update", "--delete"]);
    files.remove("/empty");
    assert_eq!(counts(&report), [3, 10, 0, 2], "{report}");
    assert!(tree(&there, "/copy") == files);
    there.cairn(&["stat", "/copy/surplus"]).fails(1);
    // Back, from the other side, by a job here.
    here.json(&["job", "distcp", "--maps", "2", &target, "/back"]);
    assert!(tree(&here, "/back") == files);
    assert_only(&here, &["/back", "/src", "/tmp"]);
    assert_only(&there, &["/copy"]);
    assert_eq!(here.json(&["ls", "/tmp"]).as_array().unwrap().len(), 0, "no list is left");
}

#[test]
fn within_a_cluster_attributes_are_kept_on_request() {
    let cluster = Cluster::small();
    cluster.put_in_folders("/a/f", b"bytes", &["--replication", "1", "--block-size", "1k"]);
    cluster.cairn(&["chmod", "640", "/a/f"]).ok();
    cluster.cairn(&["chown", "ann:staff", "/a/f"]).ok();
    cluster.cairn(&["chmod", "750", "/a"]).ok();
    cluster.json(&["job", "distcp", "--preserve=rbugpt", "/a", "/b"]);
    let stat = |path: &str| cluster.json(&["stat", path]);
    let (from, to) = (stat("/a/f"), stat("/b/f"));
    for key in ["length", "replication", "block_size", "owner", "group", "permission", "modified_ms"] {
        assert_eq!(from[key], to[key], "{key}");
    }
    assert_eq!(stat("/b")["permission"], stat("/a")["permission"]);
    // Without it the target's defaults.
    cluster.json(&["job", "distcp", "/a", "/c"]);
    let plain = stat("/c/f");
    assert_eq!((&plain["permission"], &plain["replication"]), (&"rw-r--r--".into(), &3.into()), "{plain}");
    // A target that is there takes the directory under its name; a second time nothing is replaced.
    let report = cluster.json(&["job", "distcp", "/a", "/c"]);
    assert_eq!(counts(&report), [1, 0, 0, 0]);
    assert_eq!(cluster.cat("/c/a/f"), b"bytes");
    cluster.put_in_folders("/a/f", b"other", &["-f"]);
    assert_eq!(counts(&cluster.json(&["job", "distcp", "/a", "/c"])), [0, 1, 0, 0]);
    assert_eq!(cluster.cat("/c/a/f"), b"bytes");
    assert_eq!(counts(&cluster.json(&["job", "distcp", "--overwrite", "/a", "/c"])), [1, 0, 0, 0]);
    assert_eq!(cluster.cat("/c/f"), b"other");
    // Single files, and several sources.
    cluster.json(&["job", "distcp", "/a/f", "/d"]);
    assert_eq!(cluster.cat("/d"), b"other");
    cluster.json(&["job", "distcp", "/a/f", "/d", "/e"]);
    assert_eq!((cluster.cat("/e/f"), cluster.cat("/e/d")), (b"other".to_vec(), b"other".to_vec()));
    assert_only(&cluster, &["/a", "/b", "/c", "/d", "/e"]);
}

/// By HDFS's own protocols, as from and to a cluster that is not ours.
#[test]
fn trees_are_copied_to_and_from_a_hdfs_updated_and_made_equal() {
    let (here, there) = (Cluster::small(), Cluster::start(ClusterOptions::new(3, 2)));
    let mut files = fill(&here);
    here.cairn(&["chmod", "640", "/src/sub1/file 1"]).ok();
    here.cairn(&["chown", "ann:staff", "/src/sub1/file 1"]).ok();
    let target = format!("hdfs://{}/copy", there.namenode.addr);
    let copy = |flags: &[&str]| here.json(&[&["job", "distcp"], flags, &["/src", &target]].concat());
    let report = copy(&["--preserve=rbugpt", "--bandwidth", "50"]);
    assert_eq!((counts(&report), report["state"].as_str()), ([13, 0, 0, 0], Some("succeeded")), "{report}");
    assert!(tree(&there, "/copy") == files);
    let (from, to) = (here.json(&["stat", "/src/sub1/file 1"]), there.json(&["stat", "/copy/sub1/file 1"]));
    for key in ["length", "replication", "block_size", "owner", "group", "permission", "modified_ms"] {
        assert_eq!(from[key], to[key], "{key}");
    }
    there.cairn(&["stat", "/copy/no files"]).ok();
    assert_eq!(counts(&copy(&["--update"])), [0, 13, 0, 0]);
    let changed = data::random(99, files["/sub1/file 1"].len());
    here.put_in_folders("/src/sub1/file 1", &changed, &["-f"]);
    here.cairn(&["rm", "--skip-trash", "/src/empty"]).ok();
    there.put_in_folders("/copy/surplus/file", b"x", &[]);
    files.insert("/sub1/file 1".into(), changed);
    files.remove("/empty");
    assert_eq!(counts(&copy(&["--update", "--delete"])), [1, 11, 0, 2]);
    assert!(tree(&there, "/copy") == files);
    // Back, and from a pattern.
    here.json(&["job", "distcp", "--maps", "3", &target, "/back"]);
    assert!(tree(&here, "/back") == files);
    let some = format!("hdfs://{}/copy/sub[12]", there.namenode.addr);
    here.json(&["job", "distcp", &some, "/some"]);
    let wanted = files.iter().filter(|(name, _)| !name.starts_with("/sub0"));
    assert!(tree(&here, "/some") == wanted.map(|(name, bytes)| (name.clone(), bytes.clone())).collect());
    // From this machine.
    let local = here.local_file("one", b"of this machine");
    here.json(&["job", "distcp", &format!("file://{local}"), &format!("{target}/one")]);
    assert_eq!(there.cat("/copy/one"), b"of this machine");
    assert_only(&here, &["/back", "/some", "/src", "/tmp"]);
    assert_only(&there, &["/copy"]);
    // What is not there, or not allowed, is said in one line.
    for (flags, parts) in [
        (["/src", "hdfs://127.0.0.1:1/x"], ["127.0.0.1:1", "refused"]),
        ([&format!("hdfs://{}/nothing", there.namenode.addr)[..], "/x"], ["/nothing", "does not exist"]),
        ([&format!("hdfs://{}/src", here.namenode.addr)[..], "/src/below"], ["/src/below", "into itself"]),
    ] {
        here.cairn(&[&["job", "distcp"], &flags[..]].concat()).fails_naming(1, &parts);
    }
}

#[test]
fn a_folder_of_this_machine_is_copied_from_here() {
    let cluster = Cluster::small();
    let root = cluster.path("local");
    std::fs::create_dir_all(root.join("sub/empty")).unwrap();
    let mut files = BTreeMap::new();
    for n in 0..20u64 {
        let bytes = data::random(n, (n * 70_000) as usize);
        let name = if n % 2 == 0 { format!("/f{n}") } else { format!("/sub/f{n}") };
        std::fs::write(root.join(&name[1..]), &bytes).unwrap();
        files.insert(name, bytes);
    }
    std::fs::set_permissions(root.join("f2"), std::fs::Permissions::from_mode(0o600)).unwrap();
    let source = format!("file://{}", root.display());
    let report = cluster.json(&["job", "distcp", "--preserve=p", &source, "/in"]);
    assert_eq!(counts(&report), [20, 0, 0, 0], "{report}");
    assert!(tree(&cluster, "/in") == files);
    cluster.cairn(&["stat", "/in/sub/empty"]).ok();
    assert_eq!(cluster.json(&["stat", "/in/f2"])["permission"], "rw-------");
    std::fs::write(root.join("f4"), data::random(77, 4 * 70_000)).unwrap();
    assert_eq!(counts(&cluster.json(&["job", "distcp", "--update", &source, "/in"])), [1, 19, 0, 0]);
    assert!(cluster.cat("/in/f4") == data::random(77, 4 * 70_000));
    assert_only(&cluster, &["/in"]);
    let text = cluster.cairn(&["job", "distcp", "--update", &source, "/in"]).ok();
    assert!(text.contains("0 files copied") && text.contains("20 skipped"), "{text}");
}

#[test]
fn a_node_that_dies_does_not_spoil_a_copy() {
    let mut cluster = Cluster::start(gate::with_gate(ClusterOptions::new(4, 2), 2));
    let files: BTreeMap<String, Vec<u8>> =
        (0..24u64).map(|n| (format!("/f{n}"), data::random(n, 700_000 + n as usize))).collect();
    for (name, bytes) in &files {
        cluster.put_in_folders(&format!("/src{name}"), bytes, &[]);
    }
    gate::close(&cluster);
    // So few maps are given no second attempts.
    let job = cluster.command(&["--json", "job", "distcp", "--maps", "3", "--bandwidth", "4", "/src", "/copy"]);
    let job = { job }.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut victim = None;
    wait_until("a datanode runs a task", Duration::from_secs(30), || {
        victim = gate::workers(&cluster).next().map(|(node, _)| node);
        victim.is_some()
    });
    cluster.kill_datanode(victim.unwrap());
    gate::open(&cluster);
    let report = Run::of_child("job distcp", job, Duration::from_secs(120)).json();
    assert_eq!(counts(&report), [24, 0, 0, 0], "{report}");
    assert!(tree(&cluster, "/copy") == files);
    assert_only(&cluster, &["/copy", "/src"]);
}

#[test]
fn a_copy_with_a_limit_is_whole_and_a_bad_one_says_why() {
    let cluster = Cluster::small();
    let bytes = data::random(5, 3 << 20);
    cluster.put_in_folders("/a/f", &bytes, &[]);
    cluster.json(&["job", "distcp", "--bandwidth", "4", "/a", "/slow"]);
    assert!(cluster.cat("/slow/f") == bytes);
    for (flags, code, parts) in [
        (&["/a", "/a/b"][..], 1, &["into itself"][..]),
        (&["/nothing", "/b"], 1, &["/nothing"]),
        (&["--delete", "/a", "/b"], 1, &["--update"]),
        (&["--update", "--overwrite", "/a", "/b"], 2, &["--overwrite"]),
        (&["--preserve=x", "/a", "/b"], 1, &["'x'"]),
        (&["file:///no/such/folder", "/b"], 1, &["/no/such/folder"]),
        (&["s3://bucket/x", "/b"], 2, &["s3://bucket/x", "cairn://", "hdfs://"]),
        (&["/a", "file:///tmp/x"], 1, &["cairn get"]),
        (&["/a", "cairn://127.0.0.1:1/x"], 1, &["127.0.0.1:1"]),
        (&["/a", "/a/f/x"], 1, &["/a/f"]),
        (&["--bandwidth", "0", "/a", "/b"], 2, &["0"]),
    ] {
        cluster.cairn(&[&["job", "distcp"], flags].concat()).fails_naming(code, parts);
    }
    // A file whose blocks are gone fails alone; the others are copied, and nothing is deleted.
    cluster.put_in_folders("/a/lost", &bytes, &["--replication", "1"]);
    for block in cluster.blocks("/a/lost") {
        let node = cluster.datanode(&block["replicas"][0]);
        std::fs::remove_file(cluster.block_file(node, &block)).unwrap();
    }
    let run = cluster.cairn(&["--json", "job", "distcp", "/a", "/partly"]);
    let report: Value = serde_json::from_slice(&run.stdout).unwrap();
    assert_eq!(counts(&report), [1, 0, 1, 0], "{report}");
    run.fails_naming(1, &["1 file not copied", "/partly/lost"]);
    assert!(cluster.cat("/partly/f") == bytes);
    cluster.cairn(&["stat", "/partly/lost"]).fails(1);
    assert_only(&cluster, &["/a", "/partly", "/slow"]);
}

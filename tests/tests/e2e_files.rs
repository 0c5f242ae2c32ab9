//! Files go in and come out bit for bit, whatever their size, and lie where they should.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "tests fail by panicking")]

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::process::Stdio;
use std::time::Duration;

use cairn_tests::data::{self, sha256, sha256_file};
use cairn_tests::{Cluster, ClusterOptions, Run, large};

const BLOCK: usize = 1 << 20;
const REPAIR: Duration = Duration::from_secs(60);

/// Where nobody who is silent for a moment is passed over.
fn patient(datanodes: usize, racks: usize) -> ClusterOptions {
    ClusterOptions::new(datanodes, racks).core("stale_interval_ms", 60_000).core("dead_interval_ms", 60_000)
}

#[test]
fn files_of_every_size_come_back_bit_for_bit() {
    let cluster = Cluster::small();
    for (k, size) in [0, 1, 511, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 5 * BLOCK + 12_345].into_iter().enumerate() {
        let bytes = if k % 2 == 0 { data::random(k as u64, size) } else { data::text(k as u64, size, 5_000) };
        let bytes = &bytes[..size];
        let local = cluster.local_file(&format!("in{k}"), bytes);
        let path = format!("/f{k}");
        cluster.cairn(&["put", &local, &path]).ok();
        let back = cluster.path(&format!("out{k}"));
        cluster.cairn(&["get", &path, back.to_str().unwrap()]).ok();
        assert_eq!(sha256_file(&back), sha256(bytes), "{size} bytes through files");
        let expected = size.div_ceil(BLOCK);
        let blocks = cluster.blocks(&path);
        assert_eq!(blocks.len(), expected, "{size} bytes");
        let lengths: usize = blocks.iter().map(|block| block["length"].as_u64().unwrap() as usize).sum();
        assert_eq!(lengths, size);
        let status = cluster.json(&["stat", &path]);
        assert_eq!(status["length"], size);
        assert_eq!(status["type"], "file");
    }
}

#[test]
fn pipes_carry_what_files_carry() {
    let cluster = Cluster::small();
    for (k, size) in [0, 1, BLOCK, BLOCK + 1, 4 * BLOCK + 7].into_iter().enumerate() {
        let bytes = data::random(100 + k as u64, size);
        let path = format!("/p{k}");
        cluster.put(&path, &bytes, &[]);
        assert_eq!(sha256(&cluster.cat(&path)), sha256(&bytes), "cat of {size}");
        assert_eq!(sha256(&cluster.cairn(&["get", &path, "-"]).ok_bytes()), sha256(&bytes), "get - of {size}");
        let through_socket = cluster.cairn(&["cat", "--no-short-circuit", &path]).ok_bytes();
        assert_eq!(sha256(&through_socket), sha256(&bytes), "cat --no-short-circuit of {size}");
    }
    let both = cluster.cairn(&["cat", "/p1", "/p2"]).ok_bytes();
    assert_eq!(both.len(), 1 + BLOCK);
}

#[test]
fn block_sizes_other_than_the_default() {
    let cluster = Cluster::small();
    let bytes = data::text(7, 300_000, 3_000);
    for (size, count) in
        [("512", bytes.len().div_ceil(512)), ("64k", bytes.len().div_ceil(65_536)), ("65024", 5), ("16m", 1)]
    {
        let path = format!("/b{size}");
        // The smallest size makes hundreds of blocks: a part of the data is enough for it.
        let (bytes, count) = if size == "512" { (&bytes[..20_000], 40) } else { (&bytes[..], count) };
        cluster.put(&path, bytes, &["--block-size", size]);
        assert_eq!(cluster.blocks(&path).len(), count, "block size {size}");
        assert_eq!(sha256(&cluster.cat(&path)), sha256(bytes), "block size {size}");
    }
    assert_eq!(cluster.json(&["stat", "/b64k"])["block_size"], 65_536);
}

#[test]
fn every_block_has_three_replicas_on_exactly_two_racks() {
    let cluster = Cluster::start(patient(5, 3));
    cluster.put("/big", &data::random(3, 12 * BLOCK + 5), &[]);
    cluster.wait_healthy(REPAIR);
    let report = cluster.json(&["blocks", "/big"]);
    assert_eq!(report["replication"], 3);
    let blocks = report["blocks"].as_array().unwrap();
    assert_eq!(blocks.len(), 13);
    let mut nodes = BTreeSet::new();
    let mut offset = 0;
    for block in blocks {
        assert_eq!(block["offset"].as_u64(), Some(offset));
        offset += block["length"].as_u64().unwrap();
        assert!(block["generation"].as_u64().unwrap() >= 1_001, "{block}");
        // Random bytes do not shrink: frames, index and footer add a little.
        let (stored, length) = (block["stored"].as_u64().unwrap(), block["length"].as_u64().unwrap());
        assert!(stored > length && stored < length + length / 100 + 1_000, "{block}");
        let replicas = block["replicas"].as_array().unwrap();
        let distinct = |key: &str| replicas.iter().map(|r| r[key].to_string()).collect::<BTreeSet<_>>();
        assert_eq!(distinct("node").len(), 3, "{block}");
        assert_eq!(distinct("rack").len(), 2, "{block}");
        assert!(replicas.iter().all(|replica| replica["state"] == "finalized"), "{block}");
        nodes.extend(distinct("node"));
    }
    assert_eq!(nodes.len(), 5, "the blocks are spread over all nodes");
    let health = cluster.fsck(&["/big"]);
    assert_eq!((&health["files"], &health["blocks"]), (&1.into(), &13.into()));
}

#[test]
fn text_is_stored_compressed_unless_asked_otherwise() {
    let cluster = Cluster::small();
    let text = data::text(1, 3 * BLOCK, 2_000);
    cluster.put("/packed", &text, &[]);
    cluster.put("/plain", &text, &["--codec", "none"]);
    let stored = |path: &str| cluster.blocks(path).iter().map(|b| b["stored"].as_u64().unwrap()).sum::<u64>();
    assert!(stored("/packed") < text.len() as u64 / 2, "{} of {}", stored("/packed"), text.len());
    assert!(stored("/plain") > text.len() as u64);
    assert_eq!(sha256(&cluster.cat("/plain")), sha256(&text));
    let sum = |path: &str| cluster.cairn(&["checksum", path]).ok().replace(path, "");
    assert_eq!(sum("/packed"), sum("/plain"), "the checksum is of the data, however it is stored");
}

#[test]
fn a_reader_that_has_enough_ends_the_command_quietly() {
    let cluster = Cluster::small();
    cluster.put("/long", &data::random(5, 6 * BLOCK), &[]);
    let mut child = cluster.command(&["cat", "/long"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut first = [0; 100];
    child.stdout.take().unwrap().read_exact(&mut first).unwrap();
    let run = Run::ended("cat /long | head -c 100".into(), child.wait_with_output().unwrap());
    assert_eq!(run.stderr, "", "a closed pipe is no error");
}

#[test]
fn a_put_whose_input_breaks_off_is_whole_as_far_as_it_went() {
    let cluster = Cluster::small();
    let mut child = cluster.command(&["put", "-", "/cut"]).stdin(Stdio::piped()).spawn().unwrap();
    let bytes = data::random(6, BLOCK + 100);
    child.stdin.take().unwrap().write_all(&bytes).unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(cluster.cat("/cut"), bytes);
}

#[test]
fn folders_go_in_and_out_with_all_that_is_in_them() {
    let cluster = Cluster::small();
    let root = cluster.path("tree");
    std::fs::create_dir_all(root.join("a/b")).unwrap();
    std::fs::create_dir_all(root.join("empty")).unwrap();
    std::fs::write(root.join("one"), b"1").unwrap();
    std::fs::write(root.join("a/two words"), b"22").unwrap();
    std::fs::write(root.join("a/b/dré"), vec![3; 70_000]).unwrap();
    cluster.cairn(&["mkdir", "/in"]).ok();
    cluster.cairn(&["put", root.to_str().unwrap(), "/in"]).ok();
    assert_eq!(cluster.cat("/in/tree/a/two words"), b"22");
    assert_eq!(cluster.json(&["stat", "/in/tree/empty"])["type"], "directory");
    let out = cluster.path("out");
    std::fs::create_dir(&out).unwrap();
    cluster.cairn(&["get", "/in/tree", out.to_str().unwrap()]).ok();
    let diff = std::process::Command::new("diff").arg("-r").arg(&root).arg(out.join("tree")).output().unwrap();
    assert!(diff.status.success(), "{}", String::from_utf8_lossy(&diff.stdout));
}

#[test]
fn replication_follows_what_is_asked_and_set() {
    let cluster = Cluster::start(ClusterOptions::new(4, 2));
    cluster.put("/r1", &data::random(8, 2 * BLOCK), &["--replication", "1"]);
    let counts = |path: &str| -> Vec<usize> {
        cluster.blocks(path).iter().map(|block| block["replicas"].as_array().unwrap().len()).collect()
    };
    assert_eq!(counts("/r1"), [1, 1]);
    cluster.cairn(&["setrep", "-w", "3", "/r1"]).ok();
    assert_eq!(counts("/r1"), [3, 3]);
    cluster.cairn(&["setrep", "-w", "2", "/r1"]).ok();
    assert_eq!(counts("/r1"), [2, 2]);
    cluster.wait_healthy(REPAIR);
    assert_eq!(sha256(&cluster.cat("/r1")), sha256(&data::random(8, 2 * BLOCK)));
}

#[test]
fn a_small_cluster_takes_files_with_the_replicas_that_it_has() {
    let cluster = Cluster::start(patient(1, 1));
    cluster.put("/f", b"one node is enough", &[]);
    assert_eq!(cluster.cat("/f"), b"one node is enough");
    assert_eq!(cluster.fsck(&[])["under_replicated"], 1);
}

/// Gigabytes; the default run has the same with megabytes.
#[test]
fn a_gigabyte_of_each_kind_comes_back() {
    let size = if large() { 1 << 30 } else { 24 << 20 };
    let options = ClusterOptions::new(4, 2).core("default_block_size", if large() { 128 << 20 } else { 8 << 20 });
    let cluster = Cluster::start(options);
    for (name, bytes) in [("random", data::random(11, size)), ("text", data::text(12, size, 200_000))] {
        let local = cluster.local_file(name, &bytes);
        let wanted = sha256(&bytes);
        drop(bytes);
        let path = format!("/{name}");
        cluster.cairn(&["put", &local, &path]).ok();
        let back = cluster.path("back");
        cluster.cairn(&["get", "-f", &path, back.to_str().unwrap()]).ok();
        assert_eq!(sha256_file(&back), wanted, "{name} through files");
        let script = format!("\"$0\" put -f - {path}.piped < \"$1\" && \"$0\" cat {path}.piped | sha256sum");
        let mut shell = std::process::Command::new("bash");
        shell.args(["-c", &script]).arg(cairn_tests::binary::cairn()).arg(&local);
        shell.env("CAIRN_NAMENODE", &cluster.namenode.addr);
        let sum = Run::of(shell, b"").ok();
        assert_eq!(sum.split_whitespace().next(), Some(&*wanted), "{name} through pipes");
    }
}

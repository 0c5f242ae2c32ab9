//! Files that are there are changed: appended to, taken from dead writers.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "tests fail by panicking")]

use std::io::Write;
use std::process::{Child, Stdio};
use std::time::Duration;

use cairn_client::fs::{AppendOptions, ClientSettings, ErrorCode, FileSystem};
use cairn_common::Env;
use cairn_tests::data::{self, sha256};
use cairn_tests::process::Process;
use cairn_tests::{Cluster, wait_until};

const BLOCK: usize = 1 << 20;

fn spawn(cluster: &Cluster, args: &[&str]) -> Child {
    cluster.command(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn being_written(cluster: &Cluster) -> usize {
    let open =
        |node: usize| cluster.block_files(node).iter().filter(|f| f.extension().is_some_and(|e| e == "rbw")).count();
    (0..cluster.datanodes.len()).map(open).sum()
}

fn kill(mut child: Child) {
    let process = Process::of(child.id()).expect("it runs");
    process.signal(libc::SIGKILL);
    wait_until("the killed writer is gone", Duration::from_secs(10), || {
        !process.runs() || child.try_wait().unwrap().is_some()
    });
    let _ = child.wait();
}

fn wait_open(cluster: &Cluster, path: &str) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let fs = runtime.block_on(connect(cluster));
    wait_until("the file is open", Duration::from_secs(10), || runtime.block_on(fs.status(path)).unwrap().open);
}

async fn connect(cluster: &Cluster) -> FileSystem {
    FileSystem::connect(Env::system(), ClientSettings::at(&cluster.namenode.addr)).await.unwrap()
}

#[test]
fn append_adds_behind_the_end_bit_for_bit() {
    let cluster = Cluster::small();
    let pieces: Vec<Vec<u8>> = [BLOCK + 17, 0, 1, 300_000, 2 * BLOCK, 4_000]
        .iter()
        .enumerate()
        .map(|(k, size)| {
            if k % 2 == 0 { data::random(k as u64, *size) } else { data::text(k as u64, *size, 900)[..*size].to_vec() }
        })
        .collect();
    // The first one makes the file.
    for (k, piece) in pieces.iter().enumerate() {
        if k % 2 == 0 {
            let local = cluster.local_file(&format!("piece{k}"), piece);
            cluster.cairn(&["append", &local, "/f"]).ok();
        } else {
            cluster.cairn_with(&["append", "-", "/f"], piece).ok();
        }
    }
    let whole = pieces.concat();
    assert_eq!(sha256(&cluster.cat("/f")), sha256(&whole));
    assert_eq!(cluster.json(&["stat", "/f"])["length"], whole.len());
    let (first, second) = (cluster.local_file("a", b"one "), cluster.local_file("b", b"two"));
    cluster.cairn(&["append", &first, &second, "/f"]).ok();
    let whole = [whole, b"one two".to_vec()].concat();
    assert_eq!(sha256(&cluster.cat("/f")), sha256(&whole));
    // A short tail block each; none of them was touched again.
    let lengths: Vec<u64> = cluster.blocks("/f").iter().map(|block| block["length"].as_u64().unwrap()).collect();
    assert_eq!(lengths.iter().sum::<u64>(), whole.len() as u64);
    assert!(cluster.fsck(&["/"])["status"] == "healthy");
    // And it survives a restart.
    let mut cluster = cluster;
    cluster.kill_everything();
    cluster.start_again();
    cluster.wait_serving(Duration::from_secs(30));
    assert_eq!(sha256(&cluster.cat("/f")), sha256(&whole));
}

#[test]
fn what_cannot_be_appended_to_is_said_and_changes_nothing() {
    let cluster = Cluster::small();
    cluster.put("/f", b"kept", &[]);
    cluster.cairn(&["mkdir", "/d"]).ok();
    let local = cluster.local_file("x", b"more");
    for (args, says) in [
        (&["append", local.as_str(), "/d"][..], "not a file"),
        (&["append", "/no/such/file", "/f"][..], "no such file"),
        (&["append", local.as_str(), "/no/such/folder/f"][..], "/no/such/folder"),
    ] {
        let run = cluster.cairn(args);
        assert_eq!(run.code, 1, "{args:?}");
        assert!(run.stderr.contains(says) && run.stderr.trim().lines().count() == 1, "{args:?}: {}", run.stderr);
    }
    assert_eq!(cluster.cairn(&["append", "-", local.as_str(), "/f"]).code, 2);
    assert_eq!(cluster.cat("/f"), b"kept");
    // While one appends, another one is refused.
    let mut first = spawn(&cluster, &["append", "-", "/f"]);
    let mut stdin = first.stdin.take().unwrap();
    stdin.write_all(b" and").unwrap();
    wait_open(&cluster, "/f");
    let run = cluster.cairn(&["append", &local, "/f"]);
    assert_eq!(run.code, 1);
    assert!(run.stderr.contains("lease is currently owned by"), "{}", run.stderr);
    assert!(run.stderr.contains("recover-lease /f"), "{}", run.stderr);
    drop(stdin);
    assert!(first.wait().unwrap().success());
    assert_eq!(cluster.cat("/f"), b"kept and");
}

#[test]
fn a_killed_append_leaves_what_was_there_and_recover_lease_closes_the_file() {
    let cluster = Cluster::small();
    let old = data::random(1, BLOCK + 5);
    cluster.put("/f", &old, &["--block-size", "4m"]);
    let more = data::random(2, 3 * BLOCK);
    let mut writer = spawn(&cluster, &["append", "-", "/f"]);
    let mut stdin = writer.stdin.take().unwrap();
    stdin.write_all(&more[..2 * BLOCK + BLOCK / 2]).unwrap();
    wait_until("the append writes a block", Duration::from_secs(20), || being_written(&cluster) > 0);
    kill(writer);
    drop(stdin);
    let open = cluster.json(&["stat", "/f"])["length"].as_u64().unwrap();
    assert!(open >= old.len() as u64);
    let run = cluster.json(&["admin", "recover-lease", "/f"]);
    assert_eq!(run["closed"], true);
    let bytes = cluster.cat("/f");
    assert_eq!(run["length"], bytes.len());
    let whole = [old.as_slice(), more.as_slice()].concat();
    assert!(bytes.len() >= old.len() && bytes[..] == whole[..bytes.len()], "{} bytes", bytes.len());
    wait_until("nothing of it is open any more", Duration::from_secs(60), || being_written(&cluster) == 0);
    // The next one goes on at once, and a closed file needs no recovery.
    cluster.cairn_with(&["append", "-", "/f"], b"end").ok();
    assert_eq!(sha256(&cluster.cat("/f")), sha256(&[bytes.as_slice(), b"end"].concat()));
    cluster.cairn(&["admin", "recover-lease", "/f"]).ok();
    let run = cluster.cairn(&["admin", "recover-lease", "/none"]);
    assert!(run.code == 1 && run.stderr.contains("/none"), "{}", run.stderr);
    cluster.wait_healthy(Duration::from_secs(60));
}

#[tokio::test(flavor = "multi_thread")]
async fn flushed_bytes_outlive_their_writer_who_is_locked_out() {
    let cluster = Cluster::small();
    cluster.put("/f", b"before ", &[]);
    let (one, other) = (connect(&cluster).await, connect(&cluster).await);
    let bytes = data::random(3, 700_001);
    let mut writer = one.append("/f", AppendOptions::default()).await.unwrap();
    writer.write(&bytes).await.unwrap();
    writer.flush().await.unwrap();
    let closed = wait_for_closed(&other).await;
    assert!(closed, "recovery ends");
    let mut reader = other.open("/f").await.unwrap();
    let mut read = Vec::new();
    while let Some(piece) = reader.next_chunk().await.unwrap() {
        read.extend_from_slice(&piece);
    }
    assert_eq!(
        sha256(&read),
        sha256(&[b"before ", bytes.as_slice()].concat()),
        "every flushed byte is there, and no other"
    );
    let _ = writer.write(&data::random(4, 2 * BLOCK)).await;
    let error = writer.close().await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::LeaseExpired, "{error}");
    assert_eq!(other.status("/f").await.unwrap().length, read.len() as u64);
}

async fn wait_for_closed(fs: &FileSystem) -> bool {
    for _ in 0..600 {
        if fs.recover_lease("/f").await.unwrap().closed {
            return true;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    false
}

#[test]
fn a_writer_that_dies_before_its_first_byte_is_found_out_at_once() {
    let cluster = Cluster::small();
    cluster.put("/f", b"old", &[]);
    let mut writer = spawn(&cluster, &["append", "-", "/f"]);
    let stdin = writer.stdin.take().unwrap();
    wait_open(&cluster, "/f");
    kill(writer);
    drop(stdin);
    let run = cluster.json(&["admin", "recover-lease", "--timeout", "20", "/f"]);
    assert_eq!(run["closed"], true);
    assert_eq!(cluster.cat("/f"), b"old");
}

#[test]
fn truncate_cuts_bit_for_bit_wherever_the_cut_falls() {
    let mut cluster = Cluster::small();
    // Text is compressed: most cuts fall inside a frame that has to be decoded.
    let bytes = data::text(5, 4 * BLOCK + 77, 9_000)[..4 * BLOCK + 77].to_vec();
    cluster.put("/f", &bytes, &[]);
    let lengths = [4 * BLOCK + 76, 4 * BLOCK, 3 * BLOCK + 300_001, 3 * BLOCK + 256 * 1024, 2 * BLOCK, BLOCK + 1, 5, 0];
    for length in lengths {
        let run = cluster.json(&["truncate", "/f", &length.to_string()]);
        assert_eq!((run["done"].as_bool(), run["length"].as_u64()), (Some(true), Some(length as u64)));
        assert_eq!(cluster.json(&["stat", "/f"])["length"], length);
        assert_eq!(sha256(&cluster.cat("/f")), sha256(&bytes[..length]), "cut to {length}");
        if length == 3 * BLOCK + 300_001 {
            cluster.wait_healthy(Duration::from_secs(60));
            cluster.kill_everything();
            cluster.start_again();
            cluster.wait_serving(Duration::from_secs(30));
            assert_eq!(sha256(&cluster.cat("/f")), sha256(&bytes[..length]), "after a restart of everything");
            let run = cluster.cairn(&["truncate", "/f", &bytes.len().to_string()]);
            assert_eq!(run.code, 1);
            assert!(run.stderr.contains("Cannot truncate to a larger file size"), "{}", run.stderr);
            let run = cluster.cairn(&["truncate", "/", "1"]);
            assert!(run.code == 1 && run.stderr.contains("not a file"), "{}", run.stderr);
        }
    }
    cluster.cairn_with(&["append", "-", "/f"], b"anew").ok();
    assert_eq!(cluster.cat("/f"), b"anew");
    // Nothing of what was cut off stays on the disks.
    wait_until("the cut blocks are gone", Duration::from_secs(60), || {
        (0..3).map(|node| cluster.block_files(node).len()).sum::<usize>() == 3
    });
}

#[test]
fn a_datanode_that_was_away_during_a_cut_does_not_bring_the_old_bytes_back() {
    let mut cluster = Cluster::small();
    let bytes = data::random(6, BLOCK);
    cluster.put("/f", &bytes, &[]);
    let away = cluster.datanode(&cluster.blocks("/f")[0]["replicas"][0]);
    cluster.kill_datanode(away);
    cluster.cairn(&["truncate", "/f", "700000"]).ok();
    cluster.cairn_with(&["append", "-", "/f"], b"behind the cut").ok();
    let whole = [&bytes[..700_000], b"behind the cut"].concat();
    assert_eq!(sha256(&cluster.cat("/f")), sha256(&whole));
    cluster.restart_datanode(away);
    cluster.wait_healthy(Duration::from_secs(60));
    assert_eq!(sha256(&cluster.cat("/f")), sha256(&whole));
    let replicas = cluster.blocks("/f")[0]["replicas"].as_array().unwrap().len();
    assert_eq!(replicas, 3, "the old replica was replaced by a copy of the new one");
}

#[test]
fn a_cut_that_waits_for_its_datanode_says_so_and_ends_when_the_node_is_back() {
    let mut cluster = Cluster::small();
    let bytes = data::random(7, BLOCK);
    cluster.put("/f", &bytes, &["--replication", "1"]);
    let only = cluster.datanode(&cluster.blocks("/f")[0]["replicas"][0]);
    cluster.kill_datanode(only);
    cluster.cairn(&["truncate", "--timeout", "1", "/f", "700000"]).fails_naming(1, &["/f", "700000", "not cut yet"]);
    cluster.restart_datanode(only);
    wait_until("the file is closed again", Duration::from_secs(60), || {
        cluster.cairn(&["stat", "/f"]).ok().lines().any(|line| line.starts_with("open:") && line.ends_with("no"))
    });
    assert_eq!(sha256(&cluster.cat("/f")), sha256(&bytes[..700_000]));
}

#[test]
fn concat_joins_files_without_moving_bytes() {
    let cluster = Cluster::small();
    let parts: Vec<Vec<u8>> = (0..4).map(|k| data::random(20 + k, 500_000 + k as usize * 400_000)).collect();
    cluster.cairn(&["mkdir", "/d"]).ok();
    for (k, part) in parts.iter().enumerate() {
        cluster.put(&format!("/d/p{k}"), part, &[]);
    }
    cluster.wait_healthy(Duration::from_secs(60));
    let before: usize = (0..3).map(|node| cluster.block_files(node).len()).sum();
    cluster.cairn(&["concat", "/d/p0", "/d/p1", "/d/p3", "/d/p2"]).ok();
    let whole = [&parts[0][..], &parts[1], &parts[3], &parts[2]].concat();
    assert_eq!(sha256(&cluster.cat("/d/p0")), sha256(&whole));
    assert_eq!(cluster.cairn(&["ls", "/d"]).ok().lines().filter(|line| line.contains("/d/p")).count(), 1);
    assert_eq!((0..3).map(|node| cluster.block_files(node).len()).sum::<usize>(), before, "the very same files");
    let run = cluster.cairn(&["concat", "/d/p0", "/d/p1"]);
    assert!(run.code == 1 && run.stderr.contains("/d/p1"), "{}", run.stderr);
    let run = cluster.cairn(&["concat", "/d/p0", "/d/p0"]);
    assert!(run.code == 1 && run.stderr.contains("the same with the target"), "{}", run.stderr);
    // Random access across the seams.
    let tail = cluster.cairn(&["tail", "-c", "2000000", "/d/p0"]).ok_bytes();
    assert_eq!(sha256(&tail), sha256(&whole[whole.len() - 2_000_000..]));
    assert_eq!(cluster.fsck(&["/"])["status"], "healthy");
}

/// `cairn tail -f` with its output gathered as it comes.
struct Follower {
    child: Child,
    seen: std::sync::Arc<std::sync::Mutex<Vec<u8>>>,
}

impl Follower {
    fn start(cluster: &Cluster, path: &str) -> Self {
        let mut child = spawn(cluster, &["tail", "-f", "-c", "100m", path]);
        let mut stdout = child.stdout.take().unwrap();
        let seen = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
        let to = std::sync::Arc::clone(&seen);
        std::thread::spawn(move || {
            let mut piece = [0; 65_536];
            while let Ok(count) = std::io::Read::read(&mut stdout, &mut piece) {
                if count == 0 {
                    return;
                }
                to.lock().unwrap().extend_from_slice(&piece[..count]);
            }
        });
        Self { child, seen }
    }

    fn wait_for(&self, expected: &[u8], what: &str) {
        wait_until(what, Duration::from_secs(60), || self.seen.lock().unwrap().len() >= expected.len());
        assert_eq!(sha256(&self.seen.lock().unwrap()), sha256(expected), "{what}");
    }

    fn end(self, expected: &[u8]) -> cairn_tests::Run {
        let run = cairn_tests::Run::of_child("tail -f", self.child, Duration::from_secs(30));
        assert_eq!(sha256(&self.seen.lock().unwrap()), sha256(expected));
        run
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_sees_what_was_flushed_through_blocks_pipelines_and_appends() {
    let mut cluster = Cluster::start(cairn_tests::ClusterOptions::new(4, 2));
    let fs = connect(&cluster).await;
    let bytes = data::random(31, 4 * BLOCK);
    let options = cairn_client::fs::CreateOptions { block_size: BLOCK as u64, ..Default::default() };
    let mut writer = fs.create("/log", options).await.unwrap();
    writer.write(&bytes[..1_000]).await.unwrap();
    writer.flush().await.unwrap();
    let follower = Follower::start(&cluster, "/log");
    follower.wait_for(&bytes[..1_000], "what was flushed before");
    let mut at = 1_000;
    for (k, step) in [1, 400_000, 900_000, 70_000].into_iter().enumerate() {
        writer.write(&bytes[at..at + step]).await.unwrap();
        writer.flush().await.unwrap();
        at += step;
        follower.wait_for(&bytes[..at], &format!("flush {k}"));
    }
    // One node of the open block's pipeline dies: the writer goes on without it, and so does the follower.
    let open = fs.block_locations("/log", 0, 0).await.unwrap().pop().unwrap();
    assert!(!open.complete);
    let victim = cluster.datanodes.iter().position(|node| node.addr == open.replicas[0].address).unwrap();
    cluster.kill_datanode(victim);
    for step in [100_000, 700_000, 600_000] {
        writer.write(&bytes[at..at + step]).await.unwrap();
        writer.flush().await.unwrap();
        at += step;
        follower.wait_for(&bytes[..at], "a flush after a node of the pipeline died");
    }
    writer.close().await.unwrap();
    // Closed, and opened again.
    let mut writer = fs.append("/log", AppendOptions::default()).await.unwrap();
    writer.write(&bytes[at..at + 50_000]).await.unwrap();
    writer.close().await.unwrap();
    at += 50_000;
    follower.wait_for(&bytes[..at], "what was appended");
    fs.delete("/log", false).await.unwrap();
    let run = follower.end(&bytes[..at]);
    assert_eq!(run.code, 1);
    assert!(run.stderr.contains("/log was deleted or renamed: nothing more will come"), "{}", run.stderr);
}

#[test]
fn a_follower_ends_when_it_is_interrupted() {
    let cluster = Cluster::small();
    cluster.put("/f", b"some", &[]);
    let follower = Follower::start(&cluster, "/f");
    follower.wait_for(b"some", "what is there");
    cluster.cairn_with(&["append", "-", "/f"], b" more").ok();
    follower.wait_for(b"some more", "what was appended");
    cluster.cairn(&["truncate", "/f", "4"]).ok();
    cluster.cairn_with(&["append", "-", "/f"], b"!").ok();
    Process::of(follower.child.id()).unwrap().signal(libc::SIGINT);
    let run = cairn_tests::Run::of_child("tail -f", follower.child, Duration::from_secs(20));
    assert_eq!(run.code, 130);
}

#[tokio::test(flavor = "multi_thread")]
async fn short_blocks_are_merged_under_readers_and_nothing_changes_for_them() {
    let options = cairn_tests::ClusterOptions::new(4, 2)
        .core("merge_delay_ms", 10_000)
        .core("deletions_per_heartbeat", 1_000)
        .core("merge_bytes_per_second", 100 << 20);
    let cluster = Cluster::start(options);
    let whole = data::text(41, 600_000, 4_000)[..600_000].to_vec();
    cluster.put("/f", &whole[..100_000], &["--block-size", "4m"]);
    for piece in whole[100_000..].chunks(50_000) {
        cluster.cairn_with(&["append", "-", "/f"], piece).ok();
    }
    let fs = connect(&cluster).await;
    let old = fs.block_locations("/f", 0, 0).await.unwrap();
    assert_eq!(old.len(), 11);
    // Opened before: it knows the old blocks only.
    let mut reader = fs.open("/f").await.unwrap();
    let mut read = reader.read_range(0, 60_000).await.unwrap().to_vec();
    wait_until("the run is one block", Duration::from_secs(60), || cluster.blocks("/f").len() == 1);
    cluster.wait_healthy(Duration::from_secs(60));
    let merged = cluster.blocks("/f").remove(0);
    assert_eq!((merged["length"].as_u64(), merged["replicas"].as_array().unwrap().len()), (Some(600_000), 3));
    wait_until("the old replicas are deleted", Duration::from_secs(60), || {
        (0..4).map(|node| cluster.block_files(node).len()).sum::<usize>() == 3
    });
    reader.seek(60_000);
    while let Some(piece) = reader.next_chunk().await.unwrap() {
        read.extend_from_slice(&piece);
    }
    assert_eq!(sha256(&read), sha256(&whole), "a reader with old locations goes on");
    assert_eq!(sha256(&cluster.cat("/f")), sha256(&whole));
    let located = fs.block_locations("/f", 0, 0).await.unwrap().remove(0);
    for replica in &located.replicas {
        fs.verify_replica(replica, located.block.as_ref().unwrap()).await.unwrap();
    }
    cluster.cairn_with(&["append", "-", "/f"], b"and on").ok();
    assert_eq!(sha256(&cluster.cat("/f")), sha256(&[&whole[..], b"and on"].concat()));
    cluster.wait_healthy(Duration::from_secs(60));
}

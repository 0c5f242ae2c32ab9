//! The file system library against a real namenode and real datanodes in this process.

// A helper that fails is a test that fails.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::time::Duration;

use bytes::Bytes;
use cairn_client::fs::{CreateOptions, ErrorCode, FileSystem, RenameMode, ReplicaState};
use cairn_common::Env;
use cairn_common::entropy::Entropy;

use common::Cluster;

const BLOCK: u64 = 1 << 20;

async fn put(cluster: &Cluster, path: &str, data: &Bytes) {
    let status = cluster.write(path, data.clone(), options()).await;
    assert_eq!((status.length, status.open), (data.len() as u64, false));
}

fn options() -> CreateOptions {
    CreateOptions { block_size: BLOCK, ..Default::default() }
}

fn random(length: u64) -> Bytes {
    let mut bytes = vec![0; length as usize];
    Entropy::seeded(length).fill(&mut bytes);
    bytes.into()
}

fn text(length: u64) -> Bytes {
    let lines = (0..).flat_map(|k: u32| format!("line {k} of a text that repeats itself\n").into_bytes());
    lines.take(length as usize).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_come_back_as_they_were() {
    let cluster = Cluster::start(3, |_| ()).await;
    for size in [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 777] {
        for (kind, data) in [("text", text(size)), ("random", random(size))] {
            let path = format!("/{kind}-{size}");
            put(&cluster, &path, &data).await;
            assert!(cluster.get(&path).await == data, "{path}");
            let blocks = cluster.fs.block_locations(&path, 0, 0).await.unwrap();
            assert_eq!(blocks.len() as u64, size.div_ceil(BLOCK), "{path}");
            for located in blocks {
                assert!(located.complete);
                assert!(!located.replicas.is_empty());
                let block = located.block.unwrap();
                for replica in &located.replicas {
                    let info = cluster.fs.replica_info(replica, &block, true).await.unwrap();
                    assert_eq!((info.length, info.state()), (located.length, ReplicaState::Finalized));
                    cluster.fs.verify_replica(replica, &block).await.unwrap();
                }
            }
            assert_eq!(cluster.fs.file_checksum(&path).await.unwrap().crc32c, crc32c::crc32c(&data), "{path}");
        }
    }
    let reader = cluster.fs.open(&format!("/text-{}", 5 * BLOCK + 777)).await.unwrap();
    let data = text(5 * BLOCK + 777);
    for offset in [0, 1, BLOCK - 10, 3 * BLOCK + 300_000, 5 * BLOCK + 700] {
        let end = (offset + 500_000).min(data.len() as u64);
        assert!(reader.read_range(offset, 500_000).await.unwrap() == data[offset as usize..end as usize]);
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_behave() {
    let cluster = Cluster::start(1, |_| ()).await;
    let fs = &cluster.fs;
    fs.mkdirs("/a/b", 0o755).await.unwrap();
    assert_eq!(fs.mkdir("/x/y", 0o755).await.unwrap_err().code(), ErrorCode::FileNotFound);
    put(&cluster, "/a/b/1.txt", &text(10)).await;
    put(&cluster, "/a/b/2.txt", &text(20)).await;
    assert_eq!(fs.create("/a/b/1.txt", options()).await.err().unwrap().code(), ErrorCode::FileAlreadyExists);
    let found: Vec<_> = fs.glob("/a/*/[12].txt").await.unwrap().into_iter().map(|status| status.path).collect();
    assert_eq!(found, ["/a/b/1.txt", "/a/b/2.txt"]);
    fs.rename("/a/b/1.txt", "/a/c", RenameMode::NoReplace).await.unwrap();
    assert!(!fs.exists("/a/b/1.txt").await.unwrap());
    assert!(cluster.get("/a/c").await == text(10));
    assert_eq!(fs.content_summary("/a").await.unwrap().files, 2);
    fs.set_permission("/a/c", 0o600).await.unwrap();
    assert_eq!(fs.status("/a/c").await.unwrap().permission, 0o600);
    let mut walk = fs.walk("/a").await.unwrap();
    let mut seen = 0;
    while walk.next().await.unwrap().is_some() {
        seen += 1;
    }
    assert_eq!(seen, 4);
    assert!(fs.delete("/a", true).await.unwrap());
    assert!(!fs.delete("/a", true).await.unwrap());
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_datanode_may_leave_in_the_middle_of_a_write_and_of_a_read() {
    let mut cluster = Cluster::start(4, |_| ()).await;
    let data = random(6 * BLOCK);
    let mut out = cluster.fs.create("/f", options()).await.unwrap();
    out.write_bytes(data.slice(..(BLOCK + 500_000) as usize)).await.unwrap();
    out.flush().await.unwrap();
    let located = cluster.fs.block_locations("/f", BLOCK, 1).await.unwrap();
    // The block before may be named too: its length may not be known yet.
    let written = located.last().unwrap();
    let victim: usize = written.replicas[1].host.trim_start_matches("dn").parse().unwrap();
    cluster.nodes[victim].take().unwrap().shutdown().await;
    out.write_bytes(data.slice((BLOCK + 500_000) as usize..)).await.unwrap();
    out.close().await.unwrap();
    assert!(cluster.get("/f").await == data);

    let mut input = cluster.fs.open("/f").await.unwrap();
    let first = input.next_chunk().await.unwrap().unwrap();
    let serving = cluster.fs.block_locations("/f", 0, 1).await.unwrap()[0].replicas[0].host.clone();
    let serving: usize = serving.trim_start_matches("dn").parse().unwrap();
    if let Some(node) = cluster.nodes[serving].take() {
        node.shutdown().await;
    }
    let mut all = first.to_vec();
    while let Some(chunk) = input.next_chunk().await.unwrap() {
        all.extend_from_slice(&chunk);
    }
    assert!(all == data);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_see_what_a_writer_flushed() {
    let cluster = Cluster::start(3, |_| ()).await;
    let data = text(BLOCK + 300_000);
    let mut out = cluster.fs.create("/f", options()).await.unwrap();
    out.write(&data[..1_000]).await.unwrap();
    out.flush().await.unwrap();
    assert!(cluster.get("/f").await == data[..1_000]);
    out.write(&data[1_000..]).await.unwrap();
    out.sync().await.unwrap();
    assert!(cluster.get("/f").await == data);
    let other = FileSystem::connect(Env::system(), cluster.fs.settings().clone()).await.unwrap();
    let error = other.create("/f", CreateOptions { overwrite: false, ..options() }).await.err().unwrap();
    assert!(matches!(error.code(), ErrorCode::FileAlreadyExists | ErrorCode::AlreadyBeingCreated), "{error}");
    out.close().await.unwrap();
    assert!(cluster.get("/f").await == data);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_small_files_at_once() {
    let cluster = Cluster::start(3, |_| ()).await;
    let put = |k: u32| {
        let fs = cluster.fs.clone();
        async move {
            let mut out = fs.create(&format!("/{k}"), options()).await.unwrap();
            out.write(format!("file {k}").as_bytes()).await.unwrap();
            out.close().await.unwrap();
        }
    };
    let all = futures_util::future::join_all((0..50).map(put));
    tokio::time::timeout(Duration::from_secs(60), all).await.unwrap();
    for k in 0..50 {
        assert_eq!(cluster.get(&format!("/{k}")).await, format!("file {k}").into_bytes());
    }
    cluster.stop().await;
}

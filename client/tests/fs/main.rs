//! The file system library against scripted peers: a namenode in a map and datanodes that fail where they are told to.

// A helper that fails is a test that fails.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod datanode;
mod namenode;
mod names;
mod pipelines;
mod reading;
mod writing;

use bytes::Bytes;
use cairn_client::fs::{ClientSettings, CreateOptions, FileSystem, Result};
use cairn_common::Env;
use cairn_common::entropy::Entropy;
use datanode::{FakeDatanode, Script};
use namenode::FakeNamenode;

const FRAME: u64 = 4 << 10;
const BLOCK: u64 = 64 << 10;

struct Cluster {
    namenode: FakeNamenode,
    nodes: Vec<FakeDatanode>,
    fs: FileSystem,
}

/// Nobody is given up for being slow: who fails says so.
fn patient() -> ClientSettings {
    ClientSettings {
        frame_bytes: FRAME,
        write_window_bytes: 8 * FRAME,
        read_ahead_bytes: 8 * FRAME,
        write_stall_ms: 60_000,
        finish_stall_ms: 60_000,
        replace_deadline_ms: 60_000,
        connect_timeout_ms: 60_000,
        read_stall_ms: 60_000,
        read_rounds: 1,
        lease_renew_ms: 50,
        ..Default::default()
    }
}

/// For nodes that stall: their silence is noticed soon.
fn watchful() -> ClientSettings {
    ClientSettings { write_stall_ms: 1_500, ..patient() }
}

impl Cluster {
    async fn start(scripts: Vec<Script>) -> Self {
        Self::start_with(scripts, patient()).await
    }

    async fn start_with(scripts: Vec<Script>, settings: ClientSettings) -> Self {
        let env = Env::system();
        let namenode = FakeNamenode::default();
        let address = namenode.start(&env).await;
        let mut nodes = Vec::new();
        for (k, script) in scripts.into_iter().enumerate() {
            let node = FakeDatanode::start(&env, &format!("dn{k}"), script).await;
            namenode.state.lock().unwrap().nodes.push(node.replica.clone());
            nodes.push(node);
        }
        let fs = FileSystem::connect(env, ClientSettings { namenode: address, ..settings }).await.unwrap();
        Self { namenode, nodes, fs }
    }

    async fn healthy(nodes: usize) -> Self {
        Self::start(vec![Script::default(); nodes]).await
    }

    async fn put(&self, path: &str, data: &[u8]) -> Result<()> {
        let mut out = self.fs.create(path, options()).await?;
        out.write(data).await?;
        out.close().await.map(drop)
    }

    async fn get(&self, path: &str) -> Result<Vec<u8>> {
        let mut input = self.fs.open(path).await?;
        let mut all = Vec::new();
        while let Some(chunk) = input.next_chunk().await? {
            all.extend_from_slice(&chunk);
        }
        Ok(all)
    }

    /// Every replica that the namenode counts is finalized, of its generation and length.
    fn check_replicas(&self, path: &str) {
        for fake in self.namenode.file(path).blocks {
            assert!(!fake.replicas.is_empty());
            for replica in &fake.replicas {
                let node = self.nodes.iter().find(|node| node.replica.node_id == replica.node_id).unwrap();
                let state = node.state.lock().unwrap();
                let stored = &state.replicas[&fake.block.id];
                assert!(stored.finalized, "{} of {}", replica.node_id, fake.block.id);
                assert_eq!(stored.generation, fake.block.generation);
                assert_eq!(Some(stored.length()), fake.length);
            }
        }
    }
}

fn options() -> CreateOptions {
    CreateOptions { block_size: BLOCK, ..Default::default() }
}

fn random(length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    Entropy::seeded(length as u64).fill(&mut bytes);
    bytes
}

fn text(length: usize) -> Vec<u8> {
    let lines = (0..).flat_map(|k: u32| format!("line {k} of a text that repeats itself\n").into_bytes());
    lines.take(length).collect()
}

fn pieces(data: &[u8], size: usize) -> impl Iterator<Item = Bytes> {
    data.chunks(size).map(Bytes::copy_from_slice)
}

//! A cluster in this process, for the tests of this folder.

use bytes::Bytes;
use cairn_client::fs::{ClientSettings, CreateOptions, FileStatus, FileSystem};
use cairn_common::Env;
use cairn_datanode::{Datanode, DatanodeSettings};
use cairn_namenode::{Namenode, NamenodeSettings};

/// A real namenode and real datanodes, two racks, in a temporary folder.
pub struct Cluster {
    pub dir: tempfile::TempDir,
    pub namenode: cairn_namenode::Running,
    pub nodes: Vec<Option<cairn_datanode::Running>>,
    pub fs: FileSystem,
}

impl Cluster {
    /// Every datanode has registered when this returns.
    pub async fn start(datanodes: usize, change: impl Fn(&mut DatanodeSettings)) -> Self {
        let env = Env::system();
        let dir = tempfile::tempdir().unwrap();
        let settings = NamenodeSettings {
            dirs: vec![dir.path().join("nn")],
            listen: "127.0.0.1:0".into(),
            ..NamenodeSettings::default()
        };
        let namenode = Namenode::start(env.clone(), settings).await.unwrap();
        let address = namenode.rpc_addr.to_string();
        let mut nodes = Vec::new();
        for k in 0..datanodes {
            let mut settings = DatanodeSettings {
                namenode: address.clone(),
                dirs: vec![dir.path().join(format!("dn{k}"))],
                listen: "127.0.0.1:0".into(),
                host: Some(format!("dn{k}")),
                rack: format!("/rack{}", k % 2),
                ..DatanodeSettings::default()
            };
            change(&mut settings);
            let node = Datanode::start(env.clone(), settings, Default::default()).await.unwrap();
            node.registered().await;
            nodes.push(Some(node));
        }
        let fs = FileSystem::connect(env, ClientSettings::at(address)).await.unwrap();
        Self { dir, namenode, nodes, fs }
    }

    pub async fn write(&self, path: &str, data: Bytes, options: CreateOptions) -> FileStatus {
        let mut out = self.fs.create(path, options).await.unwrap();
        out.write_bytes(data).await.unwrap();
        out.close().await.unwrap()
    }

    pub async fn get(&self, path: &str) -> Vec<u8> {
        let mut input = self.fs.open(path).await.unwrap();
        let mut all = Vec::new();
        while let Some(chunk) = input.next_chunk().await.unwrap() {
            all.extend_from_slice(&chunk);
        }
        all
    }

    pub async fn stop(self) {
        for node in self.nodes.into_iter().flatten() {
            node.shutdown().await;
        }
        self.namenode.shutdown().await.unwrap();
        drop(self.dir);
    }
}

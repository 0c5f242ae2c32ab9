//! A disk that stands still must not stop the owner.

use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use cairn_common::Env;
use cairn_common::durable::{DirEntry, File, Fs, Lock, Metadata, OpenMode, Space, SystemFs};
use cairn_common::net::rpc::{self, RpcOptions};
use cairn_proto::PROTOCOL_VERSION;
use cairn_proto::pb;
use cairn_proto::pb::cluster_client::ClusterClient;
use cairn_proto::pb::namenode_client::NamenodeClient;
use tokio::task::JoinSet;

use crate::{Namenode, NamenodeSettings};

/// Syncs wait while it is shut.
#[derive(Default)]
struct Gate {
    shut: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    fn set(&self, shut: bool) {
        *self.shut.lock().unwrap() = shut;
        self.opened.notify_all();
    }

    fn pass(&self) {
        drop(self.opened.wait_while(self.shut.lock().unwrap(), |shut| *shut).unwrap());
    }
}

struct GatedFs(Arc<Gate>);

struct GatedFile(Arc<dyn File>, Arc<Gate>);

impl File for GatedFile {
    fn read_at(&self, out: &mut [u8], offset: u64) -> std::io::Result<usize> {
        self.0.read_at(out, offset)
    }
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> std::io::Result<()> {
        self.0.write_all_at(bytes, offset)
    }
    fn len(&self) -> std::io::Result<u64> {
        self.0.len()
    }
    fn set_len(&self, length: u64) -> std::io::Result<()> {
        self.0.set_len(length)
    }
    fn sync_data(&self) -> std::io::Result<()> {
        self.1.pass();
        self.0.sync_data()
    }
    fn start_write_back(&self, offset: u64, length: u64) {
        self.0.start_write_back(offset, length);
    }
    fn preallocate(&self, length: u64) {
        self.0.preallocate(length);
    }
    fn as_fd(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        self.0.as_fd()
    }
}

impl Fs for GatedFs {
    fn open(&self, path: &Path, mode: OpenMode) -> std::io::Result<Arc<dyn File>> {
        Ok(Arc::new(GatedFile(SystemFs.open(path, mode)?, Arc::clone(&self.0))))
    }
    fn rename(&self, from: &Path, to: &Path) -> std::io::Result<()> {
        SystemFs.rename(from, to)
    }
    fn remove_file(&self, path: &Path) -> std::io::Result<()> {
        SystemFs.remove_file(path)
    }
    fn create_dir_all(&self, path: &Path) -> std::io::Result<()> {
        SystemFs.create_dir_all(path)
    }
    fn remove_dir_all(&self, path: &Path) -> std::io::Result<()> {
        SystemFs.remove_dir_all(path)
    }
    fn read_dir(&self, path: &Path) -> std::io::Result<Vec<DirEntry>> {
        SystemFs.read_dir(path)
    }
    fn metadata(&self, path: &Path) -> std::io::Result<Option<Metadata>> {
        SystemFs.metadata(path)
    }
    fn sync_dir(&self, path: &Path) -> std::io::Result<()> {
        SystemFs.sync_dir(path)
    }
    fn sync_volume(&self, path: &Path) -> std::io::Result<()> {
        SystemFs.sync_volume(path)
    }
    fn space(&self, path: &Path) -> std::io::Result<Space> {
        SystemFs.space(path)
    }
    fn lock(&self, path: &Path) -> std::io::Result<Option<Box<dyn Lock>>> {
        SystemFs.lock(path)
    }
    fn restrict(&self, path: &Path) -> std::io::Result<()> {
        SystemFs.restrict(path)
    }
}

fn mkdirs(path: String, call_id: u64) -> pb::MkdirsRequest {
    let call = Some(pb::CallContext { client_id: vec![3; 16].into(), call_id, ..Default::default() });
    pb::MkdirsRequest { call, path, permission: 0o755, create_parents: true }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_stands_still_stops_no_heartbeat_and_no_read() {
    let folder = tempfile::tempdir().unwrap();
    let gate = Arc::new(Gate::default());
    let env = Env { fs: Arc::new(GatedFs(Arc::clone(&gate))), ..Env::system() };
    let mut settings = NamenodeSettings {
        dirs: vec![folder.path().join("nn")],
        listen: "127.0.0.1:0".into(),
        journal_queue: 1,
        tick_ms: 20,
        ..NamenodeSettings::default()
    };
    settings.core.heartbeat_interval_ms = 50;
    settings.core.stale_interval_ms = 3_000;
    settings.core.dead_interval_ms = 6_000;
    let namenode = Namenode::start(env.clone(), settings).await.unwrap();
    let hello = pb::Hello { user: cairn_common::process::user_name(), role: "client".into(), ..Default::default() };
    let address = namenode.rpc_addr.to_string();
    let (channel, _) = rpc::channel(&env.net, &address, hello, RpcOptions::default()).await.unwrap();
    let (mut client, mut cluster) = (NamenodeClient::new(channel.clone()), ClusterClient::new(channel));
    // Apart from each other: a look at what a change touched waits for its sync.
    client.mkdirs(mkdirs("/before".into(), 1)).await.unwrap();
    client.mkdirs(mkdirs("/x".into(), 2)).await.unwrap();
    let storages = vec![pb::StorageInfo { storage_id: "s".into(), capacity: 9, remaining: 9, ..Default::default() }];
    let register = pb::RegisterRequest {
        node_id: "n".into(),
        address: "127.0.0.1:9".into(),
        protocol_version: PROTOCOL_VERSION.into(),
        storages: storages.clone(),
        ..Default::default()
    };
    let registration = cluster.register(register).await.unwrap().into_inner().registration;

    gate.set(true);
    let mut calls = JoinSet::new();
    for number in 0..200 {
        let mut client = client.clone();
        calls.spawn(async move { client.mkdirs(mkdirs(format!("/x/d{number}"), 10 + number)).await });
    }
    // Longer than the dead interval: heartbeats are answered, reads too, and nobody is called dead.
    for _ in 0..180 {
        let beat = pb::HeartbeatRequest {
            node_id: "n".into(),
            registration,
            storages: storages.clone(),
            ..Default::default()
        };
        let answer = env.clock.timeout(Duration::from_secs(10), cluster.heartbeat(beat)).await;
        answer.expect("heartbeats go on").expect("the registration holds");
        let look = pb::GetStatusRequest { path: "/before".into() };
        let status = env.clock.timeout(Duration::from_secs(10), client.get_status(look)).await;
        status.expect("reads go on").unwrap();
        env.clock.sleep(Duration::from_millis(50)).await;
    }
    assert!(calls.try_join_next().is_none(), "a change was answered before it was durable");

    gate.set(false);
    while let Some(answer) = calls.join_next().await {
        answer.unwrap().unwrap();
    }
    let list = pb::ListRequest { path: "/x".into(), ..Default::default() };
    assert_eq!(client.list(list).await.unwrap().into_inner().entries.len(), 200);
    namenode.shutdown().await.unwrap();
}

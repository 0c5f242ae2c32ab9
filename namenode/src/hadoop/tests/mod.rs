//! The methods in front of a whole namenode in this process; datanodes are told to it by hand.

mod files;
mod names;

use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;

use cairn_common::net::rpc::{self, RpcOptions};
use cairn_common::{Env, process};
use cairn_proto::pb::cluster_client::ClusterClient;
use cairn_proto::pb::report_up::Report;
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

use super::*;
use crate::core::CoreSettings;
use crate::{Namenode, NamenodeSettings, Running};

pub const BLOCK: u64 = 1 << 20;

pub struct World {
    pub env: Env,
    pub namenode: Running,
    pub door: ClientProtocol,
    pub root: String,
    next_call: AtomicI32,
    dir: TempDir,
    nodes: Vec<FakeNode>,
}

pub struct FakeNode {
    id: String,
    pool: String,
    reports: mpsc::Sender<pb::ReportUp>,
    _client: ClusterClient<Channel>,
}

impl FakeNode {
    fn storage(&self) -> String {
        format!("{}-s", self.id)
    }

    async fn report(&self, report: Report) {
        self.reports.send(pb::ReportUp { report: Some(report) }).await.unwrap();
    }

    /// Tells of a finished replica.
    async fn holds(&self, block: &wire::ExtendedBlock, length: u64) {
        let replica = pb::ReplicaReport {
            id: block.block_id as i64,
            generation: block.generation_stamp,
            length,
            state: pb::ReplicaState::Finalized as i32,
        };
        let (storage_id, pool) = (self.storage(), self.pool.clone());
        self.report(Report::Changed(pb::ReplicaChanged { storage_id, pool, replica: Some(replica), verified: false }))
            .await;
    }
}

impl World {
    pub async fn start() -> Self {
        Self::start_in(tempfile::tempdir().unwrap()).await
    }

    async fn start_in(dir: TempDir) -> Self {
        let env = Env::system();
        let settings = NamenodeSettings {
            dirs: vec![dir.path().join("nn")],
            listen: "127.0.0.1:0".into(),
            http: Some("127.0.0.1:0".into()),
            segment_step_bytes: 64 << 10,
            // The datanodes beat once.
            core: CoreSettings {
                default_block_size: BLOCK,
                stale_interval_ms: 3_600_000,
                dead_interval_ms: 3_600_000,
                ..CoreSettings::default()
            },
            ..NamenodeSettings::default()
        };
        let namenode = Namenode::start(env.clone(), settings).await.unwrap();
        let owner = namenode.owner_for_tests().clone();
        let door = ClientProtocol::new(owner, Groups::new(env.clone(), 1_000), namenode.pool_id.clone(), Vec::new());
        let (root, next_call) = (process::user_name(), AtomicI32::new(0));
        Self { env, namenode, door, root, next_call, dir, nodes: Vec::new() }
    }

    pub async fn restart(self) -> Self {
        let Self { namenode, dir, next_call, nodes, .. } = self;
        drop(nodes);
        namenode.shutdown().await.unwrap();
        let world = Self::start_in(dir).await;
        Self { next_call, ..world }
    }

    pub async fn end(self) {
        let Self { namenode, nodes, .. } = self;
        drop(nodes);
        namenode.shutdown().await.unwrap();
    }

    /// A datanode that is there, and holds nothing.
    pub async fn node_up(&mut self, id: &str, rack: &str) {
        let hello = pb::Hello { user: self.root.clone(), role: "datanode".into(), ..Default::default() };
        let addr = self.namenode.rpc_addr.to_string();
        let (channel, _) = rpc::channel(&self.env.net, &addr, hello, RpcOptions::default()).await.unwrap();
        let mut client = ClusterClient::new(channel);
        let storage = pb::StorageInfo {
            storage_id: format!("{id}-s"),
            capacity: 1 << 40,
            remaining: 1 << 39,
            ..Default::default()
        };
        let number = self.nodes.len() + 1;
        let request = pb::RegisterRequest {
            node_id: id.into(),
            host: format!("{id}.example"),
            address: format!("127.0.0.{}:9866", 100 + number),
            http_address: format!("127.0.0.{}:9864", 100 + number),
            rack: rack.into(),
            protocol_version: 1,
            storages: vec![storage.clone()],
            ..Default::default()
        };
        let registered = client.register(request).await.unwrap().into_inner();
        let (reports, queue) = mpsc::channel(16);
        let node = FakeNode { id: id.into(), pool: registered.pool_id, reports, _client: client.clone() };
        let open = pb::ReportOpen { node_id: id.into(), registration: registered.registration };
        node.report(Report::Open(open)).await;
        let range = pb::FullReportRange {
            storage_id: node.storage(),
            pool: node.pool.clone(),
            first_id: i64::MIN,
            last_id: i64::MAX,
            replicas: Vec::new(),
            last_of_storage: true,
            last_of_report: true,
        };
        node.report(Report::Range(range)).await;
        let mut credits = client.reports(ReceiverStream::new(queue)).await.unwrap().into_inner();
        // One as the stream opens, one for the range that was taken.
        while credits.message().await.unwrap().unwrap().range_credits != 1 {}
        let beat = pb::HeartbeatRequest {
            node_id: id.into(),
            registration: registered.registration,
            storages: vec![storage],
            ..Default::default()
        };
        client.heartbeat(beat).await.unwrap();
        // It must be read, or the stream ends.
        tokio::spawn(async move { while credits.message().await.is_ok_and(|message| message.is_some()) {} });
        self.nodes.push(node);
    }

    pub fn node(&self, id: &str) -> &FakeNode {
        self.nodes.iter().find(|node| node.id == id).unwrap()
    }

    pub fn call_of(&self, user: &str, method: &str) -> Call {
        let here = "127.0.0.1:9".parse().unwrap();
        let call_id = self.next_call.fetch_add(1, Ordering::Relaxed);
        let (client_id, method) = (vec![7; 16].into(), method.to_owned());
        Call { method, user: user.to_owned(), client_id, call_id, peer: here, local: here }
    }

    pub async fn send<R: prost::Message + Default>(&self, call: &Call, request: &impl prost::Message) -> Done<R> {
        let answer = self.door.call(call, request.encode_to_vec().into()).await?;
        Ok(R::decode(&*answer).unwrap())
    }

    pub async fn ask_as<R: prost::Message + Default>(
        &self,
        user: &str,
        method: &str,
        request: impl prost::Message,
    ) -> Done<R> {
        self.send(&self.call_of(user, method), &request).await
    }

    /// As the user who started the namenode.
    pub async fn ask<R: prost::Message + Default>(&self, method: &str, request: impl prost::Message) -> Done<R> {
        self.ask_as(&self.root, method, request).await
    }

    pub async fn yes(&self, method: &str, request: impl prost::Message) -> bool {
        self.ask::<wire::BoolResponse>(method, request).await.unwrap().result
    }

    pub async fn refused(&self, method: &str, request: impl prost::Message) -> (String, String) {
        let error = self.ask::<()>(method, request).await.unwrap_err();
        (error.class.into_owned(), error.message)
    }

    pub async fn info(&self, path: &str) -> Option<wire::HdfsFileStatus> {
        let request = wire::GetFileInfoRequest { src: path.into() };
        self.ask::<wire::GetFileInfoResponse>("getFileInfo", request).await.unwrap().fs
    }

    pub async fn mkdirs(&self, path: &str) {
        assert!(self.yes("mkdirs", mkdirs(path)).await);
    }

    pub async fn touch(&self, path: &str) {
        let made: wire::CreateResponse = self.ask("create", create(path)).await.unwrap();
        assert!(self.yes("complete", complete(path, made.fs.unwrap().file_id(), None)).await);
    }
}

pub fn mkdirs(path: &str) -> wire::MkdirsRequest {
    let masked = wire::FsPermission { perm: 0o755 };
    wire::MkdirsRequest { src: path.into(), masked, create_parent: true, unmasked: None }
}

pub fn create(path: &str) -> wire::CreateRequest {
    wire::CreateRequest {
        src: path.into(),
        masked: wire::FsPermission { perm: 0o644 },
        client_name: "writer".into(),
        create_flag: wire::CreateFlag::Create as u32,
        create_parent: true,
        replication: 2,
        block_size: BLOCK,
        ..Default::default()
    }
}

pub fn complete(path: &str, file_id: u64, last: Option<wire::ExtendedBlock>) -> wire::CompleteRequest {
    wire::CompleteRequest { src: path.into(), client_name: "writer".into(), last, file_id: Some(file_id) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_rpc_port_speaks_hadoop_too() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let world = World::start().await;
    world.mkdirs("/d").await;
    let addr = world.namenode.rpc_addr.to_string();
    let mut conn = world.env.net.connect(&addr, Duration::from_secs(5)).await.unwrap();
    let header = |call_id| wire::RpcRequestHeader {
        rpc_kind: Some(2),
        rpc_op: Some(0),
        call_id,
        client_id: vec![1; 16].into(),
        retry_count: Some(0),
    };
    let frame = |parts: Vec<Vec<u8>>| {
        let body = parts.concat();
        [&(body.len() as u32).to_be_bytes()[..], &body].concat()
    };
    let info = wire::UserInformation { effective_user: Some("ann".into()), real_user: None };
    let context = wire::IpcConnectionContext { user_info: Some(info), protocol: Some(NAME.into()) };
    let request = wire::RequestHeader {
        method_name: "getFileInfo".into(),
        protocol_name: NAME.into(),
        client_protocol_version: 1,
    };
    let path = wire::GetFileInfoRequest { src: "/d".into() };
    let bytes = [
        b"hrpc\x09\x00\x00".to_vec(),
        frame(vec![header(-3).encode_length_delimited_to_vec(), context.encode_length_delimited_to_vec()]),
        frame(vec![
            header(5).encode_length_delimited_to_vec(),
            request.encode_length_delimited_to_vec(),
            path.encode_length_delimited_to_vec(),
        ]),
    ];
    conn.write_all(&bytes.concat()).await.unwrap();
    let mut reply = vec![0; conn.read_u32().await.unwrap() as usize];
    conn.read_exact(&mut reply).await.unwrap();
    let mut reply = Bytes::from(reply);
    assert_eq!(wire::RpcResponseHeader::decode_length_delimited(&mut reply).unwrap().call_id, 5);
    let found = wire::GetFileInfoResponse::decode_length_delimited(&mut reply).unwrap().fs.unwrap();
    assert_eq!((found.owner, found.children_num), (process::user_name(), Some(0)));
    // The connection is closed with the namenode, not after it.
    world.end().await;
    assert_eq!(conn.read(&mut [0; 8]).await.unwrap_or(0), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_method_fails_on_an_empty_or_broken_request_but_with_an_exception() {
    let world = World::start().await;
    for method in METHODS {
        for request in [&b""[..], b"\xff\xff\xff", b"\x0a\x00\x10\x01"] {
            let call = world.call_of("ann", method);
            if let Err(error) = world.door.call(&call, Bytes::from_static(request)).await {
                assert!(error.class.contains('.') && !error.message.is_empty(), "{method}: {error:?}");
                assert!(!error.class.contains("RpcNoSuchMethod"), "{method}");
            }
        }
    }
    let (class, message) = world.refused("getBatchedListing", ()).await;
    assert_eq!(class, "org.apache.hadoop.ipc.RpcNoSuchMethodException");
    assert_eq!(message, format!("Unknown method getBatchedListing called on {NAME} protocol."));
    world.end().await;
}

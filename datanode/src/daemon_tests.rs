//! A whole datanode against a scripted namenode.

use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use cairn_common::Env;
use cairn_common::kv::MemoryKv;
use cairn_common::net::opening::{Opening, ServerIdentity, read_opening};
use cairn_common::net::rpc::RpcConn;
use cairn_proto::ids::{BlockId, Generation};
use cairn_proto::pb::cluster_server::{Cluster, ClusterServer};
use cairn_proto::pb::{self, datanode_command::Command, report_up::Report};
use cairn_proto::{Error, ErrorCode};
use tokio::sync::{Mutex, mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::testing::*;
use crate::{Datanode, DatanodeSettings, Extras, Running};

const BLOCK: BlockId = BlockId(1_073_741_825);

/// What the scripted namenode saw, in order.
#[derive(Debug)]
enum Seen {
    Registered(pb::RegisterRequest),
    Report(Report),
}

struct Script {
    seen: mpsc::Sender<Seen>,
    orders: Mutex<Vec<pb::DatanodeCommand>>,
    cluster: &'static str,
    /// Heartbeats of registrations below this are refused.
    least: watch::Receiver<u64>,
    registrations: Mutex<u64>,
}

#[tonic::async_trait]
impl Cluster for Script {
    async fn register(&self, request: Request<pb::RegisterRequest>) -> Result<Response<pb::RegisterResponse>, Status> {
        let request = request.into_inner();
        if !request.cluster_id.is_empty() && request.cluster_id != self.cluster {
            return Err(Error::new(ErrorCode::WrongCluster, "another cluster").into());
        }
        self.seen.send(Seen::Registered(request)).await.unwrap();
        let mut registrations = self.registrations.lock().await;
        *registrations += 1;
        Ok(Response::new(pb::RegisterResponse {
            cluster_id: self.cluster.into(),
            pool_id: POOL.into(),
            epoch: 3,
            registration: *registrations,
            heartbeat_interval_ms: 50,
            ..Default::default()
        }))
    }

    async fn heartbeat(
        &self,
        request: Request<pb::HeartbeatRequest>,
    ) -> Result<Response<pb::HeartbeatResponse>, Status> {
        if request.into_inner().registration < *self.least.borrow() {
            return Err(Error::new(ErrorCode::NotRegistered, "register again").into());
        }
        let commands = std::mem::take(&mut *self.orders.lock().await);
        Ok(Response::new(pb::HeartbeatResponse { commands, epoch: 3 }))
    }

    type ReportsStream = Pin<Box<dyn futures_util::Stream<Item = Result<pb::ReportDown, Status>> + Send>>;

    async fn reports(
        &self,
        request: Request<Streaming<pb::ReportUp>>,
    ) -> Result<Response<Self::ReportsStream>, Status> {
        let mut up = request.into_inner();
        let (down, stream) = mpsc::channel(8);
        down.send(Ok(pb::ReportDown { range_credits: 1 })).await.unwrap();
        let seen = self.seen.clone();
        tokio::spawn(async move {
            while let Ok(Some(message)) = up.message().await {
                let report = message.report.unwrap();
                if matches!(report, Report::Range(_)) {
                    let _ = down.send(Ok(pb::ReportDown { range_credits: 1 })).await;
                }
                if seen.send(Seen::Report(report)).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

struct Namenode {
    addr: String,
    script: Arc<Script>,
    seen: mpsc::Receiver<Seen>,
    least: watch::Sender<u64>,
}

impl Namenode {
    async fn start(cluster: &'static str) -> Self {
        Self::start_at("127.0.0.1:0", cluster).await
    }

    async fn start_at(addr: &str, cluster: &'static str) -> Self {
        let env = Env::system();
        let listener = env.net.bind(addr).await.unwrap();
        let addr = listener.local_addr().to_string();
        let (seen, seen_here) = mpsc::channel(1_000);
        let (least, least_there) = watch::channel(0);
        let script = Arc::new(Script {
            seen,
            orders: Mutex::default(),
            cluster,
            least: least_there,
            registrations: Mutex::default(),
        });
        let (conns, incoming) = mpsc::channel::<std::io::Result<RpcConn>>(8);
        tokio::spawn(async move {
            while let Ok(conn) = listener.accept().await {
                let identity = ServerIdentity { cluster_id: cluster.into(), epoch: 3 };
                if let Ok(Opening::Rpc { conn, peer }) = read_opening(conn, &identity, &env.clock).await {
                    let _ = conns.send(Ok(RpcConn::new(conn, peer))).await;
                }
            }
        });
        let server = tonic::transport::Server::builder().add_service(ClusterServer::from_arc(Arc::clone(&script)));
        tokio::spawn(server.serve_with_incoming(ReceiverStream::new(incoming)));
        Self { addr, script, seen: seen_here, least }
    }

    async fn next(&mut self) -> Seen {
        tokio::time::timeout(Duration::from_secs(20), self.seen.recv()).await.unwrap().unwrap()
    }

    async fn registered(&mut self) -> pb::RegisterRequest {
        loop {
            if let Seen::Registered(request) = self.next().await {
                return request;
            }
        }
    }

    async fn report(&mut self) -> Report {
        loop {
            if let Seen::Report(report) = self.next().await {
                return report;
            }
        }
    }

    async fn order(&self, command: Command) {
        self.script.orders.lock().await.push(pb::DatanodeCommand { command: Some(command) });
    }
}

fn node_settings(dir: &Path, namenode: &str) -> DatanodeSettings {
    DatanodeSettings {
        namenode: namenode.into(),
        http: Some("127.0.0.1:0".into()),
        rack: "/r1".into(),
        host: Some("dn1".into()),
        ..settings(&[dir])
    }
}

async fn start(settings: DatanodeSettings) -> Result<Running, Error> {
    let extras = Extras { outcomes: Some(Arc::new(MemoryKv::default())), ..Extras::default() };
    Datanode::start(Env::system(), settings, extras).await
}

/// As [`start`], over a folder that something of this process had open until just now: what it had under way may hold the lock for a moment.
async fn start_again(settings: DatanodeSettings) -> Running {
    let clock = Env::system().clock;
    let limit_ms = clock.mono_ms() + 30_000;
    loop {
        match start(settings.clone()).await {
            Err(error) if error.code() == ErrorCode::AlreadyBeingCreated && clock.mono_ms() < limit_ms => {
                clock.sleep(Duration::from_millis(1)).await;
            }
            started => return started.unwrap(),
        }
    }
}

async fn write(addr: &str, block: BlockId, data: &[u8]) {
    let request = pb::WriteBlock {
        block: block_of(block, GEN),
        block_size: 1 << 20,
        client_name: "test".into(),
        ..Default::default()
    };
    let mut pipe = Pipe::open(addr, request).await.unwrap();
    pipe.send(&frames(block, data, 0, 1_000, false)).await;
    pipe.mark(cairn_proto::dataplane::MarkerKind::Finish, data.len()).await;
    assert_eq!(pipe.wait_for(pb::AckKind::AckFinished).await.kind(), pb::AckKind::AckFinished);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_advertised_address_is_the_one_that_is_registered() {
    let dir = tempfile::tempdir().unwrap();
    let mut namenode = Namenode::start("cluster-1").await;
    let advertise = Some("gateway:9866".to_owned());
    let node = start(DatanodeSettings { advertise, ..node_settings(dir.path(), &namenode.addr) }).await.unwrap();
    assert_eq!(namenode.registered().await.address, "gateway:9866");
    assert_ne!(node.addr, "gateway:9866");
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn registers_reports_before_the_ack_and_carries_out_orders() {
    let dir = tempfile::tempdir().unwrap();
    let mut namenode = Namenode::start("cluster-1").await;
    let node = start(node_settings(dir.path(), &namenode.addr)).await.unwrap();
    let request = namenode.registered().await;
    assert_eq!(
        (request.host.as_str(), request.rack.as_str(), request.address.as_str()),
        ("dn1", "/r1", &node.addr[..])
    );
    assert_eq!((request.cluster_id.as_str(), request.storages.len()), ("", 1));
    let Report::Open(open) = namenode.report().await else { panic!() };
    assert_eq!((open.registration, &open.node_id), (1, &node.node_id));
    let Report::Range(range) = namenode.report().await else { panic!() };
    assert!(range.replicas.is_empty() && range.last_of_report);

    write(&node.addr, BLOCK, &random(5_000, 1)).await;
    // The ack is here: the report must have left before.
    let Report::Changed(changed) = namenode.report().await else { panic!() };
    let replica = changed.replica.unwrap();
    assert_eq!((replica.id, replica.length, replica.state()), (BLOCK.0, 5_000, pb::ReplicaState::Finalized));

    let replicas = vec![pb::ReplicaRef { block: block_of(BLOCK, GEN), storage_id: changed.storage_id }];
    namenode.order(Command::Verify(pb::VerifyReplicas { replicas: replicas.clone() })).await;
    let Report::Changed(_) = namenode.report().await else { panic!() };
    namenode.order(Command::FullReport(pb::SendFullReport {})).await;
    let Report::Range(range) = namenode.report().await else { panic!() };
    assert_eq!(range.replicas.len(), 1);
    // An order for an older one is refused, and answered with what is here.
    let mut older = replicas.clone();
    older[0].block = block_of(BLOCK, Generation(GEN.0 - 1));
    namenode.order(Command::Delete(pb::DeleteReplicas { replicas: older })).await;
    let Report::Changed(kept) = namenode.report().await else { panic!() };
    assert_eq!(kept.replica.unwrap().generation, GEN.0);
    namenode.order(Command::Delete(pb::DeleteReplicas { replicas })).await;
    let Report::Removed(removed) = namenode.report().await else { panic!() };
    assert_eq!(removed.id, BLOCK.0);

    let http = node.http_addr.clone().unwrap();
    let mut conn = Env::system().net.connect(&http, Duration::from_secs(5)).await.unwrap();
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    conn.write_all(format!("GET /metrics HTTP/1.1\r\nHost: {http}\r\nConnection: close\r\n\r\n").as_bytes())
        .await
        .unwrap();
    let mut answer = String::new();
    conn.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("cairn_datanode_writes_total 1"), "{answer}");
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn registers_again_and_tells_all_when_it_is_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    let mut namenode = Namenode::start("cluster-1").await;
    let node = start(node_settings(dir.path(), &namenode.addr)).await.unwrap();
    namenode.registered().await;
    // All of the first stream is here before the second begins.
    while !matches!(namenode.report().await, Report::Range(_)) {}
    write(&node.addr, BLOCK, &random(5_000, 1)).await;
    let Report::Changed(_) = namenode.report().await else { panic!() };
    namenode.least.send_replace(2);
    let again = namenode.registered().await;
    assert_eq!((again.cluster_id.as_str(), again.epoch), ("cluster-1", 3));
    let Report::Open(open) = namenode.report().await else { panic!() };
    assert_eq!(open.registration, 2);
    let Report::Range(range) = namenode.report().await else { panic!() };
    assert_eq!(range.replicas.len(), 1);
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waits_for_a_namenode_that_is_not_there_yet() {
    let dir = tempfile::tempdir().unwrap();
    // Bound, but it does not listen: nobody else gets the port meanwhile.
    let held = tokio::net::TcpSocket::new_v4().unwrap();
    held.set_reuseaddr(true).unwrap();
    held.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let addr = held.local_addr().unwrap().to_string();
    let node = start(node_settings(dir.path(), &addr)).await.unwrap();
    let mut namenode = Namenode::start_at(&addr, "cluster-1").await;
    namenode.registered().await;
    tokio::time::timeout(Duration::from_secs(60), node.registered()).await.unwrap();
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_folder_of_another_cluster_ends_the_daemon_with_both_names() {
    let dir = tempfile::tempdir().unwrap();
    drop(open_store(&settings(&[dir.path()])).await);
    let namenode = Namenode::start("cluster-2").await;
    let node = start_again(node_settings(dir.path(), &namenode.addr)).await;
    let error = tokio::time::timeout(Duration::from_secs(60), node.failed()).await.unwrap();
    assert_eq!(error.code(), ErrorCode::WrongCluster);
    assert!(error.message().contains("cluster-1") && error.message().contains("cluster-2"), "{error}");
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_port_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let other = Env::system().net.bind("127.0.0.1:0").await.unwrap();
    let addr = other.local_addr().to_string();
    tokio::spawn(async move {
        use tokio::io::AsyncWriteExt;
        while let Ok(mut conn) = other.accept().await {
            let _ = conn.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
            let _ = conn.shutdown().await;
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    });
    let node = start(node_settings(dir.path(), &addr)).await.unwrap();
    let error = tokio::time::timeout(Duration::from_secs(60), node.failed()).await.unwrap();
    assert!(error.message().contains(&addr), "{error}");
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shutdown_tells_writers_and_keeps_what_they_wrote() {
    let dir = tempfile::tempdir().unwrap();
    let mut namenode = Namenode::start("cluster-1").await;
    let configured = node_settings(dir.path(), &namenode.addr);
    let node = start(configured.clone()).await.unwrap();
    namenode.registered().await;
    let busy = start(configured.clone()).await.err().unwrap();
    assert!(busy.message().contains("in use"), "{busy}");
    let data = random(3_000, 1);
    let request = pb::WriteBlock { block: block_of(BLOCK, GEN), block_size: 1 << 20, ..Default::default() };
    let mut pipe = Pipe::open(&node.addr, request).await.unwrap();
    pipe.send(&frames(BLOCK, &data, 0, 1_000, false)).await;
    pipe.wait_held(3_000).await;
    let watcher = tokio::spawn(async move {
        let ack = pipe.wait_for(pb::AckKind::AckError).await;
        Error::from_wire(ack.error.unwrap())
    });
    node.shutdown().await;
    assert!(watcher.await.unwrap().message().contains("shutting down"));
    let node = start_again(configured).await;
    tokio::time::timeout(Duration::from_secs(60), node.registered()).await.unwrap();
    assert!(read_range(&node.addr, BLOCK, Generation(1_001), 0, 3_000).await.unwrap() == data);
    node.shutdown().await;
}

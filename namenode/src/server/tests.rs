//! A whole namenode in this process, on real files and sockets.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use cairn_common::Env;
use cairn_common::durable::{Fs, OpenMode, SystemFs};
use cairn_common::net::rpc::{self, RpcOptions};
use cairn_common::simdisk::{Fault, FaultOp, SimDisk};
use cairn_proto::pb::namenode_client::NamenodeClient;
use cairn_proto::{Error, ErrorCode, pb};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::transport::Channel;

use crate::{Namenode, NamenodeSettings, Running};

fn settings(dirs: &[PathBuf]) -> NamenodeSettings {
    NamenodeSettings {
        dirs: dirs.to_vec(),
        listen: "127.0.0.1:0".into(),
        segment_step_bytes: 64 << 10,
        ..NamenodeSettings::default()
    }
}

async fn start(env: &Env, dirs: &[PathBuf]) -> Running {
    Namenode::start(env.clone(), settings(dirs)).await.unwrap()
}

async fn connect_as(env: &Env, namenode: &Running, user: &str) -> NamenodeClient<Channel> {
    let hello = pb::Hello { user: user.into(), role: "client".into(), ..Default::default() };
    let addr = namenode.rpc_addr.to_string();
    let (channel, reply) = rpc::channel(&env.net, &addr, hello, RpcOptions::default()).await.unwrap();
    assert_eq!(reply.cluster_id, namenode.cluster_id);
    NamenodeClient::new(channel)
}

async fn connect(env: &Env, namenode: &Running) -> NamenodeClient<Channel> {
    connect_as(env, namenode, &cairn_common::process::user_name()).await
}

async fn mkdir(client: &mut NamenodeClient<Channel>, path: &str) -> Result<(), Error> {
    let request =
        pb::MkdirsRequest { path: path.into(), permission: 0o755, create_parents: true, ..Default::default() };
    client.mkdirs(request).await.map(|_| ()).map_err(rpc::error)
}

/// Makes an empty, closed file.
async fn touch(client: &mut NamenodeClient<Channel>, path: &str) -> Result<(), Error> {
    let request = pb::CreateRequest {
        path: path.into(),
        permission: 0o644,
        create_parents: true,
        client_name: "test".into(),
        ..Default::default()
    };
    let status = client.create(request).await.map_err(rpc::error)?.into_inner().status.unwrap();
    let request = pb::CompleteRequest { inode: status.inode, client_name: "test".into(), ..Default::default() };
    client.complete(request).await.map(|_| ()).map_err(rpc::error)
}

/// Everything below the root, with what must survive.
async fn tree(client: &mut NamenodeClient<Channel>) -> Vec<(String, u64, i32, String, u32, u64)> {
    let (mut found, mut folders) = (Vec::new(), vec!["/".to_owned()]);
    while let Some(folder) = folders.pop() {
        let request = pb::ListRequest { path: folder, ..Default::default() };
        for entry in client.list(request).await.map_err(rpc::error).unwrap().into_inner().entries {
            if entry.kind() == pb::FileKind::Directory {
                folders.push(entry.path.clone());
            }
            found.push((entry.path, entry.inode, entry.kind, entry.owner, entry.permission, entry.modified_ms));
        }
    }
    found.sort();
    found
}

async fn checkpoint(client: &mut NamenodeClient<Channel>) -> pb::CheckpointResponse {
    client.checkpoint(pb::CheckpointRequest {}).await.map_err(rpc::error).unwrap().into_inner()
}

async fn last_txid(client: &mut NamenodeClient<Channel>) -> u64 {
    client.cluster_report(pb::ClusterReportRequest {}).await.unwrap().into_inner().last_txid
}

/// As a crash sees a file: from the end to the beginning, so that a page is never newer than the one before it.
fn copy_backwards(from: &Path, to: &Path) {
    let source = SystemFs.open(from, OpenMode::Read).unwrap();
    let target = SystemFs.open(to, OpenMode::Create).unwrap();
    let length = source.len().unwrap();
    let mut at = length.div_ceil(4_096) * 4_096;
    while at > 0 {
        at -= 4_096;
        let mut page = vec![0; (length - at).min(4_096) as usize];
        source.read_exact_at(&mut page, at).unwrap();
        target.write_all_at(&page, at).unwrap();
    }
}

fn copy_tree(from: &Path, to: &Path) {
    SystemFs.create_dir_all(to).unwrap();
    for entry in SystemFs.read_dir(from).unwrap() {
        let (from, to) = (from.join(&entry.name), to.join(&entry.name));
        if entry.is_dir { copy_tree(&from, &to) } else { copy_backwards(&from, &to) }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn survives_restarts_from_log_and_from_image() {
    let dir = tempfile::tempdir().unwrap();
    let dirs = [dir.path().join("nn")];
    let env = Env::system();
    let namenode = start(&env, &dirs).await;
    let cluster_id = namenode.cluster_id.clone();
    let mut client = connect(&env, &namenode).await;
    mkdir(&mut client, "/logs/2026").await.unwrap();
    for number in 0..50 {
        touch(&mut client, &format!("/logs/2026/part-{number:03}")).await.unwrap();
    }
    let before = tree(&mut client).await;
    assert_eq!(before.len(), 52);
    namenode.shutdown().await.unwrap();

    let namenode = start(&env, &dirs).await;
    assert_eq!(namenode.cluster_id, cluster_id);
    let mut client = connect(&env, &namenode).await;
    assert_eq!(tree(&mut client).await, before, "from the log alone");
    let image = checkpoint(&mut client).await;
    assert!(image.txid > 0 && image.bytes > 0);
    touch(&mut client, "/logs/after").await.unwrap();
    let after = tree(&mut client).await;
    let txid = last_txid(&mut client).await;
    namenode.shutdown().await.unwrap();

    let namenode = start(&env, &dirs).await;
    let mut client = connect(&env, &namenode).await;
    assert_eq!(tree(&mut client).await, after, "from image and log");
    assert_eq!(last_txid(&mut client).await, txid);
    // Two images later the log before the older one is gone, and the state is the same.
    checkpoint(&mut client).await;
    touch(&mut client, "/logs/again").await.unwrap();
    let second = checkpoint(&mut client).await;
    let after = tree(&mut client).await;
    namenode.shutdown().await.unwrap();
    let segments = crate::journal::list_segments(&SystemFs, &dirs[0].join("log")).unwrap();
    assert!(segments[0].first.0 > 1, "old log goes: {segments:?}");
    let newest = dirs[0].join("image").join(crate::image::format::image_name(cairn_proto::ids::TxId(second.txid)));

    // A damaged newest image: the one before it and a longer replay.
    let file = SystemFs.open(&newest, OpenMode::Write).unwrap();
    file.write_all_at(b"xxxx", file.len().unwrap() / 2).unwrap();
    let namenode = start(&env, &dirs).await;
    let mut client = connect(&env, &namenode).await;
    assert_eq!(tree(&mut client).await, after, "from the older image");
    namenode.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_of_the_running_directory_knows_all_that_was_answered() {
    let dir = tempfile::tempdir().unwrap();
    let env = Env::system();
    let namenode = start(&env, &[dir.path().join("nn")]).await;
    let client = connect(&env, &namenode).await;
    let (answered, mut told) = tokio::sync::mpsc::channel(1_000);
    let writers: Vec<_> = (0..4)
        .map(|writer| {
            let (mut client, answered) = (client.clone(), answered.clone());
            tokio::spawn(async move {
                for number in 0.. {
                    let path = format!("/w{writer}/f{number:05}");
                    if touch(&mut client, &path).await.is_err() || answered.send(path).await.is_err() {
                        break;
                    }
                }
            })
        })
        .collect();
    let mut known = Vec::new();
    for round in 0..4 {
        while known.len() < (round + 1) * 40 {
            known.push(told.recv().await.unwrap());
        }
        if round == 2 {
            checkpoint(&mut client.clone()).await;
        }
        let copy = dir.path().join(format!("copy{round}"));
        copy_tree(&dir.path().join("nn"), &copy);
        let from_copy = start(&env, &[copy]).await;
        let mut client = connect(&env, &from_copy).await;
        let found = tree(&mut client).await;
        for path in &known {
            assert!(found.iter().any(|entry| entry.0 == *path), "{path} was answered and is lost (round {round})");
        }
        from_copy.shutdown().await.unwrap();
    }
    drop(told);
    for writer in writers {
        writer.await.unwrap();
    }
    namenode.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_starts_are_one_clear_line() {
    let dir = tempfile::tempdir().unwrap();
    let dirs = [dir.path().join("nn")];
    let env = Env::system();
    let namenode = start(&env, &dirs).await;
    let refused = |settings: NamenodeSettings| {
        let env = env.clone();
        async move {
            match Namenode::start(env, settings).await {
                Ok(_) => panic!("it started"),
                Err(error) => {
                    assert!(!error.message().contains('\n'), "{error}");
                    error
                }
            }
        }
    };
    let error = refused(settings(&dirs)).await;
    assert!(error.message().contains("in use by"), "{error}");
    let taken = NamenodeSettings { listen: namenode.rpc_addr.to_string(), ..settings(&[dir.path().join("other")]) };
    assert!(refused(taken).await.message().contains("another process has this port"));
    assert!(SystemFs.metadata(&dir.path().join("other")).unwrap().is_none(), "nothing half-made is left");
    let open = NamenodeSettings { listen: "0.0.0.0:0".into(), ..settings(&dirs) };
    assert!(refused(open).await.message().contains("--insecure"));
    namenode.shutdown().await.unwrap();

    let segment = dirs[0].join("log").join(crate::journal::format::segment_name(cairn_proto::ids::TxId(1)));
    let file = SystemFs.open(&segment, OpenMode::Write).unwrap();
    file.write_all_at(b"?", 150).unwrap();
    let error = refused(settings(&dirs)).await;
    assert_eq!(error.code(), ErrorCode::Corrupt);
    assert!(error.message().contains(segment.to_str().unwrap()) && error.message().contains("offset"), "{error}");
    SystemFs.remove_dir_all(&dirs[0].join("log")).unwrap();
    SystemFs.create_dir_all(&dirs[0].join("log")).unwrap();
    let error = refused(settings(&dirs)).await;
    assert!(error.message().contains("no segment of the edit log"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_the_superuser_checkpoints() {
    let dir = tempfile::tempdir().unwrap();
    let env = Env::system();
    let namenode = start(&env, &[dir.path().join("nn")]).await;
    let mut client = connect_as(&env, &namenode, "nobody-of-note").await;
    let error = client.checkpoint(pb::CheckpointRequest {}).await.map_err(rpc::error).unwrap_err();
    assert_eq!(error.code(), ErrorCode::PermissionDenied);
    namenode.shutdown().await.unwrap();
}

async fn say(namenode: &Running, env: &Env, words: &[u8]) -> Vec<u8> {
    let mut conn = env.net.connect(&namenode.rpc_addr.to_string(), Duration::from_secs(5)).await.unwrap();
    conn.write_all(words).await.unwrap();
    let mut answer = Vec::new();
    conn.read_to_end(&mut answer).await.unwrap();
    answer
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_at_the_rpc_port_are_told_so() {
    let dir = tempfile::tempdir().unwrap();
    let env = Env::system();
    let mut with_http = settings(&[dir.path().join("nn")]);
    with_http.http = Some("127.0.0.1:0".into());
    let namenode = Namenode::start(env.clone(), with_http).await.unwrap();
    let refusal = say(&namenode, &env, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert!(refusal.starts_with(b"HTTP/1.1 404"));
    let refusal = say(&namenode, &env, b"hrpc\x04\x50").await;
    assert!(refusal.ends_with(b"Server IPC version 9 cannot communicate with client version 4"));
    assert_eq!(say(&namenode, &env, b"garbage!").await, b"");

    let http = namenode.http_addr.unwrap().to_string();
    let get = |path: &'static str, extra: &'static str| {
        let (env, http) = (env.clone(), http.clone());
        async move {
            let mut conn = env.net.connect(&http, Duration::from_secs(5)).await.unwrap();
            let request = format!("GET {path} HTTP/1.1\r\nHost: {http}\r\nConnection: close\r\n{extra}\r\n");
            conn.write_all(request.as_bytes()).await.unwrap();
            let mut answer = String::new();
            conn.read_to_string(&mut answer).await.unwrap();
            answer
        }
    };
    assert!(get("/health", "").await.contains("200 OK"));
    assert!(get("/", "").await.contains(&namenode.cluster_id));
    let metrics = get("/metrics", "").await;
    assert!(metrics.contains("cairn_last_txid ") && metrics.contains("cairn_log_sync_seconds_count"), "{metrics}");
    assert!(get("/", "Origin: http://evil.example\r\n").await.contains("403"));
    assert!(get("/nothing", "").await.contains("404"));
    namenode.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_directory_costs_nothing_and_both_lost_end_the_namenode() {
    let disk = SimDisk::new(1 << 30, cairn_common::entropy::Entropy::seeded(1));
    let mut env = Env::system();
    env.fs = Arc::new(disk.clone());
    let dirs = [PathBuf::from("/disk1/nn"), PathBuf::from("/disk2/nn")];
    let namenode = start(&env, &dirs).await;
    let mut client = connect(&env, &namenode).await;
    mkdir(&mut client, "/a").await.unwrap();
    let gone = |disk: &SimDisk, path: &str| {
        disk.inject(Fault {
            op: FaultOp::Sync,
            path: path.into(),
            after: 0,
            times: u64::MAX,
            kind: std::io::ErrorKind::Other,
        });
    };
    gone(&disk, "/disk2/");
    mkdir(&mut client, "/b").await.unwrap();
    let before = tree(&mut client).await;
    // Whoever connects or reports from now on learns the new epoch.
    let hello = pb::Hello { user: "x".into(), role: "client".into(), ..Default::default() };
    let addr = namenode.rpc_addr.to_string();
    let (_, reply) = rpc::channel(&env.net, &addr, hello, RpcOptions::default()).await.unwrap();
    let report = client.cluster_report(pb::ClusterReportRequest {}).await.unwrap().into_inner();
    assert_eq!((reply.epoch, report.epoch), (2, 2));
    gone(&disk, "/disk1/");
    let failed = namenode.failed();
    assert!(mkdir(&mut client, "/c").await.is_err(), "not answered as done");
    assert!(failed.await.message().contains("no metadata directory is left"));
    assert!(namenode.shutdown().await.is_err());

    disk.clear_faults();
    let stale = Namenode::start(env.clone(), settings(&dirs[1..])).await.err().unwrap();
    assert!(stale.message().contains("may be behind it"), "{stale}");
    let namenode = start(&env, &dirs).await;
    let mut client = connect(&env, &namenode).await;
    let after = tree(&mut client).await;
    assert!(before.iter().all(|entry| after.contains(entry)));
    namenode.shutdown().await.unwrap();
    // The directory that was behind has been filled again.
    let one = NamenodeSettings { accept_missing_dir: true, ..settings(&dirs[1..]) };
    let namenode = Namenode::start(env.clone(), one).await.unwrap();
    let mut client = connect(&env, &namenode).await;
    assert_eq!(tree(&mut client).await, after);
    namenode.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_datanode_registers_beats_and_reports() {
    use cairn_proto::pb::cluster_client::ClusterClient;
    use cairn_proto::pb::report_up::Report;
    let dir = tempfile::tempdir().unwrap();
    let env = Env::system();
    let namenode = start(&env, &[dir.path().join("nn")]).await;
    let hello = pb::Hello { user: "dn".into(), role: "datanode".into(), ..Default::default() };
    let (channel, _) =
        rpc::channel(&env.net, &namenode.rpc_addr.to_string(), hello, RpcOptions::default()).await.unwrap();
    let mut cluster = ClusterClient::new(channel);
    let storage =
        pb::StorageInfo { storage_id: "s1".into(), capacity: 1 << 40, remaining: 1 << 40, ..Default::default() };
    let register = pb::RegisterRequest {
        node_id: "n1".into(),
        host: "dn1".into(),
        address: "127.0.0.1:9999".into(),
        rack: "/rack1".into(),
        protocol_version: cairn_proto::PROTOCOL_VERSION.into(),
        storages: vec![storage.clone()],
        ..Default::default()
    };
    let answer = cluster.register(register).await.map_err(rpc::error).unwrap().into_inner();
    assert_eq!(answer.cluster_id, namenode.cluster_id);
    assert_eq!(answer.pool_id, namenode.pool_id);
    let beat = pb::HeartbeatRequest {
        node_id: "n1".into(),
        registration: answer.registration,
        storages: vec![storage],
        ..Default::default()
    };
    cluster.heartbeat(beat).await.map_err(rpc::error).unwrap();

    let (up, messages) = tokio::sync::mpsc::channel(4);
    let open = pb::ReportOpen { node_id: "n1".into(), registration: answer.registration };
    up.send(pb::ReportUp { report: Some(Report::Open(open)) }).await.unwrap();
    let messages = tokio_stream::wrappers::ReceiverStream::new(messages);
    let mut down = cluster.reports(messages).await.map_err(rpc::error).unwrap().into_inner();
    let credits = down.message().await.map_err(rpc::error).unwrap().unwrap();
    assert!(credits.range_credits > 0);

    // An old registration is told to register anew.
    let (up2, messages) = tokio::sync::mpsc::channel(4);
    let open = pb::ReportOpen { node_id: "n1".into(), registration: 1 };
    up2.send(pb::ReportUp { report: Some(Report::Open(open)) }).await.unwrap();
    let messages = tokio_stream::wrappers::ReceiverStream::new(messages);
    let mut refused = cluster.reports(messages).await.unwrap().into_inner();
    let error = refused.message().await.map_err(rpc::error).unwrap_err();
    assert_eq!(error.code(), ErrorCode::NotRegistered);

    // An open stream does not hold up the end.
    namenode.shutdown().await.unwrap();
    assert!(!matches!(down.message().await, Ok(Some(_))));
}

/// Calls a second over gRPC from 16 clients; `cargo test --release -p cairn-namenode speed_over_grpc -- --ignored --nocapture`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
async fn speed_over_grpc() {
    let dir = tempfile::tempdir().unwrap();
    let env = Env::system();
    let namenode = start(&env, &[dir.path().join("nn")]).await;
    for (what, each) in [("create+close", 500), ("stat", 2_000)] {
        let start_us = env.clock.mono_us();
        let mut clients = Vec::new();
        for number in 0..16 {
            let mut client = connect(&env, &namenode).await;
            clients.push(tokio::spawn(async move {
                for call in 0..each {
                    if what == "stat" {
                        let path = format!("/speed/{number}/{}", call % 500);
                        client.get_status(pb::GetStatusRequest { path }).await.unwrap();
                    } else {
                        touch(&mut client, &format!("/speed/{number}/{call}")).await.unwrap();
                    }
                }
            }));
        }
        for client in clients {
            client.await.unwrap();
        }
        let took = (env.clock.mono_us() - start_us) as f64 / 1e6;
        println!("{what}: {:.0} a second", f64::from(16 * each) / took);
    }
    namenode.shutdown().await.unwrap();
}

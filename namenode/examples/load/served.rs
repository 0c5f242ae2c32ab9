//! A real `cairn namenode` on a generated directory, with six simulated datanodes and sixteen clients.

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use cairn_common::Env;
use cairn_common::net::rpc::{self, RpcOptions};
use cairn_proto::PROTOCOL_VERSION;
use cairn_proto::pb::cluster_client::ClusterClient;
use cairn_proto::pb::namenode_client::NamenodeClient;
use cairn_proto::pb::{self, report_up::Report};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

use crate::alone::{random, ranges, registration, storages};
use crate::make::{self, NODES};
use crate::row;
use cairn_namenode::core::grouped;

const CLIENTS: u64 = 16;
const MEASURE: Duration = Duration::from_secs(5);

/// The process; killed when this goes.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn dial(address: &str, user: &str) -> cairn_proto::Result<Channel> {
    let hello = pb::Hello { user: user.into(), role: "client".into(), ..Default::default() };
    let env = Env::system();
    rpc::channel(&env.net, address, hello, RpcOptions::default()).await.map(|(channel, _)| channel)
}

fn is_text(status: &tonic::Status, text: &str) -> bool {
    status.message().contains(text)
}

/// Runs everything and prints the rows.
pub fn run(cairn: &str, dir: &str, files: u64) {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let address = format!("127.0.0.1:{port}");
    let begin = Instant::now();
    let child = Command::new(cairn)
        .args(["namenode", "--dir", dir, "--listen", &address])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("cairn starts");
    let mut server = Server(child);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let channel = loop {
            if let Some(status) = server.0.try_wait().unwrap() {
                panic!("cairn namenode ended: {status}");
            }
            match dial(&address, "root").await {
                Ok(channel) => break channel,
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        };
        let mut client = NamenodeClient::new(channel);
        let answer = client.get_status(pb::GetStatusRequest { path: make::path(files / 2) }).await.unwrap();
        assert!(answer.into_inner().status.is_some());
        let label = |what: &str| format!("{} files: {what}", grouped(files));
        row(&label("exec to first answer"), &format!("{:.2} s", begin.elapsed().as_secs_f64()));
        let resident = std::fs::read_to_string(format!("/proc/{}/status", server.0.id())).unwrap();
        let kb = |key: &str| {
            let line = resident.lines().find(|line| line.starts_with(key)).unwrap();
            line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
        };
        let (now, peak) = (kb("VmRSS:") / 1_024, kb("VmHWM:") / 1_024);
        row(&label("resident after the start / at its peak"), &format!("{now} / {peak} MiB"));
        // The edits behind the image made some files more.
        let all = client.cluster_report(pb::ClusterReportRequest {}).await.unwrap().into_inner().files;
        let begin = Instant::now();
        let mut nodes = JoinSet::new();
        for node in 0..NODES {
            nodes.spawn(report(address.clone(), node, all));
        }
        loop {
            let action = pb::SafeModeAction::SafemodeGet as i32;
            if !client.safe_mode(pb::SafeModeRequest { action }).await.unwrap().into_inner().on {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        row(&label("six nodes report: safe mode left after"), &format!("{:.2} s", begin.elapsed().as_secs_f64()));
        let mut kept = Vec::new();
        while kept.len() < NODES as usize {
            kept.push(nodes.join_next().await.unwrap().unwrap());
        }
        row(&label("all replicas reported after"), &format!("{:.2} s", begin.elapsed().as_secs_f64()));
        stats(&address, files, &label("stats over gRPC, 16 clients"), server.0.id()).await;
        creates(&address, &label("create + complete over gRPC, 16 clients"), server.0.id()).await;
        drop(kept);
    });
}

/// One datanode: registers, beats, and streams its full report as the namenode grants ranges.
async fn report(address: String, node: u64, files: u64) -> mpsc::Sender<pb::ReportUp> {
    let channel = dial(&address, "root").await.unwrap();
    let mut cluster = ClusterClient::new(channel);
    let answer = cluster.register(registration(node, PROTOCOL_VERSION.into())).await.unwrap().into_inner();
    let registration = answer.registration;
    let node_id = format!("node-{node}");
    let beat = pb::HeartbeatRequest {
        node_id: node_id.clone(),
        registration,
        storages: storages(node),
        epoch: answer.epoch,
        ..Default::default()
    };
    let mut beats = cluster.clone();
    tokio::spawn(async move {
        // Ends with the namenode.
        while beats.heartbeat(beat.clone()).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    });
    let (up, messages) = mpsc::channel(8);
    let open = pb::ReportOpen { node_id, registration };
    up.send(pb::ReportUp { report: Some(Report::Open(open)) }).await.unwrap();
    let mut down = cluster.reports(ReceiverStream::new(messages)).await.unwrap().into_inner();
    let mut ranges = ranges(node, files, &answer.pool_id).peekable();
    let mut credits = 0;
    loop {
        let granted = down.message().await.unwrap().expect("the stream stays open");
        credits += granted.range_credits;
        while credits > 0 && ranges.peek().is_some() {
            let range = ranges.next().unwrap();
            up.send(pb::ReportUp { report: Some(Report::Range(range)) }).await.unwrap();
            credits -= 1;
        }
        // The first credits come back once everything was taken.
        if ranges.peek().is_none() && credits >= 4 {
            tokio::spawn(async move { while down.message().await.is_ok_and(|message| message.is_some()) {} });
            return up;
        }
    }
}

/// Processor seconds of a process.
fn cpu(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    (fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()) as f64 / 100.0
}

fn print_rate(what: &str, count: u64, took: Duration, used: f64) {
    let (rate, each) = (count as f64 / took.as_secs_f64(), used * 1e6 / count as f64);
    row(what, &format!("{} a second, {each:.0} us of the server's CPU each", grouped(rate as u64)));
}

async fn stats(address: &str, files: u64, what: &str, pid: u32) {
    let (begin, used) = (Instant::now(), cpu(pid));
    let mut tasks = JoinSet::new();
    for client in 0..CLIENTS {
        let channel = dial(address, "ann").await.unwrap();
        tasks.spawn(async move {
            let (mut stub, mut state, mut count) = (NamenodeClient::new(channel), client, 0);
            while begin.elapsed() < MEASURE {
                let path = make::path(random(&mut state) % files);
                stub.get_status(pb::GetStatusRequest { path }).await.unwrap();
                count += 1;
            }
            count
        });
    }
    let count: u64 = tasks.join_all().await.into_iter().sum();
    print_rate(what, count, begin.elapsed(), cpu(pid) - used);
}

async fn creates(address: &str, what: &str, pid: u32) {
    let (begin, used) = (Instant::now(), cpu(pid));
    let mut tasks = JoinSet::new();
    let superuser = cairn_common::process::user_name();
    for client in 0..CLIENTS {
        let channel = dial(address, &superuser).await.unwrap();
        tasks.spawn(async move {
            let mut stub = NamenodeClient::new(channel);
            let (client_name, mut count) = (format!("load-{client}"), 0u64);
            while begin.elapsed() < MEASURE {
                let call = |call_id| {
                    let client_id = vec![client as u8 + 1; 16].into();
                    Some(pb::CallContext { client_id, call_id, lowest_unanswered: call_id, seen_txid: 0 })
                };
                let request = pb::CreateRequest {
                    call: call(2 * count + 1),
                    path: format!("/data/client-{client}/file-{count:015}"),
                    permission: 0o644,
                    create_parents: true,
                    client_name: client_name.clone(),
                    ..Default::default()
                };
                let created = match stub.create(request).await {
                    Ok(created) => created.into_inner().status.unwrap(),
                    Err(status) if is_text(&status, "safe mode") => continue,
                    Err(status) => panic!("{status}"),
                };
                let request = pb::CompleteRequest {
                    call: call(2 * count + 2),
                    inode: created.inode,
                    client_name: client_name.clone(),
                    committed: Vec::new(),
                };
                stub.complete(request).await.unwrap();
                count += 1;
            }
            count
        });
    }
    let count: u64 = tasks.join_all().await.into_iter().sum();
    print_rate(what, count, begin.elapsed(), cpu(pid) - used);
}

//! HTTP: `/health`, `/metrics`, and below `/webhdfs/v1` the bytes of files, if whoever started this datanode brought a [`WebDoor`].

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use cairn_common::net::http::{self, Answer, Guard, Incoming, Method, Request, StatusCode, text};
use cairn_common::net::{Conn, Listener};
use cairn_proto::{Error, ErrorCode, webhdfs};
use tokio::io::AsyncWriteExt;
use tokio::sync::watch;

use crate::report::Reporter;
use crate::tasks::NodeName;
use crate::{DatanodeSettings, WebDoor};

/// Connections at a time; more wait in the kernel's queue.
const CONNECTIONS: usize = 512;

/// What the pages are made of.
#[derive(Clone)]
pub struct Pages {
    reporter: Arc<Reporter>,
    guard: Guard,
    door: Option<Arc<dyn WebDoor>>,
    node: NodeName,
    /// Turns true when no more connections are to be taken.
    closed: watch::Receiver<bool>,
}

impl Pages {
    pub fn new(
        reporter: &Arc<Reporter>,
        door: Option<Arc<dyn WebDoor>>,
        node: NodeName,
        closed: watch::Receiver<bool>,
    ) -> Self {
        let guard = Guard::new(names(&reporter.transfer.settings), "the setting datanode.http_names");
        Self { reporter: Arc::clone(reporter), guard, door, node, closed }
    }
}

/// Names by which clients may call this node.
fn names(settings: &DatanodeSettings) -> Vec<String> {
    let told = [&settings.advertise, &settings.advertise_http].into_iter().flatten();
    let hosts = told.filter_map(|address| address.rsplit_once(':')).map(|(host, _)| host.to_owned());
    let own = settings.host.iter().cloned().chain([cairn_common::process::host_name()]);
    hosts.chain(own).chain(settings.http_names.iter().cloned()).collect()
}

/// Serves until the daemon ends.
pub async fn serve(listener: Listener, pages: Pages) {
    let transfer = Arc::clone(&pages.reporter.transfer);
    let mut closed = pages.closed.clone();
    let closed = async move {
        // An error means that the handle was dropped: the daemon ends.
        let _ = closed.wait_for(|&closed| closed).await;
    };
    let handler = move |request: Request<Incoming>, peer: SocketAddr| {
        let pages = pages.clone();
        async move { answer(request, peer, &pages).await }
    };
    http::serve(listener, transfer.env.clock.clone(), CONNECTIONS, closed, transfer.stopping(), handler).await;
}

async fn answer(request: Request<Incoming>, peer: SocketAddr, pages: &Pages) -> Answer {
    let path = request.uri().path();
    let files = webhdfs::is_below(path);
    if let Err(error) = pages.guard.check(request.uri(), request.headers()) {
        return if files { http::refusal(&error) } else { text(StatusCode::FORBIDDEN, format!("{error}\n")) };
    }
    if files {
        return match &pages.door {
            Some(door) => door.answer(&pages.node, peer.ip(), request).await,
            None => http::refusal(&Error::new(ErrorCode::Unsupported, "this datanode was started without WebHDFS")),
        };
    }
    match (request.method(), path) {
        (&Method::GET | &Method::HEAD, "/health") => health(&pages.reporter),
        (&Method::GET | &Method::HEAD, "/metrics") => {
            http::respond(StatusCode::OK, "text/plain; version=0.0.4", metrics(&pages.reporter))
        }
        (&Method::GET | &Method::HEAD, _) => {
            text(StatusCode::NOT_FOUND, "there is /webhdfs/v1/, /health and /metrics\n")
        }
        _ => text(StatusCode::METHOD_NOT_ALLOWED, "only GET\n"),
    }
}

/// Sends one answer on a connection of another protocol's port, and closes.
pub async fn respond(conn: &mut Conn, status: &str, kind: &str, body: &str) {
    let text = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    let _ = conn.write_all(text.as_bytes()).await;
    let _ = conn.shutdown().await;
}

fn health(reporter: &Reporter) -> Answer {
    let volumes = reporter.transfer.store.volumes();
    let failures = reporter.transfer.store.failed_volumes();
    let failed = volumes.iter().filter(|volume| volume.is_failed()).count();
    let in_touch = reporter.in_touch.load(Ordering::Relaxed);
    let body = serde_json::json!({
        "node_id": reporter.transfer.store.identity().node_id,
        "in_touch_with_namenode": in_touch,
        "volumes": volumes.len(),
        "failed_volumes": failures.len(),
        "failures": failures.iter().map(|(root, why)| serde_json::json!({"dir": root, "why": why})).collect::<Vec<_>>(),
    });
    let serves = in_touch && failed < volumes.len();
    let status = if serves { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    http::json(status, format!("{body}\n"))
}

fn metrics(reporter: &Reporter) -> String {
    let transfer = &reporter.transfer;
    let m = &transfer.metrics;
    let mut out = String::new();
    let counters = [
        ("transfers_active", "gauge", &m.active),
        ("bytes_received_total", "counter", &m.bytes_received),
        ("bytes_sent_total", "counter", &m.bytes_sent),
        ("writes_total", "counter", &m.writes),
        ("writes_failed_total", "counter", &m.writes_failed),
        ("reads_total", "counter", &m.reads),
        ("copies_total", "counter", &m.copies),
        ("partial_copies_total", "counter", &m.partial_copies),
        ("writer_memory_waits_total", "counter", &m.memory_waits),
        ("slow_next_nodes_total", "counter", &m.slow_next),
        ("stalled_next_nodes_total", "counter", &m.stalled_next),
        ("replicas_deleted_total", "counter", &m.deleted),
        ("transfers_refused_total", "counter", &m.refused),
    ];
    for (name, kind, value) in counters {
        let value = value.load(Ordering::Relaxed);
        // Writing to a string cannot fail.
        let _ = writeln!(out, "# TYPE cairn_datanode_{name} {kind}\ncairn_datanode_{name} {value}");
    }
    for (name, kind, value) in transfer.scrub.figures() {
        let _ = writeln!(out, "# TYPE cairn_datanode_{name} {kind}\ncairn_datanode_{name} {value}");
    }
    let _ = writeln!(out, "cairn_datanode_scan_suspects {}", transfer.store.suspects());
    let _ = writeln!(out, "cairn_datanode_failed_volumes {}", transfer.store.failed_volumes().len());
    for (index, volume) in transfer.store.volumes().iter().enumerate() {
        let usage = volume.usage();
        let blocks = transfer.store.map().count(index);
        let figures = [
            ("capacity_bytes", usage.capacity),
            ("used_bytes", usage.used),
            ("remaining_bytes", usage.remaining),
            ("blocks", blocks),
            ("failed", u64::from(volume.is_failed())),
            ("corrupt_replicas", transfer.store.map().count_corrupt(index)),
            ("scan_pass_blocks", transfer.scrub.pass_blocks(index)),
            ("scan_pass_started_ms", transfer.scrub.pass_started_ms(index)),
        ];
        for (name, value) in figures {
            let _ = writeln!(out, "cairn_datanode_volume_{name}{{storage=\"{}\"}} {value}", volume.storage_id());
        }
    }
    if let Some(load) = &reporter.load {
        let figures = [
            ("task_slots", load.slots()),
            ("tasks_running", load.running()),
            ("task_cgroups", load.has_groups().into()),
        ];
        for (name, value) in figures {
            let _ = writeln!(out, "cairn_datanode_{name} {value}");
        }
    }
    let _ = writeln!(out, "cairn_datanode_resident_bytes {}", cairn_common::process::resident_bytes());
    out
}

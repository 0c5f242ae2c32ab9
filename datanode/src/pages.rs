//! `/health` and `/metrics`: a few lines of HTTP/1, one request a connection.

use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use cairn_common::net::{Conn, Listener};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Semaphore;

use crate::report::Reporter;

const REQUEST_BYTES: usize = 8 << 10;
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
const CONNECTIONS: usize = 64;

/// Serves until the daemon ends.
pub async fn serve(listener: Listener, reporter: Arc<Reporter>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let conn = tokio::select! {
            biased;
            () = reporter.transfer.stopping() => return,
            conn = listener.accept() => conn,
        };
        let Ok(conn) = conn else {
            reporter.transfer.env.clock.sleep(Duration::from_millis(100)).await;
            continue;
        };
        // Too many at once: the connection closes.
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else { continue };
        let reporter = Arc::clone(&reporter);
        tokio::spawn(async move {
            let clock = reporter.transfer.env.clock.clone();
            let _ = clock.timeout(REQUEST_TIMEOUT, answer(conn, &reporter)).await;
            drop(place);
        });
    }
}

async fn answer(mut conn: Conn, reporter: &Reporter) {
    let mut request = Vec::with_capacity(1_024);
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        if request.len() > REQUEST_BYTES || !conn.read_buf(&mut request).await.is_ok_and(|n| n > 0) {
            return;
        }
    }
    let line = String::from_utf8_lossy(request.split(|byte| *byte == b'\r').next().unwrap_or_default()).into_owned();
    let mut words = line.split(' ');
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let (status, kind, body) = match (method, path) {
        ("GET" | "HEAD", "/health") => health(reporter),
        ("GET" | "HEAD", "/metrics") => ("200 OK", "text/plain; version=0.0.4", metrics(reporter)),
        ("GET" | "HEAD", _) => ("404 Not Found", "text/plain", "there is /health and /metrics\n".into()),
        _ => ("405 Method Not Allowed", "text/plain", "only GET\n".into()),
    };
    respond(&mut conn, status, kind, if method == "HEAD" { "" } else { &body }).await;
}

/// Sends one answer and closes.
pub async fn respond(conn: &mut Conn, status: &str, kind: &str, body: &str) {
    let text = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    let _ = conn.write_all(text.as_bytes()).await;
    let _ = conn.shutdown().await;
}

fn health(reporter: &Reporter) -> (&'static str, &'static str, String) {
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
    let status = if in_touch && failed < volumes.len() { "200 OK" } else { "503 Service Unavailable" };
    (status, "application/json", format!("{body}\n"))
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

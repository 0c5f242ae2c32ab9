//! Status and metrics over HTTP: `/` (JSON), `/metrics` (Prometheus text), `/health`.
//!
//! A request with an `Origin` header is refused: a web page must not reach a cluster on loopback.

mod metrics;
mod status;

use std::convert::Infallible;
use std::time::Duration;

use cairn_common::Env;
use cairn_common::net::{Conn, Listener};
use cairn_common::process;
use cairn_proto::{Result, pb};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::{Semaphore, watch};

use crate::backup::ArchiveStatus;
use crate::core::Caller;
use crate::journal::JournalStatus;
use crate::server::OwnerRef;

/// Connections at a time; more wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 64;
/// A peer that does not send its request within this time is cut off.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// After a failed accept the next try waits this long.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// What the pages show.
#[derive(Clone)]
pub struct State {
    /// The machine.
    pub env: Env,
    /// The way to the core.
    pub owner: OwnerRef,
    /// The log.
    pub journal: watch::Receiver<JournalStatus>,
    /// The archive of the log, if there is one.
    pub archive: Option<watch::Receiver<ArchiveStatus>>,
    /// The cluster.
    pub cluster_id: String,
}

/// Serves until `stop` turns true.
pub async fn serve(listener: Listener, state: State, mut stop: watch::Receiver<bool>) {
    let room = std::sync::Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        // The semaphore is never closed.
        let Ok(permit) = std::sync::Arc::clone(&room).acquire_owned().await else { return };
        let accepted = tokio::select! { biased;
            _ = stop.wait_for(|&stop| stop) => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok(conn) => {
                let (state, mut stop) = (state.clone(), stop.clone());
                tokio::spawn(async move {
                    tokio::select! { biased;
                        _ = stop.wait_for(|&stop| stop) => {}
                        () = serve_connection(conn, state) => {}
                    }
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "an HTTP connection could not be accepted");
                state.env.clock.sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn serve_connection(conn: Conn, state: State) {
    let peer = conn.peer_addr();
    let service = hyper::service::service_fn(move |request: Request<Incoming>| {
        let state = state.clone();
        async move { Ok::<_, Infallible>(answer(&request, &state).await) }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(16 << 10)
        .serve_connection(TokioIo::new(conn), service)
        .await;
    if let Err(error) = served {
        tracing::debug!(%peer, %error, "HTTP connection ended early");
    }
}

async fn answer(request: &Request<Incoming>, state: &State) -> Response<Full<Bytes>> {
    if request.headers().contains_key(header::ORIGIN) {
        return text(StatusCode::FORBIDDEN, "requests of web pages are refused\n".into());
    }
    if request.method() != Method::GET && request.method() != Method::HEAD {
        return text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n".into());
    }
    let page = match request.uri().path() {
        "/" => report(state).await.map(|report| {
            let json = status::json(&state.cluster_id, &report);
            response(StatusCode::OK, "application/json", format!("{json:#}\n"))
        }),
        "/metrics" => report(state).await.map(|report| {
            let journal = state.journal.borrow().clone();
            let mut report = report;
            if let Some(archive) = &state.archive {
                archive.borrow().tell(&mut report);
            }
            let body = metrics::text(&report, &journal, state.owner.queued(), process::resident_bytes());
            response(StatusCode::OK, "text/plain; version=0.0.4", body)
        }),
        "/health" => health(state).await,
        _ => Ok(text(StatusCode::NOT_FOUND, "pages: /, /metrics, /health\n".into())),
    };
    page.unwrap_or_else(|error| text(StatusCode::SERVICE_UNAVAILABLE, format!("{error}\n")))
}

/// Healthy is a namenode whose owner answers and whose log still takes transactions.
async fn health(state: &State) -> Result<Response<Full<Bytes>>> {
    if let Some(error) = &state.journal.borrow().failed {
        return Err(error.to_error());
    }
    report(state).await?;
    Ok(text(StatusCode::OK, "ok\n".into()))
}

async fn report(state: &State) -> Result<pb::ClusterReportResponse> {
    let caller = Caller { user: process::user_name(), groups: Vec::new(), host: "127.0.0.1".into() };
    state.owner.call(caller, pb::ClusterReportRequest {}).await
}

fn text(status: StatusCode, body: String) -> Response<Full<Bytes>> {
    response(status, "text/plain; charset=utf-8", body)
}

fn response(status: StatusCode, kind: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    response
}

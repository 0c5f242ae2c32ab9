//! HTTP: the file system as WebHDFS below `/webhdfs/v1`, status and metrics: `/` (JSON), `/metrics` (Prometheus text), `/health`.
//!
//! Requests of web pages are refused: a page must not reach a cluster on loopback.

mod metrics;
mod status;
mod webhdfs;

use std::net::SocketAddr;
use std::sync::Arc;

use cairn_common::Env;
use cairn_common::net::Listener;
use cairn_common::net::http::{self, Answer, Guard, Incoming, Method, Request, StatusCode, respond, text};
use cairn_common::process;
use cairn_proto::{Result, pb};
use tokio::sync::watch;

use crate::backup::ArchiveStatus;
use crate::core::Caller;
use crate::journal::JournalStatus;
use crate::server::{Groups, OwnerRef};

/// Connections at a time; more wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 1_024;

/// What the pages show.
#[derive(Clone)]
pub struct State {
    /// The machine.
    pub env: Env,
    /// The way to the core.
    pub owner: OwnerRef,
    /// Who is in which group.
    pub groups: Groups,
    /// The log.
    pub journal: watch::Receiver<JournalStatus>,
    /// The archive of the log, if there is one.
    pub archive: Option<watch::Receiver<ArchiveStatus>>,
    /// The cluster.
    pub cluster_id: String,
    /// Where RPC is served.
    pub rpc_addr: SocketAddr,
    /// Keeps web pages out.
    pub guard: Guard,
    /// Users who may act for any other.
    pub proxy_users: Arc<[String]>,
    /// Datanodes, as they were a moment ago.
    pub nodes: Arc<Nodes>,
}

pub use webhdfs::Nodes;

/// Serves until `stop` turns true.
pub async fn serve(listener: Listener, state: State, mut stop: watch::Receiver<bool>) {
    let clock = state.env.clock.clone();
    let stopped = async move {
        // An error means that nobody is left who could stop us later.
        let _ = stop.wait_for(|&stop| stop).await;
    };
    let handler = move |request: Request<Incoming>, peer: SocketAddr| {
        let state = state.clone();
        async move { answer(request, peer, &state).await }
    };
    http::serve(listener, clock, MAX_CONNECTIONS, std::future::pending::<()>(), stopped, handler).await;
}

async fn answer(request: Request<Incoming>, peer: SocketAddr, state: &State) -> Answer {
    let files = cairn_proto::webhdfs::is_below(request.uri().path());
    if let Err(error) = state.guard.check(request.uri(), request.headers()) {
        return if files { http::refusal(&error) } else { text(StatusCode::FORBIDDEN, format!("{error}\n")) };
    }
    if files {
        return webhdfs::answer(request, peer.ip(), state).await;
    }
    if request.method() != Method::GET && request.method() != Method::HEAD {
        return text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n");
    }
    let page = match request.uri().path() {
        "/" => report(state).await.map(|report| {
            let json = status::json(&state.cluster_id, &report);
            http::json(StatusCode::OK, format!("{json:#}\n"))
        }),
        "/metrics" => report(state).await.map(|report| {
            let journal = state.journal.borrow().clone();
            let mut report = report;
            if let Some(archive) = &state.archive {
                archive.borrow().tell(&mut report);
            }
            let body = metrics::text(&report, &journal, state.owner.queued(), process::resident_bytes());
            respond(StatusCode::OK, "text/plain; version=0.0.4", body)
        }),
        "/health" => health(state).await,
        _ => Ok(text(StatusCode::NOT_FOUND, "there is /webhdfs/v1/, /, /metrics, /health\n")),
    };
    page.unwrap_or_else(|error| text(StatusCode::SERVICE_UNAVAILABLE, format!("{error}\n")))
}

/// Healthy is a namenode whose owner answers and whose log still takes transactions.
async fn health(state: &State) -> Result<Answer> {
    if let Some(error) = &state.journal.borrow().failed {
        return Err(error.to_error());
    }
    report(state).await?;
    Ok(text(StatusCode::OK, "ok\n"))
}

async fn report(state: &State) -> Result<pb::ClusterReportResponse> {
    let caller = Caller { user: process::user_name(), groups: Vec::new(), host: "127.0.0.1".into() };
    state.owner.call(caller, pb::ClusterReportRequest {}).await
}

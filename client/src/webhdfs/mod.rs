//! A datanode's part of WebHDFS: the bytes of files over HTTP.
//!
//! # Overview
//! [`WebGate`] is what a datanode's HTTP server hands requests below `/webhdfs/v1` to. It is a client of the file system like any other, one per
//! user ([`users`]), that prefers its own node: [`read`] streams files out, [`write`](mod@write) takes them in, [`checksum`] folds their checksums as
//! Hadoop does. Operations on names are the namenode's.
//!
//! # Interrupted uploads
//! A `CREATE` whose client leaves, stalls for a minute or breaks off is taken back: the new file is deleted, so that nobody takes a part for the
//! whole. An `APPEND` that is broken off leaves what had been acknowledged until then, as with HDFS, and the file is closed at once. An orderly end of
//! the datanode does the same for all that it is writing; after a crash the lease of a half-written file runs out in the usual way.
//!
//! # Limits
//! So many operations at a time, each with a bounded number of bytes in memory, and of one address no more than half of them; more wait for some
//! seconds and are then told to come again. Who sends or takes next to nothing for a minute gives its place up (`cairn_common::net::http`).

mod checksum;
mod read;
mod turns;
mod users;
mod write;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use cairn_common::Env;
use cairn_common::net::http::{self, Answer, Incoming, Method, Request, StatusCode, header};
use cairn_datanode::WebDoor;
use cairn_datanode::tasks::NodeName;
use cairn_proto::webhdfs::{self, Parameters};
use tokio::sync::{Semaphore, watch};

use crate::fs::{ClientSettings, Error, ErrorCode, FileSystem, Result};
use turns::{Turn, Turns};
use users::Users;

/// Reads and writes at a time.
const OPERATIONS: u32 = 64;
/// Of one address.
const OPERATIONS_OF_ONE: u32 = OPERATIONS / 2;
/// How long one waits for its turn.
const PATIENCE: Duration = Duration::from_secs(10);
/// File data that one writer holds until it is acknowledged, and that one reader fetches ahead.
const WRITE_WINDOW_BYTES: u64 = 4 << 20;
const READ_AHEAD_BYTES: u64 = 2 << 20;
/// How long a call waits for a namenode that is away: HTTP clients are less patient than ours.
const NAMENODE_PATIENCE_MS: u64 = 30_000;
/// What is taken of the data of a request that failed, so that its client gets to read why.
const REFUSED_BYTES: u64 = 16 << 20;
/// How long the end of a datanode waits for uploads to be taken back.
const CLOSING: Duration = Duration::from_secs(8);

/// Serves a datanode's WebHDFS requests; see the module.
pub struct WebGate {
    env: Env,
    namenode: String,
    users: Arc<Users>,
    turns: Arc<Turns>,
    /// One for each upload under way.
    uploads: Arc<Semaphore>,
    stop: watch::Sender<bool>,
}

/// One request.
struct Call {
    fs: FileSystem,
    path: String,
    parameters: Parameters,
    /// Held until its last byte is sent or taken.
    turn: Turn,
}

/// The data of a request that nobody has taken to its end.
struct Rest {
    body: Incoming,
    /// Some of it was asked for, so the client sends the rest as well.
    begun: bool,
}

impl WebGate {
    /// A gate to the cluster of the namenode at `namenode` ("HOST:PORT"), which is dialled when the first request comes.
    pub fn new(env: Env, namenode: &str) -> Self {
        let settings = ClientSettings {
            write_window_bytes: WRITE_WINDOW_BYTES,
            read_ahead_bytes: READ_AHEAD_BYTES,
            retry_deadline_ms: NAMENODE_PATIENCE_MS,
            ..ClientSettings::at(namenode)
        };
        Self {
            users: Arc::new(Users::new(env.clone(), settings)),
            env,
            namenode: namenode.to_owned(),
            turns: Turns::new(OPERATIONS, OPERATIONS_OF_ONE),
            uploads: Arc::new(Semaphore::new(OPERATIONS as usize)),
            stop: watch::channel(false).0,
        }
    }

    async fn begin(&self, node: &NodeName, peer: IpAddr, head: &http::Request<()>) -> Result<Call> {
        let parameters = Parameters::parse(head.uri().query().unwrap_or_default())?;
        let path = webhdfs::path_of(head.uri().path())?;
        let user = parameters.user(&[])?;
        if *self.stop.borrow() {
            return Err(stopping());
        }
        let Ok(turn) = self.env.clock.timeout(PATIENCE, self.turns.take(peer)).await else {
            let text = format!(
                "this datanode has {OPERATIONS} WebHDFS operations under way, or {OPERATIONS_OF_ONE} of {peer}: try again, or another one"
            );
            return Err(Error::new(ErrorCode::Busy, text));
        };
        let fs = self.users.of(user, node).await?;
        Ok(Call { fs, path, parameters, turn })
    }

    /// Carries out a request; returns its body if nobody has taken it.
    async fn operate(
        &self,
        node: &NodeName,
        peer: IpAddr,
        head: &Request<()>,
        body: Incoming,
    ) -> (Result<Answer>, Option<Rest>) {
        let body = Rest { body, begun: false };
        let call = match self.begin(node, peer, head).await {
            Ok(call) => call,
            Err(error) => return (Err(error), Some(body)),
        };
        let op = match call.parameters.op() {
            Ok(op) => op,
            Err(error) => return (Err(error), Some(body)),
        };
        match (head.method(), op.as_str()) {
            (&Method::GET | &Method::HEAD, "OPEN") => (read::open(call).await, Some(body)),
            (&Method::GET | &Method::HEAD, "GETFILECHECKSUM") => (checksum::checksum(call).await, Some(body)),
            (&Method::PUT, "CREATE") | (&Method::POST, "APPEND") => self.upload(&op, call, body).await,
            (method, _) => {
                let shown: String = op.chars().take(60).collect();
                let text = format!(
                    "Invalid value for webhdfs parameter \"op\": a datanode has no operation {shown} of the method {method}; ask the namenode"
                );
                (Err(webhdfs::invalid(text)), Some(body))
            }
        }
    }

    /// In a task of its own: it must come to an end, good or bad, also when the client leaves and this future is dropped.
    async fn upload(&self, op: &str, call: Call, body: Rest) -> (Result<Answer>, Option<Rest>) {
        let plan = match write::Plan::of(op, &call.parameters) {
            Ok(plan) => plan,
            Err(error) => return (Err(error), Some(body)),
        };
        let created = matches!(plan, write::Plan::Create(_));
        let location = format!("hdfs://{}{}", self.namenode, webhdfs::encoded_path(&call.path));
        // There are as many as turns, and the semaphore is never closed.
        let Ok(counted) = Arc::clone(&self.uploads).acquire_owned().await else { return (Err(stopping()), Some(body)) };
        let upload = write::Upload { call, plan, users: Arc::clone(&self.users), stop: self.stop.subscribe() };
        let run = async move {
            let ended = upload.run(body).await;
            drop(counted);
            ended
        };
        match tokio::spawn(run).await {
            Ok((Ok(()), body)) => (Ok(taken(created, &location)), Some(body)),
            Ok((Err(error), body)) => (Err(error), Some(body)),
            Err(error) => (Err(Error::new(ErrorCode::Internal, format!("an upload ended: {error}"))), None),
        }
    }
}

fn stopping() -> Error {
    Error::new(ErrorCode::Unreachable, "the datanode is stopping: try another one")
}

fn taken(created: bool, location: &str) -> Answer {
    let status = if created { StatusCode::CREATED } else { StatusCode::OK };
    let mut answer = http::respond(status, "application/octet-stream", "");
    if let Some(location) = header::HeaderValue::from_str(location).ok().filter(|_| created) {
        answer.headers_mut().insert(header::LOCATION, location);
    }
    answer
}

impl Call {
    async fn reader(&self) -> Result<crate::fs::FileReader> {
        self.fs.open(&self.path).await.map_err(|error| webhdfs::no_file(error, &self.path))
    }
}

#[async_trait::async_trait]
impl WebDoor for WebGate {
    async fn answer(&self, node: &NodeName, peer: IpAddr, request: Request<Incoming>) -> Answer {
        let (parts, body) = request.into_parts();
        let head = Request::from_parts(parts, ());
        let (result, rest) = self.operate(node, peer, &head, body).await;
        let failure = match result {
            Ok(answer) => return answer,
            Err(error) => error,
        };
        // A client that waits for "100 Continue" sends nothing before it has its answer; it has had that when some of its data was taken.
        let waits = head.headers().contains_key(header::EXPECT);
        if let Some(mut rest) = rest.filter(|rest| rest.begun || !waits) {
            http::drain(&mut rest.body, &self.env.clock, REFUSED_BYTES).await;
        }
        http::refusal(&failure)
    }

    async fn close(&self) {
        self.stop.send_replace(true);
        // Readers are cut off: they see that by the length that they were promised.
        let all = self.env.clock.timeout(CLOSING, self.uploads.acquire_many(OPERATIONS)).await;
        if all.is_err() {
            tracing::warn!("some WebHDFS uploads were not taken back within {CLOSING:?}");
        }
    }
}

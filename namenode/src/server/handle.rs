//! How the services reach the owner.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cairn_proto::{Error, ErrorCode, Result, pb};
use tokio::sync::{mpsc, oneshot};

use super::owner::{Answer, Down, Inbox};
use crate::core::{Caller, ClientRequest, ClientResponse, StreamId};

/// A way to the owner; cheap to clone.
#[derive(Clone)]
pub struct OwnerRef {
    queue: mpsc::Sender<Inbox>,
    streams: Arc<AtomicU64>,
}

fn stopping() -> Error {
    Error::new(ErrorCode::Unreachable, "the namenode is stopping")
}

impl OwnerRef {
    /// A way to the owner behind `queue`.
    pub fn new(queue: mpsc::Sender<Inbox>) -> Self {
        Self { queue, streams: Arc::default() }
    }

    /// Calls the core and turns its answer into the one that is expected.
    pub async fn call<Q, R>(&self, caller: Caller, request: Q) -> Result<R>
    where
        ClientRequest: From<Q>,
        R: TryFrom<ClientResponse>,
    {
        let request = ClientRequest::from(request);
        let name = request.name();
        let response = self.ask(|answer| Inbox::Client { caller, request, answer }).await?;
        R::try_from(response)
            .map_err(|_| Error::new(ErrorCode::Internal, format!("the namenode gave another answer than {name}'s")))
    }

    /// A datanode registers.
    pub async fn register(&self, peer_ip: String, request: pb::RegisterRequest) -> Result<pb::RegisterResponse> {
        self.ask(|answer| Inbox::Register { peer_ip, request, answer }).await
    }

    /// A datanode's heartbeat.
    pub async fn heartbeat(&self, request: pb::HeartbeatRequest) -> Result<pb::HeartbeatResponse> {
        self.ask(|answer| Inbox::Heartbeat { request, answer }).await
    }

    /// Writes an image.
    pub async fn checkpoint(&self, caller: Caller) -> Result<pb::CheckpointResponse> {
        self.ask(|answer| Inbox::Checkpoint { caller, answer }).await
    }

    /// Refuses a caller who is no superuser.
    pub async fn check_superuser(&self, caller: Caller) -> Result<()> {
        self.ask(|answer| Inbox::CheckSuperuser { caller, answer }).await
    }

    async fn ask<T>(&self, message: impl FnOnce(Answer<T>) -> Inbox) -> Result<T> {
        let (answer, answered) = oneshot::channel();
        self.send(message(answer)).await?;
        answered.await.unwrap_or_else(|_| Err(stopping()))
    }

    /// Opens a report stream.
    pub async fn open_stream(&self, open: pb::ReportOpen, down: Down) -> Result<StreamId> {
        let stream = StreamId(self.streams.fetch_add(1, Ordering::Relaxed));
        self.send(Inbox::ReportOpened { stream, open, down }).await?;
        Ok(stream)
    }

    /// Waits for room in the queue.
    pub async fn send(&self, message: Inbox) -> Result<()> {
        self.queue.send(message).await.map_err(|_| stopping())
    }

    /// Events that wait.
    pub fn queued(&self) -> usize {
        self.queue.max_capacity() - self.queue.capacity()
    }
}

//! The gRPC face of the executor: checks, and a question to the owner.

use cairn_common::net::opening::Peer;
use cairn_proto::pb::tasks_server::Tasks;
use cairn_proto::{Error, ErrorCode, Result, pb};
use tokio::sync::{mpsc, oneshot};
use tonic::{Request, Response, Status};

use super::owner::Event;

/// Serves [`pb::tasks_server::Tasks`].
#[derive(Clone)]
pub struct TasksService {
    events: mpsc::Sender<Event>,
}

impl TasksService {
    pub(super) fn new(events: mpsc::Sender<Event>) -> Self {
        Self { events }
    }

    async fn ask<A>(&self, event: impl FnOnce(oneshot::Sender<Result<A>>) -> Event) -> Result<Response<A>, Status> {
        let (reply, answer) = oneshot::channel();
        let gone = || Status::from(Error::new(ErrorCode::Unreachable, "the task executor of this node is stopping"));
        self.events.send(event(reply)).await.map_err(|_| gone())?;
        Ok(Response::new(answer.await.map_err(|_| gone())??))
    }
}

/// The user of the connection: only our own handshake names one.
fn user_of<T>(request: &Request<T>) -> Result<String> {
    match request.extensions().get::<Peer>() {
        Some(peer) => Ok(peer.user.clone()),
        None => Err(Error::new(ErrorCode::PermissionDenied, "jobs need a connection that names its user")),
    }
}

#[tonic::async_trait]
impl Tasks for TasksService {
    async fn register_job(
        &self,
        request: Request<pb::RegisterJobRequest>,
    ) -> Result<Response<pb::RegisterJobResponse>, Status> {
        let user = user_of(&request)?;
        let request = request.into_inner();
        self.ask(|reply| Event::Register { user, request, reply }).await
    }

    async fn start_task(
        &self,
        request: Request<pb::StartTaskRequest>,
    ) -> Result<Response<pb::StartTaskResponse>, Status> {
        let user = user_of(&request)?;
        let request = request.into_inner();
        self.ask(|reply| Event::Start { user, request, reply }).await
    }

    async fn watch_tasks(
        &self,
        request: Request<pb::WatchTasksRequest>,
    ) -> Result<Response<pb::WatchTasksResponse>, Status> {
        let user = user_of(&request)?;
        let request = request.into_inner();
        self.ask(|reply| Event::Watch { user, request, reply }).await
    }

    async fn kill_task(&self, request: Request<pb::KillTaskRequest>) -> Result<Response<pb::KillTaskResponse>, Status> {
        let user = user_of(&request)?;
        let request = request.into_inner();
        self.ask(|reply| Event::Kill { user, request, reply }).await
    }

    async fn end_job(&self, request: Request<pb::EndJobRequest>) -> Result<Response<pb::EndJobResponse>, Status> {
        let user = user_of(&request)?;
        let request = request.into_inner();
        self.ask(|reply| Event::End { user, request, reply }).await
    }
}

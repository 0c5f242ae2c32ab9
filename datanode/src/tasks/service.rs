//! The gRPC face of the executor: checks, and a question to the owner.

use cairn_common::net::opening::Peer;
use cairn_proto::pb::tasks_server::Tasks;
use cairn_proto::{Error, ErrorCode, Result, pb};
use tokio::sync::{mpsc, oneshot};
use tonic::{Request, Response, Status};

use super::logs::Logs;
use super::owner::Event;

/// Serves [`pb::tasks_server::Tasks`].
#[derive(Clone)]
pub struct TasksService {
    events: mpsc::Sender<Event>,
    logs: Logs,
}

impl TasksService {
    pub(super) fn new(events: mpsc::Sender<Event>, logs: Logs) -> Self {
        Self { events, logs }
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

    async fn feed_task(&self, request: Request<pb::FeedTaskRequest>) -> Result<Response<pb::FeedTaskResponse>, Status> {
        let user = user_of(&request)?;
        let request = request.into_inner();
        self.ask(|reply| Event::Feed { user, request, reply }).await
    }

    async fn ask_slots(&self, request: Request<pb::AskSlotsRequest>) -> Result<Response<pb::AskSlotsResponse>, Status> {
        let user = user_of(&request)?;
        let request = request.into_inner();
        self.ask(|reply| Event::Ask { user, request, reply }).await
    }

    async fn list_jobs(&self, request: Request<pb::ListJobsRequest>) -> Result<Response<pb::ListJobsResponse>, Status> {
        user_of(&request)?;
        let request = request.into_inner();
        self.ask(|reply| Event::List { request, reply }).await
    }

    async fn list_logs(&self, request: Request<pb::ListLogsRequest>) -> Result<Response<pb::ListLogsResponse>, Status> {
        let user = user_of(&request)?;
        Ok(Response::new(self.logs.list(user, request.into_inner()).await?))
    }

    async fn read_log(&self, request: Request<pb::ReadLogRequest>) -> Result<Response<pb::ReadLogResponse>, Status> {
        let user = user_of(&request)?;
        Ok(Response::new(self.logs.read(user, request.into_inner()).await?))
    }

    async fn start_driver(
        &self,
        request: Request<pb::StartDriverRequest>,
    ) -> Result<Response<pb::StartDriverResponse>, Status> {
        let user = user_of(&request)?;
        let request = request.into_inner();
        self.ask(|reply| Event::StartDriver { user, request, reply }).await
    }

    async fn release_kept(
        &self,
        request: Request<pb::ReleaseKeptRequest>,
    ) -> Result<Response<pb::ReleaseKeptResponse>, Status> {
        let user = user_of(&request)?;
        let request = request.into_inner();
        self.ask(|reply| Event::Release { user, request, reply }).await
    }
}

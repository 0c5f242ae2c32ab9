//! The driver's line to one node: registers the job there, starts and kills attempts, and follows what happens to them.

use std::time::Duration;

use cairn_common::Env;
use cairn_common::net::rpc::{self, RpcOptions};
use cairn_proto::pb::tasks_client::TasksClient;
use cairn_proto::{Error, ErrorCode, Result, pb};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tonic::transport::Channel;

/// How long one question for news may wait at the node. With it the node learns how the job stands: longer, and it tells people old news; shorter:
/// more questions.
const WATCH_MS: u32 = 1_000;
/// An answer that takes this much longer will not come.
const ANSWER_MS: u64 = 10_000;
/// Pauses between attempts to reach a node before it is taken for lost.
const RETRY_PAUSES_MS: [u64; 3] = [50, 150, 400];

/// What the driver asks of a node.
pub enum Command {
    /// Start an attempt; so many tasks wait beside it.
    Start(Box<pb::TaskSpec>, u32),
    /// Tell a reduce that runs of more map outputs.
    Feed(pb::TaskId, Vec<pb::MapOutputLocation>),
    /// Wait for so many slots; 0: for none any more.
    Ask(u32),
    /// Kill one.
    Kill(pb::TaskId),
    /// End the job there; answered when nothing of it is left (or the node does not answer).
    End(oneshot::Sender<()>),
}

/// What a node tells.
pub enum News {
    /// The node knows the job now, and says what it has of it.
    Registered {
        /// Maps whose outputs it keeps.
        held: Vec<pb::TaskId>,
        /// Attempts that run there.
        running: Vec<pb::TaskId>,
        /// What earlier jobs have kept there for this one.
        kept: Vec<pb::KeptContent>,
    },
    /// No slot is free.
    Refused(pb::TaskId),
    /// The reduce could not be told of map outputs.
    NotFed(pb::TaskId),
    /// The attempt could not be started.
    NotStarted(pb::TaskId, Error),
    /// An attempt progressed or ended.
    Event(pb::TaskEvent),
    /// The node cannot be reached any more, or has forgotten the job. Nothing follows.
    Lost(Error),
}

/// News with the node that they are from.
pub type NodeNews = (String, News);

/// See the module. Dropping it ends its tasks, not the job on the node.
pub struct NodeLink {
    commands: mpsc::Sender<Command>,
    task: JoinHandle<()>,
}

/// What a link needs to know.
#[derive(Clone)]
pub struct LinkTarget {
    /// Machine.
    pub env: Env,
    /// The node.
    pub node_id: String,
    /// "IP:PORT".
    pub address: String,
    /// Who asks.
    pub hello: pb::Hello,
    /// The job, with the driver's epoch.
    pub request: pb::RegisterJobRequest,
    /// How the job stands, for whoever asks the node.
    pub status: watch::Receiver<pb::JobStatus>,
}

impl NodeLink {
    /// Connects in the background; commands wait meanwhile.
    pub fn open(target: LinkTarget, news: mpsc::Sender<NodeNews>) -> Self {
        let (commands, receiver) = mpsc::channel(1_024);
        let task = tokio::spawn(async move {
            let node_id = target.node_id.clone();
            let link = Link { target, news: news.clone() };
            if let Err(error) = link.serve(receiver).await {
                // The driver has gone if it does not listen.
                let _ = news.send((node_id, News::Lost(error))).await;
            }
        });
        Self { commands, task }
    }

    /// Hands over a command; false if the link is closed or stuck.
    pub fn send(&self, command: Command) -> bool {
        self.commands.try_send(command).is_ok()
    }
}

impl Drop for NodeLink {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Link {
    target: LinkTarget,
    news: mpsc::Sender<NodeNews>,
}

type Client = TasksClient<Channel>;

impl Link {
    async fn serve(&self, mut commands: mpsc::Receiver<Command>) -> Result<()> {
        let client = self.connect().await?;
        let watch = self.watch(client.clone());
        tokio::pin!(watch);
        loop {
            let command = tokio::select! {
                biased;
                command = commands.recv() => command,
                lost = &mut watch => return lost,
            };
            match command {
                None => return Ok(()),
                Some(Command::End(done)) => {
                    self.end(client.clone()).await;
                    let _ = done.send(());
                    return Ok(());
                }
                Some(Command::Start(spec, backlog)) => {
                    // The watch goes on meanwhile.
                    let start = self.start(client.clone(), *spec, backlog);
                    tokio::pin!(start);
                    tokio::select! {
                        started = &mut start => started?,
                        lost = &mut watch => return lost,
                    }
                }
                Some(Command::Feed(task, inputs)) => {
                    let feed = self.feed(client.clone(), task, inputs);
                    tokio::pin!(feed);
                    tokio::select! {
                        fed = &mut feed => fed?,
                        lost = &mut watch => return lost,
                    }
                }
                Some(Command::Ask(wanted)) => {
                    let request = pb::AskSlotsRequest { job_id: self.job_id(), epoch: self.epoch(), wanted };
                    // Kept slots are kept for a moment only: no harm if this is lost.
                    let _ = self.limited(client.clone().ask_slots(request)).await;
                }
                Some(Command::Kill(task)) => {
                    let request = pb::KillTaskRequest { job_id: self.job_id(), epoch: self.epoch(), task: Some(task) };
                    // One that cannot be delivered is one to a node that is about to be lost.
                    let _ = self.limited(client.clone().kill_task(request)).await;
                }
            }
        }
    }

    fn job_id(&self) -> String {
        self.target.request.job.as_ref().map(|job| job.job_id.clone()).unwrap_or_default()
    }

    fn epoch(&self) -> u64 {
        self.target.request.epoch
    }

    async fn tell(&self, news: News) -> Result<()> {
        let sent = self.news.send((self.target.node_id.clone(), news)).await;
        sent.map_err(|_| Error::new(ErrorCode::Internal, "the driver has ended"))
    }

    async fn limited<A>(
        &self,
        call: impl Future<Output = std::result::Result<tonic::Response<A>, tonic::Status>>,
    ) -> Result<A> {
        let limit = Duration::from_millis(u64::from(WATCH_MS) + ANSWER_MS);
        match self.target.env.clock.timeout(limit, call).await {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) => Err(rpc::error(status)),
            Err(elapsed) => {
                Err(Error::new(ErrorCode::TimedOut, format!("datanode {}: {elapsed}", self.target.address)))
            }
        }
    }

    /// Repeats what may pass by itself.
    async fn patiently<A, F, Fut>(&self, attempt: F) -> Result<A>
    where
        F: Fn() -> Fut,
        Fut: Future<Output = Result<A>>,
    {
        let mut pauses = RETRY_PAUSES_MS.iter();
        loop {
            let error = match attempt().await {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            let again = error.code() == ErrorCode::Unreachable;
            let Some(pause) = pauses.next().filter(|_| again) else { return Err(error) };
            self.target.env.clock.sleep(Duration::from_millis(*pause)).await;
        }
    }

    async fn connect(&self) -> Result<Client> {
        let target = &self.target;
        self.patiently(|| async {
            let options = RpcOptions { connect_timeout: Duration::from_secs(3), ..RpcOptions::default() };
            let (channel, _) = rpc::channel(&target.env.net, &target.address, target.hello.clone(), options).await?;
            let client = TasksClient::new(channel)
                .max_decoding_message_size(rpc::MAX_RPC_BYTES)
                .max_encoding_message_size(4 * rpc::MAX_RPC_BYTES);
            let found = self.limited(client.clone().register_job(target.request.clone())).await?;
            self.tell(News::Registered { held: found.held, running: found.running, kept: found.kept }).await?;
            Ok(client)
        })
        .await
    }

    async fn start(&self, client: Client, spec: pb::TaskSpec, backlog: u32) -> Result<()> {
        let task = spec.id.unwrap_or_default();
        let request = pb::StartTaskRequest { job_id: self.job_id(), epoch: self.epoch(), task: Some(spec), backlog };
        let started = self
            .patiently(|| async {
                let mut client = client.clone();
                self.limited(client.start_task(request.clone())).await
            })
            .await;
        match started {
            Ok(_) => Ok(()),
            Err(error) if error.code() == ErrorCode::Busy => self.tell(News::Refused(task)).await,
            Err(error) if is_loss(&error) => Err(error),
            Err(error) => self.tell(News::NotStarted(task, error)).await,
        }
    }

    async fn feed(&self, client: Client, task: pb::TaskId, inputs: Vec<pb::MapOutputLocation>) -> Result<()> {
        let request = pb::FeedTaskRequest { job_id: self.job_id(), epoch: self.epoch(), task: Some(task), inputs };
        let fed = self.patiently(|| async {
            let mut client = client.clone();
            self.limited(client.feed_task(request.clone())).await
        });
        match fed.await {
            Ok(_) => Ok(()),
            Err(error) if is_loss(&error) || error.code() == ErrorCode::StaleEpoch => Err(error),
            Err(_) => self.tell(News::NotFed(task)).await,
        }
    }

    async fn watch(&self, client: Client) -> Result<()> {
        let mut after = 0;
        loop {
            let request = pb::WatchTasksRequest {
                job_id: self.job_id(),
                epoch: self.epoch(),
                after_sequence: after,
                wait_ms: WATCH_MS,
                status: Some(self.target.status.borrow().clone()),
            };
            let answer = self.patiently(|| async {
                let mut client = client.clone();
                self.limited(client.watch_tasks(request.clone())).await
            });
            let answer = answer.await?;
            for event in answer.events {
                after = after.max(event.sequence);
                self.tell(News::Event(event)).await?;
            }
        }
    }

    async fn end(&self, client: Client) {
        let request = pb::EndJobRequest { job_id: self.job_id(), epoch: self.epoch() };
        if let Err(error) = self.limited(client.clone().end_job(request)).await {
            // Its lease will end it.
            tracing::debug!(node = %self.target.address, %error, "the job could not be ended on a node");
        }
    }
}

/// Does the error say that the node, or what it held of the job, is gone?
fn is_loss(error: &Error) -> bool {
    matches!(error.code(), ErrorCode::Unreachable | ErrorCode::TimedOut | ErrorCode::FileNotFound)
}

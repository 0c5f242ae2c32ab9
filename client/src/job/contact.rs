//! Questions to all nodes at once, for people and for drivers that take over.

use std::time::Duration;

use cairn_common::net::rpc::{self, RpcOptions};
use cairn_proto::pb::tasks_client::TasksClient;
use cairn_proto::{Error, ErrorCode, Result, pb};
use futures_util::StreamExt as _;
use tonic::transport::Channel;

use super::plan::live_nodes;
use super::scheduler::NodeInfo;
use crate::fs::FileSystem;

/// Nodes asked at once.
const AT_ONCE: usize = 16;
/// A node that does not answer by then is left out.
const ANSWER_LIMIT: Duration = Duration::from_secs(3);

pub type Client = TasksClient<Channel>;

/// A connection to the executor of one node.
pub async fn client(fs: &FileSystem, node: &NodeInfo) -> Result<Client> {
    let hello = pb::Hello {
        user: fs.user().to_owned(),
        role: "client".into(),
        cluster_id: fs.server_defaults().await?.cluster_id.clone(),
        software: env!("CARGO_PKG_VERSION").into(),
        ..Default::default()
    };
    let options = RpcOptions { connect_timeout: ANSWER_LIMIT, ..RpcOptions::default() };
    let (channel, _) = rpc::channel(&fs.env().net, &node.address, hello, options).await?;
    Ok(TasksClient::new(channel).max_decoding_message_size(4 * rpc::MAX_RPC_BYTES))
}

/// Asks every live node; those that do not answer have an error.
async fn ask_all<T, F, Fut>(fs: &FileSystem, ask: F) -> Result<Vec<(NodeInfo, Result<T>)>>
where
    F: Fn(Client) -> Fut,
    Fut: Future<Output = std::result::Result<tonic::Response<T>, tonic::Status>>,
{
    Ok(self::ask(fs, live_nodes(fs).await?, ask).await)
}

/// Asks these nodes; those that do not answer have an error.
pub async fn ask<T, F, Fut>(fs: &FileSystem, nodes: Vec<NodeInfo>, ask: F) -> Vec<(NodeInfo, Result<T>)>
where
    F: Fn(Client) -> Fut,
    Fut: Future<Output = std::result::Result<tonic::Response<T>, tonic::Status>>,
{
    let asked = nodes.into_iter().map(|node| {
        let ask = &ask;
        async move {
            let all =
                async { ask(client(fs, &node).await?).await.map(tonic::Response::into_inner).map_err(rpc::error) };
            let answer = match fs.env().clock.timeout(ANSWER_LIMIT, all).await {
                Ok(answer) => answer,
                Err(elapsed) => Err(Error::new(ErrorCode::TimedOut, format!("datanode {}: {elapsed}", node.host))),
            };
            (node, answer)
        }
    });
    futures_util::stream::iter(asked.collect::<Vec<_>>()).buffer_unordered(AT_ONCE).collect().await
}

/// What the nodes hold of a job (empty id: of all jobs), with the node that says it.
pub async fn jobs(fs: &FileSystem, job_id: &str) -> Result<Vec<(NodeInfo, pb::JobOnNode)>> {
    let answers = ask_all(fs, |mut client| {
        let request = pb::ListJobsRequest { job_id: job_id.to_owned() };
        async move { client.list_jobs(request).await }
    });
    let mut found = Vec::new();
    for (node, answer) in answers.await? {
        match answer {
            Ok(answer) => found.extend(answer.jobs.into_iter().map(|job| (node.clone(), job))),
            Err(error) => tracing::debug!(node = node.host, %error, "a node does not say what jobs it has"),
        }
    }
    Ok(found)
}

/// Nodes forget what the stages of a graph have kept there. Where they cannot be told, it is forgotten when it has not been used for a while.
pub async fn release_kept(fs: &FileSystem, graph: &str) {
    let released = ask_all(fs, |mut client| {
        let request = pb::ReleaseKeptRequest { keep: graph.to_owned() };
        async move { client.release_kept(request).await }
    });
    match released.await {
        Ok(answers) => answers.into_iter().filter_map(|(node, answer)| Some((node, answer.err()?))).for_each(
            |(node, error)| tracing::debug!(node = node.host, %error, "what is kept there could not be released"),
        ),
        Err(error) => tracing::debug!(%error, "what is kept on nodes could not be released"),
    }
}

/// Has one of the nodes run a driver for a job that is written down; returns its name.
pub async fn start_driver(fs: &FileSystem, job_id: &str) -> Result<String> {
    let nodes = live_nodes(fs).await?;
    let mut why = Error::new(ErrorCode::NoTargets, "no live datanode runs tasks");
    let first = fs.env().entropy.below(nodes.len() as u64) as usize;
    for node in nodes.iter().cycle().skip(first).take(nodes.len()) {
        let request = pb::StartDriverRequest { job_id: job_id.to_owned(), namenode: fs.namenode_address().to_owned() };
        let start = async {
            let mut client = client(fs, node).await?;
            client.start_driver(request).await.map_err(rpc::error)
        };
        match fs.env().clock.timeout(ANSWER_LIMIT, start).await {
            Ok(Ok(_)) => return Ok(node.host.clone()),
            Ok(Err(error)) => why = error,
            Err(elapsed) => why = Error::new(ErrorCode::TimedOut, format!("datanode {}: {elapsed}", node.host)),
        }
    }
    Err(why)
}

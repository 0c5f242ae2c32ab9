//! Operations on bytes: which datanode does them.
//!
//! A client follows a redirect once and knows no other place, so the address that it gets must work: only nodes are named that the namenode
//! holds for alive, and of these only one that has just taken a connection.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use cairn_common::net::http::{self, Answer, StatusCode, header};
use cairn_common::process;
use cairn_proto::webhdfs::{self, check_offset, encoded_value, no_file, overwrites};
use cairn_proto::{Error, ErrorCode, Result, pb};
use serde_json::json;
use tokio::sync::Mutex;

use super::{Call, found};
use crate::core::Caller;
use crate::http::State;

/// The state of the nodes is looked up again after this time: one answer of the core serves many redirects.
const FRESH_MS: u64 = 500;
/// A node that takes no connection within this time is passed over.
const PROBE: Duration = Duration::from_millis(500);
/// Nodes that are tried; with so many gone there is no use in further ones.
const MOST_PROBES: usize = 8;

/// The last report on the nodes.
#[derive(Default)]
pub struct Nodes {
    last: Mutex<Option<(u64, Arc<pb::ClusterReportResponse>)>>,
}

impl Nodes {
    /// The nodes as they were at most half a second ago.
    pub async fn report(&self, state: &State) -> Result<Arc<pb::ClusterReportResponse>> {
        // Held over the call, so that many who ask at once cost one call.
        let mut last = self.last.lock().await;
        let now_ms = state.env.clock.mono_ms();
        if let Some((_, report)) = last.as_ref().filter(|(at_ms, _)| now_ms < at_ms + FRESH_MS) {
            return Ok(Arc::clone(report));
        }
        let caller = Caller { user: process::user_name(), ..Caller::default() };
        let report = Arc::new(state.owner.call(caller, pb::ClusterReportRequest {}).await?);
        *last = Some((now_ms, Arc::clone(&report)));
        Ok(report)
    }
}

/// What a place is wanted for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Purpose {
    Read,
    Write,
}

impl Call<'_> {
    pub(super) async fn create(&self) -> Result<Answer> {
        // What can be known now is told now: the client has not sent its data yet.
        self.parameters.permission("permission")?;
        self.parameters.permission("unmaskedpermission")?;
        self.parameters.small_number("replication")?;
        self.parameters.number("blocksize")?;
        self.parameters.flag_or("createparent", true)?;
        let overwrite = overwrites(&self.parameters)?;
        let exists = |text: String| Err(Error::new(ErrorCode::FileAlreadyExists, text).with_subject(&self.path));
        match self.status().await {
            Ok(status) if status.kind() == pb::FileKind::Directory => {
                exists(format!("{} already exists as a directory", self.path))
            }
            Ok(_) if !overwrite => exists(format!("{} for client {} already exists", self.path, self.caller.host)),
            Ok(_) => self.redirect("CREATE", Purpose::Write, &[]).await,
            Err(error) if error.code() == ErrorCode::FileNotFound => self.redirect("CREATE", Purpose::Write, &[]).await,
            Err(error) => Err(error),
        }
    }

    pub(super) async fn append(&self) -> Result<Answer> {
        let status = self.status().await?;
        if status.kind() == pb::FileKind::Directory {
            return Err(no_file(Error::new(ErrorCode::NotAFile, ""), &self.path));
        }
        self.redirect("APPEND", Purpose::Write, &[]).await
    }

    pub(super) async fn open(&self) -> Result<Answer> {
        let offset = self.parameters.number("offset")?.unwrap_or(0);
        self.parameters.number("length")?;
        let (status, blocks) = self.locate(offset, 1).await?;
        check_offset(&self.path, offset, status.length)?;
        self.redirect("OPEN", Purpose::Read, &blocks).await
    }

    pub(super) async fn checksum(&self) -> Result<Answer> {
        let (_, blocks) = self.locate(0, 1).await?;
        self.redirect("GETFILECHECKSUM", Purpose::Read, &blocks).await
    }

    /// Sends the client to a datanode, if there is a choice to one that holds a replica of the first of `blocks`, or is on its own host.
    async fn redirect(&self, op: &str, purpose: Purpose, blocks: &[pb::LocatedBlock]) -> Result<Answer> {
        let report = self.state.nodes.report(self.state).await?;
        let excluded: Vec<&str> = self.parameters.get("excludedatanodes").unwrap_or_default().split(',').collect();
        let holders: Vec<&str> = blocks
            .first()
            .map(|block| block.replicas.iter().map(|replica| replica.node_id.as_str()).collect())
            .unwrap_or_default();
        let entropy = &self.state.env.entropy;
        let order = candidates(&report.nodes, purpose, &holders, &excluded, &self.caller.host, |n| entropy.below(n));
        for node in order.iter().take(MOST_PROBES) {
            if let Err(error) = self.state.env.net.connect(&node.http_address, PROBE).await {
                tracing::info!(node = %node.host, %error, "passed over for a WebHDFS redirect");
                continue;
            }
            let location = self.location(op, &node.http_address);
            if self.parameters.flag("noredirect")? {
                return Ok(found(&json!({ "Location": location })));
            }
            return redirect_to(&location);
        }
        let why = if report.nodes.iter().any(|node| node.state() == pb::NodeState::Live && node.http_address.is_empty())
        {
            "no live datanode serves HTTP: start datanodes with --http"
        } else {
            "no datanode is alive and reachable"
        };
        Err(Error::new(ErrorCode::NoTargets, format!("Failed to find datanode for {op} of {}: {why}", self.path)))
    }

    fn location(&self, op: &str, http_address: &str) -> String {
        // The datanode knows its namenode; clients of HDFS expect to see it all the same.
        let namenode = encoded_value(&self.state.rpc_addr.to_string());
        let rest = self.parameters.encode_without(&[
            "op",
            "user.name",
            // The datanode is asked in the name of whom it is done for.
            "doas",
            "namenoderpcaddress",
            "noredirect",
            "excludedatanodes",
        ]);
        let (path, user) = (webhdfs::url_path(&self.path), encoded_value(&self.caller.user));
        format!("http://{http_address}{path}?op={op}&user.name={user}&namenoderpcaddress={namenode}{rest}")
    }
}

fn redirect_to(location: &str) -> Result<Answer> {
    let Ok(value) = header::HeaderValue::from_str(location) else {
        return Err(Error::new(ErrorCode::Internal, "the address of a datanode cannot be sent as a header"));
    };
    let mut answer = http::respond(StatusCode::TEMPORARY_REDIRECT, "application/octet-stream", "");
    answer.headers_mut().insert(header::LOCATION, value);
    Ok(answer)
}

/// Nodes to try, best first: holders of the block in their order, then nodes on the client's host, then any, by chance.
fn candidates<'n>(
    nodes: &'n [pb::NodeReport],
    purpose: Purpose,
    holders: &[&str],
    excluded: &[&str],
    client: &str,
    mut below: impl FnMut(u64) -> u64,
) -> Vec<&'n pb::NodeReport> {
    let serves = |node: &&pb::NodeReport| {
        let state = match (node.state(), purpose) {
            (pb::NodeState::Live, Purpose::Read) => true,
            (pb::NodeState::Live, Purpose::Write) => node.remaining > 0,
            // They still serve what they hold.
            (pb::NodeState::Stale | pb::NodeState::Decommissioning | pb::NodeState::Maintenance, Purpose::Read) => true,
            _ => false,
        };
        state && !node.http_address.is_empty() && !is_excluded(node, excluded)
    };
    let mut order: Vec<&pb::NodeReport> = nodes.iter().filter(serves).collect();
    for at in (1..order.len()).rev() {
        order.swap(at, below(at as u64 + 1) as usize);
    }
    let own = |node: &pb::NodeReport| node.address.rsplit_once(':').is_some_and(|(ip, _)| same_ip(ip, client));
    order.sort_by_key(|node| {
        let held = holders.iter().position(|holder| *holder == node.id).unwrap_or(usize::MAX);
        (node.state() != pb::NodeState::Live, held, !own(node))
    });
    order
}

fn same_ip(one: &str, other: &str) -> bool {
    let ip = |text: &str| text.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>().ok();
    ip(one).is_some_and(|one| Some(one) == ip(other))
}

/// Clients name nodes that failed them by host or address.
fn is_excluded(node: &pb::NodeReport, excluded: &[&str]) -> bool {
    let ip = node.address.rsplit_once(':').map_or(node.address.as_str(), |(ip, _)| ip);
    let names = [node.http_address.as_str(), &node.address, &node.host, ip];
    excluded.iter().any(|name| names.contains(&name.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(at: u8, state: pb::NodeState) -> pb::NodeReport {
        pb::NodeReport {
            id: format!("n{at}"),
            host: format!("dn{at}"),
            address: format!("10.0.0.{at}:9866"),
            http_address: format!("10.0.0.{at}:9864"),
            remaining: 1 << 30,
            state: state as i32,
            ..Default::default()
        }
    }

    fn order(
        nodes: &[pb::NodeReport],
        purpose: Purpose,
        holders: &[&str],
        excluded: &[&str],
        client: &str,
    ) -> Vec<String> {
        candidates(nodes, purpose, holders, excluded, client, |_| 0).iter().map(|node| node.id.clone()).collect()
    }

    #[test]
    fn dead_nodes_and_those_without_http_are_never_named() {
        let mut nodes = vec![node(1, pb::NodeState::Dead), node(2, pb::NodeState::Live), node(3, pb::NodeState::Live)];
        nodes[2].http_address.clear();
        assert_eq!(order(&nodes, Purpose::Read, &["n1", "n3"], &[], "10.0.0.1"), ["n2"]);
        assert_eq!(order(&nodes, Purpose::Write, &[], &["10.0.0.2:9864"], ""), [""; 0]);
    }

    #[test]
    fn holders_come_first_then_the_clients_own_host() {
        let nodes: Vec<_> = (1..=4).map(|at| node(at, pb::NodeState::Live)).collect();
        let found = order(&nodes, Purpose::Read, &["n3", "n1"], &[], "10.0.0.4");
        assert_eq!(found[..3], ["n3", "n1", "n4"]);
        assert_eq!(order(&nodes, Purpose::Write, &[], &[], "10.0.0.2")[0], "n2");
        assert_eq!(order(&nodes, Purpose::Read, &["n3", "n1"], &["dn3", " 10.0.0.1"], "")[..2].len(), 2);
        assert!(!order(&nodes, Purpose::Read, &["n3"], &["dn3"], "").contains(&"n3".to_owned()));
    }

    #[test]
    fn a_stale_holder_is_the_last_resort_of_a_reader_and_takes_no_writer() {
        let mut nodes = vec![node(1, pb::NodeState::Stale), node(2, pb::NodeState::Live), node(3, pb::NodeState::Live)];
        nodes[2].remaining = 0;
        assert_eq!(order(&nodes, Purpose::Read, &["n1", "n2"], &[], ""), ["n2", "n3", "n1"]);
        assert_eq!(order(&nodes, Purpose::Write, &[], &[], ""), ["n2"]);
    }
}

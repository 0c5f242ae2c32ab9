//! Where the blocks of a file lie: in the shape of `FileSystem.getFileBlockLocations`, and in the older one of located blocks.

use std::collections::HashMap;

use cairn_common::net::http::Answer;
use cairn_proto::webhdfs::no_file;
use cairn_proto::{Result, pb};
use serde_json::{Value, json};

use super::get::length_of;
use super::{Call, found};

/// An answer of the core with fewer blocks is whole.
const MANY_BLOCKS: usize = 1_000;
/// An empty token as Hadoop writes one.
const NO_TOKEN: &str = "AAAAAA";

impl Call<'_> {
    /// The status of a file and its blocks in a range (length 0: to the end).
    pub(super) async fn locate(&self, offset: u64, length: u64) -> Result<(pb::FileStatus, Vec<pb::LocatedBlock>)> {
        let end = if length == 0 { u64::MAX } else { offset.saturating_add(length) };
        let (mut at, mut blocks) = (offset, Vec::<pb::LocatedBlock>::new());
        loop {
            let length = if end == u64::MAX { 0 } else { end - at };
            let request = pb::GetBlockLocationsRequest { path: self.path.clone(), offset: at, length };
            let answer: Result<pb::GetBlockLocationsResponse> = self.ask(request).await;
            let answer = answer.map_err(|error| no_file(error, &self.path))?;
            let many = answer.blocks.len() >= MANY_BLOCKS;
            // What is still being written comes with every answer.
            let known: Vec<i64> = blocks.iter().rev().take(2).filter_map(id).collect();
            blocks.extend(answer.blocks.into_iter().filter(|block| !id(block).is_some_and(|id| known.contains(&id))));
            let reached = blocks.last().map_or(at, |last| last.offset + last.length);
            if !many || reached <= at || reached >= end {
                return Ok((answer.status.unwrap_or_default(), blocks));
            }
            at = reached;
        }
    }

    async fn asked_blocks(&self) -> Result<(pb::FileStatus, Vec<pb::LocatedBlock>)> {
        let offset = self.parameters.number("offset")?.unwrap_or(0);
        match length_of(&self.parameters)? {
            Some(length) => self.locate(offset, length).await,
            None => self.locate(offset, 1).await.map(|(status, _)| (status, Vec::new())),
        }
    }

    pub(super) async fn block_locations(&self) -> Result<Answer> {
        let (_, blocks) = self.asked_blocks().await?;
        let blocks: Vec<Value> = blocks.iter().map(block_location).collect();
        Ok(found(&json!({ "BlockLocations": { "BlockLocation": blocks } })))
    }

    pub(super) async fn located_blocks(&self) -> Result<Answer> {
        let (status, blocks) = self.asked_blocks().await?;
        let report = self.state.nodes.report(self.state).await?;
        let http_ports = report.nodes.iter().map(|node| (node.id.as_str(), port_of(&node.http_address))).collect();
        let last = match status.length {
            0 => None,
            length => self.locate(length - 1, 1).await?.1.pop(),
        };
        Ok(found(&located_blocks(&status, &blocks, last.as_ref(), &http_ports)))
    }
}

fn id(block: &pb::LocatedBlock) -> Option<i64> {
    block.block.as_ref().map(|block| block.id)
}

fn port_of(address: &str) -> u16 {
    address.rsplit_once(':').and_then(|(_, port)| port.parse().ok()).unwrap_or(0)
}

fn ip_of(address: &str) -> &str {
    address.rsplit_once(':').map_or(address, |(ip, _)| ip).trim_start_matches('[').trim_end_matches(']')
}

fn storage_type(replica: &pb::Replica) -> &'static str {
    replica.storage_type().as_str_name()
}

fn block_location(block: &pb::LocatedBlock) -> Value {
    let each = |text: fn(&pb::Replica) -> String| block.replicas.iter().map(text).collect::<Vec<_>>();
    json!({
        "cachedHosts": [],
        "corrupt": block.corrupt,
        "hosts": each(|replica| replica.host.clone()),
        "length": block.length,
        "names": each(|replica| replica.address.clone()),
        "offset": block.offset,
        "storageTypes": each(|replica| storage_type(replica).to_owned()),
        "topologyPaths": each(|replica| format!("{}/{}", replica.rack, replica.address)),
    })
}

fn located_blocks(
    status: &pb::FileStatus,
    blocks: &[pb::LocatedBlock],
    last: Option<&pb::LocatedBlock>,
    http_ports: &HashMap<&str, u16>,
) -> Value {
    let blocks: Vec<Value> = blocks.iter().map(|block| located_block(block, http_ports)).collect();
    json!({ "LocatedBlocks": {
        "fileLength": status.length,
        "isLastBlockComplete": last.is_none_or(|block| block.complete),
        "isUnderConstruction": status.open,
        "lastLocatedBlock": last.map(|block| located_block(block, http_ports)),
        "locatedBlocks": blocks,
    }})
}

fn located_block(located: &pb::LocatedBlock, http_ports: &HashMap<&str, u16>) -> Value {
    let block = located.block.clone().unwrap_or_default();
    let node = |replica: &pb::Replica| {
        json!({
            "adminState": "NORMAL",
            "hostName": replica.host,
            "infoPort": http_ports.get(replica.node_id.as_str()).copied().unwrap_or(0),
            "infoSecurePort": 0,
            "ipAddr": ip_of(&replica.address),
            "ipcPort": port_of(&replica.address),
            "name": replica.address,
            "networkLocation": replica.rack,
            "storageID": replica.node_id,
            "xferPort": port_of(&replica.address),
        })
    };
    json!({
        "block": {
            "blockId": block.id,
            "blockPoolId": block.pool,
            "generationStamp": block.generation,
            "numBytes": located.length,
        },
        "blockToken": { "urlString": NO_TOKEN },
        "cachedLocations": [],
        "isCorrupt": located.corrupt,
        "locations": located.replicas.iter().map(node).collect::<Vec<_>>(),
        "startOffset": located.offset,
        "storageTypes": located.replicas.iter().map(storage_type).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn located() -> pb::LocatedBlock {
        let replica = pb::Replica {
            node_id: "n1".into(),
            host: "dn1".into(),
            address: "10.0.0.1:9866".into(),
            rack: "/r1".into(),
            ..Default::default()
        };
        pb::LocatedBlock {
            block: Some(pb::Block { pool: "p".into(), id: 7, generation: 1_001 }),
            offset: 512,
            length: 100,
            replicas: vec![replica],
            complete: true,
            ..Default::default()
        }
    }

    #[test]
    fn a_location_names_hosts_addresses_and_racks() {
        assert_eq!(
            block_location(&located()),
            json!({
                "cachedHosts": [], "corrupt": false, "hosts": ["dn1"], "length": 100, "names": ["10.0.0.1:9866"],
                "offset": 512, "storageTypes": ["DISK"], "topologyPaths": ["/r1/10.0.0.1:9866"]
            })
        );
    }

    #[test]
    fn a_located_block_has_all_that_java_demands() {
        let ports = HashMap::from([("n1", 9_864)]);
        let status = pb::FileStatus { length: 612, ..Default::default() };
        let value = located_blocks(&status, &[located()], Some(&located()), &ports);
        let block = json!({
            "block": { "blockId": 7, "blockPoolId": "p", "generationStamp": 1_001, "numBytes": 100 },
            "blockToken": { "urlString": "AAAAAA" },
            "cachedLocations": [],
            "isCorrupt": false,
            "locations": [{
                "adminState": "NORMAL", "hostName": "dn1", "infoPort": 9_864, "infoSecurePort": 0, "ipAddr": "10.0.0.1",
                "ipcPort": 9_866, "name": "10.0.0.1:9866", "networkLocation": "/r1", "storageID": "n1", "xferPort": 9_866
            }],
            "startOffset": 512,
            "storageTypes": ["DISK"]
        });
        assert_eq!(
            value,
            json!({ "LocatedBlocks": {
                "fileLength": 612, "isLastBlockComplete": true, "isUnderConstruction": false,
                "lastLocatedBlock": block, "locatedBlocks": [block]
            }})
        );
        assert_eq!(ip_of("[::1]:9866"), "::1");
    }
}

//! Where the blocks of a file lie: in the shape of `FileSystem.getFileBlockLocations`, and in the older one of located blocks.
//!
//! # Limits
//! A file may have millions of blocks: an answer of more than one page of the core is sent page by page as the client takes it. Each page must be of
//! the file of the first one; if another one is in its place by then, the answer breaks off.

use cairn_common::net::http::{self, Answer, Bytes, StatusCode};
use cairn_proto::webhdfs::no_file;
use cairn_proto::{Error, ErrorCode, Result, pb};
use futures_util::stream;
use serde_json::{Value, json};

use super::Call;
use super::get::length_of;
use crate::core::Caller;
use crate::server::OwnerRef;

/// An answer of the core with fewer blocks is whole.
const MANY_BLOCKS: usize = 1_000;
/// An empty token as Hadoop writes one.
const NO_TOKEN: &str = "AAAAAA";

impl Call<'_> {
    /// The status of a file and the first of its blocks in a range (length 0: to the end).
    pub(super) async fn locate(&self, offset: u64, length: u64) -> Result<(pb::FileStatus, Vec<pb::LocatedBlock>)> {
        let mut pages = Pages::new(self, offset, length);
        let blocks = pages.next().await?.unwrap_or_default();
        Ok((pages.status, blocks))
    }

    /// The blocks that are asked for, behind the first page of them; `None`: a length of 0 asks for none.
    async fn asked_blocks(&self) -> Result<(Pages, Vec<pb::LocatedBlock>)> {
        let offset = self.parameters.number("offset")?.unwrap_or(0);
        let length = length_of(&self.parameters)?;
        let mut pages = Pages::new(self, offset, length.unwrap_or(1));
        let first = pages.next().await?.unwrap_or_default();
        if length.is_none() {
            pages.at = None;
            return Ok((pages, Vec::new()));
        }
        Ok((pages, first))
    }

    pub(super) async fn block_locations(&self) -> Result<Answer> {
        let (pages, first) = self.asked_blocks().await?;
        Ok(pages.answer("{\"BlockLocations\":{\"BlockLocation\":[", first, block_location, "]}}"))
    }

    pub(super) async fn located_blocks(&self) -> Result<Answer> {
        let (pages, first) = self.asked_blocks().await?;
        let status = &pages.status;
        let last = match status.length {
            0 => None,
            length => self.locate(length - 1, 1).await?.1.pop(),
        };
        let about = about_blocks(status, last.as_ref());
        // The list is the last member.
        let begin = format!("{{\"LocatedBlocks\":{{{},\"locatedBlocks\":[", &about[1..about.len() - 1]);
        Ok(pages.answer(&begin, first, located_block, "]}}"))
    }
}

/// The blocks of a range of one file, page by page; owns what it needs, since it outlives the call.
struct Pages {
    owner: OwnerRef,
    caller: Caller,
    path: String,
    /// Of the file, as the first page told it.
    status: pb::FileStatus,
    /// Where the next page begins; `None`: all were given.
    at: Option<u64>,
    end: u64,
    /// The last blocks that were given: what is still being written may come with every page.
    given: Vec<i64>,
}

impl Pages {
    fn new(call: &Call<'_>, offset: u64, length: u64) -> Self {
        Self::of(call.state.owner.clone(), call.caller.clone(), call.path.clone(), offset, length)
    }

    fn of(owner: OwnerRef, caller: Caller, path: String, offset: u64, length: u64) -> Self {
        Self {
            owner,
            caller,
            path,
            status: pb::FileStatus::default(),
            at: Some(offset),
            end: if length == 0 { u64::MAX } else { offset.saturating_add(length) },
            given: Vec::new(),
        }
    }

    async fn next(&mut self) -> Result<Option<Vec<pb::LocatedBlock>>> {
        let Some(at) = self.at.take() else { return Ok(None) };
        let length = if self.end == u64::MAX { 0 } else { self.end - at };
        let request = pb::GetBlockLocationsRequest { path: self.path.clone(), offset: at, length };
        let answer: Result<pb::GetBlockLocationsResponse> = self.owner.call(self.caller.clone(), request).await;
        let answer = answer.map_err(|error| no_file(error, &self.path))?;
        let status = answer.status.unwrap_or_default();
        if self.status.inode == 0 {
            self.status = status;
        } else if self.status.inode != status.inode {
            let text = format!("{} became another file while its blocks were listed", self.path);
            return Err(Error::new(ErrorCode::FileNotFound, text).with_subject(&self.path));
        }
        // What is still being written lies behind all that has a length.
        let many = answer.blocks.len() >= MANY_BLOCKS;
        let is_new = |block: &pb::LocatedBlock| !id(block).is_some_and(|id| self.given.contains(&id));
        let blocks: Vec<_> = answer.blocks.into_iter().filter(is_new).collect();
        let reached = blocks.last().map_or(at, |last| last.offset + last.length);
        self.given = blocks.iter().rev().take(2).filter_map(id).collect();
        let more = many || reached < self.status.length;
        self.at = (more && reached > at && reached < self.end).then_some(reached);
        Ok(Some(blocks))
    }

    /// `begin`, the blocks with commas between them, `end`.
    fn answer(
        self,
        begin: &str,
        first: Vec<pb::LocatedBlock>,
        shape: fn(&pb::LocatedBlock) -> Value,
        end: &'static str,
    ) -> Answer {
        let text = move |blocks: &[pb::LocatedBlock]| {
            blocks.iter().map(|block| shape(block).to_string()).collect::<Vec<_>>().join(",")
        };
        let mut begin = format!("{begin}{}", text(&first));
        if self.at.is_none() {
            begin.push_str(end);
            return http::json(StatusCode::OK, begin);
        }
        let pieces = stream::unfold((Some(self), Some(begin)), move |(pages, ready)| async move {
            let mut pages = pages?;
            if let Some(begin) = ready {
                return Some((Ok(Bytes::from(begin)), (Some(pages), None)));
            }
            match pages.next().await {
                Ok(None) => Some((Ok(Bytes::from_static(end.as_bytes())), (None, None))),
                Ok(Some(blocks)) if blocks.is_empty() => Some((Ok(Bytes::from_static(end.as_bytes())), (None, None))),
                Ok(Some(blocks)) => Some((Ok(Bytes::from(format!(",{}", text(&blocks)))), (Some(pages), None))),
                Err(error) => Some((Err(error), (None, None))),
            }
        });
        http::stream("application/json", None, pieces)
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

/// What is said of a file beside the list of its blocks: a JSON object.
fn about_blocks(status: &pb::FileStatus, last: Option<&pb::LocatedBlock>) -> String {
    let about = json!({
        "fileLength": status.length,
        "isLastBlockComplete": last.is_none_or(|block| block.complete),
        "isUnderConstruction": status.open,
        "lastLocatedBlock": last.map(located_block),
    });
    about.to_string()
}

fn located_block(located: &pb::LocatedBlock) -> Value {
    let block = located.block.clone().unwrap_or_default();
    let node = |replica: &pb::Replica| {
        json!({
            "adminState": "NORMAL",
            "hostName": replica.host,
            "infoPort": replica.http_port,
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
    use crate::hadoop::tests::World;

    fn located() -> pb::LocatedBlock {
        let replica = pb::Replica {
            node_id: "n1".into(),
            host: "dn1".into(),
            address: "10.0.0.1:9866".into(),
            rack: "/r1".into(),
            http_port: 9_864,
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
        assert_eq!(located_block(&located()), block);
        let status = pb::FileStatus { length: 612, ..Default::default() };
        let about: Value = serde_json::from_str(&about_blocks(&status, Some(&located()))).unwrap();
        let expected = json!({
            "fileLength": 612, "isLastBlockComplete": true, "isUnderConstruction": false, "lastLocatedBlock": block
        });
        assert_eq!(about, expected);
        assert_eq!(ip_of("[::1]:9866"), "::1");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_long_list_is_sent_in_pages_of_one_file() {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let world = World::cluster().await;
        let caller = Caller { user: world.root.clone(), ..Caller::default() };
        world.write("/f", &[512; 450]).await;
        let http = world.namenode.http_addr.unwrap().to_string();
        for (op, list) in [
            ("GETFILEBLOCKLOCATIONS", "/BlockLocations/BlockLocation"),
            ("GET_BLOCK_LOCATIONS", "/LocatedBlocks/locatedBlocks"),
        ] {
            let mut conn = world.env.net.connect(&http, std::time::Duration::from_secs(5)).await.unwrap();
            // HTTP/1.0 gets its answer as it is, without chunks.
            let head = format!("GET /webhdfs/v1/f?op={op}&user.name={} HTTP/1.0\r\n\r\n", world.root);
            conn.write_all(head.as_bytes()).await.unwrap();
            let mut got = String::new();
            conn.read_to_string(&mut got).await.unwrap();
            let body: Value = serde_json::from_str(got.split_once("\r\n\r\n").unwrap().1).unwrap();
            let list = body.pointer(list).unwrap().as_array().unwrap();
            assert_eq!(list.len(), 450, "{op}");
        }
        let owner = world.namenode.owner_for_tests().clone();
        let mut pages = Pages::of(owner, caller, "/f".into(), 0, 0);
        assert_eq!(pages.next().await.unwrap().unwrap().len(), 200);
        let delete = cairn_proto::hadoop::DeleteRequest { src: "/f".into(), recursive: false };
        assert!(world.yes("delete", delete).await);
        world.write("/f", &[512; 450]).await;
        let error = pages.next().await.unwrap_err();
        assert!(error.message().contains("became another file"), "{error}");
        world.end().await;
    }
}

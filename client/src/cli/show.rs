//! The JSON shapes that scripts rely on, and words for the enumerations of the wire.
//!
//! Keys may be added; those here stay, in this order.

use cairn_client::fs::{FileKind, FileStatus, NodeState, ReplicaState};
use serde::Serialize;

use crate::modes;

/// An entry of `ls`, and what `stat` and `find` print.
#[derive(Serialize, Debug)]
pub struct StatusJson<'a> {
    path: &'a str,
    r#type: &'static str,
    length: u64,
    replication: u32,
    block_size: u64,
    owner: &'a str,
    group: &'a str,
    permission: String,
    modified_ms: u64,
}

impl<'a> From<&'a FileStatus> for StatusJson<'a> {
    fn from(status: &'a FileStatus) -> Self {
        Self {
            path: &status.path,
            r#type: kind(status),
            length: status.length,
            replication: status.replication,
            block_size: status.block_size,
            owner: &status.owner,
            group: &status.group,
            permission: modes::show(status.permission),
            modified_ms: status.modified_ms,
        }
    }
}

/// What `blocks` prints.
#[derive(Serialize, Debug)]
pub struct BlocksJson<'a> {
    pub path: &'a str,
    pub length: u64,
    pub replication: u32,
    pub block_size: u64,
    pub blocks: Vec<BlockJson>,
}

/// One block; `stored` is null if no datanode that has it answers.
#[derive(Serialize, Debug)]
pub struct BlockJson {
    pub id: i64,
    pub generation: u64,
    pub offset: u64,
    pub length: u64,
    pub stored: Option<u64>,
    pub replicas: Vec<ReplicaJson>,
}

/// One replica of a block.
#[derive(Serialize, Debug)]
pub struct ReplicaJson {
    pub node: String,
    pub host: String,
    pub rack: String,
    pub state: &'static str,
}

/// What `fsck` prints.
#[derive(Serialize, Debug, Default, PartialEq, Eq, Clone)]
pub struct FsckJson {
    pub status: &'static str,
    pub files: u64,
    pub blocks: u64,
    pub missing: u64,
    pub corrupt: u64,
    pub under_replicated: u64,
    pub mis_replicated: u64,
    pub over_replicated: u64,
    pub directories: u64,
    pub bytes: u64,
    pub open_files: u64,
    /// With `--verify`: replicas read and found whole.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verified_replicas: Option<u64>,
    /// With `--verify`: blocks of which no replica could be read and compared, because none of their nodes answered.
    pub unverified: u64,
    /// Damaged files below `/lost+found` that an earlier `--fix` has put there; they do not count.
    pub set_aside: u64,
    /// Bytes of files that no replica has whole.
    pub lost_bytes: u64,
    /// Which files lose what.
    pub lost: Vec<LostJson>,
    /// What is wrong, one entry per block or replica.
    pub problems: Vec<ProblemJson>,
    /// With `--fix`: what became of the damaged files.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fixed: Option<Vec<FixedJson>>,
}

/// A range of a file that no replica has whole.
#[derive(Serialize, Debug, PartialEq, Eq, Clone)]
pub struct LostJson {
    pub path: String,
    pub block: i64,
    pub offset: u64,
    pub length: u64,
    pub reason: String,
}

/// What `fsck --fix` did with a damaged file.
#[derive(Serialize, Debug, PartialEq, Eq, Clone)]
pub struct FixedJson {
    pub path: String,
    /// Where it was moved to; none: it was left alone.
    pub target: Option<String>,
    /// Runs of whole blocks that were copied out of it, and their bytes.
    pub salvaged_files: u64,
    pub salvaged_bytes: u64,
    /// Why it was left alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// A block that `fsck` found something about.
#[derive(Serialize, Debug, PartialEq, Eq, Clone)]
pub struct ProblemJson {
    pub path: String,
    pub block: i64,
    /// Of the block in the file.
    pub offset: u64,
    pub length: u64,
    /// Host of the replica that it is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replica: Option<String>,
    pub problem: String,
}

/// What `admin report` prints.
#[derive(Serialize, Debug)]
pub struct ReportJson {
    pub nodes: Vec<NodeJson>,
    pub capacity: u64,
    pub used: u64,
    pub under_replicated: u64,
    pub missing: u64,
    pub safemode: bool,
    pub remaining: u64,
    pub corrupt: u64,
    pub mis_replicated: u64,
    pub over_replicated: u64,
    pub pending_replication: u64,
    pub pending_deletion: u64,
    pub safemode_reason: String,
    pub files: u64,
    pub directories: u64,
    pub blocks: u64,
    pub last_txid: u64,
    pub last_checkpoint_txid: u64,
    pub epoch: u64,
    pub restored_to_txid: u64,
    pub archived_txid: u64,
    pub archive_failure: String,
    pub archive_hole: Option<HoleJson>,
    pub metadata_dirs: u32,
    pub metadata_dirs_configured: u32,
}

/// Transactions that the archive lacks, both included.
#[derive(Serialize, Debug)]
pub struct HoleJson {
    pub from: u64,
    pub to: u64,
}

/// A datanode.
#[derive(Serialize, Debug)]
pub struct NodeJson {
    pub id: String,
    pub host: String,
    pub rack: String,
    pub state: &'static str,
    pub capacity: u64,
    pub used: u64,
    pub remaining: u64,
    pub blocks: u64,
    pub last_heartbeat_ms: u64,
    pub addr: String,
    pub active_transfers: u32,
    pub task_slots: u32,
    pub tasks_running: u32,
}

/// The line that `local` prints when it is ready.
#[derive(Serialize, Debug)]
pub struct LocalJson {
    pub namenode: LocalNamenodeJson,
    pub datanodes: Vec<LocalDatanodeJson>,
}

/// The namenode of a local cluster; `http` serves its metrics.
#[derive(Serialize, Debug)]
pub struct LocalNamenodeJson {
    pub rpc: String,
    pub http: String,
    pub pid: u32,
    pub dir: String,
}

/// A datanode of a local cluster: its id is the one that `admin report` and `blocks` show, its name is their host.
#[derive(Serialize, Debug)]
pub struct LocalDatanodeJson {
    pub id: String,
    pub name: String,
    pub addr: String,
    pub rack: String,
    pub dir: String,
    pub pid: u32,
}

/// "file" or "directory".
pub fn kind(status: &FileStatus) -> &'static str {
    if is_directory(status) { "directory" } else { "file" }
}

/// Is it one?
pub fn is_directory(status: &FileStatus) -> bool {
    status.kind() == FileKind::Directory
}

/// The word for a replica's state.
pub fn replica_state(state: ReplicaState) -> &'static str {
    match state {
        ReplicaState::Finalized => "finalized",
        ReplicaState::BeingWritten => "being_written",
        ReplicaState::Recovering => "recovering",
        ReplicaState::ReplicaCorrupt => "corrupt",
        ReplicaState::ReplicaStale => "stale",
    }
}

/// The word for a node's state.
pub fn node_state(state: NodeState) -> &'static str {
    match state {
        NodeState::Live => "live",
        NodeState::Stale => "stale",
        NodeState::Dead => "dead",
        NodeState::Decommissioning => "decommissioning",
        NodeState::Decommissioned => "decommissioned",
        NodeState::Maintenance => "maintenance",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shape_of_a_status_is_frozen() {
        let status = FileStatus {
            path: "/a".into(),
            length: 5,
            replication: 3,
            block_size: 512,
            owner: "ann".into(),
            group: "staff".into(),
            permission: 0o644,
            modified_ms: 7,
            ..Default::default()
        };
        let expected = r#"{"path":"/a","type":"file","length":5,"replication":3,"block_size":512,"owner":"ann","group":"staff","permission":"rw-r--r--","modified_ms":7}"#;
        assert_eq!(serde_json::to_string(&StatusJson::from(&status)).unwrap(), expected);
    }

    #[test]
    fn the_shape_of_blocks_is_frozen() {
        let replica = ReplicaJson { node: "n".into(), host: "dn1".into(), rack: "/r".into(), state: "finalized" };
        let block = BlockJson { id: 1, generation: 2, offset: 0, length: 5, stored: Some(9), replicas: vec![replica] };
        let json = BlocksJson { path: "/a", length: 5, replication: 1, block_size: 512, blocks: vec![block] };
        let expected = r#"{"path":"/a","length":5,"replication":1,"block_size":512,"blocks":[{"id":1,"generation":2,"offset":0,"length":5,"stored":9,"replicas":[{"node":"n","host":"dn1","rack":"/r","state":"finalized"}]}]}"#;
        assert_eq!(serde_json::to_string(&json).unwrap(), expected);
    }

    #[test]
    fn the_keys_of_fsck_and_report_and_local_stay() {
        let keys = |value: serde_json::Value| -> Vec<String> {
            value.as_object().map(|object| object.keys().cloned().collect()).unwrap_or_default()
        };
        let fsck = keys(serde_json::to_value(FsckJson::default()).unwrap());
        for key in
            ["status", "files", "blocks", "missing", "corrupt", "under_replicated", "mis_replicated", "over_replicated"]
        {
            assert!(fsck.iter().any(|have| have == key), "{key}");
        }
        let namenode = LocalNamenodeJson { rpc: "r".into(), http: String::new(), pid: 1, dir: "d".into() };
        let datanode = LocalDatanodeJson {
            id: "u".into(),
            name: "dn1".into(),
            addr: "a".into(),
            rack: "/r".into(),
            dir: "d".into(),
            pid: 2,
        };
        let json = LocalJson { namenode, datanodes: vec![datanode] };
        let expected = r#"{"namenode":{"rpc":"r","http":"","pid":1,"dir":"d"},"datanodes":[{"id":"u","name":"dn1","addr":"a","rack":"/r","dir":"d","pid":2}]}"#;
        assert_eq!(serde_json::to_string(&json).unwrap(), expected);
    }
}

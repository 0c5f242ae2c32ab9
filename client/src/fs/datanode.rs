//! Connections to datanodes and the questions asked of single replicas.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use cairn_common::Env;
use cairn_common::net::{self, Conn, opening};
use cairn_proto::frame::FRAME_HEADER_BYTES;
use cairn_proto::{Error, ErrorCode, Result, pb};
use pb::data_request::Op;

use super::namenode::lock;
use super::reader::Buffers;
use super::settings::ClientSettings;
use super::{Block, FileSystem, LocatedBlock, Replica, ReplicaInfoReply};

/// Idle connections kept per datanode.
const IDLE_PER_NODE: usize = 4;
/// An idle connection older than this may have been closed by its datanode.
const IDLE_MS: u64 = 5_000;
/// Checking a whole replica reads it from the disk.
const VERIFY_TIMEOUT: Duration = Duration::from_secs(600);

/// Idle connections, and the nodes that failed lately.
pub(crate) struct Datanodes {
    env: Env,
    hello: pb::Hello,
    connect_timeout: Duration,
    answer_timeout: Duration,
    avoid_ms: u64,
    local_node: Option<String>,
    local_rack: Option<String>,
    idle: Mutex<HashMap<String, Vec<Idle>>>,
    avoid_until_ms: Mutex<HashMap<String, u64>>,
    buffers: Buffers,
    pub(super) hedges: Hedges,
}

/// Counts of reads for which a second replica was asked.
#[derive(Default)]
pub(crate) struct Hedges {
    pub(crate) started: AtomicU64,
    pub(crate) won: AtomicU64,
}

struct Idle {
    conn: Conn,
    since_ms: u64,
}

/// What a person calls a replica's node in a message.
pub(crate) fn node_name(replica: &Replica) -> String {
    if replica.host.is_empty() || replica.address.starts_with(&replica.host) {
        replica.address.clone()
    } else {
        format!("{} ({})", replica.host, replica.address)
    }
}

/// "block 7 (generation 1001)".
pub(crate) fn block_name(block: &Block) -> String {
    format!("block {} (generation {})", block.id, block.generation)
}

impl Datanodes {
    pub(crate) fn new(env: Env, settings: &ClientSettings, hello: pb::Hello) -> Self {
        Self {
            env,
            hello,
            connect_timeout: settings.connect_timeout(),
            answer_timeout: Duration::from_millis(settings.read_stall_ms),
            avoid_ms: settings.avoid_node_ms,
            local_node: settings.local_node.clone(),
            local_rack: settings.local_rack.clone(),
            idle: Mutex::default(),
            avoid_until_ms: Mutex::default(),
            // A frame is read together with the header after it.
            buffers: Buffers::new(settings.frame_bytes as usize + FRAME_HEADER_BYTES),
            hedges: Hedges::default(),
        }
    }

    /// Where frames are read into.
    pub(crate) fn buffers(&self) -> &Buffers {
        &self.buffers
    }

    /// A new connection.
    pub(crate) async fn dial(&self, address: &str) -> Result<Conn> {
        opening::open_data(&self.env.net, address, &self.hello, self.connect_timeout).await
    }

    /// Sends a request and reads its first reply, on an idle connection if there is one that still works.
    pub(crate) async fn ask<M: prost::Message + Default>(
        &self,
        address: &str,
        op: Op,
        timeout: Duration,
    ) -> Result<(Conn, M)> {
        let request = pb::DataRequest { op: Some(op) };
        if let Some(conn) = self.take_idle(address) {
            // Any failure may be that of a connection which the datanode closed meanwhile: a new one tells.
            if let Ok(answered) = self.exchange(conn, address, &request, timeout).await {
                return Ok(answered);
            }
        }
        let conn = self.dial(address).await?;
        self.exchange(conn, address, &request, timeout).await
    }

    async fn exchange<M: prost::Message + Default>(
        &self,
        mut conn: Conn,
        address: &str,
        request: &pb::DataRequest,
        timeout: Duration,
    ) -> Result<(Conn, M)> {
        let talk = async {
            let sent = net::write_message(&mut conn, request).await;
            sent.map_err(|error| Error::io(format!("sending to {address}"), &error).with_subject(address))?;
            net::read_message(&mut conn, address).await
        };
        match self.env.clock.timeout(timeout, talk).await {
            Ok(reply) => reply.map(|reply| (conn, reply)),
            Err(elapsed) => Err(Error::new(ErrorCode::TimedOut, format!("{address}: {elapsed}")).with_subject(address)),
        }
    }

    fn take_idle(&self, address: &str) -> Option<Conn> {
        let now_ms = self.env.clock.mono_ms();
        let mut idle = lock(&self.idle);
        let conns = idle.get_mut(address)?;
        let newest = conns.pop()?;
        if now_ms.saturating_sub(newest.since_ms) > IDLE_MS {
            conns.clear();
            return None;
        }
        Some(newest.conn)
    }

    /// Keeps a connection whose last operation ended in order.
    pub(crate) fn keep(&self, address: &str, conn: Conn) {
        let since_ms = self.env.clock.mono_ms();
        let mut idle = lock(&self.idle);
        let conns = idle.entry(address.to_owned()).or_default();
        if conns.len() >= IDLE_PER_NODE {
            conns.remove(0);
        }
        conns.push(Idle { conn, since_ms });
    }

    /// Puts a node that failed last for a while.
    pub(crate) fn avoid(&self, replica: &Replica) {
        let until_ms = self.env.clock.mono_ms() + self.avoid_ms;
        lock(&self.avoid_until_ms).insert(replica.node_id.clone(), until_ms);
    }

    /// The replicas in the order in which to try them: those on this process's own node and rack first if it was told which, else as given
    /// (nearest first); those of nodes that failed lately last.
    pub(crate) fn in_order(&self, replicas: &[Replica]) -> Vec<Replica> {
        let now_ms = self.env.clock.mono_ms();
        let mut avoid = lock(&self.avoid_until_ms);
        avoid.retain(|_, until_ms| *until_ms > now_ms);
        let mut ordered = replicas.to_vec();
        // The sort is stable: where this client knows no better the namenode's order stays.
        ordered.sort_by_key(|replica| {
            let elsewhere = self.local_node.as_ref().is_some_and(|node| *node != replica.node_id);
            let far = self.local_rack.as_ref().is_some_and(|rack| *rack != replica.rack);
            (avoid.contains_key(&replica.node_id), elsewhere, far)
        });
        ordered
    }

    pub(crate) async fn info(&self, replica: &Replica, block: &Block, with_checksum: bool) -> Result<ReplicaInfoReply> {
        let op = Op::Info(pb::ReplicaInfo { block: Some(block.clone()), with_checksum, fence_generation: 0 });
        let (conn, mut reply) = self.ask::<ReplicaInfoReply>(&replica.address, op, self.answer_timeout).await?;
        self.keep(&replica.address, conn);
        match reply.error.take() {
            Some(error) => Err(Error::from_wire(error)),
            None => Ok(reply),
        }
    }

    async fn verify(&self, replica: &Replica, block: &Block) -> Result<pb::VerifyReplicaReply> {
        let op = Op::Verify(pb::VerifyReplica { block: Some(block.clone()) });
        let (conn, mut reply) = self.ask::<pb::VerifyReplicaReply>(&replica.address, op, VERIFY_TIMEOUT).await?;
        self.keep(&replica.address, conn);
        match reply.error.take() {
            Some(error) => Err(Error::from_wire(error)),
            None => Ok(reply),
        }
    }
}

/// A checksum of a file's bytes: equal for equal bytes, whatever the block size, framing and compression.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FileChecksum {
    /// CRC-32C of all bytes.
    pub crc32c: u32,
    /// Bytes of the file.
    pub length: u64,
}

impl FileSystem {
    /// How often a second replica was asked because the first was slow (`hedged_after_ms`), and how often it was the faster one.
    pub fn hedged_reads(&self) -> (u64, u64) {
        let hedges = &self.inner.datanodes.hedges;
        (hedges.started.load(Ordering::Relaxed), hedges.won.load(Ordering::Relaxed))
    }

    /// Opens a connection to a datanode's data port, for operations that this library has no call for.
    pub async fn data_connection(&self, address: &str) -> Result<Conn> {
        self.inner.datanodes.dial(address).await
    }

    /// Asks a datanode about its replica: length, size on disk, state and (if asked) the CRC-32C of its data.
    pub async fn replica_info(
        &self,
        replica: &Replica,
        block: &Block,
        with_checksum: bool,
    ) -> Result<ReplicaInfoReply> {
        self.inner.datanodes.info(replica, block, with_checksum).await
    }

    /// Makes a datanode read its whole replica and check every checksum. An error of kind
    /// [`Corrupt`](cairn_proto::ErrorKind::Corrupt) or `NotFound` is about the replica, others are about reaching it.
    pub async fn verify_replica(&self, replica: &Replica, block: &Block) -> Result<pb::VerifyReplicaReply> {
        self.inner.datanodes.verify(replica, block).await
    }

    /// The CRC-32C of a closed file, folded from what its blocks' writers took: no data is read.
    pub async fn file_checksum(&self, path: &str) -> Result<FileChecksum> {
        let (status, blocks) = self.locate(path, 0, 0).await?;
        if status.kind() == super::FileKind::Directory {
            return Err(Error::new(ErrorCode::NotAFile, format!("{path} is a directory")).with_subject(path));
        }
        let mut sum = FileChecksum { crc32c: 0, length: 0 };
        for located in &blocks {
            let info = self.checksum_of(path, located).await?;
            let length = usize::try_from(info.length).unwrap_or(usize::MAX);
            sum.crc32c = crc32c::crc32c_combine(sum.crc32c, info.crc32c, length);
            sum.length += info.length;
        }
        Ok(sum)
    }

    async fn checksum_of(&self, path: &str, located: &LocatedBlock) -> Result<ReplicaInfoReply> {
        let block = located.block.clone().unwrap_or_default();
        let mut failures = Vec::new();
        for replica in self.inner.datanodes.in_order(&located.replicas) {
            match self.inner.datanodes.info(&replica, &block, true).await {
                Ok(info) if info.length == located.length || !located.complete => return Ok(info),
                Ok(info) => failures.push(format!("{} holds {} bytes", node_name(&replica), info.length)),
                Err(error) => failures.push(format!("{}: {error}", node_name(&replica))),
            }
        }
        let name = block_name(&block);
        let why = if failures.is_empty() { "it has no replica".into() } else { failures.join("; ") };
        let text = format!("no replica of {name} of {path} gives its checksum: {why}");
        Err(Error::new(ErrorCode::BlockNotFound, text).with_subject(path))
    }
}

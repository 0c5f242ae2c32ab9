//! Help for tests: nodes without a namenode, and a small writer and reader.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use cairn_common::Env;
use cairn_common::net::{self, Conn, opening};
use cairn_proto::dataplane::{Marker, MarkerKind};
use cairn_proto::frame::{FRAME_HEADER_BYTES, Frame, FrameHeader, Sealer};
use cairn_proto::ids::{BlockId, Generation};
use cairn_proto::{Error, ErrorCode, Result, pb};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{Semaphore, watch};

use crate::daemon::{self, CONNECTIONS};
use crate::settings::DatanodeSettings;
use crate::store::BlockStore;
use crate::store::writer::Chunk;
use crate::transfer::Transfer;

pub const POOL: &str = "pool-1";
pub const GEN: Generation = Generation(1_001);

/// Data that does not shrink.
pub fn random(bytes: usize, mut seed: u64) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes + 8);
    seed = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    while out.len() < bytes {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        out.extend_from_slice(&seed.to_le_bytes());
    }
    out.truncate(bytes);
    out
}

/// Data that shrinks.
pub fn text(bytes: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes + 40);
    let mut line = 0;
    while out.len() < bytes {
        out.extend_from_slice(format!("line {line} of some text that repeats\n").as_bytes());
        line += 1;
    }
    out.truncate(bytes);
    out
}

/// Frames of `frame` bytes from `from` on.
pub fn frames(block: BlockId, data: &[u8], from: usize, frame: usize, compress: bool) -> Vec<Frame> {
    let mut sealer = Sealer::new(compress);
    let mut out = Vec::new();
    let mut at = from;
    while at < data.len() {
        let end = (at + frame).min(data.len());
        out.push(sealer.seal(block, at as u64, Bytes::copy_from_slice(&data[at..end]), compress));
        at = end;
    }
    out
}

pub fn chunk(frames: &[Frame]) -> Chunk {
    let bytes: Vec<u8> = frames.iter().flat_map(|f| f.header_bytes.iter().chain(f.payload.iter()).copied()).collect();
    Chunk { parts: vec![bytes.into()], headers: frames.iter().map(|frame| frame.header).collect() }
}

pub fn settings(dirs: &[&Path]) -> DatanodeSettings {
    DatanodeSettings {
        dirs: dirs.iter().map(|dir| dir.to_path_buf()).collect(),
        listen: "127.0.0.1:0".into(),
        reserved_bytes: 0,
        // A busy machine must not look like a dead node.
        connect_timeout_ms: 20_000,
        pipeline_timeout_ms: 20_000,
        ..Default::default()
    }
}

/// A store that belongs to a cluster. The lock of one that was dropped may outlive it for a moment: a process that another test starts has it
/// from its fork to its exec.
pub async fn open_store(settings: &DatanodeSettings) -> Arc<BlockStore> {
    let env = Env::system();
    let limit_ms = env.clock.mono_ms() + 10_000;
    let store = loop {
        match BlockStore::open(&env, settings).await {
            Err(error) if error.code() == ErrorCode::AlreadyBeingCreated && env.clock.mono_ms() < limit_ms => {
                env.clock.sleep(Duration::from_millis(1)).await;
            }
            opened => break opened.unwrap(),
        }
    };
    store.join_cluster("cluster-1", POOL, 1).await.unwrap();
    store
}

/// A data port over a store; no namenode.
pub struct Node {
    pub transfer: Arc<Transfer>,
    pub addr: String,
    _dir: tempfile::TempDir,
    registered: watch::Sender<u64>,
}

impl Node {
    pub async fn start() -> Self {
        Self::with(|_| {}).await
    }

    pub async fn with(adjust: impl FnOnce(&mut DatanodeSettings)) -> Self {
        Self::over(tempfile::tempdir().unwrap(), adjust).await
    }

    /// Over a folder that may hold replicas already.
    pub async fn over(dir: tempfile::TempDir, adjust: impl FnOnce(&mut DatanodeSettings)) -> Self {
        let mut settings = settings(&[dir.path()]);
        adjust(&mut settings);
        let store = open_store(&settings).await;
        let env = Env::system();
        let listener = env.net.bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().to_string();
        let transfer = Transfer::new(&env, &Arc::new(settings), &store, None, None);
        let (registered, seen) = watch::channel(1);
        let places = Arc::new(Semaphore::new(CONNECTIONS as usize));
        tokio::spawn(daemon::accept(Arc::clone(&transfer), listener, seen, places, None));
        Self { transfer, addr, _dir: dir, registered }
    }

    pub fn target(&self) -> pb::Replica {
        let _ = &self.registered;
        pb::Replica { address: self.addr.clone(), ..Default::default() }
    }

    pub fn store(&self) -> &Arc<BlockStore> {
        &self.transfer.store
    }
}

pub fn block_of(block: BlockId, generation: Generation) -> Option<pb::Block> {
    Some(pb::Block { pool: POOL.into(), id: block.0, generation: generation.0 })
}

pub async fn dial(addr: &str) -> Conn {
    let hello = pb::Hello { user: "test".into(), role: "client".into(), ..Default::default() };
    opening::open_data(&net::Net::tcp(), addr, &hello, Duration::from_secs(30)).await.unwrap()
}

pub async fn ask(conn: &mut Conn, op: pb::data_request::Op) {
    net::write_message(conn, &pb::DataRequest { op: Some(op) }).await.unwrap();
}

/// A writer that sends and reads by hand.
pub struct Pipe {
    pub conn: Conn,
    pub block: BlockId,
    pub storage_ids: Vec<String>,
}

pub fn setup(block: BlockId, targets: &[&Node]) -> pb::WriteBlock {
    pb::WriteBlock {
        block: block_of(block, GEN),
        stage: pb::WriteStage::PipelineSetup as i32,
        targets: targets.iter().skip(1).map(|node| node.target()).collect(),
        block_size: 128 << 20,
        client_name: "test".into(),
        ..Default::default()
    }
}

impl Pipe {
    pub async fn open(addr: &str, request: pb::WriteBlock) -> Result<Self, (Error, u32)> {
        let mut conn = dial(addr).await;
        let block = BlockId(request.block.as_ref().unwrap().id);
        ask(&mut conn, pb::data_request::Op::Write(request)).await;
        let ready: pb::WriteReady = net::read_message(&mut conn, addr).await.unwrap();
        match ready.error {
            Some(error) => Err((Error::from_wire(error), ready.failed_index)),
            None => Ok(Self { conn, block, storage_ids: ready.storage_ids }),
        }
    }

    pub async fn send(&mut self, frames: &[Frame]) {
        for frame in frames {
            // The pipeline may break meanwhile: its acks tell.
            let _ = self.conn.write_all(&frame.header_bytes).await;
            let _ = self.conn.write_all(&frame.payload).await;
        }
    }

    pub async fn mark(&mut self, kind: MarkerKind, length: usize) {
        let marker = Marker { kind, length: length as u64 };
        let _ = self.conn.write_all(&marker.encode(self.block)).await;
    }

    pub async fn ack(&mut self) -> pb::WriteAck {
        let read = net::read_message(&mut self.conn, "pipeline");
        tokio::time::timeout(Duration::from_secs(30), read).await.unwrap().unwrap()
    }

    /// Reads acks until one of this kind (or an error).
    pub async fn wait_for(&mut self, kind: pb::AckKind) -> pb::WriteAck {
        loop {
            let ack = self.ack().await;
            if ack.kind() == kind || ack.kind() == pb::AckKind::AckError {
                return ack;
            }
        }
    }

    /// Reads acks of progress until `length` is held.
    pub async fn wait_held(&mut self, length: usize) {
        while self.ack().await.length < length as u64 {}
    }
}

/// Writes a whole block through `nodes`.
pub async fn write_block(nodes: &[&Node], block: BlockId, data: &[u8], compress: bool) {
    let mut pipe = Pipe::open(&nodes[0].addr, setup(block, nodes)).await.unwrap();
    assert_eq!(pipe.storage_ids.len(), nodes.len());
    let (mut reader, mut writer) = pipe.conn.split();
    let frames = frames(block, data, 0, 256 << 10, compress);
    let finish = Marker { kind: MarkerKind::Finish, length: data.len() as u64 }.encode(block);
    let send = async {
        for frame in &frames {
            writer.write_all(&frame.header_bytes).await.unwrap();
            writer.write_all(&frame.payload).await.unwrap();
        }
        writer.write_all(&finish).await.unwrap();
    };
    let acks = async {
        let mut last = 0;
        loop {
            let ack: pb::WriteAck = net::read_message(&mut reader, "pipeline").await.unwrap();
            assert!(ack.length >= last, "acks are cumulative");
            last = ack.length;
            match ack.kind() {
                pb::AckKind::AckFinished => break assert_eq!(last, data.len() as u64),
                pb::AckKind::AckError => panic!("{ack:?}"),
                _ => {}
            }
        }
    };
    tokio::join!(send, acks);
    pipe.storage_ids.clear();
}

/// Reads a range, verified and decompressed.
pub async fn read_range(
    addr: &str,
    block: BlockId,
    generation: Generation,
    offset: u64,
    length: u64,
) -> Result<Vec<u8>> {
    let mut conn = dial(addr).await;
    let request = pb::ReadBlock { block: block_of(block, generation), offset, length, token: Bytes::new() };
    ask(&mut conn, pb::data_request::Op::Read(request)).await;
    let ready: pb::ReadReady = net::read_message(&mut conn, addr).await?;
    if let Some(error) = ready.error {
        return Err(Error::from_wire(error));
    }
    let mut left = ready.frame_bytes as usize;
    let (mut out, mut first) = (Vec::new(), None);
    while left > 0 {
        let mut header = [0; FRAME_HEADER_BYTES];
        conn.read_exact(&mut header).await.unwrap();
        let header = FrameHeader::decode(block, &header).unwrap();
        first.get_or_insert(header.offset);
        let mut payload = vec![0; header.stored_len as usize];
        conn.read_exact(&mut payload).await.unwrap();
        out.extend_from_slice(&header.open(payload.into()).unwrap());
        left -= header.frame_bytes();
    }
    let skip = (offset - first.unwrap_or(offset)) as usize;
    Ok(out[skip..skip + length as usize].to_vec())
}

pub async fn info(addr: &str, block: BlockId) -> pb::ReplicaInfoReply {
    let mut conn = dial(addr).await;
    let request = pb::ReplicaInfo { block: block_of(block, Generation(0)), with_checksum: true, fence_generation: 0 };
    ask(&mut conn, pb::data_request::Op::Info(request)).await;
    net::read_message(&mut conn, addr).await.unwrap()
}

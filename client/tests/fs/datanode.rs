//! A datanode that does as its script says: it keeps replicas in memory, forwards unit by unit, and fails where it is told to.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

use bytes::Bytes;
use cairn_common::Env;
use cairn_common::net::opening::{self, Opening, ServerIdentity};
use cairn_common::net::{Conn, read_message, write_message};
use cairn_proto::dataplane::{MarkerKind, Unit};
use cairn_proto::frame::{FRAME_HEADER_BYTES, FrameHeader};
use cairn_proto::ids::BlockId;
use cairn_proto::{Error, ErrorCode, Result, pb};
use pb::data_request::Op;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Connections (client's end, server's end) on which a node has stalled. The node above sees it here and waits for all others, so that the right one
/// is blamed however slow the machine is: these nodes do not repeat their acks as real ones do.
static STALLED: LazyLock<watch::Sender<HashSet<(SocketAddr, SocketAddr)>>> = LazyLock::new(watch::Sender::default);

/// Stalls on a connection until the node is gone.
struct Stall((SocketAddr, SocketAddr));

impl Stall {
    fn on(conn: &Conn) -> Self {
        let ends = (conn.peer_addr(), conn.local_addr());
        STALLED.send_modify(|stalled| {
            stalled.insert(ends);
        });
        Self(ends)
    }
}

impl Drop for Stall {
    fn drop(&mut self) {
        STALLED.send_modify(|stalled| {
            stalled.remove(&self.0);
        });
    }
}

/// What the node below says, unless it has stalled.
async fn answer_of(next: &mut Conn) -> Result<pb::WriteAck> {
    let ends = (next.local_addr(), next.peer_addr());
    let mut stalled = STALLED.subscribe();
    tokio::select! {
        ack = read_message(next, "next") => ack,
        _ = stalled.wait_for(|stalled| stalled.contains(&ends)) => {
            Err(Error::new(ErrorCode::TimedOut, "the next one is silent"))
        }
    }
}

/// What a datanode does wrong, each once unless said otherwise.
#[derive(Clone, Default, Debug)]
pub struct Script {
    /// Refuses new replicas, always.
    pub refuse_setup: bool,
    /// Behaves until it was asked to write so often.
    pub after_writes: usize,
    /// Says `Busy` to so many new replicas.
    pub busy_setups: usize,
    /// Never answers the first request for a new replica.
    pub stall_setup: bool,
    /// Says nothing more when a replica would reach this length, and keeps the connection.
    pub stall_at: Option<u64>,
    /// Says nothing more at the first sync.
    pub stall_sync: bool,
    /// Says nothing more at the first finish.
    pub stall_finish: bool,
    /// Finishes, but the connection breaks before the ack.
    pub lose_finish_ack: bool,
    /// Refuses to join a pipeline, always.
    pub refuse_join: bool,
    /// As the target of a partial copy: drops the connection in the middle, so many times.
    pub drop_partial: usize,
    /// As the source of a partial copy: fails so, once.
    pub fail_source: Option<ErrorCode>,
    /// Says `Busy` to so many recoveries.
    pub busy_recoveries: usize,
    /// Says `Busy` to so many reads.
    pub busy_reads: usize,
    /// Drops the connection when a replica would reach this length.
    pub drop_at: Option<u64>,
    /// The same, each time.
    pub always_drop_at: Option<u64>,
    /// Says `DiskFull` when a replica would reach this length.
    pub err_at: Option<u64>,
    /// Drops the connection instead of finishing.
    pub drop_finish: bool,
    /// Serves frames with a flipped bit, always.
    pub corrupt_reads: bool,
    /// Drops the connection after so many frames of a read, always.
    pub cut_reads: Option<usize>,
    /// Sends nothing more after so many frames of a read, and keeps the connection open, always.
    pub stall_reads: Option<usize>,
    /// Has been started again since open replicas were written, and has so many frames of each left.
    pub found_at_start: Option<usize>,
    /// Was left out: says that its replicas are too old.
    pub stale: bool,
}

#[derive(Clone, Default)]
pub struct StoredReplica {
    pub generation: u64,
    pub frames: Vec<(FrameHeader, [u8; FRAME_HEADER_BYTES], Bytes)>,
    pub finalized: bool,
    /// Of a replica that was finalized when its pipeline was recovered: what it held, to be compared.
    pub was: Option<Vec<FrameHeader>>,
}

impl StoredReplica {
    pub fn length(&self) -> u64 {
        self.frames.last().map_or(0, |(header, ..)| header.end())
    }
}

#[derive(Default)]
pub struct State {
    pub script: Script,
    pub replicas: HashMap<i64, StoredReplica>,
    pub reads: usize,
    pub writes: usize,
    /// Partial copies taken to their end.
    pub joined: usize,
}

pub struct FakeDatanode {
    pub replica: pb::Replica,
    pub state: Arc<Mutex<State>>,
    server: JoinHandle<()>,
}

impl FakeDatanode {
    pub async fn start(env: &Env, name: &str, script: Script) -> Self {
        let listener = env.net.bind("127.0.0.1:0").await.unwrap();
        let replica = pb::Replica {
            node_id: name.into(),
            host: name.into(),
            address: listener.local_addr().to_string(),
            rack: "/rack1".into(),
            ..Default::default()
        };
        let state = Arc::new(Mutex::new(State { script, ..Default::default() }));
        let (env, shared) = (env.clone(), Arc::clone(&state));
        let server = tokio::spawn(async move {
            let mut peers = tokio::task::JoinSet::new();
            loop {
                let conn = listener.accept().await.unwrap();
                let (env, state) = (env.clone(), Arc::clone(&shared));
                peers.spawn(async move {
                    let opened = opening::read_opening(conn, &ServerIdentity::default(), &env.clock).await;
                    if let Ok(Opening::Data { conn, .. }) = opened {
                        // An error ends the connection, as in the real one.
                        let _ = serve(&env, conn, &state).await;
                    }
                });
            }
        });
        Self { replica, state, server }
    }

    /// Gone, with all its connections.
    pub fn kill(&self) {
        self.server.abort();
    }
}

impl Drop for FakeDatanode {
    fn drop(&mut self) {
        self.kill();
    }
}

async fn serve(env: &Env, mut conn: Conn, state: &Mutex<State>) -> Result<()> {
    loop {
        let request: pb::DataRequest = read_message(&mut conn, "client").await?;
        match request.op {
            Some(Op::Write(write)) => return serve_write(env, conn, state, write).await,
            Some(Op::Transfer(order)) => serve_transfer(env, &mut conn, state, order).await?,
            Some(Op::Read(read)) => serve_read(&mut conn, state, read).await?,
            Some(Op::Info(info)) => serve_info(&mut conn, state, &info).await?,
            other => panic!("unexpected {other:?}"),
        }
    }
}

fn io(error: std::io::Error) -> Error {
    Error::io("fake", &error)
}

async fn send(conn: &mut Conn, message: &impl prost::Message) -> Result<()> {
    write_message(conn, message).await.map_err(io)
}

async fn serve_write(env: &Env, mut conn: Conn, state: &Mutex<State>, write: pb::WriteBlock) -> Result<()> {
    let block = write.block.clone().unwrap();
    let stage = write.stage();
    if stage == pb::WriteStage::PipelineSetup && std::mem::take(&mut state.lock().unwrap().script.stall_setup) {
        std::future::pending::<()>().await;
    }
    let refused = {
        let mut state = state.lock().unwrap();
        state.writes += 1;
        if state.script.refuse_setup || (stage == pb::WriteStage::PipelineTransfer && state.script.refuse_join) {
            Some(ErrorCode::Io)
        } else if stage == pb::WriteStage::PipelineSetup && state.script.busy_setups > 0 {
            state.script.busy_setups -= 1;
            Some(ErrorCode::Busy)
        } else if stage == pb::WriteStage::PipelineRecovery && state.script.busy_recoveries > 0 {
            state.script.busy_recoveries -= 1;
            Some(ErrorCode::Busy)
        } else if stage == pb::WriteStage::PipelineRecovery {
            let absent = StoredReplica { generation: write.old_generation, ..Default::default() };
            let replica = match write.keep_length {
                0 => state.replicas.entry(block.id).or_insert(absent),
                _ => state.replicas.get_mut(&block.id).expect("a survivor holds the replica"),
            };
            if write.keep_length == 0 && replica.generation < write.old_generation {
                *replica = StoredReplica { generation: write.old_generation, ..Default::default() };
            }
            assert!(replica.generation >= write.old_generation && replica.generation <= block.generation);
            replica.generation = block.generation;
            if replica.finalized {
                replica.was = Some(replica.frames.iter().map(|(header, ..)| *header).collect());
            }
            replica.finalized = false;
            replica.frames.retain(|(header, ..)| header.end() <= write.keep_length);
            assert_eq!(replica.length(), write.keep_length, "kept length is a frame boundary that it holds");
            None
        } else {
            let fresh = StoredReplica { generation: block.generation, ..Default::default() };
            state.replicas.insert(block.id, fresh);
            None
        }
    };
    if let Some(code) = refused {
        let error = Some(Error::new(code, "scripted").to_wire());
        return send(&mut conn, &pb::WriteReady { error, failed_index: 0, storage_ids: vec![] }).await;
    }
    let mut storage_ids = vec![format!("storage-of-{}", conn.local_addr())];
    let mut below = None;
    if let Some((next, rest)) = write.targets.split_first() {
        match open_below(env, &write, next, rest).await {
            Ok((conn, ids)) => {
                storage_ids.extend(ids);
                below = Some(conn);
            }
            Err((failed_index, error)) => {
                let error = Some(error.to_wire());
                return send(&mut conn, &pb::WriteReady { error, failed_index, storage_ids: vec![] }).await;
            }
        }
    }
    send(&mut conn, &pb::WriteReady { error: None, failed_index: 0, storage_ids }).await?;
    let partial = stage == pb::WriteStage::PipelineTransfer;
    take_units(conn, below, state, &block, partial).await
}

/// Sends the first bytes of a replica to a node that joins the pipeline.
async fn serve_transfer(env: &Env, conn: &mut Conn, state: &Mutex<State>, order: pb::TransferBlock) -> Result<()> {
    let block = order.block.unwrap();
    let failure = state.lock().unwrap().script.fail_source.take();
    let outcome = match failure {
        Some(code) => Err((0, Error::new(code, "scripted source"))),
        None => {
            let replica = state.lock().unwrap().replicas.get(&block.id).cloned().expect("a survivor holds the replica");
            assert!(replica.generation >= block.generation && replica.generation < order.new_generation);
            let target = order.target.unwrap();
            let write = pb::WriteBlock {
                block: Some(pb::Block { generation: order.new_generation, ..block }),
                stage: pb::WriteStage::PipelineTransfer as i32,
                ..Default::default()
            };
            send_partial(env, &write, &target, &replica, order.length).await
        }
    };
    let ack = match outcome {
        Ok(()) => pb::WriteAck { kind: pb::AckKind::AckFinished as i32, length: order.length, ..Default::default() },
        Err((failed_index, error)) => {
            let (kind, error) = (pb::AckKind::AckError as i32, Some(error.to_wire()));
            pb::WriteAck { kind, error, failed_index, ..Default::default() }
        }
    };
    send(conn, &ack).await
}

async fn send_partial(
    env: &Env,
    write: &pb::WriteBlock,
    target: &pb::Replica,
    replica: &StoredReplica,
    length: u64,
) -> Result<(), (u32, Error)> {
    let (mut conn, _) = open_below(env, write, target, &[]).await?;
    let sent = async {
        let id = BlockId(write.block.as_ref().unwrap().id);
        let kept = replica.frames.iter().filter(|(header, ..)| header.end() <= length);
        let mut at = 0;
        for (frame, header, payload) in kept {
            conn.write_all(header).await.map_err(io)?;
            conn.write_all(payload).await.map_err(io)?;
            let _: pb::WriteAck = read_message(&mut conn, "target").await?;
            at = frame.end();
        }
        assert_eq!(at, length, "what is copied ends with a frame");
        let finish = cairn_proto::dataplane::Marker { kind: MarkerKind::Finish, length };
        conn.write_all(&finish.encode(id)).await.map_err(io)?;
        read_message::<pb::WriteAck>(&mut conn, "target").await
    };
    match sent.await {
        Ok(ack) if ack.kind() == pb::AckKind::AckFinished => Ok(()),
        Ok(ack) => Err((1, Error::from_wire(ack.error.unwrap()))),
        Err(error) => Err((1, error)),
    }
}

async fn open_below(
    env: &Env,
    write: &pb::WriteBlock,
    next: &pb::Replica,
    rest: &[pb::Replica],
) -> Result<(Conn, Vec<String>), (u32, Error)> {
    let hello = pb::Hello { user: "dn".into(), role: "datanode".into(), ..Default::default() };
    let dialled = opening::open_data(&env.net, &next.address, &hello, Duration::from_secs(60)).await;
    let mut conn = dialled.map_err(|error| (1, error))?;
    let request = pb::WriteBlock { targets: rest.to_vec(), ..write.clone() };
    send(&mut conn, &pb::DataRequest { op: Some(Op::Write(request)) }).await.map_err(|error| (1, error))?;
    let ready: pb::WriteReady = read_message(&mut conn, &next.address).await.map_err(|error| (1, error))?;
    match ready.error {
        Some(error) => Err((ready.failed_index + 1, Error::from_wire(error))),
        None => Ok((conn, ready.storage_ids)),
    }
}

async fn take_units(
    mut conn: Conn,
    mut below: Option<Conn>,
    state: &Mutex<State>,
    block: &pb::Block,
    partial: bool,
) -> Result<()> {
    let id = BlockId(block.id);
    loop {
        let mut header = [0; FRAME_HEADER_BYTES];
        conn.read_exact(&mut header).await.map_err(io)?;
        let unit = Unit::decode(id, &header).expect("a unit that verifies");
        let mut payload = Vec::new();
        if let Unit::Frame(frame) = &unit {
            payload = vec![0; frame.stored_len as usize];
            conn.read_exact(&mut payload).await.map_err(io)?;
            frame.verify_stored(&payload).expect("a payload that verifies");
        }
        if partial {
            let mut state = state.lock().unwrap();
            if state.script.drop_partial > 0 {
                state.script.drop_partial -= 1;
                state.replicas.remove(&block.id);
                return Err(Error::new(ErrorCode::Internal, "scripted drop"));
            }
            let whole = matches!(unit, Unit::Marker(marker) if marker.kind == MarkerKind::Finish);
            state.joined += usize::from(whole);
        }
        if stalls(state, &unit) {
            // As a stopped process: nothing more is read or said, the connection stays.
            let _stall = Stall::on(&conn);
            std::future::pending::<()>().await;
        }
        if let Some(error) = misbehave(state, &unit)? {
            let ack =
                pb::WriteAck { kind: pb::AckKind::AckError as i32, error: Some(error.to_wire()), ..Default::default() };
            return send(&mut conn, &ack).await;
        }
        let length = keep(state, block, &unit, &header, &payload, partial);
        if let Some(next) = &mut below {
            let forwarded = async {
                next.write_all(&header).await.map_err(io)?;
                next.write_all(&payload).await.map_err(io)?;
                answer_of(next).await
            };
            let failed = match forwarded.await {
                Ok(ack) if ack.kind() == pb::AckKind::AckError => {
                    Some((ack.failed_index + 1, Error::from_wire(ack.error.unwrap())))
                }
                Ok(_) => None,
                Err(error) => Some((1, error)),
            };
            if let Some((failed_index, error)) = failed {
                let (kind, error) = (pb::AckKind::AckError as i32, Some(error.to_wire()));
                return send(&mut conn, &pb::WriteAck { kind, length, error, failed_index, behind: 0 }).await;
            }
        }
        let finish = matches!(unit, Unit::Marker(marker) if marker.kind == MarkerKind::Finish);
        if finish && std::mem::take(&mut state.lock().unwrap().script.lose_finish_ack) {
            return Err(Error::new(ErrorCode::Internal, "scripted drop"));
        }
        let kind = match unit {
            Unit::Frame(_) => pb::AckKind::AckProgress,
            Unit::Marker(marker) => match marker.kind {
                MarkerKind::Finish => pb::AckKind::AckFinished,
                MarkerKind::Flush => pb::AckKind::AckFlushed,
                MarkerKind::Sync => pb::AckKind::AckSynced,
                MarkerKind::Heartbeat => pb::AckKind::AckProgress,
            },
        };
        send(&mut conn, &pb::WriteAck { kind: kind as i32, length, ..Default::default() }).await?;
        if kind == pb::AckKind::AckFinished {
            return Ok(());
        }
    }
}

/// Whether this is where the node stalls.
fn stalls(state: &Mutex<State>, unit: &Unit) -> bool {
    let state = &mut *state.lock().unwrap();
    let script = &mut state.script;
    if state.writes <= script.after_writes {
        return false;
    }
    match unit {
        Unit::Frame(frame) if script.stall_at.is_some_and(|at| frame.end() >= at) => {
            script.stall_at = None;
            true
        }
        Unit::Marker(marker) if marker.kind == MarkerKind::Sync => std::mem::take(&mut script.stall_sync),
        Unit::Marker(marker) if marker.kind == MarkerKind::Finish => std::mem::take(&mut script.stall_finish),
        _ => false,
    }
}

/// `Err` drops the connection, `Some` is said upwards.
fn misbehave(state: &Mutex<State>, unit: &Unit) -> Result<Option<Error>> {
    let mut state = state.lock().unwrap();
    if state.writes <= state.script.after_writes {
        return Ok(None);
    }
    let dropped = || Error::new(ErrorCode::Internal, "scripted drop");
    match unit {
        Unit::Frame(frame) => {
            if state.script.drop_at.is_some_and(|at| frame.end() >= at) {
                state.script.drop_at = None;
                return Err(dropped());
            }
            if state.script.always_drop_at.is_some_and(|at| frame.end() >= at) {
                return Err(dropped());
            }
            if state.script.err_at.is_some_and(|at| frame.end() >= at) {
                state.script.err_at = None;
                return Ok(Some(Error::new(ErrorCode::DiskFull, "scripted full disk")));
            }
        }
        Unit::Marker(marker) if marker.kind == MarkerKind::Finish && state.script.drop_finish => {
            state.script.drop_finish = false;
            return Err(dropped());
        }
        Unit::Marker(_) => {}
    }
    Ok(None)
}

fn keep(
    state: &Mutex<State>,
    block: &pb::Block,
    unit: &Unit,
    header: &[u8; FRAME_HEADER_BYTES],
    payload: &[u8],
    partial: bool,
) -> u64 {
    let mut state = state.lock().unwrap();
    let replica = state.replicas.get_mut(&block.id).unwrap();
    match unit {
        Unit::Frame(frame) => {
            assert_eq!(frame.offset, replica.length(), "frames follow each other");
            if let Some(was) = &replica.was {
                assert!(was.contains(frame), "what is sent again is what was finalized");
            }
            replica.frames.push((*frame, *header, Bytes::copy_from_slice(payload)));
        }
        Unit::Marker(marker) => {
            assert_eq!(marker.length, replica.length(), "a marker tells the length before it");
            replica.finalized |= marker.kind == MarkerKind::Finish && !partial;
            if let Some(was) = replica.was.as_ref().filter(|_| marker.kind == MarkerKind::Finish) {
                assert_eq!(was.len(), replica.frames.len(), "what is sent again is all that was finalized");
            }
        }
    }
    replica.length()
}

async fn serve_read(conn: &mut Conn, state: &Mutex<State>, read: pb::ReadBlock) -> Result<()> {
    let block = read.block.unwrap();
    let found = {
        let mut state = state.lock().unwrap();
        state.reads += 1;
        let script = state.script.clone();
        if script.busy_reads > 0 {
            state.script.busy_reads -= 1;
            Err(ErrorCode::Busy)
        } else {
            let replica = state.replicas.get(&block.id).cloned();
            replica.map(|replica| (replica, script)).ok_or(ErrorCode::BlockNotFound)
        }
    };
    let (replica, script) = match found {
        Ok(found) => found,
        Err(code) => {
            let error = Some(Error::new(code, "not here").to_wire());
            return send(conn, &pb::ReadReady { error, ..Default::default() }).await;
        }
    };
    let wanted = |header: &FrameHeader| header.end() > read.offset && header.offset < read.offset + read.length;
    let mut out = Vec::new();
    let mut cut_at = usize::MAX;
    for (k, (_, header, payload)) in replica.frames.iter().filter(|(header, ..)| wanted(header)).enumerate() {
        if script.cut_reads == Some(k) || script.stall_reads == Some(k) {
            cut_at = out.len() + 10;
        }
        out.extend_from_slice(header);
        out.extend_from_slice(payload);
    }
    let frame_bytes = out.len() as u64;
    if script.corrupt_reads && !out.is_empty() {
        let last = out.len() - 1;
        out[last] ^= 1;
    }
    let ready = pb::ReadReady { frame_bytes, replica_length: replica.length(), ..Default::default() };
    send(conn, &ready).await?;
    conn.write_all(&out[..cut_at.min(out.len())]).await.map_err(io)?;
    if script.stall_reads.is_some() && cut_at < out.len() {
        // Until the reader closes.
        let _ = conn.read_u8().await;
    }
    if cut_at < out.len() { Err(Error::new(ErrorCode::Internal, "scripted cut")) } else { Ok(()) }
}

async fn serve_info(conn: &mut Conn, state: &Mutex<State>, info: &pb::ReplicaInfo) -> Result<()> {
    let (replica, script) = {
        let state = state.lock().unwrap();
        (state.replicas.get(&info.block.as_ref().unwrap().id).cloned(), state.script.clone())
    };
    let reply = match replica {
        Some(_) if script.stale => pb::ReplicaInfoReply {
            error: Some(Error::new(ErrorCode::StaleGeneration, "scripted").to_wire()),
            ..Default::default()
        },
        None => pb::ReplicaInfoReply {
            error: Some(Error::new(ErrorCode::BlockNotFound, "not here").to_wire()),
            ..Default::default()
        },
        Some(mut replica) => {
            let found_at_start = script.found_at_start.filter(|_| !replica.finalized);
            replica.frames.truncate(found_at_start.unwrap_or(usize::MAX));
            let state = if replica.finalized { pb::ReplicaState::Finalized } else { pb::ReplicaState::BeingWritten };
            let fold = |crc, (header, ..): &(FrameHeader, _, _)| {
                crc32c::crc32c_combine(crc, header.raw_crc, header.raw_len as usize)
            };
            pb::ReplicaInfoReply {
                length: replica.length(),
                generation: replica.generation,
                state: state as i32,
                crc32c: replica.frames.iter().fold(0, fold),
                found_at_start: found_at_start.is_some(),
                ..Default::default()
            }
        }
    };
    send(conn, &reply).await
}

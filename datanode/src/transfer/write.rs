//! One node of a write pipeline.
//!
//! # Overview
//! ```text
//!            frames                        frames
//! upstream ---------> feed --------------------------------> next node
//!                       \--(bounded)--> disk task               |
//! upstream <--------- acks <-- events --/     <-- acks ---------/
//! ```
//! Upstream is a connection, or a door of this node ([`super::upstream`]).
//! `feed` verifies each frame, forwards it and hands it to the disk; forwarding does not wait for the disk unless its queue is full. `acks` merges
//! what the disk and the next node hold. The disk task is a task of its own and always runs to its end.
//!
//! # Consistency
//! An ack of length L means that this node and all below hold L bytes, verified. A finished replica is reported to the namenode before its ack.
//!
//! # Crash, loss of a connection
//! What was written stays as a recovering replica; a writer that comes back with a new generation goes on with it, after this one was stopped.

use std::future::pending;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use cairn_common::net::{self, Conn, opening};
use cairn_proto::dataplane::{self, Marker, MarkerKind};
use cairn_proto::ids::{BlockId, Generation};
use cairn_proto::{Error, ErrorCode, MAX_BLOCK_SIZE, MAX_REPLICATION, Result, pb};
use tokio::io::{AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::mpsc;

use super::Transfer;
use super::ack::{Acks, Event, Progress};
use super::budget::WriterBudget;
use super::disk::{self, Job, Sink};
use super::upstream::{Down, Up, drain};
use super::wire::{Item, UnitReader};
use crate::store::ops::{NewReplica, Recovered, Recovery};
use crate::store::writer::{Chunk, OpenReplica};

/// Events that may wait.
const EVENTS: usize = 256;
/// After an error the rest of the stream is read and dropped for this long, so that the peer gets to read the reason.
pub(crate) const LINGER: Duration = Duration::from_secs(2);

/// Why a write ended.
#[derive(Debug)]
pub struct Broken {
    /// What happened.
    pub error: Error,
    /// Index of the node that failed, 0 = this one; `None`: the writer itself is gone, nobody is to be told.
    pub index: Option<u32>,
}

impl Broken {
    /// This node failed.
    pub fn here(error: Error) -> Self {
        Self { error, index: Some(0) }
    }

    /// A node below failed; `index` as the next node counts.
    pub fn below(error: Error, index: u32) -> Self {
        Self { error, index: Some(index.saturating_add(1)) }
    }

    /// The writer is gone.
    pub fn above(error: Error) -> Self {
        Self { error, index: None }
    }
}

/// The open pipeline below this node.
struct Below {
    address: String,
    reader: ReadHalf<Conn>,
    writer: WriteHalf<Conn>,
    storage_ids: Vec<String>,
}

/// A checked request.
struct Plan {
    block: BlockId,
    generation: Generation,
    request: pb::WriteBlock,
}

/// Serves one write; the connection ends with it.
pub async fn serve(transfer: &Arc<Transfer>, mut conn: Conn, request: pb::WriteBlock) {
    let peer = conn.peer_addr();
    let (block, stage) = (request.block.as_ref().map_or(0, |block| block.id), request.stage());
    match open_pipeline(transfer, request).await {
        Err(Broken { error, index }) => {
            tracing::warn!("block {block} ({stage:?}) from {peer} refused: {error}");
            let ready =
                pb::WriteReady { error: Some(error.to_wire()), failed_index: index.unwrap_or(0), storage_ids: vec![] };
            let _ = net::write_message(&mut conn, &ready).await;
            let _ = conn.shutdown().await;
            let _ = transfer.env.clock.timeout(LINGER, drain(&mut conn)).await;
        }
        Ok(opened) => {
            let (reader, mut up) = conn.split();
            let storage_ids = opened.storage_ids();
            let units = UnitReader::new(reader, opened.plan.block, opened.sink.length()).sharing(&transfer.memory);
            let write = Write::start(transfer, Down::Wire(units), opened);
            let ready = pb::WriteReady { error: None, failed_index: 0, storage_ids };
            let sent = net::write_message(&mut up, &ready).await;
            let done = match sent {
                Ok(()) => write.run(Up::Wire(up)).await,
                Err(error) => Err(Broken::above(Error::io("answering the writer", &error))),
            };
            if let Err(broken) = done {
                note_broken(transfer, block, &peer, &broken);
            }
        }
    }
}

/// A write broke: it is counted and told.
pub(crate) fn note_broken(transfer: &Transfer, block: i64, peer: &dyn std::fmt::Display, broken: &Broken) {
    transfer.metrics.writes_failed.fetch_add(1, Ordering::Relaxed);
    tracing::warn!("write of block {block} from {peer} broke: {}", broken.error);
}

/// A pipeline that is open. It must be run: what is open at this node is closed by the end of the write.
pub(crate) struct Opened {
    plan: Plan,
    sink: Sink,
    below: Option<Below>,
}

impl Opened {
    /// Bytes of the block that all its nodes hold.
    pub(crate) fn kept(&self) -> u64 {
        self.sink.length()
    }

    /// The storages that were taken, this node's first.
    pub(crate) fn storage_ids(&self) -> Vec<String> {
        let below = self.below.iter().flat_map(|below| below.storage_ids.iter().cloned());
        std::iter::once(self.sink.storage_id().to_owned()).chain(below).collect()
    }

    /// Writes what a door of this node sends until it ends. After an error the last ack tells it, unless the door itself was the reason.
    pub(crate) async fn run(
        self,
        transfer: &Arc<Transfer>,
        items: mpsc::Receiver<Item>,
        acks: mpsc::Sender<pb::WriteAck>,
    ) -> Result<(), Broken> {
        Write::start(transfer, Down::Door(items), self).run(Up::Door(acks)).await
    }
}

fn check(transfer: &Transfer, request: pb::WriteBlock) -> Result<Plan> {
    let (block, generation) = transfer.check_block(request.block.as_ref())?;
    if request.block_size > MAX_BLOCK_SIZE {
        let text = format!("a block of {} bytes is larger than {MAX_BLOCK_SIZE}", request.block_size);
        return Err(Error::new(ErrorCode::InvalidArgument, text));
    }
    if request.targets.len() >= MAX_REPLICATION as usize {
        let text = format!("a pipeline of {} nodes is longer than {MAX_REPLICATION}", request.targets.len() + 1);
        return Err(Error::new(ErrorCode::InvalidArgument, text));
    }
    if request.stage() == pb::WriteStage::PipelineTransfer && !request.targets.is_empty() {
        let text = format!("the first part of block {block} goes to one node");
        return Err(Error::new(ErrorCode::InvalidArgument, text));
    }
    Ok(Plan { block, generation, request })
}

/// Opens this node's replica and the pipeline below, at the same time.
pub(crate) async fn open_pipeline(transfer: &Arc<Transfer>, request: pb::WriteBlock) -> Result<Opened, Broken> {
    let plan = check(transfer, request).map_err(Broken::here)?;
    let (opened, joined) = {
        // The opening of the replica is never dropped in the middle: a claim would stay.
        let mut sink = pin!(open_sink(transfer, &plan));
        let mut below = pin!(open_below(transfer, &plan));
        tokio::select! {
            opened = &mut sink => match opened {
                Ok(opened) => (Ok(opened), below.await),
                // A pipeline below that hears no more closes by itself.
                Err(error) => return Err(Broken::here(error)),
            },
            joined = &mut below => (sink.await, joined),
        }
    };
    match (opened, joined) {
        (Ok(sink), Ok(below)) => Ok(Opened { plan, sink, below }),
        (Err(error), _) => Err(Broken::here(error)),
        (Ok(sink), Err(broken)) => {
            abandon(transfer, sink).await;
            Err(broken)
        }
    }
}

async fn abandon(transfer: &Arc<Transfer>, sink: Sink) {
    let (jobs, queue) = mpsc::channel(1);
    let (events, _) = mpsc::channel(1);
    drop(jobs);
    disk::run(Arc::clone(transfer), sink, queue, Arc::default(), events).await;
}

async fn open_sink(transfer: &Transfer, plan: &Plan) -> Result<Sink> {
    let request = &plan.request;
    let block_size = if request.block_size == 0 { cairn_proto::DEFAULT_BLOCK_SIZE } else { request.block_size };
    if request.stage() == pb::WriteStage::PipelineRecovery {
        let recovery = Recovery {
            block: plan.block,
            old_generation: Generation(request.old_generation),
            new_generation: plan.generation,
            keep_length: request.keep_length,
            block_size,
        };
        return Ok(match transfer.store.recover(recovery).await? {
            Recovered::Open(writer) => Sink::Writer(writer),
            Recovered::Finalized(matcher) => Sink::Matcher(matcher),
        });
    }
    let new = NewReplica {
        block: plan.block,
        generation: plan.generation,
        storage_id: request.storage_id.clone(),
        block_size,
        temporary: matches!(request.stage(), pb::WriteStage::Transfer | pb::WriteStage::PipelineTransfer),
    };
    if request.stage() == pb::WriteStage::PipelineTransfer {
        return transfer.store.create_partial(new).await.map(Sink::Partial);
    }
    transfer.store.create(new).await.map(Sink::Writer)
}

/// Dials the next node and passes the request on. Errors carry the index of the node that failed.
async fn open_below(transfer: &Transfer, plan: &Plan) -> Result<Option<Below>, Broken> {
    let Some((next, rest)) = plan.request.targets.split_first() else { return Ok(None) };
    let limit = transfer.settings.connect_timeout();
    let request = pb::WriteBlock {
        targets: rest.to_vec(),
        storage_id: next.storage_id.clone(),
        storage_type: next.storage_type,
        ..plan.request.clone()
    };
    let request = pb::DataRequest { op: Some(pb::data_request::Op::Write(request)) };
    let hello = transfer.hello();
    let dial = async {
        let mut conn = opening::open_data(&transfer.env.net, &next.address, &hello, limit).await?;
        let sent = net::write_message(&mut conn, &request).await;
        sent.map_err(|error| Error::io(format!("passing the write on to {}", next.address), &error))?;
        Ok(conn)
    };
    let mut conn = dial.await.map_err(|error: Error| Broken::below(error, 0))?;
    let patience = dataplane::set_up_patience(limit, rest.len() + 1);
    let ready: pb::WriteReady =
        match transfer.env.clock.timeout(patience, net::read_message(&mut conn, &next.address)).await {
            Ok(Ok(ready)) => ready,
            Ok(Err(error)) => return Err(Broken::below(error, 0)),
            Err(_) => {
                let text = format!("{} did not open its part of the pipeline within {patience:?}", next.address);
                return Err(Broken::below(Error::new(ErrorCode::TimedOut, text), 0));
            }
        };
    if let Some(error) = ready.error {
        return Err(Broken::below(Error::from_wire(error), ready.failed_index));
    }
    let (reader, writer) = conn.split();
    Ok(Some(Below { address: next.address.clone(), reader, writer, storage_ids: ready.storage_ids }))
}

/// A write under way.
struct Write<'a> {
    transfer: &'a Arc<Transfer>,
    plan: Plan,
    units: Down,
    below: Option<Below>,
    kept: u64,
    open: Option<Arc<OpenReplica>>,
    progress: Progress,
    jobs: mpsc::Sender<Job>,
    events: mpsc::Sender<Event>,
    queue: mpsc::Receiver<Event>,
}

impl<'a> Write<'a> {
    fn start(transfer: &'a Arc<Transfer>, units: Down, opened: Opened) -> Self {
        let Opened { plan, sink, below } = opened;
        let kept = sink.length();
        let open = match &sink {
            Sink::Writer(writer) | Sink::Partial(writer) => Some(Arc::clone(writer.open())),
            Sink::Matcher(_) => None,
        };
        let progress = Progress::default();
        progress.received.store(kept, Ordering::Release);
        progress.written.store(kept, Ordering::Release);
        let (jobs, job_queue) = mpsc::channel(disk::JOBS);
        let (events, queue) = mpsc::channel(EVENTS);
        let disk = disk::run(Arc::clone(transfer), sink, job_queue, Arc::clone(&progress.written), events.clone());
        tokio::spawn(disk);
        Self { transfer, plan, units, below, kept, open, progress, jobs, events, queue }
    }

    async fn run(self, mut up: Up) -> Result<(), Broken> {
        let Self { transfer, plan, mut units, below, kept, open, progress, jobs, events, queue } = self;
        let (below_reader, below_writer) =
            below.map_or((None, None), |below| (Some((below.reader, below.address)), Some(below.writer)));
        let sending = AtomicBool::new(false);
        let acks = Acks::new(transfer, &mut up, queue, &progress, open.clone(), below_reader.is_some(), kept, &sending);
        let feed = Feed {
            transfer,
            block: plan.block,
            limit: if plan.request.block_size == 0 { MAX_BLOCK_SIZE } else { plan.request.block_size },
            units: &mut units,
            below: below_writer,
            progress: &progress,
            jobs,
            budget: WriterBudget::new(&transfer.memory),
            events: events.clone(),
        };
        let stopped = stopped(transfer, plan.block, open);
        // What the next node says itself is heard before it is found to be silent.
        let all =
            async { tokio::try_join!(biased; watch_below(below_reader, events), acks.run(), feed.run()).map(|_| ()) };
        let outcome = tokio::select! {
            biased;
            broken = stopped => Err(broken),
            outcome = all => outcome,
        };
        if let Err(broken) = &outcome {
            // Half an ack on the wire: a second one would be read as its rest.
            if let Some(index) = broken.index.filter(|_| !sending.load(Ordering::Relaxed)) {
                let tell = tell_failure(&mut up, &mut units, &broken.error, index);
                let _ = transfer.env.clock.timeout(LINGER, tell).await;
            }
        }
        up.shutdown().await;
        outcome
    }
}

/// Tells the writer why the pipeline broke, and gives it time to hear it.
async fn tell_failure(up: &mut Up, units: &mut Down, error: &Error, failed_index: u32) {
    let kind = pb::AckKind::AckError as i32;
    let ack = pb::WriteAck { kind, error: Some(error.to_wire()), failed_index, ..Default::default() };
    let _ = up.tell(ack).await;
    up.shutdown().await;
    units.drain().await;
}

/// Resolves when this write must stop: a newer writer fences it, or the daemon ends.
async fn stopped(transfer: &Transfer, block: BlockId, open: Option<Arc<OpenReplica>>) -> Broken {
    let fenced = async {
        match &open {
            Some(open) => open.fenced().await,
            None => pending().await,
        }
    };
    tokio::select! {
        () = fenced => {
            let text = format!("a newer writer took over block {block}");
            Broken::here(Error::new(ErrorCode::StaleGeneration, text).with_subject(block.to_string()))
        }
        () = transfer.stopping() => Broken::here(Error::new(ErrorCode::Unreachable, "the datanode is shutting down")),
    }
}

/// Reads the acks of the node below.
async fn watch_below(reader: Option<(ReadHalf<Conn>, String)>, events: mpsc::Sender<Event>) -> Result<(), Broken> {
    let Some((mut reader, address)) = reader else { return Ok(()) };
    loop {
        let event = match net::read_message::<pb::WriteAck>(&mut reader, &address).await {
            Ok(ack) => Event::Below(ack),
            Err(error) => Event::BelowLeft(error),
        };
        let last = match &event {
            Event::Below(ack) => matches!(ack.kind(), pb::AckKind::AckFinished | pb::AckKind::AckError),
            _ => true,
        };
        if events.send(event).await.is_err() || last {
            return Ok(());
        }
    }
}

/// Reads, verifies, forwards, hands to the disk.
struct Feed<'a> {
    transfer: &'a Transfer,
    block: BlockId,
    /// Upper bound of the block's length.
    limit: u64,
    units: &'a mut Down,
    below: Option<WriteHalf<Conn>>,
    progress: &'a Progress,
    jobs: mpsc::Sender<Job>,
    budget: WriterBudget,
    events: mpsc::Sender<Event>,
}

impl Feed<'_> {
    async fn run(mut self) -> Result<(), Broken> {
        let idle = self.transfer.settings.idle_timeout();
        loop {
            let item = match self.transfer.env.clock.timeout(idle, self.units.next()).await {
                Ok(Ok(item)) => item,
                Ok(Err(error)) if error.code() == ErrorCode::Unreachable => return Err(Broken::above(error)),
                Ok(Err(error)) => return Err(Broken::here(error)),
                Err(_) => {
                    let text = format!("the writer of block {} said nothing for {idle:?}", self.block);
                    return Err(Broken::here(Error::new(ErrorCode::TimedOut, text)));
                }
            };
            match item {
                Item::End => {
                    let text = format!("the writer of block {} left before it finished", self.block);
                    return Err(Broken::above(Error::new(ErrorCode::Unreachable, text)));
                }
                Item::Frames(chunk) => self.on_frames(chunk).await?,
                Item::Marker(marker) => {
                    self.on_marker(marker).await?;
                    if marker.kind == MarkerKind::Finish {
                        return Ok(());
                    }
                }
            }
        }
    }

    async fn on_frames(&mut self, chunk: Chunk) -> Result<(), Broken> {
        let end = chunk.headers.last().map_or(0, |header| header.end());
        if end > self.limit {
            let text = format!("block {} grows to {end} bytes, more than its size of {}", self.block, self.limit);
            return Err(Broken::here(Error::new(ErrorCode::InvalidArgument, text)));
        }
        self.progress.received.store(end, Ordering::Release);
        let bytes = chunk.bytes();
        self.transfer.metrics.bytes_received.fetch_add(bytes as u64, Ordering::Relaxed);
        let parts = chunk.parts.clone();
        // The disk gets it first if it has room, so that it works while we forward.
        let waiting = match self.budget.try_take(bytes) {
            None => Some(chunk),
            Some(share) => match self.jobs.try_send(Job::Frames(chunk, share)) {
                Ok(()) => None,
                Err(mpsc::error::TrySendError::Full(Job::Frames(chunk, _))) => Some(chunk),
                Err(_) => return self.disk_is_gone().await,
            },
        };
        self.forward(&parts).await?;
        let Some(chunk) = waiting else { return Ok(()) };
        let Some(share) = self.budget.take(bytes, &self.transfer.metrics.memory_waits).await else {
            return self.disk_is_gone().await;
        };
        match self.jobs.send(Job::Frames(chunk, share)).await {
            Ok(()) => Ok(()),
            Err(_) => self.disk_is_gone().await,
        }
    }

    async fn on_marker(&mut self, marker: Marker) -> Result<(), Broken> {
        let received = self.progress.received.load(Ordering::Acquire);
        if marker.length != received {
            let text =
                format!("the writer of block {} says it sent {} bytes, {received} arrived", self.block, marker.length);
            return Err(Broken::here(Error::new(ErrorCode::InvalidArgument, text)));
        }
        let _ = self.events.send(Event::Expect(marker.kind)).await;
        self.forward(&[Bytes::copy_from_slice(&marker.encode(self.block))]).await?;
        if marker.kind != MarkerKind::Heartbeat && self.jobs.send(Job::Marker(marker.kind)).await.is_err() {
            return self.disk_is_gone().await;
        }
        Ok(())
    }

    async fn forward(&mut self, parts: &[Bytes]) -> Result<(), Broken> {
        let Some(below) = &mut self.below else { return Ok(()) };
        if let Err(error) = net::write_parts(below, parts).await {
            // It may have said why: the way back decides.
            let error = Error::io("sending to the next datanode", &error);
            let _ = self.events.send(Event::BelowDeaf(error)).await;
            pending::<()>().await;
        }
        Ok(())
    }

    /// The disk task ended: it has told the way back, which decides.
    async fn disk_is_gone(&self) -> Result<(), Broken> {
        pending::<()>().await;
        Ok(())
    }
}

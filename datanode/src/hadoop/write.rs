//! Operation 80: a Hadoop client writes a block through this node.
//!
//! # Overview
//! ```text
//!         packets              frames
//! client ---------> receive ----------> our own pipeline (`crate::transfer::write`), which also writes this node's replica
//!        <--------- answers <----------
//!           acks                acks
//! ```
//! `receive` verifies packets and makes frames ([`super::framing`]); `answers` turns acks of lengths into acks of packets. A frame ends when it is
//! full, at a sync or the end of the block, when no packet has come for [`GAP`] (an hflush has no mark), or when no more acks may wait.
//!
//! # Resent data
//! After an hflush a client starts again at the last chunk's start, and after a recovery at what was acknowledged to it. What the block holds already
//! is compared and dropped: with the packet before, or with the replica if it was there when the pipeline was opened. Anything else fails the write.
//!
//! # Bounds
//! A connection holds at most two packets, [`SEALING`] frames, a frame's worth of packets, and what our pipeline holds for any writer: of that, frames
//! that lie in their packets' memory count for their bytes and keep twice as much at most.
//!
//! # Loss of the client
//! The pipeline ends as when one of our own clients leaves: each node keeps what it holds, to be recovered.

use std::future::{pending, ready};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use cairn_common::net::Conn;
use cairn_proto::dataplane::{Marker, MarkerKind};
use cairn_proto::hadoop::{BlockOpResponse, DataStatus, OpWriteBlock};
use cairn_proto::ids::{BlockId, Generation};
use cairn_proto::{Error, ErrorCode, Result, pb};
use futures_util::StreamExt;
use futures_util::stream::FuturesOrdered;
use tokio::io::{AsyncRead, AsyncWriteExt};
use tokio::sync::mpsc;

use super::answer::{Answers, Expected, Flaw, Need};
use super::framing::{self, BadPacket, Cut, Framer};
use super::packet::{HEARTBEAT, Packet, PacketReader};
use super::setup::{self, Refused, Setup};
use super::{answer, data, decode, send};
use crate::transfer::Transfer;
use crate::transfer::upstream::drain;
use crate::transfer::wire::Item;
use crate::transfer::write::{LINGER, note_broken};

/// No packet for so long: the frame is ended, somebody may wait for it.
const GAP: Duration = Duration::from_millis(2);
/// Frames that are made at the same time.
const SEALING: usize = 4;
/// Frames that wait for our pipeline.
const ITEMS: usize = 4;
/// Packets that wait for their acks before the next one is read, twice: here and in `answers`.
const EXPECTED: usize = 64;

/// Serves one write; the connection ends with it.
pub(super) async fn serve(transfer: &Arc<Transfer>, mut conn: Conn, body: Bytes) {
    transfer.metrics.writes.fetch_add(1, Ordering::Relaxed);
    let peer = conn.peer_addr();
    let request: OpWriteBlock = match decode(&body) {
        Ok(request) => request,
        Err(error) => return tracing::debug!("{peer}: {error}"),
    };
    let (block, stage) = (request.header.base_header.block.block_id, request.stage);
    let links: Vec<String> = super::replicas(&request.targets, &[]).into_iter().map(|node| node.address).collect();
    let opened = match setup::open(transfer, request).await {
        Ok(setup) if setup.ends => finish(transfer, setup, &links).await,
        Ok(setup) => return run(transfer, conn, setup).await,
        Err(refused) => Err(refused),
    };
    let response = match opened {
        Ok(()) => BlockOpResponse { first_bad_link: Some(String::new()), ..answer(DataStatus::StatusSuccess) },
        Err(Refused { error, bad_link }) => {
            tracing::warn!("block {block} (stage {stage}) from the Hadoop client at {peer} refused: {error}");
            let (first_bad_link, message) = (Some(bad_link), Some(error.message().to_owned()));
            BlockOpResponse { first_bad_link, message, ..answer(DataStatus::StatusError) }
        }
    };
    let tell = async {
        let _ = send(&mut conn, &response).await;
        let _ = conn.shutdown().await;
        drain(&mut conn).await;
    };
    let _ = transfer.env.clock.timeout(LINGER, tell).await;
}

/// Ends a block all of whose data is held.
async fn finish(transfer: &Arc<Transfer>, setup: Setup, links: &[String]) -> Result<(), Refused> {
    let (items, item_queue) = mpsc::channel(1);
    let (acks, mut ack_queue) = mpsc::channel::<pb::WriteAck>(ITEMS);
    let marker = Marker { kind: MarkerKind::Finish, length: setup.opened.kept() };
    let drive = async {
        let _ = items.send(Item::Marker(marker)).await;
        while let Some(ack) = ack_queue.recv().await {
            match ack.kind() {
                pb::AckKind::AckFinished => return Ok(()),
                pb::AckKind::AckError => {
                    let below = (ack.failed_index as usize).checked_sub(1).and_then(|at| links.get(at));
                    let error = ack.error.map_or_else(unfinished, Error::from_wire);
                    return Err(Refused { error, bad_link: below.cloned().unwrap_or_default() });
                }
                _ => {}
            }
        }
        Err(Refused { error: unfinished(), bad_link: String::new() })
    };
    let (_, done) = tokio::join!(setup.opened.run(transfer, item_queue, acks), drive);
    done
}

fn unfinished() -> Error {
    Error::new(ErrorCode::Internal, "the block was not finished")
}

async fn run(transfer: &Arc<Transfer>, conn: Conn, setup: Setup) {
    let peer = conn.peer_addr();
    let Setup { block, generation, opened, sums, .. } = setup;
    let (nodes, kept) = (opened.storage_ids().len(), opened.kept());
    let (reader, mut up) = conn.split();
    let mut reader = PacketReader::new(reader, sums);
    let (items, item_queue) = mpsc::channel(ITEMS);
    let (acks, ack_queue) = mpsc::channel(EXPECTED);
    let (expected, expected_queue) = mpsc::channel(EXPECTED);
    let (flaws, flaw_queue) = mpsc::channel(1);
    let door = async {
        let ready = BlockOpResponse { first_bad_link: Some(String::new()), ..answer(DataStatus::StatusSuccess) };
        send(&mut up, &ready).await?;
        let answers = Answers {
            clock: &transfer.env.clock,
            conn: &mut up,
            patience: transfer.settings.idle_timeout(),
            nodes,
            held: kept,
            acks: ack_queue,
            expected: expected_queue,
            flaws: flaw_queue,
            due: Vec::new(),
        };
        let receive = Receive {
            transfer,
            block,
            generation,
            reader: &mut reader,
            framer: Framer::new(block, kept, sums, &transfer.sealers, transfer.settings.hadoop_compress),
            floor: kept,
            last: None,
            sealing: FuturesOrdered::new(),
            items,
            expected,
            held_back: None,
            ended: false,
        };
        tokio::select! {
            biased;
            done = answers.run() => done,
            never = async { receive.run(flaws).await; pending().await } => never,
        }
    };
    let (written, told) = tokio::join!(opened.run(transfer, item_queue, acks), door);
    if let Err(broken) = &written {
        note_broken(transfer, block.0, &peer, broken);
    }
    if let Err(error) = told {
        tracing::debug!("{peer}: {error}");
    }
    let _ = up.shutdown().await;
    if written.is_err() {
        let _ = transfer.env.clock.timeout(LINGER, drain(reader.conn())).await;
    }
}

/// Waits for room.
async fn pass(queue: &mpsc::Sender<Expected>, expected: Option<Expected>) -> bool {
    match expected {
        Some(expected) => queue.send(expected).await.is_ok(),
        None => true,
    }
}

type Sealing = Pin<Box<dyn Future<Output = Result<Item, BadPacket>> + Send>>;

/// Reads packets, makes frames.
struct Receive<'a, R> {
    transfer: &'a Arc<Transfer>,
    block: BlockId,
    generation: Generation,
    reader: &'a mut PacketReader<R>,
    framer: Framer,
    /// Below this the replica had data when the pipeline was opened.
    floor: u64,
    /// The data that was taken last, and where it starts.
    last: Option<(u64, Bytes)>,
    sealing: FuturesOrdered<Sealing>,
    items: mpsc::Sender<Item>,
    expected: mpsc::Sender<Expected>,
    /// There was no room for it.
    held_back: Option<Expected>,
    /// The last packet has come.
    ended: bool,
}

impl<R: AsyncRead + Unpin> Receive<'_, R> {
    /// Runs until all that the client sends is passed on, or something is wrong with it, which `flaws` is told before the pipeline notices.
    async fn run(mut self, flaws: mpsc::Sender<Flaw>) {
        if let Err(flaw) = self.receive().await {
            let _ = flaws.send(flaw).await;
        }
    }

    async fn receive(&mut self) -> Result<(), Flaw> {
        let clock = &self.transfer.env.clock;
        let idle = self.transfer.settings.idle_timeout();
        loop {
            if self.held_back.is_some() {
                self.hurry();
            }
            if self.ended && self.sealing.is_empty() && self.held_back.is_none() {
                return Ok(());
            }
            let reads = !self.ended && self.held_back.is_none() && self.sealing.len() < SEALING;
            let pause = if self.framer.is_empty() { idle } else { GAP };
            tokio::select! {
                biased;
                Some(sealed) = self.sealing.next(), if !self.sealing.is_empty() => match sealed {
                    // If nobody takes it, the pipeline broke: its last ack tells.
                    Ok(item) => if self.items.send(item).await.is_err() { return Ok(()) },
                    Err(BadPacket { seqno, at }) => {
                        tracing::warn!("packet {seqno} of block {} does not fit its checksum at {at}", self.block);
                        return Err(Flaw::Tell(DataStatus::StatusErrorChecksum, Some(seqno)));
                    }
                },
                true = pass(&self.expected, self.held_back), if self.held_back.is_some() => self.held_back = None,
                packet = self.reader.next(), if reads => match packet {
                    Ok(Some(packet)) => self.on_packet(packet).await?,
                    Ok(None) => return Err(Flaw::Gone),
                    Err(error) if error.code() == ErrorCode::Unreachable => return Err(Flaw::Gone),
                    Err(error) => {
                        tracing::warn!("the Hadoop writer of block {}: {error}", self.block);
                        return Err(Flaw::Tell(DataStatus::StatusError, None));
                    }
                },
                () = clock.sleep(pause), if reads => {
                    if self.framer.is_empty() {
                        tracing::warn!("the Hadoop writer of block {} said nothing for {idle:?}", self.block);
                        return Err(Flaw::Tell(DataStatus::StatusError, None));
                    }
                    self.hurry();
                }
            }
        }
    }

    /// Ends the frame.
    fn cut(&mut self) {
        if let Some(cut) = self.framer.cut() {
            self.seal(cut);
        }
    }

    /// Somebody may wait for acks of what is here: it must not wait for more data, here or at the disk of any node.
    fn hurry(&mut self) {
        if !self.framer.is_empty() {
            self.mark(MarkerKind::Flush);
        }
    }

    fn seal(&mut self, cut: Cut) {
        if cut.is_quick() {
            self.sealing.push_back(Box::pin(ready(cut.seal().map(Item::Frames))));
            return;
        }
        let work = self.transfer.env.work.clone();
        self.sealing.push_back(Box::pin(async move { work.cpu(move || cut.seal()).await.map(Item::Frames) }));
    }

    /// All that came before, then a marker.
    fn mark(&mut self, kind: MarkerKind) {
        self.cut();
        let marker = Item::Marker(Marker { kind, length: self.framer.end() });
        self.sealing.push_back(Box::pin(async { Ok(marker) }));
    }

    fn expect(&mut self, seqno: i64, need: Need) {
        let expected = Expected { seqno, need };
        if self.expected.try_send(expected).is_err() {
            self.held_back = Some(expected);
        }
    }

    async fn on_packet(&mut self, packet: Packet) -> Result<(), Flaw> {
        let header = packet.header;
        if header.data_len == 0 {
            self.framer.copy_from_now();
        }
        if header.seqno == HEARTBEAT && header.data_len == 0 {
            self.mark(MarkerKind::Heartbeat);
            self.expect(HEARTBEAT, Need::Nothing);
            return Ok(());
        }
        let there = self.framer.end();
        if header.offset > there {
            let text = format!("packet {} starts at {}, but {there} bytes are there", header.seqno, header.offset);
            return Err(self.refuse(header.seqno, &text));
        }
        let known = usize::try_from(there - header.offset).unwrap_or(usize::MAX).min(header.data_len);
        if known > 0 {
            self.framer.copy_from_now();
            self.compare(&packet, known).await?;
        }
        if known < header.data_len {
            self.last = Some((header.offset, packet.data.clone()));
            for cut in self.framer.push(packet, known, known > 0) {
                self.seal(cut);
            }
        }
        let need = match (header.last, header.sync) {
            (true, _) => {
                self.ended = true;
                self.mark(MarkerKind::Finish);
                Need::Finished
            }
            (false, true) => {
                self.mark(MarkerKind::Sync);
                Need::Synced(header.end())
            }
            (false, false) => Need::Held(header.end()),
        };
        self.expect(header.seqno, need);
        Ok(())
    }

    fn refuse(&self, seqno: i64, why: &str) -> Flaw {
        tracing::warn!("the Hadoop writer of block {}: {why}", self.block);
        Flaw::Tell(DataStatus::StatusError, Some(seqno))
    }

    /// Verifies a packet whose first `known` bytes the block holds already, and compares these.
    async fn compare(&mut self, packet: &Packet, known: usize) -> Result<(), Flaw> {
        let (seqno, offset) = (packet.header.seqno, packet.header.offset);
        let (checked, sums) = (packet.clone(), self.reader.sums());
        if let Err(bad) = self.transfer.env.work.cpu(move || framing::verify(&checked, &sums)).await {
            tracing::warn!("packet {seqno} of block {} does not fit its checksum at {}", self.block, bad.at);
            return Err(Flaw::Tell(DataStatus::StatusErrorChecksum, Some(seqno)));
        }
        let on_disk = usize::try_from(self.floor.saturating_sub(offset)).unwrap_or(usize::MAX).min(known);
        if on_disk > 0 {
            let data = packet.data.slice(..on_disk);
            match is_on_disk(self.transfer, (self.block, self.generation), offset, data).await {
                Ok(true) => {}
                Ok(false) => return Err(self.refuse(seqno, "resent data differs from what the block holds")),
                Err(error) => return Err(self.refuse(seqno, error.message())),
            }
        }
        let from = offset + on_disk as u64;
        let again = &packet.data[on_disk..known];
        let same = match &self.last {
            _ if again.is_empty() => true,
            Some((start, data)) if *start <= from => {
                let skip = usize::try_from(from - start).unwrap_or(usize::MAX);
                data.get(skip..).and_then(|rest| rest.get(..again.len())).is_some_and(|held| held == again)
            }
            _ => false,
        };
        if same {
            return Ok(());
        }
        let text =
            format!("packet {seqno} changes data at {from} that was sent before, or goes back by more than a packet");
        Err(self.refuse(seqno, &text))
    }
}

/// Whether the replica holds `bytes` at `offset`.
async fn is_on_disk(
    transfer: &Transfer,
    (block, generation): (BlockId, Generation),
    offset: u64,
    bytes: Bytes,
) -> Result<bool> {
    let readable = transfer.store.read(block, generation).await?;
    transfer.env.work.io(move || data::holds(&readable, block, offset, &bytes)).await
}

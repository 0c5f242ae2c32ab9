//! One block on its way through a pipeline, mended as often as the settings allow.
//!
//! ```text
//!            AddBlock, open pipeline ──fail──► AbandonBlock, leave that node out, again
//!                     │
//!                     ▼
//!   ┌──────────► streaming ──finish acked──► done
//!   │                 │ a node fails
//!   │                 ▼
//!   │   drop the node, NewGeneration, open pipeline through the survivors, keeping what
//!   └── was acked, UpdatePipeline, send again what was not acked
//!                     │ no survivor
//!                     ▼
//!          nothing acked yet: begin the block anew; else: fail, naming the nodes
//! ```
//!
//! # Consistency
//! The namenode learns of the mended pipeline only after its nodes have cut their replicas to the acked length under the new generation, so
//! a node that was left out can never count as a replica of the block.

use std::collections::VecDeque;
use std::pin::pin;
use std::time::Duration;

use bytes::Bytes;
use cairn_proto::dataplane::{Marker, MarkerKind};
use cairn_proto::ids::BlockId;
use cairn_proto::{Error, ErrorCode, Result, pb};
use futures_util::future::{Either, Ready};
use futures_util::stream::{FuturesOrdered, StreamExt};
use pb::{AckKind, CommittedBlock, WriteStage};
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot};

use super::super::datanode::{block_name, node_name};
use super::super::{Block, Replica};
use super::calls::OpenFile;
use super::link::{Event, Failure, Link, Opening, WireUnit};
use super::seal::{Judge, Raw, Sealed};
use crate::fs::task::Task;

/// Frames sealed by one piece of work, and pieces of work at a time.
const FRAMES_PER_SEAL: usize = 4;
const SEALS_IN_FLIGHT: usize = 4;
/// A writer that has nothing to say shows this often that it lives.
const HEARTBEAT_MS: u64 = 3_000;
/// How often a stall is looked for.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How long a node that says it is busy is left alone.
const BUSY_PAUSE: Duration = Duration::from_millis(200);

/// What the writer gives to the task of a block.
pub(super) enum Input {
    /// The next piece of data, at most a frame.
    Data(Raw),
    /// A request about all data before it; answered when it was carried out by the whole pipeline.
    Mark(MarkerKind, oneshot::Sender<()>),
    /// No more.
    Finish,
}

/// A marker that the pipeline has not answered.
struct Mark {
    marker: Marker,
    done: Option<oneshot::Sender<()>>,
}

/// What is ready to go down the pipeline.
enum Outgoing {
    Frame(Sealed),
    Mark(Mark),
}

/// Sealed together, each with whether compression was tried.
type Batch = Vec<(Outgoing, bool)>;

pub(super) struct BlockWriter {
    file: Arc<OpenFile>,
    index: u32,
    committed: Vec<CommittedBlock>,
    input: mpsc::Receiver<Input>,
    turn: Succession,
    block: Block,
    token: Bytes,
    targets: Vec<Replica>,
    judge: Judge,
    sealing: FuturesOrdered<Either<Ready<Result<Batch>>, Task<Batch>>>,
    /// File data given to sealing.
    taken: u64,
    ready: VecDeque<Outgoing>,
    unacked: VecDeque<Sealed>,
    marks: VecDeque<Mark>,
    acked: u64,
    finishing: bool,
    failures: Vec<(Replica, Error)>,
    last_progress_ms: u64,
    last_sent_ms: u64,
}

/// The order of a file's blocks. A block is asked for when the one before it has its first ack: until then that one may still be given up
/// and asked for again, which only the last block of a file may be.
#[derive(Default)]
pub(super) struct Succession {
    /// Resolves when it is this block's turn; `None` for the first.
    pub(super) before: Option<oneshot::Receiver<()>>,
    /// Told when it is the next one's; dropped if this block failed.
    pub(super) next: Option<oneshot::Sender<()>>,
}

enum Turn {
    Finished,
    Broken(Failure),
}

impl BlockWriter {
    pub(super) fn new(
        file: Arc<OpenFile>,
        index: u32,
        committed: Vec<CommittedBlock>,
        input: mpsc::Receiver<Input>,
        turn: Succession,
    ) -> Self {
        Self {
            file,
            index,
            committed,
            input,
            turn,
            block: Block::default(),
            token: Bytes::new(),
            targets: Vec::new(),
            judge: Judge::default(),
            sealing: FuturesOrdered::new(),
            taken: 0,
            ready: VecDeque::new(),
            unacked: VecDeque::new(),
            marks: VecDeque::new(),
            acked: 0,
            finishing: false,
            failures: Vec::new(),
            last_progress_ms: 0,
            last_sent_ms: 0,
        }
    }

    /// Writes the block; returns it with its final generation and length once every node of its pipeline holds it durably.
    pub(super) async fn run(mut self) -> Result<CommittedBlock> {
        if let Some(before) = self.turn.before.take()
            && before.await.is_err()
        {
            return Err(Error::new(ErrorCode::Internal, "the block before failed"));
        }
        let mut link = self.set_up().await?;
        loop {
            match self.stream(&mut link).await? {
                Turn::Finished => return Ok(CommittedBlock { block: Some(self.block), length: self.acked }),
                Turn::Broken(failure) => {
                    drop(link);
                    link = self.mend(failure).await?;
                }
            }
        }
    }

    fn block_id(&self) -> BlockId {
        BlockId(self.block.id)
    }

    fn now_ms(&self) -> u64 {
        self.file.fs.inner.env.clock.mono_ms()
    }

    /// Gets a block and opens its pipeline, leaving out nodes that cannot be reached.
    async fn set_up(&mut self) -> Result<Link> {
        loop {
            let excluded: Vec<String> = self.failures.iter().map(|(node, _)| node.node_id.clone()).collect();
            let located = match self.file.add_block(self.index, &self.committed, &excluded).await {
                Ok(located) => located,
                Err(error) if error.code() == ErrorCode::NoTargets && !self.failures.is_empty() => {
                    return Err(self.give_up(&error));
                }
                Err(error) => return Err(error),
            };
            self.block = located.block.unwrap_or_default();
            self.token = located.token;
            self.targets = located.replicas;
            match self.open(WriteStage::PipelineSetup, &self.block, 0).await {
                Ok(link) => return Ok(self.started(link)),
                Err(failure) => {
                    self.file.abandon_block(&self.block).await?;
                    self.blame(failure)?;
                }
            }
        }
    }

    /// Opens a pipeline through the targets and notes the storages that they chose.
    async fn open(
        &self,
        stage: WriteStage,
        block: &Block,
        old_generation: u64,
    ) -> Result<(Link, Vec<String>), Failure> {
        let opening = Opening {
            block: block.clone(),
            stage,
            targets: &self.targets,
            block_size: self.file.block_size,
            keep_length: if stage == WriteStage::PipelineRecovery { self.acked } else { 0 },
            old_generation,
            token: self.token.clone(),
        };
        Link::open(&self.file.fs, opening).await
    }

    fn started(&mut self, (link, storages): (Link, Vec<String>)) -> Link {
        for (target, storage) in self.targets.iter_mut().zip(storages) {
            target.storage_id = storage;
        }
        self.last_progress_ms = self.now_ms();
        self.last_sent_ms = self.last_progress_ms;
        link
    }

    /// Takes the failed node out of the pipeline; an error once that happened too often.
    fn blame(&mut self, failure: Failure) -> Result<()> {
        let attempts = self.file.fs.settings().pipeline_attempts as usize;
        let index = failure.index.min(self.targets.len().saturating_sub(1));
        if index < self.targets.len() {
            let node = self.targets.remove(index);
            let (block, file) = (block_name(&self.block), &self.file.path);
            tracing::warn!(node = %node_name(&node), error = %failure.error, %block, %file, "left out of a pipeline");
            self.file.fs.inner.datanodes.avoid(&node);
            self.failures.push((node, failure.error.clone()));
        }
        if self.failures.len() > attempts { Err(self.give_up(&failure.error)) } else { Ok(()) }
    }

    fn give_up(&self, error: &Error) -> Error {
        let tried: Vec<String> =
            self.failures.iter().map(|(node, error)| format!("{}: {error}", node_name(node))).collect();
        let name = block_name(&self.block);
        let text = format!("{name}: no datanode is left that takes it ({error}); tried {}", tried.join("; "));
        Error::new(error.code(), text).with_subject(self.block.id.to_string())
    }

    /// Goes on with the nodes that are left.
    async fn mend(&mut self, failure: Failure) -> Result<Link> {
        let old_generation = self.block.generation;
        let patience_ms = self.file.fs.settings().finish_stall_ms;
        let mut failure = Some(failure);
        let started_ms = self.now_ms();
        loop {
            if let Some(failure) = failure.take() {
                self.blame(failure.clone())?;
                if self.targets.is_empty() {
                    return if self.acked == 0 { self.begin_anew().await } else { Err(self.give_up(&failure.error)) };
                }
            }
            let generation = self.file.new_generation(&self.block).await?;
            let renewed = Block { generation, ..self.block.clone() };
            match self.open(WriteStage::PipelineRecovery, &renewed, old_generation).await {
                Ok(opened) => {
                    let link = self.started(opened);
                    self.file.update_pipeline(&self.block, generation, &self.targets).await?;
                    self.block = renewed;
                    self.send_again();
                    return Ok(link);
                }
                // It lives: its older writer is still busy with the disk. The same nodes are asked again, under a newer generation.
                Err(next) if next.error.code() == ErrorCode::Busy && self.now_ms() - started_ms < patience_ms => {
                    tracing::debug!(error = %next.error, "a datanode is busy");
                    self.file.fs.inner.env.clock.sleep(BUSY_PAUSE).await;
                }
                Err(next) => failure = Some(next),
            }
        }
    }

    /// Puts what is not acked back before what was not sent, each marker after the data that it is about.
    fn send_again(&mut self) {
        let mut again = VecDeque::with_capacity(self.unacked.len() + self.marks.len() + self.ready.len());
        let mut marks = std::mem::take(&mut self.marks);
        for sealed in self.unacked.drain(..) {
            while marks.front().is_some_and(|mark| mark.marker.length < sealed.end()) {
                again.extend(marks.pop_front().map(Outgoing::Mark));
            }
            again.push_back(Outgoing::Frame(sealed));
        }
        again.extend(marks.into_iter().map(Outgoing::Mark));
        again.append(&mut self.ready);
        self.ready = again;
    }

    /// All nodes are gone before any byte was acked: the block is given up and all its data goes to another one.
    async fn begin_anew(&mut self) -> Result<Link> {
        self.file.abandon_block(&self.block).await?;
        while let Some(batch) = self.sealing.next().await {
            self.ready.extend(batch?.into_iter().map(|(outgoing, _)| outgoing));
        }
        self.send_again();
        let link = self.set_up().await?;
        let mut offset = 0;
        let inner = &self.file.fs.inner;
        // A frame's header belongs to its block: frames are made again from their data.
        for outgoing in &mut self.ready {
            if let Outgoing::Frame(sealed) = outgoing {
                let permit = sealed.raw.permit.split(0);
                let Some(none) = permit else { continue };
                let raw = std::mem::replace(&mut sealed.raw, Raw { data: Bytes::new(), permit: none });
                let block = BlockId(self.block.id);
                let pieces = vec![(raw, self.file.compress)];
                let made = inner.sealers.seal(&inner.env.work, block, offset, self.file.compress, pieces).await;
                if let Some(again) = made.into_iter().next() {
                    offset = again.end();
                    *sealed = again;
                }
            }
        }
        Ok(link)
    }

    /// Moves data down and acks up until the block is finished or the pipeline breaks.
    async fn stream(&mut self, link: &mut Link) -> Result<Turn> {
        let clock = self.file.fs.inner.env.clock.clone();
        let mut inputs = Vec::with_capacity(FRAMES_PER_SEAL);
        // Kept across turns: a stall must not hide behind events that keep coming.
        let mut look = pin!(clock.sleep(LOOK_EVERY));
        loop {
            let takes_more = !self.finishing && self.sealing.len() < SEALS_IN_FLIGHT;
            tokio::select! {
                biased;
                () = &mut look => {
                    look.set(clock.sleep(LOOK_EVERY));
                    if let Some(turn) = self.on_time(link) {
                        return Ok(turn);
                    }
                }
                event = link.events.recv() => {
                    if let Some(turn) = self.on_event(event) {
                        return Ok(turn);
                    }
                }
                permit = link.units.reserve(), if !self.ready.is_empty() => {
                    // A closed queue means a broken connection: its event comes.
                    match permit {
                        Ok(permit) => if let Some(unit) = self.next_unit() { permit.send(unit) },
                        Err(_) => clock.sleep(Duration::from_millis(10)).await,
                    }
                }
                Some(batch) = self.sealing.next(), if !self.sealing.is_empty() => {
                    for (outgoing, tried) in batch? {
                        if let (Outgoing::Frame(sealed), true) = (&outgoing, tried) {
                            self.judge.learn(&sealed.frame);
                        }
                        self.ready.push_back(outgoing);
                    }
                }
                count = self.input.recv_many(&mut inputs, FRAMES_PER_SEAL), if takes_more => {
                    if count == 0 {
                        return Err(Error::new(ErrorCode::Internal, "the writer was dropped"));
                    }
                    self.take(&mut inputs);
                }
            }
        }
    }

    /// Hands inputs to sealing, in order.
    fn take(&mut self, inputs: &mut Vec<Input>) {
        let mut pieces = Vec::with_capacity(inputs.len());
        for input in inputs.drain(..) {
            match input {
                Input::Data(raw) => pieces.push((raw, self.file.compress && self.judge.try_next())),
                Input::Mark(kind, done) => {
                    self.seal(std::mem::take(&mut pieces));
                    self.mark(kind, Some(done));
                }
                Input::Finish => {
                    self.seal(std::mem::take(&mut pieces));
                    self.mark(MarkerKind::Finish, None);
                    self.finishing = true;
                }
            }
        }
        self.seal(pieces);
    }

    fn mark(&mut self, kind: MarkerKind, done: Option<oneshot::Sender<()>>) {
        let mark = Mark { marker: Marker { kind, length: self.taken }, done };
        let batch = vec![(Outgoing::Mark(mark), false)];
        self.sealing.push_back(Either::Left(futures_util::future::ready(Ok(batch))));
    }

    fn seal(&mut self, pieces: Vec<(Raw, bool)>) {
        if pieces.is_empty() {
            return;
        }
        let offset = self.taken;
        self.taken += pieces.iter().map(|(raw, _)| raw.data.len() as u64).sum::<u64>();
        let tried: Vec<bool> = pieces.iter().map(|(_, tried)| *tried).collect();
        let (file, block) = (Arc::clone(&self.file), self.block_id());
        self.sealing.push_back(Either::Right(Task::spawn(async move {
            let inner = &file.fs.inner;
            let sealed = inner.sealers.seal(&inner.env.work, block, offset, file.compress, pieces).await;
            Ok(sealed.into_iter().map(Outgoing::Frame).zip(tried).collect())
        })));
    }

    /// Notes the next outgoing unit as sent.
    fn next_unit(&mut self) -> Option<WireUnit> {
        if self.unacked.is_empty() && self.marks.is_empty() {
            // Nothing was under way: the wait for an ack begins now.
            self.last_progress_ms = self.now_ms();
        }
        self.last_sent_ms = self.now_ms();
        match self.ready.pop_front()? {
            Outgoing::Frame(sealed) => {
                let unit = WireUnit::frame(&sealed.frame);
                self.unacked.push_back(sealed);
                Some(unit)
            }
            Outgoing::Mark(mark) => {
                let unit = WireUnit::marker(self.block_id(), mark.marker);
                self.marks.push_back(mark);
                Some(unit)
            }
        }
    }

    fn on_event(&mut self, event: Option<Event>) -> Option<Turn> {
        let (kind, length) = match event {
            Some(Event::Ack { kind, length }) => (kind, length),
            Some(Event::Broken(failure)) => return Some(Turn::Broken(failure)),
            None => return Some(self.broken("the connection ended")),
        };
        let sent = self.unacked.back().map_or(self.acked, Sealed::end);
        if length > sent {
            return Some(self.broken(&format!("it acknowledged {length} bytes of {sent}")));
        }
        self.last_progress_ms = self.now_ms();
        self.acked = self.acked.max(length);
        if self.acked > 0
            && let Some(next) = self.turn.next.take()
        {
            // There may be no next block.
            let _ = next.send(());
        }
        while self.unacked.front().is_some_and(|sealed| sealed.end() <= self.acked) {
            self.unacked.pop_front();
        }
        let answered = match kind {
            AckKind::AckFlushed => MarkerKind::Flush,
            AckKind::AckSynced => MarkerKind::Sync,
            AckKind::AckFinished => MarkerKind::Finish,
            AckKind::AckProgress | AckKind::AckError => return None,
        };
        let at = self.marks.iter().position(|mark| mark.marker.kind == answered)?;
        let mark = self.marks.remove(at)?;
        if answered == MarkerKind::Finish {
            if length != mark.marker.length {
                return Some(self.broken(&format!("it finished {length} bytes of {}", mark.marker.length)));
            }
            return Some(Turn::Finished);
        }
        // The caller may have stopped waiting.
        let _ = mark.done.map(|done| done.send(()));
        None
    }

    fn broken(&self, why: &str) -> Turn {
        let node = self.targets.first().map(node_name).unwrap_or_default();
        let error = Error::new(ErrorCode::Unreachable, format!("{node}: {why}")).with_subject(&node);
        Turn::Broken(Failure { index: 0, error })
    }

    /// Finds a pipeline that stalls; shows that the writer lives while there is nothing to send.
    fn on_time(&mut self, link: &Link) -> Option<Turn> {
        let settings = self.file.fs.settings();
        let waits = !self.unacked.is_empty() || !self.marks.is_empty();
        let finish_sent = self.marks.iter().any(|mark| mark.marker.kind == MarkerKind::Finish);
        let durable = self.marks.iter().any(|mark| mark.marker.kind == MarkerKind::Sync) || finish_sent;
        let limit_ms = if durable { settings.finish_stall_ms } else { settings.write_stall_ms };
        let now_ms = self.now_ms();
        if waits && now_ms - self.last_progress_ms > limit_ms {
            return Some(self.broken(&format!("no acknowledgement for {limit_ms} ms")));
        }
        if !finish_sent && now_ms - self.last_sent_ms >= HEARTBEAT_MS {
            let length = self.unacked.back().map_or(self.acked, Sealed::end);
            let unit = WireUnit::marker(self.block_id(), Marker { kind: MarkerKind::Heartbeat, length });
            // A full queue says more than a heartbeat would.
            if link.units.try_send(unit).is_ok() {
                self.last_sent_ms = now_ms;
            }
        }
        None
    }
}

//! One block on its way through a pipeline, mended as often as the settings allow.
//!
//! ```text
//!            AddBlock, open pipeline ──fail──► AbandonBlock, leave that node out, again        (setup.rs)
//!                     │
//!                     ▼
//!   ┌──────────► streaming ──finish acked──► done                                              (this file, flow.rs)
//!   │                 │ a node fails, or there are too few for a sync or the finish
//!   │                 ▼
//!   └── leave the node out, find another, go on through all of them                            (mend.rs)
//!                     │ no survivor
//!                     ▼
//!          nothing acked yet: begin the block anew; else: fail, naming the nodes
//! ```
//!
//! # Who is blamed
//! A node that fails says so, or its neighbour says it, counted from the first node. Silence of the first node itself is seen here. A pipeline
//! whose nodes all speak but which gets nothing done loses the node that its acks name as the one that the others wait for.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use cairn_proto::dataplane::{Marker, MarkerKind};
use cairn_proto::ids::BlockId;
use cairn_proto::{Error, ErrorCode, Result, pb};
use pb::{AckKind, CommittedBlock};
use tokio::sync::{mpsc, oneshot};

use super::super::datanode::node_name;
use super::super::settings::ClientSettings;
use super::super::{Block, Replica};
use super::calls::OpenFile;
use super::flow::{Flow, Input};
use super::link::{Event, Failure, Link, WireUnit};
use super::mend::{Failed, Search};

/// Frames sealed by one piece of work.
const FRAMES_PER_SEAL: usize = 4;
/// A writer that has nothing to say shows this often that it lives.
const HEARTBEAT_MS: u64 = 3_000;
/// How often a stall is looked for.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// A look that comes so late says that this process did not run: what the others said meanwhile is not read yet.
const AWAY_MS: u64 = 1_500;

pub(super) struct BlockWriter {
    pub(super) file: Arc<OpenFile>,
    pub(super) index: u32,
    pub(super) committed: Vec<CommittedBlock>,
    input: mpsc::Receiver<Input>,
    turn: Succession,
    pub(super) block: Block,
    pub(super) token: Bytes,
    pub(super) targets: Vec<Replica>,
    pub(super) flow: Flow,
    pub(super) watch: Watch,
    pub(super) failures: Vec<Failed>,
    /// Nodes that failed before this may be tried again.
    pub(super) forgive_ms: u64,
    /// Failures since something was acked.
    pub(super) troubles: u32,
    /// Since when the last node of the pipeline fails without anything new being acked, and when it did last.
    pub(super) alone: Option<(u64, u64)>,
    /// A node said that what it got was damaged.
    pub(super) damaged: bool,
    /// So many nodes were all that there were, and when.
    pub(super) content: Option<(usize, u64)>,
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

/// When a pipeline was heard and got something done.
#[derive(Default)]
pub(super) struct Watch {
    heard_ms: u64,
    progress_ms: u64,
    sent_ms: u64,
    looked_ms: u64,
    /// Whom the others wait for, by the last ack.
    behind: usize,
}

impl Watch {
    pub(super) fn restart(&mut self, now_ms: u64) {
        *self = Self { heard_ms: now_ms, progress_ms: now_ms, sent_ms: now_ms, looked_ms: now_ms, behind: 0 };
    }
}

enum Turn {
    Finished,
    Broken(Failure),
    /// What comes next must become durable, and there are too few nodes for that.
    Short,
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
            flow: Flow::default(),
            watch: Watch::default(),
            failures: Vec::new(),
            forgive_ms: 0,
            troubles: 0,
            alone: None,
            damaged: false,
            content: None,
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
                Turn::Finished => return Ok(CommittedBlock { block: Some(self.block), length: self.flow.acked }),
                Turn::Broken(failure) => {
                    drop(link);
                    link = self.mend(failure).await?;
                }
                Turn::Short => {
                    let mut search = Search::new(true);
                    if let Some(node) = self.find_more(&mut search).await? {
                        drop(link);
                        link = self.rebuild(None, Some(node), search).await?;
                    }
                }
            }
        }
    }

    pub(super) fn block_id(&self) -> BlockId {
        BlockId(self.block.id)
    }

    pub(super) fn now_ms(&self) -> u64 {
        self.file.fs.inner.env.clock.mono_ms()
    }

    pub(super) fn settings(&self) -> &ClientSettings {
        self.file.fs.settings()
    }

    pub(super) async fn sleep(&self, pause: Duration) {
        self.file.fs.inner.env.clock.sleep(pause).await;
    }

    /// Moves data down and acks up until the block is finished or the pipeline cannot go on.
    async fn stream(&mut self, link: &mut Link) -> Result<Turn> {
        let clock = self.file.fs.inner.env.clock.clone();
        let mut inputs = Vec::with_capacity(FRAMES_PER_SEAL);
        // Kept across turns: a stall must not hide behind events that keep coming.
        let mut look = pin!(clock.sleep(LOOK_EVERY));
        self.watch.looked_ms = clock.mono_ms();
        loop {
            if self.flow.durable_is_next() && !self.is_long_enough() {
                return Ok(Turn::Short);
            }
            let takes_more = self.flow.takes_more();
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
                permit = link.units.reserve(), if self.flow.has_ready() => {
                    // A closed queue means a broken connection: its event comes.
                    match permit {
                        Ok(permit) => if let Some(unit) = self.next_unit() { permit.send(unit) },
                        Err(_) => clock.sleep(Duration::from_millis(10)).await,
                    }
                }
                Some(sealed) = self.flow.sealed(), if self.flow.is_sealing() => sealed?,
                count = self.input.recv_many(&mut inputs, FRAMES_PER_SEAL), if takes_more => {
                    if count == 0 {
                        return Err(Error::new(ErrorCode::Internal, "the writer was dropped"));
                    }
                    self.flow.take(&self.file, BlockId(self.block.id), &mut inputs);
                }
            }
        }
    }

    /// Notes the next outgoing unit as sent.
    fn next_unit(&mut self) -> Option<WireUnit> {
        let now_ms = self.now_ms();
        if !self.flow.waits() {
            // Nothing was under way: the wait for an ack begins now.
            (self.watch.heard_ms, self.watch.progress_ms) = (now_ms, now_ms);
        }
        self.watch.sent_ms = now_ms;
        self.flow.next_unit(BlockId(self.block.id))
    }

    fn on_event(&mut self, event: Option<Event>) -> Option<Turn> {
        let (kind, length, behind) = match event {
            Some(Event::Ack { kind, length, behind }) => (kind, length, behind),
            Some(Event::Broken(failure)) => return Some(Turn::Broken(failure)),
            None => return Some(self.broken(0, "the connection ended")),
        };
        let sent = self.flow.sent();
        if length > sent {
            return Some(self.broken(0, &format!("it acknowledged {length} bytes of {sent}")));
        }
        self.watch.heard_ms = self.now_ms();
        self.watch.behind = behind;
        if self.flow.on_held(length) {
            self.watch.progress_ms = self.watch.heard_ms;
            self.troubles = 0;
            self.alone = None;
        }
        if self.flow.acked > 0
            && let Some(next) = self.turn.next.take()
        {
            // There may be no next block.
            let _ = next.send(());
        }
        let answered = match kind {
            AckKind::AckFlushed => MarkerKind::Flush,
            AckKind::AckSynced => MarkerKind::Sync,
            AckKind::AckFinished => MarkerKind::Finish,
            AckKind::AckProgress | AckKind::AckError => return None,
        };
        let mark = self.flow.answered(answered)?;
        self.watch.progress_ms = self.watch.heard_ms;
        if answered == MarkerKind::Finish {
            if length != mark.marker.length {
                return Some(self.broken(0, &format!("it finished {length} bytes of {}", mark.marker.length)));
            }
            return Some(Turn::Finished);
        }
        // The caller may have stopped waiting.
        let _ = mark.done.map(|done| done.send(()));
        None
    }

    fn broken(&self, index: usize, why: &str) -> Turn {
        let node = self.targets.get(index).map(node_name).unwrap_or_default();
        let error = Error::new(ErrorCode::TimedOut, format!("{node}: {why}")).with_subject(&node);
        Turn::Broken(Failure { index, error })
    }

    /// Finds a pipeline that stalls; shows that the writer lives while there is nothing to send.
    fn on_time(&mut self, link: &Link) -> Option<Turn> {
        let now_ms = self.now_ms();
        let away_ms = now_ms.saturating_sub(self.watch.looked_ms);
        self.watch.looked_ms = now_ms;
        if away_ms > AWAY_MS {
            (self.watch.heard_ms, self.watch.progress_ms) = (now_ms, now_ms);
        }
        let (silence_ms, stall_ms) = (self.settings().write_stall_ms, self.settings().finish_stall_ms);
        if self.flow.waits() && now_ms - self.watch.heard_ms > silence_ms {
            return Some(self.broken(0, &format!("it said nothing for {silence_ms} ms")));
        }
        if self.flow.waits() && now_ms - self.watch.progress_ms > stall_ms {
            let index = self.watch.behind.min(self.targets.len().saturating_sub(1));
            return Some(self.broken(index, &format!("the others waited for it for {stall_ms} ms")));
        }
        if !self.flow.finish_sent() && now_ms - self.watch.sent_ms >= HEARTBEAT_MS {
            let unit =
                WireUnit::marker(self.block_id(), Marker { kind: MarkerKind::Heartbeat, length: self.flow.sent() });
            // A full queue says more than a heartbeat would.
            if link.units.try_send(unit).is_ok() {
                self.watch.sent_ms = now_ms;
            }
        }
        None
    }
}

//! The way back of a write pipeline: what this node and all below hold, told upwards.
//!
//! # Overview
//! Events of the disk task, of the reader and of the node below arrive in one bounded channel. An ack of length L goes up when this node and all
//! below hold L; the ack of a marker, when both have carried it out. Acks are gathered: one goes up per MiB, or when nothing is on its
//! way. While something is on its way for long, the same ack is repeated, so that a slow sync is not taken for a dead node.
//!
//! # Who stalls
//! A node that lives repeats its ack four times in the time after which its silence counts, whatever becomes of the nodes below it. So only
//! the neighbour of a stopped node sees silence, and names it. A node whose disk hangs still speaks, and leaves the pipeline by itself. Each ack
//! says which node the others wait for. Who was away itself (a stopped process) judges nobody by that time.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use cairn_proto::dataplane::MarkerKind;
use cairn_proto::{Error, ErrorCode, Result, pb};
use tokio::sync::mpsc;

use super::Transfer;
use super::upstream::Up;
use super::write::Broken;
use crate::store::writer::OpenReplica;

/// Acks of progress are gathered up to this.
const ACK_STEP: u64 = 1 << 20;
/// The next node is called slow when it alone is so far behind this one, ...
const SLOW_BYTES: u64 = 4 << 20;
/// ... for so long.
const SLOW_MS: u64 = 2_000;
/// After the node below closed its door to data, it may still say why.
const LAST_WORDS_MS: u64 = 1_000;

/// What happened.
#[derive(Debug)]
pub enum Event {
    /// The disk task wrote frames.
    Wrote,
    /// The disk task carried out a marker.
    Done(MarkerKind),
    /// The disk task failed.
    Failed(Error),
    /// The reader passed a marker on.
    Expect(MarkerKind),
    /// The node below acked.
    Below(pb::WriteAck),
    /// The node below closed the connection.
    BelowLeft(Error),
    /// The node below takes no more data.
    BelowDeaf(Error),
}

/// Numbers that the parts of one write share.
#[derive(Default)]
pub struct Progress {
    /// Received and verified.
    pub received: AtomicU64,
    /// Written here.
    pub written: Arc<AtomicU64>,
}

/// State of the way back.
pub struct Acks<'a> {
    transfer: &'a Transfer,
    up: &'a mut Up,
    events: mpsc::Receiver<Event>,
    progress: &'a Progress,
    open: Option<Arc<OpenReplica>>,
    /// Held by all below; `None`: this is the last node.
    below: Option<u64>,
    sent: u64,
    /// A message upwards is half sent if we stop now.
    sending: &'a AtomicBool,
    expected: VecDeque<MarkerKind>,
    done_here: usize,
    done_below: usize,
    /// Whom the nodes below wait for, as the next one counts.
    behind_below: u32,
    slow_since_ms: Option<u64>,
    slow_told: bool,
    last_up_ms: u64,
    last_below_ms: u64,
    last_written: (u64, u64),
}

impl<'a> Acks<'a> {
    /// For a write that starts with `kept` bytes held by all.
    #[allow(clippy::too_many_arguments)] // what the parts of one write share, each by its own name
    pub fn new(
        transfer: &'a Transfer,
        up: &'a mut Up,
        events: mpsc::Receiver<Event>,
        progress: &'a Progress,
        open: Option<Arc<OpenReplica>>,
        has_below: bool,
        kept: u64,
        sending: &'a AtomicBool,
    ) -> Self {
        let now = transfer.env.clock.mono_ms();
        Self {
            transfer,
            up,
            events,
            progress,
            open,
            below: has_below.then_some(kept),
            sent: kept,
            sending,
            expected: VecDeque::new(),
            done_here: 0,
            done_below: 0,
            behind_below: 0,
            slow_since_ms: None,
            slow_told: false,
            last_up_ms: now.max(1),
            last_below_ms: now,
            last_written: (kept, now),
        }
    }

    /// Runs until the finish is acked upwards.
    pub async fn run(mut self) -> Result<(), Broken> {
        let tick_ms = (self.transfer.settings.pipeline_timeout_ms / 8).clamp(20, 1_000);
        let mut deaf: Option<Error> = None;
        let mut due_ms = self.now() + tick_ms;
        loop {
            let limit = Duration::from_millis(due_ms.saturating_sub(self.now()));
            let mut next = match self.transfer.env.clock.timeout(limit, self.events.recv()).await {
                Ok(Some(event)) => Some(event),
                // The reader holds a sender until the finish, the disk task until it is done.
                Ok(None) => {
                    return Err(Broken::here(Error::new(ErrorCode::Internal, "the write ended without an outcome")));
                }
                Err(_) => None,
            };
            while let Some(event) = next {
                match event {
                    Event::BelowDeaf(error) => {
                        deaf = Some(error);
                        due_ms = self.now() + LAST_WORDS_MS;
                    }
                    event => self.on_event(event)?,
                }
                next = self.events.try_recv().ok();
            }
            // Whatever woke us: a neighbour's silence must not hide behind the others' events.
            if self.now() >= due_ms {
                if let Some(error) = deaf.take() {
                    return Err(Broken::below(error, 0));
                }
                if self.now() - due_ms > tick_ms.max(self.transfer.settings.pipeline_timeout_ms / 4) {
                    self.was_away();
                }
                self.on_tick()?;
                due_ms = self.now() + tick_ms;
            }
            if self.tell().await? {
                return Ok(());
            }
        }
    }

    fn now(&self) -> u64 {
        self.transfer.env.clock.mono_ms()
    }

    fn on_event(&mut self, event: Event) -> Result<(), Broken> {
        match event {
            Event::Wrote | Event::BelowDeaf(_) => {}
            // A heartbeat is answered at once, by each node for itself.
            Event::Expect(MarkerKind::Heartbeat) => self.last_up_ms = 0,
            Event::Expect(kind) => self.expected.push_back(kind),
            Event::Done(_) => self.done_here += 1,
            Event::Failed(error) => return Err(Broken::here(error)),
            Event::BelowLeft(error) => return Err(Broken::below(error, 0)),
            Event::Below(ack) => return self.on_below(ack),
        }
        Ok(())
    }

    fn on_below(&mut self, ack: pb::WriteAck) -> Result<(), Broken> {
        self.last_below_ms = self.now();
        self.behind_below = ack.behind;
        if let Some(below) = &mut self.below {
            *below = (*below).max(ack.length);
        }
        match ack.kind() {
            pb::AckKind::AckProgress => {}
            pb::AckKind::AckFlushed | pb::AckKind::AckSynced | pb::AckKind::AckFinished => self.done_below += 1,
            pb::AckKind::AckError => {
                let error = ack.error.map_or_else(
                    || Error::new(ErrorCode::Internal, "the next datanode failed without a reason"),
                    Error::from_wire,
                );
                return Err(Broken::below(error, ack.failed_index));
            }
        }
        Ok(())
    }

    /// Held by this node and all below.
    fn held(&self) -> u64 {
        let written = self.progress.written.load(Ordering::Acquire);
        self.below.map_or(written, |below| below.min(written))
    }

    /// Whom the others wait for: 0 this node, 1 the next one, and so on.
    fn behind(&self) -> u32 {
        let Some(below) = self.below.filter(|_| !self.idle()) else { return 0 };
        let written = self.progress.written.load(Ordering::Acquire);
        let waits = below < written || (below == written && self.done_below < self.done_here);
        if waits { self.behind_below.saturating_add(1) } else { 0 }
    }

    /// This process did not run for a while: the others' words of that time may still wait to be read.
    fn was_away(&mut self) {
        let now = self.now();
        self.last_below_ms = now;
        self.last_written.1 = now;
        self.slow_since_ms = None;
    }

    /// Counts a next node that is far behind for long by its own fault. It stays: only who stalls is left out.
    fn watch_pace(&mut self) {
        let written = self.progress.written.load(Ordering::Acquire);
        let lag = self.below.map_or(0, |below| written.saturating_sub(below));
        if lag < SLOW_BYTES || self.behind() != 1 {
            self.slow_since_ms = None;
            return;
        }
        let now = self.now();
        let since = *self.slow_since_ms.get_or_insert(now);
        if !self.slow_told && now.saturating_sub(since) >= SLOW_MS {
            self.slow_told = true;
            self.transfer.metrics.slow_next.fetch_add(1, Ordering::Relaxed);
            tracing::info!(lag_bytes = lag, "the next datanode of a pipeline is slow");
        }
    }

    /// Nothing is on its way.
    fn idle(&self) -> bool {
        self.expected.is_empty() && self.held() >= self.progress.received.load(Ordering::Acquire)
    }

    /// Repeats the ack while something is on its way, and gives up on a silent neighbour or a hung disk.
    fn on_tick(&mut self) -> Result<(), Broken> {
        self.watch_pace();
        let now = self.now();
        let limit = self.transfer.settings.pipeline_timeout_ms;
        let disk_limit = self.transfer.settings.disk_stall_ms;
        let written = self.progress.written.load(Ordering::Acquire);
        let received = self.progress.received.load(Ordering::Acquire);
        if written != self.last_written.0 || (written >= received && self.done_here >= self.expected.len()) {
            self.last_written = (written, now);
        } else if now.saturating_sub(self.last_written.1) > disk_limit {
            let text = format!("the disk neither took data nor ended a sync for {disk_limit} ms");
            return Err(Broken::here(Error::new(ErrorCode::TimedOut, text)));
        }
        if let Some(below) = self.below {
            let owes = below < received || self.done_below < self.expected.len();
            if !owes {
                self.last_below_ms = now;
            } else if now.saturating_sub(self.last_below_ms) > limit {
                self.transfer.metrics.stalled_next.fetch_add(1, Ordering::Relaxed);
                let text = format!("the next datanode of the pipeline was silent for {limit} ms");
                return Err(Broken::below(Error::new(ErrorCode::TimedOut, text), 0));
            }
        }
        if !self.idle() && now.saturating_sub(self.last_up_ms) >= limit / 4 {
            self.last_up_ms = 0;
        }
        Ok(())
    }

    /// Sends what is due. True: the finish is acked.
    async fn tell(&mut self) -> Result<bool, Broken> {
        let held = self.held();
        if let Some(open) = &self.open {
            open.set_visible(held);
        }
        while let Some(kind) = self.expected.front().copied() {
            let below_too = self.below.is_none() || self.done_below > 0;
            if self.done_here == 0 || !below_too {
                break;
            }
            self.expected.pop_front();
            self.done_here -= 1;
            self.done_below = self.done_below.saturating_sub(1);
            let kind = match kind {
                MarkerKind::Finish => pb::AckKind::AckFinished,
                MarkerKind::Sync => pb::AckKind::AckSynced,
                MarkerKind::Flush | MarkerKind::Heartbeat => pb::AckKind::AckFlushed,
            };
            self.send(kind, held).await?;
            if kind == pb::AckKind::AckFinished {
                return Ok(true);
            }
        }
        let received = self.progress.received.load(Ordering::Acquire);
        let due = held > self.sent && (held - self.sent >= ACK_STEP || held >= received);
        if due || self.last_up_ms == 0 {
            self.send(pb::AckKind::AckProgress, held).await?;
        }
        Ok(false)
    }

    async fn send(&mut self, kind: pb::AckKind, length: u64) -> Result<(), Broken> {
        let ack = pb::WriteAck { kind: kind as i32, length, behind: self.behind(), ..Default::default() };
        self.sending.store(true, Ordering::Relaxed);
        self.up.tell(ack).await.map_err(|error| Broken::above(Error::io("sending an ack to the writer", &error)))?;
        self.sending.store(false, Ordering::Relaxed);
        self.sent = length;
        self.last_up_ms = self.now().max(1);
        Ok(())
    }
}

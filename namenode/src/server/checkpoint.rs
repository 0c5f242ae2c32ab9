//! When and how the owner has an image written.
//!
//! ```text
//!          due                     last page            S durable            result
//!   Idle ───────▶ Slicing ───────────────────▶ Sealing ───────────▶ Writing ─────────▶ Idle
//!                    │ image thread gone                                │ failed
//!                    └──────────────────────▶ Idle (tried again later) ◀┘
//! ```
//! Slices are taken only while the image thread has room, and each for at most a millisecond, so neither compression nor a
//! slow disk makes the owner wait.

use cairn_common::clock::Clock;
use cairn_proto::ids::TxId;
use cairn_proto::{Error, ErrorCode, Result, pb};
use tokio::sync::oneshot;

use super::owner::Answer;
use crate::core::Core;
use crate::image::format::ImageHeader;
use crate::image::{ImageJob, Imager, PageRoom, Written};
use crate::journal::{Journal, LogError};

/// Longest slice, microseconds.
const SLICE_US: u64 = 1_000;
/// Pages between two looks at the clock.
const PAGES_PER_LOOK: usize = 2;

/// When to write images.
#[derive(Clone, Debug)]
pub struct CheckpointKnobs {
    /// After this many transactions.
    pub edits: u64,
    /// After this time, if anything changed.
    pub interval_ms: u64,
    /// After a failure, not before this time has passed.
    pub retry_ms: u64,
    /// zstd level.
    pub level: i32,
    /// Whose images they are.
    pub cluster_id: String,
    /// Transaction of the newest image at start.
    pub newest: TxId,
}

#[derive(Default)]
enum State {
    #[default]
    Idle,
    Slicing(Running),
    Sealing(Running),
    Writing(Running, oneshot::Receiver<Result<Written, LogError>>),
}

#[derive(Clone, Copy)]
struct Running {
    txid: TxId,
    started_ms: u64,
}

/// See the module.
pub struct Checkpoint {
    knobs: CheckpointKnobs,
    state: State,
    newest: TxId,
    newest_ms: u64,
    not_before_ms: u64,
    /// Who waits for the image that is being written, and for the next one.
    waiting: Vec<Answer<pb::CheckpointResponse>>,
    asked: Vec<Answer<pb::CheckpointResponse>>,
}

impl Checkpoint {
    pub fn new(knobs: CheckpointKnobs, now_ms: u64) -> Self {
        let newest = knobs.newest;
        Self {
            knobs,
            state: State::Idle,
            newest,
            newest_ms: now_ms,
            not_before_ms: 0,
            waiting: Vec::new(),
            asked: Vec::new(),
        }
    }

    /// Somebody wants an image of what is now.
    pub fn ask(&mut self, answers: &mut Vec<Answer<pb::CheckpointResponse>>) {
        self.asked.append(answers);
    }

    pub fn is_due(&self, last: TxId, now_ms: u64) -> bool {
        if !matches!(self.state, State::Idle) {
            return false;
        }
        let edits = last.0.saturating_sub(self.newest.0);
        let by_itself = edits >= self.knobs.edits || edits > 0 && now_ms >= self.newest_ms + self.knobs.interval_ms;
        !self.asked.is_empty() || by_itself && now_ms >= self.not_before_ms
    }

    /// Begins an image of the state now. All edits must have been given to the journal.
    pub async fn begin(&mut self, core: &mut Core, journal: &Journal, imager: &Imager, clock: &Clock) {
        // The next transaction opens a new segment, so whole segments fall away later.
        if journal.roll().await.is_err() {
            return; // the owner finds the reason in the journal's status
        }
        self.waiting.append(&mut self.asked);
        let status = journal.status().borrow().clone();
        let txid = core.checkpoint_begin();
        let header = ImageHeader {
            txid,
            epoch: status.epoch,
            cluster_id: self.knobs.cluster_id.clone(),
            state_digest: core.digest(),
        };
        let running = Running { txid, started_ms: clock.mono_ms() };
        self.state = State::Slicing(running);
        match imager.room().await {
            Some(room) => room.begin(ImageJob { header, dirs: status.dirs, level: self.knobs.level }),
            None => self.step(None, core, clock),
        }
    }

    /// Whether [`Self::step`] has something to hand over. `durable`: the last durable transaction.
    pub fn wants_room(&self, durable: TxId) -> bool {
        match &self.state {
            State::Slicing(_) => true,
            // An image must never know more than the log.
            State::Sealing(running) => running.txid <= durable,
            State::Idle | State::Writing(..) => false,
        }
    }

    /// Takes one slice, or ends the image. `None`: the image thread is gone.
    pub fn step(&mut self, room: Option<PageRoom<'_>>, core: &mut Core, clock: &Clock) {
        self.state = match (std::mem::take(&mut self.state), room) {
            (State::Slicing(running), Some(room)) => {
                let mut pages = Vec::new();
                let start = clock.mono_us();
                let mut done = false;
                while !done && clock.mono_us() < start + SLICE_US {
                    done = core.checkpoint_slice(PAGES_PER_LOOK, &mut pages);
                }
                room.pages(pages);
                if done { State::Sealing(running) } else { State::Slicing(running) }
            }
            (State::Sealing(running), Some(room)) => State::Writing(running, room.finish()),
            (State::Slicing(_) | State::Sealing(_), None) => {
                core.checkpoint_abort();
                self.fail(&Error::new(ErrorCode::Internal, "the image thread has stopped"), clock);
                State::Idle
            }
            (other, _) => other,
        };
    }

    /// Waits for the image to be in force; for ever if none is being written.
    pub async fn written(&mut self) -> Result<Written> {
        let State::Writing(_, result) = &mut self.state else { return std::future::pending().await };
        match result.await {
            Ok(result) => result.map_err(Error::from),
            Err(_) => Err(Error::new(ErrorCode::Internal, "the image thread has stopped")),
        }
    }

    /// Takes the outcome of [`Self::written`].
    pub async fn finished(&mut self, written: Result<Written>, core: &mut Core, journal: &Journal, clock: &Clock) {
        let State::Writing(running, _) = std::mem::take(&mut self.state) else { return };
        let written = match written {
            Ok(written) => written,
            Err(error) => return self.fail(&error, clock),
        };
        let elapsed_ms = clock.mono_ms().saturating_sub(running.started_ms);
        tracing::info!(txid = %written.txid, pages = written.pages, bytes = written.bytes, elapsed_ms, "image written");
        self.newest = written.txid;
        self.newest_ms = clock.mono_ms();
        core.set_last_checkpoint(written.txid);
        if !written.failed.is_empty() {
            // They cannot be started from as the others can. The log would have found out at its next failure there.
            let _ = journal.drop_dirs(written.failed).await;
        }
        if written.purge > TxId(0) {
            // The journal may have stopped: then the owner ends anyway.
            let _ = journal.purge(written.purge).await;
        }
        let response = pb::CheckpointResponse { txid: written.txid.0, bytes: written.bytes, elapsed_ms };
        for answer in self.waiting.drain(..) {
            let _ = answer.send(Ok(response));
        }
    }

    fn fail(&mut self, error: &Error, clock: &Clock) {
        tracing::error!(%error, "no image could be written; the log keeps everything");
        self.not_before_ms = clock.mono_ms() + self.knobs.retry_ms;
        for answer in self.waiting.drain(..) {
            let _ = answer.send(Err(error.clone()));
        }
    }
}

//! The pure core of the namenode: namespace, block map, nodes, placement, leases, repair, safe mode.
//!
//! # Overview
//! [`Core`] is one value with one method that matters: [`Core::on_event`] takes an [`Event`] with the time and a seed and
//! appends [`Command`]s. It knows no clock, file, network, thread or random source, so the same events give the same
//! commands, in a test as in production.
//!
//! ```text
//!  calls.rs      which call is which operation; retry cache, parked calls
//!  directory.rs attributes.rs listing.rs files.rs writing.rs    the operations
//!  append.rs truncate.rs concat.rs                              the operations on files that are there
//!  permissions.rs                                               who may do what
//!  edits.rs      the one place that changes the persistent state, live and in replay
//!  tree.rs inode.rs name.rs children.rs pages.rs                the namespace in memory
//!  blocks.rs blockset.rs nodes.rs placement.rs                  the block map, the nodes
//!  membership.rs reports.rs repair.rs trim.rs safemode.rs leases.rs recovery.rs generations.rs merge.rs cursors.rs subtree.rs    what happens by itself
//!  image.rs restore.rs   checkpoints and loading, what a restore changes
//! ```
//!
//! # Consistency
//! An operation validates, builds an edit that carries results, and hands it to `commit`, which applies it with the same
//! function that replay uses and emits [`Command::Append`]. Each reply names the transaction that it depends on
//! (`unsynced.rs`). Work without a bound (freeing a tree, a node's death) lies in `cursors.rs` and is done in turns.
//!
//! # Crash
//! Only edits and image pages persist. What a crash loses is what no reply has told.

mod append;
mod attributes;
mod blocks;
mod blockset;
mod calls;
mod children;
mod codec;
mod concat;
mod cursors;
mod directory;
mod edits;
mod event;
mod files;
mod generations;
mod image;
mod inode;
mod leases;
mod listing;
mod membership;
mod merge;
mod name;
mod nodes;
mod pages;
mod permissions;
mod pipeline;
mod placement;
mod recovery;
mod repair;
mod reports;
mod restore;
mod retry;
mod safemode;
mod settings;
mod subtree;
#[cfg(test)]
mod tests;
mod trash;
mod tree;
mod trim;
mod truncate;
mod unsynced;
mod writing;

use std::collections::BTreeMap;

use cairn_proto::ids::{BlockId, Epoch, Generation, InodeId, TxId};
use cairn_proto::pb::{self, edit::Kind};
use cairn_proto::{Error, ErrorCode};
use prost::Message as _;

use blocks::BlockMap;
use codec::Random;
use cursors::Cursors;
use generations::{HandedOut, TakingBack};
use leases::Leases;
use merge::Merges;
use nodes::{NodeIndex, Nodes};
use recovery::Recoveries;
use repair::Repair;
use retry::RetryCache;
use safemode::SafeMode;
#[doc(hidden)]
pub use safemode::grouped;
use tree::Tree;
use unsynced::Unsynced;

pub use event::{Caller, ClientRequest, ClientResponse, Command, Event, Now, ReplyTo, Response, StreamId};
pub use image::{DecodedPage, LoadError};
pub use settings::CoreSettings;

/// A larger edit is refused before it changes anything: the log could not take it, and the namenode would end.
const MAX_EDIT_BYTES: usize = 1 << 20;

/// An edit whose precondition does not hold: the log and the image do not fit together.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("transaction {txid} cannot be applied: {cause}")]
pub struct ReplayError {
    /// The transaction.
    pub txid: TxId,
    /// What does not hold.
    pub cause: String,
}

/// What the first edit fixes for ever.
#[derive(Default, Clone, PartialEq, Eq, Debug)]
struct Facts {
    cluster_id: String,
    pool_id: String,
    superuser: String,
    supergroup: String,
}

/// Highest numbers handed out; none is used twice.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Counters {
    inode: u64,
    block: u64,
    generation: u64,
    /// Newest time in an edit: stored times never go back.
    wall_ms: u64,
}

impl Default for Counters {
    fn default() -> Self {
        Self { inode: InodeId::ROOT.0, block: BlockId::BASE.0 as u64, generation: Generation::FIRST.0 - 1, wall_ms: 0 }
    }
}

/// The namenode's state; see the module.
pub struct Core {
    settings: CoreSettings,
    facts: Facts,
    counters: Counters,
    epoch: Epoch,
    last_txid: TxId,
    last_checkpoint: TxId,
    /// The transaction that the state was restored to, until a person confirms it; 0: nothing waits for that.
    restored_to: u64,
    /// Blocks that it freed lately.
    freed: restore::Freed,
    tree: Tree,
    blocks: BlockMap,
    nodes: Nodes,
    leases: Leases,
    recoveries: Recoveries,
    handed_out: HandedOut,
    taking_back: TakingBack,
    merges: Merges,
    retry: RetryCache,
    parked: calls::Parked,
    unsynced: Unsynced,
    repair: Repair,
    safemode: SafeMode,
    streams: BTreeMap<StreamId, NodeIndex>,
    cursors: Cursors,
    checkpoint: image::Checkpoint,
    next_registration: u64,
    /// Turn time: monotonic milliseconds without the pauses.
    now_ms: u64,
    /// Pauses so far.
    paused_ms: u64,
    last_mono_ms: u64,
    started_ms: u64,
    /// How far the wall clock was ahead of the monotonic one at the last look, and since when (turn time) it goes steadily.
    wall_ahead_ms: i64,
    steady_since_ms: u64,
    upkeep_ms: u64,
    /// When the trash is looked at next, and the last user whose turn it was.
    trash_due_ms: u64,
    trash_after: Box<str>,
}

/// What one event works with.
struct Turn<'a> {
    wall_ms: u64,
    random: Random,
    commands: &'a mut Vec<Command>,
    /// The call that an edit shall carry for the retry cache.
    call: Option<retry::CallKey>,
}

/// Whether an edit is the one that carries the answer of its call.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Carries {
    Answer,
    Nothing,
}

impl Core {
    fn empty(settings: CoreSettings) -> Self {
        Self {
            settings,
            facts: Facts::default(),
            counters: Counters::default(),
            epoch: Epoch(0),
            last_txid: TxId(0),
            last_checkpoint: TxId(0),
            restored_to: 0,
            freed: restore::Freed::default(),
            tree: Tree::default(),
            blocks: BlockMap::default(),
            nodes: Nodes::default(),
            leases: Leases::default(),
            recoveries: Recoveries::default(),
            handed_out: HandedOut::default(),
            taking_back: TakingBack::default(),
            merges: Merges::default(),
            retry: RetryCache::default(),
            parked: calls::Parked::default(),
            unsynced: Unsynced::default(),
            repair: Repair::default(),
            safemode: SafeMode::default(),
            streams: BTreeMap::new(),
            cursors: Cursors::default(),
            checkpoint: image::Checkpoint::default(),
            next_registration: 0,
            now_ms: 0,
            paused_ms: 0,
            last_mono_ms: 0,
            started_ms: 0,
            wall_ahead_ms: 0,
            steady_since_ms: 0,
            upkeep_ms: 0,
            trash_due_ms: 0,
            trash_after: "".into(),
        }
    }

    /// A new, empty cluster. Emits its first edits; to be followed by [`Core::start`].
    pub fn format(
        settings: CoreSettings,
        cluster_id: &str,
        pool_id: &str,
        superuser: &str,
        supergroup: &str,
        now: Now,
        commands: &mut Vec<Command>,
    ) -> Self {
        let mut core = Self::empty(settings);
        let mut turn = Turn { wall_ms: now.wall_ms, random: Random::new(0), commands, call: None };
        let format = pb::EditFormat {
            cluster_id: cluster_id.into(),
            pool_id: pool_id.into(),
            superuser: superuser.into(),
            supergroup: supergroup.into(),
        };
        // Cannot fail: the state is empty.
        let _ = core.commit(&mut turn, Carries::Nothing, Kind::Format(format));
        core
    }

    /// Waits for pages of an image, or for a replay from the first transaction.
    pub fn new_for_load(settings: CoreSettings) -> Self {
        Self::empty(settings)
    }

    /// Applies one edit of the log. Strict: every precondition is checked.
    pub fn replay(&mut self, txid: TxId, edit: pb::Edit) -> Result<(), ReplayError> {
        let fail = |cause: String| ReplayError { txid, cause };
        if txid != self.last_txid.next() {
            return Err(fail(format!("it follows {}, so {} was expected", self.last_txid, self.last_txid.next())));
        }
        self.apply(txid, &edit).map_err(fail)?;
        self.remember_replayed(txid, &edit);
        self.last_txid = txid;
        self.unsynced.synced(txid);
        let mut unbounded = usize::MAX;
        self.free_doomed(&mut unbounded);
        Ok(())
    }

    /// Begins to serve: leases start anew, safe mode begins, a changed epoch is logged.
    pub fn start(&mut self, now: Now, epoch: Epoch, commands: &mut Vec<Command>) {
        self.now_ms = now.mono_ms;
        self.last_mono_ms = now.mono_ms;
        self.paused_ms = 0;
        self.started_ms = self.now_ms;
        self.wall_ahead_ms = now.wall_ms as i64 - now.mono_ms as i64;
        self.steady_since_ms = self.now_ms;
        // Registrations of the namenode's earlier life must not look valid.
        self.next_registration = (now.wall_ms << 10) | 1;
        self.leases.renew_all(self.now_ms);
        self.retry.restamp(self.now_ms);
        let mut turn = Turn { wall_ms: now.wall_ms, random: Random::new(0), commands, call: None };
        self.raise_epoch(&mut turn, epoch);
        self.safemode = SafeMode::at_start();
        self.check_safemode();
    }

    /// From now on every answer to a datanode carries this epoch, if it is a newer one.
    fn raise_epoch(&mut self, turn: &mut Turn<'_>, epoch: Epoch) {
        if epoch > self.epoch {
            // Cannot fail: the epoch is newer.
            let _ = self.commit(turn, Carries::Nothing, Kind::Epoch(pb::EditEpoch { epoch: epoch.0 }));
        }
    }

    /// Handles one event; appends what is to be done. `seed` is the source of all randomness in it.
    pub fn on_event(&mut self, now: Now, seed: u64, event: Event, commands: &mut Vec<Command>) {
        self.advance_clock(now);
        let mut turn = Turn { wall_ms: now.wall_ms, random: Random::new(seed), commands, call: None };
        match event {
            Event::Client { reply, caller, request } => self.on_client(&mut turn, reply, caller, request),
            Event::Register { reply, peer_ip, request } => {
                self.unsynced.reset();
                let result = self.register(&mut turn, &peer_ip, request).map(Response::Register);
                let depends_on = self.unsynced.depends_on();
                turn.commands.push(Command::Reply { to: reply, depends_on, result });
            }
            Event::Heartbeat { reply, request } => {
                self.unsynced.reset();
                let result = self.heartbeat(&turn, request).map(Response::Heartbeat);
                let depends_on = self.unsynced.depends_on();
                turn.commands.push(Command::Reply { to: reply, depends_on, result });
            }
            Event::ReportOpened { stream, open } => self.report_opened(&mut turn, stream, &open),
            Event::Report { stream, report } => self.on_report(&mut turn, stream, report),
            Event::ReportClosed { stream } => self.report_closed(stream),
            Event::Synced { txid } => self.unsynced.synced(txid),
            Event::EpochRaised { epoch } => self.raise_epoch(&mut turn, epoch),
            Event::Tick => self.tick(&mut turn),
        }
        self.wake_parked(&mut turn);
    }

    /// A pause of the owner must not look like silence of everybody else: turn time leaves out what a gap has beyond the
    /// usual. Never all of it: time that stands still would end no lease and find no dead node.
    fn advance_clock(&mut self, now: Now) {
        let gap = now.mono_ms.saturating_sub(self.last_mono_ms);
        self.paused_ms += gap.saturating_sub(2 * self.settings.heartbeat_interval_ms);
        self.last_mono_ms = self.last_mono_ms.max(now.mono_ms);
        self.now_ms = self.now_ms.max(self.last_mono_ms - self.paused_ms);
    }

    fn tick(&mut self, turn: &mut Turn<'_>) {
        self.expire_parked(turn);
        if self.now_ms >= self.upkeep_ms {
            self.upkeep_ms = self.now_ms + self.settings.heartbeat_interval_ms.min(1_000) / 2;
            self.find_dead_nodes();
            self.expire_leases(turn);
            self.take_back_replicas(turn);
            self.empty_trash(turn);
            self.expire_pending();
            self.run_merges(turn);
            self.expire_answers(self.settings.cursor_budget);
        }
        self.check_safemode();
        self.check_settled();
        self.run_cursors(turn);
        self.schedule_repairs(turn);
    }

    /// Logs and applies one edit. The state was validated by the caller; a failure here is a fault of this program.
    fn commit(&mut self, turn: &mut Turn<'_>, carries: Carries, kind: Kind) -> Result<TxId, Error> {
        let txid = self.last_txid.next();
        let (client_id, call_id) = match (&turn.call, carries) {
            (Some(call), Carries::Answer) => call.clone(),
            _ => (bytes::Bytes::new(), 0),
        };
        let time_ms = turn.wall_ms.max(self.counters.wall_ms);
        let edit = pb::Edit { min_reader: edits::min_reader(&kind), client_id, call_id, time_ms, kind: Some(kind) };
        let bytes = edit.encoded_len();
        if bytes > MAX_EDIT_BYTES {
            let message = format!("the change takes {bytes} bytes in the log, more than {MAX_EDIT_BYTES}");
            return Err(Error::new(ErrorCode::InvalidArgument, message));
        }
        self.apply(txid, &edit).map_err(|cause| Error::new(ErrorCode::Internal, format!("edit refused: {cause}")))?;
        self.last_txid = txid;
        self.unsynced.depend(txid);
        turn.commands.push(Command::Append { txid, edit });
        Ok(txid)
    }

    /// Whether cursors have work left: the owner then sends the next `Tick` at once.
    pub fn has_work(&self) -> bool {
        self.cursors.has_work()
    }

    /// The last transaction that was emitted, replayed or loaded.
    pub fn last_txid(&self) -> TxId {
        self.last_txid
    }

    /// Whether a caller may do everything.
    pub fn is_superuser(&self, caller: &Caller) -> bool {
        self.who(caller).superuser
    }

    /// Reported replicas, newer than anything that this namenode ever handed out: proof that it was started with old
    /// metadata. They are left alone.
    pub fn future_replicas(&self) -> u64 {
        self.repair.future_replicas
    }

    /// The settings.
    pub fn settings(&self) -> &CoreSettings {
        &self.settings
    }

    /// The epoch in force.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The cluster's id, for handshakes.
    pub fn cluster_id(&self) -> &str {
        &self.facts.cluster_id
    }

    /// The block pool's id.
    pub fn pool_id(&self) -> &str {
        &self.facts.pool_id
    }

    /// The owner tells which image is the newest, for the cluster report.
    pub fn set_last_checkpoint(&mut self, txid: TxId) {
        self.last_checkpoint = txid;
    }
}

//! After a restore: counters that were moved on, and the word of a person before anything is put away.
//!
//! # Deleted or put away
//! A datanode *deletes* a replica at once only if this namenode knows from its own log why: it freed the block ([`Freed`], or the order was
//! queued when it did), or the block has enough other replicas (superfluous, or bad with a good one there). A replica
//! of a block that it does not know otherwise goes into *quarantine*: the file may have been deleted while the node was away, but this
//! namenode may also have been started from the wrong metadata. Left where they are: ids and generations beyond
//! all that was handed out (proof of old metadata: a person must look), and newer generations of a known block as long as a recovery may have made them
//! whose report is on its way, or nothing else is left of it (`generations.rs` takes those back that are its own); neither is ever named to a reader.
//!
//! # Consistency
//! The future that was left behind has handed out ids and generations that this namenode does not know of. The first edit
//! after a restore moves all counters on by [`COUNTER_STEP`] at least, and beyond what the time of day stands for ([`IDS_PER_MS_BITS`]), so none of
//! them is ever handed out again, also when the same backup is restored once more, and whatever datanodes report of them is unknown here. Until [`Core::confirm_restore`] no replica is deleted or quarantined: if the
//! wrong moment was restored, the right one can still be.

use cairn_proto::Error;
use std::collections::{BTreeMap, VecDeque};

use cairn_proto::pb::{self, edit::Kind};

use super::event::{Command, Now};
use super::permissions::Who;
use super::{Carries, Core, Turn, codec};

/// How far the counters move at least: more than any future hands out before somebody notices.
pub const COUNTER_STEP: u64 = 1 << 32;
/// A second restore from the same backup must not begin where the first one did: counters begin at the wall clock's milliseconds times two to this
/// power, which is faster than any namenode hands ids out, so a later restore begins beyond all that an earlier one gave.
const IDS_PER_MS_BITS: u32 = 12;

/// Freed blocks that are remembered.
const MAX_FREED: usize = 16_384;

/// Blocks that were freed lately, live or in replay: a replica that is reported late is known to be superfluous.
#[derive(Default)]
pub struct Freed {
    generations: BTreeMap<u64, u64>,
    order: VecDeque<u64>,
}

impl Freed {
    /// A block was freed in this generation.
    pub fn note(&mut self, id: u64, generation: u64) {
        if self.generations.insert(id, generation).is_none() {
            self.order.push_back(id);
        }
        if self.order.len() > MAX_FREED
            && let Some(oldest) = self.order.pop_front()
        {
            self.generations.remove(&oldest);
        }
    }

    /// Whether this block was freed in this generation or a newer one.
    pub fn contains(&self, id: u64, generation: u64) -> bool {
        self.generations.get(&id).is_some_and(|freed| generation <= *freed)
    }
}

impl Core {
    /// The log has been replayed up to the transaction that a person wants: logs what makes it a future of its own. To be
    /// followed by [`Core::start`] with a higher epoch.
    pub fn begin_restored(&mut self, now: Now, commands: &mut Vec<Command>) {
        let counters = self.counters;
        let by_time = now.wall_ms.min(1 << 50) << IDS_PER_MS_BITS;
        let beyond = |counter: u64| (counter + COUNTER_STEP).max(by_time);
        let edit = pb::EditRestore {
            to_txid: self.last_txid.0,
            inode: beyond(counters.inode),
            block: beyond(counters.block),
            generation: beyond(counters.generation),
        };
        let mut turn = Turn { wall_ms: now.wall_ms, random: codec::Random::new(0), commands, call: None };
        // Cannot fail: the counters rise, and the cluster is formatted.
        let _ = self.commit(&mut turn, Carries::Nothing, Kind::Restore(edit));
    }

    /// Time of the newest edit, milliseconds since 1970.
    pub fn newest_time_ms(&self) -> u64 {
        self.counters.wall_ms
    }

    pub(super) fn apply_restore(&mut self, edit: &pb::EditRestore) -> Result<(), String> {
        let counters = &mut self.counters;
        if edit.inode < counters.inode || edit.block < counters.block || edit.generation < counters.generation {
            return Err("it would hand out numbers twice".into());
        }
        if edit.to_txid == 0 {
            return Err("it names no transaction".into());
        }
        (counters.inode, counters.block, counters.generation) = (edit.inode, edit.block, edit.generation);
        self.restored_to = edit.to_txid;
        Ok(())
    }

    pub(super) fn apply_confirm_restore(&mut self) -> Result<(), String> {
        if self.restored_to == 0 {
            return Err("no restore waits to be confirmed".into());
        }
        self.restored_to = 0;
        Ok(())
    }

    /// The restored state is the right one. Nothing happens if no restore waits for that.
    pub(super) fn confirm_restore(
        &mut self,
        turn: &mut Turn<'_>,
        who: &Who<'_>,
    ) -> Result<pb::ConfirmRestoreResponse, Error> {
        self.check_superuser(who)?;
        let restored_to_txid = self.restored_to;
        if restored_to_txid != 0 {
            self.commit(turn, Carries::Nothing, Kind::ConfirmRestore(pb::EditConfirmRestore {}))?;
        }
        Ok(pb::ConfirmRestoreResponse { restored_to_txid })
    }

    /// Whether replicas may be put away: not while a restore waits to be confirmed.
    pub(super) fn may_put_away(&self) -> bool {
        self.restored_to == 0
    }

    /// What there is to say of an unconfirmed restore; empty if there is none.
    pub(super) fn restore_note(&self) -> String {
        match self.restored_to {
            0 => String::new(),
            txid => format!(
                " The namespace was restored to transaction {txid}: nothing is deleted on datanodes until \
                 `cairn admin confirm-restore`."
            ),
        }
    }
}

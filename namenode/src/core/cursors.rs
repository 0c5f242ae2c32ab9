//! Work without a bound, done in turns: freeing deleted trees, the replicas of a lost storage, assessing every block,
//! sums over a tree.

use std::collections::VecDeque;

use cairn_proto::ids::TxId;
use cairn_proto::pb;
use cairn_proto::{Error, ErrorCode};

use super::attributes::not_found;
use super::blocks::StorageIndex;
use super::event::{Caller, Command, ReplyTo, Response};
use super::inode::Inode;
use super::permissions::{EXECUTE, READ, not_a_directory};
use super::reports::Forget;
use super::subtree::Checks;
use super::{Core, Turn};

/// Summaries that run at a time.
const MAX_SUMMARIES: usize = 64;

/// A sum over a tree.
struct Summary {
    reply: ReplyTo,
    caller: Caller,
    /// Directories to do; the last one is under way, after this name.
    stack: Vec<u64>,
    after: Vec<u8>,
    sums: pb::ContentSummaryResponse,
}

/// See the module.
#[derive(Default)]
pub struct Cursors {
    /// Roots (and inner directories) of deleted trees.
    pub doomed: Vec<u64>,
    /// Storages whose replicas leave the map.
    pub purge: VecDeque<StorageIndex>,
    /// Deletes of trees that are being looked at.
    pub checks: Checks,
    /// Ranges of full reports whose missing replicas leave the map.
    pub forgets: VecDeque<Forget>,
    /// Blocks to look at once more.
    pub waking: Vec<u64>,
    /// Remembered answers are too old or too many.
    pub answers: bool,
    scan: Option<u64>,
    summaries: VecDeque<Summary>,
}

impl Cursors {
    /// Whether a turn is wanted at once.
    pub fn has_work(&self) -> bool {
        self.active() > 0
    }

    /// How many kinds of work wait.
    fn active(&self) -> usize {
        [
            !self.doomed.is_empty(),
            !self.purge.is_empty(),
            !self.checks.is_empty(),
            !self.forgets.is_empty(),
            !self.waking.is_empty(),
            self.answers,
            self.scan.is_some(),
            !self.summaries.is_empty(),
        ]
        .into_iter()
        .filter(|waits| *waits)
        .count()
    }

    /// Every block is to be assessed (again).
    pub fn rescan(&mut self) {
        self.scan = Some(0);
    }
}

impl Core {
    /// One turn of every cursor that has work: they share the budget.
    pub(super) fn run_cursors(&mut self, turn: &mut Turn<'_>) {
        let budget = (self.settings.cursor_budget / self.cursors.active().max(1)).max(1);
        self.free_doomed(&mut budget.clone());
        self.purge_storages(budget);
        self.check_subtrees(turn, budget);
        self.forget_ranges(turn, budget);
        self.wake_some(budget);
        self.expire_answers(budget);
        self.scan_blocks(budget);
        self.sum_trees(turn, budget);
    }

    /// Drops remembered answers that are too old or too many.
    pub(super) fn expire_answers(&mut self, budget: usize) {
        let settings = &self.settings;
        let (age_ms, most) = (settings.retry_cache_ms, settings.retry_cache_entries);
        self.cursors.answers = self.retry.expire(self.now_ms, age_ms, most, budget);
    }

    /// Looks again at some blocks.
    fn wake_some(&mut self, budget: usize) {
        let rest = self.cursors.waking.len().saturating_sub(budget);
        for id in self.cursors.waking.split_off(rest) {
            self.reassess(id);
        }
    }

    /// Frees a small tree within the event that deleted it.
    pub(super) fn free_now(&mut self) {
        let mut budget = self.settings.cursor_budget.min(256);
        self.free_doomed(&mut budget);
    }

    /// Frees inodes and blocks of deleted trees, leaves first.
    pub(super) fn free_doomed(&mut self, budget: &mut usize) {
        while *budget > 0 {
            let Some(top) = self.cursors.doomed.last().copied() else { return };
            *budget -= 1;
            match self.tree.get(top).map(Inode::is_directory) {
                Some(true) => match self.tree.pop_child(top) {
                    Some(child) => self.cursors.doomed.push(child),
                    None => {
                        self.tree.free(top);
                        self.cursors.doomed.pop();
                    }
                },
                Some(false) => {
                    let Some(block) = self.tree.get(top).and_then(|inode| inode.blocks().last().copied()) else {
                        self.leases.release(top);
                        self.tree.free(top);
                        self.cursors.doomed.pop();
                        continue;
                    };
                    if self.tree.get(top).is_some_and(|inode| inode.blocks().len() == 1) {
                        // The common case spares itself a change of the inode just before its end.
                        self.leases.release(top);
                        self.tree.free(top);
                        self.cursors.doomed.pop();
                    } else {
                        self.tree.modify(top, Inode::pop_freed);
                    }
                    self.free_block(block, self.last_txid);
                }
                None => {
                    self.cursors.doomed.pop();
                }
            }
        }
    }

    fn purge_storages(&mut self, budget: usize) {
        let Some(storage) = self.cursors.purge.front().copied() else { return };
        let ids = self.nodes.storage(storage).blocks.range(0, u64::MAX, budget);
        if ids.is_empty() {
            self.cursors.purge.pop_front();
        }
        for id in ids {
            self.forget_replica(id, storage);
        }
    }

    fn scan_blocks(&mut self, budget: usize) {
        let Some(first) = self.cursors.scan else { return };
        let ids: Vec<u64> = self.blocks.table.iter_from(first).take(budget).map(|(id, _)| id).collect();
        self.cursors.scan = if ids.len() == budget { ids.last().map(|id| id + 1) } else { None };
        for id in ids {
            self.reassess(id);
        }
    }

    /// Begins a sum; a small tree is answered at once.
    pub(super) fn begin_summary(
        &mut self,
        turn: &mut Turn<'_>,
        reply: ReplyTo,
        caller: &Caller,
        request: &pb::ContentSummaryRequest,
    ) -> Result<(), Error> {
        let who = self.who(caller);
        let found = self.tree.walk(&request.path, |id, inode| {
            self.unsynced.touch(id);
            if !inode.is_directory() {
                return Err(not_a_directory(&self.tree.path_of(id)));
            }
            self.check_access(&who, id, EXECUTE)
        })?;
        let root = found.ok_or_else(|| not_found(&request.path))?;
        if self.cursors.summaries.len() >= MAX_SUMMARIES {
            return Err(Error::new(ErrorCode::Busy, "too many content summaries at a time"));
        }
        let mut summary = Summary {
            reply,
            caller: caller.clone(),
            stack: Vec::new(),
            after: Vec::new(),
            sums: pb::ContentSummaryResponse::default(),
        };
        self.count(&mut summary, root);
        self.cursors.summaries.push_front(summary);
        self.sum_trees(turn, self.settings.cursor_budget);
        Ok(())
    }

    fn count(&self, summary: &mut Summary, id: u64) {
        let Some(inode) = self.tree.get(id) else { return };
        if inode.is_directory() {
            summary.sums.directories += 1;
            summary.stack.push(id);
            return;
        }
        let lengths = inode.blocks().iter().filter_map(|id| self.blocks.get(*id)?.known_length());
        let length: u64 = lengths.sum();
        summary.sums.files += 1;
        summary.sums.length += length;
        summary.sums.space += length * u64::from(inode.replication);
    }

    fn sum_trees(&mut self, turn: &mut Turn<'_>, mut budget: usize) {
        while budget > 0 {
            let Some(mut summary) = self.cursors.summaries.pop_front() else { return };
            match self.sum_some(&mut summary, &mut budget) {
                Ok(false) => {
                    // Others get their turn before it goes on.
                    self.cursors.summaries.push_back(summary);
                }
                Ok(true) => {
                    let response = Response::Client(summary.sums.into());
                    self.answer_summary(turn, summary.reply, Ok(response));
                }
                Err(error) => self.answer_summary(turn, summary.reply, Err(error)),
            }
        }
    }

    fn answer_summary(&self, turn: &mut Turn<'_>, to: ReplyTo, result: Result<Response, Error>) {
        // It read many inodes over several turns: everything up to now is the safe choice.
        let depends_on = if self.last_txid > self.unsynced.durable() { self.last_txid } else { TxId(0) };
        turn.commands.push(Command::Reply { to, depends_on, result });
    }

    /// Goes on with a sum; `true` when it is complete.
    fn sum_some(&self, summary: &mut Summary, budget: &mut usize) -> Result<bool, Error> {
        while let Some(directory) = summary.stack.last().copied() {
            if *budget == 0 {
                return Ok(false);
            }
            if summary.after.is_empty() && self.tree.get(directory).is_some() {
                let who = self.who(&summary.caller);
                self.check_access(&who, directory, READ | EXECUTE)?;
            }
            // A child directory is done before the rest of its parent, so the parent's place is kept by name.
            let mut below = Vec::new();
            let mut last = None;
            let files = &mut Summary {
                reply: summary.reply,
                caller: Caller::default(),
                stack: Vec::new(),
                after: Vec::new(),
                sums: summary.sums,
            };
            for child in self.tree.children_after(directory, &summary.after).1 {
                if *budget == 0 {
                    break;
                }
                *budget -= 1;
                last = Some(child);
                self.count(files, child);
                below.append(&mut files.stack);
            }
            summary.sums = files.sums;
            match last.filter(|_| *budget == 0).and_then(|child| self.tree.get(child)) {
                Some(inode) => {
                    summary.after = inode.name.as_bytes().to_vec();
                    // They go below the directory that is under way.
                    let at = summary.stack.len() - 1;
                    summary.stack.splice(at..at, below);
                }
                None => {
                    summary.after.clear();
                    summary.stack.pop();
                    summary.stack.append(&mut below);
                    *budget = budget.saturating_sub(1);
                }
            }
        }
        Ok(true)
    }
}

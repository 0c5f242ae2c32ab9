//! Whether a whole tree may be deleted: all rights on each directory in it that is not empty.
//!
//! # Overview
//! Only for callers that are no superusers. A tree may hold millions of directories, so this is a cursor: the call waits,
//! and runs once more, as a whole, when everything below was looked at.
//!
//! # Consistency
//! The answer is that of one moment: the one in which the delete is applied. What changes below while the check is under
//! way (a new entry, a new mode or owner, a tree that is moved in) is looked at again before it ends. If the path leads to
//! another inode by then, that one is checked.

use std::collections::VecDeque;

use cairn_proto::{Error, ErrorCode};

use super::calls::WaitingCall;
use super::inode::Inode;
use super::permissions::{EXECUTE, READ, WRITE};
use super::{Core, Turn};

/// Checks that run at a time.
const MAX_CHECKS: usize = 64;
/// A path that leads elsewhere each time: somebody is renaming faster than this can look.
const MAX_ROUNDS: u32 = 10;

/// A delete that waits for its tree to be looked at.
struct Check {
    call: WaitingCall,
    root: u64,
    /// Directories to look at, with the name after which to go on in each.
    stack: Vec<(u64, Box<[u8]>)>,
    /// Directories that changed since: only their own rights are looked at again.
    again: Vec<u64>,
    rounds: u32,
}

/// Deletes that wait for their trees to be looked at.
#[derive(Default)]
pub struct Checks {
    waiting: VecDeque<Check>,
}

impl Checks {
    /// Whether there are any.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}

impl Core {
    /// A delete waits until the tree below `root` was looked at; a small one is at once.
    pub(super) fn begin_check(&mut self, turn: &mut Turn<'_>, call: WaitingCall, root: u64) {
        if self.cursors.checks.waiting.len() >= MAX_CHECKS {
            let error = Error::new(ErrorCode::Busy, "too many deletions of trees are being checked at a time");
            return self.answer_waiting(turn, call, Err(error));
        }
        let stack = vec![(root, Box::default())];
        let check = Check { call, root, stack, again: Vec::new(), rounds: 0 };
        self.go_on(turn, check, self.settings.cursor_budget.min(256));
    }

    /// One turn of the oldest check.
    pub(super) fn check_subtrees(&mut self, turn: &mut Turn<'_>, budget: usize) {
        if let Some(check) = self.cursors.checks.waiting.pop_front() {
            self.go_on(turn, check, budget);
        }
    }

    fn go_on(&mut self, turn: &mut Turn<'_>, mut check: Check, mut budget: usize) {
        match self.look(&mut check, &mut budget) {
            Ok(false) => self.cursors.checks.waiting.push_back(check),
            Ok(true) => self.finish_check(turn, check),
            Err(error) => {
                // It tells what it saw over several turns.
                self.unsynced.reset();
                self.unsynced.depend(self.last_txid);
                self.answer_waiting(turn, check.call, Err(error));
            }
        }
    }

    /// Everything was looked at: the call runs, or begins anew on what its path leads to by now.
    fn finish_check(&mut self, turn: &mut Turn<'_>, check: Check) {
        let Check { call, root, rounds, .. } = check;
        if rounds >= MAX_ROUNDS {
            let error = Error::new(ErrorCode::Busy, "the path is renamed all the time");
            return self.answer_waiting(turn, call, Err(error));
        }
        if let Some((call, root)) = self.run_checked(turn, call, root) {
            let stack = vec![(root, Box::default())];
            self.cursors.checks.waiting.push_back(Check { call, root, stack, again: Vec::new(), rounds: rounds + 1 });
        }
    }

    /// Looks at some of the directories; `true`: at all.
    fn look(&self, check: &mut Check, budget: &mut usize) -> Result<bool, Error> {
        let who = self.who(check.call.caller());
        let full = |id: u64| self.tree.get(id).is_some_and(|inode| inode.child_count() > 0);
        while let Some(id) = check.again.pop() {
            if *budget == 0 {
                check.again.push(id);
                return Ok(false);
            }
            *budget -= 1;
            if full(id) {
                self.check_access(&who, id, READ | WRITE | EXECUTE)?;
            }
        }
        while let Some((id, after)) = check.stack.pop() {
            if *budget == 0 {
                check.stack.push((id, after));
                return Ok(false);
            }
            *budget -= 1;
            if !full(id) {
                continue;
            }
            if after.is_empty() {
                self.check_access(&who, id, READ | WRITE | EXECUTE)?;
            }
            let mut below = Vec::new();
            for child in self.tree.children_after(id, &after).1 {
                let Some(inode) = self.tree.get(child) else { continue };
                if inode.is_directory() {
                    below.push((child, Box::default()));
                }
                if *budget == 0 {
                    check.stack.push((id, inode.name.as_bytes().into()));
                    break;
                }
                *budget -= 1;
            }
            check.stack.append(&mut below);
        }
        Ok(true)
    }

    /// A directory got an entry, or another mode or owner.
    pub(super) fn directory_changed(&mut self, directory: u64) {
        for check in &mut self.cursors.checks.waiting {
            if self.tree.is_within(directory, check.root) {
                check.again.push(directory);
            }
        }
    }

    /// A tree was moved.
    pub(super) fn tree_moved(&mut self, id: u64) {
        if !self.tree.get(id).is_some_and(Inode::is_directory) {
            return;
        }
        for check in &mut self.cursors.checks.waiting {
            if id != check.root && self.tree.is_within(id, check.root) {
                check.stack.push((id, Box::default()));
            }
        }
    }
}

//! The names on a simulated disk: folders, what they hold, and what a power cut may leave of unsynced changes.
//!
//! # Crash
//! A change of a folder is durable once the folder was synced; of the changes that were not, a prefix of each folder's survives, each folder
//! for itself. A rename within a folder happens as a whole or not at all; one between folders never loses the entry, but may leave a file under
//! both names if only the new folder was synced. A folder whose own name is not durable is gone with all that is in it, synced or not:
//! who makes a folder has to sync the one above.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::{Component, Path};

use crate::entropy::Entropy;

/// Number of a file or folder.
pub(super) type Node = u64;
/// The folder that is always there.
pub(super) const ROOT: Node = 0;

/// What a name stands for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Entry {
    File(Node),
    Folder(Node),
}

#[derive(Clone, Default)]
struct Tree(BTreeMap<(Node, OsString), Entry>);

impl Tree {
    fn find(&self, path: &Path) -> Option<Entry> {
        let mut at = Entry::Folder(ROOT);
        for component in path.components() {
            at = match (component, at) {
                (Component::RootDir | Component::CurDir, _) => continue,
                (Component::Normal(name), Entry::Folder(folder)) => *self.0.get(&(folder, name.to_owned()))?,
                _ => return None,
            };
        }
        Some(at)
    }

    fn children(&self, folder: Node) -> impl Iterator<Item = (&OsString, Entry)> {
        self.0.range((folder, OsString::new())..(folder + 1, OsString::new())).map(|((_, name), entry)| (name, *entry))
    }

    /// Carries out `change` of `folder`; returns what has no name by it any more.
    fn apply(&mut self, folder: Node, change: &Change) -> Option<Entry> {
        match change {
            Change::Put(name, entry) => self.0.insert((folder, name.clone()), *entry),
            Change::Remove(name) => self.0.remove(&(folder, name.clone())),
            Change::Move(from, to, entry) => {
                self.0.remove(&(folder, from.clone()));
                self.0.insert((folder, to.clone()), *entry)
            }
        }
    }
}

/// A change of one folder.
#[derive(Clone)]
enum Change {
    Put(OsString, Entry),
    Remove(OsString),
    Move(OsString, OsString, Entry),
}

#[derive(Clone)]
struct Step {
    folder: Node,
    change: Change,
    /// A step that is durable if this one is.
    needs: Option<u64>,
}

/// All names.
#[derive(Clone, Default)]
pub(super) struct Names {
    current: Tree,
    durable: Tree,
    /// Changes that no sync has covered, by their order; numbers begin at 1.
    pending: BTreeMap<u64, Step>,
    last_step: u64,
}

impl Names {
    pub fn find(&self, path: &Path) -> Option<Entry> {
        self.current.find(path)
    }

    /// The folder that holds `path`, and the last part of it.
    pub fn place(&self, path: &Path) -> Option<(Node, OsString)> {
        let name = path.file_name()?.to_owned();
        match self.find(path.parent()?)? {
            Entry::Folder(folder) => Some((folder, name)),
            Entry::File(_) => None,
        }
    }

    pub fn children(&self, folder: Node) -> impl Iterator<Item = (&OsString, Entry)> {
        self.current.children(folder)
    }

    fn step(&mut self, folder: Node, change: Change, needs: Option<u64>) -> Option<Entry> {
        let replaced = self.current.apply(folder, &change);
        self.last_step += 1;
        self.pending.insert(self.last_step, Step { folder, change, needs });
        replaced
    }

    pub fn put(&mut self, folder: Node, name: OsString, entry: Entry) {
        self.step(folder, Change::Put(name, entry), None);
    }

    pub fn remove(&mut self, folder: Node, name: OsString) {
        self.step(folder, Change::Remove(name), None);
    }

    /// Returns what was replaced.
    pub fn rename(&mut self, from: (Node, OsString), to: (Node, OsString), entry: Entry) -> Option<Entry> {
        if from.0 == to.0 {
            return self.step(from.0, Change::Move(from.1, to.1, entry), None);
        }
        let arrival = self.last_step + 1;
        // A folder has one place; of a file, the old name may stay until its folder is synced.
        let needs = matches!(entry, Entry::Folder(_)).then_some(arrival + 1);
        let replaced = self.step(to.0, Change::Put(to.1, entry), needs);
        self.step(from.0, Change::Remove(from.1), Some(arrival));
        replaced
    }

    /// Makes the changes of `folder` durable; returns files that lost a durable name.
    pub fn sync(&mut self, folder: Node) -> Vec<Node> {
        self.settle(BTreeMap::from([(folder, u64::MAX)]))
    }

    /// Makes all changes durable.
    pub fn sync_all(&mut self) {
        self.pending.clear();
        self.durable = self.current.clone();
    }

    /// Files in a folder and in those below it.
    pub fn files_below(&self, top: Node) -> Vec<Node> {
        let (mut files, mut open) = (Vec::new(), vec![top]);
        while let Some(folder) = open.pop() {
            for (_, entry) in self.current.children(folder) {
                match entry {
                    Entry::File(file) => files.push(file),
                    Entry::Folder(folder) => open.push(folder),
                }
            }
        }
        files
    }

    /// Makes the changes of each folder up to the step that is given durable, and what they need.
    fn settle(&mut self, mut up_to: BTreeMap<Node, u64>) -> Vec<Node> {
        let covered = |up_to: &BTreeMap<Node, u64>, number: u64, step: &Step| {
            up_to.get(&step.folder).is_some_and(|&last| number <= last)
        };
        loop {
            let needed = self.pending.iter().filter(|(number, step)| covered(&up_to, **number, step));
            let needed: Vec<(u64, Node)> = needed
                .filter_map(|(_, step)| step.needs)
                .filter_map(|number| self.pending.get(&number).map(|step| (number, step.folder)))
                .filter(|(number, folder)| up_to.get(folder).is_none_or(|last| last < number))
                .collect();
            if needed.is_empty() {
                break;
            }
            for (number, folder) in needed {
                let last = up_to.entry(folder).or_default();
                *last = number.max(*last);
            }
        }
        let steps: Vec<u64> =
            self.pending.iter().filter(|(number, step)| covered(&up_to, **number, step)).map(|(n, _)| *n).collect();
        let mut unnamed = Vec::new();
        for number in steps {
            let Some(step) = self.pending.remove(&number) else { continue };
            if let Some(Entry::File(file)) = self.durable.apply(step.folder, &step.change) {
                unnamed.push(file);
            }
        }
        unnamed
    }

    /// Whether a durable name, or one that may become durable, stands for `file`.
    pub fn holds(&self, file: Node) -> bool {
        let entry = Entry::File(file);
        self.durable.0.values().any(|&other| other == entry)
            || self.pending.values().any(
                |step| matches!(&step.change, Change::Put(_, other) | Change::Move(_, _, other) if *other == entry),
            )
    }

    /// A power cut. Returns the files that are left, each with how many names it has.
    pub fn crash(&mut self, entropy: &Entropy) -> BTreeMap<Node, u32> {
        let mut by_folder: BTreeMap<Node, Vec<u64>> = BTreeMap::new();
        for (number, step) in &self.pending {
            by_folder.entry(step.folder).or_default().push(*number);
        }
        let mut up_to = BTreeMap::new();
        for (folder, steps) in by_folder {
            let kept = match entropy.below(4) {
                0 => 0,
                1 => steps.len(),
                _ => entropy.below(steps.len() as u64 + 1) as usize,
            };
            if let Some(last) = kept.checked_sub(1) {
                up_to.insert(folder, steps[last]);
            }
        }
        self.settle(up_to);
        self.pending.clear();
        let (mut folders, mut files, mut open) = (BTreeSet::from([ROOT]), BTreeMap::new(), vec![ROOT]);
        while let Some(folder) = open.pop() {
            for (_, entry) in self.durable.children(folder) {
                match entry {
                    Entry::File(file) => *files.entry(file).or_default() += 1,
                    Entry::Folder(folder) => {
                        if folders.insert(folder) {
                            open.push(folder);
                        }
                    }
                }
            }
        }
        self.durable.0.retain(|(folder, _), _| folders.contains(folder));
        self.current = self.durable.clone();
        files
    }
}

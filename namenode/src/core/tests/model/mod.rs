//! Random operations against a simple model: a sorted map from paths to entries, and HDFS's rules in a few lines each.
//!
//! `operations.rs` says what may happen; `driver.rs` (with `writers.rs` and `restarts.rs`) does it to the core and to the
//! model and compares what a client can see; `invariants.rs` looks inside. `CAIRN_PROPERTY_CASES` sets the number of cases, `CAIRN_PROPERTY_SEED` the seed.

mod driver;
mod invariants;
mod operations;
mod restarts;
mod writers;

use std::collections::BTreeMap;

use proptest::prelude::*;
use proptest::test_runner::RngSeed;

pub use driver::Driver;
pub use operations::{any_operation, plain};

/// Who calls; the first one is the superuser.
pub const USERS: [&str; 3] = ["root", "ann", "bob"];
const READ: u32 = 4;
const WRITE: u32 = 2;
const EXECUTE: u32 = 1;

/// A block as its file knows it.
#[derive(Clone, PartialEq, Debug)]
pub struct ModelBlock {
    pub id: u64,
    /// Known once the writer has said it.
    pub length: Option<u64>,
}

/// A file.
#[derive(Clone, PartialEq, Debug)]
pub struct File {
    pub replication: u32,
    pub blocks: Vec<ModelBlock>,
    /// Who has it open.
    pub writer: Option<String>,
}

/// A file or a directory.
#[derive(Clone, PartialEq, Debug)]
pub struct Entry {
    /// 0: not known yet.
    pub inode: u64,
    pub mode: u32,
    pub owner: String,
    pub group: String,
    pub file: Option<File>,
}

impl Entry {
    pub fn length(&self) -> u64 {
        self.file.iter().flat_map(|file| &file.blocks).filter_map(|block| block.length).sum()
    }
}

/// The namespace by the book.
#[derive(Clone)]
pub struct Model {
    pub entries: BTreeMap<String, Entry>,
}

/// The directory of a path; "/" for the root itself.
pub fn parent(path: &str) -> &str {
    cairn_proto::path::split_last(path).map_or("/", |(parent, _)| parent)
}

/// All directories above, the root first.
fn above(path: &str) -> Vec<&str> {
    let mut all = Vec::new();
    let mut at = path;
    while at != "/" {
        at = parent(at);
        all.push(at);
    }
    all.reverse();
    all
}

fn inside(path: &str, root: &str) -> bool {
    root == "/" || path.strip_prefix(root).is_some_and(|rest| rest.starts_with('/'))
}

impl Model {
    pub fn new() -> Self {
        let root = Entry { inode: 0, mode: 0o755, owner: "root".into(), group: "supergroup".into(), file: None };
        Self { entries: BTreeMap::from([("/".to_owned(), root)]) }
    }

    /// The entry of an inode.
    pub fn by_inode(&mut self, inode: u64) -> Option<&mut Entry> {
        self.entries.values_mut().find(|entry| entry.inode == inode)
    }

    pub fn is_directory(&self, path: &str) -> bool {
        self.entries.get(path).is_some_and(|entry| entry.file.is_none())
    }

    /// Direct children.
    pub fn children(&self, path: &str) -> usize {
        self.entries.keys().filter(|other| *other != "/" && parent(other) == path).count()
    }

    fn may(&self, user: &str, path: &str, access: u32) -> bool {
        let entry = &self.entries[path];
        let granted = if entry.owner == user {
            entry.mode >> 6
        } else if entry.group == user || entry.group == "users" {
            entry.mode >> 3
        } else {
            entry.mode
        };
        user == "root" || granted & access == access
    }

    /// Every directory on the way can be passed.
    fn passes(&self, user: &str, path: &str) -> bool {
        let existing = above(path).into_iter().take_while(|path| self.entries.contains_key(*path));
        existing.into_iter().all(|path| self.is_directory(path) && self.may(user, path, EXECUTE))
    }

    fn deepest<'p>(&self, path: &'p str) -> &'p str {
        above(path).into_iter().rfind(|path| self.entries.contains_key(*path)).unwrap_or("/")
    }

    fn sticky_allows(&self, user: &str, path: &str) -> bool {
        let directory = &self.entries[parent(path)];
        user == "root" || directory.mode & 0o1000 == 0 || directory.owner == user || self.entries[path].owner == user
    }

    /// May take the entry out of its directory.
    fn may_unlink(&self, user: &str, path: &str) -> bool {
        self.may(user, parent(path), WRITE) && self.sticky_allows(user, path)
    }

    fn make(&mut self, user: &str, path: &str, mode: u32, file: Option<File>) {
        let group = self.entries[parent(path)].group.clone();
        self.entries.insert(path.to_owned(), Entry { inode: 0, mode, owner: user.to_owned(), group, file });
    }

    fn make_above(&mut self, user: &str, path: &str, mode: u32) {
        for directory in above(path) {
            if !self.entries.contains_key(directory) {
                self.make(user, directory, mode, None);
            }
        }
    }

    /// `false`: refused; nothing changes then. So do all that follow.
    pub fn mkdirs(&mut self, user: &str, path: &str, mode: u32) -> bool {
        if !self.passes(user, path) {
            return false;
        }
        if self.entries.contains_key(path) {
            return self.is_directory(path);
        }
        if !self.may(user, self.deepest(path), WRITE) {
            return false;
        }
        self.make_above(user, path, mode | 0o300);
        self.make(user, path, mode, None);
        true
    }

    pub fn create(&mut self, user: &str, path: &str, overwrite: bool, replication: u32, writer: &str) -> bool {
        if !self.passes(user, path) {
            return false;
        }
        let fits = match self.entries.get(path) {
            Some(entry) => {
                overwrite && entry.file.is_some() && self.may_unlink(user, path) && self.may(user, path, WRITE)
            }
            None => self.may(user, self.deepest(path), WRITE),
        };
        if fits {
            self.make_above(user, path, self.entries[self.deepest(path)].mode | 0o300);
            let file = File { replication, blocks: Vec::new(), writer: Some(writer.to_owned()) };
            self.make(user, path, 0o644, Some(file));
        }
        fits
    }

    pub fn rename(&mut self, user: &str, from: &str, to: &str, overwrite: bool) -> bool {
        if !self.passes(user, from) || !self.passes(user, to) || !self.entries.contains_key(from) {
            return false;
        }
        if from == to || inside(to, from) || !self.is_directory(parent(to)) {
            return false;
        }
        if !self.may_unlink(user, from) || !self.may(user, parent(to), WRITE) {
            return false;
        }
        if self.entries.contains_key(to) {
            let same = self.is_directory(from) == self.is_directory(to);
            if !overwrite || !same || self.children(to) > 0 || !self.sticky_allows(user, to) {
                return false;
            }
        }
        self.entries.remove(to);
        let moved: Vec<String> =
            self.entries.keys().filter(|path| *path == from || inside(path, from)).cloned().collect();
        for path in moved {
            let entry = self.entries.remove(&path).unwrap();
            self.entries.insert(path.replacen(from, to, 1), entry);
        }
        true
    }

    pub fn delete(&mut self, user: &str, path: &str, recursive: bool) -> bool {
        if !self.passes(user, path) || !self.entries.contains_key(path) || !self.may_unlink(user, path) {
            return false;
        }
        if self.children(path) > 0 {
            let inner = self.entries.keys().filter(|other| *other == path || inside(other, path));
            let mut full = inner.filter(|other| self.children(other) > 0);
            if !recursive || !full.all(|directory| self.may(user, directory, READ | WRITE | EXECUTE)) {
                return false;
            }
        }
        self.entries.retain(|other, _| other != path && !inside(other, path));
        true
    }

    pub fn chmod(&mut self, user: &str, path: &str, mode: u32) -> bool {
        let passes = self.passes(user, path);
        let Some(entry) = self.entries.get_mut(path).filter(|entry| passes && (user == "root" || entry.owner == user))
        else {
            return false;
        };
        entry.mode = mode;
        true
    }

    pub fn chown(&mut self, path: &str, owner: &str) -> bool {
        let passes = self.passes("root", path);
        let Some(entry) = self.entries.get_mut(path).filter(|_| passes) else { return false };
        entry.owner = owner.to_owned();
        true
    }

    pub fn set_replication(&mut self, user: &str, path: &str, replication: u32) -> bool {
        let fits = self.passes(user, path) && self.entries.contains_key(path) && self.may(user, path, WRITE);
        let Some(file) = self.entries.get_mut(path).filter(|_| fits).and_then(|entry| entry.file.as_mut()) else {
            return false;
        };
        file.replication = replication;
        true
    }

    /// A closed file that this user may write.
    pub fn may_write(&self, user: &str, path: &str) -> bool {
        let file = self.entries.get(path).and_then(|entry| entry.file.as_ref());
        self.passes(user, path) && file.is_some_and(|file| file.writer.is_none()) && self.may(user, path, WRITE)
    }

    /// The file keeps its first blocks.
    pub fn truncate(&mut self, user: &str, path: &str, length: u64) -> bool {
        let fits = self.may_write(user, path);
        let Some(file) = self.entries.get_mut(path).filter(|_| fits).and_then(|entry| entry.file.as_mut()) else {
            return false;
        };
        let whole: u64 = file.blocks.iter().filter_map(|block| block.length).sum();
        if length < whole {
            let mut end = 0;
            let kept = file.blocks.iter().take_while(|block| {
                let stays = end < length;
                end += block.length.unwrap_or(0);
                stays
            });
            let kept = kept.count();
            file.blocks.truncate(kept);
        }
        true
    }

    /// The target gets the blocks of the source, which is gone.
    pub fn concat(&mut self, user: &str, target: &str, source: &str) -> bool {
        let there = self.entries.get(source).and_then(|entry| entry.file.as_ref());
        let whole = there.is_some_and(|file| file.writer.is_none() && !file.blocks.is_empty());
        let fits = self.may_write(user, target)
            && self.passes(user, source)
            && whole
            && target != source
            && parent(target) == parent(source)
            && self.may(user, source, READ)
            && self.may_unlink(user, source);
        if fits {
            let moved = self.entries.remove(source).and_then(|entry| entry.file).unwrap();
            self.entries.get_mut(target).and_then(|entry| entry.file.as_mut()).unwrap().blocks.extend(moved.blocks);
        }
        fits
    }

    /// A change of times is only checked for being allowed: the superuser makes it.
    pub fn can_set_times(&self, path: &str) -> bool {
        self.passes("root", path) && self.entries.contains_key(path)
    }
}

fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

/// The same cases in every run, unless the environment says otherwise.
pub fn config(cases: u32) -> ProptestConfig {
    ProptestConfig {
        cases: number("CAIRN_PROPERTY_CASES", cases.into()) as u32,
        rng_seed: RngSeed::Fixed(number("CAIRN_PROPERTY_SEED", 3)),
        failure_persistence: None,
        max_shrink_iters: 4_000,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(config(200))]
    #[test]
    fn the_core_agrees_with_a_simple_model(
        operations in proptest::collection::vec(any_operation(), 1..160),
        cursor_budget in prop_oneof![1usize..8, Just(2_000)],
    ) {
        let mut driver = Driver::new(cursor_budget);
        for operation in &operations {
            driver.run(operation);
        }
        driver.heal();
    }
}

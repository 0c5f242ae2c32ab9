//! The namespace: inodes, their names and the directories that hold them.

use std::cell::Cell;

use cairn_proto::Error;
use cairn_proto::ids::InodeId;
use cairn_proto::path::check_name;

use super::children::Children;
use super::codec::{hash_bytes, mix};
use super::inode::{Body, Inode, Strings};
use super::pages::PageTable;

/// The root's id as a plain number.
pub const ROOT: u64 = InodeId::ROOT.0;
/// Parent of the root of a deleted tree that is still being freed.
pub const DOOMED: u64 = 0;

/// How far a path leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved<'p> {
    /// Inodes from the root down, as many as exist.
    pub chain: Vec<u64>,
    /// All components.
    pub parts: Vec<&'p str>,
}

impl Resolved<'_> {
    /// The inode at the end, if the whole path exists.
    pub fn last(&self) -> Option<u64> {
        if self.chain.len() == self.parts.len() + 1 { self.chain.last().copied() } else { None }
    }

    /// The directory that holds (or would hold) the last component, if it exists.
    pub fn parent(&self) -> Option<u64> {
        if self.parts.is_empty() { None } else { self.chain.get(self.parts.len() - 1).copied() }
    }

    /// The last component; empty for the root.
    pub fn name(&self) -> &str {
        self.parts.last().copied().unwrap_or("")
    }

    /// The deepest inode that exists.
    pub fn deepest(&self) -> u64 {
        self.chain.last().copied().unwrap_or(ROOT)
    }

    /// Path of the first `count` components.
    pub fn prefix(&self, count: usize) -> String {
        if count == 0 { "/".into() } else { format!("/{}", self.parts[..count].join("/")) }
    }
}

/// Directories by parent and name, the last one of each slot: most paths lead through few directories, and this spares
/// looking through the names of a large one. Nothing in it is believed: a directory is what its inode says.
struct Shortcuts(Box<[Cell<u64>]>);

const SHORTCUTS: usize = 1 << 14;

impl Default for Shortcuts {
    fn default() -> Self {
        Self(vec![Cell::new(0); SHORTCUTS].into())
    }
}

impl Shortcuts {
    #[inline]
    fn slot(&self, directory: u64, name: &str) -> &Cell<u64> {
        &self.0[hash_bytes(mix(directory, 7), name.as_bytes()) as usize % SHORTCUTS]
    }
}

/// See the module.
#[derive(Default)]
pub struct Tree {
    /// All inodes.
    pub inodes: PageTable<Inode>,
    /// Users and groups.
    pub strings: Strings,
    /// Number of directories.
    pub directories: u64,
    shortcuts: Shortcuts,
}

fn name_in<'a>(inodes: &'a PageTable<Inode>) -> impl Fn(u64) -> &'a [u8] {
    |id| inodes.get(id).map_or(&[], |inode| inode.name.as_bytes())
}

impl Tree {
    /// The inode with this id.
    #[inline]
    pub fn get(&self, id: u64) -> Option<&Inode> {
        self.inodes.get(id)
    }

    /// All changes of an inode that last go through here: checkpoint copies happen inside, and later snapshot copies and
    /// quota sums.
    pub fn modify<R>(&mut self, id: u64, change: impl FnOnce(&mut Inode) -> R) -> Option<R> {
        self.inodes.modify(id, change)
    }

    /// The child of a directory by name.
    #[inline]
    pub fn child(&self, directory: u64, name: &str) -> Option<u64> {
        match &self.inodes.get(directory)?.body {
            Body::Directory(Some(children)) => children.get(name.as_bytes(), name_in(&self.inodes)),
            _ => None,
        }
    }

    /// The same for a child that is likely a directory.
    #[inline]
    fn directory(&self, parent: u64, name: &str) -> Option<u64> {
        let slot = self.shortcuts.slot(parent, name);
        let known = slot.get();
        // What hangs in a directory says so itself; ids are never used twice.
        let fits = |inode: &&Inode| inode.parent == parent && inode.name.as_bytes() == name.as_bytes();
        if known != 0 && known != ROOT && self.inodes.get(known).filter(fits).is_some() {
            return Some(known);
        }
        let found = self.child(parent, name)?;
        if self.inodes.get(found).is_some_and(Inode::is_directory) {
            slot.set(found);
        }
        Some(found)
    }

    /// Children of a directory after `name`, and how many come before them.
    pub fn children_after(&self, directory: u64, name: &[u8]) -> (usize, impl Iterator<Item = u64> + use<'_>) {
        let children = match self.inodes.get(directory).map(|inode| &inode.body) {
            Some(Body::Directory(Some(children))) => Some(children.after(name, name_in(&self.inodes))),
            _ => None,
        };
        let (before, ids) = children.map_or((0, None), |(before, ids)| (before, Some(ids)));
        (before, ids.into_iter().flatten())
    }

    /// Follows a path as far as it exists. A file in the middle ends it.
    pub fn resolve<'p>(&self, path: &'p str) -> Result<Resolved<'p>, Error> {
        let parts = cairn_proto::path::components(path)?;
        let mut chain = Vec::with_capacity(parts.len() + 1);
        let mut at = ROOT;
        chain.push(at);
        for (depth, part) in parts.iter().enumerate() {
            let is_last = depth + 1 == parts.len();
            match if is_last { self.child(at, part) } else { self.directory(at, part) } {
                Some(child) => at = child,
                None => break,
            }
            chain.push(at);
        }
        Ok(Resolved { chain, parts })
    }

    /// Follows a whole path without keeping it; `visit` sees every inode on the way before the last one. `None` if
    /// it does not exist.
    pub fn walk(
        &self,
        path: &str,
        mut visit: impl FnMut(u64, &Inode) -> Result<(), Error>,
    ) -> Result<Option<u64>, Error> {
        if path.len() > cairn_proto::path::MAX_PATH_BYTES || !path.starts_with('/') {
            return self.walk_long(path, visit);
        }
        let mut at = ROOT;
        let mut rest = path.len() - 1;
        for part in path[1..].split('/').filter(|part| !(part.is_empty() && path.len() == 1)) {
            let is_last = rest == part.len();
            rest = rest.saturating_sub(part.len() + 1);
            if check_name(part).is_err() {
                return self.walk_long(path, visit);
            }
            let Some(inode) = self.inodes.get(at) else { return Ok(None) };
            visit(at, inode)?;
            match if is_last { self.child(at, part) } else { self.directory(at, part) } {
                Some(child) => at = child,
                // The rest may still hold an invalid name, which is the worse error.
                None => return cairn_proto::path::components(path).map(|_| None),
            }
        }
        Ok(Some(at))
    }

    fn walk_long(
        &self,
        path: &str,
        mut visit: impl FnMut(u64, &Inode) -> Result<(), Error>,
    ) -> Result<Option<u64>, Error> {
        let resolved = self.resolve(path)?;
        let complete = resolved.last();
        let before_last = resolved.chain.len() - usize::from(complete.is_some());
        for id in &resolved.chain[..before_last] {
            if let Some(inode) = self.inodes.get(*id) {
                visit(*id, inode)?;
            }
        }
        Ok(complete)
    }

    /// Whether the inode hangs on the root (and not on a deleted tree).
    pub fn is_reachable(&self, id: u64) -> bool {
        let mut at = id;
        // No deeper than there are inodes: a guard against a damaged image with a cycle.
        for _ in 0..=self.inodes.len() {
            if at == ROOT {
                return self.inodes.get(ROOT).is_some();
            }
            match self.inodes.get(at) {
                Some(inode) if inode.parent != DOOMED => at = inode.parent,
                _ => return false,
            }
        }
        false
    }

    /// Whether `ancestor` is `id` or above it.
    pub fn is_within(&self, id: u64, ancestor: u64) -> bool {
        let mut at = id;
        // No deeper than there are inodes: a guard against a damaged image with a cycle.
        for _ in 0..=self.inodes.len() {
            if at == ancestor {
                return true;
            }
            match self.inodes.get(at) {
                Some(inode) if at != ROOT && inode.parent != DOOMED => at = inode.parent,
                _ => return false,
            }
        }
        false
    }

    /// Path of an inode that hangs on the root.
    pub fn path_of(&self, id: u64) -> String {
        let mut names = Vec::new();
        let mut at = id;
        while at != ROOT && names.len() as u64 <= self.inodes.len() {
            let Some(inode) = self.inodes.get(at) else { break };
            names.push(&*inode.name);
            at = inode.parent;
        }
        if names.is_empty() {
            return "/".into();
        }
        let mut path = String::with_capacity(names.iter().map(|name| name.len() + 1).sum());
        for name in names.iter().rev() {
            path.push('/');
            path.push_str(name);
        }
        path
    }

    fn with_children<R>(
        &mut self,
        directory: u64,
        change: impl FnOnce(&mut Children, &PageTable<Inode>) -> R,
    ) -> Option<R> {
        let Some(Body::Directory(slot)) = self.inodes.derived_mut(directory).map(|inode| &mut inode.body) else {
            return None;
        };
        let mut children = slot.take().unwrap_or_default();
        let result = change(&mut children, &self.inodes);
        if let Some(Body::Directory(slot)) = self.inodes.derived_mut(directory).map(|inode| &mut inode.body) {
            *slot = if children.is_empty() { None } else { Some(children) };
        }
        Some(result)
    }

    /// Adds a new inode to its parent; `false` if the id is taken.
    pub fn add(&mut self, id: u64, inode: Inode) -> bool {
        let parent = inode.parent;
        let is_directory = inode.is_directory();
        if !self.inodes.insert(id, inode) {
            return false;
        }
        self.directories += u64::from(is_directory);
        if id != ROOT {
            self.link(parent, id);
        }
        true
    }

    /// Puts an inode into the children of a directory.
    pub fn link(&mut self, directory: u64, id: u64) {
        self.with_children(directory, |children, inodes| {
            if let Some(inode) = inodes.get(id) {
                children.insert(inode.name.as_bytes(), id, name_in(inodes));
            }
        });
    }

    /// Takes an inode out of the children of its directory.
    pub fn unlink(&mut self, id: u64) -> bool {
        let Some(parent) = self.inodes.get(id).map(|inode| inode.parent) else { return false };
        self.with_children(parent, |children, inodes| {
            inodes.get(id).is_some_and(|inode| children.remove(inode.name.as_bytes(), id, name_in(inodes)))
        })
        .unwrap_or(false)
    }

    /// Takes any child out of a directory that is being freed.
    pub fn pop_child(&mut self, directory: u64) -> Option<u64> {
        self.with_children(directory, |children, _| children.pop()).flatten()
    }

    /// Frees an inode that nothing holds any more.
    pub fn free(&mut self, id: u64) -> Option<Inode> {
        let inode = self.inodes.remove(id)?;
        self.directories -= u64::from(inode.is_directory());
        Some(inode)
    }

    /// Builds all children from the parents of the inodes, after a load. Returns the roots of deleted trees.
    pub fn rebuild(&mut self) -> Result<Vec<u64>, String> {
        let mut doomed = Vec::new();
        let mut pairs = Vec::with_capacity(self.inodes.len() as usize);
        self.directories = 0;
        for (id, inode) in self.inodes.iter_from(0) {
            self.directories += u64::from(inode.is_directory());
            if id == ROOT {
                continue;
            }
            if inode.parent == DOOMED {
                doomed.push(id);
                continue;
            }
            match self.inodes.get(inode.parent) {
                Some(parent) if parent.is_directory() => pairs.push((inode.parent, id)),
                _ => return Err(format!("inode {id} lies in {}, which is no directory", inode.parent)),
            }
        }
        if !self.inodes.get(ROOT).is_some_and(Inode::is_directory) {
            return Err("it has no root directory".into());
        }
        pairs.sort_unstable();
        let mut ids = Vec::new();
        for group in pairs.chunk_by(|a, b| a.0 == b.0) {
            let name_of = name_in(&self.inodes);
            ids.clear();
            ids.extend(group.iter().map(|(_, id)| *id));
            // Names mostly rise with the ids; then one look at each is enough.
            if !ids.is_sorted_by(|a, b| name_of(*a) < name_of(*b)) {
                ids.sort_unstable_by(|a, b| name_of(*a).cmp(name_of(*b)));
                if let Some(twice) = ids.windows(2).find(|pair| name_of(pair[0]) == name_of(pair[1])) {
                    return Err(format!("inodes {} and {} have the same name in {}", twice[0], twice[1], group[0].0));
                }
            }
            let children = Children::from_sorted(&ids, name_of);
            if let Some(Body::Directory(slot)) = self.inodes.derived_mut(group[0].0).map(|inode| &mut inode.body) {
                *slot = Some(Box::new(children));
            }
        }
        Ok(doomed)
    }
}

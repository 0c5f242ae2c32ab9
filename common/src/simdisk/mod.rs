//! A simulated disk: the twin of [`crate::durable::SystemFs`] that can crash.
//!
//! It keeps what a real disk keeps apart: what was written and what is durable, for bytes (`bytes.rs`) and for names (`names.rs`).
//! [`SimDisk::crash`] falls back to what is durable, plus a seeded choice of what was not: unsynced sectors and lengths each for
//! themselves, and of each folder's unsynced names a prefix. A folder is lost with all in it unless its own name was made durable.
//! [`SimDisk::freeze_at_sync`] stops durability at the k-th sync, so that a test can crash at every one; [`SimDisk::kill`] ends the
//! processes and leaves the caches.
//! Faults are data ([`Fault`]); the code under test knows nothing of them.

mod bytes;
mod damage;
mod names;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::durable::{DirEntry, File, Fs, Lock, Metadata, OpenMode, Space};
use crate::entropy::Entropy;

use bytes::Bytes;
use names::{Entry, Names, Node, ROOT};

/// What a fault hits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FaultOp {
    /// Reads of bytes, lengths and folders.
    Read,
    /// Writes of bytes; a part of them may have been written.
    Write,
    /// Syncs of bytes or names. What a failed sync of bytes lost, no later one brings back.
    Sync,
    /// Opening, making, renaming, removing, locking.
    Name,
}

/// An error that operations meet; data of the test that owns the disk.
#[derive(Clone, Debug)]
pub struct Fault {
    /// What it hits.
    pub op: FaultOp,
    /// Only paths that contain this.
    pub path: String,
    /// How many operations pass before it begins.
    pub after: u64,
    /// How many operations it hits.
    pub times: u64,
    /// What they get.
    pub kind: io::ErrorKind,
}

/// A simulated disk; clones share it.
#[derive(Clone)]
pub struct SimDisk {
    state: Arc<Mutex<State>>,
    entropy: Entropy,
}

/// A file.
#[derive(Clone, Default)]
struct Inode {
    bytes: Bytes,
    /// How many names it has: two after a crash between the syncs of a rename. One without lives as long as it is open.
    names: u32,
    open: u32,
}

/// What lies on the disk and in its caches.
#[derive(Clone, Default)]
struct Content {
    files: BTreeMap<Node, Inode>,
    names: Names,
}

#[derive(Default)]
struct State {
    content: Content,
    /// Bytes of all files that have a name or are open.
    used: u64,
    last_node: Node,
    locks: BTreeSet<PathBuf>,
    faults: Vec<Fault>,
    capacity: u64,
    syncs: u64,
    freeze_at: Option<u64>,
    /// The content at the moment of the frozen sync; what the next crash starts from.
    at_freeze: Option<Content>,
    /// Raised by a crash: handles from before it are dead.
    life: u64,
}

impl SimDisk {
    /// An empty disk of `capacity` bytes whose crashes are decided by `entropy`.
    pub fn new(capacity: u64, entropy: Entropy) -> Self {
        let state = State { capacity, ..State::default() };
        Self { state: Arc::new(Mutex::new(state)), entropy }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a fault.
    pub fn inject(&self, fault: Fault) {
        self.state().faults.push(fault);
    }

    /// Removes all faults.
    pub fn clear_faults(&self) {
        self.state().faults.clear();
    }

    /// Whether there is a file of this name, durable or not. No operation of a process: it meets no fault.
    pub fn has(&self, path: &Path) -> bool {
        matches!(self.state().content.names.find(path), Some(Entry::File(_)))
    }

    /// Syncs so far.
    pub fn syncs(&self) -> u64 {
        self.state().syncs
    }

    /// The next [`SimDisk::crash`] leaves the disk as a power cut just before the `k`-th sync (the first is 1) would have: all that
    /// comes after it, though it answers "done", never happened.
    pub fn freeze_at_sync(&self, k: u64) {
        self.state().freeze_at = Some(k);
    }

    /// Cuts the power: what is durable stays, of the rest a seeded part. Open handles and locks are dead, faults are gone.
    pub fn crash(&self) {
        let mut state = self.state();
        let state = &mut *state;
        state.faults.clear();
        state.freeze_at = None;
        if let Some(frozen) = state.at_freeze.take() {
            state.content = frozen;
        }
        let left = state.content.names.crash(&self.entropy);
        state.content.files.retain(|file, _| left.contains_key(file));
        for (file, inode) in &mut state.content.files {
            inode.bytes.crash(&self.entropy);
            inode.names = left.get(file).copied().unwrap_or_default();
        }
        state.end_life();
    }

    /// Ends the processes that use the disk, as `kill -9` does: open handles and locks are dead, what was written stays in the caches.
    pub fn kill(&self) {
        self.state().end_life();
    }
}

fn absent(path: &Path) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, format!("{} does not exist", path.display()))
}

fn wrong(kind: io::ErrorKind, path: &Path) -> io::Error {
    io::Error::new(kind, format!("{}: {kind}", path.display()))
}

impl State {
    fn check(&mut self, op: FaultOp, path: &Path) -> io::Result<()> {
        let text = path.to_string_lossy();
        for fault in &mut self.faults {
            if fault.op != op || !text.contains(&fault.path) {
                continue;
            }
            if fault.after > 0 {
                fault.after -= 1;
            } else if fault.times > 0 {
                fault.times -= 1;
                return Err(io::Error::new(fault.kind, format!("simulated fault on {text}")));
            }
        }
        Ok(())
    }

    /// Counts a sync, and takes the picture if it is the frozen one.
    fn sync(&mut self) {
        self.syncs += 1;
        if self.freeze_at == Some(self.syncs) {
            self.at_freeze = Some(self.content.clone());
        }
    }

    fn end_life(&mut self) {
        self.life += 1;
        self.locks.clear();
        self.used = 0;
        for inode in self.content.files.values_mut() {
            inode.open = 0;
            self.used += if inode.names > 0 { inode.bytes.len() as u64 } else { 0 };
        }
    }

    fn folder(&self, path: &Path) -> io::Result<Node> {
        match self.content.names.find(path) {
            Some(Entry::Folder(folder)) => Ok(folder),
            Some(Entry::File(_)) => Err(wrong(io::ErrorKind::NotADirectory, path)),
            None => Err(absent(path)),
        }
    }

    fn create(&mut self, path: &Path) -> io::Result<Node> {
        let (folder, name) = self.content.names.place(path).ok_or_else(|| absent(path.parent().unwrap_or(path)))?;
        self.last_node += 1;
        self.content.files.insert(self.last_node, Inode { names: 1, ..Inode::default() });
        self.content.names.put(folder, name, Entry::File(self.last_node));
        Ok(self.last_node)
    }

    /// A name of `file` went.
    fn unnamed(&mut self, file: Node) {
        if let Some(inode) = self.content.files.get_mut(&file) {
            inode.names -= 1;
        }
        self.forget_if_gone(file);
    }

    fn closed(&mut self, file: Node) {
        if let Some(inode) = self.content.files.get_mut(&file) {
            inode.open -= 1;
            self.forget_if_gone(file);
        }
    }

    /// The room of a file without name and handle is free; a crash may bring it back until the removal is durable.
    fn forget_if_gone(&mut self, file: Node) {
        let Some(inode) = self.content.files.get(&file) else { return };
        if inode.names == 0 && inode.open == 0 {
            self.used -= inode.bytes.len() as u64;
            if !self.content.names.holds(file) {
                self.content.files.remove(&file);
            }
        }
    }
}

struct SimFile {
    disk: SimDisk,
    file: Node,
    path: PathBuf,
    life: u64,
    writable: bool,
}

impl SimFile {
    fn state(&self, op: FaultOp) -> io::Result<MutexGuard<'_, State>> {
        let state = self.disk.state();
        if state.life != self.life {
            return Err(io::Error::other(format!("{}: the machine crashed", self.path.display())));
        }
        if op == FaultOp::Write && !self.writable {
            return Err(wrong(io::ErrorKind::PermissionDenied, &self.path));
        }
        Ok(state)
    }

    fn bytes<'a>(&self, state: &'a mut State) -> io::Result<&'a mut Bytes> {
        let inode = state.content.files.get_mut(&self.file);
        inode.map(|inode| &mut inode.bytes).ok_or_else(|| io::Error::other("the file is gone"))
    }

    /// A write that fails may have written a part.
    fn write_some(&self, state: &mut State, written: &[u8], offset: u64, at_most: u64) -> io::Result<()> {
        let part = self.disk.entropy.below((written.len() as u64).min(at_most) + 1) as usize;
        self.write(state, &written[..part], offset)
    }

    fn write(&self, state: &mut State, written: &[u8], offset: u64) -> io::Result<()> {
        let bytes = self.bytes(state)?;
        let before = bytes.len();
        bytes.write(written, offset);
        let grown = bytes.len() - before;
        state.used += grown as u64;
        Ok(())
    }
}

impl Drop for SimFile {
    fn drop(&mut self) {
        let mut state = self.disk.state();
        if state.life == self.life {
            state.closed(self.file);
        }
    }
}

impl File for SimFile {
    fn read_at(&self, out: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut state = self.state(FaultOp::Read)?;
        state.check(FaultOp::Read, &self.path)?;
        Ok(self.bytes(&mut state)?.read(out, offset))
    }

    fn write_all_at(&self, written: &[u8], offset: u64) -> io::Result<()> {
        let mut state = self.state(FaultOp::Write)?;
        if let Err(error) = state.check(FaultOp::Write, &self.path) {
            self.write_some(&mut state, written, offset, u64::MAX)?;
            return Err(error);
        }
        let length = self.bytes(&mut state)?.len() as u64;
        let grown = (offset + written.len() as u64).saturating_sub(length);
        let room = state.capacity.saturating_sub(state.used);
        if grown > room {
            self.write_some(&mut state, written, offset, (length + room).saturating_sub(offset))?;
            return Err(io::Error::new(io::ErrorKind::StorageFull, "the simulated disk is full"));
        }
        self.write(&mut state, written, offset)
    }

    fn len(&self) -> io::Result<u64> {
        let mut state = self.state(FaultOp::Read)?;
        state.check(FaultOp::Read, &self.path)?;
        Ok(self.bytes(&mut state)?.len() as u64)
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        let mut state = self.state(FaultOp::Write)?;
        state.check(FaultOp::Write, &self.path)?;
        let before = self.bytes(&mut state)?.len() as u64;
        if length.saturating_sub(before) > state.capacity.saturating_sub(state.used) {
            return Err(io::Error::new(io::ErrorKind::StorageFull, "the simulated disk is full"));
        }
        self.bytes(&mut state)?.set_len(length);
        state.used = state.used - before + length;
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut state = self.state(FaultOp::Sync)?;
        if let Err(error) = state.check(FaultOp::Sync, &self.path) {
            self.bytes(&mut state)?.fail_sync(&self.disk.entropy);
            return Err(error);
        }
        state.sync();
        self.bytes(&mut state)?.sync();
        Ok(())
    }

    fn start_write_back(&self, _offset: u64, _length: u64) {}

    fn preallocate(&self, _length: u64) {}

    fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

struct SimLock {
    disk: SimDisk,
    path: PathBuf,
    life: u64,
}

impl Lock for SimLock {}

impl Drop for SimLock {
    fn drop(&mut self) {
        let mut state = self.disk.state();
        if state.life == self.life {
            state.locks.remove(&self.path);
        }
    }
}

impl Fs for SimDisk {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn File>> {
        let mut state = self.state();
        state.check(FaultOp::Name, path)?;
        let file = match (state.content.names.find(path), mode) {
            (Some(_), OpenMode::Create) => return Err(wrong(io::ErrorKind::AlreadyExists, path)),
            (Some(Entry::Folder(_)), _) => return Err(wrong(io::ErrorKind::IsADirectory, path)),
            (Some(Entry::File(file)), _) => file,
            (None, OpenMode::Read | OpenMode::Write) => return Err(absent(path)),
            (None, OpenMode::Create | OpenMode::WriteOrCreate) => state.create(path)?,
        };
        if let Some(inode) = state.content.files.get_mut(&file) {
            inode.open += 1;
        }
        let writable = mode != OpenMode::Read;
        Ok(Arc::new(SimFile { disk: self.clone(), file, path: path.to_owned(), life: state.life, writable }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.state();
        state.check(FaultOp::Name, from)?;
        let names = &mut state.content.names;
        let entry = names.find(from).ok_or_else(|| absent(from))?;
        let source = names.place(from).ok_or_else(|| absent(from))?;
        let target = names.place(to).ok_or_else(|| absent(to.parent().unwrap_or(to)))?;
        match (entry, names.find(to)) {
            (_, Some(there)) if there == entry => return Ok(()),
            (Entry::Folder(_), _) if to.starts_with(from) => return Err(wrong(io::ErrorKind::InvalidInput, to)),
            (Entry::File(_), Some(Entry::Folder(_))) => return Err(wrong(io::ErrorKind::IsADirectory, to)),
            (Entry::Folder(_), Some(Entry::File(_))) => return Err(wrong(io::ErrorKind::NotADirectory, to)),
            (Entry::Folder(_), Some(Entry::Folder(there))) if names.children(there).next().is_some() => {
                return Err(wrong(io::ErrorKind::DirectoryNotEmpty, to));
            }
            _ => {}
        }
        if let Some(Entry::File(replaced)) = names.rename(source, target, entry) {
            state.unnamed(replaced);
        }
        Ok(())
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        state.check(FaultOp::Name, path)?;
        let names = &mut state.content.names;
        match (names.find(path), names.place(path)) {
            (Some(Entry::File(file)), Some((folder, name))) => {
                names.remove(folder, name);
                state.unnamed(file);
                Ok(())
            }
            (Some(Entry::Folder(_)), _) => Err(wrong(io::ErrorKind::IsADirectory, path)),
            _ => Err(absent(path)),
        }
    }

    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        state.check(FaultOp::Name, path)?;
        let mut ancestors: Vec<&Path> = path.ancestors().collect();
        ancestors.reverse();
        for folder in ancestors {
            match state.content.names.find(folder) {
                Some(Entry::Folder(_)) => continue,
                Some(Entry::File(_)) => return Err(wrong(io::ErrorKind::AlreadyExists, folder)),
                None => {}
            }
            let (above, name) = state.content.names.place(folder).ok_or_else(|| absent(folder))?;
            state.last_node += 1;
            let made = Entry::Folder(state.last_node);
            state.content.names.put(above, name, made);
        }
        Ok(())
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        state.check(FaultOp::Name, path)?;
        let top = state.folder(path)?;
        // Entries first, then the folder that held them.
        let (mut open, mut doomed) = (vec![top], Vec::new());
        while let Some(folder) = open.pop() {
            for (name, entry) in state.content.names.children(folder) {
                doomed.push((folder, name.clone(), entry));
                if let Entry::Folder(inner) = entry {
                    open.push(inner);
                }
            }
        }
        for (folder, name, entry) in doomed.into_iter().rev() {
            state.content.names.remove(folder, name);
            if let Entry::File(file) = entry {
                state.unnamed(file);
            }
        }
        if let Some((above, name)) = state.content.names.place(path).filter(|_| top != ROOT) {
            state.content.names.remove(above, name);
        }
        Ok(())
    }

    fn read_dir(&self, path: &Path) -> io::Result<Vec<DirEntry>> {
        let mut state = self.state();
        state.check(FaultOp::Read, path)?;
        let folder = state.folder(path)?;
        let length = |file: &Node| state.content.files.get(file).map_or(0, |inode| inode.bytes.len() as u64);
        let entry = |(name, entry): (&std::ffi::OsString, Entry)| {
            let (is_dir, len) = match entry {
                Entry::File(file) => (false, length(&file)),
                Entry::Folder(_) => (true, 0),
            };
            DirEntry { name: name.to_string_lossy().into_owned(), is_dir, len }
        };
        let mut entries: Vec<DirEntry> = state.content.names.children(folder).map(entry).collect();
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    fn metadata(&self, path: &Path) -> io::Result<Option<Metadata>> {
        let mut state = self.state();
        state.check(FaultOp::Read, path)?;
        Ok(state.content.names.find(path).map(|entry| match entry {
            Entry::Folder(_) => Metadata { is_dir: true, len: 0 },
            Entry::File(file) => {
                let len = state.content.files.get(&file).map_or(0, |inode| inode.bytes.len() as u64);
                Metadata { is_dir: false, len }
            }
        }))
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        state.check(FaultOp::Sync, path)?;
        let folder = state.folder(path)?;
        state.sync();
        for file in state.content.names.sync(folder) {
            let gone = state.content.files.get(&file).is_some_and(|inode| inode.names == 0 && inode.open == 0);
            if gone && !state.content.names.holds(file) {
                state.content.files.remove(&file);
            }
        }
        Ok(())
    }

    /// The disk is one volume. As any sync it counts once: a crash just before it finds a part of all this durable, as one in its middle does.
    fn sync_volume(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        let state = &mut *state;
        let top = state.folder(path)?;
        if let Err(error) = state.check(FaultOp::Sync, path) {
            for file in state.content.names.files_below(top) {
                if let Some(inode) = state.content.files.get_mut(&file) {
                    inode.bytes.fail_sync(&self.entropy);
                }
            }
            return Err(error);
        }
        state.sync();
        state.content.names.sync_all();
        state.content.files.values_mut().for_each(|inode| inode.bytes.sync());
        state.content.files.retain(|_, inode| inode.names > 0 || inode.open > 0);
        Ok(())
    }

    fn space(&self, path: &Path) -> io::Result<Space> {
        let mut state = self.state();
        state.check(FaultOp::Read, path)?;
        Ok(Space { capacity: state.capacity, available: state.capacity.saturating_sub(state.used) })
    }

    fn lock(&self, path: &Path) -> io::Result<Option<Box<dyn Lock>>> {
        let mut state = self.state();
        state.check(FaultOp::Name, path)?;
        if state.content.names.find(path).is_none() {
            state.create(path)?;
        }
        if !state.locks.insert(path.to_owned()) {
            return Ok(None);
        }
        Ok(Some(Box::new(SimLock { disk: self.clone(), path: path.to_owned(), life: state.life })))
    }

    fn restrict(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        state.check(FaultOp::Name, path)?;
        state.folder(path).map(|_| ())
    }
}

#[cfg(test)]
mod tests;

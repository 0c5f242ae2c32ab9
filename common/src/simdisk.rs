//! A simulated disk: the twin of [`crate::durable::SystemFs`] that can crash.
//!
//! It keeps what a real disk keeps apart: what was written and what is durable, for bytes and for names. [`SimDisk::crash`] falls
//! back to what is durable, plus a seeded choice of what was not: unsynced writes may survive in part, and unsynced names may
//! or may not have reached the disk. [`SimDisk::freeze_at_sync`] stops durability at the k-th sync, so that a test can crash at every one.
//! Faults are data ([`Fault`]); the code under test knows nothing of them.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::durable::{DirEntry, File, Fs, Lock, Metadata, OpenMode, Space};
use crate::entropy::Entropy;

/// Unsynced writes survive a crash in pieces of this size.
const SECTOR: usize = 512;

/// What a fault hits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FaultOp {
    /// Reads of bytes.
    Read,
    /// Writes of bytes.
    Write,
    /// Syncs of bytes or names.
    Sync,
    /// Opening, renaming, removing.
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

type FileNumber = u64;

/// What lies on the disk and in its caches.
#[derive(Clone, Default)]
struct Content {
    files: BTreeMap<FileNumber, Bytes>,
    names: BTreeMap<PathBuf, FileNumber>,
    durable_names: BTreeMap<PathBuf, FileNumber>,
    folders: BTreeSet<PathBuf>,
    durable_folders: BTreeSet<PathBuf>,
}

#[derive(Default)]
struct State {
    content: Content,
    next_file: FileNumber,
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

#[derive(Clone, Default)]
struct Bytes {
    current: Vec<u8>,
    durable: Vec<u8>,
    /// Writes since the last sync: offset and bytes.
    pending: Vec<(u64, Vec<u8>)>,
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

    /// Syncs so far.
    pub fn syncs(&self) -> u64 {
        self.state().syncs
    }

    /// The next [`SimDisk::crash`] leaves the disk as a power cut just before the `k`-th sync (the first is 1) would have: all that
    /// comes after it, though it answers "done", never happened.
    pub fn freeze_at_sync(&self, k: u64) {
        self.state().freeze_at = Some(k);
    }

    /// Cuts the power: what is durable stays, of the rest a seeded part. Open handles and locks are dead.
    pub fn crash(&self) {
        let mut state = self.state();
        let state = &mut *state;
        state.life += 1;
        state.freeze_at = None;
        state.locks.clear();
        state.faults.clear();
        if let Some(frozen) = state.at_freeze.take() {
            state.content = frozen;
        }
        let content = &mut state.content;
        for bytes in content.files.values_mut() {
            for (offset, written) in std::mem::take(&mut bytes.pending) {
                // A disk writes a sector as a whole or not at all, and sectors lie at multiples of their size.
                let (mut at, mut rest) = (offset, &written[..]);
                while !rest.is_empty() {
                    let (sector, later) = rest.split_at(rest.len().min(SECTOR - at as usize % SECTOR));
                    if self.entropy.below(2) == 0 {
                        put(&mut bytes.durable, at, sector);
                    }
                    at += sector.len() as u64;
                    rest = later;
                }
            }
            bytes.current = bytes.durable.clone();
        }
        // Each name that was changed and not synced is as it was, or as it became; both names of a rename alike, as journals have it.
        let mut coins: BTreeMap<FileNumber, bool> = BTreeMap::new();
        let changed: BTreeSet<PathBuf> = content.names.keys().chain(content.durable_names.keys()).cloned().collect();
        for path in changed {
            let (now, then) = (content.names.get(&path).copied(), content.durable_names.get(&path).copied());
            let Some(file) = now.or(then).filter(|_| now != then) else { continue };
            if *coins.entry(file).or_insert_with(|| self.entropy.below(2) == 0) {
                match now {
                    Some(file) => content.durable_names.insert(path, file),
                    None => content.durable_names.remove(&path),
                };
            }
        }
        content.names = content.durable_names.clone();
        content.folders = content.durable_folders.clone();
        let kept: BTreeSet<FileNumber> = content.names.values().copied().collect();
        content.files.retain(|file, _| kept.contains(file));
    }
}

fn put(target: &mut Vec<u8>, offset: u64, bytes: &[u8]) {
    let (start, end) = (offset as usize, offset as usize + bytes.len());
    if target.len() < end {
        target.resize(end, 0);
    }
    target[start..end].copy_from_slice(bytes);
}

fn absent(path: &Path) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, format!("{} does not exist", path.display()))
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

    fn used(&self) -> u64 {
        self.content.files.values().map(|bytes| bytes.current.len() as u64).sum()
    }
}

struct SimFile {
    disk: SimDisk,
    file: FileNumber,
    path: PathBuf,
    life: u64,
    writable: bool,
}

impl SimFile {
    fn with<R>(&self, op: FaultOp, f: impl FnOnce(&mut State, FileNumber) -> io::Result<R>) -> io::Result<R> {
        let mut state = self.disk.state();
        if state.life != self.life {
            return Err(io::Error::other(format!("{}: the machine crashed", self.path.display())));
        }
        if op == FaultOp::Write && !self.writable {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        state.check(op, &self.path)?;
        f(&mut state, self.file)
    }
}

fn bytes_of(state: &mut State, file: FileNumber) -> io::Result<&mut Bytes> {
    state.content.files.get_mut(&file).ok_or_else(|| io::Error::other("the file is gone"))
}

impl File for SimFile {
    fn read_at(&self, out: &mut [u8], offset: u64) -> io::Result<usize> {
        self.with(FaultOp::Read, |state, file| {
            let bytes = &bytes_of(state, file)?.current;
            let start = (offset as usize).min(bytes.len());
            let n = out.len().min(bytes.len() - start);
            out[..n].copy_from_slice(&bytes[start..start + n]);
            Ok(n)
        })
    }

    fn write_all_at(&self, written: &[u8], offset: u64) -> io::Result<()> {
        self.with(FaultOp::Write, |state, file| {
            if state.used() + written.len() as u64 > state.capacity {
                return Err(io::Error::new(io::ErrorKind::StorageFull, "the simulated disk is full"));
            }
            let bytes = bytes_of(state, file)?;
            put(&mut bytes.current, offset, written);
            bytes.pending.push((offset, written.to_vec()));
            Ok(())
        })
    }

    fn len(&self) -> io::Result<u64> {
        self.with(FaultOp::Read, |state, file| Ok(bytes_of(state, file)?.current.len() as u64))
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.with(FaultOp::Write, |state, file| {
            let bytes = bytes_of(state, file)?;
            bytes.current.resize(length as usize, 0);
            for (offset, written) in &mut bytes.pending {
                written.truncate(length.saturating_sub(*offset) as usize);
            }
            Ok(())
        })
    }

    fn sync_data(&self) -> io::Result<()> {
        self.with(FaultOp::Sync, |state, file| {
            state.sync();
            let bytes = bytes_of(state, file)?;
            bytes.durable.clone_from(&bytes.current);
            bytes.pending.clear();
            Ok(())
        })
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
        let file = match (state.content.names.get(path).copied(), mode) {
            (Some(_), OpenMode::Create) => return Err(io::ErrorKind::AlreadyExists.into()),
            (Some(file), _) => file,
            (None, OpenMode::Read | OpenMode::Write) => return Err(absent(path)),
            (None, OpenMode::Create | OpenMode::WriteOrCreate) => {
                let parent = path.parent().unwrap_or(Path::new("/"));
                if !state.content.folders.contains(parent) && parent != Path::new("/") {
                    return Err(absent(parent));
                }
                let file = state.next_file;
                state.next_file += 1;
                state.content.files.insert(file, Bytes::default());
                state.content.names.insert(path.to_owned(), file);
                file
            }
        };
        let writable = mode != OpenMode::Read;
        Ok(Arc::new(SimFile { disk: self.clone(), file, path: path.to_owned(), life: state.life, writable }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.state();
        state.check(FaultOp::Name, from)?;
        if state.content.folders.contains(from) {
            return rename_folder(&mut state, from, to);
        }
        let file = state.content.names.remove(from).ok_or_else(|| absent(from))?;
        state.content.names.insert(to.to_owned(), file);
        Ok(())
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        state.check(FaultOp::Name, path)?;
        state.content.names.remove(path).map(|_| ()).ok_or_else(|| absent(path))
    }

    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        state.check(FaultOp::Name, path)?;
        let ancestors: Vec<PathBuf> = path.ancestors().map(Path::to_owned).collect();
        state.content.folders.extend(ancestors);
        Ok(())
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        state.check(FaultOp::Name, path)?;
        state.content.names.retain(|name, _| !name.starts_with(path));
        state.content.folders.retain(|name| !name.starts_with(path));
        Ok(())
    }

    fn read_dir(&self, path: &Path) -> io::Result<Vec<DirEntry>> {
        let state = self.state();
        if !state.content.folders.contains(path) {
            return Err(absent(path));
        }
        let name = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let mut entries = Vec::new();
        for (file, number) in state.content.names.iter().filter(|(file, _)| file.parent() == Some(path)) {
            let len = state.content.files.get(number).map_or(0, |bytes| bytes.current.len() as u64);
            entries.push(DirEntry { name: name(file), is_dir: false, len });
        }
        for folder in state.content.folders.iter().filter(|folder| folder.parent() == Some(path)) {
            entries.push(DirEntry { name: name(folder), is_dir: true, len: 0 });
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    fn metadata(&self, path: &Path) -> io::Result<Option<Metadata>> {
        let state = self.state();
        if state.content.folders.contains(path) {
            return Ok(Some(Metadata { is_dir: true, len: 0 }));
        }
        let file = state.content.names.get(path).and_then(|number| state.content.files.get(number));
        Ok(file.map(|bytes| Metadata { is_dir: false, len: bytes.current.len() as u64 }))
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        state.check(FaultOp::Sync, path)?;
        state.sync();
        let state = &mut state.content;
        // The journal that takes a name away carries the new one of the same file.
        let here = |name: &Path| name.parent() == Some(path);
        let left: BTreeSet<FileNumber> =
            state.durable_names.iter().filter(|(name, _)| here(name)).map(|(_, file)| *file).collect();
        let moved: Vec<(PathBuf, FileNumber)> = state
            .names
            .iter()
            .filter(|(name, file)| !here(name) && left.contains(file))
            .map(|(name, file)| (name.clone(), *file))
            .collect();
        state.durable_names.retain(|name, _| name.parent() != Some(path));
        state.durable_names.extend(moved);
        let here = state.names.iter().filter(|(name, _)| name.parent() == Some(path));
        state.durable_names.extend(here.map(|(name, file)| (name.clone(), *file)));
        state.durable_folders.retain(|name| name.parent() != Some(path));
        let folders = state.folders.iter().filter(|name| name.parent() == Some(path));
        state.durable_folders.extend(folders.cloned());
        // A folder that is synced is reachable: tests make their roots without syncing every ancestor.
        state.durable_folders.extend(path.ancestors().map(Path::to_owned));
        Ok(())
    }

    fn space(&self, _path: &Path) -> io::Result<Space> {
        let state = self.state();
        let used = state.used();
        Ok(Space { capacity: state.capacity, available: state.capacity.saturating_sub(used) })
    }

    fn lock(&self, path: &Path) -> io::Result<Option<Box<dyn Lock>>> {
        let mut state = self.state();
        if !state.locks.insert(path.to_owned()) {
            return Ok(None);
        }
        Ok(Some(Box::new(SimLock { disk: self.clone(), path: path.to_owned(), life: state.life })))
    }

    fn restrict(&self, _path: &Path) -> io::Result<()> {
        Ok(())
    }
}

fn rename_folder(state: &mut State, from: &Path, to: &Path) -> io::Result<()> {
    let moved = |path: &Path| {
        path.strip_prefix(from).ok().map(|rest| if rest.as_os_str().is_empty() { to.to_owned() } else { to.join(rest) })
    };
    let names = std::mem::take(&mut state.content.names);
    state.content.names = names.into_iter().map(|(path, file)| (moved(&path).unwrap_or(path), file)).collect();
    let folders = std::mem::take(&mut state.content.folders);
    state.content.folders = folders.into_iter().map(|path| moved(&path).unwrap_or(path)).collect();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::durable::{read_all, write_atomic};

    fn disk(seed: u64) -> SimDisk {
        let disk = SimDisk::new(1 << 20, Entropy::seeded(seed));
        disk.create_dir_all(Path::new("/d")).unwrap();
        disk.sync_dir(Path::new("/")).unwrap();
        disk
    }

    #[test]
    fn an_atomic_write_is_the_old_or_the_new_at_every_sync() {
        let path = Path::new("/d/f");
        let count = {
            let disk = disk(0);
            write_atomic(&disk, path, b"old").unwrap();
            let before = disk.syncs();
            write_atomic(&disk, path, b"new!").unwrap();
            disk.syncs() - before
        };
        for k in 1..=count + 1 {
            for seed in 0..50 {
                let disk = disk(seed);
                write_atomic(&disk, path, b"old").unwrap();
                disk.freeze_at_sync(disk.syncs() + k);
                write_atomic(&disk, path, b"new!").unwrap();
                disk.crash();
                let found = read_all(&disk, path, 100).unwrap();
                assert!(found == b"old" || found == b"new!", "at sync {k}, seed {seed}: {found:?}");
                assert!(k <= count || found == b"new!", "acknowledged, then lost");
            }
        }
    }

    #[test]
    fn unsynced_names_and_bytes_may_go_and_handles_die() {
        let mut lost = 0;
        for seed in 0..20 {
            let disk = disk(seed);
            let file = disk.open(Path::new("/d/x"), OpenMode::Create).unwrap();
            file.write_all_at(&[1; 2_000], 0).unwrap();
            disk.crash();
            assert!(file.len().is_err(), "a handle outlived the crash");
            lost += u32::from(disk.metadata(Path::new("/d/x")).unwrap().is_none());
        }
        assert!((1..20).contains(&lost), "both outcomes must occur: {lost}");
    }

    #[test]
    fn faults_and_a_full_disk() {
        let disk = disk(1);
        let fault = Fault { op: FaultOp::Sync, path: "x".into(), after: 1, times: 1, kind: io::ErrorKind::Other };
        disk.inject(fault);
        let file = disk.open(Path::new("/d/x"), OpenMode::Create).unwrap();
        file.sync_data().unwrap();
        assert!(file.sync_data().is_err());
        file.sync_data().unwrap();
        assert_eq!(file.write_all_at(&vec![0; 2 << 20], 0).unwrap_err().kind(), io::ErrorKind::StorageFull);
    }
}

//! One host's machine: its disk, its clocks, its randomness; what is left of it when its process dies, and the moment at which it is to die.

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use cairn_common::Env;
use cairn_common::clock::Clock;
use cairn_common::durable::{DirEntry, File, Fs, Lock, Metadata, OpenMode, Space};
use cairn_common::entropy::Entropy;
use cairn_common::net::Net;
use cairn_common::simdisk::SimDisk;
use cairn_common::work::Work;
use tokio::sync::Notify;

use super::{deletions, pin, trace};

/// Bytes of a disk; far more than a seed writes.
pub const DISK_BYTES: u64 = 1 << 30;

/// A host; see the module.
pub struct Machine {
    /// Its name in the network.
    pub name: String,
    /// Its disk.
    pub disk: SimDisk,
    /// When it loses power in the middle of a sync.
    pub trip: Arc<Trip>,
    /// Set by the process when it ends.
    pub exited: Cell<bool>,
    /// Tells the process to end in order.
    pub stop: Rc<Notify>,
    /// Its disk had errors that a restart may heal.
    pub ailing: Cell<bool>,
    /// Whether the process runs (or is being started).
    pub up: Cell<bool>,
    /// Why its process did not start the last time; empty: it did.
    pub trouble: RefCell<String>,
    seed: u64,
    starts: Cell<u64>,
    jitter_ms: Cell<u64>,
    clock: RefCell<Option<Clock>>,
    work: RefCell<Option<Work>>,
    wall_jump_ms: Cell<i64>,
    lying: bool,
}

impl Machine {
    /// A machine whose disk and work take up to `jitter_ms` for each operation; `lying`: its disk forgets to sync what is acknowledged.
    pub fn new(name: &str, seed: u64, jitter_ms: u64, lying: bool) -> Rc<Self> {
        let seed = trace::digest(seed, name.as_bytes());
        Rc::new(Self {
            name: name.into(),
            disk: SimDisk::new(DISK_BYTES, Entropy::seeded(seed ^ 0xD15C)),
            trip: Arc::default(),
            exited: Cell::new(false),
            stop: Rc::new(Notify::new()),
            ailing: Cell::new(false),
            up: Cell::new(true),
            trouble: RefCell::default(),
            seed,
            starts: Cell::new(0),
            jitter_ms: Cell::new(jitter_ms),
            clock: RefCell::new(None),
            work: RefCell::new(None),
            wall_jump_ms: Cell::new(0),
            lying,
        })
    }

    /// What a process that starts now on this machine gets. To be called on the host.
    pub fn boot(&self) -> Env {
        self.starts.set(self.starts.get() + 1);
        let clock = Clock::simulated(pin::EPOCH_S * 1_000 + trace::now_ms());
        clock.jump_wall(self.wall_jump_ms.get());
        *self.clock.borrow_mut() = Some(clock.clone());
        let entropy = Entropy::seeded(self.seed.wrapping_add(self.starts.get().wrapping_mul(0x9E37_79B9_7F4A_7C15)));
        let work = Work::jittered(Entropy::seeded(entropy.next_u64()), self.jitter_ms.get());
        *self.work.borrow_mut() = Some(work.clone());
        let fs = Watched {
            name: self.name.as_str().into(),
            disk: self.disk.clone(),
            trip: Arc::clone(&self.trip),
            lying: self.lying,
        };
        Env { clock, entropy, net: Net::turmoil(), fs: Arc::new(fs), work }
    }

    /// Moves the wall clock, for good.
    pub fn jump_wall(&self, by_ms: i64) {
        self.wall_jump_ms.set(self.wall_jump_ms.get() + by_ms);
        if let Some(clock) = &*self.clock.borrow() {
            clock.jump_wall(by_ms);
        }
    }

    /// From now on disk operations and the turns of owners take up to so long.
    pub fn set_jitter(&self, jitter_ms: u64) {
        self.jitter_ms.set(jitter_ms);
        if let Some(work) = &*self.work.borrow() {
            work.set_jitter(jitter_ms);
        }
    }

    /// From now on the namenode's log takes up to so long for each of its turns, and nothing else does.
    pub fn set_log_jitter(&self, jitter_ms: u64) {
        if let Some(work) = &*self.work.borrow() {
            work.set_owner_jitter("nn-journal", jitter_ms);
        }
    }

    /// Its process does not start.
    pub fn says_no(&self, why: &str) {
        trace::note(&self.name, format!("does not start: {why}"));
        why.clone_into(&mut self.trouble.borrow_mut());
    }

    /// How often its process was started.
    pub fn starts(&self) -> u64 {
        self.starts.get()
    }
}

/// The machine loses power just before a sync: what it sent before that arrives, and it does nothing any more.
#[derive(Default)]
pub struct Trip {
    /// Syncs until then; 0: none.
    left: AtomicU64,
    tripped: AtomicBool,
}

impl Trip {
    /// Sets it to the `nth` sync from now.
    pub fn arm(&self, nth: u64) {
        self.left.store(nth, Ordering::Relaxed);
    }

    /// Takes it back, and says whether it went off.
    pub fn disarm(&self) -> bool {
        self.left.store(0, Ordering::Relaxed);
        self.tripped.swap(false, Ordering::Relaxed)
    }

    /// Has it gone off?
    pub fn is_tripped(&self) -> bool {
        self.tripped.load(Ordering::Relaxed)
    }

    fn sync(&self, host: &str, disk: &SimDisk) {
        // A thread of its own would make the order of things a matter of chance.
        assert!(turmoil::in_simulation(), "{host} syncs on another thread");
        let left = self.left.load(Ordering::Relaxed);
        if left == 0 {
            return;
        }
        self.left.store(left - 1, Ordering::Relaxed);
        if left == 1 {
            disk.freeze_at_sync(disk.syncs() + 1);
            self.tripped.store(true, Ordering::Relaxed);
            super::cluster::silence(host);
        }
    }
}

/// The disk as a process sees it: syncs are watched; and, for a planted bug, forgotten.
struct Watched {
    name: Arc<str>,
    disk: SimDisk,
    trip: Arc<Trip>,
    lying: bool,
}

struct WatchedFile {
    path: PathBuf,
    name: Arc<str>,
    file: Arc<dyn File>,
    disk: SimDisk,
    trip: Arc<Trip>,
    lying: bool,
}

impl File for WatchedFile {
    fn read_at(&self, out: &mut [u8], offset: u64) -> io::Result<usize> {
        let read = self.file.read_at(out, offset)?;
        deletions::read(&self.name, &self.path, offset..offset + read as u64);
        Ok(read)
    }

    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }

    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.file.set_len(length)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.trip.sync(&self.name, &self.disk);
        if self.lying { Ok(()) } else { self.file.sync_data() }
    }

    fn start_write_back(&self, offset: u64, length: u64) {
        self.file.start_write_back(offset, length);
    }

    fn preallocate(&self, length: u64) {
        self.file.preallocate(length);
    }

    fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// Whether somebody is told that what is in this file is safe: all but the `VERSION` files, without which nothing would start.
fn is_acknowledged(path: &Path) -> bool {
    path.file_name().is_none_or(|name| !name.to_string_lossy().contains("VERSION"))
}

impl Fs for Watched {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn File>> {
        let file = self.disk.open(path, mode)?;
        let Self { name, disk, trip, lying } = self;
        let (name, disk, trip) = (Arc::clone(name), disk.clone(), Arc::clone(trip));
        let lying = *lying && is_acknowledged(path);
        Ok(Arc::new(WatchedFile { name, path: path.to_owned(), file, disk, trip, lying }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.disk.rename(from, to)?;
        deletions::removed(&self.name, from, Some(to));
        Ok(())
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.disk.remove_file(path)?;
        deletions::removed(&self.name, path, None);
        Ok(())
    }

    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        self.disk.create_dir_all(path)
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        self.disk.remove_dir_all(path)
    }

    fn read_dir(&self, path: &Path) -> io::Result<Vec<DirEntry>> {
        self.disk.read_dir(path)
    }

    fn metadata(&self, path: &Path) -> io::Result<Option<Metadata>> {
        self.disk.metadata(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.trip.sync(&self.name, &self.disk);
        self.disk.sync_dir(path)
    }

    fn sync_volume(&self, path: &Path) -> io::Result<()> {
        self.trip.sync(&self.name, &self.disk);
        if self.lying { Ok(()) } else { self.disk.sync_volume(path) }
    }

    fn space(&self, path: &Path) -> io::Result<Space> {
        self.disk.space(path)
    }

    fn lock(&self, path: &Path) -> io::Result<Option<Box<dyn Lock>>> {
        self.disk.lock(path)
    }

    fn restrict(&self, path: &Path) -> io::Result<()> {
        self.disk.restrict(path)
    }
}

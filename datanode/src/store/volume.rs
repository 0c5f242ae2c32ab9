//! One volume: a folder with its lock, its identity, its block files' places, and its room.
//!
//! ```text
//! <dir>/VERSION, in_use.lock
//! <dir>/<pool>/finalized/xx/yy/<id>_<generation>_<length>.blk   256 consecutive ids share a folder
//! <dir>/<pool>/rbw/<id>_<generation>.rbw                        open pipelines, and what crashes left of them
//! <dir>/<pool>/tmp/                                             copies under way; worthless after a crash
//! <dir>/<pool>/corrupt/                                         set aside, reported, never served
//! <dir>/<pool>/quarantine/                                      unknown to the namenode; kept for a while (quarantine.rs)
//! <dir>/jobs/, <dir>/state/                                     not ours
//! ```

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use cairn_common::Env;
use cairn_common::durable::{self, Fs, Lock, OpenMode, make_dir};
use cairn_proto::blockfile;
use cairn_proto::ids::{BlockId, Generation};
use cairn_proto::{Error, ErrorCode, Result};
use tokio::sync::Notify;

use super::lock;
use super::version::{LAYOUT, Version};

/// Room is taken ahead of a writer in steps of this, so that many small files do not each hold a whole block's.
pub const RESERVE_STEP: u64 = 16 << 20;

/// Replicas that a disk may fail to read before it counts as failing: one bad sector is a bad replica, several are a bad disk.
const READ_ERRORS_TOLERATED: u32 = 4;
/// What the check of a volume writes and reads back.
const PROBE: &str = "probe.tmp";

/// A volume; see the module.
pub struct Volume {
    root: PathBuf,
    storage_id: String,
    fs: Arc<dyn Fs>,
    _lock: Box<dyn Lock>,
    pool_root: OnceLock<PathBuf>,
    folders: Mutex<HashSet<PathBuf>>,
    room: Mutex<Room>,
    failure: Mutex<Option<String>>,
    /// Told of each failure; shared by the volumes of a node.
    failures: Arc<Notify>,
    read_errors: AtomicU32,
    looking: AtomicBool,
}

/// Figures of a volume, bytes.
#[derive(Clone, Copy, Default, Debug)]
struct Room {
    /// From `--capacity`.
    limit: Option<u64>,
    /// Kept free for others.
    keep_free: u64,
    /// Of the file system, when last looked at.
    disk_capacity: u64,
    disk_available: u64,
    /// By block files.
    used: u64,
    /// Promised to writers, not yet written.
    reserved: u64,
}

impl Room {
    fn capacity(&self) -> u64 {
        let disk = self.disk_capacity.saturating_sub(self.keep_free);
        self.limit.map_or(disk, |limit| limit.min(disk))
    }

    fn remaining(&self) -> u64 {
        let disk = self.disk_available.saturating_sub(self.keep_free);
        disk.min(self.capacity().saturating_sub(self.used)).saturating_sub(self.reserved)
    }
}

/// Capacity, used and remaining bytes.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Usage {
    /// What blocks may take.
    pub capacity: u64,
    /// What block files take.
    pub used: u64,
    /// What more they may take now.
    pub remaining: u64,
}

impl Volume {
    /// Locks `root` and reads its `VERSION` (`None`: new and empty). Refuses a folder in use, and one that holds something else.
    pub fn lock(fs: &Arc<dyn Fs>, root: &Path) -> Result<(Box<dyn Lock>, Option<Version>)> {
        let shown = root.display();
        let failed = |error: io::Error| Error::io(&shown, &error);
        let found = fs.metadata(root).map_err(failed)?;
        if found.is_some_and(|found| !found.is_dir) {
            let text = format!("{shown} is not a folder");
            return Err(Error::new(ErrorCode::InvalidArgument, text).with_subject(shown.to_string()));
        }
        let version = Version::read(&**fs, root)?;
        if version.is_none() {
            let names = if found.is_some() { fs.read_dir(root).map_err(failed)? } else { Vec::new() };
            let foreign =
                names.iter().find(|e| !["in_use.lock", "lost+found", "VERSION.tmp"].contains(&e.name.as_str()));
            if let Some(found) = foreign {
                let text = format!(
                    "{shown} has no VERSION file but holds {:?}: it is no datanode's folder; give an empty one",
                    found.name
                );
                return Err(Error::new(ErrorCode::InvalidArgument, text).with_subject(shown.to_string()));
            }
            make_dir(&**fs, root).map_err(failed)?;
        }
        fs.restrict(root).map_err(failed)?;
        let Some(lock) = fs.lock(&root.join("in_use.lock")).map_err(failed)? else {
            let text = format!("{shown} is in use by another datanode (in_use.lock is held)");
            return Err(Error::new(ErrorCode::AlreadyBeingCreated, text).with_subject(shown.to_string()));
        };
        Ok((lock, version))
    }

    /// A locked volume with its identity.
    pub fn new(
        fs: Arc<dyn Fs>,
        root: &Path,
        lock: Box<dyn Lock>,
        storage_id: String,
        (limit, reserve): (Option<u64>, u64),
        failures: Arc<Notify>,
    ) -> Self {
        Self {
            root: root.to_owned(),
            storage_id,
            fs,
            _lock: lock,
            pool_root: OnceLock::new(),
            folders: Mutex::default(),
            room: Mutex::new(Room { limit, keep_free: reserve, ..Room::default() }),
            failure: Mutex::default(),
            failures,
            read_errors: AtomicU32::new(0),
            looking: AtomicBool::new(false),
        }
    }

    /// A fresh identity for a new folder.
    pub fn fresh_version(env: &Env, node_id: &str) -> Version {
        Version {
            role: "datanode".into(),
            layout: LAYOUT,
            cluster_id: String::new(),
            pool_id: String::new(),
            node_id: node_id.to_owned(),
            storage_id: env.entropy.uuid(),
            epoch: 0,
        }
    }

    /// The volume's id.
    pub fn storage_id(&self) -> &str {
        &self.storage_id
    }

    /// The volume's folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Makes the folders of the block pool; blocks can be stored from then on.
    pub fn open_pool(&self, pool: &str) -> Result<()> {
        let sane = !pool.is_empty()
            && pool.len() <= 200
            && pool.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
        if !sane || pool.starts_with('.') || ["jobs", "state", "VERSION", "in_use.lock"].contains(&pool) {
            let text = format!("the namenode's block pool id {pool:?} is no name for a folder");
            return Err(Error::new(ErrorCode::InvalidArgument, text));
        }
        let root = self.root.join(pool);
        let failed = |error: io::Error| Error::io(root.display(), &error);
        for name in ["finalized", "rbw", "tmp", "corrupt", super::quarantine::FOLDER] {
            self.fs.create_dir_all(&root.join(name)).map_err(failed)?;
        }
        self.fs.restrict(&root).map_err(failed)?;
        self.fs.sync_dir(&root).map_err(failed)?;
        self.fs.sync_dir(&self.root).map_err(failed)?;
        self.pool_root.get_or_init(|| root);
        Ok(())
    }

    /// The pool's folder, or an error before the first registration.
    pub fn pool_root(&self) -> Result<&Path> {
        self.pool_root.get().map(PathBuf::as_path).ok_or_else(|| {
            Error::new(ErrorCode::Busy, "this datanode has not registered with a namenode yet: ask again")
        })
    }

    /// Where an open replica lies.
    pub fn open_path(&self, block: BlockId, generation: Generation, temporary: bool) -> Result<PathBuf> {
        let folder = if temporary { "tmp" } else { "rbw" };
        Ok(self.pool_root()?.join(folder).join(blockfile::unfinalized_name(block, generation)))
    }

    /// Where a finalized replica lies.
    pub fn finalized_path(&self, block: BlockId, generation: Generation, length: u64) -> Result<PathBuf> {
        Ok(self.finalized_folder(block)?.join(blockfile::finalized_name(block, generation, length)))
    }

    fn finalized_folder(&self, block: BlockId) -> Result<PathBuf> {
        let (high, low) = ((block.0 >> 16) as u8, (block.0 >> 8) as u8);
        Ok(self.pool_root()?.join("finalized").join(format!("{high:02x}")).join(format!("{low:02x}")))
    }

    /// Where a bad file is set aside.
    pub fn corrupt_path(&self, name: &str) -> Result<PathBuf> {
        Ok(self.pool_root()?.join("corrupt").join(name))
    }

    /// Renames a replica's file to its final name, which is durable after [`Self::sync_final`]. The folder that it leaves is not synced:
    /// after a crash the file system shows it under one name or the other, and both are handled at start. An error: it was not renamed.
    pub fn rename_to_final(&self, from: &Path, block: BlockId, generation: Generation, length: u64) -> Result<PathBuf> {
        let folder = self.finalized_folder(block)?;
        self.make_folder(&folder).map_err(|error| self.failed(folder.display(), &error))?;
        let to = folder.join(blockfile::finalized_name(block, generation, length));
        self.fs.rename(from, &to).map_err(|error| self.failed(format!("renaming to {}", to.display()), &error))?;
        Ok(to)
    }

    /// Makes the final name of a replica durable.
    pub fn sync_final(&self, block: BlockId) -> Result<()> {
        self.sync_folder(&self.finalized_folder(block)?)
    }

    /// Makes the names in a folder durable.
    pub fn sync_folder(&self, folder: &Path) -> Result<()> {
        self.fs.sync_dir(folder).map_err(|error| self.failed(format!("syncing {}", folder.display()), &error))
    }

    /// Makes a file's move to another folder durable. The folder of arrival first, so that a power cut never takes both names.
    pub fn sync_moved(&self, from: &Path, to: &Path) -> Result<()> {
        [to, from].into_iter().filter_map(Path::parent).try_for_each(|folder| self.sync_folder(folder))
    }

    /// An operation that changes the volume failed: if the disk itself is why, or the folder is gone, the volume is out of service.
    pub fn failed(&self, doing: impl std::fmt::Display, error: &io::Error) -> Error {
        let told = Error::io(doing, error);
        if durable::is_device_failure(error) || (error.kind() == io::ErrorKind::NotFound && self.is_gone()) {
            self.fail(told.message().to_owned());
        }
        told
    }

    /// A read failed. One unreadable place is the replica's trouble; several, or a folder that is gone, are the volume's.
    pub fn read_failed(&self, doing: impl std::fmt::Display, error: &io::Error) -> Error {
        let told = Error::io(doing, error);
        let failing = durable::is_device_failure(error)
            && self.read_errors.fetch_add(1, Ordering::Relaxed) >= READ_ERRORS_TOLERATED;
        if failing || (error.kind() == io::ErrorKind::NotFound && self.is_gone()) {
            self.fail(told.message().to_owned());
        }
        told
    }

    /// Whether the folder is not there any more, or is another one than it was (a disk that was unmounted leaves an empty folder).
    pub fn is_gone(&self) -> bool {
        matches!(self.fs.metadata(&self.root.join("VERSION")), Ok(None))
    }

    /// Checks that the volume still does what it is for: it is there, is ours, and takes, keeps and gives back a few bytes. Blocking. A full
    /// disk passes. What does not hold takes the volume out of service.
    pub fn check(&self) {
        if self.failure().is_some() {
            return;
        }
        if let Err(error) = self.probe()
            && (durable::is_device_failure(&error) || error.kind() == io::ErrorKind::NotFound)
        {
            self.fail(format!("{}: the check of the volume failed: {error}", self.root.display()));
        }
    }

    fn probe(&self) -> io::Result<()> {
        let version = durable::read_all(&*self.fs, &self.root.join("VERSION"), 64 << 10)?;
        if !String::from_utf8_lossy(&version).contains(&self.storage_id) {
            return Err(io::Error::other("another volume lies there"));
        }
        let path = self.root.join(PROBE);
        let file = self.fs.open(&path, OpenMode::WriteOrCreate)?;
        let written = [0xC5; 512];
        file.write_all_at(&written, 0)?;
        file.sync_data()?;
        let mut read = [0; 512];
        file.read_exact_at(&mut read, 0)?;
        self.fs.remove_file(&path)?;
        if read == written { Ok(()) } else { Err(io::Error::other("what was written reads back differently")) }
    }

    /// Makes a fan-out folder durable the first time that it is needed. That it exists says nothing: whoever made it may not have synced yet.
    fn make_folder(&self, folder: &Path) -> io::Result<()> {
        if lock(&self.folders).contains(folder) {
            return Ok(());
        }
        if self.fs.metadata(folder)?.is_none() {
            self.fs.create_dir_all(folder)?;
        }
        for above in folder.ancestors().skip(1).take(2) {
            self.fs.sync_dir(above)?;
        }
        lock(&self.folders).insert(folder.to_owned());
        Ok(())
    }

    /// Looks at the file system's room again (I/O). Does nothing while an earlier look still hangs, so that a stuck disk holds one thread.
    pub fn refresh_room(&self) {
        if self.failure().is_some() || self.looking.swap(true, Ordering::AcqRel) {
            return;
        }
        let space = self.fs.space(&self.root);
        self.looking.store(false, Ordering::Release);
        match space {
            Ok(space) => {
                let mut room = lock(&self.room);
                room.disk_capacity = space.capacity;
                room.disk_available = space.available;
                // On a small file system the usual reserve would be all of it.
                room.keep_free = room.keep_free.min(space.capacity / 20);
            }
            Err(error) => self.fail(format!("{}: {error}", self.root.display())),
        }
    }

    /// Takes the volume out of service.
    pub fn fail(&self, why: String) {
        let mut failure = lock(&self.failure);
        if failure.is_none() {
            tracing::error!("volume {} is out of service: {why}", self.root.display());
            *failure = Some(why);
            drop(failure);
            self.failures.notify_one();
        }
    }

    /// Why the volume is out of service, if it is.
    pub fn failure(&self) -> Option<String> {
        lock(&self.failure).clone()
    }

    /// Whether the volume is out of service.
    pub fn is_failed(&self) -> bool {
        lock(&self.failure).is_some()
    }

    /// Figures for the heartbeat.
    pub fn usage(&self) -> Usage {
        let room = lock(&self.room);
        Usage { capacity: room.capacity(), used: room.used, remaining: room.remaining() }
    }

    /// Promises `bytes` to a writer, or says that the volume is full.
    pub fn reserve(&self, bytes: u64) -> Result<()> {
        let mut room = lock(&self.room);
        if room.remaining() < bytes {
            let text = format!(
                "{} is full: {} bytes left of {}, {bytes} needed",
                self.root.display(),
                room.remaining(),
                room.capacity()
            );
            return Err(Error::new(ErrorCode::DiskFull, text).with_subject(self.root.display().to_string()));
        }
        room.reserved += bytes;
        Ok(())
    }

    /// Gives back what was promised and not used.
    pub fn release(&self, bytes: u64) {
        let mut room = lock(&self.room);
        room.reserved = room.reserved.saturating_sub(bytes);
    }

    /// `bytes` of what was promised were written.
    pub fn wrote(&self, bytes: u64, of_reserved: u64) {
        let mut room = lock(&self.room);
        room.used += bytes;
        room.reserved = room.reserved.saturating_sub(of_reserved);
        room.disk_available = room.disk_available.saturating_sub(bytes);
    }

    /// A file of `bytes` was found by the scan.
    pub fn found(&self, bytes: u64) {
        lock(&self.room).used += bytes;
    }

    /// `bytes` of files were removed.
    pub fn removed(&self, bytes: u64) {
        let mut room = lock(&self.room);
        room.used = room.used.saturating_sub(bytes);
        room.disk_available += bytes;
    }
}

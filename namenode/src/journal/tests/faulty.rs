//! The machine's files, with faults that a test orders.

use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};

use cairn_common::durable::{DirEntry, File, Fs, Lock, Metadata, OpenMode, Space, SystemFs};

#[derive(Default)]
struct Faults {
    /// Syncs below these fail.
    failing: Vec<PathBuf>,
    /// Every sync so far.
    syncs: Vec<PathBuf>,
    /// Syncs that were asked for, those that wait at the gate included.
    asked: usize,
}

/// See the module.
#[derive(Clone, Default)]
pub struct FaultyFs {
    faults: Arc<Mutex<Faults>>,
    /// True while syncs shall not return.
    gate: Arc<(Mutex<bool>, Condvar)>,
}

impl FaultyFs {
    pub fn fail_syncs_below(&self, path: &Path) {
        self.faults.lock().unwrap().failing.push(path.to_owned());
    }

    pub fn heal(&self) {
        self.faults.lock().unwrap().failing.clear();
    }

    pub fn syncs_below(&self, path: &Path) -> usize {
        self.faults.lock().unwrap().syncs.iter().filter(|synced| synced.starts_with(path)).count()
    }

    /// Syncs that were asked for so far.
    pub fn waiting(&self) -> usize {
        self.faults.lock().unwrap().asked
    }

    /// No sync returns before the gate is dropped.
    pub fn block_syncs(&self) -> Gate {
        *self.gate.0.lock().unwrap() = true;
        Gate(self.clone())
    }

    fn sync(&self, path: &Path) -> io::Result<()> {
        self.faults.lock().unwrap().asked += 1;
        drop(self.gate.1.wait_while(self.gate.0.lock().unwrap(), |closed| *closed).unwrap());
        let mut faults = self.faults.lock().unwrap();
        faults.syncs.push(path.to_owned());
        if faults.failing.iter().any(|failing| path.starts_with(failing)) {
            return Err(io::Error::other("the disk is gone (ordered by the test)"));
        }
        Ok(())
    }
}

/// See [`FaultyFs::block_syncs`].
pub struct Gate(FaultyFs);

impl Drop for Gate {
    fn drop(&mut self) {
        *self.0.gate.0.lock().unwrap() = false;
        self.0.gate.1.notify_all();
    }
}

struct FaultyFile {
    inner: Arc<dyn File>,
    fs: FaultyFs,
    path: PathBuf,
}

impl File for FaultyFile {
    fn read_at(&self, out: &mut [u8], offset: u64) -> io::Result<usize> {
        self.inner.read_at(out, offset)
    }
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.inner.write_all_at(bytes, offset)
    }
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }
    fn set_len(&self, length: u64) -> io::Result<()> {
        self.inner.set_len(length)
    }
    fn sync_data(&self) -> io::Result<()> {
        self.fs.sync(&self.path)?;
        self.inner.sync_data()
    }
    fn start_write_back(&self, offset: u64, length: u64) {
        self.inner.start_write_back(offset, length);
    }
    fn preallocate(&self, length: u64) {
        self.inner.preallocate(length);
    }
    fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        self.inner.as_fd()
    }
}

impl Fs for FaultyFs {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn File>> {
        let inner = SystemFs.open(path, mode)?;
        Ok(Arc::new(FaultyFile { inner, fs: self.clone(), path: path.to_owned() }))
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        SystemFs.rename(from, to)
    }
    fn remove_file(&self, path: &Path) -> io::Result<()> {
        SystemFs.remove_file(path)
    }
    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        SystemFs.create_dir_all(path)
    }
    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        SystemFs.remove_dir_all(path)
    }
    fn read_dir(&self, path: &Path) -> io::Result<Vec<DirEntry>> {
        SystemFs.read_dir(path)
    }
    fn metadata(&self, path: &Path) -> io::Result<Option<Metadata>> {
        SystemFs.metadata(path)
    }
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.sync(path)?;
        SystemFs.sync_dir(path)
    }
    fn sync_volume(&self, path: &Path) -> io::Result<()> {
        self.sync(path)?;
        SystemFs.sync_volume(path)
    }
    fn space(&self, path: &Path) -> io::Result<Space> {
        SystemFs.space(path)
    }
    fn lock(&self, path: &Path) -> io::Result<Option<Box<dyn Lock>>> {
        SystemFs.lock(path)
    }
    fn restrict(&self, path: &Path) -> io::Result<()> {
        SystemFs.restrict(path)
    }
}

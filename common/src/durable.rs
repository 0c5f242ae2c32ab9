//! Files, and what it takes to make them durable.
//!
//! All is synchronous: async code calls it inside [`crate::work::Work::io`], threads that own a file call it directly.
//!
//! # Crash
//! A file's bytes survive a crash once [`File::sync_data`] returned; its name, once [`Fs::sync_dir`] of its folder returned. [`write_atomic`]
//! does all of it: temporary file, sync, rename, sync of the folder. [`Fs::sync_volume`] does it for all that there is. [`File::start_write_back`] promises nothing: it only starts what a later
//! sync would have to wait for. A sync that failed is never tried again on the same file: the kernel may have dropped the pages.

use std::fs;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;

/// How to open a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OpenMode {
    /// Read only; must exist.
    Read,
    /// Read and write; must exist.
    Write,
    /// Read and write; must not exist.
    Create,
    /// Read and write; made if absent, kept as it is if present.
    WriteOrCreate,
}

/// An entry of a folder.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DirEntry {
    /// Its name; bytes that are not UTF-8 are replaced.
    pub name: String,
    /// A folder?
    pub is_dir: bool,
    /// Bytes of a file.
    pub len: u64,
}

/// What is known of a path.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Metadata {
    /// A folder?
    pub is_dir: bool,
    /// Bytes of a file.
    pub len: u64,
}

/// Room on a volume, bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Space {
    /// In all.
    pub capacity: u64,
    /// Free for us.
    pub available: u64,
}

/// An open file; positioned access only, so it can be shared.
pub trait File: Send + Sync {
    /// Reads up to `out.len()` bytes at `offset`; 0 at the end.
    fn read_at(&self, out: &mut [u8], offset: u64) -> io::Result<usize>;
    /// Writes all of `bytes` at `offset`.
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// Writes all of `parts` from `offset` on, one behind the other. Fewer and larger writes are cheaper; nothing else is promised.
    fn write_parts_at(&self, parts: &mut [IoSlice<'_>], mut offset: u64) -> io::Result<()> {
        for part in parts {
            self.write_all_at(part, offset)?;
            offset += part.len() as u64;
        }
        Ok(())
    }

    /// Length, bytes.
    fn len(&self) -> io::Result<u64>;
    /// Cuts or extends with zeros.
    fn set_len(&self, length: u64) -> io::Result<()>;
    /// Makes the bytes (and the length) durable.
    fn sync_data(&self) -> io::Result<()>;
    /// Starts writing a range to the disk without waiting.
    fn start_write_back(&self, offset: u64, length: u64);
    /// Reserves room so that later writes change no metadata; best effort.
    fn preallocate(&self, length: u64);
    /// The descriptor, if there is a real one (for `sendfile`).
    fn as_fd(&self) -> Option<BorrowedFd<'_>>;

    /// Fills `out` from `offset` or fails with `UnexpectedEof`.
    fn read_exact_at(&self, mut out: &mut [u8], mut offset: u64) -> io::Result<()> {
        while !out.is_empty() {
            match self.read_at(out, offset)? {
                0 => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file ends early")),
                n => {
                    out = &mut out[n..];
                    offset += n as u64;
                }
            }
        }
        Ok(())
    }

    /// Nothing in it?
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
}

/// Held as long as it lives.
pub trait Lock: Send + Sync {}

/// Most parts that Linux takes in one call, for a file or a connection.
pub(crate) const MOST_PARTS: usize = 1024;

/// A tree of files.
pub trait Fs: Send + Sync + 'static {
    /// Opens a file.
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn File>>;
    /// Renames; replaces a file at `to`. Durable after [`Fs::sync_dir`] of both folders.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Removes a file.
    fn remove_file(&self, path: &Path) -> io::Result<()>;
    /// Makes a folder and its parents.
    fn create_dir_all(&self, path: &Path) -> io::Result<()>;
    /// Removes a tree.
    fn remove_dir_all(&self, path: &Path) -> io::Result<()>;
    /// Lists a folder, sorted by name.
    fn read_dir(&self, path: &Path) -> io::Result<Vec<DirEntry>>;
    /// `None`: there is nothing at `path`.
    fn metadata(&self, path: &Path) -> io::Result<Option<Metadata>>;
    /// Makes the names in a folder durable.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
    /// Makes all durable, names and bytes, that was written so far to the volume that holds `path`, by whomever.
    fn sync_volume(&self, path: &Path) -> io::Result<()>;
    /// Room on the volume that holds `path`.
    fn space(&self, path: &Path) -> io::Result<Space>;
    /// Takes an exclusive lock on a file, made if absent; `None`: another process holds it.
    fn lock(&self, path: &Path) -> io::Result<Option<Box<dyn Lock>>>;
    /// Makes a folder readable by its owner only.
    fn restrict(&self, path: &Path) -> io::Result<()>;
}

/// The machine's file system.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemFs;

struct SystemFile(fs::File);

impl File for SystemFile {
    fn read_at(&self, out: &mut [u8], offset: u64) -> io::Result<usize> {
        loop {
            match self.0.read_at(out, offset) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }

    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_all_at(bytes, offset)
    }

    fn write_parts_at(&self, mut parts: &mut [IoSlice<'_>], mut offset: u64) -> io::Result<()> {
        IoSlice::advance_slices(&mut parts, 0);
        while !parts.is_empty() {
            let most = parts.len().min(MOST_PARTS);
            match rustix::io::pwritev(&self.0, &parts[..most], offset) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    IoSlice::advance_slices(&mut parts, written);
                    offset += written as u64;
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.0.set_len(length)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn start_write_back(&self, offset: u64, length: u64) {
        use std::os::fd::AsRawFd;
        // SAFETY: the descriptor is open; the call changes no memory. Its result is only a hint lost.
        unsafe {
            libc::sync_file_range(
                self.0.as_raw_fd(),
                offset as libc::off64_t,
                length as libc::off64_t,
                libc::SYNC_FILE_RANGE_WRITE,
            );
        }
    }

    fn preallocate(&self, length: u64) {
        // Some file systems cannot; then writes extend the file as they always do.
        let _ = rustix::fs::fallocate(&self.0, rustix::fs::FallocateFlags::KEEP_SIZE, 0, length);
    }

    fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.0.as_fd())
    }
}

struct SystemLock {
    _file: fs::File,
}

impl Lock for SystemLock {}

impl Fs for SystemFs {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn File>> {
        let mut options = fs::OpenOptions::new();
        options.read(true);
        match mode {
            OpenMode::Read => {}
            OpenMode::Write => {
                options.write(true);
            }
            OpenMode::Create => {
                options.write(true).create_new(true);
            }
            OpenMode::WriteOrCreate => {
                options.write(true).create(true).truncate(false);
            }
        }
        Ok(Arc::new(SystemFile(options.open(path)?)))
    }

    #[allow(clippy::disallowed_methods)] // the room where names are changed
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    #[allow(clippy::disallowed_methods)]
    fn remove_file(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        fs::create_dir_all(path)
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir_all(path)
    }

    fn read_dir(&self, path: &Path) -> io::Result<Vec<DirEntry>> {
        let mut entries = Vec::new();
        for entry in fs::read_dir(path)? {
            let entry = entry?;
            let metadata = match entry.metadata() {
                Ok(metadata) => metadata,
                // Removed between the listing and the look: as if it had not been listed.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            let name = entry.file_name().to_string_lossy().into_owned();
            entries.push(DirEntry { name, is_dir: metadata.is_dir(), len: metadata.len() });
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    fn metadata(&self, path: &Path) -> io::Result<Option<Metadata>> {
        match fs::metadata(path) {
            Ok(metadata) => Ok(Some(Metadata { is_dir: metadata.is_dir(), len: metadata.len() })),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        fs::File::open(path)?.sync_all()
    }

    fn sync_volume(&self, path: &Path) -> io::Result<()> {
        Ok(rustix::fs::syncfs(fs::File::open(path)?)?)
    }

    fn space(&self, path: &Path) -> io::Result<Space> {
        let stat = rustix::fs::statvfs(path)?;
        Ok(Space { capacity: stat.f_blocks * stat.f_frsize, available: stat.f_bavail * stat.f_frsize })
    }

    fn lock(&self, path: &Path) -> io::Result<Option<Box<dyn Lock>>> {
        let file = fs::OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Box::new(SystemLock { _file: file }))),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn restrict(&self, path: &Path) -> io::Result<()> {
        fs::set_permissions(path, fs::Permissions::from_mode(0o700))
    }
}

/// Replaces the file at `path` as a whole: after a crash it is the old one or the new one.
pub fn write_atomic(fs: &dyn Fs, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let mut aside = path.as_os_str().to_owned();
    aside.push(".tmp");
    let aside = Path::new(&aside);
    // One left by a crash was never renamed, so nobody needs it.
    if fs.metadata(aside)?.is_some() {
        fs.remove_file(aside)?;
    }
    let file = fs.open(aside, OpenMode::Create)?;
    file.write_all_at(bytes, 0)?;
    file.sync_data()?;
    fs.rename(aside, path)?;
    fs.sync_dir(folder)
}

/// Makes a folder and its parents, and makes their names durable: what is synced in a folder whose own name is lost is lost. That a
/// folder exists says nothing: whoever made it may have died before the sync.
pub fn make_dir(fs: &dyn Fs, path: &Path) -> io::Result<()> {
    let mut made = Vec::new();
    for ancestor in path.ancestors().filter(|ancestor| !ancestor.as_os_str().is_empty()) {
        if fs.metadata(ancestor)?.is_none() {
            made.push(ancestor);
        }
    }
    fs.create_dir_all(path)?;
    for folder in path.ancestors().filter(|folder| !folder.as_os_str().is_empty()) {
        let Some(above) = folder.parent() else { continue };
        let above = if above.as_os_str().is_empty() { Path::new(".") } else { above };
        match fs.sync_dir(above) {
            Err(error) if made.contains(&folder) => return Err(error),
            // One that was there before us may not be ours to open.
            Ok(()) | Err(_) => {}
        }
    }
    Ok(())
}

/// Whether an error means that the device (or its file system) does not do its work any more: it cannot read or write, is read-only, or takes
/// no files of ours. Not: a full disk, a name that is absent or taken, a short file, or a process out of descriptors or memory.
pub fn is_device_failure(error: &io::Error) -> bool {
    use io::ErrorKind as Kind;
    // ENOMEM, ENFILE, EMFILE: the process's trouble, which no other disk would spare it.
    if matches!(error.raw_os_error(), Some(12 | 23 | 24)) {
        return false;
    }
    !matches!(
        error.kind(),
        Kind::StorageFull
            | Kind::QuotaExceeded
            | Kind::FileTooLarge
            | Kind::NotFound
            | Kind::AlreadyExists
            | Kind::DirectoryNotEmpty
            | Kind::IsADirectory
            | Kind::InvalidInput
            | Kind::InvalidFilename
            | Kind::OutOfMemory
            | Kind::Interrupted
            | Kind::WouldBlock
            | Kind::UnexpectedEof
    )
}

/// The whole of a file; refuses one longer than `limit` bytes.
pub fn read_all(fs: &dyn Fs, path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let file = fs.open(path, OpenMode::Read)?;
    let length = file.len()?;
    if length > limit {
        let text = format!("{} has {length} bytes, more than {limit}", path.display());
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    let mut bytes = vec![0; length as usize];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn atomic_write_replaces_and_clears_leftovers() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("VERSION");
        write_atomic(&SystemFs, &path, b"one").unwrap();
        // A crash between write and rename leaves this behind.
        write_atomic(&SystemFs, &dir.path().join("VERSION.tmp"), b"half").unwrap();
        write_atomic(&SystemFs, &path, b"two").unwrap();
        assert_eq!(read_all(&SystemFs, &path, 100).unwrap(), b"two");
        assert_eq!(SystemFs.read_dir(dir.path()).unwrap().len(), 1);
        assert!(read_all(&SystemFs, &path, 2).is_err());
    }

    #[test]
    fn parts_lie_one_behind_the_other_however_many() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("parts");
        let file = SystemFs.open(&path, OpenMode::Create).unwrap();
        let parts: Vec<Vec<u8>> = (0..2 * MOST_PARTS + 10).map(|at| vec![at as u8; at % 5]).collect();
        file.write_all_at(b"head", 0).unwrap();
        file.write_parts_at(&mut parts.iter().map(|part| IoSlice::new(part)).collect::<Vec<_>>(), 4).unwrap();
        assert_eq!(read_all(&SystemFs, &path, 1 << 20).unwrap(), [&b"head"[..], &parts.concat()].concat());
        file.write_parts_at(&mut [], 0).unwrap();
        let reader = SystemFs.open(&path, OpenMode::Read).unwrap();
        assert!(reader.write_parts_at(&mut [IoSlice::new(b"x")], 0).is_err());
    }

    #[test]
    fn a_full_disk_or_an_absent_name_is_no_failure_of_the_device() {
        for (errno, fails) in [(5, true), (30, true), (13, true), (28, false), (2, false), (24, false), (17, false)] {
            assert_eq!(is_device_failure(&io::Error::from_raw_os_error(errno)), fails, "errno {errno}");
        }
    }

    #[test]
    fn a_lock_is_exclusive_until_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("in_use.lock");
        let held = SystemFs.lock(&path).unwrap();
        assert!(held.is_some());
        assert!(SystemFs.lock(&path).unwrap().is_none());
        drop(held);
        assert!(SystemFs.lock(&path).unwrap().is_some());
    }
}

//! What a job brings along: its program's executable and its cache files, stored in the cluster under their content hash.
//!
//! # Consistency
//! A file appears in [`PROGRAMS`] complete, by a rename, and is never changed: its name is the SHA-256 of its content, and whoever uses it checks that.
//!
//! # When it goes
//! Files stay when their jobs are over, so that the next run need not store them again. Their time of change is when they were last taken for a job, to
//! a day; a week later their owner's next look at jobs removes them ([`sweep`]), unless a job of the owner's that is not over has them. Who finds
//! a file of somebody else that has not been taken for half of that time stores one of his own beside it: so it cannot go
//! away under a job that was submitted less than three days ago.

use std::collections::BTreeSet;
use std::io::Read;
use std::path::Path;

use bytes::Bytes;
use cairn_proto::path::{PROGRAMS, join};
use cairn_proto::{Error, ErrorCode, Result, pb};
use sha2::{Digest, Sha256};

use crate::fs::{CreateOptions, FileSystem, RenameMode};

const PIECE_BYTES: usize = 1 << 20;
/// A file that no job has been submitted with for so long is removed.
const KEEP_MS: u64 = 7 * 24 * 3_600_000;
/// The time of the last use is written down once in so long.
const USED_AGAIN_MS: u64 = 24 * 3_600_000;
/// What `GLIBC_2.36` starts with in the symbol versions of an executable.
const GLIBC_MARK: &[u8] = b"GLIBC_2.";

/// A file that lies in [`PROGRAMS`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Shipped {
    /// Where.
    pub path: String,
    /// SHA-256 of its content, hexadecimal.
    pub sha256: String,
    /// Its length.
    pub length: u64,
}

/// A program that a job's tasks run in place of the `cairn` of their node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Executable {
    /// The file.
    pub file: Shipped,
    /// Machine that it was built for ([`target`]).
    pub target: String,
    /// Minor version of the oldest glibc 2 that it runs with; 0: any.
    pub glibc: u32,
}

/// A file that tasks find on their local disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CacheFile {
    /// Its name there.
    pub name: String,
    /// The file in the cluster.
    pub path: String,
    /// SHA-256 that its content must have, hexadecimal; empty: whatever it has.
    pub sha256: String,
    /// May it be executed?
    pub executable: bool,
}

impl CacheFile {
    /// A file of the cluster, under a name of letters, digits, '.', '-' and '_'.
    pub fn new(name: &str, path: &str) -> Self {
        Self { name: name.to_owned(), path: path.to_owned(), sha256: String::new(), executable: false }
    }

    /// Stores a local file in the cluster, and takes that.
    pub async fn of_local(fs: &FileSystem, name: &str, local: &Path) -> Result<Self> {
        let file = store(fs, local).await?;
        let executable = is_executable(local);
        Ok(Self { name: name.to_owned(), path: file.path, sha256: file.sha256, executable })
    }

    pub(super) fn check(&self) -> Result<()> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        if (1..=128).contains(&self.name.len()) && self.name.bytes().all(plain) && !self.name.starts_with('.') {
            return Ok(());
        }
        let text =
            format!("a cache file cannot be named {:?}: use 1 to 128 letters, digits, '.', '-' and '_'", self.name);
        Err(Error::new(ErrorCode::InvalidArgument, text).with_subject(self.name.clone()))
    }

    pub(super) fn to_wire(&self) -> pb::CacheFile {
        pb::CacheFile {
            name: self.name.clone(),
            path: self.path.clone(),
            sha256: self.sha256.clone(),
            executable: self.executable,
        }
    }
}

impl Executable {
    /// Stores this process's own executable.
    pub async fn own(fs: &FileSystem) -> Result<Self> {
        let path =
            std::env::current_exe().map_err(|error| Error::io("cannot find this program's executable", &error))?;
        // The link leads to the very file that runs, also if its name has another one by now.
        let running = Path::new("/proc/self/exe");
        let path = if running.exists() { running } else { &path };
        let file = store(fs, path).await?;
        let scanned = path.to_owned();
        let glibc = fs.env().work.cpu(move || glibc_needed(&scanned)).await?;
        Ok(Self { file, target: target(), glibc })
    }

    pub(super) fn to_wire(&self) -> pb::Executable {
        pb::Executable {
            path: self.file.path.clone(),
            sha256: self.file.sha256.clone(),
            length: self.file.length,
            target: self.target.clone(),
            glibc: self.glibc,
        }
    }
}

/// What this program was built for: architecture, system, C library.
pub fn target() -> String {
    let library = if cfg!(target_env = "gnu") {
        "gnu"
    } else if cfg!(target_env = "musl") {
        "musl"
    } else {
        "other"
    };
    format!("{}-{}-{library}", std::env::consts::ARCH, std::env::consts::OS)
}

/// Stores a local file under its content hash, if it is not there yet.
pub async fn store(fs: &FileSystem, local: &Path) -> Result<Shipped> {
    let hashed = local.to_owned();
    let (sha256, length) = fs.env().work.cpu(move || hash_file(&hashed)).await?;
    let mut shipped = Shipped { path: join(PROGRAMS, &sha256), sha256, length };
    if is_there(fs, &shipped).await? {
        return Ok(shipped);
    }
    if fs.find(&shipped.path).await?.is_some_and(|there| there.owner != fs.user()) {
        shipped.path = format!("{}-{}", shipped.path, fs.user());
        if is_there(fs, &shipped).await? {
            return Ok(shipped);
        }
    }
    fs.mkdirs(PROGRAMS, 0o1777).await?;
    let aside = format!("{}.{:016x}", shipped.path, fs.env().entropy.next_u64());
    let stored = upload(fs, local, &aside, length).await;
    let named = match stored {
        Ok(()) => fs.rename(&aside, &shipped.path, RenameMode::NoReplace).await,
        Err(error) => Err(error),
    };
    match named {
        Ok(()) => Ok(shipped),
        Err(error) => {
            // What cannot be removed costs space only.
            let _ = fs.delete(&aside, false).await;
            // Another driver was faster.
            if error.code() == ErrorCode::FileAlreadyExists { Ok(shipped) } else { Err(error) }
        }
    }
}

/// Can a job be given the file? Then its time of use is now.
async fn is_there(fs: &FileSystem, shipped: &Shipped) -> Result<bool> {
    let Some(there) = fs.find(&shipped.path).await? else { return Ok(false) };
    if there.open || there.length != shipped.length {
        return Ok(false);
    }
    let now_ms = fs.env().clock.wall_ms();
    let unused_ms = now_ms.saturating_sub(there.modified_ms);
    if there.owner != fs.user() {
        return Ok(unused_ms < KEEP_MS / 2);
    }
    if unused_ms >= USED_AGAIN_MS {
        match fs.set_times(&shipped.path, Some(now_ms), None).await {
            // It was removed at this moment.
            Err(error) if error.code() == ErrorCode::FileNotFound => return Ok(false),
            set => set?,
        }
    }
    Ok(true)
}

/// Removes this user's files that have not been used for long; `in_use` tells which paths jobs that are not over have, and is asked only if there are
/// such files.
pub(super) async fn sweep(fs: &FileSystem, in_use: impl AsyncFnOnce() -> Result<BTreeSet<String>>) -> Result<()> {
    let now_ms = fs.env().clock.wall_ms();
    let mut old = match fs.list_all(PROGRAMS).await {
        Err(error) if error.code() == ErrorCode::FileNotFound => return Ok(()),
        listed => listed?,
    };
    old.retain(|file| file.owner == fs.user() && file.modified_ms.saturating_add(KEEP_MS) < now_ms);
    if old.is_empty() {
        return Ok(());
    }
    let in_use = in_use().await?;
    for file in old.iter().filter(|file| !in_use.contains(&file.path)) {
        fs.delete(&file.path, false).await?;
    }
    Ok(())
}

async fn upload(fs: &FileSystem, local: &Path, to: &str, length: u64) -> Result<()> {
    let options = CreateOptions { permission: 0o755, ..CreateOptions::default() };
    let mut writer = fs.create(to, options).await?;
    let mut file = open(local)?;
    let mut left = length;
    while left > 0 {
        let (back, piece) = {
            let take = left.min(PIECE_BYTES as u64) as usize;
            let read = fs.env().work.io(move || {
                let mut piece = vec![0; take];
                file.read_exact(&mut piece).map(|()| (file, piece))
            });
            read.await.map_err(|error| Error::io(format!("cannot read {}", local.display()), &error))?
        };
        file = back;
        left -= piece.len() as u64;
        writer.write_bytes(Bytes::from(piece)).await?;
    }
    writer.close().await.map(drop)
}

fn open(path: &Path) -> Result<std::fs::File> {
    std::fs::File::open(path).map_err(|error| Error::io(format!("cannot open {}", path.display()), &error))
}

fn is_executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::metadata(path).is_ok_and(|metadata| metadata.permissions().mode() & 0o111 != 0)
}

/// SHA-256 of a file in hexadecimal, and its length.
fn hash_file(path: &Path) -> Result<(String, u64)> {
    let file = open(path)?;
    let is_file = file.metadata().is_ok_and(|metadata| metadata.is_file());
    if !is_file {
        let text = format!("{} is not a file", path.display());
        return Err(Error::new(ErrorCode::InvalidArgument, text).with_subject(path.display().to_string()));
    }
    hash(file).map_err(|error| Error::io(format!("cannot read {}", path.display()), &error))
}

/// SHA-256 of what `file` holds from where it stands, in hexadecimal, and how many bytes that were.
pub(super) fn hash(mut file: impl Read) -> std::io::Result<(String, u64)> {
    let (mut hasher, mut length, mut piece) = (Sha256::new(), 0, vec![0; PIECE_BYTES]);
    loop {
        let count = file.read(&mut piece)?;
        if count == 0 {
            return Ok((hex(&hasher.finalize()), length));
        }
        hasher.update(&piece[..count]);
        length += count as u64;
    }
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Minor version of the newest glibc 2 that symbols of the file ask for; 0 if none does. It looks for the names of versions in all of the file: one that
/// stands there by chance makes the answer too strict, never too lax.
fn glibc_needed(path: &Path) -> Result<u32> {
    let mut file = open(path)?;
    let mut newest = 0;
    let (mut piece, mut kept) = (vec![0; PIECE_BYTES], 0);
    loop {
        let read = file.read(&mut piece[kept..]);
        let count = read.map_err(|error| Error::io(format!("cannot read {}", path.display()), &error))?;
        let end = kept + count;
        newest = newest.max(newest_glibc(&piece[..end]));
        if count == 0 {
            return Ok(newest);
        }
        // A name may lie across two pieces.
        kept = end.min(GLIBC_MARK.len() + 4);
        piece.copy_within(end - kept..end, 0);
    }
}

fn newest_glibc(bytes: &[u8]) -> u32 {
    let version = |at: usize| {
        let digits = &bytes[at + GLIBC_MARK.len()..];
        let length = digits.iter().take(3).take_while(|byte| byte.is_ascii_digit()).count();
        std::str::from_utf8(&digits[..length]).ok()?.parse::<u32>().ok()
    };
    memchr::memmem::find_iter(bytes, GLIBC_MARK).filter_map(version).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_glibc_is_found() {
        assert_eq!(newest_glibc(b"GLIBC_2.2.5\0GLIBC_2.34\0GLIBC_2.\0GLIBC_2.17"), 34);
        assert_eq!(newest_glibc(b"GLIBC_PRIVATE"), 0);
        assert_eq!(newest_glibc(b"GLIBC_2."), 0);
        let own = glibc_needed(&std::env::current_exe().unwrap()).unwrap();
        assert!(!cfg!(all(target_os = "linux", target_env = "gnu")) || (3..100).contains(&own), "{own}");
    }

    #[test]
    fn names_of_cache_files_are_checked() {
        for name in ["", ".", "..", ".hidden", "a/b", "a b", &"x".repeat(129)] {
            assert!(CacheFile::new(name, "/f").check().is_err(), "{name:?}");
        }
        CacheFile::new("stop-words_v1.txt", "/f").check().unwrap();
    }

    #[test]
    fn a_file_hashes_to_its_sha256() {
        let (sha256, length) = hash(&b"abc"[..]).unwrap();
        assert_eq!((&*sha256, length), ("ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad", 3));
        assert!(hash_file(Path::new("/")).unwrap_err().message().contains("not a file"));
    }
}

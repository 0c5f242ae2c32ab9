//! Files of the cluster on the node's disk: programs under their hash, for all jobs of the node, and a job's cache files in its folder.
//!
//! # Consistency
//! An entry appears by a rename when it is whole. Whoever uses one hashes what it has open: what does not match is removed and fetched anew, so neither a
//! damaged disk nor a name that now leads elsewhere makes a node run something else.
//!
//! # Crash
//! Files under temporary names stay until the datanode starts again: its start empties the folder that all this lies in.

use std::fs::File;
use std::io::Seek as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cairn_common::Env;
use cairn_common::durable::OpenMode;
use cairn_proto::{Error, ErrorCode, Result};
use rustix::fs::{Mode, Timespec, Timestamps, UTIME_NOW};

use crate::fs::FileSystem;
use crate::job::ship;

/// Bytes of programs that a node keeps; the ones longest unused go first.
const MAX_BYTES: u64 = 2 << 30;

/// A folder of files that are named by their hash.
pub struct NodeCache {
    env: Env,
    dir: PathBuf,
    max_bytes: u64,
}

impl NodeCache {
    /// The cache in `dir`, which is made when it is needed.
    pub fn new(env: Env, dir: PathBuf) -> Self {
        Self { env, dir, max_bytes: MAX_BYTES }
    }

    /// The open file with that content, and its path: from the cache, or fetched from `path` of the cluster.
    pub async fn get(&self, fs: &FileSystem, path: &str, sha256: &str) -> Result<(File, PathBuf)> {
        if sha256.len() != 64 || !sha256.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(Error::new(ErrorCode::InvalidArgument, format!("{sha256:?} is not a SHA-256")));
        }
        let entry = self.dir.join(sha256);
        if let Some(file) = self.checked(&entry, sha256).await {
            return Ok((file, entry));
        }
        let (disk, dir) = (Arc::clone(&self.env.fs), self.dir.clone());
        let made = self.env.work.io(move || disk.create_dir_all(&dir)).await;
        made.map_err(|error| Error::io(format!("cannot make {}", self.dir.display()), &error))?;
        fetch(&self.env, fs, path, &entry, 0o755).await?;
        match self.checked(&entry, sha256).await {
            Some(file) => {
                self.prune(sha256).await;
                Ok((file, entry))
            }
            None => {
                let text = format!(
                    "{path} does not have the content that its name says (SHA-256 {sha256}): remove it and run the job again"
                );
                Err(Error::new(ErrorCode::Corrupt, text).with_subject(path))
            }
        }
    }

    /// The open entry if its content is right; a wrong one is removed.
    async fn checked(&self, entry: &Path, sha256: &str) -> Option<File> {
        let (disk, entry, want) = (Arc::clone(&self.env.fs), entry.to_owned(), sha256.to_owned());
        let check = move || {
            let mut file = File::open(&entry).ok()?;
            let right = ship::hash(&file).is_ok_and(|(sha256, _)| sha256 == want) && file.rewind().is_ok();
            if !right {
                tracing::warn!(path = %entry.display(), "a cached file is damaged: it is fetched anew");
                // Another worker may have been faster.
                let _ = disk.remove_file(&entry);
                return None;
            }
            // When it was last used; if that cannot be kept, it may go early.
            let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
            let _ = rustix::fs::futimens(&file, &Timestamps { last_access: now, last_modification: now });
            Some(file)
        };
        self.env.work.cpu(check).await
    }

    /// Removes what was not used for longest, until the rest is small enough.
    async fn prune(&self, keep: &str) {
        let (disk, dir, keep, max_bytes) =
            (Arc::clone(&self.env.fs), self.dir.clone(), keep.to_owned(), self.max_bytes);
        let prune = move || {
            let mut entries: Vec<_> = std::fs::read_dir(&dir)?
                .filter_map(|entry| {
                    let (entry, metadata) =
                        entry.and_then(|entry| entry.metadata().map(|about| (entry, about))).ok()?;
                    Some((metadata.modified().ok()?, metadata.len(), entry.path()))
                })
                .collect();
            entries.sort();
            let mut bytes: u64 = entries.iter().map(|(_, length, _)| length).sum();
            for (_, length, path) in entries {
                if bytes <= max_bytes {
                    break;
                }
                if !path.ends_with(&keep) && disk.remove_file(&path).is_ok() {
                    bytes -= length;
                }
            }
            Ok::<(), std::io::Error>(())
        };
        if let Err(error) = self.env.work.io(prune).await {
            tracing::warn!(dir = %self.dir.display(), %error, "the cache of programs could not be pruned");
        }
    }
}

/// Copies a file of the cluster to the local `target`, which appears complete.
pub async fn fetch(env: &Env, fs: &FileSystem, path: &str, target: &Path, mode: u32) -> Result<()> {
    let aside = target.with_extension(format!("{:016x}.tmp", env.entropy.next_u64()));
    let fetched = copy(env, fs, path, &aside, mode).await;
    let failed = |error: std::io::Error| Error::io(format!("cannot write {}", target.display()), &error);
    let (disk, from, to) = (Arc::clone(&env.fs), aside.clone(), target.to_owned());
    let named = match fetched {
        Ok(()) => env.work.io(move || disk.rename(&from, &to)).await.map_err(failed),
        Err(error) => Err(error),
    };
    if named.is_err() {
        let disk = Arc::clone(&env.fs);
        // It may never have been made.
        let _ = env.work.io(move || disk.remove_file(&aside)).await;
    }
    named
}

async fn copy(env: &Env, fs: &FileSystem, path: &str, to: &Path, mode: u32) -> Result<()> {
    let failed = |error: std::io::Error| Error::io(format!("cannot write {}", to.display()), &error);
    let mut reader = fs.open(path).await?;
    let (disk, target) = (Arc::clone(&env.fs), to.to_owned());
    let file = env.work.io(move || disk.open(&target, OpenMode::Create)).await.map_err(failed)?;
    let mut at = 0;
    while let Some(piece) = reader.next_chunk().await? {
        let (file, length) = (Arc::clone(&file), piece.len() as u64);
        env.work.io(move || file.write_all_at(&piece, at)).await.map_err(failed)?;
        at += length;
    }
    // Closed before it gets its name: a file that is open for writing cannot be executed.
    drop(file);
    rustix::fs::chmod(to, Mode::from_raw_mode(mode)).map_err(|error| failed(error.into()))
}

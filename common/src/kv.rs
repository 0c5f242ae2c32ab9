//! A small ordered key-value store for what is private to a node or can be rebuilt: never for the only copy of anything.
//!
//! Two implementations under the same conformance tests: [`SledKv`] on disk, [`MemoryKv`] for simulation.
//!
//! # Crash
//! A write is durable only after [`KeyValue::flush`]; what is lost in a crash is learnt again (a block is verified once more).
//! A damaged folder is moved aside, named, and a new one begun.

use std::collections::BTreeMap;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::clock::Clock;
use crate::durable::Fs;

/// sled's cache, bytes: enough for an index, small beside a daemon.
const SLED_CACHE_BYTES: u64 = 16 << 20;

/// An ordered map of byte strings. Blocking: call it off the async threads.
pub trait KeyValue: Send + Sync {
    /// The value of `key`.
    fn get(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>>;
    /// Sets `key`.
    fn put(&self, key: &[u8], value: &[u8]) -> io::Result<()>;
    /// Removes `key`, if it is there.
    fn remove(&self, key: &[u8]) -> io::Result<()>;
    /// At most `limit` pairs whose key starts with `prefix` and is greater than `after` (if given), in order.
    fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> io::Result<Vec<Pair>>;
    /// Makes all writes so far durable.
    fn flush(&self) -> io::Result<()>;
}

/// Key and value.
pub type Pair = (Vec<u8>, Vec<u8>);

/// In memory.
#[derive(Default)]
pub struct MemoryKv {
    map: Mutex<BTreeMap<Vec<u8>, Vec<u8>>>,
}

impl MemoryKv {
    fn map(&self) -> MutexGuard<'_, BTreeMap<Vec<u8>, Vec<u8>>> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl KeyValue for MemoryKv {
    fn get(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        Ok(self.map().get(key).cloned())
    }

    fn put(&self, key: &[u8], value: &[u8]) -> io::Result<()> {
        self.map().insert(key.to_vec(), value.to_vec());
        Ok(())
    }

    fn remove(&self, key: &[u8]) -> io::Result<()> {
        self.map().remove(key);
        Ok(())
    }

    fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> io::Result<Vec<Pair>> {
        let map = self.map();
        let from = after.filter(|after| *after > prefix).unwrap_or(prefix);
        let rest = map.range(from.to_vec()..).filter(|(key, _)| after.is_none_or(|after| key.as_slice() > after));
        let pairs = rest.take_while(|(key, _)| key.starts_with(prefix)).take(limit);
        Ok(pairs.map(|(key, value)| (key.clone(), value.clone())).collect())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Name of the mark that a store was made, and of the tree that holds it.
const MARK: &str = "cairn-store";

/// On disk, in a folder of its own.
pub struct SledKv {
    db: sled::Db,
    path: PathBuf,
}

impl SledKv {
    /// Opens or makes the store at `path`. If what is there cannot be read it is moved to a name beside it, which is returned, and an
    /// empty store takes its place. [`io::ErrorKind::ResourceBusy`]: somebody has it open.
    pub fn open(fs: &dyn Fs, clock: &Clock, path: &Path) -> io::Result<(Self, Option<PathBuf>)> {
        let log = path.join("db");
        let existed = fs.metadata(&log)?.is_some();
        let opened = match Self::try_open(path, existed) {
            // sled's error for one that is in use is like the one for damage, its lock is of the same kind, and whoever had it may have let go
            // meanwhile.
            Err(_) if existed => match fs.lock(&log) {
                Ok(None) => {
                    return Err(io::Error::new(io::ErrorKind::ResourceBusy, format!("{} is in use", path.display())));
                }
                free => {
                    drop(free);
                    Self::try_open(path, existed)
                }
            },
            opened => opened,
        };
        match opened {
            Ok(store) => Ok((store, None)),
            Err(error) => {
                let mut aside = path.as_os_str().to_owned();
                aside.push(format!(".damaged-{}", clock.wall_ms()));
                let aside = PathBuf::from(aside);
                fs.rename(path, &aside)?;
                tracing::warn!(
                    "{} cannot be read ({error}); moved to {}, and what it held is learnt again",
                    path.display(),
                    aside.display()
                );
                Ok((Self::try_open(path, false)?, Some(aside)))
            }
        }
    }

    fn try_open(path: &Path, existed: bool) -> io::Result<Self> {
        // sled panics on some kinds of damage; to the caller all kinds are one.
        let opened = catch_unwind(AssertUnwindSafe(|| {
            sled::Config::new().path(path).cache_capacity(SLED_CACHE_BYTES).flush_every_ms(None).open()
        }));
        let named = |why: String| io::Error::new(io::ErrorKind::InvalidData, format!("{}: {why}", path.display()));
        let store = match opened {
            Ok(Ok(db)) => Self { db, path: path.to_owned() },
            Ok(Err(error)) => return Err(named(error.to_string())),
            Err(_) => return Err(named("the store is damaged".into())),
        };
        store.check_mark(existed)?;
        Ok(store)
    }

    /// sled takes a log that it cannot read for an empty one: a mark from the first opening tells the two apart.
    fn check_mark(&self, existed: bool) -> io::Result<()> {
        let marks = self.db.open_tree(MARK).map_err(|error| self.named(error))?;
        let marked = marks.contains_key(MARK).map_err(|error| self.named(error))?;
        if existed && !marked {
            let text = format!("{}: what was written there is gone", self.path.display());
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        if !marked {
            marks.insert(MARK, &[1]).map_err(|error| self.named(error))?;
            self.db.flush().map_err(|error| self.named(error))?;
        }
        Ok(())
    }

    fn named(&self, error: sled::Error) -> io::Error {
        io::Error::other(format!("{}: {error}", self.path.display()))
    }
}

impl KeyValue for SledKv {
    fn get(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        Ok(self.db.get(key).map_err(|error| self.named(error))?.map(|value| value.to_vec()))
    }

    fn put(&self, key: &[u8], value: &[u8]) -> io::Result<()> {
        self.db.insert(key, value).map_err(|error| self.named(error))?;
        Ok(())
    }

    fn remove(&self, key: &[u8]) -> io::Result<()> {
        self.db.remove(key).map_err(|error| self.named(error))?;
        Ok(())
    }

    fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> io::Result<Vec<Pair>> {
        let from = after.filter(|after| *after > prefix).unwrap_or(prefix);
        let mut pairs = Vec::new();
        for pair in self.db.range(from.to_vec()..) {
            let (key, value) = pair.map_err(|error| self.named(error))?;
            if !key.starts_with(prefix) || pairs.len() == limit {
                break;
            }
            if after.is_none_or(|after| &key[..] > after) {
                pairs.push((key.to_vec(), value.to_vec()));
            }
        }
        Ok(pairs)
    }

    fn flush(&self) -> io::Result<()> {
        self.db.flush().map_err(|error| self.named(error))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::durable::{OpenMode, SystemFs};

    fn conforms(kv: &dyn KeyValue) {
        assert_eq!(kv.get(b"a").unwrap(), None);
        for key in ["a/1", "a/2", "a/3", "b/1"] {
            kv.put(key.as_bytes(), b"v").unwrap();
        }
        kv.put(b"a/2", b"w").unwrap();
        kv.remove(b"a/3").unwrap();
        kv.remove(b"absent").unwrap();
        assert_eq!(kv.get(b"a/2").unwrap(), Some(b"w".to_vec()));
        let keys = |pairs: Vec<Pair>| -> Vec<String> {
            pairs.into_iter().map(|(key, _)| String::from_utf8(key).unwrap()).collect()
        };
        assert_eq!(keys(kv.scan(b"a/", None, 10).unwrap()), ["a/1", "a/2"]);
        assert_eq!(keys(kv.scan(b"a/", Some(b"a/1"), 10).unwrap()), ["a/2"]);
        assert_eq!(keys(kv.scan(b"", None, 2).unwrap()), ["a/1", "a/2"]);
        assert_eq!(keys(kv.scan(b"c", None, 2).unwrap()), Vec::<String>::new());
        kv.flush().unwrap();
    }

    /// sled's own threads may hold its file for a moment after it was dropped.
    fn open_when_free(path: &Path) -> (SledKv, Option<PathBuf>) {
        let clock = Clock::system();
        let limit_ms = clock.mono_ms() + 60_000;
        loop {
            match SledKv::open(&SystemFs, &clock, path) {
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy && clock.mono_ms() < limit_ms => {}
                opened => return opened.unwrap(),
            }
        }
    }

    #[test]
    fn both_conform() {
        conforms(&MemoryKv::default());
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        let (kv, damaged) = open_when_free(&path);
        assert_eq!(damaged, None);
        conforms(&kv);
        let busy = SledKv::open(&SystemFs, &Clock::system(), &path).err().unwrap();
        assert_eq!(busy.kind(), io::ErrorKind::ResourceBusy, "one that is open is not damaged");
        drop(kv);
        let (kv, _) = open_when_free(&path);
        assert_eq!(kv.get(b"b/1").unwrap(), Some(b"v".to_vec()), "flushed writes survive");
    }

    #[test]
    fn a_damaged_folder_is_moved_aside_and_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        drop(open_when_free(&path));
        let conf = SystemFs.open(&path.join("conf"), OpenMode::Write).unwrap();
        conf.set_len(0).unwrap();
        conf.write_all_at(b"\xff\xfe garbage", 0).unwrap();
        let (kv, damaged) = open_when_free(&path);
        let damaged = damaged.expect("the damage is noticed");
        assert!(damaged.to_string_lossy().contains("state.damaged-"));
        conforms(&kv);
    }

    #[test]
    fn a_log_of_garbage_is_not_taken_for_an_empty_store() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        drop(open_when_free(&path));
        let db = SystemFs.open(&path.join("db"), OpenMode::Write).unwrap();
        db.set_len(0).unwrap();
        db.write_all_at(&[0x5a; 100], 0).unwrap();
        let (_, damaged) = open_when_free(&path);
        assert!(damaged.is_some());
        let (_, damaged) = open_when_free(&path);
        assert!(damaged.is_none());
    }
}

//! A load that knows every answer: it writes, reads, renames and deletes, and notices each byte that is lost or altered.
//!
//! # Overview
//! [`Checker::start`] sets writers and readers to work below one directory. A [`Ledger`] keeps for each file what was answered, and so what may
//! be found of it: a closed file whole, a flushed one with at least what was flushed, a deleted one nowhere, one whose
//! call got no answer in either state. [`Checker::finish`] ends the load and holds the cluster against the ledger. `cairn chaos` and the
//! suites break the cluster meanwhile.
//!
//! # Deadlines
//! An operation may fail while nodes are away; that is counted, and is no fault. One that neither succeeds nor fails within
//! [`Load::limit`] is stuck, and is.

pub mod content;
pub mod ledger;
mod work;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cairn_common::Env;
use cairn_common::entropy::Entropy;
use tokio::task::JoinSet;

use crate::fs::{ClientSettings, FileSystem, Replica, Result};
use ledger::{Entry, Fate, Ledger};
use work::Worker;

/// Faults that are named one by one; more are only counted.
const NAMED: usize = 100;
/// Different messages of failed operations that are kept.
const MESSAGES: usize = 50;

/// What the load is like.
#[derive(Clone, Debug)]
pub struct Load {
    /// Directory that it works in; made, and removed by nobody.
    pub root: String,
    /// Tasks that write, rename and delete.
    pub writers: usize,
    /// Tasks that read.
    pub readers: usize,
    /// No file is longer.
    pub max_file_bytes: u64,
    /// Block size of its files; 0: the cluster's.
    pub block_size: u64,
    /// Replicas of its files; 0: the cluster's.
    pub replication: u32,
    /// A writer that has more files deletes before it writes the next.
    pub files_per_writer: usize,
    /// Pause between two operations of a task.
    pub pause: Duration,
    /// An operation that has no answer by then is stuck.
    pub limit: Duration,
    /// The same seed gives the same files.
    pub seed: u64,
}

impl Load {
    /// A load below `root` that keeps two cores busy without filling them.
    pub fn at(root: impl Into<String>) -> Self {
        Self {
            root: root.into(),
            writers: 4,
            readers: 2,
            max_file_bytes: 4 << 20,
            block_size: 0,
            replication: 0,
            files_per_writer: 30,
            pause: Duration::from_millis(20),
            limit: Duration::from_secs(120),
            seed: 1,
        }
    }
}

/// What a load has seen so far.
#[derive(Clone, Default, Debug, serde::Serialize)]
pub struct Tally {
    /// Files closed, appended ones once more.
    pub files_written: u64,
    /// Files, or parts of them, read and found right.
    pub reads: u64,
    /// Of these, written by appending to a closed file.
    pub appends: u64,
    /// Renames answered.
    pub renames: u64,
    /// Deletions answered.
    pub deletions: u64,
    /// Operations that ended with an error.
    pub failed: u64,
    /// Bytes of closed files.
    pub bytes_written: u64,
    /// Bytes read and compared.
    pub bytes_verified: u64,
    /// Longest operation that ended, milliseconds.
    pub longest_ms: u64,
    /// Promised files (or bytes of them) that are not there, or deleted ones that are.
    pub lost: Vec<String>,
    /// Files with wrong bytes.
    pub altered: Vec<String>,
    /// Operations without an answer.
    pub stuck: Vec<String>,
    /// What failed operations said, and how often.
    pub errors: BTreeMap<String, u64>,
}

impl Tally {
    /// Operations that ended, well or with an error.
    pub fn operations(&self) -> u64 {
        self.files_written + self.reads + self.renames + self.deletions + self.failed
    }

    /// Nothing was lost, altered or stuck.
    pub fn is_clean(&self) -> bool {
        self.lost.is_empty() && self.altered.is_empty() && self.stuck.is_empty()
    }

    fn error(&mut self, text: String) {
        self.failed += 1;
        // Numbers apart, the same failure is one line.
        let plain: String = text.chars().map(|c| if c.is_ascii_digit() { '#' } else { c }).take(160).collect();
        if self.errors.len() < MESSAGES || self.errors.contains_key(&plain) {
            *self.errors.entry(plain).or_default() += 1;
        }
    }
}

fn name(list: &mut Vec<String>, text: String) {
    if list.len() < NAMED && !list.contains(&text) {
        list.push(text);
    }
}

struct Books {
    ledger: Ledger,
    tally: Tally,
}

/// What all tasks of a load share.
struct Shared {
    env: Env,
    load: Load,
    books: Mutex<Books>,
    stopping: AtomicBool,
}

impl Shared {
    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }
}

/// A load at work; see the module. Dropping it ends its tasks where they are.
pub struct Checker {
    shared: Arc<Shared>,
    fs: FileSystem,
    tasks: JoinSet<()>,
}

impl Checker {
    /// Makes the directory and starts the tasks, each with a client of its own.
    pub async fn start(env: &Env, settings: &ClientSettings, load: Load) -> Result<Self> {
        let fs = FileSystem::connect(env.clone(), settings.clone()).await?;
        fs.mkdirs(&load.root, 0o755).await?;
        let (writers, readers, seed) = (load.writers, load.readers, load.seed);
        let books = Mutex::new(Books { ledger: Ledger::default(), tally: Tally::default() });
        let shared = Arc::new(Shared { env: env.clone(), load, books, stopping: AtomicBool::new(false) });
        let mut tasks = JoinSet::new();
        for at in 0..writers + readers {
            let worker = Worker {
                shared: Arc::clone(&shared),
                fs: FileSystem::connect(env.clone(), settings.clone()).await?,
                random: Entropy::seeded(seed.wrapping_mul(1_000).wrapping_add(at as u64)),
                name: format!("{}/w{at}", shared.load.root),
            };
            if at < writers {
                tasks.spawn(worker.write_on());
            } else {
                tasks.spawn(worker.read_on());
            }
        }
        Ok(Self { shared, fs, tasks })
    }

    /// What was seen until now.
    pub fn tally(&self) -> Tally {
        self.shared.books().tally.clone()
    }

    /// A client of the cluster under test.
    pub fn file_system(&self) -> &FileSystem {
        &self.fs
    }

    /// Paths of closed files.
    pub fn acked(&self) -> Vec<String> {
        let entries = self.shared.books().ledger.entries();
        entries.into_iter().filter(|(_, entry)| entry.fate == Fate::Acked).map(|(path, _)| path).collect()
    }

    /// A closed file that the load neither renames nor deletes while it is borrowed.
    pub fn borrow(&self) -> Option<Borrowed> {
        let entropy = &self.shared.env.entropy;
        let (path, entry) = self.shared.books().ledger.pin(|count| entropy.below(count))?;
        let name = String::new();
        let worker = Worker { shared: Arc::clone(&self.shared), fs: self.fs.clone(), random: entropy.clone(), name };
        Some(Borrowed { worker, path, entry })
    }

    /// Ends the load; every operation under way gets its time to end.
    pub async fn stop(&mut self) {
        self.shared.stopping.store(true, Ordering::Relaxed);
        while let Some(ended) = self.tasks.join_next().await {
            if let Err(error) = ended {
                let mut books = self.shared.books();
                name(&mut books.tally.stuck, format!("a task of the load ended: {error}"));
            }
        }
    }

    /// Ends the load, reads every file and holds it against what was promised. The faults must be over.
    pub async fn finish(&mut self) -> Tally {
        self.stop().await;
        let judge = Worker {
            shared: Arc::clone(&self.shared),
            fs: self.fs.clone(),
            random: Entropy::seeded(0),
            name: String::new(),
        };
        let entries = self.shared.books().ledger.entries();
        for (path, entry) in entries {
            judge.judge(&path, &entry).await;
        }
        self.tally()
    }

    /// Has every replica of every closed file read by its datanode; returns how many are whole, and what is wrong: also a block with fewer
    /// replicas than its file asks for, or than there are `nodes`.
    pub async fn verify_replicas(&self, nodes: u32) -> Result<(u64, Vec<String>)> {
        let (mut whole, mut wrong) = (0, Vec::new());
        for path in self.acked() {
            let wanted = self.fs.status(&path).await?.replication.min(nodes) as usize;
            for located in self.fs.block_locations(&path, 0, 0).await? {
                let block = located.block.unwrap_or_default();
                let found = located.replicas.len();
                if found < wanted {
                    name(&mut wrong, format!("{path}: block {} has {found} of {wanted} replicas", block.id));
                }
                for replica in &located.replicas {
                    match self.fs.verify_replica(replica, &block).await {
                        Ok(_) => whole += 1,
                        Err(error) => name(&mut wrong, bad_replica(&path, replica, &error)),
                    }
                }
            }
        }
        Ok((whole, wrong))
    }
}

/// A file that stays as it is until this is dropped.
pub struct Borrowed {
    worker: Worker,
    path: String,
    entry: Entry,
}

impl Borrowed {
    /// Where it is.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Reads it; what is wrong with it is noted. Whether it could be read.
    pub async fn check(&self) -> bool {
        self.worker.check(&self.path, &self.entry).await
    }
}

impl Drop for Borrowed {
    fn drop(&mut self) {
        self.worker.shared.books().ledger.unpin(&self.path);
    }
}

fn bad_replica(path: &str, replica: &Replica, error: &crate::fs::Error) -> String {
    format!("{path}: replica on {}: {error}", replica.host)
}

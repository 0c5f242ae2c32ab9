//! The thread that owns the writer: group commit.

use std::sync::Arc;

use cairn_common::Env;
use cairn_common::clock::Clock;
use cairn_common::work::OwnerHandle;
use cairn_proto::ids::{Epoch, TxId};
use cairn_proto::pb;
use tokio::sync::{mpsc, watch};

use super::dirs::MetaDir;
use super::error::LogError;
use super::writer::LogWriter;

/// Transactions in order.
pub type Batch = Vec<(TxId, pb::Edit)>;

/// Most bytes that are written before a sync: bounds the memory and the wait of the first in the batch.
const MAX_FLUSH_BYTES: usize = 4 << 20;

/// Upper bounds of the sync-time histogram, microseconds.
pub const SYNC_BUCKETS_US: [u64; 11] =
    [100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 100_000, 500_000, 2_000_000];

/// How long syncs took.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SyncTimes {
    /// How many there were.
    pub count: u64,
    /// Microseconds in all.
    pub sum_us: u64,
    /// Syncs that took at most [`SYNC_BUCKETS_US`] (not cumulative; slower ones are in none).
    pub buckets: [u64; SYNC_BUCKETS_US.len()],
}

impl SyncTimes {
    fn add(&mut self, took_us: u64) {
        self.count += 1;
        self.sum_us += took_us;
        if let Some(index) = SYNC_BUCKETS_US.iter().position(|&bound| took_us <= bound) {
            self.buckets[index] += 1;
        }
    }
}

/// What the journal's thread publishes.
#[derive(Clone, Debug)]
pub struct JournalStatus {
    /// The last durable transaction.
    pub durable: TxId,
    /// Epoch of the set of directories.
    pub epoch: Epoch,
    /// Directories that hold everything durable.
    pub dirs: Vec<Arc<MetaDir>>,
    /// Set when no directory is left (or a transaction cannot be written): nothing will ever be durable again.
    pub failed: Option<Arc<LogError>>,
    /// How long syncs took.
    pub syncs: SyncTimes,
}

enum Request {
    Append(Batch),
    Roll,
    Purge { not_after: TxId },
    DropDirs(Vec<String>),
}

/// Handle of the journal's thread.
pub struct Journal {
    requests: mpsc::Sender<Request>,
    status: watch::Receiver<JournalStatus>,
    thread: OwnerHandle,
}

/// The journal has stopped; its status says why.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the edit log has stopped")]
pub struct Stopped;

impl Journal {
    /// Starts the thread with at most `queue` batches waiting.
    pub fn start(env: &Env, mut writer: LogWriter, queue: usize) -> std::io::Result<Self> {
        let (requests, inbox) = mpsc::channel(queue);
        writer.sync_together(env.work.clone());
        let status = JournalStatus {
            durable: writer.durable(),
            epoch: writer.epoch(),
            dirs: writer.dirs(),
            failed: None,
            syncs: SyncTimes::default(),
        };
        let (publish, status) = watch::channel(status);
        let clock = env.clock.clone();
        let thread = env.work.owner("nn-journal", move || run(writer, inbox, publish, clock))?;
        Ok(Self { requests, status, thread })
    }

    /// Hands over transactions; waits while the queue is full.
    pub async fn append(&self, batch: Batch) -> Result<(), Stopped> {
        self.requests.send(Request::Append(batch)).await.map_err(|_| Stopped)
    }

    /// Hands over transactions, or gives them back if the queue is full.
    pub fn try_append(&self, batch: Batch) -> Result<Batch, Stopped> {
        match self.requests.try_send(Request::Append(batch)) {
            Ok(()) => Ok(Batch::new()),
            Err(mpsc::error::TrySendError::Full(Request::Append(batch))) => Ok(batch),
            Err(_) => Err(Stopped),
        }
    }

    /// Whether the next request is taken at once.
    pub fn has_room(&self) -> bool {
        self.requests.capacity() > 0
    }

    /// Waits until the queue is not full; returns too if the thread is gone.
    pub async fn room(&self) {
        // The room is for whoever comes next: only the owner sends.
        let _ = self.requests.reserve().await;
    }

    /// Starts a new segment behind everything appended so far.
    pub async fn roll(&self) -> Result<(), Stopped> {
        self.requests.send(Request::Roll).await.map_err(|_| Stopped)
    }

    /// Removes segments that hold nothing after `not_after`.
    pub async fn purge(&self, not_after: TxId) -> Result<(), Stopped> {
        self.requests.send(Request::Purge { not_after }).await.map_err(|_| Stopped)
    }

    /// Leaves out directories (by name) in which something else than the log failed.
    pub async fn drop_dirs(&self, dir_ids: Vec<String>) -> Result<(), Stopped> {
        self.requests.send(Request::DropDirs(dir_ids)).await.map_err(|_| Stopped)
    }

    /// What the thread publishes.
    pub fn status(&self) -> watch::Receiver<JournalStatus> {
        self.status.clone()
    }

    /// Batches waiting.
    pub fn queued(&self) -> usize {
        self.requests.max_capacity() - self.requests.capacity()
    }

    /// Flushes and ends.
    pub async fn close(self) -> JournalStatus {
        drop(self.requests);
        self.thread.join().await;
        self.status.borrow().clone()
    }
}

async fn run(
    mut writer: LogWriter,
    mut inbox: mpsc::Receiver<Request>,
    publish: watch::Sender<JournalStatus>,
    clock: Clock,
) {
    while let Some(first) = inbox.recv().await {
        if let Err(error) = serve(&mut writer, first, &mut inbox, &publish, &clock) {
            tracing::error!(%error, "the edit log stops");
            publish.send_modify(|status| status.failed = Some(Arc::new(error)));
            return;
        }
    }
    let closed = writer.close();
    publish.send_modify(|status| {
        // Whoever still looks at the status must not keep the directories locked.
        status.dirs.clear();
        match closed {
            Ok(durable) => status.durable = durable,
            Err(error) => {
                tracing::error!(%error, "the edit log was not closed in order");
                status.failed = Some(Arc::new(error));
            }
        }
    });
}

/// Takes `first` and whatever else waits, and syncs once.
fn serve(
    writer: &mut LogWriter,
    first: Request,
    inbox: &mut mpsc::Receiver<Request>,
    publish: &watch::Sender<JournalStatus>,
    clock: &Clock,
) -> Result<(), LogError> {
    let mut next = Some(first);
    while let Some(request) = next {
        match request {
            Request::Append(batch) => {
                for (txid, edit) in &batch {
                    writer.append(*txid, edit)?;
                }
            }
            Request::Roll => writer.roll()?,
            Request::Purge { not_after } => writer.purge(not_after),
            Request::DropDirs(dir_ids) => {
                for dir_id in &dir_ids {
                    writer.drop_dir(dir_id)?;
                }
            }
        }
        next = if writer.buffered() < MAX_FLUSH_BYTES { inbox.try_recv().ok() } else { None };
    }
    let wrote = writer.buffered() > 0;
    let start = clock.mono_us();
    let durable = writer.flush()?;
    let took = clock.mono_us().saturating_sub(start);
    publish.send_modify(|status| {
        status.durable = durable;
        status.epoch = writer.epoch();
        if wrote {
            status.syncs.add(took);
        }
        if status.dirs.len() != writer.dirs().len() {
            status.dirs = writer.dirs();
        }
    });
    Ok(())
}

//! What the namenode orders: copies, deletions, checks, recoveries. All of it runs beside the heartbeats, bounded.

use std::collections::HashSet;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use cairn_proto::ids::BlockId;
use cairn_proto::pb::{self, datanode_command::Command, report_up::Report};
use cairn_proto::{ErrorCode, ErrorKind};
use tokio::sync::{Notify, Semaphore, mpsc};

use crate::store::lock;
use crate::transfer::{Transfer, copy, merge, recover};

/// Orders that may wait; the namenode repeats what was dropped.
const WAITING: usize = 1_024;

/// Replicas that shall go, or be put away.
struct Removal {
    replicas: Vec<pb::ReplicaRef>,
    forever: bool,
}

/// Carries out orders.
pub struct Commands {
    transfer: Arc<Transfer>,
    streams: Arc<Semaphore>,
    waiting: Arc<Semaphore>,
    /// Blocks that are being copied: an order repeated too early is not carried out twice.
    copying: Mutex<HashSet<i64>>,
    removals: mpsc::Sender<Removal>,
    full_report: Notify,
}

impl Commands {
    /// Starts the worker for removals.
    pub fn start(transfer: &Arc<Transfer>) -> Arc<Self> {
        let (removals, queue) = mpsc::channel(WAITING);
        let commands = Arc::new(Self {
            transfer: Arc::clone(transfer),
            streams: Arc::new(Semaphore::new(transfer.settings.replication_streams)),
            waiting: Arc::new(Semaphore::new(WAITING)),
            copying: Mutex::default(),
            removals,
            full_report: Notify::new(),
        });
        tokio::spawn(remove_all(Arc::clone(transfer), queue));
        commands
    }

    /// Resolves when the namenode asked for a full report.
    pub async fn full_report_wanted(&self) {
        self.full_report.notified().await;
    }

    /// Takes an order; never waits.
    pub fn take(self: &Arc<Self>, command: pb::DatanodeCommand) {
        match command.command {
            Some(Command::FullReport(_)) => self.full_report.notify_one(),
            Some(Command::Delete(order)) => self.remove(Removal { replicas: order.replicas, forever: true }),
            Some(Command::Quarantine(order)) => self.remove(Removal { replicas: order.replicas, forever: false }),
            Some(Command::Replicate(order)) => self.replicate(order),
            Some(Command::Verify(order)) => {
                for replica in order.replicas {
                    self.verify(replica);
                }
            }
            Some(Command::Recover(order)) => self.recover(order),
            Some(Command::Merge(order)) => self.merge(order),
            None => tracing::warn!("the namenode sent an order that this version does not know"),
        }
    }

    fn remove(&self, removal: Removal) {
        if self.removals.try_send(removal).is_err() {
            tracing::warn!("too many deletions wait; the namenode will ask again");
        }
    }

    fn replicate(self: &Arc<Self>, order: pb::ReplicateBlock) {
        let id = order.block.as_ref().map_or(0, |block| block.id);
        let Ok(place) = Arc::clone(&self.waiting).try_acquire_owned() else { return };
        if !lock(&self.copying).insert(id) {
            return;
        }
        let this = Arc::clone(self);
        tokio::spawn(async move {
            // Never closed; were it, copying at once is still right.
            let _stream = this.streams.acquire().await.ok();
            let copied = tokio::select! {
                copied = copy::replicate(&this.transfer, &order) => Some(copied),
                () = this.transfer.stopping() => None,
            };
            let targets: Vec<&str> = order.targets.iter().map(|target| target.address.as_str()).collect();
            match copied {
                Some(Ok(length)) => tracing::info!("block {id} ({length} bytes) copied to {}", targets.join(", ")),
                Some(Err(error)) => {
                    tracing::warn!("block {id} could not be copied to {}: {error}", targets.join(", "));
                    // The other side takes nothing that does not verify; then our replica may be the reason.
                    if matches!(error.kind(), ErrorKind::Corrupt) || error.code() == ErrorCode::Io {
                        this.transfer.store.suspect(BlockId(id));
                    }
                }
                None => {}
            }
            lock(&this.copying).remove(&id);
            drop(place);
        });
    }

    fn merge(self: &Arc<Self>, order: pb::MergeBlocks) {
        let id = order.block.as_ref().map_or(0, |block| block.id);
        let Ok(place) = Arc::clone(&self.waiting).try_acquire_owned() else { return };
        let this = Arc::clone(self);
        tokio::spawn(async move {
            // Never closed; were it, merging at once is still right.
            let _stream = this.streams.acquire().await.ok();
            let merged = tokio::select! {
                biased;
                () = this.transfer.stopping() => None,
                merged = merge::merge(&this.transfer, &order) => Some(merged),
            };
            let count = order.sources.len();
            match merged {
                Some(Ok(length)) => tracing::info!("{count} blocks rewritten as block {id} ({length} bytes)"),
                Some(Err(error)) => tracing::warn!("{count} blocks could not be rewritten as block {id}: {error}"),
                None => {}
            }
            drop(place);
        });
    }

    fn verify(self: &Arc<Self>, replica: pb::ReplicaRef) {
        let Ok(place) = Arc::clone(&self.waiting).try_acquire_owned() else { return };
        let this = Arc::clone(self);
        tokio::spawn(async move {
            let store = &this.transfer.store;
            if let Ok((block, generation)) = this.transfer.check_block(replica.block.as_ref()) {
                match this.transfer.verify(block, generation).await {
                    Ok(_) => store.map().announce_replica(block),
                    Err(error) if error.code() == ErrorCode::BlockNotFound => announce_absent(&this.transfer, &replica),
                    // A corrupt one is reported where it is set aside.
                    Err(error) => tracing::warn!("check of block {block}: {error}"),
                }
            }
            drop(place);
        });
    }

    fn recover(self: &Arc<Self>, order: pb::RecoverBlock) {
        let id = order.block.as_ref().map_or(0, |block| block.id);
        let Ok(place) = Arc::clone(&self.waiting).try_acquire_owned() else { return };
        let this = Arc::clone(self);
        tokio::spawn(async move {
            match recover::recover(&this.transfer, &order).await {
                Ok(recovered) => this.transfer.store.map().announce(Report::Recovered(recovered)),
                Err(error) => tracing::warn!("block {id} could not be recovered: {error}"),
            }
            drop(place);
        });
    }
}

/// The namenode believes that we hold what we do not.
fn announce_absent(transfer: &Transfer, replica: &pb::ReplicaRef) {
    let Some(block) = &replica.block else { return };
    if replica.storage_id.is_empty() {
        return;
    }
    transfer.store.map().announce(Report::Removed(pb::ReplicaRemoved {
        storage_id: replica.storage_id.clone(),
        pool: block.pool.clone(),
        id: block.id,
        generation: block.generation,
    }));
}

async fn remove_all(transfer: Arc<Transfer>, mut queue: mpsc::Receiver<Removal>) {
    while let Some(removal) = queue.recv().await {
        let mut deleted = 0;
        for replica in removal.replicas {
            let Ok((block, generation)) = transfer.check_block(replica.block.as_ref()) else { continue };
            let removed = match removal.forever {
                true => transfer.store.delete(block, generation, &replica.storage_id).await,
                false => transfer.store.quarantine(block, generation, &replica.storage_id).await,
            };
            if removed.as_ref().is_err_and(|error| error.code() == ErrorCode::StaleGeneration) {
                // The namenode does not know of the newer one; once it does, it can order the right one.
                transfer.store.map().announce_replica(block);
            }
            match removed {
                Ok(()) => deleted += u64::from(removal.forever),
                Err(error) if error.code() == ErrorCode::BlockNotFound => announce_absent(&transfer, &replica),
                Err(error) if removal.forever => tracing::warn!("block {block} is not deleted: {error}"),
                Err(error) => tracing::warn!("block {block} is not put into quarantine: {error}"),
            }
        }
        transfer.metrics.deleted.fetch_add(deleted, Ordering::Relaxed);
    }
}

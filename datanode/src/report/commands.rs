//! What the namenode orders: copies, deletions, checks, recoveries, merges. All of it runs beside the heartbeats, bounded.
//!
//! # Order
//! Each kind of order has room of its own to wait in, and streams of its own: a copy for repair waits for other copies only.
//!
//! # Epochs
//! An order belongs to the epoch of the answer that brought it. When a newer one is heard of (the namenode was restored to an earlier
//! moment), what waits is dropped, and copies, merges and recoveries that are under way are broken off. Checks go on: they tell what is.

use std::collections::HashSet;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use cairn_proto::ids::BlockId;
use cairn_proto::pb::{self, datanode_command::Command, report_up::Report};
use cairn_proto::{ErrorCode, ErrorKind};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc};

use crate::store::lock;
use crate::transfer::{Transfer, copy, merge, recover};

/// Orders of a kind that may wait; the namenode repeats what was dropped.
const WAITING: usize = 1_024;
/// Recoveries under way at once; they mostly wait for other nodes.
const RECOVERIES: usize = 64;

/// Replicas that shall go, or be put away.
struct Removal {
    replicas: Vec<pb::ReplicaRef>,
    forever: bool,
    epoch: u64,
}

/// Room for the orders of one kind.
struct Lane {
    /// Those that wait and those under way.
    places: Arc<Semaphore>,
    /// Those under way.
    streams: Semaphore,
}

impl Lane {
    fn new(streams: usize) -> Self {
        Self { places: Arc::new(Semaphore::new(WAITING)), streams: Semaphore::new(streams) }
    }

    /// A place, if there is one left; held until the order is done with.
    fn enter(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.places).try_acquire_owned().ok()
    }
}

/// Carries out orders.
pub struct Commands {
    transfer: Arc<Transfer>,
    copies: Lane,
    merges: Lane,
    /// Places; a check waits for its turn with those that clients ask for.
    checks: Arc<Semaphore>,
    recoveries: Lane,
    /// Blocks that are being copied: an order repeated too early is not carried out twice.
    copying: Mutex<HashSet<i64>>,
    removals: mpsc::Sender<Removal>,
    full_report: Notify,
}

impl Commands {
    /// Starts the worker for removals.
    pub fn start(transfer: &Arc<Transfer>) -> Arc<Self> {
        let (removals, queue) = mpsc::channel(WAITING);
        let streams = transfer.settings.replication_streams;
        let commands = Arc::new(Self {
            transfer: Arc::clone(transfer),
            copies: Lane::new(streams),
            merges: Lane::new(streams.div_ceil(2)),
            checks: Arc::new(Semaphore::new(WAITING)),
            recoveries: Lane::new(RECOVERIES),
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

    /// Takes an order of this epoch; never waits.
    pub fn take(self: &Arc<Self>, command: pb::DatanodeCommand, epoch: u64) {
        match command.command {
            Some(Command::FullReport(_)) => self.full_report.notify_one(),
            Some(Command::Delete(order)) => self.remove(Removal { replicas: order.replicas, forever: true, epoch }),
            Some(Command::Quarantine(order)) => {
                self.remove(Removal { replicas: order.replicas, forever: false, epoch });
            }
            Some(Command::Replicate(order)) => self.replicate(order, epoch),
            Some(Command::Verify(order)) => {
                for replica in order.replicas {
                    self.verify(replica);
                }
            }
            Some(Command::Recover(order)) => self.recover(order, epoch),
            Some(Command::Merge(order)) => self.merge(order, epoch),
            None => tracing::warn!("the namenode sent an order that this version does not know"),
        }
    }

    fn remove(&self, removal: Removal) {
        if self.removals.try_send(removal).is_err() {
            tracing::warn!("too many deletions wait; the namenode will ask again");
        }
    }

    /// Works when a stream is free. `None`: the daemon ends, or a newer epoch than that of the order was heard of.
    async fn carry_out<T>(&self, lane: &Lane, epoch: u64, work: impl Future<Output = T>) -> Option<T> {
        let work = async {
            // Never closed; were it, working at once is still right.
            let _stream = lane.streams.acquire().await.ok();
            work.await
        };
        tokio::select! {
            biased;
            () = self.transfer.stopping() => None,
            () = self.transfer.store.outdated(epoch) => {
                tracing::info!("an order of epoch {epoch} is dropped: a newer epoch is in force");
                None
            }
            done = work => Some(done),
        }
    }

    fn replicate(self: &Arc<Self>, order: pb::ReplicateBlock, epoch: u64) {
        let id = order.block.as_ref().map_or(0, |block| block.id);
        let Some(place) = self.copies.enter() else { return };
        if !lock(&self.copying).insert(id) {
            return;
        }
        let this = Arc::clone(self);
        tokio::spawn(async move {
            let copied = this.carry_out(&this.copies, epoch, copy::replicate(&this.transfer, &order)).await;
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

    fn merge(self: &Arc<Self>, order: pb::MergeBlocks, epoch: u64) {
        let id = order.block.as_ref().map_or(0, |block| block.id);
        let Some(place) = self.merges.enter() else { return };
        let this = Arc::clone(self);
        tokio::spawn(async move {
            let merged = this.carry_out(&this.merges, epoch, merge::merge(&this.transfer, &order)).await;
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
        let Ok(place) = Arc::clone(&self.checks).try_acquire_owned() else { return };
        let this = Arc::clone(self);
        tokio::spawn(async move {
            let store = &this.transfer.store;
            if let Ok((block, generation)) = this.transfer.check_block(replica.block.as_ref()) {
                match this.transfer.verify(block, generation).await {
                    Ok(_) => store.map().announce_replica(block, true),
                    Err(error) if error.code() == ErrorCode::BlockNotFound => announce_absent(&this.transfer, &replica),
                    // A corrupt one is reported where it is set aside.
                    Err(error) => tracing::warn!("check of block {block}: {error}"),
                }
            }
            drop(place);
        });
    }

    fn recover(self: &Arc<Self>, order: pb::RecoverBlock, epoch: u64) {
        let id = order.block.as_ref().map_or(0, |block| block.id);
        let Some(place) = self.recoveries.enter() else { return };
        let this = Arc::clone(self);
        tokio::spawn(async move {
            match this.carry_out(&this.recoveries, epoch, recover::recover(&this.transfer, &order)).await {
                Some(Ok(recovered)) => this.transfer.store.map().announce(Report::Recovered(recovered)),
                Some(Err(error)) => tracing::warn!("block {id} could not be recovered: {error}"),
                None => {}
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
            let (storage_id, epoch) = (&replica.storage_id, removal.epoch);
            let removed = match removal.forever {
                true => transfer.store.delete_by_order(block, generation, storage_id, epoch).await,
                false => transfer.store.quarantine(block, generation, storage_id, epoch).await,
            };
            if removed.as_ref().is_err_and(|error| error.code() == ErrorCode::StaleGeneration) {
                // The namenode does not know of the newer one; once it does, it can order the right one.
                transfer.store.map().announce_replica(block, false);
            }
            if removed.as_ref().is_err_and(|error| error.code() == ErrorCode::StaleEpoch) {
                tracing::info!("deletions of epoch {epoch} are dropped: a newer epoch is in force");
                break;
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

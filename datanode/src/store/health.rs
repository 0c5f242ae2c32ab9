//! Which volumes are in service, and which replicas are under suspicion.
//!
//! # Overview
//! An operation that fails because of the disk marks its volume ([`Volume::failed`](super::volume::Volume::failed)); [`keep`] takes such a volume
//! out of the replica map, checks the others from time to time, and says when too few are left. The heartbeat carries the failure, and the
//! namenode forgets the volume's replicas and copies them from elsewhere while this node lives.
//!
//! # Consistency
//! A volume that was taken out stays out until the datanode starts again: whoever mends it says so by that.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cairn_proto::ids::BlockId;
use cairn_proto::pb;
use cairn_proto::{Error, ErrorCode, Result};
use tokio::sync::watch;

use super::{BlockStore, lock};
use crate::settings::DatanodeSettings;

/// The look at the file systems may hold a heartbeat back for so long.
const LOOK_LIMIT: Duration = Duration::from_secs(1);
/// Replicas that may wait for a check; the scanner comes by at all of them anyway.
const MAX_SUSPECTS: usize = 4_096;

/// Replicas that a reader, a copy or a comparison of the folders found wanting; the scanner checks them first.
#[derive(Default)]
pub(super) struct Suspects {
    blocks: Mutex<BTreeMap<usize, BTreeSet<i64>>>,
    /// Counts those ever named.
    named: watch::Sender<u64>,
}

impl BlockStore {
    /// The volumes to try for a new replica, in this order: the one named, then those with room.
    pub(super) fn volumes_for(&self, storage_id: &str) -> Result<Vec<usize>> {
        let in_service = (0..self.volumes.len()).filter(|index| !self.volumes[*index].is_failed());
        let mut rooms: Vec<(usize, u64)> =
            in_service.map(|index| (index, self.volumes[index].usage().remaining)).collect();
        if rooms.is_empty() {
            return Err(Error::new(ErrorCode::DiskFull, "no volume of this datanode is in service"));
        }
        let most = rooms.iter().map(|(_, bytes)| *bytes).max().unwrap_or(0);
        // Volumes with about as much room as the best take turns; a much fuller one waits until the others are as full.
        rooms.sort_by_key(|(_, bytes)| *bytes < most / 4 * 3);
        let good = rooms.iter().filter(|(_, bytes)| *bytes >= most / 4 * 3).count();
        let turn = self.next_volume.fetch_add(1, Ordering::Relaxed);
        rooms[..good].rotate_left(turn % good.max(1));
        let named = |index: &usize| self.volumes[*index].storage_id() == storage_id;
        let mut order: Vec<usize> = rooms.into_iter().map(|(index, _)| index).collect();
        order.sort_by_key(|index| !named(index));
        Ok(order)
    }

    /// Figures of each volume, as heartbeats and registrations carry them. Looks at the file systems, but waits for none that hangs.
    pub async fn storages(self: &Arc<Self>) -> Vec<pb::StorageInfo> {
        let store = Arc::clone(self);
        let look = self.env.work.io(move || store.volumes.iter().for_each(super::volume::Volume::refresh_room));
        // Too late: the figures of the last look are good enough.
        let _ = self.env.clock.timeout(LOOK_LIMIT, look).await;
        let of_volume = |(index, volume): (usize, &super::volume::Volume)| {
            let (usage, failure) = (volume.usage(), volume.failure());
            pb::StorageInfo {
                storage_id: volume.storage_id().to_owned(),
                storage_type: pb::StorageType::Disk as i32,
                capacity: usage.capacity,
                used: usage.used,
                remaining: if failure.is_some() { 0 } else { usage.remaining },
                blocks: self.map.count(index),
                failure: failure.unwrap_or_default(),
            }
        };
        self.volumes.iter().enumerate().map(of_volume).collect()
    }

    /// Folders out of service, and why; those left out at the start included.
    pub fn failed_volumes(&self) -> Vec<(String, String)> {
        let failed = self.volumes.iter().filter_map(|volume| Some((volume.root().to_owned(), volume.failure()?)));
        self.left_out.iter().cloned().chain(failed).map(|(root, why)| (root.display().to_string(), why)).collect()
    }

    /// What to say of a block that is not here: not that nobody has it, if a volume had it that is out of service.
    pub fn out_of_reach(&self, block: BlockId, error: Error) -> Error {
        let volume = self.map.given_up(block).filter(|_| error.code() == ErrorCode::BlockNotFound);
        let Some(volume) = volume else { return error };
        let text =
            format!("block {block} lies on volume {}, which is out of service", self.volumes[volume].root().display());
        Error::new(ErrorCode::Unreachable, text).with_subject(block.to_string())
    }

    /// Takes failed volumes out of the replica map. Returns whether there was a new one.
    pub fn take_out_failed(&self) -> bool {
        let mut any = false;
        for (index, volume) in self.volumes.iter().enumerate().filter(|(_, volume)| volume.is_failed()) {
            let replicas = self.map.take_out(index);
            if replicas > 0 {
                tracing::warn!("volume {}: {replicas} replicas are given up", volume.root().display());
            }
            any |= lock(&self.suspects.blocks).remove(&index).is_some() | (replicas > 0);
        }
        any
    }

    /// Makes the names of open replicas durable (blocking), so that an orderly end keeps all that was written, acknowledged or not.
    pub(crate) fn sync_open_names(&self) {
        for volume in self.volumes.iter().filter(|volume| !volume.is_failed()) {
            let Ok(folder) = volume.pool_root().map(|root| root.join("rbw")) else { continue };
            if let Err(error) = volume.sync_folder(&folder) {
                tracing::warn!("{error}");
            }
        }
    }

    /// The replica shall be checked soon. Never waits.
    pub fn suspect(&self, block: BlockId) {
        let Some((volume, _)) = self.map.get(block) else { return };
        let mut suspects = lock(&self.suspects.blocks);
        let of_volume = suspects.entry(volume).or_default();
        if of_volume.len() < MAX_SUSPECTS {
            of_volume.insert(block.0);
        }
        drop(suspects);
        self.suspects.named.send_modify(|count| *count += 1);
    }

    /// The next suspect of a volume.
    pub(crate) fn take_suspect(&self, volume: usize) -> Option<BlockId> {
        lock(&self.suspects.blocks).get_mut(&volume)?.pop_first().map(BlockId)
    }

    /// Suspects that wait for their check.
    pub(crate) fn suspects(&self) -> usize {
        lock(&self.suspects.blocks).values().map(BTreeSet::len).sum()
    }

    /// Changes when there is a new suspect.
    pub(crate) fn suspected(&self) -> watch::Receiver<u64> {
        self.suspects.named.subscribe()
    }
}

/// Takes failed volumes out and checks the others, until too few are left; why.
pub(crate) async fn keep(store: &Arc<BlockStore>, settings: &DatanodeSettings) -> Error {
    let clock = store.env.clock.clone();
    let interval = Duration::from_millis(settings.volume_check_interval_ms);
    loop {
        store.take_out_failed();
        let failed = store.failed_volumes();
        let all = store.left_out.len() + store.volumes.len();
        if failed.len() > settings.failed_volumes_tolerated() {
            let why: Vec<String> = failed.into_iter().map(|(_, why)| why).collect();
            let text = format!(
                "{} of {all} volumes are out of service, {} may be: {}",
                why.len(),
                settings.failed_volumes_tolerated(),
                why.join("; ")
            );
            return Error::new(ErrorCode::Io, text);
        }
        tokio::select! {
            biased;
            () = store.failures.notified() => continue,
            () = clock.sleep(interval) => {}
        }
        check_all(store, Duration::from_millis(settings.volume_check_timeout_ms)).await;
    }
}

/// Checks every volume at the same time; one that does not answer in time has failed.
async fn check_all(store: &Arc<BlockStore>, limit: Duration) {
    let checks = (0..store.volumes.len()).filter(|index| !store.volumes[*index].is_failed()).map(async |index| {
        let checked = Arc::clone(store);
        let check = store.env.work.io(move || checked.volumes[index].check());
        if store.env.clock.timeout(limit, check).await.is_err() {
            let root = store.volumes[index].root().display().to_string();
            store.volumes[index].fail(format!("{root}: the check of the volume took longer than {limit:?}"));
        }
    });
    futures_util::future::join_all(checks).await;
}

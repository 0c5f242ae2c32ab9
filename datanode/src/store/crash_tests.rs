//! The power goes at every sync of a life of a volume: formatting, writes, recovery cuts, copies, deletions, a new epoch, a restart; and again while
//! the store opens after that. Whatever was promised is there, with the right bytes; whatever is there is whole as far as it says.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use cairn_common::Env;
use cairn_common::entropy::Entropy;
use cairn_common::simdisk::SimDisk;
use cairn_common::work::Work;
use cairn_proto::ids::{BlockId, Generation};

use super::BlockStore;
use super::map::Kind;
use super::ops::{NewReplica, Recovered, Recovery};
use super::writer::ReplicaWriter;
use crate::testing::*;

const NEXT: Generation = Generation(GEN.0 + 1);
const FRAME: usize = 1_000;
const EPOCH: u64 = 5;

/// What a block's replica was promised to be.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Promise {
    generation: Generation,
    length: u64,
    finalized: bool,
}

/// What the life promised before the power went, and which bytes each generation of a block may hold.
#[derive(Default)]
struct Ledger {
    crash_at: u64,
    promised: BTreeMap<i64, Promise>,
    /// Deletions that were ordered: from then on nothing is promised.
    deleted: Vec<i64>,
    written: BTreeMap<(i64, u64), Vec<u8>>,
    epoch: u64,
}

impl Ledger {
    fn alive(&self, disk: &SimDisk) -> bool {
        disk.syncs() < self.crash_at
    }

    fn promise(&mut self, disk: &SimDisk, block: BlockId, generation: Generation, length: u64, finalized: bool) {
        if self.alive(disk) {
            self.promised.insert(block.0, Promise { generation, length, finalized });
        }
    }

    fn writes(&mut self, block: BlockId, generation: Generation, data: &[u8]) {
        self.written.insert((block.0, generation.0), data.to_vec());
    }
}

async fn open(disk: &SimDisk) -> Arc<BlockStore> {
    let env = Env { fs: Arc::new(disk.clone()), work: Work::inline(), ..Env::system() };
    BlockStore::open(&env, &settings(&[Path::new("/data/volume")])).await.unwrap()
}

async fn create(store: &Arc<BlockStore>, block: BlockId, temporary: bool) -> ReplicaWriter {
    let storage_id = String::new();
    let new = NewReplica { block, generation: GEN, storage_id, block_size: 1 << 20, temporary };
    store.create(new).await.unwrap()
}

fn add(writer: &mut ReplicaWriter, block: BlockId, data: &[u8], frames_from_to: std::ops::Range<usize>) {
    let (from, to) = (frames_from_to.start * FRAME, frames_from_to.end * FRAME);
    writer.append(&[chunk(&frames(block, &data[..to], from, FRAME, false))]).unwrap();
}

fn recovery(block: BlockId, keep: usize) -> Recovery {
    let keep_length = (keep * FRAME) as u64;
    Recovery { block, old_generation: GEN, new_generation: NEXT, keep_length, block_size: 1 << 20 }
}

/// Written, synced in the middle, finalized; later its generation is renewed.
async fn plain_block(store: &Arc<BlockStore>, disk: &SimDisk, ledger: &mut Ledger) {
    let (block, data) = (BlockId(1_073_741_825), random(5 * FRAME, 1));
    ledger.writes(block, GEN, &data);
    let mut writer = create(store, block, false).await;
    add(&mut writer, block, &data, 0..3);
    writer.sync().unwrap();
    ledger.promise(disk, block, GEN, 3_000, false);
    add(&mut writer, block, &data, 3..5);
    writer.finalize().unwrap();
    ledger.promise(disk, block, GEN, 5_000, true);
    ledger.writes(block, NEXT, &data);
    let Recovered::Finalized(matcher) = store.recover(recovery(block, 5)).await.unwrap() else { panic!() };
    matcher.finish().unwrap();
    ledger.promise(disk, block, NEXT, 5_000, true);
}

/// Its pipeline breaks: cut back under a new generation, then other bytes than before.
async fn recovered_block(store: &Arc<BlockStore>, disk: &SimDisk, ledger: &mut Ledger) {
    let (block, data) = (BlockId(1_073_800_000), random(5 * FRAME, 2));
    ledger.writes(block, GEN, &data);
    let mut writer = create(store, block, false).await;
    add(&mut writer, block, &data, 0..2);
    writer.sync().unwrap();
    ledger.promise(disk, block, GEN, 2_000, false);
    add(&mut writer, block, &data, 2..4);
    writer.abandon();
    // What was not acknowledged may be sent again in other frames, but it is the same data.
    ledger.writes(block, NEXT, &data);
    let Recovered::Open(mut writer) = store.recover(recovery(block, 2)).await.unwrap() else { panic!() };
    add(&mut writer, block, &data, 2..3);
    writer.sync().unwrap();
    ledger.promise(disk, block, NEXT, 3_000, false);
    add(&mut writer, block, &data, 3..5);
    writer.finalize().unwrap();
    ledger.promise(disk, block, NEXT, 5_000, true);
}

/// Copies from another node: one whole, one given up; a deletion.
async fn copies(store: &Arc<BlockStore>, disk: &SimDisk, ledger: &mut Ledger) {
    for id in [1_073_741_900, 1_073_741_901, 1_073_741_902] {
        let (block, data) = (BlockId(id), random(2 * FRAME, id as u64));
        ledger.writes(block, GEN, &data);
        let mut writer = create(store, block, true).await;
        add(&mut writer, block, &data, 0..2);
        if id == 1_073_741_901 {
            writer.abandon();
            continue;
        }
        writer.finalize().unwrap();
        ledger.promise(disk, block, GEN, 2_000, true);
        if id == 1_073_741_902 {
            ledger.deleted.push(id);
            store.delete(block, GEN, "").await.unwrap();
        }
    }
}

/// The whole life, with a restart of the process in it.
async fn live(disk: &SimDisk, crash_at: u64) -> Ledger {
    let mut ledger = Ledger { crash_at, ..Ledger::default() };
    let store = open(disk).await;
    store.join_cluster("cluster-1", POOL, 1).await.unwrap();
    plain_block(&store, disk, &mut ledger).await;
    copies(&store, disk, &mut ledger).await;
    recovered_block(&store, disk, &mut ledger).await;
    store.join_cluster("cluster-1", POOL, EPOCH).await.unwrap();
    ledger.epoch = if ledger.alive(disk) { EPOCH } else { 0 };
    // Killed with a replica open; the next process recovers it and goes on.
    let (block, data) = (BlockId(1_073_999_999), random(4 * FRAME, 9));
    ledger.writes(block, GEN, &data);
    let mut writer = create(&store, block, false).await;
    add(&mut writer, block, &data, 0..3);
    disk.kill();
    drop((writer, store));
    let store = open(disk).await;
    ledger.writes(block, NEXT, &data);
    let Recovered::Open(mut writer) = store.recover(recovery(block, 3)).await.unwrap() else { panic!() };
    add(&mut writer, block, &data, 3..4);
    writer.finalize().unwrap();
    ledger.promise(disk, block, NEXT, 4_000, true);
    ledger
}

/// Opens the volume and compares it with the ledger.
async fn check(disk: &SimDisk, ledger: &Ledger, case: &str) {
    let store = open(disk).await;
    if !ledger.promised.is_empty() {
        assert_eq!(store.identity().cluster_id, "cluster-1", "{case}: the volume forgot whose it is");
    }
    assert!(store.identity().epoch >= ledger.epoch, "{case}: an epoch was forgotten");
    let blocks: Vec<i64> = ledger.written.keys().map(|(block, _)| *block).collect();
    for id in blocks {
        let block = BlockId(id);
        let promised = ledger.promised.get(&id).filter(|_| !ledger.deleted.contains(&id));
        let found = store.map().get(block).filter(|(_, entry)| !matches!(entry.kind, Kind::Corrupt { .. }));
        let Some((_, entry)) = found else {
            assert!(promised.is_none(), "{case}: block {id} is gone, {promised:?}");
            continue;
        };
        let data = ledger.written.get(&(id, entry.generation.0));
        let data = data.unwrap_or_else(|| panic!("{case}: block {id} has a generation that nobody wrote"));
        let read = store.read(block, entry.generation).await.unwrap_or_else(|error| panic!("{case}: {error}"));
        let length = read.length as usize;
        assert!(length.is_multiple_of(FRAME) && length <= data.len(), "{case}: block {id} has {length} bytes");
        assert_eq!(read.index.crc32c(), crc32c::crc32c(&data[..length]), "{case}: block {id} holds other bytes");
        let finalized = matches!(entry.kind, Kind::Finalized { .. });
        if finalized {
            assert_eq!(length, data.len(), "{case}: block {id} is final and not whole");
            store.verify(block, entry.generation).await.unwrap_or_else(|error| panic!("{case}: {error}"));
        }
        if let Some(promise) = promised {
            let held = Promise { generation: entry.generation, length: read.length, finalized };
            // A newer generation may have begun, with what was kept, but it did not lose what was promised.
            assert!(held.generation >= promise.generation, "{case}: block {id}: {held:?} after {promise:?}");
            assert!(held.length >= promise.length, "{case}: block {id}: {held:?} after {promise:?}");
            assert!(finalized || !promise.finalized, "{case}: block {id}: {held:?} after {promise:?}");
        }
    }
}

#[tokio::test]
async fn a_crash_at_every_sync_of_a_volume() {
    let disk = SimDisk::new(1 << 30, Entropy::seeded(0));
    let whole = live(&disk, u64::MAX).await;
    assert_eq!((whole.promised.len(), whole.epoch), (5, EPOCH));
    let syncs = disk.syncs();
    assert!(syncs > 20, "{syncs} syncs");
    for crash_at in 1..=syncs + 1 {
        for seed in 0..6 {
            let disk = SimDisk::new(1 << 30, Entropy::seeded(seed));
            disk.freeze_at_sync(crash_at);
            let ledger = live(&disk, crash_at).await;
            disk.crash();
            check(&disk, &ledger, &format!("sync {crash_at}, seed {seed}")).await;
        }
    }
}

#[tokio::test]
async fn a_crash_while_a_volume_recovers_from_a_crash() {
    let disk = SimDisk::new(1 << 30, Entropy::seeded(0));
    live(&disk, u64::MAX).await;
    for crash_at in 1..=disk.syncs() + 1 {
        for again_at in 1..=3 {
            let disk = SimDisk::new(1 << 30, Entropy::seeded(crash_at * 17 + again_at));
            disk.freeze_at_sync(crash_at);
            let ledger = live(&disk, crash_at).await;
            disk.crash();
            let case = format!("sync {crash_at}, then sync {again_at} of the start");
            for _ in 0..2 {
                disk.freeze_at_sync(disk.syncs() + again_at);
                let store = open(&disk).await;
                // Which it does when it has found the namenode again.
                store.join_cluster("cluster-1", POOL, EPOCH).await.unwrap();
                drop(store);
                disk.crash();
            }
            check(&disk, &ledger, &case).await;
        }
    }
}

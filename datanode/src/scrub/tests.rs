//! The scanner and the comparison of folders on a simulated disk, in virtual time.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use cairn_common::Env;
use cairn_common::clock::Clock;
use cairn_common::durable::{Fs, OpenMode};
use cairn_common::entropy::Entropy;
use cairn_common::kv::{KeyValue, MemoryKv};
use cairn_common::simdisk::SimDisk;
use cairn_common::work::Work;
use cairn_proto::ids::BlockId;

use super::*;
use crate::settings::DatanodeSettings;
use crate::store::BlockStore;
use crate::store::map::Kind;
use crate::store::ops::NewReplica;
use crate::testing::{GEN, POOL, chunk, frames, random, settings};

const BYTES: usize = 1 << 20;
const HOUR_MS: u64 = 3_600_000;

struct Node {
    disk: SimDisk,
    env: Env,
    kv: Arc<dyn KeyValue>,
    settings: DatanodeSettings,
}

impl Node {
    fn new() -> Self {
        let disk = SimDisk::new(1 << 30, Entropy::seeded(1));
        let clock = Clock::simulated(1_700_000_000_000);
        let env = Env { fs: Arc::new(disk.clone()), work: Work::inline(), clock, ..Env::system() };
        let settings = DatanodeSettings {
            scan_bytes_per_second: 1 << 20,
            scan_period_ms: 24 * HOUR_MS,
            directory_scan_interval_ms: HOUR_MS,
            ..settings(&[Path::new("/a")])
        };
        Self { disk, env, kv: Arc::new(MemoryKv::default()), settings }
    }

    async fn start(&self) -> Arc<Transfer> {
        let store = BlockStore::open(&self.env, &self.settings).await.unwrap();
        store.join_cluster("cluster-1", POOL, 1).await.unwrap();
        Transfer::new(&self.env, &Arc::new(self.settings.clone()), &store, None, Some(Arc::clone(&self.kv)))
    }

    fn flip(&self, path: &Path, at: u64) {
        let file = self.disk.open(path, OpenMode::Write).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 4], at).unwrap();
    }
}

async fn put(transfer: &Arc<Transfer>, id: i64) -> PathBuf {
    let block = BlockId(id);
    let new = NewReplica { block, generation: GEN, storage_id: String::new(), block_size: 1 << 20, temporary: false };
    let mut writer = transfer.store.create(new).await.unwrap();
    writer.append(&[chunk(&frames(block, &random(BYTES, id as u64), 0, 256 << 10, false))]).unwrap();
    writer.finalize().unwrap();
    transfer.store.volume(0).finalized_path(block, GEN, BYTES as u64).unwrap()
}

fn figure(transfer: &Transfer, name: &str) -> u64 {
    transfer.scrub.figures().into_iter().find(|(known, ..)| *known == name).unwrap().2
}

/// Waits in virtual time.
async fn until(what: &str, mut good: impl FnMut() -> bool) {
    for _ in 0..500_000 {
        if good() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("{what}: not within seven virtual hours");
}

fn is_corrupt(transfer: &Transfer, id: i64) -> bool {
    transfer.store.map().get(BlockId(id)).is_some_and(|(_, entry)| matches!(entry.kind, Kind::Corrupt { .. }))
}

#[tokio::test(start_paused = true)]
async fn a_pass_finds_damage_at_its_pace_and_rests_until_blocks_are_due() {
    let node = Node::new();
    let transfer = node.start().await;
    let mut paths = Vec::new();
    for id in 1..=6 {
        paths.push(put(&transfer, id).await);
    }
    node.flip(&paths[3], 600_000);
    let begun_ms = node.env.clock.mono_ms();
    tokio::spawn(run(Arc::clone(&transfer)));
    until("the first pass", || figure(&transfer, "scan_passes_total") == 1).await;
    let took_ms = node.env.clock.mono_ms() - begun_ms;
    assert!((4_000..9_000).contains(&took_ms), "six blocks of 1 MiB at 1 MiB a second took {took_ms} ms");
    assert!(is_corrupt(&transfer, 4));
    assert_eq!((figure(&transfer, "scan_blocks_total"), figure(&transfer, "scan_corrupt_total")), (5, 1));
    // Looked at again after an hour, and not read again: all were found good lately. The bad one is, in vain.
    until("the second pass", || figure(&transfer, "scan_passes_total") == 2).await;
    assert_eq!((figure(&transfer, "scan_blocks_total"), figure(&transfer, "scan_skipped_total")), (5, 5));
    tokio::time::sleep(Duration::from_millis(24 * HOUR_MS)).await;
    until("all are read again", || figure(&transfer, "scan_blocks_total") == 10).await;
}

#[tokio::test(start_paused = true)]
async fn a_restart_goes_on_where_the_scanner_was() {
    let node = Node::new();
    let transfer = node.start().await;
    for id in 1..=8 {
        put(&transfer, id).await;
    }
    let running = tokio::spawn(run(Arc::clone(&transfer)));
    until("three blocks", || figure(&transfer, "scan_blocks_total") == 3).await;
    let asked_ms = node.env.clock.mono_ms();
    transfer.stop();
    running.await.unwrap();
    assert!(node.env.clock.mono_ms() - asked_ms <= 1_000, "a stop does not wait for a pass");
    let first = figure(&transfer, "scan_blocks_total");
    drop(transfer);
    let transfer = node.start().await;
    let begun = transfer.scrub.cursor(transfer.store.volume(0).storage_id()).await;
    assert!(begun.after >= 2 && begun.began_ms > 0, "{begun:?}");
    tokio::spawn(run(Arc::clone(&transfer)));
    until("the pass", || figure(&transfer, "scan_passes_total") == 1).await;
    let second = figure(&transfer, "scan_blocks_total");
    assert!(first + second <= 9 && second < 8, "{first} and then {second} of 8 blocks");
    // Notes on blocks that are gone go.
    transfer.store.delete(BlockId(5), GEN, "").await.unwrap();
    until("another pass", || figure(&transfer, "scan_passes_total") == 2).await;
    assert_eq!(node.kv.scan(b"verified/", None, 100).unwrap().len(), 7);
}

#[tokio::test(start_paused = true)]
async fn what_is_under_suspicion_is_checked_first() {
    let mut node = Node::new();
    node.settings.scan_bytes_per_second = 64 << 10;
    let transfer = node.start().await;
    for id in 1..=5 {
        put(&transfer, id).await;
    }
    let last = put(&transfer, 6).await;
    tokio::spawn(run(Arc::clone(&transfer)));
    until("one block", || figure(&transfer, "scan_blocks_total") == 1).await;
    node.flip(&last, 5_000);
    transfer.store.suspect(BlockId(6));
    until("the suspect", || is_corrupt(&transfer, 6)).await;
    // Without precedence five others would have come before it.
    assert!(figure(&transfer, "scan_blocks_total") <= 3);
}

#[tokio::test(start_paused = true)]
async fn a_replica_that_verifies_again_is_taken_back() {
    let node = Node::new();
    let transfer = node.start().await;
    let path = put(&transfer, 1).await;
    node.flip(&path, 600_000);
    tokio::spawn(run(Arc::clone(&transfer)));
    until("the damage", || is_corrupt(&transfer, 1)).await;
    let aside = transfer.store.volume(0).corrupt_path(&path.file_name().unwrap().to_string_lossy()).unwrap();
    node.flip(&aside, 600_000);
    until("it is back", || !is_corrupt(&transfer, 1)).await;
    assert_eq!(transfer.store.read(BlockId(1), GEN).await.unwrap().length, BYTES as u64);
}

#[tokio::test(start_paused = true)]
async fn folders_and_map_are_compared() {
    let mut node = Node::new();
    // Nothing but the comparison may find anything here.
    node.settings.scan_bytes_per_second = 0;
    let transfer = node.start().await;
    let gone = put(&transfer, 1).await;
    let short = put(&transfer, 2).await;
    let stray = put(&transfer, 3).await;
    put(&transfer, 70_000).await;
    // A copy of a whole file that the map does not know, and one that is no replica.
    let aside = Path::new("/a").join(POOL).join("kept");
    node.disk.rename(&stray, &aside).unwrap();
    transfer.store.delete(BlockId(3), GEN, "").await.unwrap();
    node.disk.rename(&aside, &stray).unwrap();
    let foreign = stray.with_file_name("9_1001_500.blk");
    node.disk.open(&foreign, OpenMode::Create).unwrap().write_all_at(b"nothing", 0).unwrap();
    node.disk.remove_file(&gone).unwrap();
    let file = node.disk.open(&short, OpenMode::Write).unwrap();
    file.set_len(file.len().unwrap() - 100).unwrap();
    transfer.store.map().begin_stream();
    tokio::spawn(run(Arc::clone(&transfer)));
    until("a comparison", || figure(&transfer, "directory_scans_total") == 1).await;
    until("the short file is checked", || is_corrupt(&transfer, 2)).await;
    assert!(transfer.store.map().get(BlockId(1)).is_none());
    assert_eq!(transfer.store.read(BlockId(3), GEN).await.unwrap().length, BYTES as u64);
    assert!(transfer.store.map().get(BlockId(9)).is_none());
    assert!(transfer.store.read(BlockId(70_000), GEN).await.is_ok());
    assert_eq!(
        (figure(&transfer, "directory_scan_missing_total"), figure(&transfer, "directory_scan_unknown_total")),
        (1, 1)
    );
    let mut told: Vec<(bool, i64)> = transfer
        .store
        .map()
        .take_changes(100)
        .reports
        .iter()
        .map(|report| match report {
            cairn_proto::pb::report_up::Report::Changed(changed) => (true, changed.replica.as_ref().unwrap().id),
            cairn_proto::pb::report_up::Report::Removed(removed) => (false, removed.id),
            other => panic!("{other:?}"),
        })
        .collect();
    told.sort_unstable();
    assert_eq!(told, [(false, 1), (true, 2), (true, 3)]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_never_carries_bad_bytes_and_brings_its_source_under_suspicion() {
    use crate::report::commands::Commands;
    use crate::testing::{Node as Served, block_of, write_block};
    use cairn_proto::pb::{self, datanode_command::Command};

    let (source, target) = (Served::start().await, Served::start().await);
    let block = BlockId(7);
    let data = random(BYTES, 7);
    write_block(&[&source], block, &data, false).await;
    let path = source.store().volume(0).finalized_path(block, GEN, BYTES as u64).unwrap();
    let file = source.store().env().fs.open(&path, OpenMode::Write).unwrap();
    file.write_all_at(b"rot", 700_000).unwrap();
    let order =
        pb::ReplicateBlock { block: block_of(block, GEN), length: BYTES as u64, targets: vec![target.target()] };
    let command = pb::DatanodeCommand { command: Some(Command::Replicate(order)) };
    Commands::start(&source.transfer).take(command, 1);
    let begun = tokio::time::Instant::now();
    while source.store().suspects() == 0 {
        assert!(begun.elapsed() < Duration::from_secs(30), "the source is not suspected");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    tokio::spawn(run(Arc::clone(&source.transfer)));
    while !is_corrupt(&source.transfer, 7) {
        assert!(begun.elapsed() < Duration::from_secs(30), "the source is not set aside");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // It says why before it lets go of what it has.
    while target.store().map().get(block).is_some() {
        assert!(begun.elapsed() < Duration::from_secs(60), "something of it is kept");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

//! Volumes that fail: simulated disks with faults, and real folders that vanish.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use cairn_common::Env;
use cairn_common::durable::{Fs, SystemFs};
use cairn_common::entropy::Entropy;
use cairn_common::simdisk::{Fault, FaultOp, SimDisk};
use cairn_common::work::Work;
use cairn_proto::ErrorCode;
use cairn_proto::ids::BlockId;

use super::BlockStore;
use super::health::keep;
use super::map::Kind;
use super::ops::NewReplica;
use super::writer::ReplicaWriter;
use crate::settings::DatanodeSettings;
use crate::testing::*;

fn two() -> DatanodeSettings {
    settings(&[Path::new("/a"), Path::new("/b")])
}

async fn sim(settings: &DatanodeSettings) -> (SimDisk, Arc<BlockStore>) {
    let disk = SimDisk::new(1 << 30, Entropy::seeded(1));
    let env = Env { fs: Arc::new(disk.clone()), work: Work::inline(), ..Env::system() };
    let store = BlockStore::open(&env, settings).await.unwrap();
    store.join_cluster("cluster-1", POOL, 1).await.unwrap();
    (disk, store)
}

fn break_disk(disk: &SimDisk, op: FaultOp, path: &str, kind: io::ErrorKind) {
    disk.inject(Fault { op, path: path.into(), after: 0, times: u64::MAX, kind });
}

async fn begin(store: &Arc<BlockStore>, id: i64, volume: usize) -> ReplicaWriter {
    let storage_id = store.volume(volume).storage_id().to_owned();
    let new = NewReplica { block: BlockId(id), generation: GEN, storage_id, block_size: 1 << 20, temporary: false };
    store.create(new).await.unwrap()
}

fn fill(writer: &mut ReplicaWriter, id: i64) -> Result<(), cairn_proto::Error> {
    writer.append(&[chunk(&frames(BlockId(id), &random(5_000, 1), 0, 1_000, false))])
}

async fn put(store: &Arc<BlockStore>, id: i64, volume: usize) {
    let mut writer = begin(store, id, volume).await;
    fill(&mut writer, id).unwrap();
    writer.finalize().unwrap();
}

/// Runs the keeper of the volumes until `good`.
async fn kept(store: &Arc<BlockStore>, settings: &DatanodeSettings, good: impl Fn() -> bool) {
    let wait = async {
        while !good() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::select! {
        error = keep(store, settings) => panic!("{error}"),
        () = wait => {}
        () = tokio::time::sleep(Duration::from_secs(600)) => panic!("nothing happened"),
    }
}

#[tokio::test(start_paused = true)]
async fn a_disk_that_refuses_writes_is_taken_out_and_its_writers_are_stopped() {
    for (op, kind) in [
        (FaultOp::Write, io::ErrorKind::Other),
        (FaultOp::Sync, io::ErrorKind::Other),
        (FaultOp::Write, io::ErrorKind::ReadOnlyFilesystem),
    ] {
        let (disk, store) = sim(&two()).await;
        put(&store, 1, 0).await;
        put(&store, 2, 1).await;
        let (mut writer, mut other) = (begin(&store, 3, 0).await, begin(&store, 4, 0).await);
        fill(&mut other, 4).unwrap();
        break_disk(&disk, op, "/a/", kind);
        let done = fill(&mut writer, 3).and_then(|()| writer.finalize());
        assert_eq!(done.unwrap_err().code(), ErrorCode::Io);
        kept(&store, &two(), || store.map().get(BlockId(1)).is_none()).await;
        let storages = store.storages().await;
        assert!(storages[0].failure.contains("/a/") && storages[0].blocks == 0, "{storages:?}");
        assert_eq!((storages[0].remaining, &*storages[1].failure), (0, ""));
        assert_eq!(store.read(BlockId(1), GEN).await.err().unwrap().code(), ErrorCode::BlockNotFound);
        assert!(store.read(BlockId(2), GEN).await.is_ok());
        // Nobody gets an ack of what lies there any more, though the disk takes it again.
        disk.clear_faults();
        assert_eq!(other.finalize().unwrap_err().code(), ErrorCode::Io);
        other.abandon();
        writer.abandon();
        assert_eq!(store.map().count(0), 0);
        // Whoever names the lost volume gets the other one.
        let storage_id = storages[0].storage_id.clone();
        let new = NewReplica { block: BlockId(5), generation: GEN, storage_id, block_size: 1 << 20, temporary: false };
        assert_eq!(store.create(new).await.unwrap().storage_id(), storages[1].storage_id);
    }
}

#[tokio::test(start_paused = true)]
async fn an_idle_dead_disk_is_noticed_and_a_full_one_is_not_called_dead() {
    let (disk, store) = sim(&two()).await;
    put(&store, 1, 0).await;
    break_disk(&disk, FaultOp::Write, "/b/", io::ErrorKind::StorageFull);
    break_disk(&disk, FaultOp::Write, "/a/", io::ErrorKind::Other);
    kept(&store, &two(), || store.volume(0).is_failed()).await;
    assert!(!store.volume(1).is_failed());
    let full = NewReplica {
        block: BlockId(2),
        generation: GEN,
        storage_id: String::new(),
        block_size: 1 << 20,
        temporary: false,
    };
    assert_eq!(store.create(full).await.err().unwrap().code(), ErrorCode::DiskFull);
    assert!(!store.volume(1).is_failed());
}

#[tokio::test(start_paused = true)]
async fn with_no_volume_left_the_reason_is_told() {
    let (disk, store) = sim(&two()).await;
    break_disk(&disk, FaultOp::Sync, "probe", io::ErrorKind::Other);
    let error = keep(&store, &two()).await;
    assert!(error.message().contains("2 of 2 volumes") && error.message().contains("/a"), "{error}");
    let strict = DatanodeSettings { failed_volumes_tolerated: Some(0), ..two() };
    let (disk, store) = sim(&strict).await;
    break_disk(&disk, FaultOp::Sync, "/b/probe", io::ErrorKind::Other);
    let error = keep(&store, &strict).await;
    assert!(error.message().contains("1 of 2 volumes"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn one_unreadable_replica_is_bad_several_are_a_failing_volume() {
    let (disk, store) = sim(&two()).await;
    for id in 1..=9 {
        put(&store, id, 0).await;
    }
    // A read that fails once is no verdict.
    disk.inject(Fault { op: FaultOp::Read, path: "/1_".into(), after: 1, times: 1, kind: io::ErrorKind::Other });
    store.verify(BlockId(1), GEN).await.unwrap();
    break_disk(&disk, FaultOp::Read, "/2_", io::ErrorKind::Other);
    assert_eq!(store.verify(BlockId(2), GEN).await.unwrap_err().code(), ErrorCode::Corrupt);
    assert!(matches!(store.map().get(BlockId(2)).unwrap().1.kind, Kind::Corrupt { .. }));
    assert!(!store.volume(0).is_failed());
    break_disk(&disk, FaultOp::Read, ".blk", io::ErrorKind::Other);
    for id in 3..=9 {
        store.verify(BlockId(id), GEN).await.unwrap_err();
    }
    assert!(store.volume(0).is_failed());
    let good = store.map().finalized(0, None, 100);
    assert!(good.iter().filter(|(_, entry)| matches!(entry.kind, Kind::Finalized { .. })).count() >= 4);
}

#[tokio::test]
async fn a_folder_that_vanishes_is_a_failed_volume_and_the_start_goes_on_without_it() {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let (gone, stays) = (dirs[0].path().join("v"), dirs[1].path().join("v"));
    let settings = settings(&[&gone, &stays]);
    let store = open_store(&settings).await;
    put(&store, 1, 0).await;
    put(&store, 2, 1).await;
    SystemFs.remove_dir_all(&gone).unwrap();
    assert!(store.read(BlockId(1), GEN).await.is_err());
    kept(&store, &settings, || store.volume(0).is_failed() && store.map().count(0) == 0).await;
    assert!(store.read(BlockId(2), GEN).await.is_ok());
    assert!(store.storages().await[0].failure.contains(gone.to_str().unwrap()));
    drop(store);
    // A file in the place of the folder: the disk is not what it was, but the node starts.
    let blocked = dirs[0].path().join("file/v");
    SystemFs.open(&dirs[0].path().join("file"), cairn_common::durable::OpenMode::Create).unwrap();
    let again = crate::testing::settings(&[&blocked, &stays]);
    let store = open_store(&again).await;
    assert_eq!((store.volumes().len(), store.failed_volumes().len()), (1, 1));
    assert!(store.read(BlockId(2), GEN).await.is_ok());
    drop(store);
    let strict = DatanodeSettings { failed_volumes_tolerated: Some(0), ..again };
    let error = BlockStore::open(&Env::system(), &strict).await.err().unwrap();
    assert!(error.message().contains(blocked.to_str().unwrap()), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_full_disk_keeps_what_was_acked_and_still_deletes() {
    let disk = SimDisk::new(300_000, Entropy::seeded(1));
    let env = Env { fs: Arc::new(disk.clone()), work: Work::inline(), ..Env::system() };
    let one = settings(&[Path::new("/a")]);
    let store = BlockStore::open(&env, &one).await.unwrap();
    store.join_cluster("cluster-1", POOL, 1).await.unwrap();
    let (data, small) = (random(100_000, 1), |id| NewReplica {
        block: BlockId(id),
        generation: GEN,
        storage_id: String::new(),
        block_size: 100_000,
        temporary: false,
    });
    let sealed = |id| frames(BlockId(id), &data, 0, 25_000, false);
    let mut first = store.create(small(1)).await.unwrap();
    first.append(&[chunk(&sealed(1))]).unwrap();
    first.finalize().unwrap();
    let mut second = store.create(small(2)).await.unwrap();
    second.append(&[chunk(&sealed(2)[..2])]).unwrap();
    // Somebody else fills the disk while the block is written: the promise of room is not worth the room.
    let other = disk.open(Path::new("/other"), cairn_common::durable::OpenMode::Create).unwrap();
    let left = disk.space(Path::new("/")).unwrap().available;
    other.write_all_at(&vec![0; left as usize - 1_000], 0).unwrap();
    assert_eq!(second.append(&[chunk(&sealed(2)[2..])]).unwrap_err().code(), ErrorCode::DiskFull);
    second.abandon();
    assert_eq!(store.read(BlockId(2), GEN).await.unwrap().length, 50_000);
    store.storages().await;
    assert_eq!(store.create(small(3)).await.err().unwrap().code(), ErrorCode::DiskFull);
    assert!(!store.volume(0).is_failed());
    let path = store.volume(0).finalized_path(BlockId(1), GEN, 100_000).unwrap();
    store.delete(BlockId(1), GEN, "").await.unwrap();
    assert!(disk.metadata(&path).unwrap().is_none() && store.map().get(BlockId(1)).is_none());
    assert!(store.read(BlockId(2), GEN).await.is_ok());
}

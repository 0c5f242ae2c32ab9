//! The scan at a start: what it finds is durable before it is reported, and one bad file is one bad file.

use std::io;
use std::path::Path;
use std::sync::Arc;

use cairn_common::Env;
use cairn_common::durable::Fs;
use cairn_common::entropy::Entropy;
use cairn_common::simdisk::{Fault, FaultOp, SimDisk};
use cairn_common::work::Work;
use cairn_proto::blockfile;
use cairn_proto::ids::BlockId;
use cairn_proto::pb::ReplicaState;

use super::BlockStore;
use super::map::Kind;
use super::ops::NewReplica;
use super::writer::ReplicaWriter;
use crate::testing::*;

const BLOCK: BlockId = BlockId(1_073_741_825);

async fn open(disk: &SimDisk, dirs: &[&str]) -> Arc<BlockStore> {
    let env = Env { fs: Arc::new(disk.clone()), work: Work::inline(), ..Env::system() };
    let dirs: Vec<&Path> = dirs.iter().map(Path::new).collect();
    let store = BlockStore::open(&env, &settings(&dirs)).await.unwrap();
    store.join_cluster("cluster-1", POOL, 1).await.unwrap();
    store
}

async fn begin(store: &Arc<BlockStore>, block: BlockId, volume: usize) -> ReplicaWriter {
    let storage_id = store.volume(volume).storage_id().to_owned();
    let new = NewReplica { block, generation: GEN, storage_id, block_size: 1 << 20, temporary: false };
    let mut writer = store.create(new).await.unwrap();
    writer.append(&[chunk(&frames(block, &random(5_000, 1), 0, 1_000, false))]).unwrap();
    writer
}

fn state(store: &BlockStore, block: BlockId) -> Option<ReplicaState> {
    let replicas = (0..store.volumes().len()).flat_map(|volume| store.map().range(volume, None).replicas);
    replicas.filter(|replica| replica.id == block.0).map(|replica| replica.state()).next()
}

#[tokio::test]
async fn what_a_killed_process_had_only_renamed_is_durable_before_it_is_reported() {
    for seed in 0..20 {
        let disk = SimDisk::new(1 << 30, Entropy::seeded(seed));
        let store = open(&disk, &["/v"]).await;
        let mut writer = begin(&store, BLOCK, 0).await;
        // It gets no further than the rename.
        let path = "finalized/00/00".into();
        disk.inject(Fault { op: FaultOp::Sync, path, after: 0, times: 1, kind: io::ErrorKind::Other });
        assert!(writer.finalize().is_err());
        disk.kill();
        drop((writer, store));
        let store = open(&disk, &["/v"]).await;
        assert_eq!(state(&store, BLOCK), Some(ReplicaState::Finalized), "seed {seed}");
        drop(store);
        disk.crash();
        let store = open(&disk, &["/v"]).await;
        assert_eq!(state(&store, BLOCK), Some(ReplicaState::Finalized), "seed {seed}: reported, then lost");
        store.verify(BLOCK, GEN).await.unwrap();
    }
}

#[tokio::test]
async fn a_volume_that_cannot_be_synced_at_a_start_reports_nothing() {
    let disk = SimDisk::new(1 << 30, Entropy::seeded(1));
    let store = open(&disk, &["/a", "/b"]).await;
    for (id, volume) in [(1, 0), (2, 1)] {
        begin(&store, BlockId(id), volume).await.finalize().unwrap();
    }
    drop(store);
    // The first sync there is that of the pool's folder.
    let path = "/a/pool-1".into();
    disk.inject(Fault { op: FaultOp::Sync, path, after: 1, times: u64::MAX, kind: io::ErrorKind::Other });
    let store = open(&disk, &["/a", "/b"]).await;
    assert!(store.volume(0).failure().is_some_and(|why| why.contains("syncing the volume")));
    assert_eq!((state(&store, BlockId(1)), state(&store, BlockId(2))), (None, Some(ReplicaState::Finalized)));
}

#[tokio::test]
async fn one_file_that_cannot_be_read_is_set_aside_and_the_volume_serves() {
    let (bad, good, whole) = (BLOCK, BlockId(BLOCK.0 + 1), BlockId(BLOCK.0 + 2));
    let name = blockfile::unfinalized_name(bad, GEN);
    // Its length, its header, a frame in the middle, its opening.
    for (op, after, kind) in [
        (FaultOp::Read, 0, io::ErrorKind::Other),
        (FaultOp::Read, 1, io::ErrorKind::Other),
        (FaultOp::Read, 6, io::ErrorKind::Other),
        (FaultOp::Name, 0, io::ErrorKind::PermissionDenied),
    ] {
        let disk = SimDisk::new(1 << 30, Entropy::seeded(1));
        let store = open(&disk, &["/v"]).await;
        let mut writers = Vec::new();
        for block in [bad, good] {
            writers.push(begin(&store, block, 0).await);
        }
        begin(&store, whole, 0).await.finalize().unwrap();
        disk.kill();
        drop((writers, store));
        disk.inject(Fault { op, path: format!("rbw/{name}"), after, times: 1, kind });
        for _ in 0..2 {
            let store = open(&disk, &["/v"]).await;
            assert_eq!(store.volume(0).failure(), None, "{op:?} {after}");
            assert_eq!(state(&store, bad), Some(ReplicaState::ReplicaCorrupt), "{op:?} {after}");
            assert_eq!(state(&store, good), Some(ReplicaState::Recovering), "{op:?} {after}");
            assert_eq!(state(&store, whole), Some(ReplicaState::Finalized), "{op:?} {after}");
            let Kind::Corrupt { path, stored, .. } = store.map().get(bad).unwrap().1.kind else { panic!() };
            assert_eq!(path, Path::new("/v/pool-1/corrupt").join(&name));
            assert!(stored > 5_000, "nothing of it was cut: {stored}");
        }
    }
}

#[tokio::test]
async fn a_folder_in_the_place_of_a_file_is_set_aside() {
    let disk = SimDisk::new(1 << 30, Entropy::seeded(1));
    let store = open(&disk, &["/v"]).await;
    begin(&store, BLOCK, 0).await.finalize().unwrap();
    drop(store);
    let other = BlockId(BLOCK.0 + 1);
    let name = blockfile::unfinalized_name(other, GEN);
    for folder in ["rbw", "tmp"] {
        disk.create_dir_all(&Path::new("/v/pool-1").join(folder).join(&name).join("inner")).unwrap();
    }
    let store = open(&disk, &["/v"]).await;
    assert_eq!((store.volume(0).failure(), state(&store, BLOCK)), (None, Some(ReplicaState::Finalized)));
    for name in [name.clone(), format!("{name}.1")] {
        let aside = Path::new("/v/pool-1/corrupt").join(name).join("inner");
        assert!(disk.metadata(&aside).unwrap().is_some(), "{} is gone", aside.display());
    }
    begin(&store, other, 0).await.finalize().unwrap();
}

#[tokio::test]
async fn many_files_that_cannot_be_read_or_a_folder_that_cannot_take_the_volume_out() {
    for (path, kept) in [("/a/pool-1/rbw/", 6), ("/a/pool-1/rbw", 1)] {
        let disk = SimDisk::new(1 << 30, Entropy::seeded(1));
        let store = open(&disk, &["/a", "/b"]).await;
        let mut writers = Vec::new();
        for id in 0..kept {
            writers.push(begin(&store, BlockId(BLOCK.0 + id), 0).await);
        }
        disk.kill();
        drop((writers, store));
        let kind = io::ErrorKind::Other;
        disk.inject(Fault { op: FaultOp::Read, path: path.into(), after: 0, times: u64::MAX, kind });
        let store = open(&disk, &["/a", "/b"]).await;
        assert!(store.volume(0).failure().is_some(), "{path}");
        assert_eq!((store.map().count(0), store.volume(1).failure()), (0, None), "{path}");
    }
}

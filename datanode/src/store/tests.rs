//! The store on real folders: writes, crashes, wrong files, several volumes, a full one.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use cairn_common::Env;
use cairn_common::durable::{Fs, OpenMode, SystemFs, read_all};
use cairn_common::entropy::Entropy;
use cairn_common::simdisk::{Fault, FaultOp, SimDisk};
use cairn_common::work::Work;
use cairn_proto::ErrorCode;
use cairn_proto::ids::{BlockId, Generation};

use super::BlockStore;
use super::map::{Entry, Kind};
use super::ops::NewReplica;
use super::writer::ReplicaWriter;
use crate::testing::*;

const BLOCK: BlockId = BlockId(1_073_741_825);

fn new(block: BlockId) -> NewReplica {
    NewReplica { block, generation: GEN, storage_id: String::new(), block_size: 1 << 20, temporary: false }
}

async fn write(store: &Arc<BlockStore>, block: BlockId, data: &[u8], frame: usize) -> ReplicaWriter {
    let mut writer = store.create(new(block)).await.unwrap();
    writer.append(&[chunk(&frames(block, data, 0, frame, false))]).unwrap();
    writer
}

/// All files below, with their contents.
fn files(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut out = Vec::new();
    for entry in SystemFs.read_dir(dir).unwrap() {
        let path = dir.join(&entry.name);
        if entry.is_dir {
            out.extend(files(&path));
        } else if entry.name.ends_with(".blk") || entry.name.ends_with(".rbw") {
            out.push((path.clone(), read_all(&SystemFs, &path, 1 << 30).unwrap()));
        }
    }
    out
}

fn put(path: &Path, bytes: &[u8]) {
    let file = SystemFs.open(path, OpenMode::WriteOrCreate).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
    file.write_all_at(bytes, 0).unwrap();
}

#[tokio::test]
async fn finalized_replicas_are_there_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let settings = settings(&[dir.path()]);
    let data = random(700_000, 1);
    let used = {
        let store = open_store(&settings).await;
        let mut writer = write(&store, BLOCK, &data, 100_000).await;
        writer.finalize().unwrap();
        assert_eq!(store.read(BLOCK, GEN).await.unwrap().length, 700_000);
        store.volume(0).usage().used
    };
    let store = open_store(&settings).await;
    let read = store.read(BLOCK, GEN).await.unwrap();
    assert_eq!((read.length, read.index.crc32c()), (700_000, crc32c::crc32c(&data)));
    assert_eq!(store.volume(0).usage().used, used);
    assert_eq!(read.stored, used);
    store.verify(BLOCK, GEN).await.unwrap();
    store.delete(BLOCK, GEN, "").await.unwrap();
    assert_eq!(store.volume(0).usage().used, 0);
    assert!(files(dir.path()).is_empty());
    assert_eq!(store.delete(BLOCK, GEN, "").await.unwrap_err().code(), ErrorCode::BlockNotFound);
}

#[tokio::test]
async fn quarantine_keeps_a_replica_for_a_while_and_gives_it_back() {
    let dir = tempfile::tempdir().unwrap();
    let settings = settings(&[dir.path()]);
    let data = random(70_000, 1);
    let other = BlockId(BLOCK.0 + 1);
    let used = {
        let store = open_store(&settings).await;
        for block in [BLOCK, other] {
            write(&store, block, &data, 100_000).await.finalize().unwrap();
        }
        let used = store.volume(0).usage().used;
        let newer = Generation(GEN.0 + 1);
        assert_eq!(store.quarantine(BLOCK, GEN, "elsewhere", 1).await.unwrap_err().code(), ErrorCode::BlockNotFound);
        store.quarantine(BLOCK, newer, "", 1).await.unwrap();
        store.quarantine(other, GEN, "", 1).await.unwrap();
        assert_eq!(store.read(BLOCK, GEN).await.err().unwrap().code(), ErrorCode::BlockNotFound, "not served");
        assert_eq!(
            (store.map().count(0), store.volume(0).usage().used),
            (0, used),
            "not reported, but its room is taken"
        );
        used
    };
    assert!(files(dir.path()).is_empty(), "no file has a block's name");
    let store = open_store(&settings).await;
    assert_eq!((store.map().count(0), store.volume(0).usage().used), (0, used), "a restart changes nothing");
    // One of the blocks was written anew meanwhile: that one stays.
    write(&store, other, &data, 100_000).await.finalize().unwrap();
    assert_eq!(store.bring_back().await, 1);
    assert_eq!(store.verify(BLOCK, GEN).await.unwrap().0, 70_000);
    assert_eq!(store.empty_quarantine(store.env().clock.wall_ms() - 60_000).await, 0, "too young");
    assert_eq!(store.empty_quarantine(store.env().clock.wall_ms() + 60_000).await, 1);
    assert_eq!(store.volume(0).usage().used, used);
    assert_eq!(store.bring_back().await, 0);
    let store = {
        drop(store);
        open_store(&settings).await
    };
    assert_eq!((store.map().count(0), store.volume(0).usage().used), (2, used));
}

#[tokio::test]
async fn a_crash_at_any_byte_near_the_end_keeps_the_whole_frames() {
    let dir = tempfile::tempdir().unwrap();
    let settings = settings(&[dir.path()]);
    let data = random(3_000, 1);
    let (path, bytes) = {
        let store = open_store(&settings).await;
        // The writer is never ended, as in a crash.
        let _writer = write(&store, BLOCK, &data, 1_000).await;
        files(dir.path()).pop().unwrap()
    };
    let ends = [32 + 1_032, 32 + 2 * 1_032, 32 + 3 * 1_032];
    assert_eq!(bytes.len(), ends[2]);
    for keep in (0..=bytes.len()).rev().step_by(7).chain(ends).chain(ends.map(|end| end - 1)) {
        put(&path, &bytes[..keep]);
        let store = open_store(&settings).await;
        let whole = ends.iter().filter(|end| **end <= keep).count();
        if keep < 32 {
            assert!(store.map().get(BLOCK).is_none(), "{keep}");
            continue;
        }
        let (_, entry) = store.map().get(BLOCK).unwrap();
        let Kind::Recovering { index, .. } = entry.kind else { panic!() };
        assert_eq!(index.data_length(), whole as u64 * 1_000, "{keep}");
        let cut = SystemFs.metadata(&path).unwrap().unwrap().len;
        assert_eq!(cut, if whole == 0 { 32 } else { ends[whole - 1] as u64 });
    }
    // Garbage after the last frame, and a tail that was written but never renamed, are cut the same way.
    let mut garbage = bytes.clone();
    garbage.extend_from_slice(&random(500, 4));
    put(&path, &garbage);
    let store = open_store(&settings).await;
    assert_eq!(store.read(BLOCK, GEN).await.unwrap().length, 3_000);
}

#[tokio::test]
async fn a_flipped_bit_in_an_open_file_cuts_before_it() {
    let dir = tempfile::tempdir().unwrap();
    let settings = settings(&[dir.path()]);
    let (path, mut bytes) = {
        let store = open_store(&settings).await;
        let _writer = write(&store, BLOCK, &random(3_000, 1), 1_000).await;
        files(dir.path()).pop().unwrap()
    };
    bytes[32 + 1_032 + 500] ^= 1;
    put(&path, &bytes);
    let store = open_store(&settings).await;
    assert_eq!(store.read(BLOCK, GEN).await.unwrap().length, 1_000);
}

#[tokio::test]
async fn wrong_finalized_files_are_set_aside_never_served() {
    let data = random(300_000, 1);
    let damages: [fn(&Path, &mut Vec<u8>) -> PathBuf; 5] = [
        |path, bytes| {
            bytes.truncate(bytes.len() - 1);
            path.to_owned()
        },
        |path, bytes| {
            bytes[40] ^= 1;
            bytes[9] ^= 1;
            path.to_owned()
        },
        |path, bytes| {
            bytes.clear();
            path.to_owned()
        },
        |path, _| PathBuf::from(path.to_string_lossy().replace("_300000.blk", "_300001.blk")),
        |path, bytes| {
            let at = bytes.len() - 30;
            bytes[at] ^= 1;
            path.to_owned()
        },
    ];
    for (number, damage) in damages.into_iter().enumerate() {
        let dir = tempfile::tempdir().unwrap();
        let settings = settings(&[dir.path()]);
        let (path, mut bytes) = {
            let store = open_store(&settings).await;
            write(&store, BLOCK, &data, 100_000).await.finalize().unwrap();
            files(dir.path()).pop().unwrap()
        };
        let to = damage(&path, &mut bytes);
        SystemFs.rename(&path, &to).unwrap();
        put(&to, &bytes);
        for start in 0..2 {
            let store = open_store(&settings).await;
            store.map().begin_stream();
            let error = store.read(BLOCK, GEN).await.err().unwrap();
            assert_eq!(error.code(), ErrorCode::Corrupt, "damage {number}, start {start}: {error}");
            assert!(error.message().contains(".blk"), "{error}");
            assert!(matches!(store.map().get(BLOCK).unwrap().1.kind, Kind::Corrupt { .. }));
            assert!(files(dir.path()).iter().all(|(path, _)| path.parent().unwrap().ends_with("corrupt")));
        }
    }
}

#[tokio::test]
async fn a_file_that_a_power_cut_left_under_both_names_is_set_aside_for_good() {
    let dir = tempfile::tempdir().unwrap();
    let settings = settings(&[dir.path()]);
    let path = {
        let store = open_store(&settings).await;
        write(&store, BLOCK, &random(3_000, 1), 1_000).await.finalize().unwrap();
        files(dir.path()).pop().unwrap().0
    };
    put(&path, b"short");
    let aside = path.ancestors().nth(4).unwrap().join("corrupt").join(path.file_name().unwrap());
    std::fs::hard_link(&path, &aside).unwrap();
    let store = open_store(&settings).await;
    assert!(matches!(store.map().get(BLOCK).unwrap().1.kind, Kind::Corrupt { .. }));
    assert_eq!(files(dir.path()), [(aside, b"short".to_vec())]);
}

#[tokio::test]
async fn a_replica_that_reports_do_not_show_is_not_announced() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_store(&settings(&[dir.path()])).await;
    let _copy = store.create(NewReplica { temporary: true, ..new(BLOCK) }).await.unwrap();
    store.map().begin_stream();
    store.map().announce_replica(BLOCK, false);
    assert!(store.map().take_changes(9).reports.is_empty());
}

#[tokio::test]
async fn a_flipped_bit_in_the_data_is_found_by_verify_and_reported() {
    let dir = tempfile::tempdir().unwrap();
    let settings = settings(&[dir.path()]);
    let store = open_store(&settings).await;
    write(&store, BLOCK, &random(300_000, 1), 100_000).await.finalize().unwrap();
    let (path, mut bytes) = files(dir.path()).pop().unwrap();
    bytes[200_000] ^= 8;
    put(&path, &bytes);
    store.map().begin_stream();
    assert_eq!(store.verify(BLOCK, GEN).await.unwrap_err().code(), ErrorCode::Corrupt);
    assert_eq!(store.map().take_changes(9).reports.len(), 1);
    // A good copy may take its place.
    let mut copy = store.create(NewReplica { temporary: true, ..new(BLOCK) }).await.unwrap();
    assert_eq!(store.read(BLOCK, GEN).await.err().unwrap().code(), ErrorCode::BlockNotFound);
    copy.append(&[chunk(&frames(BLOCK, &random(300_000, 1), 0, 100_000, false))]).unwrap();
    copy.finalize().unwrap();
    store.verify(BLOCK, GEN).await.unwrap();
    assert_eq!(files(dir.path()).len(), 1);
}

#[tokio::test]
async fn files_with_foreign_names_do_no_harm() {
    let dir = tempfile::tempdir().unwrap();
    let settings = settings(&[dir.path()]);
    drop(open_store(&settings).await);
    let pool = dir.path().join(POOL);
    let folder = pool.join("finalized/00/00");
    SystemFs.create_dir_all(&folder).unwrap();
    put(&folder.join("notes.txt"), b"hello");
    put(&folder.join("5_1001_10.blk"), b"short");
    put(&pool.join("rbw/what.rbw"), b"x");
    put(&pool.join("tmp/9_1001.rbw"), b"x");
    let store = open_store(&settings).await;
    assert!(matches!(store.map().get(BlockId(5)).unwrap().1.kind, Kind::Corrupt { .. }));
    assert_eq!(store.map().count(0), 1);
    assert!(store.map().get(BlockId(9)).is_none());
}

#[tokio::test]
async fn volumes_share_the_load_and_belong_together() {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let two = settings(&[dirs[0].path(), dirs[1].path()]);
    {
        let store = open_store(&two).await;
        for id in 1..=10 {
            write(&store, BlockId(id), &random(1_000, 1), 1_000).await.finalize().unwrap();
        }
        assert_eq!((store.map().count(0), store.map().count(1)), (5, 5));
        let busy = BlockStore::open(store.env(), &two).await.err().unwrap();
        assert!(busy.message().contains("in use"), "{busy}");
    }
    let three = settings(&[dirs[0].path(), dirs[1].path(), dirs[2].path()]);
    {
        let store = open_store(&three).await;
        assert_eq!(store.volumes().len(), 3);
    }
    let other = tempfile::tempdir().unwrap();
    drop(open_store(&settings(&[other.path()])).await);
    let mixed = settings(&[dirs[0].path(), other.path()]);
    let error = BlockStore::open(&cairn_common::Env::system(), &mixed).await.err().unwrap();
    assert_eq!(error.code(), ErrorCode::WrongCluster);
}

#[tokio::test]
async fn a_folder_of_something_else_or_of_another_cluster_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    put(&dir.path().join("thesis.tex"), b"x");
    let env = cairn_common::Env::system();
    let error = BlockStore::open(&env, &settings(&[dir.path()])).await.err().unwrap();
    assert!(error.message().contains("thesis.tex"), "{error}");
    let dir = tempfile::tempdir().unwrap();
    put(&dir.path().join("VERSION"), b"role = \"namenode\"\n");
    let error = BlockStore::open(&env, &settings(&[dir.path()])).await.err().unwrap();
    assert!(error.message().contains("namenode"), "{error}");
    put(&dir.path().join("VERSION"), b"role = \"datanode\"\nlayout = 99\n");
    let error = BlockStore::open(&env, &settings(&[dir.path()])).await.err().unwrap();
    assert!(error.message().contains("layout 99"), "{error}");
    let dir = tempfile::tempdir().unwrap();
    let store = open_store(&settings(&[dir.path()])).await;
    let error = store.join_cluster("cluster-2", POOL, 1).await.unwrap_err();
    assert!(error.message().contains("cluster-1") && error.message().contains("cluster-2"), "{error}");
    store.join_cluster("cluster-1", POOL, 5).await.unwrap();
    drop(store);
    let store = BlockStore::open(&env, &settings(&[dir.path()])).await.unwrap();
    assert_eq!(store.join_cluster("cluster-1", POOL, 4).await.unwrap_err().code(), ErrorCode::StaleEpoch);
}

#[tokio::test]
async fn a_full_volume_says_so_and_keeps_nothing_half_made() {
    let dir = tempfile::tempdir().unwrap();
    let mut settings = settings(&[dir.path()]);
    settings.capacity_bytes = Some(3 << 20);
    let store = open_store(&settings).await;
    let mut writer = store.create(new(BLOCK)).await.unwrap();
    let data = random(4 << 20, 1);
    let error = writer.append(&[chunk(&frames(BLOCK, &data, 0, 1 << 20, false))]).unwrap_err();
    assert_eq!(error.code(), ErrorCode::DiskFull);
    writer.abandon();
    assert!(files(dir.path()).is_empty());
    assert_eq!(store.volume(0).usage().used, 0);
    assert_eq!(store.volume(0).usage().remaining, 3 << 20);
    let big = NewReplica { block_size: 128 << 20, ..new(BLOCK) };
    assert_eq!(store.create(big).await.err().unwrap().code(), ErrorCode::DiskFull);
    assert!(store.map().get(BLOCK).is_none());
}

#[tokio::test]
async fn a_full_disk_keeps_what_may_have_been_acked() {
    let dir = tempfile::tempdir().unwrap();
    let mut settings = settings(&[dir.path()]);
    settings.capacity_bytes = Some(3 << 20);
    let data = random(4 << 20, 1);
    let sealed = frames(BLOCK, &data, 0, 1 << 20, false);
    {
        let store = open_store(&settings).await;
        let mut writer = store.create(new(BLOCK)).await.unwrap();
        writer.append(&[chunk(&sealed[..1])]).unwrap();
        assert_eq!(writer.append(&[chunk(&sealed[1..])]).unwrap_err().code(), ErrorCode::DiskFull);
        writer.abandon();
        assert!(matches!(store.map().get(BLOCK).unwrap().1.kind, Kind::Recovering { .. }));
    }
    let read = open_store(&settings).await.read(BLOCK, GEN).await.unwrap();
    assert_eq!((read.length, read.index.crc32c()), (1 << 20, crc32c::crc32c(&data[..1 << 20])));
}

#[tokio::test]
async fn a_file_with_its_final_name_is_never_cut() {
    let disk = SimDisk::new(1 << 30, Entropy::seeded(1));
    let env = Env { fs: Arc::new(disk.clone()), work: Work::inline(), ..Env::system() };
    let settings = settings(&[Path::new("/volume")]);
    {
        let store = BlockStore::open(&env, &settings).await.unwrap();
        store.join_cluster("cluster-1", POOL, 1).await.unwrap();
        let mut writer = write(&store, BLOCK, &random(5_000, 1), 1_000).await;
        let path = format!("/{POOL}/finalized/00/00");
        disk.inject(Fault { op: FaultOp::Sync, path, after: 0, times: 1, kind: std::io::ErrorKind::Other });
        assert_eq!(writer.finalize().unwrap_err().code(), ErrorCode::Io);
        writer.abandon();
        assert!(store.volume(0).failure().is_some(), "a volume whose disk fails is out of service");
        assert_eq!(store.read(BLOCK, GEN).await.unwrap().length, 5_000);
    }
    let store = BlockStore::open(&env, &settings).await.unwrap();
    store.verify(BLOCK, GEN).await.unwrap();
}

#[tokio::test]
async fn a_folder_that_somebody_else_made_is_made_durable_too() {
    for seed in 0..20 {
        let disk = SimDisk::new(1 << 30, Entropy::seeded(seed));
        let env = Env { fs: Arc::new(disk.clone()), work: Work::inline(), ..Env::system() };
        let settings = settings(&[Path::new("/volume")]);
        {
            let store = BlockStore::open(&env, &settings).await.unwrap();
            store.join_cluster("cluster-1", POOL, 1).await.unwrap();
            disk.create_dir_all(&Path::new("/volume").join(POOL).join("finalized/00/00")).unwrap();
            write(&store, BLOCK, &random(5_000, 1), 1_000).await.finalize().unwrap();
        }
        disk.crash();
        let store = BlockStore::open(&env, &settings).await.unwrap();
        store.verify(BLOCK, GEN).await.unwrap();
    }
}

#[tokio::test]
async fn a_deletion_spares_a_newer_generation() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_store(&settings(&[dir.path()])).await;
    write(&store, BLOCK, &random(1_000, 1), 1_000).await.finalize().unwrap();
    let error = store.delete(BLOCK, Generation(GEN.0 - 1), "").await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::StaleGeneration);
    assert_eq!(store.delete(BLOCK, GEN, "another volume").await.unwrap_err().code(), ErrorCode::BlockNotFound);
    store.read(BLOCK, GEN).await.unwrap();
}

#[tokio::test]
async fn a_file_that_vanished_is_given_up_and_reported() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_store(&settings(&[dir.path()])).await;
    write(&store, BLOCK, &random(1_000, 1), 1_000).await.finalize().unwrap();
    store.map().begin_stream();
    let (path, _) = files(dir.path()).pop().unwrap();
    SystemFs.remove_file(&path).unwrap();
    assert_eq!(store.read(BLOCK, GEN).await.err().unwrap().code(), ErrorCode::BlockNotFound);
    assert_eq!(store.map().take_changes(9).reports.len(), 1);
    assert!(store.map().get(BLOCK).is_none());
}

/// What a run promised, and after how many syncs.
#[derive(Default)]
struct Promised {
    synced_after: u64,
    finalized_after: u64,
}

/// Writes three frames, syncs, writes two, finalizes; all on a simulated disk.
async fn scripted_run(disk: &SimDisk, data: &[u8]) -> Promised {
    let env = Env { fs: Arc::new(disk.clone()), work: Work::inline(), ..Env::system() };
    let settings = settings(&[Path::new("/volume")]);
    let mut promised = Promised::default();
    let store = BlockStore::open(&env, &settings).await.unwrap();
    store.join_cluster("cluster-1", POOL, 1).await.unwrap();
    let sealed = frames(BLOCK, data, 0, 1_000, false);
    let mut writer = store.create(new(BLOCK)).await.unwrap();
    writer.append(&[chunk(&sealed[..3])]).unwrap();
    writer.sync().unwrap();
    promised.synced_after = disk.syncs();
    writer.append(&[chunk(&sealed[3..])]).unwrap();
    writer.finalize().unwrap();
    promised.finalized_after = disk.syncs();
    promised
}

#[tokio::test]
async fn a_power_cut_before_any_sync_loses_nothing_that_was_promised() {
    let data = random(5_000, 3);
    let total = {
        let disk = SimDisk::new(1 << 30, Entropy::seeded(1));
        scripted_run(&disk, &data).await;
        disk.syncs()
    };
    assert!(total >= 6, "{total} syncs");
    for k in 1..=total + 1 {
        for seed in 0..20 {
            let disk = SimDisk::new(1 << 30, Entropy::seeded(seed));
            disk.freeze_at_sync(k);
            let promised = scripted_run(&disk, &data).await;
            disk.crash();
            let env = Env { fs: Arc::new(disk.clone()), work: Work::inline(), ..Env::system() };
            let store = BlockStore::open(&env, &settings(&[Path::new("/volume")])).await.unwrap();
            let held = match store.map().get(BLOCK) {
                None => 0,
                // Nothing of it was durable, and what reached the disk does not verify.
                Some((_, Entry { kind: Kind::Corrupt { .. }, .. })) => 0,
                Some((_, entry)) => {
                    let finalized = matches!(entry.kind, Kind::Finalized { .. });
                    let read = store.read(BLOCK, GEN).await.unwrap();
                    assert_eq!(read.length % 1_000, 0);
                    assert_eq!(read.index.crc32c(), crc32c::crc32c(&data[..read.length as usize]));
                    if finalized {
                        store.verify(BLOCK, GEN).await.unwrap();
                    }
                    assert!(finalized || k <= promised.finalized_after, "sync {k}, seed {seed}");
                    read.length
                }
            };
            let least = match k {
                k if k > promised.finalized_after => 5_000,
                k if k > promised.synced_after => 3_000,
                _ => 0,
            };
            assert!(held >= least, "sync {k}, seed {seed}: {held} of {least}");
        }
    }
}

#[tokio::test]
async fn a_disk_that_fails_takes_its_volume_out_of_service() {
    let disk = SimDisk::new(1 << 30, Entropy::seeded(1));
    let env = Env { fs: Arc::new(disk.clone()), work: Work::inline(), ..Env::system() };
    let store = BlockStore::open(&env, &settings(&[Path::new("/a"), Path::new("/b")])).await.unwrap();
    store.join_cluster("cluster-1", POOL, 1).await.unwrap();
    disk.inject(Fault {
        op: FaultOp::Write,
        path: "/a/".into(),
        after: 0,
        times: u64::MAX,
        kind: std::io::ErrorKind::Other,
    });
    let mut done = 0;
    for id in 1..=6 {
        let Ok(mut writer) = store.create(new(BlockId(id))).await else { continue };
        match writer.append(&[chunk(&frames(BlockId(id), &random(5_000, 1), 0, 1_000, false))]) {
            Ok(()) => {
                writer.finalize().unwrap();
                done += 1;
            }
            Err(error) => {
                assert_eq!(error.code(), ErrorCode::Io);
                writer.abandon();
            }
        }
    }
    assert!(done >= 3);
    let storages = store.storages().await;
    assert!(storages[1].failure.is_empty() && storages[1].blocks == done);
}

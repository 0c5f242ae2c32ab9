//! The log: what a crash, a flipped bit, a lost file and a failing disk do to it.

mod dirs;
mod faulty;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use cairn_common::durable::{Fs, OpenMode, SystemFs, read_all};
use cairn_common::entropy::Entropy;
use cairn_common::simdisk::{Fault, FaultOp, SimDisk};
use cairn_proto::ids::{Epoch, TxId};
use cairn_proto::{ErrorCode, pb};
use prost::Message;

use self::faulty::FaultyFs;
use super::format::{HEADER_BYTES, RECORD_OVERHEAD, segment_name};
use super::*;

const CLUSTER: &str = "11111111-2222-4333-8444-555555555555";
const SIZES: LogSizes = LogSizes { segment_bytes: 1 << 20, step_bytes: 4_096 };

fn edit(number: u64) -> pb::Edit {
    let epoch = pb::EditEpoch { epoch: number * 7 };
    pb::Edit { min_reader: 1, time_ms: 1_000 + number, kind: Some(pb::edit::Kind::Epoch(epoch)), ..Default::default() }
}

fn facts() -> ClusterFacts {
    ClusterFacts { cluster_id: CLUSTER.into(), pool_id: "BP-1".into(), epoch: Epoch(1) }
}

/// Locked directories below a temporary one.
fn open(fs: &dyn Fs, paths: &[PathBuf]) -> Vec<Arc<MetaDir>> {
    let mut count = 0;
    let mut id = || {
        count += 1;
        format!("dir-{count}")
    };
    let set = open_set(fs, paths, false, &mut id).unwrap();
    set.found.into_iter().map(|one| one.dir).collect()
}

fn formatted(fs: &Arc<dyn Fs>, paths: &[PathBuf], sizes: LogSizes) -> LogWriter {
    let dirs = open(&**fs, paths);
    let set: Vec<String> = dirs.iter().map(|dir| dir.id().to_owned()).collect();
    for dir in &dirs {
        dir.write_version(&**fs, &facts(), DirState::Ready, &set).unwrap();
        dir.clear(&**fs).unwrap();
    }
    LogWriter::create(Arc::clone(fs), dirs, facts(), sizes, (TxId(0), 0)).unwrap()
}

fn append(writer: &mut LogWriter, range: std::ops::RangeInclusive<u64>) {
    for number in range {
        writer.append(TxId(number), &edit(number)).unwrap();
    }
}

/// A log of the given batches; returns its folder.
fn log_of(dir: &Path, batches: &[std::ops::RangeInclusive<u64>], sizes: LogSizes) -> PathBuf {
    let fs: Arc<dyn Fs> = Arc::new(SystemFs);
    let mut writer = formatted(&fs, &[dir.to_owned()], sizes);
    for batch in batches {
        append(&mut writer, batch.clone());
        writer.flush().unwrap();
    }
    dir.join("log")
}

fn read(log: &Path, from: u64) -> Result<(Vec<u64>, LogEnd), LogError> {
    let mut seen = Vec::new();
    let end = read_log(&SystemFs, log, CLUSTER, TxId(from), |record, payload| {
        assert_eq!(pb::Edit::decode(payload).unwrap(), edit(record.txid.0));
        seen.push(record.txid.0);
        Ok(())
    })?;
    Ok((seen, end))
}

fn bytes_of(path: &Path) -> Vec<u8> {
    read_all(&SystemFs, path, 1 << 30).unwrap()
}

fn put(path: &Path, bytes: &[u8]) {
    let file = SystemFs.open(path, OpenMode::WriteOrCreate).unwrap();
    file.set_len(0).unwrap();
    file.write_all_at(bytes, 0).unwrap();
}

fn first_segment(log: &Path) -> PathBuf {
    log.join(segment_name(TxId(1)))
}

#[test]
fn reads_back_what_was_written_across_segments() {
    let dir = tempfile::tempdir().unwrap();
    let sizes = LogSizes { segment_bytes: 4 << 10, step_bytes: 512 };
    let log = log_of(dir.path(), &[1..=40, 41..=41, 42..=200, 201..=400], sizes);
    assert!(list_segments(&SystemFs, &log).unwrap().len() > 2);
    let (seen, end) = read(&log, 1).unwrap();
    assert_eq!(seen, (1..=400).collect::<Vec<_>>());
    assert_eq!(end.last, TxId(400));
    let (seen, _) = read(&log, 150).unwrap();
    assert_eq!(seen, (150..=400).collect::<Vec<_>>());
    // One behind the end is where a log without news is read from.
    assert_eq!(read(&log, 401).unwrap().0, Vec::<u64>::new());
    assert!(matches!(read(&log, 402), Err(LogError::Gap { from: 401, to: 401, .. })));
}

#[test]
fn a_tail_torn_at_any_byte_is_cut_at_the_last_good_record() {
    let dir = tempfile::tempdir().unwrap();
    let log = log_of(dir.path(), &[1..=3, 4..=6], SIZES);
    let path = first_segment(&log);
    let whole = bytes_of(&path);
    let record = RECORD_OVERHEAD + edit(1).encoded_len();
    let end = whole.iter().rposition(|&byte| byte != 0).unwrap() + 1;
    assert_eq!(end, HEADER_BYTES + 6 * record);
    for cut in HEADER_BYTES..=end {
        let good = ((cut - HEADER_BYTES) / record) as u64;
        // Cut short, and cut with the zeros that were written ahead behind it.
        for length in [cut, whole.len()] {
            let mut torn = whole[..cut].to_vec();
            torn.resize(length, 0);
            put(&path, &torn);
            let (seen, end) = read(&log, 1).unwrap_or_else(|error| panic!("cut at {cut}: {error}"));
            assert_eq!(seen, (1..=good).collect::<Vec<_>>(), "cut at {cut}");
            cut_tail(&SystemFs, &end.tail.unwrap()).unwrap();
            assert_eq!(read(&log, 1).unwrap().0, seen, "cut at {cut}");
        }
    }
}

#[test]
fn a_flipped_bit_anywhere_stops_the_start_or_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let log = log_of(dir.path(), &[1..=20, 21..=21, 22..=40], LogSizes { segment_bytes: 1 << 20, step_bytes: 64 });
    let path = first_segment(&log);
    let whole = bytes_of(&path);
    let end = whole.iter().rposition(|&byte| byte != 0).unwrap() + 1;
    for at in 0..whole.len() {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (at % 8);
        put(&path, &bytes);
        match read(&log, 1) {
            Ok((seen, _)) => {
                // In the unused room behind the records: harmless where it looks like a torn batch.
                assert!(at >= end, "a flip at {at} went unseen, {} transactions read", seen.len());
                assert_eq!(seen.len(), 40);
            }
            Err(error) => {
                let text = error.to_string();
                assert!(text.contains(path.to_str().unwrap()) && text.contains("offset"), "{text}");
                assert!(text.contains("--restore"), "{text}");
            }
        }
    }
}

#[test]
fn a_batch_whose_first_sectors_never_arrived_is_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    let log = log_of(dir.path(), &[1..=5, 6..=60], SIZES);
    let path = first_segment(&log);
    let mut bytes = bytes_of(&path);
    let start = HEADER_BYTES + 5 * (RECORD_OVERHEAD + edit(1).encoded_len());
    // The batch spans several sectors; one of the first is lost, later ones arrived.
    bytes[start..1_024].fill(0);
    put(&path, &bytes);
    let (seen, end) = read(&log, 1).unwrap();
    assert_eq!(seen, (1..=5).collect::<Vec<_>>());
    assert!(end.tail.unwrap().torn);
}

#[test]
fn a_lost_sector_of_a_durable_batch_stops_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let log = log_of(dir.path(), &[1..=5, 6..=60, 61..=61], SIZES);
    let path = first_segment(&log);
    let mut bytes = bytes_of(&path);
    bytes[512..1_024].fill(0);
    put(&path, &bytes);
    let error = read(&log, 1).unwrap_err();
    assert!(error.to_string().contains("after it was durable"), "{error}");
}

#[test]
fn gaps_chains_and_strangers_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let sizes = LogSizes { segment_bytes: 1 << 10, step_bytes: 0 };
    let log = log_of(dir.path(), &[1..=30, 31..=60, 61..=90], sizes);
    let segments = list_segments(&SystemFs, &log).unwrap();
    assert!(segments.len() >= 3);
    let second = bytes_of(&segments[1].path);

    SystemFs.rename(&segments[1].path, &log.join("away")).unwrap();
    assert!(matches!(read(&log, 1), Err(LogError::Gap { .. })));
    let last = segments[segments.len() - 1].first.0;
    assert!(read(&log, last).is_ok(), "what is not needed is not missed");
    SystemFs.rename(&log.join("away"), &segments[1].path).unwrap();

    // A segment of another log with the same numbers: whole in itself, but it does not continue this one.
    let other = tempfile::tempdir().unwrap();
    let foreign = {
        let fs: Arc<dyn Fs> = Arc::new(SystemFs);
        let dirs = open(&*fs, &[other.path().to_owned()]);
        dirs[0].clear(&*fs).unwrap();
        let at = (TxId(segments[1].first.0 - 1), 99);
        let mut writer = LogWriter::create(Arc::clone(&fs), dirs, facts(), sizes, at).unwrap();
        append(&mut writer, segments[1].first.0..=segments[1].first.0 + 3);
        writer.flush().unwrap();
        bytes_of(&other.path().join("log").join(segment_name(segments[1].first)))
    };
    put(&segments[1].path, &foreign);
    let error = read(&log, 1).unwrap_err();
    assert!(error.to_string().contains("does not continue"), "{error}");
    put(&segments[1].path, &second);

    let error = read_log(&SystemFs, &log, "another", TxId(1), |_, _| Ok(())).unwrap_err();
    assert!(matches!(error, LogError::OtherCluster { .. }), "{error}");

    put(&segments[1].path, &second[..second.len() - 3]);
    let error = read(&log, 1).unwrap_err();
    assert!(error.to_string().contains("another segment follows"), "{error}");
}

#[test]
fn a_refusal_of_the_reader_names_file_offset_and_transaction() {
    let dir = tempfile::tempdir().unwrap();
    let log = log_of(dir.path(), &[1..=3], SIZES);
    let refuse = |record: &format::Record, _: &[u8]| {
        if record.txid == TxId(2) { Err("no such inode".to_owned()) } else { Ok(()) }
    };
    let error = read_log(&SystemFs, &log, CLUSTER, TxId(1), refuse).unwrap_err().to_string();
    for part in ["edits_00000000000000000001.log", "offset", "transaction 2", "no such inode", "--restore"] {
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn a_directory_that_fails_is_dropped_before_anything_is_released() {
    let root = tempfile::tempdir().unwrap();
    let paths = [root.path().join("a"), root.path().join("b")];
    let faulty = FaultyFs::default();
    let fs: Arc<dyn Fs> = Arc::new(faulty.clone());
    let mut writer = formatted(&fs, &paths, SIZES);
    append(&mut writer, 1..=3);
    assert_eq!(writer.flush().unwrap(), TxId(3));
    assert_eq!((writer.dirs().len(), writer.epoch()), (2, Epoch(1)));

    faulty.fail_syncs_below(&paths[1]);
    append(&mut writer, 4..=6);
    assert_eq!(writer.flush().unwrap(), TxId(6));
    assert_eq!((writer.dirs().len(), writer.epoch()), (1, Epoch(2)));
    let version = Version::parse(&paths[0], &String::from_utf8(bytes_of(&paths[0].join("VERSION"))).unwrap()).unwrap();
    assert_eq!((version.epoch, version.set), (Epoch(2), vec!["dir-1".to_owned()]));

    // Never tried again, though it works again.
    faulty.heal();
    append(&mut writer, 7..=9);
    writer.flush().unwrap();
    assert_eq!(writer.dirs().len(), 1);
    let syncs_of_b = faulty.syncs_below(&paths[1]);
    append(&mut writer, 10..=10);
    writer.flush().unwrap();
    assert_eq!(faulty.syncs_below(&paths[1]), syncs_of_b);

    faulty.fail_syncs_below(&paths[0]);
    append(&mut writer, 11..=11);
    let error = writer.flush().unwrap_err();
    assert!(error.to_string().contains("no metadata directory is left"), "{error}");
    assert_eq!(
        read(&paths[0].join("log"), 1).unwrap().0.len(),
        11,
        "what was written may be read, but was not promised"
    );
}

#[test]
fn purging_keeps_what_is_needed() {
    let dir = tempfile::tempdir().unwrap();
    let fs: Arc<dyn Fs> = Arc::new(SystemFs);
    let mut writer = formatted(&fs, &[dir.path().to_owned()], SIZES);
    for end in [10, 20, 30] {
        append(&mut writer, end - 9..=end);
        writer.roll().unwrap();
    }
    let log = dir.path().join("log");
    writer.purge(TxId(15));
    assert_eq!(list_segments(&SystemFs, &log).unwrap()[0].first, TxId(11));
    writer.purge(TxId(30));
    assert_eq!(list_segments(&SystemFs, &log).unwrap()[0].first, TxId(31), "the current segment stays");
    assert_eq!(read(&log, 31).unwrap().0, Vec::<u64>::new());
}

#[test]
fn directories_of_others_are_refused_and_left_alone() {
    let root = tempfile::tempdir().unwrap();
    let mut id = || "id".to_owned();
    let mut refused = |path: &Path| match open_set(&SystemFs, &[path.to_owned()], false, &mut id) {
        Ok(_) => panic!("{} was taken", path.display()),
        Err(error) => error,
    };
    let foreign = root.path().join("foreign");
    SystemFs.create_dir_all(&foreign).unwrap();
    put(&foreign.join("thesis.txt"), b"x");
    let error = refused(&foreign);
    assert!(error.message().contains("thesis.txt"), "{error}");
    assert_eq!(SystemFs.read_dir(&foreign).unwrap().len(), 1, "nothing was made in it");

    let file = root.path().join("file");
    put(&file, b"x");
    assert!(refused(&file).message().contains("is a file"));

    for (text, part) in [
        ("kind = \"datanode\"\nlayout = 1\n", "of a datanode"),
        ("kind = \"namenode\"\nlayout = 99\n", "layout version 99"),
        ("kind = \"namenode\"\nlayout = 1\n", "no "),
        ("\u{0}\u{1}garbage", "not readable"),
    ] {
        let dir = root.path().join("versioned");
        SystemFs.create_dir_all(&dir).unwrap();
        put(&dir.join("VERSION"), text.as_bytes());
        let error = refused(&dir);
        assert!(error.message().contains(part) && error.message().contains("versioned"), "{error}");
    }
}

#[test]
fn a_locked_directory_names_its_holder() {
    let root = tempfile::tempdir().unwrap();
    let paths = [root.path().to_owned()];
    let held = open(&SystemFs, &paths);
    let error = open_set(&SystemFs, &paths, false, &mut || "id".to_owned()).err().unwrap();
    assert_eq!(error.code(), ErrorCode::Busy);
    assert!(error.message().contains("in use by a namenode (process"), "{error}");
    drop(held);
    assert_eq!(open(&SystemFs, &paths).len(), 1);
}

#[test]
fn a_start_wants_the_whole_set() {
    let root = tempfile::tempdir().unwrap();
    let (a, b) = (root.path().join("a"), root.path().join("b"));
    let fs: Arc<dyn Fs> = Arc::new(SystemFs);
    drop(formatted(&fs, &[a.clone(), b.clone()], SIZES));
    let mut id = || "fresh".to_owned();
    let mut open = |paths: &[&PathBuf], accept| {
        let paths: Vec<PathBuf> = paths.iter().map(|&path| path.clone()).collect();
        open_set(&SystemFs, &paths, accept, &mut id)
    };
    assert!(!open(&[&a, &b], false).unwrap().changed);
    let error = open(&[&a], false).err().unwrap();
    assert!(error.message().contains("--accept-missing-dir"), "{error}");
    assert!(open(&[&a], true).unwrap().changed);
    let empty = root.path().join("c");
    let error = open(&[&a, &b, &empty], false).err().unwrap();
    assert!(error.message().contains("is empty"), "{error}");
    assert!(open(&[&a, &b, &empty], true).unwrap().changed);
}

#[tokio::test]
async fn one_sync_serves_all_that_waited() {
    let dir = tempfile::tempdir().unwrap();
    let faulty = FaultyFs::default();
    let mut env = cairn_common::Env::system();
    env.fs = Arc::new(faulty.clone());
    let writer = formatted(&env.fs, &[dir.path().to_owned()], SIZES);
    let journal = Journal::start(&env, writer, 64).unwrap();
    let mut status = journal.status();
    // The disk is busy with the first batch while the others queue up.
    let gate = faulty.block_syncs();
    for number in 1..=40 {
        journal.append(vec![(TxId(number), edit(number))]).await.unwrap();
    }
    let before = faulty.syncs_below(dir.path());
    drop(gate);
    status.wait_for(|status| status.durable == TxId(40)).await.unwrap();
    let syncs = faulty.syncs_below(dir.path()) - before;
    assert!(syncs <= 3, "{syncs} syncs for 40 batches");
    let end = journal.close().await;
    assert_eq!((end.durable, end.failed.is_none()), (TxId(40), true));
    assert_eq!(read(&dir.path().join("log"), 1).unwrap().0.len(), 40);
}

/// Cuts the power before each sync of a run in turn: what was promised is there, what is there is a prefix, and the log goes
/// on from it.
#[test]
fn a_crash_at_every_sync_keeps_what_was_promised() {
    let sizes = LogSizes { segment_bytes: 2 << 10, step_bytes: 1_024 };
    let run = |disk: &SimDisk, crash_at: u64, promised: &mut u64| -> Result<(), LogError> {
        let fs: Arc<dyn Fs> = Arc::new(disk.clone());
        let mut writer = formatted(&fs, &["/nn".into()], sizes);
        let mut next = 1;
        for size in [1, 3, 30, 2, 17, 1, 1, 25] {
            append(&mut writer, next..=next + size - 1);
            next += size;
            writer.flush()?;
            if disk.syncs() < crash_at {
                *promised = next - 1;
            }
        }
        Ok(())
    };
    let disk = SimDisk::new(1 << 30, Entropy::seeded(1));
    run(&disk, u64::MAX, &mut 0).unwrap();
    let syncs = disk.syncs();
    for k in 1..=syncs {
        for seed in 0..4 {
            let disk = SimDisk::new(1 << 30, Entropy::seeded(seed));
            disk.freeze_at_sync(k);
            let mut promised = 0;
            run(&disk, k, &mut promised).unwrap();
            disk.crash();
            let there = |path: &str| disk.metadata(Path::new(path)).unwrap().is_some();
            if !there("/nn/VERSION") || !there("/nn/log") {
                assert_eq!(promised, 0, "sync {k}, seed {seed}");
                continue;
            }
            let log = Path::new("/nn/log");
            let mut seen = 0;
            let end = read_log(&disk, log, CLUSTER, TxId(1), |record, _| {
                seen = record.txid.0;
                Ok(())
            })
            .unwrap_or_else(|error| panic!("sync {k}, seed {seed}: {error}"));
            assert!(seen >= promised, "sync {k}, seed {seed}: {promised} promised, {seen} found");
            if let Some(tail) = &end.tail {
                cut_tail(&disk, tail).unwrap();
            }
            let fs: Arc<dyn Fs> = Arc::new(disk.clone());
            let dirs = open(&disk, &["/nn".into()]);
            let mut writer = LogWriter::create(fs, dirs, facts(), sizes, (end.last, end.chain)).unwrap();
            append(&mut writer, seen + 1..=seen + 5);
            writer.close().unwrap();
            let end = read_log(&disk, log, CLUSTER, TxId(1), |_, _| Ok(())).unwrap();
            assert_eq!(end.last, TxId(seen + 5), "sync {k}, seed {seed}");
        }
    }
}

/// A namenode is killed between the write of a batch and its sync. The next one reads the batch from the cache and goes on from there; then the
/// power goes.
#[test]
fn what_a_start_has_read_survives_the_next_power_cut() {
    for seed in 0..20 {
        let disk = SimDisk::new(1 << 30, Entropy::seeded(seed));
        let fs: Arc<dyn Fs> = Arc::new(disk.clone());
        let mut writer = formatted(&fs, &["/nn".into()], SIZES);
        append(&mut writer, 1..=3);
        writer.close().unwrap();
        let log = Path::new("/nn/log");
        let end = read_log(&disk, log, CLUSTER, TxId(1), |_, _| Ok(())).unwrap();
        let mut batch = Vec::new();
        let number = (TxId(4), end.epoch, TxId(3));
        format::encode_record(&mut batch, number, end.chain, |out| out.extend_from_slice(&edit(4).encode_to_vec()))
            .unwrap();
        let tail = end.tail.unwrap();
        disk.open(&tail.path, OpenMode::Write).unwrap().write_all_at(&batch, tail.end).unwrap();
        disk.kill();
        let end = read_log(&disk, log, CLUSTER, TxId(1), |_, _| Ok(())).unwrap();
        assert_eq!(end.last, TxId(4));
        cut_tail(&disk, end.tail.as_ref().unwrap()).unwrap();
        disk.crash();
        let end = read_log(&disk, log, CLUSTER, TxId(1), |_, _| Ok(())).unwrap();
        assert_eq!(end.last, TxId(4), "seed {seed}: the next transactions would follow on a gap");
    }
}

/// What a failed sync lost is still shown by the kernel, and no later sync of that file brings it to the disk.
#[test]
fn what_a_failed_sync_left_in_the_cache_is_durable_before_anything_follows() {
    let mut seen = 0;
    for seed in 0..30 {
        let disk = SimDisk::new(1 << 30, Entropy::seeded(seed));
        let fs: Arc<dyn Fs> = Arc::new(disk.clone());
        let mut writer = formatted(&fs, &["/nn".into()], SIZES);
        append(&mut writer, 1..=3);
        writer.flush().unwrap();
        disk.inject(Fault {
            op: FaultOp::Sync,
            path: String::new(),
            after: 0,
            times: 1,
            kind: std::io::ErrorKind::Other,
        });
        append(&mut writer, 4..=4);
        assert!(writer.flush().is_err());
        drop(writer);
        disk.kill();
        let log = Path::new("/nn/log");
        let end = read_log(&disk, log, CLUSTER, TxId(1), |_, _| Ok(())).unwrap();
        seen += u64::from(end.last == TxId(4));
        cut_tail(&disk, end.tail.as_ref().unwrap()).unwrap();
        let dirs = open(&disk, &["/nn".into()]);
        let mut writer = LogWriter::create(fs, dirs, facts(), SIZES, (end.last, end.chain)).unwrap();
        append(&mut writer, end.last.0 + 1..=end.last.0 + 2);
        writer.flush().unwrap();
        drop(writer);
        disk.crash();
        let again = read_log(&disk, log, CLUSTER, TxId(1), |_, _| Ok(())).unwrap();
        assert_eq!(again.last, TxId(end.last.0 + 2), "seed {seed}");
    }
    assert!(seen > 0, "the cache never showed what the disk had lost");
}

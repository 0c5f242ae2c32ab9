//! Several metadata directories: one fails, comes back, or went on by itself.

use super::*;

fn version_of(dir: &Path) -> Version {
    let path = dir.join("VERSION");
    Version::parse(&path, &String::from_utf8(bytes_of(&path)).unwrap()).unwrap()
}

fn set_of(paths: &[PathBuf], accept_missing: bool) -> cairn_proto::Result<DirSet> {
    let mut count = 10;
    let mut id = || {
        count += 1;
        format!("dir-{count}")
    };
    open_set(&SystemFs, paths, accept_missing, &mut id)
}

fn refusal(paths: &[PathBuf], accept_missing: bool) -> String {
    match set_of(paths, accept_missing) {
        Ok(_) => panic!("{paths:?} were taken"),
        Err(error) => error.message().to_owned(),
    }
}

#[test]
fn a_folder_that_is_removed_or_replaced_while_in_use_is_dropped() {
    for replace in [false, true] {
        let root = tempfile::tempdir().unwrap();
        let paths = [root.path().join("a"), root.path().join("b")];
        let fs: Arc<dyn Fs> = Arc::new(SystemFs);
        let mut writer = formatted(&fs, &paths, SIZES);
        append(&mut writer, 1..=3);
        writer.flush().unwrap();
        // The open file goes on taking writes and syncs; they would be lost with the process.
        SystemFs.remove_dir_all(&paths[1]).unwrap();
        if replace {
            put(&paths[1], b"a file in the place of the folder");
        }
        append(&mut writer, 4..=6);
        assert_eq!(writer.flush().unwrap(), TxId(6));
        assert_eq!((writer.dirs().len(), writer.epoch()), (1, Epoch(2)));
        assert_eq!((version_of(&paths[0]).epoch, version_of(&paths[0]).set), (Epoch(2), vec!["dir-1".to_owned()]));
        SystemFs.remove_dir_all(&paths[0]).unwrap();
        append(&mut writer, 7..=7);
        assert!(matches!(writer.flush(), Err(LogError::NoneLeft(_))));
    }
}

#[test]
fn a_directory_that_failed_elsewhere_is_left_out_but_never_the_last() {
    let root = tempfile::tempdir().unwrap();
    let paths = [root.path().join("a"), root.path().join("b")];
    let fs: Arc<dyn Fs> = Arc::new(SystemFs);
    let mut writer = formatted(&fs, &paths, SIZES);
    append(&mut writer, 1..=3);
    writer.drop_dir("dir-2").unwrap();
    assert_eq!((writer.durable(), writer.dirs().len(), writer.epoch()), (TxId(3), 1, Epoch(2)));
    writer.drop_dir("dir-1").unwrap();
    assert_eq!((writer.dirs().len(), writer.epoch()), (1, Epoch(2)));
}

#[test]
fn several_directories_are_synced_at_the_same_time() {
    let root = tempfile::tempdir().unwrap();
    let paths = [root.path().join("a"), root.path().join("b")];
    let faulty = FaultyFs::default();
    let fs: Arc<dyn Fs> = Arc::new(faulty.clone());
    let mut writer = formatted(&fs, &paths, SIZES);
    writer.sync_together(cairn_common::work::Work::threads(2));
    append(&mut writer, 1..=3);
    let gate = faulty.block_syncs();
    let before = faulty.waiting();
    let flushed = std::thread::scope(|scope| {
        let flush = scope.spawn(|| writer.flush());
        // Both wait at the gate: neither waits for the other.
        while faulty.waiting() < before + 2 {
            std::thread::yield_now();
        }
        drop(gate);
        flush.join().unwrap()
    });
    assert_eq!(flushed.unwrap(), TxId(3));
}

#[test]
fn one_that_is_behind_is_not_started_from_alone() {
    let root = tempfile::tempdir().unwrap();
    let paths = [root.path().join("a"), root.path().join("b")];
    let faulty = FaultyFs::default();
    let fs: Arc<dyn Fs> = Arc::new(faulty.clone());
    let mut writer = formatted(&fs, &paths, SIZES);
    faulty.fail_syncs_below(&paths[1]);
    append(&mut writer, 1..=3);
    writer.flush().unwrap();
    drop(writer);
    let text = refusal(&paths[1..], false);
    assert!(text.contains("may be behind it") && text.contains("--accept-missing-dir"), "{text}");
    // The one that is ahead needs nobody; both together, the other one is known to be behind.
    let alone = set_of(&paths[..1], false).unwrap();
    assert!(!alone.changed && !alone.left_out);
    drop(alone);
    let both = set_of(&paths, false).unwrap();
    assert!(both.changed && !both.left_out);
    assert_eq!(both.facts.unwrap().epoch, Epoch(2));
    drop(both.found);
    // By order it goes, and that is told apart from a loss of nothing.
    let ordered = set_of(&paths[1..], true).unwrap();
    assert!(ordered.changed && ordered.left_out);
}

#[test]
fn two_futures_are_never_mixed() {
    let root = tempfile::tempdir().unwrap();
    let paths = [root.path().join("a"), root.path().join("b")];
    let fs: Arc<dyn Fs> = Arc::new(SystemFs);
    let writer = formatted(&fs, &paths, SIZES);
    let dirs = writer.dirs();
    let facts_at = |epoch| ClusterFacts { epoch: Epoch(epoch), ..facts() };
    // `b` failed and `a` went on; later somebody started from `b` alone.
    dirs[0].write_version(&*fs, &facts_at(2), DirState::Ready, &["dir-1".into()]).unwrap();
    dirs[1].write_version(&*fs, &facts_at(1_000), DirState::Ready, &["dir-2".into()]).unwrap();
    drop((writer, dirs));
    for accept in [false, true] {
        let text = refusal(&paths, accept);
        assert!(text.contains("without each other"), "{text}");
    }
    assert_eq!(Epoch(2).next_future(0), Epoch(1_000));
    assert_eq!(Epoch(1_000).next_future(1), Epoch(2_000));
    // A later restore of the same backup is a future of its own.
    assert_eq!(Epoch(2).next_future(1_700_000_000_001), Epoch(1_700_000_000_001_000));
    assert_eq!(Epoch(1_700_000_000_001_007).next_future(1_700_000_000_001), Epoch(1_700_000_000_002_000));
}

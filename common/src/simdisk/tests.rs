use super::*;
use crate::durable::{read_all, write_atomic};

fn disk(seed: u64) -> SimDisk {
    let disk = SimDisk::new(1 << 20, Entropy::seeded(seed));
    disk.create_dir_all(Path::new("/d")).unwrap();
    disk.sync_dir(Path::new("/")).unwrap();
    disk
}

#[test]
fn an_atomic_write_is_the_old_or_the_new_at_every_sync() {
    let path = Path::new("/d/f");
    let count = {
        let disk = disk(0);
        write_atomic(&disk, path, b"old").unwrap();
        let before = disk.syncs();
        write_atomic(&disk, path, b"new!").unwrap();
        disk.syncs() - before
    };
    for k in 1..=count + 1 {
        for seed in 0..50 {
            let disk = disk(seed);
            write_atomic(&disk, path, b"old").unwrap();
            disk.freeze_at_sync(disk.syncs() + k);
            write_atomic(&disk, path, b"new!").unwrap();
            disk.crash();
            let found = read_all(&disk, path, 100).unwrap();
            assert!(found == b"old" || found == b"new!", "at sync {k}, seed {seed}: {found:?}");
            assert!(k <= count || found == b"new!", "acknowledged, then lost");
        }
    }
}

#[test]
fn unsynced_names_and_bytes_may_go_and_handles_die() {
    let mut lost = 0;
    for seed in 0..20 {
        let disk = disk(seed);
        let file = disk.open(Path::new("/d/x"), OpenMode::Create).unwrap();
        file.write_all_at(&[1; 2_000], 0).unwrap();
        disk.crash();
        assert!(file.len().is_err(), "a handle outlived the crash");
        lost += u32::from(disk.metadata(Path::new("/d/x")).unwrap().is_none());
    }
    assert!((1..20).contains(&lost), "both outcomes must occur: {lost}");
}

#[test]
fn faults_and_a_full_disk() {
    let disk = disk(1);
    let fault = Fault { op: FaultOp::Sync, path: "x".into(), after: 1, times: 1, kind: io::ErrorKind::Other };
    disk.inject(fault);
    let file = disk.open(Path::new("/d/x"), OpenMode::Create).unwrap();
    file.sync_data().unwrap();
    assert!(file.sync_data().is_err());
    file.sync_data().unwrap();
    assert_eq!(file.write_all_at(&vec![0; 2 << 20], 0).unwrap_err().kind(), io::ErrorKind::StorageFull);
}

fn touch(disk: &SimDisk, path: &str, bytes: &[u8]) {
    let file = disk.open(Path::new(path), OpenMode::WriteOrCreate).unwrap();
    file.write_all_at(bytes, 0).unwrap();
    file.sync_data().unwrap();
}

fn there(disk: &SimDisk, path: &str) -> bool {
    disk.metadata(Path::new(path)).unwrap().is_some()
}

#[test]
fn a_folder_goes_with_all_in_it_unless_its_own_name_is_durable() {
    let mut lost = 0;
    for seed in 0..20 {
        let disk = disk(seed);
        disk.create_dir_all(Path::new("/d/new")).unwrap();
        touch(&disk, "/d/new/f", b"x");
        disk.sync_dir(Path::new("/d/new")).unwrap();
        disk.crash();
        assert_eq!(there(&disk, "/d/new"), there(&disk, "/d/new/f"));
        lost += u32::from(!there(&disk, "/d/new"));
    }
    assert!((1..20).contains(&lost), "both outcomes must occur: {lost}");
}

#[test]
fn unsynced_names_survive_in_their_order() {
    let mut seen = BTreeSet::new();
    for seed in 0..100 {
        let disk = disk(seed);
        touch(&disk, "/d/f", b"old");
        disk.sync_dir(Path::new("/d")).unwrap();
        touch(&disk, "/d/f.tmp", b"new");
        disk.rename(Path::new("/d/f.tmp"), Path::new("/d/f")).unwrap();
        touch(&disk, "/d/later", b"");
        disk.crash();
        let found = read_all(&disk, Path::new("/d/f"), 10).unwrap();
        seen.insert((there(&disk, "/d/f.tmp"), found == b"new", there(&disk, "/d/later")));
    }
    // Nothing, the file aside, the file renamed, all: never the new name without what came before, and never none at all.
    let expected = [(false, false, false), (true, false, false), (false, true, false), (false, true, true)];
    assert_eq!(seen, BTreeSet::from(expected));
}

#[test]
fn a_rename_between_folders_never_loses_the_file() {
    let mut seen = BTreeSet::new();
    for synced in ["/d/a", "/d/b", ""] {
        for seed in 0..100 {
            let disk = disk(seed);
            for folder in ["/d/a", "/d/b"] {
                disk.create_dir_all(Path::new(folder)).unwrap();
            }
            touch(&disk, "/d/a/f", b"x");
            for folder in ["/d", "/d/a"] {
                disk.sync_dir(Path::new(folder)).unwrap();
            }
            disk.rename(Path::new("/d/a/f"), Path::new("/d/b/g")).unwrap();
            if !synced.is_empty() {
                disk.sync_dir(Path::new(synced)).unwrap();
            }
            disk.crash();
            let found = (synced, there(&disk, "/d/a/f"), there(&disk, "/d/b/g"));
            seen.insert(found);
            for path in ["/d/a/f", "/d/b/g"].iter().filter(|path| there(&disk, path)) {
                disk.remove_file(Path::new(path)).unwrap();
            }
            assert_eq!(disk.state().used, 0);
        }
    }
    let expected = [
        ("/d/a", false, true),
        ("/d/b", true, true),
        ("/d/b", false, true),
        ("", true, false),
        ("", true, true),
        ("", false, true),
    ];
    assert_eq!(seen, BTreeSet::from(expected));
}

#[test]
fn what_is_unlinked_gives_its_room_back_when_nobody_reads_it() {
    let disk = disk(1);
    touch(&disk, "/d/f", &[1; 1_000]);
    let free = |disk: &SimDisk| disk.space(Path::new("/d")).unwrap().available;
    let before = free(&disk);
    let file = disk.open(Path::new("/d/f"), OpenMode::Read).unwrap();
    disk.remove_file(Path::new("/d/f")).unwrap();
    assert_eq!(free(&disk), before);
    let mut byte = [0];
    assert_eq!((file.read_at(&mut byte, 0).unwrap(), byte), (1, [1]));
    drop(file);
    assert_eq!(free(&disk), before + 1_000);
    disk.sync_dir(Path::new("/d")).unwrap();
    assert!(disk.state().content.files.is_empty());
}

#[test]
fn killed_processes_leave_what_they_wrote() {
    let disk = disk(1);
    let lock = disk.lock(Path::new("/d/lock")).unwrap();
    assert!(disk.lock(Path::new("/d/lock")).unwrap().is_none());
    let file = disk.open(Path::new("/d/f"), OpenMode::Create).unwrap();
    file.write_all_at(b"x", 0).unwrap();
    disk.kill();
    let again = disk.lock(Path::new("/d/lock")).unwrap();
    assert!(file.len().is_err() && again.is_some());
    assert_eq!(read_all(&disk, Path::new("/d/f"), 10).unwrap(), b"x");
    drop((lock, file));
    assert!(disk.lock(Path::new("/d/lock")).unwrap().is_none(), "a dead handle took the new lock away");
}

#[test]
fn names_follow_the_rules_of_the_system() {
    let disk = disk(1);
    let kind = |result: io::Result<()>| result.unwrap_err().kind();
    let (d, f, g) = (Path::new("/d"), Path::new("/d/f"), Path::new("/d/e/g"));
    touch(&disk, "/d/f", b"x");
    assert_eq!(kind(disk.rename(f, g)), io::ErrorKind::NotFound);
    disk.create_dir_all(Path::new("/d/e")).unwrap();
    assert_eq!(kind(disk.rename(f, Path::new("/d/e"))), io::ErrorKind::IsADirectory);
    assert_eq!(kind(disk.rename(Path::new("/d/e"), f)), io::ErrorKind::NotADirectory);
    assert_eq!(kind(disk.rename(d, Path::new("/d/e/d"))), io::ErrorKind::InvalidInput);
    disk.rename(f, g).unwrap();
    assert_eq!(kind(disk.remove_dir_all(f)), io::ErrorKind::NotFound);
    assert_eq!(kind(disk.sync_dir(g)), io::ErrorKind::NotADirectory);
    disk.rename(Path::new("/d/e"), Path::new("/d/h")).unwrap();
    assert!(there(&disk, "/d/h/g") && !there(&disk, "/d/e/g"));
    disk.remove_dir_all(Path::new("/d/h")).unwrap();
    assert!(disk.read_dir(d).unwrap().is_empty());
}

#[test]
fn a_sync_of_the_volume_keeps_all_names_and_bytes_and_a_failed_one_may_lose_them() {
    let mut lost = 0;
    for seed in 0..20 {
        let disk = disk(seed);
        disk.create_dir_all(Path::new("/d/in/ner")).unwrap();
        let old = disk.open(Path::new("/d/old"), OpenMode::Create).unwrap();
        old.write_all_at(&[1; 2_000], 0).unwrap();
        disk.rename(Path::new("/d/old"), Path::new("/d/in/ner/new")).unwrap();
        disk.sync_volume(Path::new("/d")).unwrap();
        disk.crash();
        assert_eq!(read_all(&disk, Path::new("/d/in/ner/new"), 4_000).unwrap(), [1; 2_000], "seed {seed}");
        assert!(!there(&disk, "/d/old"));

        let file = disk.open(Path::new("/d/in/ner/new"), OpenMode::Write).unwrap();
        file.write_all_at(&[2; 2_000], 0).unwrap();
        disk.inject(Fault { op: FaultOp::Sync, path: "/d".into(), after: 0, times: 1, kind: io::ErrorKind::Other });
        assert!(disk.sync_volume(Path::new("/d")).is_err());
        disk.sync_volume(Path::new("/d")).unwrap();
        disk.crash();
        lost += u32::from(read_all(&disk, Path::new("/d/in/ner/new"), 4_000).unwrap() != [2; 2_000]);
    }
    assert!((1..20).contains(&lost), "both outcomes must occur: {lost}");
}

//! Backup, archive and restore: each transaction can be reached, no future is taken for another, and a crash at any sync costs
//! nothing but the time to do it again.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use cairn_common::clock::Clock;
use cairn_common::durable::{Fs, OpenMode, read_all};
use cairn_common::entropy::Entropy;
use cairn_common::simdisk::SimDisk;
use cairn_proto::ids::{Epoch, TxId};
use cairn_proto::{Error, ErrorCode, pb};

use super::crash_tests::{Life, NOW, plan};
use super::load::LoadPlan;
use crate::backup::history::Target;
use crate::backup::restore::RestorePlan;
use crate::backup::{BackupPlan, BackupSource, Copier};
use crate::core::{Caller, ClientRequest, Command, Event, ReplyTo};

const BACKUP: &str = "/backup/b1";
const ARCHIVE: &str = "/archive";

fn disk() -> SimDisk {
    SimDisk::new(1 << 30, Entropy::seeded(7))
}

fn put(disk: &SimDisk, path: &Path, bytes: &[u8]) {
    disk.create_dir_all(path.parent().unwrap()).unwrap();
    let file = disk.open(path, OpenMode::WriteOrCreate).unwrap();
    file.set_len(0).unwrap();
    file.write_all_at(bytes, 0).unwrap();
    file.sync_data().unwrap();
    disk.sync_dir(path.parent().unwrap()).unwrap();
}

fn backup_bytes(disk: &SimDisk, life: &Life) -> Vec<u8> {
    let facts = &life.loaded.facts;
    let plan = BackupPlan {
        dirs: life.loaded.writer.dirs(),
        last: life.loaded.writer.durable(),
        epoch: life.loaded.writer.epoch(),
        made_ms: NOW.wall_ms,
        cluster_id: facts.cluster_id.clone(),
        pool_id: facts.pool_id.clone(),
    };
    let mut source = BackupSource::open(disk, &plan).unwrap();
    let mut bytes = Vec::new();
    while let Some(piece) = source.next_piece().unwrap() {
        bytes.extend(piece);
    }
    bytes
}

fn copier(disk: &SimDisk, life: &Life) -> Copier {
    Copier::new(Arc::new(disk.clone()), ARCHIVE.into(), life.loaded.facts.cluster_id.clone())
}

fn archive(copier: &mut Copier, life: &Life) -> TxId {
    copier.pass(&life.loaded.writer.dirs()[0].log(), life.loaded.writer.durable()).unwrap()
}

fn restore_plan(disk: &SimDisk, to: &str, log: bool, target: Target) -> LoadPlan {
    let restore = RestorePlan { file: BACKUP.into(), log: log.then(|| ARCHIVE.into()), target };
    LoadPlan {
        dirs: vec![PathBuf::from(to), PathBuf::from(format!("{to}-2"))],
        restore: Some(restore),
        ..plan(disk, 1)
    }
}

fn restore(disk: &SimDisk, to: &str, log: bool, target: Target) -> Result<Life, Error> {
    Life::start_as(disk, &restore_plan(disk, to, log, target), u64::MAX, 99)
}

fn refusal(disk: &SimDisk, to: &str, log: bool, target: Target) -> Error {
    match restore(disk, to, log, target) {
        Ok(_) => panic!("{target:?} was restored"),
        Err(error) => error,
    }
}

fn exists(life: &mut Life, path: &str) -> bool {
    let caller = Caller { user: "root".into(), groups: Vec::new(), host: "127.0.0.1".into() };
    let request = ClientRequest::GetStatus(pb::GetStatusRequest { path: path.into() });
    let mut commands = Vec::new();
    life.loaded.core.on_event(NOW, 1, Event::Client { reply: ReplyTo(0), caller, request }, &mut commands);
    commands.iter().any(|command| matches!(command, Command::Reply { result: Ok(_), .. }))
}

/// Makes `/NAME/0`, `/NAME/1`, ... and notes the transaction after each.
fn grow(life: &mut Life, name: &str, count: usize, made: &mut Vec<(u64, String)>) {
    for number in 0..count {
        let path = format!("/{name}/{number}");
        life.mkdir(&path);
        life.loaded.writer.flush().unwrap();
        made.push((life.loaded.core.last_txid().0, path));
    }
}

fn check_state(life: &mut Life, at: u64, made: &[(u64, String)]) {
    for (txid, path) in made {
        assert_eq!(exists(life, path), *txid <= at, "{path} (transaction {txid}) after a restore to {at}");
    }
}

/// A cluster with images, a backup in the middle, and an archive that follows it to the end.
fn lived(disk: &SimDisk) -> (Life, Copier, Vec<(u64, String)>) {
    let mut made = Vec::new();
    let mut life = Life::start(disk, 1, u64::MAX, 1).unwrap();
    let mut copier = copier(disk, &life);
    grow(&mut life, "a", 6, &mut made);
    archive(&mut copier, &life);
    life.checkpoint();
    grow(&mut life, "b", 40, &mut made);
    archive(&mut copier, &life);
    life.checkpoint();
    grow(&mut life, "c", 5, &mut made);
    put(disk, Path::new(BACKUP), &backup_bytes(disk, &life));
    archive(&mut copier, &life);
    grow(&mut life, "d", 30, &mut made);
    archive(&mut copier, &life);
    life.checkpoint();
    grow(&mut life, "e", 7, &mut made);
    assert_eq!(archive(&mut copier, &life), life.loaded.writer.durable());
    (life, copier, made)
}

fn image_of_backup(disk: &SimDisk) -> u64 {
    let bytes = read_all(disk, Path::new(BACKUP), 1 << 30).unwrap();
    u64::from_le_bytes(bytes[16..24].try_into().unwrap())
}

#[test]
fn each_transaction_from_the_image_to_the_last_archived_one_can_be_reached() {
    let disk = disk();
    let (life, _, made) = lived(&disk);
    let (first, last) = (image_of_backup(&disk), life.loaded.writer.durable().0);
    assert!(first > 6 && last > first + 60, "the older image is in the backup: {first} to {last}");
    drop(life);
    for txid in first..=last {
        let to = format!("/restored/{txid}");
        let mut restored = restore(&disk, &to, true, Target::TxId(TxId(txid))).unwrap();
        check_state(&mut restored, txid, &made);
        // The edit of the restore and the new epoch follow; every later start finds the same.
        assert_eq!(restored.loaded.core.last_txid(), TxId(txid + 2));
        assert!(restored.loaded.core.epoch() >= Epoch(1_000));
        let digest = restored.loaded.core.digest();
        drop(restored);
        let again = LoadPlan { restore: None, ..restore_plan(&disk, &to, false, Target::Last) };
        let again = Life::start_as(&disk, &again, u64::MAX, 5).unwrap();
        assert_eq!(again.loaded.core.digest(), digest);
    }
    let mut restored = restore(&disk, "/latest", true, Target::Last).unwrap();
    check_state(&mut restored, last, &made);
    let without = restore(&disk, "/without", false, Target::Last).unwrap();
    assert!(without.loaded.core.last_txid().0 < last);

    for txid in [first - 1, last + 1] {
        let error = refusal(&disk, "/never", true, Target::TxId(TxId(txid)));
        assert!(error.message().contains(&format!("transactions {first} to {last} can be reached")), "{error}");
    }
    assert!(disk.metadata(Path::new("/never/VERSION")).unwrap().is_none(), "a refusal changes nothing");
}

#[test]
fn what_is_wrong_with_directory_backup_or_archive_is_said() {
    let disk = disk();
    let (life, _, _) = lived(&disk);
    let bytes = read_all(&disk, Path::new(BACKUP), 1 << 30).unwrap();
    drop(life);
    let said = |error: Error, part: &str| assert!(error.message().contains(part), "{error}");
    said(refusal(&disk, "/meta/d0", true, Target::Last), "/meta/d0 is not empty (it holds the metadata of cluster");
    put(&disk, Path::new("/full/thesis.txt"), b"x");
    said(refusal(&disk, "/full", true, Target::Last), "thesis.txt");
    put(&disk, Path::new(BACKUP), &bytes[..bytes.len() - 100]);
    said(refusal(&disk, "/r", true, Target::Last), "the backup is cut");
    let mut altered = bytes.clone();
    altered[bytes.len() / 2] ^= 1;
    put(&disk, Path::new(BACKUP), &altered);
    said(refusal(&disk, "/r", true, Target::Last), "the backup is altered");
    put(&disk, Path::new(BACKUP), b"some text\n");
    said(refusal(&disk, "/r", true, Target::Last), "no backup");
    put(&disk, Path::new(BACKUP), &bytes);
    put(&disk, Path::new("/archive/ARCHIVE"), b"kind = \"archive\"\ncluster_id = \"another\"\n");
    let error = refusal(&disk, "/r", true, Target::Last);
    assert_eq!(error.code(), ErrorCode::WrongCluster);
    said(error, "archive of cluster another");
    disk.remove_file(Path::new("/archive/ARCHIVE")).unwrap();
    said(refusal(&disk, "/r", true, Target::Last), "no archive");
}

#[test]
fn a_gap_between_backup_and_archive_is_named_and_stops_where_it_is() {
    let disk = disk();
    let (life, _, made) = lived(&disk);
    drop(life);
    let names = disk.read_dir(Path::new(ARCHIVE)).unwrap();
    let (first, last) = (image_of_backup(&disk), made.last().unwrap().0);
    // The last archived segment is not the only one behind the backup: the one before it goes.
    let logs: Vec<&str> = names.iter().map(|entry| &*entry.name).filter(|name| name.ends_with(".log")).collect();
    let lost = *logs.last().unwrap();
    let gap_from: u64 = lost[6..26].parse().unwrap();
    assert!(gap_from > first && gap_from < last);
    disk.remove_file(&Path::new(ARCHIVE).join(lost)).unwrap();
    let error = refusal(&disk, "/r", true, Target::Last);
    let backed_up = restore(&disk, "/b", false, Target::Last).unwrap().loaded.core.last_txid().0 - 2;
    let from = gap_from.max(backed_up + 1);
    assert!(error.message().contains(&format!("transactions {from} to ")), "{error}");
    assert!(error.message().contains("are missing between backup and archive"), "{error}");
    let error = refusal(&disk, "/r", true, Target::TxId(TxId(last)));
    assert!(error.message().contains("are missing"), "{error}");
    let mut restored = restore(&disk, "/r", true, Target::TxId(TxId(from - 1))).unwrap();
    check_state(&mut restored, from - 1, &made);
}

#[test]
fn the_future_that_is_left_behind_is_not_mixed_with_the_new_one() {
    let disk = disk();
    let (mut life, mut old, mut made) = lived(&disk);
    let last = life.loaded.writer.durable();
    let parting = made[made.len() - 15].0;
    let mut new = restore(&disk, "/new", true, Target::TxId(TxId(parting))).unwrap();
    // Both go on, and both write into the same archive.
    let mut copier = copier(&disk, &new);
    let mut made_new = Vec::new();
    grow(&mut new, "new", 50, &mut made_new);
    archive(&mut copier, &new);
    grow(&mut life, "old", 50, &mut made);
    archive(&mut old, &life);
    new.checkpoint();
    grow(&mut new, "newer", 5, &mut made_new);
    archive(&mut copier, &new);
    assert!(life.loaded.writer.durable() > last && new.loaded.writer.durable().0 > parting);
    // Whoever restores now gets the new one.
    let mut restored = restore(&disk, "/third", true, Target::Last).unwrap();
    check_state(&mut restored, parting, &made);
    check_state(&mut restored, u64::MAX, &made_new);
    let epoch = restored.loaded.core.epoch();
    assert!(epoch > new.loaded.core.epoch() && epoch > life.loaded.core.epoch(), "higher than both");
    // Counters are far beyond those of each other future.
    let before = parting + 1;
    let at_fork = restore(&disk, "/fork", true, Target::TxId(TxId(before))).unwrap();
    assert!(at_fork.loaded.core.last_txid().0 == before + 2);
}

#[test]
fn an_archive_that_holds_another_future_under_our_names_is_left_alone() {
    let disk = disk();
    let (life, _, _) = lived(&disk);
    let log = life.loaded.writer.dirs()[0].log();
    drop(life);
    // Somebody puts an old copy of the metadata directory back: the same epoch, without the last transactions.
    let names = |disk: &SimDisk| disk.read_dir(Path::new(ARCHIVE)).unwrap();
    let before = names(&disk);
    let open = before.iter().find(|entry| entry.name.ends_with(".open")).unwrap();
    let segment = log.join(format!("{}.log", &open.name[..26]));
    disk.open(&segment, OpenMode::Write).unwrap().set_len(96).unwrap();
    let mut life = Life::start(&disk, 1, u64::MAX, 6).unwrap();
    grow(&mut life, "other", 3, &mut Vec::new());
    let mut copier = copier(&disk, &life);
    let error = copier.pass(&log, life.loaded.writer.durable()).unwrap_err();
    assert!(error.message().contains("holds other transactions than this log"), "{error}");
    assert_eq!(names(&disk), before, "nothing was replaced");
}

#[test]
fn two_restores_of_one_backup_are_different_futures() {
    let disk = disk();
    drop(lived(&disk));
    let restored = |to: &str, wall_ms: u64| {
        let clock = Clock::simulated(wall_ms);
        let plan = LoadPlan { clock, ..restore_plan(&disk, to, false, Target::Last) };
        Life::start_as(&disk, &plan, u64::MAX, 99).unwrap().loaded.core.epoch()
    };
    // Neither knows of the other; the first one may still be running, and lose directories.
    let (first, second) = (restored("/one", 1_800_000_000_000), restored("/two", 1_800_000_001_000));
    assert!(second.0 >= first.0 + 1_000, "{first} and {second}");
    // A clock that stands far back still gives more than the cluster had.
    assert!(restored("/three", 0) >= Epoch(1_000));
}

#[test]
fn a_hole_in_the_archive_is_told_until_a_backup_lies_behind_it() {
    for restart in [false, true] {
        let disk = disk();
        let (mut life, mut copier, mut made) = lived(&disk);
        assert_eq!(copier.hole(), None);
        let archived = life.loaded.writer.durable();
        // The archive's disk is away while the log is purged.
        for name in ["x", "y", "z"] {
            grow(&mut life, name, 30, &mut made);
            life.checkpoint();
        }
        if restart {
            copier = self::copier(&disk, &life);
        }
        assert_eq!(archive(&mut copier, &life), life.loaded.writer.durable());
        let hole = copier.hole().expect("nobody was told");
        assert_eq!(hole.from, archived.next(), "what is there is not missing");
        assert!(hole.to > hole.from);
        let error = refusal(&disk, "/r", true, Target::Last);
        assert!(error.message().contains(&format!("{} to {}", hole.from, hole.to)), "{error}");
        // It is remembered, and not mixed up with what follows.
        grow(&mut life, "more", 30, &mut made);
        archive(&mut copier, &life);
        life.checkpoint();
        let mut copier = self::copier(&disk, &life);
        archive(&mut copier, &life);
        assert_eq!(copier.hole(), Some(hole));
        copier.backed_up(hole.from);
        assert_eq!(copier.hole(), Some(hole), "a backup from before does not help");
        put(&disk, Path::new(BACKUP), &backup_bytes(&disk, &life));
        let image = TxId(image_of_backup(&disk));
        assert!(image > hole.to);
        copier.backed_up(image);
        assert_eq!(copier.hole(), None);
        let mut copier = self::copier(&disk, &life);
        archive(&mut copier, &life);
        assert_eq!(copier.hole(), None, "nor after the next start");
        check_state(&mut restore(&disk, "/r", true, Target::Last).unwrap(), u64::MAX, &made);
    }
}

/// Backup, archive, restore, and the archive of the restored cluster.
fn lose_everything(disk: &SimDisk) {
    let (life, _, _) = lived(disk);
    drop(life);
    let Ok(mut new) = restore(disk, "/new", true, Target::Last) else { return };
    let mut copier = copier(disk, &new);
    grow(&mut new, "new", 4, &mut Vec::new());
    archive(&mut copier, &new);
}

#[test]
fn a_crash_at_every_sync_is_followed_by_a_restore_that_works() {
    let whole = disk();
    lose_everything(&whole);
    let (_, _, made) = lived(&disk());
    let last = made.last().unwrap().0;
    for crash_at in 1..=whole.syncs() {
        let disk = SimDisk::new(1 << 30, Entropy::seeded(crash_at));
        disk.freeze_at_sync(crash_at);
        lose_everything(&disk);
        disk.crash();
        let case = format!("sync {crash_at}");
        // The namenode that was there starts, and its archive goes on from where it was.
        let life = Life::start(&disk, 1, u64::MAX, 1).unwrap_or_else(|error| panic!("{case}: {error}"));
        let mut copier = copier(&disk, &life);
        let archived = copier.pass(&life.loaded.writer.dirs()[0].log(), life.loaded.writer.durable());
        assert_eq!(archived.unwrap_or_else(|error| panic!("{case}: {error}")), life.loaded.writer.durable(), "{case}");
        drop(life);
        let is_ready = disk.metadata(Path::new("/new/VERSION")).unwrap().is_some_and(|_| {
            let bytes = read_all(&disk, Path::new("/new/VERSION"), 1 << 16).unwrap();
            String::from_utf8(bytes).unwrap().contains("\"ready\"")
        });
        let again = restore_plan(&disk, "/new", true, Target::TxId(TxId(last)));
        if is_ready {
            // One directory may be behind the other by the last step: the start mends that.
            let again = LoadPlan { restore: None, ..again };
            let mut restored =
                Life::start_as(&disk, &again, u64::MAX, 5).unwrap_or_else(|error| panic!("{case}: {error}"));
            check_state(&mut restored, last, &made);
        } else if disk.metadata(Path::new(BACKUP)).unwrap().is_some() && life_reached(&disk, last) {
            let plain = LoadPlan { restore: None, ..restore_plan(&disk, "/new", true, Target::Last) };
            if disk.metadata(Path::new("/new/VERSION")).unwrap().is_some() {
                let error = Life::start_as(&disk, &plain, u64::MAX, 5).err().unwrap();
                assert!(error.message().contains("was interrupted"), "{case}: {error}");
            }
            let mut restored =
                Life::start_as(&disk, &again, u64::MAX, 5).unwrap_or_else(|error| panic!("{case}: {error}"));
            check_state(&mut restored, last, &made);
        }
    }
}

/// Whether backup and archive reach this transaction: the crash may have come before.
fn life_reached(disk: &SimDisk, last: u64) -> bool {
    let restore = RestorePlan { file: BACKUP.into(), log: Some(ARCHIVE.into()), target: Target::TxId(TxId(last)) };
    crate::backup::restore::Restore::open(disk, &restore).is_ok()
}

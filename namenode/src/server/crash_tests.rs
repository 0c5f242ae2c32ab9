//! The power goes at every sync of a life of the namenode: formatting, edits, images, purging, a restart, a lost directory; and again while it
//! starts after that. Whatever was promised is there afterwards, what is there is a state that once was, and the namenode starts by itself.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use cairn_common::clock::Clock;
use cairn_common::entropy::Entropy;
use cairn_common::simdisk::{Fault, FaultOp, SimDisk};
use cairn_proto::ids::{Epoch, TxId};
use cairn_proto::{Result, pb};

use super::load::{LoadPlan, Loaded, load};
use crate::core::{Caller, ClientRequest, Command, CoreSettings, Event, Now, ReplyTo};
use crate::image::ImageWriter;
use crate::image::format::ImageHeader;
use crate::journal::LogSizes;

pub(super) const NOW: Now = Now { mono_ms: 1_000, wall_ms: 1_700_000_000_000 };

pub(super) fn plan(disk: &SimDisk, dirs: usize) -> LoadPlan {
    LoadPlan {
        fs: Arc::new(disk.clone()),
        work: cairn_common::work::Work::inline(),
        clock: Clock::system(),
        dirs: (0..dirs).map(|dir| PathBuf::from(format!("/meta/d{dir}"))).collect(),
        accept_missing_dir: false,
        core: CoreSettings { superuser: "root".into(), ..CoreSettings::default() },
        superuser: "root".into(),
        supergroup: "supergroup".into(),
        sizes: LogSizes { segment_bytes: 2 << 10, step_bytes: 1 << 10 },
        restore: None,
        archive: None,
    }
}

/// A namenode without its threads: what it promised, and the digest of the state after each transaction.
pub(super) struct Life {
    pub(super) loaded: Loaded,
    disk: SimDisk,
    crash_at: u64,
    promised: TxId,
    states: States,
}

/// The digest of the state after each transaction that ended a change, with the epoch that was in force.
type States = BTreeMap<TxId, (Epoch, u64)>;

impl Life {
    pub(super) fn start(disk: &SimDisk, dirs: usize, crash_at: u64, seed: u64) -> Result<Self> {
        Self::start_as(disk, &plan(disk, dirs), crash_at, seed)
    }

    pub(super) fn start_as(disk: &SimDisk, plan: &LoadPlan, crash_at: u64, seed: u64) -> Result<Self> {
        let ids = Entropy::seeded(seed);
        let loaded = load(plan, &mut || ids.uuid())?;
        let mut life = Self { loaded, disk: disk.clone(), crash_at, promised: TxId(0), states: BTreeMap::new() };
        life.promise();
        life.note();
        Ok(life)
    }

    fn note(&mut self) {
        let core = &self.loaded.core;
        self.states.insert(core.last_txid(), (core.epoch(), core.digest()));
    }

    fn promise(&mut self) {
        if self.disk.syncs() < self.crash_at {
            self.promised = self.loaded.writer.durable();
        }
    }

    pub(super) fn mkdir(&mut self, path: &str) {
        let request =
            pb::MkdirsRequest { path: path.into(), permission: 0o755, create_parents: true, ..Default::default() };
        let caller = Caller { user: "root".into(), groups: Vec::new(), host: "127.0.0.1".into() };
        let event = Event::Client { reply: ReplyTo(0), caller, request: ClientRequest::Mkdirs(request) };
        let mut commands = Vec::new();
        self.loaded.core.on_event(NOW, 1, event, &mut commands);
        for command in commands {
            if let Command::Append { txid, edit } = command {
                self.loaded.writer.append(txid, &edit).unwrap();
            }
        }
        self.note();
    }

    pub(super) fn edits(&mut self, name: &str, count: usize) {
        for number in 0..count {
            self.mkdir(&format!("/{name}/{number}"));
            if number % 3 == 0 {
                self.loaded.writer.flush().unwrap();
                self.promise();
            }
        }
        self.loaded.writer.flush().unwrap();
        self.promise();
    }

    pub(super) fn checkpoint(&mut self) {
        self.loaded.writer.roll().unwrap();
        let core = &mut self.loaded.core;
        let header = ImageHeader {
            txid: core.checkpoint_begin(),
            epoch: self.loaded.writer.epoch(),
            cluster_id: self.loaded.facts.cluster_id.clone(),
            state_digest: core.digest(),
        };
        let dirs = self.loaded.writer.dirs();
        let mut image = ImageWriter::create(Arc::new(self.disk.clone()), &dirs, header, 1).unwrap();
        let mut pages = Vec::new();
        while !core.checkpoint_slice(1, &mut pages) {}
        for page in pages {
            image.page(&page).unwrap();
        }
        let written = image.finish().unwrap();
        if written.purge > TxId(0) {
            self.loaded.writer.purge(written.purge);
        }
    }
}

/// What a life left behind.
struct Left {
    /// What was promised before the crash.
    promised: TxId,
    states: States,
}

/// The whole life.
fn live(disk: &SimDisk, dirs: usize, crash_at: u64) -> Left {
    let mut life = Life::start(disk, dirs, crash_at, 1).unwrap();
    life.edits("a", 7);
    life.checkpoint();
    life.edits("b", 5);
    life.checkpoint();
    life.edits("c", 4);
    let (promised, mut states) = (life.promised, life.states);
    drop(life.loaded); // without an orderly end
    disk.kill();
    let mut life = Life::start(disk, dirs, crash_at, 2).unwrap();
    life.checkpoint();
    life.edits("d", 4);
    states.append(&mut life.states);
    Left { promised: promised.max(life.promised), states }
}

/// A life in which the second of two directories fails in the middle, and everything goes on in the first.
fn live_and_lose_one(disk: &SimDisk, crash_at: u64) -> Left {
    let mut life = Life::start(disk, 2, crash_at, 1).unwrap();
    life.edits("a", 5);
    let (op, path) = (FaultOp::Sync, "/meta/d1".to_owned());
    disk.inject(Fault { op, path, after: 2, times: u64::MAX, kind: io::ErrorKind::Other });
    life.edits("b", 7);
    life.checkpoint();
    life.edits("c", 3);
    Left { promised: life.promised, states: life.states }
}

/// Starts after a crash, and says what is there.
fn come_back(disk: &SimDisk, dirs: usize, left: &Left, case: &str) -> Life {
    let life = Life::start(disk, dirs, u64::MAX, 3).unwrap_or_else(|error| panic!("{case}: {error}"));
    let (last, promised) = (life.loaded.core.last_txid(), left.promised);
    assert!(last >= promised, "{case}: {promised} promised, {last} found");
    // A start may format anew, or log a new epoch under a number that nobody was told of; all else is a state that once was.
    match left.states.get(&last).filter(|_| promised > TxId(2)) {
        Some((epoch, digest)) if *epoch == life.loaded.core.epoch() => {
            assert_eq!(life.loaded.core.digest(), *digest, "{case}: another state at transaction {last}");
        }
        Some(_) => assert!(last > promised, "{case}: {promised} was promised in another epoch"),
        None => {}
    }
    life
}

fn check_after_crash(disk: &SimDisk, dirs: usize, left: &Left, case: &str) {
    let mut life = come_back(disk, dirs, left, case);
    // It goes on, and once more comes back as it was.
    life.edits("e", 3);
    let (last, digest) = (life.loaded.core.last_txid(), life.loaded.core.digest());
    drop(life);
    let life = Life::start(disk, dirs, u64::MAX, 4).unwrap_or_else(|error| panic!("{case}: {error}"));
    assert_eq!((life.loaded.core.last_txid(), life.loaded.core.digest()), (last, digest), "{case}");
}

fn crash_everywhere(dirs: usize, live: impl Fn(&SimDisk, u64) -> Left) {
    let disk = SimDisk::new(1 << 30, Entropy::seeded(0));
    let whole = live(&disk, u64::MAX);
    assert!(whole.promised > TxId(15) && whole.states.len() > 15, "{} promised", whole.promised);
    for crash_at in 1..=disk.syncs() {
        for seed in 0..2 {
            let disk = SimDisk::new(1 << 30, Entropy::seeded(seed));
            disk.freeze_at_sync(crash_at);
            let left = live(&disk, crash_at);
            disk.crash();
            check_after_crash(&disk, dirs, &left, &format!("{dirs} directories, sync {crash_at}, seed {seed}"));
        }
    }
}

/// The power goes, and goes again at a sync of the start that follows (twice in a row), wherever the first time was.
fn crash_while_starting(dirs: usize, live: impl Fn(&SimDisk, u64) -> Left) {
    let disk = SimDisk::new(1 << 30, Entropy::seeded(0));
    live(&disk, u64::MAX);
    for crash_at in 1..=disk.syncs() {
        for again_at in [1, 2, 3, 4 + crash_at % 5, 9 + crash_at % 7] {
            let disk = SimDisk::new(1 << 30, Entropy::seeded(crash_at * 31 + again_at));
            disk.freeze_at_sync(crash_at);
            let left = live(&disk, crash_at);
            disk.crash();
            let case = format!("{dirs} directories, sync {crash_at}, then sync {again_at} of the start");
            for _ in 0..2 {
                disk.freeze_at_sync(disk.syncs() + again_at);
                drop(come_back(&disk, dirs, &left, &case));
                disk.crash();
            }
            check_after_crash(&disk, dirs, &left, &case);
        }
    }
}

#[test]
fn a_crash_at_every_sync_of_one_directory() {
    crash_everywhere(1, |disk, crash_at| live(disk, 1, crash_at));
}

#[test]
fn a_crash_at_every_sync_of_two_directories() {
    crash_everywhere(2, |disk, crash_at| live(disk, 2, crash_at));
}

#[test]
fn a_crash_at_every_sync_around_the_loss_of_a_directory() {
    crash_everywhere(2, live_and_lose_one);
}

#[test]
fn a_crash_while_starting_after_a_crash() {
    crash_while_starting(1, |disk, crash_at| live(disk, 1, crash_at));
}

#[test]
fn a_crash_while_starting_after_a_crash_with_two_directories() {
    crash_while_starting(2, |disk, crash_at| live(disk, 2, crash_at));
}

#[test]
fn a_crash_while_a_stale_directory_is_filled() {
    crash_while_starting(2, live_and_lose_one);
}

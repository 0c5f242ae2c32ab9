//! The power goes at every sync of a life of the namenode: formatting, edits, images, purging, a restart, a lost directory.
//! Whatever was promised is there afterwards, and the namenode starts by itself.

use std::path::PathBuf;
use std::sync::Arc;

use cairn_common::clock::Clock;
use cairn_common::entropy::Entropy;
use cairn_common::simdisk::SimDisk;
use cairn_proto::ids::TxId;
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
}

impl Life {
    pub(super) fn start(disk: &SimDisk, dirs: usize, crash_at: u64, seed: u64) -> Result<Self> {
        Self::start_as(disk, &plan(disk, dirs), crash_at, seed)
    }

    pub(super) fn start_as(disk: &SimDisk, plan: &LoadPlan, crash_at: u64, seed: u64) -> Result<Self> {
        let ids = Entropy::seeded(seed);
        let loaded = load(plan, &mut || ids.uuid())?;
        let mut life = Self { loaded, disk: disk.clone(), crash_at, promised: TxId(0) };
        life.promise();
        Ok(life)
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

/// The whole life; returns what was promised before the crash.
fn live(disk: &SimDisk, dirs: usize, crash_at: u64) -> TxId {
    let mut life = Life::start(disk, dirs, crash_at, 1).unwrap();
    life.edits("a", 7);
    life.checkpoint();
    life.edits("b", 5);
    life.checkpoint();
    life.edits("c", 4);
    let promised = life.promised;
    drop(life); // without an orderly end: as if killed
    let mut life = Life::start(disk, dirs, crash_at, 2).unwrap();
    life.promised = promised.max(life.promised);
    life.checkpoint();
    life.edits("d", 4);
    life.promised
}

fn crash_everywhere(dirs: usize) {
    let disk = SimDisk::new(1 << 30, Entropy::seeded(0));
    live(&disk, dirs, u64::MAX);
    for crash_at in 1..=disk.syncs() {
        for seed in 0..2 {
            let disk = SimDisk::new(1 << 30, Entropy::seeded(seed));
            disk.freeze_at_sync(crash_at);
            let promised = live(&disk, dirs, crash_at);
            disk.crash();
            let case = format!("{dirs} directories, sync {crash_at}, seed {seed}");
            let mut life = Life::start(&disk, dirs, u64::MAX, 3).unwrap_or_else(|error| panic!("{case}: {error}"));
            let last = life.loaded.core.last_txid();
            assert!(last >= promised, "{case}: {promised} promised, {last} found");
            // It goes on, and once more comes back as it was.
            life.edits("e", 3);
            let (last, digest) = (life.loaded.core.last_txid(), life.loaded.core.digest());
            drop(life);
            let life = Life::start(&disk, dirs, u64::MAX, 4).unwrap_or_else(|error| panic!("{case}: {error}"));
            assert_eq!((life.loaded.core.last_txid(), life.loaded.core.digest()), (last, digest), "{case}");
        }
    }
}

#[test]
fn a_crash_at_every_sync_of_one_directory() {
    crash_everywhere(1);
}

#[test]
fn a_crash_at_every_sync_of_two_directories() {
    crash_everywhere(2);
}

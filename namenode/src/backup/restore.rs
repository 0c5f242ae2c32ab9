//! A restore: metadata directories that hold exactly the state after one transaction.
//!
//! # Overview
//! The backup's image and the records up to the wanted transaction are written into the empty directories as image and segments; then they are
//! read back as at any start. What makes it a future of its own (counters, epoch) is logged behind that by the caller.
//!
//! # Crash
//! `VERSION` says "restoring" before anything else is written and "ready" after all the rest is durable, so a directory that a
//! crash left half restored is not started from; the restore is done again.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use cairn_common::durable::{Fs, OpenMode};
use cairn_common::timetext::rfc3339;
use cairn_proto::ids::{Epoch, TxId};
use cairn_proto::{Error, ErrorCode, Result};

use super::history::{Backup, History, Target, Way};
use crate::image::format::image_name;
use crate::journal::format::{SegmentHeader, segment_name};
use crate::journal::{LogError, MetaDir};

/// What to restore.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RestorePlan {
    /// The backup.
    pub file: PathBuf,
    /// An archive of the log.
    pub log: Option<PathBuf>,
    /// Up to where.
    pub target: Target,
}

/// A restore that can be done.
pub struct Restore {
    backup: Backup,
    history: History,
    way: Way,
    target: Target,
}

/// What was written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Restored {
    /// The transaction of the image; 0: there is none.
    pub image: TxId,
    /// The transaction whose state it is.
    pub last: TxId,
    /// CRC of its record.
    pub chain: u32,
}

impl Restore {
    /// Checks the backup and finds the way to the target; nothing is written. Blocking.
    pub fn open(fs: &dyn Fs, plan: &RestorePlan) -> Result<Self> {
        let backup = Backup::open(fs, &plan.file)?;
        let history = History::open(fs, &backup, plan.log.as_deref())?;
        let way = history.walk(fs, plan.target)?;
        let restore = Self { backup, history, way, target: plan.target };
        restore.check_reached(fs)?;
        Ok(restore)
    }

    fn check_reached(&self, fs: &dyn Fs) -> Result<()> {
        let image = self.backup.header.image;
        let wanted = match self.target {
            Target::TxId(wanted) if wanted < image => format!("transaction {wanted} is before the backup's image"),
            Target::Last => match self.way.gap {
                None => return Ok(()),
                Some((from, to)) => format!("transactions {from} to {to} are missing between backup and archive"),
            },
            _ if self.way.reached => return Ok(()),
            Target::TxId(wanted) => format!("transaction {wanted} is not in backup and archive{}", self.gap_text()),
            Target::Time(wanted) => {
                format!("nothing in backup and archive is as late as {}{}", rfc3339(wanted), self.gap_text())
            }
        };
        Err(self.refused(fs, &wanted))
    }

    fn gap_text(&self) -> String {
        self.way.gap.map_or_else(String::new, |(from, to)| format!(" (transactions {from} to {to} are missing)"))
    }

    fn refused(&self, fs: &dyn Fs, why: &str) -> Error {
        let name = self.backup.header.image;
        let range = match self.history.walk(fs, Target::Last) {
            Ok(way) if way.steps.is_empty() => format!("only transaction {name} can be reached"),
            Ok(way) => {
                let (end, first) = (way.end, way.steps.first().map_or(0, |_| self.first_time(fs)));
                format!(
                    "transactions {name} to {} can be reached (times {} to {}; without --to-txid and --to-time the last one)",
                    end.txid,
                    rfc3339(first),
                    rfc3339(end.time_ms)
                )
            }
            Err(error) => error.message().to_owned(),
        };
        Error::new(ErrorCode::InvalidArgument, format!("{why}: {range}"))
    }

    /// Time of the first record behind the image.
    fn first_time(&self, fs: &dyn Fs) -> u64 {
        let first = self.backup.header.image.next();
        self.history.walk(fs, Target::TxId(first)).map_or(0, |way| way.end.time_ms)
    }

    /// The cluster and its block pool.
    pub fn cluster(&self) -> (&str, &str) {
        (&self.backup.header.cluster_id, &self.backup.header.pool_id)
    }

    /// Higher than that of anything the future that is left behind can have seen, and another one than that of any restore
    /// before, which backup and archive need not know of.
    pub fn epoch(&self, wall_ms: u64) -> Epoch {
        self.way.epoch.next_future(wall_ms)
    }

    /// With a target in time the image itself must not be later: `wall_ms` is the time of the newest edit in the state that was loaded.
    pub fn check_time(&self, fs: &dyn Fs, wall_ms: u64) -> Result<()> {
        match self.target {
            Target::Time(wanted) if wall_ms > wanted => {
                let why = format!("{} is before the backup's image ({})", rfc3339(wanted), rfc3339(wall_ms));
                Err(self.refused(fs, &why))
            }
            _ => Ok(()),
        }
    }

    /// Writes image and log into directories that were cleared. All of it is durable when this returns. Blocking.
    pub fn write(&self, fs: &dyn Fs, dirs: &[Arc<MetaDir>]) -> Result<Restored> {
        for dir in dirs {
            self.write_image(fs, dir)?;
        }
        for step in &self.way.steps {
            let records = self.history.records(fs, step)?;
            let header = SegmentHeader {
                first: step.after.txid.next(),
                epoch: step.epoch,
                chain: step.after.chain,
                cluster_id: self.backup.header.cluster_id.clone(),
            };
            let mut bytes = header.encode().to_vec();
            bytes.extend_from_slice(&records);
            for dir in dirs {
                write_new(fs, &dir.log().join(segment_name(header.first)), &bytes)?;
            }
        }
        for dir in dirs {
            for folder in [dir.image(), dir.log()] {
                fs.sync_dir(&folder).map_err(LogError::io("sync", &folder))?;
            }
        }
        Ok(Restored { image: self.backup.header.image, last: self.way.end.txid, chain: self.way.end.chain })
    }

    fn write_image(&self, fs: &dyn Fs, dir: &MetaDir) -> Result<()> {
        if self.backup.header.image == TxId(0) {
            return Ok(());
        }
        let path = dir.image().join(image_name(self.backup.header.image));
        let file = fs.open(&path, OpenMode::Create).map_err(LogError::io("make", &path))?;
        let found = self.backup.copy_image(fs, &mut |at, bytes| {
            Ok(file.write_all_at(bytes, at).map_err(LogError::io("write", &path))?)
        })?;
        if !found {
            let name = self.backup.header.image;
            return Err(Error::new(ErrorCode::Corrupt, format!("the backup names image {name} and does not hold it")));
        }
        Ok(file.sync_data().map_err(LogError::io("sync", &path))?)
    }
}

fn write_new(fs: &dyn Fs, path: &Path, bytes: &[u8]) -> Result<(), LogError> {
    let file = fs.open(path, OpenMode::Create).map_err(LogError::io("make", path))?;
    file.write_all_at(bytes, 0).map_err(LogError::io("write", path))?;
    file.sync_data().map_err(LogError::io("sync", path))
}

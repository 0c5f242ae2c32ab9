//! Holes of an archive: transactions that were purged from the log before they could be archived.
//!
//! ```text
//! DIR/hole_<from, 20 digits>_<to, 20 digits>     these transactions, both included, are in no segment of the archive
//! ```
//!
//! # Consistency
//! The log begins somewhere; what was archived before that must reach up to there. This is compared whenever the log begins
//! elsewhere than at the last look, and at a start, so a disk that was away across a restart is noticed too. The mark stays until a
//! backup was made whose image is behind the hole: nobody needs those transactions then.
//!
//! # Crash
//! The mark is durable before anything behind the hole is archived.

use std::path::{Path, PathBuf};

use cairn_common::durable::{Fs, write_atomic};
use cairn_proto::ids::{Epoch, TxId};

use super::archive::{list, segment_of_name};
use crate::journal::format::{HEADER_BYTES, record_at};
use crate::journal::{LogError, MAX_SEGMENT_BYTES};

/// Transactions that an archive lacks, both included.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Hole {
    /// The first.
    pub from: TxId,
    /// The last.
    pub to: TxId,
}

impl Hole {
    fn path(self, dir: &Path) -> PathBuf {
        dir.join(format!("hole_{:020}_{:020}", self.from.0, self.to.0))
    }

    fn of_name(name: &str) -> Option<Self> {
        let (from, to) = name.strip_prefix("hole_")?.split_once('_')?;
        let number = |digits: &str| if digits.len() == 20 { digits.parse().ok().map(TxId) } else { None };
        Some(Self { from: number(from)?, to: number(to)? }).filter(|hole| hole.path(Path::new("")).as_os_str() == name)
    }
}

/// The marks in an archive.
pub fn holes(fs: &dyn Fs, dir: &Path) -> Result<Vec<Hole>, LogError> {
    let entries = fs.read_dir(dir).map_err(LogError::io("list", dir))?;
    Ok(entries.iter().filter(|entry| !entry.is_dir).filter_map(|entry| Hole::of_name(&entry.name)).collect())
}

/// Marks a hole, durably.
pub fn mark(fs: &dyn Fs, dir: &Path, hole: Hole) -> Result<(), LogError> {
    let path = hole.path(dir);
    let text = format!(
        "Transactions {} to {} were purged from the log before they could be archived.\nNo restore gets across: make a new backup.\n",
        hole.from, hole.to
    );
    write_atomic(fs, &path, text.as_bytes()).map_err(LogError::io("write", &path))
}

/// Takes a mark away.
pub fn unmark(fs: &dyn Fs, dir: &Path, hole: Hole) -> Result<(), LogError> {
    let path = hole.path(dir);
    fs.remove_file(&path).map_err(LogError::io("remove", &path))?;
    fs.sync_dir(dir).map_err(LogError::io("sync", dir))
}

/// What the archive lacks before the log's first segment. `None`: nothing, or it begins here.
pub fn before(fs: &dyn Fs, dir: &Path, (first, epoch): (TxId, Epoch)) -> Result<Option<Hole>, LogError> {
    // Of each future that may lead here the last segment before.
    let mut last_of: std::collections::BTreeMap<Epoch, (TxId, PathBuf)> = std::collections::BTreeMap::new();
    for (path, _) in list(fs, dir)? {
        let Some((starts, of)) = segment_of_name(&path) else { continue };
        if starts > first || of > epoch {
            continue;
        }
        if starts == first {
            return Ok(None);
        }
        if last_of.get(&of).is_none_or(|(best, _)| *best < starts) {
            last_of.insert(of, (starts, path));
        }
    }
    let mut reached = None;
    for (starts, path) in last_of.into_values() {
        reached = reached.max(Some(end_of(fs, &path, starts)?));
    }
    let hole = reached.map(|end| Hole { from: end.next(), to: TxId(first.0.saturating_sub(1)) });
    Ok(hole.filter(|hole| hole.from <= hole.to))
}

/// The last transaction in an archived segment.
fn end_of(fs: &dyn Fs, path: &Path, first: TxId) -> Result<TxId, LogError> {
    let bytes = cairn_common::durable::read_all(fs, path, MAX_SEGMENT_BYTES).map_err(LogError::io("read", path))?;
    let (mut end, mut at) = (TxId(first.0.saturating_sub(1)), HEADER_BYTES);
    while let Some(record) = record_at(&bytes, at) {
        (end, at) = (record.txid, record.end);
    }
    Ok(end)
}

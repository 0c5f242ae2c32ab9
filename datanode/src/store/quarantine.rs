//! Quarantine: where replicas go of which the namenode knows nothing.
//!
//! ```text
//! <dir>/<pool>/quarantine/<name as before>.<wall time in ms, 20 digits>
//! ```
//!
//! # Consistency
//! A namenode that was started from old metadata, or restored, does not know what came later. What it does not know is never
//! removed at once: the file is moved here, is neither served nor reported, counts as used room, and goes after
//! `quarantine_ms`. A namenode whose restore waits to be confirmed wants to see everything: then finalized replicas come back
//! ([`BlockStore::bring_back`]) unless a replica of the block is there already; it knows them by then, or orders them away again.
//!
//! # Crash
//! A rename moves a file in or out; after a crash it has one name or the other, and both are right.
//!
//! # Time
//! The age of a file counts by a clock that jumps of the wall clock cannot push forward, and nothing goes in the first hour of a
//! process: a clock that was wrong at boot is set right by then.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use cairn_common::clock::{Clock, Now};
use cairn_proto::Result;
use cairn_proto::blockfile;
use cairn_proto::ids::{BlockId, Generation};

use super::BlockStore;
use super::map::{Entry, Kind};
use super::volume::Volume;
use crate::transfer::Transfer;

/// Name of the folder.
pub const FOLDER: &str = "quarantine";
/// Longest pause between two looks.
const LOOK: Duration = Duration::from_secs(60);
/// Nothing goes before a process is this old (or `quarantine_ms`, if that is less).
const GRACE_MS: u64 = 3_600_000;

/// A wall clock that goes no faster than the monotonic one since the start.
#[derive(Clone, Copy)]
struct SteadyWall {
    start: Now,
}

impl SteadyWall {
    fn at(self, now: Now) -> u64 {
        now.wall_ms.min(self.start.wall_ms + now.mono_ms.saturating_sub(self.start.mono_ms))
    }
}

fn name_of(original: &str, wall_ms: u64) -> String {
    format!("{original}.{wall_ms:020}")
}

/// What the file was called, and when it came here.
fn parse_name(name: &str) -> Option<(&str, u64)> {
    let (original, digits) = name.rsplit_once('.')?;
    let is_time = digits.len() == 20 && digits.bytes().all(|byte| byte.is_ascii_digit());
    is_time.then(|| digits.parse().ok()).flatten().map(|wall_ms| (original, wall_ms))
}

impl Volume {
    fn quarantine(&self) -> Result<PathBuf> {
        Ok(self.pool_root()?.join(FOLDER))
    }
}

impl BlockStore {
    /// Puts a replica away by an order of this epoch, unless it has a newer generation or a newer epoch was heard of. A writer is stopped first.
    pub async fn quarantine(
        self: &Arc<Self>,
        block: BlockId,
        generation: Generation,
        storage_id: &str,
        epoch: u64,
    ) -> Result<()> {
        let (volume, entry) = self.claim_for_removal(block, generation, storage_id, epoch).await?;
        let store = Arc::clone(self);
        self.env
            .work
            .io(move || match store.put_away(volume, block, &entry) {
                Ok(()) => {
                    // Only now: a copy that comes back must not meet the old file of the same name.
                    store.map.forget(volume, block, entry.generation, true);
                    Ok(())
                }
                Err(error) => {
                    store.map.settle(volume, block, entry, false);
                    Err(error)
                }
            })
            .await
    }

    fn put_away(&self, volume: usize, block: BlockId, entry: &Entry) -> Result<()> {
        let storage = &self.volumes[volume];
        let Some((from, _)) = self.file_of(volume, block, entry) else { return Ok(()) };
        let Some(name) = from.file_name().and_then(|name| name.to_str()) else { return Ok(()) };
        let folder = storage.quarantine()?;
        let to = folder.join(name_of(name, self.env.clock.wall_ms()));
        self.cache.remove(block, entry.generation);
        match self.env.fs.rename(&from, &to) {
            // Nothing is left that could be put away.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            renamed => renamed.map_err(|error| storage.failed(format!("renaming to {}", to.display()), &error))?,
        }
        tracing::warn!("{} is unknown to the namenode; it is in quarantine as {}", from.display(), to.display());
        for changed in [Some(folder.as_path()), from.parent()].into_iter().flatten() {
            storage.sync_folder(changed)?;
        }
        Ok(())
    }

    /// Takes finalized replicas out of quarantine; returns how many came back.
    pub async fn bring_back(self: &Arc<Self>) -> u64 {
        let store = Arc::clone(self);
        self.env.work.io(move || (0..store.volumes.len()).map(|volume| store.bring_back_in(volume)).sum()).await
    }

    fn bring_back_in(&self, volume: usize) -> u64 {
        let storage = &self.volumes[volume];
        let mut count = 0;
        for (path, length) in self.quarantined(storage) {
            match self.bring_back_file(volume, &path, length) {
                Ok(came) => count += u64::from(came),
                Err(error) => tracing::warn!("{} stays in quarantine: {error}", path.display()),
            }
        }
        if count > 0 {
            tracing::info!("{count} replicas of {} came back from quarantine", storage.root().display());
        }
        count
    }

    fn bring_back_file(&self, volume: usize, path: &Path, stored: u64) -> Result<bool> {
        let name = path.file_name().and_then(|name| name.to_str()).and_then(parse_name);
        let Some((block, generation, Some(length))) = name.and_then(|(name, _)| blockfile::parse_name(name)) else {
            return Ok(false);
        };
        let storage = &self.volumes[volume];
        if self.map.claim_new(block, generation, volume, |_| false).is_err() {
            // A replica of it is here: the namenode will say which one is right.
            return Ok(false);
        }
        let moved = storage
            .rename_to_final(path, block, generation, length)
            .and_then(|_| storage.sync_final(block))
            .and_then(|()| storage.sync_folder(&storage.quarantine()?));
        match moved {
            Ok(()) => {
                self.map.settle(volume, block, Entry { generation, kind: Kind::Finalized { length, stored } }, true);
                Ok(true)
            }
            Err(error) => {
                self.map.forget(volume, block, generation, false);
                Err(error)
            }
        }
    }

    /// Removes what came before `before_ms`; returns how many files went.
    pub async fn empty_quarantine(self: &Arc<Self>, before_ms: u64) -> u64 {
        let store = Arc::clone(self);
        self.env.work.io(move || store.volumes.iter().map(|storage| store.empty_one(storage, before_ms)).sum()).await
    }

    fn empty_one(&self, storage: &Volume, before_ms: u64) -> u64 {
        let mut count = 0;
        for (path, length) in self.quarantined(storage) {
            let since = path.file_name().and_then(|name| name.to_str()).and_then(parse_name).map(|(_, since)| since);
            if since.is_none_or(|since| since > before_ms) {
                continue;
            }
            match self.env.fs.remove_file(&path) {
                Ok(()) => {
                    storage.removed(length);
                    count += 1;
                }
                Err(error) => tracing::warn!("{} could not be removed: {error}", path.display()),
            }
        }
        count
    }

    /// Files in quarantine with their sizes; none while the volume is out of service or has no pool yet.
    fn quarantined(&self, storage: &Volume) -> Vec<(PathBuf, u64)> {
        let Ok(folder) = storage.quarantine() else { return Vec::new() };
        if storage.failure().is_some() {
            return Vec::new();
        }
        match self.env.fs.read_dir(&folder) {
            Ok(entries) => {
                let files = entries.into_iter().filter(|entry| !entry.is_dir);
                files.map(|entry| (folder.join(&entry.name), entry.len)).collect()
            }
            Err(error) => {
                tracing::warn!("{} cannot be listed: {error}", folder.display());
                Vec::new()
            }
        }
    }
}

/// Removes what has been in quarantine for long enough, until the daemon ends.
pub async fn keep(transfer: Arc<Transfer>) {
    let clock: Clock = transfer.env.clock.clone();
    let keep_ms = transfer.settings.quarantine_ms;
    let wall = SteadyWall { start: clock.now() };
    let pause = LOOK.min(Duration::from_millis((keep_ms / 4).max(100)));
    loop {
        tokio::select! { biased;
            () = transfer.stopping() => return,
            () = clock.sleep(pause) => {}
        }
        let now = clock.now();
        if now.mono_ms.saturating_sub(wall.start.mono_ms) < GRACE_MS.min(keep_ms) {
            continue;
        }
        let Some(before_ms) = wall.at(now).checked_sub(keep_ms) else { continue };
        let gone = transfer.store.empty_quarantine(before_ms).await;
        if gone > 0 {
            tracing::info!("{gone} replicas were in quarantine for {} s and are removed", keep_ms / 1_000);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_keep_what_the_file_was_called() {
        let name = name_of("1073741825_1001_77.blk", 1_700_000_000_000);
        assert_eq!(parse_name(&name), Some(("1073741825_1001_77.blk", 1_700_000_000_000)));
        for other in ["1073741825_1001_77.blk", "x", ".00000000000000000001x", "a.0001"] {
            assert_eq!(parse_name(other), None, "{other}");
        }
    }

    #[test]
    fn a_jump_of_the_wall_clock_makes_nothing_older() {
        let wall = SteadyWall { start: Now { mono_ms: 5_000, wall_ms: 1_000_000 } };
        assert_eq!(wall.at(Now { mono_ms: 6_000, wall_ms: 1_001_000 }), 1_001_000);
        assert_eq!(wall.at(Now { mono_ms: 6_000, wall_ms: 99_000_000 }), 1_001_000, "forward");
        assert_eq!(wall.at(Now { mono_ms: 6_000, wall_ms: 7 }), 7, "back: everything is younger");
    }
}

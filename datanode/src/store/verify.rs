//! The datanode's own verdict on a replica: the only one that counts.
//!
//! # Overview
//! [`BlockStore::verify`] reads a whole replica and checks every checksum. One that does not verify, or cannot be read from a disk that otherwise
//! works, is set aside and reported; the namenode has another copied and then this one deleted. One that was set aside and verifies now (a
//! controller had a bad day) is taken back.
//!
//! # Cancellation
//! Must be driven to its end (run it in a task of its own); [`Pace`] ends it early when the daemon stops.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use cairn_common::clock::Clock;
use cairn_common::durable;
use cairn_proto::blockfile;
use cairn_proto::ids::{BlockId, Generation};
use cairn_proto::{Error, ErrorCode, Result};
use tokio::sync::watch;

use super::map::{Entry, Kind, not_found};
use super::scan::{self, Check, CheckError};
use super::{BlockStore, stale};

/// Bytes read by one piece of work.
const STEP_BYTES: u64 = 1 << 20;
/// A read that the disk refused is tried once more after this.
const SECOND_LOOK: Duration = Duration::from_millis(200);

/// How fast a check may read, and when it must end.
pub struct Pace {
    clock: Clock,
    bytes_per_second: u64,
    /// When what was read so far is paid for.
    paid_us: u64,
    stop: watch::Receiver<bool>,
}

impl Pace {
    /// At most `bytes_per_second`, until `stop` holds `true`.
    pub fn new(clock: Clock, bytes_per_second: u64, stop: watch::Receiver<bool>) -> Self {
        Self { clock, bytes_per_second: bytes_per_second.max(1), paid_us: 0, stop }
    }

    /// So much was read.
    fn spent(&mut self, bytes: u64) {
        // Time in which nothing was read is not saved up.
        let from_us = self.paid_us.max(self.clock.mono_us());
        self.paid_us = from_us + bytes.saturating_mul(1_000_000) / self.bytes_per_second;
    }

    /// Waits until more may be read; `false`: the daemon ends.
    pub async fn ready(&mut self) -> bool {
        let wait_us = self.paid_us.saturating_sub(self.clock.mono_us());
        self.pause(Duration::from_micros(wait_us)).await
    }

    /// Waits; `false`: the daemon ends.
    pub async fn pause(&mut self, duration: Duration) -> bool {
        tokio::select! {
            biased;
            _ = self.stop.wait_for(|stop| *stop) => false,
            () = self.clock.sleep(duration) => true,
        }
    }
}

impl BlockStore {
    /// Reads a whole finalized replica and checks every checksum; a bad one is set aside. Returns its length and size on disk.
    pub async fn verify(self: &Arc<Self>, block: BlockId, generation: Generation) -> Result<(u64, u64)> {
        self.verify_at(block, generation, None).await
    }

    /// The same at a pace.
    pub async fn verify_at(
        self: &Arc<Self>,
        block: BlockId,
        generation: Generation,
        pace: Option<&mut Pace>,
    ) -> Result<(u64, u64)> {
        let (volume, entry) = self.map.get(block).ok_or_else(|| not_found(block))?;
        if entry.generation < generation {
            return Err(stale(block, entry.generation, generation));
        }
        let (length, path) = match &entry.kind {
            Kind::Finalized { length, .. } => {
                (*length, self.volumes[volume].finalized_path(block, entry.generation, *length)?)
            }
            Kind::Corrupt { path, .. } => match whole_name(path) {
                Some(length) => (length, path.clone()),
                None => return Err(scan::corrupt(path, &"set aside, it is no whole block file")),
            },
            Kind::Writing(_) | Kind::Recovering { .. } | Kind::Claimed(_) => {
                let text = format!("block {block} is not finalized here: there is nothing to verify yet");
                return Err(Error::new(ErrorCode::Busy, text).with_subject(block.to_string()));
            }
        };
        let set_aside = matches!(entry.kind, Kind::Corrupt { .. });
        match self.check(&path, block, length, pace).await {
            Ok(Some(stored)) => {
                if set_aside {
                    self.take_back(volume, block, entry.generation, length).await;
                }
                Ok((length, stored))
            }
            Ok(None) => Err(Error::new(ErrorCode::Busy, "this datanode is ending")),
            Err(flaw) if set_aside => Err(scan::corrupt(&path, &format!("set aside: {flaw}"))),
            Err(flaw) => self.judge(volume, block, &entry, &path, flaw).await,
        }
    }

    /// What follows from a check that found a flaw.
    async fn judge(
        self: &Arc<Self>,
        volume: usize,
        block: BlockId,
        entry: &Entry,
        path: &Path,
        flaw: CheckError,
    ) -> Result<(u64, u64)> {
        if let Some(error) = flaw.machine() {
            if error.kind() == io::ErrorKind::NotFound {
                self.file_is_gone(block, entry.generation, path);
                return Err(not_found(block));
            }
            let told = self.volumes[volume].read_failed(format!("reading {}", path.display()), error);
            if !durable::is_device_failure(error) {
                return Err(told.with_subject(block.to_string()));
            }
            let store = Arc::clone(self);
            self.env.work.io(move || store.volumes[volume].check()).await;
            if self.volumes[volume].is_failed() {
                return Err(told.with_subject(block.to_string()));
            }
            // The disk works but for this file: it counts as bad, so that another copy is made.
        }
        self.set_aside(block, entry.generation, flaw.to_string()).await;
        Err(scan::corrupt(path, &flaw))
    }

    /// Bytes of the file if all of it verifies; `None`: the daemon ends.
    async fn check(
        self: &Arc<Self>,
        path: &Path,
        block: BlockId,
        length: u64,
        mut pace: Option<&mut Pace>,
    ) -> Result<Option<u64>, CheckError> {
        let mut tried_again = false;
        let mut check: Option<Check> = None;
        loop {
            if let Some(pace) = &mut pace
                && !pace.ready().await
            {
                return Ok(None);
            }
            let before = check.as_ref().map_or(0, Check::position);
            let (store, at, begun) = (Arc::clone(self), path.to_owned(), check.take());
            let step = move || -> (Option<Check>, Result<bool, CheckError>) {
                let begun = begun.map_or_else(|| Check::begin(&*store.env.fs, &at, block, length), Ok);
                match begun {
                    Ok(mut check) => {
                        let stepped = check.step(STEP_BYTES);
                        (Some(check), stepped)
                    }
                    Err(error) => (None, Err(error)),
                }
            };
            // Decompression is part of it, but so is waiting for the disk.
            let (begun, stepped) = self.env.work.io(step).await;
            check = begun;
            if let Some(pace) = &mut pace {
                pace.spent(check.as_ref().map_or(0, Check::position).saturating_sub(before));
            }
            match (stepped, &check) {
                (Ok(true), Some(check)) => return Ok(Some(check.stored())),
                (Ok(_), _) => {}
                (Err(flaw), _) => {
                    let refused = flaw.machine().is_some_and(durable::is_device_failure);
                    if !refused || tried_again {
                        return Err(flaw);
                    }
                    tried_again = true;
                    self.env.clock.sleep(SECOND_LOOK).await;
                }
            }
        }
    }

    /// A replica that was set aside verifies now.
    async fn take_back(self: &Arc<Self>, volume: usize, block: BlockId, generation: Generation, length: u64) {
        let same = |entry: &Entry| match entry.kind {
            Kind::Corrupt { .. } if entry.generation == generation => Ok(()),
            _ => Err(not_found(block)),
        };
        let Ok((_, entry)) = self.map.claim(block, same) else { return };
        let store = Arc::clone(self);
        self.env
            .work
            .io(move || {
                let Kind::Corrupt { path, stored, .. } = &entry.kind else { return };
                let (storage, stored) = (&store.volumes[volume], *stored);
                let renamed = storage.rename_to_final(path, block, generation, length);
                match renamed.and_then(|_| storage.sync_final(block)) {
                    Ok(()) => {
                        tracing::warn!("{} verifies again; it is taken back into service", path.display());
                        let kind = Kind::Finalized { length, stored };
                        store.map.settle(volume, block, Entry { generation, kind }, true);
                    }
                    Err(error) => {
                        tracing::warn!("{} verifies again but cannot be taken back: {error}", path.display());
                        store.map.settle(volume, block, entry, false);
                    }
                }
            })
            .await;
    }
}

/// The length in the name of a whole block file.
fn whole_name(path: &Path) -> Option<u64> {
    let name = path.file_name()?.to_string_lossy().into_owned();
    blockfile::parse_name(&name).and_then(|(_, _, length)| length)
}

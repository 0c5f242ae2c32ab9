//! Checks in the background: the scanner of replicas, and the comparison of folders with the replica map.
//!
//! # Overview
//! One [`scanner`] per volume reads its replicas in the order of their ids, at most `scan_bytes_per_second`: first those under suspicion (a
//! reader, a copy or the comparison found them wanting), then those that were not checked within `scan_period_ms`. A bad one is set aside and
//! reported by the store. [`folders`] looks every few hours for files that vanished, and for files that nobody knows.
//!
//! # Crash
//! Where the scanner is and when each block was checked is noted in a key-value store, flushed from time to time. What a crash takes of it (or all
//! of it, when its folder was damaged) means that some blocks are checked once more, never that one is left out.
//!
//! ```text
//! verified/<block id, 16 hex digits>   u8 version 1, u64 wall time in ms (little endian)
//! scan/<storage id>                    u8 version 1, i64 last block looked at, u64 begin of the pass, u64 end of the last whole pass
//! ```
//!
//! # Cancellation
//! Everything ends within one step of reading (1 MiB) when the daemon stops.

mod folders;
mod scanner;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use cairn_common::Env;
use cairn_common::kv::KeyValue;
use cairn_proto::ids::BlockId;
use cairn_proto::{ErrorCode, Result};

use crate::store::map::ReplicaMap;
use crate::transfer::Transfer;

/// Notes are made durable after so many, or when a scanner pauses.
const FLUSH_EVERY: u64 = 64;
/// Notes looked through at once when those of deleted blocks are removed.
const PRUNE_PAGE: usize = 1_000;
const VERSION: u8 = 1;
const VERIFIED: &str = "verified/";

/// Where the scanner of a volume is.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) struct Cursor {
    /// Last block looked at; 0: none in this pass.
    pub after: i64,
    /// Wall time at which the pass began; 0: none is under way.
    pub began_ms: u64,
    /// Wall time at which the last whole pass ended.
    pub ended_ms: u64,
}

/// Notes and counts of all checks of a node.
pub struct Scrub {
    env: Env,
    kv: Option<Arc<dyn KeyValue>>,
    unflushed: AtomicU64,
    blocks: AtomicU64,
    bytes: AtomicU64,
    corrupt: AtomicU64,
    errors: AtomicU64,
    skipped: AtomicU64,
    passes: AtomicU64,
    folders_compared: AtomicU64,
    files_missing: AtomicU64,
    files_unknown: AtomicU64,
    volumes: Vec<Pass>,
}

#[derive(Default)]
struct Pass {
    blocks: AtomicU64,
    began_ms: AtomicU64,
}

impl Scrub {
    /// Notes go to `kv`; without one everything is checked again after each start.
    pub fn new(env: &Env, kv: Option<Arc<dyn KeyValue>>, volumes: usize) -> Self {
        Self {
            env: env.clone(),
            kv,
            unflushed: AtomicU64::new(0),
            blocks: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            corrupt: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            skipped: AtomicU64::new(0),
            passes: AtomicU64::new(0),
            folders_compared: AtomicU64::new(0),
            files_missing: AtomicU64::new(0),
            files_unknown: AtomicU64::new(0),
            volumes: (0..volumes).map(|_| Pass::default()).collect(),
        }
    }

    /// Name, kind and value of each figure, for `/metrics`.
    pub fn figures(&self) -> Vec<(&'static str, &'static str, u64)> {
        let value = |count: &AtomicU64| count.load(Ordering::Relaxed);
        vec![
            ("scan_blocks_total", "counter", value(&self.blocks)),
            ("scan_bytes_total", "counter", value(&self.bytes)),
            ("scan_corrupt_total", "counter", value(&self.corrupt)),
            ("scan_errors_total", "counter", value(&self.errors)),
            ("scan_skipped_total", "counter", value(&self.skipped)),
            ("scan_passes_total", "counter", value(&self.passes)),
            ("directory_scans_total", "counter", value(&self.folders_compared)),
            ("directory_scan_missing_total", "counter", value(&self.files_missing)),
            ("directory_scan_unknown_total", "counter", value(&self.files_unknown)),
        ]
    }

    /// Blocks of a volume that this pass has looked at.
    pub fn pass_blocks(&self, volume: usize) -> u64 {
        self.volumes.get(volume).map_or(0, |pass| pass.blocks.load(Ordering::Relaxed))
    }

    /// Wall time at which the pass over a volume began; 0: none is under way.
    pub fn pass_started_ms(&self, volume: usize) -> u64 {
        self.volumes.get(volume).map_or(0, |pass| pass.began_ms.load(Ordering::Relaxed))
    }

    /// Counts and notes the outcome of a check, whoever asked for it.
    pub(crate) async fn note(&self, block: BlockId, outcome: &Result<(u64, u64)>) {
        match outcome {
            Ok((_, stored)) => {
                self.blocks.fetch_add(1, Ordering::Relaxed);
                self.bytes.fetch_add(*stored, Ordering::Relaxed);
                let mut value = vec![VERSION];
                value.extend_from_slice(&self.env.clock.wall_ms().to_le_bytes());
                self.put(verified_key(block.0), value).await;
            }
            Err(error) => match error.code() {
                ErrorCode::Corrupt => drop(self.corrupt.fetch_add(1, Ordering::Relaxed)),
                // Deleted or changed meanwhile.
                ErrorCode::BlockNotFound | ErrorCode::Busy | ErrorCode::StaleGeneration => {}
                _ => drop(self.errors.fetch_add(1, Ordering::Relaxed)),
            },
        }
    }

    /// When these blocks were last found good, wall time; 0: not known.
    async fn verified_ms(&self, blocks: Vec<i64>) -> Vec<u64> {
        let Some(kv) = self.kv.clone() else { return vec![0; blocks.len()] };
        let at = move |id: i64| match kv.get(&verified_key(id)) {
            Ok(Some(value)) => {
                value.strip_prefix(&[VERSION]).and_then(|rest| rest.try_into().ok()).map_or(0, u64::from_le_bytes)
            }
            _ => 0,
        };
        self.env.work.io(move || blocks.into_iter().map(at).collect()).await
    }

    async fn cursor(&self, storage_id: &str) -> Cursor {
        let Some(kv) = self.kv.clone() else { return Cursor::default() };
        let key = cursor_key(storage_id);
        let value = self.env.work.io(move || kv.get(&key)).await;
        value.ok().flatten().and_then(|value| Cursor::decode(&value)).unwrap_or_default()
    }

    async fn set_cursor(&self, storage_id: &str, cursor: Cursor) {
        self.put(cursor_key(storage_id), cursor.encode()).await;
    }

    async fn put(&self, key: Vec<u8>, value: Vec<u8>) {
        let Some(kv) = self.kv.clone() else { return };
        let flush = self.unflushed.fetch_add(1, Ordering::Relaxed) % FLUSH_EVERY == FLUSH_EVERY - 1;
        let put = move || kv.put(&key, &value).and_then(|()| if flush { kv.flush() } else { Ok(()) });
        self.complain(self.env.work.io(put).await);
    }

    async fn flush(&self) {
        let Some(kv) = self.kv.clone() else { return };
        self.complain(self.env.work.io(move || kv.flush()).await);
    }

    /// It can be learnt again by checking again.
    fn complain(&self, done: io::Result<()>) {
        if let Err(error) = done {
            tracing::warn!("the outcome of a check could not be noted: {error}");
        }
    }

    /// Removes the notes on blocks that are not here any more.
    async fn prune(&self, map: &ReplicaMap) {
        let Some(kv) = self.kv.clone() else { return };
        let mut after: Option<Vec<u8>> = None;
        loop {
            let (page_of, from) = (Arc::clone(&kv), after.take());
            let page = self.env.work.io(move || page_of.scan(VERIFIED.as_bytes(), from.as_deref(), PRUNE_PAGE)).await;
            let Ok(page) = page else { return };
            after = page.last().map(|(key, _)| key.clone());
            let gone: Vec<Vec<u8>> = page
                .into_iter()
                .map(|(key, _)| key)
                .filter(|key| block_of_key(key).is_none_or(|block| map.get(block).is_none()))
                .collect();
            let remove_from = Arc::clone(&kv);
            self.complain(self.env.work.io(move || gone.iter().try_for_each(|key| remove_from.remove(key))).await);
            if after.is_none() {
                return;
            }
        }
    }
}

fn verified_key(block: i64) -> Vec<u8> {
    format!("{VERIFIED}{block:016x}").into_bytes()
}

fn block_of_key(key: &[u8]) -> Option<BlockId> {
    let digits = std::str::from_utf8(key.strip_prefix(VERIFIED.as_bytes())?).ok()?;
    i64::from_str_radix(digits, 16).ok().map(BlockId)
}

fn cursor_key(storage_id: &str) -> Vec<u8> {
    format!("scan/{storage_id}").into_bytes()
}

impl Cursor {
    fn encode(self) -> Vec<u8> {
        let mut value = vec![VERSION];
        value.extend_from_slice(&self.after.to_le_bytes());
        value.extend_from_slice(&self.began_ms.to_le_bytes());
        value.extend_from_slice(&self.ended_ms.to_le_bytes());
        value
    }

    fn decode(value: &[u8]) -> Option<Self> {
        let rest: [u8; 24] = value.strip_prefix(&[VERSION])?.try_into().ok()?;
        let number = |at: usize| rest[at..at + 8].try_into().ok().map(u64::from_le_bytes);
        Some(Self { after: number(0)? as i64, began_ms: number(8)?, ended_ms: number(16)? })
    }
}

/// Runs all checks in the background until the daemon ends.
pub async fn run(transfer: Arc<Transfer>) {
    let scanners = (0..transfer.store.volumes().len()).map(|volume| scanner::run(&transfer, volume));
    let scanners = futures_util::future::join_all(scanners);
    let interval = Duration::from_millis(transfer.settings.directory_scan_interval_ms);
    let compare = async {
        while !interval.is_zero() {
            let mut stop = transfer.stop_signal();
            tokio::select! {
                biased;
                _ = stop.wait_for(|stop| *stop) => return,
                () = transfer.env.clock.sleep(interval) => {}
            }
            folders::compare(&transfer).await;
        }
    };
    tokio::join!(scanners, compare);
    transfer.scrub.flush().await;
}

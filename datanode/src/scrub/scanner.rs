//! The scanner of one volume; see the room's doc.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use cairn_proto::ErrorCode;
use cairn_proto::ids::{BlockId, Generation};

use super::Cursor;
use crate::store::map::{Entry, Kind};
use crate::store::verify::Pace;
use crate::transfer::Transfer;

/// Replicas taken from the map at once.
const PAGE: usize = 256;

/// The daemon ends, or the volume is out of service.
struct Ended;

/// Scans a volume until the daemon ends or the volume is out of service.
pub(super) async fn run(transfer: &Arc<Transfer>, volume: usize) {
    let rate = transfer.settings.scan_bytes_per_second;
    let pace = Pace::new(transfer.env.clock.clone(), if rate == 0 { u64::MAX } else { rate }, transfer.stop_signal());
    let storage_id = transfer.store.volume(volume).storage_id().to_owned();
    let cursor = transfer.scrub.cursor(&storage_id).await;
    let mut scanner = Scanner { transfer, volume, storage_id, pace, cursor };
    // Why it ended is said elsewhere.
    let Ended = scanner.passes(rate > 0).await;
}

struct Scanner<'a> {
    transfer: &'a Arc<Transfer>,
    volume: usize,
    storage_id: String,
    pace: Pace,
    cursor: Cursor,
}

impl Scanner<'_> {
    async fn passes(&mut self, enabled: bool) -> Ended {
        let clock = &self.transfer.env.clock;
        let pause_ms = self.transfer.settings.scan_pause_ms;
        let mut suspected = self.transfer.store.suspected();
        loop {
            suspected.mark_unchanged();
            if let Err(ended) = self.suspects().await {
                return ended;
            }
            // A clock that was set back tells nothing of the time since: a pass is due, not put off until the clock is there again.
            let since_ms = clock.wall_ms().checked_sub(self.cursor.ended_ms).unwrap_or(pause_ms);
            let wait_ms = if self.cursor.began_ms > 0 { 0 } else { pause_ms.saturating_sub(since_ms).min(pause_ms) };
            if enabled && wait_ms == 0 {
                if let Err(ended) = self.pass().await {
                    return ended;
                }
                continue;
            }
            let wait = Duration::from_millis(if enabled { wait_ms } else { pause_ms });
            tokio::select! {
                biased;
                going_on = self.pace.pause(wait) => if !going_on { return Ended },
                _ = suspected.changed() => {}
            }
        }
    }

    /// One pass, or the rest of the one that a restart interrupted.
    async fn pass(&mut self) -> Result<(), Ended> {
        let scrub = &self.transfer.scrub;
        let progress = &scrub.volumes[self.volume];
        if self.cursor.began_ms == 0 {
            self.cursor = Cursor { after: 0, began_ms: self.transfer.env.clock.wall_ms().max(1), ..self.cursor };
            progress.blocks.store(0, Ordering::Relaxed);
            self.save().await;
        }
        progress.began_ms.store(self.cursor.began_ms, Ordering::Relaxed);
        loop {
            let page = self.transfer.store.map().finalized(self.volume, Some(self.cursor.after), PAGE);
            if page.is_empty() {
                break;
            }
            let verified_ms = scrub.verified_ms(page.iter().map(|(block, _)| block.0).collect()).await;
            for ((block, entry), at_ms) in page.into_iter().zip(verified_ms) {
                self.suspects().await?;
                if self.is_due(&entry, at_ms) {
                    self.verify(block, entry.generation).await?;
                } else {
                    scrub.skipped.fetch_add(1, Ordering::Relaxed);
                }
                progress.blocks.fetch_add(1, Ordering::Relaxed);
                self.cursor.after = block.0;
            }
            self.save().await;
        }
        scrub.prune(self.transfer.store.map()).await;
        self.cursor = Cursor { after: 0, began_ms: 0, ended_ms: self.transfer.env.clock.wall_ms() };
        progress.began_ms.store(0, Ordering::Relaxed);
        scrub.passes.fetch_add(1, Ordering::Relaxed);
        self.save().await;
        scrub.flush().await;
        Ok(())
    }

    fn is_due(&self, entry: &Entry, verified_ms: u64) -> bool {
        let now_ms = self.transfer.env.clock.wall_ms();
        // One that was set aside may verify again; a note from the future says that the clock was wrong.
        let recent = verified_ms <= now_ms && now_ms - verified_ms < self.transfer.settings.scan_period_ms;
        matches!(entry.kind, Kind::Corrupt { .. }) || !recent
    }

    /// Checks what is under suspicion, which goes before all else.
    async fn suspects(&mut self) -> Result<(), Ended> {
        while let Some(block) = self.transfer.store.take_suspect(self.volume) {
            self.verify(block, Generation(0)).await?;
        }
        if self.transfer.store.volume(self.volume).is_failed() || *self.transfer.stop_signal().borrow() {
            return Err(Ended);
        }
        Ok(())
    }

    async fn verify(&mut self, block: BlockId, generation: Generation) -> Result<(), Ended> {
        let outcome = self.transfer.store.verify_at(block, generation, Some(&mut self.pace)).await;
        self.transfer.scrub.note(block, &outcome).await;
        if let Err(error) = outcome
            && !matches!(error.code(), ErrorCode::BlockNotFound | ErrorCode::Busy | ErrorCode::StaleGeneration)
        {
            tracing::warn!("the scanner found a bad replica of block {block}: {error}");
        }
        // What the next start goes on after; if it is lost, a block is checked twice.
        if *self.transfer.stop_signal().borrow() {
            self.save().await;
            return Err(Ended);
        }
        Ok(())
    }

    async fn save(&self) {
        self.transfer.scrub.set_cursor(&self.storage_id, self.cursor).await;
    }
}

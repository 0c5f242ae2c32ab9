//! Bytes that wait for the disk are bounded, per writer and for all writers of the node together.
//!
//! A chunk is read before it asks for room, so beyond these bounds each writer holds one more chunk (a frame, or 128 KiB of small ones). Idle
//! buffers that are kept for their next use may take half as much again. Room comes back when the disk has written, which waits for no network: whoever waits gets it in time, first come, first served.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Room is counted in units of this.
const UNIT: usize = 1 << 10;
/// Bytes that may wait, per writer.
const WRITER_BYTES: usize = 8 << 20;

/// The room of all writers of this node.
#[derive(Clone)]
pub struct NodeBudget {
    units: Arc<Semaphore>,
    /// What one chunk takes at most, so that the largest one gets in.
    most: usize,
    /// Bytes of buffers that are kept.
    kept: Arc<AtomicUsize>,
    most_kept: usize,
}

impl NodeBudget {
    /// Room for so many bytes.
    pub fn new(bytes: u64) -> Self {
        let units = usize::try_from(bytes).unwrap_or(usize::MAX).div_ceil(UNIT).clamp(1, Semaphore::MAX_PERMITS);
        let most_kept = units.saturating_mul(UNIT) / 2;
        let most = units.min(WRITER_BYTES / UNIT);
        Self { units: Arc::new(Semaphore::new(units)), most, kept: Arc::default(), most_kept }
    }

    /// Whether a buffer of so many bytes may be kept; if so it counts until [`Self::let_go`].
    pub fn keep(&self, bytes: usize) -> bool {
        let fits = self.kept.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes) <= self.most_kept;
        if !fits {
            self.let_go(bytes);
        }
        fits
    }

    /// A buffer is kept no more.
    pub fn let_go(&self, bytes: usize) {
        self.kept.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// The room of one writer, inside that of its node.
pub struct WriterBudget {
    own: Arc<Semaphore>,
    node: NodeBudget,
}

/// Room that is taken; dropping it gives it back.
pub struct Share {
    _own: OwnedSemaphorePermit,
    _node: OwnedSemaphorePermit,
}

impl WriterBudget {
    /// For a new writer.
    pub fn new(node: &NodeBudget) -> Self {
        Self { own: Arc::new(Semaphore::new(WRITER_BYTES / UNIT)), node: node.clone() }
    }

    fn units(&self, bytes: usize) -> u32 {
        bytes.div_ceil(UNIT).min(self.node.most) as u32
    }

    /// Room for a chunk if there is some now.
    pub fn try_take(&self, bytes: usize) -> Option<Share> {
        let units = self.units(bytes);
        let own = Arc::clone(&self.own).try_acquire_many_owned(units).ok()?;
        let node = Arc::clone(&self.node.units).try_acquire_many_owned(units).ok()?;
        Some(Share { _own: own, _node: node })
    }

    /// Waits for room; counts if it is the node's that is short. The order (own first) keeps a writer from holding the others' room while it
    /// waits for its own disk. `None` never comes: the semaphores are not closed.
    pub async fn take(&self, bytes: usize, waits: &AtomicU64) -> Option<Share> {
        let units = self.units(bytes);
        let own = Arc::clone(&self.own).acquire_many_owned(units).await.ok()?;
        if self.node.units.available_permits() < units as usize {
            waits.fetch_add(1, Ordering::Relaxed);
        }
        let node = Arc::clone(&self.node.units).acquire_many_owned(units).await.ok()?;
        Some(Share { _own: own, _node: node })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn all_writers_share_the_nodes_room() {
        let node = NodeBudget::new(1 << 20);
        let (one, two, waits) = (WriterBudget::new(&node), WriterBudget::new(&node), AtomicU64::new(0));
        let first = one.try_take(700 << 10).unwrap();
        assert!(two.try_take(700 << 10).is_none(), "the node has no room for both");
        let small = two.try_take(300 << 10).unwrap();
        let late = async {
            let share = two.take(700 << 10, &waits).await;
            assert!(share.is_some());
        };
        let give = async {
            tokio::task::yield_now().await;
            assert_eq!(waits.load(Ordering::Relaxed), 1);
            drop((first, small));
        };
        tokio::join!(late, give);
        assert!(node.keep(300 << 10) && !node.keep(300 << 10), "half of the room for idle buffers");
        node.let_go(300 << 10);
        assert!(node.keep(512 << 10));
        // A chunk larger than all room still gets through, alone.
        assert!(one.take(64 << 20, &waits).await.is_some());
    }
}

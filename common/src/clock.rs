//! Time: a monotonic clock for timeouts, a wall clock for what is shown and stored.
//!
//! Both follow tokio's clock where there is one that is paused (simulation), so virtual time moves them.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::Instant;

/// One reading of both clocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Now {
    /// Milliseconds since the process (or simulation) started; never goes back.
    pub mono_ms: u64,
    /// Milliseconds since 1970; may jump.
    pub wall_ms: u64,
}

/// A timeout passed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("no answer within {0:?}")]
pub struct Elapsed(pub Duration);

/// The clocks of one host.
#[derive(Clone)]
pub struct Clock {
    start: Instant,
    /// `None`: the machine's wall clock. Else 1970-based milliseconds at `start`, plus a jump that a test may change.
    simulated: Option<Arc<SimulatedWall>>,
}

struct SimulatedWall {
    base_ms: u64,
    jump_ms: AtomicI64,
}

impl Clock {
    /// The machine's clocks.
    pub fn system() -> Self {
        Self { start: Instant::now(), simulated: None }
    }

    /// Clocks that follow tokio's (paused) time from `base_ms` on.
    pub fn simulated(base_ms: u64) -> Self {
        let wall = SimulatedWall { base_ms, jump_ms: AtomicI64::new(0) };
        Self { start: Instant::now(), simulated: Some(Arc::new(wall)) }
    }

    /// Moves a simulated wall clock by `by_ms` from now on; the machine's own is left alone.
    pub fn jump_wall(&self, by_ms: i64) {
        if let Some(wall) = &self.simulated {
            wall.jump_ms.fetch_add(by_ms, Ordering::Relaxed);
        }
    }

    /// Both clocks.
    pub fn now(&self) -> Now {
        Now { mono_ms: self.mono_ms(), wall_ms: self.wall_ms() }
    }

    /// Milliseconds on the monotonic clock.
    pub fn mono_ms(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Microseconds on the monotonic clock, for measuring.
    pub fn mono_us(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// Milliseconds since 1970.
    pub fn wall_ms(&self) -> u64 {
        match &self.simulated {
            Some(wall) => (wall.base_ms + self.mono_ms()).saturating_add_signed(wall.jump_ms.load(Ordering::Relaxed)),
            None => {
                #[allow(clippy::disallowed_methods)] // this is the room where the wall clock is read
                let now = SystemTime::now();
                now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
            }
        }
    }

    /// Waits.
    pub async fn sleep(&self, duration: Duration) {
        tokio::time::sleep(duration).await;
    }

    /// Gives up on `future` after `duration`; it is dropped then.
    pub async fn timeout<F: Future>(&self, duration: Duration, future: F) -> Result<F::Output, Elapsed> {
        tokio::time::timeout(duration, future).await.map_err(|_| Elapsed(duration))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn simulated_time_moves_with_tokio() {
        let clock = Clock::simulated(1_000_000);
        tokio::time::advance(Duration::from_secs(5)).await;
        assert_eq!(clock.now(), Now { mono_ms: 5_000, wall_ms: 1_005_000 });
        clock.jump_wall(-2_000);
        assert_eq!(clock.now(), Now { mono_ms: 5_000, wall_ms: 1_003_000 });
    }
}

//! Waiting for a condition, with a deadline. Deadlines are those of a machine that has nothing else to do: they last the longer, the busier it is.

use std::time::{Duration, Instant};

const POLL: Duration = Duration::from_millis(50);

/// However busy the machine is, a deadline is not longer than so many times itself.
const MOST_PATIENCE: f64 = 8.0;

/// A deadline as it is now: processes that wait for a core have as much more time.
pub fn stretched(deadline: Duration) -> Duration {
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    let loads = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load: f64 = loads.split_ascii_whitespace().next().and_then(|load| load.parse().ok()).unwrap_or(0.0);
    deadline.mul_f64((load / cores as f64).clamp(1.0, MOST_PATIENCE))
}

/// Waits until `look` gives something; panics with `what` (and what was seen last) after `deadline`.
pub fn wait_for<T>(what: &str, deadline: Duration, mut look: impl FnMut() -> Result<T, String>) -> T {
    let started = Instant::now();
    loop {
        match look() {
            Ok(found) => return found,
            Err(seen) if started.elapsed() >= stretched(deadline) => {
                panic!("not within {:?}: {what}; last seen: {seen}", started.elapsed())
            }
            Err(_) => std::thread::sleep(POLL),
        }
    }
}

/// Waits until `condition` holds; panics with `what` after `deadline`.
pub fn wait_until(what: &str, deadline: Duration, mut condition: impl FnMut() -> bool) {
    wait_for(what, deadline, || if condition() { Ok(()) } else { Err("it does not hold".into()) });
}

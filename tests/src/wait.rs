//! Waiting for a condition, with a deadline.

use std::time::{Duration, Instant};

const POLL: Duration = Duration::from_millis(50);

/// Waits until `look` gives something; panics with `what` (and what was seen last) after `deadline`.
pub fn wait_for<T>(what: &str, deadline: Duration, mut look: impl FnMut() -> Result<T, String>) -> T {
    let started = Instant::now();
    loop {
        match look() {
            Ok(found) => return found,
            Err(seen) if started.elapsed() >= deadline => panic!("not within {deadline:?}: {what}; last seen: {seen}"),
            Err(_) => std::thread::sleep(POLL),
        }
    }
}

/// Waits until `condition` holds; panics with `what` after `deadline`.
pub fn wait_until(what: &str, deadline: Duration, mut condition: impl FnMut() -> bool) {
    wait_for(what, deadline, || if condition() { Ok(()) } else { Err("it does not hold".into()) });
}

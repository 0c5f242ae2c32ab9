//! What tasks count.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Names of a program's own counters start with this among all counters of a job.
pub const USER_PREFIX: &str = "user.";
/// Different counters that the program may have in one task; what goes beyond is added to [`OTHER`].
const MAX_USER_COUNTERS: usize = 1_000;
/// Bytes of a counter's name that are kept.
const MAX_NAME_BYTES: usize = 128;
/// Bytes of a status that are kept.
const MAX_STATUS_BYTES: usize = 512;
/// The counter of all that came after [`MAX_USER_COUNTERS`].
const OTHER: &str = "other counters";

/// What a task counted. The driver adds up the counters of accepted attempts, each once.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Counters {
    values: BTreeMap<String, u64>,
}

impl Counters {
    /// Adds to a counter.
    pub fn add(&mut self, name: &str, by: u64) {
        match self.values.get_mut(name) {
            Some(value) => *value = value.saturating_add(by),
            None => {
                self.values.insert(name.to_owned(), by);
            }
        }
    }

    /// Adds all of another set.
    pub fn merge(&mut self, other: &Self) {
        for (name, by) in &other.values {
            self.add(name, *by);
        }
    }

    /// A counter; 0 if nothing was added.
    pub fn get(&self, name: &str) -> u64 {
        self.values.get(name).copied().unwrap_or(0)
    }

    /// A counter of the program's own, by the name under which the program counted.
    pub fn user(&self, name: &str) -> u64 {
        self.get(&format!("{USER_PREFIX}{name}"))
    }

    /// All, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, u64)> {
        self.values.iter().map(|(name, value)| (name.as_str(), *value))
    }
}

impl<K: Into<String>> FromIterator<(K, u64)> for Counters {
    fn from_iter<I: IntoIterator<Item = (K, u64)>>(pairs: I) -> Self {
        let mut counters = Self::default();
        for (name, value) in pairs {
            counters.add(&name.into(), value);
        }
        counters
    }
}

/// One counter of the program's own; for the inner loop, where a look-up by name would cost too much.
#[derive(Clone, Debug, Default)]
pub struct UserCounter {
    value: Arc<AtomicU64>,
}

impl UserCounter {
    /// Adds to it.
    #[inline]
    pub fn add(&self, by: u64) {
        self.value.fetch_add(by, Ordering::Relaxed);
    }
}

/// The program's own counters and status in one task; clones share them.
#[derive(Clone, Debug, Default)]
pub struct UserCounters {
    inner: Arc<Mutex<Inner>>,
    beats: Arc<AtomicU64>,
}

#[derive(Debug, Default)]
struct Inner {
    counters: BTreeMap<String, UserCounter>,
    status: String,
}

impl UserCounters {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds to the counter of that name.
    pub fn count(&self, name: &str, by: u64) {
        self.progressed();
        let mut inner = self.lock();
        match inner.counters.get(name) {
            Some(counter) => counter.add(by),
            None => inner.new_counter(name).add(by),
        }
    }

    /// The counter of that name.
    pub fn counter(&self, name: &str) -> UserCounter {
        let mut inner = self.lock();
        match inner.counters.get(name) {
            Some(counter) => counter.clone(),
            None => inner.new_counter(name),
        }
    }

    /// Counters of their own for what may not count in the end; signs of life are shared.
    pub(crate) fn apart(&self) -> Self {
        Self { inner: Arc::default(), beats: Arc::clone(&self.beats) }
    }

    /// Adds what was counted apart, and takes its status.
    pub(crate) fn join(&self, apart: &Self) {
        let Inner { counters, status } = std::mem::take(&mut *apart.lock());
        counters.iter().for_each(|(name, counter)| self.count(name, counter.value.load(Ordering::Relaxed)));
        if !status.is_empty() {
            self.set_status(&status);
        }
    }

    /// Tells that the task lives: one that does not for its job's time-out is stopped. Counting by name and a new status tell it too.
    pub fn progressed(&self) {
        self.beats.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn beats(&self) -> u64 {
        self.beats.load(Ordering::Relaxed)
    }

    /// Says in words what the task is about.
    pub fn set_status(&self, status: &str) {
        self.progressed();
        cut(status, MAX_STATUS_BYTES).clone_into(&mut self.lock().status);
    }

    /// What it last said.
    pub fn status(&self) -> String {
        self.lock().status.clone()
    }

    /// All counters under their names among the job's counters.
    pub fn all(&self) -> Counters {
        let inner = self.lock();
        let named = inner.counters.iter();
        named.map(|(name, counter)| (format!("{USER_PREFIX}{name}"), counter.value.load(Ordering::Relaxed))).collect()
    }
}

impl Inner {
    #[cold]
    fn new_counter(&mut self, name: &str) -> UserCounter {
        let name = if self.counters.len() < MAX_USER_COUNTERS { cut(name, MAX_NAME_BYTES) } else { OTHER };
        self.counters.entry(name.to_owned()).or_default().clone()
    }
}

fn cut(text: &str, limit: usize) -> &str {
    let end = (0..=limit.min(text.len())).rev().find(|at| text.is_char_boundary(*at));
    &text[..end.unwrap_or(0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_add_up() {
        let mut all = Counters::default();
        all.merge(&[("a", 1), ("b", 2)].into_iter().collect());
        all.merge(&[("a", 5)].into_iter().collect());
        assert_eq!(all.iter().collect::<Vec<_>>(), [("a", 6), ("b", 2)]);
        assert_eq!(all.get("c"), 0);
    }

    #[test]
    fn what_is_counted_apart_counts_when_it_is_joined() {
        let user = UserCounters::default();
        let (kept, dropped) = (user.apart(), user.apart());
        [&user, &kept, &dropped].iter().for_each(|one| one.count("n", 2));
        kept.set_status("half way");
        assert_eq!(user.all().user("n"), 2);
        user.join(&kept);
        assert_eq!((user.all().user("n"), &*user.status()), (4, "half way"));
        assert!(user.beats() >= 4, "all of them show that the task lives");
    }

    #[test]
    fn a_program_counts_by_name_and_by_handle_within_bounds() {
        let user = UserCounters::default();
        let bad = user.counter("bad");
        bad.add(2);
        user.count("bad", 3);
        for i in 0..2_000 {
            user.count(&format!("{i}{}", "ä".repeat(100)), 1);
        }
        let all = user.all();
        assert_eq!(all.user("bad"), 5);
        assert_eq!(all.user(OTHER), 1_001);
        assert_eq!(all.iter().count(), 1_001);
        assert!(all.iter().all(|(name, _)| name.len() <= MAX_NAME_BYTES + USER_PREFIX.len()));
        user.set_status(&"x".repeat(10_000));
        assert_eq!(user.status().len(), MAX_STATUS_BYTES);
    }
}

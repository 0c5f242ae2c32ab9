//! Groups of users, as this machine knows them, remembered for a while.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use cairn_common::Env;
use cairn_common::process;

/// Users that are remembered; beyond that all are looked up anew.
const MAX_USERS: usize = 10_000;

/// A cache of [`process::groups_of`].
#[derive(Clone)]
pub struct Groups {
    env: Env,
    keep_ms: u64,
    known: Arc<Mutex<HashMap<String, Known>>>,
}

struct Known {
    until_ms: u64,
    groups: Vec<String>,
}

impl Groups {
    /// An empty cache.
    pub fn new(env: Env, keep_ms: u64) -> Self {
        Self { env, keep_ms, known: Arc::default() }
    }

    /// Groups of `user`, the primary one first; empty if the machine does not know the user.
    pub async fn of(&self, user: &str) -> Vec<String> {
        let now = self.env.clock.mono_ms();
        if let Some(known) = self.lock().get(user).filter(|known| known.until_ms > now) {
            return known.groups.clone();
        }
        let name = user.to_owned();
        // The name service may ask a server.
        let groups = self.env.work.io(move || process::groups_of(&name)).await;
        let mut known = self.lock();
        if known.len() >= MAX_USERS {
            known.clear();
        }
        known.insert(user.to_owned(), Known { until_ms: now + self.keep_ms, groups: groups.clone() });
        groups
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

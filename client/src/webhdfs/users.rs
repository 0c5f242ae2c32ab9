//! One client of the cluster per user: a connection to the namenode carries its user's name.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use cairn_common::Env;
use cairn_datanode::tasks::NodeName;
use tokio::sync::OnceCell;

use crate::fs::{ClientSettings, FileSystem, Result};

/// Users that are kept; the one that was away longest goes first.
const MOST: usize = 64;
/// A user that was away for so long is forgotten.
const IDLE_MS: u64 = 600_000;

pub struct Users {
    env: Env,
    settings: ClientSettings,
    known: Mutex<HashMap<String, Arc<Known>>>,
}

#[derive(Default)]
struct Known {
    used_ms: AtomicU64,
    fs: OnceCell<FileSystem>,
}

impl Users {
    /// No user yet; clients are made with these settings.
    pub fn new(env: Env, settings: ClientSettings) -> Self {
        Self { env, settings, known: Mutex::default() }
    }

    /// The client of a user, on this node.
    pub async fn of(&self, user: &str, node: &NodeName) -> Result<FileSystem> {
        let known = self.entry(user);
        let connect = || {
            let settings = ClientSettings {
                user: Some(user.to_owned()),
                local_node: Some(node.node_id.clone()),
                local_rack: Some(node.rack.clone()),
                ..self.settings.clone()
            };
            FileSystem::connect(self.env.clone(), settings)
        };
        known.fs.get_or_try_init(connect).await.cloned()
    }

    /// Has the next call of a user made by a new client, with a lease of its own: what the old one could not give up is then no longer renewed.
    pub fn forget(&self, user: &str) {
        self.lock().remove(user);
    }

    fn entry(&self, user: &str) -> Arc<Known> {
        let now_ms = self.env.clock.mono_ms();
        let mut known = self.lock();
        known.retain(|_, one| one.used_ms.load(Ordering::Relaxed) + IDLE_MS > now_ms);
        if known.len() >= MOST && !known.contains_key(user) {
            let oldest = known.iter().min_by_key(|(_, one)| one.used_ms.load(Ordering::Relaxed));
            if let Some(oldest) = oldest.map(|(user, _)| user.clone()) {
                known.remove(&oldest);
            }
        }
        let one = known.entry(user.to_owned()).or_default();
        one.used_ms.store(now_ms, Ordering::Relaxed);
        Arc::clone(one)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Arc<Known>>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_user_that_was_away_longest_makes_room() {
        let users = Users::new(Env::system(), ClientSettings::default());
        for at in 0..MOST {
            users.entry(&format!("u{at}")).used_ms.store(1_000_000 + at as u64, Ordering::Relaxed);
        }
        users.entry("u0").used_ms.store(2_000_000, Ordering::Relaxed);
        users.entry("new");
        let known = users.lock();
        assert!(known.contains_key("u0") && known.contains_key("new") && !known.contains_key("u1"));
        assert_eq!(known.len(), MOST);
    }
}

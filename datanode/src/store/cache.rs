//! Indexes of recently read blocks, bounded by the memory that they take.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use cairn_proto::blockfile::{BlockIndex, INDEX_STRIDE};
use cairn_proto::ids::{BlockId, Generation};

use super::lock;

type Key = (i64, u64);

/// What a reader needs to know of a verified file.
#[derive(Clone)]
pub struct Cached {
    /// Its index.
    pub index: Arc<BlockIndex>,
    /// Bytes on disk.
    pub stored: u64,
}

struct Slot {
    cached: Cached,
    used_at: u64,
}

#[derive(Default)]
struct State {
    slots: HashMap<Key, Slot>,
    entries: u64,
    clock: u64,
}

/// Least-recently-used cache of block indexes.
pub struct IndexCache {
    state: Mutex<State>,
    /// Index entries (16 bytes each) that it may hold.
    limit: u64,
}

fn weight(index: &BlockIndex) -> u64 {
    // A small constant for the slot itself, so that empty blocks do not pile up.
    4 + u64::from(index.frames()).min(index.data_length() / INDEX_STRIDE + 1)
}

impl IndexCache {
    /// One that holds at most `limit` index entries.
    pub fn new(limit: u64) -> Self {
        Self { state: Mutex::default(), limit }
    }

    /// The index, if it is known.
    pub fn get(&self, block: BlockId, generation: Generation) -> Option<Cached> {
        let mut state = lock(&self.state);
        state.clock += 1;
        let now = state.clock;
        let slot = state.slots.get_mut(&(block.0, generation.0))?;
        slot.used_at = now;
        Some(slot.cached.clone())
    }

    /// Remembers an index.
    pub fn put(&self, block: BlockId, generation: Generation, cached: Cached) {
        let mut state = lock(&self.state);
        let key = (block.0, generation.0);
        state.remove(key);
        let weight = weight(&cached.index);
        while state.entries + weight > self.limit {
            let Some(oldest) = state.slots.iter().min_by_key(|(_, slot)| slot.used_at).map(|(key, _)| *key) else {
                return;
            };
            state.remove(oldest);
        }
        state.clock += 1;
        let used_at = state.clock;
        state.entries += weight;
        state.slots.insert(key, Slot { cached, used_at });
    }

    /// Forgets an index.
    pub fn remove(&self, block: BlockId, generation: Generation) {
        lock(&self.state).remove((block.0, generation.0));
    }
}

impl State {
    fn remove(&mut self, key: Key) {
        if let Some(slot) = self.slots.remove(&key) {
            self.entries -= weight(&slot.cached.index);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_used_goes_first() {
        let cache = IndexCache::new(10);
        let cached = || Cached { index: Arc::new(BlockIndex::new(32)), stored: 96 };
        for id in 1..=2 {
            cache.put(BlockId(id), Generation(1), cached());
        }
        assert!(cache.get(BlockId(1), Generation(1)).is_some());
        cache.put(BlockId(3), Generation(1), cached());
        assert!(cache.get(BlockId(2), Generation(1)).is_none());
        assert!(cache.get(BlockId(1), Generation(1)).is_some());
        assert!(cache.get(BlockId(3), Generation(1)).is_some());
    }
}

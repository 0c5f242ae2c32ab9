//! Adding up counts per key in a hash table that is kind to the caches.
//!
//! A table of millions of words misses the cache on nearly every word. So a word goes through three stages: a small direct-mapped front that
//! swallows the frequent words; then, with its count so far, into a waiting list of one of about a hundred sub-tables, chosen by the hash;
//! a full waiting list is applied to its sub-table at once, which by then is in the cache. The sub-tables of one partition
//! are neighbours, so that partitions are written one after the other.
//!
//! Keys of up to 16 bytes are kept inline as two words, padded with zeros; longer ones in an arena.

use cairn_proto::Result;

use super::run::RunWriter;
use super::{encode_count, key_prefix};

const FRONT_ENTRIES: usize = 2_048;
/// Sub-tables that are worth having: each should fit the second-level cache when the whole table is full.
const SUB_TABLES: u32 = 128;
const WAITING_BYTES: usize = 1 << 20;
/// What sorting takes per key when a partition is written.
const SORT_BYTES: usize = 16;
const COUNT_BITS: u32 = 56;
const COUNT_MASK: u64 = (1 << COUNT_BITS) - 1;

/// A hash of a key that is the same in every process.
#[inline]
pub fn hash_key(key: &[u8]) -> u64 {
    match short_key(key) {
        Some((words, len)) => hash_short(words, len),
        None => hash_long(key),
    }
}

#[inline]
fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    (product as u64) ^ ((product >> 64) as u64)
}

#[inline]
fn hash_short(words: [u64; 2], len: usize) -> u64 {
    fold(words[0] ^ 0x9E37_79B9_7F4A_7C15, words[1] ^ 0xD6E8_FEB8_6659_FD93 ^ ((len as u64) << 56))
        .wrapping_mul(0xBF58_476D_1CE4_E5B9)
}

fn hash_long(key: &[u8]) -> u64 {
    let mut hash = key.len() as u64 ^ 0x2545_F491_4F6C_DD1D;
    let (blocks, _) = key.as_chunks::<16>();
    // The last 16 bytes may overlap the block before.
    let last = key.last_chunk::<16>();
    for block in blocks.iter().chain(last) {
        let words = u128::from_le_bytes(*block);
        hash = fold(words as u64 ^ hash, (words >> 64) as u64 ^ 0xA076_1D64_78BD_642F);
    }
    hash.wrapping_mul(0xBF58_476D_1CE4_E5B9)
}

/// A key of up to 16 bytes as two little-endian words padded with zeros, and its length.
#[inline]
fn short_key(key: &[u8]) -> Option<([u64; 2], usize)> {
    if key.len() > 16 {
        return None;
    }
    let mut padded = [0; 16];
    padded[..key.len()].copy_from_slice(key);
    Some((words_of(u128::from_le_bytes(padded)), key.len()))
}

#[inline]
fn words_of(both: u128) -> [u64; 2] {
    [both as u64, (both >> 64) as u64]
}

/// A short key with its count: `meta` holds the length in the top byte, the count below.
#[derive(Clone, Copy, Default)]
struct Short {
    words: [u64; 2],
    meta: u64,
}

impl Short {
    #[inline]
    fn len(&self) -> usize {
        (self.meta >> COUNT_BITS) as usize
    }

    #[inline]
    fn bytes(&self) -> [u8; 16] {
        (u128::from(self.words[0]) | (u128::from(self.words[1]) << 64)).to_le_bytes()
    }
}

#[derive(Clone, Copy, Default)]
struct Waiting {
    key: Short,
    hash: u64,
}

#[derive(Clone, Copy)]
struct Long {
    start: u32,
    len: u32,
    /// The low half of the hash.
    hash: u32,
    count: u64,
}

/// The counts of one slice of the hash space. `index` and `long_index` hold positions plus one; 0 is empty.
#[derive(Default)]
struct Sub {
    index: Vec<u32>,
    short: Vec<Short>,
    long_index: Vec<u32>,
    long: Vec<Long>,
    arena: Vec<u8>,
    waiting: Vec<Waiting>,
}

impl Sub {
    fn bytes(&self) -> usize {
        (self.index.capacity() + self.long_index.capacity()) * 4
            + self.short.capacity() * size_of::<Short>()
            + self.long.capacity() * size_of::<Long>()
            + self.arena.capacity()
            + (self.short.len() + self.long.len()) * SORT_BYTES
    }

    fn apply_waiting(&mut self) {
        let mut waiting = std::mem::take(&mut self.waiting);
        for item in &waiting {
            self.add_short(item.key, item.hash);
        }
        waiting.clear();
        self.waiting = waiting;
    }

    #[inline]
    fn add_short(&mut self, key: Short, hash: u64) {
        if self.short.len() * 4 >= self.index.len() * 3 {
            self.grow_short();
        }
        let mask = self.index.len() - 1;
        let mut slot = hash as usize & mask;
        loop {
            match self.index[slot] {
                0 => {
                    self.short.push(key);
                    self.index[slot] = self.short.len() as u32;
                    return;
                }
                at => {
                    let entry = &mut self.short[at as usize - 1];
                    if entry.words == key.words && (entry.meta ^ key.meta) >> COUNT_BITS == 0 {
                        entry.meta += key.meta & COUNT_MASK;
                        return;
                    }
                }
            }
            slot = (slot + 1) & mask;
        }
    }

    fn grow_short(&mut self) {
        let size = (self.index.len() * 2).max(16);
        self.index = vec![0; size];
        for (at, entry) in self.short.iter().enumerate() {
            let mut slot = hash_short(entry.words, entry.len()) as usize & (size - 1);
            while self.index[slot] != 0 {
                slot = (slot + 1) & (size - 1);
            }
            self.index[slot] = at as u32 + 1;
        }
    }

    fn add_long(&mut self, key: &[u8], count: u64, hash: u64) {
        if self.long.len() * 4 >= self.long_index.len() * 3 {
            self.grow_long();
        }
        let mask = self.long_index.len() - 1;
        let mut slot = hash as usize & mask;
        loop {
            match self.long_index[slot] {
                0 => {
                    let start = self.arena.len() as u32;
                    self.arena.extend_from_slice(key);
                    self.long.push(Long { start, len: key.len() as u32, hash: hash as u32, count });
                    self.long_index[slot] = self.long.len() as u32;
                    return;
                }
                at => {
                    let entry = &mut self.long[at as usize - 1];
                    let place = entry.start as usize..entry.start as usize + entry.len as usize;
                    if entry.hash == hash as u32 && &self.arena[place] == key {
                        entry.count = entry.count.saturating_add(count);
                        return;
                    }
                }
            }
            slot = (slot + 1) & mask;
        }
    }

    fn grow_long(&mut self) {
        let size = (self.long_index.len() * 2).max(16);
        self.long_index = vec![0; size];
        for (at, entry) in self.long.iter().enumerate() {
            let mut slot = entry.hash as usize & (size - 1);
            while self.long_index[slot] != 0 {
                slot = (slot + 1) & (size - 1);
            }
            self.long_index[slot] = at as u32 + 1;
        }
    }

    fn long_key(&self, entry: &Long) -> &[u8] {
        &self.arena[entry.start as usize..entry.start as usize + entry.len as usize]
    }
}

/// Counts per key, with a bound on its memory. The sum of one key in one task stays below 2^56.
pub struct CountTable {
    partitions: u32,
    subs_per_partition: u32,
    subs: Vec<Sub>,
    front: Vec<Waiting>,
    waiting_limit: usize,
    used: usize,
    budget: usize,
}

impl CountTable {
    /// A table for `partitions` that reports itself full at about `budget` bytes.
    pub fn new(partitions: u32, budget: u64) -> Self {
        let subs_per_partition = (SUB_TABLES / partitions.max(1)).max(1);
        let subs = (partitions * subs_per_partition) as usize;
        let mut table = Self {
            partitions,
            subs_per_partition,
            subs: Vec::new(),
            front: vec![Waiting::default(); FRONT_ENTRIES],
            waiting_limit: (WAITING_BYTES / size_of::<Waiting>() / subs).clamp(4, 512),
            used: 0,
            budget: usize::try_from(budget).unwrap_or(usize::MAX),
        };
        table.subs.resize_with(subs, Sub::default);
        table
    }

    /// Adds to the count of `text[start..end]`, a word that is not empty. True if the table is full and must be written.
    #[inline]
    pub fn add_word(&mut self, text: &[u8], start: usize, end: usize) -> bool {
        let len = end - start;
        // Words are mostly short and mostly not at the end of their batch: one unaligned load takes all of it.
        if len <= 16
            && let Some(window) = text[start..].first_chunk::<16>()
        {
            let both = u128::from_le_bytes(*window) & (u128::MAX >> (128 - 8 * len as u32));
            return self.add_short(words_of(both), len, 1);
        }
        self.add(&text[start..end], 1)
    }

    /// Adds `count` to that of `key`. True if the table is full and must be written.
    #[inline]
    pub fn add(&mut self, key: &[u8], count: u64) -> bool {
        match short_key(key) {
            Some((words, len)) => self.add_short(words, len, count.min(COUNT_MASK)),
            None => self.add_long(key, count),
        }
    }

    #[inline]
    fn sub_of(&self, hash: u64) -> usize {
        super::partition_of(hash, self.subs.len() as u32) as usize
    }

    #[inline]
    fn add_short(&mut self, words: [u64; 2], len: usize, count: u64) -> bool {
        let hash = hash_short(words, len);
        let tag = (len as u64) << COUNT_BITS;
        let front = &mut self.front[hash as usize % FRONT_ENTRIES];
        if front.key.words == words && front.key.meta >> COUNT_BITS == len as u64 && front.key.meta & COUNT_MASK != 0 {
            front.key.meta += count;
            return false;
        }
        let evicted = std::mem::replace(front, Waiting { key: Short { words, meta: tag | count }, hash });
        evicted.key.meta & COUNT_MASK != 0 && self.wait(evicted)
    }

    #[inline]
    fn wait(&mut self, item: Waiting) -> bool {
        let sub = self.sub_of(item.hash);
        let waiting = &mut self.subs[sub].waiting;
        waiting.push(item);
        waiting.len() >= self.waiting_limit && self.apply(sub)
    }

    fn apply(&mut self, sub: usize) -> bool {
        let sub = &mut self.subs[sub];
        let before = sub.bytes();
        sub.apply_waiting();
        self.used += sub.bytes() - before;
        self.used > self.budget
    }

    fn add_long(&mut self, key: &[u8], count: u64) -> bool {
        let hash = hash_long(key);
        let sub = self.sub_of(hash);
        let sub = &mut self.subs[sub];
        let before = sub.bytes();
        sub.add_long(key, count, hash);
        self.used += sub.bytes() - before;
        // Offsets in the arena are 32 bits.
        self.used > self.budget || sub.arena.len() > 1 << 31
    }

    /// Bytes in use, as it accounts for them.
    pub fn used(&self) -> usize {
        self.used
    }

    /// Writes all counts as one sorted run per partition, and is empty then. Returns the number of keys.
    pub fn write(&mut self, out: &mut RunWriter) -> Result<u64> {
        for at in 0..self.front.len() {
            let item = std::mem::take(&mut self.front[at]);
            if item.key.meta & COUNT_MASK != 0 {
                self.wait(item);
            }
        }
        let mut keys = 0;
        for partition in 0..self.partitions as usize {
            let from = partition * self.subs_per_partition as usize;
            let subs = &mut self.subs[from..from + self.subs_per_partition as usize];
            keys += write_partition(subs, out)?;
            // Their memory goes before the next partition's is sorted.
            subs.fill_with(Sub::default);
            out.end_partition()?;
        }
        self.used = 0;
        Ok(keys)
    }
}

const LONG: u64 = 1 << 32;

fn write_partition(subs: &mut [Sub], out: &mut RunWriter) -> Result<u64> {
    let mut total = 0;
    for sub in &mut *subs {
        sub.apply_waiting();
        // The order is by key from here on: nobody looks up again.
        sub.index = Vec::new();
        sub.long_index = Vec::new();
        total += sub.short.len() + sub.long.len();
    }
    // Eight bytes of the key decide most comparisons; the rest is looked up by sub-table and position.
    let mut order: Vec<(u64, u64)> = Vec::with_capacity(total);
    for (number, sub) in subs.iter().enumerate() {
        let base = (number as u64) << 33;
        let short = sub.short.iter().enumerate();
        order.extend(short.map(|(at, entry)| (entry.words[0].swap_bytes(), base | at as u64)));
        let long = sub.long.iter().enumerate();
        order.extend(long.map(|(at, entry)| (key_prefix(sub.long_key(entry)), base | LONG | at as u64)));
    }
    order.sort_unstable_by(|a, b| a.0.cmp(&b.0).then_with(|| compare(subs, a.1, b.1)));
    let mut scratch = [0; 10];
    for (_, place) in order {
        let sub = &subs[(place >> 33) as usize];
        let at = place as u32 as usize;
        if place & LONG == 0 {
            let entry = &sub.short[at];
            let count = encode_count(entry.meta & COUNT_MASK, &mut scratch);
            out.push(&entry.bytes()[..entry.len()], count)?;
        } else {
            let entry = &sub.long[at];
            out.push(sub.long_key(entry), encode_count(entry.count, &mut scratch))?;
        }
    }
    Ok(total as u64)
}

/// Orders two keys whose first eight bytes are equal.
fn compare(subs: &[Sub], a: u64, b: u64) -> std::cmp::Ordering {
    let sub = |place: u64| &subs[(place >> 33) as usize];
    let short = |place: u64| &sub(place).short[place as u32 as usize];
    if (a | b) & LONG == 0 {
        let (x, y) = (short(a), short(b));
        let order = x.words[1].swap_bytes().cmp(&y.words[1].swap_bytes());
        return order.then_with(|| x.len().cmp(&y.len()));
    }
    let bytes = |place: u64, out: &mut [u8; 16]| -> Option<usize> {
        if place & LONG != 0 {
            return None;
        }
        *out = short(place).bytes();
        Some(short(place).len())
    };
    let long = |place: u64| sub(place).long_key(&sub(place).long[place as u32 as usize]);
    let (mut x, mut y) = ([0; 16], [0; 16]);
    match (bytes(a, &mut x), bytes(b, &mut y)) {
        (None, None) => long(a).cmp(long(b)),
        (Some(n), None) => x[..n].cmp(long(b)),
        (None, Some(n)) => long(a).cmp(&y[..n]),
        (Some(n), Some(m)) => x[..n].cmp(&y[..m]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_agree_and_spread() {
        let mut seen = std::collections::HashSet::new();
        let mut parts = [0u32; 7];
        for i in 0..20_000u32 {
            for key in [format!("k{i}"), format!("a long key of more than sixteen bytes {i}")] {
                let hash = hash_key(key.as_bytes());
                assert!(seen.insert(hash));
                parts[super::super::partition_of(hash, 7) as usize] += 1;
            }
        }
        let (least, most) = (parts.iter().min().unwrap(), parts.iter().max().unwrap());
        assert!(most - least < 600, "{parts:?}");
        assert_ne!(hash_key(b"a"), hash_key(b"a\0"));
    }

    #[test]
    fn accounts_for_what_it_holds_and_says_when_it_is_full() {
        let mut table = CountTable::new(3, 4 << 20);
        let mut added = 0u64;
        while !table.add(format!("word number {added} of some").as_bytes(), 1) {
            added += 1;
        }
        // Text of about 25 bytes, entry, index and room for sorting: at least 60, at most 120 bytes a word.
        assert!((4 << 20) / 120 < added && added < (4 << 20) / 60, "{added} words of 4 MiB");
        let real: usize = table.subs.iter().map(Sub::bytes).sum();
        assert_eq!(real, table.used());
    }
}

//! Gathering records in memory and writing them sorted.

use cairn_proto::Result;

use super::merge::Values;
use super::run::{RunWriter, check_record};
use super::{Combiner, Partitioner, compare_keys, key_prefix};

/// Where a record lies in the arena: key, then value.
#[derive(Clone, Copy)]
pub(crate) struct Entry {
    prefix: u64,
    partition: u32,
    start: u32,
    key_len: u32,
    value_len: u32,
}

/// Records in the order in which they came, with a bound on their memory.
pub struct SortBuffer {
    partitions: u32,
    partitioner: Partitioner,
    arena: Vec<u8>,
    entries: Vec<Entry>,
    budget: usize,
}

impl SortBuffer {
    /// A buffer for `partitions` that reports itself full at about `budget` bytes.
    pub fn new(partitions: u32, partitioner: Partitioner, budget: u64) -> Self {
        // Offsets are 32 bits.
        let budget = budget.min(1 << 31) as usize;
        Self { partitions, partitioner, arena: Vec::new(), entries: Vec::new(), budget }
    }

    /// Takes a record. True if the buffer is full and must be written.
    pub fn add(&mut self, key: &[u8], value: &[u8]) -> Result<bool> {
        check_record(key.len() + value.len())?;
        self.entries.push(Entry {
            prefix: key_prefix(key),
            partition: self.partitioner.partition(key, self.partitions)?,
            start: self.arena.len() as u32,
            key_len: key.len() as u32,
            value_len: value.len() as u32,
        });
        self.arena.extend_from_slice(key);
        self.arena.extend_from_slice(value);
        Ok(self.used() > self.budget)
    }

    /// Bytes in use.
    pub fn used(&self) -> usize {
        self.arena.len() + self.entries.len() * size_of::<Entry>()
    }

    /// Writes all records sorted by partition and key (equal keys in the order in which they came), joined by `combiner` if there is one, and is
    /// empty then. Returns the number of records written.
    pub fn write(&mut self, mut combiner: Option<&mut (dyn Combiner + '_)>, out: &mut RunWriter) -> Result<u64> {
        let arena = &self.arena;
        self.entries.sort_unstable_by(|a, b| {
            let keys = || compare_keys((a.prefix, a.key(arena)), (b.prefix, b.key(arena)));
            a.partition.cmp(&b.partition).then_with(keys).then(a.start.cmp(&b.start))
        });
        let mut written = 0;
        let mut rest = &self.entries[..];
        for partition in 0..self.partitions {
            let count = rest.partition_point(|entry| entry.partition <= partition);
            let (records, after) = rest.split_at(count);
            rest = after;
            match &mut combiner {
                None => {
                    for entry in records {
                        out.push(entry.key(arena), entry.value(arena))?;
                    }
                    written += records.len() as u64;
                }
                Some(combiner) => written += combine(records, arena, &mut **combiner, out)?,
            }
            out.end_partition()?;
        }
        self.entries.clear();
        self.arena.clear();
        Ok(written)
    }
}

fn combine(mut records: &[Entry], arena: &[u8], combiner: &mut dyn Combiner, out: &mut RunWriter) -> Result<u64> {
    let mut written = 0;
    while let Some(first) = records.first() {
        let key = first.key(arena);
        let same = records.iter().take_while(|entry| entry.prefix == first.prefix && entry.key(arena) == key).count();
        let (group, after) = records.split_at(same);
        records = after;
        combiner.combine(key, &mut Values::in_memory(group, arena), &mut |value| {
            written += 1;
            out.push(key, value)
        })?;
    }
    Ok(written)
}

impl Entry {
    #[inline]
    pub(crate) fn key<'a>(&self, arena: &'a [u8]) -> &'a [u8] {
        &arena[self.start as usize..][..self.key_len as usize]
    }

    #[inline]
    pub(crate) fn value<'a>(&self, arena: &'a [u8]) -> &'a [u8] {
        &arena[self.start as usize + self.key_len as usize..][..self.value_len as usize]
    }
}

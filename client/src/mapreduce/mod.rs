//! Batch programs over records: what a map and a reduce are, and the machinery between them.
//!
//! # Overview
//! A [`Program`] makes [`Mapper`]s and [`Reducer`]s. A map task cuts its part of a file into batches of whole records ([`text`]), hands them to
//! the mapper, and gathers what it emits in a [`Collector`]: a hash table where values are only added up ([`table`]), else a sort buffer
//! ([`sort`]); both have a bound, beyond which they spill sorted runs to disk ([`run`]). The spills are merged ([`merge`]) into one file of sorted
//! partitions, the map output, whose format is [`cairn_proto::mapoutput`]. A reduce task merges its partition of all maps and hands each
//! key with its values to the reducer ([`reduce`]).
//!
//! Everything here is synchronous and does no network: it runs on a thread of its own in a worker process, fed through channels.
//!
//! # Memory
//! Each part is told its share in bytes ([`Shares`]) and accounts for what it allocates; nothing grows with the input.

pub mod builtin;
pub mod collect;
#[cfg(test)]
mod collect_tests;
pub mod grep;
pub mod merge;
pub mod output;
pub mod reduce;
pub mod run;
pub mod sort;
pub mod table;
pub mod text;
pub mod wordcount;

use std::collections::BTreeMap;

pub use cairn_proto::{Error, ErrorCode, Result};
pub use collect::Collector;
pub use merge::Values;
pub use output::Output;
pub use text::{Batch, Delimiter};

/// One job's program: makes the parts that tasks run.
pub trait Program: Send + Sync {
    /// What separates the records of its input.
    fn delimiter(&self) -> Delimiter;
    /// A mapper for one task.
    fn mapper(&self) -> Result<Box<dyn Mapper>>;
    /// How values of equal keys may be joined before they leave the map task.
    fn combine(&self) -> Combine;
    /// A reducer for one task. Not asked for in a job without reducers.
    fn reducer(&self) -> Result<Box<dyn Reducer>>;
}

/// One record of the input.
#[derive(Clone, Copy, Debug)]
pub struct Record<'a> {
    /// Position of its file among the job's inputs.
    pub file_index: u32,
    /// Where it starts in the file.
    pub offset: u64,
    /// Its bytes, without the delimiter.
    pub bytes: &'a [u8],
}

/// Turns records into keys with values.
pub trait Mapper: Send {
    /// Takes one record.
    fn map(&mut self, record: Record<'_>, out: &mut Collector) -> Result<()>;

    /// Takes a batch of whole records and returns how many they were. Worth writing by hand where a call per record costs too much.
    fn map_batch(&mut self, batch: &Batch, out: &mut Collector) -> Result<u64> {
        let mut count = 0;
        for record in batch.records() {
            self.map(record, out)?;
            count += 1;
        }
        Ok(count)
    }

    /// The input has ended.
    fn finish(&mut self, _out: &mut Collector) -> Result<()> {
        Ok(())
    }
}

/// Turns a key and all its values into output.
pub trait Reducer: Send {
    /// Takes one key; keys come in order of their bytes. Values that it does not ask for are skipped.
    fn reduce(&mut self, key: &[u8], values: &mut Values<'_>, out: &mut Output) -> Result<()>;

    /// There is no further key.
    fn finish(&mut self, _out: &mut Output) -> Result<()> {
        Ok(())
    }
}

/// Joins values of one key; may be applied never, once, or again to its own results.
pub trait Combiner: Send {
    /// Takes one key and some of its values, and emits values that stand for them.
    fn combine(&mut self, key: &[u8], values: &mut Values<'_>, emit: &mut dyn FnMut(&[u8]) -> Result<()>)
    -> Result<()>;
}

/// How values of equal keys are joined in a map task.
pub enum Combine {
    /// Not at all.
    Never,
    /// The values are numbers ([`encode_count`]) of which only the sum matters: they are added up in a hash table.
    Sum,
    /// By a combiner, whenever a sorted run is written.
    With(Box<dyn Combiner>),
}

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

/// Names of the counters that every job has.
pub mod counter {
    /// Bytes of file input that belong to the task's split.
    pub const INPUT_BYTES: &str = "input.bytes";
    /// Records of the input.
    pub const RECORDS_IN: &str = "map.records_in";
    /// Records that mappers emitted.
    pub const RECORDS_MAP_OUT: &str = "map.records_out";
    /// Records left after combining: what the map outputs hold.
    pub const RECORDS_COMBINE_OUT: &str = "combine.records_out";
    /// Bytes written to local disk beyond the final map output.
    pub const SPILLED_BYTES: &str = "spill.bytes";
    /// Runs spilled.
    pub const SPILLS: &str = "spill.runs";
    /// Bytes of the final map outputs, as stored.
    pub const MAP_OUTPUT_BYTES: &str = "map.output_bytes";
    /// Bytes that reducers fetched, as stored.
    pub const SHUFFLED_BYTES: &str = "shuffle.bytes";
    /// Different keys that reducers saw.
    pub const REDUCE_GROUPS: &str = "reduce.groups";
    /// Records of the job's output.
    pub const RECORDS_OUT: &str = "output.records";
    /// Bytes of the job's output, before compression and replication.
    pub const OUTPUT_BYTES: &str = "output.bytes";
}

/// What the parts of a task may use of its memory limit, bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shares {
    /// Hash table or sort buffer of a map. Larger: fewer spills.
    pub collect: u64,
    /// Fetched partitions that a reduce keeps in memory, as stored. Larger: less goes through the disk.
    pub fetched: u64,
    /// Runs merged at once; each costs about two chunks. Larger: fewer passes.
    pub merge_ways: usize,
}

impl Shares {
    /// Of a limit for the whole process, whose code, buffers and readers need the rest.
    pub fn of(memory_limit: u64) -> Self {
        Self {
            collect: memory_limit / 5 * 2,
            fetched: memory_limit / 5,
            // A quarter of the limit, at 384 KiB a run: raw chunk, stored chunk, decoder.
            merge_ways: (memory_limit / 4 / (384 << 10)).clamp(4, 128) as usize,
        }
    }
}

/// A number as a value: LEB128.
pub fn encode_count(mut n: u64, out: &mut [u8; 10]) -> &[u8] {
    let mut len = 0;
    loop {
        let byte = (n & 0x7f) as u8;
        n >>= 7;
        if n == 0 {
            out[len] = byte;
            return &out[..=len];
        }
        out[len] = byte | 0x80;
        len += 1;
    }
}

/// The number that a value holds.
pub fn decode_count(value: &[u8]) -> Result<u64> {
    match decode_varint(value) {
        Some((n, used)) if used == value.len() => Ok(n),
        _ => Err(Error::new(ErrorCode::Corrupt, format!("a value of {} bytes is not a count", value.len()))),
    }
}

/// A LEB128 number at the start of `bytes`, and how many bytes it takes.
#[inline]
pub(crate) fn decode_varint(bytes: &[u8]) -> Option<(u64, usize)> {
    let first = *bytes.first()?;
    if first < 0x80 {
        return Some((u64::from(first), 1));
    }
    let mut n = u64::from(first & 0x7f);
    for (at, byte) in bytes.iter().enumerate().take(10).skip(1) {
        n |= u64::from(byte & 0x7f) << (7 * at);
        if *byte < 0x80 {
            return Some((n, at + 1));
        }
    }
    None
}

/// The first eight bytes of a key as a number that orders like the key; equal numbers say nothing.
#[inline]
pub(crate) fn key_prefix(key: &[u8]) -> u64 {
    if let Some(head) = key.first_chunk::<8>() {
        return u64::from_be_bytes(*head);
    }
    let mut head = [0; 8];
    head[..key.len()].copy_from_slice(key);
    u64::from_be_bytes(head)
}

/// Which of `partitions` a key with this hash belongs to.
#[inline]
pub(crate) fn partition_of(hash: u64, partitions: u32) -> u32 {
    (((hash >> 32) * u64::from(partitions)) >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_come_back() {
        for n in [0, 1, 127, 128, 300, u64::from(u32::MAX), u64::MAX] {
            let mut out = [0; 10];
            assert_eq!(decode_count(encode_count(n, &mut out)).unwrap(), n);
        }
        assert!(decode_count(&[]).is_err());
        assert!(decode_count(&[0x80]).is_err());
        assert!(decode_count(&[1, 1]).is_err());
    }

    #[test]
    fn counters_add_up() {
        let mut all = Counters::default();
        all.merge(&[("a", 1), ("b", 2)].into_iter().collect());
        all.merge(&[("a", 5)].into_iter().collect());
        assert_eq!(all.iter().collect::<Vec<_>>(), [("a", 6), ("b", 2)]);
        assert_eq!(all.get("c"), 0);
    }
}

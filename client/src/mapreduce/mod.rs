//! Batch programs over records: what a map and a reduce are, and the machinery between them.
//!
//! # Overview
//! A [`Program`] makes [`Mapper`]s and [`Reducer`]s. A map task cuts its part of a file into batches of whole records ([`input`]), hands them to
//! the mapper, and gathers what it emits in a [`Collector`]: a hash table where values are only added up ([`table`]), else a sort buffer
//! ([`sort`]); both have a bound, beyond which they spill sorted runs to disk ([`run`]). The spills are merged ([`merge`]) into one file of sorted
//! partitions, the map output, whose format is [`cairn_proto::mapoutput`]. A reduce task merges its partition of all maps and hands each
//! key with its values to the reducer ([`reduce`]).
//!
//! Everything here is synchronous and does no network (but for programs that ask for [`TaskContext::files`]): it runs on a thread of its own in a
//! worker process, fed through channels.
//!
//! # Memory
//! Each part is told its share in bytes ([`Shares`]) and accounts for what it allocates; nothing grows with the input.

pub mod builtin;
pub mod collect;
#[cfg(test)]
mod collect_tests;
pub(crate) mod compression;
pub mod container;
mod context;
mod counters;
pub mod distcp;
pub mod encode;
pub mod fields;
mod format;
pub mod grep;
pub mod input;
pub mod join;
pub mod linesort;
pub mod merge;
pub mod order;
pub mod output;
mod partition;
pub mod position;
pub mod reduce;
pub mod run;
pub mod sort;
pub mod streaming;
pub mod table;
pub mod tera;
#[cfg(test)]
pub(crate) mod testing;
pub mod text;
pub mod typed;
pub mod wordcount;

pub use crate::job::{Jobs, Launcher, main, main_with};
pub use cairn_proto::{Error, ErrorCode, Result};
pub use collect::Collector;
pub use compression::Compression;
pub use context::{BlockingReader, BlockingWriter, TaskContext, TaskFiles, TaskInput, TaskKind};
pub use counters::{Counters, USER_PREFIX, UserCounter, UserCounters};
pub use format::{InputFormat, Layout, OutputFormat};
pub use input::Batch;
pub use merge::Values;
pub use output::{NamedOutput, Output};
pub(crate) use partition::partition_of;
pub use partition::{ChooseReducer, Grouping, KeyPrefix, KeyRanges, Partitioner, PrefixLength};

/// One job's program: makes the parts that tasks run.
///
/// Keys are ordered by their bytes, always: no comparator runs per record, and an encoding that preserves the order of what it encodes gives any other
/// order (descending: the complement of the bytes).
pub trait Program: Send + Sync {
    /// What the records of its input are.
    fn input(&self) -> InputFormat {
        InputFormat::Lines
    }
    /// A mapper for one task. What fails here fails the attempt.
    fn mapper(&self, task: &TaskContext) -> Result<Box<dyn Mapper>>;
    /// How values of equal keys may be joined before they leave the map task.
    fn combine(&self) -> Combine {
        Combine::Never
    }
    /// Which reducer a key goes to.
    fn partitioner(&self) -> Result<Partitioner> {
        Ok(Partitioner::Hash)
    }
    /// Which keys one call of a reducer sees.
    fn grouping(&self) -> Grouping {
        Grouping::WholeKey
    }
    /// A reducer for one task. Not asked for in a job without reducers.
    fn reducer(&self, task: &TaskContext) -> Result<Box<dyn Reducer>>;
    /// What the files of its output look like.
    fn output(&self) -> OutputFormat {
        OutputFormat::TEXT
    }
}

/// One record of the input.
#[derive(Clone, Copy, Debug)]
pub struct Record<'a> {
    /// Position of its file among the job's inputs.
    pub file_index: u32,
    /// Where it starts in the file; of a generated record its number.
    pub offset: u64,
    /// Its key in a format that has keys, else empty.
    pub key: &'a [u8],
    /// Its bytes (its value, in a format that has keys), without the delimiter.
    pub bytes: &'a [u8],
}

/// Turns records into keys with values. A mapper is made before its task's first record ([`Program::mapper`]: set-up belongs there).
pub trait Mapper: Send {
    /// Takes one record. An error fails the attempt; it need not name the record.
    fn map(&mut self, record: Record<'_>, out: &mut Collector) -> Result<()>;

    /// Takes a batch of whole records and returns how many they were. Worth writing by hand where a call per record costs too much.
    fn map_batch(&mut self, batch: &Batch, out: &mut Collector) -> Result<u64> {
        let (mut count, first) = (0, out.position().ordinal());
        for record in batch.records() {
            out.position().at_record(record.offset, first + count);
            self.map(record, out).map_err(|error| at_record(error, batch, record.offset))?;
            count += 1;
        }
        Ok(count)
    }

    /// The input has ended.
    fn finish(&mut self, _out: &mut Collector) -> Result<()> {
        Ok(())
    }

    /// Where bad records may be left out: a mapper that learns of one only after it has taken further ones (a command behind a pipe) maps portions.
    /// `None`: it is handed the records one by one.
    fn portions(&mut self) -> Option<&mut dyn MapPortions> {
        None
    }
}

/// A mapper that takes a portion of its input as if that were all.
pub trait MapPortions {
    /// Maps these records from the first to the last. If it fails with [`ErrorCode::TaskFailed`], one of them is to blame: what it emitted is dropped (what
    /// it counted is its own affair), and it is called again with fewer, until the bad ones are found and left out.
    fn map_portion(&mut self, records: &mut dyn Iterator<Item = Record<'_>>, out: &mut Collector) -> Result<()>;
}

/// Says which record a mapper failed on.
#[cold]
pub(crate) fn at_record(error: Error, batch: &Batch, offset: u64) -> Error {
    let place = if batch.path.is_empty() {
        format!("record {offset}")
    } else {
        format!("the record at byte {offset} of {}", batch.path)
    };
    Error::new(error.code(), format!("{}; it happened on {place}", error.message())).with_subject(&*batch.path)
}

/// Turns a key and all its values into output. A reducer is made before its task's first key ([`Program::reducer`]: set-up belongs there).
pub trait Reducer: Send {
    /// Takes one key (with a [`Grouping`] by prefix: the first whole key of the group); keys come in order of their bytes. Values that it does not ask
    /// for are skipped.
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

/// Names of the counters that every job has.
pub mod counter {
    /// Bytes of file input that belong to the task's split.
    pub const INPUT_BYTES: &str = "input.bytes";
    /// Bytes of content that were found on the task's node, where a job before had kept them.
    pub const INPUT_KEPT_BYTES: &str = "input.kept_bytes";
    /// Records of the input.
    pub const RECORDS_IN: &str = "map.records_in";
    /// Records of the input that were left out, because a mapper failed on them.
    pub const RECORDS_SKIPPED: &str = "map.records_skipped";
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
    /// Records that reducers were given.
    pub const REDUCE_RECORDS: &str = "reduce.records_in";
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
    /// What the program may use for itself. Larger: larger tables in a map-side join.
    pub program: u64,
}

impl Shares {
    /// What a worker needs before it has a record: its code, and windows of readers and writers.
    const FIXED_BYTES: u64 = 24 << 20;

    /// Of a limit for the whole process.
    pub fn of(memory_limit: u64) -> Self {
        let room = Self::room(memory_limit);
        Self {
            collect: room / 5 * 2,
            fetched: room / 5,
            // A quarter of the room, at 384 KiB a run: raw chunk, stored chunk, decoder.
            merge_ways: (room / 4 / (384 << 10)).clamp(4, 128) as usize,
            program: room / 8,
        }
    }

    fn room(memory_limit: u64) -> u64 {
        memory_limit - Self::FIXED_BYTES.min(memory_limit / 2)
    }

    /// The least limit with which [`Self::of_map_only`] leaves so much to the program.
    pub fn limit_for_map_only(program: u64) -> u64 {
        (program.div_ceil(3) * 5).saturating_add(Self::FIXED_BYTES)
    }

    /// What one record that is a whole file may take.
    pub(crate) fn record(&self) -> u64 {
        self.program.max(self.collect / 2)
    }

    /// The same for a map of a job without reducers: what would gather records is the program's.
    pub fn of_map_only(memory_limit: u64) -> Self {
        Self { collect: 0, fetched: 0, program: Self::room(memory_limit) / 5 * 3, ..Self::of(memory_limit) }
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

/// Compares keys whose first bytes are known as numbers ([`key_prefix`]). Keys of up to eight bytes, as most words have, are not looked at again: where
/// the numbers are equal, the shorter one is the beginning of the longer.
#[inline]
pub(crate) fn compare_keys(a: (u64, &[u8]), b: (u64, &[u8])) -> std::cmp::Ordering {
    a.0.cmp(&b.0).then_with(|| if a.1.len() <= 8 && b.1.len() <= 8 { a.1.len().cmp(&b.1.len()) } else { a.1.cmp(b.1) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_compare_as_their_bytes_do() {
        let keys: [&[u8]; 12] = [
            b"",
            b"\0",
            b"\0\0",
            b"a",
            b"a\0",
            b"aaaaaaa",
            b"aaaaaaaa",
            b"aaaaaaa\0",
            b"aaaaaaaa\0",
            b"aaaaaaaab",
            b"b",
            b"\xff",
        ];
        for a in keys {
            for b in keys {
                assert_eq!(compare_keys((key_prefix(a), a), (key_prefix(b), b)), a.cmp(b), "{a:?} {b:?}");
            }
        }
    }

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
}

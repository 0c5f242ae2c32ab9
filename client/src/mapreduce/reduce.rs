//! The reduce side: fetched runs, merged in as many passes as memory asks for, handed to the reducer.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use cairn_common::durable::{Fs, OpenMode};
use cairn_proto::mapoutput::PartitionEntry;
use cairn_proto::{Error, Result};

use super::merge::{Merger, Values};
use super::output::WrittenFile;
use super::run::{RunBytes, RunReader, RunWriter};
use super::{Combine, Counters, Output, Program, Shares, TaskContext, counter, encode_count};

/// One map's contribution, as it was fetched.
pub enum Segment {
    /// Small enough to stay in memory.
    Memory(bytes::Bytes),
    /// On local disk: the whole file is the run.
    File(PathBuf),
}

/// Where intermediate runs go.
pub struct Scratch {
    /// Files.
    pub fs: Arc<dyn Fs>,
    /// Folder of the attempt.
    pub dir: PathBuf,
}

/// What a finished reduce left.
pub struct Reduced {
    /// Files of the job's output.
    pub files: Vec<WrittenFile>,
    /// Counters of the reducing side.
    pub counters: Counters,
    /// The keys with the most records, and how many.
    pub hot_keys: Vec<(Vec<u8>, u64)>,
}

/// Reduces one partition.
pub fn run(
    program: &dyn Program,
    task: &TaskContext,
    segments: Vec<Segment>,
    shares: &Shares,
    scratch: &Scratch,
    mut out: Output,
) -> Result<Reduced> {
    let mut counters = Counters::default();
    let mut runs = Vec::with_capacity(segments.len());
    for segment in segments {
        runs.push(open(segment, scratch)?.watched(&task.user_counters));
    }
    let mut pass = 0;
    while runs.len() > shares.merge_ways {
        // Just so many that the last pass has all its ways.
        let take = (runs.len() - shares.merge_ways + 1).min(shares.merge_ways);
        let some = runs.drain(..take).collect();
        pass += 1;
        let (entry, path) = merge_to_disk(program, some, pass, scratch)?;
        counters.add(counter::SPILLS, 1);
        counters.add(counter::SPILLED_BYTES, entry.stored);
        runs.push(open_file(&path, scratch, Some(&entry))?.watched(&task.user_counters));
    }
    let mut reducer = program.reducer(task)?;
    let (mut groups, mut records, mut hot) = (0, 0, HotKeys::default());
    let reduce = |key: &[u8], values: &mut Values<'_>| reducer.reduce(key, values, &mut out);
    Merger::new(runs)?.groups_by(&program.grouping(), reduce, |key, count| {
        groups += 1;
        records += count;
        hot.add(key, count);
    })?;
    reducer.finish(&mut out)?;
    let (files, written) = out.finish()?;
    counters.merge(&written);
    counters.add(counter::REDUCE_GROUPS, groups);
    counters.add(counter::REDUCE_RECORDS, records);
    Ok(Reduced { files, counters, hot_keys: hot.keys })
}

/// The keys with the most records. They come one after the other, so their counts are exact.
#[derive(Default)]
struct HotKeys {
    /// The most first.
    keys: Vec<(Vec<u8>, u64)>,
}

impl HotKeys {
    const KEPT: usize = 5;
    const KEY_BYTES: usize = 100;

    #[inline]
    fn add(&mut self, key: &[u8], records: u64) {
        let least = self.keys.last().map_or(0, |(_, records)| *records);
        if self.keys.len() < Self::KEPT || records > least {
            self.insert(key, records);
        }
    }

    #[cold]
    fn insert(&mut self, key: &[u8], records: u64) {
        self.keys.truncate(Self::KEPT - 1);
        let at = self.keys.partition_point(|(_, more)| *more >= records);
        self.keys.insert(at, (key[..key.len().min(Self::KEY_BYTES)].to_vec(), records));
    }
}

fn open(segment: Segment, scratch: &Scratch) -> Result<RunReader> {
    match segment {
        Segment::Memory(bytes) => Ok(RunReader::new(RunBytes::Memory(bytes))),
        Segment::File(path) => open_file(&path, scratch, None),
    }
}

/// Opens a run: the partition of a file with an index, or a file that is nothing but the run. The name goes at once: the open file is enough,
/// and its space is free as soon as it was read.
fn open_file(path: &Path, scratch: &Scratch, entry: Option<&PartitionEntry>) -> Result<RunReader> {
    let failed = |error: std::io::Error| Error::io(format!("cannot open {}", path.display()), &error);
    let file = scratch.fs.open(path, OpenMode::Read).map_err(failed)?;
    let whole = PartitionEntry { stored: file.len().map_err(failed)?, ..Default::default() };
    scratch.fs.remove_file(path).map_err(failed)?;
    Ok(RunReader::new(RunBytes::partition(file, path, entry.unwrap_or(&whole))))
}

fn merge_to_disk(
    program: &dyn Program,
    runs: Vec<RunReader>,
    pass: u32,
    scratch: &Scratch,
) -> Result<(PartitionEntry, PathBuf)> {
    let path = scratch.dir.join(format!("merge-{pass:05}"));
    let mut writer = RunWriter::create(&*scratch.fs, &path)?;
    let mut merger = Merger::new(runs)?;
    match program.combine() {
        Combine::Sum => {
            let mut number = [0; 10];
            merger.sums(|key, sum| writer.push(key, encode_count(sum, &mut number)))?;
        }
        Combine::With(mut combiner) => merger.combined(&mut *combiner, |key, value| writer.push(key, value))?,
        Combine::Never => merger.records(|key, value| writer.push(key, value))?,
    }
    writer.end_partition()?;
    let entries = writer.finish()?;
    Ok((entries[0], path))
}

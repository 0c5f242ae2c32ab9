//! What happens to the records that a mapper emits: counted or sorted in bounded memory, spilled, merged into the map output.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use cairn_common::durable::{Fs, OpenMode};
use cairn_proto::mapoutput::PartitionEntry;
use cairn_proto::{Error, ErrorCode, Result};

use super::merge::{Merger, Values};
use super::output::{NamedOutput, WrittenFile};
use super::position::PositionNote;
use super::run::{RunBytes, RunReader, RunWriter, read_index};
use super::sort::SortBuffer;
use super::table::CountTable;
use super::{Combine, Combiner, Counters, Output, Partitioner, Program, Shares, UserCounters, counter, encode_count};

/// Gathers what one map task emits.
pub struct Collector {
    gather: Gather,
    combiner: Option<Box<dyn Combiner>>,
    /// Values are counts, to be added up.
    sums: bool,
    partitions: u32,
    disk: Disk,
    emitted: u64,
    spills: Vec<PathBuf>,
    spilled_runs: u64,
    spilled_bytes: u64,
    user: UserCounters,
    position: Arc<PositionNote>,
}

enum Gather {
    Sum(CountTable),
    Sort(SortBuffer),
    /// A job without reducers: records are the output.
    Direct(Output),
    /// What one record's mapping emits waits until that has gone well.
    Staged(Box<Staging>),
}

struct Staging {
    inner: Gather,
    bytes: Vec<u8>,
    /// Length of the key (`None`: a line), length of the value.
    records: Vec<(Option<usize>, usize)>,
    /// Bytes that it may take.
    limit: u64,
    /// It would have taken more.
    over: bool,
}

impl Staging {
    fn add(&mut self, key: Option<&[u8]>, value: &[u8]) -> Result<()> {
        self.bytes.extend_from_slice(key.unwrap_or_default());
        self.bytes.extend_from_slice(value);
        self.records.push((key.map(<[u8]>::len), value.len()));
        let taken = self.bytes.len() + self.records.len() * size_of::<(Option<usize>, usize)>();
        self.over |= taken as u64 > self.limit;
        if self.over {
            let text = format!("emits more than the {} bytes that may wait while bad records are left out", self.limit);
            return Err(Error::new(ErrorCode::TaskFailed, text));
        }
        Ok(())
    }
}

/// What became of what was staged.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum RolledBack {
    /// It was dropped.
    Dropped,
    /// It was dropped, and was more than may wait.
    TooMuch,
}

struct Disk {
    fs: Arc<dyn Fs>,
    dir: PathBuf,
    merge_ways: usize,
    files: u32,
}

impl Disk {
    fn next(&mut self) -> PathBuf {
        self.files += 1;
        self.dir.join(format!("spill-{:05}", self.files))
    }
}

/// What a finished map left.
pub struct Collected {
    /// Its partitions; empty in a job without reducers.
    pub partitions: Vec<PartitionEntry>,
    /// Files of the job's output; empty in a job with reducers.
    pub files: Vec<WrittenFile>,
    /// Counters of the collecting side.
    pub counters: Counters,
}

/// Adds up counts where no table does.
pub(super) struct Adding;

impl Combiner for Adding {
    fn combine(
        &mut self,
        _key: &[u8],
        values: &mut Values<'_>,
        emit: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        emit(encode_count(values.sum()?, &mut [0; 10]))
    }
}

impl Collector {
    /// Collects for `partitions` reducers of `program`, spilling into the folder `dir`.
    pub fn new(
        program: &dyn Program,
        partitions: u32,
        shares: &Shares,
        fs: Arc<dyn Fs>,
        dir: &Path,
        user: UserCounters,
    ) -> Result<Self> {
        let (combine, partitioner) = (program.combine(), program.partitioner()?);
        let sums = matches!(combine, Combine::Sum);
        // The table's sub-tables are slices of the hash of the whole key.
        let (gather, combiner): (_, Option<Box<dyn Combiner>>) = match (combine, partitioner) {
            (Combine::Sum, Partitioner::Hash) => (Gather::Sum(CountTable::new(partitions, shares.collect)), None),
            (combine, partitioner) => {
                let combiner: Option<Box<dyn Combiner>> = match combine {
                    Combine::Sum => Some(Box::new(Adding)),
                    Combine::With(combiner) => Some(combiner),
                    Combine::Never => None,
                };
                (Gather::Sort(SortBuffer::new(partitions, partitioner, shares.collect)), combiner)
            }
        };
        let disk = Disk { fs, dir: dir.to_owned(), merge_ways: shares.merge_ways.max(2), files: 0 };
        Ok(Self { combiner, sums, ..Self::empty(gather, partitions, disk, user) })
    }

    /// Hands every record straight to `output`.
    pub fn direct(output: Output, fs: Arc<dyn Fs>, dir: &Path, user: UserCounters) -> Self {
        let disk = Disk { fs, dir: dir.to_owned(), merge_ways: 2, files: 0 };
        Self::empty(Gather::Direct(output), 0, disk, user)
    }

    fn empty(gather: Gather, partitions: u32, disk: Disk, user: UserCounters) -> Self {
        Self {
            gather,
            combiner: None,
            sums: false,
            partitions,
            disk,
            emitted: 0,
            spills: Vec::new(),
            spilled_runs: 0,
            spilled_bytes: 0,
            user,
            position: Arc::default(),
        }
    }

    /// Where the mapper is will be noted there.
    #[must_use]
    pub fn noting(mut self, position: Arc<PositionNote>) -> Self {
        self.position = position;
        self
    }

    /// Where the mapper is.
    #[inline]
    pub fn position(&self) -> &PositionNote {
        &self.position
    }

    /// From here on what is emitted waits for [`Self::commit`] or [`Self::roll_back`]; named outputs do not. More than `limit` bytes are refused.
    pub(crate) fn stage(&mut self, limit: u64) {
        let empty = Gather::Sort(SortBuffer::new(0, Partitioner::Hash, 0));
        let inner = std::mem::replace(&mut self.gather, empty);
        self.gather = match inner {
            Gather::Staged(staging) => Gather::Staged(staging),
            inner => {
                let (bytes, records, over) = (Vec::new(), Vec::new(), false);
                Gather::Staged(Box::new(Staging { inner, bytes, records, limit, over }))
            }
        };
    }

    /// Takes what was emitted since [`Self::stage`].
    pub(crate) fn commit(&mut self) -> Result<()> {
        let (bytes, records) = self.unstage();
        let mut at = 0;
        for (key, value) in records {
            let (from, to) = (at + key.unwrap_or(0), at + key.unwrap_or(0) + value);
            match key {
                Some(_) => self.emit(&bytes[at..from], &bytes[from..to])?,
                None => self.emit_line(&bytes[from..to])?,
            }
            at = to;
        }
        Ok(())
    }

    /// Drops what was emitted since [`Self::stage`].
    pub(crate) fn roll_back(&mut self) -> RolledBack {
        let too_much = matches!(&self.gather, Gather::Staged(staging) if staging.over);
        self.unstage();
        if too_much { RolledBack::TooMuch } else { RolledBack::Dropped }
    }

    fn unstage(&mut self) -> (Vec<u8>, Vec<(Option<usize>, usize)>) {
        let empty = Gather::Sort(SortBuffer::new(0, Partitioner::Hash, 0));
        match std::mem::replace(&mut self.gather, empty) {
            Gather::Staged(staging) => {
                self.gather = staging.inner;
                (staging.bytes, staging.records)
            }
            other => {
                self.gather = other;
                Default::default()
            }
        }
    }

    /// Adds to a counter of the program's own.
    pub fn count(&self, name: &str, by: u64) {
        self.user.count(name, by);
    }

    /// A further output of the job ([`Output::named`]). Only in a job without reducers: what its maps emit is the output.
    pub fn named(&mut self, name: &str) -> Result<NamedOutput<'_>> {
        let gather = match &mut self.gather {
            Gather::Staged(staging) => &mut staging.inner,
            gather => gather,
        };
        match gather {
            Gather::Direct(output) => output.named(name),
            _ => {
                let text =
                    format!("a map cannot write the output {name:?}: in a job with reducers only they write output");
                Err(Error::new(ErrorCode::InvalidArgument, text))
            }
        }
    }

    /// Takes a record.
    pub fn emit(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        self.emitted += 1;
        let full = match &mut self.gather {
            Gather::Sum(table) => table.add(key, super::decode_count(value)?),
            Gather::Sort(buffer) => buffer.add(key, value)?,
            Gather::Direct(output) => {
                output.emit(key, value)?;
                false
            }
            Gather::Staged(staging) => {
                self.emitted -= 1;
                staging.add(Some(key), value)?;
                false
            }
        };
        if full { self.spill() } else { Ok(()) }
    }

    /// Takes a line of output of a job without reducers, or a record whose key is nothing.
    pub fn emit_line(&mut self, line: &[u8]) -> Result<()> {
        match &mut self.gather {
            Gather::Direct(output) => {
                self.emitted += 1;
                output.line(line)
            }
            Gather::Staged(staging) if matches!(staging.inner, Gather::Direct(_)) => staging.add(None, line),
            _ => self.emit(b"", line),
        }
    }

    /// Takes a key with a count ([`Combine::Sum`]'s kind of value).
    pub fn emit_count(&mut self, key: &[u8], count: u64) -> Result<()> {
        match &mut self.gather {
            Gather::Direct(output) => {
                self.emitted += 1;
                return output.emit_count(key, count);
            }
            Gather::Staged(staging) if matches!(staging.inner, Gather::Direct(_)) => {
                return staging.add(Some(key), count.to_string().as_bytes());
            }
            _ => {}
        }
        let mut scratch = [0; 10];
        self.emit(key, encode_count(count, &mut scratch))
    }

    /// Takes the word `text[start..end]` with a count of one: [`Self::emit_count`] for the inner loop of a word count.
    #[inline]
    pub fn emit_word(&mut self, text: &[u8], start: usize, end: usize) -> Result<()> {
        if let Gather::Sum(table) = &mut self.gather {
            self.emitted += 1;
            return if table.add_word(text, start, end) { self.spill() } else { Ok(()) };
        }
        self.emit_count(&text[start..end], 1)
    }

    #[cold]
    fn spill(&mut self) -> Result<()> {
        let path = self.disk.next();
        let (_, entries) = self.write_gathered(&path)?;
        self.note_spill(path, &entries);
        Ok(())
    }

    fn note_spill(&mut self, path: PathBuf, entries: &[PartitionEntry]) {
        self.spilled_runs += 1;
        self.spilled_bytes += entries.iter().map(|entry| entry.stored).sum::<u64>();
        self.spills.push(path);
    }

    fn write_gathered(&mut self, path: &Path) -> Result<(u64, Vec<PartitionEntry>)> {
        let mut writer = RunWriter::create(&*self.disk.fs, path)?;
        let records = match &mut self.gather {
            Gather::Sum(table) => table.write(&mut writer)?,
            Gather::Sort(buffer) => buffer.write(self.combiner.as_deref_mut(), &mut writer)?,
            Gather::Direct(_) | Gather::Staged(_) => 0,
        };
        Ok((records, writer.finish()?))
    }

    /// Writes the map output to `path`.
    pub fn finish(mut self, path: &Path) -> Result<Collected> {
        let mut counters = Counters::default();
        if let Gather::Direct(output) = self.gather {
            let (files, written) = output.finish()?;
            counters.merge(&written);
            counters.add(counter::RECORDS_MAP_OUT, self.emitted);
            return Ok(Collected { partitions: Vec::new(), files, counters });
        }
        let (records, partitions) = if self.spills.is_empty() {
            self.write_gathered(path)?
        } else {
            self.spill()?;
            // The memory that gathered is free for merging.
            self.gather = Gather::Sort(SortBuffer::new(self.partitions, Partitioner::Hash, 0));
            while self.spills.len() > self.disk.merge_ways {
                let some: Vec<PathBuf> = self.spills.drain(..self.disk.merge_ways).collect();
                let target = self.disk.next();
                let (_, entries) = self.merge_files(&some, &target)?;
                self.note_spill(target, &entries);
            }
            let all = std::mem::take(&mut self.spills);
            self.merge_files(&all, path)?
        };
        counters.add(counter::RECORDS_MAP_OUT, self.emitted);
        counters.add(counter::RECORDS_COMBINE_OUT, records);
        counters.add(counter::SPILLS, self.spilled_runs);
        counters.add(counter::SPILLED_BYTES, self.spilled_bytes);
        counters.add(counter::MAP_OUTPUT_BYTES, partitions.iter().map(|entry| entry.stored).sum());
        Ok(Collected { partitions, files: Vec::new(), counters })
    }

    /// Merges spilled files, partition by partition, and removes them.
    fn merge_files(&mut self, paths: &[PathBuf], target: &Path) -> Result<(u64, Vec<PartitionEntry>)> {
        let mut files = Vec::with_capacity(paths.len());
        for path in paths {
            let file = self.disk.fs.open(path, OpenMode::Read).map_err(|error| failed("open", path, &error))?;
            let index = read_index(&*file, path)?;
            files.push((path, file, index));
        }
        let mut writer = RunWriter::create(&*self.disk.fs, target)?;
        let mut records = 0;
        for partition in 0..self.partitions as usize {
            let readers = files.iter().filter_map(|(path, file, index)| {
                let entry = index.get(partition)?;
                Some(RunReader::new(RunBytes::partition(Arc::clone(file), path, entry)).watched(&self.user))
            });
            let mut merger = Merger::new(readers.collect())?;
            let mut push = |key: &[u8], value: &[u8]| {
                records += 1;
                writer.push(key, value)
            };
            if self.sums {
                let mut scratch = [0; 10];
                merger.sums(|key, sum| push(key, encode_count(sum, &mut scratch)))?;
            } else if let Some(combiner) = &mut self.combiner {
                merger.combined(&mut **combiner, push)?;
            } else {
                merger.records(push)?;
            }
            writer.end_partition()?;
        }
        let entries = writer.finish()?;
        for path in paths {
            self.disk.fs.remove_file(path).map_err(|error| failed("remove", path, &error))?;
        }
        Ok((records, entries))
    }
}

fn failed(doing: &str, path: &Path, error: &std::io::Error) -> Error {
    Error::io(format!("cannot {doing} {}", path.display()), error)
}

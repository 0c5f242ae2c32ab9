//! Leaving out bad records of a mapper that takes its input in portions: a portion that fails is halved until the bad records stand alone.
//!
//! # Overview
//! What a portion emits is held back until it has ended well. Of one that failed the first half is tried, then the second; where the first half is well, the
//! second is known to be bad and is halved at once. So one bad record among n costs one or two further runs for each of log2(n) halvings, within one attempt; the
//! rest of the split is mapped once. Cuts are as good as those between splits: a mapper must not care where its input is cut.
//!
//! # Memory
//! A portion's input ([`PORTION_BYTES`], or one batch), and what it emits up to half of the program's share; a portion that emits more is halved as well.

use cairn_proto::{Error, ErrorCode, Result};

use super::records::{Mapping, Skipped};
use crate::mapreduce::collect::RolledBack;
use crate::mapreduce::{Batch, Collector, Mapper, Record};

/// Input that is gathered for one run. Larger: fewer runs where all is well; smaller: less to repeat, less to hold back.
const PORTION_BYTES: usize = 4 << 20;

/// Batches that are mapped together.
#[derive(Default)]
pub(super) struct Portion {
    batches: Vec<Batch>,
    bytes: usize,
    /// Number of its first record in the split.
    first: u64,
    /// One was mapped: a split without records is mapped as well, once.
    mapped: bool,
}

/// Some of its records, by number from its first.
#[derive(Clone, Copy, Debug)]
struct Range {
    from: usize,
    count: usize,
    /// It holds a bad record for certain.
    bad: bool,
    /// If it is well, the range behind it is bad for certain.
    first_half: bool,
}

impl Portion {
    /// Takes a batch; true if it is to be mapped now.
    pub(super) fn add(&mut self, batch: Batch) -> bool {
        self.bytes += batch.bytes.len();
        self.batches.push(batch);
        self.bytes >= PORTION_BYTES
    }

    fn records(&self, range: Range) -> impl Iterator<Item = (&Batch, Record<'_>)> {
        let all = self.batches.iter().flat_map(|batch| batch.records().map(move |record| (batch, record)));
        all.skip(range.from).take(range.count)
    }

    /// Maps what has gathered; returns how many records that were, those left out included.
    pub(super) fn map(
        &mut self,
        mapping: &Mapping,
        mapper: &mut dyn Mapper,
        out: &mut Collector,
        skipped: &mut Skipped,
    ) -> Result<u64> {
        let count = self.batches.iter().map(|batch| batch.records().count()).sum();
        if count > 0 || !self.mapped {
            self.map_range(count, mapping, mapper, out, skipped)?;
        }
        self.batches.clear();
        (self.bytes, self.mapped) = (0, true);
        self.first += count as u64;
        Ok(count as u64)
    }

    fn map_range(
        &self,
        count: usize,
        mapping: &Mapping,
        mapper: &mut dyn Mapper,
        out: &mut Collector,
        skipped: &mut Skipped,
    ) -> Result<()> {
        let mut waiting = self.around_deadly(count, mapping);
        while let Some(range) = waiting.pop() {
            if range.bad && range.count > 1 {
                halve(range, true, &mut waiting);
                continue;
            }
            if range.count == 1 && self.is_deadly(range.from, mapping) {
                self.leave_out(range, mapping, skipped, "the worker died on it".into())?;
                continue;
            }
            let Err(error) = self.run(range, mapping, mapper, out)? else {
                out.commit()?;
                if range.first_half
                    && let Some(second) = waiting.last_mut()
                {
                    second.bad = true;
                }
                continue;
            };
            let too_much = out.roll_back() == RolledBack::TooMuch;
            if range.count > 1 {
                // Halves of what was only too much may both be well.
                halve(range, !too_much, &mut waiting);
            } else if range.count == 0 || too_much {
                return Err(error);
            } else {
                self.leave_out(range, mapping, skipped, error.message().to_owned())?;
            }
        }
        Ok(())
    }

    /// Runs the mapper over a range. The inner error is one that its records are to blame for.
    fn run(
        &self,
        range: Range,
        mapping: &Mapping,
        mapper: &mut dyn Mapper,
        out: &mut Collector,
    ) -> Result<Result<(), Error>> {
        if let Some((_, record)) = self.records(range).next() {
            let ordinal = self.first + range.from as u64;
            if range.count == 1 {
                mapping.position.at_record(record.offset, ordinal);
            } else {
                mapping.position.in_batch(record.offset, ordinal);
            }
        }
        let Some(portions) = mapper.portions() else {
            return Err(Error::new(ErrorCode::Internal, "a mapper of portions takes none any more"));
        };
        out.stage(mapping.shares.program / 2);
        match portions.map_portion(&mut self.records(range).map(|(_, record)| record), out) {
            Err(error) if error.code() != ErrorCode::TaskFailed => Err(error),
            mapped => Ok(mapped),
        }
    }

    fn is_deadly(&self, at: usize, mapping: &Mapping) -> bool {
        mapping.deadly.contains(&(self.first + at as u64))
    }

    /// All records, those that killed earlier attempts apart from the rest; the last range comes first.
    fn around_deadly(&self, count: usize, mapping: &Mapping) -> Vec<Range> {
        let range = |from, count| Range { from, count, bad: false, first_half: false };
        let (mut ranges, mut from) = (Vec::new(), 0);
        for deadly in mapping.deadly.range(self.first..self.first + count as u64) {
            let at = (deadly - self.first) as usize;
            ranges.extend((at > from).then(|| range(from, at - from)));
            ranges.push(range(at, 1));
            from = at + 1;
        }
        if from < count || count == 0 {
            ranges.push(range(from, count - from));
        }
        ranges.reverse();
        ranges
    }

    fn leave_out(&self, range: Range, mapping: &Mapping, skipped: &mut Skipped, why: String) -> Result<()> {
        let Some((batch, record)) = self.records(range).next() else { return Ok(()) };
        mapping.skip(skipped, batch, &record, self.first + range.from as u64, why)
    }
}

/// `one_is_bad`: if the first half is well, the second one is not.
fn halve(range: Range, one_is_bad: bool, waiting: &mut Vec<Range>) {
    let half = range.count / 2;
    let (from, count) = (range.from + half, range.count - half);
    waiting.push(Range { from, count, bad: false, first_half: false });
    waiting.push(Range { from: range.from, count: half, bad: false, first_half: one_is_bad });
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use bytes::Bytes;
    use cairn_common::durable::SystemFs;
    use cairn_proto::pb;

    use super::super::records::tests::Once;
    use super::*;
    use crate::mapreduce::{InputFormat, MapPortions, Program, Reducer, Shares, TaskContext, UserCounters, counter};

    /// Learns at the end of a portion that a record was bad, as a command's reader does. A record "large" emits a hundred kilobytes, "huge" three megabytes.
    #[derive(Clone, Default)]
    struct Late {
        runs: Arc<AtomicU64>,
        given: Arc<AtomicU64>,
    }

    impl Mapper for Late {
        fn map(&mut self, _record: Record<'_>, _out: &mut Collector) -> Result<()> {
            Err(Error::new(ErrorCode::Internal, "it takes portions"))
        }

        fn portions(&mut self) -> Option<&mut dyn MapPortions> {
            Some(self)
        }
    }

    impl MapPortions for Late {
        fn map_portion(&mut self, records: &mut dyn Iterator<Item = Record<'_>>, out: &mut Collector) -> Result<()> {
            self.runs.fetch_add(1, Ordering::Relaxed);
            let mut bad = None;
            for record in records {
                self.given.fetch_add(1, Ordering::Relaxed);
                match record.bytes {
                    b"large" => out.emit(&[b'x'; 100_000], b"1")?,
                    b"huge" => out.emit(&[b'x'; 3_000_000], b"1")?,
                    bytes => out.emit(bytes, b"1")?,
                }
                bad = bad.or((record.bytes == b"bad").then_some(record.offset));
            }
            bad.map_or(Ok(()), |_| Err(Error::new(ErrorCode::TaskFailed, "exited with status 3")))
        }
    }

    impl Program for Late {
        fn mapper(&self, _task: &TaskContext) -> Result<Box<dyn Mapper>> {
            Ok(Box::new(self.clone()))
        }

        fn reducer(&self, _task: &TaskContext) -> Result<Box<dyn Reducer>> {
            Err(Error::new(ErrorCode::Internal, "there is none"))
        }
    }

    /// Records that came out, what was left out, runs, records given in all of them.
    fn run(text: &str, may_skip: u64, deadly: &[u64]) -> Result<(u64, Skipped, u64, u64)> {
        let dir = tempfile::tempdir().unwrap();
        let (late, shares) = (Late::default(), Shares::of(64 << 20));
        let mapping = Mapping {
            program: Arc::new(late.clone()),
            split: pb::Split { path: "/f".into(), length: text.len() as u64, ..Default::default() },
            format: InputFormat::Lines,
            shares,
            progress: Arc::default(),
            position: Arc::default(),
            may_skip,
            deadly: deadly.iter().copied().collect(),
        };
        let user = UserCounters::default();
        let out = Collector::new(&late, 1, &shares, Arc::new(SystemFs), dir.path(), user).unwrap();
        let feed = Once(Some(Bytes::copy_from_slice(text.as_bytes())).filter(|text| !text.is_empty()));
        let (out, skipped) = mapping.run(&TaskContext::default(), feed, out)?;
        assert_eq!(mapping.progress.records.load(Ordering::Relaxed), text.lines().count() as u64);
        let collected = out.finish(&dir.path().join("out")).unwrap();
        let (runs, given) = (late.runs.load(Ordering::Relaxed), late.given.load(Ordering::Relaxed));
        Ok((collected.counters.get(counter::RECORDS_MAP_OUT), skipped, runs, given))
    }

    fn lines(count: usize, bad: &[usize]) -> String {
        (0..count).map(|at| if bad.contains(&at) { "bad\n".to_owned() } else { format!("line {at}\n") }).collect()
    }

    #[test]
    fn bad_records_are_found_by_halving() {
        for bad in [&[][..], &[0], &[999], &[500], &[3, 4, 700]] {
            let text = lines(1_000, bad);
            let (records, skipped, runs, given) = run(&text, 3, &[]).unwrap();
            assert_eq!((records, skipped.count), (1_000 - bad.len() as u64, bad.len() as u64));
            let offset = |at: &usize| text.lines().take(*at).map(|line| line.len() as u64 + 1).sum::<u64>();
            let found: Vec<u64> = skipped.samples.iter().map(|one| one.position.clone().unwrap().offset).collect();
            assert_eq!(found, bad.iter().map(offset).collect::<Vec<_>>());
            assert!(skipped.samples.iter().all(|one| one.why == "exited with status 3" && one.sample == "bad"));
            assert!(runs <= 1 + 20 * bad.len() as u64, "{runs} runs for {bad:?}");
            assert!(given <= 1_000 + 2_000 * bad.len() as u64, "{given} records in all runs for {bad:?}");
        }
    }

    #[test]
    fn no_more_are_left_out_than_allowed_and_those_that_kill_are_not_tried() {
        let error = run(&lines(100, &[7, 8]), 1, &[]).err().unwrap();
        assert!(error.message().contains("more than the 1 records") && error.message().contains("status 3"), "{error}");
        let (records, skipped, ..) = run(&lines(100, &[50]), 3, &[0, 99]).unwrap();
        assert_eq!((records, skipped.count), (97, 3));
        assert_eq!(skipped.samples[0].why, "the worker died on it");
    }

    #[test]
    fn a_portion_that_emits_too_much_is_halved_and_one_record_that_does_is_told() {
        let (records, skipped, runs, _) = run(&"large\n".repeat(100), 1, &[]).unwrap();
        assert_eq!((records, skipped.count), (100, 0));
        assert!(runs > 3, "{runs}");
        let error = run("line\nhuge\n", 1, &[]).err().unwrap();
        assert!(error.message().contains("emits more than the"), "{error}");
        assert_eq!(run("", 1, &[]).unwrap().2, 1, "a split without records is mapped once");
    }
}

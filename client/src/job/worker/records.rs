//! Handing records to a mapper: batch by batch, or, where bad records may be left out, one by one, or in portions ([`super::portions`]).

use std::any::Any;
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use cairn_proto::position::describe;
use cairn_proto::{Error, ErrorCode, Result, pb};

use super::Progress;
use super::portions::Portion;
use crate::mapreduce::input::{BatchReader, Feed};
use crate::mapreduce::position::PositionNote;
use crate::mapreduce::{Batch, Collector, InputFormat, Mapper, Program, Record, Shares, TaskContext, counter};

/// Bytes of a skipped record that are shown, records that are shown.
const SAMPLE_BYTES: usize = 200;
const SAMPLES: usize = 10;

/// What the computing thread of a map needs to know.
pub struct Mapping {
    pub program: Arc<dyn Program>,
    pub split: pb::Split,
    pub format: InputFormat,
    pub shares: Shares,
    pub progress: Arc<Progress>,
    pub position: Arc<PositionNote>,
    /// Records that may be left out; 0: the first bad one is an error.
    pub may_skip: u64,
    /// Records that killed earlier attempts.
    pub deadly: BTreeSet<u64>,
}

/// What was left out.
#[derive(Default)]
pub struct Skipped {
    pub count: u64,
    /// The first ones.
    pub samples: Vec<pb::SkippedRecord>,
}

impl Mapping {
    /// Maps all batches of the split. A panic becomes an error that says where it happened.
    pub fn run(
        &self,
        task: &TaskContext,
        feed: impl Feed + Send + 'static,
        out: Collector,
    ) -> Result<(Collector, Skipped)> {
        match catch_unwind(AssertUnwindSafe(|| self.map(task, feed, out))) {
            Ok(mapped) => mapped,
            Err(panic) => {
                let place =
                    self.position.position(&self.split.path).map(|at| format!("; it happened on {}", describe(&at)));
                let text = format!("the mapper panicked: {}{}", message(&*panic), place.unwrap_or_default());
                Err(Error::new(ErrorCode::TaskFailed, text).with_subject(self.split.path.clone()))
            }
        }
    }

    fn map(
        &self,
        task: &TaskContext,
        feed: impl Feed + Send + 'static,
        out: Collector,
    ) -> Result<(Collector, Skipped)> {
        let mut out = out.noting(Arc::clone(&self.position));
        let mut batches = BatchReader::new(&self.split, self.format, self.shares.record(), feed)?;
        let mut mapper = self.program.mapper(task)?;
        let (mut skipped, mut records) = (Skipped::default(), 0);
        if self.may_skip > 0 && mapper.portions().is_some() {
            self.in_portions(&mut *mapper, &mut batches, &mut out, &mut skipped)?;
            mapper.finish(&mut out)?;
            return Ok((out, skipped));
        }
        while let Some(batch) = batches.next()? {
            self.position.in_batch(batch.offset, records);
            let mapped = if self.may_skip == 0 {
                mapper.map_batch(&batch, &mut out)?
            } else {
                self.one_by_one(&mut *mapper, &batch, records, &mut out, &mut skipped)?
            };
            records += mapped;
            self.progress.records.fetch_add(mapped, Ordering::Relaxed);
        }
        mapper.finish(&mut out)?;
        Ok((out, skipped))
    }

    /// Maps all batches, some of them at a time.
    fn in_portions(
        &self,
        mapper: &mut dyn Mapper,
        batches: &mut BatchReader,
        out: &mut Collector,
        skipped: &mut Skipped,
    ) -> Result<()> {
        let mut portion = Portion::default();
        loop {
            let batch = batches.next()?;
            let ended = batch.is_none();
            if batch.is_some_and(|batch| portion.add(batch)) || ended {
                let mapped = portion.map(self, mapper, out, skipped)?;
                self.progress.records.fetch_add(mapped, Ordering::Relaxed);
            }
            if ended {
                return Ok(());
            }
        }
    }

    /// Maps a batch whose first record is number `first`; returns how many it has. What a bad record emitted before its mapper failed is dropped.
    fn one_by_one(
        &self,
        mapper: &mut dyn Mapper,
        batch: &Batch,
        first: u64,
        out: &mut Collector,
        skipped: &mut Skipped,
    ) -> Result<u64> {
        let mut ordinal = first;
        for record in batch.records() {
            if self.deadly.contains(&ordinal) {
                self.skip(skipped, batch, &record, ordinal, "the worker died on it".into())?;
                ordinal += 1;
                continue;
            }
            self.position.at_record(record.offset, ordinal);
            out.stage(u64::MAX);
            // A mapper that panics goes on with the next record, as it is; one that cannot must not ask for skipping.
            let why = match catch_unwind(AssertUnwindSafe(|| mapper.map(record, out))) {
                Ok(Ok(())) => None,
                Ok(Err(error)) => Some(error.message().to_owned()),
                Err(panic) => Some(format!("panicked: {}", message(&*panic))),
            };
            match why {
                None => out.commit()?,
                Some(why) => {
                    out.roll_back();
                    self.skip(skipped, batch, &record, ordinal, why)?;
                }
            }
            ordinal += 1;
        }
        Ok(ordinal - first)
    }

    pub(super) fn skip(
        &self,
        skipped: &mut Skipped,
        batch: &Batch,
        record: &Record<'_>,
        ordinal: u64,
        why: String,
    ) -> Result<()> {
        let position = pb::RecordPosition { path: batch.path.to_string(), offset: record.offset, ordinal, exact: true };
        skipped.count += 1;
        if skipped.count > self.may_skip {
            let text = format!(
                "the mapper failed on more than the {} records that may be skipped ({}), at last on {}: {why}",
                self.may_skip,
                crate::mapreduce::builtin::property::SKIP_RECORDS,
                describe(&position)
            );
            return Err(Error::new(ErrorCode::InvalidArgument, text).with_subject(&*batch.path));
        }
        if skipped.samples.len() < SAMPLES {
            let bytes = if record.bytes.is_empty() { record.key } else { record.bytes };
            let sample = Bytes::copy_from_slice(&bytes[..bytes.len().min(SAMPLE_BYTES)]);
            skipped.samples.push(pb::SkippedRecord { position: Some(position), sample, why });
        }
        Ok(())
    }
}

impl Skipped {
    /// Adds it to what a finished map reports.
    pub fn report(self, success: &mut pb::TaskSuccess) {
        if self.count > 0 {
            success.counters.insert(counter::RECORDS_SKIPPED.into(), self.count);
            success.skipped = self.samples;
        }
    }
}

/// What a panic said.
fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("without a message")
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::mapreduce::{Reducer, UserCounters};
    use cairn_common::durable::SystemFs;

    /// Emits each number once, and fails after it has emitted those that it does not like.
    struct Picky;

    impl Mapper for Picky {
        fn map(&mut self, record: Record<'_>, out: &mut Collector) -> Result<()> {
            out.emit(record.bytes, b"1")?;
            match record.bytes {
                b"bad" => Err(Error::new(ErrorCode::InvalidArgument, "it is bad")),
                b"worse" => panic!("it is worse"),
                _ => Ok(()),
            }
        }
    }

    struct Program1;

    impl Program for Program1 {
        fn mapper(&self, _task: &TaskContext) -> Result<Box<dyn Mapper>> {
            Ok(Box::new(Picky))
        }
        fn reducer(&self, _task: &TaskContext) -> Result<Box<dyn Reducer>> {
            Err(Error::new(ErrorCode::Internal, "there is none"))
        }
    }

    /// A text in one piece.
    pub(in crate::job::worker) struct Once(pub Option<Bytes>);

    impl Feed for Once {
        fn next(&mut self) -> Result<Option<Bytes>> {
            Ok(self.0.take())
        }
    }

    fn run(text: &'static [u8], may_skip: u64, deadly: &[u64]) -> Result<(u64, Skipped)> {
        let dir = tempfile::tempdir().unwrap();
        let shares = Shares::of(64 << 20);
        let mapping = Mapping {
            program: Arc::new(Program1),
            split: pb::Split { path: "/f".into(), length: text.len() as u64, ..Default::default() },
            format: InputFormat::Lines,
            shares,
            progress: Arc::default(),
            position: Arc::default(),
            may_skip,
            deadly: deadly.iter().copied().collect(),
        };
        let user = UserCounters::default();
        let out = Collector::new(&Program1, 1, &shares, Arc::new(SystemFs), dir.path(), user).unwrap();
        let feed = Once(Some(Bytes::from_static(text)));
        let (out, skipped) = mapping.run(&TaskContext::default(), feed, out)?;
        let collected = out.finish(&dir.path().join("out")).unwrap();
        assert_eq!(collected.partitions[0].records, collected.counters.get(counter::RECORDS_MAP_OUT));
        Ok((collected.partitions[0].records, skipped))
    }

    const TEXT: &[u8] = b"a\nb\nbad\nc\nworse\nd\n";

    #[test]
    fn a_bad_record_is_named_with_its_place() {
        let error = run(b"a\nbad\n", 0, &[]).err().unwrap();
        assert_eq!(error.message(), "it is bad; it happened on the record at byte 2 of /f");
        let error = run(b"a\nworse\n", 0, &[]).err().unwrap();
        assert_eq!(error.message(), "the mapper panicked: it is worse; it happened on the record at byte 2 of /f");
    }

    #[test]
    fn bad_records_are_left_out_with_what_they_emitted() {
        let (records, skipped) = run(TEXT, 3, &[0]).unwrap();
        assert_eq!((records, skipped.count), (3, 3));
        let shown =
            |one: &pb::SkippedRecord| (one.position.clone().unwrap().offset, one.sample.to_vec(), one.why.clone());
        let shown: Vec<_> = skipped.samples.iter().map(shown).collect();
        let want = [(0, "a", "the worker died on it"), (4, "bad", "it is bad"), (10, "worse", "panicked: it is worse")];
        assert_eq!(shown, want.map(|(at, text, why)| (at, text.as_bytes().to_vec(), why.to_owned())));
    }

    #[test]
    fn no_more_are_left_out_than_allowed() {
        let error = run(TEXT, 1, &[]).err().unwrap();
        assert!(error.message().contains("more than the 1 records that may be skipped"), "{error}");
        assert!(error.message().contains("at last on the record at byte 10 of /f: panicked"), "{error}");
    }
}

//! Merging sorted runs: a tournament in which the least key wins.

use std::cmp::Ordering;

use cairn_proto::Result;

use super::run::RunReader;
use super::sort::Entry;
use super::{Combiner, Grouping, compare_keys, decode_count};

/// Merges runs; equal keys come in the order of their runs.
///
/// `losers[1..]` is a tournament tree: each inner node holds the run that lost there, `losers[0]` the overall winner. Replacing the winner
/// replays one path: one comparison per level.
pub struct Merger {
    runs: Vec<Run>,
    losers: Vec<u32>,
    /// Records passed.
    passed: u64,
}

struct Run {
    reader: RunReader,
    done: bool,
}

impl Merger {
    /// Takes runs that stand before their first records.
    pub fn new(readers: Vec<RunReader>) -> Result<Self> {
        let mut runs = Vec::with_capacity(readers.len());
        for mut reader in readers {
            if reader.advance()? {
                runs.push(Run { reader, done: false });
            }
        }
        let mut merger = Self { losers: vec![u32::MAX; runs.len().max(1)], runs, passed: 0 };
        merger.play_all();
        Ok(merger)
    }

    fn play_all(&mut self) {
        for run in 0..self.runs.len() {
            self.replay(run as u32);
        }
    }

    /// Sends `contender` up from its leaf. An empty place (while the tree fills) takes it; the last one to arrive at the top wins.
    fn replay(&mut self, mut contender: u32) {
        let count = self.runs.len();
        let mut node = (contender as usize + count) / 2;
        while node > 0 {
            let other = self.losers[node];
            if other == u32::MAX {
                self.losers[node] = contender;
                return;
            }
            if self.before(other, contender) {
                self.losers[node] = contender;
                contender = other;
            }
            node /= 2;
        }
        self.losers[0] = contender;
    }

    #[inline]
    fn before(&self, a: u32, b: u32) -> bool {
        let (x, y) = (&self.runs[a as usize], &self.runs[b as usize]);
        if x.done || y.done {
            return !x.done;
        }
        match compare_keys((x.reader.prefix(), x.reader.key()), (y.reader.prefix(), y.reader.key())) {
            Ordering::Less => true,
            Ordering::Greater => false,
            Ordering::Equal => a < b,
        }
    }

    /// The least record; `None` when all runs have ended.
    #[inline]
    pub fn peek(&self) -> Option<&RunReader> {
        let run = self.runs.get(self.losers[0] as usize)?;
        (!run.done).then_some(&run.reader)
    }

    /// Goes on to the next record.
    #[inline]
    pub fn advance(&mut self) -> Result<()> {
        let winner = self.losers[0];
        if let Some(run) = self.runs.get_mut(winner as usize) {
            run.done = !run.reader.advance()?;
            self.passed += 1;
            self.replay(winner);
        }
        Ok(())
    }

    /// Calls `each` with every key and its values. Values not taken are skipped.
    pub fn groups(&mut self, each: impl FnMut(&[u8], &mut Values<'_>) -> Result<()>) -> Result<()> {
        self.groups_by(&Grouping::WholeKey, each, |_, _| ())
    }

    /// Calls `each` with every first key of a group and the values of that group, then `ended` with that key and how many records the group had. Values
    /// not taken are skipped.
    pub fn groups_by(
        &mut self,
        grouping: &Grouping,
        mut each: impl FnMut(&[u8], &mut Values<'_>) -> Result<()>,
        mut ended: impl FnMut(&[u8], u64),
    ) -> Result<()> {
        let mut key = Vec::new();
        while let Some(record) = self.peek() {
            key.clear();
            key.extend_from_slice(record.key());
            let prefix = record.prefix();
            let group = grouping.of(&key);
            let before = self.passed;
            let source = match grouping {
                Grouping::WholeKey => ValueSource::Merge { merger: self, key: group, prefix, taken: false },
                Grouping::Prefix(_) => ValueSource::Group { merger: self, group, grouping, taken: false },
            };
            let mut values = Values { source };
            each(&key, &mut values)?;
            while values.next()?.is_some() {}
            ended(&key, self.passed - before);
        }
        Ok(())
    }

    /// Calls `each` with every key and the sum of its counts.
    pub fn sums(&mut self, mut each: impl FnMut(&[u8], u64) -> Result<()>) -> Result<()> {
        self.groups(|key, values| {
            let sum = values.sum()?;
            each(key, sum)
        })
    }

    /// Calls `each` with every record, values of equal keys joined by `combiner`.
    pub fn combined(
        &mut self,
        combiner: &mut dyn Combiner,
        mut each: impl FnMut(&[u8], &[u8]) -> Result<()>,
    ) -> Result<()> {
        self.groups(|key, values| combiner.combine(key, values, &mut |value| each(key, value)))
    }

    /// Calls `each` with every record as it is.
    pub fn records(&mut self, mut each: impl FnMut(&[u8], &[u8]) -> Result<()>) -> Result<()> {
        while let Some(record) = self.peek() {
            each(record.key(), record.value())?;
            self.advance()?;
        }
        Ok(())
    }
}

/// The values of one key, one after the other.
pub struct Values<'a> {
    source: ValueSource<'a>,
}

enum ValueSource<'a> {
    /// What follows on top of a merge. `taken`: the record on top was handed out.
    Merge { merger: &'a mut Merger, key: &'a [u8], prefix: u64, taken: bool },
    /// The same where keys differ within the group.
    Group { merger: &'a mut Merger, group: &'a [u8], grouping: &'a Grouping, taken: bool },
    /// Records of a sort buffer. `last`: the record that was handed out.
    Memory { records: &'a [Entry], last: Option<Entry>, arena: &'a [u8] },
}

impl<'a> Values<'a> {
    pub(crate) fn in_memory(records: &'a [Entry], arena: &'a [u8]) -> Self {
        Self { source: ValueSource::Memory { records, last: None, arena } }
    }

    /// The next value; valid until the next call.
    #[allow(clippy::should_implement_trait)] // a lending iterator: the value lives in the run's chunk
    pub fn next(&mut self) -> Result<Option<&[u8]>> {
        match &mut self.source {
            ValueSource::Merge { merger, key, prefix, taken } => {
                if std::mem::take(taken) {
                    merger.advance()?;
                }
                match merger.peek() {
                    Some(record) if record.prefix() == *prefix && record.key() == *key => {
                        *taken = true;
                        Ok(Some(record.value()))
                    }
                    _ => Ok(None),
                }
            }
            ValueSource::Group { merger, group, grouping, taken } => {
                if std::mem::take(taken) {
                    merger.advance()?;
                }
                match merger.peek() {
                    Some(record) if grouping.of(record.key()) == *group => {
                        *taken = true;
                        Ok(Some(record.value()))
                    }
                    _ => Ok(None),
                }
            }
            ValueSource::Memory { records, last, arena } => {
                let Some((first, rest)) = records.split_first() else { return Ok(None) };
                (*records, *last) = (rest, Some(*first));
                Ok(Some(first.value(arena)))
            }
        }
    }

    /// The whole key of the value that [`Self::next`] gave last; before the first and after the last one it is empty. It differs from value to value
    /// where [`super::Program::grouping`] groups by a prefix.
    pub fn key(&self) -> &[u8] {
        match &self.source {
            ValueSource::Merge { merger, taken: true, .. } | ValueSource::Group { merger, taken: true, .. } => {
                merger.peek().map_or(&[], RunReader::key)
            }
            ValueSource::Memory { last: Some(entry), arena, .. } => entry.key(arena),
            _ => &[],
        }
    }

    /// The sum of the rest, each value being a count.
    pub fn sum(&mut self) -> Result<u64> {
        let mut sum = 0u64;
        while let Some(value) = self.next()? {
            sum = sum.saturating_add(decode_count(value)?);
        }
        Ok(sum)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mapreduce::run::{RunBytes, RunWriter};
    use cairn_common::durable::{Fs, OpenMode, SystemFs};
    use proptest::prelude::*;
    use std::sync::Arc;

    type Records = Vec<(Vec<u8>, Vec<u8>)>;

    fn runs_of(dir: &std::path::Path, runs: &[Records]) -> Vec<RunReader> {
        let open = |(number, records): (usize, &Records)| {
            let path = dir.join(format!("run{number}"));
            let mut writer = RunWriter::create(&SystemFs, &path).unwrap();
            for (key, value) in records {
                writer.push(key, value).unwrap();
            }
            writer.end_partition().unwrap();
            let entry = writer.finish().unwrap()[0];
            let file = SystemFs.open(&path, OpenMode::Read).unwrap();
            RunReader::new(RunBytes::partition(Arc::clone(&file), &path, &entry))
        };
        runs.iter().enumerate().map(open).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn merge_is_a_stable_sort(
            mut runs in prop::collection::vec(
                prop::collection::vec((prop::collection::vec(0u8..3, 0..12), prop::collection::vec(any::<u8>(), 0..4)), 0..60),
                0..9,
            ),
        ) {
            for run in &mut runs {
                run.sort_by(|a, b| a.0.cmp(&b.0));
            }
            let dir = tempfile::tempdir().unwrap();
            let mut merger = Merger::new(runs_of(dir.path(), &runs)).unwrap();
            let mut got = Vec::new();
            merger.records(|key, value| { got.push((key.to_vec(), value.to_vec())); Ok(()) }).unwrap();
            let mut want: Vec<_> = runs.concat();
            want.sort_by(|a, b| a.0.cmp(&b.0));
            prop_assert_eq!(&got, &want);

            let dir = tempfile::tempdir().unwrap();
            let mut merger = Merger::new(runs_of(dir.path(), &runs)).unwrap();
            let mut keys = Vec::new();
            // Takes only the first value of each group: the rest must be skipped.
            merger.groups(|key, values| { keys.push(key.to_vec()); values.next().map(|_| ()) }).unwrap();
            want.dedup_by(|a, b| a.0 == b.0);
            prop_assert_eq!(keys, want.into_iter().map(|record| record.0).collect::<Vec<_>>());
        }
    }
}

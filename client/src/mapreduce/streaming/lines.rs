//! The mapper of a streaming job: its command gets the lines of the split.

use std::collections::VecDeque;

use super::child::{self, Child};
use super::combine::Combining;
use super::suspect::{self, RECENT_BYTES};
use super::{NO_SEPARATOR, Sink, Stage};
use crate::mapreduce::{Batch, Collector, MapPortions, Mapper, Record, Result, TaskContext};

/// See the module.
pub(super) struct Lines {
    pub(super) stage: Stage,
    /// `None` where bad records may be left out: then each portion has a child of its own.
    pub(super) child: Option<Child>,
    pub(super) sink: Sink,
    pub(super) combining: Option<Combining>,
    pub(super) task: TaskContext,
    /// What it was given last: if it fails, the line that it failed on is most likely there.
    pub(super) recent: VecDeque<Batch>,
}

/// What happens to a line of the mapper.
fn take(line: &[u8], sink: &mut Sink, combining: &mut Option<Combining>, out: &mut Collector) -> Result<()> {
    let Some(combining) = combining else { return sink.collect(line, out) };
    let mut key = std::mem::take(&mut sink.key);
    let (cut_key, value) = sink.cut.split(line);
    let result = if sink.order.is_plain() {
        combining.add(cut_key, value, sink, out)
    } else {
        sink.order.encode(cut_key, &mut key);
        combining.add(&key, value, sink, out)
    };
    sink.key = key;
    result
}

impl Lines {
    /// Appends to the child's input and gives it some of that.
    fn feed(&mut self, bytes: &[u8], out: &mut Collector) -> Result<()> {
        let Self { child: Some(child), sink, combining, .. } = self else { return Ok(()) };
        child.input().extend_from_slice(bytes);
        child.feed(&mut |line| take(line, sink, combining, out))
    }

    fn give(&mut self, batch: &Batch, out: &mut Collector) -> Result<u64> {
        let mut lines = 0;
        // A batch may be as long as the longest line; it goes in pieces, so that output is taken meanwhile.
        for piece in batch.bytes.chunks(child::FEED_BYTES) {
            lines += memchr::memchr_iter(b'\n', piece).count() as u64;
            self.feed(piece, out)?;
        }
        if batch.bytes.last().is_some_and(|last| *last != b'\n') {
            self.feed(b"\n", out)?;
            lines += 1;
        }
        Ok(lines)
    }

    fn remember(&mut self, batch: &Batch) {
        self.recent.push_back(batch.clone());
        let mut bytes: usize = self.recent.iter().map(|one| one.bytes.len()).sum();
        while let Some(oldest) = self.recent.front().filter(|oldest| bytes - oldest.bytes.len() >= RECENT_BYTES) {
            bytes -= oldest.bytes.len();
            self.recent.pop_front();
        }
    }

    /// What failed, with the line that is to blame, if the command fails on one.
    fn named<R>(&mut self, result: Result<R>) -> Result<R> {
        let crashed = self.child.as_ref().is_some_and(Child::crashed);
        match result {
            Err(error) if crashed => Err(suspect::name(error, &self.stage, &self.task, self.recent.make_contiguous())),
            other => other,
        }
    }
}

impl Mapper for Lines {
    fn map(&mut self, record: Record<'_>, out: &mut Collector) -> Result<()> {
        self.feed(record.bytes, out)?;
        self.feed(b"\n", out)
    }

    fn map_batch(&mut self, batch: &Batch, out: &mut Collector) -> Result<u64> {
        self.remember(batch);
        let given = self.give(batch, out);
        self.named(given)
    }

    fn finish(&mut self, out: &mut Collector) -> Result<()> {
        let Self { child, sink, combining, .. } = self;
        if let Some(child) = child {
            let finished = child.finish(&mut |line| take(line, sink, combining, out));
            self.named(finished)?;
        }
        let Self { sink, combining, task, .. } = self;
        if let Some(combining) = combining {
            combining.run(sink, out)?;
        }
        if sink.no_separator > 0 {
            task.count(NO_SEPARATOR, sink.no_separator);
        }
        Ok(())
    }

    fn portions(&mut self) -> Option<&mut dyn MapPortions> {
        match &self.child {
            None => Some(self),
            Some(_) => None,
        }
    }
}

impl MapPortions for Lines {
    fn map_portion(&mut self, records: &mut dyn Iterator<Item = Record<'_>>, out: &mut Collector) -> Result<()> {
        let apart = TaskContext { user_counters: self.task.user_counters.apart(), ..self.task.clone() };
        let Self { stage, sink, combining, task, .. } = self;
        let no_separator = sink.no_separator;
        let mapped = map_alone(stage, &apart, records, sink, combining, out);
        match &mapped {
            Ok(()) => task.user_counters.join(&apart.user_counters),
            Err(_) => {
                sink.no_separator = no_separator;
                if let Some(combining) = combining {
                    combining.clear();
                }
            }
        }
        mapped
    }
}

fn map_alone(
    stage: &Stage,
    task: &TaskContext,
    records: &mut dyn Iterator<Item = Record<'_>>,
    sink: &mut Sink,
    combining: &mut Option<Combining>,
    out: &mut Collector,
) -> Result<()> {
    let mut child = stage.start(task)?;
    for record in records {
        child.input().extend_from_slice(record.bytes);
        child.input().push(b'\n');
        child.feed(&mut |line| take(line, sink, combining, out))?;
    }
    child.finish(&mut |line| take(line, sink, combining, out))?;
    match combining {
        Some(combining) => combining.run(sink, out),
        None => Ok(()),
    }
}

//! A combiner that is a command: gathers what the mapper printed, sorts it, and puts it through a child before it goes to the collector.

use super::child::Child;
use super::{Sink, Stage};
use crate::mapreduce::{Collector, Result, TaskContext, key_prefix};

/// Records on their way through the combiner.
pub struct Combining {
    stage: Stage,
    task: TaskContext,
    arena: Vec<u8>,
    entries: Vec<Entry>,
    budget: usize,
}

#[derive(Clone, Copy)]
struct Entry {
    prefix: u64,
    start: u32,
    key_len: u32,
    value_len: u32,
}

impl Entry {
    fn key<'a>(&self, arena: &'a [u8]) -> &'a [u8] {
        &arena[self.start as usize..][..self.key_len as usize]
    }

    fn value<'a>(&self, arena: &'a [u8]) -> &'a [u8] {
        &arena[(self.start + self.key_len) as usize..][..self.value_len as usize]
    }
}

impl Combining {
    /// Gathers up to `budget` bytes before it runs `stage`.
    pub fn new(stage: Stage, task: &TaskContext, budget: u64) -> Self {
        // Offsets are 32 bits, and one more record may come.
        let budget = budget.min(1 << 30) as usize;
        Self { stage, task: task.clone(), arena: Vec::new(), entries: Vec::new(), budget }
    }

    /// Takes a record, under the key that travels.
    pub fn add(&mut self, key: &[u8], value: &[u8], sink: &mut Sink, out: &mut Collector) -> Result<()> {
        self.entries.push(Entry {
            prefix: key_prefix(key),
            start: self.arena.len() as u32,
            key_len: key.len() as u32,
            value_len: value.len() as u32,
        });
        self.arena.extend_from_slice(key);
        self.arena.extend_from_slice(value);
        let used = self.arena.len() + self.entries.len() * size_of::<Entry>();
        if used < self.budget { Ok(()) } else { self.run(sink, out) }
    }

    /// Forgets what has gathered.
    pub fn clear(&mut self) {
        self.arena.clear();
        self.entries.clear();
    }

    /// Runs the combiner over what has gathered.
    pub fn run(&mut self, sink: &mut Sink, out: &mut Collector) -> Result<()> {
        if self.entries.is_empty() {
            return Ok(());
        }
        let arena = std::mem::take(&mut self.arena);
        let mut entries = std::mem::take(&mut self.entries);
        entries.sort_unstable_by(|a, b| {
            a.prefix.cmp(&b.prefix).then_with(|| a.key(&arena).cmp(b.key(&arena))).then(a.start.cmp(&b.start))
        });
        let mut child: Child = self.stage.start(&self.task)?;
        let mut each = |line: &[u8]| sink.collect(line, out);
        for entry in &entries {
            self.stage.push(&mut child, entry.key(&arena), entry.value(&arena))?;
            child.feed(&mut each)?;
        }
        child.finish(&mut each)?;
        // The memory is used again.
        (self.arena, self.entries) = (arena, entries);
        self.clear();
        Ok(())
    }
}

//! Word count: ASCII letters lowered, words split on ASCII white space, other bytes as they are; `word<TAB>count`.

use cairn_proto::Result;

use super::text::is_space;
use super::{Batch, Collector, Combine, InputFormat, Mapper, Output, Program, Record, Reducer, TaskContext, Values};

/// Counts words.
pub struct WordCount {
    /// Add up in the map tasks.
    pub combine: bool,
}

impl Program for WordCount {
    fn input(&self) -> InputFormat {
        InputFormat::Words
    }

    fn mapper(&self, _task: &TaskContext) -> Result<Box<dyn Mapper>> {
        Ok(Box::new(Words { text: Vec::new() }))
    }

    fn combine(&self) -> Combine {
        if self.combine { Combine::Sum } else { Combine::Never }
    }

    fn reducer(&self, _task: &TaskContext) -> Result<Box<dyn Reducer>> {
        Ok(Box::new(Sum))
    }
}

struct Words {
    /// The batch with its letters lowered.
    text: Vec<u8>,
}

impl Mapper for Words {
    fn map(&mut self, record: Record<'_>, out: &mut Collector) -> Result<()> {
        out.emit_count(&record.bytes.to_ascii_lowercase(), 1)
    }

    fn map_batch(&mut self, batch: &Batch, out: &mut Collector) -> Result<u64> {
        self.text.clear();
        self.text.extend_from_slice(&batch.bytes);
        self.text.make_ascii_lowercase();
        let text = &self.text[..];
        let mut at = 0;
        while at < text.len() {
            if is_space(text[at]) {
                at += 1;
                continue;
            }
            let rest = &text[at..];
            let end = at + rest.iter().position(|byte| is_space(*byte)).unwrap_or(rest.len());
            out.emit_word(text, at, end)?;
            at = end + 1;
        }
        // Records of the report are lines; only the last one of a file may lack its line feed.
        let lines = text.iter().filter(|byte| **byte == b'\n').count() as u64;
        Ok(lines + u64::from(!text.last().copied().is_none_or(is_space)))
    }
}

struct Sum;

impl Reducer for Sum {
    fn reduce(&mut self, key: &[u8], values: &mut Values<'_>, out: &mut Output) -> Result<()> {
        out.emit_count(key, values.sum()?)
    }
}

//! Lines that match a pattern, in the order of the input; or, counted, each different line with how often it occurs.

use cairn_proto::{Error, ErrorCode, Result};
use regex::bytes::{Regex, RegexBuilder};

use super::{Batch, Collector, Combine, Mapper, Output, Program, Record, Reducer, TaskContext, Values};

/// Finds lines.
pub struct Grep {
    regex: Regex,
    /// Emit each different line with its number of occurrences.
    pub count: bool,
    /// Add up in the map tasks (counted only).
    pub combine: bool,
    /// There are reducers: lines go to them under their position.
    pub reducers: bool,
}

/// Compiled patterns may take this much memory.
const PATTERN_BYTES: usize = 32 << 20;

impl Grep {
    /// Lines in which `pattern` (the syntax of the `regex` crate; bytes that are not UTF-8 are matched too) is found.
    pub fn new(pattern: &str, ignore_case: bool) -> Result<Self> {
        let regex = RegexBuilder::new(pattern).case_insensitive(ignore_case).size_limit(PATTERN_BYTES).build();
        let regex = regex.map_err(|error| {
            // The crate draws the place over several lines; the last one says what is wrong.
            let text = error.to_string();
            let why = text.lines().last().unwrap_or_default().trim_start_matches("error: ").to_owned();
            Error::new(ErrorCode::InvalidArgument, format!("pattern {pattern:?}: {why}")).with_subject(pattern)
        })?;
        Ok(Self { regex, count: false, combine: true, reducers: true })
    }
}

impl Program for Grep {
    fn mapper(&self, _task: &TaskContext) -> Result<Box<dyn Mapper>> {
        Ok(Box::new(Lines { regex: self.regex.clone(), count: self.count, reducers: self.reducers }))
    }

    fn combine(&self) -> Combine {
        if self.count && self.combine { Combine::Sum } else { Combine::Never }
    }

    fn reducer(&self, _task: &TaskContext) -> Result<Box<dyn Reducer>> {
        Ok(Box::new(Write { count: self.count }))
    }
}

struct Lines {
    regex: Regex,
    count: bool,
    reducers: bool,
}

impl Lines {
    fn found(&self, record: Record<'_>, out: &mut Collector) -> Result<()> {
        if self.count {
            return out.emit_count(record.bytes, 1);
        }
        if !self.reducers {
            return out.emit_line(record.bytes);
        }
        // The key orders lines as they are in the input.
        let mut key = [0; 12];
        key[..4].copy_from_slice(&record.file_index.to_be_bytes());
        key[4..].copy_from_slice(&record.offset.to_be_bytes());
        out.emit(&key, record.bytes)
    }
}

impl Mapper for Lines {
    fn map(&mut self, record: Record<'_>, out: &mut Collector) -> Result<()> {
        if self.regex.is_match(record.bytes) { self.found(record, out) } else { Ok(()) }
    }

    fn map_batch(&mut self, batch: &Batch, out: &mut Collector) -> Result<u64> {
        let mut count = 0;
        for record in batch.records() {
            count += 1;
            if self.regex.is_match(record.bytes) {
                self.found(record, out)?;
            }
        }
        Ok(count)
    }
}

struct Write {
    count: bool,
}

impl Reducer for Write {
    fn reduce(&mut self, key: &[u8], values: &mut Values<'_>, out: &mut Output) -> Result<()> {
        if self.count {
            return out.emit_count(key, values.sum()?);
        }
        while let Some(line) = values.next()? {
            out.line(line)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_pattern_is_one_line() {
        let error = Grep::new("a(b", false).err().unwrap();
        assert_eq!(error.message(), "pattern \"a(b\": unclosed group");
    }
}

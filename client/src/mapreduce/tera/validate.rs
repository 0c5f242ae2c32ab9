//! Are the records of a list of files in order, and which are they? A map looks at its split alone and tells first key, last key and sum; one
//! reducer puts the splits together in the order of the input.

use cairn_proto::{Error, ErrorCode, Result};

use super::{Checksum, KEY_BYTES, RECORD_BYTES};
use crate::mapreduce::{
    Collector, InputFormat, Mapper, Output, Program, Record, Reducer, TaskContext, UserCounter, Values,
};

/// Wrong pairs that one map tells of; all are counted.
const TOLD_PER_MAP: u64 = 10;

/// Names of the counters.
pub mod counter {
    /// Records seen.
    pub const RECORDS: &str = "tera.records";
    /// Records whose key is that of the record before.
    pub const DUPLICATE_KEYS: &str = "tera.duplicate_keys";
    /// Records whose key is less than that of the record before.
    pub const MISORDERED: &str = "tera.misordered";
}

/// Checks order and tells the sum. Output: `checksum<TAB>HEX`, and before it a line `error<TAB>...` for each place out of order.
pub struct TeraValidate;

impl Program for TeraValidate {
    fn input(&self) -> InputFormat {
        InputFormat::Fixed(RECORD_BYTES as u32)
    }

    fn mapper(&self, task: &TaskContext) -> Result<Box<dyn Mapper>> {
        Ok(Box::new(Check {
            path: task.input.as_ref().map(|input| input.path.clone()).unwrap_or_default(),
            span: None,
            count: Count::of(task),
            records: 0,
            told: 0,
        }))
    }

    fn reducer(&self, task: &TaskContext) -> Result<Box<dyn Reducer>> {
        Ok(Box::new(Join { count: Count::of(task), before: None, sum: Checksum::default() }))
    }
}

struct Count {
    records: UserCounter,
    duplicates: UserCounter,
    misordered: UserCounter,
}

impl Count {
    fn of(task: &TaskContext) -> Self {
        Self {
            records: task.counter(counter::RECORDS),
            duplicates: task.counter(counter::DUPLICATE_KEYS),
            misordered: task.counter(counter::MISORDERED),
        }
    }
}

type Key = [u8; KEY_BYTES];

/// Records that follow on each other in a file.
struct Span {
    file_index: u32,
    offset: u64,
    first: Key,
    last: Key,
    sum: Checksum,
}

impl Span {
    /// Orders as the input does.
    fn key(&self) -> [u8; 12] {
        position(self.file_index, self.offset)
    }
}

fn position(file_index: u32, offset: u64) -> [u8; 12] {
    let mut key = [0; 12];
    key[..4].copy_from_slice(&file_index.to_be_bytes());
    key[4..].copy_from_slice(&offset.to_be_bytes());
    key
}

const SPAN: u8 = 0;
const MISORDERED: u8 = 1;

struct Check {
    path: String,
    span: Option<Span>,
    count: Count,
    records: u64,
    told: u64,
}

impl Mapper for Check {
    fn map(&mut self, record: Record<'_>, out: &mut Collector) -> Result<()> {
        self.records += 1;
        let Some(key) = record.bytes.first_chunk::<KEY_BYTES>() else { return Err(damaged()) };
        let span = self.span.get_or_insert_with(|| Span {
            file_index: record.file_index,
            offset: record.offset,
            first: *key,
            last: *key,
            sum: Checksum::default(),
        });
        span.sum.add(record.bytes);
        if record.offset > span.offset {
            if *key < span.last {
                self.count.misordered.add(1);
                if self.told < TOLD_PER_MAP {
                    self.told += 1;
                    let text = format!(
                        "misordered in {} at byte {}: key {} follows {}",
                        self.path,
                        record.offset,
                        hex(key),
                        hex(&span.last)
                    );
                    let mut value = vec![MISORDERED];
                    value.extend_from_slice(text.as_bytes());
                    out.emit(&position(record.file_index, record.offset), &value)?;
                }
            } else if *key == span.last {
                self.count.duplicates.add(1);
            }
        }
        span.last = *key;
        Ok(())
    }

    fn finish(&mut self, out: &mut Collector) -> Result<()> {
        self.count.records.add(self.records);
        let Some(span) = self.span.take() else { return Ok(()) };
        let mut value = vec![SPAN];
        value.extend_from_slice(&span.first);
        value.extend_from_slice(&span.last);
        value.extend_from_slice(&span.sum.to_bytes());
        value.extend_from_slice(self.path.as_bytes());
        out.emit(&span.key(), &value)
    }
}

struct Join {
    count: Count,
    /// The last key so far, and its file.
    before: Option<(Key, String)>,
    sum: Checksum,
}

impl Join {
    fn span(&mut self, value: &[u8], out: &mut Output) -> Result<()> {
        let parts = value.split_first_chunk::<KEY_BYTES>().and_then(|(first, rest)| {
            let (last, rest) = rest.split_first_chunk::<KEY_BYTES>()?;
            let (sum, path) = rest.split_first_chunk::<16>()?;
            Some((first, last, sum, String::from_utf8_lossy(path).into_owned()))
        });
        let Some((first, last, sum, path)) = parts else { return Err(damaged()) };
        self.sum.merge(Checksum::from_bytes(*sum));
        if let Some((before, before_path)) = &self.before {
            if first < before {
                self.count.misordered.add(1);
                let text = format!(
                    "misordered between {before_path}, which ends with key {}, and {path}, which starts with {}",
                    hex(before),
                    hex(first)
                );
                out.emit(b"error", text.as_bytes())?;
            } else if first == before {
                self.count.duplicates.add(1);
            }
        }
        self.before = Some((*last, path));
        Ok(())
    }
}

impl Reducer for Join {
    fn reduce(&mut self, _key: &[u8], values: &mut Values<'_>, out: &mut Output) -> Result<()> {
        while let Some(value) = values.next()? {
            match value.split_first() {
                Some((&SPAN, rest)) => self.span(rest, out)?,
                Some((&MISORDERED, text)) => out.emit(b"error", text)?,
                _ => return Err(damaged()),
            }
        }
        Ok(())
    }

    fn finish(&mut self, out: &mut Output) -> Result<()> {
        out.emit(b"checksum", self.sum.to_string().as_bytes())
    }
}

fn damaged() -> Error {
    Error::new(ErrorCode::Corrupt, "a record of the check has a wrong length")
}

fn hex(key: &Key) -> String {
    key.iter().map(|byte| format!("{byte:02x}")).collect()
}

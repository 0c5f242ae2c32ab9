//! Both sides through the shuffle. A row travels under its key (encoded, so that no key is the start of another) and its side; the reducers
//! group by the key alone, so the rows of the side that is kept come before those that pass by.

use std::collections::BTreeMap;
use std::sync::Arc;

use cairn_proto::{Error, ErrorCode, Result};

use super::matched::Matcher;
use super::{JoinType, Layout, NO_KEY, Side, property};
use crate::mapreduce::{
    Collector, Grouping, InputFormat, KeyPrefix, Mapper, Output, Partitioner, Program, Record, Reducer, TaskContext,
    UserCounter, Values, order,
};

/// The join by reducers.
pub struct ReduceJoin {
    layout: Layout,
    left_files: u32,
}

impl ReduceJoin {
    pub(super) fn new(layout: Layout, properties: &BTreeMap<String, String>) -> Result<Self> {
        let text = properties.get(property::LEFT_FILES).map_or("", String::as_str);
        let left_files = text.parse().map_err(|_| {
            let text = format!("property {}: {text:?} is no number of files", property::LEFT_FILES);
            Error::new(ErrorCode::InvalidArgument, text)
        })?;
        Ok(Self { layout, left_files })
    }
}

/// All of a key but the side.
fn by_key() -> KeyPrefix {
    KeyPrefix::By(Arc::new(|key| key.len().saturating_sub(1)))
}

/// The last byte of a key that travels. What is tested for must come before what is tested, what is kept before what passes by.
fn side_byte(kind: JoinType, side: Side) -> u8 {
    u8::from((side == Side::Right) != kind.is_test())
}

impl Program for ReduceJoin {
    fn input(&self) -> InputFormat {
        InputFormat::Lines
    }

    fn mapper(&self, task: &TaskContext) -> Result<Box<dyn Mapper>> {
        Ok(Box::new(Rows {
            layout: self.layout.clone(),
            left_files: self.left_files,
            key: Vec::new(),
            no_key: task.counter(NO_KEY),
        }))
    }

    fn partitioner(&self) -> Result<Partitioner> {
        Ok(Partitioner::HashPrefix(by_key()))
    }

    fn grouping(&self) -> Grouping {
        Grouping::Prefix(by_key())
    }

    fn reducer(&self, task: &TaskContext) -> Result<Box<dyn Reducer>> {
        let matcher = Matcher::new(self.layout.clone(), task, task.program_memory)?;
        Ok(Box::new(Join { matcher, kind: self.layout.kind }))
    }
}

struct Rows {
    layout: Layout,
    left_files: u32,
    key: Vec<u8>,
    no_key: UserCounter,
}

/// Stands before the key of a row that has none: such a row has a group of its own.
const NO_KEY_GROUP: u8 = 0;
const KEY_GROUP: u8 = 1;

impl Mapper for Rows {
    fn map(&mut self, record: Record<'_>, out: &mut Collector) -> Result<()> {
        let side = if record.file_index < self.left_files { Side::Left } else { Side::Right };
        let row = record.bytes;
        let kind = self.layout.kind;
        self.key.clear();
        match self.layout.key(side, row) {
            Some(key) => {
                self.key.push(KEY_GROUP);
                order::push_text(key, &mut self.key);
            }
            None => {
                self.no_key.add(1);
                let kept = if side == Side::Left { kind.keeps_left() } else { kind.keeps_right() };
                if !kept {
                    return Ok(());
                }
                // Its place in the input makes the group, and spreads such rows over the reducers.
                self.key.push(NO_KEY_GROUP);
                self.key.extend_from_slice(&record.file_index.to_be_bytes());
                self.key.extend_from_slice(&record.offset.to_be_bytes());
            }
        }
        self.key.push(side_byte(kind, side));
        out.emit(&self.key, row)
    }
}

struct Join {
    matcher: Matcher,
    kind: JoinType,
}

impl Reducer for Join {
    fn reduce(&mut self, _key: &[u8], values: &mut Values<'_>, out: &mut Output) -> Result<()> {
        let left = side_byte(self.kind, Side::Left);
        let mut emit = |row: &[u8]| out.line(row);
        let mut row = Vec::new();
        while let Some(value) = values.next()? {
            row.clear();
            row.extend_from_slice(value);
            if values.key().last() == Some(&left) {
                self.matcher.left(&row, &mut emit)?;
            } else {
                self.matcher.right(&row, &mut emit)?;
            }
        }
        self.matcher.end_of_key(&mut emit)
    }
}

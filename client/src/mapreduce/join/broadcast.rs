//! One side in the memory of every map, the other one read once, where it lies.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use cairn_proto::{Error, ErrorCode, Result};

use super::{JoinType, Layout, NO_KEY, Side, lines, property};
use crate::mapreduce::table::hash_key;
use crate::mapreduce::{
    Collector, InputFormat, Mapper, Output, Program, Record, Reducer, TaskContext, UserCounter, Values,
};

/// Memory that a row takes beside its bytes.
pub const ROW_BYTES: u64 = 64;

/// Memory for a side of so many bytes in so many rows.
pub fn memory_for(bytes: u64, rows: u64) -> u64 {
    // A text that grows piece by piece may have half of its room unused.
    bytes + bytes / 2 + rows * ROW_BYTES
}

/// The join by maps that hold one side.
pub struct BroadcastJoin {
    layout: Layout,
    small: Side,
    paths: Vec<String>,
    /// Tasks of one process share it.
    table: Mutex<Option<Arc<Table>>>,
}

impl BroadcastJoin {
    pub(super) fn new(layout: Layout, properties: &BTreeMap<String, String>) -> Result<Self> {
        let small = match properties.get(property::SMALL_SIDE).map_or("right", String::as_str) {
            "left" => Side::Left,
            _ => Side::Right,
        };
        // A row of the small side that meets nothing in one map may meet something in another.
        let kept = match small {
            Side::Left => layout.kind.keeps_left() || layout.kind.is_test(),
            Side::Right => layout.kind.keeps_right(),
        };
        if kept {
            let side = if small == Side::Left { "left" } else { "right" };
            let text = format!(
                "no map can know which rows of the {side} side match nothing anywhere: use --kind reduce for this type of join"
            );
            return Err(Error::new(ErrorCode::InvalidArgument, text));
        }
        Ok(Self { layout, small, paths: lines(properties, property::SMALL_PATHS), table: Mutex::new(None) })
    }

    fn table(&self, task: &TaskContext) -> Result<Arc<Table>> {
        let mut slot = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(table) = &*slot {
            return Ok(Arc::clone(table));
        }
        let mut table = Table::default();
        for path in &self.paths {
            table.load(path, &self.layout, self.small, task)?;
        }
        Ok(Arc::clone(slot.insert(Arc::new(table))))
    }
}

/// Rows by key.
#[derive(Default)]
struct Table {
    bytes: Vec<u8>,
    rows: Vec<Row>,
    /// First row of a chain by the hash of its key.
    first: HashMap<u64, u32>,
}

struct Row {
    start: usize,
    end: usize,
    /// The next row with this hash; `u32::MAX`: none.
    next: u32,
}

impl Table {
    fn load(&mut self, path: &str, layout: &Layout, side: Side, task: &TaskContext) -> Result<()> {
        let no_key = task.counter(NO_KEY);
        let mut reader = super::merged::RowReader::open(task, path)?;
        let mut row = Vec::new();
        while reader.next(&mut row)? {
            let Some(key) = layout.key(side, &row) else {
                no_key.add(1);
                continue;
            };
            let index = self.rows.len() as u32;
            let next = self.first.insert(hash_key(key), index).unwrap_or(u32::MAX);
            let start = self.bytes.len();
            self.bytes.extend_from_slice(&row);
            self.rows.push(Row { start, end: self.bytes.len(), next });
            let used = memory_for(self.bytes.len() as u64, self.rows.len() as u64);
            if used > task.program_memory || index == u32::MAX - 1 {
                let text = format!(
                    "{path} and what was read before it need more than the {} bytes that a task has for the small side: raise the memory of tasks, or use --kind reduce",
                    task.program_memory
                );
                return Err(Error::new(ErrorCode::InvalidArgument, text).with_subject(path));
            }
        }
        Ok(())
    }

    /// Rows that may have this key; the caller compares.
    fn rows(&self, key: &[u8]) -> impl Iterator<Item = &[u8]> {
        let mut at = self.first.get(&hash_key(key)).copied();
        std::iter::from_fn(move || {
            let row = self.rows.get(at? as usize)?;
            at = Some(row.next);
            Some(&self.bytes[row.start..row.end])
        })
    }
}

impl Program for BroadcastJoin {
    fn input(&self) -> InputFormat {
        InputFormat::Lines
    }

    fn mapper(&self, task: &TaskContext) -> Result<Box<dyn Mapper>> {
        Ok(Box::new(Probe {
            layout: self.layout.clone(),
            small: self.small,
            table: self.table(task)?,
            no_key: task.counter(NO_KEY),
            out: Vec::new(),
        }))
    }

    fn reducer(&self, _task: &TaskContext) -> Result<Box<dyn Reducer>> {
        Ok(Box::new(NoReducer))
    }
}

/// Joins of maps alone have none.
pub(super) struct NoReducer;

impl Reducer for NoReducer {
    fn reduce(&mut self, _key: &[u8], _values: &mut Values<'_>, _out: &mut Output) -> Result<()> {
        Err(Error::new(ErrorCode::InvalidArgument, "a join of maps alone has no reducers"))
    }
}

struct Probe {
    layout: Layout,
    small: Side,
    table: Arc<Table>,
    no_key: UserCounter,
    out: Vec<u8>,
}

impl Mapper for Probe {
    fn map(&mut self, record: Record<'_>, out: &mut Collector) -> Result<()> {
        let (row, kind) = (record.bytes, self.layout.kind);
        let large = if self.small == Side::Left { Side::Right } else { Side::Left };
        let key = self.layout.key(large, row);
        if key.is_none() {
            self.no_key.add(1);
        }
        let mut found = false;
        for other in key.into_iter().flat_map(|key| self.table.rows(key)) {
            if self.layout.key(self.small, other) != key {
                continue;
            }
            found = true;
            if kind.is_test() {
                break;
            }
            let (left, right) = if large == Side::Left { (row, other) } else { (other, row) };
            self.layout.joined(Some(left), Some(right), &mut self.out);
            out.emit_line(&self.out)?;
        }
        match (kind, found) {
            (JoinType::Semi, true) | (JoinType::Anti, false) => out.emit_line(row),
            (JoinType::Left, false) => self.alone(Some(row), None, out),
            (JoinType::Right, false) => self.alone(None, Some(row), out),
            _ => Ok(()),
        }
    }
}

impl Probe {
    fn alone(&mut self, left: Option<&[u8]>, right: Option<&[u8]>, out: &mut Collector) -> Result<()> {
        self.layout.joined(left, right, &mut self.out);
        out.emit_line(&self.out)
    }
}

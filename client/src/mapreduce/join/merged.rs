//! Both sides sorted by their keys and partitioned alike: map i merges part i of both. The driver has checked that the parts belong together;
//! the order within them is checked here, row by row.

use std::collections::BTreeMap;

use bytes::Bytes;
use cairn_proto::mapoutput::MAX_RECORD_BYTES;
use cairn_proto::{Error, ErrorCode, Result};

use super::broadcast::NoReducer;
use super::matched::Matcher;
use super::{Layout, NO_KEY, Side, lines, property};
use crate::mapreduce::compression::Decompress;
use crate::mapreduce::input::Feed;
use crate::mapreduce::table::hash_key;
use crate::mapreduce::{
    BlockingReader, Collector, Compression, InputFormat, Mapper, Program, Record, Reducer, TaskContext, UserCounters,
    partition_of,
};

/// The join by maps that merge.
pub struct MapJoin {
    layout: Layout,
    left: Vec<String>,
    right: Vec<String>,
    hashed: bool,
}

impl MapJoin {
    pub(super) fn new(layout: Layout, properties: &BTreeMap<String, String>) -> Result<Self> {
        let (left, right) = (lines(properties, property::LEFT_PARTS), lines(properties, property::RIGHT_PARTS));
        if left.len() != right.len() || left.is_empty() {
            let text =
                format!("a join of kind map needs as many parts left as right, not {} and {}", left.len(), right.len());
            return Err(Error::new(ErrorCode::InvalidArgument, text));
        }
        let hashed = properties.get(property::HASHED_PARTS).is_some_and(|value| value == "true");
        Ok(Self { layout, left, right, hashed })
    }
}

impl Program for MapJoin {
    fn input(&self) -> InputFormat {
        let parts = self.left.len() as u32;
        InputFormat::Generated { records: u64::from(parts), tasks: parts }
    }

    fn mapper(&self, task: &TaskContext) -> Result<Box<dyn Mapper>> {
        Ok(Box::new(Merge {
            layout: self.layout.clone(),
            left: self.left.clone(),
            right: self.right.clone(),
            hashed: self.hashed,
            task: task.clone(),
        }))
    }

    fn reducer(&self, _task: &TaskContext) -> Result<Box<dyn Reducer>> {
        Ok(Box::new(NoReducer))
    }
}

struct Merge {
    layout: Layout,
    left: Vec<String>,
    right: Vec<String>,
    hashed: bool,
    task: TaskContext,
}

impl Mapper for Merge {
    fn map(&mut self, record: Record<'_>, out: &mut Collector) -> Result<()> {
        let part = record.offset as usize;
        let (Some(left), Some(right)) = (self.left.get(part), self.right.get(part)) else { return Ok(()) };
        let parts = self.hashed.then_some((part as u32, self.left.len() as u32));
        let mut left = Sorted::open(&self.layout, Side::Left, left, &self.task, parts)?;
        let mut right = Sorted::open(&self.layout, Side::Right, right, &self.task, parts)?;
        let mut matcher = Matcher::new(self.layout.clone(), &self.task, self.task.program_memory)?;
        let mut emit = |row: &[u8]| out.emit_line(row);
        let mut key = Vec::new();
        // One key after the other, of either side; a side whose key is greater waits.
        while let Some(least) = [left.key(), right.key()].into_iter().flatten().min() {
            key.clear();
            key.extend_from_slice(least);
            let sides = if self.layout.kind.is_test() { [Side::Right, Side::Left] } else { [Side::Left, Side::Right] };
            for side in sides {
                let rows = if side == Side::Left { &mut left } else { &mut right };
                while rows.key() == Some(key.as_slice()) {
                    if side == Side::Left {
                        matcher.left(&rows.row, &mut emit)?
                    } else {
                        matcher.right(&rows.row, &mut emit)?
                    }
                    rows.advance()?;
                }
            }
            matcher.end_of_key(&mut emit)?;
        }
        Ok(())
    }
}

/// Rows of a part, by key.
struct Sorted<'a> {
    layout: &'a Layout,
    side: Side,
    path: &'a str,
    reader: RowReader,
    task: &'a TaskContext,
    /// Number of the part and of all parts, if keys are in them by hash.
    part: Option<(u32, u32)>,
    row: Vec<u8>,
    key: std::ops::Range<usize>,
    last: Vec<u8>,
    line: u64,
    done: bool,
}

impl<'a> Sorted<'a> {
    fn open(
        layout: &'a Layout,
        side: Side,
        path: &'a str,
        task: &'a TaskContext,
        part: Option<(u32, u32)>,
    ) -> Result<Self> {
        let reader = RowReader::open(task, path)?;
        let (row, last) = (Vec::new(), Vec::new());
        let mut rows = Self { layout, side, path, reader, task, part, row, key: 0..0, last, line: 0, done: false };
        rows.advance_to_key()?;
        Ok(rows)
    }

    /// Key of the current row; `None` at the end.
    fn key(&self) -> Option<&[u8]> {
        (!self.done).then(|| &self.row[self.key.clone()])
    }

    /// Goes on to the next row.
    fn advance(&mut self) -> Result<()> {
        self.last.clear();
        self.last.extend_from_slice(&self.row[self.key.clone()]);
        self.advance_to_key()
    }

    fn advance_to_key(&mut self) -> Result<()> {
        if !self.reader.next(&mut self.row)? {
            self.done = true;
            return Ok(());
        }
        self.line += 1;
        let number = self.layout.side(self.side).key;
        let Some(key) = self.layout.separator.field(&self.row, number) else {
            self.task.count(NO_KEY, 1);
            let text =
                format!("line {} of {} has no field {number}; --kind reduce takes such rows", self.line, self.path);
            return Err(Error::new(ErrorCode::InvalidArgument, text).with_subject(self.path));
        };
        self.key = key;
        let key = &self.row[self.key.clone()];
        if self.last.as_slice() > key {
            let text = format!(
                "{} is not sorted by field {number}: line {} has key {:?} after {:?}; sort it (cairn job sort --key {number},{number}) or use --kind reduce",
                self.path,
                self.line,
                String::from_utf8_lossy(key),
                String::from_utf8_lossy(&self.last)
            );
            return Err(Error::new(ErrorCode::InvalidArgument, text).with_subject(self.path));
        }
        if let Some((part, parts)) = self.part
            && partition_of(hash_key(key), parts) != part
        {
            let text = format!(
                "key {:?} in line {} of {} belongs to another part by its hash: the sides are not partitioned alike; use --kind reduce",
                String::from_utf8_lossy(key),
                self.line,
                self.path
            );
            return Err(Error::new(ErrorCode::InvalidArgument, text).with_subject(self.path));
        }
        Ok(())
    }
}

/// Lines of a file of the cluster, decompressed.
pub(super) struct RowReader {
    path: String,
    feed: Box<dyn Feed + Send>,
    piece: Bytes,
    watcher: UserCounters,
}

struct FileFeed(BlockingReader);

impl Feed for FileFeed {
    fn next(&mut self) -> Result<Option<Bytes>> {
        self.0.next_chunk()
    }
}

impl RowReader {
    pub(super) fn open(task: &TaskContext, path: &str) -> Result<Self> {
        let mut feed: Box<dyn Feed + Send> = Box::new(FileFeed(task.files()?.open(path)?));
        if let Some(kind) = Compression::of(path) {
            feed = Box::new(Decompress::new(kind, path.into(), feed)?);
        }
        Ok(Self { path: path.to_owned(), feed, piece: Bytes::new(), watcher: task.user_counters.clone() })
    }

    /// Reads the next line into `row`, without its line feed; false at the end.
    pub(super) fn next(&mut self, row: &mut Vec<u8>) -> Result<bool> {
        row.clear();
        let mut any = false;
        loop {
            if self.piece.is_empty() {
                self.watcher.progressed();
                match self.feed.next()? {
                    Some(piece) => self.piece = piece,
                    None => return Ok(any),
                }
            }
            any = true;
            if let Some(at) = memchr::memchr(b'\n', &self.piece) {
                row.extend_from_slice(&self.piece[..at]);
                let _ = self.piece.split_to(at + 1);
                return Ok(true);
            }
            row.extend_from_slice(&std::mem::take(&mut self.piece));
            if row.len() > MAX_RECORD_BYTES {
                let text = format!("{}: a line is longer than the limit of {MAX_RECORD_BYTES} bytes", self.path);
                return Err(Error::new(ErrorCode::InvalidArgument, text).with_subject(self.path.clone()));
            }
        }
    }
}

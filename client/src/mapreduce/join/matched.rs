//! What becomes of the rows of one key: one side is kept (in memory, beyond its share on disk), the other one passes by.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use cairn_common::durable::{Fs, OpenMode};
use cairn_proto::mapoutput::PartitionEntry;
use cairn_proto::{Error, ErrorCode, Result};

use super::{JoinType, Layout};
use crate::mapreduce::TaskContext;
use crate::mapreduce::run::{RunBytes, RunReader, RunWriter};

/// Takes one row of output.
pub type Emit<'a> = &'a mut dyn FnMut(&[u8]) -> Result<()>;

/// Takes a left row and a buffer for a joined one.
type EachLeft<'a> = &'a mut dyn FnMut(&Layout, &[u8], &mut Vec<u8>) -> Result<()>;

/// The left rows of one key, and the right rows that meet them.
pub struct Matcher {
    layout: Layout,
    left: Rows,
    /// Right rows that wait for the left rows on disk.
    block: Rows,
    fs: Arc<dyn Fs>,
    path: PathBuf,
    spill: Spill,
    spills: u32,
    right_seen: bool,
    out: Vec<u8>,
}

/// Left rows beyond their share of memory.
enum Spill {
    None,
    Written(Box<RunWriter>),
    Whole(PartitionEntry),
}

/// Rows in memory.
struct Rows {
    bytes: Vec<u8>,
    ends: Vec<usize>,
    budget: usize,
}

impl Rows {
    fn new(budget: u64) -> Self {
        Self { bytes: Vec::new(), ends: Vec::new(), budget: usize::try_from(budget).unwrap_or(usize::MAX) }
    }

    fn push(&mut self, row: &[u8]) {
        self.bytes.extend_from_slice(row);
        self.ends.push(self.bytes.len());
    }

    fn is_full(&self) -> bool {
        self.bytes.len() + self.ends.len() * size_of::<usize>() >= self.budget
    }

    fn clear(&mut self) {
        self.bytes.clear();
        self.ends.clear();
    }

    fn iter(&self) -> impl Iterator<Item = &[u8]> {
        let mut start = 0;
        self.ends.iter().map(move |end| {
            let row = &self.bytes[start..*end];
            start = *end;
            row
        })
    }
}

impl Matcher {
    /// For one task; `memory` bytes of rows stay off the disk.
    pub fn new(layout: Layout, task: &TaskContext, memory: u64) -> Result<Self> {
        Ok(Self {
            layout,
            left: Rows::new(memory / 4 * 3),
            block: Rows::new(memory / 4),
            fs: Arc::clone(&task.files()?.fs().env().fs),
            path: task.work_dir.join("left-rows"),
            spill: Spill::None,
            spills: 0,
            right_seen: false,
            out: Vec::new(),
        })
    }

    /// Takes a left row. For `semi` and `anti` all right rows must have come; else none.
    pub fn left(&mut self, row: &[u8], emit: Emit<'_>) -> Result<()> {
        match self.layout.kind {
            JoinType::Semi | JoinType::Anti => {
                let wanted = self.right_seen == (self.layout.kind == JoinType::Semi);
                if wanted { emit(row) } else { Ok(()) }
            }
            _ if !self.left.is_full() => {
                self.left.push(row);
                Ok(())
            }
            _ => self.spill_row(row),
        }
    }

    fn spill_row(&mut self, row: &[u8]) -> Result<()> {
        if matches!(self.spill, Spill::None) {
            self.spills += 1;
            self.spill = Spill::Written(Box::new(RunWriter::create(&*self.fs, &self.spill_path())?));
        }
        match &mut self.spill {
            Spill::Written(writer) => writer.push(b"", row),
            _ => Err(Error::new(ErrorCode::Internal, "a left row came after a right row of its key")),
        }
    }

    fn spill_path(&self) -> PathBuf {
        self.path.with_extension(self.spills.to_string())
    }

    /// The left rows of this key are complete.
    fn close_spill(&mut self) -> Result<()> {
        match std::mem::replace(&mut self.spill, Spill::None) {
            Spill::Written(mut writer) => {
                writer.end_partition()?;
                self.spill = Spill::Whole(writer.finish()?.first().copied().unwrap_or_default());
            }
            other => self.spill = other,
        }
        Ok(())
    }

    /// Takes a right row.
    pub fn right(&mut self, row: &[u8], emit: Emit<'_>) -> Result<()> {
        self.right_seen = true;
        if self.layout.kind.is_test() {
            return Ok(());
        }
        self.close_spill()?;
        if matches!(self.spill, Spill::Whole(_)) {
            self.block.push(row);
            return if self.block.is_full() { self.pass_block(emit) } else { Ok(()) };
        }
        let Self { layout, left, out, .. } = self;
        for left in left.iter() {
            layout.joined(Some(left), Some(row), out);
            emit(out)?;
        }
        if left.ends.is_empty() && layout.kind.keeps_right() {
            layout.joined(None, Some(row), out);
            emit(out)?;
        }
        Ok(())
    }

    /// The rows of this key are over; the next key may follow.
    pub fn end_of_key(&mut self, emit: Emit<'_>) -> Result<()> {
        self.close_spill()?;
        let spilled = matches!(self.spill, Spill::Whole(_));
        if spilled && self.right_seen {
            self.pass_block(emit)?;
        }
        if !self.right_seen && self.layout.kind.keeps_left() && !self.layout.kind.is_test() {
            self.each_left(&mut |layout, left, out| {
                layout.joined(Some(left), None, out);
                emit(out)
            })?;
        }
        if spilled {
            let path = self.spill_path();
            self.fs.remove_file(&path).map_err(|error| failed("remove", &path, &error))?;
            self.spill = Spill::None;
        }
        self.left.clear();
        self.right_seen = false;
        Ok(())
    }

    /// Joins the right rows that wait with all left rows: one pass over the disk for many of them.
    fn pass_block(&mut self, emit: Emit<'_>) -> Result<()> {
        let block = std::mem::replace(&mut self.block, Rows::new(0));
        let result = self.each_left(&mut |layout, left, out| {
            for right in block.iter() {
                layout.joined(Some(left), Some(right), out);
                emit(out)?;
            }
            Ok(())
        });
        self.block = block;
        self.block.clear();
        result
    }

    fn each_left(&mut self, each: EachLeft<'_>) -> Result<()> {
        let mut out = std::mem::take(&mut self.out);
        for left in self.left.iter() {
            each(&self.layout, left, &mut out)?;
        }
        if let Spill::Whole(entry) = &self.spill {
            let path = self.spill_path();
            let file = self.fs.open(&path, OpenMode::Read).map_err(|error| failed("open", &path, &error))?;
            let mut reader = RunReader::new(RunBytes::partition(file, &path, entry));
            while reader.advance()? {
                each(&self.layout, reader.value(), &mut out)?;
            }
        }
        self.out = out;
        Ok(())
    }
}

fn failed(doing: &str, path: &Path, error: &std::io::Error) -> Error {
    Error::io(format!("cannot {doing} {}", path.display()), error)
}

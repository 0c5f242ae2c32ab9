//! The data of a replica, out of its frames: what Hadoop's clients read is not what lies on disk. All of it is blocking.

use std::ops::Range;
use std::sync::Arc;

use cairn_common::durable::File;
use cairn_proto::frame::{FRAME_HEADER_BYTES, FrameHeader, Opener};
use cairn_proto::ids::BlockId;
use cairn_proto::{Error, ErrorCode, Result};

use crate::store::Readable;

/// A run of a replica's data, frame by frame, each verified against the checksum that its writer took.
pub struct DataReader {
    file: Arc<dyn File>,
    block: BlockId,
    /// In the file.
    at: u64,
    file_end: u64,
    /// In the block.
    position: u64,
    end: u64,
    frame: Opener,
    /// Where `position` is in the data of the frame that was read last.
    inside: usize,
}

impl DataReader {
    /// Reads `offset .. end`, which lies inside what is readable.
    pub fn new(readable: &Readable, block: BlockId, offset: u64, end: u64) -> Result<Self> {
        let range = readable.index.file_range(offset, end.saturating_sub(offset));
        if end > readable.length || (range.is_none() && end != offset) {
            let text = format!("block {block} has {} bytes here, not {end}", readable.length);
            return Err(Error::new(ErrorCode::InvalidArgument, text).with_subject(block.to_string()));
        }
        let range = range.unwrap_or_default();
        let (at, file_end) = (range.start, range.end);
        let (file, frame) = (Arc::clone(&readable.file), Opener::default());
        Ok(Self { file, block, at, file_end, position: offset, end, frame, inside: 0 })
    }

    /// Where the next data lies in the block.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Where the run ends.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Frames are opened in this memory.
    pub fn with_memory(self, frame: Opener) -> Self {
        Self { frame: frame.emptied(), ..self }
    }

    /// The memory, for another run.
    pub fn into_memory(self) -> Opener {
        self.frame
    }

    /// The next data, at most `limit` bytes of it; empty at the end. Code `Corrupt`: what lies on disk does not verify.
    pub fn next(&mut self, limit: usize) -> Result<&[u8]> {
        if self.position >= self.end {
            return Ok(&[]);
        }
        if self.inside >= self.frame.data().len() {
            self.read_frame()?;
        }
        let left = usize::try_from(self.end - self.position).unwrap_or(usize::MAX);
        let from = self.inside;
        self.inside += (self.frame.data().len() - from).min(limit).min(left);
        self.position += (self.inside - from) as u64;
        Ok(&self.frame.data()[from..self.inside])
    }

    /// Appends the next `length` bytes to `out`; there must be so many. After an error zeros are appended for what could not be read.
    pub fn copy_to(&mut self, out: &mut Vec<u8>, length: usize) -> Result<()> {
        let whole = out.len() + length;
        let mut outcome = Ok(());
        while out.len() < whole {
            match self.next(whole - out.len()) {
                Ok(data) if !data.is_empty() => out.extend_from_slice(data),
                Ok(_) => break,
                Err(error) => {
                    outcome = Err(error);
                    break;
                }
            }
        }
        out.resize(whole, 0);
        outcome
    }

    /// Opens the next frame in `memory`, of whose first bytes those in the range belong to the run; `None` at the end. `crc32c` says what the checksum
    /// of a frame's data is. Not to be mixed with [`Self::next`].
    pub fn next_frame(
        &mut self,
        memory: &mut Vec<u8>,
        crc32c: impl FnOnce(&FrameHeader, &[u8]) -> u32,
    ) -> Result<Option<Range<usize>>> {
        if self.position >= self.end {
            return Ok(None);
        }
        let header = self.fetch()?;
        let opened = self.frame.open_into(&header, memory, |data| crc32c(&header, data));
        opened.map_err(|flaw| damaged(self.block, &flaw))?;
        let range = (self.position - header.offset) as usize..(self.end.min(header.end()) - header.offset) as usize;
        self.position += range.len() as u64;
        Ok(Some(range))
    }

    fn read_frame(&mut self) -> Result<()> {
        let header = self.fetch()?;
        self.frame.open(&header).map_err(|flaw| damaged(self.block, &flaw))?;
        self.inside = (self.position - header.offset) as usize;
        Ok(())
    }

    /// Reads the payload of the frame in which `position` is.
    fn fetch(&mut self) -> Result<FrameHeader> {
        let block = self.block;
        let failed = |error: std::io::Error| Error::io(format!("reading block {block}"), &error);
        loop {
            if self.at + FRAME_HEADER_BYTES as u64 > self.file_end {
                return Err(damaged(block, &"its frames end early"));
            }
            let mut bytes = [0; FRAME_HEADER_BYTES];
            self.file.read_exact_at(&mut bytes, self.at).map_err(failed)?;
            let header = FrameHeader::decode(block, &bytes).map_err(|flaw| damaged(block, &flaw))?;
            if header.offset > self.position {
                return Err(damaged(block, &format!("a frame starts at {}, not at {}", header.offset, self.position)));
            }
            let payload_at = self.at + FRAME_HEADER_BYTES as u64;
            self.at += header.frame_bytes() as u64;
            // Before what is wanted: the range starts where the index allows.
            if header.end() > self.position {
                self.file.read_exact_at(self.frame.payload(&header), payload_at).map_err(failed)?;
                return Ok(header);
            }
        }
    }
}

fn damaged(block: BlockId, why: &dyn std::fmt::Display) -> Error {
    Error::new(ErrorCode::Corrupt, format!("block {block}: {why}")).with_subject(block.to_string())
}

/// Whether the replica's data from `offset` on is `data`.
pub fn holds(readable: &Readable, block: BlockId, offset: u64, data: &[u8]) -> Result<bool> {
    let mut reader = DataReader::new(readable, block, offset, offset + data.len() as u64)?;
    let mut left = data;
    while !left.is_empty() {
        let here = reader.next(left.len())?;
        let (now, later) = left.split_at(here.len());
        if here != now {
            return Ok(false);
        }
        left = later;
    }
    Ok(true)
}

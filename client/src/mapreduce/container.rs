//! A file of binary keys and values that can be read from any place in it.
//!
//! A header of 32 bytes, then chunks, each after the file's mark: 16 random bytes that a reader who starts in the middle looks for.
//!
//! | at | size | field | |
//! |---|---|---|---|
//! | 0 | 8 | magic | `CAIRNKV1` |
//! | 8 | 16 | mark | random, another one in each file |
//! | 24 | 4 | crc | CRC-32 of bytes 0 to 23, little endian |
//! | 28 | 4 | reserved | 0 |
//!
//! Chunk: the mark, then a chunk of [`cairn_proto::mapoutput`]: header with lengths and CRC-32, records (key length and value length as LEB128, key,
//! value) stored or with zstd. A chunk belongs to the split in which its mark starts. A chunk whose CRC does not match is an error, never skipped.

use bytes::{Bytes, BytesMut};
use cairn_proto::mapoutput::{CHUNK_HEADER_BYTES, CHUNK_RAW_BYTES, ChunkHeader};
use cairn_proto::{ErrorCode, Result, pb};

use super::input::{Batch, Cut, Feed, Source};
use super::run::{check_record, decompress};
use super::{decode_varint, encode_count};

/// Bytes of the header.
pub const HEADER_BYTES: u64 = 32;
const MAGIC: &[u8; 8] = b"CAIRNKV1";
const MARK_BYTES: usize = 16;
const ZSTD_LEVEL: i32 = 1;

type Mark = [u8; MARK_BYTES];

fn header(mark: &Mark) -> [u8; HEADER_BYTES as usize] {
    let mut out = [0; HEADER_BYTES as usize];
    out[..8].copy_from_slice(MAGIC);
    out[8..24].copy_from_slice(mark);
    let crc = crc32fast::hash(&out[..24]);
    out[24..28].copy_from_slice(&crc.to_le_bytes());
    out
}

/// Makes the bytes of such a file.
pub(super) struct ContainerWriter {
    mark: Mark,
    raw: Vec<u8>,
    packed: Vec<u8>,
}

impl ContainerWriter {
    /// Starts a file with that mark: appends its header to `out`.
    pub(super) fn new(mark: u128, out: &mut Vec<u8>) -> Self {
        let mark = mark.to_le_bytes();
        out.extend_from_slice(&header(&mark));
        Self { mark, raw: Vec::with_capacity(CHUNK_RAW_BYTES), packed: Vec::new() }
    }

    /// Takes a record; what is complete by then is appended to `out`.
    pub(super) fn push(&mut self, key: &[u8], value: &[u8], out: &mut Vec<u8>) -> Result<()> {
        let size = key.len() + value.len();
        if self.raw.len() + size > CHUNK_RAW_BYTES {
            check_record(size)?;
            self.end_chunk(out);
        }
        let mut scratch = [0; 10];
        self.raw.extend_from_slice(encode_count(key.len() as u64, &mut scratch));
        self.raw.extend_from_slice(encode_count(value.len() as u64, &mut scratch));
        self.raw.extend_from_slice(key);
        self.raw.extend_from_slice(value);
        Ok(())
    }

    /// Appends the records that are left.
    pub(super) fn end_chunk(&mut self, out: &mut Vec<u8>) {
        if self.raw.is_empty() {
            return;
        }
        self.packed.resize(zstd::zstd_safe::compress_bound(self.raw.len()), 0);
        // What cannot be compressed is stored as it is.
        let packed = zstd::bulk::compress_to_buffer(&self.raw, &mut self.packed, ZSTD_LEVEL).unwrap_or(usize::MAX);
        let compressed = packed < self.raw.len();
        let stored = if compressed { &self.packed[..packed] } else { &self.raw[..] };
        out.extend_from_slice(&self.mark);
        out.extend_from_slice(&ChunkHeader::encode(compressed, self.raw.len(), stored));
        out.extend_from_slice(stored);
        self.raw.clear();
    }
}

/// Reads the chunks of a split. Its feed delivers the file's header first, then the file from [`feed_start`] on.
pub struct ContainerReader {
    source: Source,
    feed: Box<dyn Feed + Send>,
    state: State,
    /// Where `buffer` starts in the file.
    position: u64,
    buffer: BytesMut,
    start: u64,
    /// First byte behind the split.
    end: u64,
}

#[derive(Clone, Copy)]
enum State {
    /// The header comes first.
    Header,
    /// A mark is looked for.
    Seeking(Mark),
    /// A mark must follow.
    Reading(Mark),
    Done,
}

/// First byte behind the header that the feed of a split delivers.
pub fn feed_start(split: &pb::Split) -> u64 {
    split.offset.max(HEADER_BYTES)
}

impl ContainerReader {
    pub(super) fn new(split: &pb::Split, feed: Box<dyn Feed + Send>) -> Self {
        Self {
            source: Source::of(split),
            feed,
            state: State::Header,
            position: 0,
            buffer: BytesMut::new(),
            start: feed_start(split),
            end: split.offset + split.length,
        }
    }

    fn corrupt<T>(&self, text: &str) -> Result<T> {
        self.source.refuse(ErrorCode::Corrupt, &format!("{text} (at byte {})", self.position))
    }

    /// Has at least `length` bytes in the buffer; false if the file ends before.
    fn fill(&mut self, length: usize) -> Result<bool> {
        while self.buffer.len() < length {
            match self.feed.next()? {
                Some(piece) => self.buffer.extend_from_slice(&piece),
                None => return Ok(false),
            }
        }
        Ok(true)
    }

    fn take(&mut self, length: usize) -> Bytes {
        self.position += length as u64;
        self.buffer.split_to(length).freeze()
    }

    /// The records of the next chunk; `None` at the end of the split.
    pub(super) fn next(&mut self) -> Result<Option<Batch>> {
        loop {
            match self.state {
                State::Header => {
                    if !self.fill(HEADER_BYTES as usize)? {
                        return self.corrupt("the file is too short to be one of binary keys and values");
                    }
                    let found = self.take(HEADER_BYTES as usize);
                    let mut mark = [0; MARK_BYTES];
                    mark.copy_from_slice(&found[8..24]);
                    if found[..] != header(&mark) {
                        self.position = 0;
                        return self.corrupt("this is no file of binary keys and values");
                    }
                    self.position = self.start;
                    let at_start = self.start == HEADER_BYTES;
                    self.state = if at_start { State::Reading(mark) } else { State::Seeking(mark) };
                }
                State::Seeking(mark) => self.seek(mark)?,
                State::Reading(mark) => return self.chunk(mark),
                State::Done => return Ok(None),
            }
        }
    }

    /// Goes on to the first mark, or to the end of the split.
    fn seek(&mut self, mark: Mark) -> Result<()> {
        while self.position < self.end {
            if let Some(at) = memchr::memmem::find(&self.buffer, &mark) {
                self.take(at);
                self.state = State::Reading(mark);
                return Ok(());
            }
            // A mark may lie across two pieces.
            self.take(self.buffer.len().saturating_sub(MARK_BYTES - 1));
            let have = self.buffer.len();
            if !self.fill(have + 1)? {
                break;
            }
        }
        self.state = State::Done;
        Ok(())
    }

    fn chunk(&mut self, mark: Mark) -> Result<Option<Batch>> {
        if self.position >= self.end || !self.fill(1)? {
            self.state = State::Done;
            return Ok(None);
        }
        let offset = self.position;
        if !self.fill(MARK_BYTES + CHUNK_HEADER_BYTES)? {
            return self.corrupt("the file ends inside a chunk");
        }
        if self.buffer[..MARK_BYTES] != mark {
            return self.corrupt("a chunk does not start with the mark of the file");
        }
        let mut head = [0; CHUNK_HEADER_BYTES];
        head.copy_from_slice(&self.buffer[MARK_BYTES..MARK_BYTES + CHUNK_HEADER_BYTES]);
        let head = ChunkHeader::decode(&head).or_else(|error| self.corrupt(error.message()))?;
        let length = MARK_BYTES + CHUNK_HEADER_BYTES + head.stored_len as usize;
        if !self.fill(length)? {
            return self.corrupt("the file ends inside a chunk");
        }
        let stored = self.buffer[..length].to_vec();
        let stored = &stored[MARK_BYTES + CHUNK_HEADER_BYTES..];
        head.verify(stored).or_else(|error| self.corrupt(error.message()))?;
        let mut raw = Vec::new();
        if head.compressed {
            decompress(stored, head.raw_len as usize, &mut raw).or_else(|error| self.corrupt(error.message()))?;
        } else {
            raw.extend_from_slice(stored);
        }
        if !is_whole(&raw) {
            return self.corrupt("a record does not fit its chunk");
        }
        self.take(length);
        Ok(Some(self.source.batch(raw.into(), offset, Cut::Packed)))
    }
}

/// A record at the start of `bytes`, and how long it is.
pub(super) fn record(bytes: &[u8]) -> Option<(&[u8], &[u8], usize)> {
    let (key, a) = decode_varint(bytes)?;
    let (value, b) = decode_varint(&bytes[a..])?;
    let (key, value) = (usize::try_from(key).ok()?, usize::try_from(value).ok()?);
    let middle = (a + b).checked_add(key)?;
    let end = middle.checked_add(value)?;
    Some((bytes.get(a + b..middle)?, bytes.get(middle..end)?, end))
}

fn is_whole(mut raw: &[u8]) -> bool {
    while !raw.is_empty() {
        match record(raw) {
            Some((_, _, length)) => raw = &raw[length..],
            None => return false,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mapreduce::testing::Pieces;
    use cairn_proto::Error;

    type Pairs = Vec<(Vec<u8>, Vec<u8>)>;

    fn write(pairs: &Pairs) -> Vec<u8> {
        let mut out = Vec::new();
        let mut writer = ContainerWriter::new(0x1234_5678_9abc_def0_0fed_cba9_8765_4321, &mut out);
        for (number, (key, value)) in pairs.iter().enumerate() {
            writer.push(key, value, &mut out).unwrap();
            if number % 1_000 == 999 {
                writer.end_chunk(&mut out);
            }
        }
        writer.end_chunk(&mut out);
        out
    }

    fn read(file: &[u8], from: usize, to: usize, step: usize) -> Result<Pairs> {
        let split =
            pb::Split { path: "/f".into(), offset: from as u64, length: (to - from) as u64, ..Default::default() };
        let start = (feed_start(&split) as usize).min(file.len());
        let head = &file[..file.len().min(HEADER_BYTES as usize)];
        let feed = Pieces::of(&file[start..], step).after(head);
        let mut reader = ContainerReader::new(&split, Box::new(feed));
        let mut out = Vec::new();
        while let Some(batch) = reader.next()? {
            out.extend(batch.records().map(|one| (one.key.to_vec(), one.bytes.to_vec())));
        }
        Ok(out)
    }

    fn pairs() -> Pairs {
        let small = (0..5_500u32).map(|i| (i.to_be_bytes().to_vec(), format!("value {i}").into_bytes()));
        small.chain([(vec![7; 200_000], vec![8; 100_000]), (Vec::new(), Vec::new())]).collect()
    }

    #[test]
    fn every_cut_gives_each_record_once() {
        let (pairs, file) = (pairs(), write(&pairs()));
        assert!(file.len() < 60_000, "it is compressed");
        assert!(read(&file, 0, file.len(), 1 << 20).unwrap() == pairs);
        for first in (0..file.len()).step_by(97).chain(0..40) {
            let second = first + (file.len() - first) / 3;
            let mut got = read(&file, 0, first, 1_000).unwrap();
            got.extend(read(&file, first, second, 333).unwrap());
            got.extend(read(&file, second, file.len(), 100_000).unwrap());
            assert!(got == pairs, "cut at {first} and {second}");
        }
        assert!(read(&write(&Vec::new()), 0, 32, 5).unwrap().is_empty());
    }

    #[test]
    fn damage_is_told_with_file_and_place() {
        let small: Pairs = (0..40u32).map(|i| (i.to_be_bytes().to_vec(), vec![i as u8; 9])).collect();
        let file = write(&small);
        for at in 0..file.len() {
            let mut bad = file.clone();
            bad[at] ^= 0x20;
            let error: Error = read(&bad, 0, bad.len(), 50).unwrap_err();
            assert_eq!(error.code(), ErrorCode::Corrupt, "byte {at}: {error}");
            assert!(error.message().starts_with("/f: ") && error.message().contains("at byte"), "{error}");
        }
        for keep in (0..file.len()).filter(|keep| *keep != HEADER_BYTES as usize) {
            assert_eq!(read(&file[..keep], 0, file.len(), 50).unwrap_err().code(), ErrorCode::Corrupt, "cut at {keep}");
        }
    }
}

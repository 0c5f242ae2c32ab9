//! The block file: a header, frames, an index and a footer.
//!
//! A finalized block file is immutable, and its name carries block id, generation and length
//! (`<id>_<generation>_<length>.blk`), so listing a folder is enough to know what a volume holds. All integers little endian.
//!
//! Header (`header_len` bytes, 32 at least, 4,096 at most):
//!
//! | at | size | field |
//! |---|---|---|
//! | 0 | 8 | magic `CAIRNBLK` |
//! | 8 | 2 | version, 1 |
//! | 10 | 2 | header_len |
//! | 12 | 4 | flags, must be 0 |
//! | 16 | 8 | block id |
//! | 24 | 4 | CRC-32 of the whole header with this field as zero |
//! | 28 | 4 | reserved, 0 |
//! | 32 | … | tagged fields: u16 tag, u16 length, bytes. Tags below 0x8000 may be skipped by a reader that does not know them, others may not |
//!
//! Then frames ([`crate::frame`]), back to back, each starting where the one before ended in the block; then the index, one entry of
//! 16 bytes per 256 KiB of file data at most: u64 offset in the block, u64 offset in the file, of a frame. Then the footer, 64 bytes:
//!
//! | at | size | field |
//! |---|---|---|
//! | 0 | 8 | magic `CAIRNEND` |
//! | 8 | 2 | version, 1 |
//! | 10 | 6 | reserved, 0 |
//! | 16 | 8 | block id |
//! | 24 | 8 | length of the block's data |
//! | 32 | 8 | file offset of the index (the end of the frames) |
//! | 40 | 4 | index entries |
//! | 44 | 4 | CRC-32 of the index |
//! | 48 | 4 | frames |
//! | 52 | 4 | CRC-32C of the block's raw data |
//! | 56 | 4 | reserved, 0 |
//! | 60 | 4 | CRC-32 of bytes 0 to 59 |
//!
//! Write order: header and frames as they come; index and footer; `fdatasync`; rename to the final name; `fsync` of the folder. The
//! rename comes last, so a file with a final name always has a footer, and one without is cut to its last whole, valid frame.

use crate::frame::{FrameHeader, le64};
use crate::ids::{BlockId, Generation};

/// Bytes of the header without tagged fields.
pub const HEADER_BYTES: usize = 32;
/// Longest header.
pub const MAX_HEADER_BYTES: usize = 4_096;
/// Bytes of the footer.
pub const FOOTER_BYTES: usize = 64;
/// Bytes of an index entry.
pub const INDEX_ENTRY_BYTES: usize = 16;
/// File data between two index entries, at least.
pub const INDEX_STRIDE: u64 = 256 << 10;

const HEADER_MAGIC: &[u8; 8] = b"CAIRNBLK";
const FOOTER_MAGIC: &[u8; 8] = b"CAIRNEND";
const VERSION: u16 = 1;

/// Why a file is not a whole block file.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BlockFileError {
    /// The file is shorter than its parts.
    #[error("cut: the {part} needs {need} bytes, there are {have}")]
    Cut {
        /// Which part.
        part: &'static str,
        /// Bytes there are.
        have: u64,
        /// Bytes needed.
        need: u64,
    },
    /// A part does not start with its magic.
    #[error("the {0} is not a block file's")]
    Magic(&'static str),
    /// Written by a newer program.
    #[error("the block file has version {0}, this program reads {VERSION}")]
    Version(u16),
    /// A part does not verify.
    #[error("the {0} does not verify")]
    Checksum(&'static str),
    /// A part is of another block.
    #[error("the {part} is of block {found}, not of {expected}")]
    OtherBlock {
        /// Which part.
        part: &'static str,
        /// The id it carries.
        found: BlockId,
        /// The id it should carry.
        expected: BlockId,
    },
    /// A field is out of range or contradicts another.
    #[error("the {0} contradicts itself or the file")]
    OutOfRange(&'static str),
}

fn le16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn header_crc(bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&bytes[..24]);
    hasher.update(&[0; 4]);
    hasher.update(&bytes[28..]);
    hasher.finalize()
}

/// CRC-32C's polynomial, bits reversed.
const CRC32C_POLYNOMIAL: u32 = 0x82F6_3B78;

/// Product of two polynomials modulo CRC-32C's.
const fn multiply(a: u32, mut b: u32) -> u32 {
    let mut product = 0;
    let mut bit = 1 << 31;
    while bit != 0 {
        if a & bit != 0 {
            product ^= b;
        }
        b = (b >> 1) ^ (CRC32C_POLYNOMIAL & (b & 1).wrapping_neg());
        bit >>= 1;
    }
    product
}

/// x to the power of 2^n, for n up to the bits of a length in bits.
const SQUARES: [u32; 36] = {
    let mut table = [1 << 30; 36];
    let mut n = 1;
    while n < table.len() {
        table[n] = multiply(table[n - 1], table[n - 1]);
        n += 1;
    }
    table
};

/// CRC-32C of two pieces from those of each. The crate's own function squares matrices for each call; done for every frame by every node, that
/// was a tenth of a write's cost.
fn combine_crc32c(first: u32, second: u32, second_len: u32) -> u32 {
    let mut shift = 1 << 31;
    let mut left = second_len;
    let mut at = 3; // bytes to bits
    while left != 0 {
        if left & 1 != 0 {
            shift = multiply(SQUARES[at], shift);
        }
        left >>= 1;
        at += 1;
    }
    multiply(shift, first) ^ second
}

/// The header of a new block file.
pub fn encode_header(block: BlockId) -> [u8; HEADER_BYTES] {
    let mut out = [0; HEADER_BYTES];
    out[..8].copy_from_slice(HEADER_MAGIC);
    out[8..10].copy_from_slice(&VERSION.to_le_bytes());
    out[10..12].copy_from_slice(&(HEADER_BYTES as u16).to_le_bytes());
    out[16..24].copy_from_slice(&block.0.to_le_bytes());
    let crc = header_crc(&out);
    out[24..28].copy_from_slice(&crc.to_le_bytes());
    out
}

/// Verifies the header at the start of `bytes` (give at least [`MAX_HEADER_BYTES`] or the whole file) and returns its
/// length: the file offset of the first frame.
pub fn decode_header(block: BlockId, bytes: &[u8]) -> Result<u64, BlockFileError> {
    let have = bytes.len() as u64;
    if bytes.len() < HEADER_BYTES {
        return Err(BlockFileError::Cut { part: "header", have, need: HEADER_BYTES as u64 });
    }
    if &bytes[..8] != HEADER_MAGIC {
        return Err(BlockFileError::Magic("header"));
    }
    let version = le16(bytes, 8);
    if version != VERSION {
        return Err(BlockFileError::Version(version));
    }
    let length = le16(bytes, 10) as usize;
    if !(HEADER_BYTES..=MAX_HEADER_BYTES).contains(&length) {
        return Err(BlockFileError::OutOfRange("header"));
    }
    if bytes.len() < length {
        return Err(BlockFileError::Cut { part: "header", have, need: length as u64 });
    }
    if header_crc(&bytes[..length]) != le32(bytes, 24) {
        return Err(BlockFileError::Checksum("header"));
    }
    let found = BlockId(le64(bytes, 16) as i64);
    if found != block {
        return Err(BlockFileError::OtherBlock { part: "header", found, expected: block });
    }
    if le32(bytes, 12) != 0 {
        return Err(BlockFileError::OutOfRange("header"));
    }
    check_tagged(&bytes[HEADER_BYTES..length])?;
    Ok(length as u64)
}

fn check_tagged(mut fields: &[u8]) -> Result<(), BlockFileError> {
    while !fields.is_empty() {
        if fields.len() < 4 {
            return Err(BlockFileError::OutOfRange("header"));
        }
        let (tag, length) = (le16(fields, 0), le16(fields, 2) as usize);
        if tag >= 0x8000 || fields.len() < 4 + length {
            return Err(BlockFileError::OutOfRange("header"));
        }
        fields = &fields[4 + length..];
    }
    Ok(())
}

/// What a block file holds, gathered while its frames are written or scanned.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BlockIndex {
    /// Offset in the block and in the file of a frame, rising.
    entries: Vec<(u64, u64)>,
    data_length: u64,
    frames_end: u64,
    frames: u32,
    crc32c: u32,
}

impl BlockIndex {
    /// Of a file that holds its header only.
    pub fn new(header_len: u64) -> Self {
        Self { entries: Vec::new(), data_length: 0, frames_end: header_len, frames: 0, crc32c: 0 }
    }

    /// Notes the next frame; it must start where the block ends.
    pub fn push(&mut self, frame: &FrameHeader) {
        debug_assert_eq!(frame.offset, self.data_length, "frames are contiguous");
        if self.entries.last().is_none_or(|(last, _)| frame.offset - last >= INDEX_STRIDE) {
            self.entries.push((frame.offset, self.frames_end));
        }
        self.crc32c = combine_crc32c(self.crc32c, frame.raw_crc, frame.raw_len);
        self.data_length = frame.end();
        self.frames_end += frame.frame_bytes() as u64;
        self.frames += 1;
    }

    /// Bytes of file data.
    pub fn data_length(&self) -> u64 {
        self.data_length
    }

    /// File offset just after the last frame.
    pub fn frames_end(&self) -> u64 {
        self.frames_end
    }

    /// Frames in the file.
    pub fn frames(&self) -> u32 {
        self.frames
    }

    /// CRC-32C of the block's raw data.
    pub fn crc32c(&self) -> u32 {
        self.crc32c
    }

    /// The file range whose frames cover `offset .. offset + length` of the block (it may start before and end after).
    /// `None` if the block ends before `offset + length` or nothing is asked.
    pub fn file_range(&self, offset: u64, length: u64) -> Option<std::ops::Range<u64>> {
        let end = offset.checked_add(length)?;
        if length == 0 || end > self.data_length {
            return None;
        }
        let first = self.entries.partition_point(|(data, _)| *data <= offset).checked_sub(1)?;
        let after = self.entries.partition_point(|(data, _)| *data < end);
        let stop = self.entries.get(after).map_or(self.frames_end, |(_, file)| *file);
        Some(self.entries[first].1..stop)
    }

    /// Index and footer, to be appended after the last frame.
    pub fn encode_tail(&self, block: BlockId) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.entries.len() * INDEX_ENTRY_BYTES + FOOTER_BYTES);
        for (data, file) in &self.entries {
            out.extend_from_slice(&data.to_le_bytes());
            out.extend_from_slice(&file.to_le_bytes());
        }
        let index_crc = crc32fast::hash(&out);
        let mut footer = [0; FOOTER_BYTES];
        footer[..8].copy_from_slice(FOOTER_MAGIC);
        footer[8..10].copy_from_slice(&VERSION.to_le_bytes());
        footer[16..24].copy_from_slice(&block.0.to_le_bytes());
        footer[24..32].copy_from_slice(&self.data_length.to_le_bytes());
        footer[32..40].copy_from_slice(&self.frames_end.to_le_bytes());
        footer[40..44].copy_from_slice(&(self.entries.len() as u32).to_le_bytes());
        footer[44..48].copy_from_slice(&index_crc.to_le_bytes());
        footer[48..52].copy_from_slice(&self.frames.to_le_bytes());
        footer[52..56].copy_from_slice(&self.crc32c.to_le_bytes());
        let crc = crc32fast::hash(&footer[..60]);
        footer[60..64].copy_from_slice(&crc.to_le_bytes());
        out.extend_from_slice(&footer);
        out
    }
}

/// A verified footer; tells where the index lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Footer {
    data_length: u64,
    index_offset: u64,
    index_count: u32,
    index_crc: u32,
    frames: u32,
    crc32c: u32,
}

impl Footer {
    /// Verifies the last [`FOOTER_BYTES`] of a file of `file_length` bytes.
    pub fn decode(block: BlockId, bytes: &[u8], file_length: u64) -> Result<Self, BlockFileError> {
        if bytes.len() != FOOTER_BYTES {
            let (have, need) = (bytes.len() as u64, FOOTER_BYTES as u64);
            return Err(BlockFileError::Cut { part: "footer", have, need });
        }
        if &bytes[..8] != FOOTER_MAGIC {
            return Err(BlockFileError::Magic("footer"));
        }
        if crc32fast::hash(&bytes[..60]) != le32(bytes, 60) {
            return Err(BlockFileError::Checksum("footer"));
        }
        let version = le16(bytes, 8);
        if version != VERSION {
            return Err(BlockFileError::Version(version));
        }
        let found = BlockId(le64(bytes, 16) as i64);
        if found != block {
            return Err(BlockFileError::OtherBlock { part: "footer", found, expected: block });
        }
        let footer = Self {
            data_length: le64(bytes, 24),
            index_offset: le64(bytes, 32),
            index_count: le32(bytes, 40),
            index_crc: le32(bytes, 44),
            frames: le32(bytes, 48),
            crc32c: le32(bytes, 52),
        };
        let parts = footer.index_offset.checked_add(footer.index_bytes() as u64 + FOOTER_BYTES as u64);
        if parts != Some(file_length) || footer.index_offset < HEADER_BYTES as u64 {
            return Err(BlockFileError::OutOfRange("footer"));
        }
        if footer.data_length > crate::MAX_BLOCK_SIZE {
            return Err(BlockFileError::OutOfRange("footer"));
        }
        Ok(footer)
    }

    /// File offset of the index.
    pub fn index_offset(&self) -> u64 {
        self.index_offset
    }

    /// Bytes of the index.
    pub fn index_bytes(&self) -> usize {
        self.index_count as usize * INDEX_ENTRY_BYTES
    }

    /// Bytes of file data.
    pub fn data_length(&self) -> u64 {
        self.data_length
    }

    /// Verifies the index.
    pub fn decode_index(&self, bytes: &[u8]) -> Result<BlockIndex, BlockFileError> {
        if bytes.len() != self.index_bytes() {
            let (have, need) = (bytes.len() as u64, self.index_bytes() as u64);
            return Err(BlockFileError::Cut { part: "index", have, need });
        }
        if crc32fast::hash(bytes) != self.index_crc {
            return Err(BlockFileError::Checksum("index"));
        }
        let entries: Vec<(u64, u64)> =
            bytes.chunks_exact(INDEX_ENTRY_BYTES).map(|entry| (le64(entry, 0), le64(entry, 8))).collect();
        let rising = entries.windows(2).all(|pair| pair[0].0 < pair[1].0 && pair[0].1 < pair[1].1);
        let inside = entries.iter().all(|(data, file)| *data < self.data_length && *file < self.index_offset);
        let starts =
            entries.first().is_none_or(|(data, _)| *data == 0) && entries.is_empty() == (self.data_length == 0);
        if !(rising && inside && starts) {
            return Err(BlockFileError::OutOfRange("index"));
        }
        Ok(BlockIndex {
            entries,
            data_length: self.data_length,
            frames_end: self.index_offset,
            frames: self.frames,
            crc32c: self.crc32c,
        })
    }
}

/// Name of a finalized block file.
pub fn finalized_name(block: BlockId, generation: Generation, length: u64) -> String {
    format!("{block}_{generation}_{length}.blk")
}

/// Name of a block file that is being written.
pub fn unfinalized_name(block: BlockId, generation: Generation) -> String {
    format!("{block}_{generation}.rbw")
}

/// What a block file's name says: id, generation, and the length if it is finalized. `None` if it is no such name.
pub fn parse_name(name: &str) -> Option<(BlockId, Generation, Option<u64>)> {
    let (stem, finalized) = match name.strip_suffix(".blk") {
        Some(stem) => (stem, true),
        None => (name.strip_suffix(".rbw")?, false),
    };
    let mut parts = stem.split('_');
    let id = BlockId(parts.next()?.parse().ok()?);
    let generation = Generation(parts.next()?.parse().ok()?);
    let length = if finalized { Some(parts.next()?.parse().ok()?) } else { None };
    let written = match length {
        Some(length) => finalized_name(id, generation, length),
        None => unfinalized_name(id, generation),
    };
    // Else "+7_007" would be another name of the same replica, which nothing that computes names would ever find.
    (written == name).then_some((id, generation, length))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::Sealer;
    use bytes::Bytes;
    use proptest::prelude::*;

    const BLOCK: BlockId = BlockId(7);

    fn file(frames: usize, raw: usize) -> (Vec<u8>, BlockIndex, Vec<u8>) {
        let mut out = encode_header(BLOCK).to_vec();
        let mut index = BlockIndex::new(out.len() as u64);
        let mut data = Vec::new();
        let mut sealer = Sealer::new(true);
        for k in 0..frames {
            let part: Vec<u8> = (0..raw).map(|i| (i * (k + 1)) as u8).collect();
            let frame = sealer.seal(BLOCK, data.len() as u64, Bytes::copy_from_slice(&part), true);
            data.extend_from_slice(&part);
            out.extend_from_slice(&frame.header_bytes);
            out.extend_from_slice(&frame.payload);
            index.push(&frame.header);
        }
        out.extend_from_slice(&index.encode_tail(BLOCK));
        (out, index, data)
    }

    fn open(bytes: &[u8]) -> Result<BlockIndex, BlockFileError> {
        decode_header(BLOCK, bytes)?;
        let at = bytes.len().saturating_sub(FOOTER_BYTES);
        let footer = Footer::decode(BLOCK, &bytes[at..], bytes.len() as u64)?;
        let start = footer.index_offset() as usize;
        footer.decode_index(&bytes[start..at])
    }

    #[test]
    fn comes_back_as_written() {
        for frames in [0, 1, 3, 40] {
            let (bytes, index, data) = file(frames, 100_000);
            let read = open(&bytes).unwrap();
            assert_eq!(read, index);
            assert_eq!(read.data_length(), data.len() as u64);
            assert_eq!(read.crc32c(), if data.is_empty() { 0 } else { crc32c::crc32c(&data) });
        }
    }

    #[test]
    fn names() {
        assert_eq!(parse_name(&finalized_name(BLOCK, Generation(3), 9)), Some((BLOCK, Generation(3), Some(9))));
        assert_eq!(parse_name(&unfinalized_name(BLOCK, Generation(3))), Some((BLOCK, Generation(3), None)));
        for bad in ["+7_3_9.blk", "7_03.rbw", "", "7.blk", "7_3.blk", "a_3_9.blk", "7_3_9_1.blk", "7_3_9.tmp"] {
            assert_eq!(parse_name(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn checksums_combine_as_the_crate_does_it(first: u32, second: u32, length in 0u32..=u32::MAX) {
            let expected = crc32c::crc32c_combine(first, second, length as usize);
            prop_assert_eq!(combine_crc32c(first, second, length), expected);
        }

        #[test]
        fn range_covers_what_is_asked(offset in 0u64..4_000_000, length in 1u64..1_000_000) {
            let (bytes, index, data) = file(40, 100_000);
            match index.file_range(offset, length) {
                None => prop_assert!(offset + length > data.len() as u64),
                Some(range) => {
                    let mut at = range.start as usize;
                    let mut got = Vec::new();
                    let mut first = None;
                    while at < range.end as usize {
                        let header = FrameHeader::decode(BLOCK, &bytes[at..]).unwrap();
                        first.get_or_insert(header.offset);
                        let payload = Bytes::copy_from_slice(&bytes[at + 32..at + header.frame_bytes()]);
                        got.extend_from_slice(&header.open(payload).unwrap());
                        at += header.frame_bytes();
                    }
                    let skip = (offset - first.unwrap()) as usize;
                    prop_assert_eq!(&got[skip..skip + length as usize], &data[offset as usize..(offset + length) as usize]);
                }
            }
        }

        #[test]
        fn a_flipped_bit_in_header_or_tail_is_found(at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let (mut bytes, index, _) = file(5, 300_000);
            let frames = HEADER_BYTES..index.frames_end() as usize;
            let outside: Vec<usize> = (0..bytes.len()).filter(|i| !frames.contains(i)).collect();
            let at = *at.get(&outside);
            bytes[at] ^= 1 << bit;
            prop_assert!(open(&bytes).is_err());
        }

        #[test]
        fn a_cut_is_found(keep in any::<prop::sample::Index>()) {
            let (bytes, _, _) = file(3, 300_000);
            prop_assert!(open(&bytes[..keep.index(bytes.len())]).is_err());
        }
    }
}

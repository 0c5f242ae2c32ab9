//! The file in which a map task leaves its output, and in which it spills: partitions one after the other, each a sequence
//! of chunks of records sorted by key, then an index, then a footer.
//!
//! A datanode finds a partition through the footer and one index entry and sends its bytes as they are; only reducers look into chunks.
//! The file is written aside and renamed when it is whole; it is not synced: after a crash of the machine the job that it belonged to is gone.
//!
//! Chunk: header of 16 bytes, little endian, then `stored_len` bytes.
//!
//! | at | size | field | |
//! |---|---|---|---|
//! | 0 | 1 | kind | `0xC7` |
//! | 1 | 1 | codec | 0 stored, 1 zstd |
//! | 2 | 2 | flags | reserved, must be 0 |
//! | 4 | 4 | raw_len | bytes of records, 1 to [`MAX_CHUNK_RAW_BYTES`] |
//! | 8 | 4 | stored_len | bytes that follow, at most raw_len |
//! | 12 | 4 | crc | CRC-32 of bytes 0 to 11 and of the stored bytes |
//!
//! Record inside a chunk: key length and value length as LEB128, key, value. No record spans two chunks.
//!
//! Index: per partition 40 bytes: offset u64, stored bytes u64, raw bytes u64, records u64, CRC-32 of those 32 bytes and of the partition's number
//! (u32), 0 u32. Footer, the last 32 bytes: magic `CAIRNMO1`, partitions u32, 0 u32, offset of the index u64, 0 u32, CRC-32 of bytes 0 to 27.

use crate::error::{Error, ErrorCode, Result};
use crate::frame::le64;

/// Bytes of a chunk header.
pub const CHUNK_HEADER_BYTES: usize = 16;
/// Records that a writer gathers in a chunk, bytes.
pub const CHUNK_RAW_BYTES: usize = 128 << 10;
/// Largest record: key and value together.
pub const MAX_RECORD_BYTES: usize = 16 << 20;
/// No chunk holds more.
pub const MAX_CHUNK_RAW_BYTES: usize = MAX_RECORD_BYTES + CHUNK_RAW_BYTES + 64;
/// Bytes of an index entry.
pub const INDEX_ENTRY_BYTES: usize = 40;
/// Bytes of the footer.
pub const FOOTER_BYTES: usize = 32;
/// Most partitions of a job.
pub const MAX_PARTITIONS: u32 = 65_536;

const CHUNK_KIND: u8 = 0xC7;
const MAGIC: &[u8; 8] = b"CAIRNMO1";

/// A chunk's header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ChunkHeader {
    /// Stored with zstd?
    pub compressed: bool,
    /// Bytes of records.
    pub raw_len: u32,
    /// Bytes that follow the header.
    pub stored_len: u32,
    crc: u32,
}

/// Where one partition lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PartitionEntry {
    /// Its first byte in the file.
    pub offset: u64,
    /// Bytes in the file.
    pub stored: u64,
    /// Bytes of records before compression.
    pub raw: u64,
    /// Records.
    pub records: u64,
}

/// The end of the file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Footer {
    /// How many partitions there are.
    pub partitions: u32,
    /// Where the index starts.
    pub index_offset: u64,
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn corrupt(text: String) -> Error {
    Error::new(ErrorCode::Corrupt, text)
}

impl ChunkHeader {
    /// Header of a chunk with these stored bytes, as it is written.
    pub fn encode(compressed: bool, raw_len: usize, stored: &[u8]) -> [u8; CHUNK_HEADER_BYTES] {
        let mut out = [0; CHUNK_HEADER_BYTES];
        out[0] = CHUNK_KIND;
        out[1] = u8::from(compressed);
        out[4..8].copy_from_slice(&(raw_len as u32).to_le_bytes());
        out[8..12].copy_from_slice(&(stored.len() as u32).to_le_bytes());
        let crc = Self::crc_of(&out[..12], stored);
        out[12..].copy_from_slice(&crc.to_le_bytes());
        out
    }

    fn crc_of(head: &[u8], stored: &[u8]) -> u32 {
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(head);
        hasher.update(stored);
        hasher.finalize()
    }

    /// Reads a header; its lengths are in range, the stored bytes are yet to be checked.
    pub fn decode(bytes: &[u8; CHUNK_HEADER_BYTES]) -> Result<Self> {
        if bytes[0] != CHUNK_KIND || bytes[1] > 1 || bytes[2] != 0 || bytes[3] != 0 {
            return Err(corrupt(format!("not a chunk of map output (it starts with {:02x?})", &bytes[..4])));
        }
        let (raw_len, stored_len) = (le32(bytes, 4), le32(bytes, 8));
        let limit = MAX_CHUNK_RAW_BYTES as u32;
        if raw_len == 0 || raw_len > limit || stored_len == 0 || stored_len > raw_len {
            return Err(corrupt(format!("a chunk of map output claims {stored_len} stored and {raw_len} raw bytes")));
        }
        Ok(Self { compressed: bytes[1] == 1, raw_len, stored_len, crc: le32(bytes, 12) })
    }

    /// Checks the stored bytes that followed the header.
    pub fn verify(&self, stored: &[u8]) -> Result<()> {
        let mut head = [0; 12];
        head[0] = CHUNK_KIND;
        head[1] = u8::from(self.compressed);
        head[4..8].copy_from_slice(&self.raw_len.to_le_bytes());
        head[8..12].copy_from_slice(&self.stored_len.to_le_bytes());
        if stored.len() != self.stored_len as usize || Self::crc_of(&head, stored) != self.crc {
            return Err(corrupt("a chunk of map output does not verify".into()));
        }
        Ok(())
    }
}

impl PartitionEntry {
    /// The entry of partition `number`, as it is written.
    pub fn encode(&self, number: u32) -> [u8; INDEX_ENTRY_BYTES] {
        let mut out = [0; INDEX_ENTRY_BYTES];
        for (at, value) in [self.offset, self.stored, self.raw, self.records].into_iter().enumerate() {
            out[at * 8..at * 8 + 8].copy_from_slice(&value.to_le_bytes());
        }
        let crc = Self::crc_of(&out[..32], number);
        out[32..36].copy_from_slice(&crc.to_le_bytes());
        out
    }

    fn crc_of(fields: &[u8], number: u32) -> u32 {
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(fields);
        hasher.update(&number.to_le_bytes());
        hasher.finalize()
    }

    /// Reads and verifies the entry of partition `number`.
    pub fn decode(bytes: &[u8; INDEX_ENTRY_BYTES], number: u32) -> Result<Self> {
        if Self::crc_of(&bytes[..32], number) != le32(bytes, 32) {
            return Err(corrupt(format!("the index entry of partition {number} does not verify")));
        }
        let field = |at| le64(bytes, at);
        Ok(Self { offset: field(0), stored: field(8), raw: field(16), records: field(24) })
    }
}

impl Footer {
    /// As it is written.
    pub fn encode(&self) -> [u8; FOOTER_BYTES] {
        let mut out = [0; FOOTER_BYTES];
        out[..8].copy_from_slice(MAGIC);
        out[8..12].copy_from_slice(&self.partitions.to_le_bytes());
        out[16..24].copy_from_slice(&self.index_offset.to_le_bytes());
        let crc = crc32fast::hash(&out[..28]);
        out[28..].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// Reads and verifies the last bytes of a file of `file_length` bytes.
    pub fn decode(bytes: &[u8; FOOTER_BYTES], file_length: u64) -> Result<Self> {
        if &bytes[..8] != MAGIC || crc32fast::hash(&bytes[..28]) != le32(bytes, 28) {
            return Err(corrupt("the footer of the map output does not verify (the file is cut or damaged)".into()));
        }
        let footer = Self { partitions: le32(bytes, 8), index_offset: le64(bytes, 16) };
        let index_bytes = u64::from(footer.partitions) * INDEX_ENTRY_BYTES as u64;
        if footer.partitions > MAX_PARTITIONS
            || footer.index_offset.checked_add(index_bytes + FOOTER_BYTES as u64) != Some(file_length)
        {
            return Err(corrupt("the footer of the map output does not fit its file".into()));
        }
        Ok(footer)
    }

    /// Where the entry of `partition` lies; refuses one that does not exist.
    pub fn entry_offset(&self, partition: u32) -> Result<u64> {
        if partition >= self.partitions {
            let text = format!("there is no partition {partition}: the map output has {}", self.partitions);
            return Err(Error::new(ErrorCode::InvalidArgument, text));
        }
        Ok(self.index_offset + u64::from(partition) * INDEX_ENTRY_BYTES as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_comes_back() {
        let stored = b"some records";
        let bytes = ChunkHeader::encode(true, 100, stored);
        let header = ChunkHeader::decode(&bytes).unwrap();
        assert_eq!((header.compressed, header.raw_len, header.stored_len), (true, 100, 12));
        header.verify(stored).unwrap();
        let entry = PartitionEntry { offset: 1, stored: 2, raw: 3, records: 4 };
        assert_eq!(PartitionEntry::decode(&entry.encode(9), 9).unwrap(), entry);
        let footer = Footer { partitions: 2, index_offset: 50 };
        assert_eq!(Footer::decode(&footer.encode(), 50 + 80 + 32).unwrap(), footer);
        assert_eq!(footer.entry_offset(1).unwrap(), 90);
        assert!(footer.entry_offset(2).is_err());
    }

    #[test]
    fn each_flipped_bit_is_noticed() {
        let stored = b"some records";
        let chunk = ChunkHeader::encode(false, 12, stored);
        for bit in 0..chunk.len() * 8 {
            let mut bad = chunk;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(ChunkHeader::decode(&bad).and_then(|header| header.verify(stored)).is_err(), "bit {bit}");
        }
        let entry = PartitionEntry { offset: 1, stored: 2, raw: 3, records: 4 }.encode(7);
        for bit in 0..36 * 8 {
            let mut bad = entry;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(PartitionEntry::decode(&bad, 7).is_err(), "bit {bit}");
        }
        assert!(PartitionEntry::decode(&entry, 8).is_err(), "another partition's entry");
        let footer = Footer { partitions: 2, index_offset: 50 }.encode();
        for bit in 0..footer.len() * 8 {
            let mut bad = footer;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Footer::decode(&bad, 162).is_err(), "bit {bit}");
        }
        assert!(Footer::decode(&footer, 163).is_err());
    }
}

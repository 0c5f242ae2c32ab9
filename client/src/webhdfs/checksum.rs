//! `GETFILECHECKSUM`: the checksum that Hadoop gives for a file, so that copies can be compared across file systems.
//!
//! It is the MD5 of the MD5s, block by block, of the CRC-32C of each 512 bytes. It thus depends on where blocks end: files with the same bytes have the
//! same checksum if their blocks have the same lengths. The data is read and verified for it.

use cairn_common::net::http::{self, Answer, StatusCode};
use md5::{Digest, Md5};
use serde_json::json;

use super::Call;
use crate::fs::{FileReader, Result};

/// Bytes under one CRC.
const CHUNK: usize = 512;
/// Of the checksum itself: bytes per CRC, CRCs per block, MD5.
const LENGTH: usize = 4 + 8 + 16;

pub async fn checksum(call: Call) -> Result<Answer> {
    let mut reader = call.reader().await?;
    let blocks = call.fs.block_locations(&call.path, 0, 0).await?;
    let starts: Vec<u64> = blocks.iter().map(|block| block.offset).filter(|offset| *offset < reader.length()).collect();
    let sum = fold(&mut reader, &starts).await?;
    let mut bytes = sum.bytes();
    // Java's clients know the buffer in which it is made, which is four bytes longer.
    bytes.resize(32, 0);
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let body = json!({ "FileChecksum": { "algorithm": sum.algorithm(), "bytes": hex, "length": LENGTH } });
    Ok(http::json(StatusCode::OK, body.to_string()))
}

async fn fold(reader: &mut FileReader, starts: &[u64]) -> Result<Md5OfMd5s> {
    let mut file = FileSum::default();
    for (at, _) in starts.iter().enumerate() {
        let end = starts.get(at + 1).copied().unwrap_or(reader.length());
        let mut block = BlockSum::default();
        while reader.position() < end {
            let Some(mut piece) = reader.next_chunk().await? else { break };
            let behind = reader.position().saturating_sub(end) as usize;
            if behind > 0 {
                // The rest of the piece belongs to the next block.
                piece.truncate(piece.len() - behind);
                reader.seek(end);
            }
            block.add(&piece);
        }
        file.add(block);
    }
    Ok(file.finish())
}

/// The MD5 of the CRCs of one block.
#[derive(Default)]
struct BlockSum {
    crcs: u64,
    md5: Md5,
    /// CRC and length of a chunk that is not full.
    open: (u32, usize),
}

impl BlockSum {
    fn add(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let (crc, filled) = self.open;
            let (now, later) = bytes.split_at((CHUNK - filled).min(bytes.len()));
            self.open = (crc32c::crc32c_append(crc, now), filled + now.len());
            if self.open.1 == CHUNK {
                self.end_chunk();
            }
            bytes = later;
        }
    }

    fn end_chunk(&mut self) {
        self.md5.update(self.open.0.to_be_bytes());
        self.crcs += 1;
        self.open = (0, 0);
    }
}

/// The MD5 of the MD5s of all blocks.
#[derive(Default)]
struct FileSum {
    blocks: u64,
    first_crcs: u64,
    md5s: Vec<u8>,
}

/// A finished checksum; of a file without blocks all but the MD5 is 0.
#[derive(PartialEq, Eq, Debug)]
struct Md5OfMd5s {
    bytes_per_crc: u32,
    crcs_per_block: u64,
    md5: [u8; 16],
}

impl FileSum {
    fn add(&mut self, mut block: BlockSum) {
        if block.open.1 > 0 {
            block.end_chunk();
        }
        if self.blocks == 0 {
            self.first_crcs = block.crcs;
        }
        self.blocks += 1;
        self.md5s.extend_from_slice(&block.md5.finalize());
    }

    fn finish(mut self) -> Md5OfMd5s {
        // Hadoop takes the MD5 of the whole buffer in which it collects, which starts with 32 bytes and doubles as it fills up.
        let room = self.md5s.len().max(32).next_power_of_two();
        self.md5s.resize(room, 0);
        Md5OfMd5s {
            bytes_per_crc: if self.blocks == 0 { 0 } else { CHUNK as u32 },
            crcs_per_block: if self.blocks > 1 { self.first_crcs } else { 0 },
            md5: Md5::digest(&self.md5s).into(),
        }
    }
}

impl Md5OfMd5s {
    fn algorithm(&self) -> String {
        let kind = if self.bytes_per_crc == 0 { "CRC32" } else { "CRC32C" };
        format!("MD5-of-{}MD5-of-{}{kind}", self.crcs_per_block, self.bytes_per_crc)
    }

    fn bytes(&self) -> Vec<u8> {
        [&self.bytes_per_crc.to_be_bytes()[..], &self.crcs_per_block.to_be_bytes(), &self.md5].concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn of(blocks: &[&[u8]]) -> Md5OfMd5s {
        let mut file = FileSum::default();
        for bytes in blocks {
            let mut block = BlockSum::default();
            // Pieces of any length give the same.
            bytes.chunks(700).for_each(|piece| block.add(piece));
            file.add(block);
        }
        file.finish()
    }

    #[test]
    fn an_empty_file_has_the_checksum_that_hdfs_gives_it() {
        let sum = of(&[]);
        assert_eq!(sum.algorithm(), "MD5-of-0MD5-of-0CRC32");
        assert_eq!(hex(&sum.bytes()), "00000000000000000000000070bc8f4b72a86921468bf8e8441dce51");
    }

    #[test]
    fn blocks_count_by_their_chunks() {
        let data: Vec<u8> = (0..2_000u32).map(|at| (at % 251) as u8).collect();
        let one = of(&[&data]);
        assert_eq!(one.algorithm(), "MD5-of-0MD5-of-512CRC32C");
        let two = of(&[&data[..1_024], &data[1_024..]]);
        assert_eq!(two.algorithm(), "MD5-of-2MD5-of-512CRC32C");
        assert_ne!(one.md5, two.md5);
        // By hand: the CRCs of four chunks, their MD5, and that in a buffer of 32 bytes.
        let crcs: Vec<u8> = data.chunks(512).flat_map(|chunk| crc32c::crc32c(chunk).to_be_bytes()).collect();
        let mut buffer = Md5::digest(&crcs).to_vec();
        buffer.resize(32, 0);
        assert_eq!(one.md5, <[u8; 16]>::from(Md5::digest(&buffer)));
    }
}

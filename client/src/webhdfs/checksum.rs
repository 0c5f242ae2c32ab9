//! `GETFILECHECKSUM`: the checksum that Hadoop gives for a file, so that copies can be compared across file systems.
//!
//! It is the MD5 of the MD5s, block by block, of the CRC-32C of each 512 bytes. It thus depends on where blocks end: files with the same bytes have the
//! same checksum if their blocks have the same lengths. Each block is read, verified and summed up by a datanode that holds it, which Hadoop's data
//! transfer has an operation for; only the sums travel.

use cairn_common::net::http::{self, Answer, StatusCode};
use cairn_proto::hadoop::{BlockChecksumType, ExtendedBlock};
use futures_util::{StreamExt as _, TryStreamExt as _};
use md5::{Digest, Md5};
use serde_json::json;

use super::Call;
use crate::fs::{Error, ErrorCode, FileSystem, LocatedBlock, Replica, Result};

/// Of the checksum itself: bytes per CRC, CRCs per block, MD5.
const LENGTH: usize = 4 + 8 + 16;
/// Blocks that are asked for at a time.
const AT_ONCE: usize = 4;

/// Ends when the client leaves: then no further block is asked for.
pub async fn checksum(call: Call) -> Result<Answer> {
    // Says what cannot be read in the words of an open.
    let length = call.reader().await?.length();
    let blocks = call.fs.block_locations(&call.path, 0, 0).await?;
    let blocks = blocks.into_iter().filter(|block| block.offset < length);
    let sums: Vec<_> = blocks.map(|block| block_sum(call.fs.clone(), call.path.clone(), block)).collect();
    let sums: Vec<BlockSum> = futures_util::stream::iter(sums).buffered(AT_ONCE).try_collect().await?;
    let mut file = FileSum::default();
    sums.into_iter().for_each(|sum| file.add(&sum));
    let sum = file.finish();
    let mut bytes = sum.bytes();
    // Java's clients know the buffer in which it is made, which is four bytes longer.
    bytes.resize(32, 0);
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let body = json!({ "FileChecksum": { "algorithm": sum.algorithm(), "bytes": hex, "length": LENGTH } });
    Ok(http::json(StatusCode::OK, body.to_string()))
}

/// The MD5 of the CRCs of one block.
struct BlockSum {
    bytes_per_crc: u32,
    crcs: u64,
    md5: Vec<u8>,
}

/// Asks the holders of a block one after the other.
async fn block_sum(fs: FileSystem, path: String, located: LocatedBlock) -> Result<BlockSum> {
    let mut failures = Vec::new();
    for replica in &located.replicas {
        match ask(&fs, replica, &located).await {
            Ok(sum) => return Ok(sum),
            Err(error) => failures.push(format!("{}: {error}", replica.address)),
        }
    }
    let id = located.block.as_ref().map_or(0, |block| block.id);
    let why = if failures.is_empty() { "it has no replica".into() } else { failures.join("; ") };
    let text = format!("no replica of block {id} of {path} gives its checksum: {why}");
    Err(Error::new(ErrorCode::BlockNotFound, text).with_subject(path))
}

async fn ask(fs: &FileSystem, replica: &Replica, located: &LocatedBlock) -> Result<BlockSum> {
    let block = located.block.clone().unwrap_or_default();
    let block = ExtendedBlock {
        pool_id: block.pool,
        block_id: block.id as u64,
        generation_stamp: block.generation,
        num_bytes: located.complete.then_some(located.length),
    };
    let machine = (&fs.env().net, &fs.env().clock);
    let sum = cairn_hdfs::block_checksum(machine, &replica.address, block, BlockChecksumType::Md5crc).await?;
    Ok(BlockSum { bytes_per_crc: sum.bytes_per_crc, crcs: sum.crc_per_block, md5: sum.block_checksum.to_vec() })
}

/// The MD5 of the MD5s of all blocks.
#[derive(Default)]
struct FileSum {
    blocks: u64,
    bytes_per_crc: u32,
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
    fn add(&mut self, block: &BlockSum) {
        if self.blocks == 0 {
            (self.first_crcs, self.bytes_per_crc) = (block.crcs, block.bytes_per_crc);
        }
        self.blocks += 1;
        self.md5s.extend_from_slice(&block.md5);
    }

    fn finish(mut self) -> Md5OfMd5s {
        // Hadoop takes the MD5 of the whole buffer in which it collects, which starts with 32 bytes and doubles as it fills up.
        let room = self.md5s.len().max(32).next_power_of_two();
        self.md5s.resize(room, 0);
        Md5OfMd5s {
            bytes_per_crc: self.bytes_per_crc,
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
            let crcs: Vec<u8> = bytes.chunks(512).flat_map(|chunk| crc32c::crc32c(chunk).to_be_bytes()).collect();
            file.add(&BlockSum { bytes_per_crc: 512, crcs: crcs.len() as u64 / 4, md5: Md5::digest(&crcs).to_vec() });
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

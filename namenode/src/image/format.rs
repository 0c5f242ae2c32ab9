//! The bytes of an image.
//!
//! # File `image/image_<S, 20 digits>.img`
//! The exact state after transaction S. All numbers little endian.
//!
//! | at | size | header (96 bytes) |
//! |---|---|---|
//! | 0 | 8 | magic `CAIRNIMG` |
//! | 8 | 2 | version of this format |
//! | 10 | 2 | lowest version of a reader that understands it |
//! | 12 | 4 | 0 |
//! | 16 | 8 | S |
//! | 24 | 8 | epoch |
//! | 32 | 48 | cluster id, ASCII, padded with zeros |
//! | 80 | 8 | digest of the state, as the core computes it: compared when the image is loaded |
//! | 88 | 4 | 0 |
//! | 92 | 4 | CRC-32C of bytes 0..92 |
//!
//! | size | section, one per page, one after the other |
//! |---|---|
//! | 4 | magic `PAGE` |
//! | 4 | bytes of the page |
//! | 4 | bytes stored (zstd) |
//! | 4 | CRC-32C of the page's number (8 bytes), the two lengths and the stored bytes |
//! | n | the page, compressed |
//!
//! | size | trailer (48 bytes) |
//! |---|---|
//! | 4 | magic `TAIL` |
//! | 4 | 0 |
//! | 8 | pages |
//! | 8 | digest: sum (wrapping) of the pages' own 64-bit digests, so it does not depend on their order |
//! | 8 | S again |
//! | 8 | bytes of the whole file |
//! | 4 | CRC-32C of everything before this field |
//! | 4 | CRC-32C of the 44 bytes before this field: tells an altered trailer from an altered file |
//!
//! # Write order, and why
//! Written as `image_<S>.tmp`, synced, renamed, folder synced, then read back and verified: only then may older images and
//! log segments go. A crash leaves a `.tmp`, which the next start removes, or a whole image.

use cairn_proto::ids::{Epoch, TxId};

use crate::journal::format::{cluster_field, cluster_text, numbered, u32_at, u64_at};

/// Version of the format that is written.
pub const VERSION: u16 = 1;
/// Bytes of the header.
pub const HEADER_BYTES: usize = 96;
/// Bytes before the stored bytes of a section.
pub const SECTION_BYTES: usize = 16;
/// Bytes of the trailer.
pub const TRAILER_BYTES: usize = 48;
/// Largest page, before and after compression.
pub const MAX_PAGE_BYTES: usize = 256 << 20;

const MAGIC: &[u8; 8] = b"CAIRNIMG";
/// First bytes of a section.
pub const PAGE_MAGIC: &[u8; 4] = b"PAGE";
/// First bytes of the trailer.
pub const TRAILER_MAGIC: &[u8; 4] = b"TAIL";

/// What an image says of itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ImageHeader {
    /// The transaction whose state it is.
    pub txid: TxId,
    /// Epoch when it was made.
    pub epoch: Epoch,
    /// Whose it is.
    pub cluster_id: String,
    /// Digest of the state, as the core computes it.
    pub state_digest: u64,
}

impl ImageHeader {
    /// Its bytes.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        out[..8].copy_from_slice(MAGIC);
        out[8..10].copy_from_slice(&VERSION.to_le_bytes());
        out[10..12].copy_from_slice(&VERSION.to_le_bytes());
        out[16..24].copy_from_slice(&self.txid.0.to_le_bytes());
        out[24..32].copy_from_slice(&self.epoch.0.to_le_bytes());
        out[32..80].copy_from_slice(&cluster_field(&self.cluster_id));
        out[80..88].copy_from_slice(&self.state_digest.to_le_bytes());
        let crc = crc32c::crc32c(&out[..92]);
        out[92..].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// Reads it; the outer error is a newer version's number, the inner one what is wrong.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Result<Self, &'static str>, u16> {
        if &bytes[..8] != MAGIC {
            return Ok(Err("this is no image"));
        }
        if crc32c::crc32c(&bytes[..92]) != u32_at(bytes, 92) {
            return Ok(Err("the checksum of the header differs"));
        }
        if u16::from_le_bytes([bytes[10], bytes[11]]) > VERSION {
            return Err(u16::from_le_bytes([bytes[8], bytes[9]]));
        }
        Ok(Ok(Self {
            txid: TxId(u64_at(bytes, 16)),
            epoch: Epoch(u64_at(bytes, 24)),
            cluster_id: cluster_text(&bytes[32..80]),
            state_digest: u64_at(bytes, 80),
        }))
    }
}

/// A section's head.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Section {
    /// Bytes of the page.
    pub raw: usize,
    /// Bytes stored.
    pub stored: usize,
    /// Checksum.
    pub crc: u32,
}

impl Section {
    /// The head of page number `index` with these stored bytes.
    pub fn of(index: u64, raw: usize, stored: &[u8]) -> Self {
        let crc = Self::checksum(index, raw, stored);
        Self { raw, stored: stored.len(), crc }
    }

    /// What `crc` must be.
    pub fn checksum(index: u64, raw: usize, stored: &[u8]) -> u32 {
        let crc = crc32c::crc32c(&index.to_le_bytes());
        let crc = crc32c::crc32c_append(crc, &(raw as u32).to_le_bytes());
        let crc = crc32c::crc32c_append(crc, &(stored.len() as u32).to_le_bytes());
        crc32c::crc32c_append(crc, stored)
    }

    /// Its bytes.
    pub fn encode(&self) -> [u8; SECTION_BYTES] {
        let mut out = [0; SECTION_BYTES];
        out[..4].copy_from_slice(PAGE_MAGIC);
        out[4..8].copy_from_slice(&(self.raw as u32).to_le_bytes());
        out[8..12].copy_from_slice(&(self.stored as u32).to_le_bytes());
        out[12..].copy_from_slice(&self.crc.to_le_bytes());
        out
    }

    /// Reads it; `None` if it is none, or larger than a page may be.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        if bytes.get(..4)? != PAGE_MAGIC || bytes.len() < SECTION_BYTES {
            return None;
        }
        let (raw, stored) = (u32_at(bytes, 4) as usize, u32_at(bytes, 8) as usize);
        (raw <= MAX_PAGE_BYTES && stored <= MAX_PAGE_BYTES).then_some(Self { raw, stored, crc: u32_at(bytes, 12) })
    }
}

/// The end of an image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Trailer {
    /// Pages.
    pub pages: u64,
    /// Sum of [`page_digest`].
    pub digest: u64,
    /// The transaction whose state it is.
    pub txid: TxId,
    /// Bytes of the whole file.
    pub file_bytes: u64,
}

impl Trailer {
    /// Its bytes; `crc` is the CRC-32C of everything in the file before it.
    pub fn encode(&self, crc: u32) -> [u8; TRAILER_BYTES] {
        let mut out = [0; TRAILER_BYTES];
        out[..4].copy_from_slice(TRAILER_MAGIC);
        out[8..16].copy_from_slice(&self.pages.to_le_bytes());
        out[16..24].copy_from_slice(&self.digest.to_le_bytes());
        out[24..32].copy_from_slice(&self.txid.0.to_le_bytes());
        out[32..40].copy_from_slice(&self.file_bytes.to_le_bytes());
        let crc = crc32c::crc32c_append(crc, &out[..40]);
        out[40..44].copy_from_slice(&crc.to_le_bytes());
        let own = crc32c::crc32c(&out[..44]);
        out[44..].copy_from_slice(&own.to_le_bytes());
        out
    }

    /// Reads it and checks both checksums; `crc` as in [`Self::encode`].
    pub fn decode(bytes: &[u8; TRAILER_BYTES], crc: u32) -> Result<Self, &'static str> {
        if &bytes[..4] != TRAILER_MAGIC || crc32c::crc32c(&bytes[..44]) != u32_at(bytes, 44) {
            return Err("the trailer is damaged");
        }
        if crc32c::crc32c_append(crc, &bytes[..40]) != u32_at(bytes, 40) {
            return Err("the checksum of the whole image differs");
        }
        Ok(Self {
            pages: u64_at(bytes, 8),
            digest: u64_at(bytes, 16),
            txid: TxId(u64_at(bytes, 24)),
            file_bytes: u64_at(bytes, 32),
        })
    }
}

/// 64 bits of one page: two checksums of different polynomials.
pub fn page_digest(page: &[u8]) -> u64 {
    u64::from(crc32c::crc32c(page)) << 32 | u64::from(crc32fast::hash(page))
}

/// Name of the image of `txid`.
pub fn image_name(txid: TxId) -> String {
    format!("image_{:020}.img", txid.0)
}

/// The transaction in an image's name; `None` if it is no image's name.
pub fn parse_image_name(name: &str) -> Option<TxId> {
    numbered(name, "image_", ".img")
}

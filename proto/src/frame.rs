//! Frames: the unit in which a block's data is compressed and checksummed, once, by the client.
//!
//! The same bytes go over the wire, through the pipeline, onto disk and back to the reader. A datanode checks the stored
//! bytes and never recompresses; a reader checks the raw data after it has decompressed it.
//!
//! Header, 32 bytes, little endian, followed by `stored_len` bytes of payload:
//!
//! | at | size | field | |
//! |---|---|---|---|
//! | 0 | 1 | kind | `0xCF`; other values are markers of the write stream ([`crate::dataplane`]) |
//! | 1 | 1 | codec | 0 stored, 1 zstd |
//! | 2 | 2 | flags | reserved, must be 0; bit 0 will mean encrypted |
//! | 4 | 4 | raw_len | bytes of file data, 1 to 4 MiB |
//! | 8 | 4 | stored_len | bytes of payload, at most raw_len (a frame that does not shrink is stored) |
//! | 12 | 4 | raw_crc | CRC-32C of the raw data, taken before compression |
//! | 16 | 8 | offset | where the raw data starts in the block |
//! | 24 | 4 | stored_crc | CRC-32 of the payload |
//! | 28 | 4 | header_crc | CRC-32 of the block id (8 bytes LE) and bytes 0 to 27: a misplaced frame does not verify |

use bytes::Bytes;
use zstd::zstd_safe::CParameter;

use crate::ids::BlockId;

/// Bytes of a frame header.
pub const FRAME_HEADER_BYTES: usize = 32;
/// File data per frame that writers aim at.
pub const DEFAULT_FRAME_RAW_BYTES: usize = 256 << 10;
/// No frame holds more file data than this, so a reader's memory is bounded.
pub const MAX_FRAME_RAW_BYTES: usize = 4 << 20;
/// First byte of a frame header.
pub const FRAME_KIND: u8 = 0xCF;

/// zstd level that writers use: the fastest that still shrinks text five times.
pub const ZSTD_LEVEL: i32 = 1;
/// Shorter matches are not looked for, as zstd itself does at this level for larger inputs: about a tenth faster both ways, for 1.5 % more bytes of text.
const MIN_MATCH: u32 = 7;

/// How a frame's payload is stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Codec {
    /// As it is.
    Stored,
    /// zstd.
    Zstd,
}

/// Why bytes are not a frame, or not this block's.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FrameError {
    /// Fewer bytes than a header or its payload needs.
    #[error("cut: {have} of {need} bytes")]
    Cut {
        /// Bytes there are.
        have: usize,
        /// Bytes needed.
        need: usize,
    },
    /// First byte is not a frame's.
    #[error("not a frame (first byte {0:#04x})")]
    NotAFrame(u8),
    /// Header does not verify: damaged, or another block's.
    #[error("frame header does not verify (damaged, or of another block)")]
    HeaderChecksum,
    /// A field is out of range.
    #[error("frame header is out of range: {0}")]
    OutOfRange(&'static str),
    /// Payload does not verify.
    #[error("stored bytes of the frame at {offset} do not verify")]
    StoredChecksum {
        /// Where the frame starts in the block.
        offset: u64,
    },
    /// Decompressed data does not verify.
    #[error("data of the frame at {offset} does not verify after decompression")]
    RawChecksum {
        /// Where the frame starts in the block.
        offset: u64,
    },
    /// The payload is not what its codec needs.
    #[error("frame at {offset} does not decompress: {reason}")]
    Decompress {
        /// Where the frame starts in the block.
        offset: u64,
        /// The codec's words.
        reason: String,
    },
}

/// A verified frame header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FrameHeader {
    /// How the payload is stored.
    pub codec: Codec,
    /// Bytes of file data.
    pub raw_len: u32,
    /// Bytes of payload.
    pub stored_len: u32,
    /// CRC-32C of the raw data.
    pub raw_crc: u32,
    /// Where the raw data starts in the block.
    pub offset: u64,
    /// CRC-32 of the payload.
    pub stored_crc: u32,
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

pub(crate) fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from(le32(bytes, at)) | (u64::from(le32(bytes, at + 4)) << 32)
}

/// CRC of a header's first 28 bytes, seeded with the block.
pub(crate) fn header_crc(block: BlockId, bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&block.0.to_le_bytes());
    hasher.update(bytes);
    hasher.finalize()
}

impl FrameHeader {
    /// As it is on wire and disk.
    pub fn encode(&self, block: BlockId) -> [u8; FRAME_HEADER_BYTES] {
        let mut out = [0; FRAME_HEADER_BYTES];
        out[0] = FRAME_KIND;
        out[1] = match self.codec {
            Codec::Stored => 0,
            Codec::Zstd => 1,
        };
        out[4..8].copy_from_slice(&self.raw_len.to_le_bytes());
        out[8..12].copy_from_slice(&self.stored_len.to_le_bytes());
        out[12..16].copy_from_slice(&self.raw_crc.to_le_bytes());
        out[16..24].copy_from_slice(&self.offset.to_le_bytes());
        out[24..28].copy_from_slice(&self.stored_crc.to_le_bytes());
        let crc = header_crc(block, &out[..28]);
        out[28..32].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// Reads and verifies a header; `bytes` may hold more than it.
    pub fn decode(block: BlockId, bytes: &[u8]) -> Result<Self, FrameError> {
        if bytes.len() < FRAME_HEADER_BYTES {
            return Err(FrameError::Cut { have: bytes.len(), need: FRAME_HEADER_BYTES });
        }
        if bytes[0] != FRAME_KIND {
            return Err(FrameError::NotAFrame(bytes[0]));
        }
        if header_crc(block, &bytes[..28]) != le32(bytes, 28) {
            return Err(FrameError::HeaderChecksum);
        }
        let codec = match bytes[1] {
            0 => Codec::Stored,
            1 => Codec::Zstd,
            _ => return Err(FrameError::OutOfRange("unknown codec")),
        };
        if bytes[2..4] != [0, 0] {
            return Err(FrameError::OutOfRange("unknown flags"));
        }
        let header = Self {
            codec,
            raw_len: le32(bytes, 4),
            stored_len: le32(bytes, 8),
            raw_crc: le32(bytes, 12),
            offset: le64(bytes, 16),
            stored_crc: le32(bytes, 24),
        };
        header.check()?;
        Ok(header)
    }

    fn check(&self) -> Result<(), FrameError> {
        if self.raw_len == 0 || self.raw_len as usize > MAX_FRAME_RAW_BYTES {
            return Err(FrameError::OutOfRange("raw length"));
        }
        if self.stored_len == 0 || self.stored_len > self.raw_len {
            return Err(FrameError::OutOfRange("stored length"));
        }
        if self.codec == Codec::Stored && self.stored_len != self.raw_len {
            return Err(FrameError::OutOfRange("stored length of an uncompressed frame"));
        }
        if self.offset.checked_add(u64::from(self.raw_len)).is_none_or(|end| end > crate::MAX_BLOCK_SIZE) {
            return Err(FrameError::OutOfRange("offset"));
        }
        Ok(())
    }

    /// The header of a frame that is stored as it is, its data in parts. `raw_crc`: as in [`Sealer::seal_behind_room`].
    pub fn stored<'a>(offset: u64, parts: impl Iterator<Item = &'a [u8]> + Clone, raw_crc: Option<u32>) -> Self {
        let length = parts.clone().map(<[u8]>::len).sum::<usize>() as u32;
        let raw_crc = raw_crc.unwrap_or_else(|| parts.clone().fold(0, crc32c::crc32c_append));
        let mut stored_crc = crc32fast::Hasher::new();
        parts.for_each(|part| stored_crc.update(part));
        let codec = Codec::Stored;
        Self { codec, raw_len: length, stored_len: length, raw_crc, offset, stored_crc: stored_crc.finalize() }
    }

    /// Where the raw data ends in the block.
    pub fn end(&self) -> u64 {
        self.offset + u64::from(self.raw_len)
    }

    /// Bytes of header and payload together.
    pub fn frame_bytes(&self) -> usize {
        FRAME_HEADER_BYTES + self.stored_len as usize
    }

    /// Checks the payload as a datanode does: without decompressing.
    pub fn verify_stored(&self, payload: &[u8]) -> Result<(), FrameError> {
        if payload.len() != self.stored_len as usize {
            return Err(FrameError::Cut { have: payload.len(), need: self.stored_len as usize });
        }
        if crc32fast::hash(payload) != self.stored_crc {
            return Err(FrameError::StoredChecksum { offset: self.offset });
        }
        Ok(())
    }

    /// Decompresses the payload and verifies the data: the reader's check, end to end.
    pub fn open(&self, payload: Bytes) -> Result<Bytes, FrameError> {
        if payload.len() != self.stored_len as usize {
            return Err(FrameError::Cut { have: payload.len(), need: self.stored_len as usize });
        }
        let raw = match self.codec {
            Codec::Stored => payload,
            Codec::Zstd => {
                let raw = zstd::bulk::decompress(&payload, self.raw_len as usize)
                    .map_err(|error| FrameError::Decompress { offset: self.offset, reason: error.to_string() })?;
                Bytes::from(raw)
            }
        };
        self.verify_raw(&raw)?;
        Ok(raw)
    }

    fn verify_raw(&self, raw: &[u8]) -> Result<(), FrameError> {
        if raw.len() != self.raw_len as usize || crc32c::crc32c(raw) != self.raw_crc {
            return Err(FrameError::RawChecksum { offset: self.offset });
        }
        Ok(())
    }
}

/// Opens one frame after another in the same memory: for those who look at the data and pass it on.
#[derive(Default)]
pub struct Opener {
    zstd: Option<zstd::bulk::Decompressor<'static>>,
    payload: Vec<u8>,
    raw: Vec<u8>,
    /// How much of `raw` is the data of the frame that was opened last.
    length: usize,
}

impl Opener {
    /// As new, in the same memory.
    pub fn emptied(mut self) -> Self {
        self.length = 0;
        self
    }

    /// Room for a frame's payload, with whatever bytes; to be filled, then [`Self::open`]ed.
    pub fn payload(&mut self, header: &FrameHeader) -> &mut [u8] {
        self.length = 0;
        let length = header.stored_len as usize;
        if self.payload.len() < length {
            self.payload.resize(length, 0);
        }
        &mut self.payload[..length]
    }

    /// Decompresses the payload and verifies the data, as [`FrameHeader::open`].
    pub fn open(&mut self, header: &FrameHeader) -> Result<(), FrameError> {
        let mut raw = std::mem::take(&mut self.raw);
        let opened = self.open_into(header, &mut raw, crc32c::crc32c);
        self.raw = raw;
        self.length = if opened.is_ok() { header.raw_len as usize } else { 0 };
        opened
    }

    /// The same, but the data comes to lie at the start of `data`, whose memory is used again, and `crc32c` says what its checksum is: for those who
    /// take checksums of its parts anyway. After an error `data` is of no use.
    pub fn open_into(
        &mut self,
        header: &FrameHeader,
        data: &mut Vec<u8>,
        crc32c: impl FnOnce(&[u8]) -> u32,
    ) -> Result<(), FrameError> {
        let (stored, length, offset) = (header.stored_len as usize, header.raw_len as usize, header.offset);
        self.length = 0;
        if self.payload.len() < stored {
            return Err(FrameError::Cut { have: self.payload.len(), need: stored });
        }
        match header.codec {
            Codec::Stored if stored == length => std::mem::swap(&mut self.payload, data),
            Codec::Stored => return Err(FrameError::RawChecksum { offset }),
            Codec::Zstd => {
                let failed = |error: std::io::Error| FrameError::Decompress { offset, reason: error.to_string() };
                let zstd = match &mut self.zstd {
                    Some(zstd) => zstd,
                    none => none.insert(zstd::bulk::Decompressor::new().map_err(failed)?),
                };
                if data.len() < length {
                    data.resize(length, 0);
                }
                let found = zstd.decompress_to_buffer(&self.payload[..stored], &mut data[..length]).map_err(failed)?;
                if found != length {
                    return Err(FrameError::RawChecksum { offset });
                }
            }
        }
        if crc32c(&data[..length]) != header.raw_crc {
            return Err(FrameError::RawChecksum { offset });
        }
        Ok(())
    }

    /// The data of the frame that was opened last; empty if it was not right.
    pub fn data(&self) -> &[u8] {
        &self.raw[..self.length]
    }
}

/// A sealed frame, ready for the wire.
#[derive(Clone, Debug)]
pub struct Frame {
    /// Its header.
    pub header: FrameHeader,
    /// Its header as bytes.
    pub header_bytes: [u8; FRAME_HEADER_BYTES],
    /// Its payload.
    pub payload: Bytes,
}

/// Makes frames; keeps the compressor's tables between them.
pub struct Sealer {
    zstd: Option<zstd::bulk::Compressor<'static>>,
}

impl Sealer {
    /// One that compresses if `compress`, else stores.
    pub fn new(compress: bool) -> Self {
        let compressor = || {
            let mut zstd = zstd::bulk::Compressor::new(ZSTD_LEVEL)?;
            zstd.set_parameter(CParameter::MinMatch(MIN_MATCH))?;
            Ok::<_, std::io::Error>(zstd)
        };
        Self { zstd: compress.then(compressor).and_then(Result::ok) }
    }

    /// Seals `raw` (1 to [`MAX_FRAME_RAW_BYTES`] bytes) that starts at `offset` of `block`. `try_compress` is the writer's
    /// judgement: on incompressible data it is pointless to try every frame.
    pub fn seal(&mut self, block: BlockId, offset: u64, raw: Bytes, try_compress: bool) -> Frame {
        let small = self.compress(&raw, try_compress);
        let header = header_of(offset, &raw, None, small.as_deref());
        let payload = small.map_or(raw, Bytes::from);
        Frame { header, header_bytes: header.encode(block), payload }
    }

    /// The same for data that lies behind room for the header: the first [`FRAME_HEADER_BYTES`] of `bytes`, whatever they hold. Gives
    /// the whole frame as it goes over the wire, in the same memory unless it shrinks. `raw_crc`: the data's CRC-32C, if it is known from
    /// before the data came here; then it guards this way, too.
    pub fn seal_behind_room(
        &mut self,
        block: BlockId,
        offset: u64,
        mut bytes: Vec<u8>,
        try_compress: bool,
        raw_crc: Option<u32>,
    ) -> (FrameHeader, Vec<u8>) {
        let raw = &bytes[FRAME_HEADER_BYTES..];
        let small = self.compress(raw, try_compress);
        let header = header_of(offset, raw, raw_crc, small.as_deref());
        if let Some(small) = small {
            bytes = Vec::with_capacity(header.frame_bytes());
            bytes.extend_from_slice(&[0; FRAME_HEADER_BYTES]);
            bytes.extend_from_slice(&small);
        }
        bytes[..FRAME_HEADER_BYTES].copy_from_slice(&header.encode(block));
        (header, bytes)
    }

    /// `None`: it is to be stored.
    fn compress(&mut self, raw: &[u8], try_compress: bool) -> Option<Vec<u8>> {
        debug_assert!(!raw.is_empty() && raw.len() <= MAX_FRAME_RAW_BYTES, "frame size");
        let zstd = self.zstd.as_mut().filter(|_| try_compress)?;
        zstd.compress(raw).ok().filter(|small| small.len() < raw.len())
    }
}

fn header_of(offset: u64, raw: &[u8], raw_crc: Option<u32>, small: Option<&[u8]>) -> FrameHeader {
    let Some(small) = small else { return FrameHeader::stored(offset, std::iter::once(raw), raw_crc) };
    FrameHeader {
        codec: Codec::Zstd,
        raw_len: raw.len() as u32,
        stored_len: small.len() as u32,
        raw_crc: raw_crc.unwrap_or_else(|| crc32c::crc32c(raw)),
        offset,
        stored_crc: crc32fast::hash(small),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BLOCK: BlockId = BlockId(1_073_741_825);

    fn seal(raw: &[u8], compress: bool) -> Frame {
        Sealer::new(compress).seal(BLOCK, 512, Bytes::copy_from_slice(raw), compress)
    }

    #[test]
    fn text_shrinks_and_comes_back() {
        let text = b"the quick brown fox ".repeat(1_000);
        let frame = seal(&text, true);
        assert_eq!(frame.header.codec, Codec::Zstd);
        assert!(frame.payload.len() < text.len() / 10);
        let header = FrameHeader::decode(BLOCK, &frame.header_bytes).unwrap();
        header.verify_stored(&frame.payload).unwrap();
        assert_eq!(&header.open(frame.payload).unwrap()[..], &text[..]);
    }

    #[test]
    fn what_does_not_shrink_is_stored() {
        let frame = seal(b"x", true);
        assert_eq!(frame.header.codec, Codec::Stored);
    }

    #[test]
    fn both_ways_to_seal_give_the_same_bytes() {
        let text = b"the quick brown fox ".repeat(1_000);
        for (raw, compress) in [(&text[..], true), (&text, false), (b"x", true)] {
            let frame = seal(raw, compress);
            let behind_room = [&[0xEE; FRAME_HEADER_BYTES][..], raw].concat();
            let (header, bytes) = Sealer::new(compress).seal_behind_room(BLOCK, 512, behind_room, compress, None);
            assert_eq!(header, frame.header);
            assert_eq!(bytes, [&frame.header_bytes[..], &frame.payload].concat());
        }
    }

    #[test]
    fn one_opener_says_of_each_frame_what_is_true_of_it_alone() {
        let (large, small) = (b"the quick brown fox ".repeat(1_000), b"jumps over ".repeat(40));
        let mut opener = Opener::default();
        let mut check = |frame: &Frame, payload: &[u8]| {
            opener.payload(&frame.header).copy_from_slice(payload);
            let opened = opener.open(&frame.header).map(|()| Bytes::copy_from_slice(opener.data()));
            assert_eq!(opened.is_err(), opener.data().is_empty(), "nothing is left of the frame before");
            let alone = frame.header.open(Bytes::copy_from_slice(payload));
            assert_eq!(opened.as_ref().ok(), alone.as_ref().ok());
            opened.is_ok()
        };
        for (raw, compress) in [(&large, true), (&small, false), (&small, true), (&large, false), (&small, true)] {
            let frame = seal(raw, compress);
            assert!(check(&frame, &frame.payload));
            let mut damaged = frame.payload.to_vec();
            let middle = damaged.len() / 2;
            damaged[middle] ^= 1;
            assert!(!check(&frame, &damaged));
        }
        // A header that says more or less than there is.
        let frame = seal(&large, true);
        for raw_len in [frame.header.raw_len - 1, frame.header.raw_len + 1] {
            let lying = Frame { header: FrameHeader { raw_len, ..frame.header }, ..frame.clone() };
            assert!(!check(&lying, &frame.payload));
        }
    }

    #[test]
    fn another_blocks_frame_does_not_verify() {
        let frame = seal(b"data", false);
        assert_eq!(FrameHeader::decode(BLOCK.next(), &frame.header_bytes), Err(FrameError::HeaderChecksum));
    }

    #[test]
    fn layout_is_frozen() {
        let frame = seal(b"data", false);
        assert_eq!(frame.header_bytes[..4], [0xCF, 0, 0, 0]);
        assert_eq!(frame.header_bytes[4..12], [4, 0, 0, 0, 4, 0, 0, 0]);
        assert_eq!(le32(&frame.header_bytes, 12), crc32c::crc32c(b"data"));
        assert_eq!(le64(&frame.header_bytes, 16), 512);
        assert_eq!(le32(&frame.header_bytes, 24), crc32fast::hash(b"data"));
    }

    proptest! {
        #[test]
        fn any_single_flipped_bit_is_found(at in 0usize..(FRAME_HEADER_BYTES + 64), bit in 0u8..8) {
            let frame = seal(&[7; 64], false);
            let mut bytes = frame.header_bytes.to_vec();
            bytes.extend_from_slice(&frame.payload);
            bytes[at] ^= 1 << bit;
            let found = match FrameHeader::decode(BLOCK, &bytes) {
                Err(_) => true,
                Ok(header) => header.verify_stored(&bytes[FRAME_HEADER_BYTES..]).is_err(),
            };
            prop_assert!(found);
        }

        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            if let Ok(header) = FrameHeader::decode(BLOCK, &bytes) {
                let _ = header.open(Bytes::from(bytes));
            }
        }
    }
}

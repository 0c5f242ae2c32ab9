//! Checksums of Hadoop's data transfer: one for each so many bytes of data, big endian.
//!
//! They guard the way between a client and this node. What is stored has the checksums of its frames.

use cairn_proto::{Error, ErrorCode, Result};

/// Bytes of data per checksum that readers get.
pub const READ_CHUNK: usize = 512;
/// Bytes of one checksum.
const SUM_BYTES: usize = 4;
/// More data under one checksum than fits into a packet makes no sense.
const MAX_CHUNK: u32 = 16 << 20;

/// Which function.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SumKind {
    /// No checksums.
    Null,
    /// CRC-32, as in zlib.
    Crc32,
    /// CRC-32C.
    Crc32c,
}

/// How data is checksummed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sums {
    kind: SumKind,
    chunk: usize,
}

impl Sums {
    /// What readers get.
    pub const READ: Self = Self { kind: SumKind::Crc32c, chunk: READ_CHUNK };
    /// For a reader that asked for none.
    pub const NONE: Self = Self { kind: SumKind::Null, chunk: READ_CHUNK };

    /// As a client names them: the number of the type (0 none, 1 CRC-32, 2 CRC-32C) and bytes of data per checksum.
    pub fn named(kind: i32, bytes_per_checksum: u32) -> Result<Self> {
        let kind = match kind {
            0 => SumKind::Null,
            1 => SumKind::Crc32,
            2 => SumKind::Crc32c,
            other => {
                let text = format!("checksum type {other} is not known here: CRC32 (1) and CRC32C (2) are");
                return Err(Error::new(ErrorCode::InvalidArgument, text));
            }
        };
        if bytes_per_checksum == 0 || bytes_per_checksum > MAX_CHUNK {
            let text = format!("{bytes_per_checksum} bytes per checksum: there must be 1 to {MAX_CHUNK}");
            return Err(Error::new(ErrorCode::InvalidArgument, text));
        }
        Ok(Self { kind, chunk: bytes_per_checksum as usize })
    }

    /// Which function.
    pub fn kind(&self) -> SumKind {
        self.kind
    }

    /// Bytes of data per checksum.
    pub fn chunk(&self) -> usize {
        self.chunk
    }

    /// Bytes of checksums that belong to so many bytes of data.
    pub fn bytes_for(&self, data: usize) -> usize {
        if self.kind == SumKind::Null { 0 } else { data.div_ceil(self.chunk) * SUM_BYTES }
    }

    fn of(&self, data: &[u8]) -> u32 {
        match self.kind {
            SumKind::Null => 0,
            SumKind::Crc32 => crc32fast::hash(data),
            SumKind::Crc32c => crc32c::crc32c(data),
        }
    }

    /// Where in `data` the first chunk starts that does not fit its checksum.
    pub fn first_flaw(&self, data: &[u8], sums: &[u8]) -> Option<usize> {
        if self.kind == SumKind::Null {
            return None;
        }
        let fits = |(chunk, sum): (&[u8], &[u8])| self.of(chunk).to_be_bytes() == *sum;
        let pairs = data.chunks(self.chunk).zip(sums.chunks(SUM_BYTES));
        let bad = pairs.into_iter().position(|pair| !fits(pair));
        let missing = (sums.len() < self.bytes_for(data.len())).then_some(sums.len() / SUM_BYTES);
        bad.or(missing).map(|index| index * self.chunk)
    }

    /// Writes the checksums of `data` to `out`, which has room for exactly them.
    pub fn fill(&self, data: &[u8], out: &mut [u8]) {
        if self.kind == SumKind::Null {
            return;
        }
        for (chunk, sum) in data.chunks(self.chunk).zip(out.chunks_mut(SUM_BYTES)) {
            sum.copy_from_slice(&self.of(chunk).to_be_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_are_the_published_functions_big_endian() {
        for (kind, expected) in [(1, 0xCBF4_3926_u32), (2, 0xE306_9283)] {
            let sums = Sums::named(kind, 512).unwrap();
            let mut out = [0; 4];
            sums.fill(b"123456789", &mut out);
            assert_eq!(out, expected.to_be_bytes());
            assert_eq!(sums.first_flaw(b"123456789", &out), None);
        }
        assert_eq!(Sums::named(0, 512).unwrap().bytes_for(5_000), 0);
    }

    #[test]
    fn a_flaw_is_found_where_it_is_and_a_missing_checksum_is_one() {
        let sums = Sums::named(2, 512).unwrap();
        let mut data = vec![7; 1_300];
        let mut out = vec![0; sums.bytes_for(data.len())];
        assert_eq!(out.len(), 12);
        sums.fill(&data, &mut out);
        assert_eq!(sums.first_flaw(&data, &out), None);
        assert_eq!(sums.first_flaw(&data, &out[..8]), Some(1_024));
        data[513] ^= 1;
        assert_eq!(sums.first_flaw(&data, &out), Some(512));
    }

    #[test]
    fn unknown_kinds_and_odd_sizes_are_refused() {
        for (kind, chunk) in [(3, 512), (-1, 512), (2, 0), (2, u32::MAX)] {
            assert_eq!(Sums::named(kind, chunk).unwrap_err().code(), ErrorCode::InvalidArgument);
        }
    }
}

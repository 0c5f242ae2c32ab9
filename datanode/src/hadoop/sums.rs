//! Checksums of Hadoop's data transfer: one for each so many bytes of data, big endian.
//!
//! They guard the way between a client and this node. What is stored has the checksums of its frames.

use std::sync::LazyLock;

use bytes::Bytes;
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

    /// Of the checksums of `data` bytes those of its part `from .. from + length`, if that is whole chunks and [`Joined`] takes them.
    pub fn crc32c_of_part(&self, sums: &Bytes, data: usize, from: usize, length: usize) -> Option<Bytes> {
        let end = from + length;
        let whole = from.is_multiple_of(READ_CHUNK) && (end.is_multiple_of(READ_CHUNK) || end == data);
        let at = from / READ_CHUNK * SUM_BYTES;
        (whole && *self == Self::READ).then(|| sums.slice(at..at + self.bytes_for(length)))
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

/// CRC-32C of data of which only the checksums of its chunks are looked at. These are as readers get them ([`Sums::READ`]), as writers send them by
/// default: others (one for each byte, say) would cost more to join than the data to read.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Joined(u32);

/// What [`READ_CHUNK`] more bytes make of a CRC-32C, for each value of each of its bytes.
static CHUNK_LATER: LazyLock<[[u32; 256]; 4]> = LazyLock::new(|| {
    // It is linear: what becomes of single bits says all.
    let bits: [u32; 32] = std::array::from_fn(|bit| crc32c::crc32c_combine(1 << bit, 0, READ_CHUNK));
    std::array::from_fn(|byte| {
        std::array::from_fn(|value| {
            let set = (0..8).filter(|bit| value >> bit & 1 == 1);
            set.fold(0, |sum, bit| sum ^ bits[byte * 8 + bit])
        })
    })
});

impl Joined {
    /// Of all that was pushed.
    pub fn crc32c(self) -> u32 {
        self.0
    }

    /// The checksums of the next `length` bytes. Only the last one may be of less than a chunk.
    pub fn push(&mut self, sums: &[u8], length: usize) {
        let later = &*CHUNK_LATER;
        let (sums, _) = sums.as_chunks::<SUM_BYTES>();
        let mut left = length;
        for sum in sums {
            let (sum, bytes) = (u32::from_be_bytes(*sum), left.min(READ_CHUNK));
            left -= bytes;
            self.0 = if bytes == READ_CHUNK {
                let [a, b, c, d] = self.0.to_le_bytes().map(usize::from);
                later[0][a] ^ later[1][b] ^ later[2][c] ^ later[3][d] ^ sum
            } else {
                crc32c::crc32c_combine(self.0, sum, bytes)
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn joined_checksums_are_those_of_the_whole(
            data in proptest::collection::vec(any::<u8>(), 0..5_000),
            cut in 0usize..10,
        ) {
            let sums = Sums::READ;
            let mut all = vec![0; sums.bytes_for(data.len())];
            sums.fill(&data, &mut all);
            let all = Bytes::from(all);
            let cut = (cut * READ_CHUNK).min(data.len() / READ_CHUNK * READ_CHUNK);
            let mut joined = Joined::default();
            for (from, length) in [(0, cut), (cut, data.len() - cut)] {
                joined.push(&sums.crc32c_of_part(&all, data.len(), from, length).unwrap(), length);
            }
            prop_assert_eq!(joined.crc32c(), crc32c::crc32c(&data));
        }
    }

    #[test]
    fn only_whole_chunks_of_crc32c_are_joined() {
        let (sums, all) = (Sums::named(2, 512).unwrap(), Bytes::from(vec![1; 12]));
        assert_eq!(sums.crc32c_of_part(&all, 1_300, 512, 788).map(|part| part.len()), Some(8));
        assert_eq!(sums.crc32c_of_part(&all, 1_300, 1_024, 276).map(|part| part.len()), Some(4));
        assert_eq!(sums.crc32c_of_part(&all, 1_300, 512, 700), None);
        assert_eq!(sums.crc32c_of_part(&all, 1_300, 100, 412), None);
        for (kind, chunk) in [(1, 512), (0, 512), (2, 1), (2, 4_096)] {
            assert_eq!(Sums::named(kind, chunk).unwrap().crc32c_of_part(&all, 1_300, 0, 512), None);
        }
    }

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

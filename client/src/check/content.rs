//! Contents that need no memory: any range of them can be made again from a number.

use std::ops::Range;

/// Every other content shrinks when it is compressed, so that both kinds of frames are on the way.
const PLAIN: u64 = 0x0303_0303_0303_0303;
const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// The bytes that a file must have: a function of seed and place.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Content {
    /// Names the endless sequence of bytes.
    pub seed: u64,
    /// How much of it the file holds.
    pub length: u64,
}

impl Content {
    /// The bytes of a range, whether the file reaches that far or not.
    pub fn bytes(&self, range: Range<u64>) -> Vec<u8> {
        let mut out = Vec::with_capacity((range.end.saturating_sub(range.start) + 16) as usize);
        let first = range.start / 8;
        for word in first..range.end.div_ceil(8) {
            out.extend_from_slice(&self.word(word).to_le_bytes());
        }
        out.drain(..(range.start - first * 8) as usize);
        out.truncate((range.end - range.start) as usize);
        out
    }

    /// Where bytes that were read at `offset` begin to differ from what belongs there.
    pub fn first_difference(&self, offset: u64, bytes: &[u8]) -> Option<u64> {
        let expected = self.bytes(offset..offset + bytes.len() as u64);
        if expected == bytes {
            return None;
        }
        let same = expected.iter().zip(bytes).take_while(|(a, b)| a == b).count();
        Some(offset + same as u64)
    }

    fn word(&self, at: u64) -> u64 {
        let mut z = self.seed.wrapping_add(at.wrapping_add(1).wrapping_mul(GOLDEN));
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^= z >> 31;
        if self.seed.is_multiple_of(2) { z & PLAIN } else { z }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_range_is_part_of_the_whole_and_differences_are_found() {
        for seed in [4, 5] {
            let content = Content { seed, length: 1_000 };
            let whole = content.bytes(0..1_000);
            for (from, to) in [(0, 0), (3, 4), (7, 9), (8, 16), (13, 999), (999, 1_000)] {
                assert_eq!(content.bytes(from..to), whole[from as usize..to as usize]);
                assert_eq!(content.first_difference(from, &whole[from as usize..to as usize]), None);
            }
            let mut bad = whole[100..300].to_vec();
            bad[57] ^= 4;
            assert_eq!(content.first_difference(100, &bad), Some(157));
        }
        assert_ne!(Content { seed: 1, length: 8 }.bytes(0..8), Content { seed: 3, length: 8 }.bytes(0..8));
    }
}

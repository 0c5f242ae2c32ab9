//! The records of the sort benchmark: 100 bytes, the first ten of them the key; made by record number, so that any part of a file can be made
//! anywhere, and equal, byte for byte, to what `gensort` and Hadoop's TeraGen make.
//!
//! | at | size | |
//! |---|---|---|
//! | 0 | 10 | key: the high ten bytes of the record's random number |
//! | 10 | 2 | `00 11` |
//! | 12 | 32 | record number, hexadecimal in capitals |
//! | 44 | 4 | `88 99 AA BB` |
//! | 48 | 48 | the low twelve hexadecimal digits of the random number, each four times |
//! | 96 | 4 | `CC DD EE FF` |
//!
//! The random numbers are a linear congruential sequence of 128 bits that starts behind 0: record n has the (n + 1)-th.

/// Bytes of a record.
pub const RECORD_BYTES: usize = 100;
/// Bytes of its key.
pub const KEY_BYTES: usize = 10;

const MULTIPLIER: u128 = 0x2360_ed05_1fc6_5da4_4385_df64_9fcc_f645;
const INCREMENT: u128 = 0x4a69_6d47_7261_7952_4950_2020_2020_2001;

/// Makes records one after the other.
pub struct Generator {
    random: u128,
    number: u128,
}

impl Generator {
    /// The next record will be the one with this number.
    pub fn at(number: u64) -> Self {
        // n steps x -> a x + c are one: the square of a step is the step with a^2 and (a + 1) c.
        let (mut a, mut c) = (1u128, 0u128);
        let (mut step_a, mut step_c) = (MULTIPLIER, INCREMENT);
        let mut rest = number;
        while rest > 0 {
            if rest & 1 == 1 {
                c = c.wrapping_mul(step_a).wrapping_add(step_c);
                a = a.wrapping_mul(step_a);
            }
            step_c = step_a.wrapping_add(1).wrapping_mul(step_c);
            step_a = step_a.wrapping_mul(step_a);
            rest >>= 1;
        }
        // The sequence starts from 0, so the factor does not matter.
        Self { random: c, number: u128::from(number) }
    }

    /// Fills in the next record.
    pub fn next(&mut self, out: &mut [u8; RECORD_BYTES]) {
        self.random = self.random.wrapping_mul(MULTIPLIER).wrapping_add(INCREMENT);
        let random = self.random.to_be_bytes();
        out[..KEY_BYTES].copy_from_slice(&random[..KEY_BYTES]);
        out[10..12].copy_from_slice(&[0x00, 0x11]);
        for (at, byte) in self.number.to_be_bytes().into_iter().enumerate() {
            out[12 + 2 * at] = hex(byte >> 4);
            out[13 + 2 * at] = hex(byte & 0xf);
        }
        out[44..48].copy_from_slice(&[0x88, 0x99, 0xaa, 0xbb]);
        for (at, byte) in random[KEY_BYTES..].iter().enumerate() {
            out[48 + 8 * at..][..4].fill(hex(byte >> 4));
            out[52 + 8 * at..][..4].fill(hex(byte & 0xf));
        }
        out[96..].copy_from_slice(&[0xcc, 0xdd, 0xee, 0xff]);
        self.number += 1;
    }
}

fn hex(digit: u8) -> u8 {
    b"0123456789ABCDEF"[usize::from(digit & 0xf)]
}

/// The sum of the CRC-32 of records: equal for equal sets of records in whatever order; what `valsort` calls the checksum.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Checksum(u128);

impl Checksum {
    /// Adds a record.
    pub fn add(&mut self, record: &[u8]) {
        self.0 = self.0.wrapping_add(u128::from(crc32fast::hash(record)));
    }

    /// Adds the records of another set.
    pub fn merge(&mut self, other: Self) {
        self.0 = self.0.wrapping_add(other.0);
    }

    /// As 16 bytes, big endian.
    pub fn to_bytes(self) -> [u8; 16] {
        self.0.to_be_bytes()
    }

    /// From [`Self::to_bytes`].
    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(u128::from_be_bytes(bytes))
    }
}

impl std::fmt::Display for Checksum {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records(from: u64, count: usize) -> Vec<[u8; RECORD_BYTES]> {
        let mut generator = Generator::at(from);
        let mut record = [0; RECORD_BYTES];
        (0..count)
            .map(|_| {
                generator.next(&mut record);
                record
            })
            .collect()
    }

    #[test]
    fn records_are_those_of_gensort() {
        let first = records(0, 2);
        let want = b"JimGrayRIP\x00\x1100000000000000000000000000000000\x88\x99\xaa\xbb\
            222200002222000022220000222200002222000000001111\xcc\xdd\xee\xff";
        assert_eq!(&first[0][..], &want[..]);
        assert_eq!(first[1][..10], [0x95, 0xe0, 0xe4, 0x82, 0x62, 0xb3, 0xed, 0xfe, 0x04, 0x47]);
        assert!(first[1][..44].ends_with(b"00000000000000000000000000000001"));
        assert_eq!(&first[1][48..96], b"9999444488885555CCCC777755555555BBBB666644446666");
    }

    #[test]
    fn any_part_equals_that_part_of_the_whole() {
        let whole = records(0, 1_000);
        for from in [0, 1, 2, 3, 255, 256, 600, 999] {
            assert_eq!(records(from as u64, 1)[0], whole[from], "record {from}");
        }
        let far = records(10_000_000_000 - 1, 2);
        assert_eq!(records(10_000_000_000, 1)[0], far[1]);
    }

    #[test]
    fn the_sum_is_that_of_valsort() {
        // What Hadoop's teravalidate and valsort say of the first million records.
        let mut sum = Checksum::default();
        let mut generator = Generator::at(0);
        let mut record = [0; RECORD_BYTES];
        for _ in 0..1_000_000 {
            generator.next(&mut record);
            sum.add(&record);
        }
        assert_eq!(sum.to_string(), "7a27e2d0d55de");
        let mut halves = Checksum::from_bytes(sum.to_bytes());
        halves.merge(Checksum::default());
        assert_eq!(halves, sum);
    }
}

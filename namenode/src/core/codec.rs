//! Small tools of the core: compact binary encoding of image records, a fixed-seed hash, and the seeded random source.

use std::hash::{BuildHasherDefault, Hasher};

/// Hash map whose order is the same in every run. The order still must not reach an output.
pub type FixedMap<K, V> = std::collections::HashMap<K, V, BuildHasherDefault<FixedHasher>>;

/// Multiplies and folds; fast on small keys, and without a random seed.
#[derive(Default, Clone)]
pub struct FixedHasher(u64);

const K0: u64 = 0x9e37_79b9_7f4a_7c15;
const K1: u64 = 0xd6e8_feb8_6659_fd93;

/// One mixing step: 64 by 64 bits to 128, folded.
#[inline]
pub fn mix(a: u64, b: u64) -> u64 {
    let wide = u128::from(a ^ K0).wrapping_mul(u128::from(b ^ K1));
    (wide as u64) ^ ((wide >> 64) as u64)
}

/// Hash of bytes, chained to `seed`.
#[inline]
pub fn hash_bytes(seed: u64, bytes: &[u8]) -> u64 {
    let mut state = mix(seed, bytes.len() as u64);
    let mut chunks = bytes.chunks_exact(8);
    for chunk in &mut chunks {
        let mut word = [0; 8];
        word.copy_from_slice(chunk);
        state = mix(state, u64::from_le_bytes(word));
    }
    let rest = chunks.remainder();
    if !rest.is_empty() {
        let mut word = [0; 8];
        word[..rest.len()].copy_from_slice(rest);
        state = mix(state, u64::from_le_bytes(word));
    }
    state
}

impl Hasher for FixedHasher {
    #[inline]
    fn write(&mut self, bytes: &[u8]) {
        self.0 = hash_bytes(self.0, bytes);
    }

    #[inline]
    fn write_u8(&mut self, value: u8) {
        self.0 = mix(self.0, u64::from(value));
    }

    #[inline]
    fn write_u32(&mut self, value: u32) {
        self.0 = mix(self.0, u64::from(value));
    }

    #[inline]
    fn write_u64(&mut self, value: u64) {
        self.0 = mix(self.0, value);
    }

    #[inline]
    fn write_usize(&mut self, value: usize) {
        self.0 = mix(self.0, value as u64);
    }

    #[inline]
    fn finish(&self) -> u64 {
        self.0
    }
}

/// Steps that this thread took: records looked up, numbers encoded. Tests bound the work of a turn with it.
#[cfg(test)]
pub mod steps {
    use std::cell::Cell;

    thread_local!(static TAKEN: Cell<u64> = const { Cell::new(0) });

    /// One more.
    pub fn count() {
        TAKEN.with(|taken| taken.set(taken.get() + 1));
    }

    /// How many since the last time.
    pub fn take() -> u64 {
        TAKEN.with(|taken| taken.replace(0))
    }
}

/// splitmix64: all randomness of one event comes from its seed.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// A source that gives the same numbers for the same seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(K0);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`; 0 if `bound` is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }
}

/// Appends a number, seven bits a byte.
pub fn put(out: &mut Vec<u8>, mut value: u64) {
    #[cfg(test)]
    steps::count();
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Appends a length and the bytes.
pub fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

/// Reads what [`put`] and [`put_bytes`] wrote; every error is a sentence.
pub struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Reads from the start of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// Whether everything was read.
    pub fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// One byte.
    pub fn byte(&mut self) -> Result<u8, String> {
        let (first, rest) = self.rest.split_first().ok_or("it ends in the middle of a record")?;
        self.rest = rest;
        Ok(*first)
    }

    /// A number.
    #[inline]
    pub fn number(&mut self) -> Result<u64, String> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7f);
            if shift == 63 && bits > 1 {
                break;
            }
            value |= bits << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err("a number is longer than 64 bits".into())
    }

    /// A number that must fit into `T`.
    pub fn small<T: TryFrom<u64>>(&mut self) -> Result<T, String> {
        let value = self.number()?;
        T::try_from(value).map_err(|_| format!("the number {value} is out of range"))
    }

    /// A length and that many bytes.
    pub fn bytes(&mut self) -> Result<&'a [u8], String> {
        let length: usize = self.small()?;
        if length > self.rest.len() {
            return Err(format!("a text of {length} bytes goes beyond its end"));
        }
        let (bytes, rest) = self.rest.split_at(length);
        self.rest = rest;
        Ok(bytes)
    }

    /// A text.
    pub fn text(&mut self) -> Result<&'a str, String> {
        std::str::from_utf8(self.bytes()?).map_err(|_| "a text is not UTF-8".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_texts_come_back() {
        let mut out = Vec::new();
        for value in [0, 1, 127, 128, 1 << 40, u64::MAX] {
            put(&mut out, value);
        }
        put_bytes(&mut out, "é".as_bytes());
        let mut reader = Reader::new(&out);
        for value in [0, 1, 127, 128, 1 << 40, u64::MAX] {
            assert_eq!(reader.number().unwrap(), value);
        }
        assert_eq!(reader.text().unwrap(), "é");
        assert!(reader.is_empty());
        assert!(reader.byte().is_err());
    }

    #[test]
    fn damaged_bytes_are_errors() {
        assert!(Reader::new(&[0xff; 11]).number().is_err());
        assert!(Reader::new(&[5, b'a']).bytes().is_err());
        assert!(Reader::new(&[1, 0xff]).text().is_err());
    }
}

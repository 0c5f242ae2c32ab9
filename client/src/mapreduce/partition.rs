//! Which reducer gets a key, and which keys one call of a reducer sees.

use std::fmt;
use std::sync::Arc;

use cairn_proto::{Error, ErrorCode, Result};

use super::table::hash_key;

/// Says how many bytes of a key count.
pub type PrefixLength = Arc<dyn Fn(&[u8]) -> usize + Send + Sync>;
/// Chooses a reducer for a key, of that many.
pub type ChooseReducer = Arc<dyn Fn(&[u8], u32) -> u32 + Send + Sync>;

/// The start of a key, which decides where it goes or what it is grouped with.
#[derive(Clone)]
pub enum KeyPrefix {
    /// So many bytes; all of a key that is shorter.
    Bytes(usize),
    /// The first `count` fields that `separator` ends; all of a key with fewer.
    Fields {
        /// Byte between fields.
        separator: u8,
        /// How many fields.
        count: usize,
    },
    /// What the function says: a length, at most the key's.
    By(PrefixLength),
}

impl KeyPrefix {
    /// The prefix of `key`. Fields end before their last separator.
    #[inline]
    pub fn of<'a>(&self, key: &'a [u8]) -> &'a [u8] {
        let length = match self {
            Self::Bytes(length) => *length,
            Self::Fields { separator, count } => {
                memchr::memchr_iter(*separator, key).nth(count.saturating_sub(1)).unwrap_or(key.len())
            }
            Self::By(length) => length(key),
        };
        &key[..length.min(key.len())]
    }
}

impl fmt::Debug for KeyPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bytes(length) => write!(f, "Bytes({length})"),
            Self::Fields { separator, count } => write!(f, "Fields({count} by {:?})", char::from(*separator)),
            Self::By(_) => f.write_str("By(..)"),
        }
    }
}

/// Which keys one call of [`super::Reducer::reduce`] sees. Keys always come in the order of their bytes.
#[derive(Clone, Debug, Default)]
pub enum Grouping {
    /// Equal ones.
    #[default]
    WholeKey,
    /// Those with an equal prefix, in the order of their whole keys: a secondary sort. The partitioner must send equal prefixes to one reducer.
    Prefix(KeyPrefix),
}

impl Grouping {
    #[inline]
    pub(crate) fn of<'a>(&self, key: &'a [u8]) -> &'a [u8] {
        match self {
            Self::WholeKey => key,
            Self::Prefix(prefix) => prefix.of(key),
        }
    }
}

/// Which reducer a key goes to.
#[derive(Clone, Default)]
pub enum Partitioner {
    /// By a hash of the key.
    #[default]
    Hash,
    /// By a hash of a prefix of the key.
    HashPrefix(KeyPrefix),
    /// By ranges, so that the parts of the output follow on each other in order.
    Ranges(KeyRanges),
    /// As the function says of a key and the number of reducers; it must be less than that number.
    Own(ChooseReducer),
}

impl fmt::Debug for Partitioner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hash => f.write_str("Hash"),
            Self::HashPrefix(prefix) => write!(f, "HashPrefix({prefix:?})"),
            Self::Ranges(ranges) => write!(f, "Ranges({})", ranges.cuts.len() + 1),
            Self::Own(_) => f.write_str("Own(..)"),
        }
    }
}

impl Partitioner {
    /// Where `key` goes, of `partitions`.
    #[inline]
    pub fn partition(&self, key: &[u8], partitions: u32) -> Result<u32> {
        match self {
            Self::Hash => Ok(partition_of(hash_key(key), partitions)),
            Self::HashPrefix(prefix) => Ok(partition_of(hash_key(prefix.of(key)), partitions)),
            Self::Ranges(ranges) => Ok(ranges.find(key).min(partitions.saturating_sub(1))),
            Self::Own(choose) => {
                let chosen = choose(key, partitions);
                if chosen < partitions { Ok(chosen) } else { Err(out_of_range(chosen, partitions)) }
            }
        }
    }
}

#[cold]
fn out_of_range(chosen: u32, partitions: u32) -> Error {
    let text = format!("the program's partitioner chose reducer {chosen} of {partitions} (they count from 0)");
    Error::new(ErrorCode::InvalidArgument, text)
}

/// Which of `partitions` a key with this hash belongs to.
#[inline]
pub(crate) fn partition_of(hash: u64, partitions: u32) -> u32 {
    (((hash >> 32) * u64::from(partitions)) >> 32) as u32
}

/// Cuts between ranges of keys: a key equal to a cut is the first of the range behind it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct KeyRanges {
    cuts: Vec<Vec<u8>>,
    /// [`super::key_prefix`] of each cut: decides most comparisons.
    heads: Vec<u64>,
}

impl KeyRanges {
    /// Takes the cuts in ascending order; n cuts make n + 1 ranges. Equal cuts leave the ranges between them empty.
    pub fn new(cuts: Vec<Vec<u8>>) -> Result<Self> {
        if let Some(at) = cuts.windows(2).position(|two| two[0] > two[1]) {
            let text =
                format!("the cuts of the key ranges are not in order: number {} is less than the one before", at + 1);
            return Err(Error::new(ErrorCode::InvalidArgument, text));
        }
        let heads = cuts.iter().map(|cut| super::key_prefix(cut)).collect();
        Ok(Self { cuts, heads })
    }

    /// Cuts that spread keys like `sample` evenly over `ranges`.
    pub fn of_sample(mut sample: Vec<Vec<u8>>, ranges: u32) -> Self {
        sample.sort_unstable();
        let ranges = ranges.max(1) as usize;
        let cuts = (1..ranges).filter_map(|number| sample.get(sample.len() * number / ranges).cloned()).collect();
        // They come out of a sorted list.
        Self::new(cuts).unwrap_or_default()
    }

    /// The cuts.
    pub fn cuts(&self) -> &[Vec<u8>] {
        &self.cuts
    }

    /// Number of the range that `key` lies in.
    #[inline]
    pub fn find(&self, key: &[u8]) -> u32 {
        let head = super::key_prefix(key);
        let from = self.heads.partition_point(|cut| *cut < head);
        let equal = self.cuts[from..].iter().zip(&self.heads[from..]);
        let below = equal.take_while(|(cut, cut_head)| **cut_head == head && cut.as_slice() <= key).count();
        (from + below) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn prefixes_of_keys() {
        let fields = |count| KeyPrefix::Fields { separator: b'.', count };
        assert_eq!(fields(1).of(b"a.b.c"), b"a");
        assert_eq!(fields(2).of(b"a.b.c"), b"a.b");
        assert_eq!(fields(7).of(b"a.b.c"), b"a.b.c");
        assert_eq!(KeyPrefix::Bytes(2).of(b"abc"), b"ab");
        assert_eq!(KeyPrefix::Bytes(9).of(b"abc"), b"abc");
        assert_eq!(KeyPrefix::By(Arc::new(|_| 100)).of(b"abc"), b"abc");
    }

    #[test]
    fn a_partitioner_that_leaves_the_range_is_refused() {
        let own = Partitioner::Own(Arc::new(|key, _| u32::from(key[0])));
        assert_eq!(own.partition(&[2], 3).unwrap(), 2);
        let error = own.partition(&[3], 3).unwrap_err();
        assert!(error.message().contains("reducer 3 of 3"), "{error}");
        assert!(KeyRanges::new(vec![b"b".to_vec(), b"a".to_vec()]).is_err());
    }

    proptest! {
        #[test]
        fn ranges_order_like_their_keys(
            mut cuts in prop::collection::vec(prop::collection::vec(0u8..3, 0..11), 0..8),
            key in prop::collection::vec(0u8..3, 0..11),
        ) {
            cuts.sort();
            let want = cuts.iter().filter(|cut| **cut <= key).count() as u32;
            prop_assert_eq!(KeyRanges::new(cuts).unwrap().find(&key), want);
        }

        #[test]
        fn cuts_of_a_sample_spread_it(keys in prop::collection::hash_set(any::<u32>(), 200..300), ranges in 1u32..9) {
            let sample: Vec<_> = keys.iter().map(|key| key.to_be_bytes().to_vec()).collect();
            let cuts = KeyRanges::of_sample(sample.clone(), ranges);
            let mut counts = vec![0u32; ranges as usize];
            for key in &sample {
                counts[cuts.find(key) as usize] += 1;
            }
            let fair = keys.len() as u32 / ranges;
            prop_assert!(counts.iter().all(|count| count.abs_diff(fair) <= 2), "{:?}", counts);
        }
    }
}

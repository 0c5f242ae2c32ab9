//! Numbers with a meaning, as types, so that one cannot be passed for another.

use std::fmt;

macro_rules! number {
    ($(#[$doc:meta])* $name:ident, $inner:ty) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl $name {
            /// The number after this one.
            #[must_use]
            pub fn next(self) -> Self {
                Self(self.0 + 1)
            }
        }
    };
}

number!(
    /// A file or directory; never used twice. The root is [`InodeId::ROOT`].
    InodeId, u64
);
number!(
    /// A block. Positive; negative numbers are reserved for block groups (low four bits = unit).
    BlockId, i64
);
number!(
    /// Generation stamp of a block: a writer or replica with an older one is fenced.
    Generation, u64
);
number!(
    /// Transaction of the edit log; gapless, the first is 1. 0 means "before any transaction".
    TxId, u64
);
number!(
    /// Raised by every restore, and by every loss of a metadata directory; datanodes refuse lower ones.
    Epoch, u64
);

impl InodeId {
    /// The root directory (HDFS's number).
    pub const ROOT: Self = Self(16_385);
}

impl BlockId {
    /// Blocks are numbered from the one after this (HDFS's number).
    pub const BASE: Self = Self(1 << 30);
}

impl Generation {
    /// The first generation stamp (HDFS's number).
    pub const FIRST: Self = Self(1_001);
}

impl Epoch {
    /// The epoch of a new future: after a restore, or a start that a person ordered without all metadata directories.
    ///
    /// The future that is left behind may still be running somewhere and raise its own epoch as it loses directories; the
    /// next multiple of 1,000 stays above it. So may the future of an earlier restore of the same backup, which knows of no
    /// other: therefore the epoch is the wall clock's milliseconds times 1,000, if that is higher. Of two restores the
    /// later one has the higher epoch, unless the clock was set back between them.
    #[must_use]
    pub fn next_future(self, wall_ms: u64) -> Self {
        // The limit is beyond the year 37,000; below 2^63 in any case.
        let by_time = wall_ms.min(1 << 50) * 1_000;
        Self(((self.0 / 1_000 + 1) * 1_000).max(by_time))
    }
}

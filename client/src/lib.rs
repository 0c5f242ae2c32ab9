//! Cairn's client library.
//!
//! * [`check`]: a load that checks every answer, for `cairn chaos` and the suites
//! * [`fs`]: [`fs::FileSystem`], the files of a cluster: open, create, list, rename, block locations, ...
//! * [`job`]: running jobs on the nodes that hold their input
//! * [`mapreduce`]: the programs that jobs run, and the machinery between map and reduce
//! * `webhdfs` (feature `cli`): what a datanode serves files over HTTP with

pub mod check;
pub mod fs;
pub mod job;
pub mod mapreduce;
#[cfg(feature = "cli")]
pub mod webhdfs;

/// Doors for the fuzz targets in `tests/`, into what is private otherwise; not part of the library.
#[doc(hidden)]
pub mod fuzzing {
    pub use crate::fs::glob_matches;
}

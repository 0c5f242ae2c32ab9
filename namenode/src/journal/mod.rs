//! The edit log: every change of the namespace, in order, durable before anybody hears of it.
//!
//! # Overview
//! * [`mod@format`]: the bytes of a segment, and what tells a torn tail from damage
//! * [`dirs`]: metadata directories, their `VERSION`, their lock, the set
//! * [`reader`]: strict reading at start
//! * [`writer`]: appending to all directories of the set
//! * [`Journal`]: the thread that owns the writer
//!
//! # Consistency
//! One thread writes. It takes all batches that wait, writes them, syncs once, and publishes the last durable transaction
//! in a watch channel; so one sync serves all that waited while the last one ran, and the thread never waits for the owner
//! of the core (who waits for room in the queue when the disk is behind).
//!
//! # Crash
//! See [`mod@format`]. What was published as durable is read back by [`reader::read_log`].
//!
//! # Cancellation
//! The thread ends when its [`Journal`] is closed or dropped; what was appended before is flushed first.

mod dirs;
mod error;
pub mod format;
mod reader;
mod thread;
mod writer;

#[cfg(test)]
mod tests;

pub use dirs::{ClusterFacts, DirSet, DirState, Found, LAYOUT, MetaDir, Version, is_harmless, open_set, read_version};
pub use error::LogError;
pub(crate) use reader::MAX_SEGMENT_BYTES;
pub use reader::{LogEnd, LogTail, Segment, cut_tail, list_segments, read_log};
pub use thread::{Batch, Journal, JournalStatus, SYNC_BUCKETS_US, SyncTimes};
pub use writer::{LogSizes, LogWriter};

//! Backup, archive and restore: how the namespace outlives its metadata directories.
//!
//! # Overview
//! * [`BackupSource`]: the older image and all log since, as one stream (the bytes: [`cairn_proto::backupfile`])
//! * [`Archiver`]: copies the log to another place while it is written
//! * [`history`]: the log as backup and archive tell it, across segments, and which future goes on where two part
//! * [`restore`]: from both to a metadata directory that is exactly the state after one transaction
//!
//! # Consistency
//! Nothing here touches the owner or the log's writer: both are read as they lie on the disk, and only what is durable.
//!
//! # Crash
//! A backup is in force when its receiver has checked it and given it its name. An archive may end in a torn record, which
//! is then not archived yet. A restore that is cut off leaves directories that say so; it is simply done again.

mod archive;
pub mod history;
mod hole;
pub mod restore;
mod source;

#[cfg(test)]
pub(crate) use archive::Copier;
pub use archive::{ArchiveStatus, Archiver, check_archive};
pub use source::{BackupPlan, BackupSource};

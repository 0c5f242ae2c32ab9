//! Cairn's namenode: the namespace, where its blocks are, and what becomes of them.
//!
//! * [`Namenode::start`] and [`Running`]: the daemon
//! * [`NamenodeSettings`]: its knobs
//! * [`core`]: the pure core, for tests and benchmarks without a daemon
//! * [`journal`] and [`image`]: what lies in a metadata directory
//! * `hadoop`: HDFS's `ClientProtocol`; `http`: WebHDFS, status, metrics
//! * `backup`: backups, the archive of the log, restores
//!
//! # Architecture
//! One thread owns the [`core`]; everything else talks to it through a bounded queue. It gives each change to the
//! [`journal`]'s thread and lets no answer out before what that answer depends on is durable. See `server/owner.rs`.

mod backup;
pub mod core;
mod hadoop;
mod http;
pub mod image;
pub mod journal;
mod server;
mod settings;

pub use backup::history::Target as RestoreTarget;
pub use backup::restore::RestorePlan;
pub use server::{Namenode, Running};
pub use settings::NamenodeSettings;

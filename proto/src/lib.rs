//! Everything two Cairn processes must agree on.
//!
//! * [`pb`]: the messages (and, with the feature `grpc`, the services) generated from `proto/cairn/v1/*.proto`
//! * [`hadoop`]: the messages of HDFS's protocols, generated from `proto/hadoop/*.proto`
//! * [`ids`]: block, inode, generation, transaction and epoch numbers as types of their own
//! * [`error`]: the typed error, its kinds, and its one mapping to gRPC codes and Hadoop exception classes
//! * [`path`]: what an absolute path and a name may be
//! * [`frame`] and [`blockfile`]: the block format, on the wire and on disk
//! * [`backupfile`]: a backup of the namenode: an image and all log since
//! * [`dataplane`]: operations, write markers and acks of the data plane
//! * [`mapoutput`]: what a map task leaves for the reducers
//! * [`kept`]: content of files that jobs keep on a node for the jobs after them
//! * [`handshake`]: the first bytes of each of our own connections
//! * [`webhdfs`]: parameters, paths and errors of the file system over HTTP
//!
//! Nothing here does I/O, and nothing here depends on another crate of Cairn.

pub mod backupfile;
pub mod blockfile;
pub mod dataplane;
pub mod error;
pub mod frame;
pub mod hadoop;
pub mod handshake;
pub mod ids;
pub mod kept;
pub mod mapoutput;
pub mod path;
pub mod position;
pub mod webhdfs;

/// Generated messages and services.
#[allow(missing_docs, clippy::all)]
pub mod pb {
    include!(concat!(env!("OUT_DIR"), "/cairn.v1.rs"));
}

pub use error::{Error, ErrorCode, ErrorKind, Result};

/// Version of our own protocols; a peer with another one is refused with both numbers in the message.
pub const PROTOCOL_VERSION: u16 = 1;

/// Default size of a block: 128 MiB of file data.
pub const DEFAULT_BLOCK_SIZE: u64 = 128 << 20;
/// Block sizes are multiples of this (HDFS's checksum chunk).
pub const BLOCK_SIZE_UNIT: u64 = 512;
/// Smallest block size that a namenode accepts by default; tests may configure a lower one.
pub const MIN_BLOCK_SIZE: u64 = 1 << 20;
/// Largest block size.
pub const MAX_BLOCK_SIZE: u64 = 16 << 30;
/// Default number of replicas.
pub const DEFAULT_REPLICATION: u32 = 3;
/// Most replicas that a file may ask for.
pub const MAX_REPLICATION: u32 = 512;

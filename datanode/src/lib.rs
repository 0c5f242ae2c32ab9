//! Cairn's datanode: stores block files, serves the data plane, reports to the namenode, runs tasks.
//!
//! * [`store`]: block files on volumes, the replica map, the recovery scan
//! * [`transfer`]: the data plane: write pipeline, reads, copies
//! * [`hadoop`]: Hadoop's data transfer on the same port
//! * [`tasks`]: the executor of jobs
//! * [`scrub`]: checks of replicas and folders in the background
//! * [`report`]: registration, heartbeats, block reports, orders of the namenode
//! * [`Datanode::start`] puts them together; [`Running`] is the handle
//!
//! # Architecture invariant
//! Nothing here knows of files or paths of the namespace: a datanode holds blocks.

pub mod daemon;
#[cfg(test)]
mod daemon_tests;
pub mod hadoop;
mod pages;
pub mod report;
pub mod scrub;
mod settings;
pub mod store;
pub mod tasks;
#[cfg(test)]
mod testing;
pub mod transfer;

use std::net::IpAddr;
use std::ops::Range;
use std::sync::Arc;

use cairn_common::durable::File;
use cairn_common::kv::KeyValue;
use cairn_common::net::http;
use cairn_proto::pb;

pub use daemon::{Datanode, Running};
pub use settings::DatanodeSettings;

/// Outputs of map tasks that finished on this node; the data plane serves them.
#[async_trait::async_trait]
pub trait MapOutputs: Send + Sync {
    /// The file and the byte range of one partition of one attempt's output.
    async fn open(&self, request: &pb::ReadMapOutput) -> cairn_proto::Result<(Arc<dyn File>, Range<u64>)>;
}

/// How busy the node's task executor is; heartbeats carry it.
pub trait TaskLoad: Send + Sync {
    /// Tasks that may run at once.
    fn slots(&self) -> u32;
    /// Tasks that run now.
    fn running(&self) -> u32;
    /// The kernel holds tasks to their limits (cgroups); else their memory is sampled.
    fn has_groups(&self) -> bool {
        false
    }
}

/// Serves files by their paths over HTTP (WebHDFS's part of a datanode). A datanode knows no paths: whoever starts it brings this along.
#[async_trait::async_trait]
pub trait WebDoor: Send + Sync {
    /// Answers a request of `peer` for a path below `/webhdfs/v1`, on this node. The future may be dropped when the client goes away.
    async fn answer(
        &self,
        node: &tasks::NodeName,
        peer: IpAddr,
        request: http::Request<http::Incoming>,
    ) -> http::Answer;
    /// The datanode ends: gives up what is being written, and returns when that is done.
    async fn close(&self);
}

/// What other rooms add to a datanode.
#[derive(Default)]
pub struct Extras {
    /// Serves the data-plane operation `ReadMapOutput`.
    pub map_outputs: Option<Arc<dyn MapOutputs>>,
    /// gRPC services on the data port.
    pub routes: Option<tonic::service::Routes>,
    /// For heartbeats.
    pub load: Option<Arc<dyn TaskLoad>>,
    /// Serves files over HTTP; none: nobody does.
    pub web: Option<Arc<dyn WebDoor>>,
    /// Where outcomes of checks are noted; none: a sled folder on the first volume that works.
    pub outcomes: Option<Arc<dyn KeyValue>>,
}

//! Built-in jobs from the caller's side: each looks at its input as far as it must (samples, sizes, parts) and makes the [`JobSpec`] that
//! [`super::run`] takes. What their tasks do is in [`crate::mapreduce`].

pub mod distcp;
mod join;
mod sample;
mod sort;
mod streaming;

pub use join::{JoinKind, JoinOptions, join};
pub use sort::{SortOptions, sort, teragen, terasort, teravalidate, validation};
pub use streaming::{StreamingOptions, ship, streaming};

use cairn_proto::Result;

use super::spec::JobSpec;
use crate::fs::{FileStatus, FileSystem, NodeState};

/// Input per reducer that the default aims at.
const BYTES_PER_REDUCER: u64 = 128 << 20;

fn total_bytes(files: &[FileStatus]) -> u64 {
    files.iter().map(|file| file.length).sum()
}

/// As many reducers as fit input and cluster.
async fn usual_reducers(fs: &FileSystem, bytes: u64) -> Result<u32> {
    let report = fs.cluster_report().await?;
    let live = report.nodes.iter().filter(|node| node.state() == NodeState::Live);
    let slots: u64 = live.map(|node| u64::from(node.task_slots)).sum();
    Ok(bytes.div_ceil(BYTES_PER_REDUCER).clamp(1, slots.max(1)) as u32)
}

/// A specification whose reducers are decided.
async fn with_reducers(fs: &FileSystem, mut spec: JobSpec, bytes: u64) -> Result<(JobSpec, u32)> {
    let reducers = match spec.reducers {
        Some(reducers) => reducers,
        None => usual_reducers(fs, bytes).await?,
    };
    spec.reducers = Some(reducers);
    Ok((spec, reducers))
}

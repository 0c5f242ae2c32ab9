//! A reduce task: fetches its partition of every map, merges, reduces, writes its part.

use std::sync::Arc;

use cairn_proto::pb;

use super::{Context, Failed, Task, shuffle, success};
use crate::mapreduce::counter;
use crate::mapreduce::reduce::{self, Scratch};

/// Runs it.
pub async fn run(context: &Context, task: Task, inputs: Vec<pb::MapOutputLocation>) -> Result<pb::TaskSuccess, Failed> {
    let fetched = shuffle::fetch_all(context, &task, inputs).await?;
    let program = Arc::clone(&context.program);
    let (shares, scratch) = (context.shares, Scratch { fs: Arc::clone(&context.env.fs), dir: task.work_dir });
    let compute = move |output| reduce::run(&*program, fetched.segments, &shares, &scratch, output);
    let mut counters = context.with_output(&task.output_path, compute).await?;
    counters.add(counter::SHUFFLED_BYTES, fetched.bytes);
    counters.add(counter::SPILLED_BYTES, fetched.on_disk);
    let written = counters.get(counter::OUTPUT_BYTES);
    Ok(success(&counters, Vec::new(), written))
}

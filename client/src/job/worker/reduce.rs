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
    let (shares, scratch) = (context.shares, Scratch { fs: Arc::clone(&context.env.fs), dir: task.work_dir.clone() });
    let ours = context.task_context(&task, &shares).await?;
    let user = ours.user_counters.clone();
    let reducing = Arc::clone(&program);
    let compute = move |output| reduce::run(&*reducing, &ours, fetched.segments, &shares, &scratch, output);
    let done = context.with_output(&*program, &task.id, &task.output_path, &user, compute).await?;
    let mut counters = done.counters;
    counters.add(counter::SHUFFLED_BYTES, fetched.bytes);
    counters.add(counter::SPILLED_BYTES, fetched.on_disk);
    counters.merge(&user.all());
    let hot_key = |(key, records): (Vec<u8>, u64)| pb::HotKey { key: key.into(), records };
    let hot_keys = done.hot_keys.into_iter().map(hot_key).collect();
    Ok(pb::TaskSuccess { hot_keys, ..success(&counters, Vec::new(), done.files) })
}

//! A map task: its split is read by one task and computed on by a thread.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use cairn_common::durable::OpenMode;
use cairn_proto::{Error, Result, pb, position};

use super::content::{self, Opened};
use super::records::Mapping;
use super::{Context, Task, success};
use crate::mapreduce::builtin::property;
use crate::mapreduce::collect::Collected;
use crate::mapreduce::input::BoxedFeed;
use crate::mapreduce::position::PositionNote;
use crate::mapreduce::{Collector, InputFormat, Shares, TaskContext, TaskInput, counter};

/// Runs it.
pub async fn run(context: &Context, task: Task, split: pb::Split) -> Result<pb::TaskSuccess> {
    let program = Arc::clone(&context.program);
    let format = program.input();
    let (content, aside): (BoxedFeed, _) = match format {
        InputFormat::Generated { .. } => (Box::new(content::Nothing), None),
        _ => {
            let Opened { content, aside } = content::open(context, &split, format, &task.progress).await?;
            (content, Some(aside))
        }
    };
    let input = match format {
        InputFormat::Generated { .. } => {
            TaskInput { offset: split.first_record, length: split.records, ..TaskInput::default() }
        }
        _ => TaskInput {
            path: split.path.clone(),
            offset: split.offset,
            length: split.length,
            file_index: split.file_index,
        },
    };
    let (bytes, partitions) = (split.length, context.job.reducers);
    let shares = if partitions == 0 { Shares::of_map_only(context.job.memory_limit) } else { context.shares };
    let ours = TaskContext { input: Some(input), ..context.task_context(&task, &shares).await? };
    let user = ours.user_counters.clone();
    let progress = Arc::clone(&task.progress);
    let counted = Arc::clone(&progress);
    let fs = Arc::clone(&context.env.fs);
    let mapping = Mapping {
        program: Arc::clone(&program),
        position: Arc::new(note_in(context, &task, &split).await?),
        split,
        format,
        shares,
        progress,
        may_skip: ours.parsed(property::SKIP_RECORDS, 0)?,
        deadly: task.skip_records.iter().copied().collect(),
    };
    let collected = if partitions == 0 {
        let compute = move |output| {
            let out = Collector::direct(output, fs, &task.work_dir, ours.user_counters.clone());
            let (out, skipped) = mapping.run(&ours, content, out)?;
            Ok((out.finish(&task.map_output)?, skipped))
        };
        context.with_output(&*program, &task.id, &task.output_path, &user, compute).await
    } else {
        let compute = move || {
            let user = ours.user_counters.clone();
            let out = Collector::new(&*mapping.program, partitions, &shares, fs, &task.work_dir, user)?;
            let (out, skipped) = mapping.run(&ours, content, out)?;
            Ok((out.finish(&task.map_output)?, skipped))
        };
        context.env.work.io(compute).await
    };
    if let Some(aside) = &aside {
        aside.stop();
    }
    let (Collected { partitions, files, mut counters }, skipped) = collected?;
    if let Some(aside) = aside {
        context.env.work.io(move || aside.keep()).await;
    }
    counters.add(counter::INPUT_BYTES, bytes);
    counters.add(counter::INPUT_KEPT_BYTES, counted.kept.load(Ordering::Relaxed));
    counters.add(counter::RECORDS_IN, counted.records.load(Ordering::Relaxed));
    counters.merge(&user.all());
    let stored: Vec<u64> = partitions.iter().map(|entry| entry.stored).collect();
    let mut success = success(&counters, stored, files);
    skipped.report(&mut success);
    Ok(success)
}

/// Where the map is goes to a file of the attempt's folder: the datanode reads it if this process dies.
async fn note_in(context: &Context, task: &Task, split: &pb::Split) -> Result<PositionNote> {
    let path = task.work_dir.join(position::FILE_NAME);
    let failed = |error: std::io::Error| Error::io(format!("cannot write {}", path.display()), &error);
    let (disk, target, content) = (Arc::clone(&context.env.fs), path.clone(), position::encode(&split.path));
    let written = context.env.work.io(move || {
        disk.open(&target, OpenMode::Create)?.write_all_at(&content, 0)?;
        PositionNote::in_file(&File::options().read(true).write(true).open(&target)?)
    });
    written.await.map_err(failed)
}

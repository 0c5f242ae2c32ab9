//! A map task: its split is read by one task and computed on by a thread.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use cairn_common::durable::OpenMode;
use cairn_proto::{Error, ErrorCode, Result, pb, position};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::records::Mapping;
use super::{Context, PIECES, Progress, Task, success};
use crate::fs::FileReader;
use crate::mapreduce::builtin::property;
use crate::mapreduce::collect::Collected;
use crate::mapreduce::container::HEADER_BYTES;
use crate::mapreduce::input::{Feed, feed_start};
use crate::mapreduce::position::PositionNote;
use crate::mapreduce::{Collector, InputFormat, Shares, TaskContext, TaskInput, counter};

type Piece = Result<Bytes>;

/// Runs it.
pub async fn run(context: &Context, task: Task, split: pb::Split) -> Result<pb::TaskSuccess> {
    let program = Arc::clone(&context.program);
    let format = program.input();
    let (pieces, reading) = match format {
        InputFormat::Generated { .. } => (Pieces::default(), None),
        _ => open(context, &split, format, &task.progress).await?,
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
            let (out, skipped) = mapping.run(&ours, pieces, out)?;
            Ok((out.finish(&task.map_output)?, skipped))
        };
        context.with_output(&*program, &task.id, &task.output_path, &user, compute).await
    } else {
        let compute = move || {
            let user = ours.user_counters.clone();
            let out = Collector::new(&*mapping.program, partitions, &shares, fs, &task.work_dir, user)?;
            let (out, skipped) = mapping.run(&ours, pieces, out)?;
            Ok((out.finish(&task.map_output)?, skipped))
        };
        context.env.work.io(compute).await
    };
    if let Some(reading) = reading {
        reading.abort();
    }
    let (Collected { partitions, files, mut counters }, skipped) = collected?;
    counters.add(counter::INPUT_BYTES, bytes);
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

/// Starts reading the split.
async fn open(
    context: &Context,
    split: &pb::Split,
    format: InputFormat,
    progress: &Arc<Progress>,
) -> Result<(Pieces, Option<JoinHandle<()>>)> {
    let mut reader = context.files().await?.open(&split.path).await?;
    if reader.length() < split.offset + split.length {
        let text = format!(
            "{} has {} bytes now, it had {} when the job was planned",
            split.path,
            reader.length(),
            split.file_length
        );
        return Err(Error::new(ErrorCode::FileNotFound, text).with_subject(split.path.clone()));
    }
    let mut head = None;
    if format == InputFormat::KeyValue {
        head = Some(reader.read_range(0, HEADER_BYTES).await?);
    }
    reader.seek(feed_start(split, format));
    reader.limit_read_ahead(split.offset + split.length);
    let (sender, receiver) = mpsc::channel(PIECES);
    // It ends when the computing thread drops its end.
    let reading = tokio::spawn(read(reader, sender));
    Ok((Pieces { head, receiver: Some(receiver), progress: Arc::clone(progress) }, Some(reading)))
}

async fn read(mut reader: FileReader, pieces: mpsc::Sender<Piece>) {
    loop {
        let piece = match reader.next_chunk().await {
            Ok(Some(piece)) => Ok(piece),
            Ok(None) => return,
            Err(error) => Err(error),
        };
        let failed = piece.is_err();
        if pieces.send(piece).await.is_err() || failed {
            return;
        }
    }
}

#[derive(Default)]
struct Pieces {
    /// What comes before the rest.
    head: Option<Bytes>,
    receiver: Option<mpsc::Receiver<Piece>>,
    progress: Arc<Progress>,
}

impl Feed for Pieces {
    fn next(&mut self) -> Result<Option<Bytes>> {
        if let Some(head) = self.head.take() {
            return Ok(Some(head));
        }
        let piece = self.receiver.as_mut().and_then(mpsc::Receiver::blocking_recv).transpose()?;
        if let Some(piece) = &piece {
            self.progress.bytes.fetch_add(piece.len() as u64, Ordering::Relaxed);
        }
        Ok(piece)
    }
}

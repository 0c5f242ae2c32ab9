//! A map task: its split is read by one task and computed on by a thread.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use cairn_proto::{Error, ErrorCode, Result, pb};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::{Context, PIECES, Progress, Task, success};
use crate::fs::FileReader;
use crate::mapreduce::collect::Collected;
use crate::mapreduce::input::{BatchReader, Feed, feed_start};
use crate::mapreduce::{Collector, InputFormat, Program, Shares, TaskContext, TaskInput, counter};

type Piece = Result<Bytes>;

/// Runs it.
pub async fn run(context: &Context, task: Task, split: pb::Split) -> Result<pb::TaskSuccess> {
    let program = Arc::clone(&context.program);
    let format = program.input();
    let (pieces, reading) = match format {
        InputFormat::Generated { .. } => (Pieces { receiver: None }, None),
        _ => open(context, &split, format).await?,
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
    let mapping = Mapping { program: Arc::clone(&program), split, format, shares, progress };
    let collected = if partitions == 0 {
        let compute = move |output| {
            let out = Collector::direct(output, fs, &task.work_dir, ours.user_counters.clone());
            mapping.run(&ours, pieces, out)?.finish(&task.map_output)
        };
        context.with_output(&*program, &task.id, &task.output_path, &user, compute).await
    } else {
        let compute = move || {
            let user = ours.user_counters.clone();
            let out = Collector::new(&*mapping.program, partitions, &shares, fs, &task.work_dir, user)?;
            mapping.run(&ours, pieces, out)?.finish(&task.map_output)
        };
        context.env.work.io(compute).await
    };
    if let Some(reading) = reading {
        reading.abort();
    }
    let Collected { partitions, files, mut counters } = collected?;
    counters.add(counter::INPUT_BYTES, bytes);
    counters.add(counter::RECORDS_IN, counted.records.load(Ordering::Relaxed));
    counters.merge(&user.all());
    let stored: Vec<u64> = partitions.iter().map(|entry| entry.stored).collect();
    Ok(success(&counters, stored, files))
}

/// Starts reading the split.
async fn open(context: &Context, split: &pb::Split, format: InputFormat) -> Result<(Pieces, Option<JoinHandle<()>>)> {
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
    reader.seek(feed_start(split, format));
    reader.limit_read_ahead(split.offset + split.length);
    let (sender, receiver) = mpsc::channel(PIECES);
    // It ends when the computing thread drops its end.
    let reading = tokio::spawn(read(reader, sender));
    Ok((Pieces { receiver: Some(receiver) }, Some(reading)))
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

struct Pieces {
    receiver: Option<mpsc::Receiver<Piece>>,
}

impl Feed for Pieces {
    fn next(&mut self) -> Result<Option<Bytes>> {
        self.receiver.as_mut().and_then(mpsc::Receiver::blocking_recv).transpose()
    }
}

/// What the computing thread needs to know.
struct Mapping {
    program: Arc<dyn Program>,
    split: pb::Split,
    format: InputFormat,
    shares: Shares,
    progress: Arc<Progress>,
}

impl Mapping {
    /// Maps all batches of the split.
    fn run(&self, task: &TaskContext, pieces: Pieces, mut out: Collector) -> Result<Collector> {
        let mut batches = BatchReader::new(&self.split, self.format, self.shares.record(), pieces)?;
        let mut mapper = self.program.mapper(task)?;
        while let Some(batch) = batches.next()? {
            let records = mapper.map_batch(&batch, &mut out)?;
            self.progress.bytes.fetch_add(batch.bytes.len() as u64, Ordering::Relaxed);
            self.progress.records.fetch_add(records, Ordering::Relaxed);
        }
        mapper.finish(&mut out)?;
        Ok(out)
    }
}

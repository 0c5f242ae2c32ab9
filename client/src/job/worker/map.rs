//! A map task: its split is read by one task and computed on by a thread.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use cairn_proto::{Error, ErrorCode, Result, pb};
use tokio::sync::mpsc;

use super::{Context, PIECES, Progress, Task, success};
use crate::fs::FileReader;
use crate::mapreduce::collect::Collected;
use crate::mapreduce::text::{Feed, SplitReader, feed_start};
use crate::mapreduce::{Collector, Program, counter};

type Piece = Result<Bytes>;

/// Runs it.
pub async fn run(context: &Context, task: Task, split: pb::Split) -> Result<pb::TaskSuccess> {
    let mut reader = context.files().await?.open(&split.path).await?;
    if reader.length() < split.offset + split.length {
        let text = format!(
            "{} has {} bytes now, it had {} when the job was planned",
            split.path,
            reader.length(),
            split.file_length
        );
        return Err(Error::new(ErrorCode::FileNotFound, text).with_subject(split.path));
    }
    reader.seek(feed_start(&split));
    reader.limit_read_ahead(split.offset + split.length);
    let (sender, receiver) = mpsc::channel(PIECES);
    // It ends when the computing thread drops its end.
    let reading = tokio::spawn(read(reader, sender));
    let program = Arc::clone(&context.program);
    let progress = Arc::clone(&task.progress);
    let counted = Arc::clone(&progress);
    let fs = Arc::clone(&context.env.fs);
    let (bytes, partitions) = (split.length, context.job.reducers);
    let collected = if partitions == 0 {
        let path = task.output_path.clone();
        let compute = move |output| {
            let out = Collector::direct(output, fs, &task.work_dir);
            map(&*program, &split, receiver, out, &progress)?.finish(&task.map_output)
        };
        context.with_output(&path, compute).await
    } else {
        let shares = context.shares;
        let compute = move || {
            let out = Collector::new(partitions, program.combine(), &shares, fs, &task.work_dir);
            map(&*program, &split, receiver, out, &progress)?.finish(&task.map_output)
        };
        context.env.work.io(compute).await
    };
    reading.abort();
    let Collected { partitions, mut counters } = collected?;
    counters.add(counter::INPUT_BYTES, bytes);
    let stored: Vec<u64> = partitions.iter().map(|entry| entry.stored).collect();
    let output_bytes = stored.iter().sum::<u64>() + counters.get(counter::OUTPUT_BYTES);
    counters.add(counter::RECORDS_IN, counted.records.load(Ordering::Relaxed));
    Ok(success(&counters, stored, output_bytes))
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
    receiver: mpsc::Receiver<Piece>,
}

impl Feed for Pieces {
    fn next(&mut self) -> Result<Option<Bytes>> {
        self.receiver.blocking_recv().transpose()
    }
}

/// Maps all batches of the split.
fn map(
    program: &dyn Program,
    split: &pb::Split,
    receiver: mpsc::Receiver<Piece>,
    mut out: Collector,
    progress: &Progress,
) -> Result<Collector> {
    let mut batches = SplitReader::new(split, program.delimiter(), Pieces { receiver });
    let mut mapper = program.mapper()?;
    while let Some(batch) = batches.next()? {
        let records = mapper.map_batch(&batch, &mut out)?;
        progress.bytes.fetch_add(batch.bytes.len() as u64, Ordering::Relaxed);
        progress.records.fetch_add(records, Ordering::Relaxed);
    }
    mapper.finish(&mut out)?;
    Ok(out)
}

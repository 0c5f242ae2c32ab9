//! The disk's side of a write: a task of its own per replica, so that forwarding never waits for the disk.
//!
//! # Overview
//! Jobs come through a bounded channel, bounded in bytes too; those that wait are carried out together off the async threads. Progress is a
//! number that anybody may read; completed markers are events in order.
//!
//! # Cancellation
//! The task runs to its end whatever becomes of the connection: it ends when its channel closes, and then the replica is finalized or kept for
//! recovery and the replica map says so.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use cairn_proto::dataplane::MarkerKind;
use cairn_proto::{Error, Result};
use tokio::sync::mpsc;

use super::Transfer;
use super::ack::Event;
use super::budget::Share;
use crate::store::writer::{Chunk, Matcher, ReplicaWriter};

/// Jobs that may wait.
pub const JOBS: usize = 64;
/// So much is worth a piece of work of its own on a blocking thread.
const BATCH_BYTES: usize = 1 << 20;
/// Less waits so long for more, unless a marker says that somebody waits for it.
const GATHER: Duration = Duration::from_millis(2);
/// A finished block's report may hold its ack back this long.
const REPORT_LIMIT: Duration = Duration::from_secs(1);

/// Where the data goes.
pub enum Sink {
    /// To a new or reopened replica.
    Writer(ReplicaWriter),
    /// To a copy of the first part of a block; see [`super::partial`].
    Partial(ReplicaWriter),
    /// Nowhere: it is compared with what is finalized already.
    Matcher(Matcher),
}

impl Sink {
    /// The volume's id.
    pub fn storage_id(&self) -> &str {
        match self {
            Self::Writer(writer) | Self::Partial(writer) => writer.storage_id(),
            Self::Matcher(matcher) => matcher.storage_id(),
        }
    }

    /// Bytes of data held.
    pub fn length(&self) -> u64 {
        match self {
            Self::Writer(writer) | Self::Partial(writer) => writer.length(),
            Self::Matcher(matcher) => matcher.length(),
        }
    }

    fn append(&mut self, chunks: &[Chunk]) -> Result<()> {
        match self {
            Self::Writer(writer) | Self::Partial(writer) => writer.append(chunks),
            Self::Matcher(matcher) => matcher.append(chunks),
        }
    }

    fn sync(&mut self) -> Result<()> {
        match self {
            Self::Writer(writer) | Self::Partial(writer) => writer.sync(),
            Self::Matcher(_) => Ok(()),
        }
    }

    fn finish(&mut self) -> Result<u64> {
        match self {
            Self::Writer(writer) => writer.finalize(),
            Self::Partial(writer) => writer.hand_over(),
            Self::Matcher(matcher) => matcher.finish(),
        }
    }

    fn abandon(&mut self) {
        if let Self::Writer(writer) | Self::Partial(writer) = self {
            writer.abandon();
        }
    }
}

/// One job of the disk task.
pub enum Job {
    /// Append; the share gives the bytes' room back.
    Frames(Chunk, Share),
    /// Carry out a marker.
    Marker(MarkerKind),
}

/// Carries out jobs until the channel closes, a finish is done, or the disk fails.
pub async fn run(
    transfer: Arc<Transfer>,
    mut sink: Sink,
    mut jobs: mpsc::Receiver<Job>,
    written: Arc<AtomicU64>,
    events: mpsc::Sender<Event>,
) {
    let mut waiting = Vec::with_capacity(JOBS);
    let mut finished = false;
    'jobs: while !finished && jobs.recv_many(&mut waiting, JOBS).await > 0 {
        if is_small(&waiting) {
            // Fewer, larger pieces of work: each costs two turns from thread to thread.
            let more = async {
                while waiting.len() < JOBS && is_small(&waiting) {
                    let Some(job) = jobs.recv().await else { break };
                    waiting.push(job);
                }
            };
            // What there is goes on either way.
            let _ = transfer.env.clock.timeout(GATHER, more).await;
        }
        let mut chunks = Vec::new();
        let mut permits = Vec::new();
        let mut markers = Vec::new();
        for job in waiting.drain(..) {
            match job {
                Job::Frames(chunk, permit) => {
                    // A frame after a marker would be written before the marker is carried out: more than was asked, never less.
                    chunks.push(chunk);
                    permits.push(permit);
                }
                Job::Marker(kind) => markers.push(kind),
            }
        }
        let kinds = markers.clone();
        let (back, done) = transfer.env.work.io(move || carry_out(sink, &chunks, &kinds)).await;
        sink = back;
        drop(permits);
        written.store(sink.length(), Ordering::Release);
        match done {
            Ok(report) => {
                if let Some(number) = report {
                    finished = true;
                    transfer.store.map().wait_sent(&transfer.env.clock, number, REPORT_LIMIT).await;
                }
                if markers.is_empty() {
                    // If there is no room the other side is awake anyway, and reads the number.
                    let _ = events.try_send(Event::Wrote);
                }
                for kind in markers {
                    if events.send(Event::Done(kind)).await.is_err() {
                        break 'jobs;
                    }
                }
            }
            Err(error) => {
                let _ = events.send(Event::Failed(error)).await;
                break;
            }
        }
    }
    // Nobody may wait for room in the budget while the file is closed.
    drop(jobs);
    if !finished {
        transfer.env.work.io(move || sink.abandon()).await;
    }
}

/// Nobody waits for an answer to these jobs, and they are few bytes.
fn is_small(jobs: &[Job]) -> bool {
    let bytes = |job: &Job| match job {
        Job::Frames(chunk, _) => Some(chunk.bytes()),
        Job::Marker(_) => None,
    };
    jobs.iter().map(bytes).sum::<Option<usize>>().is_some_and(|bytes| bytes < BATCH_BYTES)
}

/// Appends, then syncs or finishes as asked. A finish returns the number of its report.
fn carry_out(mut sink: Sink, chunks: &[Chunk], markers: &[MarkerKind]) -> (Sink, Result<Option<u64>, Error>) {
    let work = |sink: &mut Sink| -> Result<Option<u64>> {
        if !chunks.is_empty() {
            sink.append(chunks)?;
        }
        if markers.contains(&MarkerKind::Finish) {
            return sink.finish().map(Some);
        }
        if markers.contains(&MarkerKind::Sync) {
            sink.sync()?;
        }
        Ok(None)
    };
    let done = work(&mut sink);
    (sink, done)
}

//! A job's state in the file system: written by its driver, read by whoever takes it over or asks.
//!
//! ```text
//! /.cairn/jobs/<job>/about            JSON for people: name, user, kind, output, when it was submitted
//!                    journal.<epoch>  one per driver: what it decided; readable by the job's user
//!                    *.<epoch>.new    `about` or `report` of that driver, before it is put in place
//!                    report           JSON, when the job is over; the folder then moves to
//! /.cairn/history/<job>/
//! ```
//!
//! # Format of a journal
//! | bytes | |
//! |---|---|
//! | 8 | `CAIRNJOB` |
//! | 4 | version, 1 (big-endian, as all numbers) |
//! | then, per record: 4 | length of the message |
//! | 4 | CRC-32C of the message |
//! | | a [`pb::JobRecord`] |
//!
//! A record that is cut or does not check ends the journal: it is the last that its driver wrote, and nobody acted on it. The first journal begins with
//! `submitted` and the splits; every journal says which driver writes it.
//!
//! # Fencing
//! A journal is open as long as its driver lives. Who takes over recovers its lease first, so that the old driver can write no further record, and then
//! creates the journal of the next epoch, which only one can. The new epoch goes to every node, and the staging folder gets a new name; so an old driver that
//! wakes can neither start tasks, nor name outputs, nor commit.
//!
//! # Durability
//! Submission, a takeover and the decision to commit are synced. Accepted attempts are flushed before their output gets its name: they survive the
//! death of processes; a power cut that takes all replicas of the journal's end takes the tasks, too.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::{Buf as _, Bytes, BytesMut};
use cairn_proto::path::{join, split_last};
use cairn_proto::pb::job_record::Record;
use cairn_proto::{Error, ErrorCode, Result, pb};
use prost::Message as _;
use tokio::sync::{mpsc, oneshot, watch};

use super::splits::PlannedSplit;
use crate::fs::{CreateOptions, FileSystem, FileWriter};

/// Folder of jobs that are not over.
pub const JOBS: &str = "/.cairn/jobs";
/// Folder of jobs that are.
pub const HISTORY: &str = "/.cairn/history";

const MAGIC: &[u8; 8] = b"CAIRNJOB";
const VERSION: u32 = 1;
/// Largest record.
const MAX_RECORD: usize = 32 << 20;
/// Largest journal that is read.
const MAX_JOURNAL: u64 = 4 << 30;
/// Splits in one record.
const SPLITS_PER_RECORD: usize = 5_000;
/// How long a lease may take to be recovered.
const RECOVERY_LIMIT_MS: u64 = 60_000;
const RECOVERY_LOOK: Duration = Duration::from_millis(50);

/// Folder of a job that is not over.
pub fn folder(job_id: &str) -> String {
    join(JOBS, job_id)
}

/// The journal of one driver.
pub fn journal_path(job_id: &str, epoch: u64) -> String {
    format!("{JOBS}/{job_id}/journal.{epoch}")
}

/// The staging folder of a job while the driver of this epoch has it: beside the output, so that it becomes it by one rename.
pub fn staging_path(output: &str, job_id: &str, epoch: u64) -> String {
    let parent = split_last(output).map_or("/", |(parent, _)| parent);
    join(parent, &format!(".{job_id}.staging-{epoch}"))
}

struct Entry {
    records: Vec<u8>,
    /// Whom to tell when they are as safe as asked; sync if true.
    settled: Option<(bool, oneshot::Sender<()>)>,
}

/// The journal that a driver writes. A task of its own does the writing, many records at a time; dropping this leaves the file open, as a crash does.
pub struct Journal {
    entries: mpsc::Sender<Entry>,
    failed: watch::Receiver<Option<Error>>,
    closed: oneshot::Receiver<()>,
    clock: cairn_common::clock::Clock,
}

fn encode(record: Record, wall_ms: u64, out: &mut Vec<u8>) {
    let message = pb::JobRecord { wall_ms, record: Some(record) }.encode_to_vec();
    out.extend_from_slice(&(message.len() as u32).to_be_bytes());
    out.extend_from_slice(&crc32c::crc32c(&message).to_be_bytes());
    out.extend_from_slice(&message);
}

impl Journal {
    /// Creates the journal of an epoch; fails if there is one.
    pub async fn create(fs: &FileSystem, job_id: &str, epoch: u64) -> Result<Self> {
        let options = CreateOptions { permission: 0o600, ..CreateOptions::default() };
        let mut writer = fs.create(&journal_path(job_id, epoch), options).await?;
        writer.write(MAGIC).await?;
        writer.write(&VERSION.to_be_bytes()).await?;
        let (entries, receiver) = mpsc::channel(256);
        let (failed_sender, failed) = watch::channel(None);
        let (closed_sender, closed) = oneshot::channel();
        tokio::spawn(async move {
            match write_all(writer, receiver).await {
                Ok(()) => {
                    let _ = closed_sender.send(());
                }
                Err(error) => {
                    failed_sender.send_replace(Some(error));
                }
            }
        });
        Ok(Self { entries, failed, closed, clock: fs.env().clock.clone() })
    }

    fn failure(&self) -> Error {
        let unknown = || Error::new(ErrorCode::Internal, "the journal has ended");
        let error = self.failed.borrow().clone().unwrap_or_else(unknown);
        Error::new(error.code(), format!("the job's journal cannot be written: {}", error.message()))
    }

    async fn send(&self, records: Vec<Record>, settled: Option<(bool, oneshot::Sender<()>)>) -> Result<()> {
        let wall_ms = self.clock.wall_ms();
        let mut bytes = Vec::new();
        records.into_iter().for_each(|record| encode(record, wall_ms, &mut bytes));
        let sent = self.entries.send(Entry { records: bytes, settled }).await;
        sent.map_err(|_| self.failure())
    }

    /// Writes it down soon.
    pub async fn note(&self, record: Record) -> Result<()> {
        self.send(vec![record], None).await
    }

    /// Writes them down, with all noted before; when this returns, readers see them, and with `sync` they are durable.
    pub async fn settle(&self, records: Vec<Record>, sync: bool) -> Result<()> {
        let (done, settled) = oneshot::channel();
        self.send(records, Some((sync, done))).await?;
        settled.await.map_err(|_| self.failure())
    }

    /// Resolves if it cannot be written any more.
    pub async fn failed(&self) -> Error {
        let mut failed = self.failed.clone();
        if failed.wait_for(Option::is_some).await.is_err() && self.failed.borrow().is_none() {
            // It was closed.
            std::future::pending::<()>().await;
        }
        self.failure()
    }

    /// Writes what is left, durably, and closes the file.
    pub async fn close(self) -> Result<()> {
        let Self { entries, failed, closed, .. } = self;
        drop(entries);
        closed.await.map_err(|_| {
            let unknown = || Error::new(ErrorCode::Internal, "the journal has ended");
            failed.borrow().clone().unwrap_or_else(unknown)
        })
    }
}

async fn write_all(mut writer: FileWriter, mut entries: mpsc::Receiver<Entry>) -> Result<()> {
    while let Some(first) = entries.recv().await {
        let (mut sync, mut waiting) = (false, Vec::new());
        let mut next = Some(first);
        while let Some(entry) = next {
            writer.write(&entry.records).await?;
            if let Some((durable, done)) = entry.settled {
                sync |= durable;
                waiting.push(done);
            }
            next = entries.try_recv().ok();
        }
        if sync {
            writer.sync().await?;
        } else {
            writer.flush().await?;
        }
        // Who does not wait any more has given the job up.
        for done in waiting {
            let _ = done.send(());
        }
    }
    writer.close().await.map(drop)
}

/// The splits as records.
pub fn split_records(splits: &[PlannedSplit]) -> Vec<Record> {
    let message = |planned: &PlannedSplit| pb::JobSplit {
        split: Some(planned.split.clone()),
        nodes: planned.nodes.clone(),
        racks: planned.racks.clone(),
    };
    let record = |part: &[PlannedSplit]| Record::Splits(pb::JobSplits { splits: part.iter().map(message).collect() });
    splits.chunks(SPLITS_PER_RECORD).map(record).collect()
}

/// What journals say of a job.
#[derive(Clone, Debug, Default)]
pub struct Written {
    /// What was submitted.
    pub submitted: pb::JobSubmitted,
    /// All maps' inputs.
    pub splits: Vec<PlannedSplit>,
    /// The newest driver; 0: none has begun.
    pub epoch: u64,
    /// Where it said that it runs.
    pub place: String,
    /// Accepted attempts, the newest of each task.
    pub accepted: BTreeMap<(i32, u32), pb::TaskAccepted>,
    /// Attempts that counted as failures: maps, reduces.
    pub failures: [u32; 2],
    /// The decision to commit was made; the staging folder's inode.
    pub committing: Option<u64>,
    /// It is over.
    pub ended: Option<pb::JobEnded>,
    /// The newest progress.
    pub beat: Option<pb::JobStatus>,
    /// When it was submitted, and when the last record was written; milliseconds since 1970.
    pub submitted_ms: u64,
    /// See `submitted_ms`.
    pub last_ms: u64,
}

impl Written {
    /// What all tasks of the job share.
    pub fn job(&self) -> pb::JobDescription {
        self.submitted.job.clone().unwrap_or_default()
    }

    fn apply(&mut self, record: pb::JobRecord) {
        self.last_ms = self.last_ms.max(record.wall_ms);
        match record.record {
            Some(Record::Submitted(submitted)) => {
                self.submitted = submitted;
                self.submitted_ms = record.wall_ms;
            }
            Some(Record::Splits(part)) => self.splits.extend(part.splits.into_iter().map(|one| PlannedSplit {
                split: one.split.unwrap_or_default(),
                nodes: one.nodes,
                racks: one.racks,
            })),
            Some(Record::Driver(driver)) => (self.epoch, self.place) = (driver.epoch, driver.place),
            Some(Record::Accepted(accepted)) => {
                let task = accepted.task.unwrap_or_default();
                self.accepted.insert((task.kind, task.index), accepted);
            }
            Some(Record::Failed(failed)) => {
                let reduce = failed.task.is_some_and(|task| task.kind() == pb::TaskKind::Reduce);
                self.failures[usize::from(reduce)] += u32::from(failed.counts);
            }
            Some(Record::Lost(lost)) => {
                let key = (pb::TaskKind::Map as i32, lost.map_index);
                if self.accepted.get(&key).and_then(|one| one.task).is_some_and(|task| task.attempt == lost.attempt) {
                    self.accepted.remove(&key);
                }
            }
            Some(Record::Beat(status)) => self.beat = Some(status),
            Some(Record::Committing(committing)) => self.committing = Some(committing.staging_inode),
            Some(Record::Ended(ended)) => self.ended = Some(ended),
            None => {}
        }
    }
}

/// Takes whole records off the start of `bytes`; false when what follows is not one.
fn take_records(bytes: &mut BytesMut, mut each: impl FnMut(pb::JobRecord)) -> bool {
    while bytes.len() >= 8 {
        let number = |at: usize| bytes[at..].first_chunk::<4>().map_or(0, |four| u32::from_be_bytes(*four));
        let (length, crc) = (number(0) as usize, number(4));
        if length > MAX_RECORD {
            return false;
        }
        if bytes.len() < 8 + length {
            break;
        }
        bytes.advance(8);
        let message: Bytes = bytes.split_to(length).freeze();
        match pb::JobRecord::decode(message.clone()) {
            Ok(record) if crc32c::crc32c(&message) == crc => each(record),
            _ => return false,
        }
    }
    true
}

/// Reads one journal into `written`.
async fn read_journal(fs: &FileSystem, path: &str, written: &mut Written) -> Result<()> {
    let mut reader = fs.open(path).await?;
    let unfit =
        |why: &str| Error::new(ErrorCode::Corrupt, format!("{path} is no journal of a job: {why}")).with_subject(path);
    if reader.length() > MAX_JOURNAL {
        return Err(unfit("it is too large"));
    }
    let mut bytes = BytesMut::new();
    let mut started = false;
    while let Some(chunk) = reader.next_chunk().await? {
        bytes.extend_from_slice(&chunk);
        if !started && bytes.len() >= MAGIC.len() + 4 {
            if !bytes.starts_with(MAGIC) {
                return Err(unfit("it starts with other bytes"));
            }
            bytes.advance(MAGIC.len());
            let version = bytes.get_u32();
            if version != VERSION {
                return Err(unfit(&format!("its version is {version}, this program knows {VERSION}")));
            }
            started = true;
        }
        if started && !take_records(&mut bytes, |record| written.apply(record)) {
            break;
        }
    }
    Ok(())
}

/// Reads all journals of a job in `folder` (of jobs, or of the history). `None`: none was begun.
pub async fn read(fs: &FileSystem, folder: &str) -> Result<Option<(Written, u64)>> {
    let mut epochs: Vec<u64> = Vec::new();
    for entry in fs.list_all(folder).await? {
        let name = split_last(&entry.path).map_or("", |(_, name)| name);
        epochs.extend(name.strip_prefix("journal.").and_then(|epoch| epoch.parse::<u64>().ok()));
    }
    epochs.sort_unstable();
    let mut written = Written::default();
    for epoch in &epochs {
        read_journal(fs, &format!("{folder}/journal.{epoch}"), &mut written).await?;
    }
    Ok(epochs.last().map(|newest| (written, *newest)))
}

/// Takes a job over: fences its driver, and begins the journal of the next epoch. The first record of that is still to be written.
pub async fn take_over(fs: &FileSystem, job_id: &str) -> Result<(Written, u64, Journal)> {
    let folder = folder(job_id);
    let nothing =
        || Error::new(ErrorCode::Corrupt, format!("job {job_id} was never submitted as a whole")).with_subject(job_id);
    let (_, newest) = read(fs, &folder).await?.ok_or_else(nothing)?;
    close_journal(fs, &journal_path(job_id, newest)).await?;
    // Only now it is sure that the old driver adds nothing.
    let (written, _) = read(fs, &folder).await?.ok_or_else(nothing)?;
    if written.submitted.job.is_none() || written.splits.len() != written.submitted.maps as usize {
        return Err(nothing());
    }
    let epoch = newest + 1;
    let journal = Journal::create(fs, job_id, epoch).await.map_err(|error| match error.code() {
        ErrorCode::FileAlreadyExists | ErrorCode::AlreadyBeingCreated => {
            let text = format!("another driver is taking over job {job_id}");
            Error::new(ErrorCode::Busy, text).with_subject(job_id)
        }
        _ => error,
    })?;
    Ok((written, epoch, journal))
}

async fn close_journal(fs: &FileSystem, path: &str) -> Result<()> {
    let clock = &fs.env().clock;
    let started_ms = clock.mono_ms();
    loop {
        let answer = fs.recover_lease(path).await?;
        if answer.closed {
            return Ok(());
        }
        if clock.mono_ms().saturating_sub(started_ms) > RECOVERY_LIMIT_MS {
            let text = format!("{path} cannot be taken from its driver: {}", answer.waits_for);
            return Err(Error::new(ErrorCode::TimedOut, text).with_subject(path));
        }
        clock.sleep(RECOVERY_LOOK).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accepted(index: u32, attempt: u32) -> Record {
        let task = Some(pb::TaskId { kind: 0, index, attempt });
        Record::Accepted(pb::TaskAccepted { task, ..Default::default() })
    }

    fn read_back(bytes: &[u8]) -> (Written, bool) {
        let mut written = Written::default();
        let mut bytes = BytesMut::from(bytes);
        let whole = take_records(&mut bytes, |record| written.apply(record));
        (written, whole)
    }

    #[test]
    fn the_newest_of_each_task_counts_and_what_was_lost_does_not() {
        let mut bytes = Vec::new();
        let lost = Record::Lost(pb::OutputLost { map_index: 2, attempt: 0 });
        let stale = Record::Lost(pb::OutputLost { map_index: 1, attempt: 0 });
        for record in [accepted(1, 0), accepted(2, 0), lost, accepted(1, 1), stale] {
            encode(record, 7, &mut bytes);
        }
        let (written, whole) = read_back(&bytes);
        assert!(whole && written.last_ms == 7);
        let have: Vec<_> = written.accepted.values().map(|one| one.task.unwrap()).collect();
        assert_eq!(have, [pb::TaskId { kind: 0, index: 1, attempt: 1 }]);
    }

    #[test]
    fn a_cut_or_damaged_end_is_left_out() {
        let mut bytes = Vec::new();
        encode(accepted(1, 0), 1, &mut bytes);
        let first = bytes.len();
        encode(accepted(2, 0), 1, &mut bytes);
        for cut in first..bytes.len() {
            assert_eq!(read_back(&bytes[..cut]).0.accepted.len(), 1, "cut at {cut}");
        }
        for at in first..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x40;
            assert_eq!(read_back(&damaged).0.accepted.len(), 1, "byte {at}");
        }
        assert_eq!(read_back(&bytes).0.accepted.len(), 2);
    }
}

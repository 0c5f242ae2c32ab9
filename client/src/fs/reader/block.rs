//! A range of one block, from whichever of its replicas gives it.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use cairn_proto::frame::FrameHeader;
use cairn_proto::{Error, ErrorCode, ErrorKind, Result, pb};
use futures_util::stream::{FuturesOrdered, StreamExt};

use super::super::datanode::{block_name, node_name};
use super::super::{LocatedBlock, Replica};
use super::frames::{FrameStream, damaged};
use super::hedge::{self, Attempt, Opened};
use super::locate::OpenedFile;
use crate::fs::task::Task;

/// Frames verified by one piece of work, and pieces of work at a time.
const FRAMES_PER_CHECK: usize = 4;
const CHECKS_IN_FLIGHT: usize = 4;
/// The rest of an answer may take this long.
const FINISH_WAIT: Duration = Duration::from_millis(200);

/// Yields the data of a range of a block, verified, in order; goes on with the next replica where one fails.
pub(super) struct BlockSource {
    file: Arc<OpenedFile>,
    located: LocatedBlock,
    /// Next byte to yield, and where to stop; offsets in the block.
    position: u64,
    end: u64,
    active: Option<Active>,
    verified: VecDeque<Verified>,
    tried: HashSet<String>,
    failures: Vec<String>,
    rounds: u32,
    /// Where the active replica began.
    began: u64,
    /// The file has other blocks by now.
    gone: bool,
}

struct Active {
    replica: Replica,
    frames: FrameStream,
    group: Vec<(FrameHeader, Bytes)>,
    checks: FuturesOrdered<Task<Vec<Verified>>>,
    ended: bool,
    /// Why it ended too early; told after what came before was yielded.
    broken: Option<Error>,
}

/// Data with its offset in the block.
struct Verified {
    offset: u64,
    data: Bytes,
}

impl BlockSource {
    /// Of `range` (offsets in the block).
    pub(super) fn new(file: Arc<OpenedFile>, located: LocatedBlock, range: std::ops::Range<u64>) -> Self {
        Self {
            file,
            located,
            position: range.start,
            end: range.end,
            active: None,
            verified: VecDeque::new(),
            tried: HashSet::new(),
            failures: Vec::new(),
            rounds: 0,
            began: range.start,
            gone: false,
        }
    }

    /// Whether it failed because the file does not hold the block any more.
    pub(super) fn is_gone(&self) -> bool {
        self.gone
    }

    /// The next piece; `None` at the end of the range.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>> {
        loop {
            if self.position >= self.end {
                self.finish().await;
                return Ok(None);
            }
            if let Some(verified) = self.verified.pop_front() {
                match self.cut(verified) {
                    Ok(Some(data)) => return Ok(Some(data)),
                    Ok(None) => {}
                    Err(error) => self.fail(error),
                }
                continue;
            }
            let stepped = match &mut self.active {
                Some(_) => self.step().await,
                None => {
                    self.connect().await?;
                    continue;
                }
            };
            match stepped {
                Ok(Some(verified)) => self.verified.extend(verified),
                Ok(None) => {
                    let text = format!("the answer ends at {} of {}", self.position, self.end);
                    self.fail(Error::new(ErrorCode::Unreachable, text));
                }
                Err(error) => self.fail(error),
            }
        }
    }

    /// What of a verified frame belongs to the range and was not yielded yet.
    fn cut(&mut self, verified: Verified) -> Result<Option<Bytes>> {
        let end = verified.offset + verified.data.len() as u64;
        if end <= self.position {
            return Ok(None);
        }
        if verified.offset > self.position {
            let text = format!("data is missing from {} to {}", self.position, verified.offset);
            return Err(Error::new(ErrorCode::Corrupt, text));
        }
        let from = (self.position - verified.offset) as usize;
        let to = (end.min(self.end) - verified.offset) as usize;
        self.position = end.min(self.end);
        Ok(Some(verified.data.slice(from..to)))
    }

    /// Opens the next replica that was not tried; asks for the locations again when all were.
    async fn connect(&mut self) -> Result<()> {
        let inner = &self.file.fs.inner;
        let candidates = inner.datanodes.in_order(&self.located.replicas);
        let Some(replica) = candidates.into_iter().find(|replica| !self.tried.contains(&replica.node_id)) else {
            return self.look_again().await;
        };
        self.tried.insert(replica.node_id.clone());
        let range = self.position..self.end;
        if let Some(after) = inner.settings.hedged_after() {
            let first = Attempt::start(&self.file, &self.located, replica, range);
            self.race(first, after).await;
            return Ok(());
        }
        match hedge::open(&self.file, &self.located, &replica, range).await {
            Ok(frames) => self.activate(Opened { replica, frames, first: None }),
            Err(error) => self.blame(&replica, error),
        }
        Ok(())
    }

    fn activate(&mut self, opened: Opened) {
        self.began = self.position;
        let Opened { replica, frames, first } = opened;
        let (group, checks) = (first.into_iter().collect(), FuturesOrdered::new());
        self.active = Some(Active { replica, frames, group, checks, ended: false, broken: None });
    }

    /// The next replica that was not tried, as a rival of one that is slow.
    fn rival(&mut self) -> Option<Attempt> {
        let inner = &self.file.fs.inner;
        let candidates = inner.datanodes.in_order(&self.located.replicas);
        let replica = candidates.into_iter().find(|replica| !self.tried.contains(&replica.node_id))?;
        self.tried.insert(replica.node_id.clone());
        inner.datanodes.hedges.started.fetch_add(1, Ordering::Relaxed);
        Some(Attempt::start(&self.file, &self.located, replica, self.position..self.end))
    }

    /// Waits for the first frame; after a while another replica is asked too, and the first of the two goes on.
    async fn race(&mut self, mut first: Attempt, after: Duration) {
        let clock = self.file.fs.inner.env.clock.clone();
        let won = match clock.timeout(after, first.opened()).await {
            Ok(opened) => opened.map_err(|error| (first.replica.clone(), error)),
            Err(_) => match self.rival() {
                None => first.opened().await.map_err(|error| (first.replica.clone(), error)),
                Some(second) => self.run_both(first, second).await,
            },
        };
        match won {
            Ok(opened) => self.activate(opened),
            Err((replica, error)) => self.blame(&replica, error),
        }
    }

    async fn run_both(
        &mut self,
        mut first: Attempt,
        mut second: Attempt,
    ) -> std::result::Result<Opened, (Replica, Error)> {
        let (opened, mut other, is_second) = tokio::select! {
            biased;
            opened = first.opened() => (opened.map_err(|error| (first.replica.clone(), error)), second, false),
            opened = second.opened() => (opened.map_err(|error| (second.replica.clone(), error)), first, true),
        };
        match opened {
            Ok(opened) => {
                self.file.fs.inner.datanodes.hedges.won.fetch_add(u64::from(is_second), Ordering::Relaxed);
                Ok(opened)
            }
            // The other one may still come.
            Err((replica, error)) => {
                self.blame(&replica, error);
                other.opened().await.map_err(|error| (other.replica.clone(), error))
            }
        }
    }

    /// Moves the active replica on. If it gives nothing for a while, another one is asked for the rest, and the first of the two goes on.
    async fn step(&mut self) -> Result<Option<Vec<Verified>>> {
        let range = self.position..self.end;
        let Some(mut active) = self.active.take() else { return Ok(None) };
        let file = Arc::clone(&self.file);
        let stepped = match file.fs.inner.settings.hedged_after() {
            None => active.step(&file, range).await,
            Some(after) => {
                let mut step = std::pin::pin!(active.step(&file, range));
                match file.fs.inner.env.clock.timeout(after, &mut step).await {
                    Ok(stepped) => stepped,
                    Err(_) => match self.rival() {
                        None => step.await,
                        Some(mut rival) => {
                            let hedged = tokio::select! {
                                biased;
                                stepped = &mut step => Ok(stepped),
                                opened = rival.opened() => Err(opened),
                            };
                            match hedged {
                                Ok(stepped) => {
                                    // It was not needed; another time it may be.
                                    self.tried.remove(&rival.replica.node_id);
                                    stepped
                                }
                                Err(Ok(opened)) => {
                                    file.fs.inner.datanodes.hedges.won.fetch_add(1, Ordering::Relaxed);
                                    // The slow one is left, not blamed.
                                    self.activate(opened);
                                    return Ok(Some(Vec::new()));
                                }
                                Err(Err(error)) => {
                                    self.blame(&rival.replica, error);
                                    step.await
                                }
                            }
                        }
                    },
                }
            }
        };
        self.active = Some(active);
        stepped
    }

    async fn look_again(&mut self) -> Result<()> {
        let inner = &self.file.fs.inner;
        if self.rounds >= inner.settings.read_rounds {
            return Err(self.give_up());
        }
        self.rounds += 1;
        let wait_ms = (250_u64 << self.rounds.min(5)) + inner.env.entropy.below(100);
        inner.env.clock.sleep(Duration::from_millis(wait_ms)).await;
        match self.file.locate_again(&self.located).await? {
            Some(fresh) => self.located = fresh,
            None => {
                self.gone = true;
                let name = block_name(self.located.block.as_ref().unwrap_or(&Default::default()));
                let text = format!("{} holds {name} no more", self.file.path);
                return Err(Error::new(ErrorCode::BlockNotFound, text).with_subject(&self.file.path));
            }
        }
        self.tried.clear();
        Ok(())
    }

    fn give_up(&self) -> Error {
        let block = self.located.block.clone().unwrap_or_default();
        let seen: HashSet<&String> = self.failures.iter().collect();
        let mut why: Vec<&str> = seen.into_iter().map(String::as_str).collect();
        why.sort_unstable();
        let why = if why.is_empty() { "no datanode that lives has one".to_owned() } else { why.join("; ") };
        let (path, name) = (&self.file.path, block_name(&block));
        let code = if self.located.corrupt { ErrorCode::Corrupt } else { ErrorCode::BlockNotFound };
        let text = format!("reading {path}: no replica of {name} can be read at {}: {why}", self.position);
        Error::new(code, text).with_subject(path)
    }

    /// Leaves the active replica for the next one.
    fn fail(&mut self, error: Error) {
        self.verified.clear();
        if let Some(active) = self.active.take() {
            if self.position > self.began {
                // What failed before this progress may be well again; only this one is left alone.
                self.tried = HashSet::from([active.replica.node_id.clone()]);
                self.failures.clear();
                self.rounds = 0;
            }
            self.blame(&active.replica, error);
        }
    }

    fn blame(&mut self, replica: &Replica, error: Error) {
        let inner = &self.file.fs.inner;
        tracing::warn!(node = %node_name(replica), file = %self.file.path, %error, "a replica could not be read");
        match error.kind() {
            ErrorKind::Corrupt => {
                let request = pb::ReportBadReplicaRequest {
                    block: self.located.block.clone(),
                    node_id: replica.node_id.clone(),
                    storage_id: replica.storage_id.clone(),
                    reason: error.to_string(),
                };
                let fs = self.file.fs.clone();
                // The reader does not wait for it; should it get lost, the datanode's own checks find the damage.
                tokio::spawn(async move { fs.report_bad_replica(request).await });
            }
            // A busy node lives, and soon has time.
            ErrorKind::Unavailable if error.code() != ErrorCode::Busy => inner.datanodes.avoid(replica),
            _ => {}
        }
        self.failures.push(format!("{}: {error}", node_name(replica)));
    }

    /// Keeps the connection if the answer ends here.
    async fn finish(&mut self) {
        let Some(mut active) = self.active.take() else { return };
        // At most the frames up to the next entry of the block's index follow; reading them is cheaper than a new connection, but the
        // caller has all that it wants, and waits.
        let inner = &self.file.fs.inner;
        if let Ok(Ok(None)) = inner.env.clock.timeout(FINISH_WAIT, active.frames.next()).await
            && let Some(conn) = active.frames.into_idle()
        {
            inner.datanodes.keep(&active.replica.address, conn);
        }
    }
}

impl Active {
    /// Moves on until some frames are verified; `None` at the end of the answer.
    async fn step(&mut self, file: &Arc<OpenedFile>, range: std::ops::Range<u64>) -> Result<Option<Vec<Verified>>> {
        let inner = &file.fs.inner;
        let stall = Duration::from_millis(inner.settings.read_stall_ms);
        loop {
            if self.ended && self.checks.is_empty() {
                return self.broken.take().map_or(Ok(None), Err);
            }
            let reads_on = !self.ended && self.checks.len() < CHECKS_IN_FLIGHT;
            tokio::select! {
                biased;
                Some(checked) = self.checks.next(), if !self.checks.is_empty() => return checked.map(Some),
                frame = inner.env.clock.timeout(stall, self.frames.next()), if reads_on => {
                    let frame = frame.unwrap_or_else(|_| Err(hedge::silent(&self.replica, stall)));
                    match frame {
                        // Before or after what is wanted: the answer starts and ends where the block's index allows.
                        Ok(Some((header, _))) if header.end() <= range.start => {}
                        Ok(Some((header, _))) if header.offset >= range.end => {}
                        Ok(Some(frame)) => self.group.push(frame),
                        Ok(None) => self.ended = true,
                        Err(error) => {
                            self.ended = true;
                            self.broken = Some(error);
                        }
                    }
                    if self.group.len() >= FRAMES_PER_CHECK || (self.ended && !self.group.is_empty()) {
                        self.check(file);
                    }
                }
            }
        }
    }

    /// Decompresses and verifies the gathered frames on the work pool.
    fn check(&mut self, file: &Arc<OpenedFile>) {
        let group = std::mem::take(&mut self.group);
        let (node, block) = self.frames.names();
        let work = file.fs.inner.env.work.clone();
        self.checks.push_back(Task::spawn(async move {
            work.cpu(move || {
                let open = |(header, payload): (FrameHeader, Bytes)| match header.open(payload) {
                    Ok(data) => Ok(Verified { offset: header.offset, data }),
                    Err(error) => Err(damaged(&node, &block, error)),
                };
                group.into_iter().map(open).collect::<Result<Vec<_>>>()
            })
            .await
        }));
    }
}

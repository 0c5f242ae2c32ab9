//! A range of one block, from whichever of its replicas gives it.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use cairn_proto::frame::FrameHeader;
use cairn_proto::{Error, ErrorCode, ErrorKind, Result, pb};
use futures_util::stream::{FuturesOrdered, StreamExt};

use super::super::datanode::{block_name, node_name};
use super::super::{LocatedBlock, Replica};
use super::frames::{FrameStream, damaged};
use super::locate::OpenedFile;
use crate::fs::task::Task;

/// Frames verified by one piece of work, and pieces of work at a time.
const FRAMES_PER_CHECK: usize = 4;
const CHECKS_IN_FLIGHT: usize = 4;
/// How long a node that says it is busy is left alone, and how often that happens before the next replica is tried.
const BUSY_PAUSE: Duration = Duration::from_millis(50);
const BUSY_TRIES: u32 = 4;
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
}

struct Active {
    replica: Replica,
    frames: FrameStream,
    group: Vec<(FrameHeader, Bytes)>,
    checks: FuturesOrdered<Task<Vec<Verified>>>,
    ended: bool,
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
        }
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
                Some(active) => active.step(&self.file, self.position..self.end).await,
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
        let block = self.located.block.clone().unwrap_or_default();
        let timeout = Duration::from_millis(inner.settings.read_stall_ms);
        let range = self.position..self.end;
        let token = self.located.token.clone();
        let mut busy_left = BUSY_TRIES;
        let opened = loop {
            let (range, token) = (range.clone(), token.clone());
            match FrameStream::open(&inner.datanodes, &replica, &block, range, token, timeout).await {
                Err(error) if error.code() == ErrorCode::Busy && busy_left > 0 => busy_left -= 1,
                opened => break opened,
            }
            inner.env.clock.sleep(BUSY_PAUSE).await;
        };
        match opened {
            Ok(frames) => {
                self.began = self.position;
                let (group, checks) = (Vec::new(), FuturesOrdered::new());
                self.active = Some(Active { replica, frames, group, checks, ended: false });
            }
            Err(error) => self.blame(&replica, error),
        }
        Ok(())
    }

    async fn look_again(&mut self) -> Result<()> {
        let inner = &self.file.fs.inner;
        if self.rounds >= inner.settings.read_rounds {
            return Err(self.give_up());
        }
        self.rounds += 1;
        let wait_ms = (250_u64 << self.rounds.min(5)) + inner.env.entropy.below(100);
        inner.env.clock.sleep(Duration::from_millis(wait_ms)).await;
        let fresh = self.file.locate_again(&self.located).await?;
        self.located = fresh;
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
                return Ok(None);
            }
            let reads_on = !self.ended && self.checks.len() < CHECKS_IN_FLIGHT;
            tokio::select! {
                biased;
                Some(checked) = self.checks.next(), if !self.checks.is_empty() => return checked.map(Some),
                frame = inner.env.clock.timeout(stall, self.frames.next()), if reads_on => {
                    let Ok(frame) = frame else {
                        let text = format!("{} sent nothing for {stall:?}", node_name(&self.replica));
                        return Err(Error::new(ErrorCode::TimedOut, text));
                    };
                    match frame? {
                        // Before or after what is wanted: the answer starts and ends where the block's index allows.
                        Some((header, _)) if header.end() <= range.start => {}
                        Some((header, _)) if header.offset >= range.end => {}
                        Some(frame) => self.group.push(frame),
                        None => self.ended = true,
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

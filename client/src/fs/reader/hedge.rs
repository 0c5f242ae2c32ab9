//! Opening a replica for reading, and asking a second one when the first is slow.
//!
//! # Overview
//! With `hedged_after_ms` set, a replica that gives no data for so long gets a rival: another replica is asked for the same range, and whichever
//! gives a frame first goes on. At most two are asked at a time.
//!
//! # Cancellation, and what leaks
//! The loser's task is aborted and its connection closed, so of its answer at most a frame and what the sockets hold was sent in vain.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use cairn_proto::frame::FrameHeader;
use cairn_proto::{Error, ErrorCode, Result};

use super::super::Replica;
use super::super::datanode::node_name;
use super::super::{LocatedBlock, task::Task};
use super::frames::FrameStream;
use super::locate::OpenedFile;

/// How long a node that says it is busy is left alone, and how often that happens before the next replica is tried.
const BUSY_PAUSE: Duration = Duration::from_millis(50);
const BUSY_TRIES: u32 = 4;

/// A replica that gave its first frame.
pub(super) struct Opened {
    pub(super) replica: Replica,
    pub(super) frames: FrameStream,
    /// `None`: the answer is empty.
    pub(super) first: Option<(FrameHeader, Bytes)>,
}

/// One replica that is being asked.
pub(super) struct Attempt {
    pub(super) replica: Replica,
    task: Task<Opened>,
}

/// Opens a replica at a range of its block; one that is busy is asked again a few times.
pub(super) async fn open(
    file: &OpenedFile,
    located: &LocatedBlock,
    replica: &Replica,
    range: std::ops::Range<u64>,
) -> Result<FrameStream> {
    let inner = &file.fs.inner;
    let block = located.block.clone().unwrap_or_default();
    let timeout = Duration::from_millis(inner.settings.read_stall_ms);
    let mut busy_left = BUSY_TRIES;
    loop {
        let (range, token) = (range.clone(), located.token.clone());
        match FrameStream::open(&inner.datanodes, replica, &block, range, token, timeout).await {
            Err(error) if error.code() == ErrorCode::Busy && busy_left > 0 => busy_left -= 1,
            opened => return opened,
        }
        inner.env.clock.sleep(BUSY_PAUSE).await;
    }
}

impl Attempt {
    /// Asks in a task of its own.
    pub(super) fn start(
        file: &Arc<OpenedFile>,
        located: &LocatedBlock,
        replica: Replica,
        range: std::ops::Range<u64>,
    ) -> Self {
        let (file, located, asked) = (Arc::clone(file), located.clone(), replica.clone());
        let task = Task::spawn(async move {
            let mut frames = open(&file, &located, &asked, range).await?;
            let inner = &file.fs.inner;
            let stall = Duration::from_millis(inner.settings.read_stall_ms);
            match inner.env.clock.timeout(stall, frames.next()).await {
                Ok(first) => Ok(Opened { first: first?, replica: asked, frames }),
                Err(_) => Err(silent(&asked, stall)),
            }
        });
        Self { replica, task }
    }

    /// Its first frame, or why there is none. Nothing is lost if the future is dropped.
    pub(super) async fn opened(&mut self) -> Result<Opened> {
        (&mut self.task).await
    }
}

/// A node sent nothing for too long.
pub(super) fn silent(replica: &Replica, stall: Duration) -> Error {
    Error::new(ErrorCode::TimedOut, format!("{} sent nothing for {stall:?}", node_name(replica)))
}

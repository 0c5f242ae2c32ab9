//! The way back to a Hadoop client: acks of packets, in their order.
//!
//! Our pipeline acknowledges lengths and markers; a client waits for its packets. A packet is acknowledged when all nodes hold the data up to its end,
//! and what it asked for beside (a sync, the end of the block) is done. An ack has a status per node, this one first.

use std::collections::VecDeque;
use std::io;
use std::time::Duration;

use cairn_common::clock::Clock;
use cairn_proto::hadoop::{DataStatus, PipelineAck};
use cairn_proto::pb;
use tokio::io::AsyncWrite;
use tokio::sync::mpsc;

use super::packet::HEARTBEAT;
use super::send;

/// Sequence number of an ack that belongs to no packet.
const UNKNOWN: i64 = -2;

/// What the ack of a packet waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Need {
    /// So much of the block is held by all.
    Held(u64),
    /// So much is held, and the next sync is done.
    Synced(u64),
    /// The block is finished.
    Finished,
    /// Nothing: the writer only says that it lives.
    Nothing,
}

/// A packet that waits for its ack.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Expected {
    /// Its number.
    pub seqno: i64,
    /// What for.
    pub need: Need,
}

/// The write failed at this node, by the client's data or because the client is gone.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Flaw {
    /// The client is to be told: a status, and the packet if it is known.
    Tell(DataStatus, Option<i64>),
    /// Nobody is there to be told.
    Gone,
}

/// See the module.
pub(super) struct Answers<'a, W> {
    pub clock: &'a Clock,
    pub conn: &'a mut W,
    /// A client that takes no ack for so long is gone.
    pub patience: Duration,
    /// Nodes of the pipeline.
    pub nodes: usize,
    pub held: u64,
    pub acks: mpsc::Receiver<pb::WriteAck>,
    pub expected: mpsc::Receiver<Expected>,
    pub flaws: mpsc::Receiver<Flaw>,
}

impl<W: AsyncWrite + Unpin> Answers<'_, W> {
    /// Runs until the end of the block is acknowledged, or the write broke and the client was told.
    pub(super) async fn run(mut self) -> io::Result<()> {
        let mut waiting: VecDeque<Expected> = VecDeque::new();
        let (mut synced, mut finished) = (0u64, false);
        loop {
            tokio::select! {
                biased;
                Some(flaw) = self.flaws.recv() => {
                    let Flaw::Tell(status, seqno) = flaw else { return Ok(()) };
                    return self.fail(0, status, seqno.or(waiting.front().map(|it| it.seqno))).await;
                }
                ack = self.acks.recv() => {
                    // Without a last word the writer itself was the reason.
                    let Some(ack) = ack else { return Ok(()) };
                    match ack.kind() {
                        pb::AckKind::AckError => {
                            // One of another status would not be retried with the nodes that are left.
                            let front = waiting.front().map(|it| it.seqno);
                            return self.fail(ack.failed_index as usize, DataStatus::StatusError, front).await;
                        }
                        pb::AckKind::AckSynced => synced += 1,
                        pb::AckKind::AckFinished => finished = true,
                        pb::AckKind::AckProgress | pb::AckKind::AckFlushed => {}
                    }
                    self.held = self.held.max(ack.length);
                }
                // Few at a time: who sends more waits.
                Some(expected) = self.expected.recv(), if waiting.len() < 64 => match expected.need {
                    // At once: it says that this node lives too.
                    Need::Nothing => self.tell(HEARTBEAT, vec![DataStatus::StatusSuccess; self.nodes]).await?,
                    _ => waiting.push_back(expected),
                },
            }
            while let Some(Expected { seqno, need }) = waiting.front().copied() {
                let done = match need {
                    Need::Held(length) => self.held >= length,
                    Need::Synced(length) => synced > 0 && self.held >= length,
                    Need::Finished => finished,
                    Need::Nothing => true,
                };
                if !done {
                    break;
                }
                waiting.pop_front();
                synced -= u64::from(matches!(need, Need::Synced(_)));
                self.tell(seqno, vec![DataStatus::StatusSuccess; self.nodes]).await?;
                if need == Need::Finished {
                    return Ok(());
                }
            }
        }
    }

    async fn fail(&mut self, index: usize, status: DataStatus, seqno: Option<i64>) -> io::Result<()> {
        let mut reply = vec![DataStatus::StatusSuccess; self.nodes.max(1)];
        let index = index.min(reply.len() - 1);
        reply[index] = status;
        self.tell(seqno.unwrap_or(UNKNOWN), reply).await
    }

    async fn tell(&mut self, seqno: i64, reply: Vec<DataStatus>) -> io::Result<()> {
        let ack = PipelineAck {
            seqno,
            reply: reply.into_iter().map(i32::from).collect(),
            downstream_ack_time_nanos: Some(0),
            // Clients that find flags take the statuses from there.
            flag: Vec::new(),
        };
        match self.clock.timeout(self.patience, send(self.conn, &ack)).await {
            Ok(sent) => sent,
            Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "the client takes no acks")),
        }
    }
}

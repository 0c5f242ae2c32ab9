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
use prost::Message as _;
use tokio::io::{AsyncWrite, AsyncWriteExt as _};
use tokio::sync::mpsc;

use super::packet::HEARTBEAT;

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
    /// Acks that are not sent yet.
    pub due: Vec<u8>,
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
                    Need::Nothing => self.add(HEARTBEAT, vec![DataStatus::StatusSuccess; self.nodes]),
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
                self.add(seqno, vec![DataStatus::StatusSuccess; self.nodes]);
                if need == Need::Finished {
                    return self.tell().await;
                }
            }
            self.tell().await?;
        }
    }

    async fn fail(&mut self, index: usize, status: DataStatus, seqno: Option<i64>) -> io::Result<()> {
        let mut reply = vec![DataStatus::StatusSuccess; self.nodes.max(1)];
        let index = index.min(reply.len() - 1);
        reply[index] = status;
        self.add(seqno.unwrap_or(UNKNOWN), reply);
        self.tell().await
    }

    fn add(&mut self, seqno: i64, reply: Vec<DataStatus>) {
        let ack = PipelineAck {
            seqno,
            reply: reply.into_iter().map(i32::from).collect(),
            downstream_ack_time_nanos: Some(0),
            // Clients that find flags take the statuses from there.
            flag: Vec::new(),
        };
        self.due.extend(ack.encode_length_delimited_to_vec());
    }

    /// Sends the acks that are due in one write: our pipeline acknowledges many packets at a time.
    async fn tell(&mut self) -> io::Result<()> {
        if self.due.is_empty() {
            return Ok(());
        }
        match self.clock.timeout(self.patience, self.conn.write_all(&self.due)).await {
            Ok(sent) => sent?,
            Err(_) => return Err(io::Error::new(io::ErrorKind::TimedOut, "the client takes no acks")),
        }
        self.due.clear();
        self.conn.flush().await
    }
}

#[cfg(test)]
mod tests {
    use std::pin::{Pin, pin};
    use std::task::{Context, Poll};

    use futures_util::FutureExt as _;

    use super::*;

    /// Keeps each write apart.
    #[derive(Default)]
    struct Writes(Vec<Vec<u8>>);

    impl AsyncWrite for Writes {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
            self.get_mut().0.push(bytes.to_vec());
            Poll::Ready(Ok(bytes.len()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    fn seqnos(mut write: &[u8]) -> Vec<i64> {
        let mut found = Vec::new();
        while !write.is_empty() {
            let ack = PipelineAck::decode_length_delimited(&mut write).unwrap();
            assert_eq!(ack.reply, [DataStatus::StatusSuccess as i32; 3]);
            found.push(ack.seqno);
        }
        found
    }

    #[tokio::test]
    async fn packets_that_all_nodes_hold_are_acknowledged_in_order_and_in_one_write() {
        let (acks, ack_queue) = mpsc::channel(8);
        let (expect, expected) = mpsc::channel(8);
        let (_flaws, flaw_queue) = mpsc::channel(1);
        for seqno in 0..4 {
            expect.try_send(Expected { seqno, need: Need::Held(10 + 10 * seqno as u64) }).unwrap();
        }
        expect.try_send(Expected { seqno: 4, need: Need::Finished }).unwrap();
        let mut writes = Writes::default();
        {
            let answers = Answers {
                clock: &Clock::system(),
                conn: &mut writes,
                patience: Duration::from_secs(60),
                nodes: 3,
                held: 0,
                acks: ack_queue,
                expected,
                flaws: flaw_queue,
                due: Vec::new(),
            };
            let mut run = pin!(answers.run());
            assert!(run.as_mut().now_or_never().is_none());
            for (kind, length) in [(pb::AckKind::AckProgress, 35), (pb::AckKind::AckFinished, 40)] {
                acks.try_send(pb::WriteAck { kind: kind as i32, length, ..Default::default() }).unwrap();
                assert_eq!(run.as_mut().now_or_never().is_some(), kind == pb::AckKind::AckFinished);
            }
        }
        let told: Vec<Vec<i64>> = writes.0.iter().map(|write| seqnos(write)).collect();
        assert_eq!(told, [vec![0, 1, 2], vec![3, 4]]);
    }
}

//! Replies on their way to a client.

use std::collections::VecDeque;
use std::io;
use std::time::Duration;

use bytes::{Buf, Bytes};
use tokio::io::{AsyncWrite, AsyncWriteExt};

use crate::clock::Clock;

/// Replies are put together up to this for one write.
const WRITE_BYTES: usize = 64 << 10;
/// A queue with room for more replies is not kept once it is empty.
const QUEUE_KEPT: usize = 64;
/// What a reply costs beside its bytes.
const REPLY_COST: usize = 64;

/// Sends replies in the order in which they come, several in one write.
pub struct Outbox<W> {
    writer: W,
    clock: Clock,
    queue: VecDeque<Vec<u8>>,
    /// What is being written.
    piece: Bytes,
    /// Since when it is the first.
    since_ms: u64,
    /// Of all replies that are not written, with what each of them costs beside.
    bytes: usize,
}

impl<W: AsyncWrite + Unpin> Outbox<W> {
    /// To `writer`.
    pub fn new(writer: W, clock: Clock) -> Self {
        Self { writer, clock, queue: VecDeque::new(), piece: Bytes::new(), since_ms: 0, bytes: 0 }
    }

    /// The connection; replies that wait are dropped.
    pub fn into_writer(self) -> W {
        self.writer
    }

    /// Nothing waits.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Bytes that wait, and what holding them costs.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// When the client will have taken too long for what is being written, on the clock's milliseconds; `None`: nothing is.
    pub fn due_ms(&self, stall: Duration) -> Option<u64> {
        (!self.is_empty()).then(|| self.since_ms + stall.as_millis() as u64)
    }

    /// Adds a reply.
    pub fn push(&mut self, reply: Vec<u8>) {
        if self.is_empty() {
            self.since_ms = self.clock.mono_ms();
        }
        self.bytes += reply.len() + REPLY_COST;
        self.queue.push_back(reply);
    }

    /// Writes the next piece to its end. Goes on where it was when it is dropped and called again.
    ///
    /// # Errors
    /// The connection broke.
    pub async fn send(&mut self) -> io::Result<()> {
        if self.piece.is_empty() {
            self.piece = self.next_piece();
        }
        while self.piece.has_remaining() {
            let before = self.piece.len();
            if self.writer.write_buf(&mut self.piece).await? == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            self.bytes -= before - self.piece.len();
        }
        // Nothing of it stays while the connection is idle.
        self.piece = Bytes::new();
        if self.queue.is_empty() && self.queue.capacity() > QUEUE_KEPT {
            self.queue = VecDeque::new();
        }
        self.since_ms = self.clock.mono_ms();
        Ok(())
    }

    fn next_piece(&mut self) -> Bytes {
        let mut piece = Vec::new();
        while piece.len() < WRITE_BYTES
            && let Some(reply) = self.queue.pop_front()
        {
            self.bytes -= REPLY_COST;
            if piece.is_empty() {
                piece = reply;
            } else {
                piece.extend(reply);
            }
        }
        piece.into()
    }
}

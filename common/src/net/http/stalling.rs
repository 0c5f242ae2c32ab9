//! A connection whose writes may not wait for ever: hyper itself never gives up on a peer that takes nothing, or next to nothing.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

/// Fails writes while fewer than `least` bytes are taken within `limit`. Time in which there is nothing to write does not count.
pub struct Stalling<C> {
    inner: C,
    limit: Duration,
    least: usize,
    /// Runs from the first write that had to wait.
    waiting: Option<Pin<Box<Sleep>>>,
    /// Bytes that the peer took since then.
    taken: usize,
}

impl<C> Stalling<C> {
    pub fn new(inner: C, limit: Duration, least: usize) -> Self {
        Self { inner, limit, least, waiting: None, taken: 0 }
    }

    fn restart(&mut self) {
        (self.waiting, self.taken) = (None, 0);
    }

    fn written(&mut self, cx: &mut Context<'_>, poll: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Ok(bytes)) = poll {
            self.taken = self.taken.saturating_add(bytes);
            if self.taken >= self.least {
                self.restart();
            }
        }
        self.guarded(cx, poll)
    }

    fn guarded<T>(&mut self, cx: &mut Context<'_>, poll: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if poll.is_ready() {
            return poll;
        }
        let limit = self.limit;
        let waiting = self.waiting.get_or_insert_with(|| Box::pin(sleep(limit)));
        match waiting.as_mut().poll(cx) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(()) => Poll::Ready(Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("the peer took {} bytes in {limit:?}", self.taken),
            ))),
        }
    }
}

impl<C: AsyncRead + Unpin> AsyncRead for Stalling<C> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(cx, out)
    }
}

impl<C: AsyncWrite + Unpin> AsyncWrite for Stalling<C> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let poll = Pin::new(&mut self.inner).poll_write(cx, bytes);
        self.written(cx, poll)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let poll = Pin::new(&mut self.inner).poll_write_vectored(cx, bufs);
        self.written(cx, poll)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let poll = Pin::new(&mut self.inner).poll_flush(cx);
        if poll.is_ready() {
            // The peer has all that there was.
            self.restart();
        }
        self.guarded(cx, poll)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_takes_nothing_is_given_up_and_a_slow_one_is_not() {
        let limit = Duration::from_secs(60);
        let (ours, mut theirs) = tokio::io::duplex(16);
        let slow = tokio::spawn(async move {
            let mut taken = [0; 16];
            for _ in 0..4 {
                sleep(Duration::from_secs(50)).await;
                theirs.read_exact(&mut taken).await.unwrap();
            }
            theirs
        });
        let mut conn = Stalling::new(ours, limit, 16);
        conn.write_all(&[1; 64]).await.unwrap();
        let theirs = slow.await.unwrap();
        conn.write_all(&[1; 16]).await.unwrap();
        let error = conn.write_all(&[1]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop(theirs);
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_takes_a_byte_now_and_then_is_given_up() {
        let (ours, mut theirs) = tokio::io::duplex(16);
        let trickle = tokio::spawn(async move {
            while theirs.read_u8().await.is_ok() {
                sleep(Duration::from_secs(20)).await;
            }
        });
        let mut conn = Stalling::new(ours, Duration::from_secs(60), 16);
        let error = conn.write_all(&[1; 1_000]).await.unwrap_err();
        assert_eq!(error.to_string(), "the peer took 3 bytes in 60s");
        drop(conn);
        trickle.await.unwrap();
    }
}

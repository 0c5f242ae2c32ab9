//! A task that ends with its handle.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use cairn_proto::{Error, ErrorCode, Result};
use tokio::task::JoinHandle;

/// A running task, awaited for its result; dropping it stops the task at its next suspension.
pub(crate) struct Task<T> {
    handle: JoinHandle<Result<T>>,
}

impl<T: Send + 'static> Task<T> {
    pub(crate) fn spawn(future: impl Future<Output = Result<T>> + Send + 'static) -> Self {
        Self { handle: tokio::spawn(future) }
    }
}

impl<T> Future for Task<T> {
    type Output = Result<T>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<T>> {
        Poll::Ready(match ready!(Pin::new(&mut self.handle).poll(cx)) {
            Ok(result) => result,
            Err(error) => Err(Error::new(ErrorCode::Internal, format!("a task of the client ended: {error}"))),
        })
    }
}

impl<T> Drop for Task<T> {
    fn drop(&mut self) {
        self.handle.abort();
    }
}

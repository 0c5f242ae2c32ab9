//! HTTP/1 of the daemons: connections with limits, and answers.
//!
//! # Overview
//! [`serve`] accepts connections and hands each request to a handler. [`Guard`] keeps web pages out. [`Pieces`] and [`drain`] take the
//! body of a request, [`stream`] sends one of any length; the rest of the functions make small answers.
//!
//! # Limits
//! A number of connections at a time (more wait in the kernel's queue); 64 KiB for the first line and the headers of a request, which must be there
//! within 10 s; a peer that takes less than 64 KiB of an answer in a minute is cut off. HTTP's own refusals (414, 431, 400) are hyper's.
//!
//! # Cancellation
//! The handler's future is dropped when its peer goes away: what must be brought to an end regardless belongs into a task.

mod guard;
mod stalling;

use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use cairn_proto::{Error, ErrorCode, Result, webhdfs};
use futures_util::Stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Frame;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::{Semaphore, watch};

pub use bytes::Bytes;
pub use guard::Guard;
pub use hyper::body::Incoming;
pub use hyper::{HeaderMap, Method, Request, Response, StatusCode, header};

use super::{Conn, Listener};
use crate::clock::Clock;
use stalling::Stalling;

/// A peer that does not send its request within this time is cut off.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// First line and headers of a request: a path of 8,000 bytes may have three characters for each.
const HEAD_BYTES: usize = 64 << 10;
/// Less than [`STALL_BYTES`] taken of an answer, or come of a body that is awaited, within this time: the peer is taken for gone.
const STALL: Duration = Duration::from_secs(60);
/// About a kilobyte a second: whoever is slower holds a place that others wait for.
const STALL_BYTES: usize = 64 << 10;
/// After a failed accept the next try waits this long.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// An answer; an error in the middle of its body ends the connection, so that nobody takes the part for the whole.
pub type Answer = Response<UnsyncBoxBody<Bytes, Error>>;

/// Serves until `stop` resolves; then connections are dropped as they are. Once `closed` resolves no more connections are taken.
pub async fn serve<H, F>(
    listener: Listener,
    clock: Clock,
    connections: usize,
    closed: impl Future,
    stop: impl Future,
    handler: H,
) where
    H: Fn(Request<Incoming>, SocketAddr) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Answer> + Send + 'static,
{
    let room = Arc::new(Semaphore::new(connections));
    let (end, ended) = watch::channel(false);
    let (mut closed, mut stop) = (std::pin::pin!(closed), std::pin::pin!(stop));
    let stopped = loop {
        let next = async {
            // The semaphore is never closed.
            let permit = Arc::clone(&room).acquire_owned().await;
            (permit, listener.accept().await)
        };
        let (permit, accepted) = tokio::select! { biased;
            _ = &mut stop => break true,
            _ = &mut closed => break false,
            next = next => next,
        };
        match accepted {
            Ok(conn) => {
                let (handler, mut ended) = (handler.clone(), ended.clone());
                tokio::spawn(async move {
                    tokio::select! { biased;
                        _ = ended.wait_for(|&ended| ended) => {}
                        () = serve_connection(conn, handler) => {}
                    }
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "an HTTP connection could not be accepted");
                tokio::select! { biased;
                    _ = &mut stop => break true,
                    () = clock.sleep(ACCEPT_PAUSE) => {}
                }
            }
        }
    };
    // Who comes now is refused by the kernel, and looks elsewhere.
    drop(listener);
    if !stopped {
        stop.await;
    }
    end.send_replace(true);
}

async fn serve_connection<H, F>(conn: Conn, handler: H)
where
    H: Fn(Request<Incoming>, SocketAddr) -> F + Send + 'static,
    F: Future<Output = Answer> + Send,
{
    let peer = conn.peer_addr();
    let service = hyper::service::service_fn(move |request| {
        let answer = handler(request, peer);
        async move { Ok::<_, Infallible>(answer.await) }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(HEAD_BYTES)
        .serve_connection(TokioIo::new(Stalling::new(conn, STALL, STALL_BYTES)), service)
        .await;
    if let Err(error) = served {
        tracing::debug!(%peer, %error, "HTTP connection ended early");
    }
}

/// A request's body, piece by piece.
pub struct Pieces<'b, B> {
    body: &'b mut B,
    clock: &'b Clock,
    /// Bytes that came, and the time that was waited for them.
    come: (usize, Duration),
}

impl<'b, B> Pieces<'b, B>
where
    B: hyper::body::Body<Data = Bytes> + Unpin,
    B::Error: std::fmt::Display,
{
    /// Of this body.
    pub fn new(body: &'b mut B, clock: &'b Clock) -> Self {
        Self { body, clock, come: (0, Duration::ZERO) }
    }

    /// The next piece; `None` at the end. Fails if the peer goes away before, or sends less than 64 KiB while a minute is waited for it; the time
    /// that the caller takes does not count.
    pub async fn next(&mut self) -> Result<Option<Bytes>> {
        loop {
            let (bytes, waited) = self.come;
            let from_ms = self.clock.mono_ms();
            let frame = match self.clock.timeout(STALL.saturating_sub(waited), self.body.frame()).await {
                Ok(None) => return Ok(None),
                Ok(Some(Ok(frame))) => frame,
                Ok(Some(Err(error))) => {
                    let text = format!("the client left in the middle of its data: {error}");
                    return Err(Error::new(ErrorCode::Unreachable, text));
                }
                Err(_) => {
                    let text = format!("the client is too slow: {bytes} bytes of data came in {STALL:?}");
                    return Err(Error::new(ErrorCode::TimedOut, text));
                }
            };
            let waited = waited + Duration::from_millis(self.clock.mono_ms().saturating_sub(from_ms));
            // Trailers say nothing to us.
            let Ok(data) = frame.into_data() else { continue };
            let bytes = bytes.saturating_add(data.len());
            self.come = if bytes >= STALL_BYTES { (0, Duration::ZERO) } else { (bytes, waited) };
            return Ok(Some(data));
        }
    }
}

/// Takes what is left of a body, up to `limit` bytes and for some seconds: a client that is still sending reads its answer only afterwards,
/// and a connection that is closed on it may lose that.
pub async fn drain(body: &mut Incoming, clock: &Clock, limit: u64) {
    const PATIENCE: Duration = Duration::from_secs(5);
    let mut taken = 0;
    let all = async {
        while taken <= limit {
            match body.frame().await {
                Some(Ok(frame)) => taken += frame.data_ref().map_or(0, |data| data.len() as u64),
                _ => return,
            }
        }
    };
    let _ = clock.timeout(PATIENCE, all).await;
}

/// An answer with a body of this media type.
pub fn respond(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Answer {
    let body = Full::new(body.into()).map_err(|never| match never {});
    let mut response = Response::new(UnsyncBoxBody::new(body));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    response
}

/// An answer in plain text.
pub fn text(status: StatusCode, body: impl Into<Bytes>) -> Answer {
    respond(status, "text/plain; charset=utf-8", body)
}

/// An answer in JSON.
pub fn json(status: StatusCode, body: impl Into<Bytes>) -> Answer {
    respond(status, "application/json", body)
}

/// An error as WebHDFS tells it.
pub fn refusal(error: &Error) -> Answer {
    let status = StatusCode::from_u16(webhdfs::status_of(error)).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    json(status, webhdfs::remote_exception(error))
}

/// An answer that is sent piece by piece as `pieces` come. With a length, which must be right, it is announced; without, the body is chunked.
pub fn stream<S>(kind: &'static str, length: Option<u64>, pieces: S) -> Answer
where
    S: Stream<Item = Result<Bytes>> + Send + 'static,
{
    use futures_util::StreamExt;
    let body = StreamBody::new(pieces.map(|piece| piece.map(Frame::data)));
    let mut response = Response::new(UnsyncBoxBody::new(body));
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    if let Some(length) = length {
        response.headers_mut().insert(header::CONTENT_LENGTH, header::HeaderValue::from(length));
    }
    response
}

#[cfg(test)]
mod tests;

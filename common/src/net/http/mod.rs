//! HTTP/1 of the daemons: connections with limits, and answers.
//!
//! # Overview
//! [`serve`] accepts connections and hands each request to a handler. [`Guard`] keeps web pages out. [`next_piece`] and [`drain`] take the
//! body of a request, [`stream`] sends one of any length; the rest of the functions make small answers.
//!
//! # Limits
//! A number of connections at a time (more wait in the kernel's queue); 64 KiB for the first line and the headers of a request, which must be there
//! within 10 s; a peer that takes no byte of an answer for a minute is cut off. HTTP's own refusals (414, 431, 400) are hyper's.
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
/// No progress for this long while an answer is sent, or a body is awaited: the peer is taken for gone.
const STALL: Duration = Duration::from_secs(60);
/// After a failed accept the next try waits this long.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// An answer; an error in the middle of its body ends the connection, so that nobody takes the part for the whole.
pub type Answer = Response<UnsyncBoxBody<Bytes, Error>>;

/// Serves until `stop` resolves; then connections are dropped as they are.
pub async fn serve<H, F>(listener: Listener, clock: Clock, connections: usize, stop: impl Future, handler: H)
where
    H: Fn(Request<Incoming>, SocketAddr) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Answer> + Send + 'static,
{
    let room = Arc::new(Semaphore::new(connections));
    let (end, ended) = watch::channel(false);
    let mut stop = std::pin::pin!(stop);
    loop {
        let next = async {
            // The semaphore is never closed.
            let permit = Arc::clone(&room).acquire_owned().await;
            (permit, listener.accept().await)
        };
        let (permit, accepted) = tokio::select! { biased;
            _ = &mut stop => break,
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
                    _ = &mut stop => break,
                    () = clock.sleep(ACCEPT_PAUSE) => {}
                }
            }
        }
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
        .serve_connection(TokioIo::new(Stalling::new(conn, STALL)), service)
        .await;
    if let Err(error) = served {
        tracing::debug!(%peer, %error, "HTTP connection ended early");
    }
}

/// The next piece of a request's body; `None` at its end. Fails if the peer goes away before, or sends nothing for a minute.
pub async fn next_piece<B>(body: &mut B, clock: &Clock) -> Result<Option<Bytes>>
where
    B: hyper::body::Body<Data = Bytes> + Unpin,
    B::Error: std::fmt::Display,
{
    loop {
        let frame = match clock.timeout(STALL, body.frame()).await {
            Ok(None) => return Ok(None),
            Ok(Some(Ok(frame))) => frame,
            Ok(Some(Err(error))) => {
                let text = format!("the client left in the middle of its data: {error}");
                return Err(Error::new(ErrorCode::Unreachable, text));
            }
            Err(elapsed) => {
                return Err(Error::new(ErrorCode::TimedOut, format!("the client sends no more data: {elapsed}")));
            }
        };
        // Trailers say nothing to us.
        if let Ok(data) = frame.into_data() {
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

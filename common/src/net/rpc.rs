//! gRPC over our connections: the client's channel and the server's connection type.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use cairn_proto::handshake::Purpose;
use cairn_proto::{Error, ErrorCode, Result, pb};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::transport::{Channel, Endpoint, Uri, server::Connected};

use super::opening::{self, Peer};
use super::{Conn, Net};

/// Largest message of our gRPC services, bytes.
pub const MAX_RPC_BYTES: usize = 16 << 20;

/// Knobs of a channel.
#[derive(Clone, Debug)]
pub struct RpcOptions {
    /// For dialling and the handshake. Higher: slower to notice a dead host; lower: gives up on slow ones.
    pub connect_timeout: Duration,
    /// For one call. Higher: a hung server blocks its callers longer; lower: long calls fail.
    pub call_timeout: Duration,
}

impl Default for RpcOptions {
    fn default() -> Self {
        Self { connect_timeout: Duration::from_secs(5), call_timeout: Duration::from_secs(60) }
    }
}

/// A channel to `addr` and what the server told of itself. Dials once, so that a wrong address is reported as what it is; later the channel
/// connects again by itself when it has to, with the same handshake.
pub async fn channel(
    net: &Net,
    addr: &str,
    hello: pb::Hello,
    options: RpcOptions,
) -> Result<(Channel, pb::HelloReply)> {
    let (first, reply) = opening::open(net, addr, Purpose::Rpc, &hello, options.connect_timeout).await?;
    let invalid = |error: tonic::transport::Error| {
        Error::new(ErrorCode::InvalidArgument, format!("{addr:?} is not an address: {error}")).with_subject(addr)
    };
    let endpoint = Endpoint::from_shared(format!("http://{addr}"))
        .map_err(invalid)?
        .timeout(options.call_timeout)
        .http2_keep_alive_interval(Duration::from_secs(15))
        .keep_alive_timeout(Duration::from_secs(10))
        .initial_stream_window_size(1 << 20)
        .initial_connection_window_size(4 << 20);
    let (net, addr) = (net.clone(), addr.to_owned());
    // The connection that was dialled to look is the first one used.
    let first = Arc::new(std::sync::Mutex::new(Some(first)));
    let connector = tower::service_fn(move |_: Uri| {
        let (net, addr, hello, first) = (net.clone(), addr.clone(), hello.clone(), Arc::clone(&first));
        async move {
            let ready = first.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
            let conn = match ready {
                Some(conn) => conn,
                None => opening::open(&net, &addr, Purpose::Rpc, &hello, options.connect_timeout).await?.0,
            };
            Ok::<_, Error>(TokioIo::new(conn))
        }
    });
    Ok((endpoint.connect_with_connector_lazy(connector), reply))
}

/// A connection of a gRPC server; services find the caller in `request.extensions().get::<Peer>()`.
pub struct RpcConn {
    conn: Conn,
    peer: Peer,
}

impl RpcConn {
    /// After the handshake.
    pub fn new(conn: Conn, peer: Peer) -> Self {
        Self { conn, peer }
    }
}

impl Connected for RpcConn {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for RpcConn {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().conn).poll_read(cx, out)
    }
}

impl AsyncWrite for RpcConn {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().conn).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().conn).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.conn.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().conn).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().conn).poll_shutdown(cx)
    }
}

/// The typed error behind a status: the server's own, or the connector's, or one made from the gRPC code.
pub fn error(status: tonic::Status) -> Error {
    let mut source = std::error::Error::source(&status);
    while let Some(inner) = source {
        if let Some(typed) = inner.downcast_ref::<Error>() {
            return typed.clone();
        }
        source = inner.source();
    }
    // A transport error without a typed one inside is a connection that broke: a status "unknown" with a source.
    if status.code() == tonic::Code::Unknown && std::error::Error::source(&status).is_some() {
        return Error::new(ErrorCode::Unreachable, format!("the connection broke: {}", status.message()));
    }
    Error::from(status)
}

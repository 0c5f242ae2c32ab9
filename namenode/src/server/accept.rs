//! The RPC port: the first bytes of a connection decide who serves it.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use cairn_common::Env;
use cairn_common::net::hadoop::{self, Limits, Protocol};
use cairn_common::net::opening::{Opening, Peer, ServerIdentity, read_opening};
use cairn_common::net::rpc::RpcConn;
use cairn_common::net::{Conn, Listener};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tonic::transport::server::Connected;

use super::service::BARE_GRPC;
use crate::journal::JournalStatus;

/// After a failed accept (no descriptors left, say) the next try waits this long.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// A refused peer gets this long to read why.
const REFUSAL_TIME: Duration = Duration::from_secs(2);

/// A connection of the gRPC server, counted as long as it lives.
pub struct ServedConn {
    inner: RpcConn,
    _counted: OwnedSemaphorePermit,
}

impl Connected for ServedConn {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.inner.connect_info()
    }
}

impl AsyncRead for ServedConn {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_read(cx, out)
    }
}

impl AsyncWrite for ServedConn {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_shutdown(cx)
    }
}

/// What the accept loop needs.
pub struct Door {
    /// The machine.
    pub env: Env,
    /// The port.
    pub listener: Listener,
    /// The cluster: callers of another one are refused.
    pub cluster_id: String,
    /// Tells the epoch of the moment.
    pub journal: watch::Receiver<JournalStatus>,
    /// Most connections at a time.
    pub max_connections: usize,
    /// Where gRPC connections go.
    pub served: mpsc::Sender<io::Result<ServedConn>>,
    /// What answers Hadoop's clients.
    pub hadoop: Arc<dyn Protocol>,
    /// Bounds of each of their connections.
    pub hadoop_limits: Limits,
    /// Turns true when the namenode stops.
    pub stop: watch::Receiver<bool>,
}

/// Accepts until told to stop. A slow or silent peer holds up nobody: each connection finds its way in a task of its own.
pub async fn accept(door: Door) {
    let Door { env, listener, cluster_id, journal, max_connections, served, hadoop, hadoop_limits, mut stop } = door;
    let room = Arc::new(Semaphore::new(max_connections));
    let ways = Ways { env: env.clone(), served, hadoop, hadoop_limits, stop: stop.clone() };
    loop {
        let accepted = tokio::select! { biased;
            // An error means that nobody is left who could stop us later.
            _ = stop.wait_for(|&stop| stop) => return,
            accepted = listener.accept() => accepted,
        };
        let conn = match accepted {
            Ok(conn) => conn,
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                env.clock.sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(counted) = Arc::clone(&room).try_acquire_owned() else {
            tracing::warn!(peer = %conn.peer_addr(), max_connections, "connection turned away: too many are open");
            continue;
        };
        // Read anew for each: it rises when a metadata directory is dropped.
        let epoch = journal.borrow().epoch.0;
        let identity = ServerIdentity { cluster_id: cluster_id.clone(), epoch };
        tokio::spawn(admit(ways.clone(), conn, identity, counted));
    }
}

/// Where connections go.
#[derive(Clone)]
struct Ways {
    env: Env,
    served: mpsc::Sender<io::Result<ServedConn>>,
    hadoop: Arc<dyn Protocol>,
    hadoop_limits: Limits,
    stop: watch::Receiver<bool>,
}

async fn admit(ways: Ways, conn: Conn, identity: ServerIdentity, counted: OwnedSemaphorePermit) {
    let Ways { env, served, hadoop: protocol, hadoop_limits, mut stop } = ways;
    let addr = conn.peer_addr();
    let inner = match read_opening(conn, &identity, &env.clock).await {
        Ok(Opening::Rpc { conn, peer }) => RpcConn::new(conn, peer),
        Ok(Opening::Grpc(conn)) => {
            let peer = Peer { user: String::new(), role: BARE_GRPC.to_owned(), peer_id: String::new(), addr, epoch: 0 };
            RpcConn::new(conn, peer)
        }
        Ok(Opening::Hadoop(conn)) => {
            // An error means that nobody is left who could stop us.
            let stopped = async move { drop(stop.wait_for(|&stop| stop).await) };
            hadoop::serve(conn, protocol, env.clock.clone(), hadoop_limits, stopped).await;
            return drop(counted);
        }
        Ok(other) => return refuse(&env, other).await,
        Err(error) => {
            tracing::debug!(peer = %addr, %error, "connection refused");
            return;
        }
    };
    // Fails only while the namenode stops.
    let _ = served.send(Ok(ServedConn { inner, _counted: counted })).await;
}

/// Tells a peer in its own protocol, as far as there is a way, that this is the wrong door.
async fn refuse(env: &Env, opening: Opening) {
    let (conn, what, answer) = match opening {
        Opening::Http(conn) => (conn, "HTTP", http_refusal()),
        Opening::HadoopData(conn) => (conn, "Hadoop data transfer", Vec::new()),
        Opening::Data { conn, .. } => (conn, "the data plane", Vec::new()),
        Opening::Unknown(conn, _) => (conn, "an unknown protocol", Vec::new()),
        Opening::Rpc { .. } | Opening::Grpc(_) | Opening::Hadoop(_) => return,
    };
    tracing::info!(peer = %conn.peer_addr(), protocol = what, "refused on the RPC port");
    // A peer that does not take its refusal in time is closed all the same.
    let _ = env.clock.timeout(REFUSAL_TIME, say_and_close(conn, &answer)).await;
}

async fn say_and_close(mut conn: Conn, answer: &[u8]) -> io::Result<()> {
    conn.write_all(answer).await?;
    conn.shutdown().await?;
    // Closing with unread bytes would reset the connection and could destroy the answer on its way.
    let mut rest = [0; 4096];
    while conn.read(&mut rest).await? > 0 {}
    Ok(())
}

fn http_refusal() -> Vec<u8> {
    let text = "This is the RPC port of a Cairn namenode; status and metrics are on the port given with --http.\n";
    format!(
        "HTTP/1.1 404 Not Found\r\nContent-Type: text/plain\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{text}",
        text.len()
    )
    .into_bytes()
}

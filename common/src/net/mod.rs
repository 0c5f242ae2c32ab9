//! Connections: TCP, or the simulated network.
//!
//! # Overview
//! [`Net`] binds and connects; a [`Conn`] is a byte stream. [`opening`] tells by the first bytes what a peer speaks and answers our
//! own handshake; [`rpc`] carries gRPC over it; [`http`] is what the daemons speak with everybody else; [`hadoop`] answers Hadoop's RPC;
//! [`send_range`] sends a part of a file.
//!
//! # Cancellation
//! Dropping a future of this module drops at most bytes that were not yet handed to the network; a connection in the middle of a message is
//! then of no more use and must be closed.

pub mod hadoop;
pub mod http;
pub mod opening;
pub mod rpc;

use std::io;
use std::net::SocketAddr;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, Bytes};
use cairn_proto::dataplane::{self, MessageHead};
use cairn_proto::{Error, ErrorCode, Result};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};

use crate::durable::{File, MOST_PARTS};
use crate::work::Work;

/// A network to bind and connect on.
#[derive(Clone, Debug)]
pub struct Net {
    kind: Kind,
}

#[derive(Clone, Debug)]
enum Kind {
    Tcp,
    #[cfg(feature = "sim")]
    Turmoil,
}

/// A listening socket.
pub struct Listener {
    inner: ListenerInner,
    local: SocketAddr,
}

enum ListenerInner {
    Tcp(tokio::net::TcpListener),
    #[cfg(feature = "sim")]
    Turmoil(turmoil::net::TcpListener),
}

/// A byte stream to a peer.
pub struct Conn {
    inner: ConnInner,
    /// Bytes that were read to find out what the peer speaks; read again first.
    ahead: Bytes,
    peer: SocketAddr,
    local: SocketAddr,
}

enum ConnInner {
    Tcp(tokio::net::TcpStream),
    #[cfg(feature = "sim")]
    Turmoil(turmoil::net::TcpStream),
}

impl Net {
    /// The machine's TCP.
    pub fn tcp() -> Self {
        Self { kind: Kind::Tcp }
    }

    /// The simulated network of the host that runs the calling task.
    #[cfg(feature = "sim")]
    pub fn turmoil() -> Self {
        Self { kind: Kind::Turmoil }
    }

    /// Listens on `addr` ("IP:PORT"; port 0 takes a free one).
    pub async fn bind(&self, addr: &str) -> Result<Listener> {
        let failed = |error: io::Error| {
            let hint = if error.kind() == io::ErrorKind::AddrInUse { " (another process has this port)" } else { "" };
            Error::new(ErrorCode::Io, format!("cannot listen on {addr}: {error}{hint}")).with_subject(addr)
        };
        let inner = match self.kind {
            Kind::Tcp => {
                #[allow(clippy::disallowed_methods)] // the room where sockets are opened
                let listener = tokio::net::TcpListener::bind(addr).await.map_err(failed)?;
                ListenerInner::Tcp(listener)
            }
            #[cfg(feature = "sim")]
            Kind::Turmoil => ListenerInner::Turmoil(turmoil::net::TcpListener::bind(addr).await.map_err(failed)?),
        };
        let local = match &inner {
            ListenerInner::Tcp(listener) => listener.local_addr(),
            #[cfg(feature = "sim")]
            ListenerInner::Turmoil(listener) => listener.local_addr(),
        }
        .map_err(failed)?;
        Ok(Listener { inner, local })
    }

    /// Dials `addr` ("HOST:PORT").
    pub async fn connect(&self, addr: &str, timeout: Duration) -> Result<Conn> {
        let dial = async {
            match self.kind {
                Kind::Tcp => {
                    #[allow(clippy::disallowed_methods)] // the room where sockets are opened
                    let stream = tokio::net::TcpStream::connect(addr).await?;
                    stream.set_nodelay(true)?;
                    let (peer, local) = (stream.peer_addr()?, stream.local_addr()?);
                    Ok(Conn { inner: ConnInner::Tcp(stream), ahead: Bytes::new(), peer, local })
                }
                #[cfg(feature = "sim")]
                Kind::Turmoil => {
                    let stream = turmoil::net::TcpStream::connect(addr).await?;
                    let (peer, local) = (stream.peer_addr()?, stream.local_addr()?);
                    Ok(Conn { inner: ConnInner::Turmoil(stream), ahead: Bytes::new(), peer, local })
                }
            }
        };
        let result: io::Result<Conn> = match tokio::time::timeout(timeout, dial).await {
            Ok(result) => result,
            Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {timeout:?}"))),
        };
        result.map_err(|error| {
            let code = match error.kind() {
                io::ErrorKind::InvalidInput => ErrorCode::InvalidArgument,
                _ => ErrorCode::Unreachable,
            };
            Error::new(code, format!("cannot connect to {addr}: {error}")).with_subject(addr)
        })
    }
}

impl Listener {
    /// The next connection. Errors are of one connection or passing (no descriptors left): wait a little and go on.
    pub async fn accept(&self) -> io::Result<Conn> {
        match &self.inner {
            ListenerInner::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                stream.set_nodelay(true)?;
                let local = stream.local_addr()?;
                Ok(Conn { inner: ConnInner::Tcp(stream), ahead: Bytes::new(), peer, local })
            }
            #[cfg(feature = "sim")]
            ListenerInner::Turmoil(listener) => {
                let (stream, peer) = listener.accept().await?;
                let local = stream.local_addr()?;
                Ok(Conn { inner: ConnInner::Turmoil(stream), ahead: Bytes::new(), peer, local })
            }
        }
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }
}

impl Conn {
    /// The other end.
    pub fn peer_addr(&self) -> SocketAddr {
        self.peer
    }

    /// This end.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// Puts bytes back, to be read before anything else.
    pub fn unread(&mut self, bytes: Bytes) {
        if self.ahead.is_empty() {
            self.ahead = bytes;
        } else {
            self.ahead = [bytes, std::mem::take(&mut self.ahead)].concat().into();
        }
    }

    fn tcp(&self) -> Option<&tokio::net::TcpStream> {
        match &self.inner {
            ConnInner::Tcp(stream) => Some(stream),
            #[cfg(feature = "sim")]
            ConnInner::Turmoil(_) => None,
        }
    }

    /// Two halves that two tasks may own.
    pub fn split(self) -> (tokio::io::ReadHalf<Self>, tokio::io::WriteHalf<Self>) {
        tokio::io::split(self)
    }

    /// Sets the kernel's buffers (bytes each way); best effort, nothing in simulation.
    pub fn set_buffers(&self, bytes: usize) {
        if let Some(stream) = self.tcp() {
            let socket = socket2::SockRef::from(stream);
            let _ = socket.set_send_buffer_size(bytes);
            let _ = socket.set_recv_buffer_size(bytes);
        }
    }
}

impl AsyncRead for Conn {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.ahead.is_empty() {
            let take = this.ahead.len().min(out.remaining());
            out.put_slice(&this.ahead[..take]);
            this.ahead.advance(take);
            return Poll::Ready(Ok(()));
        }
        match &mut this.inner {
            ConnInner::Tcp(stream) => Pin::new(stream).poll_read(cx, out),
            #[cfg(feature = "sim")]
            ConnInner::Turmoil(stream) => Pin::new(stream).poll_read(cx, out),
        }
    }
}

impl AsyncWrite for Conn {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().inner {
            ConnInner::Tcp(stream) => Pin::new(stream).poll_write(cx, bytes),
            #[cfg(feature = "sim")]
            ConnInner::Turmoil(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().inner {
            ConnInner::Tcp(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            #[cfg(feature = "sim")]
            ConnInner::Turmoil(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.inner {
            ConnInner::Tcp(_) => true,
            #[cfg(feature = "sim")]
            ConnInner::Turmoil(_) => false,
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().inner {
            ConnInner::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            #[cfg(feature = "sim")]
            ConnInner::Turmoil(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().inner {
            ConnInner::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            #[cfg(feature = "sim")]
            ConnInner::Turmoil(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

/// No progress for this long while a file is sent: the peer is taken for gone.
const SEND_STALL: Duration = Duration::from_secs(60);
/// Largest piece of one `sendfile` call.
const SEND_PIECE: u64 = 4 << 20;

/// Sends `range` of `file`: by `sendfile` where both are real, off the async threads, since reading the file may block; by copying else.
/// Nothing may be buffered above `conn`.
pub async fn send_range(conn: &mut Conn, work: &Work, file: Arc<dyn File>, range: Range<u64>) -> io::Result<()> {
    let Some(stream) = conn.tcp() else {
        return copy_range(conn, work, file, range).await;
    };
    if file.as_fd().is_none() {
        return copy_range(conn, work, file, range).await;
    }
    // The blocking thread works on a duplicate, so a dropped future leaves no descriptor of ours in use by another connection.
    // It must not leak into a child that is started meanwhile.
    let socket = Arc::new(rustix::io::fcntl_dupfd_cloexec(stream, 0)?);
    let mut offset = range.start;
    loop {
        let (socket, file) = (Arc::clone(&socket), Arc::clone(&file));
        offset = work.io(move || send_some(&socket, &*file, offset..range.end)).await?;
        if offset >= range.end {
            return Ok(());
        }
        // A peer that reads slowly, or not at all, costs no thread.
        wait_writable(stream).await?;
    }
}

/// Sends until the socket takes no more; returns the offset reached.
fn send_some(socket: &rustix::fd::OwnedFd, file: &dyn File, range: Range<u64>) -> io::Result<u64> {
    let Some(fd) = file.as_fd() else { return Err(io::ErrorKind::Unsupported.into()) };
    let mut offset = range.start;
    while offset < range.end {
        let piece = (range.end - offset).min(SEND_PIECE) as usize;
        match rustix::fs::sendfile(socket, fd, Some(&mut offset), piece) {
            Ok(0) => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file ends early")),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) => break,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(offset)
}

async fn wait_writable(stream: &tokio::net::TcpStream) -> io::Result<()> {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    // `sendfile` ran behind tokio's back, so tokio may still hold the socket for writable. Asking the kernel inside `async_io` corrects
    // that without losing a change that comes in between.
    let ready = stream.async_io(tokio::io::Interest::WRITABLE, || {
        let mut fds = [PollFd::new(stream, PollFlags::OUT)];
        match poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
            Ok(0) => Err(io::ErrorKind::WouldBlock.into()),
            // An error of the socket shows at the next send.
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    });
    match tokio::time::timeout(SEND_STALL, ready).await {
        Ok(ready) => ready,
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "the peer takes no data")),
    }
}

async fn copy_range(conn: &mut Conn, work: &Work, file: Arc<dyn File>, range: Range<u64>) -> io::Result<()> {
    let mut offset = range.start;
    while offset < range.end {
        let piece = (range.end - offset).min(256 << 10) as usize;
        let file = Arc::clone(&file);
        let bytes = work
            .io(move || {
                let mut bytes = vec![0; piece];
                file.read_exact_at(&mut bytes, offset).map(|()| bytes)
            })
            .await?;
        conn.write_all(&bytes).await?;
        offset += piece as u64;
    }
    conn.flush().await
}

/// Reads one delimited message that `who` sends. After an error the connection is of no use.
pub async fn read_message<M: prost::Message + Default>(conn: &mut (impl AsyncRead + Unpin), who: &str) -> Result<M> {
    let left = |error: io::Error| Error::new(ErrorCode::Unreachable, format!("{who} left: {error}")).with_subject(who);
    let mut head = [0; dataplane::MESSAGE_HEAD_BYTES];
    conn.read_exact(&mut head).await.map_err(left)?;
    let head = MessageHead::decode(&head, who)?;
    let mut bytes = vec![0; head.length];
    conn.read_exact(&mut bytes).await.map_err(left)?;
    head.open(&bytes, who)
}

/// Sends one delimited message.
pub async fn write_message(conn: &mut (impl AsyncWrite + Unpin), message: &impl prost::Message) -> io::Result<()> {
    conn.write_all(&dataplane::encode_delimited(message)).await?;
    conn.flush().await
}

/// Sends `parts` one after the other, as many as the connection takes in one call.
pub async fn write_parts(conn: &mut (impl AsyncWrite + Unpin), parts: &[Bytes]) -> io::Result<()> {
    let mut slices: Vec<io::IoSlice<'_>> = parts.iter().map(|part| io::IoSlice::new(part)).collect();
    let mut left = &mut slices[..];
    io::IoSlice::advance_slices(&mut left, 0);
    while !left.is_empty() {
        match conn.write_vectored(&left[..left.len().min(MOST_PARTS)]).await? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            sent => io::IoSlice::advance_slices(&mut left, sent),
        }
    }
    Ok(())
}

/// A free address check used by every daemon: until TLS and tokens exist, only loopback is served unless the operator insists.
pub fn check_listen(addr: &str, insecure: bool) -> Result<()> {
    let parsed: SocketAddr = addr.parse().map_err(|_| {
        let text = format!("listen address {addr:?} is not IP:PORT, such as 127.0.0.1:8020");
        Error::new(ErrorCode::InvalidArgument, text).with_subject(addr)
    })?;
    if parsed.ip().is_loopback() || insecure {
        return Ok(());
    }
    let text = format!(
        "refusing to listen on {addr}: it is not a loopback address, and there is no authentication yet; \
         give --insecure if every host that can reach it is trusted"
    );
    Err(Error::new(ErrorCode::InvalidArgument, text).with_subject(addr))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::durable::{Fs, OpenMode, SystemFs};

    #[tokio::test]
    async fn parts_arrive_whole_however_little_is_taken_at_a_time() {
        let parts: Vec<Bytes> = (0..2 * MOST_PARTS + 7).map(|at| vec![at as u8; at % 40].into()).collect();
        let (mut near, mut far) = tokio::io::duplex(29);
        let mut got = Vec::new();
        let sends = async {
            write_parts(&mut near, &parts).await.unwrap();
            write_parts(&mut near, &[Bytes::new()]).await.unwrap();
            near.shutdown().await.unwrap();
        };
        let (_, read) = tokio::join!(sends, far.read_to_end(&mut got));
        read.unwrap();
        assert!(got == parts.concat());
    }

    #[tokio::test]
    async fn sends_a_range_of_a_file_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let file = SystemFs.open(&dir.path().join("f"), OpenMode::Create).unwrap();
        let data: Vec<u8> = (0..9_000_000u32).map(|i| (i % 251) as u8).collect();
        file.write_all_at(&data, 0).unwrap();
        let net = Net::tcp();
        let listener = net.bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().to_string();
        let receive = async {
            let mut conn = listener.accept().await.unwrap();
            let mut got = Vec::new();
            conn.read_to_end(&mut got).await.unwrap();
            got
        };
        let send = async {
            let mut conn = net.connect(&addr, Duration::from_secs(5)).await.unwrap();
            send_range(&mut conn, &Work::threads(1), file, 1_000..8_999_000).await.unwrap();
        };
        let (got, ()) = tokio::join!(receive, send);
        assert!(got == data[1_000..8_999_000]);
    }

    #[test]
    fn a_paused_reader_holds_no_thread() {
        let runtime =
            tokio::runtime::Builder::new_current_thread().max_blocking_threads(1).enable_all().build().unwrap();
        runtime.block_on(async {
            let dir = tempfile::tempdir().unwrap();
            let file = SystemFs.open(&dir.path().join("f"), OpenMode::Create).unwrap();
            let data: Vec<u8> = (0..32_000_000u32).map(|i| (i % 251) as u8).collect();
            file.write_all_at(&data, 0).unwrap();
            let (net, work) = (Net::tcp(), Work::threads(1));
            let listener = net.bind("127.0.0.1:0").await.unwrap();
            let addr = listener.local_addr().to_string();
            let receive = async {
                let mut conn = listener.accept().await.unwrap();
                let mut got = vec![conn.read_u8().await.unwrap()];
                // Far more is to come than the socket holds, and there is one blocking thread.
                let other = tokio::time::timeout(Duration::from_secs(20), work.io(|| 7)).await;
                assert_eq!(other.unwrap(), 7);
                conn.read_to_end(&mut got).await.unwrap();
                got
            };
            let send = async {
                let mut conn = net.connect(&addr, Duration::from_secs(5)).await.unwrap();
                send_range(&mut conn, &work, file, 0..32_000_000).await.unwrap();
            };
            let (got, ()) = tokio::join!(receive, send);
            assert!(got == data);
        });
    }

    #[tokio::test]
    async fn nobody_there_is_named() {
        let error = Net::tcp().connect("127.0.0.1:1", Duration::from_secs(5)).await.err().unwrap();
        assert_eq!(error.code(), ErrorCode::Unreachable);
        assert!(error.message().contains("127.0.0.1:1"), "{error}");
    }

    #[test]
    fn only_loopback_without_insecure() {
        assert!(check_listen("127.0.0.3:0", false).is_ok());
        assert!(check_listen("0.0.0.0:8020", false).unwrap_err().message().contains("--insecure"));
        assert!(check_listen("0.0.0.0:8020", true).is_ok());
        assert!(check_listen("localhost", true).is_err());
    }
}

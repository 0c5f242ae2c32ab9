//! The first bytes of a connection: they tell what the peer speaks, so that one port serves all.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use cairn_proto::handshake::{self, MAX_HELLO_BYTES, PREAMBLE_BYTES, Purpose};
use cairn_proto::{Error, ErrorCode, PROTOCOL_VERSION, Result, pb};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{Conn, Net};
use crate::clock::Clock;

/// A peer that says nothing for this long is cut off.
const OPENING_TIMEOUT: Duration = Duration::from_secs(10);

/// What a server tells of itself, and checks its callers against.
#[derive(Clone, Debug, Default)]
pub struct ServerIdentity {
    /// Empty while not known: then no caller is refused for it.
    pub cluster_id: String,
    /// Highest epoch that this server knows.
    pub epoch: u64,
}

/// Who is at the other end, by its own word.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Effective user.
    pub user: String,
    /// "client", "datanode", "worker".
    pub role: String,
    /// Node id or client id.
    pub peer_id: String,
    /// Where the connection comes from.
    pub addr: SocketAddr,
    /// Highest epoch that it has seen.
    pub epoch: u64,
}

/// What a new connection turned out to be.
pub enum Opening {
    /// Our handshake was done; gRPC follows.
    Rpc {
        /// The connection.
        conn: Conn,
        /// Who calls.
        peer: Peer,
    },
    /// Our handshake was done; data-plane operations follow.
    Data {
        /// The connection.
        conn: Conn,
        /// Who calls.
        peer: Peer,
    },
    /// HTTP/2 without our handshake: a gRPC tool. Nothing was consumed.
    Grpc(Conn),
    /// Hadoop RPC. Nothing was consumed.
    Hadoop(Conn),
    /// Hadoop's data transfer. Nothing was consumed.
    HadoopData(Conn),
    /// HTTP/1. Nothing was consumed.
    Http(Conn),
    /// Something else; its first bytes. Nothing was consumed.
    Unknown(Conn, Bytes),
}

const HTTP_METHODS: [&[u8]; 7] = [b"GET ", b"PUT ", b"POST", b"HEAD", b"DELE", b"OPTI", b"PATC"];

/// Finds out what `conn` speaks. Our own handshake is answered here; a caller of another version or cluster is told so and refused.
pub async fn read_opening(mut conn: Conn, identity: &ServerIdentity, clock: &Clock) -> Result<Opening> {
    let addr = conn.peer_addr();
    let who = addr.to_string();
    let silent = |_| Error::new(ErrorCode::TimedOut, format!("{who} connected and said nothing")).with_subject(&who);
    let first = clock.timeout(OPENING_TIMEOUT, first_bytes(&mut conn)).await.map_err(silent)??;
    conn.unread(first.clone());
    if !first.starts_with(handshake::MAGIC) {
        return Ok(match &first[..] {
            f if f.starts_with(b"PRI ") => Opening::Grpc(conn),
            f if f.starts_with(b"hrpc") => Opening::Hadoop(conn),
            [0x00, 0x1c, ..] => Opening::HadoopData(conn),
            f if HTTP_METHODS.iter().any(|method| f.starts_with(method)) => Opening::Http(conn),
            _ => Opening::Unknown(conn, first),
        });
    }
    clock.timeout(OPENING_TIMEOUT, answer_hello(conn, identity, addr)).await.map_err(silent)?
}

/// At least five bytes, or as many as tell that five will not come.
async fn first_bytes(conn: &mut Conn) -> Result<Bytes> {
    let who = conn.peer_addr();
    let mut first = BytesMut::with_capacity(64);
    while first.len() < handshake::MAGIC.len() {
        let n = conn.read_buf(&mut first).await.map_err(|error| Error::io(format!("reading from {who}"), &error))?;
        if n == 0 {
            if first.is_empty() {
                return Err(Error::new(ErrorCode::Unreachable, format!("{who} left before it said anything")));
            }
            break;
        }
        // Hadoop's data transfer opens with three bytes at least, and may wait then.
        if first.starts_with(&[0x00, 0x1c]) {
            break;
        }
    }
    Ok(first.freeze())
}

async fn answer_hello(mut conn: Conn, identity: &ServerIdentity, addr: SocketAddr) -> Result<Opening> {
    let who = addr.to_string();
    let left = |error: std::io::Error| Error::new(ErrorCode::Unreachable, format!("{who} left: {error}"));
    let mut preamble = [0; PREAMBLE_BYTES];
    conn.read_exact(&mut preamble).await.map_err(left)?;
    let preamble = handshake::decode_preamble(&preamble, &who)?;
    let mut body = vec![0; preamble.message_bytes];
    conn.read_exact(&mut body).await.map_err(left)?;
    let checked = check_hello(preamble.version, &body, identity, &who);
    let mut reply = pb::HelloReply {
        error: None,
        cluster_id: identity.cluster_id.clone(),
        epoch: identity.epoch,
        software: env!("CARGO_PKG_VERSION").into(),
    };
    if let Err(error) = &checked {
        let wire = error.to_wire();
        reply.error = Some(pb::WireErrorRef { code: wire.code as u32, message: wire.message, subject: wire.subject });
    }
    conn.write_all(&handshake::encode(preamble.purpose, PROTOCOL_VERSION, &reply)).await.map_err(left)?;
    let hello = match checked {
        Ok(hello) => hello,
        Err(error) => {
            // The caller must get the reason before the connection closes.
            let _ = conn.shutdown().await;
            return Err(error);
        }
    };
    let peer = Peer { user: hello.user, role: hello.role, peer_id: hello.peer_id, addr, epoch: hello.epoch };
    Ok(match preamble.purpose {
        Purpose::Rpc => Opening::Rpc { conn, peer },
        Purpose::Data => Opening::Data { conn, peer },
    })
}

fn check_hello(version: u16, body: &[u8], identity: &ServerIdentity, who: &str) -> Result<pb::Hello> {
    handshake::check_version(version, who)?;
    let hello: pb::Hello = cairn_proto::dataplane::decode_message(body, who)?;
    if hello.user.is_empty() || hello.user.len() > 255 {
        return Err(Error::new(ErrorCode::InvalidArgument, "the user name must have 1 to 255 bytes"));
    }
    let (mine, theirs) = (&identity.cluster_id, &hello.cluster_id);
    if !mine.is_empty() && !theirs.is_empty() && mine != theirs {
        let text = format!("this is cluster {mine}, but the {} at {who} belongs to cluster {theirs}", hello.role);
        return Err(Error::new(ErrorCode::WrongCluster, text).with_subject(theirs));
    }
    Ok(hello)
}

/// Dials `addr` and does the handshake for `purpose`; returns what the server told of itself.
pub async fn open(
    net: &Net,
    addr: &str,
    purpose: Purpose,
    hello: &pb::Hello,
    timeout: Duration,
) -> Result<(Conn, pb::HelloReply)> {
    let mut conn = net.connect(addr, timeout).await?;
    match tokio::time::timeout(timeout, shake_hands(&mut conn, addr, purpose, hello)).await {
        Ok(reply) => reply.map(|reply| (conn, reply)),
        Err(_) => {
            let text = format!("{addr} took the connection but did not answer Cairn's handshake within {timeout:?}");
            Err(Error::new(ErrorCode::TimedOut, text).with_subject(addr))
        }
    }
}

async fn shake_hands(conn: &mut Conn, addr: &str, purpose: Purpose, hello: &pb::Hello) -> Result<pb::HelloReply> {
    let left = |error: std::io::Error| {
        let text = format!(
            "{addr} closed the connection instead of answering Cairn's handshake ({error}): \
                            is it the right port?"
        );
        Error::new(ErrorCode::Unreachable, text).with_subject(addr)
    };
    conn.write_all(&handshake::encode(purpose, PROTOCOL_VERSION, hello)).await.map_err(left)?;
    let mut preamble = [0; PREAMBLE_BYTES];
    conn.read_exact(&mut preamble).await.map_err(left)?;
    let preamble = handshake::decode_preamble(&preamble, addr)?;
    let mut body = vec![0; preamble.message_bytes.min(MAX_HELLO_BYTES)];
    conn.read_exact(&mut body).await.map_err(left)?;
    let reply: pb::HelloReply = cairn_proto::dataplane::decode_message(&body, addr)?;
    if let Some(error) = reply.error {
        let wire = pb::WireError { code: error.code as i32, message: error.message, subject: error.subject };
        return Err(Error::from_wire(wire));
    }
    handshake::check_version(preamble.version, addr)?;
    Ok(reply)
}

/// Dials a datanode's data port for data-plane operations.
pub async fn open_data(net: &Net, addr: &str, hello: &pb::Hello, timeout: Duration) -> Result<Conn> {
    open(net, addr, Purpose::Data, hello, timeout).await.map(|(conn, _)| conn)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(cluster: &str) -> pb::Hello {
        pb::Hello { user: "ann".into(), role: "client".into(), cluster_id: cluster.into(), ..Default::default() }
    }

    async fn meet(send: impl AsRef<[u8]>) -> Result<Opening> {
        let net = Net::tcp();
        let listener = net.bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().to_string();
        let mut client = net.connect(&addr, Duration::from_secs(5)).await.unwrap();
        client.write_all(send.as_ref()).await.unwrap();
        let conn = listener.accept().await.unwrap();
        read_opening(conn, &ServerIdentity::default(), &Clock::system()).await
    }

    #[tokio::test]
    async fn first_bytes_tell() {
        assert!(matches!(meet("PRI * HTTP/2.0\r\n").await, Ok(Opening::Grpc(_))));
        assert!(matches!(meet(b"hrpc\x09\x00\x00").await, Ok(Opening::Hadoop(_))));
        assert!(matches!(meet([0x00, 0x1c, 80]).await, Ok(Opening::HadoopData(_))));
        assert!(matches!(meet("GET / HTTP/1.1\r\n").await, Ok(Opening::Http(_))));
        assert!(matches!(meet("SSH-2.0").await, Ok(Opening::Unknown(..))));
        let hello = handshake::encode(Purpose::Data, PROTOCOL_VERSION, &hello(""));
        assert!(matches!(meet(hello).await, Ok(Opening::Data { peer, .. }) if peer.user == "ann"));
    }

    #[tokio::test]
    async fn another_cluster_is_refused_at_both_ends() {
        let net = Net::tcp();
        let listener = net.bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().to_string();
        let identity = ServerIdentity { cluster_id: "A".into(), epoch: 1 };
        let clock = Clock::system();
        let serve = async { read_opening(listener.accept().await.unwrap(), &identity, &clock).await };
        let hello = hello("B");
        let call = open(&net, &addr, Purpose::Rpc, &hello, Duration::from_secs(5));
        let (served, called) = tokio::join!(serve, call);
        assert_eq!(served.err().unwrap().code(), ErrorCode::WrongCluster);
        let error = called.err().unwrap();
        assert_eq!(error.code(), ErrorCode::WrongCluster);
        assert!(error.message().contains("this is cluster A"), "{error}");
    }

    #[tokio::test]
    async fn a_port_of_something_else_is_said_to_be_that() {
        let net = Net::tcp();
        let listener = net.bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().to_string();
        let serve = async {
            let mut conn = listener.accept().await.unwrap();
            conn.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
            conn.shutdown().await.unwrap();
            let mut rest = Vec::new();
            let _ = conn.read_to_end(&mut rest).await;
        };
        let hello = hello("");
        let (called, ()) = tokio::join!(open(&net, &addr, Purpose::Rpc, &hello, Duration::from_secs(5)), serve);
        assert!(called.err().unwrap().message().contains("does not speak Cairn's protocol"));
    }
}

//! One connection.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;

use super::frame::{self, Fatal, Frame, Head};
use super::{Call, Limits, Protocol, RpcError};
use crate::clock::Clock;
use crate::net::Conn;

/// The opening must be there after this.
const OPENING_TIME: Duration = Duration::from_secs(10);
/// A frame before the connection context, bytes.
const FIRST_FRAME_BYTES: usize = 64 << 10;
/// The only version of the protocols that are served.
const PROTOCOL_VERSION: u64 = 1;
/// A refused peer gets this long to read why.
const REFUSAL_TIME: Duration = Duration::from_secs(2);
/// Replies are put together up to this for one write.
const WRITE_BYTES: usize = 64 << 10;
/// Unit of the limit on requests under way.
const UNIT_BYTES: usize = 1 << 10;
/// A large frame is read in steps, so that memory comes with bytes, not with claims.
const READ_STEP: usize = 64 << 10;

/// Why a connection ends.
enum End {
    /// The client left, or must go without a word.
    Quiet,
    /// The client is to be told first.
    Tell(Vec<u8>),
}

impl From<io::Error> for End {
    fn from(_: io::Error) -> Self {
        Self::Quiet
    }
}

impl From<Fatal> for End {
    fn from(fatal: Fatal) -> Self {
        Self::Tell(frame::encode_fatal(&fatal))
    }
}

/// Serves a connection that opens with `hrpc` until the client leaves, breaks the protocol or is silent for too long, or `stopped`
/// resolves: then calls under way are dropped.
pub async fn serve(
    conn: Conn,
    protocol: Arc<dyn Protocol>,
    clock: Clock,
    limits: Limits,
    stopped: impl Future<Output = ()>,
) {
    tokio::select! { biased;
        () = stopped => {}
        () = serve_to_end(conn, protocol, clock, limits) => {}
    }
}

async fn serve_to_end(mut conn: Conn, protocol: Arc<dyn Protocol>, clock: Clock, limits: Limits) {
    let (peer, local) = (conn.peer_addr(), conn.local_addr());
    match clock.timeout(OPENING_TIME, read_opening(&mut conn)).await {
        Ok(Ok(())) => {}
        Ok(Err(end)) => {
            let (mut reader, mut writer) = conn.split();
            return tell(&clock, end, &mut reader, &mut writer).await;
        }
        Err(_) => return,
    }
    let (mut reader, writer) = conn.split();
    let (replies, queue) = mpsc::channel(limits.calls.max(1));
    let mut sender = tokio::spawn(write_replies(clock.clone(), writer, queue, limits.stall));
    let mut session = Session {
        protocol,
        clock: clock.clone(),
        limits,
        user: String::new(),
        peer,
        local,
        calls: JoinSet::new(),
        slots: Arc::new(Semaphore::new(limits.calls.max(1))),
        bytes: Arc::new(Semaphore::new(limits.request_bytes.max(limits.frame_bytes).div_ceil(UNIT_BYTES))),
        unsent: Arc::new(Semaphore::new(limits.reply_bytes.div_ceil(UNIT_BYTES))),
        replies,
    };
    let end = tokio::select! { biased;
        // The client takes no replies, or is gone.
        _ = &mut sender => return,
        end = session.run(&mut reader) => end,
    };
    // Calls that the client waits for are dropped with a session that it ended.
    drop(session);
    if let Ok(Some(mut writer)) = sender.await {
        tell(&clock, end, &mut reader, &mut writer).await;
    }
}

async fn read_opening(conn: &mut Conn) -> Result<(), End> {
    let mut opening = [0; frame::OPENING_BYTES];
    conn.read_exact(&mut opening[..5]).await?;
    if opening[4] != frame::VERSION {
        return Err(End::Tell(frame::encode_version_refusal(opening[4])));
    }
    conn.read_exact(&mut opening[5..]).await?;
    // The service class is for whoever has several; unknown authentication ends it as a real namenode does.
    if opening[6] == 0 || opening[6] == frame::AUTH_SASL { Ok(()) } else { Err(End::Quiet) }
}

/// Says the last word and closes.
async fn tell(clock: &Clock, end: End, reader: &mut ReadHalf<Conn>, writer: &mut WriteHalf<Conn>) {
    let last_words = async {
        if let End::Tell(bytes) = end {
            writer.write_all(&bytes).await?;
        }
        writer.shutdown().await?;
        // Closing with unread bytes would reset the connection and could destroy the answer on its way.
        let mut rest = [0; 4096];
        while reader.read(&mut rest).await? > 0 {}
        Ok::<(), io::Error>(())
    };
    // A peer that does not take it in time is closed all the same.
    let _ = clock.timeout(REFUSAL_TIME, last_words).await;
}

/// Sends replies in the order in which they come, several in one write; gives the connection back when no more will come.
async fn write_replies(
    clock: Clock,
    mut writer: WriteHalf<Conn>,
    mut queue: mpsc::Receiver<Reply>,
    stall: Duration,
) -> Option<WriteHalf<Conn>> {
    while let Some(Reply { bytes: mut out, share }) = queue.recv().await {
        // Given back when all of it is written.
        let mut shares = vec![share];
        while out.len() < WRITE_BYTES
            && let Ok(more) = queue.try_recv()
        {
            out.extend(more.bytes);
            shares.push(more.share);
        }
        match clock.timeout(stall, writer.write_all(&out)).await {
            Ok(Ok(())) => {}
            _ => return None,
        }
    }
    Some(writer)
}

/// An encoded reply, and its part of what may wait to be sent.
struct Reply {
    bytes: Vec<u8>,
    share: Option<OwnedSemaphorePermit>,
}

fn units(bytes: usize) -> u32 {
    u32::try_from(bytes.div_ceil(UNIT_BYTES)).unwrap_or(u32::MAX)
}

async fn read_body(reader: &mut ReadHalf<Conn>, length: usize) -> Result<Bytes, End> {
    let mut body = Vec::with_capacity(length.min(READ_STEP));
    while body.len() < length {
        let (from, step) = (body.len(), READ_STEP.min(length - body.len()));
        body.resize(from + step, 0);
        reader.read_exact(&mut body[from..]).await?;
    }
    Ok(body.into())
}

struct Session {
    protocol: Arc<dyn Protocol>,
    clock: Clock,
    limits: Limits,
    /// Empty until the connection context came.
    user: String,
    peer: std::net::SocketAddr,
    local: std::net::SocketAddr,
    calls: JoinSet<()>,
    slots: Arc<Semaphore>,
    bytes: Arc<Semaphore>,
    /// Room for replies that wait to be sent.
    unsent: Arc<Semaphore>,
    replies: mpsc::Sender<Reply>,
}

impl Session {
    async fn run(&mut self, reader: &mut ReadHalf<Conn>) -> End {
        loop {
            let next = match self.next_frame(reader).await {
                Ok(next) => next,
                Err(end) => return end,
            };
            let Some((bytes, share)) = next else { continue };
            let taken = match frame::decode(bytes) {
                Ok(frame) => self.take(frame, share).await,
                Err(fatal) => Err(fatal.into()),
            };
            if let Err(end) = taken {
                return end;
            }
        }
    }

    /// `None`: nothing to do but go on.
    async fn next_frame(&mut self, reader: &mut ReadHalf<Conn>) -> Result<Option<(Bytes, OwnedSemaphorePermit)>, End> {
        let mut head = [0; 4];
        // Who said nothing of itself is not waited for as long.
        let idle = if self.user.is_empty() { self.limits.stall } else { self.limits.idle };
        loop {
            tokio::select! { biased;
                first = self.clock.timeout(idle, reader.read(&mut head[..1])) => match first {
                    Ok(Ok(0)) => return Err(End::Quiet),
                    Ok(Ok(_)) => break,
                    Ok(Err(error)) => return Err(error.into()),
                    // A client that waits for a call may be silent.
                    Err(_) if self.calls.is_empty() => return Err(End::Quiet),
                    Err(_) => {}
                },
                Some(ended) = self.calls.join_next() => if ended.is_err() {
                    // A call that panicked has no answer: the client must not wait for it.
                    return Err(End::Quiet);
                },
            }
        }
        let stall = self.limits.stall;
        let length = async {
            reader.read_exact(&mut head[1..]).await?;
            self.check_length(u32::from_be_bytes(head) as usize)
        };
        let length = self.clock.timeout(stall, length).await.unwrap_or(Err(End::Quiet))?;
        if length == 0 {
            // Very old pings.
            return Ok(None);
        }
        // However long the calls before take: the client waits, not its connection's end.
        let share = Arc::clone(&self.bytes).acquire_many_owned(units(length)).await.map_err(|_| End::Quiet)?;
        let body = self.clock.timeout(stall, read_body(reader, length)).await.unwrap_or(Err(End::Quiet))?;
        Ok(Some((body, share)))
    }

    fn check_length(&self, length: usize) -> Result<usize, End> {
        let most = if self.user.is_empty() { FIRST_FRAME_BYTES } else { self.limits.frame_bytes };
        if length > most {
            let message = format!("a request of {length} bytes is longer than the limit of {most}");
            return Err(Fatal::bad_frame(message).into());
        }
        Ok(length)
    }

    async fn take(&mut self, frame: Frame, share: OwnedSemaphorePermit) -> Result<(), End> {
        match frame {
            Frame::Ping => Ok(()),
            Frame::Close => Err(End::Quiet),
            Frame::Negotiate(head) => self.reply(frame::encode_go_on_simple(&head)).await,
            Frame::Context { user, real_user } if self.user.is_empty() => {
                if let Some(real_user) = real_user.filter(|real| !self.protocol.may_act_for(real, &user)) {
                    return Err(Fatal::no_impersonation(&real_user, &user).into());
                }
                self.user = user;
                Ok(())
            }
            Frame::Context { .. } => Err(Fatal::bad_frame("the connection context came twice".into()).into()),
            Frame::Call { .. } if self.user.is_empty() => {
                Err(Fatal::bad_frame("a call came before the connection context".into()).into())
            }
            Frame::Call { head, method, protocol, version, request } => {
                if let Err(error) = self.check(&protocol, version) {
                    return self.reply(frame::encode_reply(&head, &Err(error))).await;
                }
                self.start(head, method, request, share).await
            }
        }
    }

    fn check(&self, protocol: &str, version: u64) -> Result<(), RpcError> {
        if protocol != self.protocol.name() {
            return Err(RpcError::no_such_protocol(protocol));
        }
        if version != PROTOCOL_VERSION {
            let message =
                format!("Protocol {protocol} version mismatch. (client = {version}, server = {PROTOCOL_VERSION})");
            let error = RpcError::new("org.apache.hadoop.ipc.RPC$VersionMismatch", message);
            let detail = cairn_proto::hadoop::rpc_response_header::ErrorDetail::ErrorRpcVersionMismatch;
            return Err(RpcError { detail, ..error });
        }
        Ok(())
    }

    async fn start(
        &mut self,
        head: Head,
        method: String,
        request: Bytes,
        share: OwnedSemaphorePermit,
    ) -> Result<(), End> {
        // Closed never.
        let slot = Arc::clone(&self.slots).acquire_owned().await.map_err(|_| End::Quiet)?;
        let call = Call {
            method,
            user: self.user.clone(),
            client_id: head.client_id.clone(),
            call_id: head.call_id,
            peer: self.peer,
            local: self.local,
        };
        while let Some(ended) = self.calls.try_join_next() {
            ended.map_err(|_| End::Quiet)?;
        }
        let (protocol, replies) = (Arc::clone(&self.protocol), self.replies.clone());
        let (unsent, most) = (Arc::clone(&self.unsent), self.limits.reply_bytes);
        self.calls.spawn(async move {
            let answer = protocol.call(&call, request).await;
            drop(share);
            let bytes = frame::encode_reply(&head, &answer);
            // A reply larger than all that may wait waits alone.
            let Ok(share) = unsent.acquire_many_owned(units(bytes.len().min(most))).await else { return };
            // Fails when the connection is over.
            let _ = replies.send(Reply { bytes, share: Some(share) }).await;
            drop(slot);
        });
        Ok(())
    }

    /// A short one.
    async fn reply(&self, bytes: Vec<u8>) -> Result<(), End> {
        self.replies.send(Reply { bytes, share: None }).await.map_err(|_| End::Quiet)
    }
}

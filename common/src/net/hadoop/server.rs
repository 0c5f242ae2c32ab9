//! One connection.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt as _;
use futures_util::stream::{FuturesUnordered, StreamExt as _};
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};

use super::frame::{self, Fatal, Frame, Head};
use super::inbox::{Inbox, Next};
use super::outbox::Outbox;
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

/// Why a connection ends.
enum End {
    /// The client left, or must go without a word.
    Quiet,
    /// The client takes nothing any more.
    Stuck,
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
    let (reader, writer) = conn.split();
    let mut session = Session {
        protocol,
        limits,
        user: String::new(),
        peer,
        local,
        under_way: 0,
        inbox: Inbox::new(reader),
        outbox: Outbox::new(writer, clock.clone()),
        clock,
    };
    // Calls that the client waits for are dropped with a session that it ended.
    let Err(end) = session.run().await;
    let Session { inbox, mut outbox, clock, .. } = session;
    if let End::Stuck = end {
        return;
    }
    let rest = async {
        while !outbox.is_empty() {
            outbox.send().await?;
        }
        Ok::<(), io::Error>(())
    };
    let Ok(Ok(())) = clock.timeout(limits.stall, rest).await else { return };
    tell(&clock, end, &mut inbox.into_reader(), &mut outbox.into_writer()).await;
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

/// A call with all that its answer needs.
struct Asked {
    head: Head,
    call: Call,
    request: Bytes,
}

/// Ends a call: what its frame takes of the limit, and the reply; none if it panicked.
async fn answer(protocol: Arc<dyn Protocol>, asked: Asked, frame_bytes: usize) -> (usize, Option<Vec<u8>>) {
    let Asked { head, call, request } = asked;
    let answer = AssertUnwindSafe(async { protocol.call(&call, request).await }).catch_unwind().await;
    (frame_bytes, answer.ok().map(|answer| frame::encode_reply(&head, &answer)))
}

struct Session {
    protocol: Arc<dyn Protocol>,
    clock: Clock,
    limits: Limits,
    /// Empty until the connection context came.
    user: String,
    peer: std::net::SocketAddr,
    local: std::net::SocketAddr,
    /// Bytes of the requests of all calls.
    under_way: usize,
    inbox: Inbox<ReadHalf<Conn>>,
    outbox: Outbox<WriteHalf<Conn>>,
}

impl Session {
    /// One task does it all: a client that waits for each answer costs it two turns a call, one to ask and one to answer.
    async fn run(&mut self) -> Result<Infallible, End> {
        let mut calls = FuturesUnordered::new();
        let mut part_since_ms = None;
        loop {
            let has_room =
                calls.len() < self.limits.calls.max(1) && self.outbox.bytes() < self.limits.reply_bytes.max(1);
            let next = if has_room { self.next_frame()? } else { Next::Large };
            if let Next::Frame(frame) = next {
                let bytes = frame.len();
                if let Some(asked) = self.take(frame)? {
                    self.under_way += bytes;
                    calls.push(answer(Arc::clone(&self.protocol), asked, bytes));
                }
                part_since_ms = None;
                continue;
            }
            let now_ms = self.clock.mono_ms();
            let is_busy = !calls.is_empty() || !self.outbox.is_empty();
            // However long the calls before take: the client waits for room, not its connection's end.
            part_since_ms = (next == Next::Part).then(|| part_since_ms.unwrap_or(now_ms));
            let due_ms = self.due_ms(part_since_ms, now_ms, is_busy || next == Next::Large);
            tokio::select! { biased;
                Some((bytes, reply)) = calls.next(), if !calls.is_empty() => {
                    self.under_way -= bytes;
                    // A call that panicked has no answer: the client must not wait for it.
                    self.outbox.push(reply.ok_or(End::Quiet)?);
                }
                // The client takes no replies, or is gone.
                sent = self.outbox.send(), if !self.outbox.is_empty() => sent?,
                read = self.inbox.fill(), if next != Next::Large => if read? == 0 {
                    return Err(End::Quiet);
                },
                () = self.clock.sleep(Duration::from_millis(due_ms.unwrap_or(now_ms) - now_ms)), if due_ms.is_some() => {
                    let stuck = self.outbox.due_ms(self.limits.stall).is_some_and(|due_ms| due_ms <= self.clock.mono_ms());
                    return Err(if stuck { End::Stuck } else { End::Quiet });
                }
            }
        }
    }

    fn next_frame(&mut self) -> Result<Next, Fatal> {
        let most = if self.user.is_empty() { FIRST_FRAME_BYTES } else { self.limits.frame_bytes };
        self.inbox.take(most, self.limits.request_bytes.max(most).saturating_sub(self.under_way))
    }

    /// When the client's silence ends the connection; it may be silent while it waits for us.
    fn due_ms(&self, part_since_ms: Option<u64>, now_ms: u64, waits: bool) -> Option<u64> {
        let Limits { stall, idle, .. } = self.limits;
        let after = |since_ms: u64, limit: Duration| since_ms + limit.as_millis() as u64;
        let frame = match part_since_ms {
            Some(since_ms) => Some(after(since_ms, stall)),
            None if waits => None,
            // Who said nothing of itself is not waited for as long.
            None => Some(after(now_ms, if self.user.is_empty() { stall } else { idle })),
        };
        frame.into_iter().chain(self.outbox.due_ms(stall)).min().map(|due_ms| due_ms.max(now_ms))
    }

    /// Carries out what is no call.
    fn take(&mut self, frame: Bytes) -> Result<Option<Asked>, End> {
        match frame::decode(frame)? {
            Frame::Ping => {}
            Frame::Close => return Err(End::Quiet),
            Frame::Negotiate(head) => self.outbox.push(frame::encode_go_on_simple(&head)),
            Frame::Context { user, real_user } if self.user.is_empty() => {
                if let Some(real_user) = real_user.filter(|real| !self.protocol.may_act_for(real, &user)) {
                    return Err(Fatal::no_impersonation(&real_user, &user).into());
                }
                self.user = user;
            }
            Frame::Context { .. } => return Err(Fatal::bad_frame("the connection context came twice".into()).into()),
            Frame::Call { .. } if self.user.is_empty() => {
                return Err(Fatal::bad_frame("a call came before the connection context".into()).into());
            }
            Frame::Call { head, method, protocol, version, request } => match self.check(&protocol, version) {
                Err(error) => self.outbox.push(frame::encode_reply(&head, &Err(error))),
                Ok(()) => {
                    let call = Call {
                        method,
                        user: self.user.clone(),
                        client_id: head.client_id.clone(),
                        call_id: head.call_id,
                        peer: self.peer,
                        local: self.local,
                    };
                    return Ok(Some(Asked { head, call, request }));
                }
            },
        }
        Ok(None)
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
}

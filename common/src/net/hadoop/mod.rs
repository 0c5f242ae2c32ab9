//! The server's side of Hadoop RPC, version 9.
//!
//! # Overview
//! [`serve`] takes a connection that opened with `hrpc` and answers its calls by a [`Protocol`], until either side ends it.
//!
//! ```text
//!  client: "hrpc" 09 class auth   (auth 00: none, DF: SASL)         server: nothing
//!          frame: call id -3, connection context (user, protocol)           nothing
//!          frame: call id n, method, request                                frame: call id n, answer or exception
//!          frame: call id -4 (ping)                                         nothing
//! ```
//!
//! Calls of a connection run at the same time and are answered as they end. [`Limits`] bounds them: the reader takes the next
//! frame only when there is room for it. [`frame`] reads and writes frames.
//!
//! # Authentication
//! There is none: the user is who the connection context says. A client that begins SASL is told to go on without, as a HDFS
//! without security tells it; one that insists on Kerberos then says so itself and leaves. A context that names a second, real user
//! (Java's `doAs`) is refused unless the [`Protocol`] lets that one act for others.
//!
//! # Cancellation
//! Dropping the future of [`serve`] closes the connection and drops its calls.

pub mod frame;
mod inbox;
mod outbox;
mod server;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use cairn_proto::Error;
use cairn_proto::hadoop::rpc_response_header::ErrorDetail;

pub use server::serve;

/// Answer to a call: the bytes of the method's message, or an exception.
pub type Answer = Result<Vec<u8>, RpcError>;

/// What a server offers.
pub trait Protocol: Send + Sync + 'static {
    /// Class name by which clients ask for it, such as `org.apache.hadoop.hdfs.protocol.ClientProtocol`.
    fn name(&self) -> &'static str;

    /// Whether `real_user` may call in the name of `user`, who is another one.
    fn may_act_for(&self, real_user: &str, user: &str) -> bool;

    /// Answers one call. `request` is the method's message, as yet undecoded.
    fn call<'a>(&'a self, call: &'a Call, request: Bytes) -> Pin<Box<dyn Future<Output = Answer> + Send + 'a>>;
}

/// Who calls what.
#[derive(Clone, Debug)]
pub struct Call {
    /// Name of the method.
    pub method: String,
    /// Effective user: 1 to 255 bytes.
    pub user: String,
    /// 16 bytes by convention; at most [`frame::MAX_CLIENT_ID_BYTES`].
    pub client_id: Bytes,
    /// Not negative. Together with the client id it names a call also when that is repeated.
    pub call_id: i32,
    /// The other end.
    pub peer: SocketAddr,
    /// This end.
    pub local: SocketAddr,
}

/// An exception as Hadoop's clients know them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RpcError {
    /// Class name; clients tell conditions apart by it.
    pub class: Cow<'static, str>,
    /// For people; clients show the first line.
    pub message: String,
    /// Kind of failure.
    pub detail: ErrorDetail,
}

impl RpcError {
    /// An exception that a method throws.
    pub fn new(class: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Self {
        Self { class: class.into(), message: message.into(), detail: ErrorDetail::ErrorApplication }
    }

    /// There is no such method.
    pub fn no_such_method(method: &str, protocol: &str) -> Self {
        let message = format!("Unknown method {method} called on {protocol} protocol.");
        let class = Cow::Borrowed("org.apache.hadoop.ipc.RpcNoSuchMethodException");
        Self { class, message, detail: ErrorDetail::ErrorNoSuchMethod }
    }

    /// There is no such protocol.
    pub fn no_such_protocol(protocol: &str) -> Self {
        let class = Cow::Borrowed("org.apache.hadoop.ipc.RpcNoSuchProtocolException");
        Self { class, message: format!("Unknown protocol: {protocol}"), detail: ErrorDetail::ErrorNoSuchProtocol }
    }

    /// The method's message could not be read.
    pub fn bad_request(method: &str, why: impl std::fmt::Display) -> Self {
        let class = Cow::Borrowed("org.apache.hadoop.ipc.RpcServerException");
        let message = format!("the request of {method} could not be read: {why}");
        Self { class, message, detail: ErrorDetail::FatalDeserializingRequest }
    }
}

impl From<Error> for RpcError {
    fn from(error: Error) -> Self {
        Self::new(error.hadoop_class(), error.message())
    }
}

/// Bounds of one connection.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Calls under way. Fewer: a busy client waits for itself; more: one client can fill the server.
    pub calls: usize,
    /// Largest frame, bytes. A larger one ends the connection.
    pub frame_bytes: usize,
    /// Bytes of requests under way; at least `frame_bytes`.
    pub request_bytes: usize,
    /// Bytes of replies that wait to be sent.
    pub reply_bytes: usize,
    /// A frame that began must be there, and a reply be taken, after this.
    pub stall: Duration,
    /// A connection without calls and frames ends after this. Clients end idle ones by themselves after ten seconds.
    pub idle: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            calls: 64,
            frame_bytes: 16 << 20,
            request_bytes: 32 << 20,
            reply_bytes: 32 << 20,
            stall: Duration::from_secs(60),
            idle: Duration::from_secs(600),
        }
    }
}

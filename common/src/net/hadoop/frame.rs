//! Frames of Hadoop RPC: what clients send, and what they get.

use bytes::{Buf, Bytes};
use cairn_proto::hadoop::rpc_request_header::Operation;
use cairn_proto::hadoop::rpc_response_header::{ErrorDetail, Status};
use cairn_proto::hadoop::{
    IpcConnectionContext, RequestHeader, RpcKind, RpcRequestHeader, RpcResponseHeader, RpcSasl, rpc_sasl,
};
use prost::Message as _;

use super::{Answer, RpcError};

/// "hrpc", version, service class, authentication.
pub const OPENING_BYTES: usize = 7;
/// The version that is spoken here.
pub const VERSION: u8 = 9;
/// Authentication byte of a client that wants SASL.
pub const AUTH_SASL: u8 = 0xdf;
/// Longest client id.
pub const MAX_CLIENT_ID_BYTES: usize = 64;
/// Longest name of a method or protocol.
const MAX_NAME_BYTES: usize = 512;
/// Longest user name.
const MAX_USER_BYTES: usize = 255;

const CONTEXT_CALL: i32 = -3;
const PING_CALL: i32 = -4;
const SASL_CALL: i32 = -33;
/// Call id of an answer to what is no call.
const NO_CALL: i32 = -1;

const SERVER_EXCEPTION: &str = "org.apache.hadoop.ipc.RpcServerException";
const AUTHORIZATION: &str = "org.apache.hadoop.security.authorize.AuthorizationException";
const ACCESS_CONTROL: &str = "org.apache.hadoop.security.AccessControlException";
const VERSION_MISMATCH: &str = "org.apache.hadoop.ipc.RPC$VersionMismatch";

/// Names the call that an answer belongs to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Head {
    /// The call's id.
    pub call_id: i32,
    /// The client.
    pub client_id: Bytes,
    /// How often it was tried before.
    pub retry_count: i32,
}

impl Head {
    fn of_none() -> Self {
        Self { call_id: NO_CALL, client_id: Bytes::new(), retry_count: -1 }
    }
}

/// One frame of a client.
#[derive(Clone, PartialEq, Debug)]
pub enum Frame {
    /// Who calls from now on.
    Context {
        /// Effective user.
        user: String,
        /// Who acts for that user, if it is another one.
        real_user: Option<String>,
    },
    /// A sign of life.
    Ping,
    /// The client closes the connection.
    Close,
    /// The client begins SASL.
    Negotiate(Head),
    /// A call.
    Call {
        /// For the answer.
        head: Head,
        /// Name of the method.
        method: String,
        /// Class name of the protocol.
        protocol: String,
        /// Its version.
        version: u64,
        /// The method's message.
        request: Bytes,
    },
}

/// What ends a connection: to be told to the client first.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fatal {
    /// The call it is about.
    pub head: Head,
    /// Why.
    pub error: RpcError,
}

impl Fatal {
    fn new(head: Head, class: &'static str, detail: ErrorDetail, message: String) -> Self {
        Self { head, error: RpcError { detail, ..RpcError::new(class, message) } }
    }

    /// Who calls may not act for the user that it names.
    pub fn no_impersonation(real_user: &str, user: &str) -> Self {
        // Clients of HDFS know these words.
        let message = format!("User: {real_user} is not allowed to impersonate {user}");
        let head = Head { call_id: CONTEXT_CALL, ..Head::of_none() };
        Self::new(head, AUTHORIZATION, ErrorDetail::FatalUnauthorized, message)
    }

    /// A frame that is no frame.
    pub fn bad_frame(message: String) -> Self {
        Self::new(Head::of_none(), SERVER_EXCEPTION, ErrorDetail::FatalInvalidRpcHeader, message)
    }
}

fn delimited<M: prost::Message + Default>(frame: &mut Bytes, what: &str) -> Result<M, Fatal> {
    M::decode_length_delimited(frame).map_err(|error| Fatal::bad_frame(format!("{what} could not be read: {error}")))
}

/// Reads one frame, without its length.
pub fn decode(mut frame: Bytes) -> Result<Frame, Fatal> {
    let header: RpcRequestHeader = delimited(&mut frame, "the header of a request")?;
    if header.client_id.len() > MAX_CLIENT_ID_BYTES {
        let message = format!("a client id of {} bytes is longer than {MAX_CLIENT_ID_BYTES}", header.client_id.len());
        return Err(Fatal::bad_frame(message));
    }
    // A copy: the field is a slice of the whole frame, which would stay in memory with it.
    let client_id = Bytes::copy_from_slice(&header.client_id);
    let head = Head { call_id: header.call_id, client_id, retry_count: header.retry_count() };
    let invalid = |head: Head, message: String| {
        Err(Fatal::new(head, SERVER_EXCEPTION, ErrorDetail::FatalInvalidRpcHeader, message))
    };
    if header.call_id == PING_CALL {
        return Ok(Frame::Ping);
    }
    match header.rpc_op() {
        Operation::CloseConnection => return Ok(Frame::Close),
        Operation::ContinuationPacket => {
            return invalid(head, "continuation packets are not part of the protocol".into());
        }
        Operation::FinalPacket => {}
    }
    match header.call_id {
        CONTEXT_CALL => return context(head, &mut frame),
        SASL_CALL => return sasl(head, &mut frame),
        id if id < 0 => return invalid(head, format!("call id {id} means nothing")),
        _ => {}
    }
    if header.rpc_kind != Some(RpcKind::RpcProtocolBuffer as i32) {
        let message = "only requests in protocol buffers are answered".to_owned();
        return Err(Fatal::new(head, SERVER_EXCEPTION, ErrorDetail::FatalUnsupportedSerialization, message));
    }
    let request: RequestHeader = delimited(&mut frame, "the method of a request")?;
    if request.method_name.len() > MAX_NAME_BYTES || request.protocol_name.len() > MAX_NAME_BYTES {
        return invalid(head, format!("the name of a method or protocol is longer than {MAX_NAME_BYTES} bytes"));
    }
    let body = body(&mut frame).map_err(|message| {
        Fatal::new(head.clone(), SERVER_EXCEPTION, ErrorDetail::FatalDeserializingRequest, message)
    })?;
    Ok(Frame::Call {
        head,
        method: request.method_name,
        protocol: request.protocol_name,
        version: request.client_protocol_version,
        request: body,
    })
}

fn body(frame: &mut Bytes) -> Result<Bytes, String> {
    if !frame.has_remaining() {
        return Ok(Bytes::new());
    }
    let length = prost::decode_length_delimiter(&mut *frame).map_err(|error| error.to_string())?;
    if length > frame.remaining() {
        return Err(format!("a message of {length} bytes does not fit into its frame"));
    }
    Ok(frame.split_to(length))
}

fn context(head: Head, frame: &mut Bytes) -> Result<Frame, Fatal> {
    let context: IpcConnectionContext = delimited(frame, "the connection context")?;
    let info = context.user_info.unwrap_or_default();
    let (user, real_user) = (info.effective_user.unwrap_or_default(), info.real_user.unwrap_or_default());
    if user.is_empty() || user.len().max(real_user.len()) > MAX_USER_BYTES {
        let message = format!("the connection context must name a user of 1 to {MAX_USER_BYTES} bytes");
        return Err(Fatal::new(head, ACCESS_CONTROL, ErrorDetail::FatalUnauthorized, message));
    }
    let real_user = Some(real_user).filter(|real| !real.is_empty() && *real != user);
    Ok(Frame::Context { user, real_user })
}

fn sasl(head: Head, frame: &mut Bytes) -> Result<Frame, Fatal> {
    let message: RpcSasl = delimited(frame, "a SASL message")?;
    if message.state() == rpc_sasl::State::Negotiate {
        return Ok(Frame::Negotiate(head));
    }
    let text = "only SIMPLE authentication is served here: neither Kerberos nor tokens are known".to_owned();
    Err(Fatal::new(head, ACCESS_CONTROL, ErrorDetail::FatalUnauthorized, text))
}

fn framed(header: &RpcResponseHeader, body: Option<&[u8]>) -> Vec<u8> {
    let header_bytes = header.encoded_len();
    let delimited = |bytes: usize| prost::length_delimiter_len(bytes) + bytes;
    let total = delimited(header_bytes) + body.map_or(0, |body| delimited(body.len()));
    let mut out = Vec::with_capacity(4 + total);
    out.extend((total as u32).to_be_bytes());
    // Neither fails on a growing buffer.
    let _ = header.encode_length_delimited(&mut out);
    if let Some(body) = body {
        let _ = prost::encode_length_delimiter(body.len(), &mut out);
        out.extend(body);
    }
    out
}

fn response_header(head: &Head, status: Status) -> RpcResponseHeader {
    RpcResponseHeader {
        call_id: head.call_id as u32,
        status: status as i32,
        server_ipc_version: Some(VERSION.into()),
        client_id: Some(head.client_id.clone()),
        retry_count: Some(head.retry_count),
        ..RpcResponseHeader::default()
    }
}

fn failed(head: &Head, status: Status, error: &RpcError) -> Vec<u8> {
    let header = RpcResponseHeader {
        exception_class: Some(error.class.clone().into_owned()),
        error_message: Some(error.message.clone()),
        error_detail: Some(error.detail as i32),
        ..response_header(head, status)
    };
    framed(&header, None)
}

/// A whole reply, with its length.
pub fn encode_reply(head: &Head, answer: &Answer) -> Vec<u8> {
    match answer {
        Ok(body) => framed(&response_header(head, Status::Success), Some(body)),
        Err(error) => failed(head, Status::Error, error),
    }
}

/// The reply after which the connection is closed.
pub fn encode_fatal(fatal: &Fatal) -> Vec<u8> {
    failed(&fatal.head, Status::Fatal, &fatal.error)
}

/// The answer to a SASL negotiation: no authentication is needed, go on without.
pub fn encode_go_on_simple(head: &Head) -> Vec<u8> {
    let answer = RpcSasl { state: rpc_sasl::State::Success as i32, ..RpcSasl::default() };
    framed(&response_header(head, Status::Success), Some(&answer.encode_to_vec()))
}

/// The answer to a client of another version, in a form that it understands.
pub fn encode_version_refusal(version: u8) -> Vec<u8> {
    let message = format!("Server IPC version {VERSION} cannot communicate with client version {version}");
    if version > VERSION {
        let fatal = Fatal::new(Head::of_none(), VERSION_MISMATCH, ErrorDetail::FatalVersionMismatch, message);
        return encode_fatal(&fatal);
    }
    // Before version 9: call id, status, and two strings, without a length in front.
    let mut out = Vec::new();
    out.extend(NO_CALL.to_be_bytes());
    out.extend((-1i32).to_be_bytes());
    for text in [VERSION_MISMATCH, &message] {
        out.extend((text.len() as u32).to_be_bytes());
        out.extend(text.as_bytes());
    }
    out
}

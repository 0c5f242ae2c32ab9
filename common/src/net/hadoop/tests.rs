//! The server against bytes as clients send them.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use cairn_proto::hadoop::rpc_response_header::{ErrorDetail, Status};
use cairn_proto::hadoop::{
    IpcConnectionContext, RequestHeader, RpcKind, RpcRequestHeader, RpcResponseHeader, RpcSasl, UserInformation,
    rpc_sasl,
};
use prost::Message as _;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Notify;

use super::{Answer, Call, Limits, Protocol, RpcError, serve};
use crate::clock::Clock;
use crate::net::{Conn, Net};

const NAME: &str = "test.Echo";

#[derive(Default)]
struct Echo {
    go_on: Notify,
}

impl Protocol for Echo {
    fn name(&self) -> &'static str {
        NAME
    }

    fn may_act_for(&self, real_user: &str, user: &str) -> bool {
        (real_user, user) == ("hive", "ann")
    }

    fn call<'a>(&'a self, call: &'a Call, request: Bytes) -> Pin<Box<dyn Future<Output = Answer> + Send + 'a>> {
        Box::pin(async move {
            match &*call.method {
                "echo" => Ok(request.to_vec()),
                "who" => Ok(format!("{} {}", call.user, call.call_id).into_bytes()),
                "wait" => {
                    self.go_on.notified().await;
                    Ok(b"waited".to_vec())
                }
                "go" => {
                    self.go_on.notify_one();
                    Ok(Vec::new())
                }
                "panic" => panic!("as asked"),
                other => Err(RpcError::no_such_method(other, NAME)),
            }
        })
    }
}

struct Client {
    conn: Conn,
}

fn framed(parts: &[Vec<u8>]) -> Vec<u8> {
    let body = parts.concat();
    [&(body.len() as u32).to_be_bytes()[..], &body].concat()
}

fn header(call_id: i32) -> Vec<u8> {
    let header = RpcRequestHeader {
        rpc_kind: Some(RpcKind::RpcProtocolBuffer as i32),
        rpc_op: Some(0),
        call_id,
        client_id: vec![7; 16].into(),
        retry_count: Some(0),
    };
    header.encode_length_delimited_to_vec()
}

fn context(user: &str) -> Vec<u8> {
    context_by(user, None)
}

fn context_by(user: &str, real_user: Option<&str>) -> Vec<u8> {
    let info = UserInformation { effective_user: Some(user.into()), real_user: real_user.map(Into::into) };
    let context = IpcConnectionContext { user_info: Some(info), protocol: Some(NAME.into()) };
    framed(&[header(-3), context.encode_length_delimited_to_vec()])
}

fn call(id: i32, method: &str, body: &[u8]) -> Vec<u8> {
    call_of(NAME, 1, id, method, body)
}

fn call_of(protocol: &str, version: u64, id: i32, method: &str, body: &[u8]) -> Vec<u8> {
    let request =
        RequestHeader { method_name: method.into(), protocol_name: protocol.into(), client_protocol_version: version };
    let mut length = Vec::new();
    prost::encode_length_delimiter(body.len(), &mut length).unwrap();
    framed(&[header(id), request.encode_length_delimited_to_vec(), length, body.to_vec()])
}

impl Client {
    async fn open(limits: Limits) -> Self {
        let mut client = Self::dial(limits).await;
        client.send(b"hrpc\x09\x00\x00").await;
        client.send(&context("ann")).await;
        client
    }

    async fn dial(limits: Limits) -> Self {
        let net = Net::tcp();
        let listener = net.bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().to_string();
        let conn = net.connect(&addr, Duration::from_secs(5)).await.unwrap();
        let served = listener.accept().await.unwrap();
        tokio::spawn(serve(served, Arc::new(Echo::default()), Clock::system(), limits, std::future::pending()));
        Self { conn }
    }

    async fn send(&mut self, bytes: &[u8]) {
        self.conn.write_all(bytes).await.unwrap();
    }

    async fn reply(&mut self) -> (RpcResponseHeader, Bytes) {
        let length = self.conn.read_u32().await.unwrap();
        let mut frame = vec![0; length as usize];
        self.conn.read_exact(&mut frame).await.unwrap();
        let mut frame = Bytes::from(frame);
        let header = RpcResponseHeader::decode_length_delimited(&mut frame).unwrap();
        if !frame.is_empty() {
            let length = prost::decode_length_delimiter(&mut frame).unwrap();
            assert_eq!(length, frame.len());
        }
        (header, frame)
    }

    async fn rest(&mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        self.conn.read_to_end(&mut rest).await.unwrap();
        rest
    }
}

#[tokio::test]
async fn calls_are_answered_as_they_end() {
    let mut client = Client::open(Limits::default()).await;
    client.send(&[call(5, "wait", b""), call(6, "who", b""), framed(&[header(-4)])].concat()).await;
    let (header, body) = client.reply().await;
    assert_eq!((header.call_id, header.status(), &body[..]), (6, Status::Success, &b"ann 6"[..]));
    assert_eq!(
        (header.server_ipc_version, header.client_id.unwrap().len(), header.retry_count),
        (Some(9), 16, Some(0))
    );
    client.send(&call(7, "go", b"")).await;
    let mut ids = [client.reply().await.0.call_id, client.reply().await.0.call_id];
    ids.sort_unstable();
    assert_eq!(ids, [5, 7]);
    let close = RpcRequestHeader { rpc_op: Some(2), call_id: 8, ..RpcRequestHeader::default() };
    client.send(&framed(&[close.encode_length_delimited_to_vec()])).await;
    assert!(client.rest().await.is_empty());
}

#[tokio::test]
async fn the_bytes_of_a_real_client_are_understood() {
    let mut client = Client::dial(Limits::default()).await;
    // Opening, context of user "ann" for protocol "test.Echo", a call of "echo" with the message 0a 01 78.
    client.send(b"hrpc\x09\x00\x00").await;
    // 0x1a bytes of header: kind 2, operation 0, call -3, 16 bytes of client id, retry -1.
    let head = [&[0x1a, 0x08, 0x02, 0x10, 0x00, 0x18, 0x05, 0x22, 0x10][..], &[0x11; 16], &[0x28, 0x01]].concat();
    let info = [&[0x12, 0x12, 0x05, 0x0a, 0x03][..], b"ann", &[0x1a, 0x09], NAME.as_bytes()].concat();
    client.send(&framed(&[head, info])).await;
    client.send(&call(0, "echo", b"\x0a\x01x")).await;
    assert_eq!(&client.reply().await.1[..], b"\x0a\x01x");
}

#[tokio::test]
async fn what_is_not_there_is_said_and_the_connection_goes_on() {
    let mut client = Client::open(Limits::default()).await;
    client.send(&call(1, "nothing", b"")).await;
    let (header, _) = client.reply().await;
    assert_eq!((header.status(), header.error_detail()), (Status::Error, ErrorDetail::ErrorNoSuchMethod));
    assert_eq!(header.exception_class(), "org.apache.hadoop.ipc.RpcNoSuchMethodException");
    assert_eq!(header.error_message(), "Unknown method nothing called on test.Echo protocol.");
    client.send(&call_of("other.Protocol", 1, 2, "echo", b"")).await;
    let (header, _) = client.reply().await;
    assert_eq!(header.exception_class(), "org.apache.hadoop.ipc.RpcNoSuchProtocolException");
    client.send(&call_of(NAME, 2, 3, "echo", b"")).await;
    assert_eq!(client.reply().await.0.error_detail(), ErrorDetail::ErrorRpcVersionMismatch);
    client.send(&call(4, "who", b"")).await;
    assert_eq!(client.reply().await.0.call_id, 4);
}

#[tokio::test]
async fn other_versions_are_answered_in_their_own_form() {
    let mut client = Client::dial(Limits::default()).await;
    client.send(b"hrpc\x04\x50").await;
    let answer = client.rest().await;
    assert_eq!(answer[..8], [0xff; 8]);
    let class = b"org.apache.hadoop.ipc.RPC$VersionMismatch";
    assert_eq!(answer[8..12], (class.len() as u32).to_be_bytes());
    assert_eq!(&answer[12..12 + class.len()], class);
    assert!(answer.ends_with(b"Server IPC version 9 cannot communicate with client version 4"));
    let mut client = Client::dial(Limits::default()).await;
    client.send(b"hrpc\x0a\x00\x00").await;
    let (header, _) = client.reply().await;
    assert_eq!((header.status(), header.error_detail()), (Status::Fatal, ErrorDetail::FatalVersionMismatch));
}

#[tokio::test]
async fn sasl_is_answered_with_go_on_without() {
    let mut client = Client::dial(Limits::default()).await;
    client.send(b"hrpc\x09\x00\xdf").await;
    let sasl = |state| RpcSasl { state: state as i32, ..RpcSasl::default() }.encode_length_delimited_to_vec();
    client.send(&framed(&[header(-33), sasl(rpc_sasl::State::Negotiate)])).await;
    let (reply, body) = client.reply().await;
    assert_eq!((reply.call_id as i32, reply.status()), (-33, Status::Success));
    assert_eq!(RpcSasl::decode(body).unwrap().state(), rpc_sasl::State::Success);
    client.send(&[context("bob"), call(1, "who", b"")].concat()).await;
    assert_eq!(&client.reply().await.1[..], b"bob 1");
    let mut client = Client::dial(Limits::default()).await;
    client.send(b"hrpc\x09\x00\xdf").await;
    client.send(&framed(&[header(-33), sasl(rpc_sasl::State::Initiate)])).await;
    let (header, _) = client.reply().await;
    assert_eq!((header.status(), header.error_detail()), (Status::Fatal, ErrorDetail::FatalUnauthorized));
    assert!(header.error_message().contains("Kerberos"), "{header:?}");
}

#[tokio::test]
async fn what_breaks_the_protocol_ends_the_connection_with_a_reason() {
    let limits = Limits { frame_bytes: 1_000, request_bytes: 1_000, ..Limits::default() };
    let long = framed(&[vec![0; 1_001]]);
    let cases: [(&str, Vec<u8>, &str); 6] = [
        ("too long", long, "longer than the limit of 1000"),
        ("garbage", framed(&[vec![0xff; 40]]), "could not be read"),
        ("context twice", context("ann"), "came twice"),
        ("unknown id", framed(&[header(-9)]), "call id -9"),
        ("half a message", framed(&[header(3), vec![3, 10, 200, 1]]), "could not be read"),
        ("a length of four GB", vec![0xff; 4], "longer than the limit"),
    ];
    for (name, bytes, why) in cases {
        let mut client = Client::open(limits).await;
        client.send(&bytes).await;
        let (header, _) = client.reply().await;
        assert_eq!(header.status(), Status::Fatal, "{name}");
        assert!(header.error_message().contains(why), "{name}: {}", header.error_message());
        assert!(client.rest().await.is_empty());
    }
    let mut client = Client::dial(limits).await;
    client.send(b"hrpc\x09\x00\x00").await;
    client.send(&call(1, "who", b"")).await;
    assert!(client.reply().await.0.error_message().contains("before the connection context"));
    let mut client = Client::dial(limits).await;
    client.send(b"hrpc\x09\x00\x00").await;
    client.send(&context("")).await;
    assert_eq!(client.reply().await.0.error_detail(), ErrorDetail::FatalUnauthorized);
    let mut client = Client::dial(limits).await;
    client.send(b"hrpc\x09\x00\x07").await;
    assert!(client.rest().await.is_empty(), "unknown authentication is closed without a word");
}

#[tokio::test]
async fn who_acts_for_another_must_be_known_for_it() {
    let mut client = Client::dial(Limits::default()).await;
    client.send(b"hrpc\x09\x00\x00").await;
    client.send(&[context_by("bob", Some("hive")), call(1, "who", b"")].concat()).await;
    let (header, _) = client.reply().await;
    assert_eq!((header.status(), header.error_detail()), (Status::Fatal, ErrorDetail::FatalUnauthorized));
    assert_eq!(header.exception_class(), "org.apache.hadoop.security.authorize.AuthorizationException");
    assert_eq!(header.error_message(), "User: hive is not allowed to impersonate bob");
    assert!(client.rest().await.is_empty(), "the call is not answered in anybody's name");
    for (user, real_user) in [("ann", "hive"), ("bob", "bob"), ("bob", "")] {
        let mut client = Client::dial(Limits::default()).await;
        client.send(b"hrpc\x09\x00\x00").await;
        client.send(&[context_by(user, Some(real_user)), call(1, "who", b"")].concat()).await;
        assert_eq!(client.reply().await.1, format!("{user} 1"));
    }
}

#[tokio::test]
async fn a_call_that_panics_does_not_leave_its_client_waiting() {
    let mut client = Client::open(Limits::default()).await;
    client.send(&call(1, "panic", b"")).await;
    assert!(client.rest().await.is_empty());
}

#[tokio::test]
async fn calls_beyond_the_limit_wait_for_those_before() {
    let limits = Limits { calls: 1, ..Limits::default() };
    let mut client = Client::open(limits).await;
    client.send(&[call(1, "who", b""), call(2, "who", b""), call(3, "who", b"")].concat()).await;
    for id in 1..=3 {
        assert_eq!(client.reply().await.0.call_id, id);
    }
}

#[tokio::test]
async fn silence_ends_a_connection_without_calls_and_a_half_frame() {
    let mut client = Client::open(Limits::default()).await;
    // Only now: a paused clock runs ahead of a socket that is being connected.
    tokio::time::pause();
    assert!(client.rest().await.is_empty());
    tokio::time::resume();
    let mut client = Client::open(Limits::default()).await;
    client.send(&call(1, "who", b"")[..9]).await;
    tokio::time::pause();
    assert!(client.rest().await.is_empty());
}

#[tokio::test]
async fn calls_that_come_together_are_all_answered_and_a_large_one_too() {
    let mut client = Client::open(Limits::default()).await;
    let large = vec![9; 300_000];
    let calls = [call(1, "who", b""), call(2, "wait", b""), call(3, "echo", &large), call(4, "who", b"")];
    client.send(&calls.concat()).await;
    for id in [1, 3, 4] {
        let (header, body) = client.reply().await;
        assert_eq!(header.call_id, id, "a call that waits holds up nobody");
        assert!(id != 3 || body == large);
    }
    client.send(&call(5, "go", b"")).await;
    let ids: std::collections::BTreeSet<u32> = [client.reply().await.0.call_id, client.reply().await.0.call_id].into();
    assert_eq!(ids, [2, 5].into());
}

#[tokio::test]
async fn requests_beyond_the_limit_wait_for_those_before() {
    let limits = Limits { frame_bytes: 1_000, request_bytes: 1_000, ..Limits::default() };
    let mut client = Client::open(limits).await;
    let calls: Vec<Vec<u8>> = (1..20).map(|id| call(id, "echo", &[7; 600])).collect();
    client.send(&calls.concat()).await;
    for id in 1..20 {
        assert_eq!(client.reply().await.0.call_id, id);
    }
}

#[tokio::test]
async fn a_client_that_takes_no_replies_is_cut() {
    let limits = Limits { reply_bytes: 1 << 20, ..Limits::default() };
    let mut client = Client::open(limits).await;
    client.send(&call(0, "who", b"")).await;
    client.reply().await;
    // Only now: a paused clock runs ahead of a socket that is being connected.
    tokio::time::pause();
    let echo = call(1, "echo", &vec![7; 1 << 20]);
    let from = tokio::time::Instant::now();
    while client.conn.write_all(&echo).await.is_ok() {}
    let (took, stall) = (from.elapsed(), Limits::default().stall);
    assert!(took >= stall && took < stall * 2, "{took:?}");
}

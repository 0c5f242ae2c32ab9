//! HTTP by hand: requests as they go over the wire, so that a test can also break them off, and WebHDFS's two steps.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use serde_json::Value;

/// No test waits longer for one answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// An answer.
#[derive(Debug)]
pub struct Reply {
    /// Status code.
    pub status: u16,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    /// All of it; chunks are put together.
    pub body: Vec<u8>,
    /// It came as far as its head had promised.
    pub whole: bool,
}

/// The body of a request.
#[derive(Clone, Copy)]
pub enum Body<'a> {
    /// None.
    None,
    /// With its length in the head.
    Whole(&'a [u8]),
    /// In chunks of so many bytes.
    Chunked(&'a [u8], usize),
}

/// A request of which the head has been sent.
pub struct Open {
    conn: TcpStream,
}

impl Reply {
    /// A header's value.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// Demands this status.
    #[track_caller]
    pub fn status(self, status: u16) -> Self {
        assert_eq!(self.status, status, "{}", String::from_utf8_lossy(&self.body));
        self
    }

    /// The JSON of an answer with 200.
    #[track_caller]
    pub fn json(self) -> Value {
        let reply = self.status(200);
        serde_json::from_slice(&reply.body).unwrap_or_else(|error| panic!("{error} in {reply:?}"))
    }

    /// Demands WebHDFS's form of an error; returns its message.
    #[track_caller]
    pub fn refused(self, status: u16, exception: &str) -> String {
        let reply = self.status(status);
        let body: Value = serde_json::from_slice(&reply.body).unwrap_or_else(|error| panic!("{error} in {reply:?}"));
        assert_eq!(body["RemoteException"]["exception"], exception, "{body}");
        body["RemoteException"]["message"].as_str().unwrap().to_owned()
    }
}

/// Sends the first line and `headers`; a `Host` is added unless there is one.
pub fn open(addr: &str, method: &str, target: &str, headers: &[(&str, &str)]) -> Open {
    let mut conn = TcpStream::connect(addr).unwrap_or_else(|error| panic!("{addr}: {error}"));
    conn.set_read_timeout(Some(PATIENCE)).unwrap();
    conn.set_write_timeout(Some(PATIENCE)).unwrap();
    let mut head = format!("{method} {target} HTTP/1.1\r\nConnection: close\r\n");
    if !headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("host")) {
        head.push_str(&format!("Host: {addr}\r\n"));
    }
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    // A server that refuses early may have closed already: its answer says more than our broken pipe.
    let _ = conn.write_all(head.as_bytes());
    Open { conn }
}

impl Open {
    /// Sends bytes as they are; a peer that has closed is not an error of the test.
    pub fn send(&mut self, bytes: &[u8]) {
        let _ = self.conn.write_all(bytes);
    }

    /// The first bytes of what comes back.
    pub fn read_some(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.conn.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// The answer.
    #[track_caller]
    pub fn reply(mut self) -> Reply {
        let mut bytes = Vec::new();
        // What came before a reset counts.
        let _ = self.conn.read_to_end(&mut bytes);
        let end = bytes.windows(4).position(|window| window == b"\r\n\r\n");
        let end = end.unwrap_or_else(|| panic!("no answer, but {:?}", String::from_utf8_lossy(&bytes)));
        let head = String::from_utf8(bytes[..end].to_vec()).unwrap();
        let mut lines = head.split("\r\n");
        let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
        let pairs = lines.map(|line| line.split_once(':').unwrap());
        let headers: Vec<_> = pairs.map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned())).collect();
        let find = |wanted: &str| headers.iter().find(|(name, _)| name == wanted).map(|(_, value)| value.as_str());
        let rest = &bytes[end + 4..];
        let (body, whole) = match (find("transfer-encoding"), find("content-length")) {
            (Some("chunked"), _) => unchunked(rest),
            (_, Some(length)) => (rest.to_vec(), rest.len() == length.parse::<usize>().unwrap()),
            _ => (rest.to_vec(), true),
        };
        Reply { status, headers, body, whole }
    }
}

fn unchunked(mut rest: &[u8]) -> (Vec<u8>, bool) {
    let mut body = Vec::new();
    while let Some(line) = rest.windows(2).position(|window| window == b"\r\n") {
        let Ok(length) = usize::from_str_radix(std::str::from_utf8(&rest[..line]).unwrap(), 16) else { break };
        rest = &rest[line + 2..];
        if length == 0 {
            return (body, true);
        }
        if rest.len() < length + 2 {
            break;
        }
        body.extend_from_slice(&rest[..length]);
        rest = &rest[length + 2..];
    }
    (body, false)
}

/// One request and its answer.
#[track_caller]
pub fn send(addr: &str, method: &str, target: &str, headers: &[(&str, &str)], body: Body<'_>) -> Reply {
    let length;
    let mut headers = headers.to_vec();
    match body {
        Body::None if method == "GET" => {}
        Body::None => headers.push(("Content-Length", "0")),
        Body::Whole(bytes) => {
            length = bytes.len().to_string();
            headers.push(("Content-Length", &length));
        }
        Body::Chunked(..) => headers.push(("Transfer-Encoding", "chunked")),
    }
    let mut open = open(addr, method, target, &headers);
    match body {
        Body::None => {}
        Body::Whole(bytes) => open.send(bytes),
        Body::Chunked(bytes, piece) => {
            for chunk in bytes.chunks(piece) {
                open.send(format!("{:x}\r\n", chunk.len()).as_bytes());
                open.send(chunk);
                open.send(b"\r\n");
            }
            open.send(b"0\r\n\r\n");
        }
    }
    open.reply()
}

/// `http://HOST:PORT/REST` in two.
pub fn split(location: &str) -> (&str, &str) {
    let rest = location.strip_prefix("http://").unwrap_or_else(|| panic!("{location:?} is no address"));
    rest.split_at(rest.find('/').unwrap())
}

/// A WebHDFS client of one user.
pub struct WebHdfs {
    /// The namenode's HTTP address.
    pub addr: String,
    /// Who asks.
    pub user: String,
}

impl WebHdfs {
    /// The request's target; `path` is escaped already.
    pub fn target(&self, path: &str, query: &str) -> String {
        format!("/webhdfs/v1{path}?user.name={}&{query}", self.user)
    }

    /// An operation that the namenode answers itself, or with a redirect.
    #[track_caller]
    pub fn ask(&self, method: &str, path: &str, query: &str) -> Reply {
        send(&self.addr, method, &self.target(path, query), &[], Body::None)
    }

    /// Where the namenode sends an operation on bytes.
    #[track_caller]
    pub fn place(&self, method: &str, path: &str, query: &str) -> String {
        let reply = self.ask(method, path, query).status(307);
        reply.header("location").expect("a redirect says where to").to_owned()
    }

    /// Both steps of an operation on bytes.
    #[track_caller]
    pub fn follow(&self, method: &str, path: &str, query: &str, body: Body<'_>) -> Reply {
        let location = self.place(method, path, query);
        let (addr, target) = split(&location);
        send(addr, method, target, &[], body)
    }

    /// Stores a file.
    #[track_caller]
    pub fn create(&self, path: &str, query: &str, body: Body<'_>) {
        self.follow("PUT", path, &format!("op=CREATE&{query}"), body).status(201);
    }

    /// Reads a file, or a part of it.
    #[track_caller]
    pub fn read(&self, path: &str, query: &str) -> Vec<u8> {
        let reply = self.follow("GET", path, &format!("op=OPEN&{query}"), Body::None).status(200);
        assert!(reply.whole, "the answer broke off after {} bytes", reply.body.len());
        reply.body
    }
}

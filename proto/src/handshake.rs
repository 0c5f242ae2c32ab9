//! The first bytes of each of our own connections.
//!
//! The caller sends the preamble and a [`Hello`](crate::pb::Hello), the server answers with the same preamble and a
//! [`HelloReply`](crate::pb::HelloReply); the caller need not wait before it goes on. Preamble, 12 bytes:
//!
//! | at | size | field |
//! |---|---|---|
//! | 0 | 5 | `CAIRN` |
//! | 5 | 1 | what follows: 1 gRPC, 2 data plane ([`Purpose`]) |
//! | 6 | 2 | protocol version, big endian |
//! | 8 | 4 | bytes of the message, big endian, at most 16 KiB |

use prost::Message;

use crate::error::{Error, ErrorCode, Result};

/// First bytes of our own connections.
pub const MAGIC: &[u8; 5] = b"CAIRN";
/// Bytes of the preamble.
pub const PREAMBLE_BYTES: usize = 12;
/// Longest Hello or HelloReply.
pub const MAX_HELLO_BYTES: usize = 16 << 10;

/// What follows the handshake.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Purpose {
    /// HTTP/2 with our gRPC services.
    Rpc,
    /// Operations of the data plane.
    Data,
}

/// A parsed preamble.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Preamble {
    /// What follows.
    pub purpose: Purpose,
    /// The peer's protocol version.
    pub version: u16,
    /// Bytes of the message after the preamble.
    pub message_bytes: usize,
}

/// Preamble and message as they are sent.
pub fn encode(purpose: Purpose, version: u16, message: &impl Message) -> Vec<u8> {
    let body = message.encode_to_vec();
    let mut out = Vec::with_capacity(PREAMBLE_BYTES + body.len());
    out.extend_from_slice(MAGIC);
    out.push(match purpose {
        Purpose::Rpc => 1,
        Purpose::Data => 2,
    });
    out.extend_from_slice(&version.to_be_bytes());
    out.extend_from_slice(&(body.len() as u32).to_be_bytes());
    out.extend_from_slice(&body);
    out
}

/// Reads a preamble. `who` names the peer in the error.
pub fn decode_preamble(bytes: &[u8; PREAMBLE_BYTES], who: &str) -> Result<Preamble> {
    if &bytes[..5] != MAGIC {
        let seen: String = bytes.iter().take(8).map(|b| b.escape_ascii().to_string()).collect();
        return Err(Error::new(
            ErrorCode::UnsupportedVersion,
            format!("{who} does not speak Cairn's protocol (it sent \"{seen}\"): check the host and the port"),
        ));
    }
    let purpose = match bytes[5] {
        1 => Purpose::Rpc,
        2 => Purpose::Data,
        other => {
            return Err(Error::new(
                ErrorCode::UnsupportedVersion,
                format!("{who} asked for connection purpose {other}, which this version does not know"),
            ));
        }
    };
    let version = u16::from_be_bytes([bytes[6], bytes[7]]);
    let message_bytes = u32::from_be_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]) as usize;
    if message_bytes > MAX_HELLO_BYTES {
        let text = format!("{who} sent a handshake of {message_bytes} bytes, more than {MAX_HELLO_BYTES}");
        return Err(Error::new(ErrorCode::InvalidArgument, text));
    }
    Ok(Preamble { purpose, version, message_bytes })
}

/// Refuses a peer of another protocol version, naming both.
pub fn check_version(version: u16, who: &str) -> Result<()> {
    if version == crate::PROTOCOL_VERSION {
        return Ok(());
    }
    Err(Error::new(
        ErrorCode::UnsupportedVersion,
        format!(
            "{who} speaks version {version} of Cairn's protocol, this program speaks {}: run the same release on both",
            crate::PROTOCOL_VERSION
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pb;

    #[test]
    fn bytes_are_frozen() {
        let hello = pb::Hello { user: "ann".into(), role: "client".into(), ..Default::default() };
        let bytes = encode(Purpose::Data, 1, &hello);
        assert_eq!(bytes, b"CAIRN\x02\x00\x01\x00\x00\x00\x0d\x0a\x03ann\x1a\x06client");
        let preamble = decode_preamble(bytes[..12].try_into().unwrap(), "peer").unwrap();
        assert_eq!(preamble, Preamble { purpose: Purpose::Data, version: 1, message_bytes: 13 });
    }

    #[test]
    fn another_protocol_is_named() {
        let error = decode_preamble(b"HTTP/1.1 400", "127.0.0.1:80").unwrap_err();
        assert!(error.message().contains("127.0.0.1:80 does not speak"), "{error}");
        assert!(error.message().contains("HTTP/1.1"), "{error}");
    }

    #[test]
    fn another_version_is_refused_with_both_numbers() {
        let text = check_version(9, "x").unwrap_err().to_string();
        assert!(text.contains("version 9") && text.contains("speaks 1"), "{text}");
    }
}

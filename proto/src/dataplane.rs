//! Messages and markers of the data plane.
//!
//! After the handshake ([`crate::handshake`], purpose data) a connection carries operations one after the other: a
//! [`DataRequest`](crate::pb::DataRequest), its reply, and what the operation adds. Each message has a head before it, all of it big endian:
//!
//! | at | size | field |
//! |---|---|---|
//! | 0 | 4 | length of the message, at most [`MAX_MESSAGE_BYTES`] |
//! | 4 | 4 | CRC-32C of the message |
//! | 8 | 4 | CRC-32C of bytes 0 to 7 |
//!
//! A message may name a block, a generation or a length, so one that was altered on its way is not believed: `CORRUPT`, and the connection ends. The
//! head has a checksum of its own so that nobody waits for bytes that an altered length promises.
//!
//! **Write**: request; `WriteReady` when the whole pipeline is open; then units from the writer, each with a header of 32 bytes: a frame
//! (and its payload) or a marker; upwards `WriteAck` messages, cumulative. An ack of length L says that this node and all below hold the first L
//! bytes, verified. The connection ends after the ack of `Finish`, or after an error.
//!
//! **Read**: request; `ReadReady`; then `frame_bytes` bytes of frames as they lie on disk.
//!
//! A marker has the shape of a frame header, so one read of 32 bytes serves both:
//!
//! | at | size | field |
//! |---|---|---|
//! | 0 | 1 | kind: `0xE0` finish, `0xE1` flush, `0xE2` sync, `0xE3` heartbeat |
//! | 1 | 15 | 0 |
//! | 16 | 8 | length of the block's data before this marker |
//! | 24 | 4 | 0 |
//! | 28 | 4 | CRC-32 of the block id and bytes 0 to 27 |

use std::time::Duration;

use prost::Message;

use crate::error::{Error, ErrorCode, Result};
use crate::frame::{FRAME_HEADER_BYTES, FRAME_KIND, FrameError, FrameHeader, header_crc, le64};
use crate::ids::BlockId;

/// Longest delimited message of the data plane.
pub const MAX_MESSAGE_BYTES: usize = 1 << 20;

/// Bytes of the head before each message.
pub const MESSAGE_HEAD_BYTES: usize = 12;

/// What a writer says between frames.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MarkerKind {
    /// No more data: finalize, durably.
    Finish,
    /// Make what was sent visible to new readers.
    Flush,
    /// Make what was sent durable.
    Sync,
    /// The writer is alive; acked with the length as it is.
    Heartbeat,
}

/// A marker with the length that its sender has sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Marker {
    /// What it asks.
    pub kind: MarkerKind,
    /// Bytes of the block's data sent before it.
    pub length: u64,
}

/// One header of the write stream.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unit {
    /// A frame; its payload follows.
    Frame(FrameHeader),
    /// A marker.
    Marker(Marker),
}

impl Marker {
    /// As it is sent.
    pub fn encode(&self, block: BlockId) -> [u8; FRAME_HEADER_BYTES] {
        let mut out = [0; FRAME_HEADER_BYTES];
        out[0] = match self.kind {
            MarkerKind::Finish => 0xE0,
            MarkerKind::Flush => 0xE1,
            MarkerKind::Sync => 0xE2,
            MarkerKind::Heartbeat => 0xE3,
        };
        out[16..24].copy_from_slice(&self.length.to_le_bytes());
        let crc = header_crc(block, &out[..28]);
        out[28..32].copy_from_slice(&crc.to_le_bytes());
        out
    }
}

impl Unit {
    /// Reads and verifies one header of the write stream.
    pub fn decode(block: BlockId, bytes: &[u8; FRAME_HEADER_BYTES]) -> Result<Self, FrameError> {
        let kind = match bytes[0] {
            FRAME_KIND => return FrameHeader::decode(block, bytes).map(Self::Frame),
            0xE0 => MarkerKind::Finish,
            0xE1 => MarkerKind::Flush,
            0xE2 => MarkerKind::Sync,
            0xE3 => MarkerKind::Heartbeat,
            other => return Err(FrameError::NotAFrame(other)),
        };
        let crc = u32::from_le_bytes([bytes[28], bytes[29], bytes[30], bytes[31]]);
        if header_crc(block, &bytes[..28]) != crc {
            return Err(FrameError::HeaderChecksum);
        }
        // Whoever gives these bytes a meaning must be understood, not ignored.
        if bytes[1..16].iter().chain(&bytes[24..28]).any(|&byte| byte != 0) {
            return Err(FrameError::OutOfRange("reserved bytes of a marker"));
        }
        Ok(Self::Marker(Marker { kind, length: le64(bytes, 16) }))
    }
}

/// How long the opener of a pipeline through `hops` nodes waits for its answer: each hop may dial for `connect`, one of them may wait for an
/// older writer to stop, and who is nearer to the client waits longer, so that the node that failed is named and not the one before it.
pub fn set_up_patience(connect: Duration, hops: usize) -> Duration {
    let per_hop = connect + Duration::from_secs(5);
    per_hop * u32::try_from(hops).unwrap_or(u32::MAX).min(crate::MAX_REPLICATION) + Duration::from_secs(12)
}

/// A message with its head before it.
pub fn encode_delimited(message: &impl Message) -> Vec<u8> {
    let length = message.encoded_len();
    let mut out = Vec::with_capacity(MESSAGE_HEAD_BYTES + length);
    out.resize(MESSAGE_HEAD_BYTES, 0);
    message.encode_raw(&mut out);
    let crc = crc32c::crc32c(&out[MESSAGE_HEAD_BYTES..]);
    out[..4].copy_from_slice(&(length as u32).to_be_bytes());
    out[4..8].copy_from_slice(&crc.to_be_bytes());
    let head_crc = crc32c::crc32c(&out[..8]);
    out[8..12].copy_from_slice(&head_crc.to_be_bytes());
    out
}

/// The head of a message, verified.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MessageHead {
    /// Bytes of the message.
    pub length: usize,
    crc: u32,
}

impl MessageHead {
    /// Reads the head of a message of `who`, before anything is allocated for it.
    pub fn decode(bytes: &[u8; MESSAGE_HEAD_BYTES], who: &str) -> Result<Self> {
        let [length, crc, head_crc] =
            [0, 4, 8].map(|at| u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]));
        if crc32c::crc32c(&bytes[..8]) != head_crc {
            return Err(altered(who));
        }
        let length = length as usize;
        if length > MAX_MESSAGE_BYTES {
            let text = format!("{who} sent a message of {length} bytes, more than {MAX_MESSAGE_BYTES}");
            return Err(Error::new(ErrorCode::InvalidArgument, text));
        }
        Ok(Self { length, crc })
    }

    /// Verifies and decodes the message that follows.
    pub fn open<M: Message + Default>(self, bytes: &[u8], who: &str) -> Result<M> {
        if bytes.len() != self.length || crc32c::crc32c(bytes) != self.crc {
            return Err(altered(who));
        }
        decode_message(bytes, who)
    }
}

fn altered(who: &str) -> Error {
    let text =
        format!("a message of {who} was altered on its way: its checksum does not fit; the connection is closed");
    Error::new(ErrorCode::Corrupt, text).with_subject(who)
}

/// Decodes a message that `who` sent.
pub fn decode_message<M: Message + Default>(bytes: &[u8], who: &str) -> Result<M> {
    M::decode(bytes).map_err(|error| {
        Error::new(ErrorCode::InvalidArgument, format!("{who} sent a message that cannot be read: {error}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pb;

    #[test]
    fn markers_come_back_and_belong_to_their_block() {
        for kind in [MarkerKind::Finish, MarkerKind::Flush, MarkerKind::Sync, MarkerKind::Heartbeat] {
            let marker = Marker { kind, length: 1 << 40 };
            let bytes = marker.encode(BlockId(5));
            assert_eq!(Unit::decode(BlockId(5), &bytes), Ok(Unit::Marker(marker)));
            assert_eq!(Unit::decode(BlockId(6), &bytes), Err(FrameError::HeaderChecksum));
        }
    }

    #[test]
    fn an_over_long_message_is_refused_before_it_is_read() {
        let long = pb::ReadBlock { token: vec![7; MAX_MESSAGE_BYTES].into(), ..Default::default() };
        let sent = encode_delimited(&long);
        let error = MessageHead::decode(sent.first_chunk().unwrap(), "peer").unwrap_err();
        assert!(error.code() == ErrorCode::InvalidArgument && error.message().contains("more than"), "{error}");
    }

    #[test]
    fn any_flipped_bit_of_a_message_is_noticed() {
        let block = Some(pb::Block { pool: "pool".into(), id: 5, generation: 1_001 });
        let message = pb::TruncateReplica { block, new_generation: 1_002, length: 77, token: Default::default() };
        let sent = encode_delimited(&message);
        let read = |bytes: &[u8]| -> Result<pb::TruncateReplica> {
            let (head, body) = bytes.split_first_chunk().unwrap();
            let head = MessageHead::decode(head, "peer")?;
            head.open(body, "peer")
        };
        assert_eq!(read(&sent).unwrap(), message);
        for bit in 0..sent.len() * 8 {
            let mut altered = sent.clone();
            altered[bit / 8] ^= 1 << (bit % 8);
            let error = read(&altered).unwrap_err();
            assert!(error.code() == ErrorCode::Corrupt && error.message().contains("peer"), "bit {bit}: {error}");
        }
    }
}

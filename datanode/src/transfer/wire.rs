//! Reads the write stream: whole, verified frames in chunks, and markers.
//!
//! A frame of usual size is read into a buffer of its own together with the header of the next one, so its payload is never copied. Small frames
//! are read many at a time. Buffers are used again once nobody holds their chunk.

use std::collections::VecDeque;

use bytes::{BufMut, Bytes, BytesMut};
use cairn_proto::dataplane::{Marker, Unit};
use cairn_proto::frame::{FRAME_HEADER_BYTES, FrameHeader};
use cairn_proto::ids::BlockId;
use cairn_proto::{Error, ErrorCode, Result};
use tokio::io::{AsyncRead, AsyncReadExt};

use super::budget::NodeBudget;
use crate::store::writer::Chunk;

/// Frames smaller than this are read many at a time.
const SMALL_FRAME: usize = 16 << 10;
/// How much is read at a time then.
const SMALL_READ: usize = 128 << 10;
/// Buffers kept for another use.
const KEPT_BUFFERS: usize = 24;

/// One item of the write stream.
#[derive(Debug)]
pub enum Item {
    /// Frames, verified, in order.
    Frames(Chunk),
    /// A marker.
    Marker(Marker),
    /// The writer closed the connection between two units.
    End,
}

/// Buffers that come back when their chunk is dropped everywhere.
#[derive(Default)]
struct Buffers {
    /// Each with what it counts for.
    lent: VecDeque<(Bytes, usize)>,
    /// What all readers of the node may keep.
    node: Option<NodeBudget>,
}

impl Buffers {
    fn take(&mut self, capacity: usize) -> BytesMut {
        for _ in 0..self.lent.len().min(4) {
            let Some((oldest, counts)) = self.lent.pop_front() else { break };
            match oldest.try_into_mut() {
                Ok(mut buffer) => {
                    self.let_go(counts);
                    buffer.clear();
                    if buffer.capacity() >= capacity {
                        return buffer;
                    }
                }
                Err(in_use) => self.lent.push_back((in_use, counts)),
            }
        }
        BytesMut::with_capacity(capacity)
    }

    fn lend(&mut self, buffer: BytesMut) -> Bytes {
        let counts = buffer.capacity();
        let bytes = buffer.freeze();
        if self.lent.len() < KEPT_BUFFERS && self.node.as_ref().is_none_or(|node| node.keep(counts)) {
            self.lent.push_back((bytes.clone(), counts));
        }
        bytes
    }

    fn let_go(&self, counts: usize) {
        if let Some(node) = &self.node {
            node.let_go(counts);
        }
    }
}

impl Drop for Buffers {
    fn drop(&mut self) {
        self.let_go(self.lent.iter().map(|(_, counts)| counts).sum());
    }
}

/// See the module.
pub struct UnitReader<R> {
    conn: R,
    block: BlockId,
    /// Starts with a unit's header.
    pending: BytesMut,
    buffers: Buffers,
    /// Where the next frame must start.
    expected: u64,
}

/// Units at the start of the buffer.
struct Parsed {
    headers: Vec<FrameHeader>,
    bytes: usize,
    /// What the unit after them needs, if its header is there.
    need: usize,
    marker: Option<Marker>,
}

impl<R: AsyncRead + Unpin> UnitReader<R> {
    /// Reads units of `block`, the first frame of which starts at `expected`.
    pub fn new(conn: R, block: BlockId, expected: u64) -> Self {
        Self { conn, block, pending: BytesMut::new(), buffers: Buffers::default(), expected }
    }

    /// Keeps buffers for another use only as far as all readers of the node together may.
    pub fn sharing(mut self, node: &NodeBudget) -> Self {
        self.buffers.node = Some(node.clone());
        self
    }

    /// The connection, to be drained after an error.
    pub fn conn(&mut self) -> &mut R {
        &mut self.conn
    }

    /// The next item. An error of the stream's content has code `Corrupt` or `InvalidArgument`, one of the connection `Unreachable`.
    pub async fn next(&mut self) -> Result<Item> {
        loop {
            let parsed = self.parse()?;
            if parsed.bytes > 0 {
                return Ok(Item::Frames(self.split(parsed)));
            }
            if let Some(marker) = parsed.marker {
                let rest = self.pending.split_off(FRAME_HEADER_BYTES);
                self.pending = rest;
                return Ok(Item::Marker(marker));
            }
            if self.fill(parsed.need).await? == 0 {
                if self.pending.is_empty() {
                    return Ok(Item::End);
                }
                let text = format!("the writer of block {} left in the middle of a frame", self.block);
                return Err(Error::new(ErrorCode::Unreachable, text));
            }
        }
    }

    fn parse(&mut self) -> Result<Parsed> {
        let mut parsed = Parsed { headers: Vec::new(), bytes: 0, need: FRAME_HEADER_BYTES, marker: None };
        while let Some(bytes) = self.pending[parsed.bytes..].first_chunk::<FRAME_HEADER_BYTES>() {
            let header = match Unit::decode(self.block, bytes).map_err(|flaw| self.corrupt(&flaw))? {
                Unit::Marker(marker) => {
                    parsed.marker = Some(marker);
                    break;
                }
                Unit::Frame(header) => header,
            };
            if header.offset != self.expected {
                let text = format!(
                    "the frame of block {} at {} does not follow on the one before, which ended at {}",
                    self.block, header.offset, self.expected
                );
                return Err(Error::new(ErrorCode::InvalidArgument, text));
            }
            let end = parsed.bytes + header.frame_bytes();
            let Some(payload) = self.pending.get(parsed.bytes + FRAME_HEADER_BYTES..end) else {
                parsed.need = header.frame_bytes();
                break;
            };
            header.verify_stored(payload).map_err(|flaw| self.corrupt(&flaw))?;
            self.expected = header.end();
            parsed.headers.push(header);
            parsed.bytes = end;
        }
        Ok(parsed)
    }

    fn corrupt(&self, flaw: &dyn std::fmt::Display) -> Error {
        let text = format!("block {} arrived damaged: {flaw}", self.block);
        Error::new(ErrorCode::Corrupt, text).with_subject(self.block.to_string())
    }

    fn split(&mut self, parsed: Parsed) -> Chunk {
        let rest = self.pending.len() - parsed.bytes;
        let mut next = BytesMut::new();
        if rest > 0 {
            next = self.buffers.take(capacity_for(parsed.need));
            next.extend_from_slice(&self.pending[parsed.bytes..]);
            self.pending.truncate(parsed.bytes);
        }
        let full = std::mem::replace(&mut self.pending, next);
        Chunk { parts: vec![self.buffers.lend(full)], headers: parsed.headers }
    }

    async fn fill(&mut self, need: usize) -> Result<usize> {
        let want = capacity_for(need);
        if self.pending.capacity() < want {
            let mut larger = self.buffers.take(want);
            larger.extend_from_slice(&self.pending);
            self.pending = larger;
        }
        let room = want.max(self.pending.len() + 1) - self.pending.len();
        let read = self.conn.read_buf(&mut (&mut self.pending).limit(room)).await;
        read.map_err(|error| Error::io(format!("reading block {}", self.block), &error)).map_err(|error| {
            // Whatever the machine calls it: the peer is gone.
            Error::new(ErrorCode::Unreachable, error.message().to_owned())
        })
    }
}

/// Room for a unit of `need` bytes and the header after it, or for many small units.
fn capacity_for(need: usize) -> usize {
    if need >= SMALL_FRAME { need + FRAME_HEADER_BYTES } else { SMALL_READ }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_proto::dataplane::MarkerKind;
    use cairn_proto::frame::Sealer;
    use proptest::prelude::*;

    const BLOCK: BlockId = BlockId(9);

    fn stream(sizes: &[usize]) -> (Vec<u8>, u64) {
        let (mut out, mut at, mut sealer) = (Vec::new(), 0, Sealer::new(false));
        for (k, size) in sizes.iter().enumerate() {
            let frame = sealer.seal(BLOCK, at, Bytes::from(vec![k as u8; *size]), false);
            at += *size as u64;
            out.extend_from_slice(&frame.header_bytes);
            out.extend_from_slice(&frame.payload);
            out.extend_from_slice(&Marker { kind: MarkerKind::Flush, length: at }.encode(BLOCK));
        }
        (out, at)
    }

    async fn read_all(bytes: &[u8]) -> Result<(Vec<u8>, usize)> {
        let mut reader = UnitReader::new(bytes, BLOCK, 0);
        let (mut got, mut markers) = (Vec::new(), 0);
        loop {
            match reader.next().await? {
                Item::Frames(chunk) => got.extend_from_slice(&chunk.parts.concat()),
                Item::Marker(marker) => {
                    got.extend_from_slice(&marker.encode(BLOCK));
                    markers += 1;
                }
                Item::End => return Ok((got, markers)),
            }
        }
    }

    proptest! {
        #[test]
        fn any_mix_of_sizes_comes_through(sizes in proptest::collection::vec(1usize..300_000, 1..12)) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let (bytes, _) = stream(&sizes);
            let (got, markers) = runtime.block_on(read_all(&bytes)).unwrap();
            prop_assert!(got == bytes);
            prop_assert_eq!(markers, sizes.len());
        }

        #[test]
        fn any_flipped_bit_is_refused(at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let (mut bytes, _) = stream(&[5_000, 70, 20_000]);
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            prop_assert!(runtime.block_on(read_all(&bytes)).is_err());
        }

        #[test]
        fn a_cut_is_an_end_or_an_error(at in any::<prop::sample::Index>()) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let (bytes, _) = stream(&[5_000, 70, 20_000]);
            let at = at.index(bytes.len());
            if let Ok((got, _)) = runtime.block_on(read_all(&bytes[..at])) {
                prop_assert!(got == bytes[..at]);
            }
        }
    }

    #[tokio::test]
    async fn a_gap_is_refused() {
        let frame = Sealer::new(false).seal(BLOCK, 100, Bytes::from_static(b"x"), false);
        let bytes = [&frame.header_bytes[..], &frame.payload].concat();
        assert_eq!(read_all(&bytes).await.unwrap_err().code(), ErrorCode::InvalidArgument);
    }
}

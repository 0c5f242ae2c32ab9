//! The frames of one answer to a read, as they come off the connection.

use bytes::{BufMut, Bytes};
use cairn_common::net::Conn;
use cairn_proto::frame::{FRAME_HEADER_BYTES, FrameHeader};
use cairn_proto::ids::BlockId;
use cairn_proto::{Error, ErrorCode, Result, pb};
use pb::data_request::Op;
use tokio::io::AsyncReadExt;

use std::time::Duration;

use super::super::datanode::{Datanodes, block_name, node_name};
use super::super::{Block, Replica};
use super::buffers::Buffers;

/// Reads frame after frame. Each payload lands in a buffer of its own together with the header after it, so nothing is copied and a frame
/// costs no read of its own for its header.
pub(super) struct FrameStream {
    conn: Conn,
    node: String,
    block: BlockId,
    block_name: String,
    /// Bytes of the answer that are not read yet.
    left: u64,
    /// Header whose payload comes next.
    header: Option<FrameHeader>,
    buffer: Vec<u8>,
    buffers: Buffers,
}

impl FrameStream {
    /// Asks `replica` for `offset .. offset + length` of `block`.
    pub(super) async fn open(
        datanodes: &Datanodes,
        replica: &Replica,
        block: &Block,
        range: std::ops::Range<u64>,
        token: Bytes,
        timeout: Duration,
    ) -> Result<Self> {
        let (offset, length) = (range.start, range.end - range.start);
        let op = Op::Read(pb::ReadBlock { block: Some(block.clone()), offset, length, token });
        let (conn, ready) = datanodes.ask::<pb::ReadReady>(&replica.address, op, timeout).await?;
        if let Some(error) = ready.error {
            // The datanode waits for the next operation.
            datanodes.keep(&replica.address, conn);
            return Err(Error::from_wire(error));
        }
        Ok(Self {
            conn,
            node: node_name(replica),
            block: BlockId(block.id),
            block_name: block_name(block),
            left: ready.frame_bytes,
            header: None,
            buffer: Vec::new(),
            buffers: datanodes.buffers().clone(),
        })
    }

    /// The next frame; `None` after the last. Nothing is lost if the future is dropped.
    pub(super) async fn next(&mut self) -> Result<Option<(FrameHeader, Bytes)>> {
        let header = match self.header {
            Some(header) => header,
            None if self.left == 0 && self.buffer.is_empty() => return Ok(None),
            None => {
                self.fill(FRAME_HEADER_BYTES).await?;
                let header = self.decode(&self.buffer)?;
                self.buffer.clear();
                *self.header.insert(header)
            }
        };
        let payload = header.stored_len as usize;
        let unread = self.left + self.buffer.len() as u64;
        if unread < payload as u64 {
            return Err(self.damaged("the last frame is cut"));
        }
        let target = payload + FRAME_HEADER_BYTES.min(usize::try_from(unread).unwrap_or(usize::MAX) - payload);
        self.fill(target).await?;
        let after = &self.buffer[payload..];
        self.header = if after.is_empty() { None } else { Some(self.decode(after)?) };
        let filled = std::mem::take(&mut self.buffer);
        Ok(Some((header, self.buffers.lend(filled).slice(..payload))))
    }

    fn decode(&self, bytes: &[u8]) -> Result<FrameHeader> {
        FrameHeader::decode(self.block, bytes).map_err(|error| self.damaged(error))
    }

    /// The bytes are not those of the block.
    pub(super) fn damaged(&self, why: impl std::fmt::Display) -> Error {
        damaged(&self.node, &self.block_name, why)
    }

    async fn fill(&mut self, target: usize) -> Result<()> {
        if self.buffer.capacity() < target {
            // Nothing is in it yet: a buffer in use has room for its whole target.
            self.buffer = self.buffers.get(target);
        }
        while self.buffer.len() < target {
            let want = target - self.buffer.len();
            let got = self.conn.read_buf(&mut (&mut self.buffer).limit(want)).await;
            let got = got.map_err(|error| Error::io(format!("reading from {}", self.node), &error))?;
            if got == 0 {
                let text = format!("{} left in the middle of {}", self.node, self.block_name);
                return Err(Error::new(ErrorCode::Unreachable, text));
            }
            self.left = self.left.saturating_sub(got as u64);
        }
        Ok(())
    }

    /// Who sends.
    pub(super) fn names(&self) -> (String, String) {
        (self.node.clone(), self.block_name.clone())
    }

    /// The connection, if the answer was read to its end.
    pub(super) fn into_idle(self) -> Option<Conn> {
        (self.left == 0 && self.header.is_none() && self.buffer.is_empty()).then_some(self.conn)
    }
}

/// The error for bytes that do not verify.
pub(super) fn damaged(node: &str, block: &str, why: impl std::fmt::Display) -> Error {
    Error::new(ErrorCode::Corrupt, format!("{block} on {node}: {why}")).with_subject(block)
}

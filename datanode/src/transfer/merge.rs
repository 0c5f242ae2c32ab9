//! Short blocks are rewritten as one, ordered by the namenode.
//!
//! The frames of the sources are read as any reader gets them, from this node or from others, checked as they are stored, given headers of the new
//! block, and sent down a pipeline of copies. Payloads stay as they are: nothing is decompressed, and each frame keeps the checksum that its
//! writer took. The namenode learns of the new block from the reports of its replicas; a merge that fails leaves nothing that counts. A source
//! that gives nothing, or a target that takes nothing, ends it in time.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use cairn_common::net::{self, Conn, opening};
use cairn_proto::dataplane::{Marker, MarkerKind};
use cairn_proto::frame::{FRAME_HEADER_BYTES, FrameHeader};
use cairn_proto::ids::BlockId;
use cairn_proto::{Error, ErrorCode, Result, pb};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{Transfer, copy};

/// Reads the sources and writes the new block to the targets. Returns its length.
pub async fn merge(transfer: &Arc<Transfer>, order: &pb::MergeBlocks) -> Result<u64> {
    let (block, generation) = transfer.check_block(order.block.as_ref())?;
    let Some((first, rest)) = order.targets.split_first() else {
        return Err(Error::new(ErrorCode::InvalidArgument, format!("merge into block {block}: no targets")));
    };
    if order.sources.iter().map(|source| source.length).sum::<u64>() != order.length || order.length == 0 {
        return Err(Error::new(
            ErrorCode::InvalidArgument,
            format!("merge into block {block}: the lengths do not fit"),
        ));
    }
    transfer.metrics.copies.fetch_add(1, Ordering::Relaxed);
    let write = pb::WriteBlock {
        block: Some(pb::Block { pool: transfer.store.map().pool().to_owned(), id: block.0, generation: generation.0 }),
        stage: pb::WriteStage::Transfer as i32,
        targets: rest.to_vec(),
        storage_id: first.storage_id.clone(),
        storage_type: first.storage_type,
        block_size: order.length,
        client_name: "merge".into(),
        ..Default::default()
    };
    let mut conn = copy::begin_write(transfer, &first.address, write).await?.0;
    let sent = send(transfer, order, block, &mut conn, &first.address).await;
    match sent {
        Ok(()) => copy::await_finish(transfer, &mut conn, &first.address).await.map(|()| order.length),
        // The pipeline ends with the connection, and its copies with it.
        Err(error) => Err(error),
    }
}

async fn send(
    transfer: &Arc<Transfer>,
    order: &pb::MergeBlocks,
    block: BlockId,
    conn: &mut Conn,
    address: &str,
) -> Result<()> {
    // Who receives it waits for its disk at most so long.
    let limit = Duration::from_millis(transfer.settings.disk_stall_ms);
    let mut put = async |bytes: &[u8]| {
        let doing = || format!("sending block {block} to {address}");
        match transfer.env.clock.timeout(limit, conn.write_all(bytes)).await {
            Ok(sent) => sent.map_err(|error| Error::io(doing(), &error)),
            Err(_) => Err(Error::new(ErrorCode::TimedOut, format!("{}: it takes no more data", doing()))),
        }
    };
    let mut base = 0;
    for source in &order.sources {
        let mut reader = Source::new(transfer, source);
        while let Some((header, payload)) = reader.next().await? {
            let moved = FrameHeader { offset: base + header.offset, ..header };
            put(&moved.encode(block)).await?;
            put(&payload).await?;
        }
        base += source.length;
    }
    put(&Marker { kind: MarkerKind::Finish, length: order.length }.encode(block)).await
}

/// The frames of one old block, from whichever of its replicas gives them.
struct Source<'a> {
    transfer: &'a Arc<Transfer>,
    source: &'a pb::MergeSource,
    /// Bytes of data that were handed out.
    done: u64,
    replica: usize,
    open: Option<(Conn, u64)>,
}

impl<'a> Source<'a> {
    fn new(transfer: &'a Arc<Transfer>, source: &'a pb::MergeSource) -> Self {
        Self { transfer, source, done: 0, replica: 0, open: None }
    }

    /// The next frame; goes on with the next replica where one fails.
    async fn next(&mut self) -> Result<Option<(FrameHeader, Bytes)>> {
        loop {
            if self.done == self.source.length {
                return Ok(None);
            }
            match self.read().await {
                Ok(Some((header, payload))) => {
                    self.done = header.end();
                    return Ok(Some((header, payload)));
                }
                // Before what is wanted: the answer starts where the block's index allows.
                Ok(None) => {}
                Err(error) => {
                    self.open = None;
                    self.replica += 1;
                    if self.replica >= self.source.replicas.len() {
                        return Err(error);
                    }
                    tracing::debug!("merge: a source goes on with its next replica: {error}");
                }
            }
        }
    }

    async fn read(&mut self) -> Result<Option<(FrameHeader, Bytes)>> {
        let (id, _) = self.transfer.check_block(self.source.block.as_ref())?;
        let limit = Duration::from_millis(self.transfer.settings.pipeline_timeout_ms);
        let clock = self.transfer.env.clock.clone();
        let late = || Error::new(ErrorCode::TimedOut, format!("reading block {id}: nothing came for {limit:?}"));
        if self.open.is_none() {
            self.open = Some(clock.timeout(limit, self.ask()).await.map_err(|_| late())??);
        }
        let Some((conn, left)) = &mut self.open else { return Ok(None) };
        let frame = clock.timeout(limit, read_frame(conn, left, id)).await.map_err(|_| late())??;
        let (header, payload) = frame;
        if header.end() <= self.done {
            return Ok(None);
        }
        if header.offset != self.done || header.end() > self.source.length {
            let text =
                format!("block {id}: a frame from {} to {} does not follow {}", header.offset, header.end(), self.done);
            return Err(Error::new(ErrorCode::Corrupt, text).with_subject(id.to_string()));
        }
        Ok(Some((header, payload)))
    }

    async fn ask(&self) -> Result<(Conn, u64)> {
        let Some(replica) = self.source.replicas.get(self.replica) else {
            return Err(Error::new(ErrorCode::BlockNotFound, "a source of a merge has no replica"));
        };
        let (transfer, address) = (self.transfer, &replica.address);
        let limit = transfer.settings.connect_timeout();
        let mut conn = opening::open_data(&transfer.env.net, address, &transfer.hello(), limit).await?;
        let read = pb::ReadBlock {
            block: self.source.block.clone(),
            offset: self.done,
            length: self.source.length - self.done,
            token: Default::default(),
        };
        let request = pb::DataRequest { op: Some(pb::data_request::Op::Read(read)) };
        let sent = net::write_message(&mut conn, &request).await;
        sent.map_err(|error| Error::io(format!("asking {address}"), &error))?;
        let ready = net::read_message::<pb::ReadReady>(&mut conn, address).await?;
        match ready.error {
            Some(error) => Err(Error::from_wire(error)),
            None => Ok((conn, ready.frame_bytes)),
        }
    }
}

/// Reads one frame of an answer and checks it as it is stored.
async fn read_frame(conn: &mut Conn, left: &mut u64, block: BlockId) -> Result<(FrameHeader, Bytes)> {
    let failed = |error: std::io::Error| Error::io(format!("reading block {block}"), &error);
    let damaged = |why: &dyn std::fmt::Display| {
        Error::new(ErrorCode::Corrupt, format!("block {block}: {why}")).with_subject(block.to_string())
    };
    if *left < FRAME_HEADER_BYTES as u64 {
        return Err(damaged(&"the answer ends early"));
    }
    let mut bytes = [0; FRAME_HEADER_BYTES];
    conn.read_exact(&mut bytes).await.map_err(failed)?;
    let header = FrameHeader::decode(block, &bytes).map_err(|flaw| damaged(&flaw))?;
    let Some(rest) = left.checked_sub(header.frame_bytes() as u64) else {
        return Err(damaged(&"the answer ends inside a frame"));
    };
    let mut payload = vec![0; header.stored_len as usize];
    conn.read_exact(&mut payload).await.map_err(failed)?;
    header.verify_stored(&payload).map_err(|flaw| damaged(&flaw))?;
    *left = rest;
    Ok((header, payload.into()))
}

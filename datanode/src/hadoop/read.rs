//! Operation 81: a Hadoop client reads a range of a block.
//!
//! Frames are decoded, verified and made into packets with checksums off the async threads, the next piece while one is on its way. Data starts at
//! the start of a chunk and ends with one (or the block), so that the checksums cover whole chunks. Of a block that is being written as much is
//! given as all its nodes hold.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use cairn_common::net::Conn;
use cairn_proto::hadoop::{
    BlockOpResponse, Checksum, ChecksumType, ClientReadStatus, DataStatus, OpReadBlock, ReadOpChecksumInfo,
};
use cairn_proto::ids::{BlockId, Generation};
use cairn_proto::{Error, ErrorCode, Result, pb};
use tokio::io::AsyncWriteExt;

use super::data::DataReader;
use super::packet::{self, PacketHeader};
use super::sums::{READ_CHUNK, SumKind, Sums};
use super::{READER_STALL, answer, check_block, decode, read_delimited, refuse, send};
use crate::store::Readable;
use crate::transfer::Transfer;

/// Data per packet.
const PACKET_DATA: usize = 64 << 10;
/// Data that is made into packets at a time.
const PIECE: usize = 1 << 20;
/// Another node of the pipeline may have told the client of data whose ack is still on its way to this one.
const CATCH_UP: Duration = Duration::from_secs(3);
const CATCH_UP_PAUSE: Duration = Duration::from_millis(10);

/// Serves one read. The connection goes on.
pub(super) async fn serve(transfer: &Arc<Transfer>, conn: &mut Conn, body: Bytes) -> io::Result<()> {
    transfer.metrics.reads.fetch_add(1, Ordering::Relaxed);
    let request: OpReadBlock = decode(&body)?;
    let sums = if request.send_checksums.unwrap_or(true) { Sums::READ } else { Sums::NONE };
    let (block, finalized, packets) = match open(transfer, &request, sums).await {
        Ok(opened) => opened,
        Err(error) => return refuse(conn, &error).await,
    };
    let none = sums.kind() == SumKind::Null;
    let kind = if none { ChecksumType::ChecksumNull } else { ChecksumType::ChecksumCrc32c };
    let checksum = Checksum { r#type: kind as i32, bytes_per_checksum: READ_CHUNK as u32 };
    let info = ReadOpChecksumInfo { checksum, chunk_offset: packets.data.position() };
    let ready = BlockOpResponse { read_op_checksum_info: Some(info), ..answer(DataStatus::StatusSuccess) };
    send(conn, &ready).await?;
    let mut packets = Some(packets);
    // One is on its way while the other is filled.
    let (mut ready, mut sent_before): (Vec<u8>, Vec<u8>) = (Vec::new(), Vec::new());
    loop {
        let mut room = std::mem::take(&mut sent_before);
        room.clear();
        let make = async {
            let Some(mut more) = packets.take() else { return (None, Ok(room)) };
            transfer
                .env
                .work
                .io(move || {
                    let made = more.make(room);
                    (Some(more), made)
                })
                .await
        };
        let ((rest, made), sent) = tokio::join!(make, put(transfer, conn, &ready));
        sent?;
        let made = made.map_err(|error| {
            tracing::warn!("a read of block {block} by {} breaks off: {error}", conn.peer_addr());
            if finalized {
                transfer.store.suspect(block);
            }
            // There is no word for it in the middle of packets: the client goes to another replica.
            io::Error::other(error)
        })?;
        sent_before = std::mem::replace(&mut ready, made);
        packets = rest.filter(|rest| !rest.ended);
        if ready.is_empty() {
            break;
        }
        transfer.metrics.bytes_sent.fetch_add(ready.len() as u64, Ordering::Relaxed);
    }
    // It says that all was right; what else it may say changes nothing here.
    let said = transfer.env.clock.timeout(transfer.settings.idle_timeout(), read_delimited(conn, 1 << 10)).await;
    let said: ClientReadStatus = decode(&said.map_err(|_| io::ErrorKind::TimedOut)??)?;
    if !matches!(said.status(), DataStatus::StatusSuccess | DataStatus::StatusChecksumOk) {
        tracing::warn!("a reader of block {block} at {} found status {}", conn.peer_addr(), said.status);
    }
    Ok(())
}

/// Writes, as long as the peer takes something now and then.
async fn put(transfer: &Transfer, conn: &mut Conn, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let stalled = |_| io::Error::new(io::ErrorKind::TimedOut, "the reader takes no data");
        let written = transfer.env.clock.timeout(READER_STALL, conn.write(bytes)).await.map_err(stalled)??;
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        bytes = &bytes[written..];
    }
    Ok(())
}

async fn open(transfer: &Transfer, request: &OpReadBlock, sums: Sums) -> Result<(BlockId, bool, Packets)> {
    let (block, generation) = check_block(transfer, &request.header.base_header.block)?;
    let end = request.offset.checked_add(request.len);
    let readable = readable_to(transfer, block, generation, end.unwrap_or(u64::MAX)).await?;
    let Some(end) = end.filter(|end| *end <= readable.length) else {
        let text = format!(
            "Offset {} and length {} don't match block {block} ( blockLen {} )",
            request.offset, request.len, readable.length
        );
        return Err(Error::new(ErrorCode::InvalidArgument, text).with_subject(block.to_string()));
    };
    let chunk = READ_CHUNK as u64;
    let start = request.offset / chunk * chunk;
    let end = if request.len == 0 { start } else { end.next_multiple_of(chunk).min(readable.length) };
    let data = DataReader::new(&readable, block, start, end)?;
    let finalized = readable.state == pb::ReplicaState::Finalized;
    Ok((block, finalized, Packets { data, sums, seqno: 0, ended: false }))
}

/// Opens a replica; if it is being written and shorter than asked for, after a moment in which it may catch up.
async fn readable_to(transfer: &Transfer, block: BlockId, generation: Generation, end: u64) -> Result<Readable> {
    let clock = &transfer.env.clock;
    let until = clock.mono_ms() + CATCH_UP.as_millis() as u64;
    loop {
        let readable = transfer.store.read(block, generation).await?;
        let may_grow = readable.state == pb::ReplicaState::BeingWritten && readable.length < end && end != u64::MAX;
        if !may_grow || clock.mono_ms() >= until {
            return Ok(readable);
        }
        clock.sleep(CATCH_UP_PAUSE).await;
    }
}

/// The packets of a read.
struct Packets {
    data: DataReader,
    sums: Sums,
    seqno: i64,
    /// The last, empty one was made.
    ended: bool,
}

impl Packets {
    /// The next ones, appended to `out`. Blocking.
    fn make(&mut self, mut out: Vec<u8>) -> Result<Vec<u8>> {
        let left = usize::try_from(self.data.end() - self.data.position()).unwrap_or(usize::MAX);
        let count = left.min(PIECE).div_ceil(PACKET_DATA) + 1;
        out.reserve(left.min(PIECE) / READ_CHUNK * (READ_CHUNK + 4) + count * 64 + 1_024);
        let mut made = 0;
        while made < PIECE {
            let (offset, end) = (self.data.position(), self.data.end());
            let data_len = usize::try_from(end - offset).unwrap_or(usize::MAX).min(PACKET_DATA);
            let header = PacketHeader { offset, seqno: self.seqno, last: data_len == 0, data_len, sync: false };
            self.seqno += 1;
            let mut outcome = Ok(());
            packet::append(&mut out, &header, &self.sums, |out| outcome = self.data.copy_to(out, data_len));
            outcome?;
            if data_len == 0 {
                self.ended = true;
                break;
            }
            made += data_len;
        }
        Ok(out)
    }
}

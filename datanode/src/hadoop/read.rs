//! Operation 81: a Hadoop client reads a range of a block.
//!
//! Frames are decoded, verified and made into packets with checksums off the async threads, the next pieces while one is on its way. Data starts at
//! the start of a chunk and ends with one (or the block), so that the checksums cover whole chunks. Of a block that is being written as much is
//! given as all its nodes hold.

use std::collections::VecDeque;
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
use futures_util::StreamExt;
use futures_util::stream::FuturesOrdered;
use tokio::io::AsyncWriteExt;

use super::data::DataReader;
use super::piece::{Made, Pieces, Source};
use super::sums::{READ_CHUNK, SumKind, Sums};
use super::{READER_STALL, answer, check_block, decode, read_delimited, refuse, send};
use crate::store::Readable;
use crate::transfer::Transfer;

/// Pieces that are made, or wait, while one is sent.
const AHEAD: usize = 2;
/// Another node of the pipeline may have told the client of data whose ack is still on its way to this one.
const CATCH_UP: Duration = Duration::from_secs(3);
const CATCH_UP_PAUSE: Duration = Duration::from_millis(10);

/// Serves one read. The connection goes on.
pub(super) async fn serve(transfer: &Arc<Transfer>, conn: &mut Conn, body: Bytes) -> io::Result<()> {
    transfer.metrics.reads.fetch_add(1, Ordering::Relaxed);
    let request: OpReadBlock = decode(&body)?;
    let sums = if request.send_checksums.unwrap_or(true) { Sums::READ } else { Sums::NONE };
    let (block, finalized, pieces) = match open(transfer, &request, sums).await {
        Ok(opened) => opened,
        Err(error) => return refuse(conn, &error).await,
    };
    let none = sums.kind() == SumKind::Null;
    let kind = if none { ChecksumType::ChecksumNull } else { ChecksumType::ChecksumCrc32c };
    let checksum = Checksum { r#type: kind as i32, bytes_per_checksum: READ_CHUNK as u32 };
    let info = ReadOpChecksumInfo { checksum, chunk_offset: pieces.at() };
    let ready = BlockOpResponse { read_op_checksum_info: Some(info), ..answer(DataStatus::StatusSuccess) };
    send(conn, &ready).await?;
    let sent = send_all(transfer, conn, pieces).await?;
    sent.map_err(|error| {
        tracing::warn!("a read of block {block} by {} breaks off: {error}", conn.peer_addr());
        if finalized {
            transfer.store.suspect(block);
        }
        // There is no word for it in the middle of packets: the client goes to another replica.
        io::Error::other(error)
    })?;
    // It says that all was right; what else it may say changes nothing here.
    let said = transfer.env.clock.timeout(transfer.settings.idle_timeout(), read_delimited(conn, 1 << 10)).await;
    let said: ClientReadStatus = decode(&said.map_err(|_| io::ErrorKind::TimedOut)??)?;
    if !matches!(said.status(), DataStatus::StatusSuccess | DataStatus::StatusChecksumOk) {
        tracing::warn!("a reader of block {block} at {} found status {}", conn.peer_addr(), said.status);
    }
    Ok(())
}

/// Sends one piece while the next ones are made. The inner error: the data is not what it was.
async fn send_all(transfer: &Transfer, conn: &mut Conn, mut pieces: Pieces) -> io::Result<Result<()>> {
    let mut making = FuturesOrdered::new();
    let mut made: VecDeque<Made> = VecDeque::new();
    let mut sent = 0;
    loop {
        while making.len() + made.len() <= AHEAD
            && let Some(piece) = pieces.next()
        {
            let work = transfer.env.work.clone();
            making.push_back(async move { work.io(move || piece.make()).await });
        }
        tokio::select! {
            biased;
            Some(piece) = making.next(), if !making.is_empty() => match piece {
                Ok(piece) => made.push_back(piece),
                Err(error) => return Ok(Err(error)),
            },
            taken = put(transfer, conn, made.front(), sent), if !made.is_empty() => {
                sent += taken?;
                if made.front().is_some_and(|front| front.len() <= sent)
                    && let Some(done) = made.pop_front()
                {
                    transfer.metrics.bytes_sent.fetch_add(sent as u64, Ordering::Relaxed);
                    sent = 0;
                    pieces.reuse(done);
                }
            }
            else => return Ok(Ok(())),
        }
    }
}

/// Writes what the peer takes of it, from `from` on. Dropped, it has written nothing.
async fn put(transfer: &Transfer, conn: &mut Conn, made: Option<&Made>, from: usize) -> io::Result<usize> {
    let parts = made.map(|made| made.slices(from)).unwrap_or_default();
    let stalled = |_| io::Error::new(io::ErrorKind::TimedOut, "the reader takes no data");
    match transfer.env.clock.timeout(READER_STALL, conn.write_vectored(&parts)).await.map_err(stalled)?? {
        0 => Err(io::ErrorKind::WriteZero.into()),
        taken => Ok(taken),
    }
}

async fn open(transfer: &Transfer, request: &OpReadBlock, sums: Sums) -> Result<(BlockId, bool, Pieces)> {
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
    // What cannot be read is refused now, not in the middle.
    DataReader::new(&readable, block, start, end)?;
    let finalized = readable.state == pb::ReplicaState::Finalized;
    let source = Arc::new(Source { readable, block, sums, end });
    Ok((block, finalized, Pieces::new(source, start)))
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

//! Copies of finalized replicas to other nodes: repair and balancing, ordered by the namenode.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use cairn_common::net::{self, Conn, opening};
use cairn_proto::dataplane::{self, Marker, MarkerKind};
use cairn_proto::{Error, ErrorCode, Result, pb};
use tokio::io::AsyncWriteExt;

use super::Transfer;
use crate::store::Readable;

/// Bytes sent between two looks at the time.
const PIECE: u64 = 1 << 20;

/// Sends a finalized replica to the first target, which passes it on to the others. Returns its length.
pub async fn replicate(transfer: &Arc<Transfer>, order: &pb::ReplicateBlock) -> Result<u64> {
    let (block, generation) = transfer.check_block(order.block.as_ref())?;
    let Some((first, rest)) = order.targets.split_first() else {
        return Err(Error::new(ErrorCode::InvalidArgument, format!("copy of block {block}: no targets")));
    };
    let readable = transfer.store.read(block, generation).await?;
    if readable.state != pb::ReplicaState::Finalized {
        let text = format!("block {block} is not finalized here: it cannot be copied");
        return Err(Error::new(ErrorCode::Busy, text).with_subject(block.to_string()));
    }
    transfer.metrics.copies.fetch_add(1, Ordering::Relaxed);
    let write = pb::WriteBlock {
        block: Some(pb::Block {
            pool: transfer.store.map().pool().to_owned(),
            id: block.0,
            generation: readable.generation.0,
        }),
        stage: pb::WriteStage::Transfer as i32,
        targets: rest.to_vec(),
        storage_id: first.storage_id.clone(),
        storage_type: first.storage_type,
        block_size: readable.length.max(1),
        client_name: "replication".into(),
        ..Default::default()
    };
    let mut conn = begin_write(transfer, &first.address, write).await?.0;
    let finish = Marker { kind: MarkerKind::Finish, length: readable.length }.encode(block);
    let length = readable.length;
    let range = readable.index.file_range(0, length);
    // Who receives it waits for its disk at most so long.
    let limit = Duration::from_millis(transfer.settings.disk_stall_ms);
    let sent = send_frames(transfer, &mut conn, &readable, range, &finish, limit).await;
    // If sending failed, the other side may have said why.
    let acked = await_finish(transfer, &mut conn, &first.address).await;
    match (sent, acked) {
        (_, Ok(())) => Ok(length),
        (Err(error), Err(ack)) if ack.code() == ErrorCode::Unreachable => {
            Err(Error::io(format!("sending block {block} to {}", first.address), &error))
        }
        (_, Err(error)) => Err(error),
    }
}

/// Sends the frames in a range of a replica's file and the finish marker, in pieces, each of which must get through within `limit`: a peer that
/// stops must not hold us for ever.
pub(super) async fn send_frames(
    transfer: &Transfer,
    conn: &mut Conn,
    readable: &Readable,
    range: Option<Range<u64>>,
    finish: &[u8],
    limit: Duration,
) -> io::Result<()> {
    let stalled = |_| io::Error::new(io::ErrorKind::TimedOut, "it takes no more data");
    let Range { start: mut at, end } = range.unwrap_or_default();
    while at < end {
        let piece = at..end.min(at + PIECE);
        at = piece.end;
        transfer.metrics.bytes_sent.fetch_add(piece.end - piece.start, Ordering::Relaxed);
        let sending = net::send_range(conn, &transfer.env.work, Arc::clone(&readable.file), piece);
        transfer.env.clock.timeout(limit, sending).await.map_err(stalled)??;
    }
    transfer.env.clock.timeout(limit, conn.write_all(finish)).await.map_err(stalled)?
}

/// Dials a datanode and opens a write there. Returns the storages that were taken.
pub async fn begin_write(transfer: &Transfer, address: &str, write: pb::WriteBlock) -> Result<(Conn, Vec<String>)> {
    let limit = transfer.settings.connect_timeout();
    let hello = transfer.hello();
    let mut conn = opening::open_data(&transfer.env.net, address, &hello, limit).await?;
    let patience = dataplane::set_up_patience(limit, write.targets.len() + 1);
    let request = pb::DataRequest { op: Some(pb::data_request::Op::Write(write)) };
    let ask = async {
        let sent = net::write_message(&mut conn, &request).await;
        sent.map_err(|error| Error::io(format!("asking {address}"), &error))?;
        net::read_message::<pb::WriteReady>(&mut conn, address).await
    };
    let ready = transfer.env.clock.timeout(patience, ask).await.map_err(|_| silent(address))??;
    match ready.error {
        Some(error) => Err(Error::from_wire(error)),
        None => Ok((conn, ready.storage_ids)),
    }
}

/// Reads acks until the finish is acked.
pub async fn await_finish(transfer: &Transfer, conn: &mut Conn, address: &str) -> Result<()> {
    let limit = Duration::from_millis(transfer.settings.pipeline_timeout_ms.saturating_mul(2));
    loop {
        let read = net::read_message::<pb::WriteAck>(conn, address);
        let ack = transfer.env.clock.timeout(limit, read).await.map_err(|_| silent(address))??;
        match ack.kind() {
            pb::AckKind::AckFinished => return Ok(()),
            pb::AckKind::AckError => {
                return Err(ack.error.map_or_else(|| silent(address), Error::from_wire));
            }
            _ => {}
        }
    }
}

pub(super) fn silent(address: &str) -> Error {
    Error::new(ErrorCode::TimedOut, format!("{address} did not answer in time")).with_subject(address)
}

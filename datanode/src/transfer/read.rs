//! Operations that answer: read, info, verify, map output.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use cairn_common::durable;
use cairn_common::net::{self, Conn};
use cairn_proto::ids::{BlockId, Generation};
use cairn_proto::pb::data_request::Op;
use cairn_proto::{Error, ErrorCode, Result, pb};

use super::Transfer;
use crate::store::Readable;

/// Answers an operation with an error in the reply that it expects.
pub async fn refuse(conn: &mut Conn, op: &Op, error: &Error) -> io::Result<()> {
    let error = Some(error.to_wire());
    match op {
        Op::Write(_) => net::write_message(conn, &pb::WriteReady { error, ..Default::default() }).await,
        Op::Transfer(_) => {
            let kind = pb::AckKind::AckError as i32;
            net::write_message(conn, &pb::WriteAck { kind, error, ..Default::default() }).await
        }
        Op::Read(_) => net::write_message(conn, &pb::ReadReady { error, ..Default::default() }).await,
        Op::Info(_) => net::write_message(conn, &pb::ReplicaInfoReply { error, ..Default::default() }).await,
        Op::Verify(_) => net::write_message(conn, &pb::VerifyReplicaReply { error, ..Default::default() }).await,
        Op::Truncate(_) => net::write_message(conn, &pb::TruncateReplicaReply { error, ..Default::default() }).await,
        Op::MapOutput(_) => net::write_message(conn, &pb::ReadMapOutputReply { error, ..Default::default() }).await,
    }
}

/// Sends the frames that cover a range of a block.
pub async fn serve_read(transfer: &Arc<Transfer>, conn: &mut Conn, request: pb::ReadBlock) -> io::Result<()> {
    transfer.metrics.reads.fetch_add(1, Ordering::Relaxed);
    let opened = open_range(transfer, &request).await;
    let (readable, range) = match opened {
        Ok(opened) => opened,
        Err(error) => {
            return net::write_message(conn, &pb::ReadReady { error: Some(error.to_wire()), ..Default::default() })
                .await;
        }
    };
    let ready = pb::ReadReady {
        error: None,
        frame_bytes: range.end - range.start,
        replica_length: readable.length,
        state: readable.state as i32,
    };
    net::write_message(conn, &ready).await?;
    if range.is_empty() {
        return Ok(());
    }
    transfer.metrics.bytes_sent.fetch_add(range.end - range.start, Ordering::Relaxed);
    let sent = net::send_range(conn, &transfer.env.work, readable.file, range).await;
    if let Err(error) = &sent
        && readable.state == pb::ReplicaState::Finalized
        && is_ours(error)
    {
        // Not the peer's doing: the file is short, or the disk does not give it.
        transfer.store.suspect(BlockId(request.block.as_ref().map_or(0, |block| block.id)));
    }
    sent
}

/// Whether sending failed on the file's side.
fn is_ours(error: &io::Error) -> bool {
    use io::ErrorKind as Kind;
    let of_peer = matches!(
        error.kind(),
        Kind::BrokenPipe | Kind::ConnectionReset | Kind::ConnectionAborted | Kind::NotConnected | Kind::TimedOut
    );
    !of_peer && (error.kind() == Kind::UnexpectedEof || durable::is_device_failure(error))
}

async fn open_range(transfer: &Transfer, request: &pb::ReadBlock) -> Result<(Readable, std::ops::Range<u64>)> {
    let (block, generation) = transfer.check_block(request.block.as_ref())?;
    let readable = transfer.store.read(block, generation).await?;
    if request.length == 0 {
        return Ok((readable, 0..0));
    }
    let beyond = || {
        let text = format!(
            "block {block} has {} bytes here; {} bytes at {} were asked for",
            readable.length, request.length, request.offset
        );
        Error::new(ErrorCode::InvalidArgument, text).with_subject(block.to_string())
    };
    if request.offset.checked_add(request.length).is_none_or(|end| end > readable.length) {
        return Err(beyond());
    }
    let range = readable.index.file_range(request.offset, request.length).ok_or_else(beyond)?;
    Ok((readable, range))
}

/// Tells length, size and state of a replica.
pub async fn serve_info(transfer: &Arc<Transfer>, conn: &mut Conn, request: pb::ReplicaInfo) -> io::Result<()> {
    let info = async {
        let (block, generation) = transfer.check_block(request.block.as_ref())?;
        let found = async {
            if request.fence_generation > 0 {
                transfer.store.fence(block, Generation(request.fence_generation)).await?;
            }
            transfer.store.read(block, generation).await
        };
        // Whoever asks how long a block is takes "not here" for "no bytes".
        found.await.map_err(|error| transfer.store.out_of_reach(block, error))
    };
    let reply = match info.await {
        Err(error) => pb::ReplicaInfoReply { error: Some(error.to_wire()), ..Default::default() },
        Ok(readable) => pb::ReplicaInfoReply {
            error: None,
            length: readable.length,
            stored: readable.stored,
            generation: readable.generation.0,
            state: readable.state as i32,
            storage_id: readable.storage_id,
            // Of an open replica it covers what is written, which may be more than its visible length.
            crc32c: if request.with_checksum { readable.index.crc32c() } else { 0 },
            found_at_start: readable.found_at_start,
        },
    };
    net::write_message(conn, &reply).await
}

/// Reads a whole replica and checks it.
pub async fn serve_verify(transfer: &Arc<Transfer>, conn: &mut Conn, request: pb::VerifyReplica) -> io::Result<()> {
    let verified = match transfer.check_block(request.block.as_ref()) {
        Ok((block, generation)) => transfer.verify(block, generation).await,
        Err(error) => Err(error),
    };
    let reply = match verified {
        Ok((length, stored)) => pb::VerifyReplicaReply { error: None, length, stored },
        Err(error) => pb::VerifyReplicaReply { error: Some(error.to_wire()), ..Default::default() },
    };
    net::write_message(conn, &reply).await
}

/// Sends one partition of a map task's output.
pub async fn serve_map_output(transfer: &Arc<Transfer>, conn: &mut Conn, request: pb::ReadMapOutput) -> io::Result<()> {
    let opened = match &transfer.map_outputs {
        None => Err(Error::new(ErrorCode::Unsupported, "this datanode runs no tasks")),
        Some(outputs) => outputs.open(&request).await,
    };
    match opened {
        Err(error) => {
            let reply = pb::ReadMapOutputReply { error: Some(error.to_wire()), bytes: 0 };
            net::write_message(conn, &reply).await
        }
        Ok((file, range)) => {
            let bytes = range.end.saturating_sub(range.start);
            net::write_message(conn, &pb::ReadMapOutputReply { error: None, bytes }).await?;
            if bytes == 0 {
                return Ok(());
            }
            transfer.metrics.bytes_sent.fetch_add(bytes, Ordering::Relaxed);
            net::send_range(conn, &transfer.env.work, file, range).await
        }
    }
}

//! The first bytes of a block that is being written go to a node that joins its pipeline.
//!
//! # Overview
//! The client asks a survivor of the broken pipeline. The survivor stops its own writer and refuses older ones, checks what it holds, and
//! sends it to the new node; both then wait for the client, which opens the pipeline through all of them.
//!
//! # Crash
//! - Of the target, or of this node in the middle: the target's file lies among the copies under way, which a start removes and a broken
//!   connection too. Nothing was shown to anybody. What the target held of the block before comes back.
//! - After the end: the target holds the first `length` bytes, durably, under a generation that is in force nowhere until the client says so to
//!   the namenode. It waits without a writer and is never final, so it counts for nothing; it takes part if the namenode recovers the block, and it is
//!   no shorter than what the client was told to be held.
//! - Of the client: the same. If it goes on with others, its next generation is newer and the replica is deleted as stale.
//!
//! # Cancellation
//! When the client's connection ends the sending is dropped, and with it the connection to the target.

use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use cairn_common::net::{self, Conn};
use cairn_proto::dataplane::{Marker, MarkerKind};
use cairn_proto::ids::{BlockId, Generation};
use cairn_proto::{Error, ErrorCode, Result, pb};

use super::{Transfer, copy};
use crate::store::Readable;
use crate::store::scan::{self, Depth};

/// The client hears so often that the work goes on.
const WORD: Duration = Duration::from_millis(500);

/// Which of the two failed.
struct Failed {
    error: Error,
    index: u32,
}

fn here(error: Error) -> Failed {
    Failed { error, index: 0 }
}

fn target(error: Error) -> Failed {
    Failed { error, index: 1 }
}

/// Serves one such request. The connection goes on.
pub async fn serve(transfer: &Arc<Transfer>, conn: &mut Conn, request: pb::TransferBlock) -> io::Result<()> {
    transfer.metrics.partial_copies.fetch_add(1, Ordering::Relaxed);
    let mut work = pin!(hand_over(transfer, &request));
    let outcome = loop {
        match transfer.env.clock.timeout(WORD, &mut work).await {
            Ok(outcome) => break outcome,
            // Every step of the work ends by itself in time: that it goes on is all that the client needs to know.
            Err(_) => net::write_message(conn, &ack(pb::AckKind::AckProgress, 0)).await?,
        }
    };
    match outcome {
        Ok(()) => net::write_message(conn, &ack(pb::AckKind::AckFinished, request.length)).await,
        Err(Failed { error, index }) => {
            let block = request.block.as_ref().map_or(0, |block| block.id);
            tracing::warn!("partial copy of block {block}: {error}");
            let failed =
                pb::WriteAck { error: Some(error.to_wire()), failed_index: index, ..ack(pb::AckKind::AckError, 0) };
            net::write_message(conn, &failed).await
        }
    }
}

fn ack(kind: pb::AckKind, length: u64) -> pb::WriteAck {
    pb::WriteAck { kind: kind as i32, length, ..Default::default() }
}

/// The work alone, for a door of this node.
pub(crate) async fn hand_over_to(transfer: &Arc<Transfer>, request: &pb::TransferBlock) -> Result<()> {
    transfer.metrics.partial_copies.fetch_add(1, Ordering::Relaxed);
    hand_over(transfer, request).await.map_err(|failed| failed.error)
}

async fn hand_over(transfer: &Arc<Transfer>, request: &pb::TransferBlock) -> Result<(), Failed> {
    let (block, generation) = transfer.check_block(request.block.as_ref()).map_err(here)?;
    let Some(to) = request.target.as_ref().filter(|_| request.new_generation > generation.0 && request.length > 0)
    else {
        let text = format!("partial copy of block {block}: no target, no bytes, or no newer generation");
        return Err(here(Error::new(ErrorCode::InvalidArgument, text)));
    };
    transfer.store.fence(block, Generation(request.new_generation)).await.map_err(here)?;
    let readable = transfer.store.read(block, generation).await.map_err(here)?;
    let range = check(transfer, block, &readable, request.length).await.map_err(here)?;
    let write = pb::WriteBlock {
        block: Some(pb::Block { generation: request.new_generation, ..request.block.clone().unwrap_or_default() }),
        stage: pb::WriteStage::PipelineTransfer as i32,
        storage_id: to.storage_id.clone(),
        storage_type: to.storage_type,
        block_size: request.block_size,
        client_name: request.client_name.clone(),
        token: request.token.clone(),
        ..Default::default()
    };
    let limit = transfer.settings.connect_timeout() * 2;
    let opened = transfer.env.clock.timeout(limit, copy::begin_write(transfer, &to.address, write)).await;
    let (mut conn, _) = opened.map_err(|_| target(copy::silent(&to.address)))?.map_err(target)?;
    let limit = Duration::from_millis(transfer.settings.pipeline_timeout_ms);
    let finish = Marker { kind: MarkerKind::Finish, length: request.length }.encode(block);
    let sent = copy::send_frames(transfer, &mut conn, &readable, Some(range), &finish, limit).await;
    // If sending failed, the target may have said why.
    match (sent, copy::await_finish(transfer, &mut conn, &to.address).await) {
        (_, Ok(())) => Ok(()),
        (Err(error), Err(answer)) if answer.code() == ErrorCode::Unreachable => {
            Err(target(Error::io(format!("sending block {block} to {}", to.address), &error)))
        }
        (_, Err(answer)) => Err(target(answer)),
    }
}

/// The file range of the first `length` bytes, after their stored bytes were checked: a flaw of this node must not be blamed on the target.
async fn check(transfer: &Transfer, block: BlockId, readable: &Readable, length: u64) -> Result<std::ops::Range<u64>> {
    let held =
        if readable.state == pb::ReplicaState::Finalized { readable.length } else { readable.index.data_length() };
    let Some(range) = readable.index.file_range(0, length) else {
        let text = format!("the replica of block {block} here has {held} bytes, fewer than the {length} to copy");
        return Err(Error::new(ErrorCode::Unsupported, text).with_subject(block.to_string()));
    };
    let file = Arc::clone(&readable.file);
    let walk = move || scan::walk(&*file, block, range.start, range.end, length, Depth::Stored);
    let walk = transfer.env.work.io(walk).await;
    let walk = walk.map_err(|error| Error::io(format!("reading block {block}"), &error))?;
    if let Some(flaw) = walk.flaw {
        let text = format!("the replica of block {block} here is corrupt: {flaw}");
        return Err(Error::new(ErrorCode::Corrupt, text).with_subject(block.to_string()));
    }
    if walk.index.data_length() != length {
        let text = format!("{length} is not the end of a frame of block {block}");
        return Err(Error::new(ErrorCode::InvalidArgument, text).with_subject(block.to_string()));
    }
    let start = readable.index.file_range(0, 1).map_or(0, |range| range.start);
    Ok(start..walk.index.frames_end())
}

//! Recovery of an abandoned block, ordered by the namenode: all replicas get one length and a new generation, and are finalized.
//!
//! Each replica is fenced before its length is taken, so nobody writes on while it is decided. The shortest of the replicas that were being written decides, unless one is finalized: then its length does. Frames are the same on all nodes (the
//! client made them), so the shortest length is the end of a frame everywhere.

use std::sync::Arc;

use cairn_common::net::{self, opening};
use cairn_proto::dataplane::{self, Marker, MarkerKind};
use cairn_proto::ids::{BlockId, Generation};
use cairn_proto::{Error, ErrorCode, Result, pb};
use tokio::io::AsyncWriteExt;

use super::{Transfer, copy};

struct Candidate {
    address: String,
    length: u64,
    generation: u64,
    finalized: bool,
}

/// Recovers the block and returns what to report.
pub async fn recover(transfer: &Arc<Transfer>, order: &pb::RecoverBlock) -> Result<pb::BlockRecovered> {
    let (block, generation) = transfer.check_block(order.block.as_ref())?;
    if let Some(length) = order.truncate_to {
        return super::cut::truncate_all(transfer, order, length).await;
    }
    let (mut candidates, mut without) = (Vec::new(), 0);
    for replica in &order.replicas {
        match ask(transfer, &replica.address, order).await {
            Ok(candidate) => candidates.push(candidate),
            Err(error) if error.code() == ErrorCode::BlockNotFound => without += 1,
            Err(error) => tracing::warn!("recovery of block {block}: {} is left out: {error}", replica.address),
        }
    }
    if without == order.replicas.len() {
        // The writer was gone before it sent anything: there is nothing to bring to one length.
        tracing::info!("block {block} is on none of the {without} datanodes that were to hold it");
        let (new_generation, storage_ids) = (order.new_generation, Vec::new());
        return Ok(pb::BlockRecovered { block: order.block.clone(), new_generation, length: 0, storage_ids });
    }
    let length = decide(&candidates).ok_or_else(|| {
        let text = format!("block {block} cannot be recovered: none of its {} replicas answers", order.replicas.len());
        Error::new(ErrorCode::Unreachable, text).with_subject(block.to_string())
    })?;
    let mut storage_ids = Vec::new();
    let mut last = None;
    for candidate in candidates.iter().filter(|candidate| candidate.length >= length) {
        match bring_to(transfer, block, generation, candidate, length, order.new_generation).await {
            Ok(storage_id) => storage_ids.push(storage_id),
            Err(error) => {
                tracing::warn!("recovery of block {block} on {}: {error}", candidate.address);
                last = Some(error);
            }
        }
    }
    match last {
        Some(error) if storage_ids.is_empty() => Err(error),
        _ => {
            tracing::info!("block {block} recovered to {length} bytes on {} storages", storage_ids.len());
            let new_generation = order.new_generation;
            Ok(pb::BlockRecovered { block: order.block.clone(), new_generation, length, storage_ids })
        }
    }
}

fn decide(candidates: &[Candidate]) -> Option<u64> {
    let finalized = candidates.iter().filter(|candidate| candidate.finalized).map(|candidate| candidate.length).min();
    finalized.or_else(|| candidates.iter().map(|candidate| candidate.length).min())
}

/// Fences a replica, then asks how long it is.
async fn ask(transfer: &Transfer, address: &str, order: &pb::RecoverBlock) -> Result<Candidate> {
    let limit = transfer.settings.connect_timeout();
    let mut conn = opening::open_data(&transfer.env.net, address, &transfer.hello(), limit).await?;
    let info =
        pb::ReplicaInfo { block: order.block.clone(), with_checksum: false, fence_generation: order.new_generation };
    let request = pb::DataRequest { op: Some(pb::data_request::Op::Info(info)) };
    let asked = async {
        let sent = net::write_message(&mut conn, &request).await;
        sent.map_err(|error| Error::io(format!("asking {address}"), &error))?;
        net::read_message::<pb::ReplicaInfoReply>(&mut conn, address).await
    };
    let reply = transfer.env.clock.timeout(dataplane::set_up_patience(limit, 1), asked).await;
    let reply = reply.map_err(|_| Error::new(ErrorCode::TimedOut, format!("{address} did not answer in time")))??;
    if let Some(error) = reply.error {
        return Err(Error::from_wire(error));
    }
    let finalized = reply.state() == pb::ReplicaState::Finalized;
    Ok(Candidate { address: address.to_owned(), length: reply.length, generation: reply.generation, finalized })
}

/// Cuts one replica to `length` under the new generation and finalizes it. Returns its storage.
async fn bring_to(
    transfer: &Transfer,
    block: BlockId,
    generation: Generation,
    candidate: &Candidate,
    length: u64,
    new_generation: u64,
) -> Result<String> {
    let write = pb::WriteBlock {
        block: Some(pb::Block {
            pool: transfer.store.map().pool().to_owned(),
            id: block.0,
            generation: new_generation,
        }),
        stage: pb::WriteStage::PipelineRecovery as i32,
        block_size: length.max(1),
        client_name: "recovery".into(),
        keep_length: length,
        old_generation: candidate.generation.max(generation.0).min(new_generation),
        ..Default::default()
    };
    let (mut conn, storage_ids) = copy::begin_write(transfer, &candidate.address, write).await?;
    let finish = Marker { kind: MarkerKind::Finish, length }.encode(block);
    let sent = conn.write_all(&finish).await;
    sent.map_err(|error| Error::io(format!("finishing on {}", candidate.address), &error))?;
    copy::await_finish(transfer, &mut conn, &candidate.address).await?;
    Ok(storage_ids.into_iter().next().unwrap_or_default())
}

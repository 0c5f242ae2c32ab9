//! Cutting a finished block inside, ordered by the namenode: each node that holds it cuts its own replica.
//!
//! The namenode has decided the length durably before it orders anything, so each node may go ahead by itself, in any order and more than once.
//! Nobody needs to be fenced: a finished block has no writer, and the newest order wins by its generation.

use std::io;
use std::sync::Arc;

use cairn_common::net::{self, Conn, opening};
use cairn_proto::ids::{BlockId, Generation};
use cairn_proto::{Error, ErrorCode, Result, dataplane, pb};

use super::Transfer;

/// Replicas are cut at disk speed; a block of the largest size takes minutes.
const PATIENCE_SHARE: u32 = 20;

/// Cuts this node's replica.
pub async fn serve_truncate(transfer: &Arc<Transfer>, conn: &mut Conn, request: pb::TruncateReplica) -> io::Result<()> {
    let (new_generation, length) = (Generation(request.new_generation), request.length);
    let cut = match transfer.check_block(request.block.as_ref()) {
        // In a task of its own: the caller may leave, but a claim must be settled.
        Ok((block, least)) => spawn_cut(transfer, block, least, new_generation, length).await,
        Err(error) => Err(error),
    };
    let reply = match cut {
        Ok(storage_id) => pb::TruncateReplicaReply { error: None, storage_id },
        Err(error) => pb::TruncateReplicaReply { error: Some(error.to_wire()), ..Default::default() },
    };
    net::write_message(conn, &reply).await
}

async fn spawn_cut(
    transfer: &Arc<Transfer>,
    block: BlockId,
    least: Generation,
    new_generation: Generation,
    length: u64,
) -> Result<String> {
    let store = Arc::clone(&transfer.store);
    let task = tokio::spawn(async move { store.truncate(block, least, new_generation, length).await });
    task.await.unwrap_or_else(|_| Err(Error::new(ErrorCode::Internal, format!("cutting block {block} was given up"))))
}

/// Has every replica cut that can be reached; at least one, or it is an error.
pub async fn truncate_all(
    transfer: &Arc<Transfer>,
    order: &pb::RecoverBlock,
    length: u64,
) -> Result<pb::BlockRecovered> {
    let (block, _) = transfer.check_block(order.block.as_ref())?;
    let asked = order.replicas.iter().map(|replica| ask(transfer, &replica.address, order, length));
    let answers = futures_util::future::join_all(asked).await;
    let (mut storage_ids, mut last) = (Vec::new(), None);
    for (replica, answer) in order.replicas.iter().zip(answers) {
        match answer {
            Ok(storage_id) => storage_ids.push(storage_id),
            Err(error) => {
                tracing::warn!("block {block} is not cut to {length} bytes on {}: {error}", replica.address);
                last = Some(error);
            }
        }
    }
    match last {
        Some(error) if storage_ids.is_empty() => Err(error),
        _ => {
            tracing::info!("block {block} cut to {length} bytes on {} storages", storage_ids.len());
            let (block, new_generation) = (order.block.clone(), order.new_generation);
            Ok(pb::BlockRecovered { block, new_generation, length, storage_ids })
        }
    }
}

async fn ask(transfer: &Transfer, address: &str, order: &pb::RecoverBlock, length: u64) -> Result<String> {
    let limit = transfer.settings.connect_timeout();
    let mut conn = opening::open_data(&transfer.env.net, address, &transfer.hello(), limit).await?;
    let cut = pb::TruncateReplica {
        block: order.block.clone(),
        new_generation: order.new_generation,
        length,
        token: Default::default(),
    };
    let request = pb::DataRequest { op: Some(pb::data_request::Op::Truncate(cut)) };
    let asked = async {
        let sent = net::write_message(&mut conn, &request).await;
        sent.map_err(|error| Error::io(format!("asking {address}"), &error))?;
        net::read_message::<pb::TruncateReplicaReply>(&mut conn, address).await
    };
    let patience = dataplane::set_up_patience(limit, 1) * PATIENCE_SHARE;
    let reply = transfer.env.clock.timeout(patience, asked).await;
    let reply = reply.map_err(|_| Error::new(ErrorCode::TimedOut, format!("{address} did not answer in time")))??;
    match reply.error {
        Some(error) => Err(Error::from_wire(error)),
        None => Ok(reply.storage_id),
    }
}

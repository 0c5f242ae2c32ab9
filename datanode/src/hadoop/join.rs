//! Operation 86: what an open block holds goes to a node that joins its pipeline.
//!
//! A Hadoop client asks for it before it has a new generation. Ours are fenced with one in this, so the survivor and the new node take the one that
//! follows: the namenode never gives that to this block, or gives it with the recovery that comes next, for which it is right. Until then the new
//! replica counts for nothing (`crate::transfer::partial`).

use std::io;
use std::sync::Arc;

use bytes::Bytes;
use cairn_common::net::Conn;
use cairn_proto::hadoop::{DataStatus, OpTransferBlock};
use cairn_proto::{Error, ErrorCode, Result, pb};

use super::{answer, check_block, decode, native, refuse, replicas, send};
use crate::transfer::{Transfer, partial};

/// Serves one such request. The connection goes on.
pub(super) async fn serve(transfer: &Arc<Transfer>, conn: &mut Conn, body: Bytes) -> io::Result<()> {
    let request: OpTransferBlock = decode(&body)?;
    match hand_over(transfer, &request).await {
        Ok(()) => send(conn, &answer(DataStatus::StatusSuccess)).await,
        Err(error) => {
            tracing::warn!("a Hadoop client asked for a copy of an open block: {error}");
            refuse(conn, &error).await
        }
    }
}

async fn hand_over(transfer: &Arc<Transfer>, request: &OpTransferBlock) -> Result<()> {
    let named = &request.header.base_header.block;
    let (block, generation) = check_block(transfer, named)?;
    let targets = replicas(&request.targets, &request.target_storage_ids);
    if targets.is_empty() {
        let text = format!("block {block} is to be copied, but no target is named");
        return Err(Error::new(ErrorCode::InvalidArgument, text));
    }
    let next = generation.next();
    let length = match transfer.store.fence(block, next).await {
        // Nothing was kept of it, so there is nothing to copy: the pipeline starts anew.
        Err(error) if error.code() == ErrorCode::BlockNotFound && named.num_bytes.unwrap_or(0) == 0 => return Ok(()),
        Err(error) => return Err(error),
        Ok(()) => transfer.store.read(block, generation).await?.length,
    };
    if length == 0 {
        return Ok(());
    }
    for target in targets {
        let copy = pb::TransferBlock {
            block: Some(native(named)),
            new_generation: next.0,
            length,
            target: Some(target),
            client_name: request.header.client_name.clone(),
            ..Default::default()
        };
        partial::hand_over_to(transfer, &copy).await?;
    }
    Ok(())
}

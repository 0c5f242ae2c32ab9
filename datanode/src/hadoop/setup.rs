//! A client's request for a pipeline becomes one of ours.
//!
//! # Recovery
//! HDFS lets each node go on with what it holds; ours go on from one length, the end of a frame on all of them. The frames of a pipeline are the
//! same on all its nodes, so the shortest of the survivors' lengths is one, and no survivor has less than what the client was told to be held.
//! Each is fenced with the new generation before its length is taken. The client resends from what was acknowledged to it; what lies below the
//! common length is compared and dropped (`super::write`).
//!
//! # Append
//! A finalized file is immutable: an append opens a new block, so the namenode names no block to append to. A client that asks for it all the
//! same is refused.

use std::sync::Arc;

use cairn_proto::hadoop::OpWriteBlock;
use cairn_proto::hadoop::op_write_block::Stage;
use cairn_proto::ids::{BlockId, Generation};
use cairn_proto::{Error, ErrorCode, Result, pb};

use super::sums::Sums;
use super::{check_block, native, replicas};
use crate::transfer::recover::fence_and_ask;
use crate::transfer::write::{self, Opened};
use crate::transfer::{Transfer, write::Broken};

/// A pipeline for a client.
pub(super) struct Setup {
    /// The block.
    pub block: BlockId,
    /// The generation under which it is written.
    pub generation: Generation,
    /// Open.
    pub opened: Opened,
    /// Of the client's packets.
    pub sums: Sums,
    /// Nothing is written any more: the block is only ended.
    pub ends: bool,
}

/// No pipeline.
pub(super) struct Refused {
    /// Why.
    pub error: Error,
    /// The node below that failed, as the client named it; empty: this one.
    pub bad_link: String,
}

/// A checked request.
struct Asked {
    block: BlockId,
    old: Generation,
    new: Generation,
    native: pb::Block,
    request: OpWriteBlock,
    targets: Vec<pb::Replica>,
    sums: Sums,
}

fn here(error: Error) -> Refused {
    Refused { error, bad_link: String::new() }
}

/// Opens the pipeline that a client asks for.
pub(super) async fn open(transfer: &Arc<Transfer>, request: OpWriteBlock) -> Result<Setup, Refused> {
    let asked = check(transfer, request).map_err(here)?;
    let stage = asked.request.stage();
    let mut write = pb::WriteBlock {
        block: Some(asked.native.clone()),
        stage: pb::WriteStage::PipelineSetup as i32,
        targets: asked.targets.clone(),
        storage_id: asked.request.storage_id.clone().unwrap_or_default(),
        client_name: asked.request.header.client_name.clone(),
        ..Default::default()
    };
    if stage != Stage::PipelineSetupCreate {
        let keep = common_length(transfer, &asked).await?;
        write.stage = pb::WriteStage::PipelineRecovery as i32;
        write.block = Some(pb::Block { generation: asked.new.0, ..asked.native.clone() });
        (write.keep_length, write.old_generation) = (keep, asked.old.0);
    }
    let opened = write::open_pipeline(transfer, write).await;
    let opened = opened.map_err(|Broken { error, index }| {
        let below = index.and_then(|index| (index as usize).checked_sub(1));
        let bad_link = below.and_then(|at| asked.targets.get(at)).map_or(String::new(), |node| node.address.clone());
        Refused { error, bad_link }
    })?;
    let generation = if stage == Stage::PipelineSetupCreate { asked.old } else { asked.new };
    Ok(Setup { block: asked.block, generation, opened, sums: asked.sums, ends: stage == Stage::PipelineCloseRecovery })
}

fn check(transfer: &Transfer, request: OpWriteBlock) -> Result<Asked> {
    let named = &request.header.base_header.block;
    let (block, old) = check_block(transfer, named)?;
    let known = [
        Stage::PipelineSetupAppend,
        Stage::PipelineSetupAppendRecovery,
        Stage::PipelineSetupStreamingRecovery,
        Stage::PipelineCloseRecovery,
        Stage::PipelineSetupCreate,
    ];
    let stage = Stage::try_from(request.stage);
    if request.header.client_name.is_empty() || !stage.is_ok_and(|stage| known.contains(&stage)) {
        let text = format!("block {block}: stage {} of a write is for clients of a pipeline only", request.stage);
        return Err(Error::new(ErrorCode::Unsupported, text).with_subject(block.to_string()));
    }
    let new = Generation(request.latest_generation_stamp.max(old.0));
    let sums = Sums::named(request.requested_checksum.r#type, request.requested_checksum.bytes_per_checksum)?;
    let targets = replicas(&request.targets, &request.target_storage_ids);
    let native = native(named);
    Ok(Asked { block, old, new, native, request, targets, sums })
}

/// Stops all writers of the block, and tells what all nodes hold.
async fn common_length(transfer: &Arc<Transfer>, asked: &Asked) -> Result<u64, Refused> {
    let own = own_length(transfer, asked).await.map_err(here)?;
    let ask = |node: &pb::Replica| {
        let (address, block) = (node.address.clone(), asked.native.clone());
        async move {
            let told = fence_and_ask(transfer, &address, Some(block), asked.new.0).await;
            let length = told.and_then(|reply| {
                refuse_append(asked, reply.state())?;
                Ok(reply.length)
            });
            length_or_none(asked, length).map_err(|error| Refused { error, bad_link: address })
        }
    };
    let lengths = futures_util::future::join_all(asked.targets.iter().map(ask)).await;
    lengths.into_iter().try_fold(own, |shortest, length| Ok(shortest.min(length?)))
}

async fn own_length(transfer: &Arc<Transfer>, asked: &Asked) -> Result<u64> {
    let fenced = transfer.store.fence(asked.block, asked.new).await;
    let length = match fenced {
        Err(error) => Err(error),
        Ok(()) => {
            let readable = transfer.store.read(asked.block, asked.old).await?;
            refuse_append(asked, readable.state)?;
            Ok(readable.length)
        }
    };
    length_or_none(asked, length)
}

/// A node that held nothing when its writer left kept nothing, and may go on from the start. One that lost what was acknowledged may not.
fn length_or_none(asked: &Asked, length: Result<u64>) -> Result<u64> {
    let least = asked.request.min_bytes_rcvd;
    let length = match length {
        Err(error) if error.code() == ErrorCode::BlockNotFound && least == 0 => 0,
        length => length?,
    };
    if length < least {
        let text = format!("block {}: {least} bytes were acknowledged, but {length} are held", asked.block);
        return Err(Error::new(ErrorCode::Corrupt, text).with_subject(asked.block.to_string()));
    }
    Ok(length)
}

fn refuse_append(asked: &Asked, state: pb::ReplicaState) -> Result<()> {
    let appends = matches!(asked.request.stage(), Stage::PipelineSetupAppend | Stage::PipelineSetupAppendRecovery);
    if appends && state == pb::ReplicaState::Finalized {
        let text = format!(
            "block {} is finalized and never changes: an append opens a new block, which the namenode allocates",
            asked.block
        );
        return Err(Error::new(ErrorCode::Unsupported, text).with_subject(asked.block.to_string()));
    }
    Ok(())
}

//! Recovery of an abandoned block, ordered by the namenode: all replicas get one length and a new generation, and are finalized.
//!
//! Each replica is fenced before its length is taken, so nobody writes on while it is decided.
//!
//! # Which length
//! Only replicas count whose generation is at least the one in force: what was acknowledged under it was held by every node of its pipeline, and
//! no byte was sent under a newer one before that was in force. As in HDFS there are three ranks:
//!
//! 1. **Finalized**, or **open all along** (since its writer opened it, its process has not ended): each has all that was acknowledged, hflush or
//!    hsync, so the shortest of the open ones is enough, and a finalized one is durable. The longer of the two lengths is taken: a finalized
//!    replica that is shorter than one that was open all along was left by an earlier attempt that did not reach the latter.
//! 2. **Found at a start** (HDFS: waiting to be recovered): a power cut may have taken what was flushed, and damage what was synced. What was
//!    acknowledged by hsync is on each of them as long as their disks keep it, so the longest has it, whichever of the others lost some.
//!    HDFS takes the shortest, which one damaged replica makes shorter than what was synced.
//!
//! So hsynced bytes are never cut while one node keeps them, nor hflushed ones while one process that had them lives. For the latter, replicas of
//! the second rank decide nothing while a node of the pipeline does not answer: it may have been open all along. The namenode asks again. It
//! names no node that is dead, but says how many of the pipeline are, until they were away for very long.
//!
//! Replicas that are shorter than what is decided are left out, whatever their rank. Frames are the same on all nodes (the client made them), so
//! each length is the end of a frame everywhere.

use std::sync::Arc;

use cairn_common::net::{self, opening};
use cairn_proto::dataplane::{self, Marker, MarkerKind};
use cairn_proto::ids::{BlockId, Generation};
use cairn_proto::{Error, ErrorCode, Result, pb};
use tokio::io::AsyncWriteExt;

use super::{Transfer, copy};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Rank {
    Finalized,
    OpenAllAlong,
    FoundAtStart,
}

struct Candidate {
    address: String,
    length: u64,
    generation: u64,
    rank: Rank,
}

/// What decides.
#[derive(PartialEq, Eq, Debug)]
enum Decision {
    Length(u64),
    /// Those that answer could have lost what one that is silent has.
    Wait,
    NoReplica,
}

/// Recovers the block and returns what to report.
pub async fn recover(transfer: &Arc<Transfer>, order: &pb::RecoverBlock) -> Result<pb::BlockRecovered> {
    let (block, generation) = transfer.check_block(order.block.as_ref())?;
    if let Some(length) = order.truncate_to {
        return super::cut::truncate_all(transfer, order, length).await;
    }
    let (mut candidates, mut without, mut silent) = (Vec::new(), 0, order.silent as usize);
    for replica in &order.replicas {
        match ask(transfer, &replica.address, order).await {
            Ok(candidate) => candidates.push(candidate),
            Err(error) if error.code() == ErrorCode::BlockNotFound => without += 1,
            Err(error) => {
                silent += usize::from(may_hold_more(&error));
                tracing::warn!("recovery of block {block}: {} is left out: {error}", replica.address);
            }
        }
    }
    if without == order.replicas.len() {
        // The writer was gone before it sent anything: there is nothing to bring to one length.
        tracing::info!("block {block} is on none of the {without} datanodes that were to hold it");
        let (new_generation, storage_ids) = (order.new_generation, Vec::new());
        return Ok(pb::BlockRecovered { block: order.block.clone(), new_generation, length: 0, storage_ids });
    }
    let refused = |text: String| Err(Error::new(ErrorCode::Unreachable, text).with_subject(block.to_string()));
    let length = match decide(&candidates, silent) {
        Decision::Length(length) => length,
        Decision::Wait => {
            return refused(format!(
                "block {block} is not recovered yet: its {} replicas that answer were found at a start, and {silent} datanodes \
                 that may hold more do not answer",
                candidates.len()
            ));
        }
        Decision::NoReplica => {
            let asked = order.replicas.len();
            return refused(format!("block {block} cannot be recovered: none of its {asked} replicas answers"));
        }
    };
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

/// See the module. `silent`: nodes that may have a replica and did not answer.
fn decide(candidates: &[Candidate], silent: usize) -> Decision {
    let of = |rank: Rank| candidates.iter().filter(move |it| it.rank == rank).map(|candidate| candidate.length);
    let (whole, open) = (of(Rank::Finalized).max(), of(Rank::OpenAllAlong).min());
    match (whole.max(open), of(Rank::FoundAtStart).max()) {
        (Some(length), _) => Decision::Length(length),
        (None, Some(_)) if silent > 0 => Decision::Wait,
        (None, Some(length)) => Decision::Length(length),
        (None, None) => Decision::NoReplica,
    }
}

/// Whether a node that did not tell its length may have a good replica all the same. One that is older or corrupt is none.
fn may_hold_more(error: &Error) -> bool {
    matches!(error.code(), ErrorCode::Unreachable | ErrorCode::TimedOut | ErrorCode::Busy)
}

async fn ask(transfer: &Transfer, address: &str, order: &pb::RecoverBlock) -> Result<Candidate> {
    let reply = fence_and_ask(transfer, address, order.block.clone(), order.new_generation).await?;
    let rank = match reply.state() {
        pb::ReplicaState::Finalized => Rank::Finalized,
        _ if reply.found_at_start => Rank::FoundAtStart,
        _ => Rank::OpenAllAlong,
    };
    Ok(Candidate { address: address.to_owned(), length: reply.length, generation: reply.generation, rank })
}

/// Fences a replica with this generation, then asks how long it is.
pub(crate) async fn fence_and_ask(
    transfer: &Transfer,
    address: &str,
    block: Option<pb::Block>,
    fence_generation: u64,
) -> Result<pb::ReplicaInfoReply> {
    let limit = transfer.settings.connect_timeout();
    let mut conn = opening::open_data(&transfer.env.net, address, &transfer.hello(), limit).await?;
    let info = pb::ReplicaInfo { block, with_checksum: false, fence_generation };
    let request = pb::DataRequest { op: Some(pb::data_request::Op::Info(info)) };
    let asked = async {
        let sent = net::write_message(&mut conn, &request).await;
        sent.map_err(|error| Error::io(format!("asking {address}"), &error))?;
        net::read_message::<pb::ReplicaInfoReply>(&mut conn, address).await
    };
    let reply = transfer.env.clock.timeout(dataplane::set_up_patience(limit, 1), asked).await;
    let reply = reply.map_err(|_| Error::new(ErrorCode::TimedOut, format!("{address} did not answer in time")))??;
    match reply.error {
        Some(error) => Err(Error::from_wire(error)),
        None => Ok(reply),
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use Rank::{Finalized, FoundAtStart, OpenAllAlong};

    #[test]
    fn what_was_open_all_along_decides_before_what_a_start_found() {
        let decided = |replicas: &[(Rank, u64)], silent| {
            let candidate = |&(rank, length)| Candidate { address: String::new(), length, generation: 7, rank };
            decide(&replicas.iter().map(candidate).collect::<Vec<_>>(), silent)
        };
        let length = Decision::Length;
        assert_eq!(decided(&[(OpenAllAlong, 30), (OpenAllAlong, 20)], 1), length(20), "all have what was acked");
        assert_eq!(decided(&[(FoundAtStart, 10), (OpenAllAlong, 20)], 1), length(20), "a power cut shortens nothing");
        assert_eq!(decided(&[(FoundAtStart, 40), (OpenAllAlong, 20)], 0), length(20), "the rest was never acked");
        assert_eq!(decided(&[(Finalized, 30), (OpenAllAlong, 20), (FoundAtStart, 10)], 2), length(30));
        assert_eq!(decided(&[(Finalized, 10), (OpenAllAlong, 20)], 0), length(20), "an earlier attempt missed one");
        assert_eq!(decided(&[(Finalized, 10), (Finalized, 20)], 0), length(20));
        assert_eq!(decided(&[(FoundAtStart, 10), (FoundAtStart, 30), (FoundAtStart, 20)], 0), length(30));
        assert_eq!(decided(&[(FoundAtStart, 10), (FoundAtStart, 30)], 1), Decision::Wait);
        assert_eq!(decided(&[], 2), Decision::NoReplica);
    }
}

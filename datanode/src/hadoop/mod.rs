//! Hadoop's data transfer on the data port: unmodified HDFS clients write and read blocks.
//!
//! # Overview
//! [`serve`] carries out the operations of one connection. A write is turned into frames at this node and then goes the way of all writes
//! (`crate::transfer::write`); there is no second store and no second pipeline. A read decodes frames into packets ([`data`]).
//!
//! | number | operation | |
//! |---|---|---|
//! | 80 | write a block | [`mod@write`] |
//! | 81 | read a block | [`read`] |
//! | 85 | checksum of a block | [`checksum`] |
//! | 86 | copy an open block to a node that joins its pipeline | [`join`] |
//! | 87 to 89 | short-circuit reads | refused in the form that makes clients read over the network at once |
//!
//! [`serve_rpc`] answers `ClientDatanodeProtocol` on the same port.
//!
//! Block ids, generations and lengths are the same at both doors; lengths are bytes of file data. Security is off: tokens are not looked at, and a
//! SASL handshake is refused.
//!
//! # Limits
//! Operations count among `max_transfers` with those of our own. Lengths from outside are checked before anything is allocated. A writer
//! that sends nothing is cut after the idle timeout, a reader that takes nothing after [`READER_STALL`]. A reader holds three pieces of a mebibyte,
//! each twice at most, and what the frames at their ends have besides.

mod answer;
pub mod checksum;
pub mod data;
pub mod framing;
mod join;
pub mod packet;
mod piece;
mod read;
mod rpc;
#[cfg(test)]
mod scripted;
mod setup;
pub mod sums;
#[cfg(test)]
mod tests;
mod write;

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use cairn_common::net::Conn;
use cairn_proto::hadoop::{BlockOpResponse, DataStatus, DatanodeInfo, ExtendedBlock};
use cairn_proto::hadoop::{ReleaseShortCircuitAccessResponse, ShortCircuitShmResponse};
use cairn_proto::ids::{BlockId, Generation};
use cairn_proto::{Error, ErrorCode, Result, pb};
use prost::Message;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::transfer::upstream::drain;
use crate::transfer::write::LINGER;
use crate::transfer::{Active, Transfer};

pub use rpc::serve_rpc;

/// Version of the protocol: the one that all clients since Hadoop 2 speak.
const VERSION: u16 = 28;
/// Longest operation.
const MAX_OP_BYTES: usize = 1 << 20;
/// A reader that takes no data for so long is cut; as HDFS: programs that read a stream may pause.
const READER_STALL: Duration = Duration::from_secs(480);
/// First bytes of a SASL handshake.
pub const SASL_MAGIC: [u8; 4] = [0xDE, 0xAD, 0xBE, 0xEF];

/// A step of a SASL handshake failed.
const SASL_ERROR: i32 = 2;

/// What both sides of a SASL handshake send, as far as a refusal needs it.
#[derive(Clone, PartialEq, Message)]
struct SaslMessage {
    #[prost(int32, required, tag = "1")]
    status: i32,
    #[prost(string, optional, tag = "3")]
    message: Option<String>,
}

/// Carries out the operations of one connection until it ends.
pub async fn serve(transfer: Arc<Transfer>, mut conn: Conn) {
    let who = conn.peer_addr().to_string();
    loop {
        let idle = transfer.settings.idle_timeout();
        let read = tokio::select! {
            biased;
            () = transfer.stopping() => return,
            read = transfer.env.clock.timeout(idle, read_op(&mut conn)) => read,
        };
        let Ok(read) = read else { return };
        let (code, body) = match read {
            Ok(Some(op)) => op,
            Ok(None) => return,
            Err(error) => {
                tracing::debug!("{who}: {error}");
                return;
            }
        };
        let Ok(_slot) = transfer.slots.try_acquire() else {
            transfer.metrics.refused.fetch_add(1, Ordering::Relaxed);
            let text = format!("{} transfers are under way, no more are taken now", transfer.settings.max_transfers);
            let _ = refuse(&mut conn, &Error::new(ErrorCode::Busy, text)).await;
            return;
        };
        let _active = Active::new(&transfer.metrics.active);
        let done = match code {
            80 => return write::serve(&transfer, conn, body).await,
            81 => tokio::select! {
                biased;
                () = transfer.stopping() => return,
                done = read::serve(&transfer, &mut conn, body) => done,
            },
            85 => checksum::serve(&transfer, &mut conn, body).await,
            86 => join::serve(&transfer, &mut conn, body).await,
            87 => {
                let refusal = answer(DataStatus::StatusErrorUnsupported);
                send(&mut conn, &BlockOpResponse { message: no_short_circuit(), ..refusal }).await
            }
            88 => {
                let status = DataStatus::StatusErrorUnsupported as i32;
                send(&mut conn, &ReleaseShortCircuitAccessResponse { status, error: no_short_circuit() }).await
            }
            89 => {
                let status = DataStatus::StatusErrorUnsupported as i32;
                send(&mut conn, &ShortCircuitShmResponse { status, error: no_short_circuit(), id: None }).await
            }
            other => {
                // As HDFS does with what it does not know.
                tracing::debug!("{who}: operation {other} of Hadoop's data transfer is not served here");
                return;
            }
        };
        if let Err(error) = done {
            tracing::debug!("{who}: {error}");
            return;
        }
    }
}

fn no_short_circuit() -> Option<String> {
    Some("this datanode gives no files to Hadoop clients: read over the network".into())
}

/// Refuses a SASL handshake in its own form.
pub async fn refuse_sasl(transfer: &Transfer, mut conn: Conn) {
    let text = "this cluster has security off: data transfer protection and encryption are not served; unset \
                dfs.data.transfer.protection and dfs.encrypt.data.transfer";
    let refusal = SaslMessage { status: SASL_ERROR, message: Some(text.into()) };
    let tell = async {
        let _ = send(&mut conn, &refusal).await;
        let _ = conn.shutdown().await;
        drain(&mut conn).await;
    };
    let _ = transfer.env.clock.timeout(LINGER, tell).await;
}

/// The next operation: its number and its message. `None`: the peer left, or speaks another version; a real datanode closes without a word.
///
/// # Errors
/// The connection broke, or the message is longer than an operation may be.
pub async fn read_op(conn: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<(u8, Bytes)>> {
    let mut head = [0; 3];
    match conn.read_exact(&mut head).await {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        read => read?,
    };
    if u16::from_be_bytes([head[0], head[1]]) != VERSION {
        return Ok(None);
    }
    Ok(Some((head[2], read_delimited(conn, MAX_OP_BYTES).await?)))
}

/// A message with its length as a varint before it.
async fn read_delimited(conn: &mut (impl AsyncRead + Unpin), most: usize) -> io::Result<Bytes> {
    let invalid = |text: String| io::Error::new(io::ErrorKind::InvalidData, text);
    let mut length = 0u64;
    for shift in [0, 7, 14, 21, 28] {
        let byte = conn.read_u8().await?;
        length |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            if length > most as u64 {
                return Err(invalid(format!("a message of {length} bytes, more than {most}")));
            }
            let mut body = vec![0; length as usize];
            conn.read_exact(&mut body).await?;
            return Ok(body.into());
        }
    }
    Err(invalid("the length of a message has more than five bytes".into()))
}

fn decode<M: Message + Default>(body: &Bytes) -> io::Result<M> {
    M::decode(&body[..]).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// Sends a message with its length before it.
async fn send(conn: &mut (impl AsyncWrite + Unpin), message: &impl Message) -> io::Result<()> {
    conn.write_all(&message.encode_length_delimited_to_vec()).await?;
    conn.flush().await
}

fn answer(status: DataStatus) -> BlockOpResponse {
    BlockOpResponse { status: status as i32, ..Default::default() }
}

/// Answers an operation with an error.
async fn refuse(conn: &mut (impl AsyncWrite + Unpin), error: &Error) -> io::Result<()> {
    let corrupt = error.code() == ErrorCode::Corrupt;
    let status = if corrupt { DataStatus::StatusErrorChecksum } else { DataStatus::StatusError };
    send(conn, &BlockOpResponse { message: Some(error.message().to_owned()), ..answer(status) }).await
}

/// Checks that a block is of our pool.
fn check_block(transfer: &Transfer, block: &ExtendedBlock) -> Result<(BlockId, Generation)> {
    transfer.check_block(Some(&native(block)))
}

fn native(block: &ExtendedBlock) -> pb::Block {
    // Ids beyond i64 become 0, which no block has.
    let id = i64::try_from(block.block_id).unwrap_or(0);
    pb::Block { pool: block.pool_id.clone(), id, generation: block.generation_stamp }
}

/// The nodes that a client names.
fn replicas(targets: &[DatanodeInfo], storage_ids: &[String]) -> Vec<pb::Replica> {
    let address = |node: &DatanodeInfo| match node.id.ip_addr.as_str() {
        v6 if v6.contains(':') => format!("[{v6}]:{}", node.id.xfer_port),
        other => format!("{other}:{}", node.id.xfer_port),
    };
    let replica = |(at, node): (usize, &DatanodeInfo)| pb::Replica {
        node_id: node.id.datanode_uuid.clone(),
        address: address(node),
        storage_id: storage_ids.get(at).cloned().unwrap_or_default(),
        ..Default::default()
    };
    targets.iter().enumerate().map(replica).collect()
}

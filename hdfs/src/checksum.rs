//! Checksums that datanodes take of their blocks: only the sums travel.
//!
//! A Hadoop datanode gives the MD5 of a block's CRCs, or (since Hadoop 3.1) the CRC of its data, of which that of the whole file follows whatever the
//! blocks are.

use std::time::Duration;

use bytes::Bytes;
use cairn_common::clock::Clock;
use cairn_common::net::{Conn, Net};
use cairn_proto::hadoop::rpc_response_header::Status;
use cairn_proto::hadoop::{
    BaseHeader, BlockChecksumOptions, BlockChecksumType, BlockOpResponse, ChecksumType, DataStatus, DatanodeInfo,
    ExtendedBlock, GetBlockLocationsRequest, GetBlockLocationsResponse, IpcConnectionContext, LocatedBlocks,
    OpBlockChecksum, OpBlockChecksumResponse, RequestHeader, RpcKind, RpcRequestHeader, RpcResponseHeader,
    UserInformation,
};
use cairn_proto::{Error, ErrorCode, Result};
use prost::Message;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// Version of Hadoop's data transfer, and the number of the operation.
const OPENING: [u8; 3] = [0, 28, 85];
/// "hrpc", version 9, no authentication.
const RPC_OPENING: &[u8] = b"hrpc\x09\x00\x00";
const PROTOCOL: &str = "org.apache.hadoop.hdfs.protocol.ClientProtocol";
const CONTEXT_CALL: i32 = -3;
/// A node must take a connection within this time, and have read a whole block within that.
const CONNECT: Duration = Duration::from_secs(5);
const READ: Duration = Duration::from_secs(600);
/// Longest answer of a datanode: a few numbers, or why not.
const ANSWER_BYTES: u64 = 64 << 10;
/// Longest answer of a namenode: the blocks of a file.
const REPLY_BYTES: u32 = 128 << 20;

/// Asks one datanode ("IP:PORT" of its data port) for the checksum of its replica of a block, up to `num_bytes` if that is set. The kind in the
/// answer may be another one if the datanode does not know the one that was asked for.
pub async fn block_checksum(
    (net, clock): (&Net, &Clock),
    address: &str,
    block: ExtendedBlock,
    kind: BlockChecksumType,
) -> Result<OpBlockChecksumResponse> {
    let options = BlockChecksumOptions { block_checksum_type: Some(kind as i32), stripe_length: None };
    let request = OpBlockChecksum { header: BaseHeader { block, token: None }, block_checksum_options: Some(options) };
    let mut conn = net.connect(address, CONNECT).await?;
    let talk = async {
        conn.write_all(&[&OPENING[..], &request.encode_length_delimited_to_vec()].concat()).await?;
        read_answer(&mut conn).await
    };
    let answer = match clock.timeout(READ, talk).await {
        Ok(answer) => answer.map_err(|error| Error::io(format!("asking {address}"), &error))?,
        Err(elapsed) => return Err(Error::new(ErrorCode::TimedOut, format!("{address}: {elapsed}"))),
    };
    match answer.checksum_response {
        Some(sum) if answer.status == DataStatus::StatusSuccess as i32 => Ok(sum),
        _ => Err(Error::new(ErrorCode::BlockNotFound, answer.message.unwrap_or_else(|| "it says not why".into()))),
    }
}

/// A message with its length as a varint before it.
async fn read_answer(conn: &mut Conn) -> std::io::Result<BlockOpResponse> {
    let invalid = |text: String| std::io::Error::new(std::io::ErrorKind::InvalidData, text);
    let mut length = 0;
    for shift in [0, 7, 14, 21] {
        let byte = conn.read_u8().await?;
        length |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            break;
        }
        if shift == 21 {
            length = u64::MAX;
        }
    }
    if length > ANSWER_BYTES {
        return Err(invalid(format!("the answer has more than {ANSWER_BYTES} bytes")));
    }
    let mut body = vec![0; length as usize];
    conn.read_exact(&mut body).await?;
    BlockOpResponse::decode(&body[..]).map_err(|error| invalid(error.to_string()))
}

/// CRC-32C and length of a file of the namenode at `address`, from its datanodes; `None`: they give no such sums of it (before Hadoop 3.1, or of a
/// file that was written with another CRC).
pub(crate) async fn file_crc(
    machine: (&Net, &Clock),
    address: &str,
    user: &str,
    path: &str,
) -> Result<Option<(u32, u64)>> {
    let located = locate(machine, address, user, path).await?;
    let (mut crc, mut length) = (0, 0);
    for block in &located.blocks {
        let Some(of_block) = block_crc(machine, &block.b, &block.locs).await? else { return Ok(None) };
        crc = crc32c::crc32c_combine(crc, of_block, usize::try_from(block.b.num_bytes()).unwrap_or(usize::MAX));
        length += block.b.num_bytes();
    }
    Ok((length == located.file_length).then_some((crc, length)))
}

async fn block_crc(machine: (&Net, &Clock), block: &ExtendedBlock, nodes: &[DatanodeInfo]) -> Result<Option<u32>> {
    let mut failures = Vec::new();
    for node in nodes {
        let ip = &node.id.ip_addr;
        let ip = if ip.contains(':') { format!("[{ip}]") } else { ip.clone() };
        let address = format!("{ip}:{}", node.id.xfer_port);
        match block_checksum(machine, &address, block.clone(), BlockChecksumType::CompositeCrc).await {
            Ok(sum) => return Ok(crc_of(&sum)),
            Err(error) => failures.push(format!("{address}: {error}")),
        }
    }
    let why = if failures.is_empty() { "it has no replica".into() } else { failures.join("; ") };
    Err(Error::new(
        ErrorCode::BlockNotFound,
        format!("no replica of block {} gives its checksum: {why}", block.block_id),
    ))
}

/// Older datanodes pass over what they do not know, and answer with an MD5.
fn crc_of(sum: &OpBlockChecksumResponse) -> Option<u32> {
    let kind = sum.block_checksum_options.and_then(|options| options.block_checksum_type);
    let fits = kind == Some(BlockChecksumType::CompositeCrc as i32)
        && sum.crc_type == Some(ChecksumType::ChecksumCrc32c as i32);
    let bytes: Option<[u8; 4]> = sum.block_checksum[..].try_into().ok();
    bytes.filter(|_| fits).map(u32::from_be_bytes)
}

async fn locate((net, clock): (&Net, &Clock), address: &str, user: &str, path: &str) -> Result<LocatedBlocks> {
    let mut conn = net.connect(address, CONNECT).await?;
    let request = GetBlockLocationsRequest { src: path.to_owned(), offset: 0, length: i64::MAX as u64 };
    let talk = async {
        conn.write_all(&call(user, "getBlockLocations", &request)).await?;
        let length = conn.read_u32().await?;
        if length > REPLY_BYTES {
            let text = format!("an answer of {length} bytes, more than {REPLY_BYTES}");
            return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, text));
        }
        let mut reply = vec![0; length as usize];
        conn.read_exact(&mut reply).await?;
        Ok(Bytes::from(reply))
    };
    let reply = match clock.timeout(crate::CALL, talk).await {
        Ok(reply) => reply.map_err(|error| Error::io(format!("asking {address}"), &error))?,
        Err(elapsed) => return Err(Error::new(ErrorCode::TimedOut, format!("{address}: {elapsed}"))),
    };
    let located = read_reply::<GetBlockLocationsResponse>(reply)?.locations;
    located.ok_or_else(|| Error::new(ErrorCode::FileNotFound, format!("File does not exist: {path}")))
}

/// The bytes of a connection with one call.
fn call(user: &str, method: &str, request: &impl Message) -> Vec<u8> {
    let header = |call_id| RpcRequestHeader {
        rpc_kind: Some(RpcKind::RpcProtocolBuffer as i32),
        rpc_op: Some(0),
        call_id,
        client_id: Bytes::from_static(b"cairn-hdfs-crc32"),
        retry_count: Some(-1),
    };
    let info = UserInformation { effective_user: Some(user.to_owned()), real_user: None };
    let context = IpcConnectionContext { user_info: Some(info), protocol: Some(PROTOCOL.into()) };
    let method =
        RequestHeader { method_name: method.to_owned(), protocol_name: PROTOCOL.into(), client_protocol_version: 1 };
    let frame = |parts: &[Vec<u8>]| {
        let body = parts.concat();
        [&(body.len() as u32).to_be_bytes()[..], &body].concat()
    };
    let opening = [header(CONTEXT_CALL).encode_length_delimited_to_vec(), context.encode_length_delimited_to_vec()];
    let asked = [
        header(0).encode_length_delimited_to_vec(),
        method.encode_length_delimited_to_vec(),
        request.encode_length_delimited_to_vec(),
    ];
    [RPC_OPENING.to_vec(), frame(&opening), frame(&asked)].concat()
}

fn read_reply<M: Message + Default>(mut reply: Bytes) -> Result<M> {
    let unreadable =
        |error: prost::DecodeError| Error::new(ErrorCode::Corrupt, format!("an answer cannot be read: {error}"));
    let header = RpcResponseHeader::decode_length_delimited(&mut reply).map_err(unreadable)?;
    if header.status() == Status::Success {
        return M::decode_length_delimited(&mut reply).map_err(unreadable);
    }
    let said = header.error_message().lines().next().unwrap_or_default().to_owned();
    Err(Error::new(crate::code_of(header.exception_class()), said))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_crc_of_the_right_kind_counts() {
        let options = |kind| BlockChecksumOptions { block_checksum_type: Some(kind), stripe_length: None };
        let composite = OpBlockChecksumResponse {
            bytes_per_crc: 512,
            crc_per_block: 1,
            block_checksum: vec![1, 2, 3, 4].into(),
            crc_type: Some(ChecksumType::ChecksumCrc32c as i32),
            block_checksum_options: Some(options(BlockChecksumType::CompositeCrc as i32)),
        };
        assert_eq!(crc_of(&composite), Some(0x0102_0304));
        // Of Hadoop 2, of another CRC, and no sum at all.
        assert_eq!(crc_of(&OpBlockChecksumResponse { block_checksum_options: None, ..composite.clone() }), None);
        let other = OpBlockChecksumResponse { crc_type: Some(ChecksumType::ChecksumCrc32 as i32), ..composite.clone() };
        assert_eq!(crc_of(&other), None);
        assert_eq!(crc_of(&OpBlockChecksumResponse { block_checksum: Bytes::new(), ..composite }), None);
    }

    #[test]
    fn replies_of_namenodes_are_read() {
        let header = RpcResponseHeader {
            call_id: 0,
            status: Status::Error as i32,
            exception_class: Some("java.io.FileNotFoundException".into()),
            error_message: Some("File does not exist: /a\n\tat a.b(C)".into()),
            ..RpcResponseHeader::default()
        };
        let error =
            read_reply::<GetBlockLocationsResponse>(header.encode_length_delimited_to_vec().into()).unwrap_err();
        assert_eq!((error.code(), error.message()), (ErrorCode::FileNotFound, "File does not exist: /a"));
        let garbage = read_reply::<GetBlockLocationsResponse>(Bytes::from_static(b"\xff\xff")).unwrap_err();
        assert_eq!(garbage.code(), ErrorCode::Corrupt);
    }
}

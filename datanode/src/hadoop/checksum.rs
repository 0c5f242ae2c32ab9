//! Operation 85: the checksum of a block, of which clients make that of a file.
//!
//! Both kinds follow from the data alone, not from its frames, so equal files have equal checksums through whichever door they were written.

use std::io;
use std::sync::Arc;

use bytes::Bytes;
use cairn_common::net::Conn;
use cairn_proto::hadoop::{
    BlockChecksumOptions, BlockChecksumType, BlockOpResponse, ChecksumType, DataStatus, OpBlockChecksum,
    OpBlockChecksumResponse,
};
use cairn_proto::ids::BlockId;
use cairn_proto::{Error, ErrorCode, Result, pb};
use md5::{Digest, Md5};

use super::data::DataReader;
use super::sums::{READ_CHUNK, Sums};
use super::{answer, check_block, decode, refuse, send};
use crate::store::Readable;
use crate::transfer::Transfer;

/// MD5 of the CRCs of all chunks.
pub const MD5_OF_CRCS: i32 = BlockChecksumType::Md5crc as i32;
/// The CRC of the data.
pub const COMPOSITE_CRC: i32 = BlockChecksumType::CompositeCrc as i32;

/// Serves one such request. The connection goes on.
pub(super) async fn serve(transfer: &Arc<Transfer>, conn: &mut Conn, body: Bytes) -> io::Result<()> {
    let request: OpBlockChecksum = decode(&body)?;
    match of_request(transfer, &request).await {
        Ok(checksum) => {
            let ready = answer(DataStatus::StatusSuccess);
            send(conn, &BlockOpResponse { checksum_response: Some(checksum), ..ready }).await
        }
        Err(error) => refuse(conn, &error).await,
    }
}

async fn of_request(transfer: &Transfer, request: &OpBlockChecksum) -> Result<OpBlockChecksumResponse> {
    let (block, generation) = check_block(transfer, &request.header.block)?;
    let readable = transfer.store.read(block, generation).await?;
    let options = request.block_checksum_options.unwrap_or_default();
    let kind = options.block_checksum_type.unwrap_or(MD5_OF_CRCS);
    if options.stripe_length.unwrap_or(0) != 0 || !matches!(kind, MD5_OF_CRCS | COMPOSITE_CRC) {
        let text = format!("block {block}: there is no checksum of type {kind} with stripes here");
        return Err(Error::new(ErrorCode::Unsupported, text).with_subject(block.to_string()));
    }
    // A file may have been asked for up to a length inside of its last block.
    let length = request.header.block.num_bytes.unwrap_or(readable.length).min(readable.length);
    let finalized = readable.state == pb::ReplicaState::Finalized;
    let block_checksum = of_block(transfer, block, readable, length, kind).await;
    if block_checksum.as_ref().is_err_and(|error| error.code() == ErrorCode::Corrupt) && finalized {
        transfer.store.suspect(block);
    }
    Ok(OpBlockChecksumResponse {
        bytes_per_crc: READ_CHUNK as u32,
        crc_per_block: length.div_ceil(READ_CHUNK as u64),
        block_checksum: block_checksum?.into(),
        crc_type: Some(ChecksumType::ChecksumCrc32c as i32),
        block_checksum_options: Some(BlockChecksumOptions { block_checksum_type: Some(kind), stripe_length: None }),
    })
}

/// A checksum of the first `length` bytes of a replica: 16 bytes, or 4 of a composite CRC.
pub async fn of_block(
    transfer: &Transfer,
    block: BlockId,
    readable: Readable,
    length: u64,
    kind: i32,
) -> Result<Vec<u8>> {
    if kind == COMPOSITE_CRC && length == readable.index.data_length() {
        return Ok(readable.index.crc32c().to_be_bytes().to_vec());
    }
    let work = move || {
        let mut data = DataReader::new(&readable, block, 0, length)?;
        if kind == COMPOSITE_CRC { composite(&mut data) } else { md5_of_crcs(&mut data) }
    };
    transfer.env.work.io(work).await
}

fn composite(data: &mut DataReader) -> Result<Vec<u8>> {
    let mut crc = 0u32;
    loop {
        let part = data.next(usize::MAX)?;
        if part.is_empty() {
            return Ok(crc.to_be_bytes().to_vec());
        }
        crc = crc32c::crc32c_append(crc, part);
    }
}

fn md5_of_crcs(data: &mut DataReader) -> Result<Vec<u8>> {
    const PIECE: usize = 512 * READ_CHUNK;
    let (mut md5, mut piece, mut sums) = (Md5::new(), Vec::with_capacity(PIECE), Vec::new());
    while data.position() < data.end() {
        piece.clear();
        let length = usize::try_from(data.end() - data.position()).unwrap_or(usize::MAX).min(PIECE);
        data.copy_to(&mut piece, length)?;
        sums.resize(Sums::READ.bytes_for(length), 0);
        Sums::READ.fill(&piece, &mut sums);
        md5.update(&sums);
    }
    Ok(md5.finalize().to_vec())
}

//! Packets of Hadoop's data transfer, in both directions.
//!
//! | bytes | field | |
//! |---|---|---|
//! | 4 | packet length | big endian: 4, the checksums, the data |
//! | 2 | header length | big endian |
//! | … | header | a protobuf message; 25 bytes, 27 with `syncBlock` |
//! | … | checksums | 4 bytes per chunk of data, big endian |
//! | … | data | |

use bytes::{Buf, Bytes, BytesMut};
use cairn_proto::{Error, ErrorCode, MAX_BLOCK_SIZE, Result, hadoop};
use prost::Message;
use tokio::io::{AsyncRead, AsyncReadExt};

use super::sums::Sums;

/// Longest packet, as in HDFS.
pub const MAX_PACKET_BYTES: usize = 16 << 20;
/// Longest header; those of today have 27 bytes at most.
const MAX_HEADER_BYTES: usize = 512;
/// Bytes before the header.
const LENGTHS: usize = 6;
/// What an encoded header takes.
const HEADER_BYTES: usize = 25;
/// Sequence number of a packet that only says that the writer lives.
pub const HEARTBEAT: i64 = -1;
/// Read at a time.
const READ_BYTES: usize = 512 << 10;

/// What a packet says of itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PacketHeader {
    /// Where its data starts in the block.
    pub offset: u64,
    /// Its number; [`HEARTBEAT`] for none.
    pub seqno: i64,
    /// The block ends with it.
    pub last: bool,
    /// Bytes of data.
    pub data_len: usize,
    /// Make all data up to its end durable.
    pub sync: bool,
}

impl PacketHeader {
    /// Where its data ends in the block.
    pub fn end(&self) -> u64 {
        self.offset + self.data_len as u64
    }

    fn decode(bytes: &[u8]) -> Result<Self> {
        let message = hadoop::PacketHeader::decode(bytes)
            .map_err(|error| refused(format!("the header of a packet cannot be read: {error}")))?;
        let offset = u64::try_from(message.offset_in_block);
        let data_len = usize::try_from(message.data_len);
        let (Ok(offset), Ok(data_len)) = (offset, data_len) else {
            return Err(refused(format!(
                "a packet says that it has {} bytes at {} of the block",
                message.data_len, message.offset_in_block
            )));
        };
        if offset > MAX_BLOCK_SIZE || data_len > MAX_PACKET_BYTES || offset + data_len as u64 > MAX_BLOCK_SIZE {
            return Err(refused(format!("a packet of {data_len} bytes at {offset} ends beyond the largest block")));
        }
        let (seqno, last, sync) = (message.seqno, message.last_packet_in_block, message.sync_block.unwrap_or(false));
        Ok(Self { offset, seqno, last, data_len, sync })
    }

    /// Packet length, header length and header of a packet with so many bytes of checksums.
    fn encode(&self, sums: usize) -> [u8; LENGTHS + HEADER_BYTES] {
        let mut out = [0; LENGTHS + HEADER_BYTES];
        out[..4].copy_from_slice(&((4 + sums + self.data_len) as u32).to_be_bytes());
        out[4..6].copy_from_slice(&(HEADER_BYTES as u16).to_be_bytes());
        out[6] = 0x09;
        out[7..15].copy_from_slice(&self.offset.to_le_bytes());
        out[15] = 0x11;
        out[16..24].copy_from_slice(&self.seqno.to_le_bytes());
        out[24..26].copy_from_slice(&[0x18, u8::from(self.last)]);
        out[26] = 0x25;
        out[27..31].copy_from_slice(&(self.data_len as u32).to_le_bytes());
        out
    }
}

fn refused(text: String) -> Error {
    Error::new(ErrorCode::InvalidArgument, text)
}

/// Appends to `out` what comes before the data of a packet: `header` and its checksums, which must fit it.
pub fn append_head(out: &mut Vec<u8>, header: &PacketHeader, sums: &[u8]) {
    out.extend_from_slice(&header.encode(sums.len()));
    out.extend_from_slice(sums);
}

/// Appends a packet to `out`. `data` writes `header.data_len` bytes.
pub fn append(out: &mut Vec<u8>, header: &PacketHeader, sums: &Sums, data: impl FnOnce(&mut Vec<u8>)) {
    let sum_bytes = sums.bytes_for(header.data_len);
    out.extend_from_slice(&header.encode(sum_bytes));
    let sums_at = out.len();
    out.resize(sums_at + sum_bytes, 0);
    let data_at = out.len();
    data(out);
    debug_assert_eq!(out.len() - data_at, header.data_len, "the header tells the length");
    let (before, data) = out.split_at_mut(data_at);
    sums.fill(data, &mut before[sums_at..]);
}

/// A packet as it arrived. Its checksums have the right number and are not verified.
#[derive(Clone, Debug)]
pub struct Packet {
    /// What it says of itself.
    pub header: PacketHeader,
    /// Its checksums.
    pub sums: Bytes,
    /// Its data.
    pub data: Bytes,
}

/// Takes a whole packet from the start of `buffer`; `Err(need)` inside `Ok`: so many bytes are needed first.
pub fn take(buffer: &mut BytesMut, sums: &Sums) -> Result<Result<Packet, usize>> {
    let Some(lengths) = buffer.first_chunk::<LENGTHS>() else { return Ok(Err(LENGTHS)) };
    let [a, b, c, d, e, f] = *lengths;
    let (packet_len, header_len) = (u32::from_be_bytes([a, b, c, d]) as usize, u16::from_be_bytes([e, f]) as usize);
    if !(4..=MAX_PACKET_BYTES).contains(&packet_len) {
        return Err(refused(format!("a packet says that it has {packet_len} bytes: 4 to {MAX_PACKET_BYTES} can be")));
    }
    if header_len > MAX_HEADER_BYTES {
        let text = format!("the header of a packet says that it has {header_len} bytes, more than {MAX_HEADER_BYTES}");
        return Err(refused(text));
    }
    let Some(header) = buffer.get(LENGTHS..LENGTHS + header_len) else { return Ok(Err(LENGTHS + header_len)) };
    let header = PacketHeader::decode(header)?;
    let sum_bytes = sums.bytes_for(header.data_len);
    if packet_len != 4 + sum_bytes + header.data_len {
        return Err(refused(format!(
            "packet {} has {} bytes of data, so {sum_bytes} of checksums, but says that both are {}",
            header.seqno,
            header.data_len,
            packet_len - 4
        )));
    }
    let need = LENGTHS + header_len + packet_len - 4;
    if buffer.len() < need {
        return Ok(Err(need));
    }
    buffer.advance(LENGTHS + header_len);
    let sums = buffer.split_to(sum_bytes).freeze();
    let data = buffer.split_to(header.data_len).freeze();
    Ok(Ok(Packet { header, sums, data }))
}

/// Reads packets from a writer.
pub struct PacketReader<R> {
    conn: R,
    sums: Sums,
    buffer: BytesMut,
    need: usize,
}

impl<R: AsyncRead + Unpin> PacketReader<R> {
    /// From a connection whose next byte starts a packet.
    pub fn new(conn: R, sums: Sums) -> Self {
        Self { conn, sums, buffer: BytesMut::new(), need: LENGTHS }
    }

    /// The checksums of its packets.
    pub fn sums(&self) -> Sums {
        self.sums
    }

    /// The connection, to be drained after an error.
    pub fn conn(&mut self) -> &mut R {
        &mut self.conn
    }

    /// The next packet; `None`: the writer left between two. Errors of content have code `InvalidArgument`, of the connection `Unreachable`.
    /// May be dropped at any time: nothing that was read is lost.
    pub async fn next(&mut self) -> Result<Option<Packet>> {
        loop {
            match take(&mut self.buffer, &self.sums)? {
                Ok(packet) => return Ok(Some(packet)),
                Err(need) => self.need = need,
            }
            let missing = self.need - self.buffer.len();
            if self.buffer.capacity() - self.buffer.len() < missing {
                // Room for a large packet comes with its bytes, not with its claim.
                self.buffer.reserve(missing.min(self.buffer.len()).max(READ_BYTES));
            }
            let read = self.conn.read_buf(&mut self.buffer).await;
            let gone = |text: String| Error::new(ErrorCode::Unreachable, text);
            match read {
                Ok(0) if self.buffer.is_empty() => return Ok(None),
                Ok(0) => return Err(gone("the writer left in the middle of a packet".into())),
                Ok(_) => {}
                Err(error) => return Err(gone(format!("the writer is gone: {error}"))),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hex(text: &str) -> Vec<u8> {
        let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
        let pair = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
        digits.chunks(2).map(pair).collect()
    }

    fn header(offset: u64, seqno: i64, last: bool, data_len: usize) -> PacketHeader {
        PacketHeader { offset, seqno, last, data_len, sync: false }
    }

    #[test]
    fn the_empty_last_packet_has_the_bytes_that_clients_know() {
        let mut out = Vec::new();
        append(&mut out, &header(0x1122, 0x33, true, 0), &Sums::READ, |_| {});
        let expected = "00000004 0019 09 2211000000000000 11 3300000000000000 1801 25 00000000";
        assert_eq!(out, hex(expected));
        let packet = take(&mut BytesMut::from(&out[..]), &Sums::READ).unwrap().unwrap();
        assert_eq!(packet.header, header(0x1122, 0x33, true, 0));
    }

    #[test]
    fn a_sync_packet_of_a_client_is_understood() {
        // "123456789" at 0 with its CRC-32C; a header of 27 bytes.
        let bytes = hex("00000011 001b 09 0000000000000000 11 0700000000000000 1800 25 09000000 2801 e3069283 \
                         313233343536373839");
        let packet = take(&mut BytesMut::from(&bytes[..]), &Sums::READ).unwrap().unwrap();
        assert_eq!(packet.header, PacketHeader { sync: true, ..header(0, 7, false, 9) });
        assert_eq!(&packet.data[..], b"123456789");
        assert_eq!(Sums::READ.first_flaw(&packet.data, &packet.sums), None);
    }

    #[test]
    fn what_cannot_be_is_refused_before_it_is_read() {
        let head = "0019 09 0000000000000000 11 0700000000000000 1800 25 09000000";
        for bad in [
            format!("00000003 {head}"),
            format!("01000001 {head}"),
            format!("00000010 {head}"),
            "00000004 ffff".into(),
            "00000004 0001 ff".into(),
            "00000004 0019 09 ffffffffffffffff 11 0700000000000000 1800 25 00000000".into(),
            "00000004 0019 09 0000000000000000 11 0700000000000000 1800 25 ffffffff".into(),
        ] {
            let error = take(&mut BytesMut::from(&hex(&bad)[..]), &Sums::READ).unwrap_err();
            assert_eq!(error.code(), ErrorCode::InvalidArgument, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn a_stream_of_packets_comes_through_in_any_pieces(
            sizes in proptest::collection::vec(0usize..3_000, 1..8),
            piece in 1usize..700,
        ) {
            let mut bytes = Vec::new();
            let mut at = 0;
            for (seqno, size) in sizes.iter().enumerate() {
                let data = vec![seqno as u8; *size];
                append(&mut bytes, &header(at, seqno as i64, false, *size), &Sums::READ, |out| out.extend(data));
                at += *size as u64;
            }
            let mut buffer = BytesMut::new();
            let mut seen = Vec::new();
            for piece in bytes.chunks(piece) {
                buffer.extend_from_slice(piece);
                while let Ok(packet) = take(&mut buffer, &Sums::READ).unwrap() {
                    prop_assert_eq!(Sums::READ.first_flaw(&packet.data, &packet.sums), None);
                    seen.push(packet.data.len());
                }
            }
            prop_assert!(buffer.is_empty());
            prop_assert_eq!(seen, sizes);
        }
    }
}

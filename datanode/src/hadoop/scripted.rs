//! A scripted Hadoop client over loopback, for tests.

use std::time::Duration;

use bytes::BytesMut;
use cairn_common::net::{Conn, Net};
use cairn_proto::hadoop::op_write_block::Stage;
use cairn_proto::hadoop::*;
use cairn_proto::ids::{BlockId, Generation};
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::packet::{self, Packet};
use super::read_delimited;
use super::sums::Sums;
use crate::store::map::Kind;
use crate::testing::*;

pub(super) const BLOCK: BlockId = BlockId(1_073_741_825);
pub(super) const SUCCESS: i32 = DataStatus::StatusSuccess as i32;
pub(super) const ERROR: i32 = DataStatus::StatusError as i32;
pub(super) const BAD_SUM: i32 = DataStatus::StatusErrorChecksum as i32;
/// Data in a packet of Hadoop's clients.
pub(super) const PACKET: usize = 64_512;

pub(super) fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    let pair = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    digits.chunks(2).map(pair).collect()
}

pub(super) fn named(block: BlockId, generation: Generation) -> ExtendedBlock {
    let (block_id, generation_stamp) = (block.0 as u64, generation.0);
    ExtendedBlock { pool_id: POOL.into(), block_id, generation_stamp, num_bytes: Some(0) }
}

/// Of an operation on any block.
pub(super) fn base(block: ExtendedBlock) -> BaseHeader {
    BaseHeader { block, token: None }
}

pub(super) fn header(block: ExtendedBlock) -> ClientOperationHeader {
    ClientOperationHeader { base_header: base(block), client_name: "DFSClient_1".into() }
}

pub(super) fn datanode(ip: &str, port: u32) -> DatanodeInfo {
    let id = DatanodeId { ip_addr: ip.into(), xfer_port: port, ..Default::default() };
    DatanodeInfo { id, ..Default::default() }
}

pub(super) fn node_info(node: &Node) -> DatanodeInfo {
    let (ip, port) = node.addr.rsplit_once(':').unwrap();
    datanode(ip, port.parse().unwrap())
}

pub(super) fn creation(nodes: &[&Node]) -> OpWriteBlock {
    OpWriteBlock {
        header: header(named(BLOCK, GEN)),
        targets: nodes[1..].iter().map(|node| node_info(node)).collect(),
        stage: Stage::PipelineSetupCreate as i32,
        requested_checksum: Checksum { r#type: 2, bytes_per_checksum: 512 },
        ..Default::default()
    }
}

pub(super) fn recovery(nodes: &[&Node], at: Stage, new: Generation, min: usize, max: usize) -> OpWriteBlock {
    let (min_bytes_rcvd, max_bytes_rcvd) = (min as u64, max as u64);
    let (stage, latest_generation_stamp) = (at as i32, new.0);
    OpWriteBlock { stage, latest_generation_stamp, min_bytes_rcvd, max_bytes_rcvd, ..creation(nodes) }
}

/// One connection of a client.
pub(super) struct Client {
    pub(super) conn: Conn,
}

impl Client {
    pub(super) async fn connect(node: &Node) -> Self {
        Self { conn: Net::tcp().connect(&node.addr, Duration::from_secs(5)).await.unwrap() }
    }

    pub(super) async fn ask(&mut self, code: u8, message: &impl Message) {
        let mut bytes = vec![0, 28, code];
        bytes.extend(message.encode_length_delimited_to_vec());
        self.conn.write_all(&bytes).await.unwrap();
    }

    pub(super) async fn message<M: Message + Default>(&mut self) -> M {
        let read = tokio::time::timeout(Duration::from_secs(30), read_delimited(&mut self.conn, 1 << 20)).await;
        M::decode(read.unwrap().unwrap()).unwrap()
    }

    pub(super) async fn exactly(&mut self, expected: &str) {
        let expected = hex(expected);
        let mut got = vec![0; expected.len()];
        let read = tokio::time::timeout(Duration::from_secs(30), self.conn.read_exact(&mut got)).await;
        read.unwrap().unwrap();
        assert_eq!(got, expected);
    }

    /// Opens a pipeline.
    pub(super) async fn write(node: &Node, request: &OpWriteBlock) -> Self {
        let mut client = Self::connect(node).await;
        client.ask(80, request).await;
        let response: BlockOpResponse = client.message().await;
        assert_eq!((response.status, response.first_bad_link.as_deref()), (SUCCESS, Some("")), "{response:?}");
        client
    }

    pub(super) async fn refused(node: &Node, code: u8, request: &impl Message) -> BlockOpResponse {
        let mut client = Self::connect(node).await;
        client.ask(code, request).await;
        let response: BlockOpResponse = client.message().await;
        assert_ne!(response.status, SUCCESS, "{response:?}");
        response
    }

    pub(super) async fn packet(&mut self, seqno: i64, offset: usize, data: &[u8], sync: bool, last: bool) {
        let bytes = packet_bytes(seqno, offset, data, sync, last);
        // The pipeline may break meanwhile: its acks tell.
        let _ = self.conn.write_all(&bytes).await;
    }

    /// Sends all from `from` on in packets as clients do; returns the next number.
    pub(super) async fn send(&mut self, mut seqno: i64, data: &[u8], from: usize) -> i64 {
        for (at, part) in data[from..].chunks(PACKET).enumerate() {
            self.packet(seqno, from + at * PACKET, part, false, false).await;
            seqno += 1;
        }
        seqno
    }

    pub(super) async fn ack(&mut self) -> PipelineAck {
        self.message().await
    }

    /// Acks of these packets, all good, from so many nodes.
    pub(super) async fn acked(&mut self, seqnos: std::ops::Range<i64>, nodes: usize) {
        for seqno in seqnos {
            let ack = self.ack().await;
            assert_eq!((ack.seqno, ack.reply), (seqno, vec![SUCCESS; nodes]));
        }
    }

    /// Ends the block.
    pub(super) async fn finish(&mut self, seqno: i64, length: usize, nodes: usize) {
        self.packet(seqno, length, &[], false, true).await;
        self.acked(seqno..seqno + 1, nodes).await;
    }

    pub(super) async fn closed(&mut self) {
        let mut rest = Vec::new();
        let read = tokio::time::timeout(Duration::from_secs(30), self.conn.read_to_end(&mut rest)).await;
        let _ = read.expect("the datanode closes the connection");
        assert!(rest.is_empty(), "{rest:?}");
    }

    /// Reads a range; the data from the start of its first chunk.
    pub(super) async fn read(&mut self, offset: usize, len: usize, sums: Sums) -> (u64, Vec<u8>) {
        let send_checksums = Some(sums == Sums::READ);
        let request = OpReadBlock {
            header: header(named(BLOCK, GEN)),
            offset: offset as u64,
            len: len as u64,
            send_checksums,
            ..Default::default()
        };
        self.ask(81, &request).await;
        let response: BlockOpResponse = self.message().await;
        assert_eq!(response.status, SUCCESS, "{response:?}");
        let start = response.read_op_checksum_info.unwrap().chunk_offset;
        let mut out = Vec::new();
        for seqno in 0.. {
            let packet = self.read_packet(&sums).await;
            assert_eq!((packet.header.seqno, packet.header.offset), (seqno, start + out.len() as u64));
            assert_eq!(sums.first_flaw(&packet.data, &packet.sums), None);
            out.extend_from_slice(&packet.data);
            if packet.header.last {
                break;
            }
        }
        self.conn.write_all(&hex("02 08 06")).await.unwrap();
        (start, out)
    }

    pub(super) async fn read_packet(&mut self, sums: &Sums) -> Packet {
        let mut buffer = BytesMut::new();
        loop {
            match packet::take(&mut buffer, sums).unwrap() {
                Ok(packet) => return packet,
                Err(need) => {
                    let have = buffer.len();
                    buffer.resize(need, 0);
                    self.conn.read_exact(&mut buffer[have..]).await.unwrap();
                }
            }
        }
    }
}

pub(super) fn packet_bytes(seqno: i64, offset: usize, data: &[u8], sync: bool, last: bool) -> Vec<u8> {
    let header = packet::PacketHeader { offset: offset as u64, seqno, last, data_len: data.len(), sync: false };
    let mut bytes = Vec::new();
    packet::append(&mut bytes, &header, &Sums::READ, |out| out.extend_from_slice(data));
    if sync {
        bytes[5] += 2;
        bytes.splice(31..31, [0x28, 1]);
    }
    bytes
}

pub(super) async fn write_whole(nodes: &[&Node], data: &[u8]) {
    let mut client = Client::write(nodes[0], &creation(nodes)).await;
    let mut next = 0;
    for (at, part) in data.chunks(PACKET * 40).enumerate() {
        let from = at * PACKET * 40;
        let sent = client.send(next, &data[..from + part.len()], from).await;
        client.acked(next..sent, nodes.len()).await;
        next = sent;
    }
    client.finish(next, data.len(), nodes.len()).await;
    client.closed().await;
}

pub(super) async fn until(node: &Node, mut good: impl FnMut(Option<&Kind>) -> bool) {
    for _ in 0..12_000 {
        if good(node.store().map().get(BLOCK).map(|(_, entry)| entry.kind).as_ref()) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("the replica did not get there");
}

pub(super) async fn native(node: &Node, generation: Generation, length: usize) -> Vec<u8> {
    read_range(&node.addr, BLOCK, generation, 0, length as u64).await.unwrap()
}

//! What Hadoop clients send: RPC, and to a datanode operations and packets.

use bytes::{Bytes, BytesMut};
use cairn_common::net::hadoop::frame;
use cairn_datanode::hadoop::framing::{Framer, SealerPool};
use cairn_datanode::hadoop::packet::{self, MAX_PACKET_BYTES, PacketHeader, PacketReader};
use cairn_datanode::hadoop::read_op;
use cairn_datanode::hadoop::sums::Sums;
use cairn_proto::frame::{FRAME_HEADER_BYTES, FrameHeader};
use cairn_proto::hadoop::{
    GetFileInfoRequest, IpcConnectionContext, OpBlockChecksum, OpReadBlock, OpTransferBlock, OpWriteBlock,
    RequestHeader, RpcRequestHeader, RpcSasl, UserInformation,
};
use cairn_proto::ids::BlockId;
use prost::Message;

use super::input::{Input, at_once};

const BLOCK: BlockId = BlockId(1_073_741_825);

/// A frame of RPC: read, or refused with a reply that says why; the call's message is a part of the frame.
pub fn hadoop_rpc(data: &[u8]) {
    match frame::decode(Bytes::copy_from_slice(data)) {
        Ok(frame::Frame::Call { head, request, .. }) => {
            assert!(head.call_id >= 0 && head.client_id.len() <= frame::MAX_CLIENT_ID_BYTES);
            assert!(request.len() < data.len());
        }
        Ok(frame::Frame::Context { user, real_user }) => {
            assert!((1..=255).contains(&user.len()));
            assert!(real_user.is_none_or(|real| (1..=255).contains(&real.len()) && real != user));
        }
        Ok(_) => {}
        Err(fatal) => {
            assert!(!fatal.error.message.is_empty());
            let reply = frame::encode_fatal(&fatal);
            assert_eq!(u32::from_be_bytes([reply[0], reply[1], reply[2], reply[3]]) as usize, reply.len() - 4);
        }
    }
}

/// A call, a connection context, a SASL message, a ping.
pub fn rpc_seeds() -> Vec<Vec<u8>> {
    let header = |call_id| RpcRequestHeader {
        rpc_kind: Some(2),
        rpc_op: Some(0),
        call_id,
        client_id: vec![7; 16].into(),
        retry_count: Some(0),
    };
    let method = RequestHeader {
        method_name: "getFileInfo".into(),
        protocol_name: "org.apache.hadoop.hdfs.protocol.ClientProtocol".into(),
        client_protocol_version: 1,
    };
    let request = GetFileInfoRequest { src: "/d/f".into() };
    let info = UserInformation { effective_user: Some("ann".into()), real_user: None };
    let context = IpcConnectionContext { user_info: Some(info), protocol: Some(method.protocol_name.clone()) };
    let whole =
        |call_id: i32, parts: &[Vec<u8>]| [header(call_id).encode_length_delimited_to_vec(), parts.concat()].concat();
    vec![
        whole(5, &[method.encode_length_delimited_to_vec(), request.encode_length_delimited_to_vec()]),
        whole(-3, &[context.encode_length_delimited_to_vec()]),
        whole(-33, &[RpcSasl { state: 1, ..RpcSasl::default() }.encode_length_delimited_to_vec()]),
        whole(-4, &[]),
    ]
}

/// A stream of packets: whatever arrives, a packet is as long as its header says, packets come the same in any pieces, and of those that fit
/// their checksums every byte gets into a frame.
pub fn hadoop_packets(data: &[u8]) {
    let mut input = Input::new(data);
    let step = usize::from(input.byte()) * 5 + 1;
    let Ok(sums) = Sums::named(i32::from(input.byte() % 4), u32::from(input.short()) % 2_000) else { return };
    let stream = input.rest();
    let (mut buffer, mut taken, mut consumed) = (BytesMut::new(), Vec::new(), 0);
    let mut framer = Framer::new(BLOCK, 0, sums, &SealerPool::default(), step.is_multiple_of(2));
    let (mut frames, mut expected) = (Vec::new(), Vec::new());
    let refused = 'stream: {
        for piece in stream.chunks(step) {
            buffer.extend_from_slice(piece);
            loop {
                let before = buffer.len();
                match packet::take(&mut buffer, &sums) {
                    Err(_) => break 'stream true,
                    Ok(Err(need)) => {
                        assert!(need > buffer.len() && need <= MAX_PACKET_BYTES + 1_024);
                        assert_eq!(buffer.len(), before, "what is not whole stays");
                        break;
                    }
                    Ok(Ok(packet)) => {
                        consumed += before - buffer.len();
                        assert_eq!(packet.data.len(), packet.header.data_len);
                        assert_eq!(packet.sums.len(), sums.bytes_for(packet.data.len()));
                        assert!(packet.header.end() <= cairn_proto::MAX_BLOCK_SIZE);
                        taken.push(packet.header);
                        if sums.first_flaw(&packet.data, &packet.sums).is_none() {
                            expected.extend_from_slice(&packet.data);
                            frames.extend(framer.push(packet, 0, false));
                        }
                    }
                }
            }
        }
        false
    };
    frames.extend(framer.cut());
    let mut got = Vec::new();
    for cut in frames {
        let chunk = cut.seal().expect("checked above");
        let bytes = Bytes::from(chunk.parts.concat());
        let header = FrameHeader::decode(BLOCK, &bytes).unwrap();
        assert_eq!(header.offset, got.len() as u64);
        got.extend_from_slice(&header.open(bytes.slice(FRAME_HEADER_BYTES..)).unwrap());
    }
    assert!(got == expected);
    let mut reader = PacketReader::new(stream, sums);
    for header in &taken {
        assert_eq!(at_once(reader.next()).unwrap().map(|packet| packet.header), Some(*header));
    }
    match at_once(reader.next()) {
        Ok(None) => assert!(!refused && consumed == stream.len()),
        Ok(Some(_)) => panic!("a packet more than before"),
        Err(_) => assert!(refused || consumed < stream.len()),
    }
}

/// See [`hadoop_packets`].
pub fn packet_seeds() -> Vec<Vec<u8>> {
    let mut out = vec![vec![9, 2, 0, 0]];
    for (kind, chunk) in [(2u8, 512u16), (1, 100), (0, 512)] {
        let sums = Sums::named(i32::from(kind), u32::from(chunk)).unwrap();
        let mut bytes = vec![200, kind];
        bytes.extend_from_slice(&chunk.to_le_bytes());
        let mut offset = 0;
        for (seqno, data_len) in [(0, 700), (1, 0), (2, 1_300)] {
            let header = PacketHeader { offset, seqno, last: false, data_len, sync: false };
            packet::append(&mut bytes, &header, &sums, |out| out.resize(out.len() + data_len, seqno as u8));
            offset += data_len as u64;
        }
        let header = PacketHeader { offset, seqno: 3, last: true, data_len: 0, sync: false };
        packet::append(&mut bytes, &header, &sums, |_| {});
        out.push(bytes);
    }
    out
}

/// An operation: its message has the length that was told, and decodes or does not.
pub fn hadoop_operations(data: &[u8]) {
    let mut rest = data;
    while let Ok(Some((_, body))) = at_once(read_op(&mut rest)) {
        assert!(body.len() <= data.len());
        if let Ok(write) = OpWriteBlock::decode(&body[..]) {
            let checksum = write.requested_checksum;
            if let Ok(sums) = Sums::named(checksum.r#type, checksum.bytes_per_checksum) {
                assert!(sums.bytes_for(MAX_PACKET_BYTES) <= 4 * MAX_PACKET_BYTES);
            }
        }
        let _ = OpReadBlock::decode(&body[..]);
        let _ = OpBlockChecksum::decode(&body[..]);
        let _ = OpTransferBlock::decode(&body[..]);
    }
}

/// See [`hadoop_operations`].
pub fn operation_seeds() -> Vec<Vec<u8>> {
    let mut write = OpWriteBlock { latest_generation_stamp: 1_001, ..OpWriteBlock::default() };
    write.header.client_name = "DFSClient_1".into();
    write.header.base_header.block.pool_id = "pool".into();
    write.targets.resize(2, Default::default());
    let read = OpReadBlock { header: write.header.clone(), offset: 5, len: 7, ..OpReadBlock::default() };
    let operation = |code: u8, body: Vec<u8>| [&[0, 28, code][..], &body].concat();
    let (write, read) = (write.encode_length_delimited_to_vec(), read.encode_length_delimited_to_vec());
    let both = [operation(81, read), operation(80, write)];
    vec![both.concat(), both[0].clone(), vec![0, 28, 82, 0]]
}

//! Reads and writes of a scripted Hadoop client.

use std::time::Duration;

use cairn_proto::hadoop::op_write_block::Stage;
use cairn_proto::hadoop::*;
use cairn_proto::ids::{BlockId, Generation};
use cairn_proto::{ErrorCode, pb};
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::packet::HEARTBEAT;
use super::scripted::*;
use super::sums::Sums;
use crate::store::map::Kind;
use crate::testing::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_one_door_writes_the_other_reads() {
    for data in [text(3_000_017), random(1_500_001, 3), vec![], vec![9]] {
        let nodes = [Node::start().await, Node::start().await, Node::start().await];
        let all: Vec<&Node> = nodes.iter().collect();
        write_whole(&all, &data).await;
        for node in &nodes {
            assert!(native(node, GEN, data.len()).await == data);
            let told = info(&node.addr, BLOCK).await;
            assert_eq!((told.length, told.state()), (data.len() as u64, pb::ReplicaState::Finalized));
            assert_eq!(told.crc32c, crc32c::crc32c(&data));
            node.transfer.verify(BLOCK, GEN).await.unwrap();
            let (start, got) = Client::connect(node).await.read(0, data.len(), Sums::READ).await;
            assert!(start == 0 && got == data);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_told_so_stores_what_would_shrink_as_it_is() {
    let data = text(3_000_017);
    let stored = async |compress: bool| {
        let first = Node::with(|settings| settings.hadoop_compress = compress).await;
        let next = Node::start().await;
        write_whole(&[&first, &next], &data).await;
        let mut stored = Vec::new();
        for node in [&first, &next] {
            assert!(native(node, GEN, data.len()).await == data);
            stored.push(node.transfer.store.read(BLOCK, GEN).await.unwrap().stored);
        }
        // The first node decides for the whole pipeline.
        assert_eq!(stored[0], stored[1]);
        stored[0]
    };
    assert!(stored(false).await > data.len() as u64);
    assert!(stored(true).await < data.len() as u64 / 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_range_of_a_native_block_comes_in_whole_chunks_and_the_socket_serves_on() {
    let node = Node::start().await;
    let data = text(1_300_003);
    write_block(&[&node], BLOCK, &data, true).await;
    let mut client = Client::connect(&node).await;
    let ends = [0, 1, 511, 512, 262_145, 700_001, 1_300_002, 1_300_003];
    for offset in ends {
        for end in ends.iter().copied().filter(|end| *end > offset) {
            let sums = if end % 2 == 0 { Sums::NONE } else { Sums::READ };
            let (start, got) = client.read(offset, end - offset, sums).await;
            let (from, to) = (offset / 512 * 512, end.next_multiple_of(512).min(data.len()));
            assert!(start == from as u64 && got == data[from..to], "{offset}..{end}");
        }
    }
}

#[tokio::test]
async fn answers_have_the_bytes_that_clients_know() {
    let node = Node::start().await;
    let mut client = Client::connect(&node).await;
    client.ask(80, &creation(&[&node])).await;
    client.exactly("04 0800 1200").await;
    client.packet(0, 0, b"123456789", false, false).await;
    client.exactly("06 0800 1000 1800").await;
    client.packet(1, 9, &[], false, true).await;
    client.exactly("06 0802 1000 1800").await;
    client.closed().await;
    let mut client = Client::connect(&node).await;
    let request = OpReadBlock { header: header(named(BLOCK, GEN)), offset: 0, len: 9, ..Default::default() };
    client.ask(81, &request).await;
    client.exactly("0d 0800 22 09 0a05 0802108004 1000").await;
    client.exactly("00000011 0019 09 0000000000000000 11 0000000000000000 1800 25 09000000 e3069283").await;
    client.exactly("313233343536373839").await;
    client.exactly("00000004 0019 09 0900000000000000 11 0100000000000000 1801 25 00000000").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flush_shows_a_sync_keeps_and_the_next_packet_may_start_at_its_chunk() {
    let nodes = [Node::start().await, Node::start().await];
    let data = random(5_000, 8);
    let mut client = Client::write(&nodes[0], &creation(&[&nodes[0], &nodes[1]])).await;
    client.packet(0, 0, &data[..700], false, false).await;
    client.acked(0..1, 2).await;
    for node in &nodes {
        assert!(native(node, GEN, 700).await == data[..700]);
        let (_, got) = Client::connect(node).await.read(0, 700, Sums::READ).await;
        assert!(got == data[..700]);
    }
    client.packet(1, 512, &data[512..2_000], true, false).await;
    client.packet(HEARTBEAT, 0, &[], false, false).await;
    // A heartbeat waits for nothing, so it may overtake.
    let mut seen = vec![client.ack().await.seqno, client.ack().await.seqno];
    seen.sort_unstable();
    assert_eq!(seen, [HEARTBEAT, 1]);
    // An empty sync, then again from the chunk's start.
    client.packet(2, 2_000, &[], true, false).await;
    client.packet(3, 1_536, &data[1_536..], false, false).await;
    client.acked(2..4, 2).await;
    client.finish(4, data.len(), 2).await;
    for node in &nodes {
        assert!(native(node, GEN, data.len()).await == data);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_visible_length_is_told_by_rpc_on_the_same_port() {
    let node = Node::start().await;
    let mut client = Client::write(&node, &creation(&[&node])).await;
    client.packet(0, 0, &[1; 700], false, false).await;
    client.acked(0..1, 1).await;
    let mut rpc = Client::connect(&node).await;
    let mut bytes = b"hrpc\x09\x00\x00".to_vec();
    let mut frame = |parts: &[Vec<u8>]| {
        let body = parts.concat();
        bytes.extend((body.len() as u32).to_be_bytes());
        bytes.extend(body);
    };
    let protocol = "org.apache.hadoop.hdfs.protocol.ClientDatanodeProtocol".to_owned();
    let called = |call_id| RpcRequestHeader {
        rpc_kind: Some(2),
        rpc_op: Some(0),
        call_id,
        client_id: vec![7; 16].into(),
        retry_count: Some(-1),
    };
    let user_info = Some(UserInformation { effective_user: Some("ann".into()), ..Default::default() });
    let context = IpcConnectionContext { user_info, protocol: Some(protocol.clone()) };
    frame(&[called(-3).encode_length_delimited_to_vec(), context.encode_length_delimited_to_vec()]);
    for (call_id, id) in [(0, BLOCK), (1, BlockId(5))] {
        let method = RequestHeader {
            method_name: "getReplicaVisibleLength".into(),
            protocol_name: protocol.clone(),
            client_protocol_version: 1,
        };
        let request = GetReplicaVisibleLengthRequest { block: named(id, GEN) };
        frame(&[
            called(call_id).encode_length_delimited_to_vec(),
            method.encode_length_delimited_to_vec(),
            request.encode_length_delimited_to_vec(),
        ]);
    }
    rpc.conn.write_all(&bytes).await.unwrap();
    for _ in 0..2 {
        let mut body = vec![0; rpc.conn.read_u32().await.unwrap() as usize];
        rpc.conn.read_exact(&mut body).await.unwrap();
        let mut rest = &body[..];
        let header = RpcResponseHeader::decode_length_delimited(&mut rest).unwrap();
        if header.call_id == 0 {
            let told = GetReplicaVisibleLengthResponse::decode_length_delimited(&mut rest).unwrap();
            assert_eq!(told.length, 700);
        } else {
            assert!(header.error_message.unwrap().contains("no replica of block 5"));
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damaged_and_changed_packets_fail_the_write_and_never_reach_a_replica() {
    let data = random(1_000, 4);
    for (offset, flip, expected) in [(700, 40, BAD_SUM), (512, 40, BAD_SUM)] {
        let node = Node::start().await;
        let mut client = Client::write(&node, &creation(&[&node])).await;
        client.packet(0, 0, &data[..700], false, false).await;
        client.acked(0..1, 1).await;
        let mut bytes = packet_bytes(1, offset, &data[offset..], false, false);
        let at = bytes.len() - flip;
        bytes[at] ^= 1;
        client.conn.write_all(&bytes).await.unwrap();
        let ack = client.ack().await;
        assert_eq!((ack.seqno, ack.reply), (1, vec![expected]));
        client.closed().await;
        assert_eq!(info(&node.addr, BLOCK).await.length, 700);
    }
    let node = Node::start().await;
    for (offset, part) in [(512, vec![1; 488]), (900, vec![1; 10]), (0, vec![1; 10])] {
        let _ = node.store().delete(BLOCK, GEN, "").await;
        let mut client = Client::write(&node, &creation(&[&node])).await;
        client.packet(0, 0, &data[..512], false, false).await;
        client.packet(1, 512, &data[512..700], false, false).await;
        client.acked(0..2, 1).await;
        client.packet(2, offset, &part, false, false).await;
        let ack = client.ack().await;
        assert_eq!((ack.seqno, ack.reply), (2, vec![ERROR]), "{offset}");
        client.closed().await;
        assert!(native(&node, GEN, 700).await == data[..700]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn survivors_go_on_from_one_length_and_what_is_resent_is_compared() {
    let nodes = [Node::start().await, Node::start().await, Node::start().await];
    let all: Vec<&Node> = nodes.iter().collect();
    let data = text(2_000_000);
    let mut client = Client::write(&nodes[0], &creation(&all)).await;
    let next = client.send(0, &data[..1_000_000], 0).await;
    client.acked(0..next, 3).await;
    drop(client);
    // The first node is given up. The client knows less than the others hold: some acks were lost.
    let known = 10 * PACKET;
    let left = [all[1], all[2]];
    let new = Generation(GEN.0 + 5);
    let mut client =
        Client::write(left[0], &recovery(&left, Stage::PipelineSetupStreamingRecovery, new, known, 1_000_000)).await;
    let end = client.send(40, &data, known).await;
    client.acked(40..end, 2).await;
    client.finish(end, data.len(), 2).await;
    for node in left {
        assert!(native(node, new, data.len()).await == data);
    }
    // What is resent and differs is refused.
    let other = Node::start().await;
    let mut client = Client::write(&other, &creation(&[&other])).await;
    client.send(0, &data[..100_000], 0).await;
    client.acked(0..2, 1).await;
    drop(client);
    let mut client =
        Client::write(&other, &recovery(&[&other], Stage::PipelineSetupStreamingRecovery, new, PACKET, 100_000)).await;
    client.packet(9, PACKET, &random(1_000, 1), false, false).await;
    let ack = client.ack().await;
    assert_eq!((ack.seqno, ack.reply), (9, vec![ERROR]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_joins_and_a_lost_last_ack_is_made_up_for() {
    let nodes = [Node::start().await, Node::start().await, Node::start().await];
    let data = text(900_000);
    let mut client = Client::write(&nodes[0], &creation(&[&nodes[0], &nodes[1]])).await;
    let next = client.send(0, &data, 0).await;
    client.acked(0..next, 2).await;
    drop(client);
    let request = OpTransferBlock {
        header: header(named(BLOCK, GEN)),
        targets: vec![node_info(&nodes[2])],
        ..Default::default()
    };
    let mut client = Client::connect(&nodes[1]).await;
    client.ask(86, &request).await;
    let response: BlockOpResponse = client.message().await;
    assert_eq!(response.status, SUCCESS, "{response:?}");
    let (pair, new) = ([&nodes[1], &nodes[2]], Generation(GEN.0 + 1));
    let mut client =
        Client::write(pair[0], &recovery(&pair, Stage::PipelineSetupStreamingRecovery, new, data.len(), data.len()))
            .await;
    client.packet(next, data.len(), &[], false, true).await;
    drop(client);
    until(pair[0], |kind| matches!(kind, Some(Kind::Finalized { .. } | Kind::Recovering { .. }))).await;
    let newest = Generation(GEN.0 + 2);
    let mut close = recovery(&pair, Stage::PipelineCloseRecovery, newest, data.len(), data.len());
    close.header = header(named(BLOCK, new));
    let mut client = Client::write(pair[0], &close).await;
    client.closed().await;
    for node in pair {
        until(node, |kind| matches!(kind, Some(Kind::Finalized { .. }))).await;
        assert!(native(node, newest, data.len()).await == data);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_node_that_failed_is_named() {
    let nodes = [Node::start().await, Node::start().await];
    let mut request = creation(&[&nodes[0], &nodes[1]]);
    request.targets.push(datanode("127.0.0.1", 1));
    let response = Client::refused(&nodes[0], 80, &request).await;
    assert_eq!((response.status, response.first_bad_link.as_deref()), (ERROR, Some("127.0.0.1:1")));
    // And of one that breaks later: the ack of the next packet.
    until(&nodes[0], |kind| kind.is_none()).await;
    until(&nodes[1], |kind| kind.is_none()).await;
    let mut client = Client::write(&nodes[0], &creation(&[&nodes[0], &nodes[1]])).await;
    client.packet(0, 0, b"abc", false, false).await;
    client.acked(0..1, 2).await;
    nodes[1].transfer.stop();
    client.packet(1, 3, b"def", false, false).await;
    let ack = client.ack().await;
    assert_eq!(ack.reply, [SUCCESS, ERROR]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn checksums_depend_on_the_data_alone() {
    let data = text(700_001);
    let (through_native, through_hadoop) = (Node::start().await, Node::start().await);
    write_block(&[&through_native], BLOCK, &data, true).await;
    write_whole(&[&through_hadoop], &data).await;
    let mut crcs = Vec::new();
    data.chunks(512).for_each(|chunk| crcs.extend(crc32c::crc32c(chunk).to_be_bytes()));
    use md5::{Digest, Md5};
    let whole = [Md5::digest(&crcs).to_vec(), crc32c::crc32c(&data).to_be_bytes().to_vec()];
    let part = [Md5::digest(&crcs[..400]).to_vec(), crc32c::crc32c(&data[..51_200]).to_be_bytes().to_vec()];
    for node in [&through_native, &through_hadoop] {
        let mut client = Client::connect(node).await;
        for (length, expected) in [(data.len(), &whole), (51_200, &part)] {
            for (kind, expected) in (1..).zip(expected) {
                let block = ExtendedBlock { num_bytes: Some(length as u64), ..named(BLOCK, GEN) };
                let options = BlockChecksumOptions { block_checksum_type: Some(kind), stripe_length: None };
                let request = OpBlockChecksum { header: base(block), block_checksum_options: Some(options) };
                client.ask(85, &request).await;
                let response: BlockOpResponse = client.message().await;
                let checksum = response.checksum_response.unwrap();
                assert_eq!((checksum.bytes_per_crc, checksum.crc_type), (512, Some(2)));
                assert_eq!(checksum.crc_per_block, length.div_ceil(512) as u64);
                assert_eq!(checksum.block_checksum, *expected, "{kind} of {length}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_served_is_said_in_the_protocols_own_form() {
    let node = Node::start().await;
    write_block(&[&node], BLOCK, b"some data", false).await;
    let read =
        |block: ExtendedBlock, offset, len| OpReadBlock { header: header(block), offset, len, ..Default::default() };
    for (request, word) in [
        (read(named(BlockId(5), GEN), 0, 1), "no replica"),
        (read(named(BLOCK, GEN.next()), 0, 1), "older"),
        (read(named(BLOCK, GEN), 5, 5), "don't match"),
        (read(named(BLOCK, GEN), u64::MAX, 2), "don't match"),
        (read(ExtendedBlock { pool_id: "BP-1".into(), ..named(BLOCK, GEN) }, 0, 1), "BP-1"),
        (read(ExtendedBlock { block_id: u64::MAX, ..named(BLOCK, GEN) }, 0, 1), "no block id"),
    ] {
        let response = Client::refused(&node, 81, &request).await;
        assert_eq!(response.status, ERROR);
        assert!(response.message.as_ref().unwrap().contains(word), "{response:?}");
    }
    let response = Client::refused(&node, 80, &recovery(&[&node], Stage::PipelineSetupAppend, GEN.next(), 9, 9)).await;
    assert!(response.message.as_ref().unwrap().contains("opens a new block"), "{response:?}");
    let stale = OpWriteBlock { header: header(named(BLOCK, Generation(GEN.0 - 1))), ..creation(&[&node]) };
    assert!(Client::refused(&node, 80, &stale).await.message.unwrap().contains("newer"));
    let mut odd = creation(&[&node]);
    odd.requested_checksum = Checksum { r#type: 9, bytes_per_checksum: 512 };
    assert!(Client::refused(&node, 80, &odd).await.message.unwrap().contains("checksum type 9"));
    // Short-circuit reads: the word that makes clients read over the network and not ask again.
    let asked = base(named(BLOCK, GEN));
    assert_eq!(Client::refused(&node, 87, &asked).await.status, DataStatus::StatusErrorUnsupported as i32);
    assert_eq!(Client::refused(&node, 89, &asked).await.status, DataStatus::StatusErrorUnsupported as i32);
    // What a real datanode closes on without a word.
    for opening in ["001c 50 ffffffff7f", "001c 50 ffffff7f", "001c 52 00", "001c 51 05 0102030405"] {
        let mut client = Client::connect(&node).await;
        client.conn.write_all(&hex(opening)).await.unwrap();
        client.closed().await;
    }
    let mut client = Client::connect(&node).await;
    client.conn.write_all(&hex("deadbeef 02 0800")).await.unwrap();
    let refusal: super::SaslMessage = client.message().await;
    assert_eq!(refusal.status, 2);
    assert!(refusal.message.unwrap().contains("security off"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_stalls_or_leaves_holds_nothing_and_its_block_can_be_recovered() {
    // Longer than this client may be held up between two words.
    let node = Node::with(|settings| settings.idle_timeout_ms = 4_000).await;
    let data = random(PACKET, 6);
    for stalls in [true, false] {
        let _ = node.store().delete(BLOCK, GEN, "").await;
        let mut client = Client::write(&node, &creation(&[&node])).await;
        client.packet(0, 0, &data, false, false).await;
        client.acked(0..1, 1).await;
        let bytes = packet_bytes(1, PACKET, &data, false, false);
        client.conn.write_all(&bytes[..1_000]).await.unwrap();
        if stalls {
            let ack = client.ack().await;
            assert_eq!(ack.reply, [ERROR]);
        }
        drop(client);
        until(
            &node,
            |kind| matches!(kind, Some(Kind::Recovering { index, .. }) if index.data_length() == PACKET as u64),
        )
        .await;
        for _ in 0..12_000 {
            if node.transfer.metrics.active.load(std::sync::atomic::Ordering::Relaxed) == 0 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(node.transfer.metrics.active.load(std::sync::atomic::Ordering::Relaxed), 0);
    }
    assert_eq!(node.store().read(BLOCK, GEN.next()).await.err().unwrap().code(), ErrorCode::StaleGeneration);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thousands_of_tiny_packets_come_through_before_any_ack_is_read() {
    let node = Node::start().await;
    let mut client = Client::write(&node, &creation(&[&node])).await;
    let mut bytes = Vec::new();
    (0..3_000).for_each(|at| bytes.extend(packet_bytes(at as i64, at, &[at as u8], false, false)));
    client.conn.write_all(&bytes).await.unwrap();
    client.acked(0..3_000, 1).await;
    client.finish(3_000, 3_000, 1).await;
    let expected: Vec<u8> = (0..3_000).map(|at| at as u8).collect();
    assert!(native(&node, GEN, 3_000).await == expected);
}

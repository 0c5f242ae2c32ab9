//! Pipelines over loopback with a scripted writer.

use std::time::Duration;

use cairn_common::net;
use cairn_proto::dataplane::MarkerKind;
use cairn_proto::ids::{BlockId, Generation};
use cairn_proto::{Error, ErrorCode, pb};

use super::{copy, recover};
use crate::store::map::Kind;
use crate::testing::*;

const BLOCK: BlockId = BlockId(1_073_741_825);
const FRAME: usize = 64 << 10;

pub(super) fn recovery(nodes: &[&Node], new: u64, keep: usize) -> pb::WriteBlock {
    pb::WriteBlock {
        block: block_of(BLOCK, Generation(new)),
        stage: pb::WriteStage::PipelineRecovery as i32,
        keep_length: keep as u64,
        old_generation: GEN.0,
        ..setup(BLOCK, nodes)
    }
}

pub(super) async fn whole(node: &Node, generation: Generation, length: usize) -> Vec<u8> {
    read_range(&node.addr, BLOCK, generation, 0, length as u64).await.unwrap()
}

/// Waits until the node's replica is in this state.
pub(super) async fn until(node: &Node, mut good: impl FnMut(&Kind) -> bool) {
    for _ in 0..12_000 {
        if node.store().map().get(BLOCK).is_some_and(|(_, entry)| good(&entry.kind)) {
            return;
        }
        tokio::task::yield_now().await;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("the replica did not get there");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_hops_bit_for_bit() {
    let nodes = [Node::start().await, Node::start().await, Node::start().await];
    let all: Vec<&Node> = nodes.iter().collect();
    for (id, data, compress) in
        [(1, random(9_000_001, 1), true), (2, text(9_000_001), true), (3, vec![], true), (4, vec![7], false)]
    {
        let block = BlockId(id);
        write_block(&all, block, &data, compress).await;
        for node in &nodes {
            let got = read_range(&node.addr, block, GEN, 0, data.len() as u64).await.unwrap();
            assert!(got == data, "block {id}");
            let told = info(&node.addr, block).await;
            assert_eq!((told.length, told.state()), (data.len() as u64, pb::ReplicaState::Finalized));
            assert_eq!(told.crc32c, crc32c::crc32c(&data));
            node.transfer.verify(block, GEN).await.unwrap();
        }
    }
}

#[tokio::test]
async fn any_odd_range_reads_right() {
    let node = Node::start().await;
    let data = text(1_300_003);
    write_block(&[&node], BLOCK, &data, true).await;
    let ends = [0, 1, 511, 262_143, 262_144, 262_145, 700_001, 1_048_576, 1_300_002, 1_300_003];
    for offset in ends {
        for end in ends.iter().copied().filter(|end| *end > offset) {
            let got = read_range(&node.addr, BLOCK, GEN, offset, end - offset).await.unwrap();
            assert!(got == data[offset as usize..end as usize], "{offset}..{end}");
        }
    }
    for (offset, length) in [(0, 1_300_004), (1_300_003, 1), (u64::MAX, 2)] {
        let error = read_range(&node.addr, BLOCK, GEN, offset, length).await.unwrap_err();
        assert_eq!(error.code(), ErrorCode::InvalidArgument);
    }
    let missing = read_range(&node.addr, BlockId(5), GEN, 0, 1).await.unwrap_err();
    assert_eq!(missing.code(), ErrorCode::BlockNotFound);
    let newer = read_range(&node.addr, BLOCK, GEN.next(), 0, 1).await.unwrap_err();
    assert_eq!(newer.code(), ErrorCode::StaleGeneration);
}

#[tokio::test]
async fn flush_shows_sync_keeps_and_heartbeats_are_answered() {
    let nodes = [Node::start().await, Node::start().await];
    let data = random(3 * FRAME + 17, 5);
    let sealed = frames(BLOCK, &data, 0, FRAME, false);
    let mut pipe = Pipe::open(&nodes[0].addr, setup(BLOCK, &[&nodes[0], &nodes[1]])).await.unwrap();
    pipe.send(&sealed[..2]).await;
    pipe.mark(MarkerKind::Flush, 2 * FRAME).await;
    assert_eq!(pipe.wait_for(pb::AckKind::AckFlushed).await.length, 2 * FRAME as u64);
    for node in &nodes {
        assert!(whole(node, GEN, 2 * FRAME).await == data[..2 * FRAME]);
        assert_eq!(info(&node.addr, BLOCK).await.state(), pb::ReplicaState::BeingWritten);
        assert!(read_range(&node.addr, BLOCK, GEN, 0, 2 * FRAME as u64 + 1).await.is_err());
    }
    pipe.mark(MarkerKind::Heartbeat, 2 * FRAME).await;
    assert_eq!(pipe.ack().await.length, 2 * FRAME as u64);
    pipe.send(&sealed[2..]).await;
    pipe.mark(MarkerKind::Sync, data.len()).await;
    assert_eq!(pipe.wait_for(pb::AckKind::AckSynced).await.length, data.len() as u64);
    pipe.mark(MarkerKind::Finish, data.len()).await;
    assert_eq!(pipe.wait_for(pb::AckKind::AckFinished).await.length, data.len() as u64);
}

#[tokio::test]
async fn a_dead_next_node_is_named_by_its_index() {
    let nodes = [Node::start().await, Node::start().await];
    let mut request = setup(BLOCK, &[&nodes[0], &nodes[1]]);
    request.targets.push(pb::Replica { address: "127.0.0.1:1".into(), ..Default::default() });
    let (error, index) = Pipe::open(&nodes[0].addr, request).await.err().unwrap();
    assert_eq!((error.code(), index), (ErrorCode::Unreachable, 2));
    // Nothing was written, so nothing is left.
    for node in &nodes {
        for _ in 0..12_000 {
            if node.store().map().get(BLOCK).is_none() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert!(node.store().map().get(BLOCK).is_none());
    }
}

/// A datanode that opens its part of the pipeline and then does `then`.
pub(super) async fn scripted<F: Future<Output = ()> + Send>(
    then: impl FnOnce(net::Conn) -> F + Send + 'static,
) -> pb::Replica {
    use cairn_common::net::opening::{Opening, ServerIdentity, read_opening};
    let listener = net::Net::tcp().bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().to_string();
    tokio::spawn(async move {
        let conn = listener.accept().await.unwrap();
        let clock = cairn_common::clock::Clock::system();
        let opened = read_opening(conn, &ServerIdentity::default(), &clock).await.unwrap();
        let Opening::Data { mut conn, .. } = opened else { panic!() };
        let _: pb::DataRequest = net::read_message(&mut conn, "upstream").await.unwrap();
        let ready = pb::WriteReady { storage_ids: vec!["S".into()], ..Default::default() };
        net::write_message(&mut conn, &ready).await.unwrap();
        then(conn).await;
    });
    pb::Replica { address, ..Default::default() }
}

/// A node that takes everything and says nothing after it was opened.
async fn silent() -> pb::Replica {
    scripted(|mut conn| async move {
        use tokio::io::AsyncReadExt;
        let mut rest = Vec::new();
        let _ = conn.read_to_end(&mut rest).await;
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_node_is_given_up_while_the_writer_keeps_talking() {
    let next = silent().await;
    let node = Node::with(|settings| settings.pipeline_timeout_ms = 400).await;
    let mut request = setup(BLOCK, &[&node]);
    request.targets = vec![next];
    let mut pipe = Pipe::open(&node.addr, request).await.unwrap();
    pipe.send(&frames(BLOCK, &random(FRAME, 8), 0, FRAME, false)).await;
    // Each answer is followed by the next word: nothing ever pauses.
    let talk = async {
        loop {
            pipe.mark(MarkerKind::Heartbeat, FRAME).await;
            let ack = pipe.ack().await;
            if ack.kind() == pb::AckKind::AckError {
                return ack;
            }
        }
    };
    let ack = tokio::time::timeout(Duration::from_secs(60), talk).await.unwrap();
    assert_eq!((ack.failed_index, Error::from_wire(ack.error.unwrap()).code()), (1, ErrorCode::TimedOut));
}

async fn write_above(node: &Node, next: pb::Replica, bytes: usize) -> pb::WriteAck {
    let data = random(bytes, 8);
    let mut request = setup(BLOCK, &[node]);
    request.targets = vec![next];
    let mut pipe = Pipe::open(&node.addr, request).await.unwrap();
    let sealed = frames(BLOCK, &data, 0, FRAME, false);
    pipe.send(&sealed).await;
    pipe.wait_for(pb::AckKind::AckError).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_leaves_in_the_middle_breaks_the_pipeline_and_the_replica_stays() {
    let next = scripted(|mut conn| async move {
        use tokio::io::AsyncReadExt;
        let mut bytes = vec![0; 100_000];
        conn.read_exact(&mut bytes).await.unwrap();
    })
    .await;
    let node = Node::start().await;
    let ack = write_above(&node, next, 4 * FRAME).await;
    assert_eq!(ack.failed_index, 1);
    assert_eq!(Error::from_wire(ack.error.unwrap()).code(), ErrorCode::Unreachable);
    until(&node, |kind| matches!(kind, Kind::Recovering { .. })).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_falls_silent_is_given_up() {
    let next = silent().await;
    let node = Node::with(|settings| settings.pipeline_timeout_ms = 1_000).await;
    let ack = write_above(&node, next, FRAME).await;
    assert_eq!(ack.failed_index, 1);
    assert_eq!(Error::from_wire(ack.error.unwrap()).code(), ErrorCode::TimedOut);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_next_nodes_own_words_win_over_a_broken_connection() {
    let next = scripted(|mut conn| async move {
        let error = Error::new(ErrorCode::DiskFull, "no room").to_wire();
        let ack = pb::WriteAck {
            kind: pb::AckKind::AckError as i32,
            error: Some(error),
            failed_index: 1,
            ..Default::default()
        };
        net::write_message(&mut conn, &ack).await.unwrap();
    })
    .await;
    let ack = write_above(&Node::start().await, next, FRAME).await;
    assert_eq!(ack.failed_index, 2);
    assert_eq!(Error::from_wire(ack.error.unwrap()).code(), ErrorCode::DiskFull);
}

#[tokio::test]
async fn a_damaged_frame_is_refused_and_nothing_of_it_is_written() {
    let node = Node::start().await;
    let data = random(2 * FRAME, 3);
    let mut sealed = frames(BLOCK, &data, 0, FRAME, false);
    let mut payload = sealed[1].payload.to_vec();
    payload[77] ^= 4;
    sealed[1].payload = payload.into();
    let mut pipe = Pipe::open(&node.addr, setup(BLOCK, &[&node])).await.unwrap();
    pipe.send(&sealed).await;
    let ack = pipe.wait_for(pb::AckKind::AckError).await;
    assert_eq!((ack.kind(), ack.failed_index), (pb::AckKind::AckError, 0));
    assert_eq!(Error::from_wire(ack.error.unwrap()).code(), ErrorCode::Corrupt);
    until(&node, |kind| matches!(kind, Kind::Recovering { .. })).await;
    assert_eq!(info(&node.addr, BLOCK).await.length, FRAME as u64);
    assert!(whole(&node, GEN, FRAME).await == data[..FRAME]);
}

#[tokio::test]
async fn recovery_at_a_frames_end_makes_equal_replicas() {
    let nodes = [Node::start().await, Node::start().await];
    let data = random(4 * FRAME, 2);
    let sealed = frames(BLOCK, &data, 0, FRAME, false);
    let mut pipe = Pipe::open(&nodes[0].addr, setup(BLOCK, &[&nodes[0], &nodes[1]])).await.unwrap();
    pipe.send(&sealed[..3]).await;
    pipe.wait_held(3 * FRAME).await;
    drop(pipe);
    // Two frames are kept, the third is sent again and differs (as after a partial write); then the rest.
    let (bad, index) = Pipe::open(&nodes[0].addr, recovery(&[&nodes[0]], 1_005, 2 * FRAME + 1)).await.err().unwrap();
    assert_eq!((bad.code(), index), (ErrorCode::InvalidArgument, 0));
    let both = [&nodes[0], &nodes[1]];
    let mut pipe = Pipe::open(&nodes[0].addr, recovery(&both, 1_005, 2 * FRAME)).await.unwrap();
    pipe.send(&sealed[2..]).await;
    pipe.mark(MarkerKind::Finish, data.len()).await;
    assert_eq!(pipe.wait_for(pb::AckKind::AckFinished).await.kind(), pb::AckKind::AckFinished);
    for node in &nodes {
        assert!(whole(node, Generation(1_005), data.len()).await == data);
        node.transfer.verify(BLOCK, Generation(1_005)).await.unwrap();
        // The old generation and an old recovery are fenced.
        let (error, _) = Pipe::open(&node.addr, recovery(&[node], 1_003, 0)).await.err().unwrap();
        assert_eq!(error.code(), ErrorCode::StaleGeneration);
        let (error, _) = Pipe::open(&node.addr, setup(BLOCK, &[node])).await.err().unwrap();
        assert_eq!(error.code(), ErrorCode::StaleGeneration);
    }
}

#[tokio::test]
async fn a_newer_writer_cuts_the_older_one() {
    let node = Node::start().await;
    let data = random(3 * FRAME, 2);
    let sealed = frames(BLOCK, &data, 0, FRAME, false);
    let mut old = Pipe::open(&node.addr, setup(BLOCK, &[&node])).await.unwrap();
    old.send(&sealed[..2]).await;
    old.wait_held(2 * FRAME).await;
    let mut new = Pipe::open(&node.addr, recovery(&[&node], 1_002, FRAME)).await.unwrap();
    let ack = old.wait_for(pb::AckKind::AckError).await;
    assert_eq!(Error::from_wire(ack.error.unwrap()).code(), ErrorCode::StaleGeneration);
    old.send(&sealed[2..]).await;
    let other = random(FRAME, 99);
    let mut joined = data[..FRAME].to_vec();
    joined.extend_from_slice(&other);
    new.send(&frames(BLOCK, &joined, FRAME, FRAME, false)).await;
    new.mark(MarkerKind::Finish, 2 * FRAME).await;
    assert_eq!(new.wait_for(pb::AckKind::AckFinished).await.kind(), pb::AckKind::AckFinished);
    assert!(whole(&node, Generation(1_002), 2 * FRAME).await == joined);
}

#[tokio::test]
async fn a_finalized_replica_takes_the_new_generation_and_compares_what_is_resent() {
    let node = Node::start().await;
    let data = random(3 * FRAME, 2);
    let sealed = frames(BLOCK, &data, 0, FRAME, false);
    let mut pipe = Pipe::open(&node.addr, setup(BLOCK, &[&node])).await.unwrap();
    pipe.send(&sealed).await;
    pipe.mark(MarkerKind::Finish, data.len()).await;
    pipe.wait_for(pb::AckKind::AckFinished).await;

    let mut again = Pipe::open(&node.addr, recovery(&[&node], 1_002, FRAME)).await.unwrap();
    again.send(&sealed[1..]).await;
    again.mark(MarkerKind::Finish, data.len()).await;
    assert_eq!(again.wait_for(pb::AckKind::AckFinished).await.length, data.len() as u64);
    assert!(whole(&node, Generation(1_002), data.len()).await == data);

    let mut differs = Pipe::open(&node.addr, recovery(&[&node], 1_003, FRAME)).await.unwrap();
    differs.send(&frames(BLOCK, &random(2 * FRAME, 7), FRAME, FRAME, false)).await;
    let ack = differs.wait_for(pb::AckKind::AckError).await;
    assert_eq!(Error::from_wire(ack.error.unwrap()).code(), ErrorCode::Corrupt);

    let mut shorter = Pipe::open(&node.addr, recovery(&[&node], 1_004, FRAME)).await.unwrap();
    shorter.mark(MarkerKind::Finish, FRAME).await;
    let ack = shorter.wait_for(pb::AckKind::AckError).await;
    assert_eq!(Error::from_wire(ack.error.unwrap()).code(), ErrorCode::InvalidArgument);
    assert!(whole(&node, Generation(1_004), data.len()).await == data);
}

#[tokio::test]
async fn copies_go_down_a_pipeline_and_a_second_one_is_refused() {
    let nodes = [Node::start().await, Node::start().await, Node::start().await];
    let data = text(3_000_000);
    write_block(&[&nodes[0]], BLOCK, &data, true).await;
    let order = pb::ReplicateBlock {
        block: block_of(BLOCK, GEN),
        length: data.len() as u64,
        targets: vec![nodes[1].target(), nodes[2].target()],
    };
    assert_eq!(copy::replicate(&nodes[0].transfer, &order).await.unwrap(), data.len() as u64);
    for node in &nodes[1..] {
        assert!(whole(node, GEN, data.len()).await == data);
    }
    let error = copy::replicate(&nodes[0].transfer, &order).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::FileAlreadyExists);
}

#[tokio::test]
async fn an_abandoned_block_gets_one_length_everywhere() {
    let nodes = [Node::start().await, Node::start().await];
    let data = random(3 * FRAME, 2);
    let sealed = frames(BLOCK, &data, 0, FRAME, false);
    for (node, count) in nodes.iter().zip([3, 2]) {
        let mut pipe = Pipe::open(&node.addr, setup(BLOCK, &[node])).await.unwrap();
        pipe.send(&sealed[..count]).await;
        pipe.wait_held(count * FRAME).await;
    }
    let order = pb::RecoverBlock {
        truncate_to: None,
        silent: 0,
        block: block_of(BLOCK, GEN),
        new_generation: 1_010,
        replicas: nodes.iter().map(Node::target).collect(),
    };
    let recovered = recover::recover(&nodes[0].transfer, &order).await.unwrap();
    assert_eq!((recovered.length, recovered.storage_ids.len()), (2 * FRAME as u64, 2));
    for node in &nodes {
        assert!(whole(node, Generation(1_010), 2 * FRAME).await == data[..2 * FRAME]);
        assert_eq!(info(&node.addr, BLOCK).await.state(), pb::ReplicaState::Finalized);
    }
}

#[tokio::test]
async fn a_fence_stops_the_writer_before_the_length_is_told() {
    let node = Node::start().await;
    let data = random(3 * FRAME, 2);
    let sealed = frames(BLOCK, &data, 0, FRAME, false);
    let mut old = Pipe::open(&node.addr, setup(BLOCK, &[&node])).await.unwrap();
    old.send(&sealed[..2]).await;
    old.wait_held(2 * FRAME).await;
    let fence = async |generation| {
        let mut conn = dial(&node.addr).await;
        let op = pb::ReplicaInfo { block: block_of(BLOCK, GEN), with_checksum: false, fence_generation: generation };
        ask(&mut conn, pb::data_request::Op::Info(op)).await;
        net::read_message::<pb::ReplicaInfoReply>(&mut conn, "node").await.unwrap()
    };
    let told = fence(1_010).await;
    assert_eq!((told.length, told.state(), told.generation), (2 * FRAME as u64, pb::ReplicaState::Recovering, GEN.0));
    let ack = old.wait_for(pb::AckKind::AckError).await;
    assert_eq!(Error::from_wire(ack.error.unwrap()).code(), ErrorCode::StaleGeneration);
    // Who comes with a generation from before the fence is late.
    let (late, _) = Pipe::open(&node.addr, recovery(&[&node], 1_009, 2 * FRAME)).await.err().unwrap();
    assert_eq!(late.code(), ErrorCode::StaleGeneration);
    assert_eq!(Error::from_wire(fence(1_009).await.error.unwrap()).code(), ErrorCode::StaleGeneration);
    // Asked again, as after a lost answer.
    assert_eq!(fence(1_010).await.length, 2 * FRAME as u64);
    let mut new = Pipe::open(&node.addr, recovery(&[&node], 1_010, 2 * FRAME)).await.unwrap();
    new.mark(MarkerKind::Finish, 2 * FRAME).await;
    assert_eq!(new.wait_for(pb::AckKind::AckFinished).await.kind(), pb::AckKind::AckFinished);
    assert!(whole(&node, Generation(1_010), 2 * FRAME).await == data[..2 * FRAME]);
}

#[tokio::test]
async fn wrong_requests_are_refused() {
    let node = Node::with(|settings| settings.max_transfers = 2).await;
    let wrong = |change: fn(&mut pb::WriteBlock)| {
        let mut request = setup(BLOCK, &[&node]);
        change(&mut request);
        request
    };
    let refused = [
        (wrong(|r| r.block.as_mut().unwrap().pool = "other".into()), ErrorCode::WrongCluster),
        (wrong(|r| r.block.as_mut().unwrap().id = -1), ErrorCode::InvalidArgument),
        (wrong(|r| r.block_size = u64::MAX), ErrorCode::InvalidArgument),
        (wrong(|r| r.targets = vec![pb::Replica::default(); 600]), ErrorCode::InvalidArgument),
    ];
    for (request, code) in refused {
        let (error, index) = Pipe::open(&node.addr, request).await.err().unwrap();
        assert_eq!((error.code(), index), (code, 0), "{error}");
    }
    let mut pipe = Pipe::open(&node.addr, wrong(|r| r.block_size = 1_000)).await.unwrap();
    pipe.send(&frames(BLOCK, &random(2_000, 1), 0, 2_000, false)).await;
    let ack = pipe.wait_for(pb::AckKind::AckError).await;
    assert_eq!(Error::from_wire(ack.error.unwrap()).code(), ErrorCode::InvalidArgument);
    drop(pipe);
    let first = Pipe::open(&node.addr, setup(BlockId(7), &[&node])).await.unwrap();
    let second = Pipe::open(&node.addr, setup(BlockId(8), &[&node])).await;
    let third = Pipe::open(&node.addr, setup(BlockId(9), &[&node])).await;
    let busy = [&second, &third].iter().filter(|p| p.as_ref().is_err_and(|e| e.0.code() == ErrorCode::Busy)).count();
    assert!(busy >= 1);
    drop((first, second, third));
}

#[tokio::test]
async fn a_request_that_was_altered_on_its_way_closes_the_connection() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let node = Node::start().await;
    let data = random(2 * FRAME, 1);
    write_block(&[&node], BLOCK, &data, false).await;
    let cut = pb::TruncateReplica {
        block: block_of(BLOCK, GEN),
        new_generation: 1_002,
        length: FRAME as u64,
        token: Default::default(),
    };
    let request = pb::DataRequest { op: Some(pb::data_request::Op::Truncate(cut)) };
    let mut sent = cairn_proto::dataplane::encode_delimited(&request);
    // The lowest bit of the length that is to be left.
    *sent.last_mut().unwrap() ^= 1;
    let mut conn = dial(&node.addr).await;
    conn.write_all(&sent).await.unwrap();
    let mut answer = Vec::new();
    let _ = conn.read_to_end(&mut answer).await;
    assert!(answer.is_empty(), "it was answered");
    assert!(whole(&node, GEN, data.len()).await == data);
}

/// `cargo test --release -p cairn-datanode -- --ignored --nocapture speed`: 1 GiB through three hops, then read back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement, not a test"]
async fn speed_of_three_hops() {
    let nodes = [Node::start().await, Node::start().await, Node::start().await];
    let all: Vec<&Node> = nodes.iter().collect();
    let data = random(128 << 20, 1);
    let clock = cairn_common::clock::Clock::system();
    for compress in [false, true] {
        let base = if compress { 100 } else { 0 };
        let started = clock.mono_ms();
        for id in 1..=8 {
            write_block(&all, BlockId(base + id), if compress { &TEXT } else { &data }, compress).await;
        }
        println!("write 1 GiB (text: {compress}): {} ms", clock.mono_ms() - started);
        let started = clock.mono_ms();
        for id in 1..=8 {
            let request = pb::ReadBlock {
                block: block_of(BlockId(base + id), GEN),
                offset: 0,
                length: 128 << 20,
                token: Default::default(),
            };
            let mut conn = dial(&nodes[1].addr).await;
            ask(&mut conn, pb::data_request::Op::Read(request)).await;
            let ready: pb::ReadReady = net::read_message(&mut conn, "node").await.unwrap();
            let mut left = ready.frame_bytes;
            let mut buffer = vec![0; 1 << 20];
            while left > 0 {
                use tokio::io::AsyncReadExt;
                left -= conn.read(&mut buffer).await.unwrap() as u64;
            }
        }
        println!("read 1 GiB (text: {compress}): {} ms", clock.mono_ms() - started);
    }
}

static TEXT: std::sync::LazyLock<Vec<u8>> = std::sync::LazyLock::new(|| text(128 << 20));

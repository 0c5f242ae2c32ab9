//! Recovery of abandoned blocks of which some replicas were found at a start.

use cairn_proto::dataplane::MarkerKind;
use cairn_proto::ids::{BlockId, Generation};
use cairn_proto::{ErrorCode, pb};

use super::recover;
use crate::store::ops::NewReplica;
use crate::testing::*;

const BLOCK: BlockId = BlockId(1_073_741_825);
const FRAME: usize = 16 << 10;
const NEW: u64 = 1_010;

/// A node that was killed while it wrote the block, and started again; of what it wrote its disk has kept so many frames.
async fn started_again(data: &[u8], kept: usize) -> Node {
    let dir = tempfile::tempdir().unwrap();
    {
        let store = open_store(&settings(&[dir.path()])).await;
        let new = NewReplica {
            block: BLOCK,
            generation: GEN,
            storage_id: String::new(),
            block_size: 1 << 20,
            temporary: false,
        };
        let mut writer = store.create(new).await.unwrap();
        writer.append(&[chunk(&frames(BLOCK, &data[..kept * FRAME], 0, FRAME, false))]).unwrap();
    }
    Node::over(dir, |_| {}).await
}

/// A node that has so many frames, flushed, and whose writer has left.
async fn open_all_along(data: &[u8], frames_held: usize) -> Node {
    let node = Node::start().await;
    let mut pipe = Pipe::open(&node.addr, setup(BLOCK, &[&node])).await.unwrap();
    pipe.send(&frames(BLOCK, &data[..frames_held * FRAME], 0, FRAME, false)).await;
    pipe.mark(MarkerKind::Flush, frames_held * FRAME).await;
    assert_eq!(pipe.wait_for(pb::AckKind::AckFlushed).await.length, (frames_held * FRAME) as u64);
    node
}

fn order(replicas: Vec<pb::Replica>) -> pb::RecoverBlock {
    pb::RecoverBlock { truncate_to: None, block: block_of(BLOCK, GEN), new_generation: NEW, replicas, silent: 0 }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_lost_power_takes_nothing_from_what_another_has_flushed() {
    let data = random(4 * FRAME, 1);
    let (cut, behind) = (started_again(&data, 1).await, started_again(&data, 4).await);
    let flushed = open_all_along(&data, 3).await;
    assert!(info(&cut.addr, BLOCK).await.found_at_start && !info(&flushed.addr, BLOCK).await.found_at_start);
    let order = order(vec![cut.target(), flushed.target(), behind.target()]);
    let recovered = recover::recover(&cut.transfer, &order).await.unwrap();
    assert_eq!((recovered.length, recovered.storage_ids.len()), (3 * FRAME as u64, 2));
    for node in [&flushed, &behind] {
        let got = read_range(&node.addr, BLOCK, Generation(NEW), 0, 3 * FRAME as u64).await.unwrap();
        assert!(got == data[..3 * FRAME]);
        let told = info(&node.addr, BLOCK).await;
        assert_eq!((told.state(), told.found_at_start), (pb::ReplicaState::Finalized, false));
    }
    assert_eq!(info(&cut.addr, BLOCK).await.generation, GEN.0, "it is left out");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_replicas_found_at_a_start_the_longest_decides() {
    let data = random(4 * FRAME, 2);
    // All of it was synced; one has rotted since, and two were about to write more.
    let nodes = [started_again(&data, 1).await, started_again(&data, 4).await, started_again(&data, 3).await];
    let order = order(nodes.iter().map(Node::target).collect());
    let recovered = recover::recover(&nodes[0].transfer, &order).await.unwrap();
    assert_eq!((recovered.length, recovered.storage_ids.len()), (4 * FRAME as u64, 1));
    let got = read_range(&nodes[1].addr, BLOCK, Generation(NEW), 0, 4 * FRAME as u64).await.unwrap();
    assert!(got == data);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_start_found_decides_nothing_while_another_node_is_silent() {
    let data = random(2 * FRAME, 3);
    let node = started_again(&data, 2).await;
    let silent = pb::Replica { address: "127.0.0.1:1".into(), ..Default::default() };
    let both = order(vec![node.target(), silent]);
    let error = recover::recover(&node.transfer, &both).await.unwrap_err();
    assert!(error.code() == ErrorCode::Unreachable && error.message().contains("found at a start"), "{error}");
    // One that has nothing of the block is not silent.
    let other = Node::start().await;
    let answered = order(vec![node.target(), other.target()]);
    let one_is_dead = pb::RecoverBlock { silent: 1, ..answered.clone() };
    let error = recover::recover(&node.transfer, &one_is_dead).await.unwrap_err();
    assert!(error.code() == ErrorCode::Unreachable && error.message().contains("1 datanodes"), "{error}");
    assert_eq!(recover::recover(&node.transfer, &answered).await.unwrap().length, 2 * FRAME as u64);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_that_is_out_does_not_make_a_block_one_that_nobody_has() {
    let data = random(2 * FRAME, 4);
    let (node, empty) = (open_all_along(&data, 2).await, Node::start().await);
    let store = &node.transfer.store;
    store.volume(0).failed("writing", &std::io::Error::from_raw_os_error(libc::EIO));
    assert!(store.take_out_failed());
    let told = cairn_proto::Error::from_wire(info(&node.addr, BLOCK).await.error.unwrap());
    assert!(told.code() == ErrorCode::Unreachable && told.message().contains("out of service"), "{told}");
    let never_there = cairn_proto::Error::from_wire(info(&node.addr, BlockId(7)).await.error.unwrap());
    assert_eq!(never_there.code(), ErrorCode::BlockNotFound);
    // Else the namenode would hear that nothing was written.
    let both = order(vec![node.target(), empty.target()]);
    assert_eq!(recover::recover(&empty.transfer, &both).await.unwrap_err().code(), ErrorCode::Unreachable);
}

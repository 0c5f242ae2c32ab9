//! Orders of the namenode that wait: for each other, and for a newer epoch.

use std::future::pending;
use std::time::Duration;

use cairn_proto::ids::BlockId;
use cairn_proto::pb::datanode_command::Command;
use cairn_proto::{ErrorCode, pb};

use super::merge;
use super::tests::scripted;
use crate::report::commands::Commands;
use crate::store::map::Kind;
use crate::store::ops::NewReplica;
use crate::testing::*;

const BLOCK: BlockId = BlockId(1_073_741_825);
const OTHER: BlockId = BlockId(1_073_741_826);
const MERGED: BlockId = BlockId(1_073_741_900);

fn order(command: Command) -> pb::DatanodeCommand {
    pb::DatanodeCommand { command: Some(command) }
}

fn delete(node: &Node, blocks: &[BlockId]) -> pb::DatanodeCommand {
    let storage_id = node.store().volume(0).storage_id().to_owned();
    let of = |block: &BlockId| pb::ReplicaRef { block: block_of(*block, GEN), storage_id: storage_id.clone() };
    order(Command::Delete(pb::DeleteReplicas { replicas: blocks.iter().map(of).collect() }))
}

fn replicate(block: BlockId, length: usize, to: &Node) -> pb::DatanodeCommand {
    let targets = vec![to.target()];
    order(Command::Replicate(pb::ReplicateBlock { block: block_of(block, GEN), length: length as u64, targets }))
}

fn merge_into(target: pb::Replica, id: i64, source: &Node, length: usize) -> pb::MergeBlocks {
    let length = length as u64;
    let sources = vec![pb::MergeSource { block: block_of(BLOCK, GEN), length, replicas: vec![source.target()] }];
    pb::MergeBlocks { block: block_of(BlockId(MERGED.0 + id), GEN), length, sources, targets: vec![target] }
}

/// A datanode that opens its part of a pipeline and stops.
async fn stopped() -> pb::Replica {
    scripted(|conn| async move {
        pending::<()>().await;
        drop(conn);
    })
    .await
}

async fn until(what: &str, good: impl Fn() -> bool) {
    for _ in 0..12_000 {
        if good() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("{what}");
}

fn holds(node: &Node, block: BlockId) -> bool {
    node.store().map().get(block).is_some_and(|(_, entry)| matches!(entry.kind, Kind::Finalized { .. }))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn orders_of_an_older_epoch_are_not_carried_out() {
    let (node, target) = (Node::with(|settings| settings.replication_streams = 1).await, Node::start().await);
    let commands = Commands::start(&node.transfer);
    let (data, busy, last) = (random(50_000, 1), BlockId(7), BlockId(8));
    for block in [BLOCK, OTHER, last] {
        write_block(&[&node], block, &data, false).await;
    }
    let (generation, storage_id) = (GEN, String::new());
    let new = NewReplica { block: busy, generation, storage_id, block_size: 1 << 20, temporary: false };
    let mut writer = node.store().create(new).await.unwrap();
    writer.append(&[chunk(&frames(busy, &data, 0, 10_000, false))]).unwrap();
    commands.take(delete(&node, &[busy, BLOCK]), 1);
    // The worker waits for the writer of the first one to end.
    writer.open().fenced().await;
    node.store().join_cluster("cluster-1", POOL, 2).await.unwrap();
    writer.abandon();
    commands.take(delete(&node, &[OTHER]), 1);
    commands.take(replicate(BLOCK, data.len(), &target), 1);
    commands.take(replicate(last, data.len(), &target), 2);
    until("an order of the newer epoch was not carried out", || holds(&target, last)).await;
    commands.take(delete(&node, &[last]), 2);
    until("a deletion of the newer epoch was not carried out", || !holds(&node, last)).await;
    assert!(holds(&node, BLOCK) && holds(&node, OTHER), "deleted by an order from before the newer epoch");
    assert!(node.store().map().get(busy).is_some());
    assert!(target.store().map().get(BLOCK).is_none(), "copied by an order from before the newer epoch");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_order_under_way_is_broken_off_by_a_newer_epoch() {
    let node = Node::with(|settings| settings.pipeline_timeout_ms = 600_000).await;
    let commands = Commands::start(&node.transfer);
    let data = random(50_000, 1);
    write_block(&[&node], BLOCK, &data, false).await;
    let (left, told) = tokio::sync::oneshot::channel();
    let target = scripted(|mut conn| async move {
        use tokio::io::AsyncReadExt;
        let mut rest = Vec::new();
        let _ = conn.read_to_end(&mut rest).await;
        let _ = left.send(rest.len());
    })
    .await;
    let copy = pb::ReplicateBlock { block: block_of(BLOCK, GEN), length: data.len() as u64, targets: vec![target] };
    commands.take(order(Command::Replicate(copy)), 1);
    until("the copy did not begin", || node.transfer.metrics.bytes_sent.load(std::sync::atomic::Ordering::Relaxed) > 0)
        .await;
    node.store().join_cluster("cluster-1", POOL, 2).await.unwrap();
    tokio::time::timeout(Duration::from_secs(20), told).await.expect("the copy goes on").unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_merge_whose_target_stops_ends_in_time() {
    // The source has the usual patience with its disk: its sync may take long.
    let (source, node) = (Node::start().await, Node::with(|settings| settings.disk_stall_ms = 300).await);
    // More than fits between two sockets.
    let data = random(32 << 20, 1);
    write_block(&[&source], BLOCK, &data, false).await;
    let order = merge_into(stopped().await, 0, &source, data.len());
    let merged = tokio::time::timeout(Duration::from_secs(60), merge::merge(&node.transfer, &order)).await;
    assert_eq!(merged.expect("it waits for ever").unwrap_err().code(), ErrorCode::TimedOut);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn copies_wait_neither_for_merges_nor_for_checks() {
    let node = Node::with(|settings| {
        settings.replication_streams = 1;
        settings.pipeline_timeout_ms = 600_000;
    })
    .await;
    let target = Node::start().await;
    let commands = Commands::start(&node.transfer);
    let data = random(50_000, 1);
    write_block(&[&node], BLOCK, &data, false).await;
    let checks = node.transfer.checks.acquire_many(2).await.unwrap();
    let refs = vec![pb::ReplicaRef { block: block_of(BLOCK, GEN), storage_id: String::new() }; 1_100];
    commands.take(order(Command::Verify(pb::VerifyReplicas { replicas: refs })), 1);
    for id in 0..3 {
        commands.take(order(Command::Merge(merge_into(stopped().await, id, &node, data.len()))), 1);
    }
    until("no merge is under way", || node.transfer.metrics.copies.load(std::sync::atomic::Ordering::Relaxed) > 0)
        .await;
    commands.take(replicate(BLOCK, data.len(), &target), 1);
    until("the copy waits", || holds(&target, BLOCK)).await;
    drop(checks);
}

//! The first bytes of a block go to a node that joins its pipeline; who stalls is named.

use std::time::Duration;

use cairn_common::durable::{Fs, OpenMode, SystemFs};
use cairn_common::net;
use cairn_proto::dataplane::MarkerKind;
use cairn_proto::ids::{BlockId, Generation};
use cairn_proto::{Error, ErrorCode, pb};

use super::tests::{recovery, scripted, until, whole};
use crate::store::map::Kind;
use crate::testing::*;

const BLOCK: BlockId = BlockId(1_073_741_825);
const FRAME: usize = 64 << 10;
const NEXT: u64 = 1_005;

fn order(target: pb::Replica, length: usize) -> pb::TransferBlock {
    pb::TransferBlock {
        block: block_of(BLOCK, GEN),
        new_generation: NEXT,
        length: length as u64,
        target: Some(target),
        block_size: 128 << 20,
        client_name: "test".into(),
        ..Default::default()
    }
}

/// Asks a survivor; an error comes with whose it is.
async fn transfer(source: &Node, order: pb::TransferBlock) -> Result<u64, (ErrorCode, u32)> {
    let mut conn = dial(&source.addr).await;
    ask(&mut conn, pb::data_request::Op::Transfer(order)).await;
    loop {
        let read = net::read_message::<pb::WriteAck>(&mut conn, "survivor");
        let ack = tokio::time::timeout(Duration::from_secs(30), read).await.unwrap().unwrap();
        match ack.kind() {
            pb::AckKind::AckFinished => return Ok(ack.length),
            pb::AckKind::AckError => return Err((Error::from_wire(ack.error.unwrap()).code(), ack.failed_index)),
            _ => {}
        }
    }
}

/// A node whose writer has sent `count` frames, with the writer.
async fn written(node: &Node, data: &[u8], count: usize) -> Pipe {
    let mut pipe = Pipe::open(&node.addr, setup(BLOCK, &[node])).await.unwrap();
    pipe.send(&frames(BLOCK, data, 0, FRAME, false)[..count]).await;
    pipe.wait_held(count * FRAME).await;
    pipe
}

fn files_of(node: &Node) -> Vec<String> {
    let root = node.store().volumes()[0].pool_root().unwrap().to_owned();
    let list = |name: &str| std::fs::read_dir(root.join(name)).unwrap();
    let mut all: Vec<String> = ["rbw", "tmp"]
        .iter()
        .flat_map(|name| list(name).map(move |file| format!("{name}/{}", file.unwrap().file_name().display())))
        .collect();
    all.sort();
    all
}

async fn gone(node: &Node) {
    for _ in 0..12_000 {
        if node.store().map().get(BLOCK).is_none() {
            assert_eq!(files_of(node), Vec::<String>::new());
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("the replica stayed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_joins_with_what_was_acked_and_both_go_on() {
    let nodes = [Node::start().await, Node::start().await];
    let data = random(4 * FRAME, 2);
    // More than was acked to the client lies on the survivor, whose writer is still there.
    let mut old = written(&nodes[0], &data, 3).await;
    assert_eq!(transfer(&nodes[0], order(nodes[1].target(), 2 * FRAME)).await, Ok(2 * FRAME as u64));
    let ack = old.wait_for(pb::AckKind::AckError).await;
    assert_eq!(Error::from_wire(ack.error.unwrap()).code(), ErrorCode::StaleGeneration, "its writer was stopped");
    let told = info(&nodes[1].addr, BLOCK).await;
    assert_eq!((told.length, told.generation, told.state()), (2 * FRAME as u64, NEXT, pb::ReplicaState::Recovering));
    let kept = info(&nodes[0].addr, BLOCK).await;
    assert_eq!((kept.length, kept.generation, kept.state()), (3 * FRAME as u64, GEN.0, pb::ReplicaState::Recovering));
    // Whoever comes with a generation from before is late.
    let (late, _) = Pipe::open(&nodes[0].addr, recovery(&[&nodes[0]], NEXT - 1, 2 * FRAME)).await.err().unwrap();
    assert_eq!(late.code(), ErrorCode::StaleGeneration);
    let both = [&nodes[0], &nodes[1]];
    let mut pipe = Pipe::open(&nodes[0].addr, recovery(&both, NEXT, 2 * FRAME)).await.unwrap();
    pipe.send(&frames(BLOCK, &data, 0, FRAME, false)[2..]).await;
    pipe.mark(MarkerKind::Finish, data.len()).await;
    assert_eq!(pipe.wait_for(pb::AckKind::AckFinished).await.kind(), pb::AckKind::AckFinished);
    for node in &nodes {
        assert!(whole(node, Generation(NEXT), data.len()).await == data);
        node.transfer.verify(BLOCK, Generation(NEXT)).await.unwrap();
        assert_eq!(files_of(node), Vec::<String>::new());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_finalized_survivor_gives_its_first_part_too() {
    let nodes = [Node::start().await, Node::start().await];
    let data = random(3 * FRAME + 9, 2);
    let sealed = frames(BLOCK, &data, 0, FRAME, false);
    let mut pipe = written(&nodes[0], &data, 3).await;
    pipe.send(&sealed[3..]).await;
    pipe.mark(MarkerKind::Finish, data.len()).await;
    pipe.wait_for(pb::AckKind::AckFinished).await;
    transfer(&nodes[0], order(nodes[1].target(), FRAME)).await.unwrap();
    let both = [&nodes[0], &nodes[1]];
    let mut pipe = Pipe::open(&nodes[0].addr, recovery(&both, NEXT, FRAME)).await.unwrap();
    pipe.send(&sealed[1..]).await;
    pipe.mark(MarkerKind::Finish, data.len()).await;
    assert_eq!(pipe.wait_for(pb::AckKind::AckFinished).await.kind(), pb::AckKind::AckFinished);
    for node in &nodes {
        assert!(whole(node, Generation(NEXT), data.len()).await == data);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_that_dies_is_named_and_the_survivor_keeps_what_it_has() {
    let node = Node::start().await;
    let data = random(4 * FRAME, 2);
    let _old = written(&node, &data, 3).await;
    let dies = scripted(|mut conn| async move {
        use tokio::io::AsyncReadExt;
        let mut bytes = vec![0; FRAME];
        conn.read_exact(&mut bytes).await.unwrap();
    })
    .await;
    let (_, index) = transfer(&node, order(dies, 3 * FRAME)).await.unwrap_err();
    assert_eq!(index, 1);
    let unreachable = pb::Replica { address: "127.0.0.1:1".into(), ..Default::default() };
    assert_eq!(transfer(&node, order(unreachable, 3 * FRAME)).await, Err((ErrorCode::Unreachable, 1)));
    // The next one gets it all the same, under a newer generation.
    let other = Node::start().await;
    let again = pb::TransferBlock { new_generation: NEXT + 1, ..order(other.target(), 3 * FRAME) };
    assert_eq!(transfer(&node, again).await, Ok(3 * FRAME as u64));
    assert!(whole(&other, Generation(NEXT + 1), 3 * FRAME).await == data[..3 * FRAME]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_that_falls_silent_is_given_up_in_time() {
    let node = Node::with(|settings| settings.pipeline_timeout_ms = 300).await;
    let data = random(2 * FRAME, 2);
    let _old = written(&node, &data, 2).await;
    let silent = scripted(|mut conn| async move {
        use tokio::io::AsyncReadExt;
        let mut rest = Vec::new();
        let _ = conn.read_to_end(&mut rest).await;
    })
    .await;
    assert_eq!(transfer(&node, order(silent, 2 * FRAME)).await, Err((ErrorCode::TimedOut, 1)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_copied_is_the_survivors_fault_and_leaves_nothing() {
    let nodes = [Node::start().await, Node::start().await];
    let data = random(3 * FRAME, 2);
    let _old = written(&nodes[0], &data, 2).await;
    let target = || nodes[1].target();
    let refused = [
        (order(target(), FRAME + 1), ErrorCode::InvalidArgument),
        (order(target(), 3 * FRAME), ErrorCode::Unsupported),
        (order(target(), 0), ErrorCode::InvalidArgument),
        (pb::TransferBlock { new_generation: GEN.0, ..order(target(), FRAME) }, ErrorCode::InvalidArgument),
        (pb::TransferBlock { target: None, ..order(target(), FRAME) }, ErrorCode::InvalidArgument),
        (
            pb::TransferBlock { block: block_of(BLOCK, Generation(1_002)), ..order(target(), FRAME) },
            ErrorCode::StaleGeneration,
        ),
        (pb::TransferBlock { block: block_of(BlockId(5), GEN), ..order(target(), FRAME) }, ErrorCode::BlockNotFound),
    ];
    for (order, code) in refused {
        assert_eq!(transfer(&nodes[0], order.clone()).await, Err((code, 0)), "{order:?}");
    }
    // Its disk has flipped a bit: the target must not be blamed for what it cannot verify.
    until(&nodes[0], |kind| matches!(kind, Kind::Recovering { .. })).await;
    let path = nodes[0].store().volumes()[0].open_path(BLOCK, GEN, false).unwrap();
    let file = SystemFs.open(&path, OpenMode::Write).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, FRAME as u64 / 2).unwrap();
    file.write_all_at(&[byte[0] ^ 1], FRAME as u64 / 2).unwrap();
    assert_eq!(transfer(&nodes[0], order(target(), 2 * FRAME)).await, Err((ErrorCode::Corrupt, 0)));
    gone(&nodes[1]).await;
}

/// Sends the first part by hand, so that it can be left in the middle.
fn partial(generation: u64) -> pb::WriteBlock {
    pb::WriteBlock {
        block: block_of(BLOCK, Generation(generation)),
        stage: pb::WriteStage::PipelineTransfer as i32,
        ..setup(BLOCK, &[])
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_that_breaks_off_leaves_nothing_and_brings_the_old_replica_back() {
    let node = Node::start().await;
    let data = random(3 * FRAME, 2);
    let sealed = frames(BLOCK, &data, 0, FRAME, false);
    let mut pipe = Pipe::open(&node.addr, partial(NEXT)).await.unwrap();
    pipe.send(&sealed[..2]).await;
    pipe.wait_held(2 * FRAME).await;
    assert!(read_range(&node.addr, BLOCK, GEN, 0, 1).await.is_err(), "nobody sees it before it is whole");
    assert!(node.store().map().range(0, None).replicas.is_empty(), "nor do reports");
    drop(pipe);
    gone(&node).await;
    // A node that was left out of the pipeline joins it again: what it has goes only when the copy is whole.
    drop(written(&node, &data, 2).await);
    until(&node, |kind| matches!(kind, Kind::Recovering { .. })).await;
    let mut pipe = Pipe::open(&node.addr, partial(NEXT)).await.unwrap();
    pipe.send(&sealed[..1]).await;
    pipe.wait_held(FRAME).await;
    drop(pipe);
    until(&node, |kind| matches!(kind, Kind::Recovering { .. })).await;
    let told = info(&node.addr, BLOCK).await;
    assert_eq!((told.generation, told.length), (GEN.0, 2 * FRAME as u64));
    assert!(whole(&node, GEN, 2 * FRAME).await == data[..2 * FRAME]);
    let mut pipe = Pipe::open(&node.addr, partial(NEXT)).await.unwrap();
    pipe.send(&sealed).await;
    pipe.mark(MarkerKind::Finish, data.len()).await;
    assert_eq!(pipe.wait_for(pb::AckKind::AckFinished).await.kind(), pb::AckKind::AckFinished);
    assert_eq!(files_of(&node), [format!("rbw/{}", cairn_proto::blockfile::unfinalized_name(BLOCK, Generation(NEXT)))]);
    assert_eq!(info(&node.addr, BLOCK).await.state(), pb::ReplicaState::Recovering, "never final");
    // It goes to one node only.
    let chained = pb::WriteBlock { targets: vec![node.target()], ..partial(NEXT + 1) };
    assert_eq!(Pipe::open(&node.addr, chained).await.err().unwrap().0.code(), ErrorCode::InvalidArgument);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_joins_again_while_nothing_was_acked() {
    let node = Node::start().await;
    let data = random(2 * FRAME, 2);
    drop(written(&node, &data, 1).await);
    until(&node, |kind| matches!(kind, Kind::Recovering { .. })).await;
    // The generation in force is newer than the one that it was left out with.
    let request = pb::WriteBlock { old_generation: NEXT, ..recovery(&[&node], NEXT + 1, 0) };
    let mut pipe = Pipe::open(&node.addr, request).await.unwrap();
    pipe.send(&frames(BLOCK, &data, 0, FRAME, false)).await;
    pipe.mark(MarkerKind::Finish, data.len()).await;
    assert_eq!(pipe.wait_for(pb::AckKind::AckFinished).await.kind(), pb::AckKind::AckFinished);
    assert!(whole(&node, Generation(NEXT + 1), data.len()).await == data);
    assert_eq!(files_of(&node), Vec::<String>::new());
}

/// A fence is kept in memory only. After a restart no writer is attached, so whoever comes must open the pipeline again under a generation
/// that the namenode gave it, and keeps what was acked; it gets no ack that counts before the namenode agrees to that generation. The newer
/// recovery, which the fence was for, then finds the replica shorter than it was told, and leaves it out instead of making it final with another length.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_its_fence_a_restarted_node_lets_nothing_acked_go() {
    let dir = tempfile::tempdir().unwrap();
    let settings = settings(&[dir.path()]);
    let data = random(3 * FRAME, 2);
    let acked = 2 * FRAME as u64;
    {
        let store = open_store(&settings).await;
        let new = crate::store::ops::NewReplica {
            block: BLOCK,
            generation: GEN,
            storage_id: String::new(),
            block_size: 1 << 20,
            temporary: false,
        };
        let mut writer = store.create(new).await.unwrap();
        writer.append(&[chunk(&frames(BLOCK, &data, 0, FRAME, false))]).unwrap();
        writer.abandon();
        store.fence(BLOCK, Generation(1_010)).await.unwrap();
        let late = crate::store::ops::Recovery {
            block: BLOCK,
            old_generation: GEN,
            new_generation: Generation(1_009),
            keep_length: acked,
            block_size: 1 << 20,
        };
        assert_eq!(store.recover(late).await.err().unwrap().code(), ErrorCode::StaleGeneration);
    }
    let store = open_store(&settings).await;
    assert!(matches!(store.map().get(BLOCK).unwrap().1.kind, Kind::Recovering { .. }), "no writer is attached");
    let recover = |generation: u64, keep_length: u64| {
        let store = std::sync::Arc::clone(&store);
        async move {
            let recovery = crate::store::ops::Recovery {
                block: BLOCK,
                old_generation: GEN,
                new_generation: Generation(generation),
                keep_length,
                block_size: 1 << 20,
            };
            store.recover(recovery).await
        }
    };
    let crate::store::ops::Recovered::Open(mut late) = recover(1_009, acked).await.unwrap() else { panic!() };
    late.abandon();
    let newer = recover(1_010, 3 * FRAME as u64).await;
    assert_eq!(newer.err().unwrap().code(), ErrorCode::Unsupported, "not final with what it no longer has");
    let crate::store::ops::Recovered::Open(mut decided) = recover(1_011, acked).await.unwrap() else { panic!() };
    assert_eq!(decided.length(), acked, "what was acked is there");
    decided.finalize().unwrap();
    assert_eq!(
        recover(1_009, acked).await.err().unwrap().code(),
        ErrorCode::StaleGeneration,
        "final is fenced by name"
    );
}

/// On one thread: what holds up one of the nodes that run holds up all of them.
#[tokio::test]
async fn the_neighbour_of_a_stopped_node_names_it_and_nobody_else_is_blamed() {
    let stopped = scripted(|mut conn| async move {
        use tokio::io::AsyncReadExt;
        let mut rest = Vec::new();
        let _ = conn.read_to_end(&mut rest).await;
    })
    .await;
    let start = || Node::with(|settings| settings.pipeline_timeout_ms = 3_000);
    let nodes = [start().await, start().await];
    let mut request = setup(BLOCK, &[&nodes[0], &nodes[1]]);
    request.targets.push(stopped);
    let mut pipe = Pipe::open(&nodes[0].addr, request).await.unwrap();
    let data = random(2 * FRAME, 3);
    pipe.send(&frames(BLOCK, &data, 0, FRAME, false)).await;
    pipe.mark(MarkerKind::Sync, data.len()).await;
    let mut behind = 0;
    let ack = loop {
        let ack = pipe.ack().await;
        if ack.kind() == pb::AckKind::AckError {
            break ack;
        }
        assert_eq!((ack.kind(), ack.length), (pb::AckKind::AckProgress, 0), "signs of life only");
        behind = behind.max(ack.behind);
    };
    assert_eq!((ack.failed_index, Error::from_wire(ack.error.unwrap()).code()), (2, ErrorCode::TimedOut));
    assert_eq!(behind, 2, "all acks before said whom they wait for");
    let stalled = |node: &Node| node.transfer.metrics.stalled_next.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!((stalled(&nodes[0]), stalled(&nodes[1])), (0, 1));
}

/// On one thread: the slow node is never silent for longer than this one was away.
#[tokio::test]
async fn a_slow_node_is_counted_and_stays() {
    let slow = scripted(|conn| async move {
        use tokio::io::AsyncReadExt;
        let (mut reader, mut writer) = conn.split();
        let read = async {
            let mut rest = Vec::new();
            let _ = reader.read_to_end(&mut rest).await;
        };
        // It lives, and gets nothing done.
        let speak = async {
            let ack = pb::WriteAck { kind: pb::AckKind::AckProgress as i32, ..Default::default() };
            while net::write_message(&mut writer, &ack).await.is_ok() {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        tokio::join!(read, speak);
    })
    .await;
    let node = Node::with(|settings| settings.pipeline_timeout_ms = 600).await;
    let mut request = setup(BLOCK, &[&node]);
    request.targets = vec![slow];
    let mut pipe = Pipe::open(&node.addr, request).await.unwrap();
    pipe.send(&frames(BLOCK, &random(80 * FRAME, 3), 0, FRAME, false)).await;
    let count = || node.transfer.metrics.slow_next.load(std::sync::atomic::Ordering::Relaxed);
    let mut words = 0;
    while count() == 0 {
        let ack = pipe.ack().await;
        assert_eq!((ack.kind(), ack.length), (pb::AckKind::AckProgress, 0), "{ack:?}");
        words += 1;
    }
    assert!(words > 5, "slowness is called so only after a while");
    for _ in 0..5 {
        assert_eq!(pipe.ack().await.kind(), pb::AckKind::AckProgress, "it stays");
    }
    assert_eq!(count(), 1);
}

/// What joins a pipeline, and what it takes the place of.
#[derive(Clone, Copy, Debug)]
struct Joining {
    /// The old replica is final, else it waits for its writer.
    finalized: bool,
    /// The copy lies on another volume.
    apart: bool,
}

/// A node holds three synced frames of an old generation and joins with a copy of four. Returns the syncs after which the one, and the other, was
/// promised.
async fn joining_run(disk: &cairn_common::simdisk::SimDisk, data: &[u8], joining: Joining) -> (u64, u64) {
    let store = simulated(disk).await;
    store.join_cluster("cluster-1", POOL, 1).await.unwrap();
    let sealed = frames(BLOCK, data, 0, 1_000, false);
    let new = |generation, volume: usize| crate::store::ops::NewReplica {
        block: BLOCK,
        generation,
        storage_id: store.volume(volume).storage_id().to_owned(),
        block_size: 1 << 20,
        temporary: generation != GEN,
    };
    let mut old = store.create(new(GEN, 0)).await.unwrap();
    old.append(&[chunk(&sealed[..3])]).unwrap();
    if joining.finalized {
        // On a disk that stands still this fails, and what is held then was promised before.
        let _ = old.finalize();
    } else {
        old.sync().unwrap();
    }
    let held = disk.syncs();
    old.abandon();
    let mut copy = store.create_partial(new(Generation(NEXT), usize::from(joining.apart))).await.unwrap();
    copy.append(&[chunk(&sealed[..4])]).unwrap();
    copy.hand_over().unwrap();
    (held, disk.syncs())
}

async fn simulated(disk: &cairn_common::simdisk::SimDisk) -> std::sync::Arc<crate::store::BlockStore> {
    let env = cairn_common::Env {
        fs: std::sync::Arc::new(disk.clone()),
        work: cairn_common::work::Work::inline(),
        ..cairn_common::Env::system()
    };
    let volumes = ["/volume", "/other"].map(std::path::Path::new);
    crate::store::BlockStore::open(&env, &settings(&volumes)).await.unwrap()
}

/// How many files, in service or not, lie there of the block.
fn files_of_block(disk: &cairn_common::simdisk::SimDisk) -> usize {
    use cairn_common::durable::Fs;
    let roots = ["/volume", "/other"].map(|volume| std::path::Path::new(volume).join(POOL));
    let folders = ["rbw", "tmp", "corrupt", "finalized/00/00"];
    let all = roots.iter().flat_map(|root| folders.map(|folder| root.join(folder)));
    let listed = all.filter_map(|folder| disk.read_dir(&folder).ok()).flatten();
    listed.filter(|entry| entry.name.starts_with(&format!("{BLOCK}_"))).count()
}

#[tokio::test]
async fn a_power_cut_at_any_sync_leaves_the_old_replica_or_the_whole_copy() {
    use cairn_common::entropy::Entropy;
    use cairn_common::simdisk::SimDisk;
    let data = random(5_000, 3);
    let each = |finalized| [false, true].map(|apart| Joining { finalized, apart });
    for joining in [false, true].into_iter().flat_map(each) {
        let total = {
            let disk = SimDisk::new(1 << 30, Entropy::seeded(1));
            joining_run(&disk, &data, joining).await;
            disk.syncs()
        };
        let (mut olds, mut copies, mut both) = (0, 0, 0);
        for k in 1..=total + 1 {
            for seed in 0..20 {
                let disk = SimDisk::new(1 << 30, Entropy::seeded(seed));
                disk.freeze_at_sync(k);
                let (held, joined) = joining_run(&disk, &data, joining).await;
                disk.crash();
                both += usize::from(files_of_block(&disk) == 2);
                let store = simulated(&disk).await;
                let what = format!("{joining:?}, sync {k} of {total}, seed {seed}");
                let Some((_, entry)) = store.map().get(BLOCK) else {
                    assert!(k <= held, "{what}: nothing is left");
                    continue;
                };
                assert_eq!(files_of_block(&disk), 1, "{what}: nobody will ever ask for the other file");
                if matches!(entry.kind, Kind::Corrupt { .. }) {
                    assert!(k <= held, "{what}");
                    continue;
                }
                let is_final = matches!(entry.kind, Kind::Finalized { .. });
                assert!(!is_final || joining.finalized && entry.generation == GEN, "{what}: final");
                let read = store.read(BLOCK, GEN).await.unwrap();
                assert_eq!(read.index.crc32c(), crc32c::crc32c(&data[..read.length as usize]), "{what}");
                if entry.generation == GEN {
                    olds += 1;
                    assert!(k <= joined && (k <= held || read.length == 3_000), "{what}: {}", read.length);
                } else {
                    copies += 1;
                    assert_eq!(read.length, 4_000, "{what}: a copy that is not whole");
                }
                drop(store);
                disk.crash();
                let again = simulated(&disk).await.map().get(BLOCK).map(|(_, entry)| entry.generation);
                assert_eq!(again, Some(entry.generation), "{what}: the start has thrown away what was durable");
            }
        }
        assert!(olds > 0 && copies > 0 && both > 0, "{joining:?}: {olds} {copies} {both}");
    }
}

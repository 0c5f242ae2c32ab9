//! Writers: blocks, pipelines, completion, leases, repeated calls.

use super::*;

fn finalized(generation: u64, length: u64) -> Held {
    (generation, length, pb::ReplicaState::Finalized)
}

fn nodes_of(block: &pb::LocatedBlock) -> Vec<String> {
    block.replicas.iter().map(|replica| replica.node_id.clone()).collect()
}

#[test]
fn a_file_is_written_and_found() {
    let mut world = cluster();
    let blocks = world.write("/d/f", 3, 3);
    let status = world.status("/d/f").unwrap();
    assert_eq!((status.length, status.open, status.replication), (3 * BLOCK, false, 3));
    let located = world.locations("/d/f");
    assert_eq!(located.iter().map(|block| block.block.as_ref().unwrap().id as u64).collect::<Vec<_>>(), blocks);
    for (at, block) in located.iter().enumerate() {
        assert_eq!((block.offset, block.length, block.complete), (at as u64 * BLOCK, BLOCK, true));
        let mut racks: Vec<&str> = block.replicas.iter().map(|replica| &*replica.rack).collect();
        racks.sort_unstable();
        racks.dedup();
        assert_eq!((block.replicas.len(), racks.len()), (3, 2));
    }
    let middle = pb::GetBlockLocationsRequest { path: "/d/f".into(), offset: BLOCK, length: 1 };
    let middle: pb::GetBlockLocationsResponse = world.call("root", middle).unwrap();
    assert_eq!(middle.blocks.len(), 1);
    assert_eq!(middle.blocks[0].offset, BLOCK);
}

#[test]
fn complete_waits_for_reports_then_says_not_yet() {
    let mut world = cluster();
    let inode = world.create("/f", 3).unwrap().inode;
    let block = world.add_block(inode, 0, &[]).unwrap();
    let id = block.block.as_ref().unwrap().id as u64;
    let generation = block.block.as_ref().unwrap().generation;
    let said = [(id, generation, 100)];
    let reply = world.complete(inode, &said);
    assert!(world.answer(reply).is_none());
    world.step(900);
    assert!(world.answer(reply).is_none());
    world.step(200);
    assert_eq!(code(world.answer(reply).unwrap()), ErrorCode::NotReplicatedYet);
    let reply = world.complete(inode, &said);
    let first = world.at(&nodes_of(&block)[0]);
    world.hold(first, id, finalized(generation, 99));
    assert!(world.answer(reply).is_none(), "another length does not count");
    let second = world.at(&nodes_of(&block)[1]);
    world.hold(second, id, finalized(generation, 100));
    assert!(world.answer(reply).unwrap().is_ok());
    assert_eq!(world.status("/f").unwrap().length, 100);
    let again = world.complete(inode, &said);
    assert!(world.answer(again).unwrap().is_ok(), "a repeated complete is answered");
}

#[test]
fn add_block_is_idempotent_and_bounded() {
    let mut world = cluster();
    let inode = world.create("/f", 2).unwrap().inode;
    let first = world.add_block(inode, 0, &[]).unwrap();
    assert_eq!(world.add_block(inode, 0, &[]).unwrap(), first);
    assert_eq!(code(world.add_block(inode, 2, &[])), ErrorCode::InvalidArgument);
    let second = world.add_block(inode, 1, &[]).unwrap();
    assert_eq!(code(world.add_block(inode, 2, &[])), ErrorCode::InvalidArgument, "two blocks are open");
    let named = |block: &pb::LocatedBlock| {
        let block = block.block.as_ref().unwrap();
        (block.id as u64, block.generation, BLOCK)
    };
    let edits = world.log.len();
    assert_eq!(code(world.add_block(inode, 2, &[named(&second)])), ErrorCode::InvalidArgument, "the first stays open");
    let both = [named(&first), named(&second)];
    assert_eq!(code(world.add_block(inode, 5, &both)), ErrorCode::InvalidArgument);
    assert_eq!(world.log.len(), edits, "a refused call leaves no edit");
    let block = first.block.clone().unwrap();
    let committed = vec![(block.id as u64, block.generation, BLOCK)];
    let request = pb::AddBlockRequest {
        inode,
        client_name: "writer".into(),
        block_index: 2,
        committed: commits(&committed),
        ..Default::default()
    };
    let reply = world.send("root", request);
    assert!(world.answer(reply).is_none(), "it waits for the first block");
    let at = world.at(&nodes_of(&first)[0]);
    world.hold(at, block.id as u64, finalized(block.generation, BLOCK));
    let third: pb::AddBlockResponse = typed(world.answer(reply).unwrap().unwrap());
    assert_eq!(third.block.unwrap().offset, BLOCK, "the second has no length yet");
    let oversize = [(second.block.clone().unwrap().id as u64, second.block.unwrap().generation, BLOCK + 1)];
    let reply = world.complete(inode, &oversize);
    assert_eq!(code(world.answer(reply).unwrap()), ErrorCode::InvalidArgument);
}

#[test]
fn placement_keeps_the_writer_and_its_exclusions() {
    let mut world = cluster();
    for at in 0..20 {
        let inode = world.create(&format!("/f{at}"), 3).unwrap().inode;
        let request = pb::AddBlockRequest {
            inode,
            client_name: "writer".into(),
            local_node: "n3".into(),
            exclude_nodes: vec!["n0".into(), "n5".into()],
            ..Default::default()
        };
        let block = world.call::<pb::AddBlockResponse>("root", request).unwrap().block.unwrap();
        let nodes = nodes_of(&block);
        assert_eq!(nodes[0], "n3");
        assert!(nodes.len() == 3 && !nodes.contains(&"n0".into()) && !nodes.contains(&"n5".into()));
    }
    let mut empty = World::new();
    let inode = empty.create("/f", 3).unwrap().inode;
    let error = empty.add_block(inode, 0, &[]).unwrap_err();
    assert_eq!(error.code(), ErrorCode::NoTargets);
    assert!(error.message().starts_with("File /f could only be replicated to 0 nodes instead of minReplication (=1)."));
    empty.node_up("only", "/r");
    assert_eq!(empty.add_block(inode, 0, &[]).unwrap().replicas.len(), 1, "fewer nodes than replicas");
}

#[test]
fn a_broken_pipeline_goes_on_under_a_new_generation() {
    let mut world = cluster();
    let inode = world.create("/f", 3).unwrap().inode;
    let located = world.add_block(inode, 0, &[]).unwrap();
    let block = located.block.clone().unwrap();
    let id = block.id as u64;
    let request =
        pb::NewGenerationRequest { inode, client_name: "writer".into(), block: Some(block.clone()), call: None };
    let generation = world.call::<pb::NewGenerationResponse>("root", request).unwrap().generation;
    assert!(generation > block.generation);
    let keep = &located.replicas[..2];
    let nodes = keep
        .iter()
        .map(|replica| pb::PipelineNode { node_id: replica.node_id.clone(), storage_id: replica.storage_id.clone() })
        .collect();
    let update = pb::UpdatePipelineRequest {
        inode,
        client_name: "writer".into(),
        block: Some(block.clone()),
        new_generation: generation,
        nodes,
        call: None,
    };
    for _ in 0..2 {
        world.call::<pb::UpdatePipelineResponse>("root", update.clone()).unwrap();
    }
    let lost = world.at(&located.replicas[2].node_id);
    world.hold(lost, id, finalized(block.generation, 50));
    let reply = world.complete(inode, &[(id, block.generation, 100)]);
    assert_eq!(code(world.answer(reply).unwrap()), ErrorCode::StaleGeneration);
    let reply = world.complete(inode, &[(id, generation, 100)]);
    assert!(world.answer(reply).is_none(), "the fenced replica does not count");
    let good = world.at(&keep[0].node_id);
    world.hold(good, id, finalized(generation, 100));
    assert!(world.answer(reply).unwrap().is_ok());
    world.pass(2_000);
    assert!(world.nodes[lost].held.get(&id).is_none_or(|held| held.0 != block.generation), "the stale replica goes");
}

#[test]
fn abandoned_blocks_go_and_their_replicas_too() {
    let mut world = cluster();
    let inode = world.create("/f", 2).unwrap().inode;
    let located = world.add_block(inode, 0, &[]).unwrap();
    let block = located.block.clone().unwrap();
    let at = world.at(&located.replicas[0].node_id);
    world.hold(at, block.id as u64, (block.generation, 0, pb::ReplicaState::BeingWritten));
    let request =
        pb::AbandonBlockRequest { inode, client_name: "writer".into(), block: Some(block.clone()), call: None };
    for _ in 0..2 {
        world.call::<pb::AbandonBlockResponse>("root", request.clone()).unwrap();
    }
    world.pass(1_000);
    assert!(world.nodes[at].held.is_empty());
    let next = world.add_block(inode, 0, &[]).unwrap().block.unwrap();
    assert!(next.id > block.id && next.generation > block.generation);
}

#[test]
fn create_respects_leases_and_overwrite() {
    let mut world = cluster();
    let request = |client: &str, overwrite| pb::CreateRequest {
        path: "/f".into(),
        permission: 0o644,
        overwrite,
        client_name: client.into(),
        ..Default::default()
    };
    let first = world.call::<pb::CreateResponse>("root", request("a", false)).unwrap().status.unwrap();
    let error = world.call::<pb::CreateResponse>("root", request("b", false)).unwrap_err();
    assert_eq!(error.code(), ErrorCode::AlreadyBeingCreated);
    assert!(error.message().starts_with("Failed to CREATE_FILE /f for b on 10.9.9.9 because"));
    let edits = world.log.len();
    let second = world.call::<pb::CreateResponse>("root", request("b", true)).unwrap().status.unwrap();
    assert_eq!(world.log.len(), edits + 1, "an overwrite is one edit");
    assert_ne!(first.inode, second.inode);
    let late = pb::AddBlockRequest { inode: first.inode, client_name: "a".into(), ..Default::default() };
    let error = world.call::<pb::AddBlockResponse>("root", late).unwrap_err();
    assert_eq!(error.code(), ErrorCode::LeaseExpired);
    let other = pb::AddBlockRequest { inode: second.inode, client_name: "a".into(), ..Default::default() };
    assert_eq!(code(world.call::<pb::AddBlockResponse>("root", other)), ErrorCode::LeaseExpired);
    world.mkdirs("root", "/dir", 0o755).unwrap();
    let mut on_directory = request("c", true);
    on_directory.path = "/dir".into();
    let error = world.call::<pb::CreateResponse>("root", on_directory).unwrap_err();
    assert_eq!(error.message(), "/dir already exists as a directory");
    for (replication, block_size) in [(600, 0), (0, 1), (0, 1 << 40), (0, 1_000)] {
        let bad = pb::CreateRequest { replication, block_size, path: "/x".into(), ..request("c", false) };
        assert_eq!(code(world.call::<pb::CreateResponse>("root", bad)), ErrorCode::InvalidArgument);
    }
}

#[test]
fn a_renamed_file_can_be_finished_and_a_deleted_one_cannot() {
    let mut world = cluster();
    let inode = world.create("/a/f", 1).unwrap().inode;
    world.rename("root", "/a", "/b", pb::RenameMode::NoReplace).unwrap();
    let block = world.add_block(inode, 0, &[]).unwrap();
    assert!(world.status("/b/f").unwrap().open);
    world.delete("root", "/b", true).unwrap();
    let reply = world.complete(inode, &[(block.block.unwrap().id as u64, 1, 1)]);
    let error = world.answer(reply).unwrap().unwrap_err();
    assert_eq!(error.code(), ErrorCode::LeaseExpired);
    assert!(error.message().contains("File does not exist"), "{error}");
    assert_eq!(world.core.leases.all().count(), 0);
}

#[test]
fn a_silent_writer_loses_its_file() {
    let mut world = cluster();
    let inode = world.create("/f", 2).unwrap().inode;
    let first = world.add_block(inode, 0, &[]).unwrap();
    let block = first.block.clone().unwrap();
    let at = world.at(&first.replicas[0].node_id);
    world.hold(at, block.id as u64, finalized(block.generation, 77));
    world.add_block(inode, 1, &[]).unwrap();
    world.pass(61_000);
    // After the soft limit another writer may take it over: the file is closed first. Somebody might have something of
    // the second block, so the datanodes are asked before it is dropped.
    let other = pb::CreateRequest { path: "/f".into(), client_name: "other".into(), ..Default::default() };
    let error = world.call::<pb::CreateResponse>("root", other.clone()).unwrap_err();
    assert_eq!(error.code(), ErrorCode::AlreadyBeingCreated);
    assert!(error.message().contains("recovery is in progress"), "{error}");
    let late = [(block.id as u64, block.generation, 77)];
    let reply = world.complete(inode, &late);
    assert_eq!(code(world.answer(reply).unwrap()), ErrorCode::LeaseExpired, "the old writer is fenced");
    world.pass(75_000);
    assert_eq!(code(world.call::<pb::CreateResponse>("root", other)), ErrorCode::FileAlreadyExists);
    let status = world.status("/f").unwrap();
    assert_eq!((status.open, status.length), (false, 77), "what was reported whole is kept");
    assert_eq!(world.locations("/f").len(), 1);
    // And after the hard limit the namenode closes it itself, unless the writer renews.
    let kept = world.create("/g", 2).unwrap().inode;
    for _ in 0..8 {
        world.pass(50_000);
        world.call::<pb::RenewLeaseResponse>("root", pb::RenewLeaseRequest { client_name: "writer".into() }).unwrap();
    }
    assert!(world.status("/g").unwrap().open);
    world.pass(302_000);
    assert!(!world.status("/g").unwrap().open);
    assert_eq!(code(world.add_block(kept, 0, &[])), ErrorCode::LeaseExpired);
}

#[test]
fn a_block_whose_nodes_are_away_waits_for_them() {
    let mut world = cluster();
    let inode = world.create("/f", 2).unwrap().inode;
    let located = world.add_block(inode, 0, &[]).unwrap();
    let block = located.block.clone().unwrap();
    let pipeline: Vec<usize> = nodes_of(&located).iter().map(|id| world.at(id)).collect();
    for at in &pipeline {
        // The writer was told that these bytes are on disk.
        world.hold(*at, block.id as u64, (block.generation, 70, pb::ReplicaState::BeingWritten));
        world.nodes[*at].up = false;
    }
    world.pass(400_000);
    let status = world.status("/f").unwrap();
    assert!(status.open && world.core.leases.holder_of(inode) == Some("cairn-namenode-recovery"));
    for at in &pipeline {
        world.nodes[*at].up = true;
    }
    world.pass(310_000);
    let status = world.status("/f").unwrap();
    assert_eq!((status.open, status.length), (false, 70));
}

#[test]
fn a_late_answer_to_an_earlier_recovery_counts() {
    let mut world = cluster();
    let inode = world.create("/f", 1).unwrap().inode;
    let located = world.add_block(inode, 0, &[]).unwrap();
    let block = located.block.clone().unwrap();
    let at = world.at(&nodes_of(&located)[0]);
    world.hold(at, block.id as u64, (block.generation, 70, pb::ReplicaState::BeingWritten));
    let mut orders = Vec::new();
    for _ in 0..800 {
        // The node is told twice before it is ready.
        let told = (0..6).flat_map(|at| world.heartbeat(at).unwrap()).collect::<Vec<_>>();
        orders.extend(told.into_iter().filter_map(|order| match order {
            Order::Recover(recover) => Some(recover),
            _ => None,
        }));
        if orders.len() == 2 {
            break;
        }
        world.step(500);
    }
    assert!(orders[0].new_generation < orders[1].new_generation);
    world.recover(at, &orders[0]);
    let status = world.status("/f").unwrap();
    assert_eq!((status.open, status.length), (false, 70));
}

#[test]
fn time_goes_on_however_slow_the_owner_is() {
    let mut world = cluster();
    world.create("/f", 1).unwrap();
    for _ in 0..200 {
        world.step(10_000);
    }
    assert!(!world.status("/f").unwrap().open);
    assert!(world.cluster().nodes.iter().all(|node| node.state() == pb::NodeState::Dead));
}

#[test]
fn an_answer_holds_only_so_many_blocks() {
    let mut world = cluster();
    for name in ["/d/a", "/d/b"] {
        world.write(name, 1, 101);
    }
    let request = pb::ListRequest { path: "/d".into(), with_locations: true, ..Default::default() };
    let page: pb::ListResponse = world.call("root", request.clone()).unwrap();
    assert_eq!((page.entries.len(), page.remaining), (1, 1));
    let rest = pb::ListRequest { start_after: "a".into(), ..request };
    let page: pb::ListResponse = world.call("root", rest).unwrap();
    assert_eq!((page.entries.len(), page.remaining, page.entries[0].blocks.len()), (1, 0, 101));
    world.write("/long", 1, 201);
    let blocks = world.locations("/long");
    assert_eq!(blocks.len(), 200);
    let rest = pb::GetBlockLocationsRequest { path: "/long".into(), offset: 200 * BLOCK, length: 0 };
    let rest: pb::GetBlockLocationsResponse = world.call("root", rest).unwrap();
    assert_eq!(rest.blocks.len(), 1);
}

#[test]
fn a_pause_of_the_owner_takes_no_lease_and_kills_no_node() {
    let mut world = cluster();
    world.create("/f", 1).unwrap();
    world.step(3_600_000);
    assert!(world.status("/f").unwrap().open);
    assert!(world.cluster().nodes.iter().all(|node| node.state() == pb::NodeState::Live));
}

#[test]
fn repeated_calls_get_the_first_answer_even_after_a_restart() {
    let mut world = cluster();
    let call = |id: u64| {
        Some(pb::CallContext { client_id: vec![7; 16].into(), call_id: id, lowest_unanswered: 1, seen_txid: 0 })
    };
    let create = pb::CreateRequest { call: call(1), path: "/f".into(), client_name: "w".into(), ..Default::default() };
    let first = world.call::<pb::CreateResponse>("root", create.clone()).unwrap();
    let edits = world.log.len();
    assert_eq!(world.call::<pb::CreateResponse>("root", create.clone()).unwrap(), first);
    let rename = pb::RenameRequest { call: call(2), from: "/f".into(), to: "/g".into(), mode: 0 };
    world.call::<pb::RenameResponse>("root", rename.clone()).unwrap();
    world.call::<pb::RenameResponse>("root", rename.clone()).unwrap();
    let delete = pb::DeleteRequest { call: call(3), path: "/g".into(), recursive: true, only_inode: 0 };
    for _ in 0..2 {
        assert!(world.call::<pb::DeleteResponse>("root", delete.clone()).unwrap().existed);
    }
    assert_eq!(world.log.len(), edits + 2);
    let thief = world.call::<pb::DeleteResponse>("ann", delete.clone());
    assert_eq!(code(thief), ErrorCode::PermissionDenied, "the client id is of another user");
    world.restart();
    world.step(1);
    assert_eq!(world.call::<pb::CreateResponse>("root", create).unwrap().status, first.status);
    world.call::<pb::RenameResponse>("root", rename).unwrap();
    assert!(world.call::<pb::DeleteResponse>("root", delete).unwrap().existed);
    assert_eq!(world.log.len(), edits + 2);
    // A failed call is not kept, and a duplicate of a waiting one waits with it.
    let failing = pb::MkdirsRequest { call: call(4), path: "/x/y".into(), ..Default::default() };
    assert!(world.call::<pb::MkdirsResponse>("root", failing.clone()).is_err());
    world.mkdirs("root", "/x", 0o755).unwrap();
    assert!(world.call::<pb::MkdirsResponse>("root", failing).is_ok());
}

#[test]
fn reads_depend_on_what_they_saw() {
    let mut world = cluster();
    world.sync();
    let look = |path: &str| pb::GetStatusRequest { path: path.into() };
    let (_, idle) = world.call_with::<pb::GetStatusResponse>("root", look("/"));
    assert_eq!(idle, TxId(0));
    world.mkdirs("root", "/a", 0o755).unwrap();
    let made = world.core.last_txid();
    world.mkdirs("root", "/b", 0o755).unwrap();
    let later = world.core.last_txid();
    let (_, depends_on) = world.call_with::<pb::GetStatusResponse>("root", look("/a"));
    assert_eq!(depends_on, later, "the root was changed by the second one");
    let (missing, depends_on) = world.call_with::<pb::GetStatusResponse>("root", look("/c"));
    assert!(missing.is_err() && depends_on >= made, "that it is missing was seen too");
    world.sync();
    let (_, depends_on) = world.call_with::<pb::GetStatusResponse>("root", look("/a"));
    assert_eq!(depends_on, TxId(0));
}

#[test]
fn an_abandoned_block_is_recovered_to_one_length() {
    let mut world = cluster();
    let inode = world.create("/f", 3).unwrap().inode;
    let located = world.add_block(inode, 0, &[]).unwrap();
    let block = located.block.clone().unwrap();
    let id = block.id as u64;
    for (replica, length) in located.replicas.iter().zip([50, 40, 45]) {
        let at = world.at(&replica.node_id);
        world.hold(at, id, (block.generation, length, pb::ReplicaState::BeingWritten));
    }
    // The namenode dies too, between taking the file over and hearing of the recovery.
    world.pass(300_500);
    assert!(world.status("/f").unwrap().open);
    while world.core.leases.holder_of(inode) == Some("writer") {
        world.step(500);
    }
    for node in &mut world.nodes {
        node.held.values_mut().for_each(|held| held.2 = pb::ReplicaState::Recovering);
    }
    world.restart();
    for at in 0..6 {
        world.node_up(&format!("n{at}"), &format!("/r{}", at / 2));
    }
    world.pass(5_000);
    let status = world.status("/f").unwrap();
    assert_eq!((status.open, status.length), (false, 40));
    let located = world.locations("/f");
    assert!(located[0].complete && located[0].replicas.len() == 3);
    assert!(located[0].block.as_ref().unwrap().generation > block.generation);
    world.pass(3_000);
    assert!(world.nodes.iter().all(|node| node.held.values().all(|held| held.1 == 40)));
}

#[test]
fn what_follows_an_unfinished_block_goes_with_its_writer() {
    let mut world = cluster();
    // Two blocks are open: the writer begins the next one while the last one is made durable.
    for (path, first, kept) in [("/cut", BLOCK - 1, vec![BLOCK - 1]), ("/whole", BLOCK, vec![BLOCK, 70])] {
        let inode = world.create(path, 3).unwrap().inode;
        for (index, length) in [(0, first), (1, 70)] {
            let located = world.add_block(inode, index, &[]).unwrap();
            let block = located.block.clone().unwrap();
            for replica in &located.replicas {
                let at = world.at(&replica.node_id);
                world.hold(at, block.id as u64, finalized(block.generation, length));
            }
        }
        world.pass(320_000);
        let status = world.status(path).unwrap();
        let lengths: Vec<u64> = world.locations(path).iter().map(|block| block.length).collect();
        assert_eq!((status.open, lengths), (false, kept), "{path}");
    }
}

#[test]
fn short_files_take_no_more_room_than_they_have_bytes() {
    let size = 128 << 20;
    let mut world = World::with(CoreSettings { default_block_size: size, ..settings() });
    // Room for two blocks and a bit on each of three nodes, and no heartbeat after this.
    for name in ["a", "b", "c"] {
        let at = world.node_up(name, "/r");
        world.nodes[at].remaining = 2 * size + 20 * super::BLOCK;
        world.heartbeat(at).unwrap();
    }
    for number in 0..20 {
        world.write(&format!("/short-{number}"), 3, 1);
    }
    // Blocks that are written and those that are given up count, too.
    let inode = world.create("/a", 3).unwrap().inode;
    world.add_block(inode, 0, &[]).unwrap();
    let other = world.create("/b", 3).unwrap().inode;
    world.add_block(other, 0, &[]).unwrap();
    let third = world.create("/c", 3).unwrap().inode;
    assert_eq!(code(world.add_block(third, 0, &[])), ErrorCode::NoTargets);
    world.delete("root", "/a", false).unwrap();
    world.add_block(third, 0, &[]).unwrap();
}

//! Pipelines that lose nodes, and what a writer asks twice.

use super::appends::recover_lease;
use super::*;

fn names(block: &pb::LocatedBlock) -> Vec<String> {
    block.replicas.iter().map(|replica| replica.node_id.clone()).collect()
}

fn ask(inode: u64, block: &pb::LocatedBlock, present: &[String], excluded: &[&str]) -> pb::AddPipelineNodeRequest {
    pb::AddPipelineNodeRequest {
        inode,
        client_name: "writer".into(),
        block: block.block.clone(),
        present_nodes: present.to_vec(),
        exclude_nodes: excluded.iter().map(|name| (*name).to_owned()).collect(),
    }
}

fn new_generation(world: &mut World, inode: u64, block: &pb::Block) -> u64 {
    let request =
        pb::NewGenerationRequest { inode, client_name: "writer".into(), block: Some(block.clone()), call: None };
    world.call::<pb::NewGenerationResponse>("root", request).unwrap().generation
}

fn node_of(answer: &pb::AddPipelineNodeResponse) -> Option<String> {
    answer.node.as_ref().map(|node| node.node_id.clone())
}

#[test]
fn one_more_node_is_placed_beyond_those_present_and_failed() {
    let mut world = cluster();
    let inode = world.create("/f", 3).unwrap().inode;
    let block = world.add_block(inode, 0, &[]).unwrap();
    let pipeline = names(&block);
    let edits = world.log.len();
    for _ in 0..30 {
        let request = ask(inode, &block, &pipeline[..1], &[&pipeline[1], &pipeline[2]]);
        let answer: pb::AddPipelineNodeResponse = world.call("root", request).unwrap();
        let chosen = answer.node.clone().unwrap();
        assert!(!pipeline.contains(&chosen.node_id), "{chosen:?}");
        assert_ne!(chosen.rack, block.replicas[0].rack, "the usual rules: the second is on another rack");
        assert_eq!(answer.usable_nodes, 6, "the excluded ones live, as far as the namenode knows");
        assert!(!chosen.address.is_empty() && !chosen.storage_id.is_empty());
    }
    assert_eq!(world.log.len(), edits, "asking changes nothing");
    let all: Vec<&str> = ["n0", "n1", "n2", "n3", "n4", "n5"].into();
    let answer: pb::AddPipelineNodeResponse = world.call("root", ask(inode, &block, &pipeline[..1], &all)).unwrap();
    assert_eq!((node_of(&answer), answer.usable_nodes), (None, 6));
}

#[test]
fn only_good_nodes_are_usable() {
    let mut world = World::new();
    for name in ["a", "b", "c"] {
        world.node_up(name, "/r");
    }
    let inode = world.create("/f", 3).unwrap().inode;
    let block = world.add_block(inode, 0, &[]).unwrap();
    let present = ["a".to_owned()];
    let usable = |world: &mut World| {
        let answer: pb::AddPipelineNodeResponse = world.call("root", ask(inode, &block, &present, &[])).unwrap();
        (node_of(&answer), answer.usable_nodes)
    };
    assert_eq!(usable(&mut world).1, 3);
    // One falls silent: stale after five seconds, long before it is dead.
    let silent = world.at("b");
    world.nodes[silent].up = false;
    world.pass(6_000);
    assert_eq!(usable(&mut world), (Some("c".into()), 2));
    let full = world.at("c");
    world.nodes[full].remaining = 0;
    world.pass(1_500);
    assert_eq!(usable(&mut world), (None, 1));
    // It is the silent node's turn again when it speaks.
    world.nodes[silent].up = true;
    world.pass(1_500);
    assert_eq!(usable(&mut world), (Some("b".into()), 2));
}

#[test]
fn only_the_writer_of_an_open_block_gets_a_node() {
    let mut world = cluster();
    let inode = world.create("/f", 1).unwrap().inode;
    let block = world.add_block(inode, 0, &[]).unwrap();
    let request = ask(inode, &block, &[], &[]);
    let thief = pb::AddPipelineNodeRequest { client_name: "other".into(), ..request.clone() };
    assert_eq!(code(world.call::<pb::AddPipelineNodeResponse>("root", thief)), ErrorCode::LeaseExpired);
    let many = pb::AddPipelineNodeRequest { exclude_nodes: vec!["x".into(); 5_000], ..request.clone() };
    assert_eq!(code(world.call::<pb::AddPipelineNodeResponse>("root", many)), ErrorCode::InvalidArgument);
    let unknown = pb::AddPipelineNodeRequest { exclude_nodes: vec!["x".into()], ..request.clone() };
    assert!(world.call::<pb::AddPipelineNodeResponse>("root", unknown).unwrap().node.is_some());
    world.delete("root", "/f", false).unwrap();
    assert_eq!(code(world.call::<pb::AddPipelineNodeResponse>("root", request)), ErrorCode::LeaseExpired);
}

#[test]
fn after_a_start_a_writer_waits_for_the_known_nodes() {
    let mut world = World::new();
    for name in ["a", "b"] {
        world.node_up(name, "/r");
    }
    let inode = world.create("/f", 2).unwrap().inode;
    let block = world.add_block(inode, 0, &[]).unwrap();
    world.restart();
    world.node_up("a", "/r");
    world.step(1);
    let request = || ask(inode, &block, &["a".to_owned()], &[]);
    assert_eq!(code(world.call::<pb::AddPipelineNodeResponse>("root", request())), ErrorCode::Busy);
    world.node_up("b", "/r");
    world.step(1);
    let answer: pb::AddPipelineNodeResponse = world.call("root", request()).unwrap();
    assert_eq!((node_of(&answer), answer.usable_nodes), (Some("b".into()), 2));
}

#[test]
fn a_node_that_joined_counts_and_one_that_was_left_out_does_not() {
    let mut world = cluster();
    let inode = world.create("/f", 3).unwrap().inode;
    let located = world.add_block(inode, 0, &[]).unwrap();
    let (block, pipeline) = (located.block.clone().unwrap(), names(&located));
    let id = block.id as u64;
    let answer: pb::AddPipelineNodeResponse =
        world.call("root", ask(inode, &located, &pipeline[..1], &[&pipeline[1], &pipeline[2]])).unwrap();
    let joined = node_of(&answer).unwrap();
    let generation = new_generation(&mut world, inode, &block);
    // The copy is reported before the pipeline is updated: it waits for its writer, and counts for nothing.
    let copy = world.at(&joined);
    world.hold(copy, id, (generation, 500, pb::ReplicaState::Recovering));
    let node = |name: &String| pb::PipelineNode { node_id: name.clone(), storage_id: format!("{name}-s") };
    let update = pb::UpdatePipelineRequest {
        inode,
        client_name: "writer".into(),
        block: Some(block.clone()),
        new_generation: generation,
        nodes: vec![node(&pipeline[0]), node(&joined)],
        ..Default::default()
    };
    world.call::<pb::UpdatePipelineResponse>("root", update).unwrap();
    // One that was left out finishes late, with the old generation.
    let left_out = world.at(&pipeline[1]);
    world.hold(left_out, id, (block.generation, 1_000, pb::ReplicaState::Finalized));
    let reply = world.complete(inode, &[(id, generation, 1_000)]);
    assert!(world.answer(reply).is_none(), "no replica of the new generation is whole");
    world.hold(copy, id, (generation, 1_000, pb::ReplicaState::Finalized));
    assert!(world.answer(reply).unwrap().is_ok());
    assert_eq!(names(&world.locations("/f")[0]), [joined]);
}

/// A writer renews the generation on its nodes, and neither it nor the namenode lives to put it in force.
#[test]
fn after_a_start_the_nodes_of_a_newer_generation_are_told_to_readers() {
    let mut world = cluster();
    let inode = world.create("/f", 2).unwrap().inode;
    let located = world.add_block(inode, 0, &[]).unwrap();
    let (block, pipeline) = (located.block.clone().unwrap(), names(&located));
    let id = block.id as u64;
    let generation = new_generation(&mut world, inode, &block);
    let (newer, left_out) = (world.at(&pipeline[0]), world.at(&pipeline[1]));
    world.hold(newer, id, (generation, 500, pb::ReplicaState::BeingWritten));
    world.hold(left_out, id, (block.generation - 1, 500, pb::ReplicaState::Recovering));
    world.restart();
    for at in 0..world.nodes.len() {
        let (id, rack) = (world.nodes[at].id.clone(), world.nodes[at].rack.clone());
        world.node_up(&id, &rack);
    }
    world.step(1);
    let found = world.locations("/f").remove(0);
    assert_eq!((names(&found), found.block, found.others_may_hold), (vec![pipeline[0].clone()], Some(block), false));
    assert_eq!(world.cluster().corrupt, 0, "what a writer left behind is not damage");
    // One that this namenode never handed out for the block comes from elsewhere.
    world.hold(newer, id, (generation + 1, 500, pb::ReplicaState::BeingWritten));
    let found = world.locations("/f").remove(0);
    assert_eq!((names(&found), found.others_may_hold), (Vec::new(), true));
}

/// Of a block that is being written, readers and whoever recovers it hear how many of its nodes are away.
#[test]
fn nodes_of_a_pipeline_that_are_away_are_told_of() {
    let mut world = cluster();
    let inode = world.create("/f", 3).unwrap().inode;
    let located = world.add_block(inode, 0, &[]).unwrap();
    let (block, pipeline) = (located.block.clone().unwrap(), names(&located));
    let id = block.id as u64;
    assert!(!world.locations("/f")[0].others_may_hold);
    let stays = world.at(&pipeline[0]);
    world.hold(stays, id, (block.generation, 70, pb::ReplicaState::Recovering));
    for name in &pipeline[1..] {
        let at = world.at(name);
        world.nodes[at].up = false;
    }
    world.pass(settings().dead_interval_ms + 2_000);
    let found = world.locations("/f").remove(0);
    assert_eq!((names(&found), found.others_may_hold), (vec![pipeline[0].clone()], true));
    recover_lease(&mut world, "/f").unwrap();
    world.step(500);
    let orders = world.heartbeat(stays).unwrap().into_iter();
    let orders: Vec<_> =
        orders.filter_map(|order| if let Order::Recover(order) = order { Some(order) } else { None }).collect();
    assert_eq!((orders.len(), orders[0].replicas.len(), orders[0].silent), (1, 1, 2));
}

/// Nothing was written into a block whose pipeline is forgotten, as far as the namenode can know.
#[test]
fn after_a_start_all_nodes_are_asked_for_an_open_block_that_nobody_reports() {
    let mut world = World::new();
    for name in ["a", "b", "c"] {
        world.node_up(name, "/r");
    }
    let inode = world.create("/f", 2).unwrap().inode;
    let pipeline = names(&world.add_block(inode, 0, &[]).unwrap());
    world.restart();
    for (name, known) in [("a", 0), ("b", 0), ("c", 3)] {
        world.node_up(name, "/r");
        world.step(1);
        let found = world.locations("/f").remove(0);
        assert_eq!(found.replicas.len(), known, "{name} is up: {pipeline:?} is the pipeline");
        assert_eq!((found.complete, found.length, found.others_may_hold), (false, 0, known == 0));
    }
}

/// Each changing call of a writer is sent, the namenode restarts before the answer arrives, and it is sent again.
#[test]
fn no_call_of_a_writer_is_applied_twice_across_a_restart() {
    let mut world = cluster();
    let mut calls = 0;
    let mut call = || {
        calls += 1;
        Some(pb::CallContext { client_id: vec![9; 16].into(), call_id: calls, lowest_unanswered: 1, seen_txid: 0 })
    };
    /// Sends twice with a restart in between; the same answer, and one set of edits.
    fn twice<Q, A>(world: &mut World, request: Q) -> A
    where
        Q: Into<ClientRequest> + Clone,
        A: TryFrom<ClientResponse> + PartialEq + std::fmt::Debug,
    {
        let first: A = world.call("root", request.clone()).unwrap();
        let edits = world.log.len();
        world.restart();
        for at in 0..world.nodes.len() {
            let (id, rack) = (world.nodes[at].id.clone(), world.nodes[at].rack.clone());
            world.node_up(&id, &rack);
        }
        world.step(1);
        let before = world.log.len();
        let again: A = world.call("root", request).unwrap();
        assert_eq!(again, first);
        let added = world.log.len() - before;
        assert_eq!(added, 0, "the repetition left edits behind {edits}");
        first
    }
    let writer = || "writer".to_owned();
    let create = pb::CreateRequest { call: call(), path: "/f".into(), client_name: writer(), ..Default::default() };
    let inode = twice::<_, pb::CreateResponse>(&mut world, create).status.unwrap().inode;
    let add = pb::AddBlockRequest { call: call(), inode, client_name: writer(), ..Default::default() };
    // The pipeline is chosen anew (its nodes are not in the log), the block is the same.
    let first = world.call::<pb::AddBlockResponse>("root", add.clone()).unwrap().block.unwrap();
    world.restart();
    for at in 0..world.nodes.len() {
        let (id, rack) = (world.nodes[at].id.clone(), world.nodes[at].rack.clone());
        world.node_up(&id, &rack);
    }
    world.step(1);
    let again = world.call::<pb::AddBlockResponse>("root", add).unwrap().block.unwrap();
    assert_eq!(again.block, first.block);
    let abandon = pb::AbandonBlockRequest { call: call(), inode, client_name: writer(), block: again.block };
    twice::<_, pb::AbandonBlockResponse>(&mut world, abandon);
    let located = world.add_block(inode, 0, &[]).unwrap();
    let block = located.block.clone().unwrap();
    let generation =
        pb::NewGenerationRequest { call: call(), inode, client_name: writer(), block: Some(block.clone()) };
    let new_generation = twice::<_, pb::NewGenerationResponse>(&mut world, generation).generation;
    let node = names(&located)[0].clone();
    let update = pb::UpdatePipelineRequest {
        call: call(),
        inode,
        client_name: writer(),
        block: Some(block.clone()),
        new_generation,
        nodes: vec![pb::PipelineNode { storage_id: format!("{node}-s"), node_id: node.clone() }],
    };
    twice::<_, pb::UpdatePipelineResponse>(&mut world, update);
    let at = world.at(&node);
    world.hold(at, block.id as u64, (new_generation, 700, pb::ReplicaState::Finalized));
    let committed = commits(&[(block.id as u64, new_generation, 700)]);
    let complete = pb::CompleteRequest { call: call(), inode, client_name: writer(), committed };
    assert_eq!(twice::<_, pb::CompleteResponse>(&mut world, complete).status.unwrap().length, 700);
    let delete = pb::DeleteRequest { call: call(), path: "/f".into(), only_inode: inode, ..Default::default() };
    assert!(twice::<_, pb::DeleteResponse>(&mut world, delete).existed);
}

#[test]
fn a_writer_that_gives_up_deletes_its_own_file_only() {
    let mut world = cluster();
    let mine = world.create("/f", 1).unwrap().inode;
    world.rename("root", "/f", "/moved", pb::RenameMode::NoReplace).unwrap();
    let other = world.create("/f", 1).unwrap().inode;
    let give_up = |only_inode| pb::DeleteRequest { path: "/f".into(), only_inode, ..Default::default() };
    assert!(!world.call::<pb::DeleteResponse>("root", give_up(mine)).unwrap().existed);
    assert_eq!(world.status("/f").unwrap().inode, other);
    assert!(world.call::<pb::DeleteResponse>("root", give_up(other)).unwrap().existed);
    assert!(world.status("/f").is_err());
    assert!(!world.call::<pb::DeleteResponse>("root", give_up(other)).unwrap().existed);
}

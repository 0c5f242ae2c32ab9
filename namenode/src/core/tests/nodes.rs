//! Datanodes: death, repair, excess, unknown and bad replicas.

use super::*;

pub(super) fn holders(world: &World, id: u64) -> Vec<usize> {
    (0..world.nodes.len()).filter(|at| world.nodes[*at].up && world.nodes[*at].held.contains_key(&id)).collect()
}

fn delete_orders(world: &World) -> usize {
    world.orders.iter().filter(|(_, order)| matches!(order, Order::Delete(_))).count()
}

#[test]
fn a_dead_node_is_replaced_by_risk_and_its_return_is_trimmed() {
    let mut world = cluster();
    let mut blocks = Vec::new();
    for at in 0..30 {
        blocks.extend(world.write(&format!("/f{at}"), 3, 1));
    }
    let lonely = world.write("/lonely", 2, 4);
    world.pass(2_000);
    assert_eq!(world.cluster().under_replicated, 0);
    world.nodes[0].up = false;
    let lost: Vec<u64> = world.nodes[0].held.keys().copied().collect();
    assert!(!lost.is_empty());
    world.pass(29_000);
    assert!(
        world.orders.iter().all(|(_, order)| !matches!(order, Order::Replicate(_))),
        "not before the dead interval"
    );
    world.pass(5_000);
    let report = world.cluster();
    assert_eq!(report.nodes[0].state(), pb::NodeState::Dead);
    assert_eq!((report.under_replicated, report.missing, report.pending_replication), (0, 0, 0));
    for id in &blocks {
        let at = holders(&world, *id);
        let mut racks: Vec<&str> = at.iter().map(|at| &*world.nodes[*at].rack).collect();
        racks.sort_unstable();
        racks.dedup();
        assert!(at.len() == 3 && racks.len() >= 2, "{at:?}");
    }
    // Blocks with one replica left went first.
    let copied: Vec<u64> = world
        .orders
        .iter()
        .filter_map(|(_, order)| match order {
            Order::Replicate(copy) => Some(copy.block.as_ref().unwrap().id as u64),
            _ => None,
        })
        .collect();
    assert_eq!(copied.len(), lost.len());
    world.nodes[0].up = true;
    world.pass(8_000);
    for id in blocks.iter().chain(&lonely) {
        let wanted = if lonely.contains(id) { 2 } else { 3 };
        assert_eq!(holders(&world, *id).len(), wanted, "block {id}");
    }
    assert_eq!(world.cluster().over_replicated, 0);
}

#[test]
fn the_last_replica_goes_first_and_caps_hold() {
    let mut world = World::with(CoreSettings { max_repairs_per_node: 2, ..settings() });
    for at in 0..4 {
        world.node_up(&format!("n{at}"), &format!("/r{}", at % 2));
    }
    let mut single = Vec::new();
    for at in 0..20 {
        let id = world.write(&format!("/f{at}"), 3, 1)[0];
        // Half of the blocks lose all but one replica, the others all but two.
        let all = holders(&world, id);
        let keep = if at % 2 == 1 { 1 } else { 2 };
        for node in &all[keep..] {
            let generation = world.nodes[*node].held[&id].0;
            world.remove(*node, id, generation);
        }
        if keep == 1 {
            single.push(id);
        }
    }
    world.step(10);
    let report = world.cluster();
    assert_eq!(report.under_replicated, 20);
    assert!(report.pending_replication <= 4, "{} copies under way with a cap of 2", report.pending_replication);
    let orders: Vec<Order> = (0..4).flat_map(|at| world.heartbeat(at).unwrap()).collect();
    let first: Vec<u64> = orders
        .iter()
        .filter_map(|order| match order {
            Order::Replicate(copy) => Some(copy.block.as_ref().unwrap().id as u64),
            _ => None,
        })
        .collect();
    assert!(!first.is_empty() && first.iter().all(|id| single.contains(id)), "{first:?} of {single:?}");
    // Those that found no free node kept their places, and got their turn.
    world.pass(30_000);
    assert_eq!((world.cluster().under_replicated, world.core.repair.queue_len()), (0, 0));
}

#[test]
fn blocks_on_one_rack_are_spread() {
    let mut world = World::new();
    for at in 0..3 {
        world.node_up(&format!("n{at}"), "/r0");
    }
    let id = world.write("/f", 3, 1)[0];
    world.pass(2_000);
    assert_eq!(world.cluster().mis_replicated, 0, "there is only one rack");
    world.node_up("far", "/r1");
    world.step(1);
    assert_eq!(world.cluster().mis_replicated, 1);
    world.pass(6_000);
    let at = holders(&world, id);
    assert!(at.len() == 3 && at.contains(&3), "{at:?}");
    assert_eq!(world.cluster().mis_replicated, 0);
}

#[test]
fn setrep_adds_and_removes() {
    let mut world = cluster();
    let id = world.write("/f", 2, 1)[0];
    let setrep = |replication| pb::SetReplicationRequest { path: "/f".into(), replication, call: None };
    world.call::<pb::SetReplicationResponse>("root", setrep(4)).unwrap();
    world.pass(3_000);
    assert_eq!(holders(&world, id).len(), 4);
    world.call::<pb::SetReplicationResponse>("root", setrep(1)).unwrap();
    world.pass(3_000);
    assert_eq!(holders(&world, id).len(), 1);
}

#[test]
fn deleted_files_lose_their_replicas() {
    let mut world = cluster();
    world.write("/a/f", 3, 4);
    world.delete("root", "/a", true).unwrap();
    world.pass(1_000);
    assert!(world.nodes.iter().all(|node| node.held.is_empty()));
    let report = world.cluster();
    assert_eq!((report.blocks, report.pending_deletion), (0, 0));
    assert!(report.nodes.iter().all(|node| node.blocks == 0));
}

#[test]
fn a_corrupt_replica_is_replaced_and_the_last_one_kept() {
    let mut world = cluster();
    let id = world.write("/f", 2, 1)[0];
    let at = holders(&world, id);
    let generation = world.nodes[at[0]].held[&id].0;
    let bad = |node: &str| pb::ReportBadReplicaRequest {
        block: Some(pb::Block { pool: "pool".into(), id: id as i64, generation }),
        node_id: node.into(),
        ..Default::default()
    };
    // A reader's word only makes the node look.
    let node = world.nodes[at[0]].id.clone();
    world.call::<pb::ReportBadReplicaResponse>("ann", bad(&node)).unwrap();
    let orders = world.heartbeat(at[0]).unwrap();
    assert!(matches!(&orders[..], [Order::Verify(verify)] if verify.replicas.len() == 1), "{orders:?}");
    assert_eq!(world.locations("/f")[0].replicas.len(), 2);
    // Both nodes find their replicas damaged: the first is replaced, the last one stays.
    for index in &at {
        world.hold(*index, id, (generation, BLOCK, pb::ReplicaState::ReplicaCorrupt));
    }
    world.pass(5_000);
    assert_eq!(holders(&world, id), at);
    // Where they lie is told, so that they can be looked at again.
    let located = world.locations("/f").remove(0);
    assert!(located.corrupt && located.replicas.len() == 2, "{located:?}");
    assert!(located.replicas.iter().all(|replica| replica.state() == pb::ReplicaState::ReplicaCorrupt));
    assert_eq!((world.cluster().missing, world.cluster().corrupt), (1, 1));
    // One of them turns out well.
    world.hold(at[0], id, (generation, BLOCK, pb::ReplicaState::Finalized));
    world.pass(5_000);
    let now = holders(&world, id);
    assert!(now.len() == 2 && now.contains(&at[0]), "{now:?}");
    assert!(now.iter().all(|at| world.nodes[*at].held[&id].2 == pb::ReplicaState::Finalized));
    assert_eq!((world.cluster().missing, world.cluster().corrupt), (0, 0));
}

#[test]
fn only_ids_inside_a_range_are_forgotten() {
    let mut world = cluster();
    let ids = world.write("/f", 1, 1).into_iter().chain(world.write("/g", 1, 1)).collect::<Vec<_>>();
    let at = holders(&world, ids[0])[0];
    let (generation, length, _) = world.nodes[at].held[&ids[0]];
    // The same node gets a replica of both, then reports a range around the first without it.
    for id in &ids {
        let generation = world.nodes[holders(&world, *id)[0]].held[id].0;
        world.hold(at, *id, (generation, length, pb::ReplicaState::Finalized));
    }
    let before = world.locations("/g")[0].replicas.len();
    let range = |replicas| pb::FullReportRange {
        storage_id: format!("n{at}-s"),
        pool: "pool".into(),
        first_id: ids[0] as i64 - 5,
        last_id: ids[0] as i64,
        replicas,
        ..Default::default()
    };
    world.report(at, Report::Range(range(Vec::new())));
    assert!(world.locations("/f")[0].replicas.is_empty());
    assert_eq!(world.locations("/g")[0].replicas.len(), before);
    let back = pb::ReplicaReport { id: ids[0] as i64, generation, length, state: 0 };
    world.report(at, Report::Range(range(vec![back])));
    assert_eq!(world.locations("/f")[0].replicas.len(), 1);
    // Nonsense ends the stream, not the namenode.
    world.report(at, Report::Range(range(vec![back, back])));
    assert_eq!(world.closed.last(), Some(&world.nodes[at].stream));
}

#[test]
fn a_write_goes_to_stale_nodes_rather_than_nowhere() {
    let mut world = cluster();
    (0..12).for_each(|_| world.step(500));
    let inode = world.create("/f", 3).unwrap().inode;
    let block = world.add_block(inode, 0, &[]).unwrap();
    assert_eq!(block.replicas.len(), 3);
    // One that is heard is enough: the others may hang, and repair sees to the rest.
    world.heartbeat(2).unwrap();
    let inode = world.create("/g", 3).unwrap().inode;
    let block = world.add_block(inode, 0, &[]).unwrap();
    let nodes: Vec<_> = block.replicas.iter().map(|replica| &replica.node_id).collect();
    assert_eq!(nodes, [&world.nodes[2].id]);
}

#[test]
fn a_lost_volume_and_stale_nodes() {
    let mut world = cluster();
    let id = world.write("/f", 3, 1)[0];
    let at = holders(&world, id)[0];
    let node = world.nodes[at].id.clone();
    // A node that is silent for the stale interval is read last and gets no new blocks.
    for _ in 0..12 {
        for other in (0..6).filter(|other| *other != at) {
            world.heartbeat(other).unwrap();
        }
        world.step(500);
    }
    let replicas = world.locations("/f")[0].replicas.clone();
    assert_eq!(replicas.last().unwrap().node_id, node);
    assert_eq!(replicas.last().unwrap().state(), pb::ReplicaState::ReplicaStale);
    for n in 0..10 {
        let inode = world.create(&format!("/new{n}"), 3).unwrap().inode;
        let block = world.add_block(inode, 0, &[]).unwrap();
        assert!(block.replicas.iter().all(|replica| replica.node_id != node));
    }
    // Then its disk fails.
    world.nodes[at].held.clear();
    let request = pb::HeartbeatRequest {
        node_id: node,
        registration: world.nodes[at].registration,
        storages: vec![pb::StorageInfo { failure: "I/O error".into(), ..world.infos(at)[0].clone() }],
        epoch: 1,
        ..Default::default()
    };
    world.event(Event::Heartbeat { reply: ReplyTo(77), request });
    world.step(1);
    world.nodes[at].up = false;
    world.pass(3_000);
    assert_eq!(holders(&world, id).len(), 3);
    // The disk comes back with another block: only a new full report tells.
    let (other, generation) = (world.write("/g", 1, 1)[0], world.core.counters.generation);
    let holder = holders(&world, other)[0];
    world.remove(holder, other, generation);
    world.nodes[at].held.insert(other, (generation, BLOCK, pb::ReplicaState::Finalized));
    world.nodes[at].up = true;
    world.pass(2_000);
    assert_eq!(world.locations("/g")[0].replicas.len(), 1);
}

fn setrep(world: &mut World, path: &str, replication: u32) {
    let request = pb::SetReplicationRequest { path: path.into(), replication, call: None };
    world.call::<pb::SetReplicationResponse>("root", request).unwrap();
    world.step(1);
}

/// Heartbeats of all nodes whose orders, but for those to read something, are lost on the way; returns who was told to delete.
fn lost_orders(world: &mut World) -> Vec<usize> {
    let mut told = Vec::new();
    for at in (0..world.nodes.len()).chain(0..world.nodes.len()) {
        for order in if world.nodes[at].up { world.heartbeat(at).unwrap() } else { Vec::new() } {
            match order {
                Order::Delete(_) => told.push(at),
                Order::Verify(_) => world.obey(at, order),
                _ => {}
            }
        }
    }
    told
}

#[test]
fn a_replica_is_read_before_it_is_left_alone() {
    let mut world = cluster();
    let id = world.write("/f", 3, 1)[0];
    let generation = world.core.counters.generation;
    setrep(&mut world, "/f", 1);
    let excess: Vec<usize> = world.core.blocks.excess[&id].iter().map(|storage| *storage as usize).collect();
    let last = holders(&world, id).into_iter().find(|at| !excess.contains(at)).unwrap();
    let mut orders = Vec::new();
    for at in (0..6).chain(0..6) {
        let given = world.heartbeat(at).unwrap();
        orders.extend(given.into_iter().map(|order| (at, order)));
    }
    let [(asked, Order::Verify(order))] = &orders[..] else { panic!("{orders:?}") };
    assert_eq!((*asked, order.replicas[0].block.as_ref().unwrap().id as u64), (last, id));
    // It has rotted: it goes, and of the others one stays.
    world.hold(last, id, (generation, BLOCK, pb::ReplicaState::ReplicaCorrupt));
    world.pass(3_000);
    let kept = holders(&world, id);
    assert!(kept.len() == 1 && excess.contains(&kept[0]), "{kept:?} of {excess:?}");
    assert_eq!(world.cluster().missing, 0);
}

#[test]
fn replicas_that_wait_to_be_read_hold_up_no_other_deletion() {
    let mut world = cluster();
    let kept: Vec<u64> = (0..600).flat_map(|at| world.write(&format!("/kept/{at}"), 2, 1)).collect();
    let gone = world.write("/gone", 2, 1)[0];
    for at in 0..600 {
        setrep(&mut world, &format!("/kept/{at}"), 1);
    }
    let held = |world: &World, id: &u64| holders(world, *id).len();
    // Nobody answers; each node is asked for few at a time.
    for _ in 0..3 {
        for at in 0..6 {
            let asked: usize = world
                .heartbeat(at)
                .unwrap()
                .iter()
                .map(|order| match order {
                    Order::Verify(order) => order.replicas.len(),
                    Order::Delete(order) => panic!("{order:?}"),
                    _ => 0,
                })
                .sum();
            assert!(asked <= 256, "{asked}");
        }
    }
    world.delete("root", "/gone", false).unwrap();
    world.pass(3_000);
    assert_eq!(held(&world, &gone), 0);
    assert!(kept.iter().all(|id| held(&world, id) >= 1));
    // What was asked for in vain is asked for again in the end.
    world.pass(700_000);
    assert!(kept.iter().all(|id| held(&world, id) == 1));
}

#[test]
fn a_lost_deletion_order_is_given_again() {
    let mut world = cluster();
    let id = world.write("/f", 2, 1)[0];
    setrep(&mut world, "/f", 1);
    assert_eq!(lost_orders(&mut world).len(), 1);
    world.pass(50_000);
    assert_eq!(holders(&world, id).len(), 2, "not at once");
    world.pass(15_000);
    assert_eq!(holders(&world, id).len(), 1);
}

#[test]
fn a_superfluous_replica_is_kept_when_it_is_needed_again() {
    let mut world = cluster();
    let id = world.write("/f", 2, 1)[0];
    let generation = world.core.counters.generation;
    setrep(&mut world, "/f", 1);
    let spare = lost_orders(&mut world)[0];
    let other = holders(&world, id).into_iter().find(|at| *at != spare).unwrap();
    world.remove(other, id, generation);
    assert_eq!(world.locations("/f")[0].replicas.len(), 1, "better than none");
    world.pass(70_000);
    assert_eq!((holders(&world, id), world.cluster().missing), (vec![spare], 0));
    // Its node may still come across the old order: it is no reason to delete another one.
    world.hold(other, id, (generation, BLOCK, pb::ReplicaState::Finalized));
    world.pass(3_000);
    assert_eq!(holders(&world, id), [other]);
}

#[test]
fn nothing_is_deleted_on_the_word_of_a_silent_node() {
    let mut world = cluster();
    let id = world.write("/f", 2, 1)[0];
    setrep(&mut world, "/f", 1);
    let excess = world.core.blocks.excess[&id][0] as usize;
    let other = holders(&world, id).into_iter().find(|at| *at != excess).unwrap();
    // The node that is to keep its replica falls silent before the order leaves.
    for _ in 0..12 {
        for at in (0..6).filter(|at| ![excess, other].contains(at)) {
            world.heartbeat(at).unwrap();
        }
        world.step(500);
    }
    assert!(!world.heartbeat(excess).unwrap().iter().any(|order| matches!(order, Order::Delete(_))));
    world.pass(2_000);
    assert_eq!(holders(&world, id), [other]);
}

#[test]
fn nonsense_in_a_heartbeat_does_no_harm() {
    let mut world = cluster();
    for at in 0..6 {
        let full =
            pb::StorageInfo { capacity: u64::MAX, used: u64::MAX, remaining: u64::MAX, ..world.infos(at)[0].clone() };
        let request = pb::HeartbeatRequest {
            node_id: world.nodes[at].id.clone(),
            registration: world.nodes[at].registration,
            storages: vec![full],
            active_transfers: u32::MAX,
            task_slots: u32::MAX,
            tasks_running: u32::MAX,
            epoch: 1,
        };
        world.event(Event::Heartbeat { reply: ReplyTo(77), request });
        assert!(world.answer(77).unwrap().is_ok());
    }
    world.write("/f", 3, 2);
    assert_eq!(world.cluster().capacity, u64::MAX);
}

#[test]
fn blocks_beyond_the_number_of_nodes_wait_for_a_node() {
    let mut world = World::new();
    world.node_up("n0", "/r0");
    world.node_up("n1", "/r1");
    let id = world.write("/f", 3, 1)[0];
    world.pass(12_000);
    assert_eq!((world.cluster().under_replicated, world.core.repair.queue_len()), (1, 0));
    world.node_up("n2", "/r1");
    world.pass(5_000);
    assert_eq!((holders(&world, id).len(), world.cluster().under_replicated), (3, 0));
}

#[test]
fn strangers_and_newer_epochs_are_refused() {
    let mut world = cluster();
    let base = pb::RegisterRequest {
        node_id: "x".into(),
        address: "0.0.0.0:1".into(),
        protocol_version: 1,
        ..Default::default()
    };
    let disk = |id: &str| pb::StorageInfo { storage_id: id.into(), ..Default::default() };
    for (request, expected) in [
        (pb::RegisterRequest { cluster_id: "other".into(), ..base.clone() }, ErrorCode::WrongCluster),
        (pb::RegisterRequest { pool_id: "other".into(), ..base.clone() }, ErrorCode::WrongCluster),
        (pb::RegisterRequest { epoch: 2, ..base.clone() }, ErrorCode::StaleEpoch),
        (pb::RegisterRequest { protocol_version: 9, ..base.clone() }, ErrorCode::UnsupportedVersion),
        (pb::RegisterRequest { node_id: String::new(), ..base.clone() }, ErrorCode::InvalidArgument),
        (pb::RegisterRequest { storages: world.infos(0), ..base.clone() }, ErrorCode::InvalidArgument),
        (pb::RegisterRequest { http_address: "x".repeat(256), ..base.clone() }, ErrorCode::InvalidArgument),
        (pb::RegisterRequest { storages: vec![disk("d"), disk("d")], ..base.clone() }, ErrorCode::InvalidArgument),
        (pb::RegisterRequest { storages: vec![disk(&"d".repeat(256))], ..base.clone() }, ErrorCode::InvalidArgument),
    ] {
        world.event(Event::Register { reply: ReplyTo(5), peer_ip: "10.0.0.99".into(), request });
        assert_eq!(code(world.answer(5).unwrap()), expected);
    }
    world.event(Event::Register { reply: ReplyTo(5), peer_ip: "10.0.0.99".into(), request: base });
    assert!(world.answer(5).unwrap().is_ok());
    assert_eq!(world.cluster().nodes.last().unwrap().address, "10.0.0.99:1");
    // A second registration closes the stream of the first, and an old one is fenced.
    let old = world.nodes[0].clone();
    world.register(0).unwrap();
    assert!(world.closed.contains(&old.stream));
    let edits = world.log.len();
    world.register(0).unwrap();
    assert_eq!(world.log.len(), edits, "nothing new, nothing logged");
    world.nodes[0].registration = old.registration;
    assert_eq!(code(world.heartbeat(0)), ErrorCode::NotRegistered);
    assert_eq!(delete_orders(&world), 0);
}

/// The generations in which this block is to be deleted, in one answer to this node.
fn deleted_generations(world: &mut World, at: usize, id: u64) -> Vec<u64> {
    let mut generations = Vec::new();
    for order in world.heartbeat(at).unwrap() {
        if let Order::Delete(order) = order {
            let blocks = order.replicas.into_iter().filter_map(|replica| replica.block);
            generations.extend(blocks.filter(|block| block.id as u64 == id).map(|block| block.generation));
        }
    }
    generations
}

#[test]
fn a_newer_bad_generation_is_ordered_away_whatever_was_ordered_before() {
    let mut world = cluster();
    world.write("/before", 1, 5);
    let id = world.write("/f", 2, 1)[0];
    world.pass(2_000);
    let generation = world.locations("/f")[0].block.as_ref().unwrap().generation;
    let other = (0..6).find(|at| !world.nodes[*at].held.contains_key(&id)).unwrap();
    let old = |back| (generation - back, 5, pb::ReplicaState::Finalized);
    // An order that is under way, ...
    world.hold(other, id, old(4));
    assert_eq!(deleted_generations(&mut world, other, id), [generation - 4]);
    world.hold(other, id, old(3));
    assert_eq!(deleted_generations(&mut world, other, id), [generation - 3]);
    world.hold(other, id, old(3));
    assert!(deleted_generations(&mut world, other, id).is_empty(), "it was told");
    // ... and one that waits.
    world.hold(other, id, old(2));
    world.hold(other, id, old(1));
    assert!(deleted_generations(&mut world, other, id).contains(&(generation - 1)));
    world.pass(70_000);
    assert_eq!(holders(&world, id).len(), 2, "lost orders are given again, in the newest generation");
}

#[test]
fn a_replica_that_waits_for_recovery_when_its_block_is_finished_is_bad() {
    let mut world = cluster();
    let inode = world.create("/f", 2).unwrap().inode;
    let located = world.add_block(inode, 0, &[]).unwrap();
    let (block, id) = (located.block.clone().unwrap(), located.block.as_ref().unwrap().id as u64);
    let nodes: Vec<usize> = located.replicas.iter().map(|replica| world.at(&replica.node_id)).collect();
    world.hold(nodes[0], id, (block.generation, BLOCK, pb::ReplicaState::Finalized));
    world.hold(nodes[1], id, (block.generation, BLOCK, pb::ReplicaState::Recovering));
    let reply = world.complete(inode, &[(id, block.generation, BLOCK)]);
    world.answer(reply).expect("complete waits").unwrap();
    assert_eq!(world.core.blocks.bad.get(&id).map(Vec::len), Some(1));
    world.orders.clear();
    world.pass(2_000);
    assert!(!world.nodes[nodes[1]].held.contains_key(&id), "it goes, as there is a good one");
    world.pass(20_000);
    assert_eq!(holders(&world, id).len(), 2);
}

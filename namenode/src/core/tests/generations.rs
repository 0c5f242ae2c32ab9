//! Replicas of finished blocks under generations newer than the block's.

use super::appends::recover_lease;
use super::*;

fn finalized(generation: u64, length: u64) -> Held {
    (generation, length, pb::ReplicaState::Finalized)
}

fn nodes(count: usize) -> World {
    // Every block counts for safe mode.
    let mut world = World::with(CoreSettings { safemode_threshold: 1.0, ..settings() });
    for at in 0..count {
        world.node_up(&format!("n{at}"), &format!("/r{}", at % 2));
    }
    world
}

fn up_again(world: &mut World) {
    for at in 0..world.nodes.len() {
        let (id, rack) = (world.nodes[at].id.clone(), world.nodes[at].rack.clone());
        world.node_up(&id, &rack);
    }
}

/// An abandoned block of 70 bytes for which two recoveries are ordered.
struct Recovered {
    world: World,
    id: u64,
    holders: Vec<usize>,
    first: (usize, pb::RecoverBlock),
    second: (usize, pb::RecoverBlock),
}

fn two_recoveries(count: usize, replication: u32) -> Recovered {
    let mut world = nodes(count);
    let inode = world.create("/f", replication).unwrap().inode;
    let located = world.add_block(inode, 0, &[]).unwrap();
    let block = located.block.clone().unwrap();
    let id = block.id as u64;
    let holders: Vec<usize> = located.replicas.iter().map(|replica| world.at(&replica.node_id)).collect();
    for at in &holders {
        world.hold(*at, id, (block.generation, 70, pb::ReplicaState::BeingWritten));
    }
    let mut orders = Vec::new();
    while orders.len() < 2 {
        let _ = recover_lease(&mut world, "/f").unwrap();
        world.step(500);
        for at in 0..count {
            let told = world.heartbeat(at).unwrap();
            orders
                .extend(told.into_iter().filter_map(|o| if let Order::Recover(o) = o { Some((at, o)) } else { None }));
        }
    }
    let (first, second) = (orders[0].clone(), orders[1].clone());
    Recovered { world, id, holders, first, second }
}

fn place(world: &mut World) -> (u64, u64, usize) {
    let located = world.locations("/f").remove(0);
    (located.block.as_ref().unwrap().generation, located.length, located.replicas.len())
}

/// The namenode loads an image and goes on.
fn restart_from_image(world: &mut World) {
    while world.core.has_work() {
        world.event(Event::Tick);
    }
    let txid = world.core.checkpoint_begin();
    let mut pages = Vec::new();
    while !world.core.checkpoint_slice(100, &mut pages) {}
    let mut core = Core::new_for_load(world.core.settings().clone());
    pages.iter().for_each(|page| core.load_page(page).unwrap());
    core.finish_load(txid).unwrap();
    assert_eq!(core.digest(), world.core.digest());
    world.restart_with(core);
}

#[test]
fn what_a_lost_report_left_of_a_block_is_taken_back() {
    for restart in [None, Some(true), Some(false)] {
        let Recovered { mut world, id, holders, first, second } = two_recoveries(4, 2);
        world.recover(first.0, &first.1);
        assert_eq!(place(&mut world), (first.1.new_generation, 70, 2));
        match restart {
            Some(true) => restart_from_image(&mut world),
            Some(false) => world.restart(),
            None => {}
        }
        // The second recovery reaches all replicas; what it says of that never arrives.
        for at in &holders {
            let held = finalized(second.1.new_generation, 70);
            if restart.is_some() {
                world.nodes[*at].held.insert(id, held);
            } else {
                world.hold(*at, id, held);
            }
        }
        if restart.is_some() {
            assert!(world.core.safemode.is_on());
            up_again(&mut world);
        }
        world.pass(35_000);
        assert!(!world.core.safemode.is_on(), "safe mode does not wait for what can be taken back");
        assert_eq!(place(&mut world), (second.1.new_generation, 70, 2), "{restart:?}");
        assert_eq!(world.cluster().missing, 0);
        assert!(holders.iter().all(|at| world.nodes[*at].held.contains_key(&id)), "none is deleted");
        // Its report after all changes nothing.
        let names = holders.iter().map(|at| format!("{}-s", world.nodes[*at].id)).collect();
        let (block, new_generation) = (second.1.block.clone(), second.1.new_generation);
        let late = pb::BlockRecovered { block, new_generation, length: 70, storage_ids: names };
        let edits = world.log.len();
        world.report(holders[0], Report::Recovered(late));
        assert_eq!(world.log.len(), edits);
        world.restart();
        assert_eq!(place(&mut world).0, second.1.new_generation);
    }
}

#[test]
fn a_newer_replica_of_a_block_that_has_others_makes_room_for_a_good_one() {
    let Recovered { mut world, id, holders, first, second } = two_recoveries(3, 3);
    world.recover(first.0, &first.1);
    // The second recovery only reached one node, and that ended with its primary.
    world.hold(holders[1], id, finalized(second.1.new_generation, 70));
    assert_eq!(place(&mut world), (first.1.new_generation, 70, 2));
    world.pass(60_000);
    assert_eq!(place(&mut world), (first.1.new_generation, 70, 3));
    let good = finalized(first.1.new_generation, 70);
    assert!(world.nodes.iter().all(|node| node.held.get(&id) == Some(&good)));
    let report = world.cluster();
    assert_eq!((report.under_replicated, report.missing, report.pending_deletion), (0, 0, 0));
    // Once more, and now the report comes when the replica is gone: it brings nothing.
    let (block, new_generation) = (second.1.block.clone(), second.1.new_generation);
    let storage_ids = vec![format!("{}-s", world.nodes[holders[1]].id)];
    let late = pb::BlockRecovered { block, new_generation, length: 70, storage_ids };
    world.report(holders[0], Report::Recovered(late));
    assert_eq!(place(&mut world), (first.1.new_generation, 70, 3));
}

#[test]
fn longer_replicas_are_cut_and_taken_back() {
    let Recovered { mut world, id, holders, first, second } = two_recoveries(3, 2);
    // The first one only reached one node, with 60 bytes; the second the other, with all of them.
    let (short, long) = (holders[0], holders[1]);
    world.hold(short, id, finalized(first.1.new_generation, 60));
    let (block, new_generation) = (first.1.block.clone(), first.1.new_generation);
    let storage_ids = vec![format!("{}-s", world.nodes[short].id)];
    world.report(first.0, Report::Recovered(pb::BlockRecovered { block, new_generation, length: 60, storage_ids }));
    assert!(!world.status("/f").unwrap().open);
    world.hold(long, id, finalized(second.1.new_generation, 70));
    world.remove(short, id, 0);
    assert_eq!(world.cluster().missing, 1);
    world.pass(20_000);
    let (generation, length, replicas) = place(&mut world);
    assert!(generation > second.1.new_generation, "a generation of its own");
    assert_eq!((length, replicas, world.cluster().missing), (60, 2, 0));
    assert_eq!(world.nodes[long].held[&id], finalized(generation, 60));
    let digest = world.core.digest();
    world.restart();
    assert_eq!(world.core.digest(), digest);
}

#[test]
fn a_generation_that_was_not_handed_out_for_the_block_is_not_taken_back() {
    let mut world = nodes(4);
    let id = world.write("/f", 2, 1)[0];
    world.write("/other", 1, 3);
    let (generation, length, _) = place(&mut world);
    let holders: Vec<usize> = (0..4).filter(|at| world.nodes[*at].held.contains_key(&id)).collect();
    // Of the future that a restore left behind, for all that is known.
    for at in &holders {
        world.hold(*at, id, finalized(generation + 1, BLOCK));
    }
    let edits = world.log.len();
    world.pass(60_000);
    assert_eq!((place(&mut world), world.cluster().missing), ((generation, length, 0), 1));
    assert_eq!(world.log.len(), edits);
    assert!(holders.iter().all(|at| world.nodes[*at].held[&id].0 == generation + 1), "nobody deletes them");
    // With a good one there they are put away, not deleted.
    world.orders.clear();
    world.hold(holders[0], id, finalized(generation, BLOCK));
    world.pass(60_000);
    assert_eq!(place(&mut world), (generation, length, 2));
    let names = |order: &Order, id: u64| match order {
        Order::Delete(order) => order.replicas.iter().any(|at| at.block.as_ref().is_some_and(|b| b.id as u64 == id)),
        _ => false,
    };
    assert!(!world.orders.iter().any(|(_, order)| names(order, id)), "it is quarantined");
    assert!(world.orders.iter().any(|(_, order)| matches!(order, Order::Quarantine(_))));
}

#[test]
fn nothing_is_taken_back_while_a_restore_waits_to_be_confirmed() {
    let Recovered { mut world, id, holders, first, second } = two_recoveries(3, 2);
    world.recover(first.0, &first.1);
    let mut core = Core::new_for_load(settings());
    for (txid, edit) in &world.log {
        core.replay(*txid, edit.clone()).unwrap();
    }
    let mut commands = Vec::new();
    core.begin_restored(world.now, &mut commands);
    world.take(commands);
    world.restart_with(core);
    for at in &holders {
        world.nodes[*at].held.insert(id, finalized(second.1.new_generation, 70));
    }
    up_again(&mut world);
    world.pass(40_000);
    assert_eq!(place(&mut world).0, first.1.new_generation);
    world.call::<pb::ConfirmRestoreResponse>("root", pb::ConfirmRestoreRequest {}).unwrap();
    world.pass(5_000);
    assert_eq!(place(&mut world), (second.1.new_generation, 70, 2));
}

#[test]
fn only_so_many_generations_are_remembered() {
    use crate::core::generations::HandedOut;
    let mut handed = HandedOut::default();
    for id in 0..70_000 {
        handed.note(id, id + 5);
    }
    assert_eq!((handed.of(0), handed.of(69_999)), (0, 70_004));
    let mut bytes = Vec::new();
    handed.encode(&mut bytes);
    let back = HandedOut::decode(&mut crate::core::codec::Reader::new(&bytes)).unwrap();
    assert_eq!((back.digest(), back.of(60_000)), (handed.digest(), 60_005));
    for id in 0..70_000 {
        handed.free(id);
    }
    assert_eq!(handed.digest(), 0);
}

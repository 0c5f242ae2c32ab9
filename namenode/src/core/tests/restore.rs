//! After a restore, and with replicas that nobody knows: what is deleted, what is put away, what stays.

use super::*;

fn cluster() -> World {
    let mut world = World::new();
    for at in 0..4 {
        world.node_up(&format!("n{at}"), &format!("/r{}", at % 2));
    }
    world.pass(2_000);
    world
}

fn all_up(world: &mut World) {
    for at in 0..world.nodes.len() {
        world.node_up(&format!("n{at}"), &format!("/r{}", at % 2));
    }
}

/// Orders of one kind: the blocks that they name.
fn named(world: &World, quarantine: bool) -> Vec<u64> {
    let mut ids = Vec::new();
    for (_, order) in &world.orders {
        let replicas = match order {
            Order::Delete(order) if !quarantine => &order.replicas,
            Order::Quarantine(order) if quarantine => &order.replicas,
            _ => continue,
        };
        ids.extend(replicas.iter().filter_map(|replica| replica.block.as_ref()).map(|block| block.id as u64));
    }
    ids.sort_unstable();
    ids.dedup();
    ids
}

fn holds(world: &World, id: u64) -> usize {
    world.nodes.iter().filter(|node| node.held.contains_key(&id)).count()
}

/// The namenode loses all after the first `kept` transactions.
fn restore_to(world: &mut World, kept: usize) {
    let mut core = Core::new_for_load(world.core.settings().clone());
    world.log.truncate(kept);
    for (txid, edit) in &world.log {
        core.replay(*txid, edit.clone()).unwrap();
    }
    let mut commands = Vec::new();
    core.begin_restored(world.now, &mut commands);
    world.now.mono_ms += 50_000;
    core.start(world.now, Epoch(1_000), &mut commands);
    world.core = core;
    world.take(commands);
    world.orders.clear();
}

#[test]
fn nothing_is_put_away_until_a_restore_is_confirmed() {
    let mut world = cluster();
    let kept = world.write("/kept", 3, 2);
    let at = world.log.len();
    let lost = world.write("/lost", 3, 2);
    let highest = *lost.last().unwrap();
    restore_to(&mut world, at);
    all_up(&mut world);
    world.pass(60_000);
    assert!(!world.cluster().safemode);
    assert_eq!(world.cluster().restored_to_txid, at as u64);
    // Users go on: what they delete stays on the disks, too, for the case that another moment was meant.
    let gone = world.write("/gone", 2, 1);
    assert!(gone[0] > highest + (1 << 31), "numbers that the other future cannot have handed out");
    world.delete("root", "/gone", true).unwrap();
    world.pass(20_000);
    assert_eq!((named(&world, false), named(&world, true)), (vec![], vec![]));
    for id in kept.iter().chain(&lost) {
        assert_eq!(holds(&world, *id), 3);
    }
    // It is in the log, so it outlives a restart.
    world.restart();
    all_up(&mut world);
    world.pass(40_000);
    assert_eq!((named(&world, false), named(&world, true)), (vec![], vec![]));

    let confirm = pb::ConfirmRestoreRequest {};
    assert_eq!(
        world.call::<pb::ConfirmRestoreResponse>("ann", confirm).unwrap_err().code(),
        ErrorCode::PermissionDenied
    );
    let answer = world.call::<pb::ConfirmRestoreResponse>("root", confirm).unwrap();
    assert_eq!(answer.restored_to_txid, at as u64);
    assert_eq!(world.call::<pb::ConfirmRestoreResponse>("root", confirm).unwrap().restored_to_txid, 0, "only once");
    world.pass(10_000);
    assert_eq!(named(&world, true), lost, "what the namespace does not know is put away");
    assert_eq!(named(&world, false), gone, "what it deleted itself is deleted");
    assert!(kept.iter().all(|id| holds(&world, *id) == 3));
    assert!(lost.iter().all(|id| holds(&world, *id) == 0));
    world.restart();
    assert_eq!(world.cluster().restored_to_txid, 0);
}

#[test]
fn an_image_keeps_that_a_restore_waits() {
    let mut world = cluster();
    world.write("/kept", 2, 1);
    let at = world.log.len();
    restore_to(&mut world, at);
    let (mut pages, txid, digest) = (Vec::new(), world.core.checkpoint_begin(), world.core.digest());
    while !world.core.checkpoint_slice(8, &mut pages) {}
    let mut core = Core::new_for_load(world.core.settings().clone());
    for page in &pages {
        core.load_page(page).unwrap();
    }
    core.finish_load(txid).unwrap();
    assert_eq!(core.digest(), digest);
    world.restart_with(core);
    assert_eq!(world.cluster().restored_to_txid, at as u64);
}

#[test]
fn what_was_freed_is_deleted_and_what_is_unknown_is_put_away() {
    let mut world = cluster();
    let freed = world.write("/f", 2, 1)[0];
    let at: Vec<usize> = (0..4).filter(|at| world.nodes[*at].held.contains_key(&freed)).collect();
    let held = world.nodes[at[0]].held[&freed];
    // The file is deleted while one of its nodes is away, which holds something else, too.
    world.nodes[at[0]].up = false;
    world.pass(40_000);
    world.delete("root", "/f", false).unwrap();
    let unknown = freed - 1;
    world.nodes[at[0]].held.insert(unknown, (held.0 - 1, 5, pb::ReplicaState::Finalized));
    world.pass(2_000);
    world.orders.clear();
    let node = world.nodes[at[0]].id.clone();
    world.node_up(&node, &format!("/r{}", at[0] % 2));
    // The orders of the first answer are lost with it in these tests: they are given again.
    world.pass(70_000);
    assert_eq!(named(&world, false), [freed]);
    assert_eq!(named(&world, true), [unknown]);
    assert_eq!(holds(&world, freed) + holds(&world, unknown), 0);
    // A restart finds in the log what it freed.
    world.nodes[0].held.insert(freed, held);
    world.restart();
    all_up(&mut world);
    world.orders.clear();
    world.pass(110_000);
    assert_eq!((named(&world, false), named(&world, true)), (vec![freed], vec![]));
}

#[test]
fn two_restores_of_one_moment_hand_out_different_numbers() {
    let mut world = cluster();
    world.write("/kept", 2, 1);
    let at = world.log.len();
    let mut highest = 0;
    for _ in 0..2 {
        world.now.wall_ms = world.now.wall_ms.max(1_700_000_000_000) + 60_000;
        restore_to(&mut world, at);
        all_up(&mut world);
        world.pass(60_000);
        let written = world.write("/new", 2, 3);
        assert!(written.iter().all(|id| *id > highest), "{written:?} after {highest}");
        highest = *written.iter().max().unwrap();
    }
}

#[test]
fn generations_of_a_recovery_that_is_under_way_are_freed_with_the_block() {
    let mut world = cluster();
    let id = world.write("/f", 3, 1)[0];
    world.write("/other", 1, 1);
    let at: Vec<usize> = (0..4).filter(|at| world.nodes[*at].held.contains_key(&id)).collect();
    let request = pb::TruncateRequest { path: "/f".into(), length: 100, call: None };
    assert!(!world.call::<pb::TruncateResponse>("root", request).unwrap().done);
    world.step(200);
    let orders: Vec<Order> = (0..4).flat_map(|at| world.heartbeat(at).unwrap()).collect();
    let order = orders.into_iter().find_map(|order| if let Order::Recover(order) = order { Some(order) } else { None });
    let newest = order.expect("the cut is ordered").new_generation;
    // All are cut, two have said so; nobody has said that the recovery is done. One tells what this log never made for it.
    let cut = (newest, 100, pb::ReplicaState::Finalized);
    world.hold(at[0], id, cut);
    world.nodes[at[1]].held.insert(id, cut);
    world.write("/later", 1, 1);
    world.hold(at[2], id, (newest + 1, 100, pb::ReplicaState::Finalized));
    world.delete("root", "/f", false).unwrap();
    world.orders.clear();
    world.pass(2_000);
    assert_eq!((named(&world, false), named(&world, true)), (vec![id], vec![id]));
    assert_eq!(holds(&world, id), 0);
    let put_away = world.orders.iter().filter(|(_, order)| matches!(order, Order::Quarantine(_)));
    assert!(put_away.map(|(node, _)| node).eq([&world.nodes[at[2]].id]));
    // One that is reported later is known as well, after a replay of the log, too.
    for restarted in [false, true] {
        if restarted {
            world.restart();
            all_up(&mut world);
        }
        world.orders.clear();
        world.hold(at[0], id, cut);
        world.pass(110_000);
        assert_eq!((named(&world, false), named(&world, true), holds(&world, id)), (vec![id], vec![], 0));
    }
}

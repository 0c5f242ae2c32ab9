//! What a start waits for: safe mode, and repair after it.

use super::nodes::holders;
use super::*;

/// One of one block is less than the threshold's share rounded down, and so is one of a thousand.
#[test]
fn safe_mode_waits_for_the_node_that_alone_has_a_block() {
    let mut world = cluster();
    let id = world.write("/only", 1, 1)[0];
    let holder = holders(&world, id)[0];
    world.restart();
    assert!(world.cluster().safemode_reason.contains("0 of 1 blocks"), "{}", world.cluster().safemode_reason);
    for at in (0..6).filter(|at| *at != holder) {
        world.node_up(&format!("n{at}"), &format!("/r{}", at / 2));
    }
    world.nodes[holder].up = false;
    world.pass(20_000);
    let reason = world.cluster().safemode_reason;
    assert!(reason.contains("the others may be on datanodes that have yet to come"), "{reason}");
    assert!(reason.contains(&format!("have not reported yet: n{holder}")), "{reason}");
    // It has had the dead interval to come.
    world.pass(12_000);
    assert!(!world.cluster().safemode);
    // And when it comes in time, nobody waits for the interval.
    world.restart();
    world.node_up(&format!("n{holder}"), &format!("/r{}", holder / 2));
    world.step(100);
    assert!(!world.cluster().safemode);
}

#[test]
fn a_restart_waits_for_blocks_then_for_nodes() {
    let mut world = cluster();
    let mut blocks = Vec::new();
    for at in 0..20 {
        blocks.extend(world.write(&format!("/f{at}"), 2, 1));
    }
    // An unknown replica lies there already, and two that this namenode cannot judge: it never got so far.
    let (unknown, future) = (BlockId::BASE.0 as u64, 9_999_999_999);
    world.nodes[0].held.insert(unknown, (1, 1, pb::ReplicaState::Finalized));
    world.nodes[0].held.insert(future, (1, 1, pb::ReplicaState::Finalized));
    world.nodes[0].held.insert(unknown - 1, (1_000_000, 1, pb::ReplicaState::Finalized));
    world.restart();
    world.orders.clear();
    let report = world.cluster();
    assert!(report.safemode);
    assert!(
        report.safemode_reason.contains("0 of 20 blocks have a reported replica, 19 more are needed"),
        "{}",
        report.safemode_reason
    );
    assert!(
        report.safemode_reason.contains("6 of 6 known datanodes have not reported yet: n0, n1"),
        "{}",
        report.safemode_reason
    );
    assert_eq!(code(world.mkdirs("root", "/x", 0o755)), ErrorCode::SafeMode);
    assert!(world.heartbeat(0).is_err_and(|error| error.code() == ErrorCode::NotRegistered));
    for at in 0..5 {
        world.node_up(&format!("n{at}"), &format!("/r{}", at / 2));
        world.step(100);
    }
    assert!(!world.cluster().safemode);
    world.mkdirs("root", "/x", 0o755).unwrap();
    // One known node is missing: nothing is copied or deleted until the dead interval is over.
    world.nodes[5].up = false;
    world.pass(20_000);
    assert!(world.orders.iter().all(|(_, order)| matches!(order, Order::FullReport(_))), "{:?}", world.orders);
    world.pass(12_000);
    for id in blocks {
        assert_eq!(holders(&world, id).len(), 2);
    }
    assert!(!world.nodes[0].held.contains_key(&unknown), "the unknown replica is gone");
    assert!(world.nodes[0].held.contains_key(&future) && world.nodes[0].held.contains_key(&(unknown - 1)));
    assert!(world.core.future_replicas() > 0);
}

#[test]
fn all_nodes_reported_opens_the_gate_at_once() {
    let mut world = cluster();
    let id = world.write("/f", 3, 1)[0];
    let gone = holders(&world, id)[0];
    world.nodes[gone].held.clear();
    world.restart();
    for at in 0..6 {
        world.node_up(&format!("n{at}"), &format!("/r{}", at / 2));
    }
    world.pass(3_000);
    assert_eq!(holders(&world, id).len(), 3);
}

#[test]
fn a_report_under_way_is_waited_for_beyond_the_dead_interval() {
    let mut world = cluster();
    let id = world.write("/f", 1, 1)[0];
    let at = holders(&world, id)[0];
    world.write("/g", 3, 1);
    world.restart();
    world.orders.clear();
    for other in (0..6).filter(|other| *other != at) {
        world.node_up(&format!("n{other}"), &format!("/r{}", other / 2));
    }
    world.call::<pb::SafeModeResponse>("root", pb::SafeModeRequest { action: 2 }).unwrap();
    world.nodes[at].up = false;
    world.pass(25_000);
    // It registers late, and its report takes its time.
    world.register(at).unwrap();
    for _ in 0..20 {
        world.beat();
        world.heartbeat(at).unwrap();
        world.step(500);
    }
    assert!(!world.core.repair.settled());
    world.open_stream(at);
    world.full_report(at);
    world.nodes[at].up = true;
    world.pass(1_000);
    assert!(world.core.repair.settled() && world.cluster().missing == 0);
    assert!(world.orders.iter().all(|(_, order)| !matches!(order, Order::Replicate(_))));
}

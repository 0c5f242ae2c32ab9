//! Append and lease recovery on demand.

use super::*;

const WRITER: &str = "writer";

fn finalized(generation: u64, length: u64) -> Held {
    (generation, length, pb::ReplicaState::Finalized)
}

pub fn append(world: &mut World, user: &str, path: &str, client: &str) -> Result<pb::AppendResponse, Error> {
    let request = pb::AppendRequest { path: path.into(), client_name: client.into(), call: None };
    world.call::<pb::AppendResponse>(user, request)
}

pub fn recover_lease(world: &mut World, path: &str) -> Result<pb::RecoverLeaseResponse, Error> {
    world.call("root", pb::RecoverLeaseRequest { path: path.into(), ..Default::default() })
}

/// Appends one block of `length` bytes and closes; returns the block.
pub fn append_block(world: &mut World, path: &str, length: u64) -> u64 {
    let opened = append(world, "root", path, WRITER).unwrap();
    let inode = opened.status.unwrap().inode;
    let located = world.add_block(inode, opened.blocks, &[]).unwrap();
    let block = located.block.unwrap();
    for replica in &located.replicas {
        let at = world.at(&replica.node_id);
        world.hold(at, block.id as u64, finalized(block.generation, length));
    }
    let reply = world.complete(inode, &[(block.id as u64, block.generation, length)]);
    world.answer(reply).expect("complete waits").unwrap();
    block.id as u64
}

#[test]
fn an_append_opens_a_new_block_behind_the_old_ones() {
    let mut world = cluster();
    let blocks = world.write("/f", 3, 2);
    let opened = append(&mut world, "root", "/f", WRITER).unwrap();
    let status = opened.status.unwrap();
    assert_eq!((opened.blocks, status.length, status.open), (2, 2 * BLOCK, true));
    assert!(world.locations("/f").iter().all(|block| block.complete), "no finished block is touched");
    let located = world.add_block(status.inode, 2, &[]).unwrap();
    assert_eq!(located.offset, 2 * BLOCK);
    let block = located.block.unwrap();
    for replica in &located.replicas {
        let at = world.at(&replica.node_id);
        world.hold(at, block.id as u64, finalized(block.generation, 5));
    }
    let reply = world.complete(status.inode, &[(block.id as u64, block.generation, 5)]);
    world.answer(reply).unwrap().unwrap();
    let again = append_block(&mut world, "/f", 7);
    let status = world.status("/f").unwrap();
    assert_eq!((status.length, status.open), (2 * BLOCK + 12, false));
    let ids: Vec<u64> = world.locations("/f").iter().map(|b| b.block.as_ref().unwrap().id as u64).collect();
    assert_eq!(ids, [blocks[0], blocks[1], block.id as u64, again]);
    // All of it comes back from the log.
    let before = world.walk();
    world.restart();
    assert_eq!(world.walk().len(), before.len());
    assert_eq!(world.status("/f").unwrap(), status);
}

#[test]
fn who_may_append_and_what_cannot_be() {
    let mut world = cluster();
    world.write("/d/f", 1, 1);
    world.mkdirs("root", "/d", 0o755).unwrap();
    assert_eq!(code(append(&mut world, "root", "/none", WRITER)), ErrorCode::FileNotFound);
    assert_eq!(code(append(&mut world, "root", "/d", WRITER)), ErrorCode::NotAFile);
    assert_eq!(code(append(&mut world, "ann", "/d/f", WRITER)), ErrorCode::PermissionDenied);
    for name in ["", "cairn-namenode-recovery"] {
        assert_eq!(code(append(&mut world, "root", "/d/f", name)), ErrorCode::InvalidArgument);
    }
    append(&mut world, "root", "/d/f", "a").unwrap();
    let error = append(&mut world, "root", "/d/f", "b").unwrap_err();
    assert_eq!(error.code(), ErrorCode::AlreadyBeingCreated);
    assert!(error.message().contains("currently owned by a"), "{error}");
    let error = append(&mut world, "root", "/d/f", "a").unwrap_err();
    assert!(error.message().contains("a is already the current lease holder"), "{error}");
    world.pass(61_000);
    // The writer wrote nothing: its file is closed at once, and is the next one's.
    let opened = append(&mut world, "root", "/d/f", "b").unwrap();
    assert_eq!(opened.blocks, 1);
    world.call::<pb::SafeModeResponse>("root", pb::SafeModeRequest { action: 1 }).unwrap();
    assert_eq!(code(append(&mut world, "root", "/d/f", "c")), ErrorCode::SafeMode);
    assert_eq!(code(recover_lease(&mut world, "/d/f")), ErrorCode::SafeMode);
}

#[test]
fn an_append_is_applied_once() {
    let mut world = cluster();
    world.write("/f", 1, 1);
    let call = pb::CallContext { client_id: vec![9; 16].into(), call_id: 4, ..Default::default() };
    let request = pb::AppendRequest { call: Some(call), path: "/f".into(), client_name: "a".into() };
    let first: pb::AppendResponse = world.call("root", request.clone()).unwrap();
    let edits = world.log.len();
    assert_eq!(world.call::<pb::AppendResponse>("root", request.clone()).unwrap(), first);
    assert_eq!(world.log.len(), edits);
    world.restart();
    for at in 0..6 {
        world.node_up(&format!("n{at}"), &format!("/r{}", at / 2));
    }
    assert_eq!(world.call::<pb::AppendResponse>("root", request).unwrap(), first);
}

#[test]
fn a_dead_append_leaves_the_old_content() {
    let mut world = cluster();
    world.write("/f", 3, 1);
    let opened = append(&mut world, "root", "/f", WRITER).unwrap();
    let inode = opened.status.unwrap().inode;
    let located = world.add_block(inode, 1, &[]).unwrap();
    let block = located.block.clone().unwrap();
    for (replica, length) in located.replicas.iter().zip([50, 40, 45]) {
        let at = world.at(&replica.node_id);
        world.hold(at, block.id as u64, (block.generation, length, pb::ReplicaState::BeingWritten));
    }
    let answer = recover_lease(&mut world, "/f").unwrap();
    assert!(!answer.closed && answer.waits_for.contains("agree on the length"), "{answer:?}");
    let late = world.add_block(inode, 2, &[]).unwrap_err();
    assert_eq!(late.code(), ErrorCode::LeaseExpired, "the old writer is out at once");
    world.pass(2_000);
    assert!(recover_lease(&mut world, "/f").unwrap().closed);
    let status = world.status("/f").unwrap();
    assert_eq!((status.open, status.length), (false, BLOCK + 40));
    // A file that is closed, and one whose writer has not begun a block, are closed at once.
    assert!(recover_lease(&mut world, "/f").unwrap().closed);
    append(&mut world, "root", "/f", WRITER).unwrap();
    let other = pb::RecoverLeaseRequest { path: "/f".into(), only_of: "somebody else".into(), inode: 0 };
    assert!(!world.call::<pb::RecoverLeaseResponse>("root", other).unwrap().closed, "it is another writer's");
    let own = pb::RecoverLeaseRequest { path: "/f".into(), only_of: WRITER.into(), inode: 0 };
    assert!(world.call::<pb::RecoverLeaseResponse>("root", own).unwrap().closed);
    assert_eq!(world.status("/f").unwrap().length, BLOCK + 40);
}

#[test]
fn a_block_that_no_datanode_has_goes_as_soon_as_they_say_so() {
    let mut world = cluster();
    world.write("/f", 3, 1);
    let inode = append(&mut world, "root", "/f", WRITER).unwrap().status.unwrap().inode;
    world.add_block(inode, 1, &[]).unwrap();
    assert!(!recover_lease(&mut world, "/f").unwrap().closed);
    let (at, order) = (0..6)
        .find_map(|at| {
            let orders = world.heartbeat(at).unwrap();
            orders
                .into_iter()
                .find_map(|order| if let Order::Recover(order) = order { Some((at, order)) } else { None })
        })
        .unwrap();
    let (block, new_generation) = (order.block, order.new_generation);
    let nothing = pb::BlockRecovered { block, new_generation, length: 0, storage_ids: Vec::new() };
    world.report(at, Report::Recovered(nothing));
    let status = world.status("/f").unwrap();
    assert_eq!((status.open, status.length), (false, BLOCK));
    assert_eq!(world.locations("/f").len(), 1);
}

#[test]
fn a_replica_that_went_without_a_word_keeps_no_file_open() {
    let mut world = cluster();
    world.write("/f", 3, 1);
    let inode = append(&mut world, "root", "/f", WRITER).unwrap().status.unwrap().inode;
    let located = world.add_block(inode, 1, &[]).unwrap();
    let block = located.block.clone().unwrap();
    let holder = world.at(&located.replicas[0].node_id);
    world.hold(holder, block.id as u64, (block.generation, 0, pb::ReplicaState::BeingWritten));
    // Its writer left at once, and the datanode dropped what was empty.
    world.nodes[holder].held.remove(&(block.id as u64));
    assert!(!recover_lease(&mut world, "/f").unwrap().closed);
    let edits = world.log.len();
    for at in 0..6 {
        for order in world.heartbeat(at).unwrap() {
            let Order::Recover(order) = order else { continue };
            let (block, new_generation) = (order.block, order.new_generation);
            let nothing = pb::BlockRecovered { block, new_generation, length: 0, storage_ids: Vec::new() };
            world.report(at, Report::Recovered(nothing));
        }
    }
    let status = world.status("/f").unwrap();
    assert_eq!((status.open, status.length), (false, BLOCK));
    assert_eq!(world.log.len(), edits + 2, "the block goes, the file is closed");
}

#[test]
fn a_block_on_nodes_that_never_come_back_is_given_up_after_a_day() {
    let day = 24 * 3_600_000;
    let mut world = cluster();
    let inode = world.create("/f", 2).unwrap().inode;
    let located = world.add_block(inode, 0, &[]).unwrap();
    for replica in &located.replicas {
        let at = world.at(&replica.node_id);
        world.nodes[at].up = false;
    }
    world.pass(40_000);
    let answer = recover_lease(&mut world, "/f").unwrap();
    assert!(answer.waits_for.contains("datanodes that are away: n"), "{answer:?}");
    let beat = |world: &mut World| {
        for _ in 0..24 {
            // In strides, so that the test is fast: nobody is declared dead for it.
            world.now.mono_ms += 1_500;
            world.beat();
        }
        world.event(Event::Tick);
    };
    beat(&mut world);
    assert!(!recover_lease(&mut world, "/f").unwrap().closed);
    let silent = world.core.now_ms;
    while world.core.now_ms < silent + day {
        beat(&mut world);
    }
    assert!(recover_lease(&mut world, "/f").unwrap().closed);
    assert_eq!(world.status("/f").unwrap().length, 0);
}

#[test]
fn an_answer_to_a_recovery_from_before_a_restart_counts() {
    let mut world = cluster();
    let inode = world.create("/f", 1).unwrap().inode;
    let located = world.add_block(inode, 0, &[]).unwrap();
    let block = located.block.clone().unwrap();
    let at = world.at(&located.replicas[0].node_id);
    world.hold(at, block.id as u64, (block.generation, 70, pb::ReplicaState::BeingWritten));
    assert!(!recover_lease(&mut world, "/f").unwrap().closed);
    let orders = world.heartbeat(at).unwrap();
    let order = orders.into_iter().find_map(|o| if let Order::Recover(o) = o { Some(o) } else { None }).unwrap();
    world.restart();
    for at in 0..6 {
        world.node_up(&format!("n{at}"), &format!("/r{}", at / 2));
    }
    world.recover(at, &order);
    let status = world.status("/f").unwrap();
    assert_eq!((status.open, status.length), (false, 70));
}

#[test]
fn a_recovery_that_comes_second_renews_the_block() {
    let mut world = cluster();
    let inode = world.create("/f", 2).unwrap().inode;
    let located = world.add_block(inode, 0, &[]).unwrap();
    let (block, id) = (located.block.clone().unwrap(), located.block.as_ref().unwrap().id as u64);
    let nodes: Vec<usize> = located.replicas.iter().map(|replica| world.at(&replica.node_id)).collect();
    for at in &nodes {
        world.hold(*at, id, (block.generation, 70, pb::ReplicaState::BeingWritten));
    }
    let mut orders = Vec::new();
    while orders.len() < 2 {
        let _ = recover_lease(&mut world, "/f").unwrap();
        world.step(500);
        for at in 0..6 {
            let told = world.heartbeat(at).unwrap();
            orders
                .extend(told.into_iter().filter_map(|o| if let Order::Recover(o) = o { Some((at, o)) } else { None }));
        }
    }
    let (first, second) = (orders[0].clone(), orders[1].clone());
    world.recover(first.0, &first.1);
    assert!(!world.status("/f").unwrap().open);
    world.recover(second.0, &second.1);
    let located = world.locations("/f");
    assert_eq!(located[0].block.as_ref().unwrap().generation, second.1.new_generation);
    assert_eq!(located[0].replicas.len(), 2, "the replicas that the second recovery renewed are the block's");
    world.pass(70_000);
    assert!(nodes.iter().all(|at| world.nodes[*at].held.contains_key(&id)), "none of them is deleted");
    world.restart();
    assert_eq!(world.status("/f").unwrap().length, 70);
}

#[test]
fn replay_of_an_append_is_strict() {
    let mut world = cluster();
    world.write("/f", 1, 1);
    append(&mut world, "root", "/f", WRITER).unwrap();
    let log = world.log.clone();
    let (last, edit) = log.last().unwrap().clone();
    assert_eq!(edit.min_reader, 2);
    let attempt = |kind: pb::edit::Kind| {
        let mut core = Core::new_for_load(settings());
        log.iter().try_for_each(|(txid, edit)| core.replay(*txid, edit.clone())).unwrap();
        core.replay(last.next(), pb::Edit { kind: Some(kind), ..edit.clone() }).unwrap_err().cause
    };
    let again = edit.kind.clone().unwrap();
    assert!(attempt(again).contains("is open"));
    let append =
        |inode, holder: &str| Kind::Append(pb::EditAppend { inode, holder: holder.into(), user: "root".into() });
    assert!(attempt(append(1, "a")).contains("is no file"));
    assert!(attempt(append(16_385, "a")).contains("is no file"));
    let renew = |block_id, generation| Kind::RenewBlock(pb::EditRenewBlock { inode: 1, block_id, generation });
    assert!(attempt(renew(77, 1)).contains("is no finished block"));
}

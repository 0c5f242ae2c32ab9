//! Runs of short blocks become one.

use super::appends::{append, append_block};
use super::*;

fn merging() -> World {
    let mut world = World::with(CoreSettings { merge_delay_ms: 10_000, merge_min_blocks: 3, ..settings() });
    for (at, rack) in ["/r0", "/r0", "/r1", "/r1"].into_iter().enumerate() {
        world.node_up(&format!("n{at}"), rack);
    }
    world
}

fn ids(world: &mut World, path: &str) -> Vec<u64> {
    world.locations(path).iter().map(|located| located.block.as_ref().unwrap().id as u64).collect()
}

fn lengths(world: &mut World, path: &str) -> Vec<u64> {
    world.locations(path).iter().map(|located| located.length).collect()
}

/// A whole block, then short ones.
fn make(world: &mut World, path: &str, short: &[u64]) -> Vec<u64> {
    let mut all = world.write(path, 2, 1);
    all.extend(short.iter().map(|length| append_block(world, path, *length)));
    all
}

fn replays(world: &mut World) {
    while world.core.has_work() {
        world.event(Event::Tick);
    }
    let mut core = Core::new_for_load(settings());
    for (txid, edit) in &world.log {
        core.replay(*txid, edit.clone()).unwrap();
    }
    assert_eq!(core.digest(), world.core.digest());
}

#[test]
fn a_run_of_short_blocks_becomes_one_and_the_old_ones_go() {
    let mut world = merging();
    let old = make(&mut world, "/f", &[100, 200, 300, 50]);
    world.pass(5_000);
    assert_eq!(ids(&mut world, "/f"), old, "the file is left alone for a while");
    world.pass(12_000);
    assert_eq!(lengths(&mut world, "/f"), [BLOCK, 650]);
    let now = ids(&mut world, "/f");
    assert!(now[0] == old[0] && !old.contains(&now[1]));
    assert!(world.locations("/f").iter().all(|located| located.complete && located.replicas.len() == 2));
    let status = world.status("/f").unwrap();
    assert_eq!((status.length, status.open), (BLOCK + 650, false));
    world.pass(5_000);
    assert!(world.nodes.iter().all(|node| old[1..].iter().all(|id| !node.held.contains_key(id))), "they are deleted");
    let report = world.cluster();
    assert_eq!((report.merged_blocks, report.merges_under_way, report.missing), (4, 0, 0));
    replays(&mut world);
    // One block and another short one are no run; and appends go on as before.
    append_block(&mut world, "/f", 5);
    world.pass(30_000);
    assert_eq!(lengths(&mut world, "/f"), [BLOCK, 650, 5]);
}

#[test]
fn a_file_that_is_appended_to_again_and_again_is_left_alone_until_it_is_quiet() {
    let mut world = merging();
    let mut old = make(&mut world, "/f", &[100, 200, 300]);
    for _ in 0..6 {
        // Each time shorter than the delay, together much longer.
        world.pass(6_000);
        assert_eq!(ids(&mut world, "/f"), old);
        old.push(append_block(&mut world, "/f", 50));
    }
    world.pass(17_000);
    assert_eq!(lengths(&mut world, "/f"), [BLOCK, 900]);
}

#[test]
fn a_file_that_is_gone_or_is_dated_in_the_future_is_not_waited_for() {
    let mut world = merging();
    make(&mut world, "/gone", &[100, 200, 300]);
    make(&mut world, "/future", &[100, 200, 300]);
    assert!(world.delete("root", "/gone", false).unwrap());
    let modified_ms = world.now.wall_ms + 1_000_000_000;
    let times = pb::SetTimesRequest { path: "/future".into(), modified_ms: Some(modified_ms), ..Default::default() };
    world.call::<pb::SetTimesResponse>("root", times).unwrap();
    world.pass(17_000);
    assert_eq!(lengths(&mut world, "/future"), [BLOCK, 600]);
    assert_eq!(world.core.merges.waiting(), 0, "nothing is left to look at");
}

#[test]
fn large_blocks_are_not_rewritten_for_small_ones() {
    let mut world = merging();
    make(&mut world, "/f", &[BLOCK / 2, 10, 10]);
    world.pass(40_000);
    assert_eq!(lengths(&mut world, "/f"), [BLOCK, BLOCK / 2, 10, 10]);
    append_block(&mut world, "/f", 10);
    world.pass(40_000);
    assert_eq!(lengths(&mut world, "/f"), [BLOCK, BLOCK / 2, 30], "the small ones among themselves");
}

#[test]
fn a_file_that_changes_meanwhile_keeps_its_blocks() {
    for change in 0..4 {
        let mut world = merging();
        let old = make(&mut world, "/f", &[100, 200, 300]);
        // The order is on its way.
        let order = (0..200).find_map(|_| {
            world.step(500);
            (0..4).find_map(|at| {
                let orders = world.heartbeat(at).unwrap();
                orders.into_iter().find_map(|o| if let Order::Merge(o) = o { Some((at, o)) } else { None })
            })
        });
        let (at, order) = order.expect("a merge is ordered");
        let new = order.block.as_ref().unwrap().id as u64;
        let mut rest = Vec::new();
        match change {
            0 => assert!(world.delete("root", "/f", false).unwrap()),
            1 => {
                let cut = pb::TruncateRequest { path: "/f".into(), length: BLOCK + 100, call: None };
                assert!(world.call::<pb::TruncateResponse>("root", cut).unwrap().done);
                rest = old[..2].to_vec();
            }
            2 => {
                // Open for longer than the merge is waited for.
                append(&mut world, "root", "/f", "writer").unwrap();
                rest.clone_from(&old);
            }
            _ => {
                world.restart();
                for at in 0..4 {
                    world.node_up(&format!("n{at}"), &format!("/r{}", at / 2));
                }
                rest.clone_from(&old);
            }
        }
        world.obey(at, Order::Merge(order));
        for _ in 0..30 {
            world
                .call::<pb::RenewLeaseResponse>("root", pb::RenewLeaseRequest { client_name: "writer".into() })
                .unwrap();
            world.beat();
            world.step(1_000);
            if change == 3 {
                break;
            }
        }
        if change > 0 {
            assert_eq!(ids(&mut world, "/f"), rest, "change {change}");
        }
        world.pass(3_000);
        assert!(
            world.nodes.iter().all(|node| !node.held.contains_key(&new)),
            "what was written for nothing goes: {change}"
        );
        assert_eq!(world.cluster().missing, 0);
    }
}

#[test]
fn no_merge_while_it_is_turned_off_and_none_of_blocks_that_lack_replicas() {
    let mut world = World::with(CoreSettings { merge_delay_ms: 0, merge_short_blocks: false, ..settings() });
    world.node_up("a", "/r0");
    make(&mut world, "/f", &[1, 1, 1, 1, 1]);
    world.pass(30_000);
    assert_eq!(ids(&mut world, "/f").len(), 6);
    assert!(world.log.iter().all(|(_, edit)| !matches!(edit.kind, Some(Kind::AllocateBlock(_)))));
}

#[test]
fn a_run_that_nobody_noted_is_found_by_the_walk() {
    let mut world = merging();
    make(&mut world, "/d/f", &[100, 200, 300]);
    world.restart();
    for at in 0..4 {
        world.node_up(&format!("n{at}"), &format!("/r{}", at / 2));
    }
    world.pass(40_000);
    assert_eq!(lengths(&mut world, "/d/f"), [BLOCK, 600]);
}

#[test]
fn replay_of_a_merge_is_strict() {
    let mut world = merging();
    let old = make(&mut world, "/f", &[100, 200]);
    let inode = world.status("/f").unwrap().inode;
    let log = world.log.clone();
    let (counters, next) = (world.core.counters, log.last().unwrap().0.next());
    let (id, generation) = (counters.block as i64 + 1, counters.generation + 1);
    let attempt = |kinds: Vec<Kind>| {
        let mut core = Core::new_for_load(settings());
        log.iter().try_for_each(|(txid, edit)| core.replay(*txid, edit.clone())).unwrap();
        kinds.into_iter().enumerate().try_for_each(|(at, kind)| {
            let edit = pb::Edit { min_reader: 2, kind: Some(kind), time_ms: 1, ..Default::default() };
            core.replay(TxId(next.0 + at as u64), edit)
        })
    };
    let allocate = || Kind::AllocateBlock(pb::EditAllocateBlock { block_id: id, generation });
    let good = pb::EditMergeBlocks {
        inode,
        index: 1,
        old: old[1..].iter().map(|id| *id as i64).collect(),
        block_id: id,
        generation,
        length: 300,
    };
    assert_eq!(attempt(vec![allocate(), Kind::MergeBlocks(good.clone())]), Ok(()));
    for (edit, says) in [
        (pb::EditMergeBlocks { length: 301, ..good.clone() }, "cannot stand for"),
        (pb::EditMergeBlocks { index: 0, ..good.clone() }, "does not have these"),
        (pb::EditMergeBlocks { old: Vec::new(), ..good.clone() }, "does not have these"),
        (pb::EditMergeBlocks { index: u32::MAX, ..good.clone() }, "does not have these"),
        (pb::EditMergeBlocks { block_id: id + 1, ..good.clone() }, "was not allocated"),
        (pb::EditMergeBlocks { block_id: old[0] as i64, ..good.clone() }, "was not allocated"),
        (pb::EditMergeBlocks { inode: 99, ..good.clone() }, "is no file"),
    ] {
        let error = attempt(vec![allocate(), Kind::MergeBlocks(edit)]).unwrap_err();
        assert!(error.cause.contains(says), "{error}");
    }
    assert!(attempt(vec![allocate(), allocate()]).unwrap_err().cause.contains("was used before"));
}

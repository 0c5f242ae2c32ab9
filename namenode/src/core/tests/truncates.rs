//! Truncate and concat.

use super::appends::append_block;
use super::*;

fn truncate(world: &mut World, user: &str, path: &str, length: u64) -> Result<pb::TruncateResponse, Error> {
    world.call(user, pb::TruncateRequest { path: path.into(), length, call: None })
}

fn concat(world: &mut World, user: &str, target: &str, sources: &[&str]) -> Result<pb::FileStatus, Error> {
    let sources = sources.iter().map(|source| (*source).to_owned()).collect();
    let request = pb::ConcatRequest { target: target.into(), sources, call: None };
    world.call::<pb::ConcatResponse>(user, request).map(|response| response.status.unwrap())
}

fn ids(world: &mut World, path: &str) -> Vec<u64> {
    world.locations(path).iter().map(|located| located.block.as_ref().unwrap().id as u64).collect()
}

/// The state comes back from the log and from an image.
fn survives(world: &mut World) {
    while world.core.has_work() {
        world.event(Event::Tick);
    }
    let digest = world.core.digest();
    let mut core = Core::new_for_load(settings());
    for (txid, edit) in &world.log {
        core.replay(*txid, edit.clone()).unwrap();
    }
    assert_eq!(core.digest(), digest, "replay");
    let txid = world.core.checkpoint_begin();
    let mut pages = Vec::new();
    while !world.core.checkpoint_slice(100, &mut pages) {}
    let mut core = Core::new_for_load(settings());
    pages.iter().for_each(|page| core.load_page(page).unwrap());
    core.finish_load(txid).unwrap();
    assert_eq!(core.digest(), digest, "image");
}

fn holders(world: &World, id: u64) -> Vec<u64> {
    world.nodes.iter().filter_map(|node| node.held.get(&id).map(|held| held.1)).collect()
}

#[test]
fn at_the_end_of_a_block_a_cut_is_one_edit() {
    let mut world = cluster();
    let blocks = world.write("/f", 3, 4);
    let edits = world.log.len();
    let answer = truncate(&mut world, "root", "/f", 2 * BLOCK).unwrap();
    assert!(answer.done && world.log.len() == edits + 1);
    let status = world.status("/f").unwrap();
    assert_eq!((status.length, status.open), (2 * BLOCK, false));
    assert_eq!(ids(&mut world, "/f"), blocks[..2]);
    // What was cut off goes only once the edit is durable.
    let deletion = world.core.nodes.nodes.iter().flat_map(|node| &node.delete).next().unwrap();
    assert_eq!(deletion.depends_on, world.core.last_txid());
    world.pass(2_000);
    assert!(holders(&world, blocks[2]).is_empty() && holders(&world, blocks[3]).is_empty());
    assert!(truncate(&mut world, "root", "/f", 2 * BLOCK).unwrap().done, "as long as it is");
    assert_eq!(world.log.len(), edits + 1);
    truncate(&mut world, "root", "/f", 0).unwrap();
    assert_eq!((world.status("/f").unwrap().length, ids(&mut world, "/f").len()), (0, 0));
    survives(&mut world);
}

#[test]
fn inside_a_block_its_replicas_are_cut_under_a_new_generation() {
    let mut world = cluster();
    let blocks = world.write("/f", 3, 3);
    let before = world.locations("/f")[1].block.as_ref().unwrap().generation;
    // One of its nodes is away.
    let away = (0..6).find(|at| world.nodes[*at].held.contains_key(&blocks[1])).unwrap();
    world.nodes[away].up = false;
    world.pass(31_000);
    world.pass(3_000);
    assert_eq!(holders(&world, blocks[1]).len(), 4, "it was copied elsewhere");
    let answer = truncate(&mut world, "root", "/f", BLOCK + 100).unwrap();
    assert!(!answer.done);
    let status = world.status("/f").unwrap();
    assert_eq!((status.length, status.open), (BLOCK + 100, true), "the new length holds at once");
    assert_eq!(status.shown_length, Some(2 * BLOCK), "HDFS's doors show it when it is made");
    let located = world.locations("/f");
    assert_eq!((located[1].length, located[1].complete, located[1].replicas.len()), (100, false, 3));
    let request = pb::AppendRequest { path: "/f".into(), client_name: "a".into(), call: None };
    assert_eq!(code(world.call::<pb::AppendResponse>("root", request)), ErrorCode::AlreadyBeingCreated);
    survives(&mut world);
    world.pass(2_000);
    let status = world.status("/f").unwrap();
    assert_eq!((status.length, status.open, status.shown_length), (BLOCK + 100, false, None));
    let located = world.locations("/f");
    assert!(located[1].complete && located[1].length == 100 && located[1].replicas.len() == 3);
    assert!(located[1].block.as_ref().unwrap().generation > before);
    assert_eq!(world.cluster().missing, 0);
    // The one that was away comes back with the old generation: it does not count, and goes.
    world.nodes[away].up = true;
    world.pass(5_000);
    assert!(!world.nodes[away].held.contains_key(&blocks[1]));
    assert_eq!(holders(&world, blocks[1]), [100, 100, 100]);
    assert_eq!(append_block(&mut world, "/f", 7), ids(&mut world, "/f")[2]);
    survives(&mut world);
}

#[test]
fn a_cut_goes_on_after_a_restart_and_an_answer_of_another_length_does_not_count() {
    let mut world = cluster();
    let blocks = world.write("/f", 2, 1);
    truncate(&mut world, "root", "/f", 100).unwrap();
    world.restart();
    for at in 0..6 {
        world.node_up(&format!("n{at}"), &format!("/r{}", at / 2));
    }
    assert_eq!(world.status("/f").unwrap().length, 100);
    let (at, order) = (0..200)
        .find_map(|_| {
            world.step(200);
            (0..6).find_map(|at| {
                let orders = world.heartbeat(at).unwrap();
                orders.into_iter().find_map(|o| if let Order::Recover(o) = o { Some((at, o)) } else { None })
            })
        })
        .expect("the cut is ordered again");
    assert_eq!(order.truncate_to, Some(100));
    let wrong = pb::BlockRecovered {
        block: order.block.clone(),
        new_generation: order.new_generation,
        length: 99,
        storage_ids: vec![order.replicas[0].storage_id.clone()],
    };
    world.report(at, Report::Recovered(wrong));
    assert!(world.status("/f").unwrap().open);
    world.recover(at, &order);
    assert!(!world.status("/f").unwrap().open);
    assert_eq!(holders(&world, blocks[0]), [100, 100]);
}

#[test]
fn a_cut_whose_nodes_are_all_away_gives_nothing_up() {
    let mut world = cluster();
    let blocks = world.write("/f", 1, 1);
    truncate(&mut world, "root", "/f", 100).unwrap();
    let at = (0..6).find(|at| world.nodes[*at].held.contains_key(&blocks[0])).unwrap();
    world.nodes[at].up = false;
    world.pass(400_000);
    let status = world.status("/f").unwrap();
    assert!(status.open && status.length == 100 && ids(&mut world, "/f") == blocks);
    assert_eq!(code(truncate(&mut world, "root", "/f", 50)), ErrorCode::AlreadyBeingCreated);
    world.nodes[at].up = true;
    world.pass(20_000);
    assert!(!world.status("/f").unwrap().open);
    assert_eq!(holders(&world, blocks[0]), [100]);
    // And nothing is begun while no replica is there.
    world.nodes[at].up = false;
    world.pass(40_000);
    assert_eq!(code(truncate(&mut world, "root", "/f", 50)), ErrorCode::BlockNotFound);
    assert!(truncate(&mut world, "root", "/f", 0).unwrap().done, "the whole block may go");
}

#[test]
fn what_cannot_be_truncated() {
    let mut world = cluster();
    world.write("/d/f", 1, 1);
    assert_eq!(code(truncate(&mut world, "root", "/d", 0)), ErrorCode::NotAFile);
    assert_eq!(code(truncate(&mut world, "root", "/none", 0)), ErrorCode::FileNotFound);
    assert_eq!(code(truncate(&mut world, "ann", "/d/f", 0)), ErrorCode::PermissionDenied);
    let error = truncate(&mut world, "root", "/d/f", BLOCK + 1).unwrap_err();
    assert_eq!(
        error.message(),
        "Cannot truncate to a larger file size. Current size: 1048576, truncate size: 1048577."
    );
    world.create("/d/open", 1).unwrap();
    assert_eq!(code(truncate(&mut world, "root", "/d/open", 0)), ErrorCode::AlreadyBeingCreated);
    world.call::<pb::SafeModeResponse>("root", pb::SafeModeRequest { action: 1 }).unwrap();
    assert_eq!(code(truncate(&mut world, "root", "/d/f", 0)), ErrorCode::SafeMode);
    assert_eq!(code(concat(&mut world, "root", "/d/f", &["/d/f"])), ErrorCode::SafeMode);
}

#[test]
fn concat_hangs_blocks_behind_blocks() {
    let mut world = cluster();
    let first = world.write("/d/a", 2, 1);
    let second = world.write("/d/b", 3, 2);
    let third = world.write("/d/c", 1, 1);
    append_block(&mut world, "/d/a", 9);
    let tail = ids(&mut world, "/d/a")[1];
    let edits = world.log.len();
    let status = concat(&mut world, "root", "/d/a", &["/d/c", "/d/b"]).unwrap();
    assert_eq!((status.length, world.log.len()), (4 * BLOCK + 9, edits + 1));
    assert_eq!(ids(&mut world, "/d/a"), [first[0], tail, third[0], second[0], second[1]]);
    let offsets: Vec<u64> = world.locations("/d/a").iter().map(|located| located.offset).collect();
    assert_eq!(offsets, [0, BLOCK, BLOCK + 9, 2 * BLOCK + 9, 3 * BLOCK + 9]);
    for gone in ["/d/b", "/d/c"] {
        assert_eq!(code(world.status(gone)), ErrorCode::FileNotFound);
    }
    // The target's replication holds for all.
    world.pass(5_000);
    assert!(world.locations("/d/a").iter().all(|located| located.replicas.len() == 2));
    survives(&mut world);
    // A name that became free is free, and the joined file can be cut and appended to as any other.
    world.write("/d/b", 1, 1);
    truncate(&mut world, "root", "/d/a", 2 * BLOCK + 9).unwrap();
    assert_eq!(ids(&mut world, "/d/a"), [first[0], tail, third[0]]);
    append_block(&mut world, "/d/a", 5);
    world.delete("root", "/d/a", false).unwrap();
    world.pass(3_000);
    assert!(holders(&world, first[0]).is_empty() && holders(&world, third[0]).is_empty());
    survives(&mut world);
}

#[test]
fn what_cannot_be_joined() {
    let mut world = cluster();
    world.write("/d/a", 1, 1);
    world.write("/d/b", 1, 1);
    world.write("/e/c", 1, 1);
    world.create("/d/open", 1).unwrap();
    let empty = world.create("/d/empty", 1).unwrap().inode;
    let reply = world.complete(empty, &[]);
    world.answer(reply).unwrap().unwrap();
    world.mkdirs("root", "/d/dir", 0o755).unwrap();
    let edits = world.log.len();
    for (target, sources, says) in [
        ("/d/a", &["/d/a"][..], "is the same with the target"),
        ("/d/a", &["/d/b", "/d/b"], "at least two of the source files are the same"),
        ("/d/a", &["/e/c"], "not in the same directory"),
        ("/d/a", &["/d/open"], "empty or underConstruction"),
        ("/d/a", &["/d/empty"], "empty or underConstruction"),
        ("/d/open", &["/d/a"], "is under construction"),
        ("/d/a", &["/d/dir"], "not a file"),
        ("/d/dir", &["/d/a"], "not a file"),
        ("/d/a", &["/d/none"], "does not exist"),
        ("/d/a", &[], "sources"),
    ] {
        let error = concat(&mut world, "root", target, sources).unwrap_err();
        assert!(error.message().contains(says), "{target} {sources:?}: {error}");
    }
    assert_eq!(code(concat(&mut world, "ann", "/d/a", &["/d/b"])), ErrorCode::PermissionDenied);
    assert_eq!(world.log.len(), edits, "nothing was changed");
}

#[test]
fn both_are_applied_once() {
    let mut world = cluster();
    world.write("/d/a", 1, 2);
    world.write("/d/b", 1, 1);
    let call = |call_id| Some(pb::CallContext { client_id: vec![9; 16].into(), call_id, ..Default::default() });
    let cut = pb::TruncateRequest { call: call(1), path: "/d/a".into(), length: BLOCK };
    let join = pb::ConcatRequest { call: call(2), target: "/d/a".into(), sources: vec!["/d/b".into()] };
    let first: pb::TruncateResponse = world.call("root", cut.clone()).unwrap();
    let second: pb::ConcatResponse = world.call("root", join.clone()).unwrap();
    for restarted in [false, true] {
        if restarted {
            world.restart();
        }
        let edits = world.log.len();
        assert_eq!(world.call::<pb::TruncateResponse>("root", cut.clone()).unwrap(), first);
        assert_eq!(world.call::<pb::ConcatResponse>("root", join.clone()).unwrap(), second);
        assert_eq!(world.log.len(), edits);
    }
}

#[test]
fn replay_of_both_is_strict() {
    let mut world = cluster();
    world.write("/d/a", 1, 2);
    world.write("/d/b", 1, 1);
    world.create("/d/open", 1).unwrap();
    let inode = |world: &mut World, path: &str| world.status(path).unwrap().inode;
    let (a, b, open) = (inode(&mut world, "/d/a"), inode(&mut world, "/d/b"), inode(&mut world, "/d/open"));
    let block = ids(&mut world, "/d/a")[1] as i64;
    let log = world.log.clone();
    let next = log.last().unwrap().0.next();
    let attempt = |kind: Kind| {
        let mut core = Core::new_for_load(settings());
        log.iter().try_for_each(|(txid, edit)| core.replay(*txid, edit.clone())).unwrap();
        core.replay(next, pb::Edit { min_reader: 2, kind: Some(kind), time_ms: 1, ..Default::default() })
    };
    let cut = |inode, length, blocks, cut_block| {
        attempt(Kind::Truncate(pb::EditTruncate { inode, length, blocks, cut_block }))
    };
    assert_eq!(cut(a, BLOCK, 1, 0), Ok(()));
    assert_eq!(cut(a, BLOCK + 1, 2, block), Ok(()));
    for (length, blocks, cut_block) in [
        (2 * BLOCK, 2, 0),
        (BLOCK, 2, 0),
        (BLOCK, 1, block),
        (BLOCK + 1, 2, 0),
        (BLOCK + 1, 1, block),
        (u64::MAX, 2, 0),
    ] {
        let error = cut(a, length, blocks, cut_block).unwrap_err();
        assert!(error.cause.contains("cannot be cut"), "{error}");
    }
    assert!(cut(open, 0, 0, 0).unwrap_err().cause.contains("is open"));
    assert!(cut(16_385, 0, 0, 0).unwrap_err().cause.contains("no file"));
    let join = |target, sources| attempt(Kind::Concat(pb::EditConcat { target, sources }));
    assert_eq!(join(a, vec![b]), Ok(()));
    for (sources, says) in [(vec![a], "twice"), (vec![b, b], "twice"), (vec![open], "is open"), (vec![99], "no file")] {
        assert!(join(a, sources).unwrap_err().cause.contains(says));
    }
}

#[test]
fn nobody_writes_in_the_name_of_the_recovery() {
    let mut world = cluster();
    world.write("/f", 3, 1);
    assert!(!truncate(&mut world, "root", "/f", 700).unwrap().done);
    let inode = world.status("/f").unwrap().inode;
    let block = world.locations("/f")[0].block.clone();
    let client_name = crate::core::recovery::RECOVERY_HOLDER.to_owned();
    let request = pb::NewGenerationRequest { inode, client_name, block, ..Default::default() };
    let error = world.call::<pb::NewGenerationResponse>("ann", request).unwrap_err();
    assert_eq!(error.code(), ErrorCode::LeaseExpired);
    world.pass(10_000);
    assert_eq!(world.status("/f").unwrap().length, 700, "and the cut goes on");
}

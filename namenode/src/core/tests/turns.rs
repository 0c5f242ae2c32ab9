//! No event takes the owner long, however large the namespace: what is unbounded is done in turns.

use super::*;
use crate::core::codec::steps;

const BUDGET: usize = 50;
/// Steps (records looked up, numbers encoded) that one event may take. An item of a cursor takes a few dozen.
const MOST: u64 = 100 * BUDGET as u64;

/// 40 directories of 500 files with one block and two replicas; 20,000 files.
fn big() -> World {
    let mut world = World::with(CoreSettings {
        cursor_budget: BUDGET,
        repairs_per_turn: BUDGET,
        abandoned_block_wait_ms: 60_000,
        ..settings()
    });
    for node in 0..3 {
        world.node_up(&format!("n{node}"), &format!("/r{}", node % 2));
    }
    world.strict = false;
    world.mkdirs("root", "/big", 0o777).unwrap();
    for directory in 0..40 {
        world.mkdirs("ann", &format!("/big/d{directory:02}"), 0o755).unwrap();
        for file in 0..500 {
            world.write_quietly(&format!("/big/d{directory:02}/f{file:03}"));
        }
    }
    world.sync();
    steps::take();
    world
}

impl World {
    /// A closed file with one block on two nodes, as the log would make it, and what the nodes would report.
    fn write_quietly(&mut self, path: &str) {
        let parent = self.core.tree.resolve(path).unwrap().parent().unwrap();
        let name = path.rsplit('/').next().unwrap().to_owned();
        let (inode, id) = (self.core.counters.inode + 1, self.core.counters.block + 1);
        let generation = self.core.counters.generation + 1;
        let create = pb::EditCreate {
            inode,
            parent,
            name: name.into(),
            owner: "ann".into(),
            group: "users".into(),
            permission: 0o644,
            replication: 2,
            block_size: BLOCK,
            client_name: "writer".into(),
            replaces: 0,
        };
        let blocks = vec![pb::EditBlockLength { block_id: id as i64, generation, length: 9 }];
        let add = pb::EditAddBlock { inode, block_id: id as i64, generation, index: 0 };
        for kind in [Kind::Create(create), Kind::AddBlock(add), Kind::Close(pb::EditClose { inode, blocks })] {
            let mut turn = Turn { wall_ms: 1, random: Random::new(1), commands: &mut Vec::new(), call: None };
            self.core.commit(&mut turn, Carries::Nothing, kind).unwrap();
            for command in turn.commands.drain(..) {
                if let Command::Append { txid, edit } = command {
                    self.log.push((txid, edit));
                }
            }
        }
        for node in [id % 3, (id + 1) % 3] {
            self.hold(node as usize, id, (generation, 9, pb::ReplicaState::Finalized));
        }
    }

    /// Steps of the longest event until no cursor has work. The first event is `event`.
    fn longest(&mut self, what: &str, event: Event) -> u64 {
        steps::take();
        self.event(event);
        let (mut longest, mut turns) = (steps::take(), 1);
        while self.core.has_work() {
            self.event(Event::Tick);
            longest = longest.max(steps::take());
            turns += 1;
        }
        println!("{what}: {longest} steps in the longest of {turns} turns");
        assert!(longest <= MOST, "{what}: an event took {longest} steps");
        longest
    }

    fn client(&mut self, user: &str, request: impl Into<ClientRequest>) -> Event {
        Event::Client { reply: ReplyTo(self.next + 1), caller: caller(user), request: request.into() }
    }
}

#[test]
fn no_event_takes_long_in_a_large_namespace() {
    let mut world = big();
    let event = world.client("root", pb::ContentSummaryRequest { path: "/".into() });
    world.longest("summary", event);

    // A node dies; another one registers.
    world.nodes[0].up = false;
    world.now.mono_ms += 1_000;
    for _ in 0..40 {
        world.heartbeat(1).unwrap();
        world.heartbeat(2).unwrap();
        world.now.mono_ms += 1_000;
        world.longest("node death", Event::Tick);
    }
    assert!(!world.core.nodes.node(0).alive);
    world.nodes.push(FakeNode {
        id: "n3".into(),
        rack: "/r0".into(),
        up: true,
        remaining: 1 << 39,
        ..FakeNode::default()
    });
    steps::take();
    world.register(3).unwrap();
    world.longest("a node more", Event::Tick);

    // A disk comes back empty: one range says that everything is gone.
    world.nodes[1].held.clear();
    steps::take();
    world.full_report(1);
    let first = steps::take();
    assert!(first <= MOST, "an empty full report took {first} steps");
    assert!(world.core.nodes.storage(1).blocks.len() > 1_000, "the rest waits for its turn");
    world.longest("an empty full report", Event::Tick);
    assert_eq!(world.core.nodes.storage(1).blocks.len(), 0);
    for _ in 0..10 {
        world.now.mono_ms += 500;
        world.longest("repair", Event::Tick);
    }

    let delete = pb::DeleteRequest { path: "/big/d07".into(), recursive: true, ..Default::default() };
    let event = world.client("ann", delete);
    world.longest("delete as a user", event);
    let delete = pb::DeleteRequest { path: "/big".into(), recursive: true, ..Default::default() };
    let event = world.client("root", delete);
    world.longest("delete", event);
    assert_eq!(world.core.tree.inodes.len(), 1);
}

#[test]
fn a_file_of_very_many_blocks_is_freed_in_small_steps() {
    const BLOCKS: u64 = 4_000;
    let mut world = World::with(CoreSettings { cursor_budget: BUDGET, ..settings() });
    for node in 0..3 {
        world.node_up(&format!("n{node}"), &format!("/r{node}"));
    }
    world.strict = false;
    world.mkdirs("root", "/d", 0o777).unwrap();
    (0..BLOCKS).for_each(|file| world.write_quietly(&format!("/d/f{file}")));
    // The other way round, so that the ids fall.
    let sources = (1..BLOCKS).rev().map(|file| format!("/d/f{file}")).collect();
    let concat = pb::ConcatRequest { target: "/d/f0".into(), sources, call: None };
    world.call::<pb::ConcatResponse>("root", concat).unwrap();
    world.sync();
    let delete = pb::DeleteRequest { path: "/d/f0".into(), ..Default::default() };
    let event = world.client("root", delete);
    steps::take();
    world.event(event);
    let first = steps::take();
    // Its ids are looked at a few times when it goes, not once more for each block.
    assert!(first <= MOST + 6 * BLOCKS, "the first event took {first} steps");
    // An image of the half-freed file loads.
    let txid = world.core.checkpoint_begin();
    let mut pages = Vec::new();
    while !world.core.checkpoint_slice(100, &mut pages) {}
    let mut core = Core::new_for_load(settings());
    pages.iter().for_each(|page| core.load_page(page).unwrap());
    core.finish_load(txid).unwrap();
    assert!(core.has_work() && core.digest() == world.core.digest());
    steps::take();
    let (mut longest, mut all) = (0, first);
    while world.core.has_work() {
        world.event(Event::Tick);
        let taken = steps::take();
        (longest, all) = (longest.max(taken), all + taken);
    }
    println!("{all} steps in all, {longest} in the longest turn");
    assert!(longest <= MOST, "a turn took {longest} steps");
    assert!(all <= 60 * BLOCKS, "{all} steps for {BLOCKS} blocks");
    assert_eq!(world.core.blocks.table.len(), 0);
}

#[test]
fn a_checkpoint_begins_and_goes_on_in_small_steps() {
    let mut world = World::new();
    for file in 0..20_000u64 {
        let call = pb::CallContext { client_id: vec![1; 16].into(), call_id: file + 1, ..Default::default() };
        let request = pb::CreateRequest {
            call: Some(call),
            path: format!("/f{file}"),
            client_name: format!("w{}", file % 100),
            ..Default::default()
        };
        world.call::<pb::CreateResponse>("root", request).unwrap();
    }
    let leases: Vec<(u64, String)> = world.core.leases.all().map(|(file, holder)| (file, holder.to_owned())).collect();
    steps::take();
    let txid = world.core.checkpoint_begin();
    let begin = steps::take();
    let (mut pages, mut longest, mut done) = (Vec::new(), 0, false);
    while !done {
        done = world.core.checkpoint_slice(1, &mut pages);
        longest = longest.max(steps::take());
        // Files are closed and answers let go meanwhile.
        let open = world.core.leases.all().next().map(|(file, _)| file);
        let reply = world.complete(open.unwrap(), &[]);
        assert!(world.answer(reply).is_some());
        steps::take();
    }
    println!("checkpoint: {begin} steps to begin, {longest} in the longest slice");
    assert!(begin < 200, "the beginning takes {begin} steps");
    // A page of inodes has 1,024 records of about eleven numbers.
    assert!(longest < 16 * 1_024, "a slice took {longest} steps");
    let mut core = Core::new_for_load(settings());
    pages.iter().for_each(|page| core.load_page(page).unwrap());
    core.finish_load(txid).unwrap();
    assert!(core.leases.all().eq(leases.iter().map(|(file, holder)| (*file, &**holder))));
    assert_eq!(core.retry.len(), 20_000);
}

#[test]
fn old_answers_go_in_turns() {
    let mut world = World::with(CoreSettings { cursor_budget: BUDGET, ..settings() });
    for call_id in 1..=2_000 {
        let call = pb::CallContext { client_id: vec![1; 16].into(), call_id, ..Default::default() };
        let request = pb::MkdirsRequest { call: Some(call), path: format!("/d{call_id}"), ..Default::default() };
        world.call::<pb::MkdirsResponse>("root", request).unwrap();
    }
    world.now.mono_ms += 300_000;
    world.event(Event::Tick);
    for _ in 0..1_000 {
        world.now.mono_ms += 1_000;
        let before = world.core.retry.len();
        world.event(Event::Tick);
        assert!(before - world.core.retry.len() <= 2 * BUDGET);
        if before > world.core.retry.len() && world.core.retry.len() > 0 {
            assert!(world.core.has_work(), "the rest goes at once");
        }
    }
    assert_eq!(world.core.retry.len(), 0);
}

/// A tree of ann's with 30 directories below; the check takes a few directories a turn.
fn tree_of_ann() -> World {
    let mut world = World::with(CoreSettings { cursor_budget: 4, ..settings() });
    world.mkdirs("root", "/home", 0o777).unwrap();
    for at in 0..30 {
        world.mkdirs("ann", &format!("/home/t/d{at:02}/sub"), 0o755).unwrap();
    }
    world
}

fn send_delete(world: &mut World, call_id: u64) -> u64 {
    let call = pb::CallContext { client_id: vec![9; 16].into(), call_id, ..Default::default() };
    world.send("ann", pb::DeleteRequest { call: Some(call), path: "/home/t".into(), recursive: true, only_inode: 0 })
}

fn wait(world: &mut World, reply: u64) -> Result<Response, Error> {
    for _ in 0..1_000 {
        if let Some(result) = world.answer(reply) {
            return result;
        }
        world.event(Event::Tick);
    }
    panic!("no answer");
}

fn paths(world: &mut World) -> Vec<String> {
    world.walk().into_iter().map(|status| status.path).collect()
}

#[test]
fn a_tree_goes_whole_or_not_at_all() {
    let mut world = tree_of_ann();
    // Somebody else's directory deep inside; empty ones need no rights.
    world.mkdirs("root", "/home/t/d17/sub/roots", 0o755).unwrap();
    let before = paths(&mut world);
    world.mkdirs("root", "/home/t/d17/sub/roots/full", 0o755).unwrap();
    let edits = world.log.len();
    let reply = send_delete(&mut world, 1);
    assert!(world.answer(reply).is_none(), "the check takes several turns");
    let error = wait(&mut world, reply).unwrap_err();
    assert_eq!((error.code(), error.subject()), (ErrorCode::PermissionDenied, "/home/t/d17/sub/roots"));
    assert_eq!((world.log.len(), world.core.has_work()), (edits, false));
    world.delete("root", "/home/t/d17/sub/roots/full", false).unwrap();
    assert_eq!(paths(&mut world), before);
    // A refused call is not remembered: the same one runs again. Its duplicate waits with it.
    let reply = send_delete(&mut world, 1);
    let twin = send_delete(&mut world, 1);
    assert!(world.answer(twin).is_none());
    assert_eq!(wait(&mut world, reply), wait(&mut world, twin));
    assert_eq!(paths(&mut world), ["/", "/home"]);
    let edits = world.log.len();
    let reply = send_delete(&mut world, 1);
    assert!(world.answer(reply).unwrap().is_ok());
    assert_eq!(world.log.len(), edits);
}

#[test]
fn what_changes_during_the_check_counts() {
    type Change = (&'static str, fn(&mut World), bool);
    let changes: [Change; 6] = [
        ("a new mode", |world| chmod(world, "/home/t/d00", 0o500), false),
        (
            "an entry in a directory of somebody else",
            |world| {
                world.mkdirs("root", "/home/t/d29/sub/mine/full", 0o755).unwrap();
            },
            false,
        ),
        (
            "an entry in a directory that was empty",
            |world| {
                chmod(world, "/home/t/d00/sub", 0o500);
                world.mkdirs("root", "/home/t/d00/sub/full", 0o755).unwrap();
            },
            false,
        ),
        (
            "a tree moved in",
            |world| {
                world.mkdirs("root", "/home/x/y/z", 0o700).unwrap();
                world.rename("root", "/home/x", "/home/t/d03/x", pb::RenameMode::NoReplace).unwrap();
            },
            false,
        ),
        (
            "another tree under the path",
            |world| {
                world.rename("root", "/home/t", "/home/old", pb::RenameMode::NoReplace).unwrap();
                world.mkdirs("root", "/home/t", 0o777).unwrap();
                world.mkdirs("root", "/home/t/x/y", 0o700).unwrap();
            },
            false,
        ),
        (
            "a harmless entry",
            |world| {
                world.mkdirs("ann", "/home/t/d03/new/newer", 0o755).unwrap();
            },
            true,
        ),
    ];
    for (what, change, works) in changes {
        // Whenever it happens, the check must see it.
        for turns in [0, 1, 5, 15] {
            let mut world = tree_of_ann();
            let reply = send_delete(&mut world, 1);
            (0..turns).for_each(|_| world.event(Event::Tick));
            if world.answer(reply).is_some() {
                panic!("{what}: the check is over after {turns} turns");
            }
            change(&mut world);
            let before = paths(&mut world);
            let result = wait(&mut world, reply);
            assert_eq!(result.is_ok(), works, "{what} after {turns} turns: {result:?}");
            while world.core.has_work() {
                world.event(Event::Tick);
            }
            if works {
                assert_eq!(paths(&mut world), ["/", "/home"], "{what}");
            } else {
                assert_eq!(paths(&mut world), before, "{what}");
            }
        }
    }
}

fn chmod(world: &mut World, path: &str, permission: u32) {
    let request = pb::SetPermissionRequest { path: path.into(), permission, call: None };
    world.call::<pb::SetPermissionResponse>("root", request).unwrap();
}

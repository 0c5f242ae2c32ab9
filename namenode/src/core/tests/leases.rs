//! Whose a lease is, and who gets a file from its writer.

use super::appends::append;
use super::*;

fn finalized(generation: u64, length: u64) -> Held {
    (generation, length, pb::ReplicaState::Finalized)
}

fn create(world: &mut World, user: &str, path: &str, client: &str) -> Result<pb::CreateResponse, Error> {
    let request = pb::CreateRequest {
        path: path.into(),
        permission: 0o644,
        replication: 1,
        client_name: client.into(),
        ..Default::default()
    };
    world.call(user, request)
}

fn shared() -> World {
    let mut world = cluster();
    world.mkdirs("root", "/d", 0o777).unwrap();
    world
}

/// Every call of a writer of block `block`, as `user` under the client's name "writer"; its code, or `None`.
fn writer_calls(world: &mut World, user: &str, inode: u64, block: &pb::Block) -> Vec<Option<ErrorCode>> {
    fn of<T>(result: Result<T, Error>) -> Option<ErrorCode> {
        result.err().map(|error| error.code())
    }
    let (client_name, block) = (|| "writer".to_owned(), || Some(block.clone()));
    let node = pb::PipelineNode { node_id: "n0".into(), ..Default::default() };
    let add = pb::AddBlockRequest { inode, client_name: client_name(), block_index: 1, ..Default::default() };
    let generation = pb::NewGenerationRequest { inode, client_name: client_name(), block: block(), call: None };
    let more = pb::AddPipelineNodeRequest { inode, client_name: client_name(), block: block(), ..Default::default() };
    let update = pb::UpdatePipelineRequest {
        inode,
        client_name: client_name(),
        block: block(),
        new_generation: 1,
        nodes: vec![node],
        call: None,
    };
    let abandon = pb::AbandonBlockRequest { inode, client_name: client_name(), block: block(), call: None };
    let complete = pb::CompleteRequest { inode, client_name: client_name(), ..Default::default() };
    let release = pb::RecoverLeaseRequest { inode, only_of: client_name(), ..Default::default() };
    vec![
        of(world.call::<pb::AddBlockResponse>(user, add)),
        of(world.call::<pb::NewGenerationResponse>(user, generation)),
        of(world.call::<pb::AddPipelineNodeResponse>(user, more)),
        of(world.call::<pb::UpdatePipelineResponse>(user, update)),
        of(world.call::<pb::AbandonBlockResponse>(user, abandon)),
        of(world.call::<pb::CompleteResponse>(user, complete)),
        of(world.call::<pb::RecoverLeaseResponse>(user, release)),
    ]
}

#[test]
fn a_lease_belongs_to_the_user_who_took_it() {
    type Restart = fn(&mut World);
    let by_log: Restart = World::restart;
    let by_image: Restart = |world| {
        let txid = world.core.checkpoint_begin();
        let mut pages = Vec::new();
        while !world.core.checkpoint_slice(100, &mut pages) {}
        let mut core = Core::new_for_load(settings());
        pages.iter().for_each(|page| core.load_page(page).unwrap());
        core.finish_load(txid).unwrap();
        assert_eq!(core.digest(), world.core.digest());
        world.restart_with(core);
    };
    let neither: Restart = |_| {};
    for (appends, restart) in [(false, neither), (true, neither), (false, by_log), (true, by_log), (true, by_image)] {
        let mut world = shared();
        let inode = create(&mut world, "ann", "/d/f", "writer").unwrap().status.unwrap().inode;
        if appends {
            let complete = pb::CompleteRequest { inode, client_name: "writer".into(), ..Default::default() };
            world.call::<pb::CompleteResponse>("ann", complete).unwrap();
            append(&mut world, "ann", "/d/f", "writer").unwrap();
        }
        let add = pb::AddBlockRequest { inode, client_name: "writer".into(), ..Default::default() };
        let block = world.call::<pb::AddBlockResponse>("ann", add).unwrap().block.unwrap().block.unwrap();
        restart(&mut world);
        for at in 0..6 {
            world.node_up(&format!("n{at}"), &format!("/r{}", at / 2));
        }
        world.step(1);
        let edits = world.log.len();
        // The name of the client is no secret: it is in the errors that others get.
        let refused = vec![Some(ErrorCode::PermissionDenied); 7];
        assert_eq!(writer_calls(&mut world, "bob", inode, &block), refused, "appends: {appends}");
        assert_eq!(world.log.len(), edits);
        let own = writer_calls(&mut world, "ann", inode, &block);
        assert!(own.iter().all(|code| *code != Some(ErrorCode::PermissionDenied)), "{own:?}");
    }
}

#[test]
fn nobody_keeps_the_lease_of_another_user_alive() {
    let mut world = shared();
    create(&mut world, "ann", "/d/f", "writer").unwrap();
    for _ in 0..8 {
        world.pass(50_000);
        let renew = pb::RenewLeaseRequest { client_name: "writer".into() };
        world.call::<pb::RenewLeaseResponse>("bob", renew).unwrap();
    }
    assert!(!world.status("/d/f").unwrap().open, "the hard limit holds");
}

#[test]
fn a_file_is_not_taken_from_its_writer_by_whoever_may_not_write_it() {
    let mut world = shared();
    let inode = create(&mut world, "ann", "/d/f", "writer").unwrap().status.unwrap().inode;
    world.pass(61_000);
    let edits = world.log.len();
    assert_eq!(code(create(&mut world, "bob", "/d/f", "other")), ErrorCode::PermissionDenied);
    // Nor where no entry may be made.
    world
        .call::<pb::SetPermissionResponse>(
            "root",
            pb::SetPermissionRequest { path: "/d".into(), permission: 0o755, call: None },
        )
        .unwrap();
    assert_eq!(code(create(&mut world, "bob", "/d/f", "other")), ErrorCode::PermissionDenied);
    assert_eq!(world.log.len(), edits + 1);
    assert_eq!(world.core.leases.holder_of(inode), Some("writer"));
    world.call::<pb::SafeModeResponse>("root", pb::SafeModeRequest { action: 1 }).unwrap();
    assert_eq!(code(create(&mut world, "root", "/d/f", "other")), ErrorCode::SafeMode);
    assert_eq!(world.core.leases.holder_of(inode), Some("writer"));
    world.call::<pb::SafeModeResponse>("root", pb::SafeModeRequest { action: 2 }).unwrap();
    assert_eq!(code(create(&mut world, "root", "/d/f", "other")), ErrorCode::FileAlreadyExists);
    assert!(!world.status("/d/f").unwrap().open, "who may gets it closed");
}

#[test]
fn an_append_does_not_wait_for_what_others_wrote() {
    for restart in [false, true] {
        let mut world = cluster();
        let old = world.write("/f", 1, 3);
        // All nodes that hold the old blocks go away.
        for at in 0..6 {
            if old.iter().any(|id| world.nodes[at].held.contains_key(id)) {
                world.nodes[at].up = false;
            }
        }
        world.node_up("n6", "/r0");
        world.pass(40_000);
        let opened = append(&mut world, "root", "/f", "writer").unwrap();
        let inode = opened.status.unwrap().inode;
        if restart {
            let txid = world.core.checkpoint_begin();
            let mut pages = Vec::new();
            while !world.core.checkpoint_slice(100, &mut pages) {}
            let mut core = Core::new_for_load(settings());
            pages.iter().for_each(|page| core.load_page(page).unwrap());
            core.finish_load(txid).unwrap();
            world.restart_with(core);
            world.node_up("n6", "/r0");
            world.call::<pb::SafeModeResponse>("root", pb::SafeModeRequest { action: 2 }).unwrap();
        }
        let mut committed = Vec::new();
        for index in 3..5 {
            let located = world.add_block(inode, index, &committed).unwrap();
            let block = located.block.unwrap();
            for replica in &located.replicas {
                let at = world.at(&replica.node_id);
                world.hold(at, block.id as u64, finalized(block.generation, BLOCK));
            }
            committed.push((block.id as u64, block.generation, BLOCK));
        }
        let reply = world.complete(inode, &committed);
        let answer = world.answer(reply).expect("it waits for blocks that this writer did not write");
        answer.unwrap();
        assert_eq!(world.status("/f").unwrap().length, 5 * BLOCK);
    }
}

#[test]
fn a_writer_gives_up_its_own_file_whatever_its_name() {
    let mut world = shared();
    let inode = create(&mut world, "ann", "/d/f", "writer").unwrap().status.unwrap().inode;
    world.rename("root", "/d/f", "/d/moved", pb::RenameMode::NoReplace).unwrap();
    create(&mut world, "ann", "/d/f", "writer").unwrap();
    let release =
        |inode, only_of: &str| pb::RecoverLeaseRequest { inode, only_of: only_of.into(), ..Default::default() };
    assert_eq!(code(world.call::<pb::RecoverLeaseResponse>("ann", release(inode, ""))), ErrorCode::InvalidArgument);
    assert!(world.call::<pb::RecoverLeaseResponse>("ann", release(inode, "other")).unwrap().closed, "not its own");
    assert!(world.status("/d/moved").unwrap().open);
    assert!(world.call::<pb::RecoverLeaseResponse>("ann", release(inode, "writer")).unwrap().closed);
    assert!(!world.status("/d/moved").unwrap().open);
    assert!(world.status("/d/f").unwrap().open, "another file under its old name is left alone");
    world.delete("ann", "/d/moved", false).unwrap();
    assert!(world.call::<pb::RecoverLeaseResponse>("ann", release(inode, "writer")).unwrap().closed);
}

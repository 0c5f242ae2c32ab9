//! Image plus replay is the live state, for any schedule of slices; replay is strict.

use super::model::{Driver, config, plain};
use super::*;
use proptest::prelude::*;

/// The same persistent state: digest and everything a client can see.
fn assert_same(live: &mut World, core: Core) {
    while live.core.has_work() {
        live.event(Event::Tick);
    }
    let settings = live.core.settings().clone();
    let mut other = World::with(settings);
    other.core = core;
    let mut budget = usize::MAX;
    other.core.free_doomed(&mut budget);
    assert_eq!(other.core.last_txid(), live.core.last_txid());
    let strip = |mut all: Vec<pb::FileStatus>| {
        for block in all.iter_mut().flat_map(|status| &mut status.blocks) {
            block.replicas.clear();
            block.others_may_hold = false;
        }
        all
    };
    assert_eq!(strip(other.walk()), strip(live.walk()));
    assert_eq!(other.core.digest(), live.core.digest());
    assert_eq!(other.core.leases.all().collect::<Vec<_>>(), live.core.leases.all().collect::<Vec<_>>());
    assert_eq!(other.core.tree.inodes.len(), live.core.tree.inodes.len());
    assert_eq!(other.core.blocks.table.len(), live.core.blocks.table.len());
}

fn load(settings: CoreSettings, txid: TxId, pages: &[Vec<u8>]) -> Core {
    let mut core = Core::new_for_load(settings);
    for page in pages.iter().rev() {
        core.load_page(page).unwrap();
    }
    core.finish_load(txid).unwrap();
    core
}

proptest! {
    #![proptest_config(config(48))]
    #[test]
    fn image_and_replay_are_the_live_state(
        before in proptest::collection::vec(plain(), 0..120),
        during in proptest::collection::vec((plain(), 0usize..4), 1..60),
        after in proptest::collection::vec(plain(), 0..30),
        cursor_budget in 1usize..40,
    ) {
        let mut driver = Driver::new(cursor_budget);
        driver.thorough = false;
        before.iter().for_each(|operation| driver.run(operation));
        let digest = driver.world.core.digest();
        let txid = driver.world.core.checkpoint_begin();
        let (mut pages, mut done) = (Vec::new(), false);
        for (operation, slices) in &during {
            driver.run(operation);
            for _ in 0..*slices {
                done = done || driver.world.core.checkpoint_slice(1, &mut pages);
            }
        }
        while !done {
            done = driver.world.core.checkpoint_slice(1, &mut pages);
        }
        after.iter().for_each(|operation| driver.run(operation));

        let world = &mut driver.world;
        let mut core = load(world.core.settings().clone(), txid, &pages);
        prop_assert_eq!(core.digest(), digest);
        for (at, edit) in world.log.iter().filter(|(at, _)| *at > txid) {
            core.replay(*at, edit.clone()).unwrap();
        }
        assert_same(world, core);

        let mut core = Core::new_for_load(world.core.settings().clone());
        for (at, edit) in &world.log {
            core.replay(*at, edit.clone()).unwrap();
        }
        assert_same(world, core);
    }
}

#[test]
fn a_damaged_image_is_refused() {
    let mut world = cluster();
    world.write("/a/f", 2, 2);
    world.create("/a/open", 1).unwrap();
    let txid = world.core.checkpoint_begin();
    let mut pages = Vec::new();
    while !world.core.checkpoint_slice(3, &mut pages) {}
    let try_load = |pages: &[Vec<u8>], txid: TxId| {
        let mut core = Core::new_for_load(settings());
        pages.iter().try_for_each(|page| core.load_page(page))?;
        core.finish_load(txid)
    };
    assert_eq!(try_load(&pages, txid), Ok(()));
    assert!(try_load(&pages, txid.next()).unwrap_err().to_string().contains("it is the state at transaction"));
    assert!(try_load(&pages[1..], txid).unwrap_err().to_string().contains("no header"));
    for missing in 1..pages.len() {
        let mut fewer = pages.clone();
        fewer.remove(missing);
        assert!(try_load(&fewer, txid).is_err(), "page {missing} is not missed");
        let mut twice = pages.clone();
        twice.push(pages[missing].clone());
        if pages[missing][0] != 5 {
            assert!(try_load(&twice, txid).is_err(), "page {missing} twice");
        }
    }
    // No altered byte may pass or panic.
    for (at, page) in pages.iter().enumerate() {
        for byte in 0..page.len() {
            let mut altered = pages.clone();
            altered[at][byte] ^= 0x11;
            assert!(try_load(&altered, txid).is_err(), "byte {byte} of page {at}");
        }
        assert!(Core::new_for_load(settings()).load_page(&page[..page.len() - 1]).is_err());
    }
}

#[test]
fn replay_names_the_transaction_and_the_cause() {
    let mut world = cluster();
    world.write("/f", 1, 1);
    world.delete("root", "/f", false).unwrap();
    let log = world.log.clone();
    let attempt = |edits: &[(TxId, pb::Edit)]| {
        let mut core = Core::new_for_load(settings());
        edits.iter().try_for_each(|(txid, edit)| core.replay(*txid, edit.clone()))
    };
    assert_eq!(attempt(&log), Ok(()));
    let mut gap = log.clone();
    gap.remove(4);
    let error = attempt(&gap).unwrap_err();
    assert_eq!(error.txid, TxId(6));
    assert!(error.to_string().starts_with("transaction 6 cannot be applied: it follows 4"), "{error}");
    // Leaving any edit out (and renumbering) must not go unnoticed where a later one needs it.
    let (last, delete) = log.last().unwrap().clone();
    let mut twice = log.clone();
    twice.push((last.next(), delete));
    assert!(attempt(&twice).unwrap_err().cause.contains("does not lie in"));
    let newer = pb::Edit { min_reader: 99, ..log[2].1.clone() };
    assert!(
        attempt(&[log[0].clone(), log[1].clone(), (TxId(3), newer)]).unwrap_err().cause.contains("layout version 99")
    );
    let unknown = pb::Edit { kind: None, ..log[2].1.clone() };
    assert!(attempt(&[log[0].clone(), log[1].clone(), (TxId(3), unknown)]).is_err());
    assert!(attempt(&[(TxId(1), log[2].1.clone())]).unwrap_err().cause.contains("before the cluster was formatted"));
}

#[test]
fn open_files_and_answers_survive_an_image() {
    let mut world = cluster();
    let call = pb::CallContext { client_id: vec![1; 16].into(), call_id: 1, ..Default::default() };
    let create = pb::CreateRequest {
        call: Some(call),
        path: "/f".into(),
        client_name: "writer".into(),
        replication: 2,
        ..Default::default()
    };
    let status = world.call::<pb::CreateResponse>("root", create.clone()).unwrap().status.unwrap();
    let block = world.add_block(status.inode, 0, &[]).unwrap().block.unwrap();
    let txid = world.core.checkpoint_begin();
    let mut pages = Vec::new();
    while !world.core.checkpoint_slice(100, &mut pages) {}
    let core = load(settings(), txid, &pages);
    world.restart_with(core);
    for at in 0..6 {
        world.node_up(&format!("n{at}"), &format!("/r{}", at / 2));
    }
    world.step(1);
    assert_eq!(world.call::<pb::CreateResponse>("root", create).unwrap().status, Some(status.clone()));
    let again = world.add_block(status.inode, 0, &[]).unwrap();
    assert_eq!(again.block, Some(block.clone()), "the writer goes on with its block");
    assert_eq!(again.replicas.len(), 2);
    let at = world.at(&again.replicas[0].node_id);
    world.hold(at, block.id as u64, (block.generation, 5, pb::ReplicaState::Finalized));
    let reply = world.complete(status.inode, &[(block.id as u64, block.generation, 5)]);
    assert!(world.answer(reply).unwrap().is_ok());
}

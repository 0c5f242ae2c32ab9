//! Reduces that start early never stand in the way of a map.

use super::tests::{failure, nodes, split, succeed, took};
use super::*;

fn early(splits: Vec<PlannedSplit>, reduces: u32, nodes: Vec<NodeInfo>) -> Scheduler {
    Scheduler::new(Rules { slow_start: 500, ..Rules::new("j", reduces) }, splits, nodes)
}

fn of(kind: TaskKind, started: &[Assignment]) -> Vec<Assignment> {
    started.iter().filter(|one| one.task.kind() == kind).cloned().collect()
}

fn fed(feeds: Vec<Feed>) -> Vec<(u32, Vec<(u32, u32)>)> {
    let inputs = |feed: Feed| feed.inputs.into_iter().map(|input| (input.map_index, input.attempt)).collect();
    feeds.into_iter().map(|feed| (feed.task.index, inputs(feed))).collect()
}

/// Tells of a kill as a node does when it is done.
fn killed(scheduler: &mut Scheduler, now_ms: u64) -> Vec<pb::TaskId> {
    let kills = scheduler.take_kills();
    for (node, id) in &kills {
        let dead = pb::TaskFailure { killed: true, ..failure("killed") };
        assert!(!scheduler.attempt_failed(node, id, &dead, now_ms), "nobody is blamed");
    }
    kills.into_iter().map(|(_, id)| id).collect()
}

#[test]
fn reduces_start_when_enough_maps_are_done_and_none_waits() {
    let splits = (0..6).map(|at| split(&[at % 2], 1)).collect();
    let mut scheduler = early(splits, 3, nodes(2, 1, 2));
    let first = scheduler.assign(0);
    assert_eq!(first.len(), 4);
    first[..2].iter().for_each(|map| succeed(&mut scheduler, map));
    let second = scheduler.assign(1);
    assert_eq!((second.len(), of(TaskKind::Reduce, &second).len()), (2, 0), "maps come first");
    succeed(&mut scheduler, &first[2]);
    // Half of the maps are done and no other waits: the slot is of use to a reduce alone.
    let reduces = scheduler.assign(2);
    assert_eq!(of(TaskKind::Reduce, &reduces).len(), 1, "{reduces:?}");
    assert_eq!(scheduler.map_outputs().len(), 3);
    assert!(scheduler.feeds(200).is_empty(), "what it was started with is known to it");
    succeed(&mut scheduler, &first[3]);
    assert_eq!(scheduler.assign(201).len(), 1, "the next slot");
    assert_eq!(fed(scheduler.feeds(301)), [(0, vec![(3, 0)])], "only what is new, to whom it is new");
    second.iter().for_each(|map| succeed(&mut scheduler, map));
    assert!(scheduler.maps_are_done());
    // All are done: it is told at once, and never again.
    assert_eq!(fed(scheduler.feeds(302)), [(0, vec![(4, 0), (5, 0)]), (1, vec![(4, 0), (5, 0)])]);
    assert!(scheduler.feeds(1_000).is_empty());
}

#[test]
fn without_an_early_start_reduces_come_after_all_maps() {
    let splits = vec![split(&[0], 1), split(&[0], 1)];
    let mut scheduler = Scheduler::new(Rules::new("j", 1), splits, nodes(1, 1, 4));
    let maps = scheduler.assign(0);
    succeed(&mut scheduler, &maps[0]);
    assert!(scheduler.assign(1).is_empty());
}

#[test]
fn a_reduce_that_could_not_be_told_is_told_everything_anew() {
    let splits = (0..4).map(|_| split(&[0], 1)).collect();
    let mut scheduler = early(splits, 1, nodes(1, 1, 4));
    let maps = scheduler.assign(0);
    maps[..2].iter().for_each(|map| succeed(&mut scheduler, map));
    let reduce = scheduler.assign(1).remove(0);
    succeed(&mut scheduler, &maps[2]);
    assert_eq!(scheduler.next_look_ms(1), Some(100), "the news have a time");
    assert_eq!(fed(scheduler.feeds(200)), [(0, vec![(2, 0)])]);
    scheduler.not_fed(&reduce.node, &reduce.task);
    assert_eq!(fed(scheduler.feeds(400)), [(0, vec![(0, 0), (1, 0), (2, 0)])]);
    succeed(&mut scheduler, &maps[3]);
    scheduler.feeds(401);
    scheduler.not_fed(&reduce.node, &reduce.task);
    assert_eq!(fed(scheduler.feeds(402))[0].1.len(), 4, "also the last time");
}

#[test]
fn a_failed_map_gets_the_slot_of_a_waiting_reduce() {
    let splits = (0..2).map(|_| split(&[0], 1)).collect();
    let mut scheduler = early(splits, 4, nodes(1, 1, 2));
    let maps = scheduler.assign(0);
    succeed(&mut scheduler, &maps[0]);
    let reduce = scheduler.assign(1).remove(0);
    scheduler.attempt_failed(&maps[1].node, &maps[1].task, &failure("boom"), 2);
    // While it waits for its time no other reduce takes the slot that it had.
    assert!(scheduler.assign(3).is_empty());
    let retried = scheduler.assign(1_000);
    assert_eq!(of(TaskKind::Map, &retried).len(), 1, "its own slot is still there");
    assert!(killed(&mut scheduler, 1_001).is_empty(), "nobody had to give way");
    // The next time the slot is taken.
    let lost = Error::new(ErrorCode::FileNotFound, "gone");
    scheduler.outputs_lost("n0", &lost, 1_002, |index, _| index == 0);
    assert!(scheduler.assign(1_003).is_empty());
    assert_eq!(scheduler.take_kills(), [("n0".to_owned(), reduce.task)]);
    assert!(scheduler.assign(1_004).is_empty() && scheduler.take_kills().is_empty(), "one slot for one map");
    let dead = pb::TaskFailure { killed: true, ..failure("killed") };
    scheduler.attempt_failed("n0", &reduce.task, &dead, 1_005);
    let again = scheduler.assign(1_006);
    assert_eq!(again.iter().map(|one| (one.task.kind(), one.task.index)).collect::<Vec<_>>(), [(TaskKind::Map, 0)]);
    assert_eq!(scheduler.attempts_failed().1, 0);
}

#[test]
fn a_map_that_may_not_run_where_a_slot_is_free_gets_one_elsewhere() {
    let mut scheduler = early(vec![split(&[0], 1), split(&[0, 1], 1)], 2, nodes(2, 1, 1));
    let maps = scheduler.assign(0);
    let done = maps.iter().find(|one| one.node == "n1").unwrap();
    let other = maps.iter().find(|one| one.node == "n0").unwrap();
    succeed(&mut scheduler, done);
    assert_eq!(of(TaskKind::Reduce, &scheduler.assign(1))[0].node, "n1");
    // It failed on the one node with a free slot, and the other one is held by who waits for it.
    scheduler.attempt_failed("n0", &other.task, &failure("bad disk"), 2);
    let mut started = Vec::new();
    for now in (3..3_000).step_by(50) {
        killed(&mut scheduler, now);
        started.extend(of(TaskKind::Map, &scheduler.assign(now)));
    }
    assert_eq!(started.iter().map(|one| one.node.as_str()).collect::<Vec<_>>(), ["n1"]);
}

#[test]
fn a_map_that_lags_gets_its_second_attempt_though_reduces_hold_all_slots() {
    let whole = |mut planned: PlannedSplit| {
        planned.split.length = 100;
        planned
    };
    let splits = (0..4).map(|at| whole(split(&[at], 1))).collect();
    let mut scheduler = early(splits, 8, nodes(4, 1, 1));
    let started = scheduler.assign(0);
    for one in &started[1..] {
        assert_eq!(scheduler.succeeded(&one.node, &one.task, took(1_000), 1_000), AfterSuccess::Done);
    }
    scheduler.progress(&started[0].node, &started[0].task, 10, 1_000);
    assert_eq!(of(TaskKind::Reduce, &scheduler.assign(1_001)).len(), 3, "all other slots");
    assert!(scheduler.assign(2_100).is_empty());
    assert_eq!(killed(&mut scheduler, 2_101).len(), 1);
    let second = scheduler.assign(2_102);
    assert_eq!((second.len(), second[0].task.index, second[0].task.attempt), (1, started[0].task.index, 1));
    assert_eq!(scheduler.succeeded(&second[0].node, &second[0].task, took(500), 2_600), AfterSuccess::Done);
    // What a reduce waited does not make it one that lags.
    for now in [2_601, 4_000] {
        assert!(scheduler.assign(now).iter().all(|one| one.task.kind() == TaskKind::Reduce && one.task.attempt <= 1));
    }
}

#[test]
fn a_driver_that_takes_over_tells_early_reduces_everything() {
    let rules = Rules { first_attempt: ATTEMPTS_PER_EPOCH, slow_start: 500, ..Rules::new("j", 1) };
    let splits = (0..2).map(|_| split(&[0], 1)).collect();
    let mut scheduler = Scheduler::new(rules, splits, nodes(1, 1, 2));
    let id = |kind: TaskKind, index| pb::TaskId { kind: kind as i32, index, attempt: 0 };
    let map = Some(id(TaskKind::Map, 0));
    scheduler.restore(&pb::TaskAccepted {
        task: map,
        node_id: "n0".into(),
        success: Some(took(5)),
        ..Default::default()
    });
    scheduler.registered("n0", &[id(TaskKind::Map, 0)], &[id(TaskKind::Reduce, 0), id(TaskKind::Map, 1)], 10);
    assert_eq!(fed(scheduler.feeds(200)), [(0, vec![(0, 0)])]);
    assert_eq!(scheduler.succeeded("n0", &id(TaskKind::Map, 1), took(9), 300), AfterSuccess::Done);
    assert_eq!(fed(scheduler.feeds(301)), [(0, vec![(1, 0)])]);
}

/// Random histories: whatever happens, the job ends.
#[test]
fn no_history_ends_in_a_deadlock() {
    for seed in 0..300_u64 {
        let mut state = seed * 2 + 1;
        let mut random = move |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        let (count, slots) = (1 + random(3) as usize, 1 + random(2) as u32);
        let splits = (0..1 + random(8)).map(|_| split(&[random(3) as usize], 1)).collect();
        let rules = Rules { slow_start: 100, max_attempts: 1_000, ..Rules::new("j", 1 + random(6) as u32) };
        let mut scheduler = Scheduler::new(rules, splits, nodes(count, 1, slots));
        let (mut running, mut now): (Vec<Assignment>, u64) = (Vec::new(), 0);
        while scheduler.standing() == Standing::Running {
            now += 1 + random(400);
            assert!(now < 3_000_000, "seed {seed}: {running:?}");
            running.extend(scheduler.assign(now));
            for id in killed(&mut scheduler, now) {
                running.retain(|one| one.task != id);
            }
            scheduler.feeds(now);
            // A reduce ends only when it was told of all outputs.
            let lacks = |id: &pb::TaskId| id.kind() == TaskKind::Reduce && scheduler.early.contains(&id.index);
            let ready: Vec<usize> = (0..running.len()).filter(|at| !lacks(&running[*at].task)).collect();
            if ready.is_empty() {
                continue;
            }
            let one = running.remove(ready[random(ready.len() as u64) as usize]);
            // Misfortune stops at some time.
            let ends_badly = now < 60_000 && random(3) == 0;
            if ends_badly {
                scheduler.attempt_failed(&one.node, &one.task, &failure("boom"), now);
            } else {
                succeed(&mut scheduler, &one);
            }
            if now < 60_000 && random(6) == 0 {
                let lost = Error::new(ErrorCode::FileNotFound, "gone");
                let chosen = random(8) as u32;
                scheduler.outputs_lost("n0", &lost, now, |index, _| index == chosen);
            }
        }
        assert_eq!(scheduler.standing(), Standing::AllDone, "seed {seed}");
    }
}

use super::*;

pub(super) fn nodes(count: usize, racks: usize, slots: u32) -> Vec<NodeInfo> {
    let node = |at: usize| NodeInfo {
        id: format!("n{at}"),
        host: format!("host{at}"),
        address: format!("127.0.0.1:{at}"),
        rack: format!("/r{}", at % racks),
        slots,
    };
    (0..count).map(node).collect()
}

pub(super) fn split(nodes: &[usize], racks: usize) -> PlannedSplit {
    PlannedSplit {
        split: pb::Split::default(),
        nodes: nodes.iter().map(|at| format!("n{at}")).collect(),
        racks: nodes.iter().map(|at| format!("/r{}", at % racks)).collect(),
    }
}

pub(super) fn failure(text: &str) -> pb::TaskFailure {
    let error = Error::new(ErrorCode::TaskFailed, text);
    pb::TaskFailure { error: Some(error.to_wire()), stderr_tail: "last words".into(), ..Default::default() }
}

pub(super) fn succeed(scheduler: &mut Scheduler, assignment: &Assignment) {
    if scheduler.succeeded(&assignment.node, &assignment.task, pb::TaskSuccess::default(), 0) == AfterSuccess::Commit {
        scheduler.committed(&assignment.task);
    }
}

#[test]
fn all_maps_are_local_when_they_can_be() {
    // Six nodes, two replicas, two slots: every map fits beside its block, if the picky ones go first.
    let splits: Vec<_> = (0..12).map(|at| split(&[at % 6, (at + 1) % 6], 3)).collect();
    let mut scheduler = Scheduler::new(Rules::new("j", 1), splits, nodes(6, 3, 2));
    let started = scheduler.assign(0);
    assert_eq!(started.len(), 12);
    assert!(started.iter().all(|one| one.locality == Some(Locality::Node)), "{started:?}");
}

#[test]
fn locality_is_given_up_step_by_step() {
    let splits = vec![split(&[0], 2), split(&[0], 2), split(&[0], 2)];
    let mut scheduler = Scheduler::new(Rules::new("j", 1), splits, nodes(4, 2, 1));
    let place = |started: Vec<Assignment>| started.into_iter().map(|one| (one.node, one.locality)).collect::<Vec<_>>();
    assert_eq!(place(scheduler.assign(0)), [("n0".into(), Some(Locality::Node))]);
    assert_eq!(place(scheduler.assign(RACK_DELAY_MS - 1)), []);
    assert_eq!(scheduler.next_look_ms(10), Some(RACK_DELAY_MS));
    assert_eq!(place(scheduler.assign(RACK_DELAY_MS)), [("n2".into(), Some(Locality::Rack))]);
    assert_eq!(place(scheduler.assign(ANY_DELAY_MS)), [("n1".into(), Some(Locality::Remote))]);
}

fn kept(inode: u64, offset: u64) -> pb::KeptContent {
    pb::KeptContent { inode, offset, length: 100 }
}

#[test]
fn maps_run_where_their_content_is_kept() {
    let of = |inode: u64, offset: u64| {
        let planned = split(&[0, 1], 1);
        PlannedSplit { split: pb::Split { inode, offset, length: 50, ..planned.split }, ..planned }
    };
    let splits = vec![of(7, 0), of(7, 50), of(8, 0), of(9, 0)];
    let mut scheduler = Scheduler::new(Rules::new("j", 1), splits, nodes(3, 1, 2));
    scheduler.keeps("n2", &[kept(7, 0)]);
    scheduler.keeps("n1", &[kept(8, 0), pb::KeptContent { inode: 9, offset: 0, length: 20 }]);
    let place = |started: Vec<Assignment>| {
        let mut places: Vec<_> = started.into_iter().map(|one| (one.task.index, one.node, one.locality)).collect();
        places.sort();
        places
    };
    let node = |index, name: &str| (index, name.to_owned(), Some(Locality::Node));
    let started = place(scheduler.assign(0));
    assert_eq!(started[..3], [node(0, "n2"), node(1, "n2"), node(2, "n1")], "of the last one only an edge is kept");
    assert_eq!(started.len(), 4);
}

#[test]
fn a_map_does_not_wait_for_long_where_its_content_is_kept() {
    let of = |inode: u64| {
        let planned = split(&[0, 1], 1);
        PlannedSplit { split: pb::Split { inode, length: 50, ..planned.split }, ..planned }
    };
    let mut scheduler = Scheduler::new(Rules::new("j", 1), (7..13).map(of).collect(), nodes(2, 1, 3));
    scheduler.keeps("n1", &(7..13).map(|inode| kept(inode, 0)).collect::<Vec<_>>());
    let places = |started: Vec<Assignment>| started.into_iter().map(|one| one.node).collect::<Vec<_>>();
    assert_eq!(places(scheduler.assign(0)), ["n1", "n1", "n1"]);
    assert!(scheduler.assign(RACK_DELAY_MS - 1).is_empty());
    assert_eq!(scheduler.next_look_ms(10), Some(RACK_DELAY_MS));
    assert_eq!(places(scheduler.assign(RACK_DELAY_MS)), ["n0", "n0", "n0"], "all of them, not one after the other");
    // A node that cannot be reached, or has no slot for the job, is not waited for.
    let mut scheduler = Scheduler::new(Rules::new("j", 1), vec![of(7), of(8)], nodes(2, 1, 2));
    scheduler.keeps("n1", &[kept(7, 0), kept(8, 0)]);
    let first = scheduler.assign(0).remove(0);
    scheduler.refused("n1", &first.task, 0);
    assert!(scheduler.assign(0).iter().any(|one| one.task.index == first.task.index && one.node == "n0"));
    let mut scheduler = Scheduler::new(Rules::new("j", 1), vec![of(7)], nodes(2, 1, 1));
    scheduler.keeps("n1", &[kept(7, 0)]);
    scheduler.node_lost("n1", &Error::new(ErrorCode::Unreachable, "gone"), 0);
    assert_eq!(scheduler.assign(0)[0].node, "n0");
}

#[test]
fn a_block_without_live_nodes_waits_for_nothing() {
    let mut scheduler = Scheduler::new(Rules::new("j", 1), vec![split(&[9], 1)], nodes(1, 1, 1));
    assert_eq!(scheduler.assign(0).len(), 1);
}

#[test]
fn reduces_start_when_all_maps_are_done_and_know_where_outputs_are() {
    let mut scheduler = Scheduler::new(Rules::new("j", 2), vec![split(&[0], 1), split(&[1], 1)], nodes(2, 1, 2));
    let maps = scheduler.assign(0);
    succeed(&mut scheduler, &maps[0]);
    assert!(scheduler.assign(1).is_empty());
    succeed(&mut scheduler, &maps[1]);
    let reduces = scheduler.assign(2);
    assert_eq!(reduces.len(), 2);
    assert_ne!(reduces[0].node, reduces[1].node, "they are spread");
    let held: Vec<_> = scheduler.map_outputs().into_iter().map(|place| (place.map_index, place.node_id)).collect();
    assert_eq!(held, [(0, "n0".to_owned()), (1, "n1".to_owned())]);
    reduces.iter().for_each(|reduce| succeed(&mut scheduler, reduce));
    assert_eq!(scheduler.standing(), Standing::AllDone);
}

#[test]
fn a_failed_task_goes_elsewhere_and_fails_the_job_in_the_end() {
    let mut scheduler = Scheduler::new(Rules::new("j", 1), vec![split(&[0], 1)], nodes(3, 1, 1));
    let (mut now, mut seen) = (0, Vec::new());
    while scheduler.standing() == Standing::Running {
        for started in scheduler.assign(now) {
            scheduler.attempt_failed(&started.node, &started.task, &failure("boom"), now);
            seen.push((started.node, started.task.attempt));
        }
        now += 100;
        assert!(now < 100_000);
    }
    assert_eq!(seen.len(), MAX_ATTEMPTS as usize);
    assert_eq!(seen.iter().map(|(_, attempt)| *attempt).collect::<Vec<_>>(), [0, 1, 2, 3]);
    let first: BTreeSet<_> = seen[..3].iter().map(|(node, _)| node).collect();
    assert_eq!(first.len(), 3, "each of the first three on another node: {seen:?}");
    let Standing::Failed(error) = scheduler.standing() else { panic!() };
    assert!(error.message().contains("map 0 failed 4 times, at last on host"), "{error}");
    assert!(error.message().contains("boom"), "{error}");
    assert_eq!((scheduler.stderr_tail(), scheduler.attempts_failed()), ("last words", (4, 0)));
}

#[test]
fn what_cannot_get_better_is_not_tried_again() {
    let mut scheduler = Scheduler::new(Rules::new("j", 1), vec![split(&[0], 1)], nodes(3, 1, 1));
    let started = scheduler.assign(0).remove(0);
    let error = Error::new(ErrorCode::InvalidArgument, "a line is too long").to_wire();
    let failure = pb::TaskFailure { error: Some(error), ..Default::default() };
    scheduler.attempt_failed(&started.node, &started.task, &failure, 1);
    assert!(matches!(scheduler.standing(), Standing::Failed(error) if error.message().contains("failed once")));
}

#[test]
fn a_lost_node_gives_back_its_work_and_its_outputs() {
    let splits = vec![split(&[0], 1), split(&[1], 1), split(&[1], 1)];
    let mut scheduler = Scheduler::new(Rules::new("j", 1), splits, nodes(2, 1, 2));
    let started = scheduler.assign(0);
    let on = |node: &str| started.iter().filter(|one| one.node == node).cloned().collect::<Vec<_>>();
    succeed(&mut scheduler, &on("n0")[0]);
    succeed(&mut scheduler, &on("n1")[0]);
    let gone = Error::new(ErrorCode::Unreachable, "gone");
    scheduler.node_lost("n1", &gone, 10);
    // Late news of the lost node changes nothing.
    assert_eq!(scheduler.succeeded("n1", &on("n1")[1].task, pb::TaskSuccess::default(), 11), AfterSuccess::Ignore);
    let again = scheduler.assign(11);
    assert_eq!(again.len(), 2, "{again:?}");
    assert!(again.iter().all(|one| one.node == "n0" && one.task.attempt == 1));
    again.iter().for_each(|one| succeed(&mut scheduler, one));
    let reduce = scheduler.assign(12).remove(0);
    assert_eq!(reduce.task.kind(), TaskKind::Reduce);
    assert!(scheduler.map_outputs().iter().all(|place| place.node_id == "n0"));
}

#[test]
fn a_reduce_that_cannot_fetch_has_the_map_run_again_and_is_not_blamed() {
    let mut scheduler = Scheduler::new(Rules::new("j", 1), vec![split(&[0], 1), split(&[0], 1)], nodes(2, 1, 2));
    let maps = scheduler.assign(0);
    maps.iter().for_each(|map| succeed(&mut scheduler, map));
    let reduce = scheduler.assign(1).remove(0);
    let mut lost = failure("cannot fetch");
    lost.lost.push(pb::MapOutputLocation { map_index: 1, attempt: 0, ..Default::default() });
    scheduler.attempt_failed(&reduce.node, &reduce.task, &lost, 2);
    let again = scheduler.assign(3);
    assert_eq!(again.len(), 1, "only the map: {again:?}");
    assert_eq!((again[0].task.kind(), again[0].task.index, again[0].task.attempt), (TaskKind::Map, 1, 1));
    succeed(&mut scheduler, &again[0]);
    let reduce = scheduler.assign(4).remove(0);
    assert_eq!((reduce.task.kind(), reduce.task.attempt), (TaskKind::Reduce, 1));
    succeed(&mut scheduler, &reduce);
    assert_eq!(scheduler.standing(), Standing::AllDone);
    assert_eq!(scheduler.attempts_failed(), (1, 0));
}

#[test]
fn a_busy_node_is_asked_again_and_nobody_is_blamed() {
    let mut scheduler = Scheduler::new(Rules::new("j", 1), vec![split(&[0], 1)], nodes(1, 1, 1));
    let started = scheduler.assign(0).remove(0);
    scheduler.refused("n0", &started.task, 0);
    assert!(scheduler.assign(1).is_empty());
    let at = scheduler.next_look_ms(1).unwrap();
    assert_eq!(scheduler.assign(at).len(), 1);
    assert_eq!(scheduler.attempts_failed(), (0, 0));
}

#[test]
fn a_node_that_keeps_failing_is_left_alone() {
    let splits = (0..8).map(|_| split(&[0, 1], 1)).collect();
    let mut scheduler = Scheduler::new(Rules::new("j", 1), splits, nodes(2, 1, 1));
    let mut bad = 0;
    for now in (0..4_000).step_by(20) {
        for started in scheduler.assign(now) {
            if started.node == "n0" {
                bad += 1;
                scheduler.attempt_failed("n0", &started.task, &failure("bad disk"), now);
            } else {
                succeed(&mut scheduler, &started);
            }
        }
    }
    assert_eq!(bad, 3);
    assert!(scheduler.maps_are_done());
}

#[test]
fn a_node_says_when_it_is_our_turn() {
    let mut scheduler = Scheduler::new(Rules::new("j", 0), vec![split(&[0], 1), split(&[0], 1)], nodes(1, 1, 2));
    let started = scheduler.assign(0);
    scheduler.refused("n0", &started[0].task, 0);
    scheduler.refused("n0", &started[1].task, 0);
    assert!(scheduler.assign(1).is_empty());
    scheduler.offered("n0", 1);
    let again = scheduler.assign(2);
    assert_eq!(again.len(), 2, "the second asks for one more slot: {again:?}");
    assert!(again.iter().all(|one| one.backlog == 0));
    scheduler.refused("n0", &again[1].task, 2);
    succeed(&mut scheduler, &again[0]);
    // The last one that waited is started elsewhere or done: nothing is wanted any more.
    scheduler.offered("n0", 1);
    let last = scheduler.assign(3).remove(0);
    scheduler.refused("n0", &last.task, 3);
    assert!(scheduler.withdrawals().is_empty(), "a task waits");
    scheduler.offered("n0", 1);
    let last = scheduler_take(&mut scheduler, 4);
    succeed(&mut scheduler, &last);
    assert_eq!(scheduler.standing(), Standing::AllDone);
}

#[test]
fn waiting_uses_up_no_numbers() {
    let mut scheduler = Scheduler::new(Rules::new("j", 0), vec![split(&[0], 1)], nodes(2, 1, 1));
    let mut now = 0;
    for _ in 0..2 * ATTEMPTS_PER_EPOCH {
        for started in scheduler.assign(now) {
            assert_eq!(started.task.attempt, 0);
            scheduler.refused(&started.node, &started.task, now);
        }
        now = scheduler.next_look_ms(now).unwrap();
    }
}

fn scheduler_take(scheduler: &mut Scheduler, now_ms: u64) -> Assignment {
    scheduler.assign(now_ms).remove(0)
}

#[test]
fn what_gave_way_to_another_job_is_not_blamed() {
    let mut scheduler = Scheduler::new(Rules::new("j", 0), vec![split(&[0], 1)], nodes(1, 1, 1));
    for round in 0..10 {
        let started = scheduler_take(&mut scheduler, round);
        let preempted = pb::TaskFailure { preempted: true, killed: true, ..failure("gave way") };
        assert!(!scheduler.attempt_failed("n0", &started.task, &preempted, round));
    }
    assert_eq!((scheduler.standing(), scheduler.attempts_failed()), (Standing::Running, (0, 0)));
}

pub(super) fn took(ms: u64) -> pb::TaskSuccess {
    pb::TaskSuccess { elapsed_ms: ms, ..Default::default() }
}

/// Four maps of which three are done in a second and one lags; returns the scheduler, the lagging attempt and the second one.
fn lagging() -> (Scheduler, Assignment, Assignment) {
    let whole = |mut planned: PlannedSplit| {
        planned.split.length = 100;
        planned
    };
    let splits = (0..4).map(|at| whole(split(&[at], 1))).collect();
    let mut scheduler = Scheduler::new(Rules::new("j", 1), splits, nodes(4, 1, 1));
    let mut started = scheduler.assign(0);
    let slow = started.remove(0);
    for one in &started {
        assert_eq!(scheduler.succeeded(&one.node, &one.task, took(1_000), 1_000), AfterSuccess::Done);
    }
    scheduler.progress(&slow.node, &slow.task, 10, 1_000);
    assert!(scheduler.assign(1_900).is_empty(), "too early to tell");
    let second = scheduler_take(&mut scheduler, 2_100);
    assert_eq!((second.task.index, second.task.attempt), (slow.task.index, 1));
    assert_ne!(second.node, slow.node);
    assert!(scheduler.assign(9_000).is_empty(), "one extra attempt, no more");
    (scheduler, slow, second)
}

#[test]
fn a_task_that_lags_gets_a_second_attempt_and_the_first_to_end_wins() {
    let (mut scheduler, slow, second) = lagging();
    assert_eq!(scheduler.succeeded(&second.node, &second.task, took(500), 2_600), AfterSuccess::Done);
    assert_eq!(scheduler.take_kills(), [(slow.node.clone(), slow.task)]);
    assert_eq!(scheduler.succeeded(&slow.node, &slow.task, took(9_000), 9_000), AfterSuccess::Ignore);
    let place = &scheduler.map_outputs()[slow.task.index as usize];
    assert_eq!((place.attempt, place.node_id.as_str()), (1, second.node.as_str()));
    assert_eq!(scheduler.attempts().count(), 4);
}

#[test]
fn one_of_two_attempts_may_fail() {
    let (mut scheduler, slow, second) = lagging();
    scheduler.attempt_failed(&second.node, &second.task, &failure("bad disk"), 2_200);
    assert!(scheduler.assign(2_201).iter().all(|one| one.task.kind() != TaskKind::Map || one.task.attempt == 2));
    assert_eq!(scheduler.succeeded(&slow.node, &slow.task, took(3_000), 3_000), AfterSuccess::Done);
    assert!(scheduler.maps_are_done());
}

#[test]
fn a_driver_that_takes_over_runs_nothing_twice() {
    let rules = Rules { first_attempt: ATTEMPTS_PER_EPOCH, ..Rules::new("j", 1) };
    let splits = (0..4).map(|at| split(&[at % 2], 1)).collect();
    let mut scheduler = Scheduler::new(rules, splits, nodes(2, 1, 4));
    let id = |index| pb::TaskId { kind: TaskKind::Map as i32, index, attempt: 0 };
    let accepted = |index: u32| pb::TaskAccepted {
        task: Some(id(index)),
        node_id: format!("n{}", index % 2),
        locality: 1,
        success: Some(took(5)),
        ..Default::default()
    };
    (0..2).for_each(|index| scheduler.restore(&accepted(index)));
    // Map 0 is still there, map 2 runs there; of map 1 the node has lost the output; map 3 ended while there was no driver.
    scheduler.registered("n0", &[id(0)], &[id(2)], 10);
    scheduler.registered("n1", &[id(3)], &[], 10);
    assert_eq!(scheduler.succeeded("n1", &id(3), took(7), 11), AfterSuccess::Done);
    let started = scheduler.assign(12);
    let names: Vec<_> = started.iter().map(|one| (one.task.index, one.task.attempt)).collect();
    assert_eq!(names, [(1, ATTEMPTS_PER_EPOCH)]);
    assert_eq!(scheduler.succeeded("n0", &id(2), took(9), 13), AfterSuccess::Done);
    succeed(&mut scheduler, &started[0]);
    assert!(scheduler.maps_are_done());
    let reduce = scheduler_take(&mut scheduler, 14);
    assert_eq!((reduce.task.kind(), reduce.task.attempt), (TaskKind::Reduce, ATTEMPTS_PER_EPOCH));
}

#[test]
fn a_map_whose_only_block_is_gone_fails_the_job_though_a_node_is_lost() {
    let mut scheduler = Scheduler::new(Rules::new("j", 1), vec![split(&[0], 1)], nodes(3, 1, 1));
    let (mut now, mut failures) = (0, 0);
    let why = Error::new(ErrorCode::Unreachable, "it does not answer");
    while scheduler.standing() == Standing::Running {
        for started in scheduler.assign(now) {
            if started.node == "n0" {
                scheduler.node_lost("n0", &why, now);
            } else {
                scheduler.attempt_failed(&started.node, &started.task, &failure("no replica could be read"), now);
                failures += 1;
            }
        }
        now += 100;
        assert!(now < 100_000, "it waits for a node that is gone, after {failures} failures on the others");
    }
    assert_eq!(failures, MAX_ATTEMPTS);
}

use cairn_client::fs::Block;

use super::*;

fn replica(host: &str, rack: &str, state: ReplicaState) -> Replica {
    Replica { host: host.into(), rack: rack.into(), state: state as i32, ..Default::default() }
}

fn file(replication: u32, replicas: Vec<Replica>) -> FileStatus {
    let block = Block { id: 7, generation: 1, ..Default::default() };
    let located = LocatedBlock { block: Some(block), length: 5, replicas, complete: true, ..Default::default() };
    FileStatus { path: "/a".into(), length: 5, replication, blocks: vec![located], ..Default::default() }
}

fn checked(file: &FileStatus) -> FsckJson {
    let mut found = FsckJson::default();
    check_file(file, 2, &mut found);
    assert_eq!((found.files, found.blocks), (1, 1));
    found
}

#[test]
fn replicas_are_counted_against_what_is_wanted() {
    use ReplicaState::{Finalized, ReplicaCorrupt, ReplicaStale};
    let (one, two) = (|s| replica("dn1", "/r1", s), |s| replica("dn2", "/r2", s));
    let good = checked(&file(2, vec![one(Finalized), two(ReplicaStale)]));
    assert!(good.problems.is_empty() && good.over_replicated == 0);
    assert_eq!(checked(&file(1, vec![one(Finalized), two(Finalized)])).over_replicated, 1);
    assert_eq!(checked(&file(3, vec![one(Finalized), two(Finalized)])).under_replicated, 1);
    assert_eq!(checked(&file(2, vec![one(Finalized), two(ReplicaCorrupt)])).under_replicated, 1);
    assert_eq!(checked(&file(2, vec![])).missing, 1);
    assert_eq!(checked(&file(2, vec![one(ReplicaCorrupt)])).corrupt, 1);
}

#[test]
fn one_rack_for_all_is_a_finding_only_where_there_is_another() {
    let both = vec![replica("dn1", "/r1", ReplicaState::Finalized), replica("dn3", "/r1", ReplicaState::Finalized)];
    assert_eq!(checked(&file(2, both.clone())).mis_replicated, 1);
    let mut found = FsckJson::default();
    check_file(&file(2, both), 1, &mut found);
    assert_eq!(found.mis_replicated, 0);
}

#[test]
fn blocks_of_a_writer_are_not_judged() {
    let mut open = file(3, vec![]);
    open.open = true;
    open.blocks[0].complete = false;
    let found = checked(&open);
    assert_eq!((found.missing, found.open_files), (0, 1));
}

//! What must hold inside the core after every event, whatever happened.

use std::collections::{BTreeMap, BTreeSet};

use super::super::*;
use crate::core::blocks::StorageIndex;
use crate::core::inode::Inode;
use crate::core::pages::Record as _;
use crate::core::tree::{DOOMED, ROOT};

/// All invariants of the core alone.
pub fn check(core: &Core) {
    check_tree(core);
    check_blocks(core);
    check_storages(core);
    check_digests(core);
    core.repair.check_sums();
    check_queues(core);
    core.retry.check_sums();
}

/// Every inode hangs on the root or on a tree that is being freed; directories hold exactly their children, sorted.
fn check_tree(core: &Core) {
    let tree = &core.tree;
    let mut children: BTreeMap<u64, BTreeSet<u64>> = BTreeMap::new();
    let mut directories = 0;
    let doomed: BTreeSet<u64> = core.cursors.doomed.iter().copied().collect();
    for (id, inode) in tree.inodes.iter_from(0) {
        directories += u64::from(inode.is_directory());
        assert!(id <= core.counters.inode, "inode {id} was never handed out");
        if id == ROOT {
            continue;
        }
        if inode.parent == DOOMED {
            assert!(doomed.contains(&id), "inode {id} is orphaned");
        } else if !doomed.contains(&id) {
            assert!(tree.get(inode.parent).is_some_and(Inode::is_directory), "inode {id} lies nowhere");
            children.entry(inode.parent).or_default().insert(id);
        }
        if inode.is_open() {
            assert!(inode.parent == DOOMED || core.leases.holder_of(id).is_some(), "open file {id} has no lease");
        }
    }
    assert_eq!(tree.directories, directories);
    for (id, inode) in tree.inodes.iter_from(0).filter(|(_, inode)| inode.is_directory()) {
        let listed: Vec<u64> = tree.children_after(id, b"").1.collect();
        let names: Vec<&str> = listed.iter().filter_map(|id| tree.get(*id)).map(|inode| &*inode.name).collect();
        assert!(names.windows(2).all(|pair| pair[0] < pair[1]), "directory {id} is not sorted: {names:?}");
        assert_eq!(inode.child_count(), listed.len());
        let listed: BTreeSet<u64> = listed.into_iter().collect();
        assert_eq!(listed, children.remove(&id).unwrap_or_default(), "children of {id}");
    }
    for (file, holder) in core.leases.all() {
        assert!(tree.get(file).is_some_and(Inode::is_open), "{holder} has a lease of {file}, which is not open");
    }
}

/// Every block belongs to one place of one file; the side maps name only blocks that are in that state.
fn check_blocks(core: &Core) {
    let blocks = &core.blocks;
    let mut listed = 0;
    for (file, inode) in core.tree.inodes.iter_from(0) {
        let ids = inode.blocks();
        listed += ids.len() as u64;
        assert!(inode.is_unordered() || ids.is_sorted_by(|a, b| a < b), "blocks of {file}: {ids:?}");
        for id in ids {
            assert_eq!(blocks.get(*id).map(|block| block.inode), Some(file), "block {id}");
        }
        let open = ids.iter().filter(|id| blocks.open.contains_key(*id)).count();
        assert!(open == 0 || inode.is_open(), "closed file {file} has open blocks");
    }
    assert_eq!(listed, blocks.table.len(), "blocks of no file");
    let (mut complete, mut safe) = (0, 0);
    let mut open = Vec::new();
    for (id, block) in blocks.table.iter_from(0) {
        assert!(id <= core.counters.block && block.generation <= core.counters.generation, "block {id}");
        let replicas = block.replicas.as_slice();
        if block.length().is_none() {
            open.push(id);
            assert!(replicas.is_empty(), "block {id} counts replicas before its length is known");
            continue;
        }
        complete += 1;
        safe += u64::from(replicas.len() >= core.settings.min_replication as usize);
        let bad: Vec<StorageIndex> = blocks.bad.get(&id).into_iter().flatten().map(|bad| bad.storage).collect();
        assert!(!replicas.iter().any(|at| bad.contains(at)), "block {id} is good and bad on one storage");
    }
    assert_eq!((core.repair.complete, core.repair.safe), (complete, safe));
    assert_eq!(blocks.open.keys().copied().collect::<Vec<_>>(), open);
    assert!(blocks.bad.iter().all(|(id, list)| blocks.get(*id).is_some() && !list.is_empty()));
    for (id, storages) in &blocks.excess {
        let replicas = blocks.get(*id).map_or(&[][..], |block| block.replicas.as_slice());
        assert!(!storages.is_empty() && storages.iter().all(|at| replicas.contains(at)), "block {id}");
    }
}

/// The set of a storage holds exactly the blocks of which something is known there.
fn check_storages(core: &Core) {
    let mut known: BTreeMap<StorageIndex, BTreeSet<u64>> = BTreeMap::new();
    for (id, _) in core.blocks.table.iter_from(0) {
        for storage in core.blocks.storages_of(id) {
            known.entry(storage).or_default().insert(id);
        }
    }
    for (index, storage) in core.nodes.storages.iter().enumerate() {
        let held: BTreeSet<u64> = storage.blocks.range(0, u64::MAX, usize::MAX).into_iter().collect();
        assert_eq!(held, known.remove(&(index as StorageIndex)).unwrap_or_default(), "storage {}", storage.id);
        assert_eq!(storage.blocks.len(), held.len() as u64);
    }
}

fn check_digests(core: &Core) {
    let inodes = core.tree.inodes.iter_from(0).fold(0u64, |sum, (id, inode)| sum.wrapping_add(inode.hash(id)));
    assert_eq!(core.tree.inodes.digest(), inodes);
    let blocks = core.blocks.table.iter_from(0).fold(0u64, |sum, (id, block)| sum.wrapping_add(block.hash(id)));
    assert_eq!(core.blocks.table.digest(), blocks);
}

/// Once assessed, each block of a file is in the queue that fits its replicas.
fn check_queues(core: &Core) {
    if !core.repair.settled() || core.has_work() {
        return;
    }
    for (id, block) in core.blocks.table.iter_from(0).filter(|(_, block)| block.length().is_some()) {
        let Some(target) = core.target_of(id) else { continue };
        let live = core.count_live(id, &block.replicas);
        let place = core.repair.place_of(id);
        let state = format!("block {id} has {live} of {target} replicas: {place:?}");
        assert_eq!(place.missing, live == 0, "{state}");
        assert_eq!(place.too_few, live > 0 && live < target, "{state}");
        let reachable = target.min(core.nodes.usable());
        if live > 0 && live + place.pending < reachable {
            assert!(place.queued || place.deferred, "nobody looks after {state}");
        }
        if live > target && !place.mis_replicated {
            assert!(place.to_trim || place.deferred, "nobody trims {state}");
        }
    }
}

/// What the core knows of the replicas on nodes that are up and have reported is what they hold.
pub fn check_reports(world: &World) {
    let core = &world.core;
    for fake in &world.nodes {
        let Some(node) = core.nodes.find(&fake.id).map(|index| core.nodes.node(index)) else { continue };
        let talks = fake.up && node.alive && node.reported && node.registration == fake.registration;
        if !talks || node.stream != Some(StreamId(fake.stream)) {
            continue;
        }
        let storage = core.nodes.find_storage(&format!("{}-s", fake.id)).unwrap();
        for (id, block) in core.blocks.table.iter_from(0) {
            let Some(length) = block.length() else { continue };
            let whole = fake.held.get(&id) == Some(&(block.generation, length, pb::ReplicaState::Finalized));
            assert_eq!(block.replicas.contains(storage), whole, "block {id} on {}", fake.id);
        }
    }
}

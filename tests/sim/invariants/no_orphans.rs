//! No replica lies on a disk that no file needs, and none is open when no file is: deletions free the disks in the end.

use std::collections::{BTreeMap, BTreeSet};

use super::replicas::OnDisk;
use crate::inspect::Found;

/// What does not hold.
pub fn check(found: &BTreeMap<String, Found>, disks: &[OnDisk]) -> Vec<String> {
    let blocks = found.values().flat_map(|file| &file.blocks).filter_map(|block| block.block.as_ref());
    let needed: BTreeSet<(i64, u64)> = blocks.map(|block| (block.id, block.generation)).collect();
    let orphan = |one: &&OnDisk| !one.finalized || !needed.contains(&(one.id, one.generation));
    disks
        .iter()
        .filter(orphan)
        .map(|one| format!("{} holds {} for no file", one.host.name(), one.path.display()))
        .collect()
}

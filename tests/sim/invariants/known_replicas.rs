//! The namenode forgets nothing: every good replica of a file's block that lies on a datanode's disk is one that it names.

use std::collections::BTreeMap;

use super::replicas::OnDisk;
use crate::inspect::Found;

/// What does not hold.
pub fn check(found: &BTreeMap<String, Found>, disks: &[OnDisk]) -> Vec<String> {
    let mut wrong = Vec::new();
    for (path, file) in found {
        for block in &file.blocks {
            let Some(id) = &block.block else { continue };
            let key = (id.id, id.generation, block.length);
            let forgotten = disks.iter().filter(|one| {
                let named = || block.replicas.iter().any(|replica| replica.host == one.host.name());
                one.finalized && one.is_sound && one.key() == key && !named()
            });
            wrong.extend(forgotten.map(|one| format!("{path}: {key:?} lies on {} and is forgotten", one.host.name())));
        }
    }
    wrong
}

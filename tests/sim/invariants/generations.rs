//! Only the newest generation of a block counts: every replica that the namenode names lies on that node's disk under the block's own
//! generation and length, and verifies.

use std::collections::BTreeMap;

use super::replicas::OnDisk;
use crate::inspect::Found;

/// What does not hold.
pub fn check(found: &BTreeMap<String, Found>, disks: &[OnDisk]) -> Vec<String> {
    let mut wrong = Vec::new();
    for (path, file) in found {
        for block in &file.blocks {
            let Some(id) = &block.block else { continue };
            for replica in &block.replicas {
                let key = (id.id, id.generation, block.length);
                let there = |one: &&OnDisk| one.host.name() == replica.host && one.finalized && one.key() == key;
                match disks.iter().find(there) {
                    None => wrong.push(format!("{path}: {key:?} is not on {}", replica.host)),
                    Some(one) if !one.is_sound => wrong.push(format!("{path}: {key:?} on {} is damaged", replica.host)),
                    Some(_) => {}
                }
            }
        }
    }
    wrong
}

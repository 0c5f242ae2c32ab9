//! A block that a file still has never lost its last replica to a deletion. There are two ways to get there: the namenode counted what it
//! should not have (`last_replica`), or it had a replica deleted for a change that a crash then took back (`orders_outlive_crashes`: the client
//! that asked for the change never got an answer, and the file is there as before).

use std::collections::BTreeMap;

use super::replicas;
use crate::cluster::Cluster;
use crate::deletions;
use crate::inspect::Found;
use crate::oracle::{Known, Model};
use crate::trace::violated;

/// Looks for blocks of `found` that are on no disk any more because a datanode deleted them.
pub fn check(models: &[&Model], found: &BTreeMap<String, Found>, cluster: &Cluster) {
    let deleted = deletions::of_last_replicas();
    let mut suspects = Vec::new();
    for (path, file) in found {
        for block in file.blocks.iter().filter_map(|block| block.block.as_ref()) {
            let last = deleted.iter().rfind(|one| (one.id, one.generation) == (block.id, block.generation));
            suspects.extend(last.map(|last| (path, last)));
        }
    }
    if suspects.is_empty() {
        return;
    }
    let disks = replicas::on_disks(cluster);
    let lost = |last: &deletions::Deletion| {
        !disks.iter().any(|one| one.finalized && (one.id, one.generation) == (last.id, last.generation))
    };
    for (path, last) in suspects.into_iter().filter(|(_, last)| lost(last)) {
        let unanswered = models.iter().any(|model| matches!(model.files.get(path), Some(Known::Unsure(_))));
        let (invariant, why) = match unanswered {
            true => ("orders_outlive_crashes", "for a change that nobody was told of and that the log does not have"),
            false => ("last_replica", "though the file has it"),
        };
        let text = format!("{path}: {} deleted the last replica of block {} at {} ms", last.host, last.id, last.at_ms);
        violated(invariant, format!("{text}, {why}"));
    }
}

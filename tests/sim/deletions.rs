//! What datanodes take off their disks: which deletion was that of a block's last replica.
//!
//! Disks are watched from outside: what a process answers to the namenode, or thinks of its disk, plays no part.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use cairn_common::simdisk::SimDisk;
use cairn_proto::blockfile;

use super::trace::{note, now_ms};

/// A finalized replica that was deleted when no other disk held one of the same generation and length.
#[derive(Clone, Debug)]
pub struct Deletion {
    /// Host.
    pub host: String,
    /// Block.
    pub id: i64,
    /// Generation.
    pub generation: u64,
    /// Virtual ms.
    pub at_ms: u64,
}

/// A replica is read before it may stay alone. If it rots a moment later, while the others are on their way out, nobody can do anything about
/// that. The time from its reading to their removal, at most.
const AFTER_THE_LAST_LOOK_MS: u64 = 1_000;

/// Bits of a replica that were flipped.
#[derive(Default)]
struct Damage {
    /// Offset and bits.
    flips: Vec<(u64, u8)>,
    /// When its node had read from it last before.
    read_ms: Option<u64>,
    /// Its node has read such a bit since.
    is_seen: bool,
}

#[derive(Default)]
struct Watch {
    disks: Vec<(String, SimDisk)>,
    damaged: BTreeMap<(String, PathBuf), Damage>,
    /// When a node read from a finalized replica last.
    read: BTreeMap<(String, PathBuf), u64>,
    last: Vec<Deletion>,
}

thread_local! {
    static WATCH: RefCell<Watch> = RefCell::default();
}

/// This disk belongs to a datanode.
pub fn watch(host: &str, disk: &SimDisk) {
    WATCH.with_borrow_mut(|watch| watch.disks.push((host.to_owned(), disk.clone())));
}

/// Bits of this file were flipped: it is no replica any more that could be lost, or stand in for another.
pub fn damaged(host: &str, path: &Path, offset: u64, bits: u8) {
    WATCH.with_borrow_mut(|watch| {
        let key = (host.to_owned(), path.to_owned());
        let read_ms = watch.read.get(&key).copied();
        let damage = watch.damaged.entry(key).or_insert_with(|| Damage { read_ms, ..Damage::default() });
        damage.flips.push((offset, bits));
    });
}

/// A process read these bytes of a file.
pub fn read(host: &str, path: &Path, bytes: Range<u64>) {
    if !is_final(path) {
        return;
    }
    WATCH.with_borrow_mut(|watch| {
        let key = (host.to_owned(), path.to_owned());
        if let Some(damage) = watch.damaged.get_mut(&key) {
            damage.is_seen |= damage.flips.iter().any(|(offset, _)| bytes.contains(offset));
        }
        watch.read.insert(key, now_ms());
    });
}

fn is_final(path: &Path) -> bool {
    path.components().any(|part| part.as_os_str() == "finalized")
}

/// A process removed a file, or put it away (`to`).
pub fn removed(host: &str, path: &Path, to: Option<&Path>) {
    if !is_final(path) || to.is_some_and(is_final) {
        return;
    }
    let name = path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
    let Some((id, generation, Some(_))) = blockfile::parse_name(&name) else { return };
    WATCH.with_borrow_mut(|watch| {
        let good = |host: &str| !watch.damaged.contains_key(&(host.to_owned(), path.to_owned()));
        // All datanodes have the same folders, so a replica of the same block lies under the same path.
        let holds = |(other, disk): &(String, SimDisk)| other != host && good(other) && disk.has(path);
        if !watch.disks.iter().any(|(other, _)| other == host) || !good(host) || watch.disks.iter().any(holds) {
            return;
        }
        if watch.take_back_damage(path) {
            return;
        }
        note(host, format!("takes the last replica of block {} off its disk", id.0));
        let (host, generation) = (host.to_owned(), generation.0);
        watch.last.push(Deletion { host, id: id.0, generation, at_ms: now_ms() });
    });
}

impl Watch {
    /// A replica under this path that has rotted since its node read it has not, after all. `false`: there is none.
    fn take_back_damage(&mut self, path: &Path) -> bool {
        for (host, disk) in &self.disks {
            let key = (host.clone(), path.to_owned());
            let in_time = |read_ms: u64| read_ms + AFTER_THE_LAST_LOOK_MS >= now_ms();
            let is_late = |damage: &Damage| !damage.is_seen && damage.read_ms.is_some_and(in_time);
            if disk.has(path) && self.damaged.get(&key).is_some_and(is_late) {
                let flips = self.damaged.remove(&key).unwrap_or_default().flips;
                for (offset, bits) in flips {
                    disk.flip(path, offset, bits);
                }
                note(host, format!("the flips of {} are taken back: it was to stay alone by then", path.display()));
                return true;
            }
        }
        false
    }
}

/// Deletions of last replicas so far.
pub fn of_last_replicas() -> Vec<Deletion> {
    WATCH.with_borrow(|watch| watch.last.clone())
}

//! Leases: one writer a file.
//!
//! A holder keeps all its leases alive with one call. After the soft limit another writer may take a file over; after the
//! hard limit the namenode closes it with the blocks that were reported whole.

use std::collections::{BTreeMap, BTreeSet};

use cairn_proto::pb;

use super::Core;
use super::codec::FixedMap;
use super::recovery::RECOVERY_HOLDER;

#[derive(Default)]
struct Holder {
    renewed_ms: u64,
    files: BTreeSet<u64>,
}

/// Who writes what.
#[derive(Default)]
pub struct Leases {
    files: FixedMap<u64, Box<str>>,
    holders: BTreeMap<Box<str>, Holder>,
}

impl Leases {
    /// The holder gets the lease of a file, from whoever had it.
    pub fn grant(&mut self, file: u64, holder: &str, now_ms: u64) {
        self.release(file);
        self.files.insert(file, holder.into());
        let entry = self.holders.entry(holder.into()).or_default();
        entry.files.insert(file);
        entry.renewed_ms = now_ms;
    }

    /// The file is no longer open.
    pub fn release(&mut self, file: u64) {
        let Some(holder) = self.files.remove(&file) else { return };
        if let Some(entry) = self.holders.get_mut(&holder) {
            entry.files.remove(&file);
            if entry.files.is_empty() {
                self.holders.remove(&holder);
            }
        }
        if self.files.is_empty() && self.files.capacity() > 100_000 {
            self.files.shrink_to_fit();
        }
    }

    /// Who has the lease of a file.
    pub fn holder_of(&self, file: u64) -> Option<&str> {
        self.files.get(&file).map(|holder| &**holder)
    }

    /// A sign of life of a holder.
    pub fn renew(&mut self, holder: &str, now_ms: u64) {
        if let Some(entry) = self.holders.get_mut(holder) {
            entry.renewed_ms = now_ms;
        }
    }

    /// All leases start anew.
    pub fn renew_all(&mut self, now_ms: u64) {
        self.holders.values_mut().for_each(|holder| holder.renewed_ms = now_ms);
    }

    /// Whether the lease of a file is older than this.
    pub fn is_older(&self, file: u64, limit_ms: u64, now_ms: u64) -> bool {
        let holder = self.files.get(&file).and_then(|holder| self.holders.get(holder));
        holder.is_none_or(|holder| holder.renewed_ms + limit_ms < now_ms)
    }

    /// Files that `wanted` picks and whose holders, the namenode aside, were not heard for this long, at most `most`.
    pub fn older_than(&self, limit_ms: u64, now_ms: u64, most: usize, wanted: impl Fn(&u64) -> bool) -> Vec<u64> {
        let old = self.holders.iter().filter(|(_, holder)| holder.renewed_ms + limit_ms < now_ms);
        let writers = old.filter(|(name, _)| ***name != *RECOVERY_HOLDER);
        writers.flat_map(|(_, holder)| &holder.files).copied().filter(wanted).take(most).collect()
    }

    /// Files of one holder, in order, from this one on.
    pub fn files_of(&self, holder: &str, first: u64) -> impl Iterator<Item = u64> {
        self.holders.get(holder).into_iter().flat_map(move |holder| holder.files.range(first..)).copied()
    }

    /// All leases in order of file.
    pub fn all(&self) -> Vec<(u64, &str)> {
        let mut all: Vec<(u64, &str)> = self.files.iter().map(|(file, holder)| (*file, &**holder)).collect();
        all.sort_unstable();
        all
    }
}

impl Core {
    pub(super) fn renew_lease(&mut self, request: &pb::RenewLeaseRequest) -> pb::RenewLeaseResponse {
        self.leases.renew(&request.client_name, self.now_ms);
        pb::RenewLeaseResponse {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_has_one_holder() {
        let mut leases = Leases::default();
        leases.grant(1, "a", 10);
        leases.grant(2, "a", 10);
        leases.grant(1, "b", 20);
        assert_eq!((leases.holder_of(1), leases.holder_of(2)), (Some("b"), Some("a")));
        assert_eq!(leases.older_than(5, 20, 9, |_| true), [2]);
        assert!(leases.older_than(5, 20, 9, |file| *file != 2).is_empty());
        leases.renew("a", 19);
        assert!(leases.older_than(5, 20, 9, |_| true).is_empty());
        assert!(leases.is_older(2, 5, 25) && !leases.is_older(1, 5, 25));
        leases.release(2);
        assert_eq!(leases.all(), [(1, "b")]);
        assert_eq!(leases.holders.len(), 1);
    }
}

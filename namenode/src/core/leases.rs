//! Leases: one writer a file.
//!
//! A lease belongs to a holder (the name of a client) and to the user who took it: both must call. A holder keeps all its leases alive with one call. After the soft limit another writer may take a file over; after the
//! hard limit the namenode closes it with the blocks that were reported whole.

use std::collections::{BTreeMap, BTreeSet};

use cairn_proto::pb;

use super::Core;
use super::codec::{hash_bytes, mix, put, put_bytes};
use super::permissions::Who;
use super::recovery::RECOVERY_HOLDER;

/// The lease of a file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Lease {
    /// Name of the client that has it.
    pub holder: Box<str>,
    /// Who took it; empty: not known (an older log), or the namenode itself.
    pub user: Box<str>,
    /// Blocks that the file had then: those behind them are this writer's.
    pub first_block: u32,
}

impl Lease {
    /// A lease that the namenode takes over from a writer.
    pub fn of_recovery() -> Self {
        Self { holder: RECOVERY_HOLDER.into(), user: "".into(), first_block: 0 }
    }

    fn hash(&self, file: u64) -> u64 {
        let state = hash_bytes(mix(file, 3), self.holder.as_bytes());
        if self.is_plain() { state } else { hash_bytes(mix(state, self.first_block.into()), self.user.as_bytes()) }
    }

    /// Nothing is known but the holder, as in older images, whose digests must still fit.
    fn is_plain(&self) -> bool {
        self.user.is_empty() && self.first_block == 0
    }
}

#[derive(Default)]
struct Holder {
    renewed_ms: u64,
    files: BTreeSet<u64>,
}

/// Copies the leases as they were when it began, page by page.
struct LeaseCopy {
    /// Files below this one are copied.
    next: u64,
    /// Who had the lease, of files that changed before it was their turn.
    before: BTreeMap<u64, Option<Lease>>,
}

/// Who writes what.
#[derive(Default)]
pub struct Leases {
    files: BTreeMap<u64, Lease>,
    holders: BTreeMap<Box<str>, Holder>,
    /// Sum of the hashes of all leases.
    digest: u64,
    copy: Option<LeaseCopy>,
}

impl Leases {
    /// Does not depend on order.
    pub fn digest(&self) -> u64 {
        self.digest
    }

    /// An image that is under way needs the lease of this file as it is.
    fn preserve(&mut self, file: u64) {
        if let Some(copy) = self.copy.as_mut().filter(|copy| file >= copy.next) {
            copy.before.entry(file).or_insert_with(|| self.files.get(&file).cloned());
        }
    }

    /// Begins a copy of the leases as they are now.
    pub fn begin_copy(&mut self) {
        self.copy = Some(LeaseCopy { next: 0, before: BTreeMap::new() });
    }

    /// Gives a copy up.
    pub fn abort_copy(&mut self) {
        self.copy = None;
    }

    /// At most `most` leases more: how many, and each with its file, encoded. `None`: all are copied.
    pub fn copy_some(&mut self, most: usize) -> Option<(usize, Vec<u8>)> {
        let copy = self.copy.as_mut()?;
        let (mut count, mut taken, mut out) = (0, 0, Vec::new());
        while count < most {
            // What a changed one is now does not count, so it wins over itself.
            let (file, lease) = match (self.files.range(copy.next..).next(), copy.before.first_key_value()) {
                (None, None) => break,
                (Some((file, lease)), None) => (*file, Some(lease)),
                (Some((file, lease)), Some((other, _))) if file < other => (*file, Some(lease)),
                (_, Some((file, lease))) => (*file, lease.as_ref()),
            };
            if let Some(lease) = lease {
                put(&mut out, file);
                put_bytes(&mut out, lease.holder.as_bytes());
                put_bytes(&mut out, lease.user.as_bytes());
                put(&mut out, lease.first_block.into());
            }
            // Those that had no lease count too: a turn must end.
            count += 1;
            taken += usize::from(lease.is_some());
            copy.before.remove(&file);
            copy.next = file + 1;
        }
        if count < most {
            self.copy = None;
        }
        if count == 0 { None } else { Some((taken, out)) }
    }

    /// The lease of a file goes to another holder, from whoever had it.
    pub fn grant(&mut self, file: u64, lease: Lease, now_ms: u64) {
        self.release(file);
        self.preserve(file);
        self.digest = self.digest.wrapping_add(lease.hash(file));
        let entry = self.holders.entry(lease.holder.clone()).or_default();
        entry.files.insert(file);
        entry.renewed_ms = now_ms;
        self.files.insert(file, lease);
    }

    /// The file is no longer open.
    pub fn release(&mut self, file: u64) {
        self.preserve(file);
        let Some(lease) = self.files.remove(&file) else { return };
        self.digest = self.digest.wrapping_sub(lease.hash(file));
        if let Some(entry) = self.holders.get_mut(&lease.holder) {
            entry.files.remove(&file);
            if entry.files.is_empty() {
                self.holders.remove(&lease.holder);
            }
        }
    }

    /// Who has the lease of a file.
    pub fn holder_of(&self, file: u64) -> Option<&str> {
        self.files.get(&file).map(|lease| &*lease.holder)
    }

    /// The lease of a file.
    pub fn get(&self, file: u64) -> Option<&Lease> {
        self.files.get(&file)
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
        let holder = self.files.get(&file).and_then(|lease| self.holders.get(&lease.holder));
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
    pub fn all(&self) -> impl Iterator<Item = (u64, &str)> {
        self.files.iter().map(|(file, lease)| (*file, &*lease.holder))
    }

    /// Whether some lease of a holder is this user's, as far as that is known.
    fn is_of(&self, holder: &str, user: &str) -> bool {
        let mut leases = self.files_of(holder, 0).filter_map(|file| self.files.get(&file));
        leases.next().is_some_and(|lease| lease.user.is_empty() || *lease.user == *user)
    }
}

impl Core {
    pub(super) fn renew_lease(&mut self, who: &Who<'_>, request: &pb::RenewLeaseRequest) -> pb::RenewLeaseResponse {
        // Nobody keeps the files of somebody else's dead writer open. All leases of a client are its user's.
        if who.superuser || self.leases.is_of(&request.client_name, &who.caller.user) {
            self.leases.renew(&request.client_name, self.now_ms);
        }
        pb::RenewLeaseResponse {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::codec::{Random, Reader};

    fn lease(holder: &str) -> Lease {
        Lease { holder: holder.into(), user: "ann".into(), first_block: 2 }
    }

    #[test]
    fn a_lease_has_one_holder() {
        let mut leases = Leases::default();
        leases.grant(1, lease("a"), 10);
        leases.grant(2, lease("a"), 10);
        leases.grant(1, lease("b"), 20);
        assert_eq!((leases.holder_of(1), leases.holder_of(2)), (Some("b"), Some("a")));
        assert_eq!(leases.older_than(5, 20, 9, |_| true), [2]);
        assert!(leases.older_than(5, 20, 9, |file| *file != 2).is_empty());
        leases.renew("a", 19);
        assert!(leases.older_than(5, 20, 9, |_| true).is_empty());
        assert!(leases.is_older(2, 5, 25) && !leases.is_older(1, 5, 25));
        leases.release(2);
        assert_eq!(leases.all().collect::<Vec<_>>(), [(1, "b")]);
        assert_eq!((leases.holders.len(), leases.digest()), (1, lease("b").hash(1)));
    }

    #[test]
    fn a_copy_is_the_state_at_its_beginning() {
        let mut leases = Leases::default();
        for file in 0..200 {
            leases.grant(file * 3, lease(if file % 2 == 0 { "even" } else { "odd" }), 0);
        }
        let expected: Vec<(u64, String)> = leases.all().map(|(file, holder)| (file, holder.to_owned())).collect();
        leases.begin_copy();
        let (mut found, mut random) = (Vec::new(), Random::new(5));
        while let Some((count, page)) = leases.copy_some(7) {
            let mut reader = Reader::new(&page);
            for _ in 0..count {
                found.push((reader.number().unwrap(), reader.text().unwrap().to_owned()));
                assert_eq!((reader.text().unwrap(), reader.number().unwrap()), ("ann", 2));
            }
            assert!(reader.is_empty());
            for _ in 0..9 {
                let file = random.below(700);
                if random.below(2) == 0 { leases.release(file) } else { leases.grant(file, lease("new"), 1) }
            }
        }
        assert_eq!(found, expected);
        let sum = leases.all().fold(0u64, |sum, (file, holder)| sum.wrapping_add(lease(holder).hash(file)));
        assert_eq!(leases.digest(), sum);
    }
}

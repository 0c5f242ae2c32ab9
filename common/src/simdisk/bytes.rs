//! The bytes of a simulated file: what was written, what is durable, and what a power cut may leave of the difference.
//!
//! # Crash
//! A disk writes a sector as a whole or not at all, in any order; the cache above it holds the newest bytes of a sector, so what reaches the disk
//! is the sector as it was after *some* of the changes, never a later change without an earlier one of the same sector. The length is
//! metadata: it follows the changes in their order, but independently of the bytes. So after a crash a file may be shorter than what
//! survived of its bytes, or longer (zeros where bytes did not survive), or have holes.

use std::collections::BTreeMap;

use crate::entropy::Entropy;

/// Unsynced writes survive a crash in pieces of this size, at multiples of it.
pub(super) const SECTOR: usize = 512;

#[derive(Clone)]
enum Change {
    Write { offset: usize, bytes: Vec<u8> },
    SetLen { length: usize },
}

/// A file's bytes.
#[derive(Clone, Default)]
pub(super) struct Bytes {
    current: Vec<u8>,
    durable: Vec<u8>,
    /// Changes since the last sync.
    pending: Vec<Change>,
}

impl Bytes {
    pub fn len(&self) -> usize {
        self.current.len()
    }

    pub fn read(&self, out: &mut [u8], offset: u64) -> usize {
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(self.current.len());
        let n = out.len().min(self.current.len() - start);
        out[..n].copy_from_slice(&self.current[start..start + n]);
        n
    }

    pub fn write(&mut self, written: &[u8], offset: u64) {
        if written.is_empty() {
            return;
        }
        let change = Change::Write { offset: offset as usize, bytes: written.to_vec() };
        apply(&mut self.current, &change);
        self.pending.push(change);
    }

    pub fn set_len(&mut self, length: u64) {
        let change = Change::SetLen { length: length as usize };
        apply(&mut self.current, &change);
        self.pending.push(change);
    }

    pub fn all(&self) -> Vec<u8> {
        self.current.clone()
    }

    /// Flips bits of a byte wherever it is; false if there is none.
    pub fn flip(&mut self, at: usize, bits: u8) -> bool {
        let pending = self.pending.iter_mut().filter_map(|change| match change {
            Change::Write { offset, bytes } => bytes.get_mut(at.checked_sub(*offset)?),
            Change::SetLen { .. } => None,
        });
        pending.chain(self.durable.get_mut(at)).for_each(|byte| *byte ^= bits);
        self.current.get_mut(at).map(|byte| *byte ^= bits).is_some()
    }

    pub fn sync(&mut self) {
        for change in self.pending.drain(..) {
            apply(&mut self.durable, &change);
        }
    }

    /// A sync that fails: the kernel takes the pages for clean, so no later sync writes them; reads still show them.
    pub fn fail_sync(&mut self, entropy: &Entropy) {
        self.durable = self.torn(entropy);
        self.pending.clear();
    }

    /// A power cut.
    pub fn crash(&mut self, entropy: &Entropy) {
        self.fail_sync(entropy);
        self.current.clone_from(&self.durable);
    }

    fn torn(&self, entropy: &Entropy) -> Vec<u8> {
        let count = self.pending.len();
        if count == 0 {
            return self.durable.clone();
        }
        let some = || entropy.below(count as u64 + 1) as usize;
        // All of it, nothing, a moment in between, or a mixture in which length and sectors go their own ways.
        let (kept_lengths, kept_bytes) = match entropy.below(6) {
            0 => (count, Some(count)),
            1 => (0, Some(0)),
            2 => {
                let moment = some();
                (moment, Some(moment))
            }
            3 => (some(), Some(count)),
            4 => (count, None),
            _ => (some(), None),
        };
        let length = self.length_after(kept_lengths, entropy);
        let mut out = self.durable.clone();
        for (sector, writes) in self.touched() {
            let kept = kept_bytes.unwrap_or_else(some);
            self.tear_sector(&mut out, sector, &writes, kept, kept_lengths);
        }
        out.resize(length, 0);
        out
    }

    /// The length after the first `kept` changes, perhaps with a part of the next.
    fn length_after(&self, kept: usize, entropy: &Entropy) -> usize {
        let mut length = self.durable.len();
        for change in &self.pending[..kept] {
            length = match change {
                Change::Write { offset, bytes } => length.max(offset + bytes.len()),
                Change::SetLen { length } => *length,
            };
        }
        match self.pending.get(kept) {
            Some(Change::Write { offset, bytes }) if entropy.below(2) == 0 => {
                length.max(offset + entropy.below(bytes.len() as u64 + 1) as usize)
            }
            _ => length,
        }
    }

    /// Sectors that pending changes touch, each with the changes that do.
    fn touched(&self) -> BTreeMap<usize, Vec<usize>> {
        let mut touched: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        let mut end = self.durable.len();
        for (number, change) in self.pending.iter().enumerate() {
            let range = match change {
                Change::Write { offset, bytes } => {
                    end = end.max(offset + bytes.len());
                    offset / SECTOR..(offset + bytes.len()).div_ceil(SECTOR)
                }
                Change::SetLen { length } => length / SECTOR..end.div_ceil(SECTOR),
            };
            for sector in range {
                touched.entry(sector).or_default().push(number);
            }
        }
        touched
    }

    fn tear_sector(&self, out: &mut Vec<u8>, sector: usize, changes: &[usize], mut kept: usize, kept_lengths: usize) {
        let start = sector * SECTOR;
        // What a cut takes away does not come back once the cut is durable; a sector that it frees as a whole is not gone before.
        for &number in changes {
            match &self.pending[number] {
                Change::SetLen { .. } if number < kept_lengths => kept = kept.max(number + 1),
                Change::SetLen { length } if *length <= start => kept = kept.min(number),
                _ => {}
            }
        }
        let mut image = [0; SECTOR];
        let there = out.len().saturating_sub(start).min(SECTOR);
        if there > 0 {
            image[..there].copy_from_slice(&out[start..start + there]);
        }
        for &number in changes.iter().filter(|&&number| number < kept) {
            match &self.pending[number] {
                Change::Write { offset, bytes } => {
                    let (from, to) = (start.max(*offset), (start + SECTOR).min(offset + bytes.len()));
                    image[from - start..to - start].copy_from_slice(&bytes[from - offset..to - offset]);
                }
                Change::SetLen { length } => image[length.saturating_sub(start).min(SECTOR)..].fill(0),
            }
        }
        if out.len() < start + SECTOR {
            out.resize(start + SECTOR, 0);
        }
        out[start..start + SECTOR].copy_from_slice(&image);
    }
}

fn apply(target: &mut Vec<u8>, change: &Change) {
    match change {
        Change::SetLen { length } => target.resize(*length, 0),
        Change::Write { offset, bytes } => {
            let end = offset + bytes.len();
            if target.len() < end {
                target.resize(end, 0);
            }
            target[*offset..end].copy_from_slice(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Outcomes of many crashes of the same file.
    fn outcomes(bytes: &Bytes, mut see: impl FnMut(&[u8])) {
        for seed in 0..400 {
            let mut torn = bytes.clone();
            torn.crash(&Entropy::seeded(seed));
            assert_eq!(torn.current, torn.durable);
            see(&torn.current);
        }
    }

    #[test]
    fn length_and_bytes_tear_apart_from_each_other() {
        let mut bytes = Bytes::default();
        bytes.write(&[1; 1_000], 0);
        bytes.sync();
        bytes.write(&[2; 3_000], 1_000);
        let (mut lengths, mut zero_tail, mut holes, mut whole) = (std::collections::BTreeSet::new(), 0, 0, 0);
        outcomes(&bytes, |found| {
            lengths.insert(found.len());
            assert!((1_000..=4_000).contains(&found.len()));
            assert!(found[..1_000].iter().all(|&byte| byte == 1), "synced bytes changed");
            zero_tail += u32::from(found.len() > 1_000 && *found.last().unwrap() == 0);
            let first_zero = found.iter().position(|&byte| byte == 0).unwrap_or(found.len());
            holes += u32::from(found[first_zero..].contains(&2));
            whole += u32::from(found.len() == 4_000 && first_zero == 4_000);
            for sector in found.chunks(SECTOR) {
                let written: Vec<&u8> = sector.iter().filter(|&&byte| byte != 1).collect();
                assert!(written.iter().all(|&byte| byte == written[0]), "a sector in two pieces");
            }
        });
        assert!(
            lengths.len() > 20 && zero_tail > 10 && holes > 10 && whole > 10,
            "{lengths:?} {zero_tail} {holes} {whole}"
        );
    }

    #[test]
    fn a_sector_never_has_a_later_write_without_an_earlier_one() {
        let mut bytes = Bytes::default();
        bytes.write(&[1; 100], 0);
        bytes.write(&[2; 100], 100);
        let mut seen = std::collections::BTreeSet::new();
        outcomes(&bytes, |found| {
            let (first, second) = (found.first() == Some(&1), found.get(100) == Some(&2));
            assert!(first || !second);
            seen.insert((first, second));
        });
        assert_eq!(seen.len(), 3);
    }

    #[test]
    fn what_was_cut_does_not_come_back_under_what_was_written_later() {
        let mut bytes = Bytes::default();
        bytes.write(&[1; 4_000], 0);
        bytes.sync();
        bytes.set_len(700);
        bytes.write(&[2; 100], 3_000);
        let (mut old, mut new) = (0, 0);
        outcomes(&bytes, |found| {
            let cut = found.len() != 4_000;
            if cut {
                assert!(found[700..].iter().all(|&byte| byte != 1), "cut bytes came back");
            } else {
                assert!(found[1_024..].iter().all(|&byte| byte == 1), "the cut is half there");
            }
            old += u32::from(!cut);
            new += u32::from(found.len() == 3_100);
        });
        assert!(old > 10 && new > 10);
    }

    #[test]
    fn what_a_failed_sync_lost_no_later_sync_brings_back() {
        let mut lost = 0;
        for seed in 0..20 {
            let entropy = Entropy::seeded(seed);
            let mut bytes = Bytes::default();
            bytes.write(&[1; 100], 0);
            bytes.fail_sync(&entropy);
            assert_eq!(bytes.current, [1; 100], "reads still show it");
            bytes.sync();
            bytes.crash(&entropy);
            lost += u32::from(bytes.current != [1; 100]);
        }
        assert!((1..20).contains(&lost), "both outcomes must occur: {lost}");
    }
}

//! Records by id, in pages of at most 1,024, with copy-on-write for checkpoints.
//!
//! # Overview
//! Ids are dense and never used twice, so a record lies at `regions[id >> 24][(id >> 10) & 0x3fff][id & 0x3ff]`: three
//! array steps, no hashing, no rehash pause. A page whose last record goes is freed.
//!
//! # Consistency of a checkpoint
//! [`PageTable::begin_copy`] raises the epoch; a page with an older epoch has not been copied yet. [`PageTable::copy_some`]
//! walks the pages in order of id; every change of a record that the image holds (`insert`, `modify`, `remove`) first
//! copies its page if that is still to come. Pages born after the beginning carry the new epoch and are never copied.
//! So the copies are the exact state at the beginning, whatever happens between slices.
//!
//! The digest is a wrapping sum of one hash per record, kept up to date by the same three calls.

use std::collections::BTreeMap;

/// Records in a page.
pub const PAGE_RECORDS: u64 = 1_024;
const PAGE_BITS: u32 = 10;
const REGION_BITS: u32 = 24;
const PAGES_OF_REGION: u64 = 1 << (REGION_BITS - PAGE_BITS);

/// Something that lies in pages and goes into images.
pub trait Record: Sized {
    /// First byte of a page blob of these records.
    const KIND: u8;
    /// Appends the part that images hold, without the id.
    fn encode(&self, out: &mut Vec<u8>);
    /// Hash of the same part.
    fn hash(&self, id: u64) -> u64;
}

/// A page without records (`live` 0) is as good as none.
struct Page<T> {
    epoch: u32,
    live: u32,
    slots: Vec<Option<T>>,
}

/// See the module.
pub struct PageTable<T> {
    regions: BTreeMap<u64, Vec<Page<T>>>,
    live: u64,
    digest: u64,
    epoch: u32,
    /// Number of the next page to copy; `None`: no checkpoint is under way.
    cursor: Option<u64>,
    copied: Vec<Vec<u8>>,
}

impl<T: Record> Default for PageTable<T> {
    fn default() -> Self {
        Self { regions: BTreeMap::new(), live: 0, digest: 0, epoch: 0, cursor: None, copied: Vec::new() }
    }
}

#[inline]
fn place(id: u64) -> (u64, usize, usize) {
    #[cfg(test)]
    super::codec::steps::count();
    (id >> REGION_BITS, ((id >> PAGE_BITS) & (PAGES_OF_REGION - 1)) as usize, (id & (PAGE_RECORDS - 1)) as usize)
}

fn encode_page<T: Record>(number: u64, page: &Page<T>) -> Vec<u8> {
    let mut out = Vec::with_capacity(page.live as usize * 48 + 16);
    out.push(T::KIND);
    super::codec::put(&mut out, number);
    super::codec::put(&mut out, u64::from(page.live));
    let mut next = 0;
    for (slot, record) in page.slots.iter().enumerate() {
        if let Some(record) = record {
            super::codec::put(&mut out, (slot - next) as u64);
            next = slot + 1;
            record.encode(&mut out);
        }
    }
    out
}

impl<T: Record> PageTable<T> {
    /// Number of records.
    pub fn len(&self) -> u64 {
        self.live
    }

    /// Sum of the hashes of all records.
    pub fn digest(&self) -> u64 {
        self.digest
    }

    #[inline]
    fn page(&self, id: u64) -> Option<(&Page<T>, usize)> {
        let (region, page, slot) = place(id);
        let page = self.regions.get(&region)?.get(page)?;
        Some((page, slot))
    }

    #[inline]
    fn page_mut(&mut self, id: u64) -> Option<(&mut Page<T>, usize)> {
        let (region, page, slot) = place(id);
        let page = self.regions.get_mut(&region)?.get_mut(page)?;
        Some((page, slot))
    }

    /// The record with this id.
    #[inline]
    pub fn get(&self, id: u64) -> Option<&T> {
        let (page, slot) = self.page(id)?;
        page.slots.get(slot)?.as_ref()
    }

    /// The record with this id, for changes of what images do **not** hold (children, replicas).
    #[inline]
    pub fn derived_mut(&mut self, id: u64) -> Option<&mut T> {
        let (page, slot) = self.page_mut(id)?;
        page.slots.get_mut(slot)?.as_mut()
    }

    /// Copies the page of `id` if a checkpoint still needs it as it is.
    #[inline]
    fn preserve(&mut self, id: u64) {
        if self.cursor.is_none() {
            return;
        }
        let epoch = self.epoch;
        let blob = match self.page_mut(id) {
            Some((page, _)) if page.epoch != epoch => {
                page.epoch = epoch;
                if page.live == 0 {
                    return;
                }
                encode_page(id >> PAGE_BITS, page)
            }
            _ => return,
        };
        self.copied.push(blob);
    }

    /// Changes the record with this id; the one way to change what images hold.
    pub fn modify<R>(&mut self, id: u64, change: impl FnOnce(&mut T) -> R) -> Option<R> {
        self.preserve(id);
        let (page, slot) = self.page_mut(id)?;
        let record = page.slots.get_mut(slot)?.as_mut()?;
        let before = record.hash(id);
        let result = change(record);
        let after = record.hash(id);
        self.digest = self.digest.wrapping_sub(before).wrapping_add(after);
        Some(result)
    }

    /// Adds a record; `false` if the id is taken.
    pub fn insert(&mut self, id: u64, record: T) -> bool {
        self.preserve(id);
        let (region, page, slot) = place(id);
        let epoch = self.epoch;
        let pages = self.regions.entry(region).or_default();
        if pages.len() <= page {
            pages.resize_with(page + 1, || Page { epoch, live: 0, slots: Vec::new() });
        }
        let page = &mut pages[page];
        if page.slots.len() <= slot {
            page.slots.resize_with(slot + 1, || None);
        }
        if page.slots[slot].is_some() {
            return false;
        }
        self.digest = self.digest.wrapping_add(record.hash(id));
        page.slots[slot] = Some(record);
        page.live += 1;
        self.live += 1;
        true
    }

    /// Adds a whole page that is not there yet; `false` if it is. `digest`: sum of the hashes of its records.
    pub fn insert_page(&mut self, number: u64, slots: Vec<Option<T>>, live: u32, digest: u64) -> bool {
        let (region, page, _) = place(number << PAGE_BITS);
        let epoch = self.epoch;
        let pages = self.regions.entry(region).or_default();
        if pages.len() <= page {
            pages.resize_with(page + 1, || Page { epoch, live: 0, slots: Vec::new() });
        }
        if pages[page].live > 0 {
            return false;
        }
        pages[page] = Page { epoch, live, slots };
        self.live += u64::from(live);
        self.digest = self.digest.wrapping_add(digest);
        true
    }

    /// Takes a record out.
    pub fn remove(&mut self, id: u64) -> Option<T> {
        self.preserve(id);
        let (page, slot) = self.page_mut(id)?;
        let record = page.slots.get_mut(slot)?.take()?;
        page.live -= 1;
        let empty = page.live == 0;
        self.live -= 1;
        self.digest = self.digest.wrapping_sub(record.hash(id));
        if empty {
            let (region, page, _) = place(id);
            if let Some(pages) = self.regions.get_mut(&region) {
                pages[page].slots = Vec::new();
                while pages.last().is_some_and(|page| page.live == 0) {
                    pages.pop();
                }
                if pages.is_empty() {
                    self.regions.remove(&region);
                }
            }
        }
        Some(record)
    }

    /// All records in order of id, from `first` on.
    pub fn iter_from(&self, first: u64) -> impl Iterator<Item = (u64, &T)> {
        let (first_region, first_page, _) = place(first);
        self.regions
            .range(first_region..)
            .flat_map(move |(region, pages)| {
                let skip = if *region == first_region { first_page } else { 0 };
                pages.iter().enumerate().skip(skip).flat_map(move |(at, page)| {
                    let base = (region << REGION_BITS) | ((at as u64) << PAGE_BITS);
                    page.slots
                        .iter()
                        .enumerate()
                        .filter_map(move |(slot, record)| Some((base | slot as u64, record.as_ref()?)))
                })
            })
            .skip_while(move |(id, _)| *id < first)
    }

    /// Begins a checkpoint: the copies will be the state as it is now.
    pub fn begin_copy(&mut self) {
        self.epoch += 1;
        self.cursor = Some(0);
        self.copied.clear();
    }

    /// Hands out the pages copied on write and up to `budget` more; `true` when every page is out.
    pub fn copy_some(&mut self, budget: &mut usize, out: &mut Vec<Vec<u8>>) -> bool {
        out.append(&mut self.copied);
        let Some(mut number) = self.cursor else { return true };
        let epoch = self.epoch;
        while *budget > 0 {
            let Some((found, page)) = next_page(&mut self.regions, number) else {
                self.cursor = None;
                return true;
            };
            number = found + 1;
            if page.epoch != epoch {
                page.epoch = epoch;
                out.push(encode_page(found, page));
                *budget -= 1;
            }
        }
        self.cursor = Some(number);
        false
    }

    /// Gives a checkpoint up.
    pub fn abort_copy(&mut self) {
        self.cursor = None;
        self.copied.clear();
    }
}

/// The first page at or after `number`.
fn next_page<T>(regions: &mut BTreeMap<u64, Vec<Page<T>>>, number: u64) -> Option<(u64, &mut Page<T>)> {
    let region = number / PAGES_OF_REGION;
    for (at, pages) in regions.range_mut(region..) {
        let skip = if *at == region { (number % PAGES_OF_REGION) as usize } else { 0 };
        for (index, page) in pages.iter_mut().enumerate().skip(skip) {
            if page.live > 0 {
                return Some((at * PAGES_OF_REGION + index as u64, page));
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Record for u64 {
        const KIND: u8 = 9;
        fn encode(&self, out: &mut Vec<u8>) {
            super::super::codec::put(out, *self);
        }
        fn hash(&self, id: u64) -> u64 {
            super::super::codec::mix(id, *self)
        }
    }

    fn decode(blobs: &[Vec<u8>]) -> BTreeMap<u64, u64> {
        let mut all = BTreeMap::new();
        for blob in blobs {
            let mut reader = super::super::codec::Reader::new(&blob[1..]);
            let number = reader.number().unwrap();
            let mut slot = 0;
            for _ in 0..reader.number().unwrap() {
                slot += reader.number().unwrap();
                assert!(all.insert(number * PAGE_RECORDS + slot, reader.number().unwrap()).is_none());
                slot += 1;
            }
        }
        all
    }

    #[test]
    fn copies_are_the_state_at_the_beginning() {
        let mut table = PageTable::default();
        for id in 0..5_000 {
            assert!(table.insert(id * 3, id));
        }
        assert!(!table.insert(3, 1));
        let before: BTreeMap<u64, u64> = table.iter_from(0).map(|(id, value)| (id, *value)).collect();
        table.begin_copy();
        let mut out = Vec::new();
        let mut step = 0;
        while !table.copy_some(&mut 2, &mut out) {
            step += 1;
            table.modify(step * 600, |value| *value = 77);
            table.remove(step * 900);
            table.insert(step * 900 + 1, 5);
            table.insert((1 << 40) + step, 6);
        }
        assert_eq!(decode(&out), before);
        let mut sum = 0u64;
        for (id, value) in table.iter_from(0) {
            sum = sum.wrapping_add(value.hash(id));
        }
        assert_eq!(table.digest(), sum);
        assert_eq!(
            table.iter_from(8_999).next().map(|(id, _)| id),
            Some(9_000 + u64::from(table.get(9_000).is_none()))
        );
    }
}

//! Samples of records, from all over the input, to cut it into ranges of keys.

use bytes::Bytes;
use cairn_proto::Result;
use futures_util::{StreamExt as _, TryStreamExt as _};

use super::total_bytes;
use crate::fs::{FileStatus, FileSystem};
use crate::job::content;
use crate::mapreduce::{Compression, KeyRanges};

/// Bytes looked at in one place; a place costs the reading of one frame.
const PLACE_BYTES: u64 = 64 << 10;
/// Most places; and at least so many per range, where the input is that long.
const MAX_PLACES: u64 = 1_000;
const PLACES_PER_RANGE: u64 = 20;
/// Keys per range that are aimed at: with 500 the longest range is some tenths longer than the mean at most.
const KEYS_PER_RANGE: usize = 500;
const MAX_KEYS: usize = 400_000;
/// Places read at once.
const AT_ONCE: usize = 8;
/// Longer keys are cut: a cut between ranges need not be a whole key.
const MAX_KEY_BYTES: usize = 200;

/// What the records of the files are.
#[derive(Clone, Copy)]
pub enum Records {
    /// Lines.
    Lines,
    /// So many bytes each.
    Fixed(u64),
}

/// Part of a file that is looked at.
struct Place<'a> {
    file: &'a FileStatus,
    from: u64,
    to: u64,
}

/// Cuts that make `ranges` of about equal numbers of records of `files`; `key` writes the key of a record.
pub async fn ranges(
    fs: &FileSystem,
    files: &[FileStatus],
    records: Records,
    ranges: u32,
    key: impl Fn(&[u8], &mut Vec<u8>),
) -> Result<KeyRanges> {
    if ranges < 2 {
        return Ok(KeyRanges::default());
    }
    let mut places = places(files, ranges, records);
    // All places of a compressed file are its start.
    places.dedup_by(|a, b| std::ptr::eq(a.file, b.file) && Compression::of(&a.file.path).is_some());
    let keys_per_place = (KEYS_PER_RANGE * ranges as usize).min(MAX_KEYS).div_ceil(places.len().max(1));
    let reads = places.into_iter().map(|place| async move {
        let bytes = if Compression::of(&place.file.path).is_some() {
            // It cannot be read from the middle: its start stands for all of it.
            content::start_of(fs, place.file, PLACE_BYTES).await?
        } else {
            let reader = fs.open(&place.file.path).await?;
            reader.read_range(place.from, place.to - place.from).await?
        };
        Result::<(Place<'_>, Bytes)>::Ok((place, bytes))
    });
    let mut reads = futures_util::stream::iter(reads).buffer_unordered(AT_ONCE);
    let (mut keys, mut scratch) = (Vec::new(), Vec::new());
    while let Some((place, bytes)) = reads.try_next().await? {
        let found: Vec<&[u8]> = match records {
            Records::Lines => lines(&place, &bytes),
            Records::Fixed(length) => bytes.chunks_exact(length as usize).collect(),
        };
        let wanted = keys_per_place.min(found.len());
        for number in 0..wanted {
            scratch.clear();
            key(found[found.len() * number / wanted], &mut scratch);
            scratch.truncate(MAX_KEY_BYTES);
            keys.push(scratch.clone());
        }
    }
    Ok(KeyRanges::of_sample(keys, ranges))
}

/// Places at even distances through all files.
fn places(files: &[FileStatus], ranges: u32, records: Records) -> Vec<Place<'_>> {
    let total = total_bytes(files);
    let wanted = (u64::from(ranges) * PLACES_PER_RANGE).min(MAX_PLACES);
    let count = wanted.min(total.div_ceil(PLACE_BYTES)).max(1);
    let step = total.div_ceil(count).max(1);
    let (mut places, mut before, mut next) = (Vec::new(), 0, 0);
    for file in files {
        while next < before + file.length {
            let mut from = next - before;
            if let Records::Fixed(length) = records {
                from -= from % length;
            }
            places.push(Place { file, from, to: (from + PLACE_BYTES.min(step)).min(file.length) });
            next += step;
        }
        before += file.length;
    }
    places
}

/// The whole lines of a place.
fn lines<'a>(place: &Place<'_>, bytes: &'a [u8]) -> Vec<&'a [u8]> {
    let mut all: Vec<&[u8]> = bytes.split(|byte| *byte == b'\n').collect();
    // The last one goes on behind the place, or is the nothing behind the last line feed.
    if place.to < place.file.length || all.last().is_some_and(|last| last.is_empty()) {
        all.pop();
    }
    if place.from > 0 && !all.is_empty() {
        all.remove(0);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(length: u64) -> FileStatus {
        FileStatus { length, ..FileStatus::default() }
    }

    #[test]
    fn places_lie_all_over_the_input() {
        let files = [file(10), file(0), file(100 << 20), file(50 << 20)];
        let found = places(&files, 3, Records::Fixed(100));
        assert_eq!(found.len(), 60);
        assert!(
            found
                .iter()
                .all(|place| place.from.is_multiple_of(100) && place.from < place.to && place.to <= place.file.length)
        );
        assert_eq!(found.iter().filter(|place| place.file.length == 50 << 20).count(), 20);
        // A small input is looked at as a whole.
        let files = [file(1_000), file(5_000)];
        let seen: u64 = places(&files, 2, Records::Lines).iter().map(|place| place.to - place.from).sum();
        assert!(seen >= 1_000, "{seen}");
        assert!(places(&[], 2, Records::Lines).is_empty());
    }

    #[test]
    fn only_whole_lines_are_taken() {
        let file = file(20);
        let take = |from, to, text| lines(&Place { file: &file, from, to }, text).len();
        assert_eq!(take(0, 6, b"ab\ncd\n"), 2);
        assert_eq!(take(0, 6, b"ab\ncde"), 1);
        assert_eq!(take(3, 9, b"ab\ncd\n"), 1);
        assert_eq!(take(14, 20, b"ab\ncde"), 1);
        assert_eq!(take(3, 9, b"abcdef"), 0);
    }
}

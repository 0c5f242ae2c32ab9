//! What a job's tasks noticed that its owner should know: records that were left out, keys with many records.

use cairn_proto::pb;
use serde::{Deserialize, Serialize};

use crate::mapreduce::counter;

/// Skipped records that are shown, of all tasks together.
const SHOWN_SKIPPED: usize = 20;
/// Keys that are shown.
const SHOWN_KEYS: usize = 5;
/// A key with this many records is worth a line if it has a tenth of all.
const HOT: u64 = 1_000;

/// See the module.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Findings {
    /// Of the records that maps left out the first ones; `map.records_skipped` counts all.
    pub skipped: Vec<SkippedRecord>,
    /// The keys with the most records among those that reducers saw.
    pub hot_keys: Vec<HotKey>,
    /// Records that reducers saw.
    pub reduced: u64,
}

/// A record that a map left out, because its mapper failed on it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SkippedRecord {
    /// Its file; empty if the records were generated.
    pub path: String,
    /// Where it starts in the file.
    pub offset: u64,
    /// Its number in its split.
    pub ordinal: u64,
    /// How the mapper failed.
    pub why: String,
    /// Its first bytes, as text.
    pub sample: String,
}

/// A key with many records.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct HotKey {
    /// Its first bytes, as text.
    pub key: String,
    /// Records with it.
    pub records: u64,
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

impl Findings {
    pub(super) fn of<'a>(tasks: impl Iterator<Item = &'a pb::TaskSuccess>) -> Self {
        let mut findings = Self::default();
        for success in tasks {
            let room = SHOWN_SKIPPED.saturating_sub(findings.skipped.len());
            findings.skipped.extend(success.skipped.iter().take(room).map(SkippedRecord::of));
            findings.reduced += success.counters.get(counter::REDUCE_RECORDS).copied().unwrap_or(0);
            let hot_keys = success.hot_keys.iter().map(|hot| HotKey { key: text(&hot.key), records: hot.records });
            findings.hot_keys.extend(hot_keys);
            findings.hot_keys.sort_by_key(|hot| std::cmp::Reverse(hot.records));
            findings.hot_keys.truncate(SHOWN_KEYS);
        }
        findings
    }

    /// One line for each thing that a person should look at.
    pub fn lines(&self) -> Vec<String> {
        let skipped = self.skipped.iter().map(|one| {
            let place = if one.path.is_empty() {
                format!("record {}", one.ordinal)
            } else {
                format!("the record at byte {} of {}", one.offset, one.path)
            };
            format!("skipped {place}: {}; it starts with {:?}", one.why, one.sample)
        });
        let hot = self.hot_keys.iter().filter(|hot| hot.records >= HOT && hot.records >= self.reduced / 10);
        let hot = hot.map(|hot| {
            format!("hot key: {} of {} records that reducers saw have the key {:?}", hot.records, self.reduced, hot.key)
        });
        skipped.chain(hot).collect()
    }
}

impl SkippedRecord {
    fn of(one: &pb::SkippedRecord) -> Self {
        let position = one.position.clone().unwrap_or_default();
        Self {
            path: position.path,
            offset: position.offset,
            ordinal: position.ordinal,
            why: one.why.clone(),
            sample: text(&one.sample),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hot_keys_and_skipped_records_are_told() {
        let reduce = |hot: u64| pb::TaskSuccess {
            counters: [(counter::REDUCE_RECORDS.to_owned(), hot + 1)].into(),
            hot_keys: vec![pb::HotKey { key: format!("k{hot}").into_bytes().into(), records: hot }],
            ..Default::default()
        };
        let position = pb::RecordPosition { path: "/f".into(), offset: 9, ordinal: 1, exact: true };
        let skipped =
            pb::SkippedRecord { position: Some(position), sample: b"x\xff".to_vec().into(), why: "bad".into() };
        let map = pb::TaskSuccess { skipped: vec![skipped; 30], ..Default::default() };
        let tasks: Vec<_> = std::iter::once(map).chain([5, 7_000, 6, 7, 0, 1, 2].map(reduce)).collect();
        let findings = Findings::of(tasks.iter());
        assert_eq!((findings.hot_keys.len(), &*findings.hot_keys[0].key), (5, "k7000"));
        let lines = findings.lines();
        assert_eq!((findings.skipped.len(), lines.len()), (20, 21));
        assert_eq!(lines[0], "skipped the record at byte 9 of /f: bad; it starts with \"x\u{fffd}\"");
        assert_eq!(lines[20], "hot key: 7000 of 7028 records that reducers saw have the key \"k7000\"");
        assert_eq!(Findings::of(std::iter::empty()), Findings::default());
    }
}

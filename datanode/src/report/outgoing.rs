//! What goes up the report stream, and in which order. No network here.
//!
//! Increments first, in the order in which they became true; then, while the namenode grants credits, ranges of a full report, each read from the
//! live map when it is taken.

use cairn_proto::pb::{self, report_up::Report};

use crate::store::map::ReplicaMap;

/// Increments taken at once.
const BATCH: usize = 256;

/// Where a full report is.
#[derive(Clone, Copy, Default, Debug)]
struct Cursor {
    volume: usize,
    /// Last id covered on this volume.
    after: Option<i64>,
}

/// State of one report stream.
#[derive(Debug)]
pub struct Outgoing {
    full: Option<Cursor>,
    credits: u32,
    volumes: Vec<String>,
}

/// What to send next.
#[derive(Debug)]
pub struct Batch {
    /// In order.
    pub reports: Vec<Report>,
    /// For [`ReplicaMap::mark_sent`] after they were sent.
    pub up_to: Option<u64>,
}

impl Outgoing {
    /// A new stream starts with a full report over the volumes with these ids.
    pub fn new(volumes: Vec<String>) -> Self {
        Self { full: Some(Cursor::default()), credits: 0, volumes }
    }

    /// The namenode takes so many ranges more.
    pub fn grant(&mut self, credits: u32) {
        self.credits = self.credits.saturating_add(credits);
    }

    /// Starts a full report again from the beginning.
    pub fn restart(&mut self) {
        self.full = Some(Cursor::default());
    }

    /// The next reports; `None`: wait for a change or for credits.
    pub fn take(&mut self, map: &ReplicaMap) -> Option<Batch> {
        let changes = map.take_changes(BATCH);
        if changes.overflowed {
            self.restart();
        }
        if !changes.reports.is_empty() {
            return Some(Batch { reports: changes.reports, up_to: Some(changes.up_to) });
        }
        if self.credits == 0 {
            return None;
        }
        let range = self.next_range(map)?;
        self.credits -= 1;
        Some(Batch { reports: vec![Report::Range(range)], up_to: None })
    }

    fn next_range(&mut self, map: &ReplicaMap) -> Option<pb::FullReportRange> {
        let cursor = self.full?;
        let range = map.range(cursor.volume, cursor.after);
        let last_of_storage = range.more_after.is_none();
        let last_of_report = last_of_storage && cursor.volume + 1 == self.volumes.len();
        self.full = match range.more_after {
            Some(after) => Some(Cursor { volume: cursor.volume, after: Some(after) }),
            None if last_of_report => None,
            None => Some(Cursor { volume: cursor.volume + 1, after: None }),
        };
        Some(pb::FullReportRange {
            storage_id: self.volumes[cursor.volume].clone(),
            pool: map.pool().to_owned(),
            first_id: cursor.after.map_or(i64::MIN, |after| after + 1),
            last_id: range.more_after.unwrap_or(i64::MAX),
            replicas: range.replicas,
            last_of_storage,
            last_of_report,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::map::{Entry, Kind};
    use cairn_proto::ids::{BlockId, Generation};

    fn put(map: &ReplicaMap, volume: usize, id: i64) -> u64 {
        let entry = Entry { generation: Generation(7), kind: Kind::Finalized { length: 10, stored: 138 } };
        map.settle(volume, BlockId(id), entry, true)
    }

    fn map() -> ReplicaMap {
        let map = ReplicaMap::new(vec!["A".into(), "B".into()], 4_096);
        map.set_pool("P");
        map
    }

    fn volumes() -> Vec<String> {
        vec!["A".into(), "B".into()]
    }

    #[test]
    fn increments_leave_in_order_and_before_ranges() {
        let map = map();
        put(&map, 0, 1);
        map.begin_stream();
        let mut out = Outgoing::new(volumes());
        out.grant(10);
        put(&map, 0, 2);
        map.forget(0, BlockId(2), Generation(7), true);
        let last = put(&map, 1, 3);
        let batch = out.take(&map).unwrap();
        let told: Vec<(bool, i64)> = batch
            .reports
            .iter()
            .map(|report| match report {
                Report::Changed(changed) => (true, changed.replica.as_ref().unwrap().id),
                Report::Removed(removed) => (false, removed.id),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(told, [(true, 2), (false, 2), (true, 3)]);
        assert_eq!(batch.up_to, Some(last));
        let Some(Report::Range(range)) = out.take(&map).unwrap().reports.pop() else { panic!() };
        assert_eq!(range.replicas.iter().map(|r| r.id).collect::<Vec<_>>(), [1]);
        assert!(range.last_of_storage && !range.last_of_report);
        let Some(Report::Range(range)) = out.take(&map).unwrap().reports.pop() else { panic!() };
        assert_eq!((range.storage_id.as_str(), range.replicas.len(), range.last_of_report), ("B", 1, true));
        assert!(out.take(&map).is_none());
    }

    #[test]
    fn ranges_touch_cover_everything_and_wait_for_credits() {
        let map = map();
        for id in 1..=10_000 {
            put(&map, 0, id * 3);
        }
        map.begin_stream();
        let mut out = Outgoing::new(volumes());
        assert!(out.take(&map).is_none(), "no credits yet");
        out.grant(2);
        let mut ranges = Vec::new();
        while let Some(batch) = out.take(&map) {
            ranges.extend(batch.reports);
        }
        assert_eq!(ranges.len(), 2);
        // What becomes true meanwhile in a part not yet sent is in its range.
        put(&map, 0, 30_001);
        out.grant(100);
        while let Some(batch) = out.take(&map) {
            ranges.extend(batch.reports);
        }
        let (mut next, mut seen) = (i64::MIN, 0);
        for report in ranges {
            let Report::Range(range) = report else { continue };
            if range.storage_id == "B" {
                continue;
            }
            assert_eq!(range.first_id, next);
            assert!(range.replicas.len() <= 4_096);
            assert!(range.replicas.windows(2).all(|pair| pair[0].id < pair[1].id));
            assert!(range.replicas.iter().all(|r| (range.first_id..=range.last_id).contains(&r.id)));
            seen += range.replicas.len();
            next = range.last_id.wrapping_add(1);
            assert_eq!(range.last_of_storage, range.last_id == i64::MAX);
        }
        assert_eq!(seen, 10_001);
    }

    #[test]
    fn a_new_stream_forgets_increments_and_tells_all_again() {
        let map = map();
        map.begin_stream();
        put(&map, 0, 1);
        map.end_stream();
        put(&map, 0, 2);
        map.begin_stream();
        let mut out = Outgoing::new(volumes());
        out.grant(9);
        let Some(Report::Range(range)) = out.take(&map).unwrap().reports.pop() else { panic!() };
        assert_eq!(range.replicas.len(), 2);
    }

    #[test]
    fn too_many_increments_become_a_full_report() {
        let map = map();
        map.begin_stream();
        let mut out = Outgoing::new(volumes());
        out.grant(100);
        while out.take(&map).is_some() {}
        for id in 1..=70_000 {
            put(&map, 0, id);
        }
        let mut ids = std::collections::BTreeSet::new();
        while let Some(batch) = out.take(&map) {
            for report in batch.reports {
                match report {
                    Report::Range(range) => ids.extend(range.replicas.iter().map(|r| r.id)),
                    Report::Changed(changed) => ids.extend(changed.replica.map(|r| r.id)),
                    _ => {}
                }
            }
        }
        assert_eq!(ids.len(), 70_000);
    }
}

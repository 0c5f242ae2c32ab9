//! Second attempts of tasks that lag: a slow disk or a busy machine must not hold the whole job up.
//!
//! A task is given one when no other of its kind waits, enough of its kind are done to know what is usual, and it
//! has taken twice as long as the median of them and by its progress will take at least half as long again, or has stood still
//! for as long. Whichever attempt is accepted first wins; the other is killed.

use cairn_proto::pb::TaskKind;

use super::{Assignment, Scheduler, State, Task, task_id};

/// Below this a task is not worth a second attempt.
const MIN_ELAPSED_MS: u64 = 2_000;
/// Done tasks from which the median is taken.
const MIN_DONE: usize = 3;
/// One in so many attempts that run may be a second one; one is always allowed.
const SHARE: usize = 10;

/// The middle one; `None` if there are too few to tell.
fn median(mut values: Vec<u64>) -> Option<u64> {
    if values.len() < MIN_DONE {
        return None;
    }
    let middle = values.len() / 2;
    values.select_nth_unstable(middle);
    values.get(middle).copied()
}

/// Will a task that runs for `elapsed_ms` and has done `bytes` of `whole` (0: unknown), the last of them `still_ms` ago, lag behind a usual one?
fn lags(elapsed_ms: u64, still_ms: u64, bytes: u64, whole: u64, median_ms: u64) -> bool {
    let long_ms = median_ms.saturating_mul(2).max(MIN_ELAPSED_MS);
    if elapsed_ms < long_ms {
        return false;
    }
    if still_ms >= long_ms {
        return true;
    }
    // What is nearly done is left alone: at the pace it has, it ends before a new attempt could.
    let in_all_ms = u128::from(elapsed_ms) * u128::from(whole) / u128::from(bytes.max(1));
    whole == 0 || in_all_ms.saturating_sub(elapsed_ms.into()) > u128::from(median_ms) / 2
}

/// A task that lags.
struct Lagging {
    kind: TaskKind,
    index: u32,
    /// Where.
    node: String,
    /// Where a second attempt of it can be started.
    place: Option<String>,
}

impl Scheduler {
    /// A second attempt that is worth a free slot now.
    pub(super) fn second_attempt(&self, now_ms: u64) -> Option<Assignment> {
        let Lagging { kind, index, place, .. } = self.lagging(now_ms)?;
        let node = place?;
        let locality = (kind == TaskKind::Map).then(|| self.locality_of(index, &node));
        Some(Assignment { node, task: task_id(kind, index), locality, backlog: 0 })
    }

    /// A map that lags, while slots that it could have are taken by reduces that wait for it.
    pub(super) fn make_room_for_second(&mut self, now_ms: u64) {
        if self.early.is_empty() || !self.yielding.is_empty() || self.maps_are_done() {
            return;
        }
        if let Some(Lagging { kind: TaskKind::Map, index, node, place: None }) = self.lagging(now_ms) {
            self.yield_for(index, Some(&node), now_ms);
        }
    }

    /// The task that lags most; one that has a place for a second attempt comes first.
    fn lagging(&self, now_ms: u64) -> Option<Lagging> {
        // As long as tasks of both kinds wait (reduces do while maps run) there is nothing to weigh.
        if self.anything_waits(TaskKind::Map) && (self.reduces.is_empty() || self.anything_waits(TaskKind::Reduce)) {
            return None;
        }
        let (mut running, mut seconds) = (0, 0);
        for task in self.maps.iter().chain(&self.reduces) {
            if let State::Running(attempts) = &task.state {
                running += attempts.len();
                seconds += attempts.len().saturating_sub(1);
            }
        }
        if seconds >= (running / SHARE).max(1) {
            return None;
        }
        for (kind, tasks) in [(TaskKind::Map, &self.maps), (TaskKind::Reduce, &self.reduces)] {
            // A reduce that waits for maps is no slower than they are.
            if self.anything_waits(kind) || kind == TaskKind::Reduce && !self.maps_are_done() {
                continue;
            }
            let begin_ms = if kind == TaskKind::Reduce { self.maps_done_ms } else { 0 };
            let elapsed = |task: &Task| match &task.state {
                State::Done(_, success) => Some(success.elapsed_ms),
                _ => None,
            };
            let Some(median_ms) = median(tasks.iter().filter_map(elapsed).collect()) else { continue };
            let worst = tasks.iter().zip(0..).filter_map(|(task, index)| {
                let State::Running(attempts) = &task.state else { return None };
                let [only] = attempts.as_slice() else { return None };
                let whole = task.split.as_ref().map_or(0, |planned| planned.split.length);
                let elapsed_ms = now_ms.saturating_sub(only.started_ms.max(begin_ms));
                let still_ms = now_ms.saturating_sub(only.progress_ms.max(begin_ms));
                if !lags(elapsed_ms, still_ms, only.bytes, whole, median_ms) {
                    return None;
                }
                let place = self.place_second(task, &only.node, now_ms);
                Some((place.is_some(), elapsed_ms, index, &only.node, place))
            });
            if let Some((_, _, index, node, place)) = worst.max() {
                return Some(Lagging { kind, index, node: node.clone(), place });
            }
        }
        None
    }

    /// The least busy node other than the one where it lags.
    fn place_second(&self, task: &Task, lagging: &str, now_ms: u64) -> Option<String> {
        let fit = self
            .nodes
            .iter()
            .filter(|(id, node)| *id != lagging && node.is_free(now_ms) && !task.failed_on.contains(*id));
        let near = |id: &str| task.split.as_ref().is_some_and(|planned| planned.nodes.iter().any(|node| node == id));
        fit.min_by_key(|(id, node)| (!near(id), node.used(), *id)).map(|(id, _)| id.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lags() {
        assert!(lags(10_000, 0, 10, 100, 4_000));
        assert!(lags(10_000, 0, 0, 100, 4_000), "nothing done yet");
        assert!(!lags(7_000, 0, 10, 100, 4_000), "not twice the median");
        assert!(!lags(10_000, 0, 99, 100, 4_000), "nearly done");
        assert!(!lags(10_000, 7_000, 100, 100, 4_000), "it has read all, and is at the rest");
        assert!(lags(10_000, 8_000, 100, 100, 4_000), "for too long");
        assert!(!lags(1_000, 0, 0, 100, 10), "too short to matter");
        assert!(lags(10_000, 0, 5, 0, 4_000), "of a reduce the time alone counts");
        assert_eq!(median(vec![1, 2]), None);
        assert_eq!(median(vec![9, 1, 5]), Some(5));
    }
}

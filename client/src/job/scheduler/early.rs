//! Reduces that start before all maps are done, to fetch while the last ones run.
//!
//! # When
//! When enough maps are done (`Rules::slow_start`) and no other map waits. So they only take slots that the job's own maps have no use for, and
//! what they wait for is at most the last wave of maps. They are told of map outputs as these come about ([`Scheduler::feeds`]).
//!
//! # No deadlock
//! A map may come to need a slot after all: it failed, or its output was lost, or it lags and wants a second attempt. If no node has one for it, a
//! reduce that still lacks outputs gives up its slot ([`Scheduler::make_room`]), the youngest first; it starts again when no map waits any more.
//! One that has been told of all outputs waits for nobody, so it is left alone: its slot gets free by itself.

use std::collections::BTreeMap;

use cairn_proto::pb::{self, TaskKind};

use super::{Attempt, AttemptKey, Scheduler, State, key_of};

/// Maps that wait without a place are looked for among so many: with more of them there is no early reduce left soon.
const COMPARED: usize = 64;
/// A reduce that waits is told of new outputs this often at most: many small maps end in that time.
const FEED_MS: u64 = 100;

/// News for a reduce that was started early.
#[derive(Clone, PartialEq, Debug)]
pub struct Feed {
    /// Where it runs.
    pub node: String,
    /// Which attempt.
    pub task: pb::TaskId,
    /// Outputs that it was not told of before.
    pub inputs: Vec<pb::MapOutputLocation>,
}

impl Scheduler {
    /// May reduces be started now?
    pub(super) fn reduces_may_start(&self) -> bool {
        if self.maps_are_done() {
            return true;
        }
        let enough = self.maps_done as u64 * 1_000 >= self.maps.len() as u64 * u64::from(self.rules.slow_start);
        self.rules.slow_start < 1_000 && self.maps_done > 0 && enough && !self.anything_waits(TaskKind::Map)
    }

    /// From where on an attempt that starts now must be told of outputs; `None`: it gets all of them with its order.
    pub(super) fn lacks_from(&self, kind: TaskKind) -> Option<usize> {
        (kind == TaskKind::Reduce && !self.maps_are_done()).then_some(self.outputs_in_order.len())
    }

    fn early_attempts(&self) -> impl Iterator<Item = (u32, &Attempt)> {
        self.early.iter().flat_map(|index| {
            let attempts = match self.reduces.get(*index as usize).map(|task| &task.state) {
                Some(State::Running(attempts)) => attempts.as_slice(),
                _ => &[],
            };
            attempts.iter().filter(|attempt| attempt.lacks_from.is_some()).map(|attempt| (*index, attempt))
        })
    }

    /// What reduces that were started early are to be told. The driver that cannot tell it says so ([`Self::not_fed`]).
    pub fn feeds(&mut self, now_ms: u64) -> Vec<Feed> {
        let all_are_done = self.maps_are_done();
        if self.early.is_empty() || !all_are_done && now_ms < self.fed_ms + FEED_MS {
            return Vec::new();
        }
        self.fed_ms = now_ms;
        let known = self.outputs_in_order.len();
        let mut feeds = Vec::new();
        for (index, attempt) in self.early_attempts() {
            let fresh = self.outputs_in_order.get(attempt.lacks_from.unwrap_or(known)..).unwrap_or_default();
            // A map that was done twice has one output now.
            let fresh: BTreeMap<u32, ()> = fresh.iter().map(|map| (*map, ())).collect();
            let inputs: Vec<_> = fresh.keys().filter_map(|map| self.map_output(*map)).collect();
            let task = pb::TaskId { kind: TaskKind::Reduce as i32, index, attempt: attempt.number };
            feeds.push(Feed { node: attempt.node.clone(), task, inputs });
        }
        let early = std::mem::take(&mut self.early);
        for index in &early {
            if let Some(State::Running(attempts)) = self.reduces.get_mut(*index as usize).map(|task| &mut task.state) {
                for attempt in attempts.iter_mut().filter(|attempt| attempt.lacks_from.is_some()) {
                    attempt.lacks_from = (!all_are_done).then_some(known);
                }
            }
        }
        if !all_are_done {
            self.early = early;
        }
        feeds.retain(|feed| !feed.inputs.is_empty());
        feeds
    }

    /// The attempt could not be told: it will be told everything anew.
    pub fn not_fed(&mut self, node: &str, id: &pb::TaskId) {
        if let Some(attempt) = self.running(node, id) {
            attempt.lacks_from = Some(0);
            self.early.insert(id.index);
        }
    }

    /// When [`Self::feeds`] has something to say although nothing happens.
    pub(super) fn next_feed_ms(&self) -> Option<u64> {
        let known = self.outputs_in_order.len();
        let lacks = |(_, attempt): (u32, &Attempt)| attempt.lacks_from.is_some_and(|from| from < known);
        self.early_attempts().any(lacks).then_some(self.fed_ms + FEED_MS)
    }

    /// How much of the time since it was started a reduce could only wait for maps.
    pub fn waited_ms(&self, node: &str, id: &pb::TaskId) -> u64 {
        let task = self.reduces.get(id.index as usize).filter(|_| id.kind() == TaskKind::Reduce);
        let Some(State::Running(attempts)) = task.map(|task| &task.state) else { return 0 };
        let attempt = attempts.iter().find(|attempt| attempt.number == id.attempt && attempt.node == node);
        attempt.map_or(0, |attempt| self.maps_done_ms.saturating_sub(attempt.started_ms))
    }

    /// Maps that wait and that no node has a slot for get one of a reduce that could only wait for them.
    pub(super) fn make_room(&mut self, now_ms: u64) {
        if self.early.is_empty() || self.maps_are_done() {
            return;
        }
        let has_no_place = |index: &u32| {
            let Some(task) = self.maps.get(*index as usize) else { return false };
            !self.free_nodes(now_ms).any(|(id, _)| self.allowed(task, id))
        };
        let waiting: Vec<u32> = self.due_of(TaskKind::Map).take(COMPARED).filter(has_no_place).collect();
        for index in waiting.into_iter().skip(self.yielding.len()) {
            if !self.yield_for(index, None, now_ms) {
                return;
            }
        }
    }

    /// Has the youngest early reduce whose node may run the map give up its slot; false if there is none. `second`: for a second attempt beside the
    /// one on that node.
    pub(super) fn yield_for(&mut self, map: u32, second: Option<&str>, now_ms: u64) -> bool {
        let Some(task) = self.maps.get(map as usize) else { return false };
        let fits = |id: &str| {
            let trusted = self.nodes.get(id).is_some_and(|node| node.is_trusted_soon(now_ms, 0));
            trusted && second.map_or(self.allowed(task, id), |lags| lags != id && !task.failed_on.contains(id))
        };
        let candidates = self.early_attempts().filter(|(_, attempt)| fits(&attempt.node));
        let youngest = candidates.max_by_key(|(index, attempt)| (attempt.started_ms, *index));
        let Some((index, attempt)) = youngest else { return false };
        let (node, number) = (attempt.node.clone(), attempt.number);
        let id = pb::TaskId { kind: TaskKind::Reduce as i32, index, attempt: number };
        let Some(State::Running(attempts)) = self.reduces.get_mut(index as usize).map(|task| &mut task.state) else {
            return false;
        };
        attempts.retain(|other| other.number != number);
        if attempts.is_empty() {
            self.early.remove(&index);
            self.wait(TaskKind::Reduce, index, now_ms, now_ms);
        }
        // Its slot is free when its node says that it has ended.
        self.yielding.insert((node.clone(), key_of(&id)));
        self.to_kill.push((node, id));
        true
    }

    /// An attempt holds its slot no more.
    pub(super) fn yielded(&mut self, node: &str, key: AttemptKey) {
        if !self.yielding.is_empty() {
            self.yielding.remove(&(node.to_owned(), key));
        }
    }
}

//! Placement: which waiting task gets which free slot.

use std::collections::HashMap;

use cairn_proto::pb::{self, TaskKind};

use super::nodes::{Asking, Node};
use super::{Assignment, Attempt, Scheduler, Standing, State, Task, key_of, task_id};
use crate::job::report::Locality;

/// How long a free slot is left idle, in the hope for a map beside its block, before a map of the rack gets it. Longer: more local reads;
/// shorter: fewer idle slots.
pub const RACK_DELAY_MS: u64 = 400;
/// And before any map gets it.
pub const ANY_DELAY_MS: u64 = 800;
/// Maps of a node that are compared to find the pickiest; with more of them any is as good.
const COMPARED: usize = 32;
/// And looked at, if most of them have their content kept elsewhere.
const SEEN: usize = 1_024;

impl Scheduler {
    /// Gives free slots to waiting tasks.
    pub fn assign(&mut self, now_ms: u64) -> Vec<Assignment> {
        let mut out = Vec::new();
        if self.failed.is_some() || self.standing() == Standing::AllDone {
            return out;
        }
        self.wake(now_ms);
        while let Some(assignment) = self.next_local(now_ms) {
            self.idle_since_ms = None;
            out.push(self.launch(assignment, now_ms));
        }
        self.assign_far(now_ms, &mut out);
        self.make_room(now_ms);
        if self.rules.speculative {
            while let Some(second) = self.second_attempt(now_ms) {
                out.push(self.launch(second, now_ms));
            }
            self.make_room_for_second(now_ms);
        }
        if self.reduces_may_start() {
            let reduces: Vec<u32> = self.due_of(TaskKind::Reduce).collect();
            for index in reduces {
                let Some(node) = self.place_reduce(index, now_ms) else { continue };
                let task = task_id(TaskKind::Reduce, index);
                out.push(self.launch(Assignment { node, task, locality: None, backlog: 0 }, now_ms));
            }
        }
        let backlog = self.backlog();
        out.iter_mut().for_each(|assignment| assignment.backlog = backlog);
        out
    }

    /// Tasks that would be started if there were slots.
    fn backlog(&self) -> u32 {
        let reduces = if self.reduces_may_start() { self.due_of(TaskKind::Reduce).count() } else { 0 };
        (self.due_of(TaskKind::Map).count() + reduces) as u32
    }

    pub(super) fn due_of(&self, kind: TaskKind) -> impl Iterator<Item = u32> {
        self.due.range((kind, 0)..=(kind, u32::MAX)).map(|(_, index)| *index)
    }

    /// What had to wait for its time is due.
    fn wake(&mut self, now_ms: u64) {
        while let Some(first) = self.later.first().copied().filter(|(at, _, _)| *at <= now_ms) {
            self.later.remove(&first);
            self.make_due(first.1, first.2);
        }
    }

    fn launch(&mut self, mut assignment: Assignment, now_ms: u64) -> Assignment {
        let (kind, index) = (assignment.task.kind(), assignment.task.index);
        let lacks_from = self.lacks_from(kind);
        if lacks_from.is_some() {
            self.early.insert(index);
        }
        self.take_from_due(kind, index);
        let (node, locality) = (assignment.node.clone(), assignment.locality);
        if let Some(task) = self.task(&assignment.task) {
            let number = task.next_attempt;
            task.next_attempt += 1;
            assignment.task.attempt = number;
            let (started_ms, progress_ms) = (now_ms, now_ms);
            let attempt = Attempt { number, node, locality, bytes: 0, started_ms, progress_ms, lacks_from };
            match &mut task.state {
                State::Running(attempts) => attempts.push(attempt),
                other => *other = State::Running(vec![attempt]),
            }
        }
        if let Some(node) = self.nodes.get_mut(&assignment.node) {
            node.launched(key_of(&assignment.task));
        }
        assignment
    }

    /// May a task that failed on some nodes run on this one? Where it failed it may run again only if there is no other that is trusted: else a
    /// task that fails wherever it runs would wait for ever for a node that is gone.
    pub(super) fn allowed(&self, task: &Task, id: &str) -> bool {
        let no_choice = |(other, node): (&String, &Node)| task.failed_on.contains(other) || !node.is_trusted();
        !task.failed_on.contains(id) || self.nodes.iter().all(no_choice)
    }

    pub(super) fn free_nodes(&self, now_ms: u64) -> impl Iterator<Item = (&String, &Node)> {
        self.nodes.iter().filter(move |(_, node)| node.is_free(now_ms))
    }

    /// A node keeps content of files: that is as near as a block.
    pub fn keeps(&mut self, node_id: &str, kept: &[pb::KeptContent]) {
        let mut by_inode: HashMap<u64, Vec<std::ops::Range<u64>>> = HashMap::new();
        for part in kept {
            by_inode.entry(part.inode).or_default().push(part.offset..part.offset.saturating_add(part.length));
        }
        for index in 0..self.maps.len() as u32 {
            let Some(task) = self.maps.get_mut(index as usize) else { continue };
            let Some(planned) = &mut task.split else { continue };
            // At its edges there may be some of a neighbour's content.
            let middle = planned.split.offset + planned.split.length / 2;
            let parts = by_inode.get(&planned.split.inode);
            if !parts.is_some_and(|parts| parts.iter().any(|part| part.contains(&middle))) {
                continue;
            }
            task.kept_on.insert(node_id.to_owned());
            if !planned.nodes.iter().any(|node| node == node_id) {
                planned.nodes.push(node_id.to_owned());
                if self.due.contains(&(TaskKind::Map, index))
                    && let Some(node) = self.nodes.get_mut(node_id)
                {
                    node.local.insert(index);
                }
            }
        }
    }

    /// Is there another node for it that keeps its content, and where the job gets slots?
    fn is_kept_elsewhere(&self, task: &Task, id: &str, now_ms: u64) -> bool {
        let gets_slots =
            |node: &Node| node.is_trusted_soon(now_ms, 0) && !matches!(node.asking, Asking::Waiting { .. });
        let worth = |other: &String| self.nodes.get(other).is_some_and(gets_slots) && self.allowed(task, other);
        !task.kept_on.contains(id) && task.kept_on.iter().any(worth)
    }

    /// Of the maps that a free node could run beside their block the one with the fewest places to choose from, on the least busy of them. Maps whose content is
    /// kept on other nodes come last, and not at all for a while from the first time on that a slot could be had for one.
    fn next_local(&mut self, now_ms: u64) -> Option<Assignment> {
        let mut best: Option<(bool, usize, u32, u32, &str)> = None;
        let holds_back = self.held_back_since_ms.is_none_or(|since| now_ms < since + RACK_DELAY_MS);
        let mut held_back = false;
        for (id, node) in self.free_nodes(now_ms) {
            let mut compared = 0;
            for index in node.local.iter().take(SEEN) {
                let Some(task) = self.maps.get(*index as usize).filter(|task| self.allowed(task, id)) else { continue };
                let elsewhere = self.is_kept_elsewhere(task, id, now_ms);
                if elsewhere && holds_back {
                    held_back = true;
                    continue;
                }
                compared += 1;
                if compared > COMPARED {
                    break;
                }
                let usable = |other: &&String| {
                    self.nodes.get(*other).is_some_and(|node| node.is_free(now_ms)) && self.allowed(task, other)
                };
                let choices = task.split.iter().flat_map(|split| &split.nodes).filter(usable).count();
                let rank = (elsewhere, choices, node.used(), *index, id.as_str());
                if best.is_none_or(|best| rank < best) {
                    best = Some(rank);
                }
            }
        }
        let best = best.map(|(_, _, _, index, node)| (index, node.to_owned()));
        if held_back {
            self.held_back_since_ms.get_or_insert(now_ms);
        }
        let (index, node) = best?;
        let task = task_id(TaskKind::Map, index);
        Some(Assignment { node, task, locality: Some(Locality::Node), backlog: 0 })
    }

    /// Maps go to nodes without their block when they have waited long enough, or have no other.
    fn assign_far(&mut self, now_ms: u64, out: &mut Vec<Assignment>) {
        if self.free_nodes(now_ms).next().is_none() {
            return;
        }
        let maps: Vec<u32> = self.due_of(TaskKind::Map).collect();
        if maps.is_empty() {
            self.idle_since_ms = None;
            return;
        }
        let since_ms = *self.idle_since_ms.get_or_insert(now_ms);
        let waited_ms = now_ms.saturating_sub(since_ms);
        for index in maps {
            if let Some((node, locality)) = self.place_far(index, waited_ms, now_ms) {
                let task = task_id(TaskKind::Map, index);
                out.push(self.launch(Assignment { node, task, locality: Some(locality), backlog: 0 }, now_ms));
                if self.free_nodes(now_ms).next().is_none() {
                    return;
                }
            }
        }
    }

    fn place_far(&self, index: u32, waited_ms: u64, now_ms: u64) -> Option<(String, Locality)> {
        let task = self.maps.get(index as usize)?;
        let split = task.split.as_ref()?;
        let reachable = |id: &String| {
            let node = self.nodes.get(id);
            node.is_some_and(|node| node.is_trusted_soon(now_ms, ANY_DELAY_MS)) && self.allowed(task, id)
        };
        let hopeless = !split.nodes.iter().any(reachable);
        let mut best: Option<(Locality, u32, &str)> = None;
        for (id, node) in self.free_nodes(now_ms) {
            if !self.allowed(task, id) {
                continue;
            }
            let locality = self.locality_of(index, id);
            let patience_ms = if locality == Locality::Remote { ANY_DELAY_MS } else { RACK_DELAY_MS };
            let rank = (locality, node.used(), id.as_str());
            if (hopeless || waited_ms >= patience_ms) && best.is_none_or(|best| rank < best) {
                best = Some(rank);
            }
        }
        best.map(|(locality, _, id)| (id.to_owned(), locality))
    }

    fn place_reduce(&self, index: u32, now_ms: u64) -> Option<String> {
        let task = self.reduces.get(index as usize)?;
        let usable = self.free_nodes(now_ms).filter(|(id, _)| self.allowed(task, id));
        usable.min_by_key(|(id, node)| (node.used(), *id)).map(|(id, _)| id.clone())
    }

    /// When [`Self::assign`] may find something new without anything happening. Second attempts are looked for as time passes, whenever it
    /// is called.
    pub fn next_look_ms(&self, now_ms: u64) -> Option<u64> {
        let later = self.later.first().map(|(at, _, _)| *at);
        let waits = self.due_of(TaskKind::Map).next().is_some()
            || (self.reduces_may_start() && self.due_of(TaskKind::Reduce).next().is_some());
        let (mut patience, mut nodes) = (None, None);
        if waits || later.is_some() {
            patience = self.idle_since_ms.map(|since| [since + RACK_DELAY_MS, since + ANY_DELAY_MS]);
            nodes = Some(self.nodes.values().filter_map(Node::next_look_ms));
        }
        let held_back = self.held_back_since_ms.map(|since| since + RACK_DELAY_MS);
        let feed = self.next_feed_ms();
        let all = later
            .into_iter()
            .chain(feed)
            .chain(held_back)
            .chain(patience.into_iter().flatten())
            .chain(nodes.into_iter().flatten());
        all.filter(|at| *at > now_ms).min()
    }
}

//! Which task runs where, and what follows from each end: the pure core of the driver.
//!
//! It does no I/O and reads no clock: the driver tells it what happened and when, and carries out what it says.
//!
//! ```text
//! task:   waiting ──assign──▶ running ──success──▶ committing ──committed──▶ done
//!            ▲                   │                     │                       │
//!            └──failure, refusal, node lost────────────┴──map output lost──────┘
//! job:    maps (all done) ──▶ reduces (all done) ──▶ succeeded;   a task that failed too often ──▶ failed
//! ```
//!
//! A map whose output was lost goes back to waiting, and reduces are not started until it is done again; those that run go on, and fail on their own if
//! they need it. Reduces do not count such an end as a failure of theirs.

use std::collections::{BTreeMap, BTreeSet};

use cairn_proto::pb::{self, TaskKind};
use cairn_proto::{Error, ErrorCode};

use super::report::Locality;
use super::spec::MAX_ATTEMPTS;
use super::splits::PlannedSplit;

/// How long a free slot is left idle, in the hope for a map beside its block, before a map of the rack gets it. Longer: more local reads;
/// shorter: fewer idle slots.
pub const RACK_DELAY_MS: u64 = 400;
/// And before any map gets it.
pub const ANY_DELAY_MS: u64 = 800;
/// First pause before a failed task is tried again; doubled each time.
const RETRY_DELAY_MS: u64 = 200;
/// A node that said that its slots are taken is asked again after this.
const BUSY_DELAY_MS: u64 = 30;
/// Failed attempts on one node, without a success between them, that make it be avoided.
const NODE_FAILURES: u32 = 3;
/// How long a node that keeps failing, or was lost, is left alone before it is tried again.
const AVOID_MS: u64 = 10_000;
/// A map whose output is lost this often points at something worse than a dying node.
const MAX_OUTPUT_LOSSES: u32 = 8;

/// A node that runs tasks.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NodeInfo {
    /// Stable id.
    pub id: String,
    /// Name for people.
    pub host: String,
    /// "IP:PORT" of the data port.
    pub address: String,
    /// Place in the network.
    pub rack: String,
    /// Tasks at once.
    pub slots: u32,
}

struct Node {
    info: NodeInfo,
    used: u32,
    /// Nothing is started there before.
    not_before_ms: u64,
    failures: u32,
}

/// Which task, without the attempt.
pub type TaskRef = (TaskKind, u32);

/// One attempt of a task.
#[derive(Clone, PartialEq, Debug)]
pub struct Attempt {
    /// Number, unique within the task.
    pub number: u32,
    /// Where.
    pub node: String,
    /// Of a map: how near to its block.
    pub locality: Option<Locality>,
    /// Bytes of input taken so far.
    pub bytes: u64,
}

enum State {
    Waiting { not_before_ms: u64 },
    Running(Attempt),
    Committing(Attempt, pb::TaskSuccess),
    Done(Attempt, pb::TaskSuccess),
}

struct Task {
    state: State,
    split: Option<PlannedSplit>,
    next_attempt: u32,
    failures: u32,
    losses: u32,
    failed_on: BTreeSet<String>,
}

/// An attempt that the driver is to start.
#[derive(Clone, PartialEq, Debug)]
pub struct Assignment {
    /// Where.
    pub node: String,
    /// Which.
    pub task: pb::TaskId,
    /// For people: why there.
    pub locality: Option<Locality>,
}

/// What follows from the success of an attempt.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AfterSuccess {
    /// The driver renames its output and calls [`Scheduler::committed`].
    Commit,
    /// Nothing: the attempt was given up before.
    Ignore,
    /// It is done.
    Done,
}

/// How the job stands.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Standing {
    /// Some task is not done.
    Running,
    /// All are done.
    AllDone,
    /// It cannot be done.
    Failed(Error),
}

/// See the module.
pub struct Scheduler {
    job_id: String,
    maps: Vec<Task>,
    reduces: Vec<Task>,
    nodes: BTreeMap<String, Node>,
    failed: Option<Error>,
    stderr_tail: String,
    /// Failed attempts: maps, reduces.
    attempts_failed: [u32; 2],
    maps_done: usize,
    reduces_done: usize,
    /// Since when a slot is left idle for the sake of locality.
    idle_since_ms: Option<u64>,
}

impl Task {
    fn new(split: Option<PlannedSplit>) -> Self {
        let state = State::Waiting { not_before_ms: 0 };
        Self { state, split, next_attempt: 0, failures: 0, losses: 0, failed_on: BTreeSet::new() }
    }

    fn attempt(&self) -> Option<&Attempt> {
        match &self.state {
            State::Waiting { .. } => None,
            State::Running(attempt) | State::Committing(attempt, _) | State::Done(attempt, _) => Some(attempt),
        }
    }
}

impl Scheduler {
    /// A job of these maps and so many reduces on these nodes.
    pub fn new(job_id: &str, splits: Vec<PlannedSplit>, reduces: u32, nodes: Vec<NodeInfo>) -> Self {
        let node = |info: NodeInfo| (info.id.clone(), Node { info, used: 0, not_before_ms: 0, failures: 0 });
        Self {
            job_id: job_id.to_owned(),
            maps: splits.into_iter().map(|split| Task::new(Some(split))).collect(),
            reduces: (0..reduces).map(|_| Task::new(None)).collect(),
            nodes: nodes.into_iter().map(node).collect(),
            failed: None,
            stderr_tail: String::new(),
            attempts_failed: [0; 2],
            maps_done: 0,
            reduces_done: 0,
            idle_since_ms: None,
        }
    }

    fn task(&mut self, task: &pb::TaskId) -> Option<&mut Task> {
        match task.kind() {
            TaskKind::Map => self.maps.get_mut(task.index as usize),
            TaskKind::Reduce => self.reduces.get_mut(task.index as usize),
        }
    }

    /// A node.
    pub fn node(&self, id: &str) -> Option<&NodeInfo> {
        self.nodes.get(id).map(|node| &node.info)
    }

    /// How the job stands.
    pub fn standing(&self) -> Standing {
        if let Some(error) = &self.failed {
            return Standing::Failed(error.clone());
        }
        if self.maps_done == self.maps.len() && self.reduces_done == self.reduces.len() {
            return Standing::AllDone;
        }
        // When all reduces are done, no map output is needed any more.
        if !self.reduces.is_empty() && self.reduces_done == self.reduces.len() {
            return Standing::AllDone;
        }
        Standing::Running
    }

    /// Standard error of the attempt that failed the job.
    pub fn stderr_tail(&self) -> &str {
        &self.stderr_tail
    }

    /// Failed attempts of maps and of reduces.
    pub fn attempts_failed(&self) -> (u32, u32) {
        (self.attempts_failed[0], self.attempts_failed[1])
    }

    /// Maps done, reduces done.
    pub fn done(&self) -> (u32, u32) {
        (self.maps_done as u32, self.reduces_done as u32)
    }

    /// All maps are done.
    pub fn maps_are_done(&self) -> bool {
        self.maps_done == self.maps.len()
    }

    /// Attempts under way or done, with their tasks, for reports.
    pub fn attempts(
        &self,
    ) -> impl Iterator<Item = (TaskRef, &Attempt, Option<&PlannedSplit>, Option<&pb::TaskSuccess>)> {
        let maps = self.maps.iter().zip(0..).map(|(task, index)| ((TaskKind::Map, index), task));
        let reduces = self.reduces.iter().zip(0..).map(|(task, index)| ((TaskKind::Reduce, index), task));
        maps.chain(reduces).filter_map(|(name, task)| {
            let success = match &task.state {
                State::Done(_, success) => Some(success),
                _ => None,
            };
            Some((name, task.attempt()?, task.split.as_ref(), success))
        })
    }

    /// The split of a map.
    pub fn split(&self, index: u32) -> Option<&pb::Split> {
        self.maps.get(index as usize)?.split.as_ref().map(|planned| &planned.split)
    }

    /// Where the outputs of all maps are; for a reduce about to start.
    pub fn map_outputs(&self) -> Vec<pb::MapOutputLocation> {
        let located = |(task, index): (&Task, u32)| {
            let State::Done(attempt, _) = &task.state else { return None };
            let node = self.nodes.get(&attempt.node)?;
            Some(pb::MapOutputLocation {
                map_index: index,
                attempt: attempt.number,
                node_id: attempt.node.clone(),
                address: node.info.address.clone(),
            })
        };
        self.maps.iter().zip(0..).filter_map(located).collect()
    }

    /// Gives free slots to waiting tasks.
    pub fn assign(&mut self, now_ms: u64) -> Vec<Assignment> {
        let mut out = Vec::new();
        if self.failed.is_some() || self.standing() == Standing::AllDone {
            return out;
        }
        while let Some(assignment) = self.next_local(now_ms) {
            self.idle_since_ms = None;
            out.push(self.launch(assignment));
        }
        if self.nodes.values().any(|node| self.free(node, now_ms)) && !self.maps_are_done() {
            self.idle_since_ms.get_or_insert(now_ms);
        } else {
            self.idle_since_ms = None;
        }
        for index in 0..self.maps.len() {
            if let Some((node, locality)) = self.place_far(index, now_ms) {
                let task = pb::TaskId { kind: TaskKind::Map as i32, index: index as u32, attempt: 0 };
                out.push(self.launch(Assignment { node, task, locality: Some(locality) }));
            }
        }
        if self.maps_are_done() {
            for index in 0..self.reduces.len() {
                let Some(node) = self.place_reduce(index, now_ms) else { continue };
                let task = pb::TaskId { kind: TaskKind::Reduce as i32, index: index as u32, attempt: 0 };
                out.push(self.launch(Assignment { node, task, locality: None }));
            }
        }
        out
    }

    fn launch(&mut self, mut assignment: Assignment) -> Assignment {
        if let Some(node) = self.nodes.get_mut(&assignment.node) {
            node.used += 1;
        }
        let (node, locality) = (assignment.node.clone(), assignment.locality);
        if let Some(task) = self.task(&assignment.task) {
            let number = task.next_attempt;
            task.next_attempt += 1;
            task.state = State::Running(Attempt { number, node, locality, bytes: 0 });
            assignment.task.attempt = number;
        }
        assignment
    }

    fn free(&self, node: &Node, now_ms: u64) -> bool {
        node.used < node.info.slots && node.not_before_ms <= now_ms
    }

    /// May a task that failed on some nodes run on this one? Where it failed it may run again only if there is no other.
    fn allowed(&self, task: &Task, id: &str) -> bool {
        !task.failed_on.contains(id) || self.nodes.keys().all(|other| task.failed_on.contains(other))
    }

    fn is_due(task: &Task, now_ms: u64) -> bool {
        matches!(task.state, State::Waiting { not_before_ms } if not_before_ms <= now_ms)
    }

    /// Of the maps that a free node could run beside their block the one with the fewest places to choose from, on the least busy of them.
    fn next_local(&self, now_ms: u64) -> Option<Assignment> {
        let mut best: Option<(usize, u32, usize, &str)> = None;
        for (index, task) in self.maps.iter().enumerate() {
            if !Self::is_due(task, now_ms) {
                continue;
            }
            let Some(split) = &task.split else { continue };
            let usable = |id: &&String| {
                let free = self.nodes.get(*id).is_some_and(|node| self.free(node, now_ms));
                free && self.allowed(task, id)
            };
            let choices: Vec<&String> = split.nodes.iter().filter(usable).collect();
            let used = |id: &str| self.nodes.get(id).map_or(0, |node| node.used);
            let Some(node) = choices.iter().min_by_key(|id| used(id)) else { continue };
            let rank = (choices.len(), used(node), index, node.as_str());
            if best.is_none_or(|best| rank < best) {
                best = Some(rank);
            }
            if rank.0 == 1 && rank.1 == 0 {
                break;
            }
        }
        let (_, _, index, node) = best?;
        let task = pb::TaskId { kind: TaskKind::Map as i32, index: index as u32, attempt: 0 };
        Some(Assignment { node: node.to_owned(), task, locality: Some(Locality::Node) })
    }

    /// A node without the block for a map that has waited long enough, or that has no other.
    fn place_far(&self, index: usize, now_ms: u64) -> Option<(String, Locality)> {
        let task = self.maps.get(index)?;
        let waited =
            self.idle_since_ms.map(|since| now_ms.saturating_sub(since)).filter(|_| Self::is_due(task, now_ms))?;
        let split = task.split.as_ref()?;
        let reachable = |id: &String| {
            let usable = self
                .nodes
                .get(id)
                .is_some_and(|node| node.info.slots > 0 && node.not_before_ms <= now_ms + ANY_DELAY_MS);
            usable && self.allowed(task, id)
        };
        let hopeless = !split.nodes.iter().any(reachable);
        let mut best: Option<(Locality, u32, &str)> = None;
        for (id, node) in &self.nodes {
            if !self.free(node, now_ms) || !self.allowed(task, id) {
                continue;
            }
            let near = split.racks.contains(&node.info.rack);
            let locality = if near { Locality::Rack } else { Locality::Remote };
            let patience = if near { RACK_DELAY_MS } else { ANY_DELAY_MS };
            if (hopeless || waited >= patience) && best.is_none_or(|best| (locality, node.used, id.as_str()) < best) {
                best = Some((locality, node.used, id));
            }
        }
        best.map(|(locality, _, id)| (id.to_owned(), locality))
    }

    fn place_reduce(&self, index: usize, now_ms: u64) -> Option<String> {
        let task = self.reduces.get(index)?;
        if !Self::is_due(task, now_ms) {
            return None;
        }
        let usable = self.nodes.iter().filter(|(id, node)| self.free(node, now_ms) && self.allowed(task, id));
        usable.min_by_key(|(id, node)| (node.used, *id)).map(|(id, _)| id.clone())
    }

    /// When [`Self::assign`] may find something new without anything happening.
    pub fn next_look_ms(&self, now_ms: u64) -> Option<u64> {
        let reduces = if self.maps_are_done() { &self.reduces[..] } else { &[] };
        let due = self.maps.iter().chain(reduces).filter_map(|task| match task.state {
            State::Waiting { not_before_ms } => Some(not_before_ms),
            _ => None,
        });
        let mut due = due.peekable();
        due.peek()?;
        let patience = self.idle_since_ms.into_iter().flat_map(|since| [since + RACK_DELAY_MS, since + ANY_DELAY_MS]);
        let nodes = self.nodes.values().map(|node| node.not_before_ms);
        due.chain(patience).chain(nodes).filter(|at| *at > now_ms).min()
    }

    /// The attempt that runs as `task` on `node`, if it is still the one that counts.
    fn running(&mut self, node: &str, task: &pb::TaskId) -> Option<&mut Attempt> {
        match &mut self.task(task)?.state {
            State::Running(attempt) if attempt.number == task.attempt && attempt.node == node => Some(attempt),
            _ => None,
        }
    }

    fn release(&mut self, node: &str) {
        if let Some(node) = self.nodes.get_mut(node) {
            node.used = node.used.saturating_sub(1);
        }
    }

    /// An attempt told how far it is. False if it was given up: it runs for nothing.
    pub fn progress(&mut self, node: &str, task: &pb::TaskId, bytes: u64) -> bool {
        match self.running(node, task) {
            Some(attempt) => {
                attempt.bytes = bytes;
                true
            }
            None => false,
        }
    }

    /// The node has no free slot after all (another job has them).
    pub fn refused(&mut self, node: &str, task: &pb::TaskId, now_ms: u64) {
        if self.running(node, task).is_none() {
            return;
        }
        self.release(node);
        if let Some(node) = self.nodes.get_mut(node) {
            node.not_before_ms = now_ms + BUSY_DELAY_MS;
        }
        if let Some(task) = self.task(task) {
            task.state = State::Waiting { not_before_ms: now_ms };
        }
    }

    /// An attempt ended well.
    pub fn succeeded(&mut self, node: &str, id: &pb::TaskId, success: pb::TaskSuccess) -> AfterSuccess {
        let Some(attempt) = self.running(node, id).cloned() else { return AfterSuccess::Ignore };
        self.release(node);
        if let Some(node) = self.nodes.get_mut(node) {
            node.failures = 0;
        }
        let commit = id.kind() == TaskKind::Reduce || self.reduces.is_empty();
        let Some(task) = self.task(id) else { return AfterSuccess::Ignore };
        if commit {
            task.state = State::Committing(attempt, success);
            return AfterSuccess::Commit;
        }
        task.state = State::Done(attempt, success);
        self.maps_done += 1;
        AfterSuccess::Done
    }

    /// The output of an attempt has its name.
    pub fn committed(&mut self, id: &pb::TaskId) {
        let kind = id.kind();
        let Some(task) = self.task(id) else { return };
        let waiting = State::Waiting { not_before_ms: 0 };
        match std::mem::replace(&mut task.state, waiting) {
            State::Committing(attempt, success) => {
                task.state = State::Done(attempt, success);
                match kind {
                    TaskKind::Map => self.maps_done += 1,
                    TaskKind::Reduce => self.reduces_done += 1,
                }
            }
            other => task.state = other,
        }
    }

    /// An attempt ended badly, or its output could not be named.
    pub fn attempt_failed(&mut self, node: &str, id: &pb::TaskId, failure: &pb::TaskFailure, now_ms: u64) {
        let was_running = self.running(node, id).is_some();
        let Some(task) = self.task(id) else { return };
        let counts = match &task.state {
            State::Running(attempt) | State::Committing(attempt, _) => {
                attempt.number == id.attempt && attempt.node == node
            }
            _ => false,
        };
        if !counts {
            return;
        }
        task.state = State::Waiting { not_before_ms: now_ms };
        if was_running {
            self.release(node);
        }
        let error = failure
            .error
            .clone()
            .map_or_else(|| Error::new(ErrorCode::TaskFailed, "the task failed without a reason"), Error::from_wire);
        if !failure.lost.is_empty() {
            for lost in &failure.lost {
                self.output_lost(lost.map_index, lost.attempt, &error, now_ms);
            }
            return;
        }
        self.count_failure(node, id, error, &failure.stderr_tail, now_ms);
    }

    fn count_failure(&mut self, node: &str, id: &pb::TaskId, error: Error, tail: &str, now_ms: u64) {
        self.attempts_failed[usize::from(id.kind() == TaskKind::Reduce)] += 1;
        if let Some(node) = self.nodes.get_mut(node) {
            node.failures += 1;
            if node.failures >= NODE_FAILURES {
                node.not_before_ms = now_ms + AVOID_MS;
            }
        }
        let host = self.node(node).map_or_else(|| node.to_owned(), |node| node.host.clone());
        let job_id = self.job_id.clone();
        let Some(task) = self.task(id) else { return };
        task.failures += 1;
        task.failed_on.insert(node.to_owned());
        let delay_ms = RETRY_DELAY_MS << (task.failures - 1).min(6);
        // Neighbouring tasks that failed together must not come back together.
        let jitter_ms = u64::from(id.index.wrapping_mul(2_654_435_761) >> 16) % (delay_ms / 2);
        task.state = State::Waiting { not_before_ms: now_ms + delay_ms + jitter_ms };
        let failures = task.failures;
        if failures < MAX_ATTEMPTS && !is_final(&error) {
            return;
        }
        let kind = if id.kind() == TaskKind::Reduce { "reduce" } else { "map" };
        let times = if failures == 1 { "once".to_owned() } else { format!("{failures} times") };
        let text = format!("job {job_id}: {kind} {} failed {times}, at last on {host}: {}", id.index, error.message());
        self.stderr_tail = tail.to_owned();
        self.failed.get_or_insert(Error::new(ErrorCode::JobFailed, text).with_subject(job_id));
    }

    /// A map's output cannot be fetched: the map runs again.
    fn output_lost(&mut self, index: u32, attempt: u32, error: &Error, now_ms: u64) {
        let Some(task) = self.maps.get_mut(index as usize) else { return };
        let State::Done(done, _) = &task.state else { return };
        if done.number != attempt {
            return;
        }
        task.losses += 1;
        let losses = task.losses;
        task.state = State::Waiting { not_before_ms: now_ms };
        self.maps_done -= 1;
        self.attempts_failed[0] += 1;
        if losses > MAX_OUTPUT_LOSSES {
            let text =
                format!("job {}: the output of map {index} was lost {losses} times, at last: {error}", self.job_id);
            self.failed.get_or_insert(Error::new(ErrorCode::JobFailed, text).with_subject(self.job_id.clone()));
        }
    }

    /// A node is gone: what runs there starts again elsewhere, and so do maps whose outputs it held, if they are still needed.
    pub fn node_lost(&mut self, id: &str, why: &Error, now_ms: u64) {
        let Some(node) = self.nodes.get_mut(id) else { return };
        node.used = 0;
        node.not_before_ms = now_ms + AVOID_MS;
        let waiting = || State::Waiting { not_before_ms: now_ms };
        for (kind, tasks) in [&mut self.maps, &mut self.reduces].into_iter().enumerate() {
            for task in tasks {
                if matches!(&task.state, State::Running(attempt) if attempt.node == id) {
                    task.state = waiting();
                    self.attempts_failed[kind] += 1;
                }
            }
        }
        if self.reduces.is_empty() || self.reduces_done == self.reduces.len() {
            return;
        }
        let held = |(task, index): (&Task, u32)| match &task.state {
            State::Done(attempt, _) if attempt.node == id => Some((index, attempt.number)),
            _ => None,
        };
        let lost: Vec<(u32, u32)> = self.maps.iter().zip(0..).filter_map(held).collect();
        for (index, attempt) in lost {
            self.output_lost(index, attempt, why, now_ms);
        }
    }
}

/// Would another attempt end in the same way?
fn is_final(error: &Error) -> bool {
    matches!(error.code(), ErrorCode::InvalidArgument | ErrorCode::PermissionDenied | ErrorCode::StaleEpoch)
}

#[cfg(test)]
#[path = "scheduler_tests.rs"]
mod tests;

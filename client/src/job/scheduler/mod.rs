//! Which task runs where, and what follows from each end: the pure core of the driver.
//!
//! It does no I/O and reads no clock: the driver tells it what happened and when, and carries out what it says.
//!
//! ```text
//! task:   waiting ──assign──▶ running ──success──▶ committing ──committed──▶ done
//!            ▲                 │    ▲ second attempt    │                       │
//!            └──failure, refusal, node lost─────────────┴──map output lost──────┘
//! job:    maps (all done) ──▶ reduces (all done) ──▶ succeeded;   a task that failed too often ──▶ failed
//! ```
//!
//! Reduces start when all maps are done, or earlier into slots that no map wants ([`early`]). A map whose output was lost goes back to waiting, and
//! reduces are not started until it runs again; those that run go on, and fail on their own if they need it. Reduces do not count such an end as a
//! failure of theirs.
//!
//! Placement is in [`assign`], what follows from ends in [`ends`], what is known of a node in [`nodes`], second attempts in [`speculate`].

mod assign;
mod early;
#[cfg(test)]
mod early_tests;
mod ends;
mod nodes;
mod speculate;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use cairn_proto::pb::{self, TaskKind};
use cairn_proto::{Error, ErrorCode};

use super::poison::Poison;
use super::report::Locality;
use super::spec::MAX_ATTEMPTS;
use super::splits::PlannedSplit;
use nodes::{Asking, Node};

pub use early::Feed;

#[cfg(test)]
use assign::{ANY_DELAY_MS, RACK_DELAY_MS};

/// Attempts of each driver of a job are numbered from so many times its epoch (less one) on, so that none is used twice.
pub const ATTEMPTS_PER_EPOCH: u32 = 1_000;

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

/// Which task, without the attempt.
pub type TaskRef = (TaskKind, u32);
/// Which attempt: kind, index, number.
pub type AttemptKey = (i32, u32, u32);

fn key_of(task: &pb::TaskId) -> AttemptKey {
    (task.kind, task.index, task.attempt)
}

fn task_id(kind: TaskKind, index: u32) -> pb::TaskId {
    pb::TaskId { kind: kind as i32, index, attempt: 0 }
}

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
    /// When it was started.
    pub started_ms: u64,
    /// When `bytes` last grew.
    progress_ms: u64,
    /// Of a reduce that started before all maps were done: of how many outputs, in the order in which they came about, it was told.
    lacks_from: Option<usize>,
}

enum State {
    Waiting,
    /// One attempt, or a second one beside it.
    Running(Vec<Attempt>),
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
    /// Nodes that keep the content of its split.
    kept_on: BTreeSet<String>,
    /// Nodes that miss something that it needs.
    missing_on: u32,
    poison: Poison,
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
    /// Tasks that wait for a slot beside it.
    pub backlog: u32,
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

/// What does not change while the job runs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rules {
    /// For messages.
    pub job_id: String,
    /// Number of reduces.
    pub reduces: u32,
    /// Attempts of a task before the job fails.
    pub max_attempts: u32,
    /// Second attempts of tasks that lag.
    pub speculative: bool,
    /// Records that a map may leave out because its workers die on them.
    pub may_skip: u64,
    /// Thousandths of the maps that are done before reduces start into slots that no map wants; 1000: all of them.
    pub slow_start: u32,
    /// Number of the first attempt of each task that this driver starts; lower ones are of drivers before it.
    pub first_attempt: u32,
}

impl Rules {
    /// The usual ones.
    pub fn new(job_id: &str, reduces: u32) -> Self {
        let job_id = job_id.to_owned();
        let (max_attempts, speculative, slow_start) = (MAX_ATTEMPTS, true, 1_000);
        Self { job_id, reduces, max_attempts, speculative, may_skip: 0, slow_start, first_attempt: 0 }
    }
}

/// See the module.
pub struct Scheduler {
    rules: Rules,
    maps: Vec<Task>,
    reduces: Vec<Task>,
    nodes: BTreeMap<String, Node>,
    /// Tasks that may be started now; maps also stand at the nodes that hold their block.
    due: BTreeSet<(TaskKind, u32)>,
    /// Tasks that may be started later, by when.
    later: BTreeSet<(u64, TaskKind, u32)>,
    failed: Option<Error>,
    stderr_tail: String,
    /// Failed attempts: maps, reduces.
    attempts_failed: [u32; 2],
    maps_done: usize,
    /// When the last of the maps was done.
    maps_done_ms: u64,
    reduces_done: usize,
    /// Maps in the order in which they were done; one that was done again is in it twice.
    outputs_in_order: Vec<u32>,
    /// Reduces that run and have not been told of all outputs.
    early: BTreeSet<u32>,
    /// When those were last told.
    fed_ms: u64,
    /// Early reduces that gave up their slots, until these are free.
    yielding: BTreeSet<(String, AttemptKey)>,
    /// Attempts that ended well, on all nodes.
    successes: u64,
    /// Since when a slot could be had if locality did not matter.
    idle_since_ms: Option<u64>,
    /// Since when maps are left alone that other nodes keep the content of; past a while they are no more.
    held_back_since_ms: Option<u64>,
    /// Attempts that run for nothing.
    to_kill: Vec<(String, pb::TaskId)>,
}

impl Task {
    fn new(split: Option<PlannedSplit>, first_attempt: u32) -> Self {
        let (failures, losses, failed_on, missing_on) = (0, 0, BTreeSet::new(), 0);
        let (state, poison) = (State::Waiting, Poison::default());
        let kept_on = BTreeSet::new();
        Self { state, split, next_attempt: first_attempt, failures, losses, failed_on, kept_on, missing_on, poison }
    }

    fn attempt(&self) -> Option<&Attempt> {
        match &self.state {
            State::Waiting => None,
            State::Running(attempts) => attempts.first(),
            State::Committing(attempt, _) | State::Done(attempt, _) => Some(attempt),
        }
    }
}

impl Scheduler {
    /// A job of these maps on these nodes.
    pub fn new(rules: Rules, splits: Vec<PlannedSplit>, nodes: Vec<NodeInfo>) -> Self {
        let first = rules.first_attempt;
        let mut scheduler = Self {
            maps: splits.into_iter().map(|split| Task::new(Some(split), first)).collect(),
            reduces: (0..rules.reduces).map(|_| Task::new(None, first)).collect(),
            nodes: nodes.into_iter().map(|info| (info.id.clone(), Node::new(info))).collect(),
            rules,
            due: BTreeSet::new(),
            later: BTreeSet::new(),
            failed: None,
            stderr_tail: String::new(),
            attempts_failed: [0; 2],
            maps_done: 0,
            maps_done_ms: 0,
            reduces_done: 0,
            outputs_in_order: Vec::new(),
            early: BTreeSet::new(),
            fed_ms: 0,
            yielding: BTreeSet::new(),
            successes: 0,
            idle_since_ms: None,
            held_back_since_ms: None,
            to_kill: Vec::new(),
        };
        for index in 0..scheduler.maps.len() as u32 {
            scheduler.make_due(TaskKind::Map, index);
        }
        for index in 0..scheduler.reduces.len() as u32 {
            scheduler.make_due(TaskKind::Reduce, index);
        }
        scheduler
    }

    fn tasks(&mut self, kind: TaskKind) -> &mut Vec<Task> {
        match kind {
            TaskKind::Map => &mut self.maps,
            TaskKind::Reduce => &mut self.reduces,
        }
    }

    fn task(&mut self, task: &pb::TaskId) -> Option<&mut Task> {
        self.tasks(task.kind()).get_mut(task.index as usize)
    }

    /// A node.
    pub fn node(&self, id: &str) -> Option<&NodeInfo> {
        self.nodes.get(id).map(|node| &node.info)
    }

    /// All nodes.
    pub fn node_ids(&self) -> Vec<String> {
        self.nodes.keys().cloned().collect()
    }

    /// How the job stands.
    pub fn standing(&self) -> Standing {
        if let Some(error) = &self.failed {
            return Standing::Failed(error.clone());
        }
        // When all reduces are done, no map output is needed any more.
        let done = if self.reduces.is_empty() {
            self.maps_done == self.maps.len()
        } else {
            self.reduces_done == self.reduces.len()
        };
        if done { Standing::AllDone } else { Standing::Running }
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

    /// Does the accepted attempt of such a task write the job's output?
    pub fn writes_output(&self, kind: TaskKind) -> bool {
        kind == TaskKind::Reduce || self.reduces.is_empty()
    }

    /// How near to its block the map attempt ran that was accepted.
    pub fn locality(&self, task: &pb::TaskId) -> Option<Locality> {
        let tasks = if task.kind() == TaskKind::Map { &self.maps } else { &self.reduces };
        tasks.get(task.index as usize)?.attempt()?.locality
    }

    /// Attempts under way or done (of a task with two the first), with their tasks, for reports.
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

    /// Records that the next attempt of a map is to leave out.
    pub fn condemned(&self, index: u32) -> &[u64] {
        self.maps.get(index as usize).map_or(&[], |task| task.poison.condemned())
    }

    /// The split of a map.
    pub fn split(&self, index: u32) -> Option<&pb::Split> {
        self.maps.get(index as usize)?.split.as_ref().map(|planned| &planned.split)
    }

    /// Where the outputs of all maps are; for a reduce about to start.
    pub fn map_outputs(&self) -> Vec<pb::MapOutputLocation> {
        (0..self.maps.len() as u32).filter_map(|index| self.map_output(index)).collect()
    }

    fn map_output(&self, map_index: u32) -> Option<pb::MapOutputLocation> {
        let State::Done(attempt, _) = &self.maps.get(map_index as usize)?.state else { return None };
        let address = self.nodes.get(&attempt.node)?.info.address.clone();
        Some(pb::MapOutputLocation { map_index, attempt: attempt.number, node_id: attempt.node.clone(), address })
    }

    /// The task may be started now.
    fn make_due(&mut self, kind: TaskKind, index: u32) {
        self.due.insert((kind, index));
        if kind == TaskKind::Map {
            self.at_local_nodes(index, true);
        }
    }

    /// The task must not be started any more.
    fn take_from_due(&mut self, kind: TaskKind, index: u32) {
        if self.due.remove(&(kind, index)) && kind == TaskKind::Map {
            self.at_local_nodes(index, false);
        }
        self.later.retain(|(_, other, at)| (*other, *at) != (kind, index));
    }

    fn at_local_nodes(&mut self, index: u32, stands: bool) {
        let Some(split) = self.maps.get(index as usize).and_then(|task| task.split.as_ref()) else { return };
        for id in &split.nodes {
            if let Some(node) = self.nodes.get_mut(id) {
                if stands {
                    node.local.insert(index);
                } else {
                    node.local.remove(&index);
                }
            }
        }
    }

    /// The task waits, until then at least.
    fn wait(&mut self, kind: TaskKind, index: u32, not_before_ms: u64, now_ms: u64) {
        if let Some(task) = self.tasks(kind).get_mut(index as usize) {
            task.state = State::Waiting;
        }
        if not_before_ms <= now_ms {
            self.make_due(kind, index);
        } else {
            self.later.insert((not_before_ms, kind, index));
        }
    }

    /// Is there a task of this kind that no attempt works on?
    fn anything_waits(&self, kind: TaskKind) -> bool {
        self.due.range((kind, 0)..=(kind, u32::MAX)).next().is_some()
            || self.later.iter().any(|(_, other, _)| *other == kind)
    }

    /// Attempts that run for nothing since this was last asked; the driver kills them.
    pub fn take_kills(&mut self) -> Vec<(String, pb::TaskId)> {
        std::mem::take(&mut self.to_kill)
    }

    // ---- a driver that takes over

    /// A driver before this one had accepted this attempt, and its output is in place.
    pub fn restore(&mut self, accepted: &pb::TaskAccepted) {
        let (Some(id), Some(success)) = (accepted.task, accepted.success.clone()) else { return };
        let locality = [None, Some(Locality::Node), Some(Locality::Rack), Some(Locality::Remote)];
        let attempt = Attempt {
            number: id.attempt,
            node: accepted.node_id.clone(),
            locality: locality.get(accepted.locality as usize).copied().flatten(),
            bytes: 0,
            started_ms: 0,
            progress_ms: 0,
            lacks_from: None,
        };
        let Some(task) = self.task(&id).filter(|task| matches!(task.state, State::Waiting)) else { return };
        task.state = State::Done(attempt, success);
        self.take_from_due(id.kind(), id.index);
        match id.kind() {
            TaskKind::Map => self.map_done(id.index, 0),
            TaskKind::Reduce => self.reduces_done += 1,
        }
    }

    fn map_done(&mut self, index: u32, now_ms: u64) {
        self.maps_done += 1;
        self.outputs_in_order.push(index);
        if self.maps_are_done() {
            self.maps_done_ms = now_ms;
        }
    }

    /// Attempts failed before this driver.
    pub fn restore_failures(&mut self, maps: u32, reduces: u32) {
        self.attempts_failed = [maps, reduces];
    }

    /// A node that had outputs is no node of the cluster any more.
    pub fn node_gone(&mut self, node_id: &str, now_ms: u64) {
        if self.nodes.contains_key(node_id) || self.reduces.is_empty() || self.reduces_done == self.reduces.len() {
            return;
        }
        let error = Error::new(ErrorCode::Unreachable, format!("node {node_id} has left the cluster"));
        self.outputs_lost(node_id, &error, now_ms, |_, _| true);
    }

    /// What a node holds of the job, as it says when the driver registers there: outputs that it does not hold are lost, attempts that run
    /// for drivers before this one go on for it.
    pub fn registered(&mut self, node_id: &str, held: &[pb::TaskId], running: &[pb::TaskId], now_ms: u64) {
        if self.rules.first_attempt == 0 {
            return;
        }
        let held: BTreeSet<(u32, u32)> = held.iter().map(|task| (task.index, task.attempt)).collect();
        if !self.reduces.is_empty() && self.reduces_done < self.reduces.len() {
            let error = Error::new(ErrorCode::FileNotFound, "the node does not hold it any more");
            self.outputs_lost(node_id, &error, now_ms, |index, attempt| !held.contains(&(index, attempt)));
        }
        for id in running {
            self.adopt(node_id, id, now_ms);
        }
    }

    /// An attempt of a driver before this one becomes one of ours, if its task waits.
    fn adopt(&mut self, node_id: &str, id: &pb::TaskId, now_ms: u64) -> bool {
        let locality = (id.kind() == TaskKind::Map).then(|| self.locality_of(id.index, node_id));
        let number = id.attempt;
        // What a reduce was told is not known: it hears everything anew.
        let lacks_from = (id.kind() == TaskKind::Reduce).then_some(0);
        let node = node_id.to_owned();
        let (started_ms, progress_ms) = (now_ms, now_ms);
        let attempt = Attempt { number, node, locality, bytes: 0, started_ms, progress_ms, lacks_from };
        if number >= self.rules.first_attempt {
            return false;
        }
        match self.task(id) {
            Some(task) if matches!(task.state, State::Waiting) => task.state = State::Running(vec![attempt]),
            _ => {
                self.to_kill.push((node_id.to_owned(), *id));
                return false;
            }
        }
        self.take_from_due(id.kind(), id.index);
        if id.kind() == TaskKind::Reduce {
            self.early.insert(id.index);
        }
        if let Some(node) = self.nodes.get_mut(node_id) {
            node.attempts.insert(key_of(id));
        }
        true
    }

    /// How near a node is to a map's block.
    fn locality_of(&self, index: u32, node_id: &str) -> Locality {
        let split = self.maps.get(index as usize).and_then(|task| task.split.as_ref());
        let rack = self.nodes.get(node_id).map(|node| &node.info.rack);
        match split {
            Some(split) if split.nodes.iter().any(|id| id == node_id) => Locality::Node,
            Some(split) if rack.is_some_and(|rack| split.racks.contains(rack)) => Locality::Rack,
            _ => Locality::Remote,
        }
    }

    /// The node keeps slots for the job.
    pub fn offered(&mut self, node_id: &str, slots: u32) {
        if let Some(node) = self.nodes.get_mut(node_id) {
            node.asking = Asking::Offered { slots };
        }
    }

    /// Nodes at which the job waits for slots that it can no longer use.
    pub fn withdrawals(&mut self) -> Vec<String> {
        let idle = !self.anything_waits(TaskKind::Map)
            && (!self.reduces_may_start() || !self.anything_waits(TaskKind::Reduce));
        let asks = |node: &Node| !matches!(node.asking, Asking::No);
        if !idle || !self.nodes.values().any(asks) {
            return Vec::new();
        }
        let asking = self.nodes.iter_mut().filter(|(_, node)| asks(node));
        let withdraw = |(id, node): (&String, &mut Node)| {
            node.asking = Asking::No;
            id.clone()
        };
        asking.map(withdraw).collect()
    }
}

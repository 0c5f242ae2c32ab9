//! What follows from the ends of attempts.

use cairn_proto::pb::{self, TaskKind};
use cairn_proto::{Error, ErrorCode};

use super::nodes::Asking;
use super::{AfterSuccess, Attempt, Scheduler, State, key_of};

/// First pause before a failed task is tried again; doubled each time.
const RETRY_DELAY_MS: u64 = 200;
/// A map whose output is lost this often points at something worse than a dying node.
const MAX_OUTPUT_LOSSES: u32 = 8;
/// What one node misses another may have; what two of them miss, all do.
const MISSING_NODES: u32 = 2;

/// Would another attempt end in the same way, wherever it ran?
fn is_final(error: &Error, input: Option<&str>) -> bool {
    match error.code() {
        ErrorCode::InvalidArgument | ErrorCode::PermissionDenied | ErrorCode::StaleEpoch => true,
        // The input itself, not something on the node.
        ErrorCode::FileNotFound => input.is_some_and(|input| input == error.subject()),
        _ => false,
    }
}

fn is_it(attempt: &Attempt, node: &str, id: &pb::TaskId) -> bool {
    attempt.number == id.attempt && attempt.node == node
}

impl Scheduler {
    /// The attempt that runs as `task` on `node`, if it is one that counts.
    pub(super) fn running(&mut self, node: &str, id: &pb::TaskId) -> Option<&mut Attempt> {
        match &mut self.task(id)?.state {
            State::Running(attempts) => attempts.iter_mut().find(|attempt| is_it(attempt, node, id)),
            _ => None,
        }
    }

    /// The attempt holds no slot any more.
    fn release(&mut self, node: &str, id: &pb::TaskId) {
        if let Some(held) = self.nodes.get_mut(node) {
            held.attempts.remove(&key_of(id));
        }
        self.yielded(node, key_of(id));
    }

    /// Takes an attempt off its task; true if it counted. The task waits if it was the only one.
    fn take_off(&mut self, node: &str, id: &pb::TaskId, not_before_ms: u64, now_ms: u64) -> bool {
        self.release(node, id);
        let Some(task) = self.task(id) else { return false };
        let (counted, alone) = match &mut task.state {
            State::Running(attempts) => {
                let before = attempts.len();
                attempts.retain(|attempt| !is_it(attempt, node, id));
                (attempts.len() < before, attempts.is_empty())
            }
            State::Committing(attempt, _) => (is_it(attempt, node, id), true),
            _ => (false, false),
        };
        if counted && alone {
            self.wait(id.kind(), id.index, not_before_ms, now_ms);
        }
        counted
    }

    /// An attempt told how far it is. False if it was given up: it runs for nothing.
    pub fn progress(&mut self, node: &str, task: &pb::TaskId, bytes: u64, now_ms: u64) -> bool {
        match self.running(node, task) {
            Some(attempt) => {
                if bytes > attempt.bytes {
                    (attempt.bytes, attempt.progress_ms) = (bytes, now_ms);
                }
                true
            }
            None => false,
        }
    }

    /// The node has no free slot after all (another job has them); it says when it is our turn.
    pub fn refused(&mut self, node: &str, id: &pb::TaskId, now_ms: u64) {
        self.take_off(node, id, now_ms, now_ms);
        // It was not started, so its number is free; on a busy cluster there would else be no end of them.
        if let Some(task) = self.task(id).filter(|task| task.next_attempt == id.attempt + 1) {
            task.next_attempt = id.attempt;
        }
        // An offer that came since the attempt was launched is for it, though the refusal was heard later.
        let node = self.nodes.get_mut(node).filter(|node| !matches!(node.asking, Asking::Offered { .. }));
        if let Some(node) = node {
            node.asking = Asking::Waiting { since_ms: now_ms };
        }
    }

    /// An attempt ended well.
    pub fn succeeded(&mut self, node: &str, id: &pb::TaskId, success: pb::TaskSuccess, now_ms: u64) -> AfterSuccess {
        if self.running(node, id).is_none() && !self.adopt_ended(node, id, now_ms) {
            self.release(node, id);
            return AfterSuccess::Ignore;
        }
        let Some(attempt) = self.running(node, id).cloned() else { return AfterSuccess::Ignore };
        self.release(node, id);
        self.successes += 1;
        if let Some(node) = self.nodes.get_mut(node) {
            node.succeeded();
        }
        let commit = self.writes_output(id.kind());
        let Some(task) = self.task(id) else { return AfterSuccess::Ignore };
        let next = if commit { State::Committing(attempt, success) } else { State::Done(attempt, success) };
        if let State::Running(attempts) = std::mem::replace(&mut task.state, next) {
            let others = attempts.into_iter().filter(|other| other.number != id.attempt);
            let lost = others.map(|other| (other.node, pb::TaskId { attempt: other.number, ..*id }));
            self.to_kill.extend(lost);
        }
        if commit {
            return AfterSuccess::Commit;
        }
        self.map_done(id.index, now_ms);
        AfterSuccess::Done
    }

    /// An attempt of an earlier driver that ended while there was none.
    fn adopt_ended(&mut self, node: &str, id: &pb::TaskId, now_ms: u64) -> bool {
        let waits = self.task(id).is_some_and(|task| matches!(task.state, State::Waiting));
        waits && id.attempt < self.rules.first_attempt && self.adopt(node, id, now_ms)
    }

    /// The output of an attempt has its name.
    pub fn committed(&mut self, id: &pb::TaskId) {
        let kind = id.kind();
        let Some(task) = self.task(id) else { return };
        match std::mem::replace(&mut task.state, State::Waiting) {
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

    /// An attempt ended badly, or its output could not be named. True if it counts as a failure of its task.
    pub fn attempt_failed(&mut self, node: &str, id: &pb::TaskId, failure: &pb::TaskFailure, now_ms: u64) -> bool {
        let error = failure
            .error
            .clone()
            .map_or_else(|| Error::new(ErrorCode::TaskFailed, "the task failed without a reason"), Error::from_wire);
        let blamed = failure.lost.is_empty() && !failure.preempted && !failure.killed;
        let not_before_ms = if blamed { now_ms + self.pause_ms(id) } else { now_ms };
        if !self.take_off(node, id, not_before_ms, now_ms) {
            return false;
        }
        for lost in &failure.lost {
            self.output_lost(lost.map_index, lost.attempt, &error, now_ms);
        }
        if blamed {
            let may_skip = self.rules.may_skip;
            if let Some(task) = self.task(id)
                && task.poison.died(failure.position.as_ref(), may_skip)
            {
                task.failures = 0;
            }
            self.count_failure(node, id, error, &failure.stderr_tail, now_ms);
        }
        blamed
    }

    /// How long a task that fails now waits: longer each time, and neighbours that failed together do not come back together.
    fn pause_ms(&mut self, id: &pb::TaskId) -> u64 {
        let failures = self.task(id).map_or(0, |task| task.failures);
        let delay_ms = RETRY_DELAY_MS << failures.min(6);
        delay_ms + u64::from(id.index.wrapping_mul(2_654_435_761) >> 16) % (delay_ms / 2)
    }

    fn count_failure(&mut self, node: &str, id: &pb::TaskId, error: Error, tail: &str, now_ms: u64) {
        self.attempts_failed[usize::from(id.kind() == TaskKind::Reduce)] += 1;
        let successes = self.successes;
        if let Some(node) = self.nodes.get_mut(node) {
            node.failed(successes - node.successes, now_ms);
        }
        let host = self.node(node).map_or_else(|| node.to_owned(), |node| node.host.clone());
        let (job_id, max_attempts) = (self.rules.job_id.clone(), self.rules.max_attempts);
        let nodes = self.nodes.len() as u32;
        let Some(task) = self.task(id) else { return };
        task.failures += 1;
        let first_there = task.failed_on.insert(node.to_owned());
        task.missing_on += u32::from(first_there && error.code() == ErrorCode::FileNotFound);
        let failures = task.failures;
        let input = task.split.as_ref().map(|planned| planned.split.path.as_str());
        let missing = error.code() == ErrorCode::FileNotFound && task.missing_on >= MISSING_NODES.min(nodes);
        if failures < max_attempts && !missing && !is_final(&error, input) {
            return;
        }
        let kind = if id.kind() == TaskKind::Reduce { "reduce" } else { "map" };
        let times = if failures == 1 { "once,".to_owned() } else { format!("{failures} times, at last") };
        let text = format!("job {job_id}: {kind} {} failed {times} on {host}: {}", id.index, error.message());
        if self.failed.is_none() {
            self.stderr_tail = tail.to_owned();
            self.failed = Some(Error::new(ErrorCode::JobFailed, text).with_subject(job_id));
        }
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
        self.wait(TaskKind::Map, index, now_ms, now_ms);
        self.maps_done -= 1;
        self.attempts_failed[0] += 1;
        if losses > MAX_OUTPUT_LOSSES {
            let job_id = &self.rules.job_id;
            let text = format!("job {job_id}: the output of map {index} was lost {losses} times, at last: {error}");
            self.failed.get_or_insert(Error::new(ErrorCode::JobFailed, text).with_subject(job_id));
        }
    }

    /// Of the map outputs that a node held, those that `is_lost` (by map and attempt) names are lost.
    pub(super) fn outputs_lost(&mut self, node_id: &str, why: &Error, now_ms: u64, is_lost: impl Fn(u32, u32) -> bool) {
        let held = |(task, index): (&super::Task, u32)| match &task.state {
            State::Done(attempt, _) if attempt.node == node_id && is_lost(index, attempt.number) => {
                Some((index, attempt.number))
            }
            _ => None,
        };
        let lost: Vec<(u32, u32)> = self.maps.iter().zip(0..).filter_map(held).collect();
        for (index, attempt) in lost {
            self.output_lost(index, attempt, why, now_ms);
        }
    }

    /// A node is gone: what runs there starts again elsewhere, and so do maps whose outputs it held, if they are still needed.
    pub fn node_lost(&mut self, id: &str, why: &Error, now_ms: u64) {
        let Some(node) = self.nodes.get_mut(id) else { return };
        let attempts = node.attempts.clone();
        node.lost(now_ms);
        for (kind, index, attempt) in attempts {
            let task = pb::TaskId { kind, index, attempt };
            if self.take_off(id, &task, now_ms, now_ms) {
                self.attempts_failed[usize::from(task.kind() == TaskKind::Reduce)] += 1;
            }
        }
        if !self.reduces.is_empty() && self.reduces_done < self.reduces.len() {
            self.outputs_lost(id, why, now_ms, |_, _| true);
        }
    }
}

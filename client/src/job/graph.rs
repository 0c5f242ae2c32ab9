//! Jobs that feed each other: each runs as soon as what it reads is there.
//!
//! # Overview
//! A [`JobGraph`] is a set of stages, each a job. A stage comes after those whose output it reads, and after those that it names. Stages that do not depend on each
//! other run side by side and share the slots as any two jobs do. Stages hand over through the file system: the output of each appears by one rename, so what a stage reads is
//! complete. A stage that fails takes those after it along; the others go on.
//!
//! # What is handed on
//! The output of a stage that is marked as [`GraphStage::temporary`] has one replica (unless its job says otherwise), which lies where its reduce ran: the next
//! stage's maps run there and read it from that node's page cache, or from its disk where memory is short. Nothing of it crosses the network, and nothing is kept twice.
//! When a stage fails and such an input of it is no longer whole, the stages that made it run again, back to what is still there, and then that stage.
//!
//! Besides, tasks keep on their nodes, decompressed, what they write for a next stage, and what they read that other stages read, too, as far as there is room
//! ([`super::Keep`]). Later maps run where the content of their split is kept, and take it from there; nothing depends on it.
//!
//! # Resuming
//! The job of stage `k` of graph `G` has the id `G-s<k>`. So the same graph run again under the same id goes on where it was: stages that succeeded are
//! left alone, one whose driver died is resumed ([`super::resume`]), one that failed (or whose output was lost) is tried again under the next id
//! (`G-s<k>-2`, and so on).
//!
//! # Leftovers
//! The output of a temporary stage is deleted when all stages that read it have succeeded.

use std::collections::{BTreeMap, BTreeSet};

use cairn_proto::path::normalize;
use cairn_proto::{Error, ErrorCode, Result};
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use serde::{Deserialize, Serialize};

use super::journal::folder;
use super::report::{JobReport, JobState};
use super::spec::{JobObserver, JobSpec, Keep};
use super::{contact, history, resume, run};
use crate::fs::FileSystem;

/// Stages of a graph, at most.
const MAX_STAGES: usize = 1_000;
/// Jobs that one stage may use up over all runs of its graph.
const MAX_TRIES: u32 = 100;
/// How often a stage's lost output is made again in one run.
const MAX_REMADE: u32 = 3;
/// Replicas of what is handed on from stage to stage.
const HANDED_ON_REPLICATION: u32 = 1;

/// One job of a graph.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GraphStage {
    /// Unique in its graph.
    pub name: String,
    /// The job; its id is chosen by the graph.
    pub spec: JobSpec,
    /// Stages that must be done before, beside those whose output it reads.
    pub after: Vec<String>,
    /// Its output is only for other stages of the graph, and goes when they are done.
    pub temporary: bool,
}

/// See the module.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct JobGraph {
    stages: Vec<GraphStage>,
    /// Nothing is kept on nodes from stage to stage.
    keeps_nothing: bool,
}

/// How a stage ended.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct StageReport {
    /// Its name.
    pub name: String,
    /// What its job reports; none if it was not run.
    pub report: Option<JobReport>,
    /// It had succeeded in an earlier run of the graph.
    pub earlier: bool,
    /// Why there is no report.
    pub why: Option<String>,
    /// How often it was run again in this run of the graph, because its output was lost before all had read it.
    #[serde(default)]
    pub remade: u32,
}

/// A graph that is over.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct GraphReport {
    /// Under this id it can be run again.
    pub id: String,
    /// All stages succeeded, or one did not.
    pub state: JobState,
    /// Of this run.
    pub wall_ms: u64,
    /// In the order in which they were added.
    pub stages: Vec<StageReport>,
}

impl GraphReport {
    /// Bytes of content that tasks found where a stage before had kept them; counted anew with each stage that read them.
    pub fn kept_bytes(&self) -> u64 {
        self.stages.iter().filter_map(|stage| stage.report.as_ref()).map(|report| report.bytes.kept).sum()
    }

    /// Fails with the first stage that did not succeed, and why.
    pub fn check(&self) -> Result<()> {
        let Some(stage) = self.stages.iter().find(|stage| !stage.succeeded()) else { return Ok(()) };
        let of_job = stage.report.as_ref().and_then(|report| report.failure.as_ref()).map(Error::message);
        let why = of_job.or(stage.why.as_deref()).unwrap_or_default();
        Err(Error::new(ErrorCode::JobFailed, format!("graph {}: stage {}: {why}", self.id, stage.name)))
    }
}

impl StageReport {
    fn succeeded(&self) -> bool {
        self.report.as_ref().is_some_and(|report| report.state == JobState::Succeeded)
    }
}

impl JobGraph {
    /// Without stages.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a job that comes after those whose output it reads.
    #[must_use]
    pub fn stage(self, name: &str, spec: JobSpec) -> Self {
        self.with(GraphStage { name: name.to_owned(), spec, after: Vec::new(), temporary: false })
    }

    /// Adds one whose output is only for other stages.
    #[must_use]
    pub fn temporary(self, name: &str, spec: JobSpec) -> Self {
        self.with(GraphStage { name: name.to_owned(), spec, after: Vec::new(), temporary: true })
    }

    /// Adds a stage as it is.
    #[must_use]
    pub fn with(mut self, stage: GraphStage) -> Self {
        self.stages.push(stage);
        self
    }

    /// Has nodes keep nothing from stage to stage.
    #[must_use]
    pub fn keeping_nothing(mut self) -> Self {
        self.keeps_nothing = true;
        self
    }

    /// Runs the graph; `id`: 1 to 40 of `[A-Za-z0-9_-]`, the same again to go on with an earlier run. `observe` gives each stage that starts its observer.
    /// An error means that nothing was run; how stages ended is in the report.
    pub async fn run(
        &self,
        fs: &FileSystem,
        id: &str,
        observe: impl FnMut(&str) -> JobObserver,
    ) -> Result<GraphReport> {
        self.run_with(fs, id, observe, async |_: &str, spec, _: &[StageReport]| Ok(spec)).await
    }

    /// Can it be run? Fails if a stage's name or output is not its own, if it comes after one that there is not, or after itself.
    pub fn check(&self) -> Result<()> {
        Order::of(&self.stages).map(drop)
    }

    /// [`Self::run`], where `refine` makes a stage's whole job of its specification when all that it reads is there: samples can be taken only then. It is
    /// given the reports of the stages that had to come before.
    pub async fn run_with(
        &self,
        fs: &FileSystem,
        id: &str,
        mut observe: impl FnMut(&str) -> JobObserver,
        refine: impl AsyncFn(&str, JobSpec, &[StageReport]) -> Result<JobSpec>,
    ) -> Result<GraphReport> {
        let refine = &refine;
        check_id(id)?;
        let order = Order::of(&self.stages)?;
        let started_ms = fs.env().clock.mono_ms();
        let mut standing = Standing::new(order);
        let mut reports: Vec<Option<StageReport>> = vec![None; self.stages.len()];
        let mut running = FuturesUnordered::new();
        loop {
            for at in standing.ready() {
                let stage = &self.stages[at];
                let (observer, remade) = (observe(&stage.name), standing.remade[at]);
                let before = standing.order.before[at].iter().filter_map(|one| reports[*one].clone()).collect();
                let keep = self.keep_of(id, at, &standing.order);
                let turn = Turn { graph: id, at, stage, before, remade, keep };
                running.push(async move { (at, turn.run(fs, observer, refine).await) });
            }
            let Some((at, report)) = running.next().await else { break };
            let succeeded = report.succeeded();
            reports[at] = Some(report);
            if !succeeded && self.make_again(fs, at, &mut standing).await {
                continue;
            }
            for done in standing.ended(at, succeeded) {
                self.remove_temporary(fs, done).await;
            }
        }
        drop(running);
        if (0..self.stages.len()).any(|at| self.keep_of(id, at, &standing.order).is_some()) {
            contact::release_kept(fs, id).await;
        }
        let skipped = |stage: &GraphStage| StageReport {
            name: stage.name.clone(),
            report: None,
            earlier: false,
            why: Some("a stage before it did not succeed".into()),
            remade: 0,
        };
        let reports = self.stages.iter().zip(reports);
        let stages: Vec<_> = reports.map(|(stage, report)| report.unwrap_or_else(|| skipped(stage))).collect();
        let state = |report: &StageReport| report.report.as_ref().map_or(JobState::Failed, |report| report.state);
        let worst = stages.iter().map(state).find(|state| *state != JobState::Succeeded);
        Ok(GraphReport {
            id: id.to_owned(),
            state: worst.unwrap_or(JobState::Succeeded),
            wall_ms: fs.env().clock.mono_ms().saturating_sub(started_ms),
            stages,
        })
    }

    /// What a stage shares with the others through its nodes; none if it shares nothing.
    fn keep_of(&self, id: &str, at: usize, order: &Order) -> Option<Keep> {
        let GraphStage { spec, temporary, .. } = &self.stages[at];
        let reads = |stage: &GraphStage, input: &String| stage.spec.inputs.contains(input);
        let shared = |input: &&String| self.stages.iter().filter(|stage| reads(stage, input)).count() > 1;
        let inputs: Vec<String> = spec.inputs.iter().filter(shared).cloned().collect();
        let output = *temporary && !order.readers[at].is_empty();
        let takes =
            order.readers.iter().zip(&order.temporary).any(|(readers, temporary)| *temporary && readers.contains(&at));
        let keeps = !self.keeps_nothing && (output || takes || !inputs.is_empty());
        keeps.then(|| Keep { name: id.to_owned(), inputs, output })
    }

    /// A stage has failed. If temporary inputs of it are lost, they are made again, and it is run again: true.
    async fn make_again(&self, fs: &FileSystem, at: usize, standing: &mut Standing) -> bool {
        let mut lost = false;
        for source in standing.sources(at) {
            if standing.succeeded.contains(&source) {
                if standing.remade[source] >= MAX_REMADE || is_whole(fs, &self.stages[source].spec.output).await {
                    continue;
                }
                for again in standing.lost(source) {
                    let GraphStage { name, spec, .. } = &self.stages[again];
                    tracing::warn!(stage = name, path = spec.output, "the output was lost: the stage is run again");
                    // What cannot be deleted stands in the way of the new output, which says so.
                    let _ = fs.delete(&spec.output, true).await;
                }
            }
            lost = true;
        }
        if lost {
            standing.started.remove(&at);
        }
        lost
    }

    /// The output of a stage that nobody reads any more.
    async fn remove_temporary(&self, fs: &FileSystem, at: usize) {
        let stage = &self.stages[at];
        if stage.temporary
            && let Err(error) = fs.delete(&stage.spec.output, true).await
        {
            tracing::warn!(stage = stage.name, path = stage.spec.output, %error, "a temporary output could not be removed");
        }
    }
}

/// Can all of it be read? A byte of each block tells.
async fn is_whole(fs: &FileSystem, output: &str) -> bool {
    let look = async {
        for file in fs.list_all(output).await? {
            let reader = fs.open(&file.path).await?;
            for block in fs.block_locations(&file.path, 0, file.length).await? {
                reader.read_range(block.offset, 1).await?;
            }
        }
        Ok::<(), Error>(())
    };
    look.await.is_ok()
}

/// A stage that is to run.
struct Turn<'a> {
    graph: &'a str,
    at: usize,
    stage: &'a GraphStage,
    /// Of the stages before it.
    before: Vec<StageReport>,
    /// How often its output was lost.
    remade: u32,
    keep: Option<Keep>,
}

impl Turn<'_> {
    fn ended(&self, report: JobReport, earlier: bool) -> StageReport {
        let name = self.stage.name.clone();
        StageReport { name, report: Some(report), earlier, why: None, remade: self.remade }
    }

    fn failed(&self, error: &Error) -> StageReport {
        let (name, why) = (self.stage.name.clone(), Some(error.message().to_owned()));
        StageReport { name, report: None, earlier: false, why, remade: self.remade }
    }

    /// Runs the stage, or finds that it has been run.
    async fn run(
        self,
        fs: &FileSystem,
        observer: JobObserver,
        refine: &impl AsyncFn(&str, JobSpec, &[StageReport]) -> Result<JobSpec>,
    ) -> StageReport {
        let (graph, at) = (self.graph, self.at);
        for attempt in 1..=MAX_TRIES {
            let job_id = match attempt {
                1 => format!("{graph}-s{at}"),
                _ => format!("{graph}-s{at}-{attempt}"),
            };
            match history::report(fs, &job_id).await {
                Ok(report) if report.state == JobState::Succeeded && self.remade == 0 => {
                    return self.ended(report, true);
                }
                Ok(_) => continue,
                Err(error) if error.code() != ErrorCode::FileNotFound => return self.failed(&error),
                Err(_) => {}
            }
            let report = match fs.exists(&folder(&job_id)).await {
                Ok(true) => resume(fs, &job_id, false, observer).await,
                Ok(false) => match refine(&self.stage.name, self.stage.spec.clone(), &self.before).await {
                    Ok(spec) => run(fs, JobSpec { id: Some(job_id), ..self.handing_on(spec) }, observer).await,
                    Err(error) => Err(error),
                },
                Err(error) => Err(error),
            };
            return match report {
                Ok(report) => self.ended(report, false),
                Err(error) => self.failed(&error),
            };
        }
        let text = format!("stage {} was tried {MAX_TRIES} times", self.stage.name);
        self.failed(&Error::new(ErrorCode::JobFailed, text))
    }

    fn handing_on(&self, mut spec: JobSpec) -> JobSpec {
        if self.stage.temporary && spec.output_replication == 0 {
            spec.output_replication = HANDED_ON_REPLICATION;
        }
        if let Some(mut keep) = self.keep.clone().filter(|_| spec.keep.is_none()) {
            keep.inputs.retain(|input| spec.inputs.contains(input));
            spec.keep = Some(keep);
        }
        spec
    }
}

fn check_id(id: &str) -> Result<()> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    if (1..=40).contains(&id.len()) && id.bytes().all(plain) {
        return Ok(());
    }
    Err(Error::new(ErrorCode::InvalidArgument, format!("graph id {id:?} is not 1 to 40 letters, digits, '-' and '_'")))
}

/// Which stages come before which.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Order {
    /// By stage: those that must succeed before.
    before: Vec<BTreeSet<usize>>,
    /// By stage: those that read its output.
    readers: Vec<BTreeSet<usize>>,
    /// By stage: its output is only for others.
    temporary: Vec<bool>,
}

impl Order {
    fn of(stages: &[GraphStage]) -> Result<Self> {
        let refuse = |text: String| Err(Error::new(ErrorCode::InvalidArgument, text));
        if stages.is_empty() || stages.len() > MAX_STAGES {
            return refuse(format!("{} stages are not 1 to {MAX_STAGES}", stages.len()));
        }
        let (mut names, mut outputs) = (BTreeMap::new(), Vec::new());
        for (at, stage) in stages.iter().enumerate() {
            if names.insert(stage.name.as_str(), at).is_some() {
                return refuse(format!("two stages are called {:?}", stage.name));
            }
            let output = normalize(&stage.spec.output)?;
            if outputs.contains(&output) {
                return refuse(format!("two stages write {output}"));
            }
            outputs.push(output);
        }
        let none = vec![BTreeSet::new(); stages.len()];
        let temporary = stages.iter().map(|stage| stage.temporary).collect();
        let mut order = Self { before: none.clone(), readers: none, temporary };
        for (at, stage) in stages.iter().enumerate() {
            for name in &stage.after {
                let Some(other) = names.get(name.as_str()) else {
                    return refuse(format!("stage {:?} comes after {name:?}, which there is not", stage.name));
                };
                order.before[at].insert(*other);
            }
            for input in &stage.spec.inputs {
                let input = normalize(input)?;
                let reads = |output: &String| input == *output || input.starts_with(&format!("{output}/"));
                for other in (0..stages.len()).filter(|other| reads(&outputs[*other])) {
                    order.before[at].insert(other);
                    order.readers[other].insert(at);
                }
            }
        }
        order.check_acyclic(stages)?;
        Ok(order)
    }

    fn check_acyclic(&self, stages: &[GraphStage]) -> Result<()> {
        let mut done = BTreeSet::new();
        loop {
            let ready = |at: &usize| !done.contains(at) && self.before[*at].is_subset(&done);
            let next: Vec<usize> = (0..stages.len()).filter(ready).collect();
            if next.is_empty() {
                break;
            }
            done.extend(next);
        }
        match stages.iter().enumerate().find(|(at, _)| !done.contains(at)) {
            None => Ok(()),
            Some((_, stage)) => {
                let text = format!("stage {:?} waits for itself, by way of others", stage.name);
                Err(Error::new(ErrorCode::InvalidArgument, text))
            }
        }
    }
}

/// Which stages have been started and how they ended.
struct Standing {
    order: Order,
    started: BTreeSet<usize>,
    succeeded: BTreeSet<usize>,
    removed: BTreeSet<usize>,
    /// By stage: how often it was lost.
    remade: Vec<u32>,
}

impl Standing {
    fn new(order: Order) -> Self {
        let remade = vec![0; order.before.len()];
        Self { order, started: BTreeSet::new(), succeeded: BTreeSet::new(), removed: BTreeSet::new(), remade }
    }

    /// Temporary stages whose output a stage reads.
    fn sources(&self, at: usize) -> Vec<usize> {
        let reads = |other: &usize| self.order.temporary[*other] && self.order.readers[*other].contains(&at);
        (0..self.order.readers.len()).filter(reads).collect()
    }

    /// The output of a stage that had succeeded is lost: it is to run again, and so are those before it whose outputs went when it had read them.
    /// Returns all of them.
    fn lost(&mut self, at: usize) -> Vec<usize> {
        let (mut all, mut next) = (vec![at], 0);
        while let Some(lost) = all.get(next).copied() {
            next += 1;
            self.started.remove(&lost);
            self.succeeded.remove(&lost);
            self.removed.remove(&lost);
            self.remade[lost] += 1;
            let gone = self.sources(lost).into_iter().filter(|source| self.removed.contains(source));
            let gone: Vec<usize> = gone.filter(|source| !all.contains(source)).collect();
            all.extend(gone);
        }
        all
    }

    /// Stages to start now; each is named once.
    fn ready(&mut self) -> Vec<usize> {
        let ready = |at: &usize| !self.started.contains(at) && self.order.before[*at].is_subset(&self.succeeded);
        let ready: Vec<usize> = (0..self.order.before.len()).filter(ready).collect();
        self.started.extend(&ready);
        ready
    }

    /// A stage has ended; returns those whose output was read by all who do.
    fn ended(&mut self, at: usize, succeeded: bool) -> Vec<usize> {
        if !succeeded {
            return Vec::new();
        }
        self.succeeded.insert(at);
        let all_read = |at: &usize| {
            let readers = &self.order.readers[*at];
            !self.removed.contains(at) && !readers.is_empty() && readers.is_subset(&self.succeeded)
        };
        let read: Vec<usize> = (0..self.order.readers.len()).filter(all_read).collect();
        self.removed.extend(&read);
        read
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(inputs: &[&str], output: &str) -> JobSpec {
        JobSpec::new("wordcount", inputs.iter().map(|input| (*input).to_owned()).collect(), output)
    }

    fn diamond() -> JobGraph {
        JobGraph::new()
            .stage("join", job(&["/left", "/right/part-r-00000"], "/joined"))
            .temporary("left", job(&["/in"], "/left"))
            .temporary("right", job(&["/in"], "/right"))
            .stage("other", job(&["/in"], "/other"))
    }

    #[test]
    fn stages_start_when_what_they_read_is_there() {
        let mut standing = Standing::new(Order::of(&diamond().stages).unwrap());
        assert_eq!(standing.ready(), [1, 2, 3]);
        assert!(standing.ended(1, true).is_empty());
        assert!(standing.ready().is_empty());
        standing.ended(2, true);
        assert_eq!(standing.ready(), [0]);
        assert_eq!(standing.ended(0, true), [1, 2], "their outputs have been read");
        assert!(standing.ended(3, true).is_empty());
    }

    #[test]
    fn what_is_lost_is_made_again_back_to_what_is_there() {
        let chain = JobGraph::new()
            .stage("kept", job(&["/in"], "/kept"))
            .temporary("a", job(&["/kept"], "/a"))
            .temporary("b", job(&["/a"], "/b"))
            .stage("c", job(&["/b"], "/c"));
        let mut standing = Standing::new(Order::of(&chain.stages).unwrap());
        for at in 0..3 {
            assert_eq!(standing.ready(), [at]);
            standing.ended(at, true);
        }
        assert!(standing.removed.contains(&1), "it has been read");
        assert_eq!(standing.ready(), [3]);
        assert_eq!(standing.sources(3), [2]);
        standing.started.remove(&3);
        assert_eq!(standing.lost(2), [2, 1], "its input is gone, that input's is not");
        assert_eq!(standing.remade, [0, 1, 1, 0]);
        assert_eq!(standing.ready(), [1]);
        standing.ended(1, true);
        assert_eq!(standing.ready(), [2]);
        assert_eq!(standing.ended(2, true), [1], "it goes again");
        assert_eq!(standing.ready(), [3]);
    }

    #[test]
    fn stages_keep_for_each_other_what_several_read() {
        let graph = diamond();
        let order = Order::of(&graph.stages).unwrap();
        let keep = |at| graph.keep_of("g", at, &order).unwrap();
        let all = |inputs: &[&str], output| Keep {
            name: "g".into(),
            inputs: inputs.iter().map(|input| (*input).to_owned()).collect(),
            output,
        };
        assert_eq!(keep(0), all(&[], false), "what it reads was kept by who wrote it");
        assert_eq!(keep(1), all(&["/in"], true));
        assert_eq!(keep(3), all(&["/in"], false));
        let alone = JobGraph::new().stage("a", job(&["/in"], "/a")).stage("b", job(&["/a"], "/b"));
        let order = Order::of(&alone.stages).unwrap();
        assert_eq!((alone.keep_of("g", 0, &order), alone.keep_of("g", 1, &order)), (None, None));
        let nothing = diamond().keeping_nothing();
        assert_eq!(nothing.keep_of("g", 1, &Order::of(&nothing.stages).unwrap()), None);
    }

    #[test]
    fn what_comes_after_a_failure_is_not_run() {
        let mut standing = Standing::new(Order::of(&diamond().stages).unwrap());
        standing.ready();
        standing.ended(1, false);
        standing.ended(2, true);
        assert!(standing.ready().is_empty());
    }

    #[test]
    fn graphs_that_cannot_be_run_are_refused() {
        let refused = |graph: JobGraph| Order::of(&graph.stages).unwrap_err().message().to_owned();
        let cycle = JobGraph::new().stage("a", job(&["/b"], "/a")).stage("b", job(&["/a"], "/b"));
        assert!(refused(cycle).contains("waits for itself"));
        let twice = JobGraph::new().stage("a", job(&["/in"], "/a")).stage("a", job(&["/in"], "/b"));
        assert!(refused(twice).contains("two stages are called"));
        let same = JobGraph::new().stage("a", job(&["/in"], "/a")).stage("b", job(&["/in"], "/a/"));
        assert!(refused(same).contains("two stages write /a"));
        let mut after = JobGraph::new().stage("a", job(&["/in"], "/a"));
        after.stages[0].after.push("nobody".into());
        assert!(refused(after).contains("nobody"));
        assert!(refused(JobGraph::new()).contains("0 stages"));
        assert!(check_id("").is_err() && check_id("a b").is_err() && check_id("nightly-7").is_ok());
    }
}

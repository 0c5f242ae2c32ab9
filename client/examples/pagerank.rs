//! PageRank: a graph of jobs, one per iteration, each on the output of the one before. What an iteration hands to the next has one replica; if it is lost with
//! its node, the iterations that made it run again.
//!
//! Input lines `page TAB page page ...` (the pages that it links to; each page has one line). The result, in `OUTPUT/final`, has lines
//! `page TAB rank TAB page page ...`.
//!
//! ```text
//! cargo run --example pagerank -- 127.0.0.1:8020 /links /ranks 20
//! ```

use std::process::ExitCode;

use cairn_client::fs::{ClientSettings, FileSystem};
use cairn_client::job::{GraphStage, JobGraph, JobObserver, JobSpec, StageReport};
use cairn_client::mapreduce::typed::{Emit, Job, Map, Reduce, TypedValues};
use cairn_client::mapreduce::{self, Error, ErrorCode, Jobs, Launcher, Output, Record, Result, TaskContext};
use cairn_common::Env;

/// Probability that a reader follows a link.
const DAMPING: f64 = 0.85;
/// Counters are whole numbers: ranks are added up in them in this unit.
const UNIT: f64 = 1e-9;
/// What the pages without links have in rank: it is spread over all pages in the next iteration.
const DANGLING: &str = "dangling rank";
const PAGES: &str = "pages";

/// What comes to a page: rank from a page that links to it, or its own links.
type Part = (f64, Option<String>);

fn bad_line() -> Error {
    Error::new(ErrorCode::InvalidArgument, "the line is not a page, a tab, and pages")
}

/// Gives each page of the input its links.
struct Start;

impl Map for Start {
    type Key = String;
    type Value = Part;

    fn map(&mut self, line: Record<'_>, out: &mut Emit<'_, String, Part>) -> Result<()> {
        let (page, links) = line.text()?.split_once('\t').ok_or_else(bad_line)?;
        out.count(PAGES, 1);
        out.emit(page, (0.0, Some(links)))
    }
}

/// Hands each page's rank on to what it links to.
struct Spread;

impl Map for Spread {
    type Key = String;
    type Value = Part;

    fn map(&mut self, line: Record<'_>, out: &mut Emit<'_, String, Part>) -> Result<()> {
        let mut fields = line.text()?.splitn(3, '\t');
        let (Some(page), Some(rank), Some(links)) = (fields.next(), fields.next(), fields.next()) else {
            return Err(bad_line());
        };
        let rank: f64 = rank.parse().map_err(|_| bad_line())?;
        let count = links.split_whitespace().count();
        for target in links.split_whitespace() {
            out.emit(target, (rank / count as f64, None::<&str>))?;
        }
        out.emit(page, (0.0, Some(links)))
    }
}

/// Sums up what comes to a page.
struct Rank {
    pages: f64,
    dangling: f64,
    first: bool,
}

impl Rank {
    fn new(task: &TaskContext) -> Result<Self> {
        let pages: f64 = task.parsed("pages", 0.0)?;
        Ok(Self { pages, dangling: task.parsed("dangling", 0.0)?, first: task.property("pages").is_none() })
    }
}

impl Reduce for Rank {
    type Key = String;
    type Value = Part;

    fn reduce(&mut self, page: String, parts: &mut TypedValues<'_, '_, String, Part>, out: &mut Output) -> Result<()> {
        let (mut received, mut own) = (0.0, None);
        while let Some((rank, links)) = parts.next()? {
            received += rank;
            own = own.or(links);
        }
        // Links to pages that the input does not have lead nowhere.
        let Some(links) = own else { return Ok(()) };
        let rank = if self.first { 1.0 } else { (1.0 - DAMPING) + DAMPING * (received + self.dangling / self.pages) };
        if links.trim().is_empty() {
            out.count(DANGLING, (rank / UNIT) as u64);
        }
        out.line(format!("{page}\t{rank}\t{links}").as_bytes())
    }
}

fn define(jobs: &mut Jobs) {
    jobs.add("start", |_| Ok(Job::new(|_| Ok(Start)).reduce(Rank::new)));
    jobs.add("iterate", |_| {
        // Ranks of the same page are added up before they leave the map.
        let join = |a: Part, b: Part| (a.0 + b.0, a.1.or(b.1));
        Ok(Job::new(|_| Ok(Spread)).fold(join).reduce(Rank::new))
    });
}

/// What the stages counted: pages, and the rank of those without links.
fn counted<'a>(stages: impl Iterator<Item = &'a StageReport>) -> (u64, f64) {
    let counters = stages.filter_map(|stage| stage.report.as_ref()).map(|report| &report.counters);
    counters.fold((0, 0.0), |(pages, lost), one| (pages + one.user(PAGES), lost + one.user(DANGLING) as f64 * UNIT))
}

const FIRST: &str = "step 0";

/// An iteration needs to know what the one before counted; pages are counted by the first job.
fn refine(name: &str, spec: JobSpec, before: &[StageReport]) -> JobSpec {
    if name == FIRST {
        return spec;
    }
    let (pages, _) = counted(before.iter());
    let (_, lost) = counted(before.iter().filter(|stage| before.len() == 1 || stage.name != FIRST));
    spec.with("pages", &pages.to_string()).with("dangling", &lost.to_string())
}

const USAGE: &str = "usage: pagerank NAMENODE INPUT OUTPUT ITERATIONS [REPLICAS], of what one iteration hands to the next (1 if not said)";

async fn drive(jobs: Jobs, arguments: Vec<String>) -> Result<()> {
    let refuse = |text: &str| Error::new(ErrorCode::InvalidArgument, text);
    let [namenode, input, output, iterations, rest @ ..] = &arguments[..] else { return Err(refuse(USAGE)) };
    let number = |text: &String| text.parse::<u32>().map_err(|_| refuse(USAGE));
    let (iterations, replicas) = (number(iterations)?, rest.first().map(number).transpose()?.unwrap_or(0));
    let fs = FileSystem::connect(Env::system(), ClientSettings::at(namenode.as_str())).await?;
    let launcher = Launcher::new(fs, jobs);
    let step = |number: u32| match number {
        last if last == iterations => format!("{output}/final"),
        number => format!("{output}/step-{number}"),
    };
    let mut graph = JobGraph::new();
    for number in 0..=iterations {
        let mut spec = match number {
            0 => JobSpec::new("start", vec![input.clone()], &step(0)),
            _ => JobSpec::new("iterate", vec![step(number - 1)], &step(number)),
        };
        let temporary = number < iterations;
        if temporary {
            spec.output_replication = replicas;
        }
        let after = if number > 1 { vec![FIRST.to_owned()] } else { Vec::new() };
        let (name, spec) = (format!("step {number}"), launcher.prepare(spec).await?);
        graph = graph.with(GraphStage { name, spec, after, temporary });
    }
    let id = format!("pagerank-{}", launcher.fs().env().clock.wall_ms());
    let observe = |stage: &str| {
        println!("{stage} of {iterations}");
        JobObserver::none()
    };
    let refine = async |name: &str, spec: JobSpec, before: &[StageReport]| Ok(refine(name, spec, before));
    let report = graph.run_with(launcher.fs(), &id, observe, refine).await?;
    println!("{} bytes were read where a step before had kept them", report.kept_bytes());
    report.check()
}

fn main() -> ExitCode {
    mapreduce::main_with(define, drive)
}

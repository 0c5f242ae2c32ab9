//! k-means: a graph of jobs, each of which reads all points. They do not change, so nodes keep what their tasks have read of them for the tasks of the next
//! iteration; only the centres, which are few, go from job to job, in the jobs' parameters.
//!
//! Input lines are points: numbers between white space, equally many on each line. The result, in `OUTPUT/step-N`, has lines
//! `centre TAB points TAB number number ...`.
//!
//! ```text
//! cargo run --example kmeans -- 127.0.0.1:8020 /points /clusters 5 10
//! ```

use std::process::ExitCode;

use cairn_client::fs::{ClientSettings, FileSystem};
use cairn_client::job::{GraphStage, JobGraph, JobObserver, JobSpec, StageReport};
use cairn_client::mapreduce::encode::List;
use cairn_client::mapreduce::typed::{Emit, Job, Map, Reduce, TypedValues};
use cairn_client::mapreduce::{self, Error, ErrorCode, Jobs, Launcher, Output, Record, Result, TaskContext};
use cairn_common::Env;

/// Bytes of a file of centres that are read.
const MAX_CENTRES_BYTES: u64 = 16 << 20;

fn refuse(text: impl Into<String>) -> Error {
    Error::new(ErrorCode::InvalidArgument, text)
}

fn point(text: &str, out: &mut Vec<f64>) -> Result<()> {
    out.clear();
    for number in text.split_ascii_whitespace() {
        let parsed = number.parse().ok().filter(|number: &f64| number.is_finite());
        out.push(parsed.ok_or_else(|| refuse(format!("{number:?} is not a number")))?);
    }
    Ok(())
}

/// The first points of the input are the first centres.
struct First {
    wanted: usize,
}

impl Map for First {
    type Key = (u32, u64);
    type Value = String;

    fn map(&mut self, line: Record<'_>, out: &mut Emit<'_, (u32, u64), String>) -> Result<()> {
        if self.wanted == 0 {
            return Ok(());
        }
        self.wanted -= 1;
        out.emit((line.file_index, line.offset), line.text()?)
    }
}

struct Take {
    taken: usize,
    wanted: usize,
}

impl Reduce for Take {
    type Key = (u32, u64);
    type Value = String;

    fn reduce(
        &mut self,
        _: (u32, u64),
        points: &mut TypedValues<'_, '_, (u32, u64), String>,
        out: &mut Output,
    ) -> Result<()> {
        while let Some(point) = points.next()?.filter(|_| self.taken < self.wanted) {
            out.line(format!("{}\t0\t{point}", self.taken).as_bytes())?;
            self.taken += 1;
        }
        Ok(())
    }
}

/// Sums of the points of a centre, one for each dimension, and how many they are.
type Sums = (List<f64>, u64);

/// Adds each point up at the centre that is nearest, and emits the sums when there is no further point.
struct Assign {
    centres: Vec<Vec<f64>>,
    sums: Vec<(Vec<f64>, u64)>,
    point: Vec<f64>,
}

impl Assign {
    fn new(task: &TaskContext) -> Result<Self> {
        let mut centres = Vec::new();
        for text in task.required("centres")?.split(';') {
            let mut centre = Vec::new();
            point(text, &mut centre)?;
            centres.push(centre);
        }
        let sums = centres.iter().map(|centre| (vec![0.0; centre.len()], 0)).collect();
        Ok(Self { centres, sums, point: Vec::new() })
    }
}

impl Map for Assign {
    type Key = u32;
    type Value = Sums;

    fn map(&mut self, line: Record<'_>, _: &mut Emit<'_, u32, Sums>) -> Result<()> {
        point(line.text()?, &mut self.point)?;
        if self.point.len() != self.centres[0].len() {
            let (found, wanted) = (self.point.len(), self.centres[0].len());
            return Err(refuse(format!("the point has {found} numbers, the first one has {wanted}")));
        }
        let distance =
            |centre: &Vec<f64>| -> f64 { centre.iter().zip(&self.point).map(|(a, b)| (a - b) * (a - b)).sum() };
        let distances = self.centres.iter().map(distance).enumerate();
        let Some((nearest, _)) = distances.min_by(|a, b| a.1.total_cmp(&b.1)) else { return Ok(()) };
        let (sums, count) = &mut self.sums[nearest];
        sums.iter_mut().zip(&self.point).for_each(|(sum, number)| *sum += number);
        *count += 1;
        Ok(())
    }

    fn finish(&mut self, out: &mut Emit<'_, u32, Sums>) -> Result<()> {
        for (centre, (sums, count)) in self.sums.drain(..).enumerate() {
            out.emit(centre as u32, (List(sums), count))?;
        }
        Ok(())
    }
}

/// A centre's new place: the mean of its points; where it was if it has none.
struct Mean {
    centres: Vec<Vec<f64>>,
}

impl Reduce for Mean {
    type Key = u32;
    type Value = Sums;

    fn reduce(&mut self, centre: u32, parts: &mut TypedValues<'_, '_, u32, Sums>, out: &mut Output) -> Result<()> {
        let mut place = self.centres[centre as usize].clone();
        let (mut sums, mut count) = (vec![0.0; place.len()], 0);
        while let Some((List(part), points)) = parts.next()? {
            sums.iter_mut().zip(part).for_each(|(sum, number)| *sum += number);
            count += points;
        }
        if count > 0 {
            place = sums.into_iter().map(|sum| sum / count as f64).collect();
        }
        let place: Vec<String> = place.iter().map(f64::to_string).collect();
        out.line(format!("{centre}\t{count}\t{}", place.join(" ")).as_bytes())
    }
}

fn define(jobs: &mut Jobs) {
    jobs.add("start", |_| {
        let wanted = |task: &TaskContext| task.parsed("wanted", 1);
        let take = move |task: &TaskContext| Ok(Take { taken: 0, wanted: wanted(task)? });
        Ok(Job::new(move |task| Ok(First { wanted: wanted(task)? })).reduce(take))
    });
    jobs.add("iterate", |_| Ok(Job::new(Assign::new).reduce(|task| Ok(Mean { centres: Assign::new(task)?.centres }))));
}

/// The centres that a step has written, as the next one is told of them.
async fn centres(fs: &FileSystem, step: &str) -> Result<String> {
    let file = fs.open(&format!("{step}/part-r-00000")).await?;
    let bytes = file.read_range(0, file.length().min(MAX_CENTRES_BYTES)).await?;
    let text = std::str::from_utf8(&bytes).map_err(|_| refuse(format!("{step} is not text")))?;
    let centres: Vec<&str> = text.lines().filter_map(|line| line.splitn(3, '\t').nth(2)).collect();
    if centres.is_empty() { Err(refuse("the input has no points")) } else { Ok(centres.join(";")) }
}

const USAGE: &str = "usage: kmeans NAMENODE INPUT OUTPUT CENTRES ITERATIONS [--forget]: nodes keep no points";

async fn drive(jobs: Jobs, arguments: Vec<String>) -> Result<()> {
    let [namenode, input, output, wanted, iterations, rest @ ..] = &arguments[..] else { return Err(refuse(USAGE)) };
    let iterations: usize = iterations.parse().map_err(|_| refuse(USAGE))?;
    wanted.parse::<u32>().ok().filter(|wanted| *wanted > 0).ok_or_else(|| refuse(USAGE))?;
    let fs = FileSystem::connect(Env::system(), ClientSettings::at(namenode.as_str())).await?;
    let launcher = Launcher::new(fs, jobs);
    let steps: Vec<String> = (0..=iterations).map(|number| format!("{output}/step-{number}")).collect();
    let mut graph = JobGraph::new();
    for (number, step) in steps.iter().enumerate() {
        let kind = if number == 0 { "start" } else { "iterate" };
        let mut spec = JobSpec::new(kind, vec![input.clone()], step).with("wanted", wanted);
        spec.reducers = Some(1);
        let after = number.checked_sub(1).map(|before| steps[before].clone()).into_iter().collect();
        graph =
            graph.with(GraphStage { name: step.clone(), spec: launcher.prepare(spec).await?, after, temporary: false });
    }
    match rest {
        [] => {}
        [forget] if forget == "--forget" => graph = graph.keeping_nothing(),
        _ => return Err(refuse(USAGE)),
    }
    let fs = launcher.fs();
    let id = format!("kmeans-{}", fs.env().clock.wall_ms());
    let observe = |step: &str| {
        println!("{step}");
        JobObserver::none()
    };
    let refine = async |_: &str, spec: JobSpec, before: &[StageReport]| match before.last() {
        Some(before) => Ok(spec.with("centres", &centres(fs, &before.name).await?)),
        None => Ok(spec),
    };
    let report = graph.run_with(fs, &id, observe, refine).await?;
    println!("{} bytes were read where a step before had kept them", report.kept_bytes());
    report.check()
}

fn main() -> ExitCode {
    mapreduce::main_with(define, drive)
}

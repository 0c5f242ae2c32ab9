//! `job`: jobs on the nodes that hold the blocks.

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use cairn_client::fs::{Error, ErrorCode, FileSystem};
use cairn_client::job::{self, JobControl, JobObserver, JobProgress, JobReport, JobSpec, JobState, Phase};
use cairn_client::mapreduce::USER_PREFIX;
use cairn_client::mapreduce::builtin::property;
use cairn_common::process;
use comfy_table::{Table, presets};

use crate::args::{GrepArgs, JobArgs, JobCommand, PlanArgs, WordcountArgs};
use crate::builtin;
use crate::context::Context;
use crate::demo::align_right;
use crate::distcp;
use crate::graph;
use crate::jobs;
use crate::output::{Columns, Failure, Out, Outcome};
use crate::progress::Progress;
use crate::units::{counted, grouped, human_millis, human_size};

/// How long a job that was told to stop may take to clean up.
pub const CANCEL_LIMIT: Duration = Duration::from_secs(10);

/// `job`
pub async fn job(context: &mut Context, command: &JobCommand) -> Outcome {
    // Boxed, as in `dispatch`.
    let work: Pin<Box<dyn Future<Output = Outcome> + '_>> = match command {
        JobCommand::Wordcount(_)
        | JobCommand::Grep(_)
        | JobCommand::Streaming(_)
        | JobCommand::Sort(_)
        | JobCommand::Join(_)
        | JobCommand::Teragen(_)
        | JobCommand::Terasort(_) => Box::pin(builtin::run_command(context, command)),
        JobCommand::Teravalidate(args) => Box::pin(builtin::teravalidate(context, args)),
        JobCommand::Distcp(args) => Box::pin(distcp::distcp(context, args)),
        JobCommand::Plan(args) => Box::pin(plan(context, args)),
        JobCommand::Graph(args) => Box::pin(graph::graph(context, args)),
        JobCommand::Run(args) => Box::pin(jobs::run(context, args)),
        JobCommand::Ls(args) => Box::pin(jobs::ls(context, args)),
        JobCommand::Status(args) => Box::pin(jobs::status(context, args)),
        JobCommand::Logs(args) => Box::pin(jobs::logs(context, args)),
        JobCommand::Kill(args) => Box::pin(jobs::kill(context, args)),
        JobCommand::Resume(args) => Box::pin(jobs::resume(context, args)),
    };
    work.await
}

pub fn common(mut spec: JobSpec, args: &JobArgs) -> JobSpec {
    spec.reducers = args.reducers;
    spec.split_bytes = args.split_size.unwrap_or(0);
    spec.output_replication = args.replication.unwrap_or(0);
    if let Some(bytes) = args.task_memory {
        spec.memory_limit = bytes;
    }
    spec.cpu_limit = args.task_cpu.unwrap_or(0);
    spec.task_timeout_ms = args.task_timeout.unwrap_or(spec.task_timeout_ms);
    spec.max_attempts = args.max_attempts.unwrap_or(spec.max_attempts);
    spec.time_limit_ms = args.time_limit.unwrap_or(0);
    spec.priority = args.priority.unwrap_or(spec.priority);
    spec.disk_limit = args.disk_limit.unwrap_or(0);
    spec.lease_ms = args.keep.unwrap_or(0);
    spec.speculative = !args.no_speculation;
    spec.slow_start = args.slow_start.unwrap_or(spec.slow_start);
    spec
}

/// The last path is the output, those before it the input.
pub fn split_paths(paths: &[String]) -> (Vec<String>, &str) {
    match paths.split_last() {
        Some((output, inputs)) => (inputs.to_vec(), output),
        None => (Vec::new(), ""),
    }
}

pub fn wordcount_spec(args: &WordcountArgs) -> JobSpec {
    let (inputs, output) = split_paths(&args.paths);
    common(JobSpec::wordcount(inputs, output, !args.no_combiner), &args.job)
}

pub fn grep_spec(args: &GrepArgs) -> JobSpec {
    let (inputs, output) = split_paths(&args.paths);
    let spec = JobSpec::grep(inputs, output, &args.pattern, !args.lines);
    common(spec.with(property::IGNORE_CASE, &args.ignore_case.to_string()), &args.job)
}

/// A word count for the demo; one that does not succeed is an error.
pub async fn wordcount(context: &Context, fs: &FileSystem, inputs: &[String], output: &str) -> Outcome<JobReport> {
    let (observer, control) = JobObserver::new();
    let spec = JobSpec::wordcount(inputs.to_vec(), output, true);
    let report = watched(context, job::run(fs, spec, observer), &control).await?;
    match failure_of(&report) {
        Some(error) => Err(error.into()),
        None => Ok(report),
    }
}

/// Runs a job and shows how far it is; a signal cancels it and ends the program when it has cleaned up. With `job run --detach` a node of the cluster
/// runs it, and there is no report: the program ends here.
pub async fn run(context: &mut Context, fs: &FileSystem, spec: JobSpec) -> Outcome<JobReport> {
    if context.detach {
        return Err(jobs::detach(context, fs, &spec).await?);
    }
    let (observer, control) = JobObserver::new();
    let running = Box::pin(job::run(fs, spec, observer));
    until_signal(context, &control, watched(context, running, &control)).await
}

/// Waits for a job; a signal cancels it, and then its end is the end of the program.
pub async fn until_signal(
    context: &Context,
    control: &JobControl,
    running: impl Future<Output = Outcome<JobReport>>,
) -> Outcome<JobReport> {
    let mut running = std::pin::pin!(running);
    tokio::select! {
        biased;
        () = process::shutdown_signal() => {}
        report = &mut running => return report,
    }
    control.cancel();
    // Whatever it says now: the person has asked for the end.
    let _ = context.env.clock.timeout(CANCEL_LIMIT, running).await;
    Err(Failure::Exit(130))
}

/// Shows how far a job is until it is over.
pub async fn watched(
    context: &Context,
    running: impl Future<Output = cairn_client::fs::Result<JobReport>>,
    control: &JobControl,
) -> Outcome<JobReport> {
    let bar = Progress::start(context, "planning", Some(0));
    let mut progress = control.progress();
    let mut running = std::pin::pin!(running);
    loop {
        tokio::select! {
            biased;
            report = &mut running => {
                bar.finish().await;
                return Ok(report?);
            }
            Ok(()) = progress.changed() => {
                let now = *progress.borrow_and_update();
                bar.set(describe(&now), now.bytes_done, now.bytes);
            }
        }
    }
}

fn describe(progress: &JobProgress) -> String {
    let (node, rack, remote) = (progress.node_local, progress.rack_local, progress.remote);
    let mut text = match progress.phase {
        Phase::Planning => return "planning".into(),
        Phase::Map => format!(
            "map {}/{} ({node} node-local, {rack} rack-local, {remote} remote)",
            progress.maps_done, progress.maps
        ),
        Phase::Reduce => format!("reduce {}/{}", progress.reduces_done, progress.reduces),
        Phase::Commit | Phase::Ended => return "finishing".into(),
    };
    text.push_str(&format!(", {} running", progress.running));
    if progress.attempts_failed > 0 {
        text.push_str(&format!(", {}", counted(progress.attempts_failed.into(), "failed attempt")));
    }
    text
}

pub fn failure_of(report: &JobReport) -> Option<Error> {
    if report.state == JobState::Succeeded {
        return None;
    }
    let unknown = || Error::new(ErrorCode::JobFailed, format!("job {} did not succeed", report.id));
    Some(report.failure.clone().unwrap_or_else(unknown))
}

pub fn finish(out: &mut Out, report: JobReport) -> Outcome {
    if out.json {
        out.json(&report)?;
    } else if report.state == JobState::Succeeded {
        out.line(format!("job {} ({}) succeeded; its output is {}", report.id, report.name, report.output))?;
        show_tasks(out, &report)?;
        show_counters(out, &report)?;
        jobs::show_slowest(out, &report)?;
        for line in report.findings.lines() {
            out.line(line)?;
        }
    } else if !report.stderr_tail.is_empty() {
        out.line(format!("last lines of the task that failed:\n{}", report.stderr_tail.trim_end()))?;
    }
    failure_of(&report).map_or(Ok(()), |error| Err(error.into()))
}

/// Which node ran what, and how near to the blocks.
pub fn show_tasks(out: &mut Out, report: &JobReport) -> Outcome {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_BORDERS_ONLY);
    table.set_header(["node", "rack", "maps node-local", "rack-local", "remote", "reduces"]);
    for node in report.by_node() {
        let numbers = [node.node_local, node.rack_local, node.remote, node.reduces].map(|number| number.to_string());
        table.add_row([node.host, node.rack].into_iter().chain(numbers));
    }
    align_right(&mut table, &[2, 3, 4, 5]);
    out.line(table.to_string())
}

/// What it took.
pub fn show_counters(out: &mut Out, report: &JobReport) -> Outcome {
    let (map, reduce, phases) = (&report.map, &report.reduce, &report.phases);
    let (bytes, records) = (&report.bytes, &report.records);
    let mut columns = Columns::new(&[]);
    let mut row = |name: &str, text: String| columns.row(vec![name.to_owned(), text]);
    row(
        "maps",
        format!("{}: {} node-local, {} rack-local, {} remote", map.tasks, map.node_local, map.rack_local, map.remote),
    );
    row("reduces", reduce.tasks.to_string());
    row("failed attempts", (map.attempts_failed + reduce.attempts_failed).to_string());
    row(
        "bytes",
        format!(
            "{} read ({} of them local{}), {} shuffled, {} spilled, {} written",
            human_size(bytes.read),
            human_size(bytes.read_local),
            if bytes.kept > 0 { format!(", {} kept by earlier jobs", human_size(bytes.kept)) } else { String::new() },
            human_size(bytes.shuffled),
            human_size(bytes.spilled),
            human_size(bytes.written)
        ),
    );
    row(
        "records",
        format!(
            "{} in, {} from maps, {} after combining, {} out",
            grouped(records.input),
            grouped(records.map_out),
            grouped(records.combine_out),
            grouped(records.out)
        ),
    );
    row(
        "time",
        format!(
            "{}: plan {}, map {}, reduce {}, commit {}",
            human_millis(report.wall_ms),
            human_millis(phases.plan_ms),
            human_millis(phases.map_ms),
            human_millis(phases.reduce_ms),
            human_millis(phases.commit_ms)
        ),
    );
    for (name, value) in report.counters.iter() {
        if let Some(name) = name.strip_prefix(USER_PREFIX) {
            columns.row(vec![name.to_owned(), grouped(value)]);
        }
    }
    columns.print(out)
}

/// A job command is planned as it is; paths alone are what any job would read.
fn planned(words: &[String]) -> Outcome<JobCommand> {
    let is_job = words.first().is_some_and(|word| !word.starts_with(['/', '-']));
    if is_job {
        return jobs::parse(words);
    }
    let line = [&["wordcount".to_owned()], words, &["/planned".to_owned()]].concat();
    jobs::parse(&line)
}

async fn plan(context: &mut Context, args: &PlanArgs) -> Outcome {
    let command = planned(&args.command)?;
    builtin::outline(&command)?;
    let fs = context.connect().await?;
    let spec = builtin::specify(&fs, &command, false).await?;
    let plan = job::plan(&fs, &spec).await?;
    let out = &mut context.out;
    if out.json {
        return out.json(&plan);
    }
    let [node, rack, remote] = plan.localities;
    out.line(format!(
        "{}: {} of input, {}, {}; maps: {node} node-local, {rack} rack-local, {remote} remote",
        plan.kind,
        human_size(plan.bytes),
        counted(plan.maps.into(), "map"),
        counted(plan.reducers.into(), "reduce"),
    ))?;
    out.line(format!(
        "{} on {}; {} of memory a task",
        counted(plan.slots, "slot"),
        counted(plan.nodes.into(), "node"),
        human_size(plan.memory_limit)
    ))?;
    let mut columns = Columns::new(&[0]);
    columns.row(["wave", "task", "node", "rack", "input", "why"].map(str::to_owned).into());
    for task in &plan.tasks {
        let input = match &task.path {
            Some(path) if path.is_empty() => format!("records {} to {}", task.offset, task.offset + task.length),
            Some(path) => format!("{path} [{}, {})", task.offset, task.offset + task.length),
            None => "all maps".into(),
        };
        let name = format!("{} {}", task.kind, task.index);
        columns.row(vec![task.wave.to_string(), name, task.host.clone(), task.rack.clone(), input, task.why.clone()]);
    }
    columns.print(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn arguments_become_a_job() {
        let job =
            JobArgs { reducers: Some(3), split_size: Some(1 << 20), task_memory: Some(64 << 20), ..JobArgs::default() };
        let args = WordcountArgs { job: job.clone(), no_combiner: false, paths: paths(&["/a", "/b", "/out"]) };
        let spec = wordcount_spec(&args);
        assert_eq!((spec.inputs.len(), spec.output.as_str()), (2, "/out"));
        assert_eq!((spec.reducers, spec.split_bytes, spec.memory_limit), (Some(3), 1 << 20, 64 << 20));
        spec.validate().unwrap();
        let args =
            GrepArgs { job, lines: true, ignore_case: true, pattern: "err(or)?".into(), paths: paths(&["/a", "/out"]) };
        let spec = grep_spec(&args);
        spec.validate().unwrap();
        assert_eq!(spec.properties[property::COUNT], "false");
    }
}

//! `job run|ls|status|logs|kill|resume`: jobs of the cluster, whoever drives them.

use cairn_client::fs::{ErrorCode, FileSystem};
use cairn_client::job::{self, JobEntry, JobObserver, JobReport, JobSpec, JobView};
use cairn_common::timetext::rfc3339;
use clap::Parser as _;

use crate::args::{Cli, Command, JobCommand, JobIdArgs, JobLogsArgs, JobLsArgs, ResumeArgs, RunArgs};
use crate::context::Context;
use crate::job::{finish, until_signal, watched};
use crate::output::{Columns, Failure, Out, Outcome, complain, failure};
use crate::units::{counted, human_millis, human_size};

/// Tasks that a summary names.
const SLOWEST: usize = 3;

/// `job run`
pub async fn run(context: &mut Context, args: &RunArgs) -> Outcome {
    let command = parse(&args.command)?;
    let manages = matches!(
        command,
        JobCommand::Run(_)
            | JobCommand::Plan(_)
            | JobCommand::Graph(_)
            | JobCommand::Ls(_)
            | JobCommand::Status(_)
            | JobCommand::Logs(_)
            | JobCommand::Kill(_)
            | JobCommand::Resume(_)
    );
    if manages {
        return Err(Failure::Usage(format!("{:?} runs no job", args.command[0])));
    }
    if args.detach && matches!(command, JobCommand::Distcp(_) | JobCommand::Teravalidate(_)) {
        let text = format!("{} does some of its work when its job is over: it cannot be detached", args.command[0]);
        return Err(Failure::Usage(text));
    }
    context.detach = args.detach;
    Box::pin(crate::job::job(context, &command)).await
}

/// The command that these words are behind `cairn job`.
pub fn parse(words: &[String]) -> Outcome<JobCommand> {
    let line = ["cairn", "job"].into_iter().chain(words.iter().map(String::as_str));
    let inner =
        Cli::try_parse_from(line).map_err(|error| Failure::Usage(crate::usage_line(&error.render().to_string())))?;
    match inner.command {
        Command::Job(command) => Ok(command),
        _ => Err(Failure::Usage("a job command is needed".into())),
    }
}

/// Leaves a job to a node of the cluster; what is returned ends the program, with success.
pub async fn detach(context: &mut Context, fs: &FileSystem, spec: &JobSpec) -> Outcome<Failure> {
    let (id, node) = job::submit_detached(fs, spec).await?;
    say_detached(&mut context.out, &id, &node)?;
    Ok(Failure::Exit(0))
}

fn say_detached(out: &mut Out, id: &str, node: &str) -> Outcome {
    if out.json {
        return out.json(&serde_json::json!({"id": id, "driver_node": node}));
    }
    out.line(format!("job {id} is driven by {node}; `cairn job status {id}` shows how it stands"))
}

/// `job ls`
pub async fn ls(context: &mut Context, args: &JobLsArgs) -> Outcome {
    let fs = context.connect().await?;
    job::sweep(&fs).await;
    let mut jobs = job::list(&fs, args.limit).await?;
    if let Some(user) = &args.of {
        jobs.retain(|entry| entry.user == *user);
    }
    let out = &mut context.out;
    if out.json {
        return out.json(&jobs);
    }
    let mut columns = Columns::new(&[5, 6, 7]);
    let titles = ["job", "name", "user", "state", "submitted", "time", "maps", "reduces", "output"];
    columns.row(titles.map(str::to_owned).into());
    jobs.iter().for_each(|entry| columns.row(row(entry)));
    columns.print(out)
}

fn row(entry: &JobEntry) -> Vec<String> {
    let done = |done: u32, all: u32| if done == all { all.to_string() } else { format!("{done}/{all}") };
    vec![
        entry.id.clone(),
        entry.name.clone(),
        entry.user.clone(),
        state(entry),
        rfc3339(entry.submitted_ms),
        human_millis(entry.wall_ms),
        done(entry.maps_done, entry.maps),
        done(entry.reduces_done, entry.reduces),
        entry.output.clone(),
    ]
}

fn state(entry: &JobEntry) -> String {
    format!("{:?}", entry.state).to_lowercase()
}

/// `job status`
pub async fn status(context: &mut Context, args: &JobIdArgs) -> Outcome {
    let fs = context.connect().await?;
    let view = job::status(&fs, &args.id).await?;
    let out = &mut context.out;
    if out.json { out.json(&view) } else { show(out, &view) }
}

fn show(out: &mut Out, view: &JobView) -> Outcome {
    let entry = &view.entry;
    out.line(format!("job {} ({}, {}) of {}: {}", entry.id, entry.name, entry.kind, entry.user, state(entry)))?;
    if let Some(report) = &view.report {
        out.line(format!("output {}; submitted {}", report.output, rfc3339(report.submitted_ms)))?;
        if let Some(error) = &report.failure {
            out.line(format!("why: {}", error.message()))?;
        }
        crate::job::show_tasks(out, report)?;
        crate::job::show_counters(out, report)?;
        show_slowest(out, report)?;
        return report.findings.lines().iter().try_for_each(|line| out.line(line));
    }
    out.line(format!(
        "output {}; submitted {}, {} ago",
        entry.output,
        rfc3339(entry.submitted_ms),
        human_millis(entry.wall_ms)
    ))?;
    if !view.driver.is_empty() {
        out.line(format!("driver {} on {}", view.epoch, view.driver))?;
    }
    out.line(format!(
        "{}: maps {}/{}, reduces {}/{}, {} of {} of input, {}, {} waiting for a slot",
        if view.phase.is_empty() { "planning" } else { &view.phase },
        entry.maps_done,
        entry.maps,
        entry.reduces_done,
        entry.reduces,
        human_size(view.bytes_done),
        human_size(view.bytes),
        counted(view.attempts_failed.into(), "failed attempt"),
        view.waiting,
    ))?;
    if view.attempts.is_empty() {
        return Ok(());
    }
    let mut columns = Columns::new(&[2, 3, 4]);
    columns.row(["task", "node", "time", "input", "memory"].map(str::to_owned).into());
    for attempt in &view.attempts {
        columns.row(vec![
            attempt.task.clone(),
            attempt.node.clone(),
            human_millis(attempt.elapsed_ms),
            human_size(attempt.bytes),
            human_size(attempt.memory),
        ]);
    }
    columns.print(out)
}

/// The tasks that held the job up, and where the data is uneven.
pub fn show_slowest(out: &mut Out, report: &JobReport) -> Outcome {
    let mut tasks: Vec<_> = report.tasks.iter().collect();
    tasks.sort_by_key(|task| std::cmp::Reverse(task.elapsed_ms));
    let named = tasks.iter().take(SLOWEST).map(|task| {
        format!(
            "{} {} {} on {} ({})",
            task.kind,
            task.index,
            human_millis(task.elapsed_ms),
            task.host,
            human_size(task.bytes)
        )
    });
    let named: Vec<String> = named.collect();
    if let Some(partitions) = report.partitions.as_ref().filter(|_| report.reduce.tasks > 1) {
        // A reduce with a multiple of what the others have decides how long the job takes.
        let uneven = partitions.largest_bytes > 4 * partitions.median_bytes.max(1);
        out.line(format!(
            "partitions       largest {} with {}, median {}{}",
            partitions.largest,
            human_size(partitions.largest_bytes),
            human_size(partitions.median_bytes),
            if uneven { ": some keys are far more frequent than others" } else { "" },
        ))?;
    }
    if named.is_empty() {
        return Ok(());
    }
    out.line(format!("slowest          {}", named.join(", ")))
}

/// `job logs`
pub async fn logs(context: &mut Context, args: &JobLogsArgs) -> Outcome {
    let fs = context.connect().await?;
    let job::JobLogs { mut logs, silent } = job::logs(&fs, &args.id).await?;
    for (node, why) in silent {
        complain(&format!("the logs on {node} are missing here: {why}"));
    }
    if let Some(wanted) = &args.task {
        let prefix = format!("{wanted}.");
        logs.retain(|log| log.name() == *wanted || log.name().starts_with(&prefix));
    }
    let out = &mut context.out;
    if out.json {
        let mut all = Vec::new();
        for log in &logs {
            let mut bytes = Vec::new();
            job::read_log(&fs, &args.id, log, |piece| bytes.extend_from_slice(piece)).await?;
            let text = String::from_utf8_lossy(&bytes);
            all.push(serde_json::json!({"task": log.name(), "node": log.host, "bytes": log.bytes, "text": text}));
        }
        return out.json(&all);
    }
    if logs.is_empty() {
        let of = args.task.as_ref().map_or_else(|| "no task of it".to_owned(), Clone::clone);
        let text = format!("job {}: {of} has written anything that is still kept", args.id);
        return Err(failure(ErrorCode::FileNotFound, text));
    }
    for log in &logs {
        out.line(format!("==> {} on {} <==", log.name(), log.host))?;
        out.flush()?;
        let mut written = Ok(());
        let mut last = b'\n';
        let print = |piece: &[u8]| {
            last = piece.last().copied().unwrap_or(last);
            if written.is_ok() {
                written = crate::output::write_stdout(piece);
            }
        };
        job::read_log(&fs, &args.id, log, print).await?;
        written.map_err(|error| crate::output::stdout_failure(&error))?;
        if last != b'\n' {
            out.line("")?;
        }
    }
    Ok(())
}

/// `job kill`
pub async fn kill(context: &mut Context, args: &JobIdArgs) -> Outcome {
    let fs = context.connect().await?;
    let report = job::kill(&fs, &args.id).await?;
    job::sweep(&fs).await;
    let out = &mut context.out;
    if out.json {
        return out.json(&report);
    }
    out.line(format!("job {} {}", report.id, report.state.in_words()))
}

/// `job resume`
pub async fn resume(context: &mut Context, args: &ResumeArgs) -> Outcome {
    let fs = context.connect().await?;
    if args.detach {
        let node = job::resume_detached(&fs, &args.id).await?;
        return say_detached(&mut context.out, &args.id, &node);
    }
    let (observer, control) = JobObserver::new();
    let resumed = Box::pin(job::resume(&fs, &args.id, args.force, observer));
    let running = watched(context, resumed, &control);
    let report = until_signal(context, &control, running).await?;
    finish(&mut context.out, report)
}

//! `job wordcount|grep|streaming|sort|join|teragen|terasort|teravalidate`: from arguments to jobs.

use cairn_client::fs::{ErrorCode, FileSystem};
use cairn_client::job::builtin::{self, JoinKind, JoinOptions, SortOptions, StreamingOptions};
use cairn_client::job::{JobReport, JobSpec, JobState};
use cairn_client::mapreduce::join::JoinType;
use cairn_client::mapreduce::tera::validate::counter;
use serde::Serialize;

use crate::args::{
    JobCommand, JoinArgs, JoinKindArg, JoinTypeArg, SortArgs, StreamingArgs, TeraOutput, TeravalidateArgs,
};
use crate::context::Context;
use crate::job::{common, finish, grep_spec, run, split_paths, wordcount_spec};
use crate::output::{Failure, Outcome, failure};
use crate::units::{counted, grouped};

/// Runs the job of a command that is nothing but a job.
pub async fn run_command(context: &mut Context, command: &JobCommand) -> Outcome {
    if let JobCommand::Streaming(_) = command {
        // What is wrong with it is told without a cluster.
        outline(command)?.validate()?;
    }
    let fs = context.connect().await?;
    let spec = specify(&fs, command, true).await?;
    let report = run(context, &fs, spec).await?;
    finish(&mut context.out, report)
}

/// The job of a command as far as it is known without a look at the cluster: what it reads, what it writes, and what holds for every job.
pub fn outline(command: &JobCommand) -> Outcome<JobSpec> {
    Ok(match command {
        JobCommand::Wordcount(args) => wordcount_spec(args),
        JobCommand::Grep(args) => grep_spec(args),
        JobCommand::Streaming(args) => streaming(args)?,
        JobCommand::Sort(args) => {
            let (inputs, output) = split_paths(&args.paths);
            common(JobSpec::new("sort", inputs, output), &args.job)
        }
        JobCommand::Join(args) => {
            let inputs = args.left.iter().chain(&args.right).cloned().collect();
            common(JobSpec::new("join", inputs, &args.output), &args.job)
        }
        JobCommand::Teragen(args) => {
            let base = tera(JobSpec::new("teragen", Vec::new(), &args.path), &args.output);
            builtin::teragen(base, args.records, args.maps.unwrap_or(0))
        }
        JobCommand::Terasort(args) => {
            let (inputs, output) = split_paths(&args.paths);
            common(JobSpec::new("terasort", inputs, output), &args.job)
        }
        JobCommand::Teravalidate(args) => teravalidation(args),
        JobCommand::Distcp(_) => {
            let text = "distcp decides what to copy when it runs, and leaves no job behind: it can be neither planned nor a stage";
            return Err(Failure::Usage(text.into()));
        }
        _ => return Err(Failure::Usage("that is no job".into())),
    })
}

/// The whole job of a command; its input is looked at as far as the job needs it. Files that it brings along are stored if `ship`.
pub async fn specify(fs: &FileSystem, command: &JobCommand, ship: bool) -> Outcome<JobSpec> {
    let base = outline(command)?;
    Ok(match command {
        JobCommand::Streaming(args) if ship => builtin::ship(fs, base, &args.file).await?,
        JobCommand::Sort(args) => builtin::sort(fs, base, &sort_options(args)).await?,
        JobCommand::Join(args) => {
            let base = JobSpec { inputs: Vec::new(), ..base };
            builtin::join(fs, base, &join_options(args)).await?
        }
        JobCommand::Terasort(_) => builtin::terasort(fs, base).await?,
        _ => base,
    })
}

fn streaming(args: &StreamingArgs) -> Outcome<JobSpec> {
    let base = common(JobSpec::new("streaming", args.input.clone(), &args.output), &args.job);
    let options = StreamingOptions {
        mapper: args.mapper.clone(),
        reducer: args.reducer.clone(),
        combiner: args.combiner.clone(),
        partitioner: args.partitioner.clone(),
        properties: args.define.clone(),
    };
    Ok(builtin::streaming(base, &options)?)
}

fn sort_options(args: &SortArgs) -> SortOptions {
    SortOptions {
        keys: args.key.clone(),
        separator: args.separator.clone(),
        numeric: args.numeric,
        reverse: args.reverse,
        unique: args.unique,
        parts_only: !args.total_order,
    }
}

fn join_options(args: &JoinArgs) -> JoinOptions {
    JoinOptions {
        kind: match args.kind {
            JoinKindArg::Reduce => JoinKind::Reduce,
            JoinKindArg::Map => JoinKind::Map,
            JoinKindArg::Broadcast => JoinKind::Broadcast,
        },
        join_type: match args.join_type {
            JoinTypeArg::Inner => JoinType::Inner,
            JoinTypeArg::Left => JoinType::Left,
            JoinTypeArg::Right => JoinType::Right,
            JoinTypeArg::Full => JoinType::Full,
            JoinTypeArg::Semi => JoinType::Semi,
            JoinTypeArg::Anti => JoinType::Anti,
        },
        left: args.left.clone(),
        right: args.right.clone(),
        left_key: args.left_key,
        right_key: args.right_key,
        separator: args.separator.clone(),
    }
}

fn tera(mut spec: JobSpec, output: &TeraOutput) -> JobSpec {
    spec.output_replication = output.replication.unwrap_or(0);
    if let Some(bytes) = output.task_memory {
        spec.memory_limit = bytes;
    }
    spec
}

fn teravalidation(args: &TeravalidateArgs) -> JobSpec {
    let base = tera(JobSpec::new("teravalidate", vec![args.input.clone()], &args.path), &args.output);
    builtin::teravalidate(base)
}

/// What `--json` adds to the report of a teravalidate.
#[derive(Serialize)]
struct Validated<'a> {
    #[serde(flatten)]
    report: &'a JobReport,
    validation: Validation,
}

#[derive(Serialize)]
struct Validation {
    checksum: String,
    records: u64,
    duplicate_keys: u64,
    misordered: u64,
    errors: Vec<String>,
}

/// `job teravalidate`: fails if the records are not in order.
pub async fn teravalidate(context: &mut Context, args: &TeravalidateArgs) -> Outcome {
    let fs = context.connect().await?;
    let report = run(context, &fs, teravalidation(args)).await?;
    if report.state != JobState::Succeeded {
        return finish(&mut context.out, report);
    }
    let (checksum, errors) = builtin::validation(&fs, &args.path).await?;
    let count = |name| report.counters.user(name);
    let validation = Validation {
        checksum,
        records: count(counter::RECORDS),
        duplicate_keys: count(counter::DUPLICATE_KEYS),
        misordered: count(counter::MISORDERED),
        errors,
    };
    let (misordered, first) = (validation.misordered, validation.errors.first().cloned());
    let out = &mut context.out;
    if out.json {
        out.json(&Validated { report: &report, validation })?;
    } else {
        out.line(format!(
            "{} records, checksum {}, {}",
            grouped(validation.records),
            validation.checksum,
            counted(validation.duplicate_keys, "duplicate key")
        ))?;
        for error in &validation.errors {
            out.line(format!("error: {error}"))?;
        }
        finish(out, report)?;
    }
    match first {
        Some(error) => {
            let text =
                format!("{} is not sorted: {}, the first: {error}", args.input, counted(misordered, "wrong pair"));
            Err(failure(ErrorCode::Corrupt, text))
        }
        None => Ok(()),
    }
}

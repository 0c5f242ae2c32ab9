//! `job streaming|sort|join|teragen|terasort|teravalidate`.

use cairn_client::fs::{ErrorCode, FileSystem};
use cairn_client::job::builtin::{self, JoinKind, JoinOptions, SortOptions, StreamingOptions};
use cairn_client::job::{JobReport, JobSpec, JobState};
use cairn_client::mapreduce::join::JoinType;
use cairn_client::mapreduce::tera::validate::counter;
use serde::Serialize;

use crate::args::{
    JoinArgs, JoinKindArg, JoinTypeArg, SortArgs, StreamingArgs, TeraOutput, TeragenArgs, TerasortArgs,
    TeravalidateArgs,
};
use crate::context::Context;
use crate::job::{common, finish, run, split_paths};
use crate::output::{Outcome, failure};
use crate::units::{counted, grouped};

async fn run_and_finish(context: &mut Context, fs: &FileSystem, spec: JobSpec) -> Outcome {
    let report = run(context, fs, spec).await?;
    finish(&mut context.out, report)
}

/// `job streaming`
pub async fn streaming(context: &mut Context, args: &StreamingArgs) -> Outcome {
    let base = common(JobSpec::new("streaming", args.input.clone(), &args.output), &args.job);
    let options = StreamingOptions {
        mapper: args.mapper.clone(),
        reducer: args.reducer.clone(),
        combiner: args.combiner.clone(),
        partitioner: args.partitioner.clone(),
        properties: args.define.clone(),
    };
    let spec = builtin::streaming(base, &options)?;
    spec.validate()?;
    let fs = context.connect().await?;
    let spec = builtin::ship(&fs, spec, &args.file).await?;
    run_and_finish(context, &fs, spec).await
}

/// `job sort`
pub async fn sort(context: &mut Context, args: &SortArgs) -> Outcome {
    let (inputs, output) = split_paths(&args.paths);
    let base = common(JobSpec::new("sort", inputs, output), &args.job);
    let options = SortOptions {
        keys: args.key.clone(),
        separator: args.separator.clone(),
        numeric: args.numeric,
        reverse: args.reverse,
        unique: args.unique,
        parts_only: !args.total_order,
    };
    let fs = context.connect().await?;
    let spec = builtin::sort(&fs, base, &options).await?;
    run_and_finish(context, &fs, spec).await
}

/// `job join`
pub async fn join(context: &mut Context, args: &JoinArgs) -> Outcome {
    let base = common(JobSpec::new("join", Vec::new(), &args.output), &args.job);
    let options = JoinOptions {
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
    };
    let fs = context.connect().await?;
    let spec = builtin::join(&fs, base, &options).await?;
    run_and_finish(context, &fs, spec).await
}

fn tera(mut spec: JobSpec, output: &TeraOutput) -> JobSpec {
    spec.output_replication = output.replication.unwrap_or(0);
    if let Some(bytes) = output.task_memory {
        spec.memory_limit = bytes;
    }
    spec
}

/// `job teragen`
pub async fn teragen(context: &mut Context, args: &TeragenArgs) -> Outcome {
    let base = tera(JobSpec::new("teragen", Vec::new(), &args.path), &args.output);
    let spec = builtin::teragen(base, args.records, args.maps.unwrap_or(0));
    let fs = context.connect().await?;
    run_and_finish(context, &fs, spec).await
}

/// `job terasort`
pub async fn terasort(context: &mut Context, args: &TerasortArgs) -> Outcome {
    let (inputs, output) = split_paths(&args.paths);
    let base = common(JobSpec::new("terasort", inputs, output), &args.job);
    let fs = context.connect().await?;
    let spec = builtin::terasort(&fs, base).await?;
    run_and_finish(context, &fs, spec).await
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
    let base = tera(JobSpec::new("teravalidate", vec![args.input.clone()], &args.path), &args.output);
    let fs = context.connect().await?;
    let report = run(context, &fs, builtin::teravalidate(base)).await?;
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

//! `job distcp`

use cairn_client::fs::{ErrorCode, FileSystem};
use cairn_client::job::JobReport;
use cairn_client::job::builtin::distcp::{DistCpOptions, DistCpSummary, Place, Prepared, prepare};
use serde::Serialize;

use crate::args::DistcpArgs;
use crate::context::Context;
use crate::job::{failure_of, run, show_counters, show_tasks};
use crate::output::{Failure, Outcome, failure};
use crate::units::{counted, human_size};

/// What `--json` prints: the job's report, if there was one, and what came out.
#[derive(Serialize)]
struct Copied<'a> {
    #[serde(flatten)]
    report: Option<&'a JobReport>,
    distcp: &'a DistCpSummary,
}

/// `job distcp`: fails if a file could not be copied.
pub async fn distcp(context: &mut Context, args: &DistcpArgs) -> Outcome {
    let places = args.places.iter().map(|text| Place::parse(text)).collect::<Result<Vec<_>, _>>();
    let places = places.map_err(|error| Failure::Usage(error.message().to_owned()))?;
    let Some((target, sources)) = places.split_last() else { return Ok(()) };
    let options = DistCpOptions {
        update: args.update,
        overwrite: args.overwrite,
        delete: args.delete,
        preserve: args.preserve.clone().unwrap_or_default(),
        bandwidth: args.bandwidth.unwrap_or(0) << 20,
        maps: args.maps.unwrap_or(0),
    };
    let fs = context.connect().await?;
    let mut prepared = prepare(&fs, sources, target, &options).await?;
    let done = copy(context, &fs, &mut prepared).await;
    prepared.clean_up().await;
    let (report, summary) = done?;
    show(context, report.as_ref(), &summary)
}

async fn copy(
    context: &mut Context,
    fs: &FileSystem,
    prepared: &mut Prepared,
) -> Outcome<(Option<JobReport>, DistCpSummary)> {
    let report = match prepared.spec().await? {
        Some(spec) => Some(run(context, fs, spec).await?),
        None => None,
    };
    if prepared.is_local() {
        prepared.copy_local().await;
    }
    let summary = prepared.finish(report.as_ref()).await?;
    Ok((report, summary))
}

fn show(context: &mut Context, report: Option<&JobReport>, summary: &DistCpSummary) -> Outcome {
    let out = &mut context.out;
    if out.json {
        out.json(&Copied { report, distcp: summary })?;
    } else {
        out.line(format!(
            "{} copied ({}), {} skipped, {} failed, {} deleted, {} made",
            counted(summary.copied, "file"),
            human_size(summary.bytes_copied),
            summary.skipped,
            summary.failed,
            summary.deleted,
            counted(summary.directories, "directory").replace("directorys", "directories"),
        ))?;
        for failed in &summary.failures {
            out.line(format!("failed: {failed}"))?;
        }
        if let Some(report) = report {
            show_tasks(out, report)?;
            show_counters(out, report)?;
        }
    }
    if let Some(error) = report.and_then(failure_of) {
        return Err(error.into());
    }
    match summary.failures.first() {
        Some(first) => Err(failure(
            ErrorCode::JobFailed,
            format!("{} not copied, the first: {first}", counted(summary.failed, "file")),
        )),
        None => Ok(()),
    }
}

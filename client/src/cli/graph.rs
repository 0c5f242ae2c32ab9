//! `job graph`: jobs that feed each other, described in a file.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use cairn_client::fs::{Error, ErrorCode, FileSystem, Result};
use cairn_client::job::{GraphReport, GraphStage, JobGraph, JobObserver, JobSpec, StageReport};
use cairn_common::process;
use serde::Deserialize;

use crate::args::{GraphArgs, JobCommand};
use crate::builtin::{outline, specify};
use crate::context::Context;
use crate::job::CANCEL_LIMIT;
use crate::jobs;
use crate::output::{Columns, Failure, Out, Outcome, failure};
use crate::units::{counted, human_millis};

/// Descriptions are written by people.
const MAX_BYTES: u64 = 1 << 20;

/// The file.
#[derive(Deserialize, Debug)]
#[serde(deny_unknown_fields)]
struct Description {
    id: Option<String>,
    /// `false`: nodes keep nothing from stage to stage.
    keep: Option<bool>,
    #[serde(default)]
    stage: Vec<StageDescription>,
}

#[derive(Deserialize, Debug)]
#[serde(deny_unknown_fields)]
struct StageDescription {
    name: String,
    /// The words of a job command.
    job: Vec<String>,
    #[serde(default)]
    after: Vec<String>,
    #[serde(default)]
    temporary: bool,
}

/// What a description means.
struct Described {
    id: Option<String>,
    graph: JobGraph,
    /// The stages' commands, by name.
    commands: BTreeMap<String, JobCommand>,
}

fn described(name: &str, text: &str) -> Outcome<Described> {
    let refuse = |why: String| failure(ErrorCode::InvalidArgument, format!("{name}: {why}"));
    let description: Description = if name.ends_with(".json") {
        serde_json::from_str(text).map_err(|error| refuse(error.to_string()))?
    } else {
        toml::from_str(text).map_err(|error| refuse(error.to_string()))?
    };
    let (mut graph, mut commands) = (JobGraph::new(), BTreeMap::new());
    for StageDescription { name: stage, job, after, temporary } in description.stage {
        let of_stage = |error: Failure| match error {
            Failure::Usage(why) => refuse(format!("stage {stage:?}: {why}")),
            Failure::Error(error) => refuse(format!("stage {stage:?}: {}", error.message())),
            other => other,
        };
        let command = jobs::parse(&job).map_err(of_stage)?;
        let spec = outline(&command).map_err(of_stage)?;
        graph = graph.with(GraphStage { name: stage.clone(), spec, after, temporary });
        commands.insert(stage, command);
    }
    if description.keep == Some(false) {
        graph = graph.keeping_nothing();
    }
    graph.check().map_err(|error| refuse(error.message().to_owned()))?;
    Ok(Described { id: description.id, graph, commands })
}

/// `job graph`
pub async fn graph(context: &mut Context, args: &GraphArgs) -> Outcome {
    let path = std::path::PathBuf::from(&args.file);
    let disk = context.env.fs.clone();
    let read = context.env.work.io(move || cairn_common::durable::read_all(&*disk, &path, MAX_BYTES)).await;
    let bytes = read.map_err(|error| Error::io(format!("cannot read {}", args.file), &error))?;
    let text = String::from_utf8(bytes)
        .map_err(|_| failure(ErrorCode::InvalidArgument, format!("{} is not UTF-8 text", args.file)))?;
    let Described { id, graph, commands } = described(&args.file, &text)?;
    if args.check {
        return context.out.line(format!("{} is well: {}", args.file, counted(commands.len() as u64, "stage")));
    }
    let Some(id) = args.id.clone().or(id) else {
        let text =
            format!("{} names no id, and a run needs one to go on under: add id = \"...\" or use --id", args.file);
        return Err(failure(ErrorCode::InvalidArgument, text));
    };
    let fs = context.connect().await?;
    let report = run(context, &fs, &graph, &id, &commands).await?;
    show(&mut context.out, &report)
}

/// Runs the graph; a signal cancels what runs of it, and ends the program when that has cleaned up.
async fn run(
    context: &Context,
    fs: &FileSystem,
    graph: &JobGraph,
    id: &str,
    commands: &BTreeMap<String, JobCommand>,
) -> Outcome<GraphReport> {
    let controls = Mutex::new(Vec::new());
    let observe = |_: &str| {
        let (observer, control) = JobObserver::new();
        controls.lock().unwrap_or_else(PoisonError::into_inner).push(control);
        observer
    };
    // Samples and sizes are taken when the input is there.
    let refine = async |name: &str, spec: JobSpec, _: &[StageReport]| -> Result<JobSpec> {
        let Some(command) = commands.get(name) else { return Ok(spec) };
        specify(fs, command, true).await.map_err(|failure| match failure {
            Failure::Error(error) => error,
            Failure::Usage(text) => Error::new(ErrorCode::InvalidArgument, text),
            _ => Error::new(ErrorCode::Internal, "the job could not be described"),
        })
    };
    let mut running = Box::pin(graph.run_with(fs, id, observe, refine));
    tokio::select! {
        biased;
        () = process::shutdown_signal() => {}
        report = &mut running => return Ok(report?),
    }
    controls.lock().unwrap_or_else(PoisonError::into_inner).iter().for_each(|control| control.cancel());
    // Whatever it says now: the person has asked for the end.
    let _ = context.env.clock.timeout(CANCEL_LIMIT, running).await;
    Err(Failure::Exit(130))
}

fn show(out: &mut Out, report: &GraphReport) -> Outcome {
    if out.json {
        out.json(report)?;
    } else {
        let mut columns = Columns::new(&[3]);
        columns.row(["stage", "state", "job", "time", "output"].map(str::to_owned).into());
        for stage in &report.stages {
            let row = match (&stage.report, &stage.why) {
                (Some(job), _) => {
                    let state = match (stage.earlier, stage.remade) {
                        (true, _) => "succeeded before".to_owned(),
                        (false, 0) => job.state.as_str().to_owned(),
                        (false, remade) => format!("{} (made again: {remade})", job.state.as_str()),
                    };
                    vec![state, job.id.clone(), human_millis(job.wall_ms), job.output.clone()]
                }
                (None, why) => vec!["not run".into(), String::new(), String::new(), why.clone().unwrap_or_default()],
            };
            columns.row([vec![stage.name.clone()], row].concat());
        }
        columns.print(out)?;
        out.line(format!("graph {} {} in {}", report.id, report.state.as_str(), human_millis(report.wall_ms)))?;
    }
    Ok(report.check()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &str) -> String {
        match described("g.toml", text) {
            Err(Failure::Error(error)) => error.message().to_owned(),
            _ => panic!("{text} is taken"),
        }
    }

    #[test]
    fn a_description_becomes_a_graph() {
        let text = "id = \"n\"\n[[stage]]\nname = \"w\"\njob = [\"wordcount\", \"/in\", \"/w\"]\ntemporary = true\n\
            [[stage]]\nname = \"s\"\njob = [\"sort\", \"--reducers\", \"2\", \"/w\", \"/s\"]\n";
        let Ok(Described { id, commands, .. }) = described("g.toml", text) else { panic!("refused") };
        assert_eq!((id.as_deref(), commands.len()), (Some("n"), 2));
        let json = r#"{"stage": [{"name": "w", "job": ["wordcount", "/in", "/w"], "after": []}]}"#;
        assert!(described("g.json", json).is_ok());
    }

    #[test]
    fn descriptions_that_mean_nothing_are_refused_with_the_stage() {
        assert!(refused("").contains("0 stages"));
        assert!(refused("[[stage]]\nname = \"a\"\n").contains("job"));
        assert!(refused("[[stage]]\nname = \"a\"\nwhat = 1\njob = []\n").contains("what"));
        let stage = |job: &str| refused(&format!("[[stage]]\nname = \"a\"\njob = {job}\n"));
        assert!(stage("[\"nonsense\"]").contains("stage \"a\""));
        assert!(stage("[\"ls\"]").contains("no job"));
        assert!(stage("[\"distcp\", \"/a\", \"/b\"]").contains("distcp"));
        assert!(stage("[\"wordcount\", \"/a\", \"/a\"]").contains("waits for itself"));
    }
}

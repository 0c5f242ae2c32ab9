//! Programs of one's own: the same executable is the driver on the user's machine and, started by a node, the worker of its tasks.
//!
//! ```no_run
//! use std::process::ExitCode;
//!
//! use cairn_client::mapreduce::{self, InputFormat, typed::Job};
//! # use cairn_client::mapreduce::{Output, Record, Result, typed::*};
//! # struct Words;
//! # impl Map for Words {
//! #     type Key = String;
//! #     type Value = u64;
//! #     fn map(&mut self, record: Record<'_>, out: &mut Emit<'_, String, u64>) -> Result<()> {
//! #         out.emit(record.text()?, 1u64)
//! #     }
//! # }
//! # struct Count;
//! # impl Reduce for Count {
//! #     type Key = String;
//! #     type Value = u64;
//! #     fn reduce(&mut self, _: String, _: &mut TypedValues<'_, '_, String, u64>, _: &mut Output) -> Result<()> {
//! #         Ok(())
//! #     }
//! # }
//!
//! fn main() -> ExitCode {
//!     mapreduce::main(|jobs| {
//!         jobs.add("words", |_| Ok(Job::new(|_| Ok(Words)).sum().reduce(|_| Ok(Count)).input(InputFormat::Words)));
//!     })
//! }
//! ```
//!
//! `words --input /books --output /counts --namenode 127.0.0.1:8020` runs it. A program that drives several jobs, or has a command line of its own, uses
//! [`main_with`].

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;

use cairn_common::Env;
use cairn_proto::{Error, ErrorCode, Result};

use super::ship::{CacheFile, Executable};
use super::spec::{JobObserver, JobSpec};
use super::worker::{WORKER_ARGUMENT, program_worker_main};
use super::{JobReport, JobState, driver};
use crate::fs::{ClientSettings, FileSystem};
use crate::mapreduce::Program;

type Properties = BTreeMap<String, String>;
type Make = Box<dyn Fn(&Properties) -> Result<Box<dyn Program>> + Send + Sync>;

/// The jobs that an executable knows, by name.
#[derive(Default)]
pub struct Jobs {
    by_name: BTreeMap<String, Make>,
}

impl Jobs {
    /// Adds a job. `make` makes its program from the properties that the driver was given; it runs in the driver, to check them, and in every worker.
    pub fn add<P: Program + 'static>(
        &mut self,
        name: &str,
        make: impl Fn(&Properties) -> Result<P> + Send + Sync + 'static,
    ) -> &mut Self {
        self.by_name.insert(name.to_owned(), Box::new(move |properties| Ok(Box::new(make(properties)?))));
        self
    }

    fn program(&self, name: &str, properties: &Properties) -> Result<Box<dyn Program>> {
        let Some(make) = self.by_name.get(name) else {
            let have: Vec<&str> = self.by_name.keys().map(String::as_str).collect();
            let text = format!("this program has no job {name:?}: it has {}", have.join(", "));
            return Err(Error::new(ErrorCode::InvalidArgument, text).with_subject(name));
        };
        make(properties)
    }
}

/// Runs the jobs of this executable on a cluster.
pub struct Launcher {
    fs: FileSystem,
    jobs: Jobs,
    executable: tokio::sync::OnceCell<Executable>,
}

impl Launcher {
    /// For a cluster that `fs` is connected to.
    pub fn new(fs: FileSystem, jobs: Jobs) -> Self {
        Self { fs, jobs, executable: tokio::sync::OnceCell::new() }
    }

    /// The cluster's files.
    pub fn fs(&self) -> &FileSystem {
        &self.fs
    }

    /// Makes `spec`, whose kind is one of this executable's jobs, one that a cluster can run: stores the executable there, if it is not stored yet.
    pub async fn prepare(&self, spec: JobSpec) -> Result<JobSpec> {
        let program = self.jobs.program(&spec.kind, &spec.properties)?;
        let executable = self.executable.get_or_try_init(|| Executable::own(&self.fs)).await?;
        Ok(JobSpec { executable: Some(executable.clone()), input_format: program.input(), ..spec })
    }

    /// Runs a job to its end, as [`super::run`] does; one that did not succeed is an error.
    pub async fn run(&self, spec: JobSpec) -> Result<JobReport> {
        let report = driver::run(&self.fs, self.prepare(spec).await?, JobObserver::none()).await?;
        if report.state == JobState::Succeeded {
            return Ok(report);
        }
        let error = report.failure.unwrap_or_else(|| Error::new(ErrorCode::JobFailed, "the job failed"));
        if report.stderr_tail.is_empty() {
            return Err(error);
        }
        let text = format!("{}; its standard error ended with:\n{}", error.message(), report.stderr_tail);
        Err(Error::new(error.code(), text).with_subject(error.subject()))
    }
}

const HELP: &str = "\
usage: PROGRAM [JOB] --input PATH... --output PATH [options]
  --input PATH          file, folder or glob of the cluster; may be given several times
  --output PATH         folder of the cluster that must not exist
  --reducers N          number of reducers; 0: the maps write the output
  -D NAME=VALUE         a property of the job; may be given several times
  --file [NAME=]FILE    a local file that every task finds on its disk; may be given several times
  --memory MIB          memory limit of a task
  --name NAME           name of the job, for people
  --namenode HOST:PORT  the cluster (default: CAIRN_NAMENODE or 127.0.0.1:8020)
  --user NAME           whom to act for (default: the user of this process)";

/// The `main` of an executable with jobs: runs one of them as its command line says.
pub fn main(define: impl FnOnce(&mut Jobs)) -> ExitCode {
    main_with(define, async |jobs, arguments| {
        let Some(command) = Command::parse(&jobs, arguments)? else {
            let names: Vec<&str> = jobs.by_name.keys().map(String::as_str).collect();
            println!("{HELP}\njobs: {}", names.join(", "));
            return Ok(());
        };
        let fs = FileSystem::connect(Env::system(), command.settings).await?;
        let mut spec = command.spec;
        for (name, local) in command.files {
            spec.cache_files.push(CacheFile::of_local(&fs, &name, Path::new(&local)).await?);
        }
        print_report(&Launcher::new(fs, jobs).run(spec).await?);
        Ok(())
    })
}

/// The `main` of an executable with jobs that `drive` runs. It is given the arguments after the program's name; its error is printed in one line.
pub fn main_with(define: impl FnOnce(&mut Jobs), drive: impl AsyncFnOnce(Jobs, Vec<String>) -> Result<()>) -> ExitCode {
    let mut jobs = Jobs::default();
    define(&mut jobs);
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let code = match &arguments[..] {
        [first, descriptor] if first == WORKER_ARGUMENT => {
            let make = move |kind: &str, properties: &Properties, _reducers: u32| jobs.program(kind, properties);
            runtime.block_on(program_worker_main(descriptor, &make))
        }
        _ => match runtime.block_on(drive(jobs, arguments)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{}", error.message());
                ExitCode::FAILURE
            }
        },
    };
    // A thread may be waiting for something that does not come: it must not hold the end up.
    runtime.shutdown_background();
    code
}

/// A command line of [`main`].
#[derive(Debug)]
struct Command {
    settings: ClientSettings,
    spec: JobSpec,
    /// Name on the nodes, local path.
    files: Vec<(String, String)>,
}

impl Command {
    /// `None`: help is asked for.
    fn parse(jobs: &Jobs, arguments: Vec<String>) -> Result<Option<Self>> {
        let refuse = |text: String| Err(Error::new(ErrorCode::InvalidArgument, text));
        let address = std::env::var("CAIRN_NAMENODE").unwrap_or_else(|_| "127.0.0.1:8020".into());
        let mut command =
            Self { settings: ClientSettings::at(address), spec: JobSpec::new("", Vec::new(), ""), files: Vec::new() };
        let mut name = None;
        let mut rest = arguments.into_iter();
        while let Some(argument) = rest.next() {
            if argument == "--help" || argument == "-h" {
                return Ok(None);
            }
            if !argument.starts_with('-') && command.spec.kind.is_empty() {
                command.spec.kind = argument;
                continue;
            }
            let known = HELP.lines().any(|line| line.trim_start().split(' ').next() == Some(&argument));
            if !known {
                return refuse(format!("unknown argument {argument:?}; --help shows what there is"));
            }
            let Some(value) = rest.next() else { return refuse(format!("{argument} needs a value")) };
            match argument.as_str() {
                "--input" => command.spec.inputs.push(value),
                "--output" => command.spec.output = value,
                "--reducers" => command.spec.reducers = Some(number(&argument, &value)?),
                "--memory" => command.spec.memory_limit = number::<u64>(&argument, &value)?.saturating_mul(1 << 20),
                "--name" => name = Some(value),
                "--namenode" => command.settings.namenode = value,
                "--user" => command.settings.user = Some(value),
                "--file" => command.files.push(named_file(&value)),
                _ => match value.split_once('=') {
                    Some((key, value)) => {
                        command.spec.properties.insert(key.to_owned(), value.to_owned());
                    }
                    None => return refuse(format!("-D {value}: a property is NAME=VALUE")),
                },
            }
        }
        if command.spec.kind.is_empty() {
            let mut names = jobs.by_name.keys();
            match (names.next(), names.next()) {
                (Some(only), None) => command.spec.kind.clone_from(only),
                _ => return refuse("name the job to run; --help shows what there is".into()),
            }
        }
        if command.spec.output.is_empty() {
            return refuse("--output is missing; --help shows what there is".into());
        }
        command.spec.name = name.unwrap_or_else(|| command.spec.kind.clone());
        jobs.program(&command.spec.kind, &command.spec.properties)?;
        Ok(Some(command))
    }
}

fn number<T: std::str::FromStr>(argument: &str, value: &str) -> Result<T> {
    let text = || format!("{argument} {value}: not a number in range");
    value.parse().map_err(|_| Error::new(ErrorCode::InvalidArgument, text()))
}

/// `NAME=FILE`, or a file under its own name.
fn named_file(value: &str) -> (String, String) {
    match value.split_once('=') {
        Some((name, file)) => (name.to_owned(), file.to_owned()),
        None => {
            let name = Path::new(value).file_name().map(|name| name.to_string_lossy().into_owned());
            (name.unwrap_or_default(), value.to_owned())
        }
    }
}

fn print_report(report: &JobReport) {
    println!(
        "{} ({}) succeeded in {:.1} s: {}",
        report.id,
        report.name,
        report.wall_ms as f64 / 1_000.0,
        report.output
    );
    println!("tasks: {} maps, {} reduces", report.map.tasks, report.reduce.tasks);
    for line in report.findings.lines() {
        println!("{line}");
    }
    for (name, value) in report.counters.iter() {
        println!("  {name} = {value}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mapreduce::wordcount::WordCount;

    fn jobs(names: &[&str]) -> Jobs {
        let mut jobs = Jobs::default();
        for name in names {
            jobs.add(name, |properties| match properties.get("bad") {
                Some(why) => Err(Error::new(ErrorCode::InvalidArgument, why.clone())),
                None => Ok(WordCount { combine: true }),
            });
        }
        jobs
    }

    fn parse(names: &[&str], line: &str) -> Result<Option<Command>> {
        Command::parse(&jobs(names), line.split_whitespace().map(str::to_owned).collect())
    }

    #[test]
    fn a_command_line_becomes_a_job() {
        let line = "--input /a --input /b --output /c --reducers 3 -D x=1=2 --file stop=/etc/x --file /y/z --memory 100 --user u";
        let command = parse(&["words"], line).unwrap().unwrap();
        let spec = &command.spec;
        assert_eq!((&*spec.kind, &*spec.name, &*spec.output, spec.reducers), ("words", "words", "/c", Some(3)));
        assert_eq!((&spec.inputs[..], &*spec.properties["x"]), (&["/a".to_owned(), "/b".to_owned()][..], "1=2"));
        assert_eq!(command.files, [("stop".into(), "/etc/x".into()), ("z".into(), "/y/z".into())]);
        assert_eq!((spec.memory_limit, command.settings.user.as_deref()), (100 << 20, Some("u")));
        assert_eq!(parse(&["a", "b"], "b --output /c").unwrap().unwrap().spec.kind, "b");
        assert!(parse(&["a"], "--output --help").unwrap().is_some());
        assert!(parse(&["a"], "x --help").unwrap().is_none());
    }

    #[test]
    fn a_bad_command_line_is_refused() {
        let refused = |names: &[&str], line: &str| parse(names, line).unwrap_err().message().to_owned();
        assert_eq!(refused(&["a"], "--output"), "--output needs a value");
        assert!(refused(&["a"], "--outptu /x").contains("unknown argument \"--outptu\""));
        assert!(refused(&["a"], "a b --output /x").contains("unknown argument \"b\""));
        assert!(refused(&["a", "b"], "--output /x").contains("name the job"));
        assert_eq!(refused(&["a", "b"], "c --output /x"), "this program has no job \"c\": it has a, b");
        assert!(refused(&["a"], "--input /x").contains("--output is missing"));
        assert_eq!(refused(&["a"], "--output /x -D bad=no"), "no");
        assert!(refused(&["a"], "--output /x --reducers -1").contains("not a number"));
        assert!(refused(&["a"], "--output /x -D y").contains("NAME=VALUE"));
    }
}

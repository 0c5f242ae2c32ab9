//! Jobs: the driver, and the worker process that its tasks run in.
//!
//! # Overview
//! [`run`] takes a [`JobSpec`], cuts its input at block edges ([`splits`]), and drives it to its end: the pure [`scheduler`] decides what runs where, a
//! [`node`] link per datanode carries it out, and the output is committed by one rename (see [`driver`], [`commit`]). [`plan()`] shows what would run
//! where. Tasks run in worker processes that datanodes start ([`worker`]); what they compute is in [`crate::mapreduce`].
//!
//! What a driver decides is written to a [`journal`] in the file system first. So another one can go on when it dies ([`resume`]), a job can be driven
//! by a node of the cluster ([`submit_detached`]), and be followed, listed and killed from anywhere ([`status()`], [`list`], [`kill`]).
//!
//! ```no_run
//! use cairn_client::fs::{ClientSettings, FileSystem};
//! use cairn_client::job::{self, JobObserver, JobSpec};
//!
//! # async fn example() -> cairn_client::fs::Result<()> {
//! let fs = FileSystem::connect(cairn_common::Env::system(), ClientSettings::at("127.0.0.1:8020")).await?;
//! let spec = JobSpec::wordcount(vec!["/books".into()], "/counts", true);
//! let report = job::run(&fs, spec, JobObserver::none()).await?;
//! println!("{:?}: {} words", report.state, report.records.map_out);
//! # Ok(())
//! # }
//! ```

pub mod builtin;
mod commit;
mod contact;
mod content;
mod control;
mod driver;
mod events;
mod findings;
mod graph;
mod history;
mod journal;
mod launch;
mod node;
mod plan;
mod poison;
mod report;
mod scheduler;
mod ship;
mod spec;
mod splits;
mod submit;
pub mod worker;

pub use control::{
    AttemptView, JobLog, JobLogs, JobView, kill, logs, read_log, resume, resume_detached, short_name, status,
    submit_detached,
};
pub use driver::run;
pub use findings::{Findings, HotKey, SkippedRecord};
pub use graph::{GraphReport, GraphStage, JobGraph, StageReport};
pub use history::{JobEntry, Stage, list, report, sweep};
pub use launch::{Jobs, Launcher, main, main_with};
pub use plan::{JobPlan, PlannedTask, plan};
pub use report::{
    ByteSummary, JobReport, JobState, Locality, MapSummary, NodeTasks, PartitionSummary, PhaseTimes, RecordSummary,
    ReduceSummary, TaskReport,
};
pub use ship::{CacheFile, Executable, Shipped, store, target};
pub use spec::{DEFAULT_TASK_MEMORY, JobControl, JobObserver, JobProgress, JobSpec, Keep, MAX_ATTEMPTS, Phase};

//! Jobs: the driver, and the worker process that its tasks run in.
//!
//! # Overview
//! [`run`] takes a [`JobSpec`], cuts its input at block edges ([`splits`]), and drives it to its end: the pure [`scheduler`] decides what runs where, a
//! [`node`] link per datanode carries it out, and the output is committed by one rename (see [`driver`]). [`plan()`] shows what would run where. Tasks run
//! in worker processes that datanodes start ([`worker`]); what they compute is in [`crate::mapreduce`].
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
mod driver;
mod launch;
mod node;
mod plan;
mod report;
mod scheduler;
mod ship;
mod spec;
mod splits;
pub mod worker;

pub use driver::run;
pub use launch::{Jobs, Launcher, main, main_with};
pub use plan::{JobPlan, PlannedTask, plan};
pub use report::{
    ByteSummary, JobReport, JobState, Locality, MapSummary, NodeTasks, PhaseTimes, RecordSummary, ReduceSummary,
    TaskReport,
};
pub use ship::{CacheFile, Executable, Shipped, store, target};
pub use spec::{DEFAULT_TASK_MEMORY, JobControl, JobObserver, JobProgress, JobSpec, MAX_ATTEMPTS, Phase};

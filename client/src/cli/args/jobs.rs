//! Arguments of jobs.

use cairn_proto::mapoutput::MAX_PARTITIONS;
use clap::{Args, Subcommand};

use super::builtin::{DistcpArgs, JoinArgs, SortArgs, StreamingArgs, TeragenArgs, TerasortArgs, TeravalidateArgs};
use super::values::{cluster_path, job_id, log_name, part, priority, replication, thousandths};
use crate::units::{parse_millis, parse_size};

#[derive(Subcommand, Debug)]
pub enum JobCommand {
    /// Count words: `word<TAB>count`, sorted within each part
    Wordcount(WordcountArgs),
    /// Find the lines that match a regular expression
    Grep(GrepArgs),
    /// Run commands as mapper and reducer, as Hadoop Streaming does
    Streaming(Box<StreamingArgs>),
    /// Sort lines, by all of each or by parts of them
    Sort(SortArgs),
    /// Join delimited files by a field
    Join(Box<JoinArgs>),
    /// Make records of the sort benchmark
    Teragen(TeragenArgs),
    /// Sort records of the sort benchmark
    Terasort(TerasortArgs),
    /// Check the order of such records and tell their checksum
    Teravalidate(TeravalidateArgs),
    /// Copy directories between clusters, within one, or from this machine
    Distcp(DistcpArgs),
    /// Show which task would run where, and run nothing
    Plan(PlanArgs),
    /// Run jobs that feed each other, from a file that describes them
    Graph(GraphArgs),
    /// Run a job command, if asked on a node of the cluster: `cairn job run --detach -- wordcount /in /out`
    Run(RunArgs),
    /// List jobs: those that are not over, then the newest that are
    Ls(JobLsArgs),
    /// Show how a job stands, or how it ended
    Status(JobIdArgs),
    /// Print what tasks wrote to their standard error
    Logs(JobLogsArgs),
    /// End a job, whoever drives it and wherever
    Kill(JobIdArgs),
    /// Go on with a job whose driver has died
    Resume(ResumeArgs),
}

/// What every job takes.
#[derive(Args, Clone, Debug, Default)]
pub struct JobArgs {
    /// Reduce tasks, each writing one part [default: as fits input and cluster]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=i64::from(MAX_PARTITIONS)))]
    pub reducers: Option<u32>,
    /// Cut blocks into splits of this size [default: one split a block]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub split_size: Option<u64>,
    /// Memory of one task [default: 256m]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub task_memory: Option<u64>,
    /// Replicas of the output [default: the cluster's]
    #[arg(long, value_name = "N", value_parser = replication)]
    pub replication: Option<u32>,
    /// CPU of one task in cores, as 0.5, where nodes can hold it to that [default: no limit]
    #[arg(long, value_name = "CORES", value_parser = thousandths)]
    pub task_cpu: Option<u32>,
    /// A task without progress for so long is killed and tried again; 0: never [default: 10m]
    #[arg(long, value_name = "TIME", value_parser = parse_millis)]
    pub task_timeout: Option<u64>,
    /// Attempts of a task before the job fails [default: 4]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100))]
    pub max_attempts: Option<u32>,
    /// The job fails if it takes longer [default: no limit]
    #[arg(long, value_name = "TIME", value_parser = parse_millis)]
    pub time_limit: Option<u64>,
    /// Share of slots against your other jobs: low, normal, high, or 1 to 1000 [default: normal, 100]
    #[arg(long, value_name = "P", value_parser = priority)]
    pub priority: Option<u32>,
    /// Disk that map outputs and work files may take on one node [default: as far as it goes]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub disk_limit: Option<u64>,
    /// Nodes keep what they have of the job for so long when its driver dies [default: 10m]
    #[arg(long, value_name = "TIME", value_parser = parse_millis)]
    pub keep: Option<u64>,
    /// Part of the maps (0 to 1) that must be done before reduces start to fetch, in slots that no map wants; 1: all [default: 0.5]
    #[arg(long, value_name = "PART", value_parser = part)]
    pub slow_start: Option<u32>,
    /// No second attempts of tasks that lag
    #[arg(long)]
    pub no_speculation: bool,
}

#[derive(Args, Clone, Debug)]
#[command(override_usage = "cairn job wordcount [OPTIONS] INPUT... OUTPUT")]
pub struct WordcountArgs {
    #[command(flatten)]
    pub job: JobArgs,
    /// Do not add up in the map tasks
    #[arg(long)]
    pub no_combiner: bool,
    /// Files, directories or globs, then the directory to make
    #[arg(required = true, num_args = 2.., value_name = "INPUT OUTPUT", value_parser = cluster_path)]
    pub paths: Vec<String>,
}

#[derive(Args, Clone, Debug)]
#[command(override_usage = "cairn job grep [OPTIONS] PATTERN INPUT... OUTPUT")]
pub struct GrepArgs {
    #[command(flatten)]
    pub job: JobArgs,
    /// Write the matching lines as they come, instead of each different one with how often it occurs
    #[arg(long)]
    pub lines: bool,
    /// Upper and lower case are the same
    #[arg(short = 'i', long)]
    pub ignore_case: bool,
    /// A regular expression
    #[arg(value_name = "PATTERN")]
    pub pattern: String,
    /// Files, directories or globs, then the directory to make
    #[arg(required = true, num_args = 2.., value_name = "INPUT OUTPUT", value_parser = cluster_path)]
    pub paths: Vec<String>,
}

#[derive(Args, Clone, Debug)]
#[command(override_usage = "cairn job plan JOB [OPTIONS] ARGUMENTS...\n       cairn job plan [OPTIONS] INPUT...")]
pub struct PlanArgs {
    /// A job command with its options, as behind `cairn job`; or inputs, with the options of every job
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "JOB")]
    pub command: Vec<String>,
}

#[derive(Args, Clone, Debug)]
#[command(after_help = "\
A stage is a job command; it comes after those whose output it reads, and after those that it names:

    id = \"nightly\"

    [[stage]]
    name = \"words\"
    job = [\"wordcount\", \"/books\", \"/words\"]
    temporary = true           # its output goes when all who read it are done

    [[stage]]
    name = \"sorted\"
    job = [\"sort\", \"-k\", \"2,2nr\", \"/words\", \"/sorted\"]
    after = []                 # stages that must be done before, beside those whose output it reads

Run again under the same id it goes on where it was: stages that succeeded are left alone. docs/jobs.md says more.")]
pub struct GraphArgs {
    /// Name of this run, 1 to 40 letters, digits, '-', '_' [default: the file's `id`]
    #[arg(long, value_name = "ID")]
    pub id: Option<String>,
    /// Check the file, and run nothing
    #[arg(long)]
    pub check: bool,
    /// A local file, TOML or (if its name ends in .json) JSON
    #[arg(value_name = "FILE")]
    pub file: String,
}

#[derive(Args, Clone, Debug)]
#[command(override_usage = "cairn job run [--detach] -- JOB [OPTIONS] ARGUMENTS...")]
pub struct RunArgs {
    /// Have a node of the cluster drive the job, and return at once; `job status` and `job logs` follow it
    #[arg(long)]
    pub detach: bool,
    /// A job command, as behind `cairn job`
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "JOB")]
    pub command: Vec<String>,
}

#[derive(Args, Clone, Debug)]
pub struct JobLsArgs {
    /// So many jobs that are over
    #[arg(long, short = 'n', default_value_t = 20, value_name = "N")]
    pub limit: usize,
    /// Jobs of this user alone
    #[arg(long, value_name = "NAME")]
    pub of: Option<String>,
}

#[derive(Args, Clone, Debug)]
pub struct JobIdArgs {
    /// As `job ls` shows it
    #[arg(value_name = "ID", value_parser = job_id)]
    pub id: String,
}

#[derive(Args, Clone, Debug)]
pub struct ResumeArgs {
    /// As `job ls` shows it
    #[arg(value_name = "ID", value_parser = job_id)]
    pub id: String,
    /// Take it from a driver that still works
    #[arg(long)]
    pub force: bool,
    /// Have a node of the cluster drive it, and return at once
    #[arg(long, conflicts_with = "force")]
    pub detach: bool,
}

#[derive(Args, Clone, Debug)]
pub struct JobLogsArgs {
    /// As `job ls` shows it
    #[arg(value_name = "ID", value_parser = job_id)]
    pub id: String,
    /// Of this task alone: m3 (map 3), m3.0 (its attempt 0), r0 (reduce 0), driver
    #[arg(value_name = "TASK", value_parser = log_name)]
    pub task: Option<String>,
}

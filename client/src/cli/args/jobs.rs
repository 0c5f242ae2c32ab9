//! Arguments of jobs.

use cairn_proto::mapoutput::MAX_PARTITIONS;
use clap::{Args, Subcommand};

use super::builtin::{DistcpArgs, JoinArgs, SortArgs, StreamingArgs, TeragenArgs, TerasortArgs, TeravalidateArgs};
use super::values::{cluster_path, replication};
use crate::units::parse_size;

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
}

/// What every job takes.
#[derive(Args, Clone, Debug)]
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
pub struct PlanArgs {
    #[command(flatten)]
    pub job: JobArgs,
    /// Files, directories or globs
    #[arg(required = true, value_name = "INPUT", value_parser = cluster_path)]
    pub paths: Vec<String>,
}

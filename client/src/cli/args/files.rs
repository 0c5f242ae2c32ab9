//! Arguments of the commands that work on files.

use clap::{ArgAction, Args, ValueEnum};

use super::values::{block_size, cluster_path, owner, plain_path, replication};
use crate::modes::{self, ModeChange};
use crate::units::parse_size;

/// How a new file is stored.
#[derive(Args, Clone, Debug)]
pub struct WriteArgs {
    /// Replicas of each block [default: the server's, 3]
    #[arg(long, value_name = "N", value_parser = replication)]
    pub replication: Option<u32>,
    /// File data per block, a multiple of 512 [default: the server's, 128m]
    #[arg(long, value_name = "B", value_parser = block_size)]
    pub block_size: Option<u64>,
    /// How blocks are compressed [default: zstd]
    #[arg(long, value_name = "CODEC")]
    pub codec: Option<CodecArg>,
}

/// Compression of blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum CodecArg {
    Zstd,
    None,
}

#[derive(Args, Clone, Debug)]
#[command(override_usage = "cairn put [OPTIONS] LOCAL... PATH\n       cairn put [OPTIONS] - PATH")]
pub struct PutArgs {
    /// Replace existing files
    #[arg(short = 'f', long)]
    pub force: bool,
    #[command(flatten)]
    pub write: WriteArgs,
    /// Local files or folders (`-`: standard input), then the target
    #[arg(required = true, num_args = 2.., value_name = "LOCAL|- PATH")]
    pub names: Vec<String>,
}

#[derive(Args, Clone, Debug)]
#[command(override_usage = "cairn append [OPTIONS] LOCAL... PATH\n       cairn append [OPTIONS] - PATH")]
pub struct AppendArgs {
    /// How the new blocks are compressed [default: zstd]
    #[arg(long, value_name = "CODEC")]
    pub codec: Option<CodecArg>,
    /// Local files (`-`: standard input), then the file that they are added to
    #[arg(required = true, num_args = 2.., value_name = "LOCAL|- PATH")]
    pub names: Vec<String>,
}

#[derive(Args, Clone, Debug)]
pub struct TruncateArgs {
    /// Wait until the datanodes have cut their replicas; this is the default (HDFS's -w)
    #[arg(short = 'w', long, conflicts_with = "no_wait")]
    pub wait: bool,
    /// Do not wait for that
    #[arg(long)]
    pub no_wait: bool,
    /// Wait no longer than so many seconds; the truncate itself is recorded at once and goes on in any case [default: no limit]
    #[arg(long, value_name = "SECONDS", conflicts_with = "no_wait")]
    pub timeout: Option<u64>,
    /// A file
    #[arg(value_name = "PATH", value_parser = cluster_path)]
    pub path: String,
    /// Bytes that stay (1k, 64m, ...)
    #[arg(value_name = "LENGTH", value_parser = parse_size)]
    pub length: u64,
}

#[derive(Args, Clone, Debug)]
pub struct ConcatArgs {
    /// The file that gets the blocks of the others
    #[arg(value_name = "TARGET", value_parser = plain_path)]
    pub target: String,
    /// What is added to it, in this order
    #[arg(required = true, value_name = "SOURCE", value_parser = plain_path)]
    pub sources: Vec<String>,
}

#[derive(Args, Clone, Debug)]
#[command(override_usage = "cairn get [OPTIONS] PATH... LOCAL\n       cairn get [OPTIONS] PATH -")]
pub struct GetArgs {
    /// Replace existing files
    #[arg(short = 'f', long)]
    pub force: bool,
    /// Read through the datanodes' sockets even on the same host
    #[arg(long)]
    pub no_short_circuit: bool,
    /// Ask a second replica when the first gives nothing for so long (milliseconds; 0: never)
    #[arg(long, value_name = "MS", value_parser = crate::units::parse_millis)]
    pub hedged_after: Option<u64>,
    /// Paths in the cluster, then the local target (`-`: standard output)
    #[arg(required = true, num_args = 2.., value_name = "PATH LOCAL|-")]
    pub names: Vec<String>,
}

#[derive(Args, Clone, Debug)]
pub struct CatArgs {
    /// Read through the datanodes' sockets even on the same host
    #[arg(long)]
    pub no_short_circuit: bool,
    /// Ask a second replica when the first gives nothing for so long (milliseconds; 0: never)
    #[arg(long, value_name = "MS", value_parser = crate::units::parse_millis)]
    pub hedged_after: Option<u64>,
    /// Files
    #[arg(required = true, value_name = "PATH", value_parser = cluster_path)]
    pub paths: Vec<String>,
}

#[derive(Args, Clone, Debug)]
#[command(disable_help_flag = true)]
pub struct LsArgs {
    /// Descend into directories
    #[arg(short = 'R', long)]
    pub recursive: bool,
    /// Sizes for people (1.5 G)
    #[arg(short = 'h', long)]
    pub human: bool,
    /// Show a directory itself, not what is in it
    #[arg(short = 'd', long)]
    pub directory: bool,
    /// Print help
    #[arg(long, action = ArgAction::Help)]
    pub help: Option<bool>,
    /// Files or directories
    #[arg(default_value = "/", value_name = "PATH", value_parser = cluster_path)]
    pub paths: Vec<String>,
}

#[derive(Args, Clone, Debug)]
pub struct MkdirArgs {
    /// Make missing parents too; an existing directory is no error
    #[arg(short = 'p', long)]
    pub parents: bool,
    /// Directories
    #[arg(required = true, value_name = "PATH", value_parser = plain_path)]
    pub paths: Vec<String>,
}

#[derive(Args, Clone, Debug)]
pub struct RmArgs {
    /// Delete directories with all that is in them
    #[arg(short = 'r', short_alias = 'R', long)]
    pub recursive: bool,
    /// No error if there is nothing
    #[arg(short = 'f', long)]
    pub force: bool,
    /// Delete at once, for good
    #[arg(long)]
    pub skip_trash: bool,
    /// Files or directories
    #[arg(required = true, value_name = "PATH", value_parser = cluster_path)]
    pub paths: Vec<String>,
}

#[derive(Args, Clone, Debug)]
#[command(override_usage = "cairn mv [OPTIONS] FROM... TO")]
pub struct MvArgs {
    /// Replace an existing file
    #[arg(short = 'f', long)]
    pub force: bool,
    /// What to move, then where to
    #[arg(required = true, num_args = 2.., value_name = "FROM TO", value_parser = cluster_path)]
    pub paths: Vec<String>,
}

#[derive(Args, Clone, Debug)]
#[command(override_usage = "cairn cp [OPTIONS] FROM... TO")]
pub struct CpArgs {
    /// Replace existing files
    #[arg(short = 'f', long)]
    pub force: bool,
    /// Copy directories with all that is in them
    #[arg(short = 'r', short_alias = 'R', long)]
    pub recursive: bool,
    #[command(flatten)]
    pub write: WriteArgs,
    /// What to copy, then where to
    #[arg(required = true, num_args = 2.., value_name = "FROM TO", value_parser = cluster_path)]
    pub paths: Vec<String>,
}

#[derive(Args, Clone, Debug)]
pub struct PathsArgs {
    /// Files or directories
    #[arg(required = true, value_name = "PATH", value_parser = cluster_path)]
    pub paths: Vec<String>,
}

#[derive(Args, Clone, Debug)]
#[command(disable_help_flag = true)]
pub struct DuArgs {
    /// One line per argument, not per entry of a directory
    #[arg(short = 's', long)]
    pub summary: bool,
    /// Sizes for people (1.5 G)
    #[arg(short = 'h', long)]
    pub human: bool,
    /// Print help
    #[arg(long, action = ArgAction::Help)]
    pub help: Option<bool>,
    /// Files or directories
    #[arg(default_value = "/", value_name = "PATH", value_parser = cluster_path)]
    pub paths: Vec<String>,
}

#[derive(Args, Clone, Debug)]
#[command(disable_help_flag = true)]
pub struct DfArgs {
    /// Sizes for people (1.5 G)
    #[arg(short = 'h', long)]
    pub human: bool,
    /// Print help
    #[arg(long, action = ArgAction::Help)]
    pub help: Option<bool>,
}

#[derive(Args, Clone, Debug)]
pub struct EndArgs {
    /// How much to print
    #[arg(short = 'c', long, default_value = "1k", value_name = "SIZE", value_parser = parse_size)]
    pub bytes: u64,
    /// A file
    #[arg(value_name = "PATH", value_parser = cluster_path)]
    pub path: String,
}

#[derive(Args, Clone, Debug)]
pub struct TailArgs {
    /// Go on with what is added to the file, until interrupted
    #[arg(short = 'f', long)]
    pub follow: bool,
    #[command(flatten)]
    pub end: EndArgs,
}

#[derive(Args, Clone, Debug)]
pub struct ChmodArgs {
    /// Everything below directories too
    #[arg(short = 'R', long)]
    pub recursive: bool,
    /// 644, u+x, go-w, ...
    #[arg(value_name = "MODE", value_parser = modes::parse, allow_hyphen_values = true)]
    pub mode: ModeChange,
    /// Files or directories
    #[arg(required = true, value_name = "PATH", value_parser = cluster_path)]
    pub paths: Vec<String>,
}

#[derive(Args, Clone, Debug)]
pub struct ChownArgs {
    /// Everything below directories too
    #[arg(short = 'R', long)]
    pub recursive: bool,
    /// The new owner, the new group, or both
    #[arg(value_name = "OWNER|OWNER:GROUP|:GROUP", value_parser = owner)]
    pub owner: Owner,
    /// Files or directories
    #[arg(required = true, value_name = "PATH", value_parser = cluster_path)]
    pub paths: Vec<String>,
}

/// Empty: as it is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Owner {
    pub user: String,
    pub group: String,
}

#[derive(Args, Clone, Debug)]
pub struct SetrepArgs {
    /// Wait until every block has as many
    #[arg(short = 'w', long)]
    pub wait: bool,
    /// Replicas of each block
    #[arg(value_name = "N", value_parser = replication)]
    pub replication: u32,
    /// Files, or directories with all files below them
    #[arg(required = true, value_name = "PATH", value_parser = cluster_path)]
    pub paths: Vec<String>,
}

#[derive(Args, Clone, Debug)]
pub struct FindArgs {
    /// Where to look
    #[arg(default_value = "/", value_name = "PATH", value_parser = cluster_path)]
    pub paths: Vec<String>,
    /// Only names that match this glob
    #[arg(long, value_name = "GLOB")]
    pub name: Option<String>,
    /// Only files or only directories
    #[arg(long = "type", value_name = "file|directory")]
    pub kind: Option<KindArg>,
}

/// What `find` shows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum KindArg {
    #[value(alias = "f")]
    File,
    #[value(alias = "d")]
    Directory,
}

#[derive(Args, Clone, Debug)]
pub struct BlocksArgs {
    /// A file
    #[arg(value_name = "PATH", value_parser = cluster_path)]
    pub path: String,
}

#[derive(Args, Clone, Debug)]
pub struct FsckArgs {
    /// Read every replica and check every checksum
    #[arg(long)]
    pub verify: bool,
    /// Move damaged files to /lost+found, with what is whole of them; superuser only
    #[arg(long)]
    pub fix: bool,
    /// Where to look
    #[arg(default_value = "/", value_name = "PATH", value_parser = cluster_path)]
    pub path: String,
}

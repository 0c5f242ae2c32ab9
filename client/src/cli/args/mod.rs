//! The command line as data: names, flags and checks that need nothing but the text.
//!
//! What is wrong here ends the program with 2 before anything is dialled or touched.

mod builtin;
mod files;
mod jobs;
mod values;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

pub use builtin::*;
pub use files::*;
pub use jobs::*;
pub use values::cluster_path;
use values::{address, chaos_away, chaos_interval, chaos_length, key_value, rack, user};

use crate::units::parse_size;

/// Where the namenode is when nobody says.
pub const DEFAULT_NAMENODE: &str = "127.0.0.1:8020";

const TEMPLATE: &str =
    "{about}\n\n{usage-heading} {usage}\n{before-help}Options of every command:\n{options}{after-help}";

/// A test holds this list against the parser.
pub const COMMANDS: &str = "
A cluster:
  local         Run a whole cluster on this machine until Ctrl-C
  demo          Start a cluster, store a real text, count its words, clean up
  chaos         Kill, pause and corrupt a local cluster while checking every byte
  namenode      Run a namenode
  datanode      Run a datanode

Files:
  put           Copy local files into the cluster
  append        Add local files or standard input to the end of a file
  truncate      Cut a file to a length
  concat        Join files of a directory without moving their bytes
  get           Copy files out of the cluster
  cat           Print files
  head          Print the first kilobyte of a file
  tail          Print the last kilobyte of a file
  ls            List a directory
  find          List everything below a directory, by name or type
  stat          Show one file or directory
  du            Show how much room files take
  df            Show how much room the cluster has
  mkdir         Make directories
  touch         Make an empty file, or set a file's time to now
  mv            Rename or move
  cp            Copy inside the cluster
  rm            Delete (into the trash)
  chmod         Change permissions
  chown         Change owner and group
  setrep        Change the number of replicas
  checksum      Print a checksum of a file's bytes

Health:
  blocks        Show every block of a file and where its replicas are
  fsck          Check files and blocks
  admin         report, safemode, checkpoint, backup, confirm-restore, recover-lease

Jobs:
  job           streaming, wordcount, grep, sort, join, distcp, ...; run, ls, status, logs, kill, resume
";

const EXAMPLES: &str = "
Examples:
  cairn local --dir /tmp/c                        a cluster on this machine
  cairn put access.log /logs/                     store a file
  cairn ls -h '/logs/2026-*/*.gz'                 quote globs, so that the shell leaves them
  cairn cat /logs/access.log | head               pipes work
  cairn job wordcount /logs/access.log /counts    run a job where the blocks are

`cairn COMMAND --help` says more.
";

/// A distributed block file system with batch jobs built in.
#[derive(Parser, Debug)]
#[command(name = "cairn", version, help_template = TEMPLATE, before_help = COMMANDS, after_help = EXAMPLES)]
#[command(arg_required_else_help = true, subcommand_required = true, max_term_width = 100)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// Flags of every command.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Options of every command")]
pub struct Global {
    /// Address of the namenode (or CAIRN_NAMENODE) [default: 127.0.0.1:8020]
    #[arg(long, env = "CAIRN_NAMENODE", hide_env = true, global = true, value_name = "HOST:PORT", value_parser = address)]
    pub namenode: Option<String>,
    /// Act as this user (or CAIRN_USER) [default: who you are]
    #[arg(long, env = "CAIRN_USER", hide_env = true, global = true, value_name = "NAME", value_parser = user)]
    pub user: Option<String>,
    /// Print JSON, for programs
    #[arg(long, global = true)]
    pub json: bool,
    /// Settings file (or CAIRN_CONFIG), TOML
    #[arg(long, env = "CAIRN_CONFIG", hide_env = true, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Override one setting of the file; may be repeated
    #[arg(long = "set", global = true, value_name = "KEY=VALUE", value_parser = key_value)]
    pub set: Vec<(String, String)>,
}

/// One subcommand each.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Run a whole cluster on this machine until Ctrl-C
    Local(LocalArgs),
    /// Start a cluster, store a real text, count its words, clean up
    Demo(DemoArgs),
    /// Kill, pause and corrupt members of a `cairn local` cluster while a load checks every byte; exit 1 if anything is lost
    Chaos(ChaosArgs),
    /// Run a namenode
    Namenode(NamenodeArgs),
    /// Run a datanode
    Datanode(DatanodeArgs),
    /// Copy local files into the cluster
    Put(PutArgs),
    /// Add local files or standard input to the end of a file, which is made if it is not there
    Append(AppendArgs),
    /// Cut a file to a length
    Truncate(TruncateArgs),
    /// Join files of a directory without moving their bytes; the sources vanish
    Concat(ConcatArgs),
    /// Copy files out of the cluster
    Get(GetArgs),
    /// Print files
    Cat(CatArgs),
    /// List a directory
    Ls(LsArgs),
    /// Make directories
    Mkdir(MkdirArgs),
    /// Delete; files go to the trash of the user unless --skip-trash
    Rm(RmArgs),
    /// Rename or move
    Mv(MvArgs),
    /// Copy inside the cluster
    Cp(CpArgs),
    /// Show one file or directory
    Stat(PathsArgs),
    /// Show how much room files take
    Du(DuArgs),
    /// Show how much room the cluster has
    Df(DfArgs),
    /// Print the first kilobyte of a file
    Head(EndArgs),
    /// Print the last kilobyte of a file
    Tail(TailArgs),
    /// Make an empty file, or set a file's time to now
    Touch(PathsArgs),
    /// Change permissions
    Chmod(ChmodArgs),
    /// Change owner and group
    Chown(ChownArgs),
    /// Change the number of replicas
    Setrep(SetrepArgs),
    /// Print a checksum of a file's bytes (CRC-32C, whatever the block size)
    Checksum(PathsArgs),
    /// List everything below a directory, by name or type
    Find(FindArgs),
    /// Show every block of a file and where its replicas are
    Blocks(BlocksArgs),
    /// Check files and blocks; exit 1 if anything is lost or corrupt
    Fsck(FsckArgs),
    /// Look after the cluster
    #[command(subcommand)]
    Admin(AdminCommand),
    /// Run jobs on the nodes that hold the blocks
    #[command(subcommand)]
    Job(JobCommand),
    /// Runs tasks of a job; started by the datanode
    #[command(hide = true, name = "task-worker")]
    TaskWorker(TaskWorkerArgs),
}

#[derive(Args, Clone, Debug)]
pub struct LocalArgs {
    /// Where the cluster lives; kept for the next time [default: a temporary folder, removed at the end]
    #[arg(long, value_name = "D")]
    pub dir: Option<PathBuf>,
    /// How many datanodes
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=200))]
    pub datanodes: u16,
    /// How many racks they stand in
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=200))]
    pub racks: u16,
    /// Port of the namenode; WebHDFS and metrics are on the next one, datanodes on the tenth. 0: any free ports [default: 8020]
    #[arg(long, value_name = "P", value_parser = clap::value_parser!(u16).range(0..=65_000))]
    pub base_port: Option<u16>,
}

#[derive(Args, Clone, Debug)]
pub struct DemoArgs {
    /// How much text to store
    #[arg(long, default_value = "64m", value_name = "SIZE", value_parser = parse_size)]
    pub size: u64,
    /// How many datanodes
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=200))]
    pub datanodes: u16,
    /// How many racks they stand in
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=200))]
    pub racks: u16,
}

#[derive(Args, Clone, Debug)]
pub struct ChaosArgs {
    /// Folder of the running cluster, as given to `cairn local`
    #[arg(long, value_name = "D")]
    pub dir: PathBuf,
    /// How long faults go on
    #[arg(long = "for", default_value = "1m", value_name = "TIME", value_parser = chaos_length)]
    pub length_ms: u64,
    /// A fault so often, if enough members are up
    #[arg(long = "every", default_value = "3s", value_name = "TIME", value_parser = chaos_interval)]
    pub every_ms: u64,
    /// Kill datanodes (SIGKILL) and start them again after 1 s to --away [default without a choice: --kill --pause]
    #[arg(long)]
    pub kill: bool,
    /// Stop datanodes (SIGSTOP) for 1 s to --away
    #[arg(long)]
    pub pause: bool,
    /// Damage replicas on disk, never all of a block
    #[arg(long)]
    pub corrupt: bool,
    /// Kill and pause the namenode, too
    #[arg(long)]
    pub with_namenode: bool,
    /// Longest absence of a member; short ones are more frequent
    #[arg(long = "away", default_value = "60s", value_name = "TIME", value_parser = chaos_away)]
    pub away_ms: u64,
    /// Datanodes killed or paused at a time [default: two fewer than there are, at least one]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=200))]
    pub down: Option<u16>,
    /// The same seed makes the same choices
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Tasks that write (half as many read)
    #[arg(long, default_value_t = 4, value_name = "K", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub writers: u16,
}

#[derive(Args, Clone, Debug)]
pub struct NamenodeArgs {
    /// Folders for its log and images; each holds all of it
    #[arg(long, value_name = "D[,D2]", value_delimiter = ',')]
    pub dir: Vec<PathBuf>,
    /// Where to listen [default: 127.0.0.1:8020]
    #[arg(long, value_name = "A:P", value_parser = address)]
    pub listen: Option<String>,
    /// Serve WebHDFS, status and metrics over HTTP there [default: nowhere]
    #[arg(long, value_name = "A:P", value_parser = address)]
    pub http: Option<String>,
    /// Start although a folder is missing, with the newest of the others
    #[arg(long)]
    pub accept_missing_dir: bool,
    /// Copy the log there while it is written; another disk or machine
    #[arg(long, value_name = "DIR")]
    pub archive: Option<PathBuf>,
    /// Fill the empty folder of --dir from a backup, then serve
    #[arg(long, value_name = "FILE")]
    pub restore: Option<PathBuf>,
    /// With --restore: the archive to go on with behind the backup
    #[arg(long, value_name = "DIR", requires = "restore")]
    pub log: Option<PathBuf>,
    /// With --restore: the last transaction to restore [default: the last there is]
    #[arg(long, value_name = "N", requires = "restore", conflicts_with = "to_time")]
    pub to_txid: Option<u64>,
    /// With --restore: the moment to restore, as 2026-11-22T21:04:12Z or milliseconds since 1970
    #[arg(long, value_name = "T", requires = "restore", value_parser = cairn_common::timetext::parse_time)]
    pub to_time: Option<u64>,
    /// Listen on an address that others can reach, without TLS
    #[arg(long)]
    pub insecure: bool,
}

#[derive(Args, Clone, Debug)]
pub struct DatanodeArgs {
    /// Volumes: folders for blocks
    #[arg(long, value_name = "D[,D2]", value_delimiter = ',')]
    pub dir: Vec<PathBuf>,
    /// Where to listen [default: 127.0.0.1:9866]
    #[arg(long, value_name = "A:P", value_parser = address)]
    pub listen: Option<String>,
    /// The address that others reach it at, behind NAT or a forwarded port [default: where it listens]
    #[arg(long, value_name = "HOST:PORT", value_parser = address)]
    pub advertise: Option<String>,
    /// Serve WebHDFS and metrics over HTTP there [default: nowhere]
    #[arg(long, value_name = "A:P", value_parser = address)]
    pub http: Option<String>,
    /// The name shown in reports [default: the machine's name]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Where the node stands, as in /rack1 or /dc1/rack2
    #[arg(long, value_name = "/R", value_parser = rack)]
    pub rack: Option<String>,
    /// Use no more than this of each volume
    #[arg(long, value_name = "BYTES", value_parser = parse_size)]
    pub capacity: Option<u64>,
    /// Tasks at a time [default: one per core]
    #[arg(long, value_name = "N")]
    pub slots: Option<u32>,
    /// Listen on an address that others can reach, without TLS
    #[arg(long)]
    pub insecure: bool,
    /// Run jobs even on an address that others can reach
    #[arg(long)]
    pub allow_jobs: bool,
    /// Run tasks as this user of the machine, for a datanode that is root [default: as the datanode]
    #[arg(long, value_name = "NAME", value_parser = user)]
    pub task_user: Option<String>,
}

#[derive(Subcommand, Debug)]
pub enum AdminCommand {
    /// Nodes, room and health
    Report,
    /// Show, enter or leave safe mode (no changes)
    Safemode {
        /// Show it, refuse changes from now on, allow them again, or wait until it is off
        #[arg(default_value = "get")]
        action: SafemodeArg,
    },
    /// Write an image of the namespace now
    Checkpoint,
    /// Write a backup of the namenode's metadata to a local file
    Backup {
        /// The file; it appears when it is whole
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// After a restore: let datanodes put away what the restored namespace does not know
    ConfirmRestore,
    /// Take a file from its writer and close it with all that was acknowledged
    RecoverLease {
        /// Give up after so many seconds
        #[arg(long, value_name = "SECONDS", default_value_t = 60)]
        timeout: u64,
        /// A file
        #[arg(value_name = "PATH", value_parser = cluster_path)]
        path: String,
    },
}

/// What to do with safe mode.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum SafemodeArg {
    Get,
    Enter,
    Leave,
    Wait,
}

#[derive(Args, Clone, Debug)]
pub struct TaskWorkerArgs {
    /// What the datanode passes
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub args: Vec<String>,
}

#[cfg(test)]
mod tests;

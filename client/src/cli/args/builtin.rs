//! Arguments of the built-in jobs that sort, join, stream and copy.

use clap::{Args, ValueEnum};

use super::jobs::JobArgs;
use super::values::cluster_path;

#[derive(Args, Clone, Debug)]
#[command(
    override_usage = "cairn job streaming [OPTIONS] --input PATH... --output PATH --mapper COMMAND --reducer COMMAND|NONE"
)]
#[command(after_help = "\
Commands read lines and print lines; a tab ends the key. They are not run by a shell: use sh -c '...' for pipes.
Shipped files lie beside the command, under their own names. Lines \"reporter:counter:GROUP,NAME,N\" and
\"reporter:status:TEXT\" on standard error are reports; the rest goes to the task's log. Job properties and Hadoop's
variables (mapreduce_task_id, mapreduce_map_input_file, ...) are in the environment. docs/jobs.md says more.")]
pub struct StreamingArgs {
    #[command(flatten)]
    pub job: JobArgs,
    /// Files, directories or globs
    #[arg(long, required = true, num_args = 1.., value_name = "PATH", value_parser = cluster_path)]
    pub input: Vec<String>,
    /// The directory to make
    #[arg(long, value_name = "PATH", value_parser = cluster_path)]
    pub output: String,
    /// Command that reads lines of the input
    #[arg(long, value_name = "COMMAND")]
    pub mapper: String,
    /// Command that reads lines sorted by key; NONE: what the mapper prints is the output [default: the sorted lines]
    #[arg(long, value_name = "COMMAND")]
    pub reducer: Option<String>,
    /// Command that joins lines of equal keys in the map tasks
    #[arg(long, value_name = "COMMAND")]
    pub combiner: Option<String>,
    /// Local file to lay beside the commands
    #[arg(long, value_name = "LOCAL", num_args = 1..)]
    pub file: Vec<std::path::PathBuf>,
    /// What decides which reducer gets a line: hash (of its key), or fields (those that num.key.fields.for.partition or
    /// mapreduce.partition.keypartitioner.options name)
    #[arg(long, value_name = "NAME")]
    pub partitioner: Option<String>,
    /// A job property, as stream.num.map.output.key.fields=2
    #[arg(short = 'D', value_name = "NAME=VALUE", value_parser = property)]
    pub define: Vec<(String, String)>,
}

fn property(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err(format!("{text:?} is no property: write it as NAME=VALUE")),
    }
}

#[derive(Args, Clone, Debug)]
#[command(override_usage = "cairn job sort [OPTIONS] INPUT... OUTPUT")]
pub struct SortArgs {
    #[command(flatten)]
    pub job: JobArgs,
    /// Sort by part of the lines, as `sort -k`: 2,2 or 1.3,1nr; may be repeated [default: the whole line]
    #[arg(short = 'k', long, value_name = "FIELD[.CHAR][nrbf][,FIELD[.CHAR]]")]
    pub key: Vec<String>,
    /// Keys without options of their own are numbers
    #[arg(short = 'n', long)]
    pub numeric: bool,
    /// From the largest to the smallest
    #[arg(short = 'r', long)]
    pub reverse: bool,
    /// What ends a field [default: blanks]
    #[arg(short = 't', long, value_name = "TEXT")]
    pub separator: Option<String>,
    /// Keep only the first of lines with equal keys
    #[arg(short = 'u', long)]
    pub unique: bool,
    /// Parts of the output follow on each other in order; false: each part is sorted by itself, which saves looking at samples
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value_t = true, default_missing_value = "true",
        action = clap::ArgAction::Set)]
    pub total_order: bool,
    /// Files, directories or globs, then the directory to make
    #[arg(required = true, num_args = 2.., value_name = "INPUT OUTPUT", value_parser = cluster_path)]
    pub paths: Vec<String>,
}

#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum JoinKindArg {
    /// Both sides go through the shuffle
    Reduce,
    /// Both sides are sorted by key and partitioned alike; maps merge them
    Map,
    /// Every map has the smaller side in memory
    Broadcast,
}

#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum JoinTypeArg {
    /// Rows with a match
    Inner,
    /// All left rows
    Left,
    /// All right rows
    Right,
    /// All rows
    Full,
    /// Left rows that have a match, as they are
    Semi,
    /// Left rows that have none, as they are
    Anti,
}

#[derive(Args, Clone, Debug)]
#[command(override_usage = "cairn job join [OPTIONS] --left PATH... --right PATH... OUTPUT")]
#[command(after_help = "\
Output: the key, the other fields of the left row, the other fields of the right row.")]
pub struct JoinArgs {
    #[command(flatten)]
    pub job: JobArgs,
    /// How rows with equal keys are brought together
    #[arg(long, value_enum, default_value_t = JoinKindArg::Reduce)]
    pub kind: JoinKindArg,
    /// Which rows
    #[arg(long = "type", value_name = "TYPE", value_enum, default_value_t = JoinTypeArg::Inner)]
    pub join_type: JoinTypeArg,
    /// Files, directories or globs; may be repeated
    #[arg(long, required = true, value_name = "PATH", value_parser = cluster_path)]
    pub left: Vec<String>,
    /// Files, directories or globs; may be repeated
    #[arg(long, required = true, value_name = "PATH", value_parser = cluster_path)]
    pub right: Vec<String>,
    /// Number of the field of left rows that is the key
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = field)]
    pub left_key: usize,
    /// Number of the field of right rows that is the key
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = field)]
    pub right_key: usize,
    /// What ends a field [default: tab]
    #[arg(short = 't', long, value_name = "TEXT", default_value = "\t", hide_default_value = true)]
    pub separator: String,
    /// The directory to make
    #[arg(value_name = "OUTPUT", value_parser = cluster_path)]
    pub output: String,
}

fn field(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number @ 1..=1_000_000) => Ok(number),
        _ => Err(format!("{text:?} is no number of a field, from 1")),
    }
}

#[derive(Args, Clone, Debug)]
pub struct TeragenArgs {
    #[command(flatten)]
    pub output: TeraOutput,
    /// Map tasks, each writing one part [default: one a task slot]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub maps: Option<u32>,
    /// Records of 100 bytes; k, m, b and t mean thousands, millions and so on
    #[arg(value_name = "RECORDS", value_parser = records)]
    pub records: u64,
    /// The directory to make
    #[arg(value_name = "OUTPUT", value_parser = cluster_path)]
    pub path: String,
}

/// What the output is like.
#[derive(Args, Clone, Debug)]
pub struct TeraOutput {
    /// Replicas of the output [default: the cluster's]
    #[arg(long, value_name = "N", value_parser = super::values::replication)]
    pub replication: Option<u32>,
    /// Memory of one task [default: 256m]
    #[arg(long, value_name = "SIZE", value_parser = crate::units::parse_size)]
    pub task_memory: Option<u64>,
}

fn records(text: &str) -> Result<u64, String> {
    let (digits, unit) = match text.char_indices().last() {
        Some((at, last)) if last.is_ascii_alphabetic() => (&text[..at], last),
        _ => (text, ' '),
    };
    let unit: u64 = match unit.to_ascii_lowercase() {
        ' ' => 1,
        'k' => 1_000,
        'm' => 1_000_000,
        'b' | 'g' => 1_000_000_000,
        't' => 1_000_000_000_000,
        _ => return Err(format!("{text:?} is no number of records")),
    };
    let number = digits.parse::<u64>().ok().and_then(|number| number.checked_mul(unit));
    number.filter(|number| *number <= 1 << 53).ok_or_else(|| format!("{text:?} is no number of records, up to 9e15"))
}

#[derive(Args, Clone, Debug)]
#[command(override_usage = "cairn job terasort [OPTIONS] INPUT... OUTPUT")]
pub struct TerasortArgs {
    #[command(flatten)]
    pub job: JobArgs,
    /// Files, directories or globs, then the directory to make
    #[arg(required = true, num_args = 2.., value_name = "INPUT OUTPUT", value_parser = cluster_path)]
    pub paths: Vec<String>,
}

#[derive(Args, Clone, Debug)]
pub struct TeravalidateArgs {
    #[command(flatten)]
    pub output: TeraOutput,
    /// The sorted directory
    #[arg(value_name = "INPUT", value_parser = cluster_path)]
    pub input: String,
    /// The directory to make, for the report
    #[arg(value_name = "OUTPUT", value_parser = cluster_path)]
    pub path: String,
}

#[derive(Args, Clone, Debug)]
#[command(override_usage = "cairn job distcp [OPTIONS] SOURCE... TARGET")]
#[command(after_help = "\
A place is /PATH, cairn://HOST:PORT/PATH, hdfs://HOST:PORT/PATH (another HDFS) or, as a source, file:///PATH. A directory
becomes TARGET if that does not exist, else TARGET/NAME; with --update or --overwrite its contents go into TARGET. Files
that are there are left as they are, but with one of those two.")]
pub struct DistcpArgs {
    /// Copy what is missing or differs in length or checksum
    #[arg(long, conflicts_with = "overwrite")]
    pub update: bool,
    /// Copy everything
    #[arg(long)]
    pub overwrite: bool,
    /// Delete what TARGET has and the sources have not (with --update or --overwrite)
    #[arg(long)]
    pub delete: bool,
    /// Attributes that copies get from their sources: r (replication), b (block size), u (user), g (group), p (permission),
    /// t (times) [default without letters: rbugpt]
    #[arg(long, value_name = "LETTERS", num_args = 0..=1, require_equals = true, default_missing_value = "rbugpt")]
    pub preserve: Option<String>,
    /// Megabytes a second of each map
    #[arg(long, value_name = "MB", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub bandwidth: Option<u64>,
    /// At most so many maps [default: 20]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub maps: Option<u32>,
    /// Files, directories or globs, then where they go
    #[arg(required = true, num_args = 2.., value_name = "SOURCE TARGET")]
    pub places: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_records() {
        assert_eq!(records("10"), Ok(10));
        assert_eq!(records("100M"), Ok(100_000_000));
        assert_eq!(records("10b"), Ok(10_000_000_000));
        for bad in ["", "k", "-1", "1.5m", "10x", "99999999999t"] {
            assert!(records(bad).is_err(), "{bad}");
        }
        assert!(property("novalue").is_err() && property("=x").is_err());
        assert_eq!(property("a=b=c"), Ok(("a".into(), "b=c".into())));
    }
}

//! Copying files between clusters, and within one, in parallel map tasks.
//!
//! # Overview
//! The driver lists what is to be copied ([`list`]) and cuts the list into one part per map. A map copies its files one after the other ([`copy`]) and
//! writes a line per file about what became of it ([`Outcome`]); a file that cannot be copied does not end the others.
//!
//! # Consistency
//! A file is written under a name of its attempt's in a staging folder of the target cluster, its checksum compared with the source's, and only then
//! renamed to its place. A second attempt of the same map does the same again, with the same result.

pub mod cluster;
pub mod copy;
pub mod list;

use std::collections::BTreeMap;

use cairn_proto::{Error, ErrorCode, Result};

use self::cluster::{Address, Cluster};
use self::copy::{Copier, Options, Source};
use self::list::Item;
use super::{Collector, InputFormat, Mapper, Program, Record, Reducer, TaskContext};

/// Names of the properties.
#[allow(missing_docs)]
pub mod property {
    /// Address of a cluster other than the job's (`HOST:PORT` or `hdfs://HOST:PORT`); not set: the job's own.
    pub const SOURCE: &str = "distcp.source";
    pub const TARGET: &str = "distcp.target";
    /// File of the job's cluster with the list, and where in it the part of each map begins.
    pub const LIST: &str = "distcp.list";
    pub const OFFSETS: &str = "distcp.offsets";
    /// Folder of the target cluster for files that are not whole.
    pub const STAGING: &str = "distcp.staging";
    /// Of `rbugpt`.
    pub const PRESERVE: &str = "distcp.preserve";
    /// "true": a file of equal length and checksum is left as it is.
    pub const UPDATE: &str = "distcp.update";
    /// Bytes a second of each map; 0: as fast as it goes.
    pub const BANDWIDTH: &str = "distcp.bandwidth";
}

/// Longest part of a list that a map takes into memory.
const MAX_PART_BYTES: u64 = 32 << 20;

/// What became of a file: the first word of its line in the output.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Outcome {
    /// It is in its place now.
    Copied,
    /// The same was there.
    Skipped,
    /// It was not copied; the line says why.
    Failed,
}

impl Outcome {
    /// The word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Copied => "copied",
            Self::Skipped => "skipped",
            Self::Failed => "failed",
        }
    }
}

/// The copying job. Maps alone.
pub struct DistCp {
    properties: BTreeMap<String, String>,
    /// Where the part of each map starts in the list; one more: its end.
    offsets: Vec<u64>,
}

impl DistCp {
    /// Of the job's properties.
    pub fn new(properties: &BTreeMap<String, String>) -> Result<Self> {
        let text = properties.get(property::OFFSETS).map_or("", String::as_str);
        let offsets: Option<Vec<u64>> = text.split(',').map(|offset| offset.parse().ok()).collect();
        let offsets = offsets.filter(|offsets| offsets.len() > 1 && offsets.is_sorted()).ok_or_else(|| {
            let text = format!("property {}: these are no offsets", property::OFFSETS);
            Error::new(ErrorCode::InvalidArgument, text)
        })?;
        Ok(Self { properties: properties.clone(), offsets })
    }
}

impl Program for DistCp {
    fn input(&self) -> InputFormat {
        let maps = self.offsets.len() as u32 - 1;
        InputFormat::Generated { records: u64::from(maps), tasks: maps }
    }

    fn mapper(&self, task: &TaskContext) -> Result<Box<dyn Mapper>> {
        let get = |name: &str| self.properties.get(name).map_or("", String::as_str);
        let files = task.files()?;
        let cluster = |address: &str| -> Result<Cluster> {
            if address.is_empty() {
                return Ok(Cluster::Cairn(files.fs().clone()));
            }
            let address = Address::parse(address)?;
            files.wait(Cluster::connect(files.fs(), &address))
        };
        let options = Options {
            staging: get(property::STAGING).to_owned(),
            preserve: copy::Preserve::parse(get(property::PRESERVE))?,
            update: get(property::UPDATE) == "true",
            bandwidth: task.parsed(property::BANDWIDTH, 0)?,
        };
        let (source, target) = (cluster(get(property::SOURCE))?, cluster(get(property::TARGET))?);
        // Attempts never share a file.
        let prefix = format!("{}-{}", task.index, task.attempt);
        Ok(Box::new(Copy {
            copier: Copier::new(files.fs().env().clone(), Source::Cluster(source), target, options, &prefix)
                .watched(&task.user_counters),
            list: get(property::LIST).to_owned(),
            offsets: self.offsets.clone(),
            task: task.clone(),
        }))
    }

    fn reducer(&self, _task: &TaskContext) -> Result<Box<dyn Reducer>> {
        Err(Error::new(ErrorCode::InvalidArgument, "distcp has no reducers"))
    }
}

struct Copy {
    copier: Copier,
    list: String,
    offsets: Vec<u64>,
    task: TaskContext,
}

impl Mapper for Copy {
    fn map(&mut self, record: Record<'_>, out: &mut Collector) -> Result<()> {
        let part = record.offset as usize;
        let (Some(from), Some(to)) = (self.offsets.get(part), self.offsets.get(part + 1)) else { return Ok(()) };
        if to - from > MAX_PART_BYTES {
            let text =
                format!("a map's list of files has {} bytes, more than {MAX_PART_BYTES}: use more maps", to - from);
            return Err(Error::new(ErrorCode::InvalidArgument, text));
        }
        let files = self.task.files()?.clone();
        let bytes = files.wait(async {
            let reader = files.fs().open(&self.list).await?;
            reader.read_range(*from, to - from).await
        })?;
        let mut counts: BTreeMap<Outcome, (u64, u64)> = BTreeMap::new();
        for item in list::decode(&bytes)? {
            self.task.set_status(&format!("copying {}", item.source));
            let (outcome, note) = match files.wait(self.copier.copy(&item)) {
                Ok(outcome) => (outcome, String::new()),
                Err(error) => (Outcome::Failed, error.message().to_owned()),
            };
            let count = counts.entry(outcome).or_default();
            *count = (count.0 + 1, count.1 + item.length);
            out.emit_line(&line(outcome, &item, &note))?;
        }
        for (outcome, (number, bytes)) in counts {
            self.task.count(&format!("distcp.{}", outcome.as_str()), number);
            self.task.count(&format!("distcp.bytes_{}", outcome.as_str()), bytes);
        }
        Ok(())
    }
}

/// What the output says of a file: outcome, length, target, note, separated by tabs.
fn line(outcome: Outcome, item: &Item, note: &str) -> Vec<u8> {
    let clean = |text: &str| text.replace(['\t', '\n'], " ");
    format!("{}\t{}\t{}\t{}", outcome.as_str(), item.length, clean(&item.target), clean(note)).into_bytes()
}

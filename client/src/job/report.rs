//! What is known of a job when it is over.

use std::collections::BTreeMap;

use cairn_proto::{Error, ErrorCode, pb};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::driver::Driver;
use super::findings::Findings;
use crate::mapreduce::{Counters, counter};

/// How a job ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum JobState {
    /// Its output is there.
    Succeeded,
    /// A task failed too often, or the output could not be put in place.
    Failed,
    /// It was asked to stop.
    Killed,
}

impl JobState {
    /// "succeeded", "failed", "killed".
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Killed => "killed",
        }
    }

    /// As the end of a sentence: "it succeeded".
    pub fn in_words(self) -> &'static str {
        if self == Self::Killed { "was killed" } else { self.as_str() }
    }
}

/// How near a map ran to its block.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub enum Locality {
    /// On a node that holds it.
    #[serde(rename = "node-local")]
    Node,
    /// In a rack that holds it.
    #[serde(rename = "rack-local")]
    Rack,
    /// Elsewhere.
    #[serde(rename = "remote")]
    Remote,
}

impl Locality {
    /// "node-local", "rack-local", "remote".
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Node => "node-local",
            Self::Rack => "rack-local",
            Self::Remote => "remote",
        }
    }
}

/// The maps.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[allow(missing_docs)] // the names of the JSON shape
pub struct MapSummary {
    pub tasks: u32,
    pub node_local: u32,
    pub rack_local: u32,
    pub remote: u32,
    pub attempts_failed: u32,
}

/// The reduces.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct ReduceSummary {
    pub tasks: u32,
    pub attempts_failed: u32,
}

/// Bytes.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct ByteSummary {
    pub read: u64,
    /// By maps on nodes that hold their block.
    pub read_local: u64,
    /// Of the content, what maps found where an earlier job had kept it.
    #[serde(default)]
    pub kept: u64,
    pub shuffled: u64,
    pub spilled: u64,
    pub written: u64,
}

/// Records.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct RecordSummary {
    #[serde(rename = "in")]
    pub input: u64,
    pub map_out: u64,
    pub combine_out: u64,
    pub out: u64,
}

/// How evenly the maps' outputs fall to the reduces; bytes as stored.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct PartitionSummary {
    /// Reduce with the most.
    pub largest: u32,
    /// What it gets.
    pub largest_bytes: u64,
    /// What the reduce in the middle gets.
    pub median_bytes: u64,
}

impl PartitionSummary {
    /// From the accepted maps' outputs, by reduce; `None` without any.
    fn of(partitions: &[u64]) -> Option<Self> {
        let (largest, bytes) = partitions.iter().zip(0..).map(|(bytes, at)| (at, *bytes)).max_by_key(|one| one.1)?;
        let mut sorted = partitions.to_vec();
        sorted.sort_unstable();
        let median_bytes = sorted.get(sorted.len() / 2).copied().unwrap_or(0);
        Some(Self { largest, largest_bytes: bytes, median_bytes })
    }
}

/// Wall time by phase, milliseconds; of a job that was taken over, of its last driver.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct PhaseTimes {
    pub plan_ms: u64,
    pub map_ms: u64,
    pub reduce_ms: u64,
    pub commit_ms: u64,
}

/// One accepted attempt.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TaskReport {
    /// "map" or "reduce".
    pub kind: String,
    /// Number among its kind.
    pub index: u32,
    /// Which attempt was accepted.
    pub attempt: u32,
    /// Id of the node that ran it.
    pub node: String,
    /// The node's name.
    pub host: String,
    /// The node's rack.
    pub rack: String,
    /// A map's nearness to its block.
    pub locality: Option<Locality>,
    /// A map's part of the input: path and range.
    pub path: Option<String>,
    /// Where that part starts.
    pub offset: u64,
    /// Input bytes of a map, fetched bytes of a reduce.
    pub bytes: u64,
    /// Bytes of its output (a map output as stored, a part as text).
    pub output_bytes: u64,
    /// Wall time.
    pub elapsed_ms: u64,
    /// Largest resident size that was sampled.
    pub peak_memory: u64,
}

/// A job that is over.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct JobReport {
    /// Unique.
    pub id: String,
    /// For people.
    pub name: String,
    /// Which program.
    pub kind: String,
    /// Whose it was.
    pub user: String,
    /// Milliseconds since 1970.
    pub submitted_ms: u64,
    /// Drivers that it had.
    pub drivers: u64,
    /// How it ended.
    pub state: JobState,
    /// From submit to end.
    pub wall_ms: u64,
    /// The maps.
    pub map: MapSummary,
    /// The reduces.
    pub reduce: ReduceSummary,
    /// Bytes.
    pub bytes: ByteSummary,
    /// Records.
    pub records: RecordSummary,
    /// Output folder.
    pub output: String,
    /// Wall time by phase.
    pub phases: PhaseTimes,
    /// How evenly the reduces were loaded.
    #[serde(default)]
    pub partitions: Option<PartitionSummary>,
    /// All counters of accepted attempts.
    #[serde(serialize_with = "serialize_counters", deserialize_with = "deserialize_counters")]
    pub counters: Counters,
    /// What was noticed: records that were left out, keys with many records.
    #[serde(flatten)]
    pub findings: Findings,
    /// Where each accepted attempt ran.
    pub tasks: Vec<TaskReport>,
    /// Why it did not succeed: one line.
    #[serde(serialize_with = "serialize_failure", deserialize_with = "deserialize_failure")]
    pub failure: Option<Error>,
    /// The last lines of standard error of the task that failed the job.
    pub stderr_tail: String,
}

fn serialize_counters<S: Serializer>(counters: &Counters, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(counters.iter())
}

fn serialize_failure<S: Serializer>(failure: &Option<Error>, serializer: S) -> Result<S::Ok, S::Error> {
    failure.as_ref().map(|error| error.message().to_owned()).serialize(serializer)
}

fn deserialize_counters<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Counters, D::Error> {
    BTreeMap::<String, u64>::deserialize(deserializer).map(|counters| counters.into_iter().collect())
}

fn deserialize_failure<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Error>, D::Error> {
    let text = Option::<String>::deserialize(deserializer)?;
    Ok(text.map(|text| Error::new(ErrorCode::JobFailed, text)))
}

impl JobReport {
    /// What a driver knows at the end.
    pub(super) fn of(
        driver: &Driver<'_>,
        state: JobState,
        failure: Option<Error>,
        phases: PhaseTimes,
        now_ms: u64,
    ) -> Self {
        let (scheduler, job) = (&driver.scheduler, driver.job());
        let (maps_failed, reduces_failed) = scheduler.attempts_failed();
        let mut report = Self {
            id: job.job_id.clone(),
            name: job.name.clone(),
            kind: job.kind.clone(),
            user: job.user.clone(),
            submitted_ms: driver.written.submitted_ms,
            drivers: driver.epoch,
            state,
            wall_ms: driver.elapsed_ms(now_ms),
            map: MapSummary { tasks: driver.totals.maps, attempts_failed: maps_failed, ..MapSummary::default() },
            reduce: ReduceSummary { tasks: driver.totals.reduces, attempts_failed: reduces_failed },
            bytes: Default::default(),
            records: Default::default(),
            output: driver.written.submitted.output.clone(),
            phases,
            partitions: None,
            counters: Counters::default(),
            findings: Findings::of(scheduler.attempts().filter_map(|(_, _, _, success)| success)),
            tasks: Vec::new(),
            failure,
            stderr_tail: scheduler.stderr_tail().to_owned(),
        };
        let mut partitions = vec![0; job.reducers as usize];
        for ((kind, index), attempt, planned, success) in scheduler.attempts() {
            let Some(success) = success else { continue };
            for (sum, bytes) in partitions.iter_mut().zip(&success.partition_bytes) {
                *sum += bytes;
            }
            let counters: Counters = success.counters.iter().map(|(name, value)| (name.clone(), *value)).collect();
            let node = scheduler.node(&attempt.node);
            let fetched = counters.get(counter::SHUFFLED_BYTES);
            report.tasks.push(TaskReport {
                kind: if kind == pb::TaskKind::Map { "map" } else { "reduce" }.to_owned(),
                index,
                attempt: attempt.number,
                node: attempt.node.clone(),
                host: node.map(|node| node.host.clone()).unwrap_or_default(),
                rack: node.map(|node| node.rack.clone()).unwrap_or_default(),
                locality: attempt.locality,
                path: planned.map(|planned| planned.split.path.clone()),
                offset: planned.map_or(0, |planned| planned.split.offset),
                bytes: planned.map_or(fetched, |planned| planned.split.length),
                output_bytes: success.output_bytes,
                elapsed_ms: success.elapsed_ms,
                peak_memory: success.peak_memory,
            });
            report.counters.merge(&counters);
        }
        report.partitions = PartitionSummary::of(&partitions);
        report.sum_up();
        report
    }

    /// Fills the sums from counters and tasks.
    pub(super) fn sum_up(&mut self) {
        let get = |name| self.counters.get(name);
        self.bytes = ByteSummary {
            read: get(counter::INPUT_BYTES),
            read_local: 0,
            kept: get(counter::INPUT_KEPT_BYTES),
            shuffled: get(counter::SHUFFLED_BYTES),
            spilled: get(counter::SPILLED_BYTES),
            written: get(counter::OUTPUT_BYTES),
        };
        self.records = RecordSummary {
            input: get(counter::RECORDS_IN),
            map_out: get(counter::RECORDS_MAP_OUT),
            combine_out: get(counter::RECORDS_COMBINE_OUT),
            out: get(counter::RECORDS_OUT),
        };
        for task in &self.tasks {
            match task.locality {
                Some(Locality::Node) => {
                    self.map.node_local += 1;
                    self.bytes.read_local += task.bytes;
                }
                Some(Locality::Rack) => self.map.rack_local += 1,
                Some(Locality::Remote) => self.map.remote += 1,
                None => {}
            }
        }
    }

    /// Accepted attempts per node: host, rack, maps by locality (node, rack, remote), reduces.
    pub fn by_node(&self) -> Vec<NodeTasks> {
        let mut nodes: BTreeMap<&str, NodeTasks> = BTreeMap::new();
        for task in &self.tasks {
            let row = nodes.entry(&task.node).or_default();
            row.host.clone_from(&task.host);
            row.rack.clone_from(&task.rack);
            match task.locality {
                Some(Locality::Node) => row.node_local += 1,
                Some(Locality::Rack) => row.rack_local += 1,
                Some(Locality::Remote) => row.remote += 1,
                None => row.reduces += 1,
            }
        }
        let mut rows: Vec<NodeTasks> = nodes.into_values().collect();
        rows.sort_by(|a, b| (&a.rack, &a.host).cmp(&(&b.rack, &b.host)));
        rows
    }
}

/// A row of [`JobReport::by_node`].
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct NodeTasks {
    pub host: String,
    pub rack: String,
    pub node_local: u32,
    pub rack_local: u32,
    pub remote: u32,
    pub reduces: u32,
}

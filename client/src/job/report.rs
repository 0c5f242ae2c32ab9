//! What is known of a job when it is over.

use std::collections::BTreeMap;

use cairn_proto::Error;
use serde::{Serialize, Serializer};

use crate::mapreduce::{Counters, counter};

/// How a job ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum JobState {
    /// Its output is there.
    Succeeded,
    /// A task failed too often, or the output could not be put in place.
    Failed,
    /// It was asked to stop.
    Killed,
}

/// How near a map ran to its block.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
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
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
#[allow(missing_docs)] // the names of the JSON shape
pub struct MapSummary {
    pub tasks: u32,
    pub node_local: u32,
    pub rack_local: u32,
    pub remote: u32,
    pub attempts_failed: u32,
}

/// The reduces.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
#[allow(missing_docs)]
pub struct ReduceSummary {
    pub tasks: u32,
    pub attempts_failed: u32,
}

/// Bytes.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
#[allow(missing_docs)]
pub struct ByteSummary {
    pub read: u64,
    /// By maps on nodes that hold their block.
    pub read_local: u64,
    pub shuffled: u64,
    pub spilled: u64,
    pub written: u64,
}

/// Records.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
#[allow(missing_docs)]
pub struct RecordSummary {
    #[serde(rename = "in")]
    pub input: u64,
    pub map_out: u64,
    pub combine_out: u64,
    pub out: u64,
}

/// Wall time by phase, milliseconds.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
#[allow(missing_docs)]
pub struct PhaseTimes {
    pub plan_ms: u64,
    pub map_ms: u64,
    pub reduce_ms: u64,
    pub commit_ms: u64,
}

/// One accepted attempt.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct TaskReport {
    /// "map" or "reduce".
    pub kind: &'static str,
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
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct JobReport {
    /// Unique.
    pub id: String,
    /// For people.
    pub name: String,
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
    /// All counters of accepted attempts.
    #[serde(serialize_with = "serialize_counters")]
    pub counters: Counters,
    /// Where each accepted attempt ran.
    pub tasks: Vec<TaskReport>,
    /// Why it did not succeed: one line.
    #[serde(serialize_with = "serialize_failure")]
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

impl JobReport {
    /// Fills the sums from counters and tasks.
    pub(super) fn sum_up(&mut self) {
        let get = |name| self.counters.get(name);
        self.bytes = ByteSummary {
            read: get(counter::INPUT_BYTES),
            read_local: 0,
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
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
#[allow(missing_docs)]
pub struct NodeTasks {
    pub host: String,
    pub rack: String,
    pub node_local: u32,
    pub rack_local: u32,
    pub remote: u32,
    pub reduces: u32,
}

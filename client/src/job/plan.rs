//! What a job would do: its splits, its nodes, and which task would run where and why.

use std::collections::{BTreeMap, BTreeSet};

use cairn_proto::{Error, ErrorCode, Result};
use serde::Serialize;

use super::report::Locality;
use super::scheduler::{NodeInfo, Rules, Scheduler};
use super::spec::JobSpec;
use super::splits::{self, PlannedSplit};
use crate::fs::{FileSystem, NodeState};
use crate::mapreduce::InputFormat;

/// Input per reducer that the default aims at.
const BYTES_PER_REDUCER: u64 = 128 << 20;

/// All that is known before the first task.
pub(super) struct Prepared {
    pub splits: Vec<PlannedSplit>,
    pub nodes: Vec<NodeInfo>,
    pub reducers: u32,
    pub cluster_id: String,
}

/// Nodes that run tasks.
pub(super) async fn live_nodes(fs: &FileSystem) -> Result<Vec<NodeInfo>> {
    nodes_in(fs, &[NodeState::Live]).await
}

/// Nodes that run tasks and are in one of these states.
pub(super) async fn nodes_in(fs: &FileSystem, states: &[NodeState]) -> Result<Vec<NodeInfo>> {
    let report = fs.cluster_report().await?;
    let live = report.nodes.into_iter().filter(|node| states.contains(&node.state()) && node.task_slots > 0);
    let info = |node: crate::fs::NodeReport| NodeInfo {
        id: node.id,
        host: node.host,
        address: node.address,
        rack: node.rack,
        slots: node.task_slots,
    };
    Ok(live.map(info).collect())
}

/// Looks at the input and at the cluster.
pub(super) async fn prepare(fs: &FileSystem, spec: &JobSpec) -> Result<Prepared> {
    let format = spec.format()?;
    let mut splits = Vec::new();
    if !matches!(format, InputFormat::Generated { .. }) {
        let files = splits::input_files(fs, &spec.inputs).await?;
        splits = splits::plan_splits(fs, &files, format, spec.split_bytes).await?;
        if let Some(keep) = spec.keep.as_ref().filter(|keep| !keep.inputs.is_empty()) {
            let kept = splits::input_files(fs, &keep.inputs).await?;
            let kept: BTreeSet<u64> = kept.iter().map(|file| file.inode).collect();
            splits.iter_mut().for_each(|planned| planned.split.keep = kept.contains(&planned.split.inode));
        }
    }
    let cluster_id = fs.server_defaults().await?.cluster_id.clone();
    let nodes = live_nodes(fs).await?;
    if nodes.is_empty() {
        return Err(Error::new(ErrorCode::NoTargets, "no live datanode runs tasks"));
    }
    let slots: u64 = nodes.iter().map(|node| u64::from(node.slots)).sum();
    if let InputFormat::Generated { records, tasks } = format {
        let tasks = if tasks == 0 { u32::try_from(slots).unwrap_or(u32::MAX) } else { tasks };
        splits = splits::generated_splits(records, tasks)?;
    }
    let bytes: u64 = splits.iter().map(|planned| planned.split.length).sum();
    let usual = bytes.div_ceil(BYTES_PER_REDUCER).clamp(1, slots.max(1)) as u32;
    // Lines found keep their order only if one reducer gets them all.
    let usual = if spec.kind == "grep" { 1 } else { usual };
    Ok(Prepared { splits, nodes, reducers: spec.reducers.unwrap_or(usual), cluster_id })
}

/// One task of a plan.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct PlannedTask {
    /// "map" or "reduce".
    pub kind: &'static str,
    /// Number among its kind.
    pub index: u32,
    /// A map's file; empty if its records are generated.
    pub path: Option<String>,
    /// Where its part starts; the number of its first record if they are generated.
    pub offset: u64,
    /// Bytes of its part; its records if they are generated.
    pub length: u64,
    /// Names of the nodes that hold a map's part, or most of it.
    pub replicas: Vec<String>,
    /// Id of the node.
    pub node: String,
    /// Name of the node.
    pub host: String,
    /// Rack of the node.
    pub rack: String,
    /// A map's nearness to its block.
    pub locality: Option<Locality>,
    /// Tasks of one wave run at once, if all take equally long.
    pub wave: u32,
    /// In words.
    pub why: String,
}

/// What a job would do now, if it had the cluster for itself.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct JobPlan {
    /// Which program.
    pub kind: String,
    /// Nodes that run tasks.
    pub nodes: u32,
    /// Tasks that they run at once.
    pub slots: u64,
    /// Bytes that a task may use.
    pub memory_limit: u64,
    /// Bytes of input.
    pub bytes: u64,
    /// Number of maps.
    pub maps: u32,
    /// Number of reduces.
    pub reducers: u32,
    /// Maps by nearness: node-local, rack-local, remote.
    pub localities: [u32; 3],
    /// Every task.
    pub tasks: Vec<PlannedTask>,
}

/// Plans a job without running it. The output is not looked at.
pub async fn plan(fs: &FileSystem, spec: &JobSpec) -> Result<JobPlan> {
    spec.validate()?;
    let prepared = prepare(fs, spec).await?;
    Ok(simulate(&spec.kind, spec.memory_limit, prepared))
}

/// Runs the scheduler in waves of equally long tasks.
fn simulate(kind: &str, memory_limit: u64, prepared: Prepared) -> JobPlan {
    let Prepared { splits, nodes, reducers, .. } = prepared;
    let bytes = splits.iter().map(|planned| planned.split.length).sum();
    let maps = splits.len() as u32;
    let hosts: BTreeMap<String, String> = nodes.iter().map(|node| (node.id.clone(), node.host.clone())).collect();
    let mut plan = JobPlan {
        kind: kind.to_owned(),
        nodes: nodes.len() as u32,
        slots: nodes.iter().map(|node| u64::from(node.slots)).sum(),
        memory_limit,
        bytes,
        maps,
        reducers,
        localities: [0; 3],
        tasks: Vec::new(),
    };
    let mut scheduler = Scheduler::new(Rules::new("plan", reducers), splits.clone(), nodes);
    let (mut now_ms, mut wave) = (0, 0);
    loop {
        let started = scheduler.assign(now_ms);
        if started.is_empty() {
            match scheduler.next_look_ms(now_ms) {
                Some(at) => now_ms = at,
                None => break,
            }
            continue;
        }
        wave += 1;
        for one in &started {
            let Some(node) = scheduler.node(&one.node).cloned() else { continue };
            let planned = one.locality.and_then(|_| splits.get(one.task.index as usize));
            if let Some(locality) = one.locality {
                plan.localities[locality as usize] += 1;
            }
            let of = |planned: &PlannedSplit| {
                // One that runs no tasks has no name here.
                planned.nodes.iter().map(|id| hosts.get(id).unwrap_or(id).clone()).collect()
            };
            let replicas: Vec<String> = planned.map(of).unwrap_or_default();
            plan.tasks.push(PlannedTask {
                kind: if one.locality.is_some() { "map" } else { "reduce" },
                index: one.task.index,
                path: planned.map(|planned| planned.split.path.clone()),
                offset: planned.map_or(0, |planned| planned.split.offset.max(planned.split.first_record)),
                length: planned.map_or(0, |planned| planned.split.length.max(planned.split.records)),
                why: why(one.locality, planned, &node, &replicas),
                replicas,
                node: node.id,
                host: node.host,
                rack: node.rack,
                locality: one.locality,
                wave,
            });
        }
        for one in &started {
            scheduler.succeeded(&one.node, &one.task, Default::default(), now_ms);
            scheduler.committed(&one.task);
        }
        now_ms += 1;
    }
    plan
}

fn why(locality: Option<Locality>, planned: Option<&PlannedSplit>, node: &NodeInfo, replicas: &[String]) -> String {
    let holders = replicas.join(", ");
    match locality {
        Some(Locality::Node) => {
            format!("holds one of the block's {} replicas ({holders}) and has a free slot", replicas.len())
        }
        Some(Locality::Rack) => {
            format!("{holders} with the block are busy; {} is in the rack {} of a replica", node.host, node.rack)
        }
        Some(Locality::Remote) if planned.is_some_and(|planned| planned.split.path.is_empty()) => {
            "a free slot; it reads no file".into()
        }
        Some(Locality::Remote) if replicas.is_empty() => "no node holds the block now; a free slot".into(),
        Some(Locality::Remote) => format!("{holders} with the block and their racks are busy; a free slot"),
        None => "a free slot; reduces are spread evenly".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_proto::pb;

    #[test]
    fn a_plan_names_every_task_once() {
        let node = |at: usize| NodeInfo {
            id: format!("n{at}"),
            host: format!("h{at}"),
            address: String::new(),
            rack: format!("/r{}", at % 3),
            slots: 2,
        };
        let split = |at: usize| PlannedSplit {
            split: pb::Split { length: 10, ..Default::default() },
            nodes: vec![format!("n{}", at % 6), format!("n{}", (at * 5 + 1) % 6)],
            racks: vec![format!("/r{}", at % 3)],
        };
        let prepared = Prepared {
            splits: (0..50).map(split).collect(),
            nodes: (0..6).map(node).collect(),
            reducers: 3,
            cluster_id: String::new(),
        };
        let plan = simulate("wordcount", 1 << 20, prepared);
        assert_eq!((plan.nodes, plan.slots), (6, 12));
        let local = plan.tasks.iter().filter(|task| task.locality == Some(Locality::Node));
        assert!(local.clone().all(|task| task.replicas.contains(&task.host) && task.why.contains(&task.host)));
        assert_eq!(plan.tasks.len(), 53);
        assert_eq!(plan.localities.iter().sum::<u32>(), 50);
        assert!(plan.localities[0] >= 45, "{:?}", plan.localities);
        assert_eq!(plan.bytes, 500);
    }
}

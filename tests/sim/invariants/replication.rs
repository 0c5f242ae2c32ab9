//! After the heal the cluster comes to rest: all nodes live, safe mode off, every file closed, every block with as many replicas as its
//! file asks for, on two racks.

use std::collections::BTreeMap;

use cairn_client::fs::{ClusterReportResponse, NodeState};

use crate::inspect::Found;

/// What does not hold.
pub fn check(report: &ClusterReportResponse, found: &BTreeMap<String, Found>, datanodes: u64) -> Vec<String> {
    let mut wrong = Vec::new();
    let live = report.nodes.iter().filter(|node| node.state() == NodeState::Live).count();
    if live as u64 != datanodes {
        wrong.push(format!("{live} of {datanodes} datanodes are live"));
    }
    if report.safemode {
        wrong.push(format!("safe mode: {}", report.safemode_reason));
    }
    let counts = [
        ("under-replicated", report.under_replicated),
        ("missing", report.missing),
        ("corrupt", report.corrupt),
        ("mis-replicated", report.mis_replicated),
        ("over-replicated", report.over_replicated),
        ("pending replication", report.pending_replication),
        ("pending deletion", report.pending_deletion),
    ];
    wrong.extend(counts.iter().filter(|(_, count)| *count > 0).map(|(what, count)| format!("{count} {what}")));
    for (path, file) in found {
        if file.open {
            wrong.push(format!("{path} is open"));
        }
        let short = file.blocks.iter().filter(|block| block.replicas.len() as u64 != u64::from(file.replication));
        wrong.extend(short.map(|block| format!("{path}: {} of {} replicas", block.replicas.len(), file.replication)));
    }
    wrong
}

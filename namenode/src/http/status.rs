//! The cluster's state as JSON, with the names of `cairn admin report --json`.

use cairn_proto::pb;
use serde_json::{Value, json};

pub fn json(cluster_id: &str, report: &pb::ClusterReportResponse) -> Value {
    let nodes: Vec<Value> = report.nodes.iter().map(node).collect();
    json!({
        "cluster_id": cluster_id,
        "nodes": nodes,
        "capacity": report.capacity,
        "used": report.used,
        "remaining": report.remaining,
        "files": report.files,
        "directories": report.directories,
        "blocks": report.blocks,
        "under_replicated": report.under_replicated,
        "over_replicated": report.over_replicated,
        "mis_replicated": report.mis_replicated,
        "missing": report.missing,
        "corrupt": report.corrupt,
        "pending_replication": report.pending_replication,
        "pending_deletion": report.pending_deletion,
        "safemode": report.safemode,
        "safemode_reason": report.safemode_reason,
        "last_txid": report.last_txid,
        "last_checkpoint_txid": report.last_checkpoint_txid,
        "epoch": report.epoch,
    })
}

fn node(node: &pb::NodeReport) -> Value {
    json!({
        "id": node.id,
        "host": node.host,
        "address": node.address,
        "http_address": node.http_address,
        "rack": node.rack,
        "state": state_name(node.state()),
        "capacity": node.capacity,
        "used": node.used,
        "remaining": node.remaining,
        "blocks": node.blocks,
        "last_heartbeat_ms": node.last_heartbeat_ms,
        "active_transfers": node.active_transfers,
        "task_slots": node.task_slots,
        "tasks_running": node.tasks_running,
    })
}

pub fn state_name(state: pb::NodeState) -> &'static str {
    match state {
        pb::NodeState::Live => "live",
        pb::NodeState::Stale => "stale",
        pb::NodeState::Dead => "dead",
        pb::NodeState::Decommissioning => "decommissioning",
        pb::NodeState::Decommissioned => "decommissioned",
        pb::NodeState::Maintenance => "maintenance",
    }
}

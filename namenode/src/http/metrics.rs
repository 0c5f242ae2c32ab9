//! Metrics in Prometheus' text format.

use std::fmt::Write;

use cairn_proto::pb;

use super::status::state_name;
use crate::journal::{JournalStatus, SYNC_BUCKETS_US, SyncTimes};

const STATES: [pb::NodeState; 6] = [
    pb::NodeState::Live,
    pb::NodeState::Stale,
    pb::NodeState::Dead,
    pb::NodeState::Decommissioning,
    pb::NodeState::Decommissioned,
    pb::NodeState::Maintenance,
];

pub fn text(report: &pb::ClusterReportResponse, journal: &JournalStatus, queued: usize, resident: u64) -> String {
    let mut out = String::with_capacity(4_096);
    let gauges = [
        ("cairn_files", "Files.", report.files),
        ("cairn_directories", "Directories.", report.directories),
        ("cairn_blocks", "Blocks.", report.blocks),
        ("cairn_capacity_bytes", "Capacity of all live datanodes.", report.capacity),
        ("cairn_used_bytes", "Used of it.", report.used),
        ("cairn_under_replicated_blocks", "Blocks with too few replicas.", report.under_replicated),
        ("cairn_over_replicated_blocks", "Blocks with too many replicas.", report.over_replicated),
        ("cairn_mis_replicated_blocks", "Blocks on too few racks.", report.mis_replicated),
        ("cairn_missing_blocks", "Blocks without any replica.", report.missing),
        ("cairn_corrupt_blocks", "Blocks with corrupt replicas only.", report.corrupt),
        ("cairn_pending_replication_blocks", "Copies ordered and not yet reported.", report.pending_replication),
        ("cairn_pending_deletion_blocks", "Replicas to be deleted.", report.pending_deletion),
        ("cairn_safemode", "1 in safe mode.", u64::from(report.safemode)),
        ("cairn_last_txid", "Last transaction.", report.last_txid),
        ("cairn_durable_txid", "Last durable transaction.", journal.durable.0),
        ("cairn_merged_blocks", "Short blocks merged into longer ones since the start.", report.merged_blocks),
        ("cairn_merges_under_way", "Merges of short blocks under way.", report.merges_under_way),
        ("cairn_merges_given_up", "Merges of short blocks given up since the start.", report.merges_given_up),
        ("cairn_last_checkpoint_txid", "Transaction of the newest image.", report.last_checkpoint_txid),
        ("cairn_epoch", "Epoch of the log.", journal.epoch.0),
        ("cairn_metadata_directories", "Directories that hold the log.", journal.dirs.len() as u64),
        ("cairn_archived_txid", "Last transaction in the archive; 0 without one.", report.archived_txid),
        ("cairn_archive_failing", "1 while the log cannot be archived.", u64::from(!report.archive_failure.is_empty())),
        (
            "cairn_archive_hole_transactions",
            "Transactions that the archive lacks: take a new backup.",
            archive_hole(report),
        ),
        ("cairn_restored_to_txid", "Not 0: a restore that waits to be confirmed.", report.restored_to_txid),
        ("cairn_event_queue_depth", "Events waiting for the owner.", queued as u64),
        ("cairn_resident_bytes", "Resident memory of this process.", resident),
    ];
    for (name, help, value) in gauges {
        // Writing to a String cannot fail.
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} gauge\n{name} {value}");
    }
    nodes(&mut out, report);
    syncs(&mut out, &journal.syncs);
    out
}

fn archive_hole(report: &pb::ClusterReportResponse) -> u64 {
    match report.archive_hole_to {
        0 => 0,
        to => to.saturating_sub(report.archive_hole_from).saturating_add(1),
    }
}

fn nodes(out: &mut String, report: &pb::ClusterReportResponse) {
    let _ = writeln!(out, "# HELP cairn_datanodes Datanodes by state.\n# TYPE cairn_datanodes gauge");
    for state in STATES {
        let count = report.nodes.iter().filter(|node| node.state() == state).count();
        let _ = writeln!(out, "cairn_datanodes{{state=\"{}\"}} {count}", state_name(state));
    }
}

fn syncs(out: &mut String, syncs: &SyncTimes) {
    let name = "cairn_log_sync_seconds";
    let _ = writeln!(out, "# HELP {name} Write and sync of a batch of the log.\n# TYPE {name} histogram");
    let mut below = 0;
    for (bound_us, count) in SYNC_BUCKETS_US.iter().zip(syncs.buckets) {
        below += count;
        let _ = writeln!(out, "{name}_bucket{{le=\"{}\"}} {below}", *bound_us as f64 / 1e6);
    }
    let _ = writeln!(out, "{name}_bucket{{le=\"+Inf\"}} {}", syncs.count);
    let _ = writeln!(out, "{name}_sum {}\n{name}_count {}", syncs.sum_us as f64 / 1e6, syncs.count);
}

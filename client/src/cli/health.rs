//! `blocks` and `admin`: where the bytes are and how the cluster fares.

use std::time::Duration;

use cairn_client::fs::{FileStatus, FileSystem, LocatedBlock, Replica, SafeModeAction};

use crate::args::{AdminCommand, BlocksArgs, SafemodeArg};
use crate::backup;
use crate::context::{Context, expand_one, in_parallel};
use crate::output::{Columns, Out, Outcome, failure};
use crate::show::{
    BlockJson, BlocksJson, HoleJson, NodeJson, ReplicaJson, ReportJson, is_directory, node_state, replica_state,
};
use crate::units::{self, counted, grouped, human_size};

/// Datanodes asked at a time.
const QUESTIONS: usize = 16;

/// `blocks`
pub async fn blocks(context: &mut Context, args: &BlocksArgs) -> Outcome {
    let fs = context.connect().await?;
    let status = expand_one(&fs, &args.path).await?;
    if is_directory(&status) {
        let text = format!("{} is a directory; blocks are shown of a file", status.path);
        return Err(failure(cairn_client::fs::ErrorCode::NotAFile, text));
    }
    let located = fs.block_locations(&status.path, 0, 0).await?;
    let mut stored: Vec<Option<u64>> = vec![None; located.len()];
    let asked = located.iter().enumerate().map(|(at, block)| {
        let fs = &fs;
        async move { Ok((at, stored_size(fs, block).await)) }
    });
    in_parallel(QUESTIONS, asked, |(at, size)| stored[at] = size).await?;
    let blocks: Vec<BlockJson> = located.iter().zip(stored).map(|(block, stored)| block_json(block, stored)).collect();
    let out = &mut context.out;
    if out.json {
        let (path, length) = (status.path.as_str(), status.length);
        let (replication, block_size) = (status.replication, status.block_size);
        return out.json(&BlocksJson { path, length, replication, block_size, blocks });
    }
    show_blocks(out, &status, &blocks)
}

fn block_json(located: &LocatedBlock, stored: Option<u64>) -> BlockJson {
    let block = located.block.clone().unwrap_or_default();
    let replica = |replica: &Replica| ReplicaJson {
        node: replica.node_id.clone(),
        host: replica.host.clone(),
        rack: replica.rack.clone(),
        state: replica_state(replica.state()),
    };
    BlockJson {
        id: block.id,
        generation: block.generation,
        offset: located.offset,
        length: located.length,
        stored,
        replicas: located.replicas.iter().map(replica).collect(),
    }
}

/// Bytes of the block's file on the first datanode that answers.
async fn stored_size(fs: &FileSystem, located: &LocatedBlock) -> Option<u64> {
    let block = located.block.as_ref()?;
    for replica in &located.replicas {
        if let Ok(info) = fs.replica_info(replica, block, false).await {
            return Some(info.stored);
        }
    }
    None
}

fn show_blocks(out: &mut Out, status: &FileStatus, blocks: &[BlockJson]) -> Outcome {
    out.line(format!(
        "{}: {} bytes in {}, replication {}, block size {}",
        status.path,
        grouped(status.length),
        counted(blocks.len() as u64, "block"),
        status.replication,
        human_size(status.block_size),
    ))?;
    let mut columns = Columns::new(&[0, 1, 2, 3, 4]);
    if !blocks.is_empty() {
        columns.row(["block", "generation", "offset", "length", "stored", "replicas"].map(str::to_owned).into());
    }
    for block in blocks {
        let replicas: Vec<String> = block.replicas.iter().map(show_replica).collect();
        columns.row(vec![
            block.id.to_string(),
            block.generation.to_string(),
            block.offset.to_string(),
            block.length.to_string(),
            block.stored.map_or("?".into(), |stored| stored.to_string()),
            if replicas.is_empty() { "none: the block is missing".into() } else { replicas.join(" ") },
        ]);
    }
    columns.print(out)
}

fn show_replica(replica: &ReplicaJson) -> String {
    let state = if replica.state == "finalized" { String::new() } else { format!("({})", replica.state) };
    format!("{}{}{state}", replica.host, replica.rack)
}

/// `admin`
pub async fn admin(context: &mut Context, command: &AdminCommand) -> Outcome {
    match command {
        AdminCommand::Report => report(context).await,
        AdminCommand::Safemode { action } => safemode(context, *action).await,
        AdminCommand::Checkpoint => checkpoint(context).await,
        AdminCommand::Backup { file } => backup::backup(context, file).await,
        AdminCommand::ConfirmRestore => backup::confirm_restore(context).await,
        AdminCommand::RecoverLease { timeout, path } => {
            crate::append::recover_lease(context, path, Duration::from_secs(*timeout)).await
        }
    }
}

async fn report(context: &mut Context) -> Outcome {
    let fs = context.connect().await?;
    let report = fs.cluster_report().await?;
    let mut nodes: Vec<NodeJson> = report
        .nodes
        .iter()
        .map(|node| NodeJson {
            id: node.id.clone(),
            host: node.host.clone(),
            rack: node.rack.clone(),
            state: node_state(node.state()),
            capacity: node.capacity,
            used: node.used,
            remaining: node.remaining,
            blocks: node.blocks,
            last_heartbeat_ms: node.last_heartbeat_ms,
            addr: node.address.clone(),
            active_transfers: node.active_transfers,
            task_slots: node.task_slots,
            tasks_running: node.tasks_running,
        })
        .collect();
    // dn2 before dn10.
    nodes.sort_by(|a, b| (a.host.len(), &a.host).cmp(&(b.host.len(), &b.host)));
    let json = ReportJson {
        nodes,
        capacity: report.capacity,
        used: report.used,
        under_replicated: report.under_replicated,
        missing: report.missing,
        safemode: report.safemode,
        remaining: report.remaining,
        corrupt: report.corrupt,
        mis_replicated: report.mis_replicated,
        over_replicated: report.over_replicated,
        pending_replication: report.pending_replication,
        pending_deletion: report.pending_deletion,
        safemode_reason: report.safemode_reason,
        files: report.files,
        directories: report.directories,
        blocks: report.blocks,
        last_txid: report.last_txid,
        last_checkpoint_txid: report.last_checkpoint_txid,
        epoch: report.epoch,
        restored_to_txid: report.restored_to_txid,
        archived_txid: report.archived_txid,
        archive_failure: report.archive_failure,
        archive_hole: (report.archive_hole_to != 0)
            .then_some(HoleJson { from: report.archive_hole_from, to: report.archive_hole_to }),
        metadata_dirs: report.metadata_dirs,
        metadata_dirs_configured: report.metadata_dirs_configured,
    };
    let now_ms = context.env.clock.wall_ms();
    let out = &mut context.out;
    if out.json { out.json(&json) } else { show_report(out, &json, now_ms) }
}

fn show_report(out: &mut Out, report: &ReportJson, now_ms: u64) -> Outcome {
    let live = report.nodes.iter().filter(|node| node.state == "live").count();
    out.line(format!(
        "{live} of {} live; {} of {} used; {}, {}, {}",
        counted(report.nodes.len() as u64, "datanode"),
        human_size(report.used),
        human_size(report.capacity),
        counted(report.files, "file"),
        if report.directories == 1 {
            "1 directory".into()
        } else {
            format!("{} directories", grouped(report.directories))
        },
        counted(report.blocks, "block"),
    ))?;
    out.line(format!(
        "blocks missing {}, corrupt {}, under-replicated {}, mis-replicated {}, over-replicated {}; copies under way {}, deletions {}",
        report.missing,
        report.corrupt,
        report.under_replicated,
        report.mis_replicated,
        report.over_replicated,
        report.pending_replication,
        report.pending_deletion,
    ))?;
    let safemode = if report.safemode { format!("on: {}", report.safemode_reason) } else { "off".into() };
    out.line(format!(
        "safe mode {safemode}; transaction {}, last checkpoint {}, epoch {}",
        report.last_txid, report.last_checkpoint_txid, report.epoch
    ))?;
    for warning in backup::warnings(report) {
        out.line(warning)?;
    }
    let mut columns = Columns::new(&[3, 4, 5, 6, 7]);
    let titles = ["node", "rack", "state", "used", "free", "blocks", "tasks", "heard", "address"];
    columns.row(titles.map(str::to_owned).into());
    for node in &report.nodes {
        let heard = match node.last_heartbeat_ms {
            0 => "never".into(),
            then => format!("{} ago", units::human_millis(now_ms.saturating_sub(then))),
        };
        columns.row(vec![
            node.host.clone(),
            node.rack.clone(),
            node.state.into(),
            human_size(node.used),
            human_size(node.remaining),
            grouped(node.blocks),
            format!("{}/{}", node.tasks_running, node.task_slots),
            heard,
            node.addr.clone(),
        ]);
    }
    columns.print(out)
}

async fn safemode(context: &mut Context, action: SafemodeArg) -> Outcome {
    let fs = context.connect().await?;
    let asked = match action {
        SafemodeArg::Enter => SafeModeAction::SafemodeEnter,
        SafemodeArg::Leave => SafeModeAction::SafemodeLeave,
        SafemodeArg::Get | SafemodeArg::Wait => SafeModeAction::SafemodeGet,
    };
    let mut answer = fs.safe_mode(asked).await?;
    while action == SafemodeArg::Wait && answer.on {
        context.env.clock.sleep(Duration::from_millis(100)).await;
        answer = fs.safe_mode(asked).await?;
    }
    let out = &mut context.out;
    if out.json {
        return out.json(&serde_json::json!({"safemode": answer.on, "reason": answer.reason}));
    }
    let why = if answer.reason.is_empty() { String::new() } else { format!(": {}", answer.reason) };
    out.line(format!("safe mode is {}{why}", if answer.on { "on" } else { "off" }))
}

async fn checkpoint(context: &mut Context) -> Outcome {
    let fs = context.connect().await?;
    let done = fs.checkpoint_namenode().await?;
    let out = &mut context.out;
    if out.json {
        let value = serde_json::json!({"txid": done.txid, "bytes": done.bytes, "elapsed_ms": done.elapsed_ms});
        return out.json(&value);
    }
    let time = units::human_millis(done.elapsed_ms);
    out.line(format!("image of transaction {} written: {} in {time}", done.txid, human_size(done.bytes)))
}

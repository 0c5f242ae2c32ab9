//! `fsck`: the health of files and blocks.
//!
//! # Overview
//! A walk over the namespace counts what the namenode knows. With `--verify` every replica is read and checked by its datanode, whose verdict also
//! starts its repair. A range of a file is lost if no replica of it is whole and none is merely out of reach. With `--fix` damaged files are
//! moved to `/lost+found` afterwards ([`salvage`]).

use std::collections::{BTreeMap, BTreeSet};

use cairn_client::fs::{
    ErrorCode, ErrorKind, FileStatus, FileSystem, LocatedBlock, Replica, ReplicaState, SafeModeAction,
};

use crate::args::FsckArgs;
use crate::backup;
use crate::context::{Context, expand, in_parallel};
use crate::output::{Columns, Failure, Out, Outcome, failure};
use crate::progress::Progress;
use crate::salvage::{self, LOST_AND_FOUND};
use crate::show::{FsckJson, LostJson, ProblemJson, is_directory, node_state};
use crate::units::{counted, grouped};

/// Replicas read at a time by `--verify`; more would only make disks seek.
const VERIFICATIONS: usize = 8;

/// A closed file of which something is lost.
pub struct Damaged {
    /// The file with its blocks.
    pub file: FileStatus,
    /// Indexes of the blocks that are lost.
    pub lost: BTreeSet<usize>,
}

/// What a walk has found.
struct Findings {
    json: FsckJson,
    damaged: Vec<Damaged>,
    /// Racks with live nodes.
    racks: usize,
    /// The user looks into `/lost+found` himself.
    inside: bool,
}

/// What the checks of a block's replicas came to.
#[derive(Default)]
struct Verdicts {
    whole: u64,
    bad: u64,
    out_of_reach: u64,
}

/// `fsck`
pub async fn fsck(context: &mut Context, args: &FsckArgs) -> Outcome {
    let fs = context.connect().await?;
    if args.fix {
        let safe_mode = fs.safe_mode(SafeModeAction::SafemodeGet).await?;
        if safe_mode.on {
            let text = format!("fsck --fix is refused in safe mode, when blocks only seem lost: {}", safe_mode.reason);
            return Err(failure(ErrorCode::SafeMode, text));
        }
    }
    let roots = expand(&fs, &args.path).await?;
    let report = fs.cluster_report().await?;
    if args.fix {
        if let Some(note) = backup::unconfirmed(report.restored_to_txid) {
            return Err(failure(ErrorCode::SafeMode, format!("fsck --fix is refused: {note}")));
        }
        salvage::prepare(&fs).await?;
    }
    let live = |state: &str| matches!(state, "live" | "stale");
    let racks: BTreeSet<&str> =
        report.nodes.iter().filter(|node| live(node_state(node.state()))).map(|node| node.rack.as_str()).collect();
    let dead = report.nodes.iter().filter(|node| node_state(node.state()) == "dead").count();
    let mut found = Findings {
        json: FsckJson::default(),
        damaged: Vec::new(),
        racks: racks.len(),
        inside: args.path.starts_with(LOST_AND_FOUND),
    };
    let progress = Progress::start(context, "checked", None);
    walk(&fs, roots, args.verify, &progress, &mut found).await?;
    progress.finish().await;
    let healthy = found.json.missing == 0 && found.json.corrupt == 0;
    found.json.status = if healthy { "healthy" } else { "corrupt" };
    if args.fix {
        found.json.fixed = Some(salvage::fix(&fs, &found.damaged).await);
    }
    let out = &mut context.out;
    if out.json {
        out.json(&found.json)?
    } else {
        show(out, &args.path, &found, dead)?;
        if let Some(note) = backup::unconfirmed(report.restored_to_txid) {
            out.line(note)?;
        }
    }
    if healthy && found.json.unverified == 0 { Ok(()) } else { Err(Failure::Exit(1)) }
}

async fn walk(
    fs: &FileSystem,
    mut pending: Vec<FileStatus>,
    verify: bool,
    progress: &Progress,
    found: &mut Findings,
) -> Outcome {
    let mut verified = 0;
    while let Some(status) = pending.pop() {
        let files = if is_directory(&status) {
            found.json.directories += 1;
            match list_with_blocks(fs, &status.path, &mut pending).await? {
                Some(files) => files,
                None => continue,
            }
        } else {
            vec![FileStatus { blocks: fs.block_locations(&status.path, 0, 0).await?, ..status }]
        };
        let mut judged: Vec<(FileStatus, BTreeSet<usize>)> = Vec::new();
        for file in files {
            if !found.inside && salvage::is_set_aside(&file.path) {
                found.json.files += 1;
                found.json.set_aside += 1;
                continue;
            }
            let lost = check_file(&file, found.racks, &mut found.json);
            judged.push((file, lost));
        }
        if verify {
            verified += verify_files(fs, &mut judged, progress, &mut found.json).await?;
        }
        let damaged = judged.into_iter().filter(|(file, lost)| !lost.is_empty() && !file.open);
        found.damaged.extend(damaged.map(|(file, lost)| Damaged { file, lost }));
    }
    found.json.verified_replicas = verify.then_some(verified);
    Ok(())
}

/// Files of a directory with their blocks; its directories go to `pending`. `None`: it is gone meanwhile.
async fn list_with_blocks(
    fs: &FileSystem,
    directory: &str,
    pending: &mut Vec<FileStatus>,
) -> Outcome<Option<Vec<FileStatus>>> {
    let mut files = Vec::new();
    let mut pages = fs.list_with_locations(directory)?;
    loop {
        match pages.next().await {
            Ok(Some(page)) => {
                for entry in page {
                    if is_directory(&entry) { pending.push(entry) } else { files.push(entry) }
                }
            }
            Ok(None) => return Ok(Some(files)),
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error.into()),
        }
    }
}

fn problem(file: &FileStatus, located: &LocatedBlock, replica: Option<&Replica>, problem: String) -> ProblemJson {
    ProblemJson {
        path: file.path.clone(),
        block: located.block.as_ref().map_or(0, |block| block.id),
        offset: located.offset,
        length: located.length,
        replica: replica.map(|replica| replica.host.clone()),
        problem,
    }
}

fn lose(file: &FileStatus, located: &LocatedBlock, reason: &str, found: &mut FsckJson) {
    found.lost_bytes += located.length;
    found.lost.push(LostJson {
        path: file.path.clone(),
        block: located.block.as_ref().map_or(0, |block| block.id),
        offset: located.offset,
        length: located.length,
        reason: reason.into(),
    });
}

fn win_back(located: &LocatedBlock, found: &mut FsckJson) {
    let id = located.block.as_ref().map_or(0, |block| block.id);
    found.lost_bytes = found.lost_bytes.saturating_sub(located.length);
    found.lost.retain(|lost| lost.block != id);
    found.problems.retain(|problem| problem.block != id || problem.replica.is_some());
}

/// Counts what the namenode knows of one file. Returns the indexes of the blocks of which it knows no good replica.
fn check_file(file: &FileStatus, racks: usize, found: &mut FsckJson) -> BTreeSet<usize> {
    let mut lost = BTreeSet::new();
    found.files += 1;
    found.bytes += file.length;
    found.open_files += u64::from(file.open);
    for (index, located) in file.blocks.iter().enumerate() {
        found.blocks += 1;
        if !located.complete {
            continue;
        }
        let good: Vec<&Replica> =
            located.replicas.iter().filter(|replica| replica.state() != ReplicaState::ReplicaCorrupt).collect();
        let wanted = file.replication as usize;
        if good.is_empty() {
            let corrupt = located.corrupt || !located.replicas.is_empty();
            let reason = if corrupt { "every replica is corrupt" } else { "it has no replica" };
            *(if corrupt { &mut found.corrupt } else { &mut found.missing }) += 1;
            found.problems.push(problem(file, located, None, reason.into()));
            lose(file, located, reason, found);
            lost.insert(index);
        } else if good.len() < wanted {
            let text = format!("{} of {wanted} replicas", good.len());
            found.problems.push(problem(file, located, None, text));
            found.under_replicated += 1;
        } else if good.len() > wanted {
            found.over_replicated += 1;
        }
        let standing: BTreeSet<&str> = good.iter().map(|replica| replica.rack.as_str()).collect();
        if standing.len() == 1 && good.len() > 1 && wanted > 1 && racks > 1 {
            found.problems.push(problem(file, located, None, format!("all replicas are on rack {}", good[0].rack)));
            found.mis_replicated += 1;
        }
    }
    lost
}

/// Makes the datanodes check every replica of these files, and adds the blocks that turn out to be lost; returns how many replicas are whole.
async fn verify_files(
    fs: &FileSystem,
    judged: &mut [(FileStatus, BTreeSet<usize>)],
    progress: &Progress,
    found: &mut FsckJson,
) -> Outcome<u64> {
    let mut verdicts: BTreeMap<(usize, usize), Verdicts> = BTreeMap::new();
    let mut problems = Vec::new();
    let blocks = judged.iter().enumerate().flat_map(|(at, (file, _))| {
        let blocks = file.blocks.iter().enumerate().filter(|(_, located)| located.complete);
        blocks.flat_map(move |(index, located)| {
            located.replicas.iter().map(move |replica| ((at, index), file, located, replica))
        })
    });
    let checks = blocks.map(|(at, file, located, replica)| async move {
        let result = verify_replica(fs, file, located, replica).await;
        progress.add(located.length);
        Ok((at, file, located, replica, result))
    });
    in_parallel(VERIFICATIONS, checks, |(at, file, located, replica, result)| {
        let verdict = verdicts.entry(at).or_default();
        match result {
            Verdict::Whole => verdict.whole += 1,
            Verdict::Gone => {}
            Verdict::Bad(why) => {
                verdict.bad += 1;
                problems
                    .push((at, problem(file, located, Some(replica), format!("replica on {}: {why}", replica.host))));
            }
            Verdict::OutOfReach(why) => {
                verdict.out_of_reach += 1;
                problems
                    .push((at, problem(file, located, Some(replica), format!("replica on {}: {why}", replica.host))));
            }
        }
    })
    .await?;
    // They came in the order in which disks answered.
    problems.sort_by(|a, b| (a.0, &a.1.replica).cmp(&(b.0, &b.1.replica)));
    found.problems.extend(problems.into_iter().map(|(_, problem)| problem));
    for ((at, index), verdict) in &verdicts {
        let (file, lost) = &mut judged[*at];
        if lost.contains(index) {
            if verdict.whole > 0 {
                // The namenode did not know yet: its datanode has just taken it back.
                found.corrupt = found.corrupt.saturating_sub(1);
                lost.remove(index);
                win_back(&file.blocks[*index], found);
            }
            continue;
        }
        found.corrupt += u64::from(verdict.bad > 0);
        found.unverified += u64::from(verdict.whole == 0 && verdict.out_of_reach > 0);
        if verdict.whole == 0 && verdict.out_of_reach == 0 && verdict.bad > 0 {
            lose(file, &file.blocks[*index], "no replica is whole", found);
            lost.insert(*index);
        }
    }
    Ok(verdicts.values().map(|verdict| verdict.whole).sum())
}

enum Verdict {
    Whole,
    Bad(String),
    /// It was deleted by order of the namenode since the listing.
    Gone,
    OutOfReach(String),
}

async fn verify_replica(fs: &FileSystem, file: &FileStatus, located: &LocatedBlock, replica: &Replica) -> Verdict {
    let block = located.block.clone().unwrap_or_default();
    let error = match fs.verify_replica(replica, &block).await {
        Ok(_) => return Verdict::Whole,
        Err(error) => error,
    };
    match error.kind() {
        ErrorKind::Corrupt => Verdict::Bad(error.to_string()),
        ErrorKind::NotFound => {
            let now = match fs.block_locations(&file.path, located.offset, 1).await {
                Ok(now) => now,
                // The file was deleted meanwhile.
                Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
                Err(error) => return Verdict::OutOfReach(error.to_string()),
            };
            let same = now.iter().find(|now| now.block.as_ref().is_some_and(|now| now.id == block.id));
            let listed = |now: &LocatedBlock| now.replicas.iter().any(|other| other.storage_id == replica.storage_id);
            // A file that is missing makes its datanode give the replica up at once: what counts is whether others are left.
            match same {
                Some(now) if listed(now) || now.replicas.len() < file.replication as usize => {
                    Verdict::Bad(error.to_string())
                }
                _ => Verdict::Gone,
            }
        }
        _ => Verdict::OutOfReach(error.to_string()),
    }
}

fn range(offset: u64, length: u64) -> String {
    format!("bytes {offset} to {}", offset + length)
}

fn show(out: &mut Out, path: &str, findings: &Findings, dead: usize) -> Outcome {
    let found = &findings.json;
    for problem in &found.problems {
        let range = range(problem.offset, problem.length);
        out.line(format!("{}: block {}, {range}: {}", problem.path, problem.block, problem.problem))?;
    }
    for lost in &found.lost {
        out.line(format!("{}: {} are LOST: {}", lost.path, range(lost.offset, lost.length), lost.reason))?;
    }
    let mut columns = Columns::new(&[1]);
    for (name, number) in [
        ("directories", found.directories),
        ("files", found.files),
        ("open files", found.open_files),
        ("bytes", found.bytes),
        ("blocks", found.blocks),
        ("missing", found.missing),
        ("corrupt", found.corrupt),
        ("under-replicated", found.under_replicated),
        ("mis-replicated", found.mis_replicated),
        ("over-replicated", found.over_replicated),
    ] {
        columns.row(vec![format!("  {name}"), grouped(number)]);
    }
    if let Some(number) = found.verified_replicas {
        columns.row(vec!["  replicas verified".into(), grouped(number)]);
    }
    if found.lost_bytes > 0 {
        columns.row(vec!["  bytes lost".into(), grouped(found.lost_bytes)]);
    }
    columns.print(out)?;
    if dead > 0 && !found.lost.is_empty() {
        let nodes = counted(dead as u64, "datanode");
        out.line(format!("{nodes} did not report for long: what only they hold counts as lost until they are back"))?;
    }
    if found.set_aside > 0 {
        let files = counted(found.set_aside, "damaged file");
        out.line(format!(
            "{files} in {LOST_AND_FOUND} from an earlier --fix: not counted; remove them when you are done"
        ))?;
    }
    for fixed in found.fixed.iter().flatten() {
        out.line(match (&fixed.target, &fixed.problem) {
            (Some(target), _) => format!(
                "{} was moved to {target}/{}; {} with {} bytes of it beside",
                fixed.path,
                salvage::ORIGINAL,
                counted(fixed.salvaged_files, "file"),
                grouped(fixed.salvaged_bytes)
            ),
            (None, why) => format!("{} was left alone: {}", fixed.path, why.as_deref().unwrap_or_default()),
        })?;
    }
    if found.fixed.is_none() && !findings.damaged.is_empty() {
        let files = counted(findings.damaged.len() as u64, "damaged file");
        out.line(format!("{files}: --fix would move them to {LOST_AND_FOUND} with what is whole of them"))?;
    }
    out.line(format!("{path} is {}", found.status))
}

#[cfg(test)]
#[path = "fsck_tests.rs"]
mod tests;

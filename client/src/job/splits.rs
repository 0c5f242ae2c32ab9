//! From input paths to splits: one per block, with the nodes that hold it.

use std::collections::BTreeMap;

use cairn_proto::path::split_last;
use cairn_proto::{Error, ErrorCode, Result, pb};

use crate::fs::{FileKind, FileStatus, FileSystem, LocatedBlock};
use crate::mapreduce::InputFormat;

/// Most map tasks of a job.
const MAX_SPLITS: usize = 1_000_000;
/// A last piece shorter than this part of a split is joined to the one before.
const SLACK_DIVISOR: u64 = 10;

/// One map's input and where it lies.
#[derive(Clone, PartialEq, Debug)]
pub struct PlannedSplit {
    /// What the task reads.
    pub split: pb::Split,
    /// Ids of the nodes that hold most of it.
    pub nodes: Vec<String>,
    /// Racks of those nodes.
    pub racks: Vec<String>,
}

/// Finds the files that the inputs name, in the order given.
pub async fn input_files(fs: &FileSystem, inputs: &[String]) -> Result<Vec<FileStatus>> {
    let mut files = Vec::new();
    for input in inputs {
        // A name that exists is meant as it is, whatever characters it holds.
        let found = match fs.find(input).await? {
            Some(status) => vec![status],
            None => {
                let mut found = fs.glob(input).await?;
                found.retain(|status| !is_hidden(&status.path));
                found
            }
        };
        if found.is_empty() {
            let text = format!("input {input} does not exist");
            return Err(Error::new(ErrorCode::FileNotFound, text).with_subject(input.clone()));
        }
        for status in found {
            if status.kind() == FileKind::Directory {
                add_tree(fs, &status.path, &mut files).await?;
            } else {
                files.push(status);
            }
        }
    }
    Ok(files)
}

/// Names of that kind are bookkeeping: `_SUCCESS`, staging folders, hidden files. Only a name given as it is reads them.
fn is_hidden(path: &str) -> bool {
    split_last(path).is_some_and(|(_, name)| name.starts_with(['.', '_']))
}

async fn add_tree(fs: &FileSystem, root: &str, files: &mut Vec<FileStatus>) -> Result<()> {
    let mut walk = fs.walk(root).await?;
    while let Some(status) = walk.next().await? {
        let below = status.path.get(root.len()..).unwrap_or_default();
        let hidden = below.split('/').any(|name| name.starts_with(['.', '_']));
        if status.kind() == FileKind::File && !hidden {
            files.push(status);
        }
    }
    Ok(())
}

/// Cuts the files at their block edges; blocks longer than `split_bytes` (if it is not 0) are cut again. What `format` cannot cut is one split a file.
pub async fn plan_splits(
    fs: &FileSystem,
    files: &[FileStatus],
    format: InputFormat,
    split_bytes: u64,
) -> Result<Vec<PlannedSplit>> {
    let mut splits = Vec::new();
    for (file_index, file) in files.iter().enumerate() {
        if file.open {
            let text = format!("input {} is still being written", file.path);
            return Err(Error::new(ErrorCode::AlreadyBeingCreated, text).with_subject(file.path.clone()));
        }
        check_length(file, format)?;
        let file_index = file_index as u32;
        if file.length == 0 {
            if format.takes_empty_files() {
                splits.push(PlannedSplit { split: whole(file, file_index), nodes: Vec::new(), racks: Vec::new() });
            }
            continue;
        }
        let blocks = fs.block_locations(&file.path, 0, file.length).await?;
        if format.is_splittable(&file.path) {
            for block in &blocks {
                cut_block(file, file_index, block, split_bytes, &mut splits);
            }
        } else {
            let (nodes, racks) = most_of(&blocks);
            splits.push(PlannedSplit { split: whole(file, file_index), nodes, racks });
        }
        if splits.len() > MAX_SPLITS {
            let text = format!("the input makes more than {MAX_SPLITS} map tasks: use larger splits or less input");
            return Err(Error::new(ErrorCode::InvalidArgument, text));
        }
    }
    Ok(splits)
}

/// Shares out the numbers of generated records.
pub fn generated_splits(records: u64, tasks: u32) -> Result<Vec<PlannedSplit>> {
    let tasks = u64::from(tasks).clamp(1, records.max(1));
    if tasks > MAX_SPLITS as u64 {
        let text = format!("{tasks} map tasks are more than {MAX_SPLITS}");
        return Err(Error::new(ErrorCode::InvalidArgument, text));
    }
    let start = |task: u64| (u128::from(records) * u128::from(task) / u128::from(tasks)) as u64;
    let split = |task: u64| {
        let first_record = start(task);
        let split = pb::Split { first_record, records: start(task + 1) - first_record, ..Default::default() };
        PlannedSplit { split, nodes: Vec::new(), racks: Vec::new() }
    };
    Ok((0..tasks).map(split).collect())
}

fn check_length(file: &FileStatus, format: InputFormat) -> Result<()> {
    let InputFormat::Fixed(length) = format else { return Ok(()) };
    if length > 0 && file.length.is_multiple_of(u64::from(length)) || !format.is_splittable(&file.path) {
        return Ok(());
    }
    let text = format!("input {} has {} bytes, not a multiple of the record length {length}", file.path, file.length);
    Err(Error::new(ErrorCode::InvalidArgument, text).with_subject(file.path.clone()))
}

fn whole(file: &FileStatus, file_index: u32) -> pb::Split {
    pb::Split {
        path: file.path.clone(),
        length: file.length,
        file_length: file.length,
        file_index,
        inode: file.inode,
        ..Default::default()
    }
}

/// The nodes that hold more of the file than any other, and their racks.
fn most_of(blocks: &[LocatedBlock]) -> (Vec<String>, Vec<String>) {
    let mut held: BTreeMap<&str, (u64, &str)> = BTreeMap::new();
    for block in blocks {
        for replica in &block.replicas {
            held.entry(&replica.node_id).or_insert((0, &replica.rack)).0 += block.length;
        }
    }
    let most = held.values().map(|(bytes, _)| *bytes).max().unwrap_or(0);
    let best = held.into_iter().filter(|(_, (bytes, _))| *bytes == most);
    let (nodes, mut racks): (Vec<String>, Vec<String>) =
        best.map(|(node, (_, rack))| (node.to_owned(), rack.to_owned())).unzip();
    racks.sort_unstable();
    racks.dedup();
    (nodes, racks)
}

fn cut_block(
    file: &FileStatus,
    file_index: u32,
    block: &LocatedBlock,
    split_bytes: u64,
    splits: &mut Vec<PlannedSplit>,
) {
    let end = (block.offset + block.length).min(file.length);
    let step = if split_bytes == 0 { block.length } else { split_bytes }.max(1);
    let nodes: Vec<String> = block.replicas.iter().map(|replica| replica.node_id.clone()).collect();
    let mut racks: Vec<String> = block.replicas.iter().map(|replica| replica.rack.clone()).collect();
    racks.sort_unstable();
    racks.dedup();
    let mut at = block.offset;
    while at < end {
        let rest = end - at;
        let length = if rest <= step + step / SLACK_DIVISOR { rest } else { step };
        let split = pb::Split { offset: at, length, ..whole(file, file_index) };
        splits.push(PlannedSplit { split, nodes: nodes.clone(), racks: racks.clone() });
        at += length;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(length: u64, split_bytes: u64) -> Vec<(u64, u64)> {
        let file = FileStatus { path: "/f".into(), length: 5_000 + length, ..Default::default() };
        let block = LocatedBlock { offset: 5_000, length, ..Default::default() };
        let mut splits = Vec::new();
        cut_block(&file, 0, &block, split_bytes, &mut splits);
        splits.iter().map(|planned| (planned.split.offset, planned.split.length)).collect()
    }

    #[test]
    fn blocks_are_cut_without_small_rests() {
        assert_eq!(cut(1_000, 0), [(5_000, 1_000)]);
        assert_eq!(cut(1_000, 400), [(5_000, 400), (5_400, 400), (5_800, 200)]);
        assert_eq!(cut(1_030, 500), [(5_000, 500), (5_500, 530)]);
        assert_eq!(cut(0, 0), []);
    }

    #[test]
    fn a_file_in_one_piece_belongs_where_most_of_it_lies() {
        let replica = |node: &str, rack: &str| crate::fs::Replica {
            node_id: node.into(),
            rack: rack.into(),
            ..Default::default()
        };
        let block = |length, replicas| LocatedBlock { length, replicas, ..Default::default() };
        let blocks = [
            block(10, vec![replica("a", "/1"), replica("b", "/2")]),
            block(20, vec![replica("b", "/2"), replica("c", "/1")]),
            block(10, vec![replica("c", "/1"), replica("d", "/3")]),
        ];
        assert_eq!(most_of(&blocks), (vec!["b".into(), "c".into()], vec!["/1".into(), "/2".into()]));
    }

    #[test]
    fn generated_records_are_shared_out_evenly() {
        let parts = |records, tasks| -> Vec<(u64, u64)> {
            let splits = generated_splits(records, tasks).unwrap();
            splits.iter().map(|planned| (planned.split.first_record, planned.split.records)).collect()
        };
        assert_eq!(parts(10, 3), [(0, 3), (3, 3), (6, 4)]);
        assert_eq!(parts(2, 5), [(0, 1), (1, 1)]);
        assert_eq!(parts(0, 5), [(0, 0)]);
        assert_eq!(parts(u64::MAX, 2)[1], (u64::MAX / 2, u64::MAX / 2 + 1));
        assert!(generated_splits(u64::MAX, u32::MAX).is_err());
    }

    #[test]
    fn a_file_that_records_of_one_length_do_not_fill_is_refused() {
        let file = FileStatus { path: "/f".into(), length: 205, ..Default::default() };
        assert!(check_length(&file, InputFormat::Fixed(41)).is_ok());
        let error = check_length(&file, InputFormat::Fixed(100)).unwrap_err();
        assert_eq!(error.message(), "input /f has 205 bytes, not a multiple of the record length 100");
    }
}

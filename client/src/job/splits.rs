//! From input paths to splits: one per block, with the nodes that hold it.

use cairn_proto::path::split_last;
use cairn_proto::{Error, ErrorCode, Result, pb};

use crate::fs::{FileKind, FileStatus, FileSystem, LocatedBlock};

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

/// Cuts the files at their block edges; blocks longer than `split_bytes` (if it is not 0) are cut again.
pub async fn plan_splits(fs: &FileSystem, files: &[FileStatus], split_bytes: u64) -> Result<Vec<PlannedSplit>> {
    let mut splits = Vec::new();
    for (file_index, file) in files.iter().enumerate() {
        if file.open {
            let text = format!("input {} is still being written", file.path);
            return Err(Error::new(ErrorCode::AlreadyBeingCreated, text).with_subject(file.path.clone()));
        }
        if file.length == 0 {
            continue;
        }
        let blocks = fs.block_locations(&file.path, 0, file.length).await?;
        for block in &blocks {
            cut_block(file, file_index as u32, block, split_bytes, &mut splits);
        }
        if splits.len() > MAX_SPLITS {
            let text = format!("the input makes more than {MAX_SPLITS} map tasks: use larger splits or less input");
            return Err(Error::new(ErrorCode::InvalidArgument, text));
        }
    }
    Ok(splits)
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
        let path = file.path.clone();
        let split = pb::Split { path, offset: at, length, file_length: file.length, file_index };
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
}

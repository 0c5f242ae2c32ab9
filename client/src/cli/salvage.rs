//! `fsck --fix`: what is left of damaged files goes to `/lost+found`, and then the files themselves.
//!
//! # Overview
//! Of a damaged file `/a/b` the runs of whole blocks become `/lost+found/a/b/0`, `1`, ..., as with HDFS's `fsck -move`. The damaged file itself is
//! moved to `/lost+found/a/b/damaged`, never deleted: should the node with a missing block come back, `mv` puts it back whole. If
//! `/lost+found/a/b` is taken, `/lost+found/a/b.1` is used, and so on.
//!
//! # Crash
//! ```text
//! 1. /lost+found/a/b.incomplete/{0,1,...}      copied and closed
//! 2. /a/b -> /lost+found/a/b.incomplete/damaged
//! 3. /lost+found/a/b.incomplete -> /lost+found/a/b
//! ```
//! Before step 2 the file is where it was, and the next run begins anew; after it, the next run does step 3. So it may be repeated at will.

use cairn_client::fs::{
    CreateOptions, Error, ErrorCode, ErrorKind, FileStatus, FileSystem, LocatedBlock, RenameMode, Result,
};

use crate::fsck::Damaged;
use crate::output::{Outcome, failure};
use crate::show::{FixedJson, is_directory};

/// Where damaged files go.
pub const LOST_AND_FOUND: &str = "/lost+found";
/// Name of the damaged file itself in its folder there.
pub const ORIGINAL: &str = "damaged";
const INCOMPLETE: &str = ".incomplete";
/// Bytes read at once.
const PIECE: u64 = 4 << 20;
/// Names tried for a folder.
const NAMES: u32 = 1_000;

/// What was copied out of a file.
#[derive(Default)]
struct Salvaged {
    files: u64,
    bytes: u64,
}

/// Is this a damaged file that was moved here?
pub fn is_set_aside(path: &str) -> bool {
    path.strip_prefix(LOST_AND_FOUND)
        .and_then(|rest| rest.strip_prefix('/'))
        .is_some_and(|rest| rest.ends_with(&format!("/{ORIGINAL}")))
}

/// Makes `/lost+found`, and refuses whoever is not the superuser; ends what an earlier run was stopped in.
pub async fn prepare(fs: &FileSystem) -> Outcome {
    let refused = |error: Error| match error.kind() {
        ErrorKind::PermissionDenied => {
            failure(ErrorCode::PermissionDenied, format!("fsck --fix is for the superuser: {error}"))
        }
        _ => error.into(),
    };
    if !fs.exists(LOST_AND_FOUND).await.map_err(refused)? {
        fs.mkdirs(LOST_AND_FOUND, 0o700).await.map_err(refused)?;
    }
    // Only the superuser may give files to the owner of the root; nothing of users is touched before this is known.
    let owner = fs.status("/").await?.owner;
    fs.set_owner(LOST_AND_FOUND, Some(&owner), None).await.map_err(refused)?;
    let mut walk = fs.walk(LOST_AND_FOUND).await?;
    let mut incomplete = Vec::new();
    while let Some(entry) = walk.next().await? {
        if is_directory(&entry) && entry.path.ends_with(INCOMPLETE) {
            incomplete.push(entry.path);
        }
    }
    for path in incomplete {
        if fs.exists(&format!("{path}/{ORIGINAL}")).await? {
            complete(fs, &path).await?;
        }
    }
    Ok(())
}

/// Moves damaged files away, one after the other; what cannot be done to one does not stop the others.
pub async fn fix(fs: &FileSystem, damaged: &[Damaged]) -> Vec<FixedJson> {
    let mut all = Vec::new();
    for damaged in damaged {
        let path = damaged.file.path.clone();
        all.push(match fix_one(fs, damaged).await {
            Ok((target, salvaged)) => FixedJson {
                path,
                target: Some(target),
                salvaged_files: salvaged.files,
                salvaged_bytes: salvaged.bytes,
                problem: None,
            },
            Err(error) => {
                FixedJson { path, target: None, salvaged_files: 0, salvaged_bytes: 0, problem: Some(error.to_string()) }
            }
        });
    }
    all
}

async fn fix_one(fs: &FileSystem, damaged: &Damaged) -> Result<(String, Salvaged)> {
    let file = &damaged.file;
    if file.path.starts_with(&format!("{LOST_AND_FOUND}/")) {
        let text = format!("{} lies in {LOST_AND_FOUND} already", file.path);
        return Err(Error::new(ErrorCode::InvalidArgument, text));
    }
    let staging = format!("{LOST_AND_FOUND}{}{INCOMPLETE}", file.path);
    // Whatever is there was copied by a run that did not come to its end; the file is still in its place.
    fs.delete(&staging, true).await?;
    fs.mkdirs(&staging, 0o700).await?;
    let salvaged = match copy_runs(fs, damaged, &staging).await {
        Ok(salvaged) => salvaged,
        Err(error) => {
            // Best effort: the next run removes it too.
            let _ = fs.delete(&staging, true).await;
            return Err(error);
        }
    };
    check_same(fs, file).await?;
    fs.rename(&file.path, &format!("{staging}/{ORIGINAL}"), RenameMode::NoReplace).await?;
    Ok((complete(fs, &staging).await?, salvaged))
}

/// What was judged must be what is moved.
async fn check_same(fs: &FileSystem, file: &FileStatus) -> Result<()> {
    let now = fs.status(&file.path).await?;
    if now.inode == file.inode && now.length == file.length && !now.open {
        return Ok(());
    }
    let text = format!("{} was changed meanwhile: run fsck again", file.path);
    Err(Error::new(ErrorCode::InvalidArgument, text).with_subject(&file.path))
}

/// Copies the runs of whole blocks.
async fn copy_runs(fs: &FileSystem, damaged: &Damaged, staging: &str) -> Result<Salvaged> {
    let file = &damaged.file;
    let whole: Vec<Option<&LocatedBlock>> = file
        .blocks
        .iter()
        .enumerate()
        .map(|(index, located)| (!damaged.lost.contains(&index)).then_some(located))
        .collect();
    let reader = fs.open(&file.path).await?;
    let mut salvaged = Salvaged::default();
    for run in whole.split(Option::is_none).filter(|run| !run.is_empty()) {
        let (Some(Some(first)), Some(Some(last))) = (run.first(), run.last()) else { continue };
        let (mut at, end) = (first.offset, last.offset + last.length);
        let options = CreateOptions {
            replication: file.replication,
            block_size: file.block_size,
            permission: 0o600,
            ..CreateOptions::default()
        };
        let mut writer = fs.create(&format!("{staging}/{}", salvaged.files), options).await?;
        while at < end {
            let piece = reader.read_range(at, PIECE.min(end - at)).await?;
            if piece.is_empty() {
                let text = format!("{} ends at {at}, before {end}", file.path);
                return Err(Error::new(ErrorCode::BlockNotFound, text).with_subject(&file.path));
            }
            at += piece.len() as u64;
            writer.write_bytes(piece).await?;
        }
        writer.close().await?;
        salvaged.files += 1;
        salvaged.bytes += end - first.offset;
    }
    Ok(salvaged)
}

/// Gives a folder whose file was moved its final name.
async fn complete(fs: &FileSystem, staging: &str) -> Result<String> {
    let wanted = staging.strip_suffix(INCOMPLETE).unwrap_or(staging);
    for number in 0..NAMES {
        let target = if number == 0 { wanted.to_owned() } else { format!("{wanted}.{number}") };
        match fs.rename(staging, &target, RenameMode::NoReplace).await {
            Ok(()) => return Ok(target),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    let text = format!("{wanted} and {NAMES} names beside it are taken");
    Err(Error::new(ErrorCode::FileAlreadyExists, text).with_subject(wanted))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_moved_here_is_set_aside() {
        assert!(is_set_aside("/lost+found/a/b/damaged"));
        for other in ["/lost+found/a/b/0", "/lost+found/damaged", "/a/damaged", "/lost+foundation/a/damaged"] {
            assert!(!is_set_aside(other), "{other}");
        }
    }
}

//! `fsck --fix`: what is left of damaged files goes to `/lost+found`, and then the files themselves.
//!
//! # Overview
//! Of a damaged file `/a/b` the runs of whole blocks become `/lost+found/a/b/0`, `1`, ..., as with HDFS's `fsck -move`. The damaged file itself is
//! moved to `/lost+found/a/b/damaged`, never deleted: should the node with a missing block come back, `mv` puts it back whole. If
//! `/lost+found/a/b` is taken, `/lost+found/a/b.1` is used, and so on.
//!
//! # Crash
//! ```text
//! 1. /lost+found.incomplete/INODE/a/b/{0,1,...}      copied and closed
//! 2. /a/b -> /lost+found.incomplete/INODE/a/b/damaged
//! 3. /lost+found.incomplete/INODE/a/b -> /lost+found/a/b
//! ```
//! Before step 2 the file is where it was, and the next run begins anew; after it, the next run does step 3. So it may be repeated at will. The
//! folder of step 1 lies apart, because below `/lost+found` every name may be that of a user's file: what is begun anew is deleted first.

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
/// Where their folders are made.
const INCOMPLETE: &str = "/lost+found.incomplete";
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
    // Only the superuser may give files to the owner of the root; nothing of users is touched before this is known.
    let owner = fs.status("/").await?.owner;
    for folder in [LOST_AND_FOUND, INCOMPLETE] {
        if !fs.exists(folder).await.map_err(refused)? {
            fs.mkdirs(folder, 0o700).await.map_err(refused)?;
        }
        fs.set_owner(folder, Some(&owner), None).await.map_err(refused)?;
    }
    let mut walk = fs.walk(INCOMPLETE).await?;
    let mut moved = Vec::new();
    while let Some(entry) = walk.next().await? {
        if !is_directory(&entry)
            && let Some(folder) = entry.path.strip_suffix(&format!("/{ORIGINAL}"))
        {
            moved.push(folder.to_owned());
        }
    }
    for folder in moved {
        complete(fs, &folder).await?;
    }
    Ok(())
}

/// Nothing is under way: its folder goes, unless an earlier run left something there.
async fn clean_up(fs: &FileSystem) {
    // An error says that it is not empty: the next run goes on with what is there.
    let _ = fs.delete(INCOMPLETE, false).await;
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
    clean_up(fs).await;
    all
}

async fn fix_one(fs: &FileSystem, damaged: &Damaged) -> Result<(String, Salvaged)> {
    let file = &damaged.file;
    for folder in [LOST_AND_FOUND, INCOMPLETE] {
        if file.path.starts_with(&format!("{folder}/")) {
            let text = format!("{} lies in {folder} already", file.path);
            return Err(Error::new(ErrorCode::InvalidArgument, text));
        }
    }
    let own = format!("{INCOMPLETE}/{}", file.inode);
    let staging = format!("{own}{}", file.path);
    // Whatever is there was copied by a run that did not come to its end; the file is still in its place.
    fs.delete(&own, true).await?;
    fs.mkdirs(&staging, 0o700).await?;
    let salvaged = match copy_runs(fs, damaged, &staging).await {
        Ok(salvaged) => salvaged,
        Err(error) => {
            // Best effort: the next run removes it too.
            let _ = fs.delete(&own, true).await;
            return Err(error);
        }
    };
    if let Err(error) = check_same(fs, file).await {
        let _ = fs.delete(&own, true).await;
        return Err(error);
    }
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
    let Some((inode, path)) = split_staging(staging) else {
        let text = format!("{staging} was not made by fsck --fix: move it elsewhere");
        return Err(Error::new(ErrorCode::InvalidArgument, text).with_subject(staging));
    };
    let wanted = &format!("{LOST_AND_FOUND}{path}");
    if let Some((parent, _)) = wanted.rsplit_once('/') {
        fs.mkdirs(parent, 0o700).await?;
    }
    let target = take_name(fs, staging, wanted).await?;
    // Only the folders that led to it are left.
    let _ = fs.delete(&format!("{INCOMPLETE}/{inode}"), true).await;
    Ok(target)
}

/// The inode and the path of the file whose folder this is.
fn split_staging(staging: &str) -> Option<(&str, &str)> {
    let rest = staging.strip_prefix(INCOMPLETE)?.strip_prefix('/')?;
    let (inode, path) = rest.split_at(rest.find('/')?);
    let is_number = !inode.is_empty() && inode.bytes().all(|byte| byte.is_ascii_digit());
    (is_number && path.len() > 1).then_some((inode, path))
}

async fn take_name(fs: &FileSystem, staging: &str, wanted: &str) -> Result<String> {
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
    fn a_folder_that_is_being_filled_tells_whose_it_is() {
        assert_eq!(split_staging("/lost+found.incomplete/17/a/b"), Some(("17", "/a/b")));
        for other in [
            "/lost+found.incomplete/17",
            "/lost+found.incomplete/17/",
            "/lost+found.incomplete/x/a",
            "/lost+found/17/a",
        ] {
            assert_eq!(split_staging(other), None, "{other}");
        }
    }

    #[test]
    fn only_what_was_moved_here_is_set_aside() {
        assert!(is_set_aside("/lost+found/a/b/damaged"));
        for other in ["/lost+found/a/b/0", "/lost+found/damaged", "/a/damaged", "/lost+foundation/a/damaged"] {
            assert!(!is_set_aside(other), "{other}");
        }
    }
}

//! The volumes at start: locked, recognised, and left out where their disk does not answer.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use cairn_common::Env;
use cairn_common::durable::Lock;
use cairn_proto::{Error, ErrorCode, Result};
use tokio::sync::Notify;

use super::version::Version;
use super::volume::Volume;
use crate::settings::DatanodeSettings;

/// What was opened.
pub(super) struct OpenVolumes {
    pub volumes: Vec<Volume>,
    /// Of each volume.
    pub versions: Vec<Version>,
    /// Folders whose disk failed, and why.
    pub left_out: LeftOut,
}

type Locked<'a> = (&'a PathBuf, Box<dyn Lock>, Option<Version>);
/// Folders and why they are left out.
type LeftOut = Vec<(PathBuf, String)>;

/// Locks every folder, agrees on one node, and gives new folders their identity. A folder whose disk fails is left out as long as
/// `failed_volumes_tolerated` allows; one that is in use, or of something else, stops the start: that is for the operator to mend.
pub(super) fn open_volumes(env: &Env, settings: &DatanodeSettings, failures: &Arc<Notify>) -> Result<OpenVolumes> {
    let (locked, mut left_out) = lock_all(env, settings)?;
    let named = || locked.iter().filter_map(|(dir, _, version)| version.as_ref().map(|version| (*dir, version)));
    let known = named().find(|(_, version)| version.is_joined()).or_else(|| named().next());
    let known = known.map(|(dir, version)| (dir, version.clone()));
    if let (None, Some((dir, why))) = (&known, left_out.first()) {
        // A second identity for an old node would be worse than no start.
        let text = format!("no volume says who this datanode is, and {} cannot be read: {why}", dir.display());
        return Err(Error::new(ErrorCode::Io, text).with_subject(dir.display().to_string()));
    }
    let node_id = known.as_ref().map_or_else(|| env.entropy.uuid(), |(_, version)| version.node_id.clone());
    let mut volumes = Vec::new();
    let mut versions = Vec::new();
    let limit = settings.capacity_bytes.map(|bytes| bytes / settings.dirs.len() as u64);
    for (dir, lock, version) in locked {
        let (mut version, mut is_written) = match version {
            Some(version) => (version, true),
            None => (Volume::fresh_version(env, &node_id), false),
        };
        // A new folder, or one that a crash in the middle of this node's first registration left out.
        if let Some((_, known)) = &known
            && known.is_joined()
            && !version.is_joined()
            && version.node_id == known.node_id
        {
            version.cluster_id.clone_from(&known.cluster_id);
            version.pool_id.clone_from(&known.pool_id);
            version.epoch = known.epoch;
            is_written = false;
        }
        if !is_written && let Err(error) = version.write(&*env.fs, dir) {
            leave_out(settings, &mut left_out, dir, error)?;
            continue;
        }
        if let Some((other, known)) = &known {
            check_same_node(dir, &version, other, known)?;
        }
        if versions.iter().any(|other: &Version| other.storage_id == version.storage_id) {
            let text = format!("{} is a copy of another volume of this datanode: it has its storage id", dir.display());
            return Err(Error::new(ErrorCode::InvalidArgument, text));
        }
        let (fs, room) = (Arc::clone(&env.fs), (limit, settings.reserved_bytes));
        let volume = Volume::new(fs, dir, lock, version.storage_id.clone(), room, Arc::clone(failures));
        volume.refresh_room();
        volumes.push(volume);
        versions.push(version);
    }
    Ok(OpenVolumes { volumes, versions, left_out })
}

fn lock_all<'a>(env: &Env, settings: &'a DatanodeSettings) -> Result<(Vec<Locked<'a>>, LeftOut)> {
    let (mut locked, mut left_out) = (Vec::new(), Vec::new());
    for dir in &settings.dirs {
        match Volume::lock(&env.fs, dir) {
            Ok((lock, version)) => locked.push((dir, lock, version)),
            Err(error) => leave_out(settings, &mut left_out, dir, error)?,
        }
    }
    Ok((locked, left_out))
}

/// Goes on without a folder if its disk is the reason and there are others.
fn leave_out(settings: &DatanodeSettings, left_out: &mut LeftOut, dir: &Path, error: Error) -> Result<()> {
    if error.code() != ErrorCode::Io || left_out.len() >= settings.failed_volumes_tolerated() {
        return Err(error);
    }
    tracing::error!("volume {} is left out: {error}", dir.display());
    left_out.push((dir.to_owned(), error.message().to_owned()));
    Ok(())
}

fn check_same_node(dir: &Path, version: &Version, other: &Path, known: &Version) -> Result<()> {
    for (what, this, that) in [
        ("datanode", &version.node_id, &known.node_id),
        ("cluster", &version.cluster_id, &known.cluster_id),
        ("block pool", &version.pool_id, &known.pool_id),
    ] {
        if this != that {
            let text = format!(
                "{} belongs to {what} {this}, but {} to {what} {that}: they cannot serve together",
                dir.display(),
                other.display()
            );
            return Err(Error::new(ErrorCode::WrongCluster, text).with_subject(dir.display().to_string()));
        }
    }
    Ok(())
}

//! From metadata directories to a running core: format, or load an image and replay the log.

use std::path::PathBuf;
use std::sync::Arc;

use cairn_common::clock::Clock;
use cairn_common::durable::{Fs, OpenMode};
use cairn_common::work::Work;
use cairn_proto::ids::{Epoch, TxId};
use cairn_proto::{Error, ErrorCode, Result, pb};
use prost::Message;

use crate::backup::check_archive;
use crate::backup::restore::{Restore, RestorePlan, Restored};
use crate::core::{Command, Core, CoreSettings, Now};
use crate::image::{list_images, read_image_on, remove_leftovers};
use crate::journal::{
    ClusterFacts, DirSet, DirState, Found, LogEnd, LogError, LogSizes, LogWriter, MetaDir, cut_tail, is_harmless,
    list_segments, open_set, read_log, read_version,
};

/// What a start needs.
pub struct LoadPlan {
    /// Files.
    pub fs: Arc<dyn Fs>,
    /// Threads.
    pub work: Work,
    /// Time.
    pub clock: Clock,
    /// Metadata directories.
    pub dirs: Vec<PathBuf>,
    /// Go on without some of them.
    pub accept_missing_dir: bool,
    /// The core's settings.
    pub core: CoreSettings,
    /// Who formats an empty directory is superuser of the cluster.
    pub superuser: String,
    /// Group whose members have all rights.
    pub supergroup: String,
    /// Sizes of the log.
    pub sizes: LogSizes,
    /// Fill the (empty) directories from a backup first.
    pub restore: Option<RestorePlan>,
    /// Where the log will be archived: not into the archive of another cluster.
    pub archive: Option<PathBuf>,
}

impl LoadPlan {
    /// Before anything is changed.
    fn check_archive(&self, cluster_id: &str) -> Result<()> {
        self.archive.as_ref().map_or(Ok(()), |dir| check_archive(&*self.fs, dir, cluster_id))
    }
}

/// A core that is ready to serve, and the open end of its log.
pub struct Loaded {
    /// The core.
    pub core: Core,
    /// The log.
    pub writer: LogWriter,
    /// Who the directories belong to.
    pub facts: ClusterFacts,
    /// Transaction of the newest image; 0: there is none.
    pub image: TxId,
    /// Transactions replayed.
    pub replayed: u64,
    /// Whether the cluster was formatted just now.
    pub is_new: bool,
}

fn now(clock: &Clock) -> Now {
    let now = clock.now();
    Now { mono_ms: now.mono_ms, wall_ms: now.wall_ms }
}

/// Locks the directories, then formats or loads. Blocking.
pub fn load(plan: &LoadPlan, new_id: &mut dyn FnMut() -> String) -> Result<Loaded> {
    if let Some(restore) = &plan.restore {
        return restore_into(plan, restore, new_id);
    }
    let set = open_set(&*plan.fs, &plan.dirs, plan.accept_missing_dir, new_id)?;
    match set.facts.clone() {
        None => {
            let restoring = |one: &&Found| one.version.as_ref().is_some_and(|v| v.state == DirState::Restoring);
            if let Some(one) = set.found.iter().find(restoring) {
                let dir = one.dir.root().display();
                let text = format!("a restore into {dir} was interrupted: give --restore FILE again, or empty it");
                return Err(Error::new(ErrorCode::InvalidArgument, text).with_subject(dir.to_string()));
            }
            format(plan, &set, new_id)
        }
        Some(facts) => {
            plan.check_archive(&facts.cluster_id)?;
            load_set(plan, &set, facts)
        }
    }
}

fn format(plan: &LoadPlan, set: &DirSet, new_id: &mut dyn FnMut() -> String) -> Result<Loaded> {
    let (cluster_id, pool_id) = (new_id(), format!("BP-{}", new_id()));
    plan.check_archive(&cluster_id)?;
    let facts = ClusterFacts { cluster_id, pool_id, epoch: Epoch(1) };
    let dirs: Vec<Arc<MetaDir>> = set.found.iter().map(|one| Arc::clone(&one.dir)).collect();
    for dir in &dirs {
        // `VERSION` first: a crash from here on leaves a directory that says it is not ready.
        write_version(plan, dir, &facts, DirState::New, &dirs)?;
        dir.clear(&*plan.fs).map_err(|error| Error::io(format!("cannot format {}", dir.root().display()), &error))?;
    }
    let mut commands = Vec::new();
    let settings = plan.core.clone();
    let (cluster, pool) = (&facts.cluster_id, &facts.pool_id);
    let mut core =
        Core::format(settings, cluster, pool, &plan.superuser, &plan.supergroup, now(&plan.clock), &mut commands);
    let mut writer = LogWriter::create(Arc::clone(&plan.fs), dirs.clone(), facts.clone(), plan.sizes, (TxId(0), 0))?;
    append_all(&mut writer, std::mem::take(&mut commands))?;
    core.start(now(&plan.clock), facts.epoch, &mut commands);
    append_all(&mut writer, commands)?;
    for dir in &dirs {
        write_version(plan, dir, &facts, DirState::Ready, &dirs)?;
    }
    Ok(Loaded { core, writer, facts, image: TxId(0), replayed: 0, is_new: true })
}

fn write_version(
    plan: &LoadPlan,
    dir: &MetaDir,
    facts: &ClusterFacts,
    state: DirState,
    set: &[Arc<MetaDir>],
) -> Result<()> {
    let ids: Vec<String> = set.iter().map(|dir| dir.id().to_owned()).collect();
    dir.write_version(&*plan.fs, facts, state, &ids).map_err(|error| {
        let path = dir.root().join("VERSION").display().to_string();
        Error::io(format!("cannot write {path}"), &error).with_subject(path)
    })
}

/// Writes what the core wants to have in the log before anybody is served.
fn append_all(writer: &mut LogWriter, commands: Vec<Command>) -> Result<()> {
    for command in commands {
        if let Command::Append { txid, edit } = command {
            writer.append(txid, &edit)?;
        }
    }
    writer.flush()?;
    Ok(())
}

/// Fills empty directories with the state that a person wants, and begins a future of its own.
fn restore_into(plan: &LoadPlan, wanted: &RestorePlan, new_id: &mut dyn FnMut() -> String) -> Result<Loaded> {
    for path in &plan.dirs {
        check_restorable(plan, path)?;
    }
    let restore = Restore::open(&*plan.fs, wanted)?;
    let set = open_set(&*plan.fs, &plan.dirs, false, new_id)?;
    let (cluster_id, pool_id) = restore.cluster();
    plan.check_archive(cluster_id)?;
    let facts = ClusterFacts {
        cluster_id: cluster_id.to_owned(),
        pool_id: pool_id.to_owned(),
        epoch: restore.epoch(plan.clock.wall_ms()),
    };
    let dirs: Vec<Arc<MetaDir>> = set.found.iter().map(|one| Arc::clone(&one.dir)).collect();
    for dir in &dirs {
        write_version(plan, dir, &facts, DirState::Restoring, &dirs)?;
        dir.clear(&*plan.fs).map_err(|error| Error::io(format!("cannot empty {}", dir.root().display()), &error))?;
    }
    let restored = restore.write(&*plan.fs, &dirs)?;
    let Some(first) = dirs.first() else {
        return Err(Error::new(ErrorCode::InvalidArgument, "no metadata directory to restore into"));
    };
    let Read { mut core, end, image, .. } = read_restored(plan, first, &facts, restored)?;
    restore.check_time(&*plan.fs, core.newest_time_ms())?;
    let at = (restored.last, restored.chain);
    let mut writer = LogWriter::create(Arc::clone(&plan.fs), dirs.clone(), facts.clone(), plan.sizes, at)?;
    let mut commands = Vec::new();
    core.begin_restored(now(&plan.clock), &mut commands);
    core.start(now(&plan.clock), facts.epoch, &mut commands);
    core.set_last_checkpoint(image);
    append_all(&mut writer, commands)?;
    for dir in &dirs {
        write_version(plan, dir, &facts, DirState::Ready, &dirs)?;
    }
    tracing::warn!(
        cluster_id = %facts.cluster_id, to_txid = %restored.last, epoch = %facts.epoch,
        "restored: nothing is deleted on datanodes until `cairn admin confirm-restore`"
    );
    Ok(Loaded { core, writer, facts, image, replayed: end.records, is_new: false })
}

/// Only what is empty, or was left half restored, is restored into.
fn check_restorable(plan: &LoadPlan, path: &std::path::Path) -> Result<()> {
    let shown = path.display().to_string();
    let failed = |error: std::io::Error| Error::io(format!("cannot look at {shown}"), &error).with_subject(&shown);
    let refused = |what: String| {
        let text = format!("{shown} is not empty ({what}): a restore needs an empty or new directory");
        Err(Error::new(ErrorCode::InvalidArgument, text).with_subject(&shown))
    };
    match plan.fs.metadata(path).map_err(failed)? {
        None => return Ok(()),
        Some(found) if !found.is_dir => return refused("it is a file".into()),
        Some(_) => {}
    }
    match read_version(&*plan.fs, path)? {
        Some(version) if version.state == DirState::Ready => {
            refused(format!("it holds the metadata of cluster {}", version.cluster_id))
        }
        Some(_) => Ok(()),
        None => match plan.fs.read_dir(path).map_err(failed)?.iter().find(|entry| !is_harmless(&entry.name)) {
            Some(entry) => refused(format!("it holds \"{}\"", entry.name)),
            None => Ok(()),
        },
    }
}

/// Reads back what was written, as every later start will.
fn read_restored(plan: &LoadPlan, dir: &MetaDir, facts: &ClusterFacts, restored: Restored) -> Result<Read> {
    let (core, image, epoch) = load_image(plan, dir, facts)?;
    if image != restored.image {
        let text = format!("the image of transaction {} in the backup cannot be loaded", restored.image);
        return Err(Error::new(ErrorCode::Corrupt, text));
    }
    let read = replay_log(plan, dir, facts, (core, image, epoch))?;
    if read.core.last_txid() != restored.last {
        let text = format!("the restored log ends with {}, not with {}", read.core.last_txid(), restored.last);
        return Err(Error::new(ErrorCode::Internal, text));
    }
    Ok(read)
}

/// A core as one directory tells it.
struct Read {
    core: Core,
    end: LogEnd,
    image: TxId,
    epoch: Epoch,
}

fn load_set(plan: &LoadPlan, set: &DirSet, mut facts: ClusterFacts) -> Result<Loaded> {
    let sources = best_sources(plan, set, &facts)?;
    let mut first_error = None;
    let mut read = None;
    for source in &sources {
        match read_dir(plan, &source.dir, &facts) {
            Ok(found) => {
                read = Some((*source, found));
                break;
            }
            Err(error) => {
                if sources.len() > 1 {
                    tracing::error!(dir = %source.dir.root().display(), %error, "metadata directory is not usable");
                }
                first_error.get_or_insert(error);
            }
        }
    }
    let Some((source, read)) = read else {
        return Err(first_error.unwrap_or_else(|| Error::new(ErrorCode::Internal, "no metadata directory to read")));
    };
    let mut core = read.core;
    facts.epoch = facts.epoch.max(read.end.epoch).max(read.epoch);
    if set.left_out {
        facts.epoch = facts.epoch.next_future(plan.clock.wall_ms());
    } else if set.changed {
        facts.epoch = facts.epoch.next();
    }
    if let Some(tail) = &read.end.tail {
        if tail.torn {
            tracing::warn!(
                file = %tail.path.display(), offset = tail.end, last_txid = %read.end.last,
                "a batch that was never acknowledged is cut off the log"
            );
        }
        cut_tail(&*plan.fs, tail)?;
    }
    fill_others(plan, set, source, &facts, &read.end)?;
    let dirs: Vec<Arc<MetaDir>> = set.found.iter().map(|one| Arc::clone(&one.dir)).collect();
    for dir in &dirs {
        write_version(plan, dir, &facts, DirState::Ready, &dirs)?;
    }
    let at = (read.end.last, read.end.chain);
    let mut writer = LogWriter::create(Arc::clone(&plan.fs), dirs, facts.clone(), plan.sizes, at)?;
    let mut commands = Vec::new();
    core.start(now(&plan.clock), facts.epoch, &mut commands);
    core.set_last_checkpoint(read.image);
    append_all(&mut writer, commands)?;
    Ok(Loaded { core, writer, facts, image: read.image, replayed: read.end.records, is_new: false })
}

/// Directories that may hold the latest transactions, the one with the longest log first.
fn best_sources<'a>(plan: &LoadPlan, set: &'a DirSet, facts: &ClusterFacts) -> Result<Vec<&'a Found>> {
    let candidates: Vec<&Found> = set.found.iter().filter(|one| one.is_ready() && one.epoch() == facts.epoch).collect();
    if candidates.len() < 2 {
        return Ok(candidates);
    }
    let mut lengths = Vec::new();
    for one in candidates {
        // A log that does not read to its end comes last; why, is told when it is its turn.
        let last = scan(plan, &one.dir, facts).map_or(TxId(0), |end| end.last);
        lengths.push((std::cmp::Reverse(last), one));
    }
    lengths.sort_by_key(|(last, _)| *last);
    Ok(lengths.into_iter().map(|(_, one)| one).collect())
}

/// Reads the newest part of a log without applying it.
fn scan(plan: &LoadPlan, dir: &MetaDir, facts: &ClusterFacts) -> Result<LogEnd, LogError> {
    let segments = list_segments(&*plan.fs, &dir.log())?;
    // The newest segment may be empty; the one before tells what it is chained to.
    let from = segments.iter().rev().nth(1).or(segments.last()).map_or(TxId(1), |segment| segment.first);
    read_log(&*plan.fs, &dir.log(), &facts.cluster_id, from, |_, _| Ok(()))
}

fn read_dir(plan: &LoadPlan, dir: &MetaDir, facts: &ClusterFacts) -> Result<Read> {
    let loaded = load_image(plan, dir, facts)?;
    let log = dir.log();
    if list_segments(&*plan.fs, &log)?.is_empty() {
        let text = format!(
            "{} holds no segment of the edit log although the cluster was used: put it back, start with another \
             metadata directory (--dir), or restore from a backup (--restore)",
            log.display()
        );
        return Err(Error::new(ErrorCode::Corrupt, text).with_subject(log.display().to_string()));
    }
    replay_log(plan, dir, facts, loaded)
}

fn replay_log(
    plan: &LoadPlan,
    dir: &MetaDir,
    facts: &ClusterFacts,
    (mut core, image, mut epoch): (Core, TxId, Epoch),
) -> Result<Read> {
    let end = read_log(&*plan.fs, &dir.log(), &facts.cluster_id, image.next(), |record, payload| {
        let edit = pb::Edit::decode(payload).map_err(|error| format!("not an edit: {error}"))?;
        core.replay(record.txid, edit).map_err(|error| error.to_string())
    })?;
    epoch = epoch.max(end.epoch);
    Ok(Read { core, end, image, epoch })
}

/// The newest image that verifies, or an empty core if the log goes back to the beginning.
fn load_image(plan: &LoadPlan, dir: &MetaDir, facts: &ClusterFacts) -> Result<(Core, TxId, Epoch)> {
    let folder = dir.image();
    remove_leftovers(&*plan.fs, &folder)?;
    let mut first_error = None;
    for image in list_images(&*plan.fs, &folder)? {
        let mut core = Core::new_for_load(plan.core.clone());
        let read = read_image_on(
            &*plan.fs,
            &plan.work,
            &image.path,
            &facts.cluster_id,
            |page| Core::decode_page(page).map_err(|error| error.to_string()),
            |page| core.load_decoded(page).map_err(|error| error.to_string()),
        );
        let finished = read.and_then(|found| {
            let damaged = |what: String| LogError::damaged_image(&image.path, 0, what);
            core.finish_load(image.txid).map_err(|error| damaged(error.to_string()))?;
            if core.digest() != found.header.state_digest {
                return Err(damaged("the state loaded from it has another digest than the one it was made of".into()));
            }
            Ok(found.header.epoch)
        });
        match finished {
            Ok(epoch) => return Ok((core, image.txid, epoch)),
            // A newer format or another cluster is no damage that an older image could mend.
            Err(error @ (LogError::Newer { .. } | LogError::OtherCluster { .. })) => return Err(error.into()),
            Err(error) => {
                tracing::error!(%error, "image not usable; trying the one before, which takes a longer replay");
                first_error.get_or_insert(error);
            }
        }
    }
    let reaches_back = list_segments(&*plan.fs, &dir.log())?.first().is_some_and(|segment| segment.first == TxId(1));
    match first_error {
        Some(error) if !reaches_back => Err(error.into()),
        _ => Ok((Core::new_for_load(plan.core.clone()), TxId(0), Epoch(0))),
    }
}

/// Brings the other directories to what `source` holds.
fn fill_others(plan: &LoadPlan, set: &DirSet, source: &Found, facts: &ClusterFacts, end: &LogEnd) -> Result<()> {
    let dirs: Vec<Arc<MetaDir>> = set.found.iter().map(|one| Arc::clone(&one.dir)).collect();
    for one in set.found.iter().filter(|one| !Arc::ptr_eq(&one.dir, &source.dir)) {
        if one.is_ready() && one.epoch() == source.epoch() && is_equal(plan, source, one, facts, end) {
            continue;
        }
        tracing::warn!(
            dir = %one.dir.root().display(), from = %source.dir.root().display(),
            "metadata directory is behind: filled from another one"
        );
        write_version(plan, &one.dir, facts, DirState::New, &dirs)?;
        copy_dir(&*plan.fs, &source.dir, &one.dir)?;
    }
    Ok(())
}

/// Whether `other` ends with the same record (each is chained to all before it) and holds the same images. Its torn tail,
/// if it has one, is cut.
fn is_equal(plan: &LoadPlan, source: &Found, other: &Found, facts: &ClusterFacts, end: &LogEnd) -> bool {
    let names = |dir: &MetaDir| -> Result<Vec<(TxId, u64)>, LogError> {
        let images = list_images(&*plan.fs, &dir.image())?;
        let segments = list_segments(&*plan.fs, &dir.log())?;
        let images = images.iter().map(|image| (image.txid, image.len));
        Ok(images.chain(segments.iter().map(|segment| (segment.first, 0))).collect())
    };
    let compare = || -> Result<bool, LogError> {
        let found = scan(plan, &other.dir, facts)?;
        if (found.last, found.chain) != (end.last, end.chain) || names(&source.dir)? != names(&other.dir)? {
            return Ok(false);
        }
        found.tail.map_or(Ok(true), |tail| cut_tail(&*plan.fs, &tail).map(|()| true))
    };
    compare().unwrap_or(false)
}

fn copy_dir(fs: &dyn Fs, from: &MetaDir, to: &MetaDir) -> Result<(), LogError> {
    to.clear(fs).map_err(LogError::io("empty", to.root()))?;
    let images = list_images(fs, &from.image())?.into_iter().map(|image| (image.path, to.image()));
    let segments = list_segments(fs, &from.log())?.into_iter().map(|segment| (segment.path, to.log()));
    for (path, folder) in images.chain(segments) {
        let Some(name) = path.file_name() else { continue };
        copy_file(fs, &path, &folder.join(name))?;
    }
    for folder in [to.image(), to.log()] {
        fs.sync_dir(&folder).map_err(LogError::io("sync", &folder))?;
    }
    Ok(())
}

fn copy_file(fs: &dyn Fs, from: &std::path::Path, to: &std::path::Path) -> Result<(), LogError> {
    let source = fs.open(from, OpenMode::Read).map_err(LogError::io("open", from))?;
    let target = fs.open(to, OpenMode::Create).map_err(LogError::io("make", to))?;
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    loop {
        let n = source.read_at(&mut buffer, at).map_err(LogError::io("read", from))?;
        if n == 0 {
            break;
        }
        target.write_all_at(&buffer[..n], at).map_err(LogError::io("write", to))?;
        at += n as u64;
    }
    target.sync_data().map_err(LogError::io("sync", to))
}

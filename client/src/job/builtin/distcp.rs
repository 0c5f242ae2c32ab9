//! Copying folders between clusters: what to copy, the job that does it, what came out.
//!
//! # Overview
//! [`prepare`] lists sources and target and decides what each file needs; [`Prepared::spec`] is the job that copies. Files of this machine are not
//! seen by the nodes: [`Prepared::copy_local`] copies them from here. [`Prepared::finish`] deletes what the source does not have, gives folders their
//! attributes and sums up. [`Prepared::clean_up`] belongs behind all of it, whatever the end.
//!
//! # Crash
//! Files in their places are whole; a folder `.distcp-ID` beside the target may be left.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use cairn_common::durable::Fs;
use cairn_proto::path::{join, normalize, split_last};
use cairn_proto::{Error, ErrorCode, Result};
use futures_util::StreamExt as _;
use serde::Serialize;

use crate::fs::{CreateOptions, FileKind, FileStatus, FileSystem};
use crate::job::report::{JobReport, JobState};
use crate::job::spec::JobSpec;
use crate::mapreduce::distcp::cluster::{Address, Cluster};
use crate::mapreduce::distcp::copy::{Copier, Options, Preserve, Source};
use crate::mapreduce::distcp::list::{Item, share_out};
use crate::mapreduce::distcp::{Outcome, property};

/// Map tasks if nobody says how many.
const DEFAULT_MAPS: u32 = 20;
/// Files of this machine copied at once if nobody says how many.
const DEFAULT_LOCAL_STREAMS: u32 = 4;
/// Failures that a summary names.
const TOLD_FAILURES: usize = 100;

/// One end of a copy.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Place {
    /// In a cluster.
    Cluster {
        /// Which one; `None`: the one that runs the job.
        address: Option<Address>,
        /// Absolute path.
        path: String,
    },
    /// On this machine.
    Local(PathBuf),
}

impl Place {
    /// `/path`, `cairn://HOST:PORT/path`, `hdfs://HOST:PORT/path` or `file:///path`.
    pub fn parse(text: &str) -> Result<Self> {
        let invalid = |why: &str| {
            let text =
                format!("{text:?}: {why}; write /PATH, cairn://HOST:PORT/PATH, hdfs://HOST:PORT/PATH or file:///PATH");
            Error::new(ErrorCode::InvalidArgument, text)
        };
        if let Some(path) = text.strip_prefix("file://") {
            let path = Path::new(path);
            return if path.is_absolute() {
                Ok(Self::Local(path.to_owned()))
            } else {
                Err(invalid("a local path is absolute"))
            };
        }
        if let Some((scheme @ ("cairn" | "hdfs"), rest)) = text.split_once("://") {
            let (host, path) = rest.find('/').map_or((rest, "/"), |at| rest.split_at(at));
            let address = Address::parse(&format!("{scheme}://{host}")).map_err(|_| invalid("it names no namenode"))?;
            return Ok(Self::Cluster { address: Some(address), path: normalize(path)? });
        }
        if text.contains("://") {
            return Err(invalid("there is no copying from or to such a place"));
        }
        Ok(Self::Cluster { address: None, path: normalize(text)? })
    }
}

/// What is copied how.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct DistCpOptions {
    /// Copy what is missing or differs in length or checksum; contents of a source folder go into the target itself.
    pub update: bool,
    /// Copy everything; contents of a source folder go into the target itself.
    pub overwrite: bool,
    /// Delete what the target has and the source has not; only with one of the two above.
    pub delete: bool,
    /// Letters of `rbugpt`.
    pub preserve: String,
    /// Bytes a second of each map; 0: no limit.
    pub bandwidth: u64,
    /// At most so many maps; 0: as fits.
    pub maps: u32,
}

/// What came out.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
#[allow(missing_docs)]
pub struct DistCpSummary {
    pub copied: u64,
    pub skipped: u64,
    pub failed: u64,
    pub deleted: u64,
    pub directories: u64,
    pub bytes_copied: u64,
    pub bytes_skipped: u64,
    /// "PATH: why", the first hundred.
    pub failures: Vec<String>,
}

impl DistCpSummary {
    fn fail(&mut self, path: &str, why: &str) {
        self.failed += 1;
        if self.failures.len() < TOLD_FAILURES {
            self.failures.push(format!("{path}: {why}"));
        }
    }

    fn take(&mut self, outcome: Outcome, bytes: u64) {
        match outcome {
            Outcome::Copied => (self.copied, self.bytes_copied) = (self.copied + 1, self.bytes_copied + bytes),
            Outcome::Skipped => (self.skipped, self.bytes_skipped) = (self.skipped + 1, self.bytes_skipped + bytes),
            Outcome::Failed => {}
        }
    }
}

/// A copy that is planned.
pub struct Prepared {
    target: Cluster,
    source: Source,
    options: DistCpOptions,
    preserve: Preserve,
    items: Vec<Item>,
    /// Folders of the source, with where they go.
    folders: Vec<(FileStatus, String)>,
    /// What the target has and the source has not, topmost.
    surplus: Vec<String>,
    summary: DistCpSummary,
    /// Of the target cluster.
    staging: String,
    /// Of the job's cluster: list and results.
    work: String,
    job_fs: FileSystem,
    addresses: [Option<Address>; 2],
}

/// Lists sources and target.
pub async fn prepare(fs: &FileSystem, sources: &[Place], target: &Place, options: &DistCpOptions) -> Result<Prepared> {
    let refuse = |text: &str| Err(Error::new(ErrorCode::InvalidArgument, text));
    if options.update && options.overwrite {
        return refuse("--update and --overwrite exclude each other");
    }
    if options.delete && !options.update && !options.overwrite {
        return refuse("--delete goes with --update or --overwrite: it makes the target equal to the source");
    }
    let preserve = Preserve::parse(&options.preserve)?;
    let Place::Cluster { address: target_address, path: target_path } = target else {
        return refuse("the target must be in a cluster; `cairn get` copies to this machine");
    };
    let target_fs = connect(fs, target_address.as_ref()).await?;
    let (source, source_address, roots) = roots(fs, sources).await?;
    let mut prepared = Prepared::new(fs, target_fs, source, options, preserve, target_path);
    prepared.addresses = [source_address, target_address.clone()];
    let merge = options.update || options.overwrite;
    let there = prepared.target.find(target_path).await?;
    let is_folder = there.as_ref().is_some_and(|status| status.kind() == FileKind::Directory);
    if there.is_some()
        && !is_folder
        && (roots.len() > 1 || roots.iter().any(|root| root.status.kind() == FileKind::Directory))
    {
        let text = format!("{target_path} is a file: it cannot take several sources or a directory");
        return Err(Error::new(ErrorCode::NotADirectory, text).with_subject(target_path.clone()));
    }
    let mut wanted = BTreeMap::new();
    for root in &roots {
        let folder = root.status.kind() == FileKind::Directory;
        let whole = roots.len() == 1 && there.is_none();
        let into = match folder {
            true if whole || merge => target_path.clone(),
            false if roots.len() == 1 && !is_folder => target_path.clone(),
            _ => join(target_path, &root.name),
        };
        prepared.check_apart(root, &into)?;
        prepared.list(root, &into, &mut wanted).await?;
    }
    prepared.meet(target_path, wanted, there.is_some()).await?;
    Ok(prepared)
}

/// A source and the name under which it may be put into a folder.
struct Root {
    status: FileStatus,
    name: String,
}

async fn connect(fs: &FileSystem, address: Option<&Address>) -> Result<Cluster> {
    match address {
        Some(address) => Cluster::connect(fs, address).await,
        None => Ok(Cluster::Cairn(fs.clone())),
    }
}

/// Finds the sources, which must all be in one place.
async fn roots(fs: &FileSystem, sources: &[Place]) -> Result<(Source, Option<Address>, Vec<Root>)> {
    let mut roots = Vec::new();
    let name_of = |path: &str| split_last(path).map_or("", |(_, name)| name).to_owned();
    match sources.first() {
        None => Err(Error::new(ErrorCode::InvalidArgument, "distcp needs at least one source")),
        Some(Place::Local(_)) => {
            for source in sources {
                let Place::Local(path) = source else { return Err(mixed()) };
                let text = path.to_string_lossy().into_owned();
                let status = local_status(fs, path).await?.ok_or_else(|| {
                    Error::new(ErrorCode::FileNotFound, format!("{text} does not exist on this machine"))
                        .with_subject(text.clone())
                })?;
                roots.push(Root { status, name: path.file_name().unwrap_or_default().to_string_lossy().into_owned() });
            }
            Ok((Source::Local(Arc::clone(&fs.env().fs)), None, roots))
        }
        Some(Place::Cluster { address, .. }) => {
            let cluster = connect(fs, address.as_ref()).await?;
            for source in sources {
                let Place::Cluster { address: other, path } = source else { return Err(mixed()) };
                if other != address {
                    return Err(mixed());
                }
                let found = match cluster.find(path).await? {
                    Some(status) => vec![status],
                    None => cluster.glob(path).await?,
                };
                if found.is_empty() {
                    let text = format!("source {path} does not exist");
                    return Err(Error::new(ErrorCode::FileNotFound, text).with_subject(path.clone()));
                }
                roots.extend(found.into_iter().map(|status| Root { name: name_of(&status.path), status }));
            }
            Ok((Source::Cluster(cluster), address.clone(), roots))
        }
    }
}

fn mixed() -> Error {
    Error::new(
        ErrorCode::InvalidArgument,
        "all sources of one copy must be in the same cluster, or all on this machine",
    )
}

/// A file or folder of this machine, described as one of a cluster.
async fn local_status(fs: &FileSystem, path: &Path) -> Result<Option<FileStatus>> {
    let path = path.to_owned();
    let read = fs.env().work.io(move || {
        use std::os::unix::fs::MetadataExt as _;
        let metadata = match std::fs::metadata(&path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io(format!("cannot look at {}", path.display()), &error)),
        };
        let kind = if metadata.is_dir() { FileKind::Directory } else { FileKind::File };
        Ok(Some(FileStatus {
            path: path.to_string_lossy().into_owned(),
            kind: kind as i32,
            length: if metadata.is_dir() { 0 } else { metadata.len() },
            permission: metadata.mode() & 0o7777,
            modified_ms: u64::try_from(metadata.mtime()).unwrap_or(0) * 1_000,
            ..FileStatus::default()
        }))
    });
    read.await
}

impl Prepared {
    fn new(
        fs: &FileSystem,
        target: Cluster,
        source: Source,
        options: &DistCpOptions,
        preserve: Preserve,
        target_path: &str,
    ) -> Self {
        let env = fs.env();
        let name = format!(".distcp-{}-{:04x}", env.clock.wall_ms(), env.entropy.next_u64() & 0xffff);
        let staging = join(split_last(target_path).map_or("/", |(parent, _)| parent), &name);
        let same = target.namenode() == fs.namenode_address();
        let work = if same { join(&staging, "job") } else { format!("/tmp/{name}") };
        Self {
            target,
            source,
            options: options.clone(),
            preserve,
            items: Vec::new(),
            folders: Vec::new(),
            surplus: Vec::new(),
            summary: DistCpSummary::default(),
            staging,
            work,
            job_fs: fs.clone(),
            addresses: [None, None],
        }
    }

    /// A folder cannot be copied into itself.
    fn check_apart(&self, root: &Root, into: &str) -> Result<()> {
        let Source::Cluster(source) = &self.source else { return Ok(()) };
        let from = &root.status.path;
        let below = into == from || into.starts_with(&format!("{}/", from.trim_end_matches('/')));
        if below && source.namenode() == self.target.namenode() {
            let text = format!("{from} cannot be copied into itself ({into})");
            return Err(Error::new(ErrorCode::InvalidArgument, text).with_subject(from.clone()));
        }
        Ok(())
    }

    /// Adds what is at and below a source.
    async fn list(&mut self, root: &Root, into: &str, wanted: &mut BTreeMap<String, Item>) -> Result<()> {
        let mut found = Vec::new();
        match &self.source {
            Source::Cluster(source) => {
                let mut walk = source.walk(&root.status.path).await?;
                while let Some(status) = walk.next().await? {
                    found.push(status);
                }
            }
            Source::Local(local) => found = self.local_tree(Arc::clone(local), &root.status).await?,
        }
        for status in found {
            let below = status.path.get(root.status.path.len()..).unwrap_or_default().trim_start_matches('/');
            let target = if below.is_empty() { into.to_owned() } else { join(into, below) };
            if let Err(error) = normalize(&target) {
                self.summary.fail(&status.path, error.message());
            } else if status.kind() == FileKind::Directory {
                self.folders.push((status, target));
            } else if status.open {
                self.summary.fail(&status.path, "it is still being written");
            } else if let Some(other) = wanted.get(&target) {
                let text = format!("{} and {} would both become {target}", other.source, status.path);
                return Err(Error::new(ErrorCode::InvalidArgument, text).with_subject(target));
            } else {
                let item = Item::of(&status, target.clone());
                wanted.insert(target, item);
            }
        }
        Ok(())
    }

    async fn local_tree(&self, local: Arc<dyn Fs>, root: &FileStatus) -> Result<Vec<FileStatus>> {
        let (mut found, mut folders) = (vec![root.clone()], Vec::new());
        if root.kind() == FileKind::Directory {
            folders.push(PathBuf::from(&root.path));
        }
        while let Some(folder) = folders.pop() {
            let (fs, path) = (Arc::clone(&local), folder.clone());
            let entries = self.job_fs.env().work.io(move || fs.read_dir(&path)).await;
            let entries = entries.map_err(|error| Error::io(format!("cannot list {}", folder.display()), &error))?;
            for entry in entries {
                let path = folder.join(&entry.name);
                // What is gone meanwhile, and links that lead nowhere, are passed over.
                let Some(status) = local_status(&self.job_fs, &path).await? else { continue };
                if status.kind() == FileKind::Directory {
                    folders.push(path);
                }
                found.push(status);
            }
        }
        Ok(found)
    }

    /// Compares what is wanted with what is there.
    async fn meet(&mut self, target_path: &str, mut wanted: BTreeMap<String, Item>, there: bool) -> Result<()> {
        let wanted_folders: BTreeSet<String> = self.folders.iter().map(|(_, target)| target.clone()).collect();
        let mut surplus: Vec<String> = Vec::new();
        if there {
            let mut walk = self.target.walk(target_path).await?;
            while let Some(status) = walk.next().await? {
                let is_folder = status.kind() == FileKind::Directory;
                if is_folder && wanted.remove(&status.path).is_some() {
                    self.summary.fail(&status.path, "a directory is in its place");
                } else if !is_folder && wanted_folders.contains(&status.path) {
                    let text = format!("{} is a file where a directory is to be", status.path);
                    return Err(Error::new(ErrorCode::NotADirectory, text).with_subject(status.path));
                } else if let Some(item) = wanted.get_mut(&status.path) {
                    item.existing = Some(status.length);
                } else if status.path != target_path
                    && !wanted_folders.contains(&status.path)
                    && !surplus.last().is_some_and(|above| status.path.starts_with(&format!("{above}/")))
                {
                    surplus.push(status.path);
                }
            }
        }
        if self.options.delete {
            self.surplus = surplus;
        }
        let merge = self.options.update || self.options.overwrite;
        for item in wanted.into_values() {
            if item.existing.is_some() && !merge {
                self.summary.take(Outcome::Skipped, item.length);
            } else {
                self.items.push(item);
            }
        }
        Ok(())
    }

    /// Are the sources on this machine?
    pub fn is_local(&self) -> bool {
        matches!(self.source, Source::Local(_))
    }

    /// Makes the folders of the target, and those that the copy needs.
    async fn make_folders(&mut self) -> Result<()> {
        for (_, target) in &self.folders {
            if self.target.find(target).await?.is_none() {
                self.target.mkdirs(target, 0o755).await?;
                self.summary.directories += 1;
            }
        }
        if !self.items.is_empty() {
            self.target.mkdirs(&self.staging, 0o700).await?;
        }
        Ok(())
    }

    /// The job that copies; `None`: nothing is to be copied, or it is to be copied from here.
    pub async fn spec(&mut self) -> Result<Option<JobSpec>> {
        self.make_folders().await?;
        if self.items.is_empty() || self.is_local() {
            return Ok(None);
        }
        let maps = if self.options.maps == 0 { DEFAULT_MAPS } else { self.options.maps };
        let (list, offsets) = share_out(self.items.clone(), maps);
        let path = join(&self.work, "list");
        let options = CreateOptions { create_parents: true, ..CreateOptions::default() };
        let mut writer = self.job_fs.create(&path, options).await?;
        writer.write_bytes(Bytes::from(list)).await?;
        writer.close().await?;
        let offsets: Vec<String> = offsets.iter().map(u64::to_string).collect();
        let mut spec = JobSpec::new("distcp", Vec::new(), &join(&self.work, "out"))
            .with(property::LIST, &path)
            .with(property::OFFSETS, &offsets.join(","))
            .with(property::STAGING, &self.staging)
            .with(property::PRESERVE, &self.options.preserve)
            .with(property::UPDATE, &self.options.update.to_string())
            .with(property::BANDWIDTH, &self.options.bandwidth.to_string());
        for (name, address) in [property::SOURCE, property::TARGET].into_iter().zip(&self.addresses) {
            let own = Address::Cairn(self.job_fs.namenode_address().to_owned());
            if let Some(address) = address.as_ref().filter(|address| **address != own) {
                spec = spec.with(name, &address.to_string());
            }
        }
        spec.reducers = Some(0);
        Ok(Some(spec))
    }

    /// Copies what is on this machine, several files at once.
    pub async fn copy_local(&mut self) {
        let streams = if self.options.maps == 0 { DEFAULT_LOCAL_STREAMS } else { self.options.maps };
        let options = Options {
            staging: self.staging.clone(),
            preserve: self.preserve,
            update: self.options.update,
            bandwidth: self.options.bandwidth,
        };
        let items = std::mem::take(&mut self.items);
        let queue = tokio::sync::Mutex::new(items.into_iter());
        let results = futures_util::stream::iter(0..streams.min(1_000)).map(|stream| {
            let (env, source) = (self.job_fs.env().clone(), self.source.clone());
            let (target, options) = (self.target.clone(), options.clone());
            let queue = &queue;
            async move {
                let mut copier = Copier::new(env, source, target, options, &stream.to_string());
                let mut done = Vec::new();
                loop {
                    let next = queue.lock().await.next();
                    let Some(item) = next else { return done };
                    let result = copier.copy(&item).await;
                    done.push((item, result));
                }
            }
        });
        let all: Vec<_> = results.buffer_unordered(streams as usize).collect().await;
        for (item, result) in all.into_iter().flatten() {
            match result {
                Ok(outcome) => self.summary.take(outcome, item.length),
                Err(error) => self.summary.fail(&item.target, error.message()),
            }
        }
    }

    /// After the job (`None`: there was none): deletes, gives folders their attributes, sums up.
    pub async fn finish(&mut self, report: Option<&JobReport>) -> Result<DistCpSummary> {
        if let Some(report) = report.filter(|report| report.state == JobState::Succeeded) {
            self.read_results(&report.output).await?;
        }
        let whole = report.is_none_or(|report| report.state == JobState::Succeeded) && self.summary.failed == 0;
        if whole {
            for path in std::mem::take(&mut self.surplus) {
                self.summary.deleted += u64::from(self.target.delete(&path, true).await?);
            }
        }
        // The deepest first: times of a folder change with what is put into it.
        for (status, target) in self.folders.iter().rev() {
            self.dress(status, target).await?;
        }
        Ok(self.summary.clone())
    }

    async fn dress(&self, status: &FileStatus, target: &str) -> Result<()> {
        if self.preserve.permission {
            self.target.set_permission(target, status.permission).await?;
        }
        let owner = Some(status.owner.as_str()).filter(|owner| self.preserve.user && !owner.is_empty());
        let group = Some(status.group.as_str()).filter(|group| self.preserve.group && !group.is_empty());
        if owner.is_some() || group.is_some() {
            self.target.set_owner(target, owner, group).await?;
        }
        if self.preserve.times {
            self.target.set_modified(target, status.modified_ms).await?;
        }
        Ok(())
    }

    /// The lines that the maps wrote.
    async fn read_results(&mut self, output: &str) -> Result<()> {
        for part in self.job_fs.list_all(output).await? {
            if part.length == 0 {
                continue;
            }
            let reader = self.job_fs.open(&part.path).await?;
            let bytes = reader.read_range(0, reader.length()).await?;
            for line in String::from_utf8_lossy(&bytes).lines() {
                let fields: Vec<&str> = line.splitn(4, '\t').collect();
                let [word, length, target, note] = fields[..] else {
                    return Err(Error::new(ErrorCode::Corrupt, format!("{}: a line is damaged", part.path)));
                };
                let length = length.parse().unwrap_or(0);
                match [Outcome::Copied, Outcome::Skipped].into_iter().find(|outcome| outcome.as_str() == word) {
                    Some(outcome) => self.summary.take(outcome, length),
                    None => self.summary.fail(target, note),
                }
            }
        }
        Ok(())
    }

    /// Removes what the copy needed for itself.
    pub async fn clean_up(&self) {
        let work = Cluster::Cairn(self.job_fs.clone());
        for (cluster, folder) in [(&self.target, &self.staging), (&work, &self.work)] {
            if let Err(error) = cluster.delete(folder, true).await {
                tracing::warn!(path = %folder, %error, "a folder of a copy could not be removed");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_read() {
        let cluster = |address: Option<&str>, path: &str| Place::Cluster {
            address: address.map(|address| Address::parse(address).unwrap()),
            path: path.into(),
        };
        assert_eq!(Place::parse("/a/b/").unwrap(), cluster(None, "/a/b"));
        assert_eq!(Place::parse("cairn://h:1/a").unwrap(), cluster(Some("h:1"), "/a"));
        assert_eq!(Place::parse("cairn://h:1").unwrap(), cluster(Some("h:1"), "/"));
        assert_eq!(Place::parse("hdfs://h/a b").unwrap(), cluster(Some("hdfs://h:8020"), "/a b"));
        assert_eq!(Place::parse("file:///x").unwrap(), Place::Local("/x".into()));
        for bad in ["relative", "file://x", "cairn:///a", "cairn://h/a", "hdfs:///a", "s3://bucket/x", ""] {
            assert!(Place::parse(bad).is_err(), "{bad}");
        }
    }
}

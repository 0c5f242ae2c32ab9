//! Metadata directories: what `VERSION` says, who holds the lock, and which directories make up the set.
//!
//! # A directory
//! ```text
//! <dir>/VERSION        who it belongs to (toml, replaced as a whole)
//! <dir>/in_use.lock    locked while a namenode uses the directory
//! <dir>/log/           segments of the edit log
//! <dir>/image/         images
//! ```
//! `VERSION` is written first with `state = "new"`; it becomes `"ready"` only after the first transaction is durable in
//! `log/`. So a crash while formatting leaves a directory that is formatted again, and a ready directory whose files are
//! gone is known to be damaged.
//!
//! # The set
//! `set` lists the directories (by `dir_id`) that held every durable transaction when `VERSION` was written. A directory that
//! fails is left out: the others get the smaller set and a higher epoch before anything is released, so whoever comes back
//! with a lower epoch is known to be behind, and is filled from the others. A start wants the whole set, because the
//! directory that is absent may be the only one that knows the latest transactions.
//!
//! A directory that is behind and comes back names one of today's set in its own `set`: that is how it was left out. One that
//! does not went on by itself (somebody started from it alone): then there are two futures, and a person has to choose.
//! `--accept-missing-dir` starts without what is absent and fills what is empty; the epoch then goes to the next
//! thousand, so that the future which is left behind is told apart and refused.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use cairn_common::durable::{Fs, Lock, OpenMode, make_dir, read_all, write_atomic};
use cairn_proto::ids::Epoch;
use cairn_proto::{Error, ErrorCode, Result};

/// Version of the layout of a metadata directory.
pub const LAYOUT: u32 = 1;
const KIND: &str = "namenode";
const LOCK_FILE: &str = "in_use.lock";
const VERSION_FILE: &str = "VERSION";
const MAX_VERSION_BYTES: u64 = 64 << 10;
/// Names that may lie in a directory that counts as empty.
const HARMLESS: [&str; 3] = [LOCK_FILE, "VERSION.tmp", "lost+found"];

/// How far a metadata directory got.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DirState {
    /// Being formatted, or filled from another directory: worth nothing yet.
    New,
    /// Being restored: worth nothing yet, but only another restore may go on.
    Restoring,
    /// Log or image hold the cluster.
    Ready,
}

impl DirState {
    fn name(self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Restoring => "restoring",
            Self::Ready => "ready",
        }
    }
}

/// Whether a directory that holds this counts as empty all the same.
pub fn is_harmless(name: &str) -> bool {
    HARMLESS.contains(&name)
}

/// What `VERSION` holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Version {
    /// The cluster.
    pub cluster_id: String,
    /// Its block pool.
    pub pool_id: String,
    /// Epoch of the set.
    pub epoch: Epoch,
    /// How far it got.
    pub state: DirState,
    /// Name of this directory.
    pub dir_id: String,
    /// Names of all directories of the set.
    pub set: Vec<String>,
}

impl Version {
    /// As it is stored.
    pub fn to_text(&self) -> String {
        let set: Vec<String> = self.set.iter().map(|id| format!("\"{id}\"")).collect();
        format!(
            "# Cairn metadata directory; written by the namenode, do not edit.\nkind = \"{KIND}\"\nlayout = {LAYOUT}\n\
             cluster_id = \"{}\"\npool_id = \"{}\"\nepoch = {}\nstate = \"{}\"\ndir_id = \"{}\"\nset = [{}]\n",
            self.cluster_id,
            self.pool_id,
            self.epoch,
            self.state.name(),
            self.dir_id,
            set.join(", ")
        )
    }

    /// Reads the text of the `VERSION` at `path`.
    pub fn parse(path: &Path, text: &str) -> Result<Self> {
        let bad = |what: String| {
            Error::new(ErrorCode::Corrupt, format!("{}: {what}", path.display()))
                .with_subject(path.display().to_string())
        };
        let table: toml::Table =
            toml::from_str(text).map_err(|error| bad(format!("not readable: {}", error.message())))?;
        let string = |key: &str| table.get(key).and_then(|value| value.as_str()).map(str::to_owned);
        let kind = string("kind").or_else(|| string("role")).ok_or_else(|| bad("no kind".into()))?;
        if kind != KIND {
            let text = format!("{} is the directory of a {kind}, not of a namenode", parent(path).display());
            return Err(Error::new(ErrorCode::InvalidArgument, text).with_subject(parent(path).display().to_string()));
        }
        let layout = table.get("layout").and_then(toml::Value::as_integer).ok_or_else(|| bad("no layout".into()))?;
        if layout < 1 {
            return Err(bad(format!("there is no layout {layout}")));
        }
        if layout > i64::from(LAYOUT) {
            let text = format!(
                "{} has layout version {layout}, this program knows up to {LAYOUT}: run a newer release",
                parent(path).display()
            );
            return Err(Error::new(ErrorCode::UnsupportedVersion, text));
        }
        // Ids are UUIDs; what could not be written back as it was read is no id.
        let is_id =
            |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic() && b != b'"' && b != b'\\');
        let need = |key: &str| string(key).filter(|text| is_id(text)).ok_or_else(|| bad(format!("no {key}")));
        let epoch = table.get("epoch").and_then(toml::Value::as_integer).and_then(|epoch| u64::try_from(epoch).ok());
        let set = table.get("set").and_then(toml::Value::as_array).ok_or_else(|| bad("no set".into()))?;
        Ok(Self {
            cluster_id: need("cluster_id")?,
            pool_id: need("pool_id")?,
            epoch: Epoch(epoch.ok_or_else(|| bad("no epoch".into()))?),
            state: match need("state")?.as_str() {
                "ready" => DirState::Ready,
                "new" => DirState::New,
                "restoring" => DirState::Restoring,
                other => return Err(bad(format!("unknown state \"{other}\""))),
            },
            dir_id: need("dir_id")?,
            set: set
                .iter()
                .map(|id| id.as_str().filter(|id| is_id(id)).map(str::to_owned).ok_or_else(|| bad("a bad set".into())))
                .collect::<Result<_>>()?,
        })
    }
}

fn parent(path: &Path) -> &Path {
    path.parent().unwrap_or(path)
}

/// A metadata directory that this process holds locked.
pub struct MetaDir {
    root: PathBuf,
    dir_id: String,
    _lock: Box<dyn Lock>,
}

impl std::fmt::Debug for MetaDir {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.root.fmt(f)
    }
}

impl MetaDir {
    /// The directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Folder of the log.
    pub fn log(&self) -> PathBuf {
        self.root.join("log")
    }

    /// Folder of the images.
    pub fn image(&self) -> PathBuf {
        self.root.join("image")
    }

    /// Its name in the set.
    pub fn id(&self) -> &str {
        &self.dir_id
    }

    /// Makes `VERSION` say this.
    pub fn write_version(
        &self,
        fs: &dyn Fs,
        facts: &ClusterFacts,
        state: DirState,
        set: &[String],
    ) -> std::io::Result<()> {
        let version = Version {
            cluster_id: facts.cluster_id.clone(),
            pool_id: facts.pool_id.clone(),
            epoch: facts.epoch,
            state,
            dir_id: self.dir_id.clone(),
            set: set.to_vec(),
        };
        write_atomic(fs, &self.root.join(VERSION_FILE), version.to_text().as_bytes())
    }

    /// Makes the folders and empties them.
    pub fn clear(&self, fs: &dyn Fs) -> std::io::Result<()> {
        for folder in [self.log(), self.image()] {
            if fs.metadata(&folder)?.is_some() {
                fs.remove_dir_all(&folder)?;
            }
            fs.create_dir_all(&folder)?;
            fs.sync_dir(&folder)?;
        }
        fs.sync_dir(&self.root)
    }
}

/// Who a metadata directory belongs to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ClusterFacts {
    /// The cluster.
    pub cluster_id: String,
    /// Its block pool.
    pub pool_id: String,
    /// Epoch of the set.
    pub epoch: Epoch,
}

/// What was found where the settings point.
pub struct Found {
    /// The directory, locked.
    pub dir: Arc<MetaDir>,
    /// Its `VERSION`; `None`: it is empty.
    pub version: Option<Version>,
}

impl Found {
    /// Whether it holds a cluster.
    pub fn is_ready(&self) -> bool {
        self.version.as_ref().is_some_and(|version| version.state == DirState::Ready)
    }

    /// Its epoch; 0 if it is empty.
    pub fn epoch(&self) -> Epoch {
        self.version.as_ref().map_or(Epoch(0), |version| version.epoch)
    }
}

/// The directories of a start.
pub struct DirSet {
    /// All usable ones, in the order of the settings.
    pub found: Vec<Found>,
    /// Who they belong to; `None`: all are empty, and a cluster is to be formatted.
    pub facts: Option<ClusterFacts>,
    /// Whether the set is another than the recorded one, so that the epoch has to rise.
    pub changed: bool,
    /// Whether a recorded directory is left out by order: it may know what these do not.
    pub left_out: bool,
}

/// Locks and inspects the directories at `paths`. Every refusal names the directory.
pub fn open_set(
    fs: &dyn Fs,
    paths: &[PathBuf],
    accept_missing: bool,
    new_id: &mut dyn FnMut() -> String,
) -> Result<DirSet> {
    let mut found = Vec::new();
    for path in paths {
        match open_dir(fs, path, new_id) {
            Ok(one) => found.push(one),
            // Only what a broken disk does may be passed over; a lock, another kind or another layout never.
            Err(error) if accept_missing && matches!(error.code(), ErrorCode::Io | ErrorCode::DiskFull) => {
                tracing::warn!(dir = %path.display(), %error, "metadata directory left out (--accept-missing-dir)");
            }
            Err(error) => return Err(error),
        }
    }
    if found.is_empty() {
        return Err(Error::new(ErrorCode::Io, "none of the metadata directories can be used"));
    }
    let best = found.iter().filter(|one| one.is_ready()).max_by_key(|one| one.epoch());
    let Some((best, version)) = best.and_then(|one| one.version.clone().map(|version| (one, version))) else {
        return Ok(DirSet { found, facts: None, changed: false, left_out: false });
    };
    check_same_cluster(&found, best)?;
    check_one_future(&found, best, &version)?;
    if !accept_missing {
        check_complete(&found, best, &version)?;
    }
    let is_found = |id: &String| found.iter().any(|one| one.dir.id() == id.as_str());
    let left_out = !version.set.iter().all(is_found);
    let changed = left_out || found.len() != version.set.len();
    let facts = ClusterFacts { cluster_id: version.cluster_id, pool_id: version.pool_id, epoch: version.epoch };
    Ok(DirSet { found, facts: Some(facts), changed, left_out })
}

/// Each ready directory belongs to the set of the best one, or was once together with one of that set and left behind.
fn check_one_future(found: &[Found], best: &Found, version: &Version) -> Result<()> {
    for one in found.iter().filter(|one| one.is_ready() && !version.set.iter().any(|id| id == one.dir.id())) {
        let Some(own) = &one.version else { continue };
        if own.epoch < version.epoch && own.set.iter().any(|id| version.set.contains(id)) {
            continue;
        }
        let text = format!(
            "{} (epoch {}) and {} (epoch {}) went on without each other, so each may hold what the other lacks: start with \
             the right one alone, and give the other one back emptied, with --accept-missing-dir",
            best.dir.root().display(),
            version.epoch,
            one.dir.root().display(),
            own.epoch
        );
        return Err(Error::new(ErrorCode::InvalidArgument, text).with_subject(one.dir.root().display().to_string()));
    }
    Ok(())
}

fn check_same_cluster(found: &[Found], best: &Found) -> Result<()> {
    for one in found {
        let (Some(version), Some(other)) = (&one.version, &best.version) else { continue };
        if version.cluster_id != other.cluster_id {
            let text = format!(
                "{} belongs to cluster {}, {} to {}: give directories of one cluster",
                one.dir.root().display(),
                version.cluster_id,
                best.dir.root().display(),
                other.cluster_id
            );
            return Err(Error::new(ErrorCode::WrongCluster, text).with_subject(one.dir.root().display().to_string()));
        }
    }
    Ok(())
}

fn check_complete(found: &[Found], best: &Found, version: &Version) -> Result<()> {
    if let Some(one) = found.iter().find(|one| one.version.is_none()) {
        let text = format!(
            "{} is empty while {} holds the cluster: mount the right disk, or give --accept-missing-dir once to fill it",
            one.dir.root().display(),
            best.dir.root().display()
        );
        return Err(Error::new(ErrorCode::InvalidArgument, text).with_subject(one.dir.root().display().to_string()));
    }
    let missing = version.set.iter().filter(|id| !found.iter().any(|one| one.dir.id() == id.as_str())).count();
    if missing > 0 {
        let text = format!(
            "{} was used together with {missing} more metadata director{} not given now and may be behind {}: give all \
             (--dir D,D2), or --accept-missing-dir if {} lost for good",
            best.dir.root().display(),
            if missing == 1 { "y that is" } else { "ies that are" },
            if missing == 1 { "it" } else { "them" },
            if missing == 1 { "it is" } else { "they are" },
        );
        return Err(Error::new(ErrorCode::InvalidArgument, text).with_subject(best.dir.root().display().to_string()));
    }
    Ok(())
}

fn open_dir(fs: &dyn Fs, path: &Path, new_id: &mut dyn FnMut() -> String) -> Result<Found> {
    let subject = path.display().to_string();
    let failed = |doing: &str, error: &std::io::Error| {
        Error::io(format!("cannot {doing} metadata directory {}", path.display()), error).with_subject(subject.clone())
    };
    let there = fs.metadata(path).map_err(|error| failed("look at", &error))?;
    if there.is_some_and(|there| !there.is_dir) {
        let text = format!("{} is a file, not a directory", path.display());
        return Err(Error::new(ErrorCode::InvalidArgument, text).with_subject(subject));
    }
    // Looked at before anything is changed in it: a directory of somebody else stays untouched.
    let version = read_version(fs, path)?;
    if version.is_none() {
        let entries = match there {
            Some(_) => fs.read_dir(path).map_err(|error| failed("list", &error))?,
            None => Vec::new(),
        };
        if let Some(entry) = entries.iter().find(|entry| !is_harmless(&entry.name)) {
            let text = format!(
                "{} is not empty and no metadata directory (it holds \"{}\"): give an empty or new one",
                path.display(),
                entry.name
            );
            return Err(Error::new(ErrorCode::InvalidArgument, text).with_subject(subject));
        }
        make_dir(fs, path).map_err(|error| failed("make", &error))?;
    }
    let lock = take_lock(fs, path)?;
    fs.restrict(path).map_err(|error| failed("restrict", &error))?;
    // Read again under the lock: another namenode may have formatted or changed it meanwhile.
    let version = read_version(fs, path)?;
    let dir_id = version.as_ref().map_or_else(new_id, |version| version.dir_id.clone());
    Ok(Found { dir: Arc::new(MetaDir { root: path.to_owned(), dir_id, _lock: lock }), version })
}

/// What the `VERSION` in a directory says; `None`: it has none.
pub fn read_version(fs: &dyn Fs, path: &Path) -> Result<Option<Version>> {
    let file = path.join(VERSION_FILE);
    let failed = |error: std::io::Error| {
        Error::io(format!("cannot read {}", file.display()), &error).with_subject(file.display().to_string())
    };
    if fs.metadata(&file).map_err(failed)?.is_none() {
        return Ok(None);
    }
    let bytes = read_all(fs, &file, MAX_VERSION_BYTES).map_err(failed)?;
    Version::parse(&file, &String::from_utf8_lossy(&bytes)).map(Some)
}

fn take_lock(fs: &dyn Fs, path: &Path) -> Result<Box<dyn Lock>> {
    let file = path.join(LOCK_FILE);
    let failed = |error: std::io::Error| {
        Error::io(format!("cannot lock {}", file.display()), &error).with_subject(path.display().to_string())
    };
    let Some(lock) = fs.lock(&file).map_err(failed)? else {
        let holder = read_all(fs, &file, 256).map(|bytes| String::from_utf8_lossy(&bytes).trim().to_owned());
        let holder = holder.ok().filter(|text| !text.is_empty()).unwrap_or_else(|| "another daemon".to_owned());
        let text = format!("{} is in use by {holder}: stop it first, or give another directory", path.display());
        return Err(Error::new(ErrorCode::Busy, text).with_subject(path.display().to_string()));
    };
    // Only for the message above, so not synced; a failure here costs nothing.
    let text = format!("a namenode (process {})\n", std::process::id());
    if let Ok(file) = fs.open(&file, OpenMode::WriteOrCreate) {
        let _ = file.set_len(0).and_then(|()| file.write_all_at(text.as_bytes(), 0));
    }
    Ok(lock)
}

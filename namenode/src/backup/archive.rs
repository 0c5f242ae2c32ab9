//! The archive: a copy of the log in another place, at most a second or so behind.
//!
//! ```text
//! DIR/ARCHIVE                                        whose it is (TOML)
//! DIR/edits_<first, 20 digits>_<epoch, 20 digits>.log    a whole segment
//! DIR/edits_<first>_<epoch>.open                         the one that is being written, as far as it is durable
//! ```
//!
//! # Consistency
//! Only what is durable in the metadata directories is copied. The epoch in the name (of the segment's header) keeps futures apart:
//! a restored cluster has a higher one, so it never writes into a segment of the future that was left behind. Should a segment of
//! the same name hold something else all the same (a metadata directory was put back from an old copy), archiving stops and says so.
//!
//! # Crash
//! Records are appended to the `.open` file and synced; a torn one at its end is cut when the archive goes on. When the segment
//! is closed the file is synced, renamed to `.log`, and the folder synced.
//!
//! # Failure
//! The namenode never waits for the archive. What fails is logged once, shown in the metrics and the report, and tried again
//! after 1 s, then after twice as long each time, up to a minute. If it fails for so long that the log is purged meanwhile, the
//! archive has a hole ([`super::hole`]).

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use cairn_common::Env;
use cairn_common::durable::{File, Fs, OpenMode, make_dir, read_all, write_atomic};
use cairn_common::work::OwnerHandle;
use cairn_proto::ids::{Epoch, TxId};
use cairn_proto::{Error, ErrorCode, Result, pb};
use tokio::sync::watch;

use super::hole::{self, Hole};
use crate::journal::format::{HEADER_BYTES, SegmentHeader, record_at};
use crate::journal::{JournalStatus, LogError, MAX_SEGMENT_BYTES, Segment, list_segments};

const MARKER: &str = "ARCHIVE";
const KIND: &str = "archive";
/// Names that may lie in a folder that counts as empty.
const HARMLESS: [&str; 2] = ["ARCHIVE.tmp", "lost+found"];
/// How far the archive may be behind while all goes well.
const PERIOD: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// Bytes copied at a time.
const COPY_BYTES: usize = 4 << 20;

/// How far the archive is.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ArchiveStatus {
    /// Last transaction in it; 0: none yet.
    pub archived: TxId,
    /// Why it does not get on.
    pub failure: Option<String>,
    /// What it lacks, until a backup was made that lies behind it.
    pub hole: Option<Hole>,
}

impl ArchiveStatus {
    /// Tells it in a report.
    pub fn tell(&self, report: &mut pb::ClusterReportResponse) {
        report.archived_txid = self.archived.0;
        report.archive_failure = self.failure.clone().unwrap_or_default();
        (report.archive_hole_from, report.archive_hole_to) = self.hole.map_or((0, 0), |hole| (hole.from.0, hole.to.0));
    }
}

fn archived_name(first: TxId, epoch: Epoch, suffix: &str) -> String {
    format!("edits_{:020}_{:020}.{suffix}", first.0, epoch.0)
}

fn parse_name(name: &str) -> Option<(TxId, Epoch)> {
    let stem = name.strip_suffix(".log").or_else(|| name.strip_suffix(".open"));
    let (first, epoch) = stem?.strip_prefix("edits_")?.split_once('_')?;
    let number = |digits: &str| {
        let is_number = digits.len() == 20 && digits.bytes().all(|byte| byte.is_ascii_digit());
        if is_number { digits.parse().ok() } else { None }
    };
    Some((TxId(number(first)?), Epoch(number(epoch)?)))
}

/// First transaction and epoch of a segment, by its name.
pub fn segment_of_name(path: &Path) -> Option<(TxId, Epoch)> {
    parse_name(path.file_name()?.to_str()?)
}

/// Whether this is the name of a segment that may end anywhere.
pub fn is_open_name(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "open")
}

/// The segments in an archive with their sizes, by name.
pub fn list(fs: &dyn Fs, dir: &Path) -> Result<Vec<(PathBuf, u64)>, LogError> {
    let entries = fs.read_dir(dir).map_err(LogError::io("list", dir))?;
    let ours = entries.into_iter().filter(|entry| !entry.is_dir && parse_name(&entry.name).is_some());
    Ok(ours.map(|entry| (dir.join(&entry.name), entry.len)).collect())
}

/// The cluster that an archive belongs to; `None`: it has no marker.
fn cluster_of(fs: &dyn Fs, dir: &Path) -> Result<Option<String>> {
    let marker = dir.join(MARKER);
    let failed = |error: std::io::Error| {
        Error::io(format!("cannot read {}", marker.display()), &error).with_subject(marker.display().to_string())
    };
    if fs.metadata(&marker).map_err(failed)?.is_none() {
        return Ok(None);
    }
    let bytes = read_all(fs, &marker, 64 << 10).map_err(failed)?;
    let table: Option<toml::Table> = std::str::from_utf8(&bytes).ok().and_then(|text| toml::from_str(text).ok());
    let text = |key: &str| table.as_ref().and_then(|table| table.get(key)).and_then(toml::Value::as_str);
    match (text("kind"), text("cluster_id")) {
        (Some(KIND), Some(cluster)) if !cluster.is_empty() => Ok(Some(cluster.to_owned())),
        _ => {
            let text = format!("{} is not readable: it does not say whose archive this is", marker.display());
            Err(Error::new(ErrorCode::Corrupt, text).with_subject(marker.display().to_string()))
        }
    }
}

fn other_cluster(dir: &Path, found: &str, expected: &str) -> Error {
    let text =
        format!("{} is the archive of cluster {found}, this is cluster {expected}: give another folder", dir.display());
    Error::new(ErrorCode::WrongCluster, text).with_subject(dir.display().to_string())
}

/// For a start: refuses the archive of another cluster. A folder that cannot be read is no reason not to start.
pub fn check_archive(fs: &dyn Fs, dir: &Path, cluster_id: &str) -> Result<()> {
    match cluster_of(fs, dir) {
        Ok(Some(found)) if found != cluster_id => Err(other_cluster(dir, &found, cluster_id)),
        _ => Ok(()),
    }
}

/// For a restore: it must be there, and of this cluster.
pub fn check_cluster(fs: &dyn Fs, dir: &Path, cluster_id: &str) -> Result<()> {
    match cluster_of(fs, dir)? {
        Some(found) if found == cluster_id => Ok(()),
        Some(found) => Err(other_cluster(dir, &found, cluster_id)),
        None => {
            let text = format!("{} is no archive of a log: it has no file {MARKER}", dir.display());
            Err(Error::new(ErrorCode::InvalidArgument, text).with_subject(dir.display().to_string()))
        }
    }
}

/// The segment that is being copied.
struct Cursor {
    first: TxId,
    source: PathBuf,
    target: PathBuf,
    file: Arc<dyn File>,
    /// Bytes archived, and the record that they end with.
    at: u64,
    last: TxId,
    chain: u32,
}

/// Copies; owned by its thread.
pub(crate) struct Copier {
    fs: Arc<dyn Fs>,
    dir: PathBuf,
    cluster_id: String,
    /// Whether the marker was seen or made: from then on it must be there (else the disk is not mounted).
    opened: bool,
    cursor: Option<Cursor>,
    /// Segments up to this transaction are whole in the archive.
    done: TxId,
    /// Where the log began when it was compared with the archive.
    compared: Option<TxId>,
    hole: Option<Hole>,
}

impl Copier {
    pub(crate) fn new(fs: Arc<dyn Fs>, dir: PathBuf, cluster_id: String) -> Self {
        Self { fs, dir, cluster_id, opened: false, cursor: None, done: TxId(0), compared: None, hole: None }
    }

    /// Copies what is durable in the log folder `log`; returns the last archived transaction.
    pub(crate) fn pass(&mut self, log: &Path, durable: TxId) -> Result<TxId> {
        let copied = self.open_dir().and_then(|()| self.copy(log, durable).map_err(Error::from));
        if copied.is_err() {
            // What it wrote last is not known: it is looked at again.
            self.cursor = None;
        }
        copied
    }

    fn open_dir(&mut self) -> Result<()> {
        match cluster_of(&*self.fs, &self.dir)? {
            Some(found) if found == self.cluster_id => {
                self.opened = true;
                return Ok(());
            }
            Some(found) => return Err(other_cluster(&self.dir, &found, &self.cluster_id)),
            None => {}
        }
        let shown = self.dir.display().to_string();
        let refused = |text: String| Err(Error::new(ErrorCode::Io, text).with_subject(&shown));
        if self.opened {
            return refused(format!("{shown} has lost its file {MARKER}: is the disk mounted?"));
        }
        let failed = |error: std::io::Error| {
            Error::io(format!("cannot begin an archive in {shown}"), &error).with_subject(&shown)
        };
        make_dir(&*self.fs, &self.dir).map_err(failed)?;
        let entries = self.fs.read_dir(&self.dir).map_err(failed)?;
        if let Some(entry) = entries.iter().find(|entry| !HARMLESS.contains(&entry.name.as_str())) {
            return refused(format!(
                "{shown} is not empty and no archive (it holds \"{}\"): give an empty folder",
                entry.name
            ));
        }
        let text = format!(
            "# Archive of a Cairn namenode's log; written by the namenode, do not edit.\nkind = \"{KIND}\"\nlayout = 1\ncluster_id = \"{}\"\n",
            self.cluster_id
        );
        write_atomic(&*self.fs, &self.dir.join(MARKER), text.as_bytes()).map_err(failed)?;
        tracing::info!(dir = %shown, "a new archive of the log begins");
        self.opened = true;
        Ok(())
    }

    fn copy(&mut self, log: &Path, durable: TxId) -> Result<TxId, LogError> {
        let segments = list_segments(&*self.fs, log)?;
        if let Some(first) = segments.first().filter(|first| self.compared != Some(first.first)) {
            self.compare(first)?;
        }
        for (index, segment) in segments.iter().enumerate() {
            // The next one's start tells where this one ends.
            let end = segments.get(index + 1).map(|next| TxId(next.first.0 - 1));
            if end.is_some_and(|end| end <= self.done) {
                continue;
            }
            if self.cursor.as_ref().is_none_or(|cursor| cursor.first != segment.first || cursor.source != segment.path)
            {
                self.cursor = self.begin(segment, segments.get(index + 1))?;
            }
            let Some(cursor) = &mut self.cursor else {
                // It is whole in the archive already.
                self.done = end.unwrap_or(self.done);
                continue;
            };
            cursor.advance(&*self.fs, durable)?;
            match end {
                Some(end) if cursor.last == end => {
                    self.close()?;
                    self.done = end;
                }
                _ => break,
            }
        }
        Ok(self.cursor.as_ref().map_or(self.done, |cursor| cursor.last.max(self.done)))
    }

    /// Whether the archive reaches up to where the log begins.
    fn compare(&mut self, first: &Segment) -> Result<(), LogError> {
        let epoch = self.header(first)?.epoch;
        if let Some(hole) = hole::before(&*self.fs, &self.dir, (first.first, epoch))? {
            hole::mark(&*self.fs, &self.dir, hole)?;
            tracing::error!(
                from = %hole.from, to = %hole.to,
                "the archive has a hole: these transactions were purged from the log before they could be archived; take a new \
                 backup (cairn admin backup)"
            );
        }
        self.hole = hole::holes(&*self.fs, &self.dir)?.into_iter().max_by_key(|hole| hole.to);
        self.compared = Some(first.first);
        Ok(())
    }

    /// What the archive lacks.
    pub(crate) fn hole(&self) -> Option<Hole> {
        self.hole
    }

    /// A backup was made with this image: holes before it hinder nobody.
    pub(crate) fn backed_up(&mut self, image: TxId) {
        if self.hole.is_none_or(|hole| hole.to > image) {
            return;
        }
        let unmarked = hole::holes(&*self.fs, &self.dir)
            .and_then(|holes| holes.into_iter().try_for_each(|hole| hole::unmark(&*self.fs, &self.dir, hole)));
        match unmarked {
            Ok(()) => {
                tracing::info!(%image, "a new backup lies behind the hole of the archive");
                self.hole = None;
            }
            // Tried again with the next pass.
            Err(error) => tracing::warn!(%error, "the mark of the archive's hole stays"),
        }
    }

    fn header(&self, segment: &Segment) -> Result<SegmentHeader, LogError> {
        let source = self.fs.open(&segment.path, OpenMode::Read).map_err(LogError::io("open", &segment.path))?;
        let mut head = [0; HEADER_BYTES];
        source.read_exact_at(&mut head, 0).map_err(LogError::io("read", &segment.path))?;
        SegmentHeader::decode(&head).map_err(|fault| {
            LogError::damaged(&segment.path, 0, format!("the header of the segment is not usable: {fault:?}"))
        })
    }

    /// Goes on with what the archive has of a segment; `None`: all of it.
    ///
    /// The last segment that a restore took over is shorter than the archive's, which goes on into the future that was left
    /// behind: that is all of it too, since the next one has a higher epoch.
    fn begin(&self, segment: &Segment, next: Option<&Segment>) -> Result<Option<Cursor>, LogError> {
        let header = self.header(segment)?;
        let head = header.encode();
        let parts_here = next.map(|next| self.header(next)).transpose()?.is_some_and(|next| next.epoch > header.epoch);
        let whole = self.dir.join(archived_name(header.first, header.epoch, "log"));
        if self.fs.metadata(&whole).map_err(LogError::io("look at", &whole))?.is_some() {
            let (have, ours) = (self.read(&whole)?, self.read(&segment.path)?);
            return match ours.starts_with(&have) || parts_here && have.starts_with(&ours) {
                true => Ok(None),
                false => Err(another_future(&whole)),
            };
        }
        let target = whole.with_extension("open");
        let is_open = self.fs.metadata(&target).map_err(LogError::io("look at", &target))?.is_some();
        if is_open && parts_here {
            let (have, ours) = (self.read(&target)?, self.read(&segment.path)?);
            if have.len() > ours.len() && have.starts_with(&ours) {
                return Ok(None);
            }
        }
        let mut cursor = match is_open {
            true => self.resume(segment, &header, target)?,
            false => {
                let file = self.fs.open(&target, OpenMode::Create).map_err(LogError::io("make", &target))?;
                Cursor {
                    first: header.first,
                    source: segment.path.clone(),
                    target,
                    file,
                    at: 0,
                    last: TxId(0),
                    chain: 0,
                }
            }
        };
        if cursor.at == 0 {
            cursor.file.set_len(0).map_err(LogError::io("cut", &cursor.target))?;
            cursor.file.write_all_at(&head, 0).map_err(LogError::io("write", &cursor.target))?;
            cursor.file.sync_data().map_err(LogError::io("sync", &cursor.target))?;
            self.fs.sync_dir(&self.dir).map_err(LogError::io("sync", &self.dir))?;
            (cursor.at, cursor.last, cursor.chain) = (HEADER_BYTES as u64, TxId(header.first.0 - 1), header.chain);
        }
        Ok(Some(cursor))
    }

    fn read(&self, path: &Path) -> Result<Vec<u8>, LogError> {
        read_all(&*self.fs, path, MAX_SEGMENT_BYTES).map_err(LogError::io("read", path))
    }

    /// What was archived of a segment before must be what the log says; a torn record at its end is written again.
    fn resume(&self, segment: &Segment, header: &SegmentHeader, target: PathBuf) -> Result<Cursor, LogError> {
        let (have, ours) = (self.read(&target)?, self.read(&segment.path)?);
        let file = self.fs.open(&target, OpenMode::Write).map_err(LogError::io("open", &target))?;
        let mut cursor =
            Cursor { first: header.first, source: segment.path.clone(), target, file, at: 0, last: TxId(0), chain: 0 };
        if have.len() < HEADER_BYTES || have[..HEADER_BYTES] != ours[..HEADER_BYTES] {
            // Torn when it was begun; a whole header of something else is not ours to replace.
            return if SegmentHeader::decode(&have).is_ok() { Err(another_future(&cursor.target)) } else { Ok(cursor) };
        }
        let (mut at, mut last, mut chain) = (HEADER_BYTES, TxId(header.first.0 - 1), header.chain);
        while let Some(record) = record_at(&have, at) {
            if ours.get(at..record.end) != Some(&have[at..record.end]) {
                return Err(another_future(&cursor.target));
            }
            (at, last, chain) = (record.end, record.txid, record.crc);
        }
        (cursor.at, cursor.last, cursor.chain) = (at as u64, last, chain);
        Ok(cursor)
    }

    /// The segment is whole.
    fn close(&mut self) -> Result<(), LogError> {
        let Some(cursor) = self.cursor.take() else { return Ok(()) };
        cursor.file.set_len(cursor.at).map_err(LogError::io("cut", &cursor.target))?;
        cursor.file.sync_data().map_err(LogError::io("sync", &cursor.target))?;
        let whole = cursor.target.with_extension("log");
        self.fs.rename(&cursor.target, &whole).map_err(LogError::io("name", &whole))?;
        self.fs.sync_dir(&self.dir).map_err(LogError::io("sync", &self.dir))
    }
}

fn another_future(path: &Path) -> LogError {
    LogError::OtherFuture { path: path.to_owned() }
}

impl Cursor {
    /// Appends what is durable and not archived yet.
    fn advance(&mut self, fs: &dyn Fs, durable: TxId) -> Result<(), LogError> {
        if self.last >= durable {
            return Ok(());
        }
        let source = fs.open(&self.source, OpenMode::Read).map_err(LogError::io("open", &self.source))?;
        let length = source.len().map_err(LogError::io("measure", &self.source))?;
        let mut room = COPY_BYTES;
        while self.last < durable && self.at < length {
            let mut bytes = vec![0; (length - self.at).min(room as u64) as usize];
            source.read_exact_at(&mut bytes, self.at).map_err(LogError::io("read", &self.source))?;
            let (mut end, mut last, mut chain) = (0, self.last, self.chain);
            while let Some(record) = record_at(&bytes, end).filter(|record| record.txid <= durable) {
                if record.txid != last.next() || record.previous_crc != chain {
                    let what = format!("the record does not continue transaction {last}");
                    return Err(LogError::damaged(&self.source, self.at + end as u64, what));
                }
                (end, last, chain) = (record.end, record.txid, record.crc);
            }
            if end == 0 {
                // A record larger than what was read; or none that is durable yet.
                if (bytes.len() as u64) < length - self.at && room < MAX_SEGMENT_BYTES as usize {
                    room *= 4;
                    continue;
                }
                return Ok(());
            }
            self.file.write_all_at(&bytes[..end], self.at).map_err(LogError::io("write", &self.target))?;
            self.file.sync_data().map_err(LogError::io("sync", &self.target))?;
            (self.at, self.last, self.chain) = (self.at + end as u64, last, chain);
        }
        Ok(())
    }
}

/// Handle of the archive's thread.
pub struct Archiver {
    stop: watch::Sender<bool>,
    status: watch::Receiver<ArchiveStatus>,
    backed_up: watch::Sender<TxId>,
    thread: OwnerHandle,
}

impl Archiver {
    /// Starts the thread, which copies the log that `journal` tells of into `dir`.
    pub fn start(
        env: &Env,
        journal: watch::Receiver<JournalStatus>,
        dir: PathBuf,
        cluster_id: String,
    ) -> std::io::Result<Self> {
        let (stop, stopped) = watch::channel(false);
        let (publish, status) = watch::channel(ArchiveStatus::default());
        let (backed_up, backups) = watch::channel(TxId(0));
        let copier = Copier::new(Arc::clone(&env.fs), dir, cluster_id);
        let clock = env.clock.clone();
        let thread = env.work.owner("nn-archive", move || run(copier, journal, clock, stopped, (backups, publish)))?;
        Ok(Self { stop, status, backed_up, thread })
    }

    /// How far it is.
    pub fn status(&self) -> watch::Receiver<ArchiveStatus> {
        self.status.clone()
    }

    /// Where to tell the image of a backup that was made.
    pub fn backups(&self) -> watch::Sender<TxId> {
        self.backed_up.clone()
    }

    /// Copies what is left, once, and ends. To be called when the log is closed.
    pub async fn close(self) {
        self.stop.send_replace(true);
        self.thread.join().await;
    }
}

async fn run(
    mut copier: Copier,
    journal: watch::Receiver<JournalStatus>,
    clock: cairn_common::clock::Clock,
    mut stopped: watch::Receiver<bool>,
    (backups, publish): (watch::Receiver<TxId>, watch::Sender<ArchiveStatus>),
) {
    // The log folders of the set, also after the journal has let them go.
    let mut logs: Vec<PathBuf> = Vec::new();
    let mut pause = PERIOD;
    loop {
        let last_time = *stopped.borrow_and_update();
        let durable = {
            let status = journal.borrow();
            if !status.dirs.is_empty() {
                logs = status.dirs.iter().map(|dir| dir.log()).collect();
            }
            status.durable
        };
        let copied = logs.first().map_or(Ok(TxId(0)), |log| copier.pass(log, durable));
        copier.backed_up(*backups.borrow());
        pause = tell((copied, copier.hole()), pause, &publish);
        if last_time {
            return;
        }
        tokio::select! { biased;
            // An error means that the handle was dropped: then nobody waits for a last copy.
            changed = stopped.changed() => if changed.is_err() { return },
            () = clock.sleep(pause) => {}
        }
    }
}

/// Publishes how it went; returns the pause before the next time.
fn tell(
    (copied, hole): (Result<TxId>, Option<Hole>),
    pause: Duration,
    publish: &watch::Sender<ArchiveStatus>,
) -> Duration {
    let before = publish.borrow().failure.clone();
    match copied {
        Ok(archived) => {
            if before.is_some() {
                tracing::info!(%archived, "the archive of the log goes on");
            }
            publish.send_modify(|status| *status = ArchiveStatus { archived, failure: None, hole });
            PERIOD
        }
        Err(error) => {
            let text = error.message().to_owned();
            if before.as_ref() != Some(&text) {
                tracing::error!(%error, "the log cannot be archived; the namenode goes on without");
            }
            publish.send_modify(|status| (status.failure, status.hole) = (Some(text), hole));
            (pause * 2).min(LONGEST_PAUSE)
        }
    }
}

//! Appends to the log in all directories of the set, and drops the ones that fail.
//!
//! # Crash
//! [`LogWriter::flush`] returns only when the batch is durable in every directory that is left, and, if one was dropped,
//! when the others know that they are fewer (a smaller set and a higher epoch in their `VERSION`). A sync that failed is
//! never tried again: the kernel may have thrown the pages away, and a second sync would report success for nothing.
//! A segment whose name is gone (the folder was removed or replaced) would still take writes and syncs, and lose them all
//! with the process: so its name is looked at after each sync, before anything counts as durable.

use std::path::PathBuf;
use std::sync::Arc;

use cairn_common::durable::{File, Fs, OpenMode};
use cairn_common::work::Work;
use cairn_proto::ids::{Epoch, TxId};
use prost::Message;

use super::dirs::{ClusterFacts, DirState, MetaDir};
use super::error::LogError;
use super::format::{HEADER_BYTES, MAX_PAYLOAD_BYTES, SegmentHeader, encode_record, segment_name};
use super::reader::list_segments;

/// Sizes of the log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LogSizes {
    /// A segment that has grown beyond this is followed by a new one.
    pub segment_bytes: u64,
    /// Room written ahead at a time.
    pub step_bytes: u64,
}

struct Target {
    dir: Arc<MetaDir>,
    path: PathBuf,
    file: Arc<dyn File>,
}

impl Target {
    /// Whether what was synced can be found again: the file has its name still, and at least the bytes before `length`.
    fn check_name(&self, fs: &dyn Fs, length: u64) -> Result<(), LogError> {
        let found = fs.metadata(&self.path).map_err(LogError::io("look at", &self.path))?;
        if found.is_some_and(|found| !found.is_dir && found.len >= length) {
            return Ok(());
        }
        let gone = std::io::Error::new(std::io::ErrorKind::NotFound, "it was removed or replaced while in use");
        Err(LogError::Io { doing: "find", path: self.path.clone(), source: gone })
    }
}

/// The open end of the log; see the module.
pub struct LogWriter {
    fs: Arc<dyn Fs>,
    work: Work,
    sizes: LogSizes,
    facts: ClusterFacts,
    targets: Vec<Target>,
    /// End of the records, and of the zeros behind them, in the current segment.
    at: u64,
    ahead: u64,
    /// First transaction of the current segment.
    first: TxId,
    /// Last transaction in the buffer or the file.
    last: TxId,
    durable: TxId,
    chain: u32,
    buffer: Vec<u8>,
}

impl LogWriter {
    /// Starts a new segment behind transaction `last`, whose record has the CRC `chain`, in all of `dirs`.
    pub fn create(
        fs: Arc<dyn Fs>,
        dirs: Vec<Arc<MetaDir>>,
        facts: ClusterFacts,
        sizes: LogSizes,
        (last, chain): (TxId, u32),
    ) -> Result<Self, LogError> {
        let mut writer = Self {
            fs,
            work: Work::inline(),
            sizes,
            facts,
            targets: Vec::new(),
            at: 0,
            ahead: 0,
            first: last.next(),
            last,
            durable: last,
            chain,
            buffer: Vec::new(),
        };
        writer.open_segment(dirs)?;
        Ok(writer)
    }

    /// From now on several directories are written and synced at the same time, as `work` does it.
    pub fn sync_together(&mut self, work: Work) {
        self.work = work;
    }

    /// The last durable transaction.
    pub fn durable(&self) -> TxId {
        self.durable
    }

    /// Epoch of the set.
    pub fn epoch(&self) -> Epoch {
        self.facts.epoch
    }

    /// Directories of the set.
    pub fn dirs(&self) -> Vec<Arc<MetaDir>> {
        self.targets.iter().map(|target| Arc::clone(&target.dir)).collect()
    }

    /// Bytes waiting for [`Self::flush`].
    pub fn buffered(&self) -> usize {
        self.buffer.len()
    }

    /// Takes one transaction; it is durable after the next [`Self::flush`]. Transactions come gapless.
    pub fn append(&mut self, txid: TxId, edit: &impl Message) -> Result<(), LogError> {
        debug_assert_eq!(txid, self.last.next(), "transactions come gapless");
        let numbers = (txid, self.facts.epoch, self.durable);
        let encoded = encode_record(&mut self.buffer, numbers, self.chain, |out| {
            out.reserve(edit.encoded_len());
            // A vector grows, so there is always room.
            let _ = edit.encode(out);
        });
        match encoded {
            Ok(crc) => {
                self.chain = crc;
                self.last = txid;
                Ok(())
            }
            Err(bytes) => Err(LogError::TooLarge { txid: txid.0, bytes, limit: MAX_PAYLOAD_BYTES }),
        }
    }

    /// Writes what was appended and makes it durable everywhere with one sync each. Returns the last durable transaction.
    pub fn flush(&mut self) -> Result<TxId, LogError> {
        if self.buffer.is_empty() {
            return Ok(self.durable);
        }
        let batch = std::mem::take(&mut self.buffer);
        let end = self.at + batch.len() as u64;
        // Zeros come after the batch: should the disk fill up in between, the batch is what got the room.
        let ahead = if end > self.ahead { end + self.sizes.step_bytes } else { self.ahead };
        let zeros = vec![0; (ahead - end.max(self.ahead)) as usize];
        let (at, zeros_at) = (self.at, end.max(self.ahead));
        self.on_all(|fs, target| {
            target.file.write_all_at(&batch, at).map_err(LogError::io("write", &target.path))?;
            if !zeros.is_empty() {
                // Only speed depends on the zeros, so a disk too full for them is no reason to fail.
                let _ = target.file.write_all_at(&zeros, zeros_at);
            }
            target.file.sync_data().map_err(LogError::io("sync", &target.path))?;
            target.check_name(fs, end)
        })?;
        self.at = end;
        self.ahead = ahead;
        self.durable = self.last;
        self.buffer = batch;
        self.buffer.clear();
        if self.at >= self.sizes.segment_bytes {
            self.roll()?;
        }
        Ok(self.durable)
    }

    /// Ends the current segment and starts the next one; nothing happens if the current one is empty.
    pub fn roll(&mut self) -> Result<(), LogError> {
        self.flush()?;
        if self.first > self.last {
            return Ok(());
        }
        self.seal()?;
        self.first = self.last.next();
        let dirs = self.dirs();
        self.targets.clear();
        self.open_segment(dirs)
    }

    /// Cuts the zeros off, so that the segment ends with its last record.
    fn seal(&mut self) -> Result<(), LogError> {
        let at = self.at;
        self.on_all(|_, target| {
            target.file.set_len(at).map_err(LogError::io("cut", &target.path))?;
            target.file.sync_data().map_err(LogError::io("sync", &target.path))
        })
    }

    /// An orderly end: everything durable, no zeros left.
    pub fn close(mut self) -> Result<TxId, LogError> {
        let durable = self.flush()?;
        self.seal()?;
        Ok(durable)
    }

    /// Removes segments that hold nothing after `not_after`. A failure leaves files behind and is only reported.
    pub fn purge(&mut self, not_after: TxId) {
        for target in &self.targets {
            if let Err(error) = purge_dir(&*self.fs, &target.dir, not_after) {
                tracing::warn!(%error, "old log segments stay");
            }
        }
    }

    fn open_segment(&mut self, dirs: Vec<Arc<MetaDir>>) -> Result<(), LogError> {
        let header = SegmentHeader {
            first: self.first,
            epoch: self.facts.epoch,
            chain: self.chain,
            cluster_id: self.facts.cluster_id.clone(),
        };
        let mut bytes = header.encode().to_vec();
        bytes.resize(HEADER_BYTES + self.sizes.step_bytes as usize, 0);
        let (fs, total, mut last_error) = (Arc::clone(&self.fs), dirs.len(), None);
        for dir in dirs {
            match make_segment(&*fs, &dir, self.first, &bytes) {
                Ok((path, file)) => self.targets.push(Target { dir, path, file }),
                Err(error) => {
                    tracing::error!(%error, "metadata directory dropped");
                    last_error = Some(error);
                }
            }
        }
        self.at = HEADER_BYTES as u64;
        self.ahead = bytes.len() as u64;
        if self.targets.len() < total {
            self.shrink(last_error)?;
        }
        Ok(())
    }

    /// Does `op` in each directory, in all at the same time; those where it fails leave the set.
    fn on_all(&mut self, op: impl Fn(&dyn Fs, &Target) -> Result<(), LogError> + Sync) -> Result<(), LogError> {
        let (fs, total) = (&*self.fs, self.targets.len());
        let outcomes = self.work.each(self.targets.iter().collect(), |target: &Target| op(fs, target));
        let mut outcomes = outcomes.into_iter();
        let mut last_error = None;
        self.targets.retain(|target| match outcomes.next() {
            Some(Err(error)) => {
                tracing::error!(dir = %target.dir.root().display(), %error, "metadata directory dropped");
                last_error = Some(error);
                false
            }
            _ => true,
        });
        if self.targets.len() < total { self.shrink(last_error) } else { Ok(()) }
    }

    /// Leaves out a directory in which something else failed (an image could not be written); the last one stays.
    pub fn drop_dir(&mut self, dir_id: &str) -> Result<(), LogError> {
        let is_it = |target: &Target| target.dir.id() == dir_id;
        if self.targets.len() < 2 || !self.targets.iter().any(is_it) {
            return Ok(());
        }
        // What waits was promised to all of them.
        self.flush()?;
        if self.targets.len() < 2 || !self.targets.iter().any(is_it) {
            return Ok(());
        }
        self.targets.retain(|target| !is_it(target));
        self.shrink(None)
    }

    /// Makes the smaller set and a new epoch durable in the directories that are left, until that works in all of them.
    fn shrink(&mut self, mut last_error: Option<LogError>) -> Result<(), LogError> {
        loop {
            if self.targets.is_empty() {
                let none = std::io::Error::other("there was none");
                let error = last_error.unwrap_or(LogError::Io { doing: "use", path: PathBuf::new(), source: none });
                return Err(LogError::NoneLeft(Box::new(error)));
            }
            self.facts.epoch = self.facts.epoch.next();
            let set: Vec<String> = self.targets.iter().map(|target| target.dir.id().to_owned()).collect();
            let total = self.targets.len();
            let (fs, facts) = (&*self.fs, &self.facts);
            self.targets.retain(|target| match target.dir.write_version(fs, facts, DirState::Ready, &set) {
                Ok(()) => true,
                Err(source) => {
                    let path = target.dir.root().join("VERSION");
                    tracing::error!(dir = %target.dir.root().display(), error = %source, "metadata directory dropped");
                    last_error = Some(LogError::Io { doing: "write", path, source });
                    false
                }
            });
            if self.targets.len() == total {
                tracing::warn!(directories = total, epoch = %self.facts.epoch, "the log goes on in fewer directories");
                return Ok(());
            }
        }
    }
}

fn make_segment(fs: &dyn Fs, dir: &MetaDir, first: TxId, bytes: &[u8]) -> Result<(PathBuf, Arc<dyn File>), LogError> {
    let folder = dir.log();
    let path = folder.join(segment_name(first));
    let aside = folder.join("next.tmp");
    if fs.metadata(&aside).map_err(LogError::io("look at", &aside))?.is_some() {
        fs.remove_file(&aside).map_err(LogError::io("remove", &aside))?;
    }
    let file = fs.open(&aside, OpenMode::Create).map_err(LogError::io("make", &aside))?;
    file.write_all_at(bytes, 0).map_err(LogError::io("write", &aside))?;
    file.sync_data().map_err(LogError::io("sync", &aside))?;
    fs.rename(&aside, &path).map_err(LogError::io("name", &path))?;
    fs.sync_dir(&folder).map_err(LogError::io("sync", &folder))?;
    Ok((path, file))
}

fn purge_dir(fs: &dyn Fs, dir: &MetaDir, not_after: TxId) -> Result<(), LogError> {
    let folder = dir.log();
    let segments = list_segments(fs, &folder)?;
    let mut removed = 0;
    for pair in segments.windows(2) {
        // The next one's start tells where this one ends; oldest first, so a crash in between leaves no gap.
        if pair[1].first > not_after.next() {
            break;
        }
        fs.remove_file(&pair[0].path).map_err(LogError::io("remove", &pair[0].path))?;
        removed += 1;
    }
    if removed > 0 {
        fs.sync_dir(&folder).map_err(LogError::io("sync", &folder))?;
    }
    Ok(())
}

//! Writes an image into all metadata directories, aside, and puts it in force only when it reads back.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use cairn_common::durable::{File, Fs, OpenMode};
use cairn_proto::ids::TxId;

use super::format::{ImageHeader, MAX_PAGE_BYTES, Section, TRAILER_BYTES, Trailer, image_name, page_digest};
use super::read::{list_images, read_image, remove_leftovers};
use crate::journal::{LogError, MetaDir};

/// Images that are kept.
const KEEP: usize = 2;
/// Bytes gathered before they are written.
const WRITE_BYTES: usize = 1 << 20;

struct Target {
    dir_id: String,
    folder: PathBuf,
    aside: PathBuf,
    file: Arc<dyn File>,
}

/// An image that is being written.
pub struct ImageWriter {
    fs: Arc<dyn Fs>,
    header: ImageHeader,
    level: i32,
    targets: Vec<Target>,
    at: u64,
    buffer: Vec<u8>,
    crc: u32,
    pages: u64,
    digest: u64,
    /// Directories in which it could not be written.
    failed: Vec<String>,
}

/// A finished image.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Written {
    /// The transaction whose state it is.
    pub txid: TxId,
    /// Bytes of the file.
    pub bytes: u64,
    /// Pages in it.
    pub pages: u64,
    /// Log up to here is needed by no image that is kept; 0 while only one is.
    pub purge: TxId,
    /// Names of directories in which the image could not be written: they do not hold everything any more.
    pub failed: Vec<String>,
}

impl ImageWriter {
    /// Starts an image in each of `dirs`.
    pub fn create(fs: Arc<dyn Fs>, dirs: &[Arc<MetaDir>], header: ImageHeader, level: i32) -> Result<Self, LogError> {
        let buffer = header.encode().to_vec();
        let mut writer = Self {
            fs,
            header,
            level,
            targets: Vec::new(),
            at: 0,
            buffer,
            crc: 0,
            pages: 0,
            digest: 0,
            failed: Vec::new(),
        };
        let mut last_error = None;
        for dir in dirs {
            match writer.open_target(dir) {
                Ok(target) => writer.targets.push(target),
                Err(error) => {
                    writer.failed.push(dir.id().to_owned());
                    last_error = Some(error);
                }
            }
        }
        writer.check_targets(last_error)?;
        Ok(writer)
    }

    fn open_target(&self, dir: &MetaDir) -> Result<Target, LogError> {
        let folder = dir.image();
        remove_leftovers(&*self.fs, &folder)?;
        let aside = folder.join(image_name(self.header.txid)).with_extension("tmp");
        let file = self.fs.open(&aside, OpenMode::Create).map_err(LogError::io("make", &aside))?;
        Ok(Target { dir_id: dir.id().to_owned(), folder, aside, file })
    }

    /// Goes on in the directories that are left; with none there is no image.
    fn check_targets(&self, last_error: Option<LogError>) -> Result<(), LogError> {
        match last_error {
            Some(error) if self.targets.is_empty() => Err(error),
            Some(error) => {
                tracing::error!(%error, "an image cannot be written into one of the metadata directories");
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// Does `op` in each directory; those where it fails get no image.
    fn on_all(&mut self, mut op: impl FnMut(&Self, &Target) -> Result<(), LogError>) -> Result<(), LogError> {
        let mut last_error = None;
        for target in std::mem::take(&mut self.targets) {
            match op(self, &target) {
                Ok(()) => self.targets.push(target),
                Err(error) => {
                    // The next start removes what stays.
                    let _ = self.fs.remove_file(&target.aside);
                    self.failed.push(target.dir_id);
                    last_error = Some(error);
                }
            }
        }
        self.check_targets(last_error)
    }

    /// Adds a page.
    pub fn page(&mut self, page: &[u8]) -> Result<(), LogError> {
        let path = self.targets.first().map(|target| target.aside.clone()).unwrap_or_default();
        if page.len() > MAX_PAGE_BYTES {
            return Err(LogError::TooLarge { txid: self.header.txid.0, bytes: page.len(), limit: MAX_PAGE_BYTES });
        }
        let stored = zstd::bulk::compress(page, self.level).map_err(LogError::io("compress a page of", &path))?;
        self.buffer.extend_from_slice(&Section::of(self.pages, page.len(), &stored).encode());
        self.buffer.extend_from_slice(&stored);
        self.pages += 1;
        self.digest = self.digest.wrapping_add(page_digest(page));
        if self.buffer.len() >= WRITE_BYTES { self.write_out() } else { Ok(()) }
    }

    fn write_out(&mut self) -> Result<(), LogError> {
        self.crc = crc32c::crc32c_append(self.crc, &self.buffer);
        let (at, bytes) = (self.at, std::mem::take(&mut self.buffer));
        self.on_all(|_, target| {
            target.file.write_all_at(&bytes, at).map_err(LogError::io("write", &target.aside))?;
            // So the sync at the end does not have to wait for all of it.
            target.file.start_write_back(at, bytes.len() as u64);
            Ok(())
        })?;
        self.at += bytes.len() as u64;
        self.buffer = bytes;
        self.buffer.clear();
        Ok(())
    }

    /// Ends the image: synced, named, read back, and older ones beyond the two newest removed.
    pub fn finish(mut self) -> Result<Written, LogError> {
        self.write_out()?;
        let bytes = self.at + TRAILER_BYTES as u64;
        let trailer = Trailer { pages: self.pages, digest: self.digest, txid: self.header.txid, file_bytes: bytes };
        self.buffer = trailer.encode(self.crc).to_vec();
        self.write_out()?;
        self.on_all(|_, target| target.file.sync_data().map_err(LogError::io("sync", &target.aside)))?;
        let mut purge = self.header.txid;
        self.on_all(|writer, target| {
            let path = target.folder.join(image_name(writer.header.txid));
            writer.fs.rename(&target.aside, &path).map_err(LogError::io("name", &path))?;
            writer.fs.sync_dir(&target.folder).map_err(LogError::io("sync", &target.folder))?;
            if let Err(error) = writer.verify(&path) {
                // An image that does not read back must not push out one that does.
                let _ = writer.fs.remove_file(&path);
                return Err(error);
            }
            purge = purge.min(writer.remove_old(&target.folder)?);
            Ok(())
        })?;
        let failed = std::mem::take(&mut self.failed);
        Ok(Written { txid: self.header.txid, bytes, pages: self.pages, purge, failed })
    }

    fn verify(&self, path: &Path) -> Result<(), LogError> {
        let facts = read_image(&*self.fs, path, &self.header.cluster_id, |_| Ok(()))?;
        if facts.digest != self.digest || facts.pages != self.pages || facts.header != self.header {
            return Err(LogError::damaged_image(path, 0, "the image does not read back as it was written"));
        }
        Ok(())
    }

    /// Keeps the newest images; returns the transaction of the oldest one kept (0 while there is only one).
    fn remove_old(&self, folder: &Path) -> Result<TxId, LogError> {
        let images = list_images(&*self.fs, folder)?;
        for old in images.iter().skip(KEEP) {
            self.fs.remove_file(&old.path).map_err(LogError::io("remove", &old.path))?;
        }
        Ok(images.get(KEEP - 1).map_or(TxId(0), |image| image.txid))
    }

    /// Gives up and removes what was written.
    pub fn abort(self) {
        for target in &self.targets {
            // The next checkpoint or start removes what stays.
            let _ = self.fs.remove_file(&target.aside);
        }
    }
}

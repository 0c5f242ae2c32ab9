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
}

/// A finished image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Written {
    /// The transaction whose state it is.
    pub txid: TxId,
    /// Bytes of the file.
    pub bytes: u64,
    /// Pages in it.
    pub pages: u64,
    /// Log up to here is needed by no image that is kept; 0 while only one is.
    pub purge: TxId,
}

impl ImageWriter {
    /// Starts an image in each of `dirs`.
    pub fn create(fs: Arc<dyn Fs>, dirs: &[Arc<MetaDir>], header: ImageHeader, level: i32) -> Result<Self, LogError> {
        let mut targets = Vec::new();
        for dir in dirs {
            let folder = dir.image();
            remove_leftovers(&*fs, &folder)?;
            let aside = folder.join(image_name(header.txid)).with_extension("tmp");
            let file = fs.open(&aside, OpenMode::Create).map_err(LogError::io("make", &aside))?;
            targets.push(Target { folder, aside, file });
        }
        let buffer = header.encode().to_vec();
        Ok(Self { fs, header, level, targets, at: 0, buffer, crc: 0, pages: 0, digest: 0 })
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
        for target in &self.targets {
            target.file.write_all_at(&self.buffer, self.at).map_err(LogError::io("write", &target.aside))?;
            // So the sync at the end does not have to wait for all of it.
            target.file.start_write_back(self.at, self.buffer.len() as u64);
        }
        self.at += self.buffer.len() as u64;
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
        for target in &self.targets {
            target.file.sync_data().map_err(LogError::io("sync", &target.aside))?;
        }
        let mut purge = self.header.txid;
        for target in &self.targets {
            let path = target.folder.join(image_name(self.header.txid));
            self.fs.rename(&target.aside, &path).map_err(LogError::io("name", &path))?;
            self.fs.sync_dir(&target.folder).map_err(LogError::io("sync", &target.folder))?;
            if let Err(error) = self.verify(&path) {
                // An image that does not read back must not push out one that does.
                let _ = self.fs.remove_file(&path);
                return Err(error);
            }
            purge = purge.min(self.remove_old(&target.folder)?);
        }
        Ok(Written { txid: self.header.txid, bytes, pages: self.pages, purge })
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

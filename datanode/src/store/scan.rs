//! Reading block files: the recovery scan at start, the opening of a finalized file, the walk over frames.
//!
//! All of it is blocking and runs off the async threads.
//!
//! # Faults
//! A file that the disk does not give at a start is set aside, reported as corrupt and named in the log; several, or a folder that cannot be listed
//! or changed, take the volume out of service.
//!
//! # Crash
//! A scan sees what the caches hold. What a killed process had renamed and not synced would be reported as final and then be lost with the power,
//! so a scan ends with a sync of the whole volume.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use cairn_common::durable::{self, File, Fs, OpenMode};
use cairn_proto::blockfile::{self, BlockFileError, BlockIndex, FOOTER_BYTES, Footer, HEADER_BYTES, MAX_HEADER_BYTES};
use cairn_proto::frame::{FRAME_HEADER_BYTES, FrameError, FrameHeader};
use cairn_proto::ids::{BlockId, Generation};
use cairn_proto::{Error, ErrorCode, Result};

use super::map::{Entry, Kind};
use super::volume::Volume;

/// How much of each frame the walk looks at.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Depth {
    /// Its header.
    Headers,
    /// The stored bytes too.
    Stored,
    /// The data after decompression too.
    Data,
}

/// What a walk over frames found.
pub struct Walk {
    /// The whole, valid frames from the start.
    pub index: BlockIndex,
    /// Why it ended before `end` or `stop_at`.
    pub flaw: Option<FrameError>,
}

/// A walk over all of a finalized file that can pause.
pub struct Check {
    block: BlockId,
    opened: Opened,
    index: BlockIndex,
    payload: Vec<u8>,
}

/// Why a finalized replica is not what it should be, or could not be looked at.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// It could not be opened.
    #[error("{0}")]
    Open(#[from] OpenError),
    /// It could not be read.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// A frame does not verify.
    #[error("the frame at {at} of the block: {flaw}")]
    Frame {
        /// Offset of its data in the block.
        at: u64,
        /// What is wrong with it.
        flaw: FrameError,
    },
    /// All verifies, but not together.
    #[error("its index or footer does not agree with its frames")]
    Index,
}

impl CheckError {
    /// The machine's error, if it says nothing about the replica; a file that ends early does.
    pub fn machine(&self) -> Option<&io::Error> {
        match self {
            Self::Open(OpenError::Io(error)) | Self::Io(error) if error.kind() != io::ErrorKind::UnexpectedEof => {
                Some(error)
            }
            _ => None,
        }
    }
}

impl Check {
    /// Opens the file; checks header, footer and index.
    pub fn begin(fs: &dyn Fs, path: &Path, block: BlockId, length: u64) -> Result<Self, CheckError> {
        let opened = open_finalized(fs, path, block, length)?;
        let index = BlockIndex::new(opened.header_bytes);
        Ok(Self { block, opened, index, payload: Vec::new() })
    }

    /// Bytes of the file.
    pub fn stored(&self) -> u64 {
        self.opened.stored
    }

    /// Bytes of the file that were checked.
    pub fn position(&self) -> u64 {
        self.index.frames_end()
    }

    /// Checks frames until `bytes` more of the file were read; `true` at the end. What failed with the machine's error may be tried again.
    pub fn step(&mut self, bytes: u64) -> Result<bool, CheckError> {
        let (end, from) = (self.opened.index.frames_end(), self.index.frames_end());
        while self.index.frames_end() < end && self.index.frames_end() - from < bytes {
            let (file, at) = (&*self.opened.file, self.index.data_length());
            match next_frame(file, self.block, &self.index, end, Depth::Data, &mut self.payload)? {
                Ok(header) => self.index.push(&header),
                Err(flaw) => return Err(CheckError::Frame { at, flaw }),
            }
        }
        if self.index.frames_end() < end {
            return Ok(false);
        }
        if self.index == self.opened.index { Ok(true) } else { Err(CheckError::Index) }
    }
}

/// Walks from the first frame at `from` until the file offset `end`, or until `stop_at` bytes of data.
pub fn walk(file: &dyn File, block: BlockId, from: u64, end: u64, stop_at: u64, depth: Depth) -> io::Result<Walk> {
    let mut index = BlockIndex::new(from);
    let mut payload = Vec::new();
    while index.frames_end() < end && index.data_length() < stop_at {
        match next_frame(file, block, &index, end, depth, &mut payload)? {
            Ok(header) => index.push(&header),
            Err(flaw) => return Ok(Walk { index, flaw: Some(flaw) }),
        }
    }
    Ok(Walk { index, flaw: None })
}

fn next_frame(
    file: &dyn File,
    block: BlockId,
    index: &BlockIndex,
    end: u64,
    depth: Depth,
    payload: &mut Vec<u8>,
) -> io::Result<Result<FrameHeader, FrameError>> {
    let (at, left) = (index.frames_end(), end - index.frames_end());
    if left < FRAME_HEADER_BYTES as u64 {
        return Ok(Err(FrameError::Cut { have: left as usize, need: FRAME_HEADER_BYTES }));
    }
    let mut bytes = [0; FRAME_HEADER_BYTES];
    file.read_exact_at(&mut bytes, at)?;
    let header = match FrameHeader::decode(block, &bytes) {
        Ok(header) => header,
        Err(flaw) => return Ok(Err(flaw)),
    };
    if header.offset != index.data_length() {
        return Ok(Err(FrameError::OutOfRange("offset")));
    }
    if left < header.frame_bytes() as u64 {
        return Ok(Err(FrameError::Cut { have: left as usize, need: header.frame_bytes() }));
    }
    if depth == Depth::Headers {
        return Ok(Ok(header));
    }
    payload.resize(header.stored_len as usize, 0);
    file.read_exact_at(payload, at + FRAME_HEADER_BYTES as u64)?;
    if let Err(flaw) = header.verify_stored(payload) {
        return Ok(Err(flaw));
    }
    if depth == Depth::Data {
        let taken = std::mem::take(payload);
        if let Err(flaw) = header.open(Bytes::from(taken)) {
            return Ok(Err(flaw));
        }
    }
    Ok(Ok(header))
}

/// An opened finalized file whose header, footer and index verified.
pub struct Opened {
    /// The file, for reading.
    pub file: Arc<dyn File>,
    /// Its index.
    pub index: BlockIndex,
    /// Offset of its first frame.
    pub header_bytes: u64,
    /// Bytes on disk.
    pub stored: u64,
}

/// Why a finalized file could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The machine's fault; says nothing about the replica.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The file is not what its name says.
    #[error("{0}")]
    Damaged(#[from] BlockFileError),
    /// Footer and name disagree.
    #[error("its footer says {footer} bytes, its name says {name}")]
    Length {
        /// By the footer.
        footer: u64,
        /// By the name.
        name: u64,
    },
}

/// Opens and verifies header, footer and index of a finalized file.
pub fn open_finalized(fs: &dyn Fs, path: &Path, block: BlockId, length: u64) -> Result<Opened, OpenError> {
    let file = fs.open(path, OpenMode::Read)?;
    let stored = file.len()?;
    let header_bytes = read_header(&*file, block, stored)?;
    let tail = stored.checked_sub(FOOTER_BYTES as u64).ok_or(BlockFileError::Cut {
        part: "footer",
        have: stored,
        need: FOOTER_BYTES as u64,
    })?;
    let mut bytes = [0; FOOTER_BYTES];
    file.read_exact_at(&mut bytes, tail)?;
    let footer = Footer::decode(block, &bytes, stored)?;
    if footer.data_length() != length {
        return Err(OpenError::Length { footer: footer.data_length(), name: length });
    }
    let mut bytes = vec![0; footer.index_bytes()];
    file.read_exact_at(&mut bytes, footer.index_offset())?;
    let index = footer.decode_index(&bytes)?;
    Ok(Opened { file, index, header_bytes, stored })
}

fn read_header(file: &dyn File, block: BlockId, stored: u64) -> Result<u64, OpenError> {
    let mut bytes = vec![0; stored.min(MAX_HEADER_BYTES as u64) as usize];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(blockfile::decode_header(block, &bytes)?)
}

/// What a volume held at start.
#[derive(Default)]
pub struct Found {
    /// Replicas, at most one per block.
    pub replicas: std::collections::BTreeMap<i64, Entry>,
    /// Warnings, already logged; counted for metrics.
    pub set_aside: u64,
    /// Files that a better one on the volume takes the place of. They go when that one is durable: until then they may be all there is.
    obsolete: Vec<PathBuf>,
}

impl Found {
    fn obsolete(&mut self, block: BlockId, path: PathBuf) {
        tracing::warn!("{} is older than another replica of block {block} here; it is removed", path.display());
        self.obsolete.push(path);
    }
}

/// Lists a volume: finalized files by name and length, open ones cut to their last whole, valid frame, copies under way removed. What it found is
/// durable when it returns.
pub fn scan_volume(fs: &dyn Fs, volume: &Volume, volume_index: usize) -> Result<Found> {
    let root = volume.pool_root()?.to_owned();
    let mut found = Found::default();
    let failed = |path: &Path, error: io::Error| Error::io(format!("scanning {}", path.display()), &error);
    for outer in list(fs, &root.join("finalized"))?.into_iter().filter(|entry| entry.is_dir) {
        let outer_path = root.join("finalized").join(&outer.name);
        for inner in list(fs, &outer_path)?.into_iter().filter(|entry| entry.is_dir) {
            let folder = outer_path.join(&inner.name);
            for file in list(fs, &folder)?.into_iter().filter(|entry| !entry.is_dir) {
                note_finalized(fs, volume, volume_index, &folder.join(&file.name), &file.name, file.len, &mut found)?;
            }
        }
    }
    let open = root.join("rbw");
    for entry in list(fs, &open)? {
        let path = open.join(&entry.name);
        if entry.is_dir {
            set_folder_aside(fs, volume, &path, &entry.name)?;
        } else {
            recover_open(fs, volume, &path, &entry.name, &mut found)?;
        }
    }
    // Last, because the steps above set files aside.
    let corrupt = root.join("corrupt");
    for file in list(fs, &corrupt)?.into_iter().filter(|entry| !entry.is_dir) {
        let path = corrupt.join(&file.name);
        let Some((block, generation, length)) = blockfile::parse_name(&file.name) else {
            volume.found(file.len);
            continue;
        };
        if found
            .replicas
            .get(&block.0)
            .is_some_and(|good| good.generation >= generation && !matches!(good.kind, Kind::Corrupt { .. }))
        {
            found.obsolete(block, path);
            continue;
        }
        volume.found(file.len);
        let kind = Kind::Corrupt { length: length.unwrap_or(0), stored: file.len, path };
        found.replicas.entry(block.0).or_insert(Entry { generation, kind });
    }
    for file in list(fs, &root.join(super::quarantine::FOLDER))?.into_iter().filter(|entry| !entry.is_dir) {
        // Nobody serves or reports it; its room is taken all the same.
        volume.found(file.len);
    }
    let temporary = root.join("tmp");
    for entry in list(fs, &temporary)? {
        let path = temporary.join(&entry.name);
        if entry.is_dir {
            set_folder_aside(fs, volume, &path, &entry.name)?;
        } else {
            fs.remove_file(&path).map_err(|error| failed(&path, error))?;
        }
    }
    if found.replicas.is_empty() {
        return Ok(found);
    }
    fs.sync_volume(&root).map_err(|error| Error::io(format!("syncing the volume of {}", root.display()), &error))?;
    for path in std::mem::take(&mut found.obsolete) {
        fs.remove_file(&path).map_err(|error| failed(&path, error))?;
    }
    Ok(found)
}

fn list(fs: &dyn Fs, path: &Path) -> Result<Vec<cairn_common::durable::DirEntry>> {
    fs.read_dir(path).map_err(|error| Error::io(format!("listing {}", path.display()), &error))
}

fn note_finalized(
    fs: &dyn Fs,
    volume: &Volume,
    volume_index: usize,
    path: &Path,
    name: &str,
    stored: u64,
    found: &mut Found,
) -> Result<()> {
    let right_place = |block, generation, length| {
        volume.finalized_path(block, generation, length).is_ok_and(|expected| expected == path)
    };
    let Some((block, generation, Some(length))) = blockfile::parse_name(name)
        .filter(|(block, generation, length)| length.is_some_and(|length| right_place(*block, *generation, length)))
    else {
        tracing::warn!("{} is not a block file's name or place; it is set aside and not served", path.display());
        return set_aside(fs, volume, path, name, found);
    };
    let least = HEADER_BYTES + FOOTER_BYTES + if length > 0 { FRAME_HEADER_BYTES } else { 0 };
    if stored < least as u64 {
        tracing::warn!(
            "{} has {stored} bytes, a block file has at least {least}; it is set aside as corrupt",
            path.display()
        );
        return set_aside(fs, volume, path, name, found);
    }
    let newer = Entry { generation, kind: Kind::Finalized { length, stored } };
    if let Some(older) = found.replicas.get(&block.0) {
        // Two files of one block: only a crash between two renames, or a hand, can do that.
        let keep_new = older.generation < generation;
        let loser = if keep_new {
            let Kind::Finalized { length, stored } = older.kind else { return Ok(()) };
            volume.removed(stored);
            volume.finalized_path(block, older.generation, length)?
        } else {
            path.to_owned()
        };
        tracing::warn!("volume {volume_index} has two files of block {block}; {} is set aside", loser.display());
        let loser_name = loser.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        set_aside(fs, volume, &loser, &loser_name, found)?;
        if !keep_new {
            return Ok(());
        }
    }
    volume.found(stored);
    found.replicas.insert(block.0, newer);
    Ok(())
}

/// Moves a file to where nothing is served from; the scan of that folder notes it.
fn set_aside(fs: &dyn Fs, volume: &Volume, path: &Path, name: &str, found: &mut Found) -> Result<()> {
    let to = volume.corrupt_path(name)?;
    let failed = |error: io::Error| Error::io(format!("setting {} aside", path.display()), &error);
    fs.rename(path, &to).map_err(failed)?;
    // After a power cut in the middle of this both names may be there: a rename of one file's two names does nothing, and succeeds.
    if fs.metadata(path).map_err(failed)?.is_some() {
        fs.remove_file(path).map_err(failed)?;
    }
    volume.sync_moved(path, &to)?;
    found.set_aside += 1;
    Ok(())
}

/// A folder lies where a block's file belongs, and would keep that block from being written. It is nobody's replica and is never removed.
fn set_folder_aside(fs: &dyn Fs, volume: &Volume, path: &Path, name: &str) -> Result<()> {
    let failed = |error: io::Error| Error::io(format!("setting {} aside", path.display()), &error);
    let mut to = volume.corrupt_path(name)?;
    let mut number = 0;
    while fs.metadata(&to).map_err(failed)?.is_some() {
        number += 1;
        to = volume.corrupt_path(&format!("{name}.{number}"))?;
    }
    tracing::warn!("{} is a folder, not a block file; it is set aside as {}", path.display(), to.display());
    fs.rename(path, &to).map_err(failed)?;
    volume.sync_moved(path, &to)
}

/// Looks after one open file. If the disk does not give it, it is set aside, unless the disk gives several of them not.
fn recover_open(fs: &dyn Fs, volume: &Volume, path: &Path, name: &str, found: &mut Found) -> Result<()> {
    let shown = path.display();
    let Err(error) = cut_open(fs, volume, path, name, found)? else { return Ok(()) };
    if error.kind() == io::ErrorKind::NotFound {
        return Ok(());
    }
    let told = volume.read_failed(format!("reading {shown}"), &error);
    if volume.is_failed() || !durable::is_device_failure(&error) {
        return Err(told);
    }
    tracing::warn!("{shown} cannot be read ({error}); it is set aside as corrupt");
    set_aside(fs, volume, path, name, found)
}

/// Cuts a file that a crash left open to its last whole, valid frame. The inner error: it cannot be read; nothing was changed.
fn cut_open(fs: &dyn Fs, volume: &Volume, path: &Path, name: &str, found: &mut Found) -> Result<io::Result<()>> {
    let shown = path.display();
    let failed = |error: io::Error| Error::io(format!("recovering {shown}"), &error);
    let Some((block, generation, None)) = blockfile::parse_name(name) else {
        tracing::warn!("{shown} is not an open block file's name; it is set aside and not served");
        return set_aside(fs, volume, path, name, found).map(Ok);
    };
    let older = found.replicas.get(&block.0).is_some_and(|other| {
        other.generation > generation
            || (matches!(other.kind, Kind::Finalized { .. }) && other.generation == generation)
    });
    if older {
        found.obsolete(block, path.to_owned());
        return Ok(Ok(()));
    }
    let opened = fs.open(path, OpenMode::Write).and_then(|file| Ok((file.len()?, file)));
    let (length, file) = match opened {
        Ok(opened) => opened,
        Err(error) => return Ok(Err(error)),
    };
    let header_bytes = match read_header(&*file, block, length) {
        Ok(header_bytes) => header_bytes,
        Err(OpenError::Io(error)) if error.kind() != io::ErrorKind::UnexpectedEof => return Ok(Err(error)),
        Err(flaw) if length <= HEADER_BYTES as u64 => {
            // Nothing was acked before the header was written: there is nothing to recover.
            tracing::warn!("{shown} holds no data ({flaw}); it is removed");
            return fs.remove_file(path).map_err(failed).map(Ok);
        }
        Err(flaw) => {
            // A power cut may keep later bytes and lose the header; it holds nothing that the name does not say, and frames verify by themselves.
            let start = HEADER_BYTES as u64;
            let probe = match walk(&*file, block, start, length, 1, Depth::Stored) {
                Ok(probe) => probe,
                Err(error) => return Ok(Err(error)),
            };
            if probe.index.frames() == 0 {
                tracing::warn!("{shown} cannot be recovered ({flaw}); it is set aside as corrupt");
                return set_aside(fs, volume, path, name, found).map(Ok);
            }
            tracing::warn!("{shown} had lost its header ({flaw}); it is written again");
            file.write_all_at(&blockfile::encode_header(block), 0).map_err(failed)?;
            start
        }
    };
    let walk = match walk(&*file, block, header_bytes, length, u64::MAX, Depth::Stored) {
        Ok(walk) => walk,
        Err(error) => return Ok(Err(error)),
    };
    let end = walk.index.frames_end();
    if end < length {
        let why = walk.flaw.map_or_else(String::new, |flaw| format!(" ({flaw})"));
        tracing::warn!("{shown} is cut from {length} to {end} bytes, its last whole frame{why}");
        file.set_len(end).map_err(failed)?;
        file.sync_data().map_err(failed)?;
    }
    volume.found(end);
    let kind = Kind::Recovering { index: Arc::new(walk.index), header_bytes, found_at_start: true };
    // A crash came between the joining of a newer copy and the removal of what it replaced, or took that removal back.
    match found.replicas.insert(block.0, Entry { generation, kind }) {
        Some(Entry { generation: older, kind: Kind::Recovering { index, .. } }) => {
            volume.removed(index.frames_end());
            found.obsolete(block, volume.open_path(block, older, false)?);
        }
        Some(Entry { generation: older, kind: Kind::Finalized { length, stored } }) => {
            volume.removed(stored);
            found.obsolete(block, volume.finalized_path(block, older, length)?);
        }
        _ => {}
    }
    Ok(Ok(()))
}

/// The error of a replica that failed its own node's check.
pub fn corrupt(path: &Path, why: &dyn std::fmt::Display) -> Error {
    Error::new(ErrorCode::Corrupt, format!("{}: {why}", path.display())).with_subject(path.display().to_string())
}

/// Where the newer of two wins; only for replicas of one block on two volumes.
pub fn rank(generation: Generation, kind: &Kind) -> (bool, Generation, u8) {
    let finalized = u8::from(matches!(kind, Kind::Finalized { .. }));
    (!matches!(kind, Kind::Corrupt { .. }), generation, finalized)
}

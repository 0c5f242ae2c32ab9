//! Content that tasks keep on their node for the jobs after theirs: what several jobs read, or what one writes and the next reads. It lies in files of the node's
//! disk that are never synced, so in memory as far as the page cache goes; read from there it needs no decompression and no connection.
//!
//! # Consistency
//! An entry's name holds inode, modification time and length of the cluster's file ([`KeptName`]); it is used only for a file that has all three, after the namenode has
//! let the job's user open that file. A file that is changed has a new time, unless its time lies in the future: of such files nothing is kept. (Who changes a file, gives it its old
//! length and sets its time back by hand, all while a graph reads it, is not noticed.) What was damaged does not fit its CRC: the rest is read from the cluster then.
//!
//! # Bounds
//! All entries of a node together hold `kept_bytes`, and never more than half of what the disk would have left without them (and without what it keeps in
//! reserve); keepers that look at the same time can go over it by [`LOOK_BYTES`] each. Where there is no room, what was written for a next stage goes, the oldest first; what is read again and again stays, since
//! a round that evicts what the same round needs later would find nothing at all.
//!
//! # Errors
//! None of them fails a task: what cannot be kept is not kept.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use cairn_common::Env;
use cairn_common::clock::Clock;
use cairn_common::durable::{File, Fs, OpenMode};
use cairn_proto::kept::{self, CHUNK_HEADER_BYTES, KeptName, MAX_CHUNK_BYTES};
use cairn_proto::{Result, pb};

use crate::fs::FileStatus;
use crate::mapreduce::input::Feed;

/// The namenode's clock may be ahead by so much.
const CLOCK_SKEW_MS: u64 = 10_000;
/// A keeper looks for room whenever it has written so much.
const LOOK_BYTES: u64 = 16 << 20;

/// A node's folder for the jobs that share a job's `keep`.
#[derive(Clone)]
pub struct Kept {
    fs: Arc<dyn Fs>,
    dir: PathBuf,
    limit: u64,
    /// Bytes of the disk that are left free.
    reserve: u64,
    clock: Clock,
    /// Numbers what this process writes.
    next: Arc<AtomicU64>,
}

impl Kept {
    /// None if the job keeps nothing.
    pub fn of(env: &Env, place: &pb::WorkerJob) -> Option<Self> {
        let (fs, dir) = (Arc::clone(&env.fs), PathBuf::from(&place.kept_dir));
        let keeps = !place.kept_dir.is_empty() && place.kept_bytes > 0;
        let (limit, reserve, clock) = (place.kept_bytes, place.disk_reserve, env.clock.clone());
        keeps.then(|| Self { fs, dir, limit, reserve, clock, next: Arc::default() })
    }

    /// What is kept of a file from `position` on: of its bytes, or (`decoded`) of what it holds. Blocks.
    pub fn find(&self, file: &FileStatus, decoded: bool, position: u64) -> Option<KeptReader> {
        let fits = |name: &KeptName| {
            (name.inode, name.modified_ms, name.length) == (file.inode, file.modified_ms, file.length)
                && name.decoded == decoded
                && (name.start..name.end()).contains(&position)
        };
        let entries = self.fs.read_dir(&self.dir).ok()?;
        let names = entries.iter().filter_map(|entry| KeptName::parse(&entry.name)).filter(fits);
        let name = names.max_by_key(KeptName::end)?;
        KeptReader::open(&self.fs, self.dir.join(name.to_string()), name, position).ok()
    }

    /// For a stretch of content. Blocks.
    pub fn keeper(&self) -> Keeper {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        // The datanode removes what a process leaves that is killed.
        let aside = self.dir.join(format!("{}{number}", kept::aside_prefix(std::process::id())));
        let mut keeper = Keeper { kept: self.clone(), aside, file: None, at: 0, bytes: 0, looked: 0 };
        keeper.file = keeper.kept.fs.open(&keeper.aside, OpenMode::Create).ok();
        if !keeper.kept.make_room(LOOK_BYTES) {
            keeper.give_up();
        }
        keeper
    }

    /// Is there room for so many bytes more? What was written for next stages may have to go for them.
    fn make_room(&self, more: u64) -> bool {
        let Some(root) = self.dir.parent() else { return false };
        let Ok(space) = self.fs.space(root) else { return false };
        let entries = all_entries(&*self.fs, root);
        let mut used: u64 = entries.iter().map(|entry| entry.bytes).sum();
        let limit = self.limit.min((used + space.available).saturating_sub(self.reserve) / 2);
        let mut expendable: Vec<&Entry> = entries.iter().filter(|entry| entry.written.is_some()).collect();
        expendable.sort_by_key(|entry| entry.written);
        let stays = used - expendable.iter().map(|entry| entry.bytes).sum::<u64>();
        if stays + more > limit {
            return false;
        }
        for entry in expendable {
            if used + more <= limit {
                break;
            }
            // Another worker may have been faster.
            let _ = self.fs.remove_file(&entry.path);
            used -= entry.bytes;
        }
        used + more <= limit
    }
}

struct Entry {
    path: PathBuf,
    bytes: u64,
    /// Inode of the file, if it was written for a next stage. Later files have higher ones.
    written: Option<u64>,
}

/// Everything below the folder of all that is kept on the node, also by others.
fn all_entries(fs: &dyn Fs, root: &Path) -> Vec<Entry> {
    let mut all = Vec::new();
    for folder in fs.read_dir(root).unwrap_or_default() {
        let dir = root.join(folder.name);
        // It may have gone meanwhile, as each of the files may.
        for entry in fs.read_dir(&dir).unwrap_or_default() {
            let written = KeptName::parse(&entry.name).filter(|name| name.written).map(|name| name.inode);
            all.push(Entry { path: dir.join(&entry.name), bytes: entry.len, written });
        }
    }
    all
}

/// Writes an entry. Dropped before it is finished, it leaves nothing.
pub struct Keeper {
    kept: Kept,
    aside: PathBuf,
    /// None: given up.
    file: Option<Arc<dyn File>>,
    at: u64,
    bytes: u64,
    /// Where room was last looked for.
    looked: u64,
}

impl Keeper {
    /// Takes the next bytes of the content.
    pub fn push(&mut self, content: &[u8]) {
        let Some(file) = self.file.clone() else { return };
        for data in content.chunks(MAX_CHUNK_BYTES) {
            let header = kept::chunk_header(data);
            let written = file
                .write_all_at(&header, self.at)
                .and_then(|()| file.write_all_at(data, self.at + CHUNK_HEADER_BYTES as u64));
            self.at += (CHUNK_HEADER_BYTES + data.len()) as u64;
            self.bytes += data.len() as u64;
            let room = || self.at < self.looked + LOOK_BYTES || self.kept.make_room(LOOK_BYTES);
            if written.is_err() || !room() {
                return self.give_up();
            }
            if self.at >= self.looked + LOOK_BYTES {
                self.looked = self.at;
            }
        }
    }

    /// What was pushed is the content of `file` from `start` on.
    pub fn finish(mut self, file: &FileStatus, start: u64, decoded: bool, written: bool) {
        let FileStatus { inode, modified_ms, length, .. } = *file;
        let soon_ms = self.kept.clock.wall_ms() + CLOCK_SKEW_MS;
        let name = KeptName { inode, modified_ms, length, start, bytes: self.bytes, decoded, written };
        let named = self.bytes > 0 && modified_ms < soon_ms && self.file.take().is_some() && {
            let to = self.kept.dir.join(name.to_string());
            self.kept.fs.rename(&self.aside, &to).is_ok()
        };
        if !named {
            self.give_up();
        }
    }

    fn give_up(&mut self) {
        self.file = None;
        // Else it goes with its folder.
        let _ = self.kept.fs.remove_file(&self.aside);
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        if self.file.is_some() {
            self.give_up();
        }
    }
}

/// Reads an entry.
pub struct KeptReader {
    fs: Arc<dyn Fs>,
    path: PathBuf,
    file: Arc<dyn File>,
    name: KeptName,
    /// Where the next chunk's header is.
    at: u64,
    /// Offset in the content of the next byte.
    position: u64,
    /// Bytes of the next chunk that were not asked for.
    skip: usize,
}

impl KeptReader {
    fn open(fs: &Arc<dyn Fs>, path: PathBuf, name: KeptName, position: u64) -> io::Result<Self> {
        let file = fs.open(&path, OpenMode::Read)?;
        let (mut at, mut chunk_start) = (0, name.start);
        loop {
            let mut header = [0; CHUNK_HEADER_BYTES];
            file.read_exact_at(&mut header, at)?;
            let length = kept::chunk_length(&header).ok_or(io::ErrorKind::InvalidData)? as u64;
            if position < chunk_start + length {
                break;
            }
            at += CHUNK_HEADER_BYTES as u64 + length;
            chunk_start += length;
        }
        let (fs, skip) = (Arc::clone(fs), (position - chunk_start) as usize);
        Ok(Self { fs, path, file, name, at, position, skip })
    }

    /// Offset of the next byte.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Offset behind the last byte that is kept.
    pub fn end(&self) -> u64 {
        self.name.end()
    }

    /// Nothing comes after what is kept.
    pub fn is_to_the_end(&self) -> bool {
        self.name.decoded || self.name.end() >= self.name.length
    }

    /// It is no good.
    pub fn remove(self) {
        // Another task may have been faster.
        let _ = self.fs.remove_file(&self.path);
    }

    /// The next bytes; `None` at the end of what is kept.
    pub fn next(&mut self) -> io::Result<Option<Bytes>> {
        if self.position >= self.name.end() {
            return Ok(None);
        }
        let mut header = [0; CHUNK_HEADER_BYTES];
        self.file.read_exact_at(&mut header, self.at)?;
        let length = kept::chunk_length(&header).ok_or(io::ErrorKind::InvalidData)?;
        let mut data = vec![0; length];
        self.file.read_exact_at(&mut data, self.at + CHUNK_HEADER_BYTES as u64)?;
        if !kept::chunk_fits(&header, &data) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        self.at += (CHUNK_HEADER_BYTES + length) as u64;
        let bytes = Bytes::from(data).slice(std::mem::take(&mut self.skip).min(length)..);
        self.position += bytes.len() as u64;
        Ok(Some(bytes))
    }
}

/// A keeper that a task's computing thread fills through [`Tee`], and that is finished when the task has succeeded.
#[derive(Clone, Default)]
pub struct Keeping {
    inner: Arc<Mutex<Option<Taking>>>,
}

struct Taking {
    keeper: Keeper,
    /// The content has come to its end.
    ended: bool,
}

impl Keeping {
    /// Through `keeper`.
    pub fn with(keeper: Keeper) -> Self {
        Self { inner: Arc::new(Mutex::new(Some(Taking { keeper, ended: false }))) }
    }

    /// Keeps what came, if it is all that `file` holds or (not `decoded`) any stretch of it from `start` on.
    pub fn finish(&self, file: &FileStatus, start: u64, decoded: bool) {
        let taking = self.inner.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(Taking { keeper, .. }) = taking.filter(|taking| taking.ended || !decoded) {
            keeper.finish(file, start, decoded, false);
        }
    }

    fn took(&self, piece: Option<&[u8]>) {
        let mut taking = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(taking) = &mut *taking {
            match piece {
                Some(piece) => taking.keeper.push(piece),
                None => taking.ended = true,
            }
        }
    }
}

/// A feed whose content is kept as it passes.
pub struct Tee<F> {
    /// Where it comes from.
    pub feed: F,
    /// Where it is kept.
    pub keeping: Keeping,
}

impl<F: Feed> Feed for Tee<F> {
    fn next(&mut self) -> Result<Option<Bytes>> {
        let piece = self.feed.next()?;
        self.keeping.took(piece.as_deref());
        Ok(piece)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use cairn_common::durable::SystemFs;

    pub(in crate::job::worker) fn folder(root: &Path, name: &str, limit: u64) -> Kept {
        let dir = root.join(name);
        SystemFs.create_dir_all(&dir).unwrap();
        Kept { fs: Arc::new(SystemFs), dir, limit, reserve: 0, clock: Env::system().clock, next: Arc::default() }
    }

    pub(in crate::job::worker) fn file(inode: u64, length: u64) -> FileStatus {
        FileStatus { inode, length, modified_ms: 1_000, ..Default::default() }
    }

    pub(in crate::job::worker) fn keep(kept: &Kept, file: &FileStatus, start: u64, content: &[u8], written: bool) {
        let mut keeper = kept.keeper();
        content.chunks(100_000).for_each(|piece| keeper.push(piece));
        keeper.finish(file, start, false, written);
    }

    /// Flips a bit in the only entry.
    pub(in crate::job::worker) fn damage(kept: &Kept, at: u64) -> Arc<dyn File> {
        let path = kept.dir.join(&SystemFs.read_dir(&kept.dir).unwrap()[0].name);
        let (file, mut byte) = (SystemFs.open(&path, OpenMode::Write).unwrap(), [0]);
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1], at).unwrap();
        file
    }

    fn rest(mut reader: KeptReader) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        while let Some(piece) = reader.next()? {
            out.extend_from_slice(&piece);
        }
        Ok(out)
    }

    pub(in crate::job::worker) fn content(length: usize) -> Vec<u8> {
        (0..length).map(|at| (at * 31 % 251) as u8).collect()
    }

    #[test]
    fn what_is_kept_is_found_from_any_place_in_it() {
        let dir = tempfile::tempdir().unwrap();
        let kept = folder(dir.path(), "1", 1 << 30);
        let (about, all) = (file(5, 1_000_000), content(450_000));
        keep(&kept, &about, 1_000, &all, false);
        for position in [1_000, 1_001, 100_999, 101_000, 300_000, 450_999] {
            let reader = kept.find(&about, false, position).unwrap();
            assert!(!reader.is_to_the_end());
            assert!(rest(reader).unwrap() == all[position as usize - 1_000..], "{position}");
        }
        assert!(kept.find(&about, false, 999).is_none() && kept.find(&about, false, 451_000).is_none());
        assert!(kept.find(&about, true, 1_000).is_none(), "that is not what the file holds when it is decompressed");
        for other in [file(6, 1_000_000), file(5, 1_000_001), FileStatus { modified_ms: 1_001, ..about.clone() }] {
            assert!(kept.find(&other, false, 1_000).is_none(), "another content");
        }
    }

    #[test]
    fn damage_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let kept = folder(dir.path(), "1", 1 << 30);
        let about = file(5, 250_000);
        keep(&kept, &about, 0, &content(250_000), false);
        let file = damage(&kept, 150_000);
        let mut reader = kept.find(&about, false, 0).unwrap();
        assert!(reader.is_to_the_end());
        assert_eq!(reader.next().unwrap().unwrap(), content(250_000)[..100_000]);
        assert_eq!(reader.next().unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert_eq!(reader.position(), 100_000, "from there on it is to be read elsewhere");
        file.set_len(50_000).unwrap();
        assert!(rest(kept.find(&about, false, 0).unwrap()).is_err(), "it was cut");
    }

    #[test]
    fn what_was_written_for_a_next_stage_makes_room_and_what_is_read_again_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (kept, others) = (folder(dir.path(), "1", LOOK_BYTES + 700_000), folder(dir.path(), "2", 0));
        keep(&folder(dir.path(), "2", 1 << 30), &file(2, 300_000), 0, &content(300_000), true);
        keep(&kept, &file(3, 300_000), 0, &content(300_000), false);
        keep(&kept, &file(4, 300_000), 0, &content(300_000), true);
        let finds = |kept: &Kept, inode| kept.find(&file(inode, 300_000), false, 0).is_some();
        assert!(finds(&others, 2) && finds(&kept, 3) && finds(&kept, 4));
        keep(&kept, &file(5, 300_000), 0, &content(300_000), false);
        assert!(!finds(&others, 2), "the oldest of those that were written");
        assert!(finds(&kept, 3) && finds(&kept, 4) && finds(&kept, 5));
        keep(&kept, &file(6, 300_000), 0, &content(300_000), false);
        assert!(!finds(&kept, 4) && finds(&kept, 6));
        keep(&kept, &file(7, 300_000), 0, &content(300_000), false);
        assert!(finds(&kept, 3) && finds(&kept, 5) && finds(&kept, 6) && !finds(&kept, 7), "there is no room");
        keep(&kept, &file(8, 300_000), 0, &content(300_000), true);
        assert!(!finds(&kept, 8), "what can go would not be enough");
        let left = SystemFs.read_dir(&kept.dir).unwrap();
        assert_eq!(left.len(), 3, "nothing is left of what was given up");
    }

    #[test]
    fn what_is_not_finished_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let kept = folder(dir.path(), "1", 1 << 30);
        let mut keeper = kept.keeper();
        keeper.push(b"some");
        drop(keeper);
        keep(&kept, &file(1, 0), 0, b"", false);
        assert!(SystemFs.read_dir(&kept.dir).unwrap().is_empty());
        let tomorrow = FileStatus { modified_ms: kept.clock.wall_ms() + (1 << 30), ..file(2, 4) };
        keep(&kept, &tomorrow, 0, b"some", false);
        assert!(kept.find(&tomorrow, false, 0).is_none(), "a change would not be seen");
        let full = Kept { reserve: u64::MAX, ..kept.clone() };
        keep(&full, &file(3, 4), 0, b"some", false);
        assert!(SystemFs.read_dir(&kept.dir).unwrap().is_empty());
        let (missing, whole) = (Kept { dir: dir.path().join("gone"), ..kept.clone() }, file(1, 4));
        keep(&missing, &whole, 0, b"some", false);
        assert!(missing.find(&whole, false, 0).is_none());
    }
}

//! What a client may expect to find in its own subtree, after what it was told.
//!
//! A call that answered is **acked**: its effect is known. One under way is **pending**; if its client dies or it ends without an answer it
//! becomes **unknown**: it may have happened, may not have, or may happen yet. A path that an unknown call touched is left alone from then on, and
//! each state that it may be in is remembered; all else goes on being known exactly.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};

use cairn_common::entropy::Entropy;

/// Bytes that a client wrote: runs of a number's endless bytes.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Bytes {
    runs: Vec<(u64, u64)>,
}

impl Bytes {
    /// Adds `length` bytes that `number` gives.
    pub fn push(&mut self, number: u64, length: u64) -> Vec<u8> {
        self.runs.push((number, length));
        run(number, length)
    }

    /// How many.
    #[allow(clippy::len_without_is_empty, reason = "nobody asks")]
    pub fn len(&self) -> u64 {
        self.runs.iter().map(|(_, length)| length).sum()
    }

    /// All of them.
    pub fn all(&self) -> Vec<u8> {
        self.runs.iter().flat_map(|(number, length)| run(*number, *length)).collect()
    }

    /// The first `length` of them.
    pub fn cut(&mut self, length: u64) {
        let mut left = length;
        for (_, length) in &mut self.runs {
            *length = left.min(*length);
            left -= *length;
        }
    }

    /// Those of `other` behind these.
    pub fn append(&mut self, other: &Self) {
        self.runs.extend(&other.runs);
    }
}

fn run(number: u64, length: u64) -> Vec<u8> {
    let mut bytes = vec![0; length as usize];
    // Every fourth run shrinks when it is compressed.
    if number.is_multiple_of(4) {
        let word = number.to_le_bytes();
        bytes.iter_mut().enumerate().for_each(|(at, byte)| *byte = word[at % 8] ^ (at >> 9) as u8);
    } else {
        Entropy::seeded(number).fill(&mut bytes);
    }
    bytes
}

thread_local! {
    /// How often a datanode may have lost what was flushed and not synced. Only compared, so it goes on over the runs of a thread.
    static LOSSES: Cell<u64> = const { Cell::new(0) };
    /// A disk of this run has faults, which come when they come.
    static AILING: Cell<bool> = const { Cell::new(false) };
}

/// A run begins.
pub fn all_disks_are_sound() {
    AILING.set(false);
}

/// A disk has faults: from now on nothing is demanded of what is only flushed.
pub fn a_disk_is_ailing() {
    AILING.set(true);
    a_datanode_lost_power();
}

/// What was only flushed may be gone from now on. The death of a process takes nothing.
pub fn a_datanode_lost_power() {
    LOSSES.set(LOSSES.get() + 1);
}

/// How often that happened.
pub fn losses() -> u64 {
    LOSSES.get()
}

/// A file as far as it is known.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct File {
    /// What was written to it.
    pub bytes: Bytes,
    /// How much of that must be there: what a close or an hsync acknowledged.
    pub least: u64,
    /// What an hflush acknowledged, and how often datanodes had lost something by then: it must be there until one does again.
    flushed: Option<(u64, u64)>,
    /// Closed by an acknowledged call: then all of `bytes` is there.
    pub closed: bool,
}

impl File {
    /// All that was written is acknowledged by an hflush that began when datanodes had lost something so often.
    pub fn flush(&mut self, losses: u64) {
        self.flushed = (!AILING.get()).then(|| (self.bytes.len(), losses));
    }

    /// How much must be there now.
    pub fn least_now(&self) -> u64 {
        match self.flushed {
            Some((length, losses)) if losses == LOSSES.get() => self.least.max(length),
            _ => self.least,
        }
    }

    /// It ends there now.
    fn cut(&mut self, length: u64) {
        self.bytes.cut(length);
        (self.least, self.flushed) = (length, None);
    }

    /// May a reader have found this?
    pub fn allows(&self, found: &[u8]) -> Result<(), String> {
        let length = found.len() as u64;
        if length < self.least_now() || length > self.bytes.len() {
            return Err(format!("{length} bytes, expected {} to {}", self.least_now(), self.bytes.len()));
        }
        let written = self.bytes.all();
        match written.iter().zip(found).position(|(a, b)| a != b) {
            None => Ok(()),
            Some(at) => Err(format!("byte {at} of {length} differs")),
        }
    }
}

/// What is known of a path.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Known {
    /// This.
    Sure(File),
    /// One of these; `None`: nothing is there.
    Unsure(Vec<Option<File>>),
}

impl Known {
    /// May a reader have found this (`None`: no file)?
    pub fn allows(&self, found: Option<&[u8]>) -> Result<(), String> {
        let one = |file: &Option<File>| match (file, found) {
            (None, None) => Ok(()),
            (Some(file), Some(found)) => file.allows(found),
            (None, Some(_)) => Err("a file that must not be there".into()),
            (Some(_), None) => Err("an acknowledged file is not there".to_owned()),
        };
        match self {
            Self::Sure(file) => one(&Some(file.clone())),
            Self::Unsure(states) => {
                let refusals: Vec<String> = states.iter().filter_map(|state| one(state).err()).collect();
                if refusals.len() < states.len() { Ok(()) } else { Err(refusals.join("; or ")) }
            }
        }
    }
}

/// What one client knows of its subtree.
#[derive(Default)]
pub struct Model {
    /// Its files.
    pub files: BTreeMap<String, Known>,
    /// Its directories.
    pub dirs: BTreeSet<String>,
    /// Paths that may be directories, or not.
    pub unsure_dirs: BTreeSet<String>,
    /// Renames that may have happened: the file is at one of the two, whole.
    pub moves: Vec<(String, String, File)>,
    /// What is under way.
    pub pending: Option<Pending>,
    /// Operations that ended.
    pub operations: u64,
    /// Operations that were acknowledged.
    pub acked: u64,
    /// Raised with every change of what is known.
    pub version: u64,
    next_name: u64,
}

/// A call that was sent.
#[derive(Clone, Debug)]
#[allow(dead_code, reason = "all of it is printed")]
pub enum Pending {
    /// A file is created (and one there is replaced).
    Create { path: String },
    /// A file is written; what the oracle has for it is kept up to date by the writer.
    Write { path: String },
    /// A file is removed.
    Delete { path: String },
    /// A directory is removed with all in it.
    DeleteDir { path: String },
    /// A file is renamed.
    Rename { from: String, to: String },
    /// A directory is renamed.
    RenameDir { from: String, to: String },
    /// A directory is made.
    Mkdir { path: String },
    /// A file is cut.
    Truncate { path: String, length: u64 },
    /// Files are put behind one.
    Concat { path: String, sources: Vec<String> },
    /// Only asks.
    Ask,
}

fn below<'a>(path: &'a str, dir: &str) -> Option<&'a str> {
    path.strip_prefix(dir).filter(|rest| rest.starts_with('/'))
}

impl Model {
    /// A name that was never used.
    pub fn fresh(&mut self, prefix: &str) -> String {
        self.next_name += 1;
        format!("{prefix}{}", self.next_name)
    }

    /// A call is sent.
    pub fn begin(&mut self, pending: Pending) {
        self.version += 1;
        self.pending = Some(pending);
    }

    /// The call was refused: nothing happened.
    pub fn refused(&mut self) {
        self.pending = None;
        self.operations += 1;
        self.version += 1;
    }

    /// The call was acknowledged.
    pub fn acked(&mut self) {
        self.operations += 1;
        self.acked += 1;
        self.version += 1;
        match self.pending.take() {
            Some(Pending::Create { path }) => {
                self.files.insert(path, Known::Sure(File::default()));
            }
            Some(Pending::Delete { path }) => {
                self.files.remove(&path);
            }
            Some(Pending::DeleteDir { path }) => {
                self.dirs.retain(|dir| dir != &path && below(dir, &path).is_none());
                self.files.retain(|file, _| below(file, &path).is_none());
            }
            Some(Pending::Rename { from, to }) => {
                if let Some(file) = self.files.remove(&from) {
                    self.files.insert(to, file);
                }
            }
            Some(Pending::RenameDir { from, to }) => self.rename_dir(&from, &to),
            Some(Pending::Mkdir { path }) => {
                self.dirs.insert(path);
            }
            Some(Pending::Truncate { path, length }) => {
                if let Some(Known::Sure(file)) = self.files.get_mut(&path) {
                    file.cut(length);
                }
            }
            Some(Pending::Concat { path, sources }) => {
                for source in sources {
                    let Some(Known::Sure(part)) = self.files.remove(&source) else { continue };
                    if let Some(Known::Sure(file)) = self.files.get_mut(&path) {
                        file.bytes.append(&part.bytes);
                        file.least = file.bytes.len();
                    }
                }
            }
            Some(Pending::Write { .. } | Pending::Ask) | None => {}
        }
    }

    fn rename_dir(&mut self, from: &str, to: &str) {
        let moved = |path: &str| below(path, from).map(|rest| format!("{to}{rest}"));
        self.dirs.remove(from);
        self.dirs.insert(to.to_owned());
        let dirs = std::mem::take(&mut self.dirs);
        self.dirs = dirs.into_iter().map(|dir| moved(&dir).unwrap_or(dir)).collect();
        let files = std::mem::take(&mut self.files);
        self.files = files.into_iter().map(|(path, known)| (moved(&path).unwrap_or(path), known)).collect();
    }

    /// Nobody knows what became of the call.
    pub fn unknown(&mut self) {
        self.operations += 1;
        self.version += 1;
        match self.pending.take() {
            Some(Pending::Create { path }) => self.doubt(path, Some(File::default())),
            Some(Pending::Delete { path }) => self.doubt(path, None),
            Some(Pending::DeleteDir { path }) => {
                for file in self.below(&path) {
                    self.doubt(file, None);
                }
                self.doubt_dirs(&path);
            }
            Some(Pending::Rename { from, to }) => self.doubt_move(from, to),
            Some(Pending::RenameDir { from, to }) => {
                for file in self.below(&from) {
                    let target = format!("{to}{}", below(&file, &from).unwrap_or_default());
                    self.doubt_move(file, target);
                }
                for dir in self.dirs.clone() {
                    if let Some(rest) = below(&dir, &from) {
                        self.unsure_dirs.insert(format!("{to}{rest}"));
                    }
                }
                self.doubt_dirs(&from);
                self.unsure_dirs.insert(to);
            }
            Some(Pending::Mkdir { path }) => {
                self.unsure_dirs.insert(path);
            }
            Some(Pending::Truncate { path, length }) => {
                let Some(Known::Sure(file)) = self.files.get(&path) else { return };
                let mut cut = file.clone();
                cut.cut(length);
                self.doubt(path, Some(cut));
            }
            Some(Pending::Concat { path, sources }) => {
                let Some(Known::Sure(file)) = self.files.get(&path) else { return };
                let mut whole = file.clone();
                for source in sources {
                    if let Some(Known::Sure(part)) = self.files.get(&source) {
                        whole.bytes.append(&part.bytes);
                    }
                    self.doubt(source, None);
                }
                whole.least = whole.bytes.len();
                self.doubt(path, Some(whole));
            }
            // What was written is what the file may hold.
            Some(Pending::Write { .. } | Pending::Ask) | None => {}
        }
    }

    fn below(&self, dir: &str) -> Vec<String> {
        self.files.keys().filter(|file| below(file, dir).is_some()).cloned().collect()
    }

    fn doubt_dirs(&mut self, path: &str) {
        let (gone, kept) = std::mem::take(&mut self.dirs)
            .into_iter()
            .partition::<BTreeSet<String>, _>(|dir| dir == path || below(dir, path).is_some());
        self.dirs = kept;
        self.unsure_dirs.extend(gone);
    }

    /// `path` may have become `state`.
    fn doubt(&mut self, path: String, state: Option<File>) {
        let mut states = match self.files.remove(&path) {
            None => vec![None],
            Some(Known::Sure(file)) => vec![Some(file)],
            Some(Known::Unsure(states)) => states,
        };
        states.push(state);
        self.files.insert(path, Known::Unsure(states));
    }

    fn doubt_move(&mut self, from: String, to: String) {
        let Some(known) = self.files.get(&from).cloned() else { return };
        let states = match known {
            Known::Sure(file) => {
                self.moves.push((from.clone(), to.clone(), file.clone()));
                vec![Some(file)]
            }
            Known::Unsure(states) => states,
        };
        self.doubt(from, None);
        for state in states {
            self.doubt(to.clone(), state);
        }
    }

    /// A file that is known for certain, closed, and chosen by `entropy`.
    pub fn some_closed(&self, entropy: &Entropy) -> Option<(String, File)> {
        let closed: Vec<_> = self
            .files
            .iter()
            .filter_map(|(path, known)| match known {
                Known::Sure(file) if file.closed => Some((path, file)),
                _ => None,
            })
            .collect();
        let (path, file) = closed.get(entropy.below(closed.len() as u64) as usize)?;
        Some(((*path).clone(), (*file).clone()))
    }

    /// A directory other than the root, chosen by `entropy`.
    pub fn some_dir(&self, entropy: &Entropy) -> Option<String> {
        let dirs: Vec<&String> = self.dirs.iter().collect();
        dirs.get(entropy.below(dirs.len() as u64) as usize).map(|dir| (*dir).clone())
    }
}

//! What clients do: each in its own subtree, one operation after the other, chosen by its own randomness and by what it knows.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use cairn_client::fs::{AppendOptions, CreateOptions, Error, ErrorCode, FileSystem, FileWriter, RenameMode};
use cairn_common::entropy::Entropy;

use super::cluster::client_settings;
use super::machine::Machine;
use super::oracle::{self, File, Known, Model, Pending};
use super::plan::Shape;
use super::trace::{note, violated};

/// No operation may take longer, virtual time: all deadlines of a client together.
pub const OPERATION_LIMIT: Duration = Duration::from_secs(150);

/// One client, over all lives of its process.
pub struct Client {
    /// Its machine.
    pub machine: Rc<Machine>,
    /// What it knows.
    pub model: RefCell<Model>,
    /// Set when no new operation shall begin.
    pub closing: Cell<bool>,
    /// Set when its last operation has ended.
    pub done: Cell<bool>,
    entropy: Entropy,
    shape: Shape,
    number: u64,
}

/// What an error says of the call.
fn is_unknown(error: &Error) -> bool {
    use ErrorCode as C;
    // "Not yet" is said before anything is changed; no answer leaves all open.
    matches!(error.code(), C::Unreachable | C::TimedOut | C::Internal | C::Io | C::Unspecified)
}

impl Client {
    /// The client of a number.
    pub fn new(machine: Rc<Machine>, number: u64, seed: u64, shape: &Shape) -> Rc<Self> {
        Rc::new(Self {
            machine,
            model: RefCell::default(),
            closing: Cell::new(false),
            done: Cell::new(false),
            entropy: Entropy::seeded(seed ^ (number + 1).wrapping_mul(0xC11E_4701)),
            shape: shape.clone(),
            number,
        })
    }

    fn root(&self) -> String {
        format!("/c{}", self.number)
    }

    fn say(&self, text: impl std::fmt::Display) {
        note(&self.machine.name, text);
    }

    /// The process: goes on where the one before it died.
    pub async fn run(self: Rc<Self>) -> turmoil::Result {
        tokio::task::yield_now().await;
        let env = self.machine.boot();
        if let Some(pending) = self.model.borrow().pending.clone() {
            self.say(format!("died during {pending:?}"));
        }
        self.model.borrow_mut().unknown();
        let fs = loop {
            match FileSystem::connect(env.clone(), client_settings()).await {
                Ok(fs) => break fs,
                Err(error) => self.say(format!("cannot connect: {}", error.code().as_str_name())),
            }
            env.clock.sleep(Duration::from_millis(200)).await;
        };
        while !self.closing.get() {
            if env.clock.timeout(OPERATION_LIMIT, self.one(&fs)).await.is_err() {
                let pending = self.model.borrow().pending.clone();
                violated("operations_end", format!("{}: {pending:?} did not end", self.machine.name));
                break;
            }
            env.clock.sleep(Duration::from_millis(self.entropy.below(self.shape.pause_ms))).await;
        }
        self.done.set(true);
        self.say("has done all");
        std::future::pending().await
    }

    async fn one(&self, fs: &FileSystem) {
        match self.entropy.below(22) {
            0..=5 => self.write(fs, false).await,
            6 => self.append(fs).await,
            7 => self.write(fs, true).await,
            8..=10 => self.read(fs).await,
            11 => self.list(fs).await,
            12 | 13 => self.rename(fs).await,
            14 => self.rename_dir(fs).await,
            15 | 16 => self.delete(fs).await,
            17 => self.delete_dir(fs).await,
            18 => self.mkdir(fs).await,
            19 => self.replicate(fs).await,
            20 => self.truncate(fs).await,
            _ => self.concat(fs).await,
        }
    }

    /// Notes the outcome of a call that was begun; true: acknowledged. `expected`: refusals that the state allows.
    fn settle<T>(&self, what: &str, result: &Result<T, Error>, expected: &[ErrorCode]) -> bool {
        let mut model = self.model.borrow_mut();
        match result {
            Ok(_) => {
                model.acked();
                self.say(format!("{what}: acked"));
                return true;
            }
            Err(error) if is_unknown(error) => {
                model.unknown();
                self.say(format!("{what}: unknown, {}: {}", error.code().as_str_name(), error.message()));
            }
            Err(error) => {
                model.refused();
                self.say(format!("{what}: refused, {}: {}", error.code().as_str_name(), error.message()));
                use ErrorCode as C;
                if !expected.contains(&error.code())
                    && !matches!(error.code(), C::SafeMode | C::Busy | C::NotReplicatedYet)
                {
                    let text = format!("{}: {what}: {:?} {}", self.machine.name, error.code(), error.message());
                    violated("acked_names", text);
                }
            }
        }
        false
    }

    fn some_place(&self) -> String {
        let dir = match self.entropy.below(2) {
            0 => None,
            _ => self.model.borrow().some_dir(&self.entropy),
        };
        let dir = dir.unwrap_or_else(|| self.root());
        self.model.borrow_mut().fresh(&format!("{dir}/f"))
    }

    async fn write(&self, fs: &FileSystem, over: bool) {
        let old = if over { self.model.borrow().some_closed(&self.entropy) } else { None };
        let path = match old {
            Some((path, _)) => path,
            None => self.some_place(),
        };
        let replication = [1, 2, 3, 3, 3][self.entropy.below(5) as usize];
        let options = CreateOptions {
            overwrite: over,
            replication,
            compress: self.entropy.below(8) == 0,
            create_parents: true,
            ..CreateOptions::default()
        };
        self.model.borrow_mut().begin(Pending::Create { path: path.clone() });
        let created = fs.create(&path, options).await;
        if !self.settle(&format!("create {path} x{replication}"), &created, &[]) {
            return;
        }
        let Ok(writer) = created else { return };
        self.model.borrow_mut().begin(Pending::Write { path: path.clone() });
        self.finish(fs, writer, path).await;
    }

    async fn append(&self, fs: &FileSystem) {
        let Some((path, _)) = self.model.borrow().some_closed(&self.entropy) else { return };
        self.model.borrow_mut().begin(Pending::Write { path: path.clone() });
        // Nobody knows whether it is open until it is closed again.
        self.with_file(&path, |file| file.closed = false);
        match fs.append(&path, AppendOptions::default()).await {
            Ok(writer) => self.finish(fs, writer, path).await,
            failed => drop(self.settle(&format!("append {path}"), &failed, &[])),
        }
    }

    async fn finish(&self, fs: &FileSystem, writer: FileWriter, path: String) {
        let end = self.fill(fs, writer, &path).await;
        let mut model = self.model.borrow_mut();
        match end {
            Ok(closed) => {
                model.acked();
                let Some(Known::Sure(file)) = model.files.get_mut(&path) else { return };
                if closed {
                    (file.closed, file.least) = (true, file.bytes.len());
                }
                self.say(format!("write {path}: {} bytes, closed: {closed}", file.bytes.len()));
            }
            Err(error) => {
                model.unknown();
                self.say(format!("write {path}: {}: {}", error.code().as_str_name(), error.message()));
            }
        }
    }

    /// Writes, with flushes and syncs between; whether the file was closed. What is known of the file goes along.
    async fn fill(&self, fs: &FileSystem, mut writer: FileWriter, path: &str) -> Result<bool, Error> {
        let block = self.shape.block_bytes;
        let total = match self.entropy.below(6) {
            0 => 0,
            1 => 1 + self.entropy.below(600),
            2 => block,
            3 => block * 2,
            _ => 1 + self.entropy.below(block * 3),
        };
        let pieces = 1 + self.entropy.below(4);
        let mut left = total;
        for piece in 0..pieces {
            let length = if piece + 1 == pieces { left } else { self.entropy.below(left + 1) };
            left -= length;
            let bytes = self.with_file(path, |file| file.bytes.push(self.entropy.next_u64(), length));
            writer.write(&bytes).await?;
            match self.entropy.below(10) {
                0 | 1 => {
                    writer.sync().await?;
                    self.with_file(path, |file| file.least = file.bytes.len());
                    self.say(format!("hsync {path}: {} bytes", writer.length()));
                }
                2 => {
                    // An acknowledgement may be on its way when power goes.
                    let losses = oracle::losses();
                    writer.flush().await?;
                    self.with_file(path, |file| file.flush(losses));
                    self.say(format!("hflush {path}: {} bytes", writer.length()));
                    self.look(fs, path, "flushed").await;
                }
                3 => fs.env().clock.sleep(Duration::from_millis(self.entropy.below(3_000))).await,
                _ => {}
            }
        }
        // A writer that is dropped leaves its file to its lease's end.
        if self.entropy.below(12) == 0 {
            return Ok(false);
        }
        writer.close().await?;
        Ok(true)
    }

    fn with_file<R: Default>(&self, path: &str, change: impl FnOnce(&mut File) -> R) -> R {
        let mut model = self.model.borrow_mut();
        model.version += 1;
        match model.files.get_mut(path) {
            Some(Known::Sure(file)) => change(file),
            _ => R::default(),
        }
    }

    async fn read(&self, fs: &FileSystem) {
        let path = {
            let model = self.model.borrow();
            let paths: Vec<&String> = model.files.keys().collect();
            paths.get(self.entropy.below(paths.len() as u64) as usize).map(|path| (*path).clone())
        };
        let Some(path) = path else { return };
        self.look(fs, &path, "read").await;
        self.model.borrow_mut().operations += 1;
    }

    /// Reads a file, whole or in part. An error may be while there are faults; wrong bytes, or their absence, never.
    async fn look(&self, fs: &FileSystem, path: &str, what: &str) {
        let whole = self.entropy.below(3) > 0;
        let found = async {
            let file = fs.open(path).await?;
            let length = file.length();
            if whole {
                return Ok((0, length, file.read_range(0, length).await?));
            }
            let offset = self.entropy.below(length + 1);
            let wanted = self.entropy.below(length - offset + 1);
            Ok::<_, Error>((offset, length, file.read_range(offset, wanted).await?))
        };
        let found = found.await;
        let model = self.model.borrow();
        let Some(known) = model.files.get(path) else { return };
        let verdict = match &found {
            Ok((0, length, bytes)) if *length == bytes.len() as u64 => known.allows(Some(bytes)),
            Ok((offset, length, bytes)) => part_allowed(known, *offset, *length, bytes),
            Err(error) if error.code() == ErrorCode::FileNotFound => known.allows(None),
            Err(_) => Ok(()),
        };
        match &found {
            Ok((offset, length, bytes)) => {
                self.say(format!("{what} {path}: {} bytes at {offset} of {length}", bytes.len()))
            }
            Err(error) => self.say(format!("{what} {path}: {}: {}", error.code().as_str_name(), error.message())),
        }
        if let Err(why) = verdict {
            violated("acked_bytes", format!("{}: {what} {path}: {why}", self.machine.name));
        }
    }

    async fn list(&self, fs: &FileSystem) {
        let root = self.root();
        self.model.borrow_mut().begin(Pending::Ask);
        let listed = fs.list_all(&root).await;
        self.model.borrow_mut().refused();
        let Ok(listed) = listed else { return };
        self.say(format!("list {root}: {} entries", listed.len()));
        let names: Vec<(String, u64)> = listed.into_iter().map(|status| (status.path, status.length)).collect();
        super::invariants::acked_names::check_listing(&self.model.borrow(), &root, &names, &self.machine.name);
    }

    async fn rename(&self, fs: &FileSystem) {
        let Some((from, _)) = self.model.borrow().some_closed(&self.entropy) else { return };
        let to = self.some_place();
        self.model.borrow_mut().begin(Pending::Rename { from: from.clone(), to: to.clone() });
        let result = fs.rename(&from, &to, RenameMode::NoReplace).await;
        self.settle(&format!("rename {from} {to}"), &result, &self.parent_missing(&to));
    }

    /// A file can be put straight below the root before that exists.
    fn parent_missing(&self, path: &str) -> Vec<ErrorCode> {
        let parent = path.rsplit_once('/').map_or("", |(parent, _)| parent);
        if parent == self.root() { vec![ErrorCode::FileNotFound] } else { Vec::new() }
    }

    async fn rename_dir(&self, fs: &FileSystem) {
        let Some(from) = self.model.borrow().some_dir(&self.entropy) else { return };
        let to = self.model.borrow_mut().fresh(&format!("{}/d", self.root()));
        self.model.borrow_mut().begin(Pending::RenameDir { from: from.clone(), to: to.clone() });
        let result = fs.rename(&from, &to, RenameMode::NoReplace).await;
        self.settle(&format!("rename {from} {to}"), &result, &[]);
    }

    async fn delete(&self, fs: &FileSystem) {
        let Some((path, _)) = self.model.borrow().some_closed(&self.entropy) else { return };
        self.model.borrow_mut().begin(Pending::Delete { path: path.clone() });
        let result = fs.delete(&path, false).await;
        if self.settle(&format!("delete {path}"), &result, &[]) && matches!(result, Ok(false)) {
            violated("acked_names", format!("{}: {path} was not there to be deleted", self.machine.name));
        }
    }

    async fn delete_dir(&self, fs: &FileSystem) {
        let Some(path) = self.model.borrow().some_dir(&self.entropy) else { return };
        self.model.borrow_mut().begin(Pending::DeleteDir { path: path.clone() });
        let result = fs.delete(&path, true).await;
        if self.settle(&format!("delete {path}"), &result, &[]) && matches!(result, Ok(false)) {
            violated("acked_names", format!("{}: {path} was not there to be deleted", self.machine.name));
        }
    }

    async fn truncate(&self, fs: &FileSystem) {
        let Some((path, file)) = self.model.borrow().some_closed(&self.entropy) else { return };
        let length = self.entropy.below(file.bytes.len() + 1);
        self.model.borrow_mut().begin(Pending::Truncate { path: path.clone(), length });
        let result = fs.truncate(&path, length).await;
        // The datanodes that hold the block that is cut may all be away.
        let expected = [ErrorCode::BlockNotFound];
        if self.settle(&format!("truncate {path} to {length}"), &result, &expected)
            && result.is_ok_and(|answer| !answer.done)
        {
            // It has its new length, and is open until the datanodes have cut its last block: left alone but for reading.
            self.with_file(&path, |file| file.closed = false);
        }
    }

    async fn concat(&self, fs: &FileSystem) {
        let Some((path, _)) = self.model.borrow().some_closed(&self.entropy) else { return };
        let Some((source, part)) = self.model.borrow().some_closed(&self.entropy) else { return };
        let parent = |path: &str| path.rsplit_once('/').map(|(parent, _)| parent.to_owned());
        if source == path || parent(&source) != parent(&path) || part.bytes.len() == 0 {
            return;
        }
        let sources = vec![source];
        self.model.borrow_mut().begin(Pending::Concat { path: path.clone(), sources: sources.clone() });
        let result = fs.concat(&path, &sources).await;
        // Refused where the two ask for different numbers of replicas, for one.
        let expected = [ErrorCode::InvalidArgument, ErrorCode::Unsupported];
        self.settle(&format!("concat {path} {}", sources.join(" ")), &result, &expected);
    }

    async fn mkdir(&self, fs: &FileSystem) {
        let parent = match self.entropy.below(3) {
            0 => self.model.borrow().some_dir(&self.entropy),
            _ => None,
        };
        let parent = parent.unwrap_or_else(|| self.root());
        let path = self.model.borrow_mut().fresh(&format!("{parent}/d"));
        self.model.borrow_mut().begin(Pending::Mkdir { path: path.clone() });
        let result = fs.mkdirs(&path, 0o755).await;
        self.settle(&format!("mkdir {path}"), &result, &[]);
    }

    async fn replicate(&self, fs: &FileSystem) {
        let Some((path, _)) = self.model.borrow().some_closed(&self.entropy) else { return };
        let least = self.shape.least_replicas;
        let replication = least + self.entropy.below(u64::from(4 - least)) as u32;
        self.model.borrow_mut().begin(Pending::Ask);
        let result = fs.set_replication(&path, replication).await;
        self.settle(&format!("setrep {path} {replication}"), &result, &[]);
    }
}

/// A part that was read: each possible file is cut the same way.
fn part_allowed(known: &Known, offset: u64, length: u64, bytes: &[u8]) -> Result<(), String> {
    let one = |file: &File| {
        if length < file.least_now() || length > file.bytes.len() {
            return Err(format!("{length} bytes long, expected {} to {}", file.least_now(), file.bytes.len()));
        }
        let all = file.bytes.all();
        match all.get(offset as usize..offset as usize + bytes.len()) {
            Some(part) if part == bytes => Ok(()),
            _ => Err(format!("bytes {offset} to {} differ", offset + bytes.len() as u64)),
        }
    };
    let states: Vec<&File> = match known {
        Known::Sure(file) => vec![file],
        Known::Unsure(states) => states.iter().flatten().collect(),
    };
    let refusals: Vec<String> = states.iter().filter_map(|file| one(file).err()).collect();
    if refusals.len() < states.len() { Ok(()) } else { Err(refusals.join("; or ")) }
}

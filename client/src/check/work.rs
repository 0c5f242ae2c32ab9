//! The tasks of a load, and the judge of what is left of it.

use std::future::Future;
use std::sync::Arc;

use cairn_common::entropy::Entropy;

use super::content::Content;
use super::ledger::{Entry, Fate};
use super::{Books, Shared, name};
use crate::fs::{AppendOptions, CreateOptions, Error, ErrorKind, FileSystem, FileWriter, RenameMode, Result};

/// A piece that a writer hands over, or a reader asks for.
const PIECE: u64 = 100_000;

/// One task.
pub(super) struct Worker {
    pub shared: Arc<Shared>,
    pub fs: FileSystem,
    pub random: Entropy,
    /// Its files are below.
    pub name: String,
}

/// What a read found.
enum Found {
    /// As much as this, all of it right.
    Right(u64),
    /// It is not there.
    Absent,
    /// Wrong bytes, or fewer or more than promised.
    Wrong(String),
}

impl Worker {
    /// Writes, renames and deletes until the load ends.
    pub async fn write_on(self) {
        let mut number = 0;
        if let Err(error) = self.fs.mkdirs(&self.name, 0o755).await {
            self.shared.books().tally.error(error.to_string());
        }
        let prefix = format!("{}/", self.name);
        while !self.shared.stopping() {
            let many = self.shared.books().ledger.acked_below(&prefix) >= self.shared.load.files_per_writer;
            match self.random.below(12) {
                _ if many => self.delete(&prefix).await,
                0 => self.delete(&prefix).await,
                1 => self.rename(&prefix, number).await,
                2 | 3 => self.append(&prefix).await,
                _ => {
                    number += 1;
                    self.write(&format!("{prefix}f{number}")).await;
                }
            }
            self.shared.env.clock.sleep(self.shared.load.pause).await;
        }
    }

    /// Reads closed files until the load ends.
    pub async fn read_on(self) {
        while !self.shared.stopping() {
            let pinned = self.shared.books().ledger.pin(|count| self.random.below(count));
            if let Some((path, entry)) = pinned {
                self.check(&path, &entry).await;
                self.shared.books().ledger.unpin(&path);
            }
            self.shared.env.clock.sleep(self.shared.load.pause).await;
        }
    }

    /// Reads a file, whole or in part, and notes what was found; whether it could be read.
    pub async fn check(&self, path: &str, entry: &Entry) -> bool {
        let whole = !entry.whole || self.random.below(3) > 0;
        match self.within(format!("read {path}"), self.read(path, entry, whole)).await {
            Some(found) => self.note(path, entry, found),
            None => return false,
        }
        true
    }

    /// Runs an operation; `None` if it failed or is stuck, which is noted.
    async fn within<T>(&self, what: String, operation: impl Future<Output = Result<T>>) -> Option<T> {
        let clock = &self.shared.env.clock;
        let started = clock.mono_ms();
        let ended = clock.timeout(self.shared.load.limit, operation).await;
        let mut books = self.shared.books();
        let tally = &mut books.tally;
        match ended {
            Ok(result) => {
                tally.longest_ms = tally.longest_ms.max(clock.mono_ms() - started);
                match result {
                    Ok(value) => Some(value),
                    Err(error) => {
                        tally.error(error.to_string());
                        None
                    }
                }
            }
            Err(elapsed) => {
                name(&mut tally.stuck, format!("{what}: {elapsed}"));
                None
            }
        }
    }

    async fn write(&self, path: &str) {
        let random = &self.random;
        // Small files are as many as large ones, and one is empty now and then.
        let most = self.shared.load.max_file_bytes;
        let scale = [1, 100, 10_000, most, most][random.below(5) as usize].min(most);
        let content = Content { seed: random.next_u64(), length: random.below(scale + 1) };
        self.shared.books().ledger.begin(path, content);
        let written = self.within(format!("write {path}"), self.write_file(path, content)).await;
        self.settle_write(path, content.length, written.is_some()).await;
    }

    async fn append(&self, prefix: &str) {
        let more = self.random.below(self.shared.load.max_file_bytes / 4 + 1);
        let grown = self.shared.books().ledger.grow(prefix, |count| self.random.below(count), more);
        let Some((path, content, before)) = grown else { return };
        let appended = self.within(format!("append to {path}"), self.append_file(&path, content, before)).await;
        if appended.is_some() {
            self.shared.books().tally.appends += 1;
        }
        self.settle_write(&path, more, appended.is_some()).await;
    }

    /// A write (or an append) was answered, or was not.
    async fn settle_write(&self, path: &str, bytes: u64, closed: bool) {
        if closed {
            let mut books = self.shared.books();
            books.ledger.set(path, Fate::Acked);
            books.tally.files_written += 1;
            books.tally.bytes_written += bytes;
            return;
        }
        // The name stays open in the hands of this client: what was promised must be in it, then it goes. If that cannot be read now, the
        // file stays until it can: deleted, it would never be asked for what was promised.
        self.shared.books().ledger.set(path, Fate::Cut);
        let entry = self.shared.books().ledger.get(path);
        if let Some(entry) = entry
            && !self.check(path, &entry).await
            && entry.promised > 0
        {
            return;
        }
        self.shared.books().ledger.set(path, Fate::Leaving);
        self.finish_delete(path).await;
    }

    async fn write_file(&self, path: &str, content: Content) -> Result<()> {
        let load = &self.shared.load;
        let options = CreateOptions {
            block_size: load.block_size,
            replication: load.replication,
            compress: self.random.below(4) > 0,
            ..Default::default()
        };
        let out = self.fs.create(path, options).await?;
        self.fill(path, out, content, 0).await
    }

    async fn append_file(&self, path: &str, content: Content, from: u64) -> Result<()> {
        let out = self.fs.append(path, AppendOptions::default()).await?;
        self.fill(path, out, content, from).await
    }

    async fn fill(&self, path: &str, out: FileWriter, content: Content, at: u64) -> Result<()> {
        let inode = out.inode();
        let filled = self.fill_and_close(path, out, content, at).await;
        if filled.is_err() && self.random.below(2) == 0 {
            // One that is told that its writer gives up is closed with what was promised; another one stays open.
            let _ = self.fs.release_lease(inode).await;
        }
        filled
    }

    async fn fill_and_close(&self, path: &str, mut out: FileWriter, content: Content, mut at: u64) -> Result<()> {
        while at < content.length {
            let end = content.length.min(at + 1 + self.random.below(2 * PIECE));
            out.write(&content.bytes(at..end)).await?;
            at = end;
            match self.random.below(40) {
                0 => out.flush().await?,
                1 => out.sync().await?,
                _ => continue,
            }
            self.shared.books().ledger.promise(path, at);
        }
        out.close().await?;
        Ok(())
    }

    async fn delete(&self, prefix: &str) {
        let taken = self.shared.books().ledger.take(prefix, |count| self.random.below(count), |_| Fate::Leaving);
        if let Some(path) = taken {
            self.finish_delete(&path).await;
        }
    }

    async fn finish_delete(&self, path: &str) {
        if let Some(was_there) = self.within(format!("delete {path}"), self.fs.delete(path, false)).await {
            let mut books = self.shared.books();
            if !was_there && books.ledger.get(path).is_some_and(|entry| entry.whole) {
                name(&mut books.tally.lost, format!("{path} was not there any more when it was deleted"));
            }
            books.ledger.set(path, Fate::Gone);
            books.tally.deletions += 1;
        }
    }

    async fn rename(&self, prefix: &str, number: u64) {
        let to = format!("{prefix}moved{number}-{}", self.random.below(1 << 40));
        let moving = Fate::Moving { to: to.clone() };
        let taken = self.shared.books().ledger.take(prefix, |count| self.random.below(count), |_| moving);
        let Some(from) = taken else { return };
        let renamed = self.fs.rename(&from, &to, RenameMode::NoReplace);
        if self.within(format!("rename {from}"), renamed).await.is_some() {
            let mut books = self.shared.books();
            books.ledger.moved(&from, &to);
            books.tally.renames += 1;
        }
    }

    /// Reads a file, or some ranges of it, and compares.
    async fn read(&self, path: &str, entry: &Entry, whole: bool) -> Result<Found> {
        let mut file = match self.fs.open(path).await {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Found::Absent),
            Err(error) => return Err(error),
        };
        let (content, length) = (entry.content, file.length());
        if entry.whole && length != content.length || length > content.length || length < entry.promised {
            let text = format!("{path}: {length} bytes, of {} written and {} promised", content.length, entry.promised);
            return Ok(Found::Wrong(text));
        }
        let wrong = |at| Found::Wrong(format!("{path}: a wrong byte at {at} of {length}"));
        let mut verified = 0;
        if !whole && length > 0 {
            for _ in 0..4 {
                let from = self.random.below(length);
                let bytes = file.read_range(from, 1 + self.random.below(PIECE)).await?;
                if let Some(at) = content.first_difference(from, &bytes) {
                    return Ok(wrong(at));
                }
                verified += bytes.len() as u64;
            }
            return Ok(Found::Right(verified));
        }
        while let Some(bytes) = file.next_chunk().await? {
            if let Some(at) = content.first_difference(verified, &bytes) {
                return Ok(wrong(at));
            }
            verified += bytes.len() as u64;
        }
        if verified < length.min(entry.content.length) {
            return Ok(Found::Wrong(format!("{path}: it ended after {verified} of {length} bytes")));
        }
        Ok(Found::Right(verified))
    }

    fn note(&self, path: &str, entry: &Entry, found: Found) {
        let Books { tally, .. } = &mut *self.shared.books();
        match found {
            Found::Right(bytes) => {
                tally.reads += 1;
                tally.bytes_verified += bytes;
            }
            Found::Absent if !entry.there => {}
            Found::Absent => name(&mut tally.lost, format!("{path} is not there")),
            Found::Wrong(text) => name(&mut tally.altered, text),
        }
    }

    /// Holds one file against its entry, when all faults are over: what fails now is lost.
    pub async fn judge(&self, path: &str, entry: &Entry) {
        let result = match &entry.fate {
            Fate::Gone => self.judge_gone(path).await,
            Fate::Moving { to } => self.judge_moved(path, to, entry).await,
            Fate::Leaving => self.judge_one(path, entry, true).await,
            Fate::Pending | Fate::Acked | Fate::Cut => self.judge_one(path, entry, !entry.there).await,
        };
        let lost = match result {
            Ok(None) => return,
            Ok(Some(text)) => text,
            Err(error) => format!("{path} cannot be read: {error}"),
        };
        name(&mut self.shared.books().tally.lost, lost);
    }

    async fn judge_gone(&self, path: &str) -> Result<Option<String>> {
        let found = self.bounded(self.fs.find(path)).await?;
        Ok(found.map(|_| format!("{path} was deleted (or renamed) and is there")))
    }

    async fn judge_moved(&self, from: &str, to: &str, entry: &Entry) -> Result<Option<String>> {
        let (old, new) = (self.bounded(self.fs.find(from)).await?, self.bounded(self.fs.find(to)).await?);
        match (old, new) {
            (Some(_), None) => self.judge_one(from, entry, false).await,
            (None, Some(_)) => self.judge_one(to, entry, false).await,
            (None, None) => Ok(Some(format!("{from} is gone, and is not at {to} either"))),
            (Some(_), Some(_)) => Ok(Some(format!("{from} is there twice, also at {to}"))),
        }
    }

    /// Reads all of it.
    async fn judge_one(&self, path: &str, entry: &Entry, may_be_absent: bool) -> Result<Option<String>> {
        match self.bounded(self.read(path, entry, true)).await? {
            Found::Absent if may_be_absent => {}
            Found::Absent => return Ok(Some(format!("{path} is not there"))),
            found => self.note(path, entry, found),
        }
        Ok(None)
    }

    async fn bounded<T>(&self, operation: impl Future<Output = Result<T>>) -> Result<T> {
        match self.shared.env.clock.timeout(self.shared.load.limit, operation).await {
            Ok(result) => result,
            Err(elapsed) => Err(Error::new(crate::fs::ErrorCode::TimedOut, elapsed.to_string())),
        }
    }
}

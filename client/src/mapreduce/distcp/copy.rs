//! Copying one file: aside, compared, renamed.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use cairn_common::Env;
use cairn_common::durable::{Fs, OpenMode};
use cairn_proto::path::{join, split_last};
use cairn_proto::{Error, ErrorCode, Result};

use super::Outcome;
use super::cluster::{self, Cluster, Writer};
use super::list::Item;
use crate::mapreduce::UserCounters;

/// Attempts at one file.
const ATTEMPTS: u32 = 3;
const RETRY_PAUSE: Duration = Duration::from_millis(300);
/// Piece in which a local file is read.
const LOCAL_PIECE_BYTES: u64 = 1 << 20;

/// Which attributes a copy has from its source.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[allow(missing_docs)]
pub struct Preserve {
    pub replication: bool,
    pub block_size: bool,
    pub user: bool,
    pub group: bool,
    pub permission: bool,
    pub times: bool,
}

impl Preserve {
    /// Of letters among `rbugpt`.
    pub fn parse(letters: &str) -> Result<Self> {
        let mut preserve = Self::default();
        for letter in letters.chars() {
            let flag = match letter {
                'r' => &mut preserve.replication,
                'b' => &mut preserve.block_size,
                'u' => &mut preserve.user,
                'g' => &mut preserve.group,
                'p' => &mut preserve.permission,
                't' => &mut preserve.times,
                other => {
                    let text = format!(
                        "{other:?} cannot be preserved: there are r (replication), b (block size), u (user), g (group), p (permission), t (times)"
                    );
                    return Err(Error::new(ErrorCode::InvalidArgument, text));
                }
            };
            *flag = true;
        }
        Ok(preserve)
    }
}

/// How files are copied.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Options {
    /// Folder of the target cluster for files that are not whole.
    pub staging: String,
    /// What a copy has from its source.
    pub preserve: Preserve,
    /// Leave what is equal.
    pub update: bool,
    /// Bytes a second; 0: no limit.
    pub bandwidth: u64,
}

/// Where files come from.
#[derive(Clone)]
pub enum Source {
    /// A cluster.
    Cluster(Cluster),
    /// Folders of this machine.
    Local(Arc<dyn Fs>),
}

/// Copies files one after the other.
pub struct Copier {
    env: Env,
    source: Source,
    target: Cluster,
    options: Options,
    /// Makes the names of its unfinished files its own.
    prefix: String,
    number: u64,
    /// When it may send the next byte, if the bandwidth is limited.
    next_ms: u64,
    /// Is told of every piece.
    watcher: UserCounters,
}

enum Reader {
    Cluster(cluster::Reader),
    Local { file: Arc<dyn cairn_common::durable::File>, path: PathBuf, at: u64 },
}

impl Copier {
    /// `prefix`: no other copier of the same staging folder has it.
    pub fn new(env: Env, source: Source, target: Cluster, options: Options, prefix: &str) -> Self {
        let watcher = UserCounters::default();
        Self { env, source, target, options, prefix: prefix.to_owned(), number: 0, next_ms: 0, watcher }
    }

    /// Tells `user` that its task lives, with every piece.
    #[must_use]
    pub fn watched(mut self, user: &UserCounters) -> Self {
        self.watcher = user.clone();
        self
    }

    /// Copies one file, with some patience.
    pub async fn copy(&mut self, item: &Item) -> Result<Outcome> {
        if self.options.update && item.existing == Some(item.length) && self.is_equal(item).await? {
            return Ok(Outcome::Skipped);
        }
        let mut attempt = 1;
        loop {
            self.number += 1;
            let aside = join(&self.options.staging, &format!("{}-{}", self.prefix, self.number));
            let error = match self.copy_once(item, &aside).await {
                Ok(()) => return Ok(Outcome::Copied),
                Err(error) => error,
            };
            // What cannot be removed now goes with the staging folder.
            let _ = self.target.delete(&aside, false).await;
            let hopeless = matches!(
                error.code(),
                ErrorCode::FileNotFound
                    | ErrorCode::PermissionDenied
                    | ErrorCode::InvalidArgument
                    | ErrorCode::NotADirectory
            );
            if hopeless || attempt == ATTEMPTS {
                return Err(error);
            }
            attempt += 1;
            self.env.clock.sleep(RETRY_PAUSE).await;
        }
    }

    /// Does the target hold the same bytes already?
    async fn is_equal(&self, item: &Item) -> Result<bool> {
        let Source::Cluster(source) = &self.source else { return self.local_is_equal(item).await };
        let (of_source, of_target) = tokio::join!(source.checksum(&item.source), self.target.checksum(&item.target));
        match of_target {
            Ok(of_target) => Ok(of_source? == of_target),
            // It went away: then it is copied.
            Err(error) if error.code() == ErrorCode::FileNotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    async fn local_is_equal(&self, item: &Item) -> Result<bool> {
        let mut reader = self.open(item).await?;
        let mut crc = 0;
        while let Some(piece) = self.next(&mut reader).await? {
            crc = crc32c::crc32c_append(crc, &piece);
        }
        let of_target = self.target.checksum(&item.target).await?;
        Ok(of_target.crc32c == crc)
    }

    async fn copy_once(&mut self, item: &Item, aside: &str) -> Result<()> {
        let preserve = self.options.preserve;
        let mut reader = self.open(item).await?;
        let replication = if preserve.replication { item.replication } else { 0 };
        let block_size = if preserve.block_size { item.block_size } else { 0 };
        let mut writer = self.target.create(aside, replication, block_size).await?;
        let crc = match self.pour(&mut reader, &mut writer).await {
            Ok(crc) => crc,
            Err(error) => {
                // The caller removes the file in any case.
                writer.abort().await;
                return Err(error);
            }
        };
        let written = writer.close().await?;
        self.compare(item, aside, crc, written).await?;
        self.dress(item, aside).await?;
        if let Some((parent, _)) = split_last(&item.target) {
            self.target.mkdirs(parent, 0o755).await?;
        }
        self.target.replace(aside, &item.target).await
    }

    async fn pour(&mut self, reader: &mut Reader, writer: &mut Writer) -> Result<u32> {
        let mut crc = 0;
        while let Some(piece) = self.next(reader).await? {
            crc = crc32c::crc32c_append(crc, &piece);
            self.watcher.progressed();
            self.pace(piece.len() as u64).await;
            writer.write(piece).await?;
        }
        Ok(crc)
    }

    /// Waits as long as the bandwidth asks.
    async fn pace(&mut self, bytes: u64) {
        if self.options.bandwidth == 0 {
            return;
        }
        let clock = self.env.clock.clone();
        let now_ms = clock.mono_ms();
        if self.next_ms > now_ms {
            clock.sleep(Duration::from_millis(self.next_ms - now_ms)).await;
        }
        // What was not used before is not made up for.
        self.next_ms = self.next_ms.max(now_ms) + bytes.saturating_mul(1_000) / self.options.bandwidth;
    }

    /// Is what the datanodes hold what was read, and what was read what the source holds?
    async fn compare(&self, item: &Item, aside: &str, crc: u32, length: u64) -> Result<()> {
        let of_target = self.target.checksum(aside).await?;
        if (of_target.crc32c, of_target.length) != (crc, length) {
            let text = format!("the copy of {} has checksum {:08x}, not {crc:08x}", item.source, of_target.crc32c);
            return Err(Error::new(ErrorCode::Corrupt, text).with_subject(item.source.clone()));
        }
        let now = match &self.source {
            Source::Cluster(source) => source.status(&item.source).await.map(|status| status.length)?,
            Source::Local(fs) => {
                let (fs, path) = (Arc::clone(fs), PathBuf::from(&item.source));
                let metadata = self.env.work.io(move || fs.metadata(&path)).await;
                metadata.ok().flatten().map_or(0, |metadata| metadata.len)
            }
        };
        if now != length {
            let text = format!("{} changed while it was copied: it had {length} bytes and has {now}", item.source);
            return Err(Error::new(ErrorCode::InvalidArgument, text).with_subject(item.source.clone()));
        }
        Ok(())
    }

    /// Gives the copy its attributes.
    async fn dress(&self, item: &Item, aside: &str) -> Result<()> {
        let preserve = self.options.preserve;
        if preserve.permission {
            self.target.set_permission(aside, item.permission).await?;
        }
        let owner = Some(item.owner.as_str()).filter(|owner| preserve.user && !owner.is_empty());
        let group = Some(item.group.as_str()).filter(|group| preserve.group && !group.is_empty());
        if owner.is_some() || group.is_some() {
            self.target.set_owner(aside, owner, group).await?;
        }
        if preserve.times {
            self.target.set_modified(aside, item.modified_ms).await?;
        }
        Ok(())
    }

    async fn open(&self, item: &Item) -> Result<Reader> {
        match &self.source {
            Source::Cluster(cluster) => Ok(Reader::Cluster(cluster.open(&item.source).await?)),
            Source::Local(fs) => {
                let (fs, path) = (Arc::clone(fs), PathBuf::from(&item.source));
                let opened = {
                    let path = path.clone();
                    self.env.work.io(move || fs.open(&path, OpenMode::Read)).await
                };
                let file = opened.map_err(|error| Error::io(format!("cannot read {}", path.display()), &error))?;
                Ok(Reader::Local { file, path, at: 0 })
            }
        }
    }

    async fn next(&self, reader: &mut Reader) -> Result<Option<Bytes>> {
        match reader {
            Reader::Cluster(reader) => reader.next().await,
            Reader::Local { file, path, at } => {
                let (file, offset) = (Arc::clone(file), *at);
                let read = self.env.work.io(move || {
                    let mut piece = vec![0; LOCAL_PIECE_BYTES as usize];
                    let count = file.read_at(&mut piece, offset)?;
                    piece.truncate(count);
                    std::io::Result::Ok(piece)
                });
                let piece = read.await.map_err(|error| Error::io(format!("cannot read {}", path.display()), &error))?;
                *at += piece.len() as u64;
                Ok((!piece.is_empty()).then(|| Bytes::from(piece)))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_name_what_is_preserved() {
        let preserve = Preserve::parse("rbp").unwrap();
        assert!(
            preserve.replication && preserve.block_size && preserve.permission && !preserve.user && !preserve.times
        );
        assert_eq!(Preserve::parse("").unwrap(), Preserve::default());
        assert!(Preserve::parse("rx").unwrap_err().message().contains("'x'"));
    }
}

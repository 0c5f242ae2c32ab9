//! What every command works with: the machine, the settings, standard output, and what to take away if it does not get to its end.

use std::future::Future;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cairn_client::fs::{ClientSettings, ErrorCode, FileStatus, FileSystem};
use cairn_common::Env;

use crate::args::{DEFAULT_NAMENODE, Global};
use crate::config::Config;
use crate::output::{Out, Outcome, failure};

/// Longest time that cleaning up may take after Ctrl-C: a namenode that is away must not hold the prompt.
const CLEANUP_LIMIT: Duration = Duration::from_secs(5);

/// One run of the program.
pub struct Context {
    pub env: Env,
    pub global: Global,
    pub config: Config,
    pub out: Out,
    pub leftovers: Leftovers,
    /// Jobs are driven by a node of the cluster, not by this process.
    pub detach: bool,
}

impl Context {
    /// Reads the settings.
    pub fn new(env: Env, global: Global) -> Outcome<Self> {
        let config = Config::load(&env, global.config.as_deref(), &global.set)?;
        let out = Out::new(global.json);
        Ok(Self { env, global, config, out, leftovers: Leftovers::default(), detach: false })
    }

    /// The client's settings: file, environment, flags.
    pub fn client_settings(&self) -> Outcome<ClientSettings> {
        let mut settings = self.config.table("client", &ClientSettings::at(DEFAULT_NAMENODE))?;
        if let Some(address) = &self.global.namenode {
            settings.namenode.clone_from(address);
        }
        if let Some(user) = &self.global.user {
            settings.user = Some(user.clone());
        }
        settings.validate()?;
        Ok(settings)
    }

    /// Connects to the namenode.
    pub async fn connect(&self) -> Outcome<FileSystem> {
        Ok(FileSystem::connect(self.env.clone(), self.client_settings()?).await?)
    }
}

/// Something half made.
#[derive(Clone, Debug)]
enum Leftover {
    Local(PathBuf),
    Remote(String),
    /// A file that is open for appending.
    Open(u64),
}

/// Half-made things of this run; what is still here at the end of the program, however it comes, is removed.
#[derive(Clone, Default)]
pub struct Leftovers {
    list: Arc<Mutex<Vec<(u64, Leftover)>>>,
    fs: Arc<Mutex<Option<FileSystem>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Leftovers {
    fn add(&self, leftover: Leftover) -> u64 {
        let mut list = lock(&self.list);
        let ticket = list.last().map_or(1, |(last, _)| last + 1);
        list.push((ticket, leftover));
        ticket
    }

    /// A local file or folder that must not stay unless [`Leftovers::keep`] is called with the ticket.
    pub fn local(&self, path: PathBuf) -> u64 {
        self.add(Leftover::Local(path))
    }

    /// The same in the cluster.
    pub fn remote(&self, fs: &FileSystem, path: &str) -> u64 {
        *lock(&self.fs) = Some(fs.clone());
        self.add(Leftover::Remote(path.to_owned()))
    }

    /// A file of the cluster that must not stay open: it is closed with what it has.
    pub fn open_file(&self, fs: &FileSystem, inode: u64) -> u64 {
        *lock(&self.fs) = Some(fs.clone());
        self.add(Leftover::Open(inode))
    }

    /// It is whole now.
    pub fn keep(&self, ticket: u64) {
        lock(&self.list).retain(|(other, _)| *other != ticket);
    }

    /// Removes what is left, the newest first; best effort. For a cluster that is away it does not wait long.
    pub async fn remove(&self, env: &Env) {
        let fs = lock(&self.fs).clone();
        let mut left = CLEANUP_LIMIT;
        loop {
            let next = lock(&self.list).pop();
            let began_ms = env.clock.mono_ms();
            match (next, &fs) {
                (None, _) => return,
                (Some((_, Leftover::Local(path))), _) => {
                    let _ = env.clock.timeout(LOCAL_LIMIT, remove_local(env, path)).await;
                    continue;
                }
                (Some((_, Leftover::Remote(path))), Some(fs)) => {
                    // Gone already, or out of reach: nothing more can be done from here.
                    let _ = env.clock.timeout(left, fs.delete(&path, true)).await;
                }
                (Some((_, Leftover::Open(inode))), Some(fs)) => {
                    // The namenode goes on by itself once it was asked.
                    let _ = env.clock.timeout(left, fs.release_lease(inode)).await;
                }
                (Some((_, Leftover::Remote(_) | Leftover::Open(_))), None) => {}
            }
            left = left.saturating_sub(Duration::from_millis(env.clock.mono_ms().saturating_sub(began_ms)));
        }
    }
}

/// A process that was killed a moment ago may still write in a folder that is removed: then it is removed again.
const LOCAL_ATTEMPTS: u32 = 10;
/// A large folder on a slow disk takes its time, but a disk that hangs keeps nobody.
const LOCAL_LIMIT: Duration = Duration::from_secs(60);
const LOCAL_PAUSE: Duration = Duration::from_millis(100);

async fn remove_local(env: &Env, path: PathBuf) {
    for _ in 0..LOCAL_ATTEMPTS {
        let (fs, path) = (Arc::clone(&env.fs), path.clone());
        let remove = move || match fs.metadata(&path) {
            Ok(Some(metadata)) if metadata.is_dir => fs.remove_dir_all(&path),
            Ok(Some(_)) => fs.remove_file(&path),
            _ => Ok(()),
        };
        match env.work.io(remove).await {
            Err(error) if error.kind() == std::io::ErrorKind::DirectoryNotEmpty => env.clock.sleep(LOCAL_PAUSE).await,
            _ => return,
        }
    }
}

/// Does `text` hold a character that a glob gives a meaning to?
fn is_pattern(text: &str) -> bool {
    text.contains(['*', '?', '[', '{', '\\'])
}

/// The files and directories that `pattern` means; at least one, or an error that says so.
pub async fn expand(fs: &FileSystem, pattern: &str) -> Outcome<Vec<FileStatus>> {
    if !is_pattern(pattern) {
        return Ok(vec![fs.status(pattern).await?]);
    }
    let found = fs.glob(pattern).await?;
    if !found.is_empty() {
        return Ok(found);
    }
    // A name may hold such characters itself.
    match fs.find(pattern).await? {
        Some(status) => Ok(vec![status]),
        None => Err(failure(ErrorCode::FileNotFound, format!("nothing matches {pattern}"))),
    }
}

/// [`expand`] for several, in their order.
pub async fn expand_all(fs: &FileSystem, patterns: &[String]) -> Outcome<Vec<FileStatus>> {
    let mut all = Vec::new();
    for pattern in patterns {
        all.extend(expand(fs, pattern).await?);
    }
    Ok(all)
}

/// The one thing that `pattern` means.
pub async fn expand_one(fs: &FileSystem, pattern: &str) -> Outcome<FileStatus> {
    let mut found = expand(fs, pattern).await?;
    match (found.pop(), found.len()) {
        (Some(one), 0) => Ok(one),
        (_, more) => {
            Err(failure(ErrorCode::InvalidArgument, format!("{pattern} matches {} names; give one", more + 1)))
        }
    }
}

/// Runs `futures` a few at a time and hands out their results as they come; stops at the first error.
pub async fn in_parallel<F, T>(limit: usize, futures: impl IntoIterator<Item = F>, mut each: impl FnMut(T)) -> Outcome
where
    F: Future<Output = Outcome<T>>,
{
    use futures_util::StreamExt;
    let mut stream = std::pin::pin!(futures_util::stream::iter(futures).buffer_unordered(limit));
    while let Some(result) = stream.next().await {
        each(result?);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_a_glob() {
        assert!(is_pattern("/a/*.gz") && is_pattern("/a?") && is_pattern("/{a,b}") && is_pattern("/[ab]"));
        assert!(!is_pattern("/plain/name-1.txt"));
    }

    #[tokio::test]
    async fn what_is_not_kept_is_removed() {
        let env = Env::system();
        let dir = tempfile::tempdir().unwrap();
        let leftovers = Leftovers::default();
        let mut tickets = Vec::new();
        for name in ["half", "whole", "folder"] {
            let path = dir.path().join(name);
            if name == "folder" {
                env.fs.create_dir_all(&path.join("inner")).unwrap();
            } else {
                cairn_common::durable::write_atomic(&*env.fs, &path, b"x").unwrap();
            }
            tickets.push(leftovers.local(path));
        }
        leftovers.keep(tickets[1]);
        leftovers.remove(&env).await;
        let left: Vec<String> = env.fs.read_dir(dir.path()).unwrap().into_iter().map(|entry| entry.name).collect();
        assert_eq!(left, ["whole"]);
    }
}

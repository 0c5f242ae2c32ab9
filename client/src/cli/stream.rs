//! Bytes from here to there: local files, standard input and output, files of the cluster.
//!
//! What is written goes to a sibling under a temporary name and gets its own name at the end, so nobody sees half a file under the name that
//! was asked for. The temporary one is a [leftover](crate::context::Leftovers) until then.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use cairn_client::fs::{CreateOptions, Error, ErrorCode, FileReader, FileSystem, RenameMode};
use cairn_common::durable::{File, OpenMode};
use cairn_common::{Env, work::Work};
use cairn_proto::path;
use tokio::task::JoinHandle;

use crate::args::{CodecArg, WriteArgs};
use crate::context::Context;
use crate::names::FILE_MODE;
use crate::output::{Outcome, failure, stdout_failure, write_stdout};
use crate::progress::Progress;

/// One read of a local file. Larger: more memory; smaller: more hops between threads.
const READ_BYTES: usize = 1 << 20;

/// Where bytes come from.
pub enum Source {
    Local(LocalInput),
    Cluster(Box<FileReader>),
}

impl Source {
    /// The next bytes; `None` at the end.
    pub async fn next(&mut self) -> Outcome<Option<Bytes>> {
        match self {
            Self::Local(input) => input.next().await,
            Self::Cluster(reader) => Ok(reader.next_chunk().await?),
        }
    }
}

type ReadResult = std::io::Result<Vec<u8>>;

/// A local file, pipe or standard input, read one piece ahead.
pub struct LocalInput {
    fd: Arc<OwnedFd>,
    named: String,
    work: Work,
    ahead: Option<JoinHandle<ReadResult>>,
}

impl LocalInput {
    /// Opens a file or whatever else can be read by that name.
    pub async fn open(env: &Env, path: &Path) -> Outcome<Self> {
        let (owned, named) = (path.to_owned(), path.display().to_string());
        let opened = env.work.io(move || std::fs::File::open(owned)).await;
        let file = opened.map_err(|error| local_error("cannot read", path, &error))?;
        Ok(Self { fd: Arc::new(file.into()), named, work: env.work.clone(), ahead: None })
    }

    /// Standard input.
    pub fn stdin(env: &Env) -> Outcome<Self> {
        let fd = rustix::io::dup(rustix::stdio::stdin())
            .map_err(|error| Error::io("cannot read standard input", &error.into()))?;
        Ok(Self { fd: Arc::new(fd), named: "standard input".into(), work: env.work.clone(), ahead: None })
    }

    fn start(&self) -> JoinHandle<ReadResult> {
        let (fd, work) = (Arc::clone(&self.fd), self.work.clone());
        tokio::spawn(async move { work.io(move || read_piece(&fd)).await })
    }

    async fn next(&mut self) -> Outcome<Option<Bytes>> {
        let ahead = self.ahead.take().unwrap_or_else(|| self.start());
        let read = ahead.await.unwrap_or_else(|error| Err(std::io::Error::other(error)));
        let piece = read.map_err(|error| Error::io(format_args!("cannot read {}", self.named), &error))?;
        if piece.is_empty() {
            return Ok(None);
        }
        if piece.len() == READ_BYTES {
            self.ahead = Some(self.start());
        }
        Ok(Some(piece.into()))
    }
}

/// Fills a piece, or less at the end.
fn read_piece(fd: &OwnedFd) -> ReadResult {
    let mut piece = Vec::with_capacity(READ_BYTES);
    while piece.len() < READ_BYTES {
        match rustix::io::read(fd, rustix::buffer::spare_capacity(&mut piece)) {
            Ok(0) => break,
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(piece)
}

/// What failed with which local file.
pub fn local_error(doing: &str, path: &Path, error: &std::io::Error) -> crate::output::Failure {
    let named = path.display();
    let told = match error.kind() {
        std::io::ErrorKind::NotFound => Error::new(ErrorCode::FileNotFound, format!("{doing} {named}: no such file")),
        std::io::ErrorKind::PermissionDenied => {
            Error::new(ErrorCode::PermissionDenied, format!("{doing} {named}: permission denied"))
        }
        _ => Error::io(format_args!("{doing} {named}"), error),
    };
    told.into()
}

/// A name beside `name` that nobody else uses; hidden, and short enough to be a name.
pub fn temporary_name(env: &Env, name: &str) -> String {
    let mut kept = name.len().min(200);
    while !name.is_char_boundary(kept) {
        kept -= 1;
    }
    format!(".{}._COPYING_{:08x}", &name[..kept], env.entropy.next_u64() as u32)
}

/// A sibling of `target` in the cluster.
pub fn temporary_sibling(env: &Env, target: &str) -> String {
    let (parent, name) = path::split_last(target).unwrap_or(("/", "root"));
    path::join(parent, &temporary_name(env, name))
}

/// How files are stored, as asked for.
pub fn create_options(args: &WriteArgs) -> CreateOptions {
    CreateOptions {
        replication: args.replication.unwrap_or(0),
        block_size: args.block_size.unwrap_or(0),
        compress: args.codec != Some(CodecArg::None),
        permission: FILE_MODE,
        ..CreateOptions::default()
    }
}

/// How a file is stored when nothing was asked for.
pub fn default_options() -> CreateOptions {
    CreateOptions { permission: FILE_MODE, ..CreateOptions::default() }
}

/// Stores all of `source` as `target`, which appears when it is whole and durable.
pub async fn store(
    context: &Context,
    fs: &FileSystem,
    source: &mut Source,
    target: &str,
    options: &CreateOptions,
    replace: bool,
    progress: &Progress,
) -> Outcome {
    let aside = temporary_sibling(&context.env, target);
    // People asked for the target and never heard of the other name.
    let told = |error: Error| Error::new(error.code(), error.message().replace(&aside, target)).with_subject(target);
    let ticket = context.leftovers.remote(fs, &aside);
    fill(fs, source, &aside, options, progress).await.map_err(|failed| match failed {
        crate::output::Failure::Error(error) => told(error).into(),
        other => other,
    })?;
    let mode = if replace { RenameMode::Overwrite } else { RenameMode::NoReplace };
    fs.rename(&aside, target, mode).await.map_err(told)?;
    context.leftovers.keep(ticket);
    Ok(())
}

/// Creates `path` and writes all of `source` to it.
pub async fn fill(
    fs: &FileSystem,
    source: &mut Source,
    path: &str,
    options: &CreateOptions,
    progress: &Progress,
) -> Outcome {
    let mut writer = fs.create(path, options.clone()).await?;
    while let Some(piece) = source.next().await? {
        let length = piece.len() as u64;
        writer.write_bytes(piece).await?;
        progress.add(length);
    }
    writer.close().await?;
    Ok(())
}

/// Where bytes go on this machine.
pub enum Sink {
    /// Standard output.
    Stdout,
    /// A new file.
    File(Arc<dyn File>, u64, PathBuf),
    /// A device or pipe that is there already.
    Special(Arc<OwnedFd>, PathBuf),
}

impl Sink {
    /// A new file.
    pub async fn create(env: &Env, path: &Path) -> Outcome<Self> {
        let (fs, owned) = (Arc::clone(&env.fs), path.to_owned());
        let opened = env.work.io(move || fs.open(&owned, OpenMode::Create)).await;
        let file = opened.map_err(|error| local_error("cannot write", path, &error))?;
        Ok(Self::File(file, 0, path.to_owned()))
    }

    /// A device or pipe.
    pub async fn special(env: &Env, path: &Path) -> Outcome<Self> {
        let owned = path.to_owned();
        let opened = env.work.io(move || std::fs::OpenOptions::new().write(true).open(owned)).await;
        let file = opened.map_err(|error| local_error("cannot write", path, &error))?;
        Ok(Self::Special(Arc::new(file.into()), path.to_owned()))
    }

    /// Writes all of `bytes`.
    pub async fn write(&mut self, work: &Work, bytes: Bytes) -> Outcome {
        match self {
            Self::Stdout => work.io(move || write_stdout(&bytes)).await.map_err(|error| stdout_failure(&error)),
            Self::File(file, at, path) => {
                let (file, offset) = (Arc::clone(file), *at);
                *at += bytes.len() as u64;
                let written = work.io(move || file.write_all_at(&bytes, offset)).await;
                written.map_err(|error| local_error("cannot write", path, &error))
            }
            Self::Special(fd, path) => {
                let fd = Arc::clone(fd);
                let written = work.io(move || write_all(&fd, &bytes)).await;
                written.map_err(|error| local_error("cannot write", path, &error))
            }
        }
    }
}

fn write_all(fd: &OwnedFd, mut bytes: &[u8]) -> std::io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::write(fd, bytes) {
            Ok(0) => return Err(std::io::ErrorKind::WriteZero.into()),
            Ok(count) => bytes = &bytes[count..],
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// All of a file of the cluster to `sink`.
pub async fn drain(work: &Work, reader: &mut FileReader, sink: &mut Sink, progress: &Progress) -> Outcome {
    while let Some(piece) = reader.next_chunk().await? {
        let length = piece.len() as u64;
        sink.write(work, piece).await?;
        progress.add(length);
    }
    Ok(())
}

/// Gives a local file or folder its name. Without `replace` one that came to be meanwhile is left alone.
pub async fn rename_local(env: &Env, from: &Path, to: &Path, replace: bool) -> Outcome {
    let (fs, source, target) = (Arc::clone(&env.fs), from.to_owned(), to.to_owned());
    let rename = move || {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        if replace {
            return fs.rename(&source, &target);
        }
        match renameat_with(CWD, &source, CWD, &target, RenameFlags::NOREPLACE) {
            // Some file systems cannot do it in one step.
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => fs.rename(&source, &target),
            other => Ok(other?),
        }
    };
    env.work.io(rename).await.map_err(|error| match error.kind() {
        std::io::ErrorKind::AlreadyExists => exists_locally(to),
        _ => local_error("cannot write", to, &error),
    })
}

/// The refusal of a local target that is there.
pub fn exists_locally(path: &Path) -> crate::output::Failure {
    failure(ErrorCode::FileAlreadyExists, format!("{} exists already: use -f to replace it", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn temporary_names_are_names() {
        let env = Env::system();
        for name in ["a", &"x".repeat(255), &"é".repeat(127)] {
            let temporary = temporary_name(&env, name);
            assert!(path::check_name(&temporary).is_ok(), "{temporary}");
            assert!(temporary.starts_with('.') && temporary.contains("._COPYING_"));
        }
        assert_ne!(temporary_name(&env, "a"), temporary_name(&env, "a"));
        assert!(temporary_sibling(&env, "/d/f").starts_with("/d/.f._COPYING_"));
        assert!(temporary_sibling(&env, "/f").starts_with("/.f._COPYING_"));
    }

    #[tokio::test]
    async fn local_files_are_read_whole() {
        let env = Env::system();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        for length in [0, 1, READ_BYTES - 1, READ_BYTES, READ_BYTES + 1, 3 * READ_BYTES] {
            let bytes: Vec<u8> = (0..length).map(|at| (at % 251) as u8).collect();
            cairn_common::durable::write_atomic(&*env.fs, &path, &bytes).unwrap();
            let mut input = LocalInput::open(&env, &path).await.unwrap();
            let mut read = Vec::new();
            while let Some(piece) = input.next().await.unwrap() {
                read.extend_from_slice(&piece);
            }
            assert!(read == bytes, "{length}");
        }
    }

    #[tokio::test]
    async fn a_rename_without_replace_leaves_what_is_there() {
        let env = Env::system();
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        for path in [&a, &b] {
            cairn_common::durable::write_atomic(&*env.fs, path, path.as_os_str().as_encoded_bytes()).unwrap();
        }
        assert!(rename_local(&env, &a, &b, false).await.is_err());
        rename_local(&env, &a, &b, true).await.unwrap();
        assert_eq!(std::fs::read(&b).unwrap(), a.as_os_str().as_encoded_bytes());
    }
}

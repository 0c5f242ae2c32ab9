//! `get`, `cat`, `head`, `tail`: bytes out of the cluster.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use cairn_client::fs::{Error, ErrorCode, FileReader, FileStatus, FileSystem};
use cairn_common::Env;

use crate::args::{CatArgs, EndArgs, GetArgs, TailArgs, cluster_path};
use crate::context::{Context, expand_all, expand_one, in_parallel};
use crate::names::name_of;
use crate::output::{Failure, Outcome, complain, failure};
use crate::progress::Progress;
use crate::show::is_directory;
use crate::stream::{Sink, drain, exists_locally, local_error, rename_local, temporary_name};

/// Files fetched at a time when a directory is copied.
const FILES_AT_ONCE: usize = 4;
/// One answer of `tail`.
const TAIL_PIECE: u64 = 1 << 20;
/// How soon a follower looks again after something came, and how seldom when nothing comes for long.
const FOLLOW_SOON: Duration = Duration::from_millis(100);
const FOLLOW_IDLE: Duration = Duration::from_millis(800);

/// What stands at a local path.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Local {
    Nothing,
    Folder,
    File,
    /// A device, a pipe, ...
    Special,
}

fn look(path: &Path) -> Outcome<Local> {
    match std::fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => Ok(Local::Folder),
        Ok(metadata) if metadata.is_file() => Ok(Local::File),
        Ok(_) => Ok(Local::Special),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Local::Nothing),
        Err(error) => Err(local_error("cannot write", path, &error)),
    }
}

async fn connect(context: &Context, no_short_circuit: bool, hedged_after: Option<u64>) -> Outcome<FileSystem> {
    let mut settings = context.client_settings()?;
    settings.short_circuit &= !no_short_circuit;
    settings.hedged_after_ms = hedged_after.unwrap_or(settings.hedged_after_ms);
    Ok(FileSystem::connect(context.env.clone(), settings).await?)
}

fn check_file(status: &FileStatus) -> Outcome {
    if is_directory(status) {
        return Err(failure(ErrorCode::NotAFile, format!("{} is a directory", status.path)));
    }
    Ok(())
}

/// `get`
pub async fn get(context: &mut Context, args: &GetArgs) -> Outcome {
    let Some((target, sources)) = args.names.split_last() else { return Ok(()) };
    let sources: Result<Vec<String>, String> = sources.iter().map(|source| cluster_path(source)).collect();
    let sources = sources.map_err(Failure::Usage)?;
    let fs = connect(context, args.no_short_circuit, args.hedged_after).await?;
    let found = expand_all(&fs, &sources).await?;
    if target == "-" {
        return print(context, &fs, &found).await;
    }
    let to = Path::new(target);
    let at_target = look(to)?;
    if found.len() > 1 && at_target != Local::Folder {
        let text = format!("{target} must be a folder: there are {} sources", found.len());
        return Err(failure(ErrorCode::NotADirectory, text));
    }
    let mut planned = Vec::new();
    for status in found {
        planned.push(plan(status, to, at_target, args.force)?);
    }
    let sizes = planned.iter().map(|(status, _, _)| (!is_directory(status)).then_some(status.length));
    let progress = Progress::start(context, "get", sizes.sum());
    for (status, target, there) in planned {
        if is_directory(&status) {
            get_folder(context, &fs, &status, &target, there, &progress).await?;
        } else {
            get_file(context, &fs, &status.path, &target, there, &progress).await?;
        }
    }
    progress.finish().await;
    Ok(())
}

/// Where one source goes and what is there; refuses before anything is read.
fn plan(status: FileStatus, to: &Path, at_target: Local, force: bool) -> Outcome<(FileStatus, PathBuf, Local)> {
    let target = if at_target == Local::Folder { to.join(name_of(&status.path)?) } else { to.to_owned() };
    let there = if at_target == Local::Folder { look(&target)? } else { at_target };
    let shown = target.display();
    match (there, is_directory(&status)) {
        (Local::Nothing, _) => {
            let parent = target.parent().filter(|parent| !parent.as_os_str().is_empty());
            if let Some(parent) = parent.filter(|parent| !parent.is_dir()) {
                return Err(failure(ErrorCode::FileNotFound, format!("there is no local folder {}", parent.display())));
            }
        }
        (Local::Special, false) => {}
        (Local::File | Local::Special, true) => {
            return Err(failure(ErrorCode::NotADirectory, format!("{shown} is no folder, but {} is", status.path)));
        }
        (Local::Folder, false) => {
            return Err(failure(ErrorCode::NotAFile, format!("{shown} is a folder, but {} is a file", status.path)));
        }
        (Local::File | Local::Folder, _) if !force => return Err(exists_locally(&target)),
        (Local::File | Local::Folder, _) => {}
    }
    Ok((status, target, there))
}

fn aside(env: &Env, target: &Path) -> PathBuf {
    let name = target.file_name().map_or("file".into(), |name| name.to_string_lossy().into_owned());
    target.with_file_name(temporary_name(env, &name))
}

async fn get_file(
    context: &Context,
    fs: &FileSystem,
    path: &str,
    target: &Path,
    there: Local,
    progress: &Progress,
) -> Outcome {
    let env = &context.env;
    let mut reader = fs.open(path).await?;
    if there == Local::Special {
        let mut sink = Sink::special(env, target).await?;
        return drain(&env.work, &mut reader, &mut sink, progress).await;
    }
    let aside = aside(env, target);
    let ticket = context.leftovers.local(aside.clone());
    let mut sink = Sink::create(env, &aside).await?;
    drain(&env.work, &mut reader, &mut sink, progress).await?;
    rename_local(env, &aside, target, there == Local::File).await?;
    context.leftovers.keep(ticket);
    Ok(())
}

/// A folder that is not there appears as a whole; one that is there gets file after file.
async fn get_folder(
    context: &Context,
    fs: &FileSystem,
    status: &FileStatus,
    target: &Path,
    there: Local,
    progress: &Progress,
) -> Outcome {
    let env = &context.env;
    let is_there = there == Local::Folder;
    let root = if is_there { target.to_owned() } else { aside(env, target) };
    let ticket = (!is_there).then(|| context.leftovers.local(root.clone()));
    let mut folders = vec![root.clone()];
    let mut files = Vec::new();
    let mut walk = fs.walk(&status.path).await?;
    let prefix = if status.path == "/" { "/".to_owned() } else { format!("{}/", status.path) };
    while let Some(entry) = walk.next().await? {
        let Some(inside) = entry.path.strip_prefix(&prefix).filter(|inside| !inside.is_empty()) else { continue };
        let local = root.join(inside);
        if is_directory(&entry) { folders.push(local) } else { files.push((entry.path, local)) }
    }
    let disk = Arc::clone(&env.fs);
    let made = env.work.io(move || folders.iter().try_for_each(|folder| disk.create_dir_all(folder))).await;
    made.map_err(|error| local_error("cannot write", &root, &error))?;
    let gets = files.iter().map(|(path, local)| async move {
        let there = if is_there { look(local)? } else { Local::Nothing };
        get_file(context, fs, path, local, there, progress).await
    });
    in_parallel(FILES_AT_ONCE, gets, |()| {}).await?;
    if let Some(ticket) = ticket {
        rename_local(env, &root, target, false).await?;
        context.leftovers.keep(ticket);
    }
    Ok(())
}

/// `cat`
pub async fn cat(context: &mut Context, args: &CatArgs) -> Outcome {
    let fs = connect(context, args.no_short_circuit, args.hedged_after).await?;
    let found = expand_all(&fs, &args.paths).await?;
    print(context, &fs, &found).await
}

async fn print(context: &Context, fs: &FileSystem, found: &[FileStatus]) -> Outcome {
    found.iter().try_for_each(check_file)?;
    let bar = if std::io::IsTerminal::is_terminal(&std::io::stdout()) {
        // What is printed is progress enough, and a bar would run through it.
        None
    } else {
        Some(Progress::start(context, "cat", Some(found.iter().map(|status| status.length).sum())))
    };
    let none = Progress::none();
    let progress = bar.as_ref().unwrap_or(&none);
    for status in found {
        let mut reader = fs.open(&status.path).await?;
        drain(&context.env.work, &mut reader, &mut Sink::Stdout, progress).await?;
    }
    if let Some(bar) = bar {
        bar.finish().await;
    }
    Ok(())
}

/// `head`
pub async fn head(context: &mut Context, args: &EndArgs) -> Outcome {
    let reader = open_one(context, args).await?;
    let (mut at, end) = (0, args.bytes.min(reader.length()));
    copy(context, &reader, &mut at, end).await
}

/// `tail`
pub async fn tail(context: &mut Context, args: &TailArgs) -> Outcome {
    let mut reader = open_one(context, &args.end).await?;
    let length = reader.length();
    let mut at = length - args.end.bytes.min(length);
    let printed = copy(context, &reader, &mut at, length).await;
    if !args.follow {
        return printed;
    }
    if let Err(failed) = printed {
        passes(failed)?;
    }
    follow(context, &mut reader, at).await
}

async fn open_one(context: &Context, args: &EndArgs) -> Outcome<FileReader> {
    let fs = context.connect().await?;
    let status = expand_one(&fs, &args.path).await?;
    check_file(&status)?;
    Ok(fs.open(&status.path).await?)
}

/// Prints a range; `at` says how far it came, also when it fails.
async fn copy(context: &Context, reader: &FileReader, at: &mut u64, end: u64) -> Outcome {
    while *at < end {
        let piece = reader.read_range(*at, TAIL_PIECE.min(end - *at)).await?;
        if piece.is_empty() {
            break;
        }
        *at += piece.len() as u64;
        Sink::Stdout.write(&context.env.work, piece).await?;
    }
    Ok(())
}

/// What a follower waits out: nodes that come and go, a pipeline that is being mended. Everything else ends it.
fn passes(failed: Failure) -> Outcome<Error> {
    match failed {
        Failure::Error(error) if error.is_retryable() || error.code() == ErrorCode::BlockNotFound => Ok(error),
        other => Err(other),
    }
}

/// Prints what is added, until the file is gone or somebody interrupts.
async fn follow(context: &Context, reader: &mut FileReader, mut at: u64) -> Outcome {
    let path = reader.path().to_owned();
    let (mut pause, mut troubled) = (FOLLOW_SOON, false);
    loop {
        context.env.clock.sleep(pause).await;
        let stepped = match reader.refresh().await {
            Ok(length) if length < at => {
                complain(&format!("{path} was cut to {length} bytes; what is added from there on follows"));
                at = length;
                Ok(())
            }
            Ok(length) => {
                pause = if length > at { FOLLOW_SOON } else { (pause * 2).min(FOLLOW_IDLE) };
                copy(context, reader, &mut at, length).await
            }
            Err(error) if error.code() == ErrorCode::FileNotFound => {
                let why = if error.message().contains("replaced") {
                    "replaced by another file"
                } else {
                    "deleted or renamed"
                };
                return Err(failure(ErrorCode::FileNotFound, format!("{path} was {why}: nothing more will come")));
            }
            Err(error) => Err(error.into()),
        };
        match stepped {
            Ok(()) => troubled = false,
            Err(failed) => {
                let error = passes(failed)?;
                if !std::mem::replace(&mut troubled, true) {
                    complain(&format!("{error}; trying again"));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str) -> FileStatus {
        FileStatus { path: path.into(), ..Default::default() }
    }

    #[test]
    fn an_existing_target_needs_force_and_a_folder_takes_the_name() {
        let dir = tempfile::tempdir().unwrap();
        let env = Env::system();
        let there = dir.path().join("f");
        cairn_common::durable::write_atomic(&*env.fs, &there, b"").unwrap();
        assert!(plan(file("/x/f"), dir.path(), Local::Folder, false).is_err());
        let (_, target, was) = plan(file("/x/f"), dir.path(), Local::Folder, true).unwrap();
        assert_eq!((target, was), (there, Local::File));
        let (_, target, was) = plan(file("/x/g"), dir.path(), Local::Folder, false).unwrap();
        assert_eq!((target, was), (dir.path().join("g"), Local::Nothing));
        assert!(plan(file("/x/g"), &dir.path().join("no/such"), Local::Nothing, false).is_err());
        assert_eq!(look(Path::new("/dev/null")).unwrap(), Local::Special);
    }
}

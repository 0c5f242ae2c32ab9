//! `put`, and `cp` inside the cluster.

use std::path::{Path, PathBuf};

use cairn_client::fs::{CreateOptions, ErrorCode, FileStatus, FileSystem, RenameMode};
use cairn_proto::path;

use crate::args::{CpArgs, PutArgs, cluster_path};
use crate::context::{Context, expand_all, in_parallel};
use crate::names::{DIRECTORY_MODE, check_several, name_of, place};
use crate::output::{Failure, Outcome, failure};
use crate::progress::Progress;
use crate::show::is_directory;
use crate::stream::{LocalInput, Source, create_options, local_error, store, temporary_sibling};

/// Files stored at a time when a folder is copied.
const FILES_AT_ONCE: usize = 4;

/// Something to copy: one file, or a folder with all below it.
struct Tree<F> {
    /// Of messages and, inside a directory, of the target.
    name: String,
    kind: Kind<F>,
}

enum Kind<F> {
    File(F, Option<u64>),
    /// Paths below the folder, parents first; then files with their paths below it and their lengths.
    Folder {
        directories: Vec<String>,
        files: Vec<(String, F, u64)>,
    },
}

impl<F> Tree<F> {
    fn bytes(&self) -> Option<u64> {
        match &self.kind {
            Kind::File(_, length) => *length,
            Kind::Folder { files, .. } => Some(files.iter().map(|(_, _, length)| length).sum()),
        }
    }
}

/// Where a file's bytes come from.
trait Open {
    async fn open(&self, context: &Context, fs: &FileSystem) -> Outcome<Source>;
}

/// `None`: standard input.
struct LocalFile(Option<PathBuf>);

impl Open for LocalFile {
    async fn open(&self, context: &Context, _: &FileSystem) -> Outcome<Source> {
        Ok(Source::Local(match &self.0 {
            Some(path) => LocalInput::open(&context.env, path).await?,
            None => LocalInput::stdin(&context.env)?,
        }))
    }
}

struct ClusterFile(String);

impl Open for ClusterFile {
    async fn open(&self, _: &Context, fs: &FileSystem) -> Outcome<Source> {
        Ok(Source::Cluster(Box::new(fs.open(&self.0).await?)))
    }
}

/// `put`
pub async fn put(context: &mut Context, args: &PutArgs) -> Outcome {
    let Some((target, sources)) = args.names.split_last() else { return Ok(()) };
    let to = cluster_path(target).map_err(Failure::Usage)?;
    if sources.len() > 1 && sources.iter().any(|source| source == "-") {
        return Err(Failure::Usage("standard input (-) must be the only source".into()));
    }
    let fs = context.connect().await?;
    check_target(&fs, target, &to, sources.len()).await?;
    if sources == ["-"] && fs.find(&to).await?.is_some_and(|status| is_directory(&status)) {
        return Err(failure(ErrorCode::NotAFile, format!("{to} is a directory: give standard input a file's name")));
    }
    let mut planned = Vec::new();
    for source in sources {
        planned.push(plan(&fs, local_name(source, &to)?, &to, args.force).await?);
    }
    let mut trees = Vec::new();
    for (source, (name, place)) in sources.iter().zip(planned) {
        trees.push((local_tree(source, name)?, place));
    }
    copy_all(context, &fs, trees, &create_options(&args.write), args.force, "put").await
}

/// `cp`
pub async fn cp(context: &mut Context, args: &CpArgs) -> Outcome {
    let Some((to, sources)) = args.paths.split_last() else { return Ok(()) };
    let fs = context.connect().await?;
    let sources = expand_all(&fs, sources).await?;
    check_target(&fs, to, to, sources.len()).await?;
    let mut trees = Vec::new();
    for source in sources {
        let name = name_of(&source.path)?.to_owned();
        let (name, place) = plan(&fs, name, to, args.force).await?;
        if place.target == source.path || place.target.starts_with(&format!("{}/", source.path)) {
            let text = format!("{} cannot be copied into itself ({})", source.path, place.target);
            return Err(failure(ErrorCode::InvalidArgument, text));
        }
        if is_directory(&source) && !args.recursive {
            return Err(failure(ErrorCode::NotAFile, format!("{} is a directory: use -r", source.path)));
        }
        trees.push((cluster_tree(&fs, source, name).await?, place));
    }
    copy_all(context, &fs, trees, &create_options(&args.write), args.force, "cp").await
}

/// Where one source goes.
struct Place {
    target: String,
    existing: Option<FileStatus>,
}

async fn plan(fs: &FileSystem, name: String, to: &str, force: bool) -> Outcome<(String, Place)> {
    let (target, existing) = place(fs, &name, to).await?;
    path::components(&target)?;
    if existing.is_some() && !force {
        return Err(exists(&target));
    }
    Ok((name, Place { target, existing }))
}

fn exists(target: &str) -> Failure {
    failure(ErrorCode::FileAlreadyExists, format!("{target} exists already: use -f to replace it"))
}

/// Refuses a target that cannot be before anything is read. `typed` may end in a slash: then a directory is meant.
async fn check_target(fs: &FileSystem, typed: &str, to: &str, sources: usize) -> Outcome {
    check_several(fs, sources, to).await?;
    if let Some(status) = fs.find(to).await? {
        if typed.ends_with('/') && !is_directory(&status) {
            return Err(failure(ErrorCode::NotADirectory, format!("{to} is no directory")));
        }
        return Ok(());
    }
    if typed.ends_with('/') {
        return Err(failure(
            ErrorCode::FileNotFound,
            format!("there is no directory {to}: make it with `cairn mkdir`"),
        ));
    }
    let parent = path::split_last(to).map_or("/", |(parent, _)| parent);
    match fs.find(parent).await? {
        Some(status) if is_directory(&status) => Ok(()),
        Some(_) => Err(failure(ErrorCode::ParentNotDirectory, format!("{parent} is no directory"))),
        None => {
            let text = format!("there is no directory {parent}: make it with `cairn mkdir -p`");
            Err(failure(ErrorCode::FileNotFound, text))
        }
    }
}

/// The name that a local source gets inside a directory.
fn local_name(source: &str, to: &str) -> Outcome<String> {
    if source == "-" {
        // Standard input has no name: the target's last component stands for it.
        return Ok(path::split_last(to).map_or("stdin", |(_, name)| name).to_owned());
    }
    let named = Path::new(source).file_name().map(|name| name.to_string_lossy().into_owned());
    match named {
        Some(name) => Ok(name),
        // "." and "..": the folder's own name.
        None => match std::fs::canonicalize(source) {
            Ok(whole) => match whole.file_name() {
                Some(name) => Ok(name.to_string_lossy().into_owned()),
                None => Err(failure(ErrorCode::InvalidArgument, "the local root folder has no name to store it under")),
            },
            Err(error) => Err(local_error("cannot read", Path::new(source), &error)),
        },
    }
}

fn local_tree(source: &str, name: String) -> Outcome<Tree<LocalFile>> {
    if source == "-" {
        return Ok(Tree { name, kind: Kind::File(LocalFile(None), None) });
    }
    let root = Path::new(source);
    let metadata = std::fs::metadata(root).map_err(|error| local_error("cannot read", root, &error))?;
    if !metadata.is_dir() {
        let length = metadata.is_file().then_some(metadata.len());
        return Ok(Tree { name, kind: Kind::File(LocalFile(Some(root.to_owned())), length) });
    }
    let (mut directories, mut files) = (Vec::new(), Vec::new());
    let mut pending = vec![(root.to_owned(), String::new())];
    while let Some((folder, below)) = pending.pop() {
        let wrong = |error: std::io::Error| local_error("cannot read", &folder, &error);
        for entry in std::fs::read_dir(&folder).map_err(wrong)? {
            let entry = entry.map_err(wrong)?;
            let path = entry.path();
            let Ok(name) = entry.file_name().into_string() else {
                let text = format!("{}: the name is not UTF-8", path.display());
                return Err(failure(ErrorCode::InvalidPath, text));
            };
            path::check_name(&name)
                .map_err(|why| failure(ErrorCode::InvalidPath, format!("cannot store {}: {why}", path.display())))?;
            let inside = if below.is_empty() { name } else { format!("{below}/{name}") };
            let metadata = std::fs::metadata(&path).map_err(|error| local_error("cannot read", &path, &error))?;
            if metadata.is_dir() {
                directories.push(inside.clone());
                pending.push((path, inside));
            } else if metadata.is_file() {
                files.push((inside, LocalFile(Some(path)), metadata.len()));
            } else {
                let text = format!("{} is neither a file nor a folder", path.display());
                return Err(failure(ErrorCode::InvalidArgument, text));
            }
        }
    }
    // Parents sort before what is in them.
    directories.sort();
    Ok(Tree { name, kind: Kind::Folder { directories, files } })
}

async fn cluster_tree(fs: &FileSystem, source: FileStatus, name: String) -> Outcome<Tree<ClusterFile>> {
    if !is_directory(&source) {
        return Ok(Tree { name, kind: Kind::File(ClusterFile(source.path), Some(source.length)) });
    }
    let (mut directories, mut files) = (Vec::new(), Vec::new());
    let mut walk = fs.walk(&source.path).await?;
    while let Some(entry) = walk.next().await? {
        let Some(inside) = entry.path.strip_prefix(&format!("{}/", source.path)).map(str::to_owned) else { continue };
        if is_directory(&entry) {
            directories.push(inside);
        } else {
            files.push((inside, ClusterFile(entry.path), entry.length));
        }
    }
    Ok(Tree { name, kind: Kind::Folder { directories, files } })
}

async fn copy_all<F: Open>(
    context: &Context,
    fs: &FileSystem,
    trees: Vec<(Tree<F>, Place)>,
    options: &CreateOptions,
    force: bool,
    what: &str,
) -> Outcome {
    for (tree, place) in &trees {
        if let Some(existing) = &place.existing {
            let target = &place.target;
            match (&tree.kind, is_directory(existing)) {
                (Kind::File(..), true) => {
                    let text = format!("{target} is a directory and is not replaced by the file {}", tree.name);
                    return Err(failure(ErrorCode::NotAFile, text));
                }
                (Kind::Folder { .. }, false) => {
                    let text = format!("{target} is a file and is not replaced by the folder {}", tree.name);
                    return Err(failure(ErrorCode::NotADirectory, text));
                }
                _ => {}
            }
        }
    }
    let total = trees.iter().map(|(tree, _)| tree.bytes()).sum::<Option<u64>>();
    let progress = Progress::start(context, what, total);
    for (tree, place) in trees {
        match tree.kind {
            Kind::File(file, _) => {
                let mut source = file.open(context, fs).await?;
                store(context, fs, &mut source, &place.target, options, force, &progress).await?;
            }
            Kind::Folder { directories, files } => {
                let to = Folder { target: &place.target, is_there: place.existing.is_some() };
                copy_folder(context, fs, to, &directories, &files, options, &progress).await?;
            }
        }
    }
    progress.finish().await;
    Ok(())
}

struct Folder<'a> {
    target: &'a str,
    is_there: bool,
}

/// A folder that is not there appears as a whole; one that is there gets file after file.
async fn copy_folder<F: Open>(
    context: &Context,
    fs: &FileSystem,
    to: Folder<'_>,
    directories: &[String],
    files: &[(String, F, u64)],
    options: &CreateOptions,
    progress: &Progress,
) -> Outcome {
    let root = if to.is_there { to.target.to_owned() } else { temporary_sibling(&context.env, to.target) };
    let ticket = (!to.is_there).then(|| context.leftovers.remote(fs, &root));
    if !to.is_there {
        fs.mkdir(&root, DIRECTORY_MODE).await?;
    }
    for directory in directories {
        fs.mkdirs(&path::join(&root, directory), DIRECTORY_MODE).await?;
    }
    let stores = files.iter().map(|(inside, file, _)| {
        let target = path::join(&root, inside);
        async move {
            let mut source = file.open(context, fs).await?;
            store(context, fs, &mut source, &target, options, to.is_there, progress).await
        }
    });
    in_parallel(FILES_AT_ONCE, stores, |()| {}).await?;
    if let Some(ticket) = ticket {
        fs.rename(&root, to.target, RenameMode::NoReplace).await?;
        context.leftovers.keep(ticket);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_local_sources() {
        assert_eq!(local_name("a/b.txt", "/d").unwrap(), "b.txt");
        assert_eq!(local_name("a/b/", "/d").unwrap(), "b");
        assert_eq!(local_name("-", "/d/x").unwrap(), "x");
        assert!(local_name("/", "/d").is_err());
        assert!(!local_name(".", "/d").unwrap().is_empty());
    }

    #[test]
    fn a_folder_is_read_with_all_below_it() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("d/e")).unwrap();
        let env = cairn_common::Env::system();
        for name in ["d/e/f", "g"] {
            cairn_common::durable::write_atomic(&*env.fs, &dir.path().join(name), b"12345").unwrap();
        }
        let tree = local_tree(dir.path().to_str().unwrap(), "x".into()).unwrap();
        assert_eq!(tree.bytes(), Some(10));
        let Kind::Folder { directories, files } = tree.kind else { panic!() };
        assert_eq!(directories, ["d", "d/e"]);
        let mut names: Vec<&str> = files.iter().map(|(name, _, _)| name.as_str()).collect();
        names.sort_unstable();
        assert_eq!(names, ["d/e/f", "g"]);
    }

    #[test]
    fn what_is_not_there_is_named() {
        let Err(Failure::Error(error)) = local_tree("/no/such/file", "x".into()) else { panic!() };
        assert_eq!(error.message(), "cannot read /no/such/file: no such file");
    }
}

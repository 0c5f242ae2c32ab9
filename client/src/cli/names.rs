//! Commands that change names and attributes and move no bytes.

use cairn_client::fs::{CreateOptions, ErrorCode, FileStatus, FileSystem, NodeState, RenameMode};
use cairn_proto::path;

use crate::args::{ChmodArgs, ChownArgs, MkdirArgs, MvArgs, PathsArgs, RmArgs, SetrepArgs};
use crate::context::{Context, expand, expand_all};
use crate::output::{Failure, Outcome, failure};
use crate::show::is_directory;

/// Of new directories, before anybody changes it (HDFS's 777 under the mask 022).
pub const DIRECTORY_MODE: u32 = 0o755;
/// Of new files.
pub const FILE_MODE: u32 = 0o644;
/// Trash is nobody else's business.
const TRASH_MODE: u32 = 0o700;

/// `mkdir`
pub async fn mkdir(context: &mut Context, args: &MkdirArgs) -> Outcome {
    let fs = context.connect().await?;
    for path in &args.paths {
        if args.parents {
            fs.mkdirs(path, DIRECTORY_MODE).await?;
        } else {
            // The namenode, as HDFS's, is content with a directory that is there: only here somebody expects to have made it.
            if fs.exists(path).await? {
                return Err(failure(ErrorCode::FileAlreadyExists, format!("{path} exists already")));
            }
            fs.mkdir(path, DIRECTORY_MODE).await?;
        }
    }
    Ok(())
}

/// `touch`
pub async fn touch(context: &mut Context, args: &PathsArgs) -> Outcome {
    let fs = context.connect().await?;
    for pattern in &args.paths {
        match expand(&fs, pattern).await {
            Ok(found) => {
                for status in found {
                    fs.set_times(&status.path, Some(context.env.clock.wall_ms()), None).await?;
                }
            }
            Err(Failure::Error(error)) if error.code() == ErrorCode::FileNotFound && !pattern.contains(['*', '?']) => {
                let options = CreateOptions { permission: FILE_MODE, ..CreateOptions::default() };
                fs.create(pattern, options).await?.close().await?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Where `source` goes if the target is `to`: inside it, if it is a directory.
pub async fn place(fs: &FileSystem, source_name: &str, to: &str) -> Outcome<(String, Option<FileStatus>)> {
    match fs.find(to).await? {
        Some(status) if is_directory(&status) => {
            let inside = path::join(to, source_name);
            let existing = fs.find(&inside).await?;
            Ok((inside, existing))
        }
        existing => Ok((to.to_owned(), existing)),
    }
}

/// Refuses several sources for a target that is no directory.
pub async fn check_several(fs: &FileSystem, sources: usize, to: &str) -> Outcome {
    if sources < 2 {
        return Ok(());
    }
    match fs.find(to).await? {
        Some(status) if is_directory(&status) => Ok(()),
        Some(_) => {
            Err(failure(ErrorCode::NotADirectory, format!("{to} is no directory, and there are several sources")))
        }
        None => Err(failure(ErrorCode::FileNotFound, format!("there is no directory {to} for several sources"))),
    }
}

/// The last component, or an error for the root.
pub fn name_of(path: &str) -> Outcome<&str> {
    match path::split_last(path) {
        Some((_, name)) => Ok(name),
        None => Err(failure(ErrorCode::InvalidArgument, "the root cannot be moved, copied or replaced")),
    }
}

/// `mv`
pub async fn mv(context: &mut Context, args: &MvArgs) -> Outcome {
    let fs = context.connect().await?;
    let Some((to, sources)) = args.paths.split_last() else { return Ok(()) };
    let sources = expand_all(&fs, sources).await?;
    check_several(&fs, sources.len(), to).await?;
    let mode = if args.force { RenameMode::Overwrite } else { RenameMode::NoReplace };
    for source in sources {
        let (target, _) = place(&fs, name_of(&source.path)?, to).await?;
        fs.rename(&source.path, &target, mode).await?;
    }
    Ok(())
}

/// `rm`
pub async fn rm(context: &mut Context, args: &RmArgs) -> Outcome {
    let fs = context.connect().await?;
    let mut victims = Vec::new();
    for pattern in &args.paths {
        match expand(&fs, pattern).await {
            Ok(found) => victims.extend(found),
            Err(Failure::Error(error)) if args.force && error.code() == ErrorCode::FileNotFound => {}
            Err(error) => return Err(error),
        }
    }
    // All is looked at before the first thing goes.
    for victim in &victims {
        if victim.path == "/" {
            return Err(failure(ErrorCode::InvalidArgument, "the root cannot be deleted"));
        }
        if is_directory(victim) && !args.recursive {
            return Err(failure(ErrorCode::NotAFile, format!("{} is a directory: use -r", victim.path)));
        }
    }
    let to_trash = !args.skip_trash && fs.server_defaults().await?.trash_interval_ms > 0;
    for victim in victims {
        let trash = trash_root(&fs);
        let inside = victim.path == trash || victim.path.starts_with(&format!("{trash}/"));
        if to_trash && !inside {
            let target = move_to_trash(context, &fs, &victim.path).await?;
            if !context.out.json {
                context.out.line(format!("{} is in the trash: {target}", victim.path))?;
            }
        } else if !fs.delete(&victim.path, args.recursive).await? && !args.force {
            return Err(failure(ErrorCode::FileNotFound, format!("{} is gone already", victim.path)));
        }
    }
    Ok(())
}

fn trash_root(fs: &FileSystem) -> String {
    format!("/user/{}/.Trash", fs.user())
}

/// Moves `victim` to the trash of the user, under its own path there; returns where it is now.
async fn move_to_trash(context: &Context, fs: &FileSystem, victim: &str) -> Outcome<String> {
    let trash = trash_root(fs);
    if trash.starts_with(&format!("{victim}/")) {
        let text = format!("{victim} holds the trash itself and cannot be moved there: use --skip-trash");
        return Err(failure(ErrorCode::InvalidArgument, text));
    }
    let target = format!("{trash}/Current{victim}");
    let parent = path::split_last(&target).map_or("/", |(parent, _)| parent);
    let advice = |error: cairn_client::fs::Error| {
        failure(error.code(), format!("cannot move {victim} to the trash (--skip-trash deletes at once): {error}"))
    };
    make_trash(fs, &trash, parent).await.map_err(advice)?;
    match fs.rename(victim, &target, RenameMode::NoReplace).await {
        Ok(()) => Ok(target),
        Err(error) if error.code() == ErrorCode::FileAlreadyExists => {
            // Deleted before under the same name: the time makes this one's name its own.
            let unique = format!("{target}.{}", context.env.clock.wall_ms());
            fs.rename(victim, &unique, RenameMode::NoReplace).await.map_err(advice)?;
            Ok(unique)
        }
        Err(error) => Err(advice(error)),
    }
}

async fn make_trash(fs: &FileSystem, trash: &str, parent: &str) -> cairn_client::fs::Result<()> {
    if fs.find(trash).await?.is_none() {
        // The home is anybody's to see, the trash is not.
        if let Some((home, _)) = path::split_last(trash) {
            fs.mkdirs(home, DIRECTORY_MODE).await?;
        }
        fs.mkdirs(trash, TRASH_MODE).await?;
    }
    fs.mkdirs(parent, TRASH_MODE).await.map(drop)
}

/// `status` and, if asked for, all that is below it.
async fn with_all_below(fs: &FileSystem, status: FileStatus, recursive: bool) -> Outcome<Vec<FileStatus>> {
    if !recursive || !is_directory(&status) {
        return Ok(vec![status]);
    }
    let mut walk = fs.walk(&status.path).await?;
    let mut all = Vec::new();
    while let Some(entry) = walk.next().await? {
        all.push(entry);
    }
    Ok(all)
}

/// `chmod`
pub async fn chmod(context: &mut Context, args: &ChmodArgs) -> Outcome {
    let fs = context.connect().await?;
    for status in expand_all(&fs, &args.paths).await? {
        for entry in with_all_below(&fs, status, args.recursive).await? {
            let mode = args.mode.apply(entry.permission, is_directory(&entry));
            if mode != entry.permission & 0o1777 {
                fs.set_permission(&entry.path, mode).await?;
            }
        }
    }
    Ok(())
}

/// `chown`
pub async fn chown(context: &mut Context, args: &ChownArgs) -> Outcome {
    let fs = context.connect().await?;
    let given = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    let (user, group) = (given(&args.owner.user), given(&args.owner.group));
    for status in expand_all(&fs, &args.paths).await? {
        for entry in with_all_below(&fs, status, args.recursive).await? {
            fs.set_owner(&entry.path, user.as_deref(), group.as_deref()).await?;
        }
    }
    Ok(())
}

/// `setrep`
pub async fn setrep(context: &mut Context, args: &SetrepArgs) -> Outcome {
    let fs = context.connect().await?;
    let wanted = args.replication;
    let found = expand_all(&fs, &args.paths).await?;
    if args.wait {
        let report = fs.cluster_report().await?;
        // A node that has been silent for a moment is alive, too.
        let alive = |state| matches!(state, NodeState::Live | NodeState::Stale);
        let live = report.nodes.iter().filter(|node| alive(node.state())).count();
        if (live as u64) < u64::from(wanted) {
            let text = format!("{wanted} replicas need as many live datanodes; there are {live}");
            return Err(failure(ErrorCode::NoTargets, text));
        }
    }
    let mut files = Vec::new();
    for status in found {
        for entry in with_all_below(&fs, status, true).await? {
            if !is_directory(&entry) {
                fs.set_replication(&entry.path, wanted).await?;
                files.push(entry.path);
            }
        }
    }
    if args.wait {
        for file in &files {
            wait_for_replicas(context, &fs, file, wanted).await?;
        }
    }
    if !context.out.json {
        context.out.line(format!("{} set to {wanted}", crate::units::counted(files.len() as u64, "file")))?;
    }
    Ok(())
}

async fn wait_for_replicas(context: &Context, fs: &FileSystem, file: &str, wanted: u32) -> Outcome {
    loop {
        let blocks = fs.block_locations(file, 0, 0).await?;
        if blocks.iter().all(|block| !block.complete || block.replicas.len() == wanted as usize) {
            return Ok(());
        }
        context.env.clock.sleep(std::time::Duration::from_millis(200)).await;
    }
}

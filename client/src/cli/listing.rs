//! Commands that show names and attributes.

use cairn_client::fs::{FileStatus, FileSystem};
use cairn_proto::path;

use crate::args::{DfArgs, DuArgs, FindArgs, KindArg, LsArgs, PathsArgs};
use crate::context::{Context, expand, expand_all, in_parallel};
use crate::modes;
use crate::output::{Columns, Out, Outcome, failure};
use crate::show::{StatusJson, is_directory, kind};
use crate::units::{self, local_minute, local_second};

/// `ls`
pub async fn ls(context: &mut Context, args: &LsArgs) -> Outcome {
    let fs = context.connect().await?;
    let out = &mut context.out;
    for pattern in &args.paths {
        let found = expand(&fs, pattern).await?;
        // Files of a glob stand together, so that their columns do.
        let (directories, files): (Vec<_>, Vec<_>) =
            found.into_iter().partition(|status| is_directory(status) && !args.directory);
        show_page(out, &files, args.human)?;
        for directory in directories {
            if args.recursive {
                list_below(&fs, out, &directory, args.human).await?;
            } else {
                list_directory(&fs, out, &directory, args.human).await?;
            }
        }
    }
    if out.json { out.end_array() } else { Ok(()) }
}

async fn list_directory(fs: &FileSystem, out: &mut Out, directory: &FileStatus, human: bool) -> Outcome {
    let mut pages = fs.list(&directory.path)?;
    let mut first = true;
    while let Some(page) = pages.next().await? {
        if first && !out.json && !page.is_empty() {
            out.line(format!("Found {} items", directory.children.max(page.len() as u64)))?;
        }
        first = false;
        show_page(out, &page, human)?;
    }
    Ok(())
}

async fn list_below(fs: &FileSystem, out: &mut Out, directory: &FileStatus, human: bool) -> Outcome {
    let mut walk = fs.walk(&directory.path).await?;
    let mut page = Vec::new();
    while let Some(entry) = walk.next().await? {
        if entry.path == directory.path {
            continue;
        }
        page.push(entry);
        if page.len() == 1_000 {
            show_page(out, &page, human)?;
            page.clear();
        }
    }
    show_page(out, &page, human)
}

/// Lines as `hdfs dfs -ls` prints them.
fn show_page(out: &mut Out, page: &[FileStatus], human: bool) -> Outcome {
    if out.json {
        return page.iter().try_for_each(|status| out.element(&StatusJson::from(status)));
    }
    let mut columns = Columns::new(&[1, 4]);
    for status in page {
        let (letter, replication) =
            if is_directory(status) { ('d', "-".to_owned()) } else { ('-', status.replication.to_string()) };
        columns.row(vec![
            format!("{letter}{}", modes::show(status.permission)),
            replication,
            status.owner.clone(),
            status.group.clone(),
            units::size(status.length, human),
            local_minute(status.modified_ms),
            status.path.clone(),
        ]);
    }
    columns.print(out)
}

/// `stat`
pub async fn stat(context: &mut Context, args: &PathsArgs) -> Outcome {
    let fs = context.connect().await?;
    let out = &mut context.out;
    for status in expand_all(&fs, &args.paths).await? {
        if out.json {
            out.json(&StatusJson::from(&status))?;
            continue;
        }
        let mut columns = Columns::new(&[]);
        let mut row = |name: &str, value: String| columns.row(vec![format!("{name}:"), value]);
        row("path", status.path.clone());
        row("type", kind(&status).into());
        if is_directory(&status) {
            row("entries", units::grouped(status.children));
        } else {
            row("length", format!("{} bytes", units::grouped(status.length)));
            row("replication", status.replication.to_string());
            row("block size", format!("{} bytes", units::grouped(status.block_size)));
            row("open", if status.open { "yes, by a writer" } else { "no" }.into());
        }
        row("owner", format!("{}:{}", status.owner, status.group));
        row("permission", format!("{} ({:04o})", modes::show(status.permission), status.permission));
        row("modified", local_second(status.modified_ms));
        columns.print(out)?;
    }
    Ok(())
}

/// `du`: bytes, bytes times replication, path.
pub async fn du(context: &mut Context, args: &DuArgs) -> Outcome {
    let fs = context.connect().await?;
    let mut entries = Vec::new();
    for status in expand_all(&fs, &args.paths).await? {
        if args.summary || !is_directory(&status) {
            entries.push(status);
        } else {
            entries.extend(fs.list_all(&status.path).await?);
        }
    }
    let fs = &fs;
    let asked = entries.into_iter().enumerate().map(|(at, status)| async move {
        if is_directory(&status) {
            let summary = fs.content_summary(&status.path).await?;
            Ok((at, status.path, summary.length, summary.space))
        } else {
            let space = status.length * u64::from(status.replication);
            Ok((at, status.path, status.length, space))
        }
    });
    let mut rows = Vec::new();
    in_parallel(16, asked, |row| rows.push(row)).await?;
    rows.sort();
    let out = &mut context.out;
    let mut columns = Columns::new(&[0, 1]);
    for (_, path, length, space) in rows {
        if out.json {
            out.element(&serde_json::json!({"path": path, "length": length, "space": space}))?;
        } else {
            columns.row(vec![units::size(length, args.human), units::size(space, args.human), path]);
        }
    }
    if out.json { out.end_array() } else { columns.print(out) }
}

/// `df`
pub async fn df(context: &mut Context, args: &DfArgs) -> Outcome {
    let fs = context.connect().await?;
    let report = fs.cluster_report().await?;
    let out = &mut context.out;
    let name = format!("cairn://{}", fs.namenode_address());
    let (capacity, used, remaining) = (report.capacity, report.used, report.remaining);
    if out.json {
        let value = serde_json::json!({
            "filesystem": name, "capacity": capacity, "used": used, "remaining": remaining
        });
        return out.json(&value);
    }
    let percent = if capacity == 0 { 0.0 } else { used as f64 * 100.0 / capacity as f64 };
    let mut columns = Columns::new(&[1, 2, 3, 4]);
    columns.row(["Filesystem", "Size", "Used", "Available", "Use%"].map(str::to_owned).into());
    let size = |bytes| units::size(bytes, args.human);
    columns.row(vec![name, size(capacity), size(used), size(remaining), format!("{percent:.0}%")]);
    columns.print(out)
}

/// `find`
pub async fn find(context: &mut Context, args: &FindArgs) -> Outcome {
    let matcher = match &args.name {
        None => None,
        Some(glob) => {
            let made = globset::GlobBuilder::new(glob).literal_separator(true).build();
            Some(made.map_err(|error| crate::output::Failure::Usage(format!("--name {glob:?}: {error}")))?)
        }
    };
    let matcher = matcher.map(|glob| glob.compile_matcher());
    let fs = context.connect().await?;
    let out = &mut context.out;
    for start in expand_all(&fs, &args.paths).await? {
        let mut walk = fs.walk(&start.path).await?;
        while let Some(entry) = walk.next().await? {
            let name = path::split_last(&entry.path).map_or("", |(_, name)| name);
            let kind_fits = args.kind.is_none_or(|kind| (kind == KindArg::Directory) == is_directory(&entry));
            if !kind_fits || matcher.as_ref().is_some_and(|glob| !glob.is_match(name)) {
                continue;
            }
            if out.json {
                out.element(&StatusJson::from(&entry))?;
            } else {
                out.line(&entry.path)?;
            }
        }
    }
    if out.json { out.end_array() } else { Ok(()) }
}

/// `checksum`
pub async fn checksum(context: &mut Context, args: &PathsArgs) -> Outcome {
    let fs = context.connect().await?;
    let out = &mut context.out;
    for status in expand_all(&fs, &args.paths).await? {
        if is_directory(&status) {
            let text = format!("{} is a directory", status.path);
            return Err(failure(cairn_client::fs::ErrorCode::NotAFile, text));
        }
        let sum = fs.file_checksum(&status.path).await?;
        let hex = format!("{:08x}", sum.crc32c);
        if out.json {
            out.json(&serde_json::json!({
                "path": status.path, "algorithm": "COMPOSITE-CRC32C", "checksum": hex, "length": sum.length
            }))?;
        } else {
            out.line(format!("{}\tCOMPOSITE-CRC32C\t{hex}", status.path))?;
        }
    }
    Ok(())
}

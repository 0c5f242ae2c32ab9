//! `append` and what else changes the bytes of files that are there, and `admin recover-lease`.

use std::path::Path;
use std::time::Duration;

use cairn_client::fs::{AppendOptions, CreateOptions, ErrorCode, FileSystem, FileWriter};

use crate::args::{AppendArgs, CodecArg, ConcatArgs, TruncateArgs, cluster_path};
use crate::context::{Context, expand_one};
use crate::output::{Failure, Outcome, failure};
use crate::progress::Progress;
use crate::stream::{LocalInput, Source, default_options, local_error};

/// How often it is looked whether a file is closed.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// `append`
pub async fn append(context: &mut Context, args: &AppendArgs) -> Outcome {
    let Some((target, sources)) = args.names.split_last() else { return Ok(()) };
    let target = cluster_path(target).map_err(Failure::Usage)?;
    if sources.len() > 1 && sources.iter().any(|source| source == "-") {
        return Err(Failure::Usage("standard input (-) must be the only source".into()));
    }
    // All sources are opened before the file is: one that cannot be read must change nothing.
    let mut inputs = Vec::with_capacity(sources.len());
    let mut total = Some(0);
    for source in sources {
        let (input, length) = open(context, source).await?;
        inputs.push(input);
        total = total.zip(length).map(|(sum, length)| sum + length);
    }
    let fs = context.connect().await?;
    let (mut writer, made) = open_target(&fs, &target, args.codec).await?;
    let ticket = match made {
        true => context.leftovers.remote(&fs, &target),
        // What was acked stays, but nobody shall wait for the lease.
        false => context.leftovers.open_file(&fs, writer.inode()),
    };
    let progress = Progress::start(context, "append", total);
    for input in &mut inputs {
        while let Some(piece) = input.next().await? {
            let length = piece.len() as u64;
            writer.write_bytes(piece).await?;
            progress.add(length);
        }
    }
    let status = writer.close().await?;
    context.leftovers.keep(ticket);
    progress.finish().await;
    if context.out.json {
        context.out.json(&serde_json::json!({"path": target, "length": status.length}))?;
    }
    Ok(())
}

async fn open(context: &Context, source: &str) -> Outcome<(Source, Option<u64>)> {
    if source == "-" {
        return Ok((Source::Local(LocalInput::stdin(&context.env)?), None));
    }
    let path = Path::new(source);
    let metadata = std::fs::metadata(path).map_err(|error| local_error("cannot read", path, &error))?;
    if metadata.is_dir() {
        return Err(failure(ErrorCode::NotAFile, format!("{source} is a folder: only files can be appended")));
    }
    let input = LocalInput::open(&context.env, path).await?;
    Ok((Source::Local(input), metadata.is_file().then_some(metadata.len())))
}

/// As HDFS's appendToFile: a file that is not there is made. The flag tells that it was.
async fn open_target(fs: &FileSystem, path: &str, codec: Option<CodecArg>) -> Outcome<(FileWriter, bool)> {
    let compress = codec != Some(CodecArg::None);
    match fs.append(path, AppendOptions { compress }).await {
        Ok(writer) => Ok((writer, false)),
        Err(error) if error.code() == ErrorCode::FileNotFound => {
            let options = CreateOptions { compress, ..default_options() };
            Ok((fs.create(path, options).await?, true))
        }
        Err(error) if error.code() == ErrorCode::AlreadyBeingCreated => {
            let advice = format!("{error} (if its writer is dead: cairn admin recover-lease {path})");
            Err(failure(error.code(), advice))
        }
        Err(error) => Err(error.into()),
    }
}

/// `truncate`
pub async fn truncate(context: &mut Context, args: &TruncateArgs) -> Outcome {
    let fs = context.connect().await?;
    let path = expand_one(&fs, &args.path).await?.path;
    let answer = fs.truncate(&path, args.length).await?;
    let inode = answer.status.as_ref().map_or(0, |status| status.inode);
    let mut done = answer.done;
    let clock = context.env.clock.clone();
    let deadline_ms = args.timeout.map(|seconds| clock.mono_ms().saturating_add(seconds.saturating_mul(1_000)));
    while !done && !args.no_wait {
        if deadline_ms.is_some_and(|deadline_ms| clock.mono_ms() >= deadline_ms) {
            let text = format!(
                "{path} has {} bytes and stays so, but its last block is not cut yet after {} s: datanodes that hold it are away or \
                 busy; the truncate is recorded and goes on by itself, until then the file cannot be written",
                args.length,
                args.timeout.unwrap_or_default()
            );
            return Err(failure(ErrorCode::TimedOut, text));
        }
        clock.sleep(LOOK_EVERY).await;
        let status = fs.status(&path).await?;
        if status.inode != inode {
            let text = format!("{path} was replaced by another file while its datanodes cut it");
            return Err(failure(ErrorCode::FileNotFound, text));
        }
        done = !status.open;
    }
    if context.out.json {
        return context.out.json(&serde_json::json!({"path": path, "length": args.length, "done": done}));
    }
    let rest = if done { "" } else { "; its datanodes are still cutting, until then it cannot be written" };
    context.out.line(format!("{path} has {} bytes{rest}", args.length))
}

/// `concat`
pub async fn concat(context: &mut Context, args: &ConcatArgs) -> Outcome {
    let fs = context.connect().await?;
    let status = fs.concat(&args.target, &args.sources).await?;
    if context.out.json {
        return context.out.json(&serde_json::json!({"path": args.target, "length": status.length}));
    }
    Ok(())
}

/// `admin recover-lease`
pub async fn recover_lease(context: &mut Context, path: &str, timeout: Duration) -> Outcome {
    let fs = context.connect().await?;
    let clock = context.env.clock.clone();
    let deadline_ms = clock.mono_ms().saturating_add(timeout.as_millis() as u64);
    loop {
        let answer = fs.recover_lease(path).await?;
        if answer.closed {
            let status = fs.status(path).await?;
            if context.out.json {
                return context.out.json(&serde_json::json!({"path": path, "closed": true, "length": status.length}));
            }
            return context.out.line(format!("{path} is closed, with {} bytes", status.length));
        }
        if clock.mono_ms() >= deadline_ms {
            let text = format!(
                "{path} is not closed yet after {} s: {}; its writer has lost it, and the namenode goes on",
                timeout.as_secs(),
                answer.waits_for
            );
            return Err(failure(ErrorCode::TimedOut, text));
        }
        clock.sleep(LOOK_EVERY).await;
    }
}

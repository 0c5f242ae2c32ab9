//! The `cairn` command: every role of a cluster and everything that people do with one.
//!
//! # Overview
//! `args` is the command line as data, `config` the settings around it, `context` what a command works with. One module per group of
//! commands; each is a function from a [`Context`] and its arguments to an [`Outcome`].
//!
//! # Exit codes
//! 0: done. 1: failed, with one line on standard error. 2: wrong usage, likewise. 130: interrupted.
//!
//! # Cancellation
//! SIGINT and SIGTERM drop the command where it stands; [`Leftovers`](context::Leftovers) then takes away what is half made. Commands that have
//! more to end than themselves (`local`, `demo`, `job`, the daemons) listen for the signals themselves.

mod append;
mod args;
mod backup;
mod builtin;
mod chaos;
mod cluster;
mod config;
mod context;
mod corpus;
mod daemon;
mod demo;
mod distcp;
mod fsck;
mod get;
mod graph;
mod health;
mod job;
mod jobs;
mod listing;
mod local;
mod modes;
mod names;
mod output;
mod progress;
mod put;
mod salvage;
mod show;
mod state;
mod stream;
mod units;

use std::pin::Pin;
use std::process::ExitCode;

use cairn_client::job::worker::worker_main;
use cairn_common::{Env, process, telemetry};
use clap::Parser;
use clap::error::ErrorKind;

use args::{Cli, Command};
use context::Context;
use output::{Failure, Outcome, complain};

/// Exit code of a run that a signal ended, as shells give it for SIGINT.
const INTERRUPTED: u8 = 130;

fn main() -> ExitCode {
    cluster::follow_parent();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    if matches!(cli.command, Command::Namenode(_)) {
        process::prefer_huge_pages();
    }
    if matches!(cli.command, Command::Datanode(_)) {
        process::keep_freed_memory();
    }
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    if let Some(threads) = async_threads(&cli.command) {
        builder.worker_threads(threads);
    }
    let runtime = match builder.enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            complain(&format!("cannot start: {error}"));
            return ExitCode::FAILURE;
        }
    };
    // A worker is not a person's command: its settings, output and end are the datanode's.
    let code = if matches!(cli.command, Command::TaskWorker(_)) {
        runtime.block_on(worker_main())
    } else {
        ExitCode::from(runtime.block_on(run(cli)))
    };
    // A thread may be waiting in a read of the terminal: it must not hold the end up.
    runtime.shutdown_background();
    code
}

/// How many threads move bytes between sockets. A daemon's heavy work has threads of its own (disks, compression, the owner of the namespace): with
/// one for each core beside them, they would mostly wake each other.
fn async_threads(command: &Command) -> Option<usize> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    matches!(command, Command::Namenode(_) | Command::Datanode(_)).then(|| cores.div_ceil(2))
}

/// Help and version are answers; anything else is one line.
fn usage(error: &clap::Error) -> ExitCode {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            // Nobody is left to tell that the help could not be printed.
            let _ = error.print();
        }
        _ => complain(&usage_line(&error.render().to_string())),
    }
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
}

/// Clap's message without its usage block.
fn usage_line(rendered: &str) -> String {
    let told = rendered.lines().map(str::trim).take_while(|line| !line.starts_with("Usage:"));
    let told: Vec<&str> = told.filter(|line| !line.starts_with("For more information")).collect();
    let line = config::one_line(&told.join("\n"));
    line.strip_prefix("error: ").unwrap_or(&line).to_owned()
}

async fn run(cli: Cli) -> u8 {
    let env = Env::system();
    let is_daemon = matches!(cli.command, Command::Namenode(_) | Command::Datanode(_));
    telemetry::init(if is_daemon { "info" } else { "off" });
    let mut context = match Context::new(env, cli.global) {
        Ok(context) => context,
        Err(failure) => return report(failure),
    };
    let outcome = if handles_signals(&cli.command) {
        Some(dispatch(&mut context, cli.command).await)
    } else {
        tokio::select! {
            biased;
            outcome = dispatch(&mut context, cli.command) => Some(outcome),
            () = process::shutdown_signal() => None,
        }
    };
    let leftovers = context.leftovers.clone();
    leftovers.remove(&context.env).await;
    let Some(outcome) = outcome else { return INTERRUPTED };
    match outcome.and_then(|()| context.out.flush()) {
        Ok(()) => 0,
        Err(failure) => {
            // What a command printed before it failed stands.
            let _ = context.out.flush();
            report(failure)
        }
    }
}

/// Says why, and gives the exit code.
fn report(failure: Failure) -> u8 {
    match failure {
        Failure::Error(error) => {
            complain(error.message());
            1
        }
        Failure::Usage(text) => {
            complain(&text);
            2
        }
        Failure::Exit(code) => code,
        Failure::BrokenPipe => 0,
    }
}

fn handles_signals(command: &Command) -> bool {
    matches!(
        command,
        Command::Local(_)
            | Command::Demo(_)
            | Command::Chaos(_)
            | Command::Namenode(_)
            | Command::Datanode(_)
            | Command::Job(_)
    )
}

/// Each command's future has a place of its own on the heap: all of them together would be too much for a stack, where builds that are not optimised
/// move it from call to call.
async fn dispatch(context: &mut Context, command: Command) -> Outcome {
    let work: Pin<Box<dyn Future<Output = Outcome> + '_>> = match &command {
        Command::Local(args) => Box::pin(local::local(context, args)),
        Command::Demo(args) => Box::pin(demo::demo(context, args)),
        Command::Chaos(args) => Box::pin(chaos::chaos(context, args)),
        Command::Namenode(args) => Box::pin(daemon::namenode(context, args)),
        Command::Datanode(args) => Box::pin(daemon::datanode(context, args)),
        // Served before there is a context.
        Command::TaskWorker(_) => Box::pin(std::future::ready(Ok(()))),
        Command::Put(args) => Box::pin(put::put(context, args)),
        Command::Append(args) => Box::pin(append::append(context, args)),
        Command::Truncate(args) => Box::pin(append::truncate(context, args)),
        Command::Concat(args) => Box::pin(append::concat(context, args)),
        Command::Get(args) => Box::pin(get::get(context, args)),
        Command::Cat(args) => Box::pin(get::cat(context, args)),
        Command::Head(args) => Box::pin(get::head(context, args)),
        Command::Tail(args) => Box::pin(get::tail(context, args)),
        Command::Ls(args) => Box::pin(listing::ls(context, args)),
        Command::Stat(args) => Box::pin(listing::stat(context, args)),
        Command::Du(args) => Box::pin(listing::du(context, args)),
        Command::Df(args) => Box::pin(listing::df(context, args)),
        Command::Find(args) => Box::pin(listing::find(context, args)),
        Command::Checksum(args) => Box::pin(listing::checksum(context, args)),
        Command::Mkdir(args) => Box::pin(names::mkdir(context, args)),
        Command::Touch(args) => Box::pin(names::touch(context, args)),
        Command::Mv(args) => Box::pin(names::mv(context, args)),
        Command::Cp(args) => Box::pin(put::cp(context, args)),
        Command::Rm(args) => Box::pin(names::rm(context, args)),
        Command::Chmod(args) => Box::pin(names::chmod(context, args)),
        Command::Chown(args) => Box::pin(names::chown(context, args)),
        Command::Setrep(args) => Box::pin(names::setrep(context, args)),
        Command::Blocks(args) => Box::pin(health::blocks(context, args)),
        Command::Fsck(args) => Box::pin(fsck::fsck(context, args)),
        Command::Admin(command) => Box::pin(health::admin(context, command)),
        Command::Job(command) => Box::pin(job::job(context, command)),
    };
    work.await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_usage_error_is_one_line() {
        for line in [&["cairn", "ls", "relative"][..], &["cairn", "nonsense"], &["cairn", "put", "x"]] {
            let error = Cli::try_parse_from(line).unwrap_err();
            let text = usage_line(&error.render().to_string());
            assert!(!text.contains('\n') && !text.starts_with("error") && !text.contains("Usage"), "{text}");
            assert!(text.len() > 10, "{text}");
        }
    }
}

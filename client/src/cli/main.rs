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
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
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

async fn dispatch(context: &mut Context, command: Command) -> Outcome {
    match command {
        Command::Local(args) => local::local(context, &args).await,
        Command::Demo(args) => demo::demo(context, &args).await,
        Command::Chaos(args) => chaos::chaos(context, &args).await,
        Command::Namenode(args) => daemon::namenode(context, &args).await,
        Command::Datanode(args) => daemon::datanode(context, &args).await,
        // Served before there is a context.
        Command::TaskWorker(_) => Ok(()),
        Command::Put(args) => put::put(context, &args).await,
        Command::Append(args) => append::append(context, &args).await,
        Command::Truncate(args) => append::truncate(context, &args).await,
        Command::Concat(args) => append::concat(context, &args).await,
        Command::Get(args) => get::get(context, &args).await,
        Command::Cat(args) => get::cat(context, &args).await,
        Command::Head(args) => get::head(context, &args).await,
        Command::Tail(args) => get::tail(context, &args).await,
        Command::Ls(args) => listing::ls(context, &args).await,
        Command::Stat(args) => listing::stat(context, &args).await,
        Command::Du(args) => listing::du(context, &args).await,
        Command::Df(args) => listing::df(context, &args).await,
        Command::Find(args) => listing::find(context, &args).await,
        Command::Checksum(args) => listing::checksum(context, &args).await,
        Command::Mkdir(args) => names::mkdir(context, &args).await,
        Command::Touch(args) => names::touch(context, &args).await,
        Command::Mv(args) => names::mv(context, &args).await,
        Command::Cp(args) => put::cp(context, &args).await,
        Command::Rm(args) => names::rm(context, &args).await,
        Command::Chmod(args) => names::chmod(context, &args).await,
        Command::Chown(args) => names::chown(context, &args).await,
        Command::Setrep(args) => names::setrep(context, &args).await,
        Command::Blocks(args) => health::blocks(context, &args).await,
        Command::Fsck(args) => fsck::fsck(context, &args).await,
        Command::Admin(command) => health::admin(context, &command).await,
        Command::Job(command) => job::job(context, &command).await,
    }
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

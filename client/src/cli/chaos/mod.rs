//! `chaos`: breaks members of a `cairn local` cluster while a load checks every byte, and gives a verdict.
//!
//! # Overview
//! [`target`] knows the cluster from its state file, [`faults`] kills and pauses, [`corrupt`] damages replicas, `cairn_client::check` writes and reads.
//! Killed members are started again by `cairn local`, on request, so that they stay its children.
//!
//! # Cancellation
//! Ctrl-C ends the faults: everybody goes on and comes back, then all is checked and the verdict given. Once the faults have ended, by themselves
//! or by a Ctrl-C, the next one ends everything at once with the verdict so far: what was stopped goes on, what was killed has been asked
//! for, and the cluster is left running.

mod corrupt;
mod faults;
mod target;

use std::future::Future;
use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use cairn_client::check::{Checker, Load, Tally};
use cairn_client::fs::{ErrorCode, FileSystem, NodeState};
use cairn_common::entropy::Entropy;
use cairn_common::{Env, process};
use serde::Serialize;

use crate::INTERRUPTED;
use crate::args::ChaosArgs;
use crate::context::Context;
use crate::output::{Columns, Failure, Out, Outcome, failure, stderr_is_terminal};
use crate::units::{counted, grouped, human_millis, human_size};
use corrupt::Corrupter;
use faults::{Counts, Faults, Rate};
use target::Target;

/// From the last fault until all must be well.
const HEALTHY_LIMIT_MS: u64 = 60_000;
/// Until all members run again.
const COME_BACK_LIMIT: Duration = Duration::from_secs(30);
/// An operation that has no answer by then is stuck: longer than all patience of a client together.
const OPERATION_LIMIT: Duration = Duration::from_secs(180);
const LOOK_AGAIN: Duration = Duration::from_millis(200);
const TELL_EVERY: Duration = Duration::from_secs(10);

/// All was checked, and nothing was wrong.
const CLEAN: &str = "clean";
/// Something was wrong.
const FAILED: &str = "failed";
/// Nothing was wrong so far, but not all was checked.
const UNFINISHED: &str = "unfinished";

/// What `chaos --json` prints. Keys may be added; these stay.
#[derive(Serialize, Debug)]
struct VerdictJson {
    /// [`CLEAN`], [`FAILED`] or [`UNFINISHED`].
    verdict: &'static str,
    seed: u64,
    interrupted: bool,
    elapsed_ms: u64,
    faults: Counts,
    operations: u64,
    replicas_verified: u64,
    /// From the last fault until nothing was missing, corrupt or under-replicated; null: not within a minute.
    time_to_healthy_ms: Option<u64>,
    /// Why it was not healthy, or what else went wrong.
    problems: Vec<String>,
    #[serde(flatten)]
    tally: Tally,
}

/// `chaos`
pub async fn chaos(context: &mut Context, args: &ChaosArgs) -> Outcome {
    let env = context.env.clone();
    let mut target = Target::open(&env, &args.dir)?;
    let rate = rate(args, &target)?;
    let seed = args.seed.unwrap_or_else(|| env.entropy.below(1 << 32));
    let mut settings = context.client_settings()?;
    settings.namenode.clone_from(&target.members()[0].addr);
    let writers = usize::from(args.writers);
    let root = format!("/chaos-{seed}-{:08x}", env.entropy.next_u64() >> 32);
    let load = Load { writers, readers: writers.div_ceil(2), limit: OPERATION_LIMIT, seed, ..Load::at(&root) };
    let started_ms = env.clock.mono_ms();
    let mut checker = Checker::start(&env, &settings, load).await?;
    let live = stderr_is_terminal() && !context.out.json;
    let say = |text: String| {
        if live {
            let elapsed = env.clock.mono_ms() - started_ms;
            // With standard error closed there is nobody left to tell.
            let _ = writeln!(std::io::stderr(), "{:>7.1} s  {text}", elapsed as f64 / 1e3);
        }
    };
    say(format!("seed {seed}, {}, files in {root}", counted(target.members().len() as u64 - 1, "datanode")));
    let mut problems = Vec::new();
    let members = target.members().to_vec();
    let damaged = AtomicU64::new(0);
    let mut faults = Faults::new(&env, &mut target, rate, seed, &say);
    let interrupted = {
        let every = Duration::from_millis(rate.every_ms);
        let random = Entropy::seeded(seed ^ 0xC0);
        let corrupter =
            Corrupter { env: &env, checker: &checker, members: &members, every, random, count: &damaged, say: &say };
        tokio::select! {
            biased;
            () = process::shutdown_signal() => true,
            ended = faults.run() => {
                problems.extend(ended.err());
                false
            }
            () = corrupter.run(), if args.corrupt => false,
            () = tell(&env, &checker, &say) => false,
        }
    };
    say(if interrupted { "interrupted: everybody comes back".into() } else { "the last fault".into() });
    let ending = heal_and_check(&env, &mut faults, &mut checker, members.len() - 1).await;
    let counts = Counts { corrupt: damaged.load(Ordering::Relaxed), ..faults.counts };
    problems.extend(faults.fallen.iter().map(|name| format!("{name} ended by itself; see its log")));
    problems.extend(ending.problems);
    if ending.finished {
        problems.extend(nothing_done(&counts, &ending.tally, interrupted));
    }
    let clean = ending.tally.is_clean() && problems.is_empty();
    if clean && ending.finished {
        // What is left is worth a look only if something is wrong with it.
        let _ = env.clock.timeout(COME_BACK_LIMIT, checker.file_system().delete(&root, true)).await;
    }
    let verdict = VerdictJson {
        verdict: match (clean, ending.finished) {
            (false, _) => FAILED,
            (true, true) => CLEAN,
            (true, false) => UNFINISHED,
        },
        seed,
        interrupted: interrupted || !ending.finished,
        elapsed_ms: env.clock.mono_ms() - started_ms,
        faults: counts,
        operations: ending.tally.operations(),
        replicas_verified: ending.replicas_verified,
        time_to_healthy_ms: ending.time_to_healthy_ms,
        problems,
        tally: ending.tally,
    };
    tell_verdict(&mut context.out, &verdict, &root)
}

fn tell_verdict(out: &mut Out, verdict: &VerdictJson, root: &str) -> Outcome {
    if out.json {
        out.json(verdict)?
    } else {
        show(out, verdict, root)?
    }
    match verdict.verdict {
        CLEAN => Ok(()),
        UNFINISHED => Err(Failure::Exit(INTERRUPTED)),
        _ => Err(Failure::Exit(1)),
    }
}

/// What `work` gives; `None`: somebody did not want to wait for it.
async fn unless_interrupted<T>(work: impl Future<Output = T>) -> Option<T> {
    tokio::select! {
        biased;
        () = process::shutdown_signal() => None,
        done = work => Some(done),
    }
}

/// A run that broke nothing, or in which nothing could be lost, says nothing about the cluster.
fn nothing_done(faults: &Counts, tally: &Tally, interrupted: bool) -> Option<String> {
    if tally.files_written == 0 && !interrupted {
        return Some("no file was written: there was nothing to lose".into());
    }
    (faults.total() == 0 && !interrupted).then(|| "nothing was broken in all that time".into())
}

fn rate(args: &ChaosArgs, target: &Target) -> Outcome<Rate> {
    let datanodes = target.members().len() - 1;
    let down = args.down.map_or(datanodes.saturating_sub(2).max(1), usize::from);
    if down >= datanodes {
        let text = format!("--down {down}: there are {datanodes} datanodes, and one must stay up");
        return Err(failure(ErrorCode::InvalidArgument, text));
    }
    if args.every_ms > args.length_ms {
        let (every, length) = (human_millis(args.every_ms), human_millis(args.length_ms));
        return Err(Failure::Usage(format!("--every {every} is longer than --for {length}: nothing would happen")));
    }
    let nothing = !args.kill && !args.pause && !args.corrupt;
    Ok(Rate {
        length_ms: args.length_ms,
        every_ms: args.every_ms,
        away_ms: args.away_ms,
        down,
        kill: args.kill || nothing,
        pause: args.pause || nothing,
        with_namenode: args.with_namenode,
    })
}

/// Says now and then how the load gets on; never returns.
async fn tell(env: &Env, checker: &Checker, say: &dyn Fn(String)) {
    loop {
        env.clock.sleep(TELL_EVERY).await;
        let tally = checker.tally();
        let bad = tally.lost.len() + tally.altered.len() + tally.stuck.len();
        say(format!(
            "{}, {} failed, {} written, {} verified; lost, altered or stuck: {bad}",
            counted(tally.operations(), "operation"),
            grouped(tally.failed),
            human_size(tally.bytes_written),
            human_size(tally.bytes_verified),
        ));
    }
}

/// How it ended.
#[derive(Default)]
struct Ending {
    tally: Tally,
    time_to_healthy_ms: Option<u64>,
    replicas_verified: u64,
    /// Who did not come back, or why it was not healthy in time.
    problems: Vec<String>,
    /// Everybody was waited for, and everything was checked.
    finished: bool,
}

/// Mends what was broken, and checks everything, unless somebody does not want to wait for it.
async fn heal_and_check(env: &Env, faults: &mut Faults<'_>, checker: &mut Checker, datanodes: usize) -> Ending {
    if let Some(healed) = unless_interrupted(faults.heal(COME_BACK_LIMIT)).await
        && let Some(mut ending) = unless_interrupted(end(env, checker, datanodes)).await
    {
        ending.problems.extend(healed.err());
        return ending;
    }
    Ending { tally: checker.tally(), ..Ending::default() }
}

/// Ends the load, waits until the cluster is healthy, and holds every file and every replica against the ledger.
async fn end(env: &Env, checker: &mut Checker, datanodes: usize) -> Ending {
    let healed_ms = env.clock.mono_ms();
    checker.stop().await;
    // The load may have taken most of the minute to end; the cluster is still given some of it.
    let deadline_ms = (healed_ms + HEALTHY_LIMIT_MS).max(env.clock.mono_ms() + HEALTHY_LIMIT_MS / 6);
    let mut ending = Ending { finished: true, ..Ending::default() };
    loop {
        let unwell = match ill(checker.file_system(), datanodes).await {
            Some(why) => why,
            None => match checker.verify_replicas(datanodes as u32).await {
                Ok((whole, wrong)) if wrong.is_empty() => {
                    ending.replicas_verified = whole;
                    ending.time_to_healthy_ms = Some(env.clock.mono_ms() - healed_ms);
                    break;
                }
                Ok((_, wrong)) => wrong.join("; "),
                Err(error) => error.to_string(),
            },
        };
        if env.clock.mono_ms() > deadline_ms {
            ending.problems.push(format!("not healthy a minute after the last fault: {unwell}"));
            break;
        }
        env.clock.sleep(LOOK_AGAIN).await;
    }
    ending.tally = checker.finish().await;
    ending
}

/// What is not well, as the namenode sees it.
async fn ill(fs: &FileSystem, datanodes: usize) -> Option<String> {
    let report = match fs.cluster_report().await {
        Ok(report) => report,
        Err(error) => return Some(error.to_string()),
    };
    let live = report.nodes.iter().filter(|node| node.state() == NodeState::Live).count();
    if live < datanodes {
        return Some(format!("{live} of {datanodes} datanodes are live"));
    }
    if report.safemode {
        return Some(format!("safe mode: {}", report.safemode_reason));
    }
    let bad = [("missing", report.missing), ("corrupt", report.corrupt), ("under-replicated", report.under_replicated)];
    let bad: Vec<String> = bad.iter().filter(|(_, n)| *n > 0).map(|(what, n)| format!("{n} {what}")).collect();
    (!bad.is_empty()).then(|| format!("blocks: {}", bad.join(", ")))
}

fn show(out: &mut Out, verdict: &VerdictJson, root: &str) -> Outcome {
    let (tally, faults) = (&verdict.tally, &verdict.faults);
    for text in verdict.problems.iter().chain(&tally.lost).chain(&tally.altered).chain(&tally.stuck) {
        out.line(text)?;
    }
    let mut columns = Columns::new(&[]);
    let mut row = |name: &str, text: String| columns.row(vec![name.to_owned(), text]);
    row(
        "faults",
        format!(
            "kill {}, pause {}, corrupt {}, namenode killed {}, paused {}",
            faults.kill, faults.pause, faults.corrupt, faults.namenode_kill, faults.namenode_pause
        ),
    );
    row(
        "operations",
        format!(
            "{} in {}, {} failed, the longest took {}",
            grouped(verdict.operations),
            human_millis(verdict.elapsed_ms),
            grouped(tally.failed),
            human_millis(tally.longest_ms)
        ),
    );
    let files = counted(tally.files_written, "file");
    row("written", format!("{} in {files}, each closed and acknowledged", human_size(tally.bytes_written)));
    row("verified", format!("{} in {}", human_size(tally.bytes_verified), counted(tally.reads, "read")));
    let verified = match verdict.verdict {
        UNFINISHED => "not verified".into(),
        _ => format!("{} verified at the end", grouped(verdict.replicas_verified)),
    };
    row("replicas", verified);
    row("lost", tally.lost.len().to_string());
    row("altered", tally.altered.len().to_string());
    row("stuck", tally.stuck.len().to_string());
    let healthy =
        verdict.time_to_healthy_ms.map_or("no".into(), |ms| format!("{} after the last fault", human_millis(ms)));
    row("healthy", healthy);
    columns.print(out)?;
    for (error, count) in &tally.errors {
        out.line(format!("  failed {count} times: {error}"))?;
    }
    let kept = if verdict.verdict == CLEAN { String::new() } else { format!("; its files are kept in {root}") };
    out.line(format!("verdict: {} (seed {}){kept}", verdict.verdict, verdict.seed))
}

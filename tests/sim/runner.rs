//! Many seeds: a process forked for each, so that one that panics, hangs or eats memory takes nothing with it, and each starts from the same
//! state.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::FromRawFd as _;

use super::{pin, run, trace};

/// Real time after which a seed counts as hanging.
const HANG_MS: u64 = 120_000;
/// A child's report must fit into a pipe, since it is read when the child is gone.
const REPORT_BYTES: usize = 32 << 10;

/// What the command line asks for.
#[derive(Clone, Debug)]
struct Options {
    count: u64,
    from: u64,
    jobs: usize,
    trace: bool,
    /// Every how many-th seed runs twice; 0: none.
    twice_every: u64,
    /// Seeds that may fail before it stops.
    stop_after: usize,
    /// Success is to find that one of these invariants is broken (planted bugs); empty: that none is.
    expect: Vec<String>,
    run: run::RunOptions,
}

/// One seed's result.
#[derive(Clone, Debug, Default)]
struct Report {
    fingerprint: u64,
    virtual_ms: u64,
    cpu_ms: u64,
    operations: u64,
    faults: u64,
    /// Invariant and what was seen; empty: all is well.
    violations: Vec<(String, String)>,
}

const USAGE: &str = "usage: sim [COUNT] [--from SEED] [--jobs N] [--seed SEED] [--trace] [--twice] [--stop-after N] \
                     [--no-faults] [--wrap NAME] [--expect INVARIANT,...]";

/// Runs as asked; the exit code.
pub fn main(args: &[String]) -> i32 {
    // What test runners ask of a test program.
    if args.iter().any(|arg| arg == "--list") {
        if !args.iter().any(|arg| arg == "--ignored") {
            println!("seeds: test");
        }
        return 0;
    }
    let options = match parse(args) {
        Ok(options) => options,
        Err(error) => {
            eprintln!("sim: {error}\n{USAGE}");
            return 2;
        }
    };
    let failures = batch(&options);
    match (options.expect.is_empty(), failures) {
        (true, 0) | (false, 1..) => 0,
        _ => 1,
    }
}

fn parse(args: &[String]) -> Result<Options, String> {
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    let mut options = Options {
        count: 100,
        from: 1,
        jobs: cores,
        trace: false,
        twice_every: 10,
        stop_after: usize::MAX,
        expect: Vec::new(),
        run: run::RunOptions::default(),
    };
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let mut number = || -> Result<u64, String> {
            let text = args.next().ok_or(format!("{arg} needs a number"))?;
            text.parse().map_err(|_| format!("{arg}: {text:?} is no number"))
        };
        match arg.as_str() {
            "--from" => options.from = number()?,
            "--jobs" => options.jobs = number()?.clamp(1, 256) as usize,
            "--seed" => (options.from, options.count, options.twice_every) = (number()?, 1, 0),
            "--stop-after" => options.stop_after = number()?.max(1) as usize,
            "--trace" => options.trace = true,
            "--twice" => options.twice_every = 1,
            "--once" => options.twice_every = 0,
            "--no-faults" => options.run.faults = false,
            "--expect" => {
                let names = args.next().ok_or("--expect needs names of invariants")?;
                options.expect = names.split(',').map(str::to_owned).collect();
            }
            "--wrap" => options.run.wrap = Some(args.next().ok_or("--wrap needs a name")?.clone()),
            // From test runners: all is one test, and its output is wanted.
            "--exact" | "--nocapture" | "--include-ignored" | "seeds" => {}
            text => options.count = text.parse().map_err(|_| format!("{text:?} is not known"))?,
        }
    }
    Ok(options)
}

struct Child {
    seed: u64,
    second: bool,
    started_ms: u64,
    pipe: File,
}

/// Runs all seeds; how many failed.
fn batch(options: &Options) -> usize {
    let started_ms = pin::real_ms();
    let mut tasks = Vec::new();
    for seed in (options.from..options.from.saturating_add(options.count)).rev() {
        if options.twice_every > 0 && seed.is_multiple_of(options.twice_every) {
            tasks.push((seed, true));
        }
        tasks.push((seed, false));
    }
    let (mut running, mut prints) = (BTreeMap::<i32, Child>::new(), BTreeMap::<u64, u64>::new());
    let (mut passed, mut failed, mut done) = (0, Vec::<u64>::new(), Report::default());
    let mut said_ms = started_ms;
    while !running.is_empty() || (!tasks.is_empty() && failed.len() < options.stop_after) {
        while running.len() < options.jobs && failed.len() < options.stop_after {
            let Some((seed, second)) = tasks.pop() else { break };
            let (pid, child) = start(seed, second, options);
            running.insert(pid, child);
        }
        let Some((pid, status)) = ended(&running) else { continue };
        let Some(child) = running.remove(&pid) else { continue };
        let (seed, second) = (child.seed, child.second);
        let mut report = collect(child, status);
        if report.violations.is_empty()
            && let Some(other) = prints.insert(seed, report.fingerprint).filter(|other| *other != report.fingerprint)
        {
            let text = format!("two runs differ: {other:016x} and {:016x}", report.fingerprint);
            report.violations.push(("determinism".into(), text));
        }
        done.virtual_ms += report.virtual_ms;
        done.cpu_ms += report.cpu_ms;
        done.operations += report.operations;
        done.faults += report.faults;
        let is_expected = |(name, _): &(String, String)| options.expect.contains(name);
        if !report.violations.is_empty() && !options.expect.is_empty() && !report.violations.iter().any(is_expected) {
            // Broken, but not in the way that names the harm.
            println!("seed {seed} fails otherwise: {}", report.violations[0].0);
        } else if !report.violations.is_empty() && !failed.contains(&seed) {
            say_failure(seed, &report, options);
            failed.push(seed);
        } else if !second {
            passed += 1;
        }
        if options.count == 1 && report.violations.is_empty() {
            println!("seed {seed}: fingerprint {:016x}", report.fingerprint);
        }
        if pin::real_ms() - said_ms > 10_000 {
            said_ms = pin::real_ms();
            println!("{passed} seeds passed, {} failed, {} s", failed.len(), (said_ms - started_ms) / 1_000);
        }
    }
    let runs = (passed + failed.len()).max(1) as u64;
    println!(
        "{} seeds in {} s: {} ms of processor, {} s of virtual time, {} operations and {} faults a seed",
        passed + failed.len(),
        (pin::real_ms() - started_ms) / 1_000,
        done.cpu_ms / runs,
        done.virtual_ms / runs / 1_000,
        done.operations / runs,
        done.faults / runs,
    );
    let verdict = if failed.is_empty() { "ok" } else { "FAILED" };
    println!("test result: {verdict}. {passed} passed; {} failed; 0 ignored; 0 measured; 0 filtered out", failed.len());
    failed.len()
}

fn say_failure(seed: u64, report: &Report, options: &Options) {
    println!("seed {seed} FAILED");
    for (invariant, text) in &report.violations {
        println!("  {invariant}: {text}");
    }
    let wrap = options.run.wrap.as_ref().map(|wrap| format!(" --wrap {wrap}")).unwrap_or_default();
    println!("  replay: scripts/sim --seed {seed} --trace{wrap}");
}

/// Forks a child that runs a seed and writes its report into the pipe.
fn start(seed: u64, second: bool, options: &Options) -> (i32, Child) {
    let _ = std::io::stdout().flush();
    let mut ends = [0; 2];
    // SAFETY: room for two descriptors.
    assert_eq!(unsafe { libc::pipe(ends.as_mut_ptr()) }, 0, "no pipe");
    // SAFETY: this process has one thread, so the child may do everything.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0, "cannot fork");
    if pid == 0 {
        // SAFETY: the write end is ours alone; the read end is the parent's.
        let mut pipe = unsafe {
            libc::close(ends[0]);
            File::from_raw_fd(ends[1])
        };
        let text = child(seed, options);
        let _ = pipe.write_all(text.as_bytes());
        drop(pipe);
        // SAFETY: ends the child without running what the parent has registered for its end.
        unsafe { libc::_exit(0) };
    }
    // SAFETY: the read end is ours alone.
    let pipe = unsafe {
        libc::close(ends[1]);
        File::from_raw_fd(ends[0])
    };
    (pid, Child { seed, second, started_ms: pin::real_ms(), pipe })
}

/// In the child: runs the seed on a thread of its own, whose thread-local state is fresh.
fn child(seed: u64, options: &Options) -> String {
    let (echo, run_options) = (options.trace, options.run.clone());
    if echo {
        let _ = tracing::subscriber::set_global_default(trace::Echo);
    }
    let hook = move |info: &std::panic::PanicHookInfo<'_>| {
        let place = info.location().map(ToString::to_string).unwrap_or_default();
        let payload = info.payload();
        let text = payload.downcast_ref::<&str>().copied().or(payload.downcast_ref::<String>().map(String::as_str));
        let text = text.unwrap_or("?").replace('\n', " ");
        if echo {
            eprintln!("{}", std::backtrace::Backtrace::force_capture());
        }
        trace::violated("no_panic", format!("{place}: {text}"));
    };
    std::panic::set_hook(Box::new(hook));
    pin::pin(seed);
    let started_ms = pin::cpu_ms();
    let thread = std::thread::Builder::new().stack_size(32 << 20).spawn(move || {
        trace::begin(echo);
        let ran = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run::run(seed, &run_options)));
        let (fingerprint, violations) = trace::end();
        (ran.unwrap_or_default(), fingerprint, violations)
    });
    let (figures, fingerprint, violations) = thread.unwrap().join().unwrap_or_default();
    let mut text = format!(
        "{fingerprint} {} {} {} {}\n",
        figures.virtual_ms,
        pin::cpu_ms() - started_ms,
        figures.operations,
        figures.faults
    );
    let mut told: BTreeMap<&str, usize> = BTreeMap::new();
    for violation in &violations {
        let count = told.entry(violation.invariant).or_default();
        *count += 1;
        // Some of each: what fails first must not hide what fails worse.
        if *count > 3 {
            continue;
        }
        let line: String = violation.text.replace('\n', " ").chars().take(2_000).collect();
        text.push_str(&format!("{}\t{line}\n", violation.invariant));
    }
    text.truncate(REPORT_BYTES);
    text
}

/// Waits until a child has ended, or kills one that hangs.
fn ended(running: &BTreeMap<i32, Child>) -> Option<(i32, i32)> {
    loop {
        for (pid, child) in running {
            let mut status = 0;
            // SAFETY: a child of ours that was not waited for.
            if unsafe { libc::waitpid(*pid, &raw mut status, libc::WNOHANG) } == *pid {
                return Some((*pid, status));
            }
            if pin::real_ms() - child.started_ms > HANG_MS {
                // SAFETY: as above: the number cannot belong to anybody else.
                unsafe {
                    libc::kill(*pid, libc::SIGKILL);
                    libc::waitpid(*pid, &raw mut status, 0);
                }
                return Some((*pid, status));
            }
        }
        if running.is_empty() {
            return None;
        }
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}

fn collect(mut child: Child, status: i32) -> Report {
    let mut text = String::new();
    let read = child.pipe.read_to_string(&mut text);
    let mut report = Report::default();
    let mut lines = text.lines();
    let figures: Vec<u64> = lines.next().unwrap_or("").split(' ').filter_map(|word| word.parse().ok()).collect();
    match (&figures[..], read) {
        ([fingerprint, virtual_ms, cpu_ms, operations, faults], Ok(_)) => {
            (report.fingerprint, report.virtual_ms, report.cpu_ms) = (*fingerprint, *virtual_ms, *cpu_ms);
            (report.operations, report.faults) = (*operations, *faults);
        }
        _ => report.violations.push(("ends".into(), format!("the simulation itself died or hung (status {status})"))),
    }
    for line in lines {
        let (invariant, text) = line.split_once('\t').unwrap_or(("?", line));
        report.violations.push((invariant.into(), text.into()));
    }
    report
}

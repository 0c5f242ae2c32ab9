//! One worker process: how it is started, spoken to, and buried.

use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use cairn_common::net::{read_message, write_message};
use cairn_common::{Env, process};
use cairn_proto::pb::worker_order::Order;
use cairn_proto::{Error, ErrorCode, Result, pb};
use tokio::net::unix::pipe;
use tokio::process::{Child, ChildStderr, ChildStdin, Command};
use tokio::sync::{Mutex, mpsc};

use super::account::Account;
use super::cgroup::Group;
use super::log::AttemptLog;
use super::owner::Event;

/// Orders that a worker has not read yet: one task, and what a reduce is told while it runs.
const ORDERS: usize = 32;
/// Bytes of its standard error that are read at once.
const READ_BYTES: usize = 8 << 10;
/// Bytes that a pipe holds, as Linux makes them.
const PIPE_BYTES: usize = 64 << 10;

/// What a worker's owner keeps of it.
pub struct WorkerHandle {
    /// Leader of its process group.
    pub pid: u32,
    /// Tasks for it. One slot: it gets the next only after it has reported the last.
    pub orders: mpsc::Sender<pb::WorkerOrder>,
    /// Where its standard error goes.
    pub log: AttemptLog,
}

/// What a worker is started with.
pub struct Start<'a> {
    /// Its command; empty: this program with `task-worker`.
    pub command: &'a [String],
    /// Folder of the job.
    pub dir: &'a Path,
    /// Limits that the kernel holds it to.
    pub group: Option<&'a Group>,
    /// As whom it runs; `None`: as the daemon.
    pub account: Option<Account>,
}

/// Starts a worker for `job`. Call it on a thread that lives as long as the worker may: the kernel kills the child when the
/// thread that made it ends.
pub fn start(
    env: &Env,
    start: &Start<'_>,
    job: pb::WorkerJob,
    number: u64,
    events: mpsc::Sender<Event>,
) -> Result<WorkerHandle> {
    let failed = |error: io::Error| Error::io("cannot start a task worker", &error);
    let mut child = spawn(start).map_err(failed)?;
    let stderr = child.stderr.take().map(LoggedPipe::new).transpose().map_err(failed)?;
    let pid = child.id().unwrap_or_default();
    let (orders, receiver) = mpsc::channel(ORDERS);
    let log = AttemptLog::default();
    let first = pb::WorkerOrder { order: Some(Order::Job(job)) };
    if let Some(stdin) = child.stdin.take() {
        tokio::spawn(send_orders(stdin, first, receiver));
    }
    tokio::spawn(live(env.clone(), child, stderr, log.clone(), number, events));
    Ok(WorkerHandle { pid, orders, log })
}

fn spawn(start: &Start<'_>) -> io::Result<Child> {
    let mut command = child(start.command, &["task-worker"], start.dir, start.account)?;
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    if let Some(group) = start.group {
        let entrance = group.entrance()?;
        // SAFETY: between fork and exec only one write to an open descriptor is made.
        unsafe {
            command.pre_exec(move || match libc::write(entrance.as_raw_fd(), b"0".as_ptr().cast(), 1) {
                1 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            });
        }
    }
    command.spawn()
}

/// What starts a child of the executor in `dir`: the command that was set, or this program with the arguments `own`. It leads a process group of
/// its own, dies with the daemon, and runs under the account that is given.
pub fn child(set: &[String], own: &[&str], dir: &Path, account: Option<Account>) -> io::Result<Command> {
    let mut command = match set.split_first() {
        Some((program, arguments)) => {
            let mut command = Command::new(program);
            command.args(arguments);
            command
        }
        None => {
            let mut command = Command::new(std::env::current_exe()?);
            command.args(own);
            command
        }
    };
    command.current_dir(dir).process_group(0).kill_on_drop(true);
    clean_environment(&mut command, dir);
    die_with_parent(&mut command);
    if let Some(account) = account {
        // Other groups than the primary one are given up as well.
        command.uid(account.uid).gid(account.gid);
    }
    Ok(command)
}

/// A child sees nothing of the daemon's environment but the path. The allocator is told to keep few arenas and to give large pieces back, since
/// the resident size is what counts.
fn clean_environment(command: &mut Command, dir: &Path) {
    command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_else(|| "/usr/bin:/bin".into()));
    command.env("HOME", dir).env("TMPDIR", dir).env("LANG", "C.UTF-8");
    command
        .env("MALLOC_ARENA_MAX", "2")
        .env("MALLOC_MMAP_THRESHOLD_", "1048576")
        .env("MALLOC_TRIM_THRESHOLD_", "4194304");
    if let Some(filter) = std::env::var_os("CAIRN_LOG") {
        command.env("CAIRN_LOG", filter);
    }
}

/// The child gains no privileges, and ends when the thread that makes it does.
fn die_with_parent(command: &mut Command) {
    let parent = std::process::id();
    // SAFETY: between fork and exec only async-signal-safe calls are made: prctl, getppid, _exit.
    unsafe {
        command.pre_exec(move || {
            if libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 {
                return Err(io::Error::last_os_error());
            }
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                return Err(io::Error::last_os_error());
            }
            // The parent may have died before the line above.
            if libc::getppid() as u32 != parent {
                libc::_exit(1);
            }
            Ok(())
        });
    }
}

async fn send_orders(mut stdin: ChildStdin, first: pb::WorkerOrder, mut orders: mpsc::Receiver<pb::WorkerOrder>) {
    let mut next = Some(first);
    while let Some(order) = next {
        // A worker that is gone is reported by whoever waits for it.
        if write_message(&mut stdin, &order).await.is_err() {
            return;
        }
        next = orders.recv().await;
    }
    // Dropping its standard input tells the worker to end.
}

/// A worker that has ended may have left processes that hold its pipes open: it is read for no longer than this.
const LAST_WORDS: Duration = Duration::from_secs(2);

async fn live(
    env: Env,
    mut child: Child,
    stderr: Option<LoggedPipe>,
    log: AttemptLog,
    number: u64,
    events: mpsc::Sender<Event>,
) {
    let (pid, stdout) = (child.id().unwrap_or_default(), child.stdout.take());
    let reports = async {
        let Some(mut stdout) = stdout else { return };
        loop {
            match read_message::<pb::WorkerReport>(&mut stdout, "a task worker").await {
                Ok(report) => {
                    // What it wrote before it said this belongs to the same attempt.
                    if let Some(stderr) = &stderr {
                        stderr.log_what_is_there(&env, &log).await;
                    }
                    if events.send(Event::Report { worker: number, report }).await.is_err() {
                        return;
                    }
                }
                Err(error) if error.code() == ErrorCode::Unreachable => return,
                Err(error) => {
                    // What follows cannot be understood either: its attempt must fail, not hang.
                    log.write(&env, format!("{error}\n").as_bytes()).await;
                    process::kill_group(pid);
                    return;
                }
            }
        }
    };
    let errors = async {
        if let Some(stderr) = &stderr {
            stderr.log_all(&env, &log).await;
        }
    };
    let both = async { tokio::join!(errors, reports) };
    tokio::pin!(both);
    let status = tokio::select! {
        status = child.wait() => {
            // Only what has left its group holds the pipes then, in which its last words are.
            process::kill_group(pid);
            if env.clock.timeout(LAST_WORDS, &mut both).await.is_err() && let Some(stderr) = &stderr {
                // Both go on meanwhile: one of them may be about to log, or to tell what it has read.
                tokio::select! {
                    biased;
                    _ = &mut both => {}
                    () = stderr.log_what_is_there(&env, &log) => {}
                }
            }
            status
        }
        _ = &mut both => child.wait().await,
    };
    let how = status.map_or_else(|error| error.to_string(), describe);
    // Nobody listens only when the executor has ended.
    let _ = events.send(Event::Exited { worker: number, how }).await;
}

/// The standard error of a worker, on its way into a log.
struct LoggedPipe {
    pipe: pipe::Receiver,
    /// Held while bytes are taken from the pipe and brought into the log.
    taking: Mutex<()>,
}

impl LoggedPipe {
    fn new(stderr: ChildStderr) -> io::Result<Self> {
        let pipe = pipe::Receiver::from_owned_fd(stderr.into_owned_fd()?)?;
        Ok(Self { pipe, taking: Mutex::new(()) })
    }

    /// Until nobody can write there any more.
    async fn log_all(&self, env: &Env, log: &AttemptLog) {
        let mut bytes = vec![0; READ_BYTES];
        while self.pipe.readable().await.is_ok() {
            let _taking = self.taking.lock().await;
            match self.pipe.try_read(&mut bytes) {
                Ok(0) => return,
                Ok(n) => log.write(env, &bytes[..n]).await,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return,
            }
        }
    }

    /// What was written there until now. Asked past the runtime, which may not have heard of it yet.
    async fn log_what_is_there(&self, env: &Env, log: &AttemptLog) {
        let _taking = self.taking.lock().await;
        let mut bytes = vec![0; READ_BYTES];
        // Not for ever, if somebody writes as fast as this reads.
        for _ in 0..PIPE_BYTES / READ_BYTES {
            match rustix::io::read(&self.pipe, &mut bytes) {
                Ok(n @ 1..) => log.write(env, &bytes[..n]).await,
                _ => return,
            }
        }
    }
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exited with status {code}"),
        (None, Some(signal)) => format!("was ended by signal {signal}"),
        (None, None) => "ended".into(),
    }
}

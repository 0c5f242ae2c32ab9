//! The child process of a streaming task: lines in, lines out, reports on standard error.
//!
//! # Overview
//! One thread does it all: it waits until the child takes input or has output, so neither side can wait for the other for ever, and what
//! the child prints is handed on while the caller feeds it. The child is in the process group of its worker, so that limits and kills
//! reach it, and it is killed when this is dropped.
//!
//! # Memory
//! [`FEED_BYTES`] of input that the child has not taken yet, and one line of output, which may be as long as a record.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};

use cairn_common::clock::Clock;
use cairn_common::process;
use cairn_proto::mapoutput::MAX_RECORD_BYTES;
use cairn_proto::{Error, ErrorCode, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::reporter::Reporter;

/// Input that is gathered before the child gets it, and that may wait for it.
pub const FEED_BYTES: usize = 128 << 10;
/// Asked of the kernel for each pipe; it may give less.
const PIPE_BYTES: usize = 256 << 10;
const READ_BYTES: usize = 128 << 10;
/// How long the pipes of a child that has ended are still listened to, if somebody else holds them open.
const AFTER_END: Timespec = Timespec { tv_sec: 0, tv_nsec: 500_000_000 };

/// Takes one line of output, without its line feed.
pub type EachLine<'a> = &'a mut dyn FnMut(&[u8]) -> Result<()>;

/// A running child.
pub struct Child {
    /// For messages: "mapper python3 m.py".
    name: String,
    process: std::process::Child,
    /// Readable when the process has ended.
    ended: OwnedFd,
    status: Option<ExitStatus>,
    stdin: Option<ChildStdin>,
    stdout: Option<ChildStdout>,
    stderr: Option<ChildStderr>,
    /// Input from `fed` on has not been taken yet.
    input: Vec<u8>,
    fed: usize,
    /// Bytes of input that came when the child did not listen any more.
    unread: u64,
    line: Vec<u8>,
    scratch: Vec<u8>,
    reporter: Reporter,
    rules: Rules,
    /// When it is no longer waited for.
    deadline: Option<Deadline>,
}

/// What counts as a failure.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// An exit status other than 0.
    pub non_zero_exit: bool,
    /// Input that the child did not read.
    pub unread_input: bool,
}

/// A time by which a child that is only tried must have ended.
#[derive(Clone)]
pub struct Deadline {
    clock: Clock,
    at_ms: u64,
}

impl Deadline {
    /// So many milliseconds from now.
    pub fn after(ms: u64) -> Self {
        let clock = Clock::system();
        Self { at_ms: clock.mono_ms() + ms, clock }
    }

    /// Milliseconds that are left.
    pub fn left_ms(&self) -> u64 {
        self.at_ms.saturating_sub(self.clock.mono_ms())
    }
}

/// What the last poll said.
#[derive(Default)]
struct Ready {
    stdin: bool,
    stdout: bool,
    stderr: bool,
    ended: bool,
}

impl Child {
    /// Starts `command`, whose program, arguments, folder and environment are set.
    pub fn start(name: String, mut command: Command, reporter: Reporter, rules: Rules) -> Result<Self> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // SAFETY: the closure only makes a system call between fork and exec.
        unsafe {
            command.pre_exec(|| {
                process::die_with_parent();
                Ok(())
            });
        }
        let mut child = command.spawn().map_err(|error| cannot_start(&name, &error))?;
        let pid = rustix::process::Pid::from_child(&child);
        let failed = |error: rustix::io::Errno| Error::io(format!("cannot follow the {name}"), &error.into());
        let ended = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).map_err(failed)?;
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let pipes =
            [stdin.as_ref().map(AsFd::as_fd), stdout.as_ref().map(AsFd::as_fd), stderr.as_ref().map(AsFd::as_fd)];
        for pipe in pipes.into_iter().flatten() {
            rustix::io::ioctl_fionbio(pipe, true).map_err(failed)?;
            // Larger pipes mean fewer turns; without them it works as well.
            let _ = rustix::pipe::fcntl_setpipe_size(pipe, PIPE_BYTES);
        }
        Ok(Self {
            name,
            process: child,
            ended,
            status: None,
            stdin,
            stdout,
            stderr,
            input: Vec::with_capacity(FEED_BYTES + (8 << 10)),
            fed: 0,
            unread: 0,
            line: Vec::new(),
            scratch: vec![0; READ_BYTES],
            reporter,
            rules,
            deadline: None,
        })
    }

    /// Fails with [`ErrorCode::TimedOut`] if it has not ended by then.
    #[must_use]
    pub fn until(mut self, deadline: Deadline) -> Self {
        self.deadline = Some(deadline);
        self
    }

    /// Has it ended by a signal, or with a status that counts as a failure?
    pub fn crashed(&self) -> bool {
        let failure = |status: ExitStatus| !status.success() && (self.rules.non_zero_exit || status.signal().is_some());
        self.status.is_some_and(failure)
    }

    /// Where to append input; then call [`Self::feed`].
    pub fn input(&mut self) -> &mut Vec<u8> {
        &mut self.input
    }

    /// Gives the child its input if enough has gathered, and hands on what it prints meanwhile.
    #[inline]
    pub fn feed(&mut self, each: EachLine<'_>) -> Result<()> {
        if self.input.len() - self.fed < FEED_BYTES { Ok(()) } else { self.drive(false, each) }
    }

    /// Ends the input and takes the rest of the output; the child has ended well when this returns.
    pub fn finish(&mut self, each: EachLine<'_>) -> Result<()> {
        self.drive(true, each)?;
        if !self.line.is_empty() {
            // Text need not end with a line feed.
            let line = std::mem::take(&mut self.line);
            each(&line)?;
        }
        self.reporter.finish();
        self.check_end()
    }

    /// Moves bytes until little input waits, or (`to_end`) until the child has ended.
    fn drive(&mut self, to_end: bool, each: EachLine<'_>) -> Result<()> {
        loop {
            let waiting = self.input.len() - self.fed;
            if !to_end && waiting < FEED_BYTES / 2 {
                return Ok(());
            }
            if to_end && waiting == 0 {
                self.stdin = None;
            }
            if self.status.is_some() && self.stdout.is_none() && self.stderr.is_none() {
                return self.after_end(to_end);
            }
            let Some(ready) = self.wait()? else {
                // The process is gone; whoever still holds its pipes is not waited for.
                (self.stdout, self.stderr) = (None, None);
                continue;
            };
            if ready.stderr {
                self.read_stderr()?;
            }
            if ready.stdout {
                self.read_stdout(each)?;
            }
            if ready.stdin {
                self.write_stdin()?;
            }
            if ready.ended {
                let status = self
                    .process
                    .wait()
                    .map_err(|error| Error::io(format!("cannot wait for the {}", self.name), &error))?;
                self.status = Some(status);
                self.drop_input();
            }
        }
    }

    /// The child ended: before the end of its input that is a failure.
    fn after_end(&mut self, to_end: bool) -> Result<()> {
        self.reporter.finish();
        if to_end { Ok(()) } else { self.check_end() }
    }

    fn check_end(&self) -> Result<()> {
        if let Some(status) = self.status.filter(|_| self.crashed()) {
            return Err(self.failed(&how_it_ended(status)));
        }
        if self.unread > 0 && self.rules.unread_input {
            let text = "ended (status 0) before it had read all of its input; if that is meant, set stream.unread.input.is.failure=false";
            return Err(self.failed(text));
        }
        Ok(())
    }

    fn failed(&self, how: &str) -> Error {
        Error::new(ErrorCode::TaskFailed, format!("the {} {how}", self.name)).with_subject(self.name.clone())
    }

    /// Waits until something can be done. `None`: the process has ended and its pipes have been silent for a while.
    fn wait(&mut self) -> Result<Option<Ready>> {
        let mut fds = Vec::with_capacity(4);
        let has_input = self.input.len() > self.fed;
        let stdin = add(&mut fds, self.stdin.as_ref().filter(|_| has_input).map(AsFd::as_fd), PollFlags::OUT);
        let stdout = add(&mut fds, self.stdout.as_ref().map(AsFd::as_fd), PollFlags::IN);
        let stderr = add(&mut fds, self.stderr.as_ref().map(AsFd::as_fd), PollFlags::IN);
        let running = self.status.is_none();
        let ended = add(&mut fds, running.then(|| self.ended.as_fd()), PollFlags::IN);
        let left = self.deadline.as_ref().map(|deadline| Timespec {
            tv_sec: (deadline.left_ms() / 1_000).cast_signed(),
            tv_nsec: (deadline.left_ms() % 1_000 * 1_000_000).cast_signed(),
        });
        let limit = if running { left.as_ref() } else { Some(&AFTER_END) };
        loop {
            match poll(&mut fds, limit) {
                Ok(0) if running => {
                    return Err(Error::new(ErrorCode::TimedOut, format!("the {} has not ended in time", self.name)));
                }
                Ok(0) => return Ok(None),
                Ok(_) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(Error::io(format!("cannot wait for the {}", self.name), &error.into())),
            }
        }
        let is = |at: Option<usize>| at.is_some_and(|at| !fds[at].revents().is_empty());
        Ok(Some(Ready { stdin: is(stdin), stdout: is(stdout), stderr: is(stderr), ended: is(ended) }))
    }

    fn write_stdin(&mut self) -> Result<()> {
        let Some(stdin) = &mut self.stdin else { return Ok(()) };
        match stdin.write(&self.input[self.fed..]) {
            Ok(count) => {
                self.reporter.progressed();
                self.fed += count;
                if self.fed == self.input.len() {
                    self.input.clear();
                    self.fed = 0;
                } else if self.fed >= FEED_BYTES {
                    self.input.drain(..self.fed);
                    self.fed = 0;
                }
                Ok(())
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(()),
            // It has closed its end. Whether that is a failure shows when it ends.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {
                self.drop_input();
                Ok(())
            }
            Err(error) => Err(Error::io(format!("cannot write to the {}", self.name), &error)),
        }
    }

    fn drop_input(&mut self) {
        self.unread += (self.input.len() - self.fed) as u64;
        self.input.clear();
        self.fed = 0;
        self.stdin = None;
    }

    fn read_stdout(&mut self, each: EachLine<'_>) -> Result<()> {
        let Some(stdout) = &mut self.stdout else { return Ok(()) };
        let count = match stdout.read(&mut self.scratch) {
            Ok(0) => {
                self.stdout = None;
                return Ok(());
            }
            Ok(count) => count,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => return Ok(()),
            Err(error) => return Err(Error::io(format!("cannot read from the {}", self.name), &error)),
        };
        self.reporter.progressed();
        let mut rest = &self.scratch[..count];
        while let Some(at) = memchr::memchr(b'\n', rest) {
            if self.line.is_empty() {
                each(&rest[..at])?;
            } else {
                self.line.extend_from_slice(&rest[..at]);
                let result = each(&self.line);
                self.line.clear();
                result?;
            }
            rest = &rest[at + 1..];
        }
        self.line.extend_from_slice(rest);
        if self.line.len() > MAX_RECORD_BYTES {
            let start = String::from_utf8_lossy(&self.line[..40]).into_owned();
            let text = format!(
                "printed a line of more than {MAX_RECORD_BYTES} bytes, the longest record; it starts with {start:?}"
            );
            return Err(self.failed(&text));
        }
        Ok(())
    }

    fn read_stderr(&mut self) -> Result<()> {
        let Some(stderr) = &mut self.stderr else { return Ok(()) };
        match stderr.read(&mut self.scratch) {
            Ok(0) => self.stderr = None,
            Ok(count) => self.reporter.take(&self.scratch[..count]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) => return Err(Error::io(format!("cannot read the errors of the {}", self.name), &error)),
        }
        Ok(())
    }
}

/// Adds a descriptor, if there is one; returns where it stands.
fn add<'a>(fds: &mut Vec<PollFd<'a>>, fd: Option<BorrowedFd<'a>>, flags: PollFlags) -> Option<usize> {
    fds.push(PollFd::from_borrowed_fd(fd?, flags));
    Some(fds.len() - 1)
}

impl Drop for Child {
    fn drop(&mut self) {
        if self.status.is_some() {
            return;
        }
        // What it said last may be why the task fails.
        while matches!(self.read_stderr(), Ok(())) && self.reporter.has_news() {}
        self.reporter.finish();
        process::kill_tree(self.process.id());
        // It was killed: this does not wait long. Nothing is left to do about an error.
        let _ = self.process.wait();
    }
}

fn how_it_ended(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exited with status {code}"),
        (None, Some(signal)) => format!("was ended by signal {signal}"),
        (None, None) => "ended".into(),
    }
}

fn cannot_start(name: &str, error: &std::io::Error) -> Error {
    // What says the same on every node is not tried again; a missing interpreter may be there on another.
    let code = match error.raw_os_error() {
        Some(libc::ENOEXEC | libc::E2BIG) => ErrorCode::InvalidArgument,
        Some(libc::ENOENT) => ErrorCode::FileNotFound,
        Some(libc::EACCES | libc::EPERM) => ErrorCode::PermissionDenied,
        // No record is to blame.
        _ => ErrorCode::Io,
    };
    let why = match error.raw_os_error() {
        Some(libc::ENOEXEC) => "it is no program, and has no first line like \"#!/usr/bin/env python3\"".into(),
        Some(libc::ENOENT) => "the interpreter that its first line names does not exist on this node".into(),
        Some(libc::E2BIG) => "arguments and job properties (which become its environment) are too long".into(),
        _ => error.to_string(),
    };
    Error::new(code, format!("cannot start the {name}: {why}")).with_subject(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mapreduce::TaskContext;

    fn start(script: &str, rules: Rules) -> Child {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        let reporter = Reporter::new(TaskContext::default(), "reporter:");
        Child::start(format!("mapper {script:?}"), command, reporter, rules).unwrap()
    }

    const STRICT: Rules = Rules { non_zero_exit: true, unread_input: true };

    /// Feeds 40 MB of lines; returns lines and bytes that came back.
    fn feed(child: &mut Child) -> Result<(u64, u64)> {
        let (mut lines, mut bytes) = (0, 0);
        let mut each = |line: &[u8]| {
            lines += 1;
            bytes += line.len() as u64;
            Ok(())
        };
        for number in 0..400_000u32 {
            child.input().extend_from_slice(format!("{number:099}\n").as_bytes());
            child.feed(&mut each)?;
        }
        child.finish(&mut each)?;
        Ok((lines, bytes))
    }

    #[test]
    fn neither_side_waits_for_the_other() {
        assert_eq!(feed(&mut start("cat", STRICT)).unwrap(), (400_000, 39_600_000));
        // Everything comes after the end of the input, or before its start; and errors in between.
        assert_eq!(feed(&mut start("tac", STRICT)).unwrap().0, 400_000);
        let before = "head -c 3000000 /dev/zero | tr '\\0' '\\n'; cat > /dev/null";
        assert_eq!(feed(&mut start(before, STRICT)).unwrap(), (3_000_000, 0));
        let errors = "tee /dev/stderr 2> /dev/null | wc -l; head -c 1000000 /dev/zero | tr '\\0' x >&2; echo end";
        assert_eq!(feed(&mut start(errors, STRICT)).unwrap().0, 2);
    }

    #[test]
    fn how_it_ended_is_told() {
        let message = |script: &str| feed(&mut start(script, STRICT)).unwrap_err().message().to_owned();
        assert!(message("exit 3").ends_with("exited with status 3"));
        assert!(message("cat > /dev/null; exit 4").ends_with("exited with status 4"));
        assert!(message("kill -KILL $$").ends_with("was ended by signal 9"));
        assert!(message("head -n 1").contains("before it had read all of its input"));
        assert!(message("exec <&-; sleep 0.1").contains("before it had read all of its input"));
        assert!(message("head -c 20000000 /dev/zero; cat > /dev/null").contains("a line of more than"));
        let lax = Rules { non_zero_exit: false, unread_input: false };
        assert_eq!(feed(&mut start("head -n 2; exit 5", lax)).unwrap().0, 2);
        assert!(feed(&mut start("kill -KILL $$", lax)).is_err(), "a crash is never what was meant");
    }

    #[test]
    fn a_last_line_without_a_line_feed_counts_and_helpers_are_not_waited_for() {
        let mut child = start("sleep 30 & printf 'a\\nb'", Rules { unread_input: false, ..STRICT });
        let mut lines = Vec::new();
        child
            .finish(&mut |line| {
                lines.push(line.to_vec());
                Ok(())
            })
            .unwrap();
        assert_eq!(lines, [b"a", b"b"]);
    }

    #[test]
    fn a_child_that_is_let_go_is_killed_with_what_it_started() {
        let child = start("sleep 60 | sleep 60", STRICT);
        let id = child.process.id();
        let below = || std::fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap_or_default();
        while below().split_ascii_whitespace().count() < 2 {}
        let all: Vec<u32> = below().split_ascii_whitespace().map(|pid| pid.parse().unwrap()).collect();
        drop(child);
        while all.iter().any(|pid| process::ProcessRef::of(*pid).is_some_and(|process| process.runs())) {}
    }
}

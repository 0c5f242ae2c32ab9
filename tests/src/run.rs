//! One run of the `cairn` command.

use std::io::Write;
use std::process::{Command, Stdio};

use serde_json::Value;

/// How a command ended.
#[derive(Debug)]
pub struct Run {
    /// The command, for messages.
    pub line: String,
    /// Exit code; -1 if a signal ended it.
    pub code: i32,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: String,
}

impl Run {
    /// Runs `command` to its end, with `input` on its standard input.
    pub fn of(mut command: Command, input: &[u8]) -> Self {
        let line = line_of(&command);
        command.stdin(if input.is_empty() { Stdio::null() } else { Stdio::piped() });
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let output = match child.stdin.take() {
            None => child.wait_with_output().unwrap(),
            Some(mut stdin) => std::thread::scope(|scope| {
                // A command that fails early closes its input: its exit code says more than our broken pipe.
                scope.spawn(move || stdin.write_all(input));
                child.wait_with_output().unwrap()
            }),
        };
        Self::ended(line, output)
    }

    /// Waits for a command that was started with its output piped; kills it after `deadline`.
    pub fn of_child(line: &str, child: std::process::Child, deadline: std::time::Duration) -> Self {
        let process = crate::process::Process::of(child.id());
        let (send, receive) = std::sync::mpsc::sync_channel(1);
        std::thread::spawn(move || send.send(child.wait_with_output()));
        let started = std::time::Instant::now();
        loop {
            // The machine may become busy only now.
            let left = crate::wait::stretched(deadline).saturating_sub(started.elapsed());
            match receive.recv_timeout(left.min(std::time::Duration::from_secs(1))) {
                Ok(output) => return Self::ended(line.to_owned(), output.unwrap()),
                Err(_) if left.is_zero() => {
                    process.inspect(|process| process.signal(libc::SIGKILL));
                    panic!("{line} did not end within {deadline:?}");
                }
                Err(_) => {}
            }
        }
    }

    /// A command whose output is there already.
    pub fn ended(line: String, output: std::process::Output) -> Self {
        Self {
            line,
            code: output.status.code().unwrap_or(-1),
            stdout: output.stdout,
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Demands success; returns the standard output as text.
    #[track_caller]
    pub fn ok(self) -> String {
        String::from_utf8(self.ok_bytes()).expect("output is UTF-8")
    }

    /// Demands success; returns the standard output.
    #[track_caller]
    pub fn ok_bytes(self) -> Vec<u8> {
        assert_eq!(self.code, 0, "{}: {}", self.line, self.stderr);
        self.stdout
    }

    /// Demands success; returns the standard output as JSON.
    #[track_caller]
    pub fn json(self) -> Value {
        let line = self.line.clone();
        let text = self.ok();
        serde_json::from_str(text.trim()).unwrap_or_else(|error| panic!("{line}: {error} in {text:?}"))
    }

    /// Demands this exit code, nothing on standard output, and exactly one clear line on standard error, which is returned.
    #[track_caller]
    pub fn fails(self, code: i32) -> String {
        assert_eq!(self.code, code, "{}: stdout {:?}, stderr {:?}", self.line, self.text(), self.stderr);
        let line = self.stderr.trim_end_matches('\n').to_owned();
        assert!(!line.is_empty() && !line.contains('\n'), "{}: not one line: {:?}", self.line, self.stderr);
        assert!(!line.contains("panicked"), "{}: {line}", self.line);
        line
    }

    /// [`Run::fails`], and the line must hold each of `parts`, whatever the case of letters.
    #[track_caller]
    pub fn fails_naming(self, code: i32, parts: &[&str]) -> String {
        let command = self.line.clone();
        let line = self.fails(code);
        let lower = line.to_lowercase();
        for part in parts {
            assert!(lower.contains(&part.to_lowercase()), "{command}: {line:?} does not name {part:?}");
        }
        line
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).chars().take(2_000).collect()
    }
}

/// A command as one would type it.
pub fn line_of(command: &Command) -> String {
    let mut line = command.get_program().to_string_lossy().into_owned();
    for arg in command.get_args() {
        line.push(' ');
        line.extend(arg.to_string_lossy().chars().take(200));
    }
    line
}

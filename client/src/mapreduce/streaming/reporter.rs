//! What a streaming child writes to standard error: counters and status for us, the rest for people.

use std::io::Write as _;

use crate::mapreduce::TaskContext;

/// Longest line that is looked at; a longer one is passed on in pieces.
const MAX_LINE_BYTES: usize = 64 << 10;

/// Reads the lines; those that do not start with the prefix go to this process's standard error, which is the attempt's log.
pub struct Reporter {
    task: TaskContext,
    /// Empty: every line is for people.
    prefix: String,
    line: Vec<u8>,
    news: bool,
    /// Nothing is passed on to people.
    silent: bool,
}

impl Reporter {
    /// Reports for `task`; lines for us start with `prefix` ("reporter:").
    pub fn new(task: TaskContext, prefix: &str) -> Self {
        Self { task, prefix: prefix.to_owned(), line: Vec::new(), news: false, silent: false }
    }

    /// What is not for us goes nowhere.
    #[must_use]
    pub fn silent(mut self) -> Self {
        self.silent = true;
        self
    }

    /// Takes bytes as they come.
    pub fn take(&mut self, bytes: &[u8]) {
        self.news = true;
        let mut people = Vec::new();
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.line.extend_from_slice(piece);
            if self.line.ends_with(b"\n") || self.line.len() > MAX_LINE_BYTES {
                let line = std::mem::take(&mut self.line);
                if !self.report(&line) {
                    people.extend_from_slice(&line);
                }
            }
        }
        self.pass_on(&people);
    }

    /// Tells that the task lives.
    pub fn progressed(&self) {
        self.task.progressed();
    }

    /// Whether anything came since the last call.
    pub fn has_news(&mut self) -> bool {
        std::mem::take(&mut self.news)
    }

    /// Takes what stands without a line feed as a line.
    pub fn finish(&mut self) {
        let mut line = std::mem::take(&mut self.line);
        if !line.is_empty() && !self.report(&line) {
            line.push(b'\n');
            self.pass_on(&line);
        }
    }

    fn pass_on(&self, bytes: &[u8]) {
        if !bytes.is_empty() && !self.silent {
            // The log is full or its reader gone: the task goes on without.
            let _ = std::io::stderr().write_all(bytes);
        }
    }

    /// False: the line is for people.
    fn report(&self, line: &[u8]) -> bool {
        let Ok(text) = std::str::from_utf8(line) else { return false };
        let Some(report) = text.strip_prefix(self.prefix.as_str()).filter(|_| !self.prefix.is_empty()) else {
            return false;
        };
        let report = report.trim_end();
        if let Some(status) = report.strip_prefix("status:") {
            self.task.set_status(status);
            return true;
        }
        // "counter:GROUP,NAME,AMOUNT"; the name may hold commas, the amount is what stands behind the last one.
        let counter = report.strip_prefix("counter:").and_then(|rest| {
            let (name, amount) = rest.rsplit_once(',')?;
            let (group, name) = name.split_once(',')?;
            Some((group, name, amount.trim().parse::<u64>().ok()?))
        });
        let Some((group, name, amount)) = counter else { return false };
        self.task.count(&format!("{group}.{name}"), amount);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_and_status_however_they_are_cut() {
        let text = b"reporter:counter:words,a,b,3\nnote\nreporter:status:half way\nreporter:counter:words,x,\nreporter:counter:words,x,4";
        for step in [1, 2, 7, 1_000] {
            let task = TaskContext::default();
            let mut reporter = Reporter::new(task.clone(), "reporter:");
            for piece in text.chunks(step) {
                reporter.take(piece);
            }
            reporter.finish();
            let all = task.user_counters.all();
            assert_eq!((all.user("words.a,b"), all.user("words.x")), (3, 4), "step {step}");
            assert_eq!(task.user_counters.status(), "half way");
        }
    }
}

//! What goes to standard output, and how a command ends.

use std::io::{IsTerminal, Write};

use cairn_proto::{Error, ErrorCode};
use serde::Serialize;

/// Why a command did not succeed.
#[derive(Debug)]
pub enum Failure {
    /// One line on standard error, exit 1.
    Error(Error),
    /// One line on standard error, exit 2.
    Usage(String),
    /// All has been said already (as `fsck` does); exit with this.
    Exit(u8),
    /// Whoever read our output has had enough.
    BrokenPipe,
}

/// Result of a command.
pub type Outcome<T = ()> = Result<T, Failure>;

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

/// A failure of this program's own making.
pub fn failure(code: ErrorCode, text: impl Into<String>) -> Failure {
    Failure::Error(Error::new(code, text))
}

/// What a failed write to standard output means.
pub fn stdout_failure(error: &std::io::Error) -> Failure {
    match error.kind() {
        std::io::ErrorKind::BrokenPipe => Failure::BrokenPipe,
        _ => Failure::Error(Error::io("cannot write to standard output", error)),
    }
}

const FLUSH_BYTES: usize = 64 << 10;

/// Buffered standard output for text; flush it at the end.
pub struct Out {
    buffer: Vec<u8>,
    /// Print JSON instead of text.
    pub json: bool,
    first_of_array: bool,
}

impl Out {
    /// Nothing written yet.
    pub fn new(json: bool) -> Self {
        Self { buffer: Vec::new(), json, first_of_array: true }
    }

    /// A line of text.
    pub fn line(&mut self, text: impl AsRef<str>) -> Outcome {
        self.buffer.extend_from_slice(text.as_ref().as_bytes());
        self.buffer.push(b'\n');
        if self.buffer.len() >= FLUSH_BYTES { self.flush() } else { Ok(()) }
    }

    /// A value as one line of JSON.
    pub fn json(&mut self, value: &impl Serialize) -> Outcome {
        let text = serde_json::to_string(value)
            .map_err(|error| failure(ErrorCode::Internal, format!("cannot write JSON: {error}")))?;
        self.line(text)
    }

    /// One element of an array that is printed as it comes; end it with [`Out::end_array`].
    pub fn element(&mut self, value: &impl Serialize) -> Outcome {
        let start: &[u8] = if self.first_of_array { b"[" } else { b",\n" };
        self.buffer.extend_from_slice(start);
        self.first_of_array = false;
        serde_json::to_writer(&mut self.buffer, value)
            .map_err(|error| failure(ErrorCode::Internal, format!("cannot write JSON: {error}")))?;
        if self.buffer.len() >= FLUSH_BYTES { self.flush() } else { Ok(()) }
    }

    /// Closes the array.
    pub fn end_array(&mut self) -> Outcome {
        let end = if self.first_of_array { "[]" } else { "]" };
        self.first_of_array = true;
        self.line(end)
    }

    /// Hands everything to the operating system.
    pub fn flush(&mut self) -> Outcome {
        let result = write_stdout(&self.buffer);
        self.buffer.clear();
        result.map_err(|error| stdout_failure(&error))
    }
}

/// Writes straight to descriptor 1: Rust's own standard output looks for line ends in all that passes.
pub fn write_stdout(mut bytes: &[u8]) -> std::io::Result<()> {
    let stdout = rustix::stdio::stdout();
    while !bytes.is_empty() {
        match rustix::io::write(stdout, bytes) {
            Ok(0) => return Err(std::io::ErrorKind::WriteZero.into()),
            Ok(count) => bytes = &bytes[count..],
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// One line on standard error.
pub fn complain(text: &str) {
    // With standard error closed there is nobody left to tell.
    let _ = writeln!(std::io::stderr(), "cairn: {}", super::config::one_line(text));
}

/// Are both ends a person's terminal?
pub fn stderr_is_terminal() -> bool {
    std::io::stderr().is_terminal()
}

/// Columns wide enough for what is in them: numbers to the right, the last column as it is.
pub struct Columns {
    rows: Vec<Vec<String>>,
    right: &'static [usize],
}

impl Columns {
    /// Columns with these indices are aligned to the right.
    pub fn new(right: &'static [usize]) -> Self {
        Self { rows: Vec::new(), right }
    }

    /// Adds a row.
    pub fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    /// Prints all rows.
    pub fn print(self, out: &mut Out) -> Outcome {
        let count = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |at: usize| {
            self.rows.iter().filter_map(|row| row.get(at)).map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..count).map(width).collect();
        for row in &self.rows {
            let mut line = String::new();
            for (at, cell) in row.iter().enumerate() {
                let last = at + 1 == row.len();
                let pad = " ".repeat(widths[at].saturating_sub(cell.chars().count()));
                if self.right.contains(&at) {
                    line.push_str(&pad);
                    line.push_str(cell);
                } else {
                    line.push_str(cell);
                    if !last {
                        line.push_str(&pad);
                    }
                }
                if !last {
                    line.push_str("  ");
                }
            }
            out.line(line)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrays_are_valid_json_as_they_grow() {
        let mut out = Out::new(true);
        out.element(&1).unwrap();
        out.element(&"a").unwrap();
        let Failure::Exit(_) = Failure::Exit(0) else { panic!() };
        out.buffer.extend_from_slice(b"]");
        assert_eq!(serde_json::from_slice::<serde_json::Value>(&out.buffer).unwrap(), serde_json::json!([1, "a"]));
    }

    #[test]
    fn columns_line_up() {
        let mut out = Out::new(false);
        let mut columns = Columns::new(&[1]);
        columns.row(vec!["a".into(), "1".into(), "x".into()]);
        columns.row(vec!["bbb".into(), "100".into(), "y".into()]);
        columns.print(&mut out).unwrap();
        assert_eq!(String::from_utf8(out.buffer).unwrap(), "a      1  x\nbbb  100  y\n");
    }
}

//! What an attempt writes to its standard error: a file with a bound, and the last lines in memory.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cairn_common::Env;
use cairn_common::durable::{File, OpenMode};

const TAIL_LINES: usize = 20;
const TAIL_LINE_BYTES: usize = 512;

/// The log of whatever attempt a worker serves now; shared by the owner (who changes attempts) and the reader of the pipe.
#[derive(Clone, Default)]
pub struct AttemptLog {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Default)]
struct Inner {
    file: Option<Arc<dyn File>>,
    written: u64,
    limit: u64,
    lines: VecDeque<Vec<u8>>,
    open: Vec<u8>,
}

impl AttemptLog {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens the file of a log. One that cannot be opened is no reason to fail the attempt: the tail is still kept.
    pub async fn open(env: &Env, path: &Path) -> Option<Arc<dyn File>> {
        let (fs, target) = (Arc::clone(&env.fs), path.to_owned());
        let file = env.work.io(move || fs.open(&target, OpenMode::WriteOrCreate)).await;
        if let Err(error) = &file {
            tracing::warn!(path = %path.display(), %error, "cannot write a task's log");
        }
        file.ok()
    }

    /// Starts the log of another attempt.
    pub fn begin(&self, file: Option<Arc<dyn File>>, limit: u64) {
        *self.lock() = Inner { file, limit, ..Inner::default() };
    }

    /// Takes bytes from the pipe.
    pub async fn write(&self, env: &Env, bytes: &[u8]) {
        let (file, at, kept) = {
            let mut inner = self.lock();
            inner.remember(bytes);
            let kept = inner.limit.saturating_sub(inner.written).min(bytes.len() as u64) as usize;
            let at = inner.written;
            inner.written += kept as u64;
            (inner.file.clone(), at, bytes[..kept].to_vec())
        };
        if let Some(file) = file.filter(|_| !kept.is_empty()) {
            // A full disk costs the log, not the task.
            let _ = env.work.io(move || file.write_all_at(&kept, at)).await;
        }
    }

    /// The last lines.
    pub fn tail(&self) -> String {
        let inner = self.lock();
        let rest = (!inner.open.is_empty()).then_some(&inner.open);
        let lines: Vec<_> = inner.lines.iter().chain(rest).map(|line| String::from_utf8_lossy(line)).collect();
        lines.join("\n")
    }
}

impl Inner {
    fn remember(&mut self, bytes: &[u8]) {
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            let (text, ended) = match piece.split_last() {
                Some((b'\n', text)) => (text, true),
                _ => (piece, false),
            };
            let room = TAIL_LINE_BYTES.saturating_sub(self.open.len()).min(text.len());
            self.open.extend_from_slice(&text[..room]);
            if ended {
                self.lines.push_back(std::mem::take(&mut self.open));
                if self.lines.len() > TAIL_LINES {
                    self.lines.pop_front();
                }
            }
        }
    }
}

//! Progress bars: on a terminal, for what takes longer than a second.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::task::JoinHandle;

use crate::context::Context;
use crate::output::stderr_is_terminal;

const PATIENCE: Duration = Duration::from_secs(1);
const REDRAW: Duration = Duration::from_millis(100);
const KNOWN: &str = "{msg} {bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta} left";
const UNKNOWN: &str = "{msg} {spinner} {bytes} {bytes_per_sec}";

/// Counts bytes and shows them.
pub struct Progress {
    done: Arc<AtomicU64>,
    task: Option<(JoinHandle<()>, ProgressBar)>,
}

impl Progress {
    /// Starts counting; `total` bytes are expected, if that is known. Shows nothing when standard error is no terminal.
    pub fn start(context: &Context, what: &str, total: Option<u64>) -> Self {
        let done = Arc::new(AtomicU64::new(0));
        if !stderr_is_terminal() || context.global.json {
            return Self { done, task: None };
        }
        // Hidden at first: the rate counts from the beginning.
        let bar = match total {
            Some(total) => ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::hidden()),
            None => ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden()),
        };
        // The templates are constants: a mistake in one leaves indicatif's own look.
        if let Ok(style) = ProgressStyle::with_template(if total.is_some() { KNOWN } else { UNKNOWN }) {
            bar.set_style(style);
        }
        bar.set_message(what.to_owned());
        let (clock, counter, shown) = (context.env.clock.clone(), Arc::clone(&done), bar.clone());
        let task = tokio::spawn(async move {
            clock.sleep(PATIENCE).await;
            shown.set_draw_target(ProgressDrawTarget::stderr());
            loop {
                shown.set_position(counter.load(Ordering::Relaxed));
                clock.sleep(REDRAW).await;
            }
        });
        Self { done, task: Some((task, bar)) }
    }

    /// Counts and shows nothing.
    pub fn none() -> Self {
        Self { done: Arc::default(), task: None }
    }

    /// So many bytes more.
    pub fn add(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }

    /// So far of so many, and what is going on.
    pub fn set(&self, what: String, done: u64, total: u64) {
        self.done.store(done, Ordering::Relaxed);
        if let Some((_, bar)) = &self.task {
            bar.set_message(what);
            bar.set_length(total);
        }
    }

    /// Takes the bar off the screen.
    pub async fn finish(mut self) {
        if let Some((task, bar)) = self.task.take() {
            task.abort();
            // It is either done or was cancelled just now: both are the end of it.
            let _ = task.await;
            bar.finish_and_clear();
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some((task, bar)) = self.task.take() {
            task.abort();
            bar.finish_and_clear();
        }
    }
}

//! Where work runs: heavy sums on a bounded pool, blocking file calls beside the async threads, one owner thread per state.
//!
//! In simulation everything runs inline on the one thread, so a seed decides the order of all things.

use std::future::Future;
use std::sync::Arc;

use tokio::sync::{Semaphore, oneshot};

/// Hands out work; cheap to clone.
#[derive(Clone)]
pub struct Work {
    mode: Mode,
}

#[derive(Clone)]
enum Mode {
    Threads { cpu: Arc<Semaphore> },
    Inline,
}

/// The end of an owner that was started with [`Work::owner`].
pub struct OwnerHandle {
    done: oneshot::Receiver<()>,
}

impl OwnerHandle {
    /// Waits until the owner's future has ended (or panicked).
    pub async fn join(self) {
        // An error means that the owner's thread unwound: it is gone either way.
        let _ = self.done.await;
    }
}

impl Work {
    /// Real threads; at most `cores` pieces of [`Work::cpu`] work at once.
    pub fn threads(cores: usize) -> Self {
        Self { mode: Mode::Threads { cpu: Arc::new(Semaphore::new(cores.max(1))) } }
    }

    /// All inline, for simulation.
    pub fn inline() -> Self {
        Self { mode: Mode::Inline }
    }

    /// Runs a computation off the async threads; waits while all cores have one.
    pub async fn cpu<R: Send + 'static>(&self, f: impl FnOnce() -> R + Send + 'static) -> R {
        match &self.mode {
            Mode::Threads { cpu } => {
                // The semaphore is never closed; were it, running at once is still right.
                let permit = Arc::clone(cpu).acquire_owned().await.ok();
                blocking(move || {
                    let result = f();
                    drop(permit);
                    result
                })
                .await
            }
            Mode::Inline => f(),
        }
    }

    /// Runs blocking file calls off the async threads.
    pub async fn io<R: Send + 'static>(&self, f: impl FnOnce() -> R + Send + 'static) -> R {
        match &self.mode {
            Mode::Threads { .. } => blocking(f).await,
            Mode::Inline => f(),
        }
    }

    /// Starts the owner of some state on a thread of its own (a task in simulation).
    pub fn owner<F, Fut>(&self, name: &str, f: F) -> std::io::Result<OwnerHandle>
    where
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = ()> + Send + 'static,
    {
        let (ended, done) = oneshot::channel();
        match &self.mode {
            Mode::Threads { .. } => {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                #[allow(clippy::disallowed_methods)] // the room where threads are made
                let builder = std::thread::Builder::new().name(name.chars().take(15).collect());
                builder.spawn(move || {
                    runtime.block_on(f());
                    // Nobody may be waiting.
                    let _ = ended.send(());
                })?;
            }
            Mode::Inline => {
                tokio::spawn(async move {
                    f().await;
                    let _ = ended.send(());
                });
            }
        }
        Ok(OwnerHandle { done })
    }
}

async fn blocking<R: Send + 'static>(f: impl FnOnce() -> R + Send + 'static) -> R {
    #[allow(clippy::disallowed_methods)] // the room where blocking work is handed to threads
    match tokio::task::spawn_blocking(f).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is shutting down and dropped the closure: this task is about to be dropped too.
            Err(_) => std::future::pending().await,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn owner_ends_and_is_joined() {
        for work in [Work::threads(2), Work::inline()] {
            let (tell, told) = oneshot::channel();
            let owner = work.owner("test-owner", move || async move {
                let _ = tell.send(7);
            });
            assert_eq!(told.await.unwrap(), 7);
            owner.unwrap().join().await;
            assert_eq!(work.cpu(|| 1).await + work.io(|| 2).await, 3);
        }
    }
}

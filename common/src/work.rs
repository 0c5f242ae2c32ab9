//! Where work runs: heavy sums on a bounded pool, blocking file calls beside the async threads, one owner thread per state.
//!
//! In simulation everything runs inline on the one thread, so a seed decides the order of all things: at once ([`Work::inline`]), or after
//! a seeded while ([`Work::jittered`]), as threads do that wait for a core or a disk.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::sync::{Semaphore, oneshot};

use crate::entropy::Entropy;

/// Hands out work; cheap to clone.
#[derive(Clone)]
pub struct Work {
    mode: Mode,
}

#[derive(Clone)]
enum Mode {
    Threads { cpu: Arc<Semaphore> },
    Inline,
    Jittered(Jitter),
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

    /// All on the calling thread, for simulation, but each piece begins late and its result comes late, by up to `longest_ms` milliseconds of
    /// virtual time that `entropy` decides; so do the turns of an owner. What real threads leave to chance, a seed decides.
    pub fn jittered(entropy: Entropy, longest_ms: u64) -> Self {
        Self {
            mode: Mode::Jittered(Jitter {
                entropy,
                longest_ms: Arc::new(AtomicU64::new(longest_ms)),
                owners: Arc::default(),
            }),
        }
    }

    /// Changes `longest_ms` of [`Work::jittered`] for what begins from now on: the machine is busy, or its disk slow. Nothing else is.
    pub fn set_jitter(&self, longest_ms: u64) {
        if let Mode::Jittered(jitter) = &self.mode {
            jitter.longest_ms.store(longest_ms, Ordering::Relaxed);
            for of_owner in owners(jitter).values() {
                of_owner.store(longest_ms, Ordering::Relaxed);
            }
        }
    }

    /// The same for the turns of one owner alone: what it waits for is slow (a disk that only it uses), and nothing else is.
    pub fn set_owner_jitter(&self, name: &str, longest_ms: u64) {
        if let Mode::Jittered(jitter) = &self.mode
            && let Some(of_owner) = owners(jitter).get(name)
        {
            of_owner.store(longest_ms, Ordering::Relaxed);
        }
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
            Mode::Jittered(jitter) => jitter.run(f).await,
        }
    }

    /// Runs blocking file calls off the async threads.
    pub async fn io<R: Send + 'static>(&self, f: impl FnOnce() -> R + Send + 'static) -> R {
        match &self.mode {
            Mode::Threads { .. } => blocking(f).await,
            Mode::Inline => f(),
            Mode::Jittered(jitter) => jitter.run(f).await,
        }
    }

    /// Does `f` to each item, to all at the same time, and gives the results in their order. For a few slow file calls that
    /// somebody waits for anyway (a sync on each of two disks). Blocks; in simulation one after the other.
    pub fn each<T: Send, R: Send>(&self, items: Vec<T>, f: impl Fn(T) -> R + Sync) -> Vec<R> {
        if items.len() < 2 || !matches!(self.mode, Mode::Threads { .. }) {
            return items.into_iter().map(f).collect();
        }
        let (f, mut items) = (&f, items);
        // The caller's thread takes one itself.
        let own = items.pop();
        std::thread::scope(|scope| {
            let others: Vec<_> = items.into_iter().map(|item| scope.spawn(move || f(item))).collect();
            let own = own.map(f);
            let joined = others.into_iter().map(|other| match other.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            });
            joined.chain(own).collect()
        })
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
            Mode::Jittered(jitter) => {
                let turns = Turns { inner: Box::pin(f()), jitter: jitter.of_owner(name), waiting: None };
                tokio::spawn(async move {
                    turns.await;
                    let _ = ended.send(());
                });
            }
        }
        Ok(OwnerHandle { done })
    }
}

#[derive(Clone)]
struct Jitter {
    entropy: Entropy,
    longest_ms: Arc<AtomicU64>,
    /// The same of each owner, by its name.
    owners: Arc<Mutex<BTreeMap<String, Arc<AtomicU64>>>>,
}

fn owners(jitter: &Jitter) -> MutexGuard<'_, BTreeMap<String, Arc<AtomicU64>>> {
    jitter.owners.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Jitter {
    fn of_owner(&self, name: &str) -> Self {
        let longest_ms = Arc::new(AtomicU64::new(self.longest_ms.load(Ordering::Relaxed)));
        owners(self).insert(name.to_owned(), Arc::clone(&longest_ms));
        Self { longest_ms, ..self.clone() }
    }

    /// Half of all pieces meet an idle core and a cached page.
    fn next(&self) -> Option<Duration> {
        let longest_ms = self.longest_ms.load(Ordering::Relaxed);
        let ms = self.entropy.below(longest_ms * 2 + 2).saturating_sub(longest_ms + 1);
        (ms > 0).then(|| Duration::from_millis(ms))
    }

    /// As on a thread, a piece that has begun is done even if nobody waits for it any more; one that has not begun may be dropped or not.
    async fn run<R: Send + 'static>(&self, f: impl FnOnce() -> R + Send + 'static) -> R {
        let (before, after) = (self.next(), self.next());
        let (tell, told) = oneshot::channel();
        tokio::spawn(async move {
            if let Some(wait) = before {
                tokio::time::sleep(wait).await;
            }
            // The caller may be gone.
            let _ = tell.send(f());
        });
        let result = match told.await {
            Ok(result) => result,
            // The piece panicked or the host is being torn down: the caller ends with it.
            Err(_) => std::future::pending().await,
        };
        if let Some(wait) = after {
            tokio::time::sleep(wait).await;
        }
        result
    }
}

/// An owner whose thread gets its turns late.
struct Turns {
    inner: Pin<Box<dyn Future<Output = ()> + Send>>,
    jitter: Jitter,
    waiting: Option<Pin<Box<tokio::time::Sleep>>>,
}

impl Future for Turns {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        if let Some(waiting) = &mut this.waiting {
            std::task::ready!(waiting.as_mut().poll(cx));
            this.waiting = None;
        } else if let Some(wait) = this.jitter.next() {
            let mut waiting = Box::pin(tokio::time::sleep(wait));
            if waiting.as_mut().poll(cx).is_pending() {
                this.waiting = Some(waiting);
                return Poll::Pending;
            }
        }
        this.inner.as_mut().poll(cx)
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

    #[test]
    fn each_runs_at_the_same_time_and_keeps_the_order() {
        assert_eq!(Work::inline().each(vec![1, 2, 3], |n| n * 2), [2, 4, 6]);
        let here = std::thread::current().id();
        let threads = Work::jittered(Entropy::seeded(1), 3).each(vec![1, 2], |_| std::thread::current().id());
        assert_eq!(threads, [here, here], "a simulation has one thread");
        // Each waits for all the others: one after the other would never end.
        let all = std::sync::Barrier::new(3);
        let doubled = Work::threads(1).each(vec![1, 2, 3], |n| {
            all.wait();
            n * 2
        });
        assert_eq!(doubled, [2, 4, 6]);
    }

    #[tokio::test]
    async fn owner_ends_and_is_joined() {
        for work in [Work::threads(2), Work::inline(), Work::jittered(Entropy::seeded(1), 3)] {
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

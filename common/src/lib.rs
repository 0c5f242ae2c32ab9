//! What every Cairn process does with the machine: clock, randomness, files, network, threads, processes.
//!
//! A daemon or client gets an [`Env`] and reaches the machine through it alone, so that a test can put a whole cluster on
//! a simulated network, disk and clock. Lints (`clippy.toml`) forbid the standard library's doors elsewhere.
//!
//! # Architecture invariant
//! Nothing here knows what a block, a file or a job is.

pub mod clock;
pub mod durable;
pub mod entropy;
pub mod kv;
pub mod net;
pub mod process;
pub mod simdisk;
pub mod telemetry;
pub mod timetext;
pub mod work;

use std::sync::Arc;

/// The machine as a process of Cairn sees it.
#[derive(Clone)]
pub struct Env {
    /// Time.
    pub clock: clock::Clock,
    /// Randomness.
    pub entropy: entropy::Entropy,
    /// Connections.
    pub net: net::Net,
    /// Files.
    pub fs: Arc<dyn durable::Fs>,
    /// Threads.
    pub work: work::Work,
}

impl Env {
    /// The real machine.
    pub fn system() -> Self {
        Self {
            clock: clock::Clock::system(),
            entropy: entropy::Entropy::system(),
            net: net::Net::tcp(),
            fs: Arc::new(durable::SystemFs),
            work: work::Work::threads(process::cores()),
        }
    }
}

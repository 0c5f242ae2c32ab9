//! Cluster harness: real processes of the `cairn` binary on loopback, and what tests need around them.
//!
//! * [`binary`]: finds (and if need be builds) the `cairn` binary
//! * [`cluster`]: a [`Cluster`] of real processes: started, killed, stopped, started again, cleaned up
//! * [`run`]: one command, its exit code and its output ([`Run`])
//! * [`data`]: seeded bytes and text, checksums
//! * [`proxy`]: a TCP proxy that cuts, holds, slows and alters what passes; [`wired`]: a cluster with one on every connection
//! * [`stage`]: a cluster under a load that checks every answer, for the chaos suite
//! * [`http`]: HTTP by hand, and a client of WebHDFS
//! * [`fuzz`]: targets for fuzzing, and their short seeded run
//! * [`wait`]: conditions with a deadline, in the place of sleeps
//!
//! A test names the behaviour that it shows. All clusters of one machine can run at once: each takes a range of ports of its own.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::disallowed_methods,
    reason = "a harness fails by panicking, and works on the machine as it is"
)]

pub mod binary;
pub mod cluster;
pub mod damage;
pub mod data;
pub mod fuzz;
pub mod http;
pub mod ports;
pub mod process;
pub mod proxy;
pub mod run;
pub mod stage;
pub mod wait;
pub mod wired;

pub use cluster::{Cluster, ClusterOptions, Member};
pub use run::Run;
pub use wait::{wait_for, wait_until};

/// Whether the long versions of tests were asked for (`CAIRN_TEST_LARGE=1`): gigabytes instead of megabytes.
pub fn large() -> bool {
    std::env::var("CAIRN_TEST_LARGE").is_ok_and(|value| value == "1")
}

//! The simulation suite: a namenode, datanodes and clients as hosts on a simulated network, disk and clock in one process, everything
//! decided by one seed.
//!
//! # Overview
//! * [`runner`]: many seeds, each in a process of its own, several at a time; what to type to see a failure again
//! * [`run`]: one seed from beginning to end: safety with faults, heal, convergence
//! * [`plan`]: what a seed decides: the cluster's shape, the faults and when they come (data, not code)
//! * [`cluster`], [`machine`]: the hosts, their disks and clocks; [`faults`]: how a fault is done to them
//! * [`workload`]: what clients do; [`oracle`]: what they may then expect to find
//! * [`invariants`]: what must hold, one file each; [`deletions`]: what the disks saw, for one of them
//! * [`trace`]: what happened, and its digest; [`pin`]: the randomness and time of the process, pinned
//!
//! # Determinism
//! A seed gives the same fingerprint whenever and wherever it is run (`--twice` checks). All code runs on one thread; the order of hosts, the
//! delay of every message, of every disk operation and of every turn of an owner come from the seed, as does the little that libraries
//! leave to chance ([`pin`]).
//!
//! # Usage
//! `scripts/sim 1000 --from 5000`, `scripts/sim --seed 17 --trace`, `scripts/sim --planted NAME`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::disallowed_methods,
    reason = "a suite fails by panicking, and its runner works on the machine as it is"
)]

mod cluster;
mod deletions;
mod faults;
mod inspect;
mod invariants;
mod machine;
mod oracle;
mod pin;
mod plan;
mod run;
mod runner;
mod trace;
mod workload;

fn main() {
    std::process::exit(runner::main(&std::env::args().skip(1).collect::<Vec<_>>()));
}

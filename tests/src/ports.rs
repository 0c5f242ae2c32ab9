//! Ports: each cluster takes a range of its own, so that clusters of several test processes run at once.

use std::fs::File;
use std::net::TcpListener;
use std::os::fd::AsRawFd;

/// Ports of one cluster.
pub const PORTS_PER_CLUSTER: u16 = 64;
/// Below the range from which the system takes ports for outgoing connections.
const FIRST: u16 = 20_000;
const RANGES: u16 = 180;

/// A range of ports, ours until dropped.
pub struct PortRange {
    base: u16,
    _lock: File,
}

impl PortRange {
    /// Takes the first range that no other test holds and that is free at its start.
    pub fn take() -> Self {
        let folder = std::env::temp_dir().join("cairn-test-ports");
        std::fs::create_dir_all(&folder).unwrap();
        for range in 0..RANGES {
            let lock = File::create(folder.join(range.to_string())).unwrap();
            // SAFETY: the descriptor is open for the whole call.
            if unsafe { libc::flock(lock.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } != 0 {
                continue;
            }
            let base = FIRST + range * PORTS_PER_CLUSTER;
            // A process of a cluster that was killed without its harness may still be there.
            if (base..base + PORTS_PER_CLUSTER).all(|port| TcpListener::bind(("0.0.0.0", port)).is_ok()) {
                return Self { base, _lock: lock };
            }
        }
        panic!("no free range of {PORTS_PER_CLUSTER} ports from {FIRST} on");
    }

    /// First port of the range.
    pub fn base(&self) -> u16 {
        self.base
    }

    /// A port near the end of the range, which no cluster's own numbering reaches: for servers that a test starts by hand.
    pub fn spare(&self, k: u16) -> u16 {
        assert!(k < 16, "there are 16 spare ports");
        self.base + PORTS_PER_CLUSTER - 1 - k
    }
}

//! Randomness from one seed, so that a simulation can be replayed.
//!
//! Not for secrets: identifiers, seeds of the pure core, jitter.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A source of random numbers; clones share it.
#[derive(Clone)]
pub struct Entropy {
    state: Arc<AtomicU64>,
}

const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

impl Entropy {
    /// Seeded by the machine.
    pub fn system() -> Self {
        let random = uuid::Uuid::from_bytes(system_bytes()).as_u128();
        Self::seeded((random >> 64) as u64 ^ random as u64)
    }

    /// Seeded by a test.
    pub fn seeded(seed: u64) -> Self {
        Self { state: Arc::new(AtomicU64::new(seed)) }
    }

    /// The next number (splitmix64).
    pub fn next_u64(&self) -> u64 {
        let mut z = self.state.fetch_add(GOLDEN, Ordering::Relaxed).wrapping_add(GOLDEN);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `bound` (1 if it is 0).
    pub fn below(&self, bound: u64) -> u64 {
        ((u128::from(self.next_u64()) * u128::from(bound.max(1))) >> 64) as u64
    }

    /// Fills `out`.
    pub fn fill(&self, out: &mut [u8]) {
        for chunk in out.chunks_mut(8) {
            let bytes = self.next_u64().to_le_bytes();
            chunk.copy_from_slice(&bytes[..chunk.len()]);
        }
    }

    /// A random UUID (version 4) as text.
    pub fn uuid(&self) -> String {
        let mut bytes = [0; 16];
        self.fill(&mut bytes);
        uuid::Builder::from_random_bytes(bytes).into_uuid().to_string()
    }
}

fn system_bytes() -> [u8; 16] {
    let mut bytes = [0; 16];
    // getrandom never blocks after boot and cannot fail for 16 bytes; should a sandbox forbid it, the address of a stack
    // variable and the process id still tell two processes apart.
    // SAFETY: the pointer and length describe `bytes`.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if got != bytes.len() as isize {
        let fallback = (bytes.as_ptr() as u64) ^ (u64::from(std::process::id()) << 32);
        bytes[..8].copy_from_slice(&fallback.to_le_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_replays() {
        let (a, b) = (Entropy::seeded(7), Entropy::seeded(7));
        let first: Vec<u64> = (0..10).map(|_| a.next_u64()).collect();
        assert_eq!(first, (0..10).map(|_| b.next_u64()).collect::<Vec<_>>());
        assert_ne!(Entropy::seeded(8).next_u64(), first[0]);
        assert!((0..1_000).all(|_| a.below(10) < 10));
    }
}

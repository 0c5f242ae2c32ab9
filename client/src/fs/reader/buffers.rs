//! Buffers for frames, used again: a fresh quarter of a megabyte from the allocator costs a page fault for every 4 KiB, which for cached data is a
//! good part of the whole cost of reading it.

use std::sync::{Arc, Mutex};

use bytes::Bytes;

use super::super::namenode::lock;

/// Smaller ones are left to the allocator.
const SMALLEST: usize = 32 << 10;
/// Buffers kept.
const IDLE: usize = 48;

/// Idle buffers of one client, all of the same capacity.
#[derive(Clone)]
pub(crate) struct Buffers {
    capacity: usize,
    idle: Arc<Mutex<Vec<Vec<u8>>>>,
}

/// Returns to its pool when the last [`Bytes`] of it is dropped.
struct Lent {
    bytes: Vec<u8>,
    home: Buffers,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.home.take_back(std::mem::take(&mut self.bytes));
    }
}

impl Buffers {
    /// For frames that need `capacity` bytes with what is read along with them.
    pub(crate) fn new(capacity: usize) -> Self {
        Self { capacity, idle: Arc::default() }
    }

    /// An empty buffer with room for `target` bytes.
    pub(super) fn get(&self, target: usize) -> Vec<u8> {
        if target < SMALLEST || target > self.capacity {
            return Vec::with_capacity(target);
        }
        let idle = lock(&self.idle).pop();
        idle.unwrap_or_else(|| Vec::with_capacity(self.capacity))
    }

    /// The buffer's bytes; it is used again when nobody holds them any more.
    pub(super) fn lend(&self, bytes: Vec<u8>) -> Bytes {
        if bytes.capacity() != self.capacity {
            return Bytes::from(bytes);
        }
        Bytes::from_owner(Lent { bytes, home: self.clone() })
    }

    fn take_back(&self, mut bytes: Vec<u8>) {
        bytes.clear();
        let mut idle = lock(&self.idle);
        if idle.len() < IDLE {
            idle.push(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_used_again_only_when_nobody_holds_it() {
        let buffers = Buffers::new(100_000);
        let mut first = buffers.get(50_000);
        first.extend_from_slice(b"first");
        let at = first.as_ptr();
        let lent = buffers.lend(first).slice(1..3);
        let other = buffers.get(50_000);
        assert_ne!(other.as_ptr(), at);
        assert_eq!(lent, b"ir"[..]);
        drop(lent);
        let again = buffers.get(50_000);
        assert_eq!(again.as_ptr(), at);
        assert!(buffers.get(200_000).capacity() >= 200_000);
    }
}

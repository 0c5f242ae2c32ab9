//! Counts what a thread has allocated, so that a target's promise about memory can be checked.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

/// To be made the `#[global_allocator]` of a test program; without it nothing is counted.
pub struct Meter;

fn note(change: isize) {
    // A thread that ends may free after its counters are gone.
    let _ = HELD.try_with(|held| {
        held.set(held.get() + change);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(held.get())));
    });
}

// SAFETY: every call is handed to the system's allocator as it came.
unsafe impl GlobalAlloc for Meter {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(layout.size() as isize);
        // SAFETY: the caller's promises are those of `GlobalAlloc::alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        note(-(layout.size() as isize));
        // SAFETY: `at` came from `System.alloc` with this layout.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        note(layout.size() as isize);
        // SAFETY: as in `alloc`.
        unsafe { System.alloc_zeroed(layout) }
    }
}

/// What this thread holds from now on.
pub struct Reading {
    at_start: isize,
}

/// Starts to measure this thread.
pub fn start() -> Reading {
    let at_start = HELD.get();
    PEAK.set(at_start);
    Reading { at_start }
}

impl Reading {
    /// Most bytes held at a time since the start; 0 if nobody counts.
    pub fn peak(&self) -> usize {
        usize::try_from(PEAK.get() - self.at_start).unwrap_or(0)
    }
}

//! What the process itself leaves to chance, pinned: the kernel's random numbers (they seed the standard library's hashers and, through
//! them, tokio's unbiased `select!`) and the machine's clock (it dates HTTP answers). Libraries of others reach both without asking us, so
//! the two functions of the C library are replaced in this program; until [`pin`] is called they ask the kernel as ever.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

static PINNED: AtomicBool = AtomicBool::new(false);
static STATE: AtomicU64 = AtomicU64::new(0);

/// 2026-01-01, seconds.
pub const EPOCH_S: u64 = 1_767_225_600;

/// From now on the process has no randomness but `seed`, and its clock stands still.
pub fn pin(seed: u64) {
    STATE.store(seed ^ 0x5EED_0F51_1234_ABCD, Ordering::SeqCst);
    PINNED.store(true, Ordering::SeqCst);
}

fn next() -> u64 {
    let mut z = STATE.fetch_add(0x9E37_79B9_7F4A_7C15, Ordering::SeqCst);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// The C library's, replaced.
///
/// # Safety
/// As the C library's: `buffer` has room for `length` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn getrandom(buffer: *mut libc::c_void, length: libc::size_t, flags: libc::c_uint) -> isize {
    if !PINNED.load(Ordering::SeqCst) {
        // SAFETY: passed on as it came.
        return unsafe { libc::syscall(libc::SYS_getrandom, buffer, length, flags) as isize };
    }
    // SAFETY: the caller's promise.
    let bytes = unsafe { std::slice::from_raw_parts_mut(buffer.cast::<u8>(), length) };
    for chunk in bytes.chunks_mut(8) {
        let number = next().to_le_bytes();
        chunk.copy_from_slice(&number[..chunk.len()]);
    }
    length as isize
}

/// The C library's, replaced.
///
/// # Safety
/// As the C library's: `time` points to room for the answer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn clock_gettime(clock: libc::clockid_t, time: *mut libc::timespec) -> libc::c_int {
    if !PINNED.load(Ordering::SeqCst) {
        // SAFETY: passed on as it came.
        return unsafe { libc::syscall(libc::SYS_clock_gettime, clock, time) as libc::c_int };
    }
    // SAFETY: the caller's promise.
    unsafe {
        (*time).tv_sec = EPOCH_S as libc::time_t;
        (*time).tv_nsec = 0;
    }
    0
}

fn kernel_clock_ms(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a live timespec.
    unsafe { libc::syscall(libc::SYS_clock_gettime, clock, &raw mut time) };
    time.tv_sec as u64 * 1_000 + time.tv_nsec as u64 / 1_000_000
}

/// Real milliseconds on the machine's monotonic clock, pinned or not.
pub fn real_ms() -> u64 {
    kernel_clock_ms(libc::CLOCK_MONOTONIC)
}

/// Processor time of this process, milliseconds.
pub fn cpu_ms() -> u64 {
    kernel_clock_ms(libc::CLOCK_PROCESS_CPUTIME_ID)
}

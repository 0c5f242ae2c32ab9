//! Damage to files on disk.

use std::os::unix::fs::FileExt as _;
use std::path::Path;

/// Flips one bit of the byte at `at`.
pub fn flip(path: &Path, at: u64) {
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
}

/// Bytes of a file.
pub fn length(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().len()
}

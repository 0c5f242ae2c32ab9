//! How much memory a worker and its children use, where the kernel does not count it for us.

use cairn_common::process;

/// A worker without children is alone most of the time: only every so many samples the whole machine is searched for some.
const FULL_EVERY: u32 = 10;

/// Samples one worker.
#[derive(Default)]
pub struct Sampler {
    count: u32,
    /// It had children when they were last looked for.
    has_children: bool,
}

impl Sampler {
    /// Resident bytes of the worker, of its process group and of all that descends from it; 0 if it is gone.
    pub fn sample(&mut self, pid: u32) -> u64 {
        let full = self.has_children || self.count.is_multiple_of(FULL_EVERY);
        self.count = self.count.wrapping_add(1);
        if !full {
            return process::resident_bytes_of(pid);
        }
        let tree = process::resident_of_tree(pid);
        self.has_children = tree.len() > 1;
        tree.iter().map(|(_, bytes)| bytes).sum()
    }
}

/// Bytes of the same processes when what they share is divided among who shares it. Slow; for the moment before a task is stopped.
pub fn proportional(pid: u32) -> u64 {
    process::resident_of_tree(pid)
        .iter()
        .map(|(pid, resident)| process::proportional_bytes_of(*pid).unwrap_or(*resident))
        .sum()
}

//! How much memory a worker and its children use, where the kernel does not count it for us.
//!
//! Samples alone would miss what is taken and given back between two of them. So the worker's own peak, which the kernel keeps, is looked at with
//! every sample and once more when its task has ended, and so is the largest peak of the children that it has waited for, which it tells itself: an
//! attempt of which one process was over the limit at any moment has failed. Only the sum over several processes is as exact as the samples are,
//! which come closer together when a task is near its limit.
//!
//! A limit of address space or of data (RLIMIT_AS, RLIMIT_DATA) would not do instead: runtimes reserve far more than they touch, and those that
//! run into such a limit end with an error of their own that does not name it.

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

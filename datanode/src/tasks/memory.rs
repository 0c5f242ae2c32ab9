//! How much memory a worker's process group uses.

use cairn_common::process;

/// Every so many samples the whole group is counted; between them only its leader, which costs a hundredth.
const FULL_EVERY: u32 = 10;

/// Samples one process group.
#[derive(Default)]
pub struct Sampler {
    count: u32,
    /// What the group had beyond its leader when it was last counted.
    children: u64,
}

impl Sampler {
    /// Resident bytes of the group led by `pid`; 0 if it is gone.
    pub fn sample(&mut self, pid: u32) -> u64 {
        let leader = process::resident_bytes_of(pid);
        if self.count.is_multiple_of(FULL_EVERY) {
            self.children = process::resident_bytes_of_group(pid).saturating_sub(leader);
        }
        self.count = self.count.wrapping_add(1);
        leader + self.children
    }
}

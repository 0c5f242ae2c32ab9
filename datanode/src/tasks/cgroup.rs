//! Limits of memory and CPU that the kernel holds workers to: cgroup v2, where this process has been given a subtree to manage.
//!
//! ```text
//! <our group>/                 as we were started; the controllers are enabled for what is below
//!   daemon/                    this process moves here first: a group with controllers below it may hold no processes
//!   worker-<n>/                one per worker: memory.max, memory.swap.max 0, cpu.max, cpu.weight
//! ```
//!
//! Only a group that holds no other process is taken over: systemd gives one with `Delegate=yes`. Anything that is missing (cgroup v1, no right
//! to write) means that memory is sampled instead ([`super::memory`])
//! and CPU is not limited; which of the two is in force is said in the log, in `/metrics` and to whoever registers a job.

use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use cairn_proto::{Error, Result};

/// Where groups of workers are made.
pub struct Groups {
    root: PathBuf,
}

/// One worker's group; dropping it removes it.
pub struct Group {
    dir: PathBuf,
}

const MOUNT: &str = "/sys/fs/cgroup";
/// One period of `cpu.max`, microseconds.
const PERIOD_US: u64 = 100_000;

fn write(path: &Path, text: &str) -> std::io::Result<()> {
    // Opened, not created: these files are the kernel's.
    std::fs::OpenOptions::new().write(true).open(path)?.write_all(text.as_bytes())
}

impl Groups {
    /// Takes over the group that this process is in; the error says what is missing.
    pub fn take_over() -> std::result::Result<Self, String> {
        let own =
            std::fs::read_to_string("/proc/self/cgroup").map_err(|error| format!("/proc/self/cgroup: {error}"))?;
        let path = own.lines().find_map(|line| line.strip_prefix("0::")).ok_or("there is no cgroup v2 hierarchy")?;
        let root = Path::new(MOUNT).join(path.trim_start_matches('/'));
        let offered = std::fs::read_to_string(root.join("cgroup.controllers"))
            .map_err(|error| format!("{}: {error}", root.display()))?;
        if !["memory", "cpu"].iter().all(|name| offered.split_whitespace().any(|have| have == *name)) {
            return Err(format!("{} offers {:?}, not memory and cpu", root.display(), offered.trim()));
        }
        let failed = |doing: &str, error: std::io::Error| format!("{doing} {}: {error}", root.display());
        // A group of our own is one that somebody gave us; one that we share is not ours to divide.
        let inside =
            std::fs::read_to_string(root.join("cgroup.procs")).map_err(|error| failed("cannot look into", error))?;
        let own_pid = std::process::id().to_string();
        if inside.lines().any(|pid| pid != own_pid) {
            return Err(format!("{} holds other processes, too", root.display()));
        }
        let leaf = root.join("daemon");
        match std::fs::create_dir(&leaf) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(failed("cannot make a group in", error));
            }
            _ => {}
        }
        write(&leaf.join("cgroup.procs"), "0").map_err(|error| failed("cannot move into a group of", error))?;
        write(&root.join("cgroup.subtree_control"), "+memory +cpu")
            .map_err(|error| failed("cannot enable controllers in", error))?;
        Ok(Self { root })
    }

    /// A group for worker `number`: `memory` bytes, `cpu` thousandths of a core (0: no limit).
    pub fn make(&self, number: u64, memory: u64, cpu: u32) -> Result<Group> {
        let dir = self.root.join(format!("worker-{number}"));
        let failed =
            |error: std::io::Error| Error::io(format!("cannot set the limits of a task in {}", dir.display()), &error);
        match std::fs::create_dir(&dir) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => return Err(failed(error)),
            _ => {}
        }
        let group = Group { dir: dir.clone() };
        write(&dir.join("memory.max"), &memory.to_string()).map_err(failed)?;
        // A kernel without swap accounting has no such file, and then no such limit to set.
        let _ = write(&dir.join("memory.swap.max"), "0");
        if cpu > 0 {
            let quota = (u64::from(cpu) * PERIOD_US / 1_000).max(1_000);
            write(&dir.join("cpu.max"), &format!("{quota} {PERIOD_US}")).map_err(failed)?;
        }
        Ok(group)
    }
}

impl Group {
    /// A descriptor to which a new process writes "0" to enter.
    pub fn entrance(&self) -> std::io::Result<OwnedFd> {
        Ok(std::fs::OpenOptions::new().write(true).open(self.dir.join("cgroup.procs"))?.into())
    }

    fn number(&self, file: &str) -> Option<u64> {
        std::fs::read_to_string(self.dir.join(file)).ok()?.trim().parse().ok()
    }

    /// Bytes charged now.
    pub fn memory(&self) -> u64 {
        self.number("memory.current").unwrap_or(0)
    }

    /// Did the kernel kill something in it for want of memory?
    pub fn ran_out(&self) -> bool {
        let events = std::fs::read_to_string(self.dir.join("memory.events")).unwrap_or_default();
        let count = events.lines().find_map(|line| line.strip_prefix("oom_kill "));
        count.and_then(|count| count.trim().parse::<u64>().ok()).is_some_and(|count| count > 0)
    }

    /// Kills everything in it, also what has left its process group.
    pub fn kill(&self) {
        // Kernels before 5.14 have no such file; the process group is killed besides.
        let _ = write(&self.dir.join("cgroup.kill"), "1");
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // It can be removed when its last process is gone, which may be a moment from now; an empty group costs nothing.
        let _ = std::fs::remove_dir(&self.dir);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd as _;
    use std::os::unix::process::CommandExt as _;

    use super::*;

    #[test]
    fn the_kernel_stops_what_is_over_its_limit() {
        let groups = match Groups::take_over() {
            Ok(groups) => groups,
            Err(why) => {
                eprintln!("skipped: no cgroup to manage ({why}); the sampling of memory is tested in its stead");
                return;
            }
        };
        let group = groups.make(1, 32 << 20, 500).unwrap();
        let entrance = group.entrance().unwrap();
        let mut command = std::process::Command::new("sh");
        command.args(["-c", "tail -c 500000000 /dev/zero | tail -c 500000000"]).process_group(0);
        // SAFETY: one write to an open descriptor.
        unsafe {
            command.pre_exec(move || match libc::write(entrance.as_raw_fd(), b"0".as_ptr().cast(), 1) {
                1 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            });
        }
        command.spawn().unwrap().wait().unwrap();
        assert!(group.ran_out());
        group.kill();
    }
}

//! This process, its user, and processes that it starts.

use std::ffi::CStr;

/// Cores that this process may use.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// Name of the user that runs this process; the number if it has none.
pub fn user_name() -> String {
    let uid = rustix::process::geteuid().as_raw();
    name_of_uid(uid).unwrap_or_else(|| uid.to_string())
}

/// Does the superuser of the machine run this process?
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn name_of_uid(uid: u32) -> Option<String> {
    let mut buffer = vec![0; 16 << 10];
    // SAFETY: an all-zero passwd is a valid value for the call to fill.
    let mut entry: libc::passwd = unsafe { std::mem::zeroed() };
    let mut found = std::ptr::null_mut();
    // SAFETY: all pointers are to live memory of the lengths given.
    let code = unsafe { libc::getpwuid_r(uid, &raw mut entry, buffer.as_mut_ptr(), buffer.len(), &raw mut found) };
    if code != 0 || found.is_null() {
        return None;
    }
    // SAFETY: the call succeeded, so the name is a NUL-terminated string inside `buffer`.
    let name = unsafe { CStr::from_ptr(entry.pw_name) };
    Some(name.to_string_lossy().into_owned())
}

/// Numbers of a user of this machine and of its primary group.
pub fn ids_of(user: &str) -> Option<(u32, u32)> {
    let c_user = std::ffi::CString::new(user).ok()?;
    let mut buffer = vec![0; 16 << 10];
    // SAFETY: as in `name_of_uid`.
    let mut entry: libc::passwd = unsafe { std::mem::zeroed() };
    let mut found = std::ptr::null_mut();
    // SAFETY: all pointers are to live memory of the lengths given.
    let code =
        unsafe { libc::getpwnam_r(c_user.as_ptr(), &raw mut entry, buffer.as_mut_ptr(), buffer.len(), &raw mut found) };
    (code == 0 && !found.is_null()).then_some((entry.pw_uid, entry.pw_gid))
}

/// Names of the groups of `user` on this machine, the primary one first; empty if the machine does not know the user.
pub fn groups_of(user: &str) -> Vec<String> {
    let Ok(c_user) = std::ffi::CString::new(user) else { return Vec::new() };
    let mut buffer = vec![0; 16 << 10];
    // SAFETY: as in `name_of_uid`.
    let mut entry: libc::passwd = unsafe { std::mem::zeroed() };
    let mut found = std::ptr::null_mut();
    // SAFETY: all pointers are to live memory of the lengths given.
    let code =
        unsafe { libc::getpwnam_r(c_user.as_ptr(), &raw mut entry, buffer.as_mut_ptr(), buffer.len(), &raw mut found) };
    if code != 0 || found.is_null() {
        return Vec::new();
    }
    let mut gids = vec![0; 1024];
    let mut count = gids.len() as libc::c_int;
    // SAFETY: `gids` has room for `count` entries.
    let code = unsafe { libc::getgrouplist(c_user.as_ptr(), entry.pw_gid, gids.as_mut_ptr(), &raw mut count) };
    if code < 0 {
        return Vec::new();
    }
    gids.truncate(count.max(0) as usize);
    gids.into_iter().filter_map(name_of_gid).collect()
}

fn name_of_gid(gid: u32) -> Option<String> {
    let mut buffer = vec![0; 64 << 10];
    // SAFETY: an all-zero group is a valid value for the call to fill.
    let mut entry: libc::group = unsafe { std::mem::zeroed() };
    let mut found = std::ptr::null_mut();
    // SAFETY: all pointers are to live memory of the lengths given.
    let code = unsafe { libc::getgrgid_r(gid, &raw mut entry, buffer.as_mut_ptr(), buffer.len(), &raw mut found) };
    if code != 0 || found.is_null() {
        return None;
    }
    // SAFETY: the call succeeded, so the name is a NUL-terminated string inside `buffer`.
    let name = unsafe { CStr::from_ptr(entry.gr_name) };
    Some(name.to_string_lossy().into_owned())
}

/// This machine's name.
pub fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// Completes when the process is asked to end: SIGINT or SIGTERM, from the call on. To be called inside of a tokio runtime.
pub fn shutdown_signal() -> impl Future<Output = ()> + Send {
    use tokio::signal::unix::{SignalKind, signal};
    let handlers = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()));
    async move {
        let (Ok(mut interrupt), Ok(mut terminate)) = handlers else {
            // Without handlers the signals keep their default: they end the process.
            return std::future::pending().await;
        };
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    }
}

/// Kills a process group at once. One that is gone already is no error.
pub fn kill_group(group: u32) {
    if let Some(group) = i32::try_from(group).ok().and_then(rustix::process::Pid::from_raw) {
        // The only other failure is "no right to", which cannot be for our own child.
        let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
    }
}

/// Kills a child of this process and all that descends from it, whatever groups they are in. A process that starts another one at this moment may
/// leave that behind.
pub fn kill_tree(pid: u32) {
    let mut all = vec![pid];
    let mut at = 0;
    while let Some(parent) = all.get(at) {
        let Ok(threads) = std::fs::read_dir(format!("/proc/{parent}/task")) else {
            at += 1;
            continue;
        };
        for thread in threads.flatten() {
            let children = std::fs::read_to_string(thread.path().join("children")).unwrap_or_default();
            all.extend(children.split_ascii_whitespace().filter_map(|child| child.parse::<u32>().ok()));
        }
        at += 1;
    }
    for pid in all.into_iter().filter_map(|pid| i32::try_from(pid).ok()).filter_map(rustix::process::Pid::from_raw) {
        // One that is gone already is no error.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
}

/// Has this process killed when its parent thread's process ends; call it in the child, before `exec` or first thing after.
pub fn die_with_parent() {
    // A kernel that cannot leaves the child to notice its closed pipe.
    let _ = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL));
}

/// Starts this program anew in the same process, with a heap on huge pages, where the kernel gives them on request: looks at
/// random into gigabytes of small records else spend half of their time in page tables. Returns if there is nothing to do,
/// or if it cannot be done: then the program is only slower. To be called before anything else is begun.
pub fn prefer_huge_pages() {
    use std::os::unix::process::CommandExt as _;
    const KNOBS: &str = "GLIBC_TUNABLES";
    let modes = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    // Whoever set knobs knows better; and it is set the second time.
    if !modes.contains("[madvise]") || std::env::var_os(KNOBS).is_some() {
        return;
    }
    let mut words = std::env::args_os();
    let (Some(name), Ok(program)) = (words.next(), std::env::current_exe()) else { return };
    // Returns only if it failed.
    let _ = std::process::Command::new(program).arg0(name).args(words).env(KNOBS, "glibc.malloc.hugetlb=1").exec();
}

/// Keeps memory that was freed for the next use, up to 16 MiB in each of at most eight heaps, instead of giving it back to the kernel each time: buffers of
/// hundreds of KiB come and go with every frame, and each page that comes from the kernel anew is mapped and cleared first. Nothing
/// with another C library than glibc.
pub fn keep_freed_memory() {
    #[cfg(target_env = "gnu")]
    {
        /// Larger pieces are rare, and go back at once.
        const MAPPED_BYTES: libc::c_int = 4 << 20;
        /// Less: a burst of frames is given back and taken again; more: what a busy hour needed stays for longer than that.
        const KEPT_BYTES: libc::c_int = 16 << 20;
        /// More: threads wait less for each other; fewer: less is kept.
        const HEAPS: libc::c_int = 8;
        // SAFETY: they only set numbers of the allocator, under its own lock.
        unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_BYTES);
            libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT_BYTES);
            libc::mallopt(libc::M_ARENA_MAX, HEAPS);
        }
    }
}

/// The processes of the group that `leader` leads and all that descend from them, with their resident bytes; empty if none is left. Looks at
/// every process of the machine.
pub fn resident_of_tree(leader: u32) -> Vec<(u32, u64)> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let page = rustix::param::page_size() as u64;
    let mut all = Vec::new();
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
        // The command name may hold blanks and brackets: fields are counted after the last bracket. The second after it is the parent, the third
        // the group, the 22nd the resident pages.
        let Some((_, rest)) = stat.rsplit_once(')') else { continue };
        let mut fields = rest.split_ascii_whitespace();
        let mut number = |skip: usize| fields.nth(skip).and_then(|field| field.parse::<u64>().ok()).unwrap_or(0);
        let (parent, group, pages) = (number(1) as u32, number(0) as u32, number(18));
        all.push((pid, parent, group, pages * page));
    }
    let mut found: Vec<(u32, u64)> = Vec::new();
    let belongs = |pid: u32, parent: u32, group: u32, found: &[(u32, u64)]| {
        pid == leader || group == leader || found.iter().any(|(above, _)| *above == parent)
    };
    // A parent may have a higher number than its child: until nothing is added.
    loop {
        let before = found.len();
        all.retain(|(pid, parent, group, bytes)| {
            let ours = belongs(*pid, *parent, *group, &found);
            if ours {
                found.push((*pid, *bytes));
            }
            !ours
        });
        if found.len() == before {
            return found;
        }
    }
}

/// Resident bytes of a process where a page that several share counts for each by its part; `None` if the kernel does not tell.
pub fn proportional_bytes_of(pid: u32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
}

/// Resident bytes of one process; 0 if it is gone. Much cheaper than [`resident_of_tree`].
pub fn resident_bytes_of(pid: u32) -> u64 {
    resident_of(&format!("/proc/{pid}/statm"))
}

/// The most resident bytes that a process has had since it began, or since [`forget_peak`]; 0 if it is gone. The kernel keeps it, so nothing is
/// missed between two looks.
pub fn peak_resident_bytes_of(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kilobytes = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kilobytes.unwrap_or(0) << 10
}

/// Has [`peak_resident_bytes_of`] start again from what the process has now. Where the kernel refuses, it goes on from its beginning.
pub fn forget_peak(pid: u32) {
    if let Ok(mut file) = std::fs::File::options().write(true).open(format!("/proc/{pid}/clear_refs")) {
        let _ = std::io::Write::write_all(&mut file, b"5");
    }
}

/// The most resident bytes that any child of this process has had that ended and was waited for.
pub fn peak_resident_bytes_of_children() -> u64 {
    // SAFETY: `usage` is plain data of the right size that the call fills.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        match libc::getrusage(libc::RUSAGE_CHILDREN, &raw mut usage) {
            0 => usage,
            _ => return 0,
        }
    };
    u64::try_from(usage.ru_maxrss).unwrap_or(0) << 10
}

/// Resident bytes of this process.
pub fn resident_bytes() -> u64 {
    resident_of("/proc/self/statm")
}

fn resident_of(statm: &str) -> u64 {
    let Ok(statm) = std::fs::read_to_string(statm) else { return 0 };
    let pages: u64 = statm.split_ascii_whitespace().nth(1).and_then(|field| field.parse().ok()).unwrap_or(0);
    pages * rustix::param::page_size() as u64
}

/// A process of this machine, told apart from a later one that was given the same number.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
pub struct ProcessRef {
    /// Its number.
    pub pid: u32,
    /// Clock ticks after boot at which it started.
    pub started: u64,
}

/// What can be done to a process of somebody.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Signal {
    /// SIGKILL: it ends without a word.
    Kill,
    /// SIGSTOP: it stands still.
    Stop,
    /// SIGCONT: it goes on.
    Continue,
}

impl ProcessRef {
    /// The process that has this number now.
    pub fn of(pid: u32) -> Option<Self> {
        stat_of(pid).map(|(_, started)| Self { pid, started })
    }

    /// Its state as `/proc` has it (`T`: stopped, `Z`: ended); `None` if it is gone.
    pub fn state(&self) -> Option<char> {
        stat_of(self.pid).filter(|(_, started)| *started == self.started).map(|(state, _)| state)
    }

    /// Whether it runs (or is stopped); one that ended and that nobody has waited for does not.
    pub fn runs(&self) -> bool {
        match self.state() {
            None => false,
            Some('Z' | 'X') => self.has_threads(),
            Some(_) => true,
        }
    }

    /// The first thread of a killed process may be gone while others still hold its files, locks and ports.
    fn has_threads(&self) -> bool {
        let Ok(threads) = std::fs::read_dir(format!("/proc/{}/task", self.pid)) else { return false };
        threads.flatten().any(|thread| {
            let stat = std::fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
            parse_stat(&stat).is_some_and(|(state, _)| !matches!(state, 'Z' | 'X'))
        })
    }

    /// Sends a signal. Fails if the process is gone or belongs to another user.
    pub fn signal(&self, signal: Signal) -> std::io::Result<()> {
        let gone = || std::io::Error::new(std::io::ErrorKind::NotFound, format!("process {} is gone", self.pid));
        let pid = i32::try_from(self.pid).ok().and_then(rustix::process::Pid::from_raw).ok_or_else(gone)?;
        if !self.runs() {
            return Err(gone());
        }
        let signal = match signal {
            Signal::Kill => rustix::process::Signal::KILL,
            Signal::Stop => rustix::process::Signal::STOP,
            Signal::Continue => rustix::process::Signal::CONT,
        };
        Ok(rustix::process::kill_process(pid, signal)?)
    }

    /// Whether this user may send it signals.
    pub fn is_ours(&self) -> bool {
        let pid = i32::try_from(self.pid).ok().and_then(rustix::process::Pid::from_raw);
        pid.is_some_and(|pid| self.runs() && rustix::process::test_kill_process(pid).is_ok())
    }
}

/// State and start of a process.
fn stat_of(pid: u32) -> Option<(char, u64)> {
    parse_stat(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

fn parse_stat(stat: &str) -> Option<(char, u64)> {
    // The name in brackets may hold anything: fields are counted after the last bracket.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((state, fields.nth(18)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_stopped_continued_and_killed() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let process = ProcessRef::of(child.id()).unwrap();
        assert!(process.runs() && process.is_ours());
        let becomes = |stopped: bool| while (process.state() == Some('T')) != stopped {};
        process.signal(Signal::Stop).unwrap();
        becomes(true);
        process.signal(Signal::Continue).unwrap();
        becomes(false);
        let other = ProcessRef { started: process.started + 1, ..process };
        assert!(!other.runs() && other.signal(Signal::Kill).is_err());
        process.signal(Signal::Kill).unwrap();
        child.wait().unwrap();
        assert!(!process.runs() && process.signal(Signal::Kill).is_err());
    }

    #[test]
    fn a_tree_of_processes_is_killed() {
        let mut child = std::process::Command::new("sh").args(["-c", "sleep 60 | sleep 61"]).spawn().unwrap();
        let children = || std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", child.id())).unwrap();
        while children().split_ascii_whitespace().count() < 2 {}
        let below: Vec<u32> = children().split_ascii_whitespace().map(|pid| pid.parse().unwrap()).collect();
        kill_tree(child.id());
        child.wait().unwrap();
        while below.iter().any(|pid| ProcessRef::of(*pid).is_some_and(|process| process.runs())) {}
    }

    #[test]
    fn a_tree_holds_what_has_left_the_group() {
        // A shell in a group of its own, whose child starts a session of its own.
        let mut command = std::process::Command::new("sh");
        command.args(["-c", "setsid sleep 60 & wait"]);
        let mut child = std::os::unix::process::CommandExt::process_group(&mut command, 0).spawn().unwrap();
        let tree = || resident_of_tree(child.id());
        while tree().len() < 2 || !tree().iter().all(|(pid, _)| proportional_bytes_of(*pid).is_some()) {}
        for (pid, _) in tree() {
            let _ = ProcessRef::of(pid).map(|process| process.signal(Signal::Kill));
        }
        child.wait().unwrap();
    }

    #[test]
    fn knows_itself() {
        assert!(!user_name().is_empty());
        assert!(!host_name().is_empty());
        assert!(resident_bytes() > 1 << 20);
        let before = peak_resident_bytes_of(std::process::id());
        assert!(before > 1 << 20);
        drop(std::hint::black_box(vec![1_u8; before as usize + (32 << 20)]));
        assert!(peak_resident_bytes_of(std::process::id()) > before + (16 << 20));
        std::process::Command::new("true").status().unwrap();
        assert!(peak_resident_bytes_of_children() > 100 << 10);
        let tree = resident_of_tree(std::process::id());
        assert!(tree.iter().any(|(pid, bytes)| *pid == std::process::id() && *bytes > 1 << 20), "{tree:?}");
        assert!(groups_of("no such user \u{1F5FF}").is_empty());
        assert!(!groups_of(&user_name()).is_empty());
        assert_eq!(ids_of(&user_name()).map(|ids| ids.0), Some(rustix::process::geteuid().as_raw()));
    }
}

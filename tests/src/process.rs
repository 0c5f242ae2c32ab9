//! Processes of a cluster, by id, guarded against ids that were given to another process meanwhile.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::Path;

/// A process that a cluster started.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Process {
    /// Its id.
    pub pid: u32,
    /// Clock ticks after boot at which it started: with the id it names the process for good.
    started: u64,
}

impl Process {
    /// The process that has this id now.
    pub fn of(pid: u32) -> Option<Self> {
        stat(pid).map(|(_, started)| Self { pid, started })
    }

    /// Whether it still runs (a dead one that nobody has waited for does not).
    pub fn runs(&self) -> bool {
        match stat(self.pid) {
            Some((state, started)) if started == self.started => is_alive(state) || self.has_threads(),
            _ => false,
        }
    }

    /// The first thread of a killed process may be gone while others still hold its files, locks and ports.
    fn has_threads(&self) -> bool {
        let Ok(threads) = std::fs::read_dir(format!("/proc/{}/task", self.pid)) else { return false };
        let state = |entry: std::fs::DirEntry| {
            let text = std::fs::read_to_string(entry.path().join("stat")).ok()?;
            text.rsplit_once(')')?.1.trim_start().chars().next()
        };
        threads.flatten().filter_map(state).any(is_alive)
    }

    /// Its state as `/proc` tells it: `T` for stopped; nothing if it is gone.
    pub fn state(&self) -> Option<char> {
        stat(self.pid).filter(|(_, started)| *started == self.started).map(|(state, _)| state)
    }

    /// Sends a signal; nothing if the process is gone.
    pub fn signal(&self, signal: i32) {
        if self.runs() {
            // SAFETY: only sends a signal.
            unsafe { libc::kill(self.pid as i32, signal) };
        }
    }

    /// Where its open IPv4 connections lead to.
    pub fn peers(&self) -> BTreeSet<SocketAddrV4> {
        let Ok(files) = std::fs::read_dir(format!("/proc/{}/fd", self.pid)) else { return BTreeSet::new() };
        let links = files.flatten().filter_map(|file| std::fs::read_link(file.path()).ok());
        let sockets: BTreeSet<String> = links.map(|link| link.to_string_lossy().into_owned()).collect();
        let table = std::fs::read_to_string("/proc/net/tcp").unwrap_or_default();
        let peer = |line: &str| {
            let fields: Vec<&str> = line.split_ascii_whitespace().collect();
            let (remote, state, inode) = (fields.get(2)?, fields.get(3)?, fields.get(9)?);
            let (ip, port) = remote.split_once(':')?;
            let address = SocketAddrV4::new(
                Ipv4Addr::from(u32::from_str_radix(ip, 16).ok()?.to_ne_bytes()),
                u16::from_str_radix(port, 16).ok()?,
            );
            let is_open = *state == "01";
            (is_open && sockets.contains(&format!("socket:[{inode}]"))).then_some(address)
        };
        table.lines().skip(1).filter_map(peer).collect()
    }

    /// The command line that it was started with.
    pub fn command_line(&self) -> Vec<String> {
        list(&format!("/proc/{}/cmdline", self.pid))
    }

    /// The environment that it was started with.
    pub fn environment(&self) -> Vec<(String, String)> {
        let entries = list(&format!("/proc/{}/environ", self.pid));
        entries.into_iter().filter_map(|e| e.split_once('=').map(|(k, v)| (k.to_owned(), v.to_owned()))).collect()
    }
}

fn is_alive(state: char) -> bool {
    state != 'Z' && state != 'X'
}

fn list(path: &str) -> Vec<String> {
    let bytes = std::fs::read(path).unwrap_or_default();
    let parts = bytes.split(|byte| *byte == 0).filter(|part| !part.is_empty());
    parts.map(|part| String::from_utf8_lossy(part).into_owned()).collect()
}

fn stat(pid: u32) -> Option<(char, u64)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in brackets may hold anything: fields are counted after the last bracket.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    let started = fields.nth(18)?.parse().ok()?;
    Some((state, started))
}

/// All running processes that work on `dir`: whose command line, environment or current folder names it. The caller itself is left out.
pub fn using(dir: &Path) -> Vec<Process> {
    let text = dir.to_string_lossy();
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let Some(process) = Process::of(pid).filter(|process| pid != std::process::id() && process.runs()) else {
            continue;
        };
        let cwd = std::fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd.starts_with(dir));
        if cwd || process.command_line().iter().any(|arg| arg.contains(&*text)) {
            found.push(process);
        }
    }
    found
}

/// Resident bytes of a process; 0 if it is gone.
pub fn resident_bytes(pid: u32) -> u64 {
    let statm = std::fs::read_to_string(format!("/proc/{pid}/statm")).unwrap_or_default();
    statm.split_ascii_whitespace().nth(1).and_then(|pages| pages.parse::<u64>().ok()).unwrap_or(0) * 4_096
}

/// Children of a process, and theirs.
pub fn descendants(pid: u32) -> Vec<u32> {
    let mut parents = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(child) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let Ok(stat) = std::fs::read_to_string(format!("/proc/{child}/stat")) else { continue };
        let parent = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_ascii_whitespace().nth(1)?.parse().ok());
        parents.extend(parent.map(|parent: u32| (child, parent)));
    }
    let mut found = vec![pid];
    let mut at = 0;
    while at < found.len() {
        let parent = found[at];
        found.extend(parents.iter().filter(|(_, p)| *p == parent).map(|(child, _)| *child));
        at += 1;
    }
    found.split_off(1)
}

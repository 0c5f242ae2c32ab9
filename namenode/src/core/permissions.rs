//! Who may do what: HDFS's rules.
//!
//! Execute on every directory above; write on the directory whose entries change; with the sticky bit only the owner of
//! the entry or of the directory may remove or rename it; only the owner changes the mode; only the superuser changes
//! the owner. The superuser, and members of the supergroup, may do everything.

use cairn_proto::{Error, ErrorCode};

use super::Core;
use super::event::Caller;
use super::inode::Inode;
use super::tree::Resolved;

/// Bits of an access.
pub const EXECUTE: u32 = 1;
/// See [`EXECUTE`].
pub const WRITE: u32 = 2;
/// See [`EXECUTE`].
pub const READ: u32 = 4;

const STICKY: u32 = 0o1000;

/// A caller with what the core knows of it.
pub struct Who<'a> {
    /// As the server gave it.
    pub caller: &'a Caller,
    /// Decided here, from the log and the settings.
    pub superuser: bool,
}

fn access_name(access: u32) -> &'static str {
    ["NONE", "EXECUTE", "WRITE", "WRITE_EXECUTE", "READ", "READ_EXECUTE", "READ_WRITE", "ALL"][(access & 7) as usize]
}

/// "drwxr-xr-t" as `ls` shows it.
fn mode_text(inode: &Inode) -> String {
    let mode = inode.mode();
    let mut text = String::with_capacity(10);
    text.push(if inode.is_directory() { 'd' } else { '-' });
    for shift in [6, 3, 0] {
        let bits = mode >> shift & 7;
        for (bit, letter) in [(4, 'r'), (2, 'w'), (1, 'x')] {
            text.push(if bits & bit != 0 { letter } else { '-' });
        }
    }
    if mode & STICKY != 0 {
        text.pop();
        text.push(if mode & 1 != 0 { 't' } else { 'T' });
    }
    text
}

impl Core {
    /// What the core knows of a caller.
    pub(super) fn who<'a>(&self, caller: &'a Caller) -> Who<'a> {
        let superuser = caller.user == self.facts.superuser
            || (!self.settings.superuser.is_empty() && caller.user == self.settings.superuser)
            || (!self.facts.supergroup.is_empty() && caller.groups.contains(&self.facts.supergroup));
        Who { caller, superuser }
    }

    fn permits(&self, who: &Who<'_>, inode: &Inode, access: u32) -> bool {
        let mode = inode.mode();
        let granted = if self.tree.strings.get(inode.owner) == who.caller.user {
            mode >> 6
        } else {
            let group = self.tree.strings.get(inode.group);
            if who.caller.groups.iter().any(|own| own == group) { mode >> 3 } else { mode }
        };
        granted & access == access
    }

    fn denied(&self, who: &Who<'_>, id: u64, inode: &Inode, access: u32) -> Error {
        let path = self.tree.path_of(id);
        let message = format!(
            "Permission denied: user={}, access={}, inode=\"{path}\":{}:{}:{}",
            who.caller.user,
            access_name(access),
            self.tree.strings.get(inode.owner),
            self.tree.strings.get(inode.group),
            mode_text(inode),
        );
        Error::new(ErrorCode::PermissionDenied, message).with_subject(path)
    }

    /// The caller needs this access to this inode.
    #[inline]
    pub(super) fn check_access(&self, who: &Who<'_>, id: u64, access: u32) -> Result<(), Error> {
        if who.superuser {
            return Ok(());
        }
        match self.tree.get(id) {
            Some(inode) if !self.permits(who, inode, access) => Err(self.denied(who, id, inode, access)),
            _ => Ok(()),
        }
    }

    /// The caller must be able to pass every directory of a path; a file among them is no directory.
    pub(super) fn check_traverse(&self, who: &Who<'_>, resolved: &Resolved<'_>) -> Result<(), Error> {
        let above = resolved.chain.len() - usize::from(resolved.last().is_some());
        for (depth, id) in resolved.chain[..above].iter().enumerate() {
            self.unsynced.touch(*id);
            let Some(inode) = self.tree.get(*id) else { continue };
            if !inode.is_directory() {
                return Err(not_a_directory(&resolved.prefix(depth)));
            }
            self.check_access(who, *id, EXECUTE)?;
        }
        if let Some(last) = resolved.last() {
            self.unsynced.touch(last);
        }
        Ok(())
    }

    /// The caller may remove or rename this entry as far as the sticky bit of its directory goes.
    pub(super) fn check_sticky(&self, who: &Who<'_>, directory: u64, id: u64) -> Result<(), Error> {
        if who.superuser {
            return Ok(());
        }
        let (Some(above), Some(inode)) = (self.tree.get(directory), self.tree.get(id)) else { return Ok(()) };
        let owns = |inode: &Inode| self.tree.strings.get(inode.owner) == who.caller.user;
        if above.mode() & STICKY == 0 || owns(above) || owns(inode) {
            return Ok(());
        }
        let path = self.tree.path_of(id);
        let message = format!(
            "Permission denied by sticky bit: user={}, path=\"{path}\":{}:{}:{}, parent=\"{}\":{}:{}:{}",
            who.caller.user,
            self.tree.strings.get(inode.owner),
            self.tree.strings.get(inode.group),
            mode_text(inode),
            self.tree.path_of(directory),
            self.tree.strings.get(above.owner),
            self.tree.strings.get(above.group),
            mode_text(above),
        );
        Err(Error::new(ErrorCode::PermissionDenied, message).with_subject(path))
    }

    /// The caller must own the inode.
    pub(super) fn check_owner(&self, who: &Who<'_>, id: u64) -> Result<(), Error> {
        let owner = self.tree.get(id).map_or("", |inode| self.tree.strings.get(inode.owner));
        if who.superuser || owner == who.caller.user {
            return Ok(());
        }
        let path = self.tree.path_of(id);
        let message = format!("Permission denied. user={} is not the owner of inode={path}", who.caller.user);
        Err(Error::new(ErrorCode::PermissionDenied, message).with_subject(path))
    }

    /// Only for the superuser.
    pub(super) fn check_superuser(&self, who: &Who<'_>) -> Result<(), Error> {
        if who.superuser {
            return Ok(());
        }
        let message = format!("Access denied for user {}. Superuser privilege is required", who.caller.user);
        Err(Error::new(ErrorCode::PermissionDenied, message))
    }
}

/// A file where a directory must be.
pub fn not_a_directory(path: &str) -> Error {
    Error::new(ErrorCode::ParentNotDirectory, format!("{path} (is not a directory)")).with_subject(path)
}

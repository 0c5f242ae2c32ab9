//! Operations on entries of directories: mkdirs, rename, delete.

use cairn_proto::path::{PROGRAMS, check_not_reserved, is_in_user_area, join};
use cairn_proto::pb::{self, edit::Kind};
use cairn_proto::{Error, ErrorCode};

use super::event::Caller;
use super::inode::{Inode, MODE_MASK};
use super::permissions::{WRITE, Who};
use super::tree::{ROOT, Resolved};
use super::{Carries, Core, Turn};

/// The owner needs these to go on making entries below.
const IMPLICIT_OWNER: u32 = 0o300;
/// Of the directory of the system, and of the areas in it where every user may make entries of their own.
const SYSTEM_MODE: u32 = 0o755;
const AREA_MODE: u32 = 0o1777;

fn fail(code: ErrorCode, path: &str, message: String) -> Error {
    Error::new(code, message).with_subject(path)
}

/// How a delete ended.
pub enum Deletion {
    /// The answer.
    Done(pb::DeleteResponse),
    /// The tree with this root has to be looked at first (`subtree.rs`).
    Check(u64),
}

impl Core {
    /// Resolves the path of an operation that makes or changes entries, and checks the way to it.
    pub(super) fn resolve_for_change<'p>(
        &self,
        who: &Who<'_>,
        path: &'p str,
        doing: &str,
    ) -> Result<Resolved<'p>, Error> {
        let resolved = self.tree.resolve(path)?;
        check_not_reserved(path, &resolved.parts)?;
        self.check_not_safemode(doing, path)?;
        self.check_traverse(who, &resolved)?;
        Ok(resolved)
    }

    pub(super) fn mkdirs(
        &mut self,
        turn: &mut Turn<'_>,
        who: &Who<'_>,
        request: &pb::MkdirsRequest,
    ) -> Result<pb::MkdirsResponse, Error> {
        let path = &request.path;
        let resolved = self.resolve_for_change(who, path, "create directory")?;
        if let Some(id) = resolved.last() {
            if !self.tree.get(id).is_some_and(Inode::is_directory) {
                return Err(fail(ErrorCode::FileAlreadyExists, path, format!("Path is not a directory: {path}")));
            }
            return Ok(pb::MkdirsResponse { status: self.status(id, path) });
        }
        if path == PROGRAMS {
            return self.make_programs(turn, who, &resolved);
        }
        if !request.create_parents && resolved.parent().is_none() {
            let parent = resolved.prefix(resolved.parts.len() - 1);
            return Err(fail(ErrorCode::FileNotFound, path, format!("Parent directory doesn't exist: {parent}")));
        }
        let resolved = if self.make_user_area(turn, &resolved)? { self.tree.resolve(path)? } else { resolved };
        self.check_access(who, resolved.deepest(), WRITE)?;
        let above = (request.permission | IMPLICIT_OWNER) & MODE_MASK;
        let parent = self.make_parents(turn, who, &resolved, above)?;
        let id = self.make_directory(turn, who, parent, resolved.name(), request.permission, Carries::Answer)?;
        Ok(pb::MkdirsResponse { status: self.status(id, path) })
    }

    /// The folder of what jobs bring along belongs to the superuser, whoever asks for it, and everybody may add to it.
    fn make_programs(
        &mut self,
        turn: &mut Turn<'_>,
        who: &Who<'_>,
        resolved: &Resolved<'_>,
    ) -> Result<pb::MkdirsResponse, Error> {
        let caller = Caller { user: self.facts.superuser.clone(), ..who.caller.clone() };
        let system = Who { caller: &caller, superuser: true };
        let parent = self.make_parents(turn, &system, resolved, 0o755)?;
        let id = self.make_directory(turn, &system, parent, resolved.name(), 0o1777, Carries::Answer)?;
        Ok(pb::MkdirsResponse { status: self.status(id, PROGRAMS) })
    }

    /// Makes the missing directories above the last component; returns the one that will hold it.
    pub(super) fn make_parents(
        &mut self,
        turn: &mut Turn<'_>,
        who: &Who<'_>,
        resolved: &Resolved<'_>,
        mode: u32,
    ) -> Result<u64, Error> {
        let mut parent = resolved.deepest();
        let missing = resolved.chain.len() - 1..resolved.parts.len().saturating_sub(1);
        for name in &resolved.parts[missing] {
            parent = self.make_directory(turn, who, parent, name, mode, Carries::Nothing)?;
        }
        Ok(parent)
    }

    /// The first entry in an area of the system makes that area, whoever asks: the system does it, not the caller.
    fn make_user_area(&mut self, turn: &mut Turn<'_>, resolved: &Resolved<'_>) -> Result<bool, Error> {
        if !is_in_user_area(&resolved.parts) || resolved.chain.len() > 2 {
            return Ok(false);
        }
        let caller = Caller { user: self.facts.superuser.clone(), ..Caller::default() };
        let system = Who { caller: &caller, superuser: true };
        let mut parent = resolved.deepest();
        for depth in resolved.chain.len() - 1..2 {
            let mode = if depth == 0 { SYSTEM_MODE } else { AREA_MODE };
            parent = self.make_directory(turn, &system, parent, resolved.parts[depth], mode, Carries::Nothing)?;
        }
        Ok(true)
    }

    fn make_directory(
        &mut self,
        turn: &mut Turn<'_>,
        who: &Who<'_>,
        parent: u64,
        name: &str,
        mode: u32,
        carries: Carries,
    ) -> Result<u64, Error> {
        let inode = self.counters.inode + 1;
        let edit = pb::EditMkdir {
            inode,
            parent,
            name: bytes::Bytes::copy_from_slice(name.as_bytes()),
            owner: who.caller.user.clone(),
            group: self.group_of(parent),
            permission: mode & MODE_MASK,
        };
        self.commit(turn, carries, Kind::Mkdir(edit))?;
        Ok(inode)
    }

    /// New entries belong to the group of their directory (the BSD rule).
    pub(super) fn group_of(&self, directory: u64) -> String {
        self.tree.get(directory).map_or("", |inode| self.tree.strings.get(inode.group)).into()
    }

    pub(super) fn rename(
        &mut self,
        turn: &mut Turn<'_>,
        who: &Who<'_>,
        request: &pb::RenameRequest,
    ) -> Result<pb::RenameResponse, Error> {
        if request.mode() == pb::RenameMode::IntoDirectory {
            return self.rename_into(turn, who, request);
        }
        let (from, to) = (&*request.from, &*request.to);
        let source = self.resolve_for_change(who, from, "rename")?;
        let target = self.resolve_for_change(who, to, "rename")?;
        let Some(inode) = source.last() else {
            return Err(fail(ErrorCode::FileNotFound, from, format!("rename source {from} is not found.")));
        };
        let replaces = self.check_rename(&source, inode, &target, request)?;
        let (Some(from_parent), Some(to_parent)) = (source.parent(), target.parent()) else {
            return Err(fail(ErrorCode::InvalidArgument, from, "rename of the root".into()));
        };
        self.check_access(who, from_parent, WRITE)?;
        self.check_sticky(who, from_parent, inode)?;
        self.check_access(who, to_parent, WRITE)?;
        if replaces != 0 {
            self.check_sticky(who, to_parent, replaces)?;
        }
        let to_name = bytes::Bytes::copy_from_slice(target.name().as_bytes());
        let edit = pb::EditRename { inode, from_parent, to_parent, to_name, replaces };
        self.commit(turn, Carries::Answer, Kind::Rename(edit))?;
        self.free_now();
        Ok(pb::RenameResponse {})
    }

    /// HDFS's rules of the older rename.
    fn rename_into(
        &mut self,
        turn: &mut Turn<'_>,
        who: &Who<'_>,
        request: &pb::RenameRequest,
    ) -> Result<pb::RenameResponse, Error> {
        let source = self.resolve_for_change(who, &request.from, "rename")?;
        let target = self.resolve_for_change(who, &request.to, "rename")?;
        let is_directory = |id: u64| self.tree.get(id).is_some_and(Inode::is_directory);
        let to = match target.last() {
            Some(there) if is_directory(there) && !source.parts.is_empty() => join(&request.to, source.name()),
            _ => request.to.clone(),
        };
        if let Some(inode) = source.last()
            && !is_directory(inode)
            && self.tree.resolve(&to)?.last() == Some(inode)
        {
            return Ok(pb::RenameResponse {});
        }
        let mode = pb::RenameMode::NoReplace as i32;
        self.rename(turn, who, &pb::RenameRequest { call: None, from: request.from.clone(), to, mode })
    }

    /// HDFS's rules of rename2; returns what is replaced (0: nothing).
    fn check_rename(
        &self,
        source: &Resolved<'_>,
        inode: u64,
        target: &Resolved<'_>,
        request: &pb::RenameRequest,
    ) -> Result<u64, Error> {
        use ErrorCode as C;
        let (from, to) = (&*request.from, &*request.to);
        if inode == ROOT {
            return Err(fail(C::InvalidArgument, from, "rename source cannot be the root".into()));
        }
        if target.parts.is_empty() {
            return Err(fail(C::InvalidArgument, to, "rename destination cannot be the root".into()));
        }
        if target.last() == Some(inode) {
            return Err(fail(C::FileAlreadyExists, to, format!("The source {from} and destination {to} are the same")));
        }
        if target.parts.starts_with(&source.parts) {
            let message = format!("Rename destination {to} is a directory or file under source {from}");
            return Err(fail(C::InvalidArgument, to, message));
        }
        let source_is_directory = self.tree.get(inode).is_some_and(Inode::is_directory);
        let Some(there) = target.last() else {
            return match target.parent().and_then(|parent| self.tree.get(parent)) {
                None => Err(fail(C::FileNotFound, to, format!("rename destination parent {to} not found."))),
                Some(parent) if !parent.is_directory() => {
                    Err(fail(C::ParentNotDirectory, to, format!("rename destination parent {to} is a file.")))
                }
                Some(_) => Ok(0),
            };
        };
        if request.mode() != pb::RenameMode::Overwrite {
            return Err(fail(C::FileAlreadyExists, to, format!("rename destination {to} already exists")));
        }
        let replaced = self.tree.get(there);
        if replaced.is_some_and(Inode::is_directory) != source_is_directory {
            let kind = if source_is_directory { "directories" } else { "files" };
            return Err(fail(
                C::InvalidArgument,
                to,
                format!("Source {from} and destination {to} must both be {kind}"),
            ));
        }
        if replaced.is_some_and(|inode| inode.child_count() > 0) {
            return Err(fail(C::DirectoryNotEmpty, to, format!("rename destination directory is not empty: {to}")));
        }
        Ok(there)
    }

    pub(super) fn delete(
        &mut self,
        turn: &mut Turn<'_>,
        who: &Who<'_>,
        request: &pb::DeleteRequest,
        checked: Option<u64>,
    ) -> Result<Deletion, Error> {
        let path = &request.path;
        let resolved = self.resolve_for_change(who, path, "delete")?;
        let (Some(inode), Some(parent)) = (resolved.last(), resolved.parent()) else {
            return Ok(Deletion::Done(pb::DeleteResponse { existed: false }));
        };
        if request.only_inode != 0 && request.only_inode != inode {
            // Another entry has taken the name.
            return Ok(Deletion::Done(pb::DeleteResponse { existed: false }));
        }
        self.check_access(who, parent, WRITE)?;
        self.check_sticky(who, parent, inode)?;
        if self.tree.get(inode).is_some_and(|inode| inode.child_count() > 0) {
            if !request.recursive {
                let message = format!("`{path} is non empty': Directory is not empty");
                return Err(fail(ErrorCode::DirectoryNotEmpty, path, message));
            }
            if !who.superuser && checked != Some(inode) {
                return Ok(Deletion::Check(inode));
            }
        }
        self.commit(turn, Carries::Answer, Kind::Delete(pb::EditDelete { inode, parent }))?;
        self.free_now();
        Ok(Deletion::Done(pb::DeleteResponse { existed: true }))
    }
}

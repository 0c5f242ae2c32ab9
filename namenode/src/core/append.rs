//! Opening a file that exists: append, and taking files from their writers.
//!
//! # Overview
//! An append takes the lease and marks the file open; what is written goes into new blocks, so no finished block is ever
//! touched, and whatever becomes of the writer, the old content stays as it is. A file that another writer has open is
//! refused, or recovered once that writer was silent for the soft limit; `recover_lease` does not wait for that.

use cairn_proto::ids::TxId;
use cairn_proto::pb::{self, edit::Kind};
use cairn_proto::{Error, ErrorCode};

use super::attributes::not_found;
use super::edits::Applied;
use super::inode::Inode;
use super::leases::Lease;
use super::permissions::{WRITE, Who};
use super::recovery::RECOVERY_HOLDER;
use super::{Carries, Core, Turn};

/// Longest name of a lease holder, bytes.
const MAX_CLIENT_NAME: usize = 1_000;

/// Who wants a file that is open, and for what.
pub struct Claim<'a> {
    /// The file's path, as asked for.
    pub path: &'a str,
    /// The would-be lease holder.
    pub client: &'a str,
    /// HDFS's name of the operation.
    pub doing: &'static str,
}

/// A lease holder's name must be one.
pub fn check_client_name(path: &str, name: &str) -> Result<(), Error> {
    let invalid = |message: String| Err(Error::new(ErrorCode::InvalidArgument, message).with_subject(path));
    if name == RECOVERY_HOLDER {
        return invalid(format!("The client name {RECOVERY_HOLDER} belongs to the namenode"));
    }
    if name.is_empty() || name.len() > MAX_CLIENT_NAME {
        return invalid(format!("The client name must have 1 to {MAX_CLIENT_NAME} bytes"));
    }
    Ok(())
}

impl Core {
    /// An existing file that the caller may write.
    pub(super) fn file_to_write(&self, who: &Who<'_>, path: &str, doing: &str) -> Result<u64, Error> {
        let resolved = self.resolve_for_change(who, path, doing)?;
        let file = resolved.last().ok_or_else(|| not_found(path))?;
        if self.tree.get(file).is_some_and(Inode::is_directory) {
            return Err(Error::new(ErrorCode::NotAFile, format!("Path is not a file: {path}")).with_subject(path));
        }
        self.check_access(who, file, WRITE)?;
        Ok(file)
    }

    /// Gets an open file from its writer if the lease allows: then it is closed. Else says who has it.
    pub(super) fn claim_open(
        &mut self,
        turn: &mut Turn<'_>,
        who: &Who<'_>,
        file: u64,
        claim: &Claim<'_>,
    ) -> Result<(), Error> {
        let Claim { path, client, doing } = claim;
        let refuse = |why: String| {
            let message = format!("Failed to {doing} {path} for {client} on {} because {why}", who.caller.host);
            Err(Error::new(ErrorCode::AlreadyBeingCreated, message).with_subject(*path))
        };
        let holder = self.leases.holder_of(file).unwrap_or("").to_owned();
        if holder == *client {
            return refuse(format!("{holder} is already the current lease holder."));
        }
        let recovering = holder == RECOVERY_HOLDER;
        if !recovering && !self.leases.is_older(file, self.settings.lease_soft_limit_ms, self.now_ms) {
            return refuse(format!("this file lease is currently owned by {holder}"));
        }
        if self.take_over(turn, file)? {
            return Ok(());
        }
        refuse("lease recovery is in progress. Try again later.".into())
    }

    pub(super) fn append(
        &mut self,
        turn: &mut Turn<'_>,
        who: &Who<'_>,
        request: &pb::AppendRequest,
    ) -> Result<pb::AppendResponse, Error> {
        let path = &request.path;
        check_client_name(path, &request.client_name)?;
        let file = self.file_to_write(who, path, "append to file")?;
        if self.tree.get(file).is_some_and(Inode::is_open) {
            self.claim_open(turn, who, file, &Claim { path, client: &request.client_name, doing: "APPEND_FILE" })?;
        }
        let edit = pb::EditAppend { inode: file, holder: request.client_name.clone(), user: who.caller.user.clone() };
        self.commit(turn, Carries::Answer, Kind::Append(edit))?;
        let blocks = self.tree.get(file).map_or(0, |inode| inode.blocks().len() as u32);
        Ok(pb::AppendResponse { status: self.status(file, path), blocks })
    }

    pub(super) fn recover_lease(
        &mut self,
        turn: &mut Turn<'_>,
        who: &Who<'_>,
        request: &pb::RecoverLeaseRequest,
    ) -> Result<pb::RecoverLeaseResponse, Error> {
        let file = match request.inode {
            0 => self.file_to_write(who, &request.path, "recover the lease of")?,
            inode => match self.file_of_writer(who, inode, request)? {
                Some(file) => file,
                None => return Ok(pb::RecoverLeaseResponse { closed: true, waits_for: String::new() }),
            },
        };
        let mut closed = !self.tree.get(file).is_some_and(Inode::is_open);
        let only_of = &*request.only_of;
        if !closed && (only_of.is_empty() || self.leases.holder_of(file) == Some(only_of)) {
            self.hasten_recovery(file);
            closed = self.take_over(turn, file)?;
        }
        let waits_for = if closed { String::new() } else { self.recovery_waits_for(file) };
        Ok(pb::RecoverLeaseResponse { closed, waits_for })
    }

    /// The file that a client gives up, wherever it was renamed to; `None`: its lease is not (or no longer) this client's.
    fn file_of_writer(
        &self,
        who: &Who<'_>,
        file: u64,
        request: &pb::RecoverLeaseRequest,
    ) -> Result<Option<u64>, Error> {
        if request.only_of.is_empty() {
            let message = "A file is only given up by its number together with the name of its lease holder";
            return Err(Error::new(ErrorCode::InvalidArgument, message).with_subject(&request.path));
        }
        self.check_not_safemode("recover the lease of", &request.path)?;
        self.unsynced.touch(file);
        if !self.tree.is_reachable(file) {
            // The edit that took it away is not known any more.
            self.unsynced.depend(self.last_txid);
            return Ok(None);
        }
        let lease = self.leases.get(file).filter(|lease| *lease.holder == *request.only_of);
        let Some(lease) = lease else { return Ok(None) };
        let user = &who.caller.user;
        if !who.superuser && !lease.user.is_empty() && *lease.user != **user {
            let message = format!("User {user} does not hold the lease of inode {file}: another user took it");
            return Err(Error::new(ErrorCode::PermissionDenied, message).with_subject(user));
        }
        Ok(Some(file))
    }

    /// A closed file of the namespace.
    pub(super) fn check_closed_file(&self, id: u64) -> Applied {
        match self.tree.get(id) {
            Some(inode) if !inode.is_directory() && self.tree.is_reachable(id) => {
                if inode.is_open() {
                    Err(format!("file {id} is open"))
                } else {
                    Ok(())
                }
            }
            _ => Err(format!("inode {id} is no file of the namespace")),
        }
    }

    pub(super) fn apply_append(&mut self, txid: TxId, edit: &pb::EditAppend) -> Applied {
        self.check_closed_file(edit.inode)?;
        if edit.holder.is_empty() {
            return Err("it names no holder".into());
        }
        self.tree.modify(edit.inode, |inode| inode.set_open(true));
        let blocks = self.tree.get(edit.inode).map_or(0, |inode| inode.blocks().len());
        let (holder, user) = (edit.holder.as_str().into(), edit.user.as_str().into());
        self.leases.grant(edit.inode, Lease { holder, user, first_block: blocks as u32 }, self.now_ms);
        self.unsynced.mark(edit.inode, txid);
        Ok(())
    }
}

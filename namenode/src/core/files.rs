//! Creating a file.

use cairn_proto::pb::{self, edit::Kind};
use cairn_proto::{BLOCK_SIZE_UNIT, Error, ErrorCode};

use super::append::{Claim, check_client_name};
use super::inode::{Inode, MODE_MASK};
use super::permissions::{WRITE, Who};
use super::tree::Resolved;
use super::{Carries, Core, Turn};

impl Core {
    pub(super) fn create(
        &mut self,
        turn: &mut Turn<'_>,
        who: &Who<'_>,
        request: &pb::CreateRequest,
    ) -> Result<pb::CreateResponse, Error> {
        let path = &request.path;
        let fail = |code, message: String| Error::new(code, message).with_subject(path);
        let (replication, block_size) = self.checked_shape(request)?;
        let resolved = self.resolve_for_change(who, path, "create file")?;
        let replaces = self.check_target(turn, who, request, &resolved)?;
        if resolved.parent().is_none() && !request.create_parents {
            let parent = resolved.prefix(resolved.parts.len().saturating_sub(1));
            return Err(fail(ErrorCode::FileNotFound, format!("Parent directory doesn't exist: {parent}")));
        }
        if replaces == 0 {
            self.check_access(who, resolved.deepest(), WRITE)?;
        }
        let above = self.tree.get(resolved.deepest()).map_or(0o755, Inode::mode) | 0o300;
        let parent = match resolved.parent() {
            Some(parent) => parent,
            None => self.make_parents(turn, who, &resolved, above)?,
        };
        let inode = self.counters.inode + 1;
        let edit = pb::EditCreate {
            inode,
            parent,
            name: bytes::Bytes::copy_from_slice(resolved.name().as_bytes()),
            owner: who.caller.user.clone(),
            group: self.group_of(parent),
            permission: request.permission & MODE_MASK,
            replication,
            block_size,
            client_name: request.client_name.clone(),
            replaces,
        };
        self.commit(turn, Carries::Answer, Kind::Create(edit))?;
        if replaces != 0 {
            self.free_now();
        }
        Ok(pb::CreateResponse { status: self.status(inode, path) })
    }

    /// Replication and block size with the defaults filled in.
    fn checked_shape(&self, request: &pb::CreateRequest) -> Result<(u32, u64), Error> {
        let settings = &self.settings;
        let invalid = |message: String| Error::new(ErrorCode::InvalidArgument, message).with_subject(&request.path);
        let replication = if request.replication == 0 { settings.default_replication } else { request.replication };
        self.check_replication(&request.path, replication)?;
        let size = if request.block_size == 0 { settings.default_block_size } else { request.block_size };
        if size < settings.min_block_size || size > settings.max_block_size {
            let (low, high) = (settings.min_block_size, settings.max_block_size);
            return Err(invalid(format!(
                "Specified block size {size} for {} is not within {low} to {high}",
                request.path
            )));
        }
        if size % BLOCK_SIZE_UNIT != 0 {
            return Err(invalid(format!("Specified block size {size} for {} is no multiple of 512", request.path)));
        }
        check_client_name(&request.path, &request.client_name)?;
        Ok((replication, size))
    }

    /// What lies at the path already: an error, or the file that will be replaced (0: none).
    fn check_target(
        &mut self,
        turn: &mut Turn<'_>,
        who: &Who<'_>,
        request: &pb::CreateRequest,
        resolved: &Resolved<'_>,
    ) -> Result<u64, Error> {
        let path = &request.path;
        let exists = |message: String| Error::new(ErrorCode::FileAlreadyExists, message).with_subject(path);
        let Some(there) = resolved.last() else { return Ok(0) };
        if self.tree.get(there).is_some_and(Inode::is_directory) {
            return Err(exists(format!("{path} already exists as a directory")));
        }
        if request.overwrite {
            if let Some(parent) = resolved.parent() {
                self.check_access(who, parent, WRITE)?;
                self.check_sticky(who, parent, there)?;
            }
            self.check_access(who, there, WRITE)?;
            return Ok(there);
        }
        // As HDFS: the right to make an entry is asked for first. Taking the file from its writer is a change of the file.
        self.check_access(who, resolved.parent().unwrap_or(there), WRITE)?;
        if self.tree.get(there).is_some_and(Inode::is_open) {
            self.check_access(who, there, WRITE)?;
            self.claim_open(turn, who, there, &Claim { path, client: &request.client_name, doing: "CREATE_FILE" })?;
        }
        Err(exists(format!("{path} for client {} already exists", who.caller.host)))
    }
}

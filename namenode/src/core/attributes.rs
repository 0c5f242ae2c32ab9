//! Operations on the attributes of one inode: mode, owner, times, replication.

use cairn_proto::pb::{self, edit::Kind};
use cairn_proto::{Error, ErrorCode};

use super::inode::MODE_MASK;
use super::permissions::{WRITE, Who};
use super::{Carries, Core, Turn};

impl Core {
    /// The inode of an existing path, for a change of its attributes.
    fn existing(&self, who: &Who<'_>, path: &str, doing: &str) -> Result<u64, Error> {
        let resolved = self.resolve_for_change(who, path, doing)?;
        resolved.last().ok_or_else(|| not_found(path))
    }

    fn set_attributes(&mut self, turn: &mut Turn<'_>, edit: pb::EditSetAttributes) -> Result<(), Error> {
        self.commit(turn, Carries::Answer, Kind::SetAttributes(edit)).map(|_| ())
    }

    pub(super) fn set_permission(
        &mut self,
        turn: &mut Turn<'_>,
        who: &Who<'_>,
        request: &pb::SetPermissionRequest,
    ) -> Result<pb::SetPermissionResponse, Error> {
        let inode = self.existing(who, &request.path, "set permission for")?;
        self.check_owner(who, inode)?;
        let permission = Some(request.permission & MODE_MASK);
        self.set_attributes(turn, pb::EditSetAttributes { inode, permission, ..Default::default() })?;
        Ok(pb::SetPermissionResponse {})
    }

    pub(super) fn set_owner(
        &mut self,
        turn: &mut Turn<'_>,
        who: &Who<'_>,
        request: &pb::SetOwnerRequest,
    ) -> Result<pb::SetOwnerResponse, Error> {
        let inode = self.existing(who, &request.path, "set owner for")?;
        self.check_owner(who, inode)?;
        if request.owner.len().max(request.group.len()) > 255 {
            let message = "A user or group name is longer than 255 bytes";
            return Err(Error::new(ErrorCode::InvalidArgument, message).with_subject(&request.path));
        }
        let given = |text: &str| if text.is_empty() { None } else { Some(text.to_owned()) };
        let (owner, group) = (given(&request.owner), given(&request.group));
        if !who.superuser {
            let denied = |message: String| Error::new(ErrorCode::PermissionDenied, message).with_subject(&request.path);
            if owner.as_ref().is_some_and(|owner| *owner != who.caller.user) {
                let user = &who.caller.user;
                return Err(denied(format!("User {user} is not a super user (non-super user cannot change owner).")));
            }
            if let Some(group) = group.as_ref().filter(|group| !who.caller.groups.contains(group)) {
                return Err(denied(format!("User {} does not belong to {group}", who.caller.user)));
            }
        }
        if owner.is_some() || group.is_some() {
            self.set_attributes(turn, pb::EditSetAttributes { inode, owner, group, ..Default::default() })?;
        }
        Ok(pb::SetOwnerResponse {})
    }

    pub(super) fn set_times(
        &mut self,
        turn: &mut Turn<'_>,
        who: &Who<'_>,
        request: &pb::SetTimesRequest,
    ) -> Result<pb::SetTimesResponse, Error> {
        let inode = self.existing(who, &request.path, "set times for")?;
        self.check_access(who, inode, WRITE)?;
        let (modified_ms, accessed_ms) = (request.modified_ms, request.accessed_ms);
        if modified_ms.is_some() || accessed_ms.is_some() {
            self.set_attributes(turn, pb::EditSetAttributes { inode, modified_ms, accessed_ms, ..Default::default() })?;
        }
        Ok(pb::SetTimesResponse {})
    }

    pub(super) fn set_replication(
        &mut self,
        turn: &mut Turn<'_>,
        who: &Who<'_>,
        request: &pb::SetReplicationRequest,
    ) -> Result<pb::SetReplicationResponse, Error> {
        let path = &request.path;
        self.check_replication(path, request.replication)?;
        let inode = self.existing(who, path, "set replication for")?;
        if self.tree.get(inode).is_some_and(super::inode::Inode::is_directory) {
            return Err(Error::new(ErrorCode::NotAFile, format!("Path is not a file: {path}")).with_subject(path));
        }
        self.check_access(who, inode, WRITE)?;
        let replication = Some(request.replication);
        self.set_attributes(turn, pb::EditSetAttributes { inode, replication, ..Default::default() })?;
        Ok(pb::SetReplicationResponse {})
    }

    /// A number of replicas that the settings allow.
    pub(super) fn check_replication(&self, path: &str, replication: u32) -> Result<(), Error> {
        let most = self.settings.max_replication;
        if (1..=most).contains(&replication) {
            return Ok(());
        }
        let message = format!("Requested replication factor of {replication} for {path} is not within 1 to {most}");
        Err(Error::new(ErrorCode::InvalidArgument, message).with_subject(path))
    }
}

/// The path does not exist.
pub fn not_found(path: &str) -> Error {
    Error::new(ErrorCode::FileNotFound, format!("File does not exist: {path}")).with_subject(path)
}

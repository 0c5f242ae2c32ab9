//! What HDFS has and this file system has not, answered as a HDFS answers that has it switched off: a question gets the true
//! answer ("none"), an order the exception that clients know for it.

use cairn_common::net::hadoop::RpcError;
use cairn_proto::hadoop as wire;

use super::{Asked, Done, as_io, io_exception};

const ACL_EXCEPTION: &str = "org.apache.hadoop.hdfs.protocol.AclException";
const SNAPSHOT_EXCEPTION: &str = "org.apache.hadoop.hdfs.protocol.SnapshotException";
const UNSUPPORTED: &str = "java.lang.UnsupportedOperationException";
const INVALID_TOKEN: &str = "org.apache.hadoop.security.token.SecretManager$InvalidToken";

/// HDFS's number and name of the policy by which all blocks lie on ordinary disks.
const HOT_POLICY: u32 = 7;
const HOT: &str = "HOT";

/// "Leave as it is" in setQuota.
const QUOTA_DONT_SET: u64 = i64::MAX as u64;
/// "No quota" there.
const QUOTA_RESET: u64 = u64::MAX;

fn hot() -> wire::BlockStoragePolicy {
    let kinds = |kinds: &[wire::StorageKind]| wire::StorageKinds {
        storage_types: kinds.iter().map(|kind| *kind as i32).collect(),
    };
    wire::BlockStoragePolicy {
        policy_id: HOT_POLICY,
        name: HOT.into(),
        creation_policy: kinds(&[wire::StorageKind::StorageDisk]),
        creation_fallback_policy: Some(kinds(&[])),
        replication_fallback_policy: Some(kinds(&[])),
    }
}

impl Asked<'_> {
    /// As without security: there is no token, and none is needed.
    pub(super) async fn delegation_token(
        &self,
        _: wire::GetDelegationTokenRequest,
    ) -> Done<wire::GetDelegationTokenResponse> {
        Ok(wire::GetDelegationTokenResponse { token: None })
    }

    pub(super) async fn renew_token(&self, _: wire::RenewDelegationTokenRequest) -> Done<()> {
        Err(RpcError::new(INVALID_TOKEN, "no delegation token was ever issued here"))
    }

    pub(super) async fn cancel_token(&self, _: wire::CancelDelegationTokenRequest) -> Done<()> {
        Err(RpcError::new(INVALID_TOKEN, "no delegation token was ever issued here"))
    }

    /// No key: data travels as it is.
    pub(super) async fn data_encryption_key(&self, (): ()) -> Done<()> {
        Ok(())
    }

    pub(super) async fn encryption_zone(&self, request: wire::GetEzForPathRequest) -> Done<()> {
        self.status(&request.src).await?;
        Ok(())
    }

    pub(super) async fn encryption_zones(&self, (): ()) -> Done<wire::ListEncryptionZonesResponse> {
        Ok(wire::ListEncryptionZonesResponse { has_more: false })
    }

    pub(super) async fn erasure_coding_policy(&self, request: wire::GetErasureCodingPolicyRequest) -> Done<()> {
        self.status(&request.src).await?;
        Ok(())
    }

    pub(super) async fn storage_policy(
        &self,
        request: wire::GetStoragePolicyRequest,
    ) -> Done<wire::GetStoragePolicyResponse> {
        self.status(&request.path).await?;
        Ok(wire::GetStoragePolicyResponse { storage_policy: hot() })
    }

    pub(super) async fn storage_policies(&self, (): ()) -> Done<wire::GetStoragePoliciesResponse> {
        Ok(wire::GetStoragePoliciesResponse { policies: vec![hot()] })
    }

    pub(super) async fn set_storage_policy(&self, request: wire::SetStoragePolicyRequest) -> Done<()> {
        self.status(&request.src).await?;
        if request.policy_name.eq_ignore_ascii_case(HOT) {
            return Ok(());
        }
        let shown: String = request.policy_name.chars().take(60).collect();
        Err(io_exception(format!("Failed to set storage policy {shown}: all files have the policy {HOT}")))
    }

    /// What the permission bits say is all that there is.
    pub(super) async fn acl_status(&self, request: wire::GetAclStatusRequest) -> Done<wire::GetAclStatusResponse> {
        let status = self.status(&request.src).await?;
        let result = wire::AclStatus {
            owner: status.owner,
            group: status.group,
            sticky: status.permission & 0o1000 != 0,
            entries: Vec::new(),
            permission: Some(wire::FsPermission { perm: status.permission }),
        };
        Ok(wire::GetAclStatusResponse { result })
    }

    pub(super) async fn change_acl(&self, request: wire::AclChangeRequest) -> Done<()> {
        self.status(&request.src).await?;
        let message = "The ACL operation has been rejected. ACLs are not supported: use permission bits and groups.";
        Err(RpcError::new(ACL_EXCEPTION, message))
    }

    pub(super) async fn set_x_attr(&self, request: wire::SetXAttrRequest) -> Done<()> {
        self.status(&request.src).await?;
        Err(io_exception("The XAttr operation has been rejected. Extended attributes are not supported."))
    }

    pub(super) async fn remove_x_attr(&self, request: wire::RemoveXAttrRequest) -> Done<()> {
        self.status(&request.src).await?;
        Err(io_exception("No matching attributes found for remove operation"))
    }

    pub(super) async fn x_attrs(&self, request: wire::GetXAttrsRequest) -> Done<wire::GetXAttrsResponse> {
        self.status(&request.src).await?;
        if !request.x_attrs.is_empty() {
            return Err(io_exception("At least one of the attributes provided was not found."));
        }
        Ok(wire::GetXAttrsResponse { x_attrs: Vec::new() })
    }

    pub(super) async fn list_x_attrs(&self, request: wire::ListXAttrsRequest) -> Done<wire::ListXAttrsResponse> {
        self.status(&request.src).await?;
        Ok(wire::ListXAttrsResponse { x_attrs: Vec::new() })
    }

    /// To have none is all that can be set.
    pub(super) async fn set_quota(&self, request: wire::SetQuotaRequest) -> Done<()> {
        self.status(&request.path).await?;
        self.door.owner.check_superuser(self.caller.clone()).await.map_err(as_io)?;
        let none = |quota: u64| matches!(quota, QUOTA_DONT_SET | QUOTA_RESET);
        if none(request.namespace_quota) && none(request.storagespace_quota) {
            return Ok(());
        }
        Err(RpcError::new(UNSUPPORTED, "quotas are not supported"))
    }

    pub(super) async fn create_symlink(&self, (): ()) -> Done<()> {
        Err(RpcError::new(UNSUPPORTED, "Symlinks not supported"))
    }

    pub(super) async fn no_snapshots(&self, request: wire::SnapshotRequest) -> Done<()> {
        self.status(&request.snapshot_root).await?;
        let message = format!(
            "Directory is not a snapshottable directory: {} (snapshots are not supported)",
            request.snapshot_root
        );
        Err(RpcError::new(SNAPSHOT_EXCEPTION, message))
    }

    pub(super) async fn snapshottable_directories(&self, (): ()) -> Done<()> {
        Ok(())
    }
}

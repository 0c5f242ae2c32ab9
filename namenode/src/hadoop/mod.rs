//! HDFS's `ClientProtocol` in front of the owner, as unmodified Hadoop clients speak it.
//!
//! # Overview
//! [`ClientProtocol`] is what `cairn_common::net::hadoop` serves on the RPC port. Each method becomes one call of the core, or a
//! few where HDFS answers in one what the core has as several; it decides nothing that the core decides.
//!
//! * `namespace.rs`: names and attributes; `writing.rs`: open files; `cluster.rs`: the cluster as a whole
//! * `absent.rs`: what the file system does not have (ACLs, extended attributes, snapshots, quotas, ...), said as HDFS says it
//! * `convert.rs`: our messages as HDFS's
//!
//! # Consistency
//! Calls that must not be done twice carry the client's id and call id into the core's retry cache, so a repeated one gets the
//! first answer, also after a restart. Such a method is one changing call: what came before it would see its effect the
//! second time.
//!
//! # Leases
//! HDFS's lease holder is the client name in a request, as ours is, so both doors share them. A file that a Hadoop client has
//! open is closed to others for the same limits.

mod absent;
mod cluster;
mod convert;
mod namespace;
#[cfg(test)]
pub(crate) mod tests;
mod writing;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use cairn_common::net::hadoop::{Answer, Call, Protocol, RpcError};
use cairn_proto::hadoop as wire;
use cairn_proto::{Error, Result, pb};
use prost::Message as _;

use crate::core::{Caller, ClientRequest, ClientResponse};
use crate::server::{Groups, OwnerRef};

/// Class name of the protocol.
const NAME: &str = "org.apache.hadoop.hdfs.protocol.ClientProtocol";
/// Bytes of a user name in the key of the retry cache, which takes 64 in all.
const USER_KEY_BYTES: usize = 40;

/// The protocol's methods; cheap to clone.
#[derive(Clone)]
pub struct ClientProtocol {
    owner: OwnerRef,
    groups: Groups,
    pool_id: String,
    /// Users who may act for any other.
    proxy_users: Arc<[String]>,
}

/// One call with what its methods need.
struct Asked<'a> {
    door: &'a ClientProtocol,
    call: &'a Call,
    caller: Caller,
}

/// Ends a method.
type Done<T> = std::result::Result<T, RpcError>;

impl ClientProtocol {
    /// In front of `owner`, for clients of this block pool. Each of `proxy_users` may act for any other user.
    pub fn new(owner: OwnerRef, groups: Groups, pool_id: String, proxy_users: Vec<String>) -> Self {
        Self { owner, groups, pool_id, proxy_users: proxy_users.into() }
    }

    async fn asked<'a>(&'a self, call: &'a Call) -> Asked<'a> {
        let groups = self.groups.of(&call.user).await;
        let caller = Caller { user: call.user.clone(), groups, host: call.peer.ip().to_string() };
        Asked { door: self, call, caller }
    }
}

impl Protocol for ClientProtocol {
    fn name(&self) -> &'static str {
        NAME
    }

    fn may_act_for(&self, real_user: &str, _user: &str) -> bool {
        self.proxy_users.iter().any(|known| known == real_user)
    }

    fn call<'a>(&'a self, call: &'a Call, request: Bytes) -> Pin<Box<dyn Future<Output = Answer> + Send + 'a>> {
        Box::pin(async move { self.asked(call).await.run(request).await })
    }
}

fn decode<M: prost::Message + Default>(method: &str, request: Bytes) -> Done<M> {
    M::decode(request).map_err(|error| RpcError::bad_request(method, error))
}

macro_rules! methods {
    ($($name:literal => $method:ident($request:ty);)*) => {
        impl Asked<'_> {
            /// Names, messages and answers of all methods.
            async fn run(&self, request: Bytes) -> Answer {
                match &*self.call.method {
                    $($name => Ok(self.$method(decode::<$request>($name, request)?).await?.encode_to_vec()),)*
                    other => Err(RpcError::no_such_method(other, NAME)),
                }
            }
        }

        /// What is served, for tests.
        #[cfg(test)]
        const METHODS: &[&str] = &[$($name),*];
    };
}

methods! {
    "getServerDefaults" => server_defaults(());
    "getFileInfo" => file_info(wire::GetFileInfoRequest);
    "getFileLinkInfo" => file_info(wire::GetFileInfoRequest);
    "getLocatedFileInfo" => located_file_info(wire::GetFileInfoRequest);
    "isFileClosed" => is_file_closed(wire::IsFileClosedRequest);
    "getListing" => listing(wire::GetListingRequest);
    "getBlockLocations" => block_locations(wire::GetBlockLocationsRequest);
    "getContentSummary" => content_summary(wire::GetContentSummaryRequest);
    "getQuotaUsage" => quota_usage(wire::GetQuotaUsageRequest);
    "getPreferredBlockSize" => preferred_block_size(wire::GetPreferredBlockSizeRequest);
    "getEnclosingRoot" => enclosing_root(wire::GetEnclosingRootRequest);
    "checkAccess" => check_access(wire::CheckAccessRequest);
    "mkdirs" => mkdirs(wire::MkdirsRequest);
    "rename" => rename(wire::RenameRequest);
    "rename2" => rename2(wire::Rename2Request);
    "delete" => delete(wire::DeleteRequest);
    "setPermission" => set_permission(wire::SetPermissionRequest);
    "setOwner" => set_owner(wire::SetOwnerRequest);
    "setTimes" => set_times(wire::SetTimesRequest);
    "setReplication" => set_replication(wire::SetReplicationRequest);
    "concat" => concat(wire::ConcatRequest);
    "truncate" => truncate(wire::TruncateRequest);
    "create" => create(wire::CreateRequest);
    "append" => append(wire::AppendRequest);
    "addBlock" => add_block(wire::AddBlockRequest);
    "abandonBlock" => abandon_block(wire::AbandonBlockRequest);
    "getAdditionalDatanode" => additional_datanode(wire::GetAdditionalDatanodeRequest);
    "updateBlockForPipeline" => new_generation(wire::UpdateBlockForPipelineRequest);
    "updatePipeline" => update_pipeline(wire::UpdatePipelineRequest);
    "complete" => complete(wire::CompleteRequest);
    "fsync" => fsync(wire::FsyncRequest);
    "renewLease" => renew_lease(wire::RenewLeaseRequest);
    "recoverLease" => recover_lease(wire::RecoverLeaseRequest);
    "reportBadBlocks" => report_bad_blocks(wire::ReportBadBlocksRequest);
    "getFsStats" => fs_stats(());
    "getFsReplicatedBlockStats" => replicated_block_stats(());
    "getFsECBlockGroupStats" => block_group_stats(());
    "getDatanodeReport" => datanode_report(wire::GetDatanodeReportRequest);
    "getSlowDatanodeReport" => slow_datanodes(());
    "setSafeMode" => set_safe_mode(wire::SetSafeModeRequest);
    "saveNamespace" => save_namespace(());
    "msync" => msync(());
    "getHAServiceState" => ha_state(());
    "getDelegationToken" => delegation_token(wire::GetDelegationTokenRequest);
    "renewDelegationToken" => renew_token(wire::RenewDelegationTokenRequest);
    "cancelDelegationToken" => cancel_token(wire::CancelDelegationTokenRequest);
    "getDataEncryptionKey" => data_encryption_key(());
    "getEZForPath" => encryption_zone(wire::GetEzForPathRequest);
    "listEncryptionZones" => encryption_zones(());
    "getErasureCodingPolicy" => erasure_coding_policy(wire::GetErasureCodingPolicyRequest);
    "getStoragePolicy" => storage_policy(wire::GetStoragePolicyRequest);
    "getStoragePolicies" => storage_policies(());
    "setStoragePolicy" => set_storage_policy(wire::SetStoragePolicyRequest);
    "getAclStatus" => acl_status(wire::GetAclStatusRequest);
    "setAcl" => change_acl(wire::AclChangeRequest);
    "modifyAclEntries" => change_acl(wire::AclChangeRequest);
    "removeAclEntries" => change_acl(wire::AclChangeRequest);
    "removeDefaultAcl" => change_acl(wire::AclChangeRequest);
    "removeAcl" => change_acl(wire::AclChangeRequest);
    "setXAttr" => set_x_attr(wire::SetXAttrRequest);
    "removeXAttr" => remove_x_attr(wire::RemoveXAttrRequest);
    "getXAttrs" => x_attrs(wire::GetXAttrsRequest);
    "listXAttrs" => list_x_attrs(wire::ListXAttrsRequest);
    "setQuota" => set_quota(wire::SetQuotaRequest);
    "createSymlink" => create_symlink(());
    "allowSnapshot" => no_snapshots(wire::SnapshotRequest);
    "disallowSnapshot" => no_snapshots(wire::SnapshotRequest);
    "createSnapshot" => no_snapshots(wire::SnapshotRequest);
    "deleteSnapshot" => no_snapshots(wire::SnapshotRequest);
    "renameSnapshot" => no_snapshots(wire::SnapshotRequest);
    "getSnapshotDiffReport" => no_snapshots(wire::SnapshotRequest);
    "getSnapshotDiffReportListing" => no_snapshots(wire::SnapshotRequest);
    "getSnapshotListing" => no_snapshots(wire::SnapshotRequest);
    "getSnapshottableDirListing" => snapshottable_directories(());
}

impl Asked<'_> {
    async fn ask<Q, R>(&self, request: Q) -> Result<R>
    where
        ClientRequest: From<Q>,
        R: TryFrom<ClientResponse>,
    {
        self.door.owner.call(self.caller.clone(), request).await
    }

    /// For calls that must not be done twice. The user is part of the key: a Hadoop process that acts for several users has
    /// one client id for all.
    fn context(&self) -> Option<pb::CallContext> {
        if self.call.client_id.is_empty() {
            return None;
        }
        let user = self.caller.user.as_bytes();
        let id = &self.call.client_id[..self.call.client_id.len().min(64 - USER_KEY_BYTES)];
        let client_id = [id, &user[..user.len().min(USER_KEY_BYTES)]].concat().into();
        let call_id = u64::try_from(self.call.call_id).unwrap_or_default();
        // Such a client does not tell which answers have arrived: they go by age.
        Some(pb::CallContext { client_id, call_id, lowest_unanswered: 0, seen_txid: 0 })
    }

    /// A client's block as ours.
    fn block(&self, block: &wire::ExtendedBlock) -> Done<pb::Block> {
        if block.pool_id != self.door.pool_id {
            let message = format!("block pool {:?} is not this cluster's, {}", block.pool_id, self.door.pool_id);
            return Err(io_exception(message));
        }
        Ok(pb::Block { pool: block.pool_id.clone(), id: block.block_id as i64, generation: block.generation_stamp })
    }

    async fn status(&self, path: &str) -> Result<pb::FileStatus> {
        let answer: pb::GetStatusResponse = self.ask(pb::GetStatusRequest { path: path.to_owned() }).await?;
        answer.status.ok_or_else(|| Error::new(cairn_proto::ErrorCode::Internal, "an answer without its status"))
    }
}

fn io_exception(message: impl Into<String>) -> RpcError {
    RpcError::new("java.io.IOException", message)
}

/// Where HDFS has no class of its own for a request that is refused.
fn as_io(error: Error) -> RpcError {
    match error.code() {
        cairn_proto::ErrorCode::InvalidArgument => io_exception(error.message()),
        _ => error.into(),
    }
}

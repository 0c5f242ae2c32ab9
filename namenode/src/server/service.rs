//! The gRPC services: they build an event, wait for its answer, and decide nothing.

use std::pin::Pin;
use std::sync::Arc;

use cairn_common::Env;
use cairn_common::net::opening::Peer;
use cairn_proto::ids::TxId;
use cairn_proto::pb::cluster_server::Cluster;
use cairn_proto::pb::namenode_server::Namenode;
use cairn_proto::{Error, ErrorCode, Result, pb};
use futures_util::Stream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::groups::Groups;
use super::handle::OwnerRef;
use super::owner::{Down, Inbox};
use crate::backup::{ArchiveStatus, BackupPlan, BackupSource};
use crate::core::Caller;
use crate::journal::JournalStatus;

/// Messages that may wait for a datanode that is slow to read.
const DOWN_QUEUE: usize = 64;
/// Pieces of a backup that may wait for its receiver.
const BACKUP_QUEUE: usize = 2;
/// Where a gRPC tool without our handshake names its user.
const USER_KEY: &str = "cairn-user";
/// Role of such a peer.
pub const BARE_GRPC: &str = "grpc";

/// Both services.
#[derive(Clone)]
pub struct Service {
    owner: OwnerRef,
    groups: Groups,
    storage: Storage,
}

/// What the services know of the disks; the core knows nothing of them.
#[derive(Clone)]
pub struct Storage {
    /// The machine.
    pub env: Env,
    /// The log.
    pub journal: watch::Receiver<JournalStatus>,
    /// The archive, if there is one.
    pub archive: Option<watch::Receiver<ArchiveStatus>>,
    /// Where the archive is told of backups.
    pub backed_up: Option<watch::Sender<TxId>>,
    /// Metadata directories that the settings name.
    pub configured_dirs: u32,
    /// The cluster.
    pub cluster_id: String,
    /// Its block pool.
    pub pool_id: String,
    /// One backup at a time: each reads all of the metadata.
    pub backups: Arc<Semaphore>,
}

impl Service {
    /// Services in front of `owner`.
    pub fn new(owner: OwnerRef, groups: Groups, storage: Storage) -> Self {
        Self { owner, groups, storage }
    }

    async fn begin_backup(&self, caller: Caller) -> Result<(BackupSource, OwnedSemaphorePermit)> {
        self.owner.check_superuser(caller).await?;
        let Ok(permit) = Arc::clone(&self.storage.backups).try_acquire_owned() else {
            return Err(Error::new(ErrorCode::Busy, "another backup is being made: wait for it"));
        };
        let Storage { env, journal, cluster_id, pool_id, .. } = self.storage.clone();
        let plan = {
            let status = journal.borrow();
            BackupPlan {
                dirs: status.dirs.clone(),
                last: status.durable,
                epoch: status.epoch,
                made_ms: env.clock.wall_ms(),
                cluster_id,
                pool_id,
            }
        };
        let fs = Arc::clone(&env.fs);
        let source = env.work.io(move || BackupSource::open(&*fs, &plan)).await?;
        Ok((source, permit))
    }

    async fn caller<T>(&self, request: &Request<T>) -> Result<Caller> {
        let peer = peer_of(request)?;
        let user = if peer.role == BARE_GRPC {
            let named = request.metadata().get(USER_KEY).and_then(|value| value.to_str().ok()).map(str::trim);
            let named = named.filter(|user| !user.is_empty() && user.len() <= 255).ok_or_else(|| {
                Error::new(ErrorCode::PermissionDenied, format!("say who calls: metadata {USER_KEY} is missing"))
            })?;
            named.to_owned()
        } else {
            peer.user.clone()
        };
        let groups = self.groups.of(&user).await;
        Ok(Caller { user, groups, host: peer.addr.ip().to_string() })
    }
}

fn peer_of<T>(request: &Request<T>) -> Result<&Peer> {
    request.extensions().get::<Peer>().ok_or_else(|| Error::new(ErrorCode::Internal, "the connection has no peer"))
}

macro_rules! forward {
    ($($method:ident($request:ident) -> $response:ident;)*) => {
        #[tonic::async_trait]
        impl Namenode for Service {
            $(
                async fn $method(
                    &self,
                    request: Request<pb::$request>,
                ) -> std::result::Result<Response<pb::$response>, Status> {
                    let caller = self.caller(&request).await?;
                    Ok(Response::new(self.owner.call(caller, request.into_inner()).await?))
                }
            )*

            async fn checkpoint(
                &self,
                request: Request<pb::CheckpointRequest>,
            ) -> std::result::Result<Response<pb::CheckpointResponse>, Status> {
                let caller = self.caller(&request).await?;
                Ok(Response::new(self.owner.checkpoint(caller).await?))
            }

            async fn cluster_report(
                &self,
                request: Request<pb::ClusterReportRequest>,
            ) -> std::result::Result<Response<pb::ClusterReportResponse>, Status> {
                let caller = self.caller(&request).await?;
                let mut report: pb::ClusterReportResponse = self.owner.call(caller, request.into_inner()).await?;
                report.metadata_dirs = self.storage.journal.borrow().dirs.len() as u32;
                report.metadata_dirs_configured = self.storage.configured_dirs;
                if let Some(archive) = &self.storage.archive {
                    archive.borrow().tell(&mut report);
                }
                Ok(Response::new(report))
            }

            type BackupStream = Pin<Box<dyn Stream<Item = std::result::Result<pb::BackupChunk, Status>> + Send>>;

            async fn backup(
                &self,
                request: Request<pb::BackupRequest>,
            ) -> std::result::Result<Response<Self::BackupStream>, Status> {
                let caller = self.caller(&request).await?;
                let (source, permit) = self.begin_backup(caller).await?;
                let (pieces, stream) = mpsc::channel(BACKUP_QUEUE);
                tokio::spawn(send_backup(self.storage.clone(), source, pieces, permit));
                Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
            }
        }
    };
}

forward! {
    get_server_defaults(GetServerDefaultsRequest) -> GetServerDefaultsResponse;
    create(CreateRequest) -> CreateResponse;
    append(AppendRequest) -> AppendResponse;
    truncate(TruncateRequest) -> TruncateResponse;
    concat(ConcatRequest) -> ConcatResponse;
    add_block(AddBlockRequest) -> AddBlockResponse;
    abandon_block(AbandonBlockRequest) -> AbandonBlockResponse;
    new_generation(NewGenerationRequest) -> NewGenerationResponse;
    update_pipeline(UpdatePipelineRequest) -> UpdatePipelineResponse;
    add_pipeline_node(AddPipelineNodeRequest) -> AddPipelineNodeResponse;
    complete(CompleteRequest) -> CompleteResponse;
    renew_lease(RenewLeaseRequest) -> RenewLeaseResponse;
    recover_lease(RecoverLeaseRequest) -> RecoverLeaseResponse;
    get_status(GetStatusRequest) -> GetStatusResponse;
    list(ListRequest) -> ListResponse;
    get_block_locations(GetBlockLocationsRequest) -> GetBlockLocationsResponse;
    content_summary(ContentSummaryRequest) -> ContentSummaryResponse;
    check_access(CheckAccessRequest) -> CheckAccessResponse;
    mkdirs(MkdirsRequest) -> MkdirsResponse;
    rename(RenameRequest) -> RenameResponse;
    delete(DeleteRequest) -> DeleteResponse;
    set_permission(SetPermissionRequest) -> SetPermissionResponse;
    set_owner(SetOwnerRequest) -> SetOwnerResponse;
    set_times(SetTimesRequest) -> SetTimesResponse;
    set_replication(SetReplicationRequest) -> SetReplicationResponse;
    report_bad_replica(ReportBadReplicaRequest) -> ReportBadReplicaResponse;
    safe_mode(SafeModeRequest) -> SafeModeResponse;
    confirm_restore(ConfirmRestoreRequest) -> ConfirmRestoreResponse;
}

/// Sends a backup piece by piece; ends early when the receiver goes away.
async fn send_backup(
    storage: Storage,
    mut source: BackupSource,
    pieces: mpsc::Sender<std::result::Result<pb::BackupChunk, Status>>,
    _permit: OwnedSemaphorePermit,
) {
    loop {
        let (back, piece) = storage
            .env
            .work
            .io(move || {
                let piece = source.next_piece();
                (source, piece)
            })
            .await;
        source = back;
        let message = match piece {
            Ok(Some(data)) => Ok(pb::BackupChunk { data: data.into() }),
            Ok(None) => {
                if let Some(archive) = &storage.backed_up {
                    archive.send_modify(|image| *image = source.image().max(*image));
                }
                return;
            }
            Err(error) => {
                tracing::error!(%error, "a backup could not be made");
                Err(error.into())
            }
        };
        let failed = message.is_err();
        if pieces.send(message).await.is_err() || failed {
            return;
        }
    }
}

#[tonic::async_trait]
impl Cluster for Service {
    async fn register(
        &self,
        request: Request<pb::RegisterRequest>,
    ) -> std::result::Result<Response<pb::RegisterResponse>, Status> {
        let peer_ip = peer_of(&request)?.addr.ip().to_string();
        Ok(Response::new(self.owner.register(peer_ip, request.into_inner()).await?))
    }

    async fn heartbeat(
        &self,
        request: Request<pb::HeartbeatRequest>,
    ) -> std::result::Result<Response<pb::HeartbeatResponse>, Status> {
        Ok(Response::new(self.owner.heartbeat(request.into_inner()).await?))
    }

    type ReportsStream = Pin<Box<dyn Stream<Item = std::result::Result<pb::ReportDown, Status>> + Send>>;

    async fn reports(
        &self,
        request: Request<Streaming<pb::ReportUp>>,
    ) -> std::result::Result<Response<Self::ReportsStream>, Status> {
        let (down, answers) = mpsc::channel(DOWN_QUEUE);
        let (owner, messages) = (self.owner.clone(), request.into_inner());
        // The answer's head goes out at once: a node may wait for it before it sends its first message.
        tokio::spawn(take_reports(owner, messages, down));
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }
}

/// Hands the messages of a stream to the owner, in order, until the node or the owner ends it.
async fn take_reports(
    owner: OwnerRef,
    mut messages: Streaming<pb::ReportUp>,
    down: mpsc::Sender<std::result::Result<pb::ReportDown, Status>>,
) {
    let open = match messages.message().await {
        Ok(Some(pb::ReportUp { report: Some(pb::report_up::Report::Open(open)) })) => open,
        Ok(Some(_)) => {
            let error = Error::new(ErrorCode::InvalidArgument, "the first message of a report stream must be `open`");
            // The node may have gone: then nobody misses the reason.
            let _ = down.send(Err(error.into())).await;
            return;
        }
        Ok(None) | Err(_) => return,
    };
    let (is_open, mut closed) = oneshot::channel();
    let down = Down { messages: down, _open: is_open };
    let Ok(stream) = owner.open_stream(open, down).await else { return };
    loop {
        let message = tokio::select! { biased;
            // Only ever dropped: the owner has ended the stream.
            _ = &mut closed => return,
            message = messages.message() => message,
        };
        let Ok(Some(report)) = message else { break };
        if owner.send(Inbox::Report { stream, report }).await.is_err() {
            return;
        }
    }
    // Fails only if the owner has ended, and with it the stream.
    let _ = owner.send(Inbox::ReportClosed { stream }).await;
}

//! The gRPC services: they build an event, wait for its answer, and decide nothing.

use std::pin::Pin;

use cairn_common::net::opening::Peer;
use cairn_proto::pb::cluster_server::Cluster;
use cairn_proto::pb::namenode_server::Namenode;
use cairn_proto::{Error, ErrorCode, Result, pb};
use futures_util::Stream;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::groups::Groups;
use super::handle::OwnerRef;
use super::owner::{Down, Inbox};
use crate::core::Caller;

/// Messages that may wait for a datanode that is slow to read.
const DOWN_QUEUE: usize = 64;
/// Where a gRPC tool without our handshake names its user.
const USER_KEY: &str = "cairn-user";
/// Role of such a peer.
pub const BARE_GRPC: &str = "grpc";

/// Both services.
#[derive(Clone)]
pub struct Service {
    owner: OwnerRef,
    groups: Groups,
}

impl Service {
    /// Services in front of `owner`.
    pub fn new(owner: OwnerRef, groups: Groups) -> Self {
        Self { owner, groups }
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
    mkdirs(MkdirsRequest) -> MkdirsResponse;
    rename(RenameRequest) -> RenameResponse;
    delete(DeleteRequest) -> DeleteResponse;
    set_permission(SetPermissionRequest) -> SetPermissionResponse;
    set_owner(SetOwnerRequest) -> SetOwnerResponse;
    set_times(SetTimesRequest) -> SetTimesResponse;
    set_replication(SetReplicationRequest) -> SetReplicationResponse;
    report_bad_replica(ReportBadReplicaRequest) -> ReportBadReplicaResponse;
    cluster_report(ClusterReportRequest) -> ClusterReportResponse;
    safe_mode(SafeModeRequest) -> SafeModeResponse;
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

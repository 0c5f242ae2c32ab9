//! What goes into the core and what comes out of it.
//!
//! The owner thread turns everything that happens (a call, a heartbeat, a report, a sync of the log, time passing) into
//! an [`Event`], and carries out the [`Command`]s that come back in the order in which they come.

use cairn_proto::ids::{Epoch, TxId};
use cairn_proto::{Error, pb};

/// The time at which an event is handled, as its owner measured it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Now {
    /// Monotonic milliseconds since some fixed moment: all timeouts use this one.
    pub mono_ms: u64,
    /// Milliseconds since the epoch of Unix: only for times that are stored or shown.
    pub wall_ms: u64,
}

/// Who calls.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Caller {
    /// Effective user.
    pub user: String,
    /// Groups of that user, as the server resolved them; the first is the primary one.
    pub groups: Vec<String>,
    /// IP address of the peer, for placement and for sorting replicas by distance.
    pub host: String,
}

/// Names one waiting call; each is answered exactly once.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ReplyTo(pub u64);

/// Names one report stream of a datanode; never used twice while the namenode runs.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct StreamId(pub u64);

macro_rules! calls {
    ($($(#[$doc:meta])* $name:ident($request:ident, $response:ident),)*) => {
        /// One call of service `Namenode` (all but `Checkpoint` and `Backup`, which are the server's own).
        #[derive(Clone, PartialEq, Debug)]
        pub enum ClientRequest {
            $($(#[$doc])* $name(pb::$request),)*
        }

        /// The answer to the [`ClientRequest`] of the same name.
        #[derive(Clone, PartialEq, Debug)]
        pub enum ClientResponse {
            $($(#[$doc])* $name(pb::$response),)*
        }

        impl ClientRequest {
            /// Name of the call, for metrics and logs.
            pub fn name(&self) -> &'static str {
                match self {
                    $(Self::$name(_) => stringify!($name),)*
                }
            }
        }

        $(
            impl From<pb::$request> for ClientRequest {
                fn from(request: pb::$request) -> Self {
                    Self::$name(request)
                }
            }

            impl From<pb::$response> for ClientResponse {
                fn from(response: pb::$response) -> Self {
                    Self::$name(response)
                }
            }

            impl TryFrom<ClientResponse> for pb::$response {
                type Error = ClientResponse;

                fn try_from(response: ClientResponse) -> Result<Self, ClientResponse> {
                    match response {
                        ClientResponse::$name(response) => Ok(response),
                        other => Err(other),
                    }
                }
            }
        )*
    };
}

impl ClientRequest {
    /// Whether it may leave an edit in the log.
    pub fn changes(&self) -> bool {
        !matches!(
            self,
            Self::GetServerDefaults(_)
                | Self::RenewLease(_)
                | Self::SyncFile(_)
                | Self::GetStatus(_)
                | Self::List(_)
                | Self::GetBlockLocations(_)
                | Self::ContentSummary(_)
                | Self::CheckAccess(_)
                | Self::ReportBadReplica(_)
                | Self::ClusterReport(_)
                | Self::SafeMode(_)
        )
    }
}

calls! {
    /// Defaults that a client needs before it writes.
    GetServerDefaults(GetServerDefaultsRequest, GetServerDefaultsResponse),
    /// Makes a file and takes its lease.
    Create(CreateRequest, CreateResponse),
    /// Opens a file for writing at its end.
    Append(AppendRequest, AppendResponse),
    /// Cuts a file.
    Truncate(TruncateRequest, TruncateResponse),
    /// Moves the blocks of files to the end of another.
    Concat(ConcatRequest, ConcatResponse),
    /// Gives the next block of an open file.
    AddBlock(AddBlockRequest, AddBlockResponse),
    /// Gives a block back that was never written.
    AbandonBlock(AbandonBlockRequest, AbandonBlockResponse),
    /// Hands out a generation for a broken pipeline.
    NewGeneration(NewGenerationRequest, NewGenerationResponse),
    /// Puts that generation and the surviving nodes into force.
    UpdatePipeline(UpdatePipelineRequest, UpdatePipelineResponse),
    /// Names one more node for a broken pipeline.
    AddPipelineNode(AddPipelineNodeRequest, AddPipelineNodeResponse),
    /// Closes a file.
    Complete(CompleteRequest, CompleteResponse),
    /// Keeps the leases of a client.
    RenewLease(RenewLeaseRequest, RenewLeaseResponse),
    /// Says how long the open block of a file is.
    SyncFile(SyncFileRequest, SyncFileResponse),
    /// Takes a file from its writer and closes it.
    RecoverLease(RecoverLeaseRequest, RecoverLeaseResponse),
    /// Status of one path.
    GetStatus(GetStatusRequest, GetStatusResponse),
    /// One page of a directory.
    List(ListRequest, ListResponse),
    /// Blocks of a range of a file.
    GetBlockLocations(GetBlockLocationsRequest, GetBlockLocationsResponse),
    /// Sums over a tree.
    ContentSummary(ContentSummaryRequest, ContentSummaryResponse),
    /// Whether a caller may do something.
    CheckAccess(CheckAccessRequest, CheckAccessResponse),
    /// Makes a directory.
    Mkdirs(MkdirsRequest, MkdirsResponse),
    /// Moves an entry.
    Rename(RenameRequest, RenameResponse),
    /// Deletes a tree.
    Delete(DeleteRequest, DeleteResponse),
    /// chmod.
    SetPermission(SetPermissionRequest, SetPermissionResponse),
    /// chown, chgrp.
    SetOwner(SetOwnerRequest, SetOwnerResponse),
    /// touch.
    SetTimes(SetTimesRequest, SetTimesResponse),
    /// setrep.
    SetReplication(SetReplicationRequest, SetReplicationResponse),
    /// A reader met a bad replica.
    ReportBadReplica(ReportBadReplicaRequest, ReportBadReplicaResponse),
    /// State of the cluster.
    ClusterReport(ClusterReportRequest, ClusterReportResponse),
    /// Safe mode: get, enter, leave.
    SafeMode(SafeModeRequest, SafeModeResponse),
    /// A restored state is the right one.
    ConfirmRestore(ConfirmRestoreRequest, ConfirmRestoreResponse),
}

/// An answer of the core.
#[derive(Clone, PartialEq, Debug)]
pub enum Response {
    /// To a client's call.
    Client(ClientResponse),
    /// To a datanode's registration.
    Register(pb::RegisterResponse),
    /// To a heartbeat, with the commands for the node.
    Heartbeat(pb::HeartbeatResponse),
}

/// Something that happened.
#[derive(Clone, PartialEq, Debug)]
pub enum Event {
    /// A client calls.
    Client {
        /// Where the answer goes.
        reply: ReplyTo,
        /// Who calls.
        caller: Caller,
        /// What is asked.
        request: ClientRequest,
    },
    /// A datanode registers.
    Register {
        /// Where the answer goes.
        reply: ReplyTo,
        /// Address of the peer.
        peer_ip: String,
        /// What it says of itself.
        request: pb::RegisterRequest,
    },
    /// A datanode's heartbeat.
    Heartbeat {
        /// Where the answer goes.
        reply: ReplyTo,
        /// What it says.
        request: pb::HeartbeatRequest,
    },
    /// The first message of a report stream arrived.
    ReportOpened {
        /// Its name from now on.
        stream: StreamId,
        /// That message.
        open: pb::ReportOpen,
    },
    /// A later message of a report stream.
    Report {
        /// Which stream.
        stream: StreamId,
        /// The message.
        report: pb::ReportUp,
    },
    /// The stream ended, for whatever reason.
    ReportClosed {
        /// Which stream.
        stream: StreamId,
    },
    /// The log is durable up to this transaction.
    Synced {
        /// The last durable transaction.
        txid: TxId,
    },
    /// The set of metadata directories shrank: its new epoch is durable in those that are left.
    EpochRaised {
        /// The new epoch.
        epoch: Epoch,
    },
    /// Time passes: at least every 100 ms, and at once again while [`super::Core::has_work`] says so.
    Tick,
}

/// Something the owner has to do.
#[derive(Clone, PartialEq, Debug)]
pub enum Command {
    /// Append this edit to the log. Transactions come gapless and in order.
    Append {
        /// Its number.
        txid: TxId,
        /// The edit.
        edit: pb::Edit,
    },
    /// Answer a call once `depends_on` is durable.
    Reply {
        /// Which call.
        to: ReplyTo,
        /// Must be durable first; 0: nothing.
        depends_on: TxId,
        /// The answer.
        result: Result<Response, Error>,
    },
    /// Send a message down a report stream once `depends_on` is durable.
    Report {
        /// Which stream.
        stream: StreamId,
        /// Must be durable first; 0: nothing.
        depends_on: TxId,
        /// The message.
        down: pb::ReportDown,
    },
    /// End a report stream with an error.
    CloseStream {
        /// Which stream.
        stream: StreamId,
        /// Why.
        error: Error,
    },
}

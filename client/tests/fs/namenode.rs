//! A namenode that keeps files in a map, places blocks on all its nodes in order, and can be told to fail calls.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use cairn_common::Env;
use cairn_common::net::opening::{self, Opening, ServerIdentity};
use cairn_common::net::rpc::RpcConn;
use cairn_proto::path::split_last;
use cairn_proto::pb::namenode_server::{Namenode, NamenodeServer};
use cairn_proto::{Error, ErrorCode, pb};
use tonic::{Request, Response, Status};

type Answer<T> = std::result::Result<Response<T>, Status>;

#[derive(Clone)]
pub struct FakeBlock {
    pub block: pb::Block,
    pub length: Option<u64>,
    pub replicas: Vec<pb::Replica>,
}

#[derive(Clone, Default)]
pub struct FakeFile {
    pub inode: u64,
    pub directory: bool,
    pub open: bool,
    pub replication: u32,
    pub block_size: u64,
    pub blocks: Vec<FakeBlock>,
}

impl FakeFile {
    fn length(&self) -> u64 {
        self.blocks.iter().filter_map(|block| block.length).sum()
    }
}

#[derive(Default)]
pub struct State {
    pub nodes: Vec<pb::Replica>,
    /// Nodes that it knows to be gone.
    pub gone: Vec<String>,
    pub files: BTreeMap<String, FakeFile>,
    pub next: u64,
    /// Names of calls with their call ids, in order.
    pub calls: Vec<(&'static str, u64)>,
    /// Errors to answer first, by name of call.
    pub failures: HashMap<&'static str, Vec<ErrorCode>>,
    pub bad_replicas: Vec<pb::ReportBadReplicaRequest>,
    pub page: usize,
    /// Says of blocks being written that nodes which it does not name may have more.
    pub others_may_hold: bool,
}

#[derive(Clone, Default)]
pub struct FakeNamenode {
    pub state: Arc<Mutex<State>>,
}

fn not_found(path: &str) -> Status {
    Error::new(ErrorCode::FileNotFound, format!("{path}: no such file or directory")).with_subject(path).into()
}

impl FakeNamenode {
    /// Serves until the runtime ends; returns the address.
    pub async fn start(&self, env: &Env) -> String {
        let root = FakeFile { inode: 1, directory: true, ..Default::default() };
        {
            let mut state = self.state.lock().unwrap();
            state.files.insert("/".into(), root);
            state.next = 1_000;
            state.page = 1_000;
        }
        let listener = env.net.bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().to_string();
        let (give, conns) = tokio::sync::mpsc::channel(16);
        let clock = env.clock.clone();
        tokio::spawn(async move {
            loop {
                let conn = listener.accept().await.unwrap();
                let opened = opening::read_opening(conn, &ServerIdentity::default(), &clock).await;
                if let Ok(Opening::Rpc { conn, peer }) = opened {
                    give.send(Ok::<_, std::io::Error>(RpcConn::new(conn, peer))).await.unwrap();
                }
            }
        });
        let service = NamenodeServer::new(self.clone());
        let incoming = tokio_stream::wrappers::ReceiverStream::new(conns);
        tokio::spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming));
        address
    }

    /// Notes a call; an error if it was told to fail.
    fn enter(&self, name: &'static str, call: Option<&pb::CallContext>) -> Result<(), Status> {
        let mut state = self.state.lock().unwrap();
        state.calls.push((name, call.map_or(0, |call| call.call_id)));
        match state.failures.get_mut(name).and_then(Vec::pop) {
            Some(code) => Err(Error::new(code, format!("scripted {code:?}")).into()),
            None => Ok(()),
        }
    }

    pub fn count(&self, name: &str) -> usize {
        self.state.lock().unwrap().calls.iter().filter(|(called, _)| *called == name).count()
    }

    pub fn file(&self, path: &str) -> FakeFile {
        self.state.lock().unwrap().files[path].clone()
    }

    pub fn add(&self, path: &str, directory: bool) {
        let mut state = self.state.lock().unwrap();
        state.next += 1;
        let file = FakeFile { inode: state.next, directory, block_size: 512, ..Default::default() };
        state.files.insert(path.into(), file);
    }

    fn by_inode<T>(&self, inode: u64, change: impl FnOnce(&mut FakeFile) -> T) -> Result<T, Status> {
        let mut state = self.state.lock().unwrap();
        let found = state.files.values_mut().find(|file| file.inode == inode && file.open);
        found.map(change).ok_or_else(|| Error::new(ErrorCode::LeaseExpired, "no such open file").into())
    }
}

fn status(path: &str, file: &FakeFile) -> pb::FileStatus {
    pb::FileStatus {
        path: path.into(),
        inode: file.inode,
        kind: if file.directory { pb::FileKind::Directory } else { pb::FileKind::File } as i32,
        length: file.length(),
        replication: file.replication,
        block_size: file.block_size,
        open: file.open,
        ..Default::default()
    }
}

fn located(file: &FakeFile, others_may_hold: bool) -> Vec<pb::LocatedBlock> {
    let mut offset = 0;
    let locate = |fake: &FakeBlock| {
        let at = offset;
        offset += fake.length.unwrap_or(0);
        pb::LocatedBlock {
            block: Some(fake.block.clone()),
            offset: at,
            length: fake.length.unwrap_or(0),
            replicas: fake.replicas.clone(),
            complete: fake.length.is_some(),
            corrupt: false,
            token: Bytes::new(),
            others_may_hold: others_may_hold && fake.length.is_none(),
        }
    };
    file.blocks.iter().map(locate).collect()
}

fn commit(file: &mut FakeFile, committed: &[pb::CommittedBlock]) {
    for one in committed {
        let done = one.block.as_ref().unwrap();
        let block = file.blocks.iter_mut().find(|block| block.block.id == done.id).expect("a block of the file");
        assert_eq!(block.block.generation, done.generation, "the generation that the namenode knows");
        block.length = Some(one.length);
    }
}

#[tonic::async_trait]
impl Namenode for FakeNamenode {
    async fn get_server_defaults(
        &self,
        _: Request<pb::GetServerDefaultsRequest>,
    ) -> Answer<pb::GetServerDefaultsResponse> {
        self.enter("get_server_defaults", None)?;
        Ok(Response::new(pb::GetServerDefaultsResponse { block_size: 1 << 20, replication: 3, ..Default::default() }))
    }

    async fn create(&self, request: Request<pb::CreateRequest>) -> Answer<pb::CreateResponse> {
        let request = request.into_inner();
        self.enter("create", request.call.as_ref())?;
        let mut state = self.state.lock().unwrap();
        if state.files.contains_key(&request.path) && !request.overwrite {
            return Err(Error::new(ErrorCode::FileAlreadyExists, format!("{} exists", request.path)).into());
        }
        state.next += 1;
        let file = FakeFile {
            inode: state.next,
            open: true,
            replication: if request.replication == 0 { 3 } else { request.replication },
            block_size: if request.block_size == 0 { 1 << 20 } else { request.block_size },
            ..Default::default()
        };
        let answer = status(&request.path, &file);
        state.files.insert(request.path, file);
        Ok(Response::new(pb::CreateResponse { status: Some(answer) }))
    }

    async fn append(&self, request: Request<pb::AppendRequest>) -> Answer<pb::AppendResponse> {
        let request = request.into_inner();
        self.enter("append", request.call.as_ref())?;
        let mut state = self.state.lock().unwrap();
        let Some(file) = state.files.get_mut(&request.path) else {
            return Err(Error::new(ErrorCode::FileNotFound, format!("{} is not there", request.path)).into());
        };
        file.open = true;
        let (status, blocks) = (Some(status(&request.path, file)), file.blocks.len() as u32);
        Ok(Response::new(pb::AppendResponse { status, blocks }))
    }

    async fn truncate(&self, _: Request<pb::TruncateRequest>) -> Answer<pb::TruncateResponse> {
        Err(Error::new(ErrorCode::Unsupported, "truncate").into())
    }

    async fn concat(&self, _: Request<pb::ConcatRequest>) -> Answer<pb::ConcatResponse> {
        Err(Error::new(ErrorCode::Unsupported, "concat").into())
    }

    async fn recover_lease(&self, _: Request<pb::RecoverLeaseRequest>) -> Answer<pb::RecoverLeaseResponse> {
        self.enter("recover_lease", None)?;
        Ok(Response::new(pb::RecoverLeaseResponse { closed: true, waits_for: String::new() }))
    }

    async fn add_block(&self, request: Request<pb::AddBlockRequest>) -> Answer<pb::AddBlockResponse> {
        let request = request.into_inner();
        self.enter("add_block", request.call.as_ref())?;
        let (id, nodes) = {
            let mut state = self.state.lock().unwrap();
            state.next += 1;
            let free = |node: &&pb::Replica| {
                !request.exclude_nodes.contains(&node.node_id) && !state.gone.contains(&node.node_id)
            };
            (state.next, state.nodes.iter().filter(free).cloned().collect::<Vec<_>>())
        };
        if nodes.is_empty() {
            return Err(Error::new(ErrorCode::NoTargets, "no datanode can take the block").into());
        }
        self.by_inode(request.inode, |file| {
            commit(file, &request.committed);
            assert_eq!(file.blocks.len(), request.block_index as usize);
            assert!(file.blocks.iter().filter(|block| block.length.is_none()).count() <= 1, "two open blocks at most");
            let block = pb::Block { pool: "p".into(), id: id as i64, generation: id };
            let replicas: Vec<_> = nodes.into_iter().take(file.replication as usize).collect();
            file.blocks.push(FakeBlock { block, length: None, replicas });
            let block = located(file, false).pop();
            Response::new(pb::AddBlockResponse { block })
        })
    }

    async fn abandon_block(&self, request: Request<pb::AbandonBlockRequest>) -> Answer<pb::AbandonBlockResponse> {
        let request = request.into_inner();
        self.enter("abandon_block", request.call.as_ref())?;
        let id = request.block.unwrap().id;
        self.by_inode(request.inode, |file| {
            assert_eq!(file.blocks.pop().map(|block| block.block.id), Some(id), "the last block");
            Response::new(pb::AbandonBlockResponse {})
        })
    }

    async fn new_generation(&self, request: Request<pb::NewGenerationRequest>) -> Answer<pb::NewGenerationResponse> {
        self.enter("new_generation", request.get_ref().call.as_ref())?;
        let mut state = self.state.lock().unwrap();
        state.next += 1;
        Ok(Response::new(pb::NewGenerationResponse { generation: state.next, ..Default::default() }))
    }

    async fn update_pipeline(&self, request: Request<pb::UpdatePipelineRequest>) -> Answer<pb::UpdatePipelineResponse> {
        let request = request.into_inner();
        self.enter("update_pipeline", request.call.as_ref())?;
        let old = request.block.unwrap();
        let nodes = self.state.lock().unwrap().nodes.clone();
        self.by_inode(request.inode, |file| {
            let block = file.blocks.iter_mut().find(|block| block.block == old).expect("the block as it was");
            block.block.generation = request.new_generation;
            let named = |node: &pb::PipelineNode| nodes.iter().find(|known| known.node_id == node.node_id).cloned();
            block.replicas = request.nodes.iter().map(|node| named(node).expect("a known node")).collect();
            Response::new(pb::UpdatePipelineResponse {})
        })
    }

    async fn add_pipeline_node(
        &self,
        request: Request<pb::AddPipelineNodeRequest>,
    ) -> Answer<pb::AddPipelineNodeResponse> {
        let request = request.into_inner();
        self.enter("add_pipeline_node", None)?;
        let state = self.state.lock().unwrap();
        let known = || state.nodes.iter().filter(|node| !state.gone.contains(&node.node_id));
        let named = |node: &&pb::Replica| {
            !request.present_nodes.contains(&node.node_id) && !request.exclude_nodes.contains(&node.node_id)
        };
        let usable_nodes = known().count() as u32;
        Ok(Response::new(pb::AddPipelineNodeResponse { node: known().find(named).cloned(), usable_nodes }))
    }

    async fn complete(&self, request: Request<pb::CompleteRequest>) -> Answer<pb::CompleteResponse> {
        let request = request.into_inner();
        self.enter("complete", request.call.as_ref())?;
        self.by_inode(request.inode, |file| {
            commit(file, &request.committed);
            assert!(file.blocks.iter().all(|block| block.length.is_some()), "all blocks are committed");
            file.open = false;
            Response::new(pb::CompleteResponse { status: Some(status("", file)) })
        })
    }

    async fn renew_lease(&self, _: Request<pb::RenewLeaseRequest>) -> Answer<pb::RenewLeaseResponse> {
        self.enter("renew_lease", None)?;
        Ok(Response::new(pb::RenewLeaseResponse {}))
    }

    async fn get_status(&self, request: Request<pb::GetStatusRequest>) -> Answer<pb::GetStatusResponse> {
        self.enter("get_status", None)?;
        let path = request.into_inner().path;
        let state = self.state.lock().unwrap();
        let file = state.files.get(&path).ok_or_else(|| not_found(&path))?;
        Ok(Response::new(pb::GetStatusResponse { status: Some(status(&path, file)) }))
    }

    async fn list(&self, request: Request<pb::ListRequest>) -> Answer<pb::ListResponse> {
        self.enter("list", None)?;
        let request = request.into_inner();
        let state = self.state.lock().unwrap();
        if !state.files.contains_key(&request.path) {
            return Err(not_found(&request.path));
        }
        let below = |path: &str| split_last(path).is_some_and(|(parent, _)| parent == request.path);
        let name = |path: &str| split_last(path).map(|(_, name)| name.as_bytes().to_vec()).unwrap_or_default();
        let rest = state.files.iter().filter(|(path, _)| below(path) && name(path)[..] > request.start_after[..]);
        let all: Vec<_> = rest.map(|(path, file)| status(path, file)).collect();
        let remaining = all.len().saturating_sub(state.page) as u64;
        let entries = all.into_iter().take(state.page).collect();
        Ok(Response::new(pb::ListResponse { entries, remaining }))
    }

    async fn get_block_locations(
        &self,
        request: Request<pb::GetBlockLocationsRequest>,
    ) -> Answer<pb::GetBlockLocationsResponse> {
        self.enter("get_block_locations", None)?;
        let request = request.into_inner();
        let state = self.state.lock().unwrap();
        let file = state.files.get(&request.path).ok_or_else(|| not_found(&request.path))?;
        let end = if request.length == 0 { u64::MAX } else { request.offset + request.length };
        let mut blocks = located(file, state.others_may_hold);
        blocks.retain(|block| block.offset < end && (block.offset + block.length > request.offset || !block.complete));
        Ok(Response::new(pb::GetBlockLocationsResponse { status: Some(status(&request.path, file)), blocks }))
    }

    async fn delete(&self, request: Request<pb::DeleteRequest>) -> Answer<pb::DeleteResponse> {
        let request = request.into_inner();
        self.enter("delete", request.call.as_ref())?;
        let mut state = self.state.lock().unwrap();
        let inode = state.files.get(&request.path).map(|file| file.inode);
        let ours = inode.is_some_and(|inode| request.only_inode == 0 || inode == request.only_inode);
        let existed = ours && state.files.remove(&request.path).is_some();
        Ok(Response::new(pb::DeleteResponse { existed }))
    }

    async fn mkdirs(&self, request: Request<pb::MkdirsRequest>) -> Answer<pb::MkdirsResponse> {
        let request = request.into_inner();
        self.enter("mkdirs", request.call.as_ref())?;
        self.add(&request.path, true);
        Ok(Response::new(pb::MkdirsResponse { status: Some(status(&request.path, &self.file(&request.path))) }))
    }

    async fn report_bad_replica(
        &self,
        request: Request<pb::ReportBadReplicaRequest>,
    ) -> Answer<pb::ReportBadReplicaResponse> {
        self.enter("report_bad_replica", None)?;
        self.state.lock().unwrap().bad_replicas.push(request.into_inner());
        Ok(Response::new(pb::ReportBadReplicaResponse {}))
    }

    async fn content_summary(&self, _: Request<pb::ContentSummaryRequest>) -> Answer<pb::ContentSummaryResponse> {
        Err(Status::unimplemented("fake"))
    }
    async fn check_access(&self, _: Request<pb::CheckAccessRequest>) -> Answer<pb::CheckAccessResponse> {
        Err(Status::unimplemented("fake"))
    }
    async fn rename(&self, _: Request<pb::RenameRequest>) -> Answer<pb::RenameResponse> {
        Err(Status::unimplemented("fake"))
    }
    async fn set_permission(&self, _: Request<pb::SetPermissionRequest>) -> Answer<pb::SetPermissionResponse> {
        Err(Status::unimplemented("fake"))
    }
    async fn set_owner(&self, _: Request<pb::SetOwnerRequest>) -> Answer<pb::SetOwnerResponse> {
        Err(Status::unimplemented("fake"))
    }
    async fn set_times(&self, _: Request<pb::SetTimesRequest>) -> Answer<pb::SetTimesResponse> {
        Err(Status::unimplemented("fake"))
    }
    async fn set_replication(&self, _: Request<pb::SetReplicationRequest>) -> Answer<pb::SetReplicationResponse> {
        Err(Status::unimplemented("fake"))
    }
    async fn cluster_report(&self, _: Request<pb::ClusterReportRequest>) -> Answer<pb::ClusterReportResponse> {
        Err(Status::unimplemented("fake"))
    }
    async fn safe_mode(&self, _: Request<pb::SafeModeRequest>) -> Answer<pb::SafeModeResponse> {
        Err(Status::unimplemented("fake"))
    }
    type BackupStream = tokio_stream::Empty<Result<pb::BackupChunk, Status>>;
    async fn backup(&self, _: Request<pb::BackupRequest>) -> Answer<Self::BackupStream> {
        Err(Status::unimplemented("fake"))
    }
    async fn confirm_restore(&self, _: Request<pb::ConfirmRestoreRequest>) -> Answer<pb::ConfirmRestoreResponse> {
        Err(Status::unimplemented("fake"))
    }
    async fn checkpoint(&self, _: Request<pb::CheckpointRequest>) -> Answer<pb::CheckpointResponse> {
        Err(Status::unimplemented("fake"))
    }
}

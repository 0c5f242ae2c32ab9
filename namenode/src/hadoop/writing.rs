//! Open files: create, blocks, pipelines, leases.
//!
//! HDFS's client says the final length of a block when it asks for the next one or completes the file; what it sends as
//! `previous` and `last` is our "committed". It does not count blocks: the core finds the place behind `previous`.

use cairn_proto::hadoop as wire;
use cairn_proto::{Error, ErrorCode, Result, pb};

use super::{Asked, Done, as_io, convert, io_exception};

/// Nodes of one request, at most: the core's limit, of which a client names some twice.
const MAX_NODES: u32 = 512;

fn has(flags: u32, flag: wire::CreateFlag) -> bool {
    flags & flag as u32 != 0
}

fn ids(nodes: &[wire::DatanodeInfo]) -> Vec<String> {
    nodes.iter().map(|node| node.id.datanode_uuid.clone()).collect()
}

impl Asked<'_> {
    pub(super) async fn create(&self, request: wire::CreateRequest) -> Done<wire::CreateResponse> {
        if request.ec_policy_name.as_ref().is_some_and(|name| !name.is_empty() && name != "replication") {
            return Err(io_exception("erasure coding is not supported: files are replicated"));
        }
        let flags = request.create_flag;
        if !has(flags, wire::CreateFlag::Create) {
            self.status(&request.src).await?;
        }
        let request = pb::CreateRequest {
            call: self.context(),
            path: request.src,
            permission: request.masked.perm,
            replication: request.replication,
            block_size: request.block_size,
            overwrite: has(flags, wire::CreateFlag::Overwrite),
            create_parents: request.create_parent,
            client_name: request.client_name,
        };
        let answer: pb::CreateResponse = self.ask(request).await.map_err(as_io)?;
        Ok(wire::CreateResponse { fs: answer.status.map(|status| convert::status(&status, "")) })
    }

    /// No finished block is opened again: what is written goes into a new one, so the answer names none.
    pub(super) async fn append(&self, request: wire::AppendRequest) -> Done<wire::AppendResponse> {
        let request = pb::AppendRequest { call: self.context(), path: request.src, client_name: request.client_name };
        let answer: pb::AppendResponse = self.ask(request).await.map_err(as_io)?;
        Ok(wire::AppendResponse { block: None, stat: answer.status.map(|status| convert::status(&status, "")) })
    }

    /// The file's number; clients of older versions name files by path alone.
    async fn file(&self, file_id: u64, path: &str) -> Result<u64> {
        if file_id != 0 { Ok(file_id) } else { self.status(path).await.map(|status| status.inode) }
    }

    fn committed(&self, block: Option<&wire::ExtendedBlock>) -> Done<Vec<pb::CommittedBlock>> {
        let Some(said) = block else { return Ok(Vec::new()) };
        let block = self.block(said)?;
        Ok(vec![pb::CommittedBlock { block: Some(block), length: said.num_bytes() }])
    }

    pub(super) async fn add_block(&self, request: wire::AddBlockRequest) -> Done<wire::AddBlockResponse> {
        let committed = self.committed(request.previous.as_ref())?;
        let add = pb::AddBlockRequest {
            call: None,
            inode: self.file(request.file_id(), &request.src).await?,
            client_name: request.client_name,
            previous: committed.first().and_then(|said| said.block.clone()),
            by_previous: true,
            committed,
            exclude_nodes: ids(&request.exclude_nodes),
            favored_nodes: request.favored_nodes,
            ..pb::AddBlockRequest::default()
        };
        let mut caller = self.caller.clone();
        if !request.flags.is_empty() {
            // Both flags ask for places that do not depend on the writer's.
            caller.host.clear();
        }
        let answer: Result<pb::AddBlockResponse> = self.door.owner.call(caller, add).await;
        let answer = answer.map_err(|error| match error.code() {
            // Clients wait and ask again for this class alone.
            ErrorCode::Busy => Error::new(ErrorCode::NotReplicatedYet, error.message()).into(),
            _ => as_io(error),
        })?;
        let block = answer.block.ok_or_else(|| io_exception("the new block is gone already"))?;
        Ok(wire::AddBlockResponse { block: convert::located_block(&block) })
    }

    pub(super) async fn abandon_block(&self, request: wire::AbandonBlockRequest) -> Done<()> {
        let block = self.block(&request.b)?;
        let inode = self.file(request.file_id(), &request.src).await?;
        let request = pb::AbandonBlockRequest { call: None, inode, client_name: request.holder, block: Some(block) };
        let _: pb::AbandonBlockResponse = self.ask(request).await.map_err(as_io)?;
        Ok(())
    }

    /// Answers with the nodes that were there and those that join.
    pub(super) async fn additional_datanode(
        &self,
        request: wire::GetAdditionalDatanodeRequest,
    ) -> Done<wire::GetAdditionalDatanodeResponse> {
        let block = self.block(&request.blk)?;
        let mut located = convert::bare_block(request.blk.clone());
        let mut present = ids(&request.existings);
        for (at, node) in request.existings.iter().enumerate() {
            located.storage_types.push(wire::StorageKind::StorageDisk as i32);
            located.storage_ids.push(request.existing_storage_uuids.get(at).cloned().unwrap_or_default());
            located.is_cached.push(false);
            located.locs.push(node.clone());
        }
        for _ in 0..request.num_additional_nodes.min(MAX_NODES) {
            let ask = pb::AddPipelineNodeRequest {
                inode: request.file_id(),
                client_name: request.client_name.clone(),
                block: Some(block.clone()),
                present_nodes: present.clone(),
                exclude_nodes: ids(&request.excludes),
            };
            let answer: pb::AddPipelineNodeResponse = self.ask(ask).await.map_err(as_io)?;
            let Some(node) = answer.node else { break };
            present.push(node.node_id.clone());
            convert::push_replica(&mut located, &node);
        }
        Ok(wire::GetAdditionalDatanodeResponse { block: located })
    }

    pub(super) async fn new_generation(
        &self,
        request: wire::UpdateBlockForPipelineRequest,
    ) -> Done<wire::UpdateBlockForPipelineResponse> {
        let block = Some(self.block(&request.block)?);
        // The block tells the file.
        let ask = pb::NewGenerationRequest { call: None, inode: 0, client_name: request.client_name, block };
        let answer: pb::NewGenerationResponse = self.ask(ask).await.map_err(as_io)?;
        let renewed = wire::ExtendedBlock { generation_stamp: answer.generation, ..request.block };
        Ok(wire::UpdateBlockForPipelineResponse { block: convert::bare_block(renewed) })
    }

    pub(super) async fn update_pipeline(&self, request: wire::UpdatePipelineRequest) -> Done<()> {
        let (old, new) = (self.block(&request.old_block)?, self.block(&request.new_block)?);
        if old.id != new.id {
            return Err(io_exception(format!("block {} cannot become block {}", old.id, new.id)));
        }
        let storage = |at: usize| request.storage_ids.get(at).cloned().unwrap_or_default();
        let nodes = request.new_nodes.iter().enumerate();
        let nodes =
            nodes.map(|(at, node)| pb::PipelineNode { node_id: node.datanode_uuid.clone(), storage_id: storage(at) });
        let update = pb::UpdatePipelineRequest {
            call: self.context(),
            inode: 0,
            client_name: request.client_name.clone(),
            block: Some(old),
            new_generation: new.generation,
            nodes: nodes.collect(),
        };
        let _: pb::UpdatePipelineResponse = self.ask(update).await.map_err(as_io)?;
        Ok(())
    }

    /// "No" means: not reported by enough datanodes yet, ask again.
    pub(super) async fn complete(&self, request: wire::CompleteRequest) -> Done<wire::BoolResponse> {
        let committed = self.committed(request.last.as_ref())?;
        let inode = self.file(request.file_id(), &request.src).await?;
        let client_name = request.client_name;
        let request = pb::CompleteRequest { call: None, inode, client_name, committed };
        match self.ask::<_, pb::CompleteResponse>(request).await {
            Ok(_) => Ok(wire::BoolResponse { result: true }),
            Err(error) if error.code() == ErrorCode::NotReplicatedYet => Ok(wire::BoolResponse { result: false }),
            Err(error) => Err(as_io(error)),
        }
    }

    /// The block is in the log since it was handed out, and its length is the datanodes' to tell; what the client says of it is
    /// shown in the status of the file.
    pub(super) async fn fsync(&self, request: wire::FsyncRequest) -> Done<()> {
        let inode = self.file(request.file_id(), &request.src).await?;
        let last_block_length = u64::try_from(request.last_block_length()).ok();
        let sync = pb::SyncFileRequest { inode, client_name: request.client, last_block_length };
        let _: pb::SyncFileResponse = self.ask(sync).await.map_err(as_io)?;
        Ok(())
    }

    pub(super) async fn renew_lease(&self, request: wire::RenewLeaseRequest) -> Done<()> {
        let _: pb::RenewLeaseResponse = self.ask(pb::RenewLeaseRequest { client_name: request.client_name }).await?;
        Ok(())
    }

    pub(super) async fn recover_lease(&self, request: wire::RecoverLeaseRequest) -> Done<wire::BoolResponse> {
        let recover = pb::RecoverLeaseRequest { path: request.src, only_of: String::new(), inode: 0 };
        let answer: pb::RecoverLeaseResponse = self.ask(recover).await?;
        Ok(wire::BoolResponse { result: answer.closed })
    }

    /// Readers met bad replicas: their datanodes look for themselves.
    pub(super) async fn report_bad_blocks(&self, request: wire::ReportBadBlocksRequest) -> Done<()> {
        for located in &request.blocks {
            let block = self.block(&located.b)?;
            for (at, node) in located.locs.iter().enumerate() {
                let report = pb::ReportBadReplicaRequest {
                    block: Some(block.clone()),
                    node_id: node.id.datanode_uuid.clone(),
                    storage_id: located.storage_ids.get(at).cloned().unwrap_or_default(),
                    reason: "a Hadoop client could not verify it".into(),
                };
                let _: pb::ReportBadReplicaResponse = self.ask(report).await?;
            }
        }
        Ok(())
    }
}

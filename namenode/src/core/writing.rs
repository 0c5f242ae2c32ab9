//! Operations of a writer on its open file: blocks, generations, completion.

use cairn_proto::ids::TxId;
use cairn_proto::pb::{self, ReplicaState, edit::Kind};
use cairn_proto::{Error, ErrorCode};

use super::blocks::{Promise, StorageIndex};
use super::event::Caller;
use super::nodes::NodeIndex;
use super::permissions::Who;
use super::placement;
use super::recovery::RECOVERY_HOLDER;
use super::{Carries, Core, Turn};

/// How an operation ended that may have to wait.
pub enum Progress<T> {
    /// The answer.
    Done(T),
    /// Replicas have still to be reported.
    Wait,
}

impl Core {
    /// The file must be open, and the caller must hold its lease: by the client's name, and as the user who took it.
    fn check_lease(&mut self, who: &Who<'_>, file: u64, holder: &str) -> Result<(), Error> {
        self.unsynced.touch(file);
        let expired = |message: String, path: String| Error::new(ErrorCode::LeaseExpired, message).with_subject(path);
        if holder == RECOVERY_HOLDER {
            // Everybody knows this name: whoever could write under it could spoil any file that is being recovered.
            return Err(expired(format!("The client name {RECOVERY_HOLDER} belongs to the namenode"), String::new()));
        }
        let none = format!("Holder {holder} does not have any open files.");
        if !self.tree.is_reachable(file) {
            // The edit that took it away is not known any more.
            self.unsynced.depend(self.last_txid);
            let message = format!("No lease on inode {file}: File does not exist. {none}");
            return Err(expired(message, String::new()));
        }
        let lease = self.leases.get(file);
        if let Some(lease) = lease.filter(|lease| *lease.holder == *holder) {
            // Names of clients are no secret: they are in error messages and logs.
            let user = &who.caller.user;
            if !who.superuser && !lease.user.is_empty() && *lease.user != **user {
                let message = format!("User {user} does not hold the lease of inode {file}: another user took it");
                return Err(Error::new(ErrorCode::PermissionDenied, message).with_subject(user));
            }
            self.leases.renew(holder, self.now_ms);
            return Ok(());
        }
        let owner = lease.map(|lease| &*lease.holder);
        let path = self.tree.path_of(file);
        let message = match owner {
            None => format!("No lease on {path} (inode {file}): File is not open for writing. {none}"),
            Some(owner) => format!("Client {holder} is not the lease owner of {path} (inode {file}): {owner} is."),
        };
        Err(expired(message, path))
    }

    fn invalid(&self, file: u64, message: String) -> Error {
        Error::new(ErrorCode::InvalidArgument, message).with_subject(self.tree.path_of(file))
    }

    /// The block of a request, if it belongs to the file.
    fn own_block(&self, file: u64, block: Option<&pb::Block>) -> Result<u64, Error> {
        let Some(block) = block else { return Err(self.invalid(file, "The request names no block".into())) };
        let id = block.id as u64;
        self.unsynced.touch(id);
        match self.blocks.get(id) {
            Some(known) if known.inode == file => Ok(id),
            _ => Err(Error::new(ErrorCode::BlockNotFound, format!("Block {id} does not belong to this file"))
                .with_subject(id.to_string())),
        }
    }

    /// The file that a request names, or whose block it names.
    fn file_of(&self, inode: u64, block: Option<&pb::Block>) -> u64 {
        let known = || block.and_then(|block| self.blocks.get(block.id as u64)).map_or(0, |block| block.inode);
        if inode == 0 { known() } else { inode }
    }

    /// Which block of the file a request asks for, counted from 0.
    fn asked_index(&self, request: &pb::AddBlockRequest, blocks: &[u64]) -> Result<usize, Error> {
        if !request.by_previous {
            return Ok(request.block_index as usize);
        }
        let Some(previous) = &request.previous else { return Ok(self.first_written(request.inode)) };
        match blocks.iter().rposition(|id| *id == previous.id as u64) {
            Some(at) => Ok(at + 1),
            None => Err(self.invalid(request.inode, format!("The previous block {} is not of this file", previous.id))),
        }
    }

    /// Checks what the writer says of its finished blocks; returns those whose length was not known.
    fn new_lengths(&self, file: u64, committed: &[pb::CommittedBlock]) -> Result<Vec<pb::EditBlockLength>, Error> {
        let most = self.tree.get(file).map_or(0, super::inode::Inode::block_size);
        let mut fresh: Vec<pb::EditBlockLength> = Vec::new();
        for entry in committed {
            let id = self.own_block(file, entry.block.as_ref())?;
            let Some(block) = self.blocks.get(id) else { continue };
            let generation = entry.block.as_ref().map_or(0, |block| block.generation);
            if generation != block.generation {
                let message = format!("Block {id} has generation {}, not {generation}", block.generation);
                return Err(Error::new(ErrorCode::StaleGeneration, message).with_subject(id.to_string()));
            }
            match block.length() {
                Some(length) if length != entry.length => {
                    let message = format!("Block {id} was committed with {length} bytes, not {}", entry.length);
                    return Err(self.invalid(file, message));
                }
                Some(_) => {}
                None if entry.length > most => {
                    return Err(
                        self.invalid(file, format!("Block {id} cannot have {} bytes of at most {most}", entry.length))
                    );
                }
                None if fresh.iter().any(|other| other.block_id as u64 == id) => {}
                None => fresh.push(pb::EditBlockLength { block_id: id as i64, generation, length: entry.length }),
            }
        }
        Ok(fresh)
    }

    fn commit_lengths(
        &mut self,
        turn: &mut Turn<'_>,
        file: u64,
        blocks: Vec<pb::EditBlockLength>,
    ) -> Result<(), Error> {
        if blocks.is_empty() {
            return Ok(());
        }
        let edit = pb::EditCommitBlocks { inode: file, blocks };
        self.commit(turn, Carries::Nothing, Kind::CommitBlocks(edit)).map(|_| ())
    }

    /// How many blocks the file had when its writer opened it: whoever appends does not wait for what others wrote.
    fn first_written(&self, file: u64) -> usize {
        self.leases.get(file).map_or(0, |lease| lease.first_block as usize)
    }

    /// Whether enough whole replicas of a block were reported. `length` is the one about to be committed.
    fn is_written(&self, id: u64, length: Option<u64>) -> bool {
        let Some(block) = self.blocks.get(id) else { return true };
        let wanted = self.settings.min_replication as usize;
        match (block.length(), length) {
            (Some(_), _) => block.replicas.as_slice().iter().filter(|at| self.nodes.is_live(**at)).count() >= wanted,
            (None, None) => false,
            (None, Some(length)) => self.blocks.open.get(&id).is_some_and(|open| {
                let whole = open.seen.iter().filter(|seen| {
                    seen.state == ReplicaState::Finalized
                        && (seen.generation, seen.length) == (block.generation, length)
                        && self.nodes.is_live(seen.storage)
                });
                whole.count() >= wanted
            }),
        }
    }

    pub(super) fn add_block(
        &mut self,
        turn: &mut Turn<'_>,
        who: &Who<'_>,
        request: &pb::AddBlockRequest,
    ) -> Result<Progress<pb::AddBlockResponse>, Error> {
        let (caller, file) = (who.caller, request.inode);
        let path = self.tree.path_of(file);
        self.check_not_safemode("add block to", &path)?;
        self.check_lease(who, file, &request.client_name)?;
        let fresh = self.new_lengths(file, &request.committed)?;
        let blocks = self.tree.get(file).map(|inode| inode.blocks().to_vec()).unwrap_or_default();
        let index = self.asked_index(request, &blocks)?;
        // Only blocks at the end may be open, also after this call.
        let said = |id: u64| fresh.iter().any(|entry| entry.block_id as u64 == id);
        let stays_open = |id: u64| self.blocks.open.contains_key(&id) && !said(id);
        if let Some(pair) = blocks.windows(2).find(|pair| said(pair[1]) && stays_open(pair[0])) {
            let message = format!("Block {} of {path} must be committed before block {}", pair[0], pair[1]);
            return Err(self.invalid(file, message));
        }
        if index > blocks.len() || index + 1 < blocks.len() {
            return Err(self.invalid(file, format!("{path} has {} blocks; block {index} cannot be next", blocks.len())));
        }
        if index >= 2 {
            let earlier = blocks[index - 2];
            if stays_open(earlier) {
                let message = format!("Block {earlier} of {path} must be committed before block {index} is added");
                return Err(self.invalid(file, message));
            }
        }
        self.commit_lengths(turn, file, fresh)?;
        if index >= 2 + self.first_written(file) && !self.is_written(blocks[index - 2], None) {
            return Ok(Progress::Wait);
        }
        if let Some(id) = blocks.get(index) {
            return self.repeat_block(turn, caller, request, *id).map(Progress::Done);
        }
        let storages = self.place_block(turn, caller, request, &path)?;
        let id = self.counters.block + 1;
        let generation = self.counters.generation + 1;
        let edit = pb::EditAddBlock { inode: file, block_id: id as i64, generation, index: index as u32 };
        self.commit(turn, Carries::Answer, Kind::AddBlock(edit))?;
        self.open_pipeline(id, storages);
        Ok(Progress::Done(self.block_answer(turn, caller, file, id)))
    }

    /// The writer asks again for a block that it was given.
    fn repeat_block(
        &mut self,
        turn: &mut Turn<'_>,
        caller: &Caller,
        request: &pb::AddBlockRequest,
        id: u64,
    ) -> Result<pb::AddBlockResponse, Error> {
        self.unsynced.touch(id);
        match self.blocks.open.get(&id) {
            None => Err(self.invalid(request.inode, format!("Block {id} is finished already"))),
            Some(open) if open.expected.is_empty() && open.seen.is_empty() => {
                // The namenode was restarted in between and has forgotten the pipeline.
                let path = self.tree.path_of(request.inode);
                let storages = self.place_block(turn, caller, request, &path)?;
                self.open_pipeline(id, storages);
                Ok(self.block_answer(turn, caller, request.inode, id))
            }
            Some(_) => Ok(self.block_answer(turn, caller, request.inode, id)),
        }
    }

    /// HDFS's `fsync`. What the writer says of its block is for the status of the file alone: readers ask the datanodes.
    pub(super) fn sync_file(
        &mut self,
        who: &Who<'_>,
        request: &pb::SyncFileRequest,
    ) -> Result<pb::SyncFileResponse, Error> {
        self.check_lease(who, request.inode, &request.client_name)?;
        let inode = self.tree.get(request.inode);
        let last = inode.and_then(|inode| Some((*inode.blocks().last()?, inode.block_size())));
        if let (Some(length), Some((id, most))) = (request.last_block_length, last) {
            if length > most {
                return Err(
                    self.invalid(request.inode, format!("Block {id} cannot have {length} bytes of at most {most}"))
                );
            }
            if let Some(open) = self.blocks.open.get_mut(&id) {
                open.said = open.said.max(length);
            }
        }
        Ok(pb::SyncFileResponse {})
    }

    /// The answer names the pipeline in its order, not by distance.
    fn block_answer(&self, turn: &mut Turn<'_>, caller: &Caller, file: u64, id: u64) -> pb::AddBlockResponse {
        let blocks = self.tree.get(file).map_or(&[][..], super::inode::Inode::blocks);
        let before = blocks.iter().take_while(|other| **other != id);
        let offset = before.filter_map(|id| self.blocks.get(*id)).filter_map(super::blocks::Block::length).sum();
        let place = self.place_of(&caller.host);
        let mut block = self.located_block(id, offset, &place, &mut turn.random);
        let expected = self.blocks.open.get(&id).map_or(&[][..], |open| &open.expected);
        if let (Some(block), false) = (&mut block, expected.is_empty()) {
            let replica = |storage: &StorageIndex| self.nodes.replica(*storage, ReplicaState::BeingWritten);
            block.replicas = expected.iter().map(replica).collect();
        }
        pb::AddBlockResponse { block }
    }

    fn place_block(
        &mut self,
        turn: &mut Turn<'_>,
        caller: &Caller,
        request: &pb::AddBlockRequest,
        path: &str,
    ) -> Result<Vec<StorageIndex>, Error> {
        let inode = self.tree.get(request.inode);
        let (count, size) = inode.map_or((1, 0), |inode| (usize::from(inode.replication), inode.block_size()));
        let excluded: Vec<NodeIndex> = request.exclude_nodes.iter().filter_map(|id| self.nodes.find(id)).collect();
        let local = self.local_node(turn, caller, &request.local_node);
        let favored: Vec<NodeIndex> =
            request.favored_nodes.iter().filter_map(|name| self.nodes.find_by_name(name)).collect();
        let wanted = placement::Request {
            count,
            size: size.saturating_mul(self.settings.min_free_blocks),
            present: &[],
            excluded: &excluded,
            favored: &favored,
            local,
            fresh_since_ms: self.now_ms.saturating_sub(self.settings.stale_interval_ms),
            repair_cap: None,
        };
        let least = self.settings.min_replication as usize;
        let mut storages = placement::choose(&self.nodes, &wanted, &mut turn.random);
        if storages.len() < least && wanted.fresh_since_ms > 0 {
            // Nodes that were silent for a moment are better than a write that fails.
            let fresh: Vec<NodeIndex> = storages.iter().map(|storage| self.nodes.storage(*storage).node).collect();
            let others = placement::Request {
                count: count.saturating_sub(fresh.len()),
                present: &fresh,
                fresh_since_ms: 0,
                ..wanted
            };
            storages.extend(placement::choose(&self.nodes, &others, &mut turn.random));
        }
        if storages.len() < least {
            let running = self.nodes.nodes.iter().filter(|node| node.alive).count();
            let message = format!(
                "File {path} could only be replicated to {} nodes instead of minReplication (={}). There are {running} \
                 datanode(s) running and {} node(s) are excluded in this operation.",
                storages.len(),
                self.settings.min_replication,
                excluded.len(),
            );
            // Right after a start the known datanodes are on their way back: the writer asks again.
            let code = if self.repair.settled() { ErrorCode::NoTargets } else { ErrorCode::Busy };
            return Err(Error::new(code, message).with_subject(path));
        }
        placement::order_pipeline(&self.nodes, &mut storages);
        // The answer names nodes whose registration may not be durable yet.
        for storage in &storages {
            self.depend_on_node(self.nodes.storage(*storage).node);
        }
        Ok(storages)
    }

    /// A reply that names a node depends on the edit that registered it.
    pub(super) fn depend_on_node(&self, node: NodeIndex) {
        self.unsynced.depend(self.unsynced_registration(node));
    }

    fn unsynced_registration(&self, node: NodeIndex) -> TxId {
        let txid = self.nodes.node(node).registered_by;
        if txid > self.unsynced.durable() { txid } else { TxId(0) }
    }

    fn local_node(&self, turn: &mut Turn<'_>, caller: &Caller, named: &str) -> Option<NodeIndex> {
        if let Some(node) = self.nodes.find(named) {
            return Some(node);
        }
        if caller.host.is_empty() {
            return None;
        }
        let on_host = |node: &&super::nodes::Node| node.alive && node.ip() == caller.host;
        let count = self.nodes.nodes.iter().filter(on_host).count() as u64;
        let pick = turn.random.below(count);
        let found = self.nodes.nodes.iter().filter(on_host).nth(pick as usize)?;
        self.nodes.find(&found.id)
    }

    /// These storages are about to get the block.
    fn open_pipeline(&mut self, id: u64, storages: Vec<StorageIndex>) {
        let size =
            self.blocks.get(id).and_then(|block| self.tree.get(block.inode)).map_or(0, |inode| inode.block_size());
        let before = self.blocks.open.get_mut(&id).map(|open| std::mem::take(&mut open.promises));
        self.take_back(&before.unwrap_or_default(), 0);
        let mut promises = Vec::with_capacity(storages.len());
        for storage in &storages {
            let entry = self.nodes.storage_mut(*storage);
            entry.promised = entry.promised.saturating_add(size);
            promises.push(Promise { storage: *storage, told: entry.told, bytes: size });
            let node = entry.node;
            self.nodes.node_mut(node).assigned += 1;
        }
        if let Some(open) = self.blocks.open.get_mut(&id) {
            open.expected = storages;
            open.promises = promises;
        }
    }

    /// A block has no more than so many bytes: what its writer was promised beyond them is free. Else many short files that are written within one
    /// heartbeat would fill the disks with promises.
    pub(super) fn take_back(&mut self, promises: &[Promise], length: u64) {
        for promise in promises {
            let entry = self.nodes.storage_mut(promise.storage);
            if entry.told == promise.told {
                entry.promised = entry.promised.saturating_sub(promise.bytes.saturating_sub(length));
            }
        }
    }

    pub(super) fn abandon_block(
        &mut self,
        turn: &mut Turn<'_>,
        who: &Who<'_>,
        request: &pb::AbandonBlockRequest,
    ) -> Result<pb::AbandonBlockResponse, Error> {
        let file = self.file_of(request.inode, request.block.as_ref());
        self.check_not_safemode("abandon block of", &self.tree.path_of(file))?;
        self.check_lease(who, file, &request.client_name)?;
        let id = request.block.as_ref().map_or(0, |block| block.id as u64);
        let blocks = self.tree.get(file).map_or(&[][..], super::inode::Inode::blocks);
        if !blocks.contains(&id) {
            // Abandoned before.
            return Ok(pb::AbandonBlockResponse {});
        }
        if blocks.last() != Some(&id) || !self.blocks.open.contains_key(&id) {
            return Err(
                self.invalid(file, format!("Block {id} cannot be abandoned: it is finished or not the last one"))
            );
        }
        let edit = pb::EditAbandonBlock { inode: file, block_id: id as i64 };
        self.commit(turn, Carries::Answer, Kind::AbandonBlock(edit))?;
        Ok(pb::AbandonBlockResponse {})
    }

    /// A file and its open block, for a pipeline that broke.
    pub(super) fn broken_block(
        &mut self,
        who: &Who<'_>,
        inode: u64,
        holder: &str,
        block: Option<&pb::Block>,
    ) -> Result<(u64, u64), Error> {
        let file = self.file_of(inode, block);
        self.check_not_safemode("recover a pipeline of", &self.tree.path_of(file))?;
        self.check_lease(who, file, holder)?;
        let id = self.own_block(file, block)?;
        if !self.blocks.open.contains_key(&id) {
            return Err(self.invalid(file, format!("Block {id} is finished: it takes no new generation")));
        }
        Ok((file, id))
    }

    pub(super) fn new_generation(
        &mut self,
        turn: &mut Turn<'_>,
        who: &Who<'_>,
        request: &pb::NewGenerationRequest,
    ) -> Result<pb::NewGenerationResponse, Error> {
        let (file, id) = self.broken_block(who, request.inode, &request.client_name, request.block.as_ref())?;
        let generation = self.counters.generation + 1;
        let edit = pb::EditAllocateGeneration { inode: file, block_id: id as i64, generation, finished: false };
        self.commit(turn, Carries::Answer, Kind::AllocateGeneration(edit))?;
        Ok(pb::NewGenerationResponse { generation, token: bytes::Bytes::new() })
    }

    pub(super) fn update_pipeline(
        &mut self,
        turn: &mut Turn<'_>,
        who: &Who<'_>,
        request: &pb::UpdatePipelineRequest,
    ) -> Result<pb::UpdatePipelineResponse, Error> {
        let (file, id) = self.broken_block(who, request.inode, &request.client_name, request.block.as_ref())?;
        let generation = request.new_generation;
        let now = self.blocks.get(id).map_or(0, |block| block.generation);
        let storages = self.pipeline_storages(file, id, &request.nodes)?;
        if now != generation {
            let said = request.block.as_ref().map_or(0, |block| block.generation);
            if said != now || generation <= now || generation > self.counters.generation {
                let message = format!("Block {id} has generation {now}: it cannot go from {said} to {generation}");
                return Err(Error::new(ErrorCode::StaleGeneration, message).with_subject(id.to_string()));
            }
            let edit = pb::EditUpdateBlock { inode: file, block_id: id as i64, generation, length: 0 };
            self.commit(turn, Carries::Answer, Kind::UpdateBlock(edit))?;
        }
        if let Some(open) = self.blocks.open.get_mut(&id) {
            open.expected = storages;
        }
        Ok(pb::UpdatePipelineResponse {})
    }

    fn pipeline_storages(&self, file: u64, id: u64, nodes: &[pb::PipelineNode]) -> Result<Vec<StorageIndex>, Error> {
        let before = self.blocks.open.get(&id).map_or(&[][..], |open| &open.expected);
        let mut storages = Vec::new();
        for entry in nodes {
            let node = self.nodes.find(&entry.node_id);
            let named = self.nodes.find_storage(&entry.storage_id);
            let on_node = |storage: &StorageIndex| Some(self.nodes.storage(*storage).node) == node;
            let known = node.and_then(|node| self.nodes.node(node).storages.first().copied());
            let found = named.filter(on_node).or_else(|| before.iter().copied().find(on_node)).or(known);
            match found {
                Some(storage) => storages.push(storage),
                None => return Err(self.invalid(file, format!("There is no datanode {}", entry.node_id))),
            }
        }
        if storages.is_empty() {
            return Err(self.invalid(file, "The new pipeline is empty".into()));
        }
        Ok(storages)
    }

    pub(super) fn complete(
        &mut self,
        turn: &mut Turn<'_>,
        who: &Who<'_>,
        request: &pb::CompleteRequest,
    ) -> Result<Progress<pb::CompleteResponse>, Error> {
        let file = request.inode;
        let path = self.tree.path_of(file);
        self.check_not_safemode("complete file", &path)?;
        if self.is_closed_as_said(file, &request.committed) {
            return Ok(Progress::Done(pb::CompleteResponse { status: self.status(file, &path) }));
        }
        self.check_lease(who, file, &request.client_name)?;
        let fresh = self.new_lengths(file, &request.committed)?;
        let blocks = self.tree.get(file).map_or(&[][..], super::inode::Inode::blocks);
        let length_of = |id: u64| fresh.iter().find(|entry| entry.block_id as u64 == id).map(|entry| entry.length);
        if let Some(id) = blocks.iter().find(|id| self.blocks.open.contains_key(*id) && length_of(**id).is_none()) {
            return Err(
                self.invalid(file, format!("{path} cannot be completed: the length of block {id} was not said"))
            );
        }
        let written = blocks.get(self.first_written(file)..).unwrap_or_default();
        if !written.iter().all(|id| self.is_written(*id, length_of(*id))) {
            // The lengths are logged now, so that reported replicas are compared with them while the call waits.
            self.commit_lengths(turn, file, fresh)?;
            return Ok(Progress::Wait);
        }
        let edit = pb::EditClose { inode: file, blocks: fresh };
        self.commit(turn, Carries::Answer, Kind::Close(edit))?;
        Ok(Progress::Done(pb::CompleteResponse { status: self.status(file, &path) }))
    }

    /// A repeated `complete` whose first answer was lost.
    fn is_closed_as_said(&self, file: u64, committed: &[pb::CommittedBlock]) -> bool {
        let Some(inode) = self.tree.get(file).filter(|inode| !inode.is_directory() && !inode.is_open()) else {
            return false;
        };
        self.tree.is_reachable(file)
            && committed.iter().all(|entry| {
                let said = entry.block.as_ref().map_or((0, 0), |block| (block.id as u64, block.generation));
                let known = self.blocks.get(said.0);
                inode.blocks().contains(&said.0)
                    && known.is_some_and(|block| (block.generation, block.length()) == (said.1, Some(entry.length)))
            })
    }
}

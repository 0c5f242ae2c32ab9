//! What writers do to the files that they opened.

use std::collections::BTreeSet;

use super::super::*;
use super::driver::{Driver, Handle, NODES, SOFT_MS, Written, client_response};
use super::{File, ModelBlock};

impl Driver {
    pub fn create(&mut self, user: &'static str, path: &str, overwrite: bool, writer: &str) -> bool {
        let there = self.model.entries.get(path).map_or(0, |entry| entry.inode);
        let open = self.model.entries.get(path).and_then(|entry| entry.file.as_ref()?.writer.clone());
        let expected = !self.in_safe_mode() && self.model.create(user, path, overwrite, 2, writer);
        let call = self.context(user);
        let request = pb::CreateRequest {
            call,
            path: path.into(),
            permission: 0o644,
            overwrite,
            replication: 2,
            create_parents: true,
            client_name: writer.into(),
            ..Default::default()
        };
        let edits = self.world.log.len();
        let result = self.call(user, request.into());
        assert_eq!(result.is_ok(), expected, "create {path} by {user}: {result:?}");
        if let Some(holder) = open.filter(|_| !expected) {
            let renewed = self.renewed.get(&holder).copied().unwrap_or(0);
            if renewed + SOFT_MS < self.world.core.now_ms && holder != writer {
                self.taken.insert(there);
            }
        }
        let Ok(ClientResponse::Create(response)) = result else {
            assert!(self.world.log.len() == edits || self.taken.contains(&there), "a refused create left an edit");
            return false;
        };
        self.renew(writer);
        let inode = response.status.unwrap().inode;
        self.learn();
        self.handles.push(Handle { inode, user, writer: writer.to_owned(), blocks: Vec::new() });
        true
    }

    pub fn append(&mut self, user: &'static str, path: &str, writer: &str) {
        let open = self.model.entries.get(path).and_then(|entry| entry.file.as_ref()?.writer.clone());
        if let Some(holder) = open {
            let renewed = self.renewed.get(&holder).copied().unwrap_or(0);
            if holder != writer && renewed + SOFT_MS < self.world.core.now_ms {
                return; // it may be taken from its writer just now
            }
        }
        let expected = !self.in_safe_mode() && self.model.may_write(user, path);
        let call = self.context(user);
        let edits = self.world.log.len();
        let request = pb::AppendRequest { call, path: path.into(), client_name: writer.into() };
        let result = self.call(user, request.into());
        assert_eq!(result.is_ok(), expected, "append to {path} by {user}: {result:?}");
        let Ok(ClientResponse::Append(response)) = result else {
            assert_eq!(self.world.log.len(), edits, "a refused append left an edit");
            return;
        };
        self.renew(writer);
        let inode = response.status.unwrap().inode;
        let generation = |id: u64| self.world.core.blocks.get(id).unwrap().generation;
        let known = |block: &ModelBlock| Written {
            id: block.id,
            generation: generation(block.id),
            length: block.length.unwrap(),
            nodes: Vec::new(),
        };
        let file = self.model.by_inode(inode).and_then(|entry| entry.file.as_mut()).unwrap();
        file.writer = Some(writer.to_owned());
        assert_eq!(file.blocks.len(), response.blocks as usize);
        let blocks = file.blocks.iter().map(known).collect();
        self.handles.retain(|handle| handle.inode != inode);
        self.handles.push(Handle { inode, user, writer: writer.to_owned(), blocks });
    }

    /// The file of a handle, if its writer still has it open.
    fn open_file(&mut self, handle: &Handle) -> Option<&mut File> {
        let file = self.model.by_inode(handle.inode)?.file.as_mut()?;
        if file.writer.as_deref() == Some(&*handle.writer) { Some(file) } else { None }
    }

    /// A writer's call ended: it must work if and only if the lease is its own. `true`: it worked.
    fn settle<T>(&mut self, handle: &Handle, result: &Result<T, Error>, allowed: &[ErrorCode]) -> bool {
        self.adopt();
        let own = self.open_file(handle).is_some();
        match result {
            Ok(_) => assert!(own, "a writer without a lease changed its file"),
            Err(error) if error.code() == ErrorCode::LeaseExpired => assert!(!own, "{error}"),
            Err(error) => assert!(error.code() == ErrorCode::SafeMode || allowed.contains(&error.code()), "{error}"),
        }
        if own && !result.as_ref().is_err_and(|error| error.code() == ErrorCode::SafeMode) {
            self.renew(&handle.writer.clone());
        }
        self.take_lengths(handle);
        result.is_ok()
    }

    /// Lengths that the writer has said and the core has taken.
    fn take_lengths(&mut self, handle: &Handle) {
        let Some(file) = self.model.by_inode(handle.inode).and_then(|entry| entry.file.as_mut()) else { return };
        for block in file.blocks.iter_mut().filter(|block| block.length.is_none()) {
            let length = self.world.core.blocks.get(block.id).and_then(blocks::Block::length);
            let said = handle.blocks.iter().find(|written| written.id == block.id).map(|written| written.length);
            if length.is_some() {
                assert_eq!(length, said, "block {} has a length that its writer has not said", block.id);
                block.length = length;
            }
        }
    }

    fn committed(handle: &Handle) -> Vec<pb::CommittedBlock> {
        let all: Vec<(u64, u64, u64)> =
            handle.blocks.iter().map(|block| (block.id, block.generation, block.length)).collect();
        commits(&all)
    }

    /// The datanode gets the block whole and says so.
    fn put_replica(&mut self, at: usize, written: &Written) -> bool {
        let up = self.world.nodes[at].up;
        if up {
            let held = (written.generation, written.length, pb::ReplicaState::Finalized);
            self.world.hold(at, written.id, held);
        }
        up
    }

    pub fn add_block(&mut self, file: usize, copies: u8, length: u64) {
        if self.handles.is_empty() {
            return;
        }
        let at = file % self.handles.len();
        let handle = self.handles[at].clone();
        let call = self.context(handle.user);
        let request = pb::AddBlockRequest {
            call,
            inode: handle.inode,
            client_name: handle.writer.clone(),
            block_index: handle.blocks.len() as u32,
            committed: Self::committed(&handle),
            ..Default::default()
        };
        let result = self.call(handle.user, request.into());
        let allowed = [ErrorCode::NoTargets, ErrorCode::Busy, ErrorCode::NotReplicatedYet];
        if !self.settle(&handle, &result, &allowed) {
            return;
        }
        let Ok(ClientResponse::AddBlock(response)) = result else { panic!("another answer") };
        let located = response.block.unwrap();
        let block = located.block.unwrap();
        let nodes: Vec<usize> = located.replicas.iter().map(|replica| self.world.at(&replica.node_id)).collect();
        let mut written = Written { id: block.id as u64, generation: block.generation, length, nodes };
        assert_eq!(written.nodes.iter().collect::<BTreeSet<_>>().len(), written.nodes.len(), "a node twice");
        let file = self.open_file(&handle).unwrap();
        file.blocks.push(ModelBlock { id: written.id, length: None });
        let targets: Vec<usize> = written.nodes.iter().copied().take(copies.into()).collect();
        written.nodes = targets.into_iter().filter(|node| self.put_replica(*node, &written)).collect();
        if written.nodes.is_empty() {
            // A writer that says the length of a block that it never wrote.
            self.harmed.insert(written.id);
        }
        self.handles[at].blocks.push(written);
    }

    pub fn abandon(&mut self, file: usize) {
        let Some((at, handle, last)) = self.with_last_block(file) else { return };
        let call = self.context(handle.user);
        let request = pb::AbandonBlockRequest {
            call,
            inode: handle.inode,
            client_name: handle.writer.clone(),
            block: Some(pb::Block { pool: "pool".into(), id: last.id as i64, generation: last.generation }),
        };
        let result = self.call(handle.user, request.into());
        if self.settle(&handle, &result, &[ErrorCode::InvalidArgument]) {
            self.handles[at].blocks.pop();
            let file = self.open_file(&handle).unwrap();
            assert_eq!(file.blocks.pop().map(|block| (block.id, block.length)), Some((last.id, None)));
        }
    }

    fn with_last_block(&self, file: usize) -> Option<(usize, Handle, Written)> {
        let at = file.checked_rem(self.handles.len())?;
        let handle = self.handles[at].clone();
        let last = handle.blocks.last()?.clone();
        Some((at, handle, last))
    }

    /// The pipeline of the last block goes on with some of its nodes under a new generation.
    pub fn new_pipeline(&mut self, file: usize, keep: u8) {
        let Some((at, handle, mut last)) = self.with_last_block(file) else { return };
        let keeps = |node: &usize| keep >> (node % 8) & 1 == 1 && self.world.nodes[*node].up;
        let nodes: Vec<usize> = last.nodes.iter().copied().filter(keeps).collect();
        if nodes.is_empty() {
            return;
        }
        let block = Some(pb::Block { pool: "pool".into(), id: last.id as i64, generation: last.generation });
        let call = self.context(handle.user);
        let client_name = handle.writer.clone();
        let request = pb::NewGenerationRequest {
            call,
            inode: handle.inode,
            client_name: client_name.clone(),
            block: block.clone(),
        };
        let result = self.call(handle.user, request.into());
        if !self.settle(&handle, &result, &[ErrorCode::InvalidArgument]) {
            return;
        }
        let Ok(ClientResponse::NewGeneration(response)) = result else { panic!("another answer") };
        last.generation = response.generation;
        // A writer that is cut short here leaves replicas that only a recovery can bring together.
        self.harmed.insert(last.id);
        last.nodes = nodes.into_iter().filter(|node| self.put_replica(*node, &last)).collect();
        let request = pb::UpdatePipelineRequest {
            call: self.context(handle.user),
            inode: handle.inode,
            client_name,
            block,
            new_generation: last.generation,
            nodes: last
                .nodes
                .iter()
                .map(|node| pb::PipelineNode { node_id: format!("n{node}"), storage_id: format!("n{node}-s") })
                .collect(),
        };
        let result = self.call(handle.user, request.into());
        if self.settle(&handle, &result, &[ErrorCode::InvalidArgument]) {
            *self.handles[at].blocks.last_mut().unwrap() = last;
        }
    }

    pub fn complete(&mut self, file: usize, late: bool) {
        if self.handles.is_empty() {
            return;
        }
        let handle = self.handles[file % self.handles.len()].clone();
        let call = self.context(handle.user);
        let request: ClientRequest = pb::CompleteRequest {
            call,
            inode: handle.inode,
            client_name: handle.writer.clone(),
            committed: Self::committed(&handle),
        }
        .into();
        let waits = if late { self.complete_late(&handle, &request) } else { None };
        let result = match waits {
            Some(result) => result,
            None => self.call(handle.user, request),
        };
        self.adopt();
        let closed = |file: &mut File| file.writer.is_none();
        let by_now = self.model.by_inode(handle.inode).and_then(|entry| entry.file.as_mut());
        if result.is_ok() && by_now.is_some_and(closed) {
            return; // closed before, just as it says
        }
        if self.settle(&handle, &result, &[ErrorCode::NotReplicatedYet, ErrorCode::InvalidArgument]) {
            let file = self.open_file(&handle).unwrap();
            file.writer = None;
            assert!(file.blocks.iter().all(|block| block.length.is_some()));
        } else if result.as_ref().is_err_and(|error| error.code() == ErrorCode::InvalidArgument) {
            let file = self.open_file(&handle).unwrap();
            assert_ne!(file.blocks.len(), handle.blocks.len(), "{result:?}");
        }
    }

    /// Sends a completion, and its duplicate, and only then reports the replicas. `None`: it was answered at once.
    fn complete_late(&mut self, handle: &Handle, request: &ClientRequest) -> Option<Result<ClientResponse, Error>> {
        let first = self.world.send(handle.user, request.clone());
        if let Some(result) = self.world.answer(first) {
            return Some(result.map(client_response));
        }
        let twin = self.world.send(handle.user, request.clone());
        assert!(self.world.answer(twin).is_none(), "the duplicate overtakes its twin");
        for written in &handle.blocks {
            for node in 0..NODES {
                if !self.world.nodes[node].held.contains_key(&written.id) {
                    self.put_replica(node, written);
                }
            }
        }
        let (one, two) = (self.wait_for(first), self.wait_for(twin));
        assert_eq!(one, two, "a duplicate gets another answer");
        Some(one.map(client_response))
    }
}

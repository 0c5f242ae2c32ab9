//! What a writer asks of the namenode about its file.

use std::time::Duration;

use cairn_proto::{Error, ErrorCode, Result, pb};
use pb::CommittedBlock;

use super::super::namenode::Patience;
use super::super::{Block, FileStatus, FileSystem, LocatedBlock, Replica};

/// An open file, as its writer and the tasks of its blocks know it.
pub(super) struct OpenFile {
    pub(super) fs: FileSystem,
    pub(super) path: String,
    pub(super) inode: u64,
    pub(super) block_size: u64,
    /// Replicas that the file wants.
    pub(super) replication: usize,
    pub(super) compress: bool,
}

macro_rules! change {
    ($file:expr, $method:ident, $kind:ident { $($field:ident : $value:expr),* $(,)? }) => {{
        let inner = &$file.fs.inner;
        let call = inner.namenode.open_call();
        let client_name = inner.client_name.clone();
        let request = pb::$kind { call: call.context(), inode: $file.inode, client_name, $($field: $value),* };
        inner
            .namenode
            .call(Patience::Writer, request, |mut stub, request| async move { stub.$method(request).await })
            .await
    }};
}

impl OpenFile {
    /// An error that names the file.
    pub(super) fn failed(&self, error: &Error) -> Error {
        Error::new(error.code(), format!("writing {}: {error}", self.path)).with_subject(&self.path)
    }

    /// The next block of the file; waits while the one before the last is not yet reported.
    pub(super) async fn add_block(
        &self,
        index: u32,
        committed: &[CommittedBlock],
        exclude_nodes: &[String],
    ) -> Result<LocatedBlock> {
        let started_ms = self.fs.inner.env.clock.mono_ms();
        loop {
            let answer = change!(
                self,
                add_block,
                AddBlockRequest {
                    committed: committed.to_vec(),
                    exclude_nodes: exclude_nodes.to_vec(),
                    block_index: index,
                    local_node: self.fs.inner.settings.local_node.clone().unwrap_or_default(),
                    by_previous: false,
                    favored_nodes: Vec::new(),
                    previous: None,
                }
            );
            match answer {
                Ok(answer) => {
                    let missing = || Error::new(ErrorCode::Internal, "the namenode's answer holds no block");
                    return answer.block.ok_or_else(missing);
                }
                Err(error) => self.wait_for_reports(error, started_ms).await?,
            }
        }
    }

    pub(super) async fn abandon_block(&self, block: &Block) -> Result<()> {
        change!(self, abandon_block, AbandonBlockRequest { block: Some(block.clone()) }).map(drop)
    }

    /// A new generation for `block`, which fences what its broken pipeline may still write.
    pub(super) async fn new_generation(&self, block: &Block) -> Result<u64> {
        let answer = change!(self, new_generation, NewGenerationRequest { block: Some(block.clone()) })?;
        Ok(answer.generation)
    }

    pub(super) async fn update_pipeline(&self, block: &Block, new_generation: u64, nodes: &[Replica]) -> Result<()> {
        let node = |replica: &Replica| pb::PipelineNode {
            node_id: replica.node_id.clone(),
            storage_id: replica.storage_id.clone(),
        };
        let nodes: Vec<_> = nodes.iter().map(node).collect();
        change!(
            self,
            update_pipeline,
            UpdatePipelineRequest { block: Some(block.clone()), new_generation: new_generation, nodes: nodes }
        )
        .map(drop)
    }

    /// One more node for the pipeline of `block`, beyond the `present` ones; it changes nothing. Also returns how many nodes can hold the block
    /// at all.
    pub(super) async fn add_pipeline_node(
        &self,
        block: &Block,
        present: &[Replica],
        exclude_nodes: Vec<String>,
        patience: Patience,
    ) -> Result<(Option<Replica>, usize)> {
        let request = pb::AddPipelineNodeRequest {
            inode: self.inode,
            client_name: self.fs.inner.client_name.clone(),
            block: Some(block.clone()),
            present_nodes: present.iter().map(|node| node.node_id.clone()).collect(),
            exclude_nodes,
        };
        let send = |mut stub: pb::namenode_client::NamenodeClient<_>, request| async move {
            stub.add_pipeline_node(request).await
        };
        let answer = self.fs.inner.namenode.call(patience, request, send).await?;
        Ok((answer.node, answer.usable_nodes as usize))
    }

    /// Closes the file; waits until its blocks are reported.
    pub(super) async fn complete(&self, committed: &[CommittedBlock]) -> Result<FileStatus> {
        let started_ms = self.fs.inner.env.clock.mono_ms();
        loop {
            match change!(self, complete, CompleteRequest { committed: committed.to_vec() }) {
                Ok(answer) => {
                    let missing = || Error::new(ErrorCode::Internal, "the namenode's answer holds no status");
                    return answer.status.ok_or_else(missing);
                }
                Err(error) => self.wait_for_reports(error, started_ms).await?,
            }
        }
    }

    /// Blocks are finished but not yet reported: the same is asked again as a new call, a little later.
    async fn wait_for_reports(&self, error: Error, started_ms: u64) -> Result<()> {
        let inner = &self.fs.inner;
        let waited_ms = inner.env.clock.mono_ms() - started_ms;
        if error.code() != ErrorCode::NotReplicatedYet || waited_ms > inner.settings.complete_deadline_ms {
            return Err(error);
        }
        inner.env.clock.sleep(Duration::from_millis(100)).await;
        Ok(())
    }
}

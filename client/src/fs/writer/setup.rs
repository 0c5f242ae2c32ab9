//! A block begins: it is asked for, and its pipeline opened.
//!
//! A node that cannot be reached or refuses is left out, and the block given back for another one. A node that is busy is asked again for a
//! moment. When no other node is left, those that failed get another chance until the time for finding nodes is over: a node that restarts must not
//! be lost to a writer that has no other.

use std::time::Duration;

use cairn_proto::{Error, ErrorCode, Result};
use pb::WriteStage;

use super::super::Block;
use super::super::pb;
use super::block::BlockWriter;
use super::link::{Failure, Link, Opening};

/// How long a node that says it is busy is left alone.
pub(super) const BUSY_PAUSE: Duration = Duration::from_millis(200);
/// A node that stays busy for so long when a block begins is left out like one that failed.
const BUSY_MS: u64 = 2_000;
/// Pause before nodes are asked for again when there was none.
pub(super) const NODES_PAUSE: Duration = Duration::from_millis(300);

impl BlockWriter {
    /// Gets a block and opens its pipeline.
    pub(super) async fn set_up(&mut self) -> Result<Link> {
        let started_ms = self.now_ms();
        loop {
            let excluded = self.excluded();
            let located = match self.file.add_block(self.index, &self.committed, &excluded).await {
                Ok(located) => located,
                Err(error) if error.code() == ErrorCode::NoTargets && !self.failures.is_empty() => {
                    if excluded.is_empty() || self.now_ms() - started_ms >= self.settings().replace_deadline_ms {
                        return Err(self.give_up(&error));
                    }
                    self.forgive_ms = self.now_ms() + 1;
                    self.sleep(NODES_PAUSE).await;
                    continue;
                }
                Err(error) => return Err(error),
            };
            self.block = located.block.unwrap_or_default();
            self.token = located.token;
            self.targets = located.replicas;
            match self.open(WriteStage::PipelineSetup, &self.block, 0).await {
                Ok(opened) => return Ok(self.started(opened)),
                Err(failure) => {
                    self.file.abandon_block(&self.block).await?;
                    let busy = failure.error.code() == ErrorCode::Busy && self.now_ms() - started_ms < BUSY_MS;
                    if busy {
                        tracing::debug!(error = %failure.error, "a datanode is busy");
                        self.sleep(BUSY_PAUSE).await;
                    } else {
                        self.refused(failure)?;
                    }
                }
            }
        }
    }

    /// Notes a node that does not take the block; an error once those are too many.
    fn refused(&mut self, failure: Failure) -> Result<()> {
        let node = self.take_out(&failure);
        let known = self.failures.iter().any(|failed| failed.node.node_id == node.node_id);
        self.note(node, failure.error.clone());
        if !known {
            self.troubles += 1;
        }
        if self.troubles > self.settings().pipeline_attempts { Err(self.give_up(&failure.error)) } else { Ok(()) }
    }

    /// Opens a pipeline through the targets; also returns the storages that they chose.
    pub(super) async fn open(
        &self,
        stage: WriteStage,
        block: &Block,
        old_generation: u64,
    ) -> Result<(Link, Vec<String>), Failure> {
        let opening = Opening {
            block: block.clone(),
            stage,
            targets: &self.targets,
            block_size: self.file.block_size,
            keep_length: if stage == WriteStage::PipelineRecovery { self.flow.acked } else { 0 },
            old_generation,
            token: self.token.clone(),
        };
        Link::open(&self.file.fs, opening).await
    }

    /// Notes what an opened pipeline said.
    pub(super) fn started(&mut self, (link, storages): (Link, Vec<String>)) -> Link {
        for (target, storage) in self.targets.iter_mut().zip(storages) {
            target.storage_id = storage;
        }
        self.watch.restart(self.file.fs.inner.env.clock.mono_ms());
        link
    }

    /// All nodes are gone before any byte was acked: the block is given up and all its data goes to another one.
    pub(super) async fn begin_anew(&mut self) -> Result<Link> {
        self.file.abandon_block(&self.block).await?;
        self.flow.all_sealed().await?;
        self.flow.send_again();
        let link = self.set_up().await?;
        self.flow.seal_anew(&self.file, self.block_id()).await;
        Ok(link)
    }

    /// The error of a block that found no nodes, naming all that were tried.
    pub(super) fn give_up(&self, error: &Error) -> Error {
        let name = super::super::datanode::block_name(&self.block);
        let text = format!("{name}: no datanode is left that takes it ({error}); tried {}", self.tried());
        Error::new(error.code(), text).with_subject(self.block.id.to_string())
    }
}

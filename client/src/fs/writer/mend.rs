//! A pipeline that broke, or is too short, is mended.
//!
//! ```text
//!   a node failed ──► left out ──► too few? ask the namenode for another ──► a survivor sends it what was acked
//!                                     │ enough, or there is none                        │
//!                                     ▼                                                 ▼
//!        NewGeneration ──► pipeline through all, keeping what was acked ──► UpdatePipeline ──► send the rest again
//! ```
//!
//! # When another node is looked for
//! As HDFS does by default: with a replication of three or more, when at most half of the nodes are left or readers may have seen data. Also
//! whenever fewer than two are left of a file that wants two. Those are wishes: without a node the write goes on. But `sync` and the end of a block
//! *need* two (or as many as the file wants, or the namenode knows): then nodes are looked for until `replace_deadline_ms` is over, and the write
//! fails naming those tried. The namenode learns which nodes are gone within its stale interval, so a cluster that has become too small goes on.
//!
//! # Consistency
//! The generation comes first: with it the survivor stops its writer and refuses older ones before a byte is copied, and the copy gets it. It is
//! in force only when the namenode agrees to `UpdatePipeline`, after all nodes hold exactly what was acked under it. No data is sent before that. So
//! whatever stops in between, each replica is either known to the namenode's generation, or counts for nothing.
//!
//! # The last survivor
//! Without it what was acked is gone for this writer, so while it may only be away for a moment (a restart), it is asked again until the
//! same deadline.

use cairn_proto::{Error, ErrorCode, Result, pb};
use pb::WriteStage;

use super::super::datanode::{block_name, node_name};
use super::super::namenode::Patience;
use super::super::{Block, Replica};
use super::block::BlockWriter;
use super::link::{self, Failure, Link};
use super::setup::{BUSY_PAUSE, NODES_PAUSE};

/// Durable replicas that `sync` and `close` ask for.
const DURABLE: usize = 2;
/// A pipeline with fewer nodes than wanted is content for so long with what the namenode said.
const CONTENT_MS: u64 = 5_000;
/// A node that failed is not asked for again so soon while the write cannot go on without.
const REST_MS: u64 = 1_500;
/// Nodes tried for a wish.
const WISHES: u32 = 3;

/// A node that failed, why, and when.
pub(super) struct Failed {
    pub(super) node: Replica,
    pub(super) error: Error,
    at_ms: u64,
}

/// A search for one more node.
pub(super) struct Search {
    /// The write cannot go on without.
    must: bool,
    wishes: u32,
    /// When it began; counted from the namenode's first answer.
    since_ms: Option<u64>,
}

impl Search {
    pub(super) fn new(must: bool) -> Self {
        Self { must, wishes: 0, since_ms: None }
    }
}

impl BlockWriter {
    /// Nodes that failed this block and were not forgiven since.
    pub(super) fn excluded(&self) -> Vec<String> {
        let failed = self.failures.iter().filter(|failed| failed.at_ms >= self.forgive_ms);
        failed.map(|failed| failed.node.node_id.clone()).collect()
    }

    /// Each node that failed, with its last error.
    pub(super) fn tried(&self) -> String {
        let tried = self.failures.iter().map(|failed| format!("{}: {}", node_name(&failed.node), failed.error));
        tried.collect::<Vec<_>>().join("; ")
    }

    pub(super) fn note(&mut self, node: Replica, error: Error) {
        let at_ms = self.now_ms();
        let (block, file) = (block_name(&self.block), &self.file.path);
        tracing::warn!(node = %node_name(&node), %error, %block, %file, "left out of a pipeline");
        self.file.fs.inner.datanodes.avoid(&node);
        match self.failures.iter_mut().find(|failed| failed.node.node_id == node.node_id) {
            Some(failed) => (failed.error, failed.at_ms) = (error, at_ms),
            None => self.failures.push(Failed { node, error, at_ms }),
        }
    }

    /// Takes the failed node out of the pipeline.
    pub(super) fn take_out(&mut self, failure: &Failure) -> Replica {
        let index = failure.index.min(self.targets.len().saturating_sub(1));
        if index < self.targets.len() { self.targets.remove(index) } else { Replica::default() }
    }

    /// Leaves the failed node out, unless it is the last and may come back; an error once there is no way on.
    async fn blame(&mut self, mut failure: Failure) -> Result<()> {
        if failure.error.code() == ErrorCode::Corrupt {
            // Whoever receives damaged bytes says so; if that happens to one after the other, the one above them sends them.
            if self.damaged && failure.index > 0 {
                failure.index -= 1;
            }
            self.damaged = true;
        }
        let code = failure.error.code();
        let away = matches!(code, ErrorCode::Unreachable | ErrorCode::TimedOut | ErrorCode::Busy);
        if self.targets.len() == 1 && self.flow.acked > 0 && away && self.may_come_back() {
            let node = self.targets[0].clone();
            tracing::warn!(node = %node_name(&node), error = %failure.error, "the last node of a pipeline is asked again");
            self.sleep(NODES_PAUSE).await;
            return Ok(());
        }
        let node = self.take_out(&failure);
        self.note(node, failure.error.clone());
        self.troubles += 1;
        let too_often = self.troubles > self.settings().pipeline_attempts;
        if too_often || (self.targets.is_empty() && self.flow.acked > 0) {
            return Err(self.give_up(&failure.error));
        }
        Ok(())
    }

    /// The last node has not failed for too long yet. Failures count together while nothing new is acked between them, also if the pipeline could be
    /// opened in between; those that lie far apart (a writer with nothing to write) do not.
    fn may_come_back(&mut self) -> bool {
        let (now_ms, apart_ms) = (self.now_ms(), self.settings().finish_stall_ms);
        let together = self.alone.filter(|(_, last_ms)| now_ms - last_ms < apart_ms);
        let since_ms = together.map_or(now_ms, |(since_ms, _)| since_ms);
        self.alone = Some((since_ms, now_ms));
        now_ms - since_ms < self.settings().replace_deadline_ms
    }

    /// Nodes that must make data durable before the caller is told so.
    fn least(&self) -> usize {
        DURABLE.min(self.file.replication).max(1)
    }

    /// So many nodes are all that there are, for the moment. A short pipeline of `AddBlock` does not say that: right after its start the namenode
    /// may not have heard of the others yet.
    fn content_with(&mut self, nodes: usize) {
        self.content = Some((nodes, self.now_ms()));
    }

    /// The pipeline has as many nodes as `sync` and the end of a block ask for.
    pub(super) fn is_long_enough(&self) -> bool {
        let nodes = self.targets.len();
        let content = |(enough, at_ms)| nodes >= enough && self.now_ms() - at_ms < CONTENT_MS;
        nodes >= self.least() || self.content.is_some_and(content)
    }

    fn wants_more(&self, search: &Search) -> bool {
        let (nodes, wanted) = (self.targets.len(), self.file.replication);
        if nodes < self.least() {
            return true;
        }
        !search.must && wanted >= 3 && nodes < wanted && (nodes <= wanted / 2 || self.flow.shown)
    }

    /// One more node, or `None`: those that are there are enough, or have to be. An error if the write cannot go on with them.
    pub(super) async fn find_more(&mut self, search: &mut Search) -> Result<Option<Replica>> {
        if !self.wants_more(search) {
            return Ok(None);
        }
        loop {
            let patience = if search.must { Patience::Writer } else { Patience::Once };
            let now_ms = self.now_ms();
            if search.must {
                self.forgive_ms = self.forgive_ms.max(now_ms.saturating_sub(REST_MS));
            }
            let asked = self.file.add_pipeline_node(&self.block, &self.targets, self.excluded(), patience).await;
            let (node, usable) = match asked {
                Ok(answer) => answer,
                // A wish is not worth waiting for; what is wrong shows in the next call.
                Err(error) if !search.must => {
                    tracing::debug!(%error, "no other datanode is asked for");
                    return Ok(None);
                }
                Err(error) => return Err(error),
            };
            let now_ms = self.now_ms();
            let since_ms = *search.since_ms.get_or_insert(now_ms);
            if !search.must {
                search.wishes += 1;
                return Ok(node.filter(|_| search.wishes <= WISHES));
            }
            let needed = self.least().min(usable.max(1));
            if self.targets.len() >= needed {
                self.content_with(needed);
                return Ok(None);
            }
            if now_ms - since_ms >= self.settings().replace_deadline_ms {
                return Err(self.too_few(needed));
            }
            if node.is_some() {
                return Ok(node);
            }
            self.sleep(NODES_PAUSE).await;
        }
    }

    fn too_few(&self, needed: usize) -> Error {
        let code = self.failures.last().map_or(ErrorCode::NoTargets, |failed| failed.error.code());
        let text = format!(
            "{}: {needed} datanodes must hold it durably, its pipeline has {}, and no other one took it within {} ms; tried {}",
            block_name(&self.block),
            self.targets.len(),
            self.settings().replace_deadline_ms,
            self.tried()
        );
        Error::new(code, text).with_subject(self.block.id.to_string())
    }

    /// Goes on after a failure.
    pub(super) async fn mend(&mut self, failure: Failure) -> Result<Link> {
        self.rebuild(Some(failure), None, Search::new(false)).await
    }

    /// Opens the pipeline through the survivors and those that join them.
    pub(super) async fn rebuild(
        &mut self,
        mut failure: Option<Failure>,
        mut joining: Option<Replica>,
        mut search: Search,
    ) -> Result<Link> {
        let started_ms = self.now_ms();
        let patience_ms = self.settings().finish_stall_ms;
        loop {
            if let Some(failure) = failure.take() {
                self.blame(failure).await?;
                if self.targets.is_empty() {
                    return self.begin_anew().await;
                }
            }
            if joining.is_none() {
                joining = self.find_more(&mut search).await?;
            }
            let old_generation = self.block.generation;
            let generation = self.file.new_generation(&self.block).await?;
            let renewed = Block { generation, ..self.block.clone() };
            if let Some(node) = joining.take()
                && let Err(survivor) = self.bring_in(&renewed, node).await
            {
                failure = survivor;
                continue;
            }
            match self.open(WriteStage::PipelineRecovery, &renewed, old_generation).await {
                Ok(opened) => {
                    let link = self.started(opened);
                    self.file.update_pipeline(&self.block, generation, &self.targets).await?;
                    self.block = renewed;
                    self.flow.send_again();
                    return Ok(link);
                }
                // It lives: its older writer is still busy with the disk. The same nodes are asked again, under a newer generation.
                Err(next) if next.error.code() == ErrorCode::Busy && self.now_ms() - started_ms < patience_ms => {
                    tracing::debug!(error = %next.error, "a datanode is busy");
                    self.sleep(BUSY_PAUSE).await;
                }
                Err(next) => failure = Some(next),
            }
        }
    }

    /// Has a survivor send what was acked to a node, which is one of the pipeline then. An error: it is not; with the survivor's failure if it
    /// was that one's.
    async fn bring_in(&mut self, renewed: &Block, node: Replica) -> Result<(), Option<Failure>> {
        if self.flow.acked == 0 {
            // It opens an empty replica with the others.
            self.targets.push(node);
            return Ok(());
        }
        let Some(source) = self.targets.first().cloned() else { return Err(None) };
        let order = pb::TransferBlock {
            block: Some(self.block.clone()),
            new_generation: renewed.generation,
            length: self.flow.acked,
            target: Some(node.clone()),
            block_size: self.file.block_size,
            client_name: self.file.fs.inner.client_name.clone(),
            token: self.token.clone(),
        };
        match link::transfer(&self.file.fs, &source, order).await {
            Ok(()) => {
                let (node_name, block) = (node_name(&node), block_name(renewed));
                tracing::info!(node = %node_name, %block, file = %self.file.path, "joined a pipeline");
                self.targets.push(node);
                Ok(())
            }
            Err((0, error)) if error.code() == ErrorCode::Busy => {
                tracing::debug!(%error, "a datanode is busy");
                self.sleep(BUSY_PAUSE).await;
                Err(None)
            }
            Err((0, error)) => Err(Some(Failure { index: 0, error })),
            Err((_, error)) => {
                self.note(node, error);
                Err(None)
            }
        }
    }
}

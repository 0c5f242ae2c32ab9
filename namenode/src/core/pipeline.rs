//! Pipelines that lost nodes: one more node for them.
//!
//! # Consistency
//! Asking changes nothing, so a repeated call does no harm: the writer says with `UpdatePipeline` which nodes go on, after all of them
//! hold the same bytes under the new generation.

use cairn_proto::pb::{self, ReplicaState};
use cairn_proto::{Error, ErrorCode};

use super::nodes::NodeIndex;
use super::permissions::Who;
use super::placement;
use super::{Core, Turn};

/// Names in one request, at most: a block has at most 512 replicas.
const MAX_NAMES: usize = 4_096;

impl Core {
    /// Places one more replica of an open block beyond those present. The answer says how many nodes there are at all, so that a writer
    /// knows whether to wait for one.
    pub(super) fn add_pipeline_node(
        &mut self,
        turn: &mut Turn<'_>,
        who: &Who<'_>,
        request: &pb::AddPipelineNodeRequest,
    ) -> Result<pb::AddPipelineNodeResponse, Error> {
        if request.present_nodes.len() + request.exclude_nodes.len() > MAX_NAMES {
            let message = format!("the request names more than {MAX_NAMES} datanodes");
            return Err(Error::new(ErrorCode::InvalidArgument, message));
        }
        let (file, _) = self.broken_block(who, request.inode, &request.client_name, request.block.as_ref())?;
        let find =
            |names: &[String]| -> Vec<NodeIndex> { names.iter().filter_map(|name| self.nodes.find(name)).collect() };
        let (present, excluded) = (find(&request.present_nodes), find(&request.exclude_nodes));
        let size = self.tree.get(file).map_or(0, super::inode::Inode::block_size);
        let wanted = placement::Request {
            count: 1,
            size: size.saturating_mul(self.settings.min_free_blocks),
            present: &present,
            excluded: &excluded,
            favored: &[],
            local: None,
            fresh_since_ms: self.now_ms.saturating_sub(self.settings.stale_interval_ms),
            repair_cap: None,
        };
        let usable = placement::usable(&self.nodes, &wanted);
        let chosen = placement::choose(&self.nodes, &wanted, &mut turn.random).first().copied();
        let node = match chosen {
            Some(storage) => {
                self.depend_on_node(self.nodes.storage(storage).node);
                Some(self.nodes.replica(storage, ReplicaState::BeingWritten))
            }
            None if !self.repair.settled() => {
                // Right after a start the known datanodes are on their way back: the writer asks again.
                let message = "datanodes are still expected after the start: ask again";
                return Err(Error::new(ErrorCode::Busy, message));
            }
            None => None,
        };
        Ok(pb::AddPipelineNodeResponse { node, usable_nodes: u32::try_from(usable).unwrap_or(u32::MAX) })
    }
}

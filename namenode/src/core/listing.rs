//! Operations that only read: status, listing, block locations, reports.

use cairn_proto::path::SYSTEM_NAME;
use cairn_proto::pb::{self, ReplicaState};
use cairn_proto::{Error, ErrorCode};

use super::attributes::not_found;
use super::blocks::StorageIndex;
use super::codec::Random;
use super::inode::Inode;
use super::nodes::{Node, rack_distance};
use super::permissions::{EXECUTE, READ, WRITE, Who, not_a_directory};
use super::tree::ROOT;
use super::{Core, Turn};

/// Access times move at most this often: each move is an edit.
const ACCESS_STEP_MS: u64 = 3_600_000;

/// Blocks in one answer, at most: it must fit into one message. Few in tests, which then need fewer blocks.
const MAX_BLOCKS: usize = if cfg!(test) { 200 } else { 8_000 };

/// Datanodes that are asked for an open block of which nothing is known, at most.
const MAX_ASKED: usize = 64;

fn total(values: impl Iterator<Item = u64>) -> u64 {
    values.fold(0, u64::saturating_add)
}

/// Where a reader is, for sorting replicas.
pub(super) struct Place<'a> {
    host: &'a str,
    rack: Option<&'a str>,
}

impl Core {
    /// The status of an inode under the path by which it was asked for.
    pub(super) fn status(&self, id: u64, path: &str) -> Option<pb::FileStatus> {
        self.unsynced.touch(id);
        let inode = self.tree.get(id)?;
        let kind = if inode.is_directory() { pb::FileKind::Directory } else { pb::FileKind::File };
        Some(pb::FileStatus {
            path: path.into(),
            inode: id,
            kind: kind as i32,
            length: self.length_of(inode),
            replication: inode.replication.into(),
            block_size: inode.block_size(),
            owner: self.tree.strings.get(inode.owner).into(),
            group: self.tree.strings.get(inode.group).into(),
            permission: inode.mode(),
            modified_ms: inode.modified_ms,
            accessed_ms: inode.accessed_ms,
            children: (inode.child_count() - usize::from(id == ROOT && self.system_directory().is_some())) as u64,
            open: inode.is_open(),
            blocks: Vec::new(),
            shown_length: None,
        })
    }

    /// The same with the length that HDFS's doors show. Answers that are remembered do without: it is in no log.
    fn shown_status(&self, id: u64, path: &str) -> Option<pb::FileStatus> {
        let shown_length = self.tree.get(id).and_then(|inode| self.shown_length(inode));
        self.status(id, path).map(|status| pb::FileStatus { shown_length, ..status })
    }

    /// HDFS counts what the writer of an open block said at a sync, and shows a cut only when it is made.
    fn shown_length(&self, inode: &Inode) -> Option<u64> {
        if !inode.is_open() {
            return None;
        }
        let last = *inode.blocks().last()?;
        let (block, open) = (self.blocks.get(last)?, self.blocks.open.get(&last)?);
        let (known, shown) = match block.target() {
            // After a restart nothing is known of it until a datanode reports.
            Some(target) => (target, open.seen.iter().map(|seen| seen.length).max().unwrap_or(target).max(target)),
            None => (0, open.said),
        };
        (shown != known).then(|| self.length_of(inode) - known + shown)
    }

    /// The system's own directory: no entry of the root's that people have to look at, or that is counted with them.
    fn system_directory(&self) -> Option<u64> {
        self.tree.child(ROOT, SYSTEM_NAME)
    }

    /// Sum of the lengths that writers have said.
    fn length_of(&self, inode: &Inode) -> u64 {
        inode
            .blocks()
            .iter()
            .map(|id| {
                self.unsynced.touch(*id);
                self.blocks.get(*id).and_then(super::blocks::Block::known_length).unwrap_or(0)
            })
            .sum()
    }

    /// The inode of a path that the caller may reach.
    fn find(&self, who: &Who<'_>, path: &str) -> Result<u64, Error> {
        let found = self.tree.walk(path, |id, inode| {
            self.unsynced.touch(id);
            if !inode.is_directory() {
                return Err(not_a_directory(&self.tree.path_of(id)));
            }
            self.check_access(who, id, EXECUTE)
        })?;
        let id = found.ok_or_else(|| not_found(path))?;
        self.unsynced.touch(id);
        Ok(id)
    }

    pub(super) fn get_status(
        &self,
        who: &Who<'_>,
        request: &pb::GetStatusRequest,
    ) -> Result<pb::GetStatusResponse, Error> {
        let id = self.find(who, &request.path)?;
        Ok(pb::GetStatusResponse { status: self.shown_status(id, &request.path) })
    }

    /// Tells whether the caller has an access (bits of `permissions`) to what is at the path.
    pub(super) fn may_access(
        &self,
        who: &Who<'_>,
        request: &pb::CheckAccessRequest,
    ) -> Result<pb::CheckAccessResponse, Error> {
        if request.access & !(READ | WRITE | EXECUTE) != 0 {
            let message = format!("{} is no access: read is 4, write 2, execute 1", request.access);
            return Err(Error::new(ErrorCode::InvalidArgument, message).with_subject(&request.path));
        }
        let id = self.find(who, &request.path)?;
        self.check_access(who, id, request.access)?;
        Ok(pb::CheckAccessResponse {})
    }

    pub(super) fn list(
        &self,
        turn: &mut Turn<'_>,
        who: &Who<'_>,
        request: &pb::ListRequest,
    ) -> Result<pb::ListResponse, Error> {
        let id = self.find(who, &request.path)?;
        let place = self.place_of(&who.caller.host);
        let entry = |child: u64, path: &str, random: &mut Random| {
            let mut status = self.shown_status(child, path)?;
            if request.with_locations {
                status.blocks = self.located_blocks(child, 0, u64::MAX, &place, random);
            }
            Some(status)
        };
        let inode = self.tree.get(id).ok_or_else(|| not_found(&request.path))?;
        if !inode.is_directory() {
            let entries = entry(id, &request.path, &mut turn.random).into_iter().collect();
            return Ok(pb::ListResponse { entries, remaining: 0 });
        }
        self.check_access(who, id, READ | EXECUTE)?;
        let most =
            if request.with_locations { self.settings.list_limit_with_locations } else { self.settings.list_limit };
        let limit = if request.limit == 0 { most } else { request.limit.min(most) } as usize;
        let (before, ids) = self.tree.children_after(id, &request.start_after);
        let system = if id == ROOT { self.system_directory() } else { None };
        let hidden = usize::from(system.is_some() && *SYSTEM_NAME.as_bytes() > *request.start_after);
        let mut entries = Vec::new();
        let mut blocks = 0;
        let base = if request.path == "/" { "" } else { &*request.path };
        for child in ids.filter(|child| Some(*child) != system).take(limit) {
            let Some(inode) = self.tree.get(child) else { continue };
            let name = &*inode.name;
            blocks += if request.with_locations { inode.blocks().len() } else { 0 };
            if blocks > MAX_BLOCKS && !entries.is_empty() {
                break;
            }
            entries.extend(entry(child, &format!("{base}/{name}"), &mut turn.random));
        }
        let remaining = (inode.child_count() - before - entries.len() - hidden) as u64;
        Ok(pb::ListResponse { entries, remaining })
    }

    pub(super) fn get_block_locations(
        &mut self,
        turn: &mut Turn<'_>,
        who: &Who<'_>,
        request: &pb::GetBlockLocationsRequest,
    ) -> Result<pb::GetBlockLocationsResponse, Error> {
        let path = &request.path;
        let id = self.find(who, path)?;
        if self.tree.get(id).is_some_and(Inode::is_directory) {
            return Err(Error::new(ErrorCode::NotAFile, format!("Path is not a file: {path}")).with_subject(path));
        }
        self.check_access(who, id, READ)?;
        let accessed = self.tree.get(id).map_or(0, |inode| inode.accessed_ms);
        if self.settings.access_times
            && turn.wall_ms > accessed.saturating_add(ACCESS_STEP_MS)
            && !self.safemode.is_on()
        {
            let accessed_ms = Some(turn.wall_ms);
            let edit = pb::EditSetAttributes { inode: id, accessed_ms, ..Default::default() };
            self.commit(turn, super::Carries::Nothing, pb::edit::Kind::SetAttributes(edit))?;
        }
        let length = if request.length == 0 { u64::MAX } else { request.length };
        let last = request.offset.saturating_add(length);
        let place = self.place_of(&who.caller.host);
        let blocks = self.located_blocks(id, request.offset, last, &place, &mut turn.random);
        Ok(pb::GetBlockLocationsResponse { status: self.shown_status(id, path), blocks })
    }

    /// Blocks of a file that touch `first..last`; of very many only the first ones.
    pub(super) fn located_blocks(
        &self,
        file: u64,
        first: u64,
        last: u64,
        place: &Place<'_>,
        random: &mut Random,
    ) -> Vec<pb::LocatedBlock> {
        let mut found = Vec::new();
        let mut offset = 0;
        for id in self.tree.get(file).map_or(&[][..], Inode::blocks) {
            let length = self.blocks.get(*id).and_then(super::blocks::Block::known_length);
            let end = offset + length.unwrap_or(0);
            if found.len() >= MAX_BLOCKS {
                break;
            }
            // A block that is being written may hold visible bytes already, so its end is open.
            if offset < last && (end > first || length.is_none()) {
                found.extend(self.located_block(*id, offset, place, random));
            }
            offset = end;
        }
        found
    }

    /// One block with its replicas, nearest first.
    pub(super) fn located_block(
        &self,
        id: u64,
        offset: u64,
        place: &Place<'_>,
        random: &mut Random,
    ) -> Option<pb::LocatedBlock> {
        self.unsynced.touch(id);
        let block = self.blocks.get(id)?;
        let length = block.length();
        let (mut storages, others_may_hold) = match length {
            None => self.open_holders(id),
            Some(_) => (block.replicas.as_slice().to_vec(), false),
        };
        storages.retain(|storage| self.nodes.is_live(*storage));
        // One that is about to be deleted is better than none.
        if storages.iter().any(|storage| !self.blocks.is_excess(id, *storage)) {
            storages.retain(|storage| !self.blocks.is_excess(id, *storage));
        }
        storages.iter().for_each(|storage| self.depend_on_node(self.nodes.storage(*storage).node));
        let corrupt = length.is_some() && storages.is_empty() && self.blocks.bad.contains_key(&id);
        storages.sort_by_cached_key(|storage| {
            let node = self.nodes.node_of(*storage);
            (self.is_stale(node.heard_ms), place.distance_to(node), random.next())
        });
        let state_of = |storage: StorageIndex| match length {
            None => ReplicaState::BeingWritten,
            Some(_) if self.is_stale(self.nodes.node_of(storage).heard_ms) => ReplicaState::ReplicaStale,
            Some(_) => ReplicaState::Finalized,
        };
        let mut replicas: Vec<pb::Replica> =
            storages.iter().map(|storage| self.nodes.replica(*storage, state_of(*storage))).collect();
        if corrupt {
            // Where the bad ones lie: whoever asks has their nodes look again, and one that verifies by then is taken back.
            let bad = self.blocks.bad.get(&id).into_iter().flatten();
            for bad in bad.filter(|bad| bad.generation == block.generation && self.nodes.is_live(bad.storage)) {
                self.depend_on_node(self.nodes.storage(bad.storage).node);
                replicas.push(self.nodes.replica(bad.storage, ReplicaState::ReplicaCorrupt));
            }
        }
        Some(pb::LocatedBlock {
            block: Some(self.pb_block(id, block.generation)),
            offset,
            length: block.known_length().unwrap_or(0),
            replicas,
            complete: length.is_some(),
            corrupt,
            token: bytes::Bytes::new(),
            others_may_hold,
        })
    }

    /// Where something of an open block lies, as far as is known, and whether nodes that are not among these may have more of it.
    fn open_holders(&self, id: u64) -> (Vec<StorageIndex>, bool) {
        let (Some(block), Some(open)) = (self.blocks.get(id), self.blocks.open.get(&id)) else {
            return (Vec::new(), false);
        };
        // A writer that renewed the generation on its nodes and could not say so any more left newer ones: they hold all that was
        // acknowledged under the one in force. Those of a future that was given up by a restore were not handed out.
        let generations = block.generation..=block.generation.max(self.handed_out.of(id));
        let mut named = open.expected.clone();
        if named.is_empty() {
            let counts = open.seen.iter().filter(|seen| generations.contains(&seen.generation));
            named = counts.map(|seen| seen.storage).collect();
        }
        named.retain(|storage| self.nodes.is_live(*storage));
        let mut absent = self.absent_nodes(id);
        if absent.is_empty() && open.expected.is_empty() && open.seen.is_empty() && block.target().is_none() {
            return self.wherever();
        }
        absent.retain(|node| !named.iter().any(|storage| self.nodes.storage(*storage).node == *node));
        let others_may_hold = !absent.is_empty() || named.is_empty();
        (named, others_may_hold)
    }

    /// Where to ask for an open block of which, since the start, nobody has told anything though all have reported: nothing was written into
    /// it, or its first bytes are on their way here. Asking finds out. With too many to ask, or a volume that is out, nobody knows.
    fn wherever(&self) -> (Vec<StorageIndex>, bool) {
        let live: Vec<&Node> = self.nodes.nodes.iter().filter(|node| node.alive).collect();
        let failed = live.iter().flat_map(|node| &node.storages).any(|storage| self.nodes.storage(*storage).failed);
        if live.len() > MAX_ASKED || failed {
            return (Vec::new(), true);
        }
        (live.iter().filter_map(|node| node.storages.first().copied()).collect(), false)
    }

    /// A block's identity on the wire.
    pub(super) fn pb_block(&self, id: u64, generation: u64) -> pb::Block {
        pb::Block { pool: self.facts.pool_id.clone(), id: id as i64, generation }
    }

    /// Where a caller is: on a datanode's host, or somewhere unknown.
    pub(super) fn place_of<'a>(&'a self, host: &'a str) -> Place<'a> {
        let node = if host.is_empty() { None } else { self.nodes.nodes.iter().find(|node| node.ip() == host) };
        Place { host, rack: node.map(|node| &*node.rack) }
    }

    pub(super) fn is_stale(&self, heard_ms: u64) -> bool {
        heard_ms + self.settings.stale_interval_ms < self.now_ms
    }

    pub(super) fn server_defaults(&self) -> pb::GetServerDefaultsResponse {
        pb::GetServerDefaultsResponse {
            block_size: self.settings.default_block_size,
            replication: self.settings.default_replication,
            cluster_id: self.facts.cluster_id.clone(),
            pool_id: self.facts.pool_id.clone(),
            trash_interval_ms: self.settings.trash_interval_ms,
            superuser: self.facts.superuser.clone(),
            lease_soft_limit_ms: self.settings.lease_soft_limit_ms,
        }
    }

    pub(super) fn cluster_report(&self) -> pb::ClusterReportResponse {
        let nodes: Vec<pb::NodeReport> = self.nodes.nodes.iter().map(|node| self.node_report(node)).collect();
        let live = || nodes.iter().filter(|node| node.state() != pb::NodeState::Dead);
        let counts = self.repair.counts();
        let missing = if self.repair.settled() {
            counts.missing
        } else {
            self.repair.complete - self.repair.safe.min(self.repair.complete)
        };
        pb::ClusterReportResponse {
            capacity: total(live().map(|node| node.capacity)),
            used: total(live().map(|node| node.used)),
            remaining: total(live().map(|node| node.remaining)),
            under_replicated: counts.under_replicated,
            missing,
            corrupt: self.blocks.corrupt(),
            pending_replication: self.repair.pending_copies(),
            pending_deletion: self.nodes.nodes.iter().map(|node| node.delete.len() as u64).sum(),
            safemode: self.safemode.is_on(),
            safemode_reason: self.safemode_reason(),
            files: self.tree.inodes.len() - self.tree.directories,
            directories: self.tree.directories,
            blocks: self.blocks.table.len(),
            last_txid: self.last_txid.0,
            last_checkpoint_txid: self.last_checkpoint.0,
            epoch: self.epoch.0,
            mis_replicated: counts.mis_replicated,
            merged_blocks: self.merges.replaced,
            merges_under_way: self.merges.under_way(),
            merges_given_up: self.merges.given_up,
            over_replicated: self.blocks.excess.len() as u64 + self.repair.to_trim_len(),
            restored_to_txid: self.restored_to,
            nodes,
            ..Default::default()
        }
    }

    fn node_report(&self, node: &super::nodes::Node) -> pb::NodeReport {
        let state = match node.alive {
            false => pb::NodeState::Dead,
            true if self.is_stale(node.heard_ms) => pb::NodeState::Stale,
            true => pb::NodeState::Live,
        };
        let storages = || node.storages.iter().map(|storage| self.nodes.storage(*storage)).filter(|s| !s.failed);
        pb::NodeReport {
            id: node.id.clone(),
            host: node.host.clone(),
            address: node.address.clone(),
            http_address: node.http_address.clone(),
            rack: node.rack.clone(),
            state: state as i32,
            capacity: total(storages().map(|storage| storage.capacity)),
            used: total(storages().map(|storage| storage.used)),
            remaining: total(storages().map(|storage| storage.remaining)),
            blocks: storages().map(|storage| storage.blocks.len()).sum(),
            last_heartbeat_ms: node.heard_wall_ms,
            active_transfers: node.transfers,
            task_slots: node.task_slots,
            tasks_running: node.tasks_running,
        }
    }
}

impl Place<'_> {
    fn distance_to(&self, node: &super::nodes::Node) -> usize {
        if node.ip() == self.host {
            return 0;
        }
        self.rack.map_or(usize::MAX, |rack| rack_distance(rack, &node.rack))
    }
}

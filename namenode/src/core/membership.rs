//! Datanodes come, live and die: registration, heartbeats, deadlines.

use cairn_proto::pb::{self, datanode_command::Command as Order, edit::Kind};
use cairn_proto::{Error, ErrorCode, PROTOCOL_VERSION};

use super::event::{Command, StreamId};
use super::nodes::{NodeIndex, Proofs};
use super::trim::Verdict;
use super::{Carries, Core, Turn};

/// A full report that did not come is asked for again after this.
const ASK_AGAIN_MS: u64 = 30_000;
/// Copies that one heartbeat answer may order.
const COPIES_PER_HEARTBEAT: usize = 64;
/// A deletion that was not reported as done is ordered again after this, ...
const DELETE_AGAIN_MS: u64 = 60_000;
/// ... but for a block of no file at most this often: a full report finds the replica if it is still there.
const MAX_DELETE_ORDERS: u32 = 3;
/// Longest text in a registration, bytes.
const MAX_TEXT: usize = 255;
/// Storages of a node, at most.
const MAX_STORAGES: usize = 256;
/// More transfers, slots or tasks of one node are a mistake of its.
const MAX_LOAD: u32 = 1_000_000;
/// Replicas that a node may have to verify.
const MAX_VERIFY: usize = 10_000;

fn not_registered(node_id: &str) -> Error {
    Error::new(ErrorCode::NotRegistered, format!("datanode {node_id} must register first")).with_subject(node_id)
}

impl Core {
    pub(super) fn register(
        &mut self,
        turn: &mut Turn<'_>,
        peer_ip: &str,
        request: pb::RegisterRequest,
    ) -> Result<pb::RegisterResponse, Error> {
        self.check_registration(&request)?;
        let edit = registration_edit(&request, peer_ip);
        let known = self.nodes.find(&request.node_id);
        let changed = match known {
            None => true,
            Some(index) => {
                let mut now = self.nodes.as_edit(index);
                now.storages.retain(|storage| edit.storages.contains(storage));
                let mut sorted = edit.storages.clone();
                sorted.sort_by(|a, b| a.storage_id.cmp(&b.storage_id));
                now.storages.sort_by(|a, b| a.storage_id.cmp(&b.storage_id));
                (sorted, &now.host, &now.address, &now.http_address, &now.rack)
                    != (now.storages.clone(), &edit.host, &edit.address, &edit.http_address, &edit.rack)
            }
        };
        let (racks, usable) = (self.nodes.live_racks(), self.nodes.usable());
        if changed {
            self.commit(turn, Carries::Nothing, Kind::RegisterNode(edit))?;
        }
        let Some(index) = self.nodes.find(&request.node_id) else { return Err(not_registered(&request.node_id)) };
        self.depend_on_node(index);
        self.close_stream_of(turn, index, "the datanode registered again");
        self.begin_registration(index, &request, turn.wall_ms);
        if racks < 2 && self.nodes.live_racks() >= 2 {
            // What lay on one rack because there was only one is now on too few.
            self.cursors.rescan();
        }
        if self.nodes.usable() > usable {
            self.more_nodes();
        }
        self.wake_deferred();
        Ok(pb::RegisterResponse {
            cluster_id: self.facts.cluster_id.clone(),
            pool_id: self.facts.pool_id.clone(),
            epoch: self.epoch.0,
            registration: self.nodes.node(index).registration,
            heartbeat_interval_ms: self.settings.heartbeat_interval_ms,
            restore_unconfirmed: !self.may_put_away(),
        })
    }

    fn check_registration(&self, request: &pb::RegisterRequest) -> Result<(), Error> {
        let fail = |code, message: String| Err(Error::new(code, message).with_subject(&request.node_id));
        let (ours, pool) = (&self.facts.cluster_id, &self.facts.pool_id);
        if request.protocol_version != u32::from(PROTOCOL_VERSION) {
            let theirs = request.protocol_version;
            return fail(
                ErrorCode::UnsupportedVersion,
                format!("datanode {} speaks protocol {theirs}, this namenode {PROTOCOL_VERSION}", request.node_id),
            );
        }
        if let Err(message) = check_shape(request) {
            return fail(ErrorCode::InvalidArgument, message);
        }
        if !request.cluster_id.is_empty() && request.cluster_id != *ours {
            let theirs = &request.cluster_id;
            return fail(
                ErrorCode::WrongCluster,
                format!("datanode {} belongs to cluster {theirs}, this is {ours}", request.node_id),
            );
        }
        if !request.pool_id.is_empty() && request.pool_id != *pool {
            let theirs = &request.pool_id;
            return fail(
                ErrorCode::WrongCluster,
                format!("datanode {} holds block pool {theirs}, this is {pool}", request.node_id),
            );
        }
        if request.epoch > self.epoch.0 {
            let (theirs, own) = (request.epoch, self.epoch);
            return fail(
                ErrorCode::StaleEpoch,
                format!("datanode {} has seen epoch {theirs}; this namenode has only {own}", request.node_id),
            );
        }
        for storage in &request.storages {
            if let Some(index) = self.nodes.find_storage(&storage.storage_id) {
                let owner = self.nodes.node_of(index);
                if owner.id != request.node_id && owner.alive {
                    let (volume, node) = (&storage.storage_id, &owner.id);
                    return fail(
                        ErrorCode::InvalidArgument,
                        format!("volume {volume} is served by datanode {node}, which is alive"),
                    );
                }
            }
        }
        Ok(())
    }

    fn begin_registration(&mut self, index: NodeIndex, request: &pb::RegisterRequest, wall_ms: u64) {
        self.next_registration += 1;
        let registration = self.next_registration;
        self.drop_ranges_of(index);
        let now_ms = self.now_ms;
        let node = self.nodes.node_mut(index);
        node.registration = registration;
        node.alive = true;
        node.heard_ms = now_ms;
        node.progress_ms = now_ms;
        node.heard_wall_ms = wall_ms;
        node.transfers = 0;
        node.assigned = 0;
        node.task_slots = request.task_slots.min(MAX_LOAD);
        node.tasks_running = 0;
        node.reported = false;
        node.asked_full_ms = None;
        node.deleting.clear();
        node.proofs.ask_again();
        for storage in node.storages.clone() {
            let named = request.storages.iter().any(|info| info.storage_id == self.nodes.storage(storage).id);
            let entry = self.nodes.storage_mut(storage);
            entry.reported = false;
            entry.forget_promises();
            entry.failed = !named;
            if named {
                self.cursors.purge.retain(|other| *other != storage);
            } else {
                self.purge(storage);
            }
        }
        self.take_storage_infos(index, &request.storages);
    }

    /// A storage lost its replicas: a cursor takes them out of the map.
    fn purge(&mut self, storage: u32) {
        if !self.cursors.purge.contains(&storage) {
            self.cursors.purge.push_back(storage);
        }
    }

    fn take_storage_infos(&mut self, node: NodeIndex, infos: &[pb::StorageInfo]) {
        let mut entry_is_back = false;
        for info in infos {
            let Some(index) = self.nodes.find_storage(&info.storage_id) else { continue };
            let entry = self.nodes.storage_mut(index);
            if entry.node != node {
                continue;
            }
            entry.capacity = info.capacity;
            entry.used = info.used;
            entry.remaining = info.remaining;
            entry.forget_promises();
            let failed = !info.failure.is_empty();
            let was_failed = std::mem::replace(&mut entry.failed, failed);
            if failed && !was_failed {
                self.purge(index);
            } else if !failed {
                self.cursors.purge.retain(|other| *other != index);
            }
            if was_failed && !failed {
                // Its replicas left the map: only a full report brings them back.
                entry_is_back = true;
                self.nodes.storage_mut(index).reported = false;
                let node = self.nodes.node_mut(node);
                node.reported = false;
                node.asked_full_ms = None;
            }
        }
        if entry_is_back {
            self.more_nodes();
        }
    }

    /// The node of a valid registration.
    fn registered(&self, node_id: &str, registration: u64) -> Result<NodeIndex, Error> {
        match self.nodes.find(node_id) {
            Some(index) if registration != 0 && self.nodes.node(index).registration == registration => Ok(index),
            _ => Err(not_registered(node_id)),
        }
    }

    pub(super) fn heartbeat(
        &mut self,
        turn: &Turn<'_>,
        request: pb::HeartbeatRequest,
    ) -> Result<pb::HeartbeatResponse, Error> {
        if request.epoch > self.epoch.0 {
            let message = format!("epoch {} exists; this namenode has only {}", request.epoch, self.epoch);
            return Err(Error::new(ErrorCode::StaleEpoch, message).with_subject(request.node_id));
        }
        let index = self.registered(&request.node_id, request.registration)?;
        let now_ms = self.now_ms;
        let node = self.nodes.node_mut(index);
        node.heard_ms = now_ms;
        node.heard_wall_ms = turn.wall_ms;
        node.transfers = request.active_transfers.min(MAX_LOAD);
        node.assigned = 0;
        node.task_slots = request.task_slots.min(MAX_LOAD);
        node.tasks_running = request.tasks_running.min(MAX_LOAD);
        self.take_storage_infos(index, &request.storages);
        let mut orders = Vec::new();
        self.order_report(index, &mut orders);
        self.order_verification(index, &mut orders);
        while let Some((order, depends_on)) = self.nodes.node_mut(index).recover.pop_front() {
            self.unsynced.depend(depends_on);
            orders.push(Order::Recover(order));
        }
        while let Some((order, depends_on)) = self.nodes.node_mut(index).merge.pop_front() {
            self.unsynced.depend(depends_on);
            orders.push(Order::Merge(order));
        }
        self.order_copies(index, &mut orders);
        self.order_deletions(index, &mut orders);
        let commands = orders.into_iter().map(|order| pb::DatanodeCommand { command: Some(order) }).collect();
        Ok(pb::HeartbeatResponse { commands, epoch: self.epoch.0 })
    }

    fn order_report(&mut self, index: NodeIndex, orders: &mut Vec<Order>) {
        let now_ms = self.now_ms;
        let node = self.nodes.node_mut(index);
        let due = node.asked_full_ms.is_none_or(|asked| now_ms >= asked + ASK_AGAIN_MS);
        if !node.reported && due && node.stream.is_some() {
            node.asked_full_ms = Some(now_ms);
            orders.push(Order::FullReport(pb::SendFullReport {}));
        }
    }

    fn order_verification(&mut self, index: NodeIndex, orders: &mut Vec<Order>) {
        let wanted = std::mem::take(&mut self.nodes.node_mut(index).verify);
        let wanted = wanted.into_iter().map(|(id, generation, storage)| pb::ReplicaRef {
            block: Some(self.pb_block(id, generation)),
            storage_id: self.nodes.storage(storage).id.clone(),
        });
        let mut replicas: Vec<_> = wanted.collect();
        replicas.extend(self.ask_for_proofs(index));
        if replicas.is_empty() {
            return;
        }
        orders.push(Order::Verify(pb::VerifyReplicas { replicas }));
    }

    fn order_copies(&mut self, index: NodeIndex, orders: &mut Vec<Order>) {
        for _ in 0..COPIES_PER_HEARTBEAT {
            let Some((copy, depends_on)) = self.nodes.node_mut(index).replicate.pop_front() else { break };
            // A file that was deleted in between needs no copy.
            if copy.block.as_ref().is_some_and(|block| self.blocks.get(block.id as u64).is_some()) {
                self.unsynced.depend(depends_on);
                orders.push(Order::Replicate(copy));
            }
        }
    }

    fn order_deletions(&mut self, index: NodeIndex, orders: &mut Vec<Order>) {
        if !self.repair.settled() || self.safemode.is_on() || !self.may_put_away() {
            return;
        }
        self.repeat_deletions(index);
        let (mut replicas, mut unknown, mut later) = (Vec::new(), Vec::new(), Vec::new());
        let due_ms = self.now_ms + DELETE_AGAIN_MS;
        let most = self.settings.deletions_per_heartbeat;
        while replicas.len() + unknown.len() < most && later.len() < most {
            let Some(deletion) = self.nodes.node_mut(index).delete.pop_front() else { break };
            match self.deletion_holds(&deletion) {
                Verdict::Delete => {
                    if self.nodes.node_mut(index).deleting.handed_out(deletion, due_ms) {
                        self.unsynced.depend(deletion.depends_on);
                        let orders = if deletion.known { &mut replicas } else { &mut unknown };
                        orders.push(pb::ReplicaRef {
                            block: Some(self.pb_block(deletion.block, deletion.generation)),
                            storage_id: self.nodes.storage(deletion.storage).id.clone(),
                        });
                    }
                }
                Verdict::Later => later.push(deletion),
                Verdict::Unproven | Verdict::Never => {}
            }
        }
        self.nodes.node_mut(index).delete.extend(later);
        if !replicas.is_empty() {
            orders.push(Order::Delete(pb::DeleteReplicas { replicas }));
        }
        if !unknown.is_empty() {
            orders.push(Order::Quarantine(pb::QuarantineReplicas { replicas: unknown }));
        }
    }

    /// Deletions that a node was told and did not report as done: the order may be lost.
    fn repeat_deletions(&mut self, index: NodeIndex) {
        for _ in 0..self.settings.deletions_per_heartbeat {
            let now_ms = self.now_ms;
            let Some((deletion, count)) = self.nodes.node_mut(index).deleting.pop_late(now_ms) else { return };
            let (id, storage) = (deletion.block, deletion.storage);
            let unknown = self.blocks.get(id).is_none();
            if unknown && count >= MAX_DELETE_ORDERS {
                self.nodes.node_mut(index).deleting.forget(id, storage);
            } else if matches!(self.deletion_holds(&deletion), Verdict::Delete | Verdict::Later) {
                self.nodes.node_mut(index).delete.push_back(deletion);
            }
        }
    }

    /// Declares the nodes dead that were silent for the dead interval.
    pub(super) fn find_dead_nodes(&mut self) {
        for index in 0..self.nodes.nodes.len() as NodeIndex {
            let node = self.nodes.node(index);
            if node.alive && node.heard_ms + self.settings.dead_interval_ms < self.now_ms {
                self.node_died(index);
            }
        }
    }

    fn node_died(&mut self, index: NodeIndex) {
        let node = self.nodes.node_mut(index);
        node.alive = false;
        node.registration = 0;
        node.repairs = 0;
        node.replicate.clear();
        node.delete.clear();
        node.deleting.clear();
        node.verify.clear();
        node.proofs = Proofs::default();
        node.recover.clear();
        node.merge.clear();
        // Its stream names an old registration from now on; what still comes on it is ignored.
        if let Some(stream) = node.stream.take() {
            self.streams.remove(&stream);
        }
        for storage in self.nodes.node(index).storages.clone() {
            self.purge(storage);
        }
        self.drop_copies_of(index);
        self.drop_ranges_of(index);
    }

    fn close_stream_of(&mut self, turn: &mut Turn<'_>, index: NodeIndex, why: &str) {
        if let Some(stream) = self.nodes.node_mut(index).stream.take() {
            self.streams.remove(&stream);
            turn.commands.push(Command::CloseStream { stream, error: Error::new(ErrorCode::NotRegistered, why) });
        }
    }

    pub(super) fn report_opened(&mut self, turn: &mut Turn<'_>, stream: StreamId, open: &pb::ReportOpen) {
        match self.registered(&open.node_id, open.registration) {
            Err(error) => turn.commands.push(Command::CloseStream { stream, error }),
            Ok(index) => {
                self.close_stream_of(turn, index, "the datanode opened another report stream");
                self.nodes.node_mut(index).stream = Some(stream);
                self.streams.insert(stream, index);
                let down = pb::ReportDown { range_credits: self.settings.report_credits };
                let depends_on = self.last_txid.min(self.nodes.node(index).registered_by);
                turn.commands.push(Command::Report { stream, depends_on, down });
            }
        }
    }

    pub(super) fn report_closed(&mut self, stream: StreamId) {
        if let Some(index) = self.streams.remove(&stream) {
            self.nodes.node_mut(index).stream = None;
            // A full report that broke off must come again, whole.
            self.nodes.node_mut(index).asked_full_ms = None;
        }
    }

    pub(super) fn report_bad_replica(
        &mut self,
        request: &pb::ReportBadReplicaRequest,
    ) -> Result<pb::ReportBadReplicaResponse, Error> {
        let (id, generation) = request.block.as_ref().map_or((0, 0), |block| (block.id as u64, block.generation));
        self.unsynced.touch(id);
        if self.blocks.get(id).is_none() {
            let message = format!("Block {id} does not exist");
            return Err(Error::new(ErrorCode::BlockNotFound, message).with_subject(id.to_string()));
        }
        let Some(node) = self.nodes.find(&request.node_id) else { return Err(not_registered(&request.node_id)) };
        let named = self.nodes.find_storage(&request.storage_id);
        let held = self.blocks.storages_of(id);
        let on_node = |storage: &u32| self.nodes.storage(*storage).node == node;
        let storage = named.filter(on_node).filter(|at| held.contains(at)).or(held.iter().copied().find(on_node));
        if let Some(storage) = storage {
            let node = self.nodes.node_mut(node);
            if node.verify.len() < MAX_VERIFY {
                node.verify.insert((id, generation, storage));
            }
        }
        Ok(pb::ReportBadReplicaResponse {})
    }
}

/// Checks what needs no knowledge of the cluster.
fn check_shape(request: &pb::RegisterRequest) -> Result<(), String> {
    if request.node_id.is_empty() || request.address.is_empty() {
        return Err("a registration needs a node id and an address".into());
    }
    let (count, mut ids) = (request.storages.len(), std::collections::BTreeSet::new());
    if count > MAX_STORAGES {
        return Err(format!("a registration names {count} storages, more than {MAX_STORAGES}"));
    }
    for storage in &request.storages {
        if storage.storage_id.is_empty() {
            return Err("a storage has no id".into());
        }
        if !ids.insert(&storage.storage_id) {
            return Err("a registration names a storage twice".into());
        }
    }
    let texts = [&request.node_id, &request.host, &request.address, &request.http_address, &request.rack];
    if texts.into_iter().chain(ids).any(|text| text.len() > MAX_TEXT) {
        return Err(format!("the registration holds a text of more than {MAX_TEXT} bytes"));
    }
    Ok(())
}

/// What the log will hold of a registering node. An address without an IP gets the peer's.
fn registration_edit(request: &pb::RegisterRequest, peer_ip: &str) -> pb::EditRegisterNode {
    let whole = |address: &str| match address.strip_prefix("0.0.0.0:").or_else(|| address.strip_prefix("[::]:")) {
        Some(port) if peer_ip.contains(':') => format!("[{peer_ip}]:{port}"),
        Some(port) => format!("{peer_ip}:{port}"),
        None => address.to_owned(),
    };
    let rack = match request.rack.trim_end_matches('/') {
        "" => "/default-rack".to_owned(),
        rack if rack.starts_with('/') => rack.to_owned(),
        rack => format!("/{rack}"),
    };
    pb::EditRegisterNode {
        node_id: request.node_id.clone(),
        host: if request.host.is_empty() { peer_ip.to_owned() } else { request.host.clone() },
        address: whole(&request.address),
        http_address: whole(&request.http_address),
        rack,
        storages: request
            .storages
            .iter()
            .map(|info| pb::EditStorage { storage_id: info.storage_id.clone(), storage_type: info.storage_type as u32 })
            .collect(),
    }
}

//! Datanodes and their storages.
//!
//! Ids and addresses are in the log, so that after a restart the namenode knows for whom it waits. Everything else
//! (liveness, space, load, what lies there) comes from heartbeats and reports.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use cairn_proto::ids::TxId;
use cairn_proto::pb;

use super::blocks::StorageIndex;
use super::blockset::BlockSet;
use super::event::StreamId;

/// Index of a node in [`Nodes`].
pub type NodeIndex = u32;

/// A deletion that waits for the next heartbeat of its node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct QueuedDeletion {
    /// The block.
    pub block: u64,
    /// Only a replica of this generation (or an older one) goes.
    pub generation: u64,
    /// Where it lies.
    pub storage: StorageIndex,
    /// The edit that made it superfluous.
    pub depends_on: TxId,
    /// Whether this namenode knows why: it freed the block, or has other replicas of it. Else the replica is only put away.
    pub known: bool,
}

/// Deletions that were handed out.
#[derive(Default)]
pub struct Deleting {
    orders: BTreeMap<(u64, StorageIndex), Ordered>,
    /// In order of time; may name orders that are gone.
    due: VecDeque<(u64, (u64, StorageIndex))>,
}

struct Ordered {
    deletion: QueuedDeletion,
    /// When it is looked at again; `None`: never, it is only remembered as doubtful.
    due_ms: Option<u64>,
    count: u32,
}

impl Deleting {
    /// Whether this replica may be gone at any moment.
    pub fn contains(&self, block: u64, storage: StorageIndex) -> bool {
        self.orders.contains_key(&(block, storage))
    }

    /// Whether the node was told lately to delete this replica in this generation: an order for an older one spares it, and
    /// one that was not carried out in time may never be given again.
    pub fn covers(&self, block: u64, storage: StorageIndex, generation: u64) -> bool {
        let due = |order: &&Ordered| order.due_ms.is_some() && order.deletion.generation >= generation;
        self.orders.get(&(block, storage)).filter(due).is_some()
    }

    /// An order leaves; it is looked at again at `due_ms`. `false`: it is not needed. The same answer carries it already
    /// (only lost answers may use up its tries), or the node was told to delete a newer generation, which this one must
    /// not replace: what is remembered is what is repeated.
    pub fn handed_out(&mut self, deletion: QueuedDeletion, due_ms: u64) -> bool {
        let key = (deletion.block, deletion.storage);
        let before = self.orders.get(&key);
        let fresh = before.is_none_or(|order| order.due_ms != Some(due_ms));
        let newer = before.is_none_or(|order| order.deletion.generation < deletion.generation);
        if !fresh && !newer || self.covers(deletion.block, deletion.storage, deletion.generation.saturating_add(1)) {
            return false;
        }
        let count = before.map_or(0, |order| order.count) + u32::from(fresh);
        self.orders.insert(key, Ordered { deletion, due_ms: Some(due_ms), count });
        if fresh {
            self.due.push_back((due_ms, key));
        }
        true
    }

    /// The replica is gone, or nobody will wait for that any more.
    pub fn forget(&mut self, block: u64, storage: StorageIndex) {
        self.orders.remove(&(block, storage));
    }

    /// The next order that was not carried out in time, and how often it was given. Its replica stays doubtful: the node
    /// may have the order still.
    pub fn pop_late(&mut self, now_ms: u64) -> Option<(QueuedDeletion, u32)> {
        while let Some((due_ms, key)) = self.due.front().copied() {
            if due_ms > now_ms {
                break;
            }
            self.due.pop_front();
            if let Some(order) = self.orders.get_mut(&key).filter(|order| order.due_ms == Some(due_ms)) {
                order.due_ms = None;
                return Some((order.deletion, order.count));
            }
        }
        None
    }

    /// What was ordered before does not count any more.
    pub fn clear(&mut self) {
        *self = Self::default();
    }
}

/// A datanode.
#[derive(Default)]
pub struct Node {
    /// Stable id.
    pub id: String,
    /// Name for people.
    pub host: String,
    /// "IP:PORT" of the data port.
    pub address: String,
    /// Of the web server; may be empty.
    pub http_address: String,
    /// "/dc1/rack2".
    pub rack: String,
    /// Its storages, those of earlier registrations included.
    pub storages: Vec<StorageIndex>,
    /// Names its present registration; 0: none since the start.
    pub registration: u64,
    /// Whether it counts as alive.
    pub alive: bool,
    /// Turn time of the last sign of life.
    pub heard_ms: u64,
    /// Turn time of its registration, or of the newest range of a full report since then.
    pub progress_ms: u64,
    /// Wall time of the same.
    pub heard_wall_ms: u64,
    /// Transfers that it says are under way.
    pub transfers: u32,
    /// New transfers given to it since its last heartbeat.
    pub assigned: u32,
    /// Copies for repair under way from and to it.
    pub repairs: u32,
    /// Task slots.
    pub task_slots: u32,
    /// Tasks running.
    pub tasks_running: u32,
    /// Whether a full report came since its registration.
    pub reported: bool,
    /// Its report stream.
    pub stream: Option<StreamId>,
    /// When it was last told to send a full report (turn time); `None`: not since its registration.
    pub asked_full_ms: Option<u64>,
    /// Copies that it shall make.
    pub replicate: VecDeque<(pb::ReplicateBlock, TxId)>,
    /// Replicas that it shall delete.
    pub delete: VecDeque<QueuedDeletion>,
    /// Replicas that it was told to delete and has not reported as removed.
    pub deleting: Deleting,
    /// Replicas that it shall check: block, generation, storage.
    pub verify: BTreeSet<(u64, u64, StorageIndex)>,
    /// Replicas that it shall read because they are to stay alone.
    pub proofs: Proofs,
    /// Recoveries that it shall lead.
    pub recover: VecDeque<(pb::RecoverBlock, TxId)>,
    /// Short blocks that it shall rewrite as one.
    pub merge: VecDeque<(pb::MergeBlocks, TxId)>,
    /// Transaction of its last registration edit.
    pub registered_by: TxId,
}

impl Node {
    /// The IP address in its data address.
    pub fn ip(&self) -> &str {
        let ip = self.address.rsplit_once(':').map_or(&*self.address, |(ip, _)| ip);
        ip.trim_start_matches('[').trim_end_matches(']')
    }

    /// Transfers under way, as far as the namenode can tell.
    pub fn load(&self) -> u32 {
        self.transfers.max(self.repairs).saturating_add(self.assigned)
    }
}

/// Blocks of which one node is to keep the only replica, and is to read it before the others go.
#[derive(Default)]
pub struct Proofs {
    /// It has not been asked yet.
    pub wanted: BTreeSet<u64>,
    /// It has been asked: when (turn time), and for how many bytes.
    pub asked: BTreeMap<u64, (u64, u64)>,
    /// Bytes in `asked`.
    bytes: u64,
}

/// Replicas that a node reads for the namenode at a time ...
const MAX_ASKED: usize = 256;
/// ... and their bytes; one larger block is read alone.
const MAX_ASKED_BYTES: u64 = 512 << 20;
/// A node that has not answered for so long has forgotten it.
const ANSWER_LIMIT_MS: u64 = 600_000;

impl Proofs {
    /// The next block to ask for, if there is room.
    pub fn next(&mut self) -> Option<u64> {
        let has_room = self.asked.len() < MAX_ASKED && self.bytes < MAX_ASKED_BYTES;
        if has_room { self.wanted.pop_first() } else { None }
    }

    /// The node is asked.
    pub fn ask(&mut self, id: u64, now_ms: u64, bytes: u64) {
        self.answered(id);
        self.asked.insert(id, (now_ms, bytes));
        self.bytes += bytes;
    }

    /// It has said something of the block.
    pub fn answered(&mut self, id: u64) {
        if let Some((_, bytes)) = self.asked.remove(&id) {
            self.bytes -= bytes;
        }
    }

    /// What it did not answer in time is wanted again.
    pub fn give_up(&mut self, now_ms: u64) {
        let late = |(id, (asked_ms, _)): (&u64, &(u64, u64))| (now_ms >= asked_ms + ANSWER_LIMIT_MS).then_some(*id);
        for id in self.asked.iter().filter_map(late).collect::<Vec<_>>() {
            self.answered(id);
            self.wanted.insert(id);
        }
    }

    /// It has started anew and knows nothing of what it was asked.
    pub fn ask_again(&mut self) {
        self.wanted.extend(std::mem::take(&mut self.asked).into_keys());
        self.bytes = 0;
    }
}

/// A volume of a datanode.
#[derive(Default)]
pub struct Storage {
    /// UUID.
    pub id: String,
    /// [`pb::StorageType`] as a number.
    pub kind: i32,
    /// Its node.
    pub node: NodeIndex,
    /// Bytes.
    pub capacity: u64,
    /// Bytes.
    pub used: u64,
    /// Bytes.
    pub remaining: u64,
    /// Bytes promised to writers and copies since the last heartbeat.
    pub promised: u64,
    /// Number of that heartbeat: promises that were made before are in what it said of the disk.
    pub told: u64,
    /// Out of service: failed, or not named by the last registration.
    pub failed: bool,
    /// Whether a full report of it came since its node's registration.
    pub reported: bool,
    /// Blocks of which it holds anything.
    pub blocks: BlockSet,
}

/// All nodes and storages; indexes never change.
#[derive(Default)]
pub struct Nodes {
    /// Nodes by index.
    pub nodes: Vec<Node>,
    /// Storages by index.
    pub storages: Vec<Storage>,
    by_id: BTreeMap<String, NodeIndex>,
    storage_by_id: BTreeMap<String, StorageIndex>,
}

impl Storage {
    /// What was promised is void: from now on counts what the disk itself says.
    pub fn forget_promises(&mut self) {
        self.promised = 0;
        self.told += 1;
    }
}

impl Nodes {
    /// A node by its id.
    pub fn find(&self, id: &str) -> Option<NodeIndex> {
        self.by_id.get(id).copied()
    }

    /// A storage by its id.
    pub fn find_storage(&self, id: &str) -> Option<StorageIndex> {
        self.storage_by_id.get(id).copied()
    }

    /// A node by its index; indexes only come from here.
    #[inline]
    pub fn node(&self, index: NodeIndex) -> &Node {
        &self.nodes[index as usize]
    }

    /// The same for a change.
    #[inline]
    pub fn node_mut(&mut self, index: NodeIndex) -> &mut Node {
        &mut self.nodes[index as usize]
    }

    /// A storage by its index; indexes only come from here.
    #[inline]
    pub fn storage(&self, index: StorageIndex) -> &Storage {
        &self.storages[index as usize]
    }

    /// The same for a change.
    #[inline]
    pub fn storage_mut(&mut self, index: StorageIndex) -> &mut Storage {
        &mut self.storages[index as usize]
    }

    /// The node of a storage.
    #[inline]
    pub fn node_of(&self, storage: StorageIndex) -> &Node {
        self.node(self.storage(storage).node)
    }

    /// Whether replicas on this storage can be read.
    #[inline]
    pub fn is_live(&self, storage: StorageIndex) -> bool {
        let storage = self.storage(storage);
        !storage.failed && self.node(storage.node).alive
    }

    /// Adds or changes a node as the log says. Returns its index.
    pub fn put(&mut self, edit: &pb::EditRegisterNode) -> Result<NodeIndex, String> {
        for storage in &edit.storages {
            if let Some(known) = self.find_storage(&storage.storage_id) {
                let owner = self.node_of(known);
                if owner.id != edit.node_id && owner.alive {
                    return Err(format!("storage {} belongs to node {}", storage.storage_id, owner.id));
                }
            }
        }
        let index = match self.find(&edit.node_id) {
            Some(index) => index,
            None => {
                let index = self.nodes.len() as NodeIndex;
                self.nodes.push(Node { id: edit.node_id.clone(), ..Node::default() });
                self.by_id.insert(edit.node_id.clone(), index);
                index
            }
        };
        let node = self.node_mut(index);
        node.host.clone_from(&edit.host);
        node.address.clone_from(&edit.address);
        node.http_address.clone_from(&edit.http_address);
        node.rack.clone_from(&edit.rack);
        for storage in &edit.storages {
            self.put_storage(index, storage);
        }
        Ok(index)
    }

    fn put_storage(&mut self, node: NodeIndex, storage: &pb::EditStorage) {
        let index = match self.find_storage(&storage.storage_id) {
            Some(index) => index,
            None => {
                let index = self.storages.len() as StorageIndex;
                self.storages.push(Storage { id: storage.storage_id.clone(), node, ..Storage::default() });
                self.storage_by_id.insert(storage.storage_id.clone(), index);
                index
            }
        };
        let before = self.storage(index).node;
        if before != node {
            // The disk was moved to another machine.
            self.node_mut(before).storages.retain(|other| *other != index);
        }
        let entry = self.storage_mut(index);
        entry.kind = storage.storage_type as i32;
        entry.node = node;
        let list = &mut self.node_mut(node).storages;
        if !list.contains(&index) {
            list.push(index);
        }
    }

    /// What the log must hold of a node.
    pub fn as_edit(&self, index: NodeIndex) -> pb::EditRegisterNode {
        let node = self.node(index);
        pb::EditRegisterNode {
            node_id: node.id.clone(),
            host: node.host.clone(),
            address: node.address.clone(),
            http_address: node.http_address.clone(),
            rack: node.rack.clone(),
            storages: node
                .storages
                .iter()
                .map(|storage| self.storage(*storage))
                .map(|s| pb::EditStorage { storage_id: s.id.clone(), storage_type: s.kind as u32 })
                .collect(),
        }
    }

    /// How a client reaches a replica on this storage.
    pub fn replica(&self, storage: StorageIndex, state: pb::ReplicaState) -> pb::Replica {
        let entry = self.storage(storage);
        let node = self.node(entry.node);
        pb::Replica {
            node_id: node.id.clone(),
            host: node.host.clone(),
            address: node.address.clone(),
            rack: node.rack.clone(),
            storage_id: entry.id.clone(),
            storage_type: entry.kind,
            state: state as i32,
            http_port: node.http_address.rsplit_once(':').and_then(|(_, port)| port.parse().ok()).unwrap_or(0),
        }
    }

    /// A node as HDFS's clients name it: "HOST:PORT" or "IP:PORT" of its data port, or either without the port.
    pub fn find_by_name(&self, name: &str) -> Option<NodeIndex> {
        let is_it = |node: &Node| {
            let (ip, port) = node.address.rsplit_once(':').unwrap_or((&node.address, ""));
            let rest = name
                .strip_prefix(ip)
                .or_else(|| name.strip_prefix(node.host.as_str()).filter(|_| !node.host.is_empty()));
            rest.is_some_and(|rest| rest.is_empty() || rest.strip_prefix(':') == Some(port))
        };
        self.nodes.iter().position(is_it).map(|index| index as NodeIndex)
    }

    /// Nodes that can hold replicas.
    pub fn usable(&self) -> usize {
        let holds = |node: &&Node| node.alive && node.storages.iter().any(|at| !self.storage(*at).failed);
        self.nodes.iter().filter(holds).count()
    }

    /// Racks of nodes that are alive.
    pub fn live_racks(&self) -> usize {
        let mut racks: Vec<&str> = self.nodes.iter().filter(|node| node.alive).map(|node| &*node.rack).collect();
        racks.sort_unstable();
        racks.dedup();
        racks.len()
    }
}

/// Steps from one place of the topology to another: 0 on the same node, 2 in the same rack, 4 in the same data centre, ...
pub fn rack_distance(a: &str, b: &str) -> usize {
    let left: Vec<&str> = a.split('/').filter(|part| !part.is_empty()).collect();
    let right: Vec<&str> = b.split('/').filter(|part| !part.is_empty()).collect();
    let common = left.iter().zip(&right).take_while(|(a, b)| a == b).count();
    left.len() + right.len() - 2 * common + 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_covers_its_generation_and_older_ones_while_it_is_due() {
        let of = |generation| QueuedDeletion { block: 7, generation, storage: 1, depends_on: TxId(1), known: true };
        let mut deleting = Deleting::default();
        assert!(deleting.handed_out(of(5), 100));
        assert!(deleting.covers(7, 1, 5) && deleting.covers(7, 1, 4) && !deleting.covers(7, 1, 6));
        assert!(!deleting.covers(7, 2, 5) && !deleting.covers(8, 1, 5));
        assert!(!deleting.handed_out(of(4), 200), "the newer order takes the older replica, too");
        assert!(deleting.covers(7, 1, 5));
        assert!(deleting.handed_out(of(6), 200) && deleting.covers(7, 1, 6));
        let (late, count) = deleting.pop_late(200).unwrap();
        assert_eq!((late, count), (of(6), 2));
        assert!(deleting.contains(7, 1) && !deleting.covers(7, 1, 4), "it is doubtful, but nobody waits for it");
        assert!(deleting.handed_out(of(6), 300) && deleting.covers(7, 1, 6));
    }

    #[test]
    fn distance_follows_the_tree() {
        assert_eq!(rack_distance("/r1", "/r1"), 2);
        assert_eq!(rack_distance("/r1", "/r2"), 4);
        assert_eq!(rack_distance("/d1/r1", "/d1/r2"), 4);
        assert_eq!(rack_distance("/d1/r1", "/d2/r1"), 6);
    }

    #[test]
    fn a_disk_can_move_unless_its_node_lives() {
        let edit = |node: &str| pb::EditRegisterNode {
            node_id: node.into(),
            address: "127.0.0.1:9".into(),
            storages: vec![pb::EditStorage { storage_id: "s".into(), storage_type: 0 }],
            ..Default::default()
        };
        let mut nodes = Nodes::default();
        let first = nodes.put(&edit("a")).unwrap();
        nodes.node_mut(first).alive = true;
        assert!(nodes.put(&edit("b")).unwrap_err().contains("belongs to node a"));
        nodes.node_mut(first).alive = false;
        let second = nodes.put(&edit("b")).unwrap();
        assert_eq!((nodes.node(first).storages.len(), nodes.storage(0).node), (0, second));
        assert_eq!(nodes.node(second).ip(), "127.0.0.1");
    }
}

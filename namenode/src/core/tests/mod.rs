//! Scenarios over the whole core, with scripted datanodes.

mod appends;
mod generations;
mod leases;
mod merges;
mod model;
mod namespace;
mod nodes;
mod pipelines;
mod replay;
mod restore;
mod speed;
mod starts;
mod trash;
mod truncates;
mod turns;
mod writing;

use std::collections::BTreeMap;

use super::*;
use cairn_proto::pb::datanode_command::Command as Order;
use cairn_proto::pb::report_up::Report;

/// A replica on a scripted datanode: generation, length, state.
pub type Held = (u64, u64, pb::ReplicaState);

/// A scripted datanode with one storage `<id>-s`.
#[derive(Default, Clone)]
pub struct FakeNode {
    pub id: String,
    pub rack: String,
    pub registration: u64,
    pub stream: u64,
    pub held: BTreeMap<u64, Held>,
    pub up: bool,
    pub remaining: u64,
}

/// A core, its time, its log and its datanodes.
pub struct World {
    pub core: Core,
    pub now: Now,
    pub log: Vec<(TxId, pb::Edit)>,
    pub synced: TxId,
    pub nodes: Vec<FakeNode>,
    replies: BTreeMap<u64, (TxId, Result<Response, Error>)>,
    pub closed: Vec<u64>,
    pub orders: Vec<(String, Order)>,
    /// Orders that cannot be carried out are faults of the core. Not so where replicas vanish by themselves; there nothing
    /// reaches a datanode, or comes from one, before the log is synced.
    pub strict: bool,
    next: u64,
}

pub const BLOCK: u64 = 1 << 20;

pub fn settings() -> CoreSettings {
    CoreSettings { min_block_size: 512, default_block_size: BLOCK, ..CoreSettings::default() }
}

pub fn caller(user: &str) -> Caller {
    Caller { user: user.into(), groups: vec![user.into(), "users".into()], host: "10.9.9.9".into() }
}

impl World {
    pub fn new() -> Self {
        Self::with(settings())
    }

    pub fn with(settings: CoreSettings) -> Self {
        settings.validate().unwrap();
        let now = Now { mono_ms: 1_000_000, wall_ms: 1_700_000_000_000 };
        let mut commands = Vec::new();
        let mut core = Core::format(settings, "cluster", "pool", "root", "supergroup", now, &mut commands);
        core.start(now, Epoch(1), &mut commands);
        let mut world = Self {
            core,
            now,
            log: Vec::new(),
            synced: TxId(0),
            nodes: Vec::new(),
            replies: BTreeMap::new(),
            closed: Vec::new(),
            orders: Vec::new(),
            strict: true,
            next: 0,
        };
        world.take(commands);
        world.event(Event::Tick);
        world
    }

    fn take(&mut self, commands: Vec<Command>) {
        let mut appended = TxId(0);
        for command in commands {
            match command {
                Command::Append { txid, edit } => {
                    let expected = self.log.last().map_or(TxId(1), |(txid, _)| txid.next());
                    assert_eq!(txid, expected, "the log has a gap");
                    self.log.push((txid, edit));
                    appended = txid;
                }
                Command::Reply { to, depends_on, result } => {
                    assert!(depends_on >= appended, "a reply goes before its edit {appended}");
                    assert!(depends_on <= self.core.last_txid());
                    assert!(self.replies.insert(to.0, (depends_on, result)).is_none(), "answered twice");
                }
                Command::Report { depends_on, .. } => assert!(depends_on <= self.core.last_txid()),
                Command::CloseStream { stream, .. } => self.closed.push(stream.0),
            }
        }
    }

    pub fn event(&mut self, event: Event) {
        self.next += 1;
        let mut commands = Vec::new();
        self.core.on_event(self.now, self.next * 7_919, event, &mut commands);
        self.take(commands);
    }

    pub fn sync(&mut self) {
        self.synced = self.core.last_txid();
        self.event(Event::Synced { txid: self.synced });
    }

    /// Sends a call and gives its token.
    pub fn send(&mut self, user: &str, request: impl Into<ClientRequest>) -> u64 {
        let reply = self.next + 1;
        self.event(Event::Client { reply: ReplyTo(reply), caller: caller(user), request: request.into() });
        reply
    }

    pub fn answer(&mut self, reply: u64) -> Option<Result<Response, Error>> {
        self.replies.remove(&reply).map(|(_, result)| result)
    }

    /// Sends a call whose answer comes at once.
    pub fn call<T: TryFrom<ClientResponse>>(
        &mut self,
        user: &str,
        request: impl Into<ClientRequest>,
    ) -> Result<T, Error> {
        self.call_with(user, request).0
    }

    pub fn call_with<T: TryFrom<ClientResponse>>(
        &mut self,
        user: &str,
        request: impl Into<ClientRequest>,
    ) -> (Result<T, Error>, TxId) {
        let reply = self.send(user, request);
        let (depends_on, result) = self.replies.remove(&reply).expect("no answer");
        (result.map(typed), depends_on)
    }

    /// Time passes in steps of the heartbeat interval; nodes that are up say so and do what they are told.
    pub fn pass(&mut self, ms: u64) {
        let end = self.now.mono_ms + ms;
        while self.now.mono_ms < end {
            self.beat();
            self.step(500);
        }
    }

    pub fn step(&mut self, ms: u64) {
        self.now.mono_ms += ms;
        self.now.wall_ms += ms;
        self.event(Event::Tick);
        while self.core.has_work() {
            self.event(Event::Tick);
        }
    }

    pub fn node_up(&mut self, id: &str, rack: &str) -> usize {
        let at = match self.nodes.iter().position(|node| node.id == id) {
            Some(at) => at,
            None => {
                self.nodes.push(FakeNode { id: id.into(), remaining: 1 << 39, ..FakeNode::default() });
                self.nodes.len() - 1
            }
        };
        self.nodes[at].rack = rack.into();
        self.nodes[at].up = true;
        self.register(at).unwrap();
        self.open_stream(at);
        self.full_report(at);
        self.heartbeat(at).unwrap();
        at
    }

    fn infos(&self, at: usize) -> Vec<pb::StorageInfo> {
        let node = &self.nodes[at];
        vec![pb::StorageInfo {
            storage_id: format!("{}-s", node.id),
            capacity: 1 << 40,
            remaining: node.remaining,
            ..Default::default()
        }]
    }

    pub fn register(&mut self, at: usize) -> Result<pb::RegisterResponse, Error> {
        let node = &self.nodes[at];
        let request = pb::RegisterRequest {
            node_id: node.id.clone(),
            host: node.id.clone(),
            address: format!("10.0.0.{}:9866", at + 1),
            rack: node.rack.clone(),
            protocol_version: 1,
            storages: self.infos(at),
            ..Default::default()
        };
        let reply = self.next + 1;
        self.event(Event::Register { reply: ReplyTo(reply), peer_ip: "10.0.0.1".into(), request });
        match self.answer(reply).unwrap()? {
            Response::Register(response) => {
                self.nodes[at].registration = response.registration;
                Ok(response)
            }
            other => panic!("{other:?}"),
        }
    }

    pub fn open_stream(&mut self, at: usize) {
        let stream = 1_000_000 + self.next;
        self.nodes[at].stream = stream;
        let open = pb::ReportOpen { node_id: self.nodes[at].id.clone(), registration: self.nodes[at].registration };
        self.event(Event::ReportOpened { stream: StreamId(stream), open });
    }

    pub fn report(&mut self, at: usize, report: Report) {
        if !self.strict {
            self.sync();
        }
        let stream = StreamId(self.nodes[at].stream);
        self.event(Event::Report { stream, report: pb::ReportUp { report: Some(report) } });
    }

    pub fn full_report(&mut self, at: usize) {
        let node = self.nodes[at].clone();
        let replicas = node
            .held
            .iter()
            .map(|(id, (generation, length, state))| pb::ReplicaReport {
                id: *id as i64,
                generation: *generation,
                length: *length,
                state: *state as i32,
            })
            .collect();
        let range = pb::FullReportRange {
            storage_id: format!("{}-s", node.id),
            pool: "pool".into(),
            first_id: i64::MIN,
            last_id: i64::MAX,
            replicas,
            last_of_storage: true,
            last_of_report: true,
        };
        self.report(at, Report::Range(range));
    }

    /// The node holds this replica from now on, and says so.
    pub fn hold(&mut self, at: usize, id: u64, held: Held) {
        self.nodes[at].held.insert(id, held);
        self.tell(at, id, held, false);
    }

    /// The node reports a replica, and whether it has just read it.
    pub fn tell(&mut self, at: usize, id: u64, held: Held, verified: bool) {
        let replica = pb::ReplicaReport { id: id as i64, generation: held.0, length: held.1, state: held.2 as i32 };
        let storage_id = format!("{}-s", self.nodes[at].id);
        self.report(
            at,
            Report::Changed(pb::ReplicaChanged { storage_id, pool: "pool".into(), replica: Some(replica), verified }),
        );
    }

    pub fn remove(&mut self, at: usize, id: u64, generation: u64) {
        self.nodes[at].held.remove(&id);
        let storage_id = format!("{}-s", self.nodes[at].id);
        self.report(
            at,
            Report::Removed(pb::ReplicaRemoved { storage_id, pool: "pool".into(), id: id as i64, generation }),
        );
    }

    pub fn heartbeat(&mut self, at: usize) -> Result<Vec<Order>, Error> {
        if !self.strict {
            self.sync();
        }
        let request = pb::HeartbeatRequest {
            node_id: self.nodes[at].id.clone(),
            registration: self.nodes[at].registration,
            storages: self.infos(at),
            epoch: 1,
            ..Default::default()
        };
        let reply = self.next + 1;
        self.event(Event::Heartbeat { reply: ReplyTo(reply), request });
        match self.answer(reply).unwrap()? {
            Response::Heartbeat(response) => Ok(response.commands.into_iter().filter_map(|c| c.command).collect()),
            other => panic!("{other:?}"),
        }
    }

    /// Every node that is up sends a heartbeat and does what it is told.
    pub fn beat(&mut self) {
        for at in 0..self.nodes.len() {
            if !self.nodes[at].up {
                continue;
            }
            let orders = match self.heartbeat(at) {
                Ok(orders) => orders,
                Err(error) => {
                    assert_eq!(error.code(), ErrorCode::NotRegistered);
                    self.register(at).unwrap();
                    self.open_stream(at);
                    self.full_report(at);
                    continue;
                }
            };
            for order in orders {
                self.orders.push((self.nodes[at].id.clone(), order.clone()));
                self.obey(at, order);
            }
        }
    }

    pub fn obey(&mut self, at: usize, order: Order) {
        match order {
            Order::FullReport(_) => self.full_report(at),
            Order::Delete(pb::DeleteReplicas { replicas }) | Order::Quarantine(pb::QuarantineReplicas { replicas }) => {
                for replica in replicas {
                    let block = replica.block.unwrap();
                    let id = block.id as u64;
                    if self.nodes[at].held.get(&id).is_some_and(|held| held.0 <= block.generation) {
                        self.remove(at, id, block.generation);
                    }
                }
            }
            Order::Replicate(copy) => {
                let block = copy.block.unwrap();
                let id = block.id as u64;
                let whole = (block.generation, copy.length, pb::ReplicaState::Finalized);
                if !self.strict && self.nodes[at].held.get(&id) != Some(&whole) {
                    return;
                }
                assert!(self.nodes[at].held.contains_key(&id), "the source does not hold block {id}");
                for target in copy.targets {
                    let to = self.nodes.iter().position(|node| node.id == target.node_id).unwrap();
                    let has = self.nodes[to].held.contains_key(&id);
                    assert!(!has || !self.strict, "the target holds block {id} already");
                    if self.nodes[to].up && !has {
                        self.hold(to, id, (block.generation, copy.length, pb::ReplicaState::Finalized));
                    }
                }
            }
            Order::Recover(recover) => self.recover(at, &recover),
            Order::Merge(merge) => {
                let block = merge.block.unwrap();
                for target in merge.targets {
                    let to = self.nodes.iter().position(|node| node.id == target.node_id).unwrap();
                    if self.nodes[to].up {
                        let held = (block.generation, merge.length, pb::ReplicaState::Finalized);
                        self.hold(to, block.id as u64, held);
                    }
                }
            }
            Order::Verify(order) => {
                for replica in order.replicas {
                    let id = replica.block.unwrap().id as u64;
                    if let Some(held) = self.nodes[at].held.get(&id).copied() {
                        self.tell(at, id, held, held.2 == pb::ReplicaState::Finalized);
                    }
                }
            }
        }
    }

    /// Brings all replicas of an abandoned block to the shortest length.
    fn recover(&mut self, at: usize, order: &pb::RecoverBlock) {
        let id = order.block.as_ref().unwrap().id as u64;
        let names: Vec<String> = order.replicas.iter().map(|replica| replica.node_id.clone()).collect();
        let have: Vec<usize> = (0..self.nodes.len())
            .filter(|at| self.nodes[*at].up && names.contains(&self.nodes[*at].id))
            .filter(|at| self.nodes[*at].held.get(&id).is_some_and(|held| held.2 != pb::ReplicaState::ReplicaCorrupt))
            .collect();
        let shortest = have.iter().map(|at| self.nodes[*at].held[&id].1).min();
        let Some(length) = shortest.map(|shortest| order.truncate_to.unwrap_or(shortest)) else { return };
        for at in &have {
            self.hold(*at, id, (order.new_generation, length, pb::ReplicaState::Finalized));
        }
        let storage_ids = have.iter().map(|at| format!("{}-s", self.nodes[*at].id)).collect();
        let (block, new_generation) = (order.block.clone(), order.new_generation);
        self.report(at, Report::Recovered(pb::BlockRecovered { block, new_generation, length, storage_ids }));
    }

    pub fn at(&self, id: &str) -> usize {
        self.nodes.iter().position(|node| node.id == id).unwrap()
    }

    pub fn create(&mut self, path: &str, replication: u32) -> Result<pb::FileStatus, Error> {
        let request = pb::CreateRequest {
            path: path.into(),
            permission: 0o644,
            replication,
            create_parents: true,
            client_name: "writer".into(),
            ..Default::default()
        };
        self.call::<pb::CreateResponse>("root", request).map(|response| response.status.unwrap())
    }

    pub fn add_block(
        &mut self,
        inode: u64,
        index: u32,
        committed: &[(u64, u64, u64)],
    ) -> Result<pb::LocatedBlock, Error> {
        let request = pb::AddBlockRequest {
            inode,
            client_name: "writer".into(),
            block_index: index,
            committed: commits(committed),
            ..Default::default()
        };
        self.call::<pb::AddBlockResponse>("root", request).map(|response| response.block.unwrap())
    }

    pub fn complete(&mut self, inode: u64, committed: &[(u64, u64, u64)]) -> u64 {
        let request =
            pb::CompleteRequest { inode, client_name: "writer".into(), committed: commits(committed), call: None };
        self.send("root", request)
    }

    /// Writes a whole file of one-megabyte blocks through the scripted datanodes; returns its blocks.
    pub fn write(&mut self, path: &str, replication: u32, blocks: u32) -> Vec<u64> {
        let inode = self.create(path, replication).unwrap().inode;
        let mut committed = Vec::new();
        for index in 0..blocks {
            let located = self.add_block(inode, index, &committed).unwrap();
            let block = located.block.unwrap();
            for replica in &located.replicas {
                let at = self.at(&replica.node_id);
                self.hold(at, block.id as u64, (block.generation, BLOCK, pb::ReplicaState::Finalized));
            }
            committed.push((block.id as u64, block.generation, BLOCK));
        }
        let reply = self.complete(inode, &committed);
        self.answer(reply).expect("complete waits").unwrap();
        committed.iter().map(|(id, _, _)| *id).collect()
    }

    pub fn status(&mut self, path: &str) -> Result<pb::FileStatus, Error> {
        let request = pb::GetStatusRequest { path: path.into() };
        self.call::<pb::GetStatusResponse>("root", request).map(|response| response.status.unwrap())
    }

    pub fn locations(&mut self, path: &str) -> Vec<pb::LocatedBlock> {
        let request = pb::GetBlockLocationsRequest { path: path.into(), offset: 0, length: 0 };
        self.call::<pb::GetBlockLocationsResponse>("root", request).unwrap().blocks
    }

    pub fn cluster(&mut self) -> pb::ClusterReportResponse {
        self.call("root", pb::ClusterReportRequest {}).unwrap()
    }

    pub fn mkdirs(&mut self, user: &str, path: &str, permission: u32) -> Result<pb::FileStatus, Error> {
        let request = pb::MkdirsRequest { path: path.into(), permission, create_parents: true, call: None };
        self.call::<pb::MkdirsResponse>(user, request).map(|response| response.status.unwrap())
    }

    pub fn delete(&mut self, user: &str, path: &str, recursive: bool) -> Result<bool, Error> {
        let request = pb::DeleteRequest { path: path.into(), recursive, ..Default::default() };
        self.call::<pb::DeleteResponse>(user, request).map(|response| response.existed)
    }

    pub fn rename(&mut self, user: &str, from: &str, to: &str, mode: pb::RenameMode) -> Result<(), Error> {
        let request = pb::RenameRequest { from: from.into(), to: to.into(), mode: mode as i32, call: None };
        self.call::<pb::RenameResponse>(user, request).map(|_| ())
    }

    /// Everything in the namespace, in order.
    pub fn walk(&mut self) -> Vec<pb::FileStatus> {
        let mut all = vec![self.status("/").unwrap()];
        let mut at = 0;
        while at < all.len() {
            if all[at].kind() == pb::FileKind::Directory {
                let path = all[at].path.clone();
                let mut after = bytes::Bytes::new();
                loop {
                    let request = pb::ListRequest {
                        path: path.clone(),
                        start_after: after.clone(),
                        limit: 3,
                        with_locations: true,
                    };
                    let page: pb::ListResponse = self.call("root", request).unwrap();
                    let Some(last) = page.entries.last() else { break };
                    after = last.path.rsplit('/').next().unwrap().to_owned().into();
                    all.extend(page.entries);
                    if page.remaining == 0 {
                        break;
                    }
                }
            }
            at += 1;
        }
        all.sort_by(|a, b| a.path.cmp(&b.path));
        all
    }

    /// The namenode ends and starts again from its log. Datanodes stay.
    pub fn restart(&mut self) {
        let mut core = Core::new_for_load(self.core.settings().clone());
        for (txid, edit) in &self.log {
            core.replay(*txid, edit.clone()).unwrap();
        }
        self.restart_with(core);
    }

    pub fn restart_with(&mut self, core: Core) {
        self.core = core;
        self.now.mono_ms += 50_000;
        let mut commands = Vec::new();
        self.core.start(self.now, Epoch(1), &mut commands);
        self.take(commands);
    }
}

fn typed<T: TryFrom<ClientResponse>>(response: Response) -> T {
    match response {
        Response::Client(response) => T::try_from(response).ok().expect("another answer"),
        other => panic!("{other:?}"),
    }
}

pub fn commits(blocks: &[(u64, u64, u64)]) -> Vec<pb::CommittedBlock> {
    blocks
        .iter()
        .map(|(id, generation, length)| pb::CommittedBlock {
            block: Some(pb::Block { pool: "pool".into(), id: *id as i64, generation: *generation }),
            length: *length,
        })
        .collect()
}

pub fn code<T>(result: Result<T, Error>) -> ErrorCode {
    result.err().expect("it worked").code()
}

/// Three racks with two nodes each.
pub fn cluster() -> World {
    let mut world = World::new();
    for (at, rack) in ["/r0", "/r0", "/r1", "/r1", "/r2", "/r2"].into_iter().enumerate() {
        world.node_up(&format!("n{at}"), rack);
    }
    world
}

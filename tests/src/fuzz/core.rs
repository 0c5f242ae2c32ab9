//! The namenode's core: edits that a log could hold, requests that a client or datanode could send, pages of an image.

#![allow(clippy::needless_update, reason = "messages get new fields, which the recipes then leave alone")]

use std::collections::{BTreeMap, BTreeSet};

use cairn_namenode::core::{
    Caller, ClientRequest, ClientResponse, Command, Core, CoreSettings, Event, Now, ReplyTo, Response, StreamId,
};
use cairn_proto::ids::{BlockId, Epoch, InodeId, TxId};
use cairn_proto::pb;
use cairn_proto::pb::edit::Kind;
use cairn_proto::pb::report_up::Report;
use prost::Message;

use super::input::Input;

const START: Now = Now { mono_ms: 1_000_000, wall_ms: 1_700_000_000_000 };
const PATHS: [&str; 20] = [
    "/",
    "/a",
    "/a/b",
    "/a/b/c",
    "/a/d",
    "/e",
    "/e/f",
    "/e/g",
    "/é",
    "/user/root/.Trash",
    "/user/root/.Trash/Current",
    "/.cairn/x",
    "/.reserved",
    "/a/.snapshot",
    "",
    "a",
    "//a",
    "/a/../b",
    "/a:b",
    "/a\0",
];
const USERS: [&str; 4] = ["root", "ann", "bob", ""];
const NODES: [&str; 5] = ["n0", "n1", "n2", "n3", ""];

fn settings() -> CoreSettings {
    CoreSettings { min_block_size: 512, default_block_size: 1 << 20, cursor_budget: 7, ..CoreSettings::default() }
}

fn pick(input: &mut Input<'_>, choices: &[&str]) -> String {
    (*input.pick(choices)).to_owned()
}

/// The pages of the state, loaded again, are the state.
fn check_image(core: &mut Core) {
    let txid = core.checkpoint_begin();
    let digest = core.digest();
    let mut pages = Vec::new();
    while !core.checkpoint_slice(1, &mut pages) {}
    let mut other = Core::new_for_load(settings());
    for page in pages.iter().rev() {
        other.load_page(page).unwrap();
    }
    other.finish_load(txid).unwrap();
    assert_eq!((other.digest(), other.last_txid()), (digest, txid));
}

/// Numbers that edits name, near those that are right.
struct Known {
    inode: u64,
    block: u64,
    generation: u64,
    epoch: u64,
}

impl Known {
    fn near(input: &mut Input<'_>, base: u64, last: u64) -> u64 {
        match input.byte() {
            back @ 0..180 => last.saturating_sub(u64::from(back % 8)).max(base),
            180..200 => base,
            _ => input.number(),
        }
    }

    fn inode(&self, input: &mut Input<'_>) -> u64 {
        Self::near(input, InodeId::ROOT.0, self.inode)
    }

    fn block(&self, input: &mut Input<'_>) -> i64 {
        Self::near(input, BlockId::BASE.0 as u64 + 1, self.block) as i64
    }

    fn generation(&self, input: &mut Input<'_>) -> u64 {
        Self::near(input, 1_001, self.generation)
    }

    fn fresh(input: &mut Input<'_>, last: u64) -> u64 {
        if input.byte() < 220 { last.saturating_add(1) } else { input.number() }
    }

    fn lengths(&self, input: &mut Input<'_>) -> Vec<pb::EditBlockLength> {
        (0..input.byte() % 3)
            .map(|_| pb::EditBlockLength {
                block_id: self.block(input),
                generation: self.generation(input),
                length: input.number(),
            })
            .collect()
    }

    fn edit(&self, input: &mut Input<'_>) -> Kind {
        let name =
            |input: &mut Input<'_>| input.pick(&[&b"a"[..], b"b", b"c", b"", b"..", b"\xff", b"x/y"]).to_vec().into();
        let text = |input: &mut Input<'_>| pick(input, &USERS);
        match input.byte() % 17 {
            0 => Kind::Mkdir(pb::EditMkdir {
                inode: Self::fresh(input, self.inode),
                parent: self.inode(input),
                name: name(input),
                owner: text(input),
                group: text(input),
                permission: input.number() as u32,
                ..Default::default()
            }),
            1 | 2 => Kind::Create(pb::EditCreate {
                inode: Self::fresh(input, self.inode),
                parent: self.inode(input),
                name: name(input),
                owner: text(input),
                group: text(input),
                permission: input.number() as u32,
                replication: input.number() as u32,
                block_size: if input.flag() { 1 << 20 } else { input.number() },
                client_name: pick(input, &["w1", "w2", ""]),
                replaces: if input.flag() { 0 } else { self.inode(input) },
                ..Default::default()
            }),
            3 | 4 => Kind::AddBlock(pb::EditAddBlock {
                inode: self.inode(input),
                block_id: Self::fresh(input, self.block) as i64,
                generation: Self::fresh(input, self.generation),
                index: input.byte() as u32 % 4,
                ..Default::default()
            }),
            5 => Kind::AbandonBlock(pb::EditAbandonBlock {
                inode: self.inode(input),
                block_id: self.block(input),
                ..Default::default()
            }),
            6 => Kind::UpdateBlock(pb::EditUpdateBlock {
                inode: self.inode(input),
                block_id: self.block(input),
                generation: self.generation(input),
                length: input.number(),
                ..Default::default()
            }),
            7 => Kind::CommitBlocks(pb::EditCommitBlocks {
                inode: self.inode(input),
                blocks: self.lengths(input),
                ..Default::default()
            }),
            8 => Kind::Close(pb::EditClose {
                inode: self.inode(input),
                blocks: self.lengths(input),
                ..Default::default()
            }),
            9 => Kind::Rename(pb::EditRename {
                inode: self.inode(input),
                from_parent: self.inode(input),
                to_parent: self.inode(input),
                to_name: name(input),
                replaces: if input.flag() { 0 } else { self.inode(input) },
                ..Default::default()
            }),
            10 => Kind::Delete(pb::EditDelete {
                inode: self.inode(input),
                parent: self.inode(input),
                ..Default::default()
            }),
            11 => Kind::SetAttributes(pb::EditSetAttributes {
                inode: self.inode(input),
                permission: input.flag().then(|| input.number() as u32),
                owner: input.flag().then(|| text(input)),
                group: input.flag().then(|| text(input)),
                modified_ms: input.flag().then(|| input.number()),
                accessed_ms: input.flag().then(|| input.number()),
                replication: input.flag().then(|| input.number() as u32),
                ..Default::default()
            }),
            12 => Kind::Lease(pb::EditLease {
                inode: self.inode(input),
                holder: pick(input, &["w3", ""]),
                ..Default::default()
            }),
            15 => Kind::Append(pb::EditAppend {
                inode: self.inode(input),
                holder: pick(input, &["w1", ""]),
                ..Default::default()
            }),
            16 => Kind::RenewBlock(pb::EditRenewBlock {
                inode: self.inode(input),
                block_id: self.block(input),
                generation: Self::fresh(input, self.generation),
                ..Default::default()
            }),
            13 => Kind::RegisterNode(pb::EditRegisterNode {
                node_id: pick(input, &NODES),
                host: text(input),
                address: "127.0.0.1:1".into(),
                rack: pick(input, &["/r1", "/r2", "", "r", "/a/b"]),
                storages: (0..input.byte() % 3)
                    .map(|_| pb::EditStorage {
                        storage_id: pick(input, &["s1", "s2", "s3", ""]),
                        storage_type: input.number() as u32,
                    })
                    .collect(),
                ..Default::default()
            }),
            _ => match input.byte() % 3 {
                0 => Kind::Epoch(pb::EditEpoch { epoch: Self::fresh(input, self.epoch), ..Default::default() }),
                1 => Kind::AllocateGeneration(pb::EditAllocateGeneration {
                    inode: self.inode(input),
                    block_id: self.block(input),
                    generation: Self::fresh(input, self.generation),
                }),
                _ => Kind::Format(pb::EditFormat {
                    cluster_id: text(input),
                    superuser: text(input),
                    ..Default::default()
                }),
            },
        }
    }

    fn learn(&mut self, kind: &Kind) {
        match kind {
            Kind::Mkdir(e) => self.inode = e.inode,
            Kind::Create(e) => self.inode = e.inode,
            Kind::AddBlock(e) => (self.block, self.generation) = (e.block_id as u64, e.generation),
            Kind::AllocateGeneration(e) => self.generation = e.generation,
            Kind::RenewBlock(e) => self.generation = self.generation.max(e.generation),
            Kind::Epoch(e) => self.epoch = e.epoch,
            _ => {}
        }
    }
}

/// Edits that are well formed and perhaps nonsense: applied, or refused without a trace; what came of them survives an image.
pub fn replay(data: &[u8]) {
    let mut commands = Vec::new();
    let mut formatted = Core::format(settings(), "cluster", "pool", "root", "supergroup", START, &mut commands);
    formatted.start(START, Epoch(1), &mut commands);
    let mut core = Core::new_for_load(settings());
    for command in commands {
        if let Command::Append { txid, edit } = command {
            core.replay(txid, edit).unwrap();
        }
    }
    let mut known = Known { inode: InodeId::ROOT.0, block: BlockId::BASE.0 as u64, generation: 1_000, epoch: 1 };
    let mut input = Input::new(data);
    let raw = input.flag();
    for _ in 0..150 {
        if input.is_empty() {
            break;
        }
        let edit = if raw {
            let length = usize::from(input.byte());
            let Ok(edit) = pb::Edit::decode(input.take(length)) else { continue };
            edit
        } else {
            let kind = known.edit(&mut input);
            let client_id = if input.byte() < 200 { Vec::new() } else { vec![input.byte(); 16] };
            pb::Edit {
                min_reader: 1,
                client_id: client_id.into(),
                call_id: input.number(),
                time_ms: input.number(),
                kind: Some(kind),
            }
        };
        let (before, last) = (core.digest(), core.last_txid());
        match core.replay(last.next(), edit.clone()) {
            Ok(()) => {
                assert_eq!(core.last_txid(), last.next());
                edit.kind.iter().for_each(|kind| known.learn(kind));
            }
            Err(error) => {
                assert!(!error.cause.is_empty() && error.txid == last.next());
                assert_eq!((core.digest(), core.last_txid()), (before, last), "a refused edit left a trace: {error}");
            }
        }
        assert!(core.replay(last, edit).is_err(), "a transaction was applied twice");
    }
    check_image(&mut core);
}

/// A core with its log, whatever its clients and datanodes ask.
struct Cluster {
    core: Core,
    now: Now,
    log: Vec<(TxId, pb::Edit)>,
    asked: BTreeSet<u64>,
    next: u64,
    registrations: BTreeMap<String, u64>,
    inodes: Vec<u64>,
    blocks: Vec<pb::Block>,
}

impl Cluster {
    fn new() -> Self {
        let mut commands = Vec::new();
        let mut core = Core::format(settings(), "cluster", "pool", "root", "supergroup", START, &mut commands);
        core.start(START, Epoch(1), &mut commands);
        let mut cluster = Self {
            core,
            now: START,
            log: Vec::new(),
            asked: BTreeSet::new(),
            next: 0,
            registrations: BTreeMap::new(),
            inodes: vec![0],
            blocks: vec![pb::Block::default()],
        };
        cluster.take(commands);
        cluster.event(Event::Tick);
        cluster
    }

    fn event(&mut self, event: Event) {
        let mut commands = Vec::new();
        self.next += 1;
        self.core.on_event(self.now, self.next, event, &mut commands);
        self.take(commands);
    }

    fn take(&mut self, commands: Vec<Command>) {
        for command in commands {
            match command {
                Command::Append { txid, edit } => {
                    assert_eq!(txid, self.log.last().map_or(TxId(1), |(last, _)| last.next()), "the log has a gap");
                    self.log.push((txid, edit));
                }
                Command::Reply { to, depends_on, result } => {
                    assert!(self.asked.remove(&to.0), "answered twice, or without having been asked");
                    assert!(depends_on <= self.core.last_txid());
                    match result {
                        Ok(response) => self.learn(response),
                        Err(error) => assert!(!error.message().is_empty() && error.message().len() < 20_000),
                    }
                }
                Command::Report { depends_on, .. } => assert!(depends_on <= self.core.last_txid()),
                Command::CloseStream { .. } => {}
            }
        }
    }

    fn learn(&mut self, response: Response) {
        match response {
            Response::Client(ClientResponse::Create(response)) => {
                self.inodes.extend(response.status.map(|status| status.inode));
            }
            Response::Client(ClientResponse::AddBlock(response)) => {
                self.blocks.extend(response.block.and_then(|located| located.block));
            }
            Response::Client(ClientResponse::NewGeneration(response)) => {
                if let Some(mut block) = self.blocks.last().cloned() {
                    block.generation = response.generation;
                    self.blocks.push(block);
                }
            }
            _ => {}
        }
    }

    fn ask(&mut self) -> ReplyTo {
        self.asked.insert(self.next + 1);
        ReplyTo(self.next + 1)
    }

    fn inode(&self, input: &mut Input<'_>) -> u64 {
        if input.byte() < 230 {
            self.inodes[self.inodes.len() - 1 - usize::from(input.byte()) % self.inodes.len().min(4)]
        } else {
            input.number()
        }
    }

    fn block(&self, input: &mut Input<'_>) -> Option<pb::Block> {
        let last = self.blocks.len() - 1;
        let mut block = self.blocks[last - usize::from(input.byte()) % self.blocks.len().min(4)].clone();
        match input.byte() {
            0..200 => {}
            200..220 => block.generation = block.generation.wrapping_add(1),
            220..230 => block.generation = input.number(),
            230..240 => block.id = input.number() as i64,
            240..250 => block.pool = pick(input, &["pool", "", "other"]),
            _ => return None,
        }
        Some(block)
    }

    fn committed(&self, input: &mut Input<'_>) -> Vec<pb::CommittedBlock> {
        (0..input.byte() % 3).map(|_| pb::CommittedBlock { block: self.block(input), length: input.number() }).collect()
    }

    fn request(&self, input: &mut Input<'_>) -> ClientRequest {
        let path = |input: &mut Input<'_>| match input.byte() {
            255 => "/x".repeat(usize::from(input.short()) % 5_000),
            at => PATHS[usize::from(at) % PATHS.len()].to_owned(),
        };
        let call = match input.byte() {
            0..120 => None,
            client => Some(pb::CallContext {
                client_id: vec![client % 3; if client < 250 { 16 } else { 3 }].into(),
                call_id: u64::from(input.byte() % 16),
                lowest_unanswered: if client < 200 { 0 } else { input.number() },
                seen_txid: if client < 240 { 0 } else { input.number() },
                ..Default::default()
            }),
        };
        let writer = |input: &mut Input<'_>| pick(input, &["w1", "w1", "w1", "w2", ""]);
        match input.byte() % 26 {
            0 | 1 => pb::CreateRequest {
                call,
                path: path(input),
                permission: input.number() as u32,
                replication: if input.flag() { 0 } else { input.number() as u32 },
                block_size: if input.flag() { 0 } else { input.number() },
                overwrite: input.flag(),
                create_parents: input.flag(),
                client_name: writer(input),
                ..Default::default()
            }
            .into(),
            2 | 3 => pb::AddBlockRequest {
                call,
                inode: self.inode(input),
                client_name: writer(input),
                committed: self.committed(input),
                exclude_nodes: (0..input.byte() % 3).map(|_| pick(input, &NODES)).collect(),
                block_index: u32::from(input.byte() % 4),
                local_node: pick(input, &NODES),
                ..Default::default()
            }
            .into(),
            4 => pb::AbandonBlockRequest {
                call,
                inode: self.inode(input),
                client_name: writer(input),
                block: self.block(input),
                ..Default::default()
            }
            .into(),
            5 => pb::NewGenerationRequest {
                call,
                inode: self.inode(input),
                client_name: writer(input),
                block: self.block(input),
                ..Default::default()
            }
            .into(),
            6 => pb::UpdatePipelineRequest {
                call,
                inode: self.inode(input),
                client_name: writer(input),
                block: self.block(input),
                new_generation: self.blocks.last().map_or(0, |block| block.generation),
                nodes: (0..input.byte() % 4)
                    .map(|_| pb::PipelineNode {
                        node_id: pick(input, &NODES),
                        storage_id: pick(input, &["n0-s", "n1-s", "x"]),
                    })
                    .collect(),
                ..Default::default()
            }
            .into(),
            7 => pb::CompleteRequest {
                call,
                inode: self.inode(input),
                client_name: writer(input),
                committed: self.committed(input),
                ..Default::default()
            }
            .into(),
            8 => pb::RenewLeaseRequest { client_name: writer(input), ..Default::default() }.into(),
            9 => pb::GetStatusRequest { path: path(input), ..Default::default() }.into(),
            10 => pb::ListRequest {
                path: path(input),
                start_after: input.pick(&[&b""[..], b"a", b"\xff", b"b"]).to_vec().into(),
                limit: input.number() as u32,
                with_locations: input.flag(),
                ..Default::default()
            }
            .into(),
            11 => pb::GetBlockLocationsRequest { path: path(input), offset: input.number(), length: input.number() }
                .into(),
            12 => pb::ContentSummaryRequest { path: path(input), ..Default::default() }.into(),
            13 => pb::MkdirsRequest {
                call,
                path: path(input),
                permission: input.number() as u32,
                create_parents: input.flag(),
                ..Default::default()
            }
            .into(),
            14 | 15 => pb::RenameRequest {
                call,
                from: path(input),
                to: path(input),
                mode: input.number() as i32,
                ..Default::default()
            }
            .into(),
            16 => pb::DeleteRequest { call, path: path(input), recursive: input.flag(), ..Default::default() }.into(),
            17 => pb::SetPermissionRequest {
                call,
                path: path(input),
                permission: input.number() as u32,
                ..Default::default()
            }
            .into(),
            18 => {
                pb::SetOwnerRequest { call, path: path(input), owner: pick(input, &USERS), group: pick(input, &USERS) }
                    .into()
            }
            19 => pb::SetTimesRequest {
                call,
                path: path(input),
                modified_ms: input.flag().then(|| input.number()),
                accessed_ms: input.flag().then(|| input.number()),
                ..Default::default()
            }
            .into(),
            20 => pb::SetReplicationRequest {
                call,
                path: path(input),
                replication: input.number() as u32,
                ..Default::default()
            }
            .into(),
            21 => pb::ReportBadReplicaRequest {
                block: self.block(input),
                node_id: pick(input, &NODES),
                storage_id: pick(input, &["n0-s", "", "x"]),
                reason: path(input),
                ..Default::default()
            }
            .into(),
            22 => pb::SafeModeRequest { action: input.number() as i32, ..Default::default() }.into(),
            23 => {
                pb::AppendRequest { call, path: path(input), client_name: writer(input), ..Default::default() }.into()
            }
            24 => pb::RecoverLeaseRequest { path: path(input), only_of: writer(input), ..Default::default() }.into(),
            _ => match input.flag() {
                true => pb::ClusterReportRequest {}.into(),
                false => pb::GetServerDefaultsRequest {}.into(),
            },
        }
    }

    fn storages(&self, input: &mut Input<'_>, node: &str) -> Vec<pb::StorageInfo> {
        (0..input.byte() % 3)
            .map(|number| pb::StorageInfo {
                storage_id: if number == 0 { format!("{node}-s") } else { pick(input, &["n0-s", "x", ""]) },
                storage_type: input.byte().into(),
                capacity: if input.byte() < 200 { 1 << 40 } else { input.number() },
                used: input.number(),
                remaining: if input.byte() < 200 { 1 << 39 } else { input.number() },
                blocks: input.number(),
                failure: pick(input, &["", "", "", "broken"]),
            })
            .collect()
    }

    fn registration(&self, input: &mut Input<'_>, node: &str) -> u64 {
        if input.byte() < 230 { self.registrations.get(node).copied().unwrap_or(0) } else { input.number() }
    }

    fn node_event(&mut self, input: &mut Input<'_>) {
        let node = pick(input, &NODES);
        let storages = self.storages(input, &node);
        if input.byte().is_multiple_of(3) {
            let request = pb::RegisterRequest {
                node_id: node.clone(),
                host: pick(input, &["h1", "h2", ""]),
                address: pick(input, &["10.0.0.1:9866", "10.0.0.2:9866", "0.0.0.0:1", "x", ""]),
                rack: pick(input, &["/r1", "/r2", "", "/r1/r2", "r", "/"]),
                cluster_id: pick(input, &["", "cluster", "cluster", "other"]),
                pool_id: pick(input, &["", "pool", "pool", "other"]),
                protocol_version: if input.byte() < 250 { 1 } else { input.number() as u32 },
                epoch: if input.byte() < 240 { 1 } else { input.number() },
                storages,
                task_slots: input.number() as u32,
                ..Default::default()
            };
            let reply = self.ask();
            let mut commands = Vec::new();
            self.next += 1;
            let event = Event::Register { reply, peer_ip: "10.0.0.9".into(), request };
            self.core.on_event(self.now, self.next, event, &mut commands);
            for command in &commands {
                if let Command::Reply { result: Ok(Response::Register(response)), .. } = command {
                    self.registrations.insert(node.clone(), response.registration);
                }
            }
            self.take(commands);
            return;
        }
        let request = pb::HeartbeatRequest {
            registration: self.registration(input, &node),
            node_id: node,
            storages,
            active_transfers: input.number() as u32,
            task_slots: input.number() as u32,
            tasks_running: input.number() as u32,
            epoch: if input.byte() < 240 { 1 } else { input.number() },
        };
        let reply = self.ask();
        self.event(Event::Heartbeat { reply, request });
    }

    fn replica(&self, input: &mut Input<'_>) -> pb::ReplicaReport {
        let block = self.block(input).unwrap_or_default();
        pb::ReplicaReport {
            id: block.id,
            generation: block.generation,
            length: input.number(),
            state: i32::from(input.byte() % 6),
        }
    }

    fn report_event(&mut self, input: &mut Input<'_>) {
        let stream = StreamId(u64::from(input.byte() % 6));
        let storage_id = pick(input, &["n0-s", "n1-s", "n2-s", "x", ""]);
        let pool = if input.byte() < 250 { "pool".to_owned() } else { String::new() };
        let report = match input.byte() % 8 {
            0 | 1 => {
                let node_id = pick(input, &NODES);
                let open = pb::ReportOpen { registration: self.registration(input, &node_id), node_id };
                self.event(Event::ReportOpened { stream, open });
                return;
            }
            2 if input.byte() < 40 => return self.event(Event::ReportClosed { stream }),
            2 | 3 => Report::Changed(pb::ReplicaChanged { storage_id, pool, replica: Some(self.replica(input)) }),
            4 => {
                let replica = self.replica(input);
                Report::Removed(pb::ReplicaRemoved { storage_id, pool, id: replica.id, generation: replica.generation })
            }
            5 | 6 => Report::Range(pb::FullReportRange {
                storage_id,
                pool,
                first_id: if input.flag() { i64::MIN } else { input.number() as i64 },
                last_id: if input.flag() { i64::MAX } else { input.number() as i64 },
                replicas: (0..input.byte() % 4).map(|_| self.replica(input)).collect(),
                last_of_storage: input.flag(),
                last_of_report: input.flag(),
                ..Default::default()
            }),
            _ => Report::Recovered(pb::BlockRecovered {
                block: self.block(input),
                new_generation: self.blocks.last().map_or(0, |block| block.generation),
                length: input.number(),
                storage_ids: (0..input.byte() % 4).map(|_| pick(input, &["n0-s", "n1-s", "x"])).collect(),
                ..Default::default()
            }),
        };
        let report = if input.byte() < 250 { Some(report) } else { None };
        self.event(Event::Report { stream, report: pb::ReportUp { report } });
    }

    fn pass(&mut self, ms: u64) {
        self.now.mono_ms = self.now.mono_ms.saturating_add(ms);
        self.now.wall_ms = self.now.wall_ms.saturating_add(ms);
        self.event(Event::Tick);
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.byte() % 8 {
            0..4 => {
                let request = self.request(input);
                let user = pick(input, &USERS);
                let caller = Caller { groups: vec![user.clone()], user, host: "10.0.0.9".into() };
                let reply = self.ask();
                self.event(Event::Client { reply, caller, request });
            }
            4 => self.node_event(input),
            5 | 6 => self.report_event(input),
            _ => match input.byte() % 8 {
                0 => self.event(Event::Synced { txid: self.core.last_txid() }),
                1 => self.event(Event::EpochRaised { epoch: Epoch(u64::from(input.byte())) }),
                2 => self.pass(400_000),
                _ => self.pass(u64::from(input.byte()) * 20),
            },
        }
    }
}

/// Whatever clients and datanodes send: no panic, each call answered once, a log without gaps that makes the same state again, and an image that does.
pub fn core_events(data: &[u8]) {
    let mut input = Input::new(data);
    let mut cluster = Cluster::new();
    for at in 0..3u8 {
        cluster.node_event(&mut Input::new(&[at, 1, at, 0, 0, 0, 0, 0, 0, 3, 0, at, at, 0, 0]));
        cluster.report_event(&mut Input::new(&[at, at, 0, 0, at]));
        cluster.report_event(&mut Input::new(&[at, at, 0, 5, 1, 1, 0, 1, 1]));
    }
    for _ in 0..200 {
        if input.is_empty() {
            break;
        }
        cluster.step(&mut input);
    }
    // Calls that wait have an end.
    for _ in 0..4 {
        cluster.pass(30_000);
    }
    let mut turns = 0;
    while cluster.core.has_work() {
        cluster.event(Event::Tick);
        turns += 1;
        assert!(turns < 10_000, "the cursors never end");
    }
    assert!(cluster.asked.is_empty(), "{} calls were never answered", cluster.asked.len());
    let mut other = Core::new_for_load(settings());
    for (txid, edit) in &cluster.log {
        other.replay(*txid, edit.clone()).unwrap();
    }
    assert_eq!(other.digest(), cluster.core.digest(), "the log does not make the same state again");
    check_image(&mut cluster.core);
}

/// Noise that reads as steps.
pub fn recipe_seeds() -> Vec<Vec<u8>> {
    let entropy = cairn_common::entropy::Entropy::seeded(3);
    [40usize, 300, 900, 2_000]
        .map(|length| {
            let mut bytes = vec![0; length];
            entropy.fill(&mut bytes);
            bytes
        })
        .to_vec()
}

fn pages() -> (TxId, Vec<Vec<u8>>) {
    let mut cluster = Cluster::new();
    for seed in recipe_seeds() {
        let mut input = Input::new(&seed);
        while !input.is_empty() {
            cluster.step(&mut input);
        }
    }
    let txid = cluster.core.checkpoint_begin();
    let mut pages = Vec::new();
    while !cluster.core.checkpoint_slice(1, &mut pages) {}
    (txid, pages)
}

/// Pages of an image, each with two bytes of length before it: loaded or refused, never a panic, and never another state than was promised.
pub fn image_pages(data: &[u8]) {
    let mut input = Input::new(data);
    let txid = TxId(u64::from(input.byte()));
    let mut core = Core::new_for_load(settings());
    while !input.is_empty() {
        let length = usize::from(input.short());
        if core.load_page(input.take(length)).is_err() {
            return;
        }
    }
    if core.finish_load(txid).is_ok() {
        assert_eq!(core.last_txid(), txid);
        check_image(&mut core);
    }
}

/// See [`image_pages`].
pub fn page_seeds() -> Vec<Vec<u8>> {
    let (txid, pages) = pages();
    let tagged = |page: &Vec<u8>| [&(page.len() as u16).to_le_bytes()[..], page].concat();
    let whole: Vec<u8> = pages.iter().flat_map(tagged).collect();
    let mut seeds = vec![[&[txid.0 as u8][..], &whole].concat()];
    seeds.extend(pages.iter().map(|page| [&[1][..], &tagged(page)].concat()));
    // A number that takes the slot beyond what numbers can hold.
    seeds.push([&[1, 16, 0, 1, 0, 2, 1][..], &[0xff; 9], &[1]].concat());
    seeds
}

//! What clients and datanodes could send.

#![allow(clippy::needless_update, reason = "messages get new fields, which the recipes then leave alone")]

use std::collections::{BTreeMap, BTreeSet};

use cairn_namenode::core::{
    Caller, ClientRequest, ClientResponse, Command, Core, Event, Now, ReplyTo, Response, StreamId,
};
use cairn_proto::ids::{Epoch, TxId};
use cairn_proto::pb;
use cairn_proto::pb::report_up::Report;

use super::{NODES, START, USERS, check_image, pick, settings};
use crate::fuzz::input::Input;

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

/// A core with its log, whatever its clients and datanodes ask.
pub(super) struct Cluster {
    pub(super) core: Core,
    now: Now,
    log: Vec<(TxId, pb::Edit)>,
    asked: BTreeSet<u64>,
    next: u64,
    registrations: BTreeMap<String, u64>,
    inodes: Vec<u64>,
    blocks: Vec<pb::Block>,
}

impl Cluster {
    pub(super) fn new() -> Self {
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
        match input.byte() % 26 {
            kind @ (0..=8 | 23 | 24) => self.writer_request(kind, call, input),
            kind @ (13..=20) => change_request(kind, call, input),
            kind => self.question(kind, input),
        }
    }

    fn writer_request(&self, kind: u8, call: Option<pb::CallContext>, input: &mut Input<'_>) -> ClientRequest {
        let writer = |input: &mut Input<'_>| pick(input, &["w1", "w1", "w1", "w2", ""]);
        match kind {
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
                by_previous: input.byte().is_multiple_of(4),
                previous: self.block(input),
                favored_nodes: (0..input.byte() % 3).map(|_| pick(input, &NODES)).collect(),
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
            8 if input.flag() => pb::SyncFileRequest {
                inode: self.inode(input),
                client_name: writer(input),
                last_block_length: input.flag().then(|| input.number()),
            }
            .into(),
            8 => pb::RenewLeaseRequest { client_name: writer(input), ..Default::default() }.into(),
            23 => {
                pb::AppendRequest { call, path: path(input), client_name: writer(input), ..Default::default() }.into()
            }
            _ => pb::RecoverLeaseRequest { path: path(input), only_of: writer(input), ..Default::default() }.into(),
        }
    }

    fn question(&self, kind: u8, input: &mut Input<'_>) -> ClientRequest {
        match kind {
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
            21 => pb::ReportBadReplicaRequest {
                block: self.block(input),
                node_id: pick(input, &NODES),
                storage_id: pick(input, &["n0-s", "", "x"]),
                reason: path(input),
                ..Default::default()
            }
            .into(),
            22 => pb::SafeModeRequest { action: input.number() as i32, ..Default::default() }.into(),
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
            2 | 3 => Report::Changed(pb::ReplicaChanged {
                storage_id,
                pool,
                replica: Some(self.replica(input)),
                verified: input.flag(),
            }),
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

    pub(super) fn step(&mut self, input: &mut Input<'_>) {
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

fn path(input: &mut Input<'_>) -> String {
    match input.byte() {
        255 => "/x".repeat(usize::from(input.short()) % 5_000),
        at => PATHS[usize::from(at) % PATHS.len()].to_owned(),
    }
}

fn change_request(kind: u8, call: Option<pb::CallContext>, input: &mut Input<'_>) -> ClientRequest {
    match kind {
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
        18 => pb::SetOwnerRequest { call, path: path(input), owner: pick(input, &USERS), group: pick(input, &USERS) }
            .into(),
        19 => pb::SetTimesRequest {
            call,
            path: path(input),
            modified_ms: input.flag().then(|| input.number()),
            accessed_ms: input.flag().then(|| input.number()),
            ..Default::default()
        }
        .into(),
        _ => pb::SetReplicationRequest {
            call,
            path: path(input),
            replication: input.number() as u32,
            ..Default::default()
        }
        .into(),
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

//! The core alone.

use cairn_namenode::core::{
    Caller, ClientRequest, Command, Core, CoreSettings, Event, Now, ReplyTo, Response, StreamId,
};
use cairn_proto::ids::{Epoch, TxId};
use cairn_proto::pb::{self, report_up::Report};

use crate::make::{self, LENGTH, Maker, NODES};
use crate::row;
use cairn_namenode::core::grouped;

/// Replicas in one range of a full report.
pub const RANGE: u64 = 4_096;

fn resident_kb() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Seconds that this thread has had a processor: what else runs on the machine does not count.
fn busy() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    text.split_whitespace().next().unwrap().parse::<f64>().unwrap() / 1e9
}

/// splitmix64.
pub fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The ranges of the full report of one node.
pub fn ranges(node: u64, files: u64, pool: &str) -> impl Iterator<Item = pb::FullReportRange> {
    let pool = pool.to_owned();
    let mut from = 0;
    std::iter::from_fn(move || {
        if from >= files {
            return None;
        }
        let first = if from == 0 { i64::MIN } else { make::block_of(from).0 as i64 };
        let mut replicas = Vec::with_capacity(RANGE as usize);
        while from < files && replicas.len() < RANGE as usize {
            if make::nodes_of(from).contains(&node) {
                let (id, generation) = make::block_of(from);
                replicas.push(pb::ReplicaReport { id: id as i64, generation, length: LENGTH, state: 0 });
            }
            from += 1;
        }
        let is_last = from >= files;
        Some(pb::FullReportRange {
            storage_id: format!("storage-{node}"),
            pool: pool.clone(),
            first_id: first,
            last_id: if is_last { i64::MAX } else { make::block_of(from).0 as i64 - 1 },
            replicas,
            last_of_storage: is_last,
            last_of_report: is_last,
        })
    })
}

/// What a node says when it registers.
pub fn registration(index: u64, protocol_version: u32) -> pb::RegisterRequest {
    let node = make::node(index);
    pb::RegisterRequest {
        node_id: node.node_id,
        host: node.host,
        address: node.address,
        rack: node.rack,
        protocol_version,
        storages: storages(index),
        ..Default::default()
    }
}

/// The storages of a node.
pub fn storages(index: u64) -> Vec<pb::StorageInfo> {
    vec![pb::StorageInfo {
        storage_id: format!("storage-{index}"),
        capacity: 1 << 44,
        remaining: 1 << 43,
        ..Default::default()
    }]
}

struct Bench {
    core: Core,
    now: Now,
    commands: Vec<Command>,
}

impl Bench {
    fn event(&mut self, event: Event) {
        self.commands.clear();
        self.core.on_event(self.now, 1, event, &mut self.commands);
    }

    fn call(&mut self, caller: &Caller, request: ClientRequest) {
        self.event(Event::Client { reply: ReplyTo(1), caller: caller.clone(), request });
        let answered = matches!(self.commands.last(), Some(Command::Reply { result: Ok(_), .. }));
        assert!(answered, "{:?}", self.commands);
    }

    fn report(&mut self, node: u64, files: u64) {
        let request = registration(node, 1);
        self.event(Event::Register { reply: ReplyTo(1), peer_ip: "127.0.0.1".into(), request });
        let Some(Command::Reply { result: Ok(Response::Register(answer)), .. }) = self.commands.pop() else {
            panic!("{:?}", self.commands);
        };
        let stream = StreamId(node);
        let open = pb::ReportOpen { node_id: format!("node-{node}"), registration: answer.registration };
        self.event(Event::ReportOpened { stream, open });
        for range in ranges(node, files, "pool") {
            self.event(Event::Report { stream, report: pb::ReportUp { report: Some(Report::Range(range)) } });
            assert!(!matches!(self.commands.last(), Some(Command::CloseStream { .. })), "{:?}", self.commands);
        }
    }
}

fn per_second(count: u64, seconds: f64) -> String {
    format!("{} a second", grouped((count as f64 / seconds) as u64))
}

/// Prints what `files` files take and how fast the core is with them.
pub fn run(files: u64) {
    let now = Now { mono_ms: 1_000_000, wall_ms: 1_700_000_000_000 };
    let mut commands = Vec::new();
    let settings = CoreSettings::default();
    let mut core = Core::format(settings, "cluster", "pool", "root", "supergroup", now, &mut commands);
    core.start(now, Epoch(1), &mut commands);
    let before = resident_kb();
    let mut maker = Maker::after(core.last_txid());
    maker.begin(|txid, edit| core.replay(txid, edit).unwrap());
    let begin = busy();
    for _ in 0..files {
        maker.next_file(|txid, edit| core.replay(txid, edit).unwrap());
    }
    let replayed = busy() - begin;
    let mut bench = Bench { core, now, commands };
    let begin = busy();
    (0..NODES).for_each(|node| bench.report(node, files));
    let reported = busy() - begin;
    bench.event(Event::Tick);
    while bench.core.has_work() {
        bench.event(Event::Tick);
    }
    let label = |what: &str| format!("{} files: {what}", grouped(files));
    row(&label("bytes per file"), &((resident_kb() - before) * 1_024 / files).to_string());
    row(&label("edits replayed (three a file)"), &per_second(3 * files, replayed));
    row(&label("replicas reported, in ranges"), &per_second(3 * files, reported));

    let caller = Caller { user: "ann".into(), groups: vec!["users".into()], host: "10.1.1.1".into() };
    let count = 1_000_000;
    for (what, below) in [("stat at random over all files", files), ("stat in one directory", 1_000)] {
        let mut state = 7;
        let requests: Vec<ClientRequest> =
            (0..count).map(|_| pb::GetStatusRequest { path: make::path(random(&mut state) % below) }.into()).collect();
        let begin = busy();
        for request in requests {
            bench.call(&caller, request);
        }
        row(&label(what), &per_second(count, busy() - begin));
    }
    create(&mut bench, files);
}

fn create(bench: &mut Bench, files: u64) {
    let caller = Caller { user: "root".into(), groups: vec!["root".into()], host: "10.1.1.1".into() };
    let count = 500_000;
    let requests: Vec<ClientRequest> = (0..count)
        .map(|n| {
            let request = pb::CreateRequest {
                path: format!("/data/new-{:010}/file-{n:015}", n / make::PER_DIRECTORY),
                permission: 0o644,
                replication: 3,
                create_parents: true,
                client_name: "load".into(),
                ..Default::default()
            };
            request.into()
        })
        .collect();
    let begin = busy();
    for (n, request) in requests.into_iter().enumerate() {
        bench.call(&caller, request);
        if n % 256 == 255 {
            let txid: TxId = bench.core.last_txid();
            bench.event(Event::Synced { txid });
        }
    }
    row(&format!("{} files: creates", grouped(files)), &per_second(count, busy() - begin));
}

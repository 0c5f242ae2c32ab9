//! Measures the core alone; run with `cargo test --release -p cairn-namenode --lib -- --ignored --nocapture speed`.

use super::*;

fn rss_kb() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap_or("VmRSS: 0 kB").to_owned();
    line.split_whitespace().nth(1).and_then(|kb| kb.parse().ok()).unwrap_or(0)
}

/// Seconds that this thread has had a processor: what others do on the machine does not count.
fn busy() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    text.split_whitespace().next().and_then(|ns| ns.parse::<f64>().ok()).unwrap_or(0.0) / 1e9
}

fn timed(what: &str, count: u64, mut run: impl FnMut(u64)) {
    let begin = busy();
    (0..count).for_each(&mut run);
    let seconds = busy() - begin;
    println!("{what:<28} {count:>9} in {seconds:>7.3} s = {:>10.0} /s", count as f64 / seconds);
}

#[test]
#[ignore = "a measurement, not a check"]
fn speed() {
    let count: u64 = std::env::var("CAIRN_SPEED_FILES").ok().and_then(|text| text.parse().ok()).unwrap_or(500_000);
    let mut world = cluster();
    let (now, me) = (world.now, caller("root"));
    let mut commands = Vec::new();
    let path = |n: u64| format!("/data/d{:05}/file-{:015}", n / 1_000, n);
    let before = rss_kb();
    let mut core = std::mem::replace(&mut world.core, Core::new_for_load(settings()));
    let mut send = |core: &mut Core, request: ClientRequest| {
        commands.clear();
        core.on_event(now, 1, Event::Client { reply: ReplyTo(1), caller: me.clone(), request }, &mut commands);
        commands.pop()
    };
    timed("create", count, |n| {
        let request = pb::CreateRequest {
            path: path(n),
            permission: 0o644,
            replication: 3,
            create_parents: true,
            client_name: "w".into(),
            ..Default::default()
        };
        send(&mut core, request.into());
    });
    timed("addBlock", count, |n| {
        let inode = core.tree.resolve(&path(n)).unwrap().last().unwrap();
        let request = pb::AddBlockRequest { inode, client_name: "w".into(), ..Default::default() };
        send(&mut core, request.into());
    });
    core.on_event(now, 1, Event::Synced { txid: core.last_txid() }, &mut Vec::new());
    let ids: Vec<u64> = core.blocks.table.iter_from(0).map(|(id, _)| id).collect();
    timed("report", 3 * count, |n| {
        let id = ids[(n / 3) as usize];
        let replica = pb::ReplicaReport {
            id: id as i64,
            generation: core.blocks.get(id).unwrap().generation,
            length: 5,
            state: 0,
        };
        let node = ((n % 3) * 2 + n / 3 % 2) as usize;
        let changed = pb::ReplicaChanged {
            storage_id: format!("n{node}-s"),
            pool: "pool".into(),
            replica: Some(replica),
            verified: false,
        };
        let report = pb::ReportUp { report: Some(Report::Changed(changed)) };
        let stream = StreamId(world.nodes[node].stream);
        core.on_event(now, 1, Event::Report { stream, report }, &mut Vec::new());
    });
    timed("complete", count, |n| {
        let id = ids[n as usize];
        let block = core.blocks.get(id).unwrap();
        let request = pb::CompleteRequest {
            inode: block.inode,
            client_name: "w".into(),
            committed: commits(&[(id, block.generation, 5)]),
            call: None,
        };
        send(&mut core, request.into());
    });
    core.on_event(now, 1, Event::Synced { txid: core.last_txid() }, &mut Vec::new());
    drop(ids);
    println!("memory per file              {} bytes", (rss_kb() - before) * 1_024 / count);
    let mut random = Random::new(9);
    timed("stat, random", count, |_| {
        let request = pb::GetStatusRequest { path: path(random.below(count)) };
        assert!(matches!(send(&mut core, request.into()), Some(Command::Reply { result: Ok(_), .. })));
    });
    timed("stat, one directory", count, |n| {
        send(&mut core, pb::GetStatusRequest { path: path(n % 1_000) }.into());
    });
    let txid = core.checkpoint_begin();
    let mut pages = Vec::new();
    timed("checkpoint", 1, |_| while !core.checkpoint_slice(100, &mut pages) {});
    let bytes: usize = pages.iter().map(Vec::len).sum();
    println!("image                        {} bytes per file", bytes as u64 / count);
    let mut loaded = Core::new_for_load(settings());
    timed("load pages", 1, |_| pages.iter().for_each(|page| loaded.load_page(page).unwrap()));
    timed("finish load", 1, |_| loaded.finish_load(txid).unwrap());
    let root = pb::DeleteRequest { path: "/data".into(), recursive: true, ..Default::default() };
    timed("delete", 1, |_| {
        send(&mut core, root.clone().into());
        let mut turns = 0;
        while core.has_work() {
            core.on_event(now, 1, Event::Tick, &mut Vec::new());
            turns += 1;
        }
        println!("in {turns} turns");
    });
}

/// DESIGN's measure: files of one block with 20-byte names, 1,000 a directory, three replicas on six storages.
#[test]
#[ignore = "a measurement, not a check"]
fn memory() {
    use super::blocks::Block;
    use super::inode::{BlockList, Body, Inode, Layout};
    let count: u64 = std::env::var("CAIRN_SPEED_FILES").ok().and_then(|text| text.parse().ok()).unwrap_or(1_000_000);
    let mut world = cluster();
    let core = &mut world.core;
    let before = rss_kb();
    let (root, first) = (tree::ROOT, 20_000);
    timed("files into the tables", count, |n| {
        let directory = first + n / 1_000 * 1_001;
        if n % 1_000 == 0 {
            let name = format!("d{n:019}");
            core.tree.inodes.insert(directory, Inode::new(root, &name, 0, 0, 0o755, 1, Body::Directory(None)));
        }
        let (id, block) = (directory + 1 + n % 1_000, (1 << 30) + n + 1);
        let body = Body::File(Layout::Blocks(BlockList::One(block)));
        let mut inode = Inode::new(directory, &format!("f{n:019}"), 0, 0, 0o644, 1, body);
        inode.replication = 3;
        core.tree.inodes.insert(id, inode);
        let mut record = Block::open(id, 1_001);
        record.commit(5);
        core.blocks.table.insert(block, record);
        core.repair.complete += 1;
    });
    timed("directories", 1, |_| assert!(core.tree.rebuild().unwrap().is_empty()));
    timed("replicas", count, |n| {
        for copy in 0..3 {
            let storage = ((n + copy) % 6) as u32;
            core.add_replica((1 << 30) + n + 1, storage);
            core.nodes.storage_mut(storage).blocks.insert((1 << 30) + n + 1);
        }
    });
    println!("memory per file              {} bytes", (rss_kb() - before) * 1_024 / count);
}

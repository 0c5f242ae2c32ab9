//! Reading, and what breaks on the way.

use super::*;
use cairn_client::fs::ErrorCode;
use tokio::io::AsyncReadExt;

async fn with_file(scripts: Vec<Script>, data: &[u8]) -> Cluster {
    let cluster = Cluster::healthy(scripts.len()).await;
    cluster.put("/f", data).await.unwrap();
    for (node, script) in cluster.nodes.iter().zip(scripts) {
        node.state.lock().unwrap().script = script;
    }
    cluster
}

#[tokio::test]
async fn positioned_reads_give_any_range() {
    let data = text(3 * BLOCK as usize + 1_000);
    let cluster = with_file(vec![Script::default(); 2], &data).await;
    let reader = cluster.fs.open("/f").await.unwrap();
    let random = Entropy::seeded(3);
    for _ in 0..200 {
        let offset = random.below(data.len() as u64 + 10);
        let length = random.below(2 * BLOCK);
        let from = (offset as usize).min(data.len());
        let to = (offset + length).min(data.len() as u64).max(from as u64) as usize;
        assert!(reader.read_range(offset, length).await.unwrap() == data[from..to], "{offset} {length}");
        let mut out = vec![0; length as usize];
        assert_eq!(reader.read_at(offset, &mut out).await.unwrap(), to - from);
        assert!(out[..to - from] == data[from..to]);
    }
    assert_eq!(reader.position(), 0);
}

#[tokio::test]
async fn seeks_and_reads_mix() {
    let data = random(2 * BLOCK as usize);
    let cluster = with_file(vec![Script::default()], &data).await;
    let mut reader = cluster.fs.open("/f").await.unwrap();
    let random = Entropy::seeded(9);
    for round in 0..300 {
        if round % 3 == 0 {
            let near = (reader.position() + random.below(9_000)).min(data.len() as u64);
            reader.seek(if round % 2 == 0 { near } else { random.below(data.len() as u64) });
        }
        if round == 100 {
            reader.limit_read_ahead(BLOCK / 2);
        }
        let at = reader.position() as usize;
        let mut out = vec![0; random.below(10_000) as usize + 1];
        let count = reader.read(&mut out).await.unwrap();
        assert!(count > 0 || at == data.len());
        assert!(out[..count] == data[at..at + count]);
        assert_eq!(reader.position() as usize, at + count);
    }
    reader.seek(data.len() as u64 + 5);
    assert_eq!(reader.next_chunk().await.unwrap(), None);
}

#[tokio::test]
async fn it_is_an_async_reader() {
    let data = text(100_000);
    let cluster = with_file(vec![Script::default()], &data).await;
    let mut all = Vec::new();
    cluster.fs.open("/f").await.unwrap().read_to_end(&mut all).await.unwrap();
    assert!(all == data);
}

#[tokio::test]
async fn a_damaged_replica_is_passed_over_and_reported() {
    let data = text(BLOCK as usize + 5_000);
    let corrupt = Script { corrupt_reads: true, ..Default::default() };
    let cluster = with_file(vec![corrupt, Script::default()], &data).await;
    assert!(cluster.get("/f").await.unwrap() == data);
    let reported = async {
        while cluster.namenode.count("report_bad_replica") == 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(60), reported).await.unwrap();
    let state = cluster.namenode.state.lock().unwrap();
    let report = state.bad_replicas[0].clone();
    assert_eq!(report.node_id, "dn0");
    assert!(report.reason.contains("dn0"), "{}", report.reason);
}

#[tokio::test]
async fn a_read_that_is_cut_goes_on_elsewhere() {
    let data = random(BLOCK as usize);
    for cut in [0, 1, 7] {
        let cluster =
            with_file(vec![Script { cut_reads: Some(cut), ..Default::default() }, Script::default()], &data).await;
        assert!(cluster.get("/f").await.unwrap() == data, "cut after {cut} frames");
    }
}

#[tokio::test]
async fn failures_before_some_progress_do_not_count() {
    let data = random(4 * BLOCK as usize);
    // More than is verified at a time, so that each answer moves the reader on.
    let cut = Script { cut_reads: Some(24), ..Default::default() };
    let cluster = Cluster::start(vec![cut; 2]).await;
    let options = CreateOptions { block_size: 4 * BLOCK, ..options() };
    let mut out = cluster.fs.create("/f", options).await.unwrap();
    out.write(&data).await.unwrap();
    out.close().await.unwrap();
    assert!(cluster.get("/f").await.unwrap() == data);
}

#[tokio::test]
async fn a_busy_node_is_asked_again_and_not_avoided() {
    let data = random(2 * BLOCK as usize);
    let cluster = with_file(vec![Script { busy_reads: 2, ..Default::default() }, Script::default()], &data).await;
    assert!(cluster.get("/f").await.unwrap() == data);
    assert_eq!(cluster.nodes[1].state.lock().unwrap().reads, 0);
}

#[tokio::test]
async fn a_dead_node_is_asked_last_for_a_while() {
    let data = random(4 * BLOCK as usize);
    let cluster = with_file(vec![Script::default(); 3], &data).await;
    cluster.nodes[0].kill();
    assert!(cluster.get("/f").await.unwrap() == data);
    assert_eq!(cluster.nodes[2].state.lock().unwrap().reads, 0);
}

#[tokio::test]
async fn a_replica_that_moved_is_found_again() {
    let data = random(10_000);
    let cluster = with_file(vec![Script::default(); 2], &data).await;
    let reader = cluster.fs.open("/f").await.unwrap();
    // The reader knows dn0 and dn1; the only replica is now on dn2.
    let moved = FakeDatanode::start(cluster.fs.env(), "dn2", Script::default()).await;
    moved.state.lock().unwrap().replicas = std::mem::take(&mut cluster.nodes[0].state.lock().unwrap().replicas);
    cluster.nodes[1].state.lock().unwrap().replicas.clear();
    {
        let mut state = cluster.namenode.state.lock().unwrap();
        state.files.get_mut("/f").unwrap().blocks[0].replicas = vec![moved.replica.clone()];
    }
    assert!(reader.read_range(0, 10_000).await.unwrap() == data);
}

#[tokio::test]
async fn with_no_good_replica_the_error_names_block_and_nodes() {
    let data = random(10_000);
    let corrupt = Script { corrupt_reads: true, ..Default::default() };
    let cluster = with_file(vec![corrupt, Script::default()], &data).await;
    cluster.nodes[1].kill();
    let error = cluster.get("/f").await.unwrap_err();
    for part in ["/f", "block ", "dn0", "dn1", "verify"] {
        assert!(error.message().contains(part), "{part:?} is not in {error}");
    }
}

#[tokio::test]
async fn missing_files_and_directories_are_told() {
    let cluster = Cluster::healthy(1).await;
    let error = cluster.fs.open("/nothing").await.err().unwrap();
    assert_eq!((error.code(), error.subject()), (ErrorCode::FileNotFound, "/nothing"));
    assert_eq!(cluster.fs.open("/").await.err().unwrap().code(), ErrorCode::NotAFile);
}

#[tokio::test]
async fn checksums_are_of_the_data_whatever_its_blocks() {
    let cluster = Cluster::healthy(2).await;
    let data = text(150_000);
    cluster.put("/a", &data).await.unwrap();
    let mut out =
        cluster.fs.create("/b", CreateOptions { compress: false, block_size: 512, ..options() }).await.unwrap();
    out.write(&data[..2_000]).await.unwrap();
    out.close().await.unwrap();
    assert_eq!(cluster.fs.file_checksum("/a").await.unwrap().crc32c, crc32c::crc32c(&data));
    assert_eq!(cluster.fs.file_checksum("/b").await.unwrap().crc32c, crc32c::crc32c(&data[..2_000]));
}

#[tokio::test]
async fn a_slow_replica_gets_a_rival_and_the_first_to_send_goes_on() {
    let data = random(BLOCK as usize);
    for stall in [0, 5] {
        let settings = ClientSettings { hedged_after_ms: 50, read_stall_ms: 120_000, ..patient() };
        let slow = Script { stall_reads: Some(stall), ..Default::default() };
        let cluster = Cluster::start_with(vec![slow, Script::default()], settings).await;
        cluster.put("/f", &data).await.unwrap();
        let read = async {
            assert!(cluster.get("/f").await.unwrap() == data);
            let input = cluster.fs.open("/f").await.unwrap();
            assert_eq!(input.read_range(10_000, 20_000).await.unwrap(), data[10_000..30_000]);
        };
        tokio::time::timeout(std::time::Duration::from_secs(60), read).await.expect("nobody waits for the slow one");
        let (started, won) = cluster.fs.hedged_reads();
        assert!(started >= 1 && won >= 1, "{started} rivals, {won} of them faster");
        // The slow one is neither reported nor taken for dead.
        assert!(cluster.namenode.state.lock().unwrap().bad_replicas.is_empty());
    }
}

#[tokio::test]
async fn a_rival_that_fails_leaves_the_slow_one_its_chance() {
    let data = random(BLOCK as usize);
    let settings = ClientSettings { hedged_after_ms: 20, read_rounds: 3, ..patient() };
    let busy = Script { busy_reads: 3, ..Default::default() };
    let bad = Script { corrupt_reads: true, ..Default::default() };
    let cluster = Cluster::start_with(vec![busy, bad], settings).await;
    cluster.put("/f", &data).await.unwrap();
    assert!(cluster.get("/f").await.unwrap() == data);
    assert!(cluster.fs.hedged_reads().0 >= 1);
}

/// A writer has flushed five frames to three nodes; then each of them comes to what its script says.
#[tokio::test]
async fn the_length_of_an_open_file_is_never_less_than_what_was_flushed() {
    let (left, stale, lost) = (
        |frames| Script { found_at_start: Some(frames), ..Script::default() },
        || Script { stale: true, ..Script::default() },
        || Script::default(),
    );
    let all = Some(5);
    /// Why, what each replica does and whether the namenode names it, how it ends.
    type Case<'a> = (&'a str, Vec<(Script, bool)>, bool, Option<u64>);
    let cases: Vec<Case<'_>> = vec![
        ("nothing happened", vec![(lost(), true), (lost(), true), (lost(), true)], false, all),
        ("two lost power", vec![(left(1), true), (left(2), true), (lost(), true)], false, all),
        ("all lost power: the longest", vec![(left(1), true), (left(4), true), (left(2), true)], false, Some(4)),
        ("all lost power, one is away", vec![(left(1), true), (left(4), true), (lost(), false)], false, None),
        ("all lost power, others may have more", vec![(left(1), true), (left(4), true), (left(2), true)], true, None),
        ("left out, the others away", vec![(stale(), true), (lost(), false), (lost(), false)], false, None),
        ("left out, unnamed ones may have it", vec![(stale(), true), (stale(), true), (stale(), true)], true, None),
        ("one has it all, whoever is away", vec![(left(1), true), (lost(), true), (lost(), false)], true, all),
    ];
    for (case, nodes, others_may_hold, expected) in cases {
        let cluster = Cluster::healthy(3).await;
        let mut out = cluster.fs.create("/f", options()).await.unwrap();
        out.write(&text(5 * FRAME as usize)).await.unwrap();
        out.flush().await.unwrap();
        cluster.namenode.state.lock().unwrap().others_may_hold = others_may_hold;
        for (node, (script, up)) in cluster.nodes.iter().zip(nodes) {
            node.state.lock().unwrap().script = script;
            if !up {
                node.kill();
            }
        }
        let opened = cluster.fs.open("/f").await;
        match (opened, expected) {
            (Ok(file), Some(frames)) => assert_eq!(file.length(), frames * FRAME, "{case}"),
            (Ok(file), None) => panic!("{case}: {} bytes are believed", file.length()),
            (Err(error), None) => assert_eq!(error.code(), ErrorCode::Unreachable, "{case}: {error}"),
            (Err(error), Some(_)) => panic!("{case}: {error}"),
        }
    }
}

//! Writing, and what breaks on the way.

use super::*;
use cairn_client::fs::ErrorCode;

#[tokio::test]
async fn files_of_every_shape_come_back() {
    let cluster = Cluster::healthy(3).await;
    let block = BLOCK as usize;
    let sizes = [0, 1, 4_095, 4_096, 4_097, block - 1, block, block + 1, 3 * block, 3 * block + 12_345];
    for size in sizes {
        for (kind, data) in [("text", text(size)), ("random", random(size))] {
            let path = format!("/{kind}-{size}");
            cluster.put(&path, &data).await.unwrap();
            assert!(cluster.get(&path).await.unwrap() == data, "{path}");
            assert_eq!(cluster.namenode.file(&path).blocks.len(), size.div_ceil(block), "{path}");
            cluster.check_replicas(&path);
        }
    }
}

#[tokio::test]
async fn pieces_of_any_size_give_the_same_file() {
    let cluster = Cluster::healthy(2).await;
    let data = text(200_000);
    for (k, size) in [1_000, 4_096, 5_000, 70_000, 200_000].into_iter().enumerate() {
        let path = format!("/{k}");
        let mut out = cluster.fs.create(&path, options()).await.unwrap();
        for piece in pieces(&data, size) {
            if k % 2 == 0 { out.write_bytes(piece).await.unwrap() } else { out.write(&piece).await.unwrap() }
        }
        assert_eq!(out.length(), data.len() as u64);
        assert_eq!(out.close().await.unwrap().length, data.len() as u64);
        assert!(cluster.get(&path).await.unwrap() == data, "pieces of {size}");
    }
}

#[tokio::test]
async fn text_is_compressed_unless_told_not_to() {
    let cluster = Cluster::healthy(1).await;
    let stored = |path: &str| -> usize {
        let state = cluster.nodes[0].state.lock().unwrap();
        let blocks = cluster.namenode.file(path).blocks;
        let frames = |fake: &namenode::FakeBlock| -> usize {
            state.replicas[&fake.block.id].frames.iter().map(|(_, _, payload)| payload.len()).sum()
        };
        blocks.iter().map(frames).sum()
    };
    let data = text(100_000);
    cluster.put("/zstd", &data).await.unwrap();
    assert!(stored("/zstd") < data.len() / 3);
    let mut out = cluster.fs.create("/none", CreateOptions { compress: false, ..options() }).await.unwrap();
    out.write(&data).await.unwrap();
    out.close().await.unwrap();
    assert_eq!(stored("/none"), data.len());
}

/// One node of three fails in the way of `script`; the file must be whole on those that are left.
async fn survives(position: usize, script: Script) {
    let mut scripts = vec![Script::default(); 3];
    scripts[position] = script.clone();
    let cluster = Cluster::start(scripts).await;
    let data = random(3 * BLOCK as usize / 2);
    cluster.put("/f", &data).await.unwrap_or_else(|error| panic!("{position} {script:?}: {error}"));
    assert!(cluster.get("/f").await.unwrap() == data, "{position} {script:?}");
    cluster.check_replicas("/f");
    assert!(cluster.namenode.file("/f").blocks.iter().any(|block| block.replicas.len() == 2), "the fault fired");
}

#[tokio::test]
async fn a_node_that_fails_at_any_place_and_time_is_left_out() {
    for position in 0..3 {
        survives(position, Script { refuse_setup: true, ..Default::default() }).await;
        for at in [1, 20_000, BLOCK] {
            survives(position, Script { drop_at: Some(at), ..Default::default() }).await;
            survives(position, Script { err_at: Some(at), ..Default::default() }).await;
        }
        survives(position, Script { drop_finish: true, ..Default::default() }).await;
    }
}

#[tokio::test]
async fn blocks_smaller_than_the_window_are_asked_for_one_after_the_other() {
    for script in [Script::default(), Script { refuse_setup: true, ..Default::default() }] {
        let settings = ClientSettings { write_window_bytes: 64 * FRAME, ..patient() };
        let cluster = Cluster::start_with(vec![script, Script::default(), Script::default()], settings).await;
        let data = text(20 * 4 * FRAME as usize + 1);
        let options = CreateOptions { block_size: 4 * FRAME, ..options() };
        let mut out = cluster.fs.create("/f", options).await.unwrap();
        out.write(&data).await.unwrap();
        out.close().await.unwrap();
        assert!(cluster.get("/f").await.unwrap() == data);
        assert_eq!(cluster.namenode.file("/f").blocks.len(), 21);
        cluster.check_replicas("/f");
    }
}

#[tokio::test]
async fn a_node_that_cannot_be_reached_is_left_out() {
    let cluster = Cluster::healthy(3).await;
    cluster.nodes[1].kill();
    let data = random(100_000);
    cluster.put("/f", &data).await.unwrap();
    assert!(cluster.get("/f").await.unwrap() == data);
    assert!(cluster.namenode.count("abandon_block") > 0);
}

#[tokio::test]
async fn a_pipeline_that_stalls_is_broken() {
    let scripts = vec![Script { stall_at: Some(1), ..Default::default() }, Script::default()];
    let cluster = Cluster::start_with(scripts, watchful()).await;
    let data = random(10_000);
    cluster.put("/f", &data).await.unwrap();
    assert!(cluster.get("/f").await.unwrap() == data);
}

#[tokio::test]
async fn a_survivor_that_is_busy_is_asked_again() {
    let scripts = vec![
        Script { busy_recoveries: 3, ..Default::default() },
        Script { drop_at: Some(30_000), ..Default::default() },
    ];
    let cluster = Cluster::start(scripts).await;
    let data = text(BLOCK as usize);
    cluster.put("/f", &data).await.unwrap();
    assert!(cluster.get("/f").await.unwrap() == data);
    cluster.check_replicas("/f");
}

#[tokio::test]
async fn a_call_that_is_given_up_loses_nothing() {
    let cluster = Cluster::healthy(2).await;
    let data = random(5 * BLOCK as usize + 1_234);
    let whole = Bytes::from(data.clone());
    let mut out = cluster.fs.create("/f", options()).await.unwrap();
    let mut given_up = 0;
    for turn in 0.. {
        let at = out.length() as usize;
        if at == data.len() {
            break;
        }
        let end = data.len().min(at + 3 * FRAME as usize + 77);
        let written = async {
            if turn % 2 == 0 { out.write(&data[at..end]).await } else { out.write_bytes(whole.slice(at..end)).await }
        };
        tokio::select! {
            biased;
            written = written => written.unwrap(),
            () = tokio::task::yield_now() => given_up += 1,
        }
    }
    assert!(given_up > 0, "calls had to wait");
    assert_eq!(out.close().await.unwrap().length, data.len() as u64);
    assert!(cluster.get("/f").await.unwrap() == data);
    cluster.check_replicas("/f");
}

#[tokio::test]
async fn two_nodes_may_fail_one_after_the_other() {
    let scripts = vec![
        Script { drop_at: Some(30_000), ..Default::default() },
        Script { err_at: Some(50_000), ..Default::default() },
        Script::default(),
    ];
    let cluster = Cluster::start(scripts).await;
    let data = text(BLOCK as usize);
    cluster.put("/f", &data).await.unwrap();
    assert!(cluster.get("/f").await.unwrap() == data);
    cluster.check_replicas("/f");
}

#[tokio::test]
async fn with_nothing_acked_and_no_survivor_the_block_begins_anew() {
    let drop_first = Script { drop_at: Some(1), ..Default::default() };
    let cluster = Cluster::start(vec![drop_first, Script::default()]).await;
    let mut out = cluster.fs.create("/f", CreateOptions { replication: 1, ..options() }).await.unwrap();
    let data = text(30_000);
    out.write(&data).await.unwrap();
    out.close().await.unwrap();
    assert!(cluster.get("/f").await.unwrap() == data);
    assert_eq!(cluster.namenode.file("/f").blocks[0].replicas[0].node_id, "dn1");
}

#[tokio::test]
async fn with_no_node_left_the_error_names_all_and_abort_deletes() {
    let fail = |at| Script { err_at: Some(at), ..Default::default() };
    let cluster = Cluster::start(vec![fail(20_000), fail(30_000)]).await;
    let mut out = cluster.fs.create("/f", options()).await.unwrap();
    let data = random(BLOCK as usize);
    let written = out.write(&data).await;
    let error = match written {
        Ok(()) => out.sync().await.unwrap_err(),
        Err(error) => error,
    };
    assert_eq!(error.code(), ErrorCode::DiskFull);
    for part in ["/f", "block ", "dn0", "dn1", "scripted full disk"] {
        assert!(error.message().contains(part), "{part:?} is not in {error}");
    }
    assert_eq!(out.write(b"x").await.unwrap_err(), error, "an error is final");
    out.abort().await.unwrap();
    assert!(!cluster.fs.exists("/f").await.unwrap());
}

#[tokio::test]
async fn no_datanode_at_all_is_said_so() {
    let cluster = Cluster::healthy(0).await;
    let error = cluster.put("/f", b"x").await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::NoTargets);
    assert!(error.message().contains("/f"), "{error}");
}

#[tokio::test]
async fn flushed_bytes_are_seen_by_new_readers() {
    let cluster = Cluster::healthy(2).await;
    let mut out = cluster.fs.create("/f", options()).await.unwrap();
    let data = text(BLOCK as usize + 10_000);
    out.write(&data[..5_000]).await.unwrap();
    out.flush().await.unwrap();
    assert!(cluster.get("/f").await.unwrap() == data[..5_000]);
    let mut reader = cluster.fs.open("/f").await.unwrap();
    out.write(&data[5_000..]).await.unwrap();
    out.sync().await.unwrap();
    assert!(cluster.get("/f").await.unwrap() == data);
    assert_eq!(reader.length(), 5_000);
    assert_eq!(reader.refresh().await.unwrap(), data.len() as u64);
    out.close().await.unwrap();
    assert!(cluster.get("/f").await.unwrap() == data);
}

#[tokio::test]
async fn calls_are_repeated_under_the_same_number() {
    let cluster = Cluster::healthy(1).await;
    {
        let mut state = cluster.namenode.state.lock().unwrap();
        state.failures.insert("create", vec![ErrorCode::Busy, ErrorCode::Unreachable]);
        state.failures.insert("add_block", vec![ErrorCode::SafeMode]);
        state.failures.insert("complete", vec![ErrorCode::NotReplicatedYet; 3]);
    }
    cluster.put("/f", b"data").await.unwrap();
    let state = cluster.namenode.state.lock().unwrap();
    let ids = |name: &str| -> Vec<u64> {
        state.calls.iter().filter(|(called, _)| *called == name).map(|(_, id)| *id).collect()
    };
    let creates = ids("create");
    assert_eq!(creates.len(), 3);
    assert!(creates.iter().all(|id| *id == creates[0] && *id > 0));
    assert_eq!(ids("add_block").len(), 2);
    let completes = ids("complete");
    assert_eq!(completes.len(), 4);
    assert!(completes.windows(2).all(|pair| pair[0] < pair[1]), "asking again is a new call");
}

#[tokio::test]
async fn an_error_that_stays_is_not_repeated() {
    let cluster = Cluster::healthy(1).await;
    cluster.put("/f", b"data").await.unwrap();
    let before = cluster.namenode.count("create");
    assert_eq!(cluster.put("/f", b"data").await.unwrap_err().code(), ErrorCode::FileAlreadyExists);
    assert_eq!(cluster.namenode.count("create"), before + 1);
}

#[tokio::test]
async fn leases_are_renewed_while_a_file_is_open() {
    let cluster = Cluster::healthy(1).await;
    let out = cluster.fs.create("/f", options()).await.unwrap();
    let renewed = async {
        while cluster.namenode.count("renew_lease") < 3 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(60), renewed).await.unwrap();
    out.close().await.unwrap();
}

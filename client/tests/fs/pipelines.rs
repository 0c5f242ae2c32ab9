//! Pipelines that break at each stage and place, and what takes the place of the nodes that failed.

use super::*;
use cairn_client::fs::ErrorCode;
use std::time::Duration;

fn script(change: impl FnOnce(&mut Script)) -> Script {
    let mut script = Script::default();
    change(&mut script);
    script
}

/// Nodes of which the first `scripts.len()` do as they are told.
fn with_healthy(mut scripts: Vec<Script>, healthy: usize) -> Vec<Script> {
    scripts.resize(scripts.len() + healthy, Script::default());
    scripts
}

fn replicated(replication: u32) -> CreateOptions {
    CreateOptions { replication, ..options() }
}

impl Cluster {
    async fn write(&self, path: &str, data: &[u8], options: CreateOptions) -> Result<()> {
        let mut out = self.fs.create(path, options).await?;
        out.write(data).await?;
        out.close().await.map(drop)
    }

    /// The file is whole, wherever it is read, on at least `least` finalized replicas a block.
    async fn check(&self, path: &str, data: &[u8], least: usize, what: &str) {
        assert!(self.get(path).await.unwrap() == data, "{what}");
        self.check_replicas(path);
        for block in self.namenode.file(path).blocks {
            assert!(block.replicas.len() >= least, "{what}: {} replicas", block.replicas.len());
        }
    }

    fn joined(&self) -> usize {
        self.nodes.iter().map(|node| node.state.lock().unwrap().joined).sum()
    }

    fn holds(&self, node: usize, block: i64) -> u64 {
        let state = self.nodes[node].state.lock().unwrap();
        state.replicas.get(&block).map_or(0, datanode::StoredReplica::length)
    }
}

#[tokio::test]
async fn a_node_that_stalls_at_any_place_and_stage_is_dropped_not_waited_for() {
    let stages: [(&str, Script); 4] = [
        ("first frame", script(|s| s.stall_at = Some(1))),
        ("middle", script(|s| s.stall_at = Some(20_000))),
        ("finish", script(|s| s.stall_finish = true)),
        // The block after the first, while that one may still be open.
        ("second block", script(|s| (s.stall_at, s.after_writes) = (Some(1), 1))),
    ];
    for position in 0..3 {
        for (stage, stall) in &stages {
            let mut scripts = vec![Script::default(); 3];
            scripts[position] = stall.clone();
            let cluster = Cluster::start_with(scripts, watchful()).await;
            let data = random(3 * BLOCK as usize / 2);
            let what = format!("{stage} at {position}");
            cluster.write("/f", &data, replicated(3)).await.unwrap_or_else(|error| panic!("{what}: {error}"));
            cluster.check("/f", &data, 2, &what).await;
            let short = cluster.namenode.file("/f").blocks.into_iter().find(|block| block.replicas.len() == 2);
            let left: Vec<_> =
                short.expect("the fault fired").replicas.iter().map(|node| node.node_id.clone()).collect();
            assert!(!left.contains(&format!("dn{position}")), "{what}: {left:?} are left, the wrong one was blamed");
        }
    }
}

#[tokio::test]
async fn a_finish_whose_ack_is_lost_at_any_place_leaves_finalized_survivors_that_go_on() {
    for position in 0..3 {
        for after_writes in [0, 1] {
            let mut scripts = vec![Script::default(); 3];
            scripts[position] = script(|s| (s.lose_finish_ack, s.after_writes) = (true, after_writes));
            let cluster = Cluster::start(scripts).await;
            let data = text(2 * BLOCK as usize);
            cluster.write("/f", &data, replicated(3)).await.unwrap();
            cluster.check("/f", &data, 2, &format!("{position}")).await;
            assert!(cluster.namenode.count("update_pipeline") >= 1, "the fault fired");
        }
    }
}

#[tokio::test]
async fn a_node_that_is_busy_when_a_block_begins_is_asked_again() {
    for position in 0..3 {
        let mut scripts = vec![Script::default(); 3];
        scripts[position].busy_setups = 2;
        let cluster = Cluster::start(scripts).await;
        let (clock, began_ms) = (cluster.fs.env().clock.clone(), cluster.fs.env().clock.mono_ms());
        cluster.write("/f", &text(10_000), replicated(3)).await.unwrap();
        // One that has been busy for two seconds is left out, also if it is the machine that stood still.
        let least = if clock.mono_ms() - began_ms < 2_000 { 3 } else { 2 };
        cluster.check("/f", &text(10_000), least, "busy").await;
        assert!(least < 3 || cluster.namenode.count("abandon_block") == 2);
    }
}

#[tokio::test]
async fn the_only_node_may_restart_when_a_block_begins() {
    // It refuses for a moment (longer than a busy node is asked again), then takes the block.
    let cluster = Cluster::start(vec![script(|s| s.refuse_setup = true)]).await;
    let mend = async {
        while cluster.namenode.count("abandon_block") < 3 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        cluster.nodes[0].state.lock().unwrap().script.refuse_setup = false;
    };
    let data = text(10_000);
    let (written, ()) = tokio::join!(cluster.write("/f", &data, replicated(1)), mend);
    written.unwrap();
    cluster.check("/f", &data, 1, "restart").await;
}

#[tokio::test]
async fn close_and_sync_get_another_node_when_fewer_than_two_are_left() {
    // Two of two fail one after the other at different stages; others take their place.
    for fault in [
        script(|s| s.drop_at = Some(20_000)),
        script(|s| s.err_at = Some(1)),
        script(|s| s.stall_at = Some(20_000)),
        script(|s| s.drop_finish = true),
        script(|s| s.lose_finish_ack = true),
    ] {
        for position in 0..2 {
            let mut scripts = vec![Script::default(); 3];
            scripts[position] = fault.clone();
            let cluster = Cluster::start_with(scripts, watchful()).await;
            let data = random(BLOCK as usize - 77);
            let what = format!("{position} {fault:?}");
            cluster.write("/f", &data, replicated(2)).await.unwrap_or_else(|error| panic!("{what}: {error}"));
            cluster.check("/f", &data, 2, &what).await;
            assert!(cluster.namenode.count("add_pipeline_node") >= 1, "{what}");
        }
    }
}

#[tokio::test]
async fn sync_returns_only_when_two_hold_it() {
    let cluster = Cluster::start(with_healthy(vec![Script::default(), script(|s| s.drop_at = Some(20_000))], 1)).await;
    let mut out = cluster.fs.create("/f", replicated(2)).await.unwrap();
    let data = random(30_000);
    out.write(&data).await.unwrap();
    out.sync().await.unwrap();
    let block = cluster.namenode.file("/f").blocks[0].clone();
    let holders = (0..3).filter(|node| cluster.holds(*node, block.block.id) == data.len() as u64);
    assert_eq!(holders.count(), 2, "the one that stayed and the one that joined");
    assert_eq!(block.replicas.iter().map(|node| &*node.node_id).collect::<Vec<_>>(), ["dn0", "dn2"]);
    assert_eq!(cluster.joined(), 1, "what was acked went over in one piece");
    out.close().await.unwrap();
    cluster.check("/f", &data, 2, "sync").await;
}

#[tokio::test]
async fn a_node_that_fails_while_it_joins_is_followed_by_another() {
    for survivors_fault in [None, Some(ErrorCode::Corrupt), Some(ErrorCode::Busy)] {
        let first = script(|s| s.fail_source = survivors_fault.filter(|code| *code == ErrorCode::Busy));
        let leaves = script(|s| s.drop_at = Some(20_000));
        let dies = script(|s| s.drop_partial = 1);
        let cluster = Cluster::start(with_healthy(vec![first, leaves, dies], 1)).await;
        let data = random(50_000);
        cluster.write("/f", &data, replicated(2)).await.unwrap();
        cluster.check("/f", &data, 2, "joins").await;
        let nodes: Vec<_> =
            cluster.namenode.file("/f").blocks[0].replicas.iter().map(|node| node.node_id.clone()).collect();
        assert_eq!((nodes, cluster.joined()), (vec!["dn0".to_owned(), "dn3".into()], 1));
    }
}

#[tokio::test]
async fn a_survivor_that_cannot_give_what_it_holds_is_left_out_too() {
    // Flushed data of a file that wants three: a node is looked for although two are left.
    let bad = script(|s| s.fail_source = Some(ErrorCode::Corrupt));
    let leaves = script(|s| s.drop_at = Some(20_000));
    let cluster = Cluster::start(with_healthy(vec![bad, leaves], 3)).await;
    let mut out = cluster.fs.create("/f", replicated(3)).await.unwrap();
    let data = random(50_000);
    out.write(&data[..10_000]).await.unwrap();
    out.flush().await.unwrap();
    out.write(&data[10_000..]).await.unwrap();
    out.close().await.unwrap();
    cluster.check("/f", &data, 2, "survivor").await;
    let nodes: Vec<_> = cluster.namenode.file("/f").blocks[0].replicas.iter().map(|n| n.node_id.clone()).collect();
    assert!(!nodes.contains(&"dn0".into()) && !nodes.contains(&"dn1".into()), "{nodes:?}");
    assert!(cluster.joined() >= 1);
}

#[tokio::test]
async fn a_wish_that_cannot_be_met_never_fails_a_write() {
    // Three of three, flushed, one leaves: there is no fourth; two are enough.
    let cluster = Cluster::start(with_healthy(vec![script(|s| s.drop_at = Some(20_000))], 2)).await;
    cluster.namenode.state.lock().unwrap().failures.insert("add_pipeline_node", vec![ErrorCode::Busy]);
    let mut out = cluster.fs.create("/f", replicated(3)).await.unwrap();
    let data = random(50_000);
    out.write(&data[..5_000]).await.unwrap();
    out.flush().await.unwrap();
    out.write(&data[5_000..]).await.unwrap();
    out.close().await.unwrap();
    cluster.check("/f", &data, 2, "wish").await;
    assert!(cluster.namenode.count("add_pipeline_node") >= 1, "it was looked for");
}

#[tokio::test]
async fn a_cluster_that_became_too_small_goes_on_when_the_namenode_knows() {
    let cluster = Cluster::start(with_healthy(vec![script(|s| s.drop_at = Some(20_000))], 1)).await;
    let learn = async {
        while cluster.namenode.count("add_pipeline_node") < 2 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        cluster.nodes[0].kill();
        cluster.namenode.state.lock().unwrap().gone.push("dn0".into());
    };
    // The first node of two is away for good (its name stays known until the namenode learns it).
    cluster.nodes[0].state.lock().unwrap().script.refuse_join = true;
    let data = random(50_000);
    let (written, ()) = tokio::join!(cluster.write("/f", &data, replicated(3)), learn);
    written.unwrap();
    cluster.check("/f", &data, 1, "small").await;
    assert_eq!(cluster.namenode.file("/f").blocks[0].replicas.len(), 1);
}

#[tokio::test]
async fn without_a_second_durable_replica_the_write_fails_in_time_and_names_the_nodes() {
    let scripts = with_healthy(vec![script(|s| s.drop_at = Some(20_000))], 1);
    let cluster = Cluster::start_with(scripts, ClientSettings { replace_deadline_ms: 3_000, ..patient() }).await;
    cluster.nodes[0].state.lock().unwrap().script.refuse_join = true;
    let data = random(50_000);
    let clock = cairn_common::clock::Clock::system();
    let write = cluster.write("/f", &data, replicated(3));
    let error = clock.timeout(Duration::from_secs(60), write).await.expect("it ends in time").unwrap_err();
    for part in ["/f", "2 datanodes must hold it durably", "dn0"] {
        assert!(error.message().contains(part), "{part:?} is not in {error}");
    }
}

#[tokio::test]
async fn a_small_cluster_asks_one_question_a_block() {
    let cluster = Cluster::healthy(1).await;
    let (clock, began_ms) = (cluster.fs.env().clock.clone(), cluster.fs.env().clock.mono_ms());
    for file in 0..5 {
        let mut out = cluster.fs.create(&format!("/{file}"), replicated(3)).await.unwrap();
        for _ in 0..10 {
            out.write(&text(100)).await.unwrap();
            out.sync().await.unwrap();
        }
        out.close().await.unwrap();
    }
    // An answer holds for five seconds.
    let again = ((clock.mono_ms() - began_ms) / 5_000) as usize;
    let asked = cluster.namenode.count("add_pipeline_node");
    assert!((5..=5 + again).contains(&asked), "{asked} questions");
    let one = Cluster::healthy(1).await;
    one.write("/one", &text(100), replicated(1)).await.unwrap();
    assert_eq!(one.namenode.count("add_pipeline_node"), 0, "a file that wants one needs no second");
}

#[tokio::test]
async fn the_last_survivor_may_be_away_for_a_moment() {
    for fault in [script(|s| s.drop_at = Some(20_000)), script(|s| s.drop_finish = true)] {
        let cluster = Cluster::start(vec![fault]).await;
        let mut out = cluster.fs.create("/f", replicated(1)).await.unwrap();
        let data = random(50_000);
        out.write(&data[..10_000]).await.unwrap();
        // Acked, so that the block cannot begin anew.
        out.flush().await.unwrap();
        out.write(&data[10_000..]).await.unwrap();
        out.close().await.unwrap();
        cluster.check("/f", &data, 1, "last").await;
        assert_eq!(cluster.namenode.count("abandon_block"), 0);
    }
}

#[tokio::test]
async fn a_last_survivor_that_can_be_opened_but_takes_nothing_is_given_up() {
    let settings = ClientSettings { replace_deadline_ms: 3_000, ..patient() };
    let cluster = Cluster::start_with(vec![script(|s| s.always_drop_at = Some(20_000))], settings).await;
    let mut out = cluster.fs.create("/f", replicated(1)).await.unwrap();
    let data = random(50_000);
    out.write(&data[..10_000]).await.unwrap();
    out.flush().await.unwrap();
    let end = tokio::time::timeout(Duration::from_secs(60), async {
        out.write(&data[10_000..]).await?;
        out.close().await
    });
    let error = end.await.expect("the write ends").unwrap_err();
    assert!(error.to_string().contains("tried"), "{error}");
}

#[tokio::test]
async fn a_namenode_that_is_away_while_a_pipeline_is_mended_is_waited_for() {
    let cluster = Cluster::start(with_healthy(vec![Script::default(), script(|s| s.drop_at = Some(20_000))], 1)).await;
    {
        let failures = &mut cluster.namenode.state.lock().unwrap().failures;
        failures.insert("new_generation", vec![ErrorCode::Unreachable, ErrorCode::SafeMode]);
        failures.insert("update_pipeline", vec![ErrorCode::SafeMode, ErrorCode::Unreachable]);
        // A wish is dropped at the first; the need for the finish asks again.
        failures.insert("add_pipeline_node", vec![ErrorCode::Busy, ErrorCode::SafeMode, ErrorCode::Unreachable]);
    }
    let data = random(50_000);
    cluster.write("/f", &data, replicated(2)).await.unwrap();
    cluster.check("/f", &data, 2, "away").await;
    let state = cluster.namenode.state.lock().unwrap();
    for name in ["new_generation", "update_pipeline"] {
        let ids: Vec<u64> = state.calls.iter().filter(|(called, _)| *called == name).map(|(_, id)| *id).collect();
        assert!(ids.windows(3).any(|ids| ids[0] == ids[1] && ids[1] == ids[2]), "{name} was not repeated: {ids:?}");
    }
}

#[tokio::test]
async fn abort_leaves_a_file_alone_that_took_the_name() {
    let cluster = Cluster::healthy(1).await;
    let mut out = cluster.fs.create("/f", options()).await.unwrap();
    out.write(b"mine").await.unwrap();
    let other = CreateOptions { overwrite: true, ..options() };
    cluster.write("/f", b"theirs", other).await.unwrap();
    out.abort().await.unwrap();
    assert_eq!(cluster.get("/f").await.unwrap(), b"theirs");
}

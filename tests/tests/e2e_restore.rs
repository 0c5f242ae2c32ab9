//! The namenode loses its metadata: backup, archive, restore to one transaction, and metadata directories that fail.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "tests fail by panicking")]

use std::path::{Path, PathBuf};
use std::time::Duration;

use cairn_client::fs::{ClientSettings, FileSystem, LocatedBlock};
use cairn_common::Env;
use cairn_tests::cluster::files_below;
use cairn_tests::{Cluster, ClusterOptions, Member, data, wait_for, wait_until};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(40);

fn report(cluster: &Cluster) -> Value {
    cluster.json(&["admin", "report"])
}

fn last_txid(cluster: &Cluster) -> u64 {
    report(cluster)["last_txid"].as_u64().unwrap()
}

/// The namespace with all that a listing shows.
fn listing(cluster: &Cluster) -> Value {
    cluster.json(&["ls", "-R", "/"])
}

fn set_flag(member: &mut Member, flag: &str, value: &str) {
    let command = member.command_mut();
    match command.iter().position(|arg| arg == flag) {
        Some(at) => command[at + 1] = value.into(),
        None => command.extend([flag.to_owned(), value.to_owned()]),
    }
}

fn remove_flag(member: &mut Member, flag: &str) {
    let command = member.command_mut();
    if let Some(at) = command.iter().position(|arg| arg == flag) {
        command.drain(at..=at + 1);
    }
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

/// One datanode, which is not taken for silent when the machine is busy: it would get no block.
fn alone() -> ClusterOptions {
    ClusterOptions::new(1, 1).core("stale_interval_ms", 60_000).core("dead_interval_ms", 60_000)
}

/// A cluster whose namenode archives its log into a folder of the test.
fn archiving(archive: &Path, options: ClusterOptions) -> Cluster {
    let lines = format!("[namenode]\narchive = {:?}", text(archive));
    Cluster::start(options.more(&lines))
}

/// Returns the last transaction.
fn wait_archived(cluster: &Cluster) -> u64 {
    wait_for("the archive has everything", PATIENCE, || {
        let report = report(cluster);
        let last = report["last_txid"].as_u64().filter(|_| report["archived_txid"] == report["last_txid"]);
        last.ok_or_else(|| report.to_string())
    })
}

/// A thousand operations.
fn thousand(cluster: &Cluster, folder: &str) {
    for part in 0..5 {
        let paths: Vec<String> = (0..200).map(|number| format!("/{folder}/{part}-{number}")).collect();
        let mut args = vec!["mkdir", "-p"];
        args.extend(paths.iter().map(String::as_str));
        cluster.cairn(&args).ok();
    }
}

#[test]
fn a_lost_namespace_is_restored_to_the_very_transaction() {
    let archive = tempfile::tempdir().unwrap();
    let archive = archive.path().join("log");
    let mut cluster = archiving(&archive, ClusterOptions::new(4, 2));
    let kept = data::random(1, 1_500_000);
    cluster.put("/kept", &kept, &[]);
    cluster.cairn(&["admin", "checkpoint"]).ok();
    cluster.cairn(&["mkdir", "/between"]).ok();
    cluster.cairn(&["admin", "checkpoint"]).ok();
    let backup = cluster.path("backup");
    let said = cluster.cairn(&["admin", "backup", &text(&backup)]).ok();
    assert!(said.contains("can be restored with it"), "{said}");
    cluster.cairn(&["--user", "nobody", "admin", "backup", "other"]).fails_naming(1, &["nobody", "superuser"]);
    let left = std::fs::read_dir(backup.parent().unwrap()).unwrap().map(|entry| entry.unwrap().file_name());
    let left: Vec<_> = left.filter(|name| name.to_string_lossy().contains("other")).collect();
    assert!(left.is_empty(), "{left:?}");

    thousand(&cluster, "many");
    let middle = data::random(2, 700_000);
    cluster.put("/many/file", &middle, &[]);
    let (wanted, expected) = (last_txid(&cluster), listing(&cluster));
    cluster.put("/later", &data::random(3, 600_000), &["--replication", "4"]);
    cluster.wait_healthy(PATIENCE);
    let unknown = cluster.blocks("/later")[0]["id"].to_string().trim_matches('"').to_owned();
    let future = Future::of(&cluster, "/later");
    assert_eq!(future.served(), 4);
    cluster.cairn(&["mv", "/kept", "/moved"]).ok();
    thousand(&cluster, "more");
    let last = wait_archived(&cluster);
    // One datanode is away from here until the restore is confirmed.
    cluster.kill_datanode(3);
    cluster.kill_namenode();
    let (dir, lost) = (cluster.dir().join("namenode"), cluster.path("lost"));
    std::fs::rename(&dir, &lost).unwrap();

    set_flag(&mut cluster.namenode, "--restore", &text(&backup));
    set_flag(&mut cluster.namenode, "--log", &text(&archive));
    refused_restores(&cluster, &backup, &lost, last);

    set_flag(&mut cluster.namenode, "--to-txid", &wanted.to_string());
    cluster.restart_namenode();
    cluster.wait_serving(PATIENCE);
    assert_eq!(listing(&cluster), expected, "exactly the namespace of that moment");
    assert_eq!(cluster.cat("/kept"), kept);
    assert_eq!(cluster.cat("/many/file"), middle);
    let after = report(&cluster);
    assert_eq!(after["restored_to_txid"].as_u64(), Some(wanted));
    assert!(after["epoch"].as_u64() >= Some(1_000), "{after}");
    assert!(cluster.cairn(&["admin", "report"]).ok().contains("confirm-restore"));
    assert!(cluster.cairn(&["fsck"]).ok().contains("confirm-restore"));

    // It is a cluster like any other from now on; a second restore into it is refused, a plain start is not.
    cluster.put("/new", b"new", &[]);
    cluster.kill_namenode();
    cluster.run_member(&cluster.namenode).fails_naming(1, &[&text(&dir), "is not empty"]);
    for flag in ["--restore", "--log", "--to-txid"] {
        remove_flag(&mut cluster.namenode, flag);
    }
    cluster.restart_namenode();
    cluster.wait_serving(PATIENCE);
    assert_eq!(cluster.cat("/new"), b"new");
    assert_eq!(report(&cluster)["restored_to_txid"], wanted);
    wait_archived(&cluster);

    // The block of the future that was left behind is on each node, known to none, and stays until somebody confirms.
    let held = |cluster: &Cluster, at: usize, quarantined: bool| {
        let of_block = |name: &str| name.starts_with(&format!("{unknown}_")) && name.ends_with(".blk") != quarantined;
        files_below(&cluster.datanodes[at].dir, &of_block).len()
    };
    assert!((0..4).all(|at| held(&cluster, at, false) == 1));
    cluster.cairn(&["--user", "nobody", "admin", "confirm-restore"]).fails_naming(1, &["superuser"]);
    assert!(cluster.cairn(&["admin", "confirm-restore"]).ok().contains(&format!("transaction {wanted} is confirmed")));
    assert!(cluster.cairn(&["admin", "confirm-restore"]).ok().contains("no restore waits"));
    assert_eq!(report(&cluster)["restored_to_txid"], 0);
    cluster.restart_datanode(3);
    wait_until("all four have put it away, the one that was away too", Duration::from_secs(60), || {
        (0..4).all(|at| held(&cluster, at, false) == 0 && held(&cluster, at, true) == 1)
    });
    cluster.cairn(&["cat", "/later"]).fails_naming(1, &["/later"]);
    assert_eq!(future.served(), 0, "not even to somebody who knows block, generation and node");
    assert_eq!(cluster.cat("/kept"), kept);

    old_namenode_is_fenced(&mut cluster, &lost);
}

/// Replicas of a file as somebody knew them who has not heard of the restore.
struct Future {
    runtime: tokio::runtime::Runtime,
    fs: FileSystem,
    located: Vec<LocatedBlock>,
}

impl Future {
    fn of(cluster: &Cluster, path: &str) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let (fs, located) = runtime.block_on(async {
            let settings = ClientSettings::at(&*cluster.namenode.addr);
            let fs = FileSystem::connect(Env::system(), settings).await.unwrap();
            let located = fs.block_locations(path, 0, 0).await.unwrap();
            (fs, located)
        });
        Self { runtime, fs, located }
    }

    /// How many of these replicas their datanodes still give out.
    fn served(&self) -> usize {
        let mut served = 0;
        for located in &self.located {
            let block = located.block.clone().unwrap_or_default();
            for replica in &located.replicas {
                served += usize::from(self.runtime.block_on(self.fs.replica_info(replica, &block, true)).is_ok());
            }
        }
        served
    }
}

/// What must not be restored, or cannot be: one clear line each, and nothing is changed.
fn refused_restores(cluster: &Cluster, backup: &Path, lost: &Path, last: u64) {
    let run = |change: &dyn Fn(&mut Member)| {
        let mut member = cluster.namenode.clone();
        change(&mut member);
        cluster.run_member(&member)
    };
    let cut = cluster.path("cut");
    let bytes = std::fs::read(backup).unwrap();
    std::fs::write(&cut, &bytes[..bytes.len() / 2]).unwrap();
    run(&|member| set_flag(member, "--restore", &text(&cut))).fails_naming(1, &[&text(&cut), "the backup is cut"]);
    let altered = cluster.path("altered");
    let mut other = bytes.clone();
    other[bytes.len() / 2] ^= 4;
    std::fs::write(&altered, &other).unwrap();
    run(&|member| set_flag(member, "--restore", &text(&altered))).fails_naming(1, &["the backup is altered"]);
    run(&|member| set_flag(member, "--restore", "/no/such/backup")).fails_naming(1, &["/no/such/backup"]);
    run(&|member| set_flag(member, "--dir", &text(lost))).fails_naming(1, &[&text(lost), "is not empty"]);
    let beyond = (last + 5_000).to_string();
    run(&|member| set_flag(member, "--to-txid", &beyond))
        .fails_naming(1, &[&beyond, &format!("to {last} can be reached")]);
    run(&|member| set_flag(member, "--to-time", "1000")).fails_naming(1, &["1970-01-01", "can be reached"]);
    let stranger = cluster.path("stranger");
    std::fs::create_dir(&stranger).unwrap();
    std::fs::write(stranger.join("ARCHIVE"), "kind = \"archive\"\ncluster_id = \"another-cluster\"\n").unwrap();
    run(&|member| set_flag(member, "--log", &text(&stranger))).fails_naming(1, &["archive of cluster another-cluster"]);
    // A backup of another cluster does not go with this one's archive.
    let other = Cluster::start(ClusterOptions::new(1, 1));
    let foreign = other.path("foreign");
    other.cairn(&["admin", "checkpoint"]).ok();
    other.cairn(&["admin", "backup", &text(&foreign)]).ok();
    run(&|member| set_flag(member, "--restore", &text(&foreign))).fails_naming(1, &["archive of cluster"]);
    // The namenode of another cluster is not restored over the archive of this one, and does not archive into it.
    run(&|member| {
        for flag in ["--restore", "--log"] {
            remove_flag(member, flag);
        }
        set_flag(member, "--dir", &text(&cluster.path("fresh")));
    })
    .fails_naming(1, &["is the archive of cluster"]);
}

/// The namenode of the future that was left behind starts again; datanodes that know the restored one refuse it.
fn old_namenode_is_fenced(cluster: &mut Cluster, lost: &Path) {
    cluster.kill_namenode();
    cluster.kill_datanode(0);
    let restored = cluster.namenode.clone();
    set_flag(&mut cluster.namenode, "--dir", &text(lost));
    cluster.restart_namenode();
    wait_for("the old namenode answers", PATIENCE, || {
        let run = cluster.cairn(&["--json", "admin", "report"]);
        serde_json::from_slice::<Value>(&run.stdout).map_err(|_| run.stderr)
    });
    let node = cluster.datanodes[0].clone();
    let run = cluster.run_member(&node);
    let refusal = run.stderr.contains("has seen epoch") && run.stderr.contains("this namenode has only 1");
    assert!(refusal, "{}", run.stderr);
    let report = report(cluster);
    let live = report["nodes"].as_array().unwrap().iter().filter(|node| node["state"] == "live").count();
    assert_eq!(live, 0, "{report}");
    cluster.kill_namenode();
    cluster.namenode = restored;
    cluster.restart_namenode();
    cluster.restart_datanode(0);
    cluster.wait_serving(PATIENCE);
    assert_eq!(cluster.cat("/new"), b"new");
}

#[test]
fn two_metadata_directories_fail_one_after_the_other() {
    let mut cluster = Cluster::start(alone());
    cluster.cairn(&["mkdir", "/first"]).ok();
    let (one, two) = (cluster.dir().join("namenode"), cluster.path("second"));
    let away = |dir: &Path| PathBuf::from(format!("{}.away", dir.display()));
    let both = format!("{},{}", text(&one), text(&two));
    cluster.kill_namenode();
    set_flag(&mut cluster.namenode, "--dir", &both);
    cluster.run_member(&cluster.namenode).fails_naming(1, &[&text(&two), "is empty", "--accept-missing-dir"]);
    cluster.namenode.command_mut().push("--accept-missing-dir".into());
    cluster.restart_namenode();
    cluster.wait_serving(PATIENCE);
    cluster.namenode.command_mut().pop();
    assert_eq!(report(&cluster)["metadata_dirs"], 2);

    // The second folder goes while it is in use.
    let epoch = report(&cluster)["epoch"].as_u64().unwrap();
    std::fs::rename(&two, away(&two)).unwrap();
    cluster.cairn(&["mkdir", "/second"]).ok();
    let after = report(&cluster);
    assert_eq!((&after["metadata_dirs"], &after["epoch"]), (&1.into(), &(epoch + 1).into()), "{after}");
    assert!(cluster.cairn(&["admin", "report"]).ok().contains("only 1 of 2 metadata directories"));
    cluster.put("/file", b"bytes", &[]);

    // The first one, too: the namenode ends, and says why.
    std::fs::rename(&one, away(&one)).unwrap();
    cluster.cairn(&["--set", "client.retry_deadline_ms=500", "mkdir", "/third"]).fails(1);
    let process = cluster.namenode.process;
    wait_until("the namenode has ended", PATIENCE, || !process.runs());

    // The one that is behind is not started from; with the other one it is filled, and nothing acknowledged is gone.
    std::fs::rename(away(&two), &two).unwrap();
    let mut stale = cluster.namenode.clone();
    set_flag(&mut stale, "--dir", &text(&two));
    cluster.run_member(&stale).fails_naming(1, &[&text(&two), "may be behind"]);
    std::fs::rename(away(&one), &one).unwrap();
    cluster.restart_namenode();
    cluster.wait_serving(PATIENCE);
    assert_eq!(report(&cluster)["metadata_dirs"], 2);
    for path in ["/first", "/second"] {
        cluster.cairn(&["stat", path]).ok();
    }
    assert_eq!(cluster.cat("/file"), b"bytes");
    // Each of them alone holds everything now.
    cluster.kill_namenode();
    set_flag(&mut stale, "--dir", &text(&two));
    stale.command_mut().push("--accept-missing-dir".into());
    cluster.namenode = stale;
    cluster.restart_namenode();
    cluster.wait_serving(PATIENCE);
    assert_eq!(cluster.cat("/file"), b"bytes");
}

#[test]
fn the_archive_fails_and_comes_back_and_nobody_waits_for_it() {
    let folder = tempfile::tempdir().unwrap();
    let archive = folder.path().join("log");
    let cluster = archiving(&archive, alone());
    cluster.cairn(&["mkdir", "/a"]).ok();
    wait_archived(&cluster);
    let away = folder.path().join("away");
    std::fs::rename(&archive, &away).unwrap();
    std::fs::write(&archive, b"a file in its place").unwrap();
    cluster.cairn(&["mkdir", "/b"]).ok();
    wait_for("the report says so", PATIENCE, || {
        let report = report(&cluster);
        if report["archive_failure"].as_str().is_some_and(|why| !why.is_empty()) {
            Ok(())
        } else {
            Err(report.to_string())
        }
    });
    assert!(cluster.cairn(&["admin", "report"]).ok().contains("transactions behind"));
    cluster.put("/file", b"bytes", &[]);
    std::fs::remove_file(&archive).unwrap();
    std::fs::rename(&away, &archive).unwrap();
    wait_archived(&cluster);
    assert_eq!(report(&cluster)["archive_failure"], "");
}

//! Many at once: writers, files, readers.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "tests fail by panicking")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use cairn_client::fs::{ClientSettings, CreateOptions, FileSystem};
use cairn_common::Env;
use cairn_tests::data::{self, sha256};
use cairn_tests::{Cluster, Run};

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

async fn connect(cluster: &Cluster) -> FileSystem {
    FileSystem::connect(Env::system(), ClientSettings::at(&*cluster.namenode.addr)).await.unwrap()
}

#[test]
fn a_hundred_puts_from_eight_processes() {
    let cluster = Cluster::small();
    cluster.cairn(&["mkdir", "/in"]).ok();
    let contents: Vec<Vec<u8>> = (0..100).map(|k| data::random(k, 1_000 + 700 * k as usize)).collect();
    for (k, bytes) in contents.iter().enumerate() {
        cluster.local_file(&format!("in{k}"), bytes);
    }
    let cluster = &cluster;
    std::thread::scope(|scope| {
        for worker in 0..8 {
            scope.spawn(move || {
                for k in (worker..100).step_by(8) {
                    cluster.cairn(&["put", &format!("in{k}"), &format!("/in/f{k}")]).ok();
                }
            });
        }
    });
    assert_eq!(cluster.json(&["ls", "/in"]).as_array().unwrap().len(), 100);
    for (k, bytes) in contents.iter().enumerate().step_by(7) {
        assert_eq!(sha256(&cluster.cat(&format!("/in/f{k}"))), sha256(bytes), "file {k}");
    }
    // A copy that failed is ordered again after 20 s.
    cluster.wait_healthy(Duration::from_secs(60));
}

#[test]
fn a_hundred_writers_of_one_process_at_once() {
    let cluster = Cluster::small();
    runtime().block_on(async {
        let fs = connect(&cluster).await;
        let mut tasks = Vec::new();
        for k in 0..100_u64 {
            let fs = fs.clone();
            tasks.push(tokio::spawn(async move {
                let bytes = data::random(k, 200_000);
                let mut out = fs.create(&format!("/f{k}"), CreateOptions::default()).await.unwrap();
                out.write(&bytes).await.unwrap();
                out.close().await.unwrap();
                let mut input = fs.open(&format!("/f{k}")).await.unwrap();
                let mut back = Vec::new();
                while let Some(chunk) = input.next_chunk().await.unwrap() {
                    back.extend_from_slice(&chunk);
                }
                assert_eq!(sha256(&back), sha256(&bytes), "file {k}");
            }));
        }
        for task in tasks {
            task.await.unwrap();
        }
    });
}

#[test]
fn a_hundred_thousand_empty_files_in_one_directory_are_listed_page_by_page() {
    let cluster = Cluster::small();
    let count = 100_000_usize;
    cluster.cairn(&["mkdir", "/many"]).ok();
    let started = Instant::now();
    runtime().block_on(async {
        let fs = Arc::new(connect(&cluster).await);
        let mut tasks = Vec::new();
        for worker in 0..128 {
            let fs = Arc::clone(&fs);
            tasks.push(tokio::spawn(async move {
                for k in (worker..count).step_by(128) {
                    let out = fs.create(&format!("/many/f{k:06}"), CreateOptions::default()).await.unwrap();
                    out.close().await.unwrap();
                }
            }));
        }
        for task in tasks {
            task.await.unwrap();
        }
        println!("{count} files made in {:?}", started.elapsed());
        let listing = Instant::now();
        let mut pages = fs.list("/many").unwrap();
        let (mut seen, mut largest) = (0, 0);
        while let Some(page) = pages.next().await.unwrap() {
            largest = largest.max(page.len());
            for entry in page {
                assert_eq!(entry.path, format!("/many/f{seen:06}"), "in order, none twice, none left out");
                seen += 1;
            }
        }
        assert_eq!(seen, count);
        assert!(largest <= 1_000, "a page of {largest}");
        println!("listed in {:?}", listing.elapsed());
    });
    let listed = cluster.cairn(&["ls", "/many"]).ok();
    assert_eq!(listed.lines().filter(|line| line.contains("/many/f")).count(), count);
    // Deleting them is one call, and the namenode goes on serving.
    cluster.cairn(&["rm", "-r", "--skip-trash", "/many"]).ok();
    cluster.cairn(&["stat", "/many"]).fails(1);
    println!("all of it in {:?}", started.elapsed());
}

#[test]
fn one_name_many_writers_one_wins() {
    let cluster = Cluster::small();
    let runs: Vec<Run> = std::thread::scope(|scope| {
        let put = |k: u8| cluster.cairn_with(&["put", "-", "/same"], &[k; 10_000]);
        let workers: Vec<_> = (0..8).map(|k| scope.spawn(move || put(k))).collect();
        workers.into_iter().map(|worker| worker.join().unwrap()).collect()
    });
    let winners: Vec<usize> = (0..8).filter(|k| runs[*k].code == 0).collect();
    assert_eq!(winners.len(), 1, "{runs:?}");
    assert_eq!(cluster.cat("/same"), [winners[0] as u8; 10_000]);
    for (k, run) in runs.into_iter().enumerate() {
        if k != winners[0] {
            run.fails_naming(1, &["/same"]);
        }
    }
}

#[test]
fn readers_see_whole_files_while_others_replace_them() {
    let cluster = Cluster::small();
    cluster.put("/f", &[b'a'; 300_000], &[]);
    let cluster = &cluster;
    std::thread::scope(|scope| {
        scope.spawn(move || {
            for k in 0..6 {
                cluster.put("/next", &vec![b'b' + k; 300_000], &["-f"]);
                cluster.cairn(&["mv", "-f", "/next", "/f"]).ok();
            }
        });
        for _ in 0..2 {
            scope.spawn(move || {
                for _ in 0..8 {
                    let run = cluster.cairn(&["cat", "/f"]);
                    // A reader may find that the file it opened was replaced; it never gets a mixture.
                    if run.code == 0 {
                        assert_eq!(run.stdout.len(), 300_000);
                        assert!(run.stdout.iter().all(|byte| *byte == run.stdout[0]));
                    }
                }
            });
        }
    });
}

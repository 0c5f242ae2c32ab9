//! Names: globs, listings, walks, and a namenode that is not there.

use super::*;
use cairn_client::fs::ErrorCode;

async fn tree() -> Cluster {
    let cluster = Cluster::healthy(0).await;
    for directory in ["/logs", "/logs/2025-12", "/logs/2026-01", "/logs/2026-02", "/data"] {
        cluster.namenode.add(directory, true);
    }
    for file in
        ["/logs/2025-12/a.gz", "/logs/2026-01/a.gz", "/logs/2026-01/b.txt", "/logs/2026-02/c.gz", "/logs/2026-x"]
    {
        cluster.namenode.add(file, false);
    }
    cluster.namenode.add("/data/odd*name", false);
    cluster
}

async fn glob(cluster: &Cluster, pattern: &str) -> Vec<String> {
    cluster.fs.glob(pattern).await.unwrap().into_iter().map(|status| status.path).collect()
}

#[tokio::test]
async fn globs_find_what_matches_in_order() {
    let cluster = tree().await;
    assert_eq!(glob(&cluster, "/logs/2026-*/*.gz").await, ["/logs/2026-01/a.gz", "/logs/2026-02/c.gz"]);
    assert_eq!(glob(&cluster, "/logs/2026-0[2-9]").await, ["/logs/2026-02"]);
    assert_eq!(glob(&cluster, "/{logs/2025-12,data}/*").await, ["/data/odd*name", "/logs/2025-12/a.gz"]);
    assert_eq!(glob(&cluster, "/data/odd\\*name").await, ["/data/odd*name"]);
    assert_eq!(glob(&cluster, "/logs").await, ["/logs"]);
    assert_eq!(glob(&cluster, "/").await, ["/"]);
    assert!(glob(&cluster, "/nothing/*").await.is_empty());
    assert!(glob(&cluster, "/nothing").await.is_empty());
}

#[tokio::test]
async fn globs_list_only_what_can_match() {
    let cluster = tree().await;
    glob(&cluster, "/logs/2026-*/a.gz").await;
    // The parents are listed, the last component is looked up: no directory below /data or 2025-12 is touched.
    assert_eq!(cluster.namenode.count("list"), 1);
}

#[tokio::test]
async fn pages_and_walks_give_every_name_once() {
    let cluster = tree().await;
    cluster.namenode.state.lock().unwrap().page = 2;
    let names: Vec<_> = cluster.fs.list_all("/logs").await.unwrap().into_iter().map(|status| status.path).collect();
    assert_eq!(names, ["/logs/2025-12", "/logs/2026-01", "/logs/2026-02", "/logs/2026-x"]);
    let mut walk = cluster.fs.walk("/logs").await.unwrap();
    let mut seen = Vec::new();
    while let Some(status) = walk.next().await.unwrap() {
        seen.push(status.path);
    }
    let expected = ["", "/2025-12", "/2025-12/a.gz", "/2026-01", "/2026-01/a.gz", "/2026-01/b.txt"];
    let expected =
        expected.into_iter().chain(["/2026-02", "/2026-02/c.gz", "/2026-x"]).map(|end| format!("/logs{end}"));
    assert_eq!(seen, expected.collect::<Vec<_>>());
}

#[tokio::test]
async fn nobody_at_the_address_is_told_soon() {
    let started = tokio::time::Instant::now();
    let settings = ClientSettings { first_connect_ms: 300, ..ClientSettings::at("127.0.0.1:1") };
    let error = FileSystem::connect(Env::system(), settings).await.err().unwrap();
    assert_eq!(error.code(), ErrorCode::Unreachable);
    assert!(error.message().starts_with("no namenode answers at 127.0.0.1:1"), "{error}");
    assert!(started.elapsed().as_secs() < 30);
}

#[tokio::test]
async fn bad_paths_do_not_reach_the_namenode() {
    let cluster = Cluster::healthy(0).await;
    for path in ["relative", "/a/../b", "/a:b", ""] {
        assert_eq!(cluster.fs.status(path).await.unwrap_err().code(), ErrorCode::InvalidPath, "{path:?}");
    }
    assert_eq!(cluster.namenode.count("get_status"), 0);
}

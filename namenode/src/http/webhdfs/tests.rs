//! WebHDFS of a whole namenode in this process, without datanodes: names, shapes of answers, errors.

use std::time::Duration;

use cairn_common::Env;
use cairn_common::process;
use cairn_proto::pb;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::core::CoreSettings;
use crate::{Namenode, NamenodeSettings, Running};

struct World {
    env: Env,
    namenode: Running,
    http: String,
    root: String,
    _dir: TempDir,
}

/// An answer: status, headers, body.
struct Got {
    status: u16,
    head: String,
    body: String,
}

impl Got {
    #[track_caller]
    fn json(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.body);
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error} in {:?}", self.body))
    }

    #[track_caller]
    fn refused(&self, status: u16, exception: &str) -> String {
        assert_eq!(self.status, status, "{}", self.body);
        let body: Value = serde_json::from_str(&self.body).unwrap();
        assert_eq!(body["RemoteException"]["exception"], exception, "{body}");
        body["RemoteException"]["message"].as_str().unwrap().to_owned()
    }
}

impl World {
    async fn start() -> Self {
        let (env, dir) = (Env::system(), tempfile::tempdir().unwrap());
        let settings = NamenodeSettings {
            dirs: vec![dir.path().join("nn")],
            listen: "127.0.0.1:0".into(),
            http: Some("127.0.0.1:0".into()),
            segment_step_bytes: 64 << 10,
            core: CoreSettings { min_block_size: 512, ..CoreSettings::default() },
            ..NamenodeSettings::default()
        };
        let namenode = Namenode::start(env.clone(), settings).await.unwrap();
        let http = namenode.http_addr.unwrap().to_string();
        Self { env, namenode, http, root: process::user_name(), _dir: dir }
    }

    /// As the user who started the namenode.
    async fn send(&self, method: &str, path: &str, query: &str) -> Got {
        let user = &self.root;
        self.raw(&format!("{method} /webhdfs/v1{path}?user.name={user}&{query} HTTP/1.1\r\nHost: {}\r\n", self.http))
            .await
    }

    async fn raw(&self, head: &str) -> Got {
        let mut conn = self.env.net.connect(&self.http, Duration::from_secs(5)).await.unwrap();
        conn.write_all(format!("{head}Connection: close\r\n\r\n").as_bytes()).await.unwrap();
        let mut got = String::new();
        conn.read_to_string(&mut got).await.unwrap();
        let (head, body) = got.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Got { status, head: head.to_ascii_lowercase(), body: body.to_owned() }
    }

    async fn get(&self, path: &str, query: &str) -> Got {
        self.send("GET", path, query).await
    }

    /// An empty, closed file.
    async fn touch(&self, path: &str) {
        let state_caller = Caller { user: self.root.clone(), groups: Vec::new(), host: "127.0.0.1".into() };
        let owner = self.namenode.owner_for_tests();
        let client_name = "test".to_owned();
        let request = pb::CreateRequest {
            path: path.into(),
            permission: 0o640,
            create_parents: true,
            client_name: client_name.clone(),
            ..Default::default()
        };
        let made: pb::CreateResponse = owner.call(state_caller.clone(), request).await.unwrap();
        let inode = made.status.unwrap().inode;
        let request = pb::CompleteRequest { inode, client_name, ..Default::default() };
        let _: pb::CompleteResponse = owner.call(state_caller, request).await.unwrap();
    }

    async fn end(self) {
        self.namenode.shutdown().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn statuses_and_listings_have_the_shape_of_hdfs() {
    let world = World::start().await;
    assert_eq!(world.send("PUT", "/d/e", "op=MKDIRS&permission=1750").await.json(), json!({ "boolean": true }));
    world.touch("/d/a file").await;
    let times = "op=SETTIMES&modificationtime=1000&accesstime=2000";
    assert_eq!(world.send("PUT", "/d/a%20file", times).await.status, 200);
    let status = world.get("/d/a%20file", "op=getfilestatus").await.json()["FileStatus"].clone();
    let expected = json!({
        "accessTime": 2_000, "blockSize": 134_217_728, "childrenNum": 0, "fileId": status["fileId"], "group": "supergroup",
        "length": 0, "modificationTime": 1_000, "owner": world.root, "pathSuffix": "", "permission": "640", "replication": 3,
        "storagePolicy": 0, "type": "FILE"
    });
    assert_eq!(status, expected);
    assert!(status["fileId"].as_u64().unwrap() > 0);
    let listed = world.get("/d/", "op=LISTSTATUS").await.json();
    let entries = listed["FileStatuses"]["FileStatus"].as_array().unwrap().clone();
    let names: Vec<_> = entries.iter().map(|entry| entry["pathSuffix"].as_str().unwrap()).collect();
    assert_eq!(names, ["a file", "e"]);
    assert_eq!(
        (&entries[1]["type"], &entries[1]["permission"], &entries[1]["blockSize"], &entries[1]["replication"]),
        (&json!("DIRECTORY"), &json!("1750"), &json!(0), &json!(0))
    );
    let itself = world.get("/d/a%20file", "op=LISTSTATUS").await.json();
    assert_eq!(itself["FileStatuses"]["FileStatus"], json!([expected]));
    assert_eq!(world.get("/d/e", "op=LISTSTATUS").await.json(), json!({ "FileStatuses": { "FileStatus": [] } }));
    let page = world.get("/d", "op=LISTSTATUS_BATCH&startAfter=a%20file").await.json();
    assert_eq!(page["DirectoryListing"]["remainingEntries"], 0);
    assert_eq!(page["DirectoryListing"]["partialListing"]["FileStatuses"]["FileStatus"], json!([entries[1]]));
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_directory_is_listed_whole_and_in_pages() {
    let world = World::start().await;
    let owner = world.namenode.owner_for_tests();
    let caller = Caller { user: world.root.clone(), groups: Vec::new(), host: String::new() };
    for at in 0..2_500 {
        let request =
            pb::MkdirsRequest { call: None, path: format!("/many/{at:05}"), permission: 0o755, create_parents: true };
        let _: pb::MkdirsResponse = owner.call(caller.clone(), request).await.unwrap();
    }
    let got = world.get("/many", "op=LISTSTATUS").await;
    assert!(got.head.contains("transfer-encoding: chunked"), "{}", got.head);
    // Without the chunks' own lines.
    let text: String =
        got.body.split("\r\n").collect::<Vec<_>>().chunks(2).filter_map(|pair| pair.get(1).copied()).collect();
    let listed: Value = serde_json::from_str(&text).unwrap();
    let entries = listed["FileStatuses"]["FileStatus"].as_array().unwrap();
    assert!(entries.iter().enumerate().all(|(at, entry)| entry["pathSuffix"] == format!("{at:05}")));
    assert_eq!(entries.len(), 2_500);
    let (mut after, mut seen) = (String::new(), 0);
    loop {
        let page = world.get("/many", &format!("op=LISTSTATUS_BATCH&startAfter={after}")).await.json();
        let entries =
            page["DirectoryListing"]["partialListing"]["FileStatuses"]["FileStatus"].as_array().unwrap().clone();
        seen += entries.len();
        let Some(last) = entries.last() else { break };
        after = last["pathSuffix"].as_str().unwrap().to_owned();
        assert_eq!(page["DirectoryListing"]["remainingEntries"], 2_500 - seen);
    }
    assert_eq!(seen, 2_500);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn renames_say_no_or_why() {
    let world = World::start().await;
    world.touch("/a/f").await;
    world.touch("/a/g").await;
    world.send("PUT", "/dir", "op=MKDIRS").await.json();
    let rename = |from: &'static str, to: &'static str, more: &'static str| {
        let world = &world;
        async move { world.send("PUT", from, &format!("op=RENAME&destination={to}{more}")).await }
    };
    let (yes, no) = (json!({ "boolean": true }), json!({ "boolean": false }));
    assert_eq!(rename("/none", "/x", "").await.json(), no);
    assert_eq!(rename("/a/f", "/a/g", "").await.json(), no, "it is there");
    assert_eq!(rename("/a/f", "/no/parent", "").await.json(), no);
    assert_eq!(rename("/a", "/a/b", "").await.json(), no, "into itself");
    assert_eq!(rename("/a", "/a", "").await.json(), no);
    assert_eq!(rename("/", "/dir", "").await.json(), no);
    assert_eq!(rename("/a/f", "/a/f", "").await.json(), yes);
    assert_eq!(rename("/a/f", "/dir", "").await.json(), yes);
    assert_eq!(world.get("/dir/f", "op=GETFILESTATUS").await.status, 200, "into the directory");
    rename("/dir/f", "/a/g", "&renameoptions=NONE").await.refused(403, "FileAlreadyExistsException");
    rename("/none", "/a/x", "&renameoptions=OVERWRITE").await.refused(404, "FileNotFoundException");
    let done = rename("/dir/f", "/a/g", "&renameoptions=overwrite").await;
    assert_eq!((done.status, done.body.as_str()), (200, ""));
    rename("/a/g", "/a/x", "&renameoptions=SOMEHOW").await.refused(400, "IllegalArgumentException");
    world.send("PUT", "/a/g", "op=RENAME").await.refused(400, "IllegalArgumentException");
    world.send("PUT", "/a/g", "op=RENAME&destination=relative").await.refused(400, "InvalidPathException");
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn attributes_are_changed_and_asked_for() {
    let world = World::start().await;
    world.touch("/f").await;
    world.send("PUT", "/d", "op=MKDIRS").await.json();
    for (path, query) in [
        ("/f", "op=SETPERMISSION&permission=600"),
        ("/f", "op=SETOWNER&owner=ann&group=staff"),
        ("/f", "op=SETTIMES&modificationtime=5&accesstime=-1"),
    ] {
        let got = world.send("PUT", path, query).await;
        assert_eq!((got.status, got.body.as_str()), (200, ""), "{query}");
    }
    assert_eq!(world.send("PUT", "/f", "op=SETREPLICATION&replication=2").await.json(), json!({ "boolean": true }));
    assert_eq!(world.send("PUT", "/d", "op=SETREPLICATION&replication=2").await.json(), json!({ "boolean": false }));
    assert_eq!(world.send("PUT", "/none", "op=SETREPLICATION&replication=2").await.json(), json!({ "boolean": false }));
    let status = &world.get("/f", "op=GETFILESTATUS").await.json()["FileStatus"];
    for (name, value) in [
        ("owner", json!("ann")),
        ("group", json!("staff")),
        ("permission", json!("600")),
        ("replication", json!(2)),
        ("modificationTime", json!(5)),
    ] {
        assert_eq!(status[name], value, "{status}");
    }
    let acl = json!({ "AclStatus": { "entries": [], "group": "staff", "owner": "ann", "permission": "600", "stickyBit": false } });
    assert_eq!(world.get("/f", "op=GETACLSTATUS").await.json(), acl);
    assert_eq!(world.get("/f", "op=GETXATTRS&encoding=hex").await.json(), json!({ "XAttrs": [] }));
    assert_eq!(world.get("/f", "op=LISTXATTRS").await.json(), json!({ "XAttrNames": "[]" }));
    world.get("/f", "op=GETXATTRS&xattr.name=user.a").await.refused(403, "IOException");
    assert_eq!(world.get("/f", "op=CHECKACCESS&fsaction=rwx").await.status, 200, "the superuser may");
    let as_bob =
        format!("GET /webhdfs/v1/f?op=CHECKACCESS&fsaction=r--&user.name=bob HTTP/1.1\r\nHost: {}\r\n", world.http);
    let said = world.raw(&as_bob).await.refused(403, "AccessControlException");
    assert!(said.starts_with("Permission denied: user=bob, access=READ, inode=\"/f\":ann:staff:-rw-------"), "{said}");
    world.send("PUT", "/f", "op=SETOWNER").await.refused(400, "IllegalArgumentException");
    world.send("PUT", "/f", "op=SETPERMISSION&permission=9").await.refused(400, "IllegalArgumentException");
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_cluster_and_its_users_are_described() {
    let world = World::start().await;
    world.touch("/d/f").await;
    let user = &world.root;
    assert_eq!(world.get("/", "op=GETHOMEDIRECTORY").await.json(), json!({ "Path": format!("/user/{user}") }));
    assert_eq!(world.get("/d", "op=GETTRASHROOT").await.json(), json!({ "Path": format!("/user/{user}/.Trash") }));
    assert_eq!(world.get("/", "op=GETDELEGATIONTOKEN&renewer=x").await.json(), json!({ "Token": null }));
    let nobody = format!("GET /webhdfs/v1/?op=GETHOMEDIRECTORY HTTP/1.1\r\nHost: {}\r\n", world.http);
    assert_eq!(world.raw(&nobody).await.json(), json!({ "Path": "/user/dr.who" }));
    assert_eq!(
        world.get("/d", "op=GETCONTENTSUMMARY").await.json(),
        json!({ "ContentSummary": {
            "directoryCount": 1, "ecPolicy": "", "fileCount": 1, "length": 0, "quota": -1, "spaceConsumed": 0, "spaceQuota": -1,
            "typeQuota": {}
        }})
    );
    assert_eq!(world.get("/d", "op=GETQUOTAUSAGE").await.json()["QuotaUsage"]["fileAndDirectoryCount"], 2);
    let defaults = world.get("/", "op=GETSERVERDEFAULTS").await.json()["FsServerDefaults"].clone();
    assert_eq!((&defaults["replication"], &defaults["blockSize"]), (&json!(3), &json!(134_217_728)));
    assert_eq!((&defaults["trashInterval"], &defaults["encryptDataTransfer"]), (&json!(1_440), &json!(false)));
    assert_eq!(
        world.get("/", "op=GETSTATUS").await.json(),
        json!({ "FsStatus": { "capacity": 0, "remaining": 0, "used": 0 } })
    );
    let locations = world.get("/d/f", "op=GETFILEBLOCKLOCATIONS").await.json();
    assert_eq!(locations, json!({ "BlockLocations": { "BlockLocation": [] } }));
    let blocks = world.get("/d/f", "op=GET_BLOCK_LOCATIONS&length=100").await.json();
    assert_eq!(
        blocks,
        json!({ "LocatedBlocks": {
            "fileLength": 0, "isLastBlockComplete": true, "isUnderConstruction": false, "lastLocatedBlock": null,
            "locatedBlocks": []
        }})
    );
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_are_deleted_and_files_cut_and_joined() {
    let world = World::start().await;
    world.touch("/d/f").await;
    world.touch("/d/g").await;
    let (yes, no) = (json!({ "boolean": true }), json!({ "boolean": false }));
    assert_eq!(world.send("POST", "/d/f", "op=TRUNCATE&newlength=0").await.json(), yes);
    world.send("POST", "/d/f", "op=TRUNCATE&newlength=9").await.refused(400, "IllegalArgumentException");
    world.send("POST", "/d/f", "op=TRUNCATE").await.refused(400, "IllegalArgumentException");
    world.send("POST", "/d/f", "op=CONCAT").await.refused(400, "IllegalArgumentException");
    world.send("POST", "/d/f", "op=CONCAT&sources=/d/none").await.refused(404, "FileNotFoundException");
    world.send("DELETE", "/d", "op=DELETE").await.refused(403, "PathIsNotEmptyDirectoryException");
    assert_eq!(world.send("DELETE", "/none", "op=DELETE").await.json(), no);
    assert_eq!(world.send("DELETE", "/", "op=DELETE&recursive=true").await.json(), no);
    assert_eq!(world.send("DELETE", "/d", "op=DELETE&recursive=True").await.json(), yes);
    world.get("/d", "op=GETFILESTATUS").await.refused(404, "FileNotFoundException");
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_is_refused_in_the_form_of_hdfs() {
    let world = World::start().await;
    world.touch("/f").await;
    let http = &world.http;
    for (method, op) in [
        ("GET", "GETSTORAGEPOLICY"),
        ("GET", "GETSNAPSHOTDIFF"),
        ("PUT", "SETACL"),
        ("PUT", "SETXATTR"),
        ("PUT", "CREATESYMLINK"),
        ("PUT", "RENEWDELEGATIONTOKEN"),
        ("PUT", "CREATESNAPSHOT"),
        ("POST", "UNSETSTORAGEPOLICY"),
        ("DELETE", "DELETESNAPSHOT"),
    ] {
        let said = world.send(method, "/f", &format!("op={op}")).await.refused(400, "UnsupportedOperationException");
        assert!(said.contains(op), "{said}");
    }
    world.get("/f", "op=MKDIRS").await.refused(400, "IllegalArgumentException");
    world.get("/f", "op=NONSENSE").await.refused(400, "IllegalArgumentException");
    world.get("/f", "").await.refused(400, "IllegalArgumentException");
    world.send("PATCH", "/f", "op=GETFILESTATUS").await.refused(400, "IllegalArgumentException");
    world.get("/f", "op=OPEN&offset=-1").await.refused(400, "IllegalArgumentException");
    world.get("/f", "op=OPEN&offset=1").await.refused(403, "IOException");
    world.get("/", "op=OPEN").await.refused(404, "FileNotFoundException");
    world.get("/none", "op=GETFILECHECKSUM").await.refused(404, "FileNotFoundException");
    world.send("POST", "/none", "op=APPEND").await.refused(404, "FileNotFoundException");
    world.send("PUT", "/f", "op=CREATE").await.refused(403, "FileAlreadyExistsException");
    world.send("PUT", "/", "op=CREATE&overwrite=true").await.refused(403, "FileAlreadyExistsException");
    world.send("PUT", "/f/below", "op=CREATE").await.refused(403, "ParentNotDirectoryException");
    world.get("/a:b", "op=GETFILESTATUS").await.refused(400, "InvalidPathException");
    // Without a datanode nobody is sent anywhere.
    let said = world.send("PUT", "/new", "op=CREATE").await.refused(403, "IOException");
    assert!(said.contains("no datanode is alive"), "{said}");

    let page = "Origin: http://evil.example\r\n";
    let head = format!("GET /webhdfs/v1/?op=LISTSTATUS HTTP/1.1\r\nHost: {http}\r\n{page}");
    world.raw(&head).await.refused(403, "AccessControlException");
    let rebound = "GET /webhdfs/v1/?op=LISTSTATUS HTTP/1.1\r\nHost: evil.example\r\n";
    let said = world.raw(rebound).await.refused(403, "AccessControlException");
    assert!(said.contains("namenode.http_names"), "{said}");
    assert_eq!(world.raw("GET /metrics HTTP/1.1\r\nHost: evil.example\r\n").await.status, 403);
    world.end().await;
}

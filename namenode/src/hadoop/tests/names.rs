//! Names, attributes, what is not there.

use super::*;

fn rename(from: &str, to: &str) -> wire::RenameRequest {
    wire::RenameRequest { src: from.into(), dst: to.into() }
}

fn rename2(from: &str, to: &str, overwrite: bool) -> wire::Rename2Request {
    wire::Rename2Request { src: from.into(), dst: to.into(), overwrite_dest: overwrite, move_to_trash: None }
}

fn delete(path: &str, recursive: bool) -> wire::DeleteRequest {
    wire::DeleteRequest { src: path.into(), recursive }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn statuses_and_listings() {
    let world = World::start().await;
    assert!(world.info("/none").await.is_none(), "missing is no error");
    world.mkdirs("/d/sub").await;
    world.touch("/d/f").await;
    let file = world.info("/d/f").await.unwrap();
    assert_eq!(
        (file.file_type(), file.length, file.block_replication(), file.block_size()),
        (wire::hdfs_file_status::FileType::IsFile, 0, 2, BLOCK)
    );
    assert_eq!((file.permission.perm, file.children_num(), file.path.len(), file.flags()), (0o644, 0, 0, 0));
    let list = |path: &str, after: &str| wire::GetListingRequest {
        src: path.into(),
        start_after: Bytes::copy_from_slice(after.as_bytes()),
        need_location: false,
    };
    let names = async |path: &str, after: &str| {
        let page: wire::GetListingResponse = world.ask("getListing", list(path, after)).await.unwrap();
        page.dir_list.map(|page| page.partial_listing.into_iter().map(|entry| entry.path).collect::<Vec<_>>())
    };
    assert_eq!(names("/d", "").await.unwrap(), ["f", "sub"]);
    assert_eq!(names("/d", "f").await.unwrap(), ["sub"]);
    assert_eq!(names("/d/f", "").await.unwrap(), [""], "a file lists as itself");
    assert_eq!(names("/none", "").await, None);
    let (class, _) = world.refused("getFileInfo", wire::GetFileInfoRequest { src: "d".into() }).await;
    assert_eq!(class, "org.apache.hadoop.fs.InvalidPathException");
    let summary = wire::GetContentSummaryRequest { path: "/d".into() };
    let summary: wire::GetContentSummaryResponse = world.ask("getContentSummary", summary).await.unwrap();
    let summary = summary.summary;
    assert_eq!((summary.file_count, summary.directory_count, summary.quota), (1, 2, u64::MAX));
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_older_rename_says_no_and_the_newer_why() {
    let world = World::start().await;
    world.mkdirs("/d").await;
    world.mkdirs("/full/x").await;
    world.touch("/f").await;
    world.touch("/g").await;
    assert!(world.yes("rename", rename("/f", "/d")).await, "into a directory");
    assert!(world.info("/d/f").await.is_some());
    assert!(world.yes("rename", rename("/d/f", "/d/f")).await, "onto itself");
    assert!(world.yes("rename", rename("/d/f", "/d")).await, "to where it is");
    for (from, to) in [("/none", "/x"), ("/g", "/d/f"), ("/g", "/no/parent"), ("/d", "/d/f/x"), ("/d", "/d")] {
        let answer = world.ask::<wire::BoolResponse>("rename", rename(from, to)).await;
        let is_no = answer.as_ref().is_ok_and(|answer| !answer.result);
        let is_a_file = answer.as_ref().is_err_and(|error| error.class.ends_with("ParentNotDirectoryException"));
        assert!(is_no || is_a_file, "{from} to {to}: {answer:?}");
    }
    let io = "java.io.IOException";
    let exists = "org.apache.hadoop.fs.FileAlreadyExistsException";
    let cases = [
        ("/none", "/x", false, "java.io.FileNotFoundException", "rename source /none is not found."),
        ("/g", "/d/f", false, exists, "rename destination /d/f already exists"),
        ("/g", "/g", true, exists, "The source /g and destination /g are the same"),
        ("/d", "/d/y", false, io, "Rename destination /d/y is a directory or file under source /d"),
        ("/d", "/full", true, io, "rename destination directory is not empty: /full"),
        ("/d", "/g", true, io, "Source /d and destination /g must both be directories"),
    ];
    for (from, to, overwrite, class, message) in cases {
        let found = world.refused("rename2", rename2(from, to, overwrite)).await;
        assert_eq!((&*found.0, &*found.1), (class, message));
    }
    world.ask::<()>("rename2", rename2("/g", "/d/f", true)).await.unwrap();
    assert!(world.info("/g").await.is_none());
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deletes_answer_yes_or_no() {
    let world = World::start().await;
    world.mkdirs("/d/e").await;
    let (class, message) = world.refused("delete", delete("/d", false)).await;
    assert_eq!(class, "org.apache.hadoop.fs.PathIsNotEmptyDirectoryException");
    assert_eq!(message, "`/d is non empty': Directory is not empty");
    assert!(world.yes("delete", delete("/d", true)).await);
    assert!(!world.yes("delete", delete("/d", true)).await);
    assert!(!world.yes("delete", delete("/", true)).await);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repeated_call_gets_its_first_answer_also_after_a_restart() {
    let world = World::start().await;
    world.mkdirs("/d").await;
    for path in ["/a", "/c", "/e"] {
        world.touch(path).await;
    }
    let root = process::user_name();
    let calls = [world.call_of(&root, "rename"), world.call_of(&root, "delete"), world.call_of(&root, "create")];
    let all = async |world: &World| {
        let renamed: wire::BoolResponse = world.send(&calls[0], &rename("/a", "/b")).await.unwrap();
        let deleted: wire::BoolResponse = world.send(&calls[1], &delete("/c", false)).await.unwrap();
        let created: wire::CreateResponse = world.send(&calls[2], &create("/new")).await.unwrap();
        (renamed.result, deleted.result, created.fs.unwrap().file_id())
    };
    let first = all(&world).await;
    assert_eq!((first.0, first.1), (true, true));
    assert_eq!(all(&world).await, first);
    let again = world.refused("create", create("/new")).await;
    assert_eq!(again.0, "org.apache.hadoop.hdfs.protocol.AlreadyBeingCreatedException");
    assert!(again.1.starts_with("Failed to CREATE_FILE /new for writer on 127.0.0.1 because"), "{}", again.1);
    assert!(!world.yes("rename", rename("/a", "/b")).await);
    let world = world.restart().await;
    assert_eq!(all(&world).await, first);
    // A process acts for several users under one client id: none gets the answer of another.
    let mut other = calls[1].clone();
    other.user = "bob".into();
    let refused = world.send::<()>(&other, &delete("/e", false)).await.unwrap_err();
    assert_eq!(refused.class, "org.apache.hadoop.security.AccessControlException");
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refusals_have_hdfs_classes_and_words() {
    let world = World::start().await;
    world.mkdirs("/d").await;
    world.touch("/f").await;
    let exists = "org.apache.hadoop.fs.FileAlreadyExistsException";
    let missing = "java.io.FileNotFoundException";
    let (class, message) = world.refused("create", create("/d")).await;
    assert_eq!((&*class, &*message), (exists, "/d already exists as a directory"));
    let (class, message) = world.refused("create", create("/f")).await;
    assert_eq!((&*class, &*message), (exists, "/f for client 127.0.0.1 already exists"));
    let no_parent = wire::CreateRequest { create_parent: false, ..create("/no/f") };
    let (class, message) = world.refused("create", no_parent).await;
    assert_eq!((&*class, &*message), (missing, "Parent directory doesn't exist: /no"));
    let small = wire::CreateRequest { block_size: 512, ..create("/small") };
    assert_eq!(world.refused("create", small).await.0, "java.io.IOException");
    let striped = wire::CreateRequest { ec_policy_name: Some("RS-6-3-1024k".into()), ..create("/striped") };
    assert!(world.refused("create", striped).await.1.contains("erasure coding"));
    let replace = wire::CreateRequest { create_flag: wire::CreateFlag::Overwrite as u32, ..create("/none") };
    assert_eq!(world.refused("create", replace).await.0, missing);
    let (class, message) = world.refused("mkdirs", mkdirs("/f")).await;
    assert_eq!((&*class, &*message), (exists, "Path is not a directory: /f"));
    let locations = |path: &str| wire::GetBlockLocationsRequest { src: path.into(), offset: 0, length: 1 };
    let (class, message) = world.refused("getBlockLocations", locations("/none")).await;
    assert_eq!((&*class, &*message), (missing, "File does not exist: /none"));
    let (class, message) = world.refused("getBlockLocations", locations("/d")).await;
    assert_eq!((&*class, &*message), (missing, "Path is not a file: /d"));
    let denied = world.ask_as::<()>("ann", "create", create("/d/x")).await.unwrap_err();
    assert_eq!(denied.class, "org.apache.hadoop.security.AccessControlException");
    assert!(denied.message.starts_with("Permission denied: user=ann, access=WRITE, inode=\"/d\":"), "{denied:?}");
    let set = |path: &str| wire::SetReplicationRequest { src: path.into(), replication: 1 };
    assert!(world.yes("setReplication", set("/f")).await);
    assert!(!world.yes("setReplication", set("/none")).await && !world.yes("setReplication", set("/d")).await);
    let concat = wire::ConcatRequest { trg: "/f".into(), srcs: vec![] };
    assert_eq!(world.refused("concat", concat).await.0, "org.apache.hadoop.HadoopIllegalArgumentException");
    let safe = |action: wire::SafeModeAction| wire::SetSafeModeRequest { action: action as i32, checked: None };
    assert!(world.yes("setSafeMode", safe(wire::SafeModeAction::SafemodeEnter)).await);
    let (class, message) = world.refused("create", create("/x")).await;
    assert_eq!(class, "org.apache.hadoop.hdfs.server.namenode.SafeModeException");
    assert!(message.starts_with("Cannot create file /x. Name node is in safe mode."), "{message}");
    assert!(!world.yes("setSafeMode", safe(wire::SafeModeAction::SafemodeLeave)).await);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn times_owners_and_modes_are_set() {
    let world = World::start().await;
    world.touch("/f").await;
    let times = wire::SetTimesRequest { src: "/f".into(), mtime: 5_000, atime: u64::MAX };
    world.ask::<()>("setTimes", times).await.unwrap();
    let permission = wire::FsPermission { perm: 0o600 };
    world.ask::<()>("setPermission", wire::SetPermissionRequest { src: "/f".into(), permission }).await.unwrap();
    let owner = wire::SetOwnerRequest { src: "/f".into(), username: Some("ann".into()), groupname: None };
    world.ask::<()>("setOwner", owner).await.unwrap();
    let status = world.info("/f").await.unwrap();
    assert_eq!((status.modification_time, status.permission.perm, &*status.owner), (5_000, 0o600, "ann"));
    assert_ne!(status.access_time, u64::MAX);
    let mode = wire::acl_entry::Action::ReadWrite as i32;
    let check = wire::CheckAccessRequest { path: "/f".into(), mode };
    world.ask_as::<()>("ann", "checkAccess", check.clone()).await.unwrap();
    let denied = world.ask_as::<()>("bob", "checkAccess", check).await.unwrap_err();
    assert_eq!(denied.class, "org.apache.hadoop.security.AccessControlException");
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_absent_is_said_truly() {
    let world = World::start().await;
    world.touch("/f").await;
    let token = wire::GetDelegationTokenRequest { renewer: "yarn".into() };
    let token: wire::GetDelegationTokenResponse = world.ask("getDelegationToken", token).await.unwrap();
    assert!(token.token.is_none());
    let acl = wire::GetAclStatusRequest { src: "/f".into() };
    let acl: wire::GetAclStatusResponse = world.ask("getAclStatus", acl).await.unwrap();
    assert_eq!((acl.result.entries.len(), acl.result.permission.unwrap().perm), (0, 0o644));
    let change = wire::AclChangeRequest { src: "/f".into(), acl_spec: vec![] };
    assert_eq!(world.refused("setAcl", change).await.0, "org.apache.hadoop.hdfs.protocol.AclException");
    let names: wire::ListXAttrsResponse =
        world.ask("listXAttrs", wire::ListXAttrsRequest { src: "/f".into() }).await.unwrap();
    assert!(names.x_attrs.is_empty());
    let set = wire::SetXAttrRequest { src: "/f".into(), x_attr: None, flag: Some(1) };
    assert_eq!(world.refused("setXAttr", set).await.0, "java.io.IOException");
    let snapshot = wire::SnapshotRequest { snapshot_root: "/f".into() };
    let (class, message) = world.refused("createSnapshot", snapshot).await;
    assert_eq!(class, "org.apache.hadoop.hdfs.protocol.SnapshotException");
    assert!(message.starts_with("Directory is not a snapshottable directory: /f"), "{message}");
    let quota = wire::SetQuotaRequest { path: "/".into(), namespace_quota: 10, storagespace_quota: u64::MAX };
    assert_eq!(world.refused("setQuota", quota).await.0, "java.lang.UnsupportedOperationException");
    let policy = wire::GetStoragePolicyRequest { path: "/f".into() };
    let policy: wire::GetStoragePolicyResponse = world.ask("getStoragePolicy", policy).await.unwrap();
    assert_eq!((policy.storage_policy.policy_id, &*policy.storage_policy.name), (7, "HOT"));
    let defaults: wire::GetServerDefaultsResponse = world.ask("getServerDefaults", ()).await.unwrap();
    let defaults = defaults.server_defaults;
    assert_eq!(defaults.checksum_type(), wire::ChecksumType::ChecksumCrc32c);
    assert_eq!((defaults.bytes_per_checksum, defaults.trash_interval()), (512, 24 * 60));
    world.end().await;
}

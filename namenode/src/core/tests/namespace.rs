//! Directories, names, permissions, safe mode's refusals.

use super::*;
use pb::RenameMode::{NoReplace, Overwrite};

#[test]
fn mkdirs_makes_parents_and_says_what_is_wrong() {
    let mut world = World::new();
    let status = world.mkdirs("root", "/a/b/c", 0o755).unwrap();
    assert_eq!((status.path.as_str(), status.permission, status.owner.as_str()), ("/a/b/c", 0o755, "root"));
    assert_eq!(world.mkdirs("root", "/a/b", 0o700).unwrap().permission, 0o755);
    let single = |path: &str| pb::MkdirsRequest { path: path.into(), permission: 0o755, ..Default::default() };
    let error = world.call::<pb::MkdirsResponse>("root", single("/x/y")).unwrap_err();
    assert_eq!((error.code(), error.message()), (ErrorCode::FileNotFound, "Parent directory doesn't exist: /x"));
    world.create("/a/file", 1).unwrap();
    assert_eq!(code(world.mkdirs("root", "/a/file", 0o755)), ErrorCode::FileAlreadyExists);
    assert_eq!(code(world.mkdirs("root", "/a/file/x", 0o755)), ErrorCode::ParentNotDirectory);
    for path in ["a", "", "/a/../b", "/a//b", "/a:b", "/.reserved/x", "/.cairn"] {
        assert_eq!(code(world.mkdirs("root", path, 0o755)), ErrorCode::InvalidPath, "{path}");
    }
    assert_eq!(code(world.mkdirs("root", &format!("/{}", "x".repeat(256)), 0o755)), ErrorCode::InvalidPath);
    assert_eq!(code(world.status("/a/none")), ErrorCode::FileNotFound);
    assert_eq!(code(world.status("/a/file/x")), ErrorCode::ParentNotDirectory);
    assert_eq!(code(world.status("/nope/..")), ErrorCode::InvalidPath);
}

#[test]
fn every_user_may_keep_jobs_in_the_system_directory_and_nothing_else() {
    let mut world = World::new();
    let made = world.mkdirs("ann", "/.cairn/jobs/j1", 0o755).unwrap();
    assert_eq!((made.owner.as_str(), made.permission), ("ann", 0o755));
    let above =
        |world: &mut World, path: &str| world.status(path).map(|found| (found.owner, found.permission)).unwrap();
    assert_eq!(above(&mut world, "/.cairn"), ("root".into(), 0o755));
    assert_eq!(above(&mut world, "/.cairn/jobs"), ("root".into(), 0o1777));
    world.mkdirs("bob", "/.cairn/history/j2", 0o755).unwrap();
    world.mkdirs("bob", "/.cairn/jobs/j2", 0o755).unwrap();
    assert_eq!(code(world.delete("bob", "/.cairn/jobs/j1", true)), ErrorCode::PermissionDenied);
    assert_eq!(code(world.mkdirs("root", "/.cairn/other/x", 0o755)), ErrorCode::InvalidPath);
    assert_eq!(code(world.delete("root", "/.cairn/jobs", true)), ErrorCode::InvalidPath);
    world.rename("ann", "/.cairn/jobs/j1", "/.cairn/history/j1", NoReplace).unwrap();
    assert_eq!(
        world.walk().into_iter().filter(|entry| entry.path.starts_with("/.cairn")).count(),
        0,
        "it is not listed"
    );
    assert_eq!(world.status("/").unwrap().children, 0, "nor counted");
    world.mkdirs("root", "/seen", 0o755).unwrap();
    assert_eq!(world.status("/").unwrap().children, 1);
    world.restart();
    assert_eq!(world.status("/.cairn/history/j1").unwrap().owner, "ann");
}

#[test]
fn rename_follows_hdfs() {
    let mut world = World::new();
    world.mkdirs("root", "/d/sub", 0o755).unwrap();
    world.mkdirs("root", "/e/full/x", 0o755).unwrap();
    world.mkdirs("root", "/e/empty", 0o755).unwrap();
    world.create("/f", 1).unwrap();
    world.create("/g", 1).unwrap();
    for (from, to, mode, expected) in [
        ("/none", "/x", NoReplace, ErrorCode::FileNotFound),
        ("/", "/x", NoReplace, ErrorCode::InvalidArgument),
        ("/d", "/", NoReplace, ErrorCode::InvalidArgument),
        ("/d", "/d", NoReplace, ErrorCode::FileAlreadyExists),
        ("/d", "/d/sub/x", NoReplace, ErrorCode::InvalidArgument),
        ("/f", "/g", NoReplace, ErrorCode::FileAlreadyExists),
        ("/f", "/e", Overwrite, ErrorCode::InvalidArgument),
        ("/d", "/g", Overwrite, ErrorCode::InvalidArgument),
        ("/d", "/e/full", Overwrite, ErrorCode::DirectoryNotEmpty),
        ("/f", "/no/x", NoReplace, ErrorCode::FileNotFound),
        ("/f", "/g/x", NoReplace, ErrorCode::ParentNotDirectory),
    ] {
        assert_eq!(code(world.rename("root", from, to, mode)), expected, "{from} to {to}");
    }
    world.rename("root", "/f", "/g", Overwrite).unwrap();
    world.rename("root", "/d", "/e/empty", Overwrite).unwrap();
    world.rename("root", "/e", "/dd", NoReplace).unwrap();
    let paths: Vec<String> = world.walk().into_iter().map(|status| status.path).collect();
    assert_eq!(paths, ["/", "/dd", "/dd/empty", "/dd/empty/sub", "/dd/full", "/dd/full/x", "/g"]);
}

#[test]
fn delete_takes_trees_in_turns_but_at_once_for_everybody() {
    let mut world = World::with(CoreSettings { cursor_budget: 10, ..settings() });
    for at in 0..50 {
        world.create(&format!("/t/{}/f{at}", at % 7), 1).unwrap();
    }
    let error = world.delete("root", "/t", false).unwrap_err();
    assert_eq!(error.message(), "`/t is non empty': Directory is not empty");
    let edits = world.log.len();
    assert!(world.delete("root", "/t", true).unwrap());
    assert_eq!(world.log.len(), edits + 1, "a tree is deleted by one edit");
    assert!(world.core.has_work());
    assert_eq!(code(world.status("/t")), ErrorCode::FileNotFound);
    world.mkdirs("root", "/t", 0o755).unwrap();
    world.step(1);
    assert!(!world.core.has_work());
    let report = world.cluster();
    assert_eq!((report.files, report.directories), (0, 2));
    assert!(!world.delete("root", "/none", true).unwrap());
    assert!(!world.delete("root", "/", true).unwrap());
}

#[test]
fn listing_is_paged_by_bytes() {
    let mut world = World::new();
    for name in ["b", "a", "é", "Z", "aa", "~"] {
        world.create(&format!("/d/{name}"), 1).unwrap();
    }
    let mut names = Vec::new();
    let mut after = bytes::Bytes::new();
    loop {
        let request = pb::ListRequest { path: "/d".into(), start_after: after, limit: 2, with_locations: false };
        let page: pb::ListResponse = world.call("root", request).unwrap();
        names.extend(page.entries.iter().map(|entry| entry.path.clone()));
        assert_eq!(page.remaining as usize, 6 - names.len());
        if page.remaining == 0 {
            break;
        }
        after = names.last().unwrap()[3..].to_owned().into();
    }
    assert_eq!(names, ["/d/Z", "/d/a", "/d/aa", "/d/b", "/d/~", "/d/é"]);
    let file: pb::ListResponse =
        world.call("root", pb::ListRequest { path: "/d/a".into(), ..Default::default() }).unwrap();
    assert_eq!((file.entries[0].path.as_str(), file.remaining), ("/d/a", 0));
}

fn chmod(world: &mut World, user: &str, path: &str, permission: u32) -> Result<(), Error> {
    let request = pb::SetPermissionRequest { path: path.into(), permission, call: None };
    world.call::<pb::SetPermissionResponse>(user, request).map(|_| ())
}

fn chown(world: &mut World, user: &str, path: &str, owner: &str, group: &str) -> Result<(), Error> {
    let request = pb::SetOwnerRequest { path: path.into(), owner: owner.into(), group: group.into(), call: None };
    world.call::<pb::SetOwnerResponse>(user, request).map(|_| ())
}

#[test]
fn permissions_are_those_of_hdfs() {
    let mut world = World::new();
    world.mkdirs("root", "/home", 0o755).unwrap();
    world.mkdirs("root", "/home/ann", 0o750).unwrap();
    chown(&mut world, "root", "/home/ann", "ann", "users").unwrap();
    let made = world.mkdirs("ann", "/home/ann/x", 0o700).unwrap();
    assert_eq!((made.owner.as_str(), made.group.as_str()), ("ann", "users"));
    let status = |path: &str| pb::GetStatusRequest { path: path.into() };
    // bob is in "users": he may pass and read, not write.
    assert!(world.call::<pb::GetStatusResponse>("bob", status("/home/ann/x")).is_ok());
    let error = world.mkdirs("bob", "/home/ann/y", 0o755).unwrap_err();
    assert_eq!(error.message(), "Permission denied: user=bob, access=WRITE, inode=\"/home/ann\":ann:users:drwxr-x---");
    assert_eq!(
        code(
            world.call::<pb::ListResponse>("bob", pb::ListRequest { path: "/home/ann/x".into(), ..Default::default() })
        ),
        ErrorCode::PermissionDenied
    );
    assert_eq!(code(world.mkdirs("ann", "/top", 0o755)), ErrorCode::PermissionDenied);
    // Only the owner changes the mode, only the superuser the owner, and groups only to one's own.
    assert_eq!(code(chmod(&mut world, "bob", "/home/ann", 0o777)), ErrorCode::PermissionDenied);
    chmod(&mut world, "ann", "/home/ann", 0o711).unwrap();
    assert_eq!(code(chown(&mut world, "ann", "/home/ann", "bob", "")), ErrorCode::PermissionDenied);
    assert_eq!(code(chown(&mut world, "ann", "/home/ann", "", "wheel")), ErrorCode::PermissionDenied);
    chown(&mut world, "ann", "/home/ann", "", "ann").unwrap();
    // Members of the supergroup may do everything.
    let mut boss = caller("carl");
    boss.groups.push("supergroup".into());
    let reply = world.next + 1;
    let request = pb::MkdirsRequest { path: "/carl".into(), permission: 0o755, ..Default::default() };
    world.event(Event::Client { reply: ReplyTo(reply), caller: boss, request: request.into() });
    assert!(world.answer(reply).unwrap().is_ok());
}

#[test]
fn the_sticky_bit_protects_entries() {
    let mut world = World::new();
    world.mkdirs("root", "/tmp", 0o1777).unwrap();
    chmod(&mut world, "root", "/tmp", 0o1777).unwrap();
    world.mkdirs("ann", "/tmp/a", 0o777).unwrap();
    assert_eq!(code(world.delete("bob", "/tmp/a", true)), ErrorCode::PermissionDenied);
    assert_eq!(code(world.rename("bob", "/tmp/a", "/tmp/b", NoReplace)), ErrorCode::PermissionDenied);
    world.rename("ann", "/tmp/a", "/tmp/b", NoReplace).unwrap();
    assert!(world.delete("ann", "/tmp/b", true).unwrap());
    world.mkdirs("ann", "/tmp/p", 0o777).unwrap();
    world.mkdirs("ann", "/tmp/p/q", 0o700).unwrap();
    world.mkdirs("ann", "/tmp/p/q/r", 0o700).unwrap();
    chmod(&mut world, "ann", "/tmp/p", 0o777).unwrap();
    assert!(code(world.delete("bob", "/tmp/p/q", true)) == ErrorCode::PermissionDenied, "rights on the subtree");
}

#[test]
fn everybody_may_add_what_jobs_bring_along() {
    let mut world = World::new();
    for path in ["/.cairn", "/.cairn/x", "/.cairn/programs/x/y"] {
        assert_eq!(code(world.mkdirs("root", path, 0o755)), ErrorCode::InvalidPath, "{path}");
    }
    world.mkdirs("ann", "/.cairn/programs", 0o700).unwrap();
    world.mkdirs("bob", "/.cairn/programs", 0o700).unwrap();
    let status = world.status("/.cairn/programs").unwrap();
    assert_eq!((&*status.owner, status.permission), ("root", 0o1777));
    assert_eq!(world.status("/.cairn").unwrap().permission, 0o755);
    world.mkdirs("ann", "/.cairn/programs/a", 0o755).unwrap();
    assert_eq!(code(world.delete("bob", "/.cairn/programs/a", true)), ErrorCode::PermissionDenied);
    assert_eq!(code(world.delete("ann", "/.cairn/programs", true)), ErrorCode::PermissionDenied);
}

#[test]
fn times_and_replication_are_set() {
    let mut world = World::new();
    world.create("/f", 3).unwrap();
    let times = pb::SetTimesRequest { path: "/f".into(), modified_ms: Some(5), accessed_ms: None, call: None };
    world.call::<pb::SetTimesResponse>("root", times).unwrap();
    let setrep = |path: &str, replication| pb::SetReplicationRequest { path: path.into(), replication, call: None };
    world.call::<pb::SetReplicationResponse>("root", setrep("/f", 2)).unwrap();
    let status = world.status("/f").unwrap();
    assert_eq!((status.modified_ms, status.replication, status.open), (5, 2, true));
    for (path, replication, expected) in
        [("/f", 0, ErrorCode::InvalidArgument), ("/f", 600, ErrorCode::InvalidArgument), ("/", 2, ErrorCode::NotAFile)]
    {
        assert_eq!(code(world.call::<pb::SetReplicationResponse>("root", setrep(path, replication))), expected);
    }
}

#[test]
fn safe_mode_refuses_changes() {
    let mut world = World::new();
    world.mkdirs("root", "/a", 0o777).unwrap();
    let request = |action: pb::SafeModeAction| pb::SafeModeRequest { action: action as i32 };
    let enter = request(pb::SafeModeAction::SafemodeEnter);
    assert_eq!(code(world.call::<pb::SafeModeResponse>("ann", enter)), ErrorCode::PermissionDenied);
    assert!(world.call::<pb::SafeModeResponse>("root", enter).unwrap().on);
    for result in [
        world.mkdirs("root", "/b", 0o755).map(|_| ()),
        world.create("/f", 1).map(|_| ()),
        world.delete("root", "/a", true).map(|_| ()),
        world.rename("root", "/a", "/b", NoReplace),
        chmod(&mut world, "root", "/a", 0o700),
    ] {
        let error = result.unwrap_err();
        assert_eq!(error.code(), ErrorCode::SafeMode);
        assert!(error.message().contains("Name node is in safe mode"), "{error}");
    }
    assert!(world.status("/a").is_ok());
    let leave = request(pb::SafeModeAction::SafemodeLeave);
    assert!(!world.call::<pb::SafeModeResponse>("root", leave).unwrap().on);
    world.mkdirs("root", "/b", 0o755).unwrap();
}

#[test]
fn content_summary_counts_a_tree_in_turns() {
    let mut world = World::with(CoreSettings { cursor_budget: 7, ..settings() });
    for node in 0..3 {
        world.node_up(&format!("n{node}"), "/r");
    }
    for at in 0..40 {
        world.create(&format!("/t/{}/{}/f{at}", at % 3, at % 5), 2).unwrap();
    }
    world.write("/t/1/big", 2, 3);
    let reply = world.send("root", pb::ContentSummaryRequest { path: "/t".into() });
    assert!(world.answer(reply).is_none(), "it takes several turns");
    world.mkdirs("root", "/other", 0o755).unwrap();
    world.step(1);
    let sums: pb::ContentSummaryResponse = typed(world.answer(reply).unwrap().unwrap());
    assert_eq!((sums.files, sums.directories, sums.length, sums.space), (41, 19, 3 * BLOCK, 6 * BLOCK));
    let reply = world.send("root", pb::ContentSummaryRequest { path: "/t/1/big".into() });
    let sums: pb::ContentSummaryResponse = typed(world.answer(reply).unwrap().unwrap());
    assert_eq!((sums.files, sums.directories), (1, 0));
    let reply = world.send("root", pb::ContentSummaryRequest { path: "/none".into() });
    assert_eq!(code(world.answer(reply).unwrap()), ErrorCode::FileNotFound);
}

#[test]
fn access_is_checked_as_by_the_operations_themselves() {
    let mut world = World::new();
    world.mkdirs("root", "/d", 0o755).unwrap();
    world.mkdirs("root", "/d/shut", 0o750).unwrap();
    world.mkdirs("root", "/d/shut/below", 0o777).unwrap();
    let mut ask = |user: &str, path: &str, access: u32| {
        world.call::<pb::CheckAccessResponse>(user, pb::CheckAccessRequest { path: path.into(), access })
    };
    assert!(ask("root", "/d/shut", 7).is_ok(), "the superuser may do everything");
    assert!(ask("ann", "/d", 5).is_ok());
    let denied = ask("ann", "/d", 2).unwrap_err();
    assert_eq!(denied.code(), ErrorCode::PermissionDenied);
    assert!(denied.message().contains("access=WRITE, inode=\"/d\""), "{denied}");
    assert!(ask("ann", "/d/shut", 0).is_ok(), "it is there");
    assert_eq!(code(ask("ann", "/d/shut", 4)), ErrorCode::PermissionDenied);
    assert_eq!(code(ask("ann", "/d/shut/below", 0)), ErrorCode::PermissionDenied, "the way to it is shut");
    assert_eq!(code(ask("root", "/none", 0)), ErrorCode::FileNotFound);
    assert_eq!(code(ask("root", "/d", 8)), ErrorCode::InvalidArgument);
}

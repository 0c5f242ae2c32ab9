//! The trash empties itself.

use super::*;

const INTERVAL: u64 = 40_000;

fn names(world: &mut World) -> Vec<String> {
    let all = world.walk();
    all.into_iter().map(|status| status.path).filter(|path| path.contains("/.Trash/")).collect()
}

fn throw_away(world: &mut World, name: &str) {
    world.mkdirs("root", "/user/ann/.Trash/Current", 0o700).unwrap();
    world.create(&format!("/{name}"), 1).unwrap();
    let to = format!("/user/ann/.Trash/Current/{name}");
    world.rename("root", &format!("/{name}"), &to, pb::RenameMode::NoReplace).unwrap();
}

#[test]
fn what_was_deleted_stays_for_the_interval_and_little_more() {
    let mut world = World::with(CoreSettings { trash_interval_ms: INTERVAL, ..settings() });
    throw_away(&mut world, "a");
    world.pass(INTERVAL / 8);
    assert_eq!(names(&mut world), ["/user/ann/.Trash/Current", "/user/ann/.Trash/Current/a"]);
    world.pass(INTERVAL / 4);
    let dated = names(&mut world);
    assert!(dated.iter().any(|path| path.ends_with("/a") && !path.contains("Current")), "{dated:?}");
    world.pass(INTERVAL / 2);
    assert!(names(&mut world).iter().any(|path| path.ends_with("/a")), "younger than the interval");
    world.pass(INTERVAL);
    assert_eq!(names(&mut world), Vec::<String>::new());
}

#[test]
fn a_restart_forgets_nothing_and_other_names_are_left_alone() {
    let mut world = World::with(CoreSettings { trash_interval_ms: INTERVAL, ..settings() });
    world.mkdirs("root", "/user/ann/.Trash/2001", 0o700).unwrap();
    world.mkdirs("root", "/user/bob/1700000000000", 0o700).unwrap();
    throw_away(&mut world, "a");
    world.pass(INTERVAL / 2);
    world.restart();
    world.pass(2 * INTERVAL);
    assert_eq!(names(&mut world), ["/user/ann/.Trash/2001"]);
    assert!(world.status("/user/bob/1700000000000").is_ok());
}

#[test]
fn no_interval_means_that_nothing_is_touched() {
    let mut world = World::with(CoreSettings { trash_interval_ms: 0, ..settings() });
    throw_away(&mut world, "a");
    world.pass(10 * INTERVAL);
    assert_eq!(names(&mut world).len(), 2);
}

#[test]
fn a_jump_of_the_wall_clock_deletes_nothing_at_once() {
    let mut world = World::with(CoreSettings { trash_interval_ms: INTERVAL, ..settings() });
    throw_away(&mut world, "a");
    world.pass(INTERVAL / 2);
    let before = names(&mut world);
    assert!(before.iter().any(|path| path.ends_with("/a")));
    // A month forward: everything would be old enough.
    world.now.wall_ms += 30 * 24 * 3_600_000;
    world.pass(INTERVAL / 2);
    assert!(names(&mut world).iter().any(|path| path.ends_with("/a")), "there is time to set the clock right");
    world.now.wall_ms -= 30 * 24 * 3_600_000;
    world.pass(INTERVAL / 8);
    assert!(names(&mut world).iter().any(|path| path.ends_with("/a")));
    // Whoever leaves it so means it.
    world.now.wall_ms += 30 * 24 * 3_600_000;
    world.pass(2 * INTERVAL);
    assert_eq!(names(&mut world), Vec::<String>::new());
}

//! Random operations against a simple model of the namespace.

use super::*;
use proptest::prelude::*;

/// A path of up to three components out of few names, so that operations meet.
fn path() -> impl Strategy<Value = String> {
    proptest::collection::vec(0u8..4, 1..4)
        .prop_map(|parts| parts.iter().map(|part| format!("/{}", (b'a' + part) as char)).collect())
}

#[derive(Clone, Debug)]
pub enum Operation {
    Mkdirs(String),
    Create(String, bool),
    Write(String),
    Rename(String, String, bool),
    Delete(String, bool),
    Chmod(String, u32),
    Setrep(String, u32),
    Sync,
    Tick,
}

pub fn operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        2 => path().prop_map(Operation::Mkdirs),
        3 => (path(), any::<bool>()).prop_map(|(path, overwrite)| Operation::Create(path, overwrite)),
        3 => path().prop_map(Operation::Write),
        3 => (path(), path(), any::<bool>()).prop_map(|(from, to, over)| Operation::Rename(from, to, over)),
        2 => (path(), any::<bool>()).prop_map(|(path, recursive)| Operation::Delete(path, recursive)),
        1 => (path(), 0u32..0o1777).prop_map(|(path, mode)| Operation::Chmod(path, mode)),
        1 => (path(), 1u32..5).prop_map(|(path, replication)| Operation::Setrep(path, replication)),
        1 => Just(Operation::Sync),
        1 => Just(Operation::Tick),
    ]
}

fn create(world: &mut World, path: &str, overwrite: bool) -> (Result<pb::CreateResponse, Error>, TxId) {
    let request = pb::CreateRequest {
        path: path.into(),
        permission: 0o644,
        overwrite,
        replication: 2,
        create_parents: true,
        client_name: "writer".into(),
        ..Default::default()
    };
    world.call_with("root", request)
}

/// Runs one operation; `true` if it changed something.
pub fn apply(world: &mut World, operation: &Operation) -> bool {
    let mode = |over: &bool| if *over { pb::RenameMode::Overwrite } else { pb::RenameMode::NoReplace };
    match operation {
        Operation::Mkdirs(path) => world.mkdirs("root", path, 0o755).is_ok(),
        Operation::Create(path, overwrite) => create(world, path, *overwrite).0.is_ok(),
        Operation::Write(path) => {
            let Ok(created) = create(world, path, true).0 else { return false };
            let inode = created.status.unwrap().inode;
            let Ok(located) = world.add_block(inode, 0, &[]) else { return true };
            let block = located.block.unwrap();
            for replica in &located.replicas {
                let at = world.at(&replica.node_id);
                world.hold(at, block.id as u64, (block.generation, 9, pb::ReplicaState::Finalized));
            }
            let reply = world.complete(inode, &[(block.id as u64, block.generation, 9)]);
            world.answer(reply).unwrap().unwrap();
            true
        }
        Operation::Rename(from, to, over) => world.rename("root", from, to, mode(over)).is_ok(),
        Operation::Delete(path, recursive) => world.delete("root", path, *recursive).is_ok_and(|existed| existed),
        Operation::Chmod(path, permission) => {
            let request = pb::SetPermissionRequest { path: path.clone(), permission: *permission, call: None };
            world.call::<pb::SetPermissionResponse>("root", request).is_ok()
        }
        Operation::Setrep(path, replication) => {
            let request = pb::SetReplicationRequest { path: path.clone(), replication: *replication, call: None };
            world.call::<pb::SetReplicationResponse>("root", request).is_ok()
        }
        Operation::Sync => {
            world.sync();
            true
        }
        Operation::Tick => {
            world.beat();
            world.event(Event::Tick);
            true
        }
    }
}

/// Paths with their kind: `true` is a directory.
type Model = BTreeMap<String, bool>;

fn parent(path: &str) -> &str {
    cairn_proto::path::split_last(path).map_or("/", |(parent, _)| parent)
}

fn ancestors(path: &str) -> Vec<String> {
    let mut all = Vec::new();
    let mut at = parent(path);
    while at != "/" {
        all.push(at.to_owned());
        at = parent(at);
    }
    all
}

fn below<'a>(model: &'a Model, path: &str) -> Vec<(&'a String, &'a bool)> {
    let prefix = format!("{path}/");
    model.iter().filter(|(other, _)| other.starts_with(&prefix)).collect()
}

fn can_be_made(model: &Model, path: &str) -> bool {
    ancestors(path).iter().all(|above| model.get(above) != Some(&false))
}

fn make(model: &mut Model, path: &str, directory: bool) {
    for above in ancestors(path) {
        model.insert(above, true);
    }
    model.insert(path.to_owned(), directory);
}

/// What the operation does by the book; `false`: it is refused (or changes nothing).
fn expect(model: &mut Model, operation: &Operation) -> bool {
    match operation {
        Operation::Mkdirs(path) => {
            let fits = can_be_made(model, path) && model.get(path) != Some(&false);
            if fits {
                make(model, path, true);
            }
            fits
        }
        Operation::Create(path, overwrite) => {
            let fits = can_be_made(model, path)
                && match model.get(path) {
                    None => true,
                    Some(directory) => !directory && *overwrite,
                };
            if fits {
                make(model, path, false);
            }
            fits
        }
        Operation::Write(path) => expect(model, &Operation::Create(path.clone(), true)),
        Operation::Rename(from, to, over) => {
            let Some(directory) = model.get(from).copied() else { return false };
            let room = parent(to) == "/" || model.get(parent(to)) == Some(&true);
            let target = match model.get(to) {
                None => true,
                Some(kind) => *over && *kind == directory && below(model, to).is_empty(),
            };
            if from == to || to.starts_with(&format!("{from}/")) || !room || !target {
                return false;
            }
            let moved: Vec<(String, bool)> =
                below(model, from).into_iter().map(|(path, kind)| (path.replacen(from, to, 1), *kind)).collect();
            model.retain(|path, _| path != from && !path.starts_with(&format!("{from}/")));
            model.insert(to.clone(), directory);
            model.extend(moved);
            true
        }
        Operation::Delete(path, recursive) => {
            if !model.contains_key(path) || (!recursive && !below(model, path).is_empty()) {
                return false;
            }
            model.retain(|other, _| other != path && !other.starts_with(&format!("{path}/")));
            true
        }
        Operation::Chmod(path, _) => model.contains_key(path),
        Operation::Setrep(path, _) => model.get(path) == Some(&false),
        Operation::Sync | Operation::Tick => true,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn the_namespace_agrees_with_a_simple_model(operations in proptest::collection::vec(operation(), 1..150)) {
        let mut world = World::new();
        for node in 0..3 {
            world.node_up(&format!("n{node}"), &format!("/r{}", node % 2));
        }
        let mut model = Model::new();
        for operation in &operations {
            let edits = world.log.len();
            let expected = expect(&mut model, operation);
            let done = apply(&mut world, operation);
            prop_assert_eq!(done, expected, "{:?}", operation);
            prop_assert!(done || world.log.len() == edits, "a refused call left an edit");
            let target = match operation {
                Operation::Mkdirs(path) | Operation::Create(path, _) | Operation::Write(path) => path,
                Operation::Chmod(path, _) | Operation::Setrep(path, _) | Operation::Delete(path, _) => path,
                Operation::Rename(_, to, _) => to,
                Operation::Sync | Operation::Tick => continue,
            };
            // Whoever looks at what was just changed waits for it to be durable.
            let look = pb::GetStatusRequest { path: target.clone() };
            let (_, depends_on) = world.call_with::<pb::GetStatusResponse>("root", look);
            if world.log.len() > edits {
                prop_assert_eq!(depends_on, world.core.last_txid());
            }
        }
        let found: Model = world
            .walk()
            .into_iter()
            .filter(|status| status.path != "/")
            .map(|status| { let directory = status.kind() == pb::FileKind::Directory; (status.path, directory) })
            .collect();
        prop_assert_eq!(found, model);
    }
}

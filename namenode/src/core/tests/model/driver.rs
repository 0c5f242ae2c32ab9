//! Does operations to the core and to the model, and compares what a client can see.

use std::collections::BTreeSet;

use super::super::*;
use super::operations::Operation;
use super::{Model, ModelBlock, USERS, invariants};
use crate::core::recovery::RECOVERY_HOLDER;

pub const NODES: usize = 4;
pub const SOFT_MS: u64 = 3_000;
const HARD_MS: u64 = 8_000;

/// A block as its writer knows it.
#[derive(Clone)]
pub struct Written {
    pub id: u64,
    pub generation: u64,
    pub length: u64,
    pub nodes: Vec<usize>,
}

/// A file that some writer opened; it may be gone or closed by now.
#[derive(Clone)]
pub struct Handle {
    pub inode: u64,
    pub user: &'static str,
    pub writer: String,
    pub blocks: Vec<Written>,
}

/// A call that changed something and was answered.
#[derive(Clone)]
pub struct Call {
    pub user: &'static str,
    pub request: ClientRequest,
    pub answer: Response,
    pub starts: u32,
}

/// What was at a transaction.
pub struct Past {
    pub txid: TxId,
    pub model: Model,
    pub handles: Vec<Handle>,
    pub calls: usize,
}

/// An image that is complete.
pub type Image = (TxId, Vec<Vec<u8>>);

/// See the module.
pub struct Driver {
    pub world: World,
    pub model: Model,
    /// Compare everything after each operation.
    pub thorough: bool,
    pub handles: Vec<Handle>,
    pub history: Vec<Past>,
    pub calls: Vec<Call>,
    pub slicing: Option<(Image, u64)>,
    pub images: Vec<Image>,
    /// Blocks of which this test damaged or took a replica: they may be lost.
    pub harmed: BTreeSet<u64>,
    pub renewed: BTreeMap<String, u64>,
    /// Files that somebody else tried to take over after the soft limit.
    pub taken: BTreeSet<u64>,
    pub next_call: u64,
    pub starts: u32,
}

fn user_of(number: u8) -> &'static str {
    USERS[usize::from(number) % USERS.len()]
}

pub fn writer_of(number: u8) -> String {
    format!("w{}", number % 3)
}

pub fn short_settings(cursor_budget: usize) -> CoreSettings {
    CoreSettings {
        cursor_budget,
        heartbeat_interval_ms: 500,
        stale_interval_ms: 2_000,
        dead_interval_ms: 4_000,
        lease_soft_limit_ms: SOFT_MS,
        lease_hard_limit_ms: HARD_MS,
        repair_timeout_ms: 5_000,
        safemode_threshold: 0.6,
        trash_interval_ms: 0,
        ..settings()
    }
}

impl Driver {
    pub fn new(cursor_budget: usize) -> Self {
        let mut world = World::with(short_settings(cursor_budget));
        world.strict = false;
        for node in 0..NODES {
            world.node_up(&format!("n{node}"), &format!("/r{}", node / 2));
        }
        let mut driver = Self {
            world,
            model: Model::new(),
            thorough: true,
            handles: Vec::new(),
            history: Vec::new(),
            calls: Vec::new(),
            slicing: None,
            images: Vec::new(),
            harmed: BTreeSet::new(),
            renewed: BTreeMap::new(),
            taken: BTreeSet::new(),
            next_call: 0,
            starts: 0,
        };
        driver.run(&Operation::Chmod { user: 0, path: "/".into(), mode: 0o777 });
        driver
    }

    /// One operation, then all comparisons.
    pub fn run(&mut self, operation: &Operation) {
        self.step(operation);
        self.adopt();
        self.learn();
        if self.thorough {
            self.compare();
            invariants::check(&self.world.core);
            invariants::check_reports(&self.world);
            self.check_nothing_is_lost();
        }
        self.remember();
    }

    fn step(&mut self, operation: &Operation) {
        use Operation as O;
        match operation {
            O::Mkdirs { .. } | O::Rename { .. } | O::Delete { .. } => self.change_name(operation),
            O::Chmod { .. } | O::Chown { .. } | O::SetTimes { .. } | O::Setrep { .. } => self.change_name(operation),
            O::Truncate { path, .. } | O::Concat { target: path, .. } => {
                let file = self.model.entries.get(path).and_then(|entry| entry.file.as_ref());
                // A file that is open may be taken from its writer just then.
                if file.is_none_or(|file| file.writer.is_none()) {
                    self.change_name(operation);
                }
            }
            O::Append { user, path, writer } => self.append(user_of(*user), path, &writer_of(*writer)),
            O::Create { user, path, overwrite, writer } => {
                self.create(user_of(*user), path, *overwrite, &writer_of(*writer));
            }
            O::AddBlock { file, copies, length } => self.add_block(usize::from(*file), *copies, (*length).into()),
            O::Abandon { file } => self.abandon(usize::from(*file)),
            O::NewPipeline { file, keep } => self.new_pipeline(usize::from(*file), *keep),
            O::Complete { file, late } => self.complete(usize::from(*file), *late),
            O::Write { user, path, writer } => {
                if self.create(user_of(*user), path, true, &writer_of(*writer)) {
                    let file = self.handles.len() - 1;
                    self.add_block(file, 3, 700);
                    self.complete(file, false);
                }
            }
            O::Renew { writer } => {
                let client_name = writer_of(*writer);
                self.world.call::<pb::RenewLeaseResponse>("root", pb::RenewLeaseRequest { client_name }).unwrap();
                self.renew(&writer_of(*writer));
            }
            O::NodeDown { node } => self.world.nodes[usize::from(*node) % NODES].up = false,
            O::NodeUp { node } => self.node_up(usize::from(*node) % NODES),
            O::Wipe { node } => self.wipe(usize::from(*node) % NODES),
            O::Lose { block, node } => self.harm(usize::from(*block), usize::from(*node) % NODES, false),
            O::Corrupt { block, node } => self.harm(usize::from(*block), usize::from(*node) % NODES, true),
            O::Sync => self.world.sync(),
            O::Tick => self.world.event(Event::Tick),
            O::Pass { ms } => self.world.pass(*ms),
            O::SafeMode { on } => {
                let action =
                    if *on { pb::SafeModeAction::SafemodeEnter } else { pb::SafeModeAction::SafemodeLeave } as i32;
                self.world.call::<pb::SafeModeResponse>("root", pb::SafeModeRequest { action }).unwrap();
            }
            O::BeginImage if self.slicing.is_none() => {
                let digest = self.world.core.digest();
                let txid = self.world.core.checkpoint_begin();
                self.slicing = Some(((txid, Vec::new()), digest));
            }
            O::BeginImage => {}
            O::Slice { pages } => self.slice(usize::from(*pages)),
            O::Restart { lose, image } => self.restart(usize::from(*lose), *image),
            O::Again { call } => self.again(usize::from(*call)),
        }
    }

    /// The context of the next call of this user.
    pub fn context(&mut self, user: &str) -> Option<pb::CallContext> {
        self.next_call += 1;
        let client_id = vec![user.len() as u8 ^ user.as_bytes()[0]; 16].into();
        let lowest_unanswered = self.next_call.saturating_sub(8);
        Some(pb::CallContext { client_id, call_id: self.next_call, lowest_unanswered, seen_txid: 0 })
    }

    /// Sends a call and lets time pass until it is answered.
    pub fn call(&mut self, user: &'static str, request: ClientRequest) -> Result<ClientResponse, Error> {
        let begin = self.world.log.len();
        let token = self.world.send(user, request.clone());
        let result = self.wait_for(token);
        let own = retry::call_of(&request).cloned().unwrap_or_default();
        let logged = self.world.log[begin..].iter().any(|(_, edit)| edit.call_id == own.call_id && own.call_id != 0);
        if let (Ok(answer), true) = (&result, logged) {
            self.calls.push(Call { user, request, answer: answer.clone(), starts: self.starts });
        }
        result.map(client_response)
    }

    pub fn wait_for(&mut self, token: u64) -> Result<Response, Error> {
        for _ in 0..5_000 {
            if let Some(result) = self.world.answer(token) {
                if let Err(error) = &result {
                    assert_ne!(error.code(), ErrorCode::Internal, "{error}");
                }
                return result;
            }
            if self.world.core.has_work() { self.world.event(Event::Tick) } else { self.world.pass(500) }
        }
        panic!("a call is never answered");
    }

    pub fn in_safe_mode(&self) -> bool {
        self.world.core.safemode.is_on()
    }

    pub fn renew(&mut self, writer: &str) {
        self.renewed.insert(writer.to_owned(), self.world.core.now_ms);
    }

    /// Where a truncate cuts.
    fn cut_of(&self, operation: &Operation) -> u64 {
        let Operation::Truncate { path, blocks, .. } = operation else { return 0 };
        let file = self.model.entries.get(path).and_then(|entry| entry.file.as_ref());
        let kept = file.iter().flat_map(|file| &file.blocks).take((*blocks).into());
        kept.filter_map(|block| block.length).sum()
    }

    /// A change of names or attributes: done or refused as the model says, and a refused one leaves no edit.
    fn change_name(&mut self, operation: &Operation) {
        use Operation as O;
        let (user, before) = (request_user(operation), self.model.clone());
        let length = self.cut_of(operation);
        let expected = !self.in_safe_mode() && {
            let model = &mut self.model;
            match operation {
                O::Mkdirs { path, mode, .. } => model.mkdirs(user, path, *mode),
                O::Rename { from, to, overwrite, .. } => model.rename(user, from, to, *overwrite),
                O::Delete { path, recursive, .. } => model.delete(user, path, *recursive),
                O::Chmod { path, mode, .. } => model.chmod(user, path, *mode),
                O::Chown { path, owner } => model.chown(path, user_of(*owner)),
                O::SetTimes { path, .. } => model.can_set_times(path),
                O::Setrep { path, replication, .. } => model.set_replication(user, path, *replication),
                O::Truncate { path, .. } => model.truncate(user, path, length),
                O::Concat { target, source, .. } => model.concat(user, target, source),
                other => panic!("{other:?}"),
            }
        };
        let call = self.context(user);
        let edits = self.world.log.len();
        let safe = self.in_safe_mode();
        let result = self.call(user, name_request(operation, call, length));
        let done = match &result {
            Ok(ClientResponse::Delete(response)) => response.existed,
            other => other.is_ok(),
        };
        if !expected {
            self.model = before;
        }
        assert_eq!(done, expected, "{operation:?} in safe mode {safe}: {result:?}");
        assert!(done || self.world.log.len() == edits, "a refused call left an edit: {operation:?}");
        if done && self.world.log.len() > edits {
            // Whoever looks at what was just changed waits for it to be durable.
            let look = pb::GetStatusRequest { path: changed_path(operation).to_owned() };
            let (_, depends_on) = self.world.call_with::<pb::GetStatusResponse>("root", look);
            assert_eq!(depends_on, self.world.core.last_txid(), "{operation:?}");
        }
    }

    fn node_up(&mut self, node: usize) {
        if !self.world.nodes[node].up {
            self.world.node_up(&format!("n{node}"), &format!("/r{}", node / 2));
        }
    }

    /// The disk of a node that is down is replaced.
    fn wipe(&mut self, node: usize) {
        if !self.world.nodes[node].up {
            let held = std::mem::take(&mut self.world.nodes[node].held);
            self.harmed.extend(held.into_keys());
        }
    }

    fn harm(&mut self, block: usize, node: usize, corrupt: bool) {
        let held = &self.world.nodes[node].held;
        let Some((id, held)) = held.iter().nth(block.checked_rem(held.len()).unwrap_or(0)) else { return };
        let (id, held) = (*id, *held);
        if !self.world.nodes[node].up {
            return;
        }
        self.harmed.insert(id);
        if corrupt {
            self.world.hold(node, id, (held.0, held.1, pb::ReplicaState::ReplicaCorrupt));
        } else {
            self.world.remove(node, id, held.0);
        }
    }

    /// What the namenode does by itself, after the time that it has to wait: it closes files of silent writers.
    pub fn adopt(&mut self) {
        let (world, model) = (&self.world, &mut self.model);
        for (path, entry) in &mut model.entries {
            let Some(file) = entry.file.as_mut().filter(|_| entry.inode != 0) else { continue };
            let Some(writer) = file.writer.clone() else { continue };
            let found = world.core.tree.get(entry.inode).unwrap_or_else(|| panic!("{path} is gone"));
            let holder = world.core.leases.holder_of(entry.inode);
            if holder == Some(&*writer) {
                continue;
            }
            let heard = self.renewed.get(&writer).copied().unwrap_or(0);
            let overdue = heard + HARD_MS < world.core.now_ms || self.taken.contains(&entry.inode);
            if found.is_open() {
                assert_eq!(holder, Some(RECOVERY_HOLDER), "{path}");
                assert!(overdue, "{path} was taken from {writer}");
                file.writer = Some(RECOVERY_HOLDER.into());
                continue;
            }
            if !overdue && writer != RECOVERY_HOLDER {
                continue; // closed by its writer: the caller knows
            }
            file.writer = None;
            let kept = found.blocks();
            // What follows a block that its writer left unfinished goes with it.
            let mut cut = false;
            for (at, block) in file.blocks.iter_mut().enumerate() {
                let held = world.nodes.iter().filter_map(|node| node.held.get(&block.id));
                match kept.get(at) {
                    Some(id) => {
                        let length = world.core.blocks.get(*id).and_then(blocks::Block::length);
                        assert!(*id == block.id && length.is_some(), "{path} has other blocks");
                        assert!(block.length.is_none() || block.length == length, "{path}: a length changed");
                        cut |= block.length.is_none() && length < Some(found.block_size());
                        block.length = length;
                    }
                    None => {
                        assert!(block.length.is_none(), "{path} lost a block that was committed");
                        let mut some = held.filter(|held| held.1 > 0);
                        assert!(cut || self.harmed.contains(&block.id) || some.next().is_none(), "{path} lost a block");
                    }
                }
            }
            file.blocks.truncate(kept.len());
        }
    }

    /// Ids of entries that were made.
    pub fn learn(&mut self) {
        for (path, entry) in &mut self.model.entries {
            if entry.inode == 0 {
                entry.inode = self.world.core.tree.resolve(path).unwrap().last().expect("it was made");
            }
        }
    }

    /// Listing, status and sums are those of the model.
    fn compare(&mut self) {
        let found = self.world.walk();
        let paths: Vec<&str> = found.iter().map(|status| &*status.path).collect();
        let expected: Vec<&str> = self.model.entries.keys().map(|path| &**path).collect();
        assert_eq!(paths, expected);
        let mut sums = pb::ContentSummaryResponse::default();
        for (status, (path, entry)) in found.iter().zip(&self.model.entries) {
            let is_directory = status.kind() == pb::FileKind::Directory;
            assert_eq!((status.inode, is_directory), (entry.inode, entry.file.is_none()), "{path}");
            let access = (status.permission, &*status.owner, &*status.group);
            assert_eq!(access, (entry.mode, &*entry.owner, &*entry.group), "{path}");
            assert_eq!((status.length, status.children), (entry.length(), self.model.children(path) as u64), "{path}");
            let Some(file) = &entry.file else {
                sums.directories += 1;
                continue;
            };
            sums.files += 1;
            sums.length += entry.length();
            sums.space += entry.length() * u64::from(file.replication);
            assert_eq!((status.replication, status.open), (file.replication, file.writer.is_some()), "{path}");
            let blocks: Vec<ModelBlock> = status
                .blocks
                .iter()
                .map(|located| ModelBlock {
                    id: located.block.as_ref().unwrap().id as u64,
                    length: if located.complete { Some(located.length) } else { None },
                })
                .collect();
            // Empty blocks at the beginning touch no range, so a listing leaves them out.
            let leading = file.blocks.iter().take_while(|block| block.length == Some(0)).count();
            assert_eq!(blocks, file.blocks[leading..], "{path}");
        }
        let token = self.world.send("root", pb::ContentSummaryRequest { path: "/".into() });
        let ClientResponse::ContentSummary(summary) = client_response(self.wait_for(token).unwrap()) else {
            panic!("another answer")
        };
        assert_eq!(summary, sums);
        assert_eq!(self.world.core.future_replicas(), 0, "a datanode knows more than the log");
    }

    /// A block that was committed and that this test did not harm lies somewhere, whole.
    fn check_nothing_is_lost(&self) {
        for (path, entry) in &self.model.entries {
            for block in entry.file.iter().flat_map(|file| &file.blocks) {
                let Some(length) = block.length else { continue };
                let generation = self.world.core.blocks.get(block.id).unwrap().generation;
                let whole = (generation, length, pb::ReplicaState::Finalized);
                let lies = self.world.nodes.iter().any(|node| node.held.get(&block.id) == Some(&whole));
                let waits = entry.file.as_ref().is_some_and(|file| file.writer.is_some());
                assert!(lies || waits || self.harmed.contains(&block.id), "block {} of {path} is lost", block.id);
            }
        }
    }

    fn remember(&mut self) {
        let past = Past {
            txid: self.world.core.last_txid(),
            model: self.model.clone(),
            handles: self.handles.clone(),
            calls: self.calls.len(),
        };
        self.history.push(past);
        // Only what is not synced can be lost.
        let synced = self.world.synced;
        let first = self.history.iter().position(|past| past.txid >= synced).unwrap_or(0);
        self.history.drain(..first);
    }

    /// Every node comes back and time passes: all blocks reach what they can.
    pub fn heal(&mut self) {
        for node in 0..NODES {
            self.node_up(node);
        }
        self.run(&Operation::Pass { ms: 2_000 });
        self.run(&Operation::SafeMode { on: false });
        let thorough = std::mem::replace(&mut self.thorough, false);
        self.run(&Operation::Pass { ms: 150_000 });
        self.thorough = thorough;
        self.run(&Operation::Tick);
        for (path, entry) in &self.model.entries {
            let Some(file) = &entry.file else { continue };
            for block in file.blocks.iter().filter(|block| block.length.is_some() && file.writer.is_none()) {
                let live = self.world.core.live_replicas(block.id).len();
                let wanted = (file.replication as usize).min(NODES);
                let lost = live == 0 && self.harmed.contains(&block.id);
                assert!(live == wanted || lost, "block {} of {path} has {live} of {wanted} replicas", block.id);
            }
        }
        let known = |id: &u64| self.world.core.blocks.get(*id).is_some();
        let orphans = self.world.nodes.iter().flat_map(|node| node.held.keys()).filter(|id| !known(id)).count();
        assert_eq!(orphans, 0, "replicas of no block are left");
        invariants::check(&self.world.core);
    }
}

/// The answer to a client.
pub fn client_response(response: Response) -> ClientResponse {
    match response {
        Response::Client(response) => response,
        other => panic!("{other:?}"),
    }
}

fn request_user(operation: &Operation) -> &'static str {
    use Operation as O;
    match operation {
        O::Mkdirs { user, .. } | O::Rename { user, .. } | O::Delete { user, .. } => user_of(*user),
        O::Chmod { user, .. } | O::Setrep { user, .. } => user_of(*user),
        O::Truncate { user, .. } | O::Concat { user, .. } => user_of(*user),
        _ => "root",
    }
}

fn changed_path(operation: &Operation) -> &str {
    use Operation as O;
    match operation {
        O::Rename { to, .. } => to,
        O::Truncate { path, .. } | O::Concat { target: path, .. } => path,
        O::Mkdirs { path, .. } | O::Delete { path, .. } | O::Chmod { path, .. } => path,
        O::Chown { path, .. } | O::SetTimes { path, .. } | O::Setrep { path, .. } => path,
        other => panic!("{other:?}"),
    }
}

fn name_request(operation: &Operation, call: Option<pb::CallContext>, length: u64) -> ClientRequest {
    use Operation as O;
    match operation.clone() {
        O::Mkdirs { path, mode, .. } => pb::MkdirsRequest { call, path, permission: mode, create_parents: true }.into(),
        O::Rename { from, to, overwrite, .. } => {
            let mode = if overwrite { pb::RenameMode::Overwrite } else { pb::RenameMode::NoReplace } as i32;
            pb::RenameRequest { call, from, to, mode }.into()
        }
        O::Delete { path, recursive, .. } => pb::DeleteRequest { call, path, recursive, only_inode: 0 }.into(),
        O::Chmod { path, mode, .. } => pb::SetPermissionRequest { call, path, permission: mode }.into(),
        O::Chown { path, owner } => {
            pb::SetOwnerRequest { call, path, owner: user_of(owner).into(), group: String::new() }.into()
        }
        O::SetTimes { path, modified_ms } => {
            pb::SetTimesRequest { call, path, modified_ms: Some(modified_ms), accessed_ms: None }.into()
        }
        O::Truncate { path, .. } => pb::TruncateRequest { call, path, length }.into(),
        O::Concat { target, source, .. } => pb::ConcatRequest { call, target, sources: vec![source] }.into(),
        O::Setrep { path, replication, .. } => pb::SetReplicationRequest { call, path, replication }.into(),
        other => panic!("{other:?}"),
    }
}

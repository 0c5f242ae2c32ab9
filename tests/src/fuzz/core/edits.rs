//! Edits that a log could hold.

#![allow(clippy::needless_update, reason = "messages get new fields, which the recipes then leave alone")]

use cairn_namenode::core::{Command, Core};
use cairn_proto::ids::{BlockId, Epoch, InodeId};
use cairn_proto::pb;
use cairn_proto::pb::edit::Kind;
use prost::Message;

use super::{NODES, START, USERS, check_image, pick, settings};
use crate::fuzz::input::Input;

/// Numbers that edits name, near those that are right.
struct Known {
    inode: u64,
    block: u64,
    generation: u64,
    epoch: u64,
}

impl Known {
    fn near(input: &mut Input<'_>, base: u64, last: u64) -> u64 {
        match input.byte() {
            back @ 0..180 => last.saturating_sub(u64::from(back % 8)).max(base),
            180..200 => base,
            _ => input.number(),
        }
    }

    fn inode(&self, input: &mut Input<'_>) -> u64 {
        Self::near(input, InodeId::ROOT.0, self.inode)
    }

    fn block(&self, input: &mut Input<'_>) -> i64 {
        Self::near(input, BlockId::BASE.0 as u64 + 1, self.block) as i64
    }

    fn generation(&self, input: &mut Input<'_>) -> u64 {
        Self::near(input, 1_001, self.generation)
    }

    fn fresh(input: &mut Input<'_>, last: u64) -> u64 {
        if input.byte() < 220 { last.saturating_add(1) } else { input.number() }
    }

    fn lengths(&self, input: &mut Input<'_>) -> Vec<pb::EditBlockLength> {
        (0..input.byte() % 3)
            .map(|_| pb::EditBlockLength {
                block_id: self.block(input),
                generation: self.generation(input),
                length: input.number(),
            })
            .collect()
    }

    fn edit(&self, input: &mut Input<'_>) -> Kind {
        match input.byte() % 17 {
            kind @ (0..=2 | 9..=11) => self.tree_edit(kind, input),
            kind @ (3..=8 | 12 | 15 | 16) => self.writer_edit(kind, input),
            kind => self.cluster_edit(kind, input),
        }
    }

    fn tree_edit(&self, kind: u8, input: &mut Input<'_>) -> Kind {
        let name =
            |input: &mut Input<'_>| input.pick(&[&b"a"[..], b"b", b"c", b"", b"..", b"\xff", b"x/y"]).to_vec().into();
        let text = |input: &mut Input<'_>| pick(input, &USERS);
        match kind {
            0 => Kind::Mkdir(pb::EditMkdir {
                inode: Self::fresh(input, self.inode),
                parent: self.inode(input),
                name: name(input),
                owner: text(input),
                group: text(input),
                permission: input.number() as u32,
                ..Default::default()
            }),
            1 | 2 => Kind::Create(pb::EditCreate {
                inode: Self::fresh(input, self.inode),
                parent: self.inode(input),
                name: name(input),
                owner: text(input),
                group: text(input),
                permission: input.number() as u32,
                replication: input.number() as u32,
                block_size: if input.flag() { 1 << 20 } else { input.number() },
                client_name: pick(input, &["w1", "w2", ""]),
                replaces: if input.flag() { 0 } else { self.inode(input) },
                ..Default::default()
            }),
            9 => Kind::Rename(pb::EditRename {
                inode: self.inode(input),
                from_parent: self.inode(input),
                to_parent: self.inode(input),
                to_name: name(input),
                replaces: if input.flag() { 0 } else { self.inode(input) },
                ..Default::default()
            }),
            10 => Kind::Delete(pb::EditDelete {
                inode: self.inode(input),
                parent: self.inode(input),
                ..Default::default()
            }),
            _ => Kind::SetAttributes(pb::EditSetAttributes {
                inode: self.inode(input),
                permission: input.flag().then(|| input.number() as u32),
                owner: input.flag().then(|| text(input)),
                group: input.flag().then(|| text(input)),
                modified_ms: input.flag().then(|| input.number()),
                accessed_ms: input.flag().then(|| input.number()),
                replication: input.flag().then(|| input.number() as u32),
                ..Default::default()
            }),
        }
    }

    fn writer_edit(&self, kind: u8, input: &mut Input<'_>) -> Kind {
        match kind {
            3 | 4 => Kind::AddBlock(pb::EditAddBlock {
                inode: self.inode(input),
                block_id: Self::fresh(input, self.block) as i64,
                generation: Self::fresh(input, self.generation),
                index: input.byte() as u32 % 4,
                ..Default::default()
            }),
            5 => Kind::AbandonBlock(pb::EditAbandonBlock {
                inode: self.inode(input),
                block_id: self.block(input),
                ..Default::default()
            }),
            6 => Kind::UpdateBlock(pb::EditUpdateBlock {
                inode: self.inode(input),
                block_id: self.block(input),
                generation: self.generation(input),
                length: input.number(),
                ..Default::default()
            }),
            7 => Kind::CommitBlocks(pb::EditCommitBlocks {
                inode: self.inode(input),
                blocks: self.lengths(input),
                ..Default::default()
            }),
            8 => Kind::Close(pb::EditClose {
                inode: self.inode(input),
                blocks: self.lengths(input),
                ..Default::default()
            }),
            12 => Kind::Lease(pb::EditLease {
                inode: self.inode(input),
                holder: pick(input, &["w3", ""]),
                ..Default::default()
            }),
            15 => Kind::Append(pb::EditAppend {
                inode: self.inode(input),
                holder: pick(input, &["w1", ""]),
                ..Default::default()
            }),
            _ => Kind::RenewBlock(pb::EditRenewBlock {
                inode: self.inode(input),
                block_id: self.block(input),
                generation: Self::fresh(input, self.generation),
                ..Default::default()
            }),
        }
    }

    fn cluster_edit(&self, kind: u8, input: &mut Input<'_>) -> Kind {
        let text = |input: &mut Input<'_>| pick(input, &USERS);
        match kind {
            13 => Kind::RegisterNode(pb::EditRegisterNode {
                node_id: pick(input, &NODES),
                host: text(input),
                address: "127.0.0.1:1".into(),
                rack: pick(input, &["/r1", "/r2", "", "r", "/a/b"]),
                storages: (0..input.byte() % 3)
                    .map(|_| pb::EditStorage {
                        storage_id: pick(input, &["s1", "s2", "s3", ""]),
                        storage_type: input.number() as u32,
                    })
                    .collect(),
                ..Default::default()
            }),
            _ => match input.byte() % 3 {
                0 => Kind::Epoch(pb::EditEpoch { epoch: Self::fresh(input, self.epoch), ..Default::default() }),
                1 => Kind::AllocateGeneration(pb::EditAllocateGeneration {
                    inode: self.inode(input),
                    block_id: self.block(input),
                    generation: Self::fresh(input, self.generation),
                    ..Default::default()
                }),
                _ => Kind::Format(pb::EditFormat {
                    cluster_id: text(input),
                    superuser: text(input),
                    ..Default::default()
                }),
            },
        }
    }

    fn learn(&mut self, kind: &Kind) {
        match kind {
            Kind::Mkdir(e) => self.inode = e.inode,
            Kind::Create(e) => self.inode = e.inode,
            Kind::AddBlock(e) => (self.block, self.generation) = (e.block_id as u64, e.generation),
            Kind::AllocateGeneration(e) => self.generation = e.generation,
            Kind::RenewBlock(e) => self.generation = self.generation.max(e.generation),
            Kind::Epoch(e) => self.epoch = e.epoch,
            _ => {}
        }
    }
}

/// Edits that are well formed and perhaps nonsense: applied, or refused without a trace; what came of them survives an image.
pub fn replay(data: &[u8]) {
    let mut commands = Vec::new();
    let mut formatted = Core::format(settings(), "cluster", "pool", "root", "supergroup", START, &mut commands);
    formatted.start(START, Epoch(1), &mut commands);
    let mut core = Core::new_for_load(settings());
    for command in commands {
        if let Command::Append { txid, edit } = command {
            core.replay(txid, edit).unwrap();
        }
    }
    let mut known = Known { inode: InodeId::ROOT.0, block: BlockId::BASE.0 as u64, generation: 1_000, epoch: 1 };
    let mut input = Input::new(data);
    let raw = input.flag();
    for _ in 0..150 {
        if input.is_empty() {
            break;
        }
        let edit = if raw {
            let length = usize::from(input.byte());
            let Ok(edit) = pb::Edit::decode(input.take(length)) else { continue };
            edit
        } else {
            let kind = known.edit(&mut input);
            let client_id = if input.byte() < 200 { Vec::new() } else { vec![input.byte(); 16] };
            pb::Edit {
                min_reader: 1,
                client_id: client_id.into(),
                call_id: input.number(),
                time_ms: input.number(),
                kind: Some(kind),
            }
        };
        let (before, last) = (core.digest(), core.last_txid());
        match core.replay(last.next(), edit.clone()) {
            Ok(()) => {
                assert_eq!(core.last_txid(), last.next());
                edit.kind.iter().for_each(|kind| known.learn(kind));
            }
            Err(error) => {
                assert!(!error.cause.is_empty() && error.txid == last.next());
                assert_eq!((core.digest(), core.last_txid()), (before, last), "a refused edit left a trace: {error}");
            }
        }
        assert!(core.replay(last, edit).is_err(), "a transaction was applied twice");
    }
    check_image(&mut core);
}

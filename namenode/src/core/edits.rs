//! Edits: the one place that changes the persistent state, live and in replay.
//!
//! Each function first checks every precondition and then changes; a failure leaves the state as it was. The texts say
//! what does not hold, for the message that stops a start.

use cairn_proto::ids::{Epoch, TxId};
use cairn_proto::pb::{self, edit::Kind};

use super::Core;
use super::blocks::{Block, OpenBlock};
use super::inode::{BlockList, Body, Inode, Layout};
use super::leases::Lease;
use super::tree::{DOOMED, ROOT};

/// The layout version that this program understands.
pub const READER: u32 = 3;

/// The layout version that a reader of an edit must understand: a program that does not know its kind says so by number.
pub fn min_reader(kind: &Kind) -> u32 {
    match kind {
        Kind::Append(_)
        | Kind::RenewBlock(_)
        | Kind::Truncate(_)
        | Kind::Concat(_)
        | Kind::AllocateBlock(_)
        | Kind::MergeBlocks(_) => 2,
        Kind::AllocateGeneration(edit) if edit.finished => 3,
        _ => 1,
    }
}

pub(super) type Applied = Result<(), String>;

fn name_of(bytes: &[u8]) -> Result<&str, String> {
    let name = std::str::from_utf8(bytes).map_err(|_| "its name is not UTF-8".to_owned())?;
    cairn_proto::path::check_name(name)?;
    Ok(name)
}

impl Core {
    /// Applies one edit.
    pub(super) fn apply(&mut self, txid: TxId, edit: &pb::Edit) -> Applied {
        if edit.min_reader > READER {
            return Err(format!("it needs a program of layout version {} or newer", edit.min_reader));
        }
        let kind = edit.kind.as_ref().ok_or("its kind is unknown to this program")?;
        let time_ms = edit.time_ms;
        if !matches!(kind, Kind::Format(_)) && self.facts.cluster_id.is_empty() {
            return Err("it comes before the cluster was formatted".into());
        }
        match kind {
            Kind::Format(e) => self.apply_format(e, time_ms),
            Kind::Epoch(e) => self.apply_epoch(e),
            Kind::Mkdir(e) => self.apply_mkdir(txid, e, time_ms),
            Kind::Create(e) => self.apply_create(txid, e, time_ms),
            Kind::AddBlock(e) => self.apply_add_block(txid, e),
            Kind::AbandonBlock(e) => self.apply_abandon_block(txid, e),
            Kind::UpdateBlock(e) => self.apply_update_block(txid, e),
            Kind::CommitBlocks(e) => self.apply_commit_blocks(txid, e.inode, &e.blocks),
            Kind::Close(e) => self.apply_close(txid, e, time_ms),
            Kind::Rename(e) => self.apply_rename(txid, e, time_ms),
            Kind::Delete(e) => self.apply_delete(txid, e, time_ms),
            Kind::SetAttributes(e) => self.apply_set_attributes(txid, e),
            Kind::Lease(e) => self.apply_lease(txid, e),
            Kind::RegisterNode(e) => self.apply_register_node(txid, e),
            Kind::AllocateGeneration(e) => self.apply_allocate_generation(txid, e),
            Kind::Append(e) => self.apply_append(txid, e),
            Kind::RenewBlock(e) => self.apply_renew_block(txid, e),
            Kind::Truncate(e) => self.apply_truncate(txid, e, time_ms),
            Kind::Concat(e) => self.apply_concat(txid, e, time_ms),
            Kind::AllocateBlock(e) => self.apply_allocate_block(e),
            Kind::MergeBlocks(e) => self.apply_merge_blocks(txid, e),
            Kind::Restore(e) => self.apply_restore(e),
            Kind::ConfirmRestore(_) => self.apply_confirm_restore(),
        }?;
        self.counters.wall_ms = self.counters.wall_ms.max(time_ms);
        Ok(())
    }

    fn apply_format(&mut self, edit: &pb::EditFormat, time_ms: u64) -> Applied {
        if !self.facts.cluster_id.is_empty() {
            return Err(format!("the cluster {} is formatted already", self.facts.cluster_id));
        }
        if edit.cluster_id.is_empty() || edit.superuser.is_empty() {
            return Err("it names no cluster or no superuser".into());
        }
        self.facts = super::Facts {
            cluster_id: edit.cluster_id.clone(),
            pool_id: edit.pool_id.clone(),
            superuser: edit.superuser.clone(),
            supergroup: edit.supergroup.clone(),
        };
        let owner = self.tree.strings.intern(&edit.superuser);
        let group = self.tree.strings.intern(&edit.supergroup);
        self.tree.add(ROOT, Inode::new(ROOT, "", owner, group, 0o755, time_ms, Body::Directory(None)));
        Ok(())
    }

    fn apply_epoch(&mut self, edit: &pb::EditEpoch) -> Applied {
        if edit.epoch <= self.epoch.0 {
            return Err(format!("epoch {} does not follow epoch {}", edit.epoch, self.epoch));
        }
        self.epoch = Epoch(edit.epoch);
        Ok(())
    }

    fn check_new_entry(&self, inode: u64, parent: u64) -> Applied {
        if inode <= self.counters.inode {
            return Err(format!("inode {inode} was used before (the last one is {})", self.counters.inode));
        }
        self.check_directory(parent)
    }

    fn check_directory(&self, id: u64) -> Applied {
        if !self.tree.get(id).is_some_and(Inode::is_directory) || !self.tree.is_reachable(id) {
            return Err(format!("inode {id} is no directory of the namespace"));
        }
        Ok(())
    }

    /// An open file of the namespace.
    pub(super) fn check_open_file(&self, id: u64) -> Applied {
        match self.tree.get(id) {
            Some(inode) if !inode.is_directory() && self.tree.is_reachable(id) => {
                if inode.is_open() {
                    Ok(())
                } else {
                    Err(format!("file {id} is not open"))
                }
            }
            _ => Err(format!("inode {id} is no file of the namespace")),
        }
    }

    /// An entry of this directory changed.
    pub(super) fn entry_changed(&mut self, txid: TxId, directory: u64, time_ms: u64) {
        self.tree.modify(directory, |inode| inode.modified_ms = inode.modified_ms.max(time_ms));
        self.unsynced.mark(directory, txid);
        self.directory_changed(directory);
    }

    fn apply_mkdir(&mut self, txid: TxId, edit: &pb::EditMkdir, time_ms: u64) -> Applied {
        let name = name_of(&edit.name)?;
        self.check_new_entry(edit.inode, edit.parent)?;
        if let Some(there) = self.tree.child(edit.parent, name) {
            return Err(format!("{name:?} exists in inode {} as inode {there}", edit.parent));
        }
        let owner = self.tree.strings.intern(&edit.owner);
        let group = self.tree.strings.intern(&edit.group);
        let body = Body::Directory(None);
        self.tree.add(edit.inode, Inode::new(edit.parent, name, owner, group, edit.permission, time_ms, body));
        self.counters.inode = edit.inode;
        self.unsynced.mark(edit.inode, txid);
        self.entry_changed(txid, edit.parent, time_ms);
        Ok(())
    }

    fn apply_create(&mut self, txid: TxId, edit: &pb::EditCreate, time_ms: u64) -> Applied {
        let name = name_of(&edit.name)?;
        self.check_new_entry(edit.inode, edit.parent)?;
        let there = self.tree.child(edit.parent, name).unwrap_or(0);
        if there != edit.replaces {
            return Err(format!("{name:?} in inode {} is inode {there}, not {}", edit.parent, edit.replaces));
        }
        if there != 0 && self.tree.get(there).is_some_and(Inode::is_directory) {
            return Err(format!("it replaces the directory {there}"));
        }
        let replication = u16::try_from(edit.replication).map_err(|_| "its replication is out of range")?;
        let units = edit.block_size / cairn_proto::BLOCK_SIZE_UNIT;
        let block_units = u32::try_from(units).map_err(|_| "its block size is out of range")?;
        if replication == 0 || block_units == 0 || edit.client_name.is_empty() {
            return Err("it has no replication, no block size or no lease holder".into());
        }
        if there != 0 {
            self.doom(txid, there);
        }
        let owner = self.tree.strings.intern(&edit.owner);
        let group = self.tree.strings.intern(&edit.group);
        let body = Body::File(Layout::Blocks(BlockList::None));
        let mut inode = Inode::new(edit.parent, name, owner, group, edit.permission, time_ms, body);
        inode.replication = replication;
        inode.block_units = block_units;
        inode.set_open(true);
        self.tree.add(edit.inode, inode);
        self.counters.inode = edit.inode;
        let (holder, user) = (edit.client_name.as_str().into(), edit.owner.as_str().into());
        self.leases.grant(edit.inode, Lease { holder, user, first_block: 0 }, self.now_ms);
        self.unsynced.mark(edit.inode, txid);
        self.entry_changed(txid, edit.parent, time_ms);
        Ok(())
    }

    fn apply_add_block(&mut self, txid: TxId, edit: &pb::EditAddBlock) -> Applied {
        self.check_open_file(edit.inode)?;
        let count = self.tree.get(edit.inode).map_or(0, |inode| inode.blocks().len());
        if count != edit.index as usize {
            return Err(format!(
                "file {} has {count} blocks, so the new one cannot be number {}",
                edit.inode, edit.index
            ));
        }
        let id = u64::try_from(edit.block_id).map_err(|_| format!("block id {} is negative", edit.block_id))?;
        if id <= self.counters.block || edit.generation <= self.counters.generation {
            return Err(format!("block {id} or generation {} was used before", edit.generation));
        }
        self.counters.block = id;
        self.counters.generation = edit.generation;
        self.blocks.table.insert(id, Block::open(edit.inode, edit.generation));
        self.blocks.open.insert(id, OpenBlock::default());
        self.tree.modify(edit.inode, |inode| {
            if let Some(list) = inode.blocks_mut() {
                list.push(id);
            }
        });
        self.unsynced.mark(edit.inode, txid);
        self.unsynced.mark(id, txid);
        Ok(())
    }

    /// The block, if it belongs to this open file and its length is not known yet.
    fn open_block_of(&self, inode: u64, block_id: i64) -> Result<u64, String> {
        self.check_open_file(inode)?;
        let id = block_id as u64;
        match self.blocks.get(id) {
            Some(block) if block.inode == inode && block.length().is_none() => Ok(id),
            _ => Err(format!("block {block_id} is no open block of file {inode}")),
        }
    }

    /// The block, if it belongs to this file and its length is known.
    fn finished_block_of(&self, inode: u64, block_id: i64) -> Result<u64, String> {
        let id = block_id as u64;
        match self.blocks.get(id) {
            Some(block) if block.inode == inode && block.length().is_some() => Ok(id),
            _ => Err(format!("block {block_id} is no finished block of file {inode}")),
        }
    }

    fn apply_abandon_block(&mut self, txid: TxId, edit: &pb::EditAbandonBlock) -> Applied {
        let id = self.open_block_of(edit.inode, edit.block_id)?;
        if self.tree.get(edit.inode).and_then(|inode| inode.blocks().last().copied()) != Some(id) {
            return Err(format!("block {id} is not the last one of file {}", edit.inode));
        }
        if self.blocks.get(id).is_some_and(|block| block.target().is_some()) {
            return Err(format!("block {id} is being cut, not written"));
        }
        self.tree.modify(edit.inode, |inode| inode.blocks_mut().and_then(BlockList::pop));
        self.unsynced.mark(edit.inode, txid);
        self.free_block(id, txid);
        Ok(())
    }

    fn apply_update_block(&mut self, txid: TxId, edit: &pb::EditUpdateBlock) -> Applied {
        let id = self.open_block_of(edit.inode, edit.block_id)?;
        let old = self.blocks.get(id).map_or(0, |block| block.generation);
        if edit.generation <= old || edit.generation > self.counters.generation {
            return Err(format!(
                "generation {} does not fit between {old} and {}",
                edit.generation, self.counters.generation
            ));
        }
        self.blocks.table.modify(id, |block| block.generation = edit.generation);
        self.handed_out.in_force(id, edit.generation);
        self.unsynced.mark(id, txid);
        Ok(())
    }

    fn check_commits(&self, inode: u64, blocks: &[pb::EditBlockLength]) -> Applied {
        self.check_open_file(inode)?;
        for entry in blocks {
            match self.blocks.get(entry.block_id as u64) {
                Some(block) if block.inode == inode && block.generation == entry.generation => {
                    if block.known_length().is_some_and(|length| length != entry.length) {
                        return Err(format!("block {} has another length already", entry.block_id));
                    }
                }
                _ => return Err(format!("file {inode} has no block {} of this generation", entry.block_id)),
            }
        }
        Ok(())
    }

    fn apply_commit_blocks(&mut self, txid: TxId, inode: u64, blocks: &[pb::EditBlockLength]) -> Applied {
        self.check_commits(inode, blocks)?;
        for entry in blocks {
            self.commit_block(entry.block_id as u64, entry.length);
            self.unsynced.mark(entry.block_id as u64, txid);
        }
        self.unsynced.mark(inode, txid);
        Ok(())
    }

    fn apply_close(&mut self, txid: TxId, edit: &pb::EditClose, time_ms: u64) -> Applied {
        self.check_commits(edit.inode, &edit.blocks)?;
        let named = |id: u64| edit.blocks.iter().any(|entry| entry.block_id as u64 == id);
        let ids = self.tree.get(edit.inode).map_or(&[][..], Inode::blocks);
        let open = |id: &&u64| self.blocks.open.contains_key(*id) && !named(**id);
        if let Some(id) = ids.iter().find(open) {
            return Err(format!("block {id} of file {} has no length yet", edit.inode));
        }
        self.apply_commit_blocks(txid, edit.inode, &edit.blocks)?;
        self.tree.modify(edit.inode, |inode| {
            inode.set_open(false);
            inode.modified_ms = inode.modified_ms.max(time_ms);
        });
        self.leases.release(edit.inode);
        self.file_closed(edit.inode);
        Ok(())
    }

    fn apply_rename(&mut self, txid: TxId, edit: &pb::EditRename, time_ms: u64) -> Applied {
        let name = name_of(&edit.to_name)?;
        self.check_directory(edit.to_parent)?;
        let parent = self.tree.get(edit.inode).map(|inode| inode.parent);
        if edit.inode == ROOT || parent != Some(edit.from_parent) || !self.tree.is_reachable(edit.inode) {
            return Err(format!("inode {} does not lie in {}", edit.inode, edit.from_parent));
        }
        if self.tree.is_within(edit.to_parent, edit.inode) {
            return Err(format!("inode {} would lie in itself", edit.inode));
        }
        let there = self.tree.child(edit.to_parent, name).unwrap_or(0);
        if there != edit.replaces || there == edit.inode {
            return Err(format!("{name:?} in inode {} is inode {there}, not {}", edit.to_parent, edit.replaces));
        }
        if there != 0 {
            self.doom(txid, there);
        }
        self.tree.unlink(edit.inode);
        self.tree.modify(edit.inode, |inode| {
            inode.parent = edit.to_parent;
            if *inode.name != *name {
                inode.name = name.into();
            }
        });
        self.tree.link(edit.to_parent, edit.inode);
        self.tree_moved(edit.inode);
        self.unsynced.mark(edit.inode, txid);
        self.entry_changed(txid, edit.from_parent, time_ms);
        self.entry_changed(txid, edit.to_parent, time_ms);
        Ok(())
    }

    fn apply_delete(&mut self, txid: TxId, edit: &pb::EditDelete, time_ms: u64) -> Applied {
        let parent = self.tree.get(edit.inode).map(|inode| inode.parent);
        if edit.inode == ROOT || parent != Some(edit.parent) || !self.tree.is_reachable(edit.inode) {
            return Err(format!("inode {} does not lie in {}", edit.inode, edit.parent));
        }
        self.doom(txid, edit.inode);
        self.entry_changed(txid, edit.parent, time_ms);
        Ok(())
    }

    /// Cuts a tree off; a cursor frees it.
    fn doom(&mut self, txid: TxId, id: u64) {
        self.tree.unlink(id);
        self.tree.modify(id, |inode| inode.parent = DOOMED);
        self.leases.release(id);
        self.unsynced.mark(id, txid);
        self.cursors.doomed.push(id);
    }

    fn apply_set_attributes(&mut self, txid: TxId, edit: &pb::EditSetAttributes) -> Applied {
        let Some(inode) = self.tree.get(edit.inode).filter(|_| self.tree.is_reachable(edit.inode)) else {
            return Err(format!("inode {} is not in the namespace", edit.inode));
        };
        let replication = match edit.replication {
            None => None,
            Some(_) if inode.is_directory() => return Err(format!("inode {} is a directory", edit.inode)),
            Some(wanted) => match u16::try_from(wanted) {
                Ok(wanted) if wanted > 0 => Some(wanted),
                _ => return Err(format!("replication {wanted} is out of range")),
            },
        };
        let owner = edit.owner.as_deref().map(|owner| self.tree.strings.intern(owner));
        let group = edit.group.as_deref().map(|group| self.tree.strings.intern(group));
        self.tree.modify(edit.inode, |inode| {
            if let Some(mode) = edit.permission {
                inode.set_mode(mode);
            }
            inode.owner = owner.unwrap_or(inode.owner);
            inode.group = group.unwrap_or(inode.group);
            inode.modified_ms = edit.modified_ms.unwrap_or(inode.modified_ms);
            inode.accessed_ms = edit.accessed_ms.unwrap_or(inode.accessed_ms);
            inode.replication = replication.unwrap_or(inode.replication);
        });
        self.unsynced.mark(edit.inode, txid);
        self.directory_changed(edit.inode);
        if replication.is_some() {
            for id in self.tree.get(edit.inode).map(|inode| inode.blocks().to_vec()).unwrap_or_default() {
                self.reassess(id);
            }
        }
        Ok(())
    }

    fn apply_lease(&mut self, txid: TxId, edit: &pb::EditLease) -> Applied {
        self.check_open_file(edit.inode)?;
        if edit.holder.is_empty() {
            return Err("it names no holder".into());
        }
        let first_block = self.leases.get(edit.inode).map_or(0, |lease| lease.first_block);
        let lease = Lease { holder: edit.holder.as_str().into(), user: "".into(), first_block };
        self.leases.grant(edit.inode, lease, self.now_ms);
        self.unsynced.mark(edit.inode, txid);
        Ok(())
    }

    fn apply_register_node(&mut self, txid: TxId, edit: &pb::EditRegisterNode) -> Applied {
        if edit.node_id.is_empty() {
            return Err("it names no node".into());
        }
        let index = self.nodes.put(edit)?;
        self.nodes.node_mut(index).registered_by = txid;
        Ok(())
    }

    fn apply_allocate_generation(&mut self, txid: TxId, edit: &pb::EditAllocateGeneration) -> Applied {
        let id = if edit.finished {
            self.finished_block_of(edit.inode, edit.block_id)?
        } else {
            self.open_block_of(edit.inode, edit.block_id)?
        };
        if edit.generation <= self.counters.generation {
            return Err(format!("generation {} was used before", edit.generation));
        }
        self.counters.generation = edit.generation;
        self.handed_out.note(id, edit.generation);
        self.unsynced.mark(id, txid);
        Ok(())
    }
}

//! Cutting files.
//!
//! # Overview
//! At the end of a block a cut is one edit: the blocks behind it are gone. Inside a block the same edit opens that block
//! again, to be finished with exactly what is left of it; recovery (`recovery.rs`) then has a datanode cut the replicas
//! under a new generation. Until it reports, the namenode has the lease, so nobody writes; readers see the new length at
//! once, which the old replicas have too.
//!
//! # Consistency
//! The length that is left is in the block's record, so a restart goes on. Only a report of that very length finishes the
//! block. A replica that was away comes back with the old generation, does not count, and goes once a good one is there.
//!
//! # Crash
//! The edit comes first: no datanode is told to cut or delete anything before it is durable.

use cairn_proto::ids::TxId;
use cairn_proto::pb::{self, ReplicaState, edit::Kind};
use cairn_proto::{Error, ErrorCode};

use super::append::Claim;
use super::blocks::{Block, OpenBlock, SeenReplica};
use super::edits::Applied;
use super::inode::{BlockList, Inode};
use super::leases::Lease;
use super::permissions::Who;
use super::{Carries, Core, Turn};

/// Blocks that one call drops or moves, at most: all of it happens in one event.
pub const MAX_BLOCKS_PER_CALL: usize = 20_000;

impl Core {
    pub(super) fn truncate(
        &mut self,
        turn: &mut Turn<'_>,
        who: &Who<'_>,
        request: &pb::TruncateRequest,
    ) -> Result<pb::TruncateResponse, Error> {
        let (path, length) = (&request.path, request.length);
        let invalid = |message: String| Err(Error::new(ErrorCode::InvalidArgument, message).with_subject(path));
        let file = self.file_to_write(who, path, "truncate")?;
        if self.tree.get(file).is_some_and(Inode::is_open) {
            let client = who.caller.user.as_str();
            self.claim_open(turn, who, file, &Claim { path, client, doing: "TRUNCATE_FILE" })?;
        }
        let ids = self.tree.get(file).map_or(&[][..], Inode::blocks);
        let whole = self.status(file, path).map_or(0, |status| status.length);
        if length > whole {
            return invalid(format!(
                "Cannot truncate to a larger file size. Current size: {whole}, truncate size: {length}."
            ));
        }
        if length == whole {
            return Ok(pb::TruncateResponse { done: true, status: self.status(file, path) });
        }
        let (keep, cut) = self.find_cut(ids, length);
        if ids.len() - keep > MAX_BLOCKS_PER_CALL {
            return invalid(format!("{path}: more than {MAX_BLOCKS_PER_CALL} blocks would go; truncate in steps"));
        }
        if let Some(id) = cut.filter(|id| self.live_replicas(*id).is_empty()) {
            let message = format!("{path} is cut inside block {id}, of which no replica is there now");
            return Err(Error::new(ErrorCode::BlockNotFound, message).with_subject(path));
        }
        let cut_block = cut.map_or(0, |id| id as i64);
        let edit = pb::EditTruncate { inode: file, length, blocks: keep as u32, cut_block };
        self.commit(turn, Carries::Answer, Kind::Truncate(edit))?;
        let done = match cut {
            None => true,
            // A fault in what follows is none of the caller: the file gets its next turn later.
            Some(_) => self.take_over(turn, file).unwrap_or(false),
        };
        Ok(pb::TruncateResponse { done, status: self.status(file, path) })
    }

    /// How many blocks stay, and the last of them if the cut falls inside it.
    fn find_cut(&self, ids: &[u64], length: u64) -> (usize, Option<u64>) {
        let mut end = 0_u64;
        for (at, id) in ids.iter().enumerate() {
            if end >= length {
                return (at, None);
            }
            end += self.blocks.get(*id).and_then(Block::length).unwrap_or(0);
            if end > length {
                return (at + 1, Some(*id));
            }
        }
        (ids.len(), None)
    }

    pub(super) fn apply_truncate(&mut self, txid: TxId, edit: &pb::EditTruncate, time_ms: u64) -> Applied {
        self.check_closed_file(edit.inode)?;
        let ids = self.tree.get(edit.inode).map_or(Vec::new(), |inode| inode.blocks().to_vec());
        let whole: u64 = ids.iter().filter_map(|id| self.blocks.get(*id)?.length()).sum();
        let (keep, cut) = self.find_cut(&ids, edit.length);
        if edit.length >= whole || keep != edit.blocks as usize || cut.map_or(0, |id| id as i64) != edit.cut_block {
            return Err(format!(
                "file {} of {whole} bytes in {} blocks cannot be cut to {} bytes in {}",
                edit.inode,
                ids.len(),
                edit.length,
                edit.blocks
            ));
        }
        self.tree.modify(edit.inode, |inode| {
            if let Some(list) = inode.blocks_mut() {
                while list.as_slice().len() > keep {
                    BlockList::pop(list);
                }
            }
            inode.modified_ms = inode.modified_ms.max(time_ms);
            inode.set_open(cut.is_some());
        });
        self.unsynced.mark(edit.inode, txid);
        for id in &ids[keep..] {
            self.free_block(*id, txid);
        }
        if let Some(id) = cut {
            let before: u64 = ids[..keep - 1].iter().filter_map(|id| self.blocks.get(*id)?.length()).sum();
            self.reopen_block(id, edit.length - before);
            self.unsynced.mark(id, txid);
            self.leases.grant(edit.inode, Lease::of_recovery(), self.now_ms);
        }
        Ok(())
    }

    /// A finished block is open again, to be cut: its replicas are what recovery works on.
    fn reopen_block(&mut self, id: u64, target: u64) {
        self.uncount_block(id);
        let Some(block) = self.blocks.get(id) else { return };
        let (generation, length) = (block.generation, block.length().unwrap_or(0));
        let state = ReplicaState::Finalized;
        let seen = |storage: &u32| SeenReplica { storage: *storage, generation, length, state };
        let seen = block.replicas.as_slice().iter().map(seen).collect();
        self.blocks.table.modify(id, |block| block.reopen(target));
        self.blocks.open.insert(id, OpenBlock { seen, ..OpenBlock::default() });
    }
}

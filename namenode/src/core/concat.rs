//! Joining files without moving a byte.
//!
//! The blocks of the sources, which may have any length, are hung behind those of the target; the sources vanish in the
//! same edit. HDFS's rules hold: all lie in one directory and are closed, a source is not empty and has no larger block
//! size than the target. The target's replication holds for all of its blocks afterwards.

use cairn_proto::ids::TxId;
use cairn_proto::pb::{self, edit::Kind};
use cairn_proto::{Error, ErrorCode};

use super::attributes::not_found;
use super::edits::Applied;
use super::inode::Inode;
use super::permissions::{READ, WRITE, Who};
use super::truncate::MAX_BLOCKS_PER_CALL;
use super::{Carries, Core, Turn};

/// Sources of one call, at most: their ids must fit into one edit.
const MAX_SOURCES: usize = 10_000;

impl Core {
    pub(super) fn concat(
        &mut self,
        turn: &mut Turn<'_>,
        who: &Who<'_>,
        request: &pb::ConcatRequest,
    ) -> Result<pb::ConcatResponse, Error> {
        let path = &request.target;
        let refuse = |subject: &str, message: String| {
            Err(Error::new(ErrorCode::InvalidArgument, format!("concat: {message}")).with_subject(subject))
        };
        if request.sources.is_empty() || request.sources.len() > MAX_SOURCES {
            return refuse(path, format!("{} sources are given, not 1 to {MAX_SOURCES}", request.sources.len()));
        }
        let target = self.file_to_write(who, path, "concat to file")?;
        if self.tree.get(target).is_some_and(Inode::is_open) {
            return refuse(path, format!("target file {path} is under construction"));
        }
        let mut sources = Vec::with_capacity(request.sources.len());
        let mut blocks = 0;
        for source in &request.sources {
            let id = self.check_concat_source(who, source, target)?;
            blocks += self.tree.get(id).map_or(0, |inode| inode.blocks().len());
            sources.push(id);
        }
        let mut sorted = sources.clone();
        sorted.sort_unstable();
        if sorted.windows(2).any(|pair| pair[0] == pair[1]) {
            return refuse(path, "at least two of the source files are the same".into());
        }
        if blocks > MAX_BLOCKS_PER_CALL {
            return refuse(path, format!("the sources have {blocks} blocks, more than {MAX_BLOCKS_PER_CALL}"));
        }
        self.commit(turn, Carries::Answer, Kind::Concat(pb::EditConcat { target, sources }))?;
        Ok(pb::ConcatResponse { status: self.status(target, path) })
    }

    /// HDFS's rules for one source.
    fn check_concat_source(&self, who: &Who<'_>, source: &str, target: u64) -> Result<u64, Error> {
        let refuse = |message: String| {
            Err(Error::new(ErrorCode::InvalidArgument, format!("concat: {message}")).with_subject(source))
        };
        let resolved = self.resolve_for_change(who, source, "concat")?;
        let id = resolved.last().ok_or_else(|| not_found(source))?;
        let (Some(inode), Some(into)) = (self.tree.get(id), self.tree.get(target)) else {
            return Err(not_found(source));
        };
        if inode.is_directory() {
            return Err(Error::new(ErrorCode::NotAFile, format!("Path is not a file: {source}")).with_subject(source));
        }
        self.check_access(who, id, READ)?;
        if let Some(parent) = resolved.parent() {
            self.check_access(who, parent, WRITE)?;
            self.check_sticky(who, parent, id)?;
        }
        if id == target {
            return refuse(format!("the src file {source} is the same with the target file"));
        }
        if inode.parent != into.parent {
            return refuse(format!("Source file {source} is not in the same directory with the target"));
        }
        if inode.is_open() || inode.blocks().is_empty() {
            return refuse(format!("source file {source} is invalid or empty or underConstruction"));
        }
        if inode.block_units > into.block_units {
            return refuse(format!(
                "source file {source} has preferred block size {}, larger than {} of the target",
                inode.block_size(),
                into.block_size()
            ));
        }
        Ok(id)
    }

    pub(super) fn apply_concat(&mut self, txid: TxId, edit: &pb::EditConcat, time_ms: u64) -> Applied {
        self.check_closed_file(edit.target)?;
        let parent = self.tree.get(edit.target).map_or(0, |inode| inode.parent);
        let mut known = std::collections::BTreeSet::from([edit.target]);
        for source in &edit.sources {
            self.check_closed_file(*source)?;
            if self.tree.get(*source).map(|inode| inode.parent) != Some(parent) {
                return Err(format!("file {source} does not lie in inode {parent}"));
            }
            if !known.insert(*source) {
                return Err(format!("file {source} comes twice"));
            }
        }
        let mut ids = self.tree.get(edit.target).map_or(Vec::new(), |inode| inode.blocks().to_vec());
        let first = ids.len();
        for source in &edit.sources {
            ids.extend(self.tree.get(*source).map_or(&[][..], Inode::blocks));
            // Nothing of it is left to be freed in turns.
            self.tree.unlink(*source);
            self.tree.free(*source);
            self.unsynced.mark(*source, txid);
        }
        let moved = ids[first..].to_vec();
        for id in &moved {
            self.blocks.table.modify(*id, |block| block.inode = edit.target);
            self.unsynced.mark(*id, txid);
        }
        self.tree.modify(edit.target, |inode| {
            inode.set_blocks(ids);
            inode.modified_ms = inode.modified_ms.max(time_ms);
        });
        self.unsynced.mark(edit.target, txid);
        self.entry_changed(txid, parent, time_ms);
        self.note_short_blocks(edit.target);
        for id in moved {
            // The target may want another number of replicas.
            self.reassess(id);
        }
        Ok(())
    }
}

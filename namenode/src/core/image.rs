//! Checkpoints and loading.
//!
//! # Format
//! An image is a set of page blobs in any order, each with its kind in the first byte; numbers are varints.
//!
//! | kind | holds |
//! |---|---|
//! | 0 | once: layout, transaction S, digest, counts, counters, facts, users and groups, nodes; a restore to be confirmed; generations handed out beyond those in force |
//! | 1 | inodes: page number, count, then (gap, record) each |
//! | 2 | blocks, the same way |
//! | 3 | leases in layout 1: count, then (inode, holder) each |
//! | 4 | answers of calls: count, then (client, call, answer) each |
//! | 5 | leases: count, then (inode, holder, user, blocks that the file had) each |
//!
//! # Consistency
//! All of it is the state at S. Kind 0 is taken when the checkpoint begins, the others are copied in slices; what changes
//! before its slice is copied on write (an answer that its client lets go is just left out). The digest in the header is that of S, so a load proves that nothing is missing or altered.

use cairn_proto::ids::{Epoch, TxId};
use cairn_proto::pb;
use prost::Message as _;

use super::blocks::{Block, OpenBlock};
use super::codec::{Reader, hash_bytes, mix, put, put_bytes};
use super::generations::HandedOut;
use super::inode::Inode;
use super::leases::Lease;
use super::pages::{PAGE_RECORDS, Record};
use super::{Core, Counters, Facts};

const HEADER: u8 = 0;
const OLD_LEASES: u8 = 3;
const ANSWERS: u8 = 4;
const LEASES: u8 = 5;
/// Version of this layout; an image of a newer one is refused by name.
const LAYOUT: u64 = 2;

/// An image that cannot be loaded, and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the image cannot be loaded: {0}")]
pub struct LoadError(pub String);

impl From<String> for LoadError {
    fn from(cause: String) -> Self {
        Self(cause)
    }
}

/// A checkpoint under way, or what a load has promised.
#[derive(Default)]
pub struct Checkpoint {
    active: bool,
    prepared: Vec<Vec<u8>>,
    /// Leases and answers.
    lists_done: bool,
    inodes_done: bool,
    /// While loading: transaction, digest, inodes and blocks as the header says.
    promised: Option<(TxId, u64, u64, u64)>,
}

/// Records of one page.
struct Records<T> {
    number: u64,
    slots: Vec<Option<T>>,
    live: u32,
    digest: u64,
}

enum Content {
    Inodes(Records<Inode>),
    Blocks(Records<Block>),
    Other(Vec<u8>),
}

/// A page of an image that was read and is still to be taken by a core.
pub struct DecodedPage(Content);

fn decode_records<T: Record>(
    reader: &mut Reader<'_>,
    decode: impl Fn(&mut Reader<'_>) -> Result<T, String>,
) -> Result<Records<T>, String> {
    let number = reader.number()?;
    let base = number.checked_mul(PAGE_RECORDS).ok_or("a page number is out of range")?;
    let count = reader.number()?;
    let mut slots = Vec::with_capacity(count.min(PAGE_RECORDS) as usize);
    let (mut live, mut digest) = (0, 0u64);
    for _ in 0..count {
        let slot = reader.number()?.checked_add(slots.len() as u64).filter(|slot| *slot < PAGE_RECORDS);
        let slot = slot.ok_or_else(|| format!("page {number} holds more than {PAGE_RECORDS} records"))?;
        slots.resize_with(slot as usize, || None);
        let record = decode(reader)?;
        digest = digest.wrapping_add(record.hash(base + slot));
        slots.push(Some(record));
        live += 1;
    }
    slots.shrink_to_fit();
    Ok(Records { number, slots, live, digest })
}

impl Core {
    /// Digest of the persistent state; does not depend on order. A deleted tree counts until it is freed, so compare
    /// states only when [`Core::has_work`] is false, or at the beginning of a checkpoint.
    pub fn digest(&self) -> u64 {
        let mut sum = self.tree.inodes.digest().wrapping_add(self.blocks.table.digest().rotate_left(1));
        sum = sum.wrapping_add(self.leases.digest());
        for index in 0..self.nodes.nodes.len() as u32 {
            sum = sum.wrapping_add(hash_bytes(4, &self.nodes.as_edit(index).encode_to_vec()));
        }
        let counters = self.counters;
        let state = mix(mix(sum, counters.inode), mix(counters.block, counters.generation));
        let state = mix(mix(state, counters.wall_ms), mix(self.epoch.0, self.tree.strings.digest()));
        let state = if self.restored_to == 0 { state } else { mix(state, self.restored_to) };
        let handed_out = self.handed_out.digest();
        let state = if handed_out == 0 { state } else { mix(state, handed_out) };
        let facts = &self.facts;
        [&facts.cluster_id, &facts.pool_id, &facts.superuser, &facts.supergroup]
            .into_iter()
            .fold(state, |state, text| hash_bytes(state, text.as_bytes()))
    }

    /// Begins an image of the state as it is now; returns its transaction.
    pub fn checkpoint_begin(&mut self) -> TxId {
        self.checkpoint_abort();
        let prepared = vec![self.encode_header()];
        self.leases.begin_copy();
        self.retry.begin_copy();
        self.tree.inodes.begin_copy();
        self.blocks.table.begin_copy();
        self.checkpoint = Checkpoint { active: true, prepared, ..Checkpoint::default() };
        self.last_txid
    }

    /// Appends up to `max_pages` more pages to `out`, besides those that were copied on write; `true` when the image is
    /// complete.
    pub fn checkpoint_slice(&mut self, max_pages: usize, out: &mut Vec<Vec<u8>>) -> bool {
        if !self.checkpoint.active {
            return true;
        }
        out.append(&mut self.checkpoint.prepared);
        let mut budget = max_pages.max(1);
        while budget > 0 && !self.checkpoint.lists_done {
            let leases = self.leases.copy_some(PAGE_RECORDS as usize).map(|part| (LEASES, part));
            let part = leases.or_else(|| self.retry.copy_some(PAGE_RECORDS as usize).map(|part| (ANSWERS, part)));
            let Some((kind, (count, records))) = part else {
                self.checkpoint.lists_done = true;
                break;
            };
            let mut page = Vec::with_capacity(records.len() + 8);
            page.push(kind);
            put(&mut page, count as u64);
            page.extend_from_slice(&records);
            out.push(page);
            budget -= 1;
        }
        if !self.checkpoint.inodes_done {
            // Copies on write go out in any case, so that they do not pile up.
            self.checkpoint.inodes_done = self.tree.inodes.copy_some(&mut budget, out);
        }
        let mut budget = if self.checkpoint.inodes_done { budget } else { 0 };
        let blocks_done = self.blocks.table.copy_some(&mut budget, out);
        let done = self.checkpoint.lists_done && self.checkpoint.inodes_done && blocks_done;
        self.checkpoint.active = !done;
        !self.checkpoint.active
    }

    /// Gives an image up.
    pub fn checkpoint_abort(&mut self) {
        self.checkpoint = Checkpoint::default();
        self.leases.abort_copy();
        self.retry.abort_copy();
        self.tree.inodes.abort_copy();
        self.blocks.table.abort_copy();
    }

    fn encode_header(&self) -> Vec<u8> {
        let mut out = vec![HEADER];
        put(&mut out, LAYOUT);
        for number in [self.last_txid.0, self.digest(), self.tree.inodes.len(), self.blocks.table.len()] {
            put(&mut out, number);
        }
        let counters = self.counters;
        for number in [counters.inode, counters.block, counters.generation, counters.wall_ms, self.epoch.0] {
            put(&mut out, number);
        }
        let facts = &self.facts;
        for text in [&facts.cluster_id, &facts.pool_id, &facts.superuser, &facts.supergroup] {
            put_bytes(&mut out, text.as_bytes());
        }
        put(&mut out, self.tree.strings.all().len() as u64);
        for text in self.tree.strings.all() {
            put_bytes(&mut out, text.as_bytes());
        }
        put(&mut out, self.nodes.nodes.len() as u64);
        for index in 0..self.nodes.nodes.len() as u32 {
            put_bytes(&mut out, &self.nodes.as_edit(index).encode_to_vec());
        }
        put(&mut out, self.restored_to);
        self.handed_out.encode(&mut out);
        out
    }

    /// Reads one page of an image. Needs nothing of a core, so it can be done on any thread.
    pub fn decode_page(page: &[u8]) -> Result<DecodedPage, LoadError> {
        let mut reader = Reader::new(page);
        let content = match reader.byte()? {
            Inode::KIND => Content::Inodes(decode_records(&mut reader, Inode::decode)?),
            Block::KIND => Content::Blocks(decode_records(&mut reader, Block::decode)?),
            _ => return Ok(DecodedPage(Content::Other(page.to_vec()))),
        };
        if !reader.is_empty() {
            return Err(LoadError("a page holds more than its records".into()));
        }
        Ok(DecodedPage(content))
    }

    /// Takes one page of an image, in any order.
    pub fn load_page(&mut self, page: &[u8]) -> Result<(), LoadError> {
        self.load_decoded(Self::decode_page(page)?)
    }

    /// Takes one page that was read before.
    pub fn load_decoded(&mut self, page: DecodedPage) -> Result<(), LoadError> {
        let twice = |number: u64| Err(LoadError(format!("page {number} comes twice")));
        match page.0 {
            Content::Inodes(Records { number, slots, live, digest }) => {
                if !self.tree.inodes.insert_page(number, slots, live, digest) {
                    return twice(number);
                }
            }
            Content::Blocks(Records { number, slots, live, digest }) => {
                for (slot, block) in slots.iter().enumerate() {
                    match block.as_ref().map(Block::length) {
                        Some(Some(_)) => self.repair.complete += 1,
                        Some(None) => {
                            self.blocks.open.insert(number * PAGE_RECORDS + slot as u64, OpenBlock::default());
                        }
                        None => {}
                    }
                }
                if !self.blocks.table.insert_page(number, slots, live, digest) {
                    return twice(number);
                }
            }
            Content::Other(page) => self.load_lists(&page)?,
        }
        Ok(())
    }

    fn load_lists(&mut self, page: &[u8]) -> Result<(), LoadError> {
        let mut reader = Reader::new(page);
        match reader.byte()? {
            HEADER => self.load_header(&mut reader)?,
            kind @ (OLD_LEASES | LEASES) => {
                for _ in 0..reader.number()? {
                    let (file, holder) = (reader.number()?, reader.text()?.into());
                    let (user, first_block) =
                        if kind == LEASES { (reader.text()?.into(), reader.small()?) } else { ("".into(), 0) };
                    self.leases.grant(file, Lease { holder, user, first_block }, self.now_ms);
                }
            }
            ANSWERS => {
                for _ in 0..reader.number()? {
                    let (client, call, answer) = (reader.bytes()?, reader.number()?, reader.bytes()?);
                    self.retry.finish(
                        &(bytes::Bytes::copy_from_slice(client), call),
                        Some((answer.to_vec(), TxId(0))),
                        self.now_ms,
                    );
                }
            }
            kind => return Err(LoadError(format!("a page of kind {kind} is unknown to this program"))),
        }
        if !reader.is_empty() {
            return Err(LoadError("a page holds more than its records".into()));
        }
        Ok(())
    }

    fn load_header(&mut self, reader: &mut Reader<'_>) -> Result<(), String> {
        let layout = reader.number()?;
        if layout > LAYOUT {
            return Err(format!("its layout is {layout}; this program knows up to {LAYOUT}"));
        }
        if self.checkpoint.promised.is_some() {
            return Err("it has two headers".into());
        }
        let (txid, digest) = (TxId(reader.number()?), reader.number()?);
        self.checkpoint.promised = Some((txid, digest, reader.number()?, reader.number()?));
        self.counters = Counters {
            inode: reader.number()?,
            block: reader.number()?,
            generation: reader.number()?,
            wall_ms: reader.number()?,
        };
        self.epoch = Epoch(reader.number()?);
        self.facts = Facts {
            cluster_id: reader.text()?.into(),
            pool_id: reader.text()?.into(),
            superuser: reader.text()?.into(),
            supergroup: reader.text()?.into(),
        };
        for _ in 0..reader.number()? {
            self.tree.strings.intern(reader.text()?);
        }
        for _ in 0..reader.number()? {
            let edit = pb::EditRegisterNode::decode(reader.bytes()?).map_err(|error| error.to_string())?;
            self.nodes.put(&edit)?;
        }
        // Layout 1 names a restore only if there is one to be confirmed, and no generations.
        if layout > 1 || !reader.is_empty() {
            self.restored_to = reader.number()?;
        }
        if layout > 1 {
            self.handed_out = HandedOut::decode(reader)?;
        }
        Ok(())
    }

    /// Digests leave out what this finds: each block lies in the list of its file, once, in order.
    fn check_block_lists(&self) -> Result<(), String> {
        let mut listed = 0;
        for (file, inode) in self.tree.inodes.iter_from(0) {
            let ids = inode.blocks();
            listed += ids.len() as u64;
            if let Some(pair) = ids.windows(2).find(|pair| pair[0] >= pair[1]).filter(|_| !inode.is_unordered()) {
                return Err(format!("blocks {} and {} of inode {file} are out of order", pair[0], pair[1]));
            }
            if let Some(id) = ids.iter().find(|id| self.blocks.get(**id).is_none_or(|block| block.inode != file)) {
                return Err(format!("block {id} does not belong to inode {file}"));
            }
        }
        if listed == self.blocks.table.len() { Ok(()) } else { Err("it holds blocks of no file".into()) }
    }

    /// All pages are in: builds what images do not hold, and proves that this is the state at `txid`.
    pub fn finish_load(&mut self, txid: TxId) -> Result<(), LoadError> {
        let Some((promised_txid, digest, inodes, blocks)) = self.checkpoint.promised.take() else {
            return Err(LoadError("it has no header".into()));
        };
        if promised_txid != txid {
            return Err(LoadError(format!("it is the state at transaction {promised_txid}, not {txid}")));
        }
        let found = (self.tree.inodes.len(), self.blocks.table.len());
        if found != (inodes, blocks) {
            let (have_inodes, have_blocks) = found;
            let message = format!("it holds {have_inodes} of {inodes} inodes and {have_blocks} of {blocks} blocks");
            return Err(LoadError(message));
        }
        if self.digest() != digest {
            return Err(LoadError("its digest does not fit its contents".into()));
        }
        self.check_block_lists()?;
        self.cursors.doomed = self.tree.rebuild()?;
        for (file, _) in self.leases.all() {
            if !self.tree.get(file).is_some_and(Inode::is_open) {
                return Err(LoadError(format!("inode {file} has a lease but is not open")));
            }
        }
        self.last_txid = txid;
        self.unsynced.synced(txid);
        Ok(())
    }
}

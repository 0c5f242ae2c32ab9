//! The block map: which block belongs to which file, in which generation and length, and on which storages it lies.
//!
//! Images hold file, generation and length. Replicas come from reports only. The rare states lie in side maps, so that the
//! common block (written, whole, where it should be) costs 40 bytes.

use std::collections::BTreeMap;

use cairn_proto::pb::ReplicaState;

use super::codec::{Reader, mix, put};
use super::pages::{PageTable, Record};

/// Length of a block whose writer has not said it yet.
const OPEN_LENGTH: u64 = u64::MAX;
/// Mark of a finished block that is being cut; the other bits are the length that it will have.
const TRUNCATING: u64 = 1 << 63;
const INLINE: usize = 3;

/// Index of a storage in [`super::nodes::Nodes`]; it stays the same while the namenode runs.
pub type StorageIndex = u32;

/// The storages that hold a good replica.
#[allow(clippy::box_collection)] // a bare Vec would make every block 8 bytes larger
pub enum Replicas {
    /// Up to three.
    Inline(u8, [StorageIndex; INLINE]),
    /// More.
    Heap(Box<Vec<StorageIndex>>),
}

impl Default for Replicas {
    fn default() -> Self {
        Self::Inline(0, [0; INLINE])
    }
}

impl Replicas {
    /// The storages.
    #[inline]
    pub fn as_slice(&self) -> &[StorageIndex] {
        match self {
            Self::Inline(count, storages) => &storages[..usize::from(*count)],
            Self::Heap(storages) => storages,
        }
    }

    /// Whether a storage is among them.
    #[inline]
    pub fn contains(&self, storage: StorageIndex) -> bool {
        self.as_slice().contains(&storage)
    }

    /// Adds a storage; `false` if it is there.
    pub fn insert(&mut self, storage: StorageIndex) -> bool {
        if self.contains(storage) {
            return false;
        }
        match self {
            Self::Inline(count, storages) if usize::from(*count) < INLINE => {
                storages[usize::from(*count)] = storage;
                *count += 1;
            }
            Self::Inline(_, storages) => {
                let mut all = storages.to_vec();
                all.push(storage);
                *self = Self::Heap(Box::new(all));
            }
            Self::Heap(storages) => storages.push(storage),
        }
        true
    }

    /// Takes a storage out.
    pub fn remove(&mut self, storage: StorageIndex) -> bool {
        let Some(at) = self.as_slice().iter().position(|other| *other == storage) else { return false };
        match self {
            Self::Inline(count, storages) => {
                storages.copy_within(at + 1.., at);
                *count -= 1;
            }
            Self::Heap(storages) => {
                storages.remove(at);
                if storages.len() <= INLINE {
                    let mut inline = [0; INLINE];
                    inline[..storages.len()].copy_from_slice(storages);
                    *self = Self::Inline(storages.len() as u8, inline);
                }
            }
        }
        true
    }
}

/// A block.
pub struct Block {
    /// Its file.
    pub inode: u64,
    /// Newest generation: replicas with another one do not count.
    pub generation: u64,
    length: u64,
    /// Where good, finalized replicas lie. Empty until the writer has said the length.
    pub replicas: Replicas,
}

impl Block {
    /// A block that is about to be written.
    pub fn open(inode: u64, generation: u64) -> Self {
        Self { inode, generation, length: OPEN_LENGTH, replicas: Replicas::default() }
    }

    /// Bytes of file data, once the writer has said so.
    #[inline]
    pub fn length(&self) -> Option<u64> {
        if self.length & TRUNCATING != 0 { None } else { Some(self.length) }
    }

    /// The length that a block which is being cut will have.
    #[inline]
    pub fn target(&self) -> Option<u64> {
        if self.length & TRUNCATING != 0 && self.length != OPEN_LENGTH { Some(self.length & !TRUNCATING) } else { None }
    }

    /// Bytes of file data as far as they are decided.
    #[inline]
    pub fn known_length(&self) -> Option<u64> {
        if self.length == OPEN_LENGTH { None } else { Some(self.length & !TRUNCATING) }
    }

    /// The finished block is to be cut.
    pub fn reopen(&mut self, target: u64) {
        self.length = TRUNCATING | target;
        self.replicas = Replicas::default();
    }

    /// The writer says the length.
    pub fn commit(&mut self, length: u64) {
        self.length = length;
    }

    /// Reads what [`Record::encode`] wrote.
    pub fn decode(reader: &mut Reader<'_>) -> Result<Self, String> {
        let inode = reader.number()?;
        let generation = reader.number()?;
        let length = reader.number()?.wrapping_sub(1);
        Ok(Self { inode, generation, length, replicas: Replicas::default() })
    }
}

impl Record for Block {
    const KIND: u8 = 2;

    fn encode(&self, out: &mut Vec<u8>) {
        put(out, self.inode);
        put(out, self.generation);
        put(out, self.length.wrapping_add(1));
    }

    fn hash(&self, id: u64) -> u64 {
        mix(mix(id, self.inode), self.generation ^ self.length.rotate_left(32))
    }
}

/// What a storage said of a replica of a block that is being written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SeenReplica {
    /// Where it lies.
    pub storage: StorageIndex,
    /// Its generation.
    pub generation: u64,
    /// Its length, bytes.
    pub length: u64,
    /// Its state.
    pub state: ReplicaState,
}

impl SeenReplica {
    /// The same of one that does not count.
    pub fn as_bad(&self) -> BadReplica {
        let whole = (self.state == ReplicaState::Finalized).then_some(self.length);
        BadReplica { storage: self.storage, generation: self.generation, whole }
    }
}

/// A block whose length the writer has not said yet.
#[derive(Default, Debug)]
pub struct OpenBlock {
    /// The pipeline.
    pub expected: Vec<StorageIndex>,
    /// The room that its writer was promised there.
    pub promises: Vec<Promise>,
    /// What was reported.
    pub seen: Vec<SeenReplica>,
    /// Bytes of file data that its writer said at a sync, for the status of its file.
    pub said: u64,
}

/// Room that was promised on a storage.
#[derive(Debug)]
pub struct Promise {
    /// Where.
    pub storage: StorageIndex,
    /// [`super::nodes::Storage::told`] at that time.
    pub told: u64,
    /// How much.
    pub bytes: u64,
}

/// A replica that does not count, and what its own node says of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BadReplica {
    /// Where it lies.
    pub storage: StorageIndex,
    /// Its generation.
    pub generation: u64,
    /// Bytes of file data, if it is finalized and sound.
    pub whole: Option<u64>,
}

/// See the module.
#[derive(Default)]
pub struct BlockMap {
    /// All blocks.
    pub table: PageTable<Block>,
    /// Blocks being written.
    pub open: BTreeMap<u64, OpenBlock>,
    /// Replicas with a wrong generation or length, or damaged.
    pub bad: BTreeMap<u64, Vec<BadReplica>>,
    /// Good replicas that are too many and wait for their deletion; they do not count as live.
    pub excess: BTreeMap<u64, Vec<StorageIndex>>,
    /// Of blocks with superfluous replicas: the one that may stay alone, since its node has read it after they were marked.
    proofs: BTreeMap<u64, StorageIndex>,
}

impl BlockMap {
    /// The block with this id.
    #[inline]
    pub fn get(&self, id: u64) -> Option<&Block> {
        self.table.get(id)
    }

    /// Whether a good replica is marked as too many.
    #[inline]
    pub fn is_excess(&self, id: u64, storage: StorageIndex) -> bool {
        !self.excess.is_empty() && self.excess.get(&id).is_some_and(|storages| storages.contains(&storage))
    }

    /// Takes the mark off.
    pub fn unmark_excess(&mut self, id: u64, storage: StorageIndex) {
        if let Some(storages) = self.excess.get_mut(&id) {
            storages.retain(|other| *other != storage);
            if storages.is_empty() {
                self.forget_excess(id);
            }
        }
    }

    /// Takes all marks of a block off.
    pub fn forget_excess(&mut self, id: u64) {
        self.excess.remove(&id);
        self.proofs.remove(&id);
    }

    /// Whether a replica may be left as the only one: a bit may have flipped since it was last read.
    pub fn is_proven(&self, id: u64, storage: StorageIndex) -> bool {
        self.proofs.get(&id) == Some(&storage)
    }

    /// What was read before further replicas were marked says nothing of now.
    pub fn forget_proof(&mut self, id: u64) {
        self.proofs.remove(&id);
    }

    /// The node of a replica has read it, and it is right. Returns the replicas that may go now.
    pub fn proof_given(&mut self, id: u64, storage: StorageIndex) -> Vec<StorageIndex> {
        let Some(excess) = self.excess.get(&id) else { return Vec::new() };
        if excess.contains(&storage) || self.proofs.insert(id, storage) == Some(storage) {
            return Vec::new();
        }
        excess.clone()
    }

    /// Forgets a bad replica; `true` if it was known.
    pub fn forget_bad(&mut self, id: u64, storage: StorageIndex) -> bool {
        let Some(list) = self.bad.get_mut(&id) else { return false };
        let before = list.len();
        list.retain(|bad| bad.storage != storage);
        let changed = list.len() != before;
        if list.is_empty() {
            self.bad.remove(&id);
        }
        changed
    }

    /// Notes a bad replica.
    pub fn note_bad(&mut self, id: u64, noted: BadReplica) {
        let list = self.bad.entry(id).or_default();
        match list.iter_mut().find(|bad| bad.storage == noted.storage) {
            Some(bad) => *bad = noted,
            None => list.push(noted),
        }
    }

    /// Blocks with bad replicas. One that is being written is not among them: what its writer left behind goes when it is finished.
    pub fn corrupt(&self) -> u64 {
        self.bad.keys().filter(|id| !self.open.contains_key(id)).count() as u64
    }

    /// Whether anything is known of the block on that storage.
    pub fn known_on(&self, id: u64, storage: StorageIndex) -> bool {
        self.get(id).is_some_and(|block| block.replicas.contains(storage))
            || self.bad.get(&id).is_some_and(|list| list.iter().any(|bad| bad.storage == storage))
            || self.open.get(&id).is_some_and(|open| open.seen.iter().any(|seen| seen.storage == storage))
    }

    /// Every storage that holds anything of the block.
    pub fn storages_of(&self, id: u64) -> Vec<StorageIndex> {
        let mut all: Vec<StorageIndex> =
            self.get(id).map(|block| block.replicas.as_slice().to_vec()).unwrap_or_default();
        all.extend(self.bad.get(&id).into_iter().flatten().map(|bad| bad.storage));
        all.extend(self.open.get(&id).into_iter().flat_map(|open| &open.seen).map(|seen| seen.storage));
        all.sort_unstable();
        all.dedup();
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_small() {
        assert!(size_of::<Option<Block>>() <= 40, "{}", size_of::<Option<Block>>());
    }

    #[test]
    fn replicas_move_between_inline_and_heap() {
        let mut replicas = Replicas::default();
        for storage in 0..5 {
            assert!(replicas.insert(storage) && !replicas.insert(storage));
        }
        assert!(replicas.remove(1) && !replicas.remove(1));
        assert!(replicas.remove(4));
        assert_eq!(replicas.as_slice(), [0, 2, 3]);
        assert!(replicas.remove(0));
        assert_eq!(replicas.as_slice(), [2, 3]);
    }

    #[test]
    fn comes_back_from_an_image() {
        for mut block in [Block::open(7, 1_001), Block::open(8, 2)] {
            if block.inode == 8 {
                block.commit(0);
            }
            let mut bytes = Vec::new();
            block.encode(&mut bytes);
            let back = Block::decode(&mut Reader::new(&bytes)).unwrap();
            assert_eq!((back.length(), back.hash(3)), (block.length(), block.hash(3)));
        }
    }
}

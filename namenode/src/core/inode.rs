//! Inodes: what a file or directory is, in as few bytes as it takes.

use super::children::Children;
use super::codec::{FixedMap, Reader, hash_bytes, mix, put, put_bytes};
use super::name::Name;
use super::pages::Record;

/// Permission bits of an inode: sticky and rwxrwxrwx.
pub const MODE_MASK: u32 = 0o1777;
/// Bit of [`Inode::flags`]: a writer has the file open.
const OPEN: u16 = 0x8000;
/// Bit of [`Inode::flags`]: the ids of the blocks do not rise, so that they are hashed one by one.
const UNORDERED: u16 = 0x4000;
/// Bit of [`Inode::flags`]: the blocks are being freed, one by one. What order they had is of no interest any more.
const FREEING: u16 = 0x2000;

/// Names of users and groups as small numbers; the table only grows.
#[derive(Default)]
pub struct Strings {
    texts: Vec<Box<str>>,
    index: FixedMap<Box<str>, u32>,
    digest: u64,
}

impl Strings {
    /// Hash of all texts in their order.
    pub fn digest(&self) -> u64 {
        self.digest
    }

    /// The number of `text`.
    pub fn intern(&mut self, text: &str) -> u32 {
        if let Some(number) = self.index.get(text) {
            return *number;
        }
        let number = self.texts.len() as u32;
        self.digest = hash_bytes(self.digest, text.as_bytes());
        self.texts.push(text.into());
        self.index.insert(text.into(), number);
        number
    }

    /// The text with this number.
    #[inline]
    pub fn get(&self, number: u32) -> &str {
        self.texts.get(number as usize).map_or("", |text| text)
    }

    /// All texts in order of number.
    pub fn all(&self) -> &[Box<str>] {
        &self.texts
    }
}

/// Blocks of a file in order; no heap for none or one.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
#[allow(clippy::box_collection)] // a bare Vec would make every inode 8 bytes larger
pub enum BlockList {
    /// An empty file.
    #[default]
    None,
    /// The common case.
    One(u64),
    /// Several.
    Many(Box<Vec<u64>>),
}

impl BlockList {
    /// The ids.
    #[inline]
    pub fn as_slice(&self) -> &[u64] {
        match self {
            Self::None => &[],
            Self::One(id) => std::slice::from_ref(id),
            Self::Many(ids) => ids,
        }
    }

    /// Adds one at the end.
    pub fn push(&mut self, id: u64) {
        match self {
            Self::None => *self = Self::One(id),
            Self::One(first) => *self = Self::Many(Box::new(vec![*first, id])),
            Self::Many(ids) => ids.push(id),
        }
    }

    /// Takes the last one off.
    pub fn pop(&mut self) -> Option<u64> {
        match self {
            Self::None => None,
            Self::One(id) => {
                let id = *id;
                *self = Self::None;
                Some(id)
            }
            Self::Many(ids) => {
                let id = ids.pop();
                if let [only] = ids[..] {
                    *self = Self::One(only);
                }
                id
            }
        }
    }
}

impl From<Vec<u64>> for BlockList {
    fn from(ids: Vec<u64>) -> Self {
        match ids[..] {
            [] => Self::None,
            [only] => Self::One(only),
            _ => Self::Many(Box::new(ids)),
        }
    }
}

/// How the bytes of a file are laid out. Striped (erasure coding) and packed (small files) come later; images and edits
/// carry a tag for this already.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Layout {
    /// Whole blocks, each with its own replicas.
    Blocks(BlockList),
}

/// What an inode is.
pub enum Body {
    /// A directory; its children are derived from the parents of the inodes, so images do not hold them. `None`: empty.
    Directory(Option<Box<Children>>),
    /// A file.
    File(Layout),
}

/// A file or directory.
pub struct Inode {
    /// The directory that holds it; the root holds itself; 0: the root of a deleted tree that is still being freed.
    pub parent: u64,
    /// Its name there.
    pub name: Name,
    /// Last change of the contents, wall milliseconds.
    pub modified_ms: u64,
    /// Last access, wall milliseconds.
    pub accessed_ms: u64,
    /// Interned user.
    pub owner: u32,
    /// Interned group.
    pub group: u32,
    flags: u16,
    /// Wanted replicas of a file.
    pub replication: u16,
    /// Block size of a file in units of 512 bytes.
    pub block_units: u32,
    /// What it is.
    pub body: Body,
}

impl Inode {
    /// A new entry with the given mode.
    pub fn new(parent: u64, name: &str, owner: u32, group: u32, mode: u32, time_ms: u64, body: Body) -> Self {
        Self {
            parent,
            name: name.into(),
            modified_ms: time_ms,
            accessed_ms: time_ms,
            owner,
            group,
            flags: (mode & MODE_MASK) as u16,
            replication: 0,
            block_units: 0,
            body,
        }
    }

    /// Permission bits.
    #[inline]
    pub fn mode(&self) -> u32 {
        u32::from(self.flags) & MODE_MASK
    }

    /// Sets the permission bits.
    pub fn set_mode(&mut self, mode: u32) {
        self.flags = (self.flags & (OPEN | UNORDERED | FREEING)) | (mode & MODE_MASK) as u16;
    }

    /// Whether a writer has it open.
    #[inline]
    pub fn is_open(&self) -> bool {
        self.flags & OPEN != 0
    }

    /// Opens or closes it.
    pub fn set_open(&mut self, open: bool) {
        self.flags = if open { self.flags | OPEN } else { self.flags & !OPEN };
    }

    /// Whether it is a directory.
    #[inline]
    pub fn is_directory(&self) -> bool {
        matches!(self.body, Body::Directory(_))
    }

    /// Number of direct children.
    pub fn child_count(&self) -> usize {
        match &self.body {
            Body::Directory(Some(children)) => children.len(),
            _ => 0,
        }
    }

    /// Blocks of a file; none for a directory.
    #[inline]
    pub fn blocks(&self) -> &[u64] {
        match &self.body {
            Body::File(Layout::Blocks(list)) => list.as_slice(),
            Body::Directory(_) => &[],
        }
    }

    /// The block list of a file, for a change.
    pub fn blocks_mut(&mut self) -> Option<&mut BlockList> {
        match &mut self.body {
            Body::File(Layout::Blocks(list)) => Some(list),
            Body::Directory(_) => None,
        }
    }

    /// Gives a file another list of blocks.
    pub fn set_blocks(&mut self, ids: Vec<u64>) {
        let rises = ids.windows(2).all(|pair| pair[0] < pair[1]);
        self.flags = if rises { self.flags & !UNORDERED } else { self.flags | UNORDERED };
        self.body = Body::File(Layout::Blocks(ids.into()));
    }

    /// Takes the last block off a file that is being freed. The first time costs a look at all of them, if they are in no order.
    pub fn pop_freed(&mut self) -> Option<u64> {
        self.flags |= FREEING;
        self.blocks_mut().and_then(BlockList::pop)
    }

    /// Whether the ids of the blocks need not rise.
    pub fn is_unordered(&self) -> bool {
        self.flags & UNORDERED != 0
    }

    /// Block size of a file, bytes.
    #[inline]
    pub fn block_size(&self) -> u64 {
        u64::from(self.block_units) * cairn_proto::BLOCK_SIZE_UNIT
    }

    /// Reads what [`Record::encode`] wrote.
    pub fn decode(reader: &mut Reader<'_>) -> Result<Self, String> {
        let tag = reader.byte()?;
        let parent = reader.number()?;
        let name = reader.text()?.into();
        let modified_ms = reader.number()?;
        let accessed_ms = reader.number()?;
        let owner = reader.small()?;
        let group = reader.small()?;
        let flags = reader.small()?;
        let mut inode = Self {
            parent,
            name,
            modified_ms,
            accessed_ms,
            owner,
            group,
            flags,
            replication: 0,
            block_units: 0,
            body: Body::Directory(None),
        };
        match tag {
            0 => {}
            1 => {
                inode.replication = reader.small()?;
                inode.block_units = reader.small()?;
                let count = reader.number()?;
                let mut list = BlockList::default();
                for _ in 0..count {
                    list.push(reader.number()?);
                }
                if let BlockList::Many(ids) = &mut list {
                    ids.shrink_to_fit();
                }
                inode.body = Body::File(Layout::Blocks(list));
            }
            other => return Err(format!("inode layout {other} is newer than this program")),
        }
        Ok(inode)
    }
}

impl Record for Inode {
    const KIND: u8 = 1;

    fn encode(&self, out: &mut Vec<u8>) {
        let list = match &self.body {
            Body::Directory(_) => None,
            Body::File(Layout::Blocks(list)) => Some(list),
        };
        out.push(u8::from(list.is_some()));
        put(out, self.parent);
        put_bytes(out, self.name.as_bytes());
        put(out, self.modified_ms);
        put(out, self.accessed_ms);
        put(out, self.owner.into());
        put(out, self.group.into());
        put(out, self.flags.into());
        if let Some(list) = list {
            put(out, self.replication.into());
            put(out, self.block_units.into());
            put(out, list.as_slice().len() as u64);
            for id in list.as_slice() {
                put(out, *id);
            }
        }
    }

    fn hash(&self, id: u64) -> u64 {
        let state = hash_bytes(mix(id, self.parent), self.name.as_bytes());
        let state = mix(state, self.modified_ms ^ self.accessed_ms.rotate_left(21));
        let state = mix(state, u64::from(self.owner) << 32 | u64::from(self.group));
        let kind = u64::from(self.is_directory());
        let small = u64::from(self.flags) << 48 | u64::from(self.replication) << 32 | u64::from(self.block_units);
        let state = mix(state, small ^ kind.rotate_right(1));
        // A file of thousands of blocks must not be hashed whole at each new block: their own records carry their file
        // and index order follows from the ids, so length and the last id stand for the list, unless blocks were moved.
        let blocks = self.blocks();
        let hashed = if self.is_unordered() && self.flags & FREEING == 0 { blocks } else { &[] };
        let state = hashed.iter().fold(state, |state, id| {
            #[cfg(test)]
            super::codec::steps::count();
            mix(state, *id)
        });
        mix(state, blocks.last().copied().unwrap_or(0) ^ (blocks.len() as u64).rotate_left(40))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_inode_is_small() {
        assert!(size_of::<Option<Inode>>() <= 80, "{}", size_of::<Option<Inode>>());
    }

    #[test]
    fn comes_back_from_an_image() {
        let mut file = Inode::new(16_385, "né", 1, 2, 0o644, 99, Body::File(Layout::Blocks(BlockList::None)));
        file.replication = 3;
        file.block_units = 7;
        file.set_open(true);
        for id in 1..4 {
            file.blocks_mut().unwrap().push(id);
        }
        let mut bytes = Vec::new();
        file.encode(&mut bytes);
        let back = Inode::decode(&mut Reader::new(&bytes)).unwrap();
        assert_eq!(back.hash(5), file.hash(5));
        assert_eq!(back.blocks(), [1, 2, 3]);
        assert!(back.is_open() && back.mode() == 0o644);
        bytes[0] = 9;
        assert!(Inode::decode(&mut Reader::new(&bytes)).is_err());
    }

    #[test]
    fn block_lists_shrink() {
        let mut list = BlockList::default();
        for id in 1..=3 {
            list.push(id);
        }
        assert_eq!((list.pop(), list.pop()), (Some(3), Some(2)));
        assert_eq!(list, BlockList::One(1));
        assert_eq!((list.pop(), list.pop()), (Some(1), None));
    }
}

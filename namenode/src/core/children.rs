//! The children of a directory: inode ids sorted by name.
//!
//! Names are stored once, in the inodes, so a comparison goes through the inode. To spare most of them an entry carries a
//! 16-bit tag of its name: a lookup compares names only to find the chunk, then scans the tags of the chunk. Chunks of at
//! most 256 keep an insertion into a directory of a million cheap.

use super::codec::hash_bytes;

const CHUNK: usize = 256;
/// Up to this many chunks all tags are scanned: cheaper than the names of a few chunks that no cache holds.
const SCANNED: usize = 8;
const LANE: usize = 64;

#[derive(Default)]
struct Chunk {
    ids: Vec<u64>,
    tags: Vec<u16>,
}

/// See the module.
#[derive(Default)]
pub struct Children {
    chunks: Vec<Chunk>,
    len: usize,
}

/// Ids in order of name.
pub struct After<'s> {
    chunks: &'s [Chunk],
    at: usize,
}

impl Iterator for After<'_> {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        loop {
            let chunk = self.chunks.first()?;
            if let Some(id) = chunk.ids.get(self.at) {
                self.at += 1;
                return Some(*id);
            }
            self.chunks = &self.chunks[1..];
            self.at = 0;
        }
    }
}

#[inline]
fn tag_of(name: &[u8]) -> u16 {
    hash_bytes(0, name) as u16
}

impl Chunk {
    #[inline]
    fn get<'a>(&self, name: &[u8], tag: u16, name_of: &impl Fn(u64) -> &'a [u8]) -> Option<u64> {
        for (tags, ids) in self.tags.chunks(LANE).zip(self.ids.chunks(LANE)) {
            // No early exit inside a lane: the compiler then compares many tags at a time.
            if !tags.iter().fold(false, |found, other| found | (*other == tag)) {
                continue;
            }
            let matching = tags.iter().zip(ids).filter(|(other, _)| **other == tag);
            if let Some((_, id)) = matching.into_iter().find(|(_, id)| name_of(**id) == name) {
                return Some(*id);
            }
        }
        None
    }

    fn insert(&mut self, at: usize, id: u64, tag: u16) {
        if self.ids.len() == self.ids.capacity() {
            // Small steps: half-empty chunks would cost more memory than the moves cost time.
            let more = (self.ids.len() / 4).clamp(2, 32);
            self.ids.reserve_exact(more);
            self.tags.reserve_exact(more);
        }
        self.ids.insert(at, id);
        self.tags.insert(at, tag);
    }
}

impl Children {
    /// Number of children.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Index of the chunk in which `name` lies or would lie.
    #[inline]
    fn chunk_of<'a>(&self, name: &[u8], name_of: &impl Fn(u64) -> &'a [u8]) -> usize {
        self.chunks.partition_point(|chunk| name_of(chunk.ids[0]) <= name).saturating_sub(1)
    }

    /// The child of this name.
    #[inline]
    pub fn get<'a>(&self, name: &[u8], name_of: impl Fn(u64) -> &'a [u8]) -> Option<u64> {
        let tag = tag_of(name);
        if self.chunks.len() <= SCANNED {
            return self.chunks.iter().find_map(|chunk| chunk.get(name, tag, &name_of));
        }
        self.chunks.get(self.chunk_of(name, &name_of))?.get(name, tag, &name_of)
    }

    /// Adds a child that is not there yet.
    pub fn insert<'a>(&mut self, name: &[u8], id: u64, name_of: impl Fn(u64) -> &'a [u8]) {
        let tag = tag_of(name);
        self.len += 1;
        if self.chunks.is_empty() {
            self.chunks.push(Chunk { ids: vec![id], tags: vec![tag] });
            return;
        }
        let mut index = self.chunk_of(name, &name_of);
        let mut at = self.chunks[index].ids.partition_point(|other| name_of(*other) < name);
        if self.chunks[index].ids.len() >= CHUNK {
            let last = index + 1 == self.chunks.len();
            if last && at == CHUNK {
                // Names that only grow fill every chunk.
                self.chunks.push(Chunk { ids: vec![id], tags: vec![tag] });
                return;
            }
            let chunk = &mut self.chunks[index];
            let upper = Chunk { ids: chunk.ids.split_off(CHUNK / 2), tags: chunk.tags.split_off(CHUNK / 2) };
            chunk.ids.shrink_to_fit();
            chunk.tags.shrink_to_fit();
            self.chunks.insert(index + 1, upper);
            if at > CHUNK / 2 {
                index += 1;
                at -= CHUNK / 2;
            }
        }
        self.chunks[index].insert(at, id, tag);
    }

    /// Takes the child `id` of this name out; `false` if it is not there.
    pub fn remove<'a>(&mut self, name: &[u8], id: u64, name_of: impl Fn(u64) -> &'a [u8]) -> bool {
        if self.chunks.is_empty() {
            return false;
        }
        let index = self.chunk_of(name, &name_of);
        let chunk = &mut self.chunks[index];
        let Some(at) = chunk.ids.iter().position(|other| *other == id) else { return false };
        chunk.ids.remove(at);
        chunk.tags.remove(at);
        if chunk.ids.is_empty() {
            self.chunks.remove(index);
        }
        self.len -= 1;
        true
    }

    /// Takes any child out (the last), for freeing a tree.
    pub fn pop(&mut self) -> Option<u64> {
        let chunk = self.chunks.last_mut()?;
        let id = chunk.ids.pop();
        chunk.tags.pop();
        if chunk.ids.is_empty() {
            self.chunks.pop();
        }
        self.len -= 1;
        id
    }

    /// Children after `name` in order of name, and how many come before the first of them.
    pub fn after<'a>(&self, name: &[u8], name_of: impl Fn(u64) -> &'a [u8]) -> (usize, After<'_>) {
        let (mut index, mut at) = (0, 0);
        if !name.is_empty() && !self.chunks.is_empty() {
            index = self.chunk_of(name, &name_of);
            at = self.chunks[index].ids.partition_point(|other| name_of(*other) <= name);
        }
        let before = self.chunks[..index].iter().map(|chunk| chunk.ids.len()).sum::<usize>() + at;
        (before, After { chunks: &self.chunks[index..], at })
    }

    /// Builds from ids that are sorted by name.
    pub fn from_sorted<'a>(ids: &[u64], name_of: impl Fn(u64) -> &'a [u8]) -> Self {
        let chunks = ids
            .chunks(CHUNK)
            .map(|part| Chunk { ids: part.to_vec(), tags: part.iter().map(|id| tag_of(name_of(*id))).collect() })
            .collect();
        Self { chunks, len: ids.len() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::codec::Random;
    use std::collections::BTreeMap;

    #[test]
    fn agrees_with_a_sorted_map() {
        let names: Vec<String> = (0..4_000u64).map(|n| format!("n{}", Random::new(n).next() % 100_000)).collect();
        let name_of = |id: u64| names[id as usize].as_bytes();
        let mut model = BTreeMap::new();
        let mut children = Children::default();
        let mut random = Random::new(7);
        for _ in 0..20_000 {
            let id = random.below(4_000);
            let name = name_of(id);
            match children.get(name, name_of) {
                Some(found) => {
                    assert_eq!(model.get(name), Some(&found));
                    assert!(children.remove(name, found, name_of));
                    model.remove(name);
                }
                None => {
                    assert!(!model.contains_key(name));
                    children.insert(name, id, name_of);
                    model.insert(name.to_vec(), id);
                }
            }
        }
        assert_eq!(children.len(), model.len());
        let (before, ids) = children.after(b"n5", name_of);
        assert_eq!(before, model.range(..b"n5".to_vec()).count());
        assert_eq!(ids.collect::<Vec<_>>(), model.range(b"n5".to_vec()..).map(|(_, id)| *id).collect::<Vec<_>>());
        let sorted: Vec<u64> = model.values().copied().collect();
        assert_eq!(Children::from_sorted(&sorted, name_of).after(b"", name_of).1.collect::<Vec<_>>(), sorted);
        while let Some(id) = children.pop() {
            assert_eq!(model.pop_last().map(|(_, id)| id), Some(id));
        }
        assert!(children.is_empty() && model.is_empty());
    }
}

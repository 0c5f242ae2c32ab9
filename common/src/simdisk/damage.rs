//! What else befalls a disk: flipped bits, a size that changes; and a look at what is there.

use std::path::{Path, PathBuf};

use super::names::{Entry, Node, ROOT};
use super::{SimDisk, State};

impl SimDisk {
    /// Flips bits of the byte at `offset`, on the platter and in the cache. False if there is no such byte.
    pub fn flip(&self, path: &Path, offset: u64, bits: u8) -> bool {
        let mut state = self.state();
        let content = &mut state.content;
        let Some(Entry::File(file)) = content.names.find(path) else { return false };
        content.files.get_mut(&file).is_some_and(|inode| inode.bytes.flip(offset as usize, bits))
    }

    /// Changes the size of the disk; less than what is used makes it full.
    pub fn resize(&self, capacity: u64) {
        self.state().capacity = capacity;
    }

    /// Every file with its bytes as a process would read them, in the order of the paths.
    pub fn files(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let state = self.state();
        let mut files = Vec::new();
        gather(&state, ROOT, Path::new("/"), &mut files);
        files
    }
}

fn gather(state: &State, folder: Node, path: &Path, files: &mut Vec<(PathBuf, Vec<u8>)>) {
    for (name, entry) in state.content.names.children(folder) {
        let path = path.join(name);
        match entry {
            Entry::Folder(folder) => gather(state, folder, &path, files),
            Entry::File(file) => {
                let bytes = state.content.files.get(&file).map(|inode| inode.bytes.all()).unwrap_or_default();
                files.push((path, bytes));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::durable::{Fs, OpenMode};
    use crate::entropy::Entropy;

    #[test]
    fn a_flipped_bit_stays_flipped_and_nothing_else_changes() {
        let disk = SimDisk::new(1 << 20, Entropy::seeded(1));
        disk.create_dir_all(Path::new("/d")).unwrap();
        disk.sync_dir(Path::new("/")).unwrap();
        let path = Path::new("/d/x");
        let file = disk.open(path, OpenMode::Create).unwrap();
        file.write_all_at(b"abc", 0).unwrap();
        file.sync_data().unwrap();
        disk.sync_dir(Path::new("/d")).unwrap();
        assert!(disk.flip(path, 1, 1) && !disk.flip(path, 3, 1) && !disk.flip(Path::new("/y"), 0, 1));
        assert_eq!(disk.files(), [(path.to_owned(), b"acc".to_vec())]);
        disk.crash();
        assert_eq!(disk.files(), [(path.to_owned(), b"acc".to_vec())]);
    }
}

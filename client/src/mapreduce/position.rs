//! Where a map is in its input, noted where the death of the process does not reach it.

use std::fs::File;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use cairn_proto::pb;
use cairn_proto::position::{AT_RECORD, FILE_BYTES, IN_BATCH};
use rustix::mm::{MapFlags, ProtFlags};

/// State, offset, ordinal: see [`cairn_proto::position`].
type Cells = [AtomicU64; 3];

/// Takes notes of the position; plain stores into memory that a file backs, so that a note per record costs next to nothing.
#[derive(Default)]
pub struct PositionNote {
    mapped: Option<Mapped>,
    /// Where there is no file.
    own: Cells,
}

struct Mapped {
    page: NonNull<Cells>,
}

// SAFETY: it is a reference to atomics, valid until it is dropped.
unsafe impl Send for Mapped {}
// SAFETY: the same.
unsafe impl Sync for Mapped {}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: mapped with this length, and nothing refers to it any more.
        let unmapped = unsafe { rustix::mm::munmap(self.page.as_ptr().cast(), FILE_BYTES) };
        debug_assert!(unmapped.is_ok());
    }
}

impl PositionNote {
    /// Notes go to `file`, which has [`FILE_BYTES`].
    pub fn in_file(file: &File) -> std::io::Result<Self> {
        // SAFETY: a new mapping, of a file that has that length and that nobody shortens: it lies in the attempt's own folder.
        let page = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                FILE_BYTES,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                file,
                0,
            )?
        };
        let page = NonNull::new(page.cast()).ok_or_else(|| std::io::Error::other("nothing was mapped"))?;
        Ok(Self { mapped: Some(Mapped { page }), own: Cells::default() })
    }

    #[inline]
    fn cells(&self) -> &Cells {
        match &self.mapped {
            // SAFETY: mapped as long as `self` lives; a page is aligned for anything.
            Some(mapped) => unsafe { mapped.page.as_ref() },
            None => &self.own,
        }
    }

    #[inline]
    fn note(&self, state: u64, offset: u64, ordinal: u64) {
        let [to_state, to_offset, to_ordinal] = self.cells();
        to_offset.store(offset, Ordering::Relaxed);
        to_ordinal.store(ordinal, Ordering::Relaxed);
        to_state.store(state, Ordering::Relaxed);
    }

    /// The record that starts at `offset`, the split's record number `ordinal`, is mapped next.
    #[inline]
    pub fn at_record(&self, offset: u64, ordinal: u64) {
        self.note(AT_RECORD, offset, ordinal);
    }

    /// The records from `offset`, the first of which is number `ordinal`, are mapped next.
    pub fn in_batch(&self, offset: u64, ordinal: u64) {
        self.note(IN_BATCH, offset, ordinal);
    }

    /// Number of the record (or of the first of the batch) noted last.
    pub fn ordinal(&self) -> u64 {
        self.cells()[2].load(Ordering::Relaxed)
    }

    /// What was noted last, if anything was.
    pub fn position(&self, path: &str) -> Option<pb::RecordPosition> {
        let [state, offset, ordinal] = self.cells().each_ref().map(|cell| cell.load(Ordering::Relaxed));
        let known = state == AT_RECORD || state == IN_BATCH;
        known.then(|| pb::RecordPosition { path: path.to_owned(), offset, ordinal, exact: state == AT_RECORD })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_proto::position;
    use std::io::Read as _;

    #[test]
    fn notes_are_in_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("position");
        #[allow(clippy::disallowed_methods)] // a test's own file
        std::fs::write(&path, position::encode("/f")).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let note = PositionNote::in_file(&file).unwrap();
        assert_eq!(note.position("/f"), None);
        note.in_batch(100, 7);
        note.at_record(123, 9);
        let mut bytes = Vec::new();
        File::open(&path).unwrap().read_to_end(&mut bytes).unwrap();
        assert_eq!(position::decode(&bytes), note.position("/f"));
        assert_eq!(
            note.position("/f").unwrap(),
            pb::RecordPosition { path: "/f".into(), offset: 123, ordinal: 9, exact: true }
        );
        let without = PositionNote::default();
        without.in_batch(1, 2);
        assert_eq!((without.ordinal(), without.position("").unwrap().exact), (2, false));
    }
}

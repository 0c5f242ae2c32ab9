//! Listing: pages of one directory, and everything below it.

use std::collections::VecDeque;

use bytes::Bytes;
use cairn_proto::path::split_last;
use cairn_proto::{ErrorCode, Result, pb};

use super::namespace::MANY_BLOCKS;
use super::{FileKind, FileStatus, FileSystem};

/// Pages of a directory; see [`FileSystem::list`]. An entry that is made or removed meanwhile may or may not be seen; all others are seen
/// exactly once.
pub struct ListPages {
    fs: FileSystem,
    path: String,
    with_locations: bool,
    start_after: Bytes,
    done: bool,
}

impl ListPages {
    pub(super) fn new(fs: FileSystem, path: String, with_locations: bool) -> Self {
        Self { fs, path, with_locations, start_after: Bytes::new(), done: false }
    }

    /// The next page (at most 1,000 entries); `None` after the last. The first page of an empty directory is empty.
    pub async fn next(&mut self) -> Result<Option<Vec<FileStatus>>> {
        if self.done {
            return Ok(None);
        }
        let request = pb::ListRequest {
            path: self.path.clone(),
            start_after: self.start_after.clone(),
            limit: 0,
            with_locations: self.with_locations,
        };
        let mut page = self.fs.list_page(request).await?;
        for entry in page.entries.iter_mut().filter(|entry| entry.blocks.len() >= MANY_BLOCKS) {
            // Of a file with very many blocks a page names only the first ones.
            match self.fs.block_locations(&entry.path, 0, 0).await {
                Ok(blocks) => entry.blocks = blocks,
                Err(error) if error.code() == ErrorCode::FileNotFound => {}
                Err(error) => return Err(error),
            }
        }
        let last = page.entries.last().and_then(|entry| split_last(&entry.path)).map(|(_, name)| name);
        match last {
            Some(name) if page.remaining > 0 => self.start_after = Bytes::copy_from_slice(name.as_bytes()),
            _ => self.done = true,
        }
        Ok(Some(page.entries))
    }
}

/// Everything below a directory; see [`FileSystem::walk`]. Holds one page per level of depth.
pub struct Walk {
    fs: FileSystem,
    root: Option<FileStatus>,
    levels: Vec<Level>,
}

struct Level {
    pages: ListPages,
    entries: VecDeque<FileStatus>,
}

impl Walk {
    pub(super) fn new(fs: FileSystem, root: FileStatus) -> Self {
        Self { fs, root: Some(root), levels: Vec::new() }
    }

    /// The next file or directory; `None` after the last. A directory that is removed meanwhile is passed over.
    pub async fn next(&mut self) -> Result<Option<FileStatus>> {
        if let Some(root) = self.root.take() {
            return self.visit(root).map(Some);
        }
        while let Some(level) = self.levels.last_mut() {
            if let Some(entry) = level.entries.pop_front() {
                return self.visit(entry).map(Some);
            }
            match level.pages.next().await {
                Ok(Some(page)) => level.entries = page.into(),
                Ok(None) => drop(self.levels.pop()),
                Err(error) if error.code() == super::ErrorCode::FileNotFound && self.levels.len() > 1 => {
                    self.levels.pop();
                }
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    fn visit(&mut self, entry: FileStatus) -> Result<FileStatus> {
        if entry.kind() == FileKind::Directory {
            let pages = self.fs.list(&entry.path)?;
            self.levels.push(Level { pages, entries: VecDeque::new() });
        }
        Ok(entry)
    }
}

//! What was promised: each file of the load and what may be found of it.

use std::collections::BTreeMap;

use super::content::Content;

/// What the cluster has said about a file.
///
/// ```text
///  Pending --closed--> Acked --delete--> Leaving --answered--> Gone
///     |  `----append-----'|  `--rename--> Moving --answered--> Acked (other name)
///     `--failed--> Cut --delete--> Leaving
/// ```
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Fate {
    /// Being written: absent, or a beginning that holds what was promised.
    Pending,
    /// Closed: there, whole.
    Acked,
    /// Its write failed: absent, or a beginning that holds what was promised.
    Cut,
    /// A rename is under way or got no answer: under exactly one of the two names.
    Moving {
        /// The new name.
        to: String,
    },
    /// A deletion is under way or got no answer: whole (a beginning, if it never was whole) or absent.
    Leaving,
    /// Deleted: absent.
    Gone,
}

/// A file and what is known of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry {
    /// What it must hold.
    pub content: Content,
    /// What was answered.
    pub fate: Fate,
    /// The first so many bytes were flushed or synced: whatever is found must hold them.
    pub promised: u64,
    /// It is closed with all of its content.
    pub whole: bool,
    /// It was closed, flushed or synced once, however short it was: it must be there.
    pub there: bool,
    /// Readers that are at it: it is neither renamed nor deleted meanwhile.
    pins: u32,
}

/// All files of a load.
#[derive(Default, Debug)]
pub struct Ledger {
    entries: BTreeMap<String, Entry>,
}

impl Ledger {
    /// A file is about to be written.
    pub fn begin(&mut self, path: &str, content: Content) {
        let entry = Entry { content, fate: Fate::Pending, promised: 0, whole: false, there: false, pins: 0 };
        self.entries.insert(path.to_owned(), entry);
    }

    /// The first bytes of a file were flushed or synced.
    pub fn promise(&mut self, path: &str, bytes: u64) {
        if let Some(entry) = self.entries.get_mut(path) {
            entry.promised = entry.promised.max(bytes);
            entry.there = true;
        }
    }

    /// Notes what was answered.
    pub fn set(&mut self, path: &str, fate: Fate) {
        if let Some(entry) = self.entries.get_mut(path) {
            if fate == Fate::Acked {
                (entry.whole, entry.there) = (true, true);
                entry.promised = entry.content.length;
            }
            // A call of a write that failed may still be on its way and make the name once more.
            entry.fate = if fate == Fate::Gone && !entry.whole { Fate::Leaving } else { fate };
        }
    }

    /// What is known of a file.
    pub fn get(&self, path: &str) -> Option<Entry> {
        self.entries.get(path).cloned()
    }

    /// A rename was answered.
    pub fn moved(&mut self, from: &str, to: &str) {
        if let Some(mut entry) = self.entries.remove(from) {
            let gone = Entry { fate: Fate::Gone, ..entry.clone() };
            self.entries.insert(from.to_owned(), gone);
            entry.fate = Fate::Acked;
            self.entries.insert(to.to_owned(), entry);
        }
    }

    /// A closed file for a reader; give it back with [`Ledger::unpin`].
    pub fn pin(&mut self, choose: impl FnOnce(u64) -> u64) -> Option<(String, Entry)> {
        let mut acked: Vec<(&String, &mut Entry)> =
            self.entries.iter_mut().filter(|(_, entry)| entry.fate == Fate::Acked).collect();
        let at = choose(acked.len() as u64) as usize;
        let (path, entry) = acked.get_mut(at)?;
        entry.pins += 1;
        Some(((*path).clone(), entry.clone()))
    }

    /// A reader is done with it.
    pub fn unpin(&mut self, path: &str) {
        if let Some(entry) = self.entries.get_mut(path) {
            entry.pins = entry.pins.saturating_sub(1);
        }
    }

    /// Takes a closed file below `prefix` that nobody reads, to rename or delete it: its fate becomes the one given for its path.
    pub fn take(
        &mut self,
        prefix: &str,
        choose: impl FnOnce(u64) -> u64,
        fate: impl FnOnce(&str) -> Fate,
    ) -> Option<String> {
        let free = |path: &str, entry: &Entry| path.starts_with(prefix) && entry.fate == Fate::Acked && entry.pins == 0;
        let mut free: Vec<(&String, &mut Entry)> =
            self.entries.iter_mut().filter(|(path, entry)| free(path, entry)).collect();
        let at = choose(free.len() as u64) as usize;
        let (path, entry) = free.get_mut(at)?;
        entry.fate = fate(path);
        Some((*path).clone())
    }

    /// Takes a closed file below `prefix` that nobody reads, to append so many bytes: until that is answered it may hold any part of them.
    /// Returns what it shall hold, and what it holds.
    pub fn grow(&mut self, prefix: &str, choose: impl FnOnce(u64) -> u64, more: u64) -> Option<(String, Content, u64)> {
        let path = self.take(prefix, choose, |_| Fate::Pending)?;
        let entry = self.entries.get_mut(&path)?;
        let before = entry.content.length;
        entry.content.length += more;
        entry.whole = false;
        Some((path, entry.content, before))
    }

    /// Closed files below `prefix`.
    pub fn acked_below(&self, prefix: &str) -> usize {
        self.entries.iter().filter(|(path, entry)| path.starts_with(prefix) && entry.fate == Fate::Acked).count()
    }

    /// All of it.
    pub fn entries(&self) -> Vec<(String, Entry)> {
        self.entries.iter().map(|(path, entry)| (path.clone(), entry.clone())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pinned_files_are_left_alone_and_renames_leave_a_gap() {
        let mut ledger = Ledger::default();
        ledger.begin("/a/1", Content { seed: 1, length: 10 });
        assert!(ledger.pin(|_| 0).is_none(), "it is not closed yet");
        ledger.set("/a/1", Fate::Acked);
        let (path, entry) = ledger.pin(|_| 0).unwrap();
        assert_eq!((path.as_str(), entry.promised), ("/a/1", 10));
        assert!(ledger.take("/a/", |_| 0, |_| Fate::Leaving).is_none());
        ledger.unpin(&path);
        assert!(ledger.take("/b/", |_| 0, |_| Fate::Leaving).is_none());
        let (grown, content, before) = ledger.grow("/a/", |_| 0, 5).unwrap();
        assert_eq!((grown.as_str(), content.length, before), ("/a/1", 15, 10));
        let entry = ledger.get("/a/1").unwrap();
        assert!(!entry.whole && entry.there && entry.promised == 10 && entry.fate == Fate::Pending);
        ledger.set("/a/1", Fate::Acked);
        assert_eq!(ledger.get("/a/1").map(|entry| entry.promised), Some(15));
        let taken = ledger.take("/a/", |_| 0, |path| Fate::Moving { to: format!("{path}x") }).unwrap();
        ledger.moved(&taken, "/a/1x");
        let fates: Vec<(String, Fate)> = ledger.entries().into_iter().map(|(path, entry)| (path, entry.fate)).collect();
        assert_eq!(fates, [("/a/1".into(), Fate::Gone), ("/a/1x".into(), Fate::Acked)]);
    }
}

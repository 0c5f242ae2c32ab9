//! What jobs keep on this node for the jobs after them: content of files that several of them read, or that one writes and the next reads.
//!
//! Workers fill and read it ([`cairn_proto::kept`]); here is only where it lies and for how long. Jobs of one user that name the same
//! (`JobDescription.keep`) have a folder `<root>/.kept/<number>/`. It goes when it is released, or when no such job has been here for [`UNUSED_MS`].

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use cairn_common::durable::Fs;
use cairn_proto::kept::{KeptName, aside_prefix};
use cairn_proto::{Error, ErrorCode, Result, pb};

use super::account::Account;

/// Folder of all that is kept, beside those of jobs: no job has a name that starts with a dot.
pub const KEPT: &str = ".kept";
/// A folder that no job uses goes after this. Longer: memory and disk are taken for longer after a driver that died; shorter: what a driver with
/// pauses between its jobs has kept is read again.
const UNUSED_MS: u64 = 120_000;
/// Parts that a driver is told of, at most: what it does not know of is found all the same where it happens to run.
const MAX_TOLD: usize = 10_000;

/// Whose it is, and its name.
type Key = (String, String);

/// The folders.
#[derive(Default)]
pub struct Kept {
    folders: BTreeMap<Key, Folder>,
    next: u64,
}

struct Folder {
    dir: PathBuf,
    used_ms: u64,
}

impl Kept {
    /// The folder for `user`'s jobs that name `keep`, which is to be made if it is new.
    pub fn folder(&mut self, root: &Path, user: &str, keep: &str, now_ms: u64) -> PathBuf {
        let next = &mut self.next;
        let folder = self.folders.entry((user.to_owned(), keep.to_owned())).or_insert_with(|| {
            *next += 1;
            Folder { dir: root.join(KEPT).join(next.to_string()), used_ms: now_ms }
        });
        folder.used_ms = now_ms;
        folder.dir.clone()
    }

    /// The folder, if there is one.
    pub fn find(&self, user: &str, keep: &str) -> Option<&Path> {
        self.folders.get(&(user.to_owned(), keep.to_owned())).map(|folder| &*folder.dir)
    }

    /// Nothing is kept for anybody.
    pub fn is_empty(&self) -> bool {
        self.folders.is_empty()
    }

    /// Forgets a folder, which is to be removed.
    pub fn release(&mut self, user: &str, keep: &str) -> Option<PathBuf> {
        self.folders.remove(&(user.to_owned(), keep.to_owned())).map(|folder| folder.dir)
    }

    /// Forgets those that no job has used for long enough; `in_use`: a job of that user that names it is here.
    pub fn expire(&mut self, now_ms: u64, in_use: impl Fn(&str, &str) -> bool) -> Vec<PathBuf> {
        let mut over = Vec::new();
        self.folders.retain(|(user, keep), folder| {
            if in_use(user, keep) {
                folder.used_ms = now_ms;
            }
            let stays = now_ms.saturating_sub(folder.used_ms) <= UNUSED_MS;
            if !stays {
                over.push(folder.dir.clone());
            }
            stays
        });
        over
    }
}

/// Makes a folder that is not there yet, for the user as whom tasks run.
pub fn make(fs: &dyn Fs, dir: &Path, account: Option<Account>) -> std::io::Result<()> {
    if fs.metadata(dir)?.is_some() {
        return Ok(());
    }
    fs.create_dir_all(dir)?;
    fs.restrict(dir)?;
    account.map_or(Ok(()), |account| account.give(dir))
}

/// Removes what a worker that is gone was writing.
pub fn remove_aside(fs: &dyn Fs, dir: &Path, pid: u32) {
    let prefix = aside_prefix(pid);
    for entry in fs.read_dir(dir).unwrap_or_default() {
        if entry.name.starts_with(&prefix) {
            // Else it goes with the folder.
            let _ = fs.remove_file(&dir.join(&entry.name));
        }
    }
}

/// What a folder holds.
pub fn list(fs: &dyn Fs, dir: &Path) -> Vec<pb::KeptContent> {
    // One that cannot be read helps nobody.
    let entries = fs.read_dir(dir).unwrap_or_default();
    let names = entries.iter().filter_map(|entry| KeptName::parse(&entry.name));
    let content = |name: KeptName| pb::KeptContent { inode: name.inode, offset: name.start, length: name.bytes };
    names.map(content).take(MAX_TOLD).collect()
}

/// 1 to 64 plain characters, or nothing.
pub fn check_name(keep: &str) -> Result<()> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    if keep.len() <= 64 && keep.bytes().all(plain) {
        return Ok(());
    }
    let text = format!("{keep:?} cannot be the name of what jobs keep: use at most 64 letters, digits, '-' and '_'");
    Err(Error::new(ErrorCode::InvalidArgument, text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_do_not_share_and_what_is_unused_goes() {
        let (mut kept, root) = (Kept::default(), Path::new("/jobs"));
        let anns = kept.folder(root, "ann", "g", 0);
        let bobs = kept.folder(root, "bob", "g", 0);
        assert_ne!(anns, bobs);
        assert_eq!(kept.folder(root, "ann", "g", 5), anns);
        assert_eq!(kept.find("ann", "g"), Some(&*anns));
        assert!(kept.expire(UNUSED_MS, |_, _| false).is_empty());
        assert_eq!(kept.expire(UNUSED_MS + 1, |user, _| user == "ann"), [bobs]);
        assert_eq!(kept.expire(2 * UNUSED_MS + 1, |_, _| false), [] as [PathBuf; 0], "it was in use");
        assert_eq!(kept.release("ann", "g"), Some(anns.clone()));
        assert!(kept.is_empty() && kept.release("ann", "g").is_none());
        assert_ne!(kept.folder(root, "ann", "g", 0), anns, "the removal of the old one may be under way");
    }

    #[test]
    fn names_are_plain() {
        assert!(check_name("").is_ok() && check_name("nightly_7-a").is_ok());
        assert!(check_name("a/b").is_err() && check_name("..").is_err() && check_name(&"x".repeat(65)).is_err());
    }
}

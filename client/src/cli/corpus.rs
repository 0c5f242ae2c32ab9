//! A real text for the demo: what this machine has installed.
//!
//! Deterministic: the folders in a fixed order, each walked by name, so two runs on one machine count the same words.

use std::path::{Path, PathBuf};

use crate::output::{Outcome, failure};
use cairn_client::fs::ErrorCode;

/// Files of these kinds are text.
const KINDS: [&str; 14] = ["txt", "md", "rst", "rs", "py", "pl", "pm", "pod", "h", "c", "hpp", "go", "tex", "texi"];
/// Folders of installed things, the most likely ones first.
const FOLDERS: [&str; 9] = [
    "/usr/share/doc",
    "/usr/share/common-licenses",
    "/usr/share/perl",
    "/usr/lib/python3",
    "/usr/lib/python3.11",
    "/usr/lib/python3.12",
    "/usr/lib/python3.13",
    "/usr/include",
    "/usr/local/go/src",
];
/// The same below the home folder.
const HOME_FOLDERS: [&str; 3] = [".cargo/registry/src", ".rustup/toolchains", ".pyenv/versions"];
/// A larger file is data rather than text.
const LARGEST: u64 = 8 << 20;

/// Names of files, until they hold `bytes`; an error if there are not so many.
pub fn find(bytes: u64) -> Outcome<Vec<PathBuf>> {
    let mut folders: Vec<PathBuf> = FOLDERS.iter().map(PathBuf::from).collect();
    if let Some(cargo) = std::env::var_os("CARGO_HOME") {
        folders.push(Path::new(&cargo).join("registry/src"));
    }
    if let Some(home) = std::env::var_os("HOME") {
        folders.extend(HOME_FOLDERS.iter().map(|folder| Path::new(&home).join(folder)));
    }
    find_in(&folders, bytes)
}

fn find_in(folders: &[PathBuf], bytes: u64) -> Outcome<Vec<PathBuf>> {
    // Some files turn out to be no text; a tenth more makes up for them.
    let wanted = bytes.saturating_add(bytes / 10);
    let (mut files, mut found) = (Vec::new(), 0);
    for folder in folders {
        walk(folder, wanted, &mut files, &mut found);
        if found >= wanted {
            return Ok(files);
        }
    }
    let text = format!(
        "the demo stores {} MB of text and found {} MB on this machine: choose less with --size",
        bytes / 1_000_000,
        found / 1_000_000
    );
    Err(failure(ErrorCode::FileNotFound, text))
}

/// What cannot be read is passed over: there is enough elsewhere.
fn walk(folder: &Path, wanted: u64, files: &mut Vec<PathBuf>, found: &mut u64) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    let mut entries: Vec<_> = entries.flatten().collect();
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        if *found >= wanted {
            return;
        }
        // Of the entry itself: links are not followed, so nothing is counted twice.
        let Ok(metadata) = entry.metadata() else { continue };
        let path = entry.path();
        if metadata.is_dir() {
            walk(&path, wanted, files, found);
        } else if metadata.is_file() && is_text_name(&path) && (1..=LARGEST).contains(&metadata.len()) {
            *found += metadata.len();
            files.push(path);
        }
    }
}

fn is_text_name(path: &Path) -> bool {
    let kind = path.extension().and_then(|kind| kind.to_str());
    kind.is_some_and(|kind| KINDS.contains(&kind.to_ascii_lowercase().as_str()))
}

/// The bytes of a file if it is text.
pub fn read(path: &Path) -> Option<Vec<u8>> {
    std::fs::read(path).ok().filter(|bytes| !bytes.contains(&0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn walks_by_name_and_takes_text_only() {
        let dir = tempfile::tempdir().unwrap();
        let env = cairn_common::Env::system();
        std::fs::create_dir(dir.path().join("b")).unwrap();
        for name in ["c.txt", "a.md", "b/x.rs", "b/y.bin", "empty.txt"] {
            let bytes: &[u8] = if name == "empty.txt" { b"" } else { b"12345" };
            cairn_common::durable::write_atomic(&*env.fs, &dir.path().join(name), bytes).unwrap();
        }
        let (mut files, mut found) = (Vec::new(), 0);
        walk(dir.path(), 1_000, &mut files, &mut found);
        let names: Vec<_> = files.iter().map(|file| file.strip_prefix(dir.path()).unwrap().to_str().unwrap()).collect();
        assert_eq!((names, found), (vec!["a.md", "b/x.rs", "c.txt"], 15));
        let (mut files, mut found) = (Vec::new(), 0);
        walk(dir.path(), 6, &mut files, &mut found);
        assert_eq!(files.len(), 2, "no more than it takes");
    }

    #[test]
    fn too_little_text_is_an_error_with_the_way_out() {
        let dir = tempfile::tempdir().unwrap();
        let Err(crate::output::Failure::Error(error)) = find_in(&[dir.path().to_owned()], 1_000_000) else { panic!() };
        assert!(error.message().contains("--size"), "{error}");
    }
}

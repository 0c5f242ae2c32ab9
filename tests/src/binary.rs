//! Where the `cairn` binary is.
//!
//! Tests are another package than the binary, so cargo does not tell them: it lies beside the test's own folder
//! (`target/<profile>/cairn`). It is built once if it is absent or older than the sources. `CAIRN_BIN` names another one.

use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::SystemTime;

/// The binary; builds it if it has to.
pub fn cairn() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| match std::env::var_os("CAIRN_BIN") {
        Some(path) => PathBuf::from(path),
        None => find_or_build(),
    })
}

/// Root of the workspace.
pub fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the workspace")
}

fn find_or_build() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let profile_dir = test.parent().and_then(Path::parent).expect("a test lies in target/<profile>/deps").to_owned();
    let binary = profile_dir.join("cairn");
    // The time of the last build that was asked for here: cargo leaves the binary alone when nothing that it depends on changed.
    let stamp = profile_dir.join(".cairn-tests-built");
    let fresh = |stamp: &Path| {
        let built = std::fs::metadata(stamp).and_then(|metadata| metadata.modified());
        binary.exists() && built.is_ok_and(|built| built > newest_source())
    };
    if fresh(&stamp) {
        return binary;
    }
    let lock = std::fs::File::create(profile_dir.join(".cairn-tests-lock")).unwrap();
    // SAFETY: the descriptor is open for the whole call.
    assert_eq!(unsafe { libc::flock(lock.as_raw_fd(), libc::LOCK_EX) }, 0, "lock for building");
    if !fresh(&stamp) {
        let started = SystemTime::now();
        build(&profile_dir);
        let file = std::fs::File::create(&stamp).unwrap();
        file.set_modified(started).unwrap();
    }
    binary
}

fn build(profile_dir: &Path) {
    let profile = match profile_dir.file_name().and_then(|name| name.to_str()) {
        Some("debug") | None => "dev",
        Some(other) => other,
    };
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let done = Command::new(cargo)
        .args(["build", "--quiet", "-p", "cairn-client", "--bin", "cairn", "--profile", profile, "--target-dir"])
        .arg(profile_dir.parent().expect("target folder"))
        .current_dir(workspace())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(done.status.success(), "cargo build of cairn failed:\n{}", String::from_utf8_lossy(&done.stderr));
}

fn newest_source() -> SystemTime {
    let mut newest = SystemTime::UNIX_EPOCH;
    let mut folders = Vec::new();
    for room in ["proto", "common", "namenode", "datanode", "client"] {
        for part in ["src", "proto", "Cargo.toml", "build.rs"] {
            folders.push(workspace().join(room).join(part));
        }
    }
    folders.push(workspace().join("Cargo.lock"));
    while let Some(path) = folders.pop() {
        let Ok(metadata) = std::fs::metadata(&path) else { continue };
        if metadata.is_dir() {
            folders.extend(std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        } else if let Ok(modified) = metadata.modified() {
            newest = newest.max(modified);
        }
    }
    newest
}

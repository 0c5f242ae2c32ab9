//! Compares the folders of finalized replicas with the replica map: files that vanished are given up, files that nobody knows are taken in, and
//! files of another size than noted are checked.
//!
//! A listing is old as soon as it is there: each difference is looked at again under a claim before anything follows from it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use cairn_common::durable::DirEntry;
use cairn_proto::blockfile;
use cairn_proto::ids::{BlockId, Generation};

use crate::store::BlockStore;
use crate::store::map::{Entry, Kind};
use crate::store::scan;
use crate::transfer::Transfer;

/// Replicas taken from the map at once.
const PAGE: usize = 4_096;

/// Compares all volumes, folder by folder.
pub(super) async fn compare(transfer: &Arc<Transfer>) {
    for volume in 0..transfer.store.volumes().len() {
        compare_volume(transfer, volume).await;
    }
    transfer.scrub.folders_compared.fetch_add(1, Ordering::Relaxed);
}

async fn compare_volume(transfer: &Arc<Transfer>, volume: usize) {
    let store = &transfer.store;
    let Ok(root) = store.volume(volume).pool_root().map(|root| root.join("finalized")) else { return };
    let stop = transfer.stop_signal();
    let mut known = known_by_folder(store, volume);
    for outer in list(store, volume, &root).await.into_iter().filter(|entry| entry.is_dir) {
        let outer = root.join(outer.name);
        for inner in list(store, volume, &outer).await.into_iter().filter(|entry| entry.is_dir) {
            if *stop.borrow() || store.volume(volume).is_failed() {
                return;
            }
            let folder = outer.join(inner.name);
            let files = list(store, volume, &folder).await;
            let expected = known.remove(&folder).unwrap_or_default();
            compare_folder(transfer, volume, &folder, files, expected).await;
        }
    }
    // Folders that are not there at all.
    for (folder, expected) in known {
        compare_folder(transfer, volume, &folder, Vec::new(), expected).await;
    }
}

type Expected = BTreeMap<String, (BlockId, Generation, u64)>;

/// Names of the finalized files that should be there, by folder.
fn known_by_folder(store: &BlockStore, volume: usize) -> BTreeMap<PathBuf, Expected> {
    let mut known: BTreeMap<PathBuf, Expected> = BTreeMap::new();
    let mut after = None;
    loop {
        let page = store.map().finalized(volume, after, PAGE);
        let Some((last, _)) = page.last() else { return known };
        after = Some(last.0);
        for (block, entry) in page {
            let Kind::Finalized { length, stored } = entry.kind else { continue };
            let Ok(path) = store.volume(volume).finalized_path(block, entry.generation, length) else { continue };
            let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else { continue };
            let expected = known.entry(folder.to_owned()).or_default();
            expected.insert(name.to_string_lossy().into_owned(), (block, entry.generation, stored));
        }
    }
}

async fn list(store: &Arc<BlockStore>, volume: usize, folder: &Path) -> Vec<DirEntry> {
    let (lister, at) = (Arc::clone(store), folder.to_owned());
    match store.env().work.io(move || lister.env().fs.read_dir(&at)).await {
        Ok(entries) => entries,
        Err(error) => {
            if error.kind() != std::io::ErrorKind::NotFound {
                let told = store.volume(volume).read_failed(format!("listing {}", folder.display()), &error);
                tracing::warn!("{told}");
            }
            Vec::new()
        }
    }
}

async fn compare_folder(
    transfer: &Arc<Transfer>,
    volume: usize,
    folder: &Path,
    files: Vec<DirEntry>,
    mut expected: Expected,
) {
    let store = &transfer.store;
    for file in files.into_iter().filter(|file| !file.is_dir) {
        match expected.remove(&file.name) {
            Some((_, _, stored)) if stored == file.len => {}
            Some((block, ..)) => store.suspect(block),
            None => {
                let path = folder.join(&file.name);
                let took = take_in(store, volume, path.clone(), file).await;
                if took {
                    transfer.scrub.files_unknown.fetch_add(1, Ordering::Relaxed);
                    tracing::warn!("{} was not known; it is served from now on", path.display());
                }
            }
        }
    }
    for (name, (block, generation, _)) in expected {
        let path = folder.join(name);
        let checker = Arc::clone(store);
        let gone = store.env().work.io(move || checker.give_up_if_gone(block, generation, &path)).await;
        if gone {
            transfer.scrub.files_missing.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// A file that is not in the map: if it still is not, and its header, index and footer verify, it is a replica like any other. What a namenode does
/// not want of it, it has deleted.
async fn take_in(store: &Arc<BlockStore>, volume: usize, path: PathBuf, file: DirEntry) -> bool {
    let Some((block, generation, Some(length))) = blockfile::parse_name(&file.name) else { return false };
    if store.volume(volume).finalized_path(block, generation, length).ok().as_ref() != Some(&path) {
        return false;
    }
    // One that this node holds already, in whatever state, keeps its place.
    if store.map().claim_new(block, generation, volume, |_| false).is_err() {
        return false;
    }
    let taker = Arc::clone(store);
    store
        .env()
        .work
        .io(move || match scan::open_finalized(&*taker.env().fs, &path, block, length) {
            Ok(opened) => {
                let stored = opened.stored;
                taker.volume(volume).found(stored);
                let entry = Entry { generation, kind: Kind::Finalized { length, stored } };
                taker.map().settle(volume, block, entry, true);
                true
            }
            Err(error) => {
                tracing::warn!("{} is no replica that can be served: {error}", path.display());
                taker.map().forget(volume, block, generation, false);
                false
            }
        })
        .await
}

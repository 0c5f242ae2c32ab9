//! Images: round trip, every kind of damage, what is kept.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use cairn_common::durable::{Fs, OpenMode, SystemFs, read_all};
use cairn_proto::ids::{Epoch, TxId};

use super::format::{ImageHeader, image_name};
use super::*;
use crate::journal::{LogError, MetaDir, open_set};

const CLUSTER: &str = "11111111-2222-4333-8444-555555555555";

fn dirs(paths: &[PathBuf]) -> Vec<Arc<MetaDir>> {
    let set = open_set(&SystemFs, paths, false, &mut || "id".to_owned()).unwrap();
    let dirs: Vec<Arc<MetaDir>> = set.found.into_iter().map(|one| one.dir).collect();
    dirs.iter().for_each(|dir| dir.clear(&SystemFs).unwrap());
    dirs
}

fn header(txid: u64) -> ImageHeader {
    ImageHeader { txid: TxId(txid), epoch: Epoch(3), cluster_id: CLUSTER.into(), state_digest: 42 }
}

fn pages() -> Vec<Vec<u8>> {
    (0..5u8).map(|page| (0..300u32).map(|i| (i as u8).wrapping_mul(page)).collect()).collect()
}

fn write(dirs: &[Arc<MetaDir>], txid: u64) -> Result<Written, LogError> {
    let mut writer = ImageWriter::create(Arc::new(SystemFs), dirs, header(txid), 1)?;
    for page in pages() {
        writer.page(&page)?;
    }
    writer.finish()
}

fn read(path: &Path) -> Result<(Vec<Vec<u8>>, ImageFacts), LogError> {
    let mut seen = Vec::new();
    let facts = read_image(&SystemFs, path, CLUSTER, |page| {
        seen.push(page.to_vec());
        Ok(())
    })?;
    Ok((seen, facts))
}

#[test]
fn reads_back_in_every_directory() {
    let root = tempfile::tempdir().unwrap();
    let paths = [root.path().join("a"), root.path().join("b")];
    let written = write(&dirs(&paths), 7).unwrap();
    assert_eq!((written.txid, written.pages, written.purge), (TxId(7), 5, TxId(0)));
    for path in &paths {
        let (seen, facts) = read(&path.join("image").join(image_name(TxId(7)))).unwrap();
        assert_eq!(seen, pages());
        assert_eq!((facts.header, facts.bytes), (header(7), written.bytes));
        let names: Vec<String> =
            SystemFs.read_dir(&path.join("image")).unwrap().into_iter().map(|entry| entry.name).collect();
        assert_eq!(names, [image_name(TxId(7))], "nothing is left aside");
    }
}

#[test]
fn the_two_newest_are_kept_and_say_what_log_they_need() {
    let root = tempfile::tempdir().unwrap();
    let dirs = dirs(&[root.path().to_owned()]);
    let purged: Vec<TxId> = [5, 9, 12].iter().map(|&txid| write(&dirs, txid).unwrap().purge).collect();
    assert_eq!(purged, [TxId(0), TxId(5), TxId(9)]);
    let kept = list_images(&SystemFs, &dirs[0].image()).unwrap();
    assert_eq!(kept.iter().map(|image| image.txid).collect::<Vec<_>>(), [TxId(12), TxId(9)]);
}

#[test]
fn a_flipped_bit_or_a_lost_end_is_found_and_named() {
    let root = tempfile::tempdir().unwrap();
    let dirs = dirs(&[root.path().to_owned()]);
    write(&dirs, 7).unwrap();
    let path = dirs[0].image().join(image_name(TxId(7)));
    let whole = read_all(&SystemFs, &path, 1 << 20).unwrap();
    let put = |bytes: &[u8]| {
        let file = SystemFs.open(&path, OpenMode::Write).unwrap();
        file.set_len(0).unwrap();
        file.write_all_at(bytes, 0).unwrap();
    };
    for at in 0..whole.len() {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (at % 8);
        put(&bytes);
        let error = read(&path).err().unwrap_or_else(|| panic!("a flip at {at} went unseen"));
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
    }
    for length in 0..whole.len() {
        put(&whole[..length]);
        assert!(read(&path).is_err(), "cut to {length}");
    }
    let mut longer = whole.clone();
    longer.push(0);
    put(&longer);
    assert!(read(&path).is_err());
    put(&whole);
    assert!(read(&path).is_ok());
    assert!(matches!(read_image(&SystemFs, &path, "other", |_| Ok(())), Err(LogError::OtherCluster { .. })));
}

#[test]
fn an_image_that_was_given_up_leaves_nothing() {
    let root = tempfile::tempdir().unwrap();
    let dirs = dirs(&[root.path().to_owned()]);
    let mut writer = ImageWriter::create(Arc::new(SystemFs), &dirs, header(7), 1).unwrap();
    writer.page(b"page").unwrap();
    writer.abort();
    assert_eq!(SystemFs.read_dir(&dirs[0].image()).unwrap(), []);
    // One that a crash left is removed by the next.
    drop(ImageWriter::create(Arc::new(SystemFs), &dirs, header(8), 1).unwrap());
    assert_eq!(SystemFs.read_dir(&dirs[0].image()).unwrap().len(), 1);
    write(&dirs, 9).unwrap();
    assert_eq!(list_images(&SystemFs, &dirs[0].image()).unwrap().len(), 1);
    assert_eq!(SystemFs.read_dir(&dirs[0].image()).unwrap().len(), 1);
}

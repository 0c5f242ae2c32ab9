//! What a daemon finds on its disk when it starts: volumes, version files, settings.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use cairn_common::Env;
use cairn_common::durable::{Fs, OpenMode, write_atomic};
use cairn_common::entropy::Entropy;
use cairn_common::simdisk::SimDisk;
use cairn_common::work::Work;
use cairn_datanode::DatanodeSettings;
use cairn_datanode::store::BlockStore;
use cairn_datanode::store::map::Kind;
use cairn_datanode::store::version::Version;
use cairn_namenode::NamenodeSettings;
use cairn_proto::blockfile::{self, BlockIndex, HEADER_BYTES};
use cairn_proto::frame::Sealer;
use cairn_proto::ids::{BlockId, Generation};

use super::input::{Input, at_once};

const BLOCK: BlockId = BlockId(1_073_741_825);
const GENERATION: Generation = Generation(1_001);
const POOL: &str = "pool-1";

fn open(disk: &SimDisk) -> Arc<BlockStore> {
    let env = Env { fs: Arc::new(disk.clone()), work: Work::inline(), ..Env::system() };
    let settings =
        DatanodeSettings { dirs: vec![PathBuf::from("/v")], reserved_bytes: 0, ..DatanodeSettings::default() };
    at_once(async {
        let store = BlockStore::open(&env, &settings).await.unwrap();
        store.join_cluster("cluster-1", POOL, 1).await.unwrap();
        store
    })
}

fn put(disk: &SimDisk, path: &Path, bytes: &[u8]) {
    disk.create_dir_all(path.parent().unwrap()).unwrap();
    let file = disk.open(path, OpenMode::WriteOrCreate).unwrap();
    file.set_len(0).unwrap();
    file.write_all_at(bytes, 0).unwrap();
}

/// A block file that was left open, with damage behind `good`: what lies before it is found, all that is found is right, and a second
/// look finds the same. A finalized one with any damage is served right or not at all.
pub fn volume_scan(data: &[u8]) {
    let mut input = Input::new(data);
    let (mut bytes, mut raw) = (blockfile::encode_header(BLOCK).to_vec(), Vec::new());
    let (mut index, mut sealer) = (BlockIndex::new(bytes.len() as u64), Sealer::new(input.flag()));
    let mut ends = Vec::new();
    for _ in 0..input.byte() % 6 {
        let part = vec![input.byte(); usize::from(input.short()) % 3_000 + 1];
        let frame = sealer.seal(BLOCK, raw.len() as u64, Bytes::copy_from_slice(&part), true);
        bytes.extend_from_slice(&frame.header_bytes);
        bytes.extend_from_slice(&frame.payload);
        index.push(&frame.header);
        raw.extend_from_slice(&part);
        ends.push((bytes.len(), raw.len()));
    }
    let finalized = input.flag();
    if finalized {
        bytes.extend_from_slice(&index.encode_tail(BLOCK));
    }
    // Damage from `good` on: cut, overwritten, or longer.
    let whole = bytes.clone();
    let good = usize::from(input.short()) % (bytes.len() + 1);
    let noise = input.rest();
    match noise.first() {
        None => {}
        Some(0) => bytes.truncate(good),
        Some(_) => {
            bytes.resize(bytes.len().max(good + noise.len()), 0);
            bytes[good..good + noise.len()].copy_from_slice(noise);
        }
    }
    let good = whole.iter().zip(&bytes).take_while(|(a, b)| a == b).count();
    let disk = SimDisk::new(1 << 30, Entropy::seeded(1));
    drop(open(&disk));
    let root = Path::new("/v").join(POOL);
    let path = if finalized {
        let name = blockfile::finalized_name(BLOCK, GENERATION, raw.len() as u64);
        root.join("finalized/00/00").join(name)
    } else {
        root.join("rbw").join(blockfile::unfinalized_name(BLOCK, GENERATION))
    };
    put(&disk, &path, &bytes);
    let first = look(&disk, &raw);
    if finalized {
        assert!(bytes != whole || first == Some(raw.len()), "a whole replica is not served");
    } else {
        let least = ends.iter().rfind(|(end, _)| *end <= good).map_or(0, |(_, data)| *data);
        assert!(good < HEADER_BYTES || first.unwrap_or(0) >= least, "{first:?} found of {least}");
    }
    assert_eq!(look(&disk, &raw), first, "a second start finds something else");
}

/// Opens the volume and reads the block: its length, checked against `raw`.
fn look(disk: &SimDisk, raw: &[u8]) -> Option<usize> {
    let store = open(disk);
    let (_, entry) = store.map().get(BLOCK)?;
    if matches!(entry.kind, Kind::Corrupt { .. }) {
        return None;
    }
    let read = at_once(store.read(BLOCK, GENERATION)).ok()?;
    let length = read.length as usize;
    let verified = !matches!(entry.kind, Kind::Finalized { .. }) || at_once(store.verify(BLOCK, GENERATION)).is_ok();
    if verified {
        assert!(raw.len() >= length, "more than was written");
        assert_eq!(read.index.crc32c(), crc32c::crc32c(&raw[..length]), "other data than was written");
    }
    verified.then_some(length)
}

/// See [`volume_scan`].
pub fn recipe_seeds() -> Vec<Vec<u8>> {
    vec![
        vec![0, 3, 1, 0, 1, 2, 0, 2, 3, 0, 3, 0, 0, 0],
        vec![1, 2, 7, 200, 3, 8, 100, 9, 1, 60, 0, 1, 2, 3],
        vec![0, 5, 1, 9, 0, 2, 9, 0, 3, 9, 0, 4, 9, 0, 5, 9, 0, 0, 200, 0, 255, 255],
        vec![1, 1, 1, 50, 0, 0, 3, 0, 9],
    ]
}

/// `VERSION` of a datanode's volume and of a metadata directory: read, written, read again the same.
pub fn version_files(data: &[u8]) {
    let disk = SimDisk::new(1 << 30, Entropy::seeded(1));
    disk.create_dir_all(Path::new("/v")).unwrap();
    write_atomic(&disk, Path::new("/v/VERSION"), data).unwrap();
    if let Ok(Some(version)) = Version::read(&disk, Path::new("/v")) {
        version.write(&disk, Path::new("/v")).unwrap();
        assert_eq!(Version::read(&disk, Path::new("/v")).unwrap(), Some(version));
    }
    let text = String::from_utf8_lossy(data);
    let path = Path::new("/v/VERSION");
    if let Ok(version) = cairn_namenode::journal::Version::parse(path, &text) {
        assert_eq!(cairn_namenode::journal::Version::parse(path, &version.to_text()).unwrap(), version);
    }
}

/// See [`version_files`].
pub fn version_seeds() -> Vec<Vec<u8>> {
    let datanode = "role = \"datanode\"\nlayout = 1\ncluster_id = \"c\"\npool_id = \"p\"\nnode_id = \"n\"\nstorage_id = \"s\"\nepoch = 3\n";
    let namenode = "kind = \"namenode\"\nlayout = 1\ncluster_id = \"c-1\"\npool_id = \"p\"\nepoch = 7\nstate = \"ready\"\ndir_id = \"d\"\nset = [\"d\", \"e\"]\n";
    let odd = "kind = \"namenode\"\nlayout = -1\ncluster_id = 'c\"\\'\npool_id = \"\\u007f\"\nepoch = 7\nstate = \"new\"\ndir_id = \"d\\n\"\nset = [\"]\"]\n";
    let odd_datanode = "role = \"datanode\"\nlayout = 1\ncluster_id = \"\\u007f\\\"\"\npool_id = \"\\u0000\"\nnode_id = \"\\n\"\nstorage_id = \"é\"\nepoch = 18446744073709551615\n";
    [datanode, namenode, odd, odd_datanode].map(|text| text.as_bytes().to_vec()).to_vec()
}

/// Settings as they stand in a configuration file: refused with a reason, or valid.
pub fn settings_files(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    if let Ok(settings) = toml::from_str::<NamenodeSettings>(&text) {
        let _ = settings.validate().map_err(|error| assert!(!error.message().is_empty()));
    }
    if let Ok(settings) = toml::from_str::<DatanodeSettings>(&text) {
        let _ = settings.validate().map_err(|error| assert!(!error.message().is_empty()));
    }
    if let Ok(settings) = toml::from_str::<cairn_client::fs::ClientSettings>(&text) {
        let _ = settings.validate();
    }
}

/// See [`settings_files`].
pub fn settings_seeds() -> Vec<Vec<u8>> {
    let namenode =
        "dirs = [\"/a\"]\nlisten = \"127.0.0.1:0\"\n[core]\nheartbeat_interval_ms = 1000\nsafemode_threshold = nan\n";
    let datanode = "dirs = [\"/a\", \"/b\"]\nnamenode = \"h:1\"\nrack = \"/r\"\ntask_slots = 4294967295\nreserved_bytes = 9223372036854775807\n";
    let edges = "[core]\nheartbeat_interval_ms = 9223372036854775807\nstale_interval_ms = 1\n";
    [namenode, datanode, edges].map(|text| text.as_bytes().to_vec()).to_vec()
}

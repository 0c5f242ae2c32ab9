//! Replicas as they lie on the disks: no checks of its own.

use std::path::PathBuf;

use bytes::Bytes;
use cairn_proto::blockfile::{self, FOOTER_BYTES, Footer};
use cairn_proto::frame::{FRAME_HEADER_BYTES, FrameHeader};
use cairn_proto::ids::BlockId;

use crate::cluster::Cluster;
use crate::plan::Host;

/// A replica on a disk.
pub struct OnDisk {
    /// Whose.
    pub host: Host,
    /// Where.
    pub path: PathBuf,
    /// Block.
    pub id: i64,
    /// Generation.
    pub generation: u64,
    /// File data, by its name; 0 for one that is open.
    pub length: u64,
    /// Whole and under its final name (not set aside).
    pub finalized: bool,
    /// All of it verifies.
    pub is_sound: bool,
    /// Bytes of the file.
    pub bytes: u64,
}

impl OnDisk {
    /// What replicas of the same bytes share.
    pub fn key(&self) -> (i64, u64, u64) {
        (self.id, self.generation, self.length)
    }
}

/// All replicas on all disks, those set aside as corrupt left out.
pub fn on_disks(cluster: &Cluster) -> Vec<OnDisk> {
    let mut all = Vec::new();
    for (host, machine) in &cluster.machines {
        if !matches!(host, Host::Datanode(_)) {
            continue;
        }
        for (path, bytes) in machine.disk.files() {
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            let Some((id, generation, length)) = blockfile::parse_name(&name) else { continue };
            let is_in = |folder: &str| path.components().any(|part| part.as_os_str() == folder);
            if is_in("corrupt") || is_in("tmp") {
                continue;
            }
            let is_sound = length.is_some_and(|length| data_of(id, &bytes).is_some_and(|data| data == length));
            let (finalized, length) = (length.is_some() && is_in("finalized"), length.unwrap_or(0));
            let size = bytes.len() as u64;
            let (host, generation) = (*host, generation.0);
            all.push(OnDisk { host, path, id: id.0, generation, length, finalized, is_sound, bytes: size });
        }
    }
    all
}

/// Bytes of file data in a block file of which everything verifies.
fn data_of(id: BlockId, bytes: &[u8]) -> Option<u64> {
    let footer = bytes.len().checked_sub(FOOTER_BYTES)?;
    let footer = Footer::decode(id, &bytes[footer..], bytes.len() as u64).ok()?;
    let index = footer.index_offset() as usize;
    footer.decode_index(bytes.get(index..index + footer.index_bytes())?).ok()?;
    let mut at = blockfile::decode_header(id, bytes).ok()? as usize;
    let mut data = 0;
    while at < index {
        let header = FrameHeader::decode(id, bytes.get(at..)?).ok()?;
        let payload = bytes.get(at + FRAME_HEADER_BYTES..at + header.frame_bytes())?;
        header.open(Bytes::copy_from_slice(payload)).ok()?;
        at += header.frame_bytes();
        data = header.end();
    }
    (data == footer.data_length()).then_some(data)
}

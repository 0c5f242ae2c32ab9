//! Our messages as HDFS's.

use bytes::Bytes;
use cairn_proto::hadoop as wire;
use cairn_proto::pb;

/// How "-1" travels in HDFS's unsigned fields: no quota, no place, leave as it is.
pub const NONE: u64 = u64::MAX;

/// A status under a name; the path that was asked for itself goes by the empty one.
pub fn status(status: &pb::FileStatus, name: &str) -> wire::HdfsFileStatus {
    let is_directory = status.kind() == pb::FileKind::Directory;
    let kind =
        if is_directory { wire::hdfs_file_status::FileType::IsDir } else { wire::hdfs_file_status::FileType::IsFile };
    wire::HdfsFileStatus {
        file_type: kind as i32,
        path: Bytes::copy_from_slice(name.as_bytes()),
        length: status.shown_length.unwrap_or(status.length),
        permission: wire::FsPermission { perm: status.permission },
        owner: status.owner.clone(),
        group: status.group.clone(),
        modification_time: status.modified_ms,
        access_time: status.accessed_ms,
        block_replication: Some(if is_directory { 0 } else { status.replication }),
        block_size: Some(if is_directory { 0 } else { status.block_size }),
        file_id: Some(status.inode),
        children_num: Some(i32::try_from(status.children).unwrap_or(i32::MAX)),
        storage_policy: Some(0),
        ..wire::HdfsFileStatus::default()
    }
}

/// Host and port of "IP:PORT".
fn split_address(address: &str) -> (String, u32) {
    let (host, port) = address.rsplit_once(':').unwrap_or((address, ""));
    (host.trim_matches(['[', ']']).to_owned(), port.parse().unwrap_or(0))
}

/// The port of "HOST:PORT"; 0: there is none.
pub fn port_of(address: &str) -> u32 {
    split_address(address).1
}

/// A datanode. Data and RPC of Hadoop's clients come to its one data port.
pub fn datanode_id(node_id: &str, host: &str, address: &str, http_port: u32) -> wire::DatanodeId {
    let (ip_addr, port) = split_address(address);
    wire::DatanodeId {
        ip_addr,
        host_name: host.to_owned(),
        datanode_uuid: node_id.to_owned(),
        xfer_port: port,
        info_port: http_port,
        ipc_port: port,
        info_secure_port: Some(0),
    }
}

fn storage_kind(kind: pb::StorageType) -> wire::StorageKind {
    match kind {
        pb::StorageType::Disk => wire::StorageKind::StorageDisk,
        pb::StorageType::Ssd => wire::StorageKind::StorageSsd,
        pb::StorageType::Archive => wire::StorageKind::StorageArchive,
        pb::StorageType::RamDisk => wire::StorageKind::StorageRamDisk,
    }
}

/// Nodes, kinds and ids of storages go side by side: clients index one by the other.
pub fn push_replica(block: &mut wire::LocatedBlock, replica: &pb::Replica) {
    block.locs.push(wire::DatanodeInfo {
        id: datanode_id(&replica.node_id, &replica.host, &replica.address, replica.http_port),
        location: Some(replica.rack.clone()),
        ..wire::DatanodeInfo::default()
    });
    block.storage_types.push(storage_kind(replica.storage_type()) as i32);
    block.storage_ids.push(replica.storage_id.clone());
    block.is_cached.push(false);
}

/// A block of a client without places.
pub fn bare_block(block: wire::ExtendedBlock) -> wire::LocatedBlock {
    wire::LocatedBlock { b: block, offset: NONE, corrupt: false, ..wire::LocatedBlock::default() }
}

/// A block with its replicas.
pub fn located_block(block: &pb::LocatedBlock) -> wire::LocatedBlock {
    let id = block.block.clone().unwrap_or_default();
    let b = wire::ExtendedBlock {
        pool_id: id.pool,
        block_id: id.id as u64,
        generation_stamp: id.generation,
        num_bytes: Some(block.length),
    };
    let mut located = wire::LocatedBlock { offset: block.offset, corrupt: block.corrupt, ..bare_block(b) };
    block.replicas.iter().for_each(|replica| push_replica(&mut located, replica));
    located
}

/// Whether the block's length is decided. One that is being cut has the length that it will have: its old replicas hold
/// those bytes, and more that nobody is to see.
fn has_length(block: &pb::LocatedBlock) -> bool {
    block.complete || block.length > 0
}

/// The blocks of a file. The first one that is being written ends what is known: its readers ask a datanode how long it is.
pub fn located_blocks(status: &pb::FileStatus, blocks: &[pb::LocatedBlock]) -> wire::LocatedBlocks {
    let known = blocks.iter().take_while(|block| has_length(block));
    let mut known: Vec<wire::LocatedBlock> = known.map(located_block).collect();
    let open = blocks.iter().find(|block| !has_length(block)).map(located_block);
    let end = |block: &wire::LocatedBlock| block.offset + block.b.num_bytes();
    let last = known.last().filter(|block| end(block) == status.length).cloned();
    if let (Some(shown), Some(unfinished)) = (status.shown_length, blocks.iter().find(|block| !block.complete)) {
        // Who asks where bytes of the shown length lie must find all of them in a block.
        let length = shown.saturating_sub(unfinished.offset);
        known.retain(|block| block.offset < unfinished.offset);
        known.push(located_block(&pb::LocatedBlock { length, ..unfinished.clone() }));
    }
    wire::LocatedBlocks {
        // What lies behind an open block is not to be read before that one is finished.
        file_length: open.as_ref().map_or(status.length, |block| block.offset),
        under_construction: status.open,
        is_last_block_complete: open.is_none(),
        last_block: open.or(last),
        blocks: known,
    }
}

/// The name of an entry of a listed directory; empty for a file that was listed itself.
pub fn name_below<'a>(listed: &str, path: &'a str) -> &'a str {
    if path == listed {
        return "";
    }
    path.rsplit_once('/').map_or(path, |(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(id: i64, offset: u64, length: u64, complete: bool) -> pb::LocatedBlock {
        let replica = pb::Replica {
            node_id: "n1".into(),
            host: "worker1".into(),
            address: "127.0.0.5:9866".into(),
            rack: "/r1".into(),
            storage_id: "s1".into(),
            http_port: 9864,
            ..pb::Replica::default()
        };
        let identity = pb::Block { pool: "p".into(), id, generation: 1_001 };
        pb::LocatedBlock {
            block: Some(identity),
            offset,
            length,
            complete,
            replicas: vec![replica],
            ..Default::default()
        }
    }

    #[test]
    fn a_datanode_is_dialled_at_its_data_port_for_all() {
        let located = located_block(&block(7, 10, 5, true));
        let id = &located.locs[0].id;
        assert_eq!((&*id.ip_addr, id.xfer_port, id.ipc_port, &*id.host_name), ("127.0.0.5", 9866, 9866, "worker1"));
        assert_eq!(id.info_port, 9864);
        assert_eq!(located.locs[0].location.as_deref(), Some("/r1"));
        assert_eq!((located.storage_ids.len(), located.storage_types.len()), (1, 1));
        assert_eq!(split_address("[::1]:80"), ("::1".to_owned(), 80));
    }

    #[test]
    fn an_open_block_is_the_last_and_its_length_unknown() {
        let status = pb::FileStatus { length: 30, open: true, ..pb::FileStatus::default() };
        let blocks = [block(1, 0, 20, true), block(2, 20, 0, false), block(3, 20, 10, true)];
        let located = located_blocks(&status, &blocks);
        assert_eq!((located.file_length, located.blocks.len(), located.is_last_block_complete), (20, 1, false));
        assert_eq!(located.last_block.unwrap().b.block_id, 2);
        let status = pb::FileStatus { length: 25, open: true, ..pb::FileStatus::default() };
        let located = located_blocks(&status, &[block(1, 0, 20, true), block(2, 20, 5, false)]);
        assert_eq!((located.file_length, located.blocks.len(), located.is_last_block_complete), (25, 2, true));
        let located = located_blocks(&status, &[block(1, 0, 20, true)]);
        assert!(located.last_block.is_none(), "the range did not reach the end");
        // The writer said that the open block has 7 bytes: they lie somewhere, and readers still ask how many there are.
        let status = pb::FileStatus { length: 20, shown_length: Some(27), open: true, ..pb::FileStatus::default() };
        let located = located_blocks(&status, &[block(1, 0, 20, true), block(2, 20, 0, false)]);
        assert_eq!((located.file_length, located.blocks.len(), located.is_last_block_complete), (20, 2, false));
        assert_eq!(located.blocks[1].b.num_bytes(), 7);
        // Cut from 30 bytes to 25.
        let status = pb::FileStatus { length: 25, shown_length: Some(30), open: true, ..pb::FileStatus::default() };
        let located = located_blocks(&status, &[block(1, 0, 20, true), block(2, 20, 5, false)]);
        assert_eq!((located.file_length, located.blocks.len(), located.is_last_block_complete), (25, 2, true));
        assert_eq!((located.blocks[1].b.num_bytes(), located.last_block.unwrap().b.num_bytes()), (10, 5));
    }

    #[test]
    fn a_listed_file_has_no_name() {
        assert_eq!(name_below("/d", "/d/f"), "f");
        assert_eq!(name_below("/d/f", "/d/f"), "");
        assert_eq!(name_below("/", "/f"), "f");
    }
}

//! The shapes of answers about files and the cluster. Clients read them by name, and some demand all of the names.

use cairn_proto::path::split_last;
use cairn_proto::pb;
use serde_json::{Value, json};

/// The entry of a listing, or the status of one path (with an empty `suffix`).
pub fn status(status: &pb::FileStatus, suffix: &str) -> Value {
    let directory = status.kind() == pb::FileKind::Directory;
    let of_file = |number: u64| if directory { 0 } else { number };
    json!({
        "accessTime": status.accessed_ms,
        "blockSize": of_file(status.block_size),
        "childrenNum": status.children,
        "fileId": status.inode,
        "group": status.group,
        "length": of_file(status.shown_length.unwrap_or(status.length)),
        "modificationTime": status.modified_ms,
        "owner": status.owner,
        "pathSuffix": suffix,
        "permission": format!("{:o}", status.permission),
        "replication": of_file(u64::from(status.replication)),
        "storagePolicy": 0,
        "type": if directory { "DIRECTORY" } else { "FILE" },
    })
}

/// An entry of the listing of `listed`: a file that is listed itself has no name there.
pub fn entry(entry: &pb::FileStatus, listed: &str) -> Value {
    let name = match split_last(&entry.path) {
        Some((_, name)) if entry.path != listed => name,
        _ => "",
    };
    status(entry, name)
}

pub fn content_summary(sums: &pb::ContentSummaryResponse) -> Value {
    json!({ "ContentSummary": {
        "directoryCount": sums.directories,
        "ecPolicy": "",
        "fileCount": sums.files,
        "length": sums.length,
        "quota": -1,
        "spaceConsumed": sums.space,
        "spaceQuota": -1,
        "typeQuota": {},
    }})
}

pub fn quota_usage(sums: &pb::ContentSummaryResponse) -> Value {
    json!({ "QuotaUsage": {
        "fileAndDirectoryCount": sums.files + sums.directories,
        "quota": -1,
        "spaceConsumed": sums.space,
        "spaceQuota": -1,
        "typeQuota": {},
    }})
}

/// There are no ACLs: the mode says all.
pub fn acl_status(status: &pb::FileStatus) -> Value {
    json!({ "AclStatus": {
        "entries": [],
        "group": status.group,
        "owner": status.owner,
        "permission": format!("{:o}", status.permission),
        "stickyBit": status.permission & 0o1000 != 0,
    }})
}

pub fn server_defaults(defaults: &pb::GetServerDefaultsResponse) -> Value {
    json!({ "FsServerDefaults": {
        "blockSize": defaults.block_size,
        "bytesPerChecksum": 512,
        // CRC-32C.
        "checksumType": 2,
        "defaultStoragePolicyId": 0,
        "encryptDataTransfer": false,
        "fileBufferSize": 4_096,
        "keyProviderUri": "",
        "replication": defaults.replication,
        // Minutes. A client with 0 deletes at once, so less than one is one.
        "trashInterval": defaults.trash_interval_ms.div_ceil(60_000),
        "writePacketSize": 65_536,
    }})
}

pub fn fs_status(report: &pb::ClusterReportResponse) -> Value {
    json!({ "FsStatus": { "capacity": report.capacity, "remaining": report.remaining, "used": report.used } })
}

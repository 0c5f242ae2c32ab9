//! Where a map task is in its input, as its worker notes it in a file of the attempt's folder before each record: what a process that dies can no longer tell
//! is read there by its datanode.
//!
//! | at | size | field | |
//! |---|---|---|---|
//! | 0 | 8 | state | 0 nothing yet, 1 at a record, 2 somewhere in a batch of records |
//! | 8 | 8 | offset | where the record (or batch) starts in the file |
//! | 16 | 8 | ordinal | its number among the records of the split, from 0 |
//! | 24 | 8 | length of the path | at most 8,000 |
//! | 32 | | path | UTF-8 |
//!
//! Numbers are in the order of the machine: no other one reads the file.

use crate::pb;

/// Name of the file in the attempt's folder.
pub const FILE_NAME: &str = ".position";
/// Bytes of the file.
pub const FILE_BYTES: usize = 8_192;
/// State: nothing yet.
pub const NOWHERE: u64 = 0;
/// State: the record at `offset` is being mapped.
pub const AT_RECORD: u64 = 1;
/// State: one of the records from `offset` on is being mapped.
pub const IN_BATCH: u64 = 2;
const HEAD_BYTES: usize = 32;
const MAX_PATH: usize = FILE_BYTES - HEAD_BYTES;

/// A new file's content.
pub fn encode(path: &str) -> Vec<u8> {
    let mut out = vec![0; FILE_BYTES];
    let path = &path.as_bytes()[..path.len().min(MAX_PATH)];
    out[24..32].copy_from_slice(&(path.len() as u64).to_ne_bytes());
    out[HEAD_BYTES..HEAD_BYTES + path.len()].copy_from_slice(path);
    out
}

/// What the file says; `None` if it says nothing.
pub fn decode(bytes: &[u8]) -> Option<pb::RecordPosition> {
    let field = |at: usize| Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
    let state = field(0)?;
    if state != AT_RECORD && state != IN_BATCH {
        return None;
    }
    let length = usize::try_from(field(24)?).ok().filter(|length| *length <= MAX_PATH)?;
    let path = String::from_utf8_lossy(bytes.get(HEAD_BYTES..HEAD_BYTES + length)?).into_owned();
    Some(pb::RecordPosition { path, offset: field(8)?, ordinal: field(16)?, exact: state == AT_RECORD })
}

/// "the record at byte 7 of /f", for people.
pub fn describe(position: &pb::RecordPosition) -> String {
    let pb::RecordPosition { path, offset, ordinal, exact } = position;
    let what = if *exact { "the record" } else { "one of the records from" };
    match (path.is_empty(), exact) {
        (true, true) => format!("record {ordinal}"),
        (true, false) => format!("one of the records from {ordinal} on"),
        (false, true) => format!("{what} at byte {offset} of {path}"),
        (false, false) => format!("{what} byte {offset} of {path} on"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_comes_back() {
        let mut file = encode("/a/b");
        assert_eq!(file.len(), FILE_BYTES);
        assert_eq!(decode(&file), None);
        file[0] = AT_RECORD as u8;
        file[8] = 7;
        file[16] = 2;
        let position = decode(&file).unwrap();
        assert_eq!(position, pb::RecordPosition { path: "/a/b".into(), offset: 7, ordinal: 2, exact: true });
        assert_eq!(describe(&position), "the record at byte 7 of /a/b");
        file[0] = IN_BATCH as u8;
        assert_eq!(describe(&decode(&file).unwrap()), "one of the records from byte 7 of /a/b on");
        file[0] = 9;
        assert_eq!(decode(&file), None);
        assert_eq!(encode(&"x".repeat(9_000)).len(), FILE_BYTES);
        for length in 0..40 {
            let _ = decode(&file[..length]);
        }
    }
}

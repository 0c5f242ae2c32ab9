//! The list of files to copy, as bytes of a file that maps read parts of.

use cairn_proto::{Error, ErrorCode, Result};

use crate::fs::FileStatus;
use crate::mapreduce::{decode_varint, encode_count};

/// One file to copy.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Item {
    /// Path in the source (of a local file its path on this machine).
    pub source: String,
    /// Path in the target cluster.
    pub target: String,
    /// Bytes when it was listed.
    pub length: u64,
    /// Milliseconds since 1970.
    pub modified_ms: u64,
    /// Its replicas; 0: unknown.
    pub replication: u32,
    /// Its block size; 0: unknown.
    pub block_size: u64,
    /// `rwxrwxrwx`.
    pub permission: u32,
    /// Empty: unknown.
    pub owner: String,
    /// Empty: unknown.
    pub group: String,
    /// Length of what is in its place now; `None`: nothing.
    pub existing: Option<u64>,
}

impl Item {
    /// A file of a cluster.
    pub fn of(status: &FileStatus, target: String) -> Self {
        Self {
            source: status.path.clone(),
            target,
            length: status.length,
            modified_ms: status.modified_ms,
            replication: status.replication,
            block_size: status.block_size,
            permission: status.permission,
            owner: status.owner.clone(),
            group: status.group.clone(),
            existing: None,
        }
    }
}

/// Appends an item.
pub fn encode(item: &Item, out: &mut Vec<u8>) {
    let numbers = [
        item.length,
        item.modified_ms,
        u64::from(item.replication),
        item.block_size,
        u64::from(item.permission),
        // 0: nothing is there.
        item.existing.map_or(0, |length| length + 1),
    ];
    let mut scratch = [0; 10];
    for number in numbers {
        out.extend_from_slice(encode_count(number, &mut scratch));
    }
    for text in [&item.source, &item.target, &item.owner, &item.group] {
        out.extend_from_slice(encode_count(text.len() as u64, &mut scratch));
        out.extend_from_slice(text.as_bytes());
    }
}

/// Reads whole items.
pub fn decode(mut bytes: &[u8]) -> Result<Vec<Item>> {
    let damaged = || Error::new(ErrorCode::Corrupt, "the list of files to copy is damaged");
    let mut items = Vec::new();
    while !bytes.is_empty() {
        let mut number = || {
            let (number, used) = decode_varint(bytes).ok_or_else(damaged)?;
            bytes = &bytes[used..];
            Result::<u64>::Ok(number)
        };
        let mut item = Item {
            length: number()?,
            modified_ms: number()?,
            replication: u32::try_from(number()?).map_err(|_| damaged())?,
            block_size: number()?,
            permission: u32::try_from(number()?).map_err(|_| damaged())?,
            existing: number()?.checked_sub(1),
            ..Item::default()
        };
        for text in [&mut item.source, &mut item.target, &mut item.owner, &mut item.group] {
            let (length, used) = decode_varint(bytes).ok_or_else(damaged)?;
            let end = usize::try_from(length).ok().and_then(|length| length.checked_add(used)).ok_or_else(damaged)?;
            let part = bytes.get(used..end).ok_or_else(damaged)?;
            *text = String::from_utf8(part.to_vec()).map_err(|_| damaged())?;
            bytes = &bytes[end..];
        }
        items.push(item);
    }
    Ok(items)
}

/// Shares items out to at most `maps` parts of about equal bytes (a file counts as some more, for what it costs to open it). Returns the encoded
/// list, and the offsets at which parts start and end.
pub fn share_out(mut items: Vec<Item>, maps: u32) -> (Vec<u8>, Vec<u64>) {
    const COST_OF_A_FILE: u64 = 1 << 20;
    let maps = (maps.max(1) as usize).min(items.len().max(1));
    // The largest first, each to the part that has least.
    items.sort_by(|a, b| b.length.cmp(&a.length).then_with(|| a.source.cmp(&b.source)));
    let mut parts: Vec<Vec<u8>> = vec![Vec::new(); maps];
    let mut heap: std::collections::BinaryHeap<std::cmp::Reverse<(u64, usize)>> =
        (0..maps).map(|part| std::cmp::Reverse((0, part))).collect();
    for item in &items {
        let Some(std::cmp::Reverse((load, part))) = heap.pop() else { break };
        encode(item, &mut parts[part]);
        heap.push(std::cmp::Reverse((load + item.length + COST_OF_A_FILE, part)));
    }
    let mut offsets = vec![0];
    let mut at = 0;
    for part in &parts {
        at += part.len() as u64;
        offsets.push(at);
    }
    (parts.concat(), offsets)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(name: &str, length: u64) -> Item {
        Item {
            source: format!("/a/{name}"),
            target: format!("/b/{name}\n"),
            length,
            owner: "ann".into(),
            permission: 0o640,
            existing: (length > 5).then(|| length - 6),
            ..Item::default()
        }
    }

    #[test]
    fn items_come_back_in_parts_of_equal_weight() {
        let items: Vec<Item> =
            (0..50u64).map(|i| item(&format!("f{i}"), if i == 7 { 1 << 30 } else { i << 20 })).collect();
        let (bytes, offsets) = share_out(items.clone(), 4);
        assert_eq!(offsets.len(), 5);
        let parts: Vec<Vec<Item>> =
            offsets.windows(2).map(|edges| decode(&bytes[edges[0] as usize..edges[1] as usize]).unwrap()).collect();
        assert!(parts.iter().any(|part| part.len() == 1 && part[0].length == 1 << 30), "the large one is alone");
        let mut all = parts.concat();
        all.sort_by(|a, b| a.source.cmp(&b.source));
        let mut want = items;
        want.sort_by(|a, b| a.source.cmp(&b.source));
        assert_eq!(all, want);
        for cut in 1..offsets[1] as usize {
            // Cut anywhere, a list is refused or ends with a whole item.
            let _ = decode(&bytes[..cut]).map(|items| assert!(items.len() <= parts[0].len()));
        }
        assert_eq!(share_out(Vec::new(), 3).1, [0, 0]);
    }
}

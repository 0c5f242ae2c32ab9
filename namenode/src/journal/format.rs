//! The bytes of the edit log.
//!
//! # Segment file `log/edits_<first transaction, 20 digits>.log`
//! All numbers little endian.
//!
//! | at | size | segment header (96 bytes) |
//! |---|---|---|
//! | 0 | 8 | magic `CAIRNLOG` |
//! | 8 | 2 | version of this format |
//! | 10 | 2 | lowest version of a reader that understands it |
//! | 12 | 4 | 0 |
//! | 16 | 8 | first transaction of the segment (as in the name) |
//! | 24 | 8 | epoch when it was made |
//! | 32 | 4 | CRC of the last record of the segment before (0 if there was none): the chain goes on across segments |
//! | 36 | 48 | cluster id, ASCII, padded with zeros |
//! | 84 | 8 | 0 |
//! | 92 | 4 | CRC-32C of bytes 0..92 |
//!
//! | at | size | record (45 bytes + payload), one after the other |
//! |---|---|---|
//! | 0 | 4 | magic `EDT1` |
//! | 4 | 4 | bytes of the payload, 1 to 16 MiB |
//! | 8 | 8 | transaction, one more than that of the record before |
//! | 16 | 8 | epoch, never lower than that of the record before |
//! | 24 | 8 | the last transaction that was durable when this record was written |
//! | 32 | 4 | CRC of the record before (of the header's chain field for the first) |
//! | 36 | 4 | CRC-32C of bytes 0..36 |
//! | 40 | n | payload: a `cairn.v1.Edit` |
//! | 40+n | 4 | CRC-32C of bytes 0..40+n: the record's CRC |
//! | 44+n | 1 | end mark `0xE5` |
//!
//! After the last record the file is zero: room is written ahead in steps, so that a sync has no metadata to write.
//!
//! # Write order, and why
//! A segment is made aside with its header, synced, renamed, and its folder synced, so a segment under its name always has
//! a header. Records are appended in batches, each batch by one write and one `fdatasync`; the next batch is written only
//! after that returned.
//!
//! # What a bad record means
//! Whether a batch was cut by a crash or bytes were altered later decides between "forget the tail" (it was never
//! acknowledged) and "stop" (it may have been):
//! * The `durable` field settles most of it: a valid record further on whose `durable` reaches the bad one proves that the
//!   bad one was durable, so it was altered. A valid record that does not is of the same batch: writes within a batch reach
//!   the disk in any order.
//! * With nothing valid behind it, the bad record was cut if the file ends inside it, if only zeros follow from somewhere
//!   inside it (the end mark is not zero, so a whole record never looks so), or if a whole 512-byte sector of it was never
//!   written (disks write sectors as a whole). Else all its sectors are there and they are wrong: it was altered.

use std::ops::Range;

use cairn_proto::ids::{Epoch, TxId};

/// Version of the format that is written.
pub const VERSION: u16 = 1;
/// Bytes of a segment header.
pub const HEADER_BYTES: usize = 96;
/// Largest payload of a record.
pub const MAX_PAYLOAD_BYTES: usize = 16 << 20;
/// Bytes of a record besides its payload.
pub const RECORD_OVERHEAD: usize = RECORD_HEADER + 5;

const MAGIC: &[u8; 8] = b"CAIRNLOG";
const RECORD_MAGIC: &[u8; 4] = b"EDT1";
const RECORD_HEADER: usize = 40;
const END_MARK: u8 = 0xE5;
const SECTOR: usize = 512;
const CLUSTER_BYTES: usize = 48;

/// What a segment says of itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SegmentHeader {
    /// Its first transaction.
    pub first: TxId,
    /// Epoch when it was made.
    pub epoch: Epoch,
    /// CRC of the record before its first.
    pub chain: u32,
    /// Whose it is.
    pub cluster_id: String,
}

/// Why a segment header is not one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum HeaderFault {
    /// Of a newer release, with its version.
    Newer(u16),
    /// Altered or no segment at all.
    Bad(&'static str),
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).and_then(|b| b.try_into().ok()).map_or(0, u16::from_le_bytes)
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
}

/// A cluster id in a field of fixed size. Ids are UUIDs, so it always fits; a longer one would be cut and never match.
pub(crate) fn cluster_field(cluster_id: &str) -> [u8; CLUSTER_BYTES] {
    let mut field = [0; CLUSTER_BYTES];
    let bytes = cluster_id.as_bytes();
    let length = bytes.len().min(CLUSTER_BYTES);
    field[..length].copy_from_slice(&bytes[..length]);
    field
}

pub(crate) fn cluster_text(field: &[u8]) -> String {
    let length = field.iter().position(|&byte| byte == 0).unwrap_or(field.len());
    String::from_utf8_lossy(&field[..length]).into_owned()
}

impl SegmentHeader {
    /// Its bytes.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        out[..8].copy_from_slice(MAGIC);
        out[8..10].copy_from_slice(&VERSION.to_le_bytes());
        out[10..12].copy_from_slice(&VERSION.to_le_bytes());
        out[16..24].copy_from_slice(&self.first.0.to_le_bytes());
        out[24..32].copy_from_slice(&self.epoch.0.to_le_bytes());
        out[32..36].copy_from_slice(&self.chain.to_le_bytes());
        out[36..84].copy_from_slice(&cluster_field(&self.cluster_id));
        let crc = crc32c::crc32c(&out[..92]);
        out[92..].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// Reads it from the first bytes of a file.
    pub fn decode(bytes: &[u8]) -> Result<Self, HeaderFault> {
        let Some(bytes) = bytes.get(..HEADER_BYTES) else {
            return Err(HeaderFault::Bad("the file is shorter than a segment header"));
        };
        if &bytes[..8] != MAGIC {
            return Err(HeaderFault::Bad("this is no segment of an edit log"));
        }
        if crc32c::crc32c(&bytes[..92]) != u32_at(bytes, 92) {
            return Err(HeaderFault::Bad("the checksum of the segment header differs"));
        }
        if u16_at(bytes, 10) > VERSION {
            return Err(HeaderFault::Newer(u16_at(bytes, 8)));
        }
        Ok(Self {
            first: TxId(u64_at(bytes, 16)),
            epoch: Epoch(u64_at(bytes, 24)),
            chain: u32_at(bytes, 32),
            cluster_id: cluster_text(&bytes[36..84]),
        })
    }
}

/// A record as it lies in a segment.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Record {
    /// Its transaction.
    pub txid: TxId,
    /// Its epoch.
    pub epoch: Epoch,
    /// The last transaction that was durable when it was written.
    pub durable: TxId,
    /// CRC of the record before.
    pub previous_crc: u32,
    /// Its own CRC.
    pub crc: u32,
    /// Where its payload lies in the segment.
    pub payload: Range<usize>,
    /// Where the next record starts.
    pub end: usize,
}

/// Appends a record to `out`; `write_payload` appends the payload and nothing else. Returns the record's CRC, or the size
/// of a payload that is too large (then `out` is as before).
pub fn encode_record(
    out: &mut Vec<u8>,
    (txid, epoch, durable): (TxId, Epoch, TxId),
    previous_crc: u32,
    write_payload: impl FnOnce(&mut Vec<u8>),
) -> Result<u32, usize> {
    let start = out.len();
    out.resize(start + RECORD_HEADER, 0);
    write_payload(out);
    let length = out.len() - start - RECORD_HEADER;
    if length == 0 || length > MAX_PAYLOAD_BYTES {
        out.truncate(start);
        return Err(length);
    }
    let header = &mut out[start..start + RECORD_HEADER];
    header[..4].copy_from_slice(RECORD_MAGIC);
    header[4..8].copy_from_slice(&(length as u32).to_le_bytes());
    header[8..16].copy_from_slice(&txid.0.to_le_bytes());
    header[16..24].copy_from_slice(&epoch.0.to_le_bytes());
    header[24..32].copy_from_slice(&durable.0.to_le_bytes());
    header[32..36].copy_from_slice(&previous_crc.to_le_bytes());
    let header_crc = crc32c::crc32c(&header[..36]);
    header[36..].copy_from_slice(&header_crc.to_le_bytes());
    let crc = crc32c::crc32c(&out[start..]);
    out.extend_from_slice(&crc.to_le_bytes());
    out.push(END_MARK);
    Ok(crc)
}

/// Bytes of the payload if a whole, unaltered record header starts at `at`.
fn header_at(bytes: &[u8], at: usize) -> Option<usize> {
    let header = bytes.get(at..at.checked_add(RECORD_HEADER)?)?;
    if &header[..4] != RECORD_MAGIC || crc32c::crc32c(&header[..36]) != u32_at(header, 36) {
        return None;
    }
    let length = u32_at(header, 4) as usize;
    (1..=MAX_PAYLOAD_BYTES).contains(&length).then_some(length)
}

/// The record that starts at `at`, if a whole and unaltered one does.
pub fn record_at(bytes: &[u8], at: usize) -> Option<Record> {
    let length = header_at(bytes, at)?;
    let body_end = at + RECORD_HEADER + length;
    let end = body_end + 5;
    let tail = bytes.get(body_end..end)?;
    let crc = u32_at(tail, 0);
    if tail[4] != END_MARK || crc32c::crc32c(&bytes[at..body_end]) != crc {
        return None;
    }
    Some(Record {
        txid: TxId(u64_at(bytes, at + 8)),
        epoch: Epoch(u64_at(bytes, at + 16)),
        durable: TxId(u64_at(bytes, at + 24)),
        previous_crc: u32_at(bytes, at + 32),
        crc,
        payload: at + RECORD_HEADER..body_end,
        end,
    })
}

/// What stands where the next record should start but does not.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Tail {
    /// Only zeros, or nothing: the log ends here.
    End,
    /// The rest of a batch that was never durable.
    Torn,
    /// Something that was durable and is not what was written.
    Altered(String),
}

/// Judges the bytes from `at` on, where no valid record starts; `last` is the last good transaction. The rules are in the
/// module's text.
pub fn judge_tail(bytes: &[u8], at: usize, last: TxId) -> Tail {
    let data_end = bytes.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
    if data_end <= at {
        return Tail::End;
    }
    if let Some(later) = durable_witness(&bytes[..data_end], at, last) {
        return Tail::Altered(format!(
            "the record of transaction {} is damaged (transaction {} behind it is whole and was written after it was durable)",
            last.0 + 1,
            later.0
        ));
    }
    let extent = match header_at(bytes, at) {
        Some(length) => RECORD_OVERHEAD + length,
        None => RECORD_HEADER,
    };
    if at + extent > data_end || has_unwritten_sector(bytes, at..at + extent) {
        return Tail::Torn;
    }
    if bytes[at..at + RECORD_MAGIC.len()] == [0; 4] {
        return Tail::Altered(format!("the room behind transaction {last} holds something that no record begins with"));
    }
    Tail::Altered(format!("the record of transaction {} is whole but its checksum differs", last.0 + 1))
}

/// A valid record behind `at` that was written when a transaction after `last` was durable already.
fn durable_witness(bytes: &[u8], at: usize, last: TxId) -> Option<TxId> {
    let mut from = at + 1;
    while let Some(rest) = bytes.get(from..) {
        let found = rest.windows(RECORD_MAGIC.len()).position(|window| window == RECORD_MAGIC)?;
        from += found;
        match record_at(bytes, from) {
            Some(record) if record.durable > last && record.txid > last => return Some(record.txid),
            Some(record) => from = record.end,
            None => from += 1,
        }
    }
    None
}

/// Whether a sector of the file that overlaps `range` holds nothing from `range.start` on.
fn has_unwritten_sector(bytes: &[u8], range: Range<usize>) -> bool {
    let mut start = range.start;
    while start < range.end {
        let end = (start / SECTOR + 1) * SECTOR;
        let piece = &bytes[start..end.min(bytes.len())];
        if piece.iter().all(|&byte| byte == 0) {
            return true;
        }
        start = end;
    }
    false
}

/// Name of the segment that starts with `first`.
pub fn segment_name(first: TxId) -> String {
    format!("edits_{:020}.log", first.0)
}

/// First transaction of the segment with this name; `None` if it is no segment's name.
pub fn parse_segment_name(name: &str) -> Option<TxId> {
    numbered(name, "edits_", ".log")
}

/// The number in `<prefix><20 digits><suffix>`.
pub(crate) fn numbered(name: &str, prefix: &str, suffix: &str) -> Option<TxId> {
    let digits = name.strip_prefix(prefix)?.strip_suffix(suffix)?;
    if digits.len() != 20 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    digits.parse().ok().map(TxId)
}

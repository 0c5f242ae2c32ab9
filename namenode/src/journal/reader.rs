//! Reads the log of one metadata directory, strictly.
//!
//! Every record from the asked transaction on must be there, whole, and chained to the one before; only the last segment
//! may end in a torn batch, which the reader reports and [`cut_tail`] removes. Anything else stops with the file, the offset
//! and the way out (see [`super::format`] for what tells a torn batch from damage).

use std::path::{Path, PathBuf};

use cairn_common::durable::{Fs, OpenMode, read_all};
use cairn_proto::ids::{Epoch, TxId};

use super::error::{LogError, RESTORE_LOG};
use super::format::{
    HEADER_BYTES, HeaderFault, Record, SegmentHeader, Tail, VERSION, judge_tail, parse_segment_name, record_at,
};

/// Longest segment that is read; far above what is ever written (a segment is rolled at its size, then may grow by a batch).
pub(crate) const MAX_SEGMENT_BYTES: u64 = 4 << 30;

/// The last segment is written anew in pieces of this size.
const COPY_BYTES: u64 = 1 << 20;

/// One segment of a log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Segment {
    /// Its first transaction.
    pub first: TxId,
    /// Its file.
    pub path: PathBuf,
    /// Bytes of the file.
    pub len: u64,
}

/// Where a log ends.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct LogEnd {
    /// Last transaction (0: none at all).
    pub last: TxId,
    /// CRC of its record: the next one is chained to it.
    pub chain: u32,
    /// Highest epoch seen.
    pub epoch: Epoch,
    /// Records read.
    pub records: u64,
    /// Segments read.
    pub segments: usize,
    /// The last segment, where its good records end, and whether a torn batch lies behind that.
    pub tail: Option<LogTail>,
}

/// The last segment of a log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LogTail {
    /// Its file.
    pub path: PathBuf,
    /// Where its good records end.
    pub end: u64,
    /// Whether anything but zeros lies behind that.
    pub torn: bool,
    /// Whether it holds any record.
    pub is_empty: bool,
}

/// The segments in a log folder, in order. Files of other names are left alone.
pub fn list_segments(fs: &dyn Fs, log: &Path) -> Result<Vec<Segment>, LogError> {
    let mut segments = Vec::new();
    for entry in fs.read_dir(log).map_err(LogError::io("list", log))? {
        if let Some(first) = parse_segment_name(&entry.name).filter(|_| !entry.is_dir) {
            segments.push(Segment { first, path: log.join(&entry.name), len: entry.len });
        }
    }
    segments.sort_by_key(|segment| segment.first);
    Ok(segments)
}

/// Reads the log in `log` from transaction `from` on and gives each record to `visit`, which may refuse it with a reason.
pub fn read_log(
    fs: &dyn Fs,
    log: &Path,
    cluster_id: &str,
    from: TxId,
    mut visit: impl FnMut(&Record, &[u8]) -> Result<(), String>,
) -> Result<LogEnd, LogError> {
    let segments = list_segments(fs, log)?;
    // The segment that holds `from` is the last one that starts at or before it.
    let skip = segments.iter().rposition(|segment| segment.first <= from).unwrap_or(0);
    let segments = &segments[skip..];
    if let Some(segment) = segments.first().filter(|segment| segment.first > from) {
        return Err(gap(log, from, segment.first));
    }
    let mut end = LogEnd { last: TxId(from.0.saturating_sub(1)), ..LogEnd::default() };
    for (index, segment) in segments.iter().enumerate() {
        let bytes = read_all(fs, &segment.path, MAX_SEGMENT_BYTES).map_err(LogError::io("read", &segment.path))?;
        let header = check_header(segment, &bytes, cluster_id)?;
        if index == 0 {
            end.chain = header.chain;
            end.last = TxId(segment.first.0.saturating_sub(1));
        } else if segment.first != end.last.next() {
            return Err(out_of_place(log, segment, end.last));
        } else if header.chain != end.chain {
            let what = format!("the segment does not continue the record of transaction {}", end.last);
            return Err(LogError::damaged(&segment.path, 32, what));
        }
        end.epoch = end.epoch.max(header.epoch);
        let is_last = index + 1 == segments.len();
        read_segment(segment, &bytes, is_last, from, &mut end, &mut visit)?;
        end.segments += 1;
    }
    if !segments.is_empty() && end.last.next() < from {
        return Err(gap(log, end.last.next(), from));
    }
    Ok(end)
}

fn gap(log: &Path, from: TxId, next: TxId) -> LogError {
    LogError::Gap { path: log.to_owned(), from: from.0, to: next.0 - 1, way_out: RESTORE_LOG }
}

fn out_of_place(log: &Path, segment: &Segment, last: TxId) -> LogError {
    if segment.first > last.next() {
        return gap(log, last.next(), segment.first);
    }
    let what = format!("the segment starts with transaction {}, which the one before holds too", segment.first);
    LogError::damaged(&segment.path, 0, what)
}

fn check_header(segment: &Segment, bytes: &[u8], cluster_id: &str) -> Result<SegmentHeader, LogError> {
    let path = &segment.path;
    let header = SegmentHeader::decode(bytes).map_err(|fault| match fault {
        HeaderFault::Newer(found) => LogError::Newer { path: path.clone(), found, known: VERSION },
        HeaderFault::Bad(what) => LogError::damaged(path, 0, what),
    })?;
    if header.cluster_id != cluster_id {
        return Err(LogError::OtherCluster {
            path: path.clone(),
            found: header.cluster_id,
            expected: cluster_id.to_owned(),
        });
    }
    if header.first != segment.first {
        let what = format!("the segment starts with transaction {}, not with the one in its name", header.first);
        return Err(LogError::damaged(path, 16, what));
    }
    Ok(header)
}

fn read_segment(
    segment: &Segment,
    bytes: &[u8],
    is_last: bool,
    from: TxId,
    end: &mut LogEnd,
    visit: &mut impl FnMut(&Record, &[u8]) -> Result<(), String>,
) -> Result<(), LogError> {
    let path = &segment.path;
    let mut at = HEADER_BYTES;
    while let Some(record) = record_at(bytes, at) {
        check_place(path, at, &record, end)?;
        if record.txid >= from {
            visit(&record, &bytes[record.payload.clone()]).map_err(|what| LogError::Refused {
                path: path.clone(),
                offset: at as u64,
                txid: record.txid.0,
                what,
                way_out: RESTORE_LOG,
            })?;
            end.records += 1;
        }
        end.last = record.txid;
        end.chain = record.crc;
        end.epoch = record.epoch;
        at = record.end;
    }
    let torn = match judge_tail(bytes, at, end.last) {
        Tail::End => false,
        Tail::Torn if is_last => true,
        Tail::Torn => {
            let what = format!("the segment ends inside transaction {}, but another segment follows", end.last.next());
            return Err(LogError::damaged(path, at as u64, what));
        }
        Tail::Altered(what) => return Err(LogError::damaged(path, at as u64, what)),
    };
    end.tail = Some(LogTail { path: path.clone(), end: at as u64, torn, is_empty: at == HEADER_BYTES });
    Ok(())
}

/// A record that is whole in itself must also be the next one.
fn check_place(path: &Path, at: usize, record: &Record, end: &LogEnd) -> Result<(), LogError> {
    let what = if record.txid != end.last.next() {
        format!("transaction {} stands where {} should", record.txid, end.last.next())
    } else if record.previous_crc != end.chain {
        format!("transaction {} does not continue the record before it", record.txid)
    } else if record.epoch < end.epoch {
        format!("transaction {} has epoch {}, the one before {}", record.txid, record.epoch, end.epoch)
    } else {
        return Ok(());
    };
    Err(LogError::damaged(path, at as u64, what))
}

/// Writes the last segment anew up to its last good record: without a torn batch and the room written ahead, and durable for certain. (A
/// namenode that was killed may have written what it had no time to sync; one that ended because a sync had failed leaves bytes that can be
/// read and that no later sync of that file makes durable. What is read here is built upon from now on.) A segment without any record is
/// left alone: the next one has the same name and replaces it, so that a log is never without a segment.
pub fn cut_tail(fs: &dyn Fs, tail: &LogTail) -> Result<(), LogError> {
    if tail.is_empty {
        return Ok(());
    }
    let folder = tail.path.parent().unwrap_or(Path::new("."));
    let aside = folder.join("next.tmp");
    if fs.metadata(&aside).map_err(LogError::io("look at", &aside))?.is_some() {
        fs.remove_file(&aside).map_err(LogError::io("remove", &aside))?;
    }
    let old = fs.open(&tail.path, OpenMode::Read).map_err(LogError::io("open", &tail.path))?;
    let new = fs.open(&aside, OpenMode::Create).map_err(LogError::io("make", &aside))?;
    let mut piece = vec![0; COPY_BYTES.min(tail.end) as usize];
    let mut at = 0;
    while at < tail.end {
        let part = &mut piece[..COPY_BYTES.min(tail.end - at) as usize];
        old.read_exact_at(part, at).map_err(LogError::io("read", &tail.path))?;
        new.write_all_at(part, at).map_err(LogError::io("write", &aside))?;
        at += part.len() as u64;
    }
    new.sync_data().map_err(LogError::io("sync", &aside))?;
    fs.rename(&aside, &tail.path).map_err(LogError::io("name", &tail.path))?;
    fs.sync_dir(folder).map_err(LogError::io("sync", folder))
}

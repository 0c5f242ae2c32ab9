//! The log as a backup and an archive tell it together.
//!
//! # Overview
//! Both hold segments ([`Piece`]); an archive also those of futures that were left behind by a restore. [`History::walk`]
//! follows the records from the backup's image on: each is chained to the one before by its CRC, so a record of another future never
//! passes for the next one. Where two futures part (two segments continue the same record), the one with the higher epoch goes on:
//! it is the one that a restore, or a start ordered by a person, began later.
//!
//! # Consistency
//! A piece may end early (an archive that was being written, a backup that was made in between): then another one that holds the
//! next record goes on. What cannot be continued although later segments of the same or a newer epoch are there is a gap.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use cairn_common::durable::{Fs, OpenMode, read_all};
use cairn_proto::backupfile::{BackupCheck, BackupHeader, Section, SectionKind};
use cairn_proto::ids::{Epoch, TxId};
use cairn_proto::{Error, Result, pb};
use prost::Message as _;

use super::archive;
use crate::journal::format::{HEADER_BYTES, HeaderFault, SegmentHeader, record_at};
use crate::journal::{LogError, MAX_SEGMENT_BYTES};

/// Bytes read at a time.
const READ_BYTES: usize = 1 << 20;

/// A backup whose every byte was checked.
pub struct Backup {
    path: PathBuf,
    /// What it says of itself.
    pub header: BackupHeader,
    sections: Vec<Section>,
}

impl Backup {
    /// Reads and checks the whole file. Blocking.
    pub fn open(fs: &dyn Fs, path: &Path) -> Result<Self> {
        let shown = path.display().to_string();
        let failed =
            |error: std::io::Error| Error::io(format!("cannot read backup {shown}"), &error).with_subject(&shown);
        let file = fs.open(path, OpenMode::Read).map_err(failed)?;
        let mut check = BackupCheck::default();
        let (mut buffer, mut at) = (vec![0; READ_BYTES], 0);
        loop {
            let n = file.read_at(&mut buffer, at).map_err(failed)?;
            if n == 0 {
                break;
            }
            check.feed(&buffer[..n]).map_err(|error| error.of(&shown))?;
            at += n as u64;
        }
        let (header, sections) = check.finish().map_err(|error| error.of(&shown))?;
        Ok(Self { path: path.to_owned(), header, sections })
    }

    /// Copies the image, if there is one, piece by piece to `write` (offset, bytes).
    pub fn copy_image(&self, fs: &dyn Fs, write: &mut dyn FnMut(u64, &[u8]) -> Result<()>) -> Result<bool> {
        let Some(section) = self.sections.iter().find(|section| section.kind == SectionKind::Image) else {
            return Ok(false);
        };
        let file = fs.open(&self.path, OpenMode::Read).map_err(LogError::io("read", &self.path))?;
        let (mut buffer, mut done) = (vec![0; READ_BYTES], 0);
        while done < section.length {
            let now = (section.length - done).min(READ_BYTES as u64) as usize;
            file.read_exact_at(&mut buffer[..now], section.offset + done).map_err(LogError::io("read", &self.path))?;
            write(done, &buffer[..now])?;
            done += now as u64;
        }
        Ok(true)
    }
}

/// Where the bytes of a piece lie.
#[derive(Clone, Debug)]
enum Place {
    Section { offset: u64, length: u64 },
    File,
}

/// A segment of the log in a backup or an archive.
#[derive(Clone, Debug)]
struct Piece {
    header: SegmentHeader,
    path: PathBuf,
    place: Place,
    length: u64,
}

impl Piece {
    fn read(&self, fs: &dyn Fs) -> Result<Vec<u8>, LogError> {
        match self.place {
            Place::File => read_all(fs, &self.path, MAX_SEGMENT_BYTES).map_err(LogError::io("read", &self.path)),
            Place::Section { offset, length } => {
                let file = fs.open(&self.path, OpenMode::Read).map_err(LogError::io("read", &self.path))?;
                let mut bytes = vec![0; length.min(MAX_SEGMENT_BYTES) as usize];
                file.read_exact_at(&mut bytes, offset).map_err(LogError::io("read", &self.path))?;
                Ok(bytes)
            }
        }
    }
}

/// Where a walk has got to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Point {
    /// The transaction.
    pub txid: TxId,
    /// CRC of its record.
    pub chain: u32,
    /// Time of its edit, milliseconds since 1970; 0 if it is the image's.
    pub time_ms: u64,
}

/// Records of one piece, one after the other.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Step {
    piece: usize,
    /// What the records follow.
    pub after: Point,
    /// What they lead to.
    pub to: Point,
    /// Epoch of the segment that they come from.
    pub epoch: Epoch,
    bytes: std::ops::Range<usize>,
}

/// The way through the log, as far as it goes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Way {
    /// The state of the image.
    pub start: Point,
    /// From there on.
    pub steps: Vec<Step>,
    /// The last transaction that can be reached.
    pub end: Point,
    /// Transactions that are missing behind it although later ones are there.
    pub gap: Option<(TxId, TxId)>,
    /// Highest epoch of anything there is.
    pub epoch: Epoch,
    /// Whether `end` is what was asked for, not just as far as it goes.
    pub reached: bool,
}

/// Where to stop.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Target {
    /// At the last transaction.
    Last,
    /// After this transaction.
    TxId(TxId),
    /// After the last transaction that was made at this time or before, milliseconds since 1970.
    Time(u64),
}

impl Target {
    /// Whether the state after a record is past the wanted one.
    fn is_behind(self, txid: TxId, time_ms: u64) -> bool {
        match self {
            Self::Last => false,
            Self::TxId(wanted) => txid > wanted,
            Self::Time(wanted) => time_ms > wanted,
        }
    }
}

/// All segments that there are.
pub struct History {
    pieces: Vec<Piece>,
    /// Pieces by what they continue, best first: first transaction, CRC of the record before.
    by_start: BTreeMap<(TxId, u32), Vec<usize>>,
    image: TxId,
    /// Highest epoch of a header.
    epoch: Epoch,
}

impl History {
    /// The segments of a backup and, if there is one, of an archive, which must be of the same cluster.
    pub fn open(fs: &dyn Fs, backup: &Backup, log: Option<&Path>) -> Result<Self> {
        let mut pieces = Vec::new();
        let file = fs.open(&backup.path, OpenMode::Read).map_err(LogError::io("read", &backup.path))?;
        for section in backup.sections.iter().filter(|section| section.kind == SectionKind::Log) {
            let mut head = vec![0; HEADER_BYTES.min(section.length as usize)];
            file.read_exact_at(&mut head, section.offset).map_err(LogError::io("read", &backup.path))?;
            let place = Place::Section { offset: section.offset, length: section.length };
            pieces.push(piece(&backup.path, &head, place, section.length, &backup.header.cluster_id)?);
        }
        if let Some(log) = log {
            archive::check_cluster(fs, log, &backup.header.cluster_id)?;
            for (path, length) in archive::list(fs, log)? {
                let file = fs.open(&path, OpenMode::Read).map_err(LogError::io("read", &path))?;
                let mut head = vec![0; HEADER_BYTES];
                let n = file.read_at(&mut head, 0).map_err(LogError::io("read", &path))?;
                if n < HEADER_BYTES && archive::is_open_name(&path) {
                    // Torn when it was just begun: nothing was archived in it yet.
                    continue;
                }
                pieces.push(piece(&path, &head[..n], Place::File, length, &backup.header.cluster_id)?);
            }
        }
        let mut by_start: BTreeMap<(TxId, u32), Vec<usize>> = BTreeMap::new();
        for (index, piece) in pieces.iter().enumerate() {
            by_start.entry((piece.header.first, piece.header.chain)).or_default().push(index);
        }
        for same in by_start.values_mut() {
            same.sort_by_key(|&index| std::cmp::Reverse((pieces[index].header.epoch, pieces[index].length)));
        }
        let epoch = pieces.iter().map(|piece| piece.header.epoch).max().unwrap_or_default();
        Ok(Self { pieces, by_start, image: backup.header.image, epoch: epoch.max(backup.header.epoch) })
    }

    /// The records from the image on, up to `target`.
    pub fn walk(&self, fs: &dyn Fs, target: Target) -> Result<Way> {
        let start = self.start(fs)?;
        let mut way = Way { start, steps: Vec::new(), end: start, gap: None, epoch: self.epoch, reached: false };
        let mut current: Option<usize> = None;
        loop {
            let least = current.map_or(Epoch(0), |piece| self.pieces[piece].header.epoch);
            let Some((piece, bytes, at)) = self.find(fs, way.end, least, current)? else { break };
            let before = way.end;
            let stopped = self.follow(piece, &bytes, at, target, &mut way)?;
            if stopped {
                way.reached = true;
                return Ok(way);
            }
            if way.end == before {
                break;
            }
            current = Some(piece);
        }
        way.reached = match target {
            Target::Last => true,
            Target::TxId(wanted) => way.end.txid == wanted,
            Target::Time(wanted) => way.end.time_ms == wanted,
        };
        let least = current.map_or(Epoch(0), |piece| self.pieces[piece].header.epoch);
        let next = way.end.txid.next();
        // A newer future that begins here and has nothing yet: what else there is belongs to the one that was left behind.
        let parts = self
            .by_start
            .get(&(next, way.end.chain))
            .is_some_and(|parts| parts.iter().any(|&piece| self.pieces[piece].header.epoch > least));
        let is_later = |piece: &&Piece| !parts && piece.header.epoch >= least && piece.header.first > next;
        let later = self.pieces.iter().filter(is_later);
        way.gap = later.map(|piece| piece.header.first).min().map(|first| (next, TxId(first.0 - 1)));
        Ok(way)
    }

    /// The image's transaction, with the CRC that the log of the backup itself gives it.
    fn start(&self, fs: &dyn Fs) -> Result<Point> {
        let mut best = None;
        for piece in self.pieces.iter().filter(|piece| matches!(piece.place, Place::Section { .. })) {
            if piece.header.first <= self.image.next() {
                best = Some(piece);
            }
        }
        let damaged = |path: &Path| LogError::damaged_backup(path, "it does not hold the log that follows its image");
        let Some(piece) = best else {
            return Err(damaged(self.pieces.first().map_or(Path::new("backup"), |piece| &piece.path)).into());
        };
        let (mut txid, mut chain) = (TxId(piece.header.first.0.saturating_sub(1)), piece.header.chain);
        let bytes = piece.read(fs)?;
        let mut at = HEADER_BYTES;
        while txid < self.image {
            let record =
                record_at(&bytes, at).filter(|record| record.txid == txid.next() && record.previous_crc == chain);
            let record = record.ok_or_else(|| damaged(&piece.path))?;
            (txid, chain, at) = (record.txid, record.crc, record.end);
        }
        Ok(Point { txid, chain, time_ms: 0 })
    }

    /// The piece that goes on behind `point`, its bytes, and where the next record lies in it.
    fn find(
        &self,
        fs: &dyn Fs,
        point: Point,
        least: Epoch,
        current: Option<usize>,
    ) -> Result<Option<(usize, Vec<u8>, usize)>> {
        let next = point.txid.next();
        let starting = self.by_start.get(&(next, point.chain)).map_or(&[][..], Vec::as_slice);
        // One that began here but has no record yet leads nowhere: another one may.
        for &index in
            starting.iter().filter(|&&index| self.pieces[index].header.epoch >= least && Some(index) != current)
        {
            let bytes = self.pieces[index].read(fs)?;
            if record_at(&bytes, HEADER_BYTES).is_some() {
                return Ok(Some((index, bytes, HEADER_BYTES)));
            }
        }
        let holds = |piece: &Piece| piece.header.first < next && piece.header.epoch >= least;
        let mut within: Vec<usize> =
            (0..self.pieces.len()).filter(|&index| Some(index) != current && holds(&self.pieces[index])).collect();
        // The newest future first, and of it the segment that starts last.
        within.sort_by_key(|&index| {
            let header = &self.pieces[index].header;
            std::cmp::Reverse((header.epoch, header.first, self.pieces[index].length))
        });
        for index in within {
            let bytes = self.pieces[index].read(fs)?;
            let mut at = HEADER_BYTES;
            while let Some(record) = record_at(&bytes, at) {
                if record.txid >= next {
                    if record.txid == next && record.previous_crc == point.chain {
                        return Ok(Some((index, bytes, at)));
                    }
                    break;
                }
                at = record.end;
            }
        }
        Ok(None)
    }

    /// Takes records of a piece until it ends, a newer future begins, or the target is reached (`true`).
    fn follow(&self, piece: usize, bytes: &[u8], start: usize, target: Target, way: &mut Way) -> Result<bool> {
        let header = &self.pieces[piece].header;
        let (after, mut at, mut stopped) = (way.end, start, false);
        while let Some(record) = record_at(bytes, at) {
            if record.txid != way.end.txid.next() || record.previous_crc != way.end.chain {
                break;
            }
            let edit = pb::Edit::decode(&bytes[record.payload.clone()]).map_err(|error| {
                LogError::damaged(
                    &self.pieces[piece].path,
                    at as u64,
                    format!("transaction {}: not an edit: {error}", record.txid),
                )
            })?;
            if target.is_behind(record.txid, edit.time_ms) {
                stopped = true;
                break;
            }
            way.end = Point { txid: record.txid, chain: record.crc, time_ms: edit.time_ms };
            way.epoch = way.epoch.max(record.epoch);
            at = record.end;
            let parts = self.by_start.get(&(way.end.txid.next(), way.end.chain));
            if parts.is_some_and(|parts| parts.iter().any(|&other| self.pieces[other].header.epoch > header.epoch)) {
                break;
            }
        }
        if at > start {
            way.steps.push(Step { piece, after, to: way.end, epoch: header.epoch, bytes: start..at });
        }
        // Also when the wanted one was the last of all.
        Ok(stopped || target == Target::TxId(way.end.txid))
    }

    /// The records of a step, as they lie in a segment.
    pub fn records(&self, fs: &dyn Fs, step: &Step) -> Result<Vec<u8>> {
        let mut bytes = self.pieces[step.piece].read(fs)?;
        bytes.truncate(step.bytes.end);
        bytes.drain(..step.bytes.start.min(bytes.len()));
        Ok(bytes)
    }
}

fn piece(path: &Path, head: &[u8], place: Place, length: u64, cluster_id: &str) -> Result<Piece, LogError> {
    let header = SegmentHeader::decode(head).map_err(|fault| match fault {
        HeaderFault::Newer(found) => {
            LogError::Newer { path: path.to_owned(), found, known: crate::journal::format::VERSION }
        }
        HeaderFault::Bad(what) => LogError::damaged(path, 0, what),
    })?;
    if header.cluster_id != cluster_id {
        let (found, expected) = (header.cluster_id, cluster_id.to_owned());
        return Err(LogError::OtherCluster { path: path.to_owned(), found, expected });
    }
    Ok(Piece { header, path: path.to_owned(), place, length })
}

//! A backup of a namenode: one file that holds the older of its two images and all log since.
//!
//! So each transaction from the image's on can be reached with it, and with an archive of the log each one after it. The
//! namenode streams it ([`BackupEncoder`]); who receives or reads it checks every byte ([`BackupCheck`]).
//!
//! All numbers little endian.
//!
//! | at | size | header (160 bytes) |
//! |---|---|---|
//! | 0 | 8 | magic `CAIRNBAK` |
//! | 8 | 2 | version of this format |
//! | 10 | 2 | lowest version of a reader that understands it |
//! | 12 | 4 | 0 |
//! | 16 | 8 | transaction S of the image; 0: the log goes back to the beginning |
//! | 24 | 8 | last transaction |
//! | 32 | 8 | epoch |
//! | 40 | 8 | when it was made, milliseconds since 1970 |
//! | 48 | 48 | cluster id, ASCII, padded with zeros |
//! | 96 | 48 | block pool id, the same |
//! | 144 | 12 | 0 |
//! | 156 | 4 | CRC-32C of bytes 0..156 |
//!
//! | size | section, one after the other: the image (if there is one), then the segments of the log in order |
//! |---|---|
//! | 4 | magic `SECT` |
//! | 1 | kind: 1 image, 2 segment of the log |
//! | 3 | 0 |
//! | 8 | S, or the first transaction of the segment |
//! | 8 | bytes that follow |
//! | 4 | 0 |
//! | 4 | CRC-32C of the 28 bytes before |
//! | n | the file, as it lies in a metadata directory (the last segment up to the last transaction) |
//! | 4 | CRC-32C of it |
//!
//! | size | trailer (64 bytes) |
//! |---|---|
//! | 4 | magic `BEND` |
//! | 4 | sections |
//! | 8 | bytes of the whole file |
//! | 32 | SHA-256 of everything before the trailer |
//! | 12 | 0 |
//! | 4 | CRC-32C of the 60 bytes before |
//!
//! A file that was cut has no trailer; one that was altered has another digest. Both are refused with what was found.

use sha2::{Digest, Sha256};

use crate::ids::{Epoch, TxId};
use crate::{Error, ErrorCode};

/// Version of the format that is written.
pub const VERSION: u16 = 1;
/// Bytes of the header.
pub const HEADER_BYTES: usize = 160;
/// Bytes before the contents of a section.
pub const SECTION_BYTES: usize = 32;
/// Bytes of the trailer.
pub const TRAILER_BYTES: usize = 64;

const MAGIC: &[u8; 8] = b"CAIRNBAK";
const SECTION_MAGIC: &[u8; 4] = b"SECT";
const TRAILER_MAGIC: &[u8; 4] = b"BEND";
const TEXT_BYTES: usize = 48;
/// More sections than a backup can have: segments are 4 KiB at least, and nobody keeps that many.
const MAX_SECTIONS: usize = 1 << 20;

/// What a backup says of itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BackupHeader {
    /// Transaction of its image; 0: none, the log goes back to the beginning.
    pub image: TxId,
    /// Its last transaction.
    pub last: TxId,
    /// Epoch when it was made.
    pub epoch: Epoch,
    /// When it was made, milliseconds since 1970.
    pub made_ms: u64,
    /// The cluster.
    pub cluster_id: String,
    /// Its block pool.
    pub pool_id: String,
}

/// What a section holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SectionKind {
    /// The image.
    Image,
    /// A segment of the log.
    Log,
}

/// Where a section lies.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Section {
    /// What it holds.
    pub kind: SectionKind,
    /// S of the image, or the first transaction of the segment.
    pub number: TxId,
    /// Where its contents begin in the backup.
    pub offset: u64,
    /// Bytes of its contents.
    pub length: u64,
}

/// Why a backup is refused.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BackupError {
    /// It does not begin like one.
    #[error("it is no backup of a namenode")]
    NotABackup,
    /// A newer release wrote it.
    #[error("it has format version {0}, this program reads up to {VERSION}: run a newer release")]
    Newer(u16),
    /// It ends before its trailer.
    #[error("the backup is cut: it ends after {0} bytes, before its trailer")]
    Cut(u64),
    /// It is not what was written.
    #[error("the backup is altered: at offset {at}, {what}")]
    Altered {
        /// Where.
        at: u64,
        /// What does not hold.
        what: &'static str,
    },
}

impl BackupError {
    /// As it crosses a boundary between processes; `name` says which file.
    pub fn of(&self, name: &str) -> Error {
        let code = match self {
            Self::NotABackup => ErrorCode::InvalidArgument,
            Self::Newer(_) => ErrorCode::UnsupportedVersion,
            Self::Cut(_) | Self::Altered { .. } => ErrorCode::Corrupt,
        };
        Error::new(code, format!("{name}: {self}")).with_subject(name)
    }
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    if let Some(found) = bytes.get(at..at + N) {
        out.copy_from_slice(found);
    }
    out
}

fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(field(bytes, at))
}

fn put_text(out: &mut [u8], text: &str) {
    let length = text.len().min(TEXT_BYTES);
    out[..length].copy_from_slice(&text.as_bytes()[..length]);
}

fn text(bytes: &[u8]) -> String {
    let length = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..length]).into_owned()
}

/// Puts the checksum of all before it into the last four bytes.
fn seal(out: &mut [u8]) {
    let end = out.len() - 4;
    let crc = crc32c::crc32c(&out[..end]);
    out[end..].copy_from_slice(&crc.to_le_bytes());
}

fn is_sealed(bytes: &[u8]) -> bool {
    let end = bytes.len().saturating_sub(4);
    crc32c::crc32c(&bytes[..end]).to_le_bytes() == field::<4>(bytes, end)
}

impl BackupHeader {
    fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        out[..8].copy_from_slice(MAGIC);
        out[8..10].copy_from_slice(&VERSION.to_le_bytes());
        out[10..12].copy_from_slice(&VERSION.to_le_bytes());
        for (at, value) in [(16, self.image.0), (24, self.last.0), (32, self.epoch.0), (40, self.made_ms)] {
            out[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        put_text(&mut out[48..96], &self.cluster_id);
        put_text(&mut out[96..144], &self.pool_id);
        seal(&mut out);
        out
    }

    fn decode(bytes: &[u8]) -> Result<Self, BackupError> {
        if bytes.get(..8) != Some(MAGIC) {
            return Err(BackupError::NotABackup);
        }
        if !is_sealed(bytes) {
            return Err(BackupError::Altered { at: 0, what: "the checksum of the header differs" });
        }
        if u16::from_le_bytes(field(bytes, 10)) > VERSION {
            return Err(BackupError::Newer(u16::from_le_bytes(field(bytes, 8))));
        }
        Ok(Self {
            image: TxId(number(bytes, 16)),
            last: TxId(number(bytes, 24)),
            epoch: Epoch(number(bytes, 32)),
            made_ms: number(bytes, 40),
            cluster_id: text(&bytes[48..96]),
            pool_id: text(&bytes[96..144]),
        })
    }
}

/// Makes the bytes of a backup, in the order in which they lie in it.
#[derive(Default)]
pub struct BackupEncoder {
    digest: Sha256,
    bytes: u64,
    sections: u32,
    crc: u32,
}

impl BackupEncoder {
    fn count(&mut self, bytes: &[u8]) {
        self.digest.update(bytes);
        self.bytes += bytes.len() as u64;
    }

    /// First of all.
    pub fn header(&mut self, header: &BackupHeader) -> Vec<u8> {
        let out = header.encode().to_vec();
        self.count(&out);
        out
    }

    /// Begins a section of `length` bytes.
    pub fn begin(&mut self, kind: SectionKind, section: TxId, length: u64) -> Vec<u8> {
        let mut out = vec![0; SECTION_BYTES];
        out[..4].copy_from_slice(SECTION_MAGIC);
        out[4] = match kind {
            SectionKind::Image => 1,
            SectionKind::Log => 2,
        };
        out[8..16].copy_from_slice(&section.0.to_le_bytes());
        out[16..24].copy_from_slice(&length.to_le_bytes());
        seal(&mut out);
        self.count(&out);
        self.crc = 0;
        self.sections += 1;
        out
    }

    /// Takes note of contents of the section; they go out as they are.
    pub fn contents(&mut self, bytes: &[u8]) {
        self.count(bytes);
        self.crc = crc32c::crc32c_append(self.crc, bytes);
    }

    /// Ends the section.
    pub fn end(&mut self) -> Vec<u8> {
        let out = self.crc.to_le_bytes().to_vec();
        self.count(&out);
        out
    }

    /// Last of all.
    pub fn trailer(self) -> Vec<u8> {
        let mut out = vec![0; TRAILER_BYTES];
        out[..4].copy_from_slice(TRAILER_MAGIC);
        out[4..8].copy_from_slice(&self.sections.to_le_bytes());
        out[8..16].copy_from_slice(&(self.bytes + TRAILER_BYTES as u64).to_le_bytes());
        out[16..48].copy_from_slice(&self.digest.finalize());
        seal(&mut out);
        out
    }
}

/// What the next bytes are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Next {
    Header,
    /// Of a section, or the trailer.
    Head,
    Contents {
        left: u64,
        crc: u32,
    },
    ContentsCrc {
        crc: u32,
    },
    Trailer,
    Nothing,
}

/// Checks a backup that comes in pieces, whatever their size.
pub struct BackupCheck {
    next: Next,
    head: Vec<u8>,
    at: u64,
    digest: Sha256,
    header: Option<BackupHeader>,
    sections: Vec<Section>,
}

impl Default for BackupCheck {
    fn default() -> Self {
        Self { next: Next::Header, head: Vec::new(), at: 0, digest: Sha256::new(), header: None, sections: Vec::new() }
    }
}

impl BackupCheck {
    /// Takes the next bytes.
    pub fn feed(&mut self, mut bytes: &[u8]) -> Result<(), BackupError> {
        while !bytes.is_empty() {
            bytes = self.step(bytes)?;
        }
        Ok(())
    }

    fn altered(&self, what: &'static str) -> BackupError {
        BackupError::Altered { at: self.at - self.head.len() as u64, what }
    }

    /// Takes some of `bytes`; returns the rest.
    fn step<'a>(&mut self, bytes: &'a [u8]) -> Result<&'a [u8], BackupError> {
        if let Next::Contents { left, crc } = self.next {
            let (now, rest) = bytes.split_at(bytes.len().min(usize::try_from(left).unwrap_or(usize::MAX)));
            self.digest.update(now);
            self.at += now.len() as u64;
            let (left, crc) = (left - now.len() as u64, crc32c::crc32c_append(crc, now));
            self.next = if left == 0 { Next::ContentsCrc { crc } } else { Next::Contents { left, crc } };
            return Ok(rest);
        }
        let wanted = match self.next {
            Next::Header => HEADER_BYTES,
            Next::Head => SECTION_BYTES,
            Next::ContentsCrc { .. } => 4,
            Next::Trailer => TRAILER_BYTES,
            Next::Contents { .. } | Next::Nothing => return Err(self.altered("something follows the trailer")),
        };
        let (now, rest) = bytes.split_at(bytes.len().min(wanted - self.head.len()));
        self.head.extend_from_slice(now);
        self.at += now.len() as u64;
        // What is no backup shall be told from its first bytes, however short it is.
        if self.next == Next::Header && !MAGIC.starts_with(&self.head[..self.head.len().min(8)]) {
            return Err(BackupError::NotABackup);
        }
        if self.head.len() == wanted {
            self.take_head()?;
        }
        Ok(rest)
    }

    /// A whole piece of fixed size is there.
    fn take_head(&mut self) -> Result<(), BackupError> {
        match self.next {
            Next::Head if self.head.starts_with(TRAILER_MAGIC) => {
                self.next = Next::Trailer;
                return Ok(());
            }
            Next::Trailer => return self.take_trailer(),
            Next::Header => {
                self.header = Some(BackupHeader::decode(&self.head)?);
                self.next = Next::Head;
            }
            Next::ContentsCrc { crc } => {
                if self.head != crc.to_le_bytes() {
                    return Err(self.altered("the checksum of a section differs"));
                }
                self.next = Next::Head;
            }
            _ => self.take_section()?,
        }
        self.digest.update(&self.head);
        self.head.clear();
        Ok(())
    }

    fn take_section(&mut self) -> Result<(), BackupError> {
        if !self.head.starts_with(SECTION_MAGIC) || !is_sealed(&self.head) {
            return Err(self.altered("the head of a section is damaged"));
        }
        let kind = match self.head[4] {
            1 => SectionKind::Image,
            2 => SectionKind::Log,
            _ => return Err(self.altered("a section is of an unknown kind")),
        };
        if self.sections.len() >= MAX_SECTIONS {
            return Err(self.altered("there are too many sections"));
        }
        let (section, length) = (TxId(number(&self.head, 8)), number(&self.head, 16));
        self.sections.push(Section { kind, number: section, offset: self.at, length });
        self.next = if length == 0 { Next::ContentsCrc { crc: 0 } } else { Next::Contents { left: length, crc: 0 } };
        Ok(())
    }

    fn take_trailer(&mut self) -> Result<(), BackupError> {
        let head = std::mem::take(&mut self.head);
        let at = self.at - TRAILER_BYTES as u64;
        let altered = |what| Err(BackupError::Altered { at, what });
        if !is_sealed(&head) {
            return altered("the trailer is damaged");
        }
        if u32::from_le_bytes(field(&head, 4)) as usize != self.sections.len() || number(&head, 8) != self.at {
            return altered("the trailer does not fit what is before it");
        }
        let digest = std::mem::take(&mut self.digest).finalize();
        if digest[..] != head[16..48] {
            return altered("the digest of the whole differs");
        }
        self.next = Next::Nothing;
        Ok(())
    }

    /// All bytes were given: what the backup says of itself, and where its sections lie.
    pub fn finish(self) -> Result<(BackupHeader, Vec<Section>), BackupError> {
        match self.header {
            Some(header) if self.next == Next::Nothing => Ok((header, self.sections)),
            None if self.at == 0 => Err(BackupError::NotABackup),
            _ => Err(BackupError::Cut(self.at)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> BackupHeader {
        BackupHeader {
            image: TxId(40),
            last: TxId(99),
            epoch: Epoch(3),
            made_ms: 1_700_000_000_000,
            cluster_id: "11111111-2222-4333-8444-555555555555".into(),
            pool_id: "BP-11111111-2222-4333-8444-555555555555".into(),
        }
    }

    fn backup() -> Vec<u8> {
        let mut encoder = BackupEncoder::default();
        let mut out = encoder.header(&header());
        for (kind, section, contents) in [
            (SectionKind::Image, 40, &b"an image"[..]),
            (SectionKind::Log, 41, b"a segment"),
            (SectionKind::Log, 90, b""),
        ] {
            out.extend(encoder.begin(kind, TxId(section), contents.len() as u64));
            encoder.contents(contents);
            out.extend_from_slice(contents);
            out.extend(encoder.end());
        }
        out.extend(encoder.trailer());
        out
    }

    fn check(bytes: &[u8], piece: usize) -> Result<(BackupHeader, Vec<Section>), BackupError> {
        let mut check = BackupCheck::default();
        for piece in bytes.chunks(piece) {
            check.feed(piece)?;
        }
        check.finish()
    }

    #[test]
    fn reads_back_in_pieces_of_any_size() {
        let bytes = backup();
        for piece in [1, 7, 64, 4_096] {
            let (found, sections) = check(&bytes, piece).unwrap();
            assert_eq!(found, header());
            let contents: Vec<&[u8]> =
                sections.iter().map(|s| &bytes[s.offset as usize..(s.offset + s.length) as usize]).collect();
            assert_eq!(contents, [&b"an image"[..], b"a segment", b""]);
            assert_eq!(sections.iter().map(|s| s.number.0).collect::<Vec<_>>(), [40, 41, 90]);
        }
    }

    #[test]
    fn a_cut_at_each_byte_is_told_as_a_cut() {
        let bytes = backup();
        for length in 1..bytes.len() {
            assert_eq!(check(&bytes[..length], 50).unwrap_err(), BackupError::Cut(length as u64));
        }
        assert_eq!(check(&[], 1).unwrap_err(), BackupError::NotABackup);
        assert_eq!(check(b"#!/bin/sh\n", 4).unwrap_err(), BackupError::NotABackup);
    }

    #[test]
    fn a_flipped_bit_anywhere_is_refused() {
        let bytes = backup();
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut altered = bytes.clone();
                altered[at] ^= 1 << bit;
                assert!(check(&altered, 33).is_err(), "bit {bit} of byte {at}");
            }
        }
        let mut longer = bytes;
        longer.push(0);
        assert!(matches!(check(&longer, 33), Err(BackupError::Altered { .. })));
    }
}

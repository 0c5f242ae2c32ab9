//! What a job keeps of a file's content on a node for the jobs after it: one local file for each stretch of content.
//!
//! The file's name says what it holds ([`KeptName`]). In it are chunks, one after the other, so that a reader may start at any of them:
//!
//! | at | size | field | |
//! |---|---|---|---|
//! | 0 | 4 | length | of the data, 1 to [`MAX_CHUNK_BYTES`], little endian |
//! | 4 | 4 | crc | CRC-32 of the length's 4 bytes and the data, little endian |
//! | 8 | | data | |
//!
//! Nothing in it is synced: it is as good as the page cache that it lies in, and what does not fit its CRC is read from the cluster instead.

use std::fmt;

/// Bytes before the data of a chunk.
pub const CHUNK_HEADER_BYTES: usize = 8;
/// Longest data of a chunk.
pub const MAX_CHUNK_BYTES: usize = 1 << 20;

/// What a file of kept content holds. Its text form is the file's name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KeptName {
    /// The cluster's file: `FileStatus.inode`, `modified_ms` and `length`. With another value in any of them it is another content.
    pub inode: u64,
    /// See `inode`.
    pub modified_ms: u64,
    /// See `inode`.
    pub length: u64,
    /// Offset of the first byte kept.
    pub start: u64,
    /// Bytes kept.
    pub bytes: u64,
    /// It is what a compressed file holds, all of it; else bytes of the file.
    pub decoded: bool,
    /// A task wrote it; else one read it.
    pub written: bool,
}

impl KeptName {
    /// The name's parts; `None` if it is no such name.
    pub fn parse(name: &str) -> Option<Self> {
        let mut parts = name.split('.');
        let mut number = || u64::from_str_radix(parts.next()?, 16).ok();
        let (inode, modified_ms, length, start, bytes) = (number()?, number()?, number()?, number()?, number()?);
        let (decoded, written) = match (parts.next()?, parts.next()) {
            ("raw", None) => (false, false),
            ("content", None) => (true, false),
            ("written", None) => (false, true),
            _ => return None,
        };
        start.checked_add(bytes)?;
        let found = Self { inode, modified_ms, length, start, bytes, decoded, written };
        // Only what would be written: another spelling names no file that is looked for.
        (found.to_string() == name).then_some(found)
    }

    /// Offset behind the last byte kept.
    pub fn end(&self) -> u64 {
        self.start + self.bytes
    }
}

/// What the names start with of files that a process is writing.
pub fn aside_prefix(pid: u32) -> String {
    format!("aside-{pid}-")
}

impl fmt::Display for KeptName {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { inode, modified_ms, length, start, bytes, decoded, written } = self;
        let kind = match (decoded, written) {
            (true, _) => "content",
            (false, true) => "written",
            (false, false) => "raw",
        };
        write!(out, "{inode:x}.{modified_ms:x}.{length:x}.{start:x}.{bytes:x}.{kind}")
    }
}

/// The header of a chunk of `data`.
pub fn chunk_header(data: &[u8]) -> [u8; CHUNK_HEADER_BYTES] {
    let length = (data.len() as u32).to_le_bytes();
    let mut out = [0; CHUNK_HEADER_BYTES];
    out[..4].copy_from_slice(&length);
    out[4..].copy_from_slice(&crc_of(length, data).to_le_bytes());
    out
}

/// Length of a chunk's data; `None` if there can be no such chunk.
pub fn chunk_length(header: &[u8; CHUNK_HEADER_BYTES]) -> Option<usize> {
    let [a, b, c, d, ..] = *header;
    let length = u32::from_le_bytes([a, b, c, d]) as usize;
    (1..=MAX_CHUNK_BYTES).contains(&length).then_some(length)
}

/// Does the data fit its header?
pub fn chunk_fits(header: &[u8; CHUNK_HEADER_BYTES], data: &[u8]) -> bool {
    let [length @ .., _, _, _, _] = *header;
    chunk_length(header) == Some(data.len()) && crc_of(length, data).to_le_bytes() == header[4..]
}

fn crc_of(length: [u8; 4], data: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&length);
    hasher.update(data);
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_says_what_is_kept() {
        let name = KeptName {
            inode: 31,
            modified_ms: 1 << 40,
            length: 500,
            start: 7,
            bytes: 90,
            decoded: false,
            written: false,
        };
        assert_eq!(name.to_string(), "1f.10000000000.1f4.7.5a.raw");
        for name in [name, KeptName { decoded: true, ..name }, KeptName { written: true, ..name }] {
            assert_eq!(KeptName::parse(&name.to_string()), Some(name));
        }
        let over = format!("1.1.1.{:x}.1.raw", u64::MAX);
        for bad in [
            "",
            "aside-7",
            "1.2.3.4.5",
            "1.2.3.4.5.raw.x",
            "1.2.3.4.5.other",
            "1.2.3.4.raw",
            "g.2.3.4.5.raw",
            "+1.2.3.4.5.raw",
            "01.2.3.4.5.raw",
            "A.2.3.4.5.raw",
            &over,
        ] {
            assert_eq!(KeptName::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_chunk_that_changed_does_not_fit() {
        let header = chunk_header(b"data");
        assert_eq!(chunk_length(&header), Some(4));
        assert!(chunk_fits(&header, b"data") && !chunk_fits(&header, b"date") && !chunk_fits(&header, b"dat"));
        for at in 0..CHUNK_HEADER_BYTES {
            let mut bad = header;
            bad[at] ^= 1;
            assert!(!chunk_fits(&bad, b"data"), "byte {at}");
        }
        assert_eq!(chunk_length(&chunk_header(b"")), None);
        assert_eq!(chunk_length(&[0xff; CHUNK_HEADER_BYTES]), None);
    }
}

//! Writing and reading sorted runs in the format of [`cairn_proto::mapoutput`].

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use cairn_common::durable::{File, Fs, OpenMode};
use cairn_proto::mapoutput::{
    CHUNK_HEADER_BYTES, CHUNK_RAW_BYTES, ChunkHeader, FOOTER_BYTES, Footer, INDEX_ENTRY_BYTES, MAX_RECORD_BYTES,
    PartitionEntry,
};
use cairn_proto::{Error, ErrorCode, Result};

use super::{UserCounters, decode_varint, encode_count, key_prefix};

/// Compression of runs: they are read once, soon, so speed counts more than size.
const RUN_ZSTD_LEVEL: i32 = 1;
const WRITE_BYTES: usize = 512 << 10;
/// A chunk that shrinks by less than one part in so many was not worth the time.
const WORTH_DIVISOR: usize = 10;
/// Most chunks that are stored as they are before compression is tried again.
const MAX_UNTRIED: u32 = 64;

/// Tries compression where it has paid lately: records of random bytes would cost a core and gain nothing.
#[derive(Default)]
struct Worth {
    /// Chunks still to be stored untried.
    untried: u32,
    /// How many there are after the next failure.
    pause: u32,
}

impl Worth {
    /// Is the next chunk to be compressed?
    fn try_next(&mut self) -> bool {
        let due = self.untried == 0;
        self.untried = self.untried.saturating_sub(1);
        due
    }

    fn learn(&mut self, raw: usize, packed: usize) {
        if packed + raw / WORTH_DIVISOR <= raw {
            self.pause = 0;
        } else {
            self.pause = (self.pause * 2).clamp(1, MAX_UNTRIED);
            self.untried = self.pause;
        }
    }
}

/// Writes one file of sorted partitions.
pub struct RunWriter {
    path: PathBuf,
    file: Arc<dyn File>,
    /// Bytes handed to the file.
    written: u64,
    /// Stored bytes not yet handed to the file.
    ahead: Vec<u8>,
    /// Records of the chunk being filled.
    raw: Vec<u8>,
    packed: Vec<u8>,
    compressor: zstd::bulk::Compressor<'static>,
    worth: Worth,
    entries: Vec<PartitionEntry>,
    current: PartitionEntry,
}

impl RunWriter {
    /// Starts a file that must not exist.
    pub fn create(fs: &dyn Fs, path: &Path) -> Result<Self> {
        let file = fs.open(path, OpenMode::Create).map_err(|error| failed("create", path, &error))?;
        let compressor =
            zstd::bulk::Compressor::new(RUN_ZSTD_LEVEL).map_err(|error| failed("compress", path, &error))?;
        Ok(Self {
            path: path.to_owned(),
            file,
            written: 0,
            ahead: Vec::with_capacity(WRITE_BYTES + CHUNK_RAW_BYTES),
            raw: Vec::with_capacity(CHUNK_RAW_BYTES + 1024),
            packed: Vec::new(),
            compressor,
            worth: Worth::default(),
            entries: Vec::new(),
            current: PartitionEntry::default(),
        })
    }

    /// Adds a record to the current partition; the caller keeps the order.
    #[inline]
    pub fn push(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        let size = key.len() + value.len();
        if self.raw.len() + size > CHUNK_RAW_BYTES {
            check_record(size)?;
            self.end_chunk()?;
        }
        let mut scratch = [0; 10];
        self.raw.extend_from_slice(encode_count(key.len() as u64, &mut scratch));
        self.raw.extend_from_slice(encode_count(value.len() as u64, &mut scratch));
        self.raw.extend_from_slice(key);
        self.raw.extend_from_slice(value);
        self.current.records += 1;
        Ok(())
    }

    fn end_chunk(&mut self) -> Result<()> {
        if self.raw.is_empty() {
            return Ok(());
        }
        let compressed = self.worth.try_next() && self.compress()?;
        let stored = if compressed { &self.packed } else { &self.raw };
        self.ahead.extend_from_slice(&ChunkHeader::encode(compressed, self.raw.len(), stored));
        self.ahead.extend_from_slice(stored);
        self.current.stored += (CHUNK_HEADER_BYTES + stored.len()) as u64;
        self.current.raw += self.raw.len() as u64;
        self.raw.clear();
        if self.ahead.len() >= WRITE_BYTES {
            self.write_ahead()?;
        }
        Ok(())
    }

    /// Compresses the chunk; false if it is better stored as it is.
    fn compress(&mut self) -> Result<bool> {
        self.packed.clear();
        self.packed.reserve(zstd::zstd_safe::compress_bound(self.raw.len()));
        let packed = self.compressor.compress_to_buffer(&self.raw, &mut self.packed);
        let packed = packed.map_err(|error| failed("compress", &self.path, &error))?;
        self.worth.learn(self.raw.len(), packed);
        Ok(packed < self.raw.len())
    }

    fn write_ahead(&mut self) -> Result<()> {
        let result = self.file.write_all_at(&self.ahead, self.written);
        result.map_err(|error| failed("write", &self.path, &error))?;
        self.written += self.ahead.len() as u64;
        self.ahead.clear();
        Ok(())
    }

    /// Ends the current partition and starts the next.
    pub fn end_partition(&mut self) -> Result<()> {
        self.end_chunk()?;
        let next = PartitionEntry { offset: self.current.offset + self.current.stored, ..Default::default() };
        self.entries.push(std::mem::replace(&mut self.current, next));
        Ok(())
    }

    /// Writes index and footer. Partitions must have been ended.
    pub fn finish(mut self) -> Result<Vec<PartitionEntry>> {
        let index_offset = self.current.offset;
        for (number, entry) in self.entries.iter().enumerate() {
            self.ahead.extend_from_slice(&entry.encode(number as u32));
        }
        let footer = Footer { partitions: self.entries.len() as u32, index_offset };
        self.ahead.extend_from_slice(&footer.encode());
        self.write_ahead()?;
        Ok(self.entries)
    }
}

/// Refuses a record that no chunk can hold.
pub(crate) fn check_record(size: usize) -> Result<()> {
    if size <= MAX_RECORD_BYTES {
        return Ok(());
    }
    let text = format!("a record of {size} bytes is longer than the limit of {MAX_RECORD_BYTES}");
    Err(Error::new(ErrorCode::InvalidArgument, text))
}

fn failed(doing: &str, path: &Path, error: &std::io::Error) -> Error {
    Error::io(format!("cannot {doing} {}", path.display()), error).with_subject(path.display().to_string())
}

/// The index of a file written by [`RunWriter`].
pub fn read_index(file: &dyn File, path: &Path) -> Result<Vec<PartitionEntry>> {
    let named = |error: Error| Error::new(error.code(), format!("{}: {}", path.display(), error.message()));
    let unread = |error: std::io::Error| failed("read", path, &error);
    let length = file.len().map_err(unread)?;
    let mut bytes = [0; FOOTER_BYTES];
    let at = length.checked_sub(FOOTER_BYTES as u64).ok_or_else(|| {
        Error::new(ErrorCode::Corrupt, format!("{}: {length} bytes are no map output", path.display()))
    })?;
    file.read_exact_at(&mut bytes, at).map_err(unread)?;
    let footer = Footer::decode(&bytes, length).map_err(named)?;
    let mut index = vec![0; footer.partitions as usize * INDEX_ENTRY_BYTES];
    file.read_exact_at(&mut index, footer.index_offset).map_err(unread)?;
    let (entries, _) = index.as_chunks::<INDEX_ENTRY_BYTES>();
    let inside =
        |entry: &PartitionEntry| entry.offset.checked_add(entry.stored).is_some_and(|end| end <= footer.index_offset);
    let decode = |(entry, number): (&[u8; INDEX_ENTRY_BYTES], u32)| {
        let entry = PartitionEntry::decode(entry, number)?;
        if inside(&entry) {
            return Ok(entry);
        }
        Err(Error::new(ErrorCode::Corrupt, format!("partition {number} lies outside of its file")))
    };
    entries.iter().zip(0..).map(|found| decode(found).map_err(named)).collect()
}

/// Where the bytes of a run come from.
pub enum RunBytes {
    /// Memory.
    Memory(Bytes),
    /// A range of a file.
    File {
        /// The open file.
        file: Arc<dyn File>,
        /// Its name, for messages.
        path: PathBuf,
        /// Next byte.
        at: u64,
        /// First byte after the run.
        end: u64,
    },
}

impl RunBytes {
    /// One partition of a file.
    pub fn partition(file: Arc<dyn File>, path: &Path, entry: &PartitionEntry) -> Self {
        Self::File { file, path: path.to_owned(), at: entry.offset, end: entry.offset + entry.stored }
    }

    fn remaining(&self) -> u64 {
        match self {
            Self::Memory(bytes) => bytes.len() as u64,
            Self::File { at, end, .. } => end - at,
        }
    }

    fn take(&mut self, out: &mut [u8]) -> Result<()> {
        if self.remaining() < out.len() as u64 {
            let text = format!("a run ends {} bytes early", out.len() as u64 - self.remaining());
            return Err(Error::new(ErrorCode::Corrupt, text));
        }
        match self {
            Self::Memory(bytes) => out.copy_from_slice(&bytes.split_to(out.len())),
            Self::File { file, path, at, .. } => {
                file.read_exact_at(out, *at).map_err(|error| failed("read", path, &error))?;
                *at += out.len() as u64;
            }
        }
        Ok(())
    }
}

thread_local! {
    /// One decoder per thread serves all runs that it merges.
    static DECODER: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
}

pub(super) fn decompress(stored: &[u8], raw_len: usize, raw: &mut Vec<u8>) -> Result<()> {
    let result = DECODER.with_borrow_mut(|slot| {
        let decoder = match slot {
            Some(decoder) => decoder,
            None => slot.insert(zstd::bulk::Decompressor::new()?),
        };
        raw.clear();
        raw.reserve_exact(raw_len);
        decoder.decompress_to_buffer(stored, raw)
    });
    match result {
        Ok(n) if n == raw_len => Ok(()),
        Ok(n) => Err(Error::new(ErrorCode::Corrupt, format!("a chunk of {raw_len} bytes decompresses to {n}"))),
        Err(error) => Err(Error::new(ErrorCode::Corrupt, format!("a chunk does not decompress: {error}"))),
    }
}

/// Reads the records of one run, one chunk in memory at a time.
pub struct RunReader {
    source: RunBytes,
    /// Is told of every chunk.
    watcher: Option<UserCounters>,
    raw: Vec<u8>,
    packed: Vec<u8>,
    /// Where the record after the current one starts in `raw`.
    next: usize,
    key: std::ops::Range<usize>,
    value: std::ops::Range<usize>,
    prefix: u64,
}

impl RunReader {
    /// Starts before the first record.
    pub fn new(source: RunBytes) -> Self {
        Self { source, watcher: None, raw: Vec::new(), packed: Vec::new(), next: 0, key: 0..0, value: 0..0, prefix: 0 }
    }

    /// Tells `user` that the task lives, whenever a chunk is read.
    #[must_use]
    pub fn watched(mut self, user: &UserCounters) -> Self {
        self.watcher = Some(user.clone());
        self
    }

    /// Moves to the next record; false at the end.
    #[inline]
    pub fn advance(&mut self) -> Result<bool> {
        if self.next == self.raw.len() && !self.next_chunk()? {
            return Ok(false);
        }
        let rest = &self.raw[self.next..];
        let lengths = decode_varint(rest).and_then(|(key, a)| {
            let (value, b) = decode_varint(&rest[a..])?;
            Some((key as usize, value as usize, a + b))
        });
        let fits = |&(key, value, used): &(usize, usize, usize)| {
            used.checked_add(key).and_then(|n| n.checked_add(value)).is_some_and(|n| n <= rest.len())
        };
        let Some((key, value, used)) = lengths.filter(fits) else {
            return Err(Error::new(ErrorCode::Corrupt, "a record of a run does not fit its chunk"));
        };
        let start = self.next + used;
        self.key = start..start + key;
        self.value = start + key..start + key + value;
        self.next = self.value.end;
        self.prefix = key_prefix(&self.raw[self.key.clone()]);
        Ok(true)
    }

    fn next_chunk(&mut self) -> Result<bool> {
        if self.source.remaining() == 0 {
            return Ok(false);
        }
        if let Some(user) = &self.watcher {
            user.progressed();
        }
        let mut header = [0; CHUNK_HEADER_BYTES];
        self.source.take(&mut header)?;
        let header = ChunkHeader::decode(&header)?;
        self.packed.resize(header.stored_len as usize, 0);
        self.source.take(&mut self.packed)?;
        header.verify(&self.packed)?;
        if header.compressed {
            decompress(&self.packed, header.raw_len as usize, &mut self.raw)?;
        } else if header.raw_len == header.stored_len {
            std::mem::swap(&mut self.raw, &mut self.packed);
        } else {
            return Err(Error::new(ErrorCode::Corrupt, "a chunk that is stored as it is has two lengths"));
        }
        self.next = 0;
        Ok(true)
    }

    /// Key of the current record.
    #[inline]
    pub fn key(&self) -> &[u8] {
        &self.raw[self.key.clone()]
    }

    /// Value of the current record.
    #[inline]
    pub fn value(&self) -> &[u8] {
        &self.raw[self.value.clone()]
    }

    /// [`key_prefix`] of the current key.
    #[inline]
    pub(crate) fn prefix(&self) -> u64 {
        self.prefix
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_common::durable::SystemFs;

    type Records = Vec<(Vec<u8>, Vec<u8>)>;

    fn write(path: &Path, partitions: &[Records]) -> Vec<PartitionEntry> {
        let mut writer = RunWriter::create(&SystemFs, path).unwrap();
        for partition in partitions {
            for (key, value) in partition {
                writer.push(key, value).unwrap();
            }
            writer.end_partition().unwrap();
        }
        writer.finish().unwrap()
    }

    fn read(path: &Path) -> Result<Vec<Records>> {
        let file = SystemFs.open(path, OpenMode::Read).unwrap();
        let mut out = Vec::new();
        for entry in read_index(&*file, path)? {
            let mut reader = RunReader::new(RunBytes::partition(Arc::clone(&file), path, &entry));
            let mut records = Vec::new();
            while reader.advance()? {
                records.push((reader.key().to_vec(), reader.value().to_vec()));
            }
            assert_eq!(records.len() as u64, entry.records);
            out.push(records);
        }
        Ok(out)
    }

    fn sample() -> Vec<Records> {
        let many = (0..50_000u32).map(|i| (format!("key{i:06}").into_bytes(), i.to_le_bytes().to_vec())).collect();
        let large = vec![(vec![7; 300_000], vec![8; 1_000_000]), (b"z".to_vec(), Vec::new())];
        vec![many, Vec::new(), large, vec![(Vec::new(), b"empty key".to_vec())]]
    }

    #[test]
    fn partitions_come_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run");
        let entries = write(&path, &sample());
        assert_eq!(entries.len(), 4);
        assert_eq!(read(&path).unwrap(), sample());
    }

    #[test]
    fn damage_is_noticed_wherever_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run");
        let records: Vec<_> = (0..300u32).map(|i| (i.to_be_bytes().to_vec(), b"value".to_vec())).collect();
        let want = vec![records.clone(), records];
        write(&path, &want);
        let file = SystemFs.open(&path, OpenMode::Write).unwrap();
        let length = file.len().unwrap();
        for at in 0..length {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
            match read(&path) {
                Err(error) => assert_eq!(error.code(), ErrorCode::Corrupt, "{error}"),
                // Only the four zero bytes at an index entry's end carry nothing.
                Ok(got) => assert!(got == want && (length - at) < 32 + 80, "byte {at} was altered unnoticed"),
            }
            file.write_all_at(&byte, at).unwrap();
        }
        for keep in 0..length {
            let cut = dir.path().join(format!("cut{keep}"));
            let mut bytes = vec![0; keep as usize];
            file.read_exact_at(&mut bytes, 0).unwrap();
            SystemFs.open(&cut, OpenMode::Create).unwrap().write_all_at(&bytes, 0).unwrap();
            assert_eq!(read(&cut).unwrap_err().code(), ErrorCode::Corrupt, "cut at {keep}");
        }
    }

    #[test]
    fn compression_is_given_up_where_it_gains_nothing_and_taken_up_again() {
        let mut worth = Worth::default();
        let mut tried = Vec::new();
        for chunk in 0..1_000u32 {
            if worth.try_next() {
                tried.push(chunk);
                // Random bytes up to a point, text behind it.
                worth.learn(1_000, if chunk < 300 { 990 } else { 300 });
            }
        }
        assert_eq!(tried[..9], [0, 2, 5, 10, 19, 36, 69, 134, 199]);
        let taken_up = tried.iter().position(|chunk| *chunk >= 300).unwrap();
        assert!(tried[taken_up] < 300 + MAX_UNTRIED + 1 && tried[taken_up..].len() as u32 == 1_000 - tried[taken_up]);
    }

    #[test]
    fn a_record_beyond_the_limit_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = RunWriter::create(&SystemFs, &dir.path().join("run")).unwrap();
        let error = writer.push(b"k", &vec![0; MAX_RECORD_BYTES]).unwrap_err();
        assert!(error.message().contains("longer than the limit"), "{error}");
    }
}

//! From the bytes of a split to batches of whole records.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use cairn_proto::{Error, ErrorCode, Result, pb};

use super::Record;
pub use super::compression::Decompress;
use super::container::{self, ContainerReader};
use super::format::InputFormat;
use super::text::{Delimiter, SplitReader};

/// Where a split's bytes come from, in order, without gaps.
pub trait Feed {
    /// The next bytes; `None` at the end of the file.
    fn next(&mut self) -> Result<Option<Bytes>>;
}

impl<F: Feed + ?Sized> Feed for Box<F> {
    fn next(&mut self) -> Result<Option<Bytes>> {
        (**self).next()
    }
}

/// How a batch's bytes are cut into records.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Cut {
    Delimiter(Delimiter),
    KeyValueText(u8),
    Fixed(usize),
    /// Lengths of key and value, key, value; checked when the batch was made.
    Packed,
    Whole,
    /// No bytes: this many numbers from the batch's offset on.
    Numbers(u64),
}

/// Whole records, one after the other. Text has its delimiters (the last record of a file may have none).
#[derive(Clone, Debug)]
pub struct Batch {
    /// The bytes as they are in the file, decompressed.
    pub bytes: Bytes,
    /// Where they start in the file (in its content, if all of it is compressed).
    pub offset: u64,
    /// Position of the file among the job's inputs.
    pub file_index: u32,
    /// The file.
    pub path: Arc<str>,
    pub(super) cut: Cut,
}

impl Batch {
    /// Its records. Empty lines are records, empty words are not.
    pub fn records(&self) -> Records<'_> {
        Records { batch: self, at: 0 }
    }
}

/// The records of a [`Batch`].
pub struct Records<'a> {
    batch: &'a Batch,
    at: usize,
}

impl<'a> Records<'a> {
    fn delimited(&mut self, delimiter: Delimiter) -> Option<Record<'a>> {
        let batch = self.batch;
        loop {
            let rest = &batch.bytes[self.at..];
            if rest.is_empty() {
                return None;
            }
            let end = delimiter.first(rest).unwrap_or(rest.len());
            let record = self.record(&[], &rest[..end]);
            self.at += (end + 1).min(rest.len());
            if !record.bytes.is_empty() || delimiter == Delimiter::Newline {
                return Some(record);
            }
        }
    }

    fn record(&self, key: &'a [u8], bytes: &'a [u8]) -> Record<'a> {
        Record { file_index: self.batch.file_index, offset: self.batch.offset + self.at as u64, key, bytes }
    }

    fn take(&mut self, length: usize) -> Option<Record<'a>> {
        let bytes = self.batch.bytes.get(self.at..self.at + length)?;
        let record = self.record(&[], bytes);
        self.at += length;
        Some(record)
    }
}

impl<'a> Iterator for Records<'a> {
    type Item = Record<'a>;

    #[inline]
    fn next(&mut self) -> Option<Record<'a>> {
        match self.batch.cut {
            Cut::Delimiter(delimiter) => self.delimited(delimiter),
            Cut::KeyValueText(separator) => {
                let line = self.delimited(Delimiter::Newline)?;
                let at = memchr::memchr(separator, line.bytes);
                let (key, value) = at.map_or((line.bytes, &[][..]), |at| (&line.bytes[..at], &line.bytes[at + 1..]));
                Some(Record { key, bytes: value, ..line })
            }
            Cut::Fixed(length) => self.take(length),
            Cut::Packed => {
                let (key, value, length) = container::record(&self.batch.bytes[self.at..])?;
                self.at += length;
                // The place of a record inside a compressed chunk means nothing: the chunk's is told.
                Some(Record { file_index: self.batch.file_index, offset: self.batch.offset, key, bytes: value })
            }
            // Its only record may be empty: the position beside it tells whether it was taken.
            Cut::Whole => {
                if self.at > self.batch.bytes.len() {
                    return None;
                }
                let record = self.record(&[], &self.batch.bytes);
                self.at = self.batch.bytes.len() + 1;
                Some(record)
            }
            Cut::Numbers(count) => {
                let number = self.at as u64;
                let record = self.record(&[], &[]);
                self.at += 1;
                (number < count).then_some(record)
            }
        }
    }
}

/// First byte that the feed of a split must deliver. (Of [`InputFormat::KeyValue`] the first [`container::HEADER_BYTES`] of the file come before that.)
pub fn feed_start(split: &pb::Split, format: InputFormat) -> u64 {
    if format.compression(&split.path).is_some() {
        return 0;
    }
    match format {
        InputFormat::Lines | InputFormat::Words | InputFormat::KeyValueText { .. } => split.offset.saturating_sub(1),
        InputFormat::Fixed(length) => split.offset.next_multiple_of(u64::from(length.max(1))),
        InputFormat::KeyValue => container::feed_start(split),
        InputFormat::WholeFile | InputFormat::Generated { .. } => 0,
    }
}

/// The feed of a split.
pub type BoxedFeed = Box<dyn Feed + Send>;

/// Makes the batches of one split.
pub enum BatchReader {
    /// Text.
    Text(SplitReader<BoxedFeed>),
    /// Records of one length.
    Fixed(FixedReader<BoxedFeed>),
    /// Binary keys and values.
    Container(ContainerReader),
    /// One record.
    Whole(WholeReader<BoxedFeed>),
    /// Numbers; no feed.
    Numbers(NumberReader),
}

/// What the split's file holds, of which `feed` gives the bytes: decompressed if its name says that it is compressed.
pub fn content_of(split: &pb::Split, format: InputFormat, feed: BoxedFeed) -> Result<BoxedFeed> {
    Ok(match format.compression(&split.path) {
        Some(kind) => Box::new(Decompress::new(kind, split.path.as_str().into(), feed)?),
        None => feed,
    })
}

impl BatchReader {
    /// Reads `split` from its content ([`content_of`]) from [`feed_start`] on. `memory`: bytes that a whole file may have.
    pub fn new(split: &pb::Split, format: InputFormat, memory: u64, feed: impl Feed + Send + 'static) -> Result<Self> {
        let (mut split, feed): (_, BoxedFeed) = (split.clone(), Box::new(feed));
        if format.compression(&split.path).is_some() {
            // The split is all of the file, however long its content is.
            (split.offset, split.length) = (0, u64::MAX / 2);
        }
        let text = |delimiter, cut, feed| Self::Text(SplitReader::new(&split, delimiter, cut, feed));
        Ok(match format {
            InputFormat::Lines => text(Delimiter::Newline, Cut::Delimiter(Delimiter::Newline), feed),
            InputFormat::Words => text(Delimiter::WhiteSpace, Cut::Delimiter(Delimiter::WhiteSpace), feed),
            InputFormat::KeyValueText { separator } => text(Delimiter::Newline, Cut::KeyValueText(separator), feed),
            InputFormat::Fixed(length) => Self::Fixed(FixedReader::new(&split, length, feed)?),
            InputFormat::KeyValue => Self::Container(ContainerReader::new(&split, feed)),
            InputFormat::WholeFile => {
                Self::Whole(WholeReader { source: Source::of(&split), memory, feed, done: false })
            }
            InputFormat::Generated { .. } => Self::Numbers(NumberReader::new(&split)),
        })
    }

    /// The next batch; `None` at the end of the split.
    #[allow(clippy::should_implement_trait)] // it can fail
    pub fn next(&mut self) -> Result<Option<Batch>> {
        match self {
            Self::Text(reader) => reader.next(),
            Self::Fixed(reader) => reader.next(),
            Self::Container(reader) => reader.next(),
            Self::Whole(reader) => reader.next(),
            Self::Numbers(reader) => Ok(reader.next()),
        }
    }
}

/// The file of a split.
pub(super) struct Source {
    path: Arc<str>,
    file_index: u32,
}

impl Source {
    pub(super) fn of(split: &pb::Split) -> Self {
        Self { path: split.path.as_str().into(), file_index: split.file_index }
    }

    pub(super) fn batch(&self, bytes: Bytes, offset: u64, cut: Cut) -> Batch {
        Batch { bytes, offset, file_index: self.file_index, path: Arc::clone(&self.path), cut }
    }

    pub(super) fn refuse<T>(&self, code: ErrorCode, text: &str) -> Result<T> {
        Err(Error::new(code, format!("{}: {text}", self.path)).with_subject(&*self.path))
    }
}

/// Records of one length: those that start in the split.
pub struct FixedReader<F> {
    source: Source,
    length: usize,
    feed: F,
    /// Where `carry` starts in the file.
    offset: u64,
    /// First byte behind the split.
    end: u64,
    carry: BytesMut,
}

impl<F: Feed> FixedReader<F> {
    fn new(split: &pb::Split, length: u32, feed: F) -> Result<Self> {
        let source = Source::of(split);
        if length == 0 {
            return source.refuse(ErrorCode::InvalidArgument, "records cannot have 0 bytes");
        }
        let offset = feed_start(split, InputFormat::Fixed(length));
        let end = split.offset + split.length;
        Ok(Self { source, length: length as usize, feed, offset, end, carry: BytesMut::new() })
    }

    fn next(&mut self) -> Result<Option<Batch>> {
        while self.offset < self.end {
            let Some(chunk) = self.feed.next()? else {
                if self.carry.is_empty() {
                    self.offset = self.end;
                    return Ok(None);
                }
                let text = format!(
                    "the record that starts at byte {} has {} bytes, not {}: the file ends in it",
                    self.offset,
                    self.carry.len(),
                    self.length
                );
                return self.source.refuse(ErrorCode::InvalidArgument, &text);
            };
            let whole = if self.carry.is_empty() {
                // Most of a chunk is passed on as it came.
                let mut whole = chunk;
                let rest = whole.split_off(whole.len() - whole.len() % self.length);
                self.carry.extend_from_slice(&rest);
                whole
            } else {
                self.carry.extend_from_slice(&chunk);
                self.carry.split_to(self.carry.len() - self.carry.len() % self.length).freeze()
            };
            if let Some(batch) = self.cut(whole) {
                return Ok(Some(batch));
            }
        }
        Ok(None)
    }

    /// Takes off what starts behind the split.
    fn cut(&mut self, mut whole: Bytes) -> Option<Batch> {
        let offset = self.offset;
        let mine = (self.end - offset).next_multiple_of(self.length as u64);
        if whole.len() as u64 >= mine {
            whole.truncate(mine as usize);
            self.offset = self.end;
        } else {
            self.offset += whole.len() as u64;
        }
        (!whole.is_empty()).then(|| self.source.batch(whole, offset, Cut::Fixed(self.length)))
    }
}

/// The file as one record.
pub struct WholeReader<F> {
    source: Source,
    memory: u64,
    feed: F,
    done: bool,
}

impl<F: Feed> WholeReader<F> {
    fn next(&mut self) -> Result<Option<Batch>> {
        if std::mem::replace(&mut self.done, true) {
            return Ok(None);
        }
        let mut all = BytesMut::new();
        while let Some(chunk) = self.feed.next()? {
            if (all.len() + chunk.len()) as u64 > self.memory {
                let text = format!(
                    "the file has more than the {} bytes that a task with this memory limit can take as one record",
                    self.memory
                );
                return self.source.refuse(ErrorCode::InvalidArgument, &text);
            }
            all.extend_from_slice(&chunk);
        }
        Ok(Some(self.source.batch(all.freeze(), 0, Cut::Whole)))
    }
}

/// Numbers of records to generate.
pub struct NumberReader {
    next: u64,
    end: u64,
}

impl NumberReader {
    /// Numbers in one batch: small enough for progress to be told.
    const BATCH: u64 = 4_096;

    fn new(split: &pb::Split) -> Self {
        Self { next: split.first_record, end: split.first_record + split.records }
    }

    fn next(&mut self) -> Option<Batch> {
        let count = (self.end - self.next).min(Self::BATCH);
        if count == 0 {
            return None;
        }
        let offset = self.next;
        self.next += count;
        Some(Source::of(&pb::Split::default()).batch(Bytes::new(), offset, Cut::Numbers(count)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mapreduce::testing::Pieces;

    type Found = (u64, Vec<u8>, Vec<u8>);

    fn records(file: &[u8], from: u64, to: u64, format: InputFormat, step: usize) -> Result<Vec<Found>> {
        let split = pb::Split { path: "/f".into(), offset: from, length: to - from, ..Default::default() };
        let start = feed_start(&split, format).min(file.len() as u64);
        let feed = Pieces::of(&file[start as usize..], step);
        let mut reader = BatchReader::new(&split, format, 1_000, feed)?;
        let mut out = Vec::new();
        while let Some(batch) = reader.next()? {
            out.extend(batch.records().map(|one| (one.offset, one.key.to_vec(), one.bytes.to_vec())));
        }
        Ok(out)
    }

    #[test]
    fn fixed_records_belong_to_the_split_in_which_they_start() {
        let file: Vec<u8> = (0..70).collect();
        let want: Vec<Found> =
            file.chunks(7).enumerate().map(|(n, one)| (n as u64 * 7, vec![], one.to_vec())).collect();
        for step in [1, 3, 7, 8, 20, 100] {
            for cut in 0..=70 {
                let mut got = records(&file, 0, cut, InputFormat::Fixed(7), step).unwrap();
                got.extend(records(&file, cut, 70, InputFormat::Fixed(7), step).unwrap());
                assert_eq!(got, want, "cut at {cut}, pieces of {step}");
            }
        }
        let error = records(&file[..68], 0, 68, InputFormat::Fixed(7), 10).unwrap_err();
        assert_eq!(error.message(), "/f: the record that starts at byte 63 has 5 bytes, not 7: the file ends in it");
        assert!(records(&file, 0, 70, InputFormat::Fixed(0), 10).is_err());
    }

    #[test]
    fn whole_files_keys_with_values_and_numbers() {
        let got = records(b"abc", 0, 3, InputFormat::WholeFile, 2).unwrap();
        assert_eq!(got, [(0, vec![], b"abc".to_vec())]);
        assert_eq!(records(b"", 0, 0, InputFormat::WholeFile, 2).unwrap(), [(0, vec![], vec![])]);
        let error = records(&[0; 1_001], 0, 1_001, InputFormat::WholeFile, 200).unwrap_err();
        assert!(error.message().contains("more than the 1000 bytes"), "{error}");

        let format = InputFormat::KeyValueText { separator: b'=' };
        let got = records(b"a=1=2\nb\n=c", 0, 10, format, 4).unwrap();
        let found = |at, key: &[u8], value: &[u8]| (at, key.to_vec(), value.to_vec());
        assert_eq!(got, [found(0, b"a", b"1=2"), found(6, b"b", b""), found(8, b"", b"c")]);

        let split = pb::Split { first_record: 5_000, records: 9_000, ..Default::default() };
        let mut reader = NumberReader::new(&split);
        let numbers: Vec<u64> = std::iter::from_fn(|| reader.next())
            .flat_map(|batch| batch.records().map(|one| one.offset).collect::<Vec<_>>())
            .collect();
        assert_eq!(numbers, (5_000..14_000).collect::<Vec<_>>());
    }

    #[test]
    fn compressed_files_are_read_to_their_end() {
        let content: Vec<u8> = (0..5_000).flat_map(|i| format!("line {i}\n").into_bytes()).collect();
        let kind = super::super::Compression::Gzip;
        let mut gzip = super::super::compression::Compressor::new(kind).unwrap();
        let mut file = gzip.write(&content).unwrap();
        file.extend(gzip.finish().unwrap());
        for (format, count) in
            [(InputFormat::Lines, 5_000), (InputFormat::Words, 10_000), (InputFormat::Fixed(10), 4_889)]
        {
            let split = pb::Split { path: "/f.gz".into(), length: file.len() as u64, ..Default::default() };
            assert_eq!((feed_start(&split, format), format.is_splittable("/f.gz")), (0, false));
            let feed = content_of(&split, format, Box::new(Pieces::of(&file, 1_000))).unwrap();
            let mut reader = BatchReader::new(&split, format, 1_000, feed).unwrap();
            let mut found = 0;
            while let Some(batch) = reader.next().unwrap() {
                for one in batch.records() {
                    assert!(content[one.offset as usize..].starts_with(one.bytes));
                    found += 1;
                }
            }
            assert_eq!(found, count, "{format:?}");
        }
    }
}

//! Cutting a part of a file into batches of whole records.
//!
//! Records are separated by a delimiter. A record belongs to the split in which it starts, whatever the cut: a split that does not start at 0
//! begins one byte early and skips through the first delimiter it meets; every split ends after the first delimiter at or behind its last
//! byte. Both rules name the same delimiter, so neighbours neither share nor lose a record.

use std::sync::Arc;

use bytes::Bytes;
use cairn_proto::mapoutput::MAX_RECORD_BYTES;
use cairn_proto::{Error, ErrorCode, Result, pb};

use super::input::{Batch, Cut, Feed};

/// What separates records.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Delimiter {
    /// Records are lines; the line feed does not belong to them.
    Newline,
    /// Records are words: any run of ASCII white space separates them.
    WhiteSpace,
}

/// ASCII white space as C's `isspace` knows it: blank, tab, line feed, vertical tab, form feed, carriage return.
#[inline]
pub fn is_space(byte: u8) -> bool {
    byte == b' ' || byte.wrapping_sub(9) < 5
}

impl Delimiter {
    #[cfg(test)]
    fn is(self, byte: u8) -> bool {
        match self {
            Self::Newline => byte == b'\n',
            Self::WhiteSpace => is_space(byte),
        }
    }

    pub(super) fn first(self, bytes: &[u8]) -> Option<usize> {
        match self {
            Self::Newline => memchr::memchr(b'\n', bytes),
            Self::WhiteSpace => bytes.iter().position(|byte| is_space(*byte)),
        }
    }

    fn last(self, bytes: &[u8]) -> Option<usize> {
        match self {
            Self::Newline => memchr::memrchr(b'\n', bytes),
            Self::WhiteSpace => bytes.iter().rposition(|byte| is_space(*byte)),
        }
    }
}

/// Makes batches of one split.
pub struct SplitReader<F> {
    feed: F,
    delimiter: Delimiter,
    cut: Cut,
    path: Arc<str>,
    file_index: u32,
    /// First byte behind the split.
    end: u64,
    /// Where the next bytes of the feed lie in the file.
    position: u64,
    state: State,
    /// The start of a record whose end has not come yet.
    carry: Vec<u8>,
    carry_offset: u64,
    queued: Option<Batch>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Skipping,
    Reading,
    Done,
}

impl<F: Feed> SplitReader<F> {
    /// Reads `split` from a feed that starts one byte before it (or at 0); its batches are `cut` into records.
    pub(super) fn new(split: &pb::Split, delimiter: Delimiter, cut: Cut, feed: F) -> Self {
        Self {
            feed,
            delimiter,
            cut,
            path: split.path.as_str().into(),
            file_index: split.file_index,
            end: split.offset + split.length,
            position: split.offset.saturating_sub(1),
            state: match (split.length, split.offset) {
                // No record starts in nothing.
                (0, _) => State::Done,
                (_, 0) => State::Reading,
                _ => State::Skipping,
            },
            carry: Vec::new(),
            carry_offset: 0,
            queued: None,
        }
    }

    fn batch(&self, bytes: Bytes, offset: u64) -> Batch {
        Batch { bytes, offset, file_index: self.file_index, path: Arc::clone(&self.path), cut: self.cut }
    }

    /// The next batch; `None` at the end of the split.
    #[allow(clippy::should_implement_trait)] // it can fail
    pub fn next(&mut self) -> Result<Option<Batch>> {
        loop {
            if let Some(batch) = self.queued.take() {
                return Ok(Some(batch));
            }
            if self.state == State::Done {
                return Ok(None);
            }
            let Some(chunk) = self.feed.next()? else {
                self.state = State::Done;
                if self.carry.is_empty() {
                    return Ok(None);
                }
                let rest = Bytes::from(std::mem::take(&mut self.carry));
                return Ok(Some(self.batch(rest, self.carry_offset)));
            };
            let offset = self.position;
            self.position += chunk.len() as u64;
            if let Some((chunk, offset)) = self.trim(chunk, offset)
                && let Some(batch) = self.cut_off(chunk, offset)?
            {
                return Ok(Some(batch));
            }
        }
    }

    /// Takes off what belongs to the neighbours.
    fn trim(&mut self, mut chunk: Bytes, mut offset: u64) -> Option<(Bytes, u64)> {
        if self.state == State::Skipping {
            let skip = self.delimiter.first(&chunk)? + 1;
            self.state = State::Reading;
            offset += skip as u64;
            if offset >= self.end {
                self.state = State::Done;
                return None;
            }
            let _ = chunk.split_to(skip);
        }
        if offset + chunk.len() as u64 >= self.end {
            let from = (self.end - 1).saturating_sub(offset) as usize;
            if let Some(at) = self.delimiter.first(&chunk[from..]) {
                chunk.truncate(from + at + 1);
                self.state = State::Done;
            }
        }
        Some((chunk, offset))
    }

    /// Splits off whole records; keeps the start of the last.
    fn cut_off(&mut self, mut chunk: Bytes, mut offset: u64) -> Result<Option<Batch>> {
        let mut completed = None;
        if !self.carry.is_empty() {
            let Some(at) = self.delimiter.first(&chunk) else {
                self.carry.extend_from_slice(&chunk);
                return self.check_carry().map(|()| None);
            };
            self.carry.extend_from_slice(&chunk.split_to(at + 1));
            offset += at as u64 + 1;
            let record = Bytes::from(std::mem::take(&mut self.carry));
            completed = Some(self.batch(record, self.carry_offset));
        }
        let whole = self.delimiter.last(&chunk).map_or(0, |at| at + 1);
        let records = chunk.split_to(whole);
        self.carry_offset = offset + whole as u64;
        self.carry.extend_from_slice(&chunk);
        let rest = (!records.is_empty()).then(|| self.batch(records, offset));
        match completed {
            Some(first) => {
                self.queued = rest;
                Ok(Some(first))
            }
            None => Ok(rest),
        }
    }

    fn check_carry(&self) -> Result<()> {
        if self.carry.len() <= MAX_RECORD_BYTES {
            return Ok(());
        }
        let unit = if self.delimiter == Delimiter::Newline { "line" } else { "word" };
        let text = format!(
            "{}: the {unit} that starts at byte {} is longer than the limit of {MAX_RECORD_BYTES} bytes",
            self.path, self.carry_offset
        );
        Err(Error::new(ErrorCode::InvalidArgument, text).with_subject(&*self.path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mapreduce::testing::Pieces;
    use proptest::prelude::*;

    fn records(text: &[u8], from: usize, to: usize, delimiter: Delimiter, step: usize) -> Vec<(u64, Vec<u8>)> {
        let split = pb::Split { offset: from as u64, length: (to - from) as u64, ..Default::default() };
        let feed = Pieces::of(&text[from.saturating_sub(1)..], step);
        let mut reader = SplitReader::new(&split, delimiter, Cut::Delimiter(delimiter), feed);
        let mut out = Vec::new();
        while let Some(batch) = reader.next().unwrap() {
            assert_eq!(&text[batch.offset as usize..][..batch.bytes.len()], &batch.bytes[..]);
            out.extend(batch.records().map(|record| (record.offset, record.bytes.to_vec())));
        }
        out
    }

    fn all(text: &[u8], delimiter: Delimiter) -> Vec<(u64, Vec<u8>)> {
        let mut at = 0;
        let mut out = Vec::new();
        for piece in text.split_inclusive(|byte| delimiter.is(*byte)) {
            let body = piece.strip_suffix(&[piece[piece.len() - 1]]).filter(|_| delimiter.is(piece[piece.len() - 1]));
            let body = body.unwrap_or(piece);
            if delimiter == Delimiter::Newline || !body.is_empty() {
                out.push((at as u64, body.to_vec()));
            }
            at += piece.len();
        }
        out
    }

    #[test]
    fn every_cut_of_a_text_with_long_lines() {
        let mut text = b"\n\nshort\n a  b\t c\r\n".to_vec();
        text.extend(std::iter::repeat_n(b'x', 90));
        text.extend_from_slice(b"\n\nend\nno line feed at the end ");
        text.extend(std::iter::repeat_n(b'y', 40));
        for delimiter in [Delimiter::Newline, Delimiter::WhiteSpace] {
            let want = all(&text, delimiter);
            for step in [1, 7, 64, 1_000] {
                for first in 1..text.len() {
                    let mut got = records(&text, 0, first, delimiter, step);
                    let second = first + (text.len() - first).div_ceil(2);
                    got.extend(records(&text, first, second, delimiter, step));
                    if second < text.len() {
                        got.extend(records(&text, second, text.len(), delimiter, step));
                    }
                    assert_eq!(got, want, "cut at {first} and {second}, pieces of {step}");
                }
            }
        }
    }

    proptest! {
        #[test]
        fn any_cuts_keep_each_record_once(
            text in prop::collection::vec(prop::sample::select(vec![b'a', b'b', b'\n', b' ', b'\t', 0x0b, 0xff]), 1..200),
            mut cuts in prop::collection::vec(1usize..200, 0..6),
            step in 1usize..50,
        ) {
            cuts.retain(|cut| *cut < text.len());
            cuts.extend([0, text.len()]);
            cuts.sort_unstable();
            cuts.dedup();
            for delimiter in [Delimiter::Newline, Delimiter::WhiteSpace] {
                let got: Vec<_> =
                    cuts.windows(2).flat_map(|cut| records(&text, cut[0], cut[1], delimiter, step)).collect();
                prop_assert_eq!(got, all(&text, delimiter));
            }
        }
    }

    #[test]
    fn an_empty_split_has_no_records() {
        for delimiter in [Delimiter::Newline, Delimiter::WhiteSpace] {
            assert_eq!(records(b"a b\nc\n", 0, 0, delimiter, 4), []);
            assert_eq!(records(b"a b\nc\n", 4, 4, delimiter, 4), []);
        }
    }

    #[test]
    fn a_line_beyond_the_limit_is_named() {
        let text = vec![b'x'; MAX_RECORD_BYTES + 10];
        let split = pb::Split { path: "/f".into(), length: text.len() as u64, ..Default::default() };
        let cut = Cut::Delimiter(Delimiter::Newline);
        let mut reader = SplitReader::new(&split, Delimiter::Newline, cut, Pieces::of(&text, 1 << 20));
        let error = reader.next().unwrap_err();
        assert!(error.message().contains("/f: the line that starts at byte 0"), "{error}");
    }
}

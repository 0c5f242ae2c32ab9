//! Compressed files, known by the ends of their names: `.gz`, `.bz2`, `.zst`.
//!
//! They cannot be read from the middle, so each is one split. Files of several members (gzip), streams (bzip2) or frames (zstd) are read to their end.

use std::io::{self, BufRead, Read, Write};
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use cairn_proto::{Error, ErrorCode, Result};

use super::input::Feed;

const PIECE_BYTES: usize = 256 << 10;
/// zstd's default, which is also about what one gets from gzip and bzip2 at theirs.
const ZSTD_LEVEL: i32 = 3;

/// How a file is compressed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Compression {
    /// gzip.
    Gzip,
    /// bzip2.
    Bzip2,
    /// Zstandard.
    Zstd,
}

impl Compression {
    /// Of a file with that name.
    pub fn of(path: &str) -> Option<Self> {
        [Self::Gzip, Self::Bzip2, Self::Zstd].into_iter().find(|kind| path.ends_with(kind.extension()))
    }

    /// What the names of such files end with.
    pub fn extension(self) -> &'static str {
        match self {
            Self::Gzip => ".gz",
            Self::Bzip2 => ".bz2",
            Self::Zstd => ".zst",
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Bzip2 => "bzip2",
            Self::Zstd => "zstd",
        }
    }
}

/// The content of a compressed file.
pub struct Decompress {
    kind: Compression,
    path: Arc<str>,
    decoder: Decoder,
    /// Bytes of content so far.
    content: u64,
    /// Comes after what was decompressed before it.
    error: Option<Error>,
}

enum Decoder {
    Gzip(flate2::bufread::MultiGzDecoder<FeedRead>),
    Bzip2(bzip2::bufread::MultiBzDecoder<FeedRead>),
    Zstd(Box<zstd::stream::read::Decoder<'static, FeedRead>>),
}

impl Decoder {
    fn reader(&mut self) -> &mut dyn Read {
        match self {
            Self::Gzip(decoder) => decoder,
            Self::Bzip2(decoder) => decoder,
            Self::Zstd(decoder) => decoder,
        }
    }

    fn source(&self) -> &FeedRead {
        match self {
            Self::Gzip(decoder) => decoder.get_ref(),
            Self::Bzip2(decoder) => decoder.get_ref(),
            Self::Zstd(decoder) => decoder.get_ref(),
        }
    }
}

impl Decompress {
    /// Of the file at `path`, whose bytes `feed` delivers from its start.
    pub fn new(kind: Compression, path: Arc<str>, feed: Box<dyn Feed + Send>) -> Result<Self> {
        let source = FeedRead { feed, piece: Bytes::new(), taken: 0 };
        let decoder = match kind {
            Compression::Gzip => Decoder::Gzip(flate2::bufread::MultiGzDecoder::new(source)),
            Compression::Bzip2 => Decoder::Bzip2(bzip2::bufread::MultiBzDecoder::new(source)),
            Compression::Zstd => {
                let decoder = zstd::stream::read::Decoder::with_buffer(source);
                Decoder::Zstd(Box::new(decoder.map_err(|error| Error::io("cannot start decompressing", &error))?))
            }
        };
        Ok(Self { kind, path, decoder, content: 0, error: None })
    }

    fn failed(&self, error: io::Error) -> Error {
        match error.downcast::<Error>() {
            // The feed's own.
            Ok(error) => error,
            // The file is what its writer made it, whichever replica is read: another attempt would end here too.
            Err(error) => {
                let text = format!(
                    "{}: the {} data are damaged or cut off at about byte {} (after {} bytes of content): {error}",
                    self.path,
                    self.kind.name(),
                    self.decoder.source().taken,
                    self.content
                );
                Error::new(ErrorCode::InvalidArgument, text).with_subject(&*self.path)
            }
        }
    }
}

impl Feed for Decompress {
    fn next(&mut self) -> Result<Option<Bytes>> {
        if let Some(error) = self.error.take() {
            return Err(error);
        }
        let mut piece = BytesMut::zeroed(PIECE_BYTES);
        let mut filled = 0;
        while filled < piece.len() {
            match self.decoder.reader().read(&mut piece[filled..]) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.content += filled as u64;
                    let error = self.failed(error);
                    if filled == 0 {
                        return Err(error);
                    }
                    self.error = Some(error);
                    piece.truncate(filled);
                    return Ok(Some(piece.freeze()));
                }
            }
        }
        self.content += filled as u64;
        piece.truncate(filled);
        Ok((filled > 0).then(|| piece.freeze()))
    }
}

/// A [`Feed`] as the decoders want it.
struct FeedRead {
    feed: Box<dyn Feed + Send>,
    piece: Bytes,
    /// Bytes that the decoder has taken.
    taken: u64,
}

impl Read for FeedRead {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let count = self.fill_buf()?.len().min(out.len());
        out[..count].copy_from_slice(&self.piece[..count]);
        self.consume(count);
        Ok(count)
    }
}

impl BufRead for FeedRead {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while self.piece.is_empty() {
            match self.feed.next().map_err(io::Error::other)? {
                Some(piece) => self.piece = piece,
                None => break,
            }
        }
        Ok(&self.piece)
    }

    fn consume(&mut self, count: usize) {
        self.taken += count as u64;
        let _ = self.piece.split_to(count);
    }
}

/// Compresses what is written to an output file.
pub(super) enum Compressor {
    Gzip(flate2::write::GzEncoder<Vec<u8>>),
    Bzip2(bzip2::write::BzEncoder<Vec<u8>>),
    Zstd(Box<zstd::stream::write::Encoder<'static, Vec<u8>>>),
}

fn compressing(error: io::Error) -> Error {
    Error::io("cannot compress the output", &error)
}

impl Compressor {
    pub(super) fn new(kind: Compression) -> Result<Self> {
        Ok(match kind {
            Compression::Gzip => Self::Gzip(flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default())),
            Compression::Bzip2 => Self::Bzip2(bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::default())),
            Compression::Zstd => {
                let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), ZSTD_LEVEL).map_err(compressing)?;
                // The others have one always.
                encoder.include_checksum(true).map_err(compressing)?;
                Self::Zstd(Box::new(encoder))
            }
        })
    }

    /// Takes content; returns what is compressed by now.
    pub(super) fn write(&mut self, content: &[u8]) -> Result<Vec<u8>> {
        let written = match self {
            Self::Gzip(encoder) => encoder.write_all(content).map(|()| std::mem::take(encoder.get_mut())),
            Self::Bzip2(encoder) => encoder.write_all(content).map(|()| std::mem::take(encoder.get_mut())),
            Self::Zstd(encoder) => encoder.write_all(content).map(|()| std::mem::take(encoder.get_mut())),
        };
        written.map_err(compressing)
    }

    /// Returns the rest.
    pub(super) fn finish(self) -> Result<Vec<u8>> {
        let finished = match self {
            Self::Gzip(encoder) => encoder.finish(),
            Self::Bzip2(encoder) => encoder.finish(),
            Self::Zstd(encoder) => encoder.finish(),
        };
        finished.map_err(compressing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mapreduce::testing::Pieces;

    const KINDS: [Compression; 3] = [Compression::Gzip, Compression::Bzip2, Compression::Zstd];

    fn compress(kind: Compression, content: &[u8]) -> Vec<u8> {
        let mut compressor = Compressor::new(kind).unwrap();
        let mut out = Vec::new();
        for piece in content.chunks(100_000) {
            out.extend(compressor.write(piece).unwrap());
        }
        out.extend(compressor.finish().unwrap());
        out
    }

    fn decompress(kind: Compression, file: &[u8], step: usize) -> Result<Vec<u8>> {
        let feed = Box::new(Pieces::of(file, step));
        let mut decompress = Decompress::new(kind, "/f".into(), feed)?;
        let mut out = Vec::new();
        while let Some(piece) = decompress.next()? {
            out.extend_from_slice(&piece);
        }
        Ok(out)
    }

    fn content() -> Vec<u8> {
        (0..60_000u32).flat_map(|i| format!("line {} of it\n", i.wrapping_mul(2_654_435_761)).into_bytes()).collect()
    }

    #[test]
    fn names_tell() {
        assert_eq!(Compression::of("/a/b.txt.gz"), Some(Compression::Gzip));
        assert_eq!(Compression::of("/a/b.bz2"), Some(Compression::Bzip2));
        assert_eq!(Compression::of("/a/b.zst"), Some(Compression::Zstd));
        assert_eq!(Compression::of("/a/b.gzip"), None);
    }

    #[test]
    fn files_of_several_members_are_read_to_their_end() {
        let content = content();
        for kind in KINDS {
            let (first, second) = content.split_at(400_000);
            let file = [compress(kind, first), compress(kind, b""), compress(kind, second)].concat();
            for step in [1_000, 1 << 20] {
                assert!(decompress(kind, &file, step).unwrap() == content, "{kind:?}");
            }
            assert_eq!(decompress(kind, &compress(kind, b""), 7).unwrap(), b"");
        }
    }

    #[test]
    fn damage_and_cuts_are_told_with_file_and_place() {
        let content = content();
        for kind in KINDS {
            let file = compress(kind, &content);
            let mut bad = file.clone();
            let middle = file.len() / 2;
            bad[middle..middle + 8].iter_mut().for_each(|byte| *byte ^= 0x55);
            for (what, bad) in [("damaged", &bad[..]), ("cut", &file[..middle]), ("no such data", &content)] {
                // One kind may not see the damage before its checksum, but it does see it.
                let error = decompress(kind, bad, 10_000).map(|got| got == content).unwrap_err();
                assert_eq!(error.code(), ErrorCode::InvalidArgument, "{kind:?} {what}: {error}");
                let text = error.message();
                assert!(text.starts_with(&format!("/f: the {} data are", kind.name())), "{kind:?} {what}: {text}");
                assert!(text.contains("at about byte "), "{text}");
            }
        }
    }

    #[test]
    fn an_error_of_the_feed_stays_what_it_is() {
        struct Gone;
        impl Feed for Gone {
            fn next(&mut self) -> Result<Option<Bytes>> {
                Err(Error::new(ErrorCode::Unreachable, "the node left"))
            }
        }
        for kind in KINDS {
            let error = Decompress::new(kind, "/f".into(), Box::new(Gone)).unwrap().next().unwrap_err();
            assert_eq!((error.code(), error.message()), (ErrorCode::Unreachable, "the node left"), "{kind:?}");
        }
    }
}

//! Pieces of a read: some packets each. The data stays where its frames were opened; what comes before it in each packet lies aside.
//!
//! A frame's checksum is put together from those of its chunks, which the reader gets anyway, so the data is looked at once. Where frames are small, or
//! begin or end inside a chunk, all data of the piece is copied together first.

use std::io::IoSlice;
use std::ops::Range;
use std::sync::Arc;

use cairn_proto::Result;
use cairn_proto::frame::{FrameHeader, MAX_FRAME_RAW_BYTES, Opener};
use cairn_proto::ids::BlockId;

use super::data::DataReader;
use super::packet::{self, PacketHeader};
use super::sums::{Joined, READ_CHUNK, SumKind, Sums};
use crate::store::Readable;

/// Data per packet.
const PACKET_DATA: u64 = 64 << 10;
/// Data that is made into packets at a time.
const PIECE: u64 = 1 << 20;
/// Frames with less data are copied together.
const SMALL: usize = 16 << 10;
/// Memory of frames that is kept for the next piece: of its own data and of the frames that reach beyond its ends.
const KEPT_BYTES: usize = PIECE as usize + 2 * MAX_FRAME_RAW_BYTES;
/// More parts are not sent at a time.
const MOST_SLICES: usize = 64;

/// What is read.
pub(super) struct Source {
    pub readable: Readable,
    pub block: BlockId,
    pub sums: Sums,
    /// A multiple of a chunk, or all there is.
    pub end: u64,
}

/// The pieces of a read, in their order.
pub(super) struct Pieces {
    source: Arc<Source>,
    at: u64,
    seqno: i64,
    ended: bool,
    spare: Vec<Memory>,
}

impl Pieces {
    /// From `start` on, which is a multiple of a chunk.
    pub fn new(source: Arc<Source>, start: u64) -> Self {
        Self { source, at: start, seqno: 0, ended: false, spare: Vec::new() }
    }

    /// Where the next one starts in the block.
    pub fn at(&self) -> u64 {
        self.at
    }

    /// The next one, to be made.
    pub fn next(&mut self) -> Option<Piece> {
        if self.ended {
            return None;
        }
        let (from, seqno, end) = (self.at, self.seqno, self.source.end);
        // Ends where frames do that writers filled: each of them is opened once.
        self.at = ((from / PIECE + 1) * PIECE).min(end);
        self.seqno += (self.at - from).div_ceil(PACKET_DATA) as i64;
        self.ended = self.at == end;
        let (source, memory) = (Arc::clone(&self.source), self.spare.pop().unwrap_or_default());
        Some(Piece { source, from, to: self.at, seqno, last: self.ended, memory })
    }

    /// Takes back the memory of a piece that was sent.
    pub fn reuse(&mut self, sent: Made) {
        let mut memory = sent.memory;
        // Each frame may be the largest one; not all that were ever opened.
        if memory.frames.iter().map(Vec::capacity).sum::<usize>() > KEPT_BYTES {
            memory.frames.clear();
        }
        self.spare.push(memory);
    }
}

/// Memory of a piece, used again for another one.
#[derive(Default)]
struct Memory {
    opener: Opener,
    frames: Vec<Vec<u8>>,
    gathered: Vec<u8>,
    sums: Vec<u8>,
    heads: Vec<u8>,
}

/// Some packets of a read.
pub(super) struct Piece {
    source: Arc<Source>,
    from: u64,
    to: u64,
    /// Of its first packet.
    seqno: i64,
    /// An empty packet follows, which ends the read.
    last: bool,
    memory: Memory,
}

/// Where bytes of a piece lie.
enum Place {
    Heads(Range<usize>),
    Frame(usize, Range<usize>),
    Gathered(Range<usize>),
}

/// A piece as it is sent.
pub(super) struct Made {
    memory: Memory,
    order: Vec<Place>,
    bytes: usize,
}

impl Made {
    /// Bytes of all packets.
    pub fn len(&self) -> usize {
        self.bytes
    }

    fn at(&self, place: &Place) -> &[u8] {
        match place {
            Place::Heads(range) => &self.memory.heads[range.clone()],
            Place::Frame(at, range) => &self.memory.frames[*at][range.clone()],
            Place::Gathered(range) => &self.memory.gathered[range.clone()],
        }
    }

    /// What follows on the first `skip` bytes; some of it, if it is in many parts.
    pub fn slices(&self, mut skip: usize) -> Vec<IoSlice<'_>> {
        let mut out = Vec::with_capacity(self.order.len().min(MOST_SLICES));
        for part in self.order.iter().map(|place| self.at(place)) {
            if out.len() == MOST_SLICES {
                break;
            }
            let skipped = skip.min(part.len());
            skip -= skipped;
            if skipped < part.len() {
                out.push(IoSlice::new(&part[skipped..]));
            }
        }
        out
    }

    fn push(&mut self, place: Place) {
        self.bytes += self.at(&place).len();
        self.order.push(place);
    }
}

impl Piece {
    /// Blocking.
    pub fn make(self) -> Result<Made> {
        let Self { source, from, to, mut seqno, last, mut memory } = self;
        let sums = source.sums;
        let parts = collect(&source, from..to, &mut memory)?;
        memory.heads.clear();
        let mut made = Made { memory, order: Vec::new(), bytes: 0 };
        let mut parts = parts.into_iter();
        let mut part = None;
        let mut summed = 0;
        let mut head = |made: &mut Made, offset: u64, data_len: usize| {
            let header = PacketHeader { offset, seqno, last: data_len == 0, data_len, sync: false };
            seqno += 1;
            let (Memory { heads, sums: all, .. }, start) = (&mut made.memory, summed);
            summed += sums.bytes_for(data_len);
            let at = heads.len();
            packet::append_head(heads, &header, &all[start..summed]);
            let end = heads.len();
            made.push(Place::Heads(at..end));
        };
        for offset in (from..to).step_by(PACKET_DATA as usize) {
            let mut left = (to - offset).min(PACKET_DATA) as usize;
            head(&mut made, offset, left);
            while left > 0
                && let Some(place) = part.take().or_else(|| parts.next())
            {
                let (now, later) = place.split(left);
                left -= now.len();
                part = later;
                made.push(now);
            }
        }
        if last {
            head(&mut made, to, 0);
        }
        Ok(made)
    }
}

impl Place {
    fn range(&self) -> &Range<usize> {
        match self {
            Self::Heads(range) | Self::Frame(_, range) | Self::Gathered(range) => range,
        }
    }

    fn len(&self) -> usize {
        self.range().len()
    }

    fn with(&self, range: Range<usize>) -> Self {
        match self {
            Self::Heads(_) => Self::Heads(range),
            Self::Frame(at, _) => Self::Frame(*at, range),
            Self::Gathered(_) => Self::Gathered(range),
        }
    }

    /// Its first bytes, at most so many, and the rest if there is one.
    fn split(&self, most: usize) -> (Self, Option<Self>) {
        let Range { start, end } = *self.range();
        let middle = end.min(start.saturating_add(most));
        (self.with(start..middle), (middle < end).then(|| self.with(middle..end)))
    }
}

/// Opens the frames that hold `range`, takes the checksums of its chunks, and says where the data lies.
fn collect(source: &Source, range: Range<u64>, memory: &mut Memory) -> Result<Vec<Place>> {
    let mut data = DataReader::new(&source.readable, source.block, range.start, range.end)?
        .with_memory(std::mem::take(&mut memory.opener));
    let Memory { frames, gathered, sums, .. } = memory;
    gathered.clear();
    sums.clear();
    let summing = source.sums.kind() != SumKind::Null;
    let (mut places, mut gathers) = (Vec::new(), false);
    loop {
        let at = places.len();
        if frames.len() == at {
            frames.push(Vec::new());
        }
        let before = sums.len();
        let mut whole = false;
        let checksum = |header: &FrameHeader, data: &[u8]| {
            let frame = header.offset..header.end();
            let part = frame.end.min(range.end).saturating_sub(frame.start.max(range.start));
            whole = part >= SMALL as u64 && (!summing || is_chunks(frame, source.end));
            if !summing || !whole || gathers {
                return crc32c::crc32c(data);
            }
            sums.resize(before + source.sums.bytes_for(data.len()), 0);
            source.sums.fill(data, &mut sums[before..]);
            let mut joined = Joined::default();
            joined.push(&sums[before..], data.len());
            joined.crc32c()
        };
        let Some(part) = data.next_frame(&mut frames[at], checksum)? else { break };
        if !gathers && !whole {
            gathers = true;
            for place in places.drain(..) {
                if let Place::Frame(at, range) = place {
                    gathered.extend_from_slice(&frames[at][range]);
                }
            }
        }
        if gathers {
            gathered.extend_from_slice(&frames[at][part]);
            continue;
        }
        if summing {
            // Of a frame that reaches beyond the range only the chunks inside.
            sums.truncate(before + source.sums.bytes_for(part.end));
            sums.drain(before..before + source.sums.bytes_for(part.start));
        }
        places.push(Place::Frame(at, part));
    }
    memory.opener = data.into_memory();
    if gathers {
        places.push(Place::Gathered(0..gathered.len()));
        sums.clear();
        sums.resize(source.sums.bytes_for(gathered.len()), 0);
        source.sums.fill(gathered, sums);
    }
    Ok(places)
}

/// Both ends are ends of chunks, seen by who reads up to `end`.
fn is_chunks(frame: Range<u64>, end: u64) -> bool {
    let chunk = READ_CHUNK as u64;
    frame.start.is_multiple_of(chunk)
        && (frame.end.is_multiple_of(chunk) || frame.end == end)
        && (end.is_multiple_of(chunk) || frame.end <= end)
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;
    use cairn_common::durable::{Fs, OpenMode, SystemFs};
    use cairn_proto::ErrorCode;
    use cairn_proto::blockfile::BlockIndex;
    use cairn_proto::pb;
    use proptest::prelude::*;

    use super::super::packet::take;
    use super::*;
    use crate::testing::{GEN, frames, random, text};

    const BLOCK: BlockId = BlockId(5);

    /// A replica with frames of these sizes, all but the last `hidden` bytes of which may be read; `damage`: a byte of the file that is flipped.
    fn replica(data: &[u8], sizes: &[usize], hidden: usize, damage: Option<usize>) -> Readable {
        let (mut file, mut index, mut at) = (Vec::new(), BlockIndex::new(0), 0);
        for size in sizes {
            let frame = &frames(BLOCK, &data[..at + size], at, *size, true)[0];
            file.extend_from_slice(&frame.header_bytes);
            file.extend_from_slice(&frame.payload);
            index.push(&frame.header);
            at += size;
        }
        if let Some(at) = damage {
            file[at] ^= 1;
        }
        let folder = tempfile::tempdir().unwrap();
        let opened = SystemFs.open(&folder.path().join("replica"), OpenMode::Create).unwrap();
        opened.write_all_at(&file, 0).unwrap();
        Readable {
            file: opened,
            index: Arc::new(index),
            length: (at - hidden) as u64,
            stored: file.len() as u64,
            generation: GEN,
            state: pb::ReplicaState::BeingWritten,
            found_at_start: false,
            storage_id: String::new(),
        }
    }

    fn read(readable: Readable, sums: Sums, from: usize, end: usize) -> Result<Vec<u8>> {
        let source = Arc::new(Source { readable, block: BLOCK, sums, end: end as u64 });
        let mut pieces = Pieces::new(source, from as u64);
        let mut sent = BytesMut::new();
        while let Some(piece) = pieces.next() {
            let made = piece.make()?;
            // As by a connection that takes some of it at a time.
            let mut skip = 0;
            while skip < made.len() {
                let before = skip;
                for slice in made.slices(skip).iter().take(3) {
                    sent.extend_from_slice(slice);
                    skip += slice.len();
                }
                assert!(skip > before);
            }
            pieces.reuse(made);
        }
        let (mut got, mut seqno) = (Vec::new(), 0);
        loop {
            let packet = take(&mut sent, &sums).unwrap().unwrap();
            assert_eq!((packet.header.seqno, packet.header.offset), (seqno, (from + got.len()) as u64));
            assert_eq!(sums.first_flaw(&packet.data, &packet.sums), None);
            got.extend_from_slice(&packet.data);
            seqno += 1;
            if packet.header.last {
                assert!(sent.is_empty());
                return Ok(got);
            }
        }
    }

    /// Sizes of frames: as writers make them, ends of chunks, and anything.
    fn sizes() -> impl Strategy<Value = Vec<usize>> {
        let size = prop_oneof![
            3 => Just(256 << 10),
            2 => (1usize..600).prop_map(|chunks| chunks * READ_CHUNK),
            1 => 1usize..40_000,
            1 => Just(1_500 << 10),
        ];
        prop_oneof![9 => proptest::collection::vec(size, 1..10), 1 => Just(vec![SMALL; 130])]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn whatever_the_frames_packets_bring_the_data(
            sizes in sizes(),
            from in any::<prop::sample::Index>(),
            hidden in 0usize..2_000,
            summed in any::<bool>(),
            shrinks in any::<bool>(),
        ) {
            let total: usize = sizes.iter().sum();
            let data = if shrinks { text(total) } else { random(total, 7) };
            let hidden = hidden.min(sizes[sizes.len() - 1] - 1);
            let end = total - hidden;
            let from = from.index(end) / READ_CHUNK * READ_CHUNK;
            let sums = if summed { Sums::READ } else { Sums::NONE };
            let got = read(replica(&data, &sizes, hidden, None), sums, from, end).unwrap();
            prop_assert!(got == data[from..end]);
        }
    }

    #[test]
    fn nothing_damaged_is_passed_on() {
        let data = random(900_000, 3);
        for sizes in [&[256 << 10, 256 << 10, 256 << 10, 113_568][..], &[100_000, 700_001, 99_999]] {
            for (damage, sums) in
                [(40, Sums::READ), (500_000, Sums::READ), (899_999, Sums::READ), (500_000, Sums::NONE)]
            {
                let error = read(replica(&data, sizes, 0, Some(damage)), sums, 0, data.len()).unwrap_err();
                assert_eq!(error.code(), ErrorCode::Corrupt);
            }
        }
    }

    #[test]
    fn memory_of_large_frames_is_not_kept_in_every_place() {
        let mut sizes = vec![SMALL; 60];
        sizes.extend([3 << 20, 3 << 20, 3 << 20]);
        let data = random(sizes.iter().sum(), 9);
        let end = data.len() as u64;
        let source = Source { readable: replica(&data, &sizes, 0, None), block: BLOCK, sums: Sums::READ, end };
        let mut pieces = Pieces::new(Arc::new(source), 0);
        while let Some(piece) = pieces.next() {
            pieces.reuse(piece.make().unwrap());
            let kept: usize = pieces.spare[0].frames.iter().map(Vec::capacity).sum();
            assert!(kept <= KEPT_BYTES, "{kept}");
        }
    }

    #[test]
    fn a_block_of_single_bytes_takes_no_memory_for_each() {
        let (data, sizes) = (text(3_000), [1; 3_000]);
        let source = Source { readable: replica(&data, &sizes, 0, None), block: BLOCK, sums: Sums::READ, end: 3_000 };
        let mut pieces = Pieces::new(Arc::new(source), 0);
        let made = pieces.next().unwrap().make().unwrap();
        assert!(made.memory.frames.len() < 3 && made.memory.gathered == data);
    }
}

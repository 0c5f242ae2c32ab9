//! Packets become frames, once: this node does for a Hadoop client what Cairn's own client does for itself.
//!
//! # Overview
//! [`Framer`] gathers the data of packets. A frame is cut when it is full, or by whoever knows that no more data may come for a while.
//! [`Cut::seal`] verifies checksums of packets and makes the frame; off the async threads, several at a time, unless it is quick. A packet is
//! verified with the first frame that has some of its data, so nothing is passed on unverified. The CRC-32C of a frame's data is put together from the
//! checksums that the client took. Data that is not compressed stays where it was read.

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use cairn_proto::frame::{Codec, DEFAULT_FRAME_RAW_BYTES, FRAME_HEADER_BYTES, FrameHeader, Sealer};
use cairn_proto::ids::BlockId;

use super::packet::Packet;
use super::sums::{Joined, Sums};
use crate::store::lock;
use crate::store::writer::Chunk;

/// Compressors kept for their next frame; each holds tables of about a megabyte.
const IDLE_SEALERS: usize = 8;
/// A frame is cut after so many packets however small they are: each of them waits for it.
const MOST_PACKETS: usize = 256;

/// Parts of less than this are copied together: they would cost more each than their bytes.
const COPIED_BYTES: usize = 8 << 10;
/// Verifying and copying so much takes no longer than a few turns from thread to thread.
const QUICK_BYTES: usize = 1 << 20;
/// A byte of checksums takes as long as so many bytes of data.
const SUM_COSTS: usize = 8;
/// So much is compressed as quickly.
const QUICK_TO_COMPRESS: usize = 8 << 10;

/// Compressors that wait for their next frame.
#[derive(Clone, Default)]
pub struct SealerPool {
    idle: Arc<Mutex<Vec<Sealer>>>,
}

/// Decides whether compression is worth trying, from what it brought lately. Data that does not shrink is tried more and more seldom.
#[derive(Default)]
struct Judge {
    misses: u32,
    skip: u32,
}

const MISSES_BEFORE_SKIPPING: u32 = 4;

impl Judge {
    fn try_next(&mut self) -> bool {
        if self.skip == 0 {
            return true;
        }
        self.skip -= 1;
        false
    }

    fn learn(&mut self, header: &FrameHeader) {
        if header.codec == Codec::Zstd && header.stored_len < header.raw_len - header.raw_len / 16 {
            *self = Self::default();
            return;
        }
        self.misses += 1;
        if self.misses >= MISSES_BEFORE_SKIPPING {
            self.skip = 8 << (self.misses - MISSES_BEFORE_SKIPPING).min(3);
        }
    }
}

/// Gathers data for frames.
pub struct Framer {
    block: BlockId,
    sums: Sums,
    pool: SealerPool,
    judge: Arc<Mutex<Judge>>,
    /// Where the gathered data starts in the block.
    start: u64,
    parts: Vec<Part>,
    gathered: usize,
    /// Packets with data in the next frame that were not verified yet.
    unverified: Vec<Packet>,
    packets: usize,
    /// See [`Self::copy_from_now`].
    copies: bool,
    compress: bool,
}

/// Data of one packet, and its checksums if they are of use.
struct Part {
    data: Bytes,
    crc32c: Option<Bytes>,
    /// Memory that is not free before this data is.
    holds: usize,
}

/// The data of one frame.
pub struct Cut {
    block: BlockId,
    sums: Sums,
    pool: SealerPool,
    judge: Arc<Mutex<Judge>>,
    try_compress: bool,
    copies: bool,
    quick: bool,
    offset: u64,
    parts: Vec<Part>,
    bytes: usize,
    unverified: Vec<Packet>,
}

/// A packet does not fit its checksums.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BadPacket {
    /// Its number.
    pub seqno: i64,
    /// Where in the block the first bad chunk starts.
    pub at: u64,
}

impl Framer {
    /// For a block of which `start` bytes are there; `compress`: frames that shrink.
    pub fn new(block: BlockId, start: u64, sums: Sums, pool: &SealerPool, compress: bool) -> Self {
        Self {
            block,
            sums,
            pool: pool.clone(),
            judge: Arc::default(),
            start,
            parts: Vec::new(),
            gathered: 0,
            unverified: Vec::new(),
            packets: 0,
            copies: false,
            compress,
        }
    }

    /// From now on no frame keeps memory of packets. For a writer that sends what is dropped (data that is there already, packets without any): it
    /// lies in the same memory as data, and nobody counts it.
    pub fn copy_from_now(&mut self) {
        self.copies = true;
    }

    /// Where the data that was given ends in the block.
    pub fn end(&self) -> u64 {
        self.start + self.gathered as u64
    }

    /// Nothing waits for a frame.
    pub fn is_empty(&self) -> bool {
        self.gathered == 0
    }

    /// Takes the data of a packet from `skip` on; what was skipped is there already. `verified`: its checksums were looked at. Full frames come back.
    pub fn push(&mut self, packet: Packet, skip: usize, verified: bool) -> Vec<Cut> {
        let (all, sums) = (packet.data.clone(), packet.sums.clone());
        if !verified {
            self.unverified.push(packet);
        }
        self.packets += 1;
        let mut full = Vec::new();
        let mut at = skip;
        while at < all.len() {
            let length = (all.len() - at).min(DEFAULT_FRAME_RAW_BYTES - self.gathered);
            let crc32c = self.sums.crc32c_of_part(&sums, all.len(), at, length);
            self.parts.push(Part { data: all.slice(at..at + length), crc32c, holds: all.len() + sums.len() });
            self.gathered += length;
            at += length;
            if self.gathered == DEFAULT_FRAME_RAW_BYTES {
                full.extend(self.cut());
            }
        }
        if self.packets >= MOST_PACKETS {
            full.extend(self.cut());
        }
        if all.len() > QUICK_BYTES {
            // Each may be, all together are not.
            full.iter_mut().for_each(|cut| cut.quick = false);
        }
        full
    }

    /// Ends the frame, if there is data for one.
    pub fn cut(&mut self) -> Option<Cut> {
        if self.gathered == 0 {
            return None;
        }
        let try_compress = self.compress && lock(&self.judge).try_next();
        // A checksum costs something even where it covers next to no data.
        let verify: usize =
            self.unverified.iter().map(|packet| packet.data.len() + packet.sums.len() * SUM_COSTS).sum();
        let cut = Cut {
            block: self.block,
            sums: self.sums,
            pool: self.pool.clone(),
            judge: Arc::clone(&self.judge),
            try_compress,
            copies: self.copies,
            quick: verify <= QUICK_BYTES && (!try_compress || self.gathered <= QUICK_TO_COMPRESS),
            offset: self.start,
            parts: std::mem::take(&mut self.parts),
            bytes: self.gathered,
            unverified: std::mem::take(&mut self.unverified),
        };
        self.start += self.gathered as u64;
        self.gathered = 0;
        self.packets = 0;
        Some(cut)
    }
}

/// Verifies a packet.
pub fn verify(packet: &Packet, sums: &Sums) -> Result<(), BadPacket> {
    match sums.first_flaw(&packet.data, &packet.sums) {
        None => Ok(()),
        Some(at) => Err(BadPacket { seqno: packet.header.seqno, at: packet.header.offset + at as u64 }),
    }
}

impl Cut {
    /// [`Self::seal`] may run on an async thread.
    pub fn is_quick(&self) -> bool {
        self.quick
    }

    /// What the packets' checksums say of the data.
    fn raw_crc(&self) -> Option<u32> {
        let mut joined = Joined::default();
        for part in &self.parts {
            joined.push(part.crc32c.as_ref()?, part.data.len());
        }
        Some(joined.crc32c())
    }

    /// Verifies the packets and makes the frame, as it goes over the wire and onto disk.
    pub fn seal(self) -> Result<Chunk, BadPacket> {
        for packet in &self.unverified {
            verify(packet, &self.sums)?;
        }
        let raw_crc = self.raw_crc();
        let Self { block, pool, judge, try_compress, copies, offset, parts, bytes, unverified, .. } = self;
        let holds: usize = parts.iter().map(|part| part.holds).sum();
        if !try_compress && !copies && bytes >= parts.len() * COPIED_BYTES && holds <= 2 * bytes {
            // It stays where it is.
            let header = FrameHeader::stored(offset, parts.iter().map(|part| &part.data[..]), raw_crc);
            let head = Bytes::copy_from_slice(&header.encode(block));
            let parts = std::iter::once(head).chain(parts.into_iter().map(|part| part.data)).collect();
            return Ok(Chunk { parts, headers: vec![header] });
        }
        // The data is copied once: out of the packets, to its place in the frame.
        let mut whole = Vec::with_capacity(FRAME_HEADER_BYTES + bytes);
        whole.resize(FRAME_HEADER_BYTES, 0);
        parts.iter().for_each(|part| whole.extend_from_slice(&part.data));
        drop((parts, unverified));
        let pooled = lock(&pool.idle).pop();
        let mut sealer = pooled.unwrap_or_else(|| Sealer::new(true));
        let (header, whole) = sealer.seal_behind_room(block, offset, whole, try_compress, raw_crc);
        if try_compress {
            lock(&judge).learn(&header);
        }
        let mut idle = lock(&pool.idle);
        if idle.len() < IDLE_SEALERS {
            idle.push(sealer);
        }
        drop(idle);
        Ok(Chunk { parts: vec![whole.into()], headers: vec![header] })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hadoop::packet::{PacketHeader, append, take};
    use bytes::BytesMut;
    use proptest::prelude::*;

    const BLOCK: BlockId = BlockId(77);

    fn packet(seqno: i64, offset: u64, data: &[u8]) -> Packet {
        let header = PacketHeader { offset, seqno, last: false, data_len: data.len(), sync: false };
        let mut bytes = Vec::new();
        append(&mut bytes, &header, &Sums::READ, |out| out.extend_from_slice(data));
        take(&mut BytesMut::from(&bytes[..]), &Sums::READ).unwrap().unwrap()
    }

    fn open(chunk: &Chunk) -> (FrameHeader, Bytes) {
        let bytes = Bytes::from(chunk.parts.concat());
        let header = FrameHeader::decode(BLOCK, &bytes).unwrap();
        assert_eq!(chunk.headers, [header]);
        header.verify_stored(&bytes[FRAME_HEADER_BYTES..]).unwrap();
        (header, header.open(bytes.slice(FRAME_HEADER_BYTES..)).unwrap())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn frames_hold_what_packets_brought(sizes in proptest::collection::vec(0usize..200_000, 1..12)) {
            let mut framer = Framer::new(BLOCK, 1_000, Sums::READ, &SealerPool::default(), true);
            let (mut data, mut cuts) = (Vec::new(), Vec::new());
            for (seqno, size) in sizes.iter().enumerate() {
                let part: Vec<u8> = (0..*size).map(|i| (i * 7 + seqno) as u8).collect();
                cuts.extend(framer.push(packet(seqno as i64, 1_000 + data.len() as u64, &part), 0, false));
                data.extend_from_slice(&part);
                prop_assert_eq!(framer.end(), 1_000 + data.len() as u64);
            }
            cuts.extend(framer.cut());
            prop_assert!(framer.is_empty() && framer.cut().is_none());
            let mut got = Vec::new();
            for cut in cuts {
                let (header, raw) = open(&cut.seal().unwrap());
                prop_assert_eq!(header.offset, 1_000 + got.len() as u64);
                prop_assert!(raw.len() <= DEFAULT_FRAME_RAW_BYTES);
                got.extend_from_slice(&raw);
            }
            prop_assert!(got == data);
        }
    }

    /// What random data comes to, of which nobody tries whether it shrinks.
    fn stored(sums: Sums, packets: usize, bytes: usize, copies: bool) -> Vec<(Chunk, Vec<u8>)> {
        let mut framer = Framer::new(BLOCK, 0, sums, &SealerPool::default(), true);
        framer.judge.lock().unwrap().skip = u32::MAX;
        if copies {
            framer.copy_from_now();
        }
        let data = crate::testing::random(packets * bytes, 5);
        let (mut cuts, mut at) = (Vec::new(), 0);
        for (seqno, part) in data.chunks(bytes).enumerate() {
            let header =
                PacketHeader { offset: at, seqno: seqno as i64, last: false, data_len: part.len(), sync: false };
            let mut encoded = Vec::new();
            append(&mut encoded, &header, &sums, |out| out.extend_from_slice(part));
            at = header.end();
            cuts.extend(framer.push(take(&mut BytesMut::from(&encoded[..]), &sums).unwrap().unwrap(), 0, false));
        }
        cuts.extend(framer.cut());
        let mut made = Vec::new();
        for cut in cuts {
            let chunk = cut.seal().unwrap();
            let (header, raw) = open(&chunk);
            assert_eq!(header.codec, Codec::Stored);
            assert_eq!(raw, &data[header.offset as usize..header.end() as usize]);
            made.push((chunk, raw.to_vec()));
        }
        assert_eq!(made.iter().map(|(_, raw)| raw.len()).sum::<usize>(), data.len());
        made
    }

    #[test]
    fn what_is_stored_as_it_came_stays_where_it_is_unless_that_holds_more() {
        let parts = |made: Vec<(Chunk, Vec<u8>)>| made.iter().map(|(chunk, _)| chunk.parts.len()).collect::<Vec<_>>();
        // The usual packet: 126 chunks of 512 bytes. A header, and four or five packets or their ends.
        assert_eq!(parts(stored(Sums::READ, 12, 126 * 512, false)), [6, 6, 5]);
        let other = Sums::named(1, 4_096).unwrap();
        assert_eq!(parts(stored(other, 12, 126 * 512, false)), [6, 6, 5]);
        // After data that was sent twice; small packets; checksums of single bytes; a packet of many frames.
        assert_eq!(parts(stored(Sums::READ, 12, 126 * 512, true)), [1; 3]);
        assert_eq!(parts(stored(Sums::READ, 40, 1_000, false)), [1]);
        assert_eq!(parts(stored(Sums::named(2, 1).unwrap(), 4, 65_536, false)), [1]);
        assert_eq!(parts(stored(Sums::READ, 1, 1 << 20, false)), [1; 4]);
    }

    #[test]
    fn nothing_of_a_damaged_packet_gets_into_a_frame() {
        let mut framer = Framer::new(BLOCK, 0, Sums::READ, &SealerPool::default(), true);
        assert!(framer.push(packet(4, 0, &[1; 200_000]), 0, false).is_empty());
        let mut bad = packet(5, 200_000, &[2; 100_000]);
        let mut data = bad.data.to_vec();
        data[99_999] ^= 1;
        bad.data = data.into();
        let first = framer.push(bad, 0, false).remove(0);
        // The damage lies behind the end of this frame, and is found all the same.
        assert_eq!(first.seal().unwrap_err(), BadPacket { seqno: 5, at: 200_000 + 99_840 });
    }

    #[test]
    fn only_little_work_is_quick() {
        let mut framer = Framer::new(BLOCK, 0, Sums::READ, &SealerPool::default(), true);
        assert!(framer.push(packet(0, 0, &[1; 100]), 0, false).is_empty());
        assert!(framer.cut().unwrap().is_quick());
        let whole = framer.push(packet(1, 100, &[1; DEFAULT_FRAME_RAW_BYTES]), 0, false).remove(0);
        assert!(!whole.is_quick(), "it is to be compressed");
        // What never shrinks is not tried for a while.
        let mut random = vec![0; 300_000];
        let mut seed = 1u64;
        random.iter_mut().for_each(|byte| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            *byte = (seed >> 56) as u8;
        });
        let mut tried = 0;
        while framer.push(packet(2, framer.end(), &random), 0, false).into_iter().any(|cut| {
            let quick = cut.is_quick();
            cut.seal().unwrap();
            !quick
        }) {
            tried += 1;
            assert!(tried < 10, "compression is tried for ever");
        }
        let mut stored = Framer::new(BLOCK, 0, Sums::READ, &SealerPool::default(), false);
        let whole = stored.push(packet(1, 0, &[1; DEFAULT_FRAME_RAW_BYTES]), 0, false).remove(0);
        assert!(whole.is_quick(), "nothing is to be compressed");
        let sums = Sums::named(2, 1).unwrap();
        let mut costly = Framer::new(BLOCK, 0, sums, &SealerPool::default(), true);
        let many = Packet { sums: vec![0; 4 * random.len()].into(), ..packet(3, 0, &random) };
        costly.judge.lock().unwrap().skip = 9;
        assert!(costly.push(many, 0, false).iter().all(|cut| !cut.is_quick()), "a checksum for each byte");
        let large = framer.push(packet(3, framer.end(), &random.repeat(8)), 0, true);
        assert!(large.len() > 8 && large.iter().all(|cut| !cut.is_quick()));
    }

    #[test]
    fn many_small_packets_do_not_wait_for_a_full_frame() {
        let mut framer = Framer::new(BLOCK, 0, Sums::READ, &SealerPool::default(), true);
        let cuts: usize =
            (0..MOST_PACKETS).map(|at| framer.push(packet(at as i64, at as u64, b"x"), 0, false).len()).sum();
        assert_eq!(cuts, 1);
        assert!(framer.is_empty());
    }
}

//! What goes over the wire and onto the disks of datanodes: frames, block files, map output, messages, errors.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use cairn_client::mapreduce::run::{RunBytes, RunReader, RunWriter, read_index};
use cairn_common::durable::{Fs, OpenMode, read_all};
use cairn_common::entropy::Entropy;
use cairn_common::simdisk::SimDisk;
use cairn_datanode::store::scan::{Depth, open_finalized, walk};
use cairn_datanode::transfer::wire::{Item, UnitReader};
use cairn_proto::blockfile::{
    self, BlockIndex, FOOTER_BYTES, Footer, HEADER_BYTES, INDEX_ENTRY_BYTES, MAX_HEADER_BYTES,
};
use cairn_proto::dataplane::{
    MAX_MESSAGE_BYTES, MESSAGE_HEAD_BYTES, Marker, MarkerKind, MessageHead, Unit, decode_message, encode_delimited,
};
use cairn_proto::frame::{FRAME_HEADER_BYTES, FrameHeader, MAX_FRAME_RAW_BYTES, Sealer};
use cairn_proto::handshake::{self, MAX_HELLO_BYTES, PREAMBLE_BYTES, Purpose};
use cairn_proto::ids::{BlockId, Generation};
use cairn_proto::mapoutput;
use cairn_proto::{Error, ErrorCode, pb};
use prost::Message;

use super::input::{Input, at_once};

const BLOCK: BlockId = BlockId(1_073_741_825);

/// A small file system with one file at `/f`.
pub(super) fn file_of(data: &[u8]) -> SimDisk {
    let disk = SimDisk::new(1 << 30, Entropy::seeded(1));
    let file = disk.open(Path::new("/f"), OpenMode::Create).unwrap();
    file.write_all_at(data, 0).unwrap();
    disk
}

fn put32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

fn unit_crc(bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&BLOCK.0.to_le_bytes());
    hasher.update(&bytes[..28]);
    hasher.finalize()
}

/// Frames of these sizes, back to back.
fn frames(sizes: &[usize], compress: bool) -> (Vec<u8>, BlockIndex, Vec<u8>) {
    let (mut out, mut data) = (blockfile::encode_header(BLOCK).to_vec(), Vec::new());
    let (mut index, mut sealer) = (BlockIndex::new(out.len() as u64), Sealer::new(compress));
    for (k, size) in sizes.iter().enumerate() {
        let raw: Vec<u8> = (0..*size).map(|at| (at / 7 * (k + 3)) as u8).collect();
        let frame = sealer.seal(BLOCK, data.len() as u64, Bytes::copy_from_slice(&raw), compress);
        out.extend_from_slice(&frame.header_bytes);
        out.extend_from_slice(&frame.payload);
        index.push(&frame.header);
        data.extend_from_slice(&raw);
    }
    (out, index, data)
}

fn check_unit(bytes: &[u8; FRAME_HEADER_BYTES], flip: usize) {
    let unit = Unit::decode(BLOCK, bytes);
    let again = match &unit {
        Err(_) => return,
        Ok(Unit::Frame(header)) => {
            assert_eq!(FrameHeader::decode(BLOCK, bytes).as_ref(), Ok(header));
            assert!((1..=MAX_FRAME_RAW_BYTES as u32).contains(&header.raw_len));
            assert!((1..=header.raw_len).contains(&header.stored_len));
            assert!(header.end() <= cairn_proto::MAX_BLOCK_SIZE);
            header.encode(BLOCK)
        }
        Ok(Unit::Marker(marker)) => marker.encode(BLOCK),
    };
    assert_eq!(&again, bytes, "what was read is not what is written");
    assert!(Unit::decode(BLOCK.next(), bytes).is_err(), "another block's header was taken");
    let mut damaged = *bytes;
    damaged[flip / 8 % FRAME_HEADER_BYTES] ^= 1 << (flip % 8);
    assert!(Unit::decode(BLOCK, &damaged).is_err(), "a flipped bit was not noticed");
}

/// Headers of frames and markers.
pub fn frame_header(data: &[u8]) {
    let mut bytes = [0; FRAME_HEADER_BYTES];
    let have = data.len().min(FRAME_HEADER_BYTES);
    bytes[..have].copy_from_slice(&data[..have]);
    let flip = data.iter().map(|byte| usize::from(*byte)).sum::<usize>();
    if have < FRAME_HEADER_BYTES {
        assert!(FrameHeader::decode(BLOCK, data).is_err());
    }
    check_unit(&bytes, flip);
    for kind in [bytes[0], 0xCF, 0xE0] {
        bytes[0] = kind;
        let crc = unit_crc(&bytes);
        put32(&mut bytes, 28, crc);
        check_unit(&bytes, flip);
    }
}

/// See [`frame_header`].
pub fn header_seeds() -> Vec<Vec<u8>> {
    let (bytes, ..) = frames(&[100], false);
    let marker = Marker { kind: MarkerKind::Sync, length: 4_096 }.encode(BLOCK);
    vec![bytes[HEADER_BYTES..][..FRAME_HEADER_BYTES].to_vec(), marker.to_vec()]
}

/// A payload with a header that fits it: what decompresses is what the header says, or refused; a bomb does not go off.
pub fn frame_payload(data: &[u8]) {
    let mut input = Input::new(data);
    let claimed = input.number();
    let payload = input.rest();
    if payload.is_empty() {
        return;
    }
    let real = zstd::bulk::decompress(payload, MAX_FRAME_RAW_BYTES).ok();
    let raw_len = match &real {
        Some(raw) if claimed < 30 => raw.len() as u64,
        _ => claimed,
    };
    let header = FrameHeader {
        codec: cairn_proto::frame::Codec::Zstd,
        raw_len: raw_len as u32,
        stored_len: payload.len() as u32,
        raw_crc: real.as_ref().map_or(0, |raw| crc32c::crc32c(raw)),
        offset: 0,
        stored_crc: crc32fast::hash(payload),
    };
    let Ok(header) = FrameHeader::decode(BLOCK, &header.encode(BLOCK)) else { return };
    header.verify_stored(payload).unwrap();
    let opened = header.open(Bytes::copy_from_slice(payload));
    match (&opened, &real) {
        (Ok(opened), Some(real)) => assert!(opened == real && opened.len() == header.raw_len as usize),
        (Ok(_), None) => panic!("it opened what does not decompress"),
        (Err(_), Some(real)) => assert_ne!(real.len(), header.raw_len as usize, "a good frame was refused"),
        (Err(_), None) => {}
    }
    assert!(
        header.verify_stored(&payload[1..]).is_err() && header.open(Bytes::copy_from_slice(&payload[1..])).is_err()
    );
}

/// See [`frame_payload`].
pub fn payload_seeds() -> Vec<Vec<u8>> {
    let packed = |raw: &[u8]| [&[0][..], &zstd::bulk::compress(raw, 1).unwrap()].concat();
    vec![packed(b"some text, some text, some text"), packed(&[0; 300_000]), packed(&vec![7; 5 << 20])]
}

/// Gives a few bytes at a time.
struct Trickle<'a> {
    rest: &'a [u8],
    step: usize,
}

impl tokio::io::AsyncRead for Trickle<'_> {
    fn poll_read(
        mut self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
        out: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        let (now, later) = self.rest.split_at(self.step.min(self.rest.len()).min(out.remaining()));
        out.put_slice(now);
        self.rest = later;
        std::task::Poll::Ready(Ok(()))
    }
}

/// The write stream: what comes out is what went in, up to the first thing that is wrong.
pub fn frame_stream(data: &[u8]) {
    let mut input = Input::new(data);
    let step = usize::from(input.byte()) * 37 + 1;
    let (mut stream, mut good, mut at) = (Vec::new(), 0, 0);
    let mut sealer = Sealer::new(input.flag());
    for _ in 0..input.byte() % 8 {
        match input.byte() % 4 {
            0 => {
                let length = at;
                let kind =
                    *input.pick(&[MarkerKind::Finish, MarkerKind::Flush, MarkerKind::Sync, MarkerKind::Heartbeat]);
                stream.extend_from_slice(&Marker { kind, length }.encode(BLOCK));
            }
            _ => {
                let size = usize::from(input.short()) % 40_000 + 1;
                let frame = sealer.seal(BLOCK, at, Bytes::from(vec![input.byte(); size]), true);
                stream.extend_from_slice(&frame.header_bytes);
                stream.extend_from_slice(&frame.payload);
                at += size as u64;
            }
        }
        good = stream.len();
    }
    stream.extend_from_slice(input.rest());
    let mut reader = UnitReader::new(Trickle { rest: &stream, step }, BLOCK, 0);
    let (mut got, mut end) = (Vec::new(), 0);
    let outcome = loop {
        match at_once(reader.next()) {
            Ok(Item::Frames(chunk)) => {
                for header in &chunk.headers {
                    assert_eq!(header.offset, end, "a gap");
                    end = header.end();
                }
                got.extend_from_slice(&chunk.parts.concat());
            }
            Ok(Item::Marker(marker)) => got.extend_from_slice(&marker.encode(BLOCK)),
            Ok(Item::End) => break Ok(()),
            Err(error) => break Err(error),
        }
    };
    assert!(stream.starts_with(&got), "it gave what was not sent");
    assert!(end >= at || got.len() >= good || outcome.is_err());
    match outcome {
        Ok(()) => assert_eq!(got.len(), stream.len(), "something was left out"),
        Err(error) => {
            let expected = [ErrorCode::Corrupt, ErrorCode::InvalidArgument, ErrorCode::Unreachable];
            assert!(expected.contains(&error.code()), "{error}");
        }
    }
}

/// See [`frame_stream`].
pub fn stream_seeds() -> Vec<Vec<u8>> {
    let (bytes, ..) = frames(&[100, 3_000], false);
    let raw = [&[200, 0, 0][..], &bytes[HEADER_BYTES..]].concat();
    vec![vec![3, 1, 5, 1, 200, 3, 9, 0, 1, 1, 0, 100, 1, 0, 1], vec![255, 0, 7, 2, 0, 0, 7, 2, 1, 0, 8, 0, 2], raw]
}

fn block_parts(bytes: &[u8]) {
    let head = decode_block_header(bytes);
    let Some(tail) = bytes.len().checked_sub(FOOTER_BYTES) else { return };
    let Ok(footer) = Footer::decode(BLOCK, &bytes[tail..], bytes.len() as u64) else { return };
    assert!(footer.data_length() <= cairn_proto::MAX_BLOCK_SIZE);
    assert!(footer.index_offset() as usize + footer.index_bytes() == tail);
    let Ok(index) = footer.decode_index(&bytes[footer.index_offset() as usize..tail]) else { return };
    assert_eq!(index.data_length(), footer.data_length());
    for (offset, length) in [(0, 1), (index.data_length() / 2, 1), (index.data_length(), 1), (1, u64::MAX)] {
        match index.file_range(offset, length) {
            Some(range) => assert!(range.start < range.end && range.end <= index.frames_end()),
            None => assert!(offset.checked_add(length).is_none_or(|end| end > index.data_length())),
        }
    }
    if head {
        let disk = file_of(bytes);
        let opened = open_finalized(&disk, Path::new("/f"), BLOCK, index.data_length()).unwrap();
        assert_eq!(opened.index, index);
        assert!(open_finalized(&disk, Path::new("/f"), BLOCK, index.data_length() + 1).is_err());
        let (from, to) = (opened.header_bytes, index.frames_end());
        let walked = walk(&*opened.file, BLOCK, from, to, u64::MAX, Depth::Data).unwrap();
        assert!(walked.index.frames_end() <= to.max(from));
    }
}

fn decode_block_header(bytes: &[u8]) -> bool {
    let decoded = blockfile::decode_header(BLOCK, bytes);
    if let Ok(length) = decoded {
        assert!((HEADER_BYTES..=MAX_HEADER_BYTES).contains(&(length as usize)) && length as usize <= bytes.len());
        assert!(blockfile::decode_header(BLOCK.next(), bytes).is_err());
    }
    decoded.is_ok()
}

/// A block file: as it is, and with the checksums of its parts made right.
pub fn block_file(data: &[u8]) {
    block_parts(data);
    if data.len() < HEADER_BYTES + FOOTER_BYTES {
        return;
    }
    let mut bytes = data.to_vec();
    let header = usize::from(u16::from_le_bytes([bytes[10], bytes[11]])).clamp(HEADER_BYTES, bytes.len());
    bytes[24..28].fill(0);
    let crc = crc32fast::hash(&bytes[..header]);
    put32(&mut bytes, 24, crc);
    let tail = bytes.len() - FOOTER_BYTES;
    let count = u32::from_le_bytes(bytes[tail + 40..tail + 44].try_into().unwrap()) as usize;
    if let Some(start) = tail.checked_sub(count.saturating_mul(INDEX_ENTRY_BYTES)) {
        let crc = crc32fast::hash(&bytes[start..tail]);
        put32(&mut bytes, tail + 44, crc);
        bytes[tail + 32..tail + 40].copy_from_slice(&(start as u64).to_le_bytes());
    }
    let crc = crc32fast::hash(&bytes[tail..tail + 60]);
    put32(&mut bytes, tail + 60, crc);
    block_parts(&bytes);
}

/// See [`block_file`].
pub fn block_file_seeds() -> Vec<Vec<u8>> {
    let whole = |sizes: &[usize]| {
        let (mut bytes, index, _) = frames(sizes, true);
        bytes.extend_from_slice(&index.encode_tail(BLOCK));
        bytes
    };
    vec![whole(&[]), whole(&[10]), whole(&[300_000, 300_000, 5])]
}

/// Names of block files: what is read as one is written the same way.
pub fn block_name(data: &[u8]) {
    let name = String::from_utf8_lossy(data);
    let written = match blockfile::parse_name(&name) {
        None => return,
        Some((block, generation, Some(length))) => blockfile::finalized_name(block, generation, length),
        Some((block, generation, None)) => blockfile::unfinalized_name(block, generation),
    };
    assert_eq!(written, name);
}

/// See [`block_name`].
pub fn name_seeds() -> Vec<Vec<u8>> {
    let (finalized, open) =
        (blockfile::finalized_name(BLOCK, Generation(1_001), 77), blockfile::unfinalized_name(BLOCK, Generation(7)));
    vec![finalized.into_bytes(), open.into_bytes(), b"+7_007_0.blk".to_vec(), b"-0_1.rbw".to_vec()]
}

fn read_map_output(bytes: &[u8]) {
    let disk = file_of(bytes);
    let path = Path::new("/f");
    let file = disk.open(path, OpenMode::Read).unwrap();
    let Ok(entries) = read_index(&*file, path) else { return };
    assert!(entries.len() * mapoutput::INDEX_ENTRY_BYTES + mapoutput::FOOTER_BYTES <= bytes.len());
    for entry in entries.iter().take(8) {
        assert!(entry.offset.checked_add(entry.stored).is_some_and(|end| end <= bytes.len() as u64));
        drain(RunReader::new(RunBytes::partition(Arc::clone(&file), path, entry)));
    }
}

fn drain(mut reader: RunReader) -> Option<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut records = Vec::new();
    while reader.advance().ok()? {
        assert!(reader.key().len() + reader.value().len() <= mapoutput::MAX_CHUNK_RAW_BYTES);
        if records.len() < 1_000 {
            records.push((reader.key().to_vec(), reader.value().to_vec()));
        }
    }
    Some(records)
}

/// Map output: as it is, with right checksums, as a chunk, and as a recipe for records that must come back.
pub fn map_output(data: &[u8]) {
    use mapoutput::{CHUNK_HEADER_BYTES, FOOTER_BYTES, INDEX_ENTRY_BYTES};
    read_map_output(data);
    let mut chunk = data.to_vec();
    if chunk.len() > CHUNK_HEADER_BYTES {
        let stored =
            (u32::from_le_bytes(chunk[8..12].try_into().unwrap()) as usize).min(chunk.len() - CHUNK_HEADER_BYTES);
        put32(&mut chunk, 8, stored as u32);
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&chunk[..12]);
        hasher.update(&chunk[CHUNK_HEADER_BYTES..CHUNK_HEADER_BYTES + stored]);
        put32(&mut chunk, 12, hasher.finalize());
        drain(RunReader::new(RunBytes::Memory(Bytes::copy_from_slice(&chunk))));
    }
    if let Some(tail) = chunk.len().checked_sub(FOOTER_BYTES + INDEX_ENTRY_BYTES) {
        // One partition, wherever its entry says that it lies.
        let number = 0u32;
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&chunk[tail..tail + 32]);
        hasher.update(&number.to_le_bytes());
        put32(&mut chunk, tail + 32, hasher.finalize());
        let footer = mapoutput::Footer { partitions: 1, index_offset: tail as u64 }.encode();
        let at = chunk.len() - FOOTER_BYTES;
        chunk[at..].copy_from_slice(&footer);
        read_map_output(&chunk);
    }
    map_output_comes_back(&mut Input::new(data));
}

fn map_output_comes_back(input: &mut Input<'_>) {
    let disk = SimDisk::new(1 << 30, Entropy::seeded(1));
    let path = Path::new("/f");
    let mut writer = RunWriter::create(&disk, path).unwrap();
    let mut partitions = Vec::new();
    for _ in 0..input.byte() % 4 {
        let mut records = Vec::new();
        for _ in 0..input.byte() % 16 {
            let (key, value) = (usize::from(input.byte()), usize::from(input.byte()));
            let record = (input.take(key).to_vec(), input.take(value).to_vec());
            writer.push(&record.0, &record.1).unwrap();
            records.push(record);
        }
        writer.end_partition().unwrap();
        partitions.push(records);
    }
    let entries = writer.finish().unwrap();
    let file = disk.open(path, OpenMode::Read).unwrap();
    assert_eq!(read_index(&*file, path).unwrap(), entries);
    for (entry, records) in entries.iter().zip(&partitions) {
        let found = drain(RunReader::new(RunBytes::partition(Arc::clone(&file), path, entry))).unwrap();
        assert_eq!((&found, entry.records), (records, records.len() as u64));
    }
}

/// See [`map_output`].
pub fn map_output_seeds() -> Vec<Vec<u8>> {
    let disk = SimDisk::new(1 << 30, Entropy::seeded(1));
    let mut writer = RunWriter::create(&disk, Path::new("/f")).unwrap();
    for number in 0..300u32 {
        writer.push(format!("key {:05}", number / 2).as_bytes(), &[number as u8]).unwrap();
    }
    writer.end_partition().unwrap();
    writer.finish().unwrap();
    let whole = read_all(&disk, Path::new("/f"), 1 << 20).unwrap();
    let bomb = zstd::bulk::compress(&vec![0; 15 << 20], 1).unwrap();
    let chunk = [&mapoutput::ChunkHeader::encode(true, 15 << 20, &bomb)[..], &bomb].concat();
    vec![whole, chunk, vec![2, 3, 2, 2, b'a', b'b', b'c', b'd', 0, 0, 1, 1, 7, 8]]
}

fn comes_back<M: Message + Default + PartialEq + std::fmt::Debug>(bytes: &[u8]) {
    let Ok(message) = decode_message::<M>(bytes, "a peer") else { return };
    let sent = encode_delimited(&message);
    let (head, body) = sent.split_first_chunk::<MESSAGE_HEAD_BYTES>().unwrap();
    let head = MessageHead::decode(head, "a peer");
    assert_eq!(head.is_ok(), body.len() <= MAX_MESSAGE_BYTES);
    let Ok(head) = head else { return };
    // Not compared: a message may hold a NaN.
    let again = head.open::<M>(body, "a peer").unwrap();
    assert_eq!(encode_delimited(&again), sent);
}

/// Handshakes and the messages of the data plane, of the edit log, of clients and datanodes.
pub fn messages(data: &[u8]) {
    if let Some(bytes) = data.first_chunk::<PREAMBLE_BYTES>()
        && let Ok(preamble) = handshake::decode_preamble(bytes, "a peer")
    {
        assert!(preamble.message_bytes <= MAX_HELLO_BYTES);
        let hello = pb::Hello::default();
        let again = handshake::encode(preamble.purpose, preamble.version, &hello);
        assert_eq!(again[..8], bytes[..8]);
    }
    let rest = data.get(1..).unwrap_or_default();
    match data.first().copied().unwrap_or(0) % 16 {
        0 => comes_back::<pb::DataRequest>(rest),
        1 => comes_back::<pb::WriteReady>(rest),
        2 => comes_back::<pb::WriteAck>(rest),
        3 => comes_back::<pb::ReadReady>(rest),
        4 => comes_back::<pb::ReplicaInfoReply>(rest),
        5 => comes_back::<pb::VerifyReplicaReply>(rest),
        6 => comes_back::<pb::ReadMapOutputReply>(rest),
        7 => comes_back::<pb::Hello>(rest),
        8 => comes_back::<pb::HelloReply>(rest),
        9 => comes_back::<pb::Edit>(rest),
        10 => comes_back::<pb::HeartbeatResponse>(rest),
        11 => comes_back::<pb::ReportUp>(rest),
        12 => comes_back::<pb::RegisterRequest>(rest),
        13 => comes_back::<pb::GetBlockLocationsResponse>(rest),
        14 => comes_back::<pb::AddBlockResponse>(rest),
        _ => comes_back::<pb::StartTaskRequest>(rest),
    }
}

/// See [`messages`].
pub fn message_seeds() -> Vec<Vec<u8>> {
    let block = || Some(pb::Block { pool: "pool".into(), id: BLOCK.0, generation: 1_001 });
    let replica = pb::Replica {
        node_id: "n1".into(),
        host: "h".into(),
        address: "127.0.0.1:1".into(),
        rack: "/r".into(),
        ..Default::default()
    };
    let write = pb::WriteBlock { block: block(), targets: vec![replica; 2], block_size: 1 << 20, ..Default::default() };
    let request = pb::DataRequest { op: Some(pb::data_request::Op::Write(write)) };
    let ack = pb::WriteAck { length: 77, error: Some(pb::WireError::default()), ..Default::default() };
    let hello = pb::Hello { user: "ann".into(), role: "client".into(), ..Default::default() };
    let tagged = |tag: u8, message: Vec<u8>| [&[tag][..], &message].concat();
    vec![
        tagged(0, request.encode_to_vec()),
        tagged(2, ack.encode_to_vec()),
        tagged(7, hello.encode_to_vec()),
        handshake::encode(Purpose::Data, 1, &hello),
    ]
}

/// Typed errors survive messages and gRPC, whatever stands in them.
pub fn errors(data: &[u8]) {
    let Ok(wire) = pb::WireError::decode(data) else { return };
    let error = Error::from_wire(wire.clone());
    assert_ne!(error.code(), ErrorCode::Unspecified);
    assert_eq!(Error::from_wire(error.to_wire()), error);
    assert_eq!(pb::WireError::decode(&error.to_bytes()[..]).unwrap(), error.to_wire());
    let status = tonic::Status::from(error.clone());
    let header_bytes: usize = status
        .clone()
        .into_http::<()>()
        .headers()
        .iter()
        .map(|(key, value)| key.as_str().len() + value.len() + 32)
        .sum();
    assert!(header_bytes < 15 << 10, "{header_bytes} bytes of headers: the caller's HTTP/2 refuses 16 KiB");
    let back = Error::from(status);
    assert_eq!((back.code(), back.kind(), back.is_retryable()), (error.code(), error.kind(), error.is_retryable()));
    if error.message().len() + error.subject().len() < 1_000 {
        assert_eq!(back, error);
    }
}

/// See [`errors`].
pub fn error_seeds() -> Vec<Vec<u8>> {
    let error = |code, text: &str| Error::new(code, text).with_subject(text).to_bytes();
    vec![
        error(ErrorCode::LeaseExpired, "no lease on /a"),
        error(ErrorCode::SafeMode, &"/é".repeat(2_600)),
        error(ErrorCode::NotReplicatedYet, &"x".repeat(8_000)),
        pb::WireError { code: 9_999, message: "a\nb\0".into(), subject: String::new() }.encode_to_vec(),
    ]
}

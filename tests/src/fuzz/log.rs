//! The namenode's files: segments of the edit log, images.

use std::path::Path;

use cairn_common::durable::{Fs, OpenMode};
use cairn_common::entropy::Entropy;
use cairn_common::simdisk::SimDisk;
use cairn_namenode::image::format::{
    HEADER_BYTES as IMAGE_HEADER, ImageHeader, SECTION_BYTES, Section, TRAILER_BYTES, Trailer, page_digest,
};
use cairn_namenode::image::read_image;
use cairn_namenode::journal::format::{HEADER_BYTES, RECORD_OVERHEAD, SegmentHeader, encode_record, segment_name};
use cairn_namenode::journal::{LogEnd, LogError, cut_tail, read_log};
use cairn_proto::ids::{Epoch, TxId};

use super::formats::file_of;
use super::input::Input;

const CLUSTER: &str = "4f5c0c3e-0000-4000-8000-000000000001";
const SECTOR: usize = 512;

/// A log whose only segment, which starts with transaction 1, holds these bytes.
fn log_of(bytes: &[u8]) -> SimDisk {
    let disk = SimDisk::new(1 << 30, Entropy::seeded(1));
    disk.create_dir_all(Path::new("/log")).unwrap();
    let path = Path::new("/log").join(segment_name(TxId(1)));
    disk.open(&path, OpenMode::Create).unwrap().write_all_at(bytes, 0).unwrap();
    disk
}

/// Reads it: where it ends, and the payloads.
fn read(disk: &SimDisk) -> Result<(LogEnd, Vec<Vec<u8>>), LogError> {
    let mut payloads = Vec::new();
    let end = read_log(disk, Path::new("/log"), CLUSTER, TxId(1), |_, payload| {
        payloads.push(payload.to_vec());
        Ok(())
    })?;
    assert_eq!((end.last.0, end.records), (payloads.len() as u64, payloads.len() as u64), "a gap");
    Ok((end, payloads))
}

fn put32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

/// Makes the checksums of the header and of all records right, one after the other, chain and end marks too.
fn sealed(mut bytes: Vec<u8>) -> Vec<u8> {
    if bytes.len() < HEADER_BYTES {
        return bytes;
    }
    bytes[..8].copy_from_slice(b"CAIRNLOG");
    let crc = crc32c::crc32c(&bytes[..92]);
    put32(&mut bytes, 92, crc);
    let (mut at, mut chain) = (HEADER_BYTES, u32::from_le_bytes(bytes[32..36].try_into().unwrap()));
    while at + RECORD_OVERHEAD < bytes.len() {
        let length = u32::from_le_bytes(bytes[at + 4..at + 8].try_into().unwrap()) as usize;
        let length = length.clamp(1, bytes.len() - at - RECORD_OVERHEAD);
        if bytes[at..at + 4] == [0; 4] {
            break;
        }
        bytes[at..at + 4].copy_from_slice(b"EDT1");
        put32(&mut bytes, at + 4, length as u32);
        put32(&mut bytes, at + 32, chain);
        let crc = crc32c::crc32c(&bytes[at..at + 36]);
        put32(&mut bytes, at + 36, crc);
        chain = crc32c::crc32c(&bytes[at..at + 40 + length]);
        put32(&mut bytes, at + 40 + length, chain);
        bytes[at + 44 + length] = 0xE5;
        at += RECORD_OVERHEAD + length;
    }
    bytes
}

/// A segment: as it is, and with all checksums right.
pub fn log_segment(data: &[u8]) {
    for bytes in [data.to_vec(), sealed(data.to_vec())] {
        if let Ok((end, payloads)) = read(&log_of(&bytes)) {
            let held: usize = payloads.iter().map(|payload| payload.len() + RECORD_OVERHEAD).sum();
            let tail = end.tail.unwrap();
            assert_eq!(tail.end as usize, HEADER_BYTES + held);
            assert!(tail.torn || bytes[tail.end as usize..].iter().all(|&byte| byte == 0));
        }
    }
}

/// A segment of batches as the writer makes it, from a recipe.
struct Recipe {
    bytes: Vec<u8>,
    payloads: Vec<Vec<u8>>,
    /// Where each record lies, and the number of its batch.
    records: Vec<(std::ops::Range<usize>, usize)>,
    /// Where the last batch starts, and how many records come before it.
    last_batch: (usize, usize),
}

fn recipe(input: &mut Input<'_>) -> Recipe {
    let header = SegmentHeader { first: TxId(1), epoch: Epoch(3), chain: 0xABCD, cluster_id: CLUSTER.into() };
    let mut made = Recipe {
        bytes: header.encode().to_vec(),
        payloads: Vec::new(),
        records: Vec::new(),
        last_batch: (HEADER_BYTES, 0),
    };
    let mut chain = header.chain;
    for batch in 0..usize::from(input.byte() % 5 + 1) {
        made.last_batch = (made.bytes.len(), made.payloads.len());
        let durable = TxId(made.payloads.len() as u64);
        for _ in 0..input.byte() % 5 + 1 {
            let (fill, size) = (input.byte(), usize::from(input.short()) % 1_800 + 1);
            // Zeros inside a payload look like a sector that was never written.
            let payload: Vec<u8> = (0..size).map(|at| if at % 700 < 40 { fill } else { fill & 1 }).collect();
            let start = made.bytes.len();
            let txid = TxId(made.payloads.len() as u64 + 1);
            chain = encode_record(&mut made.bytes, (txid, Epoch(3), durable), chain, |out| {
                out.extend_from_slice(&payload);
            })
            .unwrap();
            made.records.push((start..made.bytes.len(), batch));
            made.payloads.push(payload);
        }
    }
    made
}

/// Room written ahead.
fn padded(mut bytes: Vec<u8>, input: &mut Input<'_>) -> Vec<u8> {
    let room = usize::from(input.byte()) * 16;
    bytes.resize(bytes.len() + room, 0);
    bytes
}

/// Bytes of one record are altered, wherever it is: it is never read as something else, and if it was durable for certain, the log is refused.
pub fn log_damage(data: &[u8]) {
    let mut input = Input::new(data);
    let made = recipe(&mut input);
    let mut bytes = padded(made.bytes.clone(), &mut input);
    let number = usize::from(input.byte()) % made.records.len();
    let (range, batch) = made.records[number].clone();
    let at = range.start + usize::from(input.short()) % range.len();
    let noise = input.rest();
    for (byte, noise) in bytes[at..range.end].iter_mut().zip(noise) {
        *byte ^= noise;
    }
    let altered = bytes[..made.bytes.len()] != made.bytes;
    let found = read(&log_of(&bytes));
    if !altered {
        assert_eq!(found.unwrap().1, made.payloads);
        return;
    }
    let is_last = batch == made.records.last().map_or(0, |(_, batch)| *batch);
    match found {
        Ok((_, payloads)) => {
            assert!(is_last, "transaction {} was durable, is altered, and was forgotten", number + 1);
            assert!(payloads.len() <= number && made.payloads.starts_with(&payloads));
        }
        Err(error) => assert!(error.to_string().contains("edits_"), "{error} names no file"),
    }
}

/// The power goes while the last batch is written: any of its sectors may be missing, and the file may be shorter. What was durable is read,
/// nothing that was not written, and the start goes on.
pub fn log_crash(data: &[u8]) {
    let mut input = Input::new(data);
    let made = recipe(&mut input);
    let (from, durable) = made.last_batch;
    let mut bytes = made.bytes.clone();
    let sectors = from / SECTOR..bytes.len().div_ceil(SECTOR);
    for sector in sectors {
        if input.flag() {
            let end = ((sector + 1) * SECTOR).min(bytes.len());
            bytes[from.max(sector * SECTOR)..end].fill(0);
        }
    }
    let mut bytes = padded(bytes, &mut input);
    if input.flag() {
        bytes.truncate(from + usize::from(input.short()) % (bytes.len() - from + 1));
    }
    let disk = log_of(&bytes);
    let (end, payloads) = read(&disk).unwrap_or_else(|error| panic!("a torn batch stops the start: {error}"));
    assert!(payloads.len() >= durable, "{} read, {durable} were durable", payloads.len());
    assert!(made.payloads.starts_with(&payloads), "other records than were written");
    cut_tail(&disk, end.tail.as_ref().unwrap()).unwrap();
    let (again, same) = read(&disk).unwrap();
    assert!(same == payloads && (again.last, again.chain) == (end.last, end.chain));
    assert!(!again.tail.unwrap().torn || payloads.is_empty());
}

/// See [`log_segment`].
pub fn segment_seeds() -> Vec<Vec<u8>> {
    let one = |data: &[u8]| recipe(&mut Input::new(data)).bytes;
    let mut room = one(&[1, 1, 9, 20, 0]);
    room.resize(room.len() + 600, 0);
    vec![one(&[0, 0, 5, 10, 0]), one(&[2, 1, 9, 40, 0, 7, 30, 0, 2, 1, 1, 0, 2, 2, 0, 3, 3, 0]), room]
}

/// Recipes of batches, and noise.
pub fn recipe_seeds() -> Vec<Vec<u8>> {
    vec![
        vec![2, 1, 9, 40, 0, 7, 30, 0, 2, 1, 1, 0, 2, 2, 0, 3, 3, 0, 10, 1, 0, 0, 255, 1],
        vec![1, 4, 8, 255, 6, 2, 200, 5, 0, 0, 4, 4, 4, 4, 1, 1, 1, 1, 0, 2, 100, 1, 1, 0, 1, 0, 1, 1],
        vec![4, 0, 1, 1, 0, 0, 2, 1, 0, 0, 3, 1, 0, 0, 4, 1, 0, 0, 5, 1, 7, 200, 3, 100, 0, 1],
        vec![0, 3, 0, 255, 255, 1, 255, 255, 2, 255, 255, 3, 255, 255, 0, 1, 0, 1, 0, 1, 1, 1],
    ]
}

fn image_of(input: &mut Input<'_>) -> (Vec<u8>, Vec<Vec<u8>>) {
    let header =
        ImageHeader { txid: TxId(77), epoch: Epoch(2), cluster_id: CLUSTER.into(), state_digest: input.number() };
    let (mut out, mut pages, mut digest) = (header.encode().to_vec(), Vec::new(), 0u64);
    for index in 0..u64::from(input.byte() % 4) {
        let (fill, size) = (input.byte(), usize::from(input.short()) % 5_000);
        let page = vec![fill; size];
        let stored = zstd::bulk::compress(&page, 1).unwrap();
        out.extend_from_slice(&Section::of(index, page.len(), &stored).encode());
        out.extend_from_slice(&stored);
        digest = digest.wrapping_add(page_digest(&page));
        pages.push(page);
    }
    end_image(&mut out, pages.len() as u64, digest);
    (out, pages)
}

fn end_image(out: &mut Vec<u8>, pages: u64, digest: u64) {
    let trailer = Trailer { pages, digest, txid: TxId(77), file_bytes: (out.len() + TRAILER_BYTES) as u64 };
    let crc = crc32c::crc32c(out);
    out.extend_from_slice(&trailer.encode(crc));
}

fn read_pages(bytes: &[u8]) -> Result<Vec<Vec<u8>>, LogError> {
    let mut pages = Vec::new();
    let facts = read_image(&file_of(bytes), Path::new("/f"), CLUSTER, |page| {
        pages.push(page.to_vec());
        Ok(())
    })?;
    assert_eq!((facts.pages, facts.bytes), (pages.len() as u64, bytes.len() as u64));
    Ok(pages)
}

/// An image: whole, it gives its pages; with any change it is refused; with hostile sections under right checksums it neither panics nor
/// takes more memory than a page may have.
pub fn image_file(data: &[u8]) {
    let _ = read_pages(data);
    let mut input = Input::new(data);
    let (whole, pages) = image_of(&mut input);
    assert_eq!(read_pages(&whole).unwrap(), pages);
    let mut bytes = whole.clone();
    let at = usize::from(input.short()) % bytes.len();
    let noise = input.rest();
    for (byte, noise) in bytes[at..].iter_mut().zip(noise) {
        *byte ^= noise;
    }
    if noise.first() == Some(&0) {
        bytes.truncate(at);
    }
    assert!(bytes == whole || read_pages(&bytes).is_err(), "an altered image was read");

    let mut input = Input::new(data);
    let mut hostile = whole[..IMAGE_HEADER].to_vec();
    let mut index = 0;
    while !input.is_empty() && index < 4 {
        let raw = input.number() as usize & 0xFFFF_FFFF;
        let length = usize::from(input.byte());
        let stored = input.take(length);
        let mut head = [0; SECTION_BYTES];
        head[..4].copy_from_slice(b"PAGE");
        put32(&mut head, 4, raw as u32);
        put32(&mut head, 8, stored.len() as u32);
        put32(&mut head, 12, Section::checksum(index, raw, stored));
        hostile.extend_from_slice(&head);
        hostile.extend_from_slice(stored);
        index += 1;
    }
    end_image(&mut hostile, index, input.number());
    let _ = read_pages(&hostile);
}

/// See [`image_file`].
pub fn image_seeds() -> Vec<Vec<u8>> {
    let whole = image_of(&mut Input::new(&[3, 2, 9, 200, 1, 8, 10, 0])).0;
    let bomb = zstd::bulk::compress(&vec![0; 3 << 20], 1).unwrap();
    vec![whole, vec![1, 3, 1, 9, 9, 2, 0, 0, 3, 4, 0, 60, 0, 1, 2], [&[230, bomb.len() as u8][..], &bomb].concat()]
}

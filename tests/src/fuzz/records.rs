//! What lies between mappers and reducers, and on disk beside them: files of binary keys and values, encoded keys and values, the note of a map's position.

use std::cmp::Reverse;
use std::fmt::Debug;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use cairn_client::mapreduce::container::HEADER_BYTES;
use cairn_client::mapreduce::encode::{Key, List, Value};
use cairn_client::mapreduce::input::{BatchReader, Feed, feed_start};
use cairn_client::mapreduce::output::{Output, OutputNames, OutputSink};
use cairn_client::mapreduce::{InputFormat, OutputFormat, Result, TaskKind, UserCounters};
use cairn_proto::mapoutput::{CHUNK_HEADER_BYTES, MAX_CHUNK_RAW_BYTES};
use cairn_proto::{ErrorCode, kept, pb, position};

use super::input::Input;

type Pairs = Vec<(Vec<u8>, Vec<u8>)>;

const MARK_BYTES: usize = 16;

struct Pieces {
    rest: Bytes,
    step: usize,
}

impl Feed for Pieces {
    fn next(&mut self) -> Result<Option<Bytes>> {
        let piece = self.rest.split_to(self.step.clamp(1, self.rest.len().max(1)).min(self.rest.len()));
        Ok((!piece.is_empty()).then_some(piece))
    }
}

/// The header first, then the file from where the split's feed starts, as a map's reader delivers it.
struct Headed {
    head: Option<Bytes>,
    rest: Pieces,
}

impl Feed for Headed {
    fn next(&mut self) -> Result<Option<Bytes>> {
        match self.head.take() {
            Some(head) => Ok(Some(head)),
            None => self.rest.next(),
        }
    }
}

/// The records of one split; `None` if it is refused.
fn read_split(file: &[u8], from: usize, to: usize, step: usize) -> Option<Pairs> {
    let split = pb::Split { path: "/f".into(), offset: from as u64, length: (to - from) as u64, ..Default::default() };
    let start = (feed_start(&split, InputFormat::KeyValue) as usize).min(file.len());
    let head = Bytes::copy_from_slice(&file[..file.len().min(HEADER_BYTES as usize)]);
    let rest = Pieces { rest: Bytes::copy_from_slice(&file[start..]), step };
    let feed = Headed { head: Some(head).filter(|head| !head.is_empty()), rest };
    let mut reader = BatchReader::new(&split, InputFormat::KeyValue, 1 << 20, feed).unwrap();
    let mut out = Vec::new();
    loop {
        match reader.next() {
            Ok(Some(batch)) => {
                assert!(batch.bytes.len() <= MAX_CHUNK_RAW_BYTES);
                assert!(
                    (split.offset..split.offset + split.length).contains(&batch.offset),
                    "a chunk of another split"
                );
                let records = batch.records().map(|one| (one.key.to_vec(), one.bytes.to_vec()));
                out.extend(records.take(10_000_usize.saturating_sub(out.len())));
            }
            Ok(None) => return Some(out),
            Err(error) => {
                assert!(error.code() == ErrorCode::Corrupt && error.message().starts_with("/f: "), "{error}");
                return None;
            }
        }
    }
}

/// Makes the checksums of header and chunks right, and the marks of chunks that of the file.
fn seal(file: &mut [u8]) {
    let header = HEADER_BYTES as usize;
    if file.len() < header {
        return;
    }
    file[..8].copy_from_slice(b"CAIRNKV1");
    let crc = crc32fast::hash(&file[..24]);
    file[24..28].copy_from_slice(&crc.to_le_bytes());
    file[28..32].fill(0);
    let mark: [u8; MARK_BYTES] = file[8..24].try_into().unwrap();
    let mut rest = &mut file[header..];
    while rest.len() > MARK_BYTES + CHUNK_HEADER_BYTES {
        rest[..MARK_BYTES].copy_from_slice(&mark);
        let chunk = &mut rest[MARK_BYTES..];
        let stored = u32::from_le_bytes(chunk[8..12].try_into().unwrap()) as usize;
        let stored = stored.min(chunk.len() - CHUNK_HEADER_BYTES);
        chunk[8..12].copy_from_slice(&(stored as u32).to_le_bytes());
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&chunk[..12]);
        hasher.update(&chunk[CHUNK_HEADER_BYTES..CHUNK_HEADER_BYTES + stored]);
        let crc = hasher.finalize();
        chunk[12..16].copy_from_slice(&crc.to_le_bytes());
        rest = &mut rest[MARK_BYTES + CHUNK_HEADER_BYTES + stored..];
    }
}

struct Sink(Arc<Mutex<Vec<u8>>>);

impl OutputSink for Sink {
    fn open(&mut self, _attempt_name: &str) -> Result<()> {
        Ok(())
    }

    fn write(&mut self, _file: usize, piece: Bytes) -> Result<()> {
        self.0.lock().unwrap().extend_from_slice(&piece);
        Ok(())
    }
}

fn write_container(pairs: &Pairs, mark: u128) -> Vec<u8> {
    let bytes = Arc::new(Mutex::new(Vec::new()));
    let names = OutputNames::new(TaskKind::Map, 0, 0, mark);
    let sink = Box::new(Sink(Arc::clone(&bytes)));
    let mut out = Output::new(sink, OutputFormat::KEY_VALUE, names, UserCounters::default()).unwrap();
    pairs.iter().for_each(|(key, value)| out.emit(key, value).unwrap());
    out.finish().unwrap();
    std::mem::take(&mut *bytes.lock().unwrap())
}

/// Files of binary keys and values: as they are, with right checksums, and as a recipe for records that must come back whatever the splits.
pub fn container(data: &[u8]) {
    let mut input = Input::new(data);
    let (cut, step) = (usize::from(input.short()), 1 + usize::from(input.short()));
    let file = input.rest();
    let cut = cut.min(file.len());
    for (from, to) in [(0, file.len()), (cut, file.len())] {
        read_split(file, from, to, step);
    }
    let mut sealed = file.to_vec();
    seal(&mut sealed);
    for (from, to) in [(0, cut), (cut, sealed.len())] {
        read_split(&sealed, from, to, step);
    }
    let mut pairs = Pairs::new();
    while !input.is_empty() && pairs.len() < 64 {
        let (key, value, times) = (usize::from(input.byte()), usize::from(input.byte()), usize::from(input.byte()));
        pairs.push((input.take(key).repeat(1 + times), input.take(value).to_vec()));
    }
    // Its mark is none that the seeds have: what holds its own file's mark, which is random, nobody writes.
    let file = write_container(&pairs, u128::MAX / 7);
    let cut = cut.min(file.len());
    let halves = [(0, cut), (cut, file.len())].map(|(from, to)| read_split(&file, from, to, step).unwrap());
    assert_eq!(halves.concat(), pairs);
}

/// See [`container`].
pub fn container_seeds() -> Vec<Vec<u8>> {
    let pairs = (0..400u32).map(|n| (n.to_be_bytes().to_vec(), format!("value {n}").repeat(9).into_bytes())).collect();
    let large = vec![(vec![7; 300_000], vec![8; 10]), (Vec::new(), Vec::new())];
    let seed = |pairs: &Pairs| {
        [&[40, 0, 200, 3][..], &write_container(pairs, 0x1234_5678_9abc_def0_0fed_cba9_8765_4321)].concat()
    };
    vec![seed(&pairs), seed(&large), seed(&Pairs::new()), vec![9, 0, 5, 0, 3, 4, 255, b'k', b'e', b'y', 1, 2, 3, 4]]
}

/// What is read as a key encodes as it was, and is passed over as it is read.
fn key<K: Key + PartialEq + Debug>(bytes: &[u8]) -> Option<K> {
    let mut rest = bytes;
    if let Some(key) = K::read_key(&mut rest) {
        let used = bytes.len() - rest.len();
        let mut again = Vec::new();
        key.write_key(&mut again);
        assert_eq!(again, &bytes[..used], "{key:?}");
        let mut skipped = bytes;
        K::skip_key(&mut skipped).unwrap();
        assert_eq!(skipped.len(), rest.len(), "{key:?}");
    }
    let key = K::read_last_key(bytes)?;
    let mut again = Vec::new();
    key.write_last_key(&mut again);
    assert_eq!(again, bytes, "{key:?}");
    Some(key)
}

/// Of keys that both are read, bytes order as they do.
fn keys<K: Key + Ord + Debug>(a: &[u8], b: &[u8]) {
    if let (Some(one), Some(other)) = (key::<K>(a), key::<K>(b)) {
        assert_eq!(one.cmp(&other), a.cmp(b), "{one:?} {other:?}");
    }
}

fn value<V: Value + PartialEq + Debug>(bytes: &[u8]) {
    let mut rest = bytes;
    let _ = V::read_value(&mut rest);
    let Some(value) = V::read_last_value(bytes) else { return };
    let mut again = Vec::new();
    value.write_last_value(&mut again);
    assert_eq!(V::read_last_value(&again).as_ref(), Some(&value));
}

/// Encoded keys and values.
pub fn encoding(data: &[u8]) {
    let mut input = Input::new(data);
    let (kind, length) = (input.byte(), usize::from(input.byte()));
    let (a, b) = (input.take(length), input.rest());
    match kind % 8 {
        0 => keys::<String>(a, b),
        1 => keys::<(String, u8)>(a, b),
        2 => keys::<(Vec<u8>, Option<i32>)>(a, b),
        3 => keys::<(Reverse<String>, Option<(bool, String)>)>(a, b),
        4 => keys::<(i64, Reverse<Vec<u8>>)>(a, b),
        5 => keys::<Option<Reverse<Option<u128>>>>(a, b),
        6 => {
            // Not compared: floats have no total order of their own, and those that are no numbers are not equal to themselves.
            if let (Some(one), Some(other)) = (f64::read_last_key(a), f64::read_last_key(b)) {
                assert_eq!(one.total_cmp(&other), a.cmp(b));
            }
        }
        _ => keys::<(Vec<u8>, Vec<u8>, ())>(a, b),
    }
    value::<(u16, i64, String)>(b);
    value::<(Option<String>, List<(String, u64)>)>(b);
    value::<List<List<Vec<u8>>>>(b);
    value::<List<()>>(b);
}

/// See [`encoding`].
pub fn encoding_seeds() -> Vec<Vec<u8>> {
    let seed = |kind: u8, a: &[u8], b: &[u8]| [&[kind, a.len() as u8], a, b].concat();
    vec![
        seed(0, b"a\0b", b"a\0\xc3\xa9"),
        seed(1, b"a\0\xff\0\0\x05", b"a\0\0\x06"),
        seed(2, b"\x01\0\0\x01\x80\0\0\x01", b"\0\0\0"),
        seed(3, b"\x9e\xff\xff\x01\x01abc", b"\x9e\xff\0\xff\xff\0"),
        seed(4, b"\x80\0\0\0\0\0\0\x01\xff\xfe", b"\x7f\xff\xff\xff\xff\xff\xff\xff"),
        seed(5, &[1, 0xfe, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7], b"\0"),
        seed(6, b"\xbf\xf0\0\0\0\0\0\0", b"\x40\x0f\xff\xff\xff\xff\xff\xff"),
        seed(7, b"\0\xff\0\0\0\0", b"\x01\0\0\x02\0\0"),
        seed(0, b"", b"\x01\x03abc\x02\x01x\x07\x80\x01"),
        seed(0, b"", b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"),
    ]
}

/// The note of a map's position: whatever a process that died left of it, what is read is told in words and comes back.
pub fn position_note(data: &[u8]) {
    let mut file = data.to_vec();
    for state in [None, Some(position::AT_RECORD), Some(position::IN_BATCH)] {
        if let (Some(state), Some(head)) = (state, file.first_chunk_mut::<8>()) {
            *head = state.to_ne_bytes();
        }
        let Some(found) = position::decode(&file) else { continue };
        assert!(found.path.len() <= 3 * position::FILE_BYTES);
        let text = position::describe(&found);
        assert!(text.contains(&found.path) && text.contains("record"), "{text}");
        let mut again = position::encode(&found.path);
        again[..24].copy_from_slice(&file[..24]);
        let longest = position::FILE_BYTES - 32;
        if found.path.len() <= longest {
            assert_eq!(position::decode(&again), Some(found));
        }
    }
}

/// See [`position_note`].
pub fn position_seeds() -> Vec<Vec<u8>> {
    let mut at = position::encode("/a/b");
    at[..8].copy_from_slice(&position::AT_RECORD.to_ne_bytes());
    at[8] = 7;
    vec![at, position::encode(&"/é".repeat(4_000)), position::encode("")]
}

/// Content that a job keeps for others: of whatever lies in its folder, a name says what would be written again, and a chunk is as long as it says.
pub fn kept_content(data: &[u8]) {
    if let Some(name) =
        std::str::from_utf8(data).ok().and_then(|name| kept::KeptName::parse(name).map(|found| (name, found)))
    {
        let (text, found) = name;
        assert_eq!(found.to_string(), text);
        assert!(found.end() >= found.start);
    }
    let Some((header, rest)) = data.split_first_chunk::<{ kept::CHUNK_HEADER_BYTES }>() else { return };
    let Some(length) = kept::chunk_length(header) else { return };
    assert!((1..=kept::MAX_CHUNK_BYTES).contains(&length));
    let chunk = &rest[..length.min(rest.len())];
    if kept::chunk_fits(header, chunk) {
        assert_eq!(kept::chunk_header(chunk), *header);
    }
}

/// See [`kept_content`].
pub fn kept_seeds() -> Vec<Vec<u8>> {
    let name = kept::KeptName {
        inode: 31,
        modified_ms: 1 << 40,
        length: 500,
        start: 7,
        bytes: 90,
        decoded: false,
        written: false,
    };
    let names = [name, kept::KeptName { decoded: true, ..name }, kept::KeptName { written: true, ..name }];
    let chunk = [&kept::chunk_header(b"some data")[..], b"some data"].concat();
    names.iter().map(|name| name.to_string().into_bytes()).chain([chunk]).collect()
}

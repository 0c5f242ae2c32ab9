//! Collecting, merging and reducing against the plain way.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use cairn_common::durable::{Fs, OpenMode, SystemFs};
use cairn_proto::{Result, pb};
use proptest::prelude::*;

use super::builtin;
use super::collect::Adding;
use super::input::{BatchReader, Feed};
use super::output::OutputNames;
use super::output::tests::MemorySink;
use super::reduce::{Scratch, Segment};
use super::run::{RunBytes, RunReader, read_index};
use super::*;

struct Once(Option<Bytes>);

impl Feed for Once {
    fn next(&mut self) -> Result<Option<Bytes>> {
        Ok(self.0.take())
    }
}

/// Runs one map over the whole of `text` and returns its counters.
fn map(program: &dyn Program, text: &[u8], reducers: u32, shares: &Shares, dir: &Path, output: &Path) -> Counters {
    let split = pb::Split { length: text.len() as u64, ..Default::default() };
    let feed = Once(Some(Bytes::copy_from_slice(text)));
    let mut reader = BatchReader::new(&split, program.input(), 1 << 20, feed).unwrap();
    let task = TaskContext::default();
    let user = task.user_counters.clone();
    let mut out = Collector::new(program, reducers, shares, Arc::new(SystemFs), dir, user).unwrap();
    let mut mapper = program.mapper(&task).unwrap();
    while let Some(batch) = reader.next().unwrap() {
        mapper.map_batch(&batch, &mut out).unwrap();
    }
    mapper.finish(&mut out).unwrap();
    out.finish(output).unwrap().counters
}

/// Maps each text, reduces each partition, and returns the parts.
fn job(program: &dyn Program, texts: &[Vec<u8>], reducers: u32, shares: &Shares) -> (Vec<Vec<u8>>, Counters) {
    let dir = tempfile::tempdir().unwrap();
    let mut counters = Counters::default();
    let mut outputs = Vec::new();
    for (number, text) in texts.iter().enumerate() {
        let work = dir.path().join(format!("work{number}"));
        SystemFs.create_dir_all(&work).unwrap();
        let output = dir.path().join(format!("map{number}"));
        counters.merge(&map(program, text, reducers, shares, &work, &output));
        assert!(SystemFs.read_dir(&work).unwrap().is_empty(), "spills are left");
        outputs.push(output);
    }
    let mut parts = Vec::new();
    for partition in 0..reducers {
        let work = dir.path().join(format!("reduce{partition}"));
        SystemFs.create_dir_all(&work).unwrap();
        let segments = outputs.iter().enumerate().map(|(number, path)| {
            let file = SystemFs.open(path, OpenMode::Read).unwrap();
            let entry = read_index(&*file, path).unwrap()[partition as usize];
            let mut bytes = vec![0; entry.stored as usize];
            file.read_exact_at(&mut bytes, entry.offset).unwrap();
            if number % 2 == 0 {
                return Segment::Memory(bytes.into());
            }
            let path = work.join(format!("fetched{number}"));
            SystemFs.open(&path, OpenMode::Create).unwrap().write_all_at(&bytes, 0).unwrap();
            Segment::File(path)
        });
        let sink = MemorySink::default();
        let names = OutputNames::default();
        let out = Output::new(Box::new(sink.clone()), program.output(), names, UserCounters::default()).unwrap();
        let scratch = Scratch { fs: Arc::new(SystemFs), dir: work.clone() };
        let task = TaskContext::default();
        let reduced = reduce::run(program, &task, segments.collect(), shares, &scratch, out).unwrap();
        assert!(reduced.hot_keys.is_sorted_by_key(|(_, records)| std::cmp::Reverse(*records)));
        assert!(reduced.hot_keys.len() as u64 == reduced.counters.get(counter::REDUCE_GROUPS).min(5));
        counters.merge(&reduced.counters);
        assert!(SystemFs.read_dir(&work).unwrap().is_empty(), "files are left");
        parts.push(sink.bytes(0));
    }
    (parts, counters)
}

fn naive(texts: &[Vec<u8>]) -> BTreeMap<Vec<u8>, u64> {
    let mut counts = BTreeMap::new();
    for text in texts {
        let words = text.split(|byte| b" \t\n\r\x0b\x0c".contains(byte)).filter(|word| !word.is_empty());
        for word in words {
            *counts.entry(word.to_ascii_lowercase()).or_insert(0) += 1;
        }
    }
    counts
}

fn check_parts(parts: &[Vec<u8>], want: &BTreeMap<Vec<u8>, u64>) {
    let mut got = BTreeMap::new();
    for part in parts {
        let mut last: Option<Vec<u8>> = None;
        for line in part.split_inclusive(|byte| *byte == b'\n') {
            let tab = line.iter().rposition(|byte| *byte == b'\t').unwrap();
            let word = line[..tab].to_vec();
            assert!(last.as_ref().is_none_or(|last| *last < word), "a part is not sorted");
            let count = std::str::from_utf8(&line[tab + 1..line.len() - 1]).unwrap().parse().unwrap();
            assert!(got.insert(word.clone(), count).is_none(), "a word is in two parts");
            last = Some(word);
        }
    }
    assert!(got == *want);
}

fn word() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        prop::collection::vec(prop::sample::select(b"aAbB\0\xff".to_vec()), 1..5),
        prop::collection::vec(prop::sample::select(b"xyXY".to_vec()), 6..24),
        prop::collection::vec(Just(b'q'), 30..34),
    ]
}

fn text() -> impl Strategy<Value = Vec<u8>> {
    let space = prop::sample::select(vec![" ", "\n", "\t\r\n", "\x0b", "\x0c "]);
    prop::collection::vec((word(), space), 0..400).prop_map(|pairs| {
        pairs.into_iter().flat_map(|(word, space)| [word, space.as_bytes().to_vec()].concat()).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn word_count_equals_the_plain_way(
        texts in prop::collection::vec(text(), 1..6),
        reducers in 1u32..5,
        combine in any::<bool>(),
        collect in prop::sample::select(vec![1u64 << 10, 16 << 10, 64 << 20]),
        merge_ways in 2usize..5,
    ) {
        let shares = Shares { collect, fetched: 0, program: 0, merge_ways };
        let program = wordcount::WordCount { combine };
        let (parts, counters) = job(&program, &texts, reducers, &shares);
        let want = naive(&texts);
        check_parts(&parts, &want);
        prop_assert_eq!(counters.get(counter::RECORDS_MAP_OUT), want.values().sum::<u64>());
        prop_assert_eq!(counters.get(counter::RECORDS_OUT), want.len() as u64);
        prop_assert_eq!(counters.get(counter::REDUCE_GROUPS), want.len() as u64);
    }
}

#[test]
fn spills_work_beyond_memory_and_are_counted() {
    let mut text = Vec::new();
    for i in 0..60_000u32 {
        text.extend_from_slice(format!("w{} long-word-beyond-sixteen-bytes-{}\n", i % 7_000, i % 9_000).as_bytes());
    }
    let texts = [text];
    let shares = Shares { collect: 300 << 10, fetched: 0, program: 0, merge_ways: 3 };
    for combine in [true, false] {
        let (parts, counters) = job(&wordcount::WordCount { combine }, &texts, 3, &shares);
        check_parts(&parts, &naive(&texts));
        assert!(counters.get(counter::SPILLS) > 3, "{counters:?}");
        assert!(counters.get(counter::SPILLED_BYTES) > 10_000);
        let combined = counters.get(counter::RECORDS_COMBINE_OUT);
        assert_eq!(combined, if combine { 16_000 } else { 120_000 });
        assert_eq!(counters.get(counter::REDUCE_RECORDS), combined);
    }
}

struct WithCombiner(wordcount::WordCount);

impl Program for WithCombiner {
    fn input(&self) -> InputFormat {
        self.0.input()
    }
    fn mapper(&self, task: &TaskContext) -> Result<Box<dyn Mapper>> {
        self.0.mapper(task)
    }
    fn combine(&self) -> Combine {
        Combine::With(Box::new(Adding))
    }
    fn reducer(&self, task: &TaskContext) -> Result<Box<dyn Reducer>> {
        self.0.reducer(task)
    }
}

#[test]
fn a_combiner_of_ones_own_gives_the_same() {
    let text: Vec<u8> = (0..20_000u32).flat_map(|i| format!("k{} ", i % 1_000).into_bytes()).collect();
    let program = WithCombiner(wordcount::WordCount { combine: true });
    let shares = Shares { collect: 100 << 10, fetched: 0, program: 0, merge_ways: 2 };
    let (parts, counters) = job(&program, std::slice::from_ref(&text), 2, &shares);
    check_parts(&parts, &naive(&[text]));
    assert_eq!(counters.get(counter::RECORDS_COMBINE_OUT), 1_000);
}

#[test]
fn grep_keeps_the_order_of_the_input_and_counts() {
    let text = b"Error: one\nfine\nerror: two\nError: one\nlast error".to_vec();
    let shares = Shares { collect: 60, fetched: 0, program: 0, merge_ways: 2 };
    let program = |properties: &[(&str, &str)]| {
        let properties = properties.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        builtin::program("grep", &properties, 1).unwrap()
    };
    let (parts, _) = job(&*program(&[("pattern", "(?i)error")]), std::slice::from_ref(&text), 1, &shares);
    assert_eq!(parts[0], b"Error: one\nerror: two\nError: one\nlast error\n");
    let (parts, _) = job(&*program(&[("pattern", "^Error"), ("count", "true")]), &[text], 1, &shares);
    assert_eq!(parts[0], b"Error: one\t2\n");
}

#[test]
fn an_altered_segment_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("map");
    let program = wordcount::WordCount { combine: true };
    map(&program, b"some words and some more words", 1, &Shares::of(64 << 20), dir.path(), &output);
    let file = SystemFs.open(&output, OpenMode::Read).unwrap();
    let entry = read_index(&*file, &output).unwrap()[0];
    let mut bytes = vec![0; entry.stored as usize];
    file.read_exact_at(&mut bytes, entry.offset).unwrap();
    for at in 0..bytes.len() {
        let mut bad = bytes.clone();
        bad[at] ^= 1;
        let mut reader = RunReader::new(RunBytes::Memory(bad.into()));
        let result = std::iter::from_fn(|| match reader.advance() {
            Ok(true) => Some(Ok(())),
            Ok(false) => None,
            Err(error) => Some(Err(error)),
        });
        assert!(result.take(100).any(|step| step.is_err()), "byte {at}");
    }
}

/// Fields "key.second value": grouped by the key, values in the order of the second, in key ranges.
struct Secondary {
    sums: bool,
}

struct Split;

impl Mapper for Split {
    fn map(&mut self, record: Record<'_>, out: &mut Collector) -> Result<()> {
        out.count("mapped", 1);
        out.emit(record.key, record.bytes)
    }
}

struct Show;

impl Reducer for Show {
    fn reduce(&mut self, key: &[u8], values: &mut Values<'_>, out: &mut Output) -> Result<()> {
        let mut line = key[..1].to_vec();
        assert!(values.key().is_empty());
        while let Some(value) = values.next()?.map(<[u8]>::to_vec) {
            line.push(b' ');
            line.extend_from_slice(&values.key()[2..]);
            line.push(b'=');
            line.extend_from_slice(&value);
        }
        out.line(&line)
    }
}

impl Program for Secondary {
    fn input(&self) -> InputFormat {
        InputFormat::KeyValueText { separator: b' ' }
    }
    fn mapper(&self, _task: &TaskContext) -> Result<Box<dyn Mapper>> {
        Ok(Box::new(Split))
    }
    fn combine(&self) -> Combine {
        if self.sums { Combine::Sum } else { Combine::Never }
    }
    fn partitioner(&self) -> Result<Partitioner> {
        Ok(Partitioner::Ranges(KeyRanges::new(vec![b"b".to_vec()])?))
    }
    fn grouping(&self) -> Grouping {
        Grouping::Prefix(KeyPrefix::Fields { separator: b'.', count: 1 })
    }
    fn reducer(&self, _task: &TaskContext) -> Result<Box<dyn Reducer>> {
        Ok(Box::new(Show))
    }
}

#[test]
fn a_group_by_prefix_comes_in_the_order_of_whole_keys() {
    let texts = [b"b.2 x\na.9 y\na.1 z\n".to_vec(), b"c.1 u\na.5 v\nb.1 w\n".to_vec()];
    for collect in [1, 1 << 20] {
        let shares = Shares { collect, fetched: 0, program: 0, merge_ways: 2 };
        let (parts, _) = job(&Secondary { sums: false }, &texts, 2, &shares);
        assert_eq!(parts, [b"a 1=z 5=v 9=y\n".to_vec(), b"b 1=w 2=x\nc 1=u\n".to_vec()]);
    }
}

#[test]
fn counts_add_up_where_keys_go_by_ranges() {
    // The values are counts: one byte below 128 each.
    let texts = [b"b.2 \x02\na.1 \x05\nb.2 \x03\n".to_vec(), b"b.2 \x04\na.3 \x01\n".to_vec()];
    for collect in [1, 1 << 20] {
        let shares = Shares { collect, fetched: 0, program: 0, merge_ways: 2 };
        let (parts, counters) = job(&Secondary { sums: true }, &texts, 2, &shares);
        assert_eq!(parts, [b"a 1=\x05 3=\x01\n".to_vec(), b"b 2=\x05 2=\x04\n".to_vec()]);
        assert_eq!(counters.get(counter::RECORDS_COMBINE_OUT), 4);
    }
}

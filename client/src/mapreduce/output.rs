//! The files that a reducer (or a mapper of a job without reducers) writes.

use std::collections::BTreeMap;

use bytes::Bytes;
use cairn_proto::{Error, ErrorCode, Result};

use super::compression::Compressor;
use super::container::ContainerWriter;
use super::counters::{Counters, UserCounters};
use super::format::{Layout, OutputFormat, is_output_name};
use super::{TaskKind, counter};

const PIECE_BYTES: usize = 512 << 10;
/// What the files of a job are called that its program did not name.
pub(crate) const MAIN: &str = "part";
/// Named outputs of a task. Each holds buffers.
const MAX_NAMED: usize = 32;

/// Where the bytes of output files go. Files are numbered in the order in which they are opened.
pub trait OutputSink: Send {
    /// Opens the next file: the name under which the attempt writes it, in the job's staging folder.
    fn open(&mut self, attempt_name: &str) -> Result<()>;
    /// Takes the next bytes of an open file.
    fn write(&mut self, file: usize, piece: Bytes) -> Result<()>;
}

/// How an attempt names its files.
#[derive(Clone, Debug, Default)]
pub struct OutputNames {
    kind: TaskKind,
    index: u32,
    attempt: u32,
    seed: u128,
}

impl OutputNames {
    /// Of an attempt of a task. `seed`: random, for what must differ from file to file.
    pub fn new(kind: TaskKind, index: u32, attempt: u32, seed: u128) -> Self {
        Self { kind, index, attempt, seed }
    }

    fn of_file(&self, name: &str, extension: &str) -> (String, String) {
        let kind = if self.kind == TaskKind::Reduce { "r" } else { "m" };
        let to = format!("{name}-{kind}-{:05}{extension}", self.index);
        (format!(".{to}.attempt-{}", self.attempt), to)
    }
}

/// One file that an attempt wrote.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WrittenFile {
    /// Name under which the attempt wrote it.
    pub attempt_name: String,
    /// Name that it gets when the attempt is accepted.
    pub final_name: String,
    /// Records in it.
    pub records: u64,
    /// Its length, before what the file system does to it.
    pub bytes: u64,
}

/// Records on their way to files.
pub struct Output {
    sink: Box<dyn OutputSink>,
    names: OutputNames,
    user: UserCounters,
    main: OutputFile,
    others: Vec<OutputFile>,
    by_name: BTreeMap<String, usize>,
    format: OutputFormat,
}

struct OutputFile {
    number: usize,
    layout: Layout,
    /// Of [`Layout::KeyValue`].
    container: Option<ContainerWriter>,
    compressor: Option<Compressor>,
    buffer: Vec<u8>,
    written: WrittenFile,
}

impl Output {
    /// Opens the task's main file.
    pub fn new(
        mut sink: Box<dyn OutputSink>,
        format: OutputFormat,
        names: OutputNames,
        user: UserCounters,
    ) -> Result<Self> {
        if format.layout == Layout::KeyValue && format.compression.is_some() {
            let text = "binary keys and values are compressed in themselves: they cannot have another compression";
            return Err(Error::new(ErrorCode::InvalidArgument, text));
        }
        let main = OutputFile::open(&mut *sink, 0, MAIN, format, &names)?;
        Ok(Self { sink, names, user, main, others: Vec::new(), by_name: BTreeMap::new(), format })
    }

    /// Writes `key` and `value` as the job's output format says.
    #[inline]
    pub fn emit(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        self.main.emit(key, value, &mut *self.sink)
    }

    /// Writes `key` and the number in decimal digits.
    #[inline]
    pub fn emit_count(&mut self, key: &[u8], count: u64) -> Result<()> {
        self.main.emit_count(key, count, &mut *self.sink)
    }

    /// Writes a record without a key: in a text output a line.
    #[inline]
    pub fn line(&mut self, line: &[u8]) -> Result<()> {
        self.main.line(line, &mut *self.sink)
    }

    /// A further output of the job, in files of its own beside the main ones (`errors-r-00003` for the name "errors"). It appears with the job's output
    /// or not at all. At most 32 names of letters, digits, '-' and '_'.
    pub fn named(&mut self, name: &str) -> Result<NamedOutput<'_>> {
        let at = match self.by_name.get(name) {
            Some(at) => *at,
            None => self.open_named(name)?,
        };
        Ok(NamedOutput { file: &mut self.others[at], sink: &mut *self.sink })
    }

    fn open_named(&mut self, name: &str) -> Result<usize> {
        if !is_output_name(name) {
            let text =
                format!("an output cannot be named {name:?}: use 1 to 64 letters, digits, '-' and '_', not \"{MAIN}\"");
            return Err(Error::new(ErrorCode::InvalidArgument, text));
        }
        let at = self.others.len();
        if at == MAX_NAMED {
            let text = format!("no output {name:?}: the task has {MAX_NAMED} named outputs already");
            return Err(Error::new(ErrorCode::InvalidArgument, text));
        }
        self.others.push(OutputFile::open(&mut *self.sink, at + 1, name, self.format, &self.names)?);
        self.by_name.insert(name.to_owned(), at);
        Ok(at)
    }

    /// Adds to a counter of the program's own.
    pub fn count(&self, name: &str, by: u64) {
        self.user.count(name, by);
    }

    /// Hands out the rest; returns the files with their counters.
    pub fn finish(mut self) -> Result<(Vec<WrittenFile>, Counters)> {
        let mut files = Vec::with_capacity(1 + self.others.len());
        for file in std::iter::once(self.main).chain(self.others) {
            files.push(file.finish(&mut *self.sink)?);
        }
        let mut counters = Counters::default();
        counters.add(counter::RECORDS_OUT, files.iter().map(|file| file.records).sum());
        counters.add(counter::OUTPUT_BYTES, files.iter().map(|file| file.bytes).sum());
        Ok((files, counters))
    }
}

/// One of a job's further outputs.
pub struct NamedOutput<'a> {
    file: &'a mut OutputFile,
    sink: &'a mut dyn OutputSink,
}

impl NamedOutput<'_> {
    /// [`Output::emit`].
    pub fn emit(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        self.file.emit(key, value, self.sink)
    }

    /// [`Output::emit_count`].
    pub fn emit_count(&mut self, key: &[u8], count: u64) -> Result<()> {
        self.file.emit_count(key, count, self.sink)
    }

    /// [`Output::line`].
    pub fn line(&mut self, line: &[u8]) -> Result<()> {
        self.file.line(line, self.sink)
    }
}

impl OutputFile {
    fn open(
        sink: &mut dyn OutputSink,
        number: usize,
        name: &str,
        format: OutputFormat,
        names: &OutputNames,
    ) -> Result<Self> {
        let (attempt_name, final_name) = names.of_file(name, format.extension());
        sink.open(&attempt_name)?;
        let written = WrittenFile { attempt_name, final_name, records: 0, bytes: 0 };
        let mut buffer = Vec::new();
        let mark = names.seed.wrapping_add(number as u128);
        let container = (format.layout == Layout::KeyValue).then(|| ContainerWriter::new(mark, &mut buffer));
        let compressor = format.compression.map(Compressor::new).transpose()?;
        Ok(Self { number, layout: format.layout, container, compressor, buffer, written })
    }

    #[inline]
    fn emit(&mut self, key: &[u8], value: &[u8], sink: &mut dyn OutputSink) -> Result<()> {
        match self.layout {
            Layout::Text { separator } => {
                self.buffer.extend_from_slice(key);
                self.buffer.push(separator);
            }
            Layout::Raw => self.buffer.extend_from_slice(key),
            Layout::KeyValue => return self.pack(key, value, sink),
        }
        self.line(value, sink)
    }

    fn pack(&mut self, key: &[u8], value: &[u8], sink: &mut dyn OutputSink) -> Result<()> {
        if let Some(container) = &mut self.container {
            container.push(key, value, &mut self.buffer)?;
        }
        self.record_ended(sink)
    }

    #[inline]
    fn emit_count(&mut self, key: &[u8], count: u64, sink: &mut dyn OutputSink) -> Result<()> {
        let mut digits = [0; 20];
        let mut at = digits.len();
        let mut rest = count;
        loop {
            at -= 1;
            digits[at] = b'0' + (rest % 10) as u8;
            rest /= 10;
            if rest == 0 {
                break;
            }
        }
        self.emit(key, &digits[at..], sink)
    }

    #[inline]
    fn line(&mut self, line: &[u8], sink: &mut dyn OutputSink) -> Result<()> {
        match self.layout {
            Layout::Text { .. } => {
                self.buffer.extend_from_slice(line);
                self.buffer.push(b'\n');
            }
            Layout::Raw => self.buffer.extend_from_slice(line),
            Layout::KeyValue => return self.pack(&[], line, sink),
        }
        self.record_ended(sink)
    }

    #[inline]
    fn record_ended(&mut self, sink: &mut dyn OutputSink) -> Result<()> {
        self.written.records += 1;
        if self.buffer.len() >= PIECE_BYTES { self.flush(sink) } else { Ok(()) }
    }

    fn flush(&mut self, sink: &mut dyn OutputSink) -> Result<()> {
        let piece = match &mut self.compressor {
            None if self.buffer.is_empty() => return Ok(()),
            None => std::mem::replace(&mut self.buffer, Vec::with_capacity(PIECE_BYTES + 4096)),
            Some(compressor) => {
                let piece = compressor.write(&self.buffer)?;
                self.buffer.clear();
                piece
            }
        };
        self.send(piece, sink)
    }

    fn send(&mut self, piece: Vec<u8>, sink: &mut dyn OutputSink) -> Result<()> {
        if piece.is_empty() {
            return Ok(());
        }
        self.written.bytes += piece.len() as u64;
        sink.write(self.number, Bytes::from(piece))
    }

    fn finish(mut self, sink: &mut dyn OutputSink) -> Result<WrittenFile> {
        if let Some(container) = &mut self.container {
            container.end_chunk(&mut self.buffer);
        }
        self.flush(sink)?;
        if let Some(compressor) = self.compressor.take() {
            let rest = compressor.finish()?;
            self.send(rest, sink)?;
        }
        Ok(self.written)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    /// Keeps files in memory.
    #[derive(Clone, Default)]
    pub struct MemorySink(Arc<Mutex<Vec<Vec<u8>>>>);

    impl MemorySink {
        pub fn bytes(&self, file: usize) -> Vec<u8> {
            self.0.lock().unwrap()[file].clone()
        }
    }

    impl OutputSink for MemorySink {
        fn open(&mut self, _attempt_name: &str) -> Result<()> {
            self.0.lock().unwrap().push(Vec::new());
            Ok(())
        }

        fn write(&mut self, file: usize, piece: Bytes) -> Result<()> {
            self.0.lock().unwrap()[file].extend_from_slice(&piece);
            Ok(())
        }
    }

    fn output(sink: &MemorySink, format: OutputFormat) -> Output {
        let names = OutputNames::new(TaskKind::Reduce, 3, 1, 7);
        Output::new(Box::new(sink.clone()), format, names, UserCounters::default()).unwrap()
    }

    #[test]
    fn lines_come_out_in_order() {
        let sink = MemorySink::default();
        let mut out = output(&sink, OutputFormat::TEXT);
        let mut want = Vec::new();
        for i in (0..100_000u64).chain([u64::MAX]) {
            out.emit_count(b"key", i).unwrap();
            want.extend_from_slice(format!("key\t{i}\n").as_bytes());
        }
        let (files, counters) = out.finish().unwrap();
        assert_eq!((files[0].records, files[0].bytes), (100_001, want.len() as u64));
        assert_eq!(counters.get(counter::RECORDS_OUT), 100_001);
        assert_eq!(sink.bytes(0), want);
    }

    #[test]
    fn named_outputs_have_files_of_their_own() {
        let sink = MemorySink::default();
        let mut out = output(&sink, OutputFormat::RAW);
        out.emit(b"k", b"v").unwrap();
        out.named("errors").unwrap().line(b"one").unwrap();
        out.named("warnings").unwrap().emit(b"a", b"b").unwrap();
        out.named("errors").unwrap().emit_count(b"two", 2).unwrap();
        for bad in ["part", "", "_x", "a/b", "..", &"x".repeat(65)] {
            assert_eq!(out.named(bad).err().unwrap().code(), ErrorCode::InvalidArgument, "{bad}");
        }
        let (files, _) = out.finish().unwrap();
        let names: Vec<_> = files.iter().map(|file| (&*file.attempt_name, &*file.final_name, file.records)).collect();
        let want = [
            (".part-r-00003.attempt-1", "part-r-00003", 1),
            (".errors-r-00003.attempt-1", "errors-r-00003", 2),
            (".warnings-r-00003.attempt-1", "warnings-r-00003", 1),
        ];
        assert_eq!(names, want);
        assert_eq!((0..3).map(|file| sink.bytes(file)).collect::<Vec<_>>(), [&b"kv"[..], b"onetwo2", b"ab"]);
    }

    #[test]
    fn compressed_and_binary_outputs_read_back() {
        use super::super::{Compression, InputFormat, input};
        let formats = [
            (OutputFormat::TEXT.compressed(Compression::Zstd), InputFormat::KeyValueText { separator: b'\t' }),
            (OutputFormat::TEXT.compressed(Compression::Gzip), InputFormat::KeyValueText { separator: b'\t' }),
            (OutputFormat::TEXT.compressed(Compression::Bzip2), InputFormat::KeyValueText { separator: b'\t' }),
            (OutputFormat::KEY_VALUE, InputFormat::KeyValue),
        ];
        for (format, read_as) in formats {
            let sink = MemorySink::default();
            let mut out = output(&sink, format);
            for i in 0..90_000u64 {
                out.emit_count(format!("key {i}").as_bytes(), i).unwrap();
            }
            let (files, _) = out.finish().unwrap();
            assert_eq!(files[0].final_name, format!("part-r-00003{}", format.extension()));
            assert!(files[0].bytes < 600_000 && files[0].bytes == sink.bytes(0).len() as u64, "{files:?}");
            let file = Bytes::from(sink.bytes(0));
            let split = cairn_proto::pb::Split {
                path: files[0].final_name.clone(),
                length: file.len() as u64,
                ..Default::default()
            };
            let content = input::content_of(&split, read_as, Box::new(Once(Some(file)))).unwrap();
            let mut reader = input::BatchReader::new(&split, read_as, 0, content).unwrap();
            let mut next = 0u64;
            while let Some(batch) = reader.next().unwrap() {
                for record in batch.records() {
                    assert_eq!(record.key, format!("key {next}").as_bytes());
                    assert_eq!(record.bytes, next.to_string().as_bytes());
                    next += 1;
                }
            }
            assert_eq!(next, 90_000);
        }
        let both = OutputFormat::KEY_VALUE.compressed(Compression::Gzip);
        let names = OutputNames::default();
        assert!(Output::new(Box::new(MemorySink::default()), both, names, UserCounters::default()).is_err());
    }

    struct Once(Option<Bytes>);

    impl super::super::input::Feed for Once {
        fn next(&mut self) -> Result<Option<Bytes>> {
            Ok(self.0.take())
        }
    }
}

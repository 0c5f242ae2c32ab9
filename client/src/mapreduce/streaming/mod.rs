//! Streaming: mapper, reducer and combiner are commands that read lines and print lines, as Hadoop Streaming has it.
//!
//! # Overview
//! A mapper's child reads the lines of its split. What it prints is cut into key and value at a separator ([`keys`]); the records are sorted by key, and a
//! reducer's child reads them as lines of key, separator, value. What a reducer prints (or a mapper of a job without reducers) is the
//! output, line by line as it is. [`child`] moves the bytes, [`reporter`] reads counters and status off standard error, [`environment`] tells the
//! child about its task. The child runs in the attempt's folder, with the job's cache files beside it under their names.
//!
//! # Differences from Hadoop
//! A line of output without a separator is written as it is, not with a separator behind it. No class names: `mapper` and the others are commands.

mod child;
mod combine;
mod command;
mod environment;
mod keys;
mod lines;
mod reporter;
mod suspect;

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;

use cairn_proto::{Error, ErrorCode, Result};

use self::child::{Child, Rules};
use self::combine::Combining;
use self::command::CommandLine;
use self::keys::{Cut, KeyOrder};
use self::lines::Lines;
use self::reporter::Reporter;
use super::fields::Separator;
use super::{Collector, InputFormat, Mapper, Output, Partitioner, Program, Reducer, TaskContext, Values, builtin};

/// Names of the properties.
#[allow(missing_docs)] // they are Hadoop's, but for the first few
pub mod property {
    /// Commands.
    pub const MAPPER: &str = "stream.map.streamprocessor";
    pub const REDUCER: &str = "stream.reduce.streamprocessor";
    pub const COMBINER: &str = "stream.combine.streamprocessor";
    /// "hash" (of the whole key) or "fields".
    pub const PARTITIONER: &str = "stream.partitioner";
    /// Names of the job's files that are no programs, separated by blanks.
    pub const PLAIN_FILES: &str = "stream.plain.files";
    /// "false": a child need not read all of its input.
    pub const UNREAD_INPUT_FAILS: &str = "stream.unread.input.is.failure";
    pub const NON_ZERO_EXIT_FAILS: &str = "stream.non.zero.exit.is.failure";
    pub const REPORTER_PREFIX: &str = "stream.stderr.reporter.prefix";
    pub const REPORTER_ENABLED: &str = "stream.stderr.reporter.enabled";
    pub const MAP_OUTPUT_SEPARATOR: &str = "stream.map.output.field.separator";
    pub const MAP_OUTPUT_KEY_FIELDS: &str = "stream.num.map.output.key.fields";
    pub const REDUCE_INPUT_SEPARATOR: &str = "stream.reduce.input.field.separator";
    pub const KEY_FIELD_SEPARATOR: &str = "mapreduce.map.output.key.field.separator";
    pub const COMPARATOR_OPTIONS: &str = "mapreduce.partition.keycomparator.options";
    pub const PARTITIONER_OPTIONS: &str = "mapreduce.partition.keypartitioner.options";
    pub const PARTITION_FIELDS: &str = "num.key.fields.for.partition";
}

/// Lines that a mapper or combiner printed without a separator: all of each is its key.
pub const NO_SEPARATOR: &str = "streaming.lines_without_separator";

/// A job of commands.
pub struct Streaming {
    mapper: Stage,
    combiner: Option<Stage>,
    /// `None`: records are written as they come out of the sort.
    reducer: Option<Stage>,
    cut: Cut,
    order: KeyOrder,
    has_reducers: bool,
}

impl Streaming {
    /// Of the job's properties.
    pub fn new(properties: &BTreeMap<String, String>, reducers: u32) -> Result<Self> {
        let get = |name: &str| properties.get(name).map(String::as_str);
        let invalid = |name: &str, text: String| {
            Error::new(ErrorCode::InvalidArgument, format!("property {name}: {text}")).with_subject(name)
        };
        let flag = |name: &str| match get(name) {
            None | Some("true") => Ok(true),
            Some("false") => Ok(false),
            Some(other) => Err(invalid(name, format!("{other:?} is neither true nor false"))),
        };
        let separator = |name: &str| match get(name) {
            None => Ok(Separator::Byte(b'\t')),
            Some(text) => Separator::new(text).map_err(|error| invalid(name, error.message().to_owned())),
        };
        let fields = |name: &str| match get(name) {
            None => Ok(1),
            Some(text) => match text.parse::<usize>() {
                Ok(fields @ 1..=1_000_000) => Ok(fields),
                _ => Err(invalid(name, format!("{text:?} is no number of fields"))),
            },
        };
        let rules = Rules {
            non_zero_exit: flag(property::NON_ZERO_EXIT_FAILS)?,
            unread_input: flag(property::UNREAD_INPUT_FAILS)?,
        };
        let prefix = match flag(property::REPORTER_ENABLED)? {
            true => get(property::REPORTER_PREFIX).unwrap_or("reporter:"),
            false => "",
        };
        let order = KeyOrder::of(properties)?;
        let cut = Cut {
            separator: separator(property::MAP_OUTPUT_SEPARATOR)?,
            fields: fields(property::MAP_OUTPUT_KEY_FIELDS)?,
        };
        let reduce_separator = separator(property::REDUCE_INPUT_SEPARATOR)?.bytes().to_vec();
        let stage = |role: &'static str, name: &str| -> Result<Option<Stage>> {
            let Some(text) = get(name) else { return Ok(None) };
            Ok(Some(Stage {
                role,
                text: text.to_owned(),
                command: CommandLine::parse(role, text)?,
                rules,
                prefix: prefix.to_owned(),
                separator: reduce_separator.clone(),
                order: order.clone(),
            }))
        };
        let Some(mapper) = stage("mapper", property::MAPPER)? else {
            return Err(invalid(property::MAPPER, "streaming needs a mapper".into()));
        };
        let (combiner, reducer) = (stage("combiner", property::COMBINER)?, stage("reducer", property::REDUCER)?);
        if reducers == 0 && (combiner.is_some() || reducer.is_some()) {
            let role = if reducer.is_some() { "reducer" } else { "combiner" };
            let text = format!("a job with 0 reducers runs no {role}: leave it out, or ask for reducers");
            return Err(Error::new(ErrorCode::InvalidArgument, text));
        }
        Ok(Self { mapper, combiner, reducer, cut, order, has_reducers: reducers > 0 })
    }
}

impl Program for Streaming {
    fn input(&self) -> InputFormat {
        InputFormat::Lines
    }

    fn mapper(&self, task: &TaskContext) -> Result<Box<dyn Mapper>> {
        let combining = self.combiner.clone().map(|stage| Combining::new(stage, task, task.program_memory / 2));
        let may_skip = task.parsed(builtin::property::SKIP_RECORDS, 0u64)? > 0;
        Ok(Box::new(Lines {
            stage: self.mapper.clone(),
            child: if may_skip { None } else { Some(self.mapper.start(task)?) },
            sink: Sink {
                cut: self.cut.clone(),
                order: self.order.clone(),
                key: Vec::new(),
                has_reducers: self.has_reducers,
                no_separator: 0,
            },
            combining,
            task: task.clone(),
            recent: VecDeque::new(),
        }))
    }

    fn partitioner(&self) -> Result<Partitioner> {
        Ok(self.order.partitioner())
    }

    fn reducer(&self, task: &TaskContext) -> Result<Box<dyn Reducer>> {
        Ok(match &self.reducer {
            None => Box::new(AsTheyCome { order: self.order.clone() }),
            Some(stage) => Box::new(Grouped { child: stage.start(task)?, stage: stage.clone() }),
        })
    }
}

/// One of the commands.
#[derive(Clone)]
pub(super) struct Stage {
    role: &'static str,
    text: String,
    command: CommandLine,
    rules: Rules,
    prefix: String,
    /// Between key and value of the lines that it reads.
    separator: Vec<u8>,
    order: KeyOrder,
}

impl Stage {
    /// Starts its child in a folder with the job's files.
    fn start(&self, task: &TaskContext) -> Result<Child> {
        self.start_with(task, Reporter::new(task.clone(), &self.prefix))
    }

    /// The same, where nothing that it says is kept.
    fn try_out(&self, task: &TaskContext) -> Result<Child> {
        self.start_with(task, Reporter::new(task.clone(), &self.prefix).silent())
    }

    fn start_with(&self, task: &TaskContext, reporter: Reporter) -> Result<Child> {
        let dir = folder(task)?;
        let path = std::env::var("PATH").unwrap_or_else(|_| "/usr/bin:/bin".into());
        let plain = task.property(property::PLAIN_FILES).unwrap_or_default();
        let program = self.command.program(self.role, &dir, &path, plain)?;
        let mut command = std::process::Command::new(program);
        command.args(self.command.arguments()).current_dir(&dir);
        environment::set(&mut command, task);
        let path = format!("{}:{path}", dir.display());
        command.env("PATH", path).env("HOME", &dir).env("PWD", &dir).env("TMPDIR", &task.work_dir);
        let name = format!("{} {:?}", self.role, self.text);
        Child::start(name, command, reporter, self.rules)
    }

    /// Appends a record, under the key that travels, to the child's input.
    #[inline]
    fn push(&self, child: &mut Child, key: &[u8], value: &[u8]) -> Result<()> {
        let key = self.order.decode(key)?;
        let input = child.input();
        input.extend_from_slice(key);
        input.extend_from_slice(&self.separator);
        input.extend_from_slice(value);
        input.push(b'\n');
        Ok(())
    }
}

/// The folder in which a task's commands run, with links to the job's files.
fn folder(task: &TaskContext) -> Result<PathBuf> {
    let dir = task.work_dir.join("files");
    let failed = |error: std::io::Error| Error::io(format!("cannot prepare {}", dir.display()), &error);
    match rustix::fs::mkdir(&dir, rustix::fs::Mode::RWXU) {
        Ok(()) => {}
        // A combiner runs where its mapper does, and many times.
        Err(rustix::io::Errno::EXIST) => return Ok(dir),
        Err(error) => return Err(failed(error.into())),
    }
    for (name, local) in &*task.cache_files {
        rustix::fs::symlink(local, dir.join(name)).map_err(|error| failed(error.into()))?;
    }
    Ok(dir)
}

/// Takes the lines of a mapper or combiner.
pub(super) struct Sink {
    cut: Cut,
    order: KeyOrder,
    /// The key that travels.
    key: Vec<u8>,
    has_reducers: bool,
    no_separator: u64,
}

impl Sink {
    /// Cuts a line; the key is the one that travels.
    #[inline]
    fn record<'a>(&'a mut self, line: &'a [u8]) -> (&'a [u8], &'a [u8]) {
        let (key, value) = self.cut.split(line);
        self.no_separator += u64::from(key.len() == line.len());
        if self.order.is_plain() {
            return (key, value);
        }
        self.order.encode(key, &mut self.key);
        (&self.key, value)
    }

    fn collect(&mut self, line: &[u8], out: &mut Collector) -> Result<()> {
        if !self.has_reducers {
            return out.emit_line(line);
        }
        let (key, value) = self.record(line);
        out.emit(key, value)
    }
}

struct Grouped {
    child: Child,
    stage: Stage,
}

impl Reducer for Grouped {
    fn reduce(&mut self, key: &[u8], values: &mut Values<'_>, out: &mut Output) -> Result<()> {
        while let Some(value) = values.next()? {
            self.stage.push(&mut self.child, key, value)?;
            self.child.feed(&mut |line| out.line(line))?;
        }
        Ok(())
    }

    fn finish(&mut self, out: &mut Output) -> Result<()> {
        self.child.finish(&mut |line| out.line(line))
    }
}

/// Without a reducer: the sorted records.
struct AsTheyCome {
    order: KeyOrder,
}

impl Reducer for AsTheyCome {
    fn reduce(&mut self, key: &[u8], values: &mut Values<'_>, out: &mut Output) -> Result<()> {
        let key = self.order.decode(key)?;
        while let Some(value) = values.next()? {
            out.emit(key, value)?;
        }
        Ok(())
    }
}

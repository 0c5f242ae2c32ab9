//! The sort benchmark: records by number, a total order of them, and the check of that order.

mod record;
pub mod validate;

pub use record::{Checksum, Generator, KEY_BYTES, RECORD_BYTES};
pub use validate::TeraValidate;

use cairn_proto::{Error, ErrorCode, Result};

use super::{
    Collector, Combine, InputFormat, KeyRanges, Mapper, Output, OutputFormat, Partitioner, Program, Record, Reducer,
    TaskContext, Values,
};

/// Makes records 0 to n - 1. A job of maps alone.
pub struct TeraGen {
    /// How many.
    pub records: u64,
    /// By how many maps; 0: as many as there are slots.
    pub maps: u32,
}

impl Program for TeraGen {
    fn input(&self) -> InputFormat {
        InputFormat::Generated { records: self.records, tasks: self.maps }
    }

    fn mapper(&self, _task: &TaskContext) -> Result<Box<dyn Mapper>> {
        Ok(Box::new(Generate { generator: Generator::at(0), next: 0 }))
    }

    fn reducer(&self, _task: &TaskContext) -> Result<Box<dyn Reducer>> {
        Err(Error::new(ErrorCode::InvalidArgument, "teragen has no reducers"))
    }

    fn output(&self) -> OutputFormat {
        OutputFormat::RAW
    }
}

struct Generate {
    generator: Generator,
    next: u64,
}

impl Mapper for Generate {
    fn map(&mut self, record: Record<'_>, out: &mut Collector) -> Result<()> {
        if record.offset != self.next {
            self.generator = Generator::at(record.offset);
        }
        self.next = record.offset + 1;
        let mut bytes = [0; RECORD_BYTES];
        self.generator.next(&mut bytes);
        out.emit(&bytes[..KEY_BYTES], &bytes[KEY_BYTES..])
    }
}

/// Sorts records by key; part after part of the output is in order.
pub struct TeraSort {
    /// Between the parts.
    pub cuts: KeyRanges,
}

impl Program for TeraSort {
    fn input(&self) -> InputFormat {
        InputFormat::Fixed(RECORD_BYTES as u32)
    }

    fn mapper(&self, _task: &TaskContext) -> Result<Box<dyn Mapper>> {
        Ok(Box::new(Split))
    }

    fn combine(&self) -> Combine {
        Combine::Never
    }

    fn partitioner(&self) -> Result<Partitioner> {
        Ok(Partitioner::Ranges(self.cuts.clone()))
    }

    fn reducer(&self, _task: &TaskContext) -> Result<Box<dyn Reducer>> {
        Ok(Box::new(Write))
    }

    fn output(&self) -> OutputFormat {
        OutputFormat::RAW
    }
}

struct Split;

impl Mapper for Split {
    fn map(&mut self, record: Record<'_>, out: &mut Collector) -> Result<()> {
        let (key, value) = record.bytes.split_at(KEY_BYTES);
        out.emit(key, value)
    }
}

struct Write;

impl Reducer for Write {
    fn reduce(&mut self, key: &[u8], values: &mut Values<'_>, out: &mut Output) -> Result<()> {
        while let Some(value) = values.next()? {
            out.emit(key, value)?;
        }
        Ok(())
    }
}

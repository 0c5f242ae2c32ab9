//! Lengths of lines, measured by code that cannot be trusted: it returns errors, panics, or kills its process on some of them. With `skip-records` the job
//! leaves those out and says which; without it fails on the first, and says which.
//!
//! ```text
//! cargo run --example fragile -- --input /lines --output /lengths -D skip-records=10
//! ```

use std::process::ExitCode;

use cairn_client::mapreduce::typed::{Emit, Job, Map, Reduce, TypedValues};
use cairn_client::mapreduce::{self, Error, ErrorCode, Output, Record, Result};

struct Measure;

/// A library of somebody else.
fn measure(line: &[u8]) -> Result<u64> {
    match line {
        b"error" => Err(Error::new(ErrorCode::InvalidArgument, "it cannot be measured")),
        b"panic" => panic!("a bug"),
        b"abort" => std::process::abort(),
        _ => Ok(line.len() as u64),
    }
}

impl Map for Measure {
    type Key = u64;
    type Value = u64;

    fn map(&mut self, line: Record<'_>, out: &mut Emit<'_, u64, u64>) -> Result<()> {
        out.emit(measure(line.bytes)?, 1u64)
    }
}

struct Sum;

impl Reduce for Sum {
    type Key = u64;
    type Value = u64;

    fn reduce(&mut self, length: u64, counts: &mut TypedValues<'_, '_, u64, u64>, out: &mut Output) -> Result<()> {
        let mut sum = 0;
        while let Some(count) = counts.next()? {
            sum += count;
        }
        out.emit_count(length.to_string().as_bytes(), sum)
    }
}

fn main() -> ExitCode {
    mapreduce::main(|jobs| {
        jobs.add("lengths", |_| Ok(Job::new(|_| Ok(Measure)).sum().reduce(|_| Ok(Sum))));
    })
}

//! How often each word occurs, in lower case.
//!
//! ```text
//! cairn local &
//! cairn put books /books
//! cargo run --example word_count -- --input /books --output /counts
//! ```

use std::process::ExitCode;

use cairn_client::mapreduce::typed::{Emit, Job, Map, Reduce, TypedValues};
use cairn_client::mapreduce::{self, InputFormat, Output, Record, Result};

struct Words;

impl Map for Words {
    type Key = String;
    type Value = u64;

    fn map(&mut self, word: Record<'_>, out: &mut Emit<'_, String, u64>) -> Result<()> {
        match word.text() {
            Ok(text) => out.emit(text.to_lowercase(), 1u64),
            Err(_) => {
                out.count("words that are not UTF-8", 1);
                Ok(())
            }
        }
    }
}

struct Sum;

impl Reduce for Sum {
    type Key = String;
    type Value = u64;

    fn reduce(&mut self, word: String, counts: &mut TypedValues<'_, '_, String, u64>, out: &mut Output) -> Result<()> {
        let mut sum = 0;
        while let Some(count) = counts.next()? {
            sum += count;
        }
        out.emit_count(word.as_bytes(), sum)
    }
}

fn main() -> ExitCode {
    mapreduce::main(|jobs| {
        jobs.add("words", |_| Ok(Job::new(|_| Ok(Words)).input(InputFormat::Words).sum().reduce(|_| Ok(Sum))));
    })
}

//! In which files, and where, each word occurs: `word TAB file:offset,offset file:offset`, files and offsets in order. Words that a cache file lists are left out.
//!
//! ```text
//! cargo run --example inverted_index -- --input /books --output /index --file stop-words=stop.txt
//! ```

use std::collections::HashSet;
use std::process::ExitCode;

use cairn_client::mapreduce::typed::{Emit, Job, Map, Reduce, TypedValues};
use cairn_client::mapreduce::{self, Error, InputFormat, Output, Record, Result, TaskContext};

/// Words are put under (word, (file, offset)), so that the places of a word come to its reducer in order.
type Place = (String, (String, u64));

struct Words {
    file: String,
    stop_words: HashSet<String>,
}

impl Words {
    fn new(task: &TaskContext) -> Result<Self> {
        let list = task.cache_file("stop-words")?;
        let text = std::fs::read_to_string(list).map_err(|error| Error::io("cannot read the stop words", &error))?;
        let file = task.input.as_ref().map(|input| input.path.clone()).unwrap_or_default();
        Ok(Self { file, stop_words: text.split_whitespace().map(str::to_lowercase).collect() })
    }
}

impl Map for Words {
    type Key = Place;
    type Value = ();

    fn map(&mut self, word: Record<'_>, out: &mut Emit<'_, Place, ()>) -> Result<()> {
        let text = String::from_utf8_lossy(word.bytes).to_lowercase();
        if self.stop_words.contains(&text) {
            out.count("stop words", 1);
            return Ok(());
        }
        out.emit((text, (self.file.as_str(), word.offset)), ())
    }
}

struct Postings;

impl Reduce for Postings {
    type Key = Place;
    type Value = ();

    fn reduce(
        &mut self,
        (word, _): Place,
        places: &mut TypedValues<'_, '_, Place, ()>,
        out: &mut Output,
    ) -> Result<()> {
        let (mut line, mut last) = (String::new(), String::new());
        while let Some(((_, (file, offset)), ())) = places.next_with_key()? {
            if file == last {
                line.push_str(&format!(",{offset}"));
            } else {
                let gap = if line.is_empty() { "" } else { " " };
                line.push_str(&format!("{gap}{file}:{offset}"));
                last = file;
            }
        }
        out.emit(word.as_bytes(), line.as_bytes())
    }
}

fn main() -> ExitCode {
    mapreduce::main(|jobs| {
        jobs.add("index", |_| {
            let job = Job::new(Words::new).input(InputFormat::Words);
            Ok(job.group_by_first().reduce(|_| Ok(Postings)))
        });
    })
}

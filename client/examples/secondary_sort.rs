//! The hottest readings of each station, in order: input lines `station,date,temperature`, output `station TAB temperature@date ...`, hottest first.
//!
//! The reducer holds one reading at a time: the shuffle has put them in order by (station, temperature descending, date), and one call of the reducer gets
//! all of a station.
//!
//! ```text
//! cargo run --example secondary_sort -- --input /readings --output /hottest -D top=3
//! ```

use std::cmp::Reverse;
use std::process::ExitCode;

use cairn_client::mapreduce::typed::{Emit, Job, Map, Reduce, TypedValues};
use cairn_client::mapreduce::{self, Error, ErrorCode, Output, Record, Result, TaskContext};

type Reading = (String, (Reverse<i32>, String));

struct Parse;

impl Map for Parse {
    type Key = Reading;
    type Value = ();

    fn map(&mut self, line: Record<'_>, out: &mut Emit<'_, Reading, ()>) -> Result<()> {
        let bad = || Error::new(ErrorCode::InvalidArgument, "the line is not station,date,temperature");
        let mut fields = line.text()?.split(',');
        let (Some(station), Some(date), Some(degrees), None) =
            (fields.next(), fields.next(), fields.next(), fields.next())
        else {
            return Err(bad());
        };
        let degrees: i32 = degrees.parse().map_err(|_| bad())?;
        out.emit((station, (Reverse(degrees), date)), ())
    }
}

struct Top {
    count: usize,
}

impl Reduce for Top {
    type Key = Reading;
    type Value = ();

    fn reduce(
        &mut self,
        (station, _): Reading,
        readings: &mut TypedValues<'_, '_, Reading, ()>,
        out: &mut Output,
    ) -> Result<()> {
        let mut top = Vec::new();
        while top.len() < self.count
            && let Some(((_, (Reverse(degrees), date)), ())) = readings.next_with_key()?
        {
            top.push(format!("{degrees}@{date}"));
        }
        out.emit(station.as_bytes(), top.join(" ").as_bytes())
    }
}

fn main() -> ExitCode {
    mapreduce::main(|jobs| {
        jobs.add("hottest", |_| {
            let top = |task: &TaskContext| Ok(Top { count: task.parsed("top", 10)? });
            Ok(Job::new(|_| Ok(Parse)).group_by_first().reduce(top))
        });
    })
}

//! Three ways to join orders (`customer TAB order`) with customers (`customer TAB name`); each writes `customer TAB name TAB order`.
//!
//! * `reduce`: any two inputs; both go through the shuffle.
//! * `broadcast`: the customers fit in memory; every map has them as a cache file, nothing is shuffled. Orders without a
//!   customer go to an output of their own.
//! * `merge`: both are sorted by customer and lie in equally many parts cut at the same customers, as jobs leave them; maps read both in step.
//!
//! ```text
//! cargo run --example joins -- reduce --input /orders --input /customers -D customers=/customers --output /joined
//! cargo run --example joins -- broadcast --input /orders --file customers=customers.txt --output /joined --reducers 0
//! cargo run --example joins -- merge --input /sorted-orders -D customers=/sorted-customers --output /joined --reducers 0
//! ```

use std::cmp::Ordering;
use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Lines};
use std::process::ExitCode;

use cairn_client::mapreduce::typed::{Emit, Job, Map, Reduce, TypedValues};
use cairn_client::mapreduce::{self, BlockingReader, Error, ErrorCode, Output, Record, Result, TaskContext};

fn split(line: &str) -> Result<(&str, &str)> {
    line.split_once('\t').ok_or_else(|| Error::new(ErrorCode::InvalidArgument, "the line has no tab"))
}

fn read_failed(error: std::io::Error) -> Error {
    Error::io("cannot read the customers", &error)
}

fn input_path(task: &TaskContext) -> &str {
    task.input.as_ref().map_or("", |input| &input.path)
}

const CUSTOMERS: u8 = 0;
const ORDERS: u8 = 1;

/// Puts lines under (customer, side): of each customer the reducer sees the name first.
struct Tag {
    side: u8,
}

impl Tag {
    fn new(task: &TaskContext) -> Result<Self> {
        let customers = task.required("customers")?;
        Ok(Self { side: if input_path(task).starts_with(customers) { CUSTOMERS } else { ORDERS } })
    }
}

impl Map for Tag {
    type Key = (String, u8);
    type Value = String;

    fn map(&mut self, line: Record<'_>, out: &mut Emit<'_, (String, u8), String>) -> Result<()> {
        let (customer, rest) = split(line.text()?)?;
        out.emit((customer, self.side), rest)
    }
}

struct JoinGroup;

impl Reduce for JoinGroup {
    type Key = (String, u8);
    type Value = String;

    fn reduce(
        &mut self,
        (customer, _): (String, u8),
        rows: &mut TypedValues<'_, '_, (String, u8), String>,
        out: &mut Output,
    ) -> Result<()> {
        let mut names = Vec::new();
        while let Some(((_, side), row)) = rows.next_with_key()? {
            if side == CUSTOMERS {
                names.push(row);
                continue;
            }
            for name in &names {
                out.line(format!("{customer}\t{name}\t{row}").as_bytes())?;
            }
        }
        Ok(())
    }
}

/// Looks customers up in a table that every map loads.
struct LookUp {
    names: HashMap<String, String>,
}

impl LookUp {
    fn new(task: &TaskContext) -> Result<Self> {
        let file = task.cache_file("customers")?;
        let length = std::fs::metadata(file).map_err(read_failed)?.len();
        // A table takes about four times its text.
        if length.saturating_mul(4) > task.program_memory {
            let text = format!("customers of {length} bytes do not fit a task's memory: use the reduce join");
            return Err(Error::new(ErrorCode::InvalidArgument, text));
        }
        let text = std::fs::read_to_string(file).map_err(read_failed)?;
        let pairs = text.lines().map(|line| split(line).map(|(id, name)| (id.to_owned(), name.to_owned())));
        Ok(Self { names: pairs.collect::<Result<_>>()? })
    }
}

impl Map for LookUp {
    type Key = ();
    type Value = ();

    fn map(&mut self, line: Record<'_>, out: &mut Emit<'_, (), ()>) -> Result<()> {
        let (customer, order) = split(line.text()?)?;
        match self.names.get(customer) {
            Some(name) => out.line(format!("{customer}\t{name}\t{order}").as_bytes()),
            // They are an output of their own: unmatched-m-00000 and so on.
            None => {
                out.count("orders without a customer", 1);
                out.named("unmatched")?.line(line.bytes)
            }
        }
    }
}

/// Reads the part of the customers that has the number of the orders' part, in step with them.
struct Merge {
    customers: Lines<BufReader<BlockingReader>>,
    current: Option<(String, String)>,
}

impl Merge {
    fn new(task: &TaskContext) -> Result<Self> {
        let part = input_path(task).rsplit('/').next().unwrap_or_default();
        let file = task.files()?.open(&format!("{}/{part}", task.required("customers")?))?;
        let mut merge = Self { customers: BufReader::new(file).lines(), current: None };
        merge.advance()?;
        Ok(merge)
    }

    fn advance(&mut self) -> Result<()> {
        self.current = match self.customers.next() {
            None => None,
            Some(line) => {
                let line = line.map_err(read_failed)?;
                let (id, name) = split(&line)?;
                Some((id.to_owned(), name.to_owned()))
            }
        };
        Ok(())
    }
}

impl Map for Merge {
    type Key = ();
    type Value = ();

    fn map(&mut self, line: Record<'_>, out: &mut Emit<'_, (), ()>) -> Result<()> {
        let (customer, order) = split(line.text()?)?;
        while let Some((id, name)) = &self.current {
            match id.as_str().cmp(customer) {
                Ordering::Less => self.advance()?,
                Ordering::Equal => return out.line(format!("{customer}\t{name}\t{order}").as_bytes()),
                Ordering::Greater => break,
            }
        }
        Ok(())
    }
}

fn main() -> ExitCode {
    mapreduce::main(|jobs| {
        jobs.add("reduce", |_| Ok(Job::new(Tag::new).group_by_first().reduce(|_| Ok(JoinGroup))));
        jobs.add("broadcast", |_| Ok(Job::new(LookUp::new)));
        jobs.add("merge", |_| Ok(Job::new(Merge::new)));
    })
}

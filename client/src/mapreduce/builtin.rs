//! Programs by name: what a job's `kind` and properties mean.

use std::collections::BTreeMap;

use cairn_proto::{Error, ErrorCode, Result};

use super::Program;
use super::distcp::DistCp;
use super::grep::Grep;
use super::linesort::{self, LineSort};
use super::streaming::Streaming;
use super::tera::{TeraGen, TeraSort, TeraValidate};
use super::wordcount::WordCount;

/// Names of the properties.
pub mod property {
    /// Of any job: how many records a map may leave out because its mapper fails on them (an error, a panic, or twice the death of the worker). Default 0:
    /// the first one fails the attempt.
    pub const SKIP_RECORDS: &str = "skip-records";
    /// "true" or "false": join values in the map tasks. Default true.
    pub const COMBINE: &str = "combine";
    /// Grep's pattern.
    pub const PATTERN: &str = "pattern";
    /// "true": grep counts equal lines.
    pub const COUNT: &str = "count";
    /// "true": grep does not tell upper from lower case.
    pub const IGNORE_CASE: &str = "ignore_case";
    /// Records that teragen makes.
    pub const RECORDS: &str = "records";
    /// Maps of teragen; 0: one per slot.
    pub const MAPS: &str = "maps";
}

/// What there is.
const KINDS: [&str; 9] =
    ["wordcount", "grep", "streaming", "sort", "join", "teragen", "terasort", "teravalidate", "distcp"];

/// Makes the program; refuses kinds and values that it does not know.
pub fn program(kind: &str, properties: &BTreeMap<String, String>, reducers: u32) -> Result<Box<dyn Program>> {
    let flag = |name: &str, default: bool| match properties.get(name).map(String::as_str) {
        None => Ok(default),
        Some("true") => Ok(true),
        Some("false") => Ok(false),
        Some(other) => {
            let text = format!("property {name}: {other:?} is neither true nor false");
            Err(Error::new(ErrorCode::InvalidArgument, text).with_subject(name))
        }
    };
    let combine = flag(property::COMBINE, true)?;
    match kind {
        "wordcount" if reducers == 0 => {
            Err(Error::new(ErrorCode::InvalidArgument, "wordcount needs at least one reducer"))
        }
        "wordcount" => Ok(Box::new(WordCount { combine })),
        "grep" => {
            let pattern = properties.get(property::PATTERN).map_or("", String::as_str);
            let mut grep = Grep::new(pattern, flag(property::IGNORE_CASE, false)?)?;
            grep.count = flag(property::COUNT, false)?;
            grep.combine = combine;
            grep.reducers = reducers > 0;
            if grep.count && reducers == 0 {
                return Err(Error::new(ErrorCode::InvalidArgument, "counting lines needs at least one reducer"));
            }
            Ok(Box::new(grep))
        }
        "streaming" => Ok(Box::new(Streaming::new(properties, reducers)?)),
        "sort" => Ok(Box::new(LineSort::new(properties, reducers)?)),
        "join" => super::join::program(properties, reducers),
        "teragen" if reducers > 0 => Err(Error::new(ErrorCode::InvalidArgument, "teragen has no reducers")),
        "teragen" => {
            let maps = u32::try_from(number(properties, property::MAPS)?).unwrap_or(u32::MAX);
            Ok(Box::new(TeraGen { records: number(properties, property::RECORDS)?, maps }))
        }
        "terasort" if reducers == 0 => {
            Err(Error::new(ErrorCode::InvalidArgument, "terasort needs at least one reducer"))
        }
        "terasort" => {
            let cuts = properties.get(linesort::property::CUTS).map_or("", String::as_str);
            Ok(Box::new(TeraSort { cuts: linesort::cuts_of_text(cuts)? }))
        }
        "teravalidate" if reducers != 1 => {
            Err(Error::new(ErrorCode::InvalidArgument, "teravalidate has exactly one reducer"))
        }
        "teravalidate" => Ok(Box::new(TeraValidate)),
        "distcp" => Ok(Box::new(DistCp::new(properties)?)),
        other => {
            let text = format!("there is no built-in job {other:?}: there are {}", KINDS.join(", "));
            Err(Error::new(ErrorCode::InvalidArgument, text).with_subject(other))
        }
    }
}

fn number(properties: &BTreeMap<String, String>, name: &str) -> Result<u64> {
    let text = properties.get(name).map_or("0", String::as_str);
    text.parse().map_err(|_| {
        Error::new(ErrorCode::InvalidArgument, format!("property {name}: {text:?} is no number")).with_subject(name)
    })
}

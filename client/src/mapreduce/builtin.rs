//! Programs by name: what a job's `kind` and properties mean.

use std::collections::BTreeMap;

use cairn_proto::{Error, ErrorCode, Result};

use super::Program;
use super::grep::Grep;
use super::wordcount::WordCount;

/// Names of the properties.
pub mod property {
    /// "true" or "false": join values in the map tasks. Default true.
    pub const COMBINE: &str = "combine";
    /// Grep's pattern.
    pub const PATTERN: &str = "pattern";
    /// "true": grep counts equal lines.
    pub const COUNT: &str = "count";
    /// "true": grep does not tell upper from lower case.
    pub const IGNORE_CASE: &str = "ignore_case";
}

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
        other => {
            let text = format!("there is no built-in job {other:?}: there are wordcount and grep");
            Err(Error::new(ErrorCode::InvalidArgument, text).with_subject(other))
        }
    }
}

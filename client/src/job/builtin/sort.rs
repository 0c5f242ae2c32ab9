//! Jobs that sort: lines by keys, records of the sort benchmark.

use cairn_proto::{Error, ErrorCode, Result};

use super::sample::{self, Records};
use super::{total_bytes, with_reducers};
use crate::fs::FileSystem;
use crate::job::spec::JobSpec;
use crate::job::splits::input_files;
use crate::mapreduce::builtin::property as builtin;
use crate::mapreduce::linesort::{LineOrder, cuts_to_text, property};
use crate::mapreduce::tera::{KEY_BYTES, RECORD_BYTES};

/// How lines are to be sorted.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct SortOptions {
    /// Keys as `sort -k` takes them; none: the whole line.
    pub keys: Vec<String>,
    /// Between fields; `None`: blanks, as for `sort`.
    pub separator: Option<String>,
    /// Keys without options of their own are numbers.
    pub numeric: bool,
    /// From the largest to the smallest.
    pub reverse: bool,
    /// Only the first of lines with equal keys.
    pub unique: bool,
    /// Each part of the output is sorted, but they are not in order among each other; saves the sampling.
    pub parts_only: bool,
}

/// A sort of the lines of `inputs`: the parts of the output, one after the other, are in the order of `LC_ALL=C sort`.
pub async fn sort(fs: &FileSystem, base: JobSpec, options: &SortOptions) -> Result<JobSpec> {
    let mut spec = base
        .with(property::KEYS, &options.keys.join(" "))
        .with(property::NUMERIC, &options.numeric.to_string())
        .with(property::REVERSE, &options.reverse.to_string())
        .with(property::UNIQUE, &options.unique.to_string());
    spec.kind = "sort".into();
    if let Some(separator) = &options.separator {
        spec = spec.with(property::SEPARATOR, separator);
    }
    spec.validate()?;
    let files = input_files(fs, &spec.inputs).await?;
    let (spec, reducers) = with_reducers(fs, spec, total_bytes(&files)).await?;
    if options.parts_only {
        return Ok(spec);
    }
    let order = LineOrder::of(&spec.properties)?;
    let encode = |line: &[u8], out: &mut Vec<u8>| {
        order.encode(line, out);
    };
    let cuts = sample::ranges(fs, &files, Records::Lines, reducers, encode).await?;
    Ok(spec.with(property::CUTS, &cuts_to_text(cuts.cuts())))
}

/// Makes `records` records of 100 bytes into the folder `base.output`, by `maps` tasks (0: one per slot).
pub fn teragen(mut base: JobSpec, records: u64, maps: u32) -> JobSpec {
    base.kind = "teragen".into();
    base.inputs.clear();
    base.reducers = Some(0);
    base.with(builtin::RECORDS, &records.to_string()).with(builtin::MAPS, &maps.to_string())
}

/// Sorts such records; part after part of the output is in order.
pub async fn terasort(fs: &FileSystem, mut base: JobSpec) -> Result<JobSpec> {
    base.kind = "terasort".into();
    base.validate()?;
    let files = input_files(fs, &base.inputs).await?;
    let (spec, reducers) = with_reducers(fs, base, total_bytes(&files)).await?;
    let key = |record: &[u8], out: &mut Vec<u8>| out.extend_from_slice(&record[..KEY_BYTES]);
    let cuts = sample::ranges(fs, &files, Records::Fixed(RECORD_BYTES as u64), reducers, key).await?;
    Ok(spec.with(property::CUTS, &cuts_to_text(cuts.cuts())))
}

/// Checks the order of such records; its report, in `base.output`, is read with [`validation`].
pub fn teravalidate(mut base: JobSpec) -> JobSpec {
    base.kind = "teravalidate".into();
    base.reducers = Some(1);
    base
}

/// What a teravalidate found: the checksum of all records (hexadecimal), and a line for each place out of order.
pub async fn validation(fs: &FileSystem, output: &str) -> Result<(String, Vec<String>)> {
    let reader = fs.open(&format!("{output}/part-r-00000")).await?;
    let bytes = reader.read_range(0, reader.length()).await?;
    let (mut checksum, mut errors) = (None, Vec::new());
    for line in String::from_utf8_lossy(&bytes).lines() {
        match line.split_once('\t') {
            Some(("checksum", sum)) => checksum = Some(sum.to_owned()),
            Some(("error", text)) => errors.push(text.to_owned()),
            _ => {}
        }
    }
    let checksum = checksum.ok_or_else(|| {
        Error::new(ErrorCode::Corrupt, format!("{output}/part-r-00000 holds no checksum of teravalidate"))
    })?;
    Ok((checksum, errors))
}

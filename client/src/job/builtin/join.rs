//! Joins: looks at both sides and checks what the kind of join asks of them, before any task runs.

use bytes::Bytes;
use cairn_proto::mapoutput::MAX_RECORD_BYTES;
use cairn_proto::{Error, ErrorCode, Result};

use super::total_bytes;
use crate::fs::{FileStatus, FileSystem};
use crate::job::content;
use crate::job::spec::JobSpec;
use crate::job::splits::input_files;
use crate::mapreduce::fields::Separator;
use crate::mapreduce::join::{JoinType, memory_for, property};
use crate::mapreduce::table::hash_key;
use crate::mapreduce::{Compression, Shares, partition_of};

/// How rows with equal keys are brought together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum JoinKind {
    /// Both sides go through the shuffle. Works always.
    Reduce,
    /// Every map has the smaller side in memory.
    Broadcast,
    /// Both sides are sorted by their keys and partitioned alike; maps merge them.
    Map,
}

/// What is joined with what.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct JoinOptions {
    /// How.
    pub kind: JoinKind,
    /// Which rows.
    pub join_type: JoinType,
    /// Files, folders or globs.
    pub left: Vec<String>,
    /// Files, folders or globs.
    pub right: Vec<String>,
    /// Number of the key's field, from 1.
    pub left_key: usize,
    /// Number of the key's field, from 1.
    pub right_key: usize,
    /// Between fields.
    pub separator: String,
}

/// How much of a file is read to find the first or last line; a longer line is looked for in more.
const EDGE_BYTES: u64 = 64 << 10;

/// A join into the folder `base.output`.
pub async fn join(fs: &FileSystem, base: JobSpec, options: &JoinOptions) -> Result<JobSpec> {
    let separator = Separator::new(&options.separator)?;
    let (left, right) = (input_files(fs, &options.left).await?, input_files(fs, &options.right).await?);
    let mut spec = base
        .with(property::TYPE, name_of(options.join_type))
        .with(property::SEPARATOR, &options.separator)
        .with(property::LEFT_KEY, &options.left_key.to_string())
        .with(property::RIGHT_KEY, &options.right_key.to_string())
        .with(property::LEFT_FIELDS, &fields(fs, &left, &separator).await?.to_string())
        .with(property::RIGHT_FIELDS, &fields(fs, &right, &separator).await?.to_string());
    spec.kind = "join".into();
    match options.kind {
        JoinKind::Reduce => {
            spec.inputs = left.iter().chain(&right).map(|file| file.path.clone()).collect();
            Ok(spec.with(property::KIND, "reduce").with(property::LEFT_FILES, &left.len().to_string()))
        }
        JoinKind::Broadcast => broadcast(fs, spec, options, &left, &right).await,
        JoinKind::Map => merge(fs, spec, options, &left, &right, &separator).await,
    }
}

fn name_of(join_type: JoinType) -> &'static str {
    match join_type {
        JoinType::Inner => "inner",
        JoinType::Left => "left",
        JoinType::Right => "right",
        JoinType::Full => "full",
        JoinType::Semi => "semi",
        JoinType::Anti => "anti",
    }
}

fn maps_only(mut spec: JobSpec, kind: &str) -> Result<JobSpec> {
    if spec.reducers.is_some_and(|reducers| reducers > 0) {
        let text = format!("a join of kind {kind} has no reducers: leave --reducers out");
        return Err(Error::new(ErrorCode::InvalidArgument, text));
    }
    spec.reducers = Some(0);
    Ok(spec.with(property::KIND, kind))
}

/// Files that maps read by themselves, as a property.
fn paths(files: &[FileStatus]) -> Result<String> {
    if let Some(file) = files.iter().find(|file| file.path.contains('\n')) {
        let text = format!("{:?}: this kind of join takes no names with line feeds; use --kind reduce", file.path);
        return Err(Error::new(ErrorCode::InvalidArgument, text));
    }
    Ok(files.iter().map(|file| file.path.as_str()).collect::<Vec<_>>().join("\n"))
}

/// Fields of the first row of a side; 1 if it has none.
async fn fields(fs: &FileSystem, files: &[FileStatus], separator: &Separator) -> Result<usize> {
    match files.iter().find(|file| file.length > 0) {
        Some(file) => Ok(separator.count(&first_line(fs, file).await?)),
        None => Ok(1),
    }
}

async fn first_line(fs: &FileSystem, file: &FileStatus) -> Result<Bytes> {
    let mut length = EDGE_BYTES;
    loop {
        let bytes = content::start_of(fs, file, length).await?;
        if let Some(at) = memchr::memchr(b'\n', &bytes) {
            return Ok(bytes.slice(..at));
        }
        if length >= file.length || length > MAX_RECORD_BYTES as u64 {
            return Ok(bytes);
        }
        length *= 16;
    }
}

async fn last_line(fs: &FileSystem, file: &FileStatus) -> Result<Bytes> {
    let reader = fs.open(&file.path).await?;
    let mut length = EDGE_BYTES;
    loop {
        let from = reader.length().saturating_sub(length);
        let mut bytes = reader.read_range(from, reader.length() - from).await?;
        if bytes.last() == Some(&b'\n') {
            bytes.truncate(bytes.len() - 1);
        }
        if let Some(at) = memchr::memrchr(b'\n', &bytes) {
            return Ok(bytes.slice(at + 1..));
        }
        if from == 0 || length > MAX_RECORD_BYTES as u64 {
            return Ok(bytes);
        }
        length *= 16;
    }
}

async fn broadcast(
    fs: &FileSystem,
    spec: JobSpec,
    options: &JoinOptions,
    left: &[FileStatus],
    right: &[FileStatus],
) -> Result<JobSpec> {
    let mut spec = maps_only(spec, "broadcast")?;
    let (small, large, side) = match options.join_type {
        JoinType::Inner if total_bytes(left) < total_bytes(right) => (left, right, "left"),
        JoinType::Right => (left, right, "left"),
        JoinType::Full => {
            let text = "a full join cannot be of kind broadcast: no map can know which rows of the small side match nothing anywhere; use --kind reduce";
            return Err(Error::new(ErrorCode::InvalidArgument, text));
        }
        _ => (right, left, "right"),
    };
    let small_paths = paths(small)?;
    let bytes = total_bytes(small);
    let mut rows = 0;
    if let Some(file) = small.iter().find(|file| file.length > 0) {
        let row = first_line(fs, file).await?.len() as u64 + 1;
        rows = bytes / row;
    }
    let (needed, has) = (memory_for(bytes, rows), Shares::of_map_only(spec.memory_limit).program);
    if needed > has {
        let enough = Shares::limit_for_map_only(needed).div_ceil(64 << 20) * 64;
        let text = format!(
            "the {side} side has {bytes} bytes in about {rows} rows and needs about {needed} bytes of memory in every map, but a task whose limit is {} bytes has {has} for it: use --task-memory {enough}m or --kind reduce",
            spec.memory_limit
        );
        return Err(Error::new(ErrorCode::InvalidArgument, text));
    }
    spec.inputs = large.iter().map(|file| file.path.clone()).collect();
    Ok(spec.with(property::SMALL_SIDE, side).with(property::SMALL_PATHS, &small_paths))
}

/// First and last key of a part.
struct Span {
    path: String,
    first: Vec<u8>,
    last: Vec<u8>,
}

async fn merge(
    fs: &FileSystem,
    spec: JobSpec,
    options: &JoinOptions,
    left: &[FileStatus],
    right: &[FileStatus],
    separator: &Separator,
) -> Result<JobSpec> {
    let mut spec = maps_only(spec, "map")?;
    if left.len() != right.len() || left.is_empty() {
        let text = format!(
            "a join of kind map needs sides with equally many parts: the left one has {}, the right one {}; use --kind reduce",
            left.len(),
            right.len()
        );
        return Err(Error::new(ErrorCode::InvalidArgument, text));
    }
    if let Some(file) = left.iter().chain(right).find(|file| Compression::of(&file.path).is_some()) {
        let text = format!(
            "{} is compressed: the order of its rows cannot be checked before the start; use --kind reduce",
            file.path
        );
        return Err(Error::new(ErrorCode::InvalidArgument, text).with_subject(file.path.clone()));
    }
    let (left_parts, right_parts) = (paths(left)?, paths(right)?);
    let left_spans = spans(fs, left, options.left_key, separator).await?;
    let right_spans = spans(fs, right, options.right_key, separator).await?;
    let hashed = match apart(&left_spans, &right_spans) {
        Ok(()) => false,
        Err(_) if by_hash(&left_spans) && by_hash(&right_spans) => true,
        Err(error) => return Err(error),
    };
    spec.inputs.clear();
    Ok(spec
        .with(property::LEFT_PARTS, &left_parts)
        .with(property::RIGHT_PARTS, &right_parts)
        .with(property::HASHED_PARTS, &hashed.to_string()))
}

/// `None` for a part without rows.
async fn spans(fs: &FileSystem, files: &[FileStatus], key: usize, separator: &Separator) -> Result<Vec<Option<Span>>> {
    let mut spans = Vec::with_capacity(files.len());
    for file in files {
        if file.length == 0 {
            spans.push(None);
            continue;
        }
        let (first, last) = (first_line(fs, file).await?, last_line(fs, file).await?);
        let of = |line: &Bytes, which: &str| match separator.field(line, key) {
            Some(field) => Ok(line[field].to_vec()),
            None => {
                let text = format!("the {which} line of {} has no field {key}; use --kind reduce", file.path);
                Err(Error::new(ErrorCode::InvalidArgument, text).with_subject(file.path.clone()))
            }
        };
        let span = Span { path: file.path.clone(), first: of(&first, "first")?, last: of(&last, "last")? };
        if span.first > span.last {
            let text = format!(
                "{} is not sorted by field {key}: it starts with {:?} and ends with {:?}; sort it or use --kind reduce",
                file.path,
                String::from_utf8_lossy(&span.first),
                String::from_utf8_lossy(&span.last)
            );
            return Err(Error::new(ErrorCode::InvalidArgument, text).with_subject(file.path.clone()));
        }
        spans.push(Some(span));
    }
    Ok(spans)
}

/// Do the keys of part i, of both sides, lie apart from those of all other parts? Then equal keys can only be in parts of one number.
fn apart(left: &[Option<Span>], right: &[Option<Span>]) -> Result<()> {
    let mut all: Vec<(usize, &Span)> = [left, right]
        .iter()
        .flat_map(|side| side.iter().enumerate())
        .filter_map(|(part, span)| Some((part, span.as_ref()?)))
        .collect();
    all.sort_by(|a, b| a.1.first.cmp(&b.1.first));
    let mut reach: Option<(usize, &Span)> = None;
    for (part, span) in all {
        if let Some((other, furthest)) = reach
            && other != part
            && span.first <= furthest.last
        {
            let text = format!(
                "the sides are not partitioned alike: part {part} ({}) starts with key {:?}, but part {other} ({}) goes on to {:?}; use --kind reduce",
                span.path,
                String::from_utf8_lossy(&span.first),
                furthest.path,
                String::from_utf8_lossy(&furthest.last)
            );
            return Err(Error::new(ErrorCode::InvalidArgument, text));
        }
        if reach.is_none_or(|(_, furthest)| furthest.last < span.last) {
            reach = Some((part, span));
        }
    }
    Ok(())
}

/// Are keys in the parts that their hash says, as jobs without a partitioner of their own leave them? A first look: the tasks check each key.
fn by_hash(spans: &[Option<Span>]) -> bool {
    let parts = spans.len() as u32;
    let fits = |part: usize, key: &[u8]| partition_of(hash_key(key), parts) == part as u32;
    let mut known = spans.iter().enumerate().filter_map(|(part, span)| Some((part, span.as_ref()?)));
    known.all(|(part, span)| fits(part, &span.first) && fits(part, &span.last))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn side(spans: &[(&str, &str)]) -> Vec<Option<Span>> {
        let span = |(part, (first, last)): (usize, &(&str, &str))| {
            let some = !first.is_empty();
            some.then(|| Span {
                path: format!("/p{part}"),
                first: first.as_bytes().to_vec(),
                last: last.as_bytes().to_vec(),
            })
        };
        spans.iter().enumerate().map(span).collect()
    }

    #[test]
    fn parts_must_lie_apart() {
        let left = side(&[("a", "f"), ("g", "m"), ("n", "z")]);
        for right in [
            side(&[("b", "f"), ("g", "g"), ("o", "zz")]),
            side(&[("", ""), ("", ""), ("", "")]),
            side(&[("0", "1"), ("h", "i"), ("zz", "zzz")]),
        ] {
            apart(&left, &right).unwrap();
        }
        for right in [
            side(&[("b", "g"), ("h", "i"), ("o", "p")]),
            side(&[("b", "c"), ("d", "e"), ("o", "p")]),
            side(&[("g", "m"), ("a", "f"), ("n", "z")]),
            side(&[("", ""), ("a", "z"), ("", "")]),
        ] {
            let error = apart(&left, &right).unwrap_err();
            assert!(error.message().contains("not partitioned alike"), "{error}");
        }
        let hash_parts = |key: &str| partition_of(hash_key(key.as_bytes()), 2);
        let (mut zero, mut one) = (Vec::new(), Vec::new());
        for i in 0..20 {
            let key = format!("k{i:02}");
            if hash_parts(&key) == 0 { zero.push(key) } else { one.push(key) }
        }
        assert!(by_hash(&side(&[(&zero[0], &zero[zero.len() - 1]), (&one[0], &one[one.len() - 1])])));
        assert!(!by_hash(&side(&[(&one[0], &one[1]), (&one[0], &one[1])])));
    }
}

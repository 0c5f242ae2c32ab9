//! Joins of delimited files by one field of each side.
//!
//! # Overview
//! Three ways to bring rows with equal keys together: all rows go through the shuffle ([`shuffled`]); one side is small and every map has it in
//! memory ([`broadcast`]); both sides are sorted and partitioned alike, and each map merges one part of each ([`merged`]). What a pair of rows
//! looks like ([`Layout`]) and what becomes of the rows of one key ([`matched`]) is the same for all.
//!
//! # Output
//! The key, the other fields of the left row, the other fields of the right row. Where a side has no row, its fields are empty: as many as the first
//! row of that side has. `semi` and `anti` give left rows as they are. A row that has no such field matches nothing.

mod broadcast;
mod matched;
mod merged;
mod shuffled;

use std::collections::BTreeMap;

use cairn_proto::{Error, ErrorCode, Result};

use super::Program;
use super::fields::Separator;

pub use broadcast::{ROW_BYTES, memory_for};

/// Names of the properties.
#[allow(missing_docs)]
pub mod property {
    /// "reduce", "broadcast" or "map".
    pub const KIND: &str = "join.kind";
    /// "inner", "left", "right", "full", "semi" or "anti".
    pub const TYPE: &str = "join.type";
    pub const SEPARATOR: &str = "join.separator";
    /// Number of the key field, from 1.
    pub const LEFT_KEY: &str = "join.left.key";
    pub const RIGHT_KEY: &str = "join.right.key";
    /// Fields of a row, for filling up.
    pub const LEFT_FIELDS: &str = "join.left.fields";
    pub const RIGHT_FIELDS: &str = "join.right.fields";
    /// How many of the job's input files are of the left side; they come first.
    pub const LEFT_FILES: &str = "join.left.files";
    /// The files of the side that is kept in memory, one a line; "left" or "right".
    pub const SMALL_PATHS: &str = "join.small.paths";
    pub const SMALL_SIDE: &str = "join.small.side";
    /// The parts of both sides, one a line.
    pub const LEFT_PARTS: &str = "join.left.parts";
    pub const RIGHT_PARTS: &str = "join.right.parts";
    /// "true": a key belongs to the part that its hash says.
    pub const HASHED_PARTS: &str = "join.parts.hashed";
}

/// Rows that have no such field.
pub const NO_KEY: &str = "join.rows_without_key";

/// Which rows a join gives.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs)] // as in SQL
pub enum JoinType {
    Inner,
    Left,
    Right,
    Full,
    Semi,
    Anti,
}

impl JoinType {
    /// By its name.
    pub fn parse(name: &str) -> Result<Self> {
        Ok(match name {
            "inner" => Self::Inner,
            "left" => Self::Left,
            "right" => Self::Right,
            "full" => Self::Full,
            "semi" => Self::Semi,
            "anti" => Self::Anti,
            other => {
                let text =
                    format!("there is no join type {other:?}: there are inner, left, right, full, semi and anti");
                return Err(Error::new(ErrorCode::InvalidArgument, text).with_subject(other));
            }
        })
    }

    /// Are left rows without a match part of it?
    pub fn keeps_left(self) -> bool {
        matches!(self, Self::Left | Self::Full | Self::Anti)
    }

    /// Are right rows without a match part of it?
    pub fn keeps_right(self) -> bool {
        matches!(self, Self::Right | Self::Full)
    }

    /// Does only the presence of a match count?
    pub fn is_test(self) -> bool {
        matches!(self, Self::Semi | Self::Anti)
    }
}

/// One of the two inputs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs)]
pub enum Side {
    Left,
    Right,
}

/// What rows look like, in and out.
#[derive(Clone, Debug)]
pub struct Layout {
    /// Which rows.
    pub kind: JoinType,
    /// Between fields.
    pub separator: Separator,
    left: SideLayout,
    right: SideLayout,
}

#[derive(Clone, Copy, Debug)]
struct SideLayout {
    key: usize,
    fields: usize,
}

impl Layout {
    /// Of the job's properties.
    pub fn of(properties: &BTreeMap<String, String>) -> Result<Self> {
        let number = |name: &str| {
            let text = properties.get(name).map_or("1", String::as_str);
            text.parse::<usize>().ok().filter(|number| (1..=1_000_000).contains(number)).ok_or_else(|| {
                let text = format!("property {name}: {text:?} is no number of a field, from 1");
                Error::new(ErrorCode::InvalidArgument, text).with_subject(name)
            })
        };
        let kind = JoinType::parse(properties.get(property::TYPE).map_or("inner", String::as_str))?;
        let separator = match properties.get(property::SEPARATOR) {
            Some(text) => Separator::new(text)?,
            None => Separator::Byte(b'\t'),
        };
        let left = SideLayout { key: number(property::LEFT_KEY)?, fields: number(property::LEFT_FIELDS)? };
        let right = SideLayout { key: number(property::RIGHT_KEY)?, fields: number(property::RIGHT_FIELDS)? };
        Ok(Self { kind, separator, left, right })
    }

    fn side(&self, side: Side) -> SideLayout {
        match side {
            Side::Left => self.left,
            Side::Right => self.right,
        }
    }

    /// The key of a row; `None` if it has no such field.
    #[inline]
    pub fn key<'a>(&self, side: Side, row: &'a [u8]) -> Option<&'a [u8]> {
        self.separator.field(row, self.side(side).key).map(|field| &row[field])
    }

    /// Appends the fields of a row but its key, each behind a separator; empty ones where there is no row, or a short one.
    fn push_rest(&self, side: Side, row: Option<&[u8]>, out: &mut Vec<u8>) {
        let layout = self.side(side);
        let separator = self.separator.bytes();
        let Some(row) = row else {
            (1..layout.fields).for_each(|_| out.extend_from_slice(separator));
            return;
        };
        let (mut from, mut number, mut missing) = (0, 1, layout.fields - 1);
        loop {
            let (end, next) = self.separator.field_end(row, from);
            if number != layout.key {
                out.extend_from_slice(separator);
                out.extend_from_slice(&row[from..end]);
                missing = missing.saturating_sub(1);
            }
            let Some(next) = next else { break };
            (from, number) = (next, number + 1);
        }
        (0..missing).for_each(|_| out.extend_from_slice(separator));
    }

    /// Writes the joined row to `out`; at least one side has a row, and the key is one that both have.
    fn joined(&self, left: Option<&[u8]>, right: Option<&[u8]>, out: &mut Vec<u8>) {
        out.clear();
        let of_left = left.and_then(|row| self.key(Side::Left, row));
        let key = of_left.or_else(|| right.and_then(|row| self.key(Side::Right, row)));
        out.extend_from_slice(key.unwrap_or_default());
        self.push_rest(Side::Left, left, out);
        self.push_rest(Side::Right, right, out);
    }
}

/// The program of the kind that the properties name.
pub fn program(properties: &BTreeMap<String, String>, reducers: u32) -> Result<Box<dyn Program>> {
    let kind = properties.get(property::KIND).map_or("reduce", String::as_str);
    let layout = Layout::of(properties)?;
    let needs =
        |wrong: bool, text: &str| if wrong { Err(Error::new(ErrorCode::InvalidArgument, text)) } else { Ok(()) };
    match kind {
        "reduce" => {
            needs(reducers == 0, "a join of kind reduce needs at least one reducer")?;
            Ok(Box::new(shuffled::ReduceJoin::new(layout, properties)?))
        }
        "broadcast" => {
            needs(reducers > 0, "a join of kind broadcast has no reducers")?;
            Ok(Box::new(broadcast::BroadcastJoin::new(layout, properties)?))
        }
        "map" => {
            needs(reducers > 0, "a join of kind map has no reducers")?;
            Ok(Box::new(merged::MapJoin::new(layout, properties)?))
        }
        other => {
            let text = format!("there is no kind of join {other:?}: there are reduce, map and broadcast");
            Err(Error::new(ErrorCode::InvalidArgument, text).with_subject(other))
        }
    }
}

/// The lines of a property.
fn lines(properties: &BTreeMap<String, String>, name: &str) -> Vec<String> {
    let text = properties.get(name).map_or("", String::as_str);
    text.lines().map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(pairs: &[(&str, &str)]) -> Layout {
        Layout::of(&pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()).unwrap()
    }

    #[test]
    fn joined_rows_have_the_key_first_and_once() {
        let layout = layout(&[
            (property::SEPARATOR, ","),
            (property::LEFT_KEY, "2"),
            (property::LEFT_FIELDS, "3"),
            (property::RIGHT_FIELDS, "2"),
        ]);
        let joined = |left: Option<&str>, right: Option<&str>| {
            let mut out = Vec::new();
            layout.joined(left.map(str::as_bytes), right.map(str::as_bytes), &mut out);
            String::from_utf8(out).unwrap()
        };
        assert_eq!(joined(Some("a,k,b"), Some("k,x")), "k,a,b,x");
        assert_eq!(joined(Some("a,k,b"), None), "k,a,b,");
        assert_eq!(joined(None, Some("k,x")), "k,,,x");
        assert_eq!(joined(Some("a,k"), Some("k,x,y")), "k,a,,x,y");
        assert_eq!(layout.key(Side::Left, b"only"), None);
    }
}

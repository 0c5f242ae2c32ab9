//! Sorting lines: whole, or by keys that are parts of them, as `sort` does under `LC_ALL=C`.
//!
//! A line travels under a key that orders like it: its parts, encoded ([`super::order`]), then the line itself, by which lines with equal parts are
//! ordered. The value tells where in the key the line starts; where the key does not hold it, the value is the line.

use std::collections::BTreeMap;

use cairn_proto::{Error, ErrorCode, Result};

use super::fields::{KeySpec, Separator};
use super::{
    Collector, InputFormat, KeyRanges, Mapper, Output, Partitioner, Program, Record, Reducer, TaskContext, Values,
    decode_count, encode_count, order,
};

/// Names of the properties.
pub mod property {
    /// Keys, as [`super::KeySpec::parse_all`] reads them.
    pub const KEYS: &str = "sort.keys";
    /// Between fields; not set: blanks.
    pub const SEPARATOR: &str = "sort.separator";
    /// "true": keys without options of their own are numbers.
    pub const NUMERIC: &str = "sort.numeric";
    /// "true": from the largest to the smallest.
    pub const REVERSE: &str = "sort.reverse";
    /// "true": of lines with equal keys only the first of the input.
    pub const UNIQUE: &str = "sort.unique";
    /// Keys between the parts ([`super::cuts_to_text`]); not set: parts are not in order among each other.
    pub const CUTS: &str = "sort.cuts";
}

/// How lines are ordered.
#[derive(Clone, Debug)]
pub struct LineOrder {
    keys: Vec<KeySpec>,
    separator: Separator,
    tie: Tie,
}

/// Order of lines whose keys are equal.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Tie {
    /// By their bytes.
    Ascending,
    /// By their bytes, the largest first.
    Descending,
    /// They are the same.
    Equal,
}

impl LineOrder {
    /// Of the job's properties.
    pub fn of(properties: &BTreeMap<String, String>) -> Result<Self> {
        let get = |name: &str| properties.get(name).map(String::as_str);
        let flag = |name: &str| match get(name) {
            None | Some("false") => Ok(false),
            Some("true") => Ok(true),
            Some(other) => {
                let text = format!("property {name}: {other:?} is neither true nor false");
                Err(Error::new(ErrorCode::InvalidArgument, text).with_subject(name))
            }
        };
        let (numeric, reverse) = (flag(property::NUMERIC)?, flag(property::REVERSE)?);
        let mut keys = KeySpec::parse_all(get(property::KEYS).unwrap_or_default())?;
        if keys.is_empty() && numeric {
            keys.push(KeySpec::whole_line());
        }
        for key in keys.iter_mut().filter(|key| !key.has_options()) {
            (key.numeric, key.reverse) = (numeric, reverse);
        }
        let tie = match (flag(property::UNIQUE)?, reverse) {
            // Without keys equal lines are equal in all.
            (true, _) if !keys.is_empty() => Tie::Equal,
            (_, true) => Tie::Descending,
            _ => Tie::Ascending,
        };
        let separator = get(property::SEPARATOR).map_or(Ok(Separator::Blanks), Separator::new)?;
        Ok(Self { keys, separator, tie })
    }

    /// Writes the key under which `line` travels to `out`. Returns where in it the line starts, if it is in it.
    pub fn encode(&self, line: &[u8], out: &mut Vec<u8>) -> Option<usize> {
        out.clear();
        for key in &self.keys {
            key.encode(&self.separator, line, out);
        }
        match self.tie {
            Tie::Equal => None,
            Tie::Descending => {
                order::descending(out, |out| order::push_text(line, out));
                None
            }
            Tie::Ascending => {
                let start = out.len();
                out.extend_from_slice(line);
                Some(start)
            }
        }
    }

    /// Are lines their own keys?
    fn is_plain(&self) -> bool {
        self.keys.is_empty() && self.tie == Tie::Ascending
    }
}

/// Cuts as a property holds them.
pub fn cuts_to_text(cuts: &[Vec<u8>]) -> String {
    let hex = |cut: &Vec<u8>| cut.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    cuts.iter().map(hex).collect::<Vec<_>>().join(",")
}

/// What [`cuts_to_text`] wrote.
pub fn cuts_of_text(text: &str) -> Result<KeyRanges> {
    let cut = |hex: &str| -> Option<Vec<u8>> {
        let digits = hex.as_bytes();
        let digit = |byte: u8| char::from(byte).to_digit(16);
        let pairs = digits.chunks(2).map(|pair| Some((digit(*pair.first()?)? * 16 + digit(*pair.get(1)?)?) as u8));
        pairs.collect()
    };
    if text.is_empty() {
        return Ok(KeyRanges::default());
    }
    let cuts: Option<Vec<Vec<u8>>> = text.split(',').map(cut).collect();
    KeyRanges::new(
        cuts.ok_or_else(|| Error::new(ErrorCode::InvalidArgument, "the cuts of the key ranges are not hexadecimal"))?,
    )
}

/// Sorts lines.
pub struct LineSort {
    order: LineOrder,
    unique: bool,
    cuts: Option<KeyRanges>,
}

impl LineSort {
    /// Of the job's properties.
    pub fn new(properties: &BTreeMap<String, String>, reducers: u32) -> Result<Self> {
        if reducers == 0 {
            return Err(Error::new(ErrorCode::InvalidArgument, "sort needs at least one reducer"));
        }
        let order = LineOrder::of(properties)?;
        let unique = properties.get(property::UNIQUE).is_some_and(|value| value == "true");
        let cuts = properties.get(property::CUTS).map(|text| cuts_of_text(text)).transpose()?;
        Ok(Self { order, unique, cuts })
    }
}

impl Program for LineSort {
    fn input(&self) -> InputFormat {
        InputFormat::Lines
    }

    fn mapper(&self, _task: &TaskContext) -> Result<Box<dyn Mapper>> {
        Ok(Box::new(Keyed { order: self.order.clone(), key: Vec::new() }))
    }

    fn partitioner(&self) -> Result<Partitioner> {
        Ok(self.cuts.clone().map_or(Partitioner::Hash, Partitioner::Ranges))
    }

    fn reducer(&self, _task: &TaskContext) -> Result<Box<dyn Reducer>> {
        Ok(Box::new(Write {
            plain: self.order.is_plain(),
            tail: self.order.tie == Tie::Ascending,
            unique: self.unique,
        }))
    }
}

struct Keyed {
    order: LineOrder,
    key: Vec<u8>,
}

impl Mapper for Keyed {
    fn map(&mut self, record: Record<'_>, out: &mut Collector) -> Result<()> {
        if self.order.is_plain() {
            return out.emit(record.bytes, b"");
        }
        match self.order.encode(record.bytes, &mut self.key) {
            Some(start) => out.emit(&self.key, encode_count(start as u64, &mut [0; 10])),
            None => out.emit(&self.key, record.bytes),
        }
    }
}

struct Write {
    plain: bool,
    /// The key holds the line, from where the value says.
    tail: bool,
    unique: bool,
}

impl Reducer for Write {
    fn reduce(&mut self, key: &[u8], values: &mut Values<'_>, out: &mut Output) -> Result<()> {
        while let Some(value) = values.next()? {
            match (self.plain, self.tail) {
                (true, _) => out.line(key)?,
                (false, false) => out.line(value)?,
                (false, true) => {
                    let start = decode_count(value)? as usize;
                    let line =
                        key.get(start..).ok_or_else(|| Error::new(ErrorCode::Corrupt, "a sort key is too short"))?;
                    out.line(line)?;
                }
            }
            if self.unique {
                return Ok(());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write as _;
    use std::process::{Command, Stdio};

    fn order(pairs: &[(&str, &str)]) -> LineOrder {
        LineOrder::of(&pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()).unwrap()
    }

    fn sorted(order: &LineOrder, text: &[u8], unique: bool) -> Vec<u8> {
        let mut lines: Vec<(Vec<u8>, &[u8])> = text
            .split_inclusive(|byte| *byte == b'\n')
            .map(|line| {
                let line = line.strip_suffix(b"\n").unwrap_or(line);
                let mut key = Vec::new();
                if let Some(start) = order.encode(line, &mut key) {
                    assert_eq!(&key[start..], line);
                }
                (key, line)
            })
            .collect();
        lines.sort_by(|a, b| a.0.cmp(&b.0));
        if unique {
            lines.dedup_by(|a, b| a.0 == b.0);
        }
        lines.iter().flat_map(|(_, line)| [*line, b"\n"].concat()).collect()
    }

    fn by_sort(flags: &[&str], text: &[u8]) -> Vec<u8> {
        let mut child = Command::new("sort")
            .args(flags)
            .env("LC_ALL", "C")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(text).unwrap();
        child.wait_with_output().unwrap().stdout
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn lines_order_as_for_sort(
            text in prop::collection::vec(prop::sample::select(&b"ab01 -.\t,\n\n9A\xff"[..]), 0..400),
        ) {
            use property::{KEYS, NUMERIC, REVERSE, SEPARATOR, UNIQUE};
            type Case<'a> = (&'a [(&'a str, &'a str)], &'a [&'a str]);
            let cases: [Case<'_>; 9] = [
                (&[], &[]),
                (&[(REVERSE, "true")], &["-r"]),
                (&[(UNIQUE, "true"), (REVERSE, "true")], &["-ur"]),
                (&[(NUMERIC, "true")], &["-n"]),
                (&[(NUMERIC, "true"), (UNIQUE, "true")], &["-nu"]),
                (&[(KEYS, "2,2nr")], &["-k2,2nr"]),
                (&[(KEYS, "2,2 1"), (REVERSE, "true"), (SEPARATOR, ",")], &["-t,", "-r", "-k2,2", "-k1"]),
                (&[(KEYS, "1.2,2.1f 3bn"), (UNIQUE, "true")], &["-u", "-k1.2,2.1f", "-k3bn"]),
                (&[(KEYS, "2n,2"), (REVERSE, "true"), (SEPARATOR, "\t")], &["-t\t", "-r", "-k2n,2"]),
            ];
            for (properties, flags) in cases {
                let unique = properties.iter().any(|(name, _)| *name == UNIQUE);
                let (got, want) = (sorted(&order(properties), &text, unique), by_sort(flags, &text));
                let show = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
                prop_assert!(got == want, "{flags:?}: {:?}\n{:?}", show(&got), show(&want));
            }
        }
    }

    #[test]
    fn cuts_come_back() {
        let cuts = vec![vec![], b"a\0".to_vec(), vec![0xff, 0x10]];
        assert_eq!(cuts_of_text(&cuts_to_text(&cuts)).unwrap().cuts(), cuts);
        assert!(cuts_of_text("").unwrap().cuts().is_empty());
        assert!(cuts_of_text("0g").is_err() && cuts_of_text("0").is_err() && cuts_of_text("02,01").is_err());
    }
}

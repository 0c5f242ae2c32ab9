//! Keys and values in lines: where a line is cut, how keys are ordered, and which reducer they go to.

use std::collections::BTreeMap;
use std::sync::Arc;

use cairn_proto::{Error, ErrorCode, Result};

use super::property;
use crate::mapreduce::fields::{KeySpec, Separator};
use crate::mapreduce::table::hash_key;
use crate::mapreduce::{Partitioner, order, partition_of};

/// Where a line ends its key: at the `fields`-th separator.
#[derive(Clone, Debug)]
pub struct Cut {
    /// Between fields, and between key and value.
    pub separator: Separator,
    /// Fields of the key.
    pub fields: usize,
}

impl Cut {
    /// Key and value; a line without enough separators is all key.
    #[inline]
    pub fn split<'a>(&self, line: &'a [u8]) -> (&'a [u8], &'a [u8]) {
        let mut from = 0;
        for _ in 1..self.fields {
            match self.separator.field_end(line, from).1 {
                Some(next) => from = next,
                None => return (line, b""),
            }
        }
        let (end, next) = self.separator.field_end(line, from);
        (&line[..end], next.map_or(b"", |next| &line[next..]))
    }
}

/// How a job orders and spreads its keys.
///
/// Keys compare by their bytes. Where the job asks for another order, what goes to the reducers is the encoded order, the key itself, and the key's
/// length (u32, big endian).
#[derive(Clone, Debug)]
pub struct KeyOrder {
    separator: Separator,
    sort: Vec<KeySpec>,
    spread: Vec<KeySpec>,
}

/// Bytes of the length at the end of a key.
const LENGTH_BYTES: usize = 4;

impl KeyOrder {
    /// Of the job's properties.
    pub fn of(properties: &BTreeMap<String, String>) -> Result<Self> {
        let get = |names: &[&'static str]| names.iter().find_map(|name| Some((*name, properties.get(*name)?)));
        let separator = match get(&[property::KEY_FIELD_SEPARATOR, "map.output.key.field.separator"]) {
            Some((_, text)) => Separator::new(text)?,
            None => Separator::Byte(b'\t'),
        };
        let specs = |names: &[&'static str]| match get(names) {
            Some((name, text)) => KeySpec::parse_all(text).map_err(|error| {
                Error::new(error.code(), format!("property {name}: {}", error.message())).with_subject(name)
            }),
            None => Ok(Vec::new()),
        };
        let sort = specs(&[property::COMPARATOR_OPTIONS, "mapred.text.key.comparator.options"])?;
        let mut spread = Vec::new();
        match properties.get(property::PARTITIONER).map_or("hash", String::as_str) {
            "hash" => {}
            "fields" => {
                spread = specs(&[property::PARTITIONER_OPTIONS, "mapred.text.key.partitioner.options"])?;
                if let Some((name, count)) = get(&[property::PARTITION_FIELDS]) {
                    let count: usize = count.parse().ok().filter(|count| *count > 0).ok_or_else(|| {
                        let text = format!("property {name}: {count:?} is no number of fields");
                        Error::new(ErrorCode::InvalidArgument, text).with_subject(name)
                    })?;
                    spread = vec![KeySpec::parse(&format!("1,{count}"))?];
                }
                if spread.is_empty() {
                    let text = format!(
                        "the partitioner \"fields\" needs to know which: set {} (as -k1,2) or {}",
                        property::PARTITIONER_OPTIONS,
                        property::PARTITION_FIELDS
                    );
                    return Err(Error::new(ErrorCode::InvalidArgument, text));
                }
            }
            other => {
                let text = format!("there is no partitioner {other:?}: there are hash and fields");
                return Err(Error::new(ErrorCode::InvalidArgument, text).with_subject(property::PARTITIONER));
            }
        }
        Ok(Self { separator, sort, spread })
    }

    /// Do keys travel as they are?
    pub fn is_plain(&self) -> bool {
        self.sort.is_empty()
    }

    /// The key under which `key` travels, in `out`.
    pub fn encode(&self, key: &[u8], out: &mut Vec<u8>) {
        out.clear();
        for spec in &self.sort {
            spec.encode(&self.separator, key, out);
        }
        out.extend_from_slice(key);
        out.extend_from_slice(&(key.len() as u32).to_be_bytes());
    }

    /// The key that travels as `encoded`.
    pub fn decode<'a>(&self, encoded: &'a [u8]) -> Result<&'a [u8]> {
        if self.is_plain() {
            return Ok(encoded);
        }
        original(encoded).ok_or_else(|| Error::new(ErrorCode::Corrupt, "a key of the shuffle is too short"))
    }

    /// Which reducer a key that travels goes to.
    pub fn partitioner(&self) -> Partitioner {
        if self.spread.is_empty() {
            return Partitioner::Hash;
        }
        let (order, plain) = (self.clone(), self.is_plain());
        Partitioner::Own(Arc::new(move |encoded, partitions| {
            let key = if plain { encoded } else { original(encoded).unwrap_or(encoded) };
            let hash = match &order.spread[..] {
                [one] => hash_key(one.select(&order.separator, key)),
                several => {
                    let mut parts = Vec::new();
                    for spec in several {
                        order::push_text(spec.select(&order.separator, key), &mut parts);
                    }
                    hash_key(&parts)
                }
            };
            partition_of(hash, partitions)
        }))
    }
}

fn original(encoded: &[u8]) -> Option<&[u8]> {
    let (rest, length) = encoded.split_last_chunk::<LENGTH_BYTES>()?;
    rest.get(rest.len().checked_sub(u32::from_be_bytes(*length) as usize)?..)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(pairs: &[(&str, &str)]) -> Result<KeyOrder> {
        KeyOrder::of(&pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect())
    }

    #[test]
    fn lines_are_cut_at_the_separator() {
        let cut = |separator: &str, fields| Cut { separator: Separator::new(separator).unwrap(), fields };
        assert_eq!(cut("\t", 1).split(b"k\tv\tw"), (&b"k"[..], &b"v\tw"[..]));
        assert_eq!(cut("\t", 2).split(b"k\tv\tw"), (&b"k\tv"[..], &b"w"[..]));
        assert_eq!(cut(".", 4).split(b"11.12.1.2"), (&b"11.12.1.2"[..], &b""[..]));
        assert_eq!(cut("\t", 1).split(b"no tab"), (&b"no tab"[..], &b""[..]));
        assert_eq!(cut("::", 1).split(b"a::b"), (&b"a"[..], &b"b"[..]));
    }

    #[test]
    fn keys_are_ordered_by_fields_and_come_back() {
        let by =
            order(&[(property::COMPARATOR_OPTIONS, "-k1,1 -k2,2nr"), (property::KEY_FIELD_SEPARATOR, ".")]).unwrap();
        let encode = |key: &str| {
            let mut out = Vec::new();
            by.encode(key.as_bytes(), &mut out);
            assert_eq!(by.decode(&out).unwrap(), key.as_bytes());
            out
        };
        let ordered = ["a.10.x", "a.9.a", "a.9.b", "a.-3", "aa.100", "b"];
        assert!(ordered.windows(2).all(|two| encode(two[0]) < encode(two[1])));
        assert!(by.decode(b"abc").is_err() && by.decode(b"a\xff\xff\xff\xff").is_err());
    }

    #[test]
    fn keys_with_equal_fields_go_to_one_reducer() {
        for sort in ["", "-k2,2n"] {
            let mut pairs = vec![
                (property::PARTITIONER, "fields"),
                (property::PARTITION_FIELDS, "2"),
                (property::KEY_FIELD_SEPARATOR, "."),
            ];
            if !sort.is_empty() {
                pairs.push((property::COMPARATOR_OPTIONS, sort));
            }
            let by = order(&pairs).unwrap();
            let partition = |key: String| {
                let mut out = Vec::new();
                if by.is_plain() {
                    out.extend_from_slice(key.as_bytes())
                } else {
                    by.encode(key.as_bytes(), &mut out)
                }
                by.partitioner().partition(&out, 16).unwrap()
            };
            let of = |prefix: &str| (0..50).map(|i| partition(format!("{prefix}.{i}"))).collect::<Vec<_>>();
            let (a, b) = (of("11.12"), of("11.14"));
            assert!(a.iter().all(|one| *one == a[0]) && b.iter().all(|one| *one == b[0]));
            assert_ne!(a[0], b[0]);
        }
        assert!(order(&[(property::PARTITIONER, "fields")]).is_err());
        assert!(order(&[(property::PARTITIONER, "modulo")]).is_err());
        let error = order(&[(property::COMPARATOR_OPTIONS, "-kx")]).unwrap_err();
        assert!(error.message().contains(property::COMPARATOR_OPTIONS), "{error}");
    }
}

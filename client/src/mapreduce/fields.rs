//! Fields of lines, and sort keys made of them, as `sort -k` and Hadoop's key field options name them.

use cairn_proto::{Error, ErrorCode, Result};

use super::order;

/// What separates the fields of a line.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Separator {
    /// The empty string between a non-blank and a blank: blanks at its start belong to a field, as `sort` has it.
    Blanks,
    /// One byte.
    Byte(u8),
    /// Several bytes.
    Text(Vec<u8>),
}

impl Separator {
    /// One or more bytes; fails if there is none, or if it holds a line feed.
    pub fn new(text: &str) -> Result<Self> {
        match text.as_bytes() {
            [] => Err(invalid("separator", "a separator must not be empty")),
            bytes if bytes.contains(&b'\n') => Err(invalid("separator", "a separator must not hold a line feed")),
            [byte] => Ok(Self::Byte(*byte)),
            bytes => Ok(Self::Text(bytes.to_vec())),
        }
    }

    /// Its bytes as they are written between fields.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::Blanks => b" ",
            Self::Byte(byte) => std::slice::from_ref(byte),
            Self::Text(bytes) => bytes,
        }
    }

    /// Where the field that starts at `from` ends, and where the next one starts (`None`: it is the last).
    #[inline]
    pub fn field_end(&self, line: &[u8], from: usize) -> (usize, Option<usize>) {
        let rest = &line[from..];
        let found = match self {
            Self::Byte(byte) => memchr::memchr(*byte, rest).map(|at| (at, at + 1)),
            Self::Text(bytes) => memchr::memmem::find(rest, bytes).map(|at| (at, at + bytes.len())),
            Self::Blanks => {
                let word = rest.iter().position(|byte| !is_blank(*byte)).unwrap_or(rest.len());
                rest[word..].iter().position(|byte| is_blank(*byte)).map(|at| (word + at, word + at))
            }
        };
        match found {
            Some((end, next)) => (from + end, Some(from + next)),
            None => (line.len(), None),
        }
    }

    /// Start and end of field `number` (from 1); `None` if the line has fewer.
    pub fn field(&self, line: &[u8], number: usize) -> Option<std::ops::Range<usize>> {
        let mut from = 0;
        for _ in 1..number {
            from = self.field_end(line, from).1?;
        }
        Some(from..self.field_end(line, from).0)
    }

    /// How many fields the line has.
    pub fn count(&self, line: &[u8]) -> usize {
        let (mut count, mut from) = (1, 0);
        while let Some(next) = self.field_end(line, from).1 {
            count += 1;
            from = next;
        }
        count
    }
}

fn is_blank(byte: u8) -> bool {
    byte == b' ' || byte == b'\t'
}

fn invalid(what: &str, text: impl Into<String>) -> Error {
    Error::new(ErrorCode::InvalidArgument, text).with_subject(what)
}

/// A place in a line: a field and a character of it, both from 1; character 0 in an end: the whole field.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Place {
    field: usize,
    char: usize,
}

/// Part of a line by which it is ordered: `F[.C][OPTS][,F[.C][OPTS]]` with the options `n` (a number), `r` (from the largest to the
/// smallest), `b` (without blanks at its start) and `f` (lower case as upper case).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KeySpec {
    from: Place,
    /// `None`: the end of the line.
    to: Option<Place>,
    /// A number.
    pub numeric: bool,
    /// From the largest to the smallest.
    pub reverse: bool,
    skip_blanks: bool,
    fold: bool,
}

/// Most fields or characters that a key may name.
const MAX_POSITION: usize = 1 << 20;

impl KeySpec {
    /// Reads one, with or without `-k` before it.
    pub fn parse(text: &str) -> Result<Self> {
        let body = text.strip_prefix("-k").unwrap_or(text).trim();
        let refuse = |why: &str| {
            let text =
                format!("key {text:?}: {why}; a key is FIELD[.CHARACTER][nrbf][,FIELD[.CHARACTER][nrbf]], from 1");
            Err(invalid("key", text))
        };
        let (from, to) = match body.split_once(',') {
            Some((from, to)) => (from, Some(to)),
            None => (body, None),
        };
        let mut spec = Self {
            from: Place { field: 1, char: 1 },
            to: None,
            numeric: false,
            reverse: false,
            skip_blanks: false,
            fold: false,
        };
        let Some(place) = spec.place(from, 1) else { return refuse("it does not name a field") };
        spec.from = place;
        if place.char == 0 {
            return refuse("characters are counted from 1");
        }
        if let Some(to) = to {
            let Some(place) = spec.place(to, 0) else { return refuse("it does not name the last field") };
            spec.to = Some(place);
        }
        Ok(spec)
    }

    /// Reads several, separated by blanks.
    pub fn parse_all(text: &str) -> Result<Vec<Self>> {
        // Hadoop's users write "-k1,1 -k2,2nr", and global options as words of their own.
        let mut specs = Vec::new();
        let (mut numeric, mut reverse) = (false, false);
        for word in text.split_ascii_whitespace() {
            match word {
                "-n" => numeric = true,
                "-r" => reverse = true,
                "-nr" | "-rn" => (numeric, reverse) = (true, true),
                "-k" => {}
                _ => specs.push(Self::parse(word)?),
            }
        }
        if specs.is_empty() && (numeric || reverse) {
            specs.push(Self::whole_line());
        }
        for spec in specs.iter_mut().filter(|spec| !spec.has_options()) {
            (spec.numeric, spec.reverse) = (numeric, reverse);
        }
        Ok(specs)
    }

    /// The whole line by its bytes.
    pub fn whole_line() -> Self {
        Self {
            from: Place { field: 1, char: 1 },
            to: None,
            numeric: false,
            reverse: false,
            skip_blanks: false,
            fold: false,
        }
    }

    /// Whether it says itself how it is ordered; global options are for keys that do not.
    pub fn has_options(&self) -> bool {
        self.numeric || self.reverse || self.skip_blanks || self.fold
    }

    /// A place and the options behind it.
    fn place(&mut self, text: &str, default_char: usize) -> Option<Place> {
        let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (place, options) = text.split_at(digits);
        for option in options.chars() {
            match option {
                'n' => self.numeric = true,
                'r' => self.reverse = true,
                'b' => self.skip_blanks = true,
                'f' => self.fold = true,
                _ => return None,
            }
        }
        let number = |text: &str| text.parse().ok().filter(|number| *number <= MAX_POSITION);
        let (field, char) = match place.split_once('.') {
            Some((field, char)) => (number(field)?, number(char)?),
            None => (number(place)?, default_char),
        };
        (field > 0).then_some(Place { field, char })
    }

    /// The bytes that it names in `line`; empty if the line has no such field.
    pub fn select<'a>(&self, separator: &Separator, line: &'a [u8]) -> &'a [u8] {
        let skip = |range: &std::ops::Range<usize>| match self.skip_blanks {
            true => line[range.clone()].iter().take_while(|byte| is_blank(**byte)).count(),
            false => 0,
        };
        let start = match separator.field(line, self.from.field) {
            Some(field) => (field.start + skip(&field) + self.from.char - 1).min(line.len()),
            None => line.len(),
        };
        let end = match self.to {
            None => line.len(),
            Some(to) => match separator.field(line, to.field) {
                None => line.len(),
                Some(field) if to.char == 0 => field.end,
                Some(field) => (field.start + skip(&field) + to.char).min(line.len()),
            },
        };
        &line[start..end.max(start)]
    }

    /// Appends what it names, so that the bytes order as the key does.
    pub fn encode(&self, separator: &Separator, line: &[u8], out: &mut Vec<u8>) {
        let part = self.select(separator, line);
        let push = |out: &mut Vec<u8>| match (self.numeric, self.fold) {
            (true, _) => order::push_number(part, out),
            (false, true) => order::push_text(&part.to_ascii_uppercase(), out),
            (false, false) => order::push_text(part, out),
        };
        if self.reverse { order::descending(out, push) } else { push(out) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn select<'a>(key: &str, separator: &Separator, line: &'a str) -> &'a str {
        std::str::from_utf8(KeySpec::parse(key).unwrap().select(separator, line.as_bytes())).unwrap()
    }

    #[test]
    fn keys_name_parts_of_lines() {
        let tab = Separator::Byte(b'\t');
        let line = "alpha\tbeta\tgamma";
        for (key, part) in [
            ("1", line),
            ("2", "beta\tgamma"),
            ("2,2", "beta"),
            ("-k1,1", "alpha"),
            ("1,2", "alpha\tbeta"),
            ("2.2,2.3", "et"),
            ("2.2,2", "eta"),
            ("4,4", ""),
            ("3,9", "gamma"),
            ("3,1", ""),
            ("1.9,1", ""),
            ("3nr,3", "gamma"),
        ] {
            assert_eq!(select(key, &tab, line), part, "{key}");
        }
        let line = "  one  two three";
        for (key, part) in [("1,1", "  one"), ("2,2", "  two"), ("2b,2", "two"), ("3", " three"), ("2.3,2", "two")] {
            assert_eq!(select(key, &Separator::Blanks, line), part, "{key}");
        }
        let text = Separator::new("::").unwrap();
        assert_eq!((select("2,2", &text, "a::b::c"), text.count(b"a::b::c")), ("b", 3));
        assert_eq!((tab.count(b""), tab.count(b"\t"), Separator::Blanks.count(b" a b ")), (1, 2, 3));
    }

    #[test]
    fn bad_keys_are_refused() {
        for key in ["", "0", "x", "1,0", "1,", "1.0", "1x", "-1", "99999999999999999999"] {
            let error = KeySpec::parse(key).unwrap_err();
            assert!(error.message().contains(&format!("{key:?}")), "{error}");
        }
        assert!(Separator::new("").is_err() && Separator::new("\n").is_err());
    }

    #[test]
    fn options_come_with_a_key_or_for_all() {
        let keys = KeySpec::parse_all("-k1,1 -k2,2nr").unwrap();
        assert_eq!((keys.len(), keys[0].numeric, keys[1].numeric, keys[1].reverse), (2, false, true, true));
        let keys = KeySpec::parse_all("-n -k1,1 -k2,2r").unwrap();
        assert_eq!((keys[0].numeric, keys[1].numeric), (true, false));
        assert!(KeySpec::parse_all("-nr").unwrap()[0].reverse);
        let mut out = Vec::new();
        KeySpec::parse("1,1f").unwrap().encode(&Separator::Blanks, b"aB c", &mut out);
        assert_eq!(out, b"AB\0\0");
    }
}

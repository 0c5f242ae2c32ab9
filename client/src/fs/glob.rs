//! Globs as HDFS has them, over each component of a path.
//!
//! `*` any characters, `?` one, `[a-z]` one of a set, `[^a]` or `[!a]` one that is not, `{a,b}` alternatives (which may nest and may hold `/`),
//! `\` before a character that means itself. A dot at the start is a character like any other.

use std::collections::BTreeMap;

use cairn_proto::path::{join, normalize, split_last};
use cairn_proto::{Error, ErrorCode, Result};

use super::{FileKind, FileStatus, FileSystem};

/// A pattern may stand for so many alternatives, no more.
const MAX_ALTERNATIVES: usize = 4_096;
/// Bytes of all that a pattern stands for: it is held in memory at once.
const MAX_EXPANDED_BYTES: usize = 8 << 20;
/// Longest pattern.
const MAX_PATTERN_BYTES: usize = 2 * cairn_proto::path::MAX_PATH_BYTES;

/// One component without alternatives.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Component {
    tokens: Vec<Token>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Token {
    Literal(char),
    Any,
    One,
    Set { negated: bool, ranges: Vec<(char, char)> },
}

fn invalid(pattern: &str, why: &str) -> Error {
    Error::new(ErrorCode::InvalidPath, format!("invalid pattern {pattern:?}: {why}")).with_subject(pattern)
}

impl Component {
    fn parse(pattern: &str, text: &str) -> Result<Self> {
        let mut tokens = Vec::new();
        let mut chars = text.chars();
        while let Some(c) = chars.next() {
            tokens.push(match c {
                '*' if tokens.last() == Some(&Token::Any) => continue,
                '*' => Token::Any,
                '?' => Token::One,
                '[' => parse_set(pattern, &mut chars)?,
                '\\' => Token::Literal(chars.next().ok_or_else(|| invalid(pattern, "it ends with a backslash"))?),
                other => Token::Literal(other),
            });
        }
        Ok(Self { tokens })
    }

    /// The name itself, if there is no wildcard in it.
    fn literal(&self) -> Option<String> {
        self.tokens
            .iter()
            .map(|token| match token {
                Token::Literal(c) => Some(*c),
                _ => None,
            })
            .collect()
    }

    /// Goes back to the last `*` only, which is enough for a match of the whole name.
    fn matches(&self, name: &str) -> bool {
        let chars: Vec<char> = name.chars().collect();
        let (mut at, mut token) = (0, 0);
        let mut star: Option<(usize, usize)> = None;
        while at < chars.len() {
            match self.tokens.get(token) {
                Some(Token::Any) => {
                    star = Some((token, at));
                    token += 1;
                }
                Some(one) if one.accepts(chars[at]) => {
                    token += 1;
                    at += 1;
                }
                _ => {
                    let Some((any, from)) = star else { return false };
                    star = Some((any, from + 1));
                    token = any + 1;
                    at = from + 1;
                }
            }
        }
        self.tokens[token..].iter().all(|rest| *rest == Token::Any)
    }
}

impl Token {
    fn accepts(&self, c: char) -> bool {
        match self {
            Self::Literal(own) => *own == c,
            Self::One => true,
            Self::Any => false,
            Self::Set { negated, ranges } => ranges.iter().any(|(from, to)| (*from..=*to).contains(&c)) != *negated,
        }
    }
}

fn parse_set(pattern: &str, chars: &mut std::str::Chars<'_>) -> Result<Token> {
    let unclosed = || invalid(pattern, "a '[' is not closed");
    let mut next = chars.next().ok_or_else(unclosed)?;
    let negated = matches!(next, '^' | '!');
    if negated {
        next = chars.next().ok_or_else(unclosed)?;
    }
    let mut ranges: Vec<(char, char)> = Vec::new();
    let mut open_range = false;
    loop {
        let escaped = next == '\\';
        if escaped {
            next = chars.next().ok_or_else(unclosed)?;
        }
        match next {
            ']' if !escaped && (open_range || !ranges.is_empty()) => break,
            '-' if !escaped && !open_range && !ranges.is_empty() => open_range = true,
            c if open_range => {
                let from = ranges.pop().map_or(c, |(from, _)| from);
                if from > c {
                    return Err(invalid(pattern, "a range in '[]' runs backwards"));
                }
                ranges.push((from, c));
                open_range = false;
            }
            c => ranges.push((c, c)),
        }
        next = chars.next().ok_or_else(unclosed)?;
    }
    if open_range {
        ranges.push(('-', '-'));
    }
    Ok(Token::Set { negated, ranges })
}

/// Replaces the first group of alternatives by each of them, until there is none.
fn expand_braces(pattern: &str) -> Result<Vec<String>> {
    if pattern.len() > MAX_PATTERN_BYTES {
        let shown: String = pattern.chars().take(120).collect();
        return Err(invalid(&shown, &format!("{} bytes are more than {MAX_PATTERN_BYTES}", pattern.len())));
    }
    let mut done = Vec::new();
    let mut open = vec![pattern.to_owned()];
    let mut held = pattern.len();
    while let Some(text) = open.pop() {
        match first_group(pattern, &text)? {
            None => done.push(text),
            Some((from, to, alternatives)) => {
                if done.len() + open.len() + alternatives.len() > MAX_ALTERNATIVES {
                    return Err(invalid(pattern, &format!("it stands for more than {MAX_ALTERNATIVES} alternatives")));
                }
                let around = text.len() - (to - from);
                held -= text.len();
                held += alternatives.iter().map(|one| around + one.len()).sum::<usize>();
                if held > MAX_EXPANDED_BYTES {
                    let shown: String = pattern.chars().take(120).collect();
                    let why = format!("its alternatives take more than {MAX_EXPANDED_BYTES} bytes together");
                    return Err(invalid(&shown, &why));
                }
                let expanded = alternatives.iter().map(|one| format!("{}{one}{}", &text[..from], &text[to..]));
                open.extend(expanded);
            }
        }
    }
    Ok(done)
}

/// Where the first `{...}` starts and ends, and what stands between its commas.
fn first_group(pattern: &str, text: &str) -> Result<Option<(usize, usize, Vec<String>)>> {
    let (mut depth, mut start, mut escaped, mut in_set) = (0_usize, 0, false, false);
    let mut alternatives = vec![String::new()];
    for (at, c) in text.char_indices() {
        let special = !escaped && !in_set;
        if depth == 1 && special && (c == ',' || c == '}') {
            if c == '}' {
                return Ok(Some((start, at + 1, alternatives)));
            }
            alternatives.push(String::new());
            continue;
        }
        if depth > 0
            && let Some(last) = alternatives.last_mut()
        {
            last.push(c);
        }
        match c {
            '{' if special => {
                depth += 1;
                if depth == 1 {
                    start = at;
                }
            }
            '}' if special && depth > 0 => depth -= 1,
            '[' if special => in_set = true,
            ']' if !escaped => in_set = false,
            _ => {}
        }
        escaped = c == '\\' && !escaped;
    }
    if depth > 0 { Err(invalid(pattern, "a '{' is not closed")) } else { Ok(None) }
}

fn components_of(pattern: &str, text: &str) -> Result<Vec<Component>> {
    if !text.starts_with('/') {
        return Err(invalid(pattern, "it must start with '/'"));
    }
    let parts = text.split('/').filter(|part| !part.is_empty());
    parts.map(|part| Component::parse(pattern, part)).collect()
}

/// Whether a component of an alternative of `pattern` matches `name`. For fuzzing.
pub fn matches(pattern: &str, name: &str) -> Result<bool> {
    for text in expand_braces(pattern)? {
        if components_of(pattern, &text)?.iter().any(|part| part.matches(name)) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Finds what matches `pattern`.
pub(super) async fn expand(fs: &FileSystem, pattern: &str) -> Result<Vec<FileStatus>> {
    let mut found = BTreeMap::new();
    for text in expand_braces(pattern)? {
        let components = components_of(pattern, &text)?;
        expand_one(fs, &components, &mut found).await?;
    }
    Ok(found.into_values().collect())
}

async fn expand_one(fs: &FileSystem, parts: &[Component], found: &mut BTreeMap<Vec<u8>, FileStatus>) -> Result<()> {
    // Directories whose entries must match `parts[depth..]`; literal components are appended without looking.
    let mut open: Vec<(String, usize)> = vec![("/".into(), 0)];
    while let Some((mut path, mut depth)) = open.pop() {
        while let Some(name) = parts.get(depth).and_then(Component::literal) {
            path = join(&path, &name);
            depth += 1;
        }
        let Some(part) = parts.get(depth) else {
            if let Some(status) = fs.find(&normalize(&path)?).await? {
                found.insert(status.path.as_bytes().to_vec(), status);
            }
            continue;
        };
        let is_last = depth + 1 == parts.len();
        for entry in matching(fs, &path, part).await? {
            if is_last {
                found.insert(entry.path.as_bytes().to_vec(), entry);
            } else if entry.kind() == FileKind::Directory {
                open.push((entry.path, depth + 1));
            }
        }
    }
    Ok(())
}

/// The entries of the directory `path` that match; none if it is no directory.
async fn matching(fs: &FileSystem, path: &str, part: &Component) -> Result<Vec<FileStatus>> {
    let mut matches = Vec::new();
    let mut pages = fs.list(path)?;
    loop {
        let page = match pages.next().await {
            Ok(Some(page)) => page,
            Ok(None) => return Ok(matches),
            Err(error) if matches!(error.code(), ErrorCode::FileNotFound | ErrorCode::NotADirectory) => {
                return Ok(matches);
            }
            Err(error) if error.code() == ErrorCode::ParentNotDirectory => return Ok(matches),
            Err(error) => return Err(error),
        };
        // A file lists as itself: it has no entries that could match.
        let below = |entry: &FileStatus| split_last(&entry.path).is_some_and(|(parent, _)| parent == path);
        let name_matches = |entry: &FileStatus| split_last(&entry.path).is_some_and(|(_, name)| part.matches(name));
        matches.extend(page.into_iter().filter(|entry| below(entry) && name_matches(entry)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(pattern: &str, name: &str) -> bool {
        let pattern = pattern.to_owned();
        expand_braces(&pattern).unwrap().iter().any(|one| Component::parse(&pattern, one).unwrap().matches(name))
    }

    #[test]
    fn wildcards_match_as_in_hdfs() {
        for (pattern, yes, no) in [
            ("*", "anything", "\u{0}never-used/"),
            ("*.gz", "a.gz", "a.gz2"),
            ("2026-*", "2026-01", "2025-01"),
            ("?", "é", "ab"),
            ("a*b*c", "a-b-b-c", "a-c-b"),
            ("[a-c]x", "bx", "dx"),
            ("[^a-c]x", "dx", "bx"),
            ("[!a]", "b", "a"),
            ("[a-]", "-", "b"),
            ("{a,bc}d", "bcd", "bd"),
            ("{a,{b,c}d}e", "cde", "ce"),
            ("part-{00[0-4]*,x}", "part-0031", "part-0051"),
            ("\\*", "*", "a"),
            ("\\{a,b\\}", "{a,b}", "a"),
            ("a[]]b", "a]b", "ab"),
            ("", "", "a"),
        ] {
            assert!(matches(pattern, yes), "{pattern:?} must match {yes:?}");
            if pattern != "*" {
                assert!(!matches(pattern, no), "{pattern:?} must not match {no:?}");
            }
        }
    }

    #[test]
    fn malformed_patterns_say_why() {
        for (pattern, why) in
            [("/a[b", "'['"), ("/a{b", "'{'"), ("/a\\", "backslash"), ("/[z-a]", "backwards"), ("a*", "start with")]
        {
            let error = expand_braces(pattern)
                .and_then(|all| all.iter().map(|one| components_of(pattern, one)).collect::<Result<Vec<_>>>())
                .unwrap_err();
            assert!(error.message().contains(why), "{pattern:?} said {error}");
        }
        assert!(expand_braces(&"{a,b}".repeat(20)).is_err(), "a million alternatives");
        let few_but_long = format!("/{}{}", "{a,b}".repeat(11), "x".repeat(MAX_PATTERN_BYTES - 100));
        let error = expand_braces(&few_but_long).unwrap_err();
        assert!(error.message().contains("together") && error.message().len() < 500, "{error}");
    }

    #[test]
    fn literals_are_not_listed() {
        let parts = components_of("/a/b\\*/c*", "/a/b\\*/c*").unwrap();
        let literals: Vec<_> = parts.iter().map(Component::literal).collect();
        assert_eq!(literals, [Some("a".into()), Some("b*".into()), None]);
    }

    proptest::proptest! {
        #[test]
        fn a_name_escaped_matches_itself_and_nothing_panics(name in "[a-z*?\\[\\]{},\\\\^!-]{0,12}", other in ".{0,12}") {
            let escaped: String = name.chars().flat_map(|c| ['\\', c]).collect();
            proptest::prop_assert!(matches(&escaped, &name));
            if let Ok(all) = expand_braces(&other) {
                for one in all {
                    let _ = Component::parse(&other, &one).map(|component| component.matches(&name));
                }
            }
        }
    }
}

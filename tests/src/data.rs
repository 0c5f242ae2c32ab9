//! Test data: the same seed gives the same bytes on every machine.

use std::fmt::Write as _;
use std::path::Path;

use sha2::{Digest, Sha256};

/// A small generator (SplitMix64).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// From a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.number() % n.max(1)
    }
}

/// Incompressible bytes.
pub fn random(seed: u64, length: usize) -> Vec<u8> {
    let mut random = Random::new(seed);
    let mut out = Vec::with_capacity(length + 8);
    while out.len() < length {
        out.extend_from_slice(&random.number().to_le_bytes());
    }
    out.truncate(length);
    out
}

/// A word by its rank: short for frequent ones, as in a language.
fn word(rank: u64) -> String {
    const ONSETS: [&str; 16] = ["b", "st", "d", "f", "g", "k", "l", "m", "n", "pr", "r", "s", "t", "v", "w", "th"];
    const VOWELS: [&str; 8] = ["a", "e", "i", "o", "u", "ea", "ou", "y"];
    let mut rest = rank;
    let mut word = String::new();
    loop {
        word.push_str(ONSETS[(rest % 16) as usize]);
        word.push_str(VOWELS[(rest / 16 % 8) as usize]);
        rest /= 128;
        if rest == 0 {
            return word;
        }
        rest -= 1;
    }
}

/// Text of about `length` bytes (never fewer) with `vocabulary` different words, frequent ones as frequent as in a language (Zipf), in lines,
/// with capitals, punctuation, tabs, empty lines, words beyond ASCII, and some bytes that are no UTF-8. It does not end with a newline.
pub fn text(seed: u64, length: usize, vocabulary: u64) -> Vec<u8> {
    let mut random = Random::new(seed);
    let mut out = Vec::with_capacity(length + 256);
    let mut line = String::new();
    while out.len() < length {
        line.clear();
        for k in 0..random.below(14) {
            if k > 0 {
                line.push(if random.below(40) == 0 { '\t' } else { ' ' });
            }
            // The inverse of a distribution whose density falls with the rank: rank = vocabulary ^ u - 1.
            let u = random.below(1 << 32) as f64 / (1u64 << 32) as f64;
            let rank = (vocabulary as f64).powf(u) as u64 - 1;
            let text = word(rank);
            match random.below(50) {
                0 => line.push_str(&text.to_uppercase()),
                1 => drop(write!(line, "{text},")),
                2 => drop(write!(line, "{text}é")),
                3 => drop(write!(line, "{}{}", &text[..1].to_uppercase(), &text[1..])),
                _ => line.push_str(&text),
            }
        }
        out.extend_from_slice(line.as_bytes());
        if random.below(500) == 0 {
            out.extend_from_slice(b" \xff\xfe");
        }
        out.extend_from_slice(if random.below(200) == 0 { b"\r\n" } else { b"\n" });
    }
    out.extend_from_slice(b"the End");
    out
}

/// SHA-256 in hex.
pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// SHA-256 of a file in hex.
pub fn sha256_file(path: &Path) -> String {
    let mut hasher = Sha256::new();
    let mut file = std::fs::File::open(path).unwrap();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match std::io::Read::read(&mut file, &mut buffer).unwrap() {
            0 => return hex(&hasher.finalize()),
            n => hasher.update(&buffer[..n]),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut out, byte| {
        let _ = write!(out, "{byte:02x}");
        out
    })
}

/// Counts words as a Unix pipeline does: `tr` to lower case and one word a line, `sort`, `uniq -c`; sorted `word<TAB>count` lines.
pub fn word_count_by_pipeline(path: &Path) -> Vec<u8> {
    let script = r#"set -o pipefail; tr 'A-Z' 'a-z' < "$1" | tr -s ' \t\n\v\f\r' '\n' | grep -av '^$' | sort | uniq -c | sed -E 's/^ *([0-9]+) (.*)$/\2\t\1/' | sort"#;
    let output = std::process::Command::new("bash")
        .args(["-c", script, "pipeline"])
        .arg(path)
        .env("LC_ALL", "C")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// Lines sorted by their bytes.
pub fn sorted_lines(bytes: &[u8]) -> Vec<u8> {
    let mut lines: Vec<&[u8]> = bytes.split_inclusive(|byte| *byte == b'\n').collect();
    lines.sort_unstable();
    lines.concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn same_seed_same_data() {
        assert_eq!(random(7, 1_001), random(7, 1_001));
        assert_ne!(random(7, 100), random(8, 100));
        assert_eq!(text(7, 10_000, 500), text(7, 10_000, 500));
    }

    #[test]
    fn the_pipeline_counts_words() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"b A\ta\r\n\n\xff a\x0bb-\x0cE\xc3\xa9").unwrap();
        let counted = word_count_by_pipeline(file.path());
        assert_eq!(counted, b"a\t3\nb\t1\nb-\t1\ne\xc3\xa9\t1\n\xff\t1\n");
    }
}

//! Encodings of parts of a key that order like the parts.
//!
//! Keys are compared by their bytes, always. A part with another order (a number in decimal digits, a text from its end to its start) gets
//! an encoding whose bytes compare as the parts do. Each encoding ends itself: parts can follow one another, and no part is the start of
//! another one, so that the complement of the bytes is the reverse of the order.

/// Ends a text. It compares below every byte of a text, since a NUL in a text is followed by [`ESCAPED`].
const END: [u8; 2] = [0, 0];
const ESCAPED: u8 = 0xff;
const ZERO: u8 = 0x80;
const POSITIVE: u8 = 0x81;
const NEGATIVE: u8 = 0x7f;

/// Appends a text that orders by its bytes.
pub fn push_text(text: &[u8], out: &mut Vec<u8>) {
    let mut rest = text;
    while let Some(at) = memchr::memchr(0, rest) {
        out.extend_from_slice(&rest[..=at]);
        out.push(ESCAPED);
        rest = &rest[at + 1..];
    }
    out.extend_from_slice(rest);
    out.extend_from_slice(&END);
}

/// Length of the encoded text at the start of `bytes`; `None` if it does not end.
pub fn text_len(bytes: &[u8]) -> Option<usize> {
    let mut from = 0;
    loop {
        let at = from + memchr::memchr(0, bytes.get(from..)?)?;
        match bytes.get(at + 1)? {
            0 => return Some(at + 2),
            _ => from = at + 2,
        }
    }
}

/// Appends the number at the start of `text`: blanks, a minus sign, digits with a point among them. What is no number counts as 0, as it
/// does for `sort -n`. There is no limit on the number of digits.
pub fn push_number(text: &[u8], out: &mut Vec<u8>) {
    let start = text.iter().position(|byte| *byte != b' ' && *byte != b'\t').unwrap_or(text.len());
    let (negative, digits) = match text[start..].strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, &text[start..]),
    };
    let end = |digits: &[u8]| digits.iter().position(|byte| !byte.is_ascii_digit()).unwrap_or(digits.len());
    let (whole, rest) = digits.split_at(end(digits));
    let fraction = rest.strip_prefix(b".").map_or(&b""[..], |rest| &rest[..end(rest)]);
    let whole = &whole[whole.iter().position(|digit| *digit != b'0').unwrap_or(whole.len())..];
    let fraction = &fraction[..fraction.iter().rposition(|digit| *digit != b'0').map_or(0, |at| at + 1)];
    if whole.is_empty() && fraction.is_empty() {
        return out.push(ZERO);
    }
    out.push(if negative { NEGATIVE } else { POSITIVE });
    let at = out.len();
    // More digits before the point, larger number.
    match u8::try_from(whole.len()) {
        Ok(count) if count < u8::MAX => out.push(count),
        _ => {
            out.push(0xff);
            out.extend_from_slice(&(whole.len() as u64).to_be_bytes());
        }
    }
    out.extend_from_slice(whole);
    out.extend_from_slice(fraction);
    out.push(0);
    if negative {
        complement(&mut out[at..]);
    }
}

/// Turns the order of what `part` appends around.
pub fn descending(out: &mut Vec<u8>, part: impl FnOnce(&mut Vec<u8>)) {
    let at = out.len();
    part(out);
    complement(&mut out[at..]);
}

fn complement(bytes: &mut [u8]) {
    for byte in bytes {
        *byte = !*byte;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn text(text: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        push_text(text, &mut out);
        out
    }

    fn number(text: &str) -> Vec<u8> {
        let mut out = Vec::new();
        push_number(text.as_bytes(), &mut out);
        out
    }

    #[test]
    fn numbers_order_by_value() {
        let ascending = [
            "-100000000000000000000000000",
            "-12.5",
            "-12",
            "-3",
            "-0.5",
            "-0.25",
            "0",
            "0.001",
            ".25",
            "0.5",
            "1",
            "1.01",
            "9",
            "10",
            "99.999",
            "100",
            "123456789012345678901234567890",
        ];
        for pair in ascending.windows(2) {
            assert!(number(pair[0]) < number(pair[1]), "{pair:?}");
        }
        for same in [["0", "-0"], ["007", "7"], ["1.50", "1.5"], [" \t3", "3"], ["", "x"], ["12abc", "12"], ["-", "0"]]
        {
            assert_eq!(number(same[0]), number(same[1]), "{same:?}");
        }
        let many = "9".repeat(300);
        assert!(number(&many[1..]) < number(&many) && number(&format!("-{many}")) < number("-1"));
    }

    proptest! {
        #[test]
        fn texts_order_by_bytes_whatever_follows(
            a in prop::collection::vec(prop::sample::select(vec![0u8, 1, b'a', 0xfe, 0xff]), 0..6),
            b in prop::collection::vec(prop::sample::select(vec![0u8, 1, b'a', 0xfe, 0xff]), 0..6),
            tails in any::<[u8; 2]>(),
        ) {
            let (mut x, mut y) = (text(&a), text(&b));
            prop_assert_eq!(text_len(&x), Some(x.len()));
            x.push(tails[0]);
            y.push(tails[1]);
            let order = a.cmp(&b);
            prop_assert_eq!(x.cmp(&y), order.then(tails[0].cmp(&tails[1])));
            prop_assert_eq!(text_len(&x), Some(x.len() - 1));
            let (mut x, mut y) = (Vec::new(), Vec::new());
            descending(&mut x, |out| push_text(&a, out));
            descending(&mut y, |out| push_text(&b, out));
            prop_assert_eq!(x.cmp(&y), order.reverse());
        }

        #[test]
        fn integers_order_by_value(a in any::<i64>(), b in -1000i64..1000) {
            prop_assert_eq!(number(&a.to_string()).cmp(&number(&b.to_string())), a.cmp(&b));
            prop_assert_eq!(number(&(a / 1000).to_string()).cmp(&number(&b.to_string())), (a / 1000).cmp(&b));
        }
    }
}

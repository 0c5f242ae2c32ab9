//! The name of an entry: inline where it is short, so that most inodes own no heap and a comparison misses no cache line.

use std::ops::Deref;

/// Longest inline name, bytes.
const INLINE: usize = 22;

/// A name; see the module.
#[derive(Clone)]
pub struct Name(Form);

#[derive(Clone)]
enum Form {
    Inline(u8, [u8; INLINE]),
    Heap(Box<str>),
}

impl From<&str> for Name {
    fn from(text: &str) -> Self {
        let bytes = text.as_bytes();
        if bytes.len() > INLINE {
            return Self(Form::Heap(text.into()));
        }
        let mut inline = [0; INLINE];
        inline[..bytes.len()].copy_from_slice(bytes);
        Self(Form::Inline(bytes.len() as u8, inline))
    }
}

impl Name {
    /// Its bytes.
    #[inline]
    pub fn as_bytes(&self) -> &[u8] {
        match &self.0 {
            Form::Inline(length, bytes) => &bytes[..usize::from(*length)],
            Form::Heap(text) => text.as_bytes(),
        }
    }
}

impl Deref for Name {
    type Target = str;

    #[inline]
    fn deref(&self) -> &str {
        // It was made of a text, so it is one.
        std::str::from_utf8(self.as_bytes()).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_and_long_names_are_what_they_were_made_of() {
        assert!(size_of::<Name>() <= 24, "{}", size_of::<Name>());
        for length in [0, 1, 21, 22, 23, 24, 255] {
            let text = "é".repeat(length / 2) + &"x".repeat(length % 2);
            let name = Name::from(&*text);
            assert_eq!((&*name, name.as_bytes(), name.len()), (&*text, text.as_bytes(), length));
        }
    }
}

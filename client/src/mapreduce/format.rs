//! How records lie in files, in and out.

use super::Compression;

/// What the records of a job's input are. Files whose names end in `.gz`, `.bz2` or `.zst` are decompressed first.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum InputFormat {
    /// Lines, without their line feed.
    #[default]
    Lines,
    /// Words between ASCII white space.
    Words,
    /// Lines with a key before the first `separator`; without one the whole line is the key.
    KeyValueText {
        /// Byte between key and value.
        separator: u8,
    },
    /// So many bytes each. A file of another length than a multiple of it fails the job.
    Fixed(u32),
    /// Binary keys and values, as [`OutputFormat::KEY_VALUE`] writes them.
    KeyValue,
    /// Each file is one record. It must fit the task's memory.
    WholeFile,
    /// No files: the records are numbers from 0 ([`super::Record::offset`]), shared out to map tasks.
    Generated {
        /// How many records.
        records: u64,
        /// How many map tasks; 0: as many as the cluster has task slots.
        tasks: u32,
    },
}

impl InputFormat {
    /// May a file of that name be cut into several splits?
    pub fn is_splittable(self, path: &str) -> bool {
        !matches!(self, Self::WholeFile) && self.compression(path).is_none()
    }

    /// How all of a file of that name is compressed.
    pub fn compression(self, path: &str) -> Option<Compression> {
        // Binary files know by themselves what of them is compressed.
        if self == Self::KeyValue { None } else { Compression::of(path) }
    }

    /// Is a file without bytes a record?
    pub fn takes_empty_files(self) -> bool {
        matches!(self, Self::WholeFile)
    }
}

/// How a record of the output is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Layout {
    /// Key, separator, value, line feed.
    Text {
        /// Byte between key and value.
        separator: u8,
    },
    /// The bytes of key and value and nothing else.
    Raw,
    /// The binary container that [`InputFormat::KeyValue`] reads; it is compressed in itself.
    KeyValue,
}

/// What the files of a job's output look like.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OutputFormat {
    /// How a record is written.
    pub layout: Layout,
    /// How the files are compressed; their names tell.
    pub compression: Option<Compression>,
}

impl OutputFormat {
    /// Lines of key, tab, value.
    pub const TEXT: Self = Self { layout: Layout::Text { separator: b'\t' }, compression: None };
    /// Keys and values as they are.
    pub const RAW: Self = Self { layout: Layout::Raw, compression: None };
    /// Binary keys and values, for another job to read.
    pub const KEY_VALUE: Self = Self { layout: Layout::KeyValue, compression: None };

    /// The same, compressed.
    #[must_use]
    pub fn compressed(self, kind: Compression) -> Self {
        Self { compression: Some(kind), ..self }
    }

    /// What is added to the names of the files.
    pub fn extension(self) -> &'static str {
        self.compression.map_or("", Compression::extension)
    }
}

impl Default for OutputFormat {
    fn default() -> Self {
        Self::TEXT
    }
}

/// May a program name one of its outputs so? The name becomes the start of file names.
pub(crate) fn is_output_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    let usable = (1..=64).contains(&name.len()) && name.bytes().all(plain) && !name.starts_with('_');
    usable && name != super::output::MAIN
}

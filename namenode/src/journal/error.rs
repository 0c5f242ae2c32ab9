//! What can be wrong with the files of a metadata directory.

use std::io;
use std::path::{Path, PathBuf};

use cairn_proto::{Error, ErrorCode};

/// A failure to read or write the log or an image.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The operating system said no.
    #[error("cannot {doing} {}: {source}", path.display())]
    Io {
        /// What was tried, as a verb.
        doing: &'static str,
        /// On which file.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// Bytes are not what was written.
    #[error("{}, offset {offset}: {what}; {way_out}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where in it, bytes.
        offset: u64,
        /// What does not hold.
        what: String,
        /// What a person can do.
        way_out: &'static str,
    },
    /// The file was written by a newer release.
    #[error("{} has format version {found}, this program reads up to {known}: run a newer release", path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u16,
        /// Ours.
        known: u16,
    },
    /// The file belongs to another cluster.
    #[error("{} belongs to cluster {found}, this directory to {expected}", path.display())]
    OtherCluster {
        /// The file.
        path: PathBuf,
        /// Cluster in the file.
        found: String,
        /// Cluster of the directory.
        expected: String,
    },
    /// An archive holds another future under the same name.
    #[error(
        "{} holds other transactions than this log: it was written by a cluster with the same epoch that went on by itself; give \
         another folder (--archive)",
        path.display()
    )]
    OtherFuture {
        /// The archived segment.
        path: PathBuf,
    },
    /// A piece of the log is absent.
    #[error("{}: transactions {from} to {to} are missing from the log; {way_out}", path.display())]
    Gap {
        /// The log's folder.
        path: PathBuf,
        /// First missing transaction.
        from: u64,
        /// Last missing transaction.
        to: u64,
        /// What a person can do.
        way_out: &'static str,
    },
    /// No metadata directory works any more.
    #[error("no metadata directory is left: {0}")]
    NoneLeft(Box<LogError>),
    /// A transaction is too large to be read back.
    #[error("transaction {txid} has {bytes} bytes, more than {limit}")]
    TooLarge {
        /// Its number.
        txid: u64,
        /// Its size.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
    /// What reads the log refused a transaction.
    #[error("{}, offset {offset}, transaction {txid}: {what}; {way_out}", path.display())]
    Refused {
        /// The file.
        path: PathBuf,
        /// Where the record starts.
        offset: u64,
        /// The transaction.
        txid: u64,
        /// What does not hold.
        what: String,
        /// What a person can do.
        way_out: &'static str,
    },
}

/// The way out of damage in the log.
pub(crate) const RESTORE_LOG: &str =
    "start with another metadata directory (--dir), or restore from a backup (--restore)";
/// The way out of damage in an image.
pub(crate) const RESTORE_IMAGE: &str = "put back an older image with the log since, start with another metadata directory, or restore from a backup (--restore)";

/// The way out of damage in a backup.
const RESTORE_BACKUP: &str = "give another backup (--restore)";

impl LogError {
    pub(crate) fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { doing, path, source }
    }

    pub(crate) fn damaged(path: &Path, offset: u64, what: impl Into<String>) -> Self {
        Self::Damaged { path: path.to_owned(), offset, what: what.into(), way_out: RESTORE_LOG }
    }

    pub(crate) fn damaged_image(path: &Path, offset: u64, what: impl Into<String>) -> Self {
        Self::Damaged { path: path.to_owned(), offset, what: what.into(), way_out: RESTORE_IMAGE }
    }

    pub(crate) fn damaged_backup(path: &Path, what: impl Into<String>) -> Self {
        Self::Damaged { path: path.to_owned(), offset: 0, what: what.into(), way_out: RESTORE_BACKUP }
    }

    fn path(&self) -> Option<&Path> {
        match self {
            Self::Io { path, .. }
            | Self::Damaged { path, .. }
            | Self::Newer { path, .. }
            | Self::OtherCluster { path, .. }
            | Self::OtherFuture { path }
            | Self::Gap { path, .. }
            | Self::Refused { path, .. } => Some(path),
            Self::NoneLeft(inner) => inner.path(),
            Self::TooLarge { .. } => None,
        }
    }
}

impl LogError {
    /// As it crosses a boundary between processes.
    pub fn to_error(&self) -> Error {
        let code = match self {
            Self::Io { source, .. } => Error::io("", source).code(),
            Self::Damaged { .. } | Self::Gap { .. } | Self::Refused { .. } => ErrorCode::Corrupt,
            Self::Newer { .. } => ErrorCode::UnsupportedVersion,
            Self::OtherCluster { .. } => ErrorCode::WrongCluster,
            Self::OtherFuture { .. } => ErrorCode::StaleEpoch,
            Self::NoneLeft(_) => ErrorCode::Io,
            Self::TooLarge { .. } => ErrorCode::Internal,
        };
        let subject = self.path().map(|path| path.display().to_string()).unwrap_or_default();
        Error::new(code, self.to_string()).with_subject(subject)
    }
}

impl From<LogError> for Error {
    fn from(error: LogError) -> Self {
        error.to_error()
    }
}

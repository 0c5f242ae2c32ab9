//! The typed error that crosses every wire of Cairn.
//!
//! An [`Error`] has a code (what happened), a message of one line for people (names the thing and the way out), and a
//! subject (the path, block, node or key). The code decides the [`ErrorKind`], which tells the caller what to do, the gRPC
//! code, the Hadoop exception class, and whether a repetition can help. The whole error travels in a binary gRPC detail,
//! so the client gets it back as it was.

use prost::Message as _;

use crate::pb;

/// What happened; one per condition that a caller may want to tell apart.
pub use crate::pb::ErrorCode;

/// Result with Cairn's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What the caller should do about an error.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum ErrorKind {
    /// The thing is not there: give another name.
    NotFound,
    /// The thing is there already: give another name or ask to replace it.
    AlreadyExists,
    /// The request is wrong: change it.
    InvalidArgument,
    /// Ask as somebody else.
    PermissionDenied,
    /// The state forbids it: change the state first.
    Precondition,
    /// Passes by itself: try again after a while.
    Unavailable,
    /// Bytes are damaged: use another copy.
    Corrupt,
    /// A fault of the service: report it.
    Internal,
}

/// Cairn's error; see the module.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    code: ErrorCode,
    message: String,
    subject: String,
}

impl Error {
    /// An error with its code and message.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), subject: String::new() }
    }

    /// Names the path, block, node or key that it is about.
    #[must_use]
    pub fn with_subject(mut self, subject: impl Into<String>) -> Self {
        self.subject = subject.into();
        self
    }

    /// What happened.
    pub fn code(&self) -> ErrorCode {
        self.code
    }

    /// The message for people.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The path, block, node or key; may be empty.
    pub fn subject(&self) -> &str {
        &self.subject
    }

    /// What the caller should do.
    pub fn kind(&self) -> ErrorKind {
        kind_of(self.code)
    }

    /// The one place that decides whether the same request can succeed later without anybody's doing.
    pub fn is_retryable(&self) -> bool {
        self.kind() == ErrorKind::Unavailable
    }

    /// A local I/O error, with what was being done to what.
    pub fn io(doing: impl std::fmt::Display, error: &std::io::Error) -> Self {
        let code = match error.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => ErrorCode::DiskFull,
            std::io::ErrorKind::TimedOut => ErrorCode::TimedOut,
            std::io::ErrorKind::ConnectionRefused
            | std::io::ErrorKind::ConnectionReset
            | std::io::ErrorKind::ConnectionAborted
            | std::io::ErrorKind::BrokenPipe
            | std::io::ErrorKind::HostUnreachable
            | std::io::ErrorKind::NetworkUnreachable
            | std::io::ErrorKind::NotConnected
            | std::io::ErrorKind::UnexpectedEof => ErrorCode::Unreachable,
            _ => ErrorCode::Io,
        };
        Self::new(code, format!("{doing}: {error}"))
    }

    /// As it travels.
    pub fn to_wire(&self) -> pb::WireError {
        pb::WireError { code: self.code as i32, message: self.message.clone(), subject: self.subject.clone() }
    }

    /// As it arrived; an unknown code becomes [`ErrorCode::Internal`].
    pub fn from_wire(wire: pb::WireError) -> Self {
        let code = match ErrorCode::try_from(wire.code) {
            Ok(ErrorCode::Unspecified) | Err(_) => ErrorCode::Internal,
            Ok(code) => code,
        };
        Self { code, message: wire.message, subject: wire.subject }
    }

    /// Encoded as a [`pb::WireError`].
    pub fn to_bytes(&self) -> Vec<u8> {
        self.to_wire().encode_to_vec()
    }

    /// The class by which Hadoop's clients know this condition.
    pub fn hadoop_class(&self) -> &'static str {
        use ErrorCode as C;
        match self.code {
            C::FileNotFound => "java.io.FileNotFoundException",
            C::FileAlreadyExists => "org.apache.hadoop.fs.FileAlreadyExistsException",
            C::ParentNotDirectory | C::NotADirectory => "org.apache.hadoop.fs.ParentNotDirectoryException",
            C::DirectoryNotEmpty => "org.apache.hadoop.fs.PathIsNotEmptyDirectoryException",
            C::InvalidPath => "org.apache.hadoop.fs.InvalidPathException",
            C::InvalidArgument => "org.apache.hadoop.HadoopIllegalArgumentException",
            C::PermissionDenied => "org.apache.hadoop.security.AccessControlException",
            C::LeaseExpired => "org.apache.hadoop.hdfs.server.namenode.LeaseExpiredException",
            C::AlreadyBeingCreated => "org.apache.hadoop.hdfs.protocol.AlreadyBeingCreatedException",
            C::SafeMode => "org.apache.hadoop.hdfs.server.namenode.SafeModeException",
            C::NotReplicatedYet => "org.apache.hadoop.hdfs.server.namenode.NotReplicatedYetException",
            C::QuotaExceeded => "org.apache.hadoop.hdfs.protocol.QuotaExceededException",
            C::Snapshot => "org.apache.hadoop.hdfs.protocol.SnapshotException",
            C::Unsupported => "java.lang.UnsupportedOperationException",
            C::Busy => "org.apache.hadoop.ipc.RetriableException",
            _ => "java.io.IOException",
        }
    }
}

fn kind_of(code: ErrorCode) -> ErrorKind {
    use ErrorCode as C;
    match code {
        C::FileNotFound | C::BlockNotFound => ErrorKind::NotFound,
        C::FileAlreadyExists => ErrorKind::AlreadyExists,
        C::ParentNotDirectory
        | C::NotAFile
        | C::NotADirectory
        | C::InvalidPath
        | C::InvalidArgument
        | C::Unsupported
        | C::UnsupportedVersion => ErrorKind::InvalidArgument,
        C::PermissionDenied => ErrorKind::PermissionDenied,
        C::DirectoryNotEmpty
        | C::LeaseExpired
        | C::AlreadyBeingCreated
        | C::StaleGeneration
        | C::DiskFull
        | C::WrongCluster
        | C::StaleEpoch
        | C::NotRegistered
        | C::QuotaExceeded
        | C::Snapshot
        | C::NoTargets
        | C::JobFailed
        | C::TaskFailed => ErrorKind::Precondition,
        C::SafeMode | C::NotReplicatedYet | C::Busy | C::Unreachable | C::TimedOut => ErrorKind::Unavailable,
        C::Corrupt => ErrorKind::Corrupt,
        C::Io | C::Internal | C::Unspecified => ErrorKind::Internal,
    }
}

#[cfg(feature = "grpc")]
mod grpc {
    use super::{Error, ErrorCode, ErrorKind};
    use crate::pb;
    use prost::Message as _;
    use tonic::metadata::MetadataValue;
    use tonic::{Code, Status};

    /// Key of the binary detail that carries the typed error.
    pub const ERROR_KEY: &str = "cairn-error-bin";

    /// Longest text of an error on gRPC, bytes. Errors travel in HTTP/2 headers, of which a caller takes 16 KiB; the message is there twice, once with
    /// three characters for most bytes that are not ASCII. Beyond the limit the caller would see a broken connection, and try again for ever.
    const MAX_TEXT_BYTES: usize = 2_000;

    fn shortened(text: &str) -> String {
        if text.len() <= MAX_TEXT_BYTES {
            return text.to_owned();
        }
        let end = (0..=MAX_TEXT_BYTES - 3).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        format!("{}…", &text[..end])
    }

    impl From<Error> for Status {
        fn from(error: Error) -> Self {
            let code = match error.kind() {
                ErrorKind::NotFound => Code::NotFound,
                ErrorKind::AlreadyExists => Code::AlreadyExists,
                ErrorKind::InvalidArgument => Code::InvalidArgument,
                ErrorKind::PermissionDenied => Code::PermissionDenied,
                ErrorKind::Precondition => Code::FailedPrecondition,
                ErrorKind::Unavailable => Code::Unavailable,
                ErrorKind::Corrupt => Code::DataLoss,
                ErrorKind::Internal => Code::Internal,
            };
            let error = Error { message: shortened(&error.message), subject: shortened(&error.subject), ..error };
            let mut status = Status::new(code, error.message());
            status.metadata_mut().insert_bin(ERROR_KEY, MetadataValue::from_bytes(&error.to_bytes()));
            status
        }
    }

    impl From<Status> for Error {
        fn from(status: Status) -> Self {
            let typed = status.metadata().get_bin(ERROR_KEY).and_then(|value| value.to_bytes().ok());
            if let Some(wire) = typed.and_then(|bytes| pb::WireError::decode(bytes).ok()) {
                return Self::from_wire(wire);
            }
            let code = match status.code() {
                Code::NotFound => ErrorCode::FileNotFound,
                Code::AlreadyExists => ErrorCode::FileAlreadyExists,
                Code::InvalidArgument | Code::OutOfRange => ErrorCode::InvalidArgument,
                Code::PermissionDenied | Code::Unauthenticated => ErrorCode::PermissionDenied,
                Code::Unimplemented => ErrorCode::Unsupported,
                Code::Unavailable | Code::Cancelled | Code::Aborted => ErrorCode::Unreachable,
                Code::DeadlineExceeded => ErrorCode::TimedOut,
                Code::ResourceExhausted => ErrorCode::Busy,
                Code::DataLoss => ErrorCode::Corrupt,
                _ => ErrorCode::Internal,
            };
            Self::new(code, status.message().to_owned())
        }
    }
}

#[cfg(feature = "grpc")]
pub use grpc::ERROR_KEY;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn survives_the_wire_and_grpc() {
        let error = Error::new(ErrorCode::LeaseExpired, "no lease on /a").with_subject("/a");
        assert_eq!(Error::from_wire(error.to_wire()), error);
        #[cfg(feature = "grpc")]
        assert_eq!(Error::from(tonic::Status::from(error.clone())), error);
    }

    #[test]
    #[cfg(feature = "grpc")]
    fn an_over_long_text_keeps_its_code_and_fits_into_headers() {
        let path = "/é".repeat(2_600);
        let error = Error::new(ErrorCode::LeaseExpired, format!("no lease on {path}")).with_subject(path);
        let status = tonic::Status::from(error);
        let headers = status.clone().into_http::<()>();
        let bytes: usize = headers.headers().iter().map(|(key, value)| key.as_str().len() + value.len() + 32).sum();
        assert!(bytes < 15 << 10, "{bytes}");
        let back = Error::from(status);
        assert_eq!(back.code(), ErrorCode::LeaseExpired);
        assert!(back.message().starts_with("no lease on /é") && back.message().ends_with('…'));
    }

    #[test]
    fn unknown_code_is_internal() {
        let wire = pb::WireError { code: 9_999, message: "x".into(), subject: String::new() };
        assert_eq!(Error::from_wire(wire).code(), ErrorCode::Internal);
    }

    #[test]
    fn only_what_passes_by_itself_is_retried() {
        assert!(Error::new(ErrorCode::SafeMode, "").is_retryable());
        assert!(!Error::new(ErrorCode::FileNotFound, "").is_retryable());
        assert!(!Error::new(ErrorCode::Internal, "").is_retryable());
    }
}

//! Files of a HDFS cluster that is not ours, by its own protocols: for copies from and to it.
//!
//! # Overview
//! [`Hdfs`] is a connection to one namenode. It speaks Hadoop RPC and data transfer through the `hdfs-native` crate, and tells statuses and errors as our own
//! client does. Checksums of packets are verified when data is read, and by the datanodes when it is written; a datanode that fails is passed over.
//!
//! [`block_checksum`] asks a single datanode; the checksum of a file is put together of those.
//!
//! Users are who they say they are; a cluster that demands Kerberos refuses us. If `HADOOP_CONF_DIR` names a configuration, what it says of clients holds.
//!
//! # Cancellation
//! A writer that is dropped leaves its file open; who made it deletes it.

mod checksum;

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::time::Duration;

use bytes::Bytes;
use cairn_common::Env;
use cairn_proto::pb::{FileKind, FileStatus};
use cairn_proto::{Error, ErrorCode, Result};
use futures_util::stream::BoxStream;
use futures_util::{FutureExt as _, StreamExt as _};
use hdfs_native::client::ListStatusIterator;
use hdfs_native::{Client, ClientBuilder, HdfsError, WriteOptions};

pub use checksum::block_checksum;

/// A namenode that does not answer within this time is taken for gone.
const CALL: Duration = Duration::from_secs(120);
/// A time that is left as it is.
const KEEP_TIME: u64 = u64::MAX;
/// A namenode must take a connection within this time.
const CONNECT: Duration = Duration::from_secs(10);
/// What a new pipeline does on a cluster with few nodes: it goes on with those that are left.
const BEST_EFFORT: (&str, &str) = ("dfs.client.block.write.replace-datanode-on-failure.best-effort", "true");

/// A HDFS cluster; cheap to clone.
#[derive(Clone)]
pub struct Hdfs {
    client: Client,
    env: Env,
    address: String,
    user: String,
}

/// How a file is made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Shape {
    /// Replicas; 0: the cluster's default.
    pub replication: u32,
    /// Bytes of a block; 0: the cluster's default.
    pub block_size: u64,
}

/// Everything below a path, that itself first.
pub struct Walk {
    hdfs: Hdfs,
    root: Option<FileStatus>,
    below: Option<ListStatusIterator>,
}

/// A file from its first byte to its last.
pub struct Reader {
    hdfs: Hdfs,
    path: String,
    pieces: BoxStream<'static, hdfs_native::Result<Bytes>>,
}

/// A new file.
pub struct Writer {
    hdfs: Hdfs,
    path: String,
    writer: hdfs_native::file::FileWriter,
    written: u64,
}

impl Hdfs {
    /// The cluster of the namenode at `address` ("HOST:PORT"), in the name of `user`. Fails if nobody listens there: the crate would try for minutes.
    pub async fn connect(env: Env, address: &str, user: &str) -> Result<Self> {
        env.net.connect(address, CONNECT).await?;
        let url = format!("hdfs://{address}");
        let client = ClientBuilder::new().with_url(&url).with_user(user).with_config([BEST_EFFORT]).build();
        let client = client.map_err(|error| told(&url, error))?;
        Ok(Self { client, env, address: address.to_owned(), user: user.to_owned() })
    }

    /// "HOST:PORT" of its namenode.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// What lies at a path, if anything does.
    pub async fn find(&self, path: &str) -> Result<Option<FileStatus>> {
        match self.call(path, self.client.get_file_info(path)).await {
            Ok(status) => Ok(Some(ours(status))),
            Err(error) if error.code() == ErrorCode::FileNotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// What lies at a path.
    pub async fn status(&self, path: &str) -> Result<FileStatus> {
        self.call(path, self.client.get_file_info(path)).await.map(ours)
    }

    /// What matches a pattern.
    pub async fn glob(&self, pattern: &str) -> Result<Vec<FileStatus>> {
        let found = self.call(pattern, self.client.glob_status(pattern)).await?;
        Ok(found.into_iter().map(ours).collect())
    }

    /// What lies at a path and below it.
    pub async fn walk(&self, path: &str) -> Result<Walk> {
        let root = self.status(path).await?;
        let is_directory = root.kind() == FileKind::Directory;
        let below = is_directory.then(|| self.client.list_status_iter(path, true));
        Ok(Walk { hdfs: self.clone(), root: Some(root), below })
    }

    /// Opens a file, from its beginning.
    pub async fn open(&self, path: &str) -> Result<Reader> {
        let reader = self.call(path, self.client.read(path)).await?;
        let pieces = reader.read_range_stream(0, reader.file_length()).boxed();
        Ok(Reader { hdfs: self.clone(), path: path.to_owned(), pieces })
    }

    /// CRC-32C and length of a closed file. Its datanodes tell them if they can (Hadoop 3.1 and later); else the file is read.
    pub async fn checksum(&self, path: &str) -> Result<(u32, u64)> {
        let machine = (&self.env.net, &self.env.clock);
        if let Some(sum) = checksum::file_crc(machine, &self.address, &self.user, path).await? {
            return Ok(sum);
        }
        let mut reader = self.open(path).await?;
        let (mut crc, mut length) = (0, 0);
        while let Some(piece) = reader.next().await? {
            crc = crc32c::crc32c_append(crc, &piece);
            length += piece.len() as u64;
        }
        Ok((crc, length))
    }

    /// Makes a file, in place of one that is there.
    pub async fn create(&self, path: &str, shape: Shape) -> Result<Writer> {
        let options = WriteOptions {
            overwrite: true,
            replication: (shape.replication > 0).then_some(shape.replication),
            block_size: (shape.block_size > 0).then_some(shape.block_size),
            ..WriteOptions::default()
        };
        let writer = self.call(path, self.client.create(path, options)).await?;
        Ok(Writer { hdfs: self.clone(), path: path.to_owned(), writer, written: 0 })
    }

    /// Makes a directory, and those above it.
    pub async fn mkdirs(&self, path: &str, permission: u32) -> Result<()> {
        self.call(path, self.client.mkdirs(path, permission, true)).await
    }

    /// Says whether something was there to be deleted.
    pub async fn delete(&self, path: &str, recursive: bool) -> Result<bool> {
        self.call(path, self.client.delete(path, recursive)).await
    }

    /// Gives a file another path; a file that is there goes.
    pub async fn replace(&self, from: &str, to: &str) -> Result<()> {
        self.call(from, self.client.rename(from, to, true)).await
    }

    /// chmod.
    pub async fn set_permission(&self, path: &str, permission: u32) -> Result<()> {
        self.call(path, self.client.set_permission(path, permission)).await
    }

    /// chown, chgrp.
    pub async fn set_owner(&self, path: &str, owner: Option<&str>, group: Option<&str>) -> Result<()> {
        self.call(path, self.client.set_owner(path, owner, group)).await
    }

    /// touch: milliseconds since 1970.
    pub async fn set_modified(&self, path: &str, modified_ms: u64) -> Result<()> {
        self.call(path, self.client.set_times(path, modified_ms, KEEP_TIME)).await
    }

    /// One exchange with the namenode. The crate panics on names that are no UTF-8: here that is an error like any other.
    async fn call<T>(&self, path: &str, doing: impl Future<Output = hdfs_native::Result<T>>) -> Result<T> {
        let subject = format!("hdfs://{}{path}", self.address);
        match self.env.clock.timeout(CALL, AssertUnwindSafe(doing).catch_unwind()).await {
            Ok(Ok(done)) => done.map_err(|error| told(&subject, error)),
            Ok(Err(_)) => {
                Err(Error::new(ErrorCode::Corrupt, format!("{subject}: the answer cannot be read"))
                    .with_subject(subject))
            }
            Err(elapsed) => Err(Error::new(ErrorCode::TimedOut, format!("{subject}: {elapsed}")).with_subject(subject)),
        }
    }
}

impl Walk {
    /// The next one, parents before what is in them.
    pub async fn next(&mut self) -> Result<Option<FileStatus>> {
        if let Some(root) = self.root.take() {
            return Ok(Some(root));
        }
        let Some(below) = &self.below else { return Ok(None) };
        let next = async { below.next().await.transpose() };
        self.hdfs.call("", next).await.map(|found| found.map(ours))
    }
}

impl Reader {
    /// The next bytes, verified; `None` at the end.
    pub async fn next(&mut self) -> Result<Option<Bytes>> {
        let next = async { self.pieces.next().await.transpose() };
        self.hdfs.call(&self.path, next).await
    }
}

impl Writer {
    /// Adds bytes.
    pub async fn write(&mut self, bytes: Bytes) -> Result<()> {
        let length = bytes.len() as u64;
        self.hdfs.call(&self.path, self.writer.write_bytes(bytes)).await?;
        self.written += length;
        Ok(())
    }

    /// Ends the file when its datanodes hold it; returns its length.
    pub async fn close(mut self) -> Result<u64> {
        self.hdfs.call(&self.path, self.writer.close()).await?;
        Ok(self.written)
    }
}

fn ours(status: hdfs_native::client::FileStatus) -> FileStatus {
    let kind = if status.isdir { FileKind::Directory } else { FileKind::File };
    FileStatus {
        path: status.path,
        kind: kind as i32,
        length: if status.isdir { 0 } else { status.length as u64 },
        replication: status.replication.unwrap_or(0),
        block_size: status.blocksize.unwrap_or(0),
        owner: status.owner,
        group: status.group,
        permission: u32::from(status.permission) & 0o7777,
        modified_ms: status.modification_time,
        accessed_ms: status.access_time,
        ..FileStatus::default()
    }
}

fn told(subject: &str, error: HdfsError) -> Error {
    use HdfsError as E;
    let code = match &error {
        E::FileNotFound(_) => ErrorCode::FileNotFound,
        E::AlreadyExists(_) => ErrorCode::FileAlreadyExists,
        E::InvalidPath(_) => ErrorCode::InvalidPath,
        E::InvalidArgument(_) | E::UrlParseError(_) => ErrorCode::InvalidArgument,
        E::IsADirectoryError(_) => ErrorCode::NotAFile,
        E::ChecksumError => ErrorCode::Corrupt,
        E::BlocksNotFound(_) => ErrorCode::BlockNotFound,
        E::UnsupportedFeature(_) | E::UnsupportedErasureCodingPolicy(_) => ErrorCode::Unsupported,
        E::NoSASLMechanism | E::SASLError(_) | E::GSSAPIError(..) => ErrorCode::PermissionDenied,
        E::IOError(_) => ErrorCode::Unreachable,
        E::RPCError(class, _) | E::FatalRPCError(class, _) => code_of(class),
        _ => ErrorCode::Io,
    };
    let said = match &error {
        // Java's traces follow the first line.
        E::RPCError(_, message) | E::FatalRPCError(_, message) => message.lines().next().unwrap_or_default().to_owned(),
        other => other.to_string(),
    };
    Error::new(code, format!("{subject}: {said}")).with_subject(subject)
}

/// What an exception of a namenode means here.
fn code_of(class: &str) -> ErrorCode {
    match class.rsplit('.').next().unwrap_or(class) {
        "FileNotFoundException" => ErrorCode::FileNotFound,
        "FileAlreadyExistsException" => ErrorCode::FileAlreadyExists,
        "ParentNotDirectoryException" => ErrorCode::NotADirectory,
        "InvalidPathException" => ErrorCode::InvalidPath,
        "AccessControlException" | "AuthorizationException" => ErrorCode::PermissionDenied,
        "SafeModeException" => ErrorCode::SafeMode,
        "QuotaExceededException" | "NSQuotaExceededException" | "DSQuotaExceededException" => ErrorCode::QuotaExceeded,
        "UnsupportedOperationException" => ErrorCode::Unsupported,
        _ => ErrorCode::Io,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exceptions_become_errors_of_ours_in_one_line() {
        let error = |class: &str, message: &str| told("hdfs://h:1/a", E::RPCError(class.into(), message.into()));
        use HdfsError as E;
        let denied =
            error("org.apache.hadoop.security.AccessControlException", "Permission denied: user=ann\n\tat x.y(Z)");
        assert_eq!(denied.code(), ErrorCode::PermissionDenied);
        assert_eq!(denied.message(), "hdfs://h:1/a: Permission denied: user=ann");
        assert_eq!(error("java.io.IOException", "odd").code(), ErrorCode::Io);
        let gone = told("hdfs://h:1/a", E::FileNotFound("/a".into()));
        assert_eq!(gone.code(), ErrorCode::FileNotFound);
    }

    #[tokio::test]
    async fn a_namenode_that_is_not_there_is_named() {
        let error = Hdfs::connect(Env::system(), "127.0.0.1:1", "ann").await.err().unwrap();
        assert!(error.message().contains("127.0.0.1:1"), "{error}");
    }
}

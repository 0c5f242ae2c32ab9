//! The two ends of a copy: clusters of ours, and other HDFS clusters.

use std::fmt;

use bytes::Bytes;
use cairn_proto::{Error, ErrorCode, Result};

use crate::fs::{
    ClientSettings, CreateOptions, FileChecksum, FileReader, FileStatus, FileSystem, FileWriter, RenameMode,
};

/// Port of a HDFS namenode if nobody says another.
const HDFS_PORT: u16 = 8020;

/// Which cluster.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Address {
    /// One of ours: "HOST:PORT" of its namenode.
    Cairn(String),
    /// Any that speaks HDFS's protocols, ours too: "HOST:PORT" of its namenode.
    Hdfs(String),
}

impl Address {
    /// "HOST:PORT", `cairn://HOST:PORT` or `hdfs://HOST[:PORT]`.
    pub fn parse(text: &str) -> Result<Self> {
        let named = |address: &str| matches!(address.rsplit_once(':'), Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok());
        if let Some(address) = text.strip_prefix("hdfs://") {
            let bare = !address.is_empty() && (!address.contains(':') || address.ends_with(']'));
            let address = if bare { format!("{address}:{HDFS_PORT}") } else { address.to_owned() };
            if named(&address) {
                return Ok(Self::Hdfs(address));
            }
        } else {
            let address = text.strip_prefix("cairn://").unwrap_or(text);
            if named(address) {
                return Ok(Self::Cairn(address.to_owned()));
            }
        }
        Err(Error::new(ErrorCode::InvalidArgument, format!("{text:?} names no namenode")))
    }

    /// "HOST:PORT".
    pub fn namenode(&self) -> &str {
        match self {
            Self::Cairn(address) | Self::Hdfs(address) => address,
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cairn(address) => write!(f, "cairn://{address}"),
            Self::Hdfs(address) => write!(f, "hdfs://{address}"),
        }
    }
}

/// A cluster; cheap to clone.
#[derive(Clone)]
pub enum Cluster {
    /// By our own client.
    Cairn(FileSystem),
    /// By HDFS's protocols.
    #[cfg(feature = "hdfs")]
    Hdfs(cairn_hdfs::Hdfs),
}

/// Everything below a path.
pub enum Walk {
    /// Of ours.
    Cairn(Box<crate::fs::Walk>),
    /// Of another.
    #[cfg(feature = "hdfs")]
    Hdfs(Box<cairn_hdfs::Walk>),
}

/// A file that is read.
pub enum Reader {
    /// Of ours.
    Cairn(Box<FileReader>),
    /// Of another.
    #[cfg(feature = "hdfs")]
    Hdfs(Box<cairn_hdfs::Reader>),
}

/// A file that is written.
pub enum Writer {
    /// Of ours.
    Cairn(Box<FileWriter>),
    /// Of another.
    #[cfg(feature = "hdfs")]
    Hdfs(Box<cairn_hdfs::Writer>),
}

/// The same call on either client.
macro_rules! either {
    ($cluster:expr, $fs:ident => $ours:expr, $hdfs:ident => $theirs:expr) => {
        match $cluster {
            Self::Cairn($fs) => $ours,
            #[cfg(feature = "hdfs")]
            Self::Hdfs($hdfs) => $theirs,
        }
    };
}

impl Cluster {
    /// The cluster at `address`, in the name of the user of `fs`.
    pub async fn connect(fs: &FileSystem, address: &Address) -> Result<Self> {
        match address {
            Address::Cairn(namenode) if namenode == fs.namenode_address() => Ok(Self::Cairn(fs.clone())),
            Address::Cairn(namenode) => {
                let settings = ClientSettings { namenode: namenode.clone(), ..fs.settings().clone() };
                FileSystem::connect(fs.env().clone(), settings).await.map(Self::Cairn)
            }
            #[cfg(feature = "hdfs")]
            Address::Hdfs(namenode) => {
                cairn_hdfs::Hdfs::connect(fs.env().clone(), namenode, fs.user()).await.map(Self::Hdfs)
            }
            #[cfg(not(feature = "hdfs"))]
            Address::Hdfs(_) => {
                let text = format!("{address}: this program was built without the feature \"hdfs\"");
                Err(Error::new(ErrorCode::Unsupported, text))
            }
        }
    }

    /// "HOST:PORT" of its namenode.
    pub fn namenode(&self) -> &str {
        either!(self, fs => fs.namenode_address(), hdfs => hdfs.address())
    }

    /// What lies at a path, if anything does.
    pub async fn find(&self, path: &str) -> Result<Option<FileStatus>> {
        either!(self, fs => fs.find(path).await, hdfs => hdfs.find(path).await)
    }

    /// What lies at a path.
    pub async fn status(&self, path: &str) -> Result<FileStatus> {
        either!(self, fs => fs.status(path).await, hdfs => hdfs.status(path).await)
    }

    /// What matches a pattern.
    pub async fn glob(&self, pattern: &str) -> Result<Vec<FileStatus>> {
        either!(self, fs => fs.glob(pattern).await, hdfs => hdfs.glob(pattern).await)
    }

    /// What lies at a path and below it.
    pub async fn walk(&self, path: &str) -> Result<Walk> {
        Ok(either!(self,
            fs => Walk::Cairn(Box::new(fs.walk(path).await?)),
            hdfs => Walk::Hdfs(Box::new(hdfs.walk(path).await?))))
    }

    /// Opens a file, from its beginning.
    pub async fn open(&self, path: &str) -> Result<Reader> {
        Ok(either!(self,
            fs => Reader::Cairn(Box::new(fs.open(path).await?)),
            hdfs => Reader::Hdfs(Box::new(hdfs.open(path).await?))))
    }

    /// Makes a file, with the folders above it, in place of one that is there. 0: the cluster's default.
    pub async fn create(&self, path: &str, replication: u32, block_size: u64) -> Result<Writer> {
        let options = CreateOptions {
            overwrite: true,
            replication,
            block_size,
            create_parents: true,
            ..CreateOptions::default()
        };
        Ok(either!(self,
            fs => Writer::Cairn(Box::new(fs.create(path, options).await?)),
            hdfs => Writer::Hdfs(Box::new(hdfs.create(path, cairn_hdfs::Shape { replication, block_size }).await?))))
    }

    /// Makes a directory, and those above it.
    pub async fn mkdirs(&self, path: &str, permission: u32) -> Result<()> {
        either!(self, fs => fs.mkdirs(path, permission).await.map(drop), hdfs => hdfs.mkdirs(path, permission).await)
    }

    /// Says whether something was there to be deleted.
    pub async fn delete(&self, path: &str, recursive: bool) -> Result<bool> {
        either!(self, fs => fs.delete(path, recursive).await, hdfs => hdfs.delete(path, recursive).await)
    }

    /// Gives a file another path; a file that is there goes.
    pub async fn replace(&self, from: &str, to: &str) -> Result<()> {
        either!(self, fs => fs.rename(from, to, RenameMode::Overwrite).await, hdfs => hdfs.replace(from, to).await)
    }

    /// chmod.
    pub async fn set_permission(&self, path: &str, permission: u32) -> Result<()> {
        either!(self,
            fs => fs.set_permission(path, permission).await.map(drop),
            hdfs => hdfs.set_permission(path, permission).await)
    }

    /// chown, chgrp.
    pub async fn set_owner(&self, path: &str, owner: Option<&str>, group: Option<&str>) -> Result<()> {
        either!(self,
            fs => fs.set_owner(path, owner, group).await.map(drop),
            hdfs => hdfs.set_owner(path, owner, group).await)
    }

    /// touch: milliseconds since 1970.
    pub async fn set_modified(&self, path: &str, modified_ms: u64) -> Result<()> {
        either!(self,
            fs => fs.set_times(path, Some(modified_ms), None).await.map(drop),
            hdfs => hdfs.set_modified(path, modified_ms).await)
    }

    /// The CRC-32C of a file. Our clusters fold it from what writers took, others from what their datanodes find; older ones have to be read.
    pub async fn checksum(&self, path: &str) -> Result<FileChecksum> {
        either!(self, fs => fs.file_checksum(path).await, hdfs => {
            let (crc32c, length) = hdfs.checksum(path).await?;
            Ok(FileChecksum { crc32c, length })
        })
    }
}

impl Walk {
    /// The next one, parents before what is in them.
    pub async fn next(&mut self) -> Result<Option<FileStatus>> {
        either!(self, walk => walk.next().await, walk => walk.next().await)
    }
}

impl Reader {
    /// The next bytes, verified; `None` at the end.
    pub async fn next(&mut self) -> Result<Option<Bytes>> {
        either!(self, reader => reader.next_chunk().await, reader => reader.next().await)
    }
}

impl Writer {
    /// Adds bytes.
    pub async fn write(&mut self, bytes: Bytes) -> Result<()> {
        either!(self, writer => writer.write_bytes(bytes).await, writer => writer.write(bytes).await)
    }

    /// Ends the file when its datanodes hold it; returns its length.
    pub async fn close(self) -> Result<u64> {
        either!(self, writer => writer.close().await.map(|status| status.length), writer => writer.close().await)
    }

    /// Gives up; the file is still to be deleted.
    pub async fn abort(self) {
        match self {
            Self::Cairn(writer) => drop(writer.abort().await),
            #[cfg(feature = "hdfs")]
            Self::Hdfs(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_written() {
        for (text, address) in [
            ("h:1", Address::Cairn("h:1".into())),
            ("cairn://h:1", Address::Cairn("h:1".into())),
            ("hdfs://h:9000", Address::Hdfs("h:9000".into())),
            ("hdfs://h", Address::Hdfs("h:8020".into())),
            ("hdfs://[::1]", Address::Hdfs("[::1]:8020".into())),
        ] {
            assert_eq!(Address::parse(text).unwrap(), address);
            assert_eq!(Address::parse(&address.to_string()).unwrap(), address);
        }
        for bad in ["", "h", "h:x", "cairn://h", "hdfs://", "hdfs://:1", "s3://h:1:x"] {
            assert!(Address::parse(bad).is_err(), "{bad}");
        }
    }
}

//! The files of a cluster.
//!
//! # Overview
//! [`FileSystem`] is one client's view of a cluster: names and attributes come from the namenode over gRPC, bytes go straight to and from the
//! datanodes. It is cheap to clone, and its clones share the connection, the lease and what is known of unreachable nodes.
//! [`FileSystem::create`] and [`FileSystem::append`] give a [`FileWriter`], [`FileSystem::open`] a [`FileReader`].
//!
//! ```no_run
//! use cairn_client::fs::{ClientSettings, CreateOptions, FileSystem};
//!
//! # async fn example() -> cairn_client::fs::Result<()> {
//! let env = cairn_common::Env::system();
//! let fs = FileSystem::connect(env, ClientSettings::at("127.0.0.1:8020")).await?;
//! let mut out = fs.create("/notes.txt", CreateOptions::default()).await?;
//! out.write(b"kept three times").await?;
//! out.close().await?;
//! let mut input = fs.open("/notes.txt").await?;
//! while let Some(chunk) = input.next_chunk().await? {
//!     println!("{} bytes", chunk.len());
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # Consistency
//! Changes of names are atomic and durable when the call returns. A call that got no answer is repeated under the same number, and the namenode
//! answers a repetition from its memory, so nothing is applied twice. A file's bytes are durable on every node of its pipeline when
//! [`FileWriter::close`] or [`FileWriter::sync`] returns, and visible to readers that open it later when [`FileWriter::flush`] returns. A
//! [`FileReader`] verifies every byte against the checksum that the writer took before it sent it. A reader sees the length that the file
//! had when it was opened (or at [`FileReader::refresh`]).
//!
//! # Cancellation
//! Dropping the future of a call that changes something leaves open whether it happened. Dropping that of a [`FileWriter`] method leaves the
//! writer usable, but an unknown part of the data of that call may have been taken. Futures of a [`FileReader`] may be dropped at any time.
//! Dropping a [`FileWriter`] without `close` or `abort` leaves the file open until its lease expires.

mod backup;
mod datanode;
mod glob;
mod lease;
mod namenode;
mod namespace;
mod reader;
mod settings;
mod task;
mod walk;
mod writer;

use std::sync::Arc;

use cairn_common::{Env, process};
use cairn_proto::pb;
use tokio::sync::OnceCell;

pub use backup::BackupSummary;
pub use cairn_proto::pb::{
    Block, ClusterReportResponse, ContentSummaryResponse, FileKind, FileStatus, LocatedBlock, NodeReport, NodeState,
    RenameMode, Replica, ReplicaInfoReply, ReplicaState, SafeModeAction,
};
pub use cairn_proto::{Error, ErrorCode, ErrorKind, Result};
pub use datanode::FileChecksum;
#[doc(hidden)]
pub use glob::matches as glob_matches;
pub use reader::FileReader;
pub use settings::{AppendOptions, ClientSettings, CreateOptions};
pub use walk::{ListPages, Walk};
pub use writer::FileWriter;

use datanode::Datanodes;
use lease::Leases;
use namenode::{Namenode, hex};
use writer::SealerPool;

/// One client of one cluster; see the module.
#[derive(Clone)]
pub struct FileSystem {
    inner: Arc<Inner>,
}

struct Inner {
    env: Env,
    settings: ClientSettings,
    user: String,
    /// Lease holder of all files that this client writes.
    client_name: String,
    namenode: Namenode,
    datanodes: Datanodes,
    leases: Leases,
    sealers: SealerPool,
    defaults: OnceCell<pb::GetServerDefaultsResponse>,
}

impl FileSystem {
    /// Connects to the namenode. Fails within seconds if none answers there, naming the address.
    pub async fn connect(env: Env, settings: ClientSettings) -> Result<Self> {
        settings.validate()?;
        let mut client_id = [0; 16];
        env.entropy.fill(&mut client_id);
        let user = settings.user.clone().unwrap_or_else(process::user_name);
        let hello = pb::Hello {
            user: user.clone(),
            role: "client".into(),
            peer_id: hex(&client_id),
            software: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        };
        let (namenode, cluster) = Namenode::connect(env.clone(), &settings, hello.clone(), client_id).await?;
        let hello = pb::Hello { cluster_id: cluster.cluster_id, epoch: cluster.epoch, ..hello };
        let inner = Inner {
            datanodes: Datanodes::new(env.clone(), &settings, hello),
            leases: Leases::default(),
            sealers: SealerPool::default(),
            defaults: OnceCell::new(),
            client_name: format!("cairn-client-{}", hex(&client_id)),
            namenode,
            user,
            settings,
            env,
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Who this client is to the cluster.
    pub fn user(&self) -> &str {
        &self.inner.user
    }

    /// `HOST:PORT` of the namenode.
    pub fn namenode_address(&self) -> &str {
        self.inner.namenode.address()
    }

    /// What this client was made with.
    pub fn settings(&self) -> &ClientSettings {
        &self.inner.settings
    }

    /// The machine under it.
    pub fn env(&self) -> &Env {
        &self.inner.env
    }

    /// The name under which this client holds leases.
    pub fn client_name(&self) -> &str {
        &self.inner.client_name
    }

    /// Opens a file for reading, as long as it is now; see [`FileReader`].
    pub async fn open(&self, path: &str) -> Result<FileReader> {
        FileReader::open(self.clone(), path).await
    }

    /// Creates a file and opens it for writing; see [`FileWriter`].
    pub async fn create(&self, path: &str, options: CreateOptions) -> Result<FileWriter> {
        FileWriter::create(self.clone(), path, options).await
    }

    /// Opens a file that is there for writing behind its end, into new blocks; see [`FileWriter`]. Fails with
    /// [`ErrorCode::AlreadyBeingCreated`] while another writer has it open; one that was silent for the soft limit loses it.
    pub async fn append(&self, path: &str, options: AppendOptions) -> Result<FileWriter> {
        FileWriter::append(self.clone(), path, options).await
    }
}

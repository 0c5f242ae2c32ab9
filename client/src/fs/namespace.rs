//! Names and attributes: one call to the namenode each.

use cairn_proto::path as path_rules;
use cairn_proto::{Result, pb};

use super::namenode::Patience;
use super::{
    Error, ErrorCode, FileStatus, FileSystem, ListPages, LocatedBlock, RenameMode, SafeModeAction, Walk, glob,
};

/// A call that only asks.
macro_rules! ask {
    ($fs:expr, $method:ident, $request:expr) => {
        $fs.inner
            .namenode
            .call(Patience::Caller, $request, |mut stub, request| async move { stub.$method(request).await })
            .await
    };
}

/// A call that changes something: numbered, so that a repetition is not applied again.
macro_rules! change {
    ($fs:expr, $method:ident, $kind:ident { $($field:ident $(: $value:expr)?),* $(,)? }) => {{
        let call = $fs.inner.namenode.open_call();
        let request = pb::$kind { call: call.context(), $($field $(: $value)?),* };
        ask!($fs, $method, request)
    }};
}

/// An answer with fewer blocks is whole; the namenode cuts only far longer ones.
pub(super) const MANY_BLOCKS: usize = 1_000;

fn incomplete(what: &str) -> Error {
    Error::new(ErrorCode::Internal, format!("the namenode's answer holds no {what}"))
}

impl FileSystem {
    /// Sizes and names that the cluster uses by default; asked for once.
    pub async fn server_defaults(&self) -> Result<&pb::GetServerDefaultsResponse> {
        let ask = || async { ask!(self, get_server_defaults, pb::GetServerDefaultsRequest {}) };
        self.inner.defaults.get_or_try_init(ask).await
    }

    /// What `path` is. Fails with [`ErrorCode::FileNotFound`] if it is not.
    pub async fn status(&self, path: &str) -> Result<FileStatus> {
        let path = path_rules::normalize(path)?;
        let answer = ask!(self, get_status, pb::GetStatusRequest { path })?;
        answer.status.ok_or_else(|| incomplete("status"))
    }

    /// Is there something at `path`?
    pub async fn exists(&self, path: &str) -> Result<bool> {
        self.find(path).await.map(|found| found.is_some())
    }

    /// What `path` is; `None` if it is not.
    pub async fn find(&self, path: &str) -> Result<Option<FileStatus>> {
        match self.status(path).await {
            Ok(status) => Ok(Some(status)),
            Err(error) if error.code() == ErrorCode::FileNotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The entries of a directory, page by page in the order of their bytes; of a file, itself.
    pub fn list(&self, path: &str) -> Result<ListPages> {
        Ok(ListPages::new(self.clone(), path_rules::normalize(path)?, false))
    }

    /// As [`Self::list`], with the blocks of each file and where they lie.
    pub fn list_with_locations(&self, path: &str) -> Result<ListPages> {
        Ok(ListPages::new(self.clone(), path_rules::normalize(path)?, true))
    }

    /// All entries of a directory at once. Memory grows with their number: prefer [`Self::list`] for large ones.
    pub async fn list_all(&self, path: &str) -> Result<Vec<FileStatus>> {
        let mut pages = self.list(path)?;
        let mut all = Vec::new();
        while let Some(page) = pages.next().await? {
            all.extend(page);
        }
        Ok(all)
    }

    pub(super) async fn list_page(&self, request: pb::ListRequest) -> Result<pb::ListResponse> {
        ask!(self, list, request)
    }

    /// Everything below `path`, itself first, parents before children, siblings in the order of their bytes.
    pub async fn walk(&self, path: &str) -> Result<Walk> {
        let root = self.status(path).await?;
        Ok(Walk::new(self.clone(), root))
    }

    /// The paths that match an HDFS glob, sorted: `*`, `?`, `[a-z]`, `[^a]`, `{a,b}`, and `\` before a character that means itself. Only
    /// directories that can hold a match are listed. A pattern without wildcards gives the path itself, or nothing if it is not there.
    pub async fn glob(&self, pattern: &str) -> Result<Vec<FileStatus>> {
        glob::expand(self, pattern).await
    }

    /// The blocks that hold `offset .. offset + length` (length 0: to the end) of a file, and where their replicas lie, nearest first.
    pub async fn block_locations(&self, path: &str, offset: u64, length: u64) -> Result<Vec<LocatedBlock>> {
        self.locate(path, offset, length).await.map(|(_, blocks)| blocks)
    }

    pub(super) async fn locate(&self, path: &str, offset: u64, length: u64) -> Result<(FileStatus, Vec<LocatedBlock>)> {
        let path = path_rules::normalize(path)?;
        let end = if length == 0 { u64::MAX } else { offset.saturating_add(length) };
        let (mut offset, mut length, mut blocks) = (offset, length, Vec::<LocatedBlock>::new());
        let mut inode = None;
        loop {
            let request = pb::GetBlockLocationsRequest { path: path.clone(), offset, length };
            let answer = ask!(self, get_block_locations, request)?;
            let status = answer.status.ok_or_else(|| incomplete("status"))?;
            if *inode.get_or_insert(status.inode) != status.inode {
                let text = format!("{path} was replaced by another file while it was looked at");
                return Err(Error::new(ErrorCode::FileNotFound, text).with_subject(path));
            }
            // An answer names only so many blocks. What is still being written lies behind all of them and comes with the last.
            let known = |block: &LocatedBlock| blocks.iter().rev().take(2).any(|other| other.block == block.block);
            let fresh: Vec<LocatedBlock> = answer.blocks.into_iter().filter(|block| !known(block)).collect();
            let many = fresh.len() >= MANY_BLOCKS;
            let reached = fresh.last().map(|last| last.offset + last.length).filter(|reached| *reached > offset);
            blocks.extend(fresh);
            let Some(reached) = reached.filter(|reached| many && *reached < end) else { return Ok((status, blocks)) };
            offset = reached;
            length = if end == u64::MAX { 0 } else { end - reached };
        }
    }

    /// Bytes, files and directories at and below `path`.
    pub async fn content_summary(&self, path: &str) -> Result<pb::ContentSummaryResponse> {
        let path = path_rules::normalize(path)?;
        ask!(self, content_summary, pb::ContentSummaryRequest { path })
    }

    /// Makes a directory and its missing parents; one that is there already is left as it is. `permission`: already masked.
    pub async fn mkdirs(&self, path: &str, permission: u32) -> Result<FileStatus> {
        self.make_directory(path, permission, true).await
    }

    /// Makes one directory; its parent must be there and it must not.
    pub async fn mkdir(&self, path: &str, permission: u32) -> Result<FileStatus> {
        self.make_directory(path, permission, false).await
    }

    async fn make_directory(&self, path: &str, permission: u32, create_parents: bool) -> Result<FileStatus> {
        let path = path_rules::normalize(path)?;
        let answer = change!(self, mkdirs, MkdirsRequest { path, permission, create_parents })?;
        answer.status.ok_or_else(|| incomplete("status"))
    }

    /// Renames a file or a directory, atomically.
    pub async fn rename(&self, from: &str, to: &str, mode: RenameMode) -> Result<()> {
        let (from, to) = (path_rules::normalize(from)?, path_rules::normalize(to)?);
        change!(self, rename, RenameRequest { from, to, mode: mode as i32 })?;
        Ok(())
    }

    /// Deletes a file, or a directory (with `recursive` also one that is not empty). `false`: there was nothing.
    pub async fn delete(&self, path: &str, recursive: bool) -> Result<bool> {
        let path = path_rules::normalize(path)?;
        Ok(change!(self, delete, DeleteRequest { path, recursive, only_inode: 0 })?.existed)
    }

    /// Deletes a file if `path` still names this inode. `false`: it does not.
    pub(crate) async fn delete_inode(&self, path: &str, inode: u64) -> Result<bool> {
        let path = path.to_owned();
        Ok(change!(self, delete, DeleteRequest { path, recursive: false, only_inode: inode })?.existed)
    }

    /// Takes a file back that this client was writing. One that has got another name meanwhile is somebody's: it is closed with what it has.
    pub(crate) async fn take_back(&self, path: &str, inode: u64) -> Result<()> {
        if self.delete_inode(path, inode).await? {
            return Ok(());
        }
        match self.release_lease(inode).await {
            Err(error) if error.code() == ErrorCode::FileNotFound => Ok(()),
            released => released,
        }
    }

    /// Sets the low twelve bits of the mode.
    pub async fn set_permission(&self, path: &str, permission: u32) -> Result<()> {
        let path = path_rules::normalize(path)?;
        change!(self, set_permission, SetPermissionRequest { path, permission })?;
        Ok(())
    }

    /// Sets owner and group; `None` leaves one as it is.
    pub async fn set_owner(&self, path: &str, owner: Option<&str>, group: Option<&str>) -> Result<()> {
        let path = path_rules::normalize(path)?;
        let (owner, group) = (owner.unwrap_or_default().to_owned(), group.unwrap_or_default().to_owned());
        change!(self, set_owner, SetOwnerRequest { path, owner, group })?;
        Ok(())
    }

    /// Sets the times of modification and access, milliseconds since 1970; `None` leaves one as it is.
    pub async fn set_times(&self, path: &str, modified_ms: Option<u64>, accessed_ms: Option<u64>) -> Result<()> {
        let path = path_rules::normalize(path)?;
        change!(self, set_times, SetTimesRequest { path, modified_ms, accessed_ms })?;
        Ok(())
    }

    /// Sets how many replicas each block of a file shall have; copies are made or removed in the background.
    pub async fn set_replication(&self, path: &str, replication: u32) -> Result<()> {
        let path = path_rules::normalize(path)?;
        change!(self, set_replication, SetReplicationRequest { path, replication })?;
        Ok(())
    }

    /// Cuts a file to `length` bytes. `done` is false where the cut falls inside a block: the file has its new length at once, and is open (to
    /// nobody) until the datanodes have cut their replicas; see [`FileStatus::open`].
    pub async fn truncate(&self, path: &str, length: u64) -> Result<pb::TruncateResponse> {
        let path = path_rules::normalize(path)?;
        Ok(change!(self, truncate, TruncateRequest { path, length })?)
    }

    /// Moves the blocks of the sources, in order, behind those of the target; the sources vanish. No byte is moved. All must be closed and lie
    /// in one directory.
    pub async fn concat(&self, target: &str, sources: &[String]) -> Result<FileStatus> {
        let target = path_rules::normalize(target)?;
        let sources = sources.iter().map(|source| path_rules::normalize(source)).collect::<Result<Vec<_>>>()?;
        let answer = change!(self, concat, ConcatRequest { target, sources })?;
        answer.status.ok_or_else(|| incomplete("status"))
    }

    /// Takes a file from its writer, whatever the limits, and has it closed with all that was acknowledged. The writer's next call fails with
    /// [`ErrorCode::LeaseExpired`]. The answer tells whether the file is closed, and else what is waited for: ask again.
    pub async fn recover_lease(&self, path: &str) -> Result<pb::RecoverLeaseResponse> {
        let path = path_rules::normalize(path)?;
        ask!(self, recover_lease, pb::RecoverLeaseRequest { path, ..Default::default() })
    }

    /// Gives up a file that this client has open for writing, by its inode: the namenode closes it with all that was acknowledged, wherever it
    /// was renamed to. A file that is gone, or that another client has open, is left alone.
    pub async fn release_lease(&self, inode: u64) -> Result<()> {
        let only_of = self.inner.client_name.clone();
        ask!(self, recover_lease, pb::RecoverLeaseRequest { path: String::new(), only_of, inode }).map(drop)
    }

    /// Nodes, space and the health of blocks.
    pub async fn cluster_report(&self) -> Result<pb::ClusterReportResponse> {
        ask!(self, cluster_report, pb::ClusterReportRequest {})
    }

    /// Asks for, enters or leaves safe mode.
    pub async fn safe_mode(&self, action: SafeModeAction) -> Result<pb::SafeModeResponse> {
        ask!(self, safe_mode, pb::SafeModeRequest { action: action as i32 })
    }

    /// Makes the namenode write an image of its state now.
    pub async fn checkpoint_namenode(&self) -> Result<pb::CheckpointResponse> {
        ask!(self, checkpoint, pb::CheckpointRequest {})
    }

    pub(super) async fn report_bad_replica(&self, request: pb::ReportBadReplicaRequest) -> Result<()> {
        let send = |mut stub: pb::namenode_client::NamenodeClient<_>, request| async move {
            stub.report_bad_replica(request).await
        };
        self.inner.namenode.call(Patience::Once, request, send).await.map(drop)
    }
}

//! Names and attributes.

use cairn_proto::hadoop as wire;
use cairn_proto::{Error, ErrorCode, Result, pb};

use super::{Asked, Done, as_io, convert, io_exception};

/// Blocks of one answer: Hadoop's clients take no larger one.
const MAX_BLOCKS: usize = 200_000;

/// No such entry is an answer, not a failure.
fn if_there<T>(result: Result<T>) -> Result<Option<T>> {
    match result {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.code() == ErrorCode::FileNotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn yes(result: bool) -> wire::BoolResponse {
    wire::BoolResponse { result }
}

impl Asked<'_> {
    pub(super) async fn file_info(&self, request: wire::GetFileInfoRequest) -> Done<wire::GetFileInfoResponse> {
        let found = if_there(self.status(&request.src).await)?;
        Ok(wire::GetFileInfoResponse { fs: found.map(|status| convert::status(&status, "")) })
    }

    pub(super) async fn located_file_info(&self, request: wire::GetFileInfoRequest) -> Done<wire::GetFileInfoResponse> {
        let Some(found) = if_there(self.status(&request.src).await)? else {
            return Ok(wire::GetFileInfoResponse { fs: None });
        };
        let mut status = convert::status(&found, "");
        if found.kind() == pb::FileKind::File {
            status.locations = Some(self.locate(&request.src, 0, 0).await?);
        }
        Ok(wire::GetFileInfoResponse { fs: Some(status) })
    }

    pub(super) async fn is_file_closed(&self, request: wire::IsFileClosedRequest) -> Done<wire::BoolResponse> {
        let status = self.status(&request.src).await?;
        if status.kind() == pb::FileKind::Directory {
            return Err(not_a_file(&request.src).into());
        }
        Ok(yes(!status.open))
    }

    pub(super) async fn listing(&self, request: wire::GetListingRequest) -> Done<wire::GetListingResponse> {
        let list = pb::ListRequest {
            path: request.src.clone(),
            start_after: request.start_after,
            limit: 0,
            with_locations: request.need_location,
        };
        let Some(page) = if_there(self.ask::<_, pb::ListResponse>(list).await)? else {
            return Ok(wire::GetListingResponse { dir_list: None });
        };
        let entry = |status: &pb::FileStatus| {
            let mut entry = convert::status(status, convert::name_below(&request.src, &status.path));
            if request.need_location && status.kind() == pb::FileKind::File {
                entry.locations = Some(convert::located_blocks(status, &status.blocks));
            }
            entry
        };
        let listing = wire::DirectoryListing {
            partial_listing: page.entries.iter().map(entry).collect(),
            remaining_entries: u32::try_from(page.remaining).unwrap_or(u32::MAX),
        };
        Ok(wire::GetListingResponse { dir_list: Some(listing) })
    }

    pub(super) async fn block_locations(
        &self,
        request: wire::GetBlockLocationsRequest,
    ) -> Done<wire::GetBlockLocationsResponse> {
        // HDFS's lengths are signed: nothing negative is asked for, and a length of 0 asks for no block.
        if request.offset > i64::MAX as u64 || request.length > i64::MAX as u64 {
            let message = "Negative offset is not supported. File: ".to_owned() + &request.src;
            return Err(Error::new(ErrorCode::InvalidArgument, message).into());
        }
        let located = self.locate(&request.src, request.offset, request.length.max(1)).await?;
        Ok(wire::GetBlockLocationsResponse { locations: Some(located) })
    }

    /// The blocks of a file in a range (length 0: to the end): the core gives some thousands at a time.
    async fn blocks(&self, path: &str, offset: u64, length: u64) -> Result<(pb::FileStatus, Vec<pb::LocatedBlock>)> {
        let end = if length == 0 { u64::MAX } else { offset.saturating_add(length) };
        let (mut at, mut all) = (offset, Vec::<pb::LocatedBlock>::new());
        let mut first: Option<pb::FileStatus> = None;
        loop {
            let length = if end == u64::MAX { 0 } else { end - at };
            let request = pb::GetBlockLocationsRequest { path: path.to_owned(), offset: at, length };
            let answer: Result<pb::GetBlockLocationsResponse> = self.ask(request).await;
            let answer = answer.map_err(|error| match error.code() {
                ErrorCode::NotAFile => not_a_file(path),
                _ => error,
            })?;
            let status = first.get_or_insert_with(|| answer.status.clone().unwrap_or_default());
            if answer.status.is_some_and(|now| now.inode != status.inode) {
                let text = format!("{path} became another file while its blocks were listed");
                return Err(Error::new(ErrorCode::FileNotFound, text).with_subject(path));
            }
            let known: Vec<_> = all.iter().rev().take(2).map(|block| block.block.clone()).collect();
            all.extend(answer.blocks.into_iter().filter(|block| !known.contains(&block.block)));
            if all.len() > MAX_BLOCKS {
                let text = format!("more than {MAX_BLOCKS} blocks of {path} were asked for: ask for a smaller range");
                return Err(Error::new(ErrorCode::Io, text).with_subject(path));
            }
            let reached = all.last().map_or(at, |last| last.offset + last.length);
            if reached <= at || reached >= end.min(status.length) {
                return Ok((first.unwrap_or_default(), all));
            }
            at = reached;
        }
    }

    /// Blocks in a range (length 0: to the end), and the one that is being written, wherever it is.
    async fn locate(&self, path: &str, offset: u64, length: u64) -> Result<wire::LocatedBlocks> {
        let (status, blocks) = self.blocks(path, offset, length).await?;
        let mut located = convert::located_blocks(&status, &blocks);
        if status.open && located.is_last_block_complete && length != 0 {
            let request = pb::GetBlockLocationsRequest { path: path.to_owned(), offset: status.length, length: 0 };
            let rest: pb::GetBlockLocationsResponse = self.ask(request).await?;
            let end = convert::located_blocks(&rest.status.unwrap_or_default(), &rest.blocks);
            (located.last_block, located.is_last_block_complete) = (end.last_block, end.is_last_block_complete);
        }
        let last = located.last_block.as_ref().filter(|_| !located.is_last_block_complete);
        if last.is_some_and(|block| block.locs.is_empty()) {
            // HDFS's client would take it for empty.
            let message =
                format!("No datanode has told yet what it holds of the last block of {path}, which is being written");
            return Err(Error::new(ErrorCode::Busy, message).with_subject(path));
        }
        Ok(located)
    }

    async fn summary(&self, path: &str) -> Result<pb::ContentSummaryResponse> {
        self.ask(pb::ContentSummaryRequest { path: path.to_owned() }).await
    }

    pub(super) async fn content_summary(
        &self,
        request: wire::GetContentSummaryRequest,
    ) -> Done<wire::GetContentSummaryResponse> {
        let sums = self.summary(&request.path).await?;
        let summary = wire::ContentSummary {
            length: sums.length,
            file_count: sums.files,
            directory_count: sums.directories,
            quota: convert::NONE,
            space_consumed: sums.space,
            space_quota: convert::NONE,
        };
        Ok(wire::GetContentSummaryResponse { summary })
    }

    pub(super) async fn quota_usage(&self, request: wire::GetQuotaUsageRequest) -> Done<wire::GetQuotaUsageResponse> {
        let sums = self.summary(&request.path).await?;
        let usage = wire::QuotaUsage {
            file_and_directory_count: sums.files + sums.directories,
            quota: convert::NONE,
            space_consumed: sums.space,
            space_quota: convert::NONE,
        };
        Ok(wire::GetQuotaUsageResponse { usage })
    }

    pub(super) async fn preferred_block_size(
        &self,
        request: wire::GetPreferredBlockSizeRequest,
    ) -> Done<wire::GetPreferredBlockSizeResponse> {
        let status = self.status(&request.filename).await?;
        Ok(wire::GetPreferredBlockSizeResponse { bsize: status.block_size })
    }

    pub(super) async fn enclosing_root(
        &self,
        _: wire::GetEnclosingRootRequest,
    ) -> Done<wire::GetEnclosingRootResponse> {
        Ok(wire::GetEnclosingRootResponse { enclosing_root_path: Some("/".into()) })
    }

    pub(super) async fn check_access(&self, request: wire::CheckAccessRequest) -> Done<()> {
        // The bits of an action are those of an access.
        let access = request.mode as u32;
        let _: pb::CheckAccessResponse = self.ask(pb::CheckAccessRequest { path: request.path, access }).await?;
        Ok(())
    }

    pub(super) async fn mkdirs(&self, request: wire::MkdirsRequest) -> Done<wire::BoolResponse> {
        let (path, permission) = (request.src, request.masked.perm);
        let request = pb::MkdirsRequest { call: None, path, permission, create_parents: request.create_parent };
        let _: pb::MkdirsResponse = self.ask(request).await?;
        Ok(yes(true))
    }

    /// HDFS's older rename says "no" where the newer one says why.
    pub(super) async fn rename(&self, request: wire::RenameRequest) -> Done<wire::BoolResponse> {
        use ErrorCode as C;
        let mode = pb::RenameMode::IntoDirectory as i32;
        let request = pb::RenameRequest { call: self.context(), from: request.src, to: request.dst, mode };
        match self.ask::<_, pb::RenameResponse>(request).await {
            Ok(_) => Ok(yes(true)),
            Err(error) => match error.code() {
                C::FileNotFound | C::FileAlreadyExists | C::InvalidArgument => Ok(yes(false)),
                _ => Err(error.into()),
            },
        }
    }

    pub(super) async fn rename2(&self, request: wire::Rename2Request) -> Done<()> {
        let mode = if request.overwrite_dest { pb::RenameMode::Overwrite } else { pb::RenameMode::NoReplace } as i32;
        let request = pb::RenameRequest { call: self.context(), from: request.src, to: request.dst, mode };
        let renamed: Result<pb::RenameResponse> = self.ask(request).await;
        renamed.map(|_| ()).map_err(|error| match error.code() {
            // HDFS has no class of its own for it here.
            ErrorCode::DirectoryNotEmpty => io_exception(error.message()),
            _ => as_io(error),
        })
    }

    pub(super) async fn delete(&self, request: wire::DeleteRequest) -> Done<wire::BoolResponse> {
        let (path, recursive) = (request.src, request.recursive);
        let request = pb::DeleteRequest { call: self.context(), path, recursive, only_inode: 0 };
        let answer: pb::DeleteResponse = self.ask(request).await?;
        Ok(yes(answer.existed))
    }

    pub(super) async fn set_permission(&self, request: wire::SetPermissionRequest) -> Done<()> {
        let request = pb::SetPermissionRequest { call: None, path: request.src, permission: request.permission.perm };
        let _: pb::SetPermissionResponse = self.ask(request).await?;
        Ok(())
    }

    pub(super) async fn set_owner(&self, request: wire::SetOwnerRequest) -> Done<()> {
        let request = pb::SetOwnerRequest {
            call: None,
            path: request.src,
            owner: request.username.unwrap_or_default(),
            group: request.groupname.unwrap_or_default(),
        };
        let _: pb::SetOwnerResponse = self.ask(request).await?;
        Ok(())
    }

    pub(super) async fn set_times(&self, request: wire::SetTimesRequest) -> Done<()> {
        let time = |ms: u64| (ms <= i64::MAX as u64).then_some(ms);
        let (modified_ms, accessed_ms) = (time(request.mtime), time(request.atime));
        let request = pb::SetTimesRequest { call: None, path: request.src, modified_ms, accessed_ms };
        let _: pb::SetTimesResponse = self.ask(request).await?;
        Ok(())
    }

    pub(super) async fn set_replication(&self, request: wire::SetReplicationRequest) -> Done<wire::BoolResponse> {
        let request = pb::SetReplicationRequest { call: None, path: request.src, replication: request.replication };
        match self.ask::<_, pb::SetReplicationResponse>(request).await {
            Ok(_) => Ok(yes(true)),
            Err(error) if matches!(error.code(), ErrorCode::FileNotFound | ErrorCode::NotAFile) => Ok(yes(false)),
            Err(error) => Err(as_io(error)),
        }
    }

    pub(super) async fn concat(&self, request: wire::ConcatRequest) -> Done<()> {
        let request = pb::ConcatRequest { call: self.context(), target: request.trg, sources: request.srcs };
        let _: pb::ConcatResponse = self.ask(request).await?;
        Ok(())
    }

    /// "No" means that the last block is being cut, and the file open until then.
    pub(super) async fn truncate(&self, request: wire::TruncateRequest) -> Done<wire::BoolResponse> {
        let request = pb::TruncateRequest { call: self.context(), path: request.src, length: request.new_length };
        let answer: pb::TruncateResponse = self.ask(request).await?;
        Ok(yes(answer.done))
    }
}

/// HDFS's words and class for it.
fn not_a_file(path: &str) -> Error {
    Error::new(ErrorCode::FileNotFound, format!("Path is not a file: {path}")).with_subject(path)
}

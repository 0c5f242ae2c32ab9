//! Operations that change names and attributes.

use cairn_common::net::http::Answer;
use cairn_proto::path::normalize;
use cairn_proto::webhdfs;
use cairn_proto::{Error, ErrorCode, Result, pb};
use serde_json::json;

use super::{Call, done, found, no_operation};

/// Of a new directory if nothing is said.
const DIRECTORY_MODE: u32 = 0o755;

fn said(answer: bool) -> Answer {
    found(&json!({ "boolean": answer }))
}

impl Call<'_> {
    pub(super) async fn put(&self, op: &str) -> Result<Answer> {
        match op {
            "CREATE" => self.create().await,
            "MKDIRS" => self.mkdirs().await,
            "RENAME" => self.rename().await,
            "SETREPLICATION" => self.set_replication().await,
            "SETOWNER" => self.set_owner().await,
            "SETPERMISSION" => self.set_permission().await,
            "SETTIMES" => self.set_times().await,
            _ => Err(no_operation("PUT", op)),
        }
    }

    pub(super) async fn post(&self, op: &str) -> Result<Answer> {
        match op {
            "APPEND" => self.append().await,
            "CONCAT" => self.concat().await,
            "TRUNCATE" => self.truncate().await,
            _ => Err(no_operation("POST", op)),
        }
    }

    pub(super) async fn delete(&self, op: &str) -> Result<Answer> {
        if op != "DELETE" {
            return Err(no_operation("DELETE", op));
        }
        let recursive = self.parameters.flag("recursive")?;
        let request = pb::DeleteRequest { call: None, path: self.path.clone(), recursive, only_inode: 0 };
        let answer: pb::DeleteResponse = self.ask(request).await?;
        Ok(said(answer.existed))
    }

    async fn mkdirs(&self) -> Result<Answer> {
        // `unmaskedpermission` only matters below a default ACL, of which there are none; `permission` is masked already.
        let permission = self.parameters.permission("permission")?.unwrap_or(DIRECTORY_MODE);
        let request = pb::MkdirsRequest { call: None, path: self.path.clone(), permission, create_parents: true };
        let _: pb::MkdirsResponse = self.ask(request).await?;
        Ok(said(true))
    }

    /// With `renameoptions` as HDFS's newer rename, which fails with the reason; without as the older one, which says "false".
    async fn rename(&self) -> Result<Answer> {
        let to = self.parameters.path("destination")?;
        let Some(options) = self.parameters.get("renameoptions") else { return self.rename_or_not(to).await };
        let mut mode = pb::RenameMode::NoReplace;
        for option in options.split(',') {
            match option.trim().to_ascii_uppercase().as_str() {
                "NONE" | "TO_TRASH" => {}
                "OVERWRITE" => mode = pb::RenameMode::Overwrite,
                other => {
                    let shown: String = other.chars().take(60).collect();
                    return Err(webhdfs::invalid(format!("renameoptions {shown:?} is neither NONE nor OVERWRITE")));
                }
            }
        }
        self.rename_to(to, mode).await?;
        Ok(done())
    }

    async fn rename_to(&self, to: String, mode: pb::RenameMode) -> Result<()> {
        let request = pb::RenameRequest { call: None, from: self.path.clone(), to, mode: mode as i32 };
        let _: pb::RenameResponse = self.ask(request).await?;
        Ok(())
    }

    /// Into a directory that is there, else to a name that is not; onto itself is no failure for a file.
    async fn rename_or_not(&self, to: String) -> Result<Answer> {
        match self.rename_to(to, pb::RenameMode::IntoDirectory).await {
            Ok(()) => Ok(said(true)),
            Err(error) if is_no(&error) => Ok(said(false)),
            Err(error) => Err(error),
        }
    }

    async fn set_replication(&self) -> Result<Answer> {
        let replication = match self.parameters.small_number("replication")? {
            Some(replication) => replication,
            None => self.ask::<_, pb::GetServerDefaultsResponse>(pb::GetServerDefaultsRequest {}).await?.replication,
        };
        let request = pb::SetReplicationRequest { call: None, path: self.path.clone(), replication };
        let answer: Result<pb::SetReplicationResponse> = self.ask(request).await;
        match answer {
            Ok(_) => Ok(said(true)),
            Err(error) if matches!(error.code(), ErrorCode::FileNotFound | ErrorCode::NotAFile) => Ok(said(false)),
            Err(error) => Err(error),
        }
    }

    async fn set_owner(&self) -> Result<Answer> {
        let named = |name| self.parameters.get(name).unwrap_or_default().to_owned();
        let (owner, group) = (named("owner"), named("group"));
        if owner.is_empty() && group.is_empty() {
            return Err(webhdfs::invalid("Both owner and group are empty."));
        }
        let request = pb::SetOwnerRequest { call: None, path: self.path.clone(), owner, group };
        let _: pb::SetOwnerResponse = self.ask(request).await?;
        Ok(done())
    }

    async fn set_permission(&self) -> Result<Answer> {
        let permission = self.parameters.permission("permission")?.unwrap_or(DIRECTORY_MODE);
        let request = pb::SetPermissionRequest { call: None, path: self.path.clone(), permission };
        let _: pb::SetPermissionResponse = self.ask(request).await?;
        Ok(done())
    }

    async fn set_times(&self) -> Result<Answer> {
        let modified_ms = self.parameters.time("modificationtime")?;
        let accessed_ms = self.parameters.time("accesstime")?;
        let request = pb::SetTimesRequest { call: None, path: self.path.clone(), modified_ms, accessed_ms };
        let _: pb::SetTimesResponse = self.ask(request).await?;
        Ok(done())
    }

    async fn concat(&self) -> Result<Answer> {
        let sources = self.parameters.required("sources")?.split(',').map(|source| normalize(source.trim()));
        let request =
            pb::ConcatRequest { call: None, target: self.path.clone(), sources: sources.collect::<Result<_>>()? };
        let _: pb::ConcatResponse = self.ask(request).await?;
        Ok(done())
    }

    async fn truncate(&self) -> Result<Answer> {
        let Some(length) = self.parameters.number("newlength")? else {
            return Err(webhdfs::invalid("the parameter newlength is missing"));
        };
        let request = pb::TruncateRequest { call: None, path: self.path.clone(), length };
        let answer: pb::TruncateResponse = self.ask(request).await?;
        Ok(said(answer.done))
    }
}

/// Failures that HDFS's older rename only calls "false".
fn is_no(error: &Error) -> bool {
    matches!(error.code(), ErrorCode::FileNotFound | ErrorCode::FileAlreadyExists | ErrorCode::InvalidArgument)
}

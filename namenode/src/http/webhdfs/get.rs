//! Operations that only ask.

use cairn_common::net::http::{self, Answer, Bytes};
use cairn_proto::path::split_last;
use cairn_proto::webhdfs;
use cairn_proto::{Error, ErrorCode, Result, pb};
use futures_util::stream;
use serde_json::json;

use super::{Call, found, home_of, json, no_operation};
use crate::core::Caller;
use crate::server::OwnerRef;

impl Call<'_> {
    pub(super) async fn get(&self, op: &str) -> Result<Answer> {
        match op {
            // There are no symbolic links.
            "GETFILESTATUS" | "GETFILELINKSTATUS" => {
                let status = self.status().await?;
                Ok(found(&json!({ "FileStatus": json::status(&status, "") })))
            }
            "LISTSTATUS" => self.list().await,
            "LISTSTATUS_BATCH" => self.list_page().await,
            "GETCONTENTSUMMARY" => Ok(found(&json::content_summary(&self.sums().await?))),
            "GETQUOTAUSAGE" => Ok(found(&json::quota_usage(&self.sums().await?))),
            "GETHOMEDIRECTORY" => Ok(found(&json!({ "Path": home_of(&self.caller.user) }))),
            "GETTRASHROOT" => Ok(found(&json!({ "Path": format!("{}/.Trash", home_of(&self.caller.user)) }))),
            // As HDFS does where nobody is authenticated.
            "GETDELEGATIONTOKEN" => Ok(found(&json!({ "Token": null }))),
            "GETFILEBLOCKLOCATIONS" => self.block_locations().await,
            "GET_BLOCK_LOCATIONS" => self.located_blocks().await,
            "CHECKACCESS" => self.check_access().await,
            "GETACLSTATUS" => Ok(found(&json::acl_status(&self.status().await?))),
            "GETXATTRS" => self.attributes().await,
            "LISTXATTRS" => {
                self.status().await?;
                // A list inside a text: so it is.
                Ok(found(&json!({ "XAttrNames": "[]" })))
            }
            "GETSERVERDEFAULTS" => {
                let defaults = self.ask(pb::GetServerDefaultsRequest {}).await?;
                Ok(found(&json::server_defaults(&defaults)))
            }
            "GETSTATUS" => Ok(found(&json::fs_status(&self.ask(pb::ClusterReportRequest {}).await?))),
            "OPEN" => self.open().await,
            "GETFILECHECKSUM" => self.checksum().await,
            _ => Err(no_operation("GET", op)),
        }
    }

    pub(super) async fn status(&self) -> Result<pb::FileStatus> {
        let path = self.path.clone();
        let answer: pb::GetStatusResponse = self.ask(pb::GetStatusRequest { path }).await?;
        answer
            .status
            .ok_or_else(|| Error::new(ErrorCode::Internal, "the answer holds no status").with_subject(&self.path))
    }

    async fn sums(&self) -> Result<pb::ContentSummaryResponse> {
        self.ask(pb::ContentSummaryRequest { path: self.path.clone() }).await
    }

    async fn check_access(&self) -> Result<Answer> {
        let access = self.parameters.access("fsaction")?;
        let _: pb::CheckAccessResponse = self.ask(pb::CheckAccessRequest { path: self.path.clone(), access }).await?;
        Ok(super::done())
    }

    /// No file has any.
    async fn attributes(&self) -> Result<Answer> {
        self.status().await?;
        if self.parameters.get("xattr.name").is_some() {
            let text = "At least one of the attributes provided was not found.";
            return Err(Error::new(ErrorCode::Io, text).with_subject(&self.path));
        }
        Ok(found(&json!({ "XAttrs": [] })))
    }

    /// A whole directory; page by page, so that its size costs no memory.
    async fn list(&self) -> Result<Answer> {
        let mut listing = Listing::new(self, Bytes::new());
        let first = listing.next_page().await?;
        let mut text = String::from("{\"FileStatuses\":{\"FileStatus\":[\n");
        text.push_str(&first);
        if listing.remaining == 0 {
            text.push_str(END);
            return Ok(http::json(http::StatusCode::OK, text));
        }
        let pages = stream::unfold((Some(listing), Some(text)), |(listing, ready)| async move {
            let mut listing = listing?;
            if let Some(text) = ready {
                return Some((Ok(Bytes::from(text)), (Some(listing), None)));
            }
            if listing.remaining == 0 {
                return Some((Ok(Bytes::from_static(END.as_bytes())), (None, None)));
            }
            match listing.next_page().await {
                Ok(page) => Some((Ok(Bytes::from(page)), (Some(listing), None))),
                Err(error) => Some((Err(error), (None, None))),
            }
        });
        Ok(http::stream("application/json", None, pages))
    }

    async fn list_page(&self) -> Result<Answer> {
        let start_after = self.parameters.raw("startafter").unwrap_or_default().to_owned();
        let mut listing = Listing::new(self, start_after.into());
        let page = listing.next_page().await?;
        let text = format!(
            "{{\"DirectoryListing\":{{\"partialListing\":{{\"FileStatuses\":{{\"FileStatus\":[{page}]}}}},\"remainingEntries\":{}}}}}",
            listing.remaining
        );
        Ok(http::json(http::StatusCode::OK, text))
    }
}

const END: &str = "\n]}}\n";

/// The pages of a directory as JSON; owns what it needs, since it outlives the call.
struct Listing {
    owner: OwnerRef,
    caller: Caller,
    path: String,
    start_after: Bytes,
    /// Names still to come.
    remaining: u64,
    /// An entry was given.
    begun: bool,
}

impl Listing {
    fn new(call: &Call<'_>, start_after: Bytes) -> Self {
        let (owner, caller) = (call.state.owner.clone(), call.caller.clone());
        Self { owner, caller, path: call.path.clone(), start_after, remaining: 0, begun: false }
    }

    /// The next entries, each behind a comma but the very first.
    async fn next_page(&mut self) -> Result<String> {
        let (path, start_after) = (self.path.clone(), self.start_after.clone());
        let request = pb::ListRequest { path, start_after, limit: 0, with_locations: false };
        let page: pb::ListResponse = self.owner.call(self.caller.clone(), request).await?;
        let mut text = String::with_capacity(page.entries.len() * 320);
        for entry in &page.entries {
            if self.begun {
                text.push_str(",\n");
            }
            self.begun = true;
            text.push_str(&json::entry(entry, &self.path).to_string());
        }
        let last = page.entries.last().and_then(|entry| split_last(&entry.path));
        self.remaining = match last {
            Some((_, name)) => {
                self.start_after = Bytes::copy_from_slice(name.as_bytes());
                page.remaining
            }
            None => 0,
        };
        Ok(text)
    }
}

/// A length as the core takes it, where 0 stands for "to the end"; `None`: nothing is asked for.
pub(super) fn length_of(parameters: &webhdfs::Parameters) -> Result<Option<u64>> {
    Ok(match parameters.number("length")? {
        None => Some(0),
        Some(0) => None,
        Some(length) => Some(length),
    })
}

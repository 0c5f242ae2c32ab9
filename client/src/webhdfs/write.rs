//! `CREATE` and `APPEND`: the body of a request as the bytes of a file.

use std::sync::Arc;

use cairn_common::net::http::{self, Incoming};
use cairn_proto::webhdfs::{Parameters, no_file, overwrites};
use tokio::sync::watch;

use super::users::Users;
use super::{Call, Rest, stopping};
use crate::fs::{AppendOptions, CreateOptions, Error, ErrorCode, FileSystem, FileWriter, Result};

/// Of a new file if nothing is said.
const FILE_MODE: u32 = 0o644;

/// What becomes of the bytes.
#[derive(PartialEq, Eq, Debug)]
pub enum Plan {
    Create(CreateOptions),
    Append,
}

impl Plan {
    /// `op` is `CREATE` or `APPEND`.
    pub fn of(op: &str, parameters: &Parameters) -> Result<Self> {
        if op != "CREATE" {
            return Ok(Self::Append);
        }
        // `unmaskedpermission` only matters below a default ACL, of which there are none; `permission` is masked already.
        Ok(Self::Create(CreateOptions {
            overwrite: overwrites(parameters)?,
            replication: parameters.small_number("replication")?.unwrap_or(0),
            block_size: parameters.number("blocksize")?.unwrap_or(0),
            permission: parameters.permission("permission")?.unwrap_or(FILE_MODE) & 0o777,
            create_parents: parameters.flag_or("createparent", true)?,
            ..CreateOptions::default()
        }))
    }
}

/// One upload, from the first byte to its end or to its being taken back.
pub struct Upload {
    pub call: Call,
    pub plan: Plan,
    pub users: Arc<Users>,
    pub stop: watch::Receiver<bool>,
}

impl Upload {
    /// Gives the body back, for what is left in it.
    pub async fn run(mut self, mut body: Rest) -> (Result<()>, Rest) {
        let result = self.write(&mut body).await;
        (result, body)
    }

    async fn write(&mut self, body: &mut Rest) -> Result<()> {
        let (fs, path) = (&self.call.fs, &self.call.path);
        let opened = match &self.plan {
            Plan::Create(options) => fs.create(path, options.clone()).await,
            Plan::Append => fs.append(path, AppendOptions::default()).await,
        };
        if opened.as_ref().is_err_and(is_ambiguous) {
            // It may be open under a lease that other uploads of this user would renew.
            self.users.forget(fs.user());
        }
        let mut writer = opened.map_err(|error| no_file(error, path))?;
        let inode = writer.inode();
        body.begun = true;
        let taken = tokio::select! { biased;
            // An error means that the gate is gone, and with it the datanode.
            _ = self.stop.wait_for(|&stop| stop) => Err(stopping()),
            taken = take(fs, &mut body.body, &mut writer) => taken,
        };
        let (ended, writer) = match taken {
            Ok(()) => (writer.close().await.map(drop), None),
            Err(error) => (Err(error), Some(writer)),
        };
        let Err(error) = ended else { return Ok(()) };
        tracing::info!(%path, %error, "a WebHDFS upload is given up");
        let left = match (writer, &self.plan) {
            (Some(writer), _) => writer.abort().await,
            (None, Plan::Create(_)) => fs.take_back(path, inode).await,
            (None, Plan::Append) => fs.release_lease(inode).await,
        };
        if let Err(left) = left {
            tracing::warn!(%path, error = %left, "what was written of it stays until its lease runs out");
            self.users.forget(fs.user());
        }
        Err(error)
    }
}

/// The namenode may have done it all the same.
fn is_ambiguous(error: &Error) -> bool {
    error.is_retryable() || matches!(error.code(), ErrorCode::TimedOut | ErrorCode::Internal)
}

async fn take(fs: &FileSystem, body: &mut Incoming, writer: &mut FileWriter) -> Result<(), Error> {
    let mut pieces = http::Pieces::new(body, &fs.env().clock);
    while let Some(piece) = pieces.next().await? {
        writer.write_bytes(piece).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(query: &str) -> Result<Plan> {
        Plan::of("CREATE", &Parameters::parse(query)?)
    }

    #[test]
    fn a_create_says_what_the_file_is_like() {
        let Plan::Create(options) = plan("").unwrap() else { panic!() };
        let expected = CreateOptions { create_parents: true, ..CreateOptions::default() };
        assert_eq!(options, expected);
        let all =
            "overwrite=True&replication=2&blocksize=1048576&permission=600&unmaskedpermission=777&createparent=false";
        let Plan::Create(options) = plan(all).unwrap() else { panic!() };
        let expected = CreateOptions {
            overwrite: true,
            replication: 2,
            block_size: 1 << 20,
            permission: 0o600,
            create_parents: false,
            ..CreateOptions::default()
        };
        assert_eq!(options, expected);
        let Plan::Create(options) = plan("createflag=create,overwrite").unwrap() else { panic!() };
        assert!(options.overwrite);
        for bad in ["createflag=append", "replication=many", "blocksize=-1", "permission=9", "createparent=perhaps"] {
            assert!(plan(bad).is_err(), "{bad}");
        }
    }
}

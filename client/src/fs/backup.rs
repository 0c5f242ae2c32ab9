//! Backups of the namenode, and the word that a restore was the right one.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use cairn_common::Env;
use cairn_common::durable::{File, OpenMode};
use cairn_common::net::rpc;
use cairn_proto::backupfile::{BackupCheck, BackupHeader};
use cairn_proto::{Error, ErrorCode, Result, pb};

use super::FileSystem;
use super::namenode::Patience;

/// A stream that gives nothing for this long has failed.
const STALLED: std::time::Duration = std::time::Duration::from_secs(60);

/// A backup that was made.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BackupSummary {
    /// Transaction of its image; 0: none, it goes back to the beginning.
    pub image_txid: u64,
    /// Its last transaction.
    pub last_txid: u64,
    /// Bytes of the file.
    pub bytes: u64,
}

/// The file while it is written, under a name of its own.
struct Aside {
    env: Env,
    path: PathBuf,
    file: Arc<dyn File>,
}

impl Aside {
    async fn create(env: &Env, path: &Path) -> Result<Self> {
        let path = path.to_owned();
        let (fs, at) = (Arc::clone(&env.fs), path.clone());
        let made = env.work.io(move || fs.open(&at, OpenMode::Create));
        let file = made.await.map_err(|error| Error::io(format!("cannot make {}", path.display()), &error))?;
        Ok(Self { env: env.clone(), path, file })
    }

    async fn write(&self, at: u64, bytes: bytes::Bytes) -> Result<()> {
        let file = Arc::clone(&self.file);
        let written = self.env.work.io(move || file.write_all_at(&bytes, at)).await;
        written.map_err(|error| Error::io(format!("cannot write {}", self.path.display()), &error))
    }

    /// Durable under the name that it shall have.
    async fn finish(self, target: &Path) -> Result<()> {
        let (fs, file, from, to) = (Arc::clone(&self.env.fs), self.file, self.path, target.to_owned());
        let finished = self.env.work.io(move || {
            file.sync_data()?;
            fs.rename(&from, &to)?;
            let folder = to.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
            fs.sync_dir(folder)
        });
        finished.await.map_err(|error| Error::io(format!("cannot finish {}", target.display()), &error))
    }

    async fn remove(self) {
        let (fs, path) = (Arc::clone(&self.env.fs), self.path);
        // Best effort: its name says that it is not whole.
        let _ = self.env.work.io(move || fs.remove_file(&path)).await;
    }
}

impl FileSystem {
    /// Writes a backup of the namenode to the local file `path`: to `aside` in the same folder, which must not exist, checked, synced, then
    /// renamed, so that a file of the name `path` is a whole backup. Nothing is left of `aside`, unless the caller goes away. For superusers.
    pub async fn backup_namenode(&self, path: &Path, aside: &Path) -> Result<BackupSummary> {
        let is_dir = {
            let (fs, at) = (Arc::clone(&self.env().fs), path.to_owned());
            self.env()
                .work
                .io(move || fs.metadata(&at))
                .await
                .is_ok_and(|found| found.is_some_and(|found| found.is_dir))
        };
        if is_dir {
            let text = format!("{} is a folder: give the name of a file", path.display());
            return Err(Error::new(ErrorCode::InvalidArgument, text).with_subject(path.display().to_string()));
        }
        let send =
            |mut stub: pb::namenode_client::NamenodeClient<_>, request| async move { stub.backup(request).await };
        let pieces = self.inner.namenode.call(Patience::Caller, pb::BackupRequest {}, send).await?;
        let aside = Aside::create(self.env(), aside).await?;
        match self.receive(pieces, &aside).await {
            Ok((header, bytes)) => {
                aside.finish(path).await?;
                Ok(BackupSummary { image_txid: header.image.0, last_txid: header.last.0, bytes })
            }
            Err(error) => {
                aside.remove().await;
                Err(error)
            }
        }
    }

    async fn receive(
        &self,
        mut pieces: tonic::Streaming<pb::BackupChunk>,
        aside: &Aside,
    ) -> Result<(BackupHeader, u64)> {
        let (mut check, mut at) = (BackupCheck::default(), 0);
        let wrong = |error: cairn_proto::backupfile::BackupError| error.of("what the namenode sent");
        loop {
            let piece = self.env().clock.timeout(STALLED, pieces.message()).await;
            let piece = piece
                .map_err(|elapsed| Error::new(ErrorCode::TimedOut, format!("the backup has stalled: {elapsed}")))?;
            let Some(piece) = piece.map_err(rpc::error)? else { break };
            check.feed(&piece.data).map_err(wrong)?;
            let length = piece.data.len() as u64;
            aside.write(at, piece.data).await?;
            at += length;
        }
        let (header, _) = check.finish().map_err(wrong)?;
        Ok((header, at))
    }

    /// After a restore: the namespace is the right one, so what it does not know may be put away. The transaction that was
    /// restored to; 0: there was nothing to confirm.
    pub async fn confirm_restore(&self) -> Result<u64> {
        let send = |mut stub: pb::namenode_client::NamenodeClient<_>, request| async move {
            stub.confirm_restore(request).await
        };
        let answer = self.inner.namenode.call(Patience::Caller, pb::ConfirmRestoreRequest {}, send).await?;
        Ok(answer.restored_to_txid)
    }
}

//! Finished map outputs, as the data plane serves them.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use bytes::Bytes;
use cairn_common::Env;
use cairn_common::durable::{File, Fs, OpenMode};
use cairn_proto::mapoutput::{FOOTER_BYTES, Footer, INDEX_ENTRY_BYTES, PartitionEntry};
use cairn_proto::{Error, ErrorCode, Result, pb};

use crate::MapOutputs;

/// Finds partitions of map outputs for `ReadMapOutput`.
pub struct JobOutputs {
    env: Env,
    jobs: RwLock<HashMap<String, Served>>,
}

#[derive(Clone)]
struct Served {
    dir: PathBuf,
    token: Bytes,
}

/// Name of a finished map output in its job's `out/` folder.
pub fn output_name(map_index: u32, attempt: u32) -> String {
    format!("map-{map_index:05}-{attempt}")
}

impl JobOutputs {
    pub(super) fn new(env: Env) -> Self {
        Self { env, jobs: RwLock::default() }
    }

    pub(super) fn add_job(&self, job_id: &str, dir: PathBuf, token: Bytes) {
        let mut jobs = self.jobs.write().unwrap_or_else(PoisonError::into_inner);
        jobs.insert(job_id.to_owned(), Served { dir, token });
    }

    pub(super) fn remove_job(&self, job_id: &str) {
        self.jobs.write().unwrap_or_else(PoisonError::into_inner).remove(job_id);
    }
}

#[async_trait::async_trait]
impl MapOutputs for JobOutputs {
    /// The open file and the range of the asked partition. The bytes stay readable through the file when the job ends meanwhile.
    async fn open(&self, request: &pb::ReadMapOutput) -> Result<(Arc<dyn File>, Range<u64>)> {
        let job = self.jobs.read().unwrap_or_else(PoisonError::into_inner).get(&request.job_id).cloned();
        let Some(job) = job else {
            let text = format!("this node knows no job {:?}", request.job_id);
            return Err(Error::new(ErrorCode::FileNotFound, text).with_subject(request.job_id.clone()));
        };
        if job.token != request.token {
            let text = format!("the token does not open the map output of job {}", request.job_id);
            return Err(Error::new(ErrorCode::PermissionDenied, text).with_subject(request.job_id.clone()));
        }
        let path = job.dir.join(output_name(request.map_index, request.attempt));
        let (fs, partition) = (Arc::clone(&self.env.fs), request.partition);
        self.env.work.io(move || find(&*fs, &path, partition)).await
    }
}

fn find(fs: &dyn Fs, path: &Path, partition: u32) -> Result<(Arc<dyn File>, Range<u64>)> {
    let unread = |error: std::io::Error| match error.kind() {
        std::io::ErrorKind::NotFound => {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            Error::new(ErrorCode::FileNotFound, format!("this node does not hold {name}")).with_subject(name)
        }
        _ => Error::io(format!("cannot read {}", path.display()), &error),
    };
    let named = |error: Error| Error::new(error.code(), format!("{}: {}", path.display(), error.message()));
    let file = fs.open(path, OpenMode::Read).map_err(unread)?;
    let length = file.len().map_err(unread)?;
    let mut footer = [0; FOOTER_BYTES];
    let at = length.checked_sub(FOOTER_BYTES as u64).ok_or_else(|| {
        Error::new(ErrorCode::Corrupt, format!("{}: {length} bytes are no map output", path.display()))
    })?;
    file.read_exact_at(&mut footer, at).map_err(unread)?;
    let footer = Footer::decode(&footer, length).map_err(named)?;
    let mut entry = [0; INDEX_ENTRY_BYTES];
    file.read_exact_at(&mut entry, footer.entry_offset(partition).map_err(named)?).map_err(unread)?;
    let entry = PartitionEntry::decode(&entry, partition).map_err(named)?;
    let end = entry.offset.checked_add(entry.stored).filter(|end| *end <= footer.index_offset);
    let end = end.ok_or_else(|| Error::new(ErrorCode::Corrupt, format!("{}: the index is wrong", path.display())))?;
    Ok((file, entry.offset..end))
}

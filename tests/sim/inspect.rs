//! A fresh client that looks at the healed cluster: its report, every file, every byte.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use cairn_client::fs::{ClusterReportResponse, Error, ErrorCode, FileKind, FileSystem, LocatedBlock};

use super::cluster::client_settings;
use super::machine::Machine;

/// For one file; one that cannot be read must not hide the others.
const FILE_LIMIT: Duration = Duration::from_secs(20);

/// A file as it was found.
#[derive(Clone)]
pub struct Found {
    /// Its bytes, or why they cannot be read; empty when they were not asked for.
    pub bytes: Result<Vec<u8>, String>,
    /// Its blocks and where they lie.
    pub blocks: Vec<LocatedBlock>,
    /// A writer has it open.
    pub open: bool,
    /// How many replicas it asks for.
    pub replication: u32,
    /// Length that the namenode tells.
    pub length: u64,
}

impl Found {
    /// What a restart must not change.
    pub fn facts(&self) -> (u64, u32, Vec<(i64, u64, u64)>) {
        let block = |block: &LocatedBlock| {
            let id = block.block.clone().unwrap_or_default();
            (id.id, id.generation, block.length)
        };
        (self.length, self.replication, self.blocks.iter().map(block).collect())
    }
}

/// What was asked for and what was found.
#[derive(Default)]
pub struct Desk {
    /// Set to have a look; taken when the look begins. True: with all bytes.
    pub wanted: Option<bool>,
    /// The last look.
    pub seen: Option<Result<Look, String>>,
}

/// One look at the cluster.
pub struct Look {
    /// The namenode's report.
    pub report: ClusterReportResponse,
    /// Every file.
    pub files: BTreeMap<String, Found>,
}

/// The inspector's process.
pub async fn run(machine: Rc<Machine>, desk: Rc<RefCell<Desk>>) -> turmoil::Result {
    tokio::task::yield_now().await;
    let env = machine.boot();
    loop {
        let wanted = desk.borrow_mut().wanted.take();
        if let Some(bytes) = wanted {
            let look = async {
                let fs = FileSystem::connect(env.clone(), client_settings()).await?;
                look(&fs, bytes).await
            };
            let limit = Duration::from_secs(if bytes { 600 } else { 60 });
            let seen = match env.clock.timeout(limit, look).await {
                Ok(seen) => seen.map_err(|error| error.to_string()),
                Err(elapsed) => Err(elapsed.to_string()),
            };
            desk.borrow_mut().seen = Some(seen);
        }
        env.clock.sleep(Duration::from_millis(50)).await;
    }
}

async fn look(fs: &FileSystem, bytes: bool) -> Result<Look, Error> {
    let report = fs.cluster_report().await?;
    let mut files = BTreeMap::new();
    let mut walk = fs.walk("/").await?;
    while let Some(status) = walk.next().await? {
        if status.kind() != FileKind::File {
            continue;
        }
        let blocks = fs.block_locations(&status.path, 0, 0).await?;
        let bytes = match bytes {
            true => read(fs, &status.path).await.map_err(|error| error.to_string()),
            false => Ok(Vec::new()),
        };
        let (open, replication, length) = (status.open, status.replication, status.length);
        files.insert(status.path, Found { bytes, blocks, open, replication, length });
    }
    Ok(Look { report, files })
}

async fn read(fs: &FileSystem, path: &str) -> Result<Vec<u8>, Error> {
    let whole = async {
        let file = fs.open(path).await?;
        Ok(file.read_range(0, file.length()).await?.to_vec())
    };
    match fs.env().clock.timeout(FILE_LIMIT, whole).await {
        Ok(read) => read,
        Err(elapsed) => Err(Error::new(ErrorCode::TimedOut, elapsed.to_string())),
    }
}

//! The `VERSION` file of a volume: whose it is.
//!
//! ```toml
//! role = "datanode"
//! layout = 1
//! cluster_id = ""      # empty until the first registration
//! pool_id = ""
//! node_id = "…"
//! storage_id = "…"
//! epoch = 0            # highest seen from a namenode; a lower one is refused
//! ```

use std::path::Path;

use cairn_common::durable::{self, Fs};
use cairn_proto::{Error, ErrorCode, Result};
use serde::Deserialize;

/// Layout that this program writes and reads.
pub const LAYOUT: u32 = 1;
const NAME: &str = "VERSION";
const LIMIT: u64 = 64 << 10;

/// Contents of `VERSION`.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
pub struct Version {
    /// "datanode".
    pub role: String,
    /// Layout of the folder.
    pub layout: u32,
    /// Empty until the first registration.
    pub cluster_id: String,
    /// Empty until the first registration.
    pub pool_id: String,
    /// The datanode.
    pub node_id: String,
    /// The volume.
    pub storage_id: String,
    /// Highest epoch seen.
    pub epoch: u64,
}

#[derive(Deserialize)]
struct Probe {
    role: Option<String>,
    layout: Option<u32>,
}

impl Version {
    /// Whether the node has been registered with a cluster.
    pub fn is_joined(&self) -> bool {
        !self.cluster_id.is_empty()
    }

    /// Reads it; `None` if there is none.
    pub fn read(fs: &dyn Fs, dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(NAME);
        let shown = path.display();
        let present = fs.metadata(&path).map_err(|error| Error::io(&shown, &error))?;
        if present.is_none() {
            return Ok(None);
        }
        let bytes = durable::read_all(fs, &path, LIMIT).map_err(|error| Error::io(&shown, &error))?;
        let damaged = |why: String| {
            Error::new(ErrorCode::Corrupt, format!("{shown} cannot be read: {why}")).with_subject(shown.to_string())
        };
        let text = String::from_utf8(bytes).map_err(|_| damaged("it is not text".into()))?;
        let probe: Probe = toml::from_str(&text).map_err(|error| damaged(error.message().to_owned()))?;
        if probe.role.as_deref() != Some("datanode") {
            let role = probe.role.unwrap_or_else(|| "something else".into());
            let text = format!("{} belongs to a {role}, not to a datanode: give another --dir", dir.display());
            return Err(Error::new(ErrorCode::InvalidArgument, text).with_subject(shown.to_string()));
        }
        if probe.layout != Some(LAYOUT) {
            let layout = probe.layout.map_or("no".to_owned(), |layout| layout.to_string());
            let text =
                format!("{shown} has layout {layout}, this program knows {LAYOUT}: run the release that wrote it");
            return Err(Error::new(ErrorCode::UnsupportedVersion, text).with_subject(shown.to_string()));
        }
        toml::from_str(&text).map(Some).map_err(|error| damaged(error.message().to_owned()))
    }

    /// Writes it durably.
    pub fn write(&self, fs: &dyn Fs, dir: &Path) -> Result<()> {
        // JSON's way to write a text is TOML's too, but for one control character that JSON takes as it is.
        let quoted = |text: &str| serde_json::Value::String(text.to_owned()).to_string().replace('\u{7f}', "\\u007f");
        let text = format!(
            "role = \"datanode\"\nlayout = {}\ncluster_id = {}\npool_id = {}\nnode_id = {}\nstorage_id = {}\nepoch = {}\n",
            self.layout,
            quoted(&self.cluster_id),
            quoted(&self.pool_id),
            quoted(&self.node_id),
            quoted(&self.storage_id),
            self.epoch
        );
        let path = dir.join(NAME);
        durable::write_atomic(fs, &path, text.as_bytes()).map_err(|error| Error::io(path.display(), &error))
    }
}

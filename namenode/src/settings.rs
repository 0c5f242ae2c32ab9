//! Settings of a namenode: plain data, checked once at start.

use std::path::PathBuf;

use cairn_common::net::check_listen;
use cairn_proto::{Error, ErrorCode, Result};
use serde::{Deserialize, Serialize};

use crate::backup::restore::RestorePlan;
use crate::core::CoreSettings;

/// Every knob of a namenode. Unknown keys are errors.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NamenodeSettings {
    /// Metadata directories. Each holds everything; more of them survive the loss of a disk, and every change waits for the
    /// slowest.
    pub dirs: Vec<PathBuf>,
    /// Start although a directory of the set is absent or empty: what only that one knew is lost.
    pub accept_missing_dir: bool,
    /// Folder on another disk or machine to which the log is copied while it is written; absent: nowhere. Together with a backup it
    /// brings back every change but those of the last second or so.
    pub archive: Option<PathBuf>,
    /// Fill the (empty) directories from a backup before serving: an order for this start, not a setting.
    #[serde(skip)]
    pub restore: Option<RestorePlan>,
    /// Where to serve RPC, "IP:PORT"; port 0 takes a free one.
    pub listen: String,
    /// Where to serve WebHDFS, status and metrics over HTTP; absent: nowhere.
    pub http: Option<String>,
    /// Names by which HTTP clients may call this machine, beside its own and IP addresses. Requests for other names are refused: a web page can
    /// give a loopback address any name.
    pub http_names: Vec<String>,
    /// Users of Hadoop's protocols and WebHDFS who may act for any other user (HDFS's `hadoop.proxyuser.NAME`), such as the one that a
    /// server of SQL runs as. More: each of them is everybody.
    pub proxy_users: Vec<String>,
    /// Serve addresses off loopback although nobody is authenticated: whoever reaches the port can be any user.
    pub insecure: bool,
    /// Group whose members have all rights.
    pub supergroup: String,
    /// The core's own.
    pub core: CoreSettings,
    /// An image is written after this many transactions. Fewer: more disk traffic; more: a longer replay at start.
    pub checkpoint_edits: u64,
    /// An image is written after this time if anything changed. Shorter and longer: as above.
    pub checkpoint_interval_ms: u64,
    /// After a failed checkpoint the next try waits this long. Shorter: a full disk is filled again and again.
    pub checkpoint_retry_ms: u64,
    /// zstd level of images. Higher: smaller files, more CPU beside the owner.
    pub image_level: i32,
    /// A log segment larger than this is followed by a new one. Smaller: more files; larger: log is freed later.
    pub segment_bytes: u64,
    /// Room written ahead in a segment. Smaller: more syncs that also write metadata; larger: longer first sync of a step.
    pub segment_step_bytes: u64,
    /// Batches that wait for the log. Fewer: the owner waits for the disk sooner; more: more memory when the disk is slow.
    pub journal_queue: usize,
    /// Events that wait for the owner. Fewer: callers wait outside sooner; more: memory, and longer waits under load.
    pub event_queue: usize,
    /// Connections to the RPC port. Fewer: clients are turned away; more: descriptors and memory.
    pub max_connections: usize,
    /// Concurrent calls of one connection. Fewer: a busy client waits for itself; more: one client can fill the queue.
    pub calls_per_connection: u32,
    /// Longest time between two looks at the timers. Longer: deadlines are noticed later; shorter: idle CPU.
    pub tick_ms: u64,
    /// How long the groups of a user are remembered. Longer: changes of `/etc/group` show later.
    pub groups_cache_ms: u64,
}

impl Default for NamenodeSettings {
    fn default() -> Self {
        Self {
            dirs: Vec::new(),
            accept_missing_dir: false,
            archive: None,
            restore: None,
            listen: "127.0.0.1:8020".into(),
            http: None,
            http_names: Vec::new(),
            proxy_users: Vec::new(),
            insecure: false,
            supergroup: "supergroup".into(),
            core: CoreSettings::default(),
            checkpoint_edits: 1_000_000,
            checkpoint_interval_ms: 3_600_000,
            checkpoint_retry_ms: 60_000,
            image_level: 1,
            segment_bytes: 64 << 20,
            segment_step_bytes: 1 << 20,
            journal_queue: 64,
            event_queue: 4_096,
            max_connections: 8_192,
            calls_per_connection: 1_024,
            tick_ms: 100,
            groups_cache_ms: 300_000,
        }
    }
}

impl NamenodeSettings {
    /// Checks every value; the message names the key.
    pub fn validate(&self) -> Result<()> {
        let bad = |text: String| Error::new(ErrorCode::InvalidArgument, text);
        if self.dirs.is_empty() {
            return Err(bad("dirs is empty: a namenode needs a metadata directory (--dir D)".into()));
        }
        for (index, dir) in self.dirs.iter().enumerate() {
            if dir.as_os_str().is_empty() {
                return Err(bad("dirs holds an empty path".into()));
            }
            if self.dirs[..index].contains(dir) {
                return Err(bad(format!("dirs names {} twice", dir.display())));
            }
        }
        if let Some(archive) = &self.archive {
            if archive.as_os_str().is_empty() {
                return Err(bad("archive is empty: give the folder's path".into()));
            }
            if let Some(dir) = self.dirs.iter().find(|dir| archive.starts_with(dir) || dir.starts_with(archive)) {
                let text =
                    format!("archive {} and metadata directory {} lie in each other", archive.display(), dir.display());
                return Err(bad(text));
            }
        }
        check_listen(&self.listen, self.insecure)?;
        if let Some(http) = &self.http {
            check_listen(http, self.insecure)?;
        }
        let range = |key: &str, value: u64, low: u64, high: u64| {
            if (low..=high).contains(&value) {
                Ok(())
            } else {
                Err(bad(format!("{key} = {value} is outside {low} to {high}")))
            }
        };
        range("checkpoint_edits", self.checkpoint_edits, 1, 1 << 40)?;
        range("checkpoint_interval_ms", self.checkpoint_interval_ms, 100, 30 * 24 * 3_600_000)?;
        range("checkpoint_retry_ms", self.checkpoint_retry_ms, 10, 24 * 3_600_000)?;
        if !(1..=19).contains(&self.image_level) {
            return Err(bad(format!("image_level = {} is outside 1 to 19", self.image_level)));
        }
        range("segment_bytes", self.segment_bytes, 4 << 10, 1 << 30)?;
        range("segment_step_bytes", self.segment_step_bytes, 0, 256 << 20)?;
        range("journal_queue", self.journal_queue as u64, 1, 10_000)?;
        range("event_queue", self.event_queue as u64, 16, 1_000_000)?;
        range("max_connections", self.max_connections as u64, 1, 1_000_000)?;
        range("calls_per_connection", self.calls_per_connection.into(), 1, 100_000)?;
        range("tick_ms", self.tick_ms, 1, 1_000)?;
        range("groups_cache_ms", self.groups_cache_ms, 0, 24 * 3_600_000)?;
        self.core.validate().map_err(|text| bad(format!("core.{text}")))?;
        // A longer gap between two looks at the clock counts as a pause.
        let heartbeat_ms = self.core.heartbeat_interval_ms;
        if self.tick_ms > heartbeat_ms {
            let text = format!("tick_ms = {} is longer than core.heartbeat_interval_ms = {heartbeat_ms}", self.tick_ms);
            return Err(bad(text));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(change: impl FnOnce(&mut NamenodeSettings)) -> Result<()> {
        let mut settings = NamenodeSettings { dirs: vec!["/d".into()], ..NamenodeSettings::default() };
        change(&mut settings);
        settings.validate()
    }

    #[test]
    fn a_refusal_names_the_key() {
        assert!(with(|_| ()).is_ok());
        let cases: [(Result<()>, &str); 7] = [
            (with(|s| s.dirs.clear()), "--dir"),
            (with(|s| s.dirs.push("/d".into())), "/d twice"),
            (with(|s| s.listen = "0.0.0.0:1".into()), "--insecure"),
            (with(|s| s.http = Some("nonsense".into())), "nonsense"),
            (with(|s| s.tick_ms = 0), "tick_ms"),
            (with(|s| s.core.max_replication = 0), "core.max_replication"),
            (with(|s| s.core.heartbeat_interval_ms = 50), "longer than core.heartbeat_interval_ms"),
        ];
        for (result, part) in cases {
            let error = result.unwrap_err();
            assert!(error.message().contains(part), "{error}");
        }
    }

    #[test]
    fn unknown_keys_are_errors() {
        assert!(toml::from_str::<NamenodeSettings>("checkpoint_edits = 5").is_ok());
        assert!(toml::from_str::<NamenodeSettings>("checkpoint_edit = 5").is_err());
    }
}

//! What a caller may choose about a client and about a new file.

use std::time::Duration;

use cairn_proto::{Error, ErrorCode, Result};

/// Knobs of a client; [`ClientSettings::default`] fits a cluster on one machine or in one room.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ClientSettings {
    /// `HOST:PORT` of the namenode.
    pub namenode: String,
    /// Whose rights apply; `None`: the user who runs this process.
    pub user: Option<String>,
    /// Node id of the datanode that this process runs beside, if it was told (tasks are): its replicas are read first, and it gets the first
    /// replica of what is written.
    pub local_node: Option<String>,
    /// Rack of that datanode; replicas there are read before those of other racks.
    pub local_rack: Option<String>,
    /// Read blocks of this host from their files instead of through a socket, where that is possible.
    pub short_circuit: bool,
    /// How long the first connection is tried again while nothing listens. Longer: a client started together with its
    /// namenode finds it; shorter: a wrong address is told sooner.
    pub first_connect_ms: u64,
    /// Longest wait for a connection to open. Too short: busy nodes are taken for dead ones.
    pub connect_timeout_ms: u64,
    /// Longest wait for one answer of the namenode before the call is repeated. Too short: slow calls are sent twice
    /// (harmless, but work); too long: a hanging namenode is noticed late.
    pub rpc_timeout_ms: u64,
    /// How long a call is repeated while the namenode is away. Longer rides out a restart, shorter tells sooner.
    pub retry_deadline_ms: u64,
    /// How long a call (not of an open writer) waits for safe mode to end before it says so.
    pub safe_mode_wait_ms: u64,
    /// File data in a frame. Larger compresses better; smaller makes positioned reads cheaper.
    pub frame_bytes: u64,
    /// File data that a writer holds until the pipeline has acknowledged it. Smaller: less memory, less throughput
    /// over distance.
    pub write_window_bytes: u64,
    /// The first node of a pipeline that says nothing for so long, although it owes an answer, is left out. A node that lives speaks several
    /// times a second then, also while its disk or the nodes below are slow, and it names a silent neighbour itself, a little sooner than this
    /// (the datanodes' `pipeline_timeout_ms`). Shorter: a busy node is left out; longer: a stopped one holds the writer up.
    pub write_stall_ms: u64,
    /// A pipeline whose nodes all speak, but which gets nothing done for so long, loses the node that the others wait for. Must be longer than
    /// the datanodes' `disk_stall_ms`, by which a node with a hung disk leaves on its own.
    pub finish_stall_ms: u64,
    /// How often a broken pipeline is mended (per block, while nothing new is acknowledged) before the write fails.
    pub pipeline_attempts: u32,
    /// How long a block whose pipeline has too few nodes for `sync` or `close` (two, if file and cluster allow it) looks for another one
    /// before the write fails. Longer than the namenode's stale interval: by then it knows which nodes are gone, and fewer are enough.
    pub replace_deadline_ms: u64,
    /// File data that a sequential reader fetches ahead of its caller.
    pub read_ahead_bytes: u64,
    /// A datanode that sends nothing for so long is left for the next replica.
    pub read_stall_ms: u64,
    /// A datanode that sends nothing for so long gets a rival: another replica is asked too, and the first to send goes on; 0: never. Shorter:
    /// slow disks and nodes are felt less; too short, and much is read twice.
    pub hedged_after_ms: u64,
    /// How often the locations of a block are asked for again after all its replicas failed.
    pub read_rounds: u32,
    /// How long a datanode that could not be reached is tried last.
    pub avoid_node_ms: u64,
    /// How often leases of open files are renewed.
    pub lease_renew_ms: u64,
    /// How long `close` waits for the replicas to be reported to the namenode.
    pub complete_deadline_ms: u64,
}

impl Default for ClientSettings {
    fn default() -> Self {
        Self {
            namenode: "127.0.0.1:8020".into(),
            user: None,
            local_node: None,
            local_rack: None,
            short_circuit: true,
            first_connect_ms: 1_500,
            connect_timeout_ms: 5_000,
            rpc_timeout_ms: 30_000,
            retry_deadline_ms: 60_000,
            safe_mode_wait_ms: 5_000,
            frame_bytes: cairn_proto::frame::DEFAULT_FRAME_RAW_BYTES as u64,
            write_window_bytes: 24 << 20,
            write_stall_ms: 4_000,
            finish_stall_ms: 60_000,
            pipeline_attempts: 6,
            replace_deadline_ms: 10_000,
            read_ahead_bytes: 8 << 20,
            read_stall_ms: 15_000,
            hedged_after_ms: 0,
            read_rounds: 3,
            avoid_node_ms: 30_000,
            lease_renew_ms: 10_000,
            complete_deadline_ms: 60_000,
        }
    }
}

impl ClientSettings {
    /// The default knobs for the namenode at `address`.
    pub fn at(address: impl Into<String>) -> Self {
        Self { namenode: address.into(), ..Self::default() }
    }

    /// Says which knob has a value that cannot work.
    pub fn validate(&self) -> Result<()> {
        let refuse = |key: &str, why: String| {
            Err(Error::new(ErrorCode::InvalidArgument, format!("setting client.{key}: {why}")).with_subject(key))
        };
        let port = self.namenode.rsplit_once(':').map(|(host, port)| (host, port.parse::<u16>()));
        if !matches!(port, Some((host, Ok(_))) if !host.is_empty()) {
            return refuse("namenode", format!("{:?} is not HOST:PORT", self.namenode));
        }
        if self.user.as_deref().is_some_and(str::is_empty) {
            return refuse("user", "the name is empty".into());
        }
        let frame_limit = cairn_proto::frame::MAX_FRAME_RAW_BYTES as u64;
        if !(1..=frame_limit).contains(&self.frame_bytes) {
            return refuse("frame_bytes", format!("{} is not 1 to {frame_limit}", self.frame_bytes));
        }
        for (key, value) in
            [("write_window_bytes", self.write_window_bytes), ("read_ahead_bytes", self.read_ahead_bytes)]
        {
            if value < self.frame_bytes || value > 1 << 30 {
                return refuse(key, format!("{value} is not between frame_bytes ({}) and 1 GiB", self.frame_bytes));
            }
        }
        for (key, value) in [
            ("connect_timeout_ms", self.connect_timeout_ms),
            ("rpc_timeout_ms", self.rpc_timeout_ms),
            ("write_stall_ms", self.write_stall_ms),
            ("finish_stall_ms", self.finish_stall_ms),
            ("replace_deadline_ms", self.replace_deadline_ms),
            ("read_stall_ms", self.read_stall_ms),
            ("lease_renew_ms", self.lease_renew_ms),
        ] {
            if value == 0 {
                return refuse(key, "it must be at least 1".into());
            }
        }
        Ok(())
    }

    pub(crate) fn hedged_after(&self) -> Option<Duration> {
        (self.hedged_after_ms > 0).then(|| Duration::from_millis(self.hedged_after_ms))
    }

    pub(crate) fn connect_timeout(&self) -> Duration {
        Duration::from_millis(self.connect_timeout_ms)
    }
}

/// What a new file is like; zeros leave the choice to the namenode.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CreateOptions {
    /// Replace a file of that name (never a directory); else an existing one is an error.
    pub overwrite: bool,
    /// Replicas of each block, 1 to 512; 0: the cluster's default.
    pub replication: u32,
    /// File data in a block, bytes; 0: the cluster's default.
    pub block_size: u64,
    /// Compress frames that shrink.
    pub compress: bool,
    /// `rwxrwxrwx` in the low nine bits, already masked.
    pub permission: u32,
    /// Make parent directories that are missing; else they are an error.
    pub create_parents: bool,
}

impl Default for CreateOptions {
    fn default() -> Self {
        Self {
            overwrite: false,
            replication: 0,
            block_size: 0,
            compress: true,
            permission: 0o644,
            create_parents: false,
        }
    }
}

/// How data is added to a file that is there.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AppendOptions {
    /// Compress frames that shrink.
    pub compress: bool,
}

impl Default for AppendOptions {
    fn default() -> Self {
        Self { compress: true }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid_and_bad_values_are_named() {
        ClientSettings::default().validate().unwrap();
        let named = |settings: ClientSettings| settings.validate().unwrap_err().subject().to_owned();
        assert_eq!(named(ClientSettings::at("nowhere")), "namenode");
        assert_eq!(named(ClientSettings::at(":8020")), "namenode");
        assert_eq!(named(ClientSettings { frame_bytes: 0, ..Default::default() }), "frame_bytes");
        assert_eq!(named(ClientSettings { read_ahead_bytes: 1, ..Default::default() }), "read_ahead_bytes");
        assert_eq!(named(ClientSettings { user: Some(String::new()), ..Default::default() }), "user");
    }
}

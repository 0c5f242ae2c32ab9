//! What an operator may set on a datanode: plain data, checked once at start.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use cairn_common::net;
use cairn_proto::{Error, ErrorCode, Result};
use serde::{Deserialize, Serialize};

use crate::store::map::RANGE_LIMIT;

/// Knobs of a datanode. Each says what gets worse in either direction.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DatanodeSettings {
    /// Namenode's RPC address, "HOST:PORT".
    pub namenode: String,
    /// One folder per volume; each is a storage of its own.
    pub dirs: Vec<PathBuf>,
    /// Data port, "IP:PORT" (port 0 takes a free one).
    pub listen: String,
    /// Address told to the namenode, and by it to clients and other nodes, "HOST:PORT"; none: the one of `listen`. For a node behind NAT, a
    /// port forward or a proxy; nobody checks that it leads back here.
    pub advertise: Option<String>,
    /// Where WebHDFS, `/metrics` and `/health` are served; none: nowhere.
    pub http: Option<String>,
    /// Address of that told to the namenode, and by it to HTTP clients, "HOST:PORT"; none: the one of `http`. As `advertise`.
    pub advertise_http: Option<String>,
    /// Names by which HTTP clients may call this machine, beside its own, those of the addresses that are told, and IP addresses. Requests for
    /// other names are refused: a web page can give a loopback address any name.
    pub http_names: Vec<String>,
    /// Name shown to people and schedulers; none: the machine's.
    pub host: Option<String>,
    /// Place in the network, such as "/rack2".
    pub rack: String,
    /// Bytes that blocks may take on all volumes together; none: what the file systems have.
    pub capacity_bytes: Option<u64>,
    /// Bytes of each file system that blocks never take. Higher: less room for blocks; lower: logs and other programs may find the disk full.
    pub reserved_bytes: u64,
    /// Volumes that may fail before the node ends; none: all but one. Fewer: a node with a bad disk leaves the cluster, and all its blocks are
    /// copied; more: it goes on with less room.
    pub failed_volumes_tolerated: Option<usize>,
    /// Pause between two checks of each volume (a few bytes written, synced, read). Longer: an idle dead disk is noticed later.
    pub volume_check_interval_ms: u64,
    /// A check that takes longer has failed. Shorter: a busy disk is taken for dead; longer: a hanging one is noticed later.
    pub volume_check_timeout_ms: u64,
    /// Bytes a second and volume that the scanner reads; 0: it does not run. Higher: a pass over a large volume takes less time, and clients
    /// less of the disk; too low, and blocks are not checked within `scan_period_ms`.
    pub scan_bytes_per_second: u64,
    /// Each block is checked about once in this time. Longer: damage that nobody reads stays unseen for longer.
    pub scan_period_ms: u64,
    /// Pause of the scanner between two looks for blocks that are due.
    pub scan_pause_ms: u64,
    /// Pause between two comparisons of the folders with what is known to be in them; 0: none. Longer: a file that was removed by hand is
    /// noticed later (or when it is read).
    pub directory_scan_interval_ms: u64,
    /// How long replicas stay in quarantine that the namenode does not know. Shorter: less time to find out that it was started from the wrong
    /// metadata; longer: their room is taken for longer.
    pub quarantine_ms: u64,
    /// Tasks that may run at once; 0: this node runs none.
    pub task_slots: u32,
    /// Take jobs although the data port is reachable from beyond this machine.
    pub allow_jobs: bool,
    /// Command of a task's worker process; empty: this program with `task-worker`.
    pub worker_command: Vec<String>,
    /// Command of a detached driver; empty: this program with `job resume`.
    pub driver_command: Vec<String>,
    /// User as whom tasks run, if the datanode is root; none: the datanode's own, who can read every block.
    pub task_user: Option<String>,
    /// What a job has on this node stays for so long without a driver, unless the job asks for another time. Longer: outputs of dead jobs take
    /// room; shorter: less time to resume one.
    pub job_lease_ms: u64,
    /// What tasks wrote to their standard error is kept for so long.
    pub task_log_keep_ms: u64,
    /// A job that has waited for a slot for so long without having one gets one of a job with more than its share. Shorter: more work is thrown
    /// away; longer: a job of long tasks keeps others out.
    pub task_starvation_ms: u64,
    /// Shares of slots of users against each other, as `NAME=SHARE`; 1 for who is not named.
    pub user_weights: Vec<String>,
    /// Bytes that jobs may keep on this node for the jobs after them, on the disk of their folders or in the page cache before it; 0: nothing is kept. More:
    /// iterations over more data find it here; less: more is left for other uses of memory.
    pub task_kept_bytes: u64,
    /// Have the kernel hold tasks to their limits, where this process may manage cgroups (v2); else memory is sampled and CPU not limited.
    pub task_cgroups: bool,
    /// Listen beyond loopback although nobody is authenticated yet.
    pub insecure: bool,
    /// Data-plane operations at once. Higher: more memory in the worst case; lower: busy clients are turned away.
    pub max_transfers: usize,
    /// Copies to other nodes at once; merges of short blocks get half as many beside them. Higher: repair disturbs clients more; lower: repair
    /// takes longer.
    pub replication_streams: usize,
    /// For dialling the next node. Higher: a dead node holds a writer up longer; lower: a busy one is taken for dead.
    pub connect_timeout_ms: u64,
    /// The next node of a pipeline is silent for this long although it owes an ack: it is left out. A node that lives says so four times
    /// as often, so this is well below the namenode's stale interval, and clients wait a little longer for their first node: who is next to
    /// the node that stalls sees it first. Lower: a busy node is left out; higher: a stopped one holds its writers up.
    pub pipeline_timeout_ms: u64,
    /// A disk that takes no data, or does not end a sync, for this long makes its node leave the pipeline. Lower: an overloaded disk loses its
    /// writers; higher: a hung one holds them up.
    pub disk_stall_ms: u64,
    /// Bytes that all writers together may hold on their way to the disk. Lower: many writers wait for each other; higher: more memory when
    /// the disks are slow.
    pub writer_memory_bytes: u64,
    /// Compress what Hadoop's clients write through this node and what shrinks. Off: the disks hold as much as HDFS would have there, and Hadoop's clients
    /// read it as quickly as data that does not shrink; on: text takes a fifth of the room, and of each core that reads it some.
    pub hadoop_compress: bool,
    /// A connection on which nothing is asked, or a writer that sends nothing, is cut after this.
    pub idle_timeout_ms: u64,
    /// Longest pause between two attempts to register.
    pub register_retry_max_ms: u64,
    /// Replicas in one message of a full report, 1 to 4,096. Fewer: a full report takes more messages and longer; more: each holds the namenode
    /// up for longer.
    pub report_range_blocks: usize,
}

impl Default for DatanodeSettings {
    fn default() -> Self {
        Self {
            namenode: "127.0.0.1:8020".into(),
            dirs: Vec::new(),
            listen: "127.0.0.1:9866".into(),
            advertise: None,
            http: None,
            advertise_http: None,
            http_names: Vec::new(),
            host: None,
            rack: "/default-rack".into(),
            capacity_bytes: None,
            reserved_bytes: 64 << 20,
            failed_volumes_tolerated: None,
            volume_check_interval_ms: 30_000,
            volume_check_timeout_ms: 60_000,
            scan_bytes_per_second: 8 << 20,
            scan_period_ms: 21 * 24 * 3_600_000,
            scan_pause_ms: 3_600_000,
            directory_scan_interval_ms: 6 * 3_600_000,
            quarantine_ms: 24 * 3_600_000,
            task_slots: 2,
            allow_jobs: false,
            worker_command: Vec::new(),
            driver_command: Vec::new(),
            task_user: None,
            job_lease_ms: 600_000,
            task_log_keep_ms: 24 * 3_600_000,
            task_starvation_ms: 60_000,
            user_weights: Vec::new(),
            task_kept_bytes: 1 << 30,
            task_cgroups: true,
            insecure: false,
            max_transfers: 1_024,
            replication_streams: 4,
            connect_timeout_ms: 5_000,
            pipeline_timeout_ms: 3_000,
            disk_stall_ms: 20_000,
            writer_memory_bytes: 256 << 20,
            hadoop_compress: true,
            idle_timeout_ms: 60_000,
            register_retry_max_ms: 2_000,
            report_range_blocks: RANGE_LIMIT,
        }
    }
}

fn invalid(text: String) -> Error {
    Error::new(ErrorCode::InvalidArgument, text)
}

impl DatanodeSettings {
    /// Checks everything that can be checked without touching the machine; the message names the key.
    pub fn validate(&self) -> Result<()> {
        net::check_listen(&self.listen, self.insecure)?;
        if let Some(http) = &self.http {
            net::check_listen(http, self.insecure)?;
        }
        check_address("namenode", &self.namenode)?;
        if let Some(advertise) = &self.advertise {
            check_address("advertise", advertise)?;
        }
        if let Some(advertise) = &self.advertise_http {
            check_address("advertise_http", advertise)?;
        }
        self.check_dirs()?;
        self.weights()?;
        check_rack(&self.rack)?;
        let plain = |c: char| !c.is_whitespace() && !c.is_control() && c != '/';
        if let Some(host) =
            self.host.as_ref().filter(|host| !(1..=253).contains(&host.len()) || !host.chars().all(plain))
        {
            return Err(invalid(format!("host: {host:?} is not a host name")));
        }
        if self.quarantine_ms > 366 * 24 * 3_600_000 {
            return Err(invalid(format!("quarantine_ms: {} is more than a year", self.quarantine_ms)));
        }
        if !(1..=RANGE_LIMIT).contains(&self.report_range_blocks) {
            let text =
                format!("report_range_blocks: {} is out of range (1 to {RANGE_LIMIT})", self.report_range_blocks);
            return Err(invalid(text));
        }
        if self.capacity_bytes.is_some_and(|bytes| bytes < 1 << 20) {
            return Err(invalid("capacity_bytes: less than 1 MiB holds no block".into()));
        }
        for (name, value) in [
            ("max_transfers", self.max_transfers as u64),
            ("replication_streams", self.replication_streams as u64),
            ("connect_timeout_ms", self.connect_timeout_ms),
            ("pipeline_timeout_ms", self.pipeline_timeout_ms),
            ("disk_stall_ms", self.disk_stall_ms),
            ("writer_memory_bytes", self.writer_memory_bytes),
            ("idle_timeout_ms", self.idle_timeout_ms),
            ("register_retry_max_ms", self.register_retry_max_ms),
        ] {
            if value == 0 || value > 1 << 30 {
                return Err(invalid(format!("{name}: {value} is out of range (1 to 2^30)")));
            }
        }
        for (name, value) in [
            ("volume_check_interval_ms", self.volume_check_interval_ms),
            ("volume_check_timeout_ms", self.volume_check_timeout_ms),
            ("scan_period_ms", self.scan_period_ms),
            ("scan_pause_ms", self.scan_pause_ms),
            ("job_lease_ms", self.job_lease_ms),
            ("task_log_keep_ms", self.task_log_keep_ms),
            ("task_starvation_ms", self.task_starvation_ms),
        ] {
            if value == 0 || value > 1 << 40 {
                return Err(invalid(format!("{name}: {value} is out of range (1 to 2^40)")));
            }
        }
        if self.directory_scan_interval_ms > 1 << 40 {
            return Err(invalid("directory_scan_interval_ms: more than 2^40".into()));
        }
        if self.failed_volumes_tolerated.is_some_and(|count| count >= self.dirs.len()) {
            let text = format!(
                "failed_volumes_tolerated: at least one of the {} volumes must be left in service",
                self.dirs.len()
            );
            return Err(invalid(text));
        }
        Ok(())
    }

    /// Shares of users, by name.
    pub(crate) fn weights(&self) -> Result<BTreeMap<String, u64>> {
        let parse = |text: &String| match text.split_once('=').map(|(name, share)| (name.trim(), share.trim().parse()))
        {
            Some((name, Ok(share @ 1..=1_000))) if !name.is_empty() => Ok((name.to_owned(), share)),
            _ => Err(invalid(format!("user_weights: {text:?} is not NAME=SHARE with a share of 1 to 1000"))),
        };
        self.user_weights.iter().map(parse).collect()
    }

    /// Volumes that may be out of service.
    pub(crate) fn failed_volumes_tolerated(&self) -> usize {
        self.failed_volumes_tolerated.unwrap_or_else(|| self.dirs.len().saturating_sub(1))
    }

    fn check_dirs(&self) -> Result<()> {
        if self.dirs.is_empty() {
            return Err(invalid("dirs: a datanode needs at least one folder (--dir)".into()));
        }
        if self.dirs.len() > 256 {
            return Err(invalid(format!("dirs: {} volumes are more than 256", self.dirs.len())));
        }
        for (at, dir) in self.dirs.iter().enumerate() {
            if dir.as_os_str().is_empty() {
                return Err(invalid("dirs: an empty name".into()));
            }
            if self.dirs[..at].contains(dir) {
                return Err(invalid(format!("dirs: {} is given twice", dir.display())));
            }
        }
        Ok(())
    }

    pub(crate) fn connect_timeout(&self) -> Duration {
        Duration::from_millis(self.connect_timeout_ms)
    }

    pub(crate) fn idle_timeout(&self) -> Duration {
        Duration::from_millis(self.idle_timeout_ms)
    }
}

fn check_address(key: &str, address: &str) -> Result<()> {
    match address.rsplit_once(':').map(|(host, port)| (host, port.parse::<u16>())) {
        Some((host, Ok(1..))) if !host.is_empty() => Ok(()),
        _ => Err(invalid(format!("{key}: {address:?} is not HOST:PORT"))),
    }
}

/// A rack is a path of one or more plain names.
fn check_rack(rack: &str) -> Result<()> {
    let plain = |part: &str| {
        !part.is_empty() && part != "." && part != ".." && part.chars().all(|c| !c.is_control() && !c.is_whitespace())
    };
    if rack.len() <= 255 && rack.strip_prefix('/').is_some_and(|rest| rest.split('/').all(plain)) {
        return Ok(());
    }
    Err(invalid(format!("rack: {rack:?} is not a path such as /rack2")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_name_the_key() {
        let good = DatanodeSettings { dirs: vec!["/d".into()], ..Default::default() };
        good.validate().unwrap();
        let bad = [
            (DatanodeSettings { dirs: vec![], ..good.clone() }, "dirs"),
            (DatanodeSettings { dirs: vec!["/d".into(), "/d".into()], ..good.clone() }, "twice"),
            (DatanodeSettings { rack: "r".into(), ..good.clone() }, "rack"),
            (DatanodeSettings { rack: "/a//b".into(), ..good.clone() }, "rack"),
            (DatanodeSettings { namenode: "nn".into(), ..good.clone() }, "namenode"),
            (DatanodeSettings { advertise: Some("outside".into()), ..good.clone() }, "advertise"),
            (DatanodeSettings { advertise: Some("outside:0".into()), ..good.clone() }, "advertise"),
            (DatanodeSettings { listen: "0.0.0.0:1".into(), ..good.clone() }, "--insecure"),
            (DatanodeSettings { max_transfers: 0, ..good.clone() }, "max_transfers"),
            (DatanodeSettings { report_range_blocks: 0, ..good.clone() }, "report_range_blocks"),
            (DatanodeSettings { report_range_blocks: 4_097, ..good.clone() }, "report_range_blocks"),
            (DatanodeSettings { capacity_bytes: Some(5), ..good.clone() }, "capacity_bytes"),
            (DatanodeSettings { user_weights: vec!["ann=0".into()], ..good.clone() }, "user_weights"),
            (DatanodeSettings { job_lease_ms: 0, ..good.clone() }, "job_lease_ms"),
        ];
        for (settings, word) in bad {
            let error = settings.validate().unwrap_err();
            assert!(error.message().contains(word), "{error}");
        }
    }
}

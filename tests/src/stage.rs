//! A cluster under a load that checks every answer ([`cairn_client::check`]): what each scenario of the chaos suite plays on.
//!
//! A scenario breaks something, shows that it broke, mends it, and calls [`Stage::finish`], which demands: nothing promised is lost or altered,
//! no operation is stuck, and within a minute the cluster is healthy, every replica verified.

use std::time::{Duration, Instant};

use cairn_client::check::{Checker, Load, Tally};
use cairn_client::fs::ClientSettings;
use cairn_common::Env;
use tokio::runtime::Runtime;

use crate::cluster::{Cluster, ClusterOptions};
use crate::wired::Wires;
use crate::{wait_for, wait_until};

/// From the last fault until everything is well again.
const HEALING: Duration = Duration::from_secs(60);
/// Longest operation. Clients give up before: see [`client_settings`].
const LIMIT: Duration = Duration::from_secs(100);

/// Seconds that a scenario with a free length goes on: `CAIRN_CHAOS_SECONDS`, or a few.
pub fn seconds(short: u64) -> Duration {
    let asked = std::env::var("CAIRN_CHAOS_SECONDS").ok().and_then(|text| text.parse().ok());
    Duration::from_secs(asked.unwrap_or(short))
}

/// Four datanodes in two racks, with intervals short enough to wait for: stale after 1.5 s, dead after 4 s.
pub fn four() -> ClusterOptions {
    ClusterOptions::new(4, 2).more(
        "[datanode]\nconnect_timeout_ms = 1500\npipeline_timeout_ms = 4000\nreserved_bytes = 1048576\nregister_retry_max_ms = 500",
    )
}

/// Patience of the load's clients: longer than any fault lasts, shorter than what the load calls stuck.
pub fn client_settings(namenode: &str) -> ClientSettings {
    ClientSettings {
        connect_timeout_ms: 1_500,
        rpc_timeout_ms: 4_000,
        retry_deadline_ms: 40_000,
        safe_mode_wait_ms: 20_000,
        write_stall_ms: 6_000,
        finish_stall_ms: 10_000,
        read_stall_ms: 4_000,
        avoid_node_ms: 3_000,
        lease_renew_ms: 2_000,
        complete_deadline_ms: 30_000,
        ..ClientSettings::at(namenode)
    }
}

/// What plays: cluster, proxies, load.
pub struct Stage {
    /// The cluster.
    pub cluster: Cluster,
    /// Its connections.
    pub wires: Wires,
    checker: Checker,
    runtime: Runtime,
    last_fault: Instant,
}

impl Stage {
    /// A cluster of four with the usual load.
    pub fn start() -> Self {
        Self::with(Cluster::wired(four()), |load| load)
    }

    /// A running cluster with a load that `change` has changed.
    pub fn with((cluster, wires): (Cluster, Wires), change: impl FnOnce(Load) -> Load) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let load = Load {
            writers: 3,
            readers: 2,
            max_file_bytes: 5 << 19,
            files_per_writer: 25,
            limit: LIMIT,
            ..Load::at("/load")
        };
        let settings = client_settings(&cluster.namenode.addr);
        let checker = runtime.block_on(Checker::start(&Env::system(), &settings, change(load))).unwrap();
        let stage = Self { cluster, wires, checker, runtime, last_fault: Instant::now() };
        // Something to lose.
        stage.wait_progress(8);
        stage
    }

    /// What the load has seen.
    pub fn tally(&self) -> Tally {
        self.checker.tally()
    }

    /// Waits until so many more files were written and at least one more was read: the load gets through.
    #[track_caller]
    pub fn wait_progress(&self, files: u64) {
        let before = self.tally();
        wait_for("the load gets on", LIMIT, || {
            let now = self.tally();
            let well = now.files_written >= before.files_written + files && now.reads > before.reads;
            if well { Ok(()) } else { Err(format!("before {before:?}, now {now:?}")) }
        });
    }

    /// Lets the load run against the fault for a while: this is the length of the fault, not a wait for something.
    pub fn endure(&self, time: Duration) {
        std::thread::sleep(time);
    }

    /// Kills a datanode, and sees it gone.
    pub fn kill(&mut self, node: usize) {
        let process = self.cluster.datanodes[node].process;
        self.cluster.kill_datanode(node);
        assert!(!process.runs(), "it is gone");
        self.fault();
    }

    /// Starts a killed datanode again.
    pub fn restart(&mut self, node: usize) {
        self.cluster.restart_datanode(node);
        assert!(self.cluster.datanodes[node].process.runs());
        self.fault();
    }

    /// Waits until nothing is missing or has too few replicas. Files that were closed a moment ago may still be copied, so this is asked again.
    #[track_caller]
    pub fn wait_repaired(&mut self) {
        wait_for("nothing is missing or under-replicated", HEALING, || {
            let run = self.cluster.cairn(&["--json", "admin", "report"]);
            let report: serde_json::Value = serde_json::from_slice(&run.stdout).map_err(|_| run.stderr)?;
            let well = report["missing"] == 0 && report["under_replicated"] == 0 && report["corrupt"] == 0;
            if well { Ok(()) } else { Err(report.to_string()) }
        });
        self.fault();
    }

    /// Stops a process with SIGSTOP, and sees it stopped.
    pub fn pause(&mut self, node: usize) {
        let process = self.cluster.datanodes[node].process;
        process.signal(libc::SIGSTOP);
        wait_until("the process is stopped", Duration::from_secs(10), || process.state() == Some('T'));
        self.fault();
    }

    /// Lets it go on.
    pub fn resume(&mut self, node: usize) {
        let process = self.cluster.datanodes[node].process;
        assert_eq!(process.state(), Some('T'), "it was stopped until now");
        process.signal(libc::SIGCONT);
        wait_until("the process goes on", Duration::from_secs(10), || process.state() != Some('T'));
        self.fault();
    }

    /// The clock of healing starts now.
    pub fn fault(&mut self) {
        self.last_fault = Instant::now();
    }

    /// Ends the load and demands what the suite promises; at least `files` must have been written and `reads` made.
    #[track_caller]
    pub fn finish(mut self, files: u64, reads: u64) -> Tally {
        self.runtime.block_on(self.checker.stop());
        let waited = Instant::now();
        // The load may have needed its time to end; the cluster has had that time, too.
        let left = HEALING.saturating_sub(self.last_fault.elapsed()).max(Duration::from_secs(10));
        self.cluster.wait_healthy(left);
        println!("healthy {:?} after the last fault, {:?} after the load", self.last_fault.elapsed(), waited.elapsed());
        // Who registers only now brings replicas that have been made elsewhere meanwhile.
        for (index, node) in self.cluster.datanodes.iter().enumerate() {
            if node.process.runs() {
                self.cluster.wait_state(index, "live", HEALING);
            }
        }
        self.cluster.wait_healthy(HEALING);
        let tally = self.runtime.block_on(self.checker.finish());
        println!("{tally:#?}");
        assert!(tally.is_clean(), "lost {:?}, altered {:?}, stuck {:?}", tally.lost, tally.altered, tally.stuck);
        assert!(tally.files_written >= files && tally.reads >= reads, "the load hardly ran: {tally:?}");
        wait_for("as many replicas as there should be, all of them verified", HEALING, || {
            let report = self.cluster.fsck(&["--verify"]);
            // A node that is silent for a moment is repaired; damage that only this look finds should have been found before.
            assert!(report["corrupt"] == 0, "{report}");
            let well =
                ["missing", "under_replicated", "over_replicated", "unverified"].iter().all(|key| report[*key] == 0);
            if well && report["verified_replicas"].as_u64() > Some(0) { Ok(()) } else { Err(report.to_string()) }
        });
        tally
    }
}

//! The hosts: a namenode, datanodes, clients, on one simulated network.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use cairn_client::fs::ClientSettings;
use cairn_common::kv::MemoryKv;
use cairn_datanode::{Datanode, DatanodeSettings, Extras};
use cairn_namenode::{Namenode, NamenodeSettings};

use super::deletions;
use super::machine::Machine;
use super::plan::{Host, Plan, Shape};
use super::trace::{self, note};

/// Virtual time of one step of the simulation.
pub const STEP: Duration = Duration::from_millis(5);
/// What the supervisor of a machine waits before it starts a process again that ended by itself, ms.
const RESPAWN_MS: u64 = 500;
/// Heartbeats, and what hangs on them, ms.
pub const HEARTBEAT_MS: u64 = 500;
/// Silence after which a node is dead, ms.
pub const DEAD_MS: u64 = 5_000;

/// Finalized replicas' folder is below it.
pub const DATANODE_DIR: &str = "/dn";

/// Whose disks forget to sync: a bug that is put in on purpose.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lying {
    /// Nobody's.
    Nobody,
    /// Those of all datanodes: they acknowledge what is not durable.
    Datanodes,
    /// The namenode's.
    Namenode,
}

impl Lying {
    fn is(self, host: Host) -> bool {
        match host {
            Host::Namenode => self == Self::Namenode,
            Host::Datanode(_) => self == Self::Datanodes,
            Host::Client(_) => false,
        }
    }
}

/// The machines of the simulation, and who is down.
pub struct Cluster {
    /// The network and the hosts on it.
    pub sim: turmoil::Sim<'static>,
    /// The machines that were not added later.
    pub machines: BTreeMap<Host, Rc<Machine>>,
    /// When a machine that is down starts again, virtual ms.
    pub down_until: BTreeMap<Host, u64>,
    /// The shape.
    pub shape: Shape,
}

/// More hosts than a simulation has.
const HOSTS_AT_MOST: u8 = 16;

/// From now on nothing that `host` sends arrives. To be called on some host.
pub fn silence(host: &str) {
    let me = turmoil::lookup(host);
    for other in 1..=HOSTS_AT_MOST {
        let other = IpAddr::from([192, 168, 0, other]);
        // The inspector is not there before the heal, and nobody would join it again.
        let known = turmoil::reverse_lookup(other).is_some_and(|name| name != "inspector");
        if other != me && known {
            turmoil::partition_oneway(me, other);
        }
    }
}

impl Cluster {
    /// Builds the cluster of a plan; its hosts start with the first step.
    pub fn new(seed: u64, plan: &Plan, lying: Lying) -> Self {
        let shape = plan.shape.clone();
        let mut builder = turmoil::Builder::new();
        builder
            .rng_seed(seed)
            .tick_duration(STEP)
            .simulation_duration(Duration::from_secs(100_000))
            .min_message_latency(Duration::ZERO)
            .max_message_latency(Duration::from_millis(shape.latency_ms))
            .tcp_capacity(4_096)
            .enable_random_order();
        let mut sim = builder.build();
        let mut machines = BTreeMap::new();
        let machine = |host: Host| Machine::new(&host.name(), seed, shape.jitter_ms, lying.is(host));
        let namenode = machine(Host::Namenode);
        machines.insert(Host::Namenode, Rc::clone(&namenode));
        let settings = namenode_settings(&shape);
        sim.host("nn", move || run_namenode(Rc::clone(&namenode), settings.clone()));
        for number in 0..shape.datanodes {
            let datanode = machine(Host::Datanode(number));
            deletions::watch(&datanode.name, &datanode.disk);
            machines.insert(Host::Datanode(number), Rc::clone(&datanode));
            let settings = datanode_settings(number, &shape);
            sim.host(Host::Datanode(number).name(), move || run_datanode(Rc::clone(&datanode), settings.clone()));
        }
        Self { sim, machines, down_until: BTreeMap::new(), shape }
    }

    /// Virtual time, ms.
    pub fn now_ms(&self) -> u64 {
        self.sim.elapsed().as_millis() as u64
    }

    /// Machines that store something.
    pub fn servers(&self) -> Vec<Host> {
        self.machines.keys().copied().filter(|host| !matches!(host, Host::Client(_))).collect()
    }

    /// Lets one step of time pass, and looks after machines that died or are due to start.
    pub fn step(&mut self) {
        trace::set_time(self.now_ms());
        if let Err(error) = self.sim.step() {
            trace::violated("no_panic", format!("a host ended with {error}"));
        }
        let now_ms = self.now_ms();
        trace::set_time(now_ms);
        let hosts: Vec<Host> = self.machines.keys().copied().collect();
        for host in hosts {
            let machine = Rc::clone(&self.machines[&host]);
            if machine.up.get() && machine.exited.take() {
                machine.disk.kill();
                self.take_down(host, RESPAWN_MS);
            }
            if self.down_until.get(&host).is_some_and(|until| *until <= now_ms) {
                self.down_until.remove(&host);
                self.start(host);
            }
        }
    }

    /// Ends the host's tasks (the caller has dealt with its disk); it starts again after `down_ms`.
    pub fn take_down(&mut self, host: Host, down_ms: u64) {
        let machine = Rc::clone(&self.machines[&host]);
        let until = self.now_ms() + down_ms;
        if machine.up.replace(false) {
            self.sim.crash(host.name());
        }
        machine.exited.set(false);
        let until = self.down_until.get(&host).map_or(until, |before| until.max(*before));
        self.down_until.insert(host, until);
    }

    fn start(&mut self, host: Host) {
        note(&host.name(), "starts");
        self.machines[&host].up.set(true);
        self.sim.bounce(host.name());
    }
}

fn namenode_settings(shape: &Shape) -> NamenodeSettings {
    let mut settings = NamenodeSettings {
        dirs: (0..shape.name_dirs).map(|number| format!("/nn/{number}").into()).collect(),
        listen: "0.0.0.0:8020".into(),
        insecure: true,
        checkpoint_edits: shape.checkpoint_edits,
        checkpoint_retry_ms: 2_000,
        segment_bytes: 64 << 10,
        segment_step_bytes: 4 << 10,
        ..NamenodeSettings::default()
    };
    let core = &mut settings.core;
    core.min_block_size = 512;
    core.default_block_size = shape.block_bytes;
    core.heartbeat_interval_ms = HEARTBEAT_MS;
    core.stale_interval_ms = 2_000;
    core.dead_interval_ms = DEAD_MS;
    core.lease_soft_limit_ms = 4_000;
    core.lease_hard_limit_ms = 8_000;
    core.repair_timeout_ms = 5_000;
    core.trash_interval_ms = 0;
    if shape.report_range < 4_096 {
        core.report_credits = 1;
    }
    settings
}

fn datanode_settings(number: u64, shape: &Shape) -> DatanodeSettings {
    DatanodeSettings {
        namenode: "nn:8020".into(),
        dirs: vec![DATANODE_DIR.into()],
        listen: "0.0.0.0:9866".into(),
        host: Some(Host::Datanode(number).name()),
        rack: format!("/rack{}", number % 2),
        reserved_bytes: 1 << 20,
        task_slots: 0,
        insecure: true,
        connect_timeout_ms: 1_000,
        pipeline_timeout_ms: 3_000,
        idle_timeout_ms: 10_000,
        volume_check_interval_ms: 3_000,
        volume_check_timeout_ms: 1_000,
        scan_period_ms: 10_000,
        scan_pause_ms: 2_000,
        directory_scan_interval_ms: 7_000,
        report_range_blocks: shape.report_range,
        ..DatanodeSettings::default()
    }
}

/// A client's settings.
pub fn client_settings() -> ClientSettings {
    ClientSettings {
        short_circuit: false,
        connect_timeout_ms: 1_000,
        rpc_timeout_ms: 3_000,
        retry_deadline_ms: 12_000,
        frame_bytes: 2 << 10,
        write_window_bytes: 64 << 10,
        write_stall_ms: 4_000,
        finish_stall_ms: 6_000,
        read_ahead_bytes: 32 << 10,
        read_stall_ms: 3_000,
        avoid_node_ms: 2_000,
        lease_renew_ms: 1_000,
        complete_deadline_ms: 10_000,
        ..ClientSettings::at("nn:8020")
    }
}

async fn run_namenode(machine: Rc<Machine>, settings: NamenodeSettings) -> turmoil::Result {
    tokio::task::yield_now().await;
    let env = machine.boot();
    match Namenode::start(env, settings).await {
        Err(error) => machine.says_no(&error.to_string()),
        Ok(running) => {
            machine.trouble.take();
            note("nn", "serves");
            let failed = tokio::select! {
                biased;
                failed = running.failed() => Some(failed),
                () = machine.stop.notified() => None,
            };
            match failed {
                Some(error) => note("nn", format!("ends: {error}")),
                None => {
                    let end = running.shutdown().await;
                    note("nn", format!("shut down: {end:?}"));
                }
            }
        }
    }
    machine.exited.set(true);
    std::future::pending().await
}

async fn run_datanode(machine: Rc<Machine>, settings: DatanodeSettings) -> turmoil::Result {
    tokio::task::yield_now().await;
    let env = machine.boot();
    let extras = Extras { outcomes: Some(Arc::new(MemoryKv::default())), ..Extras::default() };
    match Datanode::start(env, settings, extras).await {
        Err(error) => machine.says_no(&error.to_string()),
        Ok(running) => {
            machine.trouble.take();
            let failed = tokio::select! {
                biased;
                failed = running.failed() => Some(failed),
                () = machine.stop.notified() => None,
            };
            match failed {
                Some(error) => note(&machine.name, format!("ends: {error}")),
                None => running.shutdown().await,
            }
        }
    }
    machine.exited.set(true);
    std::future::pending().await
}

//! Does faults to the cluster, and takes them back.

use std::io::ErrorKind;
use std::net::IpAddr;
use std::time::Duration;

use cairn_common::entropy::Entropy;
use cairn_common::simdisk::{Fault as DiskFault, FaultOp};

use super::cluster::Cluster;
use super::deletions;
use super::invariants::replicas;
use super::machine::DISK_BYTES;
use super::oracle;
use super::plan::{DiskOp, Fault, Host, Kind};
use super::trace::note;

/// Faults that are under way.
pub struct Faults {
    waiting: Vec<Fault>,
    active: Vec<(u64, Kind)>,
    entropy: Entropy,
    /// Faults that were done.
    pub done: u64,
}

impl Faults {
    /// Those of a plan, soonest first.
    pub fn new(faults: &[Fault], seed: u64) -> Self {
        oracle::all_disks_are_sound();
        let mut waiting = faults.to_vec();
        waiting.reverse();
        Self { waiting, active: Vec::new(), entropy: Entropy::seeded(seed ^ 0xFA17), done: 0 }
    }

    /// Between two steps: begins and ends what is due.
    pub fn turn(&mut self, cluster: &mut Cluster) {
        let now_ms = cluster.now_ms();
        self.trips(cluster);
        let (due, active) = std::mem::take(&mut self.active).into_iter().partition(|(until, _)| *until <= now_ms);
        self.active = active;
        let due: Vec<(u64, Kind)> = due;
        for (_, kind) in due {
            self.end(cluster, &kind);
        }
        while let Some(fault) = self.waiting.pop_if(|fault| fault.at_ms <= now_ms) {
            note("fault", format!("{:?} for {} ms", fault.kind, fault.for_ms));
            self.done += 1;
            self.begin(cluster, &fault);
        }
    }

    /// Takes everything back: the network is whole, all machines start, disks work.
    pub fn heal(&mut self, cluster: &mut Cluster) {
        note("heal", "all faults end");
        self.waiting.clear();
        self.trips(cluster);
        for (_, kind) in std::mem::take(&mut self.active) {
            self.end(cluster, &kind);
        }
        for (host, machine) in cluster.machines.clone() {
            machine.disk.clear_faults();
            machine.disk.resize(DISK_BYTES);
            if let Some(until) = cluster.down_until.get_mut(&host) {
                *until = 0;
            }
        }
        // A volume that was taken out comes back with a restart of its process.
        for host in cluster.servers() {
            let machine = cluster.machines[&host].clone();
            if matches!(host, Host::Datanode(_)) && machine.up.get() && machine.ailing.take() {
                machine.disk.kill();
                cluster.take_down(host, 100);
            }
        }
    }

    /// Machines whose moment has come lose power.
    fn trips(&mut self, cluster: &mut Cluster) {
        let gone: Vec<Host> =
            cluster.servers().into_iter().filter(|host| cluster.machines[host].trip.is_tripped()).collect();
        for host in gone {
            let kind = |kind: &Kind| match kind {
                Kind::CutAtSync { host: at, .. } | Kind::AllCutAtSync { host: at, .. } => *at == host,
                _ => false,
            };
            let found = self.active.iter().position(|(_, active)| kind(active));
            let kind = found.map(|at| self.active.remove(at).1);
            note("fault", format!("{} loses power just before a sync", host.name()));
            cluster.machines[&host].trip.disarm();
            let down_ms = 200 + self.entropy.below(3_000);
            power_cut(cluster, host, down_ms);
            join(cluster, host);
            set_latency(cluster, host, cluster.shape.latency_ms);
            if matches!(kind, Some(Kind::AllCutAtSync { .. })) {
                self.cut_all(cluster, down_ms);
            }
        }
    }

    fn cut_all(&self, cluster: &mut Cluster, down_ms: u64) {
        for host in cluster.servers() {
            if cluster.machines[&host].up.get() {
                power_cut(cluster, host, down_ms + self.entropy.below(2_000));
            }
        }
    }

    fn begin(&mut self, cluster: &mut Cluster, fault: &Fault) {
        let for_ms = fault.for_ms;
        match &fault.kind {
            Kind::Cut { a, b } => cluster.sim.partition(a.name(), b.name()),
            Kind::CutOneWay { from, to } => cluster.sim.partition_oneway(from.name(), to.name()),
            Kind::Isolate { host } => each_other(cluster, *host, |sim, me, other| sim.partition(me, other)),
            Kind::Hold { a, b } => cluster.sim.hold(a.name(), b.name()),
            Kind::Freeze { host } => each_other(cluster, *host, |sim, me, other| sim.hold(me, other)),
            Kind::Slow { host, latency_ms } => set_latency(cluster, *host, *latency_ms),
            Kind::Busy { host, jitter_ms } => {
                // A volume that answers too late is taken out.
                cluster.machines[host].ailing.set(true);
                cluster.machines[host].set_jitter(*jitter_ms);
            }
            Kind::Kill { host } => {
                cluster.machines[host].disk.kill();
                return cluster.take_down(*host, for_ms);
            }
            Kind::PowerCut { host } => return power_cut(cluster, *host, for_ms),
            Kind::PowerCutAll => return self.cut_all(cluster, for_ms),
            Kind::CutAtSync { host, nth } | Kind::AllCutAtSync { host, nth } => {
                // What it sends before that sync arrives for certain.
                set_latency(cluster, *host, 0);
                cluster.machines[host].trip.arm(*nth);
                let until = cluster.now_ms() + 5_000;
                return self.active.push((until, fault.kind.clone()));
            }
            Kind::Restart { host } => {
                if cluster.machines[host].up.get() {
                    cluster.machines[host].stop.notify_one();
                }
                return;
            }
            Kind::DiskError { host, op, after, times } => {
                let op = match op {
                    DiskOp::Read => FaultOp::Read,
                    DiskOp::Write => FaultOp::Write,
                    DiskOp::Sync => FaultOp::Sync,
                    DiskOp::Name => FaultOp::Name,
                };
                // Of the namenode's directories the last one: with two, the other goes on.
                let path = match host {
                    Host::Namenode => format!("/nn/{}", cluster.shape.name_dirs - 1),
                    _ => String::new(),
                };
                let fault = DiskFault { op, path, after: *after, times: *times, kind: ErrorKind::Other };
                cluster.machines[host].disk.inject(fault);
                oracle::a_disk_is_ailing();
                cluster.machines[host].ailing.set(true);
                return;
            }
            Kind::LateLog { jitter_ms } => cluster.machines[&Host::Namenode].set_log_jitter(*jitter_ms),
            Kind::DiskFull { host } => cluster.machines[host].disk.resize(0),
            Kind::Flip { host, bytes } => return self.flip(cluster, *host, *bytes),
            Kind::WallJump { host, by_ms } => return cluster.machines[host].jump_wall(*by_ms),
        }
        self.active.push((cluster.now_ms() + for_ms, fault.kind.clone()));
    }

    fn end(&mut self, cluster: &mut Cluster, kind: &Kind) {
        note("fault", format!("{kind:?} ends"));
        match kind {
            Kind::Cut { a, b } => cluster.sim.repair(a.name(), b.name()),
            Kind::CutOneWay { from, to } => cluster.sim.repair_oneway(from.name(), to.name()),
            Kind::Isolate { host } => join(cluster, *host),
            Kind::Hold { a, b } => cluster.sim.release(a.name(), b.name()),
            Kind::Freeze { host } => each_other(cluster, *host, |sim, me, other| sim.release(me, other)),
            Kind::Slow { host, .. } => set_latency(cluster, *host, cluster.shape.latency_ms),
            Kind::Busy { host, .. } => cluster.machines[host].set_jitter(cluster.shape.jitter_ms),
            Kind::LateLog { .. } => cluster.machines[&Host::Namenode].set_log_jitter(cluster.shape.jitter_ms),
            Kind::DiskFull { host } => cluster.machines[host].disk.resize(DISK_BYTES),
            Kind::CutAtSync { host, .. } | Kind::AllCutAtSync { host, .. } => {
                cluster.machines[host].trip.disarm();
                set_latency(cluster, *host, cluster.shape.latency_ms);
            }
            _ => {}
        }
    }

    /// Damages finalized replicas of `host`, each of a block that has two good ones elsewhere.
    fn flip(&self, cluster: &Cluster, host: Host, bytes: u64) {
        let all = replicas::on_disks(cluster);
        let mut mine: Vec<&replicas::OnDisk> = all.iter().filter(|one| one.host == host && one.finalized).collect();
        mine.retain(|one| {
            let good = |other: &&replicas::OnDisk| {
                other.host != host && other.finalized && other.is_sound && other.key() == one.key()
            };
            // Two: the namenode, which does not know of the damage yet, may remove one as superfluous.
            all.iter().filter(good).count() >= 2
        });
        if mine.is_empty() {
            return;
        }
        for _ in 0..bytes {
            let one = mine[self.entropy.below(mine.len() as u64) as usize];
            let offset = self.entropy.below(one.bytes);
            let bits = 1 << self.entropy.below(8);
            cluster.machines[&host].disk.flip(&one.path, offset, bits);
            deletions::damaged(&host.name(), &one.path, offset, bits);
            note("fault", format!("a bit of byte {offset} of {} on {} flips", one.path.display(), host.name()));
        }
    }
}

fn each_other(cluster: &Cluster, host: Host, act: impl Fn(&turmoil::Sim<'static>, IpAddr, IpAddr)) {
    let me = cluster.sim.lookup(host.name());
    for other in cluster.machines.keys().filter(|other| **other != host) {
        act(&cluster.sim, me, cluster.sim.lookup(other.name()));
    }
}

fn join(cluster: &Cluster, host: Host) {
    each_other(cluster, host, |sim, me, other| sim.repair(me, other));
}

fn set_latency(cluster: &Cluster, host: Host, ms: u64) {
    let latency = Duration::from_millis(ms);
    each_other(cluster, host, |sim, me, other| match ms {
        0 => sim.set_link_latency(me, other, latency),
        _ => sim.set_link_max_message_latency(me, other, latency),
    });
}

/// The machine goes silent: nobody is told, and what was not synced is lost in part.
fn power_cut(cluster: &mut Cluster, host: Host, down_ms: u64) {
    cluster.machines[&host].trip.disarm();
    each_other(cluster, host, |sim, me, other| sim.partition_oneway(me, other));
    // Also of a machine whose process ended a moment ago.
    cluster.machines[&host].disk.crash();
    if matches!(host, Host::Datanode(_)) {
        oracle::a_datanode_lost_power();
    }
    cluster.take_down(host, down_ms);
    each_other(cluster, host, |sim, me, other| sim.repair_oneway(me, other));
}

//! One seed, from beginning to end.
//!
//! 1. **Safety**: the cluster starts, clients work, faults come and go. Nothing that is wrong is excused, nothing that is slow is blamed.
//! 2. **Heal**: all faults end, all machines start.
//! 3. **Liveness**: every operation ends, the cluster comes to rest within bounded time, every acknowledged byte is read by a fresh client. If it
//!    does not come to rest, it is read all the same: bytes that are lost are named before what is only late.
//! 4. **Proof**: the namenode loses power once more and comes back with the same state.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use super::cluster::{Cluster, Lying};
use super::faults::Faults;
use super::inspect::{self, Desk, Found, Look};
use super::invariants::{
    acked_bytes, generations, known_replicas, last_replica, log_is_truth, no_orphans, replicas, replication,
};
use super::machine::Machine;
use super::plan::{Host, Plan};
use super::trace::{self, all_well, note, violated};
use super::workload::{Client, OPERATION_LIMIT};

/// How long the cluster may take to come to rest, virtual ms.
const REST_MS: u64 = 120_000;

/// How a seed is run.
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// With faults.
    pub faults: bool,
    /// A planted bug that needs no patch: "lying-datanodes", "lying-namenode".
    pub wrap: Option<String>,
}

impl Default for RunOptions {
    fn default() -> Self {
        Self { faults: true, wrap: None }
    }
}

/// What a seed cost.
#[derive(Clone, Copy, Default, Debug)]
pub struct Figures {
    /// Virtual time, ms.
    pub virtual_ms: u64,
    /// Operations of clients.
    pub operations: u64,
    /// Faults done.
    pub faults: u64,
}

/// What was found on a cluster that had its time to come to rest.
struct Rest {
    /// All files with their bytes, or why nothing can be read.
    found: Result<BTreeMap<String, Found>, String>,
    /// Invariant, and what does not hold.
    wrong: Vec<(&'static str, String)>,
}

struct Run {
    cluster: Cluster,
    clients: Vec<Rc<Client>>,
    faults: Faults,
    desk: Rc<RefCell<Desk>>,
}

/// Runs a seed; what was wrong is in [`trace`].
pub fn run(seed: u64, options: &RunOptions) -> Figures {
    let plan = Plan::of(seed, options.faults);
    note("plan", format!("{:?}", plan.shape));
    for fault in &plan.faults {
        note("plan", format!("{fault:?}"));
    }
    let lying = match options.wrap.as_deref() {
        Some("lying-datanodes") => Lying::Datanodes,
        Some("lying-namenode") => Lying::Namenode,
        _ => Lying::Nobody,
    };
    let mut run = Run::new(seed, &plan, lying);
    run.safety();
    if all_well() {
        run.faults.heal(&mut run.cluster);
        run.wait_for_clients();
    }
    if all_well() {
        run.liveness();
    }
    for (host, machine) in &run.cluster.machines {
        // The lock's file names the process that holds it, which differs from run to run.
        let files = machine.disk.files().into_iter().filter(|(path, _)| !path.ends_with("in_use.lock"));
        for (path, bytes) in files {
            trace::fold(path.as_os_str().as_encoded_bytes());
            trace::fold(&bytes);
        }
        note(&host.name(), format!("{} starts, {} syncs", machine.starts(), machine.disk.syncs()));
    }
    let figures = Figures {
        virtual_ms: run.cluster.now_ms(),
        operations: run.clients.iter().map(|client| client.model.borrow().operations).sum(),
        faults: run.faults.done,
    };
    // Tearing the hosts down is no part of the seed.
    std::mem::forget(run);
    figures
}

impl Run {
    fn new(seed: u64, plan: &Plan, lying: Lying) -> Self {
        let mut cluster = Cluster::new(seed, plan, lying);
        let mut clients = Vec::new();
        for number in 0..plan.shape.clients {
            let host = Host::Client(number);
            let machine = Machine::new(&host.name(), seed, plan.shape.jitter_ms, false);
            let client = Client::new(Rc::clone(&machine), number, seed, &plan.shape);
            cluster.machines.insert(host, machine);
            clients.push(Rc::clone(&client));
            cluster.sim.host(host.name(), move || Rc::clone(&client).run());
        }
        let desk = Rc::new(RefCell::new(Desk::default()));
        let machine = Machine::new("inspector", seed, 0, false);
        let there = Rc::clone(&desk);
        cluster.sim.host("inspector", move || inspect::run(Rc::clone(&machine), Rc::clone(&there)));
        Self { cluster, clients, faults: Faults::new(&plan.faults, seed), desk }
    }

    fn clients_done(&self) -> bool {
        self.clients.iter().all(|client| client.done.get())
    }

    fn step(&mut self) {
        self.cluster.step();
    }

    fn safety(&mut self) {
        let until_ms = self.cluster.shape.safety_ms;
        while all_well() && self.cluster.now_ms() < until_ms {
            self.faults.turn(&mut self.cluster);
            self.step();
        }
    }

    fn wait_for_clients(&mut self) {
        for client in &self.clients {
            client.closing.set(true);
        }
        let limit_ms = self.cluster.now_ms() + OPERATION_LIMIT.as_millis() as u64 + 10_000;
        while all_well() && !self.clients_done() {
            self.step();
            if self.cluster.now_ms() > limit_ms {
                return violated("operations_end", "the clients do not come to their end after the heal");
            }
        }
    }

    /// Has the inspector look. It has a limit of its own.
    fn look(&mut self, bytes: bool) -> Result<Look, String> {
        self.desk.borrow_mut().wanted = Some(bytes);
        while all_well() {
            self.step();
            if let Some(seen) = self.desk.borrow_mut().seen.take() {
                return seen;
            }
        }
        Err("something else is wrong".into())
    }

    fn liveness(&mut self) {
        let rest = self.rest("after the heal");
        let Some(found) = self.judge(rest) else { return };
        note("proof", "the namenode loses power");
        self.cluster.machines[&Host::Namenode].disk.crash();
        self.cluster.take_down(Host::Namenode, 200);
        let rest = self.rest("after the last restart");
        if let Some(again) = self.judge(rest) {
            log_is_truth::check(&found, &again);
        }
    }

    /// Names what is wrong, what was lost before what is only late; returns all files if all is well.
    fn judge(&self, rest: Rest) -> Option<BTreeMap<String, Found>> {
        match &rest.found {
            Ok(found) => {
                for client in &self.clients {
                    acked_bytes::check(&client.model.borrow(), found, &client.machine.name);
                }
                let models: Vec<_> = self.clients.iter().map(|client| client.model.borrow()).collect();
                let models: Vec<_> = models.iter().map(|model| &**model).collect();
                last_replica::check(&models, found, &self.cluster);
            }
            Err(why) if all_well() => {
                let models = self.clients.iter().map(|client| client.model.borrow());
                let sure: Vec<u64> = models.flat_map(|model| acked_bytes::promised(&model)).collect();
                let (files, bytes) = (sure.len(), sure.iter().sum::<u64>());
                violated("acked_bytes", format!("{files} files with {bytes} acknowledged bytes cannot be read: {why}"));
            }
            Err(_) => {}
        }
        for (invariant, text) in &rest.wrong {
            violated(invariant, text);
        }
        rest.found.ok().filter(|_| all_well())
    }

    /// What is not as it shall be on a quiet cluster.
    fn restless(&mut self) -> Vec<(&'static str, String)> {
        let look = match self.look(false) {
            Ok(look) => look,
            Err(error) => return vec![("comes_to_rest", format!("the inspector: {error}"))],
        };
        let disks = replicas::on_disks(&self.cluster);
        let found = [
            ("generations", generations::check(&look.files, &disks)),
            ("known_replicas", known_replicas::check(&look.files, &disks)),
            ("no_orphans", no_orphans::check(&look.files, &disks)),
            ("replication", replication::check(&look.report, &look.files, self.cluster.shape.datanodes)),
        ];
        found.into_iter().flat_map(|(invariant, texts)| texts.into_iter().map(move |text| (invariant, text))).collect()
    }

    /// Waits until nothing is left to do, and reads all, whether that was so or not.
    fn rest(&mut self, when: &str) -> Rest {
        let limit_ms = self.cluster.now_ms() + REST_MS;
        let wrong = loop {
            let wrong = self.restless();
            if wrong.is_empty() || !all_well() || self.cluster.now_ms() > limit_ms {
                break wrong;
            }
            for _ in 0..50 {
                self.step();
            }
        };
        if wrong.is_empty() {
            note("rest", format!("all is at rest {when}"));
        }
        let late = |(invariant, text)| (invariant, format!("{when}, not within {} s: {text}", REST_MS / 1_000));
        let mut wrong: Vec<(&'static str, String)> = wrong.into_iter().map(late).collect();
        let found = self.look(true).map(|look| look.files).map_err(|error| {
            let machines = self.cluster.machines.iter();
            let silent = machines.filter(|(_, machine)| !machine.trouble.borrow().is_empty());
            let silent =
                silent.map(|(host, machine)| format!("{} does not start: {}", host.name(), machine.trouble.borrow()));
            std::iter::once(error).chain(silent).collect::<Vec<_>>().join("; ")
        });
        if let Err(error) = &found {
            wrong.push(("comes_to_rest", format!("{when}: {error}")));
        }
        Rest { found, wrong }
    }
}

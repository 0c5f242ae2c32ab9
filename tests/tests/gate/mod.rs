//! A gate for jobs: while it is closed, the first worker that starts waits before it takes its task, which is a map. So its job is not over, if no second
//! attempt overtakes it (`--no-speculation`).

use cairn_tests::process::{Process, descendants};
use cairn_tests::{Cluster, ClusterOptions, binary};

/// The gate is a folder beside the cluster's.
const WORKER: &str = r#"here=$(pwd); gate="${here%%/cluster/*}/gate"
if mkdir "$gate/held" 2>/dev/null; then
    while [ -e "$gate" ]; do sleep 0.1; done
fi
exec "$0" task-worker"#;

/// Nodes with so many slots, whose workers heed the gate. It is open at first.
pub fn with_gate(options: ClusterOptions, slots: u32) -> ClusterOptions {
    let cairn = binary::cairn().canonicalize().unwrap();
    let command = format!("['sh', '-c', '''{WORKER}''', '{}']", cairn.display());
    options.more(&format!("[datanode]\ntask_slots = {slots}\nworker_command = {command}"))
}

pub fn close(cluster: &Cluster) {
    std::fs::create_dir(cluster.path("gate")).unwrap();
}

/// Whoever waits goes on. Once for each cluster.
pub fn open(cluster: &Cluster) {
    // At once: a worker may be making its folder there.
    std::fs::rename(cluster.path("gate"), cluster.path("gate.open")).unwrap();
}

/// Workers that run and are not the one at the gate, with their nodes.
pub fn workers(cluster: &Cluster) -> impl Iterator<Item = (usize, Process)> + '_ {
    let below = |node: usize| descendants(cluster.datanodes[node].process.pid).into_iter().filter_map(Process::of);
    let works = |one: &Process| one.runs() && one.command_line().last().is_some_and(|word| word == "task-worker");
    (0..cluster.datanodes.len()).flat_map(move |node| below(node).filter(works).map(move |worker| (node, worker)))
}

//! A cluster whose every connection passes through a [`Proxy`]: between clients and namenode, each datanode and the namenode, and whoever
//! dials a datanode and that datanode.
//!
//! Its members are started one by one (there is no `cairn local`), each datanode with `--advertise`.

use std::path::PathBuf;
use std::time::Duration;

use crate::cluster::{Cluster, ClusterOptions, Member};
use crate::proxy::Proxy;
use crate::{binary, wait_for};

/// The proxies of a wired cluster.
pub struct Wires {
    /// From clients to the namenode.
    pub clients: Proxy,
    /// From each datanode to the namenode.
    pub control: Vec<Proxy>,
    /// From clients and other datanodes to each datanode.
    pub data: Vec<Proxy>,
}

const DATANODES: u16 = 10;
const CLIENTS: u16 = 30;
const CONTROL: u16 = 31;
const DATA: u16 = 39;
/// The range of ports has room for no more.
const MOST: usize = 8;

impl Cluster {
    /// Starts the namenode and the datanodes with proxies between them, and waits until all are live.
    pub fn wired(options: ClusterOptions) -> (Self, Wires) {
        Self::wired_with(options, &|_, command| command)
    }

    /// The same; `wrap` may put a datanode's command (the index is its own) into another one.
    pub fn wired_with(options: ClusterOptions, wrap: &dyn Fn(usize, Vec<String>) -> Vec<String>) -> (Self, Wires) {
        let count = options.datanodes;
        assert!(count <= MOST, "a wired cluster has at most {MOST} datanodes");
        let racks = options.racks;
        let mut cluster = Self::bare(options);
        let base = cluster.ports().base();
        let at = |port: u16| format!("127.0.0.1:{}", base + port);
        let inner = |node: usize| format!("127.0.0.{}:{}", node + 2, base + DATANODES);
        let wires = Wires {
            clients: Proxy::start(&at(CLIENTS), &at(0)),
            control: (0..count).map(|node| Proxy::start(&at(CONTROL + node as u16), &at(0))).collect(),
            data: (0..count).map(|node| Proxy::start(&at(DATA + node as u16), &inner(node))).collect(),
        };
        let config = cluster.config().display().to_string();
        let command = |rest: Vec<String>, dir: PathBuf| {
            let mut command = vec![binary::cairn().display().to_string()];
            command.extend(rest);
            command.extend(["--dir".into(), dir.display().to_string(), "--config".into(), config.clone()]);
            command
        };
        let dir = cluster.dir().join("namenode");
        let args = ["namenode", "--listen", &at(0)].map(str::to_owned).to_vec();
        let addr = wires.clients.address().to_owned();
        cluster.namenode = Member::by_hand("namenode", &addr, "", dir.clone(), command(args, dir));
        cluster.restart_namenode();
        for node in 0..count {
            let (name, rack) = (format!("dn{}", node + 1), format!("/rack{}", node % racks + 1));
            let dir = cluster.dir().join(&name);
            let (advertise, namenode) = (wires.data[node].address(), wires.control[node].address());
            let args = ["datanode", "--namenode", namenode, "--listen", &inner(node), "--advertise", advertise];
            let named = ["--name", &name, "--rack", &rack, "--slots", "1"];
            let args = args.iter().chain(&named).map(|arg| (*arg).to_owned()).collect();
            let command = wrap(node, command(args, dir.clone()));
            cluster.datanodes.push(Member::by_hand(&name, advertise, &rack, dir, command));
            cluster.restart_datanode(node);
        }
        cluster.learn_ids();
        (cluster, wires)
    }

    /// Waits until every datanode is live, and notes the ids by which the namenode knows them.
    fn learn_ids(&mut self) {
        let ids = wait_for("all datanodes are live", Duration::from_secs(40), || {
            let run = self.cairn(&["--json", "admin", "report"]);
            let report: serde_json::Value = serde_json::from_slice(&run.stdout).map_err(|_| run.stderr)?;
            let nodes = report["nodes"].as_array().cloned().unwrap_or_default();
            let id = |member: &Member| {
                let node = nodes.iter().find(|node| node["addr"] == *member.addr && node["state"] == "live")?;
                node["id"].as_str().map(str::to_owned)
            };
            let ids: Option<Vec<String>> = self.datanodes.iter().map(id).collect();
            ids.filter(|_| report["safemode"] == false).ok_or_else(|| report.to_string())
        });
        for (member, id) in self.datanodes.iter_mut().zip(ids) {
            member.id = id;
        }
    }
}

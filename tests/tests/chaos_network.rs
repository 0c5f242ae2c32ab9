//! Chaos: connections are cut, networks pass nothing or one way only, bits are flipped on the way, while a load checks every answer.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "tests fail by panicking")]

use std::net::TcpStream;
use std::time::Duration;

use cairn_tests::proxy::{Accept, Cut, Flow, Proxy, Rules};
use cairn_tests::stage::Stage;
use cairn_tests::{wait_for, wait_until};

const NOTICED: Duration = Duration::from_secs(30);

/// Waits until a proxy has done something more of a kind, since `before`.
fn wait_more(what: &str, before: u64, mut count: impl FnMut() -> u64) {
    wait_for(what, NOTICED, || {
        let now = count();
        if now > before { Ok(()) } else { Err(format!("{now}, as before")) }
    });
}

#[test]
fn connections_cut_again_and_again() {
    let mut stage = Stage::start();
    for round in 0..12 {
        let how = if round % 2 == 0 { Cut::Reset } else { Cut::Close };
        let wires = &stage.wires;
        let wire: &Proxy = match round % 3 {
            0 => &wires.clients,
            1 => &wires.control[round % 4],
            _ => &wires.data[round % 4],
        };
        let cut = wire.seen().cut;
        // Open connections of datanodes come and go: cut until one was open.
        wait_for("a connection is cut", NOTICED, || {
            wire.cut(how);
            if wire.seen().cut > cut { Ok(()) } else { Err("none was open".into()) }
        });
        stage.fault();
        stage.endure(Duration::from_millis(400));
    }
    stage.wait_progress(3);
    stage.finish(10, 10);
}

#[test]
fn a_datanode_whose_network_passes_nothing_or_one_way_only() {
    let mut stage = Stage::start();
    for (node, rules) in [(0, Rules::NO_ANSWERS), (1, Rules::NO_REQUESTS), (2, Rules::BLACKHOLE)] {
        let before = stage.wires.data[node].seen();
        // Its heartbeats still arrive: the namenode goes on naming it, and everybody has to find out for himself.
        stage.wires.data[node].set(rules);
        stage.fault();
        wait_more("something is held, or dialled for nothing", before.held + before.ignored, || {
            let seen = stage.wires.data[node].seen();
            seen.held + seen.ignored
        });
        stage.wait_progress(2);
        stage.wires.data[node].heal();
        stage.fault();
    }
    stage.wait_progress(3);
    stage.finish(10, 10);
}

#[test]
fn heartbeats_without_answers_and_answers_without_heartbeats() {
    let mut stage = Stage::start();
    for (node, rules) in [(0, Rules::NO_ANSWERS), (1, Rules::NO_REQUESTS), (2, Rules::BLACKHOLE)] {
        let before = stage.wires.control[node].seen();
        stage.wires.control[node].set(rules);
        stage.fault();
        wait_more("something is held", before.held, || stage.wires.control[node].seen().held);
        if rules != Rules::NO_ANSWERS {
            stage.cluster.wait_state(node, "dead", NOTICED);
        }
        stage.wait_progress(3);
        stage.wires.control[node].heal();
        stage.fault();
        stage.cluster.wait_state(node, "live", NOTICED);
    }
    stage.finish(10, 10);
}

#[test]
fn the_namenode_out_of_reach_of_its_clients() {
    let mut stage = Stage::start();
    for rules in [Rules::BLACKHOLE, Rules { accept: Accept::Refuse, ..Rules::BLACKHOLE }, Rules::NO_ANSWERS] {
        let before = stage.wires.clients.seen();
        stage.wires.clients.set(rules);
        stage.fault();
        wait_more("calls are held", before.held, || stage.wires.clients.seen().held);
        if rules.accept == Accept::Refuse {
            stage.wires.clients.cut(Cut::Reset);
            let address = stage.wires.clients.address().to_owned();
            wait_until("it refuses", NOTICED, || TcpStream::connect(&address).is_err());
        }
        stage.endure(Duration::from_secs(5));
        stage.wires.clients.heal();
        stage.fault();
        stage.wait_progress(3);
    }
    stage.finish(10, 10);
}

#[test]
fn a_datanode_on_a_slow_line() {
    let mut stage = Stage::start();
    let slow = Rules { up: Flow::Throttle(300_000), down: Flow::Delay(Duration::from_millis(50)), ..Rules::PASS };
    stage.wires.data[1].set(slow);
    stage.fault();
    wait_more("bytes are slowed", 20, || stage.wires.data[1].seen().slowed);
    stage.wait_progress(5);
    stage.wires.data[1].heal();
    stage.fault();
    stage.finish(10, 10);
}

#[test]
fn bits_flipped_on_the_way() {
    let mut stage = Stage::start();
    for wire in &stage.wires.data {
        wire.set(Rules::both(Flow::Flip(4 << 20)));
    }
    stage.fault();
    wait_for("bits were flipped on every line", Duration::from_secs(90), || {
        let flipped: Vec<u64> = stage.wires.data.iter().map(|wire| wire.seen().flipped).collect();
        if flipped.iter().all(|count| *count >= 2) { Ok(()) } else { Err(format!("{flipped:?}")) }
    });
    stage.wires.data.iter().for_each(Proxy::heal);
    stage.fault();
    stage.wait_progress(3);
    stage.finish(10, 10);
}

//! Chaos: processes are killed and stopped while a load checks every answer.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "tests fail by panicking")]

use std::time::Duration;

use cairn_tests::stage::Stage;

/// Longer than the interval after which a silent node counts as dead (4 s), with room for the namenode to notice.
const LONGER_THAN_DEAD: Duration = Duration::from_secs(20);

#[test]
fn datanodes_killed_and_back_after_a_while() {
    let mut stage = Stage::start();
    for (node, away) in [(0, 1), (1, 7), (2, 3)] {
        let process = stage.cluster.datanodes[node].process;
        stage.cluster.kill_datanode(node);
        assert!(!process.runs(), "it is gone");
        stage.fault();
        stage.endure(Duration::from_secs(away));
        stage.cluster.restart_datanode(node);
        stage.fault();
        stage.cluster.wait_state(node, "live", LONGER_THAN_DEAD);
        stage.wait_progress(3);
    }
    stage.finish(20, 20);
}

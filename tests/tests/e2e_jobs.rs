//! Jobs run where the blocks lie and give the right answer, whatever dies meanwhile.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "tests fail by panicking")]

mod gate;

use std::process::Stdio;
use std::time::Duration;

use cairn_tests::data::{self, sorted_lines};
use cairn_tests::{Cluster, ClusterOptions, Run, large, process, wait_until};
use serde_json::Value;

/// All parts of a job's output, in order.
fn parts(cluster: &Cluster, output: &str) -> Vec<u8> {
    cluster.cairn(&["stat", &format!("{output}/_SUCCESS")]).ok();
    cluster.cat(&format!("{output}/part-r-*"))
}

fn count(cluster: &Cluster, flags: &[&str], input: &str, output: &str) -> Value {
    cluster.json(&[&["job", "wordcount"], flags, &[input, output]].concat())
}

/// The output must equal what a Unix pipeline makes of the same file, byte for byte after sorting.
fn assert_counts(cluster: &Cluster, local: &str, output: &str) {
    let expected = data::word_count_by_pipeline(local.as_ref());
    let got = sorted_lines(&parts(cluster, output));
    assert!(got == expected, "{} bytes of counts, expected {}", got.len(), expected.len());
}

#[test]
fn word_count_equals_a_unix_pipeline() {
    let size = if large() { 1 << 30 } else { 12 << 20 };
    let cluster = Cluster::start(ClusterOptions::new(3, 2).core("default_block_size", size / 12));
    let local = cluster.local_file("text", &data::text(1, size, 300_000));
    cluster.cairn(&["put", &local, "/text"]).ok();
    let report = count(&cluster, &[], "/text", "/counts");
    assert_eq!(report["state"], "succeeded", "{report}");
    let maps = &report["map"];
    let sum: u64 = ["node_local", "rack_local", "remote"].iter().map(|key| maps[*key].as_u64().unwrap()).sum();
    assert_eq!(maps["tasks"].as_u64().unwrap(), sum, "{report}");
    assert!(sum >= 12, "one map for each block: {report}");
    assert_eq!(report["map"]["attempts_failed"], 0, "{report}");
    assert!(report["bytes"]["read"].as_u64().unwrap() >= size as u64, "{report}");
    assert!(report["records"]["map_out"].as_u64().unwrap() >= report["records"]["out"].as_u64().unwrap(), "{report}");
    assert_counts(&cluster, &local, "/counts");
    // Each part is sorted by the bytes of the word.
    let first = cluster.cat("/counts/part-r-00000");
    let words: Vec<&[u8]> =
        first.split(|byte| *byte == b'\n').map(|l| l.split(|b| *b == b'\t').next().unwrap()).collect();
    assert!(words[..words.len() - 1].windows(2).all(|pair| pair[0] < pair[1]));
}

#[test]
fn lines_that_cross_blocks_are_counted_once() {
    let cluster = Cluster::small();
    // Blocks of 512 bytes, lines up to some kilobytes, and one line far longer than a block.
    let mut text = data::text(2, 20_000, 100);
    text.extend_from_slice(&b"w ".repeat(2_000));
    text.extend_from_slice(b"\nlast\n\n");
    let local = cluster.local_file("text", &text);
    cluster.cairn(&["put", "--block-size", "512", &local, "/text"]).ok();
    let report = count(&cluster, &["--reducers", "3"], "/text", "/counts");
    assert_eq!(report["reduce"]["tasks"], 3);
    assert_counts(&cluster, &local, "/counts");
    assert_eq!(cluster.json(&["ls", "/counts/part-r-*"]).as_array().unwrap().len(), 3);
}

#[test]
fn several_inputs_empty_files_and_directories() {
    let cluster = Cluster::small();
    cluster.cairn(&["mkdir", "-p", "/in/sub"]).ok();
    cluster.put("/in/a", b"one two\n", &[]);
    cluster.put("/in/b", b"Two three", &[]);
    cluster.put("/in/empty", b"", &[]);
    count(&cluster, &["--reducers", "1"], "/in/*", "/out1");
    assert_eq!(String::from_utf8(parts(&cluster, "/out1")).unwrap(), "one\t1\nthree\t1\ntwo\t2\n");
    count(&cluster, &["--reducers", "1"], "/in/empty", "/out2");
    assert_eq!(parts(&cluster, "/out2"), b"");
}

#[test]
fn grep_counts_what_matches() {
    let cluster = Cluster::small();
    cluster.put("/log", &b"error: disk\nok\nerror: net\n".repeat(1_000), &["--block-size", "4096"]);
    let report = cluster.json(&["job", "grep", "error", "/log", "/found"]);
    assert_eq!(report["state"], "succeeded");
    let text = String::from_utf8(parts(&cluster, "/found")).unwrap();
    assert!(text.contains("1000") || text.contains("2000"), "{text}");
}

#[test]
fn with_two_replicas_on_six_nodes_nine_of_ten_maps_are_node_local() {
    let cluster = Cluster::start(ClusterOptions::new(6, 3));
    cluster.put("/text", &data::text(3, 40 << 20, 50_000), &["--replication", "2", "--block-size", "1m"]);
    cluster.wait_healthy(Duration::from_secs(60));
    let report = count(&cluster, &[], "/text", "/counts");
    let (tasks, local) = (report["map"]["tasks"].as_u64().unwrap(), report["map"]["node_local"].as_u64().unwrap());
    assert!(tasks >= 40 && local * 10 >= tasks * 9, "{report}");
    // Every block of a file with three replicas lies on exactly two of the three racks.
    cluster.put("/three", &data::text(4, 8 << 20, 1_000), &["--block-size", "1m"]);
    cluster.wait_healthy(Duration::from_secs(60));
    for block in cluster.blocks("/three") {
        let replicas = block["replicas"].as_array().unwrap();
        let racks: std::collections::BTreeSet<String> = replicas.iter().map(|r| r["rack"].to_string()).collect();
        assert_eq!((replicas.len(), racks.len()), (3, 2), "{block}");
    }
}

#[test]
fn plan_shows_where_tasks_would_run_and_runs_nothing() {
    let cluster = Cluster::small();
    cluster.put("/text", &data::text(5, 3 << 20, 1_000)[..3 << 20], &["--block-size", "1m"]);
    cluster.put("/numbers", "b,1\na,2\n".repeat(1_000).as_bytes(), &[]);
    cluster.put("/gen", &[b'x'; 100 * 50], &[]);
    let text = cluster.cairn(&["job", "plan", "/text"]).ok();
    assert!(text.lines().count() >= 3, "{text}");
    let plan = cluster.json(&["job", "plan", "--reducers", "3", "/text"]);
    assert_eq!((&plan["maps"], &plan["reducers"]), (&3.into(), &3.into()), "{plan}");
    let streaming = ["streaming", "--input", "/text", "--output", "/o", "--mapper", "cat", "--file", "/etc/passwd"];
    let join = ["join", "--separator", ",", "--left", "/numbers", "--right", "/numbers", "/o"];
    let cases: &[(&[&str], u64, u64)] = &[
        (&["wordcount", "--reducers", "2", "/text", "/o"], 3, 2),
        (&["grep", "x", "/text", "/o"], 3, 1),
        (&["sort", "--reducers", "2", "/text", "/o"], 3, 2),
        (&streaming, 3, 1),
        (&join, 2, 1),
        (&["teragen", "--maps", "4", "1000", "/o"], 4, 0),
        (&["terasort", "--reducers", "2", "/gen", "/o"], 1, 2),
        (&["teravalidate", "/gen", "/o"], 1, 1),
    ];
    for (job, maps, reduces) in cases {
        let plan = cluster.json(&[&["job", "plan"], *job].concat());
        let shape = (&plan["kind"], &plan["maps"], &plan["reducers"]);
        assert_eq!(shape, (&job[0].into(), &(*maps).into(), &(*reduces).into()), "{plan}");
        assert!(plan["slots"].as_u64().unwrap() > 0 && plan["memory_limit"] == 256 << 20, "{plan}");
        let tasks = plan["tasks"].as_array().unwrap();
        assert_eq!(tasks.len() as u64, maps + reduces, "{plan}");
        let local = tasks.iter().filter(|task| task["locality"] == "node-local");
        assert!(local.clone().all(|task| task["replicas"].as_array().unwrap().contains(&task["host"])), "{plan}");
        assert!(job[0] == "teragen" || local.count() > 0, "{plan}");
    }
    cluster.cairn(&["job", "plan", "distcp", "/text", "/o"]).fails_naming(2, &["distcp"]);
    cluster.cairn(&["job", "plan", "ls"]).fails_naming(2, &["no job"]);
    cluster.cairn(&["job", "plan", "/nothing"]).fails_naming(1, &["/nothing"]);
    assert_eq!(cluster.json(&["ls", "/"]).as_array().unwrap().len(), 3, "nothing was made");
}

#[test]
fn a_graph_runs_its_stages_in_order_and_goes_on_where_it_was() {
    let cluster = Cluster::small();
    cluster.put("/text", b"b a b\nc b a\n", &[]);
    let file = |text: &str| cluster.local_file("graph.toml", text.as_bytes());
    let stages = |second: &str| {
        format!(
            "id = \"g\"\n[[stage]]\nname = \"sorted\"\njob = [\"sort\", \"-k\", \"2,2nr\", \"-t\", \"\\t\", \"{second}\", \"/sorted\"]\n\
            [[stage]]\nname = \"words\"\njob = [\"wordcount\", \"/text\", \"/words\"]\ntemporary = true\n"
        )
    };
    let graph = file(&stages("/words/nothing"));
    cluster.cairn(&["job", "graph", "--check", &graph]).ok();
    let run = cluster.cairn(&["--json", "job", "graph", &graph]);
    run.fails_naming(1, &["graph g", "stage sorted", "/words/nothing"]);
    let report = cluster.json(&["job", "graph", &file(&stages("/words"))]);
    assert_eq!((&report["state"], &report["stages"][1]["earlier"]), (&"succeeded".into(), &true.into()), "{report}");
    assert_eq!(cluster.cat("/sorted/part-r-*"), b"b\t3\na\t2\nc\t1\n");
    cluster.cairn(&["stat", "/words"]).fails(1);
    let circle = "[[stage]]\nname = \"a\"\njob = [\"grep\", \"x\", \"/b\", \"/a\"]\n\
        [[stage]]\nname = \"b\"\njob = [\"grep\", \"x\", \"/a\", \"/b\"]\n";
    cluster.cairn(&["job", "graph", &file(circle)]).fails_naming(1, &["graph.toml", "waits for itself"]);
    let distcp = "[[stage]]\nname = \"a\"\njob = [\"distcp\", \"/a\", \"/b\"]\n";
    cluster.cairn(&["job", "graph", &file(distcp)]).fails_naming(1, &["stage \"a\"", "distcp"]);
    cluster.cairn(&["job", "graph", "/no/such/file"]).fails_naming(1, &["/no/such/file"]);
}

#[test]
fn what_a_graph_hands_on_and_loses_with_its_node_is_made_again() {
    let mut cluster = Cluster::start(ClusterOptions::new(4, 2));
    let local = cluster.local_file("text", &data::text(9, 2 << 20, 20_000));
    cluster.cairn(&["put", "--block-size", "1m", &local, "/text"]).ok();
    cluster.put("/small", b"one line\n", &[]);
    let gate = cluster.local_file("gate", b"");
    std::fs::remove_file(&gate).unwrap();
    let waits = format!("sh -c 'cat; while [ ! -e {gate} ]; do echo reporter:status:waits >&2; sleep 0.1; done'");
    let description = serde_json::json!({"id": "g", "stage": [
        {"name": "copy", "job": ["sort", "/text", "/copy"], "temporary": true},
        {"name": "words", "job": ["wordcount", "--reducers", "2", "/copy", "/words"], "temporary": true},
        {"name": "gate", "after": ["words"],
            "job": ["streaming", "--input", "/small", "--output", "/gate", "--mapper", waits, "--reducers", "0"]},
        {"name": "sorted", "after": ["gate"], "job": ["sort", "/words", "/sorted"]},
    ]});
    let file = cluster.local_file("graph.json", description.to_string().as_bytes());
    let job = cluster.command(&["--json", "job", "graph", &file]);
    let job = { job }.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    wait_until("the words are counted and their input is gone", Duration::from_secs(60), || {
        let names = |path: &str| cluster.cairn(&["stat", path]).code == 0;
        names("/words/_SUCCESS") && !names("/copy")
    });
    let blocks = cluster.blocks("/words/part-r-00000");
    let replicas = blocks[0]["replicas"].as_array().unwrap();
    assert_eq!(replicas.len(), 1, "one replica is handed on: {blocks:?}");
    let host = replicas[0]["host"].as_str().unwrap().to_owned();
    cluster.kill_datanode((0..4).find(|at| host == format!("dn{}", at + 1)).unwrap());
    std::fs::write(&gate, b"").unwrap();
    let report = Run::of_child("job graph", job, Duration::from_secs(180)).json();
    assert_eq!(report["state"], "succeeded", "{report}");
    let remade: Vec<&Value> = report["stages"].as_array().unwrap().iter().map(|stage| &stage["remade"]).collect();
    assert_eq!(remade, [1, 1, 0, 0], "{report}");
    assert_counts(&cluster, &local, "/sorted");
}

#[test]
fn a_datanode_killed_during_a_word_count_does_not_change_the_result() {
    let mut cluster = Cluster::start(gate::with_gate(ClusterOptions::new(4, 2), 2));
    let local = cluster.local_file("text", &data::text(6, 48 << 20, 400_000));
    cluster.cairn(&["put", "--block-size", "2m", &local, "/text"]).ok();
    gate::close(&cluster);
    let job = cluster.command(&["--json", "job", "wordcount", "--no-speculation", "/text", "/counts"]);
    let job = { job }.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // Kill a node that has tasks under way: its worker processes are its children.
    let mut victim = None;
    wait_until("a datanode runs a task", Duration::from_secs(30), || {
        victim = gate::workers(&cluster).next().map(|(node, _)| node);
        victim.is_some()
    });
    let victim = victim.unwrap();
    let workers = process::descendants(cluster.datanodes[victim].process.pid);
    let workers: Vec<_> = workers.into_iter().filter_map(process::Process::of).collect();
    cluster.kill_datanode(victim);
    gate::open(&cluster);
    let report = Run::of_child("job wordcount", job, Duration::from_secs(120)).json();
    assert_eq!(report["state"], "succeeded", "{report}");
    assert_counts(&cluster, &local, "/counts");
    wait_until("no worker outlives its datanode", Duration::from_secs(10), || {
        workers.iter().all(|worker| !worker.runs())
    });
    cluster.wait_state(victim, "dead", Duration::from_secs(30));
    cluster.wait_healthy(Duration::from_secs(40));
    assert_counts(&cluster, &local, "/counts");
}

#[test]
fn a_job_whose_output_exists_or_input_does_not_changes_nothing() {
    let cluster = Cluster::small();
    cluster.put("/in", b"a b", &[]);
    cluster.cairn(&["mkdir", "/out"]).ok();
    cluster.cairn(&["job", "wordcount", "/in", "/out"]).fails_naming(1, &["/out", "exists"]);
    assert_eq!(cluster.json(&["ls", "/out"]).as_array().unwrap().len(), 0);
    cluster.cairn(&["job", "wordcount", "/nothing", "/out2"]).fails_naming(1, &["/nothing"]);
    cluster.cairn(&["job", "wordcount", "/nothing/*", "/out2"]).fails_naming(1, &["/nothing/*"]);
    cluster.cairn(&["--user", "ann", "job", "wordcount", "/in", "/out2"]).fails_naming(1, &["permission denied"]);
    let listed = cluster.json(&["ls", "/"]);
    let names: Vec<&str> = listed.as_array().unwrap().iter().map(|e| e["path"].as_str().unwrap()).collect();
    assert_eq!(names, ["/in", "/out"], "no staging folder is left");
}

#[test]
fn a_driver_that_is_killed_leaves_no_output_and_no_task() {
    let cluster = Cluster::start(gate::with_gate(ClusterOptions::new(3, 2), 2));
    cluster.put("/text", &data::text(7, 32 << 20, 400_000), &["--block-size", "2m"]);
    gate::close(&cluster);
    let mut job = cluster.command(&["job", "wordcount", "--no-speculation", "/text", "/counts"]);
    let mut job = job.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    wait_until("a task runs", Duration::from_secs(30), || {
        cluster.datanodes.iter().any(|node| !process::descendants(node.process.pid).is_empty())
    });
    job.kill().unwrap();
    job.wait().unwrap();
    gate::open(&cluster);
    cluster.cairn(&["stat", "/counts"]).fails(1);
    // The cluster takes the next job at once.
    cluster.put("/small", b"x y x", &[]);
    count(&cluster, &["--reducers", "1"], "/small", "/next");
    assert_eq!(parts(&cluster, "/next"), b"x\t2\ny\t1\n");
}

#[test]
fn millions_of_words_stay_under_the_tasks_memory_limit() {
    // A limit far below the size of the result: spills must carry the rest.
    let (size, memory) = if large() { (1 << 30, "256m") } else { (24 << 20, "64m") };
    let cluster = Cluster::start(ClusterOptions::new(3, 2).core("default_block_size", 8 << 20));
    let local = cluster.local_file("text", &data::text(8, size, 30_000_000));
    cluster.cairn(&["put", &local, "/text"]).ok();
    let report = count(&cluster, &["--task-memory", memory, "--reducers", "2"], "/text", "/counts");
    assert_eq!(report["map"]["attempts_failed"], 0, "{report}");
    assert_eq!(report["reduce"]["attempts_failed"], 0, "{report}");
    assert_counts(&cluster, &local, "/counts");
}

//! Jobs on a real namenode and real datanodes in this process, with the real worker as their child.
#![cfg(feature = "cli")]
// A helper that fails is a test that fails.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use cairn_client::fs::{CreateOptions, ErrorCode};
use cairn_client::job::{self, JobObserver, JobReport, JobSpec, JobState, Locality, Phase};
use cairn_client::mapreduce::builtin::property;
use cairn_datanode::DatanodeSettings;

use common::Cluster;

const BLOCK: u64 = 1 << 20;

/// A cluster whose nodes run the real worker, and what tests of jobs ask of it.
struct Jobs(Cluster);

impl std::ops::Deref for Jobs {
    type Target = Cluster;

    fn deref(&self) -> &Cluster {
        &self.0
    }
}

impl Jobs {
    async fn start(datanodes: usize, change: impl Fn(&mut DatanodeSettings)) -> Self {
        let worker = |settings: &mut DatanodeSettings| {
            settings.task_slots = 2;
            settings.worker_command = vec![env!("CARGO_BIN_EXE_cairn").into(), "task-worker".into()];
            change(settings);
        };
        Self(Cluster::start(datanodes, worker).await)
    }

    async fn put(&self, path: &str, data: &[u8]) {
        let options =
            CreateOptions { block_size: BLOCK, replication: 2, create_parents: true, ..CreateOptions::default() };
        self.write(path, Bytes::copy_from_slice(data), options).await;
    }

    async fn lines(&self, folder: &str) -> Vec<Vec<u8>> {
        let mut lines = Vec::new();
        for entry in self.fs.list_all(folder).await.unwrap() {
            let all = self.get(&entry.path).await;
            lines.extend(all.split_inclusive(|byte| *byte == b'\n').map(<[u8]>::to_vec));
        }
        lines
    }

    async fn names(&self, folder: &str) -> Vec<String> {
        let entries = self.fs.list_all(folder).await.unwrap();
        entries.into_iter().map(|entry| entry.path.rsplit('/').next().unwrap().to_owned()).collect()
    }

    /// No node keeps anything of any job. (Of attempts that said something it keeps what they said.) The driver does not wait for slow nodes: this does.
    async fn assert_no_job_folders(&self) {
        for k in 0..self.nodes.len() {
            let jobs = self.dir.path().join(format!("dn{k}/jobs"));
            until(&format!("dn{k} keeps no job folders"), async || entries(&jobs) == 0).await;
        }
    }

    /// Waits until so many nodes hold each block: a write ends well without nodes that it left out.
    async fn replicated(&self, path: &str, nodes: usize) {
        let whole = async || {
            let blocks = self.fs.block_locations(path, 0, 0).await.unwrap();
            blocks.iter().all(|block| block.replicas.len() >= nodes)
        };
        until(&format!("{path} lies on {nodes} nodes"), whole).await;
    }

    async fn stop(self) {
        self.0.stop().await;
    }
}

/// Waits for what becomes true soon.
async fn until(what: &str, holds: impl AsyncFn() -> bool) {
    let wait = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), wait).await.unwrap_or_else(|_| panic!("not yet: {what}"));
}

fn entries(folder: &Path) -> usize {
    std::fs::read_dir(folder).map_or(0, Iterator::count)
}

/// Text of about `bytes` bytes with lines of many lengths and words of Zipf-like frequency.
fn text(bytes: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes + 64);
    let mut state = 88_172_645_463_325_252u64;
    while out.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let word = (state % 40_000) * (state >> 40) % (1 << (4 + state % 13));
        out.extend_from_slice(format!("Word{word}").as_bytes());
        out.push(if state.is_multiple_of(11) { b'\n' } else { b' ' });
    }
    out
}

fn counts(text: &[u8]) -> Vec<Vec<u8>> {
    let mut counts: BTreeMap<Vec<u8>, u64> = BTreeMap::new();
    for word in text.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty()) {
        *counts.entry(word.to_ascii_lowercase()).or_default() += 1;
    }
    let line = |(word, count): (Vec<u8>, u64)| [&word[..], format!("\t{count}\n").as_bytes()].concat();
    counts.into_iter().map(line).collect()
}

async fn succeed(cluster: &Jobs, spec: JobSpec) -> JobReport {
    let report = job::run(&cluster.fs, spec, JobObserver::none()).await.unwrap();
    assert_eq!(report.state, JobState::Succeeded, "{:?}\n{}", report.failure, report.stderr_tail);
    report
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn word_count_equals_the_plain_way_and_leaves_nothing() {
    let cluster = Jobs::start(3, |_| ()).await;
    let text = text(5 << 20);
    cluster.put("/in/a", &text[..3_500_000]).await;
    cluster.put("/in/sub/b", &text[3_500_000..]).await;
    cluster.put("/in/_hidden", b"not counted").await;
    cluster.put("/in/empty", b"").await;
    let mut want = text[..3_500_000].to_vec();
    want.push(b'\n');
    want.extend_from_slice(&text[3_500_000..]);
    let want = counts(&want);
    for (combine, output) in [(true, "/deep/out1"), (false, "/deep/out2")] {
        let mut spec = JobSpec::wordcount(vec!["/in".into()], output, combine);
        spec.reducers = Some(3);
        let report = succeed(&cluster, spec).await;
        let mut got = cluster.lines(output).await;
        got.sort();
        assert!(got == want, "with combiner: {combine}");
        assert_eq!(cluster.names(output).await, ["_SUCCESS", "part-r-00000", "part-r-00001", "part-r-00002"]);
        assert_eq!((report.map.tasks, report.reduce.tasks, report.map.attempts_failed), (6, 3, 0));
        assert_eq!((report.bytes.read, report.records.out), (text.len() as u64, want.len() as u64));
        assert_eq!(report.map.node_local + report.map.rack_local + report.map.remote, 6);
        assert_eq!(report.tasks.len(), 9);
    }
    cluster.assert_no_job_folders().await;
    assert_eq!(cluster.names("/deep").await, ["out1", "out2"]);

    let plan = job::plan(&cluster.fs, &JobSpec::wordcount(vec!["/in/*".into()], "/x", true)).await.unwrap();
    assert_eq!((plan.maps, plan.localities), (6, [6, 0, 0]));
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn grep_finds_lines_in_order_with_and_without_reducers() {
    let cluster = Jobs::start(2, |_| ()).await;
    let text: Vec<u8> = (0..200_000).flat_map(|i| format!("line {i} of the text\n").into_bytes()).collect();
    cluster.put("/text", &text).await;
    let want: Vec<Vec<u8>> =
        (0..200_000).filter(|i| i % 1_000 == 777).map(|i| format!("line {i} of the text\n").into_bytes()).collect();
    for reducers in [0, 1] {
        let output = format!("/found{reducers}");
        let mut spec = JobSpec::grep(vec!["/text".into()], &output, "[0-9]*777 of", false);
        spec.reducers = Some(reducers);
        let report = succeed(&cluster, spec).await;
        assert!(cluster.lines(&output).await == want);
        assert_eq!(report.records.input, 200_000);
    }
    let spec = JobSpec::grep(vec!["/text".into()], "/counted", "^LINE 7 ", true).with(property::IGNORE_CASE, "true");
    succeed(&cluster, spec).await;
    assert_eq!(cluster.lines("/counted").await, [b"line 7 of the text\t1\n"]);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_input_is_refused_before_any_task() {
    let cluster = Jobs::start(1, |_| ()).await;
    cluster.put("/text", b"some text").await;
    let refused = async |spec: JobSpec| job::run(&cluster.fs, spec, JobObserver::none()).await.unwrap_err();
    let count = |input: &str, output: &str| JobSpec::wordcount(vec![input.into()], output, true);
    let error = refused(count("/none", "/out")).await;
    assert_eq!((error.code(), error.message()), (ErrorCode::FileNotFound, "input /none does not exist"));
    assert_eq!(refused(count("/no*", "/out")).await.code(), ErrorCode::FileNotFound);
    let error = refused(count("/text", "/text")).await;
    assert_eq!(error.code(), ErrorCode::FileAlreadyExists, "{error}");
    let error = refused(JobSpec::grep(vec!["/text".into()], "/out", "a(", false)).await;
    assert_eq!(error.code(), ErrorCode::InvalidArgument, "{error}");
    let mut spec = count("/text", "/out");
    spec.reducers = Some(70_000);
    assert_eq!(refused(spec).await.code(), ErrorCode::InvalidArgument);
    assert_eq!(cluster.names("/").await, ["text"]);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_cannot_succeed_leaves_no_output_and_says_why() {
    // Workers that die: whatever is tried ends in the same way.
    let cluster = Jobs::start(2, |settings| {
        settings.worker_command = ["sh", "-c", "echo broken worker >&2; exit 7"].map(str::to_owned).to_vec();
    })
    .await;
    cluster.put("/text", b"some text").await;
    let spec = JobSpec::wordcount(vec!["/text".into()], "/new/out", true);
    let report = job::run(&cluster.fs, spec, JobObserver::none()).await.unwrap();
    assert_eq!((report.state, report.map.attempts_failed), (JobState::Failed, 4));
    let failure = report.failure.unwrap();
    assert!(failure.message().contains("map 0 failed 4 times") && failure.message().contains("status 7"), "{failure}");
    assert_eq!(report.stderr_tail, "broken worker");
    assert_eq!(cluster.names("/").await, ["text"]);
    // What the attempts said stays for a while, and nothing else.
    let logs = job::logs(&cluster.fs, &report.id).await.unwrap().logs;
    assert_eq!(logs.iter().map(job::JobLog::name).collect::<Vec<_>>(), ["m0.0", "m0.1", "m0.2", "m0.3"]);
    let mut said = Vec::new();
    job::read_log(&cluster.fs, &report.id, &logs[3], |piece| said.extend_from_slice(piece)).await.unwrap();
    assert_eq!(said, b"broken worker\n");
    let listed = job::list(&cluster.fs, 10).await.unwrap();
    assert_eq!((listed.len(), listed[0].id.as_str(), listed[0].state), (1, report.id.as_str(), job::Stage::Failed));
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_job_leaves_nothing() {
    let cluster = Jobs::start(2, |settings| {
        settings.worker_command = ["sleep", "1000"].map(str::to_owned).to_vec();
    })
    .await;
    cluster.put("/text", b"some text").await;
    let (observer, control) = JobObserver::new();
    let cancel = async {
        let mut progress = control.progress();
        progress.wait_for(|now| now.phase == Phase::Map && now.running > 0).await.unwrap();
        control.cancel();
    };
    let spec = JobSpec::wordcount(vec!["/text".into()], "/out", true);
    let (report, ()) = tokio::join!(job::run(&cluster.fs, spec, observer), cancel);
    assert_eq!(report.unwrap().state, JobState::Killed);
    assert_eq!(cluster.names("/").await, ["text"]);
    cluster.assert_no_job_folders().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_death_of_a_node_costs_its_work_not_the_job() {
    let mut cluster = Jobs::start(4, |_| ()).await;
    let text = text(12 << 20);
    cluster.put("/text", &text).await;
    cluster.replicated("/text", 2).await;
    let (observer, control) = JobObserver::new();
    let mut spec = JobSpec::wordcount(vec!["/text".into()], "/out", false);
    spec.reducers = Some(2);
    let victim = cluster.0.nodes[1].take().unwrap();
    let kill = async {
        let mut progress = control.progress();
        progress.wait_for(|now| now.maps_done >= 3).await.unwrap();
        victim.shutdown().await;
    };
    let (report, ()) = tokio::join!(job::run(&cluster.fs, spec, observer), kill);
    let report = report.unwrap();
    assert_eq!(report.state, JobState::Succeeded, "{:?}", report.failure);
    let mut got = cluster.lines("/out").await;
    got.sort();
    assert!(got == counts(&text));
    assert_eq!(report.bytes.read, text.len() as u64, "each map counts once");
    assert!(report.tasks.iter().all(|task| task.locality != Some(Locality::Node) || task.bytes > 0));
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn programs_that_nobody_has_run_for_a_week_are_removed() {
    const DAY_MS: u64 = 24 * 3_600_000;
    let cluster = Jobs::start(1, |_| ()).await;
    let dir = tempfile::tempdir().unwrap();
    let store = async |name: &str| {
        let local = dir.path().join(name);
        cairn_common::durable::write_atomic(&cairn_common::durable::SystemFs, &local, name.as_bytes()).unwrap();
        job::store(&cluster.fs, &local).await.unwrap().path
    };
    let now_ms = cluster.fs.env().clock.wall_ms();
    let last_used = async |path: &str, days: u64| {
        cluster.fs.set_times(path, Some(now_ms - days * DAY_MS), None).await.unwrap();
    };
    let (old, recent, again) = (store("old").await, store("recent").await, store("again").await);
    last_used(&old, 8).await;
    last_used(&recent, 6).await;
    last_used(&again, 8).await;
    assert_eq!(store("again").await, again, "taken once more");
    job::sweep(&cluster.fs).await;
    let left = cluster.fs.list_all("/.cairn/programs").await.unwrap();
    let mut left: Vec<&str> = left.iter().map(|file| file.path.as_str()).collect();
    left.sort_unstable();
    let mut want = [recent.as_str(), again.as_str()];
    want.sort_unstable();
    assert_eq!(left, want);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_graph_hands_over_through_the_file_system_and_goes_on_where_it_was() {
    let cluster = Jobs::start(2, |_| ()).await;
    cluster.put("/text", b"b a\nc b\n").await;
    let graph = |second_input: &str| {
        let first = JobSpec { reducers: Some(1), ..JobSpec::wordcount(vec!["/text".into()], "/counts", true) };
        let second = JobSpec { reducers: Some(1), ..JobSpec::wordcount(vec![second_input.into()], "/again", true) };
        job::JobGraph::new().stage("again", second).temporary("count", first)
    };
    let observe = |_: &str| JobObserver::none();
    // The second stage finds nothing to read at first; the first one is not run again.
    let report = graph("/counts/nothing").run(&cluster.fs, "g1", observe).await.unwrap();
    assert_eq!(report.state, JobState::Failed, "{report:?}");
    assert!(report.stages[0].why.as_ref().unwrap().contains("/counts/nothing"), "{report:?}");
    let first = report.stages[1].report.clone().unwrap();
    let report = graph("/counts").run(&cluster.fs, "g1", observe).await.unwrap();
    assert_eq!(report.state, JobState::Succeeded, "{report:?}");
    assert!(report.stages[1].earlier && report.stages[1].report == Some(first));
    assert_eq!(cluster.lines("/again").await.concat(), b"1\t2\n2\t1\na\t1\nb\t1\nc\t1\n");
    assert_eq!(cluster.names("/").await, ["again", "text"], "the temporary output is gone");
    cluster.stop().await;
}

//! The examples as a user runs them: executables of their own against a running cluster, whose results are computed again here.
#![cfg(feature = "cli")]
// A helper that fails is a test that fails.
#![allow(clippy::unwrap_used, clippy::expect_used)]
// Files of a test are its own.
#![allow(clippy::disallowed_methods)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::path::PathBuf;
use std::process::Output;
use std::time::Duration;

use bytes::Bytes;
use cairn_client::fs::CreateOptions;
use cairn_client::job::{self, JobObserver, JobSpec, JobState};

use common::Cluster;

struct Examples {
    cluster: Cluster,
    random: u64,
}

impl Examples {
    async fn start() -> Self {
        let cluster = Cluster::start(2, |settings| {
            settings.task_slots = 2;
            settings.worker_command = vec![env!("CARGO_BIN_EXE_cairn").into(), "task-worker".into()];
        });
        Self { cluster: cluster.await, random: 88_172_645_463_325_252 }
    }

    async fn put(&self, path: &str, data: &str) {
        let options =
            CreateOptions { block_size: 1 << 20, replication: 2, create_parents: true, ..CreateOptions::default() };
        self.cluster.write(path, Bytes::copy_from_slice(data.as_bytes()), options).await;
    }

    /// A number below `limit`.
    fn random(&mut self, limit: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) % limit
    }

    async fn example(&self, name: &str, arguments: &[&str]) -> Output {
        // This test lies in target/<profile>/deps, examples beside it.
        let own = std::env::current_exe().unwrap();
        let program = own.parent().unwrap().parent().unwrap().join("examples").join(name);
        assert!(program.exists(), "{} is missing: cargo build --examples", program.display());
        let mut command = tokio::process::Command::new(program);
        command.args(arguments).env("CAIRN_NAMENODE", self.cluster.namenode.rpc_addr.to_string());
        command.output().await.unwrap()
    }

    async fn run(&self, name: &str, arguments: &[&str]) -> String {
        let output = self.example(name, arguments).await;
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{name} {arguments:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
        text
    }

    async fn fails(&self, name: &str, arguments: &[&str]) -> String {
        let output = self.example(name, arguments).await;
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    }

    /// Lines of all files of a folder, sorted.
    async fn lines(&self, folder: &str) -> Vec<String> {
        let mut lines = Vec::new();
        for entry in self.cluster.fs.list_all(folder).await.unwrap() {
            let text = String::from_utf8(self.cluster.get(&entry.path).await).unwrap();
            lines.extend(text.lines().map(str::to_owned));
        }
        lines.sort();
        lines
    }

    fn local_file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.cluster.dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    }
}

/// Text of many lines with words that repeat.
fn text(examples: &mut Examples, lines: u64) -> String {
    let mut text = String::new();
    for _ in 0..lines {
        for _ in 0..=examples.random(9) {
            let word = examples.random(40) * examples.random(40);
            text.push_str(&format!("Wort{word} "));
        }
        text.push('\n');
    }
    text
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn word_count_and_inverted_index() {
    let mut examples = Examples::start().await;
    let texts: Vec<String> = (0..2).map(|_| text(&mut examples, 4_000)).collect();
    let mut places: BTreeMap<String, BTreeMap<String, Vec<usize>>> = BTreeMap::new();
    for (number, text) in texts.iter().enumerate() {
        let path = format!("/books/{number}");
        examples.put(&path, text).await;
        for word in text.split_whitespace() {
            let offset = word.as_ptr() as usize - text.as_ptr() as usize;
            places.entry(word.to_lowercase()).or_default().entry(path.clone()).or_default().push(offset);
        }
    }
    let count = |files: &BTreeMap<String, Vec<usize>>| files.values().map(Vec::len).sum::<usize>();

    let printed = examples.run("word_count", &["--input", "/books", "--output", "/counts", "--reducers", "3"]).await;
    assert!(printed.contains("tasks: "), "{printed}");
    let mut want: Vec<String> = places.iter().map(|(word, files)| format!("{word}\t{}", count(files))).collect();
    want.sort();
    assert_eq!(examples.lines("/counts").await, want);

    let stop = examples.local_file("stop.txt", "wort0 wort12\n");
    let file = format!("stop-words={}", stop.display());
    let printed = examples.run("inverted_index", &["--input", "/books", "--output", "/index", "--file", &file]).await;
    let stopped: usize =
        ["wort0", "wort12"].iter().map(|word| places.remove(*word).map_or(0, |files| count(&files))).sum();
    assert!(printed.contains(&format!("user.stop words = {stopped}")), "{printed}");
    let listed = |(path, offsets): (&String, &Vec<usize>)| {
        format!("{path}:{}", offsets.iter().map(usize::to_string).collect::<Vec<_>>().join(","))
    };
    let mut want: Vec<String> = places
        .iter()
        .map(|(word, files)| format!("{word}\t{}", files.iter().map(listed).collect::<Vec<_>>().join(" ")))
        .collect();
    want.sort();
    assert_eq!(examples.lines("/index").await, want);

    // What cannot be: told in one line, with the task and its node.
    let error = examples.fails("inverted_index", &["--input", "/books", "--output", "/x"]).await;
    assert!(error.contains("the job has no cache file \"stop-words\""), "{error}");
    let error = examples.fails("word_count", &["--input", "/none", "--output", "/x"]).await;
    assert_eq!(error, "input /none does not exist\n");
    examples.cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn secondary_sort_gives_the_hottest_readings() {
    let mut examples = Examples::start().await;
    let mut readings: BTreeMap<String, BTreeSet<(i64, String)>> = BTreeMap::new();
    let mut text = String::new();
    for day in 0..80_000 {
        let (station, degrees) = (format!("s{}", examples.random(300)), examples.random(80) as i64 - 40);
        let date = format!("{day:06}");
        text.push_str(&format!("{station},{date},{degrees}\n"));
        readings.entry(station).or_default().insert((-degrees, date));
    }
    examples.put("/readings", &text).await;
    examples
        .run("secondary_sort", &["--input", "/readings", "--output", "/hottest", "-D", "top=3", "--reducers", "2"])
        .await;
    let top = |all: &BTreeSet<(i64, String)>| {
        let shown = all.iter().take(3).map(|(minus, date)| format!("{}@{date}", -minus));
        shown.collect::<Vec<_>>().join(" ")
    };
    let mut want: Vec<String> = readings.iter().map(|(station, all)| format!("{station}\t{}", top(all))).collect();
    want.sort();
    assert_eq!(examples.lines("/hottest").await, want);

    examples.put("/bad", "s1,d,5\ns1,d,hot\n").await;
    let error = examples.fails("secondary_sort", &["--input", "/bad", "--output", "/x"]).await;
    assert!(
        error.contains("not station,date,temperature") && error.contains("the record at byte 7 of /bad"),
        "{error}"
    );
    examples.cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_joins_give_the_same() {
    let mut examples = Examples::start().await;
    let (mut customers, mut orders) = (String::new(), String::new());
    let mut names = BTreeMap::new();
    for number in 0..500 {
        let id = format!("c{:03}", number * 2);
        customers.push_str(&format!("{id}\tName of {number}\n"));
        names.insert(id, format!("Name of {number}"));
    }
    let mut want = Vec::new();
    for number in 0..10_000 {
        let id = format!("c{:03}", examples.random(1_000));
        orders.push_str(&format!("{id}\torder {number}\n"));
        if let Some(name) = names.get(&id) {
            want.push(format!("{id}\t{name}\torder {number}"));
        }
    }
    want.sort();
    examples.put("/orders/all", &orders).await;
    examples.put("/customers/all", &customers).await;

    let inputs = ["--input", "/orders", "--input", "/customers", "-D", "customers=/customers"];
    examples.run("joins", &[&["reduce"][..], &inputs, &["--output", "/joined/1", "--reducers", "3"]].concat()).await;
    assert_eq!(examples.lines("/joined/1").await, want);

    let file = format!("customers={}", examples.local_file("customers.txt", &customers).display());
    let rest = ["--output", "/joined/2", "--reducers", "0"];
    let printed =
        examples.run("joins", &[&["broadcast", "--input", "/orders", "--file", &file][..], &rest].concat()).await;
    // Orders without a customer are in files of their own.
    let (unmatched, matched): (Vec<String>, Vec<String>) =
        examples.lines("/joined/2").await.into_iter().partition(|line| line.matches('\t').count() == 1);
    assert_eq!(matched, want);
    let without = 10_000 - want.len();
    assert_eq!(unmatched.len(), without);
    let entries = examples.cluster.fs.list_all("/joined/2").await.unwrap();
    let names: Vec<&str> = entries.iter().filter_map(|entry| entry.path.rsplit('/').next()).collect();
    assert_eq!(names, ["_SUCCESS", "part-m-00000", "unmatched-m-00000"]);
    assert!(printed.contains(&format!("user.orders without a customer = {without}")), "{printed}");

    // Parts cut at the same customers, sorted.
    let (mut sorted, mut cut) = (orders.lines().collect::<Vec<_>>(), customers.lines().collect::<Vec<_>>());
    sorted.sort();
    cut.sort();
    for (number, range) in [("0", "c000".."c400"), ("1", "c400".."d")].into_iter() {
        let part = |lines: &[&str]| {
            let inside = lines.iter().filter(|line| range.contains(&&line[..4]));
            inside.map(|line| format!("{line}\n")).collect::<String>()
        };
        examples.put(&format!("/sorted/orders/part-r-0000{number}"), &part(&sorted)).await;
        examples.put(&format!("/sorted/customers/part-r-0000{number}"), &part(&cut)).await;
    }
    let inputs = ["--input", "/sorted/orders", "-D", "customers=/sorted/customers", "--reducers", "0"];
    examples.run("joins", &[&["merge"][..], &inputs, &["--output", "/joined/3"]].concat()).await;
    assert_eq!(examples.lines("/joined/3").await, want);
    examples.cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pagerank_runs_a_chain_of_jobs() {
    const PAGES: u64 = 300;
    let mut examples = Examples::start().await;
    let mut links: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for page in 0..PAGES {
        // Some link to nothing, some to a page that is not there.
        let count = examples.random(6);
        let targets = (0..count).map(|_| format!("p{}", examples.random(page + 5)));
        links.insert(format!("p{page}"), targets.collect());
    }
    let text: String = links.iter().map(|(page, targets)| format!("{page}\t{}\n", targets.join(" "))).collect();
    examples.put("/links", &text).await;
    let namenode = examples.cluster.namenode.rpc_addr.to_string();
    let told = examples.run("pagerank", &[&namenode, "/links", "/ranks", "5"]).await;
    assert!(kept_bytes(&told) > 0, "what steps hand on is kept for the next: {told}");

    let mut ranks: BTreeMap<&str, f64> = links.keys().map(|page| (page.as_str(), 1.0)).collect();
    for _ in 0..5 {
        let mut received: BTreeMap<&str, f64> = BTreeMap::new();
        let mut dangling = 0.0;
        for (page, targets) in &links {
            let rank = ranks[page.as_str()];
            if targets.is_empty() {
                dangling += rank;
            }
            for target in targets {
                *received.entry(target).or_default() += rank / targets.len() as f64;
            }
        }
        for (page, rank) in &mut ranks {
            *rank = 0.15 + 0.85 * (received.get(page).unwrap_or(&0.0) + dangling / PAGES as f64);
        }
    }
    let lines = examples.lines("/ranks/final").await;
    assert_eq!(lines.len() as u64, PAGES);
    for line in lines {
        let mut fields = line.split('\t');
        let (page, rank) = (fields.next().unwrap(), fields.next().unwrap().parse::<f64>().unwrap());
        assert!((rank - ranks[page]).abs() < 1e-6, "{page}: {rank}, not {}", ranks[page]);
        assert_eq!(fields.next().unwrap(), links[page].join(" "));
    }
    let left: Vec<_> = examples.cluster.fs.list_all("/ranks").await.unwrap();
    assert_eq!(left.len(), 1, "steps are left: {left:?}");
    examples.cluster.stop().await;
}

/// What a graph says of content that its steps kept for each other.
fn kept_bytes(told: &str) -> u64 {
    let line = told.lines().find(|line| line.ends_with("had kept them")).unwrap();
    line.split(' ').next().unwrap().parse().unwrap()
}

/// Centres after so many iterations, with how many points they have.
fn clustered(points: &[[f64; 2]], centres: usize, iterations: usize) -> Vec<([f64; 2], u64)> {
    let mut all: Vec<([f64; 2], u64)> = points[..centres].iter().map(|point| (*point, 0)).collect();
    for _ in 0..iterations {
        let mut sums = vec![([0.0; 2], 0); centres];
        for [x, y] in points {
            let distance = |([a, b], _): &([f64; 2], u64)| (a - x) * (a - x) + (b - y) * (b - y);
            let nearest = (0..centres).min_by(|a, b| distance(&all[*a]).total_cmp(&distance(&all[*b]))).unwrap();
            let ([sum_x, sum_y], count) = &mut sums[nearest];
            (*sum_x, *sum_y, *count) = (*sum_x + x, *sum_y + y, *count + 1);
        }
        for (([x, y], points), ([sum_x, sum_y], count)) in all.iter_mut().zip(sums) {
            *points = count;
            if count > 0 {
                (*x, *y) = (sum_x / count as f64, sum_y / count as f64);
            }
        }
    }
    all
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kmeans_finds_its_points_where_an_iteration_before_has_kept_them() {
    // So many that one in which nodes did not tell in time what they keep does not matter.
    const ITERATIONS: usize = 6;
    let mut examples = Examples::start().await;
    let mut points = Vec::new();
    for at in 0..150_000u64 {
        let near = [(at % 3) as f64 * 300.0, (at % 3) as f64 * 200.0];
        points.push(near.map(|near| near + examples.random(200_000) as f64 / 1_000.0));
    }
    let text: String = points.iter().map(|[x, y]| format!("{x} {y}\n")).collect();
    assert!(text.len() > 2 << 20, "several splits: {}", text.len());
    examples.put("/points/plain", &text).await;
    let namenode = examples.cluster.namenode.rpc_addr.to_string();
    let iterations = ITERATIONS.to_string();
    let want = clustered(&points, 3, ITERATIONS);
    let check = async |examples: &Examples, output: &str| {
        let lines = examples.lines(&format!("{output}/step-{ITERATIONS}")).await;
        assert_eq!(lines.len(), want.len());
        for (at, (line, ([x, y], count))) in lines.iter().zip(&want).enumerate() {
            let fields: Vec<f64> = line.split(['\t', ' ']).map(|field| field.parse().unwrap()).collect();
            assert_eq!(fields[..2], [at as f64, *count as f64]);
            assert!((fields[2] - x).abs() < 1e-6 && (fields[3] - y).abs() < 1e-6, "{line}, not {x} {y}");
        }
    };
    let told = examples.run("kmeans", &[&namenode, "/points", "/clusters", "3", &iterations]).await;
    check(&examples, "/clusters").await;
    let all = (text.len() * ITERATIONS) as u64;
    let kept = kept_bytes(&told);
    assert!(kept > all / 2, "{kept} bytes of {all} were kept");
    let left = |examples: &Examples, node: usize| {
        let kept = examples.cluster.dir.path().join(format!("dn{node}/jobs/.kept"));
        std::fs::read_dir(kept).into_iter().flatten().count()
    };
    let forgotten = async {
        while left(&examples, 0) + left(&examples, 1) > 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let forgotten = tokio::time::timeout(Duration::from_secs(60), forgotten).await;
    forgotten.expect("nodes forget it with the end of the graph");

    let told = examples.run("kmeans", &[&namenode, "/points", "/forgetful", "3", &iterations, "--forget"]).await;
    assert_eq!(kept_bytes(&told), 0);
    check(&examples, "/forgetful").await;

    // Compressed input is kept as what it holds.
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(text.as_bytes()).unwrap();
    let packed = [("zst", zstd::encode_all(text.as_bytes(), 1).unwrap()), ("gz", gzip.finish().unwrap())];
    for (extension, bytes) in packed {
        let (folder, output) = (format!("/packed-{extension}"), format!("/unpacked-{extension}"));
        let options = CreateOptions { replication: 2, create_parents: true, ..CreateOptions::default() };
        examples.cluster.write(&format!("{folder}/points.{extension}"), bytes.into(), options).await;
        let told = examples.run("kmeans", &[&namenode, &folder, &output, "3", &iterations]).await;
        check(&examples, &output).await;
        let kept = kept_bytes(&told);
        assert!(kept > all / 2, "{extension}: {kept} bytes of {all} were kept");
    }
    examples.fails("kmeans", &[&namenode, "/points", "/bad", "0", "1"]).await;
    examples.cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_program_is_stored_once_and_runs_only_if_it_is_what_its_name_says() {
    let examples = Examples::start().await;
    examples.put("/text", "some words and some more\n").await;
    examples.run("word_count", &["--input", "/text", "--output", "/out1"]).await;
    let stored = examples.cluster.fs.list_all("/.cairn/programs").await.unwrap();
    assert_eq!(stored.len(), 1, "{stored:?}");

    // A damaged copy on a node is fetched anew.
    for node in 0..2 {
        let cache = examples.cluster.dir.path().join(format!("dn{node}/jobs/.cache"));
        for entry in std::fs::read_dir(cache).into_iter().flatten() {
            let path = entry.unwrap().path();
            let mut bytes = std::fs::read(&path).unwrap();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            std::fs::remove_file(&path).unwrap();
            std::fs::write(&path, bytes).unwrap();
        }
    }
    examples.run("word_count", &["--input", "/text", "--output", "/out2"]).await;
    assert_eq!(examples.lines("/out2").await, ["and\t1", "more\t1", "some\t2", "words\t1"]);
    assert_eq!(examples.cluster.fs.list_all("/.cairn/programs").await.unwrap().len(), 1);

    // What lies under a hash that is not its own is not run, nor what was built for another machine.
    let file = job::store(&examples.cluster.fs, &examples.local_file("evil", "#!/bin/sh\n")).await.unwrap();
    let wrong = job::Shipped { sha256: "0".repeat(64), ..file };
    for (target, why) in [("", "was built for "), (&*job::target(), "does not have the content that its name says")] {
        let executable = job::Executable { file: wrong.clone(), target: target.into(), glibc: 0 };
        let spec = JobSpec { executable: Some(executable), ..JobSpec::new("x", vec!["/text".into()], "/out3") };
        let report = job::run(&examples.cluster.fs, spec, JobObserver::none()).await.unwrap();
        assert_eq!(report.state, JobState::Failed);
        let failure = report.failure.unwrap();
        assert!(failure.message().contains(why), "{failure}");
    }
    examples.cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn records_that_kill_their_worker_are_named_or_left_out() {
    let examples = Examples::start().await;
    let mut text = String::new();
    let mut lengths: BTreeMap<usize, u64> = BTreeMap::new();
    let mut places = Vec::new();
    for number in 0..150_000 {
        let line = match number {
            70_000 => "abort".to_owned(),
            70_001 => "panic".to_owned(),
            90_000 => "error".to_owned(),
            140_000 => "abort".to_owned(),
            _ => format!("line {number}"),
        };
        if line.starts_with("line") {
            *lengths.entry(line.len()).or_default() += 1;
        } else {
            places.push((text.len(), line.clone()));
        }
        text.push_str(&line);
        text.push('\n');
    }
    examples.put("/lines", &text).await;

    let error = examples.fails("fragile", &["--input", "/lines", "--output", "/out"]).await;
    let first = format!("the record at byte {} of /lines", places[0].0);
    let other = format!("the record at byte {} of /lines", places[3].0);
    assert!(error.contains("was ended by signal 6; it was at the record at byte"), "{error}");
    assert!(error.contains(&first) || error.contains(&other), "{error}");

    let few = ["--input", "/lines", "--output", "/out", "-D", "skip-records=1"];
    let error = examples.fails("fragile", &few).await;
    assert!(error.contains("failed on more than the 1 records that may be skipped"), "{error}");

    let printed = examples.run("fragile", &["--input", "/lines", "--output", "/out", "-D", "skip-records=3"]).await;
    let want: BTreeSet<String> = lengths.iter().map(|(length, count)| format!("{length}\t{count}")).collect();
    assert_eq!(examples.lines("/out").await.into_iter().collect::<BTreeSet<_>>(), want);
    assert!(printed.contains("map.records_skipped = 4"), "{printed}");
    for (offset, line) in places {
        let why = match &*line {
            "abort" => "the worker died on it",
            "panic" => "panicked: a bug",
            _ => "it cannot be measured",
        };
        let told = format!("skipped the record at byte {offset} of /lines: {why}; it starts with {line:?}");
        assert!(printed.contains(&told), "{told} is not in {printed}");
    }
    examples.cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn compressed_input_is_read_and_damage_is_told() {
    use cairn_client::mapreduce::output::{Output, OutputNames, OutputSink};
    use cairn_client::mapreduce::{Compression, OutputFormat, Result, UserCounters};
    use std::sync::{Arc, Mutex};

    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl OutputSink for Sink {
        fn open(&mut self, _attempt_name: &str) -> Result<()> {
            Ok(())
        }
        fn write(&mut self, _file: usize, piece: Bytes) -> Result<()> {
            self.0.lock().unwrap().extend_from_slice(&piece);
            Ok(())
        }
    }

    let mut examples = Examples::start().await;
    let text = text(&mut examples, 3_000);
    let mut want: BTreeMap<String, u64> = BTreeMap::new();
    for word in text.split_whitespace() {
        *want.entry(word.to_lowercase()).or_default() += 3;
    }
    let want: Vec<String> = want.iter().map(|(word, count)| format!("{word}\t{count}")).collect();
    let options = || CreateOptions { create_parents: true, ..CreateOptions::default() };
    for kind in [Compression::Gzip, Compression::Bzip2, Compression::Zstd] {
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let (format, names) = (OutputFormat::TEXT.compressed(kind), OutputNames::default());
        let mut out = Output::new(Box::new(Sink(Arc::clone(&bytes))), format, names, UserCounters::default()).unwrap();
        for line in text.lines() {
            out.line(line.as_bytes()).unwrap();
        }
        out.finish().unwrap();
        let file = bytes.lock().unwrap().clone();
        examples.cluster.write(&format!("/in/text{}", kind.extension()), file.clone().into(), options()).await;
        let cut = Bytes::from(file[..file.len() / 2].to_vec());
        examples.cluster.write(&format!("/cut/text{}", kind.extension()), cut, options()).await;
    }
    examples.run("word_count", &["--input", "/in", "--output", "/counts"]).await;
    let mut got = examples.lines("/counts").await;
    got.sort();
    let mut sorted = want;
    sorted.sort();
    assert!(got == sorted);
    for (file, kind) in [("text.gz", "gzip"), ("text.bz2", "bzip2"), ("text.zst", "zstd")] {
        let input = format!("/cut/{file}");
        let error = examples.fails("word_count", &["--input", &input, "--output", "/x"]).await;
        let told = format!("{input}: the {kind} data are damaged or cut off at about byte ");
        assert!(error.contains(&told) && error.contains("map 0 failed once"), "{error}");
    }
    examples.cluster.stop().await;
}

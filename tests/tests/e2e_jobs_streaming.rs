//! Commands as mappers and reducers: Hadoop Streaming's contract, and clear errors for all that commands can do wrong.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "tests fail by panicking")]

mod gate;

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use cairn_tests::data::{self, sorted_lines};
use cairn_tests::{Cluster, ClusterOptions, Run, process, wait_until};
use serde_json::Value;

const COUNT_MAPPER: &str = r#"#!/usr/bin/env python3
import sys
for line in sys.stdin.buffer:
    for word in line.lower().split():
        sys.stdout.buffer.write(word + b"\t1\n")
sys.stderr.write("reporter:counter:words,mappers,1\nreporter:status:done\nnot a report\n")
"#;

/// Sums counts of equal words; relies on equal words being neighbours.
const SUM_REDUCER: &str = r#"#!/usr/bin/env python3
import sys
last, total = None, 0
for line in sys.stdin.buffer:
    word, count = line.rstrip(b"\n").split(b"\t")
    if word != last:
        if last is not None:
            sys.stdout.buffer.write(last + b"\t%d\n" % total)
        last, total = word, 0
    total += int(count)
if last is not None:
    sys.stdout.buffer.write(last + b"\t%d\n" % total)
"#;

fn script(cluster: &Cluster, name: &str, text: &str) -> String {
    let path = cluster.local_file(name, text.as_bytes());
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

fn stream(cluster: &Cluster, flags: &[&str], input: &str, output: &str) -> Run {
    cluster.cairn(&[&["--json", "job", "streaming", "--input", input, "--output", output], flags].concat())
}

fn lines(bytes: &[u8]) -> Vec<&str> {
    std::str::from_utf8(bytes).unwrap().lines().collect()
}

#[test]
fn python_counts_words_as_a_unix_pipeline_does_with_and_without_a_combiner() {
    let cluster = Cluster::small();
    let local = cluster.local_file("text", &data::text(11, 3 << 20, 20_000));
    cluster.cairn(&["put", &local, "/text"]).ok();
    let (mapper, reducer) = (script(&cluster, "count.py", COUNT_MAPPER), script(&cluster, "sum.py", SUM_REDUCER));
    let expected = data::word_count_by_pipeline(local.as_ref());
    for combiner in [false, true] {
        let output = format!("/counts-{combiner}");
        let mut flags = vec![
            "--mapper",
            "count.py",
            "--reducer",
            "sum.py",
            "--file",
            &mapper,
            "--file",
            &reducer,
            "--reducers",
            "3",
        ];
        if combiner {
            flags.extend(["--combiner", "./sum.py"]);
        }
        let report = stream(&cluster, &flags, "/text", &output).json();
        let got = sorted_lines(&cluster.cat(&format!("{output}/part-r-*")));
        assert!(got == expected, "{} bytes of counts, expected {}: {report}", got.len(), expected.len());
        let records = &report["records"];
        assert_eq!(report["counters"]["user.words.mappers"], report["map"]["tasks"], "{report}");
        let shuffled = records["combine_out"].as_u64().unwrap();
        let words: u64 = String::from_utf8_lossy(&expected)
            .lines()
            .map(|line| line.rsplit('\t').next().unwrap().parse::<u64>().unwrap())
            .sum();
        assert!(if combiner { shuffled < words / 2 } else { shuffled == words }, "{shuffled} of {words}");
    }
}

#[test]
fn a_job_without_reducers_writes_what_its_maps_print() {
    let cluster = Cluster::small();
    let text = data::text(12, 2 << 20, 5_000);
    cluster.put("/text", &text, &[]);
    for (output, flags) in [
        ("/a", &["--mapper", "cat", "--reducer", "NONE"][..]),
        ("/b", &["--mapper", "cat", "--reducer", "wc -l", "-D", "mapreduce.job.reduces=0"]),
    ] {
        let report = stream(&cluster, flags, "/text", output).json();
        assert_eq!(report["reduce"]["tasks"], 0);
        let mut expected = text.clone();
        // Every line of the output ends.
        expected.push(b'\n');
        assert!(cluster.cat(&format!("{output}/part-m-*")) == expected);
        assert_eq!(report["records"]["in"], report["records"]["out"], "{report}");
    }
    // awk, by its own separator, and the records of an identity reducer.
    let flags = ["--mapper", "awk '{print length($0) \"\\t\" NR}'", "--reducers", "2"];
    stream(&cluster, &flags, "/text", "/c").json();
    let mut want: Vec<String> = Vec::new();
    for part in text.chunks(1 << 20).map(<[u8]>::len).scan(0, |at, length| Some(std::mem::replace(at, *at + length))) {
        // Lines belong to the split in which they start.
        let starts = |at: usize| at == 0 || text[at - 1] == b'\n';
        let from = (part..text.len()).find(|at| starts(*at)).unwrap_or(text.len());
        let to = (part + (1 << 20)..text.len()).find(|at| starts(*at)).unwrap_or(text.len());
        let mut child = std::process::Command::new("awk")
            .arg("{print length($0) \"\\t\" NR}")
            .env("LANG", "C.UTF-8")
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let piece = text[from..to].to_vec();
        std::thread::spawn(move || std::io::Write::write_all(&mut stdin, &piece).unwrap());
        want.extend(lines(&child.wait_with_output().unwrap().stdout).iter().map(|line| (*line).to_owned()));
    }
    want.sort();
    let got = sorted_lines(&cluster.cat("/c/part-r-*"));
    assert_eq!(lines(&got), want);
}

#[test]
fn keys_are_cut_ordered_and_spread_by_fields() {
    let cluster = Cluster::small();
    let mut random = data::Random::new(5);
    let rows: Vec<String> = (0..5_000)
        .map(|i| format!("g{}.{}.x{}.{i}", random.below(40), random.below(1_000) as i64 - 500, random.below(10)))
        .collect();
    cluster.put("/rows", (rows.join("\n") + "\n").as_bytes(), &["--block-size", "16k"]);
    let flags = [
        "--mapper",
        "cat",
        "--reducer",
        "cat",
        "--reducers",
        "4",
        "--partitioner",
        "fields",
        "-D",
        "stream.map.output.field.separator=.",
        "-D",
        "stream.num.map.output.key.fields=3",
        "-D",
        "mapreduce.map.output.key.field.separator=.",
        "-D",
        "mapreduce.partition.keypartitioner.options=-k1,1",
        "-D",
        "mapreduce.partition.keycomparator.options=-k1,1 -k2,2nr",
    ];
    stream(&cluster, &flags, "/rows", "/out").json();
    let mut all = Vec::new();
    let mut owner: BTreeMap<String, usize> = BTreeMap::new();
    let mut used = BTreeSet::new();
    for part in 0..4 {
        let bytes = cluster.cat(&format!("/out/part-r-{part:05}"));
        let keyed: Vec<(String, i64)> = lines(&bytes)
            .iter()
            .map(|line| {
                // Key and value are joined by a tab.
                let fields: Vec<&str> = line.split(['.', '\t']).collect();
                all.push(fields.join("."));
                assert_eq!(line.matches('\t').count(), 1, "{line}");
                (fields[0].to_owned(), -fields[1].parse::<i64>().unwrap())
            })
            .collect();
        assert!(keyed.is_sorted(), "part {part} is ordered by group, then by falling number");
        for (group, _) in keyed {
            assert_eq!(*owner.entry(group).or_insert(part), part, "a group lies in one part");
            used.insert(part);
        }
    }
    assert_eq!(owner.len(), 40);
    assert!(used.len() > 1, "groups are spread");
    all.sort();
    let mut want = rows;
    want.sort();
    assert_eq!(all, want);
}

#[test]
fn tasks_know_themselves_by_hadoops_variables() {
    let cluster = Cluster::small();
    cluster.put_in_folders("/in/file.txt", b"one\ntwo\n", &[]);
    cluster.put_in_folders("/in/other.txt", b"three\n", &[]);
    let names = "mapreduce_job_id mapreduce_task_id mapreduce_task_attempt_id mapreduce_map_input_file mapreduce_task_partition \
        mapreduce_task_ismap mapreduce_job_reduces map_input_start my_own_property";
    let mapper =
        format!("sh -c 'cat > /dev/null; for name in {names}; do eval echo $name=\\\"\\$$name\\\"; done; pwd; ls'");
    let file = cluster.local_file("side-data.txt", b"beside");
    let flags = ["--mapper", &mapper, "--reducer", "NONE", "-D", "my.own-property=a b", "--file", &file];
    let report = stream(&cluster, &flags, "/in", "/out").json();
    let text = String::from_utf8(cluster.cat("/out/part-m-00001")).unwrap();
    let job = report["id"].as_str().unwrap();
    let number = job.strip_prefix("job-").unwrap().replace('-', "_");
    for want in [
        format!("mapreduce_job_id={job}"),
        format!("mapreduce_task_id=task_{number}_m_000001"),
        format!("mapreduce_task_attempt_id=attempt_{number}_m_000001_0"),
        "mapreduce_map_input_file=/in/other.txt".into(),
        "mapreduce_task_partition=1".into(),
        "mapreduce_task_ismap=true".into(),
        "mapreduce_job_reduces=0".into(),
        "map_input_start=0".into(),
        "my_own_property=a b".into(),
        "side-data.txt".into(),
    ] {
        assert!(text.lines().any(|line| line == want), "no {want:?} in\n{text}");
    }
}

#[test]
fn what_commands_do_wrong_is_told_with_task_node_and_last_words() {
    let cluster = Cluster::small();
    cluster.put("/text", &data::text(13, 400_000, 1_000), &[]);
    let plain = cluster.local_file("plain.py", b"print('x')\n");
    std::fs::set_permissions(&plain, std::fs::Permissions::from_mode(0o644)).unwrap();
    let no_interpreter = script(&cluster, "nothing.py", "#!/no/such/interpreter\n");
    let cases: &[(&[&str], &[&str])] = &[
        (&["--mapper", "no-such-mapper"], &["no-such-mapper", "no such file", "--file"]),
        (&["--mapper", "plain.py", "--file", &plain], &["plain.py", "not executable", "chmod"]),
        (&["--mapper", "nothing.py", "--file", &no_interpreter], &["nothing.py", "interpreter"]),
        (&["--mapper", "sh -c 'cat >/dev/null; exit 3'"], &["exited with status 3"]),
        (&["--mapper", "sh -c 'kill -9 $$'"], &["signal 9"]),
        (&["--mapper", "sh -c 'exec <&-; exit 0'"], &["before it had read all"]),
        (
            &["--mapper", "head -c 70000000 /dev/zero", "-D", "stream.unread.input.is.failure=false"],
            &["line of more than 16777216 bytes"],
        ),
        (&["--mapper", "cat", "--reducer", "sh -c 'cat >/dev/null; exit 4'"], &["reduce", "exited with status 4"]),
        (&["--mapper", "cat", "--combiner", "sh -c 'cat >/dev/null; exit 5'"], &["combiner", "exited with status 5"]),
    ];
    for (number, (flags, parts)) in cases.iter().enumerate() {
        let output = format!("/out-{number}");
        let run = cluster.cairn(&[&["job", "streaming", "--input", "/text", "--output", &output], *flags].concat());
        let line = run.fails_naming(1, parts);
        assert!(line.contains("map 0") || line.contains("map 1") || line.contains("reduce 0"), "{line} names the task");
        assert!(line.contains("on dn"), "{line} names the node");
        cluster.cairn(&["stat", &output]).fails(1);
    }
    // One that never ends is stopped when it has made no progress for long enough; one that reports lives on.
    let hung = |script: &str, limit_ms: u32, output: &str| {
        let limit = format!("mapreduce.task.timeout={limit_ms}");
        let flags = ["-D", &limit, "-D", "mapreduce.map.maxattempts=1", "--reducer", "NONE"];
        let mapper = ["--mapper", script];
        cluster.cairn(&[&["job", "streaming", "--input", "/text", "--output", output], &mapper[..], &flags].concat())
    };
    hung("sleep 1000", 2_000, "/hung").fails_naming(1, &["map 0", "no progress", "limit is 2 s"]);
    let reports = "sh -c 'cat >/dev/null; for i in $(seq 20); do sleep 0.6; echo reporter:counter:a,b,1 >&2; done'";
    hung(reports, 10_000, "/reports").ok();
    cluster.cairn(&["rm", "-r", "--skip-trash", "/reports"]).ok();
    let loud = "sh -c 'echo first words >&2; echo last words >&2; exit 7'";
    let run = cluster.cairn(&["job", "streaming", "--input", "/text", "--output", "/loud", "--mapper", loud]);
    assert!(String::from_utf8_lossy(&run.stdout).contains("last words"), "the task's last lines are shown");
    let listed = cluster.json(&["ls", "/"]);
    assert_eq!(
        listed
            .as_array()
            .unwrap()
            .iter()
            .filter(|entry| entry["path"] != "/text" && entry["path"] != "/.cairn")
            .count(),
        0,
        "nothing is left: {listed}"
    );
}

#[test]
fn reduces_fetch_while_the_last_map_runs() {
    let cluster = Cluster::start(ClusterOptions::new(2, 1).more("[datanode]\ntask_slots = 2"));
    let text = |at: u32| (0..9_000).flat_map(move |n| format!("w{}\n", n * (at + 7) % 501).into_bytes()).collect();
    let texts: Vec<Vec<u8>> = (0..5).map(text).collect();
    texts.iter().enumerate().for_each(|(at, text)| cluster.put_in_folders(&format!("/in/{at}"), text, &[]));
    let gate = cluster.local_file("gate", b"");
    std::fs::remove_file(&gate).unwrap();
    let words = "tr -s \" \\n\" \"\\n\\n\"";
    let lives = "echo reporter:status:waits >&2; sleep 0.2";
    let slow = format!("case $mapreduce_map_input_file in */3) while [ ! -e {gate} ]; do {lives}; done;; esac");
    let mapper = format!("sh -c '{words}; {slow}'");
    let line = ["job", "run", "--detach", "--", "streaming", "--input", "/in", "--output", "/out", "--reducers", "2"];
    // It stands by for longer than a task may stand still: waiting for maps is no fault of its own.
    let flags = ["--mapper", &mapper, "--reducer", "uniq -c", "--no-speculation", "--task-timeout", "10s"];
    let id = cluster.json(&[&line[..], &flags].concat())["id"].as_str().unwrap().to_owned();
    let status = || cluster.json(&["job", "status", &id]);
    let waits = |status: &Value| {
        let attempts = status["attempts"].as_array().unwrap();
        let long = |one: &Value| one["elapsed_ms"].as_u64() > Some(11_000);
        let named = |one: &Value, name: &str| one["task"].as_str().unwrap().starts_with(name);
        ["r0.", "r1."].iter().all(|name| attempts.iter().any(|one| named(one, name) && long(one)))
    };
    wait_until("both reduces have long run beside the last map", Duration::from_secs(60), || {
        let status = status();
        status["maps_done"] == 4 && waits(&status)
    });
    std::fs::write(&gate, b"").unwrap();
    wait_until("the job is over", Duration::from_secs(60), || status()["state"] == "succeeded");
    let report = &status()["report"];
    assert_eq!((&report["map"]["attempts_failed"], &report["reduce"]["attempts_failed"]), (&0.into(), &0.into()));
    let mut got: Vec<String> = lines(&cluster.cat("/out/part-r-*")).iter().map(|line| line.trim().to_owned()).collect();
    let mut counts: BTreeMap<String, u32> = BTreeMap::new();
    for text in &texts {
        for word in String::from_utf8_lossy(text).split_ascii_whitespace() {
            *counts.entry(word.to_owned()).or_default() += 1;
        }
    }
    let mut want: Vec<String> = counts.into_iter().map(|(word, count)| format!("{count} {word}")).collect();
    got.sort();
    want.sort();
    assert!(got == want, "{} lines, {} expected", got.len(), want.len());
}

#[test]
fn what_no_other_attempt_would_change_fails_at_once() {
    let cluster = Cluster::start(ClusterOptions::new(3, 1));
    cluster.put("/small", b"one line\n", &[]);
    let plain = cluster.local_file("plain.py", b"print('x')\n");
    std::fs::set_permissions(&plain, std::fs::Permissions::from_mode(0o644)).unwrap();
    let no_interpreter = script(&cluster, "nothing.py", "#!/no/such/interpreter\n");
    let cases: &[(&[&str], u32, &[&str])] = &[
        (&["--mapper", "plain.py", "--file", &plain], 1, &["map 0 failed once", "plain.py", "not executable"]),
        (&["--mapper", "./not-shipped.py"], 1, &["map 0 failed once", "not-shipped.py", "no such file"]),
        // What is missing on one node may be there on the next, on two it will not be.
        (&["--mapper", "no-such-mapper"], 2, &["map 0 failed 2 times", "no-such-mapper", "PATH"]),
        (&["--mapper", "nothing.py", "--file", &no_interpreter], 2, &["map 0 failed 2 times", "interpreter"]),
        (&["--mapper", "false"], 4, &["map 0 failed 4 times", "exited with status 1"]),
    ];
    for (number, (flags, attempts, parts)) in cases.iter().enumerate() {
        let run = stream(&cluster, flags, "/small", &format!("/out-{number}"));
        assert_eq!(run.code, 1, "{run:?}");
        let report: Value = serde_json::from_slice(&run.stdout).unwrap();
        let why = report["failure"].as_str().unwrap();
        for part in parts.iter().chain(&["on dn"]) {
            assert!(why.contains(part), "{why:?} does not name {part:?}");
        }
        assert_eq!(report["map"]["attempts_failed"], *attempts, "{why}");
    }
}

#[test]
fn input_that_vanishes_and_output_that_appears_end_a_job_at_once() {
    let cluster = Cluster::start(ClusterOptions::new(1, 1).more("[datanode]\ntask_slots = 1"));
    (0..3).for_each(|at| cluster.put_in_folders(&format!("/in/{at}"), b"one line\n", &[]));
    let gate = cluster.local_file("gate", b"");
    std::fs::remove_file(&gate).unwrap();
    let mapper = format!("sh -c 'cat; while [ ! -e {gate} ]; do sleep 0.05; done'");
    let start = |output: &str| {
        let line = ["job", "run", "--detach", "--", "streaming", "--input", "/in", "--output", output];
        let view = cluster.json(&[&line[..], &["--reducers", "0", "--mapper", &mapper]].concat());
        view["id"].as_str().unwrap().to_owned()
    };
    let status = |id: &str| cluster.json(&["job", "status", id]);
    let ends = |id: &str| {
        wait_until("the job is over", Duration::from_secs(60), || status(id)["state"] == "failed");
        status(id)["report"].clone()
    };
    let id = start("/appears");
    wait_until("a map runs", Duration::from_secs(60), || status(&id)["running"] == 1);
    cluster.cairn(&["mkdir", "/appears"]).ok();
    let report = ends(&id);
    let why = report["failure"].as_str().unwrap();
    assert!(why.contains("output /appears appeared while the job ran"), "{why}");
    assert_eq!(cluster.json(&["ls", "/appears"]), serde_json::json!([]), "what appeared is left alone");
    let id = start("/vanishes");
    wait_until("a map runs", Duration::from_secs(60), || status(&id)["running"] == 1);
    cluster.cairn(&["rm", "--skip-trash", "/in/2"]).ok();
    std::fs::write(&gate, b"").unwrap();
    let report = ends(&id);
    let why = report["failure"].as_str().unwrap();
    assert!(why.contains("map 2 failed once") && why.contains("/in/2") && why.contains("on dn"), "{why}");
    assert_eq!(report["map"]["attempts_failed"], 1, "{why}");
    cluster.cairn(&["stat", "/vanishes"]).fails(1);
}

#[test]
fn what_is_allowed_on_request_is_no_failure() {
    let cluster = Cluster::small();
    cluster.put("/text", &data::text(14, 2 << 20, 1_000), &[]);
    let flags = ["--mapper", "head -n 1", "--reducer", "NONE", "-D", "stream.unread.input.is.failure=false"];
    let report = stream(&cluster, &flags, "/text", "/heads").json();
    assert_eq!(report["records"]["out"], report["map"]["tasks"], "{report}");
    let flags = ["--mapper", "sh -c 'cat; exit 9'", "--reducer", "NONE", "-D", "stream.non.zero.exit.is.failure=false"];
    let report = stream(&cluster, &flags, "/text", "/nine").json();
    assert_eq!(report["records"]["in"], report["records"]["out"], "{report}");
    // Lines without a tab are keys, and are counted.
    let report =
        stream(&cluster, &["--mapper", "tr -d '\\t'", "--reducer", "cat", "--reducers", "1"], "/text", "/keys").json();
    assert_eq!(report["counters"]["user.streaming.lines_without_separator"], report["records"]["map_out"], "{report}");
}

/// Counts lines by their remainder, tells how many it has seen, and dies on one line in a million, after it has told of those before it.
const FRAGILE_MAPPER: &str = r#"awk '{ if ($0 == "bad") exit 3; n[$0 % 7]++ } END { for (k in n) print k "\t" n[k]; print "reporter:counter:lines,seen," NR > "/dev/stderr" }'"#;

#[test]
fn one_bad_line_in_a_million_is_named_or_left_out() {
    let cluster = Cluster::small();
    let (mut text, mut place, mut counts) = (String::new(), 0, [0u64; 7]);
    for number in 0..1_000_000 {
        if number == 654_321 {
            place = text.len();
            text.push_str("bad\n");
        } else {
            counts[number % 7] += 1;
            text.push_str(&format!("{number}\n"));
        }
    }
    cluster.put("/lines", text.as_bytes(), &["--block-size", "8m"]);
    let reducer = script(&cluster, "sum.py", SUM_REDUCER);
    let flags = ["--mapper", FRAGILE_MAPPER, "--reducer", "sum.py", "--file", &reducer, "--max-attempts", "2"];
    let named = format!("the record at byte {place} of /lines");
    let line = ["job", "streaming", "--input", "/lines", "--output", "/out"];
    let run = cluster.cairn(&[&line[..], &flags].concat());
    run.fails_naming(1, &["exited with status 3", &named, "starts with \"bad\"", "on dn"]);

    let report = stream(&cluster, &[&flags[..], &["-D", "skip-records=1"]].concat(), "/lines", "/out").json();
    assert_eq!(report["map"]["attempts_failed"], 0, "it is found within the attempt: {report}");
    assert_eq!((&report["map"]["tasks"], &report["records"]["in"]), (&1.into(), &1_000_000.into()), "{report}");
    assert_eq!(report["counters"]["map.records_skipped"], 1, "{report}");
    assert_eq!(report["counters"]["user.lines.seen"], 999_999, "of runs that failed nothing is counted: {report}");
    let skipped = &report["skipped"][0];
    assert_eq!((&skipped["offset"], &skipped["sample"]), (&place.into(), &"bad".into()), "{report}");
    let want: Vec<String> = counts.iter().enumerate().map(|(rest, count)| format!("{rest}\t{count}")).collect();
    assert_eq!(lines(&sorted_lines(&cluster.cat("/out/part-r-*"))), want);

    // A combiner is no hindrance; more bad lines than may be left out are.
    let flags = [&flags[..], &["--combiner", "./sum.py", "-D", "skip-records=1"]].concat();
    stream(&cluster, &flags, "/lines", "/combined").json();
    assert_eq!(lines(&sorted_lines(&cluster.cat("/combined/part-r-*"))), want);
    cluster.put("/worse", b"1\nbad\n2\nbad\n", &[]);
    let run = cluster.cairn(&[&["job", "streaming", "--input", "/worse", "--output", "/x"], &flags[..]].concat());
    run.fails_naming(1, &["more than the 1 records that may be skipped", "the record at byte 8 of /worse", "status 3"]);
}

#[test]
fn bad_arguments_are_refused_before_anything_runs() {
    let cluster = Cluster::small();
    cluster.put("/text", b"a\n", &[]);
    let base = ["job", "streaming", "--input", "/text", "--output", "/out"];
    let cases: &[(&[&str], i32, &[&str])] = &[
        (&["--mapper", "cut -f1 | sort"], 1, &["shell", "sh -c"]),
        (&["--mapper", "cat 'x"], 1, &["quote"]),
        (&["--mapper", ""], 1, &["mapper", "empty"]),
        (&["--mapper", "cat", "--reducers", "65537"], 2, &["65537", "65536"]),
        (&["--mapper", "cat", "-D", "mapreduce.job.reduces=70000"], 1, &["70000", "65536"]),
        (&["--mapper", "cat", "-D", "novalue"], 2, &["novalue", "NAME=VALUE"]),
        (&["--mapper", "cat", "--reducer", "NONE", "--reducers", "2"], 1, &["NONE", "2"]),
        (&["--mapper", "cat", "--partitioner", "modulo"], 1, &["modulo", "fields"]),
        (&["--mapper", "cat", "-D", "mapreduce.partition.keycomparator.options=-kx"], 1, &["keycomparator", "-kx"]),
        (&["--mapper", "cat", "-D", "stream.non.zero.exit.is.failure=maybe"], 1, &["maybe"]),
        (&["--mapper", "cat", "--file", "/no/such/file"], 1, &["/no/such/file"]),
    ];
    for (flags, code, parts) in cases {
        cluster.cairn(&[&base[..], *flags].concat()).fails_naming(*code, parts);
    }
    assert_eq!(cluster.json(&["ls", "/"]).as_array().unwrap().len(), 1, "nothing was made");
}

#[test]
fn a_job_that_is_stopped_takes_its_commands_along() {
    let cluster = Cluster::small();
    cluster.put("/text", &data::text(15, 100_000, 100), &[]);
    let mut job = cluster.command(&[
        "job",
        "streaming",
        "--input",
        "/text",
        "--output",
        "/out",
        "--reducer",
        "NONE",
        "--mapper",
        "sh -c 'sleep 986543 | cat; cat'",
    ]);
    let mut job = job.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn().unwrap();
    let sleepers = || {
        let all: Vec<u32> = cluster.datanodes.iter().flat_map(|node| process::descendants(node.process.pid)).collect();
        all.into_iter()
            .filter_map(process::Process::of)
            .filter(|process| process.runs() && process.command_line().iter().any(|word| word == "986543"))
            .collect::<Vec<_>>()
    };
    let mut seen = Vec::new();
    wait_until("the command runs", std::time::Duration::from_secs(30), || {
        seen = sleepers();
        !seen.is_empty()
    });
    process::Process::of(job.id()).unwrap().signal(libc::SIGTERM);
    job.wait().unwrap();
    wait_until("no command is left", std::time::Duration::from_secs(15), || seen.iter().all(|process| !process.runs()));
    cluster.cairn(&["stat", "/out"]).fails(1);
}

#[test]
fn workers_that_are_killed_take_their_commands_along_and_change_nothing() {
    let cluster = Cluster::small();
    let rows: String = (0..60_000).map(|n| format!("key{}\t{n}\n", n % 500)).collect();
    cluster.put("/rows", rows.as_bytes(), &["--block-size", "64k"]);
    let gate = cluster.path("gate");
    let mapper = format!(
        "python3 -c \"import os, sys, time; [time.sleep(0.1) for _ in iter(lambda: os.path.exists('{}'), True)]; sys.stdout.writelines(sys.stdin)\"",
        gate.display()
    );
    let job = cluster.command(&[
        "--json",
        "job",
        "streaming",
        "--input",
        "/rows",
        "--output",
        "/out",
        "--mapper",
        &mapper,
        "--reducers",
        "2",
    ]);
    let job = { job }.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().unwrap();
    let mut commands = Vec::new();
    for _ in 0..3 {
        // A worker is a child of its datanode, the command a child of the worker.
        wait_until("a command runs", std::time::Duration::from_secs(30), || {
            let below: Vec<process::Process> = cluster
                .datanodes
                .iter()
                .flat_map(|node| process::descendants(node.process.pid))
                .filter_map(process::Process::of)
                .collect();
            let python = below.iter().find(|one| one.command_line().iter().any(|word| word.contains("writelines")));
            let worker = python.and_then(|python| {
                below.iter().find(|one| process::descendants(one.pid).contains(&python.pid) && one.pid != python.pid)
            });
            let Some((python, worker)) = python.zip(worker) else { return false };
            commands.push(*python);
            worker.signal(libc::SIGKILL);
            true
        });
    }
    std::fs::write(&gate, b"").unwrap();
    let report = Run::of_child("job streaming", job, std::time::Duration::from_secs(120)).json();
    assert_eq!(report["records"]["in"], 60_000, "{report}");
    let got = sorted_lines(&cluster.cat("/out/part-r-*"));
    assert!(got == sorted_lines(rows.as_bytes()));
    wait_until("no command is left", std::time::Duration::from_secs(10), || commands.iter().all(|one| !one.runs()));
}

#[test]
fn a_node_that_dies_does_not_change_what_is_counted() {
    let mut cluster = Cluster::start(gate::with_gate(ClusterOptions::new(4, 2), 2));
    let local = cluster.local_file("text", &data::text(16, 6 << 20, 30_000));
    cluster.cairn(&["put", "--block-size", "1m", &local, "/text"]).ok();
    let (mapper, reducer) = (script(&cluster, "count.py", COUNT_MAPPER), script(&cluster, "sum.py", SUM_REDUCER));
    gate::close(&cluster);
    let mut job = cluster.command(&[
        "--json",
        "job",
        "streaming",
        "--no-speculation",
        "--input",
        "/text",
        "--output",
        "/counts",
        "--mapper",
        "count.py",
        "--reducer",
        "sum.py",
        "--file",
        &mapper,
        "--file",
        &reducer,
        "--reducers",
        "2",
    ]);
    let job = job.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().unwrap();
    let mut victim = None;
    wait_until("a datanode runs a task", std::time::Duration::from_secs(30), || {
        victim = gate::workers(&cluster).next().map(|(node, _)| node);
        victim.is_some()
    });
    cluster.kill_datanode(victim.unwrap());
    gate::open(&cluster);
    let report: Value = Run::of_child("job streaming", job, std::time::Duration::from_secs(120)).json();
    assert_eq!(report["state"], "succeeded", "{report}");
    assert_eq!(report["counters"]["user.words.mappers"], report["map"]["tasks"], "counted once per map: {report}");
    let got = sorted_lines(&cluster.cat("/counts/part-r-*"));
    assert!(got == data::word_count_by_pipeline(local.as_ref()));
}

//! Jobs that sort: lines as `sort` does, records of the sort benchmark as its own tools have it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "tests fail by panicking")]

use std::process::{Command, Stdio};

use cairn_tests::{Cluster, ClusterOptions, data, large};
use serde_json::Value;

/// What `LC_ALL=C sort` makes of the bytes.
fn by_sort(flags: &[&str], bytes: &[u8]) -> Vec<u8> {
    let mut child = Command::new("sort")
        .args(flags)
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let bytes = bytes.to_vec();
    let writer = std::thread::spawn(move || std::io::Write::write_all(&mut stdin, &bytes).unwrap());
    let sorted = child.wait_with_output().unwrap().stdout;
    writer.join().unwrap();
    sorted
}

fn parts(report: &Value) -> u64 {
    report["reduce"]["tasks"].as_u64().unwrap()
}

#[test]
fn the_parts_one_after_the_other_are_what_sort_prints() {
    let cluster = Cluster::small();
    let text = data::text(21, 3 << 20, 100_000);
    cluster.put("/text", &text, &[]);
    for (number, flags) in
        [&[][..], &["-r"], &["-u"], &["-k2,2", "-k1"], &["-n"], &["-t\t", "-k2b,2r"]].iter().enumerate()
    {
        let output = format!("/sorted-{number}");
        let report = cluster.json(&[&["job", "sort", "--reducers", "4"], *flags, &["/text", &output]].concat());
        assert_eq!(parts(&report), 4);
        let want = by_sort(flags, &text);
        let got = cluster.cat(&format!("{output}/part-r-*"));
        assert!(got == want, "sort {flags:?}: {} bytes, expected {}", got.len(), want.len());
        // Samples cut the input into parts of like size; of few different keys there is nothing to cut.
        if number < 2 {
            let sizes: Vec<u64> = (0..4)
                .map(|part| cluster.json(&["stat", &format!("{output}/part-r-{part:05}")])["length"].as_u64().unwrap())
                .collect();
            assert!(sizes.iter().all(|size| *size * 4 < want.len() as u64 * 2), "{sizes:?}");
        }
    }
}

#[test]
fn numbers_are_sorted_by_value_and_parts_alone_on_request() {
    let cluster = Cluster::small();
    let mut random = data::Random::new(3);
    let rows: String = (0..40_000)
        .map(|i| {
            format!("{},{}.{},{i}\n", random.below(50), random.below(2_000_000) as i64 - 1_000_000, random.below(100))
        })
        .collect();
    cluster.put("/rows", rows.as_bytes(), &["--block-size", "128k"]);
    let flags = ["-t,", "-k1,1n", "-k2,2nr"];
    cluster.json(&[&["job", "sort", "--reducers", "3"], &flags[..], &["/rows", "/sorted"]].concat());
    assert!(cluster.cat("/sorted/part-r-*") == by_sort(&flags, rows.as_bytes()));
    cluster
        .json(&[&["job", "sort", "--reducers", "3", "--total-order=false"], &flags[..], &["/rows", "/parts"]].concat());
    let mut all = Vec::new();
    for part in 0..3 {
        let bytes = cluster.cat(&format!("/parts/part-r-{part:05}"));
        assert!(!bytes.is_empty() && bytes == by_sort(&flags, &bytes), "part {part} is sorted by itself");
        all.extend(bytes);
    }
    assert!(by_sort(&flags, &all) == by_sort(&flags, rows.as_bytes()));
}

#[test]
fn empty_and_tiny_inputs_sort_too() {
    let cluster = Cluster::small();
    cluster.put_in_folders("/in/empty", b"", &[]);
    cluster.json(&["job", "sort", "--reducers", "2", "/in/empty", "/none"]);
    assert_eq!(cluster.cat("/none/part-r-*"), b"");
    cluster.put_in_folders("/in/tiny", b"b\n\na", &[]);
    cluster.json(&["job", "sort", "--reducers", "3", "/in", "/tiny"]);
    assert_eq!(cluster.cat("/tiny/part-r-*"), b"\na\nb\n");
    cluster.cairn(&["job", "sort", "-k0", "/in", "/bad"]).fails_naming(1, &["\"0\""]);
    cluster.cairn(&["job", "sort", "--reducers", "0", "/in", "/bad"]).fails_naming(1, &["at least one reducer"]);
    cluster.cairn(&["job", "sort", "-t", "", "/in", "/bad"]).fails_naming(1, &["separator"]);
}

/// The record with this number, from the definition of the benchmark: a congruential sequence of 128 bits.
fn tera_records(count: u64) -> Vec<[u8; 100]> {
    let (a, c) = (0x2360_ed05_1fc6_5da4_4385_df64_9fcc_f645u128, 0x4a69_6d47_7261_7952_4950_2020_2020_2001u128);
    let mut random = 0u128;
    (0..count)
        .map(|number| {
            random = random.wrapping_mul(a).wrapping_add(c);
            let digits = format!("{random:032X}");
            let mut record = random.to_be_bytes()[..10].to_vec();
            record.extend([0x00, 0x11]);
            record.extend(format!("{number:032X}").bytes());
            record.extend([0x88, 0x99, 0xaa, 0xbb]);
            record.extend(digits.bytes().skip(20).flat_map(|digit| [digit; 4]));
            record.extend([0xcc, 0xdd, 0xee, 0xff]);
            record.try_into().unwrap()
        })
        .collect()
}

#[test]
fn generated_records_are_sorted_and_their_sum_is_the_known_one() {
    let cluster = Cluster::start(ClusterOptions::new(3, 2).core("default_block_size", 2 << 20));
    let report = cluster.json(&["job", "teragen", "--maps", "5", "100k", "/gen"]);
    assert_eq!((report["map"]["tasks"].as_u64(), report["records"]["out"].as_u64()), (Some(5), Some(100_000)));
    let mut records = tera_records(100_000);
    assert!(cluster.cat("/gen/part-m-*") == records.concat(), "records are those of the definition, in order");
    let report = cluster.json(&["job", "terasort", "--reducers", "3", "--task-memory", "64m", "/gen", "/sorted"]);
    assert_eq!(parts(&report), 3);
    records.sort_unstable();
    assert!(cluster.cat("/sorted/part-r-*") == records.concat(), "the parts are in order");
    for part in 0..3 {
        let size = cluster.json(&["stat", &format!("/sorted/part-r-{part:05}")])["length"].as_u64().unwrap();
        assert!((2_500_000..4_200_000).contains(&size), "part {part} has {size} bytes");
    }
    // What gensort's and Hadoop's tools say of the first 100,000 records.
    let report = cluster.json(&["job", "teravalidate", "/sorted", "/report"]);
    let validation = &report["validation"];
    assert_eq!(validation["checksum"], "c327a1c42c28", "{validation}");
    assert_eq!((validation["records"].as_u64(), validation["misordered"].as_u64()), (Some(100_000), Some(0)));
    assert_eq!(cluster.cat("/report/part-r-00000"), b"checksum\tc327a1c42c28\n");
    let text = cluster.cairn(&["job", "teravalidate", "/sorted", "/report2"]).ok();
    assert!(text.contains("100,000 records, checksum c327a1c42c28, 0 duplicate keys"), "{text}");
}

#[test]
fn a_sort_far_larger_than_its_tasks_memory_stays_within_it() {
    let (records, bytes, memory) = if large() { ("100m", 10_000_000_000, 256) } else { ("1m", 100_000_000u64, 96) };
    let block = if large() { 128 << 20 } else { 48 << 20 };
    let cluster = Cluster::start(ClusterOptions::new(3, 2).core("default_block_size", block));
    let maps = if large() { "12" } else { "2" };
    cluster.json(&["job", "teragen", "--maps", maps, "--replication", "1", records, "/gen"]);
    let task_memory = format!("{memory}m");
    let flags = ["--reducers", "2", "--replication", "1", "--task-memory", &task_memory];
    let report = cluster.json(&[&["job", "terasort"], &flags[..], &["/gen", "/sorted"]].concat());
    assert_eq!(
        (&report["map"]["attempts_failed"], &report["reduce"]["attempts_failed"]),
        (&0.into(), &0.into()),
        "{report}"
    );
    assert!(report["bytes"]["spilled"].as_u64().unwrap() > 0, "memory was short: {report}");
    for task in report["tasks"].as_array().unwrap() {
        assert!(task["peak_memory"].as_u64().unwrap() <= memory << 20, "{task}");
    }
    let length = |path: &str| cluster.json(&["du", "-s", path])[0]["length"].as_u64().unwrap();
    assert_eq!((length("/gen"), length("/sorted")), (bytes, bytes));
    let sum = |input: &str, output: &str| cluster.cairn(&["--json", "job", "teravalidate", input, output]);
    // The generated records are not in order: the check says so, and tells their sum all the same.
    let generated: Value = serde_json::from_slice(&sum("/gen", "/report1").stdout).unwrap();
    assert!(generated["validation"]["misordered"].as_u64().unwrap() > 0);
    let sorted = sum("/sorted", "/report2").json();
    assert_eq!(sorted["validation"]["checksum"], generated["validation"]["checksum"]);
    if !large() {
        assert_eq!(sorted["validation"]["checksum"], "7a27e2d0d55de");
    }
}

#[test]
fn records_out_of_order_are_found_within_files_and_between_them() {
    let cluster = Cluster::start(ClusterOptions::new(3, 2).core("default_block_size", 64 << 10));
    let mut records = tera_records(4_000);
    records.sort_unstable();
    cluster.put_in_folders("/good/part-r-00000", &records[..2_000].concat(), &[]);
    cluster.put_in_folders("/good/part-r-00001", &records[2_000..].concat(), &[]);
    let report = cluster.json(&["job", "teravalidate", "/good", "/report"]);
    assert_eq!(report["validation"]["misordered"], 0, "{}", report["validation"]);
    // Files in the wrong order.
    cluster.put_in_folders("/files/part-r-00000", &records[2_000..].concat(), &[]);
    cluster.put_in_folders("/files/part-r-00001", &records[..2_000].concat(), &[]);
    let line = cluster.cairn(&["job", "teravalidate", "/files", "/report2"]).fails(1);
    assert!(line.contains("1 wrong pair") && line.contains("part-r-00000") && line.contains("part-r-00001"), "{line}");
    // Two records exchanged, and one twice.
    records.swap(1_500, 1_501);
    records[3_000] = records[2_999];
    cluster.put_in_folders("/bad/part-r-00000", &records.concat(), &[]);
    let run = cluster.cairn(&["--json", "job", "teravalidate", "/bad", "/report3"]);
    let report: Value = serde_json::from_slice(&run.stdout).unwrap();
    let validation = &report["validation"];
    assert_eq!((&validation["misordered"], &validation["duplicate_keys"]), (&1.into(), &1.into()), "{validation}");
    run.fails_naming(1, &["/bad is not sorted", "byte 150100"]);
    // A file that is no such record file.
    cluster.put("/odd", &[0; 150], &[]);
    cluster.cairn(&["job", "terasort", "/odd", "/no"]).fails_naming(1, &["/odd", "150", "100"]);
    cluster.cairn(&["job", "teragen", "10x", "/no"]).fails_naming(2, &["10x"]);
}

//! Joins of delimited files, by all three kinds, against a join made by nested loops.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "tests fail by panicking")]

use cairn_tests::{Cluster, data};

/// Rows of `KEY,NAME,NUMBER` (left) and `CITY;KEY` as `CITY,KEY` (right), with keys that only one side has and keys that come often.
fn sides(left: u64, right: u64) -> (Vec<String>, Vec<String>) {
    let mut random = data::Random::new(9);
    let mut key = |n: u64| if n.is_multiple_of(10) { "often".to_owned() } else { format!("k{}", random.below(300)) };
    let lefts: Vec<String> = (0..left).map(|n| format!("{},left{n},{n}", key(n))).collect();
    let rights = (0..right).map(|n| format!("city{n},{}", if n < 40 { format!("r{n}") } else { key(n) })).collect();
    (lefts, rights)
}

fn key_of_left(row: &str) -> &str {
    row.split(',').next().unwrap()
}

fn key_of_right(row: &str) -> &str {
    row.split(',').nth(1).unwrap()
}

/// The join by its definition, sorted.
fn joined(kind: &str, lefts: &[String], rights: &[String]) -> Vec<String> {
    let rest = |left: &str| left.split_once(',').unwrap().1.to_owned();
    let city = |right: &str| right.split(',').next().unwrap().to_owned();
    let mut out = Vec::new();
    for left in lefts {
        let key = key_of_left(left);
        let matches: Vec<&String> = rights.iter().filter(|right| key_of_right(right) == key).collect();
        match kind {
            "semi" if !matches.is_empty() => out.push(left.clone()),
            "anti" if matches.is_empty() => out.push(left.clone()),
            "semi" | "anti" => {}
            _ => {
                out.extend(matches.iter().map(|right| format!("{key},{},{}", rest(left), city(right))));
                if matches.is_empty() && matches!(kind, "left" | "full") {
                    out.push(format!("{key},{},", rest(left)));
                }
            }
        }
    }
    if matches!(kind, "right" | "full") {
        for right in rights.iter().filter(|right| !lefts.iter().any(|left| key_of_left(left) == key_of_right(right))) {
            out.push(format!("{},,,{}", key_of_right(right), city(right)));
        }
    }
    out.sort();
    out
}

fn text(rows: &[String]) -> Vec<u8> {
    rows.iter().flat_map(|row| format!("{row}\n").into_bytes()).collect()
}

fn rows(cluster: &Cluster, pattern: &str) -> Vec<String> {
    let mut rows: Vec<String> = String::from_utf8(cluster.cat(pattern)).unwrap().lines().map(str::to_owned).collect();
    rows.sort();
    rows
}

const COMMON: [&str; 5] = ["--right-key", "2", "--separator", ",", "--json"];

#[test]
fn every_type_by_every_kind_is_the_join_by_definition() {
    let cluster = Cluster::small();
    let (mut lefts, mut rights) = sides(3_000, 600);
    cluster.put("/left", &text(&lefts), &["--block-size", "16k"]);
    cluster.put_in_folders("/right/a", &text(&rights[..200]), &["--block-size", "4k"]);
    cluster.put_in_folders("/right/b", &text(&rights[200..]), &[]);
    // For the merge: two parts of each side, cut at one key and sorted.
    lefts.sort_by(|a, b| key_of_left(a).cmp(key_of_left(b)));
    rights.sort_by(|a, b| key_of_right(a).cmp(key_of_right(b)));
    let left_cut = lefts.partition_point(|row| key_of_left(row) < "k200");
    let right_cut = rights.partition_point(|row| key_of_right(row) < "k200");
    for (part, (left, right)) in
        [(&lefts[..left_cut], &rights[..right_cut]), (&lefts[left_cut..], &rights[right_cut..])].iter().enumerate()
    {
        cluster.put_in_folders(&format!("/sorted/left/part-r-{part:05}"), &text(left), &[]);
        cluster.put_in_folders(&format!("/sorted/right/part-r-{part:05}"), &text(right), &[]);
    }
    for kind in ["inner", "left", "right", "full", "semi", "anti"] {
        let want = joined(kind, &lefts, &rights);
        assert!(!want.is_empty());
        for (how, left, right) in
            [("reduce", "/left", "/right"), ("broadcast", "/left", "/right"), ("map", "/sorted/left", "/sorted/right")]
        {
            let output = format!("/{how}-{kind}");
            let args = [
                &["job", "join", "--kind", how, "--type", kind, "--left", left, "--right", right, &output],
                &COMMON[..],
            ]
            .concat();
            if (how, kind) == ("broadcast", "full") {
                cluster.cairn(&args).fails_naming(1, &["full", "--kind reduce"]);
                continue;
            }
            cluster.cairn(&args).ok();
            let got = rows(&cluster, &format!("{output}/part-*"));
            assert!(got == want, "{how} {kind}: {} rows, expected {}", got.len(), want.len());
        }
    }
}

#[test]
fn a_key_with_more_rows_than_memory_goes_through_the_disk() {
    let cluster = Cluster::small();
    // 24 MiB of left rows with one key: an eighth of 64 MiB is all that a reducer keeps.
    let lefts: Vec<String> = (0..24_000).map(|n| format!("hot,{n:06},{}", "x".repeat(1_000))).collect();
    let rights: Vec<String> = (0..3).map(|n| format!("c{n},hot")).chain(["c9,cold".into()]).collect();
    cluster.put("/left", &text(&lefts), &[]);
    cluster.put("/right", &text(&rights), &[]);
    let args = [
        &[
            "job",
            "join",
            "--type",
            "full",
            "--reducers",
            "1",
            "--task-memory",
            "64m",
            "--left",
            "/left",
            "--right",
            "/right",
            "/out",
        ],
        &COMMON[..],
    ]
    .concat();
    let report = cluster.cairn(&args).json();
    assert_eq!(
        (&report["records"]["out"], &report["reduce"]["attempts_failed"]),
        (&72_001.into(), &0.into()),
        "{report}"
    );
    let got = rows(&cluster, "/out/part-r-00000");
    assert_eq!((got.len(), got[0].as_str()), (72_001, "cold,,,c9"));
    for (n, three) in got[1..].chunks(3).enumerate() {
        for (city, row) in three.iter().enumerate() {
            assert!(
                row.starts_with(&format!("hot,{n:06},xxx")) && row.ends_with(&format!("x,c{city}")),
                "row {n}: {}",
                &row[..40]
            );
        }
    }
}

#[test]
fn compressed_sides_are_joined_too() {
    let cluster = Cluster::small();
    let (lefts, rights) = sides(500, 200);
    let gzip = |name: &str, rows: &[String]| {
        let local = cluster.local_file(name, &text(rows));
        assert!(std::process::Command::new("gzip").arg(&local).status().unwrap().success());
        cluster.cairn(&["put", &format!("{local}.gz"), &format!("/{name}.gz")]).ok();
    };
    gzip("left", &lefts);
    gzip("right", &rights);
    for kind in ["reduce", "broadcast"] {
        let output = format!("/{kind}");
        let args =
            ["job", "join", "--kind", kind, "--type", "left", "--left", "/left.gz", "--right", "/right.gz", &output];
        cluster.cairn(&[&args, &COMMON[..]].concat()).ok();
        assert!(rows(&cluster, &format!("{output}/part-*")) == joined("left", &lefts, &rights), "{kind}");
    }
    let args = ["job", "join", "--kind", "map", "--left", "/left.gz", "--right", "/right.gz", "/out"];
    cluster.cairn(&args).fails_naming(1, &["/left.gz", "compressed", "--kind reduce"]);
    cluster.cairn(&["job", "sort", "--reducers", "3", "/left.gz", "/sorted"]).ok();
    let mut sorted = lefts;
    sorted.sort();
    assert!(cluster.cat("/sorted/part-r-*") == text(&sorted));
}

#[test]
fn what_a_kind_asks_for_is_checked_before_the_start() {
    let cluster = Cluster::small();
    cluster.put("/large", &b"k,some text that is not short\n".repeat(2_000_000), &[]);
    cluster.put("/small", b"k,1\nm,2\n", &[]);
    let join = |flags: &[&str], output: &str| {
        cluster.cairn(&[&["job", "join", "--separator", ","], flags, &[output]].concat())
    };
    let flags =
        ["--kind", "broadcast", "--type", "left", "--task-memory", "64m", "--left", "/small", "--right", "/large"];
    let line =
        join(&flags, "/out").fails_naming(1, &["right side", "60000000 bytes", "--task-memory", "--kind reduce"]);
    let enough = line.split("--task-memory ").nth(1).unwrap().split(' ').next().unwrap();
    assert!(enough.trim_end_matches('m').parse::<u64>().unwrap() < 1_000, "{line}");
    cluster.put_in_folders("/two/a", b"a,1\nb,1\n", &[]);
    cluster.put_in_folders("/two/b", b"c,1\nd,1\n", &[]);
    cluster.put_in_folders("/other/a", b"a,1\nc,1\n", &[]);
    cluster.put_in_folders("/other/b", b"d,1\n", &[]);
    cluster.put_in_folders("/unsorted/a", b"a,1\nz,1\nb,1\n", &[]);
    cluster.put_in_folders("/short/a", b"a\n", &[]);
    for (left, right, parts) in [
        ("/small", "/two", &["equally many parts", "1", "2"][..]),
        ("/two", "/other", &["not partitioned alike", "/two/b", "/other/a"]),
        ("/unsorted", "/small", &["not sorted", "/unsorted/a", "line 3", "\"b\"", "\"z\""]),
        ("/small", "/nothing", &["/nothing"]),
    ] {
        join(&["--kind", "map", "--left", left, "--right", right], "/out").fails_naming(1, parts);
    }
    join(&["--kind", "map", "--right-key", "2", "--left", "/small", "--right", "/short"], "/out")
        .fails_naming(1, &["/short/a", "no field 2"]);
    join(&["--left", "/small", "--right", "/small", "--left-key", "0"], "/out").fails_naming(2, &["field"]);
    join(&["--kind", "map", "--reducers", "3", "--left", "/small", "--right", "/small"], "/out")
        .fails_naming(1, &["--reducers"]);
    cluster.cairn(&["stat", "/out"]).fails(1);
}

#[test]
fn rows_without_a_key_match_nothing_and_are_counted() {
    let cluster = Cluster::small();
    cluster.put("/left", b"1\tone\nempty\n\n2\ttwo\n", &[]);
    cluster.put("/right", b"x\t1\nalone\n", &[]);
    let join = |kind: &str, output: &str| {
        cluster.json(&[
            "job",
            "join",
            "--type",
            kind,
            "--right-key",
            "2",
            "--left",
            "/left",
            "--right",
            "/right",
            "--reducers",
            "2",
            output,
        ])
    };
    let report = join("inner", "/inner");
    assert_eq!(rows(&cluster, "/inner/part-r-*"), ["1\tone\tx"]);
    assert_eq!(report["counters"]["user.join.rows_without_key"], 1, "{report}");
    join("full", "/full");
    assert_eq!(rows(&cluster, "/full/part-r-*"), ["\t\t", "\t\talone", "1\tone\tx", "2\ttwo\t", "empty\t\t"]);
}

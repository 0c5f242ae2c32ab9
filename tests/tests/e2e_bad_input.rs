//! What is wrong is told in one clear line, with exit code 1 (it cannot be done) or 2 (it is no command), and leaves nothing behind.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "tests fail by panicking")]

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::ffi::OsStrExt;
use std::process::Stdio;
use std::time::Duration;

use cairn_proto::hadoop;
use cairn_tests::ports::PortRange;
use cairn_tests::{Cluster, ClusterOptions, Run, binary, data, wait_for};
use prost::Message;

fn paths(cluster: &Cluster) -> Vec<String> {
    let listed = cluster.json(&["ls", "-R", "/"]);
    listed.as_array().unwrap().iter().map(|entry| entry["path"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn things_that_are_not_there_or_are_something_else() {
    let cluster = Cluster::small();
    let file = cluster.local_file("local", b"local");
    cluster.cairn(&["mkdir", "/dir"]).ok();
    cluster.put("/file", b"file", &[]);
    let before = paths(&cluster);
    let out = cluster.path("out");
    let out = out.to_str().unwrap();

    for command in ["cat", "head", "tail", "stat", "blocks", "fsck", "checksum", "du", "find", "ls"] {
        cluster.cairn(&[command, "/missing"]).fails_naming(1, &["/missing"]);
    }
    cluster.cairn(&["get", "/missing", out]).fails_naming(1, &["/missing"]);
    cluster.cairn(&["rm", "/missing"]).fails_naming(1, &["/missing"]);
    cluster.cairn(&["mv", "/missing", "/x"]).fails_naming(1, &["/missing"]);
    cluster.cairn(&["cp", "/missing", "/x"]).fails_naming(1, &["/missing"]);
    cluster.cairn(&["chmod", "600", "/missing"]).fails_naming(1, &["/missing"]);
    cluster.cairn(&["chown", "ann", "/missing"]).fails_naming(1, &["/missing"]);
    cluster.cairn(&["setrep", "2", "/missing"]).fails_naming(1, &["/missing"]);
    cluster.cairn(&["put", "/no/such/local/file", "/x"]).fails_naming(1, &["/no/such/local/file"]);

    // A directory where a file is meant.
    for command in ["cat", "head", "tail", "blocks", "checksum"] {
        cluster.cairn(&[command, "/dir"]).fails_naming(1, &["/dir", "directory"]);
    }
    cluster.cairn_with(&["put", "-", "/dir"], b"x").fails_naming(1, &["/dir"]);
    cluster.cairn(&["get", "/dir", "-"]).fails_naming(1, &["/dir"]);
    cluster.cairn(&["cp", "/dir", "/x"]).fails_naming(1, &["/dir", "-r"]);

    // A target that exists, a parent that does not or is no directory.
    cluster.cairn(&["put", &file, "/file"]).fails_naming(1, &["/file", "exists"]);
    cluster.cairn_with(&["put", "-", "/file"], b"x").fails_naming(1, &["/file", "exists"]);
    cluster.cairn(&["put", &file, "/no/parent/f"]).fails_naming(1, &["/no"]);
    cluster.cairn_with(&["put", "-", "/no/parent/f"], b"x").fails_naming(1, &["/no"]);
    cluster.cairn(&["put", &file, "/file/below"]).fails_naming(1, &["/file", "director"]);
    cluster.cairn(&["mkdir", "/file/below"]).fails_naming(1, &["/file", "director"]);
    cluster.cairn(&["mkdir", "-p", "/file"]).fails_naming(1, &["/file"]);
    cluster.cairn(&["mv", "/file", "/no/parent"]).fails_naming(1, &["/no"]);
    cluster.cairn(&["touch", "/no/parent"]).fails_naming(1, &["/no"]);
    cluster.cairn(&["get", "/file", &file]).fails_naming(1, &["exists"]);
    cluster.cairn(&["get", "/file", "/no/such/folder/f"]).fails_naming(1, &["/no/such/folder"]);
    cluster.cairn(&["rm", "-r", "--skip-trash", "/"]).fails(1);

    assert_eq!(paths(&cluster), before, "nothing half-made is left");
    assert_eq!(cluster.cat("/file"), b"file");
    assert_eq!(std::fs::read(&file).unwrap(), b"local");
    assert!(!cluster.path("out").exists());
}

#[test]
fn paths_that_are_none() {
    let cluster = Cluster::small();
    let file = cluster.local_file("local", b"local");
    let long = format!("/{}", "x".repeat(256));
    let deep = "/d".repeat(4_100);
    for path in ["relative", "", "/a/../b", "/..", "/a:b", &long, &deep] {
        for command in
            [&["put", &*file, path][..], &["mkdir", path], &["cat", path], &["ls", path], &["mv", "/x", path]]
        {
            let run = cluster.cairn(command);
            let code = run.code;
            assert!(code == 1 || code == 2, "{}: exit code {code}", run.line);
            run.fails(code);
        }
    }
    for path in ["/.reserved/x", "/.cairn", "/a/.snapshot"] {
        cluster.cairn(&["mkdir", "-p", path]).fails_naming(1, &["reserved"]);
    }
    for args in [["mkdir", "/a"], ["cat", "/a"]] {
        let mut bytes: Vec<&OsStr> = args.iter().map(OsStr::new).collect();
        bytes[1] = OsStr::from_bytes(b"/a\xff\xfeb");
        let run = Run::of(cluster.command(&bytes), b"");
        let code = run.code;
        assert!(code == 1 || code == 2, "exit code {code}");
        run.fails_naming(code, &["UTF-8"]);
    }
    assert_eq!(paths(&cluster), Vec::<String>::new());
}

#[test]
fn numbers_out_of_range() {
    let cluster = Cluster::small();
    let file = cluster.local_file("local", b"local");
    for flags in [
        ["--replication", "0"],
        ["--replication", "600"],
        ["--replication", "many"],
        ["--block-size", "1"],
        ["--block-size", "1000"],
        ["--block-size", "1t"],
        ["--block-size", "-5"],
    ] {
        let run = cluster.cairn(&["put", flags[0], flags[1], &file, "/x"]);
        let code = run.code;
        assert!(code == 1 || code == 2, "{flags:?}: exit code {code}");
        run.fails_naming(code, &[flags[1].trim_start_matches('-')]);
    }
    cluster.cairn(&["setrep", "0", "/x"]).fails(2);
    cluster.cairn(&["chmod", "999", "/x"]).fails(2);
    assert_eq!(paths(&cluster), Vec::<String>::new());
}

#[test]
fn the_namenodes_own_limits_hold_for_every_client() {
    // The command line lets 512 bytes pass, this namenode asks for a mebibyte at least.
    let cluster = Cluster::start(ClusterOptions::new(1, 1).core("min_block_size", 1 << 20).core("max_replication", 4));
    let file = cluster.local_file("local", b"local");
    cluster.cairn(&["put", "--block-size", "4096", &file, "/x"]).fails_naming(1, &["block size", "4096"]);
    cluster.cairn(&["put", "--replication", "5", &file, "/x"]).fails_naming(1, &["replication", "5"]);
    assert_eq!(paths(&cluster), Vec::<String>::new());
}

#[test]
fn no_command_at_all() {
    let cairn = |args: &[&str]| {
        let mut command = std::process::Command::new(binary::cairn());
        command.args(args).env_remove("CAIRN_NAMENODE");
        Run::of(command, b"")
    };
    assert_eq!(cairn(&[]).code, 2);
    cairn(&["frobnicate"]).fails_naming(2, &["frobnicate"]);
    cairn(&["ls", "--no-such-flag"]).fails_naming(2, &["--no-such-flag"]);
    cairn(&["put", "only-one"]).fails(2);
    cairn(&["--namenode", "nowhere", "ls", "/"]).fails_naming(2, &["nowhere"]);
    cairn(&["--config", "/no/such/file", "ls", "/"]).fails_naming(1, &["/no/such/file"]);
    assert!(cairn(&["--help"]).ok().contains("wordcount"));
    assert!(cairn(&["--version"]).ok().contains(env!("CARGO_PKG_VERSION")));
}

#[test]
fn unknown_and_wrong_settings_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("c.toml");
    let namenode = |text: &str| {
        std::fs::write(&config, text).unwrap();
        let mut command = std::process::Command::new(binary::cairn());
        command
            .args(["namenode", "--listen", "127.0.0.1:0", "--dir"])
            .arg(dir.path().join("nn"))
            .arg("--config")
            .arg(&config);
        Run::of(command, b"")
    };
    namenode("[namenode.core]\ndead_interval = 5\n").fails_naming(1, &["dead_interval"]);
    namenode("[namenode.core]\ndefault_replication = 0\n").fails_naming(1, &["default_replication"]);
    namenode("[namenode.core]\ndead_interval_ms = \"soon\"\n").fails_naming(1, &["dead_interval_ms"]);
    namenode("[nameode]\n").fails_naming(1, &["nameode"]);
    assert!(!dir.path().join("nn").exists(), "nothing was formatted");
}

/// Runs a command that must not wait for ever for somebody who never answers.
fn ends_by_itself(mut command: std::process::Command) -> Run {
    let line = cairn_tests::run::line_of(&command);
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    Run::of_child(&line, child, Duration::from_secs(60))
}

#[test]
fn nobody_or_somebody_else_at_the_address() {
    let cairn = |addr: &str| {
        let mut command = std::process::Command::new(binary::cairn());
        command.args(["--namenode", addr, "ls", "/"]);
        ends_by_itself(command)
    };
    // Ours, so that no one else takes it, and nobody listens.
    let ports = PortRange::take();
    let closed = format!("127.0.0.1:{}", ports.spare(0));
    cairn(&closed).fails_naming(1, &[&closed]);

    let answers: [&'static [u8]; 3] = [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-OpenSSH_9.6\r\n", b""];
    for answer in answers {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap().to_string();
        std::thread::spawn(move || {
            for conn in listener.incoming() {
                let mut conn = conn.unwrap();
                let _ = conn.write_all(answer);
                let _ = conn.read(&mut [0; 1_024]);
            }
        });
        cairn(&addr).fails_naming(1, &[&addr]);
    }
    cairn("no-such-host.invalid:8020").fails_naming(1, &["no-such-host.invalid"]);
}

#[test]
fn a_datanodes_port_is_no_namenode() {
    let cluster = Cluster::small();
    let mut command = cluster.command(&["ls", "/"]);
    command.env("CAIRN_NAMENODE", &cluster.datanodes[0].addr);
    ends_by_itself(command).fails_naming(1, &[&cluster.datanodes[0].addr]);
}

#[test]
fn strangers_at_the_ports_do_no_harm() {
    let cluster = Cluster::small();
    for addr in [&cluster.namenode.addr, &cluster.datanodes[0].addr] {
        for bytes in [
            &b"GET / HTTP/1.1\r\n\r\n"[..],
            b"\xff\xff\xff\xff\xff\xff",
            b"CAIRN\x09\x00\x01\xff\xff\xff\xff",
            b"CAIRN",
            b"",
        ] {
            let mut conn = std::net::TcpStream::connect(addr).unwrap();
            conn.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
            conn.write_all(bytes).unwrap();
            let _ = conn.read(&mut [0; 100]);
        }
        let mut random = std::net::TcpStream::connect(addr).unwrap();
        let _ = random.write_all(&data::random(9, 100_000));
    }
    cluster.put("/f", b"still here", &[]);
    assert_eq!(cluster.cat("/f"), b"still here");
}

/// A frame of Hadoop RPC.
fn hadoop_frame(parts: &[Vec<u8>]) -> Vec<u8> {
    let body = parts.concat();
    [&(body.len() as u32).to_be_bytes()[..], &body].concat()
}

/// What a Hadoop client sends first: the opening, and that it is "ann".
fn hadoop_opening() -> Vec<u8> {
    let header = hadoop::RpcRequestHeader { call_id: -3, rpc_kind: Some(2), rpc_op: Some(0), ..Default::default() };
    let user = hadoop::UserInformation { effective_user: Some("ann".into()), real_user: None };
    let context = hadoop::IpcConnectionContext { user_info: Some(user), protocol: Some("some.Protocol".into()) };
    let frame = hadoop_frame(&[header.encode_length_delimited_to_vec(), context.encode_length_delimited_to_vec()]);
    [b"hrpc\x09\x00\x00".to_vec(), frame].concat()
}

#[test]
fn hadoop_clients_that_break_the_protocol_are_told_and_leave_nothing() {
    let cluster = Cluster::small();
    let (namenode, datanode) = (&cluster.namenode, &cluster.datanodes[0]);
    let ask = |addr: &str, bytes: &[u8], expected: &str| {
        let mut conn = std::net::TcpStream::connect(addr).unwrap();
        conn.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let _ = conn.write_all(bytes);
        let (mut said, mut piece) = (String::new(), [0; 4_096]);
        while !said.contains(expected) {
            match conn.read(&mut piece) {
                Ok(count) if count > 0 => said.push_str(&String::from_utf8_lossy(&piece[..count])),
                _ => break,
            }
        }
        said
    };
    let then = |more: &[u8]| [hadoop_opening(), more.to_vec()].concat();
    let call = hadoop::RpcRequestHeader { call_id: 7, rpc_kind: Some(2), rpc_op: Some(0), ..Default::default() };
    let method = hadoop::RequestHeader {
        method_name: "doWhatIMean".into(),
        protocol_name: "org.apache.hadoop.hdfs.protocol.ClientProtocol".into(),
        client_protocol_version: 1,
    };
    let unknown = hadoop_frame(&[call.encode_length_delimited_to_vec(), method.encode_length_delimited_to_vec()]);
    let cases: [(&str, &str, Vec<u8>, &str); 7] = [
        ("an old client", &namenode.addr, b"hrpc\x04\x50".to_vec(), "cannot communicate with client version 4"),
        ("a newer client", &namenode.addr, b"hrpc\x0a\x00\x00".to_vec(), "cannot communicate with client version 10"),
        ("a huge frame", &namenode.addr, then(&[0x7f, 0xff, 0xff, 0xff]), "longer than the limit"),
        ("no message", &namenode.addr, then(&hadoop_frame(&[vec![0xff; 40]])), "could not be read"),
        ("an unknown method", &namenode.addr, then(&unknown), "Unknown method doWhatIMean"),
        ("a browser", &namenode.addr, b"GET / HTTP/1.1\r\nHost: h\r\n\r\n".to_vec(), "HTTP/1.1"),
        ("a SASL handshake", &datanode.addr, b"\xde\xad\xbe\xef\x02\x08\x00".to_vec(), "security off"),
    ];
    for (who, addr, bytes, expected) in &cases {
        let said = ask(addr, bytes, expected);
        assert!(said.contains(expected), "{who}: {said:?}");
    }
    let descriptors = |pid: u32| std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    let before = [namenode.process.pid, datanode.process.pid].map(descriptors);
    // Many who leave in the middle of a frame or an operation, and many who stay there until they are sent away.
    let mut stay = Vec::new();
    for at in 0..100 {
        for addr in [&namenode.addr, &datanode.addr] {
            let mut conn = std::net::TcpStream::connect(addr).unwrap();
            let half = if at % 2 == 0 { then(&[0, 0, 1, 0, 0x20]) } else { b"\x00\x1c\x50\x90\x4e\x0a".to_vec() };
            let _ = conn.write_all(&half);
            if at < 10 {
                stay.push(conn);
            }
        }
    }
    cluster.put("/f", b"still here", &[]);
    assert_eq!(cluster.cat("/f"), b"still here");
    drop(stay);
    wait_for("nothing is left of them", Duration::from_secs(60), || {
        let now = [namenode.process.pid, datanode.process.pid].map(descriptors);
        // A connection or two of those who belong here may come and go.
        if now.iter().zip(before).all(|(now, before)| *now <= before + 5) { Ok(()) } else { Err(format!("{now:?}")) }
    });
}

#[test]
fn a_full_cluster_says_so_and_keeps_nothing_half_made() {
    let cluster = Cluster::start(ClusterOptions::new(3, 2).more("[datanode]\ncapacity_bytes = 6291456"));
    cluster.put("/small", b"fits", &[]);
    let run = cluster.cairn_with(&["put", "-", "/big"], &data::random(10, 30 << 20));
    run.fails_naming(1, &["/big"]);
    assert_eq!(paths(&cluster), ["/small"]);
    assert_eq!(cluster.cat("/small"), b"fits");
    wait_for("the room comes back", Duration::from_secs(60), || {
        let run = cluster.cairn_with(&["put", "-", "/again"], &data::random(11, 1 << 20));
        if run.code == 0 { Ok(()) } else { Err(run.stderr) }
    });
}

#[test]
fn a_local_target_that_cannot_be_written_is_named() {
    let cluster = Cluster::small();
    cluster.put("/f", &data::random(12, 3 << 20), &[]);
    let folder = cluster.path("folder-in-the-way");
    std::fs::create_dir_all(folder.join("f")).unwrap();
    cluster.cairn(&["get", "/f", folder.to_str().unwrap()]).fails_naming(1, &["folder-in-the-way"]);
    let full = Run::of(
        {
            let mut command = std::process::Command::new("bash");
            command.args(["-c", "\"$0\" cat /f > /dev/full"]).arg(binary::cairn());
            command.env("CAIRN_NAMENODE", &cluster.namenode.addr);
            command
        },
        b"",
    );
    full.fails_naming(1, &["space"]);
}

#[test]
fn a_damaged_gzip_is_told_with_task_node_and_place() {
    let cluster = Cluster::small();
    let plain = cluster.local_file("text", &data::text(17, 300_000, 2_000));
    let packed = std::process::Command::new("gzip").args(["-c", &plain]).output().unwrap().stdout;
    let mut flipped = packed.clone();
    flipped[packed.len() / 2] ^= 0x10;
    cluster.put("/whole.gz", &packed, &[]);
    cluster.put("/flipped.gz", &flipped, &[]);
    cluster.put("/cut.gz", &packed[..packed.len() / 2], &[]);
    cluster.put("/none.gz", b"this is no gzip", &[]);
    cluster.cairn(&["job", "streaming", "--input", "/whole.gz", "--output", "/out", "--mapper", "cat"]).ok();
    for input in ["/flipped.gz", "/cut.gz", "/none.gz"] {
        let line = ["job", "streaming", "--input", input, "--output", "/x", "--mapper", "cat", "--reducers", "0"];
        let parts = ["map 0", "on dn", input, "gzip data are damaged or cut off at about byte"];
        cluster.cairn(&line).fails_naming(1, &parts);
        cluster.cairn(&["stat", "/x"]).fails(1);
    }
}

//! The file system over HTTP: what goes in by one door comes out by the other, in two steps, and what breaks off leaves nothing half made.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "tests fail by panicking")]

use std::process::Command;
use std::time::Duration;

use cairn_common::process;
use cairn_tests::http::{self, Body, WebHdfs};
use cairn_tests::{Cluster, ClusterOptions, data, wait_for, wait_until};
use serde_json::json;

const BLOCK: usize = 1 << 20;
/// A copy that failed is ordered again after 20 s, a recovery after 10 and 30.
const SOON: Duration = Duration::from_secs(40);

fn web_as(cluster: &Cluster, user: &str) -> WebHdfs {
    WebHdfs { addr: cluster.namenode.http().to_owned(), user: user.to_owned() }
}

/// The user who runs the cluster.
fn web(cluster: &Cluster) -> WebHdfs {
    web_as(cluster, &process::user_name())
}

fn exists(web: &WebHdfs, path: &str) -> bool {
    web.ask("GET", path, "op=GETFILESTATUS").status == 200
}

fn length_of(web: &WebHdfs, path: &str) -> u64 {
    web.ask("GET", path, "op=GETFILESTATUS").json()["FileStatus"]["length"].as_u64().unwrap()
}

#[test]
fn bytes_go_in_and_come_out() {
    let cluster = Cluster::small();
    let web = web(&cluster);
    let bytes = data::random(1, 5 * BLOCK / 2 + 77);

    let created =
        web.follow("PUT", "/d/whole", "op=CREATE&permission=640&replication=2&buffersize=4096", Body::Whole(&bytes));
    let created = created.status(201);
    assert_eq!(created.header("location"), Some(&*format!("hdfs://{}/d/whole", cluster.namenode.addr)));
    assert!(created.body.is_empty());
    let status = &web.ask("GET", "/d/whole", "op=GETFILESTATUS").json()["FileStatus"];
    assert_eq!((&status["length"], &status["replication"]), (&json!(bytes.len()), &json!(2)), "{status}");
    assert_eq!((&status["permission"], &status["owner"]), (&json!("640"), &json!(web.user)), "{status}");
    assert_eq!(cluster.blocks("/d/whole").len(), 3);
    assert!(cluster.cat("/d/whole") == bytes);
    assert!(web.read("/d/whole", "") == bytes);

    web.create("/d/chunked", "", Body::Chunked(&bytes, 60_001));
    assert!(cluster.cat("/d/chunked") == bytes);
    web.create("/d/empty", "", Body::None);
    assert_eq!(web.read("/d/empty", ""), b"");

    // From the other door.
    cluster.put("/put", &bytes, &[]);
    assert!(web.read("/put", "") == bytes);
    for (offset, length) in [(0, 10), (BLOCK - 5, 10), (BLOCK, BLOCK), (17, 2 * BLOCK), (bytes.len() - 3, 100), (5, 0)]
    {
        let end = bytes.len().min(offset + length);
        assert!(
            web.read("/put", &format!("offset={offset}&length={length}")) == bytes[offset..end],
            "{offset} {length}"
        );
    }
    assert!(web.read("/put", &format!("offset={BLOCK}")) == bytes[BLOCK..]);
    let past = format!("op=OPEN&offset={}", bytes.len());
    web.ask("GET", "/put", &past).refused(403, "IOException");

    // Overwriting is asked for, and an existing file is told before any byte is sent.
    web.ask("PUT", "/put", "op=CREATE").refused(403, "FileAlreadyExistsException");
    web.create("/put", "overwrite=True", Body::Whole(b"new"));
    assert_eq!(cluster.cat("/put"), b"new");

    cluster.wait_healthy(SOON);
    let places = web.ask("GET", "/d/whole", "op=GETFILEBLOCKLOCATIONS").json();
    let places = places["BlockLocations"]["BlockLocation"].as_array().unwrap().clone();
    let starts: Vec<u64> = places.iter().map(|place| place["offset"].as_u64().unwrap()).collect();
    assert_eq!(starts, [0, BLOCK as u64, 2 * BLOCK as u64]);
    assert!(places.iter().all(|place| place["names"].as_array().unwrap().len() == 2), "{places:?}");
    let located = web.ask("GET", "/d/whole", "op=GET_BLOCK_LOCATIONS").json();
    assert_eq!(located["LocatedBlocks"]["locatedBlocks"].as_array().unwrap().len(), 3);
    assert!(located["LocatedBlocks"]["locatedBlocks"][0]["locations"][0]["infoPort"].as_u64().unwrap() > 0);

    // The same bytes have the same checksum, whichever way they came, and whoever holds them.
    cluster.put("/d/same", &bytes, &[]);
    let sum = |path: &str| web.follow("GET", path, "op=GETFILECHECKSUM", Body::None).json()["FileChecksum"].clone();
    assert_eq!(sum("/d/whole"), sum("/d/same"));
    assert_eq!(sum("/d/whole")["algorithm"], "MD5-of-2048MD5-of-512CRC32C");
    assert_eq!(sum("/d/whole")["length"], 28);
    assert_eq!(sum("/d/empty")["bytes"], "00000000000000000000000070bc8f4b72a86921468bf8e8441dce5100000000");
}

#[test]
fn bytes_stay_on_the_datanode_that_took_them() {
    // A node that was silent for a moment gets no block, not even its own.
    let options = ClusterOptions::new(3, 2).core("stale_interval_ms", 60_000).core("dead_interval_ms", 60_000);
    let cluster = Cluster::start(options);
    let web = web(&cluster);
    for at in 0..6 {
        let path = format!("/f{at}");
        let location = web.place("PUT", &path, "op=CREATE&replication=1");
        let (addr, target) = http::split(&location);
        http::send(addr, "PUT", target, &[], Body::Whole(b"here")).status(201);
        let holder = cluster.datanode(&cluster.blocks(&path)[0]["replicas"][0]);
        assert_eq!(cluster.datanodes[holder].http(), addr);
        assert_eq!(http::split(&web.place("GET", &path, "op=OPEN")).0, addr, "readers are sent to it");
    }
}

#[test]
fn files_grow_and_are_cut_and_joined() {
    let cluster = Cluster::small();
    let web = web(&cluster);
    let (one, two) = (data::random(2, BLOCK + 500), data::random(3, 300_000));
    web.create("/a", "", Body::Whole(&one));
    let appended = web.follow("POST", "/a", "op=APPEND", Body::Whole(&two)).status(200);
    assert!(appended.body.is_empty());
    web.follow("POST", "/a", "op=append&bufferSize=100", Body::Chunked(&one, 9_999)).status(200);
    let all = [&one[..], &two, &one].concat();
    assert!(web.read("/a", "") == all);
    assert!(
        web.read("/a", &format!("offset={}&length=1000", one.len() - 500)) == all[one.len() - 500..one.len() + 500]
    );

    let done = web.ask("POST", "/a", "op=TRUNCATE&newlength=1048900").json();
    assert!(done["boolean"].is_boolean());
    wait_for("the file is cut", SOON, || {
        let status = web.ask("GET", "/a", "op=GET_BLOCK_LOCATIONS").json();
        if status["LocatedBlocks"]["isUnderConstruction"] == false { Ok(()) } else { Err(status.to_string()) }
    });
    assert!(web.read("/a", "") == all[..1_048_900]);

    web.create("/b", "", Body::Whole(&two));
    let joined = web.ask("POST", "/a", "op=CONCAT&sources=/b");
    assert_eq!((joined.status, joined.body.len()), (200, 0));
    assert!(cluster.cat("/a") == [&all[..1_048_900], &two].concat());
    assert!(!exists(&web, "/b"));
    web.ask("POST", "/none", "op=APPEND").refused(404, "FileNotFoundException");
}

#[test]
fn who_wants_no_redirect_gets_the_address() {
    let cluster = Cluster::small();
    let web = web(&cluster);
    let place = |method: &str, query: &str| {
        web.ask(method, "/f", query).json()["Location"].as_str().expect("an address").to_owned()
    };
    let location = place("PUT", "op=CREATE&noredirect=true&blocksize=1048576");
    let (addr, target) = http::split(&location);
    assert!(target.contains("blocksize=1048576") && !target.contains("noredirect"), "{target}");
    http::send(addr, "PUT", target, &[], Body::Whole(b"hello")).status(201);
    let location = place("GET", "op=OPEN&noredirect=true&offset=1");
    let (addr, target) = http::split(&location);
    assert_eq!(http::send(addr, "GET", target, &[], Body::None).status(200).body, b"ello");
    let location = place("GET", "op=GETFILECHECKSUM&noredirect=true");
    let (addr, target) = http::split(&location);
    http::send(addr, "GET", target, &[], Body::None).json();
    let location = place("POST", "op=APPEND&noredirect=true");
    let (addr, target) = http::split(&location);
    http::send(addr, "POST", target, &[], Body::Whole(b" world")).status(200);
    assert_eq!(web.read("/f", ""), b"hello world");
}

#[test]
fn curl_does_both_steps_by_itself() {
    let cluster = Cluster::small();
    let web = web(&cluster);
    let bytes = data::random(4, 3 * BLOCK);
    let file = cluster.local_file("local", &bytes);
    let url = |path: &str, query: &str| format!("http://{}{}", web.addr, web.target(path, query));
    let curl = |args: &[&str]| {
        let output = Command::new("curl").args(["-sS", "-f", "-L", "--max-time", "60"]).args(args).output();
        let output = output.expect("curl is installed");
        assert!(output.status.success(), "curl {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    };
    curl(&["-T", &file, &url("/by%20curl", "op=CREATE")]);
    curl(&["-X", "POST", "-T", &file, &url("/by%20curl", "op=APPEND")]);
    assert!(cluster.cat("/by curl") == [&bytes[..], &bytes].concat());
    assert!(curl(&[&url("/by%20curl", "op=OPEN&offset=3145728")]) == bytes);
}

#[test]
fn names_may_hold_blanks_percents_and_letters_of_any_kind() {
    let cluster = Cluster::small();
    let web = web(&cluster);
    let (escaped, plain) = ("/a%20b/100%25%2B/%C3%BC%3F%23%26%3D", "/a b/100%+/ü?#&=");
    web.create(escaped, "", Body::Whole(b"odd"));
    assert_eq!(cluster.cat(plain), b"odd");
    assert_eq!(web.read(escaped, ""), b"odd");
    web.follow("POST", escaped, "op=APPEND", Body::Whole(b"er")).status(200);
    let listed = web.ask("GET", "/a%20b/100%25%2B", "op=LISTSTATUS").json();
    assert_eq!(listed["FileStatuses"]["FileStatus"][0]["pathSuffix"], "ü?#&=");
    let renamed = web.ask("PUT", escaped, "op=RENAME&destination=/a%20b/%2520");
    assert_eq!(renamed.json(), json!({ "boolean": true }));
    assert_eq!(cluster.cat("/a b/%20"), b"odder");
    assert_eq!(web.ask("DELETE", "/a%20b", "op=DELETE&recursive=true").json(), json!({ "boolean": true }));
    assert!(!exists(&web, "/a%20b"));
}

#[test]
fn an_upload_that_breaks_off_is_taken_back() {
    let cluster = Cluster::small();
    let web = web(&cluster);
    let bytes = data::random(5, 2 * BLOCK);
    let begin = |method: &str, path: &str, query: &str, framing: (&str, &str), sent: &[u8]| {
        let location = web.place(method, path, query);
        let (addr, target) = http::split(&location);
        let mut open = http::open(addr, method, target, &[framing]);
        open.send(sent);
        open
    };
    let whole = ("Content-Length", "9000000");
    let upload = begin("PUT", "/new", "op=CREATE", whole, &bytes);
    wait_until("the upload has begun", SOON, || exists(&web, "/new"));
    drop(upload);
    wait_until("the half-made file is gone", SOON, || !exists(&web, "/new"));
    // Nobody's lease is in the way of the next try.
    web.create("/new", "", Body::Whole(b"second try"));
    assert_eq!(web.read("/new", ""), b"second try");

    let chunk = [format!("{:x}\r\n", bytes.len()).as_bytes(), &bytes, b"\r\n"].concat();
    let upload = begin("PUT", "/chunked", "op=CREATE", ("Transfer-Encoding", "chunked"), &chunk);
    wait_until("the upload has begun", SOON, || exists(&web, "/chunked"));
    drop(upload);
    wait_until("the half-made file is gone", SOON, || !exists(&web, "/chunked"));

    // What was there before an append stays, and the file is nobody's at once.
    web.create("/grows", "", Body::Whole(b"before"));
    let upload = begin("POST", "/grows", "op=APPEND", whole, &bytes);
    let open = |web: &WebHdfs| {
        web.ask("GET", "/grows", "op=GET_BLOCK_LOCATIONS").json()["LocatedBlocks"]["isUnderConstruction"] == true
    };
    wait_until("the append has begun", SOON, || open(&web));
    drop(upload);
    wait_until("the file is closed", SOON, || !open(&web));
    let kept = length_of(&web, "/grows") as usize;
    let read = web.read("/grows", "");
    assert!(read.len() == kept && read.starts_with(b"before") && bytes.starts_with(&read[6..]), "{kept}");
    web.follow("POST", "/grows", "op=APPEND", Body::Whole(b"after")).status(200);
    assert_eq!(length_of(&web, "/grows") as usize, kept + 5);
    cluster.wait_healthy(SOON);
}

#[test]
fn a_datanode_that_ends_takes_its_uploads_back() {
    let cluster = Cluster::small();
    let web = web(&cluster);
    let location = web.place("PUT", "/new", "op=CREATE");
    let (addr, target) = http::split(&location);
    let mut upload = http::open(addr, "PUT", target, &[("Content-Length", "9000000")]);
    upload.send(&data::random(6, BLOCK));
    wait_until("the upload has begun", SOON, || exists(&web, "/new"));
    let node = cluster.datanodes.iter().find(|node| node.http() == addr).expect("it is one of ours");
    node.process.signal(libc::SIGTERM);
    wait_until("the half-made file is gone", SOON, || !exists(&web, "/new"));
    wait_until("the datanode has ended", SOON, || !node.process.runs());
}

#[test]
fn an_upload_that_fails_in_mid_body_says_why_also_after_100_continue() {
    let cluster = Cluster::small();
    let web = web(&cluster);
    let location = web.place("PUT", "/gone", "op=CREATE&blocksize=1048576");
    let (addr, target) = http::split(&location);
    let size = 6 * BLOCK;
    let length = size.to_string();
    let mut upload = http::open(addr, "PUT", target, &[("Content-Length", &length), ("Expect", "100-continue")]);
    // The datanode wants the data.
    let go_on = b"HTTP/1.1 100 Continue\r\n\r\n";
    assert_eq!(upload.read_some(go_on.len()), go_on);
    let bytes = data::random(11, size);
    upload.send(&bytes[..BLOCK]);
    wait_until("the upload has begun", SOON, || exists(&web, "/gone"));
    // Its file is taken away under it.
    assert_eq!(web.ask("DELETE", "/gone", "op=DELETE").json(), json!({ "boolean": true }));
    upload.send(&bytes[BLOCK..]);
    upload.reply().refused(403, "LeaseExpiredException");
    assert!(!exists(&web, "/gone"));
}

#[test]
fn nobody_is_sent_to_a_datanode_that_stops() {
    let cluster = Cluster::start(ClusterOptions::new(4, 2));
    let web = web(&cluster);
    let bytes = data::random(12, BLOCK);
    web.create("/f", "replication=2", Body::Whole(&bytes));
    cluster.wait_healthy(SOON);
    let holder = cluster.datanode(&cluster.blocks("/f")[0]["replicas"][0]);
    let node = &cluster.datanodes[holder];
    let stopping = node.http().to_owned();
    node.process.signal(libc::SIGTERM);
    wait_until("it takes no more connections", SOON, || std::net::TcpStream::connect(&stopping).is_err());
    for at in 0..20 {
        assert_ne!(http::split(&web.place("GET", "/f", "op=OPEN")).0, stopping);
        assert!(web.read("/f", "") == bytes);
        web.create(&format!("/new{at}"), "", Body::Whole(b"new"));
    }
}

#[test]
fn readers_that_leave_hold_nothing() {
    let cluster = Cluster::small();
    let web = web(&cluster);
    let bytes = data::random(7, 8 * BLOCK);
    web.create("/large", "blocksize=8388608", Body::Whole(&bytes));
    let location = web.place("GET", "/large", "op=OPEN");
    let (addr, target) = http::split(&location);
    // More than there are places for at a time.
    for _ in 0..100 {
        let mut open = http::open(addr, "GET", target, &[]);
        assert!(open.read_some(100).starts_with(b"HTTP/1.1 200 OK\r\n"));
    }
    let reply = http::send(addr, "GET", target, &[], Body::None).status(200);
    assert!(reply.whole && reply.body == bytes);
}

#[test]
fn nobody_is_sent_to_a_dead_datanode() {
    let mut cluster = Cluster::start(ClusterOptions::new(4, 2));
    let web = web(&cluster);
    let bytes = data::random(8, BLOCK);
    web.create("/f", "", Body::Whole(&bytes));
    cluster.wait_healthy(SOON);
    let holder = cluster.datanode(&cluster.blocks("/f")[0]["replicas"][0]);
    let gone = cluster.datanodes[holder].http().to_owned();
    cluster.kill_datanode(holder);
    // The namenode holds it for alive at first.
    for at in 0..20 {
        assert_ne!(http::split(&web.place("GET", "/f", "op=OPEN")).0, gone);
        assert!(web.read("/f", "") == bytes);
        web.create(&format!("/new{at}"), "", Body::Whole(&bytes));
    }
    // Those who were sent to one that failed them name it.
    let other = http::split(&web.place("GET", "/f", "op=OPEN")).0.to_owned();
    let again = web.place("GET", "/f", &format!("op=OPEN&excludedatanodes={other}"));
    assert_ne!(http::split(&again).0, other);

    // A namenode that comes back is found again.
    cluster.kill_namenode();
    cluster.restart_namenode();
    cluster.wait_serving(SOON);
    wait_for("datanodes are back in touch", SOON, || match web.ask("PUT", "/late", "op=CREATE") {
        reply if reply.status == 307 => Ok(()),
        reply => Err(String::from_utf8_lossy(&reply.body).into_owned()),
    });
    web.create("/late", "", Body::Whole(&bytes));
    assert!(web.read("/late", "") == bytes);
}

#[test]
fn rights_are_those_of_the_user_who_is_named() {
    let cluster = Cluster::small();
    let (web, ann) = (web(&cluster), web_as(&cluster, "ann"));
    web.ask("PUT", "/ann", "op=MKDIRS").json();
    web.ask("PUT", "/ann", "op=SETOWNER&owner=ann").status(200);
    ann.create("/ann/f", "permission=600", Body::Whole(b"mine"));
    let listed = web.ask("GET", "/ann", "op=LISTSTATUS").json();
    assert_eq!(listed["FileStatuses"]["FileStatus"][0]["owner"], "ann");
    let bob = web_as(&cluster, "bob");
    let said = bob.ask("GET", "/ann/f", "op=OPEN").refused(403, "AccessControlException");
    assert!(said.contains("user=bob, access=READ"), "{said}");
    // Where only the datanode finds out, it says so, also to who sends much before reading the answer.
    let large = data::random(9, 10 << 20);
    let reply = bob.follow("PUT", "/ann/g", "op=CREATE", Body::Whole(&large));
    let said = reply.refused(403, "AccessControlException");
    assert!(said.contains("user=bob, access=WRITE"), "{said}");
    assert!(!exists(&web, "/ann/g"));
    let nobody = http::send(&web.addr, "GET", "/webhdfs/v1/ann/f?op=OPEN", &[], Body::None);
    assert!(nobody.refused(403, "AccessControlException").contains("user=dr.who"));
    let other = http::send(&web.addr, "GET", "/webhdfs/v1/?op=LISTSTATUS&user.name=bob&doas=ann", &[], Body::None);
    other.refused(403, "AccessControlException");
}

#[test]
fn web_pages_and_nonsense_are_refused() {
    let cluster = Cluster::small();
    let web = web(&cluster);
    web.create("/f", "", Body::Whole(b"bytes"));
    let location = web.place("GET", "/f", "op=OPEN");
    let (datanode, read) = http::split(&location);
    let listing = web.target("/", "op=LISTSTATUS");
    for (addr, target) in [(web.addr.as_str(), listing.as_str()), (datanode, read)] {
        for header in
            [("Origin", "http://evil.example"), ("Host", "evil.example:9870"), ("Sec-Fetch-Site", "cross-site")]
        {
            http::send(addr, "GET", target, &[header], Body::None).refused(403, "AccessControlException");
        }
        http::send(addr, "GET", target, &[("Host", "localhost:1")], Body::None).status(200);
        let huge = "x".repeat(1 << 20);
        assert_eq!(http::send(addr, "GET", target, &[("X-Huge", &huge)], Body::None).status, 431);
        assert_eq!(http::send(addr, "GET", &format!("/{huge}"), &[], Body::None).status / 100, 4);
        http::send(addr, "GET", "/webhdfs/v1/f?op=NONSENSE", &[], Body::None).refused(400, "IllegalArgumentException");
        http::send(addr, "GET", "/webhdfs/v1/f", &[], Body::None).refused(400, "IllegalArgumentException");
        http::send(addr, "GET", "/webhdfs/v1/a/../f?op=OPEN", &[], Body::None).refused(400, "InvalidPathException");
        http::send(addr, "GET", "/webhdfs/v1/%ff?op=OPEN", &[], Body::None).refused(400, "IllegalArgumentException");
        http::send(addr, "GET", "/webhdfs/v2/f?op=OPEN", &[], Body::None).status(404);
        http::send(addr, "GET", "/webhdfs/v1/f?op=OPEN&offset=x", &[], Body::None)
            .refused(400, "IllegalArgumentException");
        http::send(addr, "GET", "/webhdfs/v1/none?op=OPEN", &[], Body::None).refused(404, "FileNotFoundException");
        http::send(addr, "GET", "/webhdfs/v1/?op=OPEN", &[], Body::None).refused(404, "FileNotFoundException");
    }
    // What a datanode is not asked for.
    let said = http::send(datanode, "GET", &listing, &[], Body::None).refused(400, "IllegalArgumentException");
    assert!(said.contains("namenode"), "{said}");
    let target = web.target("/f", "op=CREATE&permission=9");
    http::send(datanode, "PUT", &target, &[], Body::Whole(b"x")).refused(400, "IllegalArgumentException");
    assert_eq!(cluster.cat("/f"), b"bytes");
    assert_eq!(http::send(datanode, "GET", "/health", &[], Body::None).status, 200);
}

"""HdfsCLI (the package `hdfs`) against a namenode's HTTP address (HOST:PORT)."""

import os
import sys
import tempfile

from hdfs import InsecureClient, TokenClient
from hdfs.util import HdfsError

from checks import raises, run
from webhdfs_common import ROOT, USER, curl, data

ADDRESS = sys.argv[1]
HERE = f"{ROOT}/hdfs"
client = InsecureClient(f"http://{ADDRESS}", user=USER, root=HERE)


def starts_anew():
    client.delete(HERE, recursive=True)
    client.makedirs(HERE)
    assert client.status(HERE)["type"] == "DIRECTORY"
    assert client.list(HERE) == []


def writes_and_reads():
    bytes_ = data(2, 9_000_000)
    client.write("f", bytes_)
    with client.read("f") as file:
        assert file.read() == bytes_
    assert curl(ADDRESS, "GET", f"{HERE}/f", "op=OPEN") == bytes_
    with client.read("f", offset=1_048_570, length=20) as file:
        assert file.read() == bytes_[1_048_570:1_048_590]
    with client.read("f", chunk_size=100_000) as pieces:
        assert b"".join(pieces) == bytes_
    raises(HdfsError, client.write, "f", b"again")
    client.write("f", b"again", overwrite=True, replication=1, blocksize=1_048_576, permission="640")
    status = client.status("f")
    assert (status["length"], status["replication"], status["permission"]) == (5, 1, "640"), status


def writes_from_generators_and_writers():
    client.write("g", (data(at, 70_000) for at in range(10)))
    expected = b"".join(data(at, 70_000) for at in range(10))
    with client.read("g") as file:
        assert file.read() == expected
    with client.write("text", encoding="utf-8") as out:
        for line in ["eins", "zwei", "drei"]:
            out.write(line + "\n")
    with client.read("text", encoding="utf-8", delimiter="\n") as lines:
        assert list(lines)[:3] == ["eins", "zwei", "drei"]


def appends():
    client.write("log", b"one ")
    client.write("log", b"two ", append=True)
    client.write("log", iter([b"three"]), append=True)
    with client.read("log") as file:
        assert file.read() == b"one two three"
    raises(HdfsError, client.write, "none", b"x", append=True)


def uploads_and_downloads_folders():
    with tempfile.TemporaryDirectory() as folder:
        os.makedirs(f"{folder}/up/below")
        files = {"a": data(4, 2_000_000), "with blank": b"b", "below/100%": b"c", "below/ü": b"d", "below/empty": b""}
        for name, content in files.items():
            with open(f"{folder}/up/{name}", "wb") as file:
                file.write(content)
        client.upload("up", f"{folder}/up", n_threads=3)
        client.download("up", f"{folder}/down", n_threads=3)
        for name, content in files.items():
            with open(f"{folder}/down/{name}", "rb") as file:
                assert file.read() == content, name
        client.upload("up/a", f"{folder}/up/below/100%", overwrite=True)
        with client.read("up/a") as file:
            assert file.read() == b"c"
    walked = [(path, sorted(folders), sorted(files)) for path, folders, files in client.walk("up")]
    assert walked == [
        (f"{HERE}/up", ["below"], ["a", "with blank"]),
        (f"{HERE}/up/below", [], ["100%", "empty", "ü"]),
    ], walked
    assert client.content("up")["fileCount"] == 5


def attributes():
    client.set_permission("f", "600")
    client.set_owner("f", owner="ann", group="staff")
    client.set_times("f", modification_time=1_000_000, access_time=2_000_000)
    client.set_replication("f", 2)
    status = client.status("f")
    assert (status["permission"], status["owner"], status["group"]) == ("600", "ann", "staff"), status
    assert (status["modificationTime"], status["replication"]) == (1_000_000, 2), status
    acl = client.acl_status("f")
    assert (acl["entries"], acl["permission"]) == ([], "600"), acl
    assert client.checksum("g")["length"] == 28
    for refused in [
        lambda: client.set_acl("f", "user::rwx"),
        lambda: client.remove_acl("f"),
        lambda: client.allow_snapshot("up"),
        lambda: client.create_snapshot("up"),
    ]:
        assert "not supported" in str(raises(HdfsError, refused))


def renames_and_deletes():
    client.rename("g", "h")
    assert client.status("g", strict=False) is None
    client.makedirs("dir", permission="750")
    assert client.status("dir")["permission"] == "750"
    client.rename("h", "dir")
    assert client.list("dir") == ["h"]
    raises(HdfsError, client.rename, "none", "x")
    raises(HdfsError, client.delete, "dir")
    assert client.delete("dir", recursive=True)
    assert not client.delete("dir")
    assert client.resolve("a/../b") == f"{HERE}/b"


def says_what_is_wrong():
    error = raises(HdfsError, client.status, "none")
    assert error.exception == "FileNotFoundException", error.exception
    error = raises(HdfsError, InsecureClient(f"http://{ADDRESS}", user="nobody-else").delete, f"{HERE}/f")
    assert error.exception == "AccessControlException", error.exception
    # A token says nothing where nobody is authenticated: it is a request of nobody in particular.
    assert TokenClient(f"http://{ADDRESS}", token="abc").status("/")["type"] == "DIRECTORY"


run(
    [
        starts_anew,
        writes_and_reads,
        writes_from_generators_and_writers,
        appends,
        uploads_and_downloads_folders,
        attributes,
        renames_and_deletes,
        says_what_is_wrong,
    ]
)

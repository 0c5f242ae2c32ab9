"""What hdfs-native and snakebite offer, operation by operation."""

import os

from checks import raises
from hdfs_common import address, by_cairn, local, url

content = bytes(range(256)) * 20_000


def hdfs_native():
    from hdfs_native import Client, TrashNotEnabledError, WriteOptions

    client = Client(url)
    client.mkdirs("/native/a/b", 0o750, True)
    with client.create("/native/f", WriteOptions(overwrite=True)) as writer:
        writer.write(content[:70_000])
        writer.hsync()
        assert client.get_file_info("/native/f").length in (0, 70_000)
        writer.write(content[70_000:])
    with client.append("/native/f") as writer:
        writer.write(b"tail")
    raises(FileExistsError, client.create, "/native/f")
    with client.read("/native/f") as reader:
        assert len(reader) == len(content) + 4
        assert reader.read_range(len(content) - 2, 4) == b"\xfe\xff" + b"ta"
        assert b"".join(reader.read_range_stream(511, 3 * 512)) == content[511 : 4 * 512 - 1]
        reader.seek(-6, os.SEEK_END)
        assert reader.read(3) == b"\xfe\xfft" and reader.read() == b"ail"
        reader.seek(0)
        assert reader.read() == content + b"tail"
    assert by_cairn("cat", "/native/f") == content + b"tail"
    client.create("/native/a/g", WriteOptions(replication=2, block_size=1 << 20, permission=0o640)).close()
    made = client.get_file_info("/native/a/g")
    assert (made.replication, made.blocksize, made.length, made.permission) == (2, 1 << 20, 0, 0o640)
    assert [entry.path for entry in client.list_status("/native")] == ["/native/a", "/native/f"]
    assert sorted(entry.path for entry in client.list_status("/native", True)) == ["/native/a", "/native/a/b", "/native/a/g", "/native/f"], list(client.list_status("/native", True))
    assert sorted(entry.path for entry in client.glob_status("/native/{a/?,f*}")) == ["/native/a/b", "/native/a/g", "/native/f"]
    client.rename("/native/f", "/native/g")
    raises(FileExistsError, client.rename, "/native/g", "/native/a/g")
    client.rename("/native/g", "/native/a/g", overwrite=True)
    raises(FileNotFoundError, client.rename, "/native/g", "/native/h")
    client.set_permission("/native/a/g", 0o600)
    client.set_owner("/native/a/g", "ann", "staff")
    client.set_times("/native/a/g", 1_000, 2_000)
    client.set_replication("/native/a/g", 2)
    status = client.get_file_info("/native/a/g")
    assert (status.permission, status.owner, status.group, status.modification_time) == (0o600, "ann", "staff", 1_000)
    assert status.length == len(content) + 4
    summary = client.get_content_summary("/native")
    assert (summary.file_count, summary.directory_count, summary.length) == (1, 3, len(content) + 4)
    assert summary.space_consumed == 2 * (len(content) + 4)
    # Without ACLs a status has none, and a change is refused.
    assert client.get_acl_status("/native/a/g").entries == []
    raises(Exception, client.remove_acl, "/native/a/g")
    assert client.recover_lease("/native/a/g")
    raises(FileNotFoundError, client.get_file_info, "/none")
    raises(FileNotFoundError, lambda: list(client.list_status("/none")))
    raises(FileNotFoundError, client.read, "/none")
    raises(Exception, client.delete, "/native", False)
    raises((TrashNotEnabledError, FileNotFoundError), client.trash, "/none")
    assert client.delete("/native", True) and not client.delete("/native", True)


def hdfs_native_by_fsspec():
    from hdfs_native.fsspec import HdfsFileSystem

    host, port = address.split(":")
    fs = HdfsFileSystem(host=host, port=int(port), skip_instance_cache=True)
    fs.makedirs("/files/x/y", exist_ok=True)
    for name, length in [("x/one", 1), ("x/y/two", 2_000_000), ("three", 3)]:
        fs.pipe_file(f"/files/{name}", content[:length])

    def walked():
        return {bare(top): (sorted(map(bare, folders)), sorted(map(bare, files))) for top, folders, files in fs.walk("/files")}

    def bare(path):
        return path.removeprefix(f"hdfs://{address}")

    assert walked() == {"/files": (["x"], ["three"]), "/files/x": (["y"], ["one"]), "/files/x/y": ([], ["two"])}, walked()
    assert fs.cat_file("/files/x/y/two", start=1_048_000, end=1_050_000) == content[1_048_000:1_050_000]
    with fs.open("/files/three", "ab") as out:
        out.write(b"more")
    assert fs.cat_file("/files/three") == content[:3] + b"more"
    fs.mv("/files/three", "/files/x/three")
    assert fs.exists("/files/x/three") and not fs.exists("/files/three")
    assert fs.du("/files") == 1 + 2_000_000 + 7
    fs.rm("/files", recursive=True)
    assert not fs.exists("/files")


def snakebite():
    from snakebite.client import Client
    from snakebite.errors import DirectoryException, FileNotFoundException

    by_cairn("put", "-f", local("up", content), "/small")
    by_cairn("put", "-f", local("text", b"some words\n"), "/text")
    host, port = address.split(":")
    client = Client(host, int(port), use_trash=False)

    def done(results):
        results = list(results)
        assert results and all(one["result"] for one in results), results

    def paths(entries):
        return sorted(entry["path"] for entry in entries)

    done(client.mkdir(["/snake/a/b"], create_parent=True, mode=0o750))
    done(client.touchz(["/snake/t", "/snake/a/u"], replication=2))
    done(client.rename(["/snake/t"], "/snake/v"))
    client.rename2("/snake/v", "/snake/a/u", overwriteDest=True)
    assert paths(client.ls(["/snake"])) == ["/snake/a"]
    assert paths(client.ls(["/snake"], recurse=True, include_toplevel=True, include_children=True)) == [
        "/snake", "/snake/a", "/snake/a/b", "/snake/a/u",
    ]
    raises(FileNotFoundException, lambda: list(client.ls(["/none"])))
    assert b"".join(piece for file in client.cat(["/small"]) for piece in file) == content
    assert list(client.tail("/small")) == [content[-1024:]]
    assert list(client.text(["/text"])) == [b"some words\n"]
    done(client.copyToLocal(["/small"], local("copied")))
    done(client.getmerge("/text", local("merged")))
    for name, wanted in [("copied", content), ("merged", b"some words\n")]:
        with open(local(name), "rb") as file:
            assert file.read() == wanted
    done(client.chmod(["/snake/a/u"], 0o600))
    done(client.chown(["/snake/a/u"], "ann:staff"))
    done(client.chgrp(["/snake/a/u"], "crew"))
    done(client.setrep(["/snake/a/u"], 3))
    status = client.stat(["/snake/a/u"])
    assert (status["owner"], status["group"], status["block_replication"], status["file_type"]) == ("ann", "crew", 3, "f"), status
    assert [sums["directoryCount"] for sums in client.count(["/snake"])] == [3]
    assert [(sums["length"], sums["spaceConsumed"]) for sums in client.count(["/small"])] == [(len(content), 3 * len(content))]
    assert [(one["path"], one["length"]) for one in client.du(["/small"], include_toplevel=True, include_children=False)] == [("/small", len(content))]
    assert client.test("/snake/a/u", exists=True, zero_length=True) and client.test("/snake", directory=True)
    assert not client.test("/small", zero_length=True)
    assert client.serverdefaults()["checksumType"] == 2
    assert client.df()["capacity"] > 0
    done(client.rmdir(["/snake/a/b"]))
    raises(DirectoryException, lambda: list(client.delete(["/snake"])))
    done(client.delete(["/snake"], recurse=True))
    # By default it asks the server whether there is a trash, and moves things there.
    list(Client(host, int(port)).delete(["/text"]))
    assert client.test("/text", exists=True) is False

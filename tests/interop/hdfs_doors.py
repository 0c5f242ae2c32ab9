"""Equal bytes stored by every client that can write: each client reads all of them, and Hadoop's checksums are equal."""

import subprocess
import urllib.parse

from hdfs_common import address, by_cairn, cairn, local, url, user, web
from hdfs_shell import Shell

# Lines, since Spark writes lines; three blocks of 1 MiB and a part of one, and no multiple of 512.
content = b"".join(b"%d:%s\n" % (at, b"%x" % (at * 2654435761 % 2**61)) for at in range(150_003))


def curl(method, path, query, *more):
    there = f"http://{web}/webhdfs/v1{urllib.parse.quote(path)}?user.name={user}&{query}"
    command = ["curl", "-sS", "-f", "-L", "--max-time", "60", "-X", method, *more, there]
    return subprocess.run(command, check=True, capture_output=True).stdout


def webhdfs():
    import fsspec

    host, port = web.split(":")
    return fsspec.filesystem("webhdfs", host=host, port=int(port), user=user, skip_instance_cache=True)


def hdfscli():
    from hdfs import InsecureClient

    return InsecureClient(f"http://{web}", user=user)


def write_spark(spark, path):
    lines = content.decode().splitlines()
    spark.createDataFrame([(line,) for line in lines], "value string").coalesce(1).write.mode("overwrite").text(url + path + ".d")
    Shell(spark)(f"-mv {path}.d/part-* {path}")


def write_native(_, path):
    from hdfs_native import Client

    with Client(url).create(path) as out:
        out.write(content)


def write_fsspec(_, path):
    webhdfs().pipe_file(path, content)


WRITERS = {
    "spark": write_spark,
    "shell": lambda spark, path: Shell(spark)(f"-put {local('doors')} {path}"),
    "native": write_native,
    "fsspec": write_fsspec,
    "hdfscli": lambda _, path: hdfscli().write(path, content),
    "curl": lambda _, path: curl("PUT", path, "op=CREATE", "-T", local("doors")),
    "cairn": lambda _, path: by_cairn("put", local("doors"), path),
}


def read_native(_, path):
    from hdfs_native import Client

    with Client(url).read(path) as reader:
        return reader.read()


def read_snakebite(_, path):
    from snakebite.client import Client

    host, port = address.split(":")
    return b"".join(piece for file in Client(host, int(port)).cat([path]) for piece in file)


def read_hdfscli(_, path):
    with hdfscli().read(path) as reader:
        return reader.read()


READERS = {
    "spark": lambda spark, path: bytes(spark.read.format("binaryFile").load(url + path).first().content),
    "shell": lambda spark, path: Shell(spark).run("-cat", path)[1],
    "native": read_native,
    "snakebite": read_snakebite,
    "fsspec": lambda _, path: webhdfs().cat_file(path),
    "hdfscli": read_hdfscli,
    "curl": lambda _, path: curl("GET", path, "op=OPEN"),
    "cairn": lambda _, path: by_cairn("cat", path),
    "cairn over sockets": lambda _, path: by_cairn("cat", "--no-short-circuit", path),
}


def every_client_reads_what_each_wrote(spark):
    local("doors", content)
    by_cairn("mkdir", "-p", "/doors")
    for writer, write in WRITERS.items():
        write(spark, f"/doors/{writer}")
        for reader, read in READERS.items():
            got = read(spark, f"/doors/{writer}")
            assert got == content, f"{reader} reads {len(got)} bytes, not the {len(content)} that {writer} wrote"


def checksums_are_equal_through_every_door(spark):
    """In both modes: the older one depends on the lengths of the blocks, which are equal here."""
    for mode, words in [("MD5MD5CRC", "MD5-of-2048MD5-of-512CRC32C"), ("COMPOSITE_CRC", "COMPOSITE-CRC32C")]:
        shell = Shell(spark, **{"dfs.checksum.combine.mode": mode})
        sums = {writer: shell(f"-checksum /doors/{writer}").split("\t")[1:] for writer in WRITERS}
        assert sums["cairn"][0] == words, sums
        assert all(one == sums["cairn"] for one in sums.values()), sums
    # Ours is the composite one.
    assert sums["cairn"][1].strip() in by_cairn("checksum", "/doors/cairn").decode(), (sums, by_cairn("checksum", "/doors/cairn"))


def composite_checksums_do_not_depend_on_blocks(spark):
    by_cairn("put", "--block-size", "2m", local("doors"), "/doors/2m")
    shell = Shell(spark, **{"dfs.checksum.combine.mode": "COMPOSITE_CRC"})
    there = {path: shell(f"-checksum /doors/{path}").split("\t")[1:] for path in ("cairn", "2m")}
    assert there["cairn"] == there["2m"], there

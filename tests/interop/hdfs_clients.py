"""Unmodified HDFS clients against a cluster: each writes, all read, and what is refused is refused in HDFS's words.

Usage: hdfs_clients.py READY CAIRN FOLDER
  READY   file with the line that `cairn local --json` prints
  CAIRN   the binary
  FOLDER  for local files
"""

import json
import os
import subprocess
import sys
import traceback

ready, cairn, folder = sys.argv[1:4]
with open(ready) as file:
    cluster = json.load(file)
address = cluster["namenode"]["rpc"]
url = f"hdfs://{address}"
names = sorted(node["name"] for node in cluster["datanodes"])
content = bytes(range(256)) * 20_000


def local(name, data=None):
    path = os.path.join(folder, name)
    if data is not None:
        with open(path, "wb") as file:
            file.write(data)
    return path


def by_cairn(path):
    """What our own client reads."""
    return subprocess.run([cairn, "--namenode", address, "cat", path], check=True, capture_output=True).stdout


def native():
    from hdfs_native import Client, WriteOptions

    client = Client(url)
    client.mkdirs("/native", 0o755, True)
    with client.create("/native/f", WriteOptions(overwrite=True)) as writer:
        writer.write(content)
    with client.append("/native/f") as writer:
        writer.write(b"tail")
    with client.read("/native/f") as reader:
        assert reader.read() == content + b"tail"
        assert reader.read_range(len(content) - 2, 4) == b"\xfe\xff" + b"ta"
    assert by_cairn("/native/f") == content + b"tail"
    client.rename("/native/f", "/native/g")
    client.set_permission("/native/g", 0o600)
    client.set_owner("/native/g", "ann", "staff")
    client.set_times("/native/g", 1_000, 2_000)
    client.set_replication("/native/g", 2)
    status = client.get_file_info("/native/g")
    assert (status.permission, status.owner, status.group, status.modification_time) == (0o600, "ann", "staff", 1_000)
    assert [entry.path for entry in client.list_status("/native", True)] == ["/native/g"]
    assert client.get_content_summary("/native").space_consumed == 2 * (len(content) + 4)
    try:
        client.get_file_info("/none")
        raise AssertionError("a missing file has a status")
    except FileNotFoundError:
        pass
    assert client.delete("/native/g", False) and not client.delete("/native/g", False)


def snakebite():
    from snakebite.client import Client

    subprocess.run([cairn, "--namenode", address, "put", local("up", content), "/small"], check=True)
    host, port = address.split(":")
    client = Client(host, int(port), use_trash=False)
    assert all(made["result"] for made in client.mkdir(["/snake/a"], create_parent=True))
    assert all(made["result"] for made in client.touchz(["/snake/t"]))
    assert all(moved["result"] for moved in client.rename(["/snake/t"], "/snake/u"))
    assert [entry["path"] for entry in client.ls(["/snake"])] == ["/snake/a", "/snake/u"]
    assert b"".join(piece for file in client.cat(["/small"]) for piece in file) == content
    assert [sums["directoryCount"] for sums in client.count(["/snake"])] == [2]
    assert client.serverdefaults()["checksumType"] == 2
    assert client.df()["capacity"] > 0
    assert all(gone["result"] for gone in client.delete(["/snake"], recurse=True))


def spark_session():
    from pyspark.sql import SparkSession

    builder = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false")
    builder = builder.config("spark.hadoop.fs.defaultFS", url).config("spark.sql.shuffle.partitions", "2")
    builder = builder.config("spark.driver.bindAddress", "127.0.0.1").config("spark.driver.host", "127.0.0.1")
    builder = builder.config("spark.ui.showConsoleProgress", "false").config("spark.sql.warehouse.dir", local("house"))
    return builder.getOrCreate()


def shell(spark):
    """The Hadoop shell, command by command, in Spark's own JVM."""
    jvm, gateway = spark._jvm, spark.sparkContext._gateway
    conf = spark.sparkContext._jsc.hadoopConfiguration()

    def run(*words):
        args = gateway.new_array(jvm.java.lang.String, len(words))
        for at, word in enumerate(words):
            args[at] = word
        return jvm.org.apache.hadoop.util.ToolRunner.run(conf, jvm.org.apache.hadoop.fs.FsShell(), args)

    up, down, merged = local("hello", b"hello\nworld\n"), local("down"), local("merged")
    big = local("big", content)
    good = f"""-mkdir -p /d /user/me
        -put {up} /d/hello
        -put {big} /d/big
        -get /d/big {down}
        -cat /d/hello
        -appendToFile {up} /d/hello
        -checksum /d/hello
        -cp /d/hello /d/copy
        -mv /d/copy /d/moved
        -cp /d/hello /d/cut
        -truncate -w 8 /d/cut
        -touchz /d/one
        -concat /d/moved /d/hello /d/big
        -setrep 2 /d/moved
        -chmod 600 /d/moved
        -chown ann:staff /d/moved
        -stat %n,%b,%r,%u /d/moved
        -getmerge /d {merged}
        -tail /d/cut
        -head /d/cut
        -touch /d/t
        -test -e /d/t
        -find /d -name m*
        -du -s /d
        -df /
        -count /d
        -ls -R /d
        -getfacl /d
        -getfattr -d /d
        -rm /d/t
        -expunge""".splitlines()
    for line in good:
        assert run(*line.split()) == 0, line
    for line in ["-cat /none", "-put " + up + " /no/dir/x", "-rm /d", "-setfacl -m user:ann:rwx /d", "-createSnapshot /d"]:
        assert run(*line.split()) != 0, line
    with open(down, "rb") as file:
        assert file.read() == content
    assert by_cairn("/d/moved") == b"hello\nworld\n" * 4 + content
    assert by_cairn("/d/cut") == b"hello\nwo"
    path = jvm.org.apache.hadoop.fs.Path("/d/moved")
    files = path.getFileSystem(conf)
    status = files.getFileStatus(path)
    assert (status.getReplication(), status.getOwner()) == (2, "ann")
    # Schedulers match the names of hosts.
    hosts = {host for place in files.getFileBlockLocations(status, 0, status.getLen()) for host in place.getHosts()}
    assert hosts and hosts <= set(names), (hosts, names)


def checksums(spark):
    """A file that came in by either door has the same checksum."""
    jvm, conf = spark._jvm, spark.sparkContext._jsc.hadoopConfiguration()
    subprocess.run([cairn, "--namenode", address, "put", local("up", content), "/by-cairn"], check=True)
    native_path, ours = jvm.org.apache.hadoop.fs.Path("/by-hadoop"), jvm.org.apache.hadoop.fs.Path("/by-cairn")
    files = native_path.getFileSystem(conf)
    files.copyFromLocalFile(False, True, jvm.org.apache.hadoop.fs.Path("file://" + local("up")), native_path)
    sums = [files.getFileChecksum(path).toString() for path in (native_path, ours)]
    assert sums[0] == sums[1], sums


def jobs(spark):
    base = url + "/spark"
    rows = spark.range(0, 20_000).selectExpr("id", "id % 3 as k", "cast(id as string) as t")
    wanted = 20_000 * 19_999 // 2

    def total(read):
        return read.selectExpr("sum(cast(id as bigint))").first()[0]

    rows.write.mode("overwrite").partitionBy("k").parquet(base + "/parquet")
    rows.write.mode("append").partitionBy("k").parquet(base + "/parquet")
    assert total(spark.read.parquet(base + "/parquet")) == 2 * wanted
    rows.write.mode("overwrite").parquet(base + "/parquet")
    assert total(spark.read.parquet(base + "/parquet")) == wanted
    rows.write.mode("overwrite").orc(base + "/orc")
    assert total(spark.read.orc(base + "/orc")) == wanted
    rows.write.mode("overwrite").json(base + "/json")
    assert total(spark.read.json(base + "/json")) == wanted
    rows.write.mode("overwrite").option("header", True).csv(base + "/csv")
    assert total(spark.read.option("header", True).csv(base + "/csv")) == wanted
    rows.select("t").write.mode("overwrite").text(base + "/text")
    assert spark.read.text(base + "/text").count() == 20_000


passed = failed = 0
session = None
for check in (native, snakebite, shell, checksums, jobs):
    try:
        if check in (shell, checksums, jobs) and session is None:
            session = spark_session()
            session.sparkContext.setLogLevel("ERROR")
        check(*([session] if check in (shell, checksums, jobs) else []))
        passed += 1
        print(f"{check.__name__}: ok", flush=True)
    except Exception:
        failed += 1
        traceback.print_exc()
        print(f"{check.__name__}: FAILED", flush=True)
print(f"{passed} passed, {failed} failed")
if session is not None:
    session.stop()
sys.exit(1 if failed else 0)

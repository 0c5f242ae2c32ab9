"""Spark goes on, or starts over well, while members of the cluster are killed (kill -9).

Usage: hdfs_faults.py READY CAIRN FOLDER [retry|default]: with or without dfs.client.retry.policy.enabled, which a process decides once.
"""

import contextlib
import hashlib
import os
import sys
import threading
import time
import zlib

from checks import run
from hdfs_common import by_cairn, cluster, health, in_cairn, kill, local, names, restart, spark_session, url, wait_for

retry = sys.argv[4] == "retry"
PARTS, LINES, WIDTH = 4, 250, 32 * 1024


def line(part, at):
    return f"{part}:{at}:" + hashlib.shake_128(b"%d %d" % (part, at)).hexdigest(WIDTH // 2)


def lines(part, slowed):
    for at in range(LINES):
        if slowed:
            # A block is full by the time that it slows down.
            time.sleep(0.1 if at > 2 * LINES // 3 and os.path.exists(slowed) else 0.015)
        yield (line(part, at),)


def digest(texts):
    """Equal for equal lines in any order."""
    return sum(zlib.crc32(text.encode()) for text in texts)


WANTED = (PARTS * LINES, digest(line(part, at) for part in range(PARTS) for at in range(LINES)))


def stored(path):
    """What is really there, past Spark: number of lines and digest, of finished files."""
    texts = b"".join(by_cairn("cat", name) for name in sorted(in_cairn(path)) if "/part-" in name).decode().splitlines()
    return len(texts), digest(texts)


spark = spark_session(
    **{
        "spark.hadoop.dfs.blocksize": str(4 << 20),
        "spark.hadoop.dfs.client.retry.policy.enabled": str(retry).lower(),
    }
)


@contextlib.contextmanager
def slowly():
    """A file during whose life jobs that are told of it take so long that what happens meanwhile finds them under way."""
    path = local("slowed", b"")
    try:
        yield path
    finally:
        os.remove(path)


def write(path, slowed=""):
    rows = spark.sparkContext.parallelize(range(PARTS), PARTS).flatMap(lambda part: lines(part, slowed))
    spark.createDataFrame(rows, "value string").write.mode("overwrite").text(url + path)


def read(path, slowed=""):
    def sums(rows):
        for row in rows:
            if os.path.exists(slowed):
                time.sleep(0.05)
            yield 1, zlib.crc32(row.value.encode())

    found = spark.read.text(url + path).rdd.mapPartitions(sums).collect()
    return len(found), sum(crc for _, crc in found)


class Job(threading.Thread):
    """A Spark job beside the main thread, which does the killing."""

    def __init__(self, work):
        super().__init__()
        self.work, self.result, self.error = work, None, None
        self.start()

    def run(self):
        try:
            self.result = self.work()
        except Exception as error:
            self.error = error

    def end(self):
        self.join(300)
        assert not self.is_alive(), "the job hangs"
        if self.error:
            raise self.error
        return self.result


def under_way(path):
    """True when a task of a writing job has finished blocks."""
    return any(length > 0 for name, length in in_cairn(path).items() if "/_temporary/" in name)


def readers(node):
    """Connections to a datanode's data port."""
    host, port = next(one["addr"] for one in cluster["datanodes"] if one["name"] == node).split(":")
    there = "".join(f"{int(byte):02X}" for byte in reversed(host.split("."))) + f":{int(port):04X}"
    with open("/proc/net/tcp") as table:
        return sum(1 for row in table if row.split()[1] == there and row.split()[3] == "01")


def nobody_reads():
    """Spark keeps connections for a while after it has read."""
    return wait_for("nobody reads", lambda: not any(readers(name) for name in names))


def all_back():
    return wait_for("all replicas are back", lambda: health()["status"] == "healthy" and not health()["under_replicated"], 120)


def a_datanode_dies_while_spark_writes():
    with slowly() as slowed:
        job = Job(lambda: write("/fault/write", slowed))
        wait_for("the job writes", lambda: under_way("/fault/write"))
        kill("dn2")
        assert job.is_alive()
    job.end()
    assert stored("/fault/write") == WANTED
    assert read("/fault/write") == WANTED
    restart("dn2")
    all_back()


def a_datanode_dies_while_spark_reads():
    nobody_reads()
    with slowly() as slowed:
        job = Job(lambda: read("/fault/write", slowed))
        # Each of three nodes has everything; one that is read from right now is killed.
        node = wait_for("the job reads", lambda: next((name for name in names if readers(name)), None))
        kill(node)
        assert job.is_alive()
    assert job.end() == WANTED
    restart(node)
    all_back()


def the_namenode_is_started_again_while_spark_writes():
    with slowly() as slowed:
        job = Job(lambda: write("/fault/namenode", slowed))
        wait_for("the job writes", lambda: under_way("/fault/namenode"))
        kill("namenode")
        assert job.is_alive()
    # Long enough that calls of the job fail meanwhile.
    time.sleep(3)
    assert job.is_alive()
    restart("namenode")
    job.end()
    assert stored("/fault/namenode") == WANTED
    assert not [name for name in in_cairn("/fault/namenode") if "_temporary" in name]
    assert "/fault/namenode/_SUCCESS" in in_cairn("/fault/namenode")


def the_namenode_is_started_again_while_spark_reads():
    nobody_reads()
    with slowly() as slowed:
        job = Job(lambda: read("/fault/namenode", slowed))
        wait_for("the job reads", lambda: any(readers(name) for name in names))
        kill("namenode")
        time.sleep(3)
        assert job.is_alive()
    restart("namenode")
    assert job.end() == WANTED


def without_retries_a_job_fails_whole_and_is_run_again():
    with slowly() as slowed:
        job = Job(lambda: write("/fault/default", slowed))
        wait_for("the job writes", lambda: under_way("/fault/default"))
        kill("namenode")
    job.join(120)
    assert job.error is not None, "the job does not notice that there is no namenode"
    restart("namenode")
    # What it left is not taken for a result by anybody.
    left = in_cairn("/fault/default")
    assert all("/_temporary/" in name for name in left), left
    write("/fault/default")
    assert stored("/fault/default") == WANTED
    assert read("/fault/default") == WANTED
    assert not [name for name in in_cairn("/fault/default") if "_temporary" in name]


def nothing_is_left_open_or_lost():
    def whole():
        found = health()
        return found["status"] == "healthy" and found["open_files"] == 0 and found["under_replicated"] == 0

    wait_for("no file is open, all are whole", whole, 120)


run(
    [
        a_datanode_dies_while_spark_writes,
        a_datanode_dies_while_spark_reads,
        the_namenode_is_started_again_while_spark_writes,
        the_namenode_is_started_again_while_spark_reads,
        nothing_is_left_open_or_lost,
    ]
    if retry
    else [without_retries_a_job_fails_whole_and_is_run_again, nothing_is_left_open_or_lost]
)

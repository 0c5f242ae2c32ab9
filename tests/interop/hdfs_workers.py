"""Spark on standalone workers that are named as the datanodes: where its tasks run, and speculative commits.

Usage: hdfs_workers.py READY CAIRN FOLDER [--long]
"""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pyspark

from checks import run
from hdfs_common import by_cairn, cluster, health, in_cairn, local, names, spark_session, url, wait_for

SPARK_CLASS = os.path.join(os.path.dirname(pyspark.__file__), "bin", "spark-class")
HOSTS = {node["name"]: node["addr"].rsplit(":", 1)[0] for node in cluster["datanodes"]}


class Workers:
    """A master, and a worker on each datanode's address and under its name. The names are known to these JVMs only."""

    def __init__(self):
        table = "".join(f"{ip} {name}\n" for name, ip in HOSTS.items()) + f"127.0.0.1 localhost {socket.gethostname()}\n"
        table = local("hosts", table.encode())
        self.resolve = f"-Djdk.net.hosts.file={table}"
        self.started = []
        try:
            self.start_all()
        except BaseException:
            self.stop()
            raise

    def start_all(self):
        log = self.start("master", "org.apache.spark.deploy.master.Master", "--host", "127.0.0.1", "--port", "0", "--webui-port", "0")
        self.url = "spark://" + wait_for("Spark's master serves", lambda: said(log, "Starting Spark master at spark://"))
        logs = [
            self.start(name, "org.apache.spark.deploy.worker.Worker", "--host", name, "--cores", "1", "--memory", "700m",
                       "--webui-port", "0", "--work-dir", local(f"work-{name}"), self.url)
            for name in names
        ]
        for log in logs:
            wait_for("Spark's worker is registered", lambda log=log: said(log, "Successfully registered with master "))

    def start(self, name, *words):
        env = dict(os.environ, SPARK_DAEMON_MEMORY="256m", SPARK_DAEMON_JAVA_OPTS=self.resolve, SPARK_LOCAL_IP=HOSTS.get(name, "127.0.0.1"))
        path = local(f"{name}.log")
        with open(path, "w") as log:
            self.started.append(subprocess.Popen([SPARK_CLASS, *words], env=env, stdout=log, stderr=log))
        return path

    def stop(self):
        # The workers first: each takes its executor along.
        for process in reversed(self.started):
            process.terminate()
        for process in self.started:
            process.wait(120)


def said(log, words):
    """The word after `words` in a log."""
    with open(log) as lines:
        # Not of a line of which only the beginning is there yet.
        return next((line.split(words, 1)[1].split()[0] for line in lines if words in line and line.endswith("\n")), None)


def logged():
    """What Spark's event log says, which Spark keeps in the cluster: all jobs' ended scans or writes, by description of the job."""
    names = sorted(name for name in in_cairn("/events") if "/events_" in name)
    log = [json.loads(line) for name in names for line in by_cairn("cat", name).splitlines()]
    ends = [one for one in log if one["Event"] == "SparkListenerTaskEnd"]
    found = {}
    for start in log:
        if start["Event"] == "SparkListenerJobStart" and "spark.job.description" in start["Properties"]:
            stage = min(start["Stage IDs"])
            found.setdefault(start["Properties"]["spark.job.description"], []).extend(end for end in ends if end["Stage ID"] == stage)
    return found


def session():
    return spark_session(
        workers.url,
        workers.resolve,
        **{
            "spark.executor.extraJavaOptions": workers.resolve,
            "spark.executor.memory": "512m",
            "spark.eventLog.enabled": "true",
            "spark.eventLog.compress": "false",
            "spark.eventLog.dir": url + "/events",
            "spark.eventLog.buffer.kb": "1k",
            "spark.hadoop.dfs.replication": "1",
            "spark.hadoop.dfs.blocksize": str(1 << 20),
            "spark.sql.files.maxPartitionBytes": str(1 << 20),
            "spark.sql.files.openCostInBytes": "0",
            # Longer than a busy machine holds a task up: by default Spark is content with any node after 3 s.
            "spark.locality.wait": "120s",
            "spark.speculation": "true",
            "spark.speculation.quantile": "0.5",
            "spark.speculation.minTaskRuntime": "1s",
            "spark.python.worker.reuse": "false",
        },
    )


def scan(replicas):
    context.setJobDescription(f"scan, {replicas}")
    total = spark.read.schema("id long, t string").csv(url + "/local").selectExpr("sum(id)", "count(t)").first()
    assert total == (79_999_800_000, 400_000), total


def scans():
    wait_for("an executor on each node", lambda: context._jsc.sc().getExecutorMemoryStatus().size() == 1 + len(names))
    rows = spark.range(0, 400_000).selectExpr("id", "sha2(cast(id as string), 256) as t")
    context.setJobDescription("data")
    rows.repartition(3).write.mode("overwrite").csv(url + "/local")
    # With one replica there is one node to run on.
    scan(1)
    by_cairn("setrep", "2", *in_cairn("/local"))
    wait_for("there are two replicas", lambda: not health()["under_replicated"])
    scan(2)


def slow_once(part, seen):
    """Lines of a partition. The first attempt at the first partition has written half of them when it stands still; the next one goes on from there
    when the local file `seen` is made."""
    from pyspark import TaskContext

    for at in range(1000):
        if part == 0 and at == 500:
            end = time.monotonic() + 240
            while time.monotonic() < end and (TaskContext.get().attemptNumber() == 0 or not os.path.exists(seen)):
                time.sleep(0.05)
        yield (f"{part}:{at}:".ljust(4096, "x"),)


def of_two_attempts_one_is_committed(version):
    path, both_seen = f"/speculative/{version}", local(f"seen-{version}")

    def write():
        # Of this thread only.
        context.setJobDescription(f"speculation, {version}")
        rows = context.parallelize(range(3), 3).flatMap(lambda part: slow_once(part, both_seen))
        written = spark.createDataFrame(rows, "value string").write.mode("overwrite")
        written.option("mapreduce.fileoutputcommitter.algorithm.version", version).text(url + path)

    seen = set()
    job = threading.Thread(target=write)
    job.start()
    while job.is_alive():
        # Attempts at partition 0 with a file of theirs: .../_temporary/attempt_<time>_<stage>_m_000000_<task>/part-00000-...
        seen |= {name.split("/")[-2] for name in in_cairn(path) if "/_temporary/attempt_" in name and "/part-00000-" in name}
        if len(seen) > 1:
            local(f"seen-{version}", b"")
        job.join(0.05)
    assert len(seen) == 2, f"attempts that had a file in the cluster: {seen}"
    parts = [name for name in in_cairn(path) if "/part-" in name]
    assert len(parts) == 3 and not [name for name in in_cairn(path) if "_temporary" in name], parts
    got = sorted(line for name in parts for line in by_cairn("cat", name).decode().splitlines())
    assert got == sorted(f"{part}:{at}:".ljust(4096, "x") for part in range(3) for at in range(1000))


def speculative_commit_v1():
    of_two_attempts_one_is_committed(1)


def speculative_commit_v2():
    of_two_attempts_one_is_committed(2)


def the_event_log_agrees():
    """At least 90% of the scans' tasks ran on a node with a replica; of the slow tasks only the second attempts were taken."""
    spark.stop()
    log = logged()
    for replicas in (1, 2):
        where = [end["Task Info"]["Locality"] for end in log[f"scan, {replicas}"]]
        print(f"        scans, {replicas} replica(s): " + ", ".join(f"{kind} {where.count(kind)}" for kind in sorted(set(where))))
        assert len(where) >= 20 and where.count("NODE_LOCAL") >= 0.9 * len(where), where
    for version in (1, 2):
        ends = [end for end in log[f"speculation, {version}"] if end["Task Info"]["Index"] == 0]
        # The end of the first attempt may come too late for the log.
        taken = [end["Task Info"]["Speculative"] for end in ends if end["Task End Reason"]["Reason"] == "Success"]
        assert taken == [True], ends


by_cairn("mkdir", "-p", "/events")
workers = Workers()
try:
    spark = session()
    context = spark.sparkContext
    run([scans, speculative_commit_v1, speculative_commit_v2, the_event_log_agrees])
finally:
    workers.stop()

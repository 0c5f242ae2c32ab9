"""What the scripts for HDFS's clients share: the cluster (with our own client) and Spark.

Every script is called as `SCRIPT READY CAIRN FOLDER`:
  READY   file with the line that `cairn local --json` prints
  CAIRN   the binary
  FOLDER  for local files
"""

import getpass
import json
import os
import signal
import subprocess
import sys
import time

ready, cairn, folder = sys.argv[1:4]
with open(ready) as lines:
    cluster = json.load(lines)
os.environ["SPARK_LOCAL_IP"] = "127.0.0.1"
user = getpass.getuser()
home = os.path.dirname(cluster["namenode"]["dir"])
address = cluster["namenode"]["rpc"]
web = cluster["namenode"]["http"]
url = f"hdfs://{address}"
names = sorted(node["name"] for node in cluster["datanodes"])


def local(name, data=None):
    """A path in the folder for local files; `data` is written there first."""
    path = os.path.join(folder, name)
    if data is not None:
        with open(path, "wb") as file:
            file.write(data)
    return path


def by_cairn(*words, check=True):
    """What our own client prints."""
    return subprocess.run([cairn, "--namenode", address, *words], check=check, capture_output=True).stdout


def in_cairn(path):
    """Files below a path as {path: length}; none where the path is missing."""
    listed = by_cairn("ls", "-R", "--json", path, check=False)
    return {entry["path"]: entry["length"] for entry in json.loads(listed or b"[]") if entry["type"] == "file"}


def health():
    return json.loads(by_cairn("fsck", "--json", check=False))


def wait_for(what, condition, seconds=180):
    """Waits until `condition()` is true and returns what it returned."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"waited {seconds} s in vain: {what}")


def process_of(name):
    """The process that a member of the cluster is now (the state names another one after a restart)."""
    with open(os.path.join(home, "cluster.json")) as file:
        return next(one["process"]["pid"] for one in json.load(file)["members"] if one["name"] == name)


def running(pid):
    """Also true while its first thread is gone, but others still hold its files and ports."""

    def state(thread):
        try:
            with open(f"/proc/{pid}/task/{thread}/stat") as file:
                return file.read().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return "X"

    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return any(state(thread) not in "ZX" for thread in threads)


def kill(name):
    """kill -9 of a member of the cluster."""
    pid = process_of(name)
    os.kill(pid, signal.SIGKILL)
    wait_for(f"{name} is gone", lambda: not running(pid))


def restart(name):
    """Has `cairn local` start a killed member again, and waits until the cluster takes changes."""
    before = process_of(name)
    os.makedirs(os.path.join(home, "restart"), exist_ok=True)
    with open(os.path.join(home, "restart", name), "w"):
        pass
    wait_for(f"{name} is started", lambda: process_of(name) not in (0, before))
    wait_for(f"{name} serves", lambda: by_cairn("admin", "report", check=False))
    by_cairn("admin", "safemode", "wait")


def spark_session(master="local[2]", java="", **more):
    """Spark against the cluster, with options for its JVM and further settings."""
    from pyspark.sql import SparkSession

    settings = {
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.hadoop.fs.defaultFS": url,
        "spark.sql.shuffle.partitions": "2",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.driver.host": "127.0.0.1",
        "spark.sql.warehouse.dir": local("house"),
        "spark.local.dir": local("spark.local"),
        "spark.driver.extraJavaOptions": f"-Djava.io.tmpdir={folder} {java}",
    }
    builder = SparkSession.builder.master(master)
    for key, value in (settings | more).items():
        builder = builder.config(key, value)
    session = builder.getOrCreate()
    session.sparkContext.setLogLevel(os.environ.get("INTEROP_LOG", "OFF"))
    return session

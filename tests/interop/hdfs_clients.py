"""Unmodified HDFS clients against a cluster: each writes, all read, and what is refused is refused in HDFS's words.

Usage: hdfs_clients.py READY CAIRN FOLDER [--long]     on a cluster with blocks of 1 MiB
"""

import functools
import sys

import hdfs_doors
import hdfs_formats
import hdfs_libraries
import hdfs_shell
from checks import run
from hdfs_common import spark_session

spark = spark_session(**{"spark.hadoop.dfs.blocksize": str(1 << 20)})
with_spark = [
    hdfs_shell.shell_files,
    hdfs_shell.shell_attributes,
    hdfs_shell.shell_trash,
    hdfs_doors.every_client_reads_what_each_wrote,
    hdfs_doors.checksums_are_equal_through_every_door,
    hdfs_doors.composite_checksums_do_not_depend_on_blocks,
    hdfs_formats.formats_and_modes_equal_those_on_local_files,
]
if "--long" in sys.argv:
    with_spark.append(hdfs_formats.a_data_set_of_1_gib)
run(
    [hdfs_libraries.hdfs_native, hdfs_libraries.hdfs_native_by_fsspec, hdfs_libraries.snakebite]
    + [functools.wraps(check)(functools.partial(check, spark)) for check in with_spark]
)

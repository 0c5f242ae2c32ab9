"""Spark's formats and save modes, each with the same result as on local files."""

import json

from hdfs_common import by_cairn, local, url

ROWS = 20_000


def jobs(spark, base):
    """Writes and reads in every way below `base`; what was read, by job."""
    rows = spark.range(0, ROWS).selectExpr("id", "id % 2 as k", "cast(id % 3 as string) as day", "cast(id as string) as t")
    found = {}

    def note(job, read, *columns):
        columns = columns or ("id", "k", "day", "t")
        found[job] = sorted(tuple(str(value) for value in row) for row in read.select(*columns).collect())

    def there(name):
        return f"{base}/{name}"

    rows.write.mode("overwrite").partitionBy("k", "day").parquet(there("parquet"))
    note("partitioned", spark.read.parquet(there("parquet")))
    note("pruned", spark.read.parquet(there("parquet")).where("k = 1 and day = '2'"))
    rows.where("id < 100").write.mode("append").partitionBy("k", "day").parquet(there("parquet"))
    note("appended", spark.read.parquet(there("parquet")))
    spark.conf.set("spark.sql.sources.partitionOverwriteMode", "dynamic")
    rows.where("k = 1 and id < 50").write.mode("overwrite").partitionBy("k", "day").parquet(there("parquet"))
    spark.conf.set("spark.sql.sources.partitionOverwriteMode", "static")
    note("partitions overwritten", spark.read.parquet(there("parquet")))
    rows.where("id < 10").write.mode("overwrite").parquet(there("parquet"))
    note("overwritten", spark.read.parquet(there("parquet")))
    for kind in ("orc", "json", "csv"):
        for job, mode, some in [("written", "overwrite", rows), ("appended", "append", rows.where("id < 9")), ("again", "overwrite", rows.where("id < 5"))]:
            some.write.mode(mode).option("header", True).format(kind).save(there(kind))
            note(f"{kind} {job}", spark.read.option("header", True).format(kind).load(there(kind)))
    rows.select("t").write.mode("overwrite").option("compression", "gzip").text(there("text"))
    note("text", spark.read.text(there("text")), "value")
    words = spark.sparkContext.textFile(there("text"), 4).map(lambda word: (word[-1], 1)).reduceByKey(lambda a, b: a + b, 2)
    words.map(lambda pair: f"{pair[0]} {pair[1]}").saveAsTextFile(there("words"))
    found["rdd"] = sorted(spark.sparkContext.textFile(there("words")).collect())
    return found


def formats_and_modes_equal_those_on_local_files(spark):
    ours, local_ones = jobs(spark, url + "/spark"), jobs(spark, "file://" + local("spark"))
    assert ours.keys() == local_ones.keys()
    for job, rows in ours.items():
        assert rows and rows == local_ones[job], f"{job}: {len(rows)} rows, {len(local_ones[job])} on local files"
    left = [one["path"] for one in json.loads(by_cairn("ls", "-R", "--json", "/spark")) if "_temporary" in one["path"] or ".spark-staging" in one["path"]]
    assert not left, left


def a_data_set_of_1_gib(spark):
    def job(base):
        rows = spark.range(0, 8_000_000, 1, 8).selectExpr("id", "sha2(cast(id as string), 512) as t")
        rows.write.mode("overwrite").csv(f"{base}/large")
        back = spark.read.schema("id long, t string").csv(f"{base}/large")
        sums = back.selectExpr("substr(t, 1, 2) as k", "id", "crc32(t) as c").groupBy("k").agg({"id": "sum", "c": "sum", "*": "count"})
        sums.write.mode("overwrite").parquet(f"{base}/sums")
        return sorted(tuple(row) for row in spark.read.parquet(f"{base}/sums").collect())

    ours = job(url + "/large")
    assert sum(one["length"] for one in json.loads(by_cairn("ls", "-R", "--json", "/large/large"))) >= 1 << 30
    assert len(ours) == 256 and ours == job("file://" + local("large"))

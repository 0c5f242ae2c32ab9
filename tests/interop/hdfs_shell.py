"""The Hadoop shell, command by command, in Spark's own JVM; and the checksums that it prints."""

import gzip

from hdfs_common import by_cairn, local, names

content = bytes(range(256)) * 20_000


class Shell:
    """`hadoop fs` with Spark's configuration, and `more` settings."""

    def __init__(self, spark, **more):
        self.jvm, self.gateway = spark._jvm, spark.sparkContext._gateway
        self.conf = self.jvm.org.apache.hadoop.conf.Configuration(spark.sparkContext._jsc.hadoopConfiguration())
        for key, value in more.items():
            self.conf.set(key, value)
        if more:
            # The cache of file systems does not look at settings.
            self.conf.set("fs.hdfs.impl.disable.cache", "true")

    def run(self, *words):
        """The exit code and what was printed."""
        args = self.gateway.new_array(self.jvm.java.lang.String, len(words))
        for at, word in enumerate(words):
            args[at] = word
        system, heard = self.jvm.java.lang.System, self.jvm.java.io.ByteArrayOutputStream()
        out = system.out
        system.setOut(self.jvm.java.io.PrintStream(heard, True))
        try:
            code = self.jvm.org.apache.hadoop.util.ToolRunner.run(self.conf, self.jvm.org.apache.hadoop.fs.FsShell(), args)
        finally:
            system.setOut(out)
        return code, bytes(heard.toByteArray())

    def __call__(self, line):
        """What a command that must end well prints."""
        code, heard = self.run(*line.split())
        assert code == 0, f"{line}: {code}, {heard}"
        return heard.decode()

    def refuses(self, line):
        code, heard = self.run(*line.split())
        assert code != 0, f"{line}: {heard}"


def shell_files(spark):
    fs = Shell(spark)
    up, big = local("hello", b"hello\nworld\n"), local("big", content)
    fs("-mkdir -p /d/e /user/me")
    fs(f"-put {up} /d/hello")
    fs.refuses(f"-put {up} /d/hello")
    fs(f"-put -f {up} /d/hello")
    fs(f"-put {big} /d/big")
    fs(f"-copyFromLocal {big} /d/more")
    fs.refuses(f"-put {up} /no/dir/x")
    fs(f"-get /d/big {local('down')}")
    with open(local("down"), "rb") as file:
        assert file.read() == content
    assert fs("-cat /d/hello") == "hello\nworld\n"
    fs.refuses("-cat /none")
    fs(f"-appendToFile {up} /d/hello")
    assert fs("-cat /d/hello") == "hello\nworld\n" * 2
    assert fs.run("-tail", "/d/big")[1] == content[-1024:] and fs.run("-head", "/d/big")[1] == content[:1024]
    fs(f"-put {local('z.gz', gzip.compress(b'packed'))} /d/z.gz")
    assert fs("-text /d/z.gz") == "packed" and fs("-text /d/hello") == "hello\nworld\n" * 2
    fs("-cp /d/hello /d/copy")
    fs("-mv /d/copy /d/moved")
    fs.refuses("-mv /d/none /d/x")
    fs("-cp /d/hello /d/cut")
    fs("-truncate -w 8 /d/cut")
    assert by_cairn("cat", "/d/cut") == b"hello\nwo"
    fs("-touchz /d/one")
    fs.refuses("-touchz /d/big")
    fs.refuses("-concat /d/moved /d/e/none")
    fs("-concat /d/moved /d/hello /d/more")
    assert by_cairn("cat", "/d/moved") == b"hello\nworld\n" * 4 + content
    assert sorted(fs("-ls -C /d").split()) == ["/d/big", "/d/cut", "/d/e", "/d/moved", "/d/one", "/d/z.gz"]
    fs(f"-getmerge -nl /d/cut /d/moved {local('merged')}")
    with open(local("merged"), "rb") as file:
        assert file.read() == b"hello\nwo\n" + b"hello\nworld\n" * 4 + content + b"\n"
    files = spark._jvm.org.apache.hadoop.fs.Path("/d/moved").getFileSystem(fs.conf)
    status = files.getFileStatus(spark._jvm.org.apache.hadoop.fs.Path("/d/moved"))
    # Schedulers match the names of hosts.
    hosts = {host for place in files.getFileBlockLocations(status, 0, status.getLen()) for host in place.getHosts()}
    assert hosts and hosts <= set(names), (hosts, names)


def shell_attributes(spark):
    fs = Shell(spark)
    fs("-setrep 2 /d/moved")
    fs("-chmod 640 /d/moved")
    fs("-chown ann:staff /d/moved")
    fs("-chgrp crew /d/moved")
    length = 48 + len(content)
    assert fs("-stat %F,%b,%r,%u,%g,%a,%n /d/moved") == f"regular file,{length},2,ann,crew,640,moved\n"
    fs("-touch -t 20200102:030405 /d/one")
    assert fs("-stat %y /d/one").startswith("2020-01-0")
    assert fs("-ls /d/moved").split()[:5] == ["-rw-r-----", "2", "ann", "crew", str(length)]
    assert [row.split()[-1] for row in fs("-ls -R /d").splitlines()] == ["/d/big", "/d/cut", "/d/e", "/d/moved", "/d/one", "/d/z.gz"]
    assert fs("-du -s /d/moved").split() == [str(length), str(2 * length), "/d/moved"]
    assert fs("-du /d").count("\n") == 6
    assert fs("-count /d").split() == ["2", "5", str(8 + len(content) + length + 26), "/d"], fs("-count /d")
    assert fs("-count -q /d/e").split() == ["none", "inf", "none", "inf", "1", "0", "0", "/d/e"]
    assert "Filesystem" in fs("-df /") and int(fs("-df /").splitlines()[1].split()[1]) > 0
    assert fs("-find /d -name m* -print") == "/d/moved\n"
    for test in ["-e /d/one", "-d /d/e", "-f /d/one", "-z /d/one", "-s /d/big", "-r /d/big", "-w /d/big"]:
        fs("-test " + test)
    for test in ["-e /none", "-d /d/one", "-f /d/e", "-z /d/big", "-s /d/one"]:
        fs.refuses("-test " + test)
    assert "user::rw-" in fs("-getfacl /d/moved")
    assert fs("-getfattr -d /d") == "# file: /d\n"
    fs.refuses("-setfacl -m user:ann:rwx /d")
    fs.refuses("-createSnapshot /d")


def shell_trash(spark):
    fs = Shell(spark)
    user = fs("-stat %u /d/big").strip()
    fs.refuses("-rm /d")
    fs.refuses("-rmdir /d")
    fs("-rmdir /d/e")
    # The server says that there is a trash.
    fs("-rm /d/big")
    assert by_cairn("cat", f"/user/{user}/.Trash/Current/d/big") == content
    fs(f"-mv /user/{user}/.Trash/Current/d/big /d/big")
    fs("-rm -skipTrash /d/one")
    fs.refuses(f"-test -e /user/{user}/.Trash/Current/d/one")
    fs("-rm -r /d")
    fs.refuses("-test -e /d")
    # There is a d in the trash, so this one gets another name there.
    assert "/moved\n" in fs(f"-find /user/{user}/.Trash -name moved")
    fs("-expunge -immediate")
    fs.refuses(f"-test -e /user/{user}/.Trash/Current")

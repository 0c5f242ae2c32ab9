"""fsspec's webhdfs:// against a namenode's HTTP address (HOST:PORT)."""

import sys

import fsspec

from checks import raises, run
from webhdfs_common import ROOT, USER, curl, data

ADDRESS = sys.argv[1]
HOST, PORT = ADDRESS.rsplit(":", 1)
HERE = f"{ROOT}/fsspec"
fs = fsspec.filesystem("webhdfs", host=HOST, port=int(PORT), user=USER, skip_instance_cache=True)


def starts_anew():
    if fs.exists(HERE):
        fs.rm(HERE, recursive=True)
    fs.makedirs(HERE, exist_ok=True)
    assert fs.info(HERE)["type"] == "directory"
    assert fs.ls(HERE) == []


def writes_and_reads():
    bytes_ = data(1, 12_000_000)
    # More than one block of its buffer: a CREATE without data, then several APPENDs.
    with fs.open(f"{HERE}/large", "wb") as out:
        out.write(bytes_)
    assert fs.cat_file(f"{HERE}/large") == bytes_
    assert fs.size(f"{HERE}/large") == len(bytes_)
    assert curl(ADDRESS, "GET", f"{HERE}/large", "op=OPEN") == bytes_
    with fs.open(f"{HERE}/large", "rb") as file:
        file.seek(7_000_000)
        assert file.read(100) == bytes_[7_000_000:7_000_100]
        file.seek(-5, 2)
        assert file.read() == bytes_[-5:]
    assert fs.cat_file(f"{HERE}/large", start=1_048_570, end=1_048_590) == bytes_[1_048_570:1_048_590]


def small_and_empty_files():
    fs.pipe_file(f"{HERE}/small", b"abc")
    assert fs.cat_file(f"{HERE}/small") == b"abc"
    fs.pipe_file(f"{HERE}/small", b"overwritten")
    assert fs.cat_file(f"{HERE}/small") == b"overwritten"
    fs.touch(f"{HERE}/empty")
    assert fs.size(f"{HERE}/empty") == 0 and fs.cat_file(f"{HERE}/empty") == b""


def lists_and_describes():
    names = sorted(entry["name"].rsplit("/", 1)[1] for entry in fs.ls(HERE, detail=True))
    assert names == ["empty", "large", "small"], names
    info = fs.info(f"{HERE}/large")
    assert (info["type"], info["owner"], info["size"]) == ("file", USER, 12_000_000), info
    assert fs.du(HERE) == 12_000_000 + len(b"overwritten")
    assert fs.content_summary(HERE)["fileCount"] == 3
    assert fs.glob(f"{HERE}/*a*") == [f"{HERE}/large", f"{HERE}/small"] or len(fs.glob(f"{HERE}/*a*")) == 2
    assert fs.home_directory() == f"/user/{USER}"
    assert len(list(fs.find(HERE))) == 3


def names_with_blanks_and_percents():
    for name in ["a b", "100%", "%41", "ü", "a+b", "q?x#y&z=1"]:
        path = f"{HERE}/odd/{name}"
        fs.makedirs(f"{HERE}/odd", exist_ok=True)
        fs.pipe_file(path, name.encode())
        assert fs.cat_file(path) == name.encode(), name
    listed = sorted(entry["name"].rsplit("/", 1)[1] for entry in fs.ls(f"{HERE}/odd", detail=True))
    assert listed == sorted(["a b", "100%", "%41", "ü", "a+b", "q?x#y&z=1"]), listed
    assert curl(ADDRESS, "GET", f"{HERE}/odd/100%", "op=OPEN") == b"100%"


def moves_copies_and_deletes():
    fs.mv(f"{HERE}/small", f"{HERE}/moved")
    assert fs.exists(f"{HERE}/moved") and not fs.exists(f"{HERE}/small")
    fs.cp_file(f"{HERE}/moved", f"{HERE}/copied")
    assert fs.cat_file(f"{HERE}/copied") == b"overwritten"
    fs.rm(f"{HERE}/copied")
    assert not fs.exists(f"{HERE}/copied")
    raises(Exception, fs.rm, f"{HERE}/odd", recursive=False)
    fs.rm(f"{HERE}/odd", recursive=True)
    assert not fs.exists(f"{HERE}/odd")


def attributes():
    fs.chmod(f"{HERE}/moved", 600)
    assert fs.info(f"{HERE}/moved")["permission"] == "600"
    fs.chown(f"{HERE}/moved", "ann", "staff")
    info = fs.info(f"{HERE}/moved")
    assert (info["owner"], info["group"]) == ("ann", "staff"), info
    fs.set_replication(f"{HERE}/moved", 2)
    assert fs.info(f"{HERE}/moved")["replication"] == 2
    assert fs.ukey(f"{HERE}/moved")["algorithm"] == "MD5-of-0MD5-of-512CRC32C"


def errors_are_python_errors():
    raises(FileNotFoundError, fs.info, f"{HERE}/none")
    raises(FileNotFoundError, fs.cat_file, f"{HERE}/none")
    raises(FileNotFoundError, fs.ls, f"{HERE}/none")
    raises(FileExistsError, fs.makedirs, HERE)
    raises(ValueError, fs._call, "NONSENSE")
    raises(ValueError, fs._call, "SETXATTR", method="put", path=HERE)
    # Nobody is authenticated, so there is no token.
    raises(ValueError, fs.get_delegation_token)
    other = fsspec.filesystem("webhdfs", host=HOST, port=int(PORT), user="nobody-else", skip_instance_cache=True)
    raises(PermissionError, other.cat_file, f"{HERE}/moved")


run(
    [
        starts_anew,
        writes_and_reads,
        small_and_empty_files,
        lists_and_describes,
        names_with_blanks_and_percents,
        moves_copies_and_deletes,
        attributes,
        errors_are_python_errors,
    ]
)

"""curl against a namenode's HTTP address (HOST:PORT): the examples of HDFS's REST description, as people type them."""

import json
import os
import subprocess
import sys
import tempfile
import urllib.parse

from checks import run
from webhdfs_common import ROOT, USER, data

ADDRESS = sys.argv[1]
HERE = f"{ROOT}/curl"
FOLDER = tempfile.TemporaryDirectory()
LARGE = data(8, 9_000_000)


def curl(path, query, *more, user=USER):
    """Status and body of one operation; `more` are flags of curl."""
    url = f"http://{ADDRESS}/webhdfs/v1{urllib.parse.quote(path)}?user.name={user}&{query}"
    command = ["curl", "-sS", "--max-time", "120", "-o", "-", "-w", "\n%{http_code}", *more, url]
    body, _, status = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.rpartition(b"\n")
    return int(status), body


def told(path, query, *more):
    status, body = curl(path, query, *more)
    assert status == 200, (status, body)
    return json.loads(body)


def refused(answer, status, exception):
    assert answer[0] == status, answer
    assert json.loads(answer[1])["RemoteException"]["exception"] == exception, answer


def local(name, content):
    path = os.path.join(FOLDER.name, name)
    with open(path, "wb") as file:
        file.write(content)
    return path


def starts_anew():
    told(HERE, "op=DELETE&recursive=true", "-X", "DELETE")
    assert told(f"{HERE}/d", "op=MKDIRS&permission=750", "-X", "PUT") == {"boolean": True}
    assert told(f"{HERE}/d", "op=GETFILESTATUS")["FileStatus"]["permission"] == "750"


def stores_in_two_steps_by_hand():
    status, body = curl(f"{HERE}/f", "op=CREATE&noredirect=true", "-X", "PUT")
    assert status == 200, body
    place = json.loads(body)["Location"]
    command = ["curl", "-sS", "-f", "-o", "-", "-w", "%{http_code}", "-X", "PUT", "-T", local("large", LARGE), place]
    assert subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout == b"201"
    status, _ = curl(f"{HERE}/f", "op=CREATE", "-X", "PUT")
    assert status == 403, "it is there"
    status, _ = curl(f"{HERE}/g", "op=CREATE", "-X", "PUT")
    assert status == 307, "without -L curl shows the redirect"


def stores_with_a_length_in_chunks_and_with_expect():
    path = local("large", LARGE)
    assert curl(f"{HERE}/length", "op=CREATE", "-L", "-T", path)[0] == 201
    assert curl(f"{HERE}/chunks", "op=CREATE", "-L", "-T", path, "-H", "Transfer-Encoding: chunked")[0] == 201
    assert curl(f"{HERE}/expect", "op=CREATE", "-L", "-T", path, "-H", "Expect: 100-continue")[0] == 201
    for name in ["f", "length", "chunks", "expect"]:
        assert curl(f"{HERE}/{name}", "op=OPEN", "-L") == (200, LARGE), name


def reads_ranges_and_appends():
    assert curl(f"{HERE}/f", "op=OPEN&offset=1048570&length=20", "-L")[1] == LARGE[1_048_570:1_048_590]
    assert curl(f"{HERE}/f", "op=APPEND", "-L", "-X", "POST", "-T", local("more", b"and more"))[0] == 200
    assert curl(f"{HERE}/f", f"op=OPEN&offset={len(LARGE)}", "-L")[1] == b"and more"
    assert told(f"{HERE}/f", "op=TRUNCATE&newlength=0", "-X", "POST") == {"boolean": True}
    assert curl(f"{HERE}/f", "op=OPEN", "-L") == (200, b"")


def sums_up_and_says_where_blocks_lie():
    sums = [told(f"{HERE}/{name}", "op=GETFILECHECKSUM", "-L")["FileChecksum"] for name in ["length", "chunks"]]
    assert sums[0] == sums[1] and sums[0]["algorithm"].endswith("CRC32C"), sums
    blocks = told(f"{HERE}/length", "op=GETFILEBLOCKLOCATIONS")["BlockLocations"]["BlockLocation"]
    assert sum(block["length"] for block in blocks) == len(LARGE), blocks
    located = told(f"{HERE}/length", "op=GET_BLOCK_LOCATIONS")["LocatedBlocks"]["locatedBlocks"]
    assert all(node["infoPort"] > 0 for block in located for node in block["locations"]), located


def renames_lists_and_deletes():
    assert told(f"{HERE}/chunks", f"op=RENAME&destination={HERE}/d/moved", "-X", "PUT") == {"boolean": True}
    listed = told(f"{HERE}/d", "op=LISTSTATUS")["FileStatuses"]["FileStatus"]
    assert [entry["pathSuffix"] for entry in listed] == ["moved"], listed
    refused(curl(f"{HERE}/d", "op=DELETE", "-X", "DELETE"), 403, "PathIsNotEmptyDirectoryException")
    assert told(f"{HERE}/d", "op=DELETE&recursive=true", "-X", "DELETE") == {"boolean": True}
    refused(curl(f"{HERE}/d", "op=GETFILESTATUS"), 404, "FileNotFoundException")


def says_no_in_the_words_of_hdfs():
    refused(curl(f"{HERE}/length", "op=NONSENSE"), 400, "IllegalArgumentException")
    refused(curl(f"{HERE}/length", "op=SETACL", "-X", "PUT"), 400, "UnsupportedOperationException")
    refused(curl(f"{HERE}/length", "op=DELETE", "-X", "DELETE", user="nobody-else"), 403, "AccessControlException")
    refused(curl(f"{HERE}/length", "op=OPEN&doas=somebody"), 403, "AccessControlException")
    for header in ["Origin: http://evil.example", "Host: evil.example"]:
        refused(curl(f"{HERE}/length", "op=GETFILESTATUS", "-H", header), 403, "AccessControlException")


run(
    [
        starts_anew,
        stores_in_two_steps_by_hand,
        stores_with_a_length_in_chunks_and_with_expect,
        reads_ranges_and_appends,
        sums_up_and_says_where_blocks_lie,
        renames_lists_and_deletes,
        says_no_in_the_words_of_hdfs,
    ]
)

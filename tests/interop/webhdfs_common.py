"""What the WebHDFS scripts share: bytes that can be told apart, curl for the other side of a comparison."""

import os
import random
import subprocess
import urllib.parse

ROOT = "/webhdfs-interop"
USER = os.environ.get("WEBHDFS_USER", "root")


def data(seed, length):
    return random.Random(seed).randbytes(length)


def curl(address, method, path, query, *more):
    """One operation by curl, redirects followed; its output. For stores, `more` holds `-T FILE`."""
    url = f"http://{address}/webhdfs/v1{urllib.parse.quote(path)}?user.name={USER}&{query}"
    command = ["curl", "-sS", "-f", "-L", "--max-time", "120", "-X", method, *more, url]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout

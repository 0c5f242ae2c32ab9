"""What the WebHDFS scripts share: checks that are counted, bytes that can be told apart, curl for the other side of a comparison."""

import os
import random
import subprocess
import sys
import traceback
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


def raises(kinds, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except kinds as error:
        return error
    raise AssertionError(f"{getattr(call, '__name__', call)}{args} did not fail")


def run(checks):
    """Runs all checks (functions without arguments); prints one line each and a closing line; exits 1 if one failed."""
    failed = 0
    for check in checks:
        try:
            check()
            print(f"ok      {check.__name__}")
        except Exception:
            failed += 1
            print(f"FAILED  {check.__name__}")
            traceback.print_exc()
    print(f"{len(checks) - failed} passed, {failed} failed")
    sys.exit(1 if failed else 0)

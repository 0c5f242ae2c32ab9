"""Checks that are counted, for all scripts here."""

import sys
import time
import traceback


def raises(kinds, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except kinds as error:
        return error
    raise AssertionError(f"{getattr(call, '__name__', call)}{args} did not fail")


def run(checks):
    """Runs all checks (functions without arguments); prints one line each and a closing line. Ends the process: 1 if one failed."""
    failed = 0
    for check in checks:
        begin = time.monotonic()
        try:
            check()
            print(f"ok      {check.__name__} ({time.monotonic() - begin:.1f} s)", flush=True)
        except Exception:
            failed += 1
            print(f"FAILED  {check.__name__}", flush=True)
            traceback.print_exc()
    print(f"{len(checks) - failed} passed, {failed} failed", flush=True)
    sys.exit(1 if failed else 0)

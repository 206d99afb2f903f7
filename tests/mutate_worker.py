"""Run tests in forks of a process that has imported what takes long.

    python mutate_worker.py MODULE ...

Reads calls, a JSON array a line: folder to run in, test file, pytest's -k, seconds at most, file
for what pytest prints. Answers each with a line: pytest's exit status, negative if a signal ended
it, null if it was not done in time. Nothing of the checkout is imported here, only in the forks.
"""

import contextlib
import importlib
import json
import os
import signal
import sys
import time
import traceback
from typing import NoReturn

import pytest

OPTIONS = "-x", "-q", "--no-header", "-p", "no:cacheprovider"


def run_pytest(folder: str, tests: str, chosen: str, output: str) -> NoReturn:
    """Be pytest, in a session of its own."""
    status = 70  # of what went wrong outside pytest
    try:
        os.setsid()
        os.chdir(folder)
        for fd, path, flags in ((0, os.devnull, os.O_RDONLY), (1, output, os.O_WRONLY)):
            os.dup2(os.open(path, flags), fd)
        os.dup2(1, 2)
        sys.path[0] = os.environ["PYTHONPATH"] = folder  # for the processes that tests start, too
        status = int(pytest.main([*OPTIONS, tests, "-k", chosen]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def wait(pid: int, limit: float) -> int | None:
    """Return the exit status of a fork; after `limit` seconds end it and what it started."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):  # it has no session yet
        os.killpg(pid, signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who asks ends this by closing stdin
    for name in sys.argv[1:]:
        importlib.import_module(name)
    for line in sys.stdin:
        folder, tests, chosen, limit, output = json.loads(line)
        pid = os.fork()
        if not pid:
            run_pytest(folder, tests, chosen, output)
        print(json.dumps(wait(pid, limit)), flush=True)


if __name__ == "__main__":
    main()

"""Plant each fault of `mutants.py` in a copy of the checkout, and see a test fail.

    python tests/mutate.py [NAME ...] [--jobs N] [--limit SECONDS]

A name may hold * and ?. First the tests that were chosen must pass without a fault. A fault is
killed if a test fails, the tests crash, or they do not end within the limit. Exit status 1 if one
is not killed. In Triton's interpreter, beside a GPU too. The checkout itself is not touched.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from mutant import Mutant
from mutants import MUTANTS

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 300.0  # seconds for the tests of one fault
WORKER = Path(__file__).with_name("mutate_worker.py")
# What most tests import, and is none of ours.
MODULES = "torch._dynamo", "triton.runtime.interpreter", "hypothesis.strategies"


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant.

    Attributes:
        name: the mutant's.
        outcome: "killed", "survived", "did not apply" or "no verdict": pytest ran no test.
        seconds: that it took.
        detail: the test that failed and why, or what went wrong.
    """

    name: str
    outcome: str
    seconds: float
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.outcome:<13} {self.seconds:5.1f} s  {self.name}  {self.detail}".rstrip()


def copy_checkout(root: Path, to: Path) -> None:
    """Copy what git tracks or would track; `bert_fast` there is that copy, its kernels included."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=root, capture_output=True, check=True).stdout
    for name in {os.fsdecode(name) for name in listed.split(b"\0") if name}:
        if (root / name).is_file():  # not what is deleted and not committed yet
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, to / name)
    # an installed bert_fast knows where its kernels lie, and that is not here
    (to / "bert_fast" / "kernels").symlink_to("../kernels", target_is_directory=True)


class Worker:
    """A process that runs tests in forks of itself, which begin with `modules` imported."""

    def __init__(self, modules: Sequence[str] = MODULES):
        env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        env |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        env |= {"OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # none is needed
        env["COLUMNS"] = "240"  # of what pytest prints
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER), *modules],
            env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def run_tests(self, tree: Path, tests: str, chosen: str, limit: float) -> tuple[Any, str]:
        """Return pytest's exit status, None past the limit, and what it printed."""
        with tempfile.NamedTemporaryFile() as output:
            call = str(tree), tests, chosen, limit, output.name
            self.process.stdin.write(json.dumps(call) + "\n")
            self.process.stdin.flush()
            status = json.loads(self.process.stdout.readline())
            return status, output.read().decode("utf-8", "replace")

    def close(self) -> None:
        """End the process, after the tests that it runs."""
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def spread(
    workers: Sequence[Worker], do: Callable[[Worker, Any], Any], items: Iterable[Any]
) -> Iterator[Any]:
    """Yield do(worker, item) for each item, in their order, made by all workers at a time."""
    idle: SimpleQueue[Worker] = SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def one(item: Any) -> Any:
        worker = idle.get()
        try:
            return do(worker, item)
        finally:
            idle.put(worker)

    pool = ThreadPoolExecutor(len(workers))
    try:
        yield from pool.map(one, items)
    finally:
        pool.shutdown(cancel_futures=True)


def without_fault(worker: Worker, tests: str, mutants: Sequence[Mutant], tree: Path) -> str:
    """Return what the tests that were chosen of a file print if they do not pass; else ""."""
    chosen = dict.fromkeys(mutant.chosen for mutant in mutants if mutant.tests == tests)
    expression = " or ".join(f"({each})" for each in chosen)
    status, output = worker.run_tests(tree, tests, expression, LIMIT * len(chosen))
    return "" if status == 0 else f"{tests}: exit status {status}\n{output[-3000:]}"


def judge(worker: Worker, mutant: Mutant, tree: Path, limit: float) -> Verdict:
    """Plant the mutant in a copy of `tree`, a copy of the checkout, and run its tests there."""
    began = time.monotonic()
    try:
        changed = mutant.apply((tree / mutant.file).read_text("utf-8"))
    except (ValueError, OSError) as error:
        return Verdict(mutant.name, "did not apply", 0.0, str(error))
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy = Path(folder, "tree")
        shutil.copytree(tree, copy, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        (copy / mutant.file).write_text(changed, "utf-8")
        status, output = worker.run_tests(copy, mutant.tests, mutant.chosen, limit)
    seconds = time.monotonic() - began
    if status is None:
        return Verdict(mutant.name, "killed", seconds, f"not done within {limit:g} s")
    if status < 0:
        return Verdict(mutant.name, "killed", seconds, f"died of {signal.Signals(-status).name}")
    if status == pytest.ExitCode.TESTS_FAILED:
        failed = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
        detail = failed[0].partition(" ")[2] if failed else ""
        return Verdict(mutant.name, "killed", seconds, detail.removeprefix(mutant.tests + "::"))
    if status == 0:
        return Verdict(mutant.name, "survived", seconds, f"{mutant.tests} -k '{mutant.chosen}'")
    return Verdict(mutant.name, "no verdict", seconds, f"exit status {status}\n{output[-2000:]}")


def say(line: str) -> None:
    print(line, flush=True)


def main() -> int:
    """Parse, copy, and plant one fault after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="of mutants; none: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="copies at a time")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for a mutant's tests")
    args = parser.parse_args()
    for name in args.names:
        if not any(fnmatchcase(mutant.name, name) for mutant in MUTANTS):
            parser.error(f"NAME: want a mutant of tests/mutants.py, got {name}")
    chosen = [m for m in MUTANTS if any(fnmatchcase(m.name, n) for n in args.names or ["*"])]
    began = time.monotonic()
    workers = [Worker() for _ in range(max(1, args.jobs))]
    try:
        with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
            tree = Path(folder, "tree")
            copy_checkout(ROOT, tree)
            files = dict.fromkeys(mutant.tests for mutant in chosen)
            run = partial(without_fault, mutants=chosen, tree=tree)
            problems = [problem for problem in spread(workers, run, files) if problem]
            for problem in problems:
                say(f"fails without a fault: {problem}")
            if problems:
                return 1
            say(f"the tests pass without a fault: {time.monotonic() - began:.0f} s")
            verdicts = []
            for verdict in spread(workers, partial(judge, tree=tree, limit=args.limit), chosen):
                verdicts.append(verdict)
                say(str(verdict))
    finally:
        for worker in workers:
            worker.close()
    left = [verdict for verdict in verdicts if verdict.outcome != "killed"]
    seconds = time.monotonic() - began
    say(f"{len(verdicts)} mutants, {len(verdicts) - len(left)} killed, {seconds:.0f} s")
    for verdict in left:
        say(str(verdict))
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())

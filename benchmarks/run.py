"""Measures: the suites on a CPU or a GPU, all of a GPU at once, proofs, launch rules.

    python benchmarks/run.py kernels        every op, at the sizes of BERT-base and -large
    python benchmarks/run.py encoder        whole encoders beside every peer
    python benchmarks/run.py pretraining    whole steps of pre-training
    python benchmarks/run.py all            these three
    python benchmarks/run.py gpu            what a GPU machine can tell in under 9 minutes
    python benchmarks/run.py proof          the tests that run on the GPU, and the sanitizers
    python benchmarks/run.py tune [TABLE]   better launch rules, of attention.SHORT alone or of all

Writes SUITE-TIME.json and .log into --out. Each part of a run is a process with a deadline, and
what was measured stays, whatever happens after it. What needs a GPU runs in small on the CPU where
there is none, to show that it works: nothing of that is a result.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import selection
import tunables
from progress import Progress, words
from record import ROOT, Run
from selection import SUITES
from supervise import Stage, has_gpu, supervise

_MOST_FOR_A_TABLE = 150  # seconds
_CASES_WITHIN = 430  # seconds for up to three cases on a GPU
_CASE_WITHIN = {"cpu": 1200, "cuda": 300}
_KERNEL_WITHIN = 30
_MEMORY_WITHIN = 60  # for a case
_EXPECTED = {"build": 60.0, "machine": 20.0}  # seconds; of a case suites.py knows it
_MEMORY_EXPECTED = 25.0
_FOR_GPU = ("gpu", "proof", "tune")
_HERE = Path(__file__).parent

Case = dict[str, Any]  # as suites.py prints it


def listed(suite: str, device: str, small: bool) -> list[Case]:
    """Return the cases of a suite, as suites.py has them."""
    argv = [sys.executable, str(_HERE / "suites.py"), suite, "--device", device]
    done = subprocess.run([*argv, *(["--small"] if small else [])], stdout=subprocess.PIPE)
    if done.returncode:
        raise SystemExit(done.returncode)  # it has said why
    return json.loads(done.stdout)


def stages_of(suite: str, tables: list[str]) -> list[Stage]:
    """Return the stages of a suite for a GPU; they stay under 9 minutes together."""
    if suite == "gpu":
        budget = {"build": 60, "machine": 40, "smoke": 45, "ops": 105}
        budget |= {"case 3": 55, "case 5": 80, "case 8": 95, "profile": 45}
    elif suite == "proof":
        budget = {"build": 60, "machine": 35, "smoke": 60, "tests": 200}
        budget |= {"memcheck": 60, "racecheck": 50, "initcheck": 35, "synccheck": 25}
    else:
        weights = {
            table: 2 + sum(len(tunable.timed) for tunable in tunables.of(table))
            for table in tables or tunables.tables()
        }
        budget = {"machine": 35, "tune compile": min(100, 30 + 10 * len(weights))}
        left, whole = 525 - sum(budget.values()), sum(weights.values())
        for table, weight in weights.items():
            budget[f"tune {table}"] = min(_MOST_FOR_A_TABLE, left * weight // whole)
    return [Stage(name, seconds) for name, seconds in budget.items()]


def stages_for(cases: list[Case], device: str) -> list[Stage]:
    """Return the stages for these cases: one for all of ops, else one for a case."""
    whole = [case["name"] for case in cases if case["family"] != "kernels"]
    ops = len(cases) - len(whole)
    budget = {"build": 60} if device == "cuda" else {}
    budget["machine"] = 35 if device == "cuda" else 120
    if ops:
        budget["kernels"] = max(60, _KERNEL_WITHIN * ops)
    few = device == "cuda" and len(whole) <= 3
    for name in whole:
        budget[name] = _CASES_WITHIN / len(whole) if few else _CASE_WITHIN[device]
    if device == "cpu" and (n := sum(case["memory"] for case in cases)):
        budget["memory"] = _MEMORY_WITHIN * n
    return [Stage(name, seconds) for name, seconds in budget.items()]


def expected(cases: list[Case], stages: list[Stage]) -> dict[str, float]:
    """Return about how many seconds each step of a run takes, in order."""
    known = _EXPECTED | {"memory": _MEMORY_EXPECTED * sum(case["memory"] for case in cases)}
    steps: dict[str, float] = {}
    for stage in stages:
        if stage.name == "kernels":
            steps |= {c["name"]: c["seconds"] for c in cases if c["family"] == "kernels"}
        else:
            own = [case["seconds"] for case in cases if case["name"] == stage.name]
            steps[stage.name] = own[0] if own else known[stage.name]
    return steps


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", choices=(*SUITES, *_FOR_GPU))
    parser.add_argument("tables", nargs="*", help="of tune: the launch rules")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "benchmarks")
    of = parser.add_argument_group("of kernels, encoder, pretraining and all")
    of.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    of.add_argument("--case", action="append", default=[], help="a name, or how it begins")
    of.add_argument("--peers", action="append", default=[], help="likewise; none, or all")
    of.add_argument("--small", action="store_true", help="a rehearsal, nothing is a result")
    of.add_argument("--list", action="store_true", help="print the cases, run none")
    args = parser.parse_args(argv)
    if args.suite != "tune" and args.tables:
        parser.error(f"{args.suite}: want no more arguments, got {' '.join(args.tables)}")
    if args.suite == "tune" and not set(args.tables) <= set(tunables.tables()):
        parser.error(f"tune: want {', '.join(tunables.tables())}, got {' '.join(args.tables)}")
    if args.suite in _FOR_GPU:
        asked = args.device != "auto" or args.case or args.peers or args.small or args.list
        if asked:
            parser.error(f"{args.suite}: it has one form, want none of the suites' options")
        args.device = "cuda"
    gpu = has_gpu()
    if args.device == "auto":
        args.device = "cuda" if gpu else "cpu"
    args.runs_on = "cuda" if gpu and args.device == "cuda" else "cpu"
    args.small |= args.device != args.runs_on
    args.cases = []
    if args.suite in SUITES:
        every = listed(args.suite, args.device, args.small)
        try:
            names = selection.cases([case["name"] for case in every], args.case)
        except ValueError as error:
            parser.error(str(error))
        args.cases = [case for case in every if case["name"] in names]
    return args


def main(argv: list[str] | None = None) -> int:
    """Parse, start the run, and say where it lies."""
    args = _parse(argv)
    if args.list:
        for case in args.cases:
            print(f"{case['name']:<32} {case['what']}")
        return 0
    if args.small and args.device != args.runs_on:
        print("No NVIDIA GPU here: every part runs in small on the CPU, to show that it works.")
        print("Nothing of it is a result; the GPU's figures stay 'not measured yet'.")
    elif args.small:
        print("A rehearsal in small, to show that it works: nothing of it is a result.")
    stem = "-".join([args.suite, *args.tables, *args.case])
    stem = "".join(c if c.isalnum() or c in "-._" else "-" for c in stem)[:100]
    path = args.out / f"{stem}-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}.json"
    run = Run.start(path, args.suite, _command(args), args.small)
    if args.suite == "tune":
        run.set("tune", {"asked": args.tables or tunables.tables()})
    steps: dict[str, float] = {}
    if args.suite in SUITES:
        run.set("asked", {"cases": [case["name"] for case in args.cases], "peers": args.peers})
        stages = stages_for(args.cases, args.device)
        steps = expected(args.cases, stages)
        print(f"{len(args.cases)} cases, about {words(sum(steps.values()))}")
    else:
        stages = stages_of(args.suite, args.tables)
        steps = {stage.name: stage.seconds for stage in stages}
    # its own: what an earlier run compiled would hide the time
    made = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = made.name
    os.environ["BENCH_ONNX_DIR"] = str(Path(made.name) / "onnx")
    os.environ.pop("NVIDIA_TF32_OVERRIDE", None)  # 1 would make fp32 products TF32

    def child(stage: Stage, until: float, heart: int) -> list[str]:
        options = ["--device", args.runs_on, "--until", str(until), "--heart", str(heart)]
        options += ["--small"] if args.small else []
        return [sys.executable, "-u", str(_HERE / "stages.py"), stage.name, str(path), *options]

    with made, Progress(steps) as progress:
        status = supervise(path, stages, child, progress.at)
    print(f"\n{Run.open(path).summary()}")
    print(f"written: {_shown(path)}")
    if not args.small:
        print(f"to keep it: python benchmarks/ledger.py --keep {_shown(path)}")
    return status


def _command(args: argparse.Namespace) -> str:
    """Return the command line that repeats the run, without where it writes."""
    if args.suite in _FOR_GPU:
        return shlex.join(["python", "benchmarks/run.py", args.suite, *args.tables])
    words = ["bert-fast", "bench", args.suite, "--device", args.device]
    for option, values in (("--case", args.case), ("--peers", args.peers)):
        words += [word for value in values for word in (option, value)]
    return shlex.join([*words, *(["--small"] if args.small else [])])


def _shown(path: Path) -> str:
    """Return a path as the user would type it from here."""
    path = path.resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


if __name__ == "__main__":
    raise SystemExit(main())

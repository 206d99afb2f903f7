"""Measures: all at once on a GPU, a case against every peer, proofs, launch rules, the CPU's table.

    python benchmarks/run.py gpu            what a GPU machine can tell in under 9 minutes
    python benchmarks/run.py case N         case N of the targets against every peer and mode
    python benchmarks/run.py proof          the tests that run on the GPU, and the sanitizers
    python benchmarks/run.py tune [TABLE]   better launch rules, of attention.SHORT alone or of all
    python benchmarks/run.py cpu [ROW ...]  the table for CPUs, or rows such as 1x128, or
                                            training: "mini 32x128"

Writes SUITE-TIME.json and .log into --out. Each part of a run is a process with a deadline, and
what was measured stays, whatever happens after it. Without a GPU all but the last run their parts
in small on the CPU, to show that they work: nothing of that is a result.
"""

import argparse
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path

import tunables
from record import ROOT, Run
from supervise import Stage, has_gpu, supervise

CASES = ("1", "2", "3", "4", "5", "6", "7", "8", "10")
_MOST_FOR_A_TABLE = 150  # seconds
CPU_TABLE = (
    "1x128",
    "8x128",
    "2x512",
    "16x128 33%",
    "8x512 46%",
    "8x128 bf16",
    "16x128 33% bf16",
)
CPU_TRAINING = ("mini 32x128", "small 32x128")


def stages_of(suite: str, what: list[str]) -> list[Stage]:
    """Return the stages of a suite; those for a GPU stay under 9 minutes together."""
    if suite == "gpu":
        budget = {"build": 60, "machine": 40, "smoke": 45, "ops": 105}
        budget |= {"case 3": 55, "case 5": 80, "case 8": 95, "profile": 45}
    elif suite == "case":
        budget = {"build": 60, "machine": 35, f"case {what[0]} in full": 430}
    elif suite == "proof":
        budget = {"build": 60, "machine": 35, "smoke": 60, "tests": 200}
        budget |= {"memcheck": 60, "racecheck": 50, "initcheck": 35, "synccheck": 25}
    elif suite == "tune":
        weights = {
            table: 2 + sum(len(tunable.timed) for tunable in tunables.of(table))
            for table in what or tunables.tables()
        }
        budget = {"machine": 35, "tune compile": min(100, 30 + 10 * len(weights))}
        left, whole = 525 - sum(budget.values()), sum(weights.values())
        for table, weight in weights.items():
            budget[f"tune {table}"] = min(_MOST_FOR_A_TABLE, left * weight // whole)
    else:
        budget = {"machine": 120} | {f"cpu {row}": 1200 for row in what or CPU_TABLE}
        budget["memory"] = 60 * len(budget)
    return [Stage(name, seconds) for name, seconds in budget.items()]


def main(argv: list[str] | None = None) -> int:
    """Parse, start the run, and say where it lies."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", choices=("gpu", "case", "proof", "tune", "cpu"))
    parser.add_argument("what", nargs="*", help="the case, the launch rules, or the CPU's rows")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "benchmarks")
    args = parser.parse_args(argv)
    if args.suite == "case" and args.what == ["9"]:
        print("case 9 is absent: it wants LAMB, which is not built yet")
        return 0
    if args.suite == "case" and (len(args.what) != 1 or args.what[0] not in CASES):
        got = " ".join(args.what) or "none"
        parser.error(f"case: want one of {', '.join(CASES)}, got {got}")
    rows = (*CPU_TABLE, *CPU_TRAINING)
    if args.suite == "cpu" and not set(args.what) <= set(rows):
        parser.error(f"cpu: want rows of {', '.join(rows)}, got {' '.join(args.what)}")
    if args.suite == "tune" and not set(args.what) <= set(tunables.tables()):
        parser.error(f"tune: want {', '.join(tunables.tables())}, got {' '.join(args.what)}")
    if args.suite in ("gpu", "proof") and args.what:
        parser.error(f"{args.suite}: want no more arguments, got {' '.join(args.what)}")
    gpu = args.suite != "cpu" and has_gpu()
    rehearsal = args.suite != "cpu" and not gpu
    if rehearsal:
        print("No NVIDIA GPU here: every part runs in small on the CPU, to show that it works.")
        print("Nothing of it is a result; the GPU's figures stay 'not measured yet'.")
    stem = "-".join([args.suite, *args.what]).replace(" ", "-").replace("%", "")
    path = args.out / f"{stem[:100]}-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}.json"
    command = shlex.join(["python", "benchmarks/run.py", args.suite, *args.what])
    run = Run.start(path, args.suite, command, rehearsal)
    if args.suite == "tune":
        run.set("tune", {"asked": args.what or tunables.tables()})
    # its own: what an earlier run compiled would hide the time
    made = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = made.name
    os.environ["BENCH_ONNX_DIR"] = str(Path(made.name) / "onnx")
    os.environ.pop("NVIDIA_TF32_OVERRIDE", None)  # 1 would make fp32 products TF32

    def child(stage: Stage, until: float, heart: int) -> list[str]:
        script = Path(__file__).with_name("stages.py")
        options = ["--device", "cuda" if gpu else "cpu", "--until", str(until)]
        options += ["--heart", str(heart), *(["--small"] if rehearsal else [])]
        return [sys.executable, "-u", str(script), stage.name, str(path), *options]

    with made:
        status = supervise(path, stages_of(args.suite, args.what), child)
    print(f"\n{Run.open(path).summary()}")
    print(f"written: {_shown(path)}")
    if not rehearsal:
        print(f"to keep it: python benchmarks/ledger.py --keep {_shown(path)}")
    return status


def _shown(path: Path) -> str:
    """Return a path as the user would type it from here."""
    path = path.resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


if __name__ == "__main__":
    raise SystemExit(main())

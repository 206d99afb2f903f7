"""What the batch-invariant mode costs: BERT-base with it off and on, checked and timed in turn.

    python benchmarks/invariant.py [CASE ...] [--dtype fp32] [--rounds 20] [--small]

A row says too whether the mode kept its promise here: the first text of the batch has the bits that
it has alone. On a CPU the most memory of a call is taken in processes of their own. Nothing is
recorded: the table is printed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import demo
import encoder
import harness
import machine
import memory
import peers
import torch
import workload
from gate import Candidate, Case, Outputs, Prepared, Work
from record import Run
from rich.console import Console
from rich.table import Table
from workload import Batch

import bert_fast
from bert_fast.accuracy import DTYPES

SEED = 20_261_122
LENGTHS = {
    "1 x 16": [16],
    "1 x 128": [128],
    "8 x 128": [128] * 8,
    "16 x 8 to 128": workload.normal_lengths(16, 50, 40, 8, 128, SEED),
}
MODES = {"off": False, "on": True}
What = tuple[dict[str, torch.Tensor], bert_fast.BertConfig, torch.device, torch.dtype]


def what_of(device: torch.device, dtype: torch.dtype, small: bool) -> What:
    """Return weights, configuration, device and dtype of the model."""
    config = encoder.config_of("base", 128, small)
    return workload.weights(config), config, device, dtype


def in_mode(on: bool, what: What) -> Prepared:
    """Return this project's encoder with the mode on or off while it runs."""
    one = encoder.our_encoder(*what)

    def within(function: Callable[[Batch], Any]) -> Callable[[Batch], Any]:
        def call(batch: Batch) -> Any:
            with bert_fast.batch_invariant(on):
                return function(batch)

        return call

    return Prepared(within(one.run), within(one.check), notes=one.notes)


def batches_of(name: str, what: What) -> list[Batch]:
    """Return two batches of the case."""
    _, config, device, _ = what
    return [workload.batch(config, LENGTHS[name], device, SEED + i) for i in range(2)]


def mode_case(name: str, what: What) -> tuple[Case, list[Candidate]]:
    """Return a case, and the mode off and on as its candidates."""
    state, config, device, dtype = what
    batches = batches_of(name, what)
    exact = torch.float64 if device.type == "cpu" else torch.float32
    baseline_name, baseline = peers.baseline_encoder(state, config, device, dtype)
    case = Case(
        name,
        device,
        next(short for short, known in DTYPES.items() if known == dtype),
        batches,
        truth=encoder.truth_of(state, config, device, exact),
        baseline=baseline,
        baseline_name=baseline_name,
        work=Work(sum(LENGTHS[name]), batches[0].input_ids.numel(), len(LENGTHS[name])),
    )
    return case, [Candidate(m, lambda on=on: in_mode(on, what)) for m, on in MODES.items()]


def keeps_bits(check: Callable[[Batch], Outputs], batch: Batch) -> bool:
    """Return whether the rows of the first text are those that it has alone."""
    n = batch.lengths[0]
    alone = Batch(batch.input_ids[:1, :n].contiguous(), None, (n,))
    return torch.equal(check(batch)["hidden"][:n], check(alone)["hidden"])


def peak_of(name: str, mode: str, args: argparse.Namespace) -> int:
    """Return the most bytes that a process holds during a call.

    Raises:
        RuntimeError: the process failed.
    """
    argv = [sys.executable, __file__, name, "--dtype", args.dtype, "--memory", mode]
    done = subprocess.run(
        argv + ["--small"] * args.small, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"memory of {name}, {mode}: {done.stderr[-300:]}")
    return json.loads(done.stdout)["peak"]


def add_row(table: Table, run: Run, name: str, what: What, args: argparse.Namespace) -> bool:
    """Add what was measured of a case; return whether it was."""
    rows = [run.row(name, mode) for mode in MODES]
    for row in rows:
        if row["state"] != "measured":
            table.add_row(name, f"{row['candidate']}: {row['state']}: {row['why']}")
            return False
    off, on = (row["wall"]["p50"] for row in rows)
    batch = batches_of(name, what)[0]
    kept = [keeps_bits(in_mode(on, what).check, batch) for on in MODES.values()]
    peaks = ["", ""]
    if what[2].type == "cpu" and sys.platform == "linux":
        peaks = [f"{peak_of(name, mode, args) / 1e6:,.0f} MB" for mode in MODES]
    alone = ["yes" if k else "no" for k in kept] if len(batch.lengths) > 1 else ["", ""]
    times = f"{1e3 * off:,.1f} ms", f"{1e3 * on:,.1f} ms", f"{on / off:.2f}"
    table.add_row(name, *times, *peaks, *alone)
    return alone[1] != "no"


def main() -> int:
    """Measure and print; return 1 if an answer was wrong or the mode did not keep its promise."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(LENGTHS)}")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--small", action="store_true", help="a small model, as a rehearsal")
    parser.add_argument("--memory", choices=MODES, help="of the first case alone, as JSON")
    args = parser.parse_args()
    if unknown := set(args.cases) - set(LENGTHS):
        parser.error(f"CASE: want some of {', '.join(LENGTHS)}, got {', '.join(sorted(unknown))}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    what = what_of(device, DTYPES[args.dtype], args.small)
    if args.memory:
        prepared = in_mode(MODES[args.memory], what)
        print(json.dumps(memory.of_a_call(prepared, batches_of(args.cases[0], what)[0])))
        return 0
    columns = "off", "on", "on / off", "most memory, off", "on", "alone = in batch, off", "on"
    table = Table("texts x tokens", *columns, title=f"BERT-base, {args.dtype}")
    with tempfile.TemporaryDirectory() as folder:
        run = Run.start(Path(folder) / "run.json", "invariant", "python benchmarks/invariant.py")
        run.set("environment", machine.environment(device))
        right = []
        for name in args.cases or LENGTHS:
            case, candidates = mode_case(name, what)
            harness.measure(case, candidates, run, rounds=args.rounds)
            right.append(add_row(table, run, name, what, args))
    console = Console(width=120)
    console.print(table)
    console.print(demo.machine_of(run.data["environment"], args.rounds))
    return int(not all(right))


if __name__ == "__main__":
    raise SystemExit(main())

"""What each stage of a run does; `run.py` starts this file as a process for every stage.

python benchmarks/stages.py STAGE FILE --device cuda|cpu --until SECONDS [--small]
"""

import argparse
import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

import builds
import checkout  # noqa: F401
import harness
import machine
import memory
import ops
import profiles
import proof
import selection
import suites
import torch
import tune
from gate import Candidate, Case
from goals import OURS
from op_rows import DTYPES
from record import Run, clean
from selection import SUITES
from supervise import EXIT_LOST

from bert_fast.accuracy import short

_MOST_FOR_A_KERNEL = 5.0  # seconds for its rounds
_LAST_TO_COMPILE = 15.0  # seconds for what is being compiled when the time for it is over


@dataclass(frozen=True)
class Context:
    """What a stage works with.

    Attributes:
        run: gets what it finds.
        device: where it measures.
        small: a rehearsal's sizes.
        until: on time.monotonic(), when it should be over.
    """

    run: Run
    device: torch.device
    small: bool
    until: float

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.until - time.monotonic()

    def within(self, seconds: float) -> "Context":
        """Return the same for a part of the stage that should be over in so many seconds."""
        return replace(self, until=min(self.until, time.monotonic() + seconds))


def _machine(context: Context) -> None:
    """Environment, ceilings, the rates of BERT's matrix products."""
    run, device = context.run, context.device
    run.set("environment", machine.environment(device))
    print(f"{run.data['environment']['device']}, torch {torch.__version__}")
    run.set("ceilings", machine.ceilings(device, small=context.small))
    for name in ("copy_gb_per_s", "matmul_tflop_per_s"):
        print(f"  {name}: {run.data['ceilings'][name]}")
    if context.run.data["suite"] in ("gpu", "all"):
        run.set(
            "gemms",
            machine.gemms(
                device,
                small=context.small,
                seconds=min(30.0, context.left),
                matmul=run.data["ceilings"]["matmul_tflop_per_s"],
            ),
        )


def _smoke(context: Context) -> None:
    """Every op at odd shapes in every dtype: checked, not timed."""
    for dtype in DTYPES:
        seen = []
        for name in ops.odd_names():
            case, candidates = ops.case(name, context.device, dtype, "odd")
            ours = [c for c in candidates if c.name == "bert_fast"]
            _each(context, case, ours, harness.prove)
            seen.append(case.name)
        print(f"{short(dtype)}: {context.run.summary(seen)}", flush=True)


def _ops(context: Context) -> None:
    """The kernels of the ledger, each at the size that its goal is for."""
    names = [row if context.small else f"{row}, {size}" for row, size in ops.ledger_names()]
    _kernels(context, [*dict.fromkeys(names)])


def _kernels(context: Context, names: list[str]) -> None:
    """The cases of ops: each has its share of the time."""
    for i, name in enumerate(names):
        share = max(1.0, context.left / (len(names) - i))
        case, candidates = _built(context, name)
        how = {"rounds": 30, "seconds": min(share / 2, _MOST_FOR_A_KERNEL)}
        _measure(context.within(4 * share), case, candidates, **how)


def _built(context: Context, name: str) -> tuple[Case, list[Candidate]]:
    """Return a case and the candidates that were asked for, ours among them."""
    full = context.run.data["suite"] in SUITES
    case, candidates = suites.build(name, context.device, small=context.small, full=full)
    peers = [candidate.name for candidate in candidates]
    if asked := context.run.data.get("asked", {}).get("peers"):
        peers = selection.peers(peers, asked)
    elif full and (default := suites.chosen_by_default(name, context.device)) is not None:
        peers = default
    return case, [c for c in candidates if c.name == OURS or c.name in peers]


def _case(context: Context, name: str) -> None:
    """A case of the encoder or of pre-training."""
    case, candidates = _built(context, name)
    family = suites.family_of(name)
    if context.device.type == "cpu":
        few = family == "encoder" and suites.MODULES[family].SPECS[name].few
        how = {"rounds": 15, "least": 5, "seconds": 10.0 if few else 20.0}
    else:
        rounds = 10 if case.work.sequences > 1000 else 30 if family == "encoder" else 20
        how = {"rounds": rounds, "least": 3, "seconds": context.left / 2}
    _measure(context, case, candidates, **how)


def _memory(context: Context) -> None:
    """The memory of every candidate that was measured, each in a process of its own."""
    run = context.run
    rows = [
        (row["case"], row["candidate"])
        for row in run.data["rows"]
        if row["state"] == "measured" and suites.has_memory(row["case"])
    ]
    with ThreadPoolExecutor(2) as pool:  # most of each is imports and weights, on one core
        asked = {
            pool.submit(lambda one: memory.of(*one, context.small, context.left), one): one
            for one in rows
        }
        for future in as_completed(asked):
            case, candidate = asked[future]
            try:
                found = future.result()
            except (RuntimeError, ValueError) as error:
                print(f"{case}, {candidate}: {error}", flush=True)
                continue
            run.put(case, candidate, memory=found)
            peak, held = (found[name] / 2**20 for name in ("peak", "held"))
            says = f"{case:<28} {candidate:<38} {peak:7.0f} MiB, {held:.0f} before the call"
            print(says, flush=True)


def _measure(context: Context, case: Case, candidates: list[Candidate], **how: float) -> None:
    """Measure a case, and say what came of it."""
    if context.small:
        how |= {"rounds": 3, "least": 1}

    def measure(case: Case, candidates: list[Candidate], run: Run) -> None:
        harness.measure(case, candidates, run, deadline=context.until, **how)

    _each(context, case, candidates, measure)
    print(context.run.summary([case.name]), flush=True)


def _each(
    context: Context,
    case: Case,
    candidates: list[Candidate],
    do: Callable[[Case, list[Candidate], Run], None],
) -> None:
    """Do it and leave room for the next case, which a broken one does not keep from running."""
    try:
        do(case, candidates, context.run)
    except harness.DeviceLostError:
        raise
    except Exception as error:
        traceback.print_exc()
        for name in context.run.unsettled(case.name, ""):
            why = clean(f"the case broke: {type(error).__name__}: {error}")
            context.run.put(case.name, name, state="failed", why=why)
    gc.collect()
    if context.device.type == "cuda":
        torch.cuda.empty_cache()


def _profile(context: Context) -> None:
    """The kernels of a forward and of a training step."""
    found = {}
    for name in ("case 3", "case 8"):
        case, (ours, *_) = suites.build(name, context.device, small=context.small, full=False)
        prepared, inputs = ours.prepare(), case.inputs[0]
        call = lambda prepared=prepared, inputs=inputs: prepared.run(inputs)  # noqa: E731
        found[name] = profiles.kernels(call, context.device)
        print(f"{name}, {ours.name}:\n{profiles.table(found[name])}", flush=True)
        context.run.set("profiles", found)


def _tune(context: Context, table: str) -> None:
    """Measure the entries of a table, and say which are better; "compile": make all of them."""
    if why := tune.why_not():
        print(why)
    elif table == "compile":
        tune.compile_all(context.run, context.device, context.left - _LAST_TO_COMPILE)
    else:
        cases = tune.cases(table, context.small)
        for i, (tunable, timed) in enumerate(cases):
            share = context.left / (len(cases) - i)
            case, candidates = tune.case(tunable, timed, context.device, context.small, context.run)
            _measure(context.within(share), case, candidates, rounds=30, seconds=share / 2)
        tune.conclude(context.run, table, context.device)


def perform(stage: str, context: Context) -> None:
    """Run a stage by its name.

    Raises:
        ValueError: there is none of that name.
    """
    simple = {
        "build": lambda: builds.everything(context.run, context.device),
        "machine": lambda: _machine(context),
        "smoke": lambda: _smoke(context),
        "ops": lambda: _ops(context),
        "profile": lambda: _profile(context),
        "memory": lambda: _memory(context),
        "tests": lambda: proof.tests(context.run, context.until),
    }
    if stage in simple:
        simple[stage]()
    elif stage in proof.SANITIZERS:
        proof.sanitizer(stage, context.run, context.device, context.until)
    elif stage == "kernels":
        asked = context.run.data["asked"]["cases"]
        _kernels(context, [name for name in asked if suites.family_of(name) == "kernels"])
    elif stage.startswith("tune "):
        _tune(context, stage.removeprefix("tune "))
    elif suites.family_of(stage) != "kernels":
        _case(context, stage)
    else:
        raise ValueError(f"stage: want one that run.py lists, got {stage!r}")


def main() -> int:
    """Run one stage of a run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("stage")
    parser.add_argument("file", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--until", type=float, default=float("inf"))
    parser.add_argument("--heart", type=int)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, which some images set, would make the truth TF32
    torch.set_float32_matmul_precision("highest")
    run = Run.open(args.file, args.heart)
    try:
        perform(args.stage, Context(run, torch.device(args.device), args.small, args.until))
    except KeyboardInterrupt:
        run.save()
        return 130
    except harness.DeviceLostError as lost:
        print(f"the GPU no longer answers: {lost}", flush=True)
        run.save()
        sys.stdout.flush()
        os._exit(EXIT_LOST)  # an orderly end would ask the GPU again
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

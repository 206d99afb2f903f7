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
import encoder
import harness
import machine
import memory
import ops
import pretraining
import profiles
import proof
import torch
import tune
from gate import Candidate, Case
from op_rows import DTYPES
from record import Run
from supervise import EXIT_LOST

from bert_fast.accuracy import short

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
    if context.run.data["suite"] in ("gpu", "cpu"):
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
        for name in ops.names():
            case, candidates = ops.case(name, context.device, dtype, "odd")
            ours = [c for c in candidates if c.name == "bert_fast"]
            _each(context, case, ours, harness.prove)
            seen.append(case.name)
        print(f"{short(dtype)}: {context.run.summary(seen)}", flush=True)


def _ops(context: Context) -> None:
    """The table of all ops."""
    names = ops.names()
    for i, name in enumerate(names):
        share = max(1.0, context.left / (len(names) - i))
        dtype = torch.bfloat16 if context.device.type == "cuda" else torch.float32
        size = "small" if context.small else "full"
        case, candidates = ops.case(name, context.device, dtype, size)
        _measure(context.within(4 * share), case, candidates, rounds=30, seconds=share / 2)


def _encoder(context: Context, name: str, full: bool) -> None:
    case, candidates = encoder.case(name, context.device, small=context.small, full=full)
    rounds = 10 if "case 5" in name or "case 6" in name else 30
    _measure(context, case, candidates, rounds=rounds, least=3, seconds=context.left / 2)


def _pretraining(context: Context, name: str, full: bool) -> None:
    case, candidates = pretraining.case(name, context.device, small=context.small, full=full)
    _measure(context, case, candidates, rounds=20, least=3, seconds=context.left / 2)


def _on_cpu(context: Context, name: str) -> None:
    """A row of the CPU's table: five rounds, and more while 20 seconds last."""
    module = encoder if name in encoder.SPECS else pretraining
    case, candidates = module.case(name, context.device, small=context.small, full=True)
    chosen = [c for c in candidates if c.name in ("bert_fast", *module.CPU_PEERS)]
    _measure(context, case, chosen, rounds=15, least=5, seconds=20.0)


def _memory(context: Context) -> None:
    """The memory of every candidate that was measured, each in a process of its own."""
    run = context.run
    rows = [(r["case"], r["candidate"]) for r in run.data["rows"] if r["state"] == "measured"]
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
    except Exception:
        traceback.print_exc()
    gc.collect()
    if context.device.type == "cuda":
        torch.cuda.empty_cache()


def _cases(context: Context, number: str, full: bool) -> None:
    """Every part of a case of the targets."""
    parts = [
        (measure, name)
        for module, measure in ((encoder, _encoder), (pretraining, _pretraining))
        for name in module.SPECS
        if name == f"case {number}" or name.startswith(f"case {number} ")
    ]
    for i, (measure, name) in enumerate(parts):
        measure(context.within(context.left / (len(parts) - i)), name, full)


def _profile(context: Context) -> None:
    """The kernels of a forward and of a training step."""
    found = {}
    for module, name in ((encoder, "case 3"), (pretraining, "case 8")):
        case, (ours, *_) = module.case(name, context.device, small=context.small)
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
    elif stage.startswith("cpu "):
        _on_cpu(context, stage)
    elif stage.startswith("tune "):
        _tune(context, stage.removeprefix("tune "))
    elif stage.startswith("case "):
        number = stage.split()[1]
        _cases(context, number, full=stage.endswith("in full"))
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

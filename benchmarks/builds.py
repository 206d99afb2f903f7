"""Builds the extension and compiles the Triton kernels, side by side."""

import os
import subprocess
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

import torch
from record import ROOT, Run, clean

_ENOUGH_ROOM = 14  # processes at most: each holds a context on the GPU


def everything(run: Run, device: torch.device) -> None:
    """Build and compile what there is; the run's "build" says what, and what is absent."""
    start = time.monotonic()
    extension = subprocess.Popen(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=ROOT,
        env=os.environ | {"BERT_FAST_EXT": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    found: dict[str, Any] = {"kernels": compile_kernels(device)}
    said, _ = extension.communicate()
    found["extension"] = {"built": extension.returncode == 0, "seconds": time.monotonic() - start}
    if extension.returncode:
        found["extension"]["why"] = clean(said[-400:])
        print(said)
    run.set("build", found)
    for what, state in found.items():
        print(f"  {what}: {state}")


def compile_kernels(device: torch.device) -> dict[str, Any]:
    """Run what the stages will, once and in parallel, so that Triton's cache holds the kernels."""
    if device.type != "cuda":
        return {"compiled": [], "why": "no GPU: kernels are compiled for the one that runs them"}
    calls = triton_calls()
    if not calls:
        return {"compiled": [], "why": "no op has a Triton kernel"}
    start = time.monotonic()
    workers = min(len(calls), os.cpu_count() or 1, _ENOUGH_ROOM)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        said = {", ".join(call): pool.submit(first_call, *call) for call in calls}
    said = {call: _outcome(future) for call, future in said.items()}
    failed = {call: why for call, why in said.items() if why}
    compiled = [call for call in said if call not in failed]
    return {"compiled": compiled, "failed": failed, "seconds": time.monotonic() - start}


def _outcome(future: Future[str]) -> str:
    """Return what went wrong; that includes the death of the process, which ends the others too."""
    try:
        return future.result()
    except BrokenProcessPool as error:
        return clean(f"{type(error).__name__}: {error}")


def triton_calls() -> list[tuple[str, str, str]]:
    """Return (row, dtype, size) of calls that want all kernels of the smoke and ops stages.

    Of rows that make the same call with other lengths the last is enough.
    """
    import ops
    from op_rows import DTYPES

    from bert_fast.ops import implementations

    served = {
        op for op, by_device in implementations().items() if by_device["cuda"].name == "triton"
    }
    rows = [(name, row) for name, row in ops.ROWS.items() if row.op in served]
    names = {(row.op, row.p, row.call): name for name, row in rows}.values()
    odd = [(name, str(dtype)[6:], "odd") for name in names for dtype in DTYPES]
    return [*((name, "bfloat16", "large") for name in names), *odd]


def first_call(name: str, dtype: str, size: str) -> str:
    """Run an op row once on CUDA; return what went wrong."""
    import checkout  # noqa: F401
    import ops

    try:
        case, candidates = ops.case(name, torch.device("cuda"), getattr(torch, dtype), size)
        ours = next(c for c in candidates if c.name == "bert_fast")
        ours.prepare().run(case.inputs[0])
        torch.cuda.synchronize()
    except Exception as error:
        return clean(f"{type(error).__name__}: {error}")
    return ""

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

_ENOUGH_ROOM = 8  # processes at most: each holds a context on the GPU


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
    """Run every op that has a Triton kernel once, in parallel, so that Triton's cache holds it."""
    if device.type != "cuda":
        return {"compiled": [], "why": "no GPU: kernels are compiled for the one that runs them"}
    names = triton_cases()
    if not names:
        return {"compiled": [], "why": "no op has a Triton kernel"}
    start = time.monotonic()
    workers = min(len(names), os.cpu_count() or 1, _ENOUGH_ROOM)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        said = {name: pool.submit(first_call, name) for name in names}
    said = {name: _outcome(future) for name, future in said.items()}
    failed = {name: why for name, why in said.items() if why}
    compiled = [name for name in names if name not in failed]
    return {"compiled": compiled, "failed": failed, "seconds": time.monotonic() - start}


def _outcome(future: Future[str]) -> str:
    """Return what went wrong; that includes the death of the process, which ends the others too."""
    try:
        return future.result()
    except BrokenProcessPool as error:
        return clean(f"{type(error).__name__}: {error}")


def triton_cases() -> list[str]:
    """Return the op rows that a Triton kernel serves on CUDA."""
    import ops

    from bert_fast.ops import implementations

    served = {
        op for op, by_device in implementations().items() if by_device["cuda"].name == "triton"
    }
    return [name for name in ops.names() if ops.ROWS[name].op in served]


def first_call(name: str) -> str:
    """Run an op row once on CUDA; return what went wrong."""
    import checkout  # noqa: F401
    import ops

    try:
        case, candidates = ops.case(name, torch.device("cuda"), torch.bfloat16, "full")
        ours = next(c for c in candidates if c.name == "bert_fast")
        ours.prepare().run(case.inputs[0])
        torch.cuda.synchronize()
    except Exception as error:
        return clean(f"{type(error).__name__}: {error}")
    return ""

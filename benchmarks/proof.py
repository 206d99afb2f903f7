"""Proofs on the device: the tests that run there, and NVIDIA's compute-sanitizer over every op."""

import os
import re
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from record import ROOT, Run, clean

SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
_SANITIZER_ERROR = 86  # the exit status we ask for when a sanitizer finds something
_LAST_WORDS = 5.0  # seconds for the output of a command that was killed


def tests(run: Run, until: float) -> None:
    """Run the tests that take a device; on a GPU machine that is the GPU.

    Raises:
        RuntimeError: a test failed.
    """
    start = time.monotonic()
    command = [sys.executable, "-m", "pytest", "tests", "-m", "device and not long", "-q"]
    command += ["-p", "checkout"]
    if find_spec("xdist"):
        # most of the time goes into compiling kernels, on the processor
        command += ["-n", str(min(12, os.cpu_count() or 1)), "--dist", "loadfile"]
    command += ["-p", "no:cacheprovider", "--override-ini=xfail_strict=true"]
    status, said = _run(command, until, PYTHONPATH=str(Path(__file__).parent))
    last = next((line for line in reversed(said.splitlines()) if line.strip()), "")
    last = last if status is not None else f"cut short, its time was over: {last}"
    _keep(run, "tests", status=status, says=clean(last), seconds=time.monotonic() - start)
    if status:
        raise RuntimeError(f"tests: want no failure, got: {clean(last)}")


def sanitizer(tool: str, run: Run, device: torch.device, until: float) -> None:
    """Run the smoke stage under a tool of compute-sanitizer.

    Raises:
        RuntimeError: it found something, or the stage did not pass under it.
    """
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if device.type != "cuda" or not Path(program).exists():
        why = "no GPU" if device.type != "cuda" else "compute-sanitizer is not installed"
        _keep(run, tool, status=None, says=f"absent: {why}", seconds=0.0)
        return
    start = time.monotonic()
    part = run.path.with_name(f"{run.path.stem}-{tool}.part")
    Run.start(part, "smoke", run.data["command"], rehearsal=True)
    stage = [str(Path(__file__).with_name("stages.py")), "smoke", str(part), "--device", "cuda"]
    options = ["--tool", tool, "--error-exitcode", str(_SANITIZER_ERROR), "--print-limit", "20"]
    # PyTorch's caching allocator would hide accesses past the end of a tensor
    status, said = _run(
        [program, *options, sys.executable, *stage], until, PYTORCH_NO_CUDA_MEMORY_CACHING="1"
    )
    passed = sum(row["state"] == "passed" for row in Run.open(part).data["rows"])
    part.unlink()
    short = "" if status is not None else ", cut short: its time was over"
    summary = re.findall(r"=+ (.*SUMMARY: .*)", said)
    says = f"{summary[-1] if summary else 'no summary'}; {passed} cases passed under it{short}"
    _keep(run, tool, status=status, says=says, seconds=time.monotonic() - start)
    if status or (status == 0 and not passed):
        raise RuntimeError(f"{tool}: {says}")


def _run(command: list[str], until: float, **variables: str) -> tuple[int | None, str]:
    """Return exit status and output of a command; status None if its time was over."""
    left = None if until == float("inf") else max(1.0, until - time.monotonic() - 2)
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    try:
        said, _ = process.communicate(timeout=left)
        status = process.returncode
    except subprocess.TimeoutExpired:
        process.kill()
        said, status = _last_words(process), None
    print(said[-6000:], flush=True)
    return status, said


def _last_words(process: subprocess.Popen) -> str:
    """Return what a killed process had said; its children may keep the pipe open."""
    try:
        return process.communicate(timeout=_LAST_WORDS)[0]
    except subprocess.TimeoutExpired as error:
        said = error.output or b""
        return said if isinstance(said, str) else said.decode(errors="replace")


def _keep(run: Run, what: str, **found: Any) -> None:
    """Write what a proof found into the run's "proof"."""
    run.set("proof", {**run.data.get("proof", {}), what: found})
    print(f"  {what}: {found['says']}")

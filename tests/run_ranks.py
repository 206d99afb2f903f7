"""Processes of a distributed run, as tests start them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

TIMEOUT = 240  # seconds; about 15 are needed


def run_ranks(worker: str, ranks: int, folder: Path) -> list[Any]:
    """What each rank of a worker (RANK RENDEZVOUS RESULTS) saved."""
    here = str(Path(__file__).parent)
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), here]))
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    started = []
    for rank in range(ranks):
        results = folder / f"rank{rank}.pt"
        command = [sys.executable, worker, str(rank), str(folder / "rendezvous"), results]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append((subprocess.Popen(command, env=env, cwd=folder, **pipes), results))
    try:
        for process, _ in started:
            printed, _ = process.communicate(timeout=TIMEOUT)
            assert process.returncode == 0, printed
    finally:
        for process, _ in started:
            process.kill()
            process.wait()
    return [torch.load(results) for _, results in started]

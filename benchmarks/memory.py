"""How much memory one candidate of a CPU case takes, alone in a process of its own.

    python benchmarks/memory.py CASE CANDIDATE [--small]

Prints one line of JSON, in bytes of the process's resident set:

- imported: after this project's and the peer's packages were imported, before any weight;
- held: with the candidate ready and one call made, before the call that is measured;
- peak: the most during that call: what a process that serves this model needs;
- lifetime: the most at any time: weights drawn, copied, exported or compiled.

It is apart from the timing: there all candidates are loaded side by side. Freed memory that the C
library holds back is given to the system first, where it can be. It reads Linux's /proc.
"""

import argparse
import ctypes
import gc
import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import encoder
import stock_bert
import suites
import torch
from gate import AbsentError, Prepared

_TRANSFORMERS = "transformers.models.bert.modeling_bert"  # the package alone imports little
_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


def of(case: str, candidate: str, small: bool, seconds: float) -> dict[str, int]:
    """Return what this file prints for a candidate.

    Args:
        case: of the encoder or of pre-training.
        candidate: its name in the full list.
        small: the rehearsal's sizes.
        seconds: for the process.

    Raises:
        RuntimeError: the process failed, or its time was over.
    """
    argv = [sys.executable, __file__, case, candidate, *(["--small"] if small else [])]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=max(seconds, 1.0))
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"memory: not measured after {seconds:.0f} s") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        raise RuntimeError(f"memory: its process ended with {done.returncode}: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _resident(name: str) -> int:
    """Return VmRSS, what is resident, or VmHWM, the most since the last reset, in bytes."""
    return int(re.search(rf"^{name}:\s*(\d+) kB$", _STATUS.read_text(), re.MULTILINE)[1]) * 1024


def _give_back() -> None:
    """Give memory that is free back to the system."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def alone(case: str, candidate: str, small: bool) -> tuple[Prepared, Any]:
    """Return one candidate of a case, ready, and its first inputs; nothing else stays in memory."""
    module = suites.MODULES[suites.family_of(case)]
    parts = module.parts_of(case, torch.device("cpu"), small, full=True)
    prepared = next(c for c in parts.candidates if c.name == candidate).prepare()
    encoder.state_of.cache_clear()
    return prepared, parts.inputs[0]


def measure(case: str, candidate: str, small: bool = False) -> dict[str, int]:
    """Return the memory of a candidate in this process; it should do nothing else."""
    if candidate != "bert_fast":
        stock_bert.need("onnxruntime" if candidate.startswith("onnxruntime") else _TRANSFORMERS)
    imported = _resident("VmRSS")
    return {"imported": imported} | of_a_call(*alone(case, candidate, small))


def of_a_call(prepared: Prepared, inputs: Any) -> dict[str, int]:
    """Return "held", "peak" and "lifetime" of what is ready, in this process."""
    prepared.run(inputs)
    _give_back()
    held = _resident("VmRSS")
    lifetime = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    _RESET.write_text("5")  # the most since now
    prepared.run(inputs)
    peak = _resident("VmHWM")
    return {"held": held, "peak": peak, "lifetime": max(lifetime, peak)}


def main() -> int:
    """Measure one candidate."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("case")
    parser.add_argument("candidate")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    try:
        found = measure(args.case, args.candidate, args.small)
    except (AbsentError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

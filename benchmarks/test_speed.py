"""pytest-benchmark: a few ops and a small encoder, each timed only if its answers are right.

    python -m pytest benchmarks --benchmark-only

For a first look and for comparing two states of the code on one machine. What counts as a
measurement is made by `run.py`, beside all peers and with the machine's ceilings.
"""

from typing import Any

import checkout  # noqa: F401
import encoder
import gate
import ops
import pytest
import torch
from gate import Candidate, Case

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")

OPS = (
    "attention s128",
    "add_layer_norm dropout",
    "add_layer_norm_bwd",
    "linear_gelu",
    "linear_cross_entropy",
    "unpad",
)
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32


def measure(benchmark: Any, case: Case, candidates: list[Candidate]) -> None:
    """Pass bert_fast through the gate, then time it on the sets of inputs in turn.

    Raises:
        RefusedError: the answers are wrong; nothing was timed.
    """
    prepared = next(c for c in candidates if c.name == "bert_fast").prepare()
    error = gate.check(case, prepared)
    count = 0

    def call() -> None:
        nonlocal count
        prepared.run(case.inputs[count % len(case.inputs)])
        count += 1
        if CUDA:
            torch.cuda.synchronize()  # else the time would be that of launching

    benchmark.extra_info |= {
        "device": DEVICE.type,
        "dtype": case.dtype,
        "tokens": case.work.tokens,
        "error": {name: error[name] for name in ("own", "baseline", "worst")},
        **prepared.notes,
    }
    benchmark.pedantic(call, rounds=20, iterations=1, warmup_rounds=2)


@pytest.mark.parametrize("name", OPS)
def test_op(benchmark, name):
    measure(benchmark, *ops.case(name, DEVICE, DTYPE, "large" if CUDA else "small"))


def test_encoder(benchmark):
    name = "case 7" if CUDA else "cpu 16x128 33%"
    measure(benchmark, *encoder.case(name, DEVICE, small=not CUDA))

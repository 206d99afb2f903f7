"""Kernels touch what is theirs: guard pages, 64-bit offsets, no memory that nobody wrote."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import op_cases
import torch
from interpreter_tools import (
    FUNCTIONS,
    SIDES,
    double,
    every_kernel_case,
    in_interpreter,
    some_dtypes,
)
from op_cases import assert_same_bits, check, gradients, random_gradient

poison = op_cases.poison

# --- guard pages ---------------------------------------------------------------------------------

WORKER = Path(__file__).with_name("guard_pages_worker.py")


def deaths(side: str, calls: list[str]) -> list[str]:
    """The calls that died of a guard page; a process after another until all were made."""
    dead = []
    while calls:
        ran = subprocess.run(
            [sys.executable, str(WORKER), side, *calls],
            capture_output=True, text=True, timeout=1800, check=False,
        )  # fmt: skip
        *_, last = ["nothing", *ran.stdout.split()]
        if last == "end":
            return dead
        assert ran.returncode == -signal.SIGSEGV, f"{last}: {ran.stderr[-2000:]}"
        dead.append(last)
        calls = calls[calls.index(last) + 1 :]
    return dead


def drawn(name: str, numbers: range) -> list[str]:
    return [f"{name}:{i}:{('float32', 'float16')[i % 2]}" for i in numbers]


@in_interpreter
@pytest.mark.parametrize("side", SIDES)
def test_guard_pages(side):
    """Before and after every tensor of every kernel; one that reads too far dies of them."""
    calls = [call for name in FUNCTIONS for call in drawn(name, range(3))]
    assert deaths(side, [*calls, "control"]) == ["control"]


@in_interpreter
@pytest.mark.parametrize("side", SIDES)
def test_guard_pages_of_what_nobody_checked(side):
    """Ids, labels and borders that point outside: nothing is touched there."""
    functions = {"embed", "linear_cross_entropy", "attention"} & set(FUNCTIONS)
    assert deaths(side, [f"astray:{name}" for name in sorted(functions)]) == []


@in_interpreter
@pytest.mark.long
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_guard_pages_of_60_shapes(name, side):
    assert deaths(side, drawn(name, range(100, 160))) == []


# --- memory that nobody wrote --------------------------------------------------------------------


@in_interpreter
def test_poison_shows_what_was_not_written():
    """A kernel that leaves the last element out leaves a NaN."""
    x = torch.ones(100)
    for n in (99, 100):
        y = torch.empty(100)
        double[(1,)](x, y, n, 0, BLOCK=128, MASKED=True)
        assert y.isnan().any() == (n == 99)


@every_kernel_case
@some_dtypes
def test_poison(make, dtype, kernel_device):
    """Outputs, gradients and scratch begin as NaN: right answers, by the rule of the dtype."""
    check(make().to(dtype, kernel_device), norm=2)  # of few numbers


@every_kernel_case
def test_the_same_bits_twice(make, kernel_device):
    """Whatever the memory held before: NaN, or what the allocator gives."""
    case = make().to(torch.float32, kernel_device)
    dy = random_gradient(case.call())
    poisoned = gradients(case, case.call, dy)
    torch.use_deterministic_algorithms(False)
    assert_same_bits(gradients(case, case.call, dy), poisoned)

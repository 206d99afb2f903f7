"""Calls between guard pages: `python guard_pages_worker.py SIDE CALL...`, each named on stdout.

A call is FUNCTION:NUMBER:DTYPE, drawn from the number, or `control`: a kernel that reads too far.
"""

import os
import random
import sys

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import torch
from interpreter_tools import SIDES, double, draw, guard_pages, kernels_on_cpu
from op_cases import gradients


def control(side: str) -> None:
    """Reads past the end, or before the beginning."""
    x, y = torch.ones(1000), torch.zeros(1000)
    double[(4,)](x, y, 1000, 0, BLOCK=256, MASKED=True)
    assert torch.equal(y, 2 * x)
    first = -1 if side == "before" else 0
    double[(4,)](x, y, 1000, first, BLOCK=256, MASKED=False)


def run(name: str, number: str, dtype: str) -> None:
    torch.manual_seed(int(number))
    case = draw(name, random.Random(f"{name} {number}"), many=int(number) >= 100)
    case = case.to(getattr(torch, dtype))
    gradients(case, case.call)


if __name__ == "__main__":
    side, *calls = sys.argv[1:]
    assert side in SIDES
    torch.set_num_threads(1)
    with kernels_on_cpu(), guard_pages(side):
        for call in calls:
            print(call, flush=True)
            if call == "control":
                control(side)
            else:
                run(*call.split(":"))
    print("end", flush=True)

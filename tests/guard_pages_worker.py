"""Calls between guard pages: `python guard_pages_worker.py SIDE CALL...`, each named on stdout.

A call is FUNCTION:NUMBER:DTYPE, drawn from the number, `astray:FUNCTION`, given ids, labels or
borders that point outside, or `control`: a kernel that reads too far.
"""

import os
import random
import sys

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import torch
from interpreter_tools import SIDES, double, draw, guard_pages, kernels_on_cpu, raw
from op_cases import attention_case, cross_entropy_case, embed_case, gradients
from op_formulas import SEED


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


def astray(name: str) -> None:
    """Forward and backward, below the checks: on a GPU nobody has looked at such numbers."""
    away = torch.tensor([0, -1, -5, 1, 2, 7, 11, 64, 2**31, 2**40, -(2**62)])
    T = len(away)
    if name == "linear_cross_entropy":
        raw(name, **cross_entropy_case(T).inputs | {"labels": away}, with_grad=True)
        return
    options = {"p": 0.3, "seed": torch.tensor([SEED]), "site": 1}
    if name == "embed":
        inputs = embed_case(T, 20).inputs
        inputs |= {f"{kind}_ids": away for kind in ("input", "position", "token_type")}
        out_dtype = torch.float32
        y, z, mean, rstd = raw(name, **inputs, **options, eps=1e-5, out_dtype=out_dtype)
        saved = {"z": z, "mean": mean, "rstd": rstd}
        raw("embed_bwd", dy=torch.ones_like(y), **inputs, **saved, **options, pad_id=0)
        return
    qkv = attention_case((T,), K=16).inputs["qkv"]
    cu_seqlens = torch.tensor([0, 9, 4, 2000, -5, 2**31 - 1, 3], dtype=torch.int32)
    inputs = {"qkv": qkv, "cu_seqlens": cu_seqlens, "max_len": 200, "work": None}
    o, lse = raw(name, **inputs, **options)
    raw("attention_bwd", do=torch.ones_like(o), o=o, lse=lse, **inputs, **options)


if __name__ == "__main__":
    side, *calls = sys.argv[1:]
    assert side in SIDES
    torch.set_num_threads(1)
    with kernels_on_cpu(), guard_pages(side):
        for call in calls:
            print(call, flush=True)
            if call == "control":
                control(side)
            elif call.startswith("astray:"):
                astray(call.removeprefix("astray:"))
            else:
                run(*call.split(":"))
    print("end", flush=True)

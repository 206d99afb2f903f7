"""Planted kernels with what `aot_compile` and `aot_batches` must find, each launched."""

import random
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def _good_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """Sums in fp32, a product in IEEE arithmetic."""
    at = tl.arange(0, BLOCK)
    square = at[:, None] * BLOCK + at[None, :]
    x = tl.load(x_ptr + square)
    y = tl.dot(x, x, input_precision="ieee") + x.to(tl.float32)
    tl.store(y_ptr + square, y.to(y_ptr.dtype.element_ty))


@triton.jit
def _spilling_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """All of the block is needed again after its sum."""
    x = tl.load(x_ptr + tl.arange(0, BLOCK)).to(tl.float32)
    tl.store(y_ptr + tl.arange(0, BLOCK), x * tl.sum(x, axis=0))


@triton.jit
def _atomic_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.atomic_add(y_ptr + at // 2, tl.load(x_ptr + at).to(tl.float32))


@triton.jit
def _bf16_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """The sum is made in bf16."""
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at) + tl.load(y_ptr + at))


@triton.jit
def _bf16_reduction_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(y_ptr, tl.reduce(x, 0, _add))


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _tf32_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """Nobody asked for TF32: it is Triton's default."""
    at = tl.arange(0, BLOCK)
    square = at[:, None] * BLOCK + at[None, :]
    x = tl.load(x_ptr + square)
    tl.store(y_ptr + square, tl.dot(x, x))


@triton.jit
def _asked_tf32_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    at = tl.arange(0, BLOCK)
    square = at[:, None] * BLOCK + at[None, :]
    x = tl.load(x_ptr + square)
    tl.store(y_ptr + square, tl.dot(x, x, input_precision=PRECISION))


@triton.jit
def _large_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """Tiles of which several are on their way through shared memory at once."""
    at = tl.arange(0, BLOCK)
    square = at[:, None] * BLOCK + at[None, :]
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for i in range(0, 8):
        x = tl.load(x_ptr + i * BLOCK * BLOCK + square)
        y = tl.load(y_ptr + i * BLOCK * BLOCK + square)
        total = tl.dot(x, y, total)
    tl.store(y_ptr + square, total.to(y_ptr.dtype.element_ty))


@triton.jit
def _wide_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """As many registers as are asked for, by more threads than there is room for."""
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, x * tl.sum(x, axis=0))


@triton.jit
def _broken_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """No power of 2."""
    tl.store(y_ptr + tl.arange(0, BLOCK + 1), 0.0)


@triton.constexpr_function
def _die():
    import os  # not of this module: Triton goes through what that holds

    os.kill(os.getpid(), 9)


@triton.jit
def _deadly_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """Compiling it takes the compiler's process down."""
    _die()


@triton.jit
def _specialised_kernel(x_ptr, y_ptr, T, BLOCK: tl.constexpr):
    """T is compiled in where it is 1 or a multiple of 16."""
    tl.store(y_ptr + tl.arange(0, BLOCK), T)


@triton.jit
def _constant_kernel(x_ptr, y_ptr, T: tl.constexpr, BLOCK: tl.constexpr):
    tl.store(y_ptr + tl.arange(0, BLOCK), T)


@triton.jit(do_not_specialize=["T"])
def _steady_kernel(x_ptr, y_ptr, T, BLOCK: tl.constexpr):
    tl.store(y_ptr + tl.arange(0, BLOCK), T)


def _launch(kernel: Any, dtype: torch.dtype, BLOCK: int, *args: Any, **options: Any) -> None:
    x = torch.zeros(16, dtype=dtype)
    kernel[(1,)](x, x.clone(), *args, BLOCK=BLOCK, **{"enable_fp_fusion": True} | options)


def record(recorder: Any) -> list[str]:
    """Launch each control; its label is its name in the tests."""
    fp32, bf16 = torch.float32, torch.bfloat16
    controls: dict[str, Callable[[], None]] = {
        "good": lambda: _launch(_good_kernel, bf16, 32),
        "good-fp32": lambda: _launch(_good_kernel, fp32, 32),
        "spill": lambda: _launch(_spilling_kernel, bf16, 16384, num_warps=1),
        "atomic": lambda: _launch(_atomic_kernel, fp32, 128),
        "bf16": lambda: _launch(_bf16_kernel, bf16, 128),
        "bf16-reduction": lambda: _launch(_bf16_reduction_kernel, bf16, 128),
        "tf32": lambda: _launch(_tf32_kernel, fp32, 32),
        "tf32-asked": lambda: _launch(_asked_tf32_kernel, fp32, 32, PRECISION="tf32"),
        "shared": lambda: _launch(_large_kernel, bf16, 128, num_warps=8, num_stages=6),
        "registers": lambda: _launch(_wide_kernel, fp32, 65536, num_warps=16, maxnreg=255),
        "broken": lambda: _launch(_broken_kernel, fp32, 128),
        "deadly": lambda: _launch(_deadly_kernel, fp32, 128),
        "fusion": lambda: _launch(_good_kernel, bf16, 32, enable_fp_fusion=None),
    }
    for recorder.label, control in controls.items():
        control()
    return list(controls)


def record_batches(recorder: Any, count: int) -> dict[str, int]:
    """How many variants each kernel that takes the batch's size has after that many batches."""
    random.seed(0)
    kernels = _specialised_kernel, _constant_kernel, _steady_kernel
    for T in [1, 16, 100, *(random.randint(0, 1000) for _ in range(count))]:
        for kernel in kernels:
            _launch(kernel, torch.float32, 16, T)
    found = [v["kernel"].partition(":")[2] for v in recorder.variants.values()]
    return {kernel.__name__: found.count(kernel.__name__) for kernel in kernels}

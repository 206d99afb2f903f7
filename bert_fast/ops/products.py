"""Matrix products on the CPU, by the faster of two libraries.

PyTorch's linear in fp32 is its BLAS's (MKL on x86). oneDNN, which PyTorch holds too, is far faster
on some processors. Which one is better here is measured at first use, and their results differ in
the last bits: `set_cpu_library` fixes the choice. oneDNN could add GELU on the way; it does not, so
that a layer has the same bits whether or not gradients are on.

oneDNN's products of few rows, and in bf16 or by small weights those of any number, are faster yet
with weights packed in its own order, which costs the weights' memory once more. A weight is packed
when an inference with such a product meets it again, where a measurement says that this gains
something and changes no bit. The packed one lives beside the weight, in no module, until the weight
is written to or dies.
"""

import functools
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from bert_fast.ops import invariant, kept

LIBRARIES = ("blas", "onednn")
_ROUNDS = 8
_ROWS, _COLUMNS = 192, 768  # of the product that is measured: about 1 ms
# BERT-base's products gained 40 % of packing at 16 rows, 10 % at 128, 5 % at 256, 4 % at 1,024 in
# fp32, and 80, 18 and 10 % at 16, 128 and 1,024 rows in bf16 (2 cores of an AMD EPYC, 2026-11-22).
_PACKED_ROWS = {torch.float32: 256, torch.bfloat16: 2**62}
# MiniLM's gained 3 to 11 % in fp32 at 128 to 2,048 rows (the same machine and day), and weights of
# its size take little memory.
_SMALL_WEIGHT = 2**20  # numbers
_PROBES = ((2, 64, 16), (5, 33, 100), (64, 64, 16), (33, 100, 33), (16, 768, 768))  # rows, D, F
_FEW_ROWS = 16  # of the product that says whether packing is worth it

_lock = threading.Lock()
_chosen: str | None = None
_times: dict[str, float] = {}


def _has_onednn() -> bool:
    names = "_linear_pointwise", "_reorder_linear_weight"
    has = (hasattr(torch.ops.mkldnn, name) for name in names)
    return torch.backends.mkldnn.is_available() and all(has)


def _onednn(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    if torch.is_grad_enabled():  # then it takes other kernels, of other bits
        with torch.no_grad():
            return _onednn(x, w, b)
    return torch.ops.mkldnn._linear_pointwise(x, w, b, "none", [], None)


def cpu_library() -> str:
    """Return the library of fp32 products on the CPU, "blas" or "onednn".

    It is measured when first asked for, unless `set_cpu_library` or the environment variable
    BERT_FAST_CPU_LIBRARY has said which.
    """
    if _chosen is None:
        with _lock:
            if _chosen is None:
                set_cpu_library(os.environ.get("BERT_FAST_CPU_LIBRARY") or _faster())
    return _chosen


def set_cpu_library(name: str | None) -> None:
    """Fix the library of fp32 products on the CPU.

    Runs that are to agree in every bit need the same, and the same number of threads.

    Args:
        name: "blas", "onednn", or None: measure anew at the next use.

    Raises:
        ValueError: it is none of these, or this build of PyTorch lacks oneDNN.
    """
    global _chosen
    if name not in (*LIBRARIES, None):
        raise ValueError(f"cpu library: want {' or '.join(LIBRARIES)}, got {name!r}")
    if name == "onednn" and not _has_onednn():
        raise ValueError("cpu library: want blas, since this PyTorch has no oneDNN, got onednn")
    _chosen = name
    kept.forget()


@contextmanager
def fixed_cpu_library(name: str) -> Iterator[None]:
    """Fix the library inside the block, as `set_cpu_library` does."""
    before = _chosen
    set_cpu_library(name)
    try:
        yield
    finally:
        set_cpu_library(before)


def cpu_library_times() -> dict[str, float]:
    """Return milliseconds of each library in the measurement; empty where none was made."""
    return dict(_times)


@torch.no_grad()
def _least_times(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Return the least milliseconds of a few calls of each, in turn."""
    least = dict.fromkeys(calls, float("inf"))
    for i in range(1 + _ROUNDS):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if i:  # the first call makes its kernels
                least[name] = min(least[name], 1e3 * (time.perf_counter() - began))
    return least


def _faster() -> str:
    """Return the faster library."""
    if not _has_onednn():
        return "blas"
    x, w = torch.ones(_ROWS, _COLUMNS), torch.ones(_COLUMNS, _COLUMNS)
    calls = {"blas": F.linear, "onednn": _onednn}
    _times.update(_least_times({name: partial(f, x, w, None) for name, f in calls.items()}))
    return min(_times, key=_times.get)


def _by_onednn(dtype: torch.dtype) -> bool:
    """Return whether oneDNN serves products in that dtype."""
    if dtype == torch.float32:
        return cpu_library() == "onednn"
    return dtype == torch.bfloat16 and _has_onednn() and _has_bf16()


@functools.cache
def _has_bf16() -> bool:
    """Return whether the processor has what oneDNN needs for bf16."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def linear(x: Tensor, w: Tensor, b: Tensor | None, *, reuse: bool = False) -> Tensor:
    """Return x w^T + b (T, F) for rows x (T, D).

    With `reuse` the weight is expected again as it is: it may be packed.
    """
    if not (x.numel() and w.numel()):
        return F.linear(x, w, b)
    by_onednn = _by_onednn(x.dtype)
    multiply, pack = (_onednn, _pack if reuse else None) if by_onednn else (F.linear, None)
    fixed = invariant.schedule(multiply, w, b, pack) if invariant.is_batch_invariant() else None
    if by_onednn:
        packed = None
        if not reuse:  # writes that PyTorch does not count may follow
            _packed.pop(w, None)
        elif fixed is None or fixed.packs:
            packed = _packed_weight(w, x.shape[0] if fixed is None else fixed.rows)
        w, b = w if packed is None else packed, None if b is None else b.contiguous()
    return multiply(x, w, b) if fixed is None else invariant.in_calls(fixed.rows, multiply, x, w, b)


# --- packed weights ------------------------------------------------------------------------------


class _Packed(NamedTuple):
    """What is known of a weight: its state when last seen, and itself in oneDNN's order."""

    state: Any
    packed: Tensor | None


_packed = kept.table()


@functools.cache
def packs_weights(dtype: torch.dtype) -> bool:
    """Return whether products in that dtype gain by packed weights here, and lose no bit."""
    wish = os.environ.get("BERT_FAST_CPU_PACK")
    return wish != "0" if wish else _keeps_bits(dtype) and _gains(dtype)


def _keeps_bits(dtype: torch.dtype) -> bool:
    """Return whether products of several rows are the same by plain and by packed weights."""
    generator = torch.Generator().manual_seed(0)
    for rows, D, F_ in _PROBES:
        x, w = (torch.rand(n, D, generator=generator).sub_(0.5).to(dtype) for n in (rows, F_))
        if not torch.equal(_onednn(x, w, None), _onednn(x, _pack(w), None)):
            return False
    return True


def _gains(dtype: torch.dtype) -> bool:
    """Return whether a product of few rows is faster by a packed weight."""
    x, w = (torch.ones(n, _COLUMNS, dtype=dtype) for n in (_FEW_ROWS, _COLUMNS))
    weights = {"plain": w, "packed": _pack(w)}
    times = _least_times({name: partial(_onednn, x, t, None) for name, t in weights.items()})
    return times["packed"] < 0.95 * times["plain"]


def _pack(w: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(w.detach(), _ROWS)


def _packed_weight(w: Tensor, rows: int) -> Tensor | None:
    """Return the weight packed, if that is worth it: it was met before, and rows are few."""
    # a product of one row has other bits by a packed weight; inference tensors have no version
    if rows == 1 or w.is_inference() or not packs_weights(w.dtype):
        return None
    seen, state = _packed.get(w), kept.state_of(w)
    if seen is None or seen.state != state:
        kept.watch_optimizers()
        _packed[w] = _Packed(state, None)
        return None
    if seen.packed is None and (rows <= _PACKED_ROWS[w.dtype] or w.numel() <= _SMALL_WEIGHT):
        seen = _packed[w] = _Packed(state, _pack(w))
    return seen.packed

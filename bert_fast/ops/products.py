"""Matrix products on the CPU, by the faster of two libraries.

PyTorch's linear in fp32 is its BLAS's (MKL on x86). oneDNN, which PyTorch holds too, is far faster
on some processors. Which one is better here is measured at first use, and their results differ in
the last bits: `set_cpu_library` fixes the choice. oneDNN could add GELU on the way; it does not, so
that a layer has the same bits whether or not gradients are on.
"""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

LIBRARIES = ("blas", "onednn")
_ROUNDS = 8
_ROWS, _COLUMNS = 192, 768  # of the product that is measured: about 1 ms

_lock = threading.Lock()
_chosen: str | None = None
_times: dict[str, float] = {}


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _onednn(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, w, b, "none", [], None)


def cpu_library() -> str:
    """Return the library of fp32 products on the CPU, "blas" or "onednn".

    It is measured when first asked for, unless `set_cpu_library` or the environment variable
    BERT_FAST_CPU_LIBRARY has said which.
    """
    if _chosen is None:
        with _lock:
            if _chosen is None:
                set_cpu_library(os.environ.get("BERT_FAST_CPU_LIBRARY") or _measure())
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
def _measure() -> str:
    """Return the faster library: the least of a few times each, in turn."""
    if not _has_onednn():
        return "blas"
    x, w = torch.ones(_ROWS, _COLUMNS), torch.ones(_COLUMNS, _COLUMNS)
    calls = {"blas": F.linear, "onednn": _onednn}
    least = dict.fromkeys(calls, float("inf"))
    for i in range(1 + _ROUNDS):
        for name, call in calls.items():
            began = time.perf_counter()
            call(x, w, None)
            if i:  # the first call makes its kernels
                least[name] = min(least[name], 1e3 * (time.perf_counter() - began))
    _times.update(least)
    return min(least, key=least.get)


def linear(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """Return x w^T + b (T, F) for rows x (T, D); products in other dtypes are PyTorch's."""
    if x.dtype == torch.float32 and x.numel() and w.numel() and cpu_library() == "onednn":
        return _onednn(x, w, None if b is None else b.contiguous())
    return F.linear(x, w, b)

"""The launchers of csrc/cuda on CPU tensors, compiled for this processor by cuda_emulator/."""

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from ctypes import byref, c_double, c_float, c_int, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
KERNELS = sorted(CSRC.glob("cuda/*.cu"))
CHUNK = 16384  # BERT_FAST_CHUNK
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
STREAM = 0x5EED


class Param(ctypes.Structure):
    """BertFastParam."""

    _fields_ = [
        *((name, c_void_p) for name in ("param", "grad", "exp_avg", "exp_avg_sq", "master")),
        *((name, c_void_p) for name in ("step", "lr_dev")),
        ("numel", c_int64),
        ("lr", c_float),
        ("weight_decay", c_float),
        ("param_dtype", c_int32),
        ("grad_dtype", c_int32),
    ]


class Step(ctypes.Structure):
    """BertFastStep."""

    _fields_ = [
        *((name, c_double) for name in ("beta1", "beta2", "eps", "max_norm")),
        *((name, c_void_p) for name in ("norm", "grad_scale", "found_inf")),
        ("always_adapt", c_int32),
    ]


class Unpad(ctypes.Structure):
    """BertFastUnpad."""

    _fields_ = [
        ("mask", c_void_p),
        *((name, c_int64) for name in ("B", "L", "stride_B", "stride_L")),
        ("rows", c_void_p),
        ("num_rows", c_int64),
        ("cu_seqlens", c_void_p),
        ("work", c_void_p),
        ("work_rows", c_int64),
        ("tile", c_int32),
        ("scratch", c_void_p),
        ("totals", c_void_p),
    ]


def compile_launchers(folder: Path) -> ctypes.CDLL:
    """Compile csrc/cuda for this processor; skip where there is no g++."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile csrc/cuda for the emulator")
    emulator = ROOT / "tests/cuda_emulator"
    out = folder / "launchers.so"
    command = [compiler, "-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-pthread"]
    command += ["-fno-strict-aliasing", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
    command += [f"-I{emulator}", f"-I{CSRC / 'include'}", "-x", "c++"]
    command += [*map(str, KERNELS), str(emulator / "emulator.cpp"), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    library = ctypes.CDLL(str(out))
    library.emulator_error.restype = ctypes.c_char_p
    library.emulator_stream.restype = c_void_p
    library.emulator_reset.argtypes = [ctypes.c_uint64, c_int]
    library.bert_fast_num_chunks.restype = c_int64
    return library


def pointer(t: Tensor | None) -> int | None:
    """Where the tensor's data are; None for none, and for a tensor without elements."""
    return None if t is None or t.numel() == 0 else t.data_ptr()


class Guarded:
    """Tensors that stand alone in their memory: whoever writes beside them is found.

    Args:
        offset: elements by which each begins behind an aligned address.
    """

    def __init__(self, offset: int = 0):
        self.offset = offset
        self._made: list[tuple[Tensor, Tensor]] = []

    def __call__(self, t: Tensor) -> Tensor:
        """Return a copy with poison around it: NaN, or the largest integer."""
        pad = 64
        poison = float("nan") if t.is_floating_point() else torch.iinfo(t.dtype).max
        memory = torch.full((t.numel() + 2 * pad,), poison, dtype=t.dtype)
        first = (-memory.data_ptr() // t.element_size()) % 16 + 16 + self.offset
        assert first + t.numel() < memory.numel()
        held = memory[first : first + t.numel()].view(t.shape).copy_(t)
        memory_before = memory.clone()
        memory_before[first : first + t.numel()] = 0
        self._made.append((memory, memory_before))
        self._made[-1] += (first, t.numel())
        return held

    def check(self) -> None:
        """Nothing beside them was written."""
        for memory, before, first, numel in self._made:
            beside = torch.ones(memory.shape, dtype=torch.bool)
            beside[first : first + numel] = False
            assert torch.equal(memory[beside].nan_to_num(1e9), before[beside].nan_to_num(1e9))


@dataclass
class Launchers:
    """The launchers; each call begins with an order of threads and blocks of its own.

    Attributes:
        compiled: what `compile_launchers` returned.
        seed: of that order; 0: as they are numbered.
        processors: how many blocks run together.
    """

    compiled: ctypes.CDLL
    seed: int = 0
    processors: int = 4

    def _call(self, name: str, launches: int, *args: Any) -> None:
        self.compiled.emulator_reset(self.seed, self.processors)
        status = getattr(self.compiled, name)(*args, c_void_p(STREAM))
        assert status == 0, self.compiled.emulator_error()
        assert self.compiled.emulator_launches() == launches, f"{name}: other launches than told"
        assert not launches or self.compiled.emulator_stream() == STREAM, "not the caller's stream"

    def unpad(
        self,
        mask: Tensor,
        tile: int = 128,
        known: tuple[int, int] | None = None,
        work: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor | None, list[int] | None]:
        """rows, cu_seqlens, work list and (T, max_len) of a mask; known: the caller has the two."""
        B, L = mask.shape
        guarded = Guarded()
        room = B * L if known is None else known[0]
        rows = guarded(torch.full((room,), -7))
        cu = guarded(torch.full((B + 1,), -7, dtype=torch.int32))
        entries = guarded(torch.full((2 + room // tile + B, 4), -7, dtype=torch.int32))
        scratch = guarded(torch.full((2, B), -7, dtype=torch.int32))
        totals = guarded(torch.full((2,), -7)) if known is None else None
        args = Unpad(
            mask.data_ptr(),
            *(B, L, *mask.stride()),
            *(rows.data_ptr(), room, cu.data_ptr()),
            *(entries.data_ptr() if work else None, entries.shape[0], tile),
            *(scratch.data_ptr(), pointer(totals)),
        )
        self._call("bert_fast_unpad", 1, byref(args))
        guarded.check()
        T = room if totals is None else int(totals[0])
        entries = entries[: 2 + T // tile + B] if work else None
        return rows[:T], cu, entries, None if totals is None else totals.tolist()

    def grad_norm(
        self, grads: Sequence[Tensor], grad_scale: Tensor | None = None, launches: int = 2
    ) -> Tensor:
        params = (Param * len(grads))()
        for param, grad in zip(params, grads, strict=True):
            param.grad, param.numel = pointer(grad), grad.numel()
            param.grad_dtype = DTYPES[grad.dtype]
        chunks = sum(-(-g.numel() // CHUNK) for g in grads)
        assert self.compiled.bert_fast_num_chunks(params, c_int64(len(grads))) == chunks
        guarded = Guarded()
        sums, norm = guarded(torch.full((chunks,), -7.0)), guarded(torch.tensor(-7.0))
        scale, sums_at = c_void_p(pointer(grad_scale)), c_void_p(pointer(sums))
        args = params, c_int64(len(grads)), scale, sums_at, c_void_p(pointer(norm))
        self._call("bert_fast_grad_norm", launches, *args)
        guarded.check()
        return norm

    def step(self, op: str, *args: Any, launches: int) -> None:
        """adamw_ or lamb_, with the op's own arguments."""
        lists, (sizes, lrs, decays, lr_tensors), rest = args[:6], args[6:10], args[10:]
        groups = [g for g, size in enumerate(sizes) for _ in range(size)]
        params = (Param * len(groups))()
        for i, group in enumerate(groups):
            p, grad, exp_avg, exp_avg_sq, step, master = (tensors[i] for tensors in lists)
            lr = lr_tensors[group] if lr_tensors else None
            params[i] = Param(
                *map(pointer, (p, grad, exp_avg, exp_avg_sq, master, step, lr)),
                *(p.numel(), lrs[group], decays[group], DTYPES[p.dtype], DTYPES[grad.dtype]),
            )
        always_adapt = rest[7] if len(rest) > 7 else False
        step = Step(*rest[:4], *map(pointer, rest[4:7]), always_adapt)
        guarded = Guarded()
        scalars = guarded(torch.full((len(groups), 4), -7.0))
        chunks = sum(-(-p.numel() // CHUNK) for p in lists[0])
        sums = guarded(torch.full((chunks, 2), -7.0))
        more = [c_void_p(pointer(sums))] if op == "lamb_" else []
        name = f"bert_fast_{op.rstrip('_')}"
        args = params, c_int64(len(groups)), byref(step), c_void_p(pointer(scalars)), *more
        self._call(name, launches, *args)
        guarded.check()

"""What several kernels share: launching, dropout, activations, ordered sums over rows.

Every kernel is launched through `launch`, on the device of its tensors and that device's current
stream. Sums over rows are a fixed number of partial sums, each over rows that follow one another,
then `sum_partials` in their order: no atomics, so the same input gives the same bits.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_COLUMNS = 8192  # of a row that is held in registers
NUM_PARTIALS = 256  # partial sums of a sum over rows: two for each multiprocessor of an H200

# --- dropout -------------------------------------------------------------------------------------


@triton.jit
def dropout_bits(
    key,  # int64: the forward's seed + the site
    row,  # int32, broadcasts with group: (R, 1)
    group,  # int32: column // 8, (1, G)
    c2,  # int32
    c3,  # int32
    R: tl.constexpr,
    G: tl.constexpr,
):
    """16 random bits for each of (R, 8 G) elements, as uint32; one Philox call serves eight.

    Column j takes the half j % 2 of word (j % 8) // 2 of Philox4x32-10 with these counters.
    """
    w0, w1, w2, w3 = tl.philox(key, row, group, c2, c3)
    low = tl.join(tl.join(w0 & 0xFFFF, w2 & 0xFFFF), tl.join(w1 & 0xFFFF, w3 & 0xFFFF))
    high = tl.join(tl.join(w0 >> 16, w2 >> 16), tl.join(w1 >> 16, w3 >> 16))
    return tl.reshape(tl.join(low, high), (R, 8 * G))


@triton.jit
def row_dropout(
    rows,  # (ROWS,)
    key,
    threshold,
    factor,  # 1 / share kept
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,  # columns, a multiple of 8
):
    """What dropout multiplies rows (ROWS, BLOCK_D) by: 0, or `factor`."""
    groups = tl.arange(0, BLOCK_D // 8)[None, :]
    counters = rows.to(tl.int32)[:, None]
    bits = dropout_bits(key, counters, groups, 0, 0, ROWS, BLOCK_D // 8)
    return tl.where(bits >= threshold, factor, 0.0)


def dropout_args(p: float, seed: Tensor | None) -> tuple[bool, int, float]:
    """Return (whether there is dropout, its 16-bit threshold, the factor of what is kept)."""
    threshold = round(p * 65536)
    if seed is None or threshold == 0:
        return False, 0, 1.0
    return True, threshold, 65536 / (65536 - threshold) if threshold < 65536 else 0.0


# --- activations ---------------------------------------------------------------------------------


@triton.jit
def _tanh_form_argument(x):
    """Twice the argument of tanh: 0.5 (1 + tanh(u)) is sigmoid(2 u)."""
    return 1.5957691216057308 * (x + 0.044715 * x * x * x)  # 2 sqrt(2 / pi)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Apply gelu (exact, erf), gelu_new or gelu_pytorch_tanh (tanh form), or relu to fp32 x."""
    if ACTIVATION == "relu":
        y = tl.where(x < 0, 0.0, x)  # NaN stays NaN
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    else:
        y = x * tl.sigmoid(_tanh_form_argument(x))
    return y


@triton.jit
def activate_derivative(x, ACTIVATION: tl.constexpr):
    """The derivative of `activate` at fp32 x."""
    if ACTIVATION == "relu":
        d = tl.where(x > 0, 1.0, 0.0)
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)  # 1 / sqrt(2 pi)
        d = 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * density
    else:
        u = _tanh_form_argument(x)
        s = tl.sigmoid(u)
        # sigmoid(-u) for 1 - s, whose digits would be lost where s is near 1
        d = s + x * s * tl.sigmoid(-u) * 1.5957691216057308 * (1 + 0.134145 * x * x)
    return d


# --- LayerNorm of rows ---------------------------------------------------------------------------


@triton.jit
def normalise(
    z,  # (ROWS, BLOCK_D) fp32, 0 past the row's D columns
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Return x_hat = (z - mean) * rstd (ROWS, BLOCK_D), 0 past D, and mean and rstd (ROWS,)."""
    in_row = (tl.arange(0, BLOCK_D) < D)[None, :]
    mean = tl.sum(z, axis=1) / D
    centred = tl.where(in_row, z - mean[:, None], 0.0)  # columns past D hold -mean otherwise
    # what the rounding of a large mean left in the row: a whole ulp of 1000 shows in x_hat
    rest = tl.sum(centred, axis=1) / D
    centred = tl.where(in_row, centred - rest[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / D + eps)
    return centred * rstd[:, None], mean + rest, rstd


@triton.jit
def normalise_bwd(
    g,  # (ROWS, BLOCK_D) fp32, the gradient of x_hat, 0 past the row's D columns
    x_hat,  # (ROWS, BLOCK_D) fp32, finite past D
    rstd,  # (ROWS, 1) fp32
    D: tl.constexpr,
):
    """Return the gradient of `normalise`'s z: rstd * (g - mean(g) - x_hat * mean(g * x_hat))."""
    g_mean = (tl.sum(g, axis=1) / D)[:, None]
    gx_mean = (tl.sum(g * x_hat, axis=1) / D)[:, None]
    return rstd * (g - g_mean - x_hat * gx_mean)


def row_tile(op: str, D: int, **tensors: Tensor | None) -> int:
    """Return the columns of a tile that holds rows of D, at least one Philox call's.

    Raises:
        NotImplementedError: D, or the dtype of one of the tensors, is not supported.
    """
    reasons = unsupported_dtypes(**tensors)
    if not 1 <= D <= MOST_COLUMNS:
        reasons.append(f"D: want 1 to {MOST_COLUMNS} on a GPU, got {D}")
    unsupported(op, reasons)
    return max(8, triton.next_power_of_2(D))


# --- sums over rows ------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["P"])
def _sum_partials_kernel(
    partials_ptr,  # (P, S, N) fp32
    out0_ptr,  # (N,) each
    out1_ptr,
    out2_ptr,
    P,
    N,
    S: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    which = tl.program_id(1)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # the rows are summed once, at the end: within the loop nothing crosses threads
    sums = tl.zeros((BLOCK_P, BLOCK_N), dtype=tl.float32)
    for first in range(0, P, BLOCK_P):
        rows = (first + tl.arange(0, BLOCK_P)).to(tl.int64)
        mask = (rows < P)[:, None] & (cols < N)[None, :]
        offs = (rows * S + which)[:, None] * N + cols[None, :]
        sums += tl.load(partials_ptr + offs, mask=mask, other=0.0)
    total = tl.sum(sums, axis=0)
    out_ptrs = (out0_ptr, out1_ptr, out2_ptr)
    for s in tl.static_range(S):
        if which == s:
            tl.store(out_ptrs[s] + cols, total, mask=cols < N)


def split_rows(T: int, rows: int) -> tuple[int, int]:
    """Return (rows for each program, programs) of a sum over T rows in tiles of `rows`.

    At most `NUM_PARTIALS` programs, and one even without rows: it writes 0.
    """
    each = rows * max(1, triton.cdiv(T, NUM_PARTIALS * rows))
    return each, max(1, triton.cdiv(T, each))


def sum_partials(partials: Tensor, outs: Sequence[Tensor]) -> None:
    """Write partials.sum(0) into `outs`, each in its own dtype.

    Args:
        partials: (P, S, N) fp32 contiguous, S from 1 to 3.
        outs: S tensors (N,).
    """
    P, S, N = partials.shape
    out_ptrs = [*outs, *[outs[0]] * (3 - S)]
    grid = triton.cdiv(N, 32), S
    launch(_sum_partials_kernel, grid, partials, *out_ptrs, P, N, S, BLOCK_P=128, BLOCK_N=32)


# --- launching -----------------------------------------------------------------------------------


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, **options: Any):
    """Launch on the device of the first argument; an empty grid launches nothing.

    Floating-point fusion is said, because its default changes with Triton 3.10.
    """
    if 0 not in grid:
        with torch.cuda.device_of(args[0]):
            kernel[grid](*args, num_warps=num_warps, enable_fp_fusion=True, **options)


def aligned(*tensors: Tensor | None) -> list[Tensor | None]:
    """Return the tensors, those copied that do not begin at a multiple of 16 bytes on a GPU.

    Triton gives such a tensor's elements to threads in another order, so that sums would have
    other bits.
    """
    return [t.clone() if t is not None and t.is_cuda and t.data_ptr() % 16 else t for t in tensors]


def generation(t: Tensor) -> int:
    """Return 10 x the compute capability of the tensor's GPU; without one (the interpreter) 90."""
    return _generation_of(t.device) if t.is_cuda else 90


@functools.cache
def _generation_of(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def by_generation(rules: Mapping[int, Any], t: Tensor) -> Any:
    """Return the entry of a launch rule for the tensor's GPU: its generation's, or one before."""
    mine = max(generation(t), min(rules))
    return rules[max(g for g in rules if g <= mine)]


def unsupported(op: str, reasons: Sequence[str]) -> None:
    """Raise NotImplementedError with all the reasons, if there are any."""
    if reasons:
        raise NotImplementedError(f"{op}: {'; '.join(reasons)}")


def unsupported_dtypes(**tensors: Tensor | None) -> list[str]:
    """Return a reason for each tensor whose dtype no kernel takes."""
    takes = torch.float32, torch.float16, torch.bfloat16
    return [
        f"{name}: want fp32, fp16 or bf16 on a GPU, got {t.dtype}"
        for name, t in tensors.items()
        if t is not None and t.dtype not in takes
    ]

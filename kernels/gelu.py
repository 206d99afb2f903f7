"""bias + activation (GELU in its exact and its tanh form, ReLU), forward and backward.

    h = x + bias      y = f(h)      T rows, F columns; the bias is optional
    dx = dy f'(h)     db = sum_T(dx)

    gelu:      f(h) = h/2 (1 + erf(h / sqrt(2)))      f'(h) = f(h)/h + h exp(-h^2/2) / sqrt(2 pi)
    tanh form: f(h) = h/2 (1 + tanh(u)), u = sqrt(2 / pi) (h + 0.044715 h^3)
    relu:      f(h) = max(h, 0)

The backward recomputes f' from x, so that nothing but x is saved, and sums dx over the rows before
it is rounded: a program takes rows that follow one another, `sum_partials` adds up in order.

Paper: Hendrycks and Gimpel, Gaussian Error Linear Units, 2016, https://arxiv.org/abs/1606.08415
Bound by memory: forward moves 2 T F elements, backward 3 T F.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_fast.kernels import common
from bert_fast.kernels.linear import column_tile

# --- kernels -------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["T"])
def _bias_gelu_fwd_kernel(
    x_ptr,  # (T, F)
    b_ptr,  # (F,) or None
    y_ptr,  # (T, F)
    T,
    F: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    # rows along axis 0: axis 1 takes no more than 65,535 programs
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (rows < T)[:, None] & (cols < F)[None, :]
    offs = rows[:, None] * F + cols[None, :]
    h = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if b_ptr is not None:
        h += tl.load(b_ptr + cols, mask=cols < F, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + offs, common.activate(h, ACTIVATION), mask=mask)


@triton.jit(do_not_specialize=["T", "rows_per_program"])
def _bias_gelu_bwd_kernel(
    dy_ptr,  # (T, F)
    x_ptr,  # (T, F)
    b_ptr,  # (F,) or None
    dx_ptr,  # (T, F)
    partials_ptr,  # (P, 1, F) fp32: db
    T,
    rows_per_program,
    F: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    cols = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    bias = tl.zeros((BLOCK_F,), dtype=tl.float32)
    if b_ptr is not None:
        bias = tl.load(b_ptr + cols, mask=cols < F, other=0.0).to(tl.float32)
    db = tl.zeros((BLOCK_F,), dtype=tl.float32)
    begin = tl.program_id(0) * rows_per_program
    end = tl.minimum(begin + rows_per_program, T)
    for first in range(begin, end, ROWS):
        rows = first + tl.arange(0, ROWS).to(tl.int64)
        mask = (rows < end)[:, None] & (cols < F)[None, :]
        offs = rows[:, None] * F + cols[None, :]
        dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        h = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32) + bias[None, :]
        if ACTIVATION == "relu":
            dx = tl.where(h > 0, dy, 0.0)  # no product: an infinite dy times 0 would be NaN
        else:
            dx = dy * common.activate_derivative(h, ACTIVATION)
        tl.store(dx_ptr + offs, dx, mask=mask)
        # a row past the end adds nothing even where the bias has no derivative
        db += tl.sum(tl.where(mask, dx, 0.0), axis=0)
    out = partials_ptr + tl.program_id(0).to(tl.int64) * F + cols
    tl.store(out, db, mask=cols < F)


# --- launch rules; GPU and date: not measured yet ------------------------------------------------

# By GPU generation: (rows, columns at most, warps) of a tile. In 16 bits a row of the tile is one
# load of 16 bytes for each thread; four rows are four of x (and four of dy) on their way, and leave
# registers for enough warps to hide the arithmetic, about 30 instructions an element. In the
# backward a thread keeps its eight columns from row to row, so that db needs no other thread.
FWD_TILES = {80: (4, 1024, 4)}
BWD_TILES = {80: (4, 1024, 4)}


# --- launchers -----------------------------------------------------------------------------------


def bias_gelu_fwd(x: Tensor, b: Tensor | None, activation: str) -> Tensor:
    """Return activation(x + b) in the dtype of x.

    Args:
        x: (T, F), fp32, fp16 or bf16.
        b: (F,), fp32, fp16 or bf16, or None.
        activation: a name that `common.activate` knows.

    Raises:
        NotImplementedError: a dtype is not supported.
    """
    common.unsupported("bias_gelu", common.unsupported_dtypes(x=x, b=b))
    T, F = x.shape
    y = torch.empty_like(x)
    rows, block_f, warps = column_tile(FWD_TILES, x)
    common.launch(
        _bias_gelu_fwd_kernel,
        (triton.cdiv(T, rows), triton.cdiv(F, block_f)),
        *(x, b, y, T),
        F=F,
        ACTIVATION=activation,
        ROWS=rows,
        BLOCK_F=block_f,
        num_warps=warps,
    )
    return y


def bias_gelu_bwd(
    dy: Tensor, x: Tensor, b: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """Return (dx, db), dx in the dtype of x, db in that of b (of x without b).

    Args:
        dy: (T, F), fp32, fp16 or bf16.
        x: (T, F), fp32, fp16 or bf16.
        b: (F,), fp32, fp16 or bf16, or None.
        activation: a name that `common.activate` knows.

    Raises:
        NotImplementedError: a dtype is not supported.
    """
    common.unsupported("bias_gelu_bwd", common.unsupported_dtypes(dy=dy, x=x, b=b))
    dy, x, b = common.aligned(dy, x, b)
    T, F = x.shape
    dx = torch.empty_like(x)
    db = torch.empty(F, dtype=x.dtype if b is None else b.dtype, device=x.device)
    rows, block_f, warps = column_tile(BWD_TILES, x)
    rows_per_program, programs = common.split_rows(T, rows)
    partials = torch.empty(programs, 1, F, dtype=torch.float32, device=x.device)
    common.launch(
        _bias_gelu_bwd_kernel,
        (programs, triton.cdiv(F, block_f)),
        *(dy, x, b, dx, partials, T, rows_per_program),
        F=F,
        ACTIVATION=activation,
        ROWS=rows,
        BLOCK_F=block_f,
        num_warps=warps,
    )
    common.sum_partials(partials, [db])
    return dx, db

"""A linear layer: its bias gradient, a sum over rows, and a product whose rows do not see T.

    y = x w^T + b      dx = dy w      dw = dy^T x      db = sum_T(dy)      T rows, F columns of dy

The products are cuBLAS's, through PyTorch: a GEMM of ours stays out until one with a fused
epilogue is measurably faster. cuBLAS chooses its kernel by T, so that a row's bits change with the
batch. Where they must not, `linear` makes y, and dx with w transposed: one tile for any T, all of D
in one program and in order, sums in fp32, one cast. A row of the tile sees no other.

For db each program sums rows that follow one another, in fp32, and `sum_partials` adds the partial
sums in order.

`linear` is bound by arithmetic at many rows, 2 T D F FLOPs, and by memory at few: F D elements of
w. `column_sums` is bound by memory: T F elements read; the partial sums are 4 F bytes for each of
at most 256 programs along the rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_fast.kernels import common

# --- kernels -------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["T", "rows_per_program"])
def _column_sums_kernel(
    dy_ptr,  # (T, F)
    partials_ptr,  # (P, 1, F) fp32
    T,
    rows_per_program,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    cols = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    total = tl.zeros((BLOCK_F,), dtype=tl.float32)
    begin = tl.program_id(0) * rows_per_program
    end = tl.minimum(begin + rows_per_program, T)
    for first in range(begin, end, ROWS):
        rows = first + tl.arange(0, ROWS).to(tl.int64)
        mask = (rows < end)[:, None] & (cols < F)[None, :]
        dy = tl.load(dy_ptr + rows[:, None] * F + cols[None, :], mask=mask, other=0.0)
        total += tl.sum(dy.to(tl.float32), axis=0)
    out = partials_ptr + tl.program_id(0).to(tl.int64) * F + cols
    tl.store(out, total, mask=cols < F)


@triton.jit(do_not_specialize=["T"])
def _linear_kernel(
    x_ptr,  # (T, D)
    w_ptr,  # (F, D), of any strides
    b_ptr,  # (F,) or None
    y_ptr,  # (T, F)
    T,
    D,
    F,
    w_stride_f,
    w_stride_d,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # rows along axis 0: axis 1 takes no more than 65,535 programs
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.program_id(1).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    x_ptrs = x_ptr + rows[:, None] * D
    w_ptrs = w_ptr + cols[None, :] * w_stride_f
    total = tl.zeros((BLOCK_T, BLOCK_F), dtype=tl.float32)
    for first in range(0, D, BLOCK_D):
        at = (first + tl.arange(0, BLOCK_D)).to(tl.int64)
        x_mask = (rows < T)[:, None] & (at < D)[None, :]
        w_mask = (at < D)[:, None] & (cols < F)[None, :]
        x = tl.load(x_ptrs + at[None, :], mask=x_mask, other=0.0)
        w = tl.load(w_ptrs + at[:, None] * w_stride_d, mask=w_mask, other=0.0)
        total = tl.dot(x, w, total, input_precision="ieee")
    if b_ptr is not None:
        total += tl.load(b_ptr + cols, mask=cols < F, other=0.0).to(tl.float32)[None, :]
    mask = (rows < T)[:, None] & (cols < F)[None, :]
    tl.store(y_ptr + rows[:, None] * F + cols[None, :], total, mask=mask)


# --- launch rules; GPU and date: not measured yet ------------------------------------------------

# By GPU generation, and bytes of an element. 64 rows are the fewest that Hopper's product of a
# warpgroup takes, and a small batch fills such a tile soonest; of 128 columns each reads the same
# row of x. fp32 is multiplied without tensor cores, out of registers, which hold less.
PRODUCT = {
    80: {
        2: {"BLOCK_T": 64, "BLOCK_F": 128, "BLOCK_D": 64, "num_warps": 4, "num_stages": 3},
        4: {"BLOCK_T": 64, "BLOCK_F": 64, "BLOCK_D": 16, "num_warps": 4, "num_stages": 2},
    },
}

# By GPU generation: (rows, columns at most, warps) of a tile. In 16 bits a row of the tile is one
# load of 16 bytes for each thread: a thread keeps its eight columns, and sums over rows need nobody
# else. Eight rows are eight such loads on their way.
COLUMN_SUM_TILES = {80: (8, 1024, 4)}


def column_tile(tiles: dict[int, tuple[int, int, int]], x: Tensor) -> tuple[int, int, int]:
    """Return (rows, columns, warps) of a tile for (T, F); few columns make it smaller."""
    rows, most, warps = common.by_generation(tiles, x)
    block_f = min(most, triton.next_power_of_2(max(16, x.shape[1])))
    return rows, block_f, max(1, warps * block_f // most)


# --- launchers -----------------------------------------------------------------------------------


def linear(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """Return x w^T + b, of which no row's bits depend on the others or on how many there are.

    Products of fp32 are IEEE, also where PyTorch is told to use TF32 for its own.

    Args:
        x: (T, D) contiguous, fp32, fp16 or bf16.
        w: (F, D) of any strides, dtype of x.
        b: (F,) contiguous, dtype of x, or None.

    Returns:
        (T, F) in the dtype of x.

    Raises:
        NotImplementedError: the dtype is not supported.
    """
    common.unsupported("linear", common.unsupported_dtypes(x=x, w=w, b=b))
    x, w, b = common.aligned(x, w, b)
    (T, D), F = x.shape, w.shape[0]
    y = torch.empty(T, F, dtype=x.dtype, device=x.device)
    tile = common.by_generation(PRODUCT, x)[x.element_size()]
    grid = triton.cdiv(T, tile["BLOCK_T"]), triton.cdiv(F, tile["BLOCK_F"])
    common.launch(_linear_kernel, grid, x, w, b, y, T, D, F, *w.stride(), **tile)
    return y


def column_sums(dy: Tensor) -> Tensor:
    """Return the sums over the rows of dy, in its dtype.

    Args:
        dy: (T, F), fp32, fp16 or bf16.

    Returns:
        (F,).

    Raises:
        NotImplementedError: the dtype is not supported.
    """
    common.unsupported("column_sums", common.unsupported_dtypes(dy=dy))
    (dy,) = common.aligned(dy)
    T, F = dy.shape
    db = torch.empty(F, dtype=dy.dtype, device=dy.device)
    rows, block_f, warps = column_tile(COLUMN_SUM_TILES, dy)
    rows_per_program, programs = common.split_rows(T, rows)
    partials = torch.empty(programs, 1, F, dtype=torch.float32, device=dy.device)
    common.launch(
        _column_sums_kernel,
        (programs, triton.cdiv(F, block_f)),
        *(dy, partials, T, rows_per_program),
        F=F,
        ROWS=rows,
        BLOCK_F=block_f,
        num_warps=warps,
    )
    common.sum_partials(partials, [db])
    return db

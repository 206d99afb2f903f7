"""What a linear layer needs beside matrix products: the bias gradient, a sum over rows.

    y = x w^T + b      dx = dy w      dw = dy^T x      db = sum_T(dy)      T rows, F columns of dy

The products are cuBLAS's, through PyTorch: a GEMM of ours stays out until one with a fused
epilogue is measurably faster. For db each program sums rows that follow one another, in fp32, and
`sum_partials` adds the partial sums in order.

Bound by memory: T F elements read; the partial sums are 4 F bytes for each of at most 256 programs
along the rows.
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


# --- launch rules; GPU and date: not measured yet ------------------------------------------------

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

"""bias + dropout + residual + LayerNorm, forward and backward, each in one pass over the rows.

    z = dropout(x + bias) + residual      T rows (tokens), D columns (features)
    y = (z - mean) * rstd * w + b         rstd = 1 / sqrt(var + eps), mean and var of a row of z

bias, residual and dropout are each optional; without all three z is x, and is not stored again. The
variance is that of the centred row: a difference of squares would lose its digits far from zero.

With x_hat = (z - mean) * rstd and g = dy * w the gradients are
    dz = rstd * (g - mean(g) - x_hat * mean(g * x_hat))      that of the residual
    dx = dz * (0 where dropped, else 1 / share kept)          dbias = sum_T(dx)
    dw = sum_T(dy * x_hat)                                    db = sum_T(dy)
x_hat comes from the saved z, never from y, which says nothing about z where w is 0. The mask is
drawn again from its counters. Sums over rows: a program takes rows that follow one another and
writes one partial sum; `sum_partials` adds them in order.

Paper: Ba et al., Layer Normalization, 2016, https://arxiv.org/abs/1607.06450
Bound by memory: forward moves 4 T D elements (x, residual, y, z), backward 4 T D (dy, z, dz, dx), 3
without dropout; statistics, weights and partial sums are next to nothing beside them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_fast.kernels import common

# --- kernels -------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["T", "eps", "site", "threshold", "factor"])
def _add_layer_norm_fwd_kernel(
    x_ptr,  # (T, D)
    bias_ptr,  # (D,) or None
    residual_ptr,  # (T, D) or None
    w_ptr,  # (D,)
    b_ptr,  # (D,)
    y_ptr,  # (T, D)
    z_ptr,  # (T, D) or None: z is x
    mean_ptr,  # (T,) fp32
    rstd_ptr,  # (T,) fp32
    seed_ptr,  # (1,) int64, or None: no dropout
    T,
    eps,
    site,
    threshold,
    factor,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    in_row = (cols < D)[None, :]
    mask = (rows < T)[:, None] & in_row
    offs = rows[:, None] * D + cols[None, :]

    z = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    if seed_ptr is not None:
        key = tl.load(seed_ptr) + site
        z *= common.row_dropout(rows, key, threshold, factor, ROWS, BLOCK_D)
    if residual_ptr is not None:
        z += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if z_ptr is not None:
        tl.store(z_ptr + offs, z, mask=mask)

    x_hat, mean, rstd = common.normalise(z, eps, D, BLOCK_D)
    tl.store(mean_ptr + rows, mean, mask=rows < T)
    tl.store(rstd_ptr + rows, rstd, mask=rows < T)

    w = tl.load(w_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    b = tl.load(b_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + offs, x_hat * w + b, mask=mask)


@triton.jit(do_not_specialize=["T", "rows_per_program", "site", "threshold", "factor"])
def _add_layer_norm_bwd_kernel(
    dy_ptr,  # (T, D)
    z_ptr,  # (T, D)
    w_ptr,  # (D,)
    mean_ptr,  # (T,) fp32
    rstd_ptr,  # (T,) fp32
    seed_ptr,  # (1,) int64, or None: no dropout
    dx_ptr,  # (T, D) or None: dx is dz
    dz_ptr,  # (T, D)
    partials_ptr,  # (P, S, D) fp32: dw, db and, with S = 3, dbias
    T,
    rows_per_program,
    site,
    threshold,
    factor,
    D: tl.constexpr,
    S: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK_D)
    in_row = (cols < D)[None, :]
    w = tl.load(w_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    key = tl.zeros((), dtype=tl.int64)
    if seed_ptr is not None:
        key = tl.load(seed_ptr) + site
    # summed over the tile's rows once, at the end: within the loop nothing crosses threads for them
    dw = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
    db = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
    dbias = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)

    begin = program * rows_per_program
    end = tl.minimum(begin + rows_per_program, T)
    for first in tl.range(begin, end, ROWS, num_stages=STAGES):
        rows = first + tl.arange(0, ROWS).to(tl.int64)
        here = rows < end
        mask = here[:, None] & in_row
        offs = rows[:, None] * D + cols[None, :]
        dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask=here, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + rows, mask=here, other=0.0)[:, None]

        x_hat = (z - mean) * rstd  # past D it is no number of the row, but dy and g are 0 there
        dz = common.normalise_bwd(dy * w, x_hat, rstd, D)
        tl.store(dz_ptr + offs, dz, mask=mask)
        dw += dy * x_hat
        db += dy
        dx = dz
        if seed_ptr is not None:
            dx *= common.row_dropout(rows, key, threshold, factor, ROWS, BLOCK_D)
        if dx_ptr is not None:
            tl.store(dx_ptr + offs, dx, mask=mask)
        if S == 3:
            dbias += tl.where(mask, dx, 0.0)

    out = partials_ptr + program.to(tl.int64) * S * D + cols
    tl.store(out, tl.sum(dw, axis=0), mask=cols < D)
    tl.store(out + D, tl.sum(db, axis=0), mask=cols < D)
    if S == 3:
        tl.store(out + 2 * D, tl.sum(dbias, axis=0), mask=cols < D)


# --- launch rules; GPU and date: not measured yet ------------------------------------------------

# By GPU generation, then by columns of a tile, which are D up to a power of two: (rows, warps). A
# generation without an entry takes the one below.
#
# Forward: 32 elements a thread, in 16 bits four loads of 16 bytes for each of x and residual. Of
# about 70 registers a thread, 28 such warps fit on a multiprocessor: 110 KB on their way, where
# 30 KB cover a latency of 0.8 us at 4.8 TB/s. Up to 1,024 columns a row is one warp's, and its sums
# need no barrier.
FWD_TILES = {
    80: {
        **{8: (16, 1), 16: (16, 1), 32: (16, 1), 64: (16, 1), 128: (8, 1), 256: (4, 1)},
        **{512: (2, 1), 1024: (1, 1), 2048: (1, 2), 4096: (1, 4), 8192: (1, 8)},
    }
}
# Backward, and stages of its loads. There are few programs, a partial sum each, two of which share
# a multiprocessor: so each has eight warps and loads three tiles ahead, 48 KB on their way in 16
# bits. Beside three sums eight elements a thread leave room for both in the registers; 8,192
# columns have twice as many, and no second program. Of shared memory a block has 99 KB on
# generations 86, 89 and 120, too little to load 8,192 columns of fp32 ahead.
_BWD_TILES = {
    **{8: (16, 1, 4), 16: (16, 1, 4), 32: (16, 2, 4), 64: (16, 4, 4), 128: (16, 8, 4)},
    **{256: (8, 8, 4), 512: (4, 8, 4), 1024: (2, 8, 4), 2048: (1, 8, 4), 4096: (1, 16, 3)},
    **{8192: (1, 16, 1)},
}
_BWD_TILES_AHEAD = _BWD_TILES | {8192: (1, 16, 3)}
BWD_TILES = {
    80: _BWD_TILES_AHEAD,
    86: _BWD_TILES,
    90: _BWD_TILES_AHEAD,
    100: _BWD_TILES_AHEAD,
    120: _BWD_TILES,
}


# --- launchers -----------------------------------------------------------------------------------


def add_layer_norm_fwd(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    w: Tensor,
    b: Tensor,
    eps: float,
    p: float,
    seed: Tensor | None,
    site: int,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (y, z, mean, rstd); z is empty where it would be x.

    Args:
        x: (T, D), fp32, fp16 or bf16; as are all that follow, in dtypes of their own.
        bias: (D,) or None.
        residual: (T, D) or None.
        w: (D,).
        b: (D,).
        eps: added to the variance.
        p: probability of dropping.
        seed: (1,) int64, or None for no dropout.
        site: number of the dropout in the model.
        out_dtype: of y and z; mean and rstd (T,) are fp32.

    Raises:
        NotImplementedError: a dtype or D is not supported.
    """
    T, D = x.shape
    block_d = common.row_tile("add_layer_norm", D, x=x, bias=bias, residual=residual, w=w, b=b)
    x, bias, residual, w, b = common.aligned(x, bias, residual, w, b)
    drops, threshold, factor = common.dropout_args(p, seed)
    is_x = bias is None and residual is None and (seed is None or p == 0)
    y = torch.empty_like(x, dtype=out_dtype)
    z = torch.empty(0 if is_x else x.shape, dtype=out_dtype, device=x.device)
    mean, rstd = (torch.empty(T, dtype=torch.float32, device=x.device) for _ in range(2))
    rows, warps = common.by_generation(FWD_TILES, x)[block_d]
    common.launch(
        _add_layer_norm_fwd_kernel,
        (triton.cdiv(T, rows),),
        *(x, bias, residual, w, b, y, None if is_x else z, mean, rstd, seed if drops else None),
        *(T, eps, site, threshold, factor),
        D=D,
        ROWS=rows,
        BLOCK_D=block_d,
        num_warps=warps,
    )
    return y, z, mean, rstd


def add_layer_norm_bwd(
    dy: Tensor,
    z: Tensor,
    w: Tensor,
    mean: Tensor,
    rstd: Tensor,
    with_bias: bool,
    p: float,
    seed: Tensor | None,
    site: int,
    x_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (dx, dz, dw, db, dbias); dx is empty where it would be dz, dbias without a bias.

    Args:
        dy: (T, D), fp32, fp16 or bf16; as are z and w, in dtypes of their own.
        z: (T, D), as saved by the forward; its x where that was empty.
        w: (D,).
        mean: (T,) fp32.
        rstd: (T,) fp32.
        with_bias: whether the forward had a bias.
        p: probability of dropping, as is seed, and site, those of the forward.
        seed: (1,) int64, or None for no dropout.
        site: number of the dropout in the model.
        x_dtype: of dx; dz is of the dtype of z, dw and db are of that of w, dbias of what x_dtype
            and that promote to.

    Raises:
        NotImplementedError: a dtype or D is not supported.
    """
    T, D = z.shape
    block_d = common.row_tile("add_layer_norm_bwd", D, dy=dy, z=z, w=w)
    dy, z, w = common.aligned(dy, z, w)
    drops, threshold, factor = common.dropout_args(p, seed)
    is_dz = (seed is None or p == 0) and x_dtype == z.dtype
    dx = torch.empty(0 if is_dz else z.shape, dtype=x_dtype, device=z.device)
    dz = torch.empty_like(z)
    dw, db = torch.empty_like(w), torch.empty_like(w)
    dbias_dtype = torch.promote_types(x_dtype, w.dtype)
    dbias = torch.empty(D if with_bias else 0, dtype=dbias_dtype, device=w.device)
    rows, warps, stages = common.by_generation(BWD_TILES, z)[block_d]
    sums = [dw, db, dbias] if with_bias else [dw, db]
    rows_per_program, programs = common.split_rows(T, rows)
    partials = torch.empty(programs, len(sums), D, dtype=torch.float32, device=z.device)
    common.launch(
        _add_layer_norm_bwd_kernel,
        (programs,),
        *(dy, z, w, mean, rstd, seed if drops else None, None if is_dz else dx, dz, partials),
        *(T, rows_per_program, site, threshold, factor),
        D=D,
        S=len(sums),
        ROWS=rows,
        BLOCK_D=block_d,
        STAGES=stages,
        num_warps=warps,
    )
    common.sum_partials(partials, sums)
    return dx, dz, dw, db, dbias
